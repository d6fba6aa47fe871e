# SPDX-License-Identifier: BSD-3-Clause
"""The script `activate` of a manifest: its environment, its failures, and its place before a server."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest

import nbagent
from nbagent.core.errors import ImageInvalid
from nbagent.core.model import Limits
from nbagent.image import manifest
from nbagent.image.store import Image
from nbagent.supervisor.sandbox_specs import zygote_spec
from nbagent.zygote import activated

MANIFEST = 'python = "/usr/bin/python3"\nuser = "jovyan"\nhome = "/home/jovyan"\n'
SHOW = "import json, os, sys; print(json.dumps([dict(os.environ), os.listdir('/proc/self/fd'), sys.argv[1:]]))"


def after(script):
    return activated.environment_after(script, sys.executable)


def test_the_environment_has_what_the_script_exports():
    made = after("export GDAL=/opt/gdal PATH=/opt/bin:$PATH; kept=inside\nexport LINES=$'a\\nb=c' EMPTY=\nunset LANG")
    assert made["GDAL"] == "/opt/gdal" and made["PATH"] == "/opt/bin:" + os.environ["PATH"]
    assert (made["LINES"], made["EMPTY"]) == ("a\nb=c", "")
    assert "kept" not in made and "LANG" not in made


def test_the_slots_own_variables_and_the_shells_are_left_out():
    assert not activated.KEPT & after("export HOME=/ USER=root NBAGENT_SLOT=other").keys()


def test_what_the_script_prints_is_output_and_no_variable(capfd):
    assert "PRINTED" not in after("printf 'PRINTED=1\\0\\0'")
    assert "PRINTED=1" in capfd.readouterr().out


def test_a_process_that_holds_the_pipe_delays_nothing():
    made = after("sleep 600 & export BACKGROUND=$!")
    os.kill(int(made["BACKGROUND"]), 9)


@pytest.mark.parametrize(("script", "text"), [
    ("exit 3", "ended before its last line; its shell ended with status 3"),
    ("set -e; false; export A=1", "ended with status 1"),
    ("kill -9 $$", "ended with status -9"),
    ("export A=$(seq 20000)", "larger than 65536 bytes"),
])
def test_a_script_that_does_not_reach_its_end_has_failed(script, text):
    with pytest.raises(activated.ActivationFailed, match=text):
        after(script)


def test_a_script_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(activated, "TIMEOUT_S", 0.5)
    with pytest.raises(activated.ActivationFailed, match="has not ended in"):
        after("sleep 600")


def test_the_names_of_changed_variables_are_found():
    before = {"A": "1", "B": "2", "C": "3", "HOME": "/home/jovyan"}
    assert activated.changed(before, {"A": "1", "B": "x", "D": "4"}) == ["B", "C", "D"]


def test_a_zygotes_variables_become_those_of_a_slot():
    found = activated.values(["--private-memory", "--activated=B,C"], {"A": "1", "B": "x"})
    slot = {"A": "own", "B": "2", "C": "3"}
    activated.apply(found, slot)
    assert slot == {"A": "own", "B": "x"}


@pytest.fixture(scope="module")
def program():
    """Runs the program as in a slot, with a script and arguments, under Python's flags there."""
    # A copy, because the user of the slot may not be permitted to read the checkout, as below /root.
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        package = Path(nbagent.__file__).parent
        shutil.copytree(package, f"{directory}/nbagent", ignore=shutil.ignore_patterns("__pycache__"))
        file = f"{directory}/nbagent/{Path(activated.__file__).relative_to(package)}"
        yield lambda script, *arguments, **options: run_as_user(file, script, *arguments, **options)


def run_as_user(file, script, *arguments, **options):
    # Not as root, because then it behaves as in a zygote.
    environment = {"HOME": "/nonexistent", "PATH": os.environ["PATH"], "A": "1", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-I", "-S", file, script, sys.executable, "-c", SHOW, *arguments]
    as_user = ["setpriv", "--reuid=65533", "--regid=65533", "--clear-groups"] if os.getuid() == 0 else []
    return subprocess.run([*as_user, *command], env=environment, capture_output=True, text=True, check=False, **options)


def test_the_program_follows_with_the_environment_and_its_descriptors(program):
    with open(os.devnull) as inherited:
        done = program("export B=2; unset A; exec 9<&0", "argument", pass_fds=[inherited.fileno()])
        assert done.returncode == 0, done.stderr
        environment, fds, arguments = json.loads(done.stdout)
        # One is listdir's own.
        assert len(fds) == 5 and str(inherited.fileno()) in fds
    assert environment["B"] == "2" and environment["PYTHONHASHSEED"] == "7" and "A" not in environment
    assert environment["HOME"] == "/nonexistent" and arguments == ["argument"]


def test_a_failed_script_ends_the_program_with_the_reason(program):
    done = program("exit 4")
    assert done.returncode == 1 and "activate: the script activate of the manifest ended before" in done.stdout


def test_the_script_is_stored_and_precedes_the_zygote():
    parsed = manifest.parse(('activate = ". /opt/setup.sh"\n' + MANIFEST).encode())
    assert manifest.from_mapping(manifest.to_mapping(parsed)) == parsed
    assert "activate" not in manifest.to_mapping(manifest.parse(MANIFEST.encode()))
    image = Image(
        name="minimal", digest="sha256-0", root=Path("/image"), static=Path("/static"), id_base=1 << 16,
        **{field.name: getattr(parsed, field.name) for field in fields(manifest.Program)},
    )
    command = zygote_spec(image, 1 << 20, Limits(1 << 30, 100, None, 64)).command
    assert command[1:3] == ["-I", "-S"] and command[4:6] == [". /opt/setup.sh", "/usr/bin/python3"]
    assert command[6].endswith("/zygote/zygote.py")


@pytest.mark.parametrize("text", ["activate = 1\n", 'activate = "a\\u0000b"\n'])
def test_the_script_is_validated(text):
    with pytest.raises(ImageInvalid, match="activate: "):
        manifest.parse((text + MANIFEST).encode())


def test_a_command_has_no_script():
    with pytest.raises(ImageInvalid, match="activate: expected python"):
        manifest.parse(b'activate = "true"\ncommand = ["serve"]\nuser = "jovyan"\nhome = "/home/jovyan"\n')
