"""The folder that ``pliant demo`` leaves: what lies in it, and what its record says."""

import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from pliant.cli.console import bytes_text, results
from pliant.cli.options import fresh_folder
from pliant.errors import CheckpointError

MADE_BY = "pliant demo"
RECORD, FIGURE, FULL, DELTA = "demo.json", "demo.png", "model", "delta"
TRAINING, TRAINING_FIGURE = "training", "training.png"


def clear(output: Path) -> None:
    """Removes what an earlier demo left in ``output``; refuses the folder of anything else.

    Raises:
        CheckpointError: ``output`` is not empty and holds no record of a demo.
    """
    if not (output / RECORD).is_file():
        fresh_folder(output)
        return
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict) or record.get("made_by") != MADE_BY:
        raise CheckpointError(f"--output {str(output)!r} holds a {RECORD} of something else. Choose another folder.")
    for name in (FULL, DELTA, TRAINING):
        if (output / name).is_dir():
            shutil.rmtree(output / name)
    for name in (FIGURE, TRAINING_FIGURE):
        (output / name).unlink(missing_ok=True)


def write_record(output: Path, record: dict[str, Any]) -> None:
    """Writes the record; one without figures marks the folder as a demo's while it runs."""
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (output / RECORD).write_text(text + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Returns the versions that the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("pliant", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed, run from source"
    return found


def hardware() -> dict[str, Any]:
    """Returns what the figures were measured on."""
    import torch

    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def say_where(output: Path, base: str, seconds: float) -> None:
    """Prints where everything lies, and what to try next."""
    sizes = {name: bytes_text(sum(file.stat().st_size for file in (output / name).iterdir())) for name in (FULL, DELTA)}
    lines = (
        f"Done in {seconds:.0f} s. In {output}:",
        f"  {FIGURE}   what the rank costs, and why",
        f"  {RECORD}  every figure, with versions and hardware",
        f"  {FULL}/     the converted model, {sizes[FULL]}",
        f"  {DELTA}/     only what conversion added, {sizes[DELTA]}",
        f"  {TRAINING_FIGURE}  what training gained; the run is in {TRAINING}/",
        "Next:",
        f"  pliant chat {output / FULL}   # then /base to compare",
        "  pliant info llama-3.1-8b   # what it would add to a larger base",
        f"  pliant convert {base} --preset v2 --output outputs/v2",
    )
    results.print("\n".join(lines), markup=False, soft_wrap=True)
