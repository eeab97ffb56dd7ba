"""What an inspection found: which tokens rewrote which layers, in which directions, towards which words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from pliant.cli.token_grid import Token, far_of
from pliant.errors import ConfigError

KEYED = ("keyed", "keyed_pre")
MODULATION, EDITS = "modulation", "edits"


@dataclass(frozen=True, kw_only=True)
class Word:
    """A token of the vocabulary, and how many standard deviations its logit lies above the mean of all."""

    text: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Direction:
    """A direction of a low-rank map at one token.

    Attributes:
        part: Which of the layer's maps.
        index: The direction, counted from 0.
        coordinate: What the token's attention output has along it.
        share: Its share of the squared sizes of all directions, size being ``|coordinate| · ‖column of the up map‖``.
    """

    part: str
    index: int
    coordinate: float
    share: float


@dataclass(frozen=True, kw_only=True)
class LayerInspection:
    """What one layer did, a value a token.

    Attributes:
        form: The form of the layer, or ``edits``.
        projections: What was rewritten.
        norms: ``‖ΔW_t‖_F``; of edits, the norm of what they change in the output of the MLP.
        sizes: What that is held against: ``‖W‖_F`` of the same projections; of edits, the norm of that output.
        words: The nearest words of what was written, the nearest first; ``None`` where none were looked for.
        directions: The largest directions.
    """

    form: str
    projections: Sequence[str]
    norms: Sequence[float]
    sizes: Sequence[float]
    words: Sequence[Sequence[Word] | None]
    directions: Sequence[Sequence[Direction]]

    def ratio(self, position: int) -> float:
        """The change over what was there."""
        size = self.sizes[position]
        return self.norms[position] / size if size else 0.0

    @cached_property
    def ratios(self) -> list[float]:
        """The ratio of each token."""
        return [self.ratio(position) for position in range(len(self.norms))]

    @cached_property
    def middle(self) -> float:
        """The median ratio of the tokens."""
        return median(self.ratios)

    def prominence(self, position: int) -> float:
        """The ratio over the median of the layer's tokens."""
        return self.ratios[position] / self.middle if self.middle else 0.0


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Which tokens rewrote which layers.

    Attributes:
        kind: ``modulation``, or ``edits`` of a dense model.
        tokens: The tokens of the text, in order.
        num_layers: Decoder layers of the model.
        layers: Layer index → what it did.
    """

    kind: str
    tokens: Sequence[Token]
    num_layers: int
    layers: Mapping[int, LayerInspection]

    @property
    def far(self) -> float:
        """The ratio that 95 % of those above 0 do not exceed; 0 if none is above 0."""
        ratios = sorted(
            ratio for layer in self.layers.values() for p in self.positions if (ratio := layer.ratio(p)) > 0
        )
        return far_of(ratios)

    @property
    def positions(self) -> range:
        """Positions of the tokens."""
        return range(len(self.tokens))

    @property
    def measure(self) -> str:
        """What a ratio is."""
        if self.kind == EDITS:
            return "‖what the edits change in the MLP's output‖ ÷ ‖that output without them‖"
        return "‖ΔW_t‖ ÷ ‖W‖ of the projections that the layer rewrites"

    @property
    def lens(self) -> str:
        """What the words are of."""
        if self.kind == EDITS:
            source = "what the edits add to the MLP's output at this token"
        elif all(layer.form in KEYED for layer in self.layers.values()):
            source = "the value v_o that is written on down_proj, which the stream gets as it is"
        else:
            source = (
                "what the rewrite adds to the stream (of a keyed form the value v_o; of the others what the MLP puts "
                "out with it less what it would without, so the effect through the activation and down_proj)"
            )
        return f"The words are the nearest to {source}, by the final norm and the LM head (logit lens)."

    def outstanding(self, position: int) -> int:
        """The layer in which a token's ratio stands out most from those of the other tokens."""
        return max(self.layers, key=lambda index: self.layers[index].prominence(position))

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        return {
            "kind": self.kind,
            "measure": self.measure,
            "tokens": [{"id": token.id, "text": token.text} for token in self.tokens],
            "num_layers": self.num_layers,
            "layers": {
                str(index): {
                    "form": layer.form,
                    "projections": list(layer.projections),
                    "norms": list(layer.norms),
                    "ratios": layer.ratios,
                    "words": [None if words is None else [vars(word) for word in words] for words in layer.words],
                    "directions": [[vars(direction) for direction in found] for found in layer.directions],
                }
                for index, layer in self.layers.items()
            },
        }


def tokens_are_routed(name: str) -> ConfigError:
    """The error for a model whose layers are entered by some tokens, and rewritten by none."""
    return ConfigError(
        f"model must rewrite its MLPs; {name!r} routes tokens, and rewrites nothing. See which token ran where with "
        "'pliant routes'."
    )


def nothing_to_inspect(name: str) -> ConfigError:
    """The error for a dense model without edits of its MLPs."""
    return ConfigError(
        f"model must have converted layers, or edits of its MLPs; {name!r} is dense and has neither, so there is "
        "nothing to inspect. Convert it with 'pliant convert', or teach it something with 'pliant consolidate'."
    )
