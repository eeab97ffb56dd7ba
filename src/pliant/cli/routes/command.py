"""``pliant routes``: which token ran in which layer of a routed model, and by how much it did or did not."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import set_cell_size
from rich.text import Text

from pliant.cli import options as o
from pliant.cli.console import results, say_step, shortened
from pliant.cli.token_grid import (
    SHOWN_TOKENS,
    Token,
    blocks,
    colours_of,
    cropped,
    far_of,
    numbers,
    strength,
    token_texts,
)
from pliant.errors import ConfigError, DataError

if TYPE_CHECKING:
    pass

SUFFIXES = (".png", ".html")
RAN, SKIPPED = "█", "·"


def routes(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a model with routed layers.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to run.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="UTF-8 text file; all of it is run.")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=0, help="Tokens that the model writes first, greedily, and are run too.")
    ] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Picture to write in place of the terminal: .png or .html.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print tokens, scores and shares as JSON.")] = False,
    dtype: o.DtypeOption = o.Dtype.AUTO,
    device_map: o.DeviceMapOption = None,
    quantization: o.QuantizationOption = o.Quantization.NONE,
    attn_implementation: o.AttentionOption = None,
) -> None:
    """Show which token ran in which layer.

    Needs a model with routed layers (pliant convert --architecture mod), and a text. Leaves nothing
    behind but the picture that --output names: tokens by layers, each that ran coloured by how far
    its score lies above the layer's threshold.

    \b
    pliant routes outputs/mod --prompt "The capital of France is" --new-tokens 8
    pliant routes outputs/mod --prompt-file essay.txt --output outputs/routes.html
    """
    given = locals()  # every option by its name
    text = o.prompt_text(prompt, prompt_file)
    if output is not None:
        _check_output(output)
    if not as_json:
        say_step(f"Loading {model}")
    found = trace(o.load_model(model, given), text, new_tokens)
    if output is not None:
        from pliant.cli.routes.pictures import draw_html, draw_png

        (draw_png if output.suffix.lower() == ".png" else draw_html)(found, model, output)
        if not as_json:
            say_step(f"Wrote {output}")
    if as_json:
        typer.echo(json.dumps({"model": model, "prompt": text, **found.to_dict()}, indent=2, ensure_ascii=False))
    elif output is not None:
        results.print(found.summary, markup=False, soft_wrap=True)
    else:
        for line in rendered(found, results.width, colours_of(results.color_system)):
            results.print(line, soft_wrap=True)


def _check_output(file: Path) -> None:
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--output must end in {' or '.join(SUFFIXES)}; got {str(file)!r}. Choose one of them.")
    if not file.parent.is_dir():
        raise ConfigError(
            f"--output must lie in a folder that is there; {str(file.parent)!r} is not. Make it, or choose another."
        )
    if file.is_dir():
        raise ConfigError(f"--output must be a file; {str(file)!r} is a folder. Choose another name.")


@dataclass(frozen=True, kw_only=True)
class RoutedLayerTrace:
    """What one routed layer did: a value for each token.

    Attributes:
        threshold: τ; a token runs if its score reaches it, the first in any case.
        scores: What is held against τ.
        gates: φ.
        runs: Which tokens ran.
    """

    threshold: float
    scores: Sequence[float]
    gates: Sequence[float]
    runs: Sequence[bool]

    @property
    def share(self) -> float:
        """Share of the tokens that ran."""
        return sum(self.runs) / len(self.runs)

    def margin(self, position: int) -> float:
        """How far a score lies above τ, or below; infinite where every token runs."""
        return self.scores[position] - self.threshold


@dataclass(frozen=True, kw_only=True)
class Routes:
    """Which token ran in which layer.

    Attributes:
        tokens: The tokens of the text, in order.
        num_layers: Decoder layers; those without a trace run every token.
        layers: Layer index → what that routed layer did.
        kv_kept: Keys and values that a cache holds after the text, over those of the dense model.
        linear_flops: Operations of the linear maps in the layers over those of the dense model: a routed part counts
            by the share of the tokens that ran, all else in full, and every parameter that conversion added on top.
    """

    tokens: Sequence[Token]
    num_layers: int
    layers: Mapping[int, RoutedLayerTrace]
    kv_kept: float
    linear_flops: float

    @property
    def share(self) -> float:
        """Share of the tokens that ran, over the routed layers."""
        return sum(layer.share for layer in self.layers.values()) / len(self.layers)

    @property
    def far(self) -> float:
        """The margin from which on a colour is the strongest; 0 if no margin is above 0, or none is finite."""
        margins = sorted(
            margin
            for layer in self.layers.values()
            for position, runs in enumerate(layer.runs)
            if runs and 0 < (margin := layer.margin(position)) < math.inf
        )
        return far_of(margins)

    @property
    def title(self) -> str:
        """How much there is to see."""
        written = sum(token.is_new for token in self.tokens)
        new = f" ({written} of them new)" if written else ""
        return f"{len(self.tokens)} tokens{new} × {len(self.layers)} routed layers of {self.num_layers}"

    @property
    def summary(self) -> str:
        """What the model saves on this text."""
        return (
            f"ran {self.share:.1%} in routed layers · KV kept {self.kv_kept:.1%} · "
            f"linear FLOPs {self.linear_flops:.1%} of dense"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON values; what is infinite is null."""
        return {
            "tokens": [{"id": token.id, "text": token.text, "is_new": token.is_new} for token in self.tokens],
            "num_layers": self.num_layers,
            "layers": {
                str(index): {
                    "threshold": _finite(layer.threshold),
                    "share": layer.share,
                    "scores": [_finite(score) for score in layer.scores],
                    "gates": [_finite(gate) for gate in layer.gates],
                    "runs": list(layer.runs),
                }
                for index, layer in self.layers.items()
            },
            "share": self.share,
            "kv_kept": self.kv_kept,
            "linear_flops": self.linear_flops,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def trace(model: Any, prompt: str, new_tokens: int = 0) -> Routes:
    """Runs a text, and what the model writes after it, in one forward.

    Raises:
        ConfigError: The model has no routed layers.
        DataError: The text is too long, or there is no tokenizer.
    """
    import torch

    from pliant.cli.generation import Sampling, complete, encode, tokenizer_of

    if all(getattr(layer, "router", None) is None for layer in model.dynamic_layers.values()):
        raise ConfigError(
            f"model must have routed layers; {model.config._name_or_path!r} has none. Convert its base with "
            "'pliant convert --architecture mod'."
        )
    tokenizer = tokenizer_of(model)
    ids = encode(tokenizer, prompt)
    length, longest = ids.shape[1], model.config.max_position_embeddings
    if length + new_tokens > longest:
        raise DataError(
            f"prompt and new tokens must fit the model's {longest} positions; got {length} + {new_tokens} tokens. "
            "Shorten the prompt, or lower --new-tokens."
        )
    if new_tokens:
        new = complete(model, tokenizer, ids, Sampling(max_new_tokens=new_tokens)).token_ids
        ids = torch.cat((ids, torch.tensor([new], dtype=ids.dtype)), dim=1)
    with torch.inference_mode(), model.report() as report:
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    layers = {
        index: RoutedLayerTrace(
            threshold=float(model.dynamic_layers[index].router.threshold),
            scores=layer.routing.scores[0].float().tolist(),
            gates=layer.routing.gate[0].float().tolist(),
            runs=layer.routing.runs[0].tolist(),
        )
        for index, layer in report.layers.items()
        if layer.routing is not None
    }
    tokens = [
        Token(id=token, text=text, is_new=position >= length)
        for position, (token, text) in enumerate(zip(ids[0].tolist(), token_texts(tokenizer, ids), strict=True))
    ]
    return Routes(
        tokens=tokens,
        num_layers=len(model.model.layers),
        layers=layers,
        kv_kept=_kv_kept(model, layers),
        linear_flops=_linear_flops(model, layers),
    )


def _kv_kept(model: Any, layers: Mapping[int, RoutedLayerTrace]) -> float:
    dynamic, count = model.dynamic_layers, len(model.model.layers)
    saved = sum(1 - layer.share for index, layer in layers.items() if dynamic[index].keeps_keys)
    return 1 - saved / count


def _linear_flops(model: Any, layers: Mapping[int, RoutedLayerTrace]) -> float:
    dense, saved = 0, 0.0
    for index, block in enumerate(model.model.layers):
        attention, mlp = _weights(block.self_attn), _weights(block.mlp)
        dense += attention + mlp
        if index in layers:
            routed = {"block": attention + mlp, "attention": attention, "mlp": mlp}[block.part]
            saved += (1 - layers[index].share) * routed
    added = sum(parameter.numel() for _, parameter in model.dynamic_parameters())
    return (dense - saved + added) / dense


def _weights(module: Any) -> int:
    """Weights of the base's linear maps; packed ones do not tell by their tensors."""
    from pliant.architectures import AddedModule

    if isinstance(module, AddedModule):
        return 0
    own = module.in_features * module.out_features if hasattr(module, "in_features") else 0
    return own + sum(_weights(child) for child in module.children())


def told(found: Routes, layer: int, position: int) -> str:
    """What one layer did with one token, in words."""
    start = f"token {shortened(repr(found.tokens[position].text))} · layer {layer}"
    if (routed := found.layers.get(layer)) is None:
        return f"{start} · dense"
    score, threshold = routed.scores[position], routed.threshold
    relation = "≥" if score >= threshold else "<"
    shown = "−∞" if threshold == -math.inf else f"{threshold:.3g}"
    outcome = "ran" if routed.runs[position] else "skipped"
    return f"{start} · score {score:.3g} {relation} τ {shown} · {outcome}"


def rendered(found: Routes, width: int, colours: Sequence[str] = ()) -> Iterator[Text]:
    """Yields the lines of the picture for a terminal of ``width`` columns.

    Layers that do not fit beside each other come in a further block below.
    """
    yield Text(found.title, style="bold")
    for indices, label_width, cell in blocks(found.tokens, list(found.layers), width):
        yield Text()
        yield from _block(found, indices, label_width, cell, colours)
    if (more := len(found.tokens) - SHOWN_TOKENS) > 0:
        yield Text(f"… and {more} more tokens, which the shares count; --output FILE.html shows all", style="dim")
    yield Text()
    yield _legend(colours)
    yield Text(found.summary)


def _block(found: Routes, indices: list[int], label_width: int, cell: int, colours: Sequence[str]) -> Iterator[Text]:
    layers, far = [found.layers[index] for index in indices], found.far
    blank = " " * (label_width + 1)
    for row in numbers(indices, cell):
        yield Text(f"{blank}{row}".rstrip(), style="bold")
    for position, token in enumerate(found.tokens[:SHOWN_TOKENS]):
        if token.is_new and not found.tokens[position - 1].is_new:
            yield Text("new:", style="dim")
        line = Text(set_cell_size(cropped(token.label, label_width), label_width) + " ")
        for layer in layers:
            if layer.runs[position]:
                level = int(strength(layer.margin(position), far) * len(colours))
                block = RAN * max(1, cell - 1)
                line.append(block, style=colours[min(level, len(colours) - 1)] if colours else None)
                line.append(" " * (cell - len(block)))
            else:
                line.append(f"{SKIPPED:<{cell}}", style="dim")
        line.rstrip()
        yield line
    shares = [round(100 * layer.share) for layer in layers]
    for number, row in enumerate(numbers(shares, cell)):
        yield Text(f"{'ran, %' if not number else '':<{label_width}} {row}".rstrip(), style="bold")


def _legend(colours: Sequence[str]) -> Text:
    legend = Text(f"{RAN} ran   ")
    legend.append(SKIPPED, style="dim")
    legend.append(" skipped")
    if colours:
        legend.append("   score above the threshold: a little ")
        for colour in colours:
            legend.append(RAN * 2, style=colour)
        legend.append(" a lot")
    return legend
