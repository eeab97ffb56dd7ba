"""How routing goes on in training: its schedules, and whether the router is well."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from pliant.architectures import LayerReport
from pliant.config import RunConfig
from pliant.models import DynamicCausalLM
from pliant.models.dynamic import follow_thresholds

logger = logging.getLogger(__name__)

LEVELS = 16
"""Steps of a schedule: each capacity is another shape to compile."""
SMALLEST_SPREAD = 1e-4
"""Standard deviation of the scores, beside their size, below which routing is as good as constant."""
LARGEST_MISS = 0.25
"""Difference between the capacity under the threshold and the one that is aimed at."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How tokens are routed at one step; ``None`` leaves a field of the layers as it is."""

    capacity_gamma: float | None
    gate_share: float | None
    by_threshold: bool


def routing_at(run: RunConfig, step: int, steps: int) -> Routing:
    """Returns how tokens are routed at optimizer step ``step``, counted from 0, of ``steps``."""
    training, model = run.training, run.model
    capacity, share = model.capacity_gamma, model.gate_share
    if model.checkpoint_path is None:
        settled = model.routed(run.model_type)
        capacity, share = settled.capacity_gamma, settled.gate_share
    if capacity is not None:
        capacity = 1 + _level(step, training.capacity_anneal_fraction * steps) * (capacity - 1)
    if share is not None and training.gate_anneal_fraction:
        share += _level(step, training.gate_anneal_fraction * steps) * (1 - share)
    by_threshold = bool(training.threshold_fraction) and step >= steps * (1 - training.threshold_fraction)
    return Routing(capacity_gamma=capacity, gate_share=share, by_threshold=by_threshold)


def _level(step: int, length: float) -> float:
    """The share of the way that is gone after ``step`` of ``length`` steps, in sixteenths."""
    return 1.0 if step >= length else int(step / length * LEVELS) / LEVELS


def route_by(model: DynamicCausalLM, routing: Routing) -> None:
    """Routes tokens so from now on, by thresholds that have followed every batch so far."""
    follow_thresholds(model.routed_layers.values())
    wanted = {"capacity_gamma": routing.capacity_gamma, "gate_share": routing.gate_share}
    fields = {name: value for name, value in wanted.items() if value is not None}
    for layer in model.routed_layers.values():
        layer.by_threshold = routing.by_threshold
    if any(getattr(layer.layer_config, n) != v for layer in model.routed_layers.values() for n, v in fields.items()):
        model.set_routing(**fields)


@torch.no_grad()
def routing_sums(
    model: DynamicCausalLM, reports: Mapping[int, LayerReport], mask: Bool[Tensor, "batch seq"]
) -> dict[str, Tensor]:
    """Returns sums over the tokens of ``mask`` of what routing did, each a mean over layers.

    ``capacity`` is the share that ran, ``gate`` the mean gate, ``score_spread`` the standard deviation of the scores of
    a row, and ``agreement`` the share of tokens for which the threshold says what training did.
    """
    sums: dict[str, Tensor] = {}
    for index, report in reports.items():
        routing = report.routing
        if routing is None:
            continue
        chosen = mask.to(routing.runs.device)
        scores, runs, counts = routing.scores.float(), routing.runs, chosen.sum(1)
        mean = (scores * chosen).sum(1) / counts.clamp(min=1)
        variance = ((scores - mean[:, None]).square() * chosen).sum(1) / counts.clamp(min=1)
        agrees = (scores >= model.model.layers[index].router.threshold) == runs
        found = {
            "capacity": (runs & chosen).sum(),
            "gate": (routing.gate.float() * chosen).sum(),
            "score_spread": (variance.sqrt() * counts).sum(),
            "agreement": (agrees & chosen).sum(),
        }
        for name, value in found.items():
            value = value.to(mask.device) / len(model.routed_layers)
            sums[name] = sums[name] + value if name in sums else value
    return sums


def warn_if_unwell(model: DynamicCausalLM, reports: Mapping[int, LayerReport], step: int) -> None:
    """Warns of layers whose scores hardly differ, or whose threshold lets far too many or too few tokens run."""
    for index, report in reports.items():
        routing, layer = report.routing, model.model.layers[index]
        if routing is None or layer.capacity >= 1:
            continue
        spread, size = routing.scores.float().std().item(), routing.scores.float().abs().mean().item()
        share = routing.runs.float().mean().item()
        if spread <= SMALLEST_SPREAD * size:
            logger.warning(
                "step %d: the router of layer %d gives every token the same score (spread %.2g); raise "
                "training.lr_multipliers.router, or lower training.lr",
                *(step, index, spread),
            )
        elif abs(share - layer.capacity) > LARGEST_MISS:
            logger.warning(
                "step %d: layer %d lets %.0f %% of the tokens run where %.0f %% are aimed at; give the threshold more "
                "steps, or run pliant calibrate",
                *(step, index, 100 * share, 100 * layer.capacity),
            )
