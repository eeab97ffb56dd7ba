"""How residuals are written at keys: five closed forms of ``ΔW``, from the outer product to the null space.

With keys K (n, d_ffn), residuals R (n, d_model), contrast keys K₀ and the second moment C of keys on neutral text:

    outer        ΔW = Σ r ⊗ k / (n E‖k‖²)                  Hebb's rule, one scale for all keys
    normalised   ΔW = Σ r ⊗ k/‖k‖² / n                     exact for a single key
    ridge        ΔW = Rᵀ (K Kᵀ + n ρ I)⁻¹ K                least squares
    covariance   ΔW = Rᵀ K (KᵀK + n λ C + (n/n₀) μ K₀ᵀK₀)⁻¹
    null_space   the same with keys projected on where C has no energy, and an identity in the place of C

n counts the keys of one fact. ``covariance`` leaves neutral text and the contrast keys where they are as far as it can.

MEMIT (arXiv 2210.07229) solves with λ C; AlphaEdit (arXiv 2410.02355) projects on the null space of C.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pliant.errors import ConfigError, EditError
from pliant.key_moments import KeyMoments
from pliant.models.edits import Delta

WRITERS = ("outer", "normalised", "ridge", "covariance", "null_space")

SMALLEST_SHARE = 1e-3
"""Of the largest singular value; a direction below it is left out of an edit."""


@dataclass(frozen=True, kw_only=True)
class WriteSettings:
    """How strongly neutral text and contrast keys hold against the write.

    Attributes:
        writer: One of the five forms.
        neutral: λ, the weight of C against one key.
        ridge: Share of the mean of C's diagonal that is added to it.
        contrast: μ, the weight of the contrast keys together against one key.
        energy: Of ``null_space``: the share of C's trace that is kept clear of.
    """

    writer: str = "covariance"
    neutral: float = 10.0
    ridge: float = 0.01
    contrast: float = 4.0
    energy: float = 0.98

    def __post_init__(self) -> None:
        if self.writer not in WRITERS:
            raise ConfigError(f"writer must be one of {', '.join(WRITERS)}; got {self.writer!r}.")
        for field in ("neutral", "ridge"):
            if not getattr(self, field) > 0:
                raise ConfigError(f"{field} must be above 0; got {getattr(self, field)}. Leave it out.")
        if not self.contrast >= 0:
            raise ConfigError(f"contrast must be at least 0; got {self.contrast}. 0 writes without contrast keys.")
        if not 0 < self.energy < 1:
            raise ConfigError(f"energy must be between 0 and 1; got {self.energy}. The default is 0.98.")


def write(
    settings: WriteSettings,
    keys: Float[Tensor, "n d_ffn"],
    residuals: Float[Tensor, "n d_model"],
    contrast: Float[Tensor, "m d_ffn"] | None,
    moments: KeyMoments,
    *,
    facts: int = 1,
) -> Delta:
    """Returns the change of ``down_proj`` that adds ``residuals`` at ``keys``, as the writer understands it.

    Args:
        settings: The writer, and what holds against it.
        keys: Where to write.
        residuals: What to add there.
        contrast: Keys where nothing should change; ``None`` without any.
        moments: Of the keys of the layer on neutral text.
        facts: How many facts the keys are of; each fact counts as one key.

    Raises:
        EditError: A key or a residual is not finite.
    """
    for name, values in (("keys", keys), ("residuals", residuals), ("contrast keys", contrast)):
        if values is not None and not values.isfinite().all():
            raise EditError(
                f"the {name} of an edit must be finite; they are not. Load the model in bfloat16 or float32, or check "
                "its weights."
            )
    repeats = len(keys) / facts
    if settings.writer == "outer":
        right = keys.T / keys.square().sum(1).mean() / repeats
    elif settings.writer == "normalised":
        right = (keys / keys.square().sum(1, keepdim=True).clamp(min=torch.finfo(keys.dtype).tiny)).T / repeats
    elif settings.writer == "ridge":
        gram = keys @ keys.T
        gram.diagonal().add_(repeats * settings.ridge * gram.diagonal().mean())
        right = torch.linalg.solve(gram, keys).T
    elif settings.writer == "covariance":
        right = _against(
            keys, contrast, settings, repeats, lambda columns: _neutral(moments, columns, settings, repeats)
        )
    else:
        free = _free_directions(moments, settings.energy)  # (f, free)
        scale = repeats * settings.neutral * moments.moment.diagonal().mean()
        right = _against(keys, contrast, settings, repeats, lambda columns: free @ (free.T @ columns) / scale)
    return compressed(residuals.T, right)


def compressed(left: Float[Tensor, "out n"], right: Float[Tensor, "in n"]) -> Delta:
    """Returns ``left rightᵀ`` with as few ranks as hold it."""
    left_basis, left_rest = torch.linalg.qr(left.double())
    right_basis, right_rest = torch.linalg.qr(right.double())
    u, s, v = torch.linalg.svd(left_rest @ right_rest.T)
    rank = max(1, int((s > SMALLEST_SHARE * s[0]).sum()))
    root = s[:rank].sqrt()
    return Delta(left=((left_basis @ u[:, :rank]) * root).float(), right=((right_basis @ v[:rank].T) * root).float())


def _neutral(moments: KeyMoments, columns: Tensor, settings: WriteSettings, repeats: float) -> Tensor:
    return moments.solve(columns, settings.ridge) / (repeats * settings.neutral)


def _against(
    keys: Float[Tensor, "n d_ffn"],
    contrast: Float[Tensor, "m d_ffn"] | None,
    settings: WriteSettings,
    repeats: float,
    solve: Callable[[Tensor], Tensor],
) -> Float[Tensor, "d_ffn n"]:
    """``(B⁻¹ + Z Zᵀ)⁻¹ Kᵀ`` by Woodbury's identity, with ``solve`` for B and Z the keys and the contrast keys."""
    held = keys.T
    if contrast is not None and settings.contrast > 0:
        held = torch.cat((held, contrast.T * (settings.contrast * repeats / len(contrast)) ** 0.5), dim=1)
    held = held.double()
    solved = solve(held)  # (f, n + m)
    inner = held.T @ solved
    inner.diagonal().add_(1)
    first = solved[:, : len(keys)]
    return (first - solved @ torch.linalg.solve(inner, held.T @ first)).float()


def _free_directions(moments: KeyMoments, energy: float) -> Float[Tensor, "d_ffn free"]:
    """Eigenvectors of C that together hold less than ``1 − energy`` of its trace."""
    values, vectors = torch.linalg.eigh(moments.moment.double())  # ascending
    free = values.clamp(min=0).cumsum(0) <= (1 - energy) * values.sum()
    return vectors[:, free]
