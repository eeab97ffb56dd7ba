"""The configuration of a run: its schema, and how Hydra composes it."""

from pliant.config.schema import DataConfig, LrMultipliers, ModelConfig, RunConfig, TrainingConfig

__all__ = ["DataConfig", "LrMultipliers", "ModelConfig", "RunConfig", "TrainingConfig"]
