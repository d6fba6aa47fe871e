"""Limits that bite: what the kernel and PID 1 do to a slot that wants more, on every kind of host."""

import time

import pytest

from nbagent.core.events import Event

pytestmark = pytest.mark.cgroup2

# One busy process for every processor of the host. They end with the slot, not with the cell.
BURN = """
import os, subprocess
for _ in range(os.cpu_count()):
    subprocess.Popen(["python3", "-ISc", "while True: pass"], start_new_session=True)
"""
BOMB = """
import subprocess
code = '''
import os, time
made = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(3600)
            os._exit(0)
        made += 1
except OSError as error:
    print(made, error.errno, flush=True)
    time.sleep(3600)
'''
bomb = subprocess.Popen(["python3", "-ISc", code], stdout=subprocess.PIPE, text=True)
print(bomb.stdout.readline())
"""
EAGAIN = 11


ZRAM = "modprobe zram; echo 1G >/sys/block/zram0/disksize; mkswap -q /dev/zram0; swapon /dev/zram0"
DISK = "fallocate -l 64M /swapfile; chmod 600 /swapfile; mkswap -q /swapfile; swapon /swapfile"


@pytest.fixture
def swapping(any_agent):
    """The host; with swap in zram and on its disk where it has cgroup v2, the virtual machines."""
    if any_agent.host.driver != "vm":
        yield any_agent
        return
    try:
        any_agent.run("sh", "-ec", f"{DISK}; {ZRAM}", timeout=60)
        yield any_agent
    finally:
        any_agent.run("sh", "-c", "swapoff -a; rm -f /swapfile; modprobe -r zram", timeout=120)


def used(agent, *slots):
    """The processor time of slots, all at one moment, and that moment."""
    known = {slot["slot"]: slot["cpu_s"] for slot in agent.slots()}
    return [known[slot] for slot in slots], time.monotonic()


def opened(agent, **options):
    """A claim of a slot that is warm: on a slow machine a claim would not wait for its start."""
    agent.wait_warm()
    return agent.open(**options)


def test_memory_kills_the_kernel_and_spares_the_server(any_agent):
    agent = any_agent
    agent.expect(r"ran out of memory|killed by the OOM killer")
    notebook = opened(agent, memory="256M")
    server = set(agent.processes(notebook.slot))
    with notebook.kernel() as kernel:
        pid = int(kernel.run("import os; os.getpid()", timeout=180).text)
        assert pid > 2
        kernel.send("b'x' * (1 << 30)")
        state = agent.wait(
            lambda: (known := agent.api.get(f"/slots/{notebook.slot}").json())["oom_kills"] and known, "an OOM kill"
        )
    assert state["state"] == "claimed"
    assert server <= set(agent.processes(notebook.slot))
    said = agent.wait(
        lambda: agent.journal(f"NBAGENT_SLOT={notebook.slot}", f"MESSAGE_ID={Event.SLOT_OOM.value.message_id}"),
        "the journal to say so",
    )
    assert said[0]["PRIORITY"] == "4" and said[0]["NBAGENT_SLOT"] == notebook.slot
    assert "killed at MemoryMax=268435456" in said[0]["MESSAGE"]
    # The notebook is still there, and runs cells again.
    assert "Welcome.ipynb" in [file["name"] for file in notebook.get("api/contents")["content"]]
    assert notebook.run("6 * 7", timeout=180).text == "42"
    assert agent.run("systemctl", "is-active", f"nbagent-{notebook.slot}.scope") == "active\n"


def test_the_supervisor_may_move_itself_so_that_others_are_moved_at_once(any_agent):
    pid = any_agent.run("systemctl", "show", "-P", "MainPID", "nbagent.service").strip()
    own = any_agent.run("sed", "-n", "s/^0:://p", f"/proc/{pid}/cgroup").strip()
    # In its own view of the file systems, where nearly all of the tree is read-only.
    may = "for at in /sys/fs/cgroup/unified /sys/fs/cgroup; do if [ -w $at$1 ]; then echo $at; fi; done"
    view = ["nsenter", "-t", pid, "-m", "sh", "-c", may, "sh"]
    assert any_agent.run(*view, f"{own}/cgroup.procs").split()
    assert not any_agent.run(*view, "/system.slice/cgroup.procs").split()


def test_tasks_end_at_the_limit_and_the_server_stays(any_agent):
    agent = any_agent
    notebook = opened(agent)
    with notebook.kernel() as kernel:
        made, errno = map(int, kernel.run(BOMB, timeout=180).stream.split())
        assert errno == EAGAIN and 150 < made < 256
        state = agent.api.get(f"/slots/{notebook.slot}").json()
        assert (state["tasks"], state["limits"]["tasks"]) == (256, 256) and state["tasks_refused"] >= 1
        match = (f"NBAGENT_SLOT={notebook.slot}", f"MESSAGE_ID={Event.SLOT_TASKS_REFUSED.value.message_id}")
        said = agent.wait(lambda: agent.journal(*match), "the journal to say so")
        assert said[0]["PRIORITY"] == "5" and "TasksMax=256" in said[0]["MESSAGE"]
        assert [known["id"] for known in notebook.get("api/kernels")] == [kernel.id]


def test_two_busy_slots_share_the_processors_by_their_weights_and_a_quota_is_the_most(any_agent):
    agent = any_agent
    light, heavy = opened(agent, cpu_weight=100), opened(agent, cpu_weight=300)
    agent.wait_warm()  # nothing else is to want the processors
    with light.kernel() as first, heavy.kernel() as second:
        for kernel in (first, second):
            assert kernel.run("1", timeout=180).text == "1"
        for kernel in (first, second):
            assert kernel.run(BURN, timeout=180).status == "ok"
    # A machine that does other things as well takes longer to show the ratio; the ratio stays.
    for seconds in (6, 12, 24, 48):
        before, _ = used(agent, light.slot, heavy.slot)
        time.sleep(seconds)
        after, _ = used(agent, light.slot, heavy.slot)
        ratio = (after[1] - before[1]) / (after[0] - before[0])
        if 3 * 0.85 <= ratio <= 3 * 1.15:
            break
    assert 3 * 0.85 <= ratio <= 3 * 1.15

    assert agent.api.patch(f"/slots/{heavy.slot}", {"cpu_quota": "25%"}).status == 200
    (before,), began = used(agent, heavy.slot)
    time.sleep(6)
    (after,), ended = used(agent, heavy.slot)
    assert 0.05 < (after - before) / (ended - began) <= 0.25 * 1.15


def test_a_slot_at_rest_is_compressed_and_wakes_up(swapping):
    agent = swapping

    def state():
        return agent.api.get(f"/slots/{notebook.slot}").json()

    def compressed():
        return agent.api.get("/stats").json()["counters"]["compressed"]

    before = compressed()
    agent.configure('[cull]\ncompress = "5s"\n')
    notebook = opened(agent)
    with notebook.kernel() as kernel:
        assert kernel.run("numbers = list(range(300_000)); sum(numbers)", timeout=180).text == "44999850000"
        # Nothing that is in a slot is for a disk, nor is there on cgroup v1 a way to swap out one slot alone.
        agent.wait(lambda: state()["idle_s"] > 10, "the slot to be at rest for long enough", timeout=120)
        awake = state()
        assert awake["swapped_bytes"] == 0 and awake["memory_bytes"] > 10 << 20 and compressed() == before
        if agent.host.driver != "vm":
            return
        agent.run("swapoff", "/swapfile", timeout=60)
        agent.wait(lambda: state()["memory_bytes"] < awake["memory_bytes"] / 2, "its memory to be elsewhere")
        # A host short of memory may not do so on its own, with whatever swap it has by then.
        show = ("systemctl", "show", "-P", "MemorySwapMax", f"nbagent-{notebook.slot}.scope")
        agent.wait(lambda: agent.run(*show) == "0\n", "the limit to be as it was")
        asleep = state()
        assert asleep["swapped_bytes"] > 10 << 20 and compressed() > before
        assert kernel.run("sum(numbers)", timeout=180).text == "44999850000"
        assert state()["memory_bytes"] > asleep["memory_bytes"]
    # One that nobody has claimed rests from its start.
    agent.wait(lambda: any(slot["swapped_bytes"] for slot in agent.slots("warm")), "a warm slot's memory in zram")
    assert opened(agent).run("6 * 7", timeout=180).text == "42"


def test_pid_1_ends_a_slot_at_its_greatest_age_while_no_agent_runs(any_agent):
    agent = any_agent
    agent.expect(r"Failed with result 'timeout'|reached runtime time limit")
    starts = agent.api.get("/stats").json()["start_seconds"]
    # Time enough for a start, and little more.
    warm_s, claimed_s = 10 + round(1.5 * starts["sum"] / max(1, starts["count"])), 20
    agent.configure(
        f'[slots]\nttl = "{claimed_s}s"\nttl_max = "{claimed_s}s"\n[pool]\nmax_age = "{warm_s}s"\n'
    )
    for slot in agent.slots("warm"):
        agent.release(slot["slot"])
    slot = opened(agent).slot
    scope, units = f"nbagent-{slot}.scope", ("nbagent.service", "nbagent.socket", "nbagent-check.socket")
    agent.run("systemctl", "stop", *units)
    shown = agent.run("systemctl", "show", "-p", "RuntimeMaxUSec", "-p", "ActiveState", scope).splitlines()
    minutes, seconds = divmod(warm_s + claimed_s, 60)
    expected = " ".join(part for part in (f"{minutes}min" * (minutes > 0), f"{seconds}s" * (seconds > 0)) if part)
    assert set(shown) == {f"RuntimeMaxUSec={expected}", "ActiveState=active"}
    pids = agent.processes(slot)
    agent.wait(
        lambda: agent.run("systemctl", "is-active", scope, check=False) == "inactive\n", "the scope's end",
        timeout=2 * (warm_s + claimed_s),
    )
    assert agent.run("systemctl", "is-active", *units, check=False) == "inactive\n" * 3
    assert agent.run("sh", "-c", f"ps -o pid= -p {','.join(map(str, pids))}; true") == ""
    agent.run("systemctl", "start", *units)
    agent.wait(lambda: agent.api.get(f"/slots/{slot}").status == 404, "the agent to know")
    said = agent.journal(f"NBAGENT_SLOT={slot}", f"MESSAGE_ID={Event.SLOT_REMOVED.value.message_id}")
    assert "ended while no supervisor ran" in said[0]["MESSAGE"]
    assert agent.run("sh", "-c", f"ls -d /run/nbagent/slots/{slot} 2>/dev/null; true") == ""
