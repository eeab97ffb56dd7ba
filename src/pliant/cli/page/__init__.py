"""One self-contained HTML page: what it is made of, and how it is written."""

from pliant.cli.page.blocks import (
    Columns,
    Facts,
    HeatMap,
    HeatRow,
    Mark,
    Note,
    Number,
    Section,
    SideBySide,
    Swatch,
    Table,
    Tile,
    told_number,
)
from pliant.cli.page.charts import Chart, Series
from pliant.cli.page.render import check_page, rendered_page, write_page

__all__ = [
    "Chart",
    "Columns",
    "Facts",
    "HeatMap",
    "HeatRow",
    "Mark",
    "Note",
    "Number",
    "Section",
    "Series",
    "SideBySide",
    "Swatch",
    "Table",
    "Tile",
    "check_page",
    "rendered_page",
    "told_number",
    "write_page",
]
