"""What a page is made of beside charts: tables, heat maps, texts. Every text is escaped where it is rendered."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

Amount = int | float


def told_number(value: Any, digits: int = 4) -> str:
    """A number as people read it: four digits, thousands apart; a dash for what is missing or not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


@dataclass(frozen=True, kw_only=True)
class Number:
    """A cell that is shown as one text and sorted by a number."""

    text: str
    value: Amount | None

    @classmethod
    def of(cls, value: Any, pattern: str = "") -> "Number":
        """Returns the cell of a number, in a format or in four digits."""
        known = isinstance(value, int | float) and math.isfinite(value)
        text = (format(value, pattern) if known and pattern else told_number(value)).replace("-", "−")
        return cls(text=text, value=float(value) if known else None)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table that a click on a heading sorts.

    Attributes:
        title: Its caption.
        columns: Headings.
        rows: Cells, texts or numbers; the first of a row is its name.
        note: A sentence below.
        is_folded: Shown only on a click.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Number]]
    note: str = ""
    is_folded: bool = False

    template: ClassVar[str] = "table"

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers."""
        return any(isinstance(row[column], Number) for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A cell of a heat map.

    Attributes:
        kind: ``r`` filled by ``strength``, ``s`` empty, ``d`` outside of what is measured.
        strength: 0 to 1.
        title: The cell in words.
        more: What a tap shows besides: name → text.
    """

    kind: str
    title: str
    strength: Amount = 0.0
    more: Mapping[str, str] = field(default_factory=dict)

    @property
    def lines(self) -> str:
        """``more`` for the page's script: a line each, name and text apart by a tab; shorter than escaped JSON."""
        return "\n".join("\t".join(" ".join(part.split()) for part in entry) for entry in self.more.items())


@dataclass(frozen=True, kw_only=True)
class HeatRow:
    """A row of a heat map; ``kind`` is ``given`` or ``new``, ``starts`` draws a line above."""

    label: str
    cells: Sequence[Mark]
    kind: str = "given"
    starts: bool = False


@dataclass(frozen=True, kw_only=True)
class Swatch:
    """An entry of a heat map's legend: texts around a sample of ``kind``, or of the whole ``scale``."""

    kind: str
    after: str
    before: str = ""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Rows by columns, coloured; a tap on a cell says what it is.

    Attributes:
        title: Above it; may be empty.
        corner: What the columns are.
        columns: Their headings.
        rows: From top to bottom.
        legend: What the colours mean.
        foot: Name and cells of a last row.
        notes: Sentences above.
    """

    corner: str
    columns: Sequence[str]
    rows: Sequence[HeatRow]
    legend: Sequence[Swatch]
    title: str = ""
    foot: tuple[str, Sequence[str]] | None = None
    notes: Sequence[str] = ()

    template: ClassVar[str] = "heatmap"


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Texts beside each other under what they continue.

    Attributes:
        title: Above them.
        entries: Prompt → texts by the name of who wrote them.
        note: A sentence below.
    """

    title: str
    entries: Sequence[tuple[str, Mapping[str, str]]]
    note: str = ""

    template: ClassVar[str] = "texts"


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A figure to see first, what it is, and what it is compared with."""

    value: str
    name: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Figures to see first."""

    tiles: Sequence[Tile]

    template: ClassVar[str] = "facts"


@dataclass(frozen=True, kw_only=True)
class Note:
    """A paragraph; ``kind`` is ``plain`` or ``warning``."""

    text: str
    kind: str = "plain"

    template: ClassVar[str] = "note"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Blocks beside each other where there is room."""

    blocks: Sequence[Any]

    template: ClassVar[str] = "columns"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page with a heading, reached from the top; ``kicker`` stands above it."""

    title: str
    blocks: Sequence[Any]
    kicker: str = ""
