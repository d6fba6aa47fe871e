# SPDX-License-Identifier: BSD-3-Clause
"""The figures of a fleet as a picture: a panel for each part that was measured. Matplotlib, from Debian."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import figures
import matplotlib
from chart import BASE, FAINT, INK, OURS, THEIRS

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """Draws a panel for each measured part."""
    panels = [(name, draw_one) for name, draw_one in PANELS.items() if name in found]
    if not panels:
        return
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    with pyplot.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK}):
        figure, grid = pyplot.subplots(down, across, figsize=(8 * across, 1.2 + 4.4 * down), squeeze=False)
        for axes, (name, draw_one) in zip(grid.flat, panels, strict=False):
            draw_one(axes, found[name])
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
        figure.suptitle("A fleet behind HAProxy", x=0.012, ha="left", fontsize=18, weight="bold")
        figure.text(0.012, 0.008, "\n".join(textwrap.wrap(found["about"], 170)), fontsize=9, color=FAINT, va="bottom")
        figure.tight_layout(rect=(0.005, 0.04, 0.995, 0.97), h_pad=2.5, w_pad=2.0)
        figure.savefig(path, dpi=110, facecolor="white")
        pyplot.close(figure)


def _title(axes: pyplot.Axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=12.5, weight="bold", pad=20)
    axes.text(0, 1.02, below, transform=axes.transAxes, fontsize=9.5, color=FAINT)


def _bars(axes: pyplot.Axes, groups: list[str], rows: list[tuple[str, str, list[float]]], unit: str) -> None:
    """Groups of bars side by side, each with its value above."""
    width = 0.8 / len(rows)
    for place, (name, colour, values) in enumerate(rows):
        at = [group + (place - (len(rows) - 1) / 2) * width for group in range(len(groups))]
        for bar, value in zip(axes.bar(at, values, width * 0.92, color=colour, label=name), values, strict=True):
            axes.annotate(
                f"{figures.number(value)}{unit}", (bar.get_x() + bar.get_width() / 2, value), xytext=(0, 2),
                textcoords="offset points", ha="center", fontsize=9,
            )
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.28)
    if len(rows) > 1:
        axes.legend(frameon=False, fontsize=9, loc="upper left")


def latency(axes: pyplot.Axes, part: Mapping[str, Any]) -> None:
    names = ["kept connection", "new connection", "claim"]
    rows = [
        (title, colour, [part[name][way]["p50"] for name in names])
        for way, title, colour in (
            ("straight", "straight to the host", THEIRS), ("through", "through the gateway", OURS)
        )
    ]
    _bars(axes, ["GET, kept", "GET, new", "claim"], rows, "")
    _title(axes, "Latency added by the gateway", "milliseconds, medians; less is better")


def unequal(axes: pyplot.Axes, part: Mapping[str, Any]) -> None:
    steps = part["steps"]
    rows = [
        (f"{size} places", colour, [100 * step["share_used"][place] for step in steps])
        for place, (size, colour) in enumerate(zip(part["capacity"], (OURS, BASE, THEIRS), strict=True))
    ]
    _bars(axes, [f"fleet {step['level']:.0%} full" for step in steps], rows, "%")
    _title(axes, "Hosts of unequal size", "share of each host's capacity in use; ideal is equal")


def thousand(axes: pyplot.Axes, part: Mapping[str, Any]) -> None:
    places = part["places"]
    for level, colour in zip(part["levels"], (THEIRS, BASE, OURS), strict=True):
        counts = Counter(level["haproxy"]["used"])
        span = range(min(counts), max(counts) + 1)
        failed, refusals = level["haproxy"]["failed"], level["haproxy"]["refusals"]
        axes.bar(
            list(span), [counts[used] for used in span], 1.0, color=colour, alpha=0.85,
            label=f"{level['level']:.0%} full: {refusals} refusals, {failed} failed of {part['claims']} claims",
        )
        axes.axvline(level["level"] * places, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel("slots in use of a host's 100; dotted: perfect knowledge")
    axes.set_ylabel("hosts")
    axes.set_yscale("symlog", linthresh=10)
    axes.yaxis.set_major_formatter(lambda value, _: figures.number(value))
    axes.margins(y=0.4)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    _title(axes, f"{part['hosts']} agents behind HAProxy", "distribution of the hosts' use; narrow is better")


def rate(axes: pyplot.Axes, part: Mapping[str, Any]) -> None:
    rows = {name: said["a_second"] for name, said in part.items() if isinstance(said, dict)}
    _bars(axes, list(rows), [("", OURS, list(rows.values()))], "")
    _title(axes, "Claims a second", "all on the same processors; more is better")


PANELS: dict[str, Callable[[pyplot.Axes, Mapping[str, Any]], None]] = {
    "latency": latency, "rate": rate, "unequal": unequal, "thousand": thousand,
}
