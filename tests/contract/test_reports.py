"""Reports against explicitly formed weight changes, one a forward, and gone after the block."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.architectures import LayerReport, Write
from pliant.models import ModelReport

NORM_TOLERANCE = 1e-4
"""‖Σ v ⊗ k‖ from Gram matrices against the same from the matrix itself, in fp32."""
EFFECT_TOLERANCE = 1e-4
MATRICES = {
    "v1": ["gate_proj"],
    "v1_single": ["gate_proj"],
    "v2": ["gate_proj"],
    "outer": ["gate_proj", "up_proj", "down_proj"],
    "keyed": ["down_proj"],
    "keyed_pre": ["gate_proj", "up_proj", "down_proj"],
}
OPTIONS: dict[str, dict[str, Any]] = {"outer": {"targets": "all", "num_updates": 3}}


def formed(write: Write) -> Tensor:
    """``ΔW_t`` itself, (batch, seq, d_out, d_in)."""
    return torch.einsum("btko,btki->btoi", write.value, write.key)


def reported(model: torch.nn.Module, prompt: Tensor, **options: Any) -> ModelReport:
    with model.report(**options) as report:
        model(prompt)
    return report


def test_norms_are_those_of_the_formed_weight_changes(
    form: str, family: str, make_converted: Callable, prompt: Tensor
) -> None:
    model = make_converted(form, family, **OPTIONS.get(form, {}))
    report = reported(model, prompt, writes=True)
    assert list(report.layers) == [0, 1, 2]
    for index, layer in report.layers.items():
        assert list(sorted(layer.writes)) == sorted(MATRICES[form])
        squares = [formed(write).pow(2).sum((-1, -2)) for write in layer.writes.values()]
        expected = torch.stack(squares).sum(0).sqrt()
        assert expected.shape == prompt.shape
        assert (expected > 0).all()
        torch.testing.assert_close(layer.norm, expected, rtol=NORM_TOLERANCE, atol=0.0)
        assert torch.equal(report.norms()[index], layer.norm)


@torch.no_grad()
def test_writes_are_what_the_layer_adds_to_each_projection(form: str, make_converted: Callable, prompt: Tensor) -> None:
    """``ΔW_t z = effect``, and the base's own weights plus the changes give the layer's output."""
    model = make_converted(form, "llama_mlp_bias", layers=[1], **OPTIONS.get(form, {}))
    layer, seen = model.model.layers[1], {}
    layer.self_attn.register_forward_hook(lambda _m, _a, out: seen.update(a=out[0]))
    layer.register_forward_hook(lambda _m, args, out: seen.update(h=args[0], out=out))
    writes = reported(model, prompt, writes=True).layers[1].writes
    h, a, mlp = seen["h"], seen["a"], layer.mlp
    reads_attention = form in ("v1", "v1_single", "keyed")
    x = layer.post_attention_layernorm(h + a if reads_attention else h)

    def project(name: str, z: Tensor) -> Tensor:
        if name not in writes:
            return getattr(mlp, name)(z)
        change = torch.einsum("btoi,bti->bto", formed(writes[name]), z)
        torch.testing.assert_close(change, writes[name].effect, rtol=EFFECT_TOLERANCE, atol=EFFECT_TOLERANCE)
        return getattr(mlp, name)(z) + change

    m = mlp.act_fn(project("gate_proj", x)) * project("up_proj", x)
    expected = (h + a if form == "v1" else h) + project("down_proj", m)
    torch.testing.assert_close(seen["out"], expected, rtol=EFFECT_TOLERANCE, atol=EFFECT_TOLERANCE)


def explicit_penalty(kind: str, report: LayerReport) -> Tensor:
    """The three formulas, from formed matrices and single factors."""
    total = torch.zeros_like(report.norm)
    for write in report.writes.values():
        if kind == "frobenius":
            total = total + formed(write).pow(2).sum((-1, -2))
        elif kind == "factors":
            for k in range(write.value.shape[2]):
                total = total + write.value[:, :, k].pow(2).sum(-1) + write.key[:, :, k].pow(2).sum(-1)
        else:
            total = total + write.effect.pow(2).sum(-1)
    return total


@pytest.mark.parametrize("kind", ["frobenius", "factors", "effect"])
def test_regularisers_are_their_formulas(form: str, kind: str, make_converted: Callable, prompt: Tensor) -> None:
    model = make_converted(form, regulariser=kind, **OPTIONS.get(form, {}))
    report = reported(model, prompt, writes=True)
    expected = {i: explicit_penalty(kind, layer) for i, layer in report.layers.items()}
    for index, layer in report.layers.items():
        torch.testing.assert_close(layer.regulariser, expected[index], rtol=NORM_TOLERANCE, atol=0.0)
    values = torch.stack(list(expected.values()))
    torch.testing.assert_close(report.regulariser(), values.mean(), rtol=NORM_TOLERANCE, atol=0.0)
    mask = torch.zeros_like(prompt, dtype=torch.bool)
    mask[0, 2:7] = mask[1, 1] = True
    masked = values[:, mask].mean()
    assert not torch.isclose(masked, values.mean(), rtol=0.01)
    torch.testing.assert_close(report.regulariser(mask), masked, rtol=NORM_TOLERANCE, atol=0.0)


def test_regularisers_differ_from_one_another(make_converted: Callable, prompt: Tensor) -> None:
    values = [
        reported(make_converted("outer", regulariser=kind), prompt).regulariser().item()
        for kind in ("frobenius", "factors", "effect")
    ]
    assert len({round(value, 3) for value in values}) == 3


def test_recording_does_not_move_the_logits(form: str, make_converted: Callable, prompt: Tensor) -> None:
    model = make_converted(form)
    expected = model(prompt).logits
    for writes in (False, True):
        with model.report(writes=writes):
            assert torch.equal(model(prompt).logits, expected)


def test_each_forward_is_reported_once(form: str, make_converted: Callable, prompt: Tensor) -> None:
    model = make_converted(form)
    with model.report() as report:
        model(prompt)
        model(prompt[:, :4])
    assert [forward[0].norm.shape[1] for forward in report.forwards] == [11, 4]
    assert all(list(forward) == [0, 1, 2] for forward in report.forwards)
    assert report.layers is report.forwards[1]
    assert report.layers[0].writes is None
    expected = torch.cat([report.forwards[0][2].norm, report.forwards[1][2].norm], dim=1)
    assert torch.equal(report.norms()[2], expected)


def test_backward_of_a_checkpointed_forward_is_not_reported_again(
    form: str, make_converted: Callable, checkpoint_activations: Callable, prompt: Tensor
) -> None:
    model = make_converted(form).train()
    expected = reported(model, prompt)
    checkpoint_activations(model)
    with model.report() as report:
        loss = model(prompt, labels=prompt).loss
        before = report.layers[1].norm.clone()
        loss.backward()
    assert len(report.forwards) == 1
    assert torch.equal(report.layers[1].norm, before)
    assert torch.equal(report.layers[1].norm, expected.layers[1].norm)


def test_generation_is_reported_token_by_token(form: str, make_converted: Callable, prompt: Tensor) -> None:
    model = make_converted(form)
    with model.report() as report:
        produced = model.generate(prompt, max_new_tokens=4, do_sample=False)
    read = produced[:, :-1]
    assert [forward[0].norm.shape[1] for forward in report.forwards] == [11, 1, 1, 1]
    whole = reported(model, read).norms()
    for index, norm in report.norms().items():
        torch.testing.assert_close(norm, whole[index], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_is_left_in_the_layers_after_the_block(
    form: str,
    raises: bool,
    make_converted: Callable,
    checkpoint_activations: Callable,
    prompt: Tensor,
) -> None:
    model = make_converted(form).train()
    checkpoint_activations(model)
    hooks = len(model.model._forward_hooks)

    def inside() -> None:
        with model.report(writes=True):
            model(prompt, labels=prompt).loss.backward()
            if raises:
                raise ZeroDivisionError

    if raises:
        with pytest.raises(ZeroDivisionError):
            inside()
    else:
        inside()
    assert len(model.model._forward_hooks) == hooks
    for layer in model.dynamic_layers.values():
        assert layer.recording is None
        assert layer.layer_report is None
    model(prompt)
    assert all(layer.layer_report is None for layer in model.dynamic_layers.values())


def test_inactive_layers_are_not_reported(make_converted: Callable, prompt: Tensor) -> None:
    model = make_converted("keyed")
    model.set_active(False, [1])
    assert list(reported(model, prompt).layers) == [0, 2]
    with model.base_mode():
        assert reported(model, prompt).layers == {}


def test_forward_of_the_base_does_not_take_the_place_of_the_models(
    form: str, make_converted: Callable, prompt: Tensor
) -> None:
    """A teacher's forward between the student's and the penalty."""
    model = make_converted(form)
    expected = reported(model, prompt).regulariser()
    with model.report() as report:
        model(prompt)
        with model.base_mode(), torch.no_grad():
            model(prompt)
        assert torch.equal(report.regulariser(), expected)
    assert len(report.forwards) == 1


def test_report_without_a_forward_is_empty(make_converted: Callable) -> None:
    with make_converted("v1").report() as report:
        pass
    assert report.layers == {}
    assert report.norms() == {}
