"""What a dynamic layer computes: plain torch, no knowledge of training or of checkpoints."""

from pliant.architectures.base import AddedModule, Architecture, LayerReport, Write, added_parameters
from pliant.architectures.dtf import DtfConfig, DtfLayer
from pliant.architectures.mod import ModConfig, ModLayer
from pliant.architectures.npt import NptConfig, NptLayer
from pliant.architectures.routing import RoutedLayer
from pliant.architectures.routing.config import RoutedConfig
from pliant.architectures.stt import SttConfig, SttLayer

ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(name="dense", summary="the base model, unchanged"),
        Architecture(
            name="npt",
            summary="Neuro-Plastic Transformer: attention rewrites the MLP token by token",
            config=NptConfig,
            layer=NptLayer,
        ),
        Architecture(
            name="mod",
            summary="Mixture-of-Depths: a linear router lets a share of the tokens into a layer",
            config=ModConfig,
            layer=ModLayer,
        ),
        Architecture(
            name="dtf",
            summary="Dynamic Transformer: surprise at one layer lets a share of the tokens into the next",
            config=DtfConfig,
            layer=DtfLayer,
        ),
        Architecture(
            name="stt",
            summary="Subjective Timescale Transformer: a student of a layer's surprise lets tokens into it",
            config=SttConfig,
            layer=SttLayer,
        ),
    )
}

__all__ = [
    "ARCHITECTURES",
    "AddedModule",
    "Architecture",
    "DtfConfig",
    "DtfLayer",
    "LayerReport",
    "ModConfig",
    "NptConfig",
    "NptLayer",
    "RoutedConfig",
    "RoutedLayer",
    "SttConfig",
    "SttLayer",
    "Write",
    "added_parameters",
]
