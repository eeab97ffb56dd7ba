"""What ``config.json`` says of a pliant model: its architecture, each dynamic layer, and the base it came from."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from pliant.architectures import ARCHITECTURES
from pliant.architectures.base import LayerConfig, nearest
from pliant.errors import CheckpointError, ConfigError, ConversionError

FORMAT_VERSION = 1


def architecture_of(config: Any) -> str | None:
    """Returns the name in ``ARCHITECTURES`` of a layer's configuration; ``None`` for anything else."""
    return next((name for name, row in ARCHITECTURES.items() if row.config is type(config)), None)


@dataclass(frozen=True, kw_only=True)
class PliantSpec:
    """The ``pliant`` entry of a configuration, parsed.

    Attributes:
        architecture: Name in ``ARCHITECTURES``; ``dense`` when no layer is converted.
        layers: Layer index → that layer's configuration.
        base: ``{"name", "revision"}`` of the base model; a delta is loaded over it.
    """

    architecture: str = "dense"
    layers: Mapping[int, LayerConfig] = field(default_factory=dict)
    base: Mapping[str, str | None] = field(default_factory=dict)

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "PliantSpec":
        """Parses ``config.pliant``.

        Raises:
            CheckpointError: A newer format, an unknown architecture, or a layer outside the model.
        """
        entry = getattr(config, "pliant", None)
        if entry is None:
            return cls()
        version = entry.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"pliant.format_version must be {FORMAT_VERSION}, the one this release reads; got {version!r}. "
                "Load it with the release that wrote it, or a later one."
            )
        name = entry.get("architecture")
        if name not in ARCHITECTURES:
            raise CheckpointError(
                f"pliant.architecture must be one of {', '.join(ARCHITECTURES)}; got {name!r}."
                f"{nearest(str(name), tuple(ARCHITECTURES))}"
            )
        config_class = ARCHITECTURES[name].config
        try:
            layers = {
                int(index): config_class.from_dict(layer)
                for index, layer in entry.get("layers", {}).items()
                if config_class is not None
            }
        except (ConfigError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"pliant.layers must map layer indices to configurations; got {entry.get('layers')!r}: {error} "
                "config.json is damaged."
            ) from error
        for index, layer in layers.items():
            if getattr(layer, "rank", None) == "auto":
                raise CheckpointError(
                    f"pliant.layers.{index}.rank must be a number in a saved model; got 'auto'. Put the rank of the "
                    "saved factors into config.json."
                )
            if not 0 <= index < config.num_hidden_layers:
                raise CheckpointError(
                    f"pliant.layers must be in 0..{config.num_hidden_layers - 1} (num_hidden_layers); got {index}. "
                    "config.json is damaged, or belongs to another model."
                )
        return cls(architecture=name, layers=layers, base=copy.deepcopy(entry.get("base", {})))

    def check_quantisation(self, quantisation: Any) -> None:
        """Refuses a quantised base that a layer's form cannot stand on.

        Args:
            quantisation: The base's ``quantization_config``, an object or a mapping, or ``None``.

        Raises:
            ConversionError: A form needs linear projections, and the base's round their inputs.
        """
        if isinstance(quantisation, Mapping):
            is_int8 = quantisation.get("load_in_8bit", False)
        else:
            is_int8 = getattr(quantisation, "load_in_8bit", False)
        for index, layer in self.layers.items():
            if is_int8 and getattr(layer, "needs_linear_projections", False):
                raise ConversionError(
                    f"form 'keyed_pre' (layer {index}) needs linear projections; an int8 base (load_in_8bit) rounds "
                    "their inputs too, so W x⁺ = ρ W x + s W (γ ⊙ a) does not hold. Use 'keyed', or load the base in "
                    "4 bit or bfloat16."
                )

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry as JSON values, with its format version."""
        return {
            "format_version": FORMAT_VERSION,
            "architecture": self.architecture,
            "layers": {str(index): layer.to_dict() for index, layer in sorted(self.layers.items())},
            "base": dict(self.base),
        }
