"""The pictures of ``pliant inspect``: tokens by layers for a terminal, and as parts of a page."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from rich.cells import set_cell_size
from rich.table import Table as TerminalTable
from rich.text import Text

from pliant.cli.inspect.records import EDITS, Direction, Inspection, Word
from pliant.cli.page import Chart, HeatMap, HeatRow, Mark, Number, Section, Series, Swatch, Table, told_number
from pliant.cli.token_grid import LABEL_WIDTH, SHOWN_TOKENS, Token, blocks, cropped, numbers, strength

WIDEST_HEADING = 32
SHADES = "░▒▓█"
NOTHING = "·"
ROWS_ON_PAGE = 400


def rendered(found: Inspection, width: int, colours: Sequence[str] = ()) -> Iterator[Text | TerminalTable]:
    """Yields the picture for a terminal of ``width`` columns, then the strongest cells in words."""
    yield Text(title(found), style="bold")
    for indices, label_width, cell in blocks(found.tokens, list(found.layers), width):
        yield Text()
        yield from _block(found, indices, label_width, cell, colours)
    if (more := len(found.tokens) - SHOWN_TOKENS) > 0:
        yield Text(f"… and {more} more tokens; --output FILE.html shows all", style="dim")
    yield Text()
    yield Text(f"{NOTHING} nothing   {' '.join(SHADES)} up to {told_number(found.far, 3)} and above: {found.measure}")
    yield Text()
    yield _table(found)
    yield Text(found.lens, style="dim")


def title(found: Inspection) -> str:
    """How much there is to see."""
    what = "edited layers" if found.kind == EDITS else "layers that rewrite themselves"
    return f"{len(found.tokens)} tokens × {len(found.layers)} {what} of {found.num_layers}"


def _block(
    found: Inspection, indices: Sequence[int], label_width: int, cell: int, colours: Sequence[str]
) -> Iterator[Text]:
    for row in numbers(indices, cell):
        yield Text(f"{' ' * (label_width + 1)}{row}".rstrip(), style="bold")
    far = found.far
    for position, token in enumerate(found.tokens[:SHOWN_TOKENS]):
        line = Text(set_cell_size(cropped(token.label, label_width), label_width) + " ")
        for index in indices:
            level = strength(found.layers[index].ratio(position), far)
            if level == 0:
                line.append(f"{NOTHING:<{cell}}", style="dim")
                continue
            shade = SHADES[min(int(level * len(SHADES)), len(SHADES) - 1)] * max(1, cell - 1)
            colour = colours[min(int(level * len(colours)), len(colours) - 1)] if colours else None
            line.append(f"{shade:<{cell}}", style=colour)
        line.rstrip()
        yield line


def _table(found: Inspection) -> TerminalTable:
    is_one_layer = len(found.layers) == 1
    table = TerminalTable(title="token by token" if is_one_layer else "where each token stands out most")
    for column in ("token", "layer"):
        table.add_column(column, no_wrap=True, justify="right" if column == "layer" else "left")
    for column in ("÷ ‖W‖" if found.kind != EDITS else "÷ MLP", "× median"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("nearest words", overflow="fold")
    if found.kind != EDITS:
        table.add_column("directions", overflow="fold")
    for position in found.positions[:SHOWN_TOKENS]:
        index = found.outstanding(position)
        layer = found.layers[index]
        cells = [
            Text(cropped(found.tokens[position].label, LABEL_WIDTH)),
            str(index),
            told_number(layer.ratio(position), 3),
            told_number(layer.prominence(position), 2),
            Text(words_text(layer.words[position])),
        ]
        if found.kind != EDITS:
            cells.append(Text(directions_text(layer.directions[position])))
        table.add_row(*cells)
    return table


def words_text(words: Sequence[Word] | None) -> str:
    """Words as one line, each with its score."""
    if words is None:
        return "–"
    labels = (Token(id=0, text=word.text, is_new=False).label.strip() for word in words)
    return " · ".join(f"{label} {word.score:.1f}σ" for label, word in zip(labels, words, strict=True))


def directions_text(directions: Sequence[Direction]) -> str:
    """Directions as one line: number, sign of the coordinate, share."""
    several = len({direction.part for direction in directions}) > 1
    return " · ".join(
        f"{direction.part + ' ' if several else ''}{direction.index}{'−' if direction.coordinate < 0 else '+'} "
        f"{direction.share:.0%}"
        for direction in directions
    )


def sections(found: Inspection) -> list[Section]:
    """Returns the parts of a page."""
    return [
        Section(title="Which tokens rewrote which layers", kicker=title(found), blocks=[heat_map(found)]),
        Section(title="Layer by layer", blocks=[by_layer(found)]),
        Section(title="Token by token", blocks=[cells_table(found)]),
    ]


def heat_map(found: Inspection, name: str = "") -> HeatMap:
    """Returns tokens by layers; a tap on a cell shows words and directions."""
    far = found.far
    return HeatMap(
        title=name,
        corner="layer",
        columns=[str(index) for index in found.layers],
        rows=[
            HeatRow(
                label=cropped(token.label, WIDEST_HEADING),
                cells=[_mark(found, index, position, far) for index in found.layers],
            )
            for position, token in enumerate(found.tokens)
        ],
        legend=[Swatch(kind="scale", before="0", after=f"{told_number(far, 3)} or more")],
        notes=[f"Colour: {found.measure}.", found.lens],
    )


def _mark(found: Inspection, index: int, position: int, far: float) -> Mark:
    start = f"{found.tokens[position].label} · layer {index}"
    layer = found.layers[index]
    ratio, norm = layer.ratio(position), layer.norms[position]
    more = {}
    if words := layer.words[position]:
        more["writes towards"] = words_text(words)
    if directions := layer.directions[position]:
        more["directions"] = directions_text(directions)
    sign = "‖change‖" if found.kind == EDITS else "‖ΔW‖"
    return Mark(
        kind="r",
        strength=strength(ratio, far),
        title=f"{start} · {sign} {told_number(norm, 3)} · relative {told_number(ratio, 3)}",
        more=more,
    )


def by_layer(found: Inspection) -> Chart:
    """Returns the mean and the largest ratio of each layer."""
    indices = list(found.layers)
    largest = [max(layer.ratios) for layer in found.layers.values()]
    means = [fmean(layer.ratios) for layer in found.layers.values()]
    return Chart(
        title="How much each layer is rewritten",
        x="layer",
        y="÷ the MLP's output" if found.kind == EDITS else "‖ΔW_t‖ ÷ ‖W‖",
        kind="line",
        series=[
            Series(name="mean of the tokens", x=indices, y=means),
            Series(name="the strongest token", x=indices, y=largest, colour=1, dashed=True),
        ],
        note="The first token of a text attends to nothing but itself, and its rewrite is often the largest by far.",
    )


def cells_table(found: Inspection) -> Table:
    """Returns a row a token: the layer where it stands out most, and what is written there."""
    has_directions = found.kind != EDITS
    rows = []
    for position in found.positions[:ROWS_ON_PAGE]:
        index = found.outstanding(position)
        layer = found.layers[index]
        row: list[str | Number] = [
            Number(text=f"{position} {found.tokens[position].label.strip()}", value=position),
            Number.of(index),
            Number.of(layer.ratio(position), ".3g"),
            Number.of(layer.prominence(position), ".2g"),
            words_text(layer.words[position]),
        ]
        rows.append([*row, directions_text(layer.directions[position])] if has_directions else row)
    columns = ["token", "layer", "relative", "× median", "nearest words", *(["directions"] if has_directions else [])]
    note = (
        "The layer where a token's rewrite is largest over the median of the layer's tokens. σ: standard deviations of "
        "the logit above the mean of the vocabulary."
    )
    if len(found.positions) > ROWS_ON_PAGE:
        note += f" The first {ROWS_ON_PAGE} tokens; the map has all."
    if has_directions:
        note += " Directions: number in the low-rank map, sign of its coordinate, share of the squared sizes of all."
    return Table(title="Where each token stands out most", columns=columns, rows=rows, note=note)
