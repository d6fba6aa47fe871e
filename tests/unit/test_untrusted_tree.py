"""The two policies for symbolic links of a Tree, and its descriptors."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nbagent.untrusted.tree import NotInTree, Tree


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("s")
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "inner").symlink_to("real")
    (root / "out").symlink_to("../outside")
    return root


def without_links(root: Path) -> Tree:
    return Tree(str(root), follow_links=False, directory_mode=0o700)


def with_links(root: Path) -> Tree:
    return Tree(str(root), follow_links=True, directory_mode=0o755)


@pytest.mark.parametrize("parts", [("inner",), ("inner", "x"), ("out",), ("out", "x", "y")])
@pytest.mark.parametrize("create", [False, True])
def test_no_link_is_followed_on_the_way(root: Path, parts: tuple[str, ...], create: bool) -> None:
    with without_links(root) as tree, pytest.raises(NotInTree) as raised:
        tree.directory_fd(parts, create=create)
    assert raised.value.filename == parts[0]
    assert os.listdir(root / "real") == [] and os.listdir(root.parent / "outside") == ["secret"]


def test_no_link_is_opened_as_a_file(root: Path) -> None:
    (root / "link").symlink_to("../outside/secret")
    with without_links(root) as tree:
        for name in ("link", "out"):
            with pytest.raises(NotInTree):
                tree.open_file((name,))
        with pytest.raises(NotInTree):
            tree.open_file(("out", "secret"))


def test_a_link_that_stays_below_the_root_is_followed_by_the_other_policy_only(root: Path) -> None:
    with with_links(root) as tree:
        os.close(tree.create_file(("inner", "x"), 0o644))
        with pytest.raises(OSError) as raised:
            tree.create_file(("out", "x"), 0o644)
    assert raised.value.errno == errno.EXDEV
    assert (root / "real/x").exists() and os.listdir(root.parent / "outside") == ["secret"]


def test_a_replaced_link_is_resolved_again(root: Path) -> None:
    with with_links(root) as tree:
        tree.directory_fd(("inner",))
        (root / "inner").unlink()
        (root / "inner").symlink_to("../outside")
        with pytest.raises(OSError, match="cross-device"):
            tree.directory_fd(("inner",))


@pytest.mark.parametrize("policy", [without_links, with_links])
def test_removal_deletes_links_and_not_their_targets(root: Path, policy: type[Tree]) -> None:
    (root / "real/deep").mkdir()
    (root / "real/deep/out").symlink_to("../../../outside")
    with policy(root) as tree:
        tree.directory_fd(("real", "deep"))
        for name in ("out", "real", "missing"):
            tree.remove((name,))
        with pytest.raises(FileNotFoundError):
            tree.directory_fd(("real", "deep"))
    assert os.listdir(root) == ["inner"] and os.listdir(root.parent / "outside") == ["secret"]


def test_descriptors_are_bounded_and_closed(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with without_links(root) as tree:
        for number in range(300):
            tree.directory_fd((f"d{number}", "sub"), create=True)
        assert len(os.listdir("/proc/self/fd")) <= before + 70
    assert len(os.listdir("/proc/self/fd")) == before
