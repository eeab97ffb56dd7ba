"""Start values that need no training: the best rank-r image of the attention output, layer by layer.

With C = E[a aᵀ] = V diag(λ) Vᵀ, the U and D of rank r that minimise ``E‖a − U D a‖²`` are ``U = V_r``, ``D = V_rᵀ``.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pliant.architectures import NptLayer
from pliant.architectures.npt.modulation import CarryModulation, PreCarryModulation


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Eigenvalues of a second moment, largest first, and their eigenvectors as columns."""

    values: Float[Tensor, " d_model"]
    vectors: Float[Tensor, "d_model d_model"]

    def leading(self, rank: int) -> Float[Tensor, "d_model rank"]:
        """Returns ``V_r``, the eigenvectors of the ``rank`` largest eigenvalues."""
        return self.vectors[:, :rank].contiguous()

    def rank_for(self, energy: float) -> int:
        """Returns the smallest rank whose eigenvalues hold ``energy`` of the whole."""
        share = self.values.clamp_min(0.0).cumsum(0) / self.values.clamp_min(0.0).sum()
        return min(int(torch.searchsorted(share, energy).item()) + 1, len(self.values))


def spectrum(moment: Float[Tensor, "d_model d_model"]) -> Spectrum:
    """Decomposes a second moment in fp64 on the CPU, on one thread: on shared cores that is much the fastest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        values, vectors = torch.linalg.eigh(moment.double().cpu())
    finally:
        torch.set_num_threads(threads)
    return Spectrum(values=values.flip(0).clamp_min(0.0), vectors=vectors.flip(1).float())


@torch.no_grad()
def fill(layer: NptLayer, vectors: Float[Tensor, "d_model rank"]) -> None:
    """Writes the closed form of ``keyed`` or ``keyed_pre`` into a converted layer: ``U = V_r``, ``D = V_rᵀ``.

    ``keyed_pre`` also takes ``B = W diag(γ) V_r`` for gate and up, read through the projections themselves.
    """
    plastic = layer.plastic
    assert isinstance(plastic, CarryModulation | PreCarryModulation)
    vectors = vectors.to(plastic.down.device)
    plastic.down.copy_(vectors.T)
    if not layer.layer_config.tied:
        plastic.up.copy_(vectors)
    if isinstance(plastic, PreCarryModulation):
        # Contiguous: bitsandbytes' 4-bit kernel for the CPU misreads other layouts without a word.
        rows = (vectors.T * norm_weight(layer, vectors.device)).to(compute_dtype(layer)).contiguous()  # (r, d)
        plastic.up_gate.copy_(linear_part(layer.mlp.gate_proj, rows).T)
        plastic.up_up.copy_(linear_part(layer.mlp.up_proj, rows).T)


def norm_weight(layer: NptLayer, device: torch.device) -> Float[Tensor, " d_model"]:
    """γ of the norm before the MLP, read by calling it, which works where the weight is offloaded too."""
    norm = layer.post_attention_layernorm
    ones = torch.ones(1, *norm.weight.shape, device=device)
    return norm(ones)[0].float() * math.sqrt(1.0 + norm.variance_epsilon)


def compute_dtype(layer: NptLayer) -> torch.dtype:
    """The dtype that the layer computes in; projections may be quantised, norms are not."""
    return layer.input_layernorm.weight.dtype


def linear_part(projection: nn.Module, rows: Float[Tensor, "rank d_in"]) -> Float[Tensor, "rank d_out"]:
    """``W x`` of each row, without the bias: both read by calling, so an offloaded weight is no obstacle."""
    return (projection(rows) - projection(torch.zeros_like(rows[:1]))).float()
