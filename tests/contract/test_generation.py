"""What a dynamic model computes does not depend on how tokens are fed: cached, padded, batched, drafted."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

TOLERANCE = 1e-5
"""Largest difference over largest logit, fp32: the same sums, grouped otherwise."""
NEW_TOKENS = 9


def positions_of(mask: Tensor) -> Tensor:
    """Positions as ``generate`` counts them: padding on the left takes none."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def in_chunks(model: PreTrainedModel, tokens: Tensor, *sizes: int) -> Tensor:
    """Logits with the tokens fed in chunks, from a cache."""
    cache, rows = None, []
    for chunk in tokens.split([*sizes, tokens.shape[1] - sum(sizes)], dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits)
    return torch.cat(rows, dim=1)


def uncached_greedy(model: PreTrainedModel, tokens: Tensor, steps: int = NEW_TOKENS) -> Tensor:
    """The most likely continuation, with the whole sequence computed anew at each step."""
    for _ in range(steps):
        chosen = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], dim=1)
    return tokens


@pytest.fixture
def model(dynamic_kind: str, family: str, make_dynamic: Callable) -> PreTrainedModel:
    return make_dynamic(dynamic_kind, family)


@pytest.mark.parametrize("detail", ["bare", "reported"])
@torch.no_grad()
def test_logits_are_the_same_however_the_tokens_are_fed(
    model: PreTrainedModel, detail: str, prompt: Tensor, largest_difference: Callable
) -> None:
    expected = model(prompt, use_cache=False).logits
    pads, singly = 4, [1] * (prompt.shape[1] - 1)
    padded = torch.cat([torch.zeros_like(prompt[:, :pads]), prompt], dim=1)
    mask = (torch.arange(padded.shape[1]) >= pads).long().expand_as(padded)
    short = prompt.clone()  # the second row is shorter, padded on the left
    short[1] = torch.cat([torch.zeros(pads, dtype=torch.long), prompt[1, :-pads]])
    short_mask = torch.ones_like(short)
    short_mask[1, :pads] = 0

    def feed_all_ways() -> dict[str, tuple[Tensor, Tensor]]:
        left = model(padded, attention_mask=mask, position_ids=positions_of(mask)).logits
        mixed = model(short, attention_mask=short_mask, position_ids=positions_of(short_mask)).logits
        return {
            "at once, with a cache": (in_chunks(model, prompt), expected),
            "token by token": (in_chunks(model, prompt, *singly), expected),
            "two chunks": (in_chunks(model, prompt, 6), expected),
            "three chunks": (in_chunks(model, prompt, 1, 7), expected),
            "alone": (torch.cat([model(row[None]).logits for row in prompt]), expected),
            "alone, token by token": (torch.cat([in_chunks(model, row[None], *singly) for row in prompt]), expected),
            "left-padded": (left[:, pads:], expected),
            "beside a shorter row": (mixed[0], expected[0]),
            "shorter row": (mixed[1, pads:], expected[1, :-pads]),
        }

    if detail == "reported":
        with model.report(writes=True):
            outcomes = feed_all_ways()
    else:
        outcomes = feed_all_ways()
    for way, (logits, wanted) in outcomes.items():
        assert largest_difference(logits, wanted) < TOLERANCE, way


def test_generate_equals_uncached_greedy(model: PreTrainedModel, prompt: Tensor) -> None:
    expected = uncached_greedy(model, prompt)
    for options in ({}, {"use_cache": False}):
        assert torch.equal(model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, **options), expected)


def test_a_form_generates_the_same_from_a_static_cache(
    form: str, family: str, make_converted: Callable, prompt: Tensor
) -> None:
    model = make_converted(form, family)
    produced = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, cache_implementation="static")
    assert torch.equal(produced, uncached_greedy(model, prompt))


def test_generate_from_left_padded_rows_equals_each_row_alone(model: PreTrainedModel, prompt: Tensor) -> None:
    pads = 3
    batch, mask = prompt.clone(), torch.ones_like(prompt)
    batch[1] = torch.cat([torch.zeros(pads, dtype=torch.long), prompt[1, :-pads]])
    mask[1, :pads] = 0
    produced = model.generate(batch, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    for row, alone in zip(produced, (prompt[:1], prompt[1:, :-pads]), strict=True):
        expected = uncached_greedy(model, alone)[0, alone.shape[1] :]
        assert torch.equal(row[prompt.shape[1] :], expected)


def test_beam_search_scores_what_it_returns_as_an_uncached_forward_does(model: PreTrainedModel, prompt: Tensor) -> None:
    produced = model.generate(
        prompt,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=3,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_scores=True,
    )
    log_p = model(produced.sequences, use_cache=False).logits.log_softmax(-1)
    chosen = produced.sequences[:, prompt.shape[1] :, None]
    expected = log_p[:, prompt.shape[1] - 1 : -1].gather(-1, chosen).mean((1, 2))
    torch.testing.assert_close(produced.sequences_scores, expected, rtol=TOLERANCE, atol=0.0)
    assert len({tuple(row) for row in produced.sequences.tolist()}) == 6


@pytest.mark.parametrize("draft", ["weaker", "itself"])
def test_assisted_decoding_equals_uncached_greedy(
    dynamic_kind: str, family: str, draft: str, make_dynamic: Callable, make_base: Callable, prompt: Tensor
) -> None:
    """Without a sliding window, whose cache the base's own classes cannot crop either."""
    overrides = {"sliding_window": None} if family in ("mistral", "qwen2") else {}
    if family == "qwen2":
        overrides["use_sliding_window"] = False
    target = make_dynamic(dynamic_kind, family, overrides=overrides)
    assistant = make_base("llama", seed=9) if draft == "weaker" else target
    produced = target.generate(prompt[:1], max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=assistant)
    assert torch.equal(produced, uncached_greedy(target, prompt[:1]))


def test_converted_model_drafts_for_its_base(
    form: str, make_converted: Callable, make_base: Callable, prompt: Tensor
) -> None:
    base = make_base()
    produced = base.generate(
        prompt[:1], max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=make_converted(form)
    )
    assert torch.equal(produced, uncached_greedy(base, prompt[:1]))
