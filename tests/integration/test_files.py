# SPDX-License-Identifier: BSD-3-Clause
"""Files in a slot: in the home as on a disk, elsewhere with documented differences; and the answers when it is full, or
has no processes and threads left.
"""

import json
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from execd import execd_image

PROGRAM = Path(__file__).with_name("files.py")
# Results of a tmpfs that are not those of ext4, before Linux 6.6.
OLD_TMPFS = {"user_attributes": "ENOTSUP", "direct_input_and_output": "EINVAL"}
# The files that files.py needs in an image: in the home, and in a directory that all may write to.
GIVE = """
for at in srv home/jovyan; do mkdir -p $at; python3 /root/files.py --give $at/open; done
chmod -R a+rwX srv
"""
# Fills the storage to its last page.
FILL = """
with open("big", "wb", buffering=0) as big:
    try:
        while big.write(b"x" * 65536): pass
    except OSError as error:
        print(error.strerror)
"""
# Starts threads as long as the slot has tasks.
START_THREADS = """
import threading
try:
    while True: threading.Thread(target=threading.Event().wait, daemon=True).start()
except RuntimeError as error:
    print(error)
"""
NO_TASKS = re.compile(r"This notebook server has \d+ of at most 36 processes and threads, so that no kernel or terminal"
                      r" can be started: a kernel has 12 or more\. Shut down kernels and terminals that are not in use,"
                      r" and try again\.")
FULL = re.compile(r"The storage of this notebook is full: 24 MiB, in \d+ of at most 6144 files\. Delete files in"
                  r" the home directory, /tmp, /var/tmp or /dev/shm, and try again\.")


@pytest.fixture(scope="module")
def on_disk():
    """The results of files.py in a directory of this machine."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        for argv in (["--give", directory], [directory]):
            output = subprocess.run([sys.executable, "-I", PROGRAM, *argv], stdout=subprocess.PIPE, check=True).stdout
    found = json.loads(output)
    # A disk with these, in particular, so that the comparison is not with an overlay.
    assert found["one_device_for_files_and_directories"] == 1 and found["user_attributes"][0] == "value"
    assert found["rename_a_directory_of_the_image"] == ["before", []] and found["remove_a_tree_of_the_image"] == []
    return found


def in_slot(kernel, directory, give):
    """The results of files.py in a directory of the slot."""
    assert kernel.run(f"open('/tmp/files.py', 'w').write({PROGRAM.read_text()!r})", timeout=180).status == "ok"
    result = kernel.run(f"""
import subprocess, sys
program = [sys.executable, "/tmp/files.py"]
if {give}:
    subprocess.run([*program, "--give", {directory!r}], check=True)
print(subprocess.run([*program, {directory!r}], check=True, stdout=subprocess.PIPE).stdout.decode())
""", timeout=600)
    assert result.status == "ok", result
    return json.loads(result.stream)


def differences(found, expected):
    return {name: (found[name], wanted) for name, wanted in expected.items() if found[name] != wanted}


def delete(notebook, path):
    return notebook.router.call("DELETE", f"{notebook.base}api/contents/{path}", headers=notebook.headers).status


@pytest.mark.cgroup2
def test_files_of_the_home_behave_as_on_a_disk(any_agent, on_disk):
    any_agent.wait_warm()
    notebook = any_agent.open()
    with notebook.kernel() as kernel:
        release = kernel.run("import os; print(os.uname().release)", timeout=180).stream
        old = tuple(map(int, re.findall(r"\d+", release)[:2])) < (6, 6)
        expected = on_disk | (OLD_TMPFS if old else {})
        assert not differences(in_slot(kernel, "/home/jovyan/new", give=True), expected)
        # Directories that came with the image.
        result = kernel.run("""
import json, os, shutil
os.rename(".local/lib", "moved")
os.rename(".local", "local")
shutil.rmtree("moved")
os.rmdir("local/bin")
shutil.rmtree("local")
print(json.dumps([os.path.exists(name) for name in (".local", "local", "moved")]))
""", timeout=180)
        assert result.status == "ok", result
        assert json.loads(result.stream) == [False] * 3
        free = "import os; os.statvfs('.').f_bavail * os.statvfs('.').f_frsize"
        assert kernel.run("import shutil; shutil.rmtree('new')", timeout=180).status == "ok"
        before = int(kernel.run(free).text)
        make = "import os; os.makedirs('a/b'); [open(f, 'wb').write(b'x' * (8 << 20)) for f in ('x', 'a/b/x')]"
        assert kernel.run(make, timeout=180).status == "ok"
        assert int(kernel.run(free).text) <= before - (16 << 20)
        assert [delete(notebook, path) for path in ("x", "a", "Welcome.ipynb", "nothing")] == [204, 204, 204, 404]
        # Less than the space of the deleted files is in use for anything else.
        assert int(kernel.run(free).text) >= before - (1 << 20)


@pytest.fixture
def execd(agent):
    """The name of an image whose slots start by exec."""
    agent.host.copy_in([str(PROGRAM)], "/root/")
    with execd_image(agent, GIVE) as name:
        yield name
    agent.run("rm", "/root/files.py")


def test_the_same_by_exec_and_in_directories_of_the_image_that_everyone_may_write_to(agent, execd, on_disk):
    notebook = agent.open(image=execd)
    with notebook.kernel() as kernel:
        assert not differences(in_slot(kernel, "/home/jovyan/open", give=False), on_disk)
        assert not differences(in_slot(kernel, "/srv/open", give=False), on_disk)
        for directory in ("/tmp/new", "/var/tmp/new"):
            assert not differences(in_slot(kernel, directory, give=True), on_disk)
        assert kernel.run("open('x', 'w').close()").status == "ok"
    assert [delete(notebook, path) for path in ("x", "open", "Welcome.ipynb")] == [204, 204, 204]


@contextmanager
def slots_with(agent, settings):
    """The shared host with these settings; afterwards the pool has the former ones."""
    for one in (settings, ""):
        agent.configure(one)
        for slot in agent.slots("warm"):
            agent.release(slot["slot"])
        agent.wait_warm()
        if one:
            yield agent


@pytest.fixture
def small_storage(agent):
    """The shared host with slots of 24 MB of storage."""
    with slots_with(agent, '[slots]\nstorage = "24M"\n') as changed:
        yield changed


@pytest.fixture
def few_tasks(agent):
    """The shared host with slots of 36 processes and threads, for two kernels, and an image that starts by exec."""
    with slots_with(agent, "[slots]\ntasks = 36\n") as changed, execd_image(changed):
        yield changed


def caller(notebook):
    """A function for requests to the slot, that gives the status and the JSON of the response."""
    def call(method, path, body=None):
        answer = notebook.router.call(method, f"{notebook.base}{path}", body, notebook.headers)
        return answer.status, answer.json() if answer.body else None

    return call


def test_a_full_storage_is_said_and_kernels_start(small_storage):
    notebook = small_storage.open()
    call = caller(notebook)

    with notebook.kernel() as kernel:
        assert kernel.run(FILL).stream == "No space left on device\n"
    document = {"type": "file", "format": "text", "content": "x" * 100_000}
    page = {"raw": "{}"}
    for method, path, body in (
        ("PUT", "api/contents/new.txt", document),
        ("PUT", "api/contents/Welcome.ipynb", document),
        ("POST", "api/contents", {"type": "notebook"}),
        ("POST", "api/contents/Welcome.ipynb/checkpoints", {}),
        ("PUT", "lab/api/settings/@jupyterlab/apputils-extension:themes", page),
    ):
        status, problem = call(method, path, body)
        assert status == 507 and FULL.fullmatch(problem["message"]), (path, status, problem)
    # Nothing of the former content is lost.
    assert call("GET", "api/contents/Welcome.ipynb")[1]["content"]["cells"]
    session = {"path": "Welcome.ipynb", "type": "notebook", "name": "", "kernel": {"name": "python3"}}
    assert call("POST", "api/sessions", session)[0] == 201
    assert call("POST", "api/terminals", {})[0] == 200
    assert call("PATCH", "api/contents/Welcome.ipynb", {"path": "W.ipynb"})[0] == 200
    assert notebook.run("6 * 7").text == "42"
    assert call("DELETE", "api/contents/big")[0] == 204
    assert call("PUT", "api/contents/new.txt", document)[0] in (200, 201)


def test_a_kernel_for_which_a_slot_has_no_tasks_left_is_refused_with_the_reason(few_tasks):
    for image in ("minimal", "execd"):
        notebook = few_tasks.open(image=image)
        call = caller(notebook)
        kernels = [notebook.kernel() for _ in range(2)]
        assert [kernel.run("6 * 7").text for kernel in kernels] == ["42", "42"]
        session = {"path": "Welcome.ipynb", "type": "notebook", "name": "", "kernel": {"name": "python3"}}
        for path, body in (("api/kernels", {}), ("api/sessions", session)):
            status, problem = call("POST", path, body)
            assert status == 503 and NO_TASKS.fullmatch(problem["message"]), (image, path, status, problem)
        assert {known["id"] for known in notebook.get("api/kernels")} == {kernel.id for kernel in kernels}
        assert kernels[0].run(START_THREADS).stream == "can't start new thread\n"
        status, problem = call("POST", "api/terminals", {})
        assert status == 503 and NO_TASKS.fullmatch(problem["message"]), (image, status, problem)
        for kernel in kernels:
            kernel.end()
        assert call("POST", "api/terminals", {})[0] == 200
        assert notebook.run("6 * 7").text == "42"


def test_a_kernel_whose_shared_memory_is_beyond_the_storage_ends_with_the_reason(small_storage):
    notebook = small_storage.open()
    with notebook.kernel() as kernel:
        cell = kernel.send("""
from multiprocessing import shared_memory
segment = shared_memory.SharedMemory(create=True, size=48 << 20)
print("made", flush=True)
segment.buf[:] = bytes(48 << 20)
""")
        text = kernel.receive("stream", name="stderr")
        assert text["parent_header"]["msg_id"] == cell
        assert re.match(r"The kernel was ended by SIGBUS: the storage of this notebook had no room .* 24 MiB",
                        text["content"]["text"])
        kernel.receive("status", execution_state="restarting")
