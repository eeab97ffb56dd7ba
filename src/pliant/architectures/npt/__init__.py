"""The Neuro-Plastic Transformer: attention rewrites the MLP, token by token."""

from pliant.architectures.npt.config import FORMS, NptConfig
from pliant.architectures.npt.layer import NptLayer
from pliant.architectures.npt.modulation import Modulation

__all__ = ["FORMS", "Modulation", "NptConfig", "NptLayer"]
