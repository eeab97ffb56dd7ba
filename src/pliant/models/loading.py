"""``pliant.load``: one way in for directories, hub ids and the embedded base."""

import os
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from pliant.errors import CheckpointError, ConfigError
from pliant.models.bases import recorded_name, resolve_base
from pliant.models.checkpoint import HUB_OPTIONS, load_adapters
from pliant.models.dynamic import DynamicCausalLM
from pliant.models.families import family_of
from pliant.models.graft import with_spec
from pliant.models.spec import PliantSpec

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


def load(name: str | os.PathLike, *, dtype: torch.dtype | str = "auto", **options: Any) -> DynamicCausalLM:
    """Loads a base or a pliant checkpoint as a pliant model: ``dense`` if it was never converted.

    A folder with adapters of peft gives the model that they were trained on, with the adapters active.

    Args:
        name: A directory, a hub id, or ``"smollm2-135m"``, the base that a Python package carries.
        dtype: As in ``from_pretrained``; ``"auto"`` is the checkpoint's own. Added parameters stay in fp32.
        options: Anything ``from_pretrained`` takes: ``device_map``, ``quantization_config``,
            ``attn_implementation``, ``revision``, …; for a delta also ``base``. ``edits=False`` leaves the edits that
            lie beside the weights out.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete, damaged, or a delta over the wrong base.
        ConversionError: The model belongs to no family that converts.
        ConfigError: The attention implementation is unknown or not installed.
        EditError: The edits are damaged, or of another base.
    """
    path = resolve_base(name)
    attention = options.get("attn_implementation")
    if attention is not None and attention not in ATTENTION:
        raise ConfigError(f"attn_implementation must be one of {', '.join(ATTENTION)}; got {attention!r}.")
    try:
        hub = {key: options[key] for key in HUB_OPTIONS if key in options}
        if find_adapter_config_file(path, **hub) is not None:
            return _load_adapted(path, dtype=dtype, **options)
        config = _read_config(path, **hub)
        family = family_of(config)
        if (
            not isinstance(config, family.config) or not PliantSpec.of(config).layers
        ):  # a base, whatever it was made from
            base = {"name": recorded_name(name), "revision": getattr(config, "_commit_hash", None)}
            config = with_spec(config, family.config, PliantSpec(base=base))
        return family.causal_lm.from_pretrained(path, config=config, dtype=dtype, **options)
    except OSError as error:
        raise CheckpointError(
            f"model {str(name)!r} must be a model directory or a reachable hub id: {error}"
        ) from error
    except ImportError as error:
        if attention is None or not attention.startswith("flash"):
            raise
        raise ConfigError(
            f"attn_implementation={attention!r} needs a package that is not installed: {error} "
            "Install it, or use attn_implementation='sdpa'."
        ) from error


def _load_adapted(path: str, **options: Any) -> DynamicCausalLM:
    if not is_peft_available():
        raise ConfigError(f"{path!r} holds adapters, which need peft: pip install 'pliant[peft]'")
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    if not base:
        raise CheckpointError(f"{path!r} holds adapters that name no base. Load the base, then its load_adapter.")
    model: Any = load(base, **options)
    load_adapters(model, path)
    return model


def _read_config(path: str, **hub: Any) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, **hub)
    except ValueError as error:  # no config.json in a folder, or a model type unknown to transformers
        raise CheckpointError(f"model {path!r} must hold the config.json of a known model: {error}") from error
