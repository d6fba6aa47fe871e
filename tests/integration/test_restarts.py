# SPDX-License-Identifier: BSD-3-Clause
"""Restarts, crashes and upgrades of the agent, none of which ends a claimed slot."""

import contextlib
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbagent.core.events import Event
from nbagent.core.model import new_id
from notebook import Kernel

SUPERVISOR, API, ROUTER = "nbagent.service", "nbagent-api.service", "nbagent-router.service"
UNITS, LAUNCH = "nbagent-units.service", "nbagent-launch.service"
# The messages of PID 1 about a killed service.
FAILED_SCOPE = re.compile(r"Failed to start nbagent-\S+\.scope")
KILLED = (
    r"nbagent(-api|-router|-units|-launch)?\.service: (Main process exited|Failed with result|Consumed|Killing process)"
)


class Session:
    """A user's session: a variable in a kernel, and a cell that runs until a file appears."""

    def __init__(self, agent):
        self.agent, self.notebook = agent, agent.open()
        self.kernel = self.notebook.kernel()
        assert self.kernel.run("import os, pathlib, time; answer = 6 * 7").status == "ok"
        self.kernel.send(
            "pathlib.Path('runs').touch()\n"
            "while not os.path.exists('go'): time.sleep(0.05)\n"
            "pathlib.Path('done').write_text(str(answer))"
        )
        agent.wait(lambda: self.file("runs") is not None, "the cell to run")
        self.pids = agent.processes(self.notebook.slot)
        assert len(self.pids) >= 3

    def file(self, name):
        """A file's content through the router, or None."""
        path = f"{self.notebook.base}api/contents/{name}"
        answer = self.notebook.router.call("GET", path, headers=self.notebook.headers)
        return answer.json()["content"] if answer.status == 200 else None

    def check(self):
        """Fails unless the processes, the cell, the variable and the claim are unchanged."""
        agent, notebook = self.agent, self.notebook
        agent.wait(lambda: agent.api.get("/healthz").status == 200, "the API")
        assert agent.api.get(f"/slots/{notebook.slot}").json()["state"] == "claimed"
        assert agent.processes(notebook.slot) == self.pids
        assert self.file("done") is None
        body = {"type": "file", "format": "text", "content": ""}
        assert notebook.router.call("PUT", f"{notebook.base}api/contents/go", body, notebook.headers).status == 201
        assert agent.wait(lambda: self.file("done"), "the cell's end") == "42"
        with Kernel(notebook, self.kernel.id) as again:
            assert again.run("answer").text == "42"

    def close(self):
        with contextlib.suppress(OSError):
            self.kernel.close()


@pytest.fixture
def session(agent):
    """A session on the shared host."""
    with contextlib.closing(Session(agent)) as session:
        yield session


@pytest.fixture
def workers():
    """Threads for concurrent callers."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


def restart(agent, unit):
    agent.run("systemctl", "restart", unit)


def kill(agent, unit):
    """SIGKILL to every process of a service; returns when PID 1 has restarted it."""
    agent.expect(KILLED)
    # A slot that is starting ends with the supervisor, before or after PID 1 has moved it into its scope.
    agent.expect(FAILED_SCOPE.pattern)
    before = main_pid(agent, unit)
    agent.run("systemctl", "kill", "-s", "KILL", unit)
    agent.wait(lambda: main_pid(agent, unit) not in (before, 0), f"{unit} to be restarted")


def main_pid(agent, unit):
    return int(agent.run("systemctl", "show", "-P", "MainPID", unit))


def events(agent, slot, event):
    """The journal's entries of one event about a slot."""
    return agent.journal(f"NBAGENT_SLOT={slot}", f"MESSAGE_ID={event.value.message_id}")


@pytest.mark.parametrize("how", [restart, kill], ids=["restart", "kill-9"])
@pytest.mark.parametrize("unit", [SUPERVISOR, API, ROUTER, UNITS, LAUNCH])
def test_a_session_goes_on_over_the_end_of(session, agent, unit, how):
    # Opening the session has started the services that start at a request.
    before = main_pid(agent, unit)
    how(agent, unit)
    assert main_pid(agent, unit) not in (before, 0)
    session.check()
    if unit != ROUTER:
        # Its websocket was not closed.
        assert session.kernel.run("answer + 1").text == "43"


@pytest.mark.parametrize("how", [restart, kill], ids=["restart", "kill-9"])
def test_claims_wait_for_the_supervisor_and_succeed(agent, workers, how):
    claims = [workers.submit(agent.claim) for _ in range(2)]
    how(agent, SUPERVISOR)
    claims += [workers.submit(agent.claim)]
    slots = {claim.result()["slot"] for claim in claims}
    assert len(slots) == 3
    assert slots <= {slot["slot"] for slot in agent.slots("claimed")}


def zygotes(agent):
    """The zygotes' units with the pid of each service."""
    units = agent.run("systemctl", "list-units", "--plain", "--no-legend", "nbagent-zygote@*.service").split()
    return {unit: main_pid(agent, unit) for unit in units if unit.endswith(".service")}


def were_ready(agent):
    """The units of zygotes that have become ready, by the journal."""
    return {f"nbagent-zygote@{entry['NBAGENT_ZYGOTE']}.service" for event in (Event.ZYGOTE_READY, Event.ZYGOTE_ADOPTED)
            for entry in agent.journal(f"MESSAGE_ID={event.value.message_id}")}


@pytest.fixture
def zygote(agent):
    """A zygote that is ready, as its unit and pid, and no other of its image that starts."""
    def ready():
        running = zygotes(agent)
        return len(running) == 1 and were_ready(agent) >= running.keys() and running

    # On a busy machine a zygote starts for minutes.
    return agent.wait(ready, "one zygote", timeout=300)


@pytest.mark.parametrize("how", [restart, kill], ids=["restart", "kill-9"])
def test_a_zygote_outlives_the_supervisor_and_forks_for_the_next(agent, workers, zygote, how):
    before = time.time()
    how(agent, SUPERVISOR)
    # More than the warm pool has.
    slots = {claim.result()["slot"] for claim in [workers.submit(agent.claim) for _ in range(4)]}
    assert zygotes(agent) == zygote
    # With fractions: of a time that was rounded up, the entry of a fast restart would be left out.
    adopted = agent.journal(f"MESSAGE_ID={Event.ZYGOTE_ADOPTED.value.message_id}", "--since", f"@{before:.3f}")
    assert {f"nbagent-zygote@{entry['NBAGENT_ZYGOTE']}.service" for entry in adopted} == zygote.keys()
    forked = agent.run("systemctl", "show", "-P", "MainPID", *zygote).strip()
    for slot in slots:
        # The init of a forked slot is a child of the zygote service.
        init = json.loads(agent.run("cat", f"/run/nbagent/slots/{slot}/slot.json"))["pid"]
        parent = agent.run("ps", "-o", "ppid=", "-p", str(init)).strip()
        assert parent == forked or slot in (entry["NBAGENT_SLOT"] for entry in adopted_slots(agent))
        agent.release(slot)
    stored = agent.run("systemctl", "show", "-P", "NFileDescriptorStore", SUPERVISOR).strip()
    assert stored == "1"


def adopted_slots(agent):
    return agent.journal(f"MESSAGE_ID={Event.SLOT_ADOPTED.value.message_id}")


def test_zygotes_end_when_the_supervisor_is_stopped(agent, zygote):
    agent.run("systemctl", "stop", SUPERVISOR)
    agent.wait(lambda: not zygotes(agent), "the end of the zygotes")
    agent.run("systemctl", "start", SUPERVISOR)


@pytest.mark.parametrize("how", [restart, kill], ids=["restart", "kill-9"])
def test_a_zygote_that_is_starting_outlives_the_supervisor(agent, how):
    agent.run("systemctl", "stop", SUPERVISOR)
    agent.wait(lambda: not zygotes(agent), "the end of the zygotes")
    agent.run("systemctl", "start", SUPERVISOR)
    stored = ["systemctl", "show", "-P", "NFileDescriptorStore", SUPERVISOR]
    agent.wait(lambda: agent.run(*stored).strip() == "1", "the connection to a zygote that starts")
    starting = zygotes(agent)
    how(agent, SUPERVISOR)
    agent.wait(
        lambda: agent.api.get("/stats").json()["zygotes"]["minimal"]["state"] == "ready", "the zygote", timeout=300,
    )
    # On a busy host a quick zygote is the first, and a complete one starts as soon as it is ready.
    assert len(starting) == 1 and starting.items() <= zygotes(agent).items() and starting.keys() <= were_ready(agent)


def test_a_supervisor_that_stops_while_slots_start_leaves_no_failed_scope(agent, workers):
    def failed():
        return [entry for entry in agent.journal("-p", "warning") if FAILED_SCOPE.search(str(entry["MESSAGE"]))]

    before = len(failed())
    for _ in range(3):
        claims = [workers.submit(agent.claim) for _ in range(4)]
        restart(agent, SUPERVISOR)
        assert len({claim.result()["slot"] for claim in claims}) == len(claims)
    assert not failed()[before:]


def test_no_call_is_lost_while_the_api_restarts(agent, workers):
    done = []

    def call():
        while not done:
            assert agent.api.get("/healthz").status == 200
        return "all answered"

    asking = [workers.submit(call) for _ in range(2)]
    for _ in range(2):
        restart(agent, API)
    done.append(True)
    assert [asked.result() for asked in asking] == ["all answered"] * 2


def test_a_warm_pool_is_adopted_and_not_made_anew(agent):
    agent.wait(lambda: not agent.slots("starting"), "a quiet pool")
    before = {slot["slot"]: agent.processes(slot["slot"]) for slot in agent.slots("warm")}
    assert before
    restart(agent, SUPERVISOR)
    stats = agent.api.get("/stats").json()
    assert stats["counters"]["starts"] == 0
    assert {slot["slot"]: agent.processes(slot["slot"]) for slot in agent.slots("warm")} == before
    for slot in before:
        assert events(agent, slot, Event.SLOT_ADOPTED)
    # A claim gets it as before the restart, and its programs see the claim's limits.
    notebook = agent.open(memory="300M")
    assert notebook.slot in before
    seen = notebook.run("import os; print(os.environ['MEM_LIMIT'], next(open('/proc/meminfo')).split()[1])").stream
    assert seen.split() == [str(300 << 20), str(300 << 10)]


def test_files_without_scope_and_scopes_without_file_are_removed(agent):
    broken, lost, kept = agent.claim()["slot"], agent.claim()["slot"], agent.open()
    agent.wait_warm()
    agent.run("systemctl", "stop", SUPERVISOR)
    slots, label = "/run/nbagent/slots", kept.slot.split("-")[0]
    ghost, double = new_id(label), new_id(label)
    agent.run("sh", "-c", f"""
        cd {slots}
        echo '{{"id": ' >{broken}/slot.json
        rm -r {lost}
        cp -a {kept.slot} {double}
        cp -a {kept.slot} {ghost} && sed -i s/{kept.slot}/{ghost}/g {ghost}/slot.json
        mkdir empty""")
    agent.run("systemctl", "start", SUPERVISOR)
    why = {
        broken: "slot.json is missing or broken", lost: "has no slot.json", double: "slot.json is missing or broken",
        ghost: "its processes ended while no supervisor ran", "empty": "slot.json is missing or broken",
    }
    for slot, text in why.items():
        agent.wait(lambda slot=slot: events(agent, slot, Event.SLOT_REMOVED), f"the removal of {slot}")
        assert text in events(agent, slot, Event.SLOT_REMOVED)[-1]["MESSAGE"]
        assert agent.run("sh", "-c", f"ls -d {slots}/{slot} 2>/dev/null; systemctl list-units --all --plain "
                         f"--no-legend nbagent-{slot}.scope; true") == ""
    assert [slot["slot"] for slot in agent.slots("claimed")] == [kept.slot]
    assert kept.run("6 * 7").text == "42"


def test_draining_outlives_the_supervisor(agent):
    agent.api.post("/drain")
    try:
        for how in (restart, kill):
            how(agent, SUPERVISOR)
            assert agent.api.get("/stats").json()["draining"] is True
            assert agent.api.post("/claim").json()["type"] == "urn:nbagent:problem:draining"
    finally:
        agent.api.delete("/drain")
    assert agent.api.get("/stats").json()["draining"] is False


def test_an_upgrade_keeps_claimed_sessions(session, agent):
    before = {unit: main_pid(agent, unit) for unit in (SUPERVISOR, API, ROUTER)}
    agent.run("sh", "-c", "apt-get -q install -y --reinstall /root/nbagent_*.deb </dev/null", timeout=300)
    after = {unit: main_pid(agent, unit) for unit in before}
    assert all(after.values())
    assert after[SUPERVISOR] != before[SUPERVISOR] and after[API] != before[API]
    # The router gets its new configuration by a reload, which ends no websocket.
    assert after[ROUTER] == before[ROUTER]
    assert session.kernel.socket.connected
    session.check()
    assert session.kernel.run("answer + 1").text == "43"
    assert agent.open().run("1 + 1").text == "2"


def test_a_wrong_setting_changes_nothing_and_is_logged(agent):
    agent.expect(r"configuration not reloaded")
    before = main_pid(agent, SUPERVISOR)
    agent.configure('[slots]\nmemroy = "1G"\n')
    refused = agent.wait(lambda: agent.journal(f"MESSAGE_ID={Event.CONFIG_REFUSED.value.message_id}"), "a refusal")[-1]
    assert refused["PRIORITY"] == "3"
    for word in ("90-one-test.toml", "slots.memroy", '"memory"'):
        assert word in refused["MESSAGE"]
    agent.run("systemctl", "reload", API)
    agent.wait(lambda: "memroy" in agent.run("journalctl", "-u", API, "-p", "err"), "the API's refusal")
    assert main_pid(agent, SUPERVISOR) == before
    assert agent.run("systemctl", "is-active", SUPERVISOR, API) == "active\n" * 2
    assert agent.claim()["limits"]["memory_bytes"] == 512 << 20


def test_a_stop_is_quick_and_leaves_every_slot(session, agent):
    agent.configure("[pool]\nwarm = 3\n")
    agent.wait(lambda: agent.slots("starting"), "a slot that starts")
    settled = {slot["slot"] for slot in agent.slots() if slot["state"] in ("warm", "claimed")}
    limit_s = agent.run("systemctl", "show", "-P", "TimeoutStopUSec", SUPERVISOR).strip()
    began = time.monotonic()
    agent.run("systemctl", "stop", SUPERVISOR)
    assert time.monotonic() - began < 30 and limit_s == "1min 30s"
    assert agent.run("systemctl", "show", "-P", "Result", SUPERVISOR) == "success\n"
    scopes = agent.run("systemctl", "list-units", "--plain", "--no-legend", "nbagent-*.scope").splitlines()
    running = {line.split()[0].removeprefix("nbagent-").removesuffix(".scope") for line in scopes}
    # A starting slot has ended or become warm; every other slot is unchanged.
    assert settled <= running
    known = agent.run("sh", "-c", "cat /run/nbagent/slots/*/slot.json | sed 's/}{/}\\n{/g'").splitlines()
    assert {json.loads(line)["state"] for line in known} <= {"warm", "claimed"}
    assert session.file("runs") is not None  # the router works without the agent
    agent.run("systemctl", "start", SUPERVISOR)
    session.check()


def test_at_a_shutdown_slots_end_before_the_router(agent):
    # Here slots can end before the supervisor does.
    agent.expect(r"slot \S+ (ended unexpectedly|did not start)|pool \S+ pauses")
    agent.expect(FAILED_SCOPE.pattern)
    # Its SIGTERM takes slots.stop_timeout.
    notebook = agent.open()
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    kernel = notebook.kernel()
    assert kernel.run(ignore).status == "ok"
    agent.wait(lambda: not agent.slots("starting"), "a quiet pool")
    # Its stop has begun when the others are requested, as in the transaction of a shutdown.
    slots = "nbagent-slots.slice"
    agent.run("systemctl", "stop", slots, SUPERVISOR, API, ROUTER)
    ended, began = (
        int(agent.run("systemctl", "show", "-P", name, unit))
        for unit, name in ((slots, "InactiveEnterTimestampMonotonic"), (ROUTER, "ActiveExitTimestampMonotonic"))
    )
    agent.run("systemctl", "start", ROUTER, API, SUPERVISOR)
    assert 0 < ended <= began
    kernel.close()


def test_a_directory_that_systemd_leaves_when_run_is_full_ends_with_its_slot(agent):
    slot = agent.claim()["slot"]
    left = f"/run/systemd/transient/nbagent-{slot}.scope.d"
    agent.run("mkdir", left)
    agent.release(slot)
    agent.wait(lambda: slot not in agent.run("ls", "/run/nbagent/slots"), "the end of the slot")
    assert slot not in agent.run("ls", "/run/systemd/transient")


@pytest.mark.parametrize("fault", [
    ["systemctl", "kill", "-s", "KILL", "dbus.service"], ["systemctl", "daemon-reexec"],
], ids=["dbus-daemon", "daemon-reexec"])
def test_slots_start_and_end_when_the_connection_to_systemd_has_ended(agent, fault):
    agent.expect(r"the connection to systemd ended|not connected to systemd")
    agent.expect(r"slot \S+ (did not start|was not stopped)|pool \S+ pauses")
    before = agent.claim()["slot"]
    agent.run(*fault)
    # More than the pool has, so that scopes are started.
    claimed = [before, *(agent.claim()["slot"] for _ in range(4))]
    for slot in claimed:
        agent.release(slot)
    scopes = agent.run("systemctl", "list-units", "--plain", "--no-legend", "--all", "nbagent-*.scope")
    assert not [slot for slot in claimed if slot in scopes]
    notebook = agent.open()
    assert notebook.run("6 * 7").text == "42"
