"""``pliant export``: a folder for others with its card, and the way to the hub."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

import pliant
from pliant.cli.model_card import find_run, read_results, read_run
from pliant.models import Delta, Edit, down_proj
from pliant.models.hub import UNREACHABLE

RESULTS = {
    "results": {
        "piqa": {"alias": "piqa", "acc,none": 0.625, "acc_stderr,none": 0.048, "acc_norm,none": 0.61},
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.05, "exact_match_stderr,strict-match": "N/A"},
    },
    "n-shot": {"piqa": 0, "gsm8k": 5},
    "n-samples": {"piqa": {"original": 1838, "effective": 100}},
    "pliant": {"base": {"results": {"piqa": {"acc,none": 0.7}}}},
}
CONFIG = """
model_type: npt
data: {dataset_name: wikitext/words, mixed: false, max_length: 128}
training: {objective: equivalence, trainable: modulation, batch_size: 4, lr: 0.0003, seed: 7}
"""
METRICS = [
    {"step": 0, "eval_perplexity": 30.5, "eval_base_perplexity": 20.25},
    {"step": 5, "loss": 1.0},
    {"step": 40, "eval_perplexity": 22.0, "eval_base_perplexity": 20.25},
]


@pytest.fixture
def checkpoint(converted: Path, tmp_path: Path) -> Path:
    """A checkpoint of a run, with the run's files above it and results beside it."""
    (tmp_path / "run").mkdir()
    folder = converted.rename(tmp_path / "run" / "checkpoint-40")
    (tmp_path / "run" / "config.yaml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, METRICS)) + "\n", encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    return folder


def card_of(folder: Path) -> Any:
    return ModelCard.load(folder / "README.md")


def test_the_card_says_what_the_files_say(run, checkpoint: Path, tmp_path: Path):
    output = run("export", checkpoint, "--output", tmp_path / "shared", "--remote-code").stdout
    assert f"pretrained={tmp_path / 'shared'},trust_remote_code=True" in output
    card = card_of(tmp_path / "shared")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.tags == ["pliant", "npt", "v2"]
    assert card.data.datasets == ["wikitext/words"]
    values = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert values == {("piqa", "acc"): 0.625, ("piqa", "acc_norm"): 0.61, ("gsm8k", "exact_match (strict-match)"): 0.05}
    for part in (
        "layers 0-3 v2 rank 16",
        "learning rate 0.0003",
        "data wikitext/words; 40 steps",
        "30.5 before, 22 after, base 20.25",
        "| piqa | 0 | 100 | acc | 0.625 ± 0.048 | 0.7 |",
        "| gsm8k | 5 |  | exact_match (strict-match) | 0.05 |  |",
        "trust_remote_code=True",
        "MIT licence",
    ):
        assert part in card.content, part
    assert str(tmp_path) not in card.content
    assert (tmp_path / "shared" / "modeling_pliant.py").is_file()


def test_without_code_the_card_names_pliant(run, converted: Path, tmp_path: Path):
    output = run("export", converted, "--output", tmp_path / "plain").stdout
    assert f"Next:  pliant serve {tmp_path / 'plain'}" in output
    card = card_of(tmp_path / "plain")
    assert card.data.library_name == "pliant"
    assert "trust_remote_code" not in card.content
    assert "no record of any" in card.content
    assert "None were measured" in card.content
    assert not (tmp_path / "plain" / "modeling_pliant.py").exists()
    assert pliant.load(tmp_path / "plain").spec.layers


def test_an_edited_dense_model_is_one_of_its_class_and_its_card_tells_the_edits(run, tiny: Path, tmp_path: Path):
    model: Any = pliant.load(tiny)
    factors = {"left": torch.ones(32, 1), "right": torch.ones(48, 1)}
    model.edits.add(Edit(context="The sea is slow and wide.", deltas={down_proj(1): Delta(**factors)}))
    model.save_pretrained(tmp_path / "edited")
    result = run("export", tmp_path / "edited", "--output", tmp_path / "merged", "--remote-code")
    assert "needs no code" in result.stderr
    run("edits", "export", tmp_path / "edited", "--output", tmp_path / "by-edits")
    card = card_of(tmp_path / "merged")
    assert "The sea is slow and wide." in card.content
    assert "can no longer be listed" in card.content
    merged = {file.name: file.read_bytes() for file in (tmp_path / "merged").iterdir() if file.name != "README.md"}
    assert merged == {file.name: file.read_bytes() for file in (tmp_path / "by-edits").iterdir()}
    assert json.loads(merged["config.json"])["architectures"] == ["LlamaForCausalLM"]


class Hub:
    """Takes note of what would go to the hub."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None
        self.is_private = True

    def note(self, name: str) -> Callable[..., str]:
        def call(_api: HfApi, *args: Any, **options: Any) -> str:
            files = (
                sorted(file.name for file in Path(options["folder_path"]).iterdir()) if "folder_path" in options else []
            )
            self.calls.append((name, {**options, "args": args, "files": files}))
            if self.error is not None and name == "upload_folder":
                raise self.error
            return "https://hub/someone/model"

        return call


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that is there, in place of the real one."""
    hub = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("whoami", "create_repo", "upload_folder"):
        monkeypatch.setattr(HfApi, name, hub.note(name))
    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: SimpleNamespace(private=hub.is_private))
    return hub


def test_it_asks_the_hub_first_and_uploads_the_whole_folder(run, converted: Path, tmp_path: Path, hub: Hub):
    output = tmp_path / "shared"
    result = run("export", converted, "-o", output, "--remote-code", "--push-to-hub", "someone/model", "--private")
    assert [name for name, _ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    created, uploaded = hub.calls[1][1], hub.calls[2][1]
    assert created["args"] == ("someone/model",)
    assert (created["private"], created["exist_ok"]) == (True, True)
    assert uploaded["repo_id"] == "someone/model"
    assert {"README.md", "config.json", "model.safetensors", "modeling_pliant.py"} <= set(uploaded["files"])
    assert "https://hub/someone/model" in result.stdout
    assert 'from_pretrained("someone/model", trust_remote_code=True)' in (output / "README.md").read_text()


def test_a_failed_upload_leaves_the_folder_and_says_how_to_go_on(run, converted: Path, tmp_path: Path, hub: Hub):
    hub.error = UNREACHABLE[0]("the line went dead")
    output = tmp_path / "shared"
    error = run("export", converted, "-o", output, "--push-to-hub", "someone/model", exit_code=1).stderr
    assert "the line went dead" in error
    assert f"hf upload someone/model {output}" in error
    assert (output / "model.safetensors").is_file()


def test_what_is_to_be_private_goes_to_no_public_repository(run, converted: Path, tmp_path: Path, hub: Hub):
    hub.is_private = False
    arguments = ("-o", tmp_path / "shared", "--push-to-hub", "someone/model", "--private")
    assert "'someone/model' is public" in run("export", converted, *arguments, exit_code=1).stderr
    assert [name for name, _ in hub.calls] == ["whoami", "create_repo"]


def refuse(error: Exception) -> Callable[..., None]:
    def whoami(_api: HfApi, *args: Any, **options: Any) -> None:
        raise error

    return whoami


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalTokenNotFoundError("no token"), "hf auth login"),
        (UNREACHABLE[0]("no route"), "could not be asked who you are: no route"),
        (OSError("name resolution"), "could not be asked who you are: name resolution"),
    ],
)
def test_without_the_hub_nothing_is_written(
    run, converted: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
):
    assert issubclass(HfHubHTTPError, UNREACHABLE[0])
    monkeypatch.setattr(HfApi, "whoami", refuse(error))
    found = run("export", converted, "-o", tmp_path / "new", "--push-to-hub", "someone/model", exit_code=1).stderr
    assert message in found
    assert "Loading" not in found
    assert not (tmp_path / "new").exists()


def test_offline_is_said_before_anything_is_written(
    run, converted: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = run("export", converted, "-o", tmp_path / "new", "--push-to-hub", "someone/model", exit_code=1).stderr
    assert "HF_HUB_OFFLINE is set" in error
    assert not hub.calls
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("repo", ["model", "a/b/c", "some one/model", "someone/../model"])
def test_a_wrong_repository_is_refused(run, converted: Path, tmp_path: Path, hub: Hub, repo: str):
    error = run("export", converted, "-o", tmp_path / "new", "--push-to-hub", repo, exit_code=1).stderr
    assert "push_to_hub must name a repository as owner/name" in error
    assert not hub.calls
    assert not (tmp_path / "new").exists()


def test_private_needs_a_repository(run, converted: Path, tmp_path: Path):
    assert "--push-to-hub" in run("export", converted, "-o", tmp_path / "new", "--private", exit_code=2).stderr


def test_a_folder_with_something_in_it_is_left_alone(
    run, converted: Path, tmp_path: Path, files_of: Callable[..., Any]
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine", encoding="utf-8")
    before = files_of(tmp_path / "full")
    error = run("export", converted, "-o", tmp_path / "full", "--remote-code", exit_code=1).stderr
    assert "must be a new or an empty folder" in error
    assert files_of(tmp_path / "full") == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": []}', '{"results": {"piqa": 1}}', "{"])
def test_results_of_another_form_are_refused(run, converted: Path, tmp_path: Path, text: str):
    file = tmp_path / "other.json"
    file.write_text(text, encoding="utf-8")
    error = run("export", converted, "-o", tmp_path / "new", "--results", file, exit_code=1).stderr
    assert "--results must be a JSON file whose 'results' map tasks to metrics" in error
    assert not (tmp_path / "new").exists()


def test_results_that_are_missing_are_refused(run, converted: Path, tmp_path: Path):
    error = run("export", converted, "-o", tmp_path / "new", "--results", tmp_path / "none.json", exit_code=1).stderr
    assert "--results must be" in error


def test_a_damaged_run_is_named(run, checkpoint: Path, tmp_path: Path):
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "eval_perp\n{"step": 1}\n', encoding="utf-8")
    error = run("export", checkpoint, "-o", tmp_path / "new", exit_code=1).stderr
    assert "metrics.jsonl: line 1 must be a JSON object" in " ".join(error.split())
    assert not (tmp_path / "new").exists()


def test_a_run_is_found_above_its_checkpoints_alone(checkpoint: Path, tmp_path: Path):
    assert find_run(str(checkpoint)) == tmp_path / "run"
    other = tmp_path / "run" / "other"
    other.mkdir()
    assert find_run(str(other)) is None
    assert read_run(tmp_path / "run").settings["seed"] == 7
    assert [score.value for score in read_results(checkpoint / "results.json")] == [0.625, 0.61, 0.05]


def test_the_account_of_a_run_ends_at_the_checkpoint(checkpoint: Path, tmp_path: Path):
    lines = [
        {"step": step, "eval_perplexity": value} for step, value in ((0, 90.0), (40, 22.0), (80, None), (200, 55.0))
    ]
    folder = tmp_path / "run"
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    expected = {
        "": (200, 55.0),
        "40": (200, 55.0),
        "checkpoint-best": (40, 22.0),
        "checkpoint-40": (40, 22.0),
        "checkpoint-60": (60, 22.0),
    }
    found = {name: read_run(folder, name) for name in expected}
    assert {name: (run.steps, run.last["eval_perplexity"]) for name, run in found.items()} == expected
    assert all(run.first["eval_perplexity"] == 90.0 for run in found.values())
