"""``pliant convert``: a base in, a dynamic model directory out."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pliant.cli import options as o
from pliant.cli.console import bytes_text, progress_display, results, say_step
from pliant.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.metrics import Comparison

BaseArgument = Annotated[str, typer.Argument(metavar="BASE", help="Model directory, hub id, or smollm2-135m.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="New or empty folder for the result.")]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(help="UTF-8 text for the start of keyed forms; default: embedded English texts."),
]
CalibrationTokensOption = Annotated[
    int,
    typer.Option(min=1, help="Tokens of it to read, in windows of 512; the last four are held out."),
]
DeltaOption = Annotated[
    bool,
    typer.Option("--delta", help="Save only what is added; loading it needs the same base again."),
]


def convert(
    base: BaseArgument,
    output: OutputOption,
    preset: o.PresetOption = None,
    rank: o.RankOption = None,
    energy: o.EnergyOption = None,
    allocation: o.AllocationOption = None,
    tied: o.TiedOption = False,
    modulation: o.ModulationOption = None,
    targets: o.TargetsOption = None,
    num_updates: o.UpdatesOption = None,
    regulariser: o.RegulariserOption = None,
    layers: o.LayersOption = None,
    mapping: o.MapOption = None,
    calibration: CalibrationOption = None,
    calibration_tokens: CalibrationTokensOption = 32_768,
    delta: DeltaOption = False,
    dtype: o.DtypeOption = o.Dtype.AUTO,
    device_map: o.DeviceMapOption = None,
    quantization: o.QuantizationOption = o.Quantization.NONE,
    attn_implementation: o.AttentionOption = None,
) -> None:
    """Convert a base model into a dynamic one, without training.

    Needs a Llama, Mistral, Qwen2, Qwen3 or SmolLM3 causal LM; the keyed forms also read some
    calibration text. Leaves an ordinary Hugging Face directory, tokenizer included.

    \b
    pliant convert smollm2-135m --rank 192 --output outputs/keyed
    pliant convert ./my-llama --map '0-9=v1,10-29=keyed:256' --delta -o outputs/mixed
    """
    given = locals()  # every option by its name
    o.fresh_folder(output)
    forms = o.parse_forms(given) or o.default_forms()
    if calibration is not None and not forms.needs_calibration:
        raise ConfigError("--calibration is for the keyed forms; the form asked for starts without text. Leave it out.")
    text = None if calibration is None else _read(calibration)
    say_step(f"Loading {base}")
    model = o.load_model(base, given)
    say_step(f"Converting {_describe(forms)}")
    windows = _windows(model, text, calibration_tokens) if _is_lossy(forms, model) else None
    predicted = _convert(model, forms, windows)
    say_step(f"Saving to {output}")
    model.save_pretrained(output, delta=delta)
    _show(base, model, predicted, output, delta=delta)


def _describe(forms: o.Forms) -> str:
    return "; ".join(
        f"layers {selection} to {config.form}, rank {config.rank}" for selection, config in forms.by_selection.items()
    )


def _is_lossy(forms: o.Forms, model: Any) -> bool:
    """Whether a closed form below full rank is asked for: only that reads calibration text."""
    configs = forms.by_selection.values()
    return any(config.has_closed_form and config.rank != model.config.hidden_size for config in configs)


def _read(file: Path) -> str:
    from pliant.data import read_text

    return read_text(file)


def _windows(model: Any, text: str | None, num_tokens: int) -> "Tensor":
    """Returns windows of the text given, or of the embedded ones."""
    from pliant.cli.generation import tokenizer_of
    from pliant.data import calibration_tokens, token_windows

    tokenizer = tokenizer_of(model)
    if text is None:
        return calibration_tokens(tokenizer, num_tokens=num_tokens)
    return token_windows(text, tokenizer, num_tokens=num_tokens)


def _convert(model: Any, forms: o.Forms, windows: "Tensor | None") -> "Comparison | None":
    """Converts in place; returns what it cost on the held-out windows, if there are any."""
    from pliant.conversion import convert as convert_model
    from pliant.metrics import compare_to_base
    from pliant.statistics import HELD_OUT_WINDOWS

    with progress_display() as progress:
        convert_model(model, layers=forms.by_selection, calibration=windows, progress=progress)
        if windows is None:
            return None
        return compare_to_base(model, windows[-HELD_OUT_WINDOWS:])


def _show(base: str, model: Any, predicted: "Comparison | None", output: Path, *, delta: bool) -> None:
    """Prints the summary table and the next command to type."""
    added = sum(p.numel() for _, p in model.dynamic_parameters())
    total = model.num_parameters()  # counts what is quantised as if it were not
    table = Table(show_header=False, title="converted")
    table.add_row("base", base)
    table.add_row("layers", describe_layers(model.spec.layers))
    table.add_row(
        "parameters added",
        f"{added:,} ({added / (total - added):.2%} of the base)",
    )
    if predicted is not None:
        table.add_row(
            "predicted perplexity",
            f"{predicted.ratio:.3f} times the base's; the same likeliest token at "
            f"{predicted.agreement:.1%} of positions (held-out calibration text)",
        )
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    table.add_row("saved", f"{output} ({'delta' if delta else 'full model'}, {bytes_text(size)})")
    results.print(table)
    results.print(
        f'Next:  pliant generate {shlex.quote(str(output))} --prompt "The capital of France is" --base',
        markup=False,
        soft_wrap=True,
    )


def describe_layers(layers: Mapping[int, Any]) -> str:
    """``0-9 v1 rank 16; 10-29 keyed rank 180..201``: neighbouring layers of one form together."""
    groups: list[tuple[str, list[int], list[int]]] = []
    for index, config in sorted(layers.items()):
        if groups and groups[-1][0] == config.form and groups[-1][1][-1] == index - 1:
            groups[-1][1].append(index)
            groups[-1][2].append(config.rank)
        else:
            groups.append((config.form, [index], [config.rank]))
    return "; ".join(
        f"{_span(indices)} {form} rank {_span([min(ranks), max(ranks)], '..')}" for form, indices, ranks in groups
    )


def _span(numbers: list[int], dash: str = "-") -> str:
    first, last = numbers[0], numbers[-1]
    return str(first) if first == last else f"{first}{dash}{last}"
