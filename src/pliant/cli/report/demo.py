"""What a report says of a demo's record."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pliant.cli.page import Chart, Columns, Note, Number, Section, Series, SideBySide, Table, Tile, told_number
from pliant.cli.report.sources import Source


def section(source: Source) -> Section:
    """Returns the section of a demo."""
    record = source.content
    rows = [row for row in record.get("rows") or [] if isinstance(row, Mapping)]
    blocks: list[Any] = [Note(text=note, kind="warning") for note in source.notes]
    if rows:
        blocks.append(_table(rows))
    charts = [chart for chart in (_ratios(rows), _energy(record.get("energy") or {})) if not chart.is_empty]
    if charts:
        blocks.append(Columns(blocks=charts))
    if written := [one for one in record.get("generations") or [] if isinstance(one, Mapping)]:
        entries = [
            (str(one.get("prompt", "")), {"base": _line(one, "base_text"), "converted": _line(one, "text")})
            for one in written
        ]
        blocks.append(SideBySide(title="The base and the converted model continue the same prompts", entries=entries))
    if learned := record.get("consolidation"):
        blocks.append(_learned(learned))
    return Section(title="Demo", kicker=source.name, blocks=blocks)


def tiles(source: Source) -> Iterator[Tile]:
    """Yields the first figures of a demo."""
    record = source.content
    if training := record.get("training"):
        before, after = (told_number(training.get(f"ratio_{when}")) for when in ("before", "after"))
        yield Tile(value=after, name="perplexity ÷ base, trained", note=f"{before} as converted")
    if learned := record.get("consolidation"):
        yield Tile(value=told_number(learned.get("kl")), name="KL of the fact learned", note="nats a token")
    if seconds := record.get("seconds"):
        yield Tile(value=f"{seconds:,.0f} s", name="the whole demo", note=str(_settings(record).get("base", "")))


def _settings(record: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = record.get("settings")
    return settings if isinstance(settings, Mapping) else {}


def _line(one: Mapping[str, Any], key: str) -> str:
    return str(one.get(key) or "").strip()


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    formats = {
        "added_parameters": ("added", ",.0f"),
        "share": ("of base", ".1%"),
        "perplexity": ("perplexity", ",.2f"),
        "ratio": ("× base", ",.3f"),
        "agreement": ("same top 1", ".1%"),
        "kl": ("KL, nats", ".4f"),
    }
    cells = [
        [str(row.get("name", "")), *(Number.of(row.get(key), pattern) for key, (_, pattern) in formats.items())]
        for row in rows
    ]
    base = told_number(rows[0].get("base_perplexity"))
    return Table(
        title=f"What conversion costs before any training (base perplexity {base})",
        columns=["form", *(name for name, _ in formats.values())],
        rows=cells,
    )


def _ratios(rows: Sequence[Mapping[str, Any]]) -> Chart:
    """What the rank costs: keyed conversions, those of a uniform rank joined."""
    keyed = [row for row in rows if row.get("preset") == "keyed" and isinstance(_option(row, "rank"), int)]
    kinds = {
        "same rank in every layer": [row for row in keyed if set(row["options"]) == {"rank"}],
        "spread by sensitivity": [row for row in keyed if _option(row, "allocation") and not _option(row, "tied")],
    }
    series = [
        Series(
            name=name,
            x=[row["options"]["rank"] for row in own],
            y=[row.get("ratio") for row in own],
            colour=colour,
        )
        for colour, (name, own) in enumerate(kinds.items())
        if own
    ]
    return Chart(
        title="What the rank costs, untrained",
        x="rank of the keyed memory",
        y="perplexity ÷ that of the base",
        series=series,
        reference=(1.0, "the base"),
        log_x=True,
    )


def _option(row: Mapping[str, Any], name: str) -> Any:
    options = row.get("options")
    return options.get(name) if isinstance(options, Mapping) else None


def _energy(energy: Mapping[str, Any]) -> Chart:
    """How few directions attention writes in: a line a layer."""
    return Chart(
        title="How few directions attention writes in",
        x="leading directions",
        y="share of E‖a‖²",
        series=[
            Series(name=f"layer {index}", x=[int(count) for count in shares], y=list(shares.values()))
            for index, shares in energy.items()
        ],
        log_x=True,
        ramp=True,
    )


def _learned(learned: Mapping[str, Any]) -> SideBySide:
    before, after = learned.get("before") or {}, learned.get("after") or {}
    kl = told_number(learned.get("kl"))
    return SideBySide(
        title=f"A fact learned for good: {learned.get('context', '')}",
        entries=[
            (prompt, {"before": str(before[prompt]).strip(), "after": str(after.get(prompt, "")).strip()})
            for prompt in before
        ],
        note=f"The edit moves neutral text by {kl} nats a token; taken back, the logits are the old ones.",
    )
