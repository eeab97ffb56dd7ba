"""Mixture-of-Depths: a linear router decides which tokens enter a layer."""

from pliant.architectures.mod.config import ModConfig
from pliant.architectures.mod.layer import ModLayer

__all__ = ["ModConfig", "ModLayer"]
