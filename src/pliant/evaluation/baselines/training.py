"""Training by gradients on the answers of cases, for the editors that fine-tune."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from pliant.errors import EditError
from pliant.evaluation.baselines.prompts import Row
from pliant.evaluation.baselines.states import padded
from pliant.statistics import input_device


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of training on ``mean −log p(answer | prefix, prompt)``, a mean over the tokens of the answer.

    Attributes:
        epochs: Over all rows: each prompt, bare and under each prefix.
        rows_per_step: Rows in a mini-batch.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        stop_below: Training ends after an epoch whose mean loss is below this.
        num_prefixes: How many prefixes, beside none.
        prefix_length: Their length in tokens.
        seed: Of the prefixes, of the order of the rows and of starting values.
    """

    epochs: int = 25
    rows_per_step: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    stop_below: float = 0.05
    num_prefixes: int = 4
    prefix_length: int = 8
    seed: int = 0


def descend(
    settings: Training,
    model: PreTrainedModel,
    rows: Sequence[Row],
    parameters: Sequence[nn.Parameter | Tensor],
    after_step: Callable[[], None] = lambda: None,
) -> int:
    """Trains ``parameters`` on ``rows`` and returns how many steps it took.

    Raises:
        EditError: A loss is not finite.
    """
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    order, shuffler, steps = list(rows), random.Random(settings.seed), 0
    for _ in range(settings.epochs):
        shuffler.shuffle(order)
        total = 0.0
        for start in range(0, len(order), settings.rows_per_step):
            batch = order[start : start + settings.rows_per_step]
            loss = answer_losses(model, batch).mean()
            if not loss.isfinite():
                raise EditError(f"the training loss must be finite; got {loss.item()}. Lower the learning rate.")
            total += loss.item() * len(batch)
            if len(order) <= settings.rows_per_step and total / len(order) < settings.stop_below:
                return steps
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters)), strict=True):
                parameter.grad = gradient
            optimiser.step()
            steps += 1
            with torch.no_grad():
                after_step()
        if total / len(order) < settings.stop_below:
            break
    return steps


def answer_losses(model: PreTrainedModel, rows: Sequence[Row]) -> Float[Tensor, " rows"]:
    """Returns ``−log p(answer | what stands before it)`` of each row, a mean over the tokens of its answer."""
    device = input_device(model)
    ids, mask = padded(row.ids for row in rows)
    hidden = model.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
    at = [(i, place) for i, row in enumerate(rows) for place in range(len(row.ids) - row.answer - 1, len(row.ids) - 1)]
    index = torch.tensor(at, device=device).T
    log_p = model.lm_head(hidden[index[0], index[1]]).float().log_softmax(-1)
    targets = ids.to(device)[index[0], index[1] + 1]
    weights = torch.tensor([1 / row.answer for row in rows], device=device)[index[0]]
    chosen = log_p.gather(1, targets[:, None])[:, 0]
    return -(chosen.new_zeros(len(rows)).index_add(0, index[0], chosen * weights))
