"""LoRA of peft on top of a converted model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


def with_lora(model: nn.Module, **options: Any) -> nn.Module:
    """Puts LoRA on attention and MLP, with the same factors every time, none of them zero."""
    config = peft.LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def test_forward_backward_and_generation_work_under_lora(
    form: str, family: str, make_converted: Callable, prompt: Tensor
) -> None:
    model = make_converted(form, family)
    plain = model(prompt).logits.detach()
    wrapped = with_lora(model)
    assert not torch.allclose(wrapped(prompt).logits, plain, atol=0.01)
    produced = wrapped.generate(input_ids=prompt, max_new_tokens=3, do_sample=False)
    uncached = wrapped(produced[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(produced[:, prompt.shape[1] :], uncached[:, prompt.shape[1] - 1 :])
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(prompt).logits, plain)
    wrapped.train()(input_ids=prompt, labels=prompt).loss.backward()
    trained = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert sum("gate_proj" in name for name in trained) == 6
    for name, gradient in trained.items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name


def test_base_mode_keeps_the_adapter(form: str, make_base: Callable, make_converted: Callable, prompt: Tensor) -> None:
    expected = with_lora(make_base())(prompt).logits
    wrapped = with_lora(make_converted(form))
    with wrapped.get_base_model().base_mode():
        assert torch.equal(wrapped(prompt).logits, expected)
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(prompt).logits, make_base()(prompt).logits)
    assert not torch.allclose(wrapped(prompt).logits, expected, atol=0.01)


def test_adapter_reloads_bitwise(
    form: str, make_base: Callable, convert_randomly: Callable, prompt: Tensor, tmp_path: Path
) -> None:
    make_base().save_pretrained(tmp_path / "base")
    model = convert_randomly(pliant.load(tmp_path / "base"), form)
    model.save_pretrained(tmp_path / "full")
    wrapped = with_lora(model)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(pliant.load(tmp_path / "full"), tmp_path / "adapter")
    assert torch.equal(again.eval()(prompt).logits, wrapped(prompt).logits)


def test_modules_to_save_trains_and_saves_the_modulation(
    form: str, make_base: Callable, convert_randomly: Callable, prompt: Tensor, tmp_path: Path
) -> None:
    make_base().save_pretrained(tmp_path / "base")
    model = convert_randomly(pliant.load(tmp_path / "base"), form)
    model.save_pretrained(tmp_path / "full")
    wrapped = with_lora(model, modules_to_save=["plastic"]).train()
    trainable = {n: p for n, p in wrapped.named_parameters() if p.requires_grad and "plastic" in n}
    assert trainable
    before = {n: p.detach().clone() for n, p in trainable.items()}
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    wrapped(input_ids=prompt, labels=prompt).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in trainable.items())
    wrapped.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(pliant.load(tmp_path / "full"), tmp_path / "adapter")
    assert torch.equal(again.eval()(prompt).logits, wrapped(prompt).logits)


def test_merged_adapter_leaves_a_pliant_model(
    form: str, make_converted: Callable, prompt: Tensor, largest_difference: Callable
) -> None:
    wrapped = with_lora(make_converted(form))
    expected = wrapped(prompt).logits
    merged = wrapped.merge_and_unload()
    assert type(merged) is type(make_converted(form))
    assert largest_difference(merged(prompt).logits, expected) < 1e-5
