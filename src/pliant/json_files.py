"""Reading JSON that someone else may have damaged."""

import json
import os
from pathlib import Path
from typing import Any

from pliant.errors import DataError, PliantError


def read_object(
    path: str | os.PathLike, *, holds: str, remedy: str, error: type[PliantError] = DataError
) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
        path: The file.
        holds: What it must hold, in the words of the message.
        remedy: What to do where it does not: a sentence.
        error: What is raised then.

    Raises:
        PliantError: ``error``: the file is damaged, or holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as damage:  # broken UTF-8 too
        raise error(f"{path} must be JSON; it is damaged: {damage}. {remedy}") from damage
    if not isinstance(found, dict):
        raise error(f"{path} must hold {holds}; it holds a {type(found).__name__}. {remedy}")
    return found
