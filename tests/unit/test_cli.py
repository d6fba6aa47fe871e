# SPDX-License-Identifier: BSD-3-Clause
"""The command line against the real API, served on a real port in front of a fake supervisor."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from fake_supervisor import LABEL, FakeSupervisor
from werkzeug.serving import WSGIRequestHandler, make_server

from nbagent import cli
from nbagent.api.app import create_app
from nbagent.cli.commands import nbagent as nbagent_command
from nbagent.cli.remote import Remote, error_of_problem, read_token
from nbagent.config import host_config
from nbagent.core.errors import ConfigError, Full, InvalidField, NbagentError, SupervisorUnavailable
from nbagent.wire.control import ControlClient

ROOT = Path(__file__).parents[2]
ABSENT = f"{LABEL}-000000000000"


class Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[FakeSupervisor]:
    with FakeSupervisor(tmp_path / "control.sock") as running:
        yield running


@pytest.fixture
def url(supervisor: FakeSupervisor, tmp_path: Path) -> Iterator[str]:
    settings = host_config.parse({"host": {"label": LABEL}})
    app = create_app(settings, ControlClient(supervisor.path, 5), tmp_path / "token")
    server = make_server("127.0.0.1", 0, app, threaded=False, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()
    server.server_close()


class Run:
    """The output and the exit status of a command."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        self.status = 0
        try:
            cli.main(list(arguments))
        except SystemExit as end:
            self.status = end.code if isinstance(end.code, int) else 1
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("NBAGENT_URL", url)
    return lambda *arguments: Run(capsys, *arguments)


def test_claim_prints_the_url_and_nothing_else(run: Any) -> None:
    done = run("claim")
    assert re.fullmatch(r"http://127\.0\.0\.1:8000/user/c07-\w{12}/lab\?token=\S{43}\n", done.out)
    assert (done.status, done.err) == (0, "")


def test_claim_sends_the_options_that_are_given(run: Any, supervisor: FakeSupervisor) -> None:
    options = ["--memory", "512M", "--cpu-weight", "50", "--cpu-quota", "1/4", "--ttl", "2h",
               "--path", "lab/tree/a.ipynb", "--image", "minimal", "--idempotency-key", "k1"]
    claim = run("claim", "--json", *options).json
    assert claim["limits"]["memory_bytes"] == 512 << 20
    assert supervisor.asked[-1]["args"]["options"] == {
        "memory": "512M", "cpu_weight": "50", "cpu_quota": "1/4", "ttl": "2h",
        "path": "lab/tree/a.ipynb", "image": "minimal",
    }
    assert run("claim", "--json", *options).json["slot"] == claim["slot"]


def test_claim_sends_files_and_an_archive(run: Any, supervisor: FakeSupervisor, tmp_path: Path) -> None:
    (tmp_path / "a.ipynb").write_bytes(b"{}")
    (tmp_path / "b=c").write_bytes(b"\0\xff")
    url = "https://data.example.org/courses/one.tar.gz"
    done = run("claim", "--file", f"{tmp_path}/a.ipynb", "--file", f"{tmp_path}/b=c=deep/er", "--archive", url)
    assert done.status == 0
    args = supervisor.asked[-1]["args"]
    assert args["options"].keys() == {"archive", "files"} and args["options"]["archive"] == url
    assert args["options"]["files"].entries == (("a.ipynb", 2), ("deep/er", 2))
    missing = run("claim", "--file", f"{tmp_path}/none")
    assert missing.status == 1 and "none" in missing.err


def test_the_error_of_a_refused_option_is_one_line_with_the_expected_value(run: Any) -> None:
    done = run("claim", "--memory", "lots")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("nbagent: memory: expected a size") and done.err.count("\n") == 1


def test_a_full_host_has_the_exit_status_of_a_temporary_failure(run: Any, supervisor: FakeSupervisor) -> None:
    supervisor.capacity = 0
    assert run("claim").status == 75


def test_slots_are_shown_in_plain_columns_without_a_terminal(run: Any) -> None:
    slot = run("claim", "--json").json["slot"]
    head, *lines = run("slots").out.splitlines()
    line, = (line for line in lines if "claimed" in line)
    assert head.split()[:3] == ["SLOT", "STATE", "IMAGE"]
    assert line.split()[:3] == [slot, "claimed", "minimal"]
    assert "90M of 1G" in line
    assert slot in [document["slot"] for document in run("slots", "--json").json]
    assert run("slots", "--json", slot).json["slot"] == slot
    assert slot in run("slots", slot).out


def test_release_continues_after_a_failure_and_reports_it(run: Any, supervisor: FakeSupervisor) -> None:
    slots = [run("claim", "--json").json["slot"] for _ in range(2)]
    done = run("release", slots[0], ABSENT, slots[1])
    assert done.status == 3
    assert done.out.splitlines() == [f"{slot} stopping" for slot in slots]
    assert ABSENT in done.err
    assert supervisor.slots == {}


@pytest.mark.parametrize("slot", ["../../etc/passwd", "a-label-000000000000", "a b", "ä", "?x=1", "#"])
def test_an_invalid_id_has_the_exit_status_of_an_unknown_slot(run: Any, slot: str) -> None:
    done = run("release", slot)
    assert (done.status, done.err.count("\n")) == (3, 1)
    assert "is not a slot id" in done.err


def test_drain_refuses_claims_until_drain_off(run: Any) -> None:
    assert run("drain", "--json").json["draining"] is True
    assert run("claim").status == 75
    assert run("drain", "--off", "--json").json["draining"] is False
    assert run("claim").status == 0
    assert run("drain", "--off", "--wait").status == 2


def test_drain_waits_for_the_last_slot(
    run: Any, supervisor: FakeSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("claim")
    monkeypatch.setattr("time.sleep", lambda _: supervisor.slots.clear())
    assert run("drain", "--wait", "--json").json == {"draining": True, "claimed": 0, "warm": 0}


def test_drain_ends_at_its_deadline_with_an_exit_status_of_its_own(run: Any) -> None:
    run("claim")
    done = run("drain", "--wait", "soon", "--json")
    assert done.status == 2 and "--wait soon: expected" in done.err
    done = run("drain", "--wait", "0.05", "--json")
    assert (done.status, done.json["claimed"], done.err) == (75, 1, "nbagent: 1 claimed slots are left after 0.05\n")


@pytest.mark.parametrize("error", [SupervisorUnavailable("restarting"), Full("no thread is left"), NbagentError()])
def test_drain_waits_over_a_restart_of_the_api_and_notices_the_end_of_the_drain(
    run: Any, supervisor: FakeSupervisor, monkeypatch: pytest.MonkeyPatch, error: NbagentError
) -> None:
    run("claim")
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        supervisor.raises = error if len(pauses) == 1 else None
        if len(pauses) == 3:
            supervisor.draining = False

    monkeypatch.setattr("time.sleep", sleep)
    done = run("drain", "--wait", "1h", "--json")
    assert (done.status, done.err) == (75, "nbagent: 1 claimed slots are left because the drain was ended\n")
    assert len(pauses) == 3


def test_stats_and_images_are_shown(run: Any) -> None:
    assert re.search(r"^available +1000$", run("stats").out, re.MULTILINE)
    assert run("stats", "--json").json["capacity"] == 1000
    assert "minimal" in run("images").out
    assert run("images", "--json").json[0]["default"] is True


def test_the_error_of_an_unreachable_api_is_one_line(run: Any) -> None:
    done = run("stats", "--url", "http://127.0.0.1:1")
    assert (done.status, done.out, done.err.count("\n")) == (69, "", 1)
    assert "Connection refused" in done.err


@pytest.mark.parametrize("address", ["", "nonsense", "ftp://host", "http://", "http://h:x", "http://h/?q=1"])
def test_an_invalid_url_is_refused(run: Any, address: str) -> None:
    assert run("stats", "--url", address).status == 2


def test_the_token_in_a_file_is_sent(run: Any, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("the-token-of-this-host\n")
    (tmp_path / "other").write_text("another")
    assert run("stats", "--token-file", str(tmp_path / "token")).status == 0
    assert run("stats", "--token-file", str(tmp_path / "other")).status == 4
    assert run("stats", "--token-file", str(tmp_path / "absent")).status == 78


@pytest.mark.parametrize("text", ["", " \n", "two\nlines", "ä"])
def test_a_file_without_a_token_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_token(path)


def test_config_check_shows_the_files_that_were_read(run: Any, tmp_path: Path) -> None:
    settings = tmp_path / "nbagent.toml"
    settings.write_text("[slots]\nmemory = '2G'\n")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "10-site.toml").write_text("[api]\nworkers = 4\n")
    assert run("config", "check", str(settings)).out.startswith(f"OK, read from {settings}, ")
    shown = run("config", "check", "--json", str(settings)).json
    assert len(shown["files"]) == 2
    assert shown["config"]["slots"]["memory"] == 2 << 30
    assert shown["config"]["api"]["trusted_networks"] == ["127.0.0.0/8", "::1/128"]
    assert shown["config"]["host"]["label"] == "auto"


@pytest.mark.parametrize("text", ["[slots]\nmemroy = '2G'", "[slots]\nmemory = 'lots'", "[slots"])
def test_the_error_of_config_check_is_one_line_with_the_file(run: Any, tmp_path: Path, text: str) -> None:
    settings = tmp_path / "nbagent.toml"
    settings.write_text(text)
    done = run("config", "check", str(settings))
    assert (done.status, done.err.count("\n")) == (78, 1)
    assert str(settings) in done.err
    assert run("config", "check", str(tmp_path / "absent.toml")).status == 78


def test_doctor_works_without_a_running_service(run: Any) -> None:
    done = run("doctor", "--url", "http://127.0.0.1:1", "--json")
    findings = {finding["name"]: finding for finding in done.json}
    assert findings["API"]["status"] == "fail"
    assert all(finding["mend"] for finding in findings.values() if finding["status"] != "ok")
    assert done.status == 1
    assert run("doctor", "--url", "http://127.0.0.1:1").out


def test_an_image_store_is_listed_and_a_wrong_name_refused(run: Any, tmp_path: Path) -> None:
    store = ["--store", str(tmp_path / "images")]
    assert run("image", "list", "--json", *store).json == []
    done = run("image", "remove", "no-such-image", *store)
    assert (done.status, done.err.count("\n")) == (3, 1)
    (tmp_path / "x.tar").write_bytes(b"not an archive")
    done = run("image", "add", "--name", "x", str(tmp_path / "x.tar"), *store)
    assert (done.status, done.err.count("\n")) == (65, 1)


def test_a_problem_document_becomes_the_exception_that_it_describes() -> None:
    problem = {"type": "urn:nbagent:problem:full", "title": "t", "status": 503, "detail": "full up",
               "retry_after_s": 5}
    error = error_of_problem(problem, 503)
    assert isinstance(error, Full)
    assert (str(error), error.details) == ("full up", {"retry_after_s": 5})


@pytest.mark.parametrize("problem", [[], None, {}, {"type": 7}, {"detail": ["x"], "message": 1, "self": 2}])
def test_a_malformed_problem_document_becomes_an_error(problem: Any) -> None:
    assert isinstance(error_of_problem(problem, 500), NbagentError)


def test_a_url_may_have_a_path() -> None:
    assert Remote("https://gateway.example/agents/c07/").url == "https://gateway.example/agents/c07"
    with pytest.raises(InvalidField):
        Remote("https://gateway.example/#x")


def test_every_command_has_help_and_the_option_json(run: Any) -> None:
    commands = ["claim", "release", "slots", "stats", "drain", "images", "config check", "doctor",
                "image add", "image list", "image remove"]
    for command in commands:
        assert "--json" in run(*command.split(), "--help").out, command
    assert run("--version").out.startswith("nbagent ")
    assert run("no-such-command").status == 2


def test_the_manual_page_has_every_command_and_option() -> None:
    page = (ROOT / "packaging/man/nbagent.1").read_text()

    def walk(command: click.Command, words: str) -> None:
        if isinstance(command, click.Group):
            for name, child in command.commands.items():
                walk(child, f"{words} {name}".strip())
            return
        assert f".Cm {words}\n" in page, words
        for option in (option for parameter in command.params for option in parameter.opts):
            if option.startswith("--"):
                assert f"Fl Fl {option[2:]}" in page, option

    walk(nbagent_command, "")


def test_help_texts_are_imperative_sentences() -> None:
    def walk(command: click.Command) -> None:
        first = (command.help or "").split()[0]
        assert not first.endswith("s"), f"{command.name}: {command.help}"
        assert first[0].isupper()
        for child in command.commands.values() if isinstance(command, click.Group) else ():
            walk(child)

    walk(nbagent_command)


def test_the_command_imports_no_module_before_it_is_needed() -> None:
    code = (
        "import sys, nbagent.cli\n"
        "print([m for m in ('rich', 'flask', 'http.client', 'ssl', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_terminal_gets_a_table(run: Any, url: str) -> None:
    slot = run("claim", "--json").json["slot"]
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from nbagent.cli import main; main(sys.argv[1:])", "slots", "--url", url],
        cwd=ROOT, stdout=follower, stderr=follower, env=environment,
    )
    os.close(follower)
    shown = b""
    try:
        while True:
            shown += os.read(leader, 4096)
    except OSError:
        pass  # EIO: the process has closed the follower end
    finally:
        os.close(leader)
        assert process.wait(10) == 0, shown
    assert slot.encode() in shown
    assert b"90M of 1G" in shown
    assert b"\x1b[" in shown


def test_the_client_works_with_the_dependencies_of_python3_nbagent_only(url: str) -> None:
    # python3-nbagent does not depend on these modules, so they are missing on a client.
    script = f"""
import sys
for name in "flask gunicorn nftables prometheus_client psutil pyroute2 pystemd seccomp systemd".split():
    sys.modules[name] = None
from nbagent.cli import main
main(["stats", "--json", "--url", {url!r}])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["label"] == LABEL


def summaries(group, width=78):  # as on a terminal of 80 columns
    """The commands of a group and of those in it, with the summaries that `--help` shows."""
    for name, command in group.commands.items():
        yield name, command.get_short_help_str(width - 6 - max(map(len, group.commands)))
        if isinstance(command, click.Group):
            yield from summaries(command, width)


def test_the_summary_of_each_command_fits_into_its_line():
    assert not [(name, summary) for name, summary in summaries(nbagent_command) if summary.endswith("...")]
