"""Files that are replaced whole: a process that is killed, or meets a full disk, leaves the old one or the new one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(target: Path, *, prefix: str) -> Iterator[str]:
    """Gives the name of a file to write beside ``target``, whose place it takes after the block; an error removes it.

    Args:
        target: The file; its folder is made if missing.
        prefix: What the name begins with meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, staged = tempfile.mkstemp(dir=target.parent, prefix=prefix)
    os.close(descriptor)
    try:
        yield staged
        os.chmod(staged, 0o644)
        with open(staged, "rb") as file:
            os.fsync(file.fileno())
        os.replace(staged, target)
    finally:
        Path(staged).unlink(missing_ok=True)
