"""One data set by its name: a known name, a hub id, ``embedded`` or a local path → documents in one column.

Texts come in the column ``text``, conversations in ``messages``.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.fingerprint import Hasher

from pliant.architectures.base import nearest
from pliant.config import DataConfig
from pliant.data.conversations import SCHEMAS, ChatSchema, Record, find_schema
from pliant.data.embedded import documents as embedded_documents
from pliant.data.local import is_path, open_local
from pliant.data.sources import DATASETS, DatasetSource, find_source
from pliant.errors import ConfigError, DataError

EMBEDDED = "embedded"
TEXTS = Features({"text": Value("string")})
CONVERSATIONS = Features({"messages": [{"role": Value("string"), "content": Value("string")}]})
FORMAT = 1
"""To be raised when the same settings come to give other records, so that none are taken from an older cache."""
STRINGS = (Value("string"), Value("large_string"))

AnyDataset = Dataset | IterableDataset
Reader = ChatSchema | Callable[[Iterable[Record]], Iterator[Any]]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One data set as a run reads it.

    Attributes:
        name: As it was given.
        field: Setting that names it, for messages.
        split: Which part is read; nothing for local files.
        config: Its configuration on the hub.
        column: Column that was asked for; ``None`` takes the known name's own, or the usual one.
        source: Row of the table of known data sets, if it has one.
    """

    name: str
    field: str
    split: str | None = None
    config: str | None = None
    column: str | None = None
    source: DatasetSource | None = None

    @property
    def place(self) -> str:
        """Where it is, in words."""
        if self.name == EMBEDDED:
            return f"the embedded texts, split {self.split}"
        if self.split is None:
            return f"local {self.name}"
        hub_id = self.source.hub_id if self.source else self.name
        return " ".join(part for part in (f"hub {hub_id}", self.config, f"split {self.split}") if part)


def train_member(config: DataConfig, name: str, field: str) -> Member:
    """Returns the data set `name` as the run trains on it.

    In a mixture, ``dataset_config``, the splits and ``text_column`` concern only the members that pliant does not know.
    """
    source, settings = _settings(config, name)
    default = source.split if source else "train"
    return _member(name, field, source, settings, split=settings.train_split or default)


def eval_member(config: DataConfig, name: str, field: str) -> Member | None:
    """Returns the split of `name` that the run validates on, or nothing if it has none of its own."""
    source, settings = _settings(config, name)
    split = settings.eval_split or (source.eval_split if source else "validation" if name == EMBEDDED else None)
    return _member(name, field, source, settings, split=split) if split else None


def eval_dataset(config: DataConfig, name: str) -> Member:
    """Returns the other data set that the run validates on: its validation split, or all of a local one.

    Of the settings, ``eval_split`` concerns it, and ``text_column`` where pliant does not know it.
    """
    field, source = "data.eval_dataset_name", find_source(name)
    column = None if source else config.text_column
    settings = DataConfig(dataset_name=name, eval_split=config.eval_split, text_column=column)
    if own := eval_member(settings, name, field):
        return own
    split = None if _is_local(name, source) else "validation"
    return train_member(replace(settings, train_split=split), name, field)


def open_records(member: Member, *, streaming: bool) -> AnyDataset:
    """Opens a data set as it is stored.

    Raises:
        DataError: It is not there, cannot be reached or cannot be read.
    """
    if member.name == EMBEDDED:
        split = member.split or "train"
        if streaming:
            return IterableDataset.from_generator(_embedded_records, gen_kwargs={"split": split}, features=TEXTS)
        return Dataset.from_dict({"text": list(embedded_documents(split))}, features=TEXTS)
    if member.split is None:
        return open_local(member.name, field=member.field, streaming=streaming)
    return _open_hub(member, streaming=streaming)


def open_documents(member: Member, *, kind: str, streaming: bool) -> AnyDataset:
    """Opens a data set as texts (kind ``text``) or conversations (kind ``chat``), one a record.

    Raises:
        DataError: As `open_records`; or it is of the other kind, or lacks a column.
    """
    records = open_records(member, streaming=streaming)
    reader = reader_of(member, columns_of(records, member), kind=kind)
    if isinstance(reader, str):
        return _text_column(records, reader, member)
    features = TEXTS if kind == "text" else CONVERSATIONS
    return generated(_convert, {"records": records, "reader": reader}, like=records, features=features)


def generated(
    generator: Callable[..., Iterator[Record]], arguments: dict[str, Any], *, like: AnyDataset, features: Features
) -> AnyDataset:
    """Returns the records that a generator yields as a data set of the same sort as `like`: stored, or a stream."""
    if isinstance(like, IterableDataset):
        return IterableDataset.from_generator(generator, gen_kwargs=arguments, features=features)
    try:
        fingerprint = Hasher.hash([FORMAT, generator, arguments])
        return Dataset.from_generator(generator, gen_kwargs=arguments, features=features, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from error
        raise


def every(records: Any) -> Iterator[Record]:
    """Yields all records, also in a worker of a loader, where iterating over a stream gives a share of its files."""
    if not isinstance(records, IterableDataset):
        yield from records
        return
    for batch in records.iter(batch_size=1):
        yield {column: values[0] for column, values in batch.items()}


def columns_of(records: AnyDataset, member: Member) -> list[str]:
    """Returns the names of the columns; of a stream, it reads the first record.

    Raises:
        DataError: There is no record, or it cannot be read.
    """
    try:
        first = next(iter(records), None)
    except ValueError as error:  # as pyarrow calls damaged files
        raise DataError(
            f"{member.field}={member.name!r} cannot be read: {error}. Check that its files are whole."
        ) from error
    if first is None:
        raise DataError(f"{member.field}={member.name!r} must hold some records; {member.place} holds none.")
    return list(records.column_names or first)


def reader_of(member: Member, columns: list[str], *, kind: str) -> str | Reader:
    """Returns what makes documents of the records: a text column, a chat schema, or a function that joins records.

    Raises:
        DataError: The data set is of the other kind, or lacks a column.
    """
    source = member.source
    if source is not None and (member.column is None or (source.kind == kind and member.column in source.columns)):
        _check_kind(member, source.kind, kind)
        if missing := [column for column in source.columns if column not in columns]:
            raise _missing_column(member, missing[0], columns)
        if source.join is not None:
            return source.join
    if member.column is not None and member.column not in columns:
        raise _missing_column(member, member.column, columns)
    schema = find_schema(columns, member.column if kind == "chat" else None)
    if kind == "chat":
        if schema is None:
            raise _no_schema(member, columns)
        return schema
    column = member.column or "text"
    if column not in columns:
        if schema is not None:
            _check_kind(member, "chat", kind)
        raise _missing_column(member, column, columns)
    return column


def _embedded_records(split: str) -> Iterator[Record]:
    """Yields the embedded documents as records."""
    for text in embedded_documents(split):
        yield {"text": text}


def _settings(config: DataConfig, name: str) -> tuple[DatasetSource | None, DataConfig]:
    """Returns what is known of a training data set, and the settings that concern it."""
    source = find_source(name)
    if config.mixed and (source is not None or name == EMBEDDED):
        return source, DataConfig()
    return source, config if config.eval_dataset_name is None else replace(config, eval_split=None)


def _is_local(name: str, source: DatasetSource | None) -> bool:
    return name != EMBEDDED and source is None and is_path(name)


def _member(name: str, field: str, source: DatasetSource | None, settings: DataConfig, *, split: str | None) -> Member:
    local = _is_local(name, source)
    if (local or name == EMBEDDED) and not settings.mixed:
        _check_no_parts(name, field, settings)
    return Member(
        name=name,
        field=field,
        split=None if local else split,
        config=settings.dataset_config or (source.config if source else None),
        column=settings.text_column,
        source=source,
    )


def _check_no_parts(name: str, field: str, settings: DataConfig) -> None:
    for key in ("dataset_config", "train_split", "eval_split"):
        if (value := getattr(settings, key)) is not None:
            raise ConfigError(
                f"data.{key} chooses a part of a data set on the hub; got {value!r} with {field}={name!r}. Leave it "
                "out, or validate on another file with data.eval_dataset_name."
            )


def _open_hub(member: Member, *, streaming: bool) -> AnyDataset:
    source = member.source
    options: dict[str, Any] = {"name": member.config, "split": member.split, "streaming": streaming}
    if source is not None and source.revision is not None:
        options["revision"] = source.revision
    if source is not None and source.data_files is not None:
        # The repository's own figures are for all of its files.
        options |= {"data_files": dict(source.data_files), "verification_mode": "no_checks"}
    try:
        return load_dataset(source.hub_id if source else member.name, **options)
    except DatasetNotFoundError as error:
        raise DataError(
            f"{member.field}={member.name!r} is no data set on the hub that this machine may read.{_near(member.name)} "
            f"Known names are {', '.join(DATASETS)} and embedded; a local path must exist."
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"{member.field}={member.name!r} cannot be reached ({member.place}): {error}.{_near(member.name)} Connect, "
            "download it beforehand as the same user, or name embedded or a local path."
        ) from error
    except (ValueError, RuntimeError) as error:  # an unknown split or configuration; a loading script
        raise DataError(
            f"{member.field}={member.name!r} cannot be loaded as {member.place}: {error} "
            "Choose another in data.dataset_config, data.train_split or data.eval_split."
        ) from error


def _text_column(records: AnyDataset, column: str, member: Member) -> AnyDataset:
    features = records.features
    if features is not None and features[column] not in STRINGS:
        raise DataError(
            f"data.text_column must name a column of text; {column!r} of {member.name!r} holds {features[column]}."
        )
    texts = records.select_columns([column])
    if column != "text":
        texts = texts.rename_column(column, "text")
    return texts if features is None or features[column] == Value("string") else texts.cast(TEXTS)


def _convert(records: Iterable[Record], reader: Reader) -> Iterator[Record]:
    documents = map(reader.convert, every(records)) if isinstance(reader, ChatSchema) else reader(every(records))
    for document in documents:
        yield {"text": document} if isinstance(document, str) else {"messages": document}


def _check_kind(member: Member, actual: str, wanted: str) -> None:
    if actual != wanted:
        have, need = ("conversations", "texts") if actual == "chat" else ("texts", "conversations")
        remedy = "sft, or name its column in data.text_column" if actual == "chat" else "causal_lm or equivalence"
        raise DataError(
            f"{member.field}={member.name!r} holds {have}, but this objective reads {need}. Set "
            f"training.objective={remedy}, or choose another data set."
        )


def _missing_column(member: Member, column: str, columns: list[str]) -> DataError:
    return DataError(
        f"data.text_column: {member.name!r} has no column {column!r}; it has {', '.join(columns)}."
        f"{nearest(column, columns)} Set data.text_column to the one with the text."
    )


def _no_schema(member: Member, columns: list[str]) -> DataError:
    layouts = "; ".join(" and ".join(schema.columns) for schema in SCHEMAS)
    return DataError(
        f"{member.field}={member.name!r} must hold conversations in one of the layouts {layouts}; it has the columns "
        f"{', '.join(columns)}. Rename them, or name the one with the messages in data.text_column."
    )


def _near(name: str) -> str:
    if name in DATASETS:
        return ""
    return nearest(name, [*DATASETS, EMBEDDED, *(source.hub_id for source in DATASETS.values())])
