"""What bitsandbytes does to weights on a CPU, and what then no longer works."""

from collections.abc import Callable

from torch import nn

_REPACKS = "support_avx512bf16_for_cpu"
"""bitsandbytes 0.50: whether a 4-bit layer repacks its weights at the first forward without gradients."""


def keep_packing(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for inference on a processor with AVX512-BF16.

    Repacked weights have no gradient, and cannot be saved: what their scales are turned back into is not what they
    were. As they are, reading a prompt is faster and writing token by token slower.
    """
    for module in model.modules():
        if _REPACKS in vars(module):
            setattr(module, _REPACKS, False)


def repacking(model: nn.Module) -> str | None:
    """Returns the name of a 4-bit layer on a CPU that repacks its weights; None if there is none."""
    return _first_on_a_cpu(model, lambda module: vars(module).get(_REPACKS, False))


def without_gradient(model: nn.Module) -> str | None:
    """Returns the name of a quantised layer on a CPU that passes no gradient on; None if there is none."""
    return repacking(model) or _first_on_a_cpu(model, lambda module: type(module).__name__ == "Linear8bitLt")


def _first_on_a_cpu(model: nn.Module, holds: Callable[[nn.Module], bool]) -> str | None:
    for name, module in model.named_modules():
        if holds(module) and next(module.parameters()).device.type == "cpu":
            return name
    return None
