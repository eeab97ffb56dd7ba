"""Edited models compile into one graph that computes the same, edits on or off."""

from collections.abc import Callable

import torch
from torch import Tensor

from pliant.models import Delta, Edit


def test_an_edited_model_compiles_into_one_graph(make_converted: Callable, prompt: Tensor) -> None:
    model = make_converted("keyed")
    path = "layers.1.mlp.gate_proj"
    projection = model.edits.projection(path)
    generator = torch.Generator().manual_seed(0)
    delta = Delta(
        left=0.3 * torch.randn(projection.out_features, 2, generator=generator),
        right=torch.randn(projection.in_features, 2, generator=generator),
        scale=0.3 * torch.randn(projection.out_features, generator=generator),
    )
    with torch.no_grad():
        before = model(prompt).logits
        edit = model.edits.add(Edit(context="a fact", deltas={path: delta}))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        edited = compiled(prompt).logits  # nothing has run yet: the hook's copies are made within the graph
        torch.testing.assert_close(edited, model(prompt).logits)
        assert not torch.allclose(edited, before, atol=0.01)
        with model.edits.suspended():
            torch.testing.assert_close(compiled(prompt).logits, before)
        torch.testing.assert_close(compiled(prompt).logits, edited)
        model.edits.revert(edit.id)
        torch.testing.assert_close(compiled(prompt).logits, before)
