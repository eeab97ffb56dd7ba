"""Converted layers and models compile into one graph that computes the same."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

from pliant.config import TrainingConfig
from pliant.training.objectives import OBJECTIVES, Student

TOLERANCE = 1e-5
OPTIONS: dict[str, dict[str, Any]] = {"outer": {"targets": "all", "num_updates": 2}}
INDUCTOR_FORM = "keyed"


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_inputs(model: nn.Module, prompt: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What layer 1 receives in a forward without a cache."""
    seen: dict[str, Any] = {}
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda _m, args, kwargs: seen.update(h=args[0], kwargs=kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(prompt, use_cache=False)
    handle.remove()
    return seen["h"].detach(), seen["kwargs"]


def run_layer(layer: nn.Module, compiled: Any, h: Tensor, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Output, report and gradients of one call."""
    layer.zero_grad()
    h = h.clone().requires_grad_(True)
    out = compiled(h, **kwargs)
    loss = out.square().mean()
    values = {"out": out}
    if layer.recording is not None:
        values |= {"norm": layer.layer_report.norm, "regulariser": layer.layer_report.regulariser}
        loss = loss + layer.layer_report.regulariser.mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in layer.plastic.named_parameters()}
    return values | gradients | {"h": h.grad}


def assert_compiles(model: nn.Module, prompt: Tensor, recording: str | None, backend: str) -> None:
    layer = model.model.layers[1]
    h, kwargs = layer_inputs(model, prompt)
    layer.recording = recording
    expected = run_layer(layer, layer, h, kwargs)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    actual = run_layer(layer, compiled, h, kwargs)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        scale = expected[name].abs().max()
        assert scale > 0, name
        assert (value - expected[name]).abs().max() < TOLERANCE * scale, name


@pytest.mark.parametrize("recording", [None, "norms", "writes"])
def test_layer_is_one_graph(form: str, recording: str | None, make_converted: Callable, prompt: Tensor) -> None:
    model = make_converted(form, **OPTIONS.get(form, {}))
    assert_compiles(model, prompt, recording, "eager")


@pytest.mark.parametrize("recording", [pytest.param(None, marks=pytest.mark.slow), "norms"])
def test_layer_computes_the_same_when_compiled_by_inductor(
    recording: str | None, make_converted: Callable, prompt: Tensor
) -> None:
    assert_compiles(make_converted(INDUCTOR_FORM), prompt, recording, "inductor")


def decode(model: nn.Module, step: Any, prompt: Tensor) -> Tensor:
    """Logits of six tokens, one a call, after a prefill into a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(prompt[:, :5], past_key_values=cache, use_cache=True)
        rows = [
            step(prompt[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(5, prompt.shape[1])
        ]
    return torch.cat(rows, dim=1)


def assert_decoding_compiles(model: nn.Module, prompt: Tensor, backend: str) -> None:
    expected = decode(model, model, prompt)
    with torch.no_grad():
        uncached = model(prompt, use_cache=False).logits[:, 5:]
    step = torch.compile(model, fullgraph=True, backend=backend)
    actual = decode(model, step, prompt)
    for reference in (expected, uncached):
        assert (actual - reference).abs().max() < TOLERANCE * reference.abs().max()


def test_decoding_step_with_a_static_cache_is_one_graph(form: str, make_converted: Callable, prompt: Tensor) -> None:
    assert_decoding_compiles(make_converted(form, **OPTIONS.get(form, {})), prompt, "eager")


@pytest.mark.slow
def test_decoding_step_computes_the_same_when_compiled_by_inductor(make_converted: Callable, prompt: Tensor) -> None:
    assert_decoding_compiles(make_converted(INDUCTOR_FORM), prompt, "inductor")


@pytest.mark.parametrize("form", ["v2", "keyed_pre"])
def test_base_mode_is_compiled_as_the_base(
    form: str, make_base: Callable, make_converted: Callable, prompt: Tensor
) -> None:
    """A switch flipped between calls is seen by the compiled model."""
    model = make_converted(form)
    expected = model(prompt, use_cache=False).logits
    base = make_base()(prompt, use_cache=False).logits
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(prompt, use_cache=False).logits, expected, atol=1e-4)
    with model.base_mode():
        assert torch.allclose(compiled(prompt, use_cache=False).logits, base, atol=1e-4)
    assert torch.allclose(compiled(prompt, use_cache=False).logits, expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look at inputs
@pytest.mark.parametrize("objective", ["layerwise", "end_to_end"])
def test_compiled_layers_learn_as_plain_ones(
    make_converted: Callable[..., Any], prompt: Tensor, objective: str
) -> None:
    batch = {"input_ids": prompt, "labels": prompt}
    results = []
    for compiled in (False, True):
        model = make_converted("v2").freeze_base().train()
        if compiled:
            for layer in model.model.layers:
                layer.compile(backend="aot_eager")
        student = Student(wrapped=model, model=model, adapted=None, teacher=None, config=TrainingConfig())
        for _ in range(2):  # the second step runs what the first has compiled
            model.zero_grad()
            loss = OBJECTIVES[objective](student, batch)["loss"]
            loss.backward()
        results.append([loss.detach(), *(p.grad for _, p in model.dynamic_parameters())])
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
