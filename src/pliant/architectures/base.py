"""What every dynamic architecture has in common: its record in the table, and the report of a layer."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor, nn

from pliant.errors import ConfigError


class AddedModule(nn.Module):
    """A module that conversion adds: the Hugging Face edge starts it, keeps it in fp32 and saves it in deltas.

    ``component`` is what training calls its parameters, to give them a learning rate of their own.
    """

    component: ClassVar[str] = "modulation"

    def reset_parameters(self, init: Any = nn.init) -> None:
        """Gives every parameter its start value.

        Args:
            init: A namespace with ``zeros_``, ``normal_`` and ``eye_``: ``torch.nn.init``, or that of
                transformers, which spares the parameters that a checkpoint has already filled.
        """
        raise NotImplementedError


def added_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields name and value of every parameter of ``model`` that conversion added."""
    for prefix, module in model.named_modules():
        if isinstance(module, AddedModule):
            yield from module.named_parameters(prefix=prefix, recurse=False)


def added_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields name and value of every buffer of ``model`` that conversion added and a checkpoint holds."""
    for prefix, module in model.named_modules():
        if isinstance(module, AddedModule):
            for name, buffer in module.named_buffers(prefix=prefix, recurse=False):
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                    yield name, buffer


@runtime_checkable
class LayerConfig(Protocol):
    """Configuration of one dynamic layer; serialised into ``config.json``."""

    def starts_at_layerwise_optimum(self) -> bool:
        """Whether conversion alone makes the layer as near to its base as it can be, on the base's own inputs."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields that differ from their defaults, as JSON values."""
        ...

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], /) -> "LayerConfig":
        """Builds the configuration that :meth:`to_dict` described."""
        ...


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One row of ``ARCHITECTURES``: what a layer of this kind is made from.

    ``layer`` is mixed in before a model family's own decoder layer; it keeps the family's attention,
    MLP and norms as they are. ``None`` on both fields means "nothing is changed".
    """

    name: str
    summary: str
    config: type[LayerConfig] | None = None
    layer: type[nn.Module] | None = None


@dataclass(frozen=True, kw_only=True)
class Write:
    """One token-wise low-rank weight update, ``ΔW_t = Σ_k value_k ⊗ key_k``, and what it did.

    ``effect`` is ``ΔW_t z_t``, z the input of that weight matrix. Where the form also scales the rows of W, value and
    key are the smallest update of the same effect, and what it does to the matrix itself is ``added ⊗ key`` (nothing,
    if ``added`` is ``None``) ``+ diag(scale) W``.
    """

    value: Float[Tensor, "batch seq updates d_out"]
    key: Float[Tensor, "batch seq updates d_in"]
    effect: Float[Tensor, "batch seq d_out"]
    scale: Float[Tensor, "batch seq d_out"] | None = None
    added: Float[Tensor, "batch seq d_out"] | None = None


@dataclass(frozen=True, kw_only=True)
class RoutingReport:
    """Which tokens entered a routed layer, what they scored, and by what their increment was multiplied."""

    scores: Float[Tensor, "batch seq"]
    runs: Bool[Tensor, "batch seq"]
    gate: Float[Tensor, "batch seq"]


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What one dynamic layer did to each token in one forward pass.

    ``norm`` is ``‖ΔW_t‖_F`` over all matrices that the layer rewrites, of a routed layer ‖what the token's state
    moved by‖; ``regulariser`` is the configured penalty, summed over features, one value a token (the caller takes the
    mean over the tokens it counts). ``writes`` maps a projection's name to its :class:`Write` and is kept only on
    request; ``routing`` is there where tokens are routed.
    """

    norm: Float[Tensor, "batch seq"]
    regulariser: Float[Tensor, "batch seq"]
    writes: Mapping[str, Write] | None = None
    routing: RoutingReport | None = None


def from_fields(config_class: type[Any], values: Mapping[str, Any]) -> Any:
    """Builds a configuration, a dataclass, from field names and values.

    Raises:
        ConfigError: A name is unknown; it says the nearest one.
    """
    known = tuple(f.name for f in fields(config_class))
    for name in values:
        if name not in known:
            raise ConfigError(
                f"{config_class.__name__} has no field {name!r}; fields are {', '.join(known)}.{nearest(name, known)}"
            )
    return config_class(**values)


def nearest(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """Returns ``" Did you mean 'x'?"`` for the known word closest to ``word``, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
