"""What a comparison would do, checked before any training: contenders, learning rates, seeds, steps."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pliant.architectures.base import nearest
from pliant.config import RunConfig
from pliant.config.composition import compose, flatten, parse_overrides
from pliant.data import read_text
from pliant.errors import ConfigError
from pliant.evaluation.comparison.in_context import TASKS
from pliant.evaluation.comparison.methods import (
    FROZEN,
    SET_BY_METHODS,
    Contender,
    contenders,
    method_named,
    settings,
)
from pliant.evaluation.records import check_settings, read_settings
from pliant.training.plan import Plan, make_plan

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
EQUAL = ("parameters", "time")
METRIC = "validation_loss"
"""What learning rates and methods are judged by, fixed beforehand: mean −log p of the validation tokens, in nats."""
HELD_OUT_TOKENS = 4_096
RUNS, SETTINGS_FILE = "runs", "settings.json"


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """A comparison that can be made.

    Attributes:
        recipe: What all runs have in common.
        output: Folder of the results.
        contenders: The methods at their sizes, the frozen base among them.
        reference: Name of the method that the others are compared with.
        rates: Learning rates of each method, as many for one as for another; the best at the first seed is kept.
        seeds: Of order and start; every method takes all of them.
        equal: ``parameters``: the same steps for all; ``time``: as many steps as fit into the reference's time.
        held_out: Text file to measure forgetting on; ``None`` for the embedded texts.
        held_out_tokens: Tokens of it.
        tasks: In-context tasks.
        questions: How many of each; 0 for none.
        checked: What each contender's run would do, by id; empty for the frozen base.
        warnings: What is asked for and has no effect.
    """

    recipe: RunConfig
    output: Path
    contenders: Sequence[Contender]
    reference: str
    rates: Mapping[str, Sequence[float]]
    seeds: Sequence[int]
    equal: str = EQUAL[0]
    held_out: str | None = None
    held_out_tokens: int = HELD_OUT_TOKENS
    tasks: Sequence[str] = ()
    questions: int = 0
    checked: Mapping[str, Plan] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    @property
    def trained(self) -> list[Contender]:
        """The contenders that are trained."""
        return [contender for contender in self.contenders if contender.method.name != FROZEN]

    @property
    def num_runs(self) -> int:
        """Training runs in all."""
        return sum(len(self.rates[c.method.name]) + len(self.seeds) - 1 for c in self.trained)

    def reference_of(self, contender: Contender) -> Contender:
        """The reference of the nearest budget; for a contender without one, the first."""
        own = [other for other in self.contenders if other.method.name == self.reference]
        if contender.budget is None:
            return own[0]
        budget = contender.budget  # equal ranks are one contender, so that a reference may lack a budget
        return min(own, key=lambda other: abs((other.budget or 0) - budget))

    def run_config(self, contender: Contender, *, lr: float, seed: int, steps: int | None = None) -> RunConfig:
        """Returns the configuration of one run; ``steps`` stands in for the recipe's."""
        name = f"{contender.id}-lr{lr:g}-s{seed}"
        given = {} if steps is None else {"max_steps": steps}
        folder = str(self.output / RUNS / name)
        own = {"lr": lr, "seed": seed, "output_dir": folder, "run_name": None, "resume": True, **given}
        return settings(self.recipe, contender.method, contender.rank, **own)

    def deciding(self, digest: str | None) -> dict[str, Any]:
        """What may not change when a comparison goes on; methods, budgets, seeds and tasks may be added."""
        unread = (*SET_BY_METHODS, *SET_BY_RUNS, FIRST_SEED)
        return {
            "recipe": {key: value for key, value in flatten(self.recipe).items() if key not in unread},
            "metric": METRIC,
            "reference": self.reference,
            "learning_rates_each": len(self.rates[self.reference]),
            "first_seed": self.seeds[0],
            "equal": self.equal,
            "held_out": self.held_out,
            "held_out_tokens": self.held_out_tokens,
            "data": digest,
        }


SET_BY_RUNS = ("training.output_dir", "training.run_name", "training.resume", "training.lr")
FIRST_SEED = "training.seed"


def plan_comparison(
    config: RunConfig | str = "compare_sft",
    overrides: Sequence[str] = (),
    *,
    output: str | os.PathLike,
    methods: Sequence[str] = ("v1", "lora", "ia3", "dora", FROZEN),
    budgets: Sequence[int] = (),
    seeds: int = 3,
    learning_rates: Sequence[float] = LEARNING_RATES,
    rates_of: Mapping[str, Sequence[float]] | None = None,
    reference: str | None = None,
    equal: str = EQUAL[0],
    held_out: str | os.PathLike | None = None,
    held_out_tokens: int = HELD_OUT_TOKENS,
    tasks: Sequence[str] = tuple(TASKS),
    questions: int = 0,
) -> ComparisonPlan:
    """Finds out what :func:`pliant.compare` would do, and raises what can be known to fail; the same arguments.

    Raises:
        ConfigError: A setting is unknown, out of range or contradicts another.
        CheckpointError: The base cannot be read.
        DataError: Texts are missing or unreadable.
    """
    recipe = _recipe(config, overrides)
    for name in (*methods, *(rates_of or {})):
        method_named(name)
    if FROZEN not in methods:
        methods = [*methods, FROZEN]
    if Path(output).is_file():
        raise ConfigError(f"output must be a folder; {str(output)!r} is a file. Choose another name.")
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1 (runs of each method); got {seeds}. 3 is the default.")
    if equal not in EQUAL:
        raise ConfigError(f"equal must be one of {', '.join(EQUAL)}; got {equal!r}.{nearest(equal, EQUAL)}")
    if equal == "time" and recipe.training.max_steps is None:
        raise ConfigError("equal='time' changes the steps of each method, so it needs training.max_steps; got null.")
    if questions < 0 or held_out_tokens < 2:
        raise ConfigError(
            f"questions must be at least 0 and held_out_tokens at least 2; got {questions} and {held_out_tokens}."
        )
    for task in tasks if questions else ():
        if task not in TASKS:
            raise ConfigError(f"tasks must be among {', '.join(TASKS)}; got {task!r}.{nearest(task, tuple(TASKS))}")
    if held_out is not None:
        read_text(held_out)
    found = contenders(recipe, methods, budgets)
    file = Path(output, SETTINGS_FILE)
    before = read_settings(file) if file.is_file() else {}
    plan = ComparisonPlan(
        recipe=recipe,
        output=Path(output),
        contenders=found,
        reference=_reference(reference, methods, before.get("reference")),
        rates=_rates(methods, learning_rates, rates_of or {}),
        seeds=[recipe.training.seed + i for i in range(seeds)],
        equal=equal,
        held_out=None if held_out is None else str(held_out),
        held_out_tokens=held_out_tokens,
        tasks=tuple(tasks) if questions else (),
        questions=questions,
        warnings=_without_effect(overrides),
    )
    if before:
        check_settings(file, plan.deciding(before.get("data")))
    lr = {name: rates[0] for name, rates in plan.rates.items()}
    checked = {c.id: make_plan(plan.run_config(c, lr=lr[c.method.name], seed=plan.seeds[0])) for c in plan.trained}
    return replace(plan, checked=checked)


def _recipe(config: RunConfig | str, overrides: Sequence[str]) -> RunConfig:
    if isinstance(config, RunConfig) and overrides:
        raise ConfigError("overrides change a named configuration; got a RunConfig too. Set its fields instead.")
    recipe = config if isinstance(config, RunConfig) else compose(config, overrides)
    model, training = recipe.model, recipe.training
    if training.objective not in ("sft", "causal_lm"):
        raise ConfigError(
            "training.objective must be sft or causal_lm in a comparison, which every method can learn; got "
            f"{training.objective}. Set it, or see pliant compare --versions for equivalence."
        )
    if training.use_flash_attention:
        raise ConfigError(
            "training.use_flash_attention=true joins the rows of a batch, and a comparison measures them one by one; "
            "set training.use_flash_attention=false."
        )
    for name, value in asdict(training.lr_multipliers).items():
        if value != 1:
            raise ConfigError(
                f"training.lr_multipliers.{name} must be 1 in a comparison, as it would change the learning rate of "
                f"some methods only; got {value:g}. Give a method rates of its own: --learning-rates METHOD=1e-4,3e-4."
            )
    for name, wanted, why in (
        ("checkpoint_path", None, "starts every method from model.base_model_name"),
        ("layers", None, "changes every layer with every method"),
        ("init", "pretrained", "starts from a pretrained base"),
    ):
        if (value := getattr(model, name)) != wanted:
            unset = "null" if wanted is None else wanted
            raise ConfigError(f"model.{name}={unset} is needed, as a comparison {why}; got {value}. Set it.")
    return recipe


def _without_effect(overrides: Sequence[str]) -> list[str]:
    """Says which settings were given that a comparison does not read, as it sets them itself."""
    rules = {
        **dict.fromkeys(SET_BY_METHODS, "is set by each method (--methods) and its size (--budget)"),
        **dict.fromkeys(SET_BY_RUNS, "is set by each run"),
        "training.lr": "is set by --learning-rates",
    }
    keys = dict.fromkeys(override.key_or_group for override in parse_overrides(overrides))
    return [f"{key} {rules[key]}; without effect." for key in keys if key in rules]


def _reference(name: str | None, methods: Sequence[str], before: Any) -> str:
    """The method that the others are compared with: the one ``before``, LoRA, or the first that is trained."""
    trained = [method for method in methods if method != FROZEN]
    if not trained:
        raise ConfigError("methods must name one that is trained; got none. Add lora, or leave methods out.")
    if name is None:
        return next((method for method in (before, "lora") if method in trained), trained[0])
    if name not in trained:
        raise ConfigError(
            f"reference must be one of the methods that are trained ({', '.join(trained)}); got {name!r}."
            f"{nearest(name, trained)}"
        )
    return name


def _rates(
    methods: Sequence[str], learning_rates: Sequence[float], rates_of: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    """The learning rates of each method, as many for one as for another."""
    if unused := [name for name in rates_of if name not in methods]:
        raise ConfigError(f"learning rates of {unused[0]} are given, which is not among the methods. Leave them out.")
    rates = {name: sorted(rates_of.get(name, learning_rates)) for name in methods if name != FROZEN}
    for name, own in rates.items():
        if not own or not all(0 < rate < math.inf for rate in own) or len(set(own)) < len(own):
            raise ConfigError(f"learning_rates must be different numbers above 0; got {own} for {name}.")
    if len({len(own) for own in rates.values()}) > 1:
        counts = ", ".join(f"{name} {len(own)}" for name, own in rates.items())
        raise ConfigError(
            f"learning_rates must be as many for each method, so that all are tuned alike; got {counts}. Even them out."
        )
    return rates
