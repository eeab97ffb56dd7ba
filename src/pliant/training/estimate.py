"""The model that a configuration asks for, counted on the meta device, and the memory that training it needs."""

import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from pliant.architectures import NptConfig
from pliant.architectures.base import AddedModule, LayerConfig
from pliant.config import ModelConfig, RunConfig, TrainingConfig
from pliant.config.sections import ADAPTERS, IA3_INPUTS, IA3_TARGETS
from pliant.conversion.cheapest import CHEAPEST
from pliant.conversion.routed import with_partners
from pliant.conversion.summary import BF16_BYTES, FP32_BYTES, NF4_BITS
from pliant.errors import CheckpointError, ConfigError, ConversionError
from pliant.models import SHAPES, PliantSpec, family_of, fresh_config, resolve_base, select_layers, shape_config
from pliant.models.graft import with_spec
from pliant.training.readout import CHUNK

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ADAM_BYTES = 2 * FP32_BYTES
WIDTHS_KEPT, FFN_WIDTHS_KEPT = 12, 4
"""Tensors of a layer that its backward pass needs, a token: of width d_model, and of width d_ffn."""
LOGITS_KEPT = 3
"""Tensors of a piece of logits at a time: the model's, the base's or the targets', and the gradient."""
CONNECT_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """The model that would be trained.

    Attributes:
        name: As the configuration says.
        family: Base family; ``None`` where the configuration of the base is out of reach.
        num_layers: Decoder layers.
        layers: The converted ones, with their forms.
        components: What their added parameters are called.
        parameters: Of the base, of the conversion and of adapters together.
        trainable: Those that get a gradient.
        is_upper_bound: Calibration text settles what is counted: a rank that is still ``auto`` as full rank, the
            ``cheapest`` layers as every other one.
        not_checked: Why nothing could be counted.
    """

    name: str
    family: str | None = None
    num_layers: int | None = None
    layers: Mapping[int, LayerConfig]
    components: frozenset[str] = frozenset()
    parameters: int | None = None
    trainable: int | None = None
    is_upper_bound: bool = False
    not_checked: str = ""


@dataclass(frozen=True, kw_only=True)
class MemoryLine:
    """One part of the memory that training needs, an estimate.

    Attributes:
        what: Name of the part.
        num_bytes: Its size.
        how: What was multiplied.
    """

    what: str
    num_bytes: int
    how: str


def plan_model(config: RunConfig) -> tuple[ModelPlan, list[MemoryLine]]:
    """Builds the model on the meta device; returns its counts, and estimates of the memory it needs.

    Raises:
        ConfigError: Sizes, layers, ranks, options or LoRA targets do not fit the base.
        CheckpointError: The base or the checkpoint cannot be read.
    """
    model = config.model
    _check_calibration(model)
    name = model.checkpoint_path or model.base_model_name
    base = _base_config(model)
    if base is None:
        reason = "not checked (offline): the hub cannot be reached, and no configuration of it is at hand"
        return ModelPlan(name=name, layers={}, not_checked=reason), []
    try:
        family = family_of(base)
    except ConversionError as error:
        raise ConfigError(f"model.base_model_name={name!r}: the base's {error}") from error
    layers = _layers(config, base)
    is_measured = config.is_routed and not model.checkpoint_path and model.routed_selection == CHEAPEST
    is_upper_bound = is_measured or any(getattr(form, "rank", None) == "auto" for form in layers.values())
    settled: dict[int, Any] = {
        i: f.with_rank(base.hidden_size) if isinstance(f, NptConfig) and f.rank == "auto" else f
        for i, f in layers.items()
    }
    spec = PliantSpec(architecture=config.model_type, layers=settled) if layers else PliantSpec()
    if model.quantization == "int8":
        try:
            spec.check_quantisation({"load_in_8bit": True})
        except ConversionError as error:
            raise ConfigError(f"model.quantization=int8: {error}") from error
    with torch.device("meta"):
        built = family.causal_lm(with_spec(base, family.config, spec))
    counts = _count(built, config)
    plan = ModelPlan(
        name=name,
        family=family.name,
        num_layers=base.num_hidden_layers,
        layers=layers,
        components=frozenset(m.component for m in built.modules() if isinstance(m, AddedModule)),
        parameters=counts.base + counts.added + counts.adapters,
        trainable=counts.trainable,
        is_upper_bound=is_upper_bound,
    )
    return plan, _memory(config, built.config, counts)


def layer_forms(model: ModelConfig, num_layers: int) -> dict[int, NptConfig]:
    """Returns the form of every layer that ``model.layers`` names, in a model of ``num_layers``.

    Raises:
        ConfigError: A layer does not exist or is named twice, or a preset or an option of its form is wrong.
    """
    selection = model.layer_selection
    if not isinstance(selection, Mapping):
        return dict.fromkeys(_select(selection, num_layers), model.npt)
    forms: dict[int, NptConfig] = {}
    for layers, form in selection.items():
        for index in _select(layers, num_layers):
            if index in forms:
                raise ConfigError(f"model.layers must name each layer once; {layers!r} repeats layer {index}.")
            forms[index] = form
    if not forms:
        raise ConfigError("model.layers must name at least one layer; got an empty map. Use all for every layer.")
    return forms


def _routed_layers(model: ModelConfig, num_layers: int) -> list[int]:
    """Returns the routed layers; in the place of those that a measurement would choose, at least as many."""
    if model.routed_selection != CHEAPEST:
        return _select(model.routed_selection, num_layers)
    if model.init == "scratch":
        raise ConfigError(
            "model.layers=cheapest measures what the layers of a pretrained base are worth; got model.init=scratch. "
            "Write alternate."
        )
    return _select("alternate", num_layers)


def _select(layers: Any, num_layers: int) -> list[int]:
    if not isinstance(layers, str | int | list):
        raise ConfigError(
            f"model.layers must be all, upper_half, lower_half, a range such as 8-15, a list or a map; got {layers!r}."
        )
    try:
        return select_layers(layers, num_layers)
    except ConversionError as error:
        raise ConfigError(f"model.{error}") from error


def hub_is_reachable() -> bool:
    """Whether the hub answers, asked once; transformers would try again for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    host, _, port = constants.ENDPOINT.partition("://")[2].partition("/")[0].partition(":")
    try:
        socket.create_connection((host, int(port or 443)), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _check_calibration(model: ModelConfig) -> None:
    if model.calibration is None:
        return
    if not Path(model.calibration).is_file():
        raise ConfigError(
            f"model.calibration must be a UTF-8 text file; {model.calibration!r} is none. Leave it out for the "
            "embedded texts."
        )


def _base_config(model: ModelConfig) -> PreTrainedConfig | None:
    """Returns the configuration of the base or checkpoint; ``None`` where only the hub has it, out of reach."""
    name = model.checkpoint_path or model.base_model_name
    if model.init == "pretrained" and name.lower() in SHAPES:
        raise ConfigError(
            f"model.base_model_name={name!r} is a shape without weights; write {shape_config(name)._name_or_path}, "
            "or set model.init=scratch, model_type=dense, training.objective=causal_lm and training.trainable=all."
        )
    base = _read_config(name, "model.checkpoint_path" if model.checkpoint_path else "model.base_model_name")
    if base is None or not model.sizes:
        return base
    with tempfile.TemporaryDirectory() as folder:  # from a folder, so that it does not ask the hub again
        base.save_pretrained(folder)
        try:
            return fresh_config(folder, model.sizes)
        except ConfigError as error:
            raise ConfigError(f"model.{error}") from error


def _read_config(name: str, key: str) -> PreTrainedConfig | None:
    try:
        path = resolve_base(name)
        if Path(path).is_dir():
            return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, CheckpointError) as error:
        raise CheckpointError(f"{key}={name!r} cannot be read: {error}") from error
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except OSError:
        pass  # not in the cache
    try:
        return shape_config(name)
    except ConfigError:
        pass  # not shipped
    if not hub_is_reachable():
        return None
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{key}={name!r} must be a model on the hub that you may read: {error}") from error


def _layers(config: RunConfig, base: PreTrainedConfig) -> Mapping[int, LayerConfig]:
    """Returns the dynamic layers of the model that is trained, with their forms."""
    model, spec = config.model, PliantSpec.of(base)
    if model.checkpoint_path is not None:
        if spec.architecture != config.model_type:
            other = ", or convert it: name the folder in model.base_model_name" if not spec.layers else ""
            raise ConfigError(
                f"model.checkpoint_path={model.checkpoint_path!r} holds a model of model_type={spec.architecture}; got "
                f"model_type={config.model_type}. Set model_type={spec.architecture}{other}."
            )
        return spec.layers
    if config.model_type == "dense":
        return {}
    if spec.layers:
        raise ConfigError(
            f"model.base_model_name={model.base_model_name!r} is converted already. Name it in "
            "model.checkpoint_path to go on from it."
        )
    if config.is_routed:
        chosen = dict.fromkeys(_routed_layers(model, base.num_hidden_layers), model.routed(config.model_type))
        try:
            return with_partners(chosen)
        except ConversionError as error:
            raise ConfigError(f"model.{error}") from error
    forms = layer_forms(model, base.num_hidden_layers)
    width = base.hidden_size
    for index, form in forms.items():
        if isinstance(form.rank, int) and form.rank > width:
            raise ConfigError(
                f"model.adapter_rank must be in 1..{width} (d_model of {model.base_model_name}); got {form.rank} for "
                f"layer {index}. Lower it."
            )
    if model.calibration is not None and not any(form.has_closed_form for form in forms.values()):
        raise ConfigError(
            f"model.calibration is read by the forms keyed and keyed_pre; got model.preset={model.preset}. "
            "Leave it out."
        )
    return forms


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """Parameters by what becomes of them; ``linear``: those of the base that quantisation packs."""

    base: int
    linear: int
    added: int
    adapters: int
    trainable: int


def _count(built: Any, config: RunConfig) -> _Counts:
    training = config.training
    added_ids = {id(parameter) for _, parameter in built.dynamic_parameters()}
    base = sum(p.numel() for p in built.parameters() if id(p) not in added_ids)
    added = sum(p.numel() for _, p in built.dynamic_parameters())
    linears = {name: module for name, module in built.model.named_modules() if isinstance(module, nn.Linear)}
    adapters = 0
    if training.trainable in ADAPTERS:
        adapters = _adapter_parameters(linears, training)
    trainable = base + added if training.trainable == "all" else added + adapters
    linear = sum(module.weight.numel() for module in linears.values())
    return _Counts(base=base, linear=linear, added=added, adapters=adapters, trainable=trainable)


def _adapter_parameters(linears: Mapping[str, nn.Linear], training: TrainingConfig) -> int:
    """Counts what peft adds to the projections of these paths."""

    def named(targets: Sequence[str]) -> list[tuple[str, nn.Linear]]:
        return [(last, m) for name, m in linears.items() if (last := name.rpartition(".")[2]) in targets]

    if training.trainable == "ia3":
        return sum(m.in_features if name in IA3_INPUTS else m.out_features for name, m in named(IA3_TARGETS))
    adapted = named(training.lora_targets)
    known = sorted({name.rpartition(".")[2] for name in linears})
    wrong = [name for name in training.lora_targets if name not in known]
    if wrong or not adapted:
        raise ConfigError(
            f"training.lora_targets must name projections of the model ({', '.join(known)}); got "
            f"{wrong or training.lora_targets}."
        )
    magnitudes = sum(m.out_features for _, m in adapted) if training.trainable == "dora" else 0
    return magnitudes + sum(training.lora_rank * (m.in_features + m.out_features) for _, m in adapted)


def _memory(config: RunConfig, shape: PreTrainedConfig, counts: _Counts) -> list[MemoryLine]:
    """Estimates the memory of one process, without what the framework itself needs."""
    training, data = config.training, config.data
    weights, dtype = _weight_bytes(config, counts)
    item = FP32_BYTES if training.mixed_precision == "no" else BF16_BYTES
    tokens = training.batch_size * data.max_length
    layer = WIDTHS_KEPT * shape.hidden_size + FFN_WIDTHS_KEPT * shape.intermediate_size
    kept = f"{WIDTHS_KEPT} d_model + {FFN_WIDTHS_KEPT} d_ffn"
    if training.gradient_checkpointing:
        activations = tokens * item * (shape.num_hidden_layers * shape.hidden_size + layer)
        how = f"{tokens:,} tokens × (layers × d_model + one layer's {kept}) × {item} B; checkpointed"
    else:
        activations = tokens * item * shape.num_hidden_layers * layer
        how = f"{tokens:,} tokens × layers × ({kept}) × {item} B"
    new = counts.added + counts.adapters
    has_teacher = training.objective == "equivalence" and training.trainable == "all"
    lines = [
        MemoryLine(what="base weights", num_bytes=weights, how=f"{counts.base:,} parameters, {dtype}"),
        MemoryLine(what="teacher", num_bytes=weights * has_teacher, how="a base beside the one that is trained"),
        MemoryLine(what="added weights", num_bytes=FP32_BYTES * new, how=f"{new:,} parameters, float32"),
        MemoryLine(what="gradients", num_bytes=FP32_BYTES * counts.trainable, how="4 B a trainable parameter"),
        MemoryLine(what="Adam's moments", num_bytes=ADAM_BYTES * counts.trainable, how="8 B a trainable parameter"),
        MemoryLine(what="activations", num_bytes=activations, how=how),
        MemoryLine(
            what="logits",
            num_bytes=LOGITS_KEPT * CHUNK * shape.vocab_size * FP32_BYTES,
            how=f"{LOGITS_KEPT} × {CHUNK} positions × {shape.vocab_size:,} tokens × 4 B",
        ),
    ]
    return [line for line in lines if line.num_bytes]


def _weight_bytes(config: RunConfig, counts: _Counts) -> tuple[int, str]:
    """Returns the size of the base's weights, and what they are held in."""
    quantization = config.model.quantization
    if quantization != "none":
        bits = NF4_BITS if quantization == "nf4" else 8
        packed = round(counts.linear * bits / 8)
        return packed + BF16_BYTES * (counts.base - counts.linear), f"{quantization}, the rest in 16 bit"
    return DTYPE_BYTES[config.held_dtype] * counts.base, config.held_dtype
