"""What a report says of comparisons of methods, of editing suites and of what a model keeps."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pliant.cli.page import Chart, Columns, Note, Number, Section, Series, Table
from pliant.cli.report.sources import QUESTIONS, Source
from pliant.cli.report.tasks import HELD_OUT, HELD_OUT_COLUMNS, at, figure, number_at, spread

EDITING = {
    "score": ("S", ".1f"),
    "efficacy": ("efficacy", ".3f"),
    "paraphrase": ("paraphrase", ".3f"),
    "neighbourhood": ("neighbourhood", ".3f"),
    "exact": ("exact", ".3f"),
    "exact_paraphrase": ("exact, rephrased", ".3f"),
    "exact_match": ("EM", ".3f"),
    "f1": ("F1", ".3f"),
    "perplexity_ratio": ("perplexity ×", ".4f"),
    "kl": ("KL", ".4f"),
}
RUN_NAME = re.compile(r"(?P<editor>.+?)-(?P<mode>sequential|batched)-(?P<count>\d+)")

FROZEN = "frozen"
"""The contender that nothing is trained of."""
WIDE = 8
"""From which ratio of the largest to the smallest on an axis is logarithmic."""


def comparison(source: Source) -> Section:
    """Returns the section of a comparison of methods."""
    record, table = source.content, at(source.content, "summary") or {}
    blocks: list[Any] = []
    if stopped := at(record, "stopped_by"):
        blocks.append(Note(text=f"The comparison was stopped by {stopped} and is not complete.", kind="warning"))
    if not table:
        blocks.append(Note(text="No run of this comparison is complete yet."))
        return Section(title="Comparison", kicker=source.name, blocks=blocks)
    blocks.append(_methods(record, table))
    if charts := list(_trade_offs(record, table)):
        blocks.append(Columns(blocks=charts))
    if in_context := _in_context(table):
        blocks.append(in_context)
    return Section(title="Comparison", kicker=source.name, blocks=blocks)


def _methods(record: Mapping[str, Any], table: Mapping[str, Any]) -> Table:
    rows = []
    for name, own in table.items():
        facts, cost = at(record, "contenders", name), at(record, "cost", name)
        rows.append(
            [
                name,
                Number.of(number_at(facts, "parameters")),
                Number.of(number_at(own, "validation_loss"), ".4f"),
                Number.of(number_at(own, "validation_loss_deviation"), ".4f"),
                Number.of(number_at(own, "difference", "value"), "+.4f"),
                spread(at(own, "difference")),
                Number.of(number_at(own, "forgetting", "kl"), ".4f"),
                Number.of(number_at(own, "forgetting", "perplexity_ratio"), ".4f"),
                Number.of(number_at(cost, "time_ratio"), ".2f"),
                Number.of(number_at(cost, "memory_ratio"), ".2f"),
                _seeds(own),
            ]
        )
    columns = ["method", "parameters", "loss", "± seeds", "difference", "95 % interval", "KL forgotten", "ppl ×"]
    columns += ["time ×", "memory ×", "seeds"]
    reference = at(record, "reference")
    beside = f"Differences are to {reference} of the nearest budget, of methods with a size of their own to the first. "
    note = f"{beside if reference else ''}Lower is better."
    if any(number_at(own, "failed") for own in table.values()):
        note += " Of some methods not every seed ended in a finite loss; their figures are of those that did."
    return Table(title="Methods", columns=columns, rows=rows, note=note)


def _seeds(row: Any) -> Number:
    """How many runs ended, and of how many where some diverged."""
    ended, failed = number_at(row, "seeds"), number_at(row, "failed")
    return Number(text=f"{ended} of {ended + failed}", value=ended) if ended and failed else Number.of(ended)


def _trade_offs(record: Mapping[str, Any], table: Mapping[str, Any]) -> Iterator[Chart]:
    """Yields the loss over what it costs: parameters, time, forgetting; the base is a line across."""
    base = number_at(table, FROZEN, "validation_loss")
    axes = {
        ("contenders", "parameters"): ("Quality over size", "trainable parameters"),
        ("cost", "time_ratio"): ("Quality over time", "time of a step, over that of the reference"),
        ("forgetting", "kl"): ("Quality over forgetting", "KL from the base on held-out text, nats a token"),
    }
    for (part, key), (title, axis) in axes.items():
        series = []
        for colour, (name, own) in enumerate(table.items()):
            size = number_at(own, part, key) if part == "forgetting" else number_at(record, part, name, key)
            loss = number_at(own, "validation_loss")
            if name != FROZEN and size is not None and loss is not None:
                series.append(Series(name=name, x=[size], y=[loss], colour=colour, labels=[name]))
        if series:
            sizes = [one.x[0] for one in series]
            yield Chart(
                title=title,
                x=axis,
                y="validation loss, nats",
                series=series,
                kind="scatter",
                log_x=min(sizes) > 0 and max(sizes) > WIDE * min(sizes),
                reference=None if base is None else (base, "the base"),
            )


def _in_context(table: Mapping[str, Any]) -> Table | None:
    rows = []
    for name, own in table.items():
        for task, figures in (at(own, "in_context") or {}).items():
            for measure, found in figures.items() if isinstance(figures, Mapping) else ():
                rows.append(
                    [
                        f"{task}, {measure}",
                        name,
                        Number.of(number_at(found, "value", "value"), ".3f"),
                        Number.of(number_at(found, "difference", "value"), "+.3f"),
                        spread(at(found, "difference")),
                    ]
                )
    columns = ["task", "method", "value", "difference", "95 % interval"]
    return Table(title="Using what stands in the context", columns=columns, rows=rows) if rows else None


def editing(source: Source) -> Section:
    """Returns the section of an editing suite, from its report or from its records."""
    found = source.content if "records" not in source.content else _figures(source.content["records"])
    blocks: list[Any] = [Note(text=note, kind="warning") for note in source.notes]
    parts = at(found, "counts") or [found]
    for part in parts:
        count = number_at(part, "count")
        title = "One edit at a time" if count is None else f"{count:,} edits, {at(part, 'mode') or 'together'}"
        editors = at(part, "editors") or {}
        if editors:
            blocks += [_editors_table(title, editors), *_editors_chart(title, editors)]
    if len(blocks) == len(source.notes):
        blocks.append(Note(text="Nothing has been measured yet."))
    return Section(title="Editing", kicker=source.name, blocks=blocks)


def _figures(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The figures of the records of a folder, by mode and number of edits."""
    from pliant.evaluation.editing.figures import ENDS, figures

    ends = {editor: records[file] for editor, file in ENDS.items() if records.get(file)}
    groups: dict[tuple[int, str], dict[str, Any]] = {}
    for name, own in records.items():
        if name in ENDS.values() or not own:
            continue
        match = RUN_NAME.fullmatch(name)
        key, editor = ((int(match["count"]), match["mode"]), match["editor"]) if match else ((0, ""), name)
        groups.setdefault(key, {})[editor] = own
    groups = groups or {(0, ""): {}}
    parts = []
    for (count, mode), own in sorted(groups.items()):
        runs = {**ends, **own}
        told = {"editors": {name: figures(name, runs) for name in runs}} if "untouched" in runs else {}
        parts.append({**told, **({"count": count, "mode": mode} if count else {})})
    return {"counts": parts}


def _editors_table(title: str, editors: Mapping[str, Any]) -> Table:
    shown = {key: told for key, told in EDITING.items() if any(at(own, key) is not None for own in editors.values())}
    rows = [
        [
            name,
            Number.of(number_at(own, "records")),
            *(figure(own, key, pattern) for key, (_, pattern) in shown.items()),
            Number.of(number_at(own, "median_seconds"), ".2f"),
        ]
        for name, own in editors.items()
    ]
    columns = ["editor", "cases", *(name for name, _ in shown.values()), "s/edit"]
    return Table(title=title, columns=columns, rows=rows)


def _editors_chart(title: str, editors: Mapping[str, Any]) -> Iterator[Chart]:
    """Yields a chart of the main measure with its intervals."""
    measure = next(
        (key for key in ("score", "f1", "efficacy", "exact") if any(at(o, key) for o in editors.values())), None
    )
    if measure is None:
        return
    own = {name: at(figures, measure) for name, figures in editors.items()}
    own = {name: told for name, told in own.items() if number_at(told, "value") is not None}
    values = [told["value"] for told in own.values()]
    series = Series(
        name=EDITING[measure][0],
        x=values,
        y=values,
        labels=list(own),
        low=[number_at(told, "low") for told in own.values()],
        high=[number_at(told, "high") for told in own.values()],
    )
    yield Chart(
        title=f"{title}: {EDITING[measure][0]}", x="95 % interval over cases", series=[series], kind="intervals"
    )


def retention(source: Source) -> Section:
    """Returns the section of the retention suite: held-out text and questions, beside the base."""
    record = source.content
    cells = [[source.name, *(Number.of(number_at(record, key), form) for key, form in HELD_OUT.items())]]
    rows = []
    for kind, name in QUESTIONS.items():
        shares = [figure(at(record, kind), side, ".3f") for side in ("model", "base")]
        gap = at(record, kind, "difference")
        count = Number.of(number_at(gap, "count"))
        rows.append([name, *shares, Number.of(number_at(gap, "value"), "+.3f"), spread(gap), count])
    columns = ["questions", "right", "base", "difference", "95 % interval", "n"]
    held_out = Table(title="Held-out text", columns=HELD_OUT_COLUMNS, rows=cells)
    return Section(
        title="What the model keeps",
        kicker=source.name,
        blocks=[held_out, Table(title="Share of right answers", columns=columns, rows=rows)],
    )
