"""``pliant train``: settings as ``key=value``, composed by Hydra, checked, planned and run."""

import difflib
import hashlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pliant.cli.console import hush_transformers, notes, results, say_error
from pliant.errors import ConfigError, PliantError

if TYPE_CHECKING:
    from pliant.config import RunConfig
    from pliant.training.run import TrainingResult

SWEEPS = "outputs/sweeps"
SETTINGS = "Settings"
QUIET = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
"""So that Hydra itself writes no files and no log lines."""


class Shown(StrEnum):
    """What ``--cfg`` prints: the run's settings, Hydra's own, or both."""

    JOB = "job"
    HYDRA = "hydra"
    ALL = "all"


def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings to change, such as model.preset=v2, training.lr=1e-4, 'model.layers=[0,4,8]', "
            "training.max_steps=null. --cfg job prints every key with its value.",
        ),
    ] = None,
    config_name: Annotated[
        str,
        typer.Option(
            "--config-name",
            help="A recipe (readme, guide, plan, npt_equivalence, npt_finetune, lora_baseline, from_scratch_50m, "
            "from_scratch_0_5b, mod_attention, mod_scratch, dtf_transfer, dtf_scratch, stt_transfer, compare_sft, "
            "compare_domain, compare_metamath, debug_equivalence, debug_sft, debug_scratch), or a YAML file of yours: "
            "it needs only the keys that differ.",
            rich_help_panel=SETTINGS,
        ),
    ] = "base",
    config_dir: Annotated[
        Path | None,
        typer.Option(
            "--config-dir", help="Folder with your files; default: ./config, then .", rich_help_panel=SETTINGS
        ),
    ] = None,
    multirun: Annotated[
        bool,
        typer.Option(
            "--multirun",
            "-m",
            help="Run once for each value: training.lr=1e-3,1e-4. Each job has a folder of its own.",
            rich_help_panel=SETTINGS,
        ),
    ] = False,
    cfg: Annotated[
        Shown | None, typer.Option("--cfg", help="Print the settings and stop.", rich_help_panel=SETTINGS)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print sizes, memory and data, train nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")
    ] = False,
) -> None:
    """Train a model: towards its base, on text, or on conversations.

    Needs nothing but the embedded base and texts for a first run. Leaves a folder with checkpoints,
    config.yaml and metrics.jsonl; checkpoints are ordinary Hugging Face directories. Settings are
    key=value in Hydra's syntax; a wrong one is named before anything is loaded.

    \b
    pliant train --config-name debug_equivalence
    pliant train --config-name readme training.lr=5e-5 training.max_steps=200 --dry-run
    pliant train model_type=npt model.preset=keyed model.adapter_rank=128 model.layers=8-15
    pliant train model_type=dtf model.capacity_gamma=0.5 training.objective=causal_lm training.trainable=all
    pliant train --config-name my_training --config-dir config
    pliant train -m training.lr=1e-3,1e-4 model.adapter_rank=64,128
    accelerate launch -m pliant.cli.train --config-name npt_finetune
    """
    if multirun and cfg is not None:
        raise ConfigError("--cfg prints one configuration, --multirun runs several; got both. Drop one.")
    chosen = [*(overrides or ()), *(["training.resume=true"] if resume else [])]
    _refuse_flags(chosen)
    hush_transformers()
    from pliant.config.composition import compose, jobs, primary

    # Composed before Hydra's own main sees it, so that a wrong setting is said in our words.
    configs = [compose(config_name, job, config_dir) for job in (jobs(chosen) if multirun else [chosen])]
    folder = _sweep_folder(config_name, chosen)
    if multirun:
        _settle_folders(configs, folder, chosen)
    if dry_run and cfg is None:
        for config in configs:
            _show_plan(config)
        return
    with primary(config_name, config_dir) as found:
        settings = [*found.overrides, *QUIET]
        if multirun:
            settings += [f"hydra.sweep.dir='{folder}'", "hydra.sweep.subdir=${hydra.job.num}"]
        mode = ["--multirun"] if multirun else ["--cfg", cfg.value] if cfg is not None else []
        _hydra_main([*mode, "--config-name", found.config_name, *settings, *chosen])


def _refuse_flags(overrides: list[str]) -> None:
    """Says what is meant by ``--learning_rate 1e-4``, which Hydra and typer would only call unknown."""
    for text in overrides:
        if not text.startswith("-"):
            continue
        options = ("--config-name", "--config-dir", "--multirun", "--cfg", "--dry-run", "--resume", "--help")
        flag = text.partition("=")[0]
        if close := difflib.get_close_matches(flag, options, n=1, cutoff=0.8):
            raise ConfigError(f"pliant train has no option {flag}. Did you mean {close[0]}?")
        from pliant.config.composition import nearest_key

        key = nearest_key(flag.lstrip("-").replace("-", "_"))
        hint = f" Did you mean {key}=…?" if key else ""
        raise ConfigError(
            f"pliant train has no option {flag}; settings are written key=value.{hint} docs/coming-from.md lists what "
            "flags of other commands are called here."
        )


def _sweep_folder(name: str, overrides: list[str]) -> str:
    """The same for the same sweep, on every process, so that ``--resume`` finds it again."""
    said = "\n".join([name, *sorted(set(overrides) - {"training.resume=true"})])
    return f"{SWEEPS}/{Path(name).stem}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"


def _settle_folders(configs: "list[RunConfig]", sweep: str, overrides: list[str]) -> None:
    """Gives each job a folder of its own under ``sweep``, or refuses those given if two are the same."""
    if not _names_folder(overrides):
        for number, config in enumerate(configs):
            config.training.output_dir = f"{sweep}/{number}"
    folders = [config.training.output_dir for config in configs]
    if len(set(folders)) < len(folders):
        raise ConfigError(
            f"training.output_dir must be another folder for each of the {len(folders)} jobs; got {folders[0]!r}. "
            "Leave it out, or write it with the values: 'training.output_dir=outputs/lr-${training.lr}'."
        )


def _names_folder(overrides: Sequence[str]) -> bool:
    return any(override.lstrip("+").startswith("training.output_dir=") for override in overrides)


def _hydra_main(arguments: list[str]) -> None:
    """Trains as each job's configuration says, as ``@hydra.main`` composes it; a sweep goes on after a failed job."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    from pliant.config.composition import HYDRA_VERSION, to_run_config

    failures: list[PliantError | OSError] = []
    signals: list[int] = []

    @hydra.main(config_path="pkg://pliant.conf", version_base=HYDRA_VERSION)
    def job(composed: Any) -> None:
        if signals:  # the jobs after one that was stopped
            return
        own = HydraConfig.get()
        is_sweep = own.mode == RunMode.MULTIRUN
        if is_sweep and not _names_folder(own.overrides.task):
            composed.training.output_dir = str(Path(own.sweep.dir) / own.sweep.subdir)
        try:
            if (stopped_by := _run(to_run_config(composed))) is not None:
                signals.append(stopped_by)
        except (PliantError, OSError) as error:  # Hydra would add a line of its own
            failures.append(error)
            if is_sweep:
                say_error(f"{', '.join(own.overrides.task)}: {error}")

    with _argv(arguments):
        try:
            job()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"the configuration cannot be composed: {' '.join(str(error).split())}") from error
        finally:
            HydraConfig.instance().cfg = None
    if failures and "--multirun" in arguments:
        raise typer.Exit(1)
    if failures:
        raise failures[0]
    if signals:
        raise typer.Exit(128 + signals[0])


@contextmanager
def _argv(arguments: list[str]) -> Iterator[None]:
    """Within the block Hydra reads ``arguments``, and lets exceptions through instead of printing and exiting."""
    before, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [before[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = before
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


def _show_plan(config: "RunConfig") -> None:
    from pliant.cli.training_plan import show_plan
    from pliant.training.plan import make_plan

    show_plan(make_plan(config))


def _run(config: "RunConfig") -> int | None:
    """Trains, says what came of it, and returns the signal that stopped it, if one did."""
    from pliant.training.run import train as run_training

    result = run_training(config, console=notes)
    if int(os.environ.get("RANK", "0")) == 0:  # one process speaks for all
        _show_result(result)
    return result.stopped_by


SHOWN_METRICS = {
    "validation perplexity": "eval_perplexity",
    "over that of the base": "eval_ratio",
    "KL from the base, nats": "eval_kl",
}
"""What the table at the end shows of an evaluation."""


def _show_result(result: "TrainingResult") -> None:
    """Prints what a run came to, and the next command to type."""
    saved = result.best or result.checkpoint
    table = Table(show_header=False, title="trained")
    table.add_row("steps", f"{result.steps:,}")
    for name, key in SHOWN_METRICS.items():
        if key in result.after:
            before, after = (_number(metrics.get(key)) for metrics in (result.before, result.after))
            table.add_row(name, f"{before} before, {after} after")
    table.add_row("saved", str(saved or "nothing"))
    results.print(table)
    if result.stopped_by is not None:
        next_ = "the same command with --resume goes on where it stopped"
    elif saved is not None:
        next_ = f"pliant chat {shlex.quote(str(saved))}"
    else:
        return
    results.print(f"Next:  {next_}", markup=False, soft_wrap=True)


def _number(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.3f}" if value < 1000 else f"{value:,.0f}"
