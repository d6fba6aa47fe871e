# SPDX-License-Identifier: BSD-3-Clause
"""The comparison as a picture: one panel for each figure, one bar for each side, nbagent in colour."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import figures
import matplotlib
from figures import Column, Line

matplotlib.use("Agg")
from matplotlib import pyplot

OURS, THEIRS, BASE, INK, FAINT = "#d9541e", "#9aa7b4", "#5f6f7f", "#1f2933", "#8895a3"
# The sides differ by factors of tens to hundreds in these columns; where they do not, the axis is linear.
LOG_FROM = 25.0


def draw(path: Path, lines: Sequence[Line], columns: Sequence[Column], base: Line, about: str) -> None:
    """Draws all sides that have figures."""
    shown = [line for line in lines if line.samples]
    across, down = 4, -(-len(columns) // 4)
    with pyplot.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK}):
        figure, panels = pyplot.subplots(
            down, across, figsize=(19, 2.6 + down * (1.1 + 0.55 * len(shown))), sharey=True, squeeze=False
        )
        for axes, column in zip(panels.flat, columns, strict=False):
            _panel(axes, shown, column, base)
        for axes in list(panels.flat)[len(columns) :]:
            axes.set_axis_off()
        title = "nbagent and its peers: one host, one run, by turns"
        figure.suptitle(title, x=0.012, ha="left", fontsize=19, weight="bold")
        figure.text(
            0.012, 0.008, "\n".join(textwrap.wrap(
                f"Medians; the thin line is least to most. In brackets: times better than {base.name}. "
                + "; ".join(f"{line.name}: {line.at_once} at once, memory at {line.users} users" for line in shown)
                + ". " + "".join(f"{line.name} is not shown: {line.why[:150]}. " for line in lines if line.why)
                + about, 250)),
            fontsize=9.5, color=FAINT, va="bottom",
        )
        figure.tight_layout(rect=(0.005, 0.085, 0.995, 0.97), h_pad=2.0, w_pad=1.6)
        figure.savefig(path, dpi=110, facecolor="white")
        pyplot.close(figure)


def _panel(axes: pyplot.Axes, lines: Sequence[Line], column: Column, base: Line) -> None:
    """One figure of all sides."""
    rows = range(len(lines))
    medians = [line.median(column.key) for line in lines]
    known = [value for value in medians if value]
    if not known:
        axes.set_axis_off()
        return
    logarithmic = max(known) / min(known) > LOG_FROM
    least = min(known) / 3 if logarithmic else 0
    for row, line, value in zip(rows, lines, medians, strict=True):
        if not value:
            axes.text(least, row, "  not measured", va="center", color=FAINT)
            continue
        colour = OURS if line.ours else BASE if line is base else THEIRS
        axes.barh(row, value - least, left=least, height=0.62, color=colour, zorder=2)
        found = line.samples[column.key]
        if len(found) > 1:
            axes.plot([min(found), max(found)], [row, row], color=INK, linewidth=1.2, zorder=3, solid_capstyle="butt")
        milliseconds = column.unit == "s" and value < 1
        said = f"{figures.number(1000 * value)} ms" if milliseconds else figures.number(value)
        if line is not base and (times := figures.better(line, base, column)):
            said += f"  ({figures.factor(times)})"
        if column.of_all:
            said += f"  {line.at_once} at once"
        axes.annotate(
            said, (max(value, *found), row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10.5,
            weight="bold" if line.ours else "normal", color=OURS if line.ours else INK, zorder=4,
        )
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: figures.number(value))
        axes.set_xlim(least, max(known) * (max(known) / least) ** 0.55)
    else:
        axes.set_xlim(0, max(known) * (1.9 if column.of_all else 1.55))
    axes.set_title(column.heading, loc="left", fontsize=13, weight="bold", pad=20)
    scale = ", log scale" if logarithmic else ""
    below = f"{column.unit}{scale}; {'more' if column.more_is_better else 'less'} is better"
    axes.text(0, 1.02, below, transform=axes.transAxes, fontsize=9.5, color=FAINT)
    axes.set_yticks(list(rows), [line.name for line in lines], fontsize=11)
    for label, line in zip(axes.get_yticklabels(), lines, strict=False):  # inner panels have none
        label.set(color=OURS if line.ours else INK, weight="bold" if line.ours else "normal")
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=FAINT, labelsize=9)
    axes.grid(axis="x", color="#e4e9ee", zorder=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c5ced6")
