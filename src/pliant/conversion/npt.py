"""Plastic layers with the best start that needs no training: the closed form of those that have one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pliant.architectures import NptConfig
from pliant.conversion.allocation import check_gradients, share_ranks
from pliant.conversion.closed_form import fill, spectrum
from pliant.conversion.loss import warn_if_lossy
from pliant.conversion.text import Text, windows_of
from pliant.errors import ConfigError, ConversionError
from pliant.statistics import AttentionStatistics, Progress, attention_statistics

CALIBRATION_TOKENS = 32_768


def convert_npt(
    model: PreTrainedModel,
    wanted: Mapping[int, NptConfig],
    install: Callable[[Mapping[int, NptConfig]], None],
    calibration: AttentionStatistics | Text | None,
    progress: Progress | None,
) -> None:
    """Gives the layers of ``wanted`` their forms, closed forms included, at ranks that are settled first.

    Args:
        model: A base, or a model with other plastic layers; changed by ``install`` alone until all is computed.
        wanted: Layer index → form.
        install: Puts layers of these forms into the model.
        calibration: Statistics, or text for them; ``None`` takes the embedded texts where there is need of any.
        progress: Called after each step.
    """
    _check(model, wanted)
    statistics = _statistics(model, wanted, calibration, progress)
    bases = _closed_form_bases(model, wanted, statistics, progress)
    held_out = None if statistics is None else statistics.held_out
    del statistics  # as large as the new parameters
    install({i: c.with_rank(bases[i].shape[1]) if i in bases else c for i, c in wanted.items()})
    for index in list(bases):
        fill(model.model.layers[index], bases.pop(index))
    if held_out is not None:
        converted: Any = model
        warn_if_lossy(converted, held_out, "Train the model, or raise rank or energy.", progress)


def _check(model: PreTrainedModel, wanted: Mapping[int, NptConfig]) -> None:
    d_model = model.config.hidden_size
    for index, config in wanted.items():
        if config.rank != "auto" and config.rank > d_model:
            raise ConversionError(
                f"rank must be in 1..{d_model} (d_model); got {config.rank} for layer {index}. Lower it."
            )
        gate = model.model.layers[index].mlp.gate_proj
        is_offloaded = any(parameter.device.type == "meta" for parameter in gate.parameters())
        if config.form == "keyed_pre" and gate.bias is not None and is_offloaded:
            raise ConversionError(
                f"form 'keyed_pre' reads the bias of gate and up; that of layer {index} is offloaded. Use 'keyed', or "
                "keep the layer on a device."
            )
    if any(config.has_closed_form and config.allocation == "sensitivity" for config in wanted.values()):
        check_gradients(model)


def _statistics(
    model: PreTrainedModel,
    wanted: Mapping[int, NptConfig],
    calibration: AttentionStatistics | Text | None,
    progress: Progress | None,
) -> AttentionStatistics | None:
    """Returns second moments for the layers that need them; ``None`` if none does."""
    needing = [i for i, c in wanted.items() if c.has_closed_form and c.rank != model.config.hidden_size]
    if not needing:
        return None
    if isinstance(calibration, AttentionStatistics):
        if missing := [i for i in needing if i not in calibration.moments]:
            raise ConfigError(f"calibration must have a moment for every layer; layer {missing[0]} has none.")
        d_model = model.config.hidden_size
        for index in needing:
            if calibration.moments[index].shape != (d_model, d_model):
                raise ConfigError(
                    f"calibration must come from a model of the same width, ({d_model}, {d_model}); the moment of "
                    f"layer {index} has shape {tuple(calibration.moments[index].shape)}. Take it from this model."
                )
        return calibration
    windows = windows_of(model, calibration, CALIBRATION_TOKENS)
    return attention_statistics(model, windows, layers=needing, progress=progress)


def _closed_form_bases(
    model: PreTrainedModel,
    wanted: Mapping[int, NptConfig],
    statistics: AttentionStatistics | None,
    progress: Progress | None,
) -> dict[int, Float[Tensor, "d_model rank"]]:
    """Returns ``V_r`` of every layer with a closed form; the identity at full rank."""
    d_model = model.config.hidden_size
    closed = {i: c for i, c in wanted.items() if c.has_closed_form}
    bases = {i: torch.eye(d_model) for i, c in closed.items() if c.rank == d_model}
    if statistics is None:
        return bases
    shared = {i: c for i, c in closed.items() if i not in bases and c.allocation == "sensitivity"}
    for index, config in closed.items():
        if index not in bases and index not in shared:
            modes = spectrum(statistics.moments[index])
            bases[index] = modes.leading(
                modes.rank_for(config.energy) if config.rank == "auto" else config.settled_rank
            )
    if shared:
        spectra = {i: spectrum(statistics.moments[i]) for i in shared}
        ranks = share_ranks(model, {i: c.settled_rank for i, c in shared.items()}, spectra, statistics.sample, progress)
        bases |= {i: spectra[i].leading(rank) for i, rank in ranks.items()}
    return bases
