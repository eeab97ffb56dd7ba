"""Second moments of the keys of each MLP, ``E[m mᵀ]`` of what its ``down_proj`` reads, kept on disk once taken.

An edit of ``down_proj`` that moves the keys of ordinary text little is one whose solve knows these moments.
"""

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.architectures import added_parameters
from pliant.data import calibration_tokens
from pliant.errors import ConfigError, DataError
from pliant.models import Layers, select_layers
from pliant.models.bases import cache_dir
from pliant.models.checkpoint import digest, fingerprint
from pliant.models.staging import replaced
from pliant.statistics import Progress, base_mode, evaluating, input_device

logger = logging.getLogger(__name__)

Text = str | os.PathLike | Iterable[str]
"""One text, the path of a text file, or several texts."""

NUM_TOKENS, MOST_TOKENS = 65_536, 150_000
WINDOW = 512
BATCH_TOKENS = 2_048
CHUNK_TOKENS = 16_384
"""How many tokens are read between two states on disk."""
PACKED_VALUES = 1_024
"""How many values of a packed or offloaded parameter stand for it."""
LARGEST_DOUBLE = 8_192
"""Widest moment that is factorised in fp64."""

_FOLDER = "key-moments"
_FORMAT = "1"
_LABEL = "Reading key statistics"


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyMoments:
    """Uncentred second moment ``C = E[m mᵀ]`` of the keys of one layer.

    Attributes:
        moment: C, in fp32.
        tokens: How many keys it was taken from.
    """

    moment: Float[Tensor, "d_ffn d_ffn"]
    tokens: int
    _factors: dict[float, Tensor] = field(default_factory=dict, init=False, repr=False)

    def solve(self, matrix: Float[Tensor, "d_ffn columns"], ridge: float) -> Float[Tensor, "d_ffn columns"]:
        """Returns ``(C + ridge · mean(diag C) · I)⁻¹ matrix``, by a Cholesky factor that is kept for the next call.

        Args:
            matrix: What to solve for, on any device.
            ridge: Share of the mean of the diagonal that is added to it; 0 only where no direction is missing.

        Raises:
            ConfigError: The ridge is negative, not finite, or too small for this moment.
        """
        factor = self._factor(ridge)
        return torch.cholesky_solve(matrix.to(factor), factor).to(matrix)

    def to(self, device: torch.device | str) -> "KeyMoments":
        """Returns the same moment on ``device``, where its solves will run."""
        return KeyMoments(moment=self.moment.to(device), tokens=self.tokens)

    def _factor(self, ridge: float) -> Float[Tensor, "d_ffn d_ffn"]:
        if ridge not in self._factors:
            if not (math.isfinite(ridge) and ridge >= 0):
                raise ConfigError(f"ridge must be a finite number ≥ 0; got {ridge}. Try 0.01.")
            matrix = self.moment.to(torch.float64 if len(self.moment) <= LARGEST_DOUBLE else torch.float32, copy=True)
            matrix.diagonal().add_(ridge * matrix.diagonal().mean())
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if failed.item():
                raise ConfigError(
                    f"ridge must make the moment of {self.tokens} keys of width {len(self.moment)} positive definite; "
                    f"{ridge} does not. Raise it, or take the moment from more tokens."
                )
            self._factors[ridge] = factor
        return self._factors[ridge]


def key_moments(
    model: PreTrainedModel,
    tokens: Int[Tensor, "windows window"],
    layers: Layers,
    *,
    progress: Progress | None = None,
) -> dict[int, KeyMoments]:
    """Returns ``E[m mᵀ]`` of the inputs m of ``down_proj`` in each of ``layers`` over ``tokens``, in base mode.

    Args:
        model: A causal LM of a family that converts.
        tokens: Token windows, each read on its own.
        layers: As in ``pliant.convert``; only these cost more than the forward pass.
        progress: Called with a label, the windows done and the windows there are.

    Raises:
        ConversionError: A layer does not exist.
        DataError: There are no windows, or a moment is not finite.
    """
    _check_windows(tokens)
    indices = select_layers(layers, model.config.num_hidden_layers)
    sums: dict[int, Tensor] = {}
    _add_grams(model, tokens, range(len(tokens)), sums, indices, progress)
    return {index: _finished(index, sums[index], tokens) for index in indices}


def cached_key_moments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Layers,
    *,
    num_tokens: int = NUM_TOKENS,
    text: Text | None = None,
    progress: Progress | None = None,
) -> dict[int, KeyMoments]:
    """Returns :func:`key_moments` of a text from the cache on disk, where what is missing is computed and kept.

    The cache knows a base by its fingerprint, with values of what is packed or offloaded, and a text by its tokens. A
    run that was interrupted goes on at the last 16,384 tokens. Adding layers later computes only those.

    Args:
        model: A causal LM of a family that converts; converted or edited, its base is read.
        tokenizer: Its tokenizer.
        layers: As in ``pliant.convert``.
        num_tokens: How many tokens to read, rounded up to full windows of 512.
        text: One text, the path of a text file, or several texts; the embedded texts by default.
        progress: Called with a label, the windows done and the windows there are.

    Raises:
        ConfigError: ``num_tokens`` is outside 1..150,000.
        ConversionError: A layer does not exist.
        DataError: The text is missing or too short, or a moment is not finite.
    """
    if not 1 <= num_tokens <= MOST_TOKENS:
        raise ConfigError(f"num_tokens must be in 1..{MOST_TOKENS}; got {num_tokens}. {NUM_TOKENS} are enough.")
    indices = select_layers(layers, model.config.num_hidden_layers)
    tokens = calibration_tokens(
        tokenizer, text, num_tokens=num_tokens, window=min(WINDOW, model.config.max_position_embeddings)
    )
    folder = _folder(model, tokens)
    chunk = max(1, CHUNK_TOKENS // tokens.shape[1])
    saved = {index: _read(folder, index, model.config.intermediate_size, len(tokens), chunk) for index in indices}
    sums = {index: state[0] for index, state in saved.items() if state is not None}
    done = {index: 0 if state is None else state[1] for index, state in saved.items()}
    for start in range(0, len(tokens), chunk):
        stop = min(start + chunk, len(tokens))
        behind = [index for index in indices if done[index] < stop]
        if not behind:
            continue
        _add_grams(model, tokens, range(start, stop), sums, behind, progress)
        for index in behind:
            _finished(index, sums[index], tokens)  # refused before it is kept
            _write(folder, index, sums[index], stop)
    return {index: _finished(index, sums[index], tokens) for index in indices}


@torch.no_grad()
def _add_grams(
    model: PreTrainedModel,
    tokens: Int[Tensor, "windows window"],
    part: range,
    sums: dict[int, Tensor],
    layers: Iterable[int],
    progress: Progress | None,
) -> None:
    """Adds ``Σ m mᵀ`` over the windows of ``part`` to ``sums``, without logits and without a cache."""
    device = input_device(model)
    size = max(1, BATCH_TOKENS // tokens.shape[1])
    with evaluating(model), base_mode(model), _grams(model, sums, layers):
        for first in part[::size]:
            last = min(first + size, part.stop)
            model.model(tokens[first:last].to(device), use_cache=False)
            if progress is not None:
                progress(_LABEL, last, len(tokens))


@contextmanager
def _grams(model: PreTrainedModel, sums: dict[int, Tensor], layers: Iterable[int]) -> Iterator[None]:
    """Within the block every forward adds the Gram matrices of its keys to ``sums``."""

    def accumulate(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            keys = args[0].flatten(0, -2).float()  # (B·T, f)
            if index not in sums:
                sums[index] = keys.new_zeros(keys.shape[1], keys.shape[1])
            sums[index] = sums[index].to(keys.device).addmm_(keys.T, keys)

        return hook

    hooks = [model.model.layers[i].mlp.down_proj.register_forward_pre_hook(accumulate(i)) for i in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _finished(index: int, total: Float[Tensor, "d_ffn d_ffn"], tokens: Int[Tensor, "windows window"]) -> KeyMoments:
    if not total.isfinite().all():
        raise DataError(
            f"the keys of layer {index} must be finite on the text; they are not. Load the model in bfloat16 or "
            "float32, or check the text."
        )
    return KeyMoments(moment=total.cpu() / tokens.numel(), tokens=tokens.numel())


def _check_windows(tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise DataError(
            f"tokens must have shape (windows, window) with at least one token; got {tuple(tokens.shape)}. "
            "Make them with pliant.data.token_windows."
        )


def _folder(model: PreTrainedModel, tokens: Int[Tensor, "windows window"]) -> Path:
    text = hashlib.sha256(repr(tuple(tokens.shape)).encode() + tokens.numpy().tobytes()).hexdigest()[:12]
    return cache_dir() / _FOLDER / _base(model) / f"{text}-{tokens.numel()}"


def _base(model: PreTrainedModel) -> str:
    """What stands for the base: its fingerprint, and values of what that leaves out as packed or offloaded.

    NF4 and int8 of one base, or NF4 of two fine-tunes, differ in little else.
    """
    added, hidden = {name for name, _ in added_parameters(model)}, []
    for path, module in model.named_modules():
        own = {name: parameter for name, parameter in module.named_parameters(path, recurse=False) if name not in added}
        offloaded = any(parameter.is_meta for parameter in own.values())
        with align_module_device(module, torch.device("cpu") if offloaded else None):
            for name, parameter in own.items():
                if parameter.is_meta or not parameter.is_floating_point():
                    values = module.get_parameter(name.rpartition(".")[2])
                    hidden.append(f"{name} {type(module).__name__} {_digits(values)}")
    plain = digest(fingerprint(model))
    return plain if not hidden else f"{plain}-{hashlib.sha256(repr(sorted(hidden)).encode()).hexdigest()[:12]}"


def _digits(values: Tensor) -> str:
    """Digits that stand for a dtype and evenly spaced values of it."""
    flat = values.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, PACKED_VALUES, dtype=torch.float64).long()
    found = flat[places.to(flat.device)].cpu().view(torch.uint8).numpy().tobytes()
    return f"{flat.dtype} {hashlib.sha256(found).hexdigest()}"


def _file(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:02d}.safetensors"


def _read(folder: Path, index: int, d_ffn: int, windows: int, chunk: int) -> tuple[Tensor, int] | None:
    """Returns the sum and the windows done of a layer, or None where there is no sound file."""
    file = _file(folder, index)
    if not file.is_file():
        return None
    try:
        with safe_open(str(file), framework="pt") as reader:
            metadata, total = reader.metadata() or {}, reader.get_tensor("sum")
        done = int(metadata["windows"])
        sound = metadata["format"] == _FORMAT and total.shape == (d_ffn, d_ffn)
        sound = sound and (done == windows or done in range(chunk, windows, chunk)) and bool(total.isfinite().all())
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        logger.warning("the cached key statistics %s cannot be read (%s); computing them again", file, error)
        sound = False
    else:
        if sound:
            return total, done
        logger.warning("the cached key statistics %s do not fit; computing them again", file)
    file.unlink(missing_ok=True)
    return None


def _write(folder: Path, index: int, total: Tensor, windows: int) -> None:
    with replaced(_file(folder, index), prefix=".layer-") as staged:
        save_file({"sum": total.cpu().contiguous()}, staged, {"format": _FORMAT, "windows": str(windows)})
