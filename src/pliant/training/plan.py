"""What a run would do, found out before it starts: the model's counts, memory, data, steps, and what cannot work.

Nothing is loaded but configurations, and what the data checks read.
"""

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import str_to_bool
from huggingface_hub import constants

from pliant.architectures import NptConfig
from pliant.config import ModelConfig, RunConfig
from pliant.config.sections import ADAPTERS
from pliant.data.loading import EMBEDDED
from pliant.errors import ConfigError
from pliant.training.checkpoints import last_checkpoint
from pliant.training.estimate import MemoryLine, ModelPlan, hub_is_reachable, plan_model

CONFIG_FILE, METRICS_FILE = "config.yaml", "metrics.jsonl"
"""What a run leaves in its folder, by which it is known again."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would do.

    Attributes:
        config: What was asked for.
        model: Its size.
        memory: Estimates, empty where the model is out of reach.
        available_bytes: Memory of the device that would compute; 0 where the system does not say.
        device: ``cuda``, ``mps`` or ``cpu``.
        data: One check a data set, of ``pliant.data.check_data``.
        steps: Optimizer steps; ``None`` until the texts have been counted.
        tokens_per_step: Positions that one optimizer step reads, padding included.
        output: What becomes of ``training.output_dir``.
        warnings: What works, but probably is not meant.
    """

    config: RunConfig
    model: ModelPlan
    memory: Sequence[MemoryLine]
    available_bytes: int
    device: str
    data: Sequence[Any]
    steps: int | None
    tokens_per_step: int
    output: str
    warnings: Sequence[str]


def make_plan(config: RunConfig) -> Plan:
    """Finds out what training as ``config`` says would do, and raises what can be known to fail.

    Raises:
        ConfigError: A setting does not fit the base, the machine or what is installed, or ``output_dir`` is taken.
        CheckpointError: The base or the checkpoint cannot be read.
        DataError: A data set cannot be read.
    """
    device = compute_device_type()
    _check_machine(config, device)
    output = describe_output(config)
    model, memory = plan_model(config)
    training = config.training
    per_step = training.batch_size * training.gradient_accumulation_steps * config.data.max_length * _world_size()
    available = available_memory(device)
    warnings = [*_warnings(config, model)]
    if training.mixed_precision == "bf16" and device == "cpu" and not multiplies_bfloat16():
        warnings.append(
            "training.mixed_precision=bf16 is several times slower than fp32 on this processor, which has no "
            "instructions for it. Set training.mixed_precision=no, where memory allows."
        )
    needed = sum(line.num_bytes for line in memory)
    if 0 < available < needed:
        warnings.append(
            f"about {needed / 2**30:.1f} GiB are needed, and this {device} has {available / 2**30:.1f} GiB. Lower "
            "training.batch_size or data.max_length, or set training.gradient_checkpointing=true, "
            "training.mixed_precision=bf16 or model.quantization=nf4."
        )
    return Plan(
        config=config,
        model=model,
        memory=memory,
        available_bytes=available,
        device=device,
        data=_check_data(config),
        steps=training.max_steps,
        tokens_per_step=per_step,
        output=output,
        warnings=warnings,
    )


def compute_device_type() -> str:
    """Returns ``cuda``, ``mps`` or ``cpu``: where training would compute."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def multiplies_bfloat16() -> bool:
    """Whether torch has a fast bf16 product for this processor; without one bf16 is several times slower than fp32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def available_memory(device: str) -> int:
    """Returns the bytes of memory that ``device`` has in all, 0 where they are unknown."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    if all(name in os.sysconf_names for name in names):
        return os.sysconf(names[0]) * os.sysconf(names[1])
    return 0


def is_installed(package: str) -> bool:
    """Whether ``package`` can be imported."""
    return importlib.util.find_spec(package) is not None


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_machine(config: RunConfig, device: str) -> None:
    """Refuses what the device cannot do, and what needs a package that is not there."""
    model, training = config.model, config.training
    needed = {tracker: f"training.report_to={tracker}" for tracker in training.report_to}  # packages of those names
    if model.quantization != "none":
        needed["bitsandbytes"] = f"model.quantization={model.quantization}"
    if training.trainable in ADAPTERS:
        needed["peft"] = f"training.trainable={training.trainable}"
    if training.use_flash_attention:
        needed["flash_attn"] = "training.use_flash_attention=true"
    if training.mixed_precision == "fp16" and device == "cpu":
        raise ConfigError("training.mixed_precision=fp16 needs a GPU; this machine has none. Use bf16 or no.")
    if training.use_flash_attention and device != "cuda":
        raise ConfigError(
            "training.use_flash_attention=true needs an NVIDIA GPU; this machine has none. Leave it out: attention "
            "then runs through torch's own fused kernel."
        )
    if is_sharded():
        _check_fsdp()
    for package, key in needed.items():
        if not is_installed(package):
            name = package.replace("_", "-")
            raise ConfigError(f"{key} needs the package {name}, which is not installed: pip install {name}")


def is_sharded() -> bool:
    """Whether ``accelerate launch`` was told to use FSDP."""
    return bool(str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))


def _check_fsdp() -> None:
    """Refuses the settings of accelerate under which FSDP would not train this model, or not save it."""
    wanted = {"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false"}
    for name, value in wanted.items():
        found = os.environ.get(name, "1" if name == "FSDP_VERSION" else "false").lower()
        if found != value:
            raise ConfigError(
                f"{name.lower()} must be {value} in accelerate's fsdp_config; got {found}. docs/accelerate/fsdp2.yaml "
                "is a configuration that works; activations are checkpointed by training.gradient_checkpointing=true."
            )


def describe_output(config: RunConfig) -> str:
    """Returns what becomes of ``training.output_dir``: made, filled, or gone on from.

    Raises:
        ConfigError: It is a file, cannot be written, or holds another run or anything else.
    """
    training = config.training
    if int(os.environ.get("RANK", "0")) != 0:  # the first process may have begun to fill it
        return "looked at by the first process"
    folder = Path(training.output_dir)
    shown = f"training.output_dir={training.output_dir!r}"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{shown} must be a folder; it is a file. Choose another name.")
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise ConfigError(f"{shown} must be a folder that can be made; {str(parent)!r} is a file. Choose another name.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{shown} must be writable; {str(parent)!r} is not. Choose another folder.")
    if not folder.is_dir():
        return "will be made"
    there = sorted(entry.name for entry in folder.iterdir())
    if not there:
        return "exists, empty"
    last = last_checkpoint(folder)
    is_run = last is not None or any(name in there for name in (CONFIG_FILE, METRICS_FILE))
    if training.resume and is_run:
        return f"holds a run; goes on from {last.name}" if last else "holds a run without a checkpoint; begins anew"
    if is_run:
        raise ConfigError(
            f"{shown} must not hold another run; it does. Go on with it by --resume (training.resume=true), or choose "
            "another folder."
        )
    raise ConfigError(f"{shown} must be a new or empty folder; it holds {', '.join(there[:3])}. Choose another.")


def _check_data(config: RunConfig) -> Sequence[Any]:
    from pliant.data import check_data

    data = config.data
    names = [*data.dataset_names, data.eval_dataset_name] if data.mixed else [data.dataset_name, data.eval_dataset_name]
    is_remote = any(name and name != EMBEDDED and not Path(name).expanduser().exists() for name in names)
    kind = "chat" if config.training.objective == "sft" else "text"
    with offline() if is_remote and not hub_is_reachable() else nullcontext():
        return check_data(data, kind=kind)


@contextmanager
def offline() -> Iterator[None]:
    """Within the block the hub is not asked, which would be tried again for half a minute for each data set."""
    from datasets import config as datasets_settings

    modules: tuple[Any, ...] = (constants, datasets_settings)
    before = [(module, module.HF_HUB_OFFLINE) for module in modules]
    try:
        for module, _ in before:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in before:
            module.HF_HUB_OFFLINE = value


def _warnings(config: RunConfig, model: ModelPlan) -> list[str]:
    """Returns what works, but probably is not what was meant."""
    training, found = config.training, []
    if training.max_steps is not None and training.warmup_steps >= training.max_steps:
        found.append(
            f"training.warmup_steps={training.warmup_steps} is all of training.max_steps={training.max_steps}: the "
            "learning rate never reaches training.lr."
        )
    idle = [
        name
        for name in ("router", "prior")
        if getattr(training.lr_multipliers, name) != 1.0 and name not in model.components
    ]
    if idle and not (model.not_checked and config.is_routed):
        found.append(
            f"training.lr_multipliers.{' and '.join(idle)}: model_type={config.model_type} has no such component; "
            "without effect."
        )
    plastic = [form for form in model.layers.values() if isinstance(form, NptConfig)]
    found += _of_the_checkpoint(config.model, plastic)
    if training.stages != "auto" and training.objective != "equivalence":
        found.append(f"training.stages belongs to equivalence; without effect on {training.objective}.")
    keyed = [form for form in plastic if form.has_closed_form]
    if training.use_regularization and keyed and training.objective == "equivalence":
        found.append("training.use_regularization=true pulls keyed layers away from their closed form, and the base.")
    return found


def _of_the_checkpoint(model: ModelConfig, forms: Iterable[NptConfig]) -> list[str]:
    """Returns a warning where a preset or a rank, a recipe's as a rule, gives way to those of the checkpoint."""
    differs = any(
        model.preset not in (ModelConfig.preset, form.form) or model.adapter_rank not in (None, form.rank)
        for form in forms
    )
    if model.checkpoint_path is None or not differs:
        return []
    rank = "null" if model.adapter_rank is None else model.adapter_rank
    return [
        "model.preset and model.adapter_rank are those of the checkpoint; "
        f"model.preset={model.preset} and model.adapter_rank={rank} are without effect."
    ]
