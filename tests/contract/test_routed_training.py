"""Training of routed models: what learns, what the log says, schedules, resuming, packing and checkpointing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import pliant
from pliant.config import RunConfig
from pliant.conversion import cheapest_layers
from pliant.conversion.routed import CALIBRATION_TOKENS
from pliant.data import calibration_tokens
from pliant.errors import ConfigError
from pliant.training import train
from pliant.training.callbacks import routing_at

ARCHITECTURES = ("mod", "dtf", "stt")
TOLERANCE = 1e-5
HEALTH = ("capacity", "gate", "score_spread", "agreement", "router_loss")


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def thresholds(model: PreTrainedModel) -> list[float]:
    return [float(layer.router.threshold) for layer in model.routed_layers.values()]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_training_lowers_the_loss_and_logs_the_health_of_the_router(
    configure: Callable[..., RunConfig], tmp_path: Path, model_type: str
) -> None:
    config = configure(model_type=model_type, objective="causal_lm", trainable="all", max_steps=24)
    result = train(config)
    assert result.after["eval_loss"] < result.before["eval_loss"]
    lines = [line for line in log_of(tmp_path / "run") if "capacity" in line]
    assert lines
    for line in lines:
        assert all(name in line for name in HEALTH)
        assert line["capacity"] == pytest.approx(0.5, abs=0.05)
        assert 0 <= line["agreement"] <= 1
        assert line["score_spread"] > 0
    assert 0 < result.after["routing_capacity/mean"] < 1


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_layers_that_are_cheapest_to_skip_are_trained(configure: Callable[..., RunConfig], model_type: str) -> None:
    config = configure(model_type=model_type, model={"layers": "cheapest"}, max_steps=1)
    base = pliant.load(config.model.base_model_name)
    tokenizer, text = AutoTokenizer.from_pretrained(config.model.base_model_name), Path(str(config.model.calibration))
    tokens = calibration_tokens(tokenizer, text, num_tokens=min(CALIBRATION_TOKENS, config.model.calibration_tokens))
    expected = cheapest_layers(base, config.model.routed(model_type), calibration=tokens)
    loaded = pliant.load(train(config).checkpoint)
    assert list(loaded.routed_layers) == expected


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_router_alone_is_trained_towards_the_base(configure: Callable[..., RunConfig], model_type: str) -> None:
    config = configure(model_type=model_type, lr=1e-2)
    result = train(config)
    untouched, tuned = pliant.load(config.model.base_model_name), result.model
    added = {name for name, _ in tuned.dynamic_parameters()}
    base = dict(untouched.named_parameters())
    assert all(torch.equal(value, base[name]) for name, value in tuned.named_parameters() if name not in added)
    assert (result.checkpoint / "pliant_delta.safetensors").exists()
    loaded = pliant.load(result.checkpoint)
    for layer, other in zip(tuned.routed_layers.values(), loaded.routed_layers.values(), strict=True):
        assert torch.equal(layer.router.threshold, other.router.threshold)
        assert layer.router.threshold.isfinite()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_resumed_run_equals_the_unbroken_one(
    configure: Callable[..., RunConfig], tmp_path: Path, model_type: str
) -> None:
    options: dict[str, Any] = {
        "model_type": model_type,
        "objective": "causal_lm",
        "trainable": "all",
        "save_steps": 3,
        "save_total_limit": 9,
        "capacity_anneal_fraction": 0.5,
        "gate_anneal_fraction": 0.0 if model_type == "stt" else 0.5,
        "threshold_fraction": 0.25,
    }
    whole = train(configure("whole", **options))
    for folder in ("checkpoint-6", "checkpoint-8", "checkpoint-best"):
        (tmp_path / "whole" / folder).rename(tmp_path / folder)
    broken = configure("whole", **options, resume=True)
    resumed = train(broken)
    for (name, expected), (_, found) in zip(
        sorted(whole.model.state_dict().items()), sorted(resumed.model.state_dict().items()), strict=True
    ):
        assert torch.equal(expected, found), name
    assert whole.model.config.pliant == resumed.model.config.pliant
    later = configure("whole", **{**options, "capacity_anneal_fraction": 0.25}, resume=True)
    with pytest.raises(ConfigError, match=r"training.capacity_anneal_fraction must be what .*0\.5; got 0\.25"):
        train(later)


def test_schedules_lower_the_capacity_raise_the_gate_and_end_by_the_threshold(
    configure: Callable[..., RunConfig],
) -> None:
    run = configure(
        model_type="mod",
        model={"capacity_gamma": 0.25},
        capacity_anneal_fraction=0.5,
        gate_anneal_fraction=0.25,
        threshold_fraction=0.1,
    )
    steps = 100
    at = {step: routing_at(run, step, steps) for step in (0, 25, 49, 50, 89, 90, 100)}
    assert at[0].capacity_gamma == 1
    assert at[0].gate_share == 0
    assert 0.25 < at[25].capacity_gamma < 1
    assert at[25].gate_share == 1
    assert at[49].capacity_gamma > at[50].capacity_gamma == at[100].capacity_gamma == 0.25
    assert [at[step].by_threshold for step in (0, 89, 90, 100)] == [False, False, True, True]


def test_the_saved_model_routes_as_the_schedules_ended(configure: Callable[..., RunConfig]) -> None:
    config = configure(
        model_type="mod",
        objective="causal_lm",
        trainable="all",
        capacity_anneal_fraction=0.5,
        gate_anneal_fraction=1.0,
    )
    loaded = pliant.load(train(config).checkpoint)
    for layer in loaded.routed_layers.values():
        assert layer.layer_config.capacity_gamma == 0.5
        assert layer.layer_config.gate_share == 1.0


@torch.no_grad()
def test_packed_documents_are_routed_as_each_alone(
    routed_kind: str, family: str, make_routed: Callable[..., PreTrainedModel], prompt: Tensor, largest_difference: Any
) -> None:
    model = make_routed(routed_kind, family)
    packed, length = prompt.reshape(1, -1), prompt.shape[1]
    positions = torch.arange(length).repeat(2)[None]
    found = model(packed, position_ids=positions, use_cache=False).logits
    expected = torch.cat([model(row[None], use_cache=False).logits for row in prompt], dim=1)
    assert largest_difference(found, expected) < TOLERANCE


@torch.no_grad()
def test_full_capacity_runs_every_token_whatever_the_threshold_was(
    make_routed: Callable[..., PreTrainedModel], prompt: Tensor
) -> None:
    model, mask = make_routed("mod"), torch.ones_like(prompt)
    mask[1, :4] = 0
    model.set_routing(capacity_gamma=1.0)
    with model.report() as report:
        model(prompt, attention_mask=mask, use_cache=False)
    assert all(torch.equal(layer.routing.runs, mask.bool()) for layer in report.layers.values())


@pytest.mark.parametrize("by_threshold", [False, True])
def test_gradients_are_the_same_under_checkpointing(
    routed_kind: str,
    by_threshold: bool,
    make_routed: Callable[..., PreTrainedModel],
    checkpoint_activations: Callable[..., None],
    prompt: Tensor,
) -> None:
    gradients, after = [], []
    for checkpointed in (False, True):
        model = make_routed(routed_kind).train()
        for layer in model.routed_layers.values():
            layer.by_threshold = by_threshold
        if checkpointed:
            checkpoint_activations(model)
        before = thresholds(model)
        with model.report() as report:
            loss = model(prompt, labels=prompt, use_cache=False).loss + report.regulariser()
            loss.backward()
        assert thresholds(model) == before
        model.model(prompt, use_cache=False)
        after.append(thresholds(model))
        assert after[-1] != before
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert after[0] == after[1]
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], expected, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_every_added_parameter_has_a_gradient(
    routed_kind: str, make_routed: Callable[..., PreTrainedModel], prompt: Tensor
) -> None:
    model = make_routed(routed_kind).train()
    with model.report() as report:
        (model(prompt, labels=prompt, use_cache=False).loss + report.regulariser()).backward()
    for name, parameter in model.dynamic_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model": {"prior_factor": 0.1}}, "prior_factor"),
        ({"model": {"capacity_gamma": 0.0}}, "capacity_gamma"),
        ({"model": {"capacity_gamma": 1.5}}, "capacity_gamma"),
        ({"model": {"granularity": "head"}}, "granularity"),
        ({"model": {"adapter_rank": 8}}, "adapter_rank"),
        ({"model": {"layers": {"0-1": "v1"}}}, "layers"),
        ({"use_regularization": True}, "use_regularization"),
        ({"threshold_fraction": 1.5}, "threshold_fraction"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_read(
    configure: Callable[..., RunConfig], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        configure(model_type="mod", **options)


@pytest.mark.parametrize("architecture", ["dtf", "stt"])
def test_what_has_a_memory_of_its_own_routes_no_mlp_alone(
    configure: Callable[..., RunConfig], architecture: str
) -> None:
    with pytest.raises(ConfigError, match="granularity must be one of block, attention; got 'mlp'"):
        configure(model_type=architecture, model={"granularity": "mlp"})


@pytest.mark.parametrize("option", ["capacity_gamma", "criteria", "granularity"])
def test_options_of_routed_layers_are_refused_for_plastic_ones(
    configure: Callable[..., RunConfig], option: str
) -> None:
    value = 0.5 if option == "capacity_gamma" else "block"
    with pytest.raises(ConfigError, match=option):
        configure(model={option: value})
