# SPDX-License-Identifier: BSD-3-Clause
"""Swap stays in memory only when every area is zram without a backing device."""

import pytest

from nbagent.linux import swap

HEAD = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"


@pytest.fixture
def host(tmp_path):
    """Makes a root directory with the areas in /proc/swaps and their devices' files in sysfs."""

    def make(*areas, **devices):
        (tmp_path / "proc").mkdir()
        lines = [f"{name}{' ' * 30}\tpartition\t1048572\t\t0\t\t100\n" for name in areas]
        (tmp_path / "proc/swaps").write_text(HEAD + "".join(lines))
        for name, files in devices.items():
            (tmp_path / "sys/block" / name).mkdir(parents=True)
            for file, text in files.items():
                (tmp_path / "sys/block" / name / file).write_text(text)
        return tmp_path

    return make


ZRAM = {"comp_algorithm": "lzo [lz4]\n", "backing_dev": "none\n"}


def test_zram_is_memory(host):
    found = swap.read(host("/dev/zram0", "/dev/zram1", zram0=ZRAM, zram1={"comp_algorithm": "[lz4]\n"}))
    assert found == swap.Swap(("/dev/zram0", "/dev/zram1"), ()) and found.stays_in_memory


def test_one_area_on_a_disk_suffices_for_pages_to_reach_it(host):
    found = swap.read(host("/dev/zram0", "/dev/sda2", zram0=ZRAM, sda2={"size": "7\n"}))
    assert found == swap.Swap(("/dev/zram0",), ("/dev/sda2",)) and not found.stays_in_memory


def test_zram_with_a_backing_device_is_a_disk(host):
    found = swap.read(host("/dev/zram0", zram0=ZRAM | {"backing_dev": "/dev/sda3\n"}))
    assert found.on_disk == ("/dev/zram0",) and not found.stays_in_memory


def test_a_device_without_comp_algorithm_is_a_disk(host):
    assert swap.read(host("/dev/zram0", zram0={"size": "7\n"})).on_disk == ("/dev/zram0",)


def test_a_file_is_a_disk_whatever_its_name(host):
    root = host(zram0=ZRAM)
    (root / "proc/swaps").write_text(HEAD + "/srv/zram0\t\tfile\t\t1048572\t\t0\t\t-2\n")
    assert swap.read(root).on_disk == ("/srv/zram0",)


def test_no_swap_and_a_kernel_without_swap(host, tmp_path):
    assert not swap.read(tmp_path).stays_in_memory
    assert swap.read(host()) == swap.Swap((), ())
