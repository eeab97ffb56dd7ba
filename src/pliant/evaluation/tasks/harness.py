"""lm-eval run on a model that is loaded, task by task, with the answers to its requests kept. Imports lm-eval."""

import copy
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api import model as harness_model
from lm_eval.api import task as harness_task
from lm_eval.api.model import CacheHook, CachingLM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.loggers.utils import add_tokenizer_info
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import handle_non_serializable, sanitize_list
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pliant.errors import ConfigError, DataError
from pliant.evaluation.tasks.definitions import PreparedTask
from pliant.models import DynamicCausalLM
from pliant.models.staging import replaced
from pliant.statistics import Progress, evaluating

REPEATED = ("doc", "arguments")
"""What is the same in the samples of model and base, and is written once."""


class Harness:
    """A model as lm-eval asks it.

    Args:
        model: A pliant model.
        tokenizer: Its tokenizer; it stays as it is.
        batch_size: Requests at a time.
    """

    def __init__(self, model: DynamicCausalLM, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        with evaluating(model):
            # lm-eval gives a tokenizer without a padding token one, and keeps what it is given.
            make: Any = HFLM  # whose decorator hides its signature
            self.lm: Any = make(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size
            )

    @property
    def info(self) -> dict[str, Any]:
        """What lm-eval's results tell of model and tokenizer."""
        found: dict[str, Any] = {"lm_eval_version": lm_eval.__version__}
        add_tokenizer_info(found, self.lm)
        return found

    def run(self, prepared: PreparedTask, *, cache: Path, label: str, progress: Progress | None) -> dict[str, Any]:
        """Returns lm-eval's results of a task, samples included.

        Args:
            prepared: The task.
            cache: File of the answers to requests; those in it are not asked for again.
            label: What the progress is called.
            progress: Called with the label, the requests answered and the requests there are.

        Raises:
            ConfigError: The model has too few positions for what the task lets it write.
            DataError: The file of answers is damaged, or an answer is not finite.
        """
        for name, task in prepared.tasks.items():
            self._check_room(name, task)
            task.set_config(key="num_fewshot", value=prepared.num_fewshot[name])
            task.set_fewshot_seed(seed=prepared.seed)
        place = torch.device(self.lm.device)
        forked = torch.random.fork_rng(devices=[place] if place.type == "cuda" else [])
        with evaluating(self.model), forked, _answers(self.lm, cache) as (lm, hook), _without_bars():
            torch.manual_seed(prepared.seed)
            hook.report = None if progress is None else partial(_told, progress, label, prepared)
            found = evaluate(
                lm,
                {"tasks": dict(prepared.tasks), "groups": dict(prepared.groups)},
                limit=None if prepared.samples is not None else prepared.limit,
                samples=None if prepared.samples is None else dict(prepared.samples),
                # lm-eval resamples what is no mean in processes of its own; the error of a mean takes no resamples.
                bootstrap_iters=int(prepared.has_means_only),
            )
        if progress is not None and hook.done < (count := _requests(prepared)):  # the rest was known
            progress(label, count, count)
        assert found is not None  # None is for the other processes of several
        answered: dict[str, Any] = dict(found)
        _check_finite(answered["samples"])
        return answered

    def _check_room(self, name: str, task: Task) -> None:
        kwargs = (task.get_config("generation_kwargs") or {}) if task.OUTPUT_TYPE == "generate_until" else {}
        wanted = kwargs.get("max_gen_toks", self.lm.max_gen_toks) if kwargs else 0
        if wanted >= self.lm.max_length:
            raise ConfigError(
                f"the model must have more than {wanted} positions for task {name!r}, which lets it write so many "
                f"tokens; it has {self.lm.max_length}. Leave the task out."
            )


def _check_finite(samples: Mapping[str, list[dict[str, Any]]]) -> None:
    for name, own in samples.items():
        for sample in own:
            for answer in sample["filtered_resps"]:
                if isinstance(answer, tuple | list) and isinstance(answer[0], float) and math.isnan(answer[0]):
                    raise DataError(
                        f"the log-likelihoods of task {name!r} must be numbers; document {sample['doc_id']} has nan. "
                        "Load the model in bfloat16, into another output folder."
                    )


class _Hook(CacheHook):
    """Keeps every answer as it comes, and tells how many there are."""

    def __init__(self, caching: CachingLM) -> None:
        super().__init__(caching)
        self.report: Any = None
        self.done = 0

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        super().add_partial(attr, req, res)
        self.done += 1
        if self.report is not None:
            self.report(self.done)


def _requests(prepared: PreparedTask) -> int:
    return sum(len(task.instances or ()) for task in prepared.tasks.values())


def _told(progress: Progress, label: str, prepared: PreparedTask, done: int) -> None:
    progress(label, done, _requests(prepared))


@contextmanager
def _answers(lm: HFLM, file: Path) -> Iterator[tuple[Any, _Hook]]:
    """Gives the model with a memory of its answers."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(file)) as database:
            database.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.DatabaseError as error:
        raise DataError(f"{file} must hold answers to requests; it is damaged: {error}. Delete it.") from error
    caching = CachingLM(lm, str(file))
    hook = _Hook(caching)
    lm.set_cache_hook(hook)
    try:
        yield caching, hook
    except sqlite3.Error as error:
        raise DataError(
            f"{file} must take the answers to requests; writing failed: {error}. Check that the disk has room and that "
            "nothing else removes or writes the folder, and run it again."
        ) from error
    finally:
        lm.set_cache_hook(CacheHook(None))
        caching.dbdict.close()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Switches off the bars that lm-eval draws whatever it is told; progress is reported in their place."""
    modules: tuple[Any, ...] = (harness_task, harness_model, huggingface)
    before = [module.tqdm for module in modules]
    try:
        for module in modules:
            module.tqdm = _NoBar
        yield
    finally:
        for module, bar in zip(modules, before, strict=True):
            module.tqdm = bar


class _NoBar(tqdm):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})


def write_samples(path: Path, samples: Mapping[str, list[dict[str, Any]]], *, whole: bool) -> None:
    """Writes what a model made of every document, in lm-eval's form, a line each, with the task's name.

    Args:
        path: File to write.
        samples: Task → its samples.
        whole: Documents and prompts too.
    """
    with replaced(path, prefix=".samples-") as staged, open(staged, "w", encoding="utf-8") as file:
        for task, own in samples.items():
            for sample in own:
                line = {
                    "task": task,
                    **{key: value for key, value in sample.items() if whole or key not in REPEATED},
                    "resps": sanitize_list(sample["resps"]),
                    "filtered_resps": sanitize_list(sample["filtered_resps"]),
                    "target": str(sample["target"]),
                }
                if whole:
                    line["arguments"] = {
                        f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(arguments)}
                        for i, arguments in enumerate(sample["arguments"])
                    }
                file.write(json.dumps(line, default=handle_non_serializable, ensure_ascii=False) + "\n")


def to_json(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns lm-eval's results without samples, as JSON values."""
    plain = {key: value for key, value in found.items() if key != "samples"}
    return json.loads(json.dumps(plain, default=handle_non_serializable))
