"""``pliant report``: a page from any mix of folders, that holds their figures, runs nothing and breaks nothing."""

import json
import logging
import re
from html.parser import HTMLParser

import pytest
import torch
from transformers import AutoTokenizer

import pliant
from pliant.cli.page import Chart, Series, Table, write_page
from pliant.cli.page.blocks import Number, Section, told_number
from pliant.cli.page.charts import MOST_POINTS, thinned
from pliant.cli.report.models import spectra
from pliant.cli.report.sources import Kind, read_sources
from pliant.errors import ConfigError, DataError

PROMPT = "A small robot"
HOSTILE = '"><script>alert(1)</script>'


class _Page(HTMLParser):
    """Collects headings, charts, cells, texts and everything that could reach out; elements must be closed."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.scripts, self.charts = [], [], 0, []
        self.texts = {"h1": [], "h2": [], "h3": [], "th": [], "td": [], "p": [], "b": []}
        self.marks = 0
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[name] for name in ("src", "href", "srcset", "action") if name in values]
        self.scripts += tag == "script"
        self.marks += tag == "td" and "title" in values
        if "data-chart" in values:
            self.charts.append(json.loads(values["data-chart"]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in reversed(self.open):
            if tag in self.texts:
                self.texts[tag].append(data)
                break

    def chart(self, **wanted):
        return next(chart for chart in self.charts if wanted.items() <= chart.items())


@pytest.fixture
def page(run, tmp_path):
    """A function that writes a report and reads the page."""

    def make(*arguments):
        file = tmp_path / "report.html"
        run("report", *arguments, "--output", file)
        text = file.read_text(encoding="utf-8")
        found = _Page(text)
        assert found.scripts == 1
        assert not found.links
        assert "http" not in text
        assert file.stat().st_size < 5_000_000
        return found

    return make


def test_everything_at_once(page, folders):
    found = page(*folders.values())
    assert found.texts["h1"] == ["6 runs"]
    assert found.texts["h2"] == ["Overview", "Demo", "Training", "Benchmarks", "Comparison", "Editing"]
    assert HOSTILE in "".join(found.texts["p"])


def test_runs_are_laid_over_each_other(page, folders):
    found = page(folders["fast"], folders["slow"])
    assert found.texts["h2"] == ["Overview", "Training"]
    loss = found.chart(y="what training minimises")
    assert [series["name"] for series in loss["series"]] == ["fast", "slow"]
    assert loss["series"][0]["x"] == list(range(1, 21))
    assert loss["series"][0]["y"][:2] == pytest.approx([1.0, 0.6])
    kl = found.chart(y="nats a token")
    assert [series["name"] for series in kl["series"]] == [
        f"{run}, {kind}" for run in ("fast", "slow") for kind in ("training", "validation")
    ]
    assert [series.get("dashed", False) for series in kl["series"]] == [True, False] * 2
    assert [series["colour"] for series in kl["series"]] == [0, 0, 1, 1]
    layers = found.chart(y="‖ΔW_t‖, mean of the tokens")
    assert layers["series"][0]["y"] == pytest.approx([0.1 * (i + 20) for i in range(4)])
    assert "training.lr" in found.texts["th"]
    assert "Settings (1 differ, which come first)" in found.texts["h3"]


def test_a_run_alone_shows_where_it_began_and_ended(page, folders):
    found = page(folders["fast"])
    assert found.texts["h1"] == ["fast"]
    layers = found.chart(y="‖ΔW_t‖, mean of the tokens")
    assert [series["name"] for series in layers["series"]] == ["step 0", "step 20"]
    assert "1.2000 → 1.0049" in found.texts["td"]
    assert "20" in found.texts["b"]


def test_the_demo_shows_its_rows_and_the_run_in_it(page, folders):
    found = page(folders["demo"])
    assert "keyed, rank 8" in found.texts["th"]
    ranks = found.chart(x="rank of the keyed memory")
    assert ranks["series"][0]["x"] == [8, 16, 32]
    assert found.chart(ramp=True)["series"][3]["y"] == [0.5, 0.6, 1.0]
    assert "Training" in found.texts["h2"]
    assert "A fact learned for good: A fact." in found.texts["h3"]


def test_tasks_show_differences_to_the_base(page, folders):
    found = page(folders["tasks"])
    drawn = found.chart(kind="intervals")
    (series,) = drawn["series"]
    assert drawn["reference"] == [0.0, "the base"]
    assert (series["labels"], series["x"]) == (["piqa", "sciq"], [-0.1, 0.02])
    assert series["low"] == pytest.approx([-0.15, -0.03])
    assert "[−0.150, −0.050]" in found.texts["td"]
    assert found.chart(y="‖ΔW_t‖ ÷ ‖W‖")["series"][0]["y"] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert "1.07" in found.texts["b"]


def test_results_of_lm_eval_itself_have_intervals_too(page, tmp_path):
    results = {"results": {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.6}}}
    (tmp_path / "mine.json").write_text(json.dumps(results), encoding="utf-8")
    found = page(tmp_path / "mine.json")
    (series,) = found.chart(kind="intervals")["series"]
    assert (series["x"], series["labels"]) == ([0.6], ["arc"])
    assert "0.500" in found.texts["td"]


def test_comparisons_show_quality_over_cost(page, folders):
    found = page(folders["comparison"])
    size = found.chart(x="trainable parameters")
    assert [(series["name"], series["x"], series["y"]) for series in size["series"]] == [
        ("v1", [1000], [1.9]),
        ("lora", [2000], [1.8]),
    ]
    assert not size["logX"]
    assert size["reference"] is None
    assert len([chart for chart in found.charts if chart["kind"] == "scatter"]) == 3
    assert "recall, correct" in found.texts["th"]
    assert any("stopped by SIGINT" in text for text in found.texts["p"])


def test_seeds_that_diverged_are_counted(page, folders, tmp_path):
    record = json.loads((folders["comparison"] / "comparison.json").read_text())
    assert "not every seed" not in " ".join(page(folders["comparison"]).texts["p"])
    record["summary"]["v1"] |= {"seeds": 2, "failed": 1}
    (tmp_path / "comparison.json").write_text(json.dumps(record), encoding="utf-8")
    found = page(tmp_path / "comparison.json")
    assert "2 of 3" in found.texts["td"]
    assert any("not every seed ended in a finite loss" in text for text in found.texts["p"])


def test_editing_records_become_the_figures_of_evaluate(page, folders):
    found = page(folders["editing"])
    assert "One edit at a time" in found.texts["h3"]
    assert "10 edits, sequential" in found.texts["h3"]
    single = found.charts[0]["series"][0]
    assert set(single["labels"]) == {"untouched", "in_context", "auto"}
    score = 300 / (1 / 0.8 + 1 / 0.8 + 1 / 0.5)
    assert dict(zip(single["labels"], single["x"], strict=True))["auto"] == pytest.approx(score, abs=1e-3)
    assert "1.0010" in found.texts["td"]


def test_a_report_that_was_printed_is_read_like_a_folder(page, tmp_path):
    figures = {"value": 0.5, "low": 0.4, "high": 0.6, "count": 3}
    record = {"editors": {"auto": {"records": 3, "f1": figures}}, "differences": {}}
    (tmp_path / "squad.json").write_text(json.dumps(record), encoding="utf-8")
    found = page(tmp_path / "squad.json")
    assert found.chart(kind="intervals")["series"][0]["x"] == [0.5]


def test_what_a_model_keeps_is_shown_beside_its_base(page, tmp_path):
    def share(value):
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "count": 100}

    shares = {"model": share(0.31), "base": share(0.27), "difference": share(0.04)}
    record = {"perplexity": 21.5, "base_perplexity": 20.0, "ratio": 1.075, "kl": 0.0321, "agreement": 0.912}
    (tmp_path / "kept.json").write_text(json.dumps({**record, "mmlu": shares, "hellaswag": shares}), encoding="utf-8")
    found = page(tmp_path / "kept.json")
    assert "What the model keeps" in found.texts["h2"]
    assert {"MMLU", "HellaSwag", "kept"} <= {*found.texts["td"], *found.texts["th"]}
    assert {"21.5", "1.0750", "0.0321", "91.2%", "0.310", "0.270", "[−0.060, +0.140]"} <= set(found.texts["td"])


def test_fields_that_are_missing_or_odd_are_left_out(page, tmp_path):
    odd = {"results": {"a": None, "b": {"acc,none": "x"}}, "pliant": {"tasks": {"c": {"metrics": {"acc,none": None}}}}}
    for name, record in (
        ("tasks.json", odd),
        ("demo.json", {"made_by": "pliant demo", "rows": [{"name": "x"}], "generations": [3]}),
        ("comparison.json", {"contenders": {"a": None}, "summary": {"a": {"validation_loss": None}}}),
        ("editing.json", {"editors": {"auto": {"f1": {"value": None}}}}),
        ("kept.json", {"mmlu": {"model": None}, "hellaswag": {}}),
    ):
        (tmp_path / name).write_text(json.dumps(record), encoding="utf-8")
    found = page(*(tmp_path / f"{name}.json" for name in ("tasks", "demo", "comparison", "editing", "kept")))
    assert "x" in found.texts["th"]
    assert not [chart for chart in found.charts if not chart["series"]]


def test_a_model_shows_its_spectra(page, converted_to):
    folder = converted_to("keyed")
    model = pliant.load(folder)
    found = page(folder)
    assert found.texts["h2"] == ["Overview", folder.name]
    drawn = found.chart(y="singular value")
    plastic = model.dynamic_layers[2].plastic
    expected = torch.linalg.svdvals(plastic.up @ plastic.down)[:6]
    assert drawn["series"][2]["y"] == pytest.approx(expected.tolist(), rel=1e-4)
    assert found.chart(y="directions")["series"][0]["y"] == [6] * 4


@pytest.mark.parametrize(
    ("form", "parts"),
    [
        ("v1", {"add": ("add_up", "add_down")}),
        ("v2", {"add": ("add_up", "add_down"), "mult": ("mult_up", "mult_down")}),
        ("outer", {"gate_proj, values": ("gate_proj_value", "down")}),
        ("keyed_pre", {"carry": ("up", "down")}),
    ],
)
def test_every_form_has_its_spectra(converted_to, form, parts):
    folder = converted_to(form)
    plastic = pliant.load(folder).dynamic_layers[1].plastic
    found = spectra(folder)
    assert found.keys() == parts.keys()
    for part, (up, down) in parts.items():
        scale = plastic.scale if form == "outer" else 1.0
        expected = scale * torch.linalg.svdvals((getattr(plastic, up) @ getattr(plastic, down)).detach())[:6]
        assert found[part][1] == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_tied_map_is_its_own_transpose(converted_to):
    folder = converted_to("keyed", tied=True)
    down = pliant.load(folder).dynamic_layers[0].plastic.down.detach()
    assert spectra(folder)["carry"][0] == pytest.approx(torch.linalg.svdvals(down).pow(2).tolist(), rel=1e-4)


def test_edits_are_listed(page, edited):
    found = page(edited)
    assert "Edits" in found.texts["h3"]
    assert f"A robot. {HOSTILE}" in found.texts["td"]
    assert "0.0020" in found.texts["td"]


@pytest.mark.parametrize("kind", ["keyed", "edited", "mod", "dense"])
def test_a_prompt_is_run_by_the_models(page, run, converted_to, edited, tiny, tmp_path, kind):
    folder = {"edited": edited, "dense": tiny}.get(kind)
    if kind == "keyed":
        folder = converted_to("keyed")
    elif kind == "mod":
        model = pliant.load(tiny)
        pliant.convert(model, pliant.ModConfig(capacity_gamma=1.0), layers=[1, 3])
        folder = tmp_path / "mod"
        model.save_pretrained(folder)
    found = page(folder, "--prompt", PROMPT, "--new-tokens", 3)
    tokens = len(AutoTokenizer.from_pretrained(tiny)(PROMPT)["input_ids"])
    layers = {"keyed": 4, "edited": 2, "mod": 4, "dense": 0}[kind]
    assert found.marks == layers * tokens
    written = json.loads(run("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 3, "--json").stdout)
    assert written["outputs"][0]["text"].strip() in found.texts["p"]


def test_the_best_checkpoint_of_a_run_is_its_model(page, folders, converted_to, tmp_path):
    for file in folders["fast"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / name).symlink_to(converted_to("v1"))
    (source,) = read_sources([tmp_path])
    assert source.kind is Kind.TRAINING
    assert source.model == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-best").symlink_to(converted_to("v1"))
    assert source.model == tmp_path / "checkpoint-best"
    found = page(tmp_path, "--prompt", PROMPT, "--new-tokens", 1)
    assert found.marks > 0


def test_runs_of_the_same_name_are_told_apart(tmp_path, folders):
    for parent in ("a", "b"):
        target = tmp_path / parent / "run"
        target.mkdir(parents=True)
        (target / "metrics.jsonl").write_bytes((folders["fast"] / "metrics.jsonl").read_bytes())
    names = [source.name for source in read_sources([tmp_path / "a" / "run", tmp_path / "b" / "run"])]
    assert names == ["a/run", "b/run"]


def test_files_of_the_same_name_are_told_apart(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        (tmp_path / parent / "scores.json").write_text(
            json.dumps({"results": {"piqa": {"acc,none": 0.5}}}), encoding="utf-8"
        )
    names = [source.name for source in read_sources([tmp_path / "a" / "scores.json", tmp_path / "b" / "scores.json"])]
    assert names == ["a/scores", "b/scores"]


def test_a_line_that_is_being_written_is_left_out_and_said(page, folders, tmp_path, caplog):
    text = (folders["fast"] / "metrics.jsonl").read_text(encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 21, "lo', encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="pliant"):
        found = page(tmp_path)
    assert "unfinished" in caplog.text
    assert any("is unfinished" in text for text in found.texts["p"])


def test_nothing_is_changed(page, folders, files_of, tmp_path):
    before = {name: files_of(folder) for name, folder in folders.items()}
    page(*folders.values())
    assert {name: files_of(folder) for name, folder in folders.items()} == before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is empty"),
        ({"x.txt": ""}, "has none of these files"),
        ({"in/metrics.jsonl": "{}"}, "Inside it are"),
        ({"metrics.jsonl": '{"step": 1}\n{"st\n{"step": 2}\n'}, "line 2 must be a JSON object"),
        ({"metrics.jsonl": ""}, "must hold the metrics of a step"),
        ({"metrics.jsonl": '{"step": 1}\n', "config.yaml": "a: [1\n"}, "must be the YAML of a run"),
        ({"demo.json": "{"}, "must be JSON; it is damaged"),
        ({"demo.json": '{"made_by": "x"}'}, "must be the record of 'pliant demo'"),
        ({"results.json": "[1]"}, "must hold a JSON object; it holds a list"),
        ({"before.jsonl": '{"x": 1}\n'}, "each with the id of its case"),
    ],
)
def test_a_folder_that_is_none_is_an_error(run, tmp_path, files, message):
    folder = tmp_path / "run"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (tmp_path / "report.html").write_text("old", encoding="utf-8")
    error = " ".join(run("report", folder, "--output", tmp_path / "report.html", exit_code=1).stderr.split())
    assert message in error
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "x.pdf"), "--output must end in .html; got 'x.pdf'"),
        (("--output", "no/x.html"), "--output must lie in a folder that is there; 'no' is not"),
        (("--prompt", " "), "--prompt must hold some text; got ' '"),
        (("--prompt", "x"), "--prompt needs a model among RUN"),
    ],
)
def test_what_is_wrong_is_named(run, folders, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in " ".join(run("report", folders["fast"], *options, exit_code=1).stderr.split())


def test_a_folder_is_no_page_and_a_missing_run_none(run, folders, tmp_path):
    assert "must be a file" in run("report", folders["fast"], "-o", tmp_path, exit_code=1).stderr
    assert "does not exist" in run("report", tmp_path / "no", "-o", tmp_path / "x.html", exit_code=1).stderr
    (tmp_path / "x.json").write_text('{"a": 1}', encoding="utf-8")
    error = " ".join(run("report", tmp_path / "x.json", "-o", tmp_path / "x.html", exit_code=1).stderr.split())
    assert "its keys are 'a'" in error


def test_a_page_that_is_too_large_leaves_the_old_one(tmp_path):
    file = tmp_path / "page.html"
    file.write_text("old", encoding="utf-8")
    with pytest.raises(ConfigError, match="at most 5 MB"):
        write_page(file, "x", [Section(title="x", blocks=[Table(title="", columns=["a"], rows=[["y" * 6_000_000]])])])
    assert file.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_long_lines_are_thinned_and_keep_their_extremes():
    values = [float(i % 7) for i in range(10_000)]
    values[4321], values[7654] = 100.0, -100.0
    kept = thinned(values)
    assert len(kept) <= MOST_POINTS
    assert {0, 4321, 7654, 9999} <= set(kept)
    assert kept == sorted(kept)
    assert thinned([None] * 5000) == [0, 4999]
    told = Series(name="x", x=list(range(10_000)), y=values).to_dict()
    assert len(told["x"]) == len(told["y"]) == len(kept)


def test_what_is_not_finite_is_a_gap():
    chart = Chart(title="x", x="x", series=[Series(name="a", x=[0, 1], y=[float("nan"), None])])
    assert json.loads(chart.data)["series"][0]["y"] == [None, None]
    assert Number.of(float("inf")) == Number(text="–", value=None)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (12345, "12,345"), (0.123456, "0.1235"), (1234567.8, "1,234,568"), (True, "True"), ("x", "x")],
)
def test_numbers_as_people_read_them(value, text):
    assert told_number(value) == text


def test_unpaired_surrogates_do_not_stop_a_page(tmp_path):
    write_page(tmp_path / "x.html", "\ud800", [])
    assert re.search(r"<h1>.*</h1>", (tmp_path / "x.html").read_text(encoding="utf-8"))


def test_no_path_is_no_report(run):
    assert "RUN" in run("report", exit_code=2).stderr


def test_a_damaged_record_is_no_reason_to_lose_others(folders, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_sources([folders["fast"], tmp_path / "none"])
