# SPDX-License-Identifier: BSD-3-Clause
"""Slots by fork: what starts them, what they share, and what happens when a zygote fails or is replaced."""

import json
import re

import forked
import pytest

# Random values that must differ between two slots of one zygote.
STATES = """
import json, os, random, secrets, ssl, tempfile, uuid
print(json.dumps([random.random(), random.Random().random(), secrets.token_hex(16), os.urandom(16).hex(),
                  uuid.uuid4().hex, ssl.RAND_bytes(16).hex(), next(tempfile._get_candidate_names())]))
"""

CONTROL = "/run/systemd/system.control"


def journal_of(agent, **fields):
    return agent.journal("-t", "nbagent", *(f"NBAGENT_{name.upper()}={value}" for name, value in fields.items()))


def zygote(agent, image="minimal"):
    """The unit of the image's newest ready zygote, or None."""
    ready = [e["NBAGENT_ZYGOTE"] for e in journal_of(agent, image=image) if "is ready" in e["MESSAGE"]]
    return f"nbagent-zygote@{ready[-1]}.service" if ready else None


def zygotes(agent):
    """The units of all zygotes of the image minimal, ready or not."""
    listed = agent.run("systemctl", "list-units", "--plain", "--no-legend", "nbagent-zygote@minimal:*").splitlines()
    return {line.split()[0] for line in listed}


def cpu_weight(agent, unit):
    """A unit's CPU weight in its cgroup. Under cgroup v1, cpu.shares of 1024 is a weight of 100."""
    shares = agent.run("cat", f"/sys/fs/cgroup/cpu/nbagent.slice/{unit}/cpu.shares", check=False)
    if shares:
        return round(int(shares) / 10.24)
    return int(agent.run("cat", f"/sys/fs/cgroup/nbagent.slice/{unit}/cpu.weight"))


def is_forked(agent, slot):
    """Whether the slot's init was forked by the zygote service."""
    first = agent.processes(slot)[0]
    return "nbagent.runtime.zygote_service" in agent.run("cat", f"/proc/{first}/cmdline")


def server_of(agent, slot):
    """The pid of the slot's notebook server: the one process whose parent, the fork server, is in the slot too."""
    pids = agent.processes(slot)
    parents = {pid: int(agent.run("ps", "-o", "ppid=", "-p", str(pid))) for pid in pids}
    server, = (pid for pid, parent in parents.items() if parent in pids)
    return server


def next_slot(agent, seen):
    """Waits for a warm slot whose id is not in `seen`; returns its id."""
    def found():
        return next((slot["slot"] for slot in agent.slots("warm") if slot["slot"] not in seen), None)

    return agent.wait(found, "a new slot")


def wait_for_complete_pool(agent):
    """Waits for a complete zygote, warm slots of it only, and no start under way.

    A slot whose start began earlier, perhaps by exec, could otherwise become warm after the slot that a test waits for,
    and take its place in the pool.
    """
    def is_complete():
        image = next(image for image in agent.api.get("/images").json() if image["name"] == "minimal")
        unclaimed = [slot for slot in agent.slots() if slot["state"] in ("starting", "warm")]
        are_complete = all(slot["state"] == "warm" and not slot["launch_reason"] for slot in unclaimed)
        return image["launch_now"] == "fork" and not image["launch_reason"] and unclaimed and are_complete

    agent.wait(is_complete, "warm slots of a complete zygote")


@pytest.fixture
def of_a_zygote(agent):
    """The agent with a complete pool, also after a test that has killed a zygote."""
    wait_for_complete_pool(agent)
    return agent


def test_slots_of_an_ordinary_image_are_forked(of_a_zygote):
    agent = of_a_zygote
    claims = [agent.claim() for _ in range(3)]
    assert all(is_forked(agent, claim["slot"]) for claim in claims)
    image, = [i for i in agent.api.get("/images").json() if i["name"] == "minimal"]
    assert image["launch"] == "fork"


def test_a_forked_slot_has_done_nothing_that_its_zygote_could_have_done(of_a_zygote):
    """A slot's server has read a dozen times when it is warm. A callback of an extension that reads the metadata of all
    packages in each slot takes 0.2 s of a processor: a burst then has 8 slots a second and not 50.
    """
    agent = of_a_zygote
    warm = next(slot["slot"] for slot in agent.slots("warm") if is_forked(agent, slot["slot"]))
    io = agent.run("cat", *(f"/proc/{pid}/io" for pid in agent.processes(warm)))
    reads = [int(line.split()[1]) for line in io.splitlines() if line.startswith("syscr:")]
    assert len(reads) == 3 and max(reads) < 100, reads


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
    # A browser would not send the cookie to the other slot. Under the other's cookie name, its signature is refused.
    assert name.endswith(one.slot)
    assert status(other.base, Cookie=f"{name.replace(one.slot, other.slot)}={value}") == 403


def test_a_killed_zygote_is_replaced_and_slots_go_on(of_a_zygote):
    agent = of_a_zygote
    agent.expect(r"zygote minimal:\S+ failed")
    agent.expect(r"^nbagent-zygote@minimal:\S+: (Failed|Main process exited)")
    notebook = agent.open()
    with notebook.kernel() as kernel:
        assert kernel.run("x = 6").status == "ok"
        for processes in ("main", "all"):
            before = zygote(agent)
            agent.run("systemctl", "kill", "--kill-whom", processes, "-s", "KILL", before)
            assert agent.claim()["slot"]
            agent.wait(lambda: zygote(agent) != before, "another zygote")  # noqa: B023
        assert kernel.run("x * 7").text == "42"
    wait_for_complete_pool(agent)
    seen = {slot["slot"] for slot in agent.slots()}
    agent.claim()
    assert is_forked(agent, next_slot(agent, seen))


def test_a_start_whose_zygote_is_killed_meanwhile_is_repeated_without_a_failure(of_a_zygote):
    """The units service stands still, so that the start waits for its scope until the forked processes have ended."""
    agent = of_a_zygote
    agent.expect(r"zygote minimal:\S+ failed")
    agent.expect(r"^nbagent-zygote@minimal:\S+: (Failed|Main process exited)")
    agent.expect(r"Failed to start nbagent-\S+\.scope|nbagent-\S+\.scope: (Couldn't move|Failed)")
    # On a slow machine the service stands still for so long that this is noticed.
    agent.expect(r"systemd fails, so this host offers fewer slots|^nbagent-units\.service: ")
    before, seen = zygote(agent), {slot["slot"] for slot in agent.slots()}

    def failures():
        return re.search(r"^nbagent_start_failures_total (\d+)", agent.api.get("/metrics").body.decode(), re.M)[1]

    def tasks():
        return int(agent.run("systemctl", "show", "-P", "TasksCurrent", before))

    failed, at_rest = failures(), tasks()
    agent.run("systemctl", "kill", "-s", "STOP", "nbagent-units")
    try:
        agent.claim()
        agent.wait(lambda: tasks() > at_rest, "a process that is forked and in no scope")
        agent.run("systemctl", "kill", "--kill-whom", "all", "-s", "KILL", before)
        agent.wait(lambda: agent.run("systemctl", "is-active", before, check=False).strip() != "active", "its end")
    finally:
        agent.run("systemctl", "kill", "-s", "CONT", "nbagent-units")
    assert next_slot(agent, seen)
    assert failures() == failed


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
    agent.wait(lambda: cpu_weight(agent, second) == 1, "its weight")
    assert cpu_weight(agent, first) == 100
    assert zygote(agent) == first
    # Without a ready zygote the new one gets its full weight.
    agent.run("systemctl", "kill", "-s", "KILL", first)
    agent.wait(lambda: cpu_weight(agent, second) == 100, "its weight")
    agent.wait(lambda: zygote(agent) == second, "the second")
    # systemd stores properties set at run time in a drop-in directory.
    assert f"{second}.d" in agent.run("ls", CONTROL)
    agent.run("systemctl", "stop", second)
    assert second not in agent.run("ls", CONTROL)
    agent.wait(lambda: zygote(agent) != second, "another")


def test_limits_of_a_zygote_that_was_not_started_are_removed_by_the_next_supervisor(of_a_zygote):
    agent, unit = of_a_zygote, "nbagent-zygote@minimal:0a0b0c.service"
    agent.run("systemctl", "set-property", "--runtime", unit, "CPUWeight=7")
    assert f"{unit}.d" in agent.run("ls", CONTROL)
    agent.run("systemctl", "restart", "nbagent.service")
    agent.wait(lambda: f"{unit}.d" not in agent.run("ls", CONTROL), "the removal of its limits", 30)


def test_memory_is_charged_to_the_slot_that_touches_it(of_a_zygote):
    """Its cgroup has all private pages: 2.6 MiB of a server after a request, 1.7 of init, 1 of the fork server."""
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


def test_a_slot_whose_fork_server_is_killed_goes_on_and_ends_with_its_program(of_a_zygote):
    agent = of_a_zygote
    agent.expect(r"slot \S+ ended unexpectedly")
    notebook = agent.open()
    server = server_of(agent, notebook.slot)
    fork_server = agent.run("ps", "-o", "ppid=", "-p", str(server)).strip()
    agent.run("kill", "-KILL", fork_server)
    # The kernel is started by exec.
    assert notebook.run("6 * 7").text == "42"
    assert agent.run("ps", "-o", "ppid=", "-p", str(server)).strip() == str(agent.processes(notebook.slot)[0])
    agent.run("kill", "-TERM", str(server))
    agent.wait(lambda: agent.api.get(f"/slots/{notebook.slot}").status == 404, "the slot to be gone")
    output = agent.run("journalctl", "--no-pager", "-o", "cat", "-u", f"nbagent-{notebook.slot}.scope")
    assert "the slot's program exited with status 0" in output


def test_output_of_a_slot_is_in_its_own_journal(of_a_zygote):
    agent = of_a_zygote
    with agent.open().kernel() as kernel:
        assert kernel.run("import os; os.write(2, b'kernel output\\n')").status == "ok"
    notebook = agent.open()
    notebook.router.call("GET", f"{notebook.base}api/contents/missing.txt", headers=notebook.headers)
    entries = agent.wait(
        lambda: [e for e in agent.journal(f"_SYSTEMD_UNIT=nbagent-{notebook.slot}.scope") if "missing" in e["MESSAGE"]],
        "the server's log entry about the missing file",
    )
    assert entries[0]["SYSLOG_IDENTIFIER"] == notebook.slot and notebook.token not in entries[0]["MESSAGE"]


@pytest.fixture
def private_image(agent, packages, tmp_path):
    """The image minimal with share_memory = false."""
    added = forked.add_image(agent, packages, tmp_path, "private", "share_memory = false\n")
    assert added["share_memory"] is False
    yield "private"
    agent.run("nbagent", "image", "remove", "private")


def test_an_image_without_share_memory_forks_slots_with_ordinary_memory(agent, private_image):
    agent.configure("[images.private]\nwarm = 1\n")
    agent.wait(lambda: zygote(agent, private_image), "the zygote of the image")
    agent.wait(lambda: [slot for slot in agent.slots("warm") if slot["image"] == private_image], "a warm slot")
    notebook = agent.open(image=private_image)
    assert is_forked(agent, notebook.slot)
    assert notebook.run("'memfd:nbagent-zygote' in open('/proc/self/maps').read()").text == "False"
