"""Groups of parameters by component, and schedules that begin anew with each stage."""

import pytest
import torch
from torch import nn

from pliant.architectures import AddedModule
from pliant.config import LrMultipliers, TrainingConfig
from pliant.errors import ConfigError
from pliant.training.optim import Stage, freeze_idle, parameter_groups, schedule, share_of_lr, stage_at


class Router(AddedModule):
    """An added module of another component."""

    component = "router"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))


class Plastic(AddedModule):
    """An added module with a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(2, 2))
        self.bias = nn.Parameter(torch.zeros(2))


def model() -> nn.Module:
    return nn.ModuleDict({"base": nn.Linear(2, 2), "router": Router(), "plastic": Plastic()})


def test_components_have_rates_of_their_own_and_vectors_no_decay() -> None:
    multipliers = LrMultipliers(base_model=0.1, router=10.0, modulation=2.0)
    groups = parameter_groups(model(), TrainingConfig(lr=1e-2, weight_decay=0.3, lr_multipliers=multipliers))
    found = {(g["component"], g["weight_decay"]): (g["lr"], sum(p.numel() for p in g["params"])) for g in groups}
    assert found == {
        ("base_model", 0.0): (pytest.approx(1e-3), 2),
        ("base_model", 0.3): (pytest.approx(1e-3), 4),
        ("modulation", 0.0): (pytest.approx(2e-2), 2),
        ("modulation", 0.3): (pytest.approx(2e-2), 4),
        ("router", 0.3): (pytest.approx(1e-1), 4),
    }


def test_a_multiplier_of_zero_leaves_a_component_out() -> None:
    subject, config = model(), TrainingConfig(lr_multipliers=LrMultipliers(base_model=0.0))
    freeze_idle(subject, config)
    assert [name for name, p in subject.named_parameters() if not p.requires_grad] == ["base.weight", "base.bias"]
    groups = parameter_groups(subject, config)
    assert {g["component"] for g in groups} == {"modulation", "router"}
    frozen = model().requires_grad_(False)
    with pytest.raises(ConfigError, match="must leave something to train"):
        parameter_groups(frozen, TrainingConfig())


STAGES = (Stage(name="layerwise", start=0, end=10), Stage(name="end_to_end", start=10, end=30))


@pytest.mark.parametrize(
    ("scheduler", "middle", "last"), [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0)]
)
def test_each_stage_warms_up_and_comes_down(scheduler: str, middle: float, last: float) -> None:
    config = TrainingConfig(lr_scheduler=scheduler, warmup_steps=4)
    shares = [share_of_lr(config, STAGES, step) for step in range(31)]
    assert shares[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert shares[10:14] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert shares[4] == shares[14] == 1.0
    assert shares[7] == pytest.approx(middle)
    assert shares[22] == pytest.approx(middle)
    assert shares[30] == pytest.approx(last)


def test_a_warmup_longer_than_the_run_does_not_divide_by_nothing() -> None:
    config = TrainingConfig(warmup_steps=1_000)
    assert 0 < share_of_lr(config, STAGES[:1], 9) < 1


def test_the_schedule_multiplies_every_group() -> None:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [w], "lr": lr} for w, lr in zip(weights, (1.0, 10.0), strict=True)])
    scheduler = schedule(optimizer, TrainingConfig(lr_scheduler="constant", warmup_steps=1), STAGES)
    assert scheduler.get_last_lr() == [0.5, 5.0]


def test_stages_follow_one_another() -> None:
    assert [stage_at(STAGES, step).name for step in (0, 9, 10, 29, 30, 99)] == ["layerwise"] * 2 + ["end_to_end"] * 4
