"""The picture of ``pliant compare``: quality over what it cost, with the methods that no other one beats on both."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pliant.cli.plots import GREY, STYLE

FROZEN = "frozen"
Point = tuple[float, float, float]
"""What it cost, the validation loss, and the deviation of that over seeds."""


def draw_comparison(found: Mapping[str, Any], file: Path) -> None:
    """Draws the validation loss over trainable parameters, forgetting, and step time, where they were measured.

    Args:
        found: What :func:`pliant.compare` returned.
        file: PNG to write; it is replaced whole.
    """
    rows = {name: row for name, row in found["summary"].items() if name != FROZEN}
    panels = {
        "trainable parameters": {n: float(found["contenders"][n]["parameters"]) for n in rows},
        "KL from the base on held-out text, nats": {
            n: r["forgetting"]["kl"] for n, r in rows.items() if "forgetting" in r
        },
        f"step time ÷ that of {_first_reference(found)}": {
            n: found["cost"][n]["time_ratio"] for n in rows if n in found["cost"]
        },
    }
    panels = {title: costs for title, costs in panels.items() if costs}
    colours = _colours(list(rows))
    base = found["summary"].get(FROZEN)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(panels), 4.4), dpi=150, layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for place, (title, costs) in zip(axes, panels.items(), strict=True):
            points = {name: _point(rows[name], cost) for name, cost in costs.items()}
            _draw(place, title, points, colours)
            if base is not None:
                place.axhline(base["validation_loss"], color=GREY, linewidth=1, linestyle="--", label="the frozen base")
        axes[0].set_ylabel("validation loss, nats a token")
        axes[0].set_title("Lower and further left is better")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False)
        from pliant.models.staging import replaced

        with replaced(file, prefix=".comparison-") as staged:
            figure.savefig(staged, format="png")


def frontier(points: Mapping[str, Point]) -> list[str]:
    """Returns the names that no other one beats both in cost and in loss, the cheapest first."""
    best = float("inf")
    found = []
    for name, (_, loss, _) in sorted(points.items(), key=lambda item: item[1][:2]):
        if loss < best:
            best = loss
            found.append(name)
    return found


def _draw(axes: Axes, title: str, points: Mapping[str, Point], colours: Mapping[str, Any]) -> None:
    for name, (cost, loss, deviation) in points.items():
        axes.errorbar(cost, loss, yerr=deviation, fmt="o", color=colours[name], capsize=3, label=name)
    kept = [points[name] for name in frontier(points)]
    axes.step([p[0] for p in kept], [p[1] for p in kept], where="post", color=GREY, linewidth=1, zorder=0)
    costs = [cost for cost, _, _ in points.values()]
    if min(costs) > 0 and max(costs) > 5 * min(costs):
        axes.set_xscale("log")
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel(title)


def _point(row: Mapping[str, Any], cost: float) -> Point:
    return cost, row["validation_loss"], row["validation_loss_deviation"] or 0.0


def _colours(names: Sequence[str]) -> dict[str, Any]:
    chosen: Any = colormaps["tab10"]
    return {name: chosen(index % 10) for index, name in enumerate(names)}


def _first_reference(found: Mapping[str, Any]) -> str:
    """The contender whose time ratio is that to itself."""
    own = [name for name in found["cost"] if found["contenders"][name]["method"] == found["reference"]]
    return own[0] if own else found["reference"]
