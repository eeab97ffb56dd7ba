"""The figures of ``pliant demo``: what a rank costs, why so few directions are enough, what training gains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

ACCENT = "#1f5fa8"
SECOND = "#c8553d"
GREY = "#6b7280"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": "#e5e7eb",
    "font.size": 10,
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A keyed conversion in the first panel."""

    rank: int
    ratio: float
    is_uniform: bool = True


def draw(points: Sequence[Point], energy: Mapping[int, Sequence[float]], file: Path) -> None:
    """Draws both panels into a PNG.

    Args:
        points: Keyed conversions; those with the same rank in every layer are joined by a line.
        energy: Layer index → share of ``E‖a‖²`` that the leading 1, 2, … directions hold.
        file: Where to write it.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_ratios(left, points)
        _draw_spectra(figure, right, energy)
        figure.savefig(file)


def draw_training(curve: Mapping[int, float], ratios: tuple[float, float], file: Path) -> None:
    """Draws what a training run gained into a PNG.

    Args:
        curve: Optimizer step → ``KL(base ‖ model)`` of the training text, nats a token.
        ratios: Perplexity over the base's on held-out text, before and after.
        file: Where to write it.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        left.plot(list(curve), list(curve.values()), "o-", color=ACCENT)
        left.set_ylim(bottom=0)
        left.set_xlabel("optimizer step")
        left.set_ylabel("KL from the base, nats")
        left.set_title("Training towards the base")
        bars = right.bar(("as converted", "trained"), ratios, color=(GREY, ACCENT), width=0.6)
        right.bar_label(bars, labels=[f"{ratio:.3f}" for ratio in ratios], padding=3)
        right.axhline(1.0, color=GREY, linewidth=1, linestyle="--")
        right.margins(y=0.15)
        right.set_ylabel("perplexity ÷ that of the base")
        right.set_title("Held-out text")
        figure.savefig(file)


def _draw_ratios(axes: Axes, points: Sequence[Point]) -> None:
    uniform = sorted((p for p in points if p.is_uniform), key=lambda p: p.rank)
    ranks = sorted({p.rank for p in points})
    axes.axhline(1.0, color=GREY, linewidth=1, linestyle="--")
    axes.plot(
        [p.rank for p in uniform],
        [p.ratio for p in uniform],
        "o-",
        color=ACCENT,
        label="same rank in every layer",
    )
    allocated = [p for p in points if not p.is_uniform]
    if allocated:
        axes.plot(
            [p.rank for p in allocated],
            [p.ratio for p in allocated],
            "D",
            color=SECOND,
            label="spread by sensitivity, same sum",
        )
    for point in points:
        axes.annotate(
            f"{point.ratio:.3f}",
            (point.rank, point.ratio),
            xytext=(6, 6) if point.is_uniform else (6, -14),
            textcoords="offset points",
            color=ACCENT if point.is_uniform else SECOND,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set_xlim(ranks[0] / 1.25, ranks[-1] * 1.4)
    axes.minorticks_off()
    axes.margins(y=0.18)
    axes.set_xlabel("rank of the keyed memory")
    axes.set_ylabel("perplexity ÷ that of the base")
    axes.set_title("What the rank costs, untrained")
    axes.annotate(
        "the base",
        (0.99, 1.0),
        xycoords=("axes fraction", "data"),
        xytext=(0, -12),
        textcoords="offset points",
        ha="right",
        color=GREY,
    )
    axes.legend(frameon=False, loc="upper right")


def _draw_spectra(figure: Figure, axes: Axes, energy: Mapping[int, Sequence[float]]) -> None:
    colours: Any = colormaps["viridis"]
    scale = Normalize(min(energy), max(max(energy), min(energy) + 1))
    for layer, shares in energy.items():
        axes.plot(range(1, len(shares) + 1), shares, color=colours(scale(layer)), linewidth=1.2)
    axes.set_xscale("log", base=2)
    width = max(len(shares) for shares in energy.values())
    ticks = [rank for rank in (1, 4, 16, 64, 128, 256, 512) if rank <= width]
    axes.set_xticks(ticks, [str(rank) for rank in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("leading directions")
    axes.set_ylabel("share of E‖a‖²")
    axes.set_title("How few directions attention writes in")
    bar = figure.colorbar(ScalarMappable(norm=scale, cmap=colours), ax=axes, pad=0.02)
    bar.set_label("layer")
    bar.outline.set_visible(False)
