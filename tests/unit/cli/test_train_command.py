"""``pliant train``: settings reach the run, sweeps get folders of their own, what is wrong is one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from pliant.config import RunConfig
from pliant.config.composition import compose, recipes
from pliant.errors import DataError
from pliant.training.run import TrainingResult

MINE = "model:\n  preset: v2\ntraining:\n  seed: 7\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current folder, which a command may leave only what it says in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def trained(monkeypatch):
    """The configurations of the runs that were started; none trains."""
    configs: list[RunConfig] = []

    def train(config: RunConfig, **_) -> TrainingResult:
        configs.append(config)
        folder = Path(config.training.output_dir)
        return result(output_dir=folder, best=folder / "checkpoint-best")

    monkeypatch.setattr("pliant.training.run.train", train)
    return configs


def result(**fields):
    given = {
        "model": None,
        "output_dir": Path("outputs/run"),
        "steps": 1234,
        "before": {"eval_perplexity": 23.456, "eval_ratio": 1.9},
        "after": {"eval_perplexity": 12.345, "eval_ratio": 1.01},
        "checkpoint": Path("outputs/run/checkpoint-1234"),
        "best": None,
        "stopped_by": None,
    }
    return TrainingResult(**{**given, **fields})


def test_settings_reach_the_run(run, trained, folder):
    run("train", "--config-name", "readme", "training.lr=5e-5", "model.layers=8-15", "data.max_length=64")
    expected = compose("readme", ["training.lr=5e-5", "model.layers=8-15", "data.max_length=64"])
    assert trained == [expected]
    assert list(folder.iterdir()) == []


def test_the_defaults_are_a_run(run, trained):
    run("train")
    assert trained == [RunConfig()]


def test_what_a_run_came_to_is_shown_with_the_next_command(run, trained):
    text = run("train", "training.output_dir=a b").stdout
    assert all(word in text for word in ("1,234", "23.456 before, 12.345 after", "1.900 before, 1.010 after"))
    assert "Next:  pliant chat 'a b/checkpoint-best'" in text


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"before": {}}, "not measured before, 12.345 after"),
        ({}, "Next:  pliant chat outputs/run/checkpoint-1234"),
        ({"checkpoint": None, "after": {}}, "nothing"),
        ({"after": {"eval_perplexity": 49152.0}}, "49,152 after"),
    ],
)
def test_what_a_run_came_to_may_be_less(run, monkeypatch, fields, word):
    monkeypatch.setattr("pliant.training.run.train", lambda *_, **__: result(**fields))
    assert word in run("train").stdout


def test_a_run_that_a_signal_stopped_says_how_to_go_on_and_exits_as_the_signal_does(run, monkeypatch):
    monkeypatch.setattr("pliant.training.run.train", lambda *_, **__: result(stopped_by=signal.SIGTERM))
    assert "--resume" in run("train", exit_code=128 + signal.SIGTERM).stdout


def test_only_the_first_process_speaks(run, trained, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run("train").stdout == ""


def test_resume_is_a_setting(run, trained):
    run("train", "--resume")
    assert trained[0].training.resume


@pytest.mark.parametrize("arguments", [("--config-name=mine",), ("--config-name", "config/mine.yaml")])
def test_a_file_of_the_users(run, trained, folder, arguments):
    (folder / "config").mkdir()
    (folder / "config/mine.yaml").write_text(MINE, encoding="utf-8")
    run("train", *arguments, "training.lr=2e-4")
    assert (trained[0].model.preset, trained[0].training.seed, trained[0].training.lr) == ("v2", 7, 2e-4)


def test_a_folder_of_the_users(run, trained, folder):
    (folder / "my settings").mkdir()
    (folder / "my settings/mine.yaml").write_text("defaults: [guide, _self_]\n" + MINE, encoding="utf-8")
    run("train", "--config-dir", "my settings", "--config-name", "mine")
    assert (trained[0].training.hidden_loss, trained[0].training.seed) == ("mse", 7)


def test_cfg_prints_what_composes_again(run, trained, folder):
    text = run("train", "--config-name", "guide", "--cfg", "job", "training.lr=2e-4").stdout
    (folder / "again.yaml").write_text(text, encoding="utf-8")
    assert compose("again.yaml") == compose("guide", ["training.lr=2e-4"])
    assert trained == []


def test_dry_run_shows_the_plan_and_trains_nothing(run, trained, tiny, folder):
    (folder / "text.txt").write_text("Some words that are read.\n" * 100, encoding="utf-8")
    given = (f"model.base_model_name={tiny}", "model.preset=v2", "data.dataset_name=text.txt", "training.max_steps=3")
    text = run("train", "--dry-run", *given).stdout
    for word in ("4 of 4 layers: 0-3 v2 rank 16", "outputs/run: will be made", "activations", "text.txt", "6,144"):
        assert word in text
    assert trained == []
    assert [path.name for path in folder.iterdir()] == ["text.txt"]


def test_dry_run_says_what_is_not_known(run, monkeypatch):
    monkeypatch.setattr("pliant.training.estimate.hub_is_reachable", lambda: False)
    monkeypatch.setattr("pliant.data.check_data", lambda *_, **__: [])
    text = run("train", "--dry-run", "model.base_model_name=someone/some-model").stdout
    assert text.count("not checked (offline)") >= 3
    assert "≤" in run("train", "--dry-run", "model.base_model_name=Qwen/Qwen2.5-0.5B").stdout


def test_a_sweep_runs_every_job_in_a_folder_of_its_own(run, trained, folder):
    run("train", "--multirun", "training.lr=1e-3,1e-4", "model.preset=v2,keyed")
    assert [(c.training.lr, c.model.preset) for c in trained] == [
        (1e-3, "v2"),
        (1e-3, "keyed"),
        (1e-4, "v2"),
        (1e-4, "keyed"),
    ]
    folders = [Path(c.training.output_dir) for c in trained]
    assert len({*folders}) == 4
    assert all(path.parent.parent == Path("outputs/sweeps") for path in folders)
    assert [path.name for path in folder.iterdir()] == ["outputs"]


def test_a_sweep_is_found_again(run, trained, monkeypatch):
    run("train", "-m", "training.lr=1e-3,1e-4")
    run("train", "-m", "training.lr=1e-3,1e-4", "--resume")
    first, again = trained[:2], trained[2:]
    assert [c.training.output_dir for c in first] == [c.training.output_dir for c in again]
    assert all(c.training.resume for c in again)


def test_a_sweep_of_a_recipe_leaves_the_recipes_folder_alone(run, trained):
    run("train", "-m", "--config-name", "readme", "training.seed=1,2")
    assert not any(c.training.output_dir == "outputs/readme" for c in trained)


def test_folders_of_a_sweep_may_be_named(run, trained):
    run("train", "-m", "training.lr=1e-3,1e-4", "training.output_dir=out/lr-${training.lr}")
    assert [c.training.output_dir for c in trained] == ["out/lr-0.001", "out/lr-0.0001"]


def test_a_sweep_can_be_planned(run, trained, tiny, folder, monkeypatch):
    monkeypatch.setattr("pliant.data.check_data", lambda *_, **__: [])
    given = (f"model.base_model_name={tiny}", "model.adapter_rank=4,8")
    text = run("train", "-m", "--dry-run", *given).stdout
    assert text.count("keyed rank") == 2
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("training.learning_rate=1",), ("training.lr",)),
        (("training.lr=x",), ("training.lr", "number")),
        (("training.lr=1,2",), ("--multirun",)),
        (("training.batch_size=0",), ("training.batch_size",)),
        (("model_type=dtff",), ("model_type", "dtf")),
        (("--config-name", "readm"), ("'readme'",)),
        (("--config-dir", "nowhere"), ("nowhere",)),
        (("--adapter_rank", "16"), ("--adapter_rank", "model.adapter_rank", "coming-from.md")),
        (("--learning_rate=1e-4",), ("training.lr",)),
        (("--use_wandb",), ("training.report_to",)),
        (("--zzzzz",), ("--zzzzz", "key=value")),
        (("--dryrun",), ("--dry-run",)),
        (("-m", "--cfg", "job"), ("--cfg", "--multirun")),
        (("-m", "training.lr=1e-3,x"), ("training.lr", "number")),
        (("-m", "training.lr=1,2", "training.output_dir=out"), ("training.output_dir", "2 jobs")),
        (("-m", "training.lr=interval(0,1)"), ("INTERVAL",)),
        (("--dry-run", "model.adapter_rank=9999"), ("model.adapter_rank", "9999")),
        (("--dry-run", "model.base_model_name=./nowhere"), ("nowhere",)),
    ],
)
def test_what_is_wrong_is_one_line(run, trained, folder, arguments, words):
    error = run("train", *arguments, exit_code=1).stderr
    assert all(word in error for word in words), error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert trained == []
    assert not list(folder.iterdir())


@pytest.mark.parametrize("error", [DataError("the texts are too short"), OSError("no space left")])
def test_what_training_raises_is_one_line(run, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("pliant.training.run.train", fail)
    assert run("train", exit_code=1).stderr == f"error: {error}\n"


def test_a_sweep_goes_on_after_a_job_that_failed(run, monkeypatch):
    seeds = []

    def fail_once(config, **_):
        seeds.append(config.training.seed)
        if config.training.seed == 1:
            raise DataError("the texts are too short")
        return result()

    monkeypatch.setattr("pliant.training.run.train", fail_once)
    finished = run("train", "-m", "training.seed=1,2", exit_code=1)
    assert finished.stderr == "error: training.seed=1: the texts are too short\n"
    assert seeds == [1, 2]


def test_a_bug_is_not_hidden(run, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("pliant.training.run.train", fail)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run("train")


def test_nothing_of_hydra_is_left_behind(run, trained, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    before = list(sys.argv)
    run("train")
    run("train", "-m", "training.seed=1,2")
    run("train", "training.lr=x", exit_code=1)
    assert sys.argv == before
    assert "HYDRA_FULL_ERROR" not in os.environ
    assert not GlobalHydra.instance().is_initialized()
    assert not HydraConfig.initialized()


def test_help_teaches_overrides_and_names_the_recipes(run):
    text = " ".join(run("train", "--help").stdout.split())
    assert all(name in text for name in recipes())
    for word in ("pliant train --config-name", "Needs", "eaves", "key=value", "--multirun", "accelerate launch"):
        assert word in text


def test_help_imports_no_torch():
    command = [sys.executable, "-W", "error", "-X", "importtime", "-m", "pliant.cli", "train", "--help"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "pliant train" in finished.stdout
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "hydra", "numpy"}


def test_the_module_is_the_same_command(folder):
    command = [sys.executable, "-W", "error", "-m", "pliant.cli.train", "--config-name", "plan", "--cfg", "job"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "preset: outer" in finished.stdout
    assert not list(folder.iterdir())
