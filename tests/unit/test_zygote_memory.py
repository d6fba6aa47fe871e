# SPDX-License-Identifier: BSD-3-Clause
"""The memory that a zygote shares with its forks, checked under the host's Python (tests/memory_checks.py).

CPython before 3.12 has neither sys.monitoring nor immortal objects: there the checks assert that nbagent reports them
as not supported. tests/integration/test_kernels.py runs all checks under the Python of the image minimal.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import memory_checks
from nbagent.core.errors import ImageInvalid
from nbagent.core.model import Limits
from nbagent.image import manifest
from nbagent.image.store import Image
from nbagent.supervisor.sandbox_specs import zygote_spec
from nbagent.zygote.memory.sharing import PRIVATE_MEMORY_OPTION

TOP = Path(__file__).resolve().parents[2]
MANIFEST = 'python = "/usr/bin/python3"\nuser = "jovyan"\nhome = "/home/jovyan"\n'


@pytest.mark.parametrize("name", memory_checks.names())
def test_memory(name: str) -> None:
    memory_checks.run(TOP, name)


def test_checks_of_immortal_objects_and_recorded_code_run_since_python_3_12() -> None:
    new = {check.__name__ for check in memory_checks.SINCE_3_12}
    assert new <= set(memory_checks.names((3, 13)))
    assert new.isdisjoint(memory_checks.names((3, 11)))


def test_share_memory_is_true_by_default_and_not_stored_then() -> None:
    parsed = manifest.parse(MANIFEST.encode())
    assert parsed.share_memory
    # The digest of an import with --manifest is computed from the mapping, so a default must not change it.
    assert "share_memory" not in manifest.to_mapping(parsed)


def test_share_memory_false_is_stored_and_restored() -> None:
    parsed = manifest.parse(f"share_memory = false\n{MANIFEST}".encode())
    assert not parsed.share_memory
    assert manifest.from_mapping(manifest.to_mapping(parsed)) == parsed


@pytest.mark.parametrize("text", [
    'share_memory = "no"\n' + MANIFEST,
    "share_memory = 0\n" + MANIFEST,
    'share_memory = false\nlaunch = "exec"\n' + MANIFEST,
    'share_memory = false\ncommand = ["serve"]\nuser = "jovyan"\nhome = "/home/jovyan"\n',
])
def test_share_memory_is_validated(text: str) -> None:
    with pytest.raises(ImageInvalid, match="share_memory: "):
        manifest.parse(text.encode())


@pytest.mark.parametrize("share_memory", [True, False])
def test_the_zygote_gets_the_switch_on_its_command_line(share_memory: bool) -> None:
    image = Image(
        name="minimal", digest="sha256-0", root=Path("/image"), static=Path("/static"), id_base=1 << 16,
        python="/usr/bin/python3", command=(), port=None, ready="api", url="lab", home="/home/jovyan",
        directory="/home/jovyan", user="jovyan", launch="fork", preload=(), environment={}, share_memory=share_memory,
    )
    command = zygote_spec(image, 1 << 20, Limits(1 << 30, 100, None, 64)).command
    assert (PRIVATE_MEMORY_OPTION in command) is not share_memory
