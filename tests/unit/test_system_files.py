# SPDX-License-Identifier: BSD-3-Clause
"""The files below a slot's /sys are copies of the processors' files, made once."""

from nbagent.supervisor import system_files


def test_the_processors_are_copied_and_nothing_else(tmp_path):
    source, target = tmp_path / "sysfs", tmp_path / "sys"
    for name, text in (("devices/system/cpu/online", "0-1\n"), ("devices/system/cpu/cpu1/topology/core_id", "1\n"),
                       ("devices/system/cpu/cpu1/cpufreq/scaling_cur_freq", "1\n"), ("block/sda/size", "1\n"),
                       ("devices/system/cpu/vulnerabilities/meltdown", "x\n")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    system_files.make(target, source)
    files = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert files == {"devices/system/cpu/online": "0-1\n", "devices/system/cpu/cpu1/topology/core_id": "1\n"}
    assert (target / "fs/cgroup").is_dir() and [path.name for path in tmp_path.iterdir()].count("sys.new") == 0


def test_files_that_slots_have_mounted_stay(tmp_path):
    target = tmp_path / "sys"
    target.mkdir()
    system_files.make(target, tmp_path)
    assert list(target.iterdir()) == []
