"""How a context is written into the weights: what, where, and how strongly."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pliant.architectures.base import nearest
from pliant.consolidation.writers import WriteSettings
from pliant.errors import ConfigError, EditError
from pliant.models import DynamicCausalLM, Layers, select_layers

TARGETS = ("auto", "context", "unembedding", "optimised")
POSITIONS = ("answer", "span", "subject")

SUBJECT_DEPTH, SUBJECT_SHARE = 0.1, 6
"""Where the layers that rewrite subjects begin, as a share of the depth, and one in how many of all layers they are."""

TASKS: dict[str, float] = {"factual_recall": 0.2, "reasoning": 0.05, "creative": 0.01}
"""α that goes with a kind of task."""


@dataclass(frozen=True, kw_only=True)
class Consolidation:
    """How a context is written.

    Attributes:
        target: ``context`` moves the states where the answer is predicted to what they are behind the context;
            ``unembedding`` gives the subject the state that the answer itself has, and the answer's logits a margin;
            ``optimised`` finds the subject's state by gradient steps; ``auto`` takes ``unembedding`` for each fact
            whose subject's new state makes the answer likely by itself, as a forward pass shows, else ``optimised``.
        layers: Where to write. Those in the lower half rewrite the subject, those in the upper half the answer.
            By default a sixth of them from a tenth of the depth on, and the last; for ``context`` every second of the
            upper third.
        positions: For ``context``: where the answer is predicted, the ``span`` from the subject on, or the subject.
        alpha: α, strength: the share of what is missing that is written; may exceed 1.
        margin: Lead of the answer's logit over every other, in nats.
        enough: Log-probability a token at which the subject's new state counts as enough.
        write: The writer where the answer is predicted.
        subject_write: The writer at the subject.
        contrast: How many other subjects are asked the same for each batch.
        num_prefixes: Of the beginnings of text before a query, the empty one among them.
        kl_budget: Largest KL divergence from the model before, on neutral text, of one fact, in nats a token; n facts
            together may cause √n times as much. ``None`` for any.
        seed: Of the prefixes.
    """

    target: str = "auto"
    layers: Layers | None = None
    positions: str = "answer"
    alpha: float = 1.0
    margin: float = 1.0
    enough: float = -1.0
    write: WriteSettings = field(default_factory=WriteSettings)
    subject_write: WriteSettings = field(default_factory=partial(WriteSettings, neutral=0.01))
    contrast: int = 32
    num_prefixes: int = 5
    kl_budget: float | None = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("target", TARGETS), ("positions", POSITIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}.")
        if self.positions != "answer" and self.target != "context":
            raise ConfigError(
                f"positions must be 'answer' for target={self.target!r}, which writes the subject by itself; got "
                f"{self.positions!r}. Leave it out, or set target='context'."
            )
        if not 0 < self.alpha <= 10:
            raise ConfigError(f"alpha must be above 0 and at most 10; got {self.alpha}. 1 writes what is missing.")
        if self.kl_budget is not None and not self.kl_budget > 0:
            raise ConfigError(f"kl_budget must be above 0 nats a token, or None; got {self.kl_budget}. Try 0.01.")
        if not 0 <= self.margin < math.inf:
            raise ConfigError(f"margin must be at least 0 nats; got {self.margin}. 1 lets the answer lead clearly.")
        if not self.enough <= 0:
            raise ConfigError(f"enough must be a log-probability, at most 0; got {self.enough}. Try -1.")
        for name, least in (("num_prefixes", 1), ("contrast", 0), ("seed", 0)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ConfigError(f"{name} must be an integer, at least {least}; got {getattr(self, name)!r}.")

    def places(self, model: DynamicCausalLM) -> tuple[list[int], list[int]]:
        """Returns the layers that rewrite subjects and those that rewrite answers.

        By default none is among them whose MLP only some tokens enter: the others would not feel the edit.

        Raises:
            ConversionError: A layer does not exist.
            EditError: Tokens are routed past the MLP of a layer that was asked for, or of every one.
        """
        closed = closed_layers(model)
        num_layers = model.config.num_hidden_layers
        remedy = "Choose other layers, or route with granularity='attention'."
        if len(closed) == num_layers:
            raise EditError(f"the model must have a layer whose MLP every token enters; it has none. {remedy}")
        if self.layers is not None:
            chosen = select_layers(self.layers, num_layers)
            if refused := [index for index in chosen if index in closed]:
                raise EditError(
                    f"layers must be ones whose MLP every token enters; got {', '.join(map(str, refused))}, where "
                    f"tokens are routed past it. {remedy}"
                )
            if self.target == "context":
                return [], chosen
            lower = [index for index in chosen if index < num_layers // 2]
            return lower, [index for index in chosen if index not in lower]
        usable = [index for index in range(num_layers) if index not in closed]
        last = usable[-1]
        if self.target == "context":
            upper = range(2 * num_layers // 3, num_layers - 1, 2)
            return [], [index for index in upper if index in usable] or [last]
        first = round(SUBJECT_DEPTH * num_layers)
        lower = range(first, first + max(1, num_layers // SUBJECT_SHARE))
        subjects = [index for index in lower if index in usable]
        return subjects, [last] if last not in subjects else []

    @classmethod
    def for_task(cls, task: str, **fields: Any) -> "Consolidation":
        """Returns settings with the strength that goes with a kind of task: see ``TASKS``.

        Raises:
            ConfigError: The task is unknown.
        """
        if task not in TASKS:
            raise ConfigError(f"task must be one of {', '.join(TASKS)}; got {task!r}.{nearest(task, tuple(TASKS))}")
        return cls(**{"alpha": TASKS[task], **fields})


def closed_layers(model: DynamicCausalLM) -> set[int]:
    """Returns the layers whose MLP only some tokens enter."""
    return {index for index, layer in model.routed_layers.items() if layer.skips_mlp}
