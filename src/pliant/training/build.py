"""From a run's configuration to the model that is trained."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from pliant.config import RunConfig, TrainingConfig
from pliant.config.sections import ADAPTERS, HALF, IA3_INPUTS, IA3_TARGETS
from pliant.conversion import cheapest_layers, convert
from pliant.conversion.cheapest import CHEAPEST
from pliant.conversion.routed import CALIBRATION_TOKENS as ROUTED_TOKENS
from pliant.data import calibration_tokens
from pliant.errors import CheckpointError, ConfigError, DataError
from pliant.models import DynamicCausalLM, PliantSpec, fresh, load, resolve_base
from pliant.training.checkpoints import staged
from pliant.training.optim import freeze_idle
from pliant.training.plan import is_sharded

FLASH_ATTENTION = "flash_attention_2"
START = "start"
"""Folder in the run's for the converted model that adapters are trained on."""
ADDED = ("plastic", "router", "prior")
"""What dynamic layers call what they add; peft must train and save it whole."""


def build_model(config: RunConfig, resume_from: Path | None = None) -> tuple[Any, DynamicCausalLM | None]:
    """Returns the model, only what ``training.trainable`` names trainable, and a teacher if one is needed.

    A run that resumes takes its layers from the checkpoint ``resume_from``, and reads no calibration text again.

    Raises:
        PliantError: A part of the configuration cannot be met; which one the message says.
    """
    training = config.training
    if training.trainable in ADAPTERS:
        model = _adapted(config, resumed=resume_from is not None)
    else:
        model = _start(config) if resume_from is None else load_model(config, str(resume_from))
        if not can_save_delta(model, config):
            _refuse_delta(config)
        model.requires_grad_(True) if training.trainable == "all" else model.freeze_base()
    teacher = None
    if training.trainable == "all":
        if training.objective == "equivalence":
            teacher = _teacher(config)
        if model.spec.layers:  # no delta of it can ever be loaded over the base that it came from
            model.config.pliant = replace(model.spec, base={}).to_dict()
    freeze_idle(model, training)
    if training.compile_model:
        compile_layers(model)
    return model, teacher


def _refuse_delta(config: RunConfig) -> None:
    checkpoint = config.model.checkpoint_path
    if config.training.save_delta:
        raise ConfigError(
            "training.save_delta=true needs a base to load the delta over; that of "
            f"model.checkpoint_path={checkpoint!r} was trained. Leave save_delta out."
        )
    if config.model.quantization != "none":
        raise ConfigError(
            f"model.quantization={config.model.quantization} needs a delta to save, and the base of "
            f"model.checkpoint_path={checkpoint!r} was trained, so that all of it would be saved. Set it to none."
        )


def can_save_delta(model: DynamicCausalLM, config: RunConfig) -> bool:
    """Whether what conversion added, over the base that the model names, is all of the model."""
    return config.training.trainable == "modulation" and bool(model.spec.layers) and bool(model.spec.base.get("name"))


def _teacher(config: RunConfig) -> DynamicCausalLM:
    """The base that the model was converted from, beside the one that is trained."""
    name = config.model.base_model_name
    if config.model.checkpoint_path is not None:
        name = PliantSpec.of(AutoConfig.from_pretrained(config.model.checkpoint_path)).base.get("name") or ""
    if not name:
        raise ConfigError(
            "training.objective=equivalence needs the base of model.checkpoint_path="
            f"{config.model.checkpoint_path!r}; it was trained, and is no longer at hand. Set "
            "training.objective=causal_lm."
        )
    teacher: Any = load_model(config, name)
    return teacher.requires_grad_(False).eval().to(_device())


def tokenizer_for(config: RunConfig) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of the model that a run trains.

    Raises:
        DataError: It has none that can be read.
    """
    name = resolve_base(config.model.checkpoint_path or config.model.base_model_name)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"model.base_model_name={name!r} must have a tokenizer to read text with; none can be read ({error}). For "
            "a hub id connect, or download it beforehand; for a folder put its files beside the model."
        ) from error


def autocast_dtype(config: RunConfig) -> torch.dtype | None:
    """Returns what the forward passes of a run are cast to; nothing where they compute in what weights are held in.

    A trained base is held in fp32. A frozen one is held in 16 bit; under fp16, whose losses are scaled, what is trained
    beside it is in fp32 and cast.
    """
    precision = config.training.mixed_precision
    if precision == "no" or (precision == "bf16" and config.training.trainable != "all"):
        return None
    return getattr(torch, HALF[precision])


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Within the block a model of ``config`` computes as in training."""
    dtype = autocast_dtype(config)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def compile_layers(model: Any) -> None:
    """Compiles every decoder layer in place: layers share one graph, and names and checkpoints stay as they are."""
    dynamic = model if isinstance(model, DynamicCausalLM) else model.get_base_model()
    for layer in dynamic.model.layers:
        layer.compile()


def _start(config: RunConfig) -> DynamicCausalLM:
    """The model before its first step: loaded or fresh, and converted unless it already is."""
    options, training = config.model, config.training
    if options.init == "scratch":
        attention = FLASH_ATTENTION if training.use_flash_attention else None
        model: Any = fresh(
            options.base_model_name, options.sizes, seed=training.seed, attn_implementation=attention
        ).to(_device())
    else:
        model = load_model(config, options.checkpoint_path or options.base_model_name)
    if config.model_type != "dense" and options.checkpoint_path is None:
        _convert(model, config)
    return model


def _convert(model: DynamicCausalLM, config: RunConfig) -> None:
    options = config.model
    if config.is_routed:
        chosen: Any = options.routed(config.model_type)
        selection = options.routed_selection
        needs_text = chosen.capacity_gamma < 1 or selection == CHEAPEST
    else:
        selection = options.layer_selection
        chosen = None if isinstance(selection, dict) else options.npt
        forms = [chosen] if chosen is not None else selection.values()
        needs_text = any(form.has_closed_form for form in forms)
    most = ROUTED_TOKENS if config.is_routed else options.calibration_tokens
    calibration = _calibration(config, min(most, options.calibration_tokens)) if needs_text else None
    if selection == CHEAPEST:  # the same on all machines
        selection = broadcast_object_list(
            cheapest_layers(model, options.routed(config.model_type), calibration=calibration)
        )
    convert(model, chosen, layers=selection, calibration=calibration)
    if PartialState().num_processes > 1:  # eigenvectors differ between machines, and FSDP takes a shard from each
        for _, parameter in model.dynamic_parameters():
            parameter.data.copy_(broadcast(parameter.data.to(_device())))


def _calibration(config: RunConfig, num_tokens: int) -> Tensor:
    """Token windows for closed forms and thresholds."""
    file = config.model.calibration
    return calibration_tokens(tokenizer_for(config), None if file is None else Path(file), num_tokens=num_tokens)


def load_model(config: RunConfig, name: str) -> DynamicCausalLM:
    """Returns the model ``name``, held, quantised and placed as a run of ``config`` holds its own."""
    options, training = config.model, config.training
    given: dict[str, Any] = {"dtype": getattr(torch, config.held_dtype)}
    if options.quantization != "none":
        given["quantization_config"] = _quantization(options.quantization, given["dtype"])
    if options.device_map is not None:
        given["device_map"] = options.device_map
    elif options.quantization != "none" and torch.cuda.is_available():
        given["device_map"] = {"": PartialState().device}
    if training.use_flash_attention:
        given["attn_implementation"] = FLASH_ATTENTION
    model: Any = load(name, **given)
    is_placed = options.quantization != "none" or options.device_map is not None
    if not is_placed and not is_sharded():  # FSDP takes it there, piece by piece
        model.to(_device())
    return model


def _quantization(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _adapted(config: RunConfig, *, resumed: bool) -> Any:
    """A peft model with adapters; on a converted one the modulation is trained beside them."""
    training = config.training
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ConfigError(
            f"training.trainable={training.trainable} needs peft, which is not installed: pip install 'pliant[peft]'."
        ) from error
    start = Path(training.output_dir) / START
    converted = config.model_type != "dense"
    if resumed and converted:
        if not start.exists():
            raise CheckpointError(
                f"training.output_dir={training.output_dir!r} must hold the folder {START}, the model that its "
                "adapters were trained on; it does not. Put it back, or begin anew in another folder."
            )
        model = load_model(config, str(start))
    else:
        model = _start(config)
        if converted:
            _save_start(model, training.output_dir)
    if converted:
        model.name_or_path = str(start.absolute())  # what the adapters record as their base
    return get_peft_model(model, adapter_config(training, modules_to_save=_added_modules(model)))


def adapter_config(training: TrainingConfig, *, modules_to_save: Sequence[str] = ()) -> Any:
    """Returns peft's configuration of the adapters that ``training.trainable`` names.

    Args:
        training: Their kind and size.
        modules_to_save: Names of modules that are trained and saved whole.
    """
    from peft import IA3Config, LoraConfig, TaskType

    common: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM, "modules_to_save": list(modules_to_save) or None}
    if training.trainable == "ia3":
        return IA3Config(target_modules=list(IA3_TARGETS), feedforward_modules=list(IA3_INPUTS), **common)
    return LoraConfig(
        r=training.lora_rank,
        lora_alpha=training.lora_alpha,
        lora_dropout=training.lora_dropout,
        target_modules=list(training.lora_targets),
        use_dora=training.trainable == "dora",
        **common,
    )


def _added_modules(model: DynamicCausalLM) -> list[str]:
    """The names, among those of the layers' children, of what conversion added."""
    present = {name for layer in model.dynamic_layers.values() for name, _ in layer.named_children()}
    return [name for name in ADDED if name in present]


def _save_start(model: DynamicCausalLM, output_dir: str) -> None:
    """Keeps the model that adapters are trained on: as a delta, unless its base was trained."""
    state = PartialState()
    with staged(output_dir, START, is_main=state.is_main_process, wait=state.wait_for_everyone) as folder:
        if state.is_main_process:
            model.save_pretrained(folder, delta=bool(model.spec.base.get("name")))


def _device() -> Any:
    return PartialState().device
