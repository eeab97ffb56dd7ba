"""``pliant routes``: who ran where, in the terminal, as PNG, as HTML and as JSON."""

import json
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.cells import cell_len
from transformers import AutoTokenizer

import pliant
from pliant.architectures import ModConfig
from pliant.cli.routes.command import RoutedLayerTrace, Routes, rendered, told, trace
from pliant.cli.routes.pictures import draw_html, draw_png
from pliant.cli.token_grid import COLOURS, Token, strength
from pliant.models import PliantSpec, family_of
from pliant.models.graft import install

PROMPT = "A small robot walks over the green hill"
ROUTED = (1, 3)


def route(folder, to, layers):
    """Saves the model of ``folder`` with routed layers, whose thresholds let about half of a text run."""
    model = pliant.load(folder).eval()
    install(model, family_of(model.config).causal_lm, PliantSpec(architecture="mod", layers=layers))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.dynamic_layers.values():
            layer.router.weight.normal_(generator=generator)
            layer.calibrating = True
        model(torch.randint(2, model.config.vocab_size, (1, 128), generator=generator), use_cache=False)
    for layer in model.dynamic_layers.values():
        layer.calibrating = False
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    return to


@pytest.fixture(scope="module")
def routed(tiny, tmp_path_factory):
    """The tiny model with two of four layers routed; no test may write to it."""
    return route(tiny, tmp_path_factory.mktemp("routed") / "mod", dict.fromkeys(ROUTED, ModConfig()))


@pytest.fixture
def told_json(run, routed):
    """What ``--json`` says of the prompt and three new tokens."""
    return json.loads(run("routes", routed, "--prompt", PROMPT, "--new-tokens", 3, "--json").stdout)


def make(tokens=5, layers=(0, 2), num_layers=3, texts=None, threshold=0.5):
    """Routes made up: token t runs in layer i where t + i is even, its score then 1 + t above the threshold."""
    return Routes(
        tokens=[Token(id=t, text=(texts or {}).get(t, f" t{t}"), is_new=t >= tokens - 2) for t in range(tokens)],
        num_layers=num_layers,
        layers={
            index: RoutedLayerTrace(
                threshold=threshold,
                scores=[0.5 + (1 + t if (t + index) % 2 == 0 else -1) for t in range(tokens)],
                gates=[0.5] * tokens,
                runs=[(t + index) % 2 == 0 for t in range(tokens)],
            )
            for index in layers
        },
        kv_kept=0.75,
        linear_flops=0.8,
    )


def test_json_is_what_the_model_reports(told_json, routed):
    model = pliant.load(routed).eval()
    ids = torch.tensor([[token["id"] for token in told_json["tokens"]]])
    with torch.no_grad(), model.report() as report:
        model(ids, use_cache=False)
    assert list(told_json["layers"]) == [str(index) for index in ROUTED]
    for index in ROUTED:
        layer, expected = told_json["layers"][str(index)], report.layers[index].routing
        assert layer["runs"] == expected.runs[0].tolist()
        torch.testing.assert_close(torch.tensor(layer["scores"]), expected.scores[0])
        assert layer["threshold"] == pytest.approx(float(model.dynamic_layers[index].router.threshold))
        assert layer["runs"] == [True, *(score >= layer["threshold"] for score in layer["scores"][1:])]
        assert 0 < layer["share"] < 1


def test_new_tokens_are_those_of_generate(told_json, run, routed):
    generated = run("generate", routed, "--prompt", PROMPT, "--max-new-tokens", 3, "--json").stdout
    (output,) = json.loads(generated)["outputs"]
    assert [token["id"] for token in told_json["tokens"] if token["is_new"]] == output["token_ids"]
    assert "".join(token["text"] for token in told_json["tokens"] if not token["is_new"]) == PROMPT


def test_shares_count_routed_layers_alone_and_costs_all(told_json, routed):
    shares = [layer["share"] for layer in told_json["layers"].values()]
    assert told_json["share"] == pytest.approx(sum(shares) / 2)
    assert told_json["kv_kept"] == pytest.approx((sum(shares) + 2) / 4)
    routers = sum(p.numel() for _, p in pliant.load(routed).dynamic_parameters())
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert told_json["linear_flops"] == pytest.approx((sum(shares) + 2) / 4 + routers / (4 * layer))


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_part_that_is_routed_is_counted_alone(tiny, tmp_path, part):
    folder = route(tiny, tmp_path / part, {2: ModConfig(granularity=part)})
    found = trace(pliant.load(folder).eval(), PROMPT)
    saved = 1 - found.layers[2].share
    assert saved > 0
    attention, mlp = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 48
    weights = attention if part == "attention" else mlp
    assert found.kv_kept == pytest.approx(1 - (saved / 4 if part == "attention" else 0))
    assert found.linear_flops == pytest.approx(1 + (32 - saved * weights) / (4 * (attention + mlp)))


def test_a_layer_that_leaves_no_report_is_dense(routed, monkeypatch):
    model = pliant.load(routed).eval()
    monkeypatch.setattr(model.dynamic_layers[1], "_report", lambda *_: None)
    found = trace(model, PROMPT)
    assert list(found.layers) == [3]
    assert found.num_layers == 4
    assert found.kv_kept == pytest.approx((3 + found.layers[3].share) / 4)


def test_the_terminal_shows_every_layer_and_the_summary(run, routed):
    text = run("routes", routed, "--prompt", PROMPT).stdout
    lines = text.splitlines()
    assert lines[2].split() == ["1", "3"]
    assert any(line.startswith("ran, %") for line in lines)
    assert "█ ran   · skipped" in lines
    assert lines[-1].startswith("ran ")
    assert "\x1b" not in text


def test_a_prompt_file_is_one_text(run, routed, tmp_path):
    (tmp_path / "text.txt").write_text("A small\nrobot\n")
    told_of = json.loads(run("routes", routed, "--prompt-file", tmp_path / "text.txt", "--json").stdout)
    assert told_of["prompt"] == "A small\nrobot"
    assert "".join(token["text"] for token in told_of["tokens"]) == "A small\nrobot"


def test_thirty_layers_fit_eighty_columns():
    found = make(tokens=60, layers=range(30), num_layers=30, texts={0: " a very long word indeed", 1: "東京" * 9})
    lines = [line.plain for line in rendered(found, 80)]
    assert max(cell_len(line) for line in lines) <= 80
    tens, ones = lines[2].split(), lines[3].split()
    assert (len(tens), len(ones)) == (20, 30)
    assert "… and 20 more tokens" in "\n".join(lines)
    assert "t39" in lines[4 + 39]


def test_layers_that_do_not_fit_come_below():
    lines = [line.plain for line in rendered(make(layers=range(100), num_layers=100), 60)]
    assert sum(line.startswith("ran, %") for line in lines) == 2
    assert max(map(len, lines[:-1])) <= 60


def test_blocks_are_where_tokens_ran_and_coloured_by_margin():
    lines = list(rendered(make(), 80, COLOURS))
    rows = {line.plain.split()[0]: line for line in lines if line.plain.strip().startswith("t")}
    assert "█" in rows["t0"].plain
    assert "·" not in rows["t0"].plain
    assert "·" in rows["t1"].plain
    assert "█" not in rows["t1"].plain
    styles = [{span.style for span in rows[name].spans} for name in ("t0", "t4")]
    assert styles[0] == {COLOURS[1]}
    assert styles[1] == {COLOURS[-1]}


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" hill", " hill"),
        ("\n", r"'\n'"),
        ("  ", "'  '"),
        ("a\x1b[31m", r"a\x1b[31m"),
        ("\u202ea", r"\u202ea"),
        ("[red]", "[red]"),
    ],
)
def test_labels_show_what_cannot_be_seen(text, label):
    assert Token(id=0, text=text, is_new=False).label == label


def test_strength_of_a_margin():
    assert [strength(m, 2.0) for m in (-1.0, 0.0, 1.0, 5.0, float("inf"))] == [0, 0, 0.5, 1, 1]
    assert strength(float("inf"), 0.0) == 1


def test_every_token_runs_where_there_is_no_threshold(tmp_path):
    found = make(threshold=float("-inf"))
    assert found.far == 0
    assert found.to_dict()["layers"]["0"]["threshold"] is None
    assert told(found, 0, 0).endswith("score 1.5 ≥ τ −∞ · ran")
    draw_png(found, "model", tmp_path / "routes.png")
    draw_html(found, "model", tmp_path / "routes.html")
    assert "</i> ran</span>" in (tmp_path / "routes.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("tokens", [3, 90])
def test_the_png_has_a_row_a_token(tmp_path, tokens):
    draw_png(make(tokens=tokens, texts={0: "$x^2$ 東京"}), "a $model$", tmp_path / "routes.png")
    with Image.open(tmp_path / "routes.png") as picture:
        assert picture.height > 25 * tokens
        assert picture.getpixel((2, 2))[:3] == (255, 255, 255)


def test_a_long_text_still_fits_a_png(tmp_path):
    draw_png(make(tokens=2000), "model", tmp_path / "routes.png")
    with Image.open(tmp_path / "routes.png") as picture:
        assert picture.height < 2**15


class _Page(HTMLParser):
    """Collects rows, cells and everything that could reach out."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.cells, self.labels, self.links, self.scripts = [], 0, [], [], [], 0
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[name] for name in ("src", "href") if name in values]
        self.scripts += tag == "script"
        if tag == "td":
            self.cells.append(SimpleNamespace(**{"style": None, **values}, kind=values["class"]))
        if tag not in self.VOID:
            self.open.append((tag, values))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "th" and self.open[-1][1].get("scope") == "row":
            self.labels.append(data)


def test_the_page_holds_all_and_needs_nothing(run, routed, tmp_path, told_json):
    file = tmp_path / "routes.html"
    result = run("routes", routed, "--prompt", PROMPT, "--new-tokens", 3, "--output", file)
    assert "KV kept" in result.stdout
    assert str(file) in result.stderr.replace("\n", "")
    text = file.read_text(encoding="utf-8")
    page = _Page(text)
    assert not page.links
    assert "http" not in text
    assert page.scripts == 1
    assert len(page.labels) == len(told_json["tokens"])
    assert len(page.cells) == 4 * len(page.labels)
    kinds = [page.cells[layer::4] for layer in range(4)]
    assert {cell.kind for cell in kinds[0] + kinds[2]} == {"d"}
    for layer in ROUTED:
        runs = told_json["layers"][str(layer)]["runs"]
        assert [cell.kind for cell in kinds[layer]] == ["r" if ran else "s" for ran in runs]
        assert all(
            cell.title.endswith("ran" if ran else "skipped") for cell, ran in zip(kinds[layer], runs, strict=True)
        )


def test_the_page_escapes_what_it_shows(tmp_path):
    hostile = '"><script>alert(1)</script>'
    draw_html(make(texts={0: hostile}), hostile, tmp_path / "routes.html")
    page = _Page((tmp_path / "routes.html").read_text(encoding="utf-8"))
    assert page.scripts == 1
    assert page.labels[0] == hostile
    assert repr(hostile) in page.cells[0].title


def test_png_and_json_go_together(run, routed, tmp_path):
    file = tmp_path / "routes.PNG"
    told_of = json.loads(run("routes", routed, "--prompt", PROMPT, "--output", file, "--json").stdout)
    assert told_of["num_layers"] == 4
    with Image.open(file) as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "--prompt-file"),
        (("--prompt", "x", "--prompt-file", "x.txt"), 2, "give one text"),
        (("--prompt", " "), 1, "--prompt must hold some text; got ' '"),
        (("--prompt-file", "none.txt"), 1, "'none.txt' does not exist"),
        (("--prompt", "x", "--output", "x.svg"), 1, "--output must end in .png or .html; got 'x.svg'"),
        (("--prompt", "x", "--output", "no/x.png"), 1, "--output must lie in a folder that is there; 'no' is not"),
        (("--prompt", "robot " * 600), 1, "must fit the model's 512 positions"),
        (("--prompt", "x", "--new-tokens", 600), 1, "got 1 + 600 tokens"),
        (("--prompt", "x", "--new-tokens", -1), 2, "--new-tokens"),
    ],
)
def test_what_is_wrong_is_named(run, routed, options, code, message):
    assert message in " ".join(run("routes", routed, *options, exit_code=code).stderr.split())


def test_a_folder_is_no_picture(run, routed, tmp_path):
    (tmp_path / "x.png").mkdir()
    assert "must be a file" in run("routes", routed, "-p", "x", "-o", tmp_path / "x.png", exit_code=1).stderr


def test_a_model_without_routed_layers_is_an_error(run, tiny, converted):
    for model in (tiny, converted):
        error = run("routes", model, "--prompt", "x", exit_code=1).stderr
        assert "must have routed layers" in error
        assert "'pliant convert --architecture mod'" in error


def test_help_says_what_it_needs_and_leaves(run):
    text = " ".join(run("routes", "--help").stdout.split())
    assert "pliant routes outputs/mod" in text
    assert "Needs" in text
    assert "Leaves" in text
