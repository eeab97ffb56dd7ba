"""The value search of ROME and its successors: what must be added at the subject for the answer to follow."""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.consolidation.kept import Kept, state_of
from pliant.evaluation.baselines.prompts import Row, case_rows, encode, sampled_prefixes
from pliant.evaluation.baselines.states import hooks, padded, searching
from pliant.evaluation.editing.cases import EditCase
from pliant.models.edits import down_proj
from pliant.statistics import input_device

ESSENCE = "{} is a"
"""What the model says after this about the subject should stay."""

REUSED = "reused_seconds"
"""Detail of an edit: what the search took that another editor had made before."""


class FoundValues:
    """What searches found, for as long as the model stays as it is: editors that differ in the write share it."""

    def __init__(self) -> None:
        self._found: Kept[dict[object, tuple[Tensor, float]]] = Kept()

    def of(self, model: PreTrainedModel) -> dict[object, tuple[Tensor, float]]:
        """Returns δ and the seconds that it took, by what was searched for."""
        return self._found.at(model, state_of(model), dict)


@dataclass(frozen=True, kw_only=True)
class ValueSearch:
    """Settings of the search for δ, what is added to the MLP's output at the last token of the subject.

    δ minimises, by Adam, over the bare prompt and the prompt under prefixes that the model writes

        mean −log p(answer | prompt; δ)/|answer| + κ KL(p(· | e) ‖ p(· | e; δ)) + ω ‖δ‖²/s²,    e = "{subject} is a",

    with ‖δ‖ ≤ clamp · s and s the norm of what is there before. Sources: arXiv 2202.05262 (eq. 4), 2210.07229 (§4.3).

    Attributes:
        steps: Of Adam, at most.
        learning_rate: Of Adam.
        weight_decay: ω.
        kl_weight: κ.
        clamp: Largest ‖δ‖/s.
        scale: What s measures: the ``value`` that ``down_proj`` gives, or the ``hidden`` state after the layer.
        stop_below: A case whose −log p, the first term, is below this is done.
        num_prefixes: How many prefixes, beside none.
        prefix_length: Their length in tokens.
        cases_at_once: How many cases are searched for together; they do not influence one another.
        seed: Of the prefixes.
        found: Where δ is looked up and kept; without one it is searched for anew.
    """

    steps: int = 15
    learning_rate: float = 0.5
    weight_decay: float = 0.05
    kl_weight: float = 0.0625
    clamp: float = 4.0
    scale: Literal["value", "hidden"] = "value"
    stop_below: float = 0.05
    num_prefixes: int = 4
    prefix_length: int = 8
    cases_at_once: int = 8
    seed: int = 0
    found: FoundValues | None = field(default=None, repr=False, compare=False)

    def prefixes(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """The prefixes, sampled from the base."""
        return sampled_prefixes(model, tokenizer, count=self.num_prefixes, length=self.prefix_length, seed=self.seed)

    def searched(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[EditCase], layer: int
    ) -> tuple[Float[Tensor, "d_model cases"], float]:
        """Returns δ of each case at ``layer``, and the seconds that were saved because it was known."""
        known = {} if self.found is None else self.found.of(model)
        own = tuple(getattr(self, setting.name) for setting in fields(ValueSearch) if setting.repr)
        if (key := (own, layer, tuple(cases))) in known:
            return known[key]
        start = time.perf_counter()
        found = self.search(model, tokenizer, cases, layer)
        known[key] = found, time.perf_counter() - start
        return found, 0.0

    def search(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[EditCase], layer: int
    ) -> Float[Tensor, "d_model cases"]:
        """Returns δ of each case at ``layer``; the model stays as it is."""
        prefixes, found = self.prefixes(model, tokenizer), []
        for start in range(0, len(cases), self.cases_at_once):
            chunk = cases[start : start + self.cases_at_once]

            def read(active: Sequence[int], chunk: Sequence[EditCase] = chunk) -> _Suffixes:
                left = [chunk[index] for index in active]
                texts = [(ESSENCE.format(case.subject), case.subject) for case in left]
                essences = [encode(tokenizer, *text, owner=owner) for owner, text in enumerate(texts)]
                return _Suffixes(model, case_rows(tokenizer, left, prefixes), essences)

            with searching(model):
                found.append(self._descend(read, model, layer, len(chunk)))
        return torch.cat(found).T.contiguous()

    def _descend(
        self, read: Callable[[Sequence[int]], "_Suffixes"], model: PreTrainedModel, layer: int, num_cases: int
    ) -> Float[Tensor, "cases d_model"]:
        active = torch.arange(num_cases)
        suffixes = read(active.tolist())
        delta = torch.zeros(num_cases, model.config.hidden_size, device=suffixes.ids.device, requires_grad=True)
        optimiser = torch.optim.Adam([delta], lr=self.learning_rate)
        before = scale = delta.new_zeros(0)
        for step in range(self.steps):
            nll, log_p, size = suffixes.losses(model, layer, delta[active], self.scale)
            if step == 0:
                before, scale = log_p.detach(), size
            going = (nll.detach() >= self.stop_below).cpu()
            if not going.any():
                break
            kl = functional.kl_div(log_p, before[active], log_target=True, reduction="none").sum(-1)
            share = (delta[active] / scale[active, None]).square().sum(1)
            losses = nll + self.kl_weight * kl + self.weight_decay * share
            (delta.grad,) = torch.autograd.grad(losses[going].sum(), delta)
            self._step(optimiser, delta, active[going], scale)
            if 2 * going.sum() <= len(active):
                active = active[going]
                suffixes = read(active.tolist())
        return delta.detach().cpu()

    @torch.no_grad()
    def _step(
        self,
        optimiser: torch.optim.Optimizer,
        delta: Float[Tensor, "cases d_model"],
        moving: Int[Tensor, " moving"],
        scale: Float[Tensor, " cases"],
    ) -> None:
        kept = delta.detach().clone()
        optimiser.step()
        largest = (self.clamp * scale)[:, None]
        kept[moving] = (delta * (largest / delta.norm(dim=1, keepdim=True)).clamp(max=1))[moving]
        delta.copy_(kept)


class _Suffixes:
    """Rows from the last token of the subject on, over a cache of what stands before it, which no δ can change."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Row], essences: Sequence[Row]) -> None:
        device, rows = input_device(model), [*prompts, *essences]
        self.owners = torch.tensor([row.owner for row in rows], device=device)
        self.num_cases = len(essences)
        lengths = torch.tensor([row.subject for row in rows])
        ids, mask = padded(row.ids[row.subject :] for row in rows)  # (R, S)
        positions = lengths[:, None] + torch.arange(ids.shape[1])
        self.ids, self.positions, self.cache, self.mask = ids.to(device), positions.to(device), None, mask.to(device)
        if lengths.max() > 0:
            before, before_mask = padded((row.ids[: row.subject] for row in rows), left=True)  # (R, P)
            places = (before_mask.cumsum(1) - 1).clamp(min=0)
            self.mask = torch.cat((before_mask, mask), dim=1).to(device)
            with torch.no_grad():
                self.cache = model.model(
                    input_ids=before.to(device),
                    attention_mask=before_mask.to(device),
                    position_ids=places.to(device),
                    use_cache=True,
                ).past_key_values
        # Where each answer token is predicted, what it is, and how it counts in the mean of its case.
        at, targets, weights = [], [], []
        rows_per_case = len(prompts) / len(essences)
        for index, row in enumerate(prompts):
            end = len(row.ids) - row.subject
            at += [(index, place) for place in range(end - row.answer - 1, end - 1)]
            targets += row.ids[len(row.ids) - row.answer :]
            weights += [1 / (row.answer * rows_per_case)] * row.answer
        at += [(len(prompts) + i, len(row.ids) - row.subject - 1) for i, row in enumerate(essences)]
        self.at = torch.tensor(at, device=device).T
        self.targets = torch.tensor(targets, device=device)
        self.weights = torch.tensor(weights, device=device)
        self.firsts = torch.arange(self.num_cases, device=device) * int(rows_per_case)

    def losses(
        self, model: PreTrainedModel, layer: int, delta: Float[Tensor, "cases d_model"], scale: str
    ) -> tuple[Float[Tensor, " cases"], Float[Tensor, "cases vocabulary"], Float[Tensor, " cases"]]:
        """Returns NLL of the answers, log-probabilities after the essences, and the norms that δ is measured by."""
        norms: list[Tensor] = []

        def measure(_module: nn.Module, _args: Any, output: Tensor) -> None:
            norms.append(output[self.firsts.to(output.device), 0].detach().float().norm(dim=1))

        def shift(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            added = delta[self.owners].to(output)[:, None]  # (R, 1, d)
            return torch.cat((output[:, :1] + added, output[:, 1:]), dim=1)

        projection = model.model.get_submodule(down_proj(layer))
        measured = projection if scale == "value" else model.model.layers[layer]
        with hooks(measured.register_forward_hook(measure), projection.register_forward_hook(shift)):
            hidden = model.model(
                input_ids=self.ids,
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=deepcopy(self.cache),
                use_cache=self.cache is not None,
            ).last_hidden_state
        log_p = model.lm_head(hidden[self.at[0], self.at[1]]).float().log_softmax(-1)
        answers = log_p[: len(self.targets)].gather(1, self.targets[:, None])[:, 0]
        owners = self.owners[self.at[0, : len(self.targets)]]
        nll = -(answers.new_zeros(self.num_cases).index_add(0, owners, answers * self.weights))
        return nll, log_p[len(self.targets) :], norms[0].to(nll)
