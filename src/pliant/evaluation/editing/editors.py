"""Every editor by name: pliant's own, ends of the scale, and those of others to compare with."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from pliant.architectures.base import nearest
from pliant.consolidation import Consolidation, consolidate
from pliant.consolidation.method import method_of
from pliant.consolidation.queries import QUESTION
from pliant.errors import ConfigError, EditError
from pliant.evaluation.baselines import AlphaEdit, FineTune, KeyMemory, Lora, Memit, RandomDirection, Rome
from pliant.evaluation.baselines.values import FoundValues
from pliant.evaluation.editing.cases import EditCase
from pliant.models import DynamicCausalLM
from pliant.models.edits import Edit


@dataclass(frozen=True, kw_only=True)
class Learn:
    """Learns a case by ``pliant.consolidate``, and leaves the model as it was.

    A statement is learned from its prompt and its answer. A passage, which has reference answers, is learned from its
    questions alone: each is a fact of its own, whose answer is the model's with the passage in view.

    Attributes:
        settings: How it is written.
        asks: Give the case's own prompts; else the model makes its queries from the context, and is told nothing more.
    """

    settings: Consolidation
    asks: bool = True

    def __call__(self, model: Any, tokenizer: PreTrainedTokenizerBase, case: EditCase) -> Edit:
        """Returns the edit for one case."""
        return self.batch(model, tokenizer, [case])

    def batch(self, model: Any, tokenizer: PreTrainedTokenizerBase, cases: Sequence[EditCase]) -> Edit:
        """Returns one edit for all cases.

        Raises:
            EditError: There are no cases, or what is to be learned cannot be written.
        """
        if not cases:
            raise EditError("cases must hold at least one; got none. Give the facts to write.")
        if self.asks:
            facts = [fact for case in cases for fact in _asked(case)]
            contexts, queries, answers, subjects = map(list, zip(*facts, strict=True))
        else:
            contexts, queries, answers, subjects = [case.context for case in cases], None, None, None
        edit = consolidate(model, tokenizer, contexts, queries, answers, subjects, settings=self.settings)
        return model.edits.revert(edit.id)


def _asked(case: EditCase) -> list[tuple[str, list[str], str | None, str | None]]:
    """Context, queries, answer and subject of every fact of a case."""
    if not case.asked:
        return [(case.context, [case.prompt], case.answer, _within(case.subject, case.prompt))]
    before, after = QUESTION.split("{}")
    questions = [prompt.removeprefix(before).removesuffix(after).strip() for prompt, _ in case.asked]
    # Without its mark a question would be taken for a beginning to complete.
    questions = [question if question.endswith("?") else question + "?" for question in questions]
    return [(case.context, [question], None, _within(case.subject, question)) for question in questions]


def _within(subject: str, prompt: str) -> str | None:
    return subject if subject and subject in prompt else None


def no_edit(_model: Any, _tokenizer: Any, _case: EditCase) -> None:
    """The editor that makes no edit."""


def _learn(target: Any, **options: Any) -> Callable[[], Learn]:
    return lambda: Learn(settings=Consolidation(target=target), **options)


OWN = ("context", "unembedding", "auto", "optimised", "made")
"""The editors that are pliant's."""

EDITORS: dict[str, Callable[[], Any]] = {
    "untouched": lambda: no_edit,
    "in_context": lambda: None,  # what `evaluate_edits` takes for the context in view
    "context": _learn("context"),
    "unembedding": _learn("unembedding"),
    "auto": _learn("auto"),
    "optimised": _learn("optimised"),
    "made": _learn("auto", asks=False),
    "random": lambda: RandomDirection(editor=_learn("unembedding")()),
    "rome": Rome,
    "memit": Memit,
    "alphaedit": AlphaEdit,
    "finetune": FineTune,
    "lora": Lora,
}
"""Name → a function that makes the editor."""

_FOUND = FoundValues()
"""MEMIT and AlphaEdit differ in the write alone."""


def editor_named(name: str, *, mode: str = "single") -> Any:
    """Returns an editor for edits that stand alone, come one after another, or are made of many cases at once.

    Raises:
        ConfigError: There is none of this name, or it does not go with the mode.
    """
    if name not in EDITORS:
        raise ConfigError(f"editor must be one of {', '.join(EDITORS)}; got {name!r}.{nearest(name, tuple(EDITORS))}")
    editor = EDITORS[name]()
    if mode == "sequential" and (editor is None or editor is no_edit):
        raise ConfigError(f"editors must make edits for mode='sequential'; got {name!r}. Leave it out.")
    if mode == "batched" and not hasattr(editor, "batch"):
        known = ", ".join(other for other, make in EDITORS.items() if hasattr(make(), "batch"))
        raise ConfigError(f"editors must be of {known} for mode='batched'; got {name!r}. Leave it out.")
    if isinstance(editor, Memit):
        editor = replace(editor, found=_FOUND)
    # What earlier edits wrote matters only where they stay.
    return replace(editor, memory=KeyMemory()) if mode == "sequential" and isinstance(editor, AlphaEdit) else editor


def editor_settings(editor: Any, model: DynamicCausalLM, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Returns the settings of an editor as JSON values, without the tensors that it was given.

    ``method`` says what those of :class:`Consolidation` stand for on this model.
    """
    if is_dataclass(editor):
        own = {field.name: getattr(editor, field.name) for field in fields(editor) if field.repr}
        found = {name: editor_settings(value, model, tokenizer) for name, value in own.items()}
        return found | ({"method": method_of(editor, model, tokenizer)} if isinstance(editor, Consolidation) else {})
    if isinstance(editor, Iterable) and not isinstance(editor, str):
        return list(editor)
    return None if callable(editor) else editor
