"""Which layers a base can best do without, for conversion to layers that some tokens skip.

The cost of layer l is ``L(without l) − L`` in nats a token: L the base's cross-entropy on a little text, without l that
of the same base where no token enters the part of l that is to be routed. Layers differ in it by orders of magnitude,
the first ones above all (arXiv 2403.03853, 2406.15786).
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from pliant.architectures import RoutedConfig
from pliant.architectures.base import nearest
from pliant.architectures.routing.config import PARTS
from pliant.conversion.text import Text, windows_of
from pliant.errors import ConfigError, ConversionError
from pliant.metrics import perplexity
from pliant.models import Layers, PliantSpec, select_layers
from pliant.statistics import Progress, base_mode

CHEAPEST = "cheapest"
NUM_TOKENS = 1_024
LABEL = "Measuring what each layer is worth"


def layer_costs(
    model: PreTrainedModel,
    granularity: str,
    tokens: Int[Tensor, "windows window"],
    *,
    layers: Layers = "all",
    progress: Progress | None = None,
) -> dict[int, float]:
    """Returns what the base loses in nats a token without a part of each layer, ``L(without l) − L``.

    Args:
        model: A causal LM of a family that converts; it is run in base mode, once a layer, and left as it is.
        granularity: The part: ``block``, ``attention`` or ``mlp``.
        tokens: Token windows; 1,024 tokens tell the expensive layers.
        layers: Which to measure.
        progress: Called after each layer.

    Raises:
        ConfigError: ``granularity`` is none of these.
        ConversionError: A layer does not exist, or the model belongs to another family.
        DataError: A window has fewer than two tokens, or a loss is not finite.
    """
    if granularity not in PARTS:
        raise ConfigError(
            f"granularity must be one of {', '.join(PARTS)}; got {granularity!r}.{nearest(str(granularity), PARTS)}"
        )
    inner: Any = model.model
    wanted = select_layers(layers, model.config.num_hidden_layers)
    costs: dict[int, float] = {}
    with base_mode(model):
        whole = perplexity(model, tokens)
        for done, index in enumerate(wanted, start=1):
            handle = _left_out(inner.layers[index], granularity)
            try:
                costs[index] = math.log(perplexity(model, tokens) / whole)
            finally:
                handle.remove()
            if progress is not None:
                progress(LABEL, done, len(wanted))
    return costs


def cheapest_layers(
    model: PreTrainedModel,
    config: RoutedConfig,
    *,
    calibration: Text | None = None,
    progress: Progress | None = None,
) -> list[int]:
    """Returns the layers that the base does best without, as :func:`choose` chooses them.

    Args:
        model: As for :func:`layer_costs`; layers that are converted already are not among those returned.
        config: What the layers are to become.
        calibration: Token windows or texts, of which about 1,024 tokens are read; ``None`` takes the embedded texts.
        progress: Called after each layer.

    Raises:
        ConversionError: Every layer is converted already.
        DataError: The text is missing or too short, or a loss is not finite.
    """
    taken = PliantSpec.of(model.config).layers
    free = [index for index in range(model.config.num_hidden_layers) if index not in taken]
    if not free:
        raise ConversionError(
            f"layers='cheapest' chooses among layers that are not converted; all {len(taken)} are. Load the base again."
        )
    windows = windows_of(model, calibration, NUM_TOKENS)
    count = max(1, NUM_TOKENS // windows.shape[1])
    text = windows[:: max(1, len(windows) // count)][:count]
    return choose(layer_costs(model, config.granularity, text, layers=free, progress=progress), config)


def choose(costs: Mapping[int, float], config: RoutedConfig) -> list[int]:
    """Returns the layers that cost least: half of them, or a third, no two in a row, where layers work in pairs."""
    if getattr(config, "role", None) is None:
        return sorted(sorted(costs, key=lambda index: costs[index])[: max(1, len(costs) // 2)])
    # A layer of a pair needs the one before it.
    return _apart({i: cost for i, cost in costs.items() if i - 1 in costs}, max(1, len(costs) // 3))


def _apart(costs: Mapping[int, float], count: int) -> list[int]:
    """Returns ``count`` layers of least cost, fewer if there are not so many, with at least one between any two."""
    earlier: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # how many → the best of all below index − 1
    best = earlier  # and below index
    for index in range(max(costs, default=-1) + 1):
        longer = dict(best)
        for number, (cost, chosen) in earlier.items() if index in costs else ():
            option = (cost + costs[index], (*chosen, index))
            longer[number + 1] = min(longer.get(number + 1, option), option)
        earlier, best = best, longer
    return list(best[min(count, max(best))][1])


def _left_out(layer: nn.Module, granularity: str) -> Any:
    """Hooks a base layer so that no token enters a part of it."""
    if granularity == "block":
        return layer.register_forward_hook(_input, with_kwargs=True)
    if granularity == "mlp":
        return layer.get_submodule("mlp").register_forward_hook(_nothing)
    return layer.get_submodule("self_attn").register_forward_hook(_nothing)


def _nothing(_module: nn.Module, _args: Any, output: Any) -> Any:
    return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0


def _input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
