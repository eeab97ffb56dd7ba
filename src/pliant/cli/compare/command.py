"""``pliant compare``: several ways to train a base on one recipe, beside each other; or the forms of NPT."""

import json
from collections.abc import Sequence
from enum import StrEnum
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer

from pliant.cli.console import PlainProgress, hush_transformers, notes, progress_display, results, say_step
from pliant.errors import ConfigError

SETTINGS, MEASURES, FORMS = "Settings", "What is measured", "--versions"
DEFAULT_METHODS = "v1,lora,ia3,dora,frozen"
PLOT_FILE = "comparison.png"


class Equal(StrEnum):
    """What is the same for all methods, beside rows and order."""

    PARAMETERS = "parameters"
    TIME = "time"


OF_VERSIONS = ("model_size", "steps", "rank")
SHARED = ("output", "as_json", "versions")
"""Options that go with ``--versions`` alone, and with or without it; all others go without."""


class ModelSize(StrEnum):
    """Shape of the base that ``--versions`` makes."""

    TINY = "tiny"
    SMALL = "small"


def compare(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings of the recipe to change, as of pliant train."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results; the same one goes on.")
    ] = None,
    config_name: Annotated[
        str,
        typer.Option(
            "--config-name",
            help="What all methods train on: compare_sft, compare_domain, compare_metamath, another recipe with "
            "objective sft or causal_lm, or a YAML file of yours.",
            rich_help_panel=SETTINGS,
        ),
    ] = "compare_sft",
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated: v1, v1_single, v2, outer, keyed, keyed_pre, lora, lora_mlp, dora, ia3, full, "
            "frozen.",
            rich_help_panel=SETTINGS,
        ),
    ] = DEFAULT_METHODS,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Trainable parameters, one or several: 500000,1000000. Default: as many as v1 of rank 16 has.",
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each method.", rich_help_panel=SETTINGS)] = 3,
    learning_rates: Annotated[
        list[str] | None,
        typer.Option(
            "--learning-rates",
            help="Tried at the first seed: 3e-4,1e-3,3e-3. Of one method: full=1e-5,3e-5,1e-4; as many for each.",
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    equal: Annotated[
        Equal,
        typer.Option(
            help="time gives each method as many steps as fit into the reference's time.", rich_help_panel=SETTINGS
        ),
    ] = Equal.PARAMETERS,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Method that the others are compared with. Default: as before in that folder, else lora.",
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    in_context: Annotated[
        int,
        typer.Option(
            "--in-context",
            min=0,
            help="Questions of each in-context task: classification, symbols, recall, reading.",
            rich_help_panel=MEASURES,
        ),
    ] = 0,
    tasks: Annotated[
        str | None, typer.Option(help="Some of the in-context tasks, comma-separated.", rich_help_panel=MEASURES)
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            "--held-out",
            help="Text file to measure forgetting on; default: embedded texts.",
            rich_help_panel=MEASURES,
        ),
    ] = None,
    held_out_tokens: Annotated[
        int, typer.Option("--held-out-tokens", min=2, help="Tokens of it.", rich_help_panel=MEASURES)
    ] = 4_096,
    cost: Annotated[
        bool, typer.Option("--cost/--no-cost", help="Measure step time and peak memory.", rich_help_panel=MEASURES)
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print sizes, train nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    versions: Annotated[
        bool, typer.Option("--versions", help="Compare the forms of NPT on a tiny base instead.", rich_help_panel=FORMS)
    ] = False,
    model_size: Annotated[
        ModelSize, typer.Option("--model-size", help="Of that base.", rich_help_panel=FORMS)
    ] = ModelSize.TINY,
    steps: Annotated[int, typer.Option(help="Of training towards that base.", rich_help_panel=FORMS)] = 60,
    rank: Annotated[int, typer.Option(help="Of every form.", rich_help_panel=FORMS)] = 16,
) -> None:
    """Compare ways to train a base: NPT, LoRA, DoRA, IA3, all weights; the same rows, order, steps and size.

    Needs a recipe; the default one trains the embedded base on conversations that come with pliant. Each
    method tries the same number of learning rates at the first seed. Leaves comparison.json, a picture
    and the best weights of each run under --output, and goes on there when it was stopped. --versions
    needs nothing, takes a minute on a CPU and leaves nothing without --output.

    \b
    pliant compare --versions
    pliant compare data.dataset_name=alpaca_en_demo.json -o outputs/comparison
    pliant compare --methods v1,lora,full --budget 500000,1000000 --learning-rates 3e-4,1e-3 --dry-run -o outputs/two
    pliant compare --config-name compare_domain data.dataset_name=kernel.txt --in-context 100 -o outputs/domain
    """
    _refuse_of_the_other(locals())
    given = list(overrides or ())
    if versions:
        _versions(model_size.value, rank, steps, output, as_json=as_json)
        return
    if output is None:
        raise typer.BadParameter("names the folder of the results; give one.", param_hint="--output")
    hush_transformers()
    rates, rates_of = parse_rates(learning_rates or [])
    options: dict[str, Any] = {
        "output": output,
        "methods": words(methods, "--methods"),
        "budgets": [whole_number(text) for text in words(budget or "", "--budget")],
        "seeds": seeds,
        "rates_of": rates_of,
        "reference": reference,
        "equal": equal.value,
        "held_out": held_out,
        "held_out_tokens": held_out_tokens,
        "questions": in_context,
    }
    options |= {"learning_rates": rates} if rates else {}
    options |= {"tasks": words(tasks, "--tasks")} if tasks is not None else {}
    from pliant.cli.compare.tables import show, show_plan
    from pliant.evaluation.comparison.plan import plan_comparison

    if dry_run:
        show_plan(plan_comparison(config_name, given, **options))
        return
    found = _compare(config_name, given, options, cost=cost)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        show(found)
        results.print(f"runs and figures in {output / 'comparison.json'}", markup=False, soft_wrap=True)
    if found["stopped_by"] is None:
        from pliant.cli.compare.plots import draw_comparison

        draw_comparison(found, output / PLOT_FILE)
        notes.print(f"picture: {output / PLOT_FILE}", markup=False, soft_wrap=True)
        return
    import signal

    notes.print(f"stopped by {found['stopped_by']}; the same command goes on", markup=False, soft_wrap=True)
    raise typer.Exit(128 + signal.Signals[found["stopped_by"]])


def _compare(config_name: str, overrides: list[str], options: dict[str, Any], *, cost: bool) -> dict[str, Any]:
    from pliant.evaluation.comparison.compare import compare as measure

    # Lines, not bars: each run draws a display of its own.
    return measure(config_name, overrides, measure_cost=cost, console=notes, progress=PlainProgress(), **options)


def _versions(size: str, rank: int, steps: int, output: Path | None, *, as_json: bool) -> None:
    if not as_json:
        say_step("Comparing the forms of NPT", "each converted from one tiny base and trained towards it, alike")
    hush_transformers()
    from pliant.cli.compare.tables import show_versions
    from pliant.evaluation.comparison.versions import compare_versions

    with progress_display() as progress:
        found = compare_versions(size=size, rank=rank, steps=steps, progress=progress)
    if output is not None:
        from pliant.models.staging import replaced

        with replaced(output / "versions.json", prefix=".versions-") as staged:
            Path(staged).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        show_versions(found)


def _refuse_of_the_other(given: dict[str, Any]) -> None:
    """Refuses what belongs to the comparison that is not made: that of --versions has options of its own."""
    versions = given["versions"]
    for name, parameter in signature(compare).parameters.items():
        if given[name] == parameter.default or name in SHARED or (name in OF_VERSIONS) == versions:
            continue
        shown = "KEY=VALUE" if name == "overrides" else f"--{name.replace('_', '-')}"
        rule = "does not go with --versions" if versions else "goes with --versions only"
        raise typer.BadParameter(f"{rule}; leave it out.", param_hint=shown)


def words(text: str, option: str) -> list[str]:
    """The words between commas."""
    found = [word.strip() for word in text.split(",")]
    if text and not all(found):
        raise typer.BadParameter(f"must be words with commas between them; got {text!r}.", param_hint=option)
    return [word for word in found if word]


def whole_number(text: str) -> int:
    """``1000000``, ``1_000_000`` or ``1e6``."""
    try:
        value = float(text)
    except ValueError:
        value = 0.5
    if not value.is_integer():
        raise typer.BadParameter(f"must be whole numbers, such as 1000000; got {text!r}.", param_hint="--budget")
    return int(value)


def parse_rates(given: Sequence[str]) -> tuple[list[float], dict[str, list[float]]]:
    """``["3e-4,1e-3", "full=1e-5,3e-5"]`` as those of every method, and those of some."""
    rates: dict[str, list[float]] = {}
    for text in given:
        name, equals, rest = text.partition("=")
        try:
            values = [float(word) for word in words(rest if equals else text, "--learning-rates")]
        except ValueError:
            raise ConfigError(
                f"--learning-rates must be numbers with commas between them, 3e-4,1e-3; got {text!r}."
            ) from None
        key, whose = (name.strip(), f"of {name.strip()}") if equals else ("", "of all methods")
        if key in rates:
            raise ConfigError(
                f"--learning-rates {whose} must be one list; got another one, {text!r}. Put commas between the numbers."
            )
        rates[key] = values
    return rates.pop("", []), rates
