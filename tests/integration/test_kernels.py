# SPDX-License-Identifier: BSD-3-Clause
"""Kernels by fork: they behave as other kernels do, start by exec where necessary, and share no secret.

The slots are forked in the image minimal without an agent (forked.py), with the real fork server, provisioner and
kernels.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import lazy
import pytest
from forked import Slot

import memory_checks
from nbagent.zygote.memory.sharing import PRIVATE_MEMORY_OPTION, QUICK_OPTION
from testhost_driver import rootfs

KERNEL_TEST = "jupyter_kernel_test==0.7.0"
VARIABLES = "PYTHONPATH=/srv/modules PYTHONHASHSEED=7"


@pytest.fixture(scope="module")
def tree(packages: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The image minimal, unpacked."""
    (package,) = (path for path in packages if "image-minimal" in path.name)
    directory = tmp_path_factory.mktemp("image")
    yield forked.unpack(package, directory)
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("slots")
    for path in (directory, directory.parent):
        path.chmod(0o755)
    return directory


def make_shared(shared: Path) -> Path:
    """Creates a directory that the user of a slot can reach."""
    shared.mkdir()
    for path in (shared, *list(shared.parents)[:3]):
        path.chmod(0o755)
    return shared


@pytest.fixture(scope="module")
def slots(tree: Path, shared: Path) -> Iterator[list[Slot]]:
    with forked.slots(tree, shared, 2, variables=VARIABLES) as made:
        yield made


@pytest.fixture
def slot(slots: list[Slot]) -> Slot:
    return slots[0]


# A forked kernel has the modules of the zygote.
FORKED = "'nbagent.zygote.kernel' in __import__('sys').modules"


def test_the_public_test_suite_of_kernels_passes(tree: Path, tmp_path: Path) -> None:
    cache = rootfs.cache() / KERNEL_TEST.replace("==", "-")
    if not cache.is_dir():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "suite",
                        KERNEL_TEST], check=True, timeout=300)
        cache.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", tmp_path / "suite", cache], check=True)
    shared = make_shared(tmp_path / "shared")
    subprocess.run(["cp", "-r", cache, shared / "suite"], check=True)
    command = forked.command(tree, shared, forked.FORKED_SLOT, "suite", "/run/shared/suite")
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "test_it_is_a_fork" in done.stderr, done.stderr[-5000:]
    # The suite skips tests that do not apply to a kernel. At least these have to run.
    for name in ("execute_stdout", "execute_stderr", "completion", "error", "execute_result", "display_data", "pager",
                 "inspect", "clear_output", "is_complete", "kernel_info"):
        assert any(name in line and line.endswith("ok") for line in done.stderr.splitlines()), (name, done.stderr)


def test_the_warm_up_leaves_the_servers_state_intact(slot: Slot) -> None:
    assert slot.call("GET", "/modules")["whole"]


def test_warm_up_kernels_leave_no_threads_and_no_tracebacks(slot: Slot) -> None:
    with slot.kernel() as kernel:
        # A thread that has ended but is still referenced keeps a whole warm-up kernel in memory.
        dead = "import threading; [thread.name for thread in threading._dangling if not thread.is_alive()]"
        assert kernel.value(dead) == "[]"
        assert kernel.value("import sys; [name for name in vars(sys) if name.startswith('last_')]") == "[]"


def test_nothing_is_imported_after_the_fork(slot: Slot) -> None:
    found = lazy.imported(slot)
    assert found == {"kernel": [], "server": []}, f"run {lazy.COMMAND}"


# The facts that a forked kernel shows otherwise than one that was started by exec, with the reasons.
OTHER_THAN_BY_EXEC = {
    "descriptors": "standard input is /dev/null, where jupyter_client leaves a pipe whose other end is closed",
    "threads": "PR_SET_PDEATHSIG replaces the thread that polls whether the server runs",
    "finders": "six, a module of the server, has an importer for six.moves",
    "status": "readline, loaded in the zygote, handles SIGWINCH only when a program starts it",
    "loggers": "the modules that a kernel imports when needed are loaded, and jedi's parso has set a level",
    "start of environment": "the test's own variable",
    "environment": "the test's own variable",
}


def facts_of(kernel: forked.Kernel) -> dict[str, Any]:
    code = (forked.HERE / "facts.py").read_text().split('"""', 2)[2]
    found: dict[str, Any] = json.loads(kernel.run(f"{code}\nimport json; print(json.dumps(facts()))")["stream"])
    del found["environment"]["JPY_PARENT_PID"]
    return found


def test_a_forked_kernel_shows_the_facts_of_one_that_was_started_by_exec(slot: Slot) -> None:
    """Both are of the same image; PYTHONPATH and PYTHONHASHSEED, of the image, count in both."""
    compare_facts(slot)


def test_a_kernel_of_a_quick_zygote_shows_the_same_facts(tree: Path, tmp_path: Path) -> None:
    with forked.slots(tree, make_shared(tmp_path / "shared"), 1, QUICK_OPTION, variables=VARIABLES) as (slot,):
        compare_facts(slot)


def compare_facts(slot: Slot) -> None:
    spec = {"argv": ["/usr/bin/python3", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "By exec", "language": "python", "env": {"LD_TEST": "a variable of a program's start"}}
    with slot.kernel() as kernel:
        kernel.value("import os; d = os.path.expanduser('~/.local/share/jupyter/kernels/execd'); os.makedirs(d); "
                     f"open(d + '/kernel.json', 'w').write({json.dumps(spec)!r})")
    with slot.kernel() as kernel, slot.kernel(name="execd") as other:
        assert (kernel.value(FORKED), other.value(FORKED)) == ("True", "False")
        by_fork, by_exec = facts_of(kernel), facts_of(other)
    assert "/srv/modules" in by_fork["path"] and by_fork["hash"][1] is not None
    others = {name: (by_fork[name], by_exec[name]) for name in by_exec if by_fork[name] != by_exec[name]}
    assert not others.keys() - OTHER_THAN_BY_EXEC.keys(), others
    assert by_fork["descriptors"]["0"] == "/dev/null" and by_exec["descriptors"]["0"] == "pipe:[N]"
    assert by_exec["environment"].pop("LD_TEST") and by_fork["environment"] == by_exec["environment"]


def test_files_that_are_not_closed_have_their_data_after_a_restart(slot: Slot) -> None:
    with slot.kernel() as kernel:
        kernel.run("import zipfile, types\n"
                   "text = open('/tmp/text', 'w'); text.write('one'); raw = open('/tmp/raw', 'wb'); raw.write(b'two')\n"
                   "class Late:\n    def __del__(self): open('/tmp/late', 'w').write('three')\n"
                   "late = Late(); late.late = late\n"
                   "archive = zipfile.ZipFile('/tmp/archive', 'w'); archive.writestr('member', 'four')")
        slot.call("POST", f"/api/kernels/{kernel.id}/restart")
        kernel.wait_restarted()
        assert kernel.value("[open(f'/tmp/{name}').read() for name in ('text', 'raw', 'late')]") == (
            "['one', 'two', 'three']")
        assert kernel.value("import zipfile; zipfile.ZipFile('/tmp/archive').read('member')") == "b'four'"


def test_cells_streams_display_and_shell(slot: Slot) -> None:
    with slot.kernel() as kernel:
        assert kernel.value(FORKED) == "True"
        assert kernel.run("import os; print('a'); os.system('echo b')\n!echo c")["stream"].split() == ["a", "b", "c"]
        assert kernel.run("import os; os.write(2, b'low\\n')")["status"] == "ok"
        assert kernel.run("1 / 0")["error"] == "ZeroDivisionError: division by zero"
        pixel = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(9)).decode()
        shown = kernel.run(f"import base64; from IPython.display import Image; Image(base64.b64decode('{pixel}'))")
        assert shown["data"]["image/png"].strip() == pixel
        assert kernel.value("(await __import__('asyncio').sleep(0, 7))") == "7"
        assert kernel.run("print(input('name? '))", typed="Ada")["stream"] == "Ada\n"
        assert "path" in kernel.ask("complete_request", {"code": "import os; os.pat", "cursor_pos": 17})["matches"]
        assert kernel.value("type(get_ipython()).__name__, __name__") == "('ZMQInteractiveShell', '__main__')"
        assert kernel.value("get_ipython().history_manager.enabled") == "False"  # as the image has it configured
        assert kernel.value("import sys, os; ('' in sys.path, os.path.expanduser('~/.local') in str(sys.path), "
                            "os.readlink('/proc/self/fd/0'), 'TERM' in os.environ)") \
            == "(True, True, '/dev/null', True)"
        # The server can write the kernel's oom_score_adj.
        assert kernel.value("os.stat('/proc/self/oom_score_adj').st_uid == os.getuid()") == "True"


def test_a_kernel_has_room_for_its_descriptors(slot: Slot) -> None:
    """A descriptor table that grows stops all of the kernel's threads: linux/process.py."""
    with slot.kernel() as kernel:
        status = kernel.run("print(open('/proc/self/status').read())")["stream"]
        room = int(status.partition("FDSize:")[2].split()[0])
        assert room >= 256 > int(kernel.value("len(__import__('os').listdir('/proc/self/fd'))"))


def test_threads_subprocesses_and_multiprocessing(slot: Slot) -> None:
    with slot.kernel() as kernel:
        assert kernel.value("import subprocess; subprocess.run(['echo', 'x'], capture_output=True).stdout") == "b'x\\n'"
        assert kernel.value("from concurrent.futures import ThreadPoolExecutor as T; list(T().map(abs, [-1, -2]))") \
            == "[1, 2]"
        for how in ("fork", "spawn"):
            assert kernel.value(f"import multiprocessing as m; p = m.get_context('{how}').Pool(2); "
                                "r = p.map(abs, [-1, -2]); p.close(); p.join(); r") == "[1, 2]"


def test_comms_carry_messages_both_ways(slot: Slot) -> None:
    with slot.kernel() as kernel:
        opened = kernel.start("import comm; c = comm.create_comm(target_name='t', data={'a': 1})\n"
                              "got = []; c.on_msg(lambda m: got.append(m['content']['data']))")
        comm_id = kernel.wait_for("comm_open", target_name="t")["content"]["comm_id"]
        kernel.finish(opened)
        kernel.send("comm_msg", {"comm_id": comm_id, "data": {"b": 2}})
        assert kernel.value("got") == "[{'b': 2}]"


def test_interrupt_reaches_the_cell_and_its_children(slot: Slot) -> None:
    command = "sleep 60.219"  # a number that no other program of this machine has
    with slot.kernel() as kernel:
        for code in ("import time; print('on', flush=True); time.sleep(60)", f"print('on', flush=True)\n!{command}"):
            cell = kernel.start(code)
            kernel.wait_for("stream", text="on\n")
            deadline_s = time.monotonic() + 30
            while command in code and not runs(command) and time.monotonic() < deadline_s:
                time.sleep(0.05)
            assert runs(command) == (command in code)
            slot.call("POST", f"/api/kernels/{kernel.id}/interrupt")
            assert kernel.finish(cell)["status"] in ("error", "ok")
        assert kernel.value("6 * 7") == "42"
        assert not runs(command)


def runs(command: str) -> bool:
    """Whether a process has this command line."""
    return subprocess.run(["pgrep", "-fx", command], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_restart_and_autorestart_fork_anew(slot: Slot) -> None:
    with slot.kernel() as kernel:
        first = kernel.value("x = 1; import os; os.getpid()")
        slot.call("POST", f"/api/kernels/{kernel.id}/restart")
        kernel.wait_restarted()
        assert kernel.run("x")["error"].startswith("NameError")
        second = kernel.value(f"import os; assert {FORKED}; os.getpid()")
        assert second != first
        kernel.start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        kernel.wait_for("status", execution_state="restarting")
        kernel.wait_restarted()
        third = kernel.value(f"import os; assert {FORKED}; os.getpid()")
        assert third not in (first, second)


def test_the_debugger_stops_at_a_breakpoint(slot: Slot) -> None:
    with slot.kernel() as kernel:
        assert kernel.debug("initialize", clientID="test", adapterID="", pathFormat="path", linesStartAt1=True,
                            columnsStartAt1=True)["success"]
        assert kernel.debug("attach")["success"]
        code = "a = 1\nb = a + 1\nprint(b)"
        path = kernel.debug("dumpCell", code=code)["body"]["sourcePath"]
        assert kernel.debug("setBreakpoints", breakpoints=[{"line": 2}], source={"path": path},
                            sourceModified=False)["success"]
        kernel.debug("configurationDone")
        kernel.start(code)
        thread = kernel.wait_for("debug_event", event="stopped")["content"]["body"]["threadId"]
        frames = kernel.debug("stackTrace", threadId=thread)["body"]["stackFrames"]
        assert frames[0]["line"] == 2
        kernel.debug("continue", threadId=thread)
        printed = ""
        while printed != "2\n":
            printed += kernel.wait_for("stream", name="stdout")["content"]["text"]
            assert "2\n".startswith(printed)


SECRETS = """
import json, os, random, ssl, tempfile, uuid, multiprocessing, secrets
[random.random(), random.Random().random(), secrets.token_hex(), uuid.uuid4().hex, uuid.uuid1().hex,
 tempfile.mktemp(), ssl.RAND_bytes(8).hex(), bytes(multiprocessing.current_process().authkey).hex(),
 get_ipython().kernel.session.session, get_ipython().kernel.session.key.decode(),
 [r.random() for r in __import__('nbagent.zygote.entropy', fromlist=['x'])._generators
  if not isinstance(r, random.SystemRandom)]]
"""


def test_no_two_kernels_share_a_random_state(slots: list[Slot]) -> None:
    drawn = []
    for slot in (slots[0], slots[0], slots[1]):
        with slot.kernel() as kernel:
            drawn.append(eval(kernel.value(SECRETS)))
    assert drawn[0][-1], "no generator was found in the zygote"
    for values in zip(*drawn, strict=True):
        assert len({str(value) for value in values}) == 3, values


def test_what_the_user_configures_counts(slot: Slot) -> None:
    with slot.kernel() as kernel:
        kernel.value("import os; d = os.path.expanduser('~/.ipython/profile_default'); "
                     "os.makedirs(d + '/startup', exist_ok=True)")
        kernel.value("open(d + '/ipython_kernel_config.py', 'w').write("
                     "'c.InteractiveShell.cache_size = 77; c.HistoryManager.enabled = True')")
        kernel.value("open(d + '/startup/s.py', 'w').write('started = 8')")
        try:
            with slot.kernel() as other:
                assert other.value(f"(started, get_ipython().cache_size, {FORKED})") == "(8, 77, True)"
                assert other.value("get_ipython().history_manager.enabled") == "True"
        finally:
            kernel.run("os.unlink(d + '/ipython_kernel_config.py'); os.unlink(d + '/startup/s.py')")


def test_jupyter_lsp_has_looked_for_language_servers(slots: list[Slot]) -> None:
    """It does by a callback of the loop, which runs in the zygote or in the slot; until then this request waits."""
    for slot in slots:
        assert slot.call("GET", "/lsp/status")["version"] == 2


def test_other_kernels_start_by_exec(slot: Slot) -> None:
    with slot.kernel() as kernel:
        spec = {"argv": ["/usr/bin/python3", "-X", "utf8", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "Other", "language": "python"}
        kernel.value("import os; d = os.path.expanduser('~/.local/share/jupyter/kernels/other'); os.makedirs(d); "
                     f"open(d + '/kernel.json', 'w').write({json.dumps(spec)!r})")
        with slot.kernel(name="other") as other:
            assert other.value(FORKED) == "False"
        # A fork would use the loaded package instead of the one that the user has installed.
        kernel.value("import site; s = site.getusersitepackages(); os.makedirs(s, exist_ok=True); "
                     "open(s + '/decorator.py', 'w').close(); open(s + '/six.py', 'w').write('mine = 1')")
        try:
            with slot.kernel() as third:
                assert third.value(f"import six; (six.mine, {FORKED})") == "(1, False)"
        finally:
            kernel.run("os.unlink(s + '/decorator.py'); os.unlink(s + '/six.py')")


def test_the_same_python_by_another_name_is_forked(slot: Slot) -> None:
    with slot.kernel() as kernel:
        for number, name in enumerate(("/usr/bin/python", "/usr/bin/python3.13")):
            spec = {"argv": [name, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                    "display_name": name, "language": "python"}
            kernel.value(f"import os; d = os.path.expanduser('~/.local/share/jupyter/kernels/name{number}'); "
                         f"os.makedirs(d); open(d + '/kernel.json', 'w').write({json.dumps(spec)!r})")
    for number in range(2):
        with slot.kernel(name=f"name{number}") as named:
            assert named.value(FORKED) == "True"


def test_an_image_whose_kernel_is_of_another_python_has_slots(tree: Path, tmp_path: Path) -> None:
    """The kernel is not part of the warm-up, because it cannot be forked."""
    shared, layer = tmp_path / "shared", tmp_path / "layer"
    (layer / "opt/other/bin").mkdir(parents=True)
    program = layer / "opt/other/bin/python3"
    program.write_text('#!/bin/sh\necho started >>/run/shared/started\nexec /usr/bin/python3 "$@"\n')
    program.chmod(0o755)
    kernels = layer / "usr/local/share/jupyter/kernels/python3"
    kernels.mkdir(parents=True)
    command = ["/opt/other/bin/python3", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernels / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "Other", "language": "python"}))
    make_shared(shared)
    (shared / "started").touch()
    (shared / "started").chmod(0o666)
    with forked.slots(f"{layer}:{tree}", shared, 1) as (slot,), slot.kernel() as kernel:
        assert kernel.value(FORKED) == "False"
        assert (shared / "started").read_text() == "started\n"


def test_the_zygotes_memory_is_prepared_under_the_images_python(tree: Path, tmp_path: Path) -> None:
    """The image's Python has sys.monitoring and immortal objects; that of a Debian 12 host has not."""
    shared = make_shared(tmp_path / "shared")
    done = subprocess.run(forked.command(tree, shared, "memory_checks.py", forked.PACKAGES), stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.splitlines() == [f"{name} ok" for name in memory_checks.names((3, 13))]


MEMORY = r"""
import re
def private_kib():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(kib) for kib in re.findall(r"^Private_\w+: +(\d+)", file.read(), re.M))
("memfd:nbagent-zygote" in open("/proc/self/maps").read(), private_kib())
"""


def test_without_share_memory_slots_fork_with_ordinary_memory(slot: Slot, tree: Path, tmp_path: Path) -> None:
    shared = make_shared(tmp_path / "shared")
    with slot.kernel() as kernel:
        sharing, shared_kib = eval(kernel.value(MEMORY))
    with forked.slots(tree, shared, 1, PRIVATE_MEMORY_OPTION) as (private_slot,), private_slot.kernel() as kernel:
        assert kernel.value(FORKED) == "True"
        private, private_kib = eval(kernel.value(MEMORY))
    print(f"private memory of a kernel: {shared_kib} KiB with share_memory, {private_kib} KiB without")
    assert sharing and not private
    assert private_kib > shared_kib


def test_two_kernels_at_once(slot: Slot) -> None:
    with slot.kernel() as one, slot.kernel() as two:
        sent = one.start("import time; time.sleep(1); 'one'")
        assert two.value("'two'") == "'two'"
        assert one.finish(sent)["text"] == "'one'"


def test_a_stopped_fork_server_does_not_block_the_server(slots: list[Slot], shared: Path) -> None:
    slot = slots[1]
    values: list[str] = []

    def start() -> None:
        with slot.kernel() as kernel:
            values.append(kernel.value(FORKED))

    with slot.kernel() as kernel:
        assert kernel.value(FORKED) == "True"
        assert kernel.run("import os, signal; os.kill(os.getppid(), signal.SIGSTOP)")["status"] == "ok"
        starting = threading.Thread(target=start)
        starting.start()
        time.sleep(0.5)
        began_s = time.monotonic()
        slot.call("GET", "/modules")
        assert time.monotonic() - began_s < 2 and starting.is_alive()
        starting.join()
        assert kernel.run("os.kill(os.getppid(), signal.SIGCONT)")["status"] == "ok"
    assert values == ["False"]
    assert "the fork server: no response within" in (shared / "log").read_text()


def test_kernels_of_a_killed_fork_server_end_and_restart_by_exec(slots: list[Slot], shared: Path) -> None:
    slot = slots[1]
    with slot.kernel() as kernel:
        assert kernel.value(FORKED) == "True"
        kernel.start("import os, signal; os.kill(os.getppid(), signal.SIGKILL)")
        kernel.wait_for("status", execution_state="restarting")
        kernel.wait_restarted()
        assert kernel.value(FORKED) == "False"
    assert "exec instead of fork: the fork server has ended" in (shared / "log").read_text()


def test_many_kernels_start_at_once(slot: Slot) -> None:
    values: list[str] = []

    def start() -> None:
        with slot.kernel() as kernel:
            values.append(kernel.value("1 + 1"))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == ["2"] * 4
