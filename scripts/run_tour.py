"""Run docs/tour.ipynb from its first cell to its last and store what it shows, less what goes to stderr.

Usage: python scripts/run_tour.py [--base MODEL] [--rank R] [--output FILE.ipynb]
"""

import argparse
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TOUR = Path(__file__).resolve().parent.parent / "docs" / "tour.ipynb"
TIMEOUT = 900
"""Seconds that one cell may take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="another model, in place of the first cell's")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--output", type=Path, default=TOUR)
    arguments = parser.parse_args()
    notebook = nbformat.read(TOUR, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    settings = first.source
    if arguments.base is not None:
        first.source += f"\nBASE = {arguments.base!r}"
    if arguments.rank is not None:
        first.source += f"\nRANK = {arguments.rank}"
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=TIMEOUT, resources={"metadata": {"path": folder}}).execute()
    first.source = settings
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.metadata = {}
    nbformat.write(notebook, arguments.output)


if __name__ == "__main__":
    main()
