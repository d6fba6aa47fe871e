# SPDX-License-Identifier: BSD-3-Clause
"""The requests of visits as a picture: one panel for each visit, one bar for each request, by the time of its begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from chart import BASE, FAINT, INK, OURS, THEIRS

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Patch

# The origin of a response. The bar of one that is not complete when the result is shown ends there.
CACHED, ASSET, SLOT = "from the browser's cache", "file of the image", "answer of the server"
COLOURS = {CACHED: THEIRS, ASSET: BASE, SLOT: OURS}
EVENTS = ("shell", "notebook", "kernel", "result")


def draw(path: Path, traces: Mapping[str, Sequence[Mapping[str, Any]]], times: Mapping[str, Mapping[str, float]],
         about: str) -> None:
    """Draws the visits of `traces`, each a list of requests {url, begin, end, bytes, cached} in milliseconds.

    `times` has for each visit the milliseconds of its events, drawn as lines.
    """
    end_ms = max(times[name]["result"] for name in traces)
    with pyplot.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK}):
        figure, panels = pyplot.subplots(1, len(traces), figsize=(5.2 * len(traces), 9), sharex=True, squeeze=False)
        for axes, (name, requests) in zip(panels.flat, traces.items(), strict=True):
            result_ms = times[name]["result"]
            for row, request in enumerate(sorted(requests, key=lambda one: float(one["begin"]))):
                width = max((request["end"] or result_ms) - request["begin"], end_ms / 400)
                axes.barh(row, width, left=request["begin"], height=0.9, color=COLOURS[kind_of(request)])
            for event in EVENTS:
                axes.axvline(times[name][event], color=FAINT, linewidth=0.8)
                axes.text(times[name][event], -4, event, rotation=40, fontsize=8.5, color=FAINT)
            axes.set_title(f"{name}: {result_ms / 1000:.2f} s", loc="left", pad=48, weight="bold")
            axes.set_xlim(0, end_ms * 1.02)
            axes.invert_yaxis()
            axes.set_yticks([])
            axes.set_xlabel("milliseconds since the first request")
            axes.spines[["top", "right", "left"]].set_visible(False)
        figure.legend(handles=[Patch(color=colour, label=label) for label, colour in COLOURS.items()],
                      loc="lower left", ncols=len(COLOURS), frameon=False)
        figure.text(0.995, 0.012, about, ha="right", fontsize=8.5, color=FAINT)
        figure.tight_layout(rect=(0.005, 0.045, 0.995, 1))
        figure.savefig(path, dpi=80, facecolor="white")
        pyplot.close(figure)


def kind_of(request: Mapping[str, Any]) -> str:
    """The origin of a request's response."""
    if request["cached"]:
        return CACHED
    is_file = any(part in request["url"] for part in ("/assets/", "/static/", "/lab/extensions/"))
    return ASSET if is_file else SLOT
