"""Conversion of bases that are quantised or offloaded: every converted layer must act there too."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import pliant
from pliant.architectures.npt import FORMS
from pliant.errors import ConfigError

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
QUANTISATIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}
QUANTISED = [(kind, form) for kind in QUANTISATIONS for form in FORMS if (kind, form) != ("int8", "keyed_pre")]
WIDE = {"hidden_size": 64, "intermediate_size": 128}
FULL_RANK_TOLERANCE = 1e-5
PACKED_TOLERANCE = 0.05
"""On some CPUs the 4-bit kernel for inference computes in bf16; three layers of that."""


@pytest.fixture(scope="module")
def folder(make_base: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved base whose matrices fill whole quantisation blocks."""
    path = tmp_path_factory.mktemp("base")
    make_base("qwen2", **WIDE).save_pretrained(path)
    return path


def quantised(folder: Path, kind: str) -> PreTrainedModel:
    config = BitsAndBytesConfig(**QUANTISATIONS[kind])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def offloaded(folder: Path, offload_folder: Path) -> PreTrainedModel:
    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "disk",
        "lm_head": "cpu",
    }
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=offload_folder, dtype=torch.float32
    )


@torch.no_grad()
def assert_every_converted_layer_acts(model: PreTrainedModel, prompt: Tensor, base: Tensor) -> None:
    everything = model(prompt).logits
    assert everything.isfinite().all()
    for index in model.dynamic_layers:
        model.set_active(False, [index])
        without = model(prompt).logits
        model.set_active(True, [index])
        assert (without - everything).abs().max() > 1e-3 * everything.abs().max(), index
    with model.base_mode():
        assert torch.equal(model(prompt).logits, base)


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "form"), QUANTISED)
def test_every_layer_of_a_quantised_base_acts(
    kind: str, form: str, folder: Path, convert_randomly: Callable, prompt: Tensor
) -> None:
    model = quantised(folder, kind)
    with torch.no_grad():  # the first such forward repacks 4-bit weights on some CPUs
        expected = model(prompt).logits
    weights = {n: p.data_ptr() for n, p in model.named_parameters()}
    quantizer, is_quantised = model.hf_quantizer, model.is_quantized
    convert_randomly(model, form)
    after = dict(model.named_parameters())
    assert {n: after[n].data_ptr() for n in weights} == weights
    assert model.hf_quantizer is quantizer
    assert model.is_quantized is is_quantised
    assert model.config.quantization_config is not None
    assert all(parameter.dtype == torch.float32 for _, parameter in model.dynamic_parameters())
    assert_every_converted_layer_acts(model, prompt, expected)


@needs_bitsandbytes
@pytest.mark.parametrize("form", ["keyed", "keyed_pre"])
@pytest.mark.parametrize(("training", "tolerance"), [(True, FULL_RANK_TOLERANCE), (False, PACKED_TOLERANCE)])
@torch.no_grad()
def test_keyed_forms_at_full_rank_are_their_nf4_base(
    form: str,
    training: bool,
    tolerance: float,
    folder: Path,
    prompt: Tensor,
    largest_difference: Callable,
) -> None:
    model = quantised(folder, "nf4").train(training)
    expected = model(prompt).logits
    pliant.convert(model, pliant.NptConfig.preset(form, rank=WIDE["hidden_size"]))
    assert largest_difference(model(prompt).logits, expected) < tolerance


@needs_bitsandbytes
def test_sensitivities_are_not_measured_where_the_base_has_no_gradient(folder: Path, prompt: Tensor) -> None:
    model = quantised(folder, "nf4")
    form = pliant.NptConfig.preset("keyed", rank=16, allocation="sensitivity")
    repacks = model.model.layers[0].mlp.down_proj.support_avx512bf16_for_cpu
    calibration = torch.randint(2, 97, (12, 16), generator=torch.Generator().manual_seed(0))
    if repacks:
        with pytest.raises(ConfigError, match="allocation must be 'uniform' over an NF4 base that transformers loaded"):
            pliant.convert(model, form, calibration=calibration)
        assert not hasattr(model, "dynamic_layers")
    loaded = pliant.load(folder, quantization_config=BitsAndBytesConfig(**QUANTISATIONS["nf4"]), dtype=torch.float32)
    assert pliant.convert(loaded, form, calibration=calibration).dynamic_layers


@needs_bitsandbytes
@pytest.mark.parametrize("nested", [False, True])
def test_an_nf4_model_is_saved_as_it_is_after_a_forward(
    nested: bool, make_base: Callable, prompt: Tensor, tmp_path: Path
) -> None:
    make_base("qwen2", hidden_size=128, intermediate_size=192).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(**QUANTISATIONS["nf4"], bnb_4bit_use_double_quant=nested)
    model = pliant.load(tmp_path / "base", quantization_config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(prompt).logits
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(model(prompt).logits, expected)
        assert torch.equal(pliant.load(tmp_path / "saved", dtype=torch.float32).eval()(prompt).logits, expected)


@needs_bitsandbytes
def test_gradients_reach_the_added_parameters_of_an_nf4_base(
    form: str, folder: Path, convert_randomly: Callable, prompt: Tensor
) -> None:
    """At full rank: after inference, such as calibration, some CPUs cannot train 4-bit weights."""
    model = quantised(folder, "nf4").train()
    convert_randomly(model, form, rank=WIDE["hidden_size"]).freeze_base()
    model(prompt, labels=prompt).loss.backward()
    for name, parameter in model.dynamic_parameters():
        assert parameter.grad.abs().max() > 0, name


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "form"), QUANTISED)
@torch.no_grad()
def test_delta_over_a_quantised_base_reloads_bitwise(
    kind: str, form: str, folder: Path, tmp_path: Path, convert_randomly: Callable, prompt: Tensor
) -> None:
    options = {"quantization_config": BitsAndBytesConfig(**QUANTISATIONS[kind])}
    model = convert_randomly(pliant.load(folder, dtype=torch.float32, **options), form)
    expected = model(prompt).logits
    model.save_pretrained(tmp_path, delta=True)
    loaded = pliant.load(tmp_path, **options)
    assert loaded.model.layers[1].mlp.up_proj.weight.dtype in (torch.uint8, torch.int8)
    assert torch.equal(loaded(prompt).logits, expected)


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "form"), QUANTISED)
@torch.no_grad()
def test_full_checkpoint_of_a_quantised_model_reloads_bitwise(
    kind: str, form: str, folder: Path, tmp_path: Path, convert_randomly: Callable, prompt: Tensor
) -> None:
    """Saved before any inference, after which some CPUs cannot save 4-bit weights either."""
    rank = WIDE["hidden_size"]
    model = convert_randomly(quantised(folder, kind).train(), form, rank=rank)
    expected = model(prompt).logits
    model.save_pretrained(tmp_path)
    loaded = pliant.load(tmp_path).train()
    assert loaded.model.layers[1].mlp.up_proj.weight.dtype in (torch.uint8, torch.int8)
    assert torch.equal(loaded(prompt).logits, expected)


@torch.no_grad()
def test_delta_of_an_offloaded_model_loads_over_the_base_in_memory(
    form: str,
    folder: Path,
    tmp_path: Path,
    convert_randomly: Callable,
    prompt: Tensor,
    largest_difference: Callable,
) -> None:
    model = convert_randomly(offloaded(folder, tmp_path / "weights"), form)
    expected = model(prompt).logits
    model.save_pretrained(tmp_path / "delta", delta=True)
    loaded = pliant.load(tmp_path / "delta")
    assert largest_difference(loaded(prompt).logits, expected) < FULL_RANK_TOLERANCE


def test_every_layer_of_an_offloaded_base_acts(
    form: str, folder: Path, tmp_path: Path, convert_randomly: Callable, prompt: Tensor
) -> None:
    model = offloaded(folder, tmp_path)
    assert model.model.layers[2].mlp.up_proj.weight.is_meta
    hooks = {name: vars(module).get("_hf_hook") for name, module in model.named_modules()}
    assert hooks["model.layers.2"] is not None
    with torch.no_grad():
        expected = model(prompt).logits
    convert_randomly(model, form)
    modules = dict(model.named_modules())
    assert {name: vars(modules[name]).get("_hf_hook") for name in hooks} == hooks
    assert model.model.layers[2].mlp.up_proj.weight.is_meta
    assert not any(parameter.is_meta for _, parameter in model.dynamic_parameters())
    assert_every_converted_layer_acts(model, prompt, expected)


def test_offloaded_layers_compute_what_layers_in_memory_do(
    form: str,
    folder: Path,
    tmp_path: Path,
    convert_randomly: Callable,
    prompt: Tensor,
    largest_difference: Callable,
) -> None:
    in_memory = convert_randomly(AutoModelForCausalLM.from_pretrained(folder), form)
    model = convert_randomly(offloaded(folder, tmp_path), form)
    with torch.no_grad():
        expected, actual = in_memory(prompt).logits, model(prompt).logits
    assert largest_difference(actual, expected) < FULL_RANK_TOLERANCE


@pytest.mark.parametrize("form", ["keyed", "keyed_pre"])
def test_closed_form_reads_offloaded_weights(form: str, folder: Path, tmp_path: Path, calibration: Tensor) -> None:
    config = pliant.NptConfig.preset(form, rank=6)
    in_memory = AutoModelForCausalLM.from_pretrained(folder)
    model = offloaded(folder, tmp_path)
    for base in (in_memory, model):
        pliant.convert(base, config, calibration=calibration)
    expected = dict(in_memory.dynamic_parameters())
    for name, parameter in model.dynamic_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-5)
