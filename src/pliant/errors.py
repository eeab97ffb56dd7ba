"""The exceptions that pliant raises on purpose."""


class PliantError(Exception):
    """Base class of every error that pliant raises on purpose."""


class ConfigError(PliantError):
    """A setting is unknown, out of range or contradicts another."""


class ConversionError(PliantError):
    """A model cannot be converted as asked."""


class CheckpointError(PliantError):
    """A model directory is missing, incomplete or cannot be read."""


class DataError(PliantError):
    """Texts or datasets are missing, unreadable or too short."""


class TrainingError(PliantError):
    """Training cannot go on: a loss or a gradient is not finite."""


class EditError(PliantError):
    """An edit cannot be made, applied or taken back as asked."""
