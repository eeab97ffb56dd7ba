"""``pliant edits``: what was written into a saved model for good, and how to take it back."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pliant.cli import options as o
from pliant.cli.console import bytes_text, hush_transformers, results, say_step, shortened
from pliant.errors import CheckpointError, EditError

if TYPE_CHECKING:
    from pliant.models import Edit, SavedEdits

edits = typer.Typer(no_args_is_help=True)

DirArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a saved model.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Id of an edit, or its first digits.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the same as JSON.")]


@edits.callback()
def _edits() -> None:
    """Show, revert, export or copy the edits of a saved model.

    Needs the folder of a model that was edited and saved. An edit is a low-rank change of some
    projections beside the weights, so taking it back leaves the weights bit for bit. list, show and
    revert never load the weights. What is written is written whole or not at all.

    \b
    pliant edits list outputs/edited
    pliant edits revert outputs/edited 1f0c
    pliant edits export outputs/edited --output outputs/merged
    """


@edits.command("list")
def list_edits(directory: DirArgument, as_json: JsonOption = False) -> None:
    """List the edits of a saved model, oldest first.

    Needs a model folder, and does not load its weights. Leaves nothing behind.

    \b
    pliant edits list outputs/edited --json
    """
    saved = _read(directory)
    entries = list(saved or ())
    if as_json:
        typer.echo(json.dumps([_summary(edit) for edit in entries], indent=2, ensure_ascii=False))
        return
    if not entries:
        results.print(f"{directory} has no edits.", markup=False, soft_wrap=True)
        return
    table = Table(title=f"edits of {directory}")
    for column in ("id", "created", "context", "layers"):
        table.add_column(column, no_wrap=column == "id")
    for column in ("rank", "norm", "KL"):
        table.add_column(column, justify="right")
    for edit in entries:
        table.add_row(
            edit.id, edit.created, escape(shortened(edit.context)), _layers(edit), str(edit.rank), *_figures(edit)
        )
    results.print(table)


@edits.command()
def show(directory: DirArgument, edit_id: IdArgument, as_json: JsonOption = False) -> None:
    """Show one edit: what was learned, how it was made, and what it changes.

    Needs a model folder, and does not load its weights. Leaves nothing behind.

    \b
    pliant edits show outputs/edited 1f0c
    """
    edit = _chosen(_read_some(directory), [edit_id])[0]
    if as_json:
        typer.echo(json.dumps(_description(edit), indent=2, ensure_ascii=False))
        return
    table = Table(show_header=False, title=f"edit {edit.id}")
    for name, value in _summary(edit).items():
        if name not in ("id", "details", "layers"):
            table.add_row(name, escape("not measured" if value is None else str(value)))
    for name, value in edit.details.items():
        table.add_row(name, escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    results.print(table)
    changes = Table(title="what it changes")
    changes.add_column("projection")
    for column in ("outputs", "inputs", "rank", "norm"):
        changes.add_column(column, justify="right")
    for path, change in _description(edit)["changes"].items():
        sizes = (f"{change[name]:,}" for name in ("outputs", "inputs", "rank"))
        changes.add_row(path, *sizes, f"{change['norm']:.4g}{' + scaled rows' if change['scales_rows'] else ''}")
    results.print(changes)


@edits.command()
def revert(
    directory: DirArgument,
    edit_ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID...", help="Ids of edits, or their first digits.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Take back every edit.")] = False,
) -> None:
    """Take edits back from a saved model, all that are named or none.

    Needs a model folder, and does not load its weights. Leaves the folder as if the edits had never
    been made.

    \b
    pliant edits revert outputs/edited 1f0c 77ab
    pliant edits revert outputs/edited --all
    """
    if bool(edit_ids) == everything:
        raise typer.BadParameter("name the edits to take back, or give --all.", param_hint="ID...")
    saved = _read_some(directory)
    reverted = list(saved) if everything else _chosen(saved, edit_ids or [])
    from pliant.models import write_edits

    gone = {edit.id for edit in reverted}
    write_edits(directory, saved.with_edits([edit for edit in saved if edit.id not in gone]))
    for edit in saved:
        if edit.id in gone:
            results.print(f"reverted {edit.id}: {shortened(edit.context)}", markup=False, soft_wrap=True)
    results.print(f"{len(saved) - len(gone)} left in {directory}", markup=False, soft_wrap=True)


@edits.command()
def export(
    directory: DirArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="New or empty folder for the result.")],
    dtype: o.DtypeOption = o.Dtype.AUTO,
) -> None:
    """Save a copy of a model with its edits merged into the weights.

    Needs a model folder whose weights are not quantised. Leaves a folder of the base's own size: of a
    dense model one of its base's class, which loads without pliant.

    \b
    pliant edits export outputs/edited --output outputs/merged
    """
    o.fresh_folder(output)
    _check_folder(directory)
    say_step(f"Loading {directory}")
    model = _load(directory, dtype)
    from pliant.models import export_merged

    say_step(f"Merging {len(model.edits)} edits into {output}")
    export_merged(model, output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    results.print(f"saved {output} ({bytes_text(size)}), with no ledger", markup=False, soft_wrap=True)
    results.print(
        f'Next:  pliant generate {shlex.quote(str(output))} --prompt "The capital of France is"',
        markup=False,
        soft_wrap=True,
    )


@edits.command("apply")
def apply_edits(
    directory: DirArgument,
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE...", help="Files of edits, or model folders that hold one.")
    ],
) -> None:
    """Copy the edits of other folders onto a saved model of the same base, all of them or none.

    Needs edits that were made for the base that DIR holds. Leaves them in DIR, beside its weights.

    \b
    pliant edits apply outputs/keyed outputs/edited
    """
    _check_folder(directory)
    hush_transformers()
    from pliant.models import read_edits, write_edits
    from pliant.models.ledger_file import check_base, snapshot

    found = {source: read_edits(source) for source in sources}
    say_step(f"Loading {directory}")
    model = _load(directory, o.Dtype.AUTO)
    current = snapshot(model)
    for source, saved in found.items():
        check_base(saved, current, source)
        for edit in saved:
            model.edits.add(edit)
    write_edits(directory, current.with_edits(list(model.edits)))
    for edit in list(model.edits)[len(current) :]:
        results.print(f"applied {edit.id}: {shortened(edit.context)}", markup=False, soft_wrap=True)
    results.print(f"{len(model.edits)} in {directory}", markup=False, soft_wrap=True)


def _load(directory: Path, dtype: o.Dtype) -> Any:
    given = {"dtype": dtype, "device_map": None, "attn_implementation": None, "quantization": o.Quantization.NONE}
    return o.load_model(str(directory), given)


def _check_folder(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"DIR must be the folder of a saved model; {str(directory)!r} has no config.json. Name the folder that "
            "save_pretrained or pliant convert has written."
        )


def _read(directory: Path) -> "SavedEdits | None":
    """Returns the edits of a model folder, or ``None`` if it has none."""
    _check_folder(directory)
    hush_transformers()
    from pliant.models import EDITS_NAME, read_edits

    return read_edits(directory) if (directory / EDITS_NAME).exists() else None


def _read_some(directory: Path) -> "SavedEdits":
    if (saved := _read(directory)) is None:
        raise EditError(f"DIR must hold a model with edits; {str(directory)!r} has none. There is nothing to name.")
    return saved


def _chosen(saved: "SavedEdits", edit_ids: Sequence[str]) -> "list[Edit]":
    from pliant.models.ledger import find_id

    known = {edit.id: edit for edit in saved}
    return [known[find_id(edit_id, known)] for edit_id in edit_ids]


def _summary(edit: "Edit") -> dict[str, Any]:
    return {
        "id": edit.id,
        "created": edit.created,
        "context": edit.context,
        "kl": edit.kl,
        "layers": list(edit.layers),
        "rank": edit.rank,
        "norm": edit.norm,
        "details": dict(edit.details),
    }


def _description(edit: "Edit") -> dict[str, Any]:
    changes = {
        path: {
            "outputs": delta.left.shape[0],
            "inputs": delta.right.shape[0],
            "rank": delta.left.shape[1],
            "norm": delta.norm_squared**0.5,
            "scales_rows": delta.scale is not None,
        }
        for path, delta in edit.deltas.items()
    }
    return {**_summary(edit), "changes": changes}


def _figures(edit: "Edit") -> tuple[str, str]:
    return f"{edit.norm:.4g}", "" if edit.kl is None else f"{edit.kl:.4f}"


def _layers(edit: "Edit") -> str:
    return ", ".join(map(str, edit.layers))
