"""``pliant export``: a saved model as a folder for others, which need no pliant where its code lies beside it."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from pliant.cli import options as o
from pliant.cli.console import bytes_text, notes, results, say_step


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, hub id, or smollm2-135m.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New or empty folder for the result.")],
    remote_code: Annotated[
        bool,
        typer.Option("--remote-code", help="Put its code beside it: it then loads without pliant, if you trust it."),
    ] = False,
    results_file: Annotated[
        Path | None,
        typer.Option(
            "--results",
            metavar="FILE",
            help="Results of pliant evaluate or lm_eval for the model card; default: results.json in MODEL, if any.",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Then upload it to this repository, owner/name.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    dtype: o.DtypeOption = o.Dtype.AUTO,
) -> None:
    """Save a model for others: whole, edits merged, with a model card.

    Needs a model whose weights are not quantised. Leaves a folder with weights, tokenizer and a
    README.md; with --remote-code also with modeling_pliant.py, so that lm_eval, transformers serve and
    any program without pliant load it. A dense model becomes one of its base's class and needs no code.

    \b
    pliant export outputs/keyed --output outputs/shared --remote-code
    lm_eval --model hf --model_args pretrained=outputs/shared,trust_remote_code=True --tasks piqa
    """
    if private and push_to_hub is None:
        raise typer.BadParameter("makes a repository private; name one with --push-to-hub.", param_hint="--private")
    o.fresh_folder(output)
    if push_to_hub is not None:
        from pliant.models.hub import check_push

        check_push(push_to_hub)
    from pliant.cli.model_card import RESULTS_FILE, find_run, model_card, read_results, read_run

    if results_file is None and (found := Path(model) / RESULTS_FILE).is_file():
        results_file = found
    scores = None if results_file is None else read_results(results_file)
    folder = find_run(model)
    run = None if folder is None else read_run(folder, Path(model).name)
    say_step(f"Loading {model}")
    given = {"dtype": dtype, "device_map": None, "attn_implementation": None, "quantization": o.Quantization.NONE}
    loaded = o.load_model(model, given)
    from pliant.models import export_merged

    say_step(f"Writing {output}", f"{len(loaded.edits)} edits go into the weights" if len(loaded.edits) else "")
    name = push_to_hub or output.resolve().name
    card = model_card(loaded, name, run=run, scores=scores, remote_code=remote_code)
    export_merged(loaded, output, remote_code=remote_code, card=card)
    _tell(output, needs_code=bool(loaded.spec.layers), has_code=remote_code)
    if push_to_hub is not None:
        from pliant.models.hub import push

        say_step(f"Uploading to {push_to_hub}")
        results.print(f"uploaded to {push(output, push_to_hub, private=private)}", markup=False, soft_wrap=True)


def _tell(output: Path, *, needs_code: bool, has_code: bool) -> None:
    """Says what is there, and how it is used."""
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    results.print(f"saved {output} ({bytes_text(size)})", markup=False, soft_wrap=True)
    if not (output / "tokenizer_config.json").exists():
        notes.print(f"no tokenizer was found; save one there: tokenizer.save_pretrained({str(output)!r})", markup=False)
    if has_code and not needs_code:
        notes.print("a dense model is one of its base's class and needs no code beside it", markup=False)
    place = shlex.quote(str(output))
    trusting = ",trust_remote_code=True" if has_code and needs_code else ""
    if needs_code and not has_code:
        command = f"pliant serve {place}"
    else:
        command = f"lm_eval --model hf --model_args pretrained={place}{trusting} --tasks piqa"
    results.print(f"Next:  {command}", markup=False, soft_wrap=True)
