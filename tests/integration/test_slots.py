# SPDX-License-Identifier: BSD-3-Clause
"""A slot on its host: limits, user, namespaces, files, descriptors, and complete removal."""

import base64
import json
import re

import pytest

from wheels import wheel

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
# Descriptors of a slot's server: output, listening socket, activity page, event loop; of its fork server: the server.
DESCRIPTORS = re.compile(
    r"/dev/null|(pipe|socket):\[\d+\]|/memfd:nbagent-activity \(deleted\)|anon_inode:\[(eventpoll|pidfd)\]"
)


def shown(agent, slot):
    """The properties of a slot's scope."""
    lines = agent.run("systemctl", "show", f"nbagent-{slot}.scope").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def record(agent, slot):
    """The slot's state file, slot.json."""
    return json.loads(agent.run("cat", f"/run/nbagent/slots/{slot}/slot.json"))


def status(agent, pid):
    """/proc/PID/status as the host sees it."""
    lines = agent.run("cat", f"/proc/{pid}/status").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def namespaces(agent, pid):
    """The namespaces of a process, by their inode numbers."""
    links = agent.run("readlink", *(f"/proc/{pid}/ns/{name}" for name in NAMESPACES)).split()
    return dict(zip(NAMESPACES, links, strict=True))


def evaluate(runner, code):
    """The JSON that a cell prints, run by a kernel, or by a new kernel of a notebook."""
    result = runner.run(code)
    assert result.status == "ok", result
    return json.loads(result.stream)


def recycle_pool(agent):
    """Replaces the warm slots by new ones with the present settings."""
    for slot in agent.slots("warm"):
        agent.release(slot["slot"])
    agent.wait_warm()


def test_a_scope_has_the_limits_of_the_settings(agent):
    slot = agent.claim()["slot"]
    properties = shown(agent, slot)
    expected = {
        "Slice": "nbagent-slots.slice", "MemoryMax": str(512 << 20), "MemorySwapMax": "0", "CPUWeight": "100",
        "TasksMax": "256", "OOMPolicy": "continue", "CollectMode": "inactive-or-failed",
        # The maximum age of a warm slot, 6 h, plus the longest life of a claimed one, 24 h.
        "RuntimeMaxUSec": "1d 6h", "CPUQuotaPerSecUSec": "infinity", "ActiveState": "active",
    }
    assert {name: properties[name] for name in expected} == expected
    slice_ = agent.run("systemctl", "show", "-P", "Slice", "nbagent-slots.slice").strip()
    assert slice_ == "nbagent.slice"


def test_each_slot_has_its_own_user_id_in_the_range_of_its_image(agent):
    uids = []
    for slot in (agent.claim()["slot"], agent.claim()["slot"]):
        known = record(agent, slot)
        uid = known["id_base"] + known["uid"]
        assert known["id_base"] >= 65536 and 0 < known["uid"] < 65536
        for pid in agent.processes(slot):
            process = status(agent, pid)
            assert process["Uid"].split() == process["Gid"].split() == [str(uid)] * 4
            assert process["Groups"] == ""
            for name in ("uid_map", "gid_map"):
                assert agent.run("cat", f"/proc/{pid}/{name}").split() == ["0", str(known["id_base"]), "65536"]
        uids.append(uid)
    assert uids[0] != uids[1]


def test_no_process_of_a_slot_has_or_can_gain_a_capability(agent):
    notebook = agent.open()
    with notebook.kernel() as kernel:
        assert kernel.run("import subprocess; child = subprocess.Popen(['sleep', '600'])").status == "ok"
        pids = agent.processes(notebook.slot)
        assert len(pids) >= 4  # init, server, kernel and its child
        host = namespaces(agent, 1)
        for pid in pids:
            process = status(agent, pid)
            assert {process[f"Cap{name}"] for name in ("Eff", "Prm", "Inh", "Bnd", "Amb")} == {"0" * 16}
            assert process["NoNewPrivs"] == "1" and process["Seccomp"] == "2"
            assert namespaces(agent, pid)["user"] != host["user"]


def test_a_slot_shares_no_namespace_with_the_host_or_another_slot(agent):
    host = namespaces(agent, 1)
    slots = [agent.claim()["slot"], agent.claim()["slot"]]
    seen = []
    for slot in slots:
        each = [namespaces(agent, pid) for pid in agent.processes(slot)]
        assert each and all(one == each[0] for one in each)
        seen.append(each[0])
    for name in NAMESPACES:
        # The user namespace is the image's, in which each slot has an id of its own.
        assert len({host[name], seen[0][name], seen[1][name]}) == (2 if name == "user" else 3), name
        assert host[name] not in (seen[0][name], seen[1][name]), name


def test_a_slot_has_its_own_identity_and_sees_only_its_processes(agent):
    notebook = agent.open()
    uid = record(agent, notebook.slot)["uid"]
    facts = evaluate(notebook, """
import json, os, pwd, socket, subprocess
def output(*argv): return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
try:
    socket.create_connection(("192.0.2.1", 80), timeout=10)
    away = "connected"
except OSError as error:
    away = os.strerror(error.errno)
print(json.dumps({
    "whoami": output("whoami"), "id": output("id"), "hostname": output("hostname"), "home": os.path.expanduser("~"),
    "cwd": os.getcwd(), "passwd": list(pwd.getpwuid(os.getuid())), "localhost": socket.gethostbyname("localhost"),
    "self": socket.gethostbyname(socket.gethostname()),
    "interfaces": [line.partition(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]], "away": away,
    "pids": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
    "parents": [os.getpid(), os.getppid(), 1],
}))
""")
    assert facts["whoami"] == "jovyan"
    assert facts["id"] == f"uid={uid}(jovyan) gid={uid}(jovyan) groups={uid}(jovyan)"
    assert facts["hostname"] == notebook.slot
    assert facts["home"] == facts["cwd"] == facts["passwd"][5] == "/home/jovyan"
    assert facts["localhost"] == facts["self"] == "127.0.0.1"
    assert facts["interfaces"] == ["lo"] and facts["away"] == "Network is unreachable"
    # Four or five: init, server, fork server, kernel and its child. A host has dozens.
    assert set(facts["parents"]) <= set(facts["pids"]) and max(facts["pids"]) < 100 and len(facts["pids"]) <= 6


def test_files_sockets_and_mounts_of_the_host_are_not_visible(agent):
    facts = evaluate(agent.open(), """
import json, os
def names(path):
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        return type(error).__name__
sockets = []
for top, directories, files in os.walk("/"):
    if top == "/":
        directories.remove("proc")
    for name in files:
        path = os.path.join(top, name)
        if os.path.exists(path) and (os.stat(path).st_mode & 0o170000) == 0o140000:
            sockets.append(path)
with open("/proc/self/mountinfo") as file:
    mounts = [line.split() for line in file]
print(json.dumps({
    "sockets": sockets, "run": names("/run"), "nbagent": names("/run/nbagent"), "lib": names("/run/nbagent/lib"),
    "etc": names("/etc/nbagent"), "var": names("/var/lib/nbagent"), "sys": names("/sys"), "boot": names("/boot"),
    "root": names("/root"), "init": [names(f"/proc/1/{name}") for name in ("fd", "root", "cwd", "map_files")],
    "devices": names("/dev"), "mounts": [mount[4] for mount in mounts],
    "uids": sorted({os.lstat(os.path.join("/etc", name)).st_uid for name in os.listdir("/etc")}),
}))
""")
    assert facts["sockets"] == []
    assert facts["nbagent"] == ["lib"] and facts["lib"] == ["nbagent"]
    assert not set(facts["run"]) & {"systemd", "dbus", "udev", "user", "nbagent-api", "nbagent-router", "log"}
    assert facts["etc"] == facts["var"] == "FileNotFoundError"
    # Copies of the host's files about processors, and the slot's own cgroup.
    assert sorted(facts["sys"]) == ["devices", "fs"] and facts["boot"] == []
    assert facts["root"] == "PermissionError" and facts["init"] == ["PermissionError"] * 4
    assert set(facts["devices"]) == {
        "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero",
    }
    foreign = ("/sys", "/run/systemd", "/var", "/etc", "/root")
    found = {path for path in facts["mounts"] if path.startswith(foreign)}
    assert found - {"/sys/fs/cgroup", "/sys/devices/system/cpu/online"} == {"/var/tmp", "/sys"}


def test_the_image_and_the_kernels_settings_are_read_only(agent):
    facts = evaluate(agent.open(), """
import json, os
def opened(path, mode="r+"):
    try:
        open(path, mode).close()
        return "opened"
    except OSError as error:
        return type(error).__name__ if error.errno != 30 else "read-only"
options = {}
with open("/proc/self/mountinfo") as file:
    for line in file:
        options[line.split()[4]] = line.split()[5].split(",")
print(json.dumps({
    "image": [opened(path) for path in ("/usr/bin/env", "/etc/passwd", "/etc/hosts")],
    "new": [opened(f"/{name}/new", "x") for name in ("usr", "etc", "run", "opt", "")],
    "code": opened("/run/nbagent/lib/nbagent/zygote/notebook_server.py"),
    "sys": [opened(f"/proc/sys/{name}") for name in ("kernel/hostname", "vm/overcommit_memory", "kernel/core_pattern")],
    "trigger": opened("/proc/sysrq-trigger", "w"),
    "options": {path: options[path] for path in ("/", "/tmp", "/dev/shm", "/proc/sys", "/run/nbagent/lib/nbagent")},
}))
""")
    assert set(facts["image"] + facts["new"]) <= {"PermissionError", "read-only"}
    assert "ro" in facts["options"]["/"]
    assert facts["code"] in ("PermissionError", "read-only")
    assert set(facts["sys"]) <= {"PermissionError", "read-only"}
    # Not every kernel has /proc/sysrq-trigger.
    assert facts["trigger"] in ("PermissionError", "read-only", "FileNotFoundError")
    for path, options in facts["options"].items():
        assert {"nosuid", "nodev"} <= set(options), path
    assert "ro" in facts["options"]["/proc/sys"] and "ro" in facts["options"]["/run/nbagent/lib/nbagent"]


def test_files_of_a_slot_are_private_and_removed_with_it(agent):
    first, second = agent.open(), agent.open()
    tree = record(agent, first.slot)["digest"].replace(":", "-")
    welcome = f"/var/lib/nbagent/images/{tree}/rootfs/home/jovyan/Welcome.ipynb"
    before = agent.run("sha256sum", welcome)
    mark, places = f"mark-of-{first.slot}", ("/home/jovyan", "/tmp", "/dev/shm", "/var/tmp")
    write = f"""
import pathlib
for directory in {places}:
    pathlib.Path(directory, {mark!r}).write_text({mark!r})
pathlib.Path("/home/jovyan/Welcome.ipynb").write_text("mine")
"""
    assert first.run(write).status == "ok"
    check = f"import json, os; print(json.dumps([os.path.exists(place + '/{mark}') for place in {places}]))"
    assert evaluate(first, check) == [True] * 4
    assert evaluate(second, check) == [False] * 4
    assert second.get("api/contents/Welcome.ipynb")["type"] == "notebook"

    def on_host():
        found = agent.run("find", "/", "-path", "/proc", "-prune", "-o", "-path", "/sys", "-prune", "-o",
                          "-name", mark, "-print")
        return found.split()

    assert on_host() == []
    agent.release(first.slot)
    assert on_host() == []
    assert agent.run("sha256sum", welcome) == before


@pytest.fixture
def small_storage(agent):
    """The shared host with slots of 24 MB of storage; afterwards the pool has the former settings."""
    agent.configure('[slots]\nstorage = "24M"\n')
    recycle_pool(agent)
    yield agent
    agent.configure("")
    recycle_pool(agent)


def test_full_storage_is_enospc_and_the_server_goes_on(small_storage):
    notebook = small_storage.open()
    with notebook.kernel() as kernel:
        fill_up(notebook, kernel)


def fill_up(notebook, kernel):
    full = evaluate(kernel, """
import errno, json, os
def fill(path):
    written = 0
    try:
        with open(path, "wb") as file:
            while True:
                written += file.write(b"x" * 65536)
                file.flush()
    except OSError as error:
        return errno.errorcode[error.errno], written
def crowd(directory):
    number = 0
    try:
        os.mkdir(directory)
        for number in range(100_000):
            open(f"{directory}/{number}", "x").close()
    except OSError as error:
        return errno.errorcode[error.errno], number
def size(path): return [os.statvfs(path).f_blocks * os.statvfs(path).f_frsize, os.statvfs(path).f_files]
full = {"home": fill("big"), "tmp": fill("/tmp/big"), "shm": fill("/dev/shm/big")}
print(json.dumps(full | {"size": size("/home/jovyan")}))
""")
    assert full["size"] == [24 << 20, (24 << 20) // 4096]
    # The home, /tmp and /dev/shm share the slot's storage.
    assert full["home"][0] == full["tmp"][0] == full["shm"][0] == "ENOSPC"
    assert 20 << 20 < full["home"][1] <= 24 << 20 and full["tmp"][1] < 1 << 20 and full["shm"][1] < 1 << 20
    assert full["home"][1] <= notebook.get("api/contents/big?content=0")["size"] <= 24 << 20
    crowded = evaluate(kernel, """
os.unlink("big"); os.unlink("/tmp/big"); os.unlink("/dev/shm/big")
print(json.dumps({"home": crowd("crowd"), "shm": crowd("/dev/shm/crowd")}))
""")
    assert crowded["home"][0] == crowded["shm"][0] == "ENOSPC"
    assert 4000 < crowded["home"][1] <= 6144 and crowded["shm"][1] < 100
    assert kernel.run("import shutil; shutil.rmtree('crowd'); open('small', 'w').write('fits')").status == "ok"
    assert notebook.get("api/contents/small")["content"] == "fits"


def test_the_token_is_only_in_the_claims_response(agent):
    claim = agent.claim()
    assert agent.router.get(claim["path"] + "?token=" + claim["token"]).status == 200
    assert agent.router.get(f"/user/{claim['slot']}/api/contents?token={claim['token']}").status == 200
    assert agent.router.get(f"/user/{claim['slot']}/no/such?token={claim['token']}").status == 404
    notebook = type(agent.open())(agent.host, claim)
    assert claim["token"] not in notebook.run("import os; print(dict(os.environ))").stream
    search = "grep -slFf - /proc/[0-9]*/cmdline /proc/[0-9]*/environ; true"
    assert agent.run("sh", "-c", search, input=claim["token"]) == ""
    # The same search finds a text that is present.
    init = agent.run("sh", "-c", "tr '\\0' '\\n' </proc/1/cmdline")
    assert "/proc/1/cmdline" in agent.run("sh", "-c", search, input=init)
    for unit in (f"nbagent-{claim['slot']}.scope", "nbagent.service", "nbagent-api.service"):
        assert claim["token"] not in agent.run("systemctl", "show", unit)
    journal = agent.run("journalctl", "--no-pager", "-o", "export", "--all")
    assert claim["slot"] in journal and claim["token"] not in journal
    assert agent.run("stat", "-c", "%a %u", f"/run/nbagent/slots/{claim['slot']}/slot.json") == "600 0\n"


def test_a_setuid_program_gains_no_user_id(agent):
    notebook = agent.open()
    known = record(agent, notebook.slot)
    # Made by root of the image's user namespace, which no process of a slot is.
    agent.run("nsenter", "-t", str(known["pid"]), "-U", "-m", "-S", "0", "-G", "0", "sh", "-c",
              "cp /usr/bin/id /home/jovyan/rooted && chmod 6755 /home/jovyan/rooted")
    facts = evaluate(notebook, """
import json, os, subprocess
status = os.stat("rooted")
id = subprocess.run(["./rooted"], capture_output=True, text=True, check=True).stdout
print(json.dumps({"owner": status.st_uid, "mode": oct(status.st_mode), "id": id.strip()}))
""")
    assert (facts["owner"], facts["mode"]) == (0, "0o106755")
    uid = known["uid"]
    assert facts["id"] == f"uid={uid}(jovyan) gid={uid}(jovyan) groups={uid}(jovyan)"


def test_a_slots_processes_hold_only_the_descriptors_they_need(agent):
    slot = agent.claim()["slot"]
    pids = agent.processes(slot)
    assert len(pids) == 3  # init, server, fork server
    for pid in pids:
        links = agent.run("sh", "-c", f"for fd in /proc/{pid}/fd/*; do readlink $fd; done").splitlines()
        assert 4 <= len([link for link in links if link != "/dev/null"]) <= 10
        assert [link for link in links if not DESCRIPTORS.fullmatch(link)] == []


def test_descriptors_of_the_supervisor_do_not_reach_a_slot(agent):
    connections = "import socket, time; held = [socket.socket(1, 5) for _ in range(100)];"
    connections += " [one.connect('/run/nbagent/control.sock') for one in held]; time.sleep(600)"
    agent.run("systemd-run", "-q", "--unit=holder", "/usr/bin/python3", "-c", connections)
    pid = agent.run("systemctl", "show", "-P", "MainPID", "nbagent.service").strip()
    try:
        agent.wait(lambda: len(agent.run("ls", f"/proc/{pid}/fd").split()) > 100, "many connections")
        before = agent.claim()["slot"]
        slot = agent.wait(lambda: [one for one in agent.slots("warm") if one["slot"] != before], "a warm slot")[0]
        for process in agent.processes(slot["slot"]):
            numbers = {int(number) for number in agent.run("ls", f"/proc/{process}/fd").split()}
            held = [agent.run("readlink", f"/proc/{process}/fd/{number}").strip() for number in numbers]
            assert len(held) - held.count("/dev/null") <= 10 and not any("nbagent-config" in one for one in held), held
    finally:
        agent.run("systemctl", "stop", "holder.service")


def test_a_released_slot_leaves_no_process_mount_namespace_or_file(agent):
    notebook = agent.open()
    with notebook.kernel() as kernel:
        assert kernel.run("import subprocess; subprocess.run(['setsid', '-f', 'sleep', '600'])").status == "ok"
        known, group = record(agent, notebook.slot), shown(agent, notebook.slot)["ControlGroup"]
        pids, uid = agent.processes(notebook.slot), known["id_base"] + known["uid"]
        # The user namespace is the image's and remains.
        found = {name: link for name, link in namespaces(agent, known["pid"]).items() if name != "user"}
        ids = {link.split("[")[1].rstrip("]") for link in found.values()}

        def listed():
            return set(agent.run("lsns", "-n", "-o", "NS").split())

        assert len(pids) >= 4 and ids <= listed()
        agent.release(notebook.slot)
        assert not ids & listed()
        left = agent.run("sh", "-c", f"""
            ps -o pid= -p {','.join(map(str, pids))}
            ps -o pid= -u {uid}
            ls -d /run/nbagent/slots/{notebook.slot} /sys/fs/cgroup{group} /sys/fs/cgroup/*{group}
            grep -l nbagent/sandbox /proc/1/mountinfo /proc/$(systemctl show -P MainPID nbagent.service)/mountinfo
            systemctl list-units --all --plain --no-legend nbagent-{notebook.slot}.scope
            ls -A /run/nbagent/sandbox
            find / /run /dev /tmp -xdev -path /proc -prune -o '(' -uid {uid} -o -gid {uid} ')' -print
            grep -w '^ *{uid}:' /proc/key-users
            awk '$8 == {uid}' /proc/sysvipc/shm /proc/sysvipc/sem /proc/sysvipc/msg
            true""")
        assert left == ""


def test_a_fork_bomb_stops_at_tasks_max_and_the_slot_stays_usable(agent):
    notebook = agent.open(memory="2G")  # so that tasks end first
    # Each of its processes prints a traceback when it is interrupted.
    agent.expect(r"exceeds the log rate limit")
    bomb = "import os, time\\ntry:\\n    while True: os.fork()\\nexcept OSError: time.sleep(600)"
    with notebook.kernel() as kernel:
        assert kernel.run(f'import subprocess; subprocess.Popen(["python3", "-ISc", "{bomb}"])').status == "ok"

        def tasks():
            return agent.api.get(f"/slots/{notebook.slot}").json()["tasks"]

        agent.wait(lambda: tasks() >= 256, "the bomb to reach the limit")
        assert tasks() == 256
        assert [known["id"] for known in notebook.get("api/kernels")] == [kernel.id]
        refused = kernel.run("import subprocess; subprocess.run(['true'])")
        assert refused.status == "error" and "BlockingIOError" in refused.error
        assert agent.api.get("/healthz").status == 200
        # As by "Shut Down Kernel": the bomb is in the kernel's process group and is killed with it.
        kernel.end()
    agent.wait(lambda: tasks() < 16, "the bomb to end with its kernel")
    assert "Welcome.ipynb" in [file["name"] for file in notebook.get("api/contents")["content"]]
    assert notebook.run("6 * 7").text == "42"


def test_an_uploaded_wheel_is_installed_by_a_cell_and_imported_by_the_next(agent):
    notebook = agent.open()
    name, content = wheel()
    body = {"type": "file", "format": "base64", "content": base64.b64encode(content).decode()}
    saved = notebook.router.call("PUT", f"{notebook.base}api/contents/{name}", body, notebook.headers)
    assert saved.status == 201
    with notebook.kernel() as kernel:
        installed = kernel.run(f"!pip install --no-index ./{name}", timeout=120)
        assert "Successfully installed tiny-answer-1.0" in installed.stream
        result = kernel.run("import tiny_answer; print(tiny_answer.ANSWER, tiny_answer.__file__)")
        assert result.stream.startswith("42 /home/jovyan/.local/")
