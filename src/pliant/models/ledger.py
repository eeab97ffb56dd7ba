"""The ledger of a model: which edits it carries, and the hooks that add them to its projections.

An edit never touches a weight. All edits of a projection are stacked, in the order of the ledger, into one pair of
factors, and a forward hook adds what they make of the projection's input. So quantised, offloaded and adapted
projections take edits like any other, and what is in effect depends on the entries alone, not on how they came.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from pliant.architectures.base import nearest
from pliant.errors import EditError
from pliant.models.edits import Delta, Edit

CPU = torch.device("cpu")
Place = tuple[torch.device, torch.dtype]


class EditHook:
    """Forward hook of a projection: adds what ``deltas`` make of its input to its output.

    Attributes:
        deltas: The changes, in the order of the ledger.
        active: Off, the output stays the projection's own.
    """

    def __init__(self, deltas: Sequence[Delta] = ()) -> None:
        self.deltas = tuple(deltas)
        self.active = True
        self._copies: dict[Place, tuple[Tensor, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_copies": {}}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self.active:
            return None
        place = (output.device, output.dtype)
        tensors = self._copies.get(place)
        if tensors is None:
            tensors = self._copies[place] = self.copies(module, *place)
        scale, offset, *factors = tensors
        change = args[0].to(output.dtype)
        for factor in factors:
            change = functional.linear(change, factor)
        if scale.numel():
            change = torch.addcmul(change + offset, scale, output)
        return output + change

    def copies(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Returns ``scale`` (empty if there is none), what it must leave of the bias, and one or two factors."""
        with torch.inference_mode(False), torch.no_grad():
            left, right = stacked(self.deltas)
            rank, size = left.shape[1], left.shape[0] * right.shape[0]
            if rank * (left.shape[0] + right.shape[0]) > size:
                factors = (left @ right.T,)
            else:
                left, right = balanced(left, right)
                factors = (right.T, left)
            scale = summed_scale(self.deltas)
            if scale is None:
                scale = offset = left.new_zeros(0)
            else:
                offset = -scale * bias_of(module, like=scale)
            return tuple(tensor.to(device, dtype).contiguous() for tensor in (scale, offset, *factors))


def stacked(deltas: Sequence[Delta]) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "in rank"]]:
    """Returns the factors of all of ``deltas`` side by side."""
    return torch.cat([delta.left for delta in deltas], dim=1), torch.cat([delta.right for delta in deltas], dim=1)


def summed_scale(deltas: Sequence[Delta]) -> Float[Tensor, " out"] | None:
    """Returns the sum of the scales, or ``None`` if there are none: each is of the base's rows, never of an edit's."""
    scales = [delta.scale for delta in deltas if delta.scale is not None]
    return torch.stack(scales).sum(0) if scales else None


def balanced(left: Float[Tensor, "out rank"], right: Float[Tensor, "in rank"]) -> tuple[Tensor, Tensor]:
    """Gives the two sides of each rank about the same norm, so that 16 bits hold both; the product stays exact.

    Powers of two move from one side to the other.
    """
    power = torch.exp2((0.5 * torch.log2(right.norm(dim=0) / left.norm(dim=0))).round())
    power = torch.where(power.isfinite() & (power > 0), power, 1.0)
    return left * power, right / power


def bias_of(module: Any, *, like: Tensor) -> Tensor:
    """Returns the projection's bias in the place of ``like``, read through offloading; zeros if it has none."""
    if getattr(module, "bias", None) is None:
        return torch.zeros_like(like)
    with align_module_device(module, CPU if module.bias.is_meta else None):
        return module.bias.detach().to(like)


def dense_weight(module: Any) -> Float[Tensor, "out in"]:
    """Returns the projection's own weight in fp32 on the CPU, read through offloading.

    Raises:
        EditError: It is quantised.
    """
    if not is_plain(module):
        raise EditError(
            f"weight must be an ordinary matrix to hold an edit; got {type(module).__name__} with "
            f"{_dtype(module.weight)} values. Load the base without quantization_config."
        )
    with align_module_device(module, CPU if module.weight.is_meta else None), torch.no_grad():
        return module.weight.detach().to("cpu", torch.float32, copy=True)


def is_plain(module: Any) -> bool:
    """Whether the projection's weight is a matrix of real numbers, and not packed."""
    weight = module.weight
    return weight.is_floating_point() and tuple(weight.shape) == (module.out_features, module.in_features)


def is_projection(module: nn.Module) -> bool:
    """Whether edits can be put on ``module``: it is linear from ``in_features`` to ``out_features``."""
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the projection under the adapters of peft."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


class Ledger:
    """The edits of one model, in the order in which they were added: iterable, indexed by id.

    An id may be shortened as long as it stays unique.
    """

    def __init__(self, inner: nn.Module) -> None:
        self.inner = inner
        self._edits: dict[str, Edit] = {}
        self._hooks: dict[str, EditHook] = {}
        self._suspensions = 0

    def __iter__(self) -> Iterator[Edit]:
        return iter(list(self._edits.values()))

    def __len__(self) -> int:
        return len(self._edits)

    def __contains__(self, edit_id: str) -> bool:
        return edit_id in self._edits

    def __getitem__(self, edit_id: str) -> Edit:
        return self._edits[find_id(edit_id, self._edits)]

    @property
    def paths(self) -> tuple[str, ...]:
        """The projections that edits change, sorted."""
        return tuple(sorted(self._hooks))

    def add(self, edit: Edit) -> Edit:
        """Adds an edit, whole or not at all, and returns the entry, which shares no memory with what was given.

        Raises:
            EditError: Its id is there already, a path is no projection, a shape does not fit, or a value is not
                finite. The model is unchanged.
        """
        if edit.id in self._edits:
            raise EditError(
                f"id must be new to the ledger; got {edit.id!r}, which is there. Revert that edit first, or make this "
                "one without naming an id."
            )
        for path, delta in edit.deltas.items():
            self._check(path, delta)
        entry = replace(
            edit,
            deltas={path: delta.owned() for path, delta in edit.deltas.items()},
            details=copy.deepcopy(dict(edit.details)),
        )
        self._edits[entry.id] = entry
        self._renew(entry.deltas)
        return entry

    def revert(self, edit_id: str) -> Edit:
        """Takes an edit back and returns it; the others stay, as if it had never been there.

        Raises:
            EditError: No edit, or more than one, has this id.
        """
        entry = self._edits.pop(find_id(edit_id, self._edits))
        self._renew(entry.deltas)
        return entry

    def clear(self) -> None:
        """Takes every edit back."""
        for edit in self:
            self.revert(edit.id)

    @contextmanager
    def suspended(self) -> Iterator["Ledger"]:
        """Within the block no edit acts; blocks may be nested."""
        self._suspend(1)
        try:
            yield self
        finally:
            self._suspend(-1)

    def projection(self, path: str) -> Any:
        """Returns the projection that ``path`` names, under any adapters.

        Raises:
            EditError: There is none.
        """
        try:
            module = unwrapped(self.inner.get_submodule(path))
        except AttributeError:
            module = None
        if module is None or not is_projection(module):
            known = [
                name
                for name, other in self.inner.named_modules()
                if is_projection(other) and ".base_layer" not in name and ".lora_" not in name
            ]
            example = known[-1] if known else "a linear layer"
            raise EditError(
                f"path must name a linear projection of the inner model, such as {example}; got {path!r}."
                f"{nearest(path, known)}"
            )
        return module

    def merged(self, path: str) -> Float[Tensor, "out in"]:
        """Returns a projection's weight with all edits in it, in fp32 on the CPU: ``W + ΔW``.

        Raises:
            EditError: ``path`` names no projection, or its weight is quantised.
        """
        weight = dense_weight(self.projection(path))
        hook = self._hooks.get(path)
        if hook is None:
            return weight
        left, right = stacked(hook.deltas)
        change = left @ right.T
        scale = summed_scale(hook.deltas)
        return weight + (change if scale is None else change + scale[:, None] * weight)

    def _check(self, path: str, delta: Delta) -> None:
        module = self.projection(path)
        for name, features in (("left", module.out_features), ("right", module.in_features)):
            rows = delta.tensors()[name].shape[0]
            if rows != features:
                side = "outputs" if name == "left" else "inputs"
                raise EditError(
                    f"{path}: {name} must have {features} rows, one for each of the projection's {side}; got {rows}. "
                    "Make the edit for this model."
                )
        for name, value in delta.tensors().items():
            count = int((~value.isfinite()).sum())
            if count:
                raise EditError(
                    f"{path}: {name} must be finite; got {count} of {value.numel()} values that are not. "
                    "Lower the strength of the edit, or solve for it in fp32."
                )
        owned = delta.owned()
        dtype = getattr(self.inner, "dtype", torch.float32)
        for name, value in zip(("left", "right"), balanced(owned.left, owned.right), strict=True):
            if not value.to(dtype).isfinite().all():
                raise EditError(
                    f"{path}: {name} must be finite in the model's {str(dtype).removeprefix('torch.')}; got a value of "
                    f"{float(value.abs().max()):.3g}. Lower the strength of the edit, or load the model in bfloat16."
                )

    def _renew(self, paths: Mapping[str, Delta]) -> None:
        """Puts the present edits of ``paths`` on their projections; no edit leaves no hook."""
        for path in paths:
            deltas = [edit.deltas[path] for edit in self._edits.values() if path in edit.deltas]
            old = self._hooks.get(path)
            if not deltas:
                self._detach(path, self._hooks.pop(path))
            elif old is None:
                hook = self._hooks[path] = EditHook(deltas)
                hook.active = self._suspensions == 0
                self.projection(path).register_forward_hook(hook)
            else:
                old.deltas = tuple(deltas)
                old._copies = {}

    def _detach(self, path: str, hook: EditHook) -> None:
        hooks = self.projection(path)._forward_hooks
        for key in [key for key, other in hooks.items() if other is hook]:
            del hooks[key]

    def _suspend(self, change: int) -> None:
        self._suspensions += change
        for hook in self._hooks.values():
            hook.active = self._suspensions == 0


def edits(model: Any) -> list[Edit]:
    """Returns what a model was taught for good, oldest first.

    Args:
        model: A pliant model.

    Raises:
        EditError: It is none.
    """
    return list(ledger_of(model))


def revert(model: Any, edit_id: str) -> Edit:
    """Takes an edit back and returns it; the model is then as if it had never been there.

    Args:
        model: A pliant model.
        edit_id: The edit's id, or its first digits.

    Raises:
        EditError: It is no pliant model, or no edit, or more than one, has this id.
    """
    return ledger_of(model).revert(edit_id)


def ledger_of(model: Any) -> Ledger:
    """Returns the ledger of ``model``, under the wrapper of peft too.

    Raises:
        EditError: It has none.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    ledger = getattr(inner, "edits", None)
    if not isinstance(ledger, Ledger):
        raise EditError(f"model must be a pliant model; got {type(model).__name__}. Load it with pliant.load.")
    return ledger


def find_id(edit_id: str, known: Mapping[str, Any]) -> str:
    """Returns the id among ``known`` that ``edit_id`` is or begins.

    Raises:
        EditError: None is, or several are.
    """
    if edit_id in known:
        return edit_id
    found = [name for name in known if edit_id and name.startswith(edit_id)]
    if len(found) == 1:
        return found[0]
    if found:
        raise EditError(f"id must begin one edit; got {edit_id!r}, which begins {', '.join(found)}. Give more digits.")
    if not known:
        raise EditError(f"id must be that of an edit; got {edit_id!r}, and the ledger has no edits.")
    hint = nearest(edit_id, list(known)) or f" The newest is {list(known)[-1]!r}."
    raise EditError(f"id must be that of one of the {len(known)} edits; got {edit_id!r}.{hint}")


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
