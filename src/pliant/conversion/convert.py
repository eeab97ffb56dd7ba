"""``pliant.convert``: everything is checked and computed first, then the model changes at once."""

from collections.abc import Mapping
from typing import Any, cast

from transformers import PreTrainedModel

from pliant.architectures import ARCHITECTURES, NptConfig, RoutedConfig
from pliant.architectures.base import LayerConfig
from pliant.conversion.cheapest import CHEAPEST, cheapest_layers
from pliant.conversion.npt import convert_npt
from pliant.conversion.routed import as_text, convert_routed, with_partners
from pliant.conversion.text import Text
from pliant.errors import ConfigError, ConversionError
from pliant.models import DynamicCausalLM, Family, Layers, PliantSpec, family_of, select_layers
from pliant.models.bases import recorded_name
from pliant.models.graft import install
from pliant.models.spec import architecture_of
from pliant.statistics import AttentionStatistics, Progress

Calibration = AttentionStatistics | Text
LayerMap = Mapping[str, str | LayerConfig]


def convert(
    model: PreTrainedModel,
    config: LayerConfig | None = None,
    *,
    layers: Layers | LayerMap | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> DynamicCausalLM:
    """Makes layers of a causal LM dynamic, in place, and returns the same object.

    Plastic layers (``NptConfig``): ``keyed`` and ``keyed_pre`` below full rank start from the closed form
    ``U = V_r``, ``D = V_rᵀ`` with V_r the leading eigenvectors of ``E[a aᵀ]`` over the calibration text; at full rank
    U = D = I. The other forms start at zero modulation.

    Routed layers (``ModConfig`` and its like): with γ = ``capacity_gamma`` = 1 every token runs, and the model is its
    base bit for bit. Below, the thresholds of all routed layers are set so that a share γ of the calibration text runs.

    New parameters are fp32; those of the base are neither copied nor changed.

    Args:
        model: A Llama, Mistral, Qwen2, Qwen3 or SmolLM3 causal LM, plain, quantised or offloaded; or a pliant
            model of the same architecture with unconverted layers left.
        config: What every layer in ``layers`` becomes; by default ``NptConfig()``: ``keyed``, automatic rank.
        layers: ``"all"``, ``"alternate"`` (1, 3, 5, …), ``"upper_half"``, ``"lower_half"``, ``"8-15"``, a list; of a
            routed architecture also ``"cheapest"``, those that :func:`cheapest_layers` finds. Or a map from such
            selections to presets or configurations, ``{"0-9": "v1", "10-29": "v2"}``, and then no ``config``. ``None``
            is all layers, of a routed architecture every other one. Of one that works on pairs these are the routed
            layers; the layer before each joins by itself.
        calibration: Token windows, texts, or, of plastic layers, what ``pliant.statistics.attention_statistics``
            returned. ``None`` takes the embedded texts. Routed layers read the windows in one forward.
        progress: Called with a label, the steps done and the steps there are.

    Raises:
        ConversionError: The model, a layer, a rank or the quantisation does not allow it.
        ConfigError: ``config`` and ``layers`` contradict each other.
        DataError: The calibration text is missing or too short.

    In each of these cases the model is unchanged.
    """
    family = _check_model(model)
    named = _without_cheapest(model, config, layers, calibration, progress)
    wanted = _resolve(config, named, model.config.num_hidden_layers)
    spec = _check_layers(model, wanted)
    base = spec.base or {
        "name": recorded_name(model.config._name_or_path) or None,
        "revision": getattr(model.config, "_commit_hash", None),
    }
    architecture = architecture_of(next(iter(wanted.values())))
    assert architecture is not None

    def put(settled: Mapping[int, LayerConfig]) -> None:
        new = PliantSpec(architecture=architecture, layers={**spec.layers, **settled}, base=base)
        install(model, family.causal_lm, new)

    if architecture == "npt":
        convert_npt(model, cast(Any, wanted), put, calibration, progress)
    elif all(isinstance(layer, RoutedConfig) for layer in wanted.values()):
        convert_routed(model, cast(Any, wanted), put, calibration, progress)
    else:  # an architecture whose start is that of its parameters
        put(wanted)
    assert isinstance(model, DynamicCausalLM)
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


def _without_cheapest(
    model: PreTrainedModel,
    config: LayerConfig | None,
    layers: Layers | LayerMap | None,
    calibration: Calibration | None,
    progress: Progress | None,
) -> Layers | LayerMap | None:
    """Returns ``layers`` with the indices of the cheapest in the place of that word."""
    if isinstance(layers, Mapping) and CHEAPEST in layers:
        if len(layers) > 1:
            raise ConfigError(
                "layers must name 'cheapest' alone: it chooses among all layers. Name the others by index."
            )
        form = dict[Any, Any](layers)[CHEAPEST]
    elif isinstance(layers, str) and layers == CHEAPEST:
        form = config
    else:
        return layers
    if not isinstance(form, RoutedConfig):
        raise ConfigError(
            f"layers='cheapest' is for layers that some tokens skip; got {form!r}. Choose 'all', or 'upper_half'."
        )
    chosen = cheapest_layers(model, form, calibration=as_text(calibration, "layers='cheapest'"), progress=progress)
    return {",".join(map(str, chosen)): form} if isinstance(layers, Mapping) else chosen


def _resolve(config: LayerConfig | None, layers: Layers | LayerMap | None, num_layers: int) -> dict[int, LayerConfig]:
    """Returns the configuration of every layer that ``config`` and ``layers`` ask for, all of one architecture."""
    if config is not None and architecture_of(config) is None:
        others = ", ".join(row.config.__name__ for row in ARCHITECTURES.values() if row.config not in (None, NptConfig))
        raise ConfigError(
            f"config must be an NptConfig, or one of another architecture ({others}); got {config!r}. "
            "Write pliant.NptConfig.preset('keyed', rank=192)."
        )
    if not isinstance(layers, Mapping):
        chosen = NptConfig() if config is None else config
        usual = "alternate" if isinstance(chosen, RoutedConfig) else "all"
        resolved = dict.fromkeys(select_layers(usual if layers is None else layers, num_layers), chosen)
    elif config is not None:
        raise ConfigError("layers must not be a map when config is given: the map names each layer's form. Drop one.")
    else:
        resolved = _resolve_map(layers, num_layers)
    return with_partners(resolved)


def _resolve_map(layers: Mapping[Any, Any], num_layers: int) -> dict[int, LayerConfig]:
    resolved: dict[int, LayerConfig] = {}
    for selection, form in layers.items():
        layer_config = NptConfig.preset(form) if architecture_of(form) is None else form
        for index in select_layers(selection, num_layers):
            if index in resolved:
                raise ConversionError(f"layers must name each layer once; {selection!r} repeats layer {index}.")
            resolved[index] = layer_config
    if not resolved:
        raise ConversionError("layers must name at least one layer; got an empty map. Use 'all' for every layer.")
    names = list(dict.fromkeys(architecture_of(layer_config) for layer_config in resolved.values()))
    if len(names) > 1:
        raise ConversionError(
            f"layers must be of one architecture; got {names[0]} and {names[1]}. Choose one of them for all layers."
        )
    return resolved


def _check_layers(model: PreTrainedModel, wanted: Mapping[int, LayerConfig]) -> PliantSpec:
    """Returns what the model is so far, if the layers can join it."""
    spec = PliantSpec.of(model.config)
    architecture = architecture_of(next(iter(wanted.values())))
    if spec.layers and spec.architecture != architecture:
        raise ConversionError(
            f"model must be a base, or have {architecture} layers only; it has {spec.architecture} layers already "
            f"({', '.join(map(str, sorted(spec.layers)))}). Load the base again."
        )
    if twice := sorted(spec.layers.keys() & wanted.keys()):
        raise ConversionError(
            f"layers must not be converted yet; layer {twice[0]} already is ({spec.layers[twice[0]].to_dict()}). "
            "Load the base again, or choose other layers."
        )
    requested = PliantSpec(architecture=architecture or "dense", layers=wanted)
    requested.check_quantisation(getattr(model.config, "quantization_config", None))
    return spec
