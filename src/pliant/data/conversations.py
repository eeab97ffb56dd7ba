"""Conversations, whatever columns they come in.

A conversation is a list of messages ``{"role", "content"}`` with the roles ``system``, ``user`` and ``assistant``. The
columns of a data set say how its records become one: see `SCHEMAS`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pliant.architectures.base import nearest
from pliant.errors import DataError

Record = dict[str, Any]
Messages = list[dict[str, str]]
Batch = Mapping[str, list[Any]]
"""What `datasets` hands to a function that it maps over batches."""

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
"""What data sets call a role, and what chat templates do."""


@dataclass(frozen=True, kw_only=True)
class ChatSchema:
    """Columns that hold a conversation, and how a record with them becomes one."""

    columns: tuple[str, ...]
    convert: Callable[[Record], Messages]


def find_schema(columns: Iterable[str], column: str | None = None) -> ChatSchema | None:
    """Returns the first schema whose columns are all there; ``column``, if given, holds the messages."""
    if column is not None:
        return ChatSchema(columns=(column,), convert=partial(_column, column=column))
    present = set(columns)
    return next((schema for schema in SCHEMAS if present.issuperset(schema.columns)), None)


def normalised(messages: Any) -> Messages:
    """Returns messages with the usual keys and roles.

    Raises:
        DataError: They are no list of messages, or a role is unknown.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"a conversation must be a list of messages; got {str(messages)[:80]!r}. Name another column.")
    return [_message(message) for message in messages]


def best_conversations(records: Iterable[Record]) -> Iterator[Messages]:
    """Yields one conversation for each message tree of OpenAssistant: at every turn the reply that people ranked best.

    Rank 0 is best; without a rank the first reply is taken. A tree without an answer is left out. Reads all records
    first, as nothing promises that those of a tree follow each other.
    """
    replies: dict[str | None, list[Record]] = {}
    for record in records:
        if not record.get("deleted"):
            replies.setdefault(record["parent_id"], []).append(record)
    for root in replies.get(None, []):
        branch = [root]
        while following := replies.get(branch[-1]["message_id"]):
            branch.append(min(following, key=_rank))
        if len(branch) > 1:
            yield [_message({"role": record["role"], "content": record["text"]}) for record in branch]


def _rank(record: Record) -> float:
    rank = record.get("rank")
    return float("inf") if rank is None else float(rank)


def _message(message: dict[str, Any]) -> dict[str, str]:
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if role not in ROLES:
        raise DataError(
            f"a message's role must be one of {', '.join(ROLES)}; got {role!r}.{nearest(str(role), list(ROLES))} "
            "Rename the role, or leave such conversations out."
        )
    if not isinstance(content, str):
        raise DataError(f"a message's content must be text; got {content!r} (role {role!r}). Leave such messages out.")
    return {"role": ROLES[role], "content": content}


def _exchange(question: Any, answer: Any, context: Any = None) -> Messages:
    """A question, the text that it is about on lines of its own, and the answer."""
    prompt = f"{question}\n\n{context}" if context else question
    return normalised([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])


def _column(record: Record, column: str) -> Messages:
    return normalised(record[column])


def _prompt_completion(record: Record) -> Messages:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list):
        return normalised([*prompt, *completion])
    return _exchange(prompt, completion)


def _alpaca(record: Record) -> Messages:
    return _exchange(record["instruction"], record["output"], record.get("input"))


def _dolly(record: Record) -> Messages:
    return _exchange(record["instruction"], record["response"], record.get("context"))


# No lambdas: `datasets` hashes functions for its cache, those of a module by their name.
SCHEMAS: tuple[ChatSchema, ...] = (
    ChatSchema(columns=("messages",), convert=partial(_column, column="messages")),
    ChatSchema(columns=("conversations",), convert=partial(_column, column="conversations")),
    ChatSchema(columns=("prompt", "completion"), convert=_prompt_completion),
    ChatSchema(columns=("instruction", "output"), convert=_alpaca),
    ChatSchema(columns=("instruction", "response"), convert=_dolly),
)
"""Known layouts: OpenAI and TRL, ShareGPT, prompt and completion, Alpaca, Dolly."""
