"""Dynamic Transformer: a layer is entered by the tokens that the layer before it changed in a surprising way."""

from pliant.architectures.dtf.config import DtfConfig
from pliant.architectures.dtf.layer import DtfLayer

__all__ = ["DtfConfig", "DtfLayer"]
