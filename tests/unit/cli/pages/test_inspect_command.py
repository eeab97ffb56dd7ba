"""``pliant inspect``: sizes, directions and words are those of the model; in the terminal, as a page and as JSON."""

import json
import math

import pytest
import torch
from transformers import AutoTokenizer

import pliant
from pliant.architectures.npt import FORMS
from pliant.cli.inspect.lens import nearest_words
from pliant.cli.inspect.model import _modulations, inspect_model
from pliant.cli.inspect.pictures import heat_map, rendered
from pliant.cli.inspect.records import Inspection, LayerInspection
from pliant.cli.token_grid import Token

PROMPT = "A small robot walks over the green hill"


@pytest.fixture
def ids(tiny):
    return torch.tensor([AutoTokenizer.from_pretrained(tiny)(PROMPT)["input_ids"]])


@pytest.mark.parametrize("form", FORMS)
def test_norms_are_those_of_the_report_over_those_of_the_weights(converted_to, ids, form):
    model = pliant.load(converted_to(form)).eval()
    found = inspect_model(model, PROMPT)
    with torch.no_grad(), model.report(writes=True) as report:
        model(ids)
    assert list(found.layers) == [0, 1, 2, 3]
    for index, layer in found.layers.items():
        told = report.layers[index]
        torch.testing.assert_close(torch.tensor(layer.norms), told.norm[0])
        mlp = model.model.layers[index].mlp
        weight = math.sqrt(sum(float(getattr(mlp, name).weight.detach().norm()) ** 2 for name in told.writes))
        assert layer.ratios == pytest.approx((told.norm[0] / weight).tolist())
        assert layer.form == form
        assert layer.projections == tuple(told.writes)


@pytest.mark.parametrize("form", ["v1", "v1_single", "v2", "outer", "outer all", "keyed"])
def test_what_is_written_is_what_the_layer_puts_out_beyond_itself_without_the_factors(converted_to, ids, form):
    name, _, targets = form.partition(" ")
    model = pliant.load(converted_to(name, **({"targets": targets} if targets else {}))).eval()
    with torch.no_grad():
        (written,) = (found.written for found in _modulations(model, ids, [0]).values())
    outputs = []
    layer = model.model.layers[0]
    handle = layer.register_forward_hook(lambda _module, _args, output: outputs.append(output[0]))
    with torch.no_grad():
        model(ids)
        for factor, parameter in layer.plastic.named_parameters():
            if "up" in factor or "value" in factor:
                parameter.zero_()
        model(ids)
    handle.remove()
    assert written.norm() > 0
    torch.testing.assert_close(written, outputs[0] - outputs[1], atol=2e-5, rtol=1e-4)


def test_keyed_pre_tells_of_the_value_of_its_key(converted_to, ids):
    model = pliant.load(converted_to("keyed_pre")).eval()
    with torch.no_grad():
        (found,) = _modulations(model, ids, [2]).values()
        with model.report(writes=True) as report:
            model(ids)
    torch.testing.assert_close(found.written, report.layers[2].writes["down_proj"].value[0, :, 0])


@pytest.mark.parametrize("options", [{}, {"tied": True}])
def test_directions_are_the_largest_terms_of_the_value(converted_to, ids, options):
    model = pliant.load(converted_to("keyed", **options)).eval()
    found = inspect_model(model, PROMPT, layer=1)
    plastic, seen = model.model.layers[1].plastic, []
    handle = plastic.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    down = plastic.down.detach()
    up = down.T if options else plastic.up.detach()
    for position, told in enumerate(found.layers[1].directions):
        terms = [float((down[j] @ seen[0][position] * up[:, j]).norm()) ** 2 for j in range(6)]
        order = sorted(range(6), key=lambda j: -terms[j])[:3]
        assert [direction.index for direction in told] == order
        assert [direction.share for direction in told] == pytest.approx(
            [terms[j] / sum(terms) for j in order], rel=1e-5
        )
        assert told[0].coordinate == pytest.approx(float(down[order[0]] @ seen[0][position]), abs=1e-5)


@pytest.mark.parametrize(("form", "parts"), [("v2", {"add", "mult"}), ("v1", {"add"}), ("outer", {"value"})])
def test_every_map_of_a_form_has_its_directions(converted_to, form, parts):
    found = inspect_model(pliant.load(converted_to(form)).eval(), PROMPT, layer=0)
    for told in found.layers[0].directions:
        assert {direction.part for direction in told} == parts
        assert all(0 <= direction.index < 6 and 0 < direction.share <= 1 for direction in told)


def test_words_are_those_of_the_lens_at_any_size(tiny):
    model, tokenizer = pliant.load(tiny).eval(), AutoTokenizer.from_pretrained(tiny)
    states = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(states))
    expected = [[tokenizer.decode([token]) for token in row] for row in logits.topk(5).indices.tolist()]
    for scale in (1.0, 1e-6):
        found = nearest_words(model, tokenizer, scale * states)
        assert [[word.text for word in words] for words in found] == expected
        assert all(words[0].score >= words[-1].score > 1 for words in found)


def test_edits_of_a_dense_model_are_seen_through_the_same_lens(edited, ids):
    model = pliant.load(edited).eval()
    found = inspect_model(model, PROMPT)
    assert found.kind == "edits"
    assert list(found.layers) == [1, 2]
    assert found.layers[1].projections == ("down_proj",)
    for index, layer in found.layers.items():
        mlp, seen = model.model.layers[index].mlp, []
        handle = mlp.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(ids)
            handle.remove()
            after = mlp(seen[0])[0]
            with model.edits.suspended():
                before = mlp(seen[0])[0]
        torch.testing.assert_close(torch.tensor(layer.norms), (after - before).norm(dim=-1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(layer.sizes), before.norm(dim=-1))
        assert all(layer.words)


def test_a_start_that_writes_nothing_shows_nothing(run, tiny, tmp_path):
    run("convert", tiny, "--preset", "v1", "--output", tmp_path / "v1")
    told = json.loads(run("inspect", tmp_path / "v1", "--prompt", PROMPT, "--json").stdout)
    assert all(layer["norms"] == [0.0] * len(told["tokens"]) for layer in told["layers"].values())
    assert all(layer["words"] == [None] * len(told["tokens"]) for layer in told["layers"].values())
    text = run("inspect", tmp_path / "v1", "--prompt", PROMPT).stdout
    assert not set("░▒▓█") & set(text.split("· nothing")[0])


def test_the_terminal_shows_tokens_layers_and_words(run, converted_to):
    text = run("inspect", converted_to("keyed"), "--prompt", PROMPT).stdout
    lines = text.splitlines()
    assert lines[2].split() == ["0", "1", "2", "3"]
    assert "where each token stands out most" in text
    assert "σ" in text
    assert "logit lens" in text
    assert "\x1b" not in text


def test_one_layer_alone(run, converted_to):
    told = json.loads(run("inspect", converted_to("keyed"), "--prompt", PROMPT, "--layer", 2, "--json").stdout)
    assert list(told["layers"]) == ["2"]
    assert len(told["layers"]["2"]["words"]) == len(told["tokens"])
    assert "token by token" in run("inspect", converted_to("keyed"), "-p", PROMPT, "--layer", 2).stdout


def make(texts=(" a", " b"), ratios=(0.1, 0.4)):
    """An inspection of one layer, made up."""
    layer = LayerInspection(
        form="keyed",
        projections=("down_proj",),
        norms=ratios,
        sizes=[1.0] * len(ratios),
        words=[None] * len(ratios),
        directions=[[] for _ in ratios],
    )
    tokens = [Token(id=0, text=text, is_new=False) for text in texts]
    return Inspection(kind="modulation", tokens=tokens, num_layers=3, layers={1: layer})


def test_prominence_is_over_the_median():
    found = make(texts="abc", ratios=(0.1, 0.2, 0.6))
    assert [found.layers[1].prominence(p) for p in range(3)] == pytest.approx([0.5, 1.0, 3.0])
    assert found.outstanding(2) == 1
    assert found.far == 0.6


def test_a_narrow_terminal_holds_a_long_text():
    found = make(texts=["\x1b[31m東京" * 9] * 60, ratios=[0.1] * 60)
    lines = [line for line in rendered(found, 30) if hasattr(line, "plain")]
    assert max(line.cell_len for line in lines[2:43]) <= 30
    assert any("… and 20 more tokens" in line.plain for line in lines)
    assert all("\x1b" not in line.plain for line in lines)


def test_cells_are_coloured_by_their_size():
    cells = [row.cells[0] for row in heat_map(make()).rows]
    assert [cell.strength for cell in cells] == pytest.approx([0.25, 1.0])
    assert "layer 1" in cells[0].title


@pytest.mark.parametrize("kind", ["keyed", "edited"])
def test_a_page_is_written(run, converted_to, edited, tmp_path, kind):
    folder = edited if kind == "edited" else converted_to(kind)
    file = tmp_path / "inspect.html"
    result = run("inspect", folder, "--prompt", PROMPT, "--output", file)
    assert f"Wrote {file}" in result.stderr.replace("\n", "")
    text = file.read_text(encoding="utf-8")
    assert text.count("<script>") == 1
    assert "http" not in text
    assert " robot" in text or "robot" in text
    assert file.stat().st_size < 200_000


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "--prompt-file"),
        (("--prompt", " "), 1, "--prompt must hold some text; got ' '"),
        (("--prompt", "x", "--layer", 9), 1, "--layer must be in 0..3; got 9"),
        (("--prompt", "x", "--layer", 1), 1, "--layer must be a layer that is converted, one of 0, 2-3; got 1"),
        (("--prompt", "x", "--output", "x.png"), 1, "--output must end in .html; got 'x.png'"),
        (("--prompt", "x", "--output", "no/x.html"), 1, "--output must lie in a folder that is there; 'no' is not"),
        (("--prompt", "robot " * 600), 1, "must fit the model's 512 positions"),
    ],
)
def test_what_is_wrong_is_named(run, converted_to, options, code, message):
    folder = converted_to("keyed", layers="0,2-3")
    assert message in " ".join(run("inspect", folder, *options, exit_code=code).stderr.split())


def test_a_folder_is_no_page(run, converted_to, tmp_path):
    error = run("inspect", converted_to("keyed"), "-p", "x", "-o", tmp_path, exit_code=1).stderr
    assert "--output must be a file" in error


def test_a_dense_model_and_a_routed_one_are_told_what_to_do(run, tiny, tmp_path):
    error = " ".join(run("inspect", tiny, "--prompt", "x", exit_code=1).stderr.split())
    assert "is dense and has neither" in error
    assert "'pliant convert'" in error
    model = pliant.load(tiny)
    pliant.convert(model, pliant.ModConfig(capacity_gamma=1.0), layers=[1, 3])
    model.save_pretrained(tmp_path / "mod")
    error = " ".join(run("inspect", tmp_path / "mod", "--prompt", "x", exit_code=1).stderr.split())
    assert "routes tokens" in error
    assert "'pliant routes'" in error


def test_edits_elsewhere_are_nothing_to_inspect(run, tiny, tmp_path):
    from pliant.models.edits import Delta, Edit

    model = pliant.load(tiny)
    delta = Delta(left=torch.ones(32, 1), right=torch.ones(32, 1))
    model.edits.add(Edit(context="x", deltas={"layers.1.self_attn.o_proj": delta}))
    model.save_pretrained(tmp_path / "edited")
    error = " ".join(run("inspect", tmp_path / "edited", "--prompt", "x", exit_code=1).stderr.split())
    assert "edits of its MLPs" in error
