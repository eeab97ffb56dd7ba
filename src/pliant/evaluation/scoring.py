"""What a model makes of answers: their probability, and what it writes itself. The model is taken as it is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from pliant.evaluation.editing.cases import Pair, pair_tokens, prompt_tokens
from pliant.statistics import evaluating, input_device

BATCH_TOKENS = 2_048
"""Tokens of a batch, its padding included; a longer text is read alone."""
LOGITS_CHUNK = 64

PairTokens = tuple[list[int], list[int]]
"""Tokens of a prompt and of what follows it."""


@dataclass(frozen=True, kw_only=True)
class AnswerScores:
    """Answers under a model, one value a pair.

    Attributes:
        total: ``Σ log p(token | prompt, tokens before)`` over the tokens of the answer, in nats.
        tokens: How many tokens the answer has.
        matches: How many of them are the most likely token at their place.
        ties: How many are, up to one rounding step of the largest logit in the dtype of the logits.
    """

    total: Float[Tensor, " pairs"]
    tokens: Int[Tensor, " pairs"]
    matches: Int[Tensor, " pairs"]
    ties: Int[Tensor, " pairs"]

    @property
    def mean(self) -> Float[Tensor, " pairs"]:
        """Log-probability a token."""
        return self.total / self.tokens

    @property
    def accuracy(self) -> Float[Tensor, " pairs"]:
        """Share of tokens that are the most likely ones, each given the true tokens before it."""
        return self.matches / self.tokens

    @property
    def exact(self) -> Bool[Tensor, " pairs"]:
        """Whether every token is the most likely one, so that greedy decoding writes the answer."""
        return self.matches == self.tokens

    @property
    def kept(self) -> Bool[Tensor, " pairs"]:
        """Whether greedy decoding writes the answer, or could if logits were rounded another way."""
        return self.ties == self.tokens


def answer_log_probs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> AnswerScores:
    """Returns how likely each answer is after its prompt.

    Args:
        model: A causal LM of a family that converts, with whatever is edited or active.
        tokenizer: Its tokenizer.
        pairs: Prompts and answers, tokenised by :func:`pliant.evaluation.editing.cases.pair_tokens`.

    Raises:
        DataError: A prompt or an answer is empty.
    """
    return score_tokens(model, [pair_tokens(tokenizer, prompt, answer) for prompt, answer in pairs])


@torch.no_grad()
def score_tokens(model: PreTrainedModel, pairs: Sequence[PairTokens]) -> AnswerScores:
    """Does what :func:`answer_log_probs` does, for pairs of tokens.

    Batches are padded on the right, where causal attention sees nothing of it. What comes before the last token of an
    answer is read once, however many pairs share it: answers of one token to one prompt cost as much as one of them.
    """
    device = input_device(model)
    total = torch.zeros(len(pairs))
    matches, ties = torch.zeros(2, len(pairs), dtype=torch.int64)
    owners: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, answer) in enumerate(pairs):
        owners.setdefault((*prompt, *answer[:-1]), []).append(index)
    texts = list(owners)
    with evaluating(model):
        for batch in _batches([len(text) for text in texts]):
            rows = [torch.tensor(texts[i]) for i in batch]
            inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (B, T)
            hidden = model.model(inputs, use_cache=False).last_hidden_state
            where = [
                (row, len(pairs[owner][0]) + t - 1, token, owner)
                for row, i in enumerate(batch)
                for owner in owners[texts[i]]
                for t, token in enumerate(pairs[owner][1])
            ]
            for start in range(0, len(where), LOGITS_CHUNK):
                row, position, token, owner = torch.tensor(where[start : start + LOGITS_CHUNK]).unbind(1)
                states = hidden[row.to(hidden.device), position.to(hidden.device)]
                rounded = model.lm_head(states)  # (chunk, vocabulary)
                logits = rounded.float()
                own = logits.gather(1, token[:, None].to(logits.device))[:, 0]
                largest = logits.amax(1)
                step = torch.finfo(rounded.dtype).eps * logits.abs().amax(1)
                total.index_add_(0, owner, (own - logits.logsumexp(1)).cpu())
                matches.index_add_(0, owner, (logits.argmax(1).cpu() == token).long())
                ties.index_add_(0, owner, (own >= largest - step).long().cpu())
    lengths = torch.tensor([len(answer) for _, answer in pairs])
    return AnswerScores(total=total, tokens=lengths, matches=matches, ties=ties)


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    lengths: Sequence[int] | int,
    *,
    finished: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Returns what greedy decoding writes after each prompt, batched with padding on the left and a cache.

    Args:
        model: A causal LM of a family that converts.
        prompts: Tokens.
        lengths: How many tokens to write, for each prompt or for all; end tokens are tokens like any other.
        finished: Whether these tokens are all that is wanted; a batch stops early when it is true of all its rows.
    """
    wanted = [lengths] * len(prompts) if isinstance(lengths, int) else list(lengths)
    written: list[list[int]] = [[] for _ in prompts]
    with evaluating(model):
        for batch in _batches([len(prompt) + steps for prompt, steps in zip(prompts, wanted, strict=True)]):
            longest = max(wanted[i] for i in batch)
            for tokens in _decode(model, [prompts[i] for i in batch], longest):
                for i, token in zip(batch, tokens, strict=True):
                    if len(written[i]) < wanted[i]:
                        written[i].append(token)
                if finished is not None and all(finished(written[i]) for i in batch):
                    break
    return written


def free_running_exact(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]
) -> Bool[Tensor, " pairs"]:
    """Returns whether greedy decoding writes the tokens of each answer after its prompt.

    :attr:`AnswerScores.exact` is the same, as each greedy token follows greedy tokens only; this one shows it.
    """
    tokens = [pair_tokens(tokenizer, prompt, answer) for prompt, answer in pairs]
    written = continuations(model, [prompt for prompt, _ in tokens], [len(answer) for _, answer in tokens])
    return torch.tensor([own == answer for own, (_, answer) in zip(written, tokens, strict=True)])


def free_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, num_tokens: int = 24
) -> list[str]:
    """Returns the first line that greedy decoding writes after each prompt, stripped, up to the end token."""
    end = tokenizer.eos_token_id

    def line(tokens: list[int]) -> tuple[str, bool]:
        before = tokens[: tokens.index(end)] if end in tokens else tokens
        text = str(tokenizer.decode(before, skip_special_tokens=True)).lstrip()
        return text.split("\n", 1)[0].strip(), len(before) < len(tokens) or "\n" in text

    written = continuations(
        model,
        [prompt_tokens(tokenizer, prompt) for prompt in prompts],
        num_tokens,
        finished=lambda tokens: line(tokens)[1],
    )
    return [line(tokens)[0] for tokens in written]


def _decode(model: PreTrainedModel, prompts: Sequence[list[int]], steps: int) -> Iterator[list[int]]:
    """Yields the next greedy token of every row, ``steps`` times."""
    device, width = input_device(model), max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)  # (B, T)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    for _ in range(steps):
        hidden = model.model(
            tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        tokens = model.lm_head(hidden).float().argmax(-1, keepdim=True).to(device)  # (B, 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
        yield tokens[:, 0].tolist()


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yields indices of texts of about one length, as many as fit into a batch."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
