"""What the objectives minimise, beside their formulas written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pliant.config import TrainingConfig
from pliant.training.objectives import Student, causal_lm, end_to_end, evaluation_scores, layerwise


def student_of(model: Any, **options: Any) -> Student:
    return Student(wrapped=model, model=model, adapted=None, teacher=None, config=TrainingConfig(**options))


def batch_of(prompt: Tensor) -> dict[str, Tensor]:
    labels = prompt.clone()
    labels[0, :4] = -100
    return {"input_ids": prompt, "labels": labels}


def both(model: Any, prompt: Tensor) -> tuple[Any, Any]:
    """Outputs of the model and of its base, hidden states included."""
    with model.base_mode(), torch.no_grad():
        base = model(prompt, output_hidden_states=True)
    return model(prompt, output_hidden_states=True), base


def test_causal_lm_is_the_sum_over_labelled_tokens(make_converted: Callable[..., Any], prompt: Tensor) -> None:
    model, batch = make_converted("v2"), batch_of(prompt)
    logits = model(prompt).logits[:, :-1]
    expected = functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(causal_lm(student_of(model), batch)["loss"], expected)


@pytest.mark.parametrize("hidden_loss", ["normalised", "mse"])
def test_end_to_end_is_divergence_and_hidden_error(
    make_converted: Callable[..., Any], prompt: Tensor, form: str, hidden_loss: str
) -> None:
    model, batch = make_converted(form), batch_of(prompt)
    sums = end_to_end(student_of(model, kl_weight=2.0, hidden_weight=3.0, hidden_loss=hidden_loss), batch)
    mask = batch["labels"][:, 1:] != -100
    own, base = both(model, prompt)
    log_p, log_q = (out.logits[:, :-1][mask].log_softmax(-1) for out in (own, base))
    found, expected = (out.hidden_states[-1][:, :-1][mask] for out in (own, base))
    kl = (log_q.exp() * (log_q - log_p)).sum()
    error = (found - expected).pow(2)
    hidden = error.mean(-1).sum() if hidden_loss == "mse" else (error.sum(-1) / expected.pow(2).sum(-1)).sum()
    torch.testing.assert_close(sums["kl"], kl.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums["hidden"], hidden.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums["loss"], 2 * kl + 3 * hidden, rtol=1e-4, atol=1e-4)


def test_layerwise_gives_each_layer_the_input_of_the_base(
    make_converted: Callable[..., Any], prompt: Tensor, form: str
) -> None:
    model, batch = make_converted(form, layers=[0, 2]).freeze_base(), batch_of(prompt)
    inputs: dict[int, tuple[Any, Any]] = {}
    handles = [
        model.model.layers[i].register_forward_hook(
            lambda _m, args, kwargs, out, i=i: inputs.__setitem__(i, (args[0], kwargs, out)), with_kwargs=True
        )
        for i in (0, 2)
    ]
    with model.base_mode(), torch.no_grad():
        model(prompt, use_cache=False)
    for handle in handles:
        handle.remove()
    mask = batch["labels"][:, 1:] != -100
    errors = []
    for i, (hidden, kwargs, expected) in inputs.items():
        found = model.model.layers[i](hidden, **kwargs)
        error = (found - expected).pow(2).sum(-1) / expected.pow(2).sum(-1)
        errors.append(error[:, :-1][mask].sum())
    value = layerwise(student_of(model), batch)["loss"]
    torch.testing.assert_close(value, torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in model.dynamic_parameters())
    assert all(layer.active for layer in model.dynamic_layers.values())
    assert not any(layer._forward_hooks for layer in model.dynamic_layers.values())


def test_no_gradient_runs_from_layer_to_layer(make_converted: Callable[..., Any], prompt: Tensor) -> None:
    model, batch = make_converted("v2").freeze_base(), batch_of(prompt)
    alone, together = make_converted("v2", layers=[2]).freeze_base(), model
    alone.model.layers[2].plastic.load_state_dict(together.model.layers[2].plastic.state_dict())
    for subject in (alone, together):
        layerwise(student_of(subject), batch)["loss"].backward()
    for expected, found in zip(
        alone.model.layers[2].plastic.parameters(), together.model.layers[2].plastic.parameters(), strict=True
    ):
        torch.testing.assert_close(3 * found.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_packed_documents_are_taught_apart(make_converted: Callable[..., Any], prompt: Tensor) -> None:
    model = make_converted("keyed")
    alone = sum(end_to_end(student_of(model), {"input_ids": row, "labels": row})["kl"] for row in prompt[:, None])
    packed = prompt.reshape(1, -1)
    labels = packed.clone()
    labels[0, prompt.shape[1]] = -100
    positions = torch.arange(prompt.shape[1]).repeat(len(prompt))[None]
    batch = {"input_ids": packed, "labels": labels, "position_ids": positions}
    torch.testing.assert_close(end_to_end(student_of(model), batch)["kl"], alone, rtol=1e-4, atol=1e-5)


def test_evaluation_sums_by_row(make_converted: Callable[..., Any], prompt: Tensor) -> None:
    model, batch = make_converted("outer"), batch_of(prompt)
    sums, counts = evaluation_scores(student_of(model), batch, beside_base=True)
    assert counts.tolist() == [(row[1:] != -100).sum() for row in batch["labels"]]
    whole = causal_lm(student_of(model), batch)["loss"]
    kl = end_to_end(student_of(model), batch)["kl"]
    torch.testing.assert_close(sums[:, 0].sum(), whole.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums[:, 2].sum(), kl, rtol=1e-4, atol=1e-4)
    assert (sums[:, 3] <= counts).all()


def test_the_teacher_is_the_base_and_leaves_no_trace(
    make_converted: Callable[..., Any], prompt: Tensor, state_of: Callable[[Any], Any]
) -> None:
    model, batch = make_converted("v1_single").train(), batch_of(prompt)
    before = state_of(model)
    hidden = student_of(model).teach(batch)
    assert state_of(model) == before
    assert not hidden.requires_grad
    with model.base_mode(), torch.no_grad():
        expected = model.model(prompt, use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden, expected[:, :-1][batch["labels"][:, 1:] != -100])
