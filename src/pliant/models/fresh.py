"""A model with fresh weights: the shape and the tokenizer of a base, sizes overridden."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from pliant.errors import CheckpointError, ConfigError
from pliant.models.bases import SHAPES, resolve_base, shape_config
from pliant.models.dynamic import DynamicCausalLM
from pliant.models.families import family_of
from pliant.models.graft import with_spec
from pliant.models.spec import PliantSpec

HEAD_SIZES = ("hidden_size", "num_attention_heads")


def fresh(
    name: str, sizes: Mapping[str, Any] | None = None, *, seed: int = 0, attn_implementation: str | None = None
) -> DynamicCausalLM:
    """Returns a dense model of the shape of ``name`` with fresh weights, in fp32.

    Args:
        name: Directory, hub id, ``"smollm2-135m"`` or a shape that pliant ships.
        sizes: Fields of its configuration to override, e.g. ``{"num_hidden_layers": 6}``.
        seed: Makes the weights repeatable; the global generator is left as it was.
        attn_implementation: As in ``from_pretrained``.

    Raises:
        ConfigError: The sizes do not fit together.
        CheckpointError: The base's configuration cannot be read.
    """
    config: Any = fresh_config(name, sizes)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family_of(config).causal_lm(config)


def fresh_config(name: str, sizes: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Returns the pliant configuration of ``name`` with ``sizes`` overridden, without any weights."""
    base = _base_config(name)
    fields = {**base.to_dict(), **(sizes or {})}
    if sizes and any(size in sizes for size in HEAD_SIZES):
        fields.pop("head_dim", None)  # follows from the two
    if sizes and "num_hidden_layers" in sizes:
        fields.pop("layer_types", None)
    if sizes and "num_attention_heads" in sizes and "num_key_value_heads" not in sizes:
        fields["num_key_value_heads"] = min(fields["num_key_value_heads"], fields["num_attention_heads"])
    _check(fields)
    config = type(base)(**{key: value for key, value in fields.items() if key != "model_type"})
    config._name_or_path = base._name_or_path
    family = family_of(config)
    return with_spec(config, family.config, PliantSpec())  # no base that a delta could be loaded over


def _base_config(name: str) -> PreTrainedConfig:
    """From a folder or the local cache, else as pliant ships it, else from the hub."""
    shipped = {*SHAPES, *(shape_config(shape)._name_or_path.lower() for shape in SHAPES)}
    if name.lower() in SHAPES:
        return shape_config(name)
    path = resolve_base(name)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=name.lower() in shipped)
    except OSError as error:
        if name.lower() in shipped:
            return shape_config(name)
        raise CheckpointError(
            f"model.base_model_name={name!r} must be a model directory, a reachable hub id or one of "
            f"{', '.join(SHAPES)}: {error}"
        ) from error


def _check(fields: Mapping[str, Any]) -> None:
    width, heads, key_value_heads = (fields[n] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if width % heads or (width // heads) % 2:
        raise ConfigError(
            f"hidden_size must be a multiple of num_attention_heads, an even number of times; got {width} and {heads}. "
            "Change one of them."
        )
    if heads % key_value_heads:
        raise ConfigError(
            f"num_attention_heads must be a multiple of num_key_value_heads; got {heads} and {key_value_heads}. "
            "Change one of them."
        )
