"""Layers that only some tokens enter, with thresholds taken from text."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from pliant.architectures import RoutedConfig
from pliant.architectures.base import LayerConfig, added_buffers
from pliant.conversion.calibrate import NUM_TOKENS, set_thresholds
from pliant.conversion.loss import warn_if_lossy
from pliant.conversion.text import Text, windows_of
from pliant.errors import ConfigError, ConversionError, DataError
from pliant.models.graft import CAPTURE_FLAG
from pliant.statistics import HELD_OUT_WINDOWS, AttentionStatistics, Progress

WINDOW = 512
DECIDING = "decision"
"""Role of a layer that only decides for the next one."""
REMEDY = "Train the model, raise capacity_gamma, or route layers='cheapest'."
CALIBRATION_TOKENS = NUM_TOKENS + HELD_OUT_WINDOWS * WINDOW


def convert_routed(
    model: PreTrainedModel,
    wanted: Mapping[int, RoutedConfig],
    install: Callable[[Mapping[int, LayerConfig]], None],
    calibration: AttentionStatistics | Text | None,
    progress: Progress | None,
) -> None:
    """Routes the layers of ``wanted``; below γ = 1 with the thresholds of all routed layers set anew.

    Args:
        model: A base, or a model with other routed layers; as it was if anything fails.
        wanted: Layer index → configuration.
        install: Puts layers of these configurations into the model.
        calibration: Text for the thresholds, its last four windows held out; ``None`` takes the embedded texts.
        progress: Called after each step.
    """
    if all(config.capacity_gamma >= 1 or getattr(config, "role", None) == DECIDING for config in wanted.values()):
        install(wanted)
        return
    windows = windows_of(model, as_text(calibration, "routed layers"), CALIBRATION_TOKENS)
    if windows.ndim != 2 or windows.shape[1] < 2 or len(windows) <= HELD_OUT_WINDOWS:
        raise DataError(
            f"calibration must be token windows (windows, window), more than {HELD_OUT_WINDOWS} of at least two tokens "
            f"each; got shape {tuple(windows.shape)}. Give about {CALIBRATION_TOKENS:,} tokens, e.g. "
            f"({CALIBRATION_TOKENS // WINDOW}, {WINDOW})."
        )
    converted: Any = model
    with undone_on_error(model):
        install(wanted)
        set_thresholds(converted, windows[:-HELD_OUT_WINDOWS], progress)
    warn_if_lossy(converted, windows[-HELD_OUT_WINDOWS:], REMEDY, progress)


def as_text(calibration: AttentionStatistics | Text | None, what: str) -> Text | None:
    """Returns ``calibration`` if it is text that ``what`` can be measured on.

    Raises:
        ConfigError: It is statistics, of which no forward can be run.
    """
    if isinstance(calibration, AttentionStatistics):
        raise ConfigError(
            f"calibration must be token windows or texts for {what}; got AttentionStatistics. Give the tokens."
        )
    return calibration


def with_partners(wanted: Mapping[int, LayerConfig]) -> dict[int, LayerConfig]:
    """Adds the layers that decide for the routed ones, in an architecture of pairs: to each the one before it.

    Raises:
        ConfigError: A configuration is that of a deciding layer.
        ConversionError: The layers do not pair up.
    """
    partners: dict[int, LayerConfig] = {}
    for index, config in wanted.items():
        role = getattr(config, "role", None)
        if role is None:
            continue
        if role != "dynamic":
            raise ConfigError(
                f"role must be 'dynamic' in a conversion; got {role!r}. Leave it out: the layer before a dynamic one "
                f"becomes its {role} layer by itself."
            )
        if index == 0 or index - 1 in wanted:
            fact = "layer 0 has none before it" if index == 0 else f"{index - 1} and {index} are both to be dynamic"
            raise ConversionError(
                f"layers must pair up, each dynamic layer with the one before it that decides; {fact}. "
                "Use 'alternate', or leave every other layer out."
            )
        partners[index - 1] = type(config).from_dict({"role": DECIDING})
    return {**wanted, **partners}


@contextmanager
def undone_on_error(model: PreTrainedModel) -> Iterator[None]:
    """Takes an installation in the block back if the block fails: classes, layers, thresholds, all is as before."""
    inner = model.model
    layers = list(inner.layers)
    thresholds = [(buffer, buffer.clone()) for _, buffer in added_buffers(model)]
    states = [(module, type(module), dict(vars(module))) for module in (model, inner)]
    configs = [(module, vars(module)["config"]) for module in model.modules() if "config" in vars(module)]
    try:
        yield
    except BaseException:
        for module, cls, state in states:
            module.__class__ = cls
            vars(module).clear()
            # transformers puts its hooks back where their flag is missing
            vars(module).update({name: value for name, value in state.items() if name != CAPTURE_FLAG})
        for index, layer in enumerate(layers):
            inner.layers[index] = layer
        for module, config in configs:
            vars(module)["config"] = config
        for buffer, value in thresholds:
            buffer.copy_(value)
        raise
