"""Probabilities of answers and greedy continuations, whatever the batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pliant.evaluation import scoring
from pliant.evaluation.scoring import (
    answer_log_probs,
    continuations,
    free_answers,
    free_running_exact,
    score_tokens,
)

PAIRS = [("2 3 4", "5"), ("6 7", "8 9 10"), ("11 12 13 14 15 16 17 18 19", "20 21"), ("22", "23")]


def words(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


@torch.no_grad()
def by_hand(model: Any, prompt: list[int], answer: list[int]) -> tuple[float, int]:
    """Sum of log-probabilities and number of greedy tokens, a text at a time."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    token = torch.tensor(answer)
    return float(logits[torch.arange(len(token)), token].sum()), int((logits.argmax(-1) == token).sum())


@pytest.mark.parametrize("batch_tokens", [1, 24, 2_048])
def test_log_probs_are_those_of_each_text_alone(
    make_base: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    family: str,
    batch_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(scoring, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(scoring, "LOGITS_CHUNK", 2)
    model = make_base(family).train()
    scores = answer_log_probs(model, tokenizer, PAIRS)
    assert model.training
    model.eval()
    for index, (prompt, answer) in enumerate(PAIRS):
        total, matches = by_hand(model, list(map(int, prompt.split())), list(map(int, answer.split())))
        assert scores.total[index].item() == pytest.approx(total, rel=1e-4)
        assert scores.matches[index] == matches
    assert scores.tokens.tolist() == [1, 3, 2, 1]
    torch.testing.assert_close(scores.mean, scores.total / scores.tokens)


def test_what_pairs_share_is_read_once(make_base: Callable[..., Any]):
    model, read = make_base(), []
    pairs = [([2, 3, 4], [5]), ([2, 3, 4], [6]), ([2, 3], [4, 7]), ([2, 3, 4], [5]), ([2, 3, 4], [5, 6])]
    handle = model.model.register_forward_pre_hook(lambda _, arguments: read.extend(arguments[0].tolist()))
    scores = score_tokens(model, pairs)
    handle.remove()
    assert read == [[2, 3, 4, 0], [2, 3, 4, 5]]
    for index, (prompt, answer) in enumerate(pairs):
        total, matches = by_hand(model, prompt, answer)
        assert scores.total[index].item() == pytest.approx(total, rel=1e-4)
        assert scores.matches[index] == matches


@torch.no_grad()
def greedy(model: Any, prompt: list[int], steps: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("batch_tokens", [1, 2_048])
def test_continuations_are_those_of_each_text_alone(
    make_base: Callable[..., Any], family: str, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scoring, "BATCH_TOKENS", batch_tokens)
    model = make_base(family)
    prompts = [[2, 3, 4], [5], [6, 7, 8, 9, 10, 11, 12, 13], [14, 15]]
    lengths = [4, 7, 2, 1]
    expected = [greedy(model, prompt, steps) for prompt, steps in zip(prompts, lengths, strict=True)]
    assert continuations(model, prompts, lengths) == expected
    assert continuations(model, prompts, 1) == [tokens[:1] for tokens in expected]
    assert continuations(model, [], 3) == []


def test_a_converted_model_is_scored_as_it_is(
    make_base: Callable[..., Any], make_converted: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
):
    model = make_converted("v1")
    own = answer_log_probs(model, tokenizer, PAIRS).total
    base = answer_log_probs(make_base(), tokenizer, PAIRS).total
    assert not torch.allclose(own, base)
    with model.base_mode():
        torch.testing.assert_close(answer_log_probs(model, tokenizer, PAIRS).total, base)


def test_exact_is_what_greedy_decoding_writes(make_base: Callable[..., Any], tokenizer: PreTrainedTokenizerFast):
    model = make_base()
    prompts = [[i, i + 1, i + 2] for i in range(2, 42)]
    own = continuations(model, prompts, 3)
    answers = [tokens if i % 2 else [*tokens[:2], 2 + (tokens[2] + 5) % 90] for i, tokens in enumerate(own)]
    sound = [i for i, tokens in enumerate(answers) if min(tokens) > 1]  # the words of this tokenizer
    pairs = [(words(prompts[i]), words(answers[i])) for i in sound]
    exact = free_running_exact(model, tokenizer, pairs)
    scores = answer_log_probs(model, tokenizer, pairs)
    assert exact.tolist() == scores.exact.tolist() == scores.kept.tolist() == [bool(i % 2) for i in sound]
    assert 0 < exact.sum() < len(exact)


def test_rounding_is_no_change(make_base: Callable[..., Any]):
    model = make_base().bfloat16()
    prompts = [[i, i + 1, i + 2] for i in range(2, 90)]
    written = continuations(model, prompts, 5)
    assert score_tokens(model, list(zip(prompts, written, strict=True))).kept.float().mean() > 0.97


def test_free_answers_are_first_lines(
    make_base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
):
    written = {7: [4, 5, 6], 8: [4, 9, 6], 10: [5, 4, 4]}
    seen: list[bool] = []

    def fake(_model: Any, prompts: list[list[int]], _steps: int, *, finished: Callable[[list[int]], bool]) -> Any:
        found = [written[prompt[-1]] for prompt in prompts]
        seen.extend(finished(tokens) for tokens in found)
        return found

    monkeypatch.setattr(scoring, "continuations", fake)
    tokenizer.eos_token = "9"
    text = {4: " word", 5: "\n", 6: " more"}
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: "".join(text[i] for i in ids), raising=False)
    assert free_answers(make_base(), tokenizer, ["7", "8", "10"]) == ["word", "word", "word word"]
    assert seen == [True, True, False]


def test_decoding_stops_when_every_row_is_finished(make_base: Callable[..., Any]):
    written = continuations(make_base(), [[2, 3], [4]], 9, finished=lambda tokens: len(tokens) >= 2)
    assert [len(tokens) for tokens in written] == [2, 2]


def test_gradients_are_not_kept(make_base: Callable[..., Any], tokenizer: PreTrainedTokenizerFast):
    total: Tensor = answer_log_probs(make_base(), tokenizer, PAIRS).total
    assert not total.requires_grad
