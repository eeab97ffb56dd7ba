"""What each process of a distributed test runs: ``torchrun worker.py JOB.json``.

A job is a list of runs; starting Python takes longer than training a tiny model, so one launch does many. Each process
writes what it found to ``NAME.rank-R.json`` beside the job, and the first one the gathered parameters to ``NAME.pt``.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from pliant.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from pliant.errors import PliantError
from pliant.training import readout, train
from pliant.training.trainer import PliantTrainer

TOKENS = torch.arange(2, 22)[None]
"""What logits are compared on."""


class Killed(Exception):
    """Stands for a process that dies in the middle of a step, where the job is to go on."""


def configuration(run: dict[str, Any]) -> RunConfig:
    """The configuration of a run that is described in plain JSON."""
    return RunConfig(
        model_type=run["model_type"],
        model=ModelConfig(**run["model"]),
        data=DataConfig(**run["data"]),
        training=TrainingConfig(**run["training"]),
    )


def force_fsdp() -> None:
    """Makes accelerate use FSDP on gloo processes too; on a CPU it ignores the setting without a word."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init


@contextmanager
def disturbed(run: dict[str, Any]) -> Iterator[None]:
    """Within the block a step may be slow, break off in every process, or end the last process for good."""
    original = PliantTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **options: Any) -> Any:
        time.sleep(run.get("delay", 0.0))
        step = self.state.global_step + 1
        if step == run.get("break_at"):
            raise Killed
        if step == run.get("die_at") and self.args.process_index == self.args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **options)

    PliantTrainer.compute_loss = compute_loss
    try:
        yield
    finally:
        PliantTrainer.compute_loss = original


def whole(model: Any) -> dict[str, Tensor]:
    """All parameters by name, gathered; every process must call this."""
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for name, v in values.items()}


def run_one(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains once, and returns what is to be compared."""
    os.environ["FSDP_STATE_DICT_TYPE"] = run.get("state_dict", "SHARDED_STATE_DICT")
    AcceleratorState._reset_state()  # the next trainer reads the setting anew
    readout.CHUNK = run.get("chunk", 128)
    try:
        with disturbed(run):
            result = train(configuration(run))
    except (Killed, PliantError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    model = result.model
    shards = {n: [p.to_local().numel(), p.numel()] for n, p in model.named_parameters() if isinstance(p, DTensor)}
    values = whole(model)
    if PartialState().is_main_process:
        torch.save(values, folder / f"{run['name']}.pt")
    with torch.no_grad():
        logits = model.eval()(TOKENS, use_cache=False).logits
    return {
        "steps": result.steps,
        "before": dict(result.before),
        "after": dict(result.after),
        "checkpoint": str(result.checkpoint),
        "stopped_by": result.stopped_by.name if result.stopped_by else None,
        "shards": shards,
        "logits": logits.float().tolist(),
    }


def main() -> None:
    """Runs the job."""
    job, rank = Path(sys.argv[1]), os.environ["RANK"]
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        force_fsdp()
    for run in json.loads(job.read_text()):
        (job.parent / f"{run['name']}.pid-{rank}").write_text(str(os.getpid()))
        found = run_one(run, job.parent)
        (job.parent / f"{run['name']}.rank-{rank}.json").write_text(json.dumps(found))
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
