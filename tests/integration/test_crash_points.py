# SPDX-License-Identifier: BSD-3-Clause
"""The supervisor ends at each named point of a slot's life: no slot is lost, doubled or leaked, and claims go on."""

import json
import time

import pytest

from nbagent.core.events import Event
from nbagent.supervisor.crash_points import Point

SUPERVISOR = "nbagent.service"
POINT_FILE = "/run/nbagent/crash-point"
DROP_IN = "/etc/systemd/system/nbagent.service.d/crash-points.conf"
ENDED = (
    r"nbagent\.service: (Main process exited|Failed with result)|Failed to start nbagent(\.service|-\S+\.scope)"
    r"|Reload failed for nbagent|limits of slot \S+ set to those of its record"
    r"|zygote \S+ failed|nbagent-zygote@\S+: (Main|Failed)"
)
# On a busy machine a zygote starts for minutes.
REST_S = 300
# The claim takes a warm slot, and the slot that replaces it passes these points.
BY_A_START = {Point.RECORD_CREATED, Point.FORKED, Point.SCOPE_STARTED, Point.SERVES, Point.WARM_RECORDED}
BY_LIMITS = {Point.PREPARING, Point.LIMITS_SET}


@pytest.fixture
def crashing(agent):
    """A host whose supervisor can be ended at a point, and a user with a kernel on it."""
    agent.expect(ENDED)
    agent.run("mkdir", "-p", DROP_IN.rpartition("/")[0])
    settings = "[Service]\nEnvironment=NBAGENT_CRASH_POINTS=1\nRestartSec=100ms\n"
    agent.host.run(["tee", DROP_IN], input=settings)
    agent.run("systemctl", "daemon-reload")
    agent.run("systemctl", "restart", SUPERVISOR)
    yield agent
    agent.run("rm", "-f", DROP_IN, POINT_FILE)
    agent.run("systemctl", "daemon-reload")
    agent.run("systemctl", "restart", SUPERVISOR)


def provoke(agent, point, victim):
    """Makes the supervisor pass the point; returns the claims that were answered by a slot."""
    if point in (Point.ROUTE_REMOVED, Point.STOPPED):
        # The repeated call finds that the slot has ended.
        assert agent.api.delete(f"/slots/{victim}").status in (200, 404)
    elif point is Point.UPDATE_RECORDED:
        assert agent.api.patch(f"/slots/{victim}", {"memory": "640M"}).status == 200
    elif point is Point.SLOT_ADOPTED:
        agent.run("systemctl", "restart", SUPERVISOR, check=False)
    elif point is Point.IMAGE_REPLACED:
        agent.run("systemctl", "reload", SUPERVISOR, check=False)
    elif point is Point.ZYGOTE_READY:
        agent.run("systemctl", "kill", "-s", "KILL", *zygotes(agent))
    elif point is Point.CONTENT_STARTED:
        return [agent.claim(files={"a.txt": "x" * 100_000})["slot"]]
    elif point in BY_LIMITS:
        claimed = agent.claim(memory="640M")
        assert claimed["limits"]["memory_bytes"] == limit(agent, claimed["slot"]) == 640 << 20
        return [claimed["slot"]]
    else:
        assert point in BY_A_START | {Point.CLAIM_RECORDED}
        return [agent.claim()["slot"]]
    return []


def zygotes(agent):
    listed = agent.run("systemctl", "list-units", "--plain", "--no-legend", "nbagent-zygote@*.service").splitlines()
    return [line.split()[0] for line in listed]


def limit(agent, slot):
    return int(agent.run("systemctl", "show", "-P", "MemoryMax", f"nbagent-{slot}.scope"))


def settled(agent):
    """The states of the slots by id, when records, scopes and the supervisor agree and one zygote has no child; else
    None."""
    slots = {slot["slot"]: slot["state"] for slot in agent.slots()}
    script = """
        echo records; for file in /run/nbagent/slots/*/slot.json; do basename $(dirname $file); done
        echo scopes; systemctl list-units --all --plain --no-legend 'nbagent-*.scope' | awk '{print $1}'
        echo zygotes; systemctl list-units --plain --no-legend 'nbagent-zygote@*.service' | awk '{print $1, $3}'
        echo processes
        cat /sys/fs/cgroup/systemd/nbagent.slice/nbagent-zygote@*/cgroup.procs 2>/dev/null ||
            cat /sys/fs/cgroup/nbagent.slice/nbagent-zygote@*/cgroup.procs
        echo stored; systemctl show -P NFileDescriptorStore nbagent.service"""
    found = {}
    for line in agent.run("sh", "-c", script, check=False).splitlines():
        if line in ("records", "scopes", "zygotes", "processes", "stored"):
            name = line
            found[name] = []
        else:
            found[name].append(line)
    scopes = {scope.removeprefix("nbagent-").removesuffix(".scope") for scope in found["scopes"]}
    if not (set(found["records"]) == scopes == slots.keys() and set(slots.values()) <= {"warm", "claimed"}):
        return None
    # The zygote service and its zygote.
    if len(found["zygotes"]) != 1 or len(found["processes"]) != 2 or found["stored"] != ["1"]:
        return None
    return slots if "warm" in slots.values() else None


def removed(agent, since_s):
    """The ids of incomplete slots that were removed since then."""
    entries = agent.journal(f"MESSAGE_ID={Event.SLOT_REMOVED.value.message_id}", "--since", f"@{since_s:.3f}")
    return [entry["NBAGENT_SLOT"] for entry in entries if "incomplete" in entry["MESSAGE"]]


def test_a_supervisor_that_ends_at_any_point_loses_and_leaks_no_slot(crashing):
    agent = crashing
    user = agent.open()
    with user.kernel() as kernel:
        assert kernel.run("answer = 6 * 7").status == "ok"
        agent.wait(lambda: settled(agent), "a host at rest", REST_S)
        for point in Point:
            victim = agent.claim()["slot"]
            agent.wait(lambda: settled(agent), f"a host at rest before {point.name}", REST_S)
            began_s = time.time()
            agent.host.run(["tee", POINT_FILE], input=point.name)
            claimed = {user.slot, victim, *provoke(agent, point, victim)}
            if point in (Point.ROUTE_REMOVED, Point.STOPPED):
                claimed.remove(victim)
            present = ["test", "-e", POINT_FILE]
            agent.wait(
                lambda: agent.host.run(present, check=False).returncode,  # noqa: B023
                f"the supervisor's end at {point.name}", REST_S,
            )
            agent.wait(lambda: agent.api.get("/healthz").status == 200, f"a supervisor after {point.name}")
            slots = agent.wait(lambda: settled(agent), f"a host at rest after {point.name}", REST_S)
            assert {slot for slot, state in slots.items() if state == "claimed"} == claimed, point
            assert removed(agent, began_s) or point not in BY_A_START - {Point.WARM_RECORDED}, point
            for slot in slots:
                recorded = json.loads(agent.run("cat", f"/run/nbagent/slots/{slot}/slot.json"))["limits"]
                assert recorded["memory_bytes"] == limit(agent, slot), (point, slot)
            assert kernel.run("answer").text == "42", point
            for slot in claimed - {user.slot}:
                agent.api.delete(f"/slots/{slot}")
