"""Training over quantised, placed and half-precision bases: what is trained stays fp32, and deltas load elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

import pliant
from pliant.config import RunConfig
from pliant.training import train

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture
def wide(configure: Callable[..., RunConfig], tmp_path: Path, make_base: Callable[..., Any], tokenizer: Any) -> Any:
    """As ``configure``, over a base whose matrices are large enough for blocks of 64 to be quantised."""
    base = make_base("llama", hidden_size=64, intermediate_size=128)
    base.to(torch.bfloat16).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")

    def make(*args: Any, model: dict[str, Any] | None = None, **options: Any) -> RunConfig:
        config = configure(*args, model=model, **options)
        config.model.base_model_name = str(tmp_path / "wide")
        return config

    return make


@pytest.mark.parametrize("preset", ["keyed", "v2"])
def test_nf4_trains_and_its_delta_loads_over_either_base(wide: Any, preset: str) -> None:
    pytest.importorskip("bitsandbytes")
    config = wide(model={"preset": preset, "quantization": "nf4"}, mixed_precision="bf16", max_steps=12)
    result = train(config)
    assert result.after["eval_kl"] < result.before["eval_kl"]
    parameters = dict(result.model.dynamic_parameters())
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    quantised = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)
    for options in ({"quantization_config": quantised}, {}):
        loaded = pliant.load(result.checkpoint, dtype=torch.bfloat16, **options)
        for name, parameter in loaded.dynamic_parameters():
            assert torch.equal(parameter, parameters[name]), name


def test_int8_trains(wide: Any) -> None:
    pytest.importorskip("bitsandbytes")
    result = train(wide(model={"preset": "v2", "quantization": "int8"}, mixed_precision="bf16", max_steps=6))
    assert result.after["eval_kl"] < result.before["eval_kl"]


def test_a_bfloat16_base_has_fp32_modulation_and_the_same_delta_after_reload(wide: Any) -> None:
    result = train(wide(mixed_precision="bf16"))
    assert result.model.dtype == torch.bfloat16
    loaded = pliant.load(result.checkpoint)
    assert loaded.dtype == torch.bfloat16
    for (name, a), (_, b) in zip(result.model.dynamic_parameters(), loaded.dynamic_parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b), name


def test_a_trained_base_stays_fp32_under_autocast(configure: Callable[..., RunConfig]) -> None:
    result = train(configure(objective="causal_lm", trainable="all", mixed_precision="bf16"))
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    assert result.after["eval_loss"] < result.before["eval_loss"]


def test_a_device_map_places_the_base(configure: Callable[..., RunConfig]) -> None:
    placed = train(configure("placed", model={"device_map": "auto"}))
    plain = train(configure("plain"))
    for (name, a), (_, b) in zip(placed.model.dynamic_parameters(), plain.model.dynamic_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("preset", ["keyed", "v2"])
def test_recomputed_activations_give_the_same_run(configure: Callable[..., RunConfig], preset: str) -> None:
    options = {"model": {"preset": preset}, "use_regularization": True}
    kept = train(configure("kept", **options))
    recomputed = train(configure("recomputed", gradient_checkpointing=True, **options))
    for (name, a), (_, b) in zip(kept.model.dynamic_parameters(), recomputed.model.dynamic_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
