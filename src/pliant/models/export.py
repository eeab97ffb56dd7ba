"""A model for others: its edits in the weights, and where asked for its code and its card beside them."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from pliant.errors import CheckpointError, EditError
from pliant.models.checkpoint import save_tokenizer
from pliant.models.dynamic import DynamicCausalLM
from pliant.models.families import family_of
from pliant.models.ledger import is_plain, is_projection
from pliant.models.remote_code import add_remote_code, check_remote_code

CARD_NAME = "README.md"
SHOWN_FILES = 3


def export_merged(
    model: DynamicCausalLM, folder: str | os.PathLike, *, remote_code: bool = False, card: str | None = None
) -> None:
    """Saves ``model`` with its edits merged into the weights, tokenizer and generation settings included.

    A dense model becomes one of the base's own class, which loads without pliant; a converted one stays what it is.
    Merging is done in fp32 and rounded once to the weight's dtype. ``model`` itself is not changed.

    Args:
        model: A pliant model in memory, neither quantised nor adapted.
        folder: New or empty folder; it is there whole or not at all.
        remote_code: Put the code of a converted model beside its weights, so that it too loads without pliant, with
            ``trust_remote_code=True``. A dense model needs none.
        card: Text of its ``README.md``; none by default.

    Raises:
        CheckpointError: ``folder`` holds something, or ``remote_code`` does not know the architecture.
        EditError: The model's weights cannot hold its edits, or writing failed.
    """
    target = Path(folder)
    _check_destination(target)
    _check_model(model)
    if remote_code:
        check_remote_code(model)
    merged = _merged_model(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.export-"
    for leftover in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
    try:
        merged.save_pretrained(staged)
        save_tokenizer(model.config._name_or_path, staged)
        if model.spec.layers:
            _forget_path(staged / CONFIG_NAME)
            if remote_code:
                add_remote_code(staged, family_of(model.config))
        if card is not None:
            (staged / CARD_NAME).write_text(card, encoding="utf-8")
        staged.chmod(0o755)
        os.replace(staged, target)
    except (OSError, SafetensorError) as error:
        raise EditError(
            f"folder={str(folder)!r} could not be written ({error}); nothing is left there. Free some space, or choose "
            "another folder."
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _forget_path(file: Path) -> None:
    """Takes a base that is a path of this machine out of a configuration: what is exported is given away, and whole."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if os.path.isabs(config["pliant"]["base"].get("name") or ""):
        config["pliant"]["base"] = {}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_destination(folder: Path) -> None:
    if folder.is_file():
        raise CheckpointError(f"folder must be a folder; {str(folder)!r} is a file. Choose another name.")
    if folder.is_dir() and (there := sorted(entry.name for entry in folder.iterdir())):
        shown = ", ".join(there[:SHOWN_FILES]) + (", …" if len(there) > SHOWN_FILES else "")
        raise CheckpointError(
            f"folder must be new or empty; {str(folder)!r} holds {shown}. Choose another, or empty it."
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, DynamicCausalLM):
        raise EditError(f"model must be a pliant model; got {type(model).__name__}. Load it with pliant.load.")
    packed = [name for name, module in model.model.named_modules() if is_projection(module) and not is_plain(module)]
    if packed:
        raise EditError(
            f"model must have ordinary weights to hold its edits; {packed[0]} is quantised ({len(packed)} in all). "
            "Load the same base without quantization_config, put the edits on it, and export that."
        )
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise EditError("model must be without adapters; this one holds layers of peft. Merge or unload the adapter.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise EditError("model must be in memory whole; parts of it are offloaded. Load it without device_map.")


def _merged_model(model: Any) -> PreTrainedModel:
    """Returns a model that shares every tensor with ``model`` but those that edits change."""
    config, model_class = _export_class(model)
    tensors: dict[str, Tensor] = model.state_dict()
    for path in model.edits.paths:
        name = f"model.{path}.weight"
        tensors[name] = model.edits.merged(path).to(tensors[name].dtype)
        if not tensors[name].isfinite().all():
            raise EditError(
                f"{path}: the merged weight must be finite in {tensors[name].dtype}. Revert the edit on it."
            )
    with torch.device("meta"):
        merged: Any = model_class(config)
    merged.load_state_dict(tensors, assign=True)
    merged.tie_weights()
    merged.generation_config = model.generation_config
    return merged


def _export_class(model: Any) -> tuple[PreTrainedConfig, type[Any]]:
    if model.spec.layers:
        return model.config, type(model)
    family = family_of(model.config)
    left_out = ("model_type", "pliant", "architectures")
    config = family.base_config(**{k: v for k, v in model.config.to_dict().items() if k not in left_out})
    config._name_or_path = model.config._name_or_path
    config.dtype = model.dtype
    return config, family.base_causal_lm
