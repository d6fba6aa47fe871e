"""What an operator sees and types: the journal, the command line, the metrics, and who may call."""

import json
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbagent.core.events import Event

OUTSIDE = "198.51.100.7"
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


def said(agent, slot):
    """The steps of a slot's life that the journal tells, in order; each has to have an id."""
    known = {event.value.message_id: event for event in Event}
    steps = [known[entry["MESSAGE_ID"]] for entry in agent.journal(f"NBAGENT_SLOT={slot}")]
    # Another test may have restarted the agent while the slot was warm.
    return [step for step in steps if step is not Event.SLOT_ADOPTED]


# -- the journal


def test_each_step_of_a_slots_life_is_in_the_journal_under_its_id(agent):
    slot = agent.claim()["slot"]
    agent.api.patch(f"/slots/{slot}", {"ttl": 600})
    agent.release(slot)
    agent.wait(lambda: Event.SLOT_GONE in said(agent, slot), "the end in the journal")
    assert said(agent, slot) == [
        Event.SLOT_STARTING, Event.SLOT_WARM, Event.SLOT_CLAIMED, Event.SLOT_UPDATED, Event.SLOT_RELEASED,
        Event.SLOT_GONE,
    ]
    claimed = agent.journal(f"NBAGENT_SLOT={slot}", f"MESSAGE_ID={Event.SLOT_CLAIMED.value.message_id}")[0]
    assert claimed["NBAGENT_CLIENT"] == "127.0.0.1" and claimed["SYSLOG_IDENTIFIER"] == "nbagent"


def test_journalctl_explains_each_step(agent):
    slot = agent.claim()["slot"]
    agent.release(slot)
    agent.wait(lambda: Event.SLOT_GONE in said(agent, slot), "the end in the journal")
    told = agent.run("journalctl", "-x", "--no-pager", f"NBAGENT_SLOT={slot}")
    for subject in ("starts", "is warm", "is claimed", "is released", "is removed"):
        assert f"Subject: Slot {slot} {subject}" in told
    assert f"journalctl -u nbagent-{slot}.scope" in told
    assert "@NBAGENT_" not in told


def test_the_scopes_journal_is_the_notebook_servers_own_output(agent):
    notebook = agent.open()
    kernel = notebook.kernel()
    kernel.end()
    output = agent.run("journalctl", "--no-pager", "-o", "cat", "-u", f"nbagent-{notebook.slot}.scope")
    assert f"Kernel started: {kernel.id}" in output
    assert notebook.token not in output


def test_settings_that_are_wrong_are_refused_in_the_journal_and_the_old_ones_stay(agent):
    agent.expect("configuration not reloaded: .*wram")
    agent.configure("[pool]\nwram = 3\n")

    def refusals():
        return agent.journal(f"MESSAGE_ID={Event.CONFIG_REFUSED.value.message_id}")

    told = agent.wait(refusals, "the refusal in the journal")
    assert 'did you mean "warm"?' in told[-1]["MESSAGE"]
    assert agent.api.get("/stats").json()["pools"]["minimal"]["wanted"] == 1


# -- the command line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_json_and_a_form_for_people(agent, command):
    status, text, complaint = cli(agent, command, "--json")
    assert (status, complaint) == (0, "")
    document = json.loads(text)
    if COMMANDS[command]:
        assert COMMANDS[command] <= set(document)
    else:
        assert document and all(isinstance(item, dict) for item in document)
    status, text, complaint = cli(agent, command)
    assert (status, complaint) == (0, "") and text
    with pytest.raises(ValueError):
        json.loads(text)


def test_a_slot_lives_from_command_to_command(agent):
    status, url, _ = cli(agent, "claim", "--memory", "300M", "--ttl", "1h", "--path", "lab/tree/Welcome.ipynb")
    assert status == 0
    slot = re.match(r"http://127\.0\.0\.1:8000/user/([^/]+)/lab/tree/Welcome\.ipynb\?token=\S+\n$", url)[1]
    assert slot in cli(agent, "slots")[1]
    status, facts, _ = cli(agent, "slots", slot)
    assert status == 0 and re.search(r"^state +claimed$", facts, re.M)
    assert re.search(rf"memory_bytes +{300 << 20}$", facts, re.M)
    assert json.loads(cli(agent, "slots", slot, "--json")[1])["slot"] == slot
    assert cli(agent, "release", slot) == (0, f"{slot} stopping\n", "")
    agent.wait(lambda: cli(agent, "slots", slot)[0] == 3, "the slot to be gone")
    status, _, complaint = cli(agent, "release", slot)
    assert status == 3 and complaint.startswith("nbagent: ") and complaint.count("\n") == 1


def test_drain_and_its_end(agent):
    status, text, _ = cli(agent, "drain", "--json")
    try:
        assert status == 0 and json.loads(text)["draining"] is True
        status, out, complaint = cli(agent, "claim")
        assert (status, out) == (75, "") and "draining" in complaint
    finally:
        status, text, _ = cli(agent, "drain", "--off", "--json")
    assert status == 0 and json.loads(text)["draining"] is False
    agent.wait_warm()


def test_drain_can_wait_for_the_last_user(agent):
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
def test_the_exit_status_says_what_went_wrong(agent, words, status):
    found, out, complaint = cli(agent, *words)
    assert found == status, complaint
    assert "Traceback" not in complaint
    if status:
        assert out == "" and complaint


def test_config_check_knows_right_from_wrong(agent):
    status, text, _ = cli(agent, "config", "check", "--json")
    assert status == 0 and json.loads(text)["config"]["slots"]["memory"] == 512 << 20
    assert json.loads(text)["files"] == ["/etc/nbagent/nbagent.toml", "/etc/nbagent/conf.d/50-test.toml"]
    agent.host.run(["tee", "/tmp/bad.toml"], input='[slots]\nmemory = "lots"\n')
    status, out, complaint = cli(agent, "config", "check", "/tmp/bad.toml")
    assert (status, out) == (78, "")
    assert "slots.memory" in complaint and '"512M"' in complaint
    agent.run("rm", "/tmp/bad.toml")


def test_the_doctor_names_what_is_weak_and_how_to_mend_it(agent):
    status, text, _ = cli(agent, "doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(text)}
    assert status == 0, text
    assert not [finding for finding in findings.values() if finding["status"] == "fail"]
    if agent.host.run(["test", "-e", "/sys/fs/cgroup/cgroup.controllers"], check=False).returncode:
        assert findings["cgroups"]["status"] == "warn"
        assert "systemd.unified_cgroup_hierarchy=1" in findings["cgroups"]["mend"]
    assert findings["token"]["found"] == "mode 0640"


def test_the_doctor_finds_a_part_that_does_not_run(agent):
    agent.run("systemctl", "stop", "nbagent-router.socket", "nbagent-router.service")
    try:
        status, text, _ = cli(agent, "doctor")
        assert status == 1
        assert re.search(r"^fail +nbagent-router\.service: inactive\n +systemctl start nbagent-router", text, re.M)
    finally:
        agent.run("systemctl", "start", "nbagent-router.socket", "nbagent-router.service")
    assert cli(agent, "doctor")[0] == 0


@pytest.mark.parametrize("page", MANUAL_PAGES)
def test_manual_pages_are_there_and_render_without_a_complaint(agent, page):
    name, section = page.rstrip(")").split("(")
    assert agent.run("man", "-w", section, name).startswith(f"/usr/share/man/man{section}/")
    done = agent.host.run(["env", "MANWIDTH=80", "man", "--warnings=w", section, name])
    assert done.stdout.startswith(("nbagent", "NBAGENT")) and "SEE ALSO" in done.stdout
    assert done.stderr == ""


# -- figures and descriptions


def sample(agent, name, **labels):
    """One value of /metrics."""
    answer = agent.api.get("/metrics")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/plain")
    for family in text_string_to_metric_families(answer.body.decode()):
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


def test_the_description_is_of_what_is_served(agent):
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


# -- who may call


@pytest.fixture
def outside(agent):
    """An address of the host that is on no trusted network; calls from it give a status."""
    agent.run("ip", "address", "add", f"{OUTSIDE}/32", "dev", "lo")

    def call(*words, path="/stats"):
        return int(agent.run("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--interface", OUTSIDE, *words,
                             f"http://{OUTSIDE}:9000{path}"))

    yield call
    agent.run("ip", "address", "del", f"{OUTSIDE}/32", "dev", "lo")


def test_a_caller_from_elsewhere_needs_the_token(agent, outside):
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
def test_a_proxy_in_between_voids_trust_in_the_address(agent, header):
    answer = agent.api.call("POST", "/claim", headers={header: "127.0.0.1"})
    assert answer.status == 401
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_foreign_web_page_may_not_call_and_a_friends_may(agent):
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


def test_only_root_and_the_api_may_read_the_token(agent):
    assert agent.run("stat", "-c", "%U:%G %a", "/etc/nbagent/token").strip() == "root:nbagent 640"
    for user in ("nobody", "nbagent-router"):
        assert agent.host.run(["runuser", "-u", user, "--", "cat", "/etc/nbagent/token"], check=False).returncode != 0


def test_the_control_socket_is_for_root_and_the_api(agent):
    connect = "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect('/run/nbagent/control.sock')"
    for user, may in (("nbagent", True), ("nobody", False), ("nbagent-router", False)):
        done = agent.host.run(["runuser", "-u", user, "--", "python3", "-c", connect], check=False)
        assert (done.returncode == 0) is may, user
