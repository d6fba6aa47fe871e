# SPDX-License-Identifier: BSD-3-Clause
"""The interfaces for operators: the journal, the command line, the metrics, and access control."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbagent.core.events import Event

CATALOG = Path(__file__).parents[2] / "packaging/nbagent.catalog"
OUTSIDE = "198.51.100.7"
# The status of a call every 50 ms, for several seconds.
LOAD = "for n in $(seq 100); do curl -sS -o /dev/null -m 30 -w '%{http_code}\\n' localhost:9000/stats; sleep 0.05; done"
MANUAL_PAGES = ("nbagent(1)", "nbagent.toml(5)", "nbagent.service(8)", "nbagent-api.service(8)",
                "nbagent-router.service(8)")
COMMANDS = {
    "claim": {"slot", "url", "path", "token", "image", "claimed_at", "expires_at", "limits"},
    "slots": None,
    "stats": {"available", "capacity", "version", "container_image", "pools", "counters"},
    "images": None,
    "doctor": None,
}


def cli(agent, *words):
    """`nbagent` on the host: exit status, standard output, standard error."""
    done = agent.host.run(["nbagent", *words], check=False)
    return done.returncode, done.stdout, done.stderr


def events_of(agent, slot):
    """The events of a slot in the journal, in order. Raises KeyError for an entry without a known MESSAGE_ID."""
    by_id = {event.value.message_id: event for event in Event}
    events = [by_id[entry["MESSAGE_ID"]] for entry in agent.journal(f"NBAGENT_SLOT={slot}")]
    # Another test may have restarted the agent while the slot was warm.
    return [event for event in events if event is not Event.SLOT_ADOPTED]


# -- the journal


def test_every_change_of_a_slot_is_an_event_in_the_journal(agent):
    slot = agent.claim()["slot"]
    agent.api.patch(f"/slots/{slot}", {"ttl": 600})
    agent.release(slot)
    agent.wait(lambda: Event.SLOT_GONE in events_of(agent, slot), "the end of the slot in the journal")
    assert events_of(agent, slot) == [
        Event.SLOT_STARTING, Event.SLOT_WARM, Event.SLOT_CLAIMED, Event.SLOT_UPDATED, Event.SLOT_RELEASED,
        Event.SLOT_GONE,
    ]
    history = json.loads(cli(agent, "history", slot, "--json")[1])
    assert history["client"] == "127.0.0.1" and history["limits"]["memory_bytes"] == 512 << 20
    assert history["end"] == "released by 127.0.0.1" and history["peak_bytes"] > 1 << 20
    assert [change["text"] for change in history["changes"]] == ["ttl=600"]
    table = cli(agent, "history", "--since", "1h")[1].splitlines()
    assert [line for line in table if line.startswith(slot) and line.endswith("released by 127.0.0.1")]
    assert cli(agent, "history", f"{slot[:-1]}{'0' if slot[-1] != '0' else '1'}")[0] == 3
    claimed = agent.journal(f"NBAGENT_SLOT={slot}", f"MESSAGE_ID={Event.SLOT_CLAIMED.value.message_id}")[0]
    assert claimed["NBAGENT_CLIENT"] == "127.0.0.1" and claimed["SYSLOG_IDENTIFIER"] == "nbagent"


def test_catalog_explains_every_event(agent):
    slot = agent.claim()["slot"]
    agent.release(slot)
    agent.wait(lambda: Event.SLOT_GONE in events_of(agent, slot), "the end of the slot in the journal")
    text = agent.run("journalctl", "-x", "--no-pager", f"NBAGENT_SLOT={slot}")
    subjects = dict(re.findall(r"^-- ([0-9a-f]{32})\nSubject: (.+)$", CATALOG.read_text(), re.M))
    for event in events_of(agent, slot):
        assert f"Subject: {subjects[event.value.message_id].replace('@NBAGENT_SLOT@', slot)}" in text
    assert f"journalctl -u nbagent-{slot}.scope" in text
    assert "@NBAGENT_" not in text


def test_journal_of_the_scope_is_the_output_of_the_notebook_server(agent):
    notebook = agent.open()
    kernel = notebook.kernel()
    kernel.end()
    output = agent.run("journalctl", "--no-pager", "-o", "cat", "-u", f"nbagent-{notebook.slot}.scope")
    assert f"Kernel started: {kernel.id}" in output
    assert notebook.token not in output


def test_a_slot_and_the_agent_write_to_the_journal_after_journald_was_stopped(agent):
    """A restart of journald keeps the connections of its senders; a stop ends them."""
    # dnsmasq logs this once, and then connects again.
    agent.expect(r"^log failed: Broken pipe$")
    notebook = agent.open()
    scope = f"nbagent-{notebook.slot}.scope"
    for command in ("systemctl restart systemd-journald", "systemctl stop systemd-journald"):
        agent.run("sh", "-c", f"{command}; systemctl start systemd-journald")
        kernel = notebook.kernel()
        kernel.end()
        line = f"Kernel started: {kernel.id}"
        agent.wait(lambda line=line: any(line in str(e["MESSAGE"]) for e in agent.journal("-u", scope)), command)
        assert any(line in str(entry["MESSAGE"]) for entry in agent.journal("-t", notebook.slot))
    agent.release(notebook.slot)
    def texts():
        return [str(entry["MESSAGE"]) for entry in agent.journal(f"NBAGENT_SLOT={notebook.slot}")]

    agent.wait(lambda: any("removed after" in text for text in texts()), "the agent's entry")
    agent.wait_warm()
    assert agent.api.get("/healthz").status == 200


def test_invalid_settings_are_logged_and_the_former_ones_stay(agent):
    agent.expect("configuration not reloaded: .*wram")
    agent.configure("[pool]\nwram = 3\n")

    def refusals():
        return agent.journal(f"MESSAGE_ID={Event.CONFIG_REFUSED.value.message_id}")

    entries = agent.wait(refusals, "the error in the journal")
    assert 'did you mean "warm"?' in entries[-1]["MESSAGE"]
    assert agent.api.get("/stats").json()["pools"]["minimal"]["wanted"] == 1


def test_slots_keep_their_ids_when_the_label_changes(agent):
    notebook = agent.open()
    path = f"/slots/{notebook.slot}"
    agent.configure('[host]\nlabel = "renamed"\n')
    try:
        agent.run("systemctl", "reload", "nbagent-api.service", "nbagent-router.service")
        agent.wait(lambda: agent.router.get("/healthz").status == 200, "a response of the router")
        # Several requests, because workers with the former settings serve some of them for a moment.
        assert {agent.api.get(path).status for _ in range(20)} == {200}
        assert agent.router.get(f"/user/{notebook.slot}/api").status == 200
        assert notebook.run("6 * 7").text == "42"
        assert agent.api.patch(path, {"ttl": 600}).status == 200
        assert agent.api.delete(path).json()["state"] == "stopping"
        agent.wait(lambda: agent.api.get(path).status == 404, "the end of the slot")
    finally:
        agent.configure("")
        agent.run("systemctl", "reload", "nbagent-api.service", "nbagent-router.service")


# -- the command line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_json_or_text(agent, command):
    status, text, errors = cli(agent, command, "--json")
    assert (status, errors) == (0, "")
    document = json.loads(text)
    if COMMANDS[command]:
        assert COMMANDS[command] <= set(document)
    else:
        assert document and all(isinstance(item, dict) for item in document)
    status, text, errors = cli(agent, command)
    assert (status, errors) == (0, "") and text
    with pytest.raises(ValueError):
        json.loads(text)


def test_claim_slots_and_release(agent):
    status, url, _ = cli(agent, "claim", "--memory", "300M", "--ttl", "1h", "--path", "lab/tree/Welcome.ipynb")
    assert status == 0
    slot = re.match(r"http://127\.0\.0\.1:8000/user/([^/]+)/lab/tree/Welcome\.ipynb\?token=\S+\n$", url)[1]
    assert slot in cli(agent, "slots")[1]
    status, facts, _ = cli(agent, "slots", slot)
    assert status == 0 and re.search(r"^state +claimed$", facts, re.M)
    assert re.search(rf"memory_bytes +{300 << 20}$", facts, re.M)
    assert json.loads(cli(agent, "slots", slot, "--json")[1])["slot"] == slot
    assert cli(agent, "release", slot) == (0, f"{slot} stopping\n", "")
    agent.wait(lambda: cli(agent, "slots", slot)[0] == 3, "the end of the slot")
    status, _, errors = cli(agent, "release", slot)
    assert status == 3 and errors.startswith("nbagent: ") and errors.count("\n") == 1


def test_drain_refuses_claims_until_it_ends(agent):
    status, text, _ = cli(agent, "drain", "--json")
    try:
        assert status == 0 and json.loads(text)["draining"] is True
        status, out, errors = cli(agent, "claim")
        assert (status, out) == (75, "") and "draining" in errors
    finally:
        status, text, _ = cli(agent, "drain", "--off", "--json")
    assert status == 0 and json.loads(text)["draining"] is False
    agent.wait_warm()


def test_drain_waits_for_the_last_user(agent):
    slot = agent.claim()["slot"]
    waiting = agent.host.popen(["nbagent", "drain", "--wait"])
    try:
        agent.wait(lambda: agent.api.get("/stats").json()["draining"], "the drain")
        assert waiting.poll() is None
        agent.release(slot)
        assert waiting.wait(30) == 0
    finally:
        waiting.kill()
        waiting.wait()
        cli(agent, "drain", "--off")
    agent.wait_warm()


@pytest.mark.parametrize(("words", "status"), [
    (("claim", "--memory", "lots"), 2), (("claim", "--no-such"), 2), (("no-such",), 2),
    (("drain", "--off", "--wait"), 2),
    (("slots", "elsewhere-0123456789ab"), 3), (("slots", "--url", "http://127.0.0.1:1"), 69),
    (("stats", "--token-file", "/etc/machine-id"), 4), (("config", "check", "/no/such.toml"), 78),
    (("image", "remove", "no-such"), 3), (("image", "add", "--name", "bad", "/etc/hostname"), 65),
    (("--version",), 0), (("--help",), 0),
])
def test_exit_status_depends_on_the_error(agent, words, status):
    found, out, errors = cli(agent, *words)
    assert found == status, errors
    assert "Traceback" not in errors
    if status:
        assert out == "" and errors


def test_config_check_accepts_valid_and_refuses_invalid_settings(agent):
    status, text, _ = cli(agent, "config", "check", "--json")
    assert status == 0 and json.loads(text)["config"]["slots"]["memory"] == 512 << 20
    assert json.loads(text)["files"] == ["/etc/nbagent/nbagent.toml", "/etc/nbagent/conf.d/50-test.toml"]
    agent.host.run(["tee", "/tmp/bad.toml"], input='[slots]\nmemory = "lots"\n')
    status, out, errors = cli(agent, "config", "check", "/tmp/bad.toml")
    assert (status, out) == (78, "")
    assert "slots.memory" in errors and '"512M"' in errors
    agent.run("rm", "/tmp/bad.toml")


def test_doctor_lists_weaknesses_and_remedies(agent):
    status, text, _ = cli(agent, "doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(text)}
    assert status == 0, text
    assert not [finding for finding in findings.values() if finding["status"] == "fail"]
    if agent.host.run(["test", "-e", "/sys/fs/cgroup/cgroup.controllers"], check=False).returncode:
        assert findings["cgroups"]["status"] == "warn"
        assert "systemd.unified_cgroup_hierarchy=1" in findings["cgroups"]["mend"]
    assert findings["token"]["found"] == "mode 0600"


def test_doctor_finds_a_stopped_service(agent):
    agent.run("systemctl", "stop", "nbagent-router.socket", "nbagent-router.service")
    try:
        status, text, _ = cli(agent, "doctor")
        assert status == 1
        assert re.search(r"^fail +nbagent-router\.service: inactive\n +systemctl start nbagent-router", text, re.M)
        assert re.search(r"^fail +start of a slot: the slot serves, but not through the router", text, re.M)
        # The supervisor's own requests do not start it again.
        assert agent.host.run(["systemctl", "is-active", "nbagent-router.service"], check=False).stdout == "inactive\n"
    finally:
        agent.run("systemctl", "start", "nbagent-router.socket", "nbagent-router.service")
    assert cli(agent, "doctor")[0] == 0


def test_doctor_finds_faults_that_a_warm_slot_does_not_meet(agent):
    """The launch service does not respond, which only a claim with content needs, and a service has lost its user,
    which it needs at its next start. `make test-doctor` has all other faults."""
    agent.run("systemctl", "start", "nbagent-launch")
    agent.run("systemctl", "kill", "-s", "STOP", "nbagent-launch")
    agent.run("sed", "-i.former", "/^nbagent-router:/d", "/etc/passwd")
    try:
        status, text, _ = cli(agent, "doctor", "--json")
    finally:
        agent.run("mv", "/etc/passwd.former", "/etc/passwd")
        agent.run("systemctl", "kill", "-s", "CONT", "nbagent-launch")
    findings = {finding["name"]: finding for finding in json.loads(text)}
    start, users = findings["start of a slot"], findings["users"]
    assert (status, start["status"], users["status"]) == (1, "fail", "fail")
    assert "gets no content of a claim" in start["found"]
    assert start["mend"].startswith("systemctl restart nbagent-launch")
    assert users["found"].startswith("missing: nbagent-router; ") and "systemd-sysusers" in users["mend"]
    assert cli(agent, "doctor")[0] == 0


FAULTS = {
    "router": tuple(["systemctl", "kill", "-s", signal, "nbagent-router"] for signal in ("STOP", "CONT")),
    "systemd": tuple(["systemctl", "kill", "-s", signal, "nbagent-units"] for signal in ("STOP", "CONT")),
    "image": (["mv", "/var/lib/nbagent/images/names/minimal", "/var/lib/nbagent/images/names/.gone"],
              ["mv", "/var/lib/nbagent/images/names/.gone", "/var/lib/nbagent/images/names/minimal"]),
}


@pytest.mark.parametrize("part", FAULTS)
def test_a_host_with_a_fault_says_so_within_seconds_and_recovers(agent, part):
    agent.expect(rf"{part} fails, so this host offers fewer slots")
    agent.wait_warm()
    agent.wait(lambda: agent.api.get("/readyz").status == 200, "a host without fault")
    broken, mended = FAULTS[part]
    agent.run(*broken)
    try:
        agent.wait(lambda: part in agent.api.get("/stats").json()["faults"], f"the fault {part}", timeout=15)
        ready = agent.api.get("/readyz")
        assert ready.status == 503 and part in ready.json()["detail"]
        assert int(re.fullmatch(r"ready (\d+)%\n", agent.agent_check())[1]) <= (0 if part == "router" else 10)
        assert sample(agent, "nbagent_part_works", part=part) == 0
        status, text, _ = cli(agent, "doctor", "--json")
        finding, = (finding for finding in json.loads(text) if finding["name"] == "supervisor")
        assert status == 1 and finding["status"] == "fail" and part in finding["found"] and finding["mend"]
    finally:
        agent.run(*mended)
    agent.wait(lambda: agent.api.get("/readyz").status == 200, "the end of the fault")
    assert cli(agent, "doctor")[0] == 0


@pytest.mark.parametrize("page", MANUAL_PAGES)
def test_manual_pages_render_without_warnings(agent, page):
    name, section = page.rstrip(")").split("(")
    assert agent.run("man", "-w", section, name).startswith(f"/usr/share/man/man{section}/")
    done = agent.host.run(["env", "MANWIDTH=80", "man", "--warnings=w", section, name])
    assert done.stdout.startswith(("nbagent", "NBAGENT")) and "SEE ALSO" in done.stdout
    assert done.stderr == ""


# -- figures and descriptions


def sample(agent, name, **labels):
    """One value of /metrics."""
    response = agent.api.get("/metrics")
    assert response.status == 200 and response.headers["content-type"].startswith("text/plain")
    for family in text_string_to_metric_families(response.body.decode()):
        for found in family.samples:
            if found.name == name and labels.items() <= found.labels.items():
                return found.value
    raise AssertionError(f"no {name} {labels}")


def test_metrics_parse_and_move(agent):
    names = ("nbagent_claims_total", "nbagent_starts_total", "nbagent_released_total", "nbagent_claims_refused_total")
    before = {name: sample(agent, name) for name in names}
    claimed = sample(agent, "nbagent_slots", state="claimed")
    slot = agent.claim()["slot"]
    assert sample(agent, "nbagent_slots", state="claimed") == claimed + 1
    assert agent.api.post("/claim", {"image": "none"}).status == 400
    agent.release(slot)
    agent.wait_warm()
    moved = {name: sample(agent, name) - before[name] for name in names}
    assert moved["nbagent_claims_total"] == moved["nbagent_released_total"] == 1
    assert moved["nbagent_starts_total"] >= 1 and moved["nbagent_claims_refused_total"] == 1
    assert sample(agent, "nbagent_claim_seconds_count") >= 1
    assert sample(agent, "nbagent_pool_warm", image="minimal") == 1


def test_openapi_lists_the_routes_that_are_served(agent):
    described = {
        path: {method.upper() for method in item if method != "parameters"}
        for path, item in agent.api.get("/openapi.json").json()["paths"].items()
    }
    assert {"/claim", "/slots", "/slots/{slot}", "/drain", "/stats", "/images", "/metrics"} <= set(described)
    for path, methods in described.items():
        allowed = agent.api.call("OPTIONS", path.replace("{slot}", "x-0123456789ab")).headers["allow"]
        assert set(allowed.split(", ")) - {"OPTIONS", "HEAD"} == methods
        refused = agent.api.call("PUT", path.replace("{slot}", "x-0123456789ab"), b"{}")
        assert refused.status == 405 and refused.headers["content-type"] == "application/problem+json"
    assert set(agent.api.get("/").json()["links"].values()) <= set(described)
    assert agent.api.get("/nothing").status == 404


# -- access control


@pytest.fixture
def outside(agent):
    """Sends requests from an address that is on no trusted network, and returns their status."""
    agent.run("ip", "address", "add", f"{OUTSIDE}/32", "dev", "lo")

    def call(*words, path="/stats"):
        return int(agent.run("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--interface", OUTSIDE, *words,
                             f"http://{OUTSIDE}:9000{path}"))

    yield call
    agent.run("ip", "address", "del", f"{OUTSIDE}/32", "dev", "lo")


def test_caller_outside_of_the_trusted_networks_needs_the_token(agent, outside):
    token = agent.run("cat", "/etc/nbagent/token").strip()
    assert len(token) >= 40
    before = len(agent.slots("claimed"))
    for path in ("/stats", "/claim", "/slots", "/metrics", "/images"):
        assert outside(path=path) == 401
        assert outside("-H", "Authorization: Bearer wrong", path=path) == 403
    assert outside("-X", "POST", path="/claim") == outside("-X", "POST", path="/drain") == 401
    assert len(agent.slots("claimed")) == before
    assert outside("-H", f"Authorization: Bearer {token}") == 200
    assert outside("-H", f"Authorization: Bearer {token}", "-X", "POST", path="/claim") == 200
    assert len(agent.slots("claimed")) == before + 1
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert outside(path=path) == 200


def test_a_network_can_be_trusted(agent, outside):
    agent.configure(f'[api]\ntrusted_networks = ["127.0.0.0/8", "{OUTSIDE}/32"]\n')
    agent.run("systemctl", "reload", "nbagent-api.service")
    try:
        agent.wait(lambda: outside() == 200, "the API's new workers")
    finally:
        agent.configure("")
        agent.run("systemctl", "reload", "nbagent-api.service")
    agent.wait(lambda: outside() == 401, "the API's former settings")


@pytest.mark.parametrize("header", ["X-Forwarded-For", "X-Real-IP", "Forwarded", "Via", "X-Forwarded-Host"])
def test_header_of_a_proxy_voids_trust_in_the_address(agent, header):
    response = agent.api.call("POST", "/claim", headers={header: "127.0.0.1"})
    assert response.status == 401
    assert response.headers["content-type"] == "application/problem+json"


def test_only_pages_of_allowed_origins_may_call(agent):
    before = len(agent.slots("claimed"))
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"},
                    {"Host": "evil.example:9000"}):
        for method in ("GET", "POST"):
            refused = agent.api.call(method, "/claim", headers=headers)
            assert refused.status == 403
            assert "access-control-allow-origin" not in refused.headers
    assert len(agent.slots("claimed")) == before
    friend = {"Origin": "https://friend.example", "Sec-Fetch-Site": "cross-site"}
    preflight = agent.api.call("OPTIONS", "/claim", headers=friend | {"Access-Control-Request-Method": "POST"})
    assert preflight.status == 204 and "POST" in preflight.headers["access-control-allow-methods"]
    claimed = agent.api.call("POST", "/claim", headers=friend)
    assert claimed.status == 200
    assert claimed.headers["access-control-allow-origin"] == "https://friend.example"


def test_a_new_token_is_valid_at_once_and_no_call_is_lost(agent, outside):
    """The API gets its tokens as systemd's credentials, which a start alone renews."""
    former, started = agent.run("cat", "/etc/nbagent/token").strip(), api_started(agent)
    calls = agent.host.popen(["sh", "-c", LOAD], stdout=subprocess.PIPE, text=True)
    try:
        agent.run("sh", "-c", "openssl rand -hex 32 > /etc/nbagent/token")
        agent.wait(lambda: api_started(agent) != started, "a restart of the API by nbagent-token.path")
        token = agent.run("cat", "/etc/nbagent/token").strip()
        assert outside("-H", f"Authorization: Bearer {token}") == 200
        assert outside("-H", f"Authorization: Bearer {former}") == 403
    finally:
        output = calls.communicate(timeout=60)[0].split()
    assert set(output) == {"200"} and len(output) >= 20, output


def api_started(agent):
    return agent.run("systemctl", "show", "-P", "InvocationID", "nbagent-api.service").strip()


def test_a_missing_token_admits_no_token_and_is_reported(agent, outside):
    agent.run("mv", "/etc/nbagent/token", "/root/token")
    agent.expect(r"/etc/nbagent/token is missing or empty")
    agent.run("systemctl", "restart", "nbagent-api.service")
    try:
        for given in ("", "\n", "none"):
            assert outside("-H", f"Authorization: Bearer {given}") in (401, 403)
        log = agent.run("journalctl", "-u", "nbagent-api", "-n", "20", "-o", "cat")
        assert "/etc/nbagent/token is missing or empty: only networks in api.trusted_networks may call the API" in log
    finally:
        agent.run("mv", "/root/token", "/etc/nbagent/token")
        agent.run("systemctl", "restart", "nbagent-api.service")


def test_only_root_may_read_the_token(agent):
    assert agent.run("stat", "-c", "%U:%G %a", "/etc/nbagent/token").strip() == "root:root 600"
    for user in ("nobody", "nbagent-router", "nbagent"):
        assert agent.host.run(["runuser", "-u", user, "--", "cat", "/etc/nbagent/token"], check=False).returncode != 0


def test_the_control_socket_is_for_root_and_the_api(agent):
    connect = "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect('/run/nbagent/control.sock')"
    for user, may in (("nbagent", True), ("nobody", False), ("nbagent-router", False)):
        done = agent.host.run(["runuser", "-u", user, "--", "python3", "-c", connect], check=False)
        assert (done.returncode == 0) is may, user
