"""What a calibration text says about a base: second moments, from which closed-form starts are made."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from pliant.errors import DataError
from pliant.models import DynamicCausalLM
from pliant.models.placement import compute_device

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done, and how many there are."""

HELD_OUT_WINDOWS = 4
SAMPLE_WINDOWS = 8


@dataclass(frozen=True, kw_only=True)
class AttentionStatistics:
    """Second moments of the attention outputs of a base, and the text they were not taken from.

    Attributes:
        moments: Layer index → ``E[a aᵀ]`` (d_model, d_model), uncentred, in fp32.
        sample: Some of the windows that the moments were taken from, to measure sensitivities on.
        held_out: Windows kept back, to predict what a conversion costs.
    """

    moments: dict[int, Float[Tensor, "d_model d_model"]]
    sample: Int[Tensor, "sampled window"]
    held_out: Int[Tensor, "held_out window"]


def attention_statistics(
    model: PreTrainedModel,
    tokens: Int[Tensor, "windows window"],
    *,
    layers: Iterable[int],
    progress: Progress | None = None,
) -> AttentionStatistics:
    """Runs the base over ``tokens`` and returns ``E[a aᵀ]`` of the attention output a of each layer.

    The last four windows are held out. Changes of a converted model are suspended meanwhile.

    Raises:
        DataError: There are too few windows, or a moment is not finite.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2 or len(tokens) <= HELD_OUT_WINDOWS:
        raise DataError(
            f"calibration must be token windows (windows, window), more than {HELD_OUT_WINDOWS} of at least two tokens "
            f"each; got shape {tuple(tokens.shape)}. Give at least 16,384 tokens, e.g. (32, 512)."
        )
    fitted, held_out = tokens[:-HELD_OUT_WINDOWS], tokens[-HELD_OUT_WINDOWS:]
    if fitted.numel() < model.config.hidden_size:
        raise DataError(
            f"calibration must have at least {model.config.hidden_size} tokens (d_model) beside the held-out windows; "
            f"got {fitted.numel()}. With fewer, directions are missing. Give at least 16,384 tokens."
        )
    sums: dict[int, Tensor] = {}

    def accumulate(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            a = output[0].flatten(0, 1).float()  # (B·T, d)
            if index not in sums:
                sums[index] = a.new_zeros(a.shape[1], a.shape[1])
            sums[index].addmm_(a.T, a)

        return hook

    inner = model.model
    hooks = [inner.layers[i].self_attn.register_forward_hook(accumulate(i)) for i in layers]
    try:
        run_base(model, fitted, progress=progress, label="Reading calibration text")
    finally:
        for hook in hooks:
            hook.remove()
    for index, total in sums.items():
        total.div_(fitted.numel())
        if not total.isfinite().all():
            raise DataError(
                f"the attention output of layer {index} must be finite on the calibration text; it is not. "
                "Load the model in bfloat16 or float32, or check the text."
            )
    return AttentionStatistics(moments=sums, sample=fitted[:SAMPLE_WINDOWS], held_out=held_out)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Within the block every module is in evaluation mode; after it each is in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Within the block no parameter of the model takes a gradient; after it those do that did."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def base_mode(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """The model's ``base_mode()``; nothing to do for one that has not been converted yet."""
    return model.base_mode() if isinstance(model, DynamicCausalLM) else nullcontext()


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go, also when the embedding is offloaded."""
    return compute_device(model.get_input_embeddings())


@torch.no_grad()
def run_base(
    model: PreTrainedModel, tokens: Int[Tensor, "windows window"], *, progress: Progress | None, label: str
) -> None:
    """Runs the unchanged base over ``tokens``, window by window, without logits and without a cache."""
    device = input_device(model)
    with evaluating(model), base_mode(model):
        for done, window in enumerate(tokens, start=1):
            model.model(window.unsqueeze(0).to(device), use_cache=False)
            if progress is not None:
                progress(label, done, len(tokens))
