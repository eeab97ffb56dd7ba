"""What a call leaves behind: hooks kept, modes restored, nothing counted twice, nothing dropped in silence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pliant
from pliant.conversion.allocation import share_ranks, truncation_costs
from pliant.conversion.closed_form import spectrum
from pliant.errors import CheckpointError, ConfigError, ConversionError
from pliant.metrics import compare_to_base
from pliant.statistics import AttentionStatistics, attention_statistics

preset = pliant.NptConfig.preset


def test_hooks_on_a_layer_survive_conversion_and_can_be_removed(make_base: Callable, prompt: Tensor) -> None:
    model, calls = make_base(), []
    handle = model.model.layers[1].register_forward_hook(lambda *_: calls.append("after"))
    model.model.layers[1].register_forward_pre_hook(lambda *_: calls.append("before"))
    pliant.convert(model, preset("v1", rank=4))
    model(prompt)
    assert calls == ["before", "after"]
    handle.remove()
    model(prompt)
    assert calls == ["before", "after", "before"]


def test_a_teacher_forward_after_a_checkpointed_backward_is_not_reported(
    make_converted: Callable, checkpoint_activations: Callable, prompt: Tensor
) -> None:
    model = make_converted("v1").train()
    checkpoint_activations(model)
    with model.report() as report:
        model(prompt, labels=prompt, use_cache=False).loss.backward()
        with model.base_mode(), torch.no_grad():
            model(prompt)
    assert len(report.forwards) == 1


def test_an_integer_mask_means_what_a_boolean_one_does(make_converted: Callable, prompt: Tensor) -> None:
    model = make_converted("v1")
    with model.report() as report, torch.no_grad():
        model(prompt)
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    assert report.regulariser(mask) == report.regulariser(mask.bool())
    assert report.regulariser(mask) != report.regulariser()


def test_a_report_without_a_forward_says_so(make_converted: Callable) -> None:
    with make_converted("v1").report() as report, pytest.raises(ConfigError, match="a forward"):
        report.regulariser()


def test_reports_do_not_nest(make_converted: Callable) -> None:
    model = make_converted("v1")
    with model.report(), pytest.raises(ConfigError, match="nested"), model.report():
        pass


def test_metrics_are_taken_in_evaluation_mode_and_leave_every_module_in_its_own(
    make_base: Callable, calibration: Tensor
) -> None:
    model = make_base(attention_dropout=0.5)
    expected = pliant.perplexity(model, calibration)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert pliant.perplexity(model, calibration) == expected
    pliant.convert(model, preset("keyed", rank=8), calibration=calibration)
    compare_to_base(model, calibration)
    assert [module.training for module in model.modules() if "plastic" not in str(type(module))][:3] == modes[:3]
    assert not model.model.layers[0].self_attn.training
    assert model.model.layers[1].self_attn.training


def test_a_delta_comes_back_in_its_own_dtype(make_base: Callable, tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path / "base")
    model = pliant.load(tmp_path / "base", dtype=torch.bfloat16)
    pliant.convert(model, preset("v1", rank=4)).save_pretrained(tmp_path / "delta", delta=True)
    assert pliant.load(tmp_path / "delta").dtype == torch.bfloat16
    assert pliant.load(tmp_path / "delta", dtype=torch.float32).dtype == torch.float32


def test_a_delta_over_a_stock_model_finds_its_base_from_another_folder(
    make_base: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: Tensor
) -> None:
    make_base().save_pretrained(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = type(make_base()).from_pretrained("base").eval()
    pliant.convert(model, preset("v1", rank=4)).save_pretrained(tmp_path / "delta", delta=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with torch.no_grad():
        assert torch.equal(pliant.load(tmp_path / "delta").eval()(prompt).logits, model(prompt).logits)


@pytest.mark.parametrize("options", [{"push_to_hub": True}, {"max_shard_size": "1KB"}])
def test_a_delta_takes_no_option_that_it_would_ignore(
    make_converted: Callable, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=next(iter(options))):
        make_converted("v1").save_pretrained(tmp_path / "delta", delta=True, **options)
    assert not (tmp_path / "delta").exists()


def test_only_the_main_process_writes_a_delta(make_converted: Callable, tmp_path: Path) -> None:
    make_converted("v1").save_pretrained(tmp_path / "delta", delta=True, is_main_process=False)
    assert not (tmp_path / "delta").exists()


def test_a_delta_with_an_adapter_inside_is_refused(make_converted: Callable, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = make_converted("v1")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(CheckpointError, match="Merge or unload"):
        wrapped.get_base_model().save_pretrained(tmp_path / "delta", delta=True)


def test_int8_and_keyed_pre_are_refused_on_loading_too(make_converted: Callable, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    make_converted("keyed_pre").save_pretrained(tmp_path / "model")
    with pytest.raises(ConversionError, match="int8"):
        pliant.load(tmp_path / "model", quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_statistics_of_another_width_change_nothing(make_base: Callable, calibration: Tensor, state_of: Callable):
    model = make_base()
    moments = {i: torch.eye(16) for i in range(3)}
    other = AttentionStatistics(moments=moments, sample=calibration[:2], held_out=calibration[:2])
    before = state_of(model)
    with pytest.raises(ConfigError, match=r"width, \(32, 32\).*\(16, 16\)"):
        pliant.convert(model, preset("keyed", rank=4), calibration=other)
    assert state_of(model) == before


def test_a_conversion_whose_cost_is_not_finite_still_stands(
    make_base: Callable, calibration: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_base()
    statistics = attention_statistics(model, calibration, layers=range(3))
    model.lm_head.weight.data.fill_(float("inf"))
    pliant.convert(model, preset("keyed", rank=4), calibration=statistics)
    assert "could not be measured" in caplog.text
    assert list(model.dynamic_layers) == [0, 1, 2]


def test_sharing_a_budget_leaves_the_model_alone_and_keeps_the_sum(
    make_base: Callable, calibration: Tensor, state_of: Callable
) -> None:
    model = make_base()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].self_attn.o_proj.bias.zero_()  # a layer that loses nothing has no price
    statistics = attention_statistics(model, calibration, layers=range(3))
    spectra = {i: spectrum(moment) for i, moment in statistics.moments.items()}
    before = state_of(model)
    ranks = share_ranks(model, dict.fromkeys(range(3), 12), spectra, statistics.sample)
    assert state_of(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sum(ranks.values()) == 36
    assert ranks[1] == 8
    assert ranks[0] != ranks[2]


def test_truncation_costs_are_the_slope_of_the_divergence(make_base: Callable, calibration: Tensor) -> None:
    """Against a finite difference: carrying a little more of one layer lowers the divergence by its cost."""
    step = 1e-2
    model = make_base()
    statistics = attention_statistics(model, calibration, layers=range(3))
    bases = {i: spectrum(moment).leading(24) for i, moment in statistics.moments.items()}
    costs = truncation_costs(model, bases, calibration)

    def divergence(index: int, amount: float) -> float:
        plastic = make_base()
        pliant.convert(plastic, preset("keyed", rank=32))
        with torch.no_grad():
            for i, layer in plastic.dynamic_layers.items():
                kept = bases[i] @ bases[i].T
                layer.plastic.up.copy_(kept + (amount if i == index else 0.0) * (torch.eye(32) - kept))
        return compare_to_base(plastic, calibration).kl * (calibration.shape[1] - 1)

    for index, cost in costs.items():
        slope = (divergence(index, step) - divergence(index, -step)) / (2 * step)
        # The comparison leaves out the last position of each window, which the cost includes.
        assert slope / calibration.shape[1] == pytest.approx(-cost, rel=0.35)
