"""A model that learns facts for good, for the commands that teach it: learning, asking, saving, and what is told."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from pliant.cli.console import progress_display, results, shortened
from pliant.errors import CheckpointError, EditError

if TYPE_CHECKING:
    from pliant.consolidation import Consolidation
    from pliant.models import Edit

NEW_TOKENS = 24
SHOWN_WIDTH = 80


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is to be learned, in the form that ``pliant.consolidate`` takes."""

    context: str | list[str]
    queries: Any = None
    answer: Any = None
    subject: Any = None

    @property
    def shown(self) -> str:
        """The text, or how many there are."""
        return self.context if isinstance(self.context, str) else f"{len(self.context)} texts"

    @property
    def first_query(self) -> str | None:
        """The first query, if any was given for the first text."""
        first = self.queries if isinstance(self.context, str) or self.queries is None else self.queries[0]
        return first[0] if first else None


def own_folder(name: str) -> bool:
    """Whether ``name`` is a folder whose ledger can take an edit: one that pliant has saved, or edited."""
    folder = Path(name)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    from pliant.models import EDITS_NAME

    return (isinstance(config, dict) and "pliant" in config) or (folder / EDITS_NAME).exists()


class Learner:
    """A model that learns, and the neutral text that it is to leave alone."""

    def __init__(self, model: Any, text: str | None, num_tokens: int) -> None:
        from pliant.cli.generation import tokenizer_of

        if getattr(model, "_hf_peft_config_loaded", False):
            raise EditError("MODEL must be without adapters to learn; got one with adapters of peft. Merge them first.")
        self.model, self.tokenizer = model, tokenizer_of(model)
        self.text, self.num_tokens = text, num_tokens

    def learn(self, facts: Facts, settings: "Consolidation") -> "Edit":
        """Adds an edit to the model's ledger and returns it."""
        from pliant.consolidation import consolidate as write

        with progress_display() as progress:
            return write(
                self.model,
                self.tokenizer,
                facts.context,
                facts.queries,
                facts.answer,
                facts.subject,
                settings=settings,
                text=self.text,
                num_tokens=self.num_tokens,
                progress=progress,
            )

    def swept(self, settings: "Consolidation") -> "Consolidation":
        """Returns ``settings`` with the layers that serve the model best."""
        from pliant.consolidation import sweep_layers

        with progress_display() as progress:
            return sweep_layers(
                self.model, self.tokenizer, settings, text=self.text, num_tokens=self.num_tokens, progress=progress
            )

    def compare(self, edit: "Edit", facts: Facts) -> dict[str, str]:
        """Returns the first query, and what the model answers to it without the edit and with it."""
        query = facts.first_query or edit.details["queries"][0][0]
        after = self.ask(query)
        with without(self.model, edit):
            before = self.ask(query)
        return {"query": query, "before": before, "after": after}

    def ask(self, query: str, max_new_tokens: int = NEW_TOKENS) -> str:
        """Returns the greedy answer to a question, through the chat template if there is one, or to a beginning."""
        from pliant.cli.generation import Sampling, complete, encode, encode_chat
        from pliant.consolidation.queries import QUESTION

        query = query.strip()
        if query.endswith("?") and self.tokenizer.chat_template is not None:
            ids = encode_chat(self.tokenizer, [{"role": "user", "content": query}])
        else:
            ids = encode(self.tokenizer, QUESTION.format(query) if query.endswith("?") else query)
        written = complete(self.model, self.tokenizer, ids, Sampling(max_new_tokens=max_new_tokens))
        return " ".join(written.text.split())


@contextmanager
def without(model: Any, edit: "Edit") -> Iterator[None]:
    """Within the block the newest edit is out of the ledger."""
    model.edits.revert(edit.id)
    try:
        yield
    finally:
        model.edits.add(edit)


def save_ledger(model: Any, folder: Path) -> None:
    """Writes the edits of ``model`` into its own folder, the ledger's file alone."""
    from pliant.models import EDITS_NAME, read_edits, write_edits
    from pliant.models.ledger_file import snapshot

    saved = read_edits(folder) if (folder / EDITS_NAME).exists() else snapshot(model)
    write_edits(folder, saved.with_edits(list(model.edits)))


def save_new(model: Any, folder: Path) -> None:
    """Saves ``model`` whole in a new or empty folder; what could not be finished is removed."""
    from safetensors import SafetensorError

    is_there = folder.is_dir()
    try:
        model.save_pretrained(folder)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if is_there:
            folder.mkdir()
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(
                f"{str(folder)!r} could not be written ({error}); nothing is left there. Free some space, or choose "
                "another folder."
            ) from error
        raise


def summary(edit: "Edit") -> dict[str, Any]:
    """Returns what is told of an edit, as JSON values."""
    told = {"id": edit.id, "context": edit.context, "layers": list(edit.layers), "kl": edit.kl, "norm": edit.norm}
    return {**told, "rank": edit.rank, "details": dict(edit.details)}


def show(edit: "Edit", compared: dict[str, str] | None) -> None:
    """Prints what was learned, from which queries, at what cost, and what the model answers now."""
    details = edit.details
    facts = details.get("facts", 1)
    table = Table(show_header=False, title="learned")
    rows: list[tuple[str, str]] = [("id", edit.id)]
    rows += [("subject", _listed(details.get("subjects", ())))]
    rows += [("queries", _listed([query for queries in details.get("queries", ()) for query in _asked(queries)]))]
    rows += [("answers", _listed(details.get("answers", ())))]
    rows += [("layers", ", ".join(map(str, edit.layers)))]
    if edit.kl is not None:
        rows += [("KL on neutral text", f"{edit.kl:.4f} nats a token")]
    rows += [("share of it written", f"{details.get('share', 1.0):.1%} of α = {details.get('alpha', 1.0):g}")]
    rows += [("norm", f"{edit.norm:.4g}")]
    rows += [("facts that needed gradients", f"{details.get('optimised', 0)} of {facts}")]
    if compared is not None:
        rows += [(f"{compared['query']!r} before", compared["before"]), ("after", compared["after"])]
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    results.print(table)


def _asked(queries: Sequence[str]) -> list[str]:
    """The queries that are not an earlier question again, behind "Question:" or between the marks of a chat."""
    asked: list[str] = []
    for query in queries:
        if not any(known.endswith("?") and known in query for known in asked):
            asked.append(query)
    return asked


def _listed(texts: Sequence[str], most: int = 4) -> str:
    """Up to ``most`` texts, one a line, and how many more there are."""
    shown = [shortened(text, SHOWN_WIDTH) or "(none)" for text in texts[:most]]
    return "\n".join([*shown, *([f"… and {len(texts) - most} more"] if len(texts) > most else [])])
