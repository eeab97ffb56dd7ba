"""Runs of the trainer on tiny bases: what is trained, what stays, what is kept, and what a resumed run gives."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM

import pliant
from pliant.config import RunConfig
from pliant.errors import CheckpointError, ConfigError, TrainingError
from pliant.training import train
from pliant.training.checkpoints import STAGING, last_checkpoint, restore

STEPS = 8


def base_hash(model: Any) -> str:
    """A hash of every parameter that conversion did not add."""
    added = {name for name, _ in model.dynamic_parameters()}
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name not in added:
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The log of a run, without what a clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "tokens_per_second", "eval_seconds", "train_runtime", "total_flos")
    return [
        {k: v for k, v in line.items() if k not in timed and not k.startswith("train_")}
        for line in lines
        if "train_runtime" not in line
    ]


@pytest.mark.parametrize("preset", ["keyed", "keyed_pre", "v1_single", "v2", "outer"])
def test_equivalence_lowers_the_divergence_and_leaves_the_base_alone(
    configure: Callable[..., RunConfig], base: Path, preset: str
) -> None:
    result = train(configure(model={"preset": preset, "adapter_rank": 8}, max_steps=24, use_regularization=True))
    assert result.after["eval_kl"] < result.before["eval_kl"]
    assert base_hash(result.model) == base_hash(pliant.load(base))
    with result.model.base_mode():
        assert result.after["eval_base_perplexity"] == pytest.approx(result.before["eval_base_perplexity"])


def test_a_delta_is_kept_when_the_base_is_frozen_and_all_when_it_is_trained(
    configure: Callable[..., RunConfig],
) -> None:
    frozen = train(configure("frozen"))
    assert (frozen.checkpoint / "pliant_delta.safetensors").exists()
    trained = train(configure("trained", trainable="all", objective="causal_lm"))
    assert (trained.checkpoint / "model.safetensors").exists()
    for result in (frozen, trained):
        loaded = pliant.load(result.checkpoint)
        for (name, expected), (_, found) in zip(
            sorted(result.model.named_parameters()), sorted(loaded.named_parameters()), strict=True
        ):
            assert torch.equal(expected, found), name
        assert (result.checkpoint / "tokenizer_config.json").exists()
        assert loaded.config.use_cache


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "lr_scheduler": "linear", "warmup_steps": 2},
        {"objective": "causal_lm", "trainable": "all"},
        {"model": {"preset": "v2"}, "gradient_checkpointing": True, "use_regularization": True},
        {"model": {"preset": "v1"}, "objective": "causal_lm", "trainable": "lora", "lora_dropout": 0.1},
        {"model_type": "dense", "objective": "causal_lm", "trainable": "lora"},
        {"data": {"streaming": True, "shuffle_buffer": 7}},
    ],
    ids=["keyed", "accumulated", "all", "two stages", "npt+lora", "lora", "streamed"],
)
def test_a_resumed_run_equals_the_unbroken_one(
    configure: Callable[..., RunConfig], options: dict[str, Any], tmp_path: Path
) -> None:
    options = {"save_steps": 3, "eval_steps": 4, "save_total_limit": 9, **options}
    whole = train(configure("whole", **options))
    broken = configure("broken", **options)
    stop_at = 5
    with pytest.raises(KeyboardInterrupt), _interrupting(stop_at):
        train(broken)
    assert last_checkpoint(tmp_path / "broken").name == "checkpoint-3"
    broken.training.resume = True
    resumed = train(broken)
    assert resumed.steps == STEPS
    for (name, expected), (_, found) in zip(
        sorted(whole.model.named_parameters()), sorted(resumed.model.named_parameters()), strict=True
    ):
        assert torch.equal(expected, found), name
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "broken")


class _interrupting:
    """Kills a run in the forward pass of optimizer step ``step``."""

    def __init__(self, step: int) -> None:
        self.step, self.patch = step, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        from pliant.training.trainer import PliantTrainer

        original = PliantTrainer.compute_loss

        def compute_loss(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step + 1 == self.step:
                raise KeyboardInterrupt
            return original(trainer, *args, **kwargs)

        self.patch.setattr(PliantTrainer, "compute_loss", compute_loss)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


@pytest.mark.parametrize("model_type", ["dense", "npt"])
def test_adapters_load_in_every_way_to_the_model_that_was_trained(
    configure: Callable[..., RunConfig], prompt: Tensor, model_type: str
) -> None:
    options = {"model": {"preset": "v1"}} if model_type == "npt" else {}
    result = train(configure(model_type=model_type, objective="causal_lm", trainable="lora", **options))
    assert result.after["eval_loss"] < result.before["eval_loss"]
    with torch.no_grad():
        expected = result.model.eval()(prompt).logits
    for load in (pliant.load, AutoModelForCausalLM.from_pretrained, AutoPeftModelForCausalLM.from_pretrained):
        with torch.no_grad():
            torch.testing.assert_close(load(result.best).eval()(prompt).logits, expected)


def test_accumulated_micro_batches_weigh_every_token_alike(configure: Callable[..., RunConfig]) -> None:
    options = {"objective": "causal_lm", "trainable": "all", "model_type": "dense", "data": {"packing": False}}
    at_once = train(configure("at_once", batch_size=4, max_steps=3, log_steps=1, **options))
    in_parts = train(
        configure("in_parts", batch_size=1, gradient_accumulation_steps=4, max_steps=3, log_steps=1, **options)
    )
    for expected, found in zip(at_once.model.parameters(), in_parts.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
    losses = [[line["loss"] for line in metrics_of(r.output_dir) if "loss" in line] for r in (at_once, in_parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_rows_and_checkpoint(
    configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pliant.training import objectives

    calls = iter(range(100))

    def spoiled(student: Any, batch: Any) -> Any:
        sums = objectives.end_to_end(student, batch)
        return {**sums, "loss": sums["loss"] * (float("nan") if next(calls) == 5 else 1.0)}

    monkeypatch.setitem(objectives.OBJECTIVES, "end_to_end", spoiled)
    with pytest.raises(TrainingError, match=r"loss must be finite; got nan at optimizer step 6.*checkpoint-4") as error:
        train(configure(save_steps=2))
    assert "rows [" in str(error.value)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-4"


def test_a_signal_saves_and_a_resumed_run_goes_on(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    import os
    import signal

    from pliant.training.trainer import PliantTrainer

    config = configure()
    original = PliantTrainer.compute_loss

    def compute_loss(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PliantTrainer, "compute_loss", compute_loss)
        stopped = train(config)
    assert stopped.stopped_by is signal.SIGTERM
    assert stopped.checkpoint.name == "checkpoint-5"
    config.training.resume = True
    whole, resumed = train(configure("whole")), train(config)
    assert resumed.stopped_by is None
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "run")
    for expected, found in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_the_best_checkpoint_is_that_of_the_lowest_perplexity_and_patience_ends_a_run(
    configure: Callable[..., RunConfig],
) -> None:
    config = configure(
        objective="causal_lm", trainable="all", model_type="dense", lr=1.0, lr_scheduler="constant",
        max_steps=40, eval_steps=1, early_stopping_patience=3, max_grad_norm=1e9,
    )  # fmt: skip
    result = train(config)
    evaluations = [e for e in metrics_of(result.output_dir) if "eval_perplexity" in e and e["step"]]
    best = min(evaluations, key=lambda e: e["eval_perplexity"])
    assert result.steps == best["step"] + 3 < 40
    rows = pliant.load(result.best)
    assert any(not torch.equal(a, b) for a, b in zip(rows.parameters(), result.model.parameters(), strict=True))


def test_a_write_that_fails_leaves_the_last_checkpoint(
    configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pliant.training.trainer import PliantTrainer

    original = PliantTrainer._save_optimizer_and_scheduler

    def full(trainer: Any, folder: str) -> None:
        if trainer.state.global_step == 4:
            raise OSError(28, "No space left on device")
        original(trainer, folder)

    monkeypatch.setattr(PliantTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written.*No space left.*checkpoint-2"):
        train(configure(save_steps=2))
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"
    assert not (tmp_path / "run" / STAGING).exists()
    pliant.load(tmp_path / "run" / "checkpoint-2")


def test_only_the_newest_checkpoints_stay(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    train(configure(save_steps=2, save_total_limit=2))
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-6",
        "checkpoint-8",
        "checkpoint-best",
    ]


def test_the_layerwise_stage_comes_first_and_starts_the_second_with_fresh_moments(
    configure: Callable[..., RunConfig],
) -> None:
    result = train(configure(model={"preset": "v2"}, log_steps=1, layerwise_fraction=0.5))
    logs = [line for line in metrics_of(result.output_dir) if "loss" in line]
    assert ["layer_error" in line for line in logs] == [True] * 4 + [False] * 4
    assert ["kl" in line for line in logs] == [False] * 4 + [True] * 4
    assert logs[3]["layer_error"] < logs[0]["layer_error"]
    state = torch.load(result.checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert {int(entry["step"]) for entry in state.values()} == {4}


def test_keyed_layers_start_end_to_end(configure: Callable[..., RunConfig]) -> None:
    result = train(configure(log_steps=1, max_steps=2))
    assert all("kl" in line for line in metrics_of(result.output_dir) if "loss" in line)


def test_components_have_learning_rates_of_their_own(configure: Callable[..., RunConfig]) -> None:
    config = configure(objective="causal_lm", trainable="all", max_steps=2)
    config.training.lr_multipliers.base_model = 0.0
    before = pliant.load(config.model.base_model_name)
    result = train(config)
    assert base_hash(result.model) == base_hash(before)


def test_a_run_saves_its_configuration_and_refuses_a_folder_with_a_run(configure: Callable[..., RunConfig]) -> None:
    result = train(configure(max_steps=1))
    text = (result.output_dir / "config.yaml").read_text()
    assert "adapter_rank: 8" in text
    with pytest.raises(ConfigError, match="must not hold another run"):
        train(configure(max_steps=1))


def test_separate_teacher_where_the_base_is_trained(configure: Callable[..., RunConfig]) -> None:
    result = train(configure(trainable="all", max_steps=12, lr=3e-3))
    assert result.after["eval_kl"] < result.before["eval_kl"]
    assert result.after["eval_base_perplexity"] == pytest.approx(result.before["eval_base_perplexity"])


def test_a_checkpoint_of_another_run_is_refused(configure: Callable[..., RunConfig]) -> None:
    keyed = train(configure("keyed", max_steps=1))
    other = train(configure("other", max_steps=1, model={"preset": "v2"}))
    with pytest.raises(CheckpointError, match="do not belong together"):
        restore(keyed.model, other.checkpoint)
