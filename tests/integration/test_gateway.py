# SPDX-License-Identifier: BSD-3-Clause
"""A fleet of three small hosts behind two gateways: claims, users, changes of hosts, and failures."""

import contextlib
import http.client
import json
import os
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qs, urlsplit

import pytest
import taken_over
from restrictions import attempts_of

import browser
import product
from conftest import Agent
from fleet import HTTP_PORT, Fleet, gateway_address, host_address
from notebook import Notebook
from product import Api

CAPACITY = 4
HOSTS = f"""
[slots]
capacity = {CAPACITY}
memory = "512M"
[pool]
warm = 1
"""
LABELS = ("a", "b", "c")
PERSON, OTHER, BANNED = (f"10.77.0.{number}" for number in (201, 202, 203))
HTML = {"Accept": "text/html"}
# Readable by root only, as ACME clients store it.
CERTIFICATE = """
mkdir -p -m 700 /root/live && cd /root/live && chmod 400 privkey.pem 2>/dev/null
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=nb.example.org -keyout privkey.pem -out fullchain.pem
"""


class Front:
    """One gateway, used through its loopback interface."""

    def __init__(self, host):
        self.host, self.api = host, Api(host, HTTP_PORT, timeout=30)
        self.agent = Agent(host)

    def spawn(self, **headers):
        """Claim a slot with tmpnb's API; returns its id and token."""
        response = self.api.post("/api/spawn", **headers)
        assert response.status == 200, (response.status, response.body)
        return claim_of(response.json()["url"])

    def open(self):
        return self.at(self.spawn())

    def at(self, claim):
        """A notebook in a slot, used through this gateway."""
        return Notebook(self.host, claim, HTTP_PORT)

    def run(self, *words):
        """`nbagent gateway WORDS`, which must succeed."""
        return self.host.run(["nbagent", "gateway", *words]).stdout.strip()

    def refused(self, *words):
        """Run the same command, which must fail; returns its error."""
        done = self.host.run(["nbagent", "gateway", *words], check=False)
        assert done.returncode, done.stdout
        return done.stderr

    def figures(self):
        return self.api.get("/api/stats").json()

    def wait_hosts(self, labels):
        """Wait until exactly these hosts are up."""
        def up():
            hosts = self.figures()["hosts"].items()
            return {name.removeprefix("http://") for name, host in hosts if not host.get("down")} == set(labels)

        self.agent.wait(up, f"the hosts to be {labels}")


def claim_of(url):
    parts = urlsplit(url)
    return {"slot": parts.path.split("/")[2], "token": parse_qs(parts.query)["token"][0]}


class RunningFleet:
    """The gateways and the agents of a fleet of test machines."""

    def __init__(self, machines):
        self.machines = machines
        self.gateways = [Front(host) for host in machines.gateways]
        self.hosts = {label: Agent(host) for label, host in machines.hosts.items()}

    def in_use(self):
        return [slot["slot"] for host in self.hosts.values() for slot in host.slots() if slot["claimed_at"]]

    def clear(self):
        """End every claimed slot, and wait until both gateways have the new figures."""
        for slot in self.in_use():
            self.hosts[slot.partition("-")[0]].api.delete(f"/slots/{slot}")
        for host in self.hosts.values():
            host.wait(lambda host=host: host.api.get("/stats").json()["available"] == CAPACITY, "an empty host")
        for front in self.gateways:
            front.agent.wait(lambda front=front: self.weights(front) == dict.fromkeys(self.hosts, 100),
                             "the gateway to have the weights of empty hosts", 20)

    def weights(self, front):
        """The weights of the hosts that are up in HAProxy, which are their free capacity in percent."""
        rows = front.api.host.run(["curl", "-s", "127.0.0.1:8405/stats;csv"]).stdout.splitlines()
        names = rows[0].lstrip("# ").split(",")
        found = [dict(zip(names, row.split(","), strict=False)) for row in rows[1:]]
        return {row["svname"]: int(row["weight"]) for row in found
                if row["pxname"] == "claims" and row["svname"] in LABELS and row["status"].startswith("UP")}

    def call(self, source, method, path, **headers):
        """Send a request to the first gateway from the address `source`."""
        connection = http.client.HTTPConnection(gateway_address(0), HTTP_PORT, timeout=30)
        connection.sock = self.machines.lan.connect(gateway_address(0), HTTP_PORT, source)
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            headers = {k.lower(): v for k, v in response.getheaders()}
            return product.Answer(response.status, headers, response.read())


@pytest.fixture(scope="module")
def whole():
    machines = Fleet(f"g{os.getpid() % 100000}", LABELS, gateways=2)
    try:
        machines.up(product.say, HOSTS, "[landing]\nrate = 1000\n")
        for source in (PERSON, OTHER, BANNED):
            machines.lan.take(source)
        yield RunningFleet(machines)
    finally:
        machines.down()


@pytest.fixture
def fleet(whole):
    """The fleet without claimed slots."""
    whole.clear()
    return whole


@pytest.fixture
def settings(fleet):
    """Additional settings of the first gateway during one test."""
    path = "/etc/nbagent/gateway.d/90-one-test.toml"

    def use(text):
        fleet.gateways[0].host.run(["tee", path], input=text)
        assert fleet.gateways[0].run("apply") == "applied"

    yield use
    fleet.gateways[0].host.run(["rm", "-f", path])
    fleet.gateways[0].run("apply")


def test_the_whole_capacity_is_handed_out_and_then_claims_are_refused(fleet):
    front = fleet.gateways[0]
    claims = [front.spawn() for _ in range(CAPACITY * len(LABELS))]
    assert Counter(claim["slot"][0] for claim in claims) == dict.fromkeys(LABELS, CAPACITY)
    for one in fleet.gateways:
        refused = one.api.post("/api/spawn")
        assert (refused.status, refused.json()) == (429, {"status": "full"})
        full = one.api.get("/spawn/lab/tree/x.ipynb?a=b", **HTML)
        assert full.status == 503 and 2 <= int(full.headers["retry-after"]) <= 60
        assert b"12 of 12 are in use" in full.body and b"/spawn/lab/tree/x.ipynb?a=b" in full.body
    # Full hosts serve their users, and a slot that becomes free is handed out.
    assert front.at(claims[0]).get("api/status")["kernels"] == 0
    slot = claims[0]["slot"]
    fleet.hosts[slot[0]].api.delete(f"/slots/{slot}")
    front.agent.wait(lambda: front.api.post("/api/spawn").status == 200, "the free slot")


def test_claims_are_spread_over_hosts(fleet):
    first = [fleet.gateways[number % 2].spawn()["slot"][0] for number in range(8)]
    assert len(Counter(first)) > 1 and max(Counter(first).values()) <= CAPACITY


def test_the_same_key_returns_the_same_slot_through_both_gateways(fleet):
    for key in ("click-1", "click-2", "click-3"):
        with ThreadPoolExecutor(4) as threads:
            spawn = [front.spawn for front in fleet.gateways * 2]
            slots = {made["slot"] for made in threads.map(lambda one, key=key: one(**{"Idempotency-Key": key}), spawn)}
        assert len(slots) == 1
    assert len(fleet.in_use()) == 3


def test_a_link_keeps_path_and_query(fleet):
    answer = fleet.gateways[0].api.get("/spawn/lab/tree/Welcome.ipynb?reset=1", Host="nb.example.org")
    where = urlsplit(answer.headers["location"])
    assert answer.status == 302 and where.netloc in ("", "nb.example.org")
    assert where.path.endswith("/lab/tree/Welcome.ipynb") and parse_qs(where.query)["reset"] == ["1"]


def test_a_gateway_lends_a_slot_of_a_host_that_keep_claims(fleet):
    front, form = fleet.gateways[0].api, {"Content-Type": "application/x-www-form-urlencoded"}
    lent = front.call("POST", "/api/lend", b"path=lab/tree/Welcome.ipynb", form).json()
    assert fleet.in_use() == [lent["slot"]]
    assert lent["url"].startswith(f"http://127.0.0.1/user/{lent['slot']}/lab/tree/Welcome.ipynb?")
    # A second gateway has the same route to the host.
    token = f"token={lent['token']}".encode()
    kept = fleet.gateways[1].api.call("POST", f"/user/{lent['slot']}/nbagent/keep", token, form)
    assert kept.status == 204
    page = front.get("/", Accept="text/html")
    assert b"speculationrules" in page.body
    # The gateway tries one host, and that of the first slot is half full.
    agent = fleet.gateways[0].agent
    other = agent.wait(
        lambda: (got := front.call("POST", "/api/lend", b"", form)).status == 200 and got.json(), "a lent slot")
    token = f"token={other['token']}".encode()
    assert front.call("POST", f"/user/{other['slot']}/nbagent/return", token, form).status == 204
    agent.wait(lambda: fleet.in_use() == [lent["slot"]], "the end of the other slot")


def test_any_gateway_serves_any_user_and_a_reload_keeps_the_websocket(fleet):
    one, two = fleet.gateways
    claim = one.spawn()
    kernel = one.at(claim).kernel()
    kernel.run("x = 21")
    assert two.at(claim).get("api/kernels")[0]["id"] == kernel.id
    assert one.run("apply") == "applied"
    assert kernel.run("2 * x").text == "42"
    assert two.at(claim).run("1 + 1").text == "2"
    kernel.close()
    one.host.run(["systemctl", "restart", "nbagent-gateway.service"])
    # The gateway has no state, so a restart loses none.
    one.agent.wait(lambda: one.api.get(f"/user/{claim['slot']}/api").status == 200, "the restarted gateway")
    again = type(kernel)(one.at(claim), kernel.id)
    assert again.run("3 * x").text == "63"
    again.end()


@pytest.mark.parametrize("path", ["/user/zz-0123456789ab/lab", "/user/a-0123456789ab/lab", "/user/_status-1/lab"])
def test_requests_for_an_unknown_slot_get_404_at_once(fleet, path):
    began = time.monotonic()
    page = fleet.gateways[0].api.get(path, **HTML)
    problem = fleet.gateways[0].api.get(path.replace("/lab", "/api/kernels"))
    assert time.monotonic() - began < 2
    assert page.status == problem.status == 404
    assert b"<h1>" in page.body and problem.headers["content-type"] == "application/problem+json"


def test_banned_clients_and_clients_above_the_rate_are_refused(fleet, settings):
    settings(f'[landing]\nrate = 2\nbanned = ["{BANNED}/32"]\n')
    assert fleet.call(BANNED, "GET", "/", **HTML).status == 403
    spawned = [fleet.call(PERSON, "POST", "/api/spawn") for _ in range(3)]
    assert [answer.status for answer in spawned] == [200, 200, 429]
    assert int(spawned[2].headers["retry-after"]) > 0
    assert b"<h1>" in fleet.call(PERSON, "GET", "/spawn", **HTML).body
    forged = {"X-Forwarded-For": "192.0.2.9"}
    assert fleet.call(PERSON, "POST", "/api/spawn", **forged).status == 429
    taken = fleet.call(OTHER, "POST", "/api/spawn", **forged)
    assert taken.status == 200
    # The host gets the address of the client from the gateway.
    slot = claim_of(taken.json()["url"])["slot"]
    clients = [entry["NBAGENT_CLIENT"] for entry in fleet.hosts[slot[0]].journal(f"NBAGENT_SLOT={slot}")
               if "NBAGENT_CLIENT" in entry]
    assert clients == [OTHER]


def test_a_host_limits_the_rate_of_clients_that_are_not_gateways(fleet):
    router = Api(fleet.hosts["a"].host, product.ROUTER_PORT)
    forged = {"X-Nbagent-Gateway": "1", "X-Forwarded-For": PERSON}
    statuses = Counter(router.post("/api/spawn", **forged).status for _ in range(90))
    assert statuses[200] == CAPACITY and statuses[429] > 0


def test_hosts_are_drained_removed_and_added_without_interrupting_users(fleet):
    front = fleet.gateways[0]
    notebook = front.open()
    label = notebook.slot[0]
    address = host_address(LABELS.index(label))
    kernel = notebook.kernel()
    kernel.run("x = 1")
    worker = front.host.run(["systemctl", "show", "-P", "MainPID", "nbagent-gateway"]).stdout
    try:
        assert "gets no more claims" in front.run("drain-host", label)
        assert label not in {front.spawn()["slot"][0] for _ in range(6)}
        assert kernel.run("x + 1").text == "2"
        assert "remove it from the file" in front.refused("remove-host", label)
        assert "gets claims again" in front.run("drain-host", label, "--off")
        front.agent.wait(lambda: label in fleet.weights(front), "the host to get claims again")
    finally:
        front.host.run(["rm", "-f", f"/etc/nbagent/gateway.d/host-{label}.toml"])
    assert kernel.run("x + 2").text == "3"
    # Remove the host from the file of the fleet, and add it with add-host.
    listed = "/etc/nbagent/gateway.d/50-fleet.toml"
    before = front.host.run(["cat", listed]).stdout
    front.host.run(["tee", listed], input=re.sub(rf"\[hosts\.{label}\]\n.*\n", "", before))
    try:
        front.run("apply")
        front.wait_hosts(set(LABELS) - {label})
        assert front.run("add-host", label, address) == f"host {label} added"
        front.wait_hosts(LABELS)
        front.agent.wait(lambda: label in fleet.weights(front), "the host to get claims")
        assert front.at({"slot": notebook.slot, "token": notebook.token}).get("api/status")["kernels"] == 1
        front.agent.wait(lambda: front.spawn()["slot"][0] == label, "a slot on the host that was added")
        front.run("drain-host", label)
        assert "slots run on" in front.refused("remove-host", label)
        assert kernel.run("x + 3").text == "4"
        assert f"host {label} removed" in front.run("remove-host", label, "--force")
        kernel.close()
        front.wait_hosts(set(LABELS) - {label})
        assert front.api.get(f"/user/{notebook.slot}/lab", **HTML).status == 404
    finally:
        front.host.run(["rm", "-f", f"/etc/nbagent/gateway.d/host-{label}.toml"])
        front.host.run(["tee", listed], input=before)
        front.run("apply")
    assert worker == front.host.run(["systemctl", "show", "-P", "MainPID", "nbagent-gateway"]).stdout


def test_hosts_are_found_with_dns(fleet):
    front = fleet.gateways[1]
    listed = "/etc/nbagent/gateway.d/50-fleet.toml"
    before = front.host.run(["cat", listed]).stdout
    records = [f"--srv-host=_nbagent._tcp.hosts.test,{label}.hosts.test,8000" for label in LABELS]
    records += [f"--host-record={label}.hosts.test,{host_address(number)}" for number, label in enumerate(LABELS)]
    front.host.run(["systemd-run", "--unit=names", "dnsmasq", "--keep-in-foreground", "--port=5353", "--no-resolv",
                    "--no-hosts", "--local=/test/", "--user=root", "--conf-file=/dev/null", "--pid-file=", *records])
    front.host.run(["tee", listed], input=(
        '[fleet]\nsrv = "_nbagent._tcp.hosts.test"\nresolvers = ["127.0.0.1:5353"]\n[landing]\nrate = 1000\n'))
    try:
        front.run("apply")
        front.wait_hosts(LABELS)
        claims = [front.spawn() for _ in range(9)]
        assert {claim["slot"][0] for claim in claims} == set(LABELS)
        for claim in claims[:4]:
            assert front.at(claim).get("api/status")["kernels"] == 0
        with contextlib.closing(front.at(claims[0]).kernel()) as kernel:
            assert kernel.run("6 * 7").text == "42"
        assert front.api.get("/user/zz-0123456789ab/lab", **HTML).status == 404
        assert "add the host to the SRV records" in front.refused("add-host", "d", "10.77.0.99")
    finally:
        front.host.run(["tee", listed], input=before)
        front.run("apply")
        front.host.run(["systemctl", "stop", "names.service"])


def test_a_stopped_router_fails_no_claim_and_its_users_get_an_error(fleet):
    front = fleet.gateways[0]
    claim = next(made for made in iter(front.spawn, None) if made["slot"][0] == "c")
    dead = fleet.hosts["c"].host
    dead.run(["systemctl", "stop", "nbagent-router.socket", "nbagent-router.service"])
    try:
        began = time.monotonic()
        lost = front.api.get(f"/user/{claim['slot']}/lab", **HTML)
        assert lost.status == 503 and b"does not respond" in lost.body and time.monotonic() - began < 2
        assert {front.spawn()["slot"][0] for _ in range(4)} <= {"a", "b"}
        front.agent.wait(lambda: front.figures()["hosts"]["http://c"].get("down"), "the host to be known as down")
    finally:
        dead.run(["systemctl", "start", "nbagent-router.socket", "nbagent-router.service"])
    front.agent.wait(lambda: front.at(claim).get("api/status"), "its users to be served again")


def test_figures_and_metrics_of_the_fleet(fleet):
    front = fleet.gateways[0]
    front.spawn()
    front.agent.wait(lambda: front.figures()["in_use"] == 1, "the figures after the claim")
    figures = front.figures()
    assert figures["capacity"] == CAPACITY * 3
    assert set(figures["hosts"]) == {f"http://{label}" for label in LABELS}
    shown = front.run("hosts")
    assert [line.split()[:2] for line in shown.splitlines()[1:]] == [[label, "up"] for label in LABELS]
    metrics = front.host.run(["curl", "-s", "127.0.0.1:8405/metrics"]).stdout
    assert 'haproxy_server_status{proxy="claims",server="a"' in metrics


def test_with_a_certificate_http_is_redirected_to_https(fleet, settings):
    front = fleet.gateways[0]
    front.host.run(["sh", "-c", CERTIFICATE])
    settings('[tls]\ncertificates = ["/root/live"]\n')
    moved = front.api.get("/spawn?a=b", Host="nb.example.org")
    assert (moved.status, moved.headers["location"]) == (308, "https://nb.example.org/spawn?a=b")
    curl = ["curl", "-sk", "--resolve", "nb.example.org:443:127.0.0.1"]
    response = front.host.run([*curl, "-i", "-X", "POST", "https://nb.example.org/api/spawn"]).stdout
    assert response.startswith("HTTP/2 200") and "strict-transport-security: max-age=31536000" in response
    assert '"url":"https://nb.example.org/user/' in response
    kept = front.host.run(["sh", "-c", "stat -c '%a %U' /run/nbagent-gateway/certificates/*"]).stdout.split()
    assert kept == ["400", "nbagent-gateway"]


def test_one_click_opens_jupyterlab_over_https_and_a_cell_runs(fleet, settings, tmp_path):
    gateway = fleet.gateways[0].host
    gateway.run(["sh", "-c", CERTIFICATE])
    settings('[tls]\ncertificates = ["/root/live"]\n[log]\nrequests = "all"\n[landing]\nprerender = false\n')
    front = f"https://127.0.0.1:{gateway.forward(443, 0)}"
    with browser.chromium(tmp_path, "--ignore-certificate-errors") as page:
        page.open(f"{front}/lab/tree/Welcome.ipynb")
        page.see("button")[0].click()
        page.wait_for_kernel()
        where = urlsplit(page.driver.current_url)
        assert re.fullmatch(r"/user/[abc]-[a-z0-9]+/lab/tree/Welcome\.ipynb", where.path)
        assert where.path.split("/")[2] in fleet.in_use()
        page.select_first_cell()
        page.run_cell()
        page.read(".jp-CodeCell .jp-OutputArea-output", "Hello from Python")
        addresses = page.requests()
    # All requests and websockets went to this origin, over HTTP/2.
    assert {urlsplit(address).netloc for address in addresses if address.startswith(("http", "ws"))} == {where.netloc}
    assert any(address.startswith("wss:") for address in addresses)
    lines = [entry["MESSAGE"] for entry in fleet.gateways[0].agent.journal("-u", "nbagent-gateway.service")]
    protocols = {re.search(r"version=(\S+)", line)[1] for line in lines if where.path.split("/")[2] in line}
    assert protocols == {"HTTP/2.0"}
    assert any("/channels version=HTTP/2.0" in line for line in lines), "a websocket of a kernel"


def test_the_journal_has_every_claim_with_its_client_and_no_token(fleet):
    front = fleet.gateways[0]
    claim = front.spawn()
    front.api.get(f"/user/{claim['slot']}/lab?token={claim['token']}")
    front.api.get(f"/user/zz-0123456789ab/lab?token={claim['token']}")
    redirect = fleet.call(PERSON, "GET", f"/spawn/lab?token={claim['token']}")
    assert redirect.status == 302
    trace, span = "4b" * 16, "00f0" * 4
    traced = front.spawn(traceparent=f"00-{trace}-{span}-01")["slot"]

    def lines():
        journal = front.agent.journal("-u", "nbagent-gateway.service", "-u", "nbagent-gateway-status.service")
        return [str(entry["MESSAGE"]) for entry in journal]

    pattern = rf"claim client={PERSON} method=GET path=/spawn/lab .* status=302 .* host=[abc] "
    front.agent.wait(lambda: any(re.match(pattern, line) for line in lines()), "the line of the claim")
    assert not any("token" in line or claim["token"] in line for line in lines())
    # From the gateway to the slot by the trace of the caller.
    ended = f" trace={trace}-{span}"
    front.agent.wait(lambda: any(line.endswith(ended) for line in lines()), "the line of the trace")
    (event,) = fleet.hosts[traced.partition("-")[0]].journal(f"NBAGENT_TRACE_ID={trace}")
    assert (event["NBAGENT_SLOT"], event["NBAGENT_PARENT_SPAN_ID"]) == (traced, span)
    # The gateway and the host each send their spans, which have the same parent.
    sent = [*spans_of(front.agent.host), *spans_of(fleet.hosts[traced.partition("-")[0]].host)]
    found = {(one["name"], one["parentSpanId"]) for one in sent if one["traceId"] == trace}
    assert {("gateway", span), ("claim", span)} <= found and len(found) >= 5, sent


COLLECTOR = """
import http.server, threading
class Received(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        print(self.rfile.read(int(self.headers["Content-Length"])).decode(), flush=True)
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
server = http.server.HTTPServer(("127.0.0.1", 4318), Received)
threading.Thread(target=server.serve_forever).start()
import subprocess
command = ["nbagent", "traces", "--once", "--since", "1h", "--to", "http://127.0.0.1:4318/v1/traces"]
subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
server.shutdown()
"""


def spans_of(host):
    """The spans that `nbagent traces` on a machine sends to a collector there."""
    requests = map(json.loads, host.run(["python3", "-ISc", COLLECTOR]).stdout.splitlines())
    scopes = [scope for one in requests for resource in one["resourceSpans"] for scope in resource["scopeSpans"]]
    return [span for scope in scopes for span in scope["spans"]]


def test_systemd_accepts_the_units(fleet):
    units = ("nbagent-gateway.service", "nbagent-gateway-status.service", "nbagent-gateway-status.socket")
    host = fleet.gateways[0].host
    done = host.run(["systemd-analyze", "verify", *units], check=False)
    assert done.returncode == 0 and "nbagent" not in done.stderr, done.stderr
    assert host.run(["systemctl", "is-enabled", *units]).stdout.split() == ["enabled"] * 3
    assert host.run(["systemctl", "is-system-running"]).stdout.strip() == "running"


def test_a_gateway_works_without_the_package_of_the_agent(fleet):
    host = fleet.gateways[0].host
    assert host.run(["dpkg-query", "-W", "-f", "${db:Status-Status}", "nbagent"], check=False).stdout != "installed"
    assert json.loads(host.run(["nbagent", "gateway", "hosts", "--json"]).stdout)["capacity"] == CAPACITY * 3


def test_the_journals_have_no_unexpected_warning(fleet):
    for front in fleet.gateways:
        front.agent.check_journal()
    for host in fleet.hosts.values():
        host.check_journal()


# The attempts that succeed in a gateway that is taken over, because it has to be able to make them.
OF_GATEWAY = {
    "a network socket", "a copy of the private key", "the status service", "the router of a host",
}


def test_a_gateway_that_is_taken_over_reaches_no_other_service(fleet, settings):
    front, address = fleet.gateways[0], host_address(0)
    # Starts the status service.
    assert front.figures()["capacity"]
    front.host.run(["sh", "-c", CERTIFICATE])
    settings('[tls]\ncertificates = ["/root/live"]\n')
    # It belongs to root in an installation too (packaging/docs/dns.md).
    front.host.run(["sh", "-c", "umask 077; echo secret > /etc/nbagent/dns-key"])
    try:
        free, log = attempts_of(front.host, "nbagent-gateway.service", "gateway", address)
    finally:
        front.host.run(["rm", "/etc/nbagent/dns-key"])
    names = taken_over.OF_ANY_USER | taken_over.of_gateway(address)
    # A host's control API refuses root of another machine too.
    assert free == [*(f"succeeded: {name}" for name in names if name != "the control API of a host"), "complete"]
    assert set(log) == {*(f"succeeded: {name}" for name in OF_GATEWAY), "complete"}


def test_the_death_of_a_host_fails_no_claim(fleet):
    """Runs before the last test only, because the host is not started again."""
    front = fleet.gateways[0]
    notebook = next(made for made in iter(front.open, None) if made.slot[0] == "b")
    with ThreadPoolExecutor(1) as threads:
        dying = threads.submit(fleet.machines.hosts["b"].down, now=True)
        # Free the slots on the other hosts that were claimed before one on b.
        for label in ("a", "c"):
            for slot in fleet.hosts[label].slots("claimed"):
                fleet.hosts[label].api.delete(f"/slots/{slot['slot']}")
        claims = [front.spawn()["slot"][0] for _ in range(4)]
        dying.result()
    assert set(claims) <= {"a", "b", "c"}
    lost = front.api.get(f"/user/{notebook.slot}/lab", **HTML)
    assert lost.status == 503 and b"does not respond" in lost.body
    front.agent.wait(lambda: front.figures()["hosts"]["http://b"].get("down"), "the host to be known as down")
    assert front.figures()["capacity"] == CAPACITY * 2


def test_purge_leaves_nothing_of_a_gateway(whole):
    host = whole.gateways[1].host
    done = host.run(["apt-get", "-q", "purge", "-y", *product.GATEWAY], timeout=300)
    assert "warning" not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr
    left = [line for line in product.listing(host) if "nbagent" in line and " /root/" not in line]
    assert left == []
    assert host.run(["systemctl", "is-system-running"]).stdout.strip() == "running"
