"""Where and on what a benchmark ran, and the JSON file it leaves."""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pliant.training import TrainingResult

RESULTS = Path(os.environ.get("PLIANT_BENCHMARK_RESULTS") or Path(__file__).parent / "results")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Returns hardware, versions and time of a run."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "accelerate")},
    }


def finished(run: TrainingResult) -> tuple[list[dict[str, Any]], float]:
    """Returns the log of a run, and the seconds of training that all its sessions took together.

    Raises:
        SystemExit: A signal stopped it; the same command goes on with it.
    """
    if run.stopped_by is not None:
        raise SystemExit(f"stopped by {run.stopped_by.name} at step {run.steps}; run the same command again to go on")
    logs = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    return logs, max(line["time"] for line in logs)


def save(name: str, result: dict[str, Any]) -> None:
    """Writes ``NAME.json`` among the results, with the command after those that it holds, and says where."""
    result["commands"] = list(dict.fromkeys([*result.get("commands", []), command()]))
    RESULTS.mkdir(exist_ok=True, parents=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")


def save_rows(name: str, rows: Sequence[dict[str, Any]], settings: Sequence[str]) -> None:
    """Writes rows to ``NAME.json``, in the place of those that agree with them in ``settings``."""
    path = RESULTS / f"{name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {"rows": [], "commands": []}
    by_settings = {tuple(row[key] for key in settings): row for row in [*stored["rows"], *rows]}
    save(name, {"rows": [row for _, row in sorted(by_settings.items())], "commands": stored["commands"]})


def named_folder(given: str) -> tuple[str, str]:
    """Reads ``NAME=FOLDER`` of a command line."""
    name, _, folder = given.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER; got {given!r}")
    return name, folder


def command() -> str:
    """The command that runs now, without the folder that it works in; of other paths, the last two parts."""
    words, given = ["python", f"benchmarks/{Path(sys.argv[0]).name}"], iter(sys.argv[1:])
    for word in given:
        if word == "--work":
            next(given, None)
        elif (path := Path(word)).is_absolute():
            words.append(path.name if path.parent.parent == Path("/") else f"{path.parent.name}/{path.name}")
        else:
            words.append(word)
    return shlex.join(words)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
