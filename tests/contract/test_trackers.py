"""What a run tells TensorBoard and W&B, and where they put it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pliant.config import RunConfig, TrainingConfig
from pliant.errors import ConfigError
from pliant.training import train

pytestmark = [
    # wandb's own imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def configure(tmp_path: Path, make_base: Callable[..., Any], tokenizer: Any) -> Callable[..., RunConfig]:
    """A function that makes the configuration of a run of four steps."""
    from pliant.config import DataConfig, ModelConfig

    make_base("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "texts.txt").write_text(
        "\n\n".join(" ".join(str(2 + (i + j) % 90) for j in range(12)) for i in range(40))
    )

    def make(**training: Any) -> RunConfig:
        return RunConfig(
            model=ModelConfig(base_model_name=str(tmp_path / "base"), preset="v2", adapter_rank=4),
            data=DataConfig(dataset_name=str(tmp_path / "texts.txt"), max_length=16, validation_fraction=0.2),
            training=TrainingConfig(
                output_dir=str(tmp_path / "run"), max_steps=4, batch_size=2, log_steps=1, eval_steps=2, **training
            ),
        )

    return make


def test_tensorboard_gets_losses_and_perplexities_in_the_runs_folder(
    configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(configure(report_to=["tensorboard"]))
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    assert events.is_relative_to(tmp_path / "run" / "runs")  # a folder a session, as TensorBoard likes it
    log = EventAccumulator(str(events.parent)).Reload()
    assert {"train/loss", "train/tokens_per_second", "eval/perplexity", "eval/kl"} <= set(log.Tags()["scalars"])
    assert [event.step for event in log.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in log.Scalars("eval/perplexity")] == [0, 2, 4]


def test_wandb_gets_the_runs_name_and_its_metrics(
    configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb-files"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "wandb-files").mkdir()
    try:
        train(configure(report_to=["wandb"], run_name="four steps"))
        assert wandb.run.name == "four steps"
        summary = dict(wandb.run.summary)
        assert {"train/loss", "eval/perplexity"} <= summary.keys()
    finally:
        wandb.finish()
    assert list((tmp_path / "wandb-files").rglob("run-*.wandb"))


def test_trackio_is_a_tracker_that_must_be_installed(
    configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(report_to=["trackio"])
    monkeypatch.setattr("pliant.training.plan.is_installed", lambda package: package != "trackio")
    with pytest.raises(ConfigError, match=r"report_to=trackio needs .*pip install trackio"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused_and_the_nearest_one_named() -> None:
    with pytest.raises(ConfigError, match=r"training\.report_to must name some of .*tensorbord.*tensorboard"):
        TrainingConfig(report_to=["tensorbord"])
