"""Values of a wrong type are refused by name; the model stays as it was."""

import json
import os
import subprocess
import sys

import pytest

# In a process without the run-time type checks of the tests, which would catch them first.
CHILD = """
import json
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import pliant

config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=1)
model = LlamaForCausalLM(config)
preset = pliant.NptConfig.preset
calls = {
    "linear": lambda: pliant.convert(torch.nn.Linear(2, 2), preset("v1")),
    "wrapped": lambda: pliant.convert(torch.nn.DataParallel(model), preset("v1")),
    "name": lambda: pliant.convert("smollm2-135m", preset("v1")),
    "string config": lambda: pliant.convert(model, "keyed"),
    "float rank": lambda: preset("v1", rank=2.5),
    "no rank": lambda: preset("v1", rank=None),
    "energy in words": lambda: preset("keyed", energy="high"),
    "tied in words": lambda: preset("keyed", tied="yes"),
    "float updates": lambda: preset("outer", num_updates=2.0),
    "float layer": lambda: pliant.convert(model, preset("v1"), layers=[0.0]),
    "boolean layer": lambda: pliant.convert(model, preset("v1"), layers=[True]),
}
outcome = {}
for name, call in calls.items():
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        call()
        outcome[name] = ["nothing", ""]
    except Exception as error:
        outcome[name] = [type(error).__name__, str(error)]
    assert type(model) is LlamaForCausalLM
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
print(json.dumps(outcome))
"""
WRONG_TYPES = {
    "linear": ("ConversionError", ["model", "Linear", "causal LM"]),
    "wrapped": ("ConversionError", ["model", "DataParallel", "before it is wrapped"]),
    "name": ("ConversionError", ["model", "str", "causal LM"]),
    "string config": ("ConfigError", ["config", "'keyed'", "NptConfig.preset('keyed', rank=192)"]),
    "float rank": ("ConfigError", ["rank", "2.5", "Start with 16"]),
    "no rank": ("ConfigError", ["rank", "None", "Start with 16"]),
    "energy in words": ("ConfigError", ["energy", "'high'", "0.99"]),
    "tied in words": ("ConfigError", ["tied", "'yes'", "true or false"]),
    "float updates": ("ConfigError", ["num_updates", "2.0", "at least 1"]),
    "float layer": ("ConversionError", ["layers", "0.0", "0..1"]),
    "boolean layer": ("ConversionError", ["layers", "True", "0..1"]),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    child = subprocess.run([sys.executable, "-c", CHILD], env=environment, check=True, capture_output=True, timeout=120)
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_value_of_a_wrong_type_is_refused_by_name(name: str, outcomes: dict[str, list[str]]) -> None:
    error, fragments = WRONG_TYPES[name]
    kind, message = outcomes[name]
    assert kind == error, message
    assert not [fragment for fragment in fragments if fragment not in message], message
