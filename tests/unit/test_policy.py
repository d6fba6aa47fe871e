# SPDX-License-Identifier: BSD-3-Clause
"""The decisions on pools, admission, culling and compression, which are pure."""

import dataclasses

import pytest

from nbagent.core.model import Limits, Slot, SlotState
from nbagent.policy import admission, compress, cull, limit_alerts, pool
from nbagent.policy.admission import COSTS, Cost, Pressure
from nbagent.policy.cull import ActivitySample
from nbagent.policy.limit_alerts import Storage
from nbagent.policy.pool import Pool, Retire

GIB = 1 << 30
NOW_S = 5000.0
HOST = admission.Host(
    capacity=10, live=0, starts=Cost(0.0, 0), starts_max=4,
    memory_available_bytes=8 * GIB, memory_reserve_bytes=GIB, draining=False,
)


def make_pool(warm=(), **changes):
    fields = {"image": "minimal", "digest": "new", "launch": "exec", "wanted": 2, "starting": 0, "waiting": 0}
    return Pool(**{**fields, "warm": tuple(warm), **changes})


def host(**changes):
    return dataclasses.replace(HOST, **changes)


def busy(**starting):
    """The cost of starts under way; `starting` is their number by launch."""
    return admission.under_way(starting)


def fresh(name, age_s=1.0, left_s=1000.0, digest="new"):
    return Slot(
        id=name, image="minimal", digest=digest, id_base=1 << 20, uid=2000, state=SlotState.WARM,
        limits=Limits(GIB, 100, None, 256), token="", created_s=NOW_S - age_s, ends_s=NOW_S + left_s,
    )


def former(name):
    return fresh(name, 5.0, digest="former")


def decide(pools, on, max_age_s, life_s=500.0):
    return pool.decide(pools, on, NOW_S, max_age_s, life_s)


def test_an_empty_pool_is_filled():
    assert decide([make_pool()], HOST, 100).start == ("minimal", "minimal")


def test_slots_that_are_starting_are_not_started_again():
    assert decide([make_pool(starting=1)], HOST, 100).start == ("minimal",)


def test_starts_at_a_time_are_bounded():
    decision = decide([make_pool(wanted=9)], host(starts=busy(exec=1), starts_max=3), 100)
    assert decision.start == ("minimal", "minimal")


def test_starts_stay_within_capacity():
    assert decide([make_pool(wanted=9)], host(capacity=5, live=4), 100).start == ("minimal",)
    assert decide([make_pool(wanted=9)], host(capacity=5, live=5), 100).start == ()


def test_starts_stay_within_memory_less_that_of_starts_under_way():
    enough_for_two = GIB + 2 * COSTS["exec"].memory_bytes
    quiet = host(memory_available_bytes=enough_for_two)
    one_starting = dataclasses.replace(quiet, starts=busy(exec=1))
    assert len(decide([make_pool(wanted=9)], quiet, 100).start) == 2
    assert len(decide([make_pool(wanted=9, starting=1)], one_starting, 100).start) == 1
    assert decide([make_pool()], host(memory_available_bytes=GIB // 2), 100).start == ()


def test_starts_by_fork_are_more_at_a_time_and_set_aside_less_memory():
    forked = make_pool(launch="fork", wanted=99)
    assert len(decide([forked], host(capacity=99, starts_max=2), 100).start) == 8
    assert len(decide([forked], host(capacity=99, starts_max=2, starts=busy(fork=3, exec=1)), 100).start) == 1
    enough_for_five = GIB + 5 * COSTS["fork"].memory_bytes
    assert len(decide([forked], host(memory_available_bytes=enough_for_five), 100).start) == 5
    assert decide([make_pool()], host(memory_available_bytes=enough_for_five - 1), 100).start == ()


def test_while_processes_wait_the_pool_is_filled_by_one_start_at_a_time_and_claims_have_theirs():
    for pressure in (Pressure(cpu=90.0), Pressure(io=60.0)):
        strained = host(pressure=pressure)
        assert len(decide([make_pool(wanted=5)], HOST, 100).start) == 4
        assert len(decide([make_pool(wanted=5)], strained, 100).start) == 1
        assert decide([make_pool(wanted=5, starting=1)], strained, 100).start == ()
        two = [make_pool(image="a", wanted=5), make_pool(image="b", wanted=5, launch="fork")]
        assert len(decide(two, strained, 100).start) == 1
        # Each of three claims has a start, and the pool none beside them.
        assert len(decide([make_pool(wanted=5, waiting=3)], strained, 100).start) == 3
        assert len(decide([make_pool(wanted=5, waiting=3, starting=1)], strained, 100).start) == 2
        waited_for = make_pool(image="b", wanted=0, waiting=2)
        assert decide([make_pool(image="a", wanted=5), waited_for], strained, 100).start == ("b", "b")


def test_a_host_that_waits_for_memory_starts_slots_for_claims_only_and_offers_no_more():
    short = host(pressure=Pressure(memory=20.0), kept_bytes=5 * GIB)
    assert decide([make_pool(wanted=5)], short, 100).start == ()
    assert len(decide([make_pool(wanted=5, waiting=2)], short, 100).start) == 2
    # A slot at its own limit waits for memory too, on a host that has plenty.
    assert len(decide([make_pool(wanted=2)], host(pressure=Pressure(memory=99.0), kept_bytes=GIB), 100).start) == 2
    use, of_host = admission.MemoryUse(3, 60 << 20), (24 * GIB, 8 * GIB, GIB, GIB)
    assert admission.fitting(3, use, *of_host) > 10
    assert admission.fitting(3, use, *of_host, Pressure(memory=20.0)) == 3
    assert admission.fitting(3, use, 24 * GIB, 20 * GIB, GIB, GIB, Pressure(memory=20.0)) > 10


def test_a_small_start_does_not_overtake_a_large_one_that_is_more_urgent():
    waited_for = make_pool(image="slow", wanted=0, waiting=1)
    low = make_pool(image="fast", launch="fork", wanted=9)
    assert decide([low, waited_for], host(starts_max=1, starts=busy(fork=1)), 100).start == ()


def test_a_claim_waits_while_there_is_a_slot_for_it_to_wait_for():
    assert admission.may_wait("a", {"a": 0}, room=1, ending=0)
    assert admission.may_wait("a", {"a": 0}, room=0, ending=1)
    assert admission.may_wait("a", {"a": -1}, room=0, ending=0)
    assert not admission.may_wait("a", {"a": 0}, room=0, ending=0)
    assert not admission.may_wait("a", {"a": 3}, room=2, ending=1)


def test_a_claim_waits_behind_those_of_other_images_and_not_for_their_slots():
    assert not admission.may_wait("a", {"a": 0, "b": 2}, room=2, ending=0)
    assert admission.may_wait("a", {"a": 0, "b": -2}, room=1, ending=0)
    assert not admission.may_wait("a", {"a": 0, "b": -2}, room=0, ending=0)


def test_a_claim_that_waits_comes_before_a_pool_that_is_low():
    low, waited_for = make_pool(image="low", wanted=5), make_pool(image="wanted", wanted=0, waiting=1)
    assert decide([low, waited_for], host(starts_max=1), 100).start == ("wanted",)


def test_a_pool_with_failed_starts_pauses_and_others_go_on():
    failed, other = make_pool(image="failed", paused_s=3.0), make_pool(image="other", wanted=1)
    assert decide([failed, other], HOST, 100).start == ("other",)


def test_while_a_pool_pauses_one_start_is_tried_for_a_claim_that_waits():
    """The cause of the failures may have been mended, and a pause takes up to a minute."""
    paused = make_pool(wanted=5, waiting=3, paused_s=50.0, failed_ago_s=pool.TRY_S)
    assert decide([paused], HOST, 100).start == ("minimal",)
    for changes in ({"failed_ago_s": pool.TRY_S - 0.1}, {"waiting": 0}, {"starting": 1}, {"digest": None}):
        assert decide([dataclasses.replace(paused, **changes)], HOST, 100).start == ()
    other = make_pool(image="other", wanted=1)
    assert decide([dataclasses.replace(paused, failed_ago_s=0.0), other], HOST, 100).start == ("other",)


def test_the_pause_doubles_and_is_bounded():
    assert [pool.backoff(n, 1.0, 60.0) for n in (0, 1, 2, 3, 7, 500)] == [0.0, 1.0, 2.0, 4.0, 60.0, 60.0]


def test_a_stale_slot_is_retired_after_it_is_replaced():
    old = former("old")
    assert decide([make_pool([old])], HOST, 100).retire == ()
    decision = decide([make_pool([old, fresh("a"), fresh("b")])], HOST, 100)
    assert decision.retire == (Retire("old", "its image was replaced"),)


def test_a_slot_older_than_max_age_is_replaced_then_retired():
    aged = fresh("aged", age_s=101)
    assert decide([make_pool([aged, fresh("a")])], HOST, 100) == pool.Decision(("minimal",), ())
    decision = decide([make_pool([aged, fresh("a"), fresh("b")])], HOST, 100)
    assert decision.retire == (Retire("aged", "it is too old to be claimed"),)


def test_a_slot_that_ends_before_ttl_max_is_replaced_then_retired():
    short = fresh("short", left_s=499)
    assert decide([make_pool([short, fresh("a")])], HOST, 100) == pool.Decision(("minimal",), ())
    decision = decide([make_pool([short, fresh("a"), fresh("b")])], HOST, 100)
    assert decision.retire == (Retire("short", "it is too old to be claimed"),)


def unforked(name):
    return dataclasses.replace(fresh(name, 5.0), launch_reason="its zygote is being started")


def test_slots_that_no_complete_zygote_forked_are_replaced_when_one_forks():
    slots = [unforked("a"), unforked("b")]
    assert decide([make_pool(slots, launch_reason="its zygote has no warm-up")], HOST, 100) == pool.Decision((), ())
    decision = decide([make_pool(slots, launch="fork")], HOST, 100)
    assert decision == pool.Decision(("minimal", "minimal"), ())
    decision = decide([make_pool([*slots, fresh("c"), fresh("d")], launch="fork")], HOST, 100)
    reason = "a complete zygote has forked its replacement, but when it was started: its zygote is being started"
    assert decision == pool.Decision((), (Retire("a", reason), Retire("b", reason)))


def test_without_room_a_stale_slot_makes_room_for_its_replacement():
    stale = [former("x"), former("y")]
    assert len(decide([make_pool(stale)], host(live=10), 100).retire) == 1


def test_a_smaller_pool_lets_the_oldest_go_but_not_while_a_claim_waits():
    three = [fresh("a", 1), fresh("b", 3), fresh("c", 2)]
    assert decide([make_pool(three)], HOST, 100).retire == (Retire("b", "the pool is smaller now"),)
    assert decide([make_pool(three, waiting=1)], HOST, 100).retire == ()


def test_warm_slots_of_a_removed_image_are_retired():
    decision = decide([make_pool([fresh("a")], digest=None)], HOST, 100)
    assert decision == pool.Decision((), (Retire("a", "its image was removed"),))


def test_a_draining_host_starts_no_slot_and_retires_warm_ones():
    decision = decide([make_pool([fresh("a")], waiting=2)], host(draining=True), 100)
    assert decision == pool.Decision((), (Retire("a", "the host drains"),))


def test_a_promise_is_a_multiple_of_the_memory():
    assert admission.promised(24 * GIB, GIB, 4.0) == 96
    assert admission.promised(24 * GIB, 1, 4.0) == admission.CAPACITY_MAX
    assert admission.promised(GIB // 2, GIB, 1.0) == 1


def test_slots_fit_by_their_use_and_never_beyond_the_most():
    at_rest = admission.MemoryUse(claimed=400, memory_bytes=400 * (16 << 20))
    most = admission.most(24 * GIB, GIB // 2, GIB)
    assert 600 < admission.fitting(400, at_rest, 24 * GIB, 14 * GIB, GIB // 2, GIB) < most < 1400
    # A host without any memory to spare keeps what it has; a tiny one takes a slot.
    assert admission.fitting(400, at_rest, 24 * GIB, GIB, GIB // 2, GIB) == 400
    assert admission.fitting(0, admission.MemoryUse(), GIB // 2, GIB // 4, GIB // 2, GIB) == 1


def test_the_obstacle_names_the_reason():
    assert "10 slots" in admission.obstacle(host(live=10))
    assert "512 MiB" in admission.obstacle(host(memory_available_bytes=GIB // 2))
    assert "draining" in admission.obstacle(host(draining=True))


SAMPLE = ActivitySample(claimed_s=100.0, expires_s=10000.0, active_s=100.0, acted_s=0.0, busy=0, cpu=0.0, oom_kills=0)


def reason_at(now_s, **changes):
    return cull.reason(dataclasses.replace(SAMPLE, **changes), 600.0, 0.05, now_s)


def test_an_unused_slot_is_idle_from_its_claim():
    assert reason_at(699.0) is None
    assert reason_at(700.0) == "idle"


def test_idle_time_counts_from_the_last_activity():
    assert reason_at(1199.0, acted_s=600.0) is None
    assert reason_at(1200.0, acted_s=600.0) == "idle"


def test_a_slot_with_endless_oom_kills_is_ended_even_when_busy():
    assert reason_at(200.0, oom_kills=cull.OOM_KILLS_MAX - 1, busy=1) is None
    assert reason_at(200.0, oom_kills=cull.OOM_KILLS_MAX, busy=1) == "memory"


def test_a_slot_with_a_busy_kernel_is_not_idle():
    assert reason_at(9000.0, busy=1) is None


def test_use_of_processors_above_the_threshold_is_activity():
    assert reason_at(9000.0, cpu=0.06) is None
    assert reason_at(9000.0, cpu=0.04) == "idle"


def test_a_slot_whose_use_of_processors_is_unknown_is_not_idle():
    assert reason_at(9000.0, cpu=None) is None


def test_a_busy_slot_is_ended_when_its_time_is_up():
    assert reason_at(10000.0, busy=3, cpu=2.0) == "age"


def storage(share, files=0.0):
    return Storage(int(1000 * share), 1000, int(1000 * files), 1000)


def test_refused_tasks_are_trouble_while_the_count_rises():
    calm = limit_alerts.find(limit_alerts.Trouble(), 0, storage(0))
    assert calm == limit_alerts.Trouble(0, False, False)
    bomb = limit_alerts.find(calm, 7, storage(0))
    assert bomb.refuses_tasks and limit_alerts.find(bomb, 9, storage(0)).refuses_tasks
    assert limit_alerts.find(bomb, 7, storage(0)) == limit_alerts.Trouble(7, False, False)


@pytest.mark.parametrize("full", [storage(0.99), storage(0.1, files=0.99), storage(1.0, files=1.0)])
def test_storage_is_full_until_there_is_room_again(full):
    found = limit_alerts.find(limit_alerts.Trouble(), 0, full)
    assert found.storage_full
    assert limit_alerts.find(found, 0, storage(0.95)).storage_full
    assert not limit_alerts.find(limit_alerts.Trouble(), 0, storage(0.95)).storage_full
    assert not limit_alerts.find(found, 0, storage(0.5)).storage_full


def test_storage_that_cannot_be_read_is_not_full():
    assert not limit_alerts.find(limit_alerts.Trouble(), 0, Storage()).storage_full


def test_a_slot_is_compressed_once_for_each_rest():
    assert not compress.due(100.0, None, 60.0, 159.0)
    assert compress.due(100.0, None, 60.0, 160.0)
    assert not compress.due(100.0, 160.0, 60.0, 9000.0)
    assert not compress.due(200.0, 160.0, 60.0, 259.0)
    assert compress.due(200.0, 160.0, 60.0, 260.0)


def test_no_slot_is_compressed_where_compression_is_off():
    assert not compress.due(100.0, None, None, 9000.0)


def test_compression_is_in_steps_with_pauses():
    assert [compress.steps(size << 20) for size in (0, 1, 32, 33, 4096)] == [0, 1, 1, 2, 128]
    assert compress.pause_s(0.2) == pytest.approx(0.2)
