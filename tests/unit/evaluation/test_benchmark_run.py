"""Benchmark tasks on tiny models: the base beside them, a run that goes on, and answers that no batch changes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import pliant
from pliant.errors import ConfigError, DataError
from pliant.evaluation import Benchmarks, evaluate_tasks
from pliant.evaluation.editing.run import weight_format
from pliant.evaluation.tasks import run as benchmark_run
from pliant.evaluation.tasks.definitions import CONFIGS, load_yaml, prepare
from pliant.evaluation.tasks.harness import Harness
from pliant.evaluation.tasks.results import assemble

TEXT = " ".join(str(2 + (i * i + 3 * i) % 90) for i in range(400))
ARC_FILE = "hf_datasets/ai2_arc/ARC-Easy/validation/data-00000-of-00001.arrow"


@pytest.fixture
def model(make_converted: Any) -> Any:
    return make_converted("v1")


@pytest.fixture
def options(task_data: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text(TEXT)
    return {
        "output": tmp_path / "results",
        "data_dir": task_data,
        "data": tmp_path / "text.txt",
        "num_tokens": 64,
        "window": 16,
        "batch_size": 4,
    }


def measured(model: Any, tokenizer: Any, options: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return pliant.evaluate(model, tokenizer, **{"tasks": ["perplexity", "arc_easy"], **options, **changed})


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key not in ("date", "total_evaluation_time_seconds")}


def test_a_model_and_its_base_are_measured_on_the_same_documents(model, tokenizer, options, state_of):
    before, padding = state_of(model), tokenizer.padding_side
    found = measured(model, tokenizer, options)
    assert state_of(model) == before
    assert tokenizer.padding_side == padding
    own = found["pliant"]["tasks"]["arc_easy"]["metrics"]["acc,none"]
    assert own["model"]["count"] == own["base"]["count"] == own["difference"]["count"] == 12
    assert own["difference"]["value"] == pytest.approx(own["model"]["value"] - own["base"]["value"])
    assert found["results"]["arc_easy"]["acc,none"] == own["model"]["value"]
    assert found["pliant"]["base"]["results"]["arc_easy"]["acc,none"] == own["base"]["value"]
    assert found["results"]["arc_easy"]["acc_stderr,none"] > 0
    for key in ("configs", "versions", "n-shot", "n-samples", "config", "lm_eval_version"):
        assert key in found
    assert found == json.loads((options["output"] / "results.json").read_text())
    lines = (options["output"] / "samples/model/arc_easy.jsonl").read_text().splitlines()
    assert {"doc", "arguments", "resps", "acc", "doc_hash"} <= json.loads(lines[0]).keys()
    held_out = found["pliant"]["held_out"]
    assert held_out["ratio"]["value"] == pytest.approx(
        held_out["perplexity"]["value"] / held_out["base_perplexity"]["value"]
    )
    assert set(found["pliant"]["modulation"]) == {"0", "1", "2"}
    assert {*found["pliant"]["samples"][0]} == {"prompt", "model", "base"}


def test_the_base_is_the_model_without_its_change(model, tokenizer, options, make_base):
    base = measured(model, tokenizer, options)["pliant"]["base"]["results"]
    make_base().save_pretrained(options["output"].parent / "base")
    dense = pliant.load(options["output"].parent / "base").eval()
    alone = measured(dense, tokenizer, options, output=options["output"].parent / "dense")
    assert alone["results"] == base
    assert alone["pliant"]["base"] == {}
    assert alone["pliant"]["tasks"]["arc_easy"]["metrics"]["acc,none"]["difference"] is None


def test_what_is_complete_is_not_run_again(model, tokenizer, options, monkeypatch):
    first = measured(model, tokenizer, options)
    run, asked = Harness.run, []

    def counted(self: Any, prepared: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["label"])
        return run(self, prepared, **kwargs)

    monkeypatch.setattr(Harness, "run", counted)
    assert without_times(measured(model, tokenizer, options)) == without_times(first)
    assert asked == []
    (options["output"] / "tasks/base/arc_easy.json").unlink()
    measured(model, tokenizer, options, tasks=["arc_easy", "openbookqa"])
    assert asked == ["arc_easy, base", "openbookqa", "openbookqa, base"]
    found = measured(model, tokenizer, options, tasks=["perplexity"])
    assert set(found["pliant"]["tasks"]) == {"arc_easy", "openbookqa"}


def test_answers_outlive_a_task_that_was_stopped(model, tokenizer, options, monkeypatch):
    whole = measured(model, tokenizer, options, samples=False)
    shutil.rmtree(options["output"] / "tasks")
    asked: list[int] = []
    call: Any = vars(HFLM)["_model_call"]

    def counted(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(inputs))
        return call(self, inputs, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_call", counted)
    assert measured(model, tokenizer, options, samples=False)["results"] == whole["results"]
    assert asked == []
    measured(model, tokenizer, options, tasks=["openbookqa"], samples=False)
    assert asked


def test_runs_of_one_base_share_its_answers(model, tokenizer, options, make_converted, monkeypatch):
    shared = {"base_cache": options["output"].parent / "shared", "samples": False}
    measured(model, tokenizer, options, **shared)
    labels: dict[str, int] = {}

    def counted(label: str, _done: int, _total: int) -> None:
        labels[label] = labels.get(label, 0) + 1

    other = make_converted("v2")
    measured(other, tokenizer, options, **shared, output=options["output"].parent / "other", progress=counted)
    assert labels["arc_easy, base"] == 1
    assert labels["arc_easy"] == 48


def test_another_model_or_other_settings_are_refused(model, tokenizer, options, make_converted):
    measured(model, tokenizer, options)
    with pytest.raises(ConfigError, match=r"limit was None .* and is now 5. Choose another folder"):
        measured(model, tokenizer, options, limit=5)
    with pytest.raises(ConfigError, match="Choose another folder"):
        measured(make_converted("v2"), tokenizer, options)
    with pytest.raises(ConfigError, match="stride was 16"):
        measured(model, tokenizer, options, stride=8)


def test_tasks_of_one_folder_have_one_limit_and_seed(model, tokenizer, options):
    measured(model, tokenizer, options, tasks=["openbookqa"], samples=False, limit=4, seed=3)
    own: dict[str, Any] = {name: options[name] for name in ("data", "data_dir", "num_tokens", "window")}
    own |= {"limit": 4, "seed": 3}
    Benchmarks(tasks=["perplexity"], **own).prepare(options["output"])
    assert len(Benchmarks(tasks=["arc_easy"], **own).prepare(options["output"])) == 1
    for names in (["perplexity"], ["arc_easy"]):
        with pytest.raises(ConfigError, match=r"limit was 4 in .*openbookqa.settings.json and is now 5"):
            Benchmarks(tasks=names, **{**own, "limit": 5}).prepare(options["output"])
        with pytest.raises(ConfigError, match=r"seed was 3 in .*openbookqa.settings.json and is now 7"):
            Benchmarks(tasks=names, **{**own, "seed": 7}).prepare(options["output"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": None}, "exactly one of suite and tasks"),
        ({"suite": "retention"}, "exactly one of suite and tasks"),
        ({"tasks": []}, "at least one task"),
        ({"limit": 0}, "limit must be an integer of at least 1; got 0"),
        ({"limit": True}, "limit must be an integer"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1; got 0"),
        ({"num_fewshot": -1}, "num_fewshot must be an integer of at least 0; got -1"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"window": 1}, "window must be at least 2"),
        ({"num_tokens": 8}, "num_tokens must be at least window=16; got 8"),
        ({"stride": 17}, r"stride must be in 1..16 \(window\); got 17"),
        ({"limits": 5}, "no field 'limits'.* Did you mean 'limit'?"),
        ({"base": False}, "data is the text for perplexity and for the comparison with the base; .* with neither"),
        ({"mode": "batched"}, "tasks take limit, and not editors, records"),
        ({"tasks": None, "suite": "retention", "limit": 3}, "goes with tasks only"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(model, tokenizer, options, changed, message):
    given = {**options, "tasks": ["arc_easy"], **changed}
    if changed.get("suite") == "retention" and changed.get("tasks", 0) is None:
        given = {"output": options["output"], **changed}
    with pytest.raises(ConfigError, match=message):
        pliant.evaluate(model, tokenizer, **given)
    assert not options["output"].exists()


def test_paths_and_models_that_do_not_fit_are_refused(model, tokenizer, options, make_base, tmp_path):
    with pytest.raises(DataError, match="data must be a text file"):
        measured(model, tokenizer, options, data=tmp_path / "nowhere.txt")
    with pytest.raises(ConfigError, match="output must be a folder"):
        measured(model, tokenizer, options, output=options["data"])
    with pytest.raises(ConfigError, match=r"model must be one that pliant.load returns; got LlamaForCausalLM"):
        evaluate_tasks(make_base(), tokenizer, Benchmarks(tasks=["perplexity"]), output=options["output"])
    assert not options["output"].exists()


def test_damaged_results_are_named(model, tokenizer, options):
    measured(model, tokenizer, options)
    (options["output"] / "tasks/model/arc_easy.json").write_text("{")
    with pytest.raises(DataError, match=r"arc_easy.json must be JSON; it is damaged.*Delete it"):
        measured(model, tokenizer, options)
    (options["output"] / "tasks/model/arc_easy.json").unlink()
    (options["output"] / "requests/model.db").write_bytes(b"no database" * 100)
    with pytest.raises(DataError, match=r"model.db must hold answers to requests; it is damaged"):
        measured(model, tokenizer, options)


def test_what_to_delete_of_damaged_results_is_told(model, tokenizer, options, monkeypatch):
    whole, folder = measured(model, tokenizer, options, tasks=["openbookqa"], samples=False), options["output"]
    results, samples = folder / "tasks/base/openbookqa.json", folder / "samples/base/openbookqa.jsonl"
    lines = samples.read_text()
    for file, content, told in (
        (results, "[]", "must hold results by name; it holds a list"),
        (results, "{}", "must hold the results of task 'openbookqa'"),
        (samples, "", "it is missing or empty"),
        (samples, None, "it is missing or empty"),
        (samples, lines + "{", "line 7 must be what was made of a document; it is damaged"),
        (samples, lines.replace("doc_id", "document", 1), "line 1 must be what was made of a document"),
        (samples, "[1]", "line 1 must be what was made of a document"),
    ):
        before = file.read_text()
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(DataError, match=re.escape(told)) as raised:
            assemble(folder)
        assert f"Delete {results if file == samples else 'it'}, and " in str(raised.value)
        file.write_text(before)
    samples.unlink()
    results.unlink()  # as was told
    monkeypatch.setattr(HFLM, "_model_call", lambda *_, **__: pytest.fail("was answered before"))
    again = measured(model, tokenizer, options, tasks=["openbookqa"], samples=False)
    assert again["pliant"]["base"] == whole["pliant"]["base"]


def test_answers_that_cannot_be_kept_are_told(model, tokenizer, options, monkeypatch):
    call: Any = vars(HFLM)["_model_call"]

    def disturbed(self: Any, *args: Any, **kwargs: Any) -> Any:
        shutil.rmtree(options["output"] / "requests", ignore_errors=True)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_call", disturbed)
    with pytest.raises(DataError, match=r"model.db must take the answers to requests; writing failed"):
        measured(model, tokenizer, options)


def test_predictions_that_are_no_numbers_are_told(model, tokenizer, options):
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="log-likelihoods of task 'arc_easy' must be numbers; document 0 has nan"):
        # With a base, or perplexity, the held-out text is read first and would tell it.
        measured(model, tokenizer, options, tasks=["arc_easy"], base=False, data=None)


def test_a_model_with_too_few_positions_to_write_an_answer_is_told(model, tokenizer, options, replace_records):
    folder = options["data_dir"] / "hf_datasets/trivia_qa/rc.wikipedia.nocontext/validation"
    replace_records(folder, [{"question": "2 3", "answer": {"aliases": ["4"]}}])
    with pytest.raises(ConfigError, match=r"more than 256 positions for task 'triviaqa'.* it has 64"):
        measured(model, tokenizer, options, tasks=["triviaqa"])


def test_accuracies_are_lm_evals_own(tokenizer, options, make_base, tmp_path):
    base = make_base().eval()
    config = {**load_yaml(CONFIGS / "arc/arc_easy.yaml"), "dataset_path": "arrow", "dataset_name": None}
    config |= {"dataset_kwargs": {"data_files": {"validation": str(options["data_dir"] / ARC_FILE)}}}
    config["dataset_kwargs"]["cache_dir"] = str(tmp_path / "cache")
    for key in ("tag", "training_split", "test_split"):
        config.pop(key)
    make: Any = HFLM
    expected: Any = simple_evaluate(
        make(pretrained=base, tokenizer=tokenizer, batch_size=4),
        tasks=[ConfigurableTask(config=config)],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=1,
    )
    base.save_pretrained(tmp_path / "base")
    found = measured(pliant.load(tmp_path / "base"), tokenizer, options)
    assert found["results"]["arc_easy"] == expected["results"]["arc_easy"]
    own = [json.loads(line) for line in (options["output"] / "samples/model/arc_easy.jsonl").read_text().splitlines()]
    for mine, other in zip(own, expected["samples"]["arc_easy"], strict=True):
        assert (mine["doc_hash"], mine["prompt_hash"]) == (other["doc_hash"], other["prompt_hash"])
        assert mine["filtered_resps"] == [[str(part) for part in answer] for answer in other["filtered_resps"]]


def test_mmlu_groups_are_aggregated_over_the_drawn_questions(model, tokenizer, options, mmlu_data):
    found = measured(model, tokenizer, options, tasks=["mmlu"], data_dir=mmlu_data, limit=9, num_fewshot=1)
    own = found["pliant"]["tasks"]["mmlu"]["metrics"]["acc,none"]["model"]
    assert own["count"] == 9
    assert found["groups"]["mmlu"]["acc,none"] == pytest.approx(own["value"])


@pytest.fixture(params=["v1", "keyed", "mod", "dtf", "stt"])
def any_model(request: pytest.FixtureRequest, make_converted: Any, make_routed: Any) -> Any:
    kind = request.param
    return make_converted(kind) if kind in ("v1", "keyed") else make_routed(kind)


def requests_of(folder: Path) -> list[Any]:
    prepared = prepare("arc_easy", seed=0, data_dir=folder)
    task = prepared.tasks["arc_easy"]
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests()
    return [Instance("loglikelihood", {}, request.args, i) for i, request in enumerate(task.instances)]


def test_neither_batch_size_nor_padding_side_changes_an_answer(any_model, tokenizer, task_data):
    asked = requests_of(task_data)
    alone = [answer[0] for answer in Harness(any_model, tokenizer, 1).lm.loglikelihood(asked, disable_tqdm=True)]
    for batch_size in (4, 16):
        together = Harness(any_model, tokenizer, batch_size).lm.loglikelihood(asked, disable_tqdm=True)
        assert [answer[0] for answer in together] == pytest.approx(alone, abs=1e-4)
    assert left_padded(any_model, tokenizer, asked[:16]) == pytest.approx(alone[:16], abs=1e-4)


@torch.no_grad()
def left_padded(model: Any, tokenizer: Any, asked: list[Any]) -> list[float]:
    """Log-likelihoods from one batch that is padded on the left."""
    pairs = [
        (tokenizer(context)["input_ids"], tokenizer(text)["input_ids"]) for context, text in (r.args for r in asked)
    ]
    width = max(len(context) + len(text) for context, text in pairs)
    rows = [[0] * (width - len(context) - len(text)) + context + text for context, text in pairs]
    mask = [[0] * (width - len(context) - len(text)) + [1] * len(context + text) for context, text in pairs]
    logits = model(torch.tensor(rows), attention_mask=torch.tensor(mask)).logits.log_softmax(-1)
    return [
        sum(logits[row, width - len(text) - 1 + t, token].item() for t, token in enumerate(text))
        for row, (_, text) in enumerate(pairs)
    ]


def test_routed_layers_say_what_share_of_the_tokens_runs(make_routed, tokenizer, options):
    found = measured(make_routed("mod"), tokenizer, options, samples=False)["pliant"]
    assert found["modulation"] == {}
    assert all(0 < layer["share"] < 1 for layer in found["routing"].values())
    assert len(found["routing"]) == 2


def test_layers_are_looked_at_anew_on_another_text(model, tokenizer, options, tmp_path, monkeypatch):
    with monkeypatch.context() as embedded:
        embedded.setattr(benchmark_run, "text_tokens", lambda *_, **__: torch.arange(2, 66))
        first = measured(model, tokenizer, options, tasks=["arc_easy"], base=False, samples=False, data=None)
    found = measured(model, tokenizer, options, tasks=["perplexity"], base=False, samples=False)
    fresh = measured(model, tokenizer, options, tasks=["perplexity"], base=False, output=tmp_path / "fresh")
    assert found["pliant"]["modulation"] == fresh["pliant"]["modulation"] != first["pliant"]["modulation"]
    assert "shown" not in found["pliant"]
    assert fresh["results"] == {}


def test_without_held_out_text_tasks_are_compared_all_the_same(model, tokenizer, options, monkeypatch, caplog):
    def missing(*_arguments: Any, **_options: Any) -> None:
        raise DataError("the embedded texts are not installed")

    monkeypatch.setattr(benchmark_run, "text_tokens", missing)
    found = measured(model, tokenizer, options, tasks=["arc_easy"], data=None)
    assert found["pliant"]["held_out"] is None
    assert "compared on tasks only: the embedded texts are not installed" in caplog.text
    with pytest.raises(DataError, match="not installed"):
        measured(model, tokenizer, options)


def test_packed_weights_are_told_from_plain_ones(model):
    assert weight_format(model) == "torch.float32"
    projection = model.model.layers[0].mlp.down_proj
    projection.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert weight_format(model) == "torch.float32 Linear"
