"""The moving average and the criteria of surprise, and what ``DtfConfig`` and ``SttConfig`` refuse."""

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from pliant.architectures import ARCHITECTURES, DtfConfig, ModConfig, SttConfig
from pliant.architectures.routing.surprise import Prior, SurpriseRouter, divergence, moving_average
from pliant.architectures.routing.surprise_reference import averages_of
from pliant.architectures.stt.layer import previous_states
from pliant.errors import ConfigError
from pliant.models import FAMILIES, PliantSpec
from pliant.models.graft import install
from pliant.models.routed_cache import RoutedCacheLayer

LENGTH = 230
"""More than two windows."""


def documents_of(layout: str) -> Tensor:
    first, second = torch.zeros(2, LENGTH, dtype=torch.long)
    if layout == "padded":
        first[:37] = -1
    if layout == "filled":
        first[37:160] = -1
        second[:] = -1
    if layout == "packed":
        first[3:], first[120:], second[229:] = 1, 2, 1
    return torch.stack((first, second))


def in_pieces(
    compute: Callable[[Tensor, Tensor | None, RoutedCacheLayer], Tensor],
    values: Tensor,
    documents: Tensor | None,
    sizes: list[int],
) -> Tensor:
    memory, found = RoutedCacheLayer(), []
    pieces = [None] * len(sizes) if documents is None else documents.split(sizes, dim=1)
    for piece, owners in zip(values.split(sizes, dim=1), pieces, strict=True):
        found.append(compute(piece, owners, memory))
        memory.advance(piece.shape[1])
    return torch.cat(found, dim=1)


SIZES = {"at once": [LENGTH], "in pieces": [3, 34, 1, 120, 72], "token by token": [1] * LENGTH}


@pytest.mark.parametrize("layout", ["plain", "padded", "filled", "packed"])
def test_moving_average_equals_a_loop(layout: str):
    values, documents = torch.rand(2, LENGTH) * 50, documents_of(layout)
    found = moving_average(values, documents if layout != "plain" else None, None)
    for row, owners in enumerate(documents.tolist()):
        expected = torch.tensor(averages_of(values[row].tolist(), owners))
        counted = documents[row] >= 0
        torch.testing.assert_close(found[row][counted], expected[counted], rtol=1e-6, atol=0)


@pytest.mark.parametrize("pieces", SIZES)
@pytest.mark.parametrize("layout", ["plain", "padded", "filled"])
def test_moving_average_does_not_depend_on_how_the_text_is_cut(layout: str, pieces: str):
    values = torch.rand(2, LENGTH) * 50
    documents = documents_of(layout) if layout != "plain" else None
    expected = moving_average(values, documents, None)
    counted = documents_of(layout) >= 0
    assert in_pieces(moving_average, values, documents, SIZES[pieces])[counted].equal(expected[counted])


def test_moving_average_of_a_padded_row_is_that_of_the_row_alone():
    values, documents = torch.rand(1, LENGTH), documents_of("padded")[:1]
    alone = moving_average(values[:, 37:], None, None)
    assert moving_average(values, documents, None)[:, 37:].equal(alone)


@pytest.mark.parametrize("pieces", SIZES)
@pytest.mark.parametrize("layout", ["plain", "padded", "filled"])
def test_previous_state_is_that_of_the_token_before(layout: str, pieces: str):
    h, documents = torch.randn(2, LENGTH, 4), documents_of(layout)
    found = in_pieces(previous_states, h, documents if layout != "plain" else None, SIZES[pieces])
    assert_previous(found, h, documents)


def test_previous_state_stays_within_its_document():
    h, documents = torch.randn(2, LENGTH, 4), documents_of("packed")
    assert_previous(previous_states(h, documents, None), h, documents)


def assert_previous(found: Tensor, h: Tensor, documents: Tensor) -> None:
    for row, owners in enumerate(documents.tolist()):
        last: dict[int, Tensor] = {}
        for t, document in enumerate(owners):
            if document >= 0:
                assert found[row, t].equal(last.get(document, torch.zeros(4)))
                last[document] = h[row, t]


def test_criteria_start_at_the_published_values():
    router = SurpriseRouter(DtfConfig())
    router.reset_parameters()
    starts = {name: functional.softplus(value).item() for name, value in router.named_parameters()}
    assert starts["expected_slope"] == pytest.approx(0.5544, abs=1e-4)
    assert starts["unexpected_slope"] == pytest.approx(0.4375, abs=1e-4)
    assert starts["expected_offset"] == pytest.approx(1.025, rel=1e-6)
    assert starts["unexpected_margin"] == pytest.approx(1.1, rel=1e-6)
    static, changed = torch.full((1, 3), 2.0), torch.full((1, 3), 0.5)
    expected = torch.sigmoid(torch.tensor(0.55436 * (2 - (0.5 - 0.024693))))
    unexpected = torch.sigmoid(torch.tensor(0.43749 * (2 - 1.1 * 2)))
    gate, scores = router(static, changed)
    torch.testing.assert_close(gate[0, 2], expected + unexpected - expected * unexpected, rtol=1e-4, atol=0)
    torch.testing.assert_close(scores, -torch.log1p(-gate))


def test_scores_tell_tokens_apart_whose_probability_rounds_to_one():
    router = SurpriseRouter(DtfConfig(criteria="ce"))
    router.reset_parameters()
    gate, scores = router(torch.tensor([[100.0, 200.0]]), torch.zeros(1, 2))
    assert gate.tolist() == [[1.0, 1.0]]
    assert scores[0, 0] < scores[0, 1]


@pytest.mark.parametrize(("criteria", "count"), [("ce", 2), ("cu", 2), ("or", 4)])
def test_a_router_has_no_parameter_that_it_does_not_use(criteria: str, count: int):
    router = SurpriseRouter(DtfConfig(criteria=criteria))
    router.reset_parameters()
    router(torch.rand(2, 5), torch.rand(2, 5))[0].sum().backward()
    assert [parameter.grad is not None for parameter in router.parameters()] == [True] * count


def test_gaussian_divergence_is_never_negative_and_starts_at_half_the_square():
    error = torch.randn(2, 3, 8)
    torch.testing.assert_close(divergence(error, torch.zeros(2, 3, 8)), error.square().mean(-1) / 2)
    best = (1 + error.square()).log()
    torch.testing.assert_close(divergence(error, best), best.mean(-1) / 2)
    assert (divergence(torch.zeros(2, 3, 8), torch.randn(2, 3, 8)) >= 0).all()


@pytest.mark.parametrize(
    ("d_model", "factor", "width"), [(32, 0.0625, 2), (576, 0.0625, 36), (30, 0.1, 4), (8, 4.0, 32)]
)
def test_width_of_a_prior_is_even(d_model: int, factor: float, width: int):
    assert Prior(d_model, factor).gate.shape == (width, d_model)


@pytest.mark.parametrize(
    ("config_class", "field", "value", "part"),
    [
        (DtfConfig, "role", "decisions", "Did you mean 'decision'"),
        (DtfConfig, "prior_factor", 0.0, r"\(0, 4\]"),
        (DtfConfig, "prior_factor", 4.5, r"\(0, 4\]"),
        (DtfConfig, "surprise", "kl", "mse, gaussian"),
        (DtfConfig, "criteria", "and", "ce, cu, or"),
        (DtfConfig, "beta_ce_init", float("nan"), "finite"),
        (DtfConfig, "prior_loss_weight", -1.0, "at least 0"),
        (DtfConfig, "capacity_gamma", 0.0, r"\(0, 1\]"),
        (DtfConfig, "budget", 1.5, r"\(0, 1\]"),
        (SttConfig, "budget", 0.0, r"\(0, 1\]"),
        (SttConfig, "budget_window", 0, "at least 1"),
        (SttConfig, "transition_factor", -0.5, r"\(0, 4\]"),
        (SttConfig, "criteria", "CE", "ce, cu, or"),
        (SttConfig, "beta_cu_init", float("inf"), "finite"),
        (SttConfig, "prior_loss_weight", float("nan"), "at least 0"),
        (SttConfig, "student_loss_weight", -0.5, "at least 0"),
        (SttConfig, "gate_share", 0.5, "must be 0 for stt"),
    ],
)
def test_values_outside_their_rule_are_refused(config_class: type, field: str, value: Any, part: str):
    with pytest.raises(ConfigError, match=part) as caught:
        config_class(**{field: value})
    assert field in str(caught.value)


def test_a_budget_is_refused_where_nothing_remembers_who_ran():
    with pytest.raises(ConfigError, match=r"budget needs to remember .* granularity='mlp'"):
        ModConfig(budget=0.5, granularity="mlp")


@pytest.mark.parametrize("options", [{"capacity_gamma": 0.25}, {"criteria": "ce"}, {"forecast": True}])
def test_a_decision_layer_takes_no_options(options: dict[str, Any]):
    with pytest.raises(ConfigError, match="dynamic layer after it") as caught:
        DtfConfig(role="decision", **options)
    assert next(iter(options)) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "saved"),
    [
        (DtfConfig(role="decision"), {"role": "decision"}),
        (DtfConfig(surprise="gaussian"), {"capacity_gamma": 0.5, "surprise": "gaussian"}),
        (SttConfig(capacity_gamma=0.25, criteria="cu"), {"capacity_gamma": 0.25, "criteria": "cu"}),
    ],
)
def test_configurations_survive_json(config: Any, saved: dict[str, Any]):
    assert config.to_dict() == saved
    assert type(config).from_dict(json.loads(json.dumps(saved))) == config


def routed(make_base: Callable, randomise: Callable, layers: dict[int, Any]) -> Any:
    model = make_base("llama", num_hidden_layers=4)
    architecture = next(row.name for row in ARCHITECTURES.values() if row.config is type(layers[1]))
    install(model, FAMILIES["llama"].causal_lm, PliantSpec(architecture=architecture, layers=layers))
    return randomise(model)


def pairs(**options: Any) -> dict[int, DtfConfig]:
    return {index: DtfConfig(**options) if index % 2 else DtfConfig(role="decision") for index in range(4)}


@pytest.mark.parametrize(
    "layers",
    [
        {1: DtfConfig()},
        {0: DtfConfig(role="decision")} | {1: DtfConfig(role="decision")},
        {0: DtfConfig(role="decision"), 2: DtfConfig(), 1: DtfConfig()},
        {0: DtfConfig(), 1: DtfConfig()},
        {1: DtfConfig(role="decision")},
    ],
)
def test_layers_must_pair_up(layers: dict[int, Any], make_base: Callable, randomise: Callable):
    with pytest.raises(ConfigError, match="Convert both of a pair"):
        routed(make_base, randomise, layers)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_pairs_of_its_own(change: Callable, make_base: Callable, randomise: Callable, prompt: Tensor):
    model = routed(make_base, randomise, pairs()).train()
    model(prompt, use_cache=False)
    model.model.layers[0](torch.randn(1, 3, 32, requires_grad=True) * 2, position_embeddings=rotary(model, 3))
    assert model.model.layers[0].entry is not None
    other = change(model)
    assert other.model.layers[0].entry is None
    assert other.model.layers[1].partner == (other.model.layers[0],)
    assert "partner" not in dict(other.model.layers[1].named_children())
    with torch.no_grad():
        assert other.eval()(prompt).logits.equal(model.eval()(prompt).logits)


def rotary(model: Any, length: int) -> tuple[Tensor, Tensor]:
    return model.model.rotary_emb(torch.zeros(1, length, 32), torch.arange(length)[None])


def test_a_decision_layer_is_the_base_and_keeps_no_entry(make_base: Callable, randomise: Callable, prompt: Tensor):
    model, base = routed(make_base, randomise, pairs()), make_base("llama", num_hidden_layers=4)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), model.report() as report:
        model.eval()(prompt, past_key_values=cache)
        assert [isinstance(layer, RoutedCacheLayer) for layer in cache.layers] == [False, True, False, True]
        assert list(report.layers) == [1, 3]
        assert [layer.entry for layer in model.model.layers] == [None] * 4
        with model.base_mode():
            assert model(prompt).logits.equal(base(prompt).logits)
            assert [layer.entry for layer in model.model.layers] == [None] * 4
    assert [layer.routes for layer in model.model.layers] == [False, True, False, True]
    assert model.model.layers[0].capacity == 1.0


@pytest.mark.parametrize("options", [{}, {"forecast": True, "surprise": "gaussian"}])
def test_checkpointing_recomputes_a_dynamic_layer_with_the_entry_of_its_own_forward(
    options: dict[str, Any], make_base: Callable, randomise: Callable, prompt: Tensor
):
    model = routed(make_base, randomise, pairs(**options)).train()
    gradients = []
    for enabled in (False, True):
        model.checkpoint_activations(enabled)
        model.zero_grad()
        with model.report() as report:
            first = model(prompt, labels=prompt, use_cache=False).loss + report.regulariser()
            model(prompt.flip(1), use_cache=False)
            first.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


KINDS = {
    "dtf": pairs(),
    "dtf gaussian forecast": pairs(surprise="gaussian", forecast=True),
    "stt": {1: SttConfig(), 3: SttConfig()},
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_text_is_routed_alike_however_it_comes(kind: str, make_base: Callable, randomise: Callable):
    model = routed(make_base, randomise, KINDS[kind]).eval()
    ids = torch.randint(2, 97, (2, 30), generator=torch.Generator().manual_seed(6))
    for layer in model.routed_layers.values():
        layer.calibrating = True
    with torch.no_grad():
        model(ids, use_cache=False)
        for layer in model.routed_layers.values():
            layer.calibrating = False
        with model.report() as report:
            expected = model(ids, use_cache=False).logits
        assert all(0 < layer.routing.runs.float().mean() < 1 for layer in report.layers.values())
        for sizes in ([30], [7, 1, 12, 10], [1] * 30):
            cache, found = DynamicCache(config=model.config), []
            for piece in ids.split(sizes, dim=1):
                found.append(model(piece, past_key_values=cache).logits)
            torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(model(ids[:1]).logits, expected[:1], rtol=1e-5, atol=2e-5)
        padded = functional.pad(ids, (5, 0))
        mask = (padded > 0).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        changed = ids.clone()
        changed[:, 20] = 1
        found = model(changed, use_cache=False).logits[:, :20]
        torch.testing.assert_close(found, expected[:, :20], rtol=1e-5, atol=2e-5)
    options = {"max_new_tokens": 6, "do_sample": False}
    for beams in (1, 3):
        cached = model.generate(ids[:, :8], num_beams=beams, use_cache=True, **options)
        assert cached.equal(model.generate(ids[:, :8], num_beams=beams, use_cache=False, **options))
