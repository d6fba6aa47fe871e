# SPDX-License-Identifier: BSD-3-Clause
"""The order of the sandbox's steps, pinned so that a change of it is deliberate."""

import pytest

from nbagent.image import ids
from nbagent.sandbox.plan import plan, zygote_plan
from nbagent.sandbox.spec import HOST_IDS, IDS, SandboxSpec, Uplink
from nbagent.sandbox.steps import UserNamespace

SPEC = SandboxSpec(
    slot="c07-x8q2m4k9w1ze", root="/images/rootfs", id_base=1 << 30, uid=2001, user="jovyan", home="/home/jovyan",
    storage_bytes=64 << 20, command=["/usr/bin/python3"], directory="/home/jovyan", port=0, listen_timeout_s=60.0,
    environment={}, code="/usr/lib/nbagent",
    mountpoint="/run/box", syscall_filter="AAAAAAAAAAA=", system="/run/sys", limit_files="/run/slots/one",
)


def names(steps):
    return [type(step).__name__ for step in steps]


def test_the_user_namespace_comes_first():
    assert names(plan(SPEC).outside) == ["UserNamespace", "Namespaces"]


def test_the_order_of_the_steps_inside():
    assert names(plan(SPEC).inside) == [
        "PrivateMounts", "Tmpfs", "Overlay", "Directory", "Directory", "Directory", "Directory", "LimitFiles", "Pivot",
        "Bind", "Bind", "Tmpfs", "Devices", "DevPts", "Bind", "Bind", "Link", "Link", "Link", "Link", "Link",
        "SharedProgram", "SystemFiles", "OwnCgroup", "LimitFile", "Proc", "LimitFile", "NetworkSettings", "Masked",
        "ReadOnly", "Detach", "Identity", "UserPackages", "Home", "Tmpfs", "Loopback", "ReadOnlyRoot",
    ]


def test_directories_that_everyone_may_write_to_are_copied_before_the_hosts_root_is_unmounted():
    order = names(plan(SPEC._replace(public=["/srv/open"])).inside)
    assert order.index("Pivot") < order.index("PublicDirectories") < order.index("Detach")


def test_the_root_is_read_only_after_everything_that_is_written_to_it():
    uplink = Uplink(["10.0.0.2/31"], ["10.0.0.3"], 1000)
    with_network = plan(SPEC._replace(uplink=uplink))
    assert "ReadOnlyRoot" not in names(with_network.inside)
    assert names(with_network.connected) == ["Interface", "Resolver", "ReadOnlyRoot"]
    assert names(zygote_plan(SPEC).inside)[-1] == "ReadOnlyRoot"


def test_privileges_are_dropped_last():
    assert names(plan(SPEC).last) == ["ResourceLimits", "Unprivileged", "SystemCalls"]


@pytest.mark.parametrize("forked", [False, True])
def test_the_apparmor_profile_is_entered_when_no_step_needs_a_right_that_it_refuses(forked):
    confined = plan(SPEC._replace(apparmor="nbagent-slots", forked=forked))
    assert names(confined.last) == ["ResourceLimits", "Unprivileged", "AppArmor", "SystemCalls"]
    assert confined.lines()[-2].step == "AppArmor profile nbagent-slots"
    # A zygote makes and joins the namespaces of slots, which the profile refuses.
    assert "AppArmor" not in names(zygote_plan(SPEC._replace(apparmor="nbagent-slots")).last)


def test_no_process_of_a_slot_can_gain_a_capability():
    """An exec'd slot empties the whole bounding set; the PID 1 of a forked slot inherits an empty one."""
    assert plan(SPEC).last[1].held is None
    assert plan(SPEC._replace(forked=True)).last[1].held == ()


def test_sources_between_pivot_and_detach_are_relative_to_the_host_and_targets_absolute():
    steps = plan(SPEC).inside
    order = names(steps)
    for step in steps[order.index("Pivot") + 1 : order.index("Detach")]:
        if hasattr(step, "source"):
            assert not step.source.startswith("/"), step
        if hasattr(step, "target"):
            assert step.target.startswith("/"), step


def test_every_tmpfs_is_limited_by_the_slots_storage():
    for step in plan(SPEC).inside:
        if type(step).__name__ == "Tmpfs":
            assert 0 < step.size_bytes <= SPEC.storage_bytes
            assert 0 < step.inodes <= SPEC.storage_bytes // 4096


def test_a_plan_describes_each_step_with_its_reason_and_undo():
    lines = plan(SPEC).lines()
    assert [line.part for line in lines] == ["outside"] * 2 + ["inside"] * 37 + ["last"] * 3
    assert lines[0].step == f"user namespace of {(1 << 30) + 2001}: ids 0..65535 are {1 << 30}.. on the host"
    assert lines[-1].step == "system call filter of 1 instructions"
    assert len({line.step for line in lines}) == len(lines)
    for line in lines:
        assert len(line.reason) > 12 and not line.reason.endswith(":") and line.undo


def test_a_specification_survives_serialization():
    assert SandboxSpec.restore(SPEC.save()) == SPEC


def test_the_ids_of_a_sandbox_are_those_of_images():
    assert range(ids.BASES.start, ids.BASES.stop) == HOST_IDS and ids.COUNT == IDS


@pytest.mark.parametrize(("id_base", "uid"), [
    (0, 0), (1000, 0), (65536, 2001), (HOST_IDS.start - 1, 0), (HOST_IDS.stop - 1, 0), (HOST_IDS.stop, 0), (-65536, 0),
    (HOST_IDS.start, -1), (HOST_IDS.start, IDS), (HOST_IDS.start, -HOST_IDS.start),
])
def test_no_sandbox_gets_ids_of_the_hosts_users(id_base, uid):
    """The supervisor sends the ids to processes that have the right to take any."""
    with pytest.raises(PermissionError, match="not those of an image"):
        UserNamespace(id_base, uid).do()
