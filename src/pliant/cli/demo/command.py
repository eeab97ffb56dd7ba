"""``pliant demo``: convert the embedded model every way, measure it, save it, load it again."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli.console import hush_transformers, progress_display, results, say_step
from pliant.cli.demo import consolidation, folder, rows, training
from pliant.cli.generate import Writer, side_by_side
from pliant.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.statistics import AttentionStatistics

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "Once upon a time, a small robot",
)
NEW_TOKENS = 32
TRAINING_STEPS = 40
WINDOW = 512
PREDICTION_WINDOWS = 1
"""Windows on which each conversion predicts its cost: few, as the demo measures it anyway."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much the demo does."""

    tokens: int
    calibration_tokens: int
    rows: tuple[rows.Row, ...]
    prompts: tuple[str, ...]
    new_tokens: int
    training_steps: int

    @classmethod
    def of(cls, tokens: int, calibration_tokens: int, *, quick: bool) -> "Plan":
        """Returns the whole demo, or with ``quick`` a small one at most as large as asked for."""
        if not quick:
            return cls(
                tokens=tokens,
                calibration_tokens=calibration_tokens,
                rows=rows.ROWS,
                prompts=PROMPTS,
                new_tokens=NEW_TOKENS,
                training_steps=TRAINING_STEPS,
            )
        return cls(
            tokens=min(tokens, 2 * WINDOW),
            calibration_tokens=min(calibration_tokens, 12 * WINDOW),
            rows=tuple(row for row in rows.ROWS if row.in_quick),
            prompts=PROMPTS[:1],
            new_tokens=NEW_TOKENS // 2,
            training_steps=TRAINING_STEPS // 20,
        )


def demo(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for what the demo leaves; its own is overwritten."),
    ] = Path("outputs/demo"),
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to measure on, in windows of 512.")] = 4096,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens to read for the closed form.")] = 32_768,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows, fewer tokens: about a minute.")] = False,
) -> None:
    """Convert the embedded 135M model, train it, teach it a fact, and show what that cost and gained.

    Needs two data wheels, no network and no GPU; about seven minutes on two cores. Leaves three tables,
    two figures, demo.json, the converted model twice (whole, and as a delta over its base), and the
    run that trained another.

    \b
    pliant demo
    pliant demo --quick --output outputs/quick
    """
    started = time.monotonic()
    plan = Plan.of(tokens, calibration_tokens, quick=quick)
    record: dict[str, Any] = {"made_by": folder.MADE_BY, "complete": False}
    folder.clear(output)
    folder.write_record(output, record)
    hush_transformers()
    record |= _run(plan, output)
    record |= {"complete": True, "seconds": round(time.monotonic() - started, 1)}
    folder.write_record(output, record)
    folder.say_where(output, rows.BASE, record["seconds"])


def _run(plan: Plan, output: Path) -> dict[str, Any]:
    """Carries out every step; returns what the record says of them."""
    statistics, evaluation = _read(plan)
    energy = _spectra(statistics)
    models, measured = _measure(plan, statistics, evaluation)
    results.print(rows.table_of(measured))
    _draw(measured, energy, output)
    outputs = _generate(models.kept, plan)
    _save(models.kept, output)
    reloaded = _reload(outputs, plan, output)
    before = next(figures for figures in measured if figures.row.is_trained)
    trained = training.train(models.trained, before, evaluation, plan.training_steps, output)
    training.show(trained, output)
    learned = consolidation.learn()
    consolidation.show(learned)
    return {
        "versions": folder.versions(),
        "hardware": folder.hardware(),
        "settings": {
            "base": rows.BASE,
            "dtype": rows.dtype_name(),
            "tokens": evaluation.numel(),
            "calibration_tokens": plan.calibration_tokens,
            "window": WINDOW,
        },
        "rows": [figures.to_dict() for figures in measured],
        "directions_for_99_percent": {i: _directions(shares) for i, shares in energy.items()},
        "energy": {i: _at_powers_of_two(shares) for i, shares in energy.items()},
        "generations": outputs,
        "reloaded_in_a_new_process": reloaded,
        "training": trained.to_dict(),
        "consolidation": learned.to_dict(),
    }


def _read(plan: Plan) -> "tuple[AttentionStatistics, Tensor]":
    """Loads the base, reads the calibration text once for all rows, and takes other text."""
    from pliant.cli.generation import tokenizer_of
    from pliant.data import calibration_tokens, documents, token_windows
    from pliant.statistics import attention_statistics

    say_step(
        f"1. Load {rows.BASE} in {rows.dtype_name()}",
        "The base comes with a Python package; nothing is downloaded.",
    )
    model = rows.load_base()
    tokenizer = tokenizer_of(model)
    evaluation = token_windows(documents("validation"), tokenizer, num_tokens=plan.tokens, window=WINDOW)
    say_step(
        f"2. Read {plan.calibration_tokens:,} tokens of calibration text, once for all rows",
        "The second moment of each layer's attention output gives the closed-form start of keyed.",
    )
    windows = calibration_tokens(tokenizer, num_tokens=plan.calibration_tokens, window=WINDOW)
    layers = range(model.config.num_hidden_layers)
    with progress_display() as progress:
        return attention_statistics(model, windows, layers=layers, progress=progress), evaluation


def _spectra(statistics: "AttentionStatistics") -> dict[int, list[float]]:
    """Returns, per layer, the share of the attention output that its leading directions hold."""
    from pliant.conversion.closed_form import spectrum

    say_step("3. Take each layer's spectrum", "How many directions attention really writes in.")
    energy: dict[int, list[float]] = {}
    with progress_display() as progress:
        for done, (index, moment) in enumerate(sorted(statistics.moments.items()), start=1):
            values = spectrum(moment).values.clamp_min(0.0)
            energy[index] = (values.cumsum(0) / values.sum()).tolist()
            progress("Layers", done, len(statistics.moments))
    counts = sorted(_directions(shares) for shares in energy.values())
    results.print(
        f"99 % of the attention output lies in {counts[0]} to {counts[-1]} of {len(energy[0])} "
        f"directions, layer by layer (median {counts[len(counts) // 2]})."
    )
    return energy


def _directions(shares: list[float], energy: float = 0.99) -> int:
    return next(count for count, share in enumerate(shares, start=1) if share >= energy or count == len(shares))


def _at_powers_of_two(shares: list[float]) -> dict[int, float]:
    """Directions → the share of the attention output that so many hold: 1, 2, 4, …, all."""
    counts = [2**n for n in range(len(shares).bit_length()) if 2**n < len(shares)]
    return {count: round(shares[count - 1], 4) for count in [*counts, len(shares)]}


@dataclass(frozen=True, kw_only=True)
class Models:
    """The two converted models that the demo goes on with."""

    kept: Any
    trained: Any


def _measure(plan: Plan, statistics: Any, evaluation: "Tensor") -> tuple[Models, list[rows.Measured]]:
    """Converts and measures every row; returns the models to go on with, and all figures."""
    from dataclasses import replace

    say_step(
        f"4. Convert {len(plan.rows)} ways, measure each on {evaluation.numel():,} other tokens",
        "The base is measured in the same run, through base mode of the same model.",
    )
    statistics = replace(statistics, held_out=statistics.held_out[:PREDICTION_WINDOWS])
    kept = trained = None
    measured = []
    with progress_display() as progress:
        for row in plan.rows:
            model, figures = rows.measure(row, statistics, evaluation, progress)
            measured.append(figures)
            kept = model if row.is_kept else kept
            trained = model if row.is_trained else trained
    return Models(kept=kept, trained=trained), measured


def _draw(measured: list[rows.Measured], energy: dict[int, list[float]], output: Path) -> None:
    from pliant.cli.plots import Point, draw

    points = [
        Point(
            rank=figures.row.options["rank"],
            ratio=figures.ratio,
            is_uniform=figures.row.options.get("allocation", "uniform") == "uniform",
        )
        for figures in measured
        if figures.row.preset == "keyed" and "tied" not in figures.row.options
    ]
    draw(points, energy, output / folder.FIGURE)


def _generate(model: Any, plan: Plan) -> list[dict[str, Any]]:
    from pliant.cli.generation import Sampling

    kept = next(row for row in plan.rows if row.is_kept)
    say_step(
        f"5. Let the base and {kept.name} continue the same prompts",
        "Greedy, one copy of the weights.",
    )
    writer = Writer(model, Sampling(max_new_tokens=plan.new_tokens))
    outputs = [writer.describe(prompt, with_base=True) for prompt in plan.prompts]
    results.print(side_by_side(outputs))
    return outputs


def _save(model: Any, output: Path) -> None:
    say_step(
        "6. Save the converted model, whole and as a delta",
        "Both are ordinary Hugging Face directories.",
    )
    model.save_pretrained(output / folder.FULL)
    model.save_pretrained(output / folder.DELTA, delta=True)


def _reload(outputs: list[dict[str, Any]], plan: Plan, output: Path) -> bool:
    """Lets a new process load each saved directory and continue the prompts; the text must be the
    same.

    Raises:
        CheckpointError: It is not, or the process failed.
    """
    say_step("7. Load both in a new process and generate again", "What was saved is what was measured.")
    for name in (folder.FULL, folder.DELTA):
        command = [sys.executable, "-m", "pliant.cli", "generate", str(output / name), "--json"]
        command += ["--max-new-tokens", str(plan.new_tokens), "--dtype", rows.dtype_name()]
        for prompt in plan.prompts:
            command += ["--prompt", prompt]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise CheckpointError(f"{output / name} could not be loaded in a new process: {run.stderr.strip()}")
        again = json.loads(run.stdout)["outputs"]
        if [o["token_ids"] for o in again] != [o["token_ids"] for o in outputs]:
            raise CheckpointError(
                f"{output / name} must generate what the model in memory did; got "
                f"{again[0]['text']!r}, expected {outputs[0]['text']!r}."
            )
        results.print(f"{name}: the same text, token for token.")
    return True
