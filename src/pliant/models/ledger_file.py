"""The file of a ledger: edits beside the weights of a model folder, bound to their base by its fingerprint.

It is read and written without the model, and replaced whole: what a process leaves that is killed, or meets a full
disk, is the old file or the new one.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pliant.errors import EditError
from pliant.models.checkpoint import FINGERPRINT_KEY, HUB_OPTIONS, cached, digest, fingerprint, same_base
from pliant.models.edits import Delta, Edit
from pliant.models.ledger import Ledger
from pliant.models.spec import PliantSpec
from pliant.models.staging import replaced

EDITS_NAME = "pliant_edits.safetensors"
EDITS_FORMAT = 1
STAGED_PREFIX = ".pliant_edits-"
LEFTOVER_SECONDS = 3600.0
FIELDS = ("id", "created", "context", "kl", "details")


@dataclass(frozen=True, kw_only=True)
class SavedEdits:
    """What a ledger's file holds: iterable, the edits in their order.

    Attributes:
        edits: The entries.
        fingerprint: Of the base that they were made for, as ``checkpoint.fingerprint`` takes it.
        base: Name of that base, if it is known.
        base_dtype: What the base was held in, such as ``torch.float32``.
    """

    edits: tuple[Edit, ...]
    fingerprint: Float[Tensor, "tensors samples"]
    base: str | None = None
    base_dtype: str = "torch.float32"

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __len__(self) -> int:
        return len(self.edits)

    def with_edits(self, edits: Sequence[Edit]) -> "SavedEdits":
        """Returns other edits of the same base."""
        return SavedEdits(edits=tuple(edits), fingerprint=self.fingerprint, base=self.base, base_dtype=self.base_dtype)


def edits_file(source: str | os.PathLike) -> Path:
    """Returns the file that ``source`` is, or that lies in the folder ``source``."""
    path = Path(source)
    return path / EDITS_NAME if path.is_dir() else path


def read_edits(source: str | os.PathLike) -> SavedEdits:
    """Reads a ledger's file without loading a model.

    Args:
        source: The file, or the model folder that it lies in.

    Raises:
        EditError: There is none, it is damaged, or another format.
    """
    file = edits_file(source)
    if not file.is_file():
        raise EditError(
            f"source must be a ledger's file, or a model folder with {EDITS_NAME}; {str(source)!r} has no edits. "
            "Name a folder whose model was edited and saved."
        )
    try:
        with safe_open(str(file), framework="pt") as reader:
            metadata = reader.metadata() or {}
            tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise EditError(
            f"{file} must be a whole safetensors file; reading failed: {error}. Copy or save it again."
        ) from error
    if metadata.get("edits_format") != str(EDITS_FORMAT) or FINGERPRINT_KEY not in tensors:
        raise EditError(
            f"{file} must be a pliant ledger of format {EDITS_FORMAT}; got format {metadata.get('edits_format')!r}. "
            "Read it with the release that wrote it."
        )
    saved = tensors.pop(FINGERPRINT_KEY)
    try:
        edits = tuple(_edit(entry, tensors) for entry in json.loads(metadata["edits"]))
    except (KeyError, TypeError, AttributeError, ValueError, EditError) as error:
        raise EditError(f"{file} must describe every edit; an entry is damaged: {error!r}. Save it again.") from error
    if tensors:
        raise EditError(f"{file} must hold the tensors of its edits only; {min(tensors)} is of none. Save it again.")
    if len({edit.id for edit in edits}) != len(edits):
        raise EditError(f"{file} must name each edit once; an id is there twice. Save it again.")
    return SavedEdits(
        edits=edits,
        fingerprint=saved,
        base=metadata.get("base") or None,
        base_dtype=metadata.get("base_dtype", "torch.float32"),
    )


def write_edits(folder: str | os.PathLike, saved: SavedEdits) -> None:
    """Writes the ledger's file of ``folder``, or removes it where there are no edits.

    Raises:
        EditError: It could not be written; the old one is untouched.
    """
    target = Path(folder) / EDITS_NAME
    _clear_leftovers(target.parent)
    if not saved.edits:
        target.unlink(missing_ok=True)
        return
    tensors = {FINGERPRINT_KEY: saved.fingerprint}
    for edit in saved.edits:
        for path, delta in edit.deltas.items():
            tensors |= {f"{edit.id}.{path}.{name}": value.contiguous() for name, value in delta.tensors().items()}
    metadata = {
        "format": "pt",
        "edits_format": str(EDITS_FORMAT),
        "base": saved.base or "",
        "base_dtype": saved.base_dtype,
        "edits": json.dumps([_entry(edit) for edit in saved.edits], ensure_ascii=False),
    }
    try:
        with replaced(target, prefix=STAGED_PREFIX) as staged:
            save_file(tensors, staged, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise EditError(
            f"{target} could not be written ({error}); the edits on disk are as they were. Free some space, or choose "
            "another folder."
        ) from error


def snapshot(model: Any, state_dict: Mapping[str, Tensor] | None = None) -> SavedEdits:
    """Returns the edits of ``model`` with the fingerprint of its base, as they go into a file.

    Args:
        model: A pliant model.
        state_dict: Its parameters by name, where its own are sharded.
    """
    return SavedEdits(
        edits=tuple(model.edits),
        fingerprint=fingerprint(model, state_dict),
        base=PliantSpec.of(model.config).base.get("name"),
        base_dtype=str(model.dtype),
    )


def check_saving(model: Any, options: Mapping[str, Any]) -> None:
    """Refuses to save edits where ``save_pretrained`` writes no base beside them.

    Raises:
        EditError: Adapters of peft are in the model, or its files go to the hub as they are written.
    """
    if not len(model.edits):
        return
    if getattr(model, "_hf_peft_config_loaded", False):
        raise EditError(
            "a model with edits must be saved without adapters; got one that holds adapters of peft, of which only "
            "those would be saved. Save the edited model first, then load the adapter over it."
        )
    if options.get("push_to_hub"):
        raise EditError(
            "push_to_hub must be False for a model with edits; got True. Use model.push_to_hub(name), which takes "
            "every file along."
        )


def save_ledger(model: Any, folder: str | os.PathLike, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Writes the edits of ``model`` into ``folder``; without any, one that lies there goes."""
    if len(model.edits):
        write_edits(folder, snapshot(model, state_dict))
    else:
        (Path(folder) / EDITS_NAME).unlink(missing_ok=True)


def find_edits(name: str | os.PathLike, options: Mapping[str, Any]) -> str | None:
    """Returns the local path of the ledger's file of a folder or hub id, or ``None`` if it has none."""
    folder = Path(name)
    if folder.is_dir():
        return str(folder / EDITS_NAME) if (folder / EDITS_NAME).exists() else None
    return cached(str(name), EDITS_NAME, **{key: options[key] for key in HUB_OPTIONS if key in options})


def check_base(saved: SavedEdits, current: SavedEdits, source: str | os.PathLike) -> None:
    """Refuses edits that were made for another base.

    Raises:
        EditError: The fingerprints differ.
    """
    if same_base(saved.fingerprint, current.fingerprint, same_dtype=saved.base_dtype == current.base_dtype):
        return
    raise EditError(
        f"{source} must hold edits of this base, {current.base!r} (fingerprint {digest(current.fingerprint)}); got "
        f"edits of {saved.base!r} (fingerprint {digest(saved.fingerprint)}). Make them anew for this base."
    )


def load_ledger(model: Any, file: str | os.PathLike) -> None:
    """Puts the edits of a file on ``model``.

    Raises:
        EditError: The file is damaged, or of another base.
    """
    saved = read_edits(file)
    check_base(saved, snapshot(model), file)
    ledger: Ledger = model.edits
    for edit in saved:
        ledger.add(edit)


def _entry(edit: Edit) -> dict[str, Any]:
    return {**{name: getattr(edit, name) for name in FIELDS}, "paths": list(edit.deltas)}


def _edit(entry: dict[str, Any], tensors: dict[str, Tensor]) -> Edit:
    """Builds an edit from its entry, and takes its tensors out of ``tensors``."""
    deltas = {}
    for path in entry["paths"]:
        key = f"{entry['id']}.{path}"
        scale = tensors.pop(f"{key}.scale", None)
        factors = {name: tensors.pop(f"{key}.{name}") for name in ("left", "right")}
        if any(factor.dtype != torch.float32 for factor in factors.values()):
            raise ValueError(f"{key} must be in float32")
        deltas[path] = Delta(**factors, scale=scale)
    return Edit(deltas=deltas, **{name: entry[name] for name in FIELDS})


def _clear_leftovers(folder: Path) -> None:
    """Removes what writers that were killed have left; one at work is younger."""
    for file in folder.glob(f"{STAGED_PREFIX}*"):
        try:
            if time.time() - file.stat().st_mtime > LEFTOVER_SECONDS:
                file.unlink()
        except FileNotFoundError:
            continue
