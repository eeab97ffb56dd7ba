"""The configuration of a run: its schema, and how Hydra composes it."""

from pliant.config.model import ModelConfig
from pliant.config.schema import RunConfig
from pliant.config.sections import DataConfig, LrMultipliers, TrainingConfig

__all__ = ["DataConfig", "LrMultipliers", "ModelConfig", "RunConfig", "TrainingConfig"]
