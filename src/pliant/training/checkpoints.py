"""Where a run keeps what it has learnt: whole or not at all, and the last good one always there.

A checkpoint is written into a staging folder and takes its name only once it is complete, so that a process killed at
any moment leaves no half-written one behind.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from pliant.architectures.base import added_buffers
from pliant.errors import CheckpointError
from pliant.models.checkpoint import DELTA_NAME, fill_from_delta

BEST = "checkpoint-best"
STAGING = ".staging"
REPLACED = "replaced-"
STATE_FILE = "trainer_state.json"


def last_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """Returns the newest complete ``checkpoint-N`` of a run, or ``None``."""
    return next((path for path in reversed(_numbered(output_dir)) if (path / STATE_FILE).is_file()), None)


def step_of(name: str) -> int | None:
    """Returns N of ``checkpoint-N``, or ``None`` for any other name."""
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    return int(match[1]) if match else None


def _numbered(output_dir: str | os.PathLike) -> list[Path]:
    """The folders ``checkpoint-N`` of a run, oldest first."""
    found = Path(output_dir).glob("checkpoint-*")
    numbers = {path: step for path in found if (step := step_of(path.name)) is not None}
    return sorted(numbers, key=numbers.__getitem__)


@contextmanager
def staged(output_dir: str | os.PathLike, name: str, *, is_main: bool, wait: Any) -> Iterator[Path]:
    """Yields a folder to fill; after the block it is ``output_dir/name``, in place of an older one.

    Args:
        output_dir: Of the run.
        name: The folder's final name.
        is_main: Whether this process is the one that moves it.
        wait: Called so that all processes get here before the move, and none goes on before it is done.

    Raises:
        CheckpointError: Writing failed, a full disk for instance; the older folder is untouched.
    """
    root = Path(output_dir) / STAGING
    folder = root / name
    try:
        if is_main:
            clear_staging(output_dir)
            folder.mkdir(parents=True)
        wait()
        yield folder
        wait()
        if is_main:
            _replace(folder, Path(output_dir) / name)
            shutil.rmtree(root, ignore_errors=True)
        wait()
    except (OSError, SafetensorError, RuntimeError) as error:
        if is_main:
            clear_staging(output_dir)  # puts back what was set aside
        if not _is_write_error(error):
            raise
        last = last_checkpoint(output_dir)
        raise CheckpointError(
            f"training.output_dir={str(output_dir)!r}: {name} could not be written ({error}); "
            f"{'the last good checkpoint is ' + str(last) if last else 'no checkpoint is there yet'}. Free some space, "
            "or choose another folder."
        ) from error


def clear_staging(output_dir: str | os.PathLike) -> None:
    """Removes what a killed process has left; a checkpoint that it had only set aside goes back to its place."""
    root = Path(output_dir) / STAGING
    for aside in root.glob(f"{REPLACED}*"):
        target = Path(output_dir) / aside.name.removeprefix(REPLACED)
        if not target.exists():
            os.replace(aside, target)
    shutil.rmtree(root, ignore_errors=True)


def _is_write_error(error: Exception) -> bool:
    """torch and safetensors report a failed write as errors of their own."""
    if isinstance(error, OSError):
        return True
    return isinstance(error, SafetensorError) or any(word in str(error) for word in ("PytorchStreamWriter", "iostream"))


def _replace(folder: Path, target: Path) -> None:
    """Moves ``folder`` to ``target``; a folder in its place is set aside first, and deleted only after the move."""
    aside = folder.parent / f"{REPLACED}{target.name}"
    if target.exists():
        os.replace(target, aside)
    os.replace(folder, target)


def rotate(output_dir: str | os.PathLike, keep: int) -> None:
    """Deletes all but the ``keep`` newest ``checkpoint-N``, none of which is ever there in part."""
    root = Path(output_dir) / STAGING
    for path in _numbered(output_dir)[:-keep]:
        root.mkdir(exist_ok=True)
        os.replace(path, root / path.name)
        shutil.rmtree(root)


def check_sharding(checkpoint: str | os.PathLike, *, is_sharded: bool) -> None:
    """Refuses to go on under FSDP from a run without it, and the reverse: their optimizer states differ.

    Raises:
        CheckpointError: ``checkpoint`` is of the other kind.
    """
    was_sharded = any(Path(checkpoint).glob(f"{FSDP_MODEL_NAME}*"))
    if was_sharded != is_sharded:
        here, there = ("with", "without") if is_sharded else ("without", "with")
        raise CheckpointError(
            f"{checkpoint} was saved {there} FSDP and cannot be resumed {here} it. Launch the run as before, or begin "
            f"a new one from its weights: model.checkpoint_path={checkpoint}."
        )


def restore(model: Any, checkpoint: str | os.PathLike) -> None:
    """Gives ``model`` the weights of a full or delta checkpoint of the same layers.

    Raises:
        CheckpointError: A file is damaged, or holds other tensors than the model.
    """
    folder = Path(checkpoint)
    if (folder / DELTA_NAME).exists():
        fill_from_delta(model, folder)
        return
    files = sorted(folder.glob("model*.safetensors")) if (folder / SAFE_WEIGHTS_INDEX_NAME).exists() else []
    try:
        tensors = {
            name: tensor for file in files or [folder / SAFE_WEIGHTS_NAME] for name, tensor in load_file(file).items()
        }
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{folder} must hold whole safetensors files; reading one failed: {error}. Resume from an older checkpoint."
        ) from error
    own = dict(model.named_parameters()) | dict(added_buffers(model))  # tied weights are there once
    if unequal := sorted(own.keys() ^ tensors.keys()):
        raise CheckpointError(
            f"{folder} must hold exactly the tensors of the model; {unequal[0]} ({len(unequal)} in all) is on one "
            "side only. It belongs to another run."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise CheckpointError(
                    f"{folder}: {name} must have shape {tuple(tensor.shape)}; got {tuple(tensors[name].shape)}. It "
                    "belongs to another run."
                )
            tensor.copy_(tensors[name])
