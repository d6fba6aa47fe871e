#!/usr/bin/python3
"""`make bench`: figures of nbagent beside `systemd-run --scope … jupyter lab`, on one host in one run.

    tests/bench/bench.py [--out DIRECTORY] [--rounds N]

Makes an nspawn host of its own, installs the packages as an operator would, measures and removes the
host. The table goes to standard output; table.md and figures.json, with every sample, go to DIRECTORY
(default: $NBAGENT_CACHE/bench). What is compared is measured in turns, so that both sides see the same
machine; absolute times are this machine's, ratios travel better.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import figures
import peer
from figures import Row

import product
from hosts import Host, netns
from notebook import Notebook
from product import API_PORT, Api, say

POOL = 10
REFILL_TIMEOUT_S = 120
DEFAULT_OUT = Path(os.environ.get("NBAGENT_CACHE", "/var/cache/nbagent-build")) / "bench"
# One start at a time, as the peer's, so that each start's time is its own. With room for the pool
# alone, nothing is started while claims are timed, unless a row says otherwise.
SETTINGS = "[pool]\nwarm = {warm}\nstarts = 1\n[slots]\ncapacity = {capacity}\n"

CLAIM = (
    "POST /claim to gunicorn on loopback, from the request to its whole answer; the pool is warm, nothing starts "
    "meanwhile"
)
PEER_READY = "The peer: from systemd-run to the first 200 of GET /api, asked every 5 ms"
ROWS = {
    "keepalive": Row("claim, keep-alive", "ms", f"{CLAIM}; the connection is there. {PEER_READY}."),
    "new": Row("claim, new connection", "ms", f"{CLAIM}; connect() included. {PEER_READY}."),
    "refill": Row(
        "claim while slots start", "ms", "As (2), one claim every 0.5 s while the pool, never dry, starts others."
    ),
    "burst": Row(
        f"burst of {POOL}: last answer", "ms",
        f"{POOL} claims at once, each on a new connection, on {POOL} warm slots, until the last is answered. The peer: "
        f"{POOL} systemd-runs at once until the last answers 200.",
    ),
    "cell": Row(
        "claim to first result", "ms",
        "From POST /claim to the result of `1+1` in a new kernel, by the websocket through the router. The peer: from "
        "systemd-run to the same, by its own port.",
    ),
    "start": Row(
        "start of one slot", "ms",
        "One start at a time: NBAGENT_TOOK_MS of the journal, from the pool's decision to the first 200 of GET api. "
        f"{PEER_READY}.",
    ),
    "idle5": Row("memory a user, 5 idle", "MiB", ""),
    "idle10": Row(
        "memory a user, 10 idle", "MiB",
        "PSS of all processes of the slots' scopes, with nbagent.service, nbagent-api.service and "
        "nbagent-router.service, divided by the users; nobody has opened a page. The peer: PSS of its scopes. While "
        "one side is measured, nothing of the other runs but our three services.",
    ),
    "cell10": Row("memory a user, 10 kernels", "MiB", "As (8), each user with one kernel that ran one cell."),
    "cell5": Row("memory a user, 5 kernels", "MiB", "As (9), 5 of the users gone."),
    "alone10": Row("of it, the slot's own, idle", "MiB", "As (8), without the services: what one more user costs."),
    "service": Row("agent, API and router", "MiB", "PSS of the three services in (8), not divided."),
}
ROWS["idle5"].how = "As (8)."
SANDBOXES = 40
ISOLATION = f"""\
The cost of isolation, step by step of `nbagent slot plan`: {SANDBOXES} sandboxes made side by side, all doing one step
before any does the next (tests/bench/isolation.py). Milliseconds of each one's step; what the cgroup of all grew by in
that step, the kernel's own memory in it, divided by {SANDBOXES}. The forks copy the pages of Python that they touch."""


class Bench:
    """One run on one host. Everything that is timed runs in threads that are in the host's network."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.api = Api(host)
        self.peers = peer.Peers(host, POOL)
        self.inside = ThreadPoolExecutor(POOL, initializer=netns.enter, initargs=(netns.path_of(host.name),))
        self.entry_ms = sorted(timed(lambda: host.run(["true"])) for _ in range(11))[5]

    def run(self, rounds: int) -> None:
        """All figures, the compared ones in turns."""
        for number in range(1, rounds + 1):
            say(f"round {number} of {rounds}: claims, first results, starts")
            self.refill()
            self.claims()
            for _ in range(2):
                self.first_result()
                self.peer_first_result()
        say("claims while slots start")
        self.refill()
        self.claims_while_starting()
        for number in range(1, 4):
            say(f"burst {number} of 3")
            self.refill()
            self.burst()
        ROWS["start"].ours += self.starts()
        self.memory()
        self.peer_memory()

    def settle(self, what: Callable[[dict[str, Any]], bool]) -> None:
        """Waits until the stats are such, and a moment more for what a start leaves to do."""
        deadline_s = time.monotonic() + REFILL_TIMEOUT_S
        while not what(stats := self.api.get("/stats").json()):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the pool did not settle: {stats}")
            time.sleep(0.1)
        time.sleep(0.3)

    def release(self) -> None:
        """Ends every claimed slot."""
        for slot in self.api.get("/slots").json():
            if slot["state"] == "claimed":
                self.api.delete(f"/slots/{slot['slot']}")

    def refill(self) -> None:
        """Ends every claimed slot and waits for a whole pool."""
        self.release()
        self.settle(lambda s: s["warm"] == POOL and s["claimed"] + s["starting"] + s["stopping"] == 0)

    def configure(self, warm: int, capacity: int) -> None:
        """Other sizes of pool and host."""
        settings = SETTINGS.format(warm=warm, capacity=capacity)
        self.host.run(["tee", "/etc/nbagent/conf.d/50-test.toml"], input=settings)
        self.host.run(["systemctl", "reload", "nbagent.service"])

    # -- claims --------------------------------------------------------------------------------

    def claims(self) -> None:
        """By turns on a connection that is there and on a new one: eight, two slots stay."""
        def all_of_them() -> None:
            kept = http.client.HTTPConnection("127.0.0.1", API_PORT)
            kept.request("GET", "/")
            kept.getresponse().read()
            for _ in range(POOL // 2 - 1):
                add(ROWS["keepalive"].ours, timed(lambda: claim(kept)))
                add(ROWS["new"].ours, timed(claim))
            kept.close()

        self.inside.submit(all_of_them).result()
        note_load(ROWS["keepalive"], ROWS["new"])

    def claims_while_starting(self) -> None:
        """With room for more, every claim makes the pool start another."""
        self.configure(POOL, 4 * POOL)
        for _ in range(POOL + 2):
            add(ROWS["refill"].ours, self.inside.submit(timed, claim).result())
            note_load(ROWS["refill"])
            time.sleep(0.5)
        self.configure(POOL, POOL)

    def burst(self) -> None:
        """As many claims at once as there are warm slots."""
        began_s = time.monotonic()
        for asked in [self.inside.submit(claim) for _ in range(POOL)]:
            asked.result()
        add(ROWS["burst"].ours, 1000 * (time.monotonic() - began_s))
        note_load(ROWS["burst"])

    def first_result(self) -> None:
        """A claim, and its first cell."""
        def one() -> Notebook:
            notebook = Notebook(self.host, claim())
            check_cell(notebook)
            return notebook

        add(ROWS["cell"].ours, timed(self.inside.submit(one).result))
        note_load(ROWS["cell"])

    def peer_first_result(self) -> None:
        """A peer's start, and its first cell."""
        began_s = time.monotonic()
        with self.peers.running(0) as notebook:
            ready_ms = 1000 * (time.monotonic() - began_s)
            check_cell(notebook)
            add(ROWS["cell"].peer, 1000 * (time.monotonic() - began_s))
        for name in ("keepalive", "new", "start"):
            add(ROWS[name].peer, ready_ms)
        note_load(ROWS["start"])

    def starts(self) -> list[float]:
        """How long every start so far took."""
        journal = self.host.run(["journalctl", "-t", "nbagent", "-o", "json", "--output-fields=NBAGENT_TOOK_MS"])
        entries = [json.loads(line) for line in journal.stdout.splitlines()]
        return [float(entry["NBAGENT_TOOK_MS"]) for entry in entries if "NBAGENT_TOOK_MS" in entry]

    # -- memory --------------------------------------------------------------------------------

    def memory(self) -> None:
        """Claimed slots only: the pool is empty while memory is measured."""
        services = r"nbagent(-api|-router)?\.service"
        slots = rf"nbagent-(?!slots).*\.scope|{services}"
        say("memory of 5 and 10 slots")
        self.release()
        notebooks: list[Notebook] = []
        for users in (POOL // 2, POOL):
            self.configure(POOL // 2, users)
            self.settle(lambda s: s["warm"] == POOL // 2 and s["starting"] + s["stopping"] == 0)
            notebooks += [Notebook(self.host, self.inside.submit(claim).result()) for _ in range(POOL // 2)]
            add(ROWS[f"idle{users}"].ours, self.pss(slots) / users)
            note_load(ROWS[f"idle{users}"])
        add(ROWS["service"].ours, self.pss(services))
        add(ROWS["alone10"].ours, (POOL * ROWS["idle10"].ours[-1] - ROWS["service"].ours[-1]) / POOL)
        for notebook in notebooks:
            check_cell(notebook)
        add(ROWS["cell10"].ours, self.pss(slots) / POOL)
        self.configure(0, POOL)
        for notebook in notebooks[POOL // 2 :]:
            self.api.delete(f"/slots/{notebook.slot}")
        self.settle(lambda s: s["claimed"] == POOL // 2 and s["warm"] + s["starting"] + s["stopping"] == 0)
        add(ROWS["cell5"].ours, self.pss(slots) / (POOL // 2))
        note_load(ROWS["service"], ROWS["alone10"], ROWS["cell10"], ROWS["cell5"])
        self.release()
        self.settle(lambda s: s["claimed"] + s["stopping"] == 0)

    def peer_memory(self) -> None:
        """The same of the peers, and their burst."""
        peers = r"peer-.*\.scope"
        say("memory of 5 and 10 peers")
        with self.several(POOL // 2):
            add(ROWS["idle5"].peer, self.pss(peers) / (POOL // 2))
        began_s = time.monotonic()
        with self.several(POOL) as running:
            add(ROWS["burst"].peer, 1000 * (time.monotonic() - began_s))
            add(ROWS["idle10"].peer, self.pss(peers) / POOL)
            add(ROWS["alone10"].peer, ROWS["idle10"].peer[-1])
            for _, notebook in running:
                check_cell(notebook)
            add(ROWS["cell10"].peer, self.pss(peers) / POOL)
            for number in range(POOL // 2, POOL):
                self.peers.end(number, running[number][0])
            time.sleep(0.5)
            add(ROWS["cell5"].peer, self.pss(peers) / (POOL // 2))

    @contextlib.contextmanager
    def several(self, count: int) -> Iterator[list[tuple[subprocess.Popen[Any], peer.PeerNotebook]]]:
        """Peers started at once, all of them ready."""
        running = [self.peers.start(number) for number in range(count)]
        try:
            for process, notebook in running:
                peer.wait_ready(process, notebook)
            yield running
        finally:
            for number, (process, _) in enumerate(running):
                self.peers.end(number, process)

    def pss(self, units: str) -> float:
        """MiB of all processes of the units that match, once they have come to rest."""
        time.sleep(1)
        done = self.host.run(["python3", "-", units], input=(HERE / "memory.py").read_text())
        return float(sum(json.loads(done.stdout).values())) / 1024


def claim(connection: http.client.HTTPConnection | None = None) -> dict[str, Any]:
    """A claim from within the host's network, by default on a connection of its own."""
    used = connection or http.client.HTTPConnection("127.0.0.1", API_PORT)
    used.request("POST", "/claim", b"{}", {"Content-Type": "application/json"})
    answer = used.getresponse()
    body = answer.read()
    if connection is None:
        used.close()
    if answer.status != 200:
        raise RuntimeError(f"claim: {answer.status} {body!r}")
    document: dict[str, Any] = json.loads(body)
    return document


def check_cell(notebook: Notebook) -> None:
    """The first cell of a new kernel, which stays."""
    result = notebook.kernel().run("1+1")
    if result.text != "2":
        raise RuntimeError(f"1+1: {result}")


def timed(action: Callable[[], Any]) -> float:
    """How many milliseconds it takes."""
    began_s = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - began_s)


def add(samples: list[float], value: float) -> None:
    samples.append(round(value, 3))


def note_load(*rows: Row) -> None:
    for row in rows:
        row.loads.append(os.getloadavg()[0])


def conditions(bench: Bench, began_s: float) -> str:
    """What a reader has to know about the run."""
    say_what = ". /etc/os-release; echo $PRETTY_NAME; systemctl --version | head -n 1"
    debian, systemd = bench.host.run(["sh", "-c", say_what]).stdout.splitlines()
    loads = [load for row in ROWS.values() for load in row.loads]
    command = peer.COMMAND.format(user="ID", root="/run/peer/N/root", port="PORT", token="TOKEN")
    return f"""\
One nspawn host ({debian}, {systemd}), {os.cpu_count()} processors, Linux {platform.release()}; load average
{min(loads):.1f} to {max(loads):.1f}, the measuring's own included; {time.monotonic() - began_s:.0f} s in all.
The peer has the same image, the overlay on a tmpfs made before its clock starts (tests/bench/peer.py):

    {command}

The way into the host takes {bench.entry_ms:.0f} ms of each start of a peer. Ratio: the peer's median by ours."""


def isolation(host: Host) -> list[tuple[str, ...]]:
    """The cost of each step of the sandbox's plan, as cells of a table."""
    say(f"the cost of isolation: {SANDBOXES} sandboxes in step")
    host.copy_in([str(HERE / "isolation.py")], "/root/")
    command = ["python3", "-I", "/root/isolation.py", "minimal", str(SANDBOXES), str(512 << 20)]
    done = host.run(["systemd-run", "--quiet", "--wait", "--pipe", "-p", "MemoryAccounting=yes", *command])
    rows = json.loads(done.stdout)
    cells = [
        (part, step, f"{statistics.median(took_ms):.2f}", f"{figures.quantile(took_ms, 0.9):.2f}", f"{used / 1024:.0f}")
        for part, step, took_ms, used in rows
    ]
    total_ms = sum(statistics.median(took_ms) for _, _, took_ms, _ in rows)
    total = ("", "all", f"{total_ms:.1f}", "", f"{sum(used for *_, used in rows) / 1024:.0f}")
    return [("part", "step", "ms p50", "ms p90", "KiB a slot"), *cells, total]


def write(out: Path, about: str, walls: list[tuple[str, ...]]) -> None:
    """The Markdown file and the JSON."""
    out.mkdir(parents=True, exist_ok=True)
    rows = list(ROWS.values())
    text = f"{figures.markdown(rows)}\n\n{about}\n\n{ISOLATION}\n\n```\n{figures.columns(walls)}\n```\n"
    (out / "table.md").write_text(text)
    document = {"about": about, "rows": [row.document() for row in rows], "isolation": walls}
    (out / "figures.json").write_text(json.dumps(document, indent=1) + "\n")
    say(f"written: {out}/table.md and figures.json")


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where table.md and figures.json go")
    parser.add_argument("--rounds", type=int, default=6, choices=range(1, 51), metavar="N", help="default: 6")
    arguments = parser.parse_args()
    # Told to end, it still takes its host down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began_s = time.monotonic()
    packages = product.build(say)
    with Host.up(name=f"bench-{os.getpid()}") as host:
        product.install(host, packages, SETTINGS.format(warm=POOL, capacity=POOL))
        bench = Bench(host)
        with bench.inside:
            bench.run(arguments.rounds)
        walls = isolation(host)
        about = conditions(bench, began_s)
    print(f"{figures.text(list(ROWS.values()))}\n\n{about}\n\n{ISOLATION}\n\n{figures.columns(walls)}")
    write(arguments.out, about, walls)


if __name__ == "__main__":
    main()
