"""Where a module computes, also when its weights are offloaded."""

import torch
from accelerate.hooks import SequentialHook
from torch import nn


def compute_device(module: nn.Module) -> torch.device:
    """Returns the device of the module's own parameters, or the one that they are brought to for its forward."""
    parameter = next(module.parameters())
    if parameter.device.type != "meta":
        return parameter.device
    hook = vars(module).get("_hf_hook")
    for part in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.device("cpu")
