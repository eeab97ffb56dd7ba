"""A look at a run's data before it starts: what each name stands for, and whether it is there."""

from dataclasses import dataclass

from pliant.config import DataConfig
from pliant.data.conversations import ChatSchema
from pliant.data.loading import Member, columns_of, open_records, reader_of
from pliant.data.mixture import eval_members, train_members
from pliant.errors import DataError

OK, OFFLINE = "ok", "not checked (offline)"


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """What one name of the settings stands for.

    Attributes:
        name: As it was given.
        role: ``train`` or ``validation``.
        place: Hub id, configuration and split, or local path.
        columns: Columns that are read; empty if they are not known yet.
        status: ``ok``, or ``not checked (offline)``.
    """

    name: str
    role: str
    place: str
    columns: tuple[str, ...]
    status: str


def check_data(config: DataConfig, *, kind: str) -> list[DataCheck]:
    """Looks at every data set of a run, reading no more than the head of each.

    Raises:
        ConfigError: A setting does not fit its data set.
        DataError: A local file is missing or unreadable, a column is missing, or a data set is of the other kind.
    """
    members = [(member, "train") for member in train_members(config)]
    members += [(member, "validation") for member in eval_members(config)]
    return [_check(member, role, kind) for member, role in members]


def _check(member: Member, role: str, kind: str) -> DataCheck:
    known = member.source.columns if member.source is not None else ()
    try:
        found = columns_of(open_records(member, streaming=True), member)
    except DataError as error:
        if not isinstance(error.__cause__, ConnectionError):
            raise
        return DataCheck(name=member.name, role=role, place=member.place, columns=known, status=OFFLINE)
    columns = _columns(reader_of(member, found, kind=kind), known)
    return DataCheck(name=member.name, role=role, place=member.place, columns=columns, status=OK)


def _columns(reader: object, known: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(reader, str):
        return (reader,)
    return known or (reader.columns if isinstance(reader, ChatSchema) else ())
