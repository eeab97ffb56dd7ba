"""The model section of a run's configuration: which model is trained, and what it is converted to.

OmegaConf knows neither ``Literal`` nor unions of containers: choices are strings, free-form values ``Any``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pliant.architectures import ARCHITECTURES, NptConfig, RoutedConfig
from pliant.config.rules import at_least, one_of
from pliant.errors import ConfigError

INITS = ("pretrained", "scratch")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "nf4", "int8")
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
FORM_OPTIONS = (
    "adapter_rank",
    "energy",
    "allocation",
    "tied",
    "modulation_type",
    "targets",
    "num_updates",
    "regulariser",
)
"""Options of the one form that ``model.preset`` names."""
ROUTED_OPTIONS = (
    "capacity_gamma",
    "gate_share",
    "granularity",
    "budget",
    "budget_window",
    "gate",
    "sampler",
    "auxiliary_loss_weight",
    "z_loss_weight",
    "prior_factor",
    "surprise",
    "criteria",
    "beta_ce_init",
    "beta_cu_init",
    "prior_loss_weight",
    "forecast",
    "transition_factor",
    "student_loss_weight",
)
"""Options of the routed architectures; which of them one has, its configuration says."""


@dataclass(kw_only=True)
class ModelConfig:
    """Which model is trained, and what it is converted to.

    Attributes:
        base_model_name: Directory, hub id or ``smollm2-135m``.
        checkpoint_path: A pliant checkpoint to go on from, in place of converting the base anew.
        init: ``pretrained`` weights, or ``scratch``: the base's shape and tokenizer, fresh weights.
        dtype: What the weights are held in; ``auto`` follows ``training.mixed_precision`` where the base is
            frozen, and is fp32 where it is trained. Another one goes with ``training.mixed_precision=no``.
        quantization: ``none``, ``nf4`` or ``int8``, by bitsandbytes.
        device_map: As in ``from_pretrained``; ``auto`` offloads what does not fit.
        preset: NPT form, one of ``v1 v1_single v2 outer keyed keyed_pre``.
        adapter_rank: Its rank, an integer or ``auto``; ``null`` is the preset's usual one.
        layers: ``all``, ``upper_half``, ``lower_half``, ``alternate``, ``"8-15"``, a list of indices, or for NPT a map
            of such selections to presets: ``{0-9: v1, 10-29: "keyed:192"}``. The options of ``preset`` do not reach
            into a map. ``null`` is ``all`` for NPT, and ``alternate`` where tokens are routed; there ``cheapest`` is
            the layers that the base does best without, measured on the calibration text.
        calibration: A UTF-8 text file for the closed form of keyed presets and for the thresholds of routed layers;
            ``null`` takes the embedded texts.
        calibration_tokens: Tokens of it to read, in windows of 512.
        capacity_gamma: Share of the tokens that enter a routed layer. This and the seventeen after it are options of
            ``mod``, ``dtf`` and ``stt``, as in ``ModConfig``, ``DtfConfig`` and ``SttConfig``; ``null`` is their
            default.
        num_hidden_layers: This and the six after it change the shape; only with ``init=scratch``.
    """

    base_model_name: str = "smollm2-135m"
    checkpoint_path: str | None = None
    init: str = "pretrained"
    dtype: str = "auto"
    quantization: str = "none"
    device_map: str | None = None

    preset: str = "keyed"
    adapter_rank: Any = None
    layers: Any = None
    energy: float | None = None
    allocation: str | None = None
    tied: bool = False
    modulation_type: str | None = None
    targets: str | None = None
    num_updates: int | None = None
    regulariser: str | None = None
    calibration: str | None = None
    calibration_tokens: int = 32_768

    capacity_gamma: float | None = None
    gate_share: float | None = None
    granularity: str | None = None
    budget: float | None = None
    budget_window: int | None = None
    gate: str | None = None
    sampler: str | None = None
    auxiliary_loss_weight: float | None = None
    z_loss_weight: float | None = None
    prior_factor: float | None = None
    surprise: str | None = None
    criteria: str | None = None
    beta_ce_init: float | None = None
    beta_cu_init: float | None = None
    prior_loss_weight: float | None = None
    forecast: bool | None = None
    transition_factor: float | None = None
    student_loss_weight: float | None = None

    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    vocab_size: int | None = None
    tie_word_embeddings: bool | None = None

    def __post_init__(self) -> None:
        one_of("model", self, init=INITS, dtype=DTYPES, quantization=QUANTIZATIONS)
        at_least("model", self, 1, "calibration_tokens", *(name for name in SIZES if name != "tie_word_embeddings"))
        if self.init == "pretrained" and self.sizes:
            name, value = next(iter(self.sizes.items()))
            raise ConfigError(
                f"model.{name} changes the shape, so it needs fresh weights: model.init=scratch; got "
                f"model.{name}={value} with model.init=pretrained. Set model.init=scratch, or leave the size out."
            )
        if self.init == "scratch" and self.checkpoint_path is not None:
            raise ConfigError(
                "model.checkpoint_path goes on from trained weights, model.init=scratch drops them; got both. Drop one."
            )
        if self.init == "scratch" and self.quantization != "none":
            raise ConfigError(
                f"model.quantization={self.quantization} freezes the base, model.init=scratch trains it; got both. "
                "Set model.quantization=none."
            )
        if self.init == "scratch" and self.dtype not in ("auto", "float32"):
            raise ConfigError(
                f"model.init=scratch trains fresh weights in fp32; got model.dtype={self.dtype}. Set model.dtype=auto; "
                f"training.mixed_precision={'fp16' if self.dtype == 'float16' else 'bf16'} computes in 16 bit."
            )
        if self.init == "scratch" and self.device_map is not None:
            raise ConfigError(
                "model.device_map places weights as they are loaded, model.init=scratch makes fresh ones; got "
                f"model.device_map={self.device_map} with model.init=scratch. Set model.device_map=null."
            )

    @property
    def sizes(self) -> dict[str, Any]:
        """The size overrides that are set."""
        return {name: getattr(self, name) for name in SIZES if getattr(self, name) is not None}

    @property
    def layer_selection(self) -> Any:
        """``layers`` as ``pliant.convert`` takes it; a map's ``"keyed:192"`` becomes a configuration of rank 192."""
        if not isinstance(self.layers, Mapping):
            return "all" if self.layers is None else self.layers
        selection = {}
        for layers, form in self.layers.items():
            name, _, rank = str(form).partition(":")
            options = {"rank": int(rank) if rank.isdecimal() else rank} if rank else {}
            selection[str(layers)] = NptConfig.preset(name, **options)
        return selection

    @property
    def routed_selection(self) -> Any:
        """``layers`` as ``pliant.convert`` takes it where tokens are routed."""
        return "alternate" if self.layers is None else self.layers

    @property
    def routed_options(self) -> dict[str, Any]:
        """The options of routed layers that are set."""
        return {name: getattr(self, name) for name in ROUTED_OPTIONS if getattr(self, name) is not None}

    def routed(self, architecture: str) -> RoutedConfig:
        """Returns these options as the configuration of one routed layer.

        Raises:
            ConfigError: One of them is not an option of ``architecture``, or has a value outside its rule.
        """
        config_class = ARCHITECTURES[architecture].config
        assert config_class is not None
        assert issubclass(config_class, RoutedConfig)
        known = {f.name for f in fields(config_class)}
        for name, value in self.routed_options.items():
            if name not in known:
                configs: dict[str, Any] = {row.name: row.config for row in ARCHITECTURES.values() if row.config}
                others = [other for other, config in configs.items() if name in {f.name for f in fields(config)}]
                raise ConfigError(
                    f"model.{name} is an option of model_type={' or '.join(others)}; got model.{name}={value} with "
                    f"model_type={architecture}. Set model.{name}=null."
                )
        return config_class(**self.routed_options)

    @property
    def npt(self) -> NptConfig:
        """The NPT options as one layer configuration."""
        options = {
            "rank": self.adapter_rank,
            "energy": self.energy,
            "allocation": self.allocation,
            "tied": self.tied or None,
            "modulation": self.modulation_type,
            "targets": self.targets,
            "num_updates": self.num_updates,
            "regulariser": self.regulariser,
        }
        return NptConfig.preset(self.preset, **{name: value for name, value in options.items() if value is not None})
