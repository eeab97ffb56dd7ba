"""Parts of a forward pass: from one layer on, with what a layer's MLP reads and what the layer leaves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from pliant.models.edits import Delta
from pliant.models.ledger import EditHook
from pliant.statistics import input_device


class PartialPass:
    """The hidden states of some rows before a layer, from which the pass can go on again and again.

    An edit of a layer changes nothing below it, so what lies below is computed once.
    """

    def __init__(self, model: PreTrainedModel, ids: Int[Tensor, "rows tokens"], start: int) -> None:
        self.layers = model.model.layers
        self.start = start
        self.hidden = torch.empty(0)
        self.calls: dict[int, tuple[tuple[Any, ...], Mapping[str, Any]]] = {}
        with torch.no_grad(), self._noting():
            model.model(ids.to(input_device(model)), use_cache=False)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Within the block the layers from the start on compute nothing, and note how they are called."""

        def note(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if index == self.start:
                self.hidden = hidden
            else:  # the layer before computes nothing now, and hands it over when it does
                for name in getattr(self.layers[index], "handed_over", ()):
                    kwargs.pop(name, None)
            self.calls[index] = (args, kwargs)
            return hidden

        above = range(self.start, len(self.layers))
        before = {index: vars(self.layers[index]).get("forward") for index in above}
        for index in above:
            self.layers[index].forward = partial(note, index)
        try:
            yield
        finally:
            for index, forward in before.items():
                if forward is None:
                    del self.layers[index].forward
                else:
                    self.layers[index].forward = forward

    def _layer(self, index: int, hidden: Tensor) -> Tensor:
        args, kwargs = self.calls[index]
        out = self.layers[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def advance(self, start: int) -> None:
        """Moves on to before layer ``start``."""
        while self.start < start:
            hidden = self._layer(self.start, self.hidden)
            self.start += 1
            if self.start == len(self.layers):
                self.hidden = hidden
                return
            with self._noting():
                self._layer(self.start, hidden)

    def run(
        self, last: int, keys: int | None = None, *, hidden: Tensor | None = None
    ) -> tuple[Tensor | None, Float[Tensor, "rows tokens d_model"]]:
        """Runs through layer ``last``, with gradients where they are on.

        Args:
            last: The last layer to run.
            keys: Layer whose ``down_proj`` is watched.
            hidden: To go on from, in place of the kept states.

        Returns:
            What ``down_proj`` of layer ``keys`` read, and the state after ``last``.
        """
        found: list[Tensor] = []
        hook = None
        if keys is not None:
            module = self.layers[keys].mlp.down_proj
            hook = module.register_forward_pre_hook(lambda _module, args: found.append(args[0].float()))
        hidden = self.hidden if hidden is None else hidden
        try:
            for index in range(self.start, last + 1):
                hidden = self._layer(index, hidden)
        finally:
            if hook is not None:
                hook.remove()
        return (found[0] if found else None), hidden.float()


@contextmanager
def trial(model: PreTrainedModel, deltas: Mapping[str, Delta]) -> Iterator[None]:
    """Within the block the projections that ``deltas`` name carry these changes beside those of the ledger."""
    places = [(model.model.get_submodule(path), delta) for path, delta in deltas.items()]
    hooks = [module.register_forward_hook(EditHook([delta])) for module, delta in places]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
