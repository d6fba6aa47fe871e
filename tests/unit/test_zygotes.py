# SPDX-License-Identifier: BSD-3-Clause
"""The adoption of zygotes by the next supervisor, by the connections that systemd keeps for it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from fakes import make_image

from nbagent.config import host_config
from nbagent.config.host_config import CurrentConfig
from nbagent.core.errors import StartFailed
from nbagent.core.events import Event
from nbagent.core.model import Limits, now
from nbagent.supervisor import fd_store, former_zygotes, zygote_starter, zygotes
from nbagent.supervisor.zygote_identity import identity, unit_of
from nbagent.supervisor.zygote_starter import ZygoteStarter
from nbagent.supervisor.zygotes import Zygotes
from nbagent.wire.aio import receive
from nbagent.wire.channel import Channel
from nbagent.wire.failure import INHERITED_STEP, Failure

INSTANCE = "minimal:0a1b2c"


class Units:
    """The zygotes' units by name; a start fails."""

    def __init__(self, *instances: str) -> None:
        self.active = {unit_of(instance) for instance in instances}
        self.started: list[str] = []

    async def zygotes(self) -> list[str]:
        return sorted(self.active)

    async def set_limits(self, name: str, limits: Limits) -> None:
        pass

    async def set_cpu_weight(self, name: str, weight: int) -> None:
        pass

    async def start(self, name: str) -> None:
        self.started.append(name)
        raise StartFailed("no zygote starts here", step="zygote")

    async def stop(self, name: str) -> None:
        self.active.discard(name)


class SlowUnits(Units):
    """Units whose limits take time to set; `limited` are those that have limits."""

    def __init__(self) -> None:
        super().__init__()
        self.limited: set[str] = set()

    async def set_limits(self, name: str, limits: Limits) -> None:
        self.limited.add(name)
        await asyncio.sleep(10)

    async def stop(self, name: str) -> None:
        self.limited.discard(name)


class Service:
    """A zygote service that was connected to a former supervisor; `fd` is the end that systemd has kept."""

    def __init__(self, made_of: dict[str, Any], age_s: int = 60, responds: bool = True) -> None:
        kept, self.channel = Channel.pair()
        self.fd, self.made_of, self.age_s, self.responds = kept.detach(), made_of, age_s, responds
        self.channel.socket.setblocking(False)
        self.is_outdated: bool | None = None  # as a service of a former version, which does not report it

    async def run(self) -> None:
        with self.channel:
            while (request := await receive(self.channel)) is not None:
                if self.responds:
                    body = {"described": request.body["describe"], "identity": self.made_of, "age_s": self.age_s}
                    outdated = {} if self.is_outdated is None else {"outdated": self.is_outdated}
                    self.channel.send({**body, "forks": 7, **outdated})


@pytest.fixture
def events(monkeypatch):
    seen: list[tuple[Event, dict[str, Any]]] = []
    for module in (zygotes, zygote_starter):
        monkeypatch.setattr(module, "emit", lambda event, **fields: seen.append((event, fields)))
    return seen


@pytest.fixture
def stored(monkeypatch):
    """The messages to systemd about its descriptor store."""
    seen: list[str] = []
    monkeypatch.setattr(fd_store.daemon, "notify", lambda text, fds=None: seen.append(text))
    return seen


@pytest.fixture
def image(tmp_path):
    return make_image(tmp_path, launch="fork")


def made_of(image, quick=False, **changes):
    return identity(host_config.parse({}), image, quick=quick) | changes


class Starting(Service):
    """A zygote service whose zygote is being started; it responds when that is ready, or has failed."""

    def __init__(self, made_of: dict[str, Any], ready: bool = True, fails: bool = False) -> None:
        super().__init__(made_of, age_s=0)
        self.ready, self.fails = ready, fails

    async def run(self) -> None:
        await asyncio.sleep(0.02)
        with contextlib.suppress(BrokenPipeError):
            if self.fails:
                self.channel.send(Failure("zygote", 0, "no module named x").save())
            elif self.ready:
                self.channel.send({"ready": True, "notes": ["module y is left out"]})
        await super().run()


def adopt(image, services, wanted=None):
    """A supervisor that starts beside these services, by instance; returns its units and how the image starts."""

    async def run():
        units = Units(*services, "minimal:dead01")
        running = [asyncio.ensure_future(service.run()) for service in services.values()]
        supervisor = Zygotes(CurrentConfig(host_config.parse({})), units, is_busy=lambda: False)
        kept = {name: service.fd for name, service in services.items() if not isinstance(service, Starting)}
        begun = {name: service.fd for name, service in services.items() if isinstance(service, Starting)}
        await supervisor.open(kept, begun, image.root / "zygote.sock")
        supervisor.want({"minimal": wanted or image})
        responds = all(service.responds for service in services.values())
        async with asyncio.timeout(30):
            while responds and supervisor.launch("minimal") == "exec" and not units.started:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        launch = supervisor.launch("minimal")
        ended = [task.done() for task in running]
        await supervisor.close()
        await asyncio.gather(*running)
        return units, launch, ended

    return asyncio.run(run())


def test_a_zygote_of_the_same_version_and_image_is_adopted_and_no_other_is_started(image, events):
    units, launch, ended = adopt(image, {INSTANCE: Service(made_of(image))})
    assert launch == "fork" and ended == [False]
    assert units.active == {unit_of(INSTANCE)} and not units.started
    assert events == [(Event.ZYGOTE_ADOPTED, {"zygote": INSTANCE, "image": "minimal", "forks": 7})]


@pytest.mark.parametrize("service", [Service, Starting])
def test_a_quick_zygote_is_adopted_and_replaced(image, events, service):
    units, launch, ended = adopt(image, {INSTANCE: service(made_of(image, quick=True))})
    assert launch == "fork" and ended == [False]
    assert len(units.started) == 1 and unit_of(INSTANCE) not in units.started
    assert (Event.ZYGOTE_REPLACED, {"zygote": INSTANCE, "text": "it has no warm-up"}) in events


class RecordedStarter(ZygoteStarter):
    """Its starts succeed at once, or fail with `error` when they are those of a complete zygote; `quick` has the order.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.quick: list[bool] = []
        self.peers: list[Channel] = []
        self.error: StartFailed | None = None

    async def start(self, image, instance, *, quick, gives_way_until=None):
        self.quick.append(quick)
        if self.error is not None and not quick:
            raise self.error
        channel, peer = Channel.pair()
        channel.socket.setblocking(False)
        self.peers.append(peer)
        return channel


@pytest.mark.parametrize(("is_busy", "quick"), [(False, [False]), (True, [True, False])])
async def test_while_the_processors_are_busy_the_first_zygote_is_a_quick_one(image, events, is_busy, quick):
    config, units = CurrentConfig(host_config.parse({})), Units()
    supervisor, starter = Zygotes(config, units, is_busy=lambda: is_busy), RecordedStarter(config, units)
    supervisor._starter = starter
    await supervisor.open(path=image.root / "zygote.sock")
    supervisor.want({"minimal": image})
    await asyncio.sleep(0.05)
    await supervisor.close()
    for peer in starter.peers:
        peer.close()
    assert starter.quick == quick


async def after_an_end(image, **errors):
    """The starts of a zygote that ends unexpectedly, as RecordedStarter has them, and whether one forks afterwards."""
    config, units = CurrentConfig(host_config.parse({"pool": {"backoff": "10ms"}})), Units()
    supervisor, starter = Zygotes(config, units, is_busy=lambda: False), RecordedStarter(config, units)
    supervisor._starter = starter
    await supervisor.open(path=image.root / "zygote.sock")
    supervisor.want({"minimal": image})
    await asyncio.sleep(0.02)
    assert starter.quick == [False] and not supervisor.is_warming("minimal")
    starter.error = errors.get("error")
    starter.peers[0].close()
    await asyncio.sleep(0.2)
    forks = supervisor.launch("minimal") == "fork"
    await supervisor.close()
    for peer in starter.peers:
        peer.close()
    return starter.quick, forks


async def test_after_the_end_of_a_zygote_a_quick_one_is_first_and_a_complete_one_replaces_it(image, events):
    assert await after_an_end(image) == ([False, True, False], True)
    assert [event for event, _ in events] == [
        Event.ZYGOTE_READY, Event.ZYGOTE_ENDED, Event.ZYGOTE_READY, Event.ZYGOTE_REPLACED, Event.ZYGOTE_READY,
    ]


async def test_a_quick_zygote_forks_on_while_the_complete_one_fails(image, events):
    quick, forks = await after_an_end(image, error=StartFailed("no memory", step="zygote"))
    assert forks and quick[:2] == [False, True] and len(quick) > 3 and not any(quick[2:])


async def test_a_quick_zygote_is_not_replaced_when_the_complete_one_always_fails(image, events):
    quick, forks = await after_an_end(image, error=StartFailed("an open file", step=INHERITED_STEP))
    assert forks and quick == [False, True, False]


@pytest.mark.parametrize("service", [Service, Starting])
@pytest.mark.parametrize("change", [{"version": "0.2.0"}, {"code": 0}, {"made_of": "other settings"}])
def test_a_zygote_of_another_version_forks_until_its_replacement_is_ready(image, events, change, service):
    units, launch, ended = adopt(image, {INSTANCE: service(made_of(image, **change))})
    assert launch == "fork" and ended == [False]
    assert len(units.started) == 1 and unit_of(INSTANCE) in units.active
    assert Event.ZYGOTE_REPLACED in [event for event, _ in events]


@pytest.mark.parametrize("service", [Service, Starting])
@pytest.mark.parametrize("is_outdated", [True, False])
def test_a_zygote_whose_libraries_were_replaced_forks_until_its_replacement_is_ready(
    image, events, service, is_outdated
):
    former = service(made_of(image))
    former.is_outdated = is_outdated
    units, launch, ended = adopt(image, {INSTANCE: former})
    assert launch == "fork" and ended == [False] and unit_of(INSTANCE) in units.active
    replaced = [fields["text"] for event, fields in events if event is Event.ZYGOTE_REPLACED]
    assert replaced == ["libraries of the host were replaced after its start"] * is_outdated
    assert len(units.started) == is_outdated


@pytest.mark.parametrize("service", [Service, Starting])
@pytest.mark.parametrize("change", [{"protocol": "0"}, {"digest": "sha256-1"}])
def test_a_zygote_of_another_protocol_or_image_ends_and_another_is_started(
    image, events, change, service, monkeypatch
):
    monkeypatch.setattr(zygotes, "backoff", lambda *_: 0.0)
    units, launch, ended = adopt(image, {INSTANCE: service(made_of(image, **change))})
    assert launch == "exec" and ended == [True]
    assert units.started


def test_a_zygote_whose_service_does_not_respond_is_stopped(image, events, monkeypatch):
    monkeypatch.setattr(former_zygotes, "DESCRIBE_TIMEOUT_S", 0.05)
    units, launch, ended = adopt(image, {INSTANCE: Service(made_of(image), responds=False)})
    assert launch == "exec" and ended == [True]
    assert unit_of(INSTANCE) not in units.active and len(units.started) == 1


def test_of_two_zygotes_of_an_image_the_younger_is_adopted(image, events):
    services = {INSTANCE: Service(made_of(image), age_s=900), "minimal:ffffff": Service(made_of(image), age_s=1)}
    units, launch, ended = adopt(image, services)
    assert launch == "fork" and ended == [True, False]
    assert units.active == {unit_of("minimal:ffffff")} and not units.started


def test_a_response_to_a_supervisor_that_was_killed_is_skipped(image, events):
    service = Service(made_of(image))
    service.channel.send({"described": "of another", "identity": {}, "age_s": 0, "forks": 0})
    units, launch, _ = adopt(image, {INSTANCE: service})
    assert launch == "fork" and not units.started


def test_names_in_the_store_lead_back_to_instances():
    names = {3: "control", 5: "zygote/minimal/0a1b2c", 6: "check", 7: "begun-zygote/minimal/0a1b2d"}
    assert fd_store.kept(names) == {INSTANCE: 5}
    assert fd_store.begun(names) == {"minimal:0a1b2d": 7}


@pytest.mark.parametrize("ready", [True, False], ids=["ready later", "ready before"])
def test_a_zygote_that_was_starting_when_the_supervisor_ended_is_adopted_when_it_is_ready(
    image, events, stored, monkeypatch, ready
):
    monkeypatch.setattr(zygote_starter.cgroup, "of_process", lambda pid: None)
    units, launch, ended = adopt(image, {INSTANCE: Starting(made_of(image), ready)})
    assert launch == "fork" and ended == [False]
    assert units.active == {unit_of(INSTANCE)} and not units.started
    assert [event for event, _ in events] == [*([Event.ZYGOTE_LEFT_OUT] if ready else []), Event.ZYGOTE_READY]
    assert stored[:2] == [
        "FDSTOREREMOVE=1\nFDNAME=begun-zygote/minimal/0a1b2c", "FDSTORE=1\nFDNAME=zygote/minimal/0a1b2c",
    ]


def test_a_zygote_that_was_starting_and_fails_ends_and_another_is_started(image, events, stored, monkeypatch):
    monkeypatch.setattr(zygote_starter.cgroup, "of_process", lambda pid: None)
    starting = Starting(made_of(image), fails=True)
    monkeypatch.setattr(zygotes, "backoff", lambda *_: 0.0)
    units, launch, ended = adopt(image, {INSTANCE: starting})
    assert launch == "exec" and ended == [True]
    assert unit_of(INSTANCE) not in units.active and units.started
    assert "FDSTOREREMOVE=1\nFDNAME=begun-zygote/minimal/0a1b2c" in stored


def test_beside_a_zygote_that_is_ready_one_that_is_starting_ends(image, events, stored):
    services = {INSTANCE: Service(made_of(image)), "minimal:ffffff": Starting(made_of(image))}
    units, launch, ended = adopt(image, services)
    assert launch == "fork" and ended == [False, True]
    assert units.active == {unit_of(INSTANCE)}


def test_a_zygote_that_starts_is_left_to_the_next_supervisor(image, events, stored, monkeypatch):
    monkeypatch.setattr(zygote_starter.cgroup, "of_process", lambda pid: None)

    service = Starting(made_of(image), ready=False)
    service.responds = False
    _, launch, _ = adopt(image, {INSTANCE: service})
    assert launch == "exec" and not stored


@pytest.mark.parametrize(("forks", "born_s", "failures"), [(10, 0.0, 0), (9, 0.0, 6), (0, -61.0, 0)])
def test_a_zygote_that_has_paid_for_its_start_ends_the_series_of_failures(
    image, events, stored, forks, born_s, failures
):
    async def run():
        supervisor = Zygotes(CurrentConfig(host_config.parse({})), Units(), is_busy=lambda: False)
        await supervisor.open(path=image.root / "zygote.sock")
        ends = Channel.pair()
        pool = supervisor._pools["minimal"] = zygotes.ZygotePool(image, failures=5)
        pool.zygote = zygotes.Zygote(INSTANCE, image, ends[0], now() + born_s, forks)
        supervisor.give_up(pool.zygote, "it ended")
        assert supervisor.reason("minimal") == "its zygote failed: it ended"
        found = pool.failures, supervisor.is_warming("minimal")
        await supervisor.close()
        for end in ends:
            end.close()
        return found

    assert asyncio.run(run()) == (failures, failures == 0)


def test_limits_of_a_zygote_whose_image_goes_before_its_start_are_removed(image, events):
    async def run():
        units = SlowUnits()
        supervisor = Zygotes(CurrentConfig(host_config.parse({})), units, is_busy=lambda: False)
        await supervisor.open(path=image.root / "zygote.sock")
        supervisor.want({"minimal": image})
        async with asyncio.timeout(5):
            while not units.limited:
                await asyncio.sleep(0.01)
            supervisor.want({})
            while units.limited:
                await asyncio.sleep(0.01)
        await supervisor.close()
        return units.started

    assert asyncio.run(run()) == []
