"""Counts of a conversion, against a converted model and against torch's own FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pliant.architectures import NptConfig
from pliant.conversion.summary import NF4_BITS, summarise
from pliant.errors import ConversionError
from pliant.models import shape_config

RANK = 6


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("v1", {}),
        ("v2", {"modulation": "multiplicative"}),
        ("outer", {"targets": "all", "num_updates": 3}),
        ("outer", {"key_bias": False}),
        ("keyed", {"tied": True}),
        ("keyed_pre", {}),
    ],
)
def test_parameters_are_those_of_a_converted_model(make_base, make_converted, form, options):
    model = make_converted(form, layers=[0, 2], **options)
    config = NptConfig.preset(form, rank=RANK, **options)
    summary = summarise(make_base().config, {0: config, 2: config})
    for index, layer in model.dynamic_layers.items():
        assert summary.layers[index].parameters == sum(p.numel() for p in layer.plastic.parameters())
    assert summary.added_parameters == sum(p.numel() for _, p in model.dynamic_parameters())
    assert summary.base_parameters == sum(p.numel() for p in make_base().parameters())


def test_every_family_is_counted(make_base, family):
    base = make_base(family)
    summary = summarise(base.config, {1: NptConfig.preset("keyed", rank=RANK)})
    assert summary.family == family
    assert summary.base_parameters == sum(p.numel() for p in base.parameters())
    assert summary.added_parameters == 2 * RANK * summary.d_model


def test_tied_embeddings_count_once(make_base):
    tied = make_base(tie_word_embeddings=True)
    summary = summarise(tied.config, {})
    assert summary.base_parameters == sum(p.numel() for p in tied.parameters())


def test_base_flops_are_those_that_torch_counts(make_base):
    base = make_base("qwen2", attn_implementation="eager")
    length = 7
    with FlopCounterMode(display=False) as counter:
        base(torch.ones(1, length, dtype=torch.long), use_cache=False)
    summary = summarise(base.config, {}, context=length)
    # transformers 5.17 takes the rotary angles by a matrix product, which is not ours to count
    assert counter.get_total_flops() / length == pytest.approx(summary.base_flops, rel=1e-3)


@pytest.mark.parametrize(
    ("form", "options", "elementwise"),
    [
        ("v1", {}, 0),
        ("v2", {}, 0),
        ("keyed", {}, 0),
        ("keyed", {"tied": True}, 0),
        ("keyed_pre", {}, 0),
        # The value times its strength is no matrix product, so torch does not count it.
        ("outer", {"targets": "all", "num_updates": 2}, 2 * 2 * (48 + 48 + 32)),
    ],
)
def test_added_flops_are_those_that_torch_counts(make_base, make_converted, form, options, elementwise):
    model = make_converted(form, layers=[1], **options)
    tokens = torch.ones(1, 5, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False)
    with model.base_mode(), FlopCounterMode(display=False) as base_counter:
        model(tokens, use_cache=False)
    counted = (counter.get_total_flops() - base_counter.get_total_flops()) / 5
    summary = summarise(make_base().config, {1: NptConfig.preset(form, rank=RANK, **options)})
    assert summary.added_flops - elementwise == counted


def test_automatic_rank_is_an_upper_bound(make_base):
    config = make_base().config
    summary = summarise(config, {0: NptConfig.preset("keyed"), 1: NptConfig.preset("v1")})
    assert summary.is_upper_bound
    assert summary.layers[0].rank == "auto"
    assert summary.layers[0].parameters == 2 * config.hidden_size**2
    assert not summarise(config, {1: NptConfig.preset("v1")}).is_upper_bound


def test_quantised_memory_leaves_embeddings_in_bfloat16():
    summary = summarise(shape_config("llama-3.2-1b"), {})
    embeddings = 128_256 * 2048
    norms = (2 * 16 + 1) * 2048
    linear = summary.base_parameters - embeddings - norms
    assert summary.base_nf4_bytes == 2 * (embeddings + norms) + round(linear * NF4_BITS / 8)
    assert 4.12 < NF4_BITS < 4.13


def test_to_dict_is_json(make_base):
    told = summarise(make_base().config, {2: NptConfig.preset("v1")}).to_dict()
    assert told["layers"] == {"2": {"form": "v1", "rank": 16, "parameters": 1280, "flops": 2560}}
    assert told["added_share"] == 1280 / told["base_parameters"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({7: NptConfig.preset("v1")}, r"layers must be in 0\.\.2"),
        ({0: NptConfig.preset("v1", rank=33)}, r"rank must be in 1\.\.32 \(d_model\); got 33"),
    ],
)
def test_what_does_not_fit_is_refused(make_base, layers, message):
    with pytest.raises(ConversionError, match=message):
        summarise(make_base().config, layers)
