# SPDX-License-Identifier: BSD-3-Clause
"""Images whose code in the zygote is hostile: its limits, its output, and what it may do to slots that it forks.

One image preloads a module whose source a test replaces in the image's tree on the host; the next zygote runs it. Each
hostile zygote is refused or ended with a reason in the journal, and the image's slots start by exec or from the next
zygote.
"""

from __future__ import annotations

import re
import textwrap

import forked
import pytest

from nbagent.core.events import Event

IMAGE = "hostile"
# Modules that the image preloads beside the one whose source most tests replace.
THREAD, FILE, ILL = "starts_a_thread", "opens_a_file", "executes_what_the_processor_lacks"
# Without pauses between the zygotes that fail.
SETTINGS = f'[pool]\nbackoff = "0.1s"\nbackoff_max = "0.2s"\n[images.{IMAGE}]\nwarm = 0\n'
# Hostile modules.
DECOY = """
    import os, subprocess, sys
    main = sys.modules["__main__"]
    pidfd_open, decoy = os.pidfd_open, subprocess.Popen(["sleep", "600"])
    os.pidfd_open = lambda pid: pidfd_open(decoy.pid)
    main.Zygote.check = lambda self, request: None
"""
KEEPER = """
    import os, sys
    main = sys.modules["__main__"]
    fork = main.Zygote._fork
    def keep(self, request):
        os.dup(request.fds["listen"])
        return fork(self, request)
    main.Zygote._fork, main.Zygote.check = keep, lambda self, request: None
"""
WORKER = """
    import signal, sys, time
    main = sys.modules["__main__"]
    fork = main.Zygote._fork
    def spin(*_):
        until_s = time.process_time() + 20
        while time.process_time() < until_s:
            pass
    def work(self, request):
        pid = fork(self, request)
        signal.signal(signal.SIGALRM, spin)
        signal.alarm(1)
        return pid
    main.Zygote._fork = work
"""


HANG = """
    import asyncio
    from jupyter_server.services.api.handlers import APIStatusHandler
    async def get(self):
        await asyncio.Event().wait()
    APIStatusHandler.get = get
"""


@pytest.fixture(scope="module")
def module(shared, packages, tmp_path_factory):
    """The path on the host of the module that the image preloads."""
    manifest = f'preload = ["hostile", "{THREAD}", "{FILE}", "{ILL}"]\n'
    added = forked.add_image(shared, packages, tmp_path_factory.mktemp("image"), IMAGE, manifest)
    path = shared.run("sh", "-c", f"ls -d {added['root']}/usr/local/lib/python3.*/dist-packages").strip()
    shared.run("sh", "-c", f"for name in hostile {THREAD} {FILE} {ILL}; do echo pass > {path}/$name.py; done")
    yield f"{path}/hostile.py"
    shared.run("nbagent", "image", "remove", IMAGE)
    deletes = ("systemctl", "show", "-P", "ActiveState", "nbagent-sweep.service")
    shared.wait(lambda: shared.run(*deletes).strip() == "inactive", "the deletion of the image")


@pytest.fixture
def attack(agent, module):
    """Starts zygotes with a hostile module. The next test replaces them."""
    agent.expect(rf"zygote {IMAGE}:\S+ (failed|exceeds|of image {IMAGE}: the (module|extension))")
    agent.expect(rf"^nbagent-zygote@{IMAGE}:\S+: ")
    agent.expect(rf"slot \S+ did not start|pool {IMAGE} pauses")
    agent.configure(SETTINGS)

    def start(source: str) -> int:
        """Replaces the module and all zygotes of the image; returns the number of journal entries before that."""
        agent.run("sh", "-c", f"cat > {module}", input=textwrap.dedent(source))
        seen = len(entries(agent))
        agent.run("systemctl", "kill", "-s", "KILL", f"nbagent-zygote@{IMAGE}:*", check=False)
        for slot in agent.slots("warm"):
            if slot["image"] == IMAGE:
                agent.release(slot["slot"])
        return seen

    return start


def entries(agent):
    """The journal's entries about the image's zygotes."""
    return agent.journal("-t", "nbagent", f"NBAGENT_IMAGE={IMAGE}")


def ready(agent, seen):
    """Waits for a zygote that is ready after `seen` entries, and not to be replaced; returns its unit."""
    def found():
        units = [e["NBAGENT_ZYGOTE"] for e in entries(agent)[seen:] if "is ready after" in e["MESSAGE"]]
        image = next(image for image in agent.api.get("/images").json() if image["name"] == IMAGE)
        return image["launch_now"] == "fork" and not image["launch_reason"] and units

    return f"nbagent-zygote@{agent.wait(found, 'a complete zygote')[-1]}.service"


def failure(agent, seen, pattern):
    """Waits for an entry about a zygote's failure that matches, and returns its text."""
    def found():
        texts = [entry.get("NBAGENT_TEXT", "") for entry in entries(agent)[seen:] if "failed" in entry["MESSAGE"]]
        return next((text for text in texts if re.search(pattern, text)), None)

    try:
        return agent.wait(found, f"a failed zygote: {pattern}")
    except AssertionError as error:
        raise AssertionError(f"{error}; the journal has {[e['MESSAGE'] for e in entries(agent)[seen:]]}") from error


def by_fork(agent, slot):
    return "nbagent.runtime.zygote_service" in agent.run("cat", f"/proc/{agent.processes(slot)[0]}/cmdline")


@pytest.mark.parametrize(("source", "pattern"), [
    ("block = b'x' * (2 << 30)", "the zygote was killed by SIGKILL|the zygote service ended"),
    ("""
     import os, time
     for _ in range(1000):
         if os.fork() == 0:
             time.sleep(600)
             os._exit(0)
     """, "can't start new thread"),
    ("import socket; socket.socket(fileno=3).send(b'x' * 150_000)", "a packet of more than 65536 bytes"),
    ("""
     import socket; socket.socket(fileno=3).send(b'{"failure": {"step": "x", "errno": 1e999, "text": ""}}')
     """, "not an integer"),
], ids=["memory", "processes", "long packet", "malformed failure"])
def test_a_zygote_that_exceeds_what_it_may_is_ended_and_slots_start_by_exec(agent, attack, source, pattern):
    seen = attack(source)
    text = failure(agent, seen, pattern)
    assert len(text) < 2000
    # The image's slots are started without it, and PID 1 has ended all that it started.
    assert not by_fork(agent, agent.claim(image=IMAGE)["slot"])


def test_a_zygote_has_the_limits_of_a_slot_and_its_output_a_budget(agent, attack):
    seen = attack("""
        import sys
        for number in range(600):
            sys.stderr.write("<0>" + "x" * 16000 + "\\n")
    """)
    unit = ready(agent, seen)
    shown = agent.run("systemctl", "show", unit, "-p", "MemoryMax,MemorySwapMax,TasksMax,CPUWeight").split()
    claimed = agent.claim(image=IMAGE)["slot"]
    limits = next(slot["limits"] for slot in agent.slots() if slot["slot"] == claimed)
    assert set(shown) == {
        f"MemoryMax={1 << 30}", "MemorySwapMax=0", f"TasksMax={limits['tasks']}", f"CPUWeight={limits['cpu_weight']}",
    }
    # An image that is hostile no longer has its slots by fork again.
    assert by_fork(agent, claimed)
    printed = [entry for entry in agent.journal(f"_SYSTEMD_UNIT={unit}") if "xxxx" in entry["MESSAGE"]]
    assert printed and sum(len(entry["MESSAGE"]) for entry in printed) < 2 << 20
    assert {entry["PRIORITY"] for entry in printed} == {"6"}
    dropped = agent.wait(
        lambda: [e for e in agent.journal("-t", "nbagent") if "NBAGENT_LINES" in e and unit[16:-8] in e["MESSAGE"]],
        "the entry about dropped lines",
    )
    # The first entry has the lines of a second, and the next one comes a minute later.
    assert sum(int(entry["NBAGENT_LINES"]) for entry in dropped) > 0


@pytest.mark.parametrize(("source", "pattern"), [
    (DECOY, "is not a child of the zygote in the slot's pid namespace"),
    (KEEPER, r"it keeps descriptors that it did not have when it was ready: \d+"),
    (WORKER, r"it used \d+ s of processor time for 1 slots"),
], ids=["decoy", "kept listener", "processor time"])
def test_a_zygote_that_serves_a_slot_itself_is_ended_with_all_its_processes(agent, attack, source, pattern):
    seen = attack(source)
    unit = ready(agent, seen)
    claimed = agent.claim(image=IMAGE)["slot"]
    failure(agent, seen, pattern)
    agent.release(claimed)
    agent.wait(
        lambda: agent.run("systemctl", "is-active", unit, check=False).strip() != "active",
        "the end of the hostile zygote with all its processes",
    )
    assert not agent.run("pgrep", "-fx", "sleep 600", check=False)


STARTS_A_THREAD = "import threading, time; threading.Thread(target=time.sleep, args=[600], daemon=True).start()"
OPENS_A_FILE = """
    import mmap
    database, memory = open("/home/jovyan/common.db", "a"), mmap.mmap(-1, 4096)
"""
EXTENSION = """
import multiprocessing, os
from jupyter_server.base.handlers import JupyterHandler
from jupyter_server.utils import url_path_join

class Opened(JupyterHandler):
    def get(self):
        self.finish(dict(self.settings["opened"], serves=os.getpid(), ticks=TICKS))

class Child(JupyterHandler):
    def get(self):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            self.finish({"modules": pool.apply(eval, ["sorted(__import__('sys').modules)"])})

TICKS = []

def _jupyter_server_extension_points():
    return [{"module": "opened"}]

def _load_jupyter_server_extension(server):
    database = open(server.data_dir + "/opened.db", "a")
    server.web_app.settings["opened"] = {
        "loaded": os.getpid(), "owner": os.fstat(database.fileno()).st_uid, "base": server.web_app.settings["base_url"]}
    server.database = database
    server.io_loop.call_later(0, TICKS.append, 1)
    server.web_app.add_handlers(".*$", [
        (url_path_join(server.base_url, "opened"), Opened), (url_path_join(server.base_url, "child"), Child)])
"""


def test_modules_and_extensions_that_a_fork_would_break_are_left_out_and_named(agent, attack, module):
    packages = module.rpartition("/")[0]
    prefix = packages[:packages.rindex("/lib/")]
    extension = f"{prefix}/etc/jupyter/jupyter_server_config.d/opened.json"
    files = {
        f"{packages}/opened.py": EXTENSION, extension: '{"ServerApp": {"jpserver_extensions": {"opened": true}}}',
        f"{packages}/{THREAD}.py": STARTS_A_THREAD, f"{packages}/{FILE}.py": OPENS_A_FILE,
        f"{packages}/{ILL}.py": "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
    }
    try:
        for path, text in files.items():
            agent.run("sh", "-c", f"cat > {path}", input=textwrap.dedent(text))
        unit = ready(agent, attack("raise RuntimeError('ü' * 60_000)"))
        zygote = unit[len("nbagent-zygote@"):-len(".service")]
        left_out = f"MESSAGE_ID={Event.ZYGOTE_LEFT_OUT.value.message_id}"
        notes = [entry["NBAGENT_TEXT"] for entry in agent.journal(f"NBAGENT_ZYGOTE={zygote}", left_out)]
        assert len(notes) == 5 and all(len(note) <= 300 for note in notes), notes
        for pattern in (
            r"the module hostile is not preloaded: its import failed: RuntimeError\('ü",
            rf"the module {THREAD} is not preloaded: .*1 threads run",
            rf"the module {FILE} is not preloaded: .*common.db is open",
            rf"the module {ILL} is not preloaded: its import ended the zygote, which was killed by SIGILL",
            "the extension opened is loaded in each slot after the fork: .*/.local/share/jupyter/opened.db is open",
        ):
            assert sum(bool(re.match(pattern, note)) for note in notes) == 1, (pattern, notes)
        for notebook in (agent.open(image=IMAGE), agent.open(image=IMAGE)):
            assert by_fork(agent, notebook.slot)
            found = notebook.get("opened")
            assert found["loaded"] == found["serves"] and found["base"] == notebook.base and found["owner"] > 0
            assert notebook.get("opened")["ticks"] == [1]
        # A child that the server starts by multiprocessing executes nothing of the zygote.
        assert not [name for name in notebook.get("child")["modules"] if re.match("nbagent|jupyter", name)]
        table = agent.host.run(["nbagent", "image", "check", IMAGE], check=False, timeout=300).stdout
        for named in (
            "module hostile is not", f"module {THREAD} is not", f"module {ILL} is not",
            "extension opened is loaded in each slot",
        ):
            assert re.search(rf"^zygote +warn +the {named}", table, re.MULTILINE), table
    finally:
        agent.run("rm", "-f", extension, f"{packages}/opened.py")
        agent.run("sh", "-c", f"for name in {THREAD} {FILE} {ILL}; do echo pass > {packages}/$name.py; done")


def test_image_check_names_a_handler_that_hangs(agent, attack):
    ready(agent, attack(HANG))
    done = agent.host.run(["nbagent", "image", "check", IMAGE], check=False, timeout=300)
    assert done.returncode == 1, done
    assert re.search(r"^launch +ok +fork$", done.stdout, re.MULTILINE), done.stdout
    pattern = r"^handlers +fail +GET api/status of jupyter_server\S+: no response in 10 s"
    assert re.search(pattern, done.stdout, re.MULTILINE), done.stdout


def test_an_image_whose_slots_would_share_open_files_starts_by_exec(agent, attack):
    """The last test of the image, because no zygote of it is started afterwards."""
    seen = attack("""
        import gc
        opened = []
        def open_once(phase, _facts):
            if not opened:
                opened.append(open("/home/jovyan/common.db", "a"))
        gc.callbacks.append(open_once)
    """)
    # A quick zygote, which has no warm-up, collects garbage too.
    reason = "/home/jovyan/common.db, opened by"
    failure(agent, seen, reason)
    text = failure(agent, seen, "no zygote")
    assert "no zygote is started again before the image changes" in text
    done = agent.host.run(["nbagent", "image", "check", IMAGE], check=False, timeout=300)
    assert done.returncode == 0, done
    assert re.search(rf"^launch +warn +exec: .*{reason}", done.stdout, re.MULTILINE), done.stdout
    (image,) = (found for found in agent.api.get("/images").json() if found["name"] == IMAGE)
    assert (image["launch"], image["launch_now"], reason in image["launch_reason"]) == ("fork", "exec", True)
    one, other = (agent.claim(image=IMAGE)["slot"] for _ in range(2))
    assert not by_fork(agent, one) and not by_fork(agent, other)
    slot = agent.api.get(f"/slots/{one}").json()
    assert (slot["launch"], reason in slot["launch_reason"]) == ("exec", True)
