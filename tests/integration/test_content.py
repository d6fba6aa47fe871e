# SPDX-License-Identifier: BSD-3-Clause
"""Claims with content: it is delivered before the response, by a process that is confined like the slot."""

import base64
import contextlib
import hashlib
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from notebook import Notebook

PORT = 8123
ALLOW = f'[claims]\narchives = ["http://127.0.0.1:{PORT}/ok/"]\n'
FAILED = "urn:nbagent:problem:archive-failed"
# A web server on a slot's loopback: an archive, redirects to it and to another path, and a response that never comes.
SITE = """
import http.server, io, tarfile, threading
made = io.BytesIO()
with tarfile.open(fileobj=made, mode="w:gz") as tar:
    for name, content in (("course/one.ipynb", b"{}"), ("course/data.csv", b"1,2\\n" * 100000)):
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.uid = len(content), 0o644, 0
        tar.addfile(info, io.BytesIO(content))
class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/ok/never":
            threading.Event().wait()
        to = {"/ok/way": "/ok/a.tar.gz", "/ok/out": "/other/a.tar.gz"}.get(self.path)
        self.send_response(302 if to else 200)
        self.send_header("Location", to or "")
        self.send_header("Content-Length", "0" if to else str(len(made.getvalue())))
        self.end_headers()
        self.wfile.write(b"" if to else made.getvalue())
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Site)
print("serving", flush=True)
server.serve_forever()
""".replace("PORT", str(PORT))


@pytest.fixture
def workers():
    """Threads for requests that wait while the test runs on."""
    with ThreadPoolExecutor(2) as pool:
        yield pool


def record(agent, slot):
    """A slot's file."""
    return json.loads(agent.run("cat", f"/run/nbagent/slots/{slot}/slot.json"))


def warm(agent):
    """The slot that the next claim will get."""
    [slot] = agent.wait(lambda: agent.slots("warm"), "a warm slot")
    return slot["slot"]


def inside(agent, slot, *argv, check=True):
    """A command in a slot's namespaces, as its user but without its filter; what it printed."""
    of = record(agent, slot)
    enter = ["nsenter", "-t", str(of["pid"]), "-U", "-m", "-p", "-n", "-i", "-S", str(of["uid"]), "-G", str(of["uid"])]
    return agent.run(*enter, *argv, check=check)


@contextlib.contextmanager
def site(agent):
    """A web server on the loopback of the slot that the next claim gets; gives the slot's id."""
    slot = warm(agent)
    argv = ["nsenter", "-t", str(record(agent, slot)["pid"]), "-n", "/usr/bin/python3", "-c", SITE]
    server = agent.host.popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    with server:
        assert server.stdout.readline() == b"serving\n"
        try:
            yield slot
        finally:
            server.kill()


def content(notebook, path):
    """A file of the slot, by Jupyter's contents API."""
    answer = notebook.router.call("GET", f"{notebook.base}api/contents/{path}?type=file&format=base64",
                                  headers=notebook.headers)
    assert answer.status == 200, answer.body
    return base64.b64decode(answer.json()["content"])


def test_files_of_a_claim_belong_to_the_user_before_the_response(agent):
    claim = agent.claim(files={
        "analysis/hello world & #1 ü.ipynb": '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
        "data.bin": {"base64": "AAEC/w=="},
        "Welcome.ipynb": "mine",
    }, path="lab/tree/analysis/hello%20world%20%26%20%231%20%C3%BC.ipynb?reset=1#cell")
    notebook = Notebook(agent.host, claim)
    assert content(notebook, "data.bin") == b"\x00\x01\x02\xff"
    assert content(notebook, "Welcome.ipynb") == b"mine"
    link, _, fragment = claim["url"].partition("#")
    assert fragment == "cell" and link.endswith(f"ipynb?reset=1&token={claim['token']}")
    assert agent.router.get(link.split(":8000")[1]).status == 200
    # The name in the link is that of the file.
    named = link.split("/lab/tree/")[1].split("?")[0]
    assert notebook.router.call("GET", f"{notebook.base}api/contents/{named}", headers=notebook.headers).status == 200
    result = notebook.run(
        "import os; s = [os.stat(f'{os.environ[\"HOME\"]}/{n}') for n in ('analysis', 'data.bin')]\n"
        "[(oct(f.st_mode), f.st_uid == os.getuid(), f.st_gid == os.getgid()) for f in s]"
    )
    assert result.text == "[('0o40755', True, True), ('0o100644', True, True)]"


def test_a_megabyte_of_files_is_delivered_unchanged(agent):
    data = os.urandom(1 << 20)
    notebook = agent.open(files={"large.bin": {"base64": base64.b64encode(data).decode()}})
    result = notebook.run("import hashlib, pathlib; hashlib.sha256(pathlib.Path('large.bin').read_bytes()).hexdigest()")
    assert result.text == repr(hashlib.sha256(data).hexdigest())


def test_content_is_delivered_once_for_an_idempotency_key(agent):
    body = {"files": {"a.txt": "theirs"}, "path": "lab/tree/a.txt"}
    headers = {"Idempotency-Key": "with-content"}
    first = agent.api.call("POST", "/claim", body, headers).json()
    inside(agent, first["slot"], "sh", "-c", "echo mine > /home/jovyan/a.txt")
    agent.run("systemctl", "restart", "nbagent.service")
    assert agent.api.call("POST", "/claim", body, headers).json() == first
    assert inside(agent, first["slot"], "cat", "/home/jovyan/a.txt") == "mine\n"
    body["files"]["a.txt"] = "others"
    assert agent.api.call("POST", "/claim", body, headers).status == 422


def test_a_slot_that_was_warm_before_the_supervisor_started_takes_content(agent):
    slot = warm(agent)
    agent.run("systemctl", "restart", "nbagent.service")
    claim = agent.claim(files={"a.txt": "x"})
    assert claim["slot"] == slot
    assert inside(agent, slot, "cat", "/home/jovyan/a.txt") == "x"


@pytest.mark.parametrize(("options", "field"), [
    ({"files": {"../a": ""}}, "files"), ({"files": {"/etc/a": ""}}, "files"),
    ({"files": {"a": {"base64": "!"}}}, "files"), ({"files": {"a": "x" * (1 << 20), "b": "x"}}, "files"),
    ({"archive": "http://127.0.0.1:8124/ok/a.tar"}, "archive"),
])
def test_bad_content_names_the_field_and_costs_no_slot(agent, options, field):
    agent.configure(ALLOW)
    slot = warm(agent)
    answer = agent.api.post("/claim", options)
    assert answer.status == 400
    assert answer.json()["field"] == field and answer.json()["expected"]
    assert warm(agent) == slot


def test_no_archive_is_fetched_unless_the_operator_allows_its_url(agent):
    slot = warm(agent)
    answer = agent.api.get("/claim?archive=http://127.0.0.1:8123/ok/a.tar")
    assert answer.status == 400 and "claims.archives" in answer.json()["detail"]
    assert warm(agent) == slot


def test_a_link_out_of_the_home_directory_fails_the_claim_and_removes_the_slot(agent):
    slot = warm(agent)
    inside(agent, slot, "ln", "-s", "/tmp", "/home/jovyan/out")
    answer = agent.api.post("/claim", {"files": {"first": "", "out/x": "1"}})
    assert answer.status == 422 and answer.json()["type"] == "urn:nbagent:problem:content-failed"
    assert answer.json()["detail"] == "out/x: a symbolic link on the way leads out of the home directory"
    agent.wait(lambda: agent.api.get(f"/slots/{slot}").status == 404, "the slot to be removed")
    assert [e["NBAGENT_TEXT"] for e in agent.journal(f"NBAGENT_SLOT={slot}", "PRIORITY=5")] == [answer.json()["detail"]]
    assert warm(agent) != slot


def test_files_that_do_not_fit_into_the_slot_are_refused(agent):
    slot = warm(agent)
    inside(agent, slot, "sh", "-c", "head -c 1G /dev/zero > /home/jovyan/full 2>/dev/null; true")
    answer = agent.api.post("/claim", {"files": {"x": "1" * 100_000}})
    assert answer.status == 422 and answer.json()["detail"] == "x: the slot's storage is full"


@pytest.mark.cgroup2
def test_an_archive_is_fetched_by_the_slot_in_its_own_network(any_agent):
    agent = any_agent
    # A virtual machine without hardware help takes a second to start a Python.
    agent.configure(ALLOW + 'timeout = "2min"\n')
    with site(agent) as slot:
        found = agent.api.get(f"/claim?archive=http://127.0.0.1:{PORT}/ok/way&path=lab/tree/course/one.ipynb")
    assert found.status == 200, found.body
    assert found.json()["slot"] == slot
    assert inside(agent, slot, "stat", "-c", "%a %s %U", "/home/jovyan/course/data.csv") == "644 400000 jovyan\n"


def test_a_failed_download_is_a_bad_gateway_and_removes_the_slot(agent):
    agent.configure(ALLOW)
    with site(agent) as slot:
        answer = agent.api.post("/claim", {"archive": f"http://127.0.0.1:{PORT}/ok/out"})
    assert answer.status == 502 and answer.json()["type"] == FAILED
    assert "/other/a.tar.gz, which this host does not allow" in answer.json()["detail"]
    agent.wait(lambda: agent.api.get(f"/slots/{slot}").status == 404, "the slot to be removed")


def test_an_archive_that_is_too_slow_fails_in_time(agent):
    agent.configure(ALLOW + 'timeout = "1s"\n')
    with site(agent):
        answer = agent.api.post("/claim", {"archive": f"http://127.0.0.1:{PORT}/ok/never"})
    assert answer.status == 502 and answer.json()["detail"] == "content was not delivered in time"


def test_the_delivering_process_is_confined_and_not_accessible_from_the_slot(agent, workers):
    agent.configure(ALLOW)
    with site(agent) as slot:
        claim = workers.submit(agent.api.post, "/claim", {"archive": f"http://127.0.0.1:{PORT}/ok/never"})
        pid = agent.wait(lambda: delivering_pid(agent, slot), "the process that delivers the content")
        assert agent.api.get(f"/slots/{slot}").json()["state"] == "preparing"
        of = record(agent, slot)
        lines = agent.run("cat", f"/proc/{pid}/status").splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert (status["NoNewPrivs"], status["Seccomp"], status["Groups"].strip()) == ("1", "2", "")
        assert set((status["Uid"] + "\t" + status["Gid"]).split("\t")) == {str(of["id_base"] + of["uid"])}
        of_init, of_it = (links(agent, f"/proc/{number}/ns") for number in (of["pid"], pid))
        assert of_it == of_init and len(of_it) >= 7
        # One socket to the supervisor, one to the web server; the rest is the slot's own.
        assert sorted(links(agent, f"/proc/{pid}/fd")) == ["/dev/null"] * 3 + ["/home/jovyan"] + ["socket"] * 2
        # No process of the slot may read its memory or its files in /proc.
        own = status["NSpid"].split("\t")[-1]
        for path in ("environ", "maps", "fd/", "exe", "root/", "cwd/", "mem"):
            look = f"ls /proc/{own}/{path} 2>&1 && cat /proc/{own}/{path} 2>&1"
            shown = inside(agent, slot, "sh", "-c", look, check=False)
            assert "Permission denied" in shown, (path, shown)
        # When the supervisor is killed now, its successor must remove the slot, because its content is incomplete.
        agent.expect(r"nbagent\.service: (Main process exited|Failed with result|Consumed|Killing process)")
        agent.run("systemctl", "kill", "-s", "KILL", "nbagent.service")
        answer = claim.result()
    # The API repeated the request to the next supervisor, whose slot has no such server.
    assert answer.status == 502 and "Connection refused" in answer.json()["detail"]
    agent.wait(lambda: agent.api.get(f"/slots/{slot}").status == 404, "the slot to be removed")
    assert agent.run("sh", "-c", f"ls -d /proc/{pid} 2>/dev/null; true") == ""


def delivering_pid(agent, slot):
    """The pid of the process in the slot that delivers its content, once it waits for the web server."""
    for pid in agent.processes(slot):
        command = agent.run("sh", "-c", f"tr '\\0' ' ' < /proc/{pid}/cmdline; true")
        if "nbagent.content.deliver" in command and links(agent, f"/proc/{pid}/fd").count("socket") == 2:
            return pid
    return None


def links(agent, directory):
    """The targets of the links in a directory of /proc, without the numbers of sockets."""
    shown = agent.run("sh", "-c", f"for link in {directory}/*; do readlink $link; done; true").splitlines()
    return [link.split(":")[0] if link.startswith("socket:") else link for link in shown]
