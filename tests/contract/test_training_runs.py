"""Runs of the trainer on tiny bases: what is trained, what stays, what is kept, and what a resumed run gives."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
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
from pliant.training.checkpoints import STAGING, last_checkpoint, restore, staged

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


def test_calibration_tokens_are_how_many_are_read_of_the_embedded_texts_too(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def windows(_tokenizer: Any, _text: None, *, num_tokens: int) -> Tensor:
        asked.append(num_tokens)
        return torch.randint(2, 97, (10, 12), generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr("pliant.training.build.calibration_tokens", windows)
    train(configure("keyed", max_steps=1, model={"calibration": None, "calibration_tokens": 4_321}))
    train(configure("v2", max_steps=1, model={"preset": "v2"}))  # which reads none
    assert asked == [4_321]


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


def test_a_run_over_a_trained_base_saves_all_of_the_model(configure: Callable[..., RunConfig]) -> None:
    first = train(configure("first", objective="causal_lm", trainable="all"))
    second_config = configure("second", objective="causal_lm", model={"checkpoint_path": str(first.best)})
    with pytest.raises(ConfigError, match="save_delta=true needs a base to load the delta over"):
        train(replace(second_config, training=replace(second_config.training, save_delta=True)))
    second = train(second_config)
    loaded = pliant.load(second.best)
    assert base_hash(loaded) == base_hash(first.model)
    for (name, expected), (_, found) in zip(
        second.model.dynamic_parameters(), loaded.dynamic_parameters(), strict=True
    ):
        assert torch.equal(expected, found), name
    with pytest.raises(ConfigError, match=r"needs the base of model\.checkpoint_path"):
        train(configure("third", trainable="all", model={"checkpoint_path": str(first.best)}))


def test_a_converted_dense_checkpoint_is_the_base_of_its_delta(configure: Callable[..., RunConfig]) -> None:
    dense = train(configure("dense", model_type="dense", objective="causal_lm", trainable="all"))
    config = configure("converted")
    config.model.base_model_name = str(dense.best)
    converted = train(config)
    assert (converted.best / "pliant_delta.safetensors").exists()
    assert base_hash(pliant.load(converted.best)) == base_hash(dense.model)


def test_the_teacher_of_a_checkpoint_is_its_own_base(configure: Callable[..., RunConfig]) -> None:
    first = train(configure("first", max_steps=2))
    config = configure("second", trainable="all", model={"checkpoint_path": str(first.best)})
    config.model.base_model_name = "smollm2-135m"  # the default, and another model
    second = train(config)
    assert second.before["eval_base_perplexity"] == pytest.approx(first.before["eval_base_perplexity"])


def test_a_finished_run_takes_no_further_step(configure: Callable[..., RunConfig], files_of: Any) -> None:
    config = configure(save_steps=4)
    finished = train(config)
    before = {n: h for n, h in files_of(finished.output_dir).items() if n.startswith("checkpoint")}
    config.training.resume = True
    again = train(config)
    assert again.steps == STEPS
    assert again.after == finished.after
    assert {n: h for n, h in files_of(finished.output_dir).items() if n.startswith("checkpoint")} == before
    for expected, found in zip(finished.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(expected, found)
    config.training.max_steps = STEPS + 2
    assert train(config).steps == STEPS + 2


def test_a_resumed_run_keeps_the_settings_that_decide_it(configure: Callable[..., RunConfig]) -> None:
    config = configure(max_steps=2)
    folder = train(config).output_dir
    saved = (folder / "config.yaml").read_text()
    other = configure(max_steps=4, resume=True, model={"adapter_rank": 4})
    with pytest.raises(ConfigError, match=r"model.adapter_rank must be what .*config.yaml says.*8; got 4"):
        train(other)
    weight = configure(max_steps=4, resume=True, regularization_lambda=0.5)
    with pytest.raises(ConfigError, match=r"training.regularization_lambda must be what .*0\.01; got 0\.5"):
        train(weight)
    assert (folder / "config.yaml").read_text() == saved


def test_adapters_need_the_model_that_they_were_trained_on(configure: Callable[..., RunConfig]) -> None:
    config = configure(objective="causal_lm", trainable="lora", model={"preset": "v1"}, save_steps=2, max_steps=2)
    folder = train(config).output_dir
    shutil.rmtree(folder / "start")
    config.training.resume, config.training.max_steps = True, 4
    with pytest.raises(CheckpointError, match="must hold the folder start"):
        train(config)


def test_a_log_line_across_stages_divides_each_part_by_its_own_positions(configure: Callable[..., RunConfig]) -> None:
    options = {"model": {"preset": "v2"}, "layerwise_fraction": 0.5, "lr": 1e-12}
    each = [line for line in metrics_of(train(configure("each", log_steps=1, **options)).output_dir) if "loss" in line]
    whole = [
        line for line in metrics_of(train(configure("whole", log_steps=8, **options)).output_dir) if "loss" in line
    ]
    for name in ("layer_error", "kl"):
        expected = [line[name] for line in each if name in line]
        assert next(line[name] for line in whole if name in line) == pytest.approx(
            sum(expected) / len(expected), rel=1e-2
        )


def test_the_perplexity_in_the_log_leaves_the_penalty_out(configure: Callable[..., RunConfig]) -> None:
    options = {"objective": "causal_lm", "log_steps": 1, "max_steps": 1, "model": {"preset": "v1_single"}}
    plain = metrics_of(train(configure("plain", **options)).output_dir)
    options |= {"use_regularization": True, "regularization_lambda": 1e3}
    penalised = metrics_of(train(configure("penalised", **options)).output_dir)
    assert penalised[1]["perplexity"] == plain[1]["perplexity"]


def test_a_failed_replacement_puts_the_older_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / "old").touch()
    real = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(source).name == "checkpoint-best" and Path(source).parent.name == STAGING:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with (
        pytest.raises(CheckpointError, match="No space left"),
        staged(tmp_path, "checkpoint-best", is_main=True, wait=lambda: None) as folder,
    ):
        (folder / "new").touch()
    assert [file.name for file in (tmp_path / "checkpoint-best").iterdir()] == ["old"]
