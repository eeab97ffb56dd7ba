"""Parameter groups by component, and a schedule that starts anew with every stage."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from pliant.architectures import AddedModule
from pliant.config import TrainingConfig
from pliant.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run with an objective of its own, from optimizer step ``start`` up to ``end``."""

    name: str
    start: int
    end: int


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Returns the trainable parameters by component, matrices with weight decay and vectors without.

    A component is what :class:`AddedModule` says it is; all else, adapters of peft included, is ``base_model``.

    Raises:
        ConfigError: Nothing is left to train.
    """
    multipliers = asdict(config.lr_multipliers)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for component, parameter in _by_component(model):
        if parameter.requires_grad:
            groups.setdefault((component, parameter.ndim >= 2), []).append(parameter)
    if not groups:
        raise ConfigError(
            "training.trainable and training.lr_multipliers must leave something to train; nothing is left. "
            "Raise a multiplier above 0."
        )
    return [
        {
            "params": parameters,
            "lr": config.lr * multipliers[component],
            "weight_decay": config.weight_decay if decays else 0.0,
            "component": component,
        }
        for (component, decays), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def freeze_idle(model: nn.Module, config: TrainingConfig) -> None:
    """Freezes the components whose learning rate is multiplied by 0, so that their gradients clip nobody else's."""
    multipliers = asdict(config.lr_multipliers)
    for component, parameter in _by_component(model):
        if multipliers[component] == 0:
            parameter.requires_grad_(False)


def _by_component(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    component_of = {
        id(parameter): module.component
        for module in model.modules()
        if isinstance(module, AddedModule)
        for parameter in module.parameters()
    }
    for parameter in model.parameters():
        yield component_of.get(id(parameter), "base_model"), parameter


def schedule(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, stages: Sequence[Stage]
) -> torch.optim.lr_scheduler.LambdaLR:
    """Returns the schedule: in each stage a linear warmup, then cosine, linear or constant down to the stage's end."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share_of_lr, config, tuple(stages)))


def share_of_lr(config: TrainingConfig, stages: Sequence[Stage], step: int) -> float:
    """Share of the learning rate at optimizer step ``step``, in 0..1."""
    stage = stage_at(stages, step)
    done, total, warmup = step - stage.start, stage.end - stage.start, min(config.warmup_steps, stage.end - stage.start)
    if done < warmup:
        return (done + 1) / (warmup + 1)
    left = max(0.0, 1 - (done - warmup) / max(1, total - warmup))
    shapes = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left)))}
    return shapes[config.lr_scheduler]


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that optimizer step ``step`` belongs to; the last one after the end."""
    return next((stage for stage in stages if step < stage.end), stages[-1])
