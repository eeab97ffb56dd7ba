"""Comparisons on a tiny base: equal sizes, equal tuning, results run by run on disk, and what is refused."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState

import pliant
from pliant.config import LrMultipliers, RunConfig
from pliant.errors import ConfigError, DataError, TrainingError
from pliant.evaluation.comparison import compare as comparing
from pliant.evaluation.comparison import cost, measures
from pliant.evaluation.comparison.figures import summarise
from pliant.evaluation.comparison.in_context import TASKS, ContextQuestion
from pliant.evaluation.comparison.methods import METHODS, contenders, settings
from pliant.evaluation.comparison.plan import plan_comparison
from pliant.training.build import autocast, build_model
from pliant.training.run import _arguments

BUDGET = 5_000
RATES = (1e-2, 3e-2)


def questions(limit: int, *, seed: int = 0) -> list[ContextQuestion]:
    """Numbers to copy, in the words of the tiny tokenizer."""
    return [
        ContextQuestion(id=str(i), context=f"{i + 5} {i + 6} ", question=f"{i + 5}", answers=(str(i + 6),))
        for i in range(limit)
    ]


@pytest.fixture
def recipe(configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Two steps on counting numbers; a task that the tiny tokenizer can read."""
    monkeypatch.setitem(TASKS, "copying", questions)
    return configure(model={"preset": "v1"}, objective="causal_lm", max_steps=2)


@pytest.fixture
def options(tmp_path: Path, calibration_text: Path) -> dict[str, Any]:
    """Three methods, two seeds, two learning rates; held-out text of the tiny tokenizer."""
    return {
        "output": tmp_path / "comparison",
        "methods": ["v1", "lora", "ia3"],
        "budgets": [BUDGET],
        "seeds": 2,
        "learning_rates": RATES,
        "held_out": calibration_text,
        "held_out_tokens": 96,
        "tasks": ["copying"],
        "questions": 3,
    }


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.trainable])
def test_methods_have_the_parameters_that_the_plan_says(
    configure: Callable[..., RunConfig], calibration_text: Path, name: str
) -> None:
    PartialState(cpu=True)
    text = {"preset": "keyed", "calibration": str(calibration_text), "calibration_tokens": 8_192}
    recipe = configure(model=text, objective="causal_lm")
    (contender,) = contenders(recipe, [name], [BUDGET])
    model, _ = build_model(settings(recipe, contender.method, contender.rank))
    assert contender.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not contender.method.has_rank:
        assert contender.budget is None
        return
    assert contender.rank is not None
    assert contender.parameters <= BUDGET
    if contender.rank < 32:  # the width of the base
        more, _ = build_model(settings(recipe, contender.method, contender.rank + 1))
        assert sum(p.numel() for p in more.parameters() if p.requires_grad) > BUDGET


def test_the_usual_budget_is_that_of_v1_at_rank_16(recipe: RunConfig) -> None:
    v1, lora = contenders(recipe, ["v1", "lora"])
    assert v1.rank == 16
    assert lora.budget == v1.parameters


def test_a_comparison_goes_on_where_it_stopped_and_measures_what_the_runs_are(
    recipe: RunConfig, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[RunConfig] = []
    original = comparing.train

    def train(config: RunConfig, **given: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(config)
        return original(config, **given)

    with monkeypatch.context() as patch:
        patch.setattr(comparing, "train", train)
        with pytest.raises(KeyboardInterrupt):
            pliant.compare(recipe, measure_cost=False, **options)
    file = options["output"] / "comparison.json"
    before = json.loads(file.read_text())
    assert len(before["runs"]) == 3
    started: list[RunConfig] = []
    monkeypatch.setattr(comparing, "train", lambda config, **given: started.append(config) or original(config, **given))
    found = pliant.compare(recipe, measure_cost=False, **options)
    assert found == json.loads(file.read_text())
    assert len(started) == 3 * (len(RATES) + 1) - 3
    assert [run["nll"] for run in found["runs"][:3]] == [run["nll"] for run in before["runs"]]
    _check_figures(found, options)
    _check_reloaded(found, options)

    def untouched(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(comparing, "train", untouched)
    assert pliant.compare(recipe, measure_cost=False, **options)["summary"] == found["summary"]
    more = pliant.compare(recipe, measure_cost=False, **{**options, "questions": 4})  # asked of what was trained
    assert all(row["in_context"]["copying"]["gain"]["value"]["count"] == 4 for row in more["summary"].values())


def _check_figures(found: dict[str, Any], options: dict[str, Any]) -> None:
    tokens, table = found["tokens"], found["summary"]
    assert set(table) == {"frozen", "ia3", *(name for name in table if name.startswith(("v1-r", "lora-r")))}
    for name, own in found["contenders"].items():
        if name == "frozen":
            continue
        losses = {
            run["lr"]: sum(run["nll"]) / sum(tokens)
            for run in found["runs"]
            if run["contender"] == name and run["seed"] == 0
        }
        assert own["learning_rate"] == min(losses, key=losses.__getitem__)
        assert own["is_at_edge"] is True  # of two rates each is an edge
        finals = [r for r in found["runs"] if r["contender"] == name and r["lr"] == own["learning_rate"]]
        assert [run["seed"] for run in finals] == [0, 1]
        assert len({tuple(run["nll"]) for run in finals}) == 2
        row = table[name]
        means = [sum(run["nll"]) / sum(tokens) for run in finals]
        assert row["validation_loss"] == pytest.approx(sum(means) / 2)
        assert row["forgetting"]["kl"] > 0
        assert row["in_context"]["copying"]["correct"]["value"]["count"] == 3
        assert ("compared_with" in row) is not name.startswith("lora")
        log = (options["output"] / finals[1]["folder"] / "metrics.jsonl").read_text().splitlines()
        last = [json.loads(line)["eval_loss"] for line in log if "eval_loss" in line][-1]
        assert means[1] == pytest.approx(last, rel=1e-4)
        assert finals[1]["seconds"] == max(json.loads(line)["time"] for line in log)
        assert finals[1]["environment"]["torch"] == torch.__version__
        assert not list((options["output"] / finals[1]["folder"]).glob("checkpoint-[0-9]*"))
    frozen = table["frozen"]
    assert frozen["forgetting"]["kl"] == pytest.approx(0, abs=1e-6)
    assert frozen["forgetting"]["perplexity_ratio"] == pytest.approx(1)
    assert frozen["difference"]["value"] > 0  # LoRA has learnt something


def _check_reloaded(found: dict[str, Any], options: dict[str, Any]) -> None:
    """What was written down of a run is what its checkpoint gives."""
    run = next(run for run in found["runs"] if run["contender"].startswith("lora") and "forgetting" in run)
    model = pliant.load(options["output"] / run["folder"] / "checkpoint-best").eval()
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 5]])
        expected = model(ids).logits[0, -1].log_softmax(-1)[6].item()
    assert run["in_context"]["copying"][0]["log_prob"] == pytest.approx(expected, abs=1e-5)


def test_equal_time_gives_the_slower_method_fewer_steps_and_every_run_of_it_as_many(
    recipe: RunConfig, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = {"v1": 0.5, "lora": 1.0, "ia3": 2.0}

    def measured(configs: dict[str, RunConfig], *, reference: str) -> dict[str, Any]:
        ratios = {name: 1.0 if name == reference else slow[name.partition("-")[0]] for name in configs}
        return {n: {"seconds": r, "time_ratio": r, "peak_bytes": None, "memory_ratio": None} for n, r in ratios.items()}

    monkeypatch.setattr(cost, "measure_apart", measured)
    options |= {"seeds": 1, "learning_rates": [1e-2], "equal": "time", "questions": 0}
    found = pliant.compare(recipe, **options)
    steps = {run["contender"].partition("-")[0]: run["steps"] for run in found["runs"]}
    assert steps == {"v1": 4, "lora": 2, "ia3": 1}
    slow["ia3"] = 0.5  # times are measured anew, as the reference is of another size
    more = pliant.compare(recipe, **{**options, "methods": ["lora", "ia3"], "budgets": [2 * BUDGET], "seeds": 2})
    assert [run["steps"] for run in more["runs"] if run["contender"] == "ia3"] == [1, 1]


def test_a_learning_rate_that_diverges_loses_and_the_others_go_on(
    recipe: RunConfig, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = comparing.train

    def train(config: RunConfig, **given: Any) -> Any:
        if config.training.lr == RATES[1]:
            raise TrainingError("the loss must be finite; got nan at step 1")
        return original(config, **given)

    monkeypatch.setattr(comparing, "train", train)
    options = {**options, "methods": ["v1"], "seeds": 1}
    found = pliant.compare(recipe, measure_cost=False, **options)
    failed = [run for run in found["runs"] if "failed" in run]
    assert [run["lr"] for run in failed] == [RATES[1]]
    (name,) = (name for name in found["summary"] if name != "frozen")
    assert found["contenders"][name]["learning_rate"] == RATES[0]
    options = {**options, "learning_rates": [RATES[1]], "output": options["output"].with_name("all")}
    with pytest.raises(TrainingError, match=r"a learning rate must end in a finite loss; none of 0\.03 did"):
        pliant.compare(recipe, measure_cost=False, **{**options, "budgets": []})


def test_a_seed_that_diverged_is_counted(
    recipe: RunConfig, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = comparing.train

    def train(config: RunConfig, **given: Any) -> Any:
        if config.training.seed == 1:
            raise TrainingError("the loss must be finite; got nan at step 1")
        return original(config, **given)

    monkeypatch.setattr(comparing, "train", train)
    options = {**options, "methods": ["ia3"], "learning_rates": [1e-2], "questions": 0}
    table = pliant.compare(recipe, measure_cost=False, **options)["summary"]
    assert (table["ia3"]["seeds"], table["ia3"]["failed"]) == (1, 1)
    assert (table["frozen"]["seeds"], table["frozen"]["failed"]) == (1, 0)
    assert table["ia3"]["forgetting"]["kl"] > 0


STOPPED = SimpleNamespace(stopped_by=signal.SIGTERM)


def test_answers_are_kept_task_by_task(
    recipe: RunConfig, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "repeating", lambda limit, *, seed: questions(limit + 1, seed=seed))
    monkeypatch.setattr(comparing, "train", lambda *_, **__: STOPPED)
    original, asked = measures.in_context_records, []

    def answered(*given: Any, **more: Any) -> Any:
        asked.append(len(given[2]))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return original(*given, **more)

    monkeypatch.setattr(measures, "in_context_records", answered)
    options = {**options, "tasks": ["copying", "repeating"]}
    with pytest.raises(KeyboardInterrupt):
        pliant.compare(recipe, measure_cost=False, **options)
    kept = json.loads((options["output"] / "comparison.json").read_text())["base"]
    assert set(kept["in_context"]) == {"copying"}
    found = pliant.compare(recipe, measure_cost=False, **options)["base"]
    assert asked == [3, 4, 4]
    assert {task: len(records) for task, records in found["in_context"].items()} == {"copying": 3, "repeating": 4}


def test_the_base_is_held_by_recipes_that_only_a_conversion_takes(
    recipe: RunConfig, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "train", lambda *_, **__: STOPPED)
    recipe.training.use_regularization, recipe.training.save_delta = True, False
    found = pliant.compare(recipe, measure_cost=False, **{**options, "methods": ["v1"], "questions": 0})
    assert set(found["summary"]) == {"frozen"}


def test_the_reference_stays_when_methods_are_added(
    recipe: RunConfig, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "train", lambda *_, **__: STOPPED)
    options = {**options, "questions": 0}
    pliant.compare(recipe, measure_cost=False, **{**options, "methods": ["v1", "ia3"]})
    assert plan_comparison(recipe, **options).reference == "v1"
    assert pliant.compare(recipe, measure_cost=False, **options)["reference"] == "v1"
    with pytest.raises(ConfigError, match=r"reference was 'v1' .* now 'lora'"):
        plan_comparison(recipe, **options, reference="lora")


def test_only_what_methods_read_of_a_recipe_decides(recipe: RunConfig, options: dict[str, Any]) -> None:
    def deciding(model: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
        changed = replace(recipe, model=replace(recipe.model, **(model or {})))
        changed.training = replace(recipe.training, **training)
        return plan_comparison(changed, **options).deciding("data")

    usual = deciding()
    assert deciding({"preset": "v2", "adapter_rank": 3}, lora_rank=3, lora_alpha=5, lr=0.5) == usual
    for training in ({"lora_dropout": 0.1}, {"weight_decay": 0.1}):
        assert deciding(**training) != usual


def test_the_time_of_all_sessions_is_that_of_the_log(tmp_path: Path) -> None:
    assert comparing._seconds(tmp_path) is None
    lines = [{"step": 1, "time": 3.5}, {"step": 2, "time": 8.25}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 2, "ti'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert comparing._seconds(tmp_path) == 8.25


@pytest.mark.parametrize(
    ("precision", "trainable", "dtype"),
    [
        ("no", "all", None),
        ("bf16", "lora", None),
        ("bf16", "all", torch.bfloat16),
        ("fp16", "lora", torch.float16),
        ("fp16", "all", torch.float16),
    ],
)
def test_runs_are_trained_measured_and_timed_in_one_precision(
    configure: Callable[..., RunConfig], precision: str, trainable: str, dtype: torch.dtype | None
) -> None:
    assert cost.autocast is measures.autocast is autocast
    config = configure(model_type="dense", objective="causal_lm", mixed_precision=precision, trainable=trainable)
    with autocast(config, torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") is (dtype is not None)
        assert dtype is None or torch.get_autocast_dtype("cpu") == dtype
    if precision != "fp16":  # which transformers refuses on a CPU
        assert _arguments(config, resumed=False).bf16 is (dtype is not None)


def test_a_failed_measurement_of_costs_names_what_helps(
    recipe: RunConfig, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-9, stderr="killed"))
    with pytest.raises(TrainingError, match=r"with -9: …killed Free some memory or lower training\.batch_size; where"):
        cost.measure_apart({"v1": recipe}, reference="v1")


def test_a_signal_ends_it_and_keeps_what_is_done(
    recipe: RunConfig, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "train", lambda *_, **__: STOPPED)
    found = pliant.compare(recipe, measure_cost=False, **options)
    assert found["stopped_by"] == "SIGTERM"
    assert found["runs"] == []
    assert set(found["summary"]) == {"frozen"}
    assert json.loads((options["output"] / "comparison.json").read_text())["base"]["nll"]


def test_another_comparison_in_the_same_folder_is_refused(recipe: RunConfig, options: dict[str, Any]) -> None:
    options |= {"methods": ["ia3"], "seeds": 1, "learning_rates": [1e-2], "questions": 0}
    found = pliant.compare(recipe, measure_cost=False, **options)
    recipe.training.max_steps = 3
    with pytest.raises(ConfigError, match=r"recipe\.training\.max_steps was 2 .* now 3\. Choose another folder"):
        pliant.compare(recipe, measure_cost=False, **options)
    recipe.training.max_steps = 2
    more = pliant.compare(recipe, measure_cost=False, **{**options, "seeds": 2})
    assert more["runs"][0] == found["runs"][0]
    assert len(more["runs"]) == 2
    (options["output"] / "comparison.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"comparison\.json must be JSON"):
        pliant.compare(recipe, measure_cost=False, **options)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"methods": ["v1", "lorra"]}, ("methods", "'lorra'", "Did you mean 'lora'")),
        ({"methods": ["v1", "v1"]}, ("methods", "'v1' twice")),
        ({"methods": ["frozen"]}, ("methods", "trained")),
        ({"methods": []}, ("methods", "none")),
        ({"budgets": [20]}, ("budget", "rank 1", "got 20")),
        ({"budgets": [0]}, ("budget", "at least 1")),
        ({"seeds": 0}, ("seeds", "at least 1")),
        ({"learning_rates": []}, ("learning_rates",)),
        ({"learning_rates": [1e-3, 1e-3]}, ("learning_rates", "different")),
        ({"learning_rates": [0.0]}, ("learning_rates", "above 0")),
        ({"rates_of": {"ia3": [1e-2]}}, ("learning_rates", "ia3 1", "tuned alike")),
        ({"rates_of": {"full": [1e-2, 3e-2]}}, ("full", "not among the methods")),
        ({"reference": "dora"}, ("reference", "'dora'")),
        ({"equal": "steps"}, ("equal", "parameters, time")),
        ({"tasks": ["recalls"]}, ("tasks", "'recalls'", "Did you mean 'recall'")),
        ({"held_out_tokens": 1}, ("held_out_tokens",)),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(
    recipe: RunConfig, options: dict[str, Any], wrong: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as raised:
        pliant.compare(recipe, **{**options, **wrong})
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert not options["output"].exists()


@pytest.mark.parametrize(
    ("model", "training", "words"),
    [
        ({"preset": "v1", "layers": "upper_half"}, {}, ("model.layers=null",)),
        ({"preset": "v2"}, {"objective": "equivalence"}, ("training.objective", "--versions")),
        ({"preset": "v1"}, {"max_steps": None, "num_epochs": 1.0}, ("training.max_steps",)),
        (
            {"preset": "v1"},
            {"lr_multipliers": LrMultipliers(modulation=0.5)},
            ("training.lr_multipliers.modulation", "got 0.5", "--learning-rates METHOD="),
        ),
    ],
)
def test_recipes_that_cannot_be_compared_are_refused(
    configure: Callable[..., RunConfig],
    options: dict[str, Any],
    model: dict[str, Any],
    training: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    recipe = configure(model=model, **{"objective": "causal_lm", **training})
    with pytest.raises(ConfigError) as raised:
        plan_comparison(recipe, **{**options, "tasks": (), "questions": 0, "equal": "time"})
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_missing_text_and_package_are_named_first(
    recipe: RunConfig, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="does not exist"):
        pliant.compare(recipe, measure_cost=False, **{**options, "held_out": "nowhere.txt"})
    monkeypatch.setattr("pliant.training.plan.is_installed", lambda name: name != "peft")
    with pytest.raises(ConfigError, match="pip install peft"):
        pliant.compare(recipe, **options)


def test_differences_are_those_of_the_rows(recipe: RunConfig, options: dict[str, Any]) -> None:
    plan = plan_comparison(recipe, **{**options, "learning_rates": [1e-2]})
    v1, lora = (next(c.id for c in plan.trained if c.method.name == name) for name in ("v1", "lora"))
    tokens = [10, 30]
    losses = {(v1, 0): [10.0, 60.0], (v1, 1): [14.0, 56.0], (lora, 0): [20.0, 30.0], (lora, 1): [20.0, 30.0]}
    runs = [{"contender": name, "lr": 1e-2, "seed": seed, "nll": nll} for (name, seed), nll in losses.items()]
    table = summarise(plan, {"tokens": tokens, "runs": runs, "base": None})
    assert set(table) == {v1, lora}
    assert table[v1]["validation_loss"] == pytest.approx(70 / 40)
    assert table[v1]["validation_loss_deviation"] == pytest.approx(0)
    gap = table[v1]["difference"]
    assert gap["value"] == pytest.approx((-8 + 28) / 40)
    assert gap["low"] == pytest.approx(-8 / 10)  # both draws the first row
    assert gap["high"] == pytest.approx(28 / 30)
    assert table[lora]["difference"]["value"] == 0


def test_costs_are_measured_beside_the_reference(recipe: RunConfig, options: dict[str, Any]) -> None:
    plan = plan_comparison(recipe, **options)
    configs = {c.id: plan.run_config(c, lr=1e-3, seed=0) for c in plan.trained[:2]}
    first, second = configs
    found = cost.measure_costs(configs, reference=second, repeats=2)
    assert set(found) == set(configs)
    assert found[second]["time_ratio"] == found[second]["memory_ratio"] == 1.0
    assert found[first]["seconds"] > 0
    assert found[first]["time_ratio"] > 0
    base_bytes = sum(p.numel() * 4 for p in pliant.load(recipe.model.base_model_name).parameters())
    assert found[first]["peak_bytes"] > base_bytes


@pytest.mark.slow
def test_costs_are_measured_in_a_process_of_their_own(recipe: RunConfig, options: dict[str, Any]) -> None:
    found = pliant.compare(
        recipe, **{**options, "methods": ["v1", "lora"], "seeds": 1, "learning_rates": [1e-2], "questions": 0}
    )
    assert set(found["cost"]) == {run["contender"] for run in found["runs"]}
    assert all(own["seconds"] > 0 for own in found["cost"].values())
