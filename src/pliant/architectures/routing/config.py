"""What the configurations of routed layers have in common."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from pliant.architectures.base import from_fields, nearest
from pliant.architectures.routing.selection import share_of
from pliant.errors import ConfigError

PARTS = ("block", "attention", "mlp")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedConfig:
    """A layer that only some tokens enter.

    Attributes:
        capacity_gamma: γ, the share of the tokens that enter, in (0, 1].
        gate_share: s in [0, 1]. The increment of a token is multiplied by ``1 + φ − sg[φ] + s (sg[φ] − 1)``: at 0 the
            value is 1, so that a converted model at γ = 1 is its base; at 1 it is the gate φ. The gradient is φ's.
        granularity: What a token skips: the whole ``block``, its ``attention``, or its ``mlp``. The last is for layers
            that need no memory of their own: it is in the cache of a layer that some tokens leave no keys in.
        budget: b in (0, 1]: in evaluation at most ``⌈b · budget_window⌉`` of any ``budget_window`` successive tokens
            of a document enter, the first that reach the threshold; ``None`` sets no bound. γ = 1 lets every token in.
        budget_window: Tokens that the budget is for.

    Raises:
        ConfigError: A field has a value outside its rule.
    """

    capacity_gamma: float = 0.5
    gate_share: float = 0.0
    granularity: str = "block"
    budget: float | None = None
    budget_window: int = 64
    parts: ClassVar[tuple[str, ...]] = PARTS
    """What ``granularity`` may be."""

    def __post_init__(self) -> None:
        if not is_number(self.capacity_gamma) or not 0 < self.capacity_gamma <= 1:
            raise ConfigError(
                f"capacity_gamma must be in (0, 1], the share of the tokens that run; got {self.capacity_gamma!r}. 0.5 "
                "lets half of them run, 1 all."
            )
        if not is_number(self.gate_share) or not 0 <= self.gate_share <= 1:
            raise ConfigError(
                f"gate_share must be in [0, 1]; got {self.gate_share!r}. 0 multiplies by 1, 1 by the gate."
            )
        check_choice(self, granularity=self.parts)
        self._check_budget()

    @property
    def most(self) -> int | None:
        """Tokens of ``budget_window`` that may enter in evaluation, or ``None``."""
        return None if self.budget is None else share_of(self.budget, self.budget_window)

    def _check_budget(self) -> None:
        window, budget = self.budget_window, self.budget
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ConfigError(f"budget_window must be an integer of at least 1 (tokens); got {window!r}. 64 is usual.")
        if budget is None:
            return
        if not is_number(budget) or not 0 < budget <= 1:
            raise ConfigError(
                f"budget must be in (0, 1], the largest share of budget_window tokens that may run; got {budget!r}. "
                "Leave it out for no bound."
            )
        if self.granularity == "mlp":
            raise ConfigError(
                "budget needs to remember which tokens ran, and granularity='mlp' has no place for that. Leave budget "
                "out, or choose another granularity."
            )

    def starts_at_layerwise_optimum(self) -> bool:
        """What a skipped token misses no parameter of the layer can bring back."""
        return True

    @classmethod
    def from_dict(cls, fields_: Mapping[str, Any]) -> "RoutedConfig":
        """Builds a configuration from field names and values; an unknown name is an error."""
        return from_fields(cls, fields_)

    def to_dict(self) -> dict[str, Any]:
        """Returns the capacity and every other field that differs from its default."""
        defaults = {f.name: f.default for f in fields(self)}
        values = {name: getattr(self, name) for name in defaults}
        return {name: value for name, value in values.items() if name == "capacity_gamma" or value != defaults[name]}


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_choice(config: Any, **known: tuple[str, ...]) -> None:
    """Raises a :class:`ConfigError` for a field that is none of the words known for it."""
    for name, words in known.items():
        value = getattr(config, name)
        if value not in words:
            raise ConfigError(f"{name} must be one of {', '.join(words)}; got {value!r}.{nearest(str(value), words)}")


def check_flags(config: Any, *names: str) -> None:
    """Raises a :class:`ConfigError` for a field that is neither true nor false."""
    for name in names:
        if type(getattr(config, name)) is not bool:
            raise ConfigError(f"{name} must be true or false; got {getattr(config, name)!r}.")


def check_weights(config: Any, *names: str) -> None:
    """Raises a :class:`ConfigError` for the weight of a loss that is negative or no number."""
    for name in names:
        value = getattr(config, name)
        if not is_number(value) or value < 0:
            raise ConfigError(f"{name} must be a number of at least 0; got {value!r}. 0 leaves that loss out.")
