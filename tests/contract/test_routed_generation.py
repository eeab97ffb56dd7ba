"""Who runs, and what comes out, does not depend on how tokens are fed; keys are kept of those alone that ran."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pliant.errors import ConfigError
from pliant.models.routed_cache import RoutedCacheLayer

TOLERANCE = 1e-5
"""Largest difference over largest logit, fp32: the same sums, grouped otherwise."""

RoutedModel = Callable[..., PreTrainedModel]


def positions_of(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def fed(model: PreTrainedModel, tokens: Tensor, *sizes: int) -> Tensor:
    """Logits with the tokens fed in chunks of these sizes, from one cache."""
    cache, rows = DynamicCache(config=model.config), []
    for chunk in tokens.split(list(sizes), dim=1):
        rows.append(model(chunk, past_key_values=cache).logits)
    return torch.cat(rows, dim=1)


def runs_of(model: PreTrainedModel, tokens: Tensor, **options: Any) -> dict[int, Tensor]:
    """Which tokens ran in each routed layer."""
    with model.report() as report:
        model(tokens, **options)
    return {index: layer.routing.runs for index, layer in report.layers.items()}


@pytest.fixture
def model(routed_kind: str, family: str, make_routed: RoutedModel) -> PreTrainedModel:
    return make_routed(routed_kind, family)


@torch.no_grad()
def test_some_tokens_run_and_some_do_not(model: PreTrainedModel, prompt: Tensor) -> None:
    for index, runs in runs_of(model, prompt).items():
        assert 0 < runs.sum() < runs.numel(), index


@pytest.mark.parametrize("changed", [1, 4, 10])
@torch.no_grad()
def test_a_changed_token_moves_no_earlier_logit_and_no_earlier_choice(
    model: PreTrainedModel, changed: int, prompt: Tensor
) -> None:
    other = prompt.clone()
    other[:, changed] = (other[:, changed] + 7) % 90 + 2
    difference = (model(prompt).logits - model(other).logits).abs().amax((0, 2))
    assert difference[:changed].max() <= TOLERANCE * model(prompt).logits.abs().max()  # rows grouped otherwise
    assert difference[changed] > 0
    before, after = runs_of(model, prompt), runs_of(model, other)
    assert all(torch.equal(before[index][:, :changed], after[index][:, :changed]) for index in before)


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_the_cache_holds_the_keys_of_the_tokens_that_ran(
    routed_kind: str, model: PreTrainedModel, batch: int, prompt: Tensor
) -> None:
    tokens = prompt[:batch]
    runs = runs_of(model, tokens)
    cache = DynamicCache(config=model.config)
    for position in range(tokens.shape[1]):
        model(tokens[:, position : position + 1], past_key_values=cache)
    for index, chosen in runs.items():
        entry = cache.layers[index]
        assert entry.get_seq_length() == tokens.shape[1]
        if routed_kind == "mod mlp":
            assert not isinstance(entry, RoutedCacheLayer)
            continue
        counts = chosen.sum(1)
        if not counts.any():
            assert not entry.is_initialized
            continue
        assert entry.keys.shape[2] == entry.values.shape[2] == counts.max()
        for row, columns in enumerate(entry.columns):
            assert torch.equal(columns[: counts[row]], chosen[row].nonzero()[:, 0])
            assert (columns[counts[row] :] == -1).all()


@torch.no_grad()
def test_the_report_says_of_each_token_whether_it_ran_however_few_do(
    routed_kind: str, make_routed: RoutedModel, prompt: Tensor
) -> None:
    model = make_routed(routed_kind)
    with model.report() as report:
        fed(model, prompt[:1], *[1] * prompt.shape[1])
    for index, layer in model.routed_layers.items():
        routing = [forward[index].routing for forward in report.forwards]
        assert routing[0].runs.all() or routed_kind == "mod mlp"
        for each in routing[0 if routed_kind == "mod mlp" else 1 :]:
            reaches = each.scores >= layer.router.threshold
            assert torch.equal(each.runs, reaches) or (layer.layer_config.budget and reaches.all())
        assert {bool(each.runs) for each in routing} == {True, False}
        layer.router.threshold.fill_(torch.inf)
    for runs in runs_of(model, prompt).values():
        assert not runs[:, 1:].any()
        assert runs[:, 0].all() == (routed_kind != "mod mlp")


@torch.no_grad()
def test_the_first_token_of_each_document_runs_however_it_scores(
    routed_kind: str, make_routed: RoutedModel, prompt: Tensor
) -> None:
    model, mask = make_routed(routed_kind), torch.ones_like(prompt)
    mask[1, :4] = 0
    padded, positions = torch.zeros_like(mask), torch.arange(prompt.shape[1])[None] % 6
    packed = (positions == 0).expand_as(prompt).long()
    padded[0, 0] = padded[1, 4] = 1
    for layer in model.routed_layers.values():
        layer.router.threshold.fill_(torch.inf)
    for options, expected in (({"attention_mask": mask}, padded), ({"position_ids": positions}, packed)):
        wanted = torch.zeros_like(expected) if routed_kind == "mod mlp" else expected
        for runs in runs_of(model, prompt, use_cache=False, **options).values():
            assert torch.equal(runs.long(), wanted)


@torch.no_grad()
def test_a_budget_bounds_what_runs_in_any_window_and_takes_the_first_that_reach_the_threshold(
    make_routed: RoutedModel, prompt: Tensor
) -> None:
    model = make_routed("mod")
    for layer in model.routed_layers.values():
        layer.router.threshold.fill_(-torch.inf)  # every token wants to run
    assert all(runs.all() for runs in runs_of(model, prompt).values())
    model.set_routing(budget=0.5, budget_window=6)
    expected = (torch.arange(prompt.shape[1]) % 6 < 3).expand_as(prompt)
    assert all(torch.equal(runs, expected) for runs in runs_of(model, prompt).values())
    model.set_routing(budget=1.0)
    assert all(runs.all() for runs in runs_of(model, prompt).values())
    model.set_routing(budget=0.01, capacity_gamma=1.0)
    assert all(runs.all() for runs in runs_of(model, prompt).values())


@torch.no_grad()
def test_a_budget_counts_documents_apart(make_routed: RoutedModel, prompt: Tensor) -> None:
    model = make_routed("mod")
    for layer in model.routed_layers.values():
        layer.router.threshold.fill_(-torch.inf)
    model.set_routing(budget=0.2, budget_window=10)
    length = prompt.shape[1]
    positions = torch.cat([torch.arange(3), torch.arange(length - 3)]).expand_as(prompt)
    ran = runs_of(model, prompt, position_ids=positions, use_cache=False)
    for runs in ran.values():
        assert runs[0].nonzero()[:, 0].tolist()[:4] == [0, 1, 3, 4]


def test_a_budget_is_no_matter_in_training(make_routed: RoutedModel, prompt: Tensor) -> None:
    model = make_routed("mod").train()
    before = runs_of(model, prompt, use_cache=False)
    model.set_routing(budget=0.1)
    after = runs_of(model, prompt, use_cache=False)
    assert all(torch.equal(before[index], after[index]) for index in before)


@torch.no_grad()
def test_a_budget_forgets_nobody_behind_much_padding(
    make_routed: RoutedModel, prompt: Tensor, largest_difference: Callable
) -> None:
    model, pads = make_routed("mod budget"), 300
    row = prompt[:1]
    turns = torch.cat((row, torch.zeros(1, pads, dtype=torch.long), row.flip(1)), dim=1)
    mask = torch.cat((torch.ones_like(row), torch.zeros(1, pads, dtype=torch.long), torch.ones_like(row)), dim=1)
    places, cache, logits = positions_of(mask), DynamicCache(config=model.config), []
    for start, end in ((0, row.shape[1] + pads), (row.shape[1] + pads, turns.shape[1])):
        chunk = slice(start, end)
        logits.append(
            model(
                turns[:, chunk], attention_mask=mask[:, :end], position_ids=places[:, chunk], past_key_values=cache
            ).logits
        )
    expected = model(torch.cat((row, row.flip(1)), dim=1)).logits
    assert largest_difference(logits[1], expected[:, row.shape[1] :]) < TOLERANCE


@torch.no_grad()
def test_documents_of_one_row_of_positions_hold_for_every_row(
    routed_kind: str, make_routed: RoutedModel, prompt: Tensor, largest_difference: Callable
) -> None:
    model, length = make_routed(routed_kind), prompt.shape[1]
    positions = torch.cat((torch.arange(5), torch.arange(length - 5)))[None]
    found = model(prompt, position_ids=positions, use_cache=False).logits
    expected = model(prompt, position_ids=positions.expand_as(prompt), use_cache=False).logits
    assert largest_difference(found, expected) < TOLERANCE


@torch.no_grad()
def test_a_model_that_is_cast_whole_still_runs(routed_kind: str, make_routed: RoutedModel, prompt: Tensor) -> None:
    model = make_routed(routed_kind).to(torch.bfloat16)
    assert model(prompt).logits.isfinite().all()


@torch.no_grad()
def test_what_a_router_no_longer_keeps_cannot_be_cropped_in_two_steps_either(make_routed: RoutedModel) -> None:
    model = make_routed("stt", overrides={"max_position_embeddings": 1024})
    ids = torch.randint(2, 97, (1, 700), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    expected = model(ids, past_key_values=cache).logits[:, -1]
    layer = next(entry for entry in cache.layers if isinstance(entry, RoutedCacheLayer))
    layer.crop(-200)
    assert layer.seen == 500
    with pytest.raises(ConfigError, match="crop can take back at most 56 tokens now"):
        layer.crop(-200)
    assert layer.seen == 500
    assert layer.recall("previous") is not None
    fresh = DynamicCache(config=model.config)
    model(ids, past_key_values=fresh)
    fresh.crop(-200)
    assert torch.allclose(model(ids[:, 500:], past_key_values=fresh).logits[:, -1], expected, atol=1e-5)


def test_training_by_threshold_lets_a_token_of_each_row_run(make_routed: RoutedModel, prompt: Tensor) -> None:
    model = make_routed("mod").train()
    for layer in model.routed_layers.values():
        layer.router.threshold.fill_(torch.inf)
        layer.by_threshold = True
    with model.report() as report:
        model(prompt, labels=prompt, use_cache=False).loss.backward()
    assert all((layer.routing.runs.sum(1) == 1).all() for layer in report.layers.values())
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("removed", [1, 3, 8])
@torch.no_grad()
def test_a_cropped_cache_goes_on_as_if_the_rest_had_never_been(
    routed_kind: str, make_routed: RoutedModel, removed: int, prompt: Tensor, largest_difference: Callable
) -> None:
    model = make_routed(routed_kind)
    expected = model(prompt, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == prompt.shape[1] - removed
    again = model(prompt[:, -removed:], past_key_values=cache).logits
    assert largest_difference(again, expected[:, -removed:]) < TOLERANCE


@torch.no_grad()
def test_rows_of_a_cache_can_be_repeated_reordered_and_selected(
    routed_kind: str, make_routed: RoutedModel, prompt: Tensor, largest_difference: Callable
) -> None:
    model = make_routed(routed_kind)
    cache = DynamicCache(config=model.config)
    model(prompt[:, :6], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    cache.batch_select_indices(torch.tensor([0, 3]))
    rows = prompt.flip(0)
    expected = model(rows, use_cache=False).logits[:, 6:]
    assert largest_difference(model(rows[:, 6:], past_key_values=cache).logits, expected) < TOLERANCE


@torch.no_grad()
def test_a_cache_that_was_reset_is_an_empty_one(
    routed_kind: str, make_routed: RoutedModel, prompt: Tensor, largest_difference: Callable
) -> None:
    model = make_routed(routed_kind)
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    found = model(prompt, past_key_values=cache).logits
    assert largest_difference(found, model(prompt, use_cache=False).logits) < TOLERANCE


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_functions_agree(
    routed_kind: str,
    family: str,
    implementation: str,
    make_routed: RoutedModel,
    prompt: Tensor,
    largest_difference: Callable,
) -> None:
    model = make_routed(routed_kind, family)
    expected = model(prompt, use_cache=False).logits
    model.set_attn_implementation(implementation)
    assert largest_difference(fed(model, prompt, 5, 1, 5), expected) < TOLERANCE
    assert largest_difference(model(prompt, use_cache=False).logits, expected) < TOLERANCE


@torch.no_grad()
def test_base_mode_is_the_base_with_a_cache_of_its_own(
    routed_kind: str, make_routed: RoutedModel, make_base: Callable, prompt: Tensor
) -> None:
    model, base = make_routed(routed_kind), make_base("llama", num_hidden_layers=4)
    with model.base_mode():
        assert torch.equal(model(prompt).logits, base(prompt).logits)
        produced = model.generate(prompt, max_new_tokens=9, do_sample=False)
    assert torch.equal(produced, base.generate(prompt, max_new_tokens=9, do_sample=False))


@torch.no_grad()
def test_a_cache_of_another_model_is_refused(
    routed_kind: str, make_routed: RoutedModel, make_base: Callable, prompt: Tensor
) -> None:
    if routed_kind == "mod mlp":
        pytest.skip("keeps the keys of every token, as the base does")
    model, base = make_routed(routed_kind), make_base("llama", num_hidden_layers=4)
    cache = DynamicCache(config=base.config)
    base(prompt, past_key_values=cache)
    with pytest.raises(ConfigError, match="Start with an empty cache"):
        model(prompt, past_key_values=cache)


@torch.no_grad()
def test_routing_cannot_be_switched_off_in_the_middle_of_a_cache(
    routed_kind: str, make_routed: RoutedModel, prompt: Tensor
) -> None:
    if routed_kind == "mod mlp":
        pytest.skip("keeps the keys of every token, as the base does")
    model = make_routed(routed_kind)
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    with model.base_mode(), pytest.raises(ConfigError, match="Start with an empty cache"):
        model(prompt, past_key_values=cache)
