"""``pliant info``: what a model is, and what converting it would add, without its weights."""

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pliant.cli import options as o
from pliant.cli.console import bytes_text, count_text, hush_transformers, results
from pliant.cli.convert import describe_layers
from pliant.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pliant.architectures.base import LayerConfig
    from pliant.conversion.summary import Summary


def info(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Model directory, hub id, smollm2-135m, or a shape such as llama-3.2-1b.",
        ),
    ],
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
    context: Annotated[
        int, typer.Option(min=1, help="Tokens that a token attends to, for the FLOPs of attention.")
    ] = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """Show a model's shape, and what converting it adds in parameters, memory and FLOPs.

    Needs a configuration only, never weights: the shapes llama-3.2-1b, llama-3.1-8b, qwen2.5-0.5b,
    -1.5b, -3b and -7b are shipped. Leaves nothing behind. Without form options it lists every
    preset; of a converted model it shows the layers that it has, and if these are routed the share
    of the tokens that enters each, and from which score on.

    \b
    pliant info llama-3.1-8b
    pliant info smollm2-135m --preset keyed --rank 192 --json
    """
    given = locals()  # every option by its name
    hush_transformers()
    forms = o.parse_forms(given)
    config = config_of(model)
    wanted = _wanted(model, config, forms)
    from pliant.conversion.summary import summarise

    summaries = {name: summarise(config, chosen, context=context) for name, chosen in wanted.items()}
    routing = _routing(model, config)
    if as_json:
        told = {**_as_json(model, summaries), **({"routing": routing} if routing else {})}
        typer.echo(json.dumps(told, indent=2))
        return
    _show(model, summaries)
    if routing:
        _show_routing(routing)


def config_of(name: str) -> "PreTrainedConfig":
    """Returns the configuration of a shape, a directory, the embedded base or a hub id."""
    from transformers import AutoConfig

    from pliant.models import SHAPES, resolve_base, shape_config

    if name.lower() in SHAPES:
        return shape_config(name)
    path = resolve_base(name)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model {name!r} must be a model directory, a reachable hub id or a shape ({', '.join(SHAPES)}): {error}"
        ) from error


def _wanted(name: str, config: "PreTrainedConfig", forms: o.Forms | None) -> dict[str, dict[int, "LayerConfig"]]:
    """Returns what to count: label → the form of each layer."""
    from pliant.architectures import NptConfig
    from pliant.architectures.npt.config import FORMS
    from pliant.models import PliantSpec

    own: Any = PliantSpec.of(config).layers
    if own and forms is not None:
        raise ConfigError(
            f"{name!r} is converted already ({describe_layers(own)}). Leave the form options out, or name its base."
        )
    if own:
        return {"as saved": dict(own)}
    if forms is not None:
        return {"as asked": dict(forms.resolve(config.num_hidden_layers))}
    # In a shape that is narrower than a preset's usual rank, the preset is shown at full rank.
    presets = {form: NptConfig.preset(form) for form in FORMS}
    for form, chosen in presets.items():
        if chosen.rank != "auto" and chosen.rank > config.hidden_size:
            presets[form] = chosen.with_rank(config.hidden_size)
    return {form: dict.fromkeys(range(config.num_hidden_layers), chosen) for form, chosen in presets.items()}


def _routing(name: str, config: "PreTrainedConfig") -> dict[str, Any] | None:
    """Returns architecture, capacity and threshold of the routed layers; the latter where weights are at hand."""
    from pliant.architectures import RoutedConfig
    from pliant.models import PliantSpec, resolve_base
    from pliant.models.checkpoint import saved_thresholds

    spec = PliantSpec.of(config)
    layers: dict[int, Any] = {i: c for i, c in sorted(spec.layers.items()) if isinstance(c, RoutedConfig)}
    if not layers:
        return None
    thresholds = saved_thresholds(resolve_base(name))
    return {
        "architecture": spec.architecture,
        "layers": {
            str(index): {
                **layer.to_dict(),
                **({"threshold": _finite(thresholds[index])} if index in thresholds else {}),
            }
            for index, layer in layers.items()
        },
    }


def _finite(threshold: float) -> float | None:
    """JSON has no −∞; ``None`` lets every token run."""
    return threshold if math.isfinite(threshold) else None


def _as_json(name: str, summaries: dict[str, "Summary"]) -> dict[str, Any]:
    first = next(iter(summaries.values())).to_dict()
    shared = [key for key in first if not key.startswith(("added", "is_", "layers"))]
    return {
        "model": name,
        **{key: first[key] for key in shared},
        "forms": [
            {
                "name": label,
                **{key: value for key, value in summary.to_dict().items() if key not in shared},
            }
            for label, summary in summaries.items()
        ],
    }


def _show(name: str, summaries: dict[str, "Summary"]) -> None:
    summary = next(iter(summaries.values()))
    base = Table(show_header=False, title=f"{name}: the base")
    base.add_row("family", summary.family)
    base.add_row("layers", str(summary.num_layers))
    base.add_row("d_model", f"{summary.d_model:,}")
    base.add_row("d_ffn", f"{summary.d_ffn:,}")
    base.add_row("parameters", f"{summary.base_parameters:,}")
    base.add_row(
        "memory",
        f"{bytes_text(summary.base_bf16_bytes)} bf16, {bytes_text(summary.base_nf4_bytes)} NF4",
    )
    base.add_row(
        "FLOPs a token",
        f"{count_text(summary.base_flops)} (attending to {summary.context:,} tokens)",
    )
    results.print(base)
    added = Table(title="what conversion adds")
    for column in ("form", "layers", "rank"):
        added.add_column(column)
    for column in ("parameters", "a layer", "of the base", "memory fp32", "FLOPs a token"):
        added.add_column(column, justify="right")
    for label, counted in summaries.items():
        added.add_row(*_added(label, counted))
    results.print(added)
    if any(counted.is_upper_bound for counted in summaries.values()):
        results.print("rank auto: known after calibration; ≤ is the count at full rank.")


def _show_routing(routing: dict[str, Any]) -> None:
    table = Table(title=f"routed layers, {routing['architecture']}")
    for column in ("layer", "capacity", "threshold"):
        table.add_column(column, justify="right")
    table.add_column("options")
    for index, layer in routing["layers"].items():
        options = {name: value for name, value in layer.items() if name not in ("capacity_gamma", "threshold")}
        table.add_row(
            index,
            f"{layer['capacity_gamma']:g}" if "capacity_gamma" in layer else "",
            threshold_text(layer["threshold"]) if "threshold" in layer else "",
            ", ".join(f"{name} {value}" for name, value in options.items()),
        )
    results.print(table)


def threshold_text(threshold: float | None) -> str:
    """A score in four digits; −∞ for ``None``."""
    return "−∞" if threshold is None or math.isinf(threshold) else f"{threshold:.4g}"


def _added(label: str, summary: "Summary") -> list[str]:
    """Returns the cells of one row."""
    most = "≤ " if summary.is_upper_bound else ""
    from pliant.conversion.summary import LayerSummary

    layers = list(summary.layers.values())
    forms = sorted({layer.form for layer in layers})
    told = [layer.rank for layer in layers if isinstance(layer, LayerSummary)]
    numbers = sorted({rank for rank in told if rank != "auto"})
    ranks = ["auto"] if summary.is_upper_bound else []
    if numbers:
        ranks.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}..{numbers[-1]}")
    per_layer = sorted({layer.parameters for layer in layers})
    span = f"{per_layer[0]:,}" if len(per_layer) == 1 else f"{per_layer[0]:,}..{per_layer[-1]:,}"
    return [
        "+".join(forms) if layers else label,
        str(len(layers)),
        ", ".join(ranks),
        f"{most}{summary.added_parameters:,}",
        f"{most}{span}",
        f"{most}{summary.added_parameters / summary.base_parameters:.2%}",
        f"{most}{bytes_text(summary.added_bytes)}",
        f"{most}{summary.added_flops / summary.base_flops:+.2%}",
    ]
