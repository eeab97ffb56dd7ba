"""Charts of a page: what is drawn, as the page's script reads it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pliant.cli.page.blocks import Amount

MOST_POINTS = 600
"""Points that a line keeps; more than that no screen can show."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, or one set of points, of a chart.

    Attributes:
        name: In the legend.
        x: Where; ``y`` what, as many; ``None`` leaves a gap.
        colour: Index of the colour; series of the same run share one.
        dashed: Tells a second line of the same colour from the first.
        labels: A text for each point, where points have names.
        low: Lower ends of intervals; ``high`` the upper ones.
    """

    name: str
    x: Sequence[Amount]
    y: Sequence[Amount | None]
    colour: int = 0
    dashed: bool = False
    labels: Sequence[str] = ()
    low: Sequence[Amount | None] = ()
    high: Sequence[Amount | None] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values; long lines are thinned so that their extremes stay."""
        kept = thinned(self.y) if not self.labels else range(len(self.y))
        told: dict[str, Any] = {
            "name": self.name,
            "x": [_short(self.x[i]) for i in kept],
            "y": [_short(self.y[i]) for i in kept],
            "colour": self.colour,
        }
        if self.dashed:
            told["dashed"] = True
        if self.labels:
            told["labels"] = list(self.labels)
        if self.low:
            told |= {"low": [_short(self.low[i]) for i in kept], "high": [_short(self.high[i]) for i in kept]}
        return told


def thinned(values: Sequence[Amount | None]) -> list[int]:
    """Indices of at most ``MOST_POINTS`` values: of each stretch the lowest and the highest, and both ends."""
    if len(values) <= MOST_POINTS:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    stretches = MOST_POINTS // 2 - 1
    for part in range(stretches):
        known = [
            i
            for i in range(part * len(values) // stretches, (part + 1) * len(values) // stretches)
            if values[i] is not None
        ]
        if known:
            kept |= {min(known, key=lambda i: values[i] or 0.0), max(known, key=lambda i: values[i] or 0.0)}
    return sorted(kept)


def _short(value: Amount | None) -> Amount | None:
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines, points or intervals over an axis, drawn by the page itself at the width that it has.

    Attributes:
        title: Above it.
        x: Name of the horizontal axis; ``y`` of the vertical one.
        series: What is drawn.
        kind: ``line``, ``scatter``, or ``intervals``: a row a label, its value and interval along x.
        log_x: Logarithmic to begin with; ``log_y`` likewise.
        reference: A value worth comparing with, and its name: a line across.
        zero: The vertical axis begins at 0.
        ramp: Many lines in an order, such as those of layers: coloured along a scale, without a legend.
        note: A sentence below.
    """

    title: str
    x: str
    y: str = ""
    series: Sequence[Series]
    kind: str = "line"
    log_x: bool = False
    log_y: bool = False
    reference: tuple[Amount, str] | None = None
    zero: bool = False
    ramp: bool = False
    note: str = ""

    template: ClassVar[str] = "chart"

    @property
    def is_empty(self) -> bool:
        """Whether there is no point to draw."""
        return not any(value is not None for series in self.series for value in series.y)

    @property
    def data(self) -> str:
        """What the page's script draws from, as JSON."""
        told = {
            "kind": self.kind,
            "x": self.x,
            "y": self.y,
            "logX": self.log_x,
            "logY": self.log_y,
            "zero": self.zero,
            "ramp": self.ramp,
            "reference": list(self.reference) if self.reference and math.isfinite(self.reference[0]) else None,
            "series": [series.to_dict() for series in self.series],
        }
        return json.dumps(told, ensure_ascii=False, separators=(",", ":"))

    @property
    def described(self) -> str:
        """The chart in a sentence, for those who cannot see it."""
        kinds = {"line": "Line chart", "scatter": "Scatter chart", "intervals": "Chart of intervals"}
        names = ", ".join(series.name for series in self.series[:6])
        more = f" and {len(self.series) - 6} more" if len(self.series) > 6 else ""
        return f"{kinds[self.kind]}: {self.title}, over {self.x}; {names}{more}."
