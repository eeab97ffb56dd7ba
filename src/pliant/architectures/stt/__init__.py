"""Subjective Timescale Transformer: a student learns to foresee which tokens a layer would change surprisingly."""

from pliant.architectures.stt.config import SttConfig
from pliant.architectures.stt.layer import SttLayer

__all__ = ["SttConfig", "SttLayer"]
