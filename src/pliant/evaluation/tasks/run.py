"""Benchmark tasks run on a model and on its base, in a folder that a stopped run goes on in."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.errors import ConfigError, DataError
from pliant.evaluation.editing.run import json_hash, prepare_folder, weight_format
from pliant.evaluation.records import Records, check_settings
from pliant.evaluation.tasks.behaviour import generation_samples, layer_figures
from pliant.evaluation.tasks.perplexity import EMBEDDED_TEXT, measure_windows, perplexity_figures, text_tokens
from pliant.evaluation.tasks.results import (
    BASE,
    MODEL,
    assemble,
    read_json,
    samples_file,
    settings_file,
    task_file,
    write_json,
)
from pliant.evaluation.tasks.settings import Benchmarks
from pliant.evaluation.tasks.table import PERPLEXITY
from pliant.models import DynamicCausalLM
from pliant.models.checkpoint import digest, fingerprint
from pliant.statistics import Progress

if TYPE_CHECKING:
    from pliant.evaluation.tasks.definitions import PreparedTask

SHOWN_WINDOWS = 1
"""Windows of held-out text on which layers are looked at."""
SHOWN = "shown"
"""Where it stands which text that was; what is known of another is measured anew."""

_LOGGER = logging.getLogger(__name__)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Benchmarks,
    *,
    output: str | os.PathLike,
    prepared: "Sequence[PreparedTask] | None" = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a model, and its base beside it, on benchmark tasks; what is complete in ``output`` is not run again.

    Args:
        model: A pliant model, dense or converted; edits that it carries count as part of it, not of its base.
        tokenizer: Its tokenizer.
        benchmarks: What to measure.
        output: Folder for the results on this model: ``results.json``, a line a document under ``samples``, and the
            answers to every request under ``requests``.
        prepared: What ``benchmarks.prepare(output)`` returned, to read no data twice.
        progress: Called with a label, the steps done and the steps there are.

    Returns:
        What ``results.json`` holds: lm-eval's own keys, for the model; and under ``pliant`` the base, the difference
        of both with paired bootstrap intervals over documents, predictions of held-out text, layers and samples.

    Raises:
        ConfigError: A setting is wrong, or the folder holds results of another model or of other settings.
        DataError: Data is missing or damaged.
    """
    if not isinstance(model, DynamicCausalLM):
        raise ConfigError(f"model must be one that pliant.load returns; got {type(model).__name__}. Load it so.")
    ready = benchmarks.prepare(output) if prepared is None else prepared
    run = _Run(model, tokenizer, benchmarks, Path(output), progress)
    prepare_folder(model, run.folder)
    for task in ready:
        check_settings(settings_file(run.folder, task.name), task.settings)
    start = time.time()
    held_out = run.held_out()  # first, as it is short: a text that does not do is known before the tasks are run
    for task in ready:
        run.measure(task)
    behaviour = run.behaviour()
    found = assemble(run.folder)
    config = {
        "model": model.config._name_or_path,
        "model_num_parameters": model.num_parameters(),
        "model_dtype": str(model.dtype),
        "device": str(model.device),
        **{name: value for name, value in asdict(benchmarks).items() if name in ("batch_size", "limit")},
        "fewshot_seed": benchmarks.seed,
        "torch_seed": benchmarks.seed,
    }
    own = {**found.pop("pliant"), "held_out": held_out, **behaviour}
    result = {
        **found,
        "config": config,
        "date": start,
        "transformers_version": transformers.__version__,
        "total_evaluation_time_seconds": str(time.time() - start),
        "pliant": own,
    }
    write_json(run.folder / "results.json", result)
    return result


class _Run:
    """One model, its base, and the folder that their results go to."""

    def __init__(
        self,
        model: DynamicCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        benchmarks: Benchmarks,
        folder: Path,
        progress: Progress | None,
    ) -> None:
        self.model, self.tokenizer, self.benchmarks = model, tokenizer, benchmarks
        self.folder, self.progress = folder, progress
        # A dense model without edits is its own base.
        self.with_base = benchmarks.base and bool(model.dynamic_layers or len(model.edits))
        self._harness: Any = None
        self._tokens: Any = None

    def measure(self, task: "PreparedTask") -> None:
        """Runs a task on the model and on its base, each unless its results are there."""
        kind = weight_format(self.model).removeprefix("torch.").replace(" ", "-")
        base = f"base-{digest(fingerprint(self.model))}-{kind}.db"
        place = self.folder / "requests" if self.benchmarks.base_cache is None else Path(self.benchmarks.base_cache)
        self._measure_side(task, MODEL, self.folder / "requests" / "model.db")
        if self.with_base:
            with self.model.base_mode():
                self._measure_side(task, BASE, place / base)

    def _measure_side(self, task: "PreparedTask", side: str, cache: Path) -> None:
        file = task_file(self.folder, task.name, side)
        if file.is_file():
            return
        from pliant.evaluation.tasks.harness import Harness, to_json, write_samples

        if self._harness is None:
            self._harness = Harness(self.model, self.tokenizer, self.benchmarks.batch_size)
        start = time.perf_counter()
        label = task.name if side == MODEL else f"{task.name}, base"
        found = self._harness.run(task, cache=cache, label=label, progress=self.progress)
        write_samples(samples_file(self.folder, task.name, side), found["samples"], whole=side == MODEL)
        own = {
            "task": list(task.tasks),
            "data": task.source,
            "metrics": sorted(task.averaged),
            "seconds": time.perf_counter() - start,
        }
        write_json(file, {**to_json(found), **self._harness.info, "pliant": own})

    def held_out(self) -> dict[str, Any] | None:
        """Returns perplexity and distance to the base on held-out text; None where neither is asked for."""
        if PERPLEXITY not in self.benchmarks.names and not self.with_base:
            return None
        tokens, text = self._held_out_tokens(), self.benchmarks.data
        if tokens is None:
            return None
        window, stride = self.benchmarks.window, self.benchmarks.stride
        name = "held_out" if self.with_base else PERPLEXITY
        settings = {"tokens": json_hash(tokens.tolist()), "window": window, "stride": stride or window}
        check_settings(settings_file(self.folder, name), settings)
        records = measure_windows(
            self.model,
            tokens,
            Records(samples_file(self.folder, name, MODEL)),
            window=window,
            stride=stride,
            with_base=self.with_base,
            progress=self.progress,
        )
        how = {"text": EMBEDDED_TEXT if text is None else str(text), "window": window, "stride": stride or window}
        return {**how, **perplexity_figures(records)}

    def behaviour(self) -> dict[str, Any]:
        """Returns what the model writes, and what its layers do; kept in a file of its own."""
        file = self.folder / "behaviour.json"
        found = read_json(file) if file.is_file() else {}
        tokens = self._held_out_tokens() if self.model.dynamic_layers else None
        if tokens is not None:
            shown = tokens[: SHOWN_WINDOWS * self.benchmarks.window]
            if found.get(SHOWN) != (text := json_hash(shown.tolist())):
                found |= {**layer_figures(self.model, shown), SHOWN: text}
        sides = 2 if self.with_base else 1
        if self.benchmarks.samples and len((found.get("samples") or [{}])[0]) < 1 + sides:
            if self.progress is not None:
                self.progress("Writing samples", 0, 1)
            found["samples"] = generation_samples(self.model, self.tokenizer, with_base=self.with_base)
            if self.progress is not None:
                self.progress("Writing samples", 1, 1)
        write_json(file, found)
        return {name: value for name, value in found.items() if name != SHOWN}

    def _held_out_tokens(self) -> Any:
        """The text's tokens; None where no text is given and none is embedded, unless its perplexity is asked for."""
        if self._tokens is None:
            own = self.benchmarks
            try:
                self._tokens = text_tokens(self.tokenizer, own.data, num_tokens=own.num_tokens, window=own.window)
            except DataError as error:
                if own.data is not None or PERPLEXITY in own.names:
                    raise
                _LOGGER.warning("without held-out text, model and base are compared on tasks only: %s", error)
        return self._tokens
