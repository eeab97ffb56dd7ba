"""How tokens are routed by a student of a layer's own surprise."""

from dataclasses import dataclass
from typing import ClassVar

from pliant.architectures.routing.config import PARTS, RoutedConfig, check_choice, check_weights
from pliant.architectures.routing.surprise import CRITERIA, check_factor, check_numbers
from pliant.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SttConfig(RoutedConfig):
    """A layer whose own surprise teaches a student who is to run.

    Attributes:
        transition_factor: Width of the transition network over d_model.
        criteria: Surprise is more change than foreseen (``ce``), more than in the tokens before (``cu``), or either
            (``or``).
        beta_ce_init: Where the slope of ``ce`` starts, before the softplus that keeps it positive: −0.3 is 0.554.
        beta_cu_init: Likewise of ``cu``: −0.6 is 0.437.
        prior_loss_weight: Of the transition network's error, as a loss.
        student_loss_weight: Of the student's cross-entropy with the tokens of the highest surprise.

    Raises:
        ConfigError: A field has a value outside its rule.
    """

    transition_factor: float = 0.0625
    criteria: str = "or"
    beta_ce_init: float = -0.3
    beta_cu_init: float = -0.6
    prior_loss_weight: float = 0.05
    student_loss_weight: float = 0.01
    parts: ClassVar[tuple[str, ...]] = PARTS[:2]

    def __post_init__(self) -> None:
        # Not `super()`: a dataclass with slots is a new class, and the method's own cell holds the old one.
        RoutedConfig.__post_init__(self)
        check_choice(self, criteria=CRITERIA)
        check_factor(self, "transition_factor")
        check_numbers(self, "beta_ce_init", "beta_cu_init")
        check_weights(self, "prior_loss_weight", "student_loss_weight")
        if self.gate_share:
            raise ConfigError(
                f"gate_share must be 0 for stt, whose gate is the teacher's and there in training alone; got "
                f"{self.gate_share!r}. Leave it out, or route by mod or dtf."
            )
