"""Draw the pictures of docs/results.md from the stored figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pliant.cli.plots import ACCENT, GREY, SECOND, STYLE


def draw_ablation(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draws S of every variant with its interval, and what it is the harmonic mean of; a choice is a group of lines."""
    parts = {"efficacy": ("D", GREY), "paraphrase": ("^", GREY), "neighbourhood": ("o", SECOND)}
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "pliant", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 0.3 * len(rows) + 1.2), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(rows):
            score = row["score"]
            reach = [[score["value"] - score["low"]], [score["high"] - score["value"]]]
            axes.errorbar(score["value"], place, xerr=reach, fmt="s", color=ACCENT, capsize=3, label="S")
            for name, (marker, color) in parts.items():
                at = 100 * row[name]["value"]
                axes.scatter(at, place, s=36, label=name, marker=marker, facecolors="none", edgecolors=color)
            if place and row["factor"] != rows[place - 1]["factor"]:
                axes.axhline(place - 0.5, color=GREY, linewidth=0.6)
        axes.set_yticks(range(len(rows)), [f"{row['factor']}: {row['value']}" for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 103)
        axes.set_xlabel("S, and the shares that it is made of, %")
        handles, labels = axes.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True))
        figure.legend(shown.values(), shown.keys(), loc="outside upper right", ncols=len(shown), frameon=False)
        figure.savefig(file, metadata={"Date": None})
