"""How tokens are routed by a linear router."""

from dataclasses import dataclass

from pliant.architectures.routing.config import RoutedConfig, check_choice, check_weights

GATES = ("raw", "sigmoid")
SAMPLERS = ("router", "predictor")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModConfig(RoutedConfig):
    """A Mixture-of-Depths layer.

    Attributes:
        gate: φ: the router's logit (``raw``) or its ``sigmoid``.
        sampler: What is held against the threshold: the logit of the ``router``, taught by a cross-entropy which side
            of it a token is on, or that of a ``predictor`` beside it, an MLP that the rest of the model does not feel.
        auxiliary_loss_weight: Of that cross-entropy.
        z_loss_weight: Of the mean squared logit.

    Raises:
        ConfigError: A field has a value outside its rule.
    """

    gate: str = "sigmoid"
    sampler: str = "router"
    auxiliary_loss_weight: float = 0.01
    z_loss_weight: float = 1e-4

    def __post_init__(self) -> None:
        # Not `super()`: a dataclass with slots is a new class, and the method's own cell holds the old one.
        RoutedConfig.__post_init__(self)
        check_choice(self, gate=GATES, sampler=SAMPLERS)
        check_weights(self, "auxiliary_loss_weight", "z_loss_weight")
