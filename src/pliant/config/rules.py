"""Rules that settings of every section share."""

from typing import Any

from pliant.architectures.base import nearest
from pliant.errors import ConfigError


def one_of(section: str, config: Any, **choices: tuple[str, ...]) -> None:
    """Raises a :class:`ConfigError` for a field that is none of the words known for it."""
    for name, known in choices.items():
        value = getattr(config, name)
        if value not in known:
            raise ConfigError(
                f"{section}.{name} must be one of {', '.join(known)}; got {value!r}.{nearest(str(value), known)}"
            )


def at_least(section: str, config: Any, least: int, *names: str) -> None:
    """Raises a :class:`ConfigError` for a field that is set and below ``least``."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{section}.{name} must be at least {least}; got {value}.")
