"""How tokens are routed by the surprise of the layer before."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from pliant.architectures.routing.config import PARTS, RoutedConfig, check_choice, check_flags, check_weights
from pliant.architectures.routing.surprise import CRITERIA, SURPRISES, check_factor, check_numbers
from pliant.errors import ConfigError

ROLES = ("decision", "dynamic")


@dataclass(frozen=True, kw_only=True, slots=True)
class DtfConfig(RoutedConfig):
    """One layer of a pair: the ``decision`` layer is the base's own, and the ``dynamic`` layer after it is routed.

    Attributes:
        role: Of this layer in the pair. A decision layer has no other options.
        prior_factor: Width of the prior over d_model.
        surprise: How far off the prior was: the mean square of its error (``mse``), or the divergence from the normal
            distribution that it foresaw (``gaussian``).
        criteria: Surprise is more change than foreseen (``ce``), more than in the tokens before (``cu``), or either
            (``or``).
        beta_ce_init: Where the slope of ``ce`` starts, before the softplus that keeps it positive: −0.3 is 0.554.
        beta_cu_init: Likewise of ``cu``: −0.6 is 0.437.
        prior_loss_weight: Of the prior's error, as a loss.
        forecast: A token that does not run goes on with what the prior foresees for it.

    Raises:
        ConfigError: A field has a value outside its rule.
    """

    role: str = "dynamic"
    prior_factor: float = 0.0625
    surprise: str = "mse"
    criteria: str = "or"
    beta_ce_init: float = -0.3
    beta_cu_init: float = -0.6
    prior_loss_weight: float = 0.05
    forecast: bool = False
    parts: ClassVar[tuple[str, ...]] = PARTS[:2]

    def __post_init__(self) -> None:
        # Not `super()`: a dataclass with slots is a new class, and the method's own cell holds the old one.
        RoutedConfig.__post_init__(self)
        check_choice(self, role=ROLES, surprise=SURPRISES, criteria=CRITERIA)
        check_factor(self, "prior_factor")
        check_numbers(self, "beta_ce_init", "beta_cu_init")
        check_weights(self, "prior_loss_weight")
        check_flags(self, "forecast")
        if self.role == "decision":
            given = [f.name for f in fields(self) if f.name != "role" and getattr(self, f.name) != f.default]
            if given:
                raise ConfigError(
                    f"role 'decision' takes no other options, for such a layer is the base's own; got "
                    f"{', '.join(given)}. Give them to the dynamic layer after it."
                )

    def to_dict(self) -> dict[str, Any]:
        """Returns the capacity and every other field that differs from its default; of a decision layer its role."""
        return {"role": self.role} if self.role == "decision" else RoutedConfig.to_dict(self)
