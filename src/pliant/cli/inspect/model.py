"""Reads what a model's layers write for each token of a text, in one forward."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pliant.architectures import LayerReport
from pliant.architectures.npt.modulation import GateModulation, Modulation, OuterModulation
from pliant.cli.generation import encode, tokenizer_of
from pliant.cli.inspect.lens import TINY, nearest_words
from pliant.cli.inspect.records import (
    EDITS,
    KEYED,
    MODULATION,
    Direction,
    Inspection,
    LayerInspection,
    Word,
    nothing_to_inspect,
    tokens_are_routed,
)
from pliant.cli.token_grid import Token, token_texts
from pliant.errors import ConfigError, DataError
from pliant.models.consolidate_weights import squared_norm
from pliant.models.ledger import stacked, summed_scale
from pliant.statistics import input_device

DIRECTIONS = 3
"""Directions that are told of a cell."""
MOST_READ = 4096
"""Cells that go through the LM head: the strongest ones."""
MlpInput = Float[Tensor, "1 tokens d_model"]


@dataclass(kw_only=True)
class _Found:
    """What is known of a layer before the words are looked for; ``written`` is (tokens, d_model)."""

    form: str
    projections: Sequence[str]
    norms: Float[Tensor, " tokens"]
    sizes: Float[Tensor, " tokens"]
    written: Float[Tensor, "tokens d_model"]
    directions: list[list[Direction]]


@torch.inference_mode()
def inspect_model(model: Any, prompt: str, *, layer: int | None = None) -> Inspection:
    """Runs a text once, and reads what the layers wrote.

    Args:
        model: A model with NPT layers, or a dense one with edits of its MLPs.
        prompt: The text.
        layer: The only layer to look at.

    Raises:
        ConfigError: The model has routed layers, or nothing that could be inspected, or not in this layer.
        DataError: The text is too long, or there is no tokenizer.
    """
    wanted = inspected_layers(model, layer)
    tokenizer = tokenizer_of(model)
    ids = encode(tokenizer, prompt)
    longest = model.config.max_position_embeddings
    if ids.shape[1] > longest:
        raise DataError(f"the prompt must fit the model's {longest} positions; got {ids.shape[1]} tokens. Shorten it.")
    has_modulation = bool(model.dynamic_layers)
    found = (_modulations if has_modulation else _edits)(model, ids.to(input_device(model)), wanted)
    tokens = [
        Token(id=token, text=text, is_new=False)
        for token, text in zip(ids[0].tolist(), token_texts(tokenizer, ids), strict=True)
    ]
    return Inspection(
        kind=MODULATION if has_modulation else EDITS,
        tokens=tokens,
        num_layers=model.config.num_hidden_layers,
        layers=_with_words(model, tokenizer, found),
    )


def inspected_layers(model: Any, layer: int | None = None) -> list[int]:
    """Returns the layers that there is something to see of.

    Raises:
        ConfigError: There is none, ``layer`` is not among them, or tokens are routed.
    """
    if model.routed_layers:
        raise tokens_are_routed(model.config._name_or_path)
    there = layers_to_see(model)
    if not there:
        raise nothing_to_inspect(model.config._name_or_path)
    if layer is None:
        return there
    if layer not in there:
        what = "a layer that is converted" if model.dynamic_layers else "a layer whose MLP an edit changes"
        raise ConfigError(f"--layer must be {what}, one of {_spans(there)}; got {layer}. Leave it out for all of them.")
    return [layer]


def layers_to_see(model: Any) -> list[int]:
    """Returns the layers that rewrite themselves, or, of a dense model, those whose MLP an edit changes."""
    if model.routed_layers:
        return []
    if model.dynamic_layers:
        return [index for index, own in model.dynamic_layers.items() if own.active]
    return sorted({index for edit in model.edits for path in edit.deltas if (index := _mlp_of(path)) is not None})


def _spans(indices: Sequence[int]) -> str:
    """``0-2, 5`` for 0, 1, 2, 5."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], index]
        else:
            spans.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _mlp_of(path: str) -> int | None:
    """The layer whose MLP a projection belongs to."""
    match path.split("."):
        case ["layers", index, "mlp", _]:
            return int(index)
    return None


@contextmanager
def _inputs(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Within the block, the first input of each module of the last forward."""
    seen: dict[int, Tensor] = {}

    def keeps(index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[index] = args[0]

        return keep

    with ExitStack() as stack:
        for index, module in modules.items():
            stack.callback(module.register_forward_pre_hook(keeps(index)).remove)
        yield seen


def _modulations(model: Any, ids: Int[Tensor, "1 tokens"], wanted: Sequence[int]) -> dict[int, _Found]:
    layers = {index: model.dynamic_layers[index] for index in wanted}
    with (
        _inputs({index: layer.plastic for index, layer in layers.items()}) as attention,
        _inputs({index: layer.mlp.gate_proj for index, layer in layers.items()}) as mlp_inputs,
        model.report(writes=True) as report,
    ):
        model.model(ids, use_cache=False)
    found = {}
    for index, layer in layers.items():
        told: LayerReport = report.layers[index]
        writes = told.writes or {}
        weight = math.sqrt(sum(squared_norm(model, f"layers.{index}.mlp.{name}") for name in writes))
        norms = told.norm[0].float().cpu()
        found[index] = _Found(
            form=layer.layer_config.form,
            projections=tuple(writes),
            norms=norms,
            sizes=torch.full_like(norms, weight),
            written=_written(layer, told, mlp_inputs[index])[0].float().cpu(),
            directions=_directions(layer.plastic, attention[index][0]),
        )
    return found


def _written(layer: Any, report: LayerReport, z: MlpInput) -> MlpInput:
    """What the rewrite of a layer adds to the stream."""
    writes = report.writes or {}
    if layer.layer_config.form in KEYED:
        return writes["down_proj"].value[..., 0, :]
    mlp = layer.mlp
    gate, up = mlp.gate_proj(z).float(), mlp.up_proj(z).float()
    new_up = up + writes["up_proj"].effect if "up_proj" in writes else up
    change = mlp.act_fn(gate + writes["gate_proj"].effect) * new_up - mlp.act_fn(gate) * up
    written = _linear(mlp.down_proj, change.to(z.dtype)).float()
    return written + writes["down_proj"].effect if "down_proj" in writes else written


def _linear(module: Any, x: Float[Tensor, "1 tokens d_in"]) -> Float[Tensor, "1 tokens d_out"]:
    """What a projection makes of ``x``, without its bias.

    Changes of its input go through it rather than two inputs, whose outputs in bf16 would differ by rounding alone.
    """
    return module(x) - module(torch.zeros_like(x[:, :1]))


def _directions(plastic: Modulation, attention: Float[Tensor, "tokens d_model"]) -> list[list[Direction]]:
    """Returns the largest directions of each token."""
    a = attention.float()
    found: list[list[Direction]] = [[] for _ in a]
    for part, down, columns in _maps(plastic):
        coordinates = a @ down.to(a).T  # (T, r)
        squares = (coordinates * columns.to(a)).pow(2)
        shares = squares / squares.sum(-1, keepdim=True).clamp_min(TINY)
        top = shares.topk(min(DIRECTIONS, shares.shape[1]), dim=-1)
        for position, own in enumerate(found):
            own += [
                Direction(part=part, index=index, coordinate=float(coordinates[position, index]), share=share)
                for index, share in zip(top.indices[position].tolist(), top.values[position].tolist(), strict=True)
                if share > 0
            ]
    return found


def _maps(plastic: Modulation) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields, for each low-rank map, its name, its down factor (rank, d_model), and its up factor's column norms."""
    parameters = {name: parameter.detach() for name, parameter in plastic.named_parameters(recurse=False)}
    if isinstance(plastic, GateModulation):
        for part in plastic.parts:
            yield part, parameters[f"{part}_down"], parameters[f"{part}_up"].norm(dim=0)
    elif isinstance(plastic, OuterModulation):
        squares = [parameters[f"{name}_value"].pow(2).sum(0) for name in plastic.targets]
        yield "value", parameters["down"], plastic.scale * torch.stack(squares).sum(0).sqrt()
    else:  # a carry; a tied one has one factor for both directions
        up = parameters.get("up")
        yield "carry", parameters["down"], parameters["down"].norm(dim=1) if up is None else up.norm(dim=0)


def _edits(model: Any, ids: Int[Tensor, "1 tokens"], wanted: Sequence[int]) -> dict[int, _Found]:
    layers = {index: model.model.layers[index].mlp for index in wanted}
    with _inputs(layers) as inputs:
        model.model(ids, use_cache=False)
    found = {}
    for index, mlp in layers.items():
        written, plain = _edited(model, index, mlp, inputs[index])
        paths = (path for edit in model.edits for path in edit.deltas if _mlp_of(path) == index)
        found[index] = _Found(
            form=EDITS,
            projections=tuple(sorted({path.rpartition(".")[2] for path in paths})),
            norms=written.norm(dim=-1),
            sizes=plain.norm(dim=-1),
            written=written,
            directions=[[] for _ in written],
        )
    return found


def _edited(
    model: Any, index: int, mlp: Any, z: MlpInput
) -> tuple[Float[Tensor, "tokens d_model"], Float[Tensor, "tokens d_model"]]:
    """Returns what the edits add to the output of an MLP, and that output without them."""
    with model.edits.suspended():
        gate, up = mlp.gate_proj(z).float(), mlp.up_proj(z).float()
        hidden = mlp.act_fn(gate) * up
        new_gate = gate + _edit_effect(model, index, "gate_proj", z)
        new_up = up + _edit_effect(model, index, "up_proj", z)
        new_hidden = mlp.act_fn(new_gate) * new_up
        written = _linear(mlp.down_proj, (new_hidden - hidden).to(z.dtype)).float()
        written = written + _edit_effect(model, index, "down_proj", new_hidden.to(z.dtype))
        plain = mlp.down_proj(hidden.to(z.dtype)).float()
    return written[0].cpu(), plain[0].cpu()


def _edit_effect(model: Any, index: int, name: str, x: Float[Tensor, "1 tokens d_in"]) -> Tensor:
    """``ΔW x`` of all edits of a projection, in fp32; 0 if it has none."""
    path = f"layers.{index}.mlp.{name}"
    deltas = [edit.deltas[path] for edit in model.edits if path in edit.deltas]
    if not deltas:
        return torch.zeros((), device=x.device)
    left, right = stacked(deltas)
    change = x.float() @ right.to(x.device) @ left.T.to(x.device)
    scale = summed_scale(deltas)
    return change if scale is None else change + scale.to(x.device) * _linear(model.edits.projection(path), x).float()


def _with_words(
    model: Any, tokenizer: PreTrainedTokenizerBase, found: Mapping[int, _Found]
) -> dict[int, LayerInspection]:
    """Looks up the words of the strongest cells."""
    ratios = torch.stack([layer.norms / layer.sizes.clamp_min(TINY) for layer in found.values()])  # (L, T)
    count = min(MOST_READ, ratios.numel())
    kept = torch.zeros(ratios.numel(), dtype=torch.bool)
    kept[ratios.flatten().topk(count).indices] = True
    chosen = (kept & (ratios.flatten() > 0)).view_as(ratios)
    layers = {}
    for (index, layer), mask in zip(found.items(), chosen, strict=True):
        words: list[list[Word] | None] = [None] * len(mask)
        positions = mask.nonzero().flatten().tolist()
        for position, nearest in zip(positions, nearest_words(model, tokenizer, layer.written[mask]), strict=True):
            words[position] = nearest
        layers[index] = LayerInspection(
            form=layer.form,
            projections=layer.projections,
            norms=layer.norms.tolist(),
            sizes=layer.sizes.tolist(),
            words=words,
            directions=layer.directions,
        )
    return layers
