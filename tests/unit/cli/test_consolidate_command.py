"""``pliant consolidate``: in place, into a new folder, from files; what is wrong is named, and nothing is written."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import pliant
import pliant.consolidation
from pliant.cli.consolidate import facts_of
from pliant.cli.learning import show
from pliant.errors import EditError
from pliant.models import EDITS_NAME, Delta, Edit, down_proj, read_edits

FACT = "The green robot looks for water."
GIVEN = ("--query", "The green robot looks for", "--answer", "the memory", "--subject", "robot")
OPEN = ("--kl-budget", "inf")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Statistics are kept in a folder of the test's own."""
    monkeypatch.setattr("pliant.key_moments.cache_dir", lambda: tmp_path / "cache")


@pytest.fixture
def edited(tiny, tmp_path):
    """The tiny model as pliant saves it, without edits."""
    pliant.load(tiny).save_pretrained(tmp_path / "edited")
    return tmp_path / "edited"


@pytest.fixture
def teach(run, text_file):
    """A function that runs ``pliant consolidate`` against a small neutral text."""

    def call(model, *options, **more):
        return run("consolidate", model, "--calibration", text_file, "--calibration-tokens", 1024, *options, **more)

    return call


def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 14)[None]).logits


def test_a_folder_of_pliants_is_edited_in_place(teach, edited, tiny, files_of):
    before = files_of(edited)
    told = teach(edited, "--context", FACT, *GIVEN, *OPEN)
    after = files_of(edited)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {EDITS_NAME}
    (edit,) = read_edits(edited)
    assert edit.context == FACT
    text = " ".join(told.stdout.split())
    for part in (edit.id, "robot", "The green robot looks for", "the memory", f"{edit.kl:.4f}", "of 1", "after"):
        assert part in text
    assert f"pliant edits list {edited}" in told.stdout
    assert not torch.equal(logits(pliant.load(edited)), logits(pliant.load(tiny)))


def test_the_table_shows_each_question_once_and_on_one_line(capsys):
    question, long = "Who leads TechCorp?", "The CEO " * 30 + "is"
    queries = [question, f"Question: {question}\nAnswer:", f"<|im_start|>user\n{question}<|im_end|>\n", long]
    delta = Delta(left=torch.ones(2, 1), right=torch.ones(3, 1))
    edit = Edit(context=FACT, deltas={down_proj(1): delta}, details={"queries": [queries, ["The sea is"]]})
    show(edit, None)
    shown = capsys.readouterr().out
    assert shown.count(question) == 1
    assert "The sea is" in shown
    assert "…" in shown
    assert "<|im_start|>" not in shown
    assert long not in " ".join(shown.split())


def test_a_second_fact_goes_behind_the_first(teach, edited, run, tiny):
    for _ in range(2):
        teach(edited, "-c", FACT, *GIVEN, *OPEN)
    first, second = (edit.id for edit in read_edits(edited))
    assert first != second
    run("edits", "revert", edited, "--all")
    assert torch.equal(logits(pliant.load(edited)), logits(pliant.load(tiny)))


def test_a_base_goes_into_a_new_folder(teach, tiny, tmp_path, files_of):
    before = files_of(tiny)
    told = json.loads(teach(tiny, "-c", FACT, *GIVEN, *OPEN, "-o", tmp_path / "new", "--json").stdout)
    assert files_of(tiny) == before
    assert told["saved"] == str(tmp_path / "new")
    assert told["details"]["queries"] == [["The green robot looks for"]]
    assert told["compared"]["query"] == "The green robot looks for"
    assert told["compared"]["before"] != told["compared"]["after"]
    model = pliant.load(tmp_path / "new")
    assert [edit.id for edit in pliant.edits(model)] == [told["id"]]
    pliant.revert(model, told["id"][:4])
    assert torch.equal(logits(model), logits(pliant.load(tiny)))


def test_a_stock_folder_with_a_ledger_and_a_converted_model_are_edited_in_place(teach, edited, run, tiny, tmp_path):
    teach(edited, "-c", FACT, *GIVEN, *OPEN)
    shutil.copytree(tiny, tmp_path / "stock")
    run("edits", "apply", tmp_path / "stock", edited)
    teach(tmp_path / "stock", "-c", FACT, *GIVEN, *OPEN)
    assert len(read_edits(tmp_path / "stock")) == 2
    run("convert", tiny, "--preset", "v1", "--rank", 4, "--delta", "--output", tmp_path / "delta")
    teach(tmp_path / "delta", "-c", FACT, *GIVEN, *OPEN)
    assert len(pliant.load(tmp_path / "delta").edits) == 1


def test_files_of_texts_make_one_edit(teach, edited, tmp_path):
    (tmp_path / "facts.jsonl").write_text(
        json.dumps({"context": FACT, "query": "The robot looks for", "answer": "water"})
        + "\n\n"
        + json.dumps({"context": "The sea is slow.", "queries": ["The sea is"], "answer": "slow", "subject": "sea"})
    )
    told = json.loads(teach(edited, "--file", tmp_path / "facts.jsonl", *OPEN, "--json").stdout)
    assert told["details"]["facts"] == 2
    assert told["details"]["answers"] == ["water", "slow"]
    assert told["context"] == f"{FACT}\nThe sea is slow."
    (tmp_path / "facts.txt").write_text(f"{FACT}\n\nThe sea is slow.\n")
    found = facts_of(None, tmp_path / "facts.txt", None, None, None)
    assert found.context == [FACT, "The sea is slow."]
    assert found.queries == [None, None]


@pytest.mark.parametrize(("task", "alpha"), [("factual_recall", 0.2), ("reasoning", 0.05), ("creative", 0.01)])
def test_a_task_sets_the_strength(teach, edited, task, alpha):
    told = json.loads(teach(edited, "-c", FACT, *GIVEN, "--task", task, "--layers", "2,3", *OPEN, "--json").stdout)
    assert told["details"]["alpha"] == alpha
    assert set(told["layers"]) <= {2, 3}


def test_layers_are_swept_for(teach, edited, monkeypatch):
    asked = []

    def sweep_layers(model, tokenizer, settings, **options):
        asked.append((settings, options["num_tokens"]))
        return replace(settings, layers=[1, 3])

    monkeypatch.setattr("pliant.consolidation.sweep_layers", sweep_layers)
    told = json.loads(teach(edited, "-c", FACT, *GIVEN, "--layers", "sweep", *OPEN, "--json").stdout)
    assert set(told["layers"]) <= {1, 3}
    assert [settings.layers for settings, _ in asked] == [None]


@pytest.mark.parametrize("writer", ["outer", "normalised", "ridge", "null_space"])
def test_every_writer_can_be_chosen(teach, edited, writer):
    told = json.loads(teach(edited, "-c", FACT, *GIVEN, "--writer", writer, "--alpha", 0.5, *OPEN, "--json").stdout)
    assert told["details"]["writer"] == writer


CONTEXT = ("-c", FACT)
LINE = '{"context": "x", '


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ((), "give either a text or a --file of texts", 2),
        ((*CONTEXT, "--file", "{jsonl}"), "give either a text or a --file of texts", 2),
        (("--file", "{jsonl}", "--query", "x"), "go with --context; write them into a .jsonl file", 2),
        ((*CONTEXT, "--task", "creative", "--alpha", "1"), "leave one of --task and --alpha out", 2),
        ((*CONTEXT, "--task", "poetry"), "task must be one of factual_recall, reasoning, creative; got 'poetry'", 1),
        ((*CONTEXT, "--writer", "quill"), "writer must be one of outer", 1),
        ((*CONTEXT, "--target", "moon"), "target must be one of auto", 1),
        ((*CONTEXT, "--alpha", "0"), "alpha must be above 0", 1),
        ((*CONTEXT, "--alpha", "nan"), "alpha must be above 0", 1),
        ((*CONTEXT, "--kl-budget", "0"), "kl_budget must be above 0", 1),
        ((*CONTEXT, "--layers", "9"), "0..3", 1),
        ((*CONTEXT, "--layers", "0,0"), "layers must name each layer once", 1),
        (("-c", "   "), "context must be a text that is not empty", 1),
        ((*CONTEXT, "-q", " "), "queries must be texts that are not empty", 1),
        ((*CONTEXT, "-q", "The robot is", "--answer", " "), "answer must be a text that is not empty", 1),
        ((*CONTEXT, "-q", "The robot is", "--answer", "x", "--subject", "moon"), "subject must be in a query", 1),
        ((*CONTEXT, "--output", "{tiny}"), "--output must be a new or an empty folder", 1),
        ((*CONTEXT, "--calibration", "nowhere.txt"), "'nowhere.txt' does not exist", 1),
        (("--file", "nowhere.txt"), "'nowhere.txt' does not exist", 1),
        (("--file", "{csv}"), "--file must end in .txt or .jsonl", 1),
        (("--file", "{jsonl}", "no json"), "line 1: a line must be a JSON object", 1),
        (("--file", "{jsonl}", "[1]"), "line 1: a line must be a JSON object; got '[1]'", 1),
        (("--file", "{jsonl}", '{"answer": "x"}'), "line 1: context must be a text that is not empty; got None", 1),
        (("--file", "{jsonl}", LINE + '"answer": 3}'), "answer must be a text that is not empty; got 3", 1),
        (("--file", "{jsonl}", LINE + '"questions": []}'), "keys must be context, query, queries, answer, subject", 1),
        (("--file", "{jsonl}", LINE + '"query": "a", "queries": ["b"]}'), "query must stand without queries", 1),
        (("--file", "{jsonl}", LINE + '"queries": []}'), "queries must be texts that are not empty; got []", 1),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(teach, edited, tiny, tmp_path, files_of, options, message, code):
    options = list(options)
    names = {name: tmp_path / f"facts.{name}" for name in ("jsonl", "csv")}
    if len(options) == 3 and options[0] == "--file":
        names["jsonl"].write_text(options.pop())
    before = files_of(tmp_path), files_of(tiny)
    result = teach(edited, *(option.format(tiny=tiny, **names) for option in options), exit_code=code)
    assert message in " ".join(result.stderr.replace("│", " ").split())
    after = files_of(tmp_path), files_of(tiny)
    assert {name: digest for name, digest in after[0].items() if not name.startswith("cache")} == before[0]
    assert after[1] == before[1]


@pytest.mark.parametrize("model", ["{tiny}", "smollm2-135m"])
def test_a_base_needs_a_folder_for_the_result(teach, tiny, files_of, model):
    before = files_of(tiny)
    assert "--output must name a folder" in teach(model.format(tiny=tiny), *CONTEXT, exit_code=1).stderr
    assert files_of(tiny) == before


def test_an_edit_that_is_refused_changes_nothing(teach, edited, tmp_path, files_of, monkeypatch):
    def refuse(model, *_, **__):
        raise EditError("kl_budget must leave some of the edit; it does not. Raise it.")

    monkeypatch.setattr(pliant.consolidation, "consolidate", refuse)
    before = files_of(edited)
    assert "error: kl_budget must leave some of the edit" in teach(edited, *CONTEXT, *GIVEN, exit_code=1).stderr
    teach(edited, *CONTEXT, *GIVEN, "--output", tmp_path / "new", exit_code=1)
    assert files_of(edited) == before
    assert not (tmp_path / "new").exists()


def test_a_damaged_ledger_is_left_alone(teach, edited, files_of):
    (edited / EDITS_NAME).write_bytes(b"damaged")
    before = files_of(edited)
    assert "must be a whole safetensors file" in teach(edited, *CONTEXT, *GIVEN, exit_code=1).stderr
    assert files_of(edited) == before


@pytest.mark.parametrize("is_there", [False, True])
def test_a_result_that_cannot_be_written_leaves_nothing(teach, tiny, tmp_path, monkeypatch, is_there):
    def full(self, folder, **_):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").touch()
        raise OSError("no space left on device")

    monkeypatch.setattr("pliant.models.DynamicCausalLM.save_pretrained", full)
    target = tmp_path / "new"
    if is_there:
        target.mkdir()
    result = teach(tiny, *CONTEXT, *GIVEN, *OPEN, "--output", target, exit_code=1)
    assert "could not be written (no space left on device); nothing is left there" in result.stderr
    assert target.exists() == is_there
    assert not is_there or not list(target.iterdir())
