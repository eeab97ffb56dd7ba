"""Parts of a forward pass: from one layer on, with what a layer's MLP reads and what the layer leaves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from pliant.models.edits import Delta
from pliant.models.ledger import EditHook
from pliant.statistics import input_device


class PartialPass:
    """The hidden states of some rows before a layer, from which the pass can go on again and again.

    An edit of a layer changes nothing below it, so what lies below is computed once. Nor does a change at one token
    reach those before it: with ``first``, what lies before that column is read once and kept in a cache.

    Args:
        model: The model.
        ids: (rows, tokens), filled up on the right, where causal attention never looks, or with a ``mask``.
        start: The layer before which the states are kept.
        mask: (rows, tokens), false where a row is filled up.
        first: The first column whose states are kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Int[Tensor, "rows tokens"],
        start: int,
        *,
        mask: Bool[Tensor, "rows tokens"] | None = None,
        first: int = 0,
    ) -> None:
        self.layers = model.model.layers
        self.start = start
        self.hidden = torch.empty(0)
        self.calls: dict[int, tuple[tuple[Any, ...], Mapping[str, Any]]] = {}
        ids = ids.to(input_device(model))
        if mask is not None:
            mask = mask.to(ids.device)
            positions = (mask.cumsum(1) - 1).clamp(min=0)

        def read(part: slice, **options: Any) -> Any:
            if mask is not None:
                options |= {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            return model.model(ids[:, part], **options)

        self.before: Any = None
        with torch.no_grad():
            if first:
                self.before = read(slice(0, first), use_cache=True).past_key_values
            with self._noting():
                read(slice(first, ids.shape[1]), past_key_values=deepcopy(self.before), use_cache=first > 0)

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

    def _layer(self, index: int, hidden: Tensor, before: Any) -> Tensor:
        args, kwargs = self.calls[index]
        if before is not None:  # which the layer adds to, so that every run has its own
            kwargs = {**kwargs, "past_key_values": before}
        out = self.layers[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def advance(self, start: int) -> None:
        """Moves on to before layer ``start``."""
        before = deepcopy(self.before)
        while self.start < start:
            hidden = self._layer(self.start, self.hidden, before)
            self.start += 1
            if self.start == len(self.layers):
                self.hidden = hidden
                return
            with self._noting():
                self._layer(self.start, hidden, before)

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
        hidden, before = self.hidden if hidden is None else hidden, deepcopy(self.before)
        try:
            for index in range(self.start, last + 1):
                hidden = self._layer(index, hidden, before)
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
