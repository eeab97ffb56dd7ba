"""What a conversion adds, counted without weights: the classes are built on the meta device."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedConfig

from pliant.architectures import NptConfig, NptLayer, RoutedLayer, added_parameters
from pliant.architectures.base import LayerConfig
from pliant.errors import ConversionError
from pliant.models import PliantSpec, family_of
from pliant.models.graft import with_spec
from pliant.models.spec import architecture_of

BF16_BYTES = 2
FP32_BYTES = 4
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits a weight, double quantised: an 8-bit scale per 64, and an fp32 scale per 256 of those."""


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """What conversion adds to one layer.

    Attributes:
        form: Name of the form.
        rank: Its rank; ``"auto"`` while calibration has not settled it, and then the counts are
            those of full rank.
        parameters: Added parameters.
        flops: Floating-point operations that they add per token, two a multiply-add.
    """

    form: str
    rank: int | str
    parameters: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class RoutedLayerSummary:
    """What routing tokens through one layer adds to it, and saves.

    Attributes:
        form: Name of the architecture.
        capacity: γ, the share of the tokens that run.
        parameters: Added parameters.
        flops: Floating-point operations per token that routing adds, which are fewer than 0 where it saves some. A
            token that runs attends to a share γ of the tokens; each added parameter is used once.
    """

    form: str
    capacity: float
    parameters: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A base, and what converting some of its layers adds to it.

    FLOPs are per token, two a multiply-add: every linear map, the output head included, and for a
    token that attends to ``context`` tokens the products with their keys and values. Sliding
    windows are not considered; norms, activations and the softmax are not counted.

    Attributes:
        family: Base family.
        num_layers: Decoder layers.
        d_model: Width of the residual stream.
        d_ffn: Width of the MLP.
        base_parameters: Parameters of the base; tied embeddings count once.
        base_bf16_bytes: Memory of the base in bfloat16.
        base_nf4_bytes: With the linear maps of the layers in NF4, double quantised, and the rest in
            bfloat16.
        context: Tokens that a token attends to.
        base_flops: FLOPs per token of the base.
        layers: Layer index → what is added to it.
    """

    family: str
    num_layers: int
    d_model: int
    d_ffn: int
    base_parameters: int
    base_bf16_bytes: int
    base_nf4_bytes: int
    context: int
    base_flops: int
    layers: Mapping[int, LayerSummary | RoutedLayerSummary]

    @property
    def added_parameters(self) -> int:
        """Parameters that conversion adds, over all layers."""
        return sum(layer.parameters for layer in self.layers.values())

    @property
    def added_bytes(self) -> int:
        """Memory of the added parameters, which are fp32."""
        return FP32_BYTES * self.added_parameters

    @property
    def added_flops(self) -> int:
        """FLOPs per token that conversion adds."""
        return sum(layer.flops for layer in self.layers.values())

    @property
    def is_upper_bound(self) -> bool:
        """Whether a rank is still ``"auto"``, so that the additions are at most what is said."""
        return any(isinstance(layer, LayerSummary) and layer.rank == "auto" for layer in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        return {
            **asdict(self),
            "layers": {str(index): asdict(layer) for index, layer in self.layers.items()},
            "added_parameters": self.added_parameters,
            "added_share": self.added_parameters / self.base_parameters,
            "added_bytes": self.added_bytes,
            "added_flops": self.added_flops,
            "is_upper_bound": self.is_upper_bound,
        }


def summarise(config: PreTrainedConfig, layers: Mapping[int, LayerConfig], *, context: int = 2048) -> Summary:
    """Counts what converting ``layers`` of the base that ``config`` describes adds; no weights are
    needed.

    Args:
        config: Configuration of a base, or of a pliant model, whose own layers are then left out.
        layers: Layer index → configuration, all of one architecture. With ``rank="auto"`` the
            counts are those of full rank, an upper bound.
        context: Tokens that a token attends to, for the FLOPs of attention.

    Raises:
        ConversionError: The family does not convert, a layer does not exist, or a rank is above
            d_model.
    """
    family = family_of(config)
    _check(layers, config.num_hidden_layers, config.hidden_size)
    widest = {i: c.with_rank(config.hidden_size) if _is_automatic(c) else c for i, c in layers.items()}
    name = architecture_of(next(iter(widest.values()))) if widest else None
    spec = PliantSpec() if name is None else PliantSpec(architecture=name, layers=widest)
    with torch.device("meta"):
        model = family.causal_lm(with_spec(config, family.config, spec))
    return _count(model, family.name, layers, context)


def _is_automatic(config: LayerConfig) -> TypeGuard[NptConfig]:
    return isinstance(config, NptConfig) and config.rank == "auto"


def _check(layers: Mapping[int, LayerConfig], num_layers: int, d_model: int) -> None:
    for index, layer in layers.items():
        if not 0 <= index < num_layers:
            raise ConversionError(f"layers must be in 0..{num_layers - 1} (num_hidden_layers); got {index}.")
        if isinstance(layer, NptConfig) and isinstance(layer.rank, int) and layer.rank > d_model:
            raise ConversionError(
                f"rank must be in 1..{d_model} (d_model); got {layer.rank} for layer {index}. Lower it."
            )


def _count(model: Any, family: str, layers: Mapping[int, LayerConfig], context: int) -> Summary:
    config = model.config
    added = {id(parameter) for _, parameter in model.dynamic_parameters()}
    base_parameters = sum(p.numel() for p in model.parameters() if id(p) not in added)
    quantised = sum(linear.weight.numel() for linear in _linears(model.model))
    attention = sum(4 * context * block.self_attn.q_proj.out_features for block in model.model.layers)
    return Summary(
        family=family,
        num_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_ffn=config.intermediate_size,
        base_parameters=base_parameters,
        base_bf16_bytes=BF16_BYTES * base_parameters,
        base_nf4_bytes=BF16_BYTES * (base_parameters - quantised) + round(quantised * NF4_BITS / 8),
        context=context,
        base_flops=2 * (quantised + model.lm_head.weight.numel()) + attention,
        layers={
            index: _summary(layer, layers[index], context)
            for index, layer in model.dynamic_layers.items()
            if not isinstance(layer, RoutedLayer) or layer.routes
        },
    )


def _summary(layer: Any, config: Any, context: int) -> LayerSummary | RoutedLayerSummary:
    parameters = sum(p.numel() for _, p in added_parameters(layer))
    if isinstance(layer, NptLayer):
        return LayerSummary(form=config.form, rank=config.rank, parameters=parameters, flops=_flops(layer))
    return RoutedLayerSummary(
        form=architecture_of(config) or "",
        capacity=config.capacity_gamma,
        parameters=parameters,
        flops=2 * parameters - round(_saved_flops(layer, config.capacity_gamma, context)),
    )


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def _flops(layer: NptLayer) -> int:
    """FLOPs that the modulation of one layer adds per token."""
    matrices = sum(p.numel() for p in layer.plastic.parameters() if p.ndim == 2)
    uses = 2 if layer.layer_config.tied else 1  # a tied factor maps down and up again
    flops = 2 * uses * matrices
    if layer.layer_config.form == "outer":
        for name in layer.layer_config.target_names:
            d_out, d_in = getattr(layer.mlp, name).weight.shape
            flops += 2 * layer.layer_config.num_updates * (d_in + d_out)  # key · z, then value times that
    return flops


def _saved_flops(layer: Any, capacity: float, context: int) -> float:
    """FLOPs of one layer that a token is spared on average."""
    has = {"block": (layer.self_attn, layer.mlp), "attention": (layer.self_attn,), "mlp": (layer.mlp,)}[layer.part]
    saved = (1 - capacity) * 2 * sum(linear.weight.numel() for part in has for linear in _linears(part))
    if layer.part != "mlp":
        saved += (1 - capacity**2) * 4 * context * layer.self_attn.q_proj.out_features
    return saved
