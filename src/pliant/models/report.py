"""What the dynamic layers of a model did during the forward passes of a ``with model.report()`` block."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from pliant.architectures import LayerReport
from pliant.errors import ConfigError


@dataclass
class ModelReport:
    """Reports of every recorded forward: ``forwards[i][layer]`` is a :class:`LayerReport`."""

    forwards: list[Mapping[int, LayerReport]] = field(default_factory=list)

    @property
    def layers(self) -> Mapping[int, LayerReport]:
        """Reports of the last forward, by layer."""
        return self.forwards[-1] if self.forwards else {}

    def norms(self) -> dict[int, Float[Tensor, "batch seq"]]:
        """``‖ΔW_t‖_F`` for every token, the forwards joined along the sequence; layers active in all of them."""
        layers = [i for i in self.layers if all(i in forward for forward in self.forwards)]
        return {i: torch.cat([forward[i].norm for forward in self.forwards], dim=1) for i in layers}

    def regulariser(self, mask: Shaped[Tensor, "batch seq"] | None = None) -> Float[Tensor, ""]:
        """Mean penalty of the last forward: over layers, and over the tokens where ``mask`` is not 0."""
        penalties = [report.regulariser for report in self.layers.values()]
        if not penalties:
            raise ConfigError("regulariser needs a forward of active layers inside the report() block; there was none.")
        values = torch.stack([penalty.to(penalties[0].device) for penalty in penalties])  # (L, B, T)
        return values.mean() if mask is None else values[:, mask.to(values.device, torch.bool)].mean()


@contextmanager
def record(inner: nn.Module, layers: Mapping[int, Any], detail: str) -> Iterator[ModelReport]:
    """Turns recording on in ``layers``, collects after each forward of ``inner``, and turns it off again.

    Raises:
        ConfigError: A recording is under way; a layer keeps one report.
    """
    if any(layer.recording for layer in layers.values()):
        raise ConfigError("report() must not be nested; one is under way. Use the outer block's report.")
    report = ModelReport()

    def collect(_module: nn.Module, _args: Sequence[Any], _output: Any) -> None:
        reports = {i: layer.layer_report for i, layer in layers.items() if layer.layer_report is not None}
        if reports:  # a forward in base mode has none, and must not take the place of the one before
            report.forwards.append(reports)
        for layer in layers.values():
            layer.layer_report = None

    def forget(_module: nn.Module, _args: Sequence[Any]) -> None:
        for layer in layers.values():  # what a checkpointed backward, or a forward that failed, has left
            layer.layer_report = None

    handles = (inner.register_forward_pre_hook(forget), inner.register_forward_hook(collect))
    for layer in layers.values():
        layer.recording = detail
    try:
        yield report
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer.recording = None
            layer.layer_report = None
