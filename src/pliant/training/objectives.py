"""What training minimises: one function an objective, each a sum over the predicted positions of a batch.

An objective calls the *wrapped* model (DDP, FSDP, autocast) exactly as a forward pass, and takes its loss inside that
forward through ``readout``; a teacher is the same module in base mode, so that there is one copy of the weights.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pliant.config import TrainingConfig
from pliant.models import DynamicCausalLM
from pliant.statistics import evaluating
from pliant.training.readout import cross_entropy, divergence, predicted, scores, targets_of

Batch = Mapping[str, Tensor]
Sums = dict[str, Tensor]
"""Named sums over the predicted positions; ``loss`` is what is minimised."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """What an objective needs of the model in training.

    Attributes:
        wrapped: The module to call: the model, or what DDP, FSDP or autocast have put around it.
        model: The dynamic model inside.
        adapted: The peft model around ``model``, if adapters are trained.
        teacher: A second model to match in place of base mode; needed where the base itself is trained.
        config: Weights of the loss terms.
    """

    wrapped: nn.Module
    model: DynamicCausalLM
    adapted: Any
    teacher: DynamicCausalLM | None
    config: TrainingConfig

    @torch.no_grad()
    def teach(self, batch: Batch) -> Float[Tensor, "positions d_model"]:
        """Returns the teacher's last hidden states at the predicted positions."""
        mask = predicted(batch["labels"])

        def keep(_head: nn.Module, hidden: Tensor) -> Tensor:
            return hidden[mask.to(hidden.device)]

        with ExitStack() as stack:
            if self.teacher is not None:
                return self.teacher(**inputs_of(batch), readout=keep)
            stack.enter_context(evaluating(self.model))
            stack.enter_context(self.model.base_mode())
            if self.adapted is not None:
                stack.enter_context(self.adapted.disable_adapter())
            return self.wrapped(**inputs_of(batch), readout=keep)

    def teacher_head(self, own: nn.Module) -> nn.Module:
        """Returns the teacher's head, which in base mode is the student's ``own``."""
        return own if self.teacher is None else self.teacher.lm_head


Objective = Callable[[Student, Batch], Sums]


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """What the model reads: without labels, which would make it compute all logits."""
    return {name: value for name, value in batch.items() if name != "labels"}


def causal_lm(student: Student, batch: Batch) -> Sums:
    """``Σ −log p(x_t | x_<t)`` over the labelled tokens: from scratch, continued pretraining and fine-tuning."""
    mask, targets = predicted(batch["labels"]), targets_of(batch["labels"])

    def readout(head: nn.Module, hidden: Tensor) -> Tensor:
        return cross_entropy(head, hidden[mask.to(hidden.device)], targets.to(hidden.device))

    loss = student.wrapped(**inputs_of(batch), readout=readout)
    return {"loss": loss, "nll": loss.detach()}


def end_to_end(student: Student, batch: Batch) -> Sums:
    """``Σ w_kl KL(base ‖ model) + w_h · error of the last hidden state``."""
    config = student.config
    mask = predicted(batch["labels"])
    expected = student.teach(batch)

    def readout(head: nn.Module, hidden: Tensor) -> Sums:
        chosen = hidden[mask.to(hidden.device)]
        sums = {}
        if config.kl_weight:
            sums["kl"] = divergence(head, chosen, student.teacher_head(head), expected)
        if config.hidden_weight:
            sums["hidden"] = ERRORS[config.hidden_loss](chosen, expected).sum()
        return sums

    sums = student.wrapped(**inputs_of(batch), readout=readout)
    weights = {"kl": config.kl_weight, "hidden": config.hidden_weight}
    loss = reduce(torch.add, (weights[name] * value for name, value in sums.items()))
    return {"loss": loss, **{name: value.detach() for name, value in sums.items()}}


def layerwise(student: Student, batch: Batch) -> Sums:
    """``Σ mean over layers ‖ŷ − y‖²/‖y‖²``: each converted layer gets the base's own input and matches its output.

    All layers learn at once from one forward pass of the base, and no gradient runs from layer to layer.
    """
    mask = predicted(batch["labels"])
    with _matching(student.model, mask) as errors, student.model.base_mode():

        def readout(_head: nn.Module, _hidden: Tensor) -> Tensor:
            return torch.stack([error.to(errors[0].device) for error in errors]).mean()

        error = student.wrapped(**inputs_of(batch), readout=readout)
    return {"loss": error, "layer_error": error.detach()}


@contextmanager
def _matching(model: DynamicCausalLM, mask: Tensor) -> Iterator[list[Tensor]]:
    """Within the block each converted layer, after its base forward, also runs dynamically on the same input."""
    errors: list[Tensor] = []

    def match(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Tensor) -> None:
        if layer.active:  # this hook's own call
            return
        detached = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
        layer.active = True
        try:
            found = layer(*detached, **kwargs)
        finally:
            layer.active = False
        chosen = mask.to(found.device)
        errors.append(normalised_error(found[chosen], expected.detach()[chosen]).sum())

    handles = [layer.register_forward_hook(match, with_kwargs=True) for layer in model.dynamic_layers.values()]
    try:
        yield errors
    finally:
        for handle in handles:
            handle.remove()


def normalised_error(
    found: Float[Tensor, "positions d"], expected: Float[Tensor, "positions d"]
) -> Float[Tensor, " positions"]:
    """``‖found − expected‖²/‖expected‖²`` a position, in fp32: a plain error would see only the largest activations."""
    energy = expected.float().pow(2).sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (found.float() - expected.float()).pow(2).sum(-1) / energy


def plain_error(
    found: Float[Tensor, "positions d"], expected: Float[Tensor, "positions d"]
) -> Float[Tensor, " positions"]:
    """``mean over features (found − expected)²`` a position, in fp32."""
    return (found.float() - expected.float()).pow(2).mean(-1)


ERRORS = {"normalised": normalised_error, "mse": plain_error}

OBJECTIVES: dict[str, Objective] = {
    "layerwise": layerwise,
    "end_to_end": end_to_end,
    "causal_lm": causal_lm,
    "sft": causal_lm,
}


@torch.no_grad()
def evaluation_scores(
    student: Student, batch: Batch, *, beside_base: bool
) -> tuple[Float[Tensor, "batch scores"], Float[Tensor, " batch"]]:
    """Sums of :func:`scores` over the predicted positions of each row, and how many positions a row has."""
    mask, targets = predicted(batch["labels"]), targets_of(batch["labels"])
    expected = student.teach(batch) if beside_base else None

    def readout(head: nn.Module, hidden: Tensor) -> Tensor:
        teacher = None if expected is None else (student.teacher_head(head), expected)
        return scores(head, hidden[mask.to(hidden.device)], targets.to(hidden.device), teacher)

    values = student.wrapped(**inputs_of(batch), readout=readout)
    row_of = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[mask]
    values = values.to(mask.device)
    sums = values.new_zeros(len(mask), values.shape[1]).index_add_(0, row_of, values)
    return sums, mask.sum(-1).float()
