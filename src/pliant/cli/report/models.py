"""What a report says of a model: its added factors, its edits, and what it does with a prompt."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig

from pliant.cli.convert import describe_layers
from pliant.cli.generate import Writer
from pliant.cli.generation import Sampling
from pliant.cli.inspect import pictures
from pliant.cli.inspect.model import inspect_model, layers_to_see
from pliant.cli.page import Chart, Columns, Number, Section, Series, SideBySide, Table
from pliant.cli.routes.command import trace
from pliant.cli.routes.pictures import routing_map
from pliant.errors import CheckpointError
from pliant.models import EDITS_NAME, PliantSpec, family_of, read_edits
from pliant.models.checkpoint import weight_files

MARK = ".plastic."
ENERGY = 0.99
SHOWN_VALUES = 40
"""Singular values of a layer that a line keeps, spread as a logarithmic axis shows them."""
TITLES = {
    "carry": ("U D", "what of the attention output is carried"),
    "add": ("B A", "what is added to the gate"),
    "mult": ("B′ A′", "by what the gate is multiplied"),
}


def section(name: str, blocks: list[Any]) -> Section:
    """Returns the section of a model."""
    return Section(title=name, kicker="Model", blocks=blocks)


def described(folder: Path) -> Iterator[Any]:
    """Yields what its files say, without loading the model.

    Raises:
        CheckpointError: ``config.json`` is damaged, or of a model that transformers does not know.
        ConversionError: The model is of another family than those that convert.
    """
    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: config.json must be that of a model that transformers knows; {error} Leave the folder out."
        ) from error
    family_of(config)
    spec = PliantSpec.of(config)
    facts = [
        ["family", str(config.model_type)],
        ["layers", str(config.num_hidden_layers)],
        ["width", f"{config.hidden_size:,} (MLP {config.intermediate_size:,})"],
        ["converted", describe_layers(dict(spec.layers)) if spec.layers else "no layer: dense"],
    ]
    if base := spec.base.get("name"):
        facts.append(["base", str(base)])
    yield Table(title="What it is", columns=["property", "value"], rows=facts)
    charts: list[Any] = []
    for part, values in spectra(folder).items():
        charts += list(_spectrum_charts(part, values))
    if charts:
        yield Columns(blocks=charts)
    if (folder / EDITS_NAME).is_file():
        yield _ledger(folder)


def spectra(folder: Path) -> dict[str, dict[int, list[float]]]:
    """Returns the singular values of each low-rank map of the added factors: ``carry``, ``add``, … → layer → values.

    Raises:
        CheckpointError: A file of weights is damaged.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for index, factors in sorted(_factors(folder).items()):
        for part, (down, up) in _maps(factors).items():
            found.setdefault(part, {})[index] = _singular_values(up, down)
    return found


def _factors(folder: Path) -> dict[int, dict[str, Tensor]]:
    """The added parameters of NPT layers, by layer and name."""
    found: dict[int, dict[str, Tensor]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as reader:
                for name in (name for name in reader.keys() if MARK in name):  # noqa: SIM118 (not a dict)
                    path, _, factor = name.partition(MARK)
                    found.setdefault(int(path.rpartition(".")[2]), {})[factor] = reader.get_tensor(name).float()
        except (SafetensorError, FileNotFoundError) as error:
            raise CheckpointError(
                f"{file} must be a whole safetensors file; reading failed: {error}. Save it again."
            ) from error
    return found


def _maps(factors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The low-rank maps that a layer's factors make: name → down (rank, in) and up (out, rank)."""
    if "down" not in factors:
        parts = [name.removesuffix("_down") for name in factors if name.endswith("_down")]
        return {part: (factors[f"{part}_down"], factors[f"{part}_up"]) for part in parts}
    down = factors["down"]
    values = {name.removesuffix("_value"): up for name, up in factors.items() if name.endswith("_value")}
    if values:
        scale = 1.0 / math.sqrt(down.shape[1])  # of every value, as the layer takes it
        return {f"{name}, values": (down, scale * up) for name, up in values.items()}
    return {"carry": (down, factors.get("up", down.T))}


def _singular_values(up: Tensor, down: Tensor) -> list[float]:
    """Singular values of ``U D``, as many as the rank: those of the small product of the triangles of both."""
    left, right = (torch.linalg.qr(factor.double(), mode="r").R for factor in (up, down.T))
    return torch.linalg.svdvals(left @ right.T).tolist()


def _spectrum_charts(part: str, values: Mapping[int, list[float]]) -> Iterator[Chart]:
    name, meaning = TITLES.get(part, (part, "what is written"))
    is_flat = all(own[-1] > 0 and own[0] / own[-1] < 1.001 for own in values.values())
    note = "All equal: the closed form starts as a projection, and training has not moved it." if is_flat else ""
    yield Chart(
        title=f"Singular values of {name}: {meaning}",
        x="direction",
        y="singular value",
        series=[
            Series(name=f"layer {index}", x=[i + 1 for i in _spread(len(own))], y=[own[i] for i in _spread(len(own))])
            for index, own in values.items()
        ],
        ramp=True,
        log_x=True,
        note=note,
    )
    ranks = {index: len(own) for index, own in values.items()}
    yield Chart(
        title=f"Directions of {name} in use",
        x="layer",
        y="directions",
        zero=True,
        series=[
            Series(name="rank", x=list(ranks), y=list(ranks.values()), colour=7, dashed=True),
            Series(
                name=f"hold {ENERGY:.0%} of the squares",
                x=list(values),
                y=[_directions(own) for own in values.values()],
            ),
        ],
    )


def _spread(count: int) -> list[int]:
    """Indices spread evenly over a logarithmic axis, both ends among them."""
    steps = max(1, SHOWN_VALUES - 1)
    return sorted({round(count ** (step / steps)) - 1 for step in range(steps + 1)})


def _directions(values: list[float]) -> int:
    squares = torch.tensor(values, dtype=torch.float64).pow(2)
    total = squares.sum()
    return int((squares.cumsum(0) < ENERGY * total).sum()) + 1 if total > 0 else 0


def _ledger(folder: Path) -> Table:
    rows = []
    for edit in read_edits(folder):
        layers = ", ".join(map(str, edit.layers))
        row = [edit.id, edit.created, edit.context, layers, Number.of(edit.rank), Number.of(edit.norm)]
        rows.append([*row, Number.of(edit.kl, ".4f")])
    return Table(
        title="Edits",
        columns=["id", "made", "what was learned", "layers", "rank", "‖ΔW‖", "KL, nats"],
        rows=rows,
        note="Beside the weights, each can be taken back: pliant edits revert.",
    )


def run(model: Any, prompt: str, new_tokens: int) -> Iterator[Any]:
    """Yields what a model does with a prompt: what is rewritten, what runs, and what it writes beside its base."""
    if model.routed_layers:
        yield routing_map(trace(model, prompt), "Which token ran in which layer")
    elif layers_to_see(model):
        found = inspect_model(model, prompt)
        yield pictures.heat_map(found, "Which tokens rewrote which layers")
        yield Columns(blocks=[pictures.by_layer(found)])
        yield pictures.cells_table(found)
    with_base = bool(model.dynamic_layers or len(model.edits))
    written = Writer(model, Sampling(max_new_tokens=new_tokens)).describe(prompt, with_base=with_base)
    sides = {"base": str(written["base_text"]).strip()} if with_base else {}
    sides["model"] = str(written["text"]).strip()
    yield SideBySide(title="What it writes", entries=[(prompt, sides)], note="Greedy, one copy of the weights.")
