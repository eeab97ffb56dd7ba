"""Converting to routed layers and setting their thresholds: which layers, which share, and what is refused."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import pliant
from pliant.architectures import ARCHITECTURES, RoutedConfig
from pliant.conversion import routed
from pliant.conversion.summary import summarise
from pliant.errors import ConfigError, ConversionError, DataError
from pliant.models import FAMILIES
from pliant.statistics import AttentionStatistics

CONFIGS: dict[str, Any] = {
    name: row.config
    for name, row in ARCHITECTURES.items()
    if row.config is not None and issubclass(row.config, RoutedConfig)
}
ROUTED = [1, 3]
TEXT = torch.randint(2, 97, (24, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=CONFIGS)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each routed architecture in turn."""
    return request.param


@pytest.fixture(params=["llama", "qwen2"])
def base(request: pytest.FixtureRequest, make_base: Callable) -> PreTrainedModel:
    """Tiny bases of four layers; the second has a sliding window."""
    return make_base(request.param, num_hidden_layers=4)


@pytest.fixture
def model(make_base: Callable) -> PreTrainedModel:
    """A tiny base of four layers."""
    return make_base(num_hidden_layers=4)


def taken(model: nn.Module) -> dict[str, Any]:
    """What must be as before after an error: objects by identity, values by value."""
    inner = model.model
    return {
        "classes": [type(module) for module in model.modules()],
        "layers": list(map(id, inner.layers)),
        "configs": [id(vars(m)["config"]) for m in model.modules() if "config" in vars(m)],
        "layer configs": [vars(layer).get("layer_config") for layer in inner.layers],
        "spec": getattr(model.config, "pliant", None),
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "flags": [(vars(m).get("active"), vars(m).get("calibrating"), vars(m).get("recording")) for m in inner.layers],
        "hooks": sum(len(module._forward_hooks) for module in model.modules()),
    }


def test_at_capacity_one_the_model_is_its_base(base: PreTrainedModel, architecture: str, prompt: Tensor) -> None:
    expected = base(prompt).logits
    same = pliant.convert(base, CONFIGS[architecture](capacity_gamma=1.0), calibration=["never read"])
    assert same is base
    assert base.spec.architecture == architecture
    assert list(base.routed_layers) == ROUTED
    assert torch.equal(base(prompt).logits, expected)
    assert all(layer.router.threshold == -torch.inf for layer in base.routed_layers.values())


def test_below_capacity_one_the_share_runs_at_once(base: PreTrainedModel, architecture: str) -> None:
    steps = []
    pliant.convert(
        base, CONFIGS[architecture](capacity_gamma=0.5), calibration=TEXT, progress=lambda *s: steps.append(s)
    )
    assert ("Setting thresholds", 4, 4) in steps
    with torch.no_grad(), base.report() as report:
        base.model(TEXT[:-4], use_cache=False)
    for index in ROUTED:
        share = report.layers[index].routing.runs.float().mean().item()
        assert share == pytest.approx(0.5, abs=1.01 / TEXT[:-4].numel())


@pytest.mark.parametrize("capacity", [0.25, 0.8])
def test_calibrated_share_is_the_one_asked_for(base: PreTrainedModel, architecture: str, capacity: float) -> None:
    pliant.convert(base, CONFIGS[architecture](capacity_gamma=1.0))
    shares = pliant.calibrate(base, capacity, calibration=TEXT)
    assert list(shares) == ROUTED
    tied = 4 / TEXT.numel()  # windows that begin with the same token score the same there
    assert all(share == pytest.approx(capacity, abs=tied) for share in shares.values())
    for index, layer in base.routed_layers.items():
        assert layer.capacity == layer.layer_config.capacity_gamma == base.spec.layers[index].capacity_gamma == capacity
        assert layer.router.threshold.isfinite()
    assert not any(layer.calibrating for layer in base.routed_layers.values())


def test_capacity_one_lets_everything_run_again(model: PreTrainedModel, architecture: str, prompt: Tensor) -> None:
    expected = model(prompt).logits
    pliant.convert(model, CONFIGS[architecture](capacity_gamma=0.25), calibration=TEXT)
    assert not torch.equal(model(prompt).logits, expected)
    assert pliant.calibrate(model, 1.0, calibration=["never read"]) == dict.fromkeys(ROUTED, 1.0)
    assert torch.equal(model(prompt).logits, expected)
    assert all(layer.router.threshold == -torch.inf for layer in model.routed_layers.values())


def test_without_a_capacity_each_layer_keeps_its_own(model: PreTrainedModel) -> None:
    layers = {"1": pliant.ModConfig(capacity_gamma=0.25), "2-3": pliant.ModConfig(capacity_gamma=0.75)}
    pliant.convert(model, layers=layers, calibration=TEXT)
    shares = pliant.calibrate(model, calibration=TEXT)
    assert list(shares.values()) == pytest.approx([0.25, 0.75, 0.75], abs=0.01)
    assert [config.capacity_gamma for config in model.spec.layers.values()] == [0.25, 0.75, 0.75]


def test_calibration_does_not_depend_on_mode_or_on_what_is_switched_off(model: PreTrainedModel) -> None:
    pliant.convert(model, pliant.ModConfig(), calibration=TEXT)
    expected = pliant.calibrate(model, 0.5, calibration=TEXT)
    thresholds = [layer.router.threshold.clone() for layer in model.routed_layers.values()]
    model.train()
    model.set_active(False, [1])
    assert pliant.calibrate(model, 0.5, calibration=TEXT) == expected
    assert [layer.router.threshold for layer in model.routed_layers.values()] == thresholds
    assert model.training
    assert [layer.active for layer in model.routed_layers.values()] == [False, True]


def test_texts_are_read_by_the_models_tokenizer(
    model: PreTrainedModel, tokenizer: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model.config._name_or_path = str(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = [" ".join(str(2 + (7 * i * i + 3 * i) % 90) for i in range(12_000))]
    with caplog.at_level(logging.INFO, "pliant"):
        pliant.convert(model, pliant.ModConfig(), calibration=texts)
    assert "on 2048 held-out tokens" in caplog.text
    shares = pliant.calibrate(model, 0.5, calibration=texts, num_tokens=1024)
    assert all(share == pytest.approx(0.5, abs=0.01) for share in shares.values())


def test_a_loss_is_warned_of(model: PreTrainedModel, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr("pliant.conversion.loss.WARNING_RATIO", 0.0)
    pliant.convert(model, pliant.ModConfig(), calibration=TEXT)
    assert "raise capacity_gamma" in caplog.text


@pytest.mark.parametrize(
    ("layers", "expected"), [(None, [1, 3]), ("alternate", [1, 3]), ("upper_half", [2, 3]), ([0, 2], [0, 2])]
)
def test_layers_are_every_second_one_unless_told(model: PreTrainedModel, layers: Any, expected: list[int]) -> None:
    pliant.convert(model, pliant.ModConfig(capacity_gamma=1.0), layers=layers)
    assert list(model.dynamic_layers) == expected


def test_the_layer_before_a_dynamic_one_decides(model: PreTrainedModel) -> None:
    config = pliant.DtfConfig(capacity_gamma=0.5, prior_factor=0.125)
    pliant.convert(model, config, layers=[2], calibration=TEXT)
    assert model.spec.layers == {1: pliant.DtfConfig(role="decision"), 2: config}
    assert list(model.routed_layers) == [2]


def test_layers_added_later_are_calibrated_with_those_that_are_there(model: PreTrainedModel, architecture: str) -> None:
    config = CONFIGS[architecture](capacity_gamma=0.5)
    pliant.convert(model, config, layers=[3], calibration=TEXT)
    kept = {name: value.clone() for name, value in model.named_parameters()}
    pliant.convert(model, config, layers=[1], calibration=TEXT)
    assert list(model.routed_layers) == ROUTED
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in kept.items())
    with torch.no_grad(), model.report() as report:
        model.model(TEXT[:-4], use_cache=False)
    for index in ROUTED:
        share = report.layers[index].routing.runs.float().mean().item()
        assert share == pytest.approx(0.5, abs=1.01 / TEXT[:-4].numel())


def not_finite(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0, 0] = float("nan")


REFUSED: dict[str, tuple[Callable, type[Exception], str]] = {
    "two architectures in a map": (
        lambda m: pliant.convert(m, layers={"1": pliant.ModConfig(), "3": pliant.SttConfig()}, calibration=TEXT),
        ConversionError,
        "layers must be of one architecture; got mod and stt",
    ),
    "a routed and a plastic layer": (
        lambda m: pliant.convert(m, layers={"1": pliant.ModConfig(), "3": "v1"}, calibration=TEXT),
        ConversionError,
        "got mod and npt",
    ),
    "neighbours of which both are dynamic": (
        lambda m: pliant.convert(m, pliant.DtfConfig(), layers="2-3", calibration=TEXT),
        ConversionError,
        "layers must pair up.*2 and 3 are both to be dynamic",
    ),
    "no layer before the first": (
        lambda m: pliant.convert(m, pliant.DtfConfig(), layers=[0], calibration=TEXT),
        ConversionError,
        "layers must pair up.*layer 0 has none before it",
    ),
    "a layer to decide": (
        lambda m: pliant.convert(m, pliant.DtfConfig(role="decision")),
        ConfigError,
        "role must be 'dynamic' in a conversion; got 'decision'",
    ),
    "a class in place of a configuration": (
        lambda m: pliant.convert(m, RoutedConfig(), calibration=TEXT),
        ConfigError,
        r"config must be an NptConfig, or one of another architecture \(ModConfig, DtfConfig, SttConfig\)",
    ),
    "statistics of plastic layers": (
        lambda m: pliant.convert(
            m, pliant.ModConfig(), calibration=AttentionStatistics(moments={}, sample=TEXT, held_out=TEXT)
        ),
        ConfigError,
        "calibration must be token windows or texts for routed layers; got AttentionStatistics",
    ),
    "too few windows": (
        lambda m: pliant.convert(m, pliant.ModConfig(), calibration=TEXT[:4]),
        DataError,
        r"more than 4 of at least two tokens each; got shape \(4, 12\)",
    ),
    "text without a tokenizer": (
        lambda m: pliant.convert(m, pliant.ModConfig()),
        DataError,
        "calibration text needs the model's tokenizer",
    ),
    "a layer that is not there": (
        lambda m: pliant.convert(m, pliant.ModConfig(), layers=[4], calibration=TEXT),
        ConversionError,
        r"layers must be in 0\.\.3",
    ),
    "a base": (lambda m: pliant.calibrate(m, 0.5, calibration=TEXT), ConfigError, "a model with routed layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_the_base_as_it_was(case: str, model: PreTrainedModel) -> None:
    call, error, message = REFUSED[case]
    before = taken(model)
    with pytest.raises(error, match=message):
        call(model)
    assert taken(model) == before


@pytest.mark.parametrize("kind", ["base", "routed"])
def test_scores_that_are_not_finite_take_the_conversion_back(
    kind: str, architecture: str, model: PreTrainedModel, prompt: Tensor
) -> None:
    config = CONFIGS[architecture](capacity_gamma=0.5)
    model(prompt, output_hidden_states=True)  # leaves hooks of transformers behind
    if kind == "routed":
        pliant.convert(model, config, layers=[3], calibration=TEXT)
    good = model.model.layers[0].self_attn.o_proj.weight[0, 0].item()
    not_finite(model)
    before = {name: value for name, value in taken(model).items() if name not in ("values", "hooks")}
    thresholds = [buffer.clone() for name, buffer in model.named_buffers() if name.endswith("threshold")]
    with pytest.raises(DataError, match="must be finite on the calibration text"):
        pliant.convert(model, config, layers=[1], calibration=TEXT)
    assert {name: value for name, value in taken(model).items() if name in before} == before
    assert [buffer for name, buffer in model.named_buffers() if name.endswith("threshold")] == thresholds
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0, 0] = good
    assert len(model(prompt, output_hidden_states=True).hidden_states) == 5
    pliant.convert(model, config, layers=[1], calibration=TEXT)
    assert 1 in model.routed_layers


@pytest.mark.parametrize(
    ("capacity", "calibration", "error", "message"),
    [
        (0.0, TEXT, ConfigError, r"must be in \(0, 1\].*got 0.0"),
        (1.5, TEXT, ConfigError, r"must be in \(0, 1\].*got 1.5"),
        (float("nan"), TEXT, ConfigError, r"must be in \(0, 1\].*got nan"),
        (0.5, TEXT[:0], DataError, r"\(windows, window\) with at least one token; got shape \(0, 12\)"),
        (0.5, None, DataError, "needs the model's tokenizer"),
    ],
)
def test_what_calibrate_refuses_leaves_the_model_as_it_was(
    capacity: float, calibration: Any, error: type[Exception], message: str, model: PreTrainedModel
) -> None:
    pliant.convert(model, pliant.ModConfig(), calibration=TEXT)
    before = taken(model)
    with pytest.raises(error, match=message):
        pliant.calibrate(model, capacity, calibration=calibration)
    assert taken(model) == before


def test_scores_that_are_not_finite_leave_thresholds_and_capacities(model: PreTrainedModel) -> None:
    pliant.convert(model, pliant.ModConfig(), calibration=TEXT)
    not_finite(model)
    before = {name: value for name, value in taken(model).items() if name != "values"}
    thresholds = [layer.router.threshold.item() for layer in model.routed_layers.values()]
    with pytest.raises(DataError, match="must be finite"):
        pliant.calibrate(model, 0.25, calibration=TEXT)
    assert {name: value for name, value in taken(model).items() if name != "values"} == before
    assert [layer.router.threshold.item() for layer in model.routed_layers.values()] == thresholds


def test_a_model_of_another_architecture_is_refused(model: PreTrainedModel) -> None:
    pliant.convert(model, pliant.ModConfig(capacity_gamma=1.0))
    before = taken(model)
    for config in (pliant.SttConfig(), pliant.NptConfig.preset("v1")):
        with pytest.raises(ConversionError, match=r"it has mod layers already \(1, 3\)\. Load the base again"):
            pliant.convert(model, config, layers=[0], calibration=TEXT)
    with pytest.raises(ConversionError, match="layer 1 already is"):
        pliant.convert(model, pliant.ModConfig(), layers=[1], calibration=TEXT)
    assert taken(model) == before


def test_a_plastic_model_is_not_calibrated(make_converted: Callable) -> None:
    with pytest.raises(ConfigError, match=r"a model with routed layers; this one \(PliantLlamaForCausalLM\) has none"):
        pliant.calibrate(make_converted("v1"), 0.5, calibration=TEXT)


def test_default_text_holds_thresholds_and_held_out_windows(model: PreTrainedModel, monkeypatch: Any) -> None:
    asked = []

    def windows_of(_model: Any, text: Any, num_tokens: int) -> Tensor:
        asked.append((text, num_tokens))
        return TEXT

    monkeypatch.setattr(routed, "windows_of", windows_of)
    pliant.convert(model, pliant.ModConfig())
    assert asked == [(None, 8_192 + 4 * 512)]


def test_added_parameters_and_saved_flops_are_counted(model: PreTrainedModel, architecture: str) -> None:
    configuration = model.config
    config = CONFIGS[architecture](capacity_gamma=0.5)
    full = CONFIGS[architecture](capacity_gamma=1.0)
    pliant.convert(model, config, calibration=TEXT)
    half, whole = (
        summarise(configuration, {i: c if i in ROUTED else spec for i, spec in model.spec.layers.items()}, context=7)
        for c in (config, full)
    )
    assert list(half.layers) == ROUTED
    assert half.added_parameters == whole.added_parameters == sum(p.numel() for _, p in model.dynamic_parameters())
    assert half.layers[1].form == architecture
    assert half.layers[1].capacity == 0.5
    block = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    attention = 4 * 7 * 32
    assert whole.added_flops - half.added_flops == 2 * (block / 2 + 0.75 * attention)
    assert FAMILIES[half.family].causal_lm is type(model)


def test_flops_of_a_part_are_saved_in_that_part(model: PreTrainedModel) -> None:
    def saved(granularity: str) -> int:
        config = pliant.ModConfig(capacity_gamma=0.5, granularity=granularity)
        counted = summarise(model.config, {1: config}, context=1)
        return 2 * counted.added_parameters - counted.added_flops

    assert saved("mlp") == 3 * 32 * 48
    assert saved("attention") == 2 * 32 * 32 + 2 * 32 * 16 + 0.75 * 4 * 32
    assert saved("block") == saved("mlp") + saved("attention")
