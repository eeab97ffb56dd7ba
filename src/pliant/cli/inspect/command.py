"""``pliant inspect``: which tokens rewrote which layers, by how much, and towards which words."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import options as o
from pliant.cli.console import hush_transformers, results, say_step
from pliant.cli.info import config_of
from pliant.cli.inspect.records import nothing_to_inspect, tokens_are_routed
from pliant.cli.options import prompt_text
from pliant.cli.token_grid import colours_of
from pliant.errors import ConfigError

if TYPE_CHECKING:
    from pliant.cli.inspect.records import Inspection


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a converted model, or of an edited one.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to run.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="UTF-8 text file; all of it is run.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", min=0, help="Look at this layer only, token by token.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Page to write in place of the terminal: .html.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print norms, words and directions as JSON.")] = False,
    dtype: o.DtypeOption = o.Dtype.AUTO,
    device_map: o.DeviceMapOption = None,
    quantization: o.QuantizationOption = o.Quantization.NONE,
    attn_implementation: o.AttentionOption = None,
) -> None:
    """Show which tokens rewrote which layers.

    Needs a model whose layers rewrite their MLPs (pliant convert), or a dense one with edits (pliant
    consolidate), and a text. Leaves nothing behind but the page that --output names: tokens by layers,
    coloured by the size of the rewrite; a cell says its directions and the words that it writes towards.

    \b
    pliant inspect outputs/keyed --prompt "The capital of France is"
    pliant inspect outputs/keyed --prompt-file essay.txt --output outputs/inspect.html
    pliant inspect outputs/keyed --prompt "The capital of France is" --layer 20 --json
    """
    given = locals()  # every option by its name
    text = prompt_text(prompt, prompt_file)
    if output is not None:
        from pliant.cli.page import check_page

        check_page(output)
    _check_model(model, layer)
    if not as_json:
        say_step(f"Loading {model}")
    loaded = o.load_model(model, given)
    from pliant.cli.inspect.model import inspect_model

    found = inspect_model(loaded, text, layer=layer)
    if output is not None:
        _write(found, model, text, output)
        if not as_json:
            say_step(f"Wrote {output}")
    if as_json:
        told = {"model": model, "prompt": text, **found.to_dict()}
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
    elif output is None:
        from pliant.cli.inspect.pictures import rendered

        for line in rendered(found, results.width, colours_of(results.color_system)):
            results.print(line, soft_wrap=True)


def _check_model(name: str, layer: int | None) -> None:
    """Refuses what the files beside the weights show to be wrong, before those are read."""
    hush_transformers()
    from pliant.architectures import RoutedConfig
    from pliant.models import PliantSpec, resolve_base
    from pliant.models.ledger_file import find_edits

    config: Any = config_of(name)
    layers = PliantSpec.of(config).layers
    if any(isinstance(own, RoutedConfig) for own in layers.values()):
        raise tokens_are_routed(name)
    if not layers and find_edits(resolve_base(name), {}) is None:
        raise nothing_to_inspect(name)
    if layer is not None and layer >= config.num_hidden_layers:
        raise ConfigError(
            f"--layer must be in 0..{config.num_hidden_layers - 1}; got {layer}. Leave it out for all layers."
        )


def _write(found: "Inspection", name: str, text: str, output: Path) -> None:
    from pliant.cli.inspect.pictures import sections
    from pliant.cli.page import write_page

    write_page(output, name, sections(found), subtitle=f"“{text}”", kicker="pliant inspect")
