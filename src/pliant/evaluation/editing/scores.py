"""What an edit did to a model, case by case: ROME's and MEMIT's measures, exact answers, and free text.

The model is scored as it is; whoever calls applies the edit before and takes it back after. All of a case's measures
but free text come from one batched forward pass, since greedy decoding writes a text exactly if each of its tokens is
the most likely one after those before it.
"""

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.evaluation.answers import exact_match, f1, generation_entropy
from pliant.evaluation.editing.cases import EditCase, Pair, pair_tokens, prompt_tokens
from pliant.evaluation.scoring import AnswerScores, PairTokens, continuations, free_answers, score_tokens

NEIGHBOUR_TOKENS = 5
"""How long a neighbour's continuation is watched."""
ENTROPY_TOKENS = 100

Scores = dict[str, Any]
Continuations = Sequence[Sequence[int]]
"""Tokens that the unedited model writes after each neighbour of a case."""


def neighbour_continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[EditCase]
) -> list[list[list[int]]]:
    """Returns what the model writes after every neighbour of every case, five tokens each."""
    prompts = [prompt_tokens(tokenizer, prompt) for case in cases for prompt, _ in case.neighbours]
    written = iter(continuations(model, prompts, NEIGHBOUR_TOKENS))
    return [[next(written) for _ in case.neighbours] for case in cases]


def score_case(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    case: EditCase,
    before: Continuations,
    *,
    entropy: bool = False,
) -> Scores:
    """Returns the measures of one case; see :func:`score_cases`."""
    return score_cases(model, tokenizer, [case], [before], entropy=entropy)[0]


def score_cases(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[EditCase],
    before: Sequence[Continuations],
    *,
    entropy: bool = False,
) -> list[Scores]:
    """Returns the measures of each case, all in 0..1 unless said otherwise.

    With P the geometric mean probability a token, over the case's prompts of a kind:

    - ``efficacy``, ``paraphrase``: P(new) > P(old), and ``…_magnitude``, P(new) − P(old); only with an old answer.
    - ``neighbourhood``: P(true) > P(new) on neighbours, and ``neighbourhood_magnitude``, P(true) − P(new).
    - ``exact``, ``exact_paraphrase``: greedy decoding writes the answer, token by token.
    - ``accuracy``, ``accuracy_paraphrase``, ``accuracy_neighbourhood``: share of the answer's tokens that are the most
      likely ones, given the true ones before (zsRE's measure, which flatters).
    - ``neighbourhood_unchanged``: the next five tokens after a neighbour are those of the unedited model, up to
      one rounding step of the logits.
    - ``log_prob``, ``log_prob_paraphrase``, ``log_prob_neighbourhood``: log P of the right answer, in nats.
    - ``exact_match``, ``f1``, and the ``answers`` themselves: of free text, where a case has reference answers.
    - ``generation_entropy``: of 100 tokens after the prompt, about 0..700; only with ``entropy``.

    A measure that does not apply to a case is left out.

    Args:
        model: The model as it is to be judged.
        tokenizer: Its tokenizer.
        cases: What to measure; ``case.in_context()`` for the context in view.
        before: What :func:`neighbour_continuations` returned for the unedited model, without any context.
        entropy: Measure the entropy too, which is slow.
    """
    rows: list[PairTokens] = []
    spans = []
    for case, written in zip(cases, before, strict=True):
        pairs = [pair_tokens(tokenizer, prompt, answer) for prompt, answer in _pairs(case)]
        kept = [(prompt_tokens(tokenizer, n[0]), list(w)) for n, w in zip(case.neighbours, written, strict=True)]
        spans.append(slice(len(rows), len(rows) + len(pairs) + len(kept)))
        rows += pairs + kept
    scores = score_tokens(model, rows)
    found = [_measures(case, scores, span) for case, span in zip(cases, spans, strict=True)]
    _add_free_text(model, tokenizer, cases, found)
    if entropy:
        prompts = [prompt_tokens(tokenizer, case.prompt) for case in cases]
        for measures, tokens in zip(found, continuations(model, prompts, ENTROPY_TOKENS), strict=True):
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            measures["generation_entropy"] = generation_entropy(text)
    return found


def _pairs(case: EditCase) -> list[Pair]:
    """New answers, then the old ones if there is one, then the neighbours' true answers and the new one there."""
    prompts = (case.prompt, *case.paraphrases)
    pairs = [(prompt, case.answer) for prompt in prompts]
    if case.old_answer is not None:
        pairs += [(prompt, case.old_answer) for prompt in prompts]
    pairs += case.neighbours
    return pairs + [(prompt, case.answer) for prompt, _ in case.neighbours]


def _measures(case: EditCase, scores: AnswerScores, span: slice) -> Scores:
    log_p = scores.mean[span].tolist()
    accuracy, exact = scores.accuracy[span].tolist(), scores.exact[span].float().tolist()
    asked, neighbours = 1 + len(case.paraphrases), len(case.neighbours)
    first_neighbour = asked if case.old_answer is None else 2 * asked
    found: Scores = {"log_prob": log_p[0], "exact": exact[0], "accuracy": accuracy[0]}
    if case.paraphrases:
        rest = slice(1, asked)
        found["log_prob_paraphrase"] = _mean(log_p[rest])
        found["exact_paraphrase"], found["accuracy_paraphrase"] = _mean(exact[rest]), _mean(accuracy[rest])
    if case.old_answer is not None:
        new, old = log_p[:asked], log_p[asked : 2 * asked]
        found |= _preference("efficacy", new[:1], old[:1])
        if case.paraphrases:
            found |= _preference("paraphrase", new[1:], old[1:])
    if neighbours:
        true, new, kept = (
            slice(first_neighbour + i * neighbours, first_neighbour + (i + 1) * neighbours) for i in range(3)
        )
        found |= _preference("neighbourhood", log_p[true], log_p[new])
        found["log_prob_neighbourhood"] = _mean(log_p[true])
        found["accuracy_neighbourhood"] = _mean(accuracy[true])
        found["neighbourhood_unchanged"] = _mean(scores.kept[span].float().tolist()[kept])
    return found


def _preference(name: str, wanted: Sequence[float], other: Sequence[float]) -> Scores:
    pairs = list(zip(wanted, other, strict=True))
    return {
        name: _mean([float(a > b) for a, b in pairs]),
        f"{name}_magnitude": _mean([math.exp(a) - math.exp(b) for a, b in pairs]),
    }


def _add_free_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[EditCase], found: Sequence[Scores]
) -> None:
    prompts = [prompt for case in cases for prompt, _ in case.asked]
    texts = iter(free_answers(model, tokenizer, prompts))
    for case, measures in zip(cases, found, strict=True):
        if case.asked:
            answered = [(next(texts), references) for _, references in case.asked]
            measures["exact_match"] = _mean([exact_match(text, references) for text, references in answered])
            measures["f1"] = _mean([f1(text, references) for text, references in answered])
            measures["answers"] = [text for text, _ in answered]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
