"""A folder with a tiny base in it, and launches of two gloo processes that train it."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WORKER = Path(__file__).parent / "worker.py"
TIMEOUT_S = 240
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
CLOCKS = ("time", "tokens_per_second", "eval_seconds", "total_flos")
PIECE = {"chunk": 7}
"""Positions whose logits exist at a time: a batch then takes several pieces, each a call of the head."""
CASES: dict[str, dict[str, Any]] = {
    "keyed": {"worker": PIECE},
    "two_stages": {
        "model": {"preset": "v2", "layers": "upper_half"},
        "layerwise_fraction": 0.5,
        "use_regularization": True,
        "gradient_checkpointing": True,
    },
    "all": {
        "objective": "causal_lm",
        "trainable": "all",
        "data": {"packing": False},
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "worker": PIECE,
    },
    "lora": {"model": {"preset": "v1"}, "objective": "causal_lm", "trainable": "lora"},
    "teacher": {"trainable": "all", "worker": PIECE},
    "mod": {"model_type": "mod", "objective": "causal_lm", "trainable": "all", "threshold_fraction": 0.4},
    "dtf": {"model_type": "dtf", "objective": "causal_lm", "trainable": "all"},
    "stt": {"model_type": "stt", "model": {"capacity_gamma": 0.75}},
    "bf16": {"mixed_precision": "bf16"},
    "bf16_all": {"objective": "causal_lm", "trainable": "all", "mixed_precision": "bf16", "max_steps": 3},
}
"""Runs that are the same in one process, in two, and sharded."""
STREAMED: dict[str, Any] = {"objective": "causal_lm", "trainable": "all", "data": {"streaming": True, "packing": False}}
BROKEN: dict[str, Any] = {"log_steps": 2, "max_steps": 8}
"""A run that breaks off: its checkpoint at step 3 lies between two log lines."""


@dataclass(frozen=True)
class Workplace:
    """A folder with a base, texts and jobs; runs are described in plain JSON, for processes to read."""

    root: Path

    def run(
        self,
        name: str,
        *,
        out: str | None = None,
        batch: int = 2,
        model_type: str = "npt",
        model: dict | None = None,
        data: dict | None = None,
        worker: dict | None = None,
        **training: Any,
    ) -> dict[str, Any]:
        """A run of six steps, keyed and end to end unless it is said otherwise."""
        own = {"preset": "keyed", "adapter_rank": 8} if model_type == "npt" else {}
        needs_text = (model or {}).get("preset", "keyed").startswith("keyed") and model_type != "dense"
        text = {"calibration": str(self.root / "calibration.txt"), "calibration_tokens": 8_192} if needs_text else {}
        return {
            "name": name,
            "model_type": model_type,
            "model": {
                "base_model_name": str(self.root / "base"),
                **own,
                **text,
                **(model or {}),
            },
            "data": {
                "dataset_name": str(self.root / "texts.jsonl"),
                "max_length": 16,
                "validation_fraction": 0.2,
                "max_validation_windows": 7,  # odd: two processes cannot share them evenly
                **(data or {}),
            },
            "training": {
                "output_dir": str(self.root / "runs" / (out or name)),
                **{"max_steps": 6, "batch_size": batch, "lr": 1e-2, "log_steps": 1, "save_steps": 3, **training},
            },
            **(worker or {}),
        }

    def launch(
        self,
        runs: list[dict[str, Any]],
        *,
        fsdp: bool = False,
        expected: int = 0,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        """Does ``runs`` in two processes, one run after the other; returns what each process found, by name.

        Args:
            runs: Of :meth:`run`.
            fsdp: Shard the model.
            expected: Exit status of the launcher.
            meanwhile: Called in another thread.
        """
        job = self.root / f"{runs[0]['name']}.job.json"
        job.write_text(json.dumps(runs))
        environment = {
            **os.environ,
            **(FSDP if fsdp else {}),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        if meanwhile is not None:
            threading.Thread(target=meanwhile, daemon=True).start()
        process = subprocess.run(
            [*launcher, str(WORKER), str(job)], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert process.returncode == expected, process.stdout[-2000:] + process.stderr[-8000:]
        return {run["name"]: [self.found(run["name"], rank) for rank in range(2)] for run in runs}

    def found(self, name: str, rank: int) -> dict[str, Any]:
        """What a process wrote about a run; nothing if it died in it."""
        file = self.root / f"{name}.rank-{rank}.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def parameters(self, name: str) -> dict[str, torch.Tensor]:
        """The parameters after a run, whole."""
        return torch.load(self.root / f"{name}.pt", weights_only=True)

    def metrics(self, out: str) -> list[dict[str, Any]]:
        """The log of a run, without what a clock decides and without its summary."""
        lines = (self.root / "runs" / out / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [
            {k: v for k, v in record.items() if k not in CLOCKS} for record in records if "train_runtime" not in record
        ]

    def wait_for(self, file: str, text: str = "") -> None:
        """Waits until a file under the folder is there, and has ``text`` in it."""
        path, deadline = self.root / file, time.monotonic() + TIMEOUT_S
        while not (path.exists() and text in path.read_text()):
            assert time.monotonic() < deadline, f"{path} never came to hold {text!r}"
            time.sleep(0.02)
