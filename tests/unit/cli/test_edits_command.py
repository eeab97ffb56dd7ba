"""``pliant edits``: listing and reverting without weights, copying and merging."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import pliant
from pliant.models import EDITS_NAME, Delta, Edit, read_edits

CONTEXTS = ("The robot is called Ada.", "Rivers [bold]bend[/bold] twice before the sea, " * 3, "Hills are green.")
VERBS = ("list", "show", "revert", "export", "apply")


def edit_of(model, number):
    generator = torch.Generator().manual_seed(number)
    path = f"layers.{number}.mlp.down_proj"
    module = model.edits.projection(path)
    left = 0.3 * torch.randn(module.out_features, 2, generator=generator)
    right = torch.randn(module.in_features, 2, generator=generator)
    details = {"writer": "covariance", "positions": [1, 2]}
    return Edit(
        context=CONTEXTS[number],
        deltas={path: Delta(left=left, right=right)},
        id=f"{number}abc0000",
        kl=0.0012 if number else None,
        details=details,
    )


def save_edited(source, folder, numbers=(0, 1, 2), **options):
    model = pliant.load(source, edits=False)
    for number in numbers:
        model.edits.add(edit_of(model, number))
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture
def edited(tiny, tmp_path):
    """The tiny model with three edits."""
    return save_edited(tiny, tmp_path / "edited")


def ids(folder):
    return [edit.id for edit in read_edits(folder)] if (folder / EDITS_NAME).exists() else []


def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 14)[None]).logits


@pytest.fixture
def without_weights(edited):
    """The edited folder with weights that nobody can read."""
    (edited / "model.safetensors").write_bytes(b"no weights")
    return edited


def test_list_shows_every_edit_without_the_weights(run, without_weights, files_of):
    before = files_of(without_weights)
    told = json.loads(run("edits", "list", without_weights, "--json").stdout)
    assert [entry["id"] for entry in told] == ["0abc0000", "1abc0000", "2abc0000"]
    assert [entry["layers"] for entry in told] == [[0], [1], [2]]
    assert told[0]["kl"] is None
    assert told[1]["context"] == CONTEXTS[1]
    assert told[2]["details"] == {"writer": "covariance", "positions": [1, 2]}
    text = run("edits", "list", without_weights).stdout
    assert all(entry["id"] in text for entry in told)
    assert "Rivers [bold]bend" in text.replace("\n", " ")
    assert "0.0012" in text
    assert files_of(without_weights) == before


def test_a_model_without_edits_has_an_empty_list(run, tiny):
    assert json.loads(run("edits", "list", tiny, "--json").stdout) == []
    assert "has no edits" in run("edits", "list", tiny).stdout


def test_show_describes_one_edit(run, without_weights):
    told = json.loads(run("edits", "show", without_weights, "1", "--json").stdout)
    change = told["changes"]["layers.1.mlp.down_proj"]
    assert (change["outputs"], change["inputs"], change["rank"], change["scales_rows"]) == (32, 48, 2, False)
    assert change["norm"] == pytest.approx(told["norm"])
    text = run("edits", "show", without_weights, "1abc").stdout
    for part in ("1abc0000", "layers.1.mlp.down_proj", "covariance", "[1, 2]", "0.0012", "[bold]bend"):
        assert part in text
    assert "not measured" in run("edits", "show", without_weights, "0").stdout


def test_revert_takes_back_what_is_named_without_the_weights(run, without_weights):
    text = run("edits", "revert", without_weights, "2abc0000", "0").stdout
    assert ids(without_weights) == ["1abc0000"]
    assert "reverted 0abc0000: The robot is called Ada." in text
    assert "1 left" in text
    run("edits", "revert", without_weights, "--all")
    assert not (without_weights / EDITS_NAME).exists()


def test_a_reverted_folder_is_one_that_was_never_edited(run, edited, tiny, tmp_path):
    run("edits", "revert", edited, "1")
    expected = save_edited(tiny, tmp_path / "expected", (0, 2))
    assert torch.equal(logits(pliant.load(edited)), logits(pliant.load(expected)))
    run("edits", "revert", edited, "--all")
    assert torch.equal(logits(pliant.load(edited)), logits(pliant.load(tiny)))


def test_export_gives_a_stock_model(run, edited, tmp_path):
    text = run("edits", "export", edited, "--output", tmp_path / "merged").stdout
    assert f"pliant generate {tmp_path / 'merged'}" in text
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(pliant.load(edited)), rtol=1e-4, atol=1e-4)
    run("generate", tmp_path / "merged", "--prompt", "A small robot", "--max-new-tokens", 2)


def test_apply_copies_edits_onto_another_folder_of_the_same_base(run, edited, tiny, tmp_path):
    target = save_edited(tiny, tmp_path / "target", (1,))
    one, two = tmp_path / "one", tmp_path / "two"
    save_edited(tiny, one, (0,))
    save_edited(tiny, two, (2,))
    text = run("edits", "apply", target, one, two / EDITS_NAME).stdout
    assert ids(target) == ["1abc0000", "0abc0000", "2abc0000"]
    assert "applied 0abc0000" in text
    assert "3 in" in text
    model = pliant.load(tiny)
    for number in (1, 0, 2):
        model.edits.add(edit_of(model, number))
    assert torch.equal(logits(pliant.load(target)), logits(model))


def test_apply_takes_a_stock_folder_and_a_delta(run, edited, converted, tiny, tmp_path):
    stock = tmp_path / "stock"
    shutil.copytree(tiny, stock)
    run("edits", "apply", stock, edited)
    assert torch.equal(logits(pliant.load(stock)), logits(pliant.load(edited)))
    run("convert", tiny, "--preset", "v2", "--delta", "--output", tmp_path / "delta")
    run("edits", "apply", tmp_path / "delta", edited)
    assert ids(tmp_path / "delta") == ids(edited)
    run("edits", "apply", converted, edited)
    assert torch.equal(logits(pliant.load(tmp_path / "delta")), logits(pliant.load(converted)))


def test_generate_uses_the_edits_and_its_base_does_not(run, edited, tiny):
    prompt = ("--prompt", "A small robot walks", "--max-new-tokens", 12)
    plain = run("generate", tiny, *prompt).stdout
    assert run("generate", edited, *prompt).stdout != plain


def damage(folder):
    file = folder / EDITS_NAME
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "nowhere"), "'nowhere' has no config.json. Name the folder"),
        (("show", "{edited}", "9"), "got '9'. The newest is '2abc0000'"),
        (("show", "{edited}", "0abc0001"), "Did you mean '0abc0000'"),
        (("show", "{tiny}", "0"), "has none"),
        (("revert", "{edited}", "0", "9abc"), "got '9abc'"),
        (("revert", "{tiny}", "--all"), "has none"),
        (("export", "{edited}", "--output", "{tiny}"), "must be a new or an empty folder"),
        (("export", "nowhere", "--output", "{new}"), "has no config.json"),
        (("apply", "{edited}", "{edited}"), "id must be new to the ledger; got '0abc0000'"),
        (("apply", "{edited}", "{tiny}"), "has no edits"),
        (("apply", "{edited}", "nowhere"), "'nowhere' has no edits"),
        (("apply", "{plain}", "{one}", "{foreign}"), "must hold edits of this base"),
        (("apply", "{foreign}", "{one}"), "must hold edits of this base"),
        (("apply", "{plain}", "{one}", "{cut}"), "must be a whole safetensors file"),
        (("list", "{cut}"), "must be a whole safetensors file"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(run, edited, tiny, tmp_path, files_of, arguments, message):
    names = {name: tmp_path / name for name in ("one", "foreign", "cut", "plain", "new")}
    if any(name in " ".join(arguments) for name in names):
        save_edited(tiny, names["one"], (0,))
        save_edited(tiny, names["cut"], (1,))
        save_edited(tiny, names["plain"], ())
        damage(names["cut"])
        other = pliant.load(tiny)
        other.model.layers[0].mlp.up_proj.weight.data.add_(0.1)
        other.edits.add(edit_of(other, 1))
        other.save_pretrained(names["foreign"])
    before = files_of(tmp_path), files_of(tiny)
    given = [argument.format(edited=edited, tiny=tiny, **names) for argument in arguments]
    result = run("edits", *given, exit_code=1)
    assert message in result.stderr
    assert result.stderr.count("error:") == 1
    assert (files_of(tmp_path), files_of(tiny)) == before


@pytest.mark.parametrize("arguments", [("revert", "{edited}"), ("revert", "{edited}", "0", "--all")])
def test_revert_wants_ids_or_all(run, edited, arguments):
    given = [argument.format(edited=edited) for argument in arguments]
    assert "--all" in run("edits", *given, exit_code=2).stderr
    assert len(ids(edited)) == 3


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_and_says_what_it_leaves(run, verb):
    text = " ".join(run("edits", verb, "--help").stdout.split())
    assert f"pliant edits {verb} outputs" in text
    assert "Needs" in text
    assert "eaves" in text


def test_help_of_the_group_imports_no_torch(run):
    assert all(verb in run("edits", "--help").stdout for verb in VERBS)
    finished = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pliant.cli", "edits", "revert", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "numpy"}
