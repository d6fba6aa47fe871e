# SPDX-License-Identifier: BSD-3-Clause
"""The pool: slots are warm before a claim, and an image that cannot start does not affect others."""

import io
import json
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import machines_when_all
from nbagent.core.events import Event

FAST = "[pool]\nwarm = 1\nbackoff = \"0.2s\"\nbackoff_max = \"5s\"\nclaim_timeout = \"2s\"\n"
LAST_LINE = "cannot find the flux capacitor"
# The journal's lines of a failed start, and of the pause after it.
PROVOKED = (
    r"slot \S+ did not start: the slot's program ended", r"pool broken pauses ",
    r"^nbagent-\S+\.scope: Failed with result",
)
STORE = "/var/lib/nbagent/images"


def tar_of(files):
    """A root filesystem as a tar archive; `files` are names with their content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o755
            tar.addfile(info, io.BytesIO(content))
        for name in ("tmp", "proc", "dev", "run", "home/jovyan"):
            info = tarfile.TarInfo(name)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
    return buffer.getvalue()


def add_image(agent, name, archive):
    """Puts an archive into the host's store under a name, which notifies the agent."""
    agent.host.run(["tee", f"/root/{name}.tar"], input=archive, text=False)
    added = json.loads(agent.run("nbagent", "image", "add", "--json", "--name", name, f"/root/{name}.tar"))
    agent.run("rm", f"/root/{name}.tar")
    return added


@pytest.fixture
def broken(agent):
    """An image whose program prints a line and fails."""
    libraries = [line.split()[-2] for line in agent.run("ldd", "/bin/dash").splitlines() if "/" in line]
    names = ["/bin/dash", *libraries]
    files = {name.lstrip("/"): agent.host.run(["cat", name], text=False).stdout for name in names}
    files["usr/bin/python3"] = f"#!/bin/dash\necho {LAST_LINE}\nexit 3\n".encode()
    files["etc/passwd"] = b"jovyan:x:1000:1000::/home/jovyan:/bin/dash\n"
    files["etc/nbagent-image.toml"] = (
        b'python = "/usr/bin/python3"\nhome = "/home/jovyan"\nuser = "jovyan"\nlaunch = "exec"\n'
    )
    for pattern in PROVOKED:
        agent.expect(pattern)
    agent.configure(FAST)
    agent.wait_warm()
    yield add_image(agent, "broken", tar_of(files))
    agent.host.run(["nbagent", "image", "remove", "broken"], check=False)
    agent.wait(lambda: "broken" not in agent.api.get("/stats").json()["pools"]
               or not any(slot["image"] == "broken" for slot in agent.slots()), "the removal of the broken slots")


def pool(agent, image="minimal"):
    return agent.api.get("/stats").json()["pools"].get(image, {"failures": 0, "wanted": 0})


def warm_slots(agent):
    return {slot["slot"] for slot in agent.slots("warm")}


def test_a_slot_is_warm_before_a_claim(agent):
    warm = agent.slots("warm")
    assert len(warm) == 1
    assert warm[0]["claimed_at"] is None
    assert agent.claim()["slot"] == warm[0]["slot"]


def test_a_claim_takes_a_warm_slot_and_another_is_started(agent):
    before = warm_slots(agent)
    claimed = agent.claim()["slot"]
    assert claimed in before
    after = agent.wait(lambda: agent.slots("warm"), "the next warm slot")
    assert claimed not in {slot["slot"] for slot in after}


def test_the_pool_follows_its_setting(agent):
    for wanted in (3, 1, 0):
        agent.configure(f"[pool]\nwarm = {wanted}\n")
        agent.wait(lambda wanted=wanted: len(agent.slots()) == len(agent.slots("warm")) == wanted,
                   f"{wanted} warm slots")
        assert pool(agent)["wanted"] == wanted


def test_one_image_may_have_a_pool_of_another_size(agent):
    agent.configure("[pool]\nwarm = 0\n[images.minimal]\nwarm = 2\n")
    agent.wait(lambda: len(agent.slots("warm")) == 2, "two warm slots")


def test_a_claimed_slot_outlives_every_change_of_the_pool(agent):
    notebook = agent.open()
    agent.configure("[pool]\nwarm = 0\n")
    agent.wait(lambda: not agent.slots("warm"), "an empty pool")
    assert notebook.run("40 + 2").text == "42"


def test_the_pool_never_goes_above_capacity(agent):
    agent.configure("[slots]\ncapacity = 2\n[pool]\nwarm = 4\nstarts = 4\n")
    agent.wait(lambda: len(agent.slots("warm")) == 2, "two warm slots")
    one = agent.claim()["slot"]
    assert {slot["slot"] for slot in agent.slots()} - {one} == warm_slots(agent)
    assert len(agent.slots()) == 2
    agent.claim()
    assert len(agent.slots()) == 2
    assert agent.api.post("/claim").status == 503
    agent.release(one)
    agent.wait(lambda: len(agent.slots("warm")) == 1, "a warm slot in the place of the released one")
    assert len(agent.slots()) == 2


def test_concurrent_claims_on_an_empty_pool_get_a_slot_or_503(agent):
    # A claim that waited for a slot beyond capacity would outlast the test.
    agent.configure('[slots]\ncapacity = 3\n[pool]\nwarm = 0\nclaim_timeout = "10min"\n')
    agent.wait(lambda: not agent.slots(), "an empty pool")
    with ThreadPoolExecutor(5) as callers:
        answers = [one.result() for one in [callers.submit(agent.api.post, "/claim") for _ in range(5)]]
    assert sorted(answer.status for answer in answers) == [200, 200, 200, 503, 503]
    assert len({answer.json()["slot"] for answer in answers if answer.status == 200}) == 3
    refused = [answer.json() for answer in answers if answer.status == 503]
    assert all(problem["type"] == "urn:nbagent:problem:full" for problem in refused), refused


def test_no_slot_is_started_when_the_hosts_memory_would_run_short(agent):
    available = agent.api.get("/stats").json()["memory_available_bytes"]
    agent.configure(f"[host]\nmemory_reserve = {available + (4 << 30)}\n[slots]\ncapacity = 9\n[pool]\nwarm = 3\n")
    agent.claim()
    assert not agent.slots("starting") and not agent.slots("warm")
    refused = agent.api.post("/claim")
    assert refused.status == 503 and refused.json()["type"] == "urn:nbagent:problem:full"
    agent.configure("")
    agent.wait_warm()


@machines_when_all
def test_a_slot_that_grows_on_a_short_host_is_held(any_agent):
    """The kernel that grows is killed by its own slot's limit; a neighbour keeps what it has."""
    agent = any_agent
    agent.expect("ran out of memory")

    def logged(slot, event):
        return agent.journal(f"NBAGENT_SLOT={slot}", f"MESSAGE_ID={event.value.message_id}")

    rests = agent.open()
    agent.wait_warm()  # on a slow machine the claim could time out
    grows = agent.open()
    with rests.kernel() as resting, grows.kernel() as growing:
        assert resting.run("kept = bytes(range(256)) * 1_000_000", timeout=180).status == "ok"
        available = agent.api.get("/stats").json()["memory_available_bytes"]
        # More than the host has, so that it is short until the next reload.
        agent.configure(f"[host]\nmemory_reserve = {available + (8 << 30)}\n[pool]\nwarm = 0\n")
        growing.send("import time\ntaken = []\nwhile True:\n    taken.append(b'x' * 10_000_000)\n    time.sleep(0.2)")
        held = agent.wait(lambda: logged(grows.slot, Event.SLOT_HELD), "the hold of the slot that grows")
        assert "because the host has only" in held[0]["MESSAGE"]
        killed = agent.wait(
            lambda: [slot for slot in agent.slots() if slot["slot"] == grows.slot and slot["oom_kills"]],
            "the end of the kernel that grows",
        )
        assert killed[0]["memory_bytes"] < killed[0]["limits"]["memory_bytes"] / 2
        assert resting.run("len(kept)", timeout=180).text == "256000000" and not logged(rests.slot, Event.SLOT_HELD)
        agent.configure("")
        agent.wait(lambda: logged(grows.slot, Event.SLOT_FREED), "the slot's own limit")


def test_a_warm_slot_that_waited_too_long_is_replaced_by_a_fresh_one(agent):
    before = warm_slots(agent)
    agent.configure('[pool]\nwarm = 1\nmax_age = "4s"\n')
    assert agent.wait(lambda: warm_slots(agent) - before, "a fresh warm slot")
    agent.wait(lambda: not before & {slot["slot"] for slot in agent.slots()}, "the removal of the old slot")
    agent.configure("")


def life(agent, slot):
    """RuntimeMaxSec= of a slot's scope."""
    return agent.run("systemctl", "show", "-P", "RuntimeMaxUSec", f"nbagent-{slot}.scope").strip()


def test_a_slot_made_for_short_lives_is_not_claimed_for_a_long_one(agent):
    agent.configure('[slots]\nttl = "20s"\nttl_max = "20s"\n[pool]\nwarm = 1\nmax_age = "10min"\n')

    def short_lived():
        """A warm slot of the present settings, after the slots of the former settings were replaced."""
        for slot in warm_slots(agent):
            if life(agent, slot) == "10min 20s":
                return slot
            agent.release(slot)
        return None

    short = agent.wait(short_lived, "a slot made for a short life")
    # No capacity for another slot, so that the claim takes this one.
    agent.configure(f"[slots]\ncapacity = {len(agent.slots())}\n[pool]\nwarm = 1\n")
    claim = agent.claim(ttl="12h")
    assert claim["slot"] != short
    assert life(agent, claim["slot"]) == "1d 6h"


def test_a_failed_start_is_ended_counted_and_logged_with_its_last_line(agent, broken):
    agent.wait(lambda: pool(agent, "broken")["failures"] >= 2, "two failures")
    assert agent.api.get("/stats").json()["counters"]["start_failures"] >= 2
    warnings = agent.journal("-t", "nbagent", "-p", "warning")
    failed = [entry for entry in warnings if re.search("did not start: the slot's program ended", entry["MESSAGE"])]
    slot = failed[-1]["NBAGENT_SLOT"]
    output = agent.run("journalctl", "--no-pager", "-o", "cat", "-u", f"nbagent-{slot}.scope")
    assert LAST_LINE in output
    assert "exited with status 3" in output
    agent.wait(lambda: agent.api.get(f"/slots/{slot}").status == 404, "the removal of the failed slot")
    assert "No such file" in agent.run("sh", "-c", f"ls /run/nbagent/slots/{slot} 2>&1; true")


def test_pauses_between_failing_starts_grow_up_to_their_bound(agent, broken):
    def pauses():
        entries = [e for e in agent.journal("-t", "nbagent", "NBAGENT_IMAGE=broken") if "NBAGENT_WAIT_S" in e]
        # One for each consecutive failure; the last series is this test's.
        start = max((i for i, e in enumerate(entries) if e["NBAGENT_FAILURES"] == "1"), default=0)
        return [float(entry["NBAGENT_WAIT_S"]) for entry in entries[start:]]

    agent.wait(lambda: len(pauses()) >= 6, "six failed starts", 90)
    assert pauses()[:6] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0]


def test_an_image_that_cannot_start_does_not_affect_others(agent, broken):
    agent.wait(lambda: pool(agent, "broken")["failures"] >= 1, "a failure")
    notebook = agent.open()
    assert notebook.run("6 * 7").text == "42"
    assert agent.api.get("/readyz").status == 200
    refused = agent.api.post("/claim", {"image": "broken"})
    assert refused.status == 503
    assert refused.json()["type"] == "urn:nbagent:problem:start-failed"
    assert "the slot's program ended" in refused.json()["detail"]
    assert agent.open().run("1").text == "1"


def test_removing_an_image_ends_the_tries_to_start_it(agent, broken):
    agent.wait(lambda: pool(agent, "broken")["failures"] >= 1, "a failure")
    agent.run("nbagent", "image", "remove", "broken")
    agent.wait(lambda: not any(slot["image"] == "broken" for slot in agent.slots()), "the removal of its slots")
    starts = agent.api.get("/stats").json()["counters"]["starts"]
    assert "broken" not in {image["name"] for image in agent.api.get("/images").json()}
    assert agent.api.post("/claim", {"image": "broken"}).json()["field"] == "image"
    agent.wait(lambda: broken["digest"] not in agent.run("ls", STORE), "the removal of its tree")
    # The pools of other images continue; of all starts from now on at most two are of this image.
    agent.claim()
    agent.wait(lambda: agent.slots("warm"), "the next warm slot")
    assert {slot["image"] for slot in agent.slots()} == {"minimal"}
    assert agent.api.get("/stats").json()["counters"]["starts"] <= starts + 2
