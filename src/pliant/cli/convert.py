"""``pliant convert``: a base in, a dynamic model directory out."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    typer.Option(
        help="UTF-8 text for the start of keyed forms and for the thresholds of routed layers; "
        "default: embedded English texts."
    ),
]
CalibrationTokensOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of it to read, in windows of 512; the last four are held out. "
        "Default: 32768, for routed layers 10240.",
    ),
]
ArchitectureOption = Annotated[
    str,
    typer.Option(
        help="npt rewrites weights token by token; mod, dtf and stt route tokens past layers.",
        rich_help_panel=o.FORM,
    ),
]
CapacityOption = Annotated[
    float | None,
    typer.Option(help="mod, dtf, stt: share of the tokens that enter a layer, 0.5 by default.", rich_help_panel=o.FORM),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="mod, dtf, stt: a field of the configuration, such as granularity=attention; again for each.",
        rich_help_panel=o.FORM,
    ),
]
DeltaOption = Annotated[
    bool,
    typer.Option("--delta", help="Save only what is added; loading it needs the same base again."),
]


def convert(
    base: BaseArgument,
    output: OutputOption,
    architecture: ArchitectureOption = "npt",
    capacity: CapacityOption = None,
    settings: SetOption = None,
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
    calibration_tokens: CalibrationTokensOption = None,
    delta: DeltaOption = False,
    dtype: o.DtypeOption = o.Dtype.AUTO,
    device_map: o.DeviceMapOption = None,
    quantization: o.QuantizationOption = o.Quantization.NONE,
    attn_implementation: o.AttentionOption = None,
) -> None:
    """Convert a base model into a dynamic one, without training.

    Needs a Llama, Mistral, Qwen2, Qwen3 or SmolLM3 causal LM; the keyed forms, and layers that let
    a share of the tokens in, also read some calibration text. Leaves an ordinary Hugging Face
    directory, tokenizer included. A routed architecture takes every second layer unless --layers
    says otherwise.

    \b
    pliant convert smollm2-135m --rank 192 --output outputs/keyed
    pliant convert smollm2-135m --architecture mod --capacity 0.5 --output outputs/mod
    pliant convert ./my-llama --map '0-9=v1,10-29=keyed:256' --delta -o outputs/mixed
    """
    given = locals()  # every option by its name
    o.fresh_folder(output)
    wanted = parse_wanted(given)
    if calibration is not None and not wanted.reads_text():
        raise ConfigError(
            "--calibration is for the keyed forms and for routed layers of a capacity below 1; what is asked for "
            "starts without text. Leave it out."
        )
    text = None if calibration is None else _read(calibration)
    say_step(f"Loading {base}")
    model = o.load_model(base, given)
    say_step(f"Converting {wanted.description}")
    windows = None
    if wanted.reads_text(model.config.hidden_size):
        windows = _windows(model, text, calibration_tokens or wanted.usual_tokens)
    predicted = _convert(model, wanted.by_selection, windows)
    say_step(f"Saving to {output}")
    model.save_pretrained(output, delta=delta)
    _show(base, model, predicted, output, delta=delta)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What layers are to become: selections of them, and their configurations, all of one architecture."""

    architecture: str
    by_selection: Mapping[str, Any]

    @property
    def is_routed(self) -> bool:
        """Whether tokens are routed past layers."""
        return self.architecture != "npt"

    def reads_text(self, d_model: int | None = None) -> bool:
        """Whether calibration text gives any layer its start: not at full rank, where the width is known."""
        configs = self.by_selection.values()
        if self.is_routed:
            return any(config.capacity_gamma < 1 for config in configs)
        return any(config.has_closed_form and config.rank != d_model for config in configs)

    @property
    def usual_tokens(self) -> int:
        """Tokens of calibration text that are read unless told otherwise."""
        from pliant.conversion import npt, routed

        return routed.CALIBRATION_TOKENS if self.is_routed else npt.CALIBRATION_TOKENS

    @property
    def description(self) -> str:
        """``layers all to keyed, rank 192``."""
        return "; ".join(
            f"layers {selection} to {self.architecture}, capacity {config.capacity_gamma}"
            if self.is_routed
            else f"layers {selection} to {config.form}, rank {config.rank}"
            for selection, config in self.by_selection.items()
        )


def parse_wanted(given: Mapping[str, Any]) -> Wanted:
    """Returns what the options ask for; every layer ``keyed`` with automatic rank, if they say nothing.

    Args:
        given: The arguments of a command, by name: ``architecture``, ``capacity``, ``settings`` and those that
            ``options.parse_forms`` reads.
    """
    from pliant.architectures import ARCHITECTURES
    from pliant.architectures.base import nearest

    name = given["architecture"]
    known = tuple(name for name, row in ARCHITECTURES.items() if row.config is not None)
    if name not in known:
        raise ConfigError(f"--architecture must be one of {', '.join(known)}; got {name!r}.{nearest(name, known)}")
    if name == "npt":
        for option, value in (("--capacity", given["capacity"]), ("--set", given["settings"])):
            if value:
                raise ConfigError(
                    f"{option} is for architectures that route tokens ({', '.join(known[1:])}); got --architecture "
                    f"npt. Name one of them, or leave {option} out."
                )
        forms = o.parse_forms(given) or o.default_forms()
        return Wanted(architecture=name, by_selection=forms.by_selection)
    for field in (*o.FORM_FIELDS, "preset", "rank", "tied", "mapping"):
        if given[field]:
            option = "map" if field == "mapping" else field.replace("_", "-")
            raise ConfigError(
                f"--{option} is for --architecture npt; got {name}. Leave it out: --layers chooses layers, and --set "
                f"the fields of {name}."
            )
    fields = parse_settings(given["settings"] or ())
    if given["capacity"] is not None:
        if "capacity_gamma" in fields:
            raise ConfigError("--capacity and --set capacity_gamma are the same field. Give one of them.")
        fields["capacity_gamma"] = given["capacity"]
    config_class = ARCHITECTURES[name].config
    assert config_class is not None
    return Wanted(architecture=name, by_selection={given["layers"] or "alternate": config_class.from_dict(fields)})


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """``["granularity=attention", "prior_factor=0.125"]`` → field names and values: of JSON, else as they stand."""
    fields: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise typer.BadParameter(
                f"must be written like granularity=attention; got {setting!r}.", param_hint="--set"
            )
        if name in fields:
            raise typer.BadParameter(f"names {name!r} twice.", param_hint="--set")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def _read(file: Path) -> str:
    from pliant.data import read_text

    return read_text(file)


def _windows(model: Any, text: str | None, num_tokens: int) -> "Tensor":
    """Returns windows of the text given, or of the embedded ones."""
    from pliant.cli.generation import tokenizer_of
    from pliant.data import calibration_tokens

    return calibration_tokens(tokenizer_of(model), text, num_tokens=num_tokens)


def _convert(model: Any, by_selection: Mapping[str, Any], windows: "Tensor | None") -> "Comparison | None":
    """Converts in place; returns what it cost on the held-out windows, if there are any."""
    from pliant.conversion import convert as convert_model
    from pliant.metrics import compare_to_base
    from pliant.statistics import HELD_OUT_WINDOWS

    with progress_display() as progress:
        convert_model(model, layers=by_selection, calibration=windows, progress=progress)
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
    """``0-9 v1 rank 16; 10-29 keyed rank 180..201``: neighbours of one form together; ``1,3 mod capacity 0.5``."""
    if not all(hasattr(config, "form") for config in layers.values()):
        return _describe_routed(layers)
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


def _describe_routed(layers: Mapping[int, Any]) -> str:
    """Layers of one configuration together; those that only decide for the next are left out."""
    from pliant.models.spec import architecture_of

    groups: dict[str, list[int]] = {}
    for index, config in sorted(layers.items()):
        fields = config.to_dict()
        if fields.pop("role", None) is None:
            told = [f"capacity {fields.pop('capacity_gamma')}", *(f"{name} {value}" for name, value in fields.items())]
            groups.setdefault(f"{architecture_of(config)} {', '.join(told)}", []).append(index)
    return "; ".join(f"{','.join(map(str, indices))} {told}" for told, indices in groups.items())


def _span(numbers: list[int], dash: str = "-") -> str:
    first, last = numbers[0], numbers[-1]
    return str(first) if first == last else f"{first}{dash}{last}"
