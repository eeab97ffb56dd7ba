"""Full and delta checkpoints: strict keys, safetensors only, and never over the wrong base.

A delta holds the added parameters and buffers, and a fingerprint of the base: four values of each of its tensors, NaN
where a tensor is quantised or offloaded and cannot be compared.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from pliant.architectures import added_parameters
from pliant.architectures.base import added_buffers
from pliant.errors import CheckpointError
from pliant.models.bases import resolve_base
from pliant.models.graft import install, with_spec
from pliant.models.spec import FORMAT_VERSION, PliantSpec
from pliant.models.staging import replaced

DELTA_NAME = "pliant_delta.safetensors"
FINGERPRINT_KEY = "base_fingerprint"
FINGERPRINT_WIDTH = 4
THRESHOLD_SUFFIX = ".router.threshold"
FULL_NAMES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
HUB_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")


def fingerprint(
    model: PreTrainedModel, tensors: Mapping[str, Tensor] | None = None
) -> Float[Tensor, "tensors samples"]:
    """Returns evenly spaced values of every parameter of the base, in the order of their names.

    Args:
        model: The model.
        tensors: Its parameters by name, where its own are sharded.
    """
    added = {name for name, _ in added_parameters(model)}
    rows = []
    for name, own in sorted(model.named_parameters()):
        if name in added:
            continue
        parameter = own if tensors is None else tensors[name]
        if parameter.is_floating_point() and parameter.device.type != "meta":
            flat = parameter.detach().reshape(-1)
            positions = torch.linspace(0, flat.numel() - 1, FINGERPRINT_WIDTH, dtype=torch.float64).long()
            rows.append(flat[positions.to(flat.device)].float().cpu())
        else:
            rows.append(torch.full((FINGERPRINT_WIDTH,), float("nan")))
    return torch.stack(rows)


def digest(values: Float[Tensor, "tensors samples"]) -> str:
    """Returns twelve hexadecimal digits that stand for a fingerprint in messages."""
    return hashlib.sha256(values.bfloat16().view(torch.int16).numpy().tobytes()).hexdigest()[:12]


def same_base(saved: Tensor, current: Tensor, *, same_dtype: bool) -> bool:
    """Whether two fingerprints are of one base; across dtypes, up to the rounding of bfloat16."""
    if saved.shape != current.shape:
        return False
    comparable = ~(saved.isnan() | current.isnan())
    tolerance = 0.0 if same_dtype else 2.0**-7
    return torch.allclose(saved[comparable], current[comparable], rtol=tolerance, atol=tolerance * 1e-4)


def check_destination(directory: str | os.PathLike, *, delta: bool) -> None:
    """Refuses a folder in which the new checkpoint would lie beside one of the other kind."""
    folder = Path(directory)
    if folder.is_file():
        raise CheckpointError(f"save_directory must be a folder; got the file {folder}.")
    clashing = [name for name in (FULL_NAMES if delta else (DELTA_NAME,)) if (folder / name).exists()]
    if clashing:
        kind = "full" if delta else "delta"
        raise CheckpointError(
            f"save_directory must not hold a {kind} checkpoint; {folder} has {clashing[0]}. Save to another folder."
        )


def save_delta(
    model: PreTrainedModel, directory: str | os.PathLike, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the added parameters and buffers of ``model``, its configuration and its base's fingerprint."""
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise CheckpointError(
            "delta=True needs a model without adapters; this one holds layers of peft. Merge or unload the adapter."
        )
    added = added_tensors(model)
    if not added:
        raise CheckpointError("delta=True needs a converted model; this one is dense. Save it without delta.")
    values = added if state_dict is None else {name: state_dict[name] for name in added}
    tensors = {name: value.detach().cpu().contiguous() for name, value in values.items()}
    tensors[FINGERPRINT_KEY] = fingerprint(model, state_dict)
    metadata = {
        "format": "pt",
        "format_version": str(FORMAT_VERSION),
        "base": str(PliantSpec.of(model.config).base.get("name")),
        "base_dtype": str(model.dtype),
    }
    folder = Path(directory)
    with replaced(folder / DELTA_NAME, prefix=".delta-") as staged:
        save_file(tensors, staged, metadata=metadata)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = model.dtype
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)


def added_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns every parameter and every saved buffer that conversion added, by name."""
    return {**dict(added_parameters(model)), **dict(added_buffers(model))}


def save_tokenizer(name: str, directory: str | os.PathLike) -> None:
    """Copies the tokenizer of ``name`` into ``directory`` unless one is there or none is at hand locally."""
    folder = Path(directory)
    if not name or (folder / "tokenizer_config.json").exists() or _local(name, "tokenizer_config.json") is None:
        return
    AutoTokenizer.from_pretrained(name, local_files_only=True).save_pretrained(folder)


def find_delta(name: str | os.PathLike, options: dict[str, Any]) -> str | None:
    """Returns the local path of the delta file of ``name``, or ``None`` if it is no delta checkpoint."""
    folder = Path(name)
    if not folder.is_dir():
        hub = {key: options[key] for key in HUB_OPTIONS if key in options}
        return cached(str(name), DELTA_NAME, **hub)
    if not (folder / DELTA_NAME).exists():
        return None
    if full := [n for n in FULL_NAMES if (folder / n).exists()]:
        raise CheckpointError(
            f"{folder} must hold either a full or a delta checkpoint; it has {full[0]} and {DELTA_NAME}. "
            "Move one of them away."
        )
    return str(folder / DELTA_NAME)


def cached(name: str, file: str, **hub: Any) -> str | None:
    """Returns the local path of a file of a hub repository, or ``None`` if it is not there or cannot be reached."""
    return cached_file(
        name,
        file,
        **hub,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _local(name: str, file: str) -> str | None:
    folder = Path(name)
    if folder.is_dir():
        return str(folder / file) if (folder / file).exists() else None
    if folder.is_absolute() or len(folder.parts) > 2:  # no hub id: a folder that is gone
        return None
    return cached(name, file, local_files_only=True)


def load_strictly(from_pretrained: Callable[..., Any], name: str | os.PathLike, *args: Any, **options: Any) -> Any:
    """Calls ``from_pretrained`` and refuses what it would only warn of: missing, surplus or misshapen tensors."""
    wants_info = options.pop("output_loading_info", False)
    options.setdefault("use_safetensors", None if "gguf_file" in options else True)
    options["ignore_mismatched_sizes"] = True
    try:
        model, info = from_pretrained(name, *args, output_loading_info=True, **options)
    except SafetensorError as error:
        raise CheckpointError(
            f"{name} must hold whole safetensors files; reading one failed: {error}. Copy or save it again."
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            keys = sorted(key if isinstance(key, str) else key[0] for key in info[kind])
            raise CheckpointError(
                f"{name} must hold exactly the tensors of {type(model).__name__}; {kind.replace('_', ' ')}: "
                f"{', '.join(keys[:5])}{' …' if len(keys) > 5 else ''} ({len(keys)} in all). "
                "Its config.json and its weights do not belong together."
            )
    return (model, info) if wants_info else model


def load_delta(cls: Any, name: str | os.PathLike, delta: str, *args: Any, **options: Any) -> Any:
    """Loads the base that ``name`` records (or ``options["base"]``), converts it, and fills in the delta."""
    hub = {key: options[key] for key in HUB_OPTIONS if key in options}
    config = options.pop("config", None) or cls.config_class.from_pretrained(name, **hub)
    if options.pop("output_loading_info", False):
        raise CheckpointError("output_loading_info is not available for a delta checkpoint. Leave it out.")
    for own in ("revision", "subfolder"):  # of the delta, not of its base
        options.pop(own, None)
        hub.pop(own, None)
    if options.get("dtype", "auto") == "auto" and config.dtype is not None:
        options["dtype"] = config.dtype
    spec = PliantSpec.of(config)
    adapter = options.pop("adapter_kwargs", {}).get("_adapter_model_path")  # as the Auto classes pass adapters of peft
    other = options.pop("base", None)
    base = other or spec.base.get("name")
    if not base:
        raise CheckpointError(f"{name} names no base model. Give one: from_pretrained(..., base='path or hub id').")
    tensors, metadata = _read_delta(delta)
    path = resolve_base(base)
    if Path(path).resolve() == Path(name).resolve():
        raise CheckpointError(f"base must be another model than the delta itself; got {base!r} for {name}.")
    revision = None if other else spec.base.get("revision")
    pinned = {"revision": revision} if revision else {}
    base_config = AutoConfig.from_pretrained(path, **hub, **pinned)
    if base_config.model_type.removeprefix("pliant_") != cls.config_class.model_type.removeprefix("pliant_"):
        raise CheckpointError(
            f"base must be of type {cls.base_config_class.model_type}; got {base!r}, which is {base_config.model_type}."
        )
    dense = with_spec(base_config, cls.config_class, PliantSpec(base=spec.base))
    model = cls.from_pretrained(path, *args, config=dense, edits=False, **pinned, **options)
    current, saved = fingerprint(model), tensors.pop(FINGERPRINT_KEY)
    if not same_base(saved, current, same_dtype=metadata.get("base_dtype") == str(model.dtype)):
        raise CheckpointError(
            f"{name} must be loaded over its own base, {spec.base.get('name')!r} (fingerprint {digest(saved)}); got "
            f"{base!r} (fingerprint {digest(current)}). Give the right one with base=…."
        )
    install(model, cls, spec)
    fill_added(model, name, tensors)
    model.config._name_or_path = str(name)
    if adapter is not None:
        load_adapters(model, adapter)
    return model


def load_adapters(model: Any, directory: str | os.PathLike) -> None:
    """Puts the adapters of peft in ``directory`` into ``model``, with all that was trained beside them.

    peft's own functions, as ``load_adapter`` of some versions of transformers leaves modules that were trained whole at
    random values, with no more than a warning.

    Raises:
        CheckpointError: The adapters are for another model.
    """
    from peft import PeftConfig, inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict
    from peft.tuners.tuners_utils import cast_adapter_dtype

    config = PeftConfig.from_pretrained(str(directory))
    inject_adapter_in_model(config, model)
    cast_adapter_dtype(model, "default")  # to fp32, as they were trained: else they take the base's dtype
    saved = load_peft_weights(str(directory), device="cpu")
    weights = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}  # of the peft model
    result = set_peft_model_state_dict(model, weights)
    if result.unexpected_keys:
        raise CheckpointError(
            f"{directory} must hold adapters for {type(model).__name__}; {result.unexpected_keys[0]} is not in it. "
            "Load the base that the adapters were trained on."
        )
    model._hf_peft_config_loaded = True


def _read_delta(file: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _opened(Path(file)) as reader:
        metadata = reader.metadata() or {}
        tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118 (not a dict)
    if metadata.get("format_version") != str(FORMAT_VERSION) or FINGERPRINT_KEY not in tensors:
        raise CheckpointError(
            f"{file} must be a pliant delta of format {FORMAT_VERSION}; got format "
            f"{metadata.get('format_version')!r}. Load it with the release that wrote it."
        )
    return tensors, metadata


def saved_thresholds(directory: str | os.PathLike) -> dict[int, float]:
    """Returns the thresholds of the routed layers of a local checkpoint, by layer, without loading the rest.

    Raises:
        CheckpointError: A file is damaged.
    """
    found: dict[int, float] = {}
    for file in weight_files(directory):
        with _opened(file) as reader:
            names = [name for name in reader.keys() if name.endswith(THRESHOLD_SUFFIX)]  # noqa: SIM118 (not a dict)
            found |= {int(name.split(".")[-3]): reader.get_tensor(name).item() for name in names}
    return dict(sorted(found.items()))


def replace_buffers(model: PreTrainedModel, directory: str | os.PathLike) -> None:
    """Writes the added buffers of ``model``, and how its layers are configured, into its own checkpoint.

    Every other tensor stays as it is, bit for bit. New files are complete before the first takes the place of an old
    one.

    Raises:
        CheckpointError: The checkpoint is damaged, or lacks one of the buffers.
    """
    folder = Path(directory)
    missing = {name: buffer.detach().cpu() for name, buffer in added_buffers(model)}
    with ExitStack() as stack:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        config["pliant"] = model.config.pliant  # type: ignore[union-attr]
        staged = stack.enter_context(replaced(folder / CONFIG_NAME, prefix=".config-"))  # the last to be put in place
        Path(staged).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in weight_files(folder):
            with _opened(file) as reader:
                names, metadata = list(reader.keys()), reader.metadata()
                if not missing.keys() & set(names):
                    continue
                tensors = {name: reader.get_tensor(name) for name in names}
            for name in missing.keys() & set(names):
                tensors[name] = missing.pop(name).to(tensors[name].dtype)
            save_file(tensors, stack.enter_context(replaced(file, prefix=".weights-")), metadata=metadata)
        if missing:
            raise CheckpointError(
                f"{folder} must hold every buffer of its routed layers; {next(iter(missing))} ({len(missing)} in all) "
                "is not there. Save the model to another folder."
            )


def weight_files(directory: str | os.PathLike) -> list[Path]:
    """Returns the safetensors files of a local full or delta checkpoint; none if there are none."""
    folder = Path(directory)
    if (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    return [folder / name for name in (DELTA_NAME, SAFE_WEIGHTS_NAME) if (folder / name).exists()]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{file} must be a whole safetensors file; reading failed: {error}. Save it again."
        ) from error


def fill_from_delta(model: PreTrainedModel, directory: str | os.PathLike) -> None:
    """Gives the added parameters and buffers of ``model`` the values of a delta checkpoint of the same layers.

    Raises:
        CheckpointError: The delta is damaged, or describes other layers.
    """
    tensors, _ = _read_delta(str(Path(directory) / DELTA_NAME))
    del tensors[FINGERPRINT_KEY]
    fill_added(model, directory, tensors)


def fill_added(model: PreTrainedModel, name: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Copies ``tensors`` into the added parameters and buffers of ``model``; names and shapes must be the same."""
    added = added_tensors(model)
    if unequal := sorted(added.keys() ^ tensors.keys()):
        raise CheckpointError(
            f"{name} must hold exactly the added parameters that its config.json describes; {unequal[0]} "
            f"({len(unequal)} in all) is on one side only. The two files do not belong together."
        )
    for key, value in added.items():
        if value.shape != tensors[key].shape:
            raise CheckpointError(
                f"{name}: {key} must have shape {tuple(value.shape)}; got {tuple(tensors[key].shape)}. "
                "Its config.json and its delta do not belong together."
            )
        with torch.no_grad():
            value.copy_(tensors[key])
