"""The pictures of ``pliant routes``: tokens by layers, as a PNG and as one HTML file that needs nothing else."""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle

from pliant.cli.console import shortened
from pliant.cli.page import HeatMap, HeatRow, Mark, Section, Swatch, write_page
from pliant.cli.plots import ACCENT, GREY
from pliant.cli.routes.command import Routes, told
from pliant.cli.token_grid import cropped, strength
from pliant.models.staging import replaced

DENSE, GRID, INK = "#d5d8dd", "#eceef1", "#111827"
SCALE = LinearSegmentedColormap.from_list("margin", ("#c9dff5", "#5a9bd8", ACCENT, "#0b2f5e"))
FONT = "DejaVu Sans Mono"
LABEL_WIDTH, LABEL_SIZE, CHARACTER = 20, 8, 8 * 0.602 / 72
"""Characters, points, and inches a character."""
WIDEST_HEADING = 32
"""Characters of a token on the page."""
DPI = 150
NARROWEST, WIDEST_CELL, SLIMMEST_CELL, WIDEST_MAP = 7.0, 0.45, 0.1, 16.0
ROW, TALLEST_MAP, LEGIBLE_ROW = 0.185, 150.0, 0.15
TOP, BARS, BOTTOM, EDGE = 1.5, 0.55, 0.32, 0.15


def draw_png(found: Routes, name: str, file: Path) -> None:
    """Draws tokens by layers, and the share that ran in each layer below.

    Args:
        found: What the model did.
        name: That of the model.
        file: Where to write it.
    """
    count, layers = len(found.tokens), found.num_layers
    labels = [cropped(_drawable(token.label), LABEL_WIDTH) for token in found.tokens]
    left = EDGE + 0.12 + CHARACTER * max(8, *(len(label) for label in labels))
    column = min(
        WIDEST_CELL, max((NARROWEST - left - 2 * EDGE) / layers, min(0.24, WIDEST_MAP / layers), SLIMMEST_CELL)
    )
    row = min(ROW, TALLEST_MAP / count)
    width, height = max(NARROWEST, left + column * layers + 2 * EDGE), TOP + row * count + BARS + BOTTOM
    style: dict[Any, Any] = {"font.family": FONT, "font.size": LABEL_SIZE, "text.parse_math": False, "text.color": INK}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")

        def place(x: float, y: float, wide: float, high: float) -> Axes:
            """Axes by their left edge, their distance from the top, and their size, in inches."""
            return figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))

        _head(figure, found, name, width, height)
        _legend(found, place(EDGE, 0.8, min(width - 2 * EDGE, 6.5), 0.26))
        cells = place(left, TOP, column * layers, row * count)
        _draw_cells(cells, found, labels, every=math.ceil(LEGIBLE_ROW / row), column=column)
        _draw_shares(place(left, TOP + row * count + 0.08, column * layers, BARS - 0.08), found, column)
        with replaced(file, prefix=f".{file.stem}-") as staged:
            figure.savefig(staged, format="png")


def _head(figure: Figure, found: Routes, name: str, width: float, height: float) -> None:
    sizes = ((shortened(_drawable(name)), 11, "bold", 0.28), (_subtitle(found), 8, "normal", 0.48))
    for text, size, weight, top in (*sizes, (found.summary, 8, "normal", 0.66)):
        figure.text(EDGE / width, 1 - top / height, text, fontsize=size, fontweight=weight)


def _subtitle(found: Routes) -> str:
    return found.title + ("; new tokens in blue" if any(token.is_new for token in found.tokens) else "")


def _legend(found: Routes, axes: Axes) -> None:
    """Draws what the colours say, in inches from the left of ``axes``."""
    figure: Any = axes.figure
    long, high = axes.get_position().width * figure.get_figwidth(), axes.get_position().height * figure.get_figheight()
    axes.set_xlim(0, long)
    axes.set_ylim(high, 0)
    axes.axis("off")
    x = 0.0
    entries: list[tuple[str, Any]] = [("skipped", "white")]
    if len(found.layers) < found.num_layers:
        entries.append(("dense layer", DENSE))
    if not found.far:
        entries.append(("ran", SCALE(1.0)))
    for text, colour in entries:
        axes.add_patch(Rectangle((x + 0.01, 0.06), 0.15, 0.15, facecolor=colour, edgecolor="#9ca3af", linewidth=0.6))
        axes.text(x + 0.22, 0.135, text, va="center_baseline")
        x += 0.22 + CHARACTER * len(text) + 0.25
    if not found.far:
        return
    text = "ran, score − τ:"
    axes.text(x, 0.135, text, va="center_baseline")
    x += CHARACTER * len(text) + 0.15
    bar_axes = axes.inset_axes((x / long, 1 - 0.21 / high, 1.9 / long, 0.15 / high))
    bar = figure.colorbar(
        ScalarMappable(norm=Normalize(0, found.far), cmap=SCALE), cax=bar_axes, orientation="horizontal"
    )
    bar.outline.set_visible(False)
    bar.set_ticks([0, found.far / 2, found.far], labels=["0", f"{found.far / 2:.2g}", f"≥ {found.far:.2g}"])
    bar.ax.tick_params(length=2, pad=2, labelsize=7)


def _draw_cells(axes: Axes, found: Routes, labels: list[str], *, every: int, column: float) -> None:
    count, far = len(labels), found.far
    image = np.ones((count, found.num_layers, 3))
    for index in range(found.num_layers):
        if (layer := found.layers.get(index)) is None:
            image[:, index] = to_rgb(DENSE)
            continue
        for position, runs in enumerate(layer.runs):
            if runs:
                image[position, index] = SCALE(strength(layer.margin(position), far))[:3]
    axes.imshow(image, aspect="auto", interpolation="nearest")
    axes.set_xticks(np.arange(found.num_layers + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=GRID, linewidth=0.5)
    shown = range(0, count, every)
    axes.set_yticks(shown, [labels[position] for position in shown])
    for position, label in zip(shown, axes.get_yticklabels(), strict=True):
        if found.tokens[position].is_new:
            label.set_color(ACCENT)
            label.set_fontweight("bold")
    _label_layers(axes, found.num_layers, column)
    axes.tick_params(axis="x", top=False, bottom=False, labeltop=True, labelbottom=False, pad=1)
    axes.tick_params(axis="both", which="both", length=0)
    axes.set_xlabel("layer", labelpad=3)
    axes.xaxis.set_label_position("top")
    for spine in axes.spines.values():
        spine.set_color("#c3c7ce")
    written = [position for position, token in enumerate(found.tokens) if token.is_new]
    if written:
        axes.axhline(written[0] - 0.5, color=INK, linewidth=1)


def _label_layers(axes: Axes, layers: int, column: float) -> None:
    """Names as many layers as there is room for."""
    every = math.ceil((len(str(layers - 1)) + 1) * CHARACTER / column)
    axes.set_xticks(range(0, layers, every), [str(layer) for layer in range(0, layers, every)])


def _draw_shares(axes: Axes, found: Routes, column: float) -> None:
    dense = [index for index in range(found.num_layers) if index not in found.layers]
    axes.bar(dense, [1.0] * len(dense), color=DENSE, width=0.84)
    axes.bar(list(found.layers), [layer.share for layer in found.layers.values()], color=ACCENT, width=0.84)
    axes.set_xlim(-0.5, found.num_layers - 0.5)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0 %", "ran 50 %", "100 %"])
    _label_layers(axes, found.num_layers, column)
    axes.tick_params(axis="both", length=0, pad=3)
    axes.tick_params(axis="y", labelsize=7, labelcolor=GREY)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID)
    axes.spines[:].set_visible(False)


def _drawable(text: str) -> str:
    """A text with each character that the font lacks as its escape."""
    known = get_font(findfont(FontProperties(family=FONT))).get_charmap()
    return "".join(char if ord(char) in known else char.encode("unicode_escape").decode() for char in text)


def draw_html(found: Routes, name: str, file: Path) -> None:
    """Writes the same as one page; its arguments are those of :func:`draw_png`."""
    section = Section(title="", blocks=[routing_map(found)])
    write_page(
        file, shortened(name, 120), [section], subtitle=_subtitle(found), kicker="pliant routes", most_bytes=None
    )


def routing_map(found: Routes, title: str = "") -> HeatMap:
    """Returns tokens by layers for a page; a tap on a cell says score and threshold."""
    legend = [Swatch(kind="s", after="skipped")]
    if len(found.layers) < found.num_layers:
        legend.append(Swatch(kind="d", after="dense layer"))
    if found.far:
        legend.append(Swatch(kind="scale", before="ran, score − τ: 0", after=f"{found.far:.2g} or more"))
    else:
        legend.append(Swatch(kind="r", after="ran"))
    shares = (found.layers[index].share if index in found.layers else None for index in range(found.num_layers))
    return HeatMap(
        title=title,
        corner="layer",
        columns=[str(index) for index in range(found.num_layers)],
        rows=[_row(found, position) for position in range(len(found.tokens))],
        legend=legend,
        foot=("ran, %", ["" if share is None else f"{share:.0%}"[:-1] for share in shares]),
        notes=[found.summary],
    )


def _row(found: Routes, position: int) -> HeatRow:
    token = found.tokens[position]
    return HeatRow(
        label=cropped(token.label, WIDEST_HEADING),
        cells=[_mark(found, layer, position) for layer in range(found.num_layers)],
        kind="new" if token.is_new else "given",
        starts=token.is_new and not found.tokens[position - 1].is_new,
    )


def _mark(found: Routes, layer: int, position: int) -> Mark:
    title = told(found, layer, position)
    if (routed := found.layers.get(layer)) is None:
        return Mark(kind="d", title=title)
    if not routed.runs[position]:
        return Mark(kind="s", title=title)
    return Mark(kind="r", title=title, strength=0.15 + 0.85 * strength(routed.margin(position), found.far))
