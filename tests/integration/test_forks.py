"""Slots by fork: who makes them, what they share and what not, and what happens when the zygote does not."""

import json

import pytest

# What a slot may not have in common with another of the same zygote; each line is a random one.
STATES = """
import json, os, random, secrets, ssl, tempfile, uuid
print(json.dumps([random.random(), random.Random().random(), secrets.token_hex(16), os.urandom(16).hex(),
                  uuid.uuid4().hex, ssl.RAND_bytes(16).hex(), next(tempfile._get_candidate_names())]))
"""

CONTROL = "/run/systemd/system.control"


def journal_of(agent, **fields):
    return agent.journal("-t", "nbagent", *(f"NBAGENT_{name.upper()}={value}" for name, value in fields.items()))


def zygote(agent, image="minimal"):
    """The unit of an image's zygote that is ready, newest last, or None."""
    ready = [e["NBAGENT_ZYGOTE"] for e in journal_of(agent, image=image) if "is ready" in e["MESSAGE"]]
    return f"nbagent-zygote@{ready[-1]}.service" if ready else None


def zygotes(agent):
    """The units of all zygotes, ready or not."""
    listed = agent.run("systemctl", "list-units", "--plain", "--no-legend", "nbagent-zygote@minimal:*").splitlines()
    return {line.split()[0] for line in listed}


def cpu_weight(agent, unit):
    """What the kernel has as a unit's weight; of version 1's shares 1024 are a weight of 100."""
    shares = agent.run("cat", f"/sys/fs/cgroup/cpu/nbagent.slice/{unit}/cpu.shares", check=False)
    if shares:
        return round(int(shares) / 10.24)
    return int(agent.run("cat", f"/sys/fs/cgroup/nbagent.slice/{unit}/cpu.weight"))


def is_forked(agent, slot):
    """Whether the slot's init came from a keeper."""
    first = agent.processes(slot)[0]
    return "nbagent.runtime.zygote_service" in agent.run("cat", f"/proc/{first}/cmdline")


def server_of(agent, slot):
    """The process of a slot that serves: the one whose parent is the seed, of the three that there are at first."""
    pids = agent.processes(slot)
    parents = {pid: int(agent.run("ps", "-o", "ppid=", "-p", str(pid))) for pid in pids}
    server, = (pid for pid, parent in parents.items() if parent in pids)
    return server


def next_slot(agent, seen):
    """The id of a slot that is warm and was not before."""
    def found():
        return next((slot["slot"] for slot in agent.slots("warm") if slot["slot"] not in seen), None)

    return agent.wait(found, "a new slot")


@pytest.fixture
def of_a_zygote(agent):
    """The agent, with a zygote that forks and warm slots of it."""
    agent.wait(lambda: zygote(agent), "a zygote")
    for slot in agent.slots("warm"):
        if not is_forked(agent, slot["slot"]):
            agent.release(slot["slot"])
    agent.wait_warm()
    return agent


def test_slots_of_an_ordinary_image_are_forked(of_a_zygote):
    agent = of_a_zygote
    claims = [agent.claim() for _ in range(3)]
    assert all(is_forked(agent, claim["slot"]) for claim in claims)
    image, = [i for i in agent.api.get("/images").json() if i["name"] == "minimal"]
    assert image["launch"] == "fork"


def test_nothing_random_or_secret_is_shared(of_a_zygote):
    one, other = of_a_zygote.open(), of_a_zygote.open()
    assert one.token != other.token
    states = [json.loads(notebook.run(STATES).stream) for notebook in (one, other, one)]
    for of_one, of_other in zip(states[0] + states[2], states[1] + states[1], strict=True):
        assert of_one != of_other


def test_a_token_or_login_of_one_slot_opens_no_other(of_a_zygote):
    one, other = of_a_zygote.open(), of_a_zygote.open()
    router = one.router

    def status(base, **headers):
        return router.call("GET", f"{base}api/contents", headers=headers).status

    assert status(other.base, Authorization=f"token {other.token}") == 200
    assert status(other.base, Authorization=f"token {one.token}") == 403
    login = of_a_zygote.run("curl", "-si", f"http://127.0.0.1:{router.port}{one.base}lab?token={one.token}")
    cookies = [line.split(": ", 1)[1].split(";")[0] for line in login.splitlines() if line.startswith("Set-Cookie: ")]
    name, value = next(cookie.split("=", 1) for cookie in cookies if cookie.startswith("nbagent-"))
    assert status(one.base, Cookie=f"{name}={value}") == 200
    # The browser would not send it there; under the name that the other looks for, the signature is what counts.
    assert name.endswith(one.slot)
    assert status(other.base, Cookie=f"{name.replace(one.slot, other.slot)}={value}") == 403


def test_a_zygote_may_be_killed_and_nobody_notices(of_a_zygote):
    agent = of_a_zygote
    agent.expect(r"zygote minimal:\S+ failed")
    agent.expect(r"^nbagent-zygote@minimal:\S+: (Failed|Main process exited)")
    notebook = agent.open()
    with notebook.kernel() as kernel:
        assert kernel.run("x = 6").status == "ok"
        for who in ("main", "all"):
            before = zygote(agent)
            agent.run("systemctl", "kill", "--kill-whom", who, "-s", "KILL", before)
            assert agent.claim()["slot"]
            agent.wait(lambda: zygote(agent) != before, "another zygote")  # noqa: B023
        assert kernel.run("x * 7").text == "42"
    seen = {slot["slot"] for slot in agent.slots()}
    agent.claim()
    assert is_forked(agent, next_slot(agent, seen))


def test_until_a_zygote_that_hangs_is_replaced_slots_are_execd(of_a_zygote):
    agent = of_a_zygote
    agent.expect(r"zygote minimal:\S+ failed; .*did not respond")
    agent.expect(r"^nbagent-zygote@minimal:\S+: (Failed|Main process exited)")
    before, seen = zygote(agent), {slot["slot"] for slot in agent.slots()}
    agent.run("systemctl", "kill", "-s", "STOP", before)
    agent.run("systemctl", "kill", "--kill-whom", "main", "-s", "CONT", before)
    agent.claim()
    assert not is_forked(agent, next_slot(agent, seen))
    agent.wait(lambda: zygote(agent) != before, "another zygote")


def test_a_zygote_is_replaced_after_some_slots_and_none_ends_with_it(of_a_zygote):
    agent = of_a_zygote
    before = zygote(agent)
    agent.configure("[pool]\nwarm = 1\nzygote_slots = 2\n")
    with agent.open().kernel() as kernel:
        agent.claim()
        agent.claim()
        agent.wait(lambda: zygote(agent) != before, "the next zygote")
        agent.wait(lambda: agent.run("systemctl", "is-active", before, check=False).strip() != "active", "its end")
        assert kernel.run("6 * 7").text == "42"
    assert not [e for e in journal_of(agent) if "start by exec" in e["MESSAGE"] and e["NBAGENT_ZYGOTE"] in before]


def test_a_zygote_that_forks_nothing_is_replaced_when_it_is_old(of_a_zygote):
    agent = of_a_zygote
    before = zygote(agent)
    agent.configure('[pool]\nwarm = 1\nzygote_age = "10s"\n')
    agent.wait(lambda: zygote(agent) != before, "the next zygote")


def test_a_zygote_in_the_making_gives_way_while_another_forks(of_a_zygote):
    agent = of_a_zygote
    agent.expect(r"zygote minimal:\S+ failed")
    agent.expect(r"^nbagent-zygote@minimal:\S+: (Failed|Main process exited)")
    first = zygote(agent)
    assert cpu_weight(agent, first) == 100
    agent.configure("[pool]\nwarm = 1\nzygote_slots = 1\n")
    agent.claim()
    second = agent.wait(lambda: next(iter(zygotes(agent) - {first}), None), "one in the making")
    agent.wait(lambda: cpu_weight(agent, second) == 1, "its weight", 5)
    assert cpu_weight(agent, first) == 100
    assert zygote(agent) == first
    # Now there is none that forks.
    agent.run("systemctl", "kill", "-s", "KILL", first)
    agent.wait(lambda: cpu_weight(agent, second) == 100, "its weight", 5)
    agent.wait(lambda: zygote(agent) == second, "the second")
    # systemd keeps what was set of a unit in a file.
    assert f"{second}.d" in agent.run("ls", CONTROL)
    agent.run("systemctl", "stop", second)
    assert second not in agent.run("ls", CONTROL)
    agent.wait(lambda: zygote(agent) != second, "another")


def test_memory_is_charged_to_the_slot_that_touches_it(of_a_zygote):
    """The private pages of a server that has answered, 2.6 MiB, 1.7 of its init, 1 of its seed: all in its cgroup."""
    notebook = of_a_zygote.open()
    headers = {"Authorization": f"token {notebook.token}"}
    assert notebook.router.call("GET", f"{notebook.base}api", headers=headers).status == 200
    used = of_a_zygote.api.get(f"/slots/{notebook.slot}").json()["memory_bytes"]
    assert 4 << 20 < used < 16 << 20


def test_a_slot_ends_with_its_program_and_says_how(of_a_zygote):
    agent = of_a_zygote
    agent.expect(r"slot \S+ ended unexpectedly")
    slot = agent.claim()["slot"]
    agent.run("kill", "-KILL", str(server_of(agent, slot)))
    agent.wait(lambda: agent.api.get(f"/slots/{slot}").status == 404, "the slot to be gone")
    output = agent.run("journalctl", "--no-pager", "-o", "cat", "-u", f"nbagent-{slot}.scope")
    assert "the slot's program was killed by SIGKILL" in output


def test_a_slot_whose_seed_is_killed_goes_on_and_still_ends_with_its_program(of_a_zygote):
    agent = of_a_zygote
    agent.expect(r"slot \S+ ended unexpectedly")
    notebook = agent.open()
    server = server_of(agent, notebook.slot)
    seed = agent.run("ps", "-o", "ppid=", "-p", str(server)).strip()
    agent.run("kill", "-KILL", seed)
    # Started the ordinary way: by exec.
    assert notebook.run("6 * 7").text == "42"
    assert agent.run("ps", "-o", "ppid=", "-p", str(server)).strip() == str(agent.processes(notebook.slot)[0])
    agent.run("kill", "-TERM", str(server))
    agent.wait(lambda: agent.api.get(f"/slots/{notebook.slot}").status == 404, "the slot to be gone")
    output = agent.run("journalctl", "--no-pager", "-o", "cat", "-u", f"nbagent-{notebook.slot}.scope")
    assert "the slot's program exited with status 0" in output


def test_what_a_slot_prints_is_in_its_own_journal(of_a_zygote):
    agent = of_a_zygote
    with agent.open().kernel() as kernel:
        assert kernel.run("import os; os.write(2, b'a word in passing\\n')").status == "ok"
    notebook = agent.open()
    notebook.router.call("GET", f"{notebook.base}api/contents/missing.txt", headers=notebook.headers)
    said = agent.wait(
        lambda: [e for e in agent.journal(f"_SYSTEMD_UNIT=nbagent-{notebook.slot}.scope") if "missing" in e["MESSAGE"]],
        "the server's word about a file that is missing",
    )
    assert said[0]["SYSLOG_IDENTIFIER"] == notebook.slot and notebook.token not in said[0]["MESSAGE"]
