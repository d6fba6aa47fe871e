# SPDX-License-Identifier: BSD-3-Clause
"""Replays the inputs that `make fuzz` has found (tests/corpus), and its seeds, in each run."""

from __future__ import annotations

from pathlib import Path

import pytest

import fuzz_targets

CORPUS = Path(__file__).parent.parent / "corpus"
INPUTS = [
    pytest.param(name, path.read_bytes(), id=f"{name}-{path.name}")
    for name in fuzz_targets.TARGETS for path in sorted((CORPUS / name).glob("*"))
]


@pytest.mark.parametrize(("name", "content"), INPUTS)
def test_an_input_that_the_fuzzer_found_is_harmless(name: str, content: bytes) -> None:
    fuzz_targets.TARGETS[name](content)


@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
def test_the_seeds_of_the_fuzzer_are_harmless(name: str) -> None:
    for content in fuzz_targets.SEEDS[name]:
        fuzz_targets.TARGETS[name](content)


def test_a_fuzz_target_reports_what_its_decoder_may_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_targets.tar.Budget, "check_bytes", lambda budget, count: None)
    with pytest.raises(AssertionError, match="more than the limits"):
        fuzz_targets.fuzz_tar(b"".join(fuzz_targets.hostile.sparse("200000", "0,0", name) for name in "ab")
                              + fuzz_targets.hostile.END)
