"""The methods of a comparison, what a recipe becomes with each of them, and the rank that a budget allows."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from pliant.architectures.base import nearest
from pliant.architectures.npt import FORMS
from pliant.architectures.npt.config import CLOSED_FORMS
from pliant.config import ModelConfig, RunConfig, TrainingConfig
from pliant.config.model import FORM_OPTIONS, ROUTED_OPTIONS
from pliant.errors import ConfigError
from pliant.models import fresh_config
from pliant.training.estimate import plan_model

MLP = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP)
FROZEN = "frozen"
BUDGET_FORM, BUDGET_RANK = "v1", 16
"""Whose parameters are the budget where none is given."""
ALPHA_PER_RANK = 2


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train a base.

    Attributes:
        name: What it is called on the command line.
        summary: What is trained, in words.
        trainable: As ``training.trainable``; empty where nothing is trained.
        preset: NPT form; ``None`` leaves the base unconverted.
        targets: Projections with adapters.
        has_rank: Whether a rank sets its size.
    """

    name: str
    summary: str
    trainable: str
    preset: str | None = None
    targets: tuple[str, ...] = ()
    has_rank: bool = True


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(Method(name=form, summary=f"NPT {form}", trainable="modulation", preset=form) for form in FORMS),
        Method(name="lora", summary="LoRA, attention and MLP", trainable="lora", targets=ALL_LINEAR),
        Method(name="lora_mlp", summary="LoRA, MLP", trainable="lora", targets=MLP),
        Method(name="dora", summary="DoRA, attention and MLP", trainable="dora", targets=ALL_LINEAR),
        Method(name="ia3", summary="IA3", trainable="ia3", has_rank=False),
        Method(name="full", summary="all weights", trainable="all", has_rank=False),
        Method(name=FROZEN, summary="the base as it is", trainable="", has_rank=False),
    )
}
"""Every method by its name."""


SET_BY_METHODS = (
    "model_type",
    *(f"model.{name}" for name in ("preset", *FORM_OPTIONS, *ROUTED_OPTIONS)),
    *(f"training.{name}" for name in ("trainable", "lora_rank", "lora_alpha", "lora_targets")),
)
"""Settings of a recipe that a method replaces, or does not read."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method at a size.

    Attributes:
        method: The method.
        rank: Its rank, where a rank sets its size.
        parameters: Trainable ones; ``None`` where the base is out of reach, and then the rank is not known either.
        budget: What the rank was chosen for; ``None`` where the size is fixed.
    """

    method: Method
    rank: int | None = None
    parameters: int | None = None
    budget: int | None = None

    @property
    def id(self) -> str:
        """Unique within a comparison, and fit for a folder's name."""
        return self.method.name if self.rank is None else f"{self.method.name}-r{self.rank}"


def method_named(name: str) -> Method:
    """Returns a method.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in METHODS:
        known = tuple(METHODS)
        raise ConfigError(f"methods must be among {', '.join(known)}; got {name!r}.{nearest(name, known)}")
    return METHODS[name]


def settings(recipe: RunConfig, method: Method, rank: int | None = None, **training: Any) -> RunConfig:
    """Returns the recipe with what is trained replaced by ``method``: data, steps and all else stay.

    Args:
        recipe: What all methods have in common.
        method: What is trained.
        rank: Its size; ``None`` is for methods without one.
        training: Further fields of the training section.

    Raises:
        ConfigError: The recipe does not go with the method.
    """
    model: dict[str, Any] = {}
    if method.preset is not None:
        model |= {"preset": method.preset, "adapter_rank": rank}
        if method.preset in CLOSED_FORMS:
            model["calibration"] = recipe.model.calibration
    own: dict[str, Any] = {"trainable": method.trainable, **training}
    if method.targets and rank is not None:
        own |= {"lora_rank": rank, "lora_alpha": ALPHA_PER_RANK * rank, "lora_targets": list(method.targets)}
    try:
        return RunConfig(
            model_type="dense" if method.preset is None else "npt",
            model=_unconverted(recipe.model, **model),
            data=replace(recipe.data),
            training=replace(recipe.training, **own),
        )
    except ConfigError as error:
        raise ConfigError(f"method {method.name}: {error}") from error


def base_settings(recipe: RunConfig) -> RunConfig:
    """Returns what the untouched base is held by: of the recipe only what says how, as nothing is trained."""
    given = recipe.training
    # Of what can be beside a frozen base without a conversion, IA3 has nothing to set.
    training = TrainingConfig(objective=given.objective, trainable="ia3", mixed_precision=given.mixed_precision)
    return RunConfig(model_type="dense", model=_unconverted(recipe.model), training=training)


def _unconverted(model: ModelConfig, **own: Any) -> ModelConfig:
    """The model section without what belongs to a conversion, but for ``own``."""
    defaults = {f.name: f.default for f in fields(ModelConfig)}
    names = ("preset", "calibration", *FORM_OPTIONS, *ROUTED_OPTIONS)
    return replace(model, **{**{name: defaults[name] for name in names}, **own})


def parameters_of(recipe: RunConfig, method: Method, rank: int | None = None) -> int | None:
    """Returns the trainable parameters of a method; nothing where the base is out of reach."""
    if method.name == FROZEN:
        return 0
    return plan_model(settings(recipe, method, rank))[0].trainable


def contenders(recipe: RunConfig, methods: Sequence[str], budgets: Sequence[int] = ()) -> list[Contender]:
    """Returns every method at the size that each budget allows; those of a fixed size once.

    Args:
        recipe: What all methods have in common.
        methods: Their names.
        budgets: Trainable parameters; by default as many as ``v1`` of rank 16 has.

    Raises:
        ConfigError: A method is unknown or named twice, or a budget is too small for rank 1.
    """
    chosen = [method_named(name) for name in methods]
    if repeated := [name for name in methods if list(methods).count(name) > 1]:
        raise ConfigError(f"methods must name each method once; got {repeated[0]!r} twice. Leave one out.")
    if not chosen:
        raise ConfigError(f"methods must name at least one method; got none. They are {', '.join(METHODS)}.")
    if any(budget < 1 for budget in budgets):
        raise ConfigError(f"budget must be at least 1 (trainable parameters); got {min(budgets)}.")
    usual = parameters_of(recipe, METHODS[BUDGET_FORM], BUDGET_RANK)
    found: dict[str, Contender] = {}
    for method in chosen:
        sized = [_sized(recipe, method, budget) for budget in (budgets or [usual])] if method.has_rank else []
        for contender in sized or [Contender(method=method, parameters=parameters_of(recipe, method))]:
            found.setdefault(contender.id, contender)
    return list(found.values())


def _sized(recipe: RunConfig, method: Method, budget: int | None) -> Contender:
    """A method at the largest rank whose parameters are not above the budget."""
    smallest, next_one = (parameters_of(recipe, method, rank) for rank in (1, 2))
    if budget is None or smallest is None or next_one is None:
        return Contender(method=method)
    if smallest > budget:
        raise ConfigError(
            f"budget must be at least {smallest:,} trainable parameters for {method.name}, whose rank 1 has as many; "
            f"got {budget:,}. Raise it, or leave the method out."
        )
    rank = 1 + (budget - smallest) // (next_one - smallest)  # parameters grow by the same number a rank
    if method.preset is not None:
        rank = min(rank, fresh_config(recipe.model.base_model_name).hidden_size)
    return Contender(method=method, rank=rank, parameters=parameters_of(recipe, method, rank), budget=budget)
