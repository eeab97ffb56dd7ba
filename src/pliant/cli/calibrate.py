"""``pliant calibrate``: how large a share of the tokens enters the routed layers of a saved model."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pliant.cli import options as o
from pliant.cli.console import progress_display, results, say_step
from pliant.cli.info import threshold_text
from pliant.errors import ConfigError


def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub id of a model with routed layers.")],
    target_capacity: Annotated[
        float | None,
        typer.Option(
            "--target-capacity", help="Share of the tokens to let in, in (0, 1]; default: the one that each layer has."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to set the thresholds on; default: embedded English texts.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to take from all over it, in windows of 512.")] = 8_192,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="New or empty folder for the result; default: MODEL itself is changed."),
    ] = None,
    dtype: o.DtypeOption = o.Dtype.AUTO,
    device_map: o.DeviceMapOption = None,
    quantization: o.QuantizationOption = o.Quantization.NONE,
    attn_implementation: o.AttentionOption = None,
) -> None:
    """Set the thresholds of routed layers so that a share of the tokens enters them.

    Needs a model with routed layers (pliant convert --architecture mod) and reads some text. Leaves
    new thresholds in the model's own files, all else in them as it was, or a copy in --output.

    \b
    pliant calibrate outputs/mod --target-capacity 0.25
    pliant calibrate outputs/mod --text essays.txt --output outputs/mod-essays
    """
    given = locals()  # every option by its name
    if output is not None:
        o.fresh_folder(output)
    elif not Path(model).is_dir():
        raise ConfigError(f"--output must be given where MODEL is no folder to write to; got {model!r}.")
    texts = None if text is None else [_read(text)]
    say_step(f"Loading {model}")
    loaded = o.load_model(model, given)
    shares = _calibrate(loaded, target_capacity, texts, tokens)
    _save(loaded, model, output)
    _show(loaded, shares, model if output is None else str(output))


def _read(file: Path) -> str:
    from pliant.data import read_text

    return read_text(file)


def _calibrate(model: Any, capacity: float | None, texts: list[str] | None, tokens: int) -> dict[int, float]:
    from pliant.conversion import calibrate as calibrate_model

    with progress_display() as progress:
        return calibrate_model(model, capacity, calibration=texts, num_tokens=tokens, progress=progress)


def _save(model: Any, name: str, output: Path | None) -> None:
    from pliant.models.checkpoint import find_delta, replace_buffers

    say_step(f"Saving to {output or name}")
    if output is None:
        replace_buffers(model, name)
    else:
        model.save_pretrained(output, delta=find_delta(name, {}) is not None)


def _show(model: Any, shares: dict[int, float], folder: str) -> None:
    table = Table(title=f"thresholds of {folder}")
    for column in ("layer", "capacity", "measured", "threshold"):
        table.add_column(column, justify="right")
    for index, layer in model.routed_layers.items():
        threshold = threshold_text(layer.router.threshold.item())
        table.add_row(str(index), f"{layer.capacity:g}", f"{shares[index]:.4f}", threshold)
    results.print(table)
