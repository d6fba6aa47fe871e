# SPDX-License-Identifier: BSD-3-Clause
"""Limits of memory, tasks, processor time and age, which the kernel and systemd enforce, on every kind of host."""

import re
import time

import pytest

from conftest import ALL_MACHINES, machines_when_all
from nbagent.core.events import Event

pytestmark = pytest.mark.cgroup2

# One busy process on each processor of the host. They run until the slot ends. Without a processor of their own, two of
# one slot would share a processor at times, so that the other slot has the other one, whatever the weights are.
BURN = """
import os, subprocess
burning = []
for number in os.sched_getaffinity(0):
    code = f"import os; os.sched_setaffinity(0, [{number}])\\nwhile True: pass"
    burning.append(subprocess.Popen(["python3", "-ISc", code], start_new_session=True))
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
# udev opens a device for a moment when a program has closed it, and the module is in use meanwhile.
NO_ZRAM = "for _ in $(seq 30); do udevadm settle; modprobe -r zram && exit; sleep 1; done; exit 1"
DISK = "fallocate -l 64M /swapfile; chmod 600 /swapfile; mkswap -q /swapfile; swapon /swapfile"


@pytest.fixture
def swapping(any_agent):
    """A host; on virtual machines, which have cgroup v2, with swap in zram and on disk."""
    if any_agent.host.driver != "vm":
        yield any_agent
        return
    try:
        any_agent.run("sh", "-ec", f"{DISK}; {ZRAM}", timeout=60)
        yield any_agent
    finally:
        any_agent.run("sh", "-c", f"swapoff -a; rm -f /swapfile; {NO_ZRAM}", timeout=180)


def used(agent, *slots):
    """The processor time of slots, and the time of the measurement."""
    known = {slot["slot"]: slot["cpu_s"] for slot in agent.slots()}
    return [known[slot] for slot in slots], time.monotonic()


def opened(agent, **options):
    """A claimed slot. It waits for a warm slot first, because on a slow machine a claim could time out."""
    agent.wait_warm()
    return agent.open(**options)


def test_the_oom_killer_kills_the_jupyter_kernel_and_not_the_server(any_agent):
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
        text = kernel.receive("stream", name="stderr")["content"]["text"]
        assert re.match(r"The kernel was ended by SIGKILL, (probably )?because this notebook reached its memory limit"
                        r" of 256 MiB\.", text)
    assert state["state"] == "claimed"
    assert server <= set(agent.processes(notebook.slot))
    entries = agent.wait(
        lambda: agent.journal(f"NBAGENT_SLOT={notebook.slot}", f"MESSAGE_ID={Event.SLOT_OOM.value.message_id}"),
        "the journal entry",
    )
    assert entries[0]["PRIORITY"] == "4" and entries[0]["NBAGENT_SLOT"] == notebook.slot
    assert "killed at MemoryMax=268435456" in entries[0]["MESSAGE"]
    if agent.host.driver == "vm":  # a container has no kernel's log of its own
        assert "Killed process" in (log := agent.run("journalctl", "-k", "-o", "cat"))
        assert "total_vm" not in log, "the kernel listed the processes of the slot"
    # The server still runs, and starts a new kernel.
    assert "Welcome.ipynb" in [file["name"] for file in notebook.get("api/contents")["content"]]
    assert notebook.run("6 * 7", timeout=180).text == "42"
    assert agent.run("systemctl", "is-active", f"nbagent-{notebook.slot}.scope") == "active\n"


# Lines "UNIT ADJUSTMENT PID-IN-ITS-NAMESPACE COMMAND" of all processes of nbagent.
SCORES = """
import os, re
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        cgroups, inner = open(f"/proc/{pid}/cgroup").read(), open(f"/proc/{pid}/status").read()
        unit = re.search(r"/(nbagent[^/]*[.](?:service|scope))$", cgroups, re.M)
        if unit:
            inner = re.search(r"^NSpid:.*?(\\d+)$", inner, re.M)[1]
            command = open(f"/proc/{pid}/cmdline").read().replace(chr(0), " ")
            print(unit[1], open(f"/proc/{pid}/oom_score_adj").read().strip(), inner, command)
    except (FileNotFoundError, ProcessLookupError):
        pass
"""


def lowering(agent):
    """A host on which PID 1 can lower a score."""
    if agent.host.driver != "vm":
        pytest.skip("a container of this machine has no CAP_SYS_RESOURCE")
    return agent


def test_the_services_have_lower_oom_scores_than_slots(any_agent):
    agent = lowering(any_agent)
    notebook = opened(agent)
    with notebook.kernel() as kernel:
        assert kernel.run("6 * 7", timeout=180).text == "42"
        lines = [line.split(" ", 3) for line in agent.run("python3", "-c", SCORES).splitlines()]
    services: dict[str, list[int]] = {}
    slots, zygotes, protected = [], [], []
    for unit, score, inner, command in lines:
        if unit.endswith(".scope"):
            # The first process runs no code of the image, and its end would end the slot.
            if inner != "1":
                slots.append(int(score))
        elif unit.startswith("nbagent-zygote@"):
            (protected if "nbagent.runtime.zygote_service" in command else zygotes).append(int(score))
        elif unit != "nbagent-dns.service":
            services.setdefault(unit, []).append(int(score))
    names = ("nbagent", "nbagent-api", "nbagent-router", "nbagent-units")
    assert {f"{name}.service" for name in names} <= set(services)
    assert max(max(scores) for scores in services.values()) <= -500, services
    assert min(slots) >= 0 and max(slots) == 500
    assert protected and set(protected) == {-800} and min(zygotes) >= 0


def test_the_units_service_may_write_to_its_own_cgroup(any_agent):
    pid = any_agent.run("systemctl", "show", "-P", "MainPID", "nbagent-units.service").strip()
    own = any_agent.run("sed", "-n", "s/^0:://p", f"/proc/{pid}/cgroup").strip()
    # In the mount namespace of the service, in which most of the cgroup tree is read-only.
    may = "for at in /sys/fs/cgroup/unified /sys/fs/cgroup; do if [ -w $at$1 ]; then echo $at; fi; done"
    view = ["nsenter", "-t", pid, "-m", "sh", "-c", may, "sh"]
    assert any_agent.run(*view, f"{own}/cgroup.procs").split()
    assert not any_agent.run(*view, "/system.slice/cgroup.procs").split()


def test_a_fork_bomb_stops_at_tasks_max_and_the_server_keeps_running(any_agent):
    agent = any_agent
    notebook = opened(agent)
    with notebook.kernel() as kernel:
        made, errno = map(int, kernel.run(BOMB, timeout=180).stream.split())
        assert errno == EAGAIN and 150 < made < 256
        state = agent.api.get(f"/slots/{notebook.slot}").json()
        assert (state["tasks"], state["limits"]["tasks"]) == (256, 256) and state["tasks_refused"] >= 1
        match = (f"NBAGENT_SLOT={notebook.slot}", f"MESSAGE_ID={Event.SLOT_TASKS_REFUSED.value.message_id}")
        entries = agent.wait(lambda: agent.journal(*match), "the journal entry")
        assert entries[0]["PRIORITY"] == "5" and "TasksMax=256" in entries[0]["MESSAGE"]
        assert [known["id"] for known in notebook.get("api/kernels")] == [kernel.id]


def test_busy_slots_share_processors_by_weight_and_a_quota_is_enforced(any_agent):
    agent = any_agent
    light, heavy = opened(agent, cpu_weight=100), opened(agent, cpu_weight=300)
    agent.wait_warm()  # so that no start uses the processors
    with light.kernel() as first, heavy.kernel() as second:
        for kernel in (first, second):
            assert kernel.run("1", timeout=180).text == "1"
        for kernel in (first, second):
            assert kernel.run(BURN, timeout=180).status == "ok"
    # Longer measurements compensate for other load on the machine.
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


def kernels_weight(agent, pid):
    """The weight that the kernel has for the cgroup of a process, by the scale of CPUWeight=."""
    for line in agent.run("cat", f"/proc/{pid}/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            return round(int(agent.run("cat", f"/sys/fs/cgroup/cpu{path}/cpu.shares")) * 100 / 1024)
        unified = path
    return int(agent.run("cat", f"/sys/fs/cgroup{unified}/cpu.weight"))


def test_a_slot_that_computes_on_a_full_host_gives_way_until_it_rests(any_agent):
    agent = any_agent
    notebook = opened(agent, cpu_weight=200)
    rests, scope = opened(agent), f"nbagent-{notebook.slot}.scope"
    pid = agent.processes(notebook.slot)[0]

    def state():
        return agent.api.get(f"/slots/{notebook.slot}").json()

    def at_weight(weight):
        return state()["limits_in_force"]["cpu_weight"] == weight == kernels_weight(agent, pid)

    def count():
        return int(re.search(r"^nbagent_gave_way_total (\d+)", agent.api.get("/metrics").body.decode(), re.M)[1])

    before = count()
    with notebook.kernel() as kernel:
        assert kernel.run(BURN, timeout=180).status == "ok"
        agent.wait(lambda: at_weight(10), "the lower weight", 60)
        assert state()["limits"]["cpu_weight"] == 200 and count() > before
        # A slot at rest has its weight, and an update and the guard do not undo each other.
        assert agent.api.get(f"/slots/{rests.slot}").json()["limits_in_force"]["cpu_weight"] == 100
        assert agent.api.patch(f"/slots/{notebook.slot}", {"cpu_weight": 400}).status == 200
        assert agent.run("systemctl", "show", "-P", "CPUWeight", scope) == "20\n" and at_weight(20)
        # The next supervisor gives the slot its own weight, and lowers it again if it still computes.
        agent.run("systemctl", "restart", "nbagent.service")
        kind = Event.SLOT_LIMITS_RESTORED.value.message_id
        entry, = agent.wait(lambda: agent.journal(f"NBAGENT_SLOT={notebook.slot}", f"MESSAGE_ID={kind}"), "the entry")
        assert entry["NBAGENT_TEXT"] == "cpu_weight from 20 to 400" and entry["PRIORITY"] == "6"
        agent.wait(lambda: at_weight(20), "the lower weight", 60)
        kernel.run("[process.kill() for process in burning]", timeout=180)
        agent.wait(lambda: at_weight(400), "the slot's own weight", 60)
    kind = Event.SLOT_GIVES_WAY.value.message_id
    entries = agent.journal(f"NBAGENT_SLOT={notebook.slot}", f"MESSAGE_ID={kind}")
    assert entries[0]["NBAGENT_TEXT"] == "10 instead of 200"


def test_an_idle_slot_is_compressed_and_keeps_its_memory(swapping):
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
        # With swap on a disk no slot is compressed. On cgroup v1 a single slot cannot be swapped out.
        agent.wait(lambda: state()["idle_s"] > 10, "the slot to be idle for long enough", timeout=120)
        awake = state()
        assert awake["swapped_bytes"] == 0 and awake["memory_bytes"] > 10 << 20 and compressed() == before
        if agent.host.driver != "vm":
            return
        agent.run("swapoff", "/swapfile", timeout=60)
        agent.wait(lambda: state()["memory_bytes"] < awake["memory_bytes"] / 2, "its memory to be in zram")
        # Afterwards the kernel must not swap out the slot by itself.
        show = ("systemctl", "show", "-P", "MemorySwapMax", f"nbagent-{notebook.slot}.scope")
        agent.wait(lambda: agent.run(*show) == "0\n", "the limit to be reset")
        asleep = state()
        assert asleep["swapped_bytes"] > 10 << 20 and compressed() > before
        assert kernel.run("sum(numbers)", timeout=180).text == "44999850000"
        assert state()["memory_bytes"] > asleep["memory_bytes"]
    # A warm slot is idle from its start.
    agent.wait(lambda: any(slot["swapped_bytes"] for slot in agent.slots("warm")), "a warm slot's memory in zram")
    assert opened(agent).run("6 * 7", timeout=180).text == "42"


@machines_when_all
def test_systemd_ends_a_slot_at_its_maximum_age_without_an_agent(any_agent):
    agent = any_agent
    agent.expect(r"Failed with result 'timeout'|reached runtime time limit")
    starts = agent.api.get("/stats").json()["start_seconds"]
    # Slightly more time than a start takes.
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
    agent.wait(lambda: agent.api.get(f"/slots/{slot}").status == 404, "the agent to remove the slot")
    entries = agent.journal(f"NBAGENT_SLOT={slot}", f"MESSAGE_ID={Event.SLOT_REMOVED.value.message_id}")
    assert "ended while no supervisor ran" in entries[0]["MESSAGE"]
    assert agent.run("sh", "-c", f"ls -d /run/nbagent/slots/{slot} 2>/dev/null; true") == ""


@pytest.mark.skipif(not ALL_MACHINES, reason="by make test-vms, in 7 minutes")
def test_a_slot_by_exec_cannot_take_the_oom_score_of_the_launch_service(any_agent):
    agent = lowering(any_agent)
    agent.expect(r"zygote \S+ failed|nbagent-zygote@\S+: (Main|Failed)|Consumed")
    agent.run("systemctl", "kill", "-s", "KILL", "nbagent-zygote@*.service")
    agent.wait(lambda: "exec" in {image["launch_now"] for image in agent.api.get("/images").json()}, "no zygote")
    agent.api.delete("/api/pool")
    agent.wait(lambda: {slot["launch"] for slot in agent.slots("warm")} == {"exec"}, "warm slots by exec", timeout=300)
    notebook = agent.open()
    assert agent.api.get(f"/slots/{notebook.slot}").json()["launch"] == "exec"
    profiles = {agent.run("cat", f"/proc/{pid}/attr/current") for pid in agent.processes(notebook.slot)}
    assert {profile.strip("\0\n") for profile in profiles} == {"nbagent-slots (enforce)"}
    with notebook.kernel() as kernel:
        code = "open('/proc/self/oom_score_adj', 'w').write('-1')"
        assert "PermissionError" in str(kernel.run(code, timeout=180))
