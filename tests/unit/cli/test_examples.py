"""The scripts in examples/, run as a user runs them, on a tiny base."""

import json
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "examples"
LONGEST = 60
"""Lines."""
pytestmark = pytest.mark.real_model  # the default texts come with the embedded base

RUNS = {
    "convert.py": (["TINY", "--rank", "16", "--tokens", "1024"], "loaded with the same logits"),
    "train_equivalence.py": (["TINY", "--rank", "16", "--steps", "3", "--text", "text.txt"], "the best checkpoint"),
    "finetune.py": (["chats.jsonl", "--base", "TINY", "--steps", "3"], "parameters were trained"),
    "consolidate_fact.py": (["TINY", "--target", "unembedding"], "the same logits as before"),
    "route_tokens.py": (["TINY", "--capacity", "0.75"], "in base mode every token runs"),
}


def test_every_example_is_run_and_short():
    assert {file.name for file in FOLDER.glob("*.py")} == set(RUNS)
    for file in FOLDER.glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST, file.name


@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs(name, tiny, text_file, tmp_path, monkeypatch, capsys):
    arguments, last = RUNS[name]
    monkeypatch.chdir(tmp_path)
    asked = ({"role": "user", "content": f"What is {n}?"} for n in range(40))
    rows = ({"messages": [question, {"role": "assistant", "content": "A number"}]} for question in asked)
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", [name, *(str(tiny) if a == "TINY" else a for a in arguments)])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert last in capsys.readouterr().out
