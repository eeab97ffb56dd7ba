"""Edits: low-rank changes of projections that live beside the base weights, listed in a ledger."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from pliant.errors import EditError

ID_PATTERN = re.compile(r"[0-9a-f]{8}")


def down_proj(layer: int) -> str:
    """Returns the path of a layer's ``down_proj`` within the inner model."""
    return f"layers.{layer}.mlp.down_proj"


@dataclass(frozen=True, kw_only=True)
class Delta:
    """Change of one projection W (out, in): ``ΔW = left rightᵀ + diag(scale) W``, in fp32 on the CPU.

    ``left`` is (out, rank), ``right`` (in, rank) and ``scale`` (out); checked here, as files and callers bring them.
    """

    left: Tensor
    right: Tensor
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in (("left", self.left), ("right", self.right)):
            if value.ndim != 2 or not value.is_floating_point():
                raise EditError(
                    f"{name} must be a matrix of real numbers, a column for each rank; got {_kind(value)}. "
                    "Give (out, rank) and (in, rank)."
                )
        if self.left.shape[1] != self.right.shape[1]:
            raise EditError(
                f"right must have as many columns as left, {self.left.shape[1]}; got {self.right.shape[1]}. "
                "Give both factors one column for each rank."
            )
        if self.scale is None:
            return
        if not self.scale.is_floating_point() or self.scale.shape != self.left.shape[:1]:
            raise EditError(
                f"scale must be a vector of real numbers with one value for each of the {self.left.shape[0]} rows "
                f"of left; got {_kind(self.scale)}. Leave it out to scale nothing."
            )

    @property
    def norm_squared(self) -> float:
        """``‖left rightᵀ‖²_F`` as the sum over ``(leftᵀ left) ⊙ (rightᵀ right)``; the scaled part is not in it."""
        left, right = self.left.double(), self.right.double()
        return max(0.0, float(((left.T @ left) * (right.T @ right)).sum()))

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that are there, by name."""
        named = {"left": self.left, "right": self.right, "scale": self.scale}
        return {name: value for name, value in named.items() if value is not None}

    def owned(self) -> "Delta":
        """Returns a copy in fp32 on the CPU that shares no memory and carries no gradient."""
        with torch.inference_mode(False), torch.no_grad():
            copies = {
                name: value.detach().to("cpu", torch.float32, copy=True).contiguous()
                for name, value in self.tensors().items()
            }
        return Delta(**copies)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One entry of the ledger: what was learned, and the changes that hold it.

    Attributes:
        context: The text that was learned, for people to read.
        deltas: Path of a projection within the inner model, such as ``layers.5.mlp.down_proj`` → its change.
        kl: KL divergence from the model without the edit on neutral text, in nats a token; ``None`` if not measured.
        details: How it was made (writer, target, strength, positions, …), as JSON values.
        id: Eight hexadecimal digits.
        created: ISO 8601, UTC.
    """

    context: str
    deltas: Mapping[str, Delta]
    kl: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid4().hex[:8])
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        if not ID_PATTERN.fullmatch(self.id):
            raise EditError(f"id must be eight hexadecimal digits; got {self.id!r}. Leave it out for a new one.")
        if not self.deltas:
            raise EditError("deltas must change at least one projection; got none. Make no edit where nothing changes.")
        if self.kl is not None and not math.isfinite(self.kl):
            raise EditError(f"kl must be finite or None; got {self.kl}. Give None if it was not measured.")
        try:
            json.dumps(dict(self.details), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise EditError(
                f"details must hold JSON values, so that they can be saved; got {dict(self.details)!r}: {error}. "
                "Give numbers, texts, lists and maps."
            ) from error

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that the edit changes, sorted."""
        found = (re.match(r"layers\.(\d+)\.", path) for path in self.deltas)
        return tuple(sorted({int(match[1]) for match in found if match}))

    @property
    def norm(self) -> float:
        """Frobenius norm of the low-rank part, over all projections."""
        return math.sqrt(sum(delta.norm_squared for delta in self.deltas.values()))

    @property
    def rank(self) -> int:
        """The largest rank of a change."""
        return max(delta.left.shape[1] for delta in self.deltas.values())


def _kind(value: Tensor) -> str:
    return f"shape {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
