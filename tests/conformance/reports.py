# SPDX-License-Identifier: BSD-3-Clause
"""Public bug reports about notebooks on servers of others, tried on slots and on a plain `jupyter lab`.

Each function repeats the steps of a report, as a user's page does them, and fails where the complaint is true. Its
value has to be the same in a slot as with the plain server. packaging/docs/conformance.md lists the reports.
"""

from __future__ import annotations

import contextlib
import json
import re
import textwrap
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import quote

import suite
import websocket

from notebook import Kernel, Notebook

TIMEOUT_S = 60
# Of functions whose value differs by design, each with the reason.
DIFFERENCES: dict[str, str] = {}
# In make test: those whose complaint was once true of slots, and some more, in two seconds.
SOME = (
    "a_terminal_has_job_control", "terminals_and_notebooks_have_the_same_programs",
    "a_terminal_shows_its_former_output_to_a_page_that_is_reloaded", "a_directory_with_broken_links_is_listed",
    "files_of_unusual_names_are_saved_renamed_and_downloaded", "output_arrives_after_a_lost_connection",
)


class Outcome(NamedTuple):
    """The result of one function: `value` is what it returned, `error` is empty if it returned."""

    value: Any
    error: str


class Report(NamedTuple):
    numbers: tuple[str, ...]
    function: Callable[[Notebook], Any]


REPORTS: dict[str, Report] = {}


def reports(*numbers: str) -> Callable[[Callable[[Notebook], Any]], Callable[[Notebook], Any]]:
    """Registers a function as the trial of these reports."""
    def register(function: Callable[[Notebook], Any]) -> Callable[[Notebook], Any]:
        REPORTS[function.__name__] = Report(numbers, function)
        return function
    return register


def user_of(server: suite.Server) -> Notebook:
    """The user of a server: of a slot, or of the plain one."""
    base = "/" + server.url.split("/", 3)[3]
    port = int(server.url.split("/")[2].rpartition(":")[2])
    user = Notebook(server.host, {"slot": base, "token": server.token}, port)
    user.base = base
    return user


def run(server: suite.Server, names: tuple[str, ...] = ()) -> dict[str, Outcome]:
    """Does what the reports say; the outcomes by the names of the functions."""
    user, found = user_of(server), {}
    for name in names or REPORTS:
        try:
            found[name] = Outcome(REPORTS[name].function(user), "")
        except Exception as error:
            found[name] = Outcome(None, f"{type(error).__name__}: {str(error)[:1500]}")
        for kernel in user.get("api/kernels"):
            user.router.call("DELETE", f"{user.base}api/kernels/{kernel['id']}", headers=user.headers)
    return found


def faults(plain: Mapping[str, Outcome], other: Mapping[str, Outcome]) -> dict[str, str]:
    """The functions that fail with a server, or return another value than with the plain one."""
    found = {}
    for name, outcome in other.items():
        differs = not plain[name].error and outcome.value != plain[name].value
        if name not in DIFFERENCES and (outcome.error or differs):
            found[name] = outcome.error or f"{outcome.value} instead of {plain[name].value}"
    return found


def table(results: Mapping[str, Mapping[str, Outcome]]) -> str:
    """The outcomes by server, as text."""
    lines = [f"{'public reports':60}" + "".join(f"{kind:>8}" for kind in results)]
    for name, report in REPORTS.items():
        row = "".join(f"{'fails' if found[name].error else 'ok':>8}" for found in results.values())
        lines.append(f"{', '.join(report.numbers):60}{row}  {name}")
    for kind, found in results.items():
        lines += [f"{kind}: {name}: {outcome.error}" for name, outcome in found.items() if outcome.error]
    return "\n".join(lines)


def cell(kernel: Kernel, code: str, timeout: float = TIMEOUT_S) -> str:
    """Runs a cell that must succeed; returns what it printed."""
    result = kernel.run(textwrap.dedent(code), timeout)
    assert result.status == "ok", f"{result.error}: {result.stream[-500:]}"
    return result.stream


@contextlib.contextmanager
def kernel_of(user: Notebook, **options: Any) -> Any:
    """A kernel, ended afterwards."""
    kernel = Kernel(user, user.post("api/kernels", options)["id"])
    try:
        yield kernel
    finally:
        kernel.end()


def put(user: Notebook, path: str, body: Mapping[str, Any]) -> Any:
    """Saves a file; returns its model."""
    answer = user.router.call("PUT", f"{user.base}api/contents/{quote(path)}", dict(body), user.headers)
    assert answer.status in (200, 201), (path, answer.status, answer.body[:300])
    return answer.json()


def notebook_of(*sources: str, output: str = "") -> dict[str, Any]:
    """A notebook's model with code cells; the first has `output`."""
    cells = [{"cell_type": "code", "id": f"c{n}", "source": source, "metadata": {}, "execution_count": None,
              "outputs": []} for n, source in enumerate(sources)]
    if output:
        cells[0]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": output}]
    content = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    return {"type": "notebook", "format": "json", "content": content}


class Terminal:
    """A terminal's websocket."""

    def __init__(self, user: Notebook, name: str = "") -> None:
        self.user, self.name = user, name or str(user.post("api/terminals")["name"])
        self.socket = websocket.create_connection(
            f"ws://127.0.0.1:{user.router.port}{user.base}terminals/websocket/{self.name}",
            socket=user.host.connect(user.router.port), header=[f"Authorization: token {user.token}"], timeout=60,
        )

    def type(self, text: str) -> None:
        self.socket.send(json.dumps(["stdin", text]))

    def read(self, until: str, timeout: float = 30) -> str:
        """The output up to a text; raises WebSocketTimeoutException."""
        found, deadline = "", time.monotonic() + timeout
        while until not in found:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.01))
            kind, *rest = json.loads(self.socket.recv())
            if kind == "stdout":
                found += rest[0]
        return found

    def run(self, command: str) -> str:
        """The output of a command, without the lines that the shell edits."""
        self.type(f"clear; {command}; echo end-$((40 + 2))\r")
        found = self.read("end-42")
        return found.rpartition("end-42")[0].rpartition("\x1b[2J")[2].rpartition("\x1b[3J")[2].strip()

    def end(self) -> None:
        self.socket.close()
        self.user.router.call("DELETE", f"{self.user.base}api/terminals/{self.name}", headers=self.user.headers)


@reports("jupyter/docker-stacks#552", "jupyterhub/systemdspawner#92", "jupyterhub/systemdspawner#96")
def the_user_has_a_name_and_a_home(user: Notebook) -> Any:
    """whoami, getpass.getuser() and the prompt fail, or the home in passwd is `/`."""
    with kernel_of(user) as kernel:
        return cell(kernel, """
            import getpass, grp, os, pwd, subprocess
            one = pwd.getpwuid(os.getuid())
            assert one.pw_dir == os.environ["HOME"] == os.path.expanduser("~" + one.pw_name), one
            names = [getpass.getuser(), one.pw_name, grp.getgrgid(os.getgid()).gr_name]
            names += subprocess.check_output("whoami; id -un; id -gn; echo ~$(id -un)", shell=True, text=True).split()
            print(names)""")


@reports("jupyter/docker-stacks#504", "jupyter/docker-stacks#1996")
def a_time_zone_is_set_in_a_notebook(user: Notebook) -> Any:
    """The container stays in UTC."""
    with kernel_of(user) as kernel:
        return cell(kernel, """
            import datetime, os, time, zoneinfo
            winter = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.timezone.utc)
            print(winter.astimezone(zoneinfo.ZoneInfo("Europe/Berlin")))
            os.environ["TZ"] = "EST5EDT"
            time.tzset()
            print(time.tzname, winter.astimezone().hour)
            assert abs(time.time() - int(os.popen("date +%s").read())) < 2""")


@reports("jupyter/docker-stacks#700")
def files_have_the_usual_permissions(user: Notebook) -> Any:
    """Files of notebooks, terminals and uploads have other permissions than on a machine of one's own."""
    put(user, "umask.txt", {"type": "file", "format": "text", "content": "x"})
    put(user, "umask.ipynb", notebook_of("1"))
    terminal = Terminal(user)
    terminal.run("mkdir umask; touch umask/terminal")
    terminal.end()
    with kernel_of(user) as kernel:
        return cell(kernel, """
            import os, shutil
            open("umask/kernel", "w").close()
            os.mkdir("umask/directory")
            names = "umask.txt", "umask.ipynb", "umask", "umask/terminal", "umask/kernel", "umask/directory"
            print([oct(os.stat(name).st_mode) for name in names], oct(os.umask(0o22)))
            shutil.rmtree("umask")""")


@reports("jupyter/notebook#5715", "jupyter/notebook#1631", "jupyter/jupyter#303", "jupyter/notebook#3576")
def files_of_unusual_names_are_saved_renamed_and_downloaded(user: Notebook) -> Any:
    """Names with blanks, percent signs or letters beyond ASCII get 404, or are not renamed."""
    names = ["my file.txt", "100%.txt", "50%20.txt", "über #1?.txt", "文件名.txt", "a+b&c=d.txt", "semi;colon.txt",
             "quote\"'.txt", "~tilde.txt", "x" * 200 + ".txt", "emoji🙂.txt", "[brackets]{}.txt", "trailing .txt"]
    found = []
    for name in names:
        put(user, name, {"type": "file", "format": "text", "content": name})
        path = f"{user.base}files/{quote(name)}?download=1"
        answer = user.router.call("GET", path, headers=user.headers)
        assert answer.status == 200 and answer.body.decode() == name, (name, answer.status)
        found.append(answer.headers["content-disposition"])
        path = f"{user.base}api/contents/{quote(name)}"
        answer = user.router.call("PATCH", path, {"path": "r" + name}, user.headers)
        assert answer.status == 200, (name, answer.status, answer.body[:200])
        assert "r" + name in {one["name"] for one in user.get("api/contents/")["content"]}, name
        answer = user.router.call("DELETE", f"{user.base}api/contents/{quote('r' + name)}", headers=user.headers)
        assert answer.status == 204, (name, answer.status)
    return found


@reports("jupyter/jupyter_client#104", "IRkernel/IRkernel#307")
def programs_of_a_kernel_end_with_its_restart(user: Notebook) -> None:
    """Programs that a cell has started outlive the kernel."""
    start = """
        import subprocess
        one = subprocess.Popen(["sleep", "98761"])
        two = subprocess.Popen("sleep 98762 & sleep 98763", shell=True)"""
    count = """
        import glob, time
        def count():
            found = 0
            for name in glob.glob("/proc/[0-9]*/cmdline"):
                try:
                    found += b"sleep\\0009876" in open(name, "rb").read()
                except OSError:
                    pass
            return found
        end = time.monotonic() + 5
        while count() and time.monotonic() < end:
            time.sleep(0.1)
        print(count())"""
    with kernel_of(user) as kernel:
        cell(kernel, start)
        user.post(f"api/kernels/{kernel.id}/restart")
        with Kernel(user, kernel.id) as again:
            assert cell(again, count).strip() == "0"


@reports("ipython/ipykernel#274")
def a_kernel_with_a_pool_of_processes_restarts(user: Notebook) -> Any:
    """A ProcessPoolExecutor that is at work prevents a restart, and the former kernel stays."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            import concurrent.futures, multiprocessing, time
            pool = concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork"))
            futures = [pool.submit(time.sleep, 1000) for _ in range(4)]""")
        began_s = time.monotonic()
        user.post(f"api/kernels/{kernel.id}/restart")
        with Kernel(user, kernel.id) as again:
            cell(again, "assert 'pool' not in globals()")
        assert time.monotonic() - began_s < 20
    assert len(user.get("api/kernels")) <= 1


@reports("jupyterlab/jupyterlab#5866", "jupyterlab/jupyterlab#8545", "jupyterlab/jupyterlab#9120")
def a_directory_with_broken_links_is_listed(user: Notebook) -> Any:
    """One broken link, or one file without permission, makes the whole directory unusable."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            import os, socket
            os.makedirs("links/closed")
            os.symlink("nothing", "links/broken")
            os.symlink("loop", "links/loop")
            os.symlink("/root/secret", "links/forbidden")
            os.symlink("..", "links/parent")
            os.mkfifo("links/fifo")
            socket.socket(socket.AF_UNIX).bind("links/socket")
            open("links/good.txt", "w").write("good")
            os.chmod("links/closed", 0)""")
        listed = user.get("api/contents/links")["content"]
        cell(kernel, "import shutil; os.chmod('links/closed', 0o700); shutil.rmtree('links')")
    names = sorted(one["name"] for one in listed)
    assert "good.txt" in names
    return names


@reports("jupyterhub/jupyterhub#5126", "jupyterlab/jupyterlab#7382")
def a_notebook_behind_a_link_is_opened_and_saved(user: Notebook) -> Any:
    """A directory outside of the home that is linked into it is not listed, or its notebooks do not open."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            import os
            os.makedirs("/tmp/outside/deep", exist_ok=True)
            os.symlink("/tmp/outside", "linked")""")
        put(user, "linked/deep/one.ipynb", notebook_of("1 + 1"))
        got = user.get("api/contents/linked/deep/one.ipynb")
        assert got["content"]["cells"][0]["source"] == "1 + 1"
        saved = user.post("api/contents/linked/deep/one.ipynb/checkpoints")
        session = user.post("api/sessions", {"path": "linked/deep/one.ipynb", "name": "one.ipynb", "type": "notebook",
                                             "kernel": {"name": "python3"}})
        with Kernel(user, session["kernel"]["id"]) as inside:
            where = cell(inside, "import os; print(os.path.realpath(os.getcwd()))")
        cell(kernel, "import shutil; os.unlink('linked'); shutil.rmtree('/tmp/outside')")
    return [where, sorted(saved)]


@reports("jupyterlab/jupyterlab#6727", "jupyter/notebook#5100", "jupyter/notebook#3748")
def two_thousand_files_are_open(user: Notebook) -> None:
    """Too many open files, because the soft limit is 1,024, or the server fails while it raises it."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            kept = [open("/dev/null") for _ in range(2000)]
            import subprocess
            assert subprocess.check_output(["echo", "x"]) == b"x\\n"
            del kept""")


@reports("jupyter/nbformat#52", "jupyter/help#150")
def notebooks_are_opened_and_saved_side_by_side(user: Notebook) -> None:
    """`database is locked` of the signatures' or the history's SQLite file, and requests that hang."""
    for number in range(8):
        put(user, f"side{number}.ipynb", notebook_of("1"))

    def work(number: int) -> None:
        for _ in range(3):
            model = user.get(f"api/contents/side{number}.ipynb")
            put(user, f"side{number}.ipynb", {**notebook_of("2"), "content": model["content"]})
            answer = user.router.call("POST", f"{user.base}api/contents/side{number}.ipynb/trust", {}, user.headers)
            assert answer.status == 201, answer.body[:300]

    began_s = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert time.monotonic() - began_s < 30


@reports(
    "jupyterhub/jupyterhub#1902", "jupyterhub/the-littlest-jupyterhub#410", "jupyter-server/enterprise_gateway#363"
)
def the_encoding_is_utf_8_everywhere(user: Notebook) -> Any:
    """A server that systemd starts has no LANG, so that texts are ASCII."""
    terminal = Terminal(user)
    assert "3" in terminal.run("printf 'äöü' | wc -m")
    terminal.end()
    with kernel_of(user) as kernel:
        return cell(kernel, """
            import locale, os, subprocess, sys
            open("größe.txt", "w").write("文件 ñ")
            assert open("größe.txt", "rb").read().decode() == "文件 ñ" and "größe.txt" in os.listdir()
            os.remove("größe.txt")
            print(locale.getpreferredencoding(), sys.getfilesystemencoding(), sys.stdout.encoding, os.environ["LANG"])
            code = "import sys; print('ü', sys.stdout.encoding)"
            print(subprocess.check_output([sys.executable, "-c", code], text=True))
            !printf 'äöü' | wc -m""")


@reports("jupyterlab/jupyterlab#12845", "elyra-ai/elyra#2825")
def a_command_prints_random_bytes(user: Notebook) -> None:
    """`!head -c 118000 </dev/urandom` freezes the kernel."""
    with kernel_of(user) as kernel:
        for _ in range(3):
            kernel.run("!head -c 118000 </dev/urandom", 30)
        assert cell(kernel, "print(1 + 1)").strip() == "2"


@reports("jupyterlab/jupyterlab#8769", "parmentelat/nbhosting#160")
def ten_megabytes_of_output_arrive(user: Notebook) -> Any:
    """`IOPub data rate exceeded`, and the page gets no more output."""
    with kernel_of(user) as kernel:
        found = cell(kernel, """
            for number in range(10000):
                print(f"{number:06}", "x" * 1000)""", 120)
        assert cell(kernel, "print('after')").strip() == "after"
    return "exceeded" in found


@reports("jupyterhub/jupyterhub#4474", "jupyter/notebook#2563", "jupyterhub/jupyterhub#3227")
def a_kernel_of_a_venv_imports_its_packages(user: Notebook) -> Any:
    """A kernelspec of the user's own environment starts another Python, without the environment's packages."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            import glob, subprocess, sys
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", "env"], check=True)
            (place,) = glob.glob("env/lib/python*/site-packages")
            open(place + "/only_here.py", "w").write("value = 42")
            install = ["env/bin/python", "-m", "ipykernel", "install", "--user", "--name", "env"]
            subprocess.run(install, check=True)""")
        specs = user.get("api/kernelspecs")["kernelspecs"]
        with kernel_of(user, name="env") as inside:
            found = cell(inside, "import only_here, sys; print(only_here.value, sys.prefix, sys.executable)")
        cell(kernel, """
            import shutil
            shutil.rmtree("env")
            subprocess.run(["jupyter", "kernelspec", "remove", "-f", "env"], check=True)""")
    return [found, sorted(specs)]


@reports("jupyterlab/jupyterlab#10633", "jupyterlab/jupyterlab#4136", "jupyterlab/jupyterlab#1617")
def a_terminal_shows_its_former_output_to_a_page_that_is_reloaded(user: Notebook) -> None:
    """A terminal is blank, or accepts nothing, after a reload or a lost connection."""
    terminal = Terminal(user)
    terminal.run("kept=7; echo here-$((20 + 3))")
    terminal.socket.close()
    again = Terminal(user, terminal.name)
    assert "here-23" in again.read("end-42")
    assert "7" in again.run("echo $kept")
    again.end()


@reports("jupyter/notebook#2080", "joblib/joblib#513")
def processes_share_work_and_memory(user: Notebook) -> Any:
    """A multiprocessing.Pool hangs, because semaphores are refused or /dev/shm has no room."""
    with kernel_of(user) as kernel:
        return cell(kernel, """
            import multiprocessing, multiprocessing.shared_memory, operator
            for method in "fork", "spawn", "forkserver":
                with multiprocessing.get_context(method).Pool(3) as pool:
                    assert pool.map(operator.neg, range(100)) == [-n for n in range(100)], method
            block = multiprocessing.shared_memory.SharedMemory(create=True, size=64 << 20)
            block.buf[:] = bytes(64 << 20)
            block.close(), block.unlink()
            manager = multiprocessing.Manager()
            print(dict(manager.dict(a=1)), multiprocessing.get_start_method())
            manager.shutdown()""", 120)


@reports("jupyterhub/jupyterhub#1211", "jupyterlab/jupyterlab#6545", "ipython/ipython#4140")
def output_arrives_after_a_lost_connection(user: Notebook) -> None:
    """The lines that are printed while the connection is lost are lost."""
    with kernel_of(user) as kernel:
        message = kernel.send("import time\nfor n in range(40):\n    print(f'line {n};', flush=True); time.sleep(0.05)")
        kernel.receive("stream")
        kernel.socket.close()
        time.sleep(1)
        again = Kernel(user, kernel.id, kernel.session)
        found = again.result(message).stream
        assert all(f"line {n};" in found for n in range(2, 40)), found
        again.close()


@reports("jupyterhub/the-littlest-jupyterhub#693", "jupyter/nbconvert#1594", "jupyter/nbconvert#1167")
def a_notebook_is_exported_and_run_by_nbconvert(user: Notebook) -> Any:
    """Exports get 500, because templates of another user are not readable; `--execute` finds no kernel."""
    put(user, "export.ipynb", notebook_of("print(6 * 7)", "x = 1"))
    found = {}
    for kind in ("html", "script", "markdown", "latex", "slides", "rst", "asciidoc", "notebook", "pdf", "webpdf"):
        path = f"{user.base}nbconvert/{kind}/export.ipynb?download=true"
        found[kind] = user.router.call("GET", path, headers=user.headers).status
    terminal = Terminal(user)
    said = terminal.run("jupyter nbconvert --to html --execute export.ipynb >run.log 2>&1; grep -c '>42' export.html")
    assert "1" in said.splitlines()[-1], (said, user.get("api/contents/run.log")["content"][-800:])
    terminal.end()
    return found


@reports("jupyterlab/jupyterlab#7743", "jupyter/notebook#484")
def the_time_of_a_saved_file_is_that_of_the_next_request(user: Notebook) -> None:
    """`File Changed` appears at each save, because the file's time differs from that in the response."""
    for number in range(5):
        saved = put(user, "times.ipynb", notebook_of(str(number), output="x" * 100000))
        assert saved["last_modified"] == user.get("api/contents/times.ipynb?content=0")["last_modified"]


@reports("jupyterhub/binderhub#871", "jupyterlab/jupyterlab#489", "jupyterhub/jupyterhub#1993", "jupyter/notebook#2457")
def terminals_and_notebooks_have_the_same_programs(user: Notebook) -> Any:
    """A terminal's PATH or Python is another than the notebook's, it is sh, or does not read .bashrc."""
    programs = "for name in python3 jupyter pip; do command -v $name; done"
    with kernel_of(user) as kernel:
        cell(kernel, "open('.bashrc', 'a').write('export FROM_BASHRC=yes\\n')")
        terminal = Terminal(user)
        found = terminal.run(f"echo $FROM_BASHRC/$0/$TERM/$LANG; {programs}; echo $JUPYTER_SERVER_URL").split()
        terminal.end()
        inside = cell(kernel, f"!{programs}").split()
        cell(kernel, "import os; os.remove('.bashrc')")
    assert found.pop().endswith(user.base)
    assert found[1:] == inside, (found, inside)
    return found[0]


@reports("jupyter/notebook#1227", "jupyter-server/jupyter_server#668")
def a_terminal_has_job_control(user: Notebook) -> Any:
    """Ctrl-C and Ctrl-Z do nothing, and `no job control in this shell`."""
    signals, terminal = "grep -E 'Sig(Ign|Blk)' /proc/self/status", Terminal(user)
    terminal.type("echo begun-$((1 + 1)); sleep 9876\r")
    terminal.read("begun-2")
    time.sleep(0.5)
    terminal.type("\x03")
    assert "42" in terminal.run("echo $((6 * 7))")
    terminal.type("echo begun-$((2 + 1)); sleep 9876\r")
    terminal.read("begun-3")
    time.sleep(0.5)
    terminal.type("\x1a")
    terminal.read("Stopped")
    assert "sleep 9876" in terminal.run("bg; jobs; kill %1; tty; stty size")
    found = terminal.run(signals) + "\n"
    terminal.end()
    with kernel_of(user) as kernel:
        found += cell(kernel, f"""
            !{signals}
            import subprocess
            print(subprocess.run("{signals}", shell=True, text=True, capture_output=True).stdout)""")
    # Without 32 and 33, which glibc's posix_spawn sets to be ignored where clone3(2) is refused, as in Docker too.
    return [hex(int(mask, 16) & 0x7FFFFFFF) for mask in re.findall(r"\b[0-9a-f]{16}\b", found)]


@reports("jupyterlab/jupyterlab#13108", "jupyterlab/jupyterlab#2049")
def hidden_files_are_as_the_setting_says(user: Notebook) -> Any:
    """Hidden files stay invisible, or get 404."""
    found, file = [], {"type": "file", "format": "text", "content": ""}
    for path, method, body in (
        (".hidden", "PUT", {"type": "directory"}), (".hidden/x.txt", "PUT", file), (".hidden", "GET", None),
        (".ipython", "GET", None), (".x", "PUT", file),
    ):
        answer = user.router.call(method, f"{user.base}api/contents/{path}", body, user.headers)
        found.append([method, path, answer.status])
    return found


@reports("ipython/ipython#13161", "ipython/ipython#3400", "ipython/ipython#14649")
def an_interrupt_ends_programs_of_a_cell(user: Notebook) -> Any:
    """An interrupt does not end `!` or `%%bash`, and the program goes on."""
    found = []
    with kernel_of(user) as kernel:
        for code in ("!echo begun; sleep 98771", "%%bash\necho begun\nsleep 98772",
                     "import subprocess\nprint('begun', flush=True)\nsubprocess.run(['sleep', '98773'])"):
            message = kernel.send(code)
            kernel.receive("stream")
            time.sleep(0.5)
            user.post(f"api/kernels/{kernel.id}/interrupt")
            found.append(kernel.result(message, 20).status)
        assert cell(kernel, "print(1)").strip() == "1"
        found.append(cell(kernel, """
            import glob, time
            time.sleep(1)
            left = 0
            for name in glob.glob("/proc/[0-9]*/cmdline"):
                try:
                    left += b"sleep\\0009877" in open(name, "rb").read()
                except OSError:
                    pass
            print(left)"""))
    return found


@reports("ipython/ipykernel#110", "jupyter/notebook#3078", "jupyterlab/jupyterlab#7365")
def output_of_libraries_and_programs_is_shown(user: Notebook) -> None:
    """The output of a C library or a child, to descriptors 1 and 2, is not in the cell's output."""
    with kernel_of(user) as kernel:
        found = cell(kernel, """
            import ctypes, os, subprocess, sys, time
            ctypes.CDLL(None).puts(b"by-puts"), ctypes.CDLL(None).fflush(None)
            os.system("echo by-system")
            os.write(2, b"by-write\\n")
            subprocess.run("echo by-run; echo by-error >&2", shell=True)
            time.sleep(1)""")
    for word in ("by-puts", "by-system", "by-write", "by-run", "by-error"):
        assert word in found, (word, found)


@reports("jupyter/notebook#3106", "spyder-ide/spyder#20629")
def a_cell_forks(user: Notebook) -> None:
    """os.fork() in a cell: the kernel hangs, or the child's output is lost."""
    with kernel_of(user) as kernel:
        found = cell(kernel, """
            import os, time
            def child(code):
                pid = os.fork()
                if pid == 0:
                    print("in-the-child", flush=True)
                    os._exit(code)
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            print([child(code) for code in (0, 3)])
            time.sleep(0.5)""")
        assert "[0, 3]" in found, found
        assert cell(kernel, "print('after')").strip() == "after"


@reports("jupyter/notebook#650", "jupyter/notebook#1478", "jupyterhub/jupyterhub#2470", "jupyterhub/jupyterhub#1569")
def a_notebook_of_fifty_megabytes_is_saved(user: Notebook) -> None:
    """A notebook with large outputs gets 413 at the proxy, or `Content-Length too long`."""
    put(user, "large.ipynb", notebook_of("1", output=("y" * 99 + "\n") * 500_000))
    assert user.get("api/contents/large.ipynb?content=0")["size"] > 50_000_000
    with kernel_of(user) as kernel:
        cell(kernel, "import os; os.remove('large.ipynb')")


@reports("jupyterhub/jupyter-server-proxy#179", "jupyter-server/jupyter_server#1110")
def a_websocket_gets_its_subprotocol(user: Notebook) -> None:
    """A proxy drops Sec-WebSocket-Protocol, so that a page that requires it closes the connection."""
    model = user.post("api/kernels")
    socket = websocket.create_connection(
        f"ws://127.0.0.1:{user.router.port}{user.base}api/kernels/{model['id']}/channels?session_id=1",
        socket=user.host.connect(user.router.port), header=[f"Authorization: token {user.token}"], timeout=60,
        subprotocols=["v1.kernel.websocket.jupyter.org"],
    )
    assert socket.getsubprotocol() == "v1.kernel.websocket.jupyter.org"
    socket.close()


@reports("jupyter/notebook#6882", "jupyter/notebook#3860")
def asyncio_works_in_cells(user: Notebook) -> Any:
    """Programs of asyncio.create_subprocess_exec are never reaped, or loops in threads fail."""
    with kernel_of(user) as kernel:
        return cell(kernel, """
            import asyncio, signal, threading
            one = await asyncio.create_subprocess_exec("sh", "-c", "echo out; exit 3", stdout=asyncio.subprocess.PIPE)
            print(await one.communicate(), one.returncode)
            async def other():
                two = await asyncio.create_subprocess_exec("true")
                return await two.wait()
            results = []
            thread = threading.Thread(target=lambda: results.append(asyncio.run(other())))
            thread.start()
            while thread.is_alive():
                await asyncio.sleep(0.01)
            print(results)
            fired = []
            signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            await asyncio.sleep(0.3)
            print(fired, signal.getsignal(signal.SIGCHLD), signal.getsignal(signal.SIGTERM))""")


@reports("jupyter/docker-stacks#187", "jupyterhub/zero-to-jupyterhub-k8s#1220")
def the_name_of_the_host_has_an_address(user: Notebook) -> None:
    """Spark, Dask and others fail, because the container's host name has no address."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            import http.server, socket, threading, urllib.request
            address = socket.gethostbyname(socket.gethostname())
            assert socket.getfqdn() and socket.gethostbyname("localhost") == "127.0.0.1"
            for where in address, "localhost", "127.0.0.1":
                server = http.server.ThreadingHTTPServer((where, 0), http.server.SimpleHTTPRequestHandler)
                threading.Thread(target=server.serve_forever, daemon=True).start()
                url = f"http://{where}:{server.server_address[1]}/"
                opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                assert opener.open(url, timeout=5).status == 200
                server.shutdown()""")


@reports("jupyter/notebook#5383", "googlecolab/colabtools#260", "jupyterhub/jupyterhub#2539")
def a_package_that_is_upgraded_is_that_of_the_restarted_kernel(user: Notebook) -> Any:
    """After `pip install` and a restart of the kernel the former version is imported, or none."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            import six, zipfile
            info = "six-99.0.dist-info"
            with zipfile.ZipFile("six-99.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr("six.py", "answer = 42")
                wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: six\\nVersion: 99.0\\n")
                wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
                wheel.writestr(f"{info}/RECORD", f"six.py,,\\n{info}/METADATA,,\\n{info}/WHEEL,,\\n{info}/RECORD,,\\n")
            %pip install -q --no-index --no-deps --break-system-packages ./six-99.0-py3-none-any.whl""", 120)
        user.post(f"api/kernels/{kernel.id}/restart")
        with Kernel(user, kernel.id) as again:
            found = cell(again, "import six; print(six.answer)")
            cell(again, "%pip uninstall -q -y --break-system-packages six", 120)
    with kernel_of(user) as kernel:
        return found + cell(kernel, "import six; print(six.__version__ < '9')")


@reports("jupyter/notebook#3468", "jupyter-widgets/ipywidgets#2522", "jupyterhub/the-littlest-jupyterhub#853")
def a_message_of_twenty_megabytes_reaches_the_kernel(user: Notebook) -> None:
    """The connection is closed at a message of more than 10 MiB, such as the file of an upload widget."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            def sized(_comm, message):
                print(len(message["content"]["data"]["file"]))
            get_ipython().kernel.comm_manager.register_target("sized", sized)""")
        opened = {"comm_id": "one", "target_name": "sized", "data": {"file": "x" * 20_000_000}}
        kernel.send_message("comm_open", opened, "shell")
        assert kernel.receive("stream")["content"]["text"].strip() == "20000000"


@reports("ipython/ipython#12513", "jupyterlab/jupyterlab#8914")
def stored_variables_are_in_the_next_kernel(user: Notebook) -> Any:
    """The databases of IPython cannot be written, so that what %store keeps is not in the next kernel."""
    with kernel_of(user) as kernel:
        cell(kernel, "kept_for_later = 'found'\n%store kept_for_later")
    with kernel_of(user) as kernel:
        return cell(kernel, "%store -r kept_for_later\nprint(kept_for_later)\n%store -d kept_for_later")


@reports("jupyterlab/jupyterlab#3181", "jupyterlab/jupyterlab#6289")
def a_terminal_has_the_size_of_its_page(user: Notebook) -> Any:
    """Lines are broken at another width than that of the page."""
    terminal = Terminal(user)
    try:
        terminal.socket.send(json.dumps(["set_size", 33, 111, 600, 900]))
        return terminal.run("stty size; tput cols; echo $TERM; echo x > /dev/tty")
    finally:
        terminal.end()


@reports("CoffeaTeam/coffea-casa#322", "jupyterlab/jupyterlab#12952")
def long_text_is_pasted_into_a_terminal(user: Notebook) -> Any:
    """Of a hundred long lines some lose characters, or the page freezes."""
    terminal = Terminal(user)
    try:
        # Before `cat` reads, the shell's line editor would.
        terminal.type("echo rea''dy; cat > pasted.txt\r")
        terminal.read("ready")
        time.sleep(1)
        for _ in range(10):
            terminal.type(("x" * 999 + "\r") * 20)
        terminal.type("\x04")
        return terminal.run("sort -u pasted.txt | wc; wc -c < pasted.txt; rm pasted.txt")
    finally:
        terminal.end()


@reports("jupyter/notebook#4156", "jupyterlab/jupyterlab#10883")
def a_module_that_is_changed_is_reloaded(user: Notebook) -> Any:
    """A module that a cell has written is not found, or a change of it has no effect with %autoreload."""
    with kernel_of(user) as kernel:
        cell(kernel, "%load_ext autoreload\n%autoreload 2")
        cell(kernel, "%%writefile fresh_module.py\ndef value():\n    return 1")
        found = cell(kernel, "import fresh_module; print(fresh_module.value())")
        # The reloader compares times of files in seconds.
        changed = {"type": "file", "format": "text", "content": "def value():\n    return 2"}
        time.sleep(1.1)
        put(user, "fresh_module.py", changed)
        return found + cell(kernel, "print(fresh_module.value()); import os; os.unlink('fresh_module.py')")


@reports("docker/for-linux#1374", "tornadoweb/tornado#2274", "jupyter/notebook#4901")
def programs_listen_on_localhost(user: Notebook) -> Any:
    """`Cannot assign requested address`, because localhost has an address of IPv6 that no interface has."""
    with kernel_of(user) as kernel:
        return cell(kernel, """
            import socket
            for host in "localhost", "127.0.0.1", "::1", "0.0.0.0", "::":
                for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
                    with socket.socket(family, kind) as listener:
                        listener.bind(address)
                        listener.listen()
                        socket.create_connection(listener.getsockname()[:2], 5).close()
                        print(host, address[0])""")


@reports("xerial/snappy-java#240", "docker/compose#1339")
def programs_and_libraries_run_from_the_home_and_temporary_directories(user: Notebook) -> Any:
    """`failed to map segment from shared object`, because /tmp is mounted with noexec."""
    with kernel_of(user) as kernel:
        return cell(kernel, """
            import ctypes, os, shutil, subprocess, tempfile
            library = next(line.split()[-1] for line in open("/proc/self/maps") if "libc.so" in line)
            for place in "/tmp", "/var/tmp", os.getcwd():
                with tempfile.TemporaryDirectory(dir=place) as directory:
                    shutil.copy("/bin/true", directory)
                    shutil.copy(library, directory + "/libcopy.so")
                    subprocess.run([directory + "/true"], check=True)
                    ctypes.CDLL(directory + "/libcopy.so")
                    print(place)""")


@reports("jupyterlab/jupyterlab#2819", "jupyterlab/jupyterlab#9923", "jupyterhub/the-littlest-jupyterhub#986")
def a_notebook_in_a_read_only_directory_is_opened(user: Notebook) -> Any:
    """A notebook in a directory without permission to write does not open, because a checkpoint cannot be made."""
    with kernel_of(user) as kernel:
        cell(kernel, "import os; os.makedirs('read-only')")
        put(user, "read-only/one.ipynb", notebook_of("1"))
        cell(kernel, "import shutil; shutil.rmtree('read-only/.ipynb_checkpoints', ignore_errors=True)\n"
                     "os.chmod('read-only/one.ipynb', 0o444); os.chmod('read-only', 0o555)")
        file = "api/contents/read-only/one.ipynb"
        found = []
        for method, path, body in (
            ("GET", f"{file}?content=1", None), ("GET", f"{file}/checkpoints", None),
            ("POST", f"{file}/checkpoints", {}),
            ("PUT", file, notebook_of("2")), ("PATCH", file, {"path": "read-only/two.ipynb"}), ("DELETE", file, None),
            ("POST", "api/contents/read-only", {"type": "notebook"}),
        ):
            answer = user.router.call(method, user.base + path, body, user.headers)
            text = json.loads(answer.body)["message"] if answer.status >= 400 else ""
            found.append((method, answer.status, text))
        cell(kernel, "os.chmod('read-only', 0o755); shutil.rmtree('read-only')")
    assert found[0][1] == 200, found
    return found


@reports("ipython/ipython#10499", "jupyterlab/jupyterlab#14041", "ipython/ipython#514")
def a_program_of_a_cell_that_reads_input_can_be_ended(user: Notebook) -> Any:
    """A program that reads its standard input blocks the cell for ever."""
    with kernel_of(user) as kernel:
        found = cell(kernel, """
            import subprocess
            print(subprocess.run("read line; echo $?", shell=True, capture_output=True, timeout=10).stdout)""")
        # The pseudoterminal of `!` has no input.
        message = kernel.send("!read line")
        time.sleep(1)
        user.post(f"api/kernels/{kernel.id}/interrupt")
        kernel.result(message, 30)
        return found + cell(kernel, "print('goes on')")


@reports("pnpnpn/timeout-decorator#66", "jupyter/notebook#5519")
def a_cell_sets_an_alarm(user: Notebook) -> Any:
    """`signal only works in main thread`."""
    with kernel_of(user) as kernel:
        return cell(kernel, """
            import signal, threading, time
            def late(*_):
                raise TimeoutError("in time")
            print([signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGCHLD)])
            signal.signal(signal.SIGALRM, late)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            try:
                time.sleep(10)
            except TimeoutError as error:
                print(error, threading.current_thread() is threading.main_thread())""")


@reports("jupyter/notebook#1454", "jupyterlab/jupyterlab#744")
def a_kernel_that_does_not_start_can_be_replaced(user: Notebook) -> Any:
    """After the start of a broken kernel the notebook has none, and gets no other."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            import json, os
            place = os.path.expanduser("~/.local/share/jupyter/kernels/broken")
            os.makedirs(place, exist_ok=True)
            spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "Broken", "language": "python"}
            with open(place + "/kernel.json", "w") as file:
                json.dump(spec, file)""")
        session = {"path": "broken.ipynb", "name": "broken.ipynb", "type": "notebook", "kernel": {"name": "broken"}}
        found = []
        for _ in range(4):
            answer = user.router.call("POST", f"{user.base}api/sessions", session, user.headers)
            assert answer.status == 201, (answer.status, answer.body[:300])
            path = f"{user.base}api/sessions/{answer.json()['id']}"
            answer = user.router.call("PATCH", path, {"kernel": {"name": "python3"}}, user.headers)
            with Kernel(user, answer.json()["kernel"]["id"]) as replaced:
                found.append(cell(replaced, "print(6 * 7)").strip())
            found.append(user.router.call("DELETE", path, headers=user.headers).status)
        cell(kernel, "import shutil; shutil.rmtree(place)")
        return found
