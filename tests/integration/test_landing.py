# SPDX-License-Identifier: BSD-3-Clause
"""The landing page on port 8000: notebooks for people and tmpnb's clients, without access to the control API."""

import concurrent.futures
import contextlib
import html
import re
import time
from urllib.parse import urlencode, urlsplit

import pytest

import browser
import product

HTML = "text/html,application/xhtml+xml,*/*;q=0.8"
SLOT = re.compile(r"/user/([a-z0-9]+-[a-z0-9]{12})/")
# Init, fork server and notebook server; a kernel is one more.
SERVER_PROCESSES = 3
SERVICES = ("nbagent-api.service", "nbagent-router.service")


@pytest.fixture(scope="module")
def unlimited_rate(shared):
    """Raises the rate limit of an address above what the tests need."""
    path = "/etc/nbagent/conf.d/80-landing.toml"
    shared.host.run(["tee", path], input="[landing]\nrate = 1000\n")
    reload(shared)
    yield
    shared.run("rm", path)
    reload(shared)


@pytest.fixture
def landing(agent, unlimited_rate):
    """A client of the router."""
    return agent.router


@pytest.fixture
def configure(agent, unlimited_rate):
    """Applies settings to all three services until the test ends."""
    def use(settings):
        agent.configure(settings)
        reload(agent)

    yield use
    use("")


def reload(agent):
    """Reloads the API and the router, and waits until no worker has the former settings."""
    old = workers(agent)
    agent.run("systemctl", "reload", *SERVICES)
    agent.wait(lambda: (now := workers(agent)) and not now & old, "workers with the new settings")
    agent.wait(lambda: agent.router.get("/healthz").status in (200, 403), "a response of the router")


def workers(agent):
    """The workers of the API and the router that accept connections; nginx workers that shut down may run for hours."""
    script = """for unit in nbagent-api nbagent-router; do
        ps --no-headers -o pid,args --ppid $(systemctl show -P MainPID $unit)
    done | grep -v 'shutting down'; true"""
    return {line.split()[0] for line in agent.run("sh", "-c", script).splitlines()}


@pytest.fixture
def page(agent, landing, tmp_path):
    """A browser; its `origin` is that of the landing page on this machine."""
    with browser.chromium(tmp_path) as window:
        window.origin = f"http://127.0.0.1:{agent.host.forward(product.ROUTER_PORT, 0)}"
        yield window


def slot_of(response):
    found = SLOT.match(urlsplit(response.headers.get("location") or response.json()["url"]).path)
    assert found, response
    return found[1]


def claimed_by(agent, slot):
    """The address of the client that claimed a slot, from the journal."""
    (entry,) = agent.wait(
        lambda: [e for e in agent.journal(f"NBAGENT_SLOT={slot}") if "NBAGENT_CLIENT" in e], f"{slot} in the journal")
    return entry["NBAGENT_CLIENT"]


def test_a_link_starts_a_notebook_at_its_path(agent, landing):
    response = landing.get("/spawn/lab/tree/a%20b.ipynb?reset&x=1%262", Accept=HTML)
    assert response.status == 302 and response.headers["cache-control"] == "no-store"
    slot = slot_of(response)
    link = response.headers["location"]
    assert link.startswith(f"/user/{slot}/lab/tree/a%20b.ipynb?reset&x=1%262&token=")
    opened = landing.get(link, Accept=HTML)
    assert opened.status == 200 and b"jupyter-config-data" in opened.body


def test_repeated_presses_of_the_button_start_one_notebook(agent, landing):
    page = landing.get("/tree?x=1", Accept=HTML).body.decode()
    action, key = re.search(r'action="([^"]+)">\s*<input type="hidden" name="key" value="([^"]+)"', page).groups()
    def press():
        return landing.call("POST", html.unescape(action), f"key={key}".encode(),
                            {"Content-Type": "application/x-www-form-urlencoded", "Accept": HTML})

    with concurrent.futures.ThreadPoolExecutor() as pool:
        responses = [future.result() for future in [pool.submit(press) for _ in range(4)]]
    assert {response.status for response in responses} == {303}
    assert len({response.headers["location"] for response in responses}) == 1
    assert "/tree?x=1&token=" in responses[0].headers["location"]


def test_client_of_tmpnb_works_unchanged(agent, landing):
    before = landing.get("/api/stats").json()
    response = landing.post("/api/spawn/", b"ignored")
    url = response.json()["url"]
    assert response.status == 200 and re.fullmatch(r"/user/[a-z0-9-]+/\?token=[A-Za-z0-9_-]+", url)
    base, _, token = url.partition("?token=")
    assert landing.get(f"{base}api/contents", Authorization=f"token {token}").status == 200
    agent.wait(lambda: landing.get("/api/stats").json()["in_use"] == before["in_use"] + 1, "the slot to be counted")
    after = landing.get("/api/stats/").json()
    # The capacity follows the memory of the host.
    assert after["capacity"] > 0 and after["container_image"] == "minimal"
    assert landing.get("/stats").headers["location"] == "/api/stats"
    assert landing.call("OPTIONS", "/api/spawn", headers={"Origin": "https://x.example"}).status == 204


def test_delete_of_api_pool_replaces_the_warm_slots(agent):
    agent.wait_warm()
    old = {slot["slot"] for slot in agent.slots("warm")}
    response = agent.api.delete("/api/pool/")
    assert response.status == 200 and response.json()["drained"] >= 1
    agent.wait(lambda: agent.slots("warm") and not old & {slot["slot"] for slot in agent.slots()}, "new warm slots")


def raw(agent, request):
    """Sends a request unchanged, and returns the whole response."""
    with agent.host.connect(product.ROUTER_PORT) as connection:
        connection.settimeout(20)
        connection.sendall(request.encode())
        with contextlib.suppress(TimeoutError), connection.makefile("rb") as response:
            return response.read()


@pytest.mark.parametrize("target", [
    "/claim", "//claim", "/./claim", "/spawn/../claim", "/spawn/..%2fclaim", "/spawn/%2e%2e/claim", "/api/../claim",
    "/lab/..;/claim", "/user/../claim", "/user/x/../../claim", "http://127.0.0.1:9000/claim", "/%63laim", "/claim%00",
    "/slots", "/drain", "/metrics", "/images", "/openapi.json", "/readyz", "/api/pool", "/api/spawn/../pool",
])
def test_control_api_is_unreachable_by_the_landing_page(agent, landing, target):
    before = agent.api.get("/stats").json()
    for method in ("GET", "POST", "DELETE"):
        local = "X-Forwarded-For: 127.0.0.1\r\nX-Real-IP: 127.0.0.1\r\n"
        head = f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1:9000\r\n{local}"
        response = raw(agent, f"{head}Content-Length: 0\r\nConnection: close\r\n\r\n")
        # Every path below /lab/ is the front page.
        assert re.match(rb"HTTP/1\.1 40[0345]", response) or b"<h1>A notebook, at once</h1>" in response, response
        assert b'"slot"' not in response and b'"links"' not in response and b"drained" not in response
    after = agent.api.get("/stats").json()
    assert (after["claimed"], after["draining"]) == (before["claimed"], False)


def test_only_the_router_may_connect_to_the_landing_socket(agent, landing):
    script = "import socket; socket.socket(socket.AF_UNIX).connect('/run/nbagent/landing.sock')"
    def may(user):
        command = ["runuser", "-u", user, "--", "python3", "-c", script]
        return agent.host.run(command, check=False).returncode == 0

    assert may("nbagent-router")
    assert not may("nobody") and not may("nbagent")


def test_forwarded_address_is_accepted_from_trusted_proxies_only(agent, configure, landing):
    forged = {"X-Forwarded-For": "203.0.113.9", "X-Real-IP": "203.0.113.9"}
    assert claimed_by(agent, slot_of(landing.post("/api/spawn", **forged))) == "127.0.0.1"
    configure('[router]\ntrusted_proxies = ["127.0.0.1", "10.0.0.0/8"]\n')
    # The address before that of the last trusted proxy is the client's; those before it may be forged.
    forwarded = {"X-Forwarded-For": "192.0.2.66, 203.0.113.9, 10.1.2.3"}
    assert claimed_by(agent, slot_of(landing.post("/api/spawn", **forwarded))) == "203.0.113.9"


def test_a_header_of_the_gateway_is_accepted_from_trusted_proxies_only(agent, configure, landing):
    forged = {"X-Nbagent-Gateway": "1", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example",
              "Forwarded": "host=evil.example", "Host": "evil.example"}
    for response in (landing.post("/spawn", **forged), landing.get("/spawn", **forged)):
        assert response.headers["location"].startswith("/user/")
    assert landing.post("/api/spawn", **forged).json()["url"].startswith("/user/")
    configure('[router]\ntrusted_proxies = ["127.0.0.1"]\n')
    response = landing.get("/spawn", **forged | {"X-Forwarded-For": "203.0.113.9", "Host": "nb.example"})
    assert response.headers["location"].startswith("https://nb.example/user/")


def test_connections_of_an_address_are_limited(agent, configure, landing):
    person = {"X-Forwarded-For": "203.0.113.9"}

    def hold(stack, slot, **headers):
        """Sends one more incomplete request, and gives whether the next request is refused."""
        connection = stack.enter_context(agent.host.connect(product.ROUTER_PORT))
        lines = [f"POST /user/{slot}/api/contents HTTP/1.1", "Host: x", "Content-Length: 100",
                 *map(": ".join, headers.items()), "", ""]
        connection.sendall("\r\n".join(lines).encode())
        return landing.get("/api/stats", **headers).status == 429

    configure('[router]\nclient_connections = 10\n')
    slot = agent.claim()["slot"]
    with contextlib.ExitStack() as stack:
        # Some of the connections may be refused, because nginx still counts connections that this test has closed.
        agent.wait(lambda: hold(stack, slot), "the limit")
        problem = landing.get("/api/stats", Accept="application/json")
        assert (problem.status, problem.json()["type"]) == (429, "urn:nbagent:problem:too-many-connections")
        assert b"Too many connections from your address" in landing.get("/lab", Accept=HTML).body
    agent.wait(lambda: landing.get("/api/stats").status == 200, "a response after the end of the connections")
    configure('[router]\nclient_connections = 10\ntrusted_proxies = ["127.0.0.1"]\n')
    with contextlib.ExitStack() as stack:
        # The gateway's own connections are not counted; those of a client that it names are.
        assert not any(hold(stack, slot) for _ in range(20))
        agent.wait(lambda: hold(stack, slot, **person), "the limit of a client")
        assert landing.get("/api/stats").status == 200
        assert landing.get("/api/stats", **{"X-Forwarded-For": "203.0.113.10"}).status == 200


def test_the_router_closes_a_connection_whose_headers_do_not_arrive_in_time(agent):
    begun = time.monotonic()
    with agent.host.connect(product.ROUTER_PORT, timeout=1) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        while True:
            try:
                if not connection.recv(1):
                    break
            except ConnectionResetError:
                break
            except TimeoutError:
                pass
            assert time.monotonic() < begun + 60, "the connection is still open"
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"a")


def test_claims_are_limited_by_address(agent, configure, landing):
    configure('[router]\ntrusted_proxies = ["127.0.0.1"]\n[landing]\nrate = 2\n')
    def spawn(address, path="/api/spawn", **headers):
        return landing.call("POST", path, b"", {"X-Forwarded-For": address, **headers})

    # One request and a burst of two.
    assert [spawn("203.0.113.1").status for _ in range(4)] == [200, 200, 200, 429]
    busy = spawn("203.0.113.1", "/spawn/lab", Accept=HTML)
    assert busy.status == 429 and busy.headers["retry-after"] == "60"
    assert b"One moment, please" in busy.body
    assert spawn("203.0.113.1").json()["type"] == "urn:nbagent:problem:rate-limited"
    assert landing.get("/", Accept=HTML, **{"X-Forwarded-For": "203.0.113.1"}).status == 200
    assert spawn("203.0.113.2").status == 200
    # One subscriber of IPv6 has a whole /64.
    own = ["2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "2001:db8:0:1::3", "2001:db8:0:1:8000::4"]
    assert [spawn(address).status for address in own] == [200, 200, 200, 429]
    assert spawn("2001:db8:0:2::1").status == 200


def test_banned_address_gets_403_with_the_reason(agent, configure, landing):
    notebook = agent.claim()
    configure('[router]\ntrusted_proxies = ["127.0.0.1"]\n[landing]\nbanned = ["203.0.113.0/24", "2001:db8::/32"]\n')
    banned, other = {"X-Forwarded-For": "203.0.113.77"}, {"X-Forwarded-For": "198.51.100.1"}
    for path in ("/", "/spawn", "/api/stats", f"/user/{notebook['slot']}/lab", "/healthz", "/nothing"):
        response = landing.get(path, Accept=HTML, **banned)
        assert response.status == 403 and b"Nothing is served to your address" in response.body, path
    problem = landing.post("/api/spawn", **banned, Accept="application/json")
    assert (problem.status, problem.json()["type"]) == (403, "urn:nbagent:problem:banned")
    assert landing.get("/", **{"X-Forwarded-For": "2001:db8:5::1"}).status == 403
    assert landing.get("/", **other).status == 200


def test_full_host_sends_retry_after(agent, configure, landing):
    claim = agent.claim(ttl="10min")
    agent.expect("full")
    configure("[slots]\ncapacity = 1\n[pool]\nwarm = 0\n[landing]\nrate = 1000\n")
    agent.wait(lambda: not agent.slots("warm"), "the end of the warm slots")
    for path in ("/spawn", "/spawn/lab/tree/x.ipynb"):
        response = landing.get(path, Accept=HTML)
        assert response.status == 503 and 1 <= int(response.headers["retry-after"]) <= 60
        assert b"1 of 1 are in use" in response.body and b"10 minutes" in response.body
        assert f"url={path}".encode() in response.body
    response = landing.post("/api/spawn")
    assert (response.status, response.json()) == (429, {"status": "full"})
    agent.release(claim["slot"])
    assert slot_of(landing.get("/spawn"))


def claimed_slots(agent):
    return {slot["slot"] for slot in agent.slots("claimed")}


def wait_gone(agent, slot):
    agent.wait(lambda: slot not in {one["slot"] for one in agent.slots()}, f"the end of {slot}")


def lend(landing, path="", **headers):
    body = urlencode({"path": path} if path else {}).encode()
    return landing.call("POST", "/api/lend", body, {"Content-Type": "application/x-www-form-urlencoded", **headers})


def settle(landing, lent, act):
    """Keeps or returns a lent slot, as the landing page's script does."""
    body = urlencode({"token": lent["token"]}).encode()
    return landing.call("POST", f"/user/{lent['slot']}/nbagent/{act}", body,
                        {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}).status


def test_a_lent_slot_is_kept_or_given_back(agent, configure, landing):
    configure("[pool]\nwarm = 4\n")
    agent.wait(lambda: len(agent.slots("warm")) == 4, "four warm slots")
    kept = lend(landing, "lab/tree/a%20b.ipynb").json()
    assert kept["url"] == f"/user/{kept['slot']}/lab/tree/a%20b.ipynb?token={kept['token']}"
    assert landing.get(kept["url"], Accept=HTML).status == 200
    assert settle(landing, {**kept, "token": "x"}, "keep") == 404
    assert settle(landing, kept, "keep") == settle(landing, kept, "keep") == 204
    # From now on it is a claimed slot with the life of one, which is not given back.
    assert settle(landing, kept, "return") == 204
    assert kept["slot"] in claimed_slots(agent)
    returned = lend(landing).json()
    assert settle(landing, returned, "return") == 204
    wait_gone(agent, returned["slot"])
    ends = [entry["MESSAGE"] for entry in agent.journal(f"NBAGENT_SLOT={returned['slot']}")]
    assert any("given back by" in end for end in ends)
    agent.release(kept["slot"])


def test_a_client_that_asks_often_is_lent_little(agent, configure, landing):
    configure("[pool]\nwarm = 4\n[slots]\ncapacity = 100\n[landing]\nrate = 30\n")
    agent.wait(lambda: len(agent.slots("warm")) == 4, "four warm slots")
    statuses = [lend(landing).status for _ in range(100)]
    assert {200, 204, 429} >= set(statuses) and statuses.count(429) > 30
    assert 1 <= statuses.count(200) <= 4 and len(agent.slots("claimed")) <= 4
    for slot in agent.slots("claimed"):
        agent.release(slot["slot"])


def test_a_host_that_is_half_full_lends_nothing(agent, configure, landing):
    claims = [agent.claim() for _ in range(2)]
    configure("[pool]\nwarm = 2\n[slots]\ncapacity = 8\n[landing]\nrate = 1000\n")
    agent.wait(lambda: len(agent.slots("warm")) == 2, "two warm slots")
    assert lend(landing).status == 204
    configure("[pool]\nwarm = 2\n[slots]\ncapacity = 50\n[landing]\nrate = 1000\nprerender = false\n")
    assert lend(landing).status == 204
    configure("[pool]\nwarm = 2\n[slots]\ncapacity = 50\n[landing]\nrate = 1000\n")
    assert lend(landing, Origin="https://other.example").status == 403
    lent = lend(landing)
    assert lent.status == 200
    for slot in (*(claim["slot"] for claim in claims), lent.json()["slot"]):
        agent.release(slot)


def test_the_click_shows_a_notebook_that_has_booted(agent, configure, page):
    configure("[pool]\nwarm = 4\n")
    agent.wait(lambda: len(agent.slots("warm")) == 4, "four warm slots")
    page.open(f"{page.origin}/lab/tree/Welcome.ipynb")
    page.see("button")
    slot, = agent.wait(lambda: claimed_slots(agent), "a lent slot")
    agent.wait(lambda: len(agent.processes(slot)) > SERVER_PROCESSES, "the kernel of the prerendered page")
    page.see("button")[0].click()
    page.wait_for_kernel()
    began_ms = page.driver.execute_script("return performance.getEntriesByType('navigation')[0].activationStart")
    assert began_ms > 0, "the page was not prerendered"
    assert slot in page.driver.current_url
    assert any("claimed by" in entry["MESSAGE"] for entry in agent.journal(f"NBAGENT_SLOT={slot}"))
    page.select_first_cell()
    page.run_cell()
    page.read(".jp-CodeCell .jp-OutputArea-output", "Hello from Python 3.13")
    page.shoot("prerendered")
    assert page.complaints() == []
    # A visitor who leaves the page returns the slot.
    page.open(f"{page.origin}/lab/tree/Welcome.ipynb")
    page.see("button")
    other, = agent.wait(lambda: claimed_slots(agent) - {slot}, "a lent slot")
    page.open("about:blank")
    wait_gone(agent, other)
    agent.release(slot)


def test_the_click_shows_a_notebook_that_has_booted_at_an_origin_of_its_own(agent, configure, page):
    port = page.origin.rpartition(":")[2]
    settings = f'url_mode = "subdomain"\ndomain = "nb.localhost"\npublic_url = "http://nb.localhost:{port}"\n'
    configure(f"[pool]\nwarm = 4\n[router]\n{settings}")
    agent.wait(lambda: len(agent.slots("warm")) == 4, "four warm slots")
    # A browser prerenders no page of another site, which another scheme is too.
    for headers in ({"Host": "127.0.0.1"}, {"Host": "nb.localhost", "X-Forwarded-Proto": "https"}):
        assert agent.router.post("/api/lend", b"", **headers).status == 204
    page.open(f"http://nb.localhost:{port}/lab/tree/Welcome.ipynb")
    page.see("button")
    slot, = agent.wait(lambda: claimed_slots(agent), "a lent slot")
    agent.wait(lambda: len(agent.processes(slot)) > SERVER_PROCESSES, "the kernel of the prerendered page")
    page.see("button")[0].click()
    page.see(".jp-Notebook .jp-CodeCell .cm-content")
    began_ms = page.driver.execute_script("return performance.getEntriesByType('navigation')[0].activationStart")
    assert began_ms > 0, "the page was not prerendered"
    assert page.driver.current_url.startswith(f"http://{slot}.nb.localhost:{port}/")
    assert any("claimed by" in entry["MESSAGE"] for entry in agent.journal(f"NBAGENT_SLOT={slot}"))
    agent.release(slot)


def test_button_of_an_ended_notebook_starts_a_new_one_at_the_same_path(agent, landing):
    claim = agent.claim()
    path = f"/user/{claim['slot']}/lab/tree/a%20b.ipynb"
    agent.release(claim["slot"])
    page = landing.get(f"{path}?token={claim['token']}&x=1", Accept=HTML)
    assert page.status == 404 and b"no longer running" in page.body and claim["token"].encode() not in page.body
    action = re.search(r'action="([^"]+)"', page.body.decode())[1]
    assert action == "/spawn/lab/tree/a%20b.ipynb?x=1"
    response = landing.call("POST", action, b"", {"Content-Type": "application/x-www-form-urlencoded"})
    assert response.status == 303 and slot_of(response) != claim["slot"]


def test_router_without_a_landing_page(agent, configure):
    configure('[landing]\naccess = "off"\n')
    assert agent.router.get("/api/stats").status == 404
    assert b"Live notebooks run here" in agent.router.get("/", Accept=HTML).body
    for path in ("/spawn", "/info", "/lab", "/api/spawn"):
        assert agent.router.get(path, Accept=HTML).status == 404
    claim = agent.claim()
    agent.release(claim["slot"])
    ended = agent.router.get(f"/user/{claim['slot']}/lab", Accept=HTML)
    assert ended.status == 404 and b"no longer running" in ended.body and b"<button" not in ended.body


def test_host_name_of_a_slot_has_no_landing_page(agent, configure):
    configure('[router]\nurl_mode = "subdomain"\ndomain = "nb.test"\n')
    response = agent.router.get("/spawn/lab", Host="nb.test:8000")
    link = urlsplit(response.headers["location"])
    slot = SLOT.match(link.path)[1]
    assert link.netloc == f"{slot}.nb.test:8000"
    for path in ("/spawn", "/api/spawn", "/info"):
        assert agent.router.get(path, Host=f"{slot}.nb.test:8000", Accept=HTML).status == 404
    assert agent.router.get(f"{link.path}?{link.query}", Host=link.netloc).status == 200


def test_claims_wait_while_the_api_restarts(agent, landing):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        restart = pool.submit(agent.run, "systemctl", "restart", "nbagent-api.service")
        futures = [pool.submit(landing.get, "/spawn") for _ in range(3)]
        restart.result()
        assert [future.result().status for future in futures] == [302] * 3


def test_notebooks_run_and_claims_get_a_page_while_the_api_is_stopped(agent, landing):
    claim = agent.claim()
    agent.run("systemctl", "stop", "nbagent-landing.socket", "nbagent-api.service")
    try:
        response = landing.get("/spawn", Accept=HTML)
        assert (response.status, response.headers["retry-after"]) == (503, "5")
        assert b"cannot be started right now" in response.body
        assert landing.get(f"{claim['path']}?token={claim['token']}").status == 200
        ended = landing.get(f"/user/{claim['slot'][:-4]}0000/lab", Accept=HTML)
        assert ended.status == 404 and b"no longer running" in ended.body
    finally:
        agent.run("systemctl", "start", "nbagent-landing.socket", "nbagent-api.socket", "nbagent-api.service")


def test_incomplete_requests_do_not_block_the_landing_page(agent, landing):
    silent = [agent.host.connect(product.ROUTER_PORT) for _ in range(150)]
    try:
        for connection in silent:
            connection.sendall(b"POST /api/spawn HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        assert landing.get("/spawn").status == 302
        assert agent.api.get("/healthz").status == 200
    finally:
        for connection in silent:
            connection.close()


def test_one_click_opens_jupyterlab(page):
    page.open(page.origin)
    page.read("h1", "A notebook, at once")
    page.shoot("landing")
    page.see("button")[0].click()
    page.see('.jp-LauncherCard[data-category="Notebook"]')
    assert SLOT.search(page.driver.current_url)
    assert {urlsplit(address).netloc for address in page.requests() if address.startswith(("http", "ws"))} == {
        urlsplit(page.origin).netloc}
    assert page.complaints() == []


def test_deep_link_with_start_at_once_opens_the_notebook(agent, configure, page):
    configure('[landing]\nstart = "at once"\n')
    page.open(f"{page.origin}/lab/tree/")
    page.see(".jp-Launcher, .jp-DirListing")
    assert SLOT.search(page.driver.current_url)


@pytest.mark.parametrize(("width", "height"), [(360, 740), (1920, 1080)])
def test_the_pages_fit_a_phone_and_a_projector(agent, page, width, height):
    mobile = width < 500
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile})
    label = agent.api.get("/stats").json()["label"]
    for name, path in (("front", "/lab/tree/a-name-that-is-rather-long-and-does-not-break-anywhere.ipynb"),
                       ("ended", f"/user/{label}-0123456789ab/lab"), ("info", "/info")):
        page.open(page.origin + path)
        page.see("h1")
        if name == "info":
            page.wait(lambda driver: page.see("[data-figure=free]")[0].text not in ("", "–"), "figures")
        page.shoot(f"{name}-{width}")
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width, name
    # The figures of a projector are large enough to be read from the back of a room.
    size = page.driver.execute_script(
        "return parseFloat(getComputedStyle(document.querySelector('[data-figure=in_use]')).fontSize)")
    assert size >= (40 if mobile else 120)


def test_status_page_refreshes_its_figures(agent, page):
    page.open(f"{page.origin}/info")
    page.read("#state", "open")
    used = int(page.see("[data-figure=in_use]")[0].text)
    agent.claim()
    page.read("[data-figure=in_use]", str(used + 1))
    assert page.complaints() == []


def test_page_of_a_full_host_opens_a_notebook_when_one_is_free(agent, configure, page):
    claim = agent.claim()
    agent.expect("full")
    configure("[slots]\ncapacity = 1\n[pool]\nwarm = 0\n")
    agent.wait(lambda: not agent.slots("warm"), "the end of the warm slots")
    agent.run("curl", "-sX", "PATCH", f"127.0.0.1:9000/slots/{claim['slot']}", "-H", "Content-Type: application/json",
              "-d", '{"ttl": "4s"}')
    page.open(f"{page.origin}/spawn/lab")
    page.read("h1", "Every notebook is in use")
    page.shoot("full")
    page.see(".jp-Launcher")
    assert SLOT.search(page.driver.current_url)
