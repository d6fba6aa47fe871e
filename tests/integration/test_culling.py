# SPDX-License-Identifier: BSD-3-Clause
"""Slots that are culled because they are idle, too old or dead; and the kinds of activity."""

import time

import pytest
from waits import check_waits

from nbagent.core.events import Event


@pytest.fixture
def impatient(agent):
    """The shared host, where a slot is idle after four seconds."""
    agent.configure('[cull]\nidle = "4s"\n')
    return agent


def logged(agent, slot, event):
    """The time (seconds) and the text of the journal's entry of an event about a slot; None before."""
    found = agent.journal(f"NBAGENT_SLOT={slot}", f"MESSAGE_ID={event.value.message_id}")
    return (int(found[0]["__MONOTONIC_TIMESTAMP"]) / 1e6, found[0]["MESSAGE"]) if found else None


def culled(agent, slot, timeout=60):
    """Waits until a slot is culled; returns the time and the reason."""
    at_s, text = agent.wait(lambda: logged(agent, slot, Event.SLOT_CULLED), f"{slot} to be culled", timeout)
    return at_s, text.removeprefix(f"slot {slot} removed: ")


def state(agent, slot):
    answer = agent.api.get(f"/slots/{slot}")
    return answer.json()["state"] if answer.status == 200 else None


def uptime_s(agent):
    """The time by the clock of `logged`, which is that of an event's entry, written after the event."""
    return float(agent.run("cat", "/proc/uptime").split()[0])


def count(agent, name):
    return agent.api.get("/stats").json()["counters"][name]


def test_an_idle_slot_is_ended_and_the_reason_is_logged(impatient):
    agent = impatient
    before, began_s = count(agent, "culled_idle"), uptime_s(agent)
    claim = agent.claim()
    slot = claim["slot"]
    session = agent.router.get(f"/user/{slot}/nbagent/session").json()
    assert (session["state"], session["expires_at"]) == ("claimed", claim["expires_at"])
    at_s, text = culled(agent, slot)
    assert text.startswith("idle for ") and 4 <= int(text.split()[2]) < 60
    assert at_s - began_s >= 4
    agent.wait(lambda: state(agent, slot) is None, "the removal of the slot")
    assert count(agent, "culled_idle") == before + 1
    page = agent.router.get(f"/user/{slot}/lab", Accept="text/html")
    assert page.status == 404 and b"no longer running" in page.body
    session = agent.router.get(f"/user/{slot}/nbagent/session").json()
    assert (session["state"], session["reason"]) == ("ended", text)
    assert agent.router.get(f"/user/{slot[:-1]}/nbagent/session").status == 404


def test_a_warm_slot_is_never_idle(impatient):
    agent = impatient
    # One slot is claimed and culled, after which another has been warm for longer than `idle`.
    warm = agent.slots("warm")[0]["slot"]
    agent.configure('[cull]\nidle = "4s"\n[pool]\nwarm = 2\n')
    first = agent.claim()["slot"]
    agent.wait_warm(2)
    kept = {slot["slot"] for slot in agent.slots("warm")}
    culled(agent, agent.claim()["slot"])
    culled(agent, first)
    assert first == warm
    assert len(kept & {slot["slot"] for slot in agent.slots("warm")}) == 1


def test_a_long_cell_without_output_is_not_idle(impatient):
    agent = impatient
    notebook = agent.open()
    with notebook.kernel() as kernel:
        result = kernel.run("import time; time.sleep(15); time.monotonic()")
        assert result.status == "ok"
    at_s, text = culled(agent, notebook.slot)
    assert text.startswith("idle for ") and at_s - float(result.text) >= 4


def test_a_kernel_that_waits_for_a_person_is_idle_and_its_slot_is_ended(impatient):
    agent = impatient
    notebook = agent.open()
    with notebook.kernel() as kernel:
        kernel.send("import time; time.sleep(2); input('?')", stdin=True)
        kernel.receive("execute_input")
    assert culled(agent, notebook.slot)[1].startswith("idle for ")


def test_an_interrupt_frees_a_kernel_that_waits_for_a_person(agent):
    check_waits(agent, agent.open())


def test_a_process_that_computes_outside_of_any_kernel_is_not_idle(impatient):
    agent = impatient
    notebook = agent.open()
    code = "import time\\nend = time.monotonic() + 14\\nwhile time.monotonic() < end: pass"
    began_s = float(notebook.run(
        f'import subprocess, time; subprocess.Popen(["python3", "-ISc", "{code}"], start_new_session=True)\n'
        "time.monotonic()"
    ).text)
    agent.wait(lambda: not notebook.get("api/kernels"), "the end of the kernel")
    assert len(agent.processes(notebook.slot)) == 4  # init, the server, the fork server, and this process
    at_s, text = culled(agent, notebook.slot)
    # The slot became idle when the process ended.
    assert text.startswith("idle for ") and at_s - began_s > 14


def test_a_page_that_only_polls_is_not_active(impatient):
    agent = impatient
    notebook = agent.open()
    asked = 0
    deadline = time.monotonic() + 60
    while (found := logged(agent, notebook.slot, Event.SLOT_CULLED)) is None and time.monotonic() < deadline:
        for path in ("api/kernels", "api/contents"):
            answer = notebook.router.call("GET", notebook.base + path, headers=notebook.headers)
            asked += answer.status == 200
        time.sleep(0.5)
    assert found is not None and "idle for " in found[1]
    assert asked >= 8


def test_an_open_websocket_to_an_idle_kernel_is_not_active(impatient):
    agent = impatient
    notebook = agent.open()
    with notebook.kernel() as kernel:
        assert kernel.run("6 * 7").text == "42"
        _, text = culled(agent, notebook.slot)
        assert kernel.socket.connected
    assert text.startswith("idle for ")


def test_actions_of_a_person_are_activity(impatient):
    agent = impatient
    notebook = agent.open()
    claimed_s = logged(agent, notebook.slot, Event.SLOT_CLAIMED)[0]
    body = {"type": "file", "format": "text", "content": "saved"}
    saved_s = claimed_s
    # Saves a file at intervals, for twice the idle time.
    while saved_s - claimed_s < 9:
        saved_s = uptime_s(agent)
        path = f"{notebook.base}api/contents/note.txt"
        assert notebook.router.call("PUT", path, body, notebook.headers).status in (200, 201)
        time.sleep(1)
    at_s, _ = culled(agent, notebook.slot)
    assert at_s - saved_s >= 4


def test_refused_requests_keep_no_slot(impatient):
    """A stranger who knows a slot's URL sends requests without the token."""
    agent = impatient
    notebook = agent.open()
    refused = set()
    # A cookie and a header of its own satisfy the check of _xsrf; Jupyter redirects a path with a slash at its end.
    forged = {"Cookie": "_xsrf=1234", "X-XSRFToken": "1234"}
    deadline = time.monotonic() + 60
    while logged(agent, notebook.slot, Event.SLOT_CULLED) is None and time.monotonic() < deadline:
        for path, headers in (
            ("api/contents/note.txt", {}), ("no/such/page", notebook.headers), ("login", {}),
            ("api/contents/note.txt", {"Authorization": "token wrong"}), ("no/such/page/", forged),
        ):
            refused.add(notebook.router.call("POST", notebook.base + path, {"type": "file"}, headers).status)
        time.sleep(0.5)
    assert "idle for " in culled(agent, notebook.slot)[1]
    assert {302, 403, 404} <= refused and not {status for status in refused if status < 300}


def test_age_counts_from_the_claim_and_not_from_the_start(agent):
    before = count(agent, "culled_age")
    agent.wait(lambda: agent.slots("warm")[0]["age_s"] > 5, "a warm slot older than the claim will be")
    warm, began_s = {slot["slot"] for slot in agent.slots("warm")}, uptime_s(agent)
    slot = agent.claim(ttl=4)["slot"]
    assert slot in warm
    at_s, text = culled(agent, slot)
    assert text == "maximum age reached"
    assert at_s - began_s >= 4
    assert count(agent, "culled_age") == before + 1


def test_a_longer_and_a_shorter_life(agent):
    longer = agent.claim(ttl=10)["slot"]
    assert agent.api.patch(f"/slots/{longer}", {"ttl": "1h"}).status == 200
    shorter = agent.claim(ttl=10)["slot"]
    assert culled(agent, shorter)[1] == "maximum age reached"
    assert state(agent, longer) == "claimed"
    # A shorter life ends earlier.
    assert agent.api.patch(f"/slots/{longer}", {"ttl": 1}).status == 200
    assert culled(agent, longer)[1] == "maximum age reached"


def test_a_slot_that_dies_is_noticed_at_once_and_replaced(agent):
    agent.expect("ended unexpectedly")
    # The rules are not checked for an hour; the end is noticed by the pidfd.
    agent.configure('[cull]\ninterval = "1h"\n')
    notebook = agent.open()
    agent.wait_warm()
    warm = agent.slots("warm")[0]["slot"]
    for slot in (notebook.slot, warm):
        known = agent.run("python3", "-c", "import json, sys; print(json.load(sys.stdin)['pid'])",
                          input=agent.run("cat", f"/run/nbagent/slots/{slot}/slot.json"))
        agent.run("kill", "-KILL", known.strip())
    for slot in (notebook.slot, warm):
        _, text = agent.wait(lambda slot=slot: logged(agent, slot, Event.SLOT_DIED), f"the death of {slot}")
        assert "its processes ended" in text
        agent.wait(lambda slot=slot: state(agent, slot) is None, f"the removal of {slot}")
    assert agent.router.get(f"/user/{notebook.slot}/lab").status == 404
    agent.wait_warm()
    assert agent.open().run("6 * 7").text == "42"
