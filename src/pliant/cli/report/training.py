"""What a report says of training runs: learning curves laid over each other, layers, settings and samples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pliant.cli.page import Chart, Columns, Note, Number, Section, Series, SideBySide, Table, Tile, told_number
from pliant.cli.report.sources import Source


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A chart of learning curves: what is logged in training, and beside it the same in validation."""

    title: str
    unit: str
    training: str = ""
    validation: str = ""
    reference: tuple[int | float, str] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The metrics that it shows."""
        return tuple(key for key in (self.training, self.validation) if key)


CURVES = (
    Curve(title="Loss", unit="what training minimises", training="loss"),
    Curve(title="Perplexity ÷ that of the base", unit="×", validation="eval_ratio", reference=(1.0, "the base")),
    Curve(title="KL from the base", unit="nats a token", training="kl", validation="eval_kl"),
    Curve(title="Perplexity", unit="", training="perplexity", validation="eval_perplexity"),
    Curve(title="Same likeliest token as the base", unit="share of positions", validation="eval_agreement"),
    Curve(title="Hidden states' distance from the base", unit="", training="hidden"),
    Curve(title="Learning rate", unit="", training="learning_rate"),
    Curve(title="Gradient norm", unit="", training="grad_norm"),
    Curve(title="Modulation, mean of the layers", unit="‖ΔW_t‖", validation="modulation_norm/mean"),
    Curve(title="Share of tokens that run", unit="share", validation="routing_capacity/mean"),
    Curve(title="Speed", unit="tokens a second", training="tokens_per_second"),
)
ENDS = ("_runtime", "_per_second", "_seconds")
LEFT_OUT = ("step", "epoch", "time", "total_flos", "train_loss", "eval_loss", "eval_base_perplexity")
BY_LAYER = {
    "modulation_norm/layer_": ("Modulation of each layer", "‖ΔW_t‖, mean of the tokens"),
    "routing_capacity/layer_": ("Tokens that run in each layer", "share"),
}
FINAL = {
    "eval_perplexity": ("perplexity", ".4g"),
    "eval_ratio": ("× base", ".4f"),
    "eval_kl": ("KL, nats", ".4f"),
    "eval_agreement": ("same top 1", ".1%"),
}
SAMPLES_SHOWN = 6


def section(runs: Sequence[Source]) -> Section:
    """Returns the section of all training runs."""
    charts = [chart for curve in _curves(runs) if (chart := _chart(curve, runs)) is not None]
    layers = [chart for prefix in BY_LAYER if (chart := _layers(prefix, runs)) is not None]
    blocks: list[Any] = [Note(text=note, kind="warning") for run in runs for note in run.notes]
    blocks += [_finals(runs), Columns(blocks=charts)]
    if layers:
        blocks.append(Columns(blocks=layers))
    blocks += [_samples(run) for run in runs if run.content["samples"]]
    if any(run.content["settings"] for run in runs):
        blocks.append(_settings(runs))
    names = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return Section(title="Training", kicker=names, blocks=blocks)


def tiles(run: Source) -> Iterator[Tile]:
    """Yields the first figures of a run."""
    metrics = run.content["metrics"]
    yield Tile(value=told_number(metrics[-1]["step"]), name="optimizer steps", note=run.name)
    for key in ("eval_ratio", "eval_perplexity"):
        values = _values(metrics, key)[1]
        if values:
            before = f"{told_number(values[0])} before" if len(values) > 1 else ""
            name = "perplexity ÷ base" if key == "eval_ratio" else "validation perplexity"
            yield Tile(value=told_number(values[-1]), name=name, note=before)
            return


def _curves(runs: Sequence[Source]) -> Iterator[Curve]:
    """Yields the known charts, and one for each other number that the runs have logged."""
    yield from CURVES
    known = {key for curve in CURVES for key in curve.keys}
    logged = dict.fromkeys(key for run in runs for line in run.content["metrics"] for key in line)
    for key in logged:
        if key not in known and key not in LEFT_OUT and "/" not in key and not key.endswith(ENDS):
            yield Curve(title=key.replace("_", " "), unit="", training=key)


def _values(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int | float], list[int | float]]:
    known = [(line["step"], line[key]) for line in metrics if _is_number(line.get(key))]
    return [step for step, _ in known], [value for _, value in known]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _chart(curve: Curve, runs: Sequence[Source]) -> Chart | None:
    series = []
    for colour, run in enumerate(runs):
        both = [(key, *_values(run.content["metrics"], key)) for key in curve.keys]
        both = [(key, steps, values) for key, steps, values in both if values]
        for key, steps, values in both:
            kind = "validation" if key == curve.validation else "training"
            name = run.name if len(both) == 1 and len(runs) > 1 else kind if len(runs) == 1 else f"{run.name}, {kind}"
            dashed = kind == "training" and len(both) > 1
            series.append(Series(name=name, x=steps, y=values, colour=colour, dashed=dashed))
    if not series:
        return None
    return Chart(title=curve.title, x="optimizer step", y=curve.unit, series=series, reference=curve.reference)


def _layers(prefix: str, runs: Sequence[Source]) -> Chart | None:
    """The layers at the last evaluation, and, of a single run, at the first."""
    title, unit = BY_LAYER[prefix]
    series = []
    for colour, run in enumerate(runs):
        lines = [line for line in run.content["metrics"] if any(key.startswith(prefix) for key in line)]
        ends = {lines[-1]["step"]: lines[-1]} if lines else {}
        if len(runs) == 1 and len(lines) > 1:
            ends = {lines[0]["step"]: lines[0], **ends}
        for step, line in ends.items():
            layers = {int(key.removeprefix(prefix)): value for key, value in line.items() if key.startswith(prefix)}
            name = f"step {step:,}" if len(runs) == 1 else run.name
            dashed = len(ends) > 1 and step != max(ends)
            series.append(Series(name=name, x=list(layers), y=list(layers.values()), colour=colour, dashed=dashed))
    return Chart(title=title, x="layer", y=unit, series=series) if series else None


def _finals(runs: Sequence[Source]) -> Table:
    """A row a run: how long it was, and where it ended."""
    shown = [key for key in FINAL if any(_values(run.content["metrics"], key)[1] for run in runs)]
    rows = []
    for run in runs:
        metrics = run.content["metrics"]
        row: list[str | Number] = [run.name, Number.of(metrics[-1]["step"])]
        row.append(Number.of(max(_values(metrics, "time")[1], default=None), ",.0f"))
        for key in shown:
            values = _values(metrics, key)[1]
            pattern = FINAL[key][1]
            row.append(_before_and_after(values, pattern))
        rows.append(row)
    columns = ["run", "steps", "seconds", *(FINAL[key][0] for key in shown)]
    return Table(title="Validation, before and after", columns=columns, rows=rows)


def _before_and_after(values: Sequence[int | float], pattern: str) -> Number:
    """The first and the last value in a cell; the last one is sorted by."""
    if len(values) < 2:
        return Number.of(values[-1] if values else None, pattern)
    return Number(text=f"{values[0]:{pattern}} → {values[-1]:{pattern}}", value=values[-1])


def _samples(run: Source) -> SideBySide:
    """What the model wrote after each prompt, at the first evaluation and at the last ones."""
    prompts: dict[str, dict[str, str]] = {}
    for line in run.content["samples"]:
        if isinstance(line.get("prompt"), str) and isinstance(line.get("continuation"), str):
            prompts.setdefault(line["prompt"], {})[f"step {told_number(line.get('step'))}"] = line[
                "continuation"
            ].strip()
    entries = [(prompt, {step: texts[step] for step in _ends(list(texts))}) for prompt, texts in prompts.items()]
    return SideBySide(title=f"What {run.name} wrote", entries=entries[:SAMPLES_SHOWN])


def _ends(steps: Sequence[str]) -> list[str]:
    return list(steps) if len(steps) <= 3 else [steps[0], steps[len(steps) // 2], steps[-1]]


def _settings(runs: Sequence[Source]) -> Table:
    """Settings of the runs beside each other; of several runs, those that differ come first."""
    keys = dict.fromkeys(key for run in runs for key in run.content["settings"])
    told = {key: [_setting(run.content["settings"].get(key)) for run in runs] for key in keys}
    told = {key: values for key, values in told.items() if any(values)}
    ordered = sorted(told, key=lambda key: len(set(told[key])) == 1)
    different = sum(len(set(values)) > 1 for values in told.values())
    title = "Settings" if len(runs) == 1 else f"Settings ({different} differ, which come first)"
    rows = [[key, *told[key]] for key in ordered]
    return Table(title=title, columns=["setting", *(run.name for run in runs)], rows=rows, is_folded=True)


def _setting(value: Any) -> str:
    return "" if value is None or value == [] else str(value)
