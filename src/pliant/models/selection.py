"""Which layers a call means: ``"all"``, ``"alternate"``, ``"upper_half"``, ``"lower_half"``, ``"8-15"``, a list."""

from collections.abc import Iterable

from pliant.architectures.base import nearest
from pliant.errors import ConversionError

Layers = str | int | Iterable[int]

NAMED = ("all", "upper_half", "lower_half")
ALTERNATE = "alternate"


def select_layers(layers: Layers, num_layers: int) -> list[int]:
    """Returns the sorted indices that ``layers`` names.

    Args:
        layers: ``"all"``, ``"upper_half"``, ``"lower_half"``, ``"alternate"`` (1, 3, 5, …), an inclusive range such
            as ``"8-15"``, one index (``12`` or ``"12"``), several of these joined by commas, or an iterable of indices.
        num_layers: How many layers the model has.

    Raises:
        ConversionError: No layer, an unknown name, a repeated index, or one outside ``0..num_layers - 1``.
    """
    if isinstance(layers, str):
        indices = [i for part in layers.split(",") for i in _parse(part.strip(), num_layers)]
    elif isinstance(layers, int):
        indices = [layers]
    else:
        indices = list(layers)
    for index in indices:
        if type(index) is not int or not 0 <= index < num_layers:
            raise ConversionError(
                f"layers must be in 0..{num_layers - 1} (the model has {num_layers}); got {index!r} in {layers!r}."
            )
    if not indices:
        raise ConversionError(f"layers must name at least one layer; got {layers!r}. Use 'all' for every layer.")
    if len(set(indices)) != len(indices):
        raise ConversionError(f"layers must name each layer once; got {layers!r}.")
    return sorted(indices)


def _parse(text: str, num_layers: int) -> list[int]:
    if text == "all":
        return list(range(num_layers))
    if text == "upper_half":
        return list(range(num_layers // 2, num_layers))
    if text == "lower_half":
        return list(range(num_layers // 2))
    if text == ALTERNATE:
        return list(range(1, num_layers, 2))
    first, dash, last = text.partition("-")
    if first.isdecimal() and not dash:
        return [int(first)]
    if first.isdecimal() and last.isdecimal():
        if int(first) > int(last):
            raise ConversionError(f"layers must run upwards; got {text!r}. Write '{last}-{first}'.")
        return list(range(int(first), int(last) + 1))
    raise ConversionError(
        f"layers must be one of {', '.join(NAMED)}, a range such as '8-15', alternate (1, 3, 5, …), an index or a "
        f"list; got {text!r}.{nearest(text, (*NAMED, ALTERNATE))}"
    )
