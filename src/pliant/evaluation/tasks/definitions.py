"""Tasks of lm-eval with their data: its own from the hub, or its settings over local files. Imports lm-eval."""

import hashlib
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.group import Group
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from pliant.architectures.base import nearest
from pliant.errors import ConfigError, DataError
from pliant.evaluation.tasks.files import TaskFiles
from pliant.evaluation.tasks.table import TASK_NAMES, TASKS, BenchmarkTask, data_root, is_offline

CONFIGS = Path(lm_eval.__file__).parent / "tasks"
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
FIRST = "first_n"
"""lm-eval's sampler of a fixed list of examples."""


@dataclass(frozen=True, kw_only=True)
class PreparedTask:
    """A task whose data is read and whose settings are checked; to be run on a model.

    Attributes:
        name: As it was asked for.
        tasks: Those of lm-eval, by their own names.
        groups: What they are grouped by, for lm-eval's own aggregates.
        samples: For each of the tasks, which documents are taken; None for the first ``limit`` of each.
        limit: How many documents are taken; None for all.
        num_fewshot: Worked examples before each document, by task.
        seed: Of the draws of documents and examples.
        source: Where the data came from.
        digest: Of the data, where it was read from files.
    """

    name: str
    tasks: Mapping[str, Task]
    groups: Mapping[str, Group]
    samples: Mapping[str, list[int]] | None
    limit: int | None
    num_fewshot: Mapping[str, int]
    seed: int
    source: str
    digest: str | None

    @property
    def settings(self) -> dict[str, Any]:
        """What results must have in common to be of one run."""
        return {
            "lm_eval": lm_eval.__version__,
            "tasks": {name: task.VERSION for name, task in self.tasks.items()},
            "data": self.digest or self.source,
            "limit": self.limit,
            "num_fewshot": dict(self.num_fewshot),
            "seed": self.seed,
        }

    @property
    def averaged(self) -> set[str]:
        """The metrics that are plain means over documents in every task."""
        kinds = [_aggregations(task) for task in self.tasks.values()]
        return set.intersection(*({name for name, combine in kind.items() if combine is mean} for kind in kinds))

    @property
    def has_means_only(self) -> bool:
        """Whether every metric is such a mean."""
        return all(combine is mean for task in self.tasks.values() for combine in _aggregations(task).values())


def _aggregations(task: Task) -> dict[str, Any]:
    """Metric → what makes one figure of its values."""
    found: Any = task.aggregation()  # declared to return nothing
    return found


@dataclass(kw_only=True)
class _Built:
    """Tasks as they were read, before documents are chosen."""

    tasks: dict[str, Task] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    source: str = "the hub"
    digest: str | None = None


def prepare(
    name: str,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    seed: int,
    data_dir: str | os.PathLike | None = None,
) -> PreparedTask:
    """Reads a task's data and settles what is taken of it.

    Of one task of lm-eval the first ``limit`` documents are taken, as lm-eval does; of a group of tasks, ``limit``
    documents of all of them together, drawn by ``seed``.

    Raises:
        ConfigError: The name is unknown, or ``num_fewshot`` more than there are examples.
        DataError: Data is missing or damaged, or the hub cannot be reached.
    """
    task = TASKS.get(name)
    built = _from_hub(name, task) if not is_offline(data_dir) else _from_files(TASKS[name], data_dir)
    shots = {}
    for own_name, own in built.tasks.items():
        _check_kind(own_name, own)
        shots[own_name] = _examples(own_name, own, num_fewshot, task.num_fewshot if task else None)
    samples = None
    if limit is not None and len(built.tasks) > 1:
        samples = _drawn(built.tasks, limit, seed)
        built.tasks = {own: found for own, found in built.tasks.items() if own in samples}
        _prune(built.groups, built.tasks)
    return PreparedTask(
        name=name,
        tasks=built.tasks,
        groups=built.groups,
        samples=samples,
        limit=limit,
        num_fewshot={own: shots[own] for own in built.tasks},
        seed=seed,
        source=built.source,
        digest=built.digest,
    )


def _from_hub(name: str, task: BenchmarkTask | None) -> _Built:
    """lm-eval's own task; those of the table are read without its index of all tasks, which takes seconds."""
    try:
        if task is not None and not task.is_group:
            return _Built(tasks=_leaf(_config(task.config)))
        if task is not None:
            return _grouped(task, lambda config, _subject: config)
        manager = TaskManager()
        if name not in manager.all_tasks:
            known = (*TASK_NAMES, *manager.all_tasks)
            raise ConfigError(
                f"tasks must be among {', '.join(TASK_NAMES)}, or others of lm-eval's; got {name!r}."
                f"{nearest(name, known)} 'pliant evaluate --list-tasks' lists these, 'lm-eval ls tasks' all."
            )
        loaded = manager.load([name])
        return _Built(tasks=dict(loaded["tasks"]), groups=dict(loaded.get("groups", {})))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the data of task {name!r} must be readable from the hub; reading it failed: {error}. For local files "
            "set HF_HUB_OFFLINE=1 or give data_dir."
        ) from error


def _from_files(task: BenchmarkTask, data_dir: str | os.PathLike | None) -> _Built:
    root, place = data_root(data_dir)
    if not task.is_group:
        files = TaskFiles(task, root, place)
        config = _local(_config(task.local_config or task.config), files)
        return _Built(tasks=_leaf(config), source=str(files), digest=files.digest)
    digests: list[str] = []

    def with_files(config: dict[str, Any], subject: str) -> dict[str, Any]:
        files = TaskFiles(task, root, place, subject)
        digests.append(files.digest)
        return _local(config, files)

    built = _grouped(task, with_files)
    built.source = f"{len(built.tasks)} folders of {task.local} of {place}"
    built.digest = hashlib.sha256("".join(digests).encode()).hexdigest()[:12]
    return built


def _config(file: str) -> dict[str, Any]:
    """Returns one of lm-eval's bundled configurations, its functions resolved."""
    path = CONFIGS / file
    if not path.is_file():
        raise ConfigError(
            f"lm-eval {lm_eval.__version__} must hold the configuration {file}; it does not. Install lm-eval 0.4.13."
        )
    config = load_yaml(path)
    config.pop("tag", None)
    return config


def _local(config: dict[str, Any], files: TaskFiles) -> dict[str, Any]:
    """Puts local files in the place of a data set of the hub; splits that they lack are left out."""
    found = {key: value for key, value in config.items() if key not in SPLITS or value in files.splits}
    if not {"validation_split", "test_split"} & found.keys():
        wanted = [config[key] for key in ("test_split", "validation_split") if config.get(key)]
        raise DataError(
            f"{files.path} must hold a split named {' or '.join(wanted)}; it holds {', '.join(files.splits)}. "
            "Name its folder so."
        )
    if not set(SPLITS) - {"test_split"} & found.keys() and "samples" not in (config.get("fewshot_config") or {}):
        found["fewshot_split"] = found["test_split"]  # only where it is named is a document no example of itself
    return {**found, "custom_dataset": files, "dataset_path": str(files)}


class _FileTask(ConfigurableTask):
    """A task over local files; documents are made of them once, where lm-eval would look for those of the hub."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_kwargs: Any) -> None:
        self.dataset = self.config.custom_dataset()
        self._made: dict[str, Any] = {}

    def training_docs(self) -> Any:
        return self._once("training", super().training_docs)

    def validation_docs(self) -> Any:
        return self._once("validation", super().validation_docs)

    def test_docs(self) -> Any:
        return self._once("test", super().test_docs)

    def _once(self, split: str, make: Callable[[], Any]) -> Any:
        if split not in self._made:
            self._made[split] = make()
        return self._made[split]


def _leaf(config: dict[str, Any]) -> dict[str, Task]:
    task = (_FileTask if "custom_dataset" in config else ConfigurableTask)(config=config)
    return {task.task_name: task}


def _grouped(task: BenchmarkTask, change: Callable[[dict[str, Any], str], dict[str, Any]]) -> _Built:
    """Builds a group from the configurations beside its own: groups of tags, whose tasks name a subject of the data."""
    folder = Path(task.config).parent
    top = _config(task.config)
    root = Group.from_config(GroupConfig(**top))
    built = _Built(groups={root.name: root})
    files = sorted((CONFIGS / folder).glob(f"{top['group']}_*.yaml"))
    leaves = [load_yaml(file) for file in files]
    for own in (_config(str(folder / f"_{name}.yaml")) for name in top["task"]):
        group = Group.from_config(GroupConfig(**own))
        for leaf in (dict(config) for config in leaves if config["tag"] in own["task"]):
            leaf.pop("tag")
            for name, found in _leaf(change(leaf, leaf["dataset_name"])).items():
                built.tasks[name] = found
                group.add(found)
        built.groups[group.name] = group
        root.add(group)
    return built


def _check_kind(name: str, task: Task) -> None:
    wrong = [key for key in ("unsafe_code", "doc_to_image", "doc_to_audio") if task.get_config(key)]
    if wrong:
        raise ConfigError(
            f"tasks must ask for text only and run no generated code; {name!r} has {wrong[0]}. Run it with lm-eval: "
            "pliant export --remote-code."
        )


def _examples(name: str, task: Task, asked: int | None, usual: int | None) -> int:
    """Returns the number of worked examples of a task, as lm-eval settles it: one that is fixed at 0 stays there."""
    own = task.get_config("num_fewshot")
    shots = own if asked is None or own == 0 else asked
    shots = (usual or 0) if shots is None else shots
    if shots and isinstance(task, ConfigurableTask):
        config, there = task.fewshot_cfg, len(list(task.fewshot_docs() or ()))
        spare = 1 if config.split == task.config.test_split and config.sampler != FIRST else 0  # the document itself
        if shots + spare > there:
            raise ConfigError(
                f"num_fewshot must be at most {max(there - spare, 0)} for task {name!r}, which has no more examples; "
                f"got {shots}. Lower it."
            )
    return shots


def _drawn(tasks: Mapping[str, Task], limit: int, seed: int) -> dict[str, list[int]]:
    """Draws ``limit`` documents of all tasks together; tasks without any are left out."""
    every = [(name, index) for name, task in tasks.items() for index in range(len(list(task.eval_docs)))]
    chosen: dict[str, list[int]] = {}
    for name, index in sorted(random.Random(seed).sample(every, min(limit, len(every)))):
        chosen.setdefault(name, []).append(index)
    return chosen


def _prune(groups: dict[str, Group], tasks: Mapping[str, Task]) -> None:
    """Takes tasks that are left out, and groups of none but these, out of their groups."""
    for name in list(groups):
        if not any(task.task_name in tasks for task in groups[name].get_all_tasks()):
            del groups[name]
    for group in groups.values():
        for name in list(group.child_names):
            if name not in tasks and name not in groups:
                group.pop(name)
