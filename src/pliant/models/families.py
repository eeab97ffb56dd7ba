"""The base families that convert, and the pliant classes made for each by one factory.

A family needs RoPE attention that returns ``(output, weights)``, pre-norm layers and a SwiGLU MLP with
``gate_proj``, ``up_proj`` and ``down_proj``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.smollm3 import modeling_smollm3

from pliant.architectures import ARCHITECTURES
from pliant.errors import ConversionError
from pliant.models.dynamic import DynamicCausalLM, DynamicModel, with_readout

BASES = {
    "llama": (modeling_llama, "Llama"),
    "mistral": (modeling_mistral, "Mistral"),
    "qwen2": (modeling_qwen2, "Qwen2"),
    "qwen3": (modeling_qwen3, "Qwen3"),
    "smollm3": (modeling_smollm3, "SmolLM3"),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """The pliant classes of one base family."""

    name: str
    base_config: type[PreTrainedConfig]
    base_causal_lm: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    causal_lm: type[DynamicCausalLM]
    layer: Callable[[str], type[nn.Module]]


def _publish(cls: type, name: str) -> type:
    """Names ``cls`` and makes it importable from this module, so that it pickles and prints like any class."""
    cls.__name__ = cls.__qualname__ = name
    cls.__module__ = __name__
    globals()[name] = cls
    return cls


def _make_family(name: str) -> Family:
    modeling, prefix = BASES[name]
    base_config: Any = getattr(modeling, f"{prefix}Config")
    base_layer: Any = getattr(modeling, f"{prefix}DecoderLayer")
    base_model: Any = getattr(modeling, f"{prefix}Model")
    base_causal_lm: Any = getattr(modeling, f"{prefix}ForCausalLM")

    # Not a class statement: the type checks of the tests would wrap its constructor, which takes any keyword.
    fields = {"model_type": f"pliant_{name}", "pliant": None, "__annotations__": {"pliant": dict | None}}
    config = strict(_publish(type("Config", (base_config,), fields), f"Pliant{prefix}Config"))
    _publish(config, f"Pliant{prefix}Config")

    @cache
    def layer(architecture: str) -> type[nn.Module]:
        mixin = ARCHITECTURES[architecture].layer
        if mixin is None:
            return base_layer
        return _publish(
            type("Layer", (mixin, base_layer), {}), f"{mixin.__name__.removesuffix('Layer')}{prefix}DecoderLayer"
        )

    blocks = [layer(architecture).__name__ for architecture in ARCHITECTURES]

    class Model(DynamicModel, base_model):
        config_class = config
        dynamic_layer = staticmethod(layer)
        _no_split_modules = blocks

    class CausalLM(DynamicCausalLM, base_causal_lm):
        config_class = config
        base_config_class = base_config
        _no_split_modules = blocks
        forward = with_readout(base_causal_lm.forward)

        def __init__(self, config: PreTrainedConfig) -> None:
            super(base_causal_lm, self).__init__(config)
            self.model = Model(config)
            self.vocab_size = config.vocab_size
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()
            self._no_split_modules = self.model._no_split_modules

    return Family(
        name=name,
        base_config=base_config,
        base_causal_lm=base_causal_lm,
        config=config,
        model=_publish(Model, f"Pliant{prefix}Model"),
        causal_lm=_publish(CausalLM, f"Pliant{prefix}ForCausalLM"),
        layer=layer,
    )


FAMILIES: dict[str, Family] = {name: _make_family(name) for name in BASES}


def family_of(config: PreTrainedConfig) -> Family:
    """Returns the family of a base's or a pliant model's configuration.

    Raises:
        ConversionError: The model type belongs to no family that converts.
    """
    name = config.model_type.removeprefix("pliant_")
    if name not in FAMILIES:
        raise ConversionError(
            f"model_type must be one of {', '.join(FAMILIES)}; got {config.model_type!r}. Other families have "
            "another block (no SwiGLU, post-norm, experts); choose a base of one of these."
        )
    return FAMILIES[name]
