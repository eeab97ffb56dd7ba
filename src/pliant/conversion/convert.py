"""``pliant.convert``: everything is checked and computed first, then the model changes at once."""

import logging
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pliant.architectures import NptConfig
from pliant.conversion.allocation import share_ranks
from pliant.conversion.closed_form import fill, spectrum
from pliant.data import calibration_tokens, token_windows
from pliant.errors import ConfigError, ConversionError, DataError
from pliant.metrics import compare_to_base
from pliant.models import DynamicCausalLM, Family, Layers, PliantSpec, family_of, select_layers
from pliant.models.bases import recorded_name
from pliant.models.graft import install
from pliant.statistics import AttentionStatistics, Progress, attention_statistics

logger = logging.getLogger(__name__)

CALIBRATION_TOKENS = 32_768
WARNING_RATIO = 1.2

Calibration = AttentionStatistics | Int[Tensor, "windows window"] | Sequence[str]
LayerMap = Mapping[str, str | NptConfig]


def convert(
    model: PreTrainedModel,
    config: NptConfig | None = None,
    *,
    layers: Layers | LayerMap = "all",
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> DynamicCausalLM:
    """Makes layers of a causal LM plastic, in place, and returns the same object.

    ``keyed`` and ``keyed_pre`` below full rank start from the closed form ``U = V_r``, ``D = V_rᵀ`` with V_r the
    leading eigenvectors of ``E[a aᵀ]`` over the calibration text; at full rank U = D = I. The other forms start
    at zero modulation. New parameters are fp32; those of the base are neither copied nor changed.

    Args:
        model: A Llama, Mistral, Qwen2, Qwen3 or SmolLM3 causal LM, plain, quantised or offloaded; or a pliant
            model with unconverted layers left.
        config: The form of every layer in ``layers``; by default ``NptConfig()``: ``keyed``, automatic rank.
        layers: ``"all"``, ``"upper_half"``, ``"lower_half"``, ``"8-15"``, a list; or a map from such selections
            to presets or configurations, ``{"0-9": "v1", "10-29": "v2"}``, and then no ``config``.
        calibration: Token windows, texts, or what ``pliant.statistics.attention_statistics`` returned. ``None``
            takes the embedded texts.
        progress: Called with a label, the steps done and the steps there are.

    Raises:
        ConversionError: The model, a layer, a rank or the quantisation does not allow it.
        ConfigError: ``config`` and ``layers`` contradict each other.
        DataError: The calibration text is missing or too short.
        In each of these cases the model is unchanged.
    """
    family = _check_model(model)
    wanted = _resolve(config, layers, model.config.num_hidden_layers)
    _check_layers(model, wanted)
    statistics = _statistics(model, wanted, calibration, progress)
    bases = _closed_form_bases(model, wanted, statistics, progress)
    held_out = None if statistics is None else statistics.held_out
    del statistics  # as large as the new parameters
    spec = PliantSpec.of(model.config)
    settled = {i: c.with_rank(bases[i].shape[1]) if i in bases else c for i, c in wanted.items()}
    base = spec.base or {
        "name": recorded_name(model.config._name_or_path) or None,
        "revision": getattr(model.config, "_commit_hash", None),
    }
    install(model, family.causal_lm, PliantSpec(architecture="npt", layers={**spec.layers, **settled}, base=base))
    assert isinstance(model, DynamicCausalLM)
    for index in settled:
        if index in bases:
            fill(model.model.layers[index], bases.pop(index))
    if held_out is not None:
        _warn_if_lossy(model, held_out, progress)
    return model


def _check_model(model: PreTrainedModel) -> Family:
    if not isinstance(model, PreTrainedModel):
        raise ConversionError(
            f"model must be a causal LM of transformers; got {type(model).__name__}. Convert it before it is wrapped "
            "(peft, DataParallel, compile)."
        )
    family = family_of(model.config)
    if type(model) not in (family.base_causal_lm, family.causal_lm):
        raise ConversionError(
            f"model must be a {family.base_causal_lm.__name__}; got {type(model).__name__}. "
            "Load it with pliant.load or AutoModelForCausalLM."
        )
    return family


def _resolve(config: NptConfig | None, layers: Layers | LayerMap, num_layers: int) -> dict[int, NptConfig]:
    """Returns the configuration of every layer that ``config`` and ``layers`` ask for."""
    if config is not None and not isinstance(config, NptConfig):
        raise ConfigError(
            f"config must be an NptConfig; got {config!r}. Write pliant.NptConfig.preset('keyed', rank=192)."
        )
    if not isinstance(layers, Mapping):
        chosen = config or NptConfig()
        return dict.fromkeys(select_layers(layers, num_layers), chosen)
    if config is not None:
        raise ConfigError("layers must not be a map when config is given: the map names each layer's form. Drop one.")
    resolved: dict[int, NptConfig] = {}
    for selection, form in layers.items():
        layer_config = form if isinstance(form, NptConfig) else NptConfig.preset(form)
        for index in select_layers(selection, num_layers):
            if index in resolved:
                raise ConversionError(f"layers must name each layer once; {selection!r} repeats layer {index}.")
            resolved[index] = layer_config
    if not resolved:
        raise ConversionError("layers must name at least one layer; got an empty map. Use 'all' for every layer.")
    return resolved


def _check_layers(model: PreTrainedModel, wanted: Mapping[int, NptConfig]) -> None:
    d_model = model.config.hidden_size
    converted = PliantSpec.of(model.config).layers
    if twice := sorted(converted.keys() & wanted.keys()):
        raise ConversionError(
            f"layers must not be converted yet; layer {twice[0]} already is ({converted[twice[0]].to_dict()}). "
            "Load the base again, or choose other layers."
        )
    requested = PliantSpec(architecture="npt", layers=wanted)
    requested.check_quantisation(getattr(model.config, "quantization_config", None))
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


def _statistics(
    model: PreTrainedModel,
    wanted: Mapping[int, NptConfig],
    calibration: Calibration | None,
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
    if not isinstance(calibration, Tensor):
        tokenizer = _tokenizer(model.config._name_or_path)
        if calibration is None:
            calibration = calibration_tokens(tokenizer, num_tokens=CALIBRATION_TOKENS)
        else:
            calibration = token_windows(calibration, tokenizer, num_tokens=CALIBRATION_TOKENS)
    return attention_statistics(model, calibration, layers=needing, progress=progress)


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"calibration text needs the model's tokenizer; {name!r} has none that can be read ({error}). "
            "Give calibration=<token windows> instead."
        ) from error


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


def _warn_if_lossy(model: DynamicCausalLM, held_out: Tensor, progress: Progress | None) -> None:
    try:
        predicted = compare_to_base(model, held_out, progress=progress)
    except DataError as error:
        logger.warning("converted, but what it costs could not be measured on held-out text: %s", error)
        return
    logger.info("predicted perplexity ratio %.3f on %d held-out tokens", predicted.ratio, held_out.numel())
    if predicted.ratio > WARNING_RATIO:
        logger.warning(
            "converted: perplexity is %.2f times the base's on held-out calibration text (above %.1f). Train the "
            "model, or raise rank or energy.",
            predicted.ratio,
            WARNING_RATIO,
        )
