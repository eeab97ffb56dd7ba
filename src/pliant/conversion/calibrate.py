"""``pliant.calibrate``: the score from which on a token enters a routed layer, so that a wanted share of them does."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from pliant.conversion.text import Text, windows_of
from pliant.errors import ConfigError, DataError
from pliant.models import DynamicCausalLM
from pliant.statistics import Progress, evaluating, input_device

NUM_TOKENS = 8_192
LABEL = "Setting thresholds"


def calibrate(
    model: PreTrainedModel,
    capacity: float | None = None,
    *,
    calibration: Text | None = None,
    num_tokens: int = NUM_TOKENS,
    progress: Progress | None = None,
) -> dict[int, float]:
    """Sets the threshold τ of every routed layer so that a share ``capacity`` of the calibration tokens runs.

    τ lies midway from the ``⌈γn⌉``-th highest of the n scores to the next. All windows go through the model in one
    forward, so that each layer is set on what the layers below, with thresholds of their own, make of the text. γ = 1
    sets τ = −∞.

    Args:
        model: A model with routed layers.
        capacity: γ in (0, 1], which becomes the layers' own; ``None`` leaves each layer the one that it has.
        calibration: Token windows, or texts; ``None`` takes the embedded texts.
        num_tokens: Tokens to take from texts, in windows of 512.
        progress: Called after each layer.

    Returns:
        Layer index → the share of the tokens that ran.

    Raises:
        ConfigError: The model has no routed layers, or ``capacity`` is outside its range.
        DataError: There is too little text, or scores are not finite.

    In each of these cases the model is unchanged.
    """
    layers = model.routed_layers if isinstance(model, DynamicCausalLM) else {}
    if not isinstance(model, DynamicCausalLM) or not layers:
        raise ConfigError(
            f"calibrate needs a model with routed layers; this one ({type(model).__name__}) has none. "
            "Convert it with pliant.ModConfig first."
        )
    if capacity is None:
        shares = [layer.capacity for layer in layers.values()]
    else:  # a configuration refuses what is no capacity
        shares = [replace(layer.layer_config, capacity_gamma=capacity).capacity_gamma for layer in layers.values()]
    windows = None
    if any(share < 1 for share in shares):
        windows = windows_of(model, calibration, num_tokens)
        if windows.ndim != 2 or windows.numel() == 0:
            raise DataError(
                f"calibration must be token windows (windows, window) with at least one token; got shape "
                f"{tuple(windows.shape)}. Make them with pliant.data.token_windows."
            )
    with _restored_on_error(model):
        if capacity is not None:
            model.set_routing(capacity_gamma=capacity)
        return set_thresholds(model, windows, progress)


def set_thresholds(
    model: DynamicCausalLM, windows: Int[Tensor, "windows window"] | None, progress: Progress | None = None
) -> dict[int, float]:
    """Gives the routed layers thresholds for their capacities, which are 1 if there are no ``windows``.

    Returns:
        Layer index → the share of the tokens that ran.
    """
    for layer in model.routed_layers.values():
        layer.router.threshold.fill_(-torch.inf)
    return dict.fromkeys(model.routed_layers, 1.0) if windows is None else _run(model, windows, progress)


@torch.no_grad()
def _run(model: DynamicCausalLM, windows: Tensor, progress: Progress | None) -> dict[int, float]:
    """One forward in which every layer sets its threshold before it routes."""
    layers = model.routed_layers
    active = {layer: layer.active for layer in model.dynamic_layers.values()}
    try:
        model.set_active(True)
        for layer in layers.values():
            layer.calibrating = True
        with evaluating(model), model.report() as report, _told(model.model.layers, progress):
            model.model(windows.to(input_device(model)), use_cache=False)
    finally:
        for layer in layers.values():
            layer.calibrating = False
        for layer, was_active in active.items():
            layer.active = was_active
    shares = {}
    for index in layers:
        routing = report.layers[index].routing
        assert routing is not None
        if not routing.scores.isfinite().all():
            raise DataError(
                f"the scores of layer {index} must be finite on the calibration text; they are not. Load the model in "
                "bfloat16 or float32, or check the text."
            )
        shares[index] = routing.runs.float().mean().item()
    return shares


@contextmanager
def _restored_on_error(model: DynamicCausalLM) -> Iterator[None]:
    entry = model.config.pliant
    layers = [(layer, layer.layer_config, layer.router.threshold.clone()) for layer in model.routed_layers.values()]
    try:
        yield
    except BaseException:
        model.config.pliant = entry
        for layer, layer_config, threshold in layers:
            layer.layer_config = layer_config
            layer.router.threshold.copy_(threshold)
        raise


@contextmanager
def _told(layers: nn.ModuleList, progress: Progress | None) -> Iterator[None]:
    """Within the block ``progress`` hears of every layer that has run."""

    def tell(done: int) -> Callable[..., None]:
        return lambda *_: None if progress is None else progress(LABEL, done, len(layers))

    with ExitStack() as stack:
        for done, layer in enumerate(layers, start=1):
            stack.callback(layer.register_forward_hook(tell(done)).remove)
        yield
