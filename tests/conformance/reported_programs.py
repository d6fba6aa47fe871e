# SPDX-License-Identifier: BSD-3-Clause
"""Public bug reports about terminals, and about the system as programs see it. See reports.py."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import websocket
from acts import Terminal, cell, kernel_of
from reported import reports

from notebook import Notebook


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


@reports("jupyterlab/jupyterlab#6727", "jupyter/notebook#5100", "jupyter/notebook#3748")
def two_thousand_files_are_open(user: Notebook) -> None:
    """Too many open files, because the soft limit is 1,024, or the server fails while it raises it."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            kept = [open("/dev/null") for _ in range(2000)]
            import subprocess
            assert subprocess.check_output(["echo", "x"]) == b"x\\n"
            del kept""")


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
