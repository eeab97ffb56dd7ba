"""The configuration of a run: its schema, and how Hydra composes it."""

from pliant.config.schema import RunConfig
from pliant.config.sections import DataConfig, LrMultipliers, ModelConfig, TrainingConfig

__all__ = ["DataConfig", "LrMultipliers", "ModelConfig", "RunConfig", "TrainingConfig"]
