"""What a dynamic layer computes: plain torch, no knowledge of training or of checkpoints."""

from pliant.architectures.base import AddedModule, Architecture, LayerReport, Write, added_parameters
from pliant.architectures.npt import NptConfig, NptLayer

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
    )
}

__all__ = [
    "ARCHITECTURES",
    "AddedModule",
    "Architecture",
    "LayerReport",
    "NptConfig",
    "NptLayer",
    "Write",
    "added_parameters",
]
