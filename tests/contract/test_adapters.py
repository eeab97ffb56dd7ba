"""DoRA and IA3 through the trainer: trained, resumed, saved and loaded as LoRA is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch import Tensor

import pliant
from pliant.config import RunConfig
from pliant.errors import ConfigError
from pliant.training import train
from pliant.training.checkpoints import last_checkpoint

KINDS = ("dora", "ia3")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["dense", "npt"])
def test_adapters_learn_and_load_to_the_model_that_was_trained(
    configure: Callable[..., RunConfig], prompt: Tensor, kind: str, model_type: str
) -> None:
    options = {"model": {"preset": "v1"}} if model_type == "npt" else {}
    result = train(configure(model_type=model_type, objective="causal_lm", trainable=kind, lr=5e-2, **options))
    assert result.after["eval_loss"] < result.before["eval_loss"]
    with torch.no_grad():
        expected = result.model.eval()(prompt).logits
        for load in (pliant.load, AutoPeftModelForCausalLM.from_pretrained):
            torch.testing.assert_close(load(result.best).eval()(prompt).logits, expected)
        with result.model.disable_adapter(), result.model.get_base_model().base_mode():
            base = pliant.load(result.model.get_base_model().config._name_or_path)
            torch.testing.assert_close(result.model(prompt).logits, _in_base_mode(base, prompt))


@pytest.mark.parametrize("kind", ["lora", *KINDS])
def test_adapters_stay_in_32_bit_over_a_16_bit_base(
    configure: Callable[..., RunConfig], prompt: Tensor, kind: str
) -> None:
    options = {"mixed_precision": "bf16", "lr": 5e-2}
    result = train(configure(model_type="dense", objective="causal_lm", trainable=kind, **options))
    assert result.best is not None
    loaded = pliant.load(result.best, dtype=torch.bfloat16).eval()
    kept = load_file(result.best / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    names = {"lora": "lora_", "dora": "lora_", "ia3": "ia3_"}
    adapters = {name: p for name, p in loaded.named_parameters() if names[kind] in name}
    assert adapters
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(loaded(prompt).logits, result.model.eval()(prompt).logits)


def _in_base_mode(model: Any, prompt: Tensor) -> Tensor:
    with model.eval().base_mode():
        return model(prompt).logits


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_the_method_names_is_trained(configure: Callable[..., RunConfig], kind: str) -> None:
    result = train(configure(model_type="dense", objective="causal_lm", trainable=kind, max_steps=1))
    names = [name for name, parameter in result.model.named_parameters() if parameter.requires_grad]
    parts = {"dora": ("lora_A", "lora_B", "lora_magnitude_vector"), "ia3": ("ia3_l",)}[kind]
    assert names
    assert all(any(part in name for part in parts) for name in names)
    for part in parts:
        assert any(part in name for name in names), part
    if kind == "ia3":
        assert {name.split(".ia3_l")[0].rpartition(".")[2] for name in names} == {"k_proj", "v_proj", "down_proj"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_the_unbroken_one(
    configure: Callable[..., RunConfig], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model_type": "dense", "objective": "causal_lm", "trainable": kind, "save_steps": 3}
    whole = train(configure("whole", **options))
    broken = configure("broken", **options)
    from pliant.training.trainer import PliantTrainer

    original = PliantTrainer.compute_loss

    def compute_loss(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt
        return original(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PliantTrainer, "compute_loss", compute_loss)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    assert last_checkpoint(tmp_path / "broken").name == "checkpoint-3"
    broken.training.resume = True
    resumed = train(broken)
    for (name, expected), (_, found) in zip(
        sorted(whole.model.named_parameters()), sorted(resumed.model.named_parameters()), strict=True
    ):
        assert torch.equal(expected, found), name


def test_adapters_have_no_whole_model_to_save(configure: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"training\.trainable=ia3 saves adapters"):
        configure(model_type="dense", objective="causal_lm", trainable="ia3", save_delta=False)
    with pytest.raises(ConfigError, match=r"training\.trainable must be one of .*ia3.*Did you mean 'ia3'"):
        configure(model_type="dense", objective="causal_lm", trainable="ia")
