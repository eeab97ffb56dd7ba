"""``pliant.compare``: one recipe, several methods and seeds, tuned alike, measured alike; run by run on disk."""

import json
import logging
import os
import platform
import shutil
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console

from pliant.config import RunConfig
from pliant.errors import ConfigError, TrainingError
from pliant.evaluation.comparison import cost
from pliant.evaluation.comparison.figures import chosen_rates, ended, final_runs, summarise
from pliant.evaluation.comparison.measures import Yardstick, yardstick
from pliant.evaluation.comparison.methods import FROZEN, Contender, base_settings
from pliant.evaluation.comparison.plan import METRIC, SETTINGS_FILE, ComparisonPlan, plan_comparison
from pliant.evaluation.records import check_settings
from pliant.json_files import read_object
from pliant.models import DynamicCausalLM
from pliant.models.staging import replaced
from pliant.statistics import Progress
from pliant.training import checkpoints
from pliant.training.build import load_model
from pliant.training.plan import METRICS_FILE, compute_device_type
from pliant.training.run import train

RESULT_FILE = "comparison.json"
logger = logging.getLogger(__name__)

PACKAGES = ("pliant", "torch", "transformers", "peft", "accelerate")
FORMAT = 1


def compare(
    config: RunConfig | str = "compare_sft",
    overrides: Sequence[str] = (),
    *,
    measure_cost: bool = True,
    console: Console | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains the same base on the same rows by several methods, and measures what each gains and costs.

    Every method takes the same rows in the same order and, unless ``equal="time"``, the same steps. Each tries as many
    learning rates at the first seed and keeps the one of the lowest validation loss. The folder ``output`` holds
    ``comparison.json``, written after each run: the same call goes on where it was stopped, and more methods, budgets
    or seeds may be asked for.

    Args:
        config: A recipe, the path of a YAML file or a configuration, with ``objective`` ``sft`` or ``causal_lm``.
        overrides: Hydra overrides of a named configuration.
        measure_cost: Measure step time and peak memory, paired, in a process of its own.
        console: Where training draws its progress; the standard error stream by default.
        progress: Called with a label, the steps done and the steps there are.
        options: Those of :func:`pliant.evaluation.comparison.plan.plan_comparison`: ``output`` (a folder), ``methods``,
            ``budgets``, ``seeds``, ``learning_rates``, ``rates_of``, ``reference``, ``equal``, ``held_out``,
            ``held_out_tokens``, ``tasks``, ``questions``.

    Returns:
        What ``comparison.json`` holds: ``metric``, ``contenders``, ``runs`` (each with the ``seconds`` of its training
        and the ``environment`` it ended in), ``base``, ``cost``, ``steps`` where time is equal, and under ``summary``
        what :func:`pliant.evaluation.comparison.figures.summarise` returns. ``environment`` is where all began;
        ``stopped_by`` names the signal that ended it early, or is ``None``.

    Raises:
        ConfigError: A setting is wrong, or the folder holds another comparison.
        CheckpointError: A model cannot be loaded, or a result not be written.
        DataError: Texts are missing, unreadable or too short.
        TrainingError: A loss or gradient stopped being finite, or measuring the cost failed.
    """
    plan = plan_comparison(config, overrides, **options)
    if unsized := [c.id for c in plan.trained if c.parameters is None]:
        raise ConfigError(
            f"model.base_model_name={plan.recipe.model.base_model_name!r} must be at hand to size {unsized[0]}; its "
            "configuration is out of reach. Connect, or download it beforehand."
        )
    if (launched := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(f"a comparison runs in one process; {launched} were launched. Leave accelerate launch out.")
    for warning in plan.warnings:
        logger.warning(warning)
    PartialState(cpu=compute_device_type() == "cpu")
    return _Comparison(plan, console=console, progress=progress).run(measure_cost=measure_cost)


def environment() -> dict[str, Any]:
    """Returns hardware, versions and date."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if compute_device_type() == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


class _Comparison:
    """A comparison under way, and its file."""

    def __init__(self, plan: ComparisonPlan, *, console: Console | None, progress: Progress | None) -> None:
        self.plan, self.console, self.progress = plan, console, progress
        self.file = plan.output / RESULT_FILE
        self.yard: Yardstick = yardstick(
            plan.recipe,
            held_out=plan.held_out,
            held_out_size=plan.held_out_tokens,
            tasks=plan.tasks,
            questions=plan.questions,
        )
        check_settings(plan.output / SETTINGS_FILE, plan.deciding(self.yard.digest))
        self.state = self._read()

    def run(self, *, measure_cost: bool) -> dict[str, Any]:
        """Does what is missing, and returns the result."""
        self.state["contenders"] |= {c.id: _described(c) for c in self.plan.contenders}
        self._measure_base()
        if measure_cost or self.plan.equal == "time":
            self._measure_cost()
        if self.plan.equal == "time":
            self._settle_steps()
        if (signal := self._train_all()) is None:
            self._measure_finals()
        self.state["stopped_by"] = signal
        self._save()
        return self.state

    def _read(self) -> dict[str, Any]:
        if not self.file.is_file():
            start = {"format": FORMAT, "metric": METRIC, "environment": environment(), "reference": self.plan.reference}
            empty = {"contenders": {}, "runs": [], "base": None, "cost": {}, "cost_reference": None, "tokens": []}
            return {**start, **empty, "steps": {}}
        state = read_object(self.file, holds="a comparison", remedy="Choose another output.", error=ConfigError)
        if state.get("format") != FORMAT:
            raise ConfigError(f"{self.file} must be a comparison of format {FORMAT}; it is not. Choose another output.")
        return {"steps": {}, **state}

    def _save(self) -> None:
        self.state["summary"] = summarise(self.plan, self.state)
        with replaced(self.file, prefix=".comparison-") as staged:
            Path(staged).write_text(json.dumps(self.state, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _measure_base(self) -> None:
        """The frozen base: what all others begin at."""
        base = self.state["base"] or {"contender": FROZEN, "in_context": {}}
        if "nll" in base and not self.yard.unanswered(base["in_context"]):
            return
        config = base_settings(self.plan.recipe)
        model = self.yard.base(config)
        if "nll" not in base:
            base["nll"], self.state["tokens"] = self.yard.losses(model, config)
            base["forgetting"] = self.yard.forgetting(model, config)
            self.state["base"] = base
            self._save()
        self._ask(model, base)

    def _ask(self, model: DynamicCausalLM, run: dict[str, Any]) -> None:
        """Puts the questions of each in-context task that ``run`` has no answers to."""
        for task in self.yard.unanswered(run["in_context"]):
            run["in_context"][task] = self.yard.in_context(model, task, self.progress)
            self._save()

    def _measure_cost(self) -> None:
        """Step time and peak memory of every contender beside its first reference."""
        plan, found = self.plan, self.state["cost"]
        reference = next((c for c in plan.trained if c.id == self.state["cost_reference"]), None)
        if reference is None:  # those so far, if any, are beside a contender that is not asked for now
            found.clear()
            reference = plan.reference_of(plan.trained[0])
        wanted = [c for c in plan.trained if c.id not in found]
        if not wanted:
            return
        self.state["cost_reference"] = reference.id
        sides = {c.id: c for c in [*wanted, reference]}
        configs = {name: self._config(c, plan.rates[c.method.name][0], plan.seeds[0]) for name, c in sides.items()}
        self.yard.release()
        found |= cost.measure_apart(configs, reference=reference.id)
        self._save()

    def _config(self, contender: Contender, lr: float, seed: int) -> RunConfig:
        return self.plan.run_config(contender, lr=lr, seed=seed, steps=self.state["steps"].get(contender.id))

    def _settle_steps(self) -> None:
        """As many steps as fit into the time of the reference; kept, for times that are measured anew are others."""
        planned, cost_of = self.plan.recipe.training.max_steps, self.state["cost"]
        assert planned is not None  # the plan asks for it
        for contender in self.plan.trained:
            ratio = cost_of[self.plan.reference_of(contender).id]["time_ratio"] / cost_of[contender.id]["time_ratio"]
            self.state["steps"].setdefault(contender.id, max(1, round(planned * ratio)))
        self._save()

    def _train_all(self) -> str | None:
        """Every learning rate at the first seed, then the chosen one at the others; the name of a signal that came."""
        plan = self.plan
        for contender in plan.trained:
            for lr in plan.rates[contender.method.name]:
                if signal := self._train(contender, lr, plan.seeds[0]):
                    return signal
        chosen = chosen_rates(plan, self.state["runs"], self.state["tokens"])
        for contender in plan.trained:
            if contender.id not in chosen:
                raise TrainingError(
                    f"{contender.id}: a learning rate must end in a finite loss; none of "
                    f"{', '.join(f'{lr:g}' for lr in plan.rates[contender.method.name])} did. Give it lower ones "
                    f"(--learning-rates {contender.method.name}=…), or leave it out."
                )
            self.state["contenders"][contender.id] |= chosen[contender.id]
        for seed in plan.seeds[1:]:
            for contender in plan.trained:
                if signal := self._train(contender, chosen[contender.id]["learning_rate"], seed):
                    return signal
        return None

    def _train(self, contender: Contender, lr: float, seed: int) -> str | None:
        key = {"contender": contender.id, "lr": lr, "seed": seed}
        if any(key.items() <= run.items() for run in self.state["runs"]):
            return None
        config = self._config(contender, lr, seed)
        logger.info("%s, learning rate %g, seed %d; %d of %d runs", contender.id, lr, seed, *self._progress())
        self.yard.release()
        folder = Path(config.training.output_dir)
        run = {**key, "environment": environment(), "folder": str(folder.relative_to(self.plan.output))}
        try:
            result = train(config, console=self.console)
        except TrainingError as error:  # a learning rate that is too high is a result, and loses to the others
            logger.warning("%s, learning rate %g, seed %d: %s", contender.id, lr, seed, error)
            self.state["runs"].append({**run, "failed": str(error)})
            self._save()
            return None
        if result.stopped_by is not None:
            return result.stopped_by.name
        steps, best = result.steps, result.best
        del result
        model = load_model(config, str(best))
        nll, _ = self.yard.losses(model.eval(), config)
        self.state["runs"].append({**run, "steps": steps, "seconds": _seconds(folder), "nll": nll})
        self._save()
        for checkpoint in folder.glob("checkpoint-[0-9]*"):  # optimizer states; the best weights stay
            shutil.rmtree(checkpoint)
        return None

    def _progress(self) -> tuple[int, int]:
        """The number of the run that begins, and how many runs there are."""
        names = {contender.id for contender in self.plan.trained}
        return 1 + sum(run["contender"] in names for run in self.state["runs"]), self.plan.num_runs

    def _measure_finals(self) -> None:
        """What the runs at the chosen learning rates have forgotten, and what they make of a context."""
        finals = final_runs(self.plan, self.state["runs"], self.state["tokens"])
        for contender in self.plan.trained:
            for found in ended(finals[contender.id]):
                run = self.state["runs"][self.state["runs"].index(found)]
                if "forgetting" in run and not self.yard.unanswered(run["in_context"]):
                    continue
                config = self._config(contender, run["lr"], run["seed"])
                model = load_model(config, str(self.plan.output / run["folder"] / checkpoints.BEST)).eval()
                if "forgetting" not in run:
                    run |= {"forgetting": self.yard.forgetting(model, config), "in_context": {}}
                    self._save()
                self._ask(model, run)


def _seconds(folder: Path) -> float | None:
    """The seconds of training of all sessions of a run, by its own log; nothing where that has been removed."""
    log = folder / METRICS_FILE
    times: list[float] = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        with suppress(ValueError):  # a killed process may have left part of a line
            times.append(json.loads(line)["time"])
    return max(times, default=None)


def _described(contender: Contender) -> dict[str, Any]:
    return {
        "method": contender.method.name,
        "summary": contender.method.summary,
        "rank": contender.rank,
        "parameters": contender.parameters,
        "budget": contender.budget,
    }
