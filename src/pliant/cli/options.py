"""Options that several commands share, and what they mean to the library.

A command declares those it takes in its signature and hands all its arguments on to ``parse_forms``
and ``load_model``, which read theirs by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli.console import hush_transformers
from pliant.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from pliant.architectures import NptConfig

FORM, LOADING, SAMPLING = "Form", "Loading", "Sampling"
SHOWN_FILES = 3


class Dtype(StrEnum):
    """What the base is held in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Quantization(StrEnum):
    """How the base is quantised while it is loaded; what conversion adds stays fp32."""

    NONE = "none"
    NF4 = "nf4"
    INT8 = "int8"


def _form(name: str, help_: str, **options: Any) -> Any:
    return typer.Option(name, help=help_, rich_help_panel=FORM, **options)


PresetOption = Annotated[
    str | None,
    _form("--preset", "keyed (default), keyed_pre, v1, v1_single, v2 or outer."),
]
RankOption = Annotated[
    str | None,
    _form(
        "--rank",
        "Bottleneck width, 1 to d_model, or auto. Default: 16 (v1, v2), 64 (outer), auto (keyed).",
    ),
]
EnergyOption = Annotated[
    float | None,
    _form("--energy", "keyed, rank auto: share of the attention output to keep, 0.99 by default."),
]
AllocationOption = Annotated[
    str | None,
    _form(
        "--allocation",
        "keyed, given rank: uniform (default), or sensitivity, which spreads it over layers.",
    ),
]
TiedOption = Annotated[bool, _form("--tied", "keyed: one factor for both directions, half the parameters.")]
ModulationOption = Annotated[str | None, _form("--modulation", "v2: additive, multiplicative or both (default).")]
TargetsOption = Annotated[
    str | None, _form("--targets", "outer: projections to rewrite, gate (default), gate_up or all.")
]
UpdatesOption = Annotated[int | None, _form("--num-updates", "outer: rank-1 updates per projection, 1 by default.")]
RegulariserOption = Annotated[
    str | None,
    _form("--regulariser", "Penalty for training: frobenius (default), factors or effect."),
]
LayersOption = Annotated[
    str | None,
    _form(
        "--layers",
        "all (default of npt), alternate (every other one; default of mod, dtf, stt), cheapest (mod, dtf, stt: those "
        "that the base does best without), upper_half, lower_half, a range such as 8-15, or indices: 0,4,8-11.",
    ),
]
MapOption = Annotated[
    str | None,
    _form(
        "--map",
        "Several forms at once, in place of the options above: 0-9=v1,10-29=keyed:192 (form:rank).",
    ),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="auto is the checkpoint's own.", rich_help_panel=LOADING)]
DeviceMapOption = Annotated[
    str | None,
    typer.Option("--device-map", help="auto, cpu, cuda:0, …; default: the CPU.", rich_help_panel=LOADING),
]
QuantizationOption = Annotated[
    Quantization,
    typer.Option("--quantization", help="Needs bitsandbytes.", rich_help_panel=LOADING),
]
AttentionOption = Annotated[
    str | None,
    typer.Option("--attn-implementation", help="sdpa, eager, flash_attention_2, …", rich_help_panel=LOADING),
]
TemperatureOption = Annotated[
    float,
    typer.Option(min=0.0, help="0 takes the likeliest token each time.", rich_help_panel=SAMPLING),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        help="Nucleus; needs a temperature above 0.",
        rich_help_panel=SAMPLING,
    ),
]
SeedOption = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=SAMPLING)]


@dataclass(frozen=True, kw_only=True)
class Forms:
    """The forms asked for: selections of layers such as ``"0-9"``, and their configurations."""

    by_selection: Mapping[str, "NptConfig"]

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration text gives any of the forms its start."""
        return any(config.has_closed_form for config in self.by_selection.values())

    def resolve(self, num_layers: int) -> dict[int, "NptConfig"]:
        """Returns the configuration of each layer of a model of ``num_layers``."""
        from pliant.models import select_layers

        resolved: dict[int, NptConfig] = {}
        for selection, config in self.by_selection.items():
            for index in select_layers(selection, num_layers):
                if index in resolved:
                    raise ConfigError(f"--map must name each layer once; {selection!r} repeats layer {index}.")
                resolved[index] = config
        return resolved


FORM_FIELDS = ("energy", "allocation", "modulation", "targets", "num_updates", "regulariser")


def parse_forms(given: Mapping[str, Any]) -> Forms | None:
    """Returns what the form options ask for; ``None`` if none was given.

    Args:
        given: The arguments of a command, by name:
            those of ``FORM_FIELDS``, ``preset``, ``rank``, ``tied``, ``layers`` and ``mapping``.
    """
    from pliant.architectures import NptConfig

    fields = {name: given[name] for name in FORM_FIELDS if given[name] is not None}
    if given["rank"] is not None:
        fields["rank"] = parse_rank(given["rank"])
    if given["tied"]:
        fields["tied"] = True
    preset, layers = given["preset"], given["layers"]
    if given["mapping"] is not None:
        if preset is not None or layers is not None or fields:
            raise typer.BadParameter(
                "the map names each layer's form; leave out the other form options.",
                param_hint="--map",
            )
        return Forms(by_selection=parse_map(given["mapping"]))
    if preset is None and layers is None and not fields:
        return None
    return Forms(by_selection={layers or "all": NptConfig.preset(preset or "keyed", **fields)})


def default_forms() -> Forms:
    """Every layer ``keyed`` with automatic rank."""
    from pliant.architectures import NptConfig

    return Forms(by_selection={"all": NptConfig()})


def parse_rank(text: str) -> int | str:
    """Returns ``"auto"`` or the number that ``text`` says."""
    if text == "auto":
        return text
    if not text.isdecimal():
        raise typer.BadParameter(f"must be auto or an integer in 1..d_model; got {text!r}.", param_hint="--rank")
    return int(text)


def parse_map(text: str) -> dict[str, "NptConfig"]:
    """``"0-3,8=v1,10-29=keyed:192"`` → ``{"0-3,8": v1, "10-29": keyed with rank 192}``."""
    from pliant.architectures import NptConfig

    forms: dict[str, NptConfig] = {}
    waiting: list[str] = []
    for part in text.split(","):
        selection, equals, form = (piece.strip() for piece in part.partition("="))
        waiting.append(selection)
        if not equals:
            continue
        name, _, rank = form.partition(":")
        key = ",".join(waiting)
        if key in forms:
            raise typer.BadParameter(f"names {key!r} twice.", param_hint="--map")
        forms[key] = NptConfig.preset(name, **({"rank": parse_rank(rank)} if rank else {}))
        waiting = []
    if waiting:
        raise typer.BadParameter(
            f"must be written like 0-9=v1,10-29=keyed:192; {','.join(waiting)!r} has no form.",
            param_hint="--map",
        )
    return forms


def check_sampling(temperature: float, top_p: float | None) -> None:
    """Refuses a nucleus that would have no effect."""
    if top_p is not None and temperature == 0.0:
        raise typer.BadParameter("needs a --temperature above 0.", param_hint="--top-p")


def load_model(name: str, given: Mapping[str, Any]) -> Any:
    """Loads a model as the loading options say.

    Args:
        name: Directory, hub id or embedded base.
        given: The arguments of a command, by name:
            ``dtype``, ``device_map``, ``quantization`` and ``attn_implementation``.
    """
    hush_transformers()
    from pliant.models import load

    options = {key: given[key] for key in ("device_map", "attn_implementation") if given[key] is not None}
    if given["quantization"] is not Quantization.NONE:
        options["quantization_config"] = _quantization_config(given["quantization"])
    return load(name, dtype=given["dtype"].value, **options).eval()


def _quantization_config(quantization: Quantization) -> Any:
    from importlib.util import find_spec

    import torch
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"--quantization {quantization} needs the package bitsandbytes, which is not "
            "installed: pip install bitsandbytes"
        )
    if quantization is Quantization.INT8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def fresh_folder(path: Path, option: str = "--output") -> Path:
    """Returns ``path`` if a model can be written there without touching anything of anyone's.

    Raises:
        CheckpointError: It is a file, or a folder with something in it.
    """
    if path.is_file():
        raise CheckpointError(f"{option} must be a folder; {str(path)!r} is a file. Choose another name.")
    if path.is_dir() and (there := sorted(entry.name for entry in path.iterdir())):
        shown = ", ".join(there[:SHOWN_FILES]) + (", …" if len(there) > SHOWN_FILES else "")
        raise CheckpointError(
            f"{option} must be a new or an empty folder; {str(path)!r} holds {shown}. Choose another, or empty it."
        )
    return path


def prompt_text(given: str | None, file: Path | None) -> str:
    """Returns the text of ``--prompt`` or ``--prompt-file``.

    Raises:
        BadParameter: Neither or both are given.
        DataError: It holds nothing but white space, or the file cannot be read.
    """
    from pliant.data import read_text

    if (given is None) == (file is None):
        raise typer.BadParameter("give one text, here or in a --prompt-file.", param_hint="--prompt")
    text = given if file is None else read_text(file).rstrip("\r\n")
    assert text is not None
    if not text.strip():
        raise DataError(f"--prompt must hold some text; got {text!r}. Write what the model is to read.")
    return text
