"""What a user gets wrong in settings and conversions: an error that helps, nothing changed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModel, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

import pliant
from pliant.errors import ConfigError, ConversionError, DataError, PliantError
from pliant.statistics import attention_statistics

preset = pliant.NptConfig.preset


@dataclass
class Context:
    """What a case works on."""

    model: Any
    tokens: torch.Tensor

    def convert(self, *args: Any, **options: Any) -> Any:
        return pliant.convert(self.model, *args, **{"calibration": self.tokens, **options})


def convert_to(form: str = "v1", options: dict[str, Any] | None = None, **arguments: Any) -> Callable:
    return lambda c: c.convert(preset(form, **(options or {})), **arguments)


def gpt2(c: Context) -> None:
    c.model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20))


def inner_model(c: Context) -> None:
    c.model = c.model.model


def auto_inner_model(c: Context) -> None:
    c.model = AutoModel.from_config(c.model.config)


def converted(c: Context) -> None:
    c.convert(preset("v1"), layers=[0, 1])


def int8(c: Context) -> None:
    c.model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)


def not_finite(c: Context) -> None:
    with torch.no_grad():
        c.model.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")


def partial_statistics(c: Context) -> Any:
    statistics = attention_statistics(c.model, c.tokens, layers=[0])
    return c.convert(preset("keyed", rank=4), calibration=statistics)


@dataclass
class Case:
    """A call that goes wrong, its error, and what the message holds: field, value, rule, remedy."""

    call: Callable[[Context], Any]
    error: type[PliantError]
    fragments: str
    spoil: Callable[[Context], Any] = lambda context: None

    @property
    def pieces(self) -> list[str]:
        return self.fragments.split(" | ")


CASES = {
    "unknown form": Case(
        lambda c: pliant.NptConfig(form="keyd"),
        ConfigError,
        "form | 'keyd' | v1_single | Did you mean 'keyed'?",
    ),
    "unknown preset": Case(lambda c: preset("outter"), ConfigError, "preset | 'outter' | Did you mean 'outer'?"),
    "unknown option": Case(lambda c: preset("v1", rnak=3), ConfigError, "'rnak' | regulariser | Did you mean 'rank'?"),
    "rank zero": Case(lambda c: preset("v1", rank=0), ConfigError, "rank | got 0 | 1..d_model | Start with 16"),
    "rank in words": Case(lambda c: preset("v1", rank="many"), ConfigError, "rank | 'many' | Start with"),
    "automatic rank without closed form": Case(
        lambda c: preset("v2", rank="auto"), ConfigError, "rank='auto' | form='v2' | rank=16"
    ),
    "energy above one": Case(lambda c: preset("keyed", energy=1.5), ConfigError, "energy | 1.5 | (0, 1] | 0.99"),
    "no updates": Case(lambda c: preset("outer", num_updates=0), ConfigError, "num_updates | got 0 | at least 1"),
    "unknown regulariser": Case(
        lambda c: preset("v1", regulariser="frobenious"),
        ConfigError,
        "regulariser | 'frobenious' | Did you mean 'frobenius'?",
    ),
    "unknown targets": Case(lambda c: preset("outer", targets="gates"), ConfigError, "targets | 'gates' | gate_up"),
    "unknown modulation": Case(
        lambda c: preset("v2", modulation="add"), ConfigError, "modulation | 'add' | multiplicative"
    ),
    "unknown allocation": Case(
        lambda c: preset("keyed", rank=4, allocation="even"),
        ConfigError,
        "allocation | 'even' | uniform",
    ),
    "option of another form": Case(
        lambda c: preset("v1", modulation="additive"),
        ConfigError,
        "modulation='additive' | form='v1' | v2 | Leave modulation out",
    ),
    "allocation without a budget": Case(
        lambda c: preset("keyed", allocation="sensitivity"),
        ConfigError,
        "allocation='sensitivity' | rank='auto' | rank=128",
    ),
    "rank above width": Case(
        convert_to("outer", {"rank": 33}), ConversionError, "rank | 33 | 1..32 (d_model) | Lower it"
    ),
    "rank above width in a map": Case(
        lambda c: c.convert(layers={"0": "v1", "1": preset("keyed", rank=64)}),
        ConversionError,
        "rank | 64 | layer 1 | Lower it",
    ),
    "layer out of range": Case(convert_to(layers=[0, 3]), ConversionError, "layers | got 3 | 0..2 | has 3"),
    "negative layer": Case(convert_to(layers=[-1]), ConversionError, "layers | got -1 | 0..2"),
    "range out of range": Case(convert_to(layers="1-5"), ConversionError, "layers | '1-5' | 0..2"),
    "no layers": Case(convert_to(layers=[]), ConversionError, "layers | [] | 'all'"),
    "repeated layer": Case(convert_to(layers=[1, 1]), ConversionError, "layers | [1, 1] | once"),
    "reversed range": Case(convert_to(layers="2-1"), ConversionError, "layers | '2-1' | Write '1-2'"),
    "misspelt selection": Case(
        convert_to(layers="upperhalf"),
        ConversionError,
        "layers | 'upperhalf' | Did you mean 'upper_half'?",
    ),
    "map and configuration": Case(
        lambda c: c.convert(preset("v1"), layers={"0": "v2"}),
        ConfigError,
        "layers | config | Drop one",
    ),
    "empty map": Case(lambda c: c.convert(layers={}), ConversionError, "layers | empty map | 'all'"),
    "map that repeats a layer": Case(
        lambda c: c.convert(layers={"0-1": "v1", "1-2": "v2"}),
        ConversionError,
        "layers | '1-2' | layer 1 | once",
    ),
    "map with an unknown preset": Case(
        lambda c: c.convert(layers={"0": "v1", "1": "v3"}),
        ConfigError,
        "preset | 'v3' | v1, v1_single, v2",
    ),
    "another family": Case(
        convert_to(),
        ConversionError,
        "model_type | 'gpt2' | llama, mistral, qwen2, qwen3, smollm3 | choose a base",
        spoil=gpt2,
    ),
    "inner model": Case(
        convert_to(),
        ConversionError,
        "model | LlamaModel | LlamaForCausalLM | AutoModelForCausalLM",
        spoil=inner_model,
    ),
    "model without a head": Case(
        convert_to(), ConversionError, "model | LlamaModel | pliant.load", spoil=auto_inner_model
    ),
    "converted twice": Case(
        convert_to("v2", layers=[1, 2]),
        ConversionError,
        "layers | layer 1 already | 'v1' | choose other layers",
        spoil=converted,
    ),
    "int8 and keyed_pre": Case(
        convert_to("keyed_pre", {"rank": 4}),
        ConversionError,
        "'keyed_pre' | int8 | load_in_8bit | Use 'keyed'",
        spoil=int8,
    ),
    "too little calibration text": Case(
        lambda c: c.convert(preset("keyed", rank=4), calibration=c.tokens[:4]),
        DataError,
        "calibration | (4, 12) | more than 4 | (32, 512)",
    ),
    "fewer calibration tokens than directions": Case(
        lambda c: c.convert(preset("keyed", rank=4), calibration=c.tokens[:6]),
        DataError,
        "calibration | 32 tokens | got 24 | 16,384",
    ),
    "statistics of other layers": Case(partial_statistics, ConfigError, "calibration | layer 1"),
    "weights that are not finite": Case(
        convert_to("keyed", {"rank": 4}), DataError, "layer 1 | finite | bfloat16", spoil=not_finite
    ),
    "reading perplexity of single tokens": Case(
        lambda c: pliant.perplexity(c.model, c.tokens[:, :1]),
        DataError,
        "tokens | (10, 1) | two tokens | token_windows",
    ),
    "switching a layer that was not converted": Case(
        lambda c: c.model.set_active(False, [2]),
        ConfigError,
        "layers | [2] | [0, 1] | Convert them first",
        spoil=converted,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_error_helps_and_nothing_changes(
    name: str, make_base: Callable, calibration: torch.Tensor, state_of: Callable
) -> None:
    case = CASES[name]
    context = Context(model=make_base(), tokens=calibration)
    case.spoil(context)
    model, before = context.model, state_of(context.model)
    config, hooks = model.config.to_dict(), [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(case.error) as raised:
        case.call(context)
    assert type(raised.value) is case.error
    missing = [piece for piece in case.pieces if piece not in str(raised.value)]
    assert not missing, f"{raised.value} lacks {missing}"
    assert state_of(model) == before
    assert model.config.to_dict() == config
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_missing_tokenizer_is_named_when_texts_are_to_be_read(make_base: Callable, state_of: Callable) -> None:
    model = make_base()
    before = state_of(model)
    with pytest.raises(PliantError, match="tokenizer"):
        pliant.convert(model, pliant.NptConfig.preset("keyed", rank=4), calibration=["some text"])
    assert state_of(model) == before
