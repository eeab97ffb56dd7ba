"""A run of one editor: what it measures with, and where it writes, record by record.

A folder holds the results on one model. ``before.jsonl`` is the unedited model, measured once for all editors; every
run adds ``NAME.jsonl``, or ``NAME-COUNT.jsonl`` for the first COUNT cases together.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pliant.architectures import added_parameters
from pliant.architectures.base import added_buffers
from pliant.errors import ConfigError, DataError, EditError
from pliant.evaluation.baselines.values import REUSED
from pliant.evaluation.editing.cases import EditCase, unique_ids
from pliant.evaluation.editing.scores import neighbour_continuations, score_cases
from pliant.evaluation.records import Record, Records, check_settings
from pliant.evaluation.retention import HeldOut, held_out_tokens
from pliant.models import DynamicCausalLM
from pliant.models.checkpoint import digest, fingerprint
from pliant.models.edits import Edit
from pliant.models.ledger import is_plain, is_projection
from pliant.statistics import Progress

CASES_AT_ONCE = 16


class EditRun:
    """A run of one editor on one model: what it measures with, and where it writes.

    Args:
        model: A pliant model; edits that it carries already count as part of it.
        tokenizer: Its tokenizer.
        cases: What to learn.
        output: The folder for results on this model, shared by the runs of all editors.
        name: Name of the run.
        settings: Those of the editor, as JSON values; a run is only resumed with the same ones.
        held_out: Token windows to measure drift on; 512 tokens of the embedded texts by default.
        entropy: Measure the generation entropy too, which is slow.
        progress: Called with a label, the cases done and the cases there are.

    Raises:
        ConfigError: The folder holds results of another model, or the run's of other settings.
        DataError: There are no cases, ids repeat, or the embedded texts are not installed.
    """

    def __init__(
        self,
        model: DynamicCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        cases: Iterable[EditCase],
        *,
        output: str | os.PathLike,
        name: str,
        settings: Mapping[str, Any] | None = None,
        held_out: Int[Tensor, "windows window"] | None = None,
        entropy: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.tokenizer, self.cases = model, tokenizer, unique_ids(cases)
        self.folder, self.name, self.entropy, self.progress = Path(output), name, entropy, progress
        if name in ("", "before") or Path(name).name != name:
            raise ConfigError(f"name must be a file name other than 'before'; got {name!r}. Name the editor.")
        tokens = held_out_tokens(tokenizer) if held_out is None else held_out
        prepare_folder(model, self.folder)
        own = {"settings": settings or {}, "held_out": json_hash(tokens.tolist()), "entropy": entropy}
        check_settings(self.folder / f"{name}.settings.json", own)
        self.before = self._before()
        self.held_out = HeldOut(model, tokens)

    def records(self, suffix: str = "") -> Records:
        """Opens the results of this run."""
        return Records(self.folder / f"{self.name}{suffix}.jsonl")

    def missing(self, records: Records, cases: Sequence[EditCase]) -> list[EditCase]:
        """Returns the cases that are not among ``records``.

        Raises:
            DataError: A record of the same id is of another case.
        """
        for case in cases:
            if case.id in records and records[case.id]["case"] != case_hash([case]):
                raise DataError(
                    f"{records.path}: case {case.id} must be the one that was measured; its text differs now. "
                    "Choose another output folder."
                )
        return [case for case in cases if case.id not in records]

    def score(self, cases: Sequence[EditCase], *, in_context: bool = False) -> list[Record]:
        """Measures the model as it is now on ``cases``."""
        asked = [case.in_context() for case in cases] if in_context else cases
        before = [self.before[case.id]["continuations"] for case in cases]
        scores = score_cases(self.model, self.tokenizer, asked, before, entropy=self.entropy)
        return [{"id": case.id, "case": case_hash([case]), **found} for case, found in zip(cases, scores, strict=True)]

    def edit(self, make: Callable[[], Edit | None]) -> tuple[Edit | None, Record]:
        """Makes an edit, puts it into the ledger, and returns it with what it took; a refused one is no error.

        What another editor's search took, whose result was used, counts too.
        """
        refusal = None
        start = _now(self.model)
        try:
            edit = make()
            if edit is not None and edit.id not in self.model.edits:
                edit = self.model.edits.add(edit)
        except EditError as error:
            edit, refusal = None, str(error)
        saved = 0.0 if edit is None else edit.details.get(REUSED, 0.0)
        facts: Record = {"seconds": _now(self.model) - start + saved, "edited": float(edit is not None)}
        if refusal is not None:
            facts["refusal"] = refusal
        if edit is not None:
            facts["edit"] = {
                **{name: getattr(edit, name) for name in ("id", "norm", "rank", "kl")},
                "layers": list(edit.layers),
                "details": dict(edit.details),
            }
        return edit, facts

    def score_together(self, count: int, facts: Record) -> list[Record]:
        """Measures the first ``count`` cases, a few at once; ``facts`` go into every record."""
        cases, records = self.cases[:count], self.records(f"-{count}")
        missing = self.missing(records, cases)
        drift = self.held_out.compare(self.model) if missing else {}
        for start in range(0, len(missing), CASES_AT_ONCE):
            for record in self.score(missing[start : start + CASES_AT_ONCE]):
                records.append({**record, **facts, **drift})
            self.report(f"Measuring {count} edits", len(records), count)
        return [records[case.id] for case in cases]

    def report(self, label: str, done: int, total: int) -> None:
        """Passes progress on."""
        if self.progress is not None:
            self.progress(label, done, total)

    def _before(self) -> Records:
        """Measures the unedited model on cases that were not measured yet."""
        records = Records(self.folder / "before.jsonl")
        missing = self.missing(records, self.cases)
        for start in range(0, len(missing), CASES_AT_ONCE):
            part = missing[start : start + CASES_AT_ONCE]
            written = neighbour_continuations(self.model, self.tokenizer, part)
            scores = score_cases(self.model, self.tokenizer, part, written, entropy=self.entropy)
            for case, tokens, found in zip(part, written, scores, strict=True):
                records.append({"id": case.id, "case": case_hash([case]), "continuations": tokens, **found})
            self.report("Measuring the unedited model", start + len(part), len(missing))
        return records


def prepare_folder(model: DynamicCausalLM, folder: str | os.PathLike) -> None:
    """Writes down that ``folder`` holds results on ``model``.

    Raises:
        ConfigError: It holds those of another model.
    """
    added = [parameter.detach().flatten()[:4].float().tolist() for _, parameter in added_parameters(model)]
    thresholds = [buffer.float().tolist() for _, buffer in added_buffers(model)]  # only routed layers have any
    own = {
        "base": digest(fingerprint(model)),
        "dtype": weight_format(model),
        "changes": json_hash([model.config.pliant, added, *thresholds]) if added else None,
        "edits": [edit.id for edit in model.edits],
    }
    check_settings(Path(folder) / "settings.json", own)


def weight_format(model: DynamicCausalLM) -> str:
    """Returns the dtype, and the classes of projections that are packed: NF4 and int8 have one fingerprint."""
    packed = {type(m).__name__ for m in model.model.modules() if is_projection(m) and not is_plain(m)}
    return " ".join((str(model.dtype), *sorted(packed)))


def case_hash(cases: Sequence[EditCase]) -> str:
    """Returns twelve digits that stand for cases."""
    return json_hash([astuple(case) for case in cases])


def json_hash(value: Any) -> str:
    """Twelve digits that stand for JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _now(model: DynamicCausalLM) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
