"""Makes a loaded base a pliant model in place, without a second copy of its weights.

The pliant class is built on the meta device, takes over the base's own child modules, and then hands its class and
attributes to the caller's object. Every object that held weights, hooks or quantised state before holds them after.
"""

from types import MethodType

import torch
from accelerate.hooks import add_hook_to_module
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pliant.architectures import AddedModule
from pliant.models.placement import compute_device
from pliant.models.spec import PliantSpec

CAPTURE_FLAG = "_output_capturing_hooks_installed"
CAPTURE_HOOK = "install_output_capuring_hook"  # transformers' own spelling
HOOK_ATTRIBUTES = ("_hf_hook", "_old_forward", "forward")


def with_spec(config: PreTrainedConfig, config_class: type[PreTrainedConfig], spec: PliantSpec) -> PreTrainedConfig:
    """Returns ``config`` as the pliant configuration of its family, carrying ``spec``."""
    fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "pliant", "quantization_config")}
    fields["pliant"] = spec.to_dict()
    new = config_class(**fields)
    for name in ("_name_or_path", "_commit_hash", "_attn_implementation", "quantization_config"):
        if name in vars(config) or name == "_attn_implementation":
            setattr(new, name, getattr(config, name))
    return new


def install(model: PreTrainedModel, target: type[PreTrainedModel], spec: PliantSpec) -> None:
    """Turns ``model`` into a ``target`` with the layers of ``spec``; new parameters get their start values.

    Args:
        model: A base model, or a pliant model whose converted layers are a part of ``spec``.
        target: The pliant causal LM class of the model's family.
        spec: Architecture, layers and base.
    """
    assert target.config_class is not None
    config = with_spec(model.config, target.config_class, spec)
    with torch.device("meta"):
        skeleton = target(config)
    _remove_capture_hooks(model)
    inner, new_inner = model.model, skeleton.model
    layers = [_take_over(old, new) for old, new in zip(inner.layers, new_inner.layers, strict=True)]
    for index, layer in enumerate(layers):
        inner.layers[index] = layer
    for old, new in ((inner, new_inner), (model, skeleton)):
        _adopt(old, new)
    inner.connect_layers()
    old_config = {id(model.config), id(inner.config)}
    for module in model.modules():
        if id(vars(module).get("config")) in old_config:
            vars(module)["config"] = config


def _take_over(old: nn.Module, new: nn.Module) -> nn.Module:
    """Returns the layer to use: ``old`` where nothing changes, else ``new`` with the children of ``old``."""
    if type(old) is type(new):
        return old
    hook = vars(old).get("_hf_hook")
    device = compute_device(old.get_submodule("input_layernorm"))
    for name, child in new.named_children():
        if isinstance(child, AddedModule):
            child.to_empty(device=device)
            child.reset_parameters()
        else:
            setattr(new, name, getattr(old, name))
    for name, value in vars(old).items():
        is_kept = not name.startswith("_") or name == "_gradient_checkpointing_func" or "_hook" in name
        if is_kept and name not in HOOK_ATTRIBUTES:  # hooks of torch go along; accelerate's is put on anew
            vars(new)[name] = value
    new.train(old.training)
    if hook is not None:
        add_hook_to_module(new, hook)
    return new


def _adopt(old: nn.Module, new: nn.Module) -> None:
    """Gives ``old`` the class of ``new`` and what its constructor derived, and keeps all its other state."""
    old.__class__ = new.__class__
    if "_old_forward" in vars(old):  # accelerate's hook calls the forward that it found
        vars(old)["_old_forward"] = MethodType(type(new).forward, old)
    for name, value in vars(new).items():
        if name not in vars(old) or name in ("_no_split_modules", "_keep_in_fp32_modules_strict"):
            setattr(old, name, value)


def _remove_capture_hooks(model: nn.Module) -> None:
    """Removes the hooks by which transformers collects hidden states; it puts them back when next needed.

    Left in place they would sit on layers that are gone, or count grafted attentions twice.
    """
    for module in model.modules():
        vars(module).pop(CAPTURE_FLAG, None)
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__qualname__", "").startswith(CAPTURE_HOOK):
                del module._forward_hooks[key]
