"""What a report says of benchmark tasks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pliant.cli.page import Chart, Columns, Number, Section, Series, SideBySide, Table, Tile, told_number
from pliant.cli.report.sources import Source

NORMAL = 1.96
"""Standard errors on either side of a 95 % interval."""
MAIN = ("acc_norm", "acc", "exact_match", "f1")
"""Which metric of a task is drawn, the first that there is: shares, which fit on one axis. The table has all."""
HELD_OUT = {"perplexity": ".4g", "base_perplexity": ".4g", "ratio": ".4f", "kl": ".4f", "agreement": ".1%"}
HELD_OUT_COLUMNS = ("model", "perplexity", "base", "× base", "KL, nats", "same top 1")


def at(tree: Any, *keys: str) -> Any:
    """What lies at a path of keys; ``None`` if there is nothing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def number_at(tree: Any, *keys: str) -> int | float | None:
    """The number at a path of keys; ``None`` if there is none."""
    value = at(tree, *keys)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def spread(interval: Any) -> Number:
    """The cell of an interval's ends, sorted by the lower."""
    low, high = number_at(interval, "low"), number_at(interval, "high")
    text = "–" if low is None or high is None else f"[{low:+.3f}, {high:+.3f}]".replace("-", "−")
    return Number(text=text, value=low)


def tasks(sources: Sequence[Source]) -> Section:
    """Returns the section of benchmark tasks."""
    rows = [(source, *row) for source in sources for row in _task_rows(source.content)]
    blocks: list[Any] = []
    if chart := _task_chart(sources, rows):
        blocks.append(chart)
    if rows:
        blocks.append(_task_table(rows, with_names=len(sources) > 1))
    held_out = [(s.name, found) for s in sources if isinstance(found := at(s.content, "pliant", "held_out"), Mapping)]
    if held_out:
        cells = [[name, *(figure(found, key, form) for key, form in HELD_OUT.items())] for name, found in held_out]
        blocks.append(Table(title="Held-out text", columns=HELD_OUT_COLUMNS, rows=cells))
    by_layer = [_by_layer(sources, "modulation", "ratio"), _by_layer(sources, "routing", "share")]
    if charts := [chart for chart in by_layer if not chart.is_empty]:
        blocks.append(Columns(blocks=charts))
    blocks += [_written(source) for source in sources if at(source.content, "pliant", "samples")]
    return Section(title="Benchmarks", kicker=f"{len({row[1] for row in rows})} tasks", blocks=blocks)


def tiles(source: Source) -> Iterator[Tile]:
    """Yields the first figures of an evaluation."""
    held_out = at(source.content, "pliant", "held_out")
    if (ratio := number_at(held_out, "ratio", "value")) is not None:
        yield Tile(value=told_number(ratio), name="perplexity ÷ base, held out", note=source.name)
    gaps = [number_at(row[2], "difference", "value") for row in _main_rows(list(_task_rows(source.content)))]
    known = [gap for gap in gaps if gap is not None]
    if known:
        mean = sum(known) / len(known)
        yield Tile(value=f"{mean:+.3f}", name="mean difference to the base", note=f"{len(known)} tasks, {source.name}")


def _task_rows(record: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yields task, metric and the figures of model, base and difference; of plain lm-eval results the model's only."""
    if own := at(record, "pliant", "tasks"):
        for task, facts in own.items():
            yield from ((task, metric, figures) for metric, figures in (at(facts, "metrics") or {}).items())
        return
    for task, metrics in (at(record, "results") or {}).items():
        for name in metrics if isinstance(metrics, Mapping) else ():
            value, (metric, _, kind) = number_at(metrics, name), name.partition(",")
            if value is None or metric.endswith("_stderr") or not kind:
                continue
            error = number_at(metrics, f"{metric}_stderr,{kind}")
            ends = {} if error is None else {"low": value - NORMAL * error, "high": value + NORMAL * error}
            yield task, name, {"model": {"value": value, **ends}}


def _main_rows(rows: Sequence[Any]) -> list[Any]:
    """Of each task the row of its main metric; rows end in task, metric, figures."""
    found: dict[Any, Any] = {}
    for row in rows:
        metric = row[-2].partition(",")[0]
        if metric not in MAIN:
            continue
        rank, key = MAIN.index(metric), row[:-2]
        if key not in found or rank < found[key][0]:
            found[key] = (rank, row)
    return [row for _, row in found.values()]


def _task_chart(sources: Sequence[Source], rows: Sequence[Any]) -> Chart | None:
    named = [(row[0].name, *row[1:]) for row in rows]
    main = _main_rows(named)
    has_base = any(number_at(figures, "difference", "value") is not None for *_, figures in main)
    side = "difference" if has_base else "model"
    series = []
    for colour, source in enumerate(sources):
        own = [row for row in main if row[0] == source.name and number_at(row[3], side, "value") is not None]
        if own:
            figures = [row[3][side] for row in own]
            values = [one["value"] for one in figures]
            series.append(
                Series(
                    name=source.name,
                    x=values,
                    y=values,
                    colour=colour,
                    labels=[row[1] if len(sources) == 1 else f"{row[1]} · {source.name}" for row in own],
                    low=[number_at(one, "low") for one in figures],
                    high=[number_at(one, "high") for one in figures],
                )
            )
    if not series:
        return None
    return Chart(
        title="What the models gained over their base" if has_base else "What the models reach",
        x="difference to the base, 95 % interval" if has_base else "score, 95 % interval",
        series=series,
        kind="intervals",
        reference=(0.0, "the base") if has_base else None,
    )


def _task_table(rows: Sequence[Any], *, with_names: bool) -> Table:
    cells = []
    for source, task, metric, figures in rows:
        name = [task, source.name] if with_names else [task]
        model, base, gap = (number_at(figures, side, "value") for side in ("model", "base", "difference"))
        cells.append(
            [
                *name,
                metric.removesuffix(",none"),
                Number.of(model, ".3f"),
                Number.of(base, ".3f"),
                Number.of(gap, "+.3f"),
                spread(at(figures, "difference")),
                Number.of(number_at(figures, "model", "count")),
            ]
        )
    names = ["task", "evaluation"] if with_names else ["task"]
    columns = [*names, "metric", "model", "base", "difference", "95 % interval", "documents"]
    return Table(title="Every metric", columns=columns, rows=cells)


def figure(found: Any, key: str, pattern: str) -> Number:
    """The cell of a mean."""
    return Number.of(number_at(found, key, "value"), pattern)


def _by_layer(sources: Sequence[Source], kind: str, name: str) -> Chart:
    series = []
    for colour, source in enumerate(sources):
        layers = at(source.content, "pliant", kind)
        known = {int(i): number_at(own, name) for i, own in layers.items()} if isinstance(layers, Mapping) else {}
        if known:
            series.append(Series(name=source.name, x=list(known), y=list(known.values()), colour=colour))
    titles = {
        "modulation": ("How much each layer is rewritten", "‖ΔW_t‖ ÷ ‖W‖"),
        "routing": ("Tokens that run", "share"),
    }
    return Chart(title=titles[kind][0], x="layer", y=titles[kind][1], series=series)


def _written(source: Source) -> SideBySide:
    samples = [one for one in at(source.content, "pliant", "samples") if isinstance(one, Mapping)]
    entries = [
        (str(one.get("prompt", "")), {side: str(one[side]).strip() for side in ("base", "model") if side in one})
        for one in samples
    ]
    return SideBySide(title=f"What {source.name} writes", entries=entries)
