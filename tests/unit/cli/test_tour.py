"""The notebook of the documentation runs from its first cell to its last, on a tiny base."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "run_tour.py"


@pytest.mark.real_model  # the default texts come with the embedded base
def test_the_tour_runs(tiny, tmp_path):
    file = tmp_path / "tour.ipynb"
    command = [sys.executable, str(SCRIPT), "--base", str(tiny), "--rank", "12", "--output", str(file)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert finished.returncode == 0, finished.stderr[-3_000:]
    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    shown = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert shown.count("same logits: True") == 2
    assert any(output.output_type == "display_data" for cell in cells for output in cell.outputs)
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
