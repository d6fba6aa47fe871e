#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make bench-page`: from the url to a cell's result in a browser, beside a bare warm `jupyter lab` and JupyterHub.

    tests/bench/page.py [--rounds N] [--throttle] [--no-hub] [--host NAME] [--out DIRECTORY]

Chromium opens lab/tree/Welcome.ipynb, by turns: in a fresh profile, and a second and a third time in the same
profile. On the side of nbagent each visit is to a new slot, and there is a fourth visit, in a fresh profile: the
landing page, which prerenders the notebook, is open for five seconds, and the times begin at the press of its button.
The bare server is one process of the same image for all visits, as warm as a server can be; its kernels and workspaces
are removed between two visits. JupyterHub with SystemdSpawner starts a server at each visit (hub_visits.py). Browser
and servers are in one network namespace, without a forwarder between. With --throttle the browser's network has 30
Mbit/s and a latency of 20 ms. The figures are medians; ratios are those of the medians of one run, because the speed of
the machine changes. page.png has the requests of the last round's first and third visits as a waterfall.

"Waiting" is the part of the time in which the page's main thread has no task, so that it waits for a server, the
network or the disk: what a faster server can save at most. The claim is before the visit and takes milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import figures
import sides
import waterfall
from client import Client, Server
from hub_visits import HubVisits
from selenium.common.exceptions import WebDriverException

import browser
import product
from product import say
from testhost_driver import Host, netns

OURS, BARE, HUB = "nbagent", "jupyter lab", "JupyterHub"
SIDES = (BARE, OURS, HUB)
VISITS = ("first", "second", "third")
CLICK = "click"
READ_S = 5.0
EVENTS = ("shell", "notebook", "kernel", "result")
COUNTS = ("requests", "cached", "kbytes")
DEADLINE_S = 120
NOTEBOOK = "lab/tree/Welcome.ipynb"
SETTINGS = "[pool]\nwarm = 4\n"
SCRIPT = (HERE / "page.js").read_text()
MARKS = "return window.benchMarks ?? {}"
THROTTLED = {"offline": False, "latency": 20, "downloadThroughput": 30e6 / 8, "uploadThroughput": 30e6 / 8}


class PageBench:
    """One run on one host. `samples` has the measured values by side, visit and figure."""

    def __init__(self, host: Host, client: Client, options: argparse.Namespace) -> None:
        self.host, self.client, self.options, self.api = host, client, options, product.Api(host)
        self.samples: dict[str, dict[str, dict[str, list[float]]]] = {
            side: {visit: {} for visit in (*VISITS, *([CLICK] if side == OURS else []))} for side in options.sides
        }
        self.traces: dict[str, list[dict[str, Any]]] = {}
        image = sides.image(host, "minimal")
        user = host.run(["stat", "-c", "%u", f"{image['root']}/home/jovyan"]).stdout.strip()
        self.bare_side = sides.SystemdRun(host, client, image["root"], user, 1)
        self.bare = client.run(self.bare_side.start(0, 0.05))
        notebook = f"{image['root']}/home/jovyan/{Path(NOTEBOOK).name}"
        self.hub = HubVisits(host, client, notebook) if HUB in options.sides else None

    def run(self) -> None:
        """All rounds. The first visits of all are not measured: they warm the bare server and the disk's cache."""
        for side in self.options.sides:
            self.turn(side, VISITS[:1], None)
        for number in range(1, self.options.rounds + 1):
            for side in self.options.sides[::-1] if number % 2 else self.options.sides:
                say(f"round {number} of {self.options.rounds}: {side}")
                self.turn(side, VISITS, self.samples[side])
                if side == OURS:
                    self.turn(side, (CLICK,), self.samples[side])

    def turn(self, side: str, visits: tuple[str, ...], into: dict[str, dict[str, list[float]]] | None) -> None:
        """A fresh profile with some visits."""
        with tempfile.TemporaryDirectory() as directory, browser.chromium(Path(directory)) as page:
            prepare(page)
            if self.options.throttle:
                page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", THROTTLED)
            for visit in visits:
                with self.visit(side, visit, page) as go:
                    found = measure(page, go, self.options.out)
                    self.traces[f"{side}, {visit}"] = found.pop("trace")
                    page.leave()
                if into is not None:
                    for name, value in found.items():
                        into[visit].setdefault(name, []).append(round(value, 1))

    @contextlib.contextmanager
    def visit(self, side: str, visit: str, page: browser.Page) -> Iterator[Callable[[], None]]:
        """The person's act with which a visit begins. At its end the servers are as before."""
        if side == HUB and self.hub:
            with self.hub.visit(page, NOTEBOOK) as press:
                yield press
        elif side == BARE:
            yield functools.partial(page.open, f"{self.bare.url}{NOTEBOOK}?token={self.bare.token}")
            self.client.run(self.forget(self.bare))
        else:
            yield self.click(page) if visit == CLICK else self.link(page)
            for slot in self.api.get("/slots").json():
                if slot["state"] == "claimed":
                    self.api.delete(f"/slots/{slot['slot']}")
            product.wait_warm(self.host, 3)

    def link(self, page: browser.Page) -> Callable[[], None]:
        """Opens the notebook in a new slot."""
        return functools.partial(page.open, self.api.claim(path=NOTEBOOK)["url"])

    def click(self, page: browser.Page) -> Callable[[], None]:
        """Presses the button of the landing page, which has been read."""
        page.open(f"http://127.0.0.1:{product.ROUTER_PORT}/{NOTEBOOK}")
        button = page.see("button")[0]
        time.sleep(READ_S)
        return button.click

    async def forget(self, server: Server) -> None:
        """Ends the sessions of a server and deletes its workspace, so that the next visit is a person's first one."""
        async with self.client.http.get(f"{server.url}api/sessions", headers=server.headers) as answer:
            sessions = [session["id"] for session in await answer.json()]
        for path in [*(f"api/sessions/{session}" for session in sessions), "lab/api/workspaces/default"]:
            async with self.client.http.delete(server.url + path, headers=server.headers) as answer:
                await answer.read()


def prepare(page: browser.Page) -> None:
    """Lets a window note the times of its pages."""
    page.driver.execute_cdp_cmd("Page.enable", {})
    page.driver.execute_cdp_cmd("Performance.enable", {})
    # A cell gets the focus only in a window that has it.
    page.driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": SCRIPT})


def measure(page: browser.Page, go: Callable[[], None], out: Path) -> dict[str, Any]:
    """After the act `go` the times in milliseconds, and what was transferred until the result."""
    page.driver.get_log("performance")
    before = metrics(page)
    go()
    deadline_s = time.monotonic() + DEADLINE_S
    while "result" not in (marks := marks_of(page)):
        if time.monotonic() > deadline_s:
            page.driver.save_screenshot(str(out / "page-in-vain.png"))
            raise TimeoutError(f"no result of a cell within {DEADLINE_S} s; the page has {marks}")
        time.sleep(0.05)
    now = metrics(page)
    trace = transfers(page.driver.get_log("performance"))
    return {
        **{event: marks[event] for event in EVENTS},
        "requests": len(trace), "cached": sum(entry["cached"] for entry in trace), "trace": trace,
        "kbytes": sum(entry["bytes"] for entry in trace) / 1000,
        **waiting(before, now),
    }


def waiting(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """The part of the time since the navigation in which the main thread had no task, in per cent. A page that was
    prerendered has no metrics, and had its tasks before the click."""
    if not now:
        return {}
    passed_s = now["Timestamp"] - now["NavigationStart"]
    return {"waiting": 100 * max(0.0, 1 - (now["TaskDuration"] - before["TaskDuration"]) / passed_s)}


def metrics(page: browser.Page) -> dict[str, float]:
    """Chromium's metrics of the page, with times in seconds."""
    found = page.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return {metric["name"]: metric["value"] for metric in found}


def marks_of(page: browser.Page) -> dict[str, float]:
    """The times that page.js has noted."""
    # Fails while the window changes from the landing page to the page that it has prerendered.
    with contextlib.suppress(WebDriverException):
        marks: dict[str, float] = page.driver.execute_script(MARKS)
        # Devtools run no script in a page that the browser prerenders.
        if not marks and f":{product.ROUTER_PORT}/user/" in page.driver.current_url:
            page.driver.execute_script(SCRIPT)
        return marks
    return {}


def transfers(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The requests in Chromium's log of devtools events: url, times in ms since the first, bytes, from the cache."""
    found: dict[str, dict[str, Any]] = {}
    for line in log:
        message = json.loads(line["message"])["message"]
        event, parameters = message["method"], message["params"]
        if event == "Network.requestWillBeSent" and (url := parameters["request"]["url"]).startswith("http"):
            found[parameters["requestId"]] = {
                "url": url.partition("?")[0], "begin": parameters["timestamp"] * 1000,
                "end": None, "bytes": 0, "cached": False,
            }
        entry = found.get(parameters.get("requestId", ""))
        if entry is None:
            continue
        if event == "Network.requestServedFromCache":
            entry["cached"] = True
        elif event == "Network.responseReceived":
            entry["cached"] = entry["cached"] or parameters["response"].get("fromDiskCache", False)
        elif event == "Network.loadingFinished":
            entry["end"] = parameters["timestamp"] * 1000
            entry["bytes"] = 0 if entry["cached"] else parameters["encodedDataLength"]
    begin = min((entry["begin"] for entry in found.values()), default=0)
    for entry in found.values():
        entry["begin"] = round(entry["begin"] - begin, 1)
        entry["end"] = None if entry["end"] is None else round(entry["end"] - begin, 1)
    return list(found.values())


def table(found: PageBench) -> list[list[str]]:
    """A line for each visit of each side, and the ratio of the results' times to the bare server's same visit; of a
    click, to its first."""
    counts = ("requests", "from the cache", "kB")
    rows = [["visit", *(f"{event}, s" for event in EVENTS), "result / bare", "waiting", *counts]]
    for visit in (*VISITS, CLICK):
        base = statistics.median(found.samples[BARE][VISITS[0] if visit == CLICK else visit]["result"])
        for side in (OURS,) if visit == CLICK else found.options.sides:
            values = {name: statistics.median(values) for name, values in found.samples[side][visit].items()}
            rows.append([
                f"{side}, {visit}", *(f"{values[event] / 1000:.2f}" for event in EVENTS),
                f"{values['result'] / base:.2f}", f"{values['waiting']:.0f} %" if "waiting" in values else "",
                *(f"{values[count]:.0f}" for count in COUNTS),
            ])
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, choices=range(1, 51), metavar="N", help="default: 7")
    parser.add_argument("--throttle", action="store_true", help="30 Mbit/s and 20 ms between browser and servers")
    parser.add_argument("--no-hub", dest="sides", action="store_const", const=SIDES[:2], default=SIDES,
                        help="without JupyterHub, whose visits take longer than all others")
    parser.add_argument("--host", help="measure on this test host, which has nbagent and nodejs and stays")
    parser.add_argument("--out", type=Path, default=sides.OUT, help="where the files go")
    return parser.parse_args(argv)


@contextlib.contextmanager
def measured_host(name: str | None) -> Iterator[Host]:
    if name is not None:
        yield Host.attach(name)
        return
    packages = product.build(say)
    # Before the host is up, because it takes a minute the first time.
    sides.built_hub()
    with Host.up(name=f"page-{os.getpid()}", packages=sides.HUB_PACKAGES) as host:
        product.install(host, packages, SETTINGS)
        yield host


def main() -> None:
    """Measures, prints, writes."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    loads = [os.getloadavg()[0]]
    with measured_host(options.host) as host, Client(host) as client:
        product.wait_complete(host)
        sides.install_hub(host)  # which needs this machine's network
        # The browser is a child of this thread, and is controlled by it.
        netns.enter(netns.path_of(host.name))
        found = PageBench(host, client, options)
        try:
            found.run()
        finally:
            found.bare_side.close()
            if found.hub:
                found.hub.close()
    loads.append(os.getloadavg()[0])
    network = "30 Mbit/s, 20 ms" if options.throttle else "no throttle"
    about = (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} processors, "
        f"Linux {platform.release()}; rounds: {options.rounds}, {network}, in {time.monotonic() - began_s:.0f} s; "
        f"load average {loads[0]:.1f} before, {loads[1]:.1f} after, the browser's own included."
    )
    rows = table(found)
    text = f"{figures.columns_of(rows)}\n\n{about}\n"
    (options.out / "page.txt").write_text(text)
    (options.out / "page.md").write_text(f"{figures.markdown(rows)}\n\n{about}\n")
    document = {"about": about, "samples": found.samples, "traces": found.traces}
    (options.out / "page.json").write_text(json.dumps(document, indent=1) + "\n")
    drawn = [(side, visit) for visit in (VISITS[0], VISITS[-1]) for side in options.sides]
    waterfall.draw(
        options.out / "page.png", {f"{side}, {visit}": found.traces[f"{side}, {visit}"] for side, visit in drawn},
        {f"{side}, {visit}": {event: statistics.median(found.samples[side][visit][event]) for event in EVENTS}
         for side, visit in drawn}, about,
    )
    print(text)
    say(f"written: {options.out}/page.txt, page.md, page.json and page.png")


if __name__ == "__main__":
    main()
