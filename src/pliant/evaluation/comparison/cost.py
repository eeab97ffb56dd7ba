"""What a step of training costs: its time, in turn with others of the same process, and its memory at its peak.

``python -m pliant.evaluation.comparison.cost JOB.json`` measures runs beside one of them in a process of its own, whose
allocator gives freed tensors back at once (:data:`ALLOCATOR`), so that the resident size is what is in use.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState

from pliant.config import RunConfig
from pliant.config.composition import compose, to_yaml
from pliant.data import training_data
from pliant.errors import TrainingError
from pliant.models import DynamicCausalLM
from pliant.training.build import autocast, build_model, tokenizer_for
from pliant.training.objectives import OBJECTIVES, Student
from pliant.training.plan import compute_device_type

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
"""Environment of a process that measures its resident size; glibc reads it at the start."""
REPEATS = 7
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SHOWN_CHARACTERS = 400

Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model that is ready to take steps.

    Attributes:
        step: Takes one optimizer step.
        held_bytes: What stays between two steps: its weights and Adam's moments.
    """

    step: Step
    held_bytes: int


def stepper(
    objective: str,
    student: Student,
    batch: Mapping[str, torch.Tensor],
    *,
    autocast: AbstractContextManager[Any] | None = None,
) -> Step:
    """Returns a function that takes one step of AdamW on ``batch``.

    Args:
        objective: Key of ``pliant.training.objectives.OBJECTIVES``.
        student: The model, only what is trained of it trainable.
        batch: As the objective reads it.
        autocast: Entered around each forward pass.
    """
    optimizer = torch.optim.AdamW([p for p in student.wrapped.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        with autocast or nullcontext():
            loss = OBJECTIVES[objective](student, batch)["loss"] / batch["labels"].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def take_turns(steps: Mapping[str, Step], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of every step, one after the other, ``repeats`` times over."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            _wait()
            start = time.perf_counter()
            step()
            _wait()
            times[name].append(time.perf_counter() - start)
    return times


def resident(field: str) -> int:
    """Returns the bytes of a memory field of this process: ``VmRSS`` now, ``VmHWM`` at its peak since the last reset.

    Raises:
        OSError: The system has no ``/proc``.
    """
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def resident_peak(step: Step) -> int:
    """Returns the largest resident size during a step, in bytes; Linux only."""
    gc.collect()
    CLEAR.write_text("5", encoding="utf-8")  # resets VmHWM
    step()
    return resident("VmHWM")


def added_bytes(step: Step) -> int | None:
    """Returns what a step adds to the memory in use at its peak; nothing where the system does not say."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR.exists():
        return None
    gc.collect()
    before = resident("VmRSS")
    return resident_peak(step) - before


def prepare(config: RunConfig) -> Prepared:
    """Builds the model of a run, and takes its first step on its first rows."""
    training = config.training
    model, _ = build_model(config)
    tokenizer = tokenizer_for(config)
    kind = "chat" if training.objective == "sft" else "text"
    data = training_data(config.data, tokenizer, kind=kind, seed=training.seed)
    batch = data.collate(list(islice(cycle(data.train), training.batch_size)))
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items() if name != "row"}
    dynamic = model if isinstance(model, DynamicCausalLM) else model.get_base_model()
    if training.gradient_checkpointing:
        dynamic.checkpoint_activations()
    model.train()
    student = Student(wrapped=model, model=dynamic, adapted=None, teacher=None, config=training)
    step = stepper(training.objective, student, batch, autocast=autocast(config, device))
    step()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return Prepared(step=step, held_bytes=weights + moments)


def measure_costs(
    configs: Mapping[str, RunConfig], *, reference: str, repeats: int = REPEATS
) -> dict[str, dict[str, float | None]]:
    """Measures a micro-batch's step of each run in turn with that of ``reference``, two models in memory at a time.

    Returns:
        By run ``seconds`` (median), ``time_ratio`` (median of the ratios to ``reference``), ``peak_bytes`` (weights,
        Adam's moments, and what a step adds at its peak) and ``memory_ratio``; the last two are ``None`` where the
        system does not say.
    """
    PartialState(cpu=compute_device_type() == "cpu")
    first = prepare(configs[reference])
    peak = _peak(first)
    found: dict[str, dict[str, float | None]] = {}
    for name, config in configs.items():
        own, own_peak = first, peak
        if name != reference:
            own = prepare(config)
            own_peak = _peak(own)
        times = take_turns({"own": own.step, "reference": first.step}, repeats)
        found[name] = {
            "seconds": median(times["own"]),
            "time_ratio": 1.0 if name == reference else median(a / b for a, b in zip(*times.values(), strict=True)),
            "peak_bytes": own_peak,
            "memory_ratio": None if own_peak is None or peak is None else own_peak / peak,
        }
        del own
        gc.collect()
    return found


def measure_apart(
    configs: Mapping[str, RunConfig], *, reference: str, repeats: int = REPEATS
) -> dict[str, dict[str, float | None]]:
    """Does what :func:`measure_costs` does in a process of its own, whose resident size is what is in use.

    Raises:
        TrainingError: The process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job.json"), Path(folder, "result.json")
        written = {name: to_yaml(config) for name, config in configs.items()}
        job.write_text(json.dumps({"configs": written, "reference": reference, "repeats": repeats}), encoding="utf-8")
        command = [sys.executable, "-m", "pliant.evaluation.comparison.cost", str(job), str(result)]
        finished = subprocess.run(
            command, env={**os.environ, **ALLOCATOR}, capture_output=True, text=True, check=False, errors="replace"
        )
        if finished.returncode:
            raise TrainingError(
                f"measuring step times must end well; it ended with {finished.returncode}: "
                f"…{finished.stderr[-SHOWN_CHARACTERS:]} Free some memory or lower training.batch_size; "
                "where time need not be equal, --no-cost leaves it out."
            )
        return json.loads(result.read_text(encoding="utf-8"))


def _peak(prepared: Prepared) -> float | None:
    added = added_bytes(prepared.step)
    return None if added is None else float(prepared.held_bytes + added)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _main(job: str, result: str) -> None:
    asked: dict[str, Any] = json.loads(Path(job).read_text(encoding="utf-8"))
    configs = {}
    for number, (name, text) in enumerate(asked["configs"].items()):
        file = Path(job).with_name(f"{number}.yaml")
        file.write_text(text, encoding="utf-8")
        configs[name] = compose(str(file))
    found = measure_costs(configs, reference=asked["reference"], repeats=asked["repeats"])
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
