"""The conversions that ``pliant demo`` compares, and how each is measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pliant.cli.console import ProgressCallback, library_muted

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.statistics import AttentionStatistics

BASE = "smollm2-135m"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversion of every layer: a preset, its options, and what it is there to show."""

    preset: str
    options: Mapping[str, Any]
    why: str
    in_quick: bool = False
    is_kept: bool = False
    is_trained: bool = False

    @property
    def name(self) -> str:
        """``keyed, rank 128``, with any other option behind it."""
        rest = "".join(f", {key if value is True else value}" for key, value in self.options.items() if key != "rank")
        return f"{self.preset}, rank {self.options['rank']}{rest}"


ROWS: tuple[Row, ...] = (
    Row(preset="keyed", options={"rank": 64}, why="a ninth of the width"),
    Row(
        preset="keyed",
        options={"rank": 128},
        why="between a fifth and a quarter of it; trained below",
        in_quick=True,
        is_trained=True,
    ),
    Row(
        preset="keyed",
        options={"rank": 128, "allocation": "sensitivity"},
        why="the same sum, spread by what each layer needs",
    ),
    Row(
        preset="keyed",
        options={"rank": 192},
        why="a third: close to the base; this one is kept",
        in_quick=True,
        is_kept=True,
    ),
    Row(preset="keyed", options={"rank": 256}, why="four ninths: closer still"),
    Row(
        preset="keyed",
        options={"rank": 256, "tied": True, "allocation": "sensitivity"},
        why="the parameters of rank 128: one factor stored, its ranks spread",
    ),
    Row(
        preset="v1",
        options={"rank": 16},
        why="keeps the residual: exact before training",
        in_quick=True,
    ),
    Row(preset="v1_single", options={"rank": 16}, why="drops the residual: must be trained"),
    Row(preset="v2", options={"rank": 16}, why="drops it, and the MLP input too"),
    Row(preset="outer", options={"rank": 64}, why="likewise, with a rank-1 update of the gate"),
)
"""Every row of the demo's table, in its order; one is kept to generate and be saved, and one is trained."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A converted model beside its base.

    Attributes:
        row: What was converted how.
        added_parameters: All of it.
        share: Added parameters over those of the base.
        perplexity: On the evaluation text; ``base_perplexity`` likewise.
        ratio: The one over the other.
        agreement: Share of positions with the same likeliest token.
        kl: ``KL(base ‖ model)`` in nats a token.
    """

    row: Row
    added_parameters: int
    share: float
    perplexity: float
    base_perplexity: float
    ratio: float
    agreement: float
    kl: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures as JSON values."""
        figures = {name: value for name, value in vars(self).items() if name != "row"}
        return {
            "name": self.row.name,
            "preset": self.row.preset,
            "options": dict(self.row.options),
            **figures,
        }


def dtype_name() -> str:
    """Returns ``bfloat16`` where this processor is fast in it, else ``float32``."""
    from pliant.training.plan import multiplies_bfloat16

    return "bfloat16" if multiplies_bfloat16() else "float32"


def load_base() -> Any:
    """Returns a fresh base, in what this processor is fast in."""
    import torch

    from pliant.models import load

    return load(BASE, dtype=getattr(torch, dtype_name())).eval()


def measure(
    row: Row, statistics: "AttentionStatistics", tokens: "Tensor", progress: ProgressCallback
) -> tuple[Any, Measured]:
    """Converts a fresh base as ``row`` says and compares it with itself in base mode.

    Returns:
        The converted model and its figures.
    """
    from pliant.architectures import NptConfig
    from pliant.conversion import convert
    from pliant.metrics import compare_to_base

    model = load_base()
    # The table says what each row costs; the library's prediction and warning would repeat it.
    with library_muted("pliant.conversion"):
        convert(
            model,
            NptConfig.preset(row.preset, **row.options),
            calibration=statistics,
            progress=progress,
        )
    compared = compare_to_base(model, tokens, progress=lambda _, done, total: progress(row.name, done, total))
    added = sum(parameter.numel() for _, parameter in model.dynamic_parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    return model, Measured(
        row=row,
        added_parameters=added,
        share=added / (total - added),
        perplexity=compared.perplexity,
        base_perplexity=compared.base_perplexity,
        ratio=compared.ratio,
        agreement=compared.agreement,
        kl=compared.kl,
    )


def table_of(rows: list[Measured]) -> Table:
    """Returns the demo's one table."""
    table = Table(title=f"What conversion costs before any training (base perplexity {rows[0].base_perplexity:.2f})")
    table.add_column("form")
    for column in ("added", "of base", "perplexity", "× base", "same top 1", "KL, nats"):
        table.add_column(column, justify="right")
    table.add_column("what it shows")
    for measured in rows:
        table.add_row(
            measured.row.name,
            f"{measured.added_parameters:,}",
            f"{measured.share:.1%}",
            f"{measured.perplexity:,.2f}",
            f"{measured.ratio:,.3f}",
            f"{measured.agreement:.1%}",
            f"{measured.kl:.4f}",
            measured.row.why,
        )
    return table
