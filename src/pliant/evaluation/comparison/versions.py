"""The forms of NPT side by side on a tiny base, in a minute and without any download.

The base is trained first, on the source text of pliant itself, byte by byte, so that its attention carries something
that a form can lose. Then every form is converted from it and trained towards it on the same batches.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from statistics import median
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pliant.architectures import NptConfig
from pliant.architectures.base import nearest
from pliant.architectures.npt import FORMS
from pliant.config import TrainingConfig
from pliant.conversion import convert
from pliant.errors import ConfigError
from pliant.evaluation.comparison.cost import Step, stepper, take_turns
from pliant.metrics import compare_to_base
from pliant.models import DynamicCausalLM
from pliant.statistics import Progress
from pliant.training.callbacks import modulation_norms
from pliant.training.objectives import OBJECTIVES, Student

VERSIONS = ("v1", "v1_single", "v2", "outer", "keyed")
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3},
    "small": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4},
}
"""Shapes of the base, by the name that ``--model-size`` gives them."""
BYTES, WINDOW, BATCH = 256, 64, 16
BASE_STEPS, BASE_RATE = 300, 3e-3
RATE = 1e-3
HELD_OUT, CALIBRATION_BATCHES = 8, 4
REPEATS = 15


@dataclass(frozen=True, kw_only=True)
class Version:
    """One form beside its base.

    Attributes:
        form: Its name.
        rank: Width of its bottleneck.
        parameters: That it adds.
        start_ratio: Perplexity over that of the base as converted, on held-out text.
        start_kl: ``KL(base ‖ model)`` as converted, nats a token.
        ratio: Perplexity over that of the base after the steps.
        kl: KL after them.
        norm: Mean ``‖ΔW_t‖_F`` after them, over tokens and layers.
        step_seconds: Of one step of training, taken in turn with the other forms; the median.
        step_ratio: Of that time to the first form's, the median of the turns.
    """

    form: str
    rank: int
    parameters: int
    start_ratio: float
    start_kl: float
    ratio: float
    kl: float
    norm: float
    step_seconds: float
    step_ratio: float


def compare_versions(
    versions: Sequence[str] = VERSIONS,
    *,
    size: str = "tiny",
    rank: int = 16,
    steps: int = 60,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Converts a tiny base to each form and trains it towards the base, on the same batches.

    Args:
        versions: Forms of NPT.
        size: Shape of the base, ``tiny`` or ``small``.
        rank: Of every form.
        steps: Steps of AdamW on ``KL + 0.1 · hidden error``, as ``objective=equivalence`` takes them. ``v1`` takes
            none: it equals its base at the start.
        seed: Of base and batches.
        progress: Called with a label, the steps done and the steps there are.

    Returns:
        ``base`` (its shape, parameters and perplexity a byte) and ``versions``: by form the fields of
        :class:`Version`.

    Raises:
        ConfigError: A form or the size is unknown, or a number is out of range.
    """
    _check(versions, size, rank, steps)
    text = source_bytes()
    base = _trained_base(text, SIZES[size], seed, progress)
    held_out = text[-HELD_OUT * WINDOW :].view(HELD_OUT, WINDOW)
    models = {form: _converted(base, form, rank, text) for form in versions}
    starts = {form: compare_to_base(model, held_out) for form, model in models.items()}
    batches = list(_batches(text, steps, seed + 1))
    for done, (form, model) in enumerate(models.items(), start=1):
        if form != "v1":
            _train(model, batches)
        if progress is not None:
            progress("Training towards the base", done, len(models))
    steppers = {form: _stepper(copy.deepcopy(model), batches[0]) for form, model in models.items()}
    seconds = take_turns(steppers, REPEATS)
    first = seconds[versions[0]]
    found = {}
    for form, model in models.items():
        start, end = starts[form], compare_to_base(model, held_out)
        version = Version(
            form=form,
            rank=rank,
            parameters=sum(p.numel() for _, p in model.dynamic_parameters()),
            start_ratio=start.ratio,
            start_kl=start.kl,
            ratio=end.ratio,
            kl=end.kl,
            norm=modulation_norms(model, held_out)["modulation_norm/mean"],
            step_seconds=median(seconds[form]),
            step_ratio=median([a / b for a, b in zip(seconds[form], first, strict=True)]),
        )
        found[form] = asdict(version)
    perplexity = next(iter(starts.values())).base_perplexity
    shape = {"parameters": sum(p.numel() for p in base.parameters()), "perplexity": perplexity}
    return {"base": {"size": size, **SIZES[size], **shape}, "steps": steps, "seed": seed, "versions": found}


def source_bytes() -> Int[Tensor, " bytes"]:
    """Returns the source text of pliant as bytes, module by module."""
    folders = [resources.files("pliant")]
    parts: list[bytes] = []
    while folders:
        entries = sorted(folders.pop(0).iterdir(), key=lambda entry: entry.name)
        parts += [entry.read_bytes() for entry in entries if entry.name.endswith(".py")]
        folders += [entry for entry in entries if entry.is_dir() and entry.name != "__pycache__"]
    return torch.frombuffer(bytearray(b"\n".join(parts)), dtype=torch.uint8).long()


def _check(versions: Sequence[str], size: str, rank: int, steps: int) -> None:
    if not versions:
        raise ConfigError(f"versions must name at least one form; got none. They are {', '.join(FORMS)}.")
    for form in versions:
        if form not in FORMS:
            raise ConfigError(f"versions must be among {', '.join(FORMS)}; got {form!r}.{nearest(form, FORMS)}")
    if len(set(versions)) < len(versions):
        raise ConfigError(f"versions must name each form once; got {', '.join(versions)}.")
    if size not in SIZES:
        raise ConfigError(f"size must be one of {', '.join(SIZES)}; got {size!r}.{nearest(size, tuple(SIZES))}")
    width = SIZES[size]["hidden_size"]
    if not 1 <= rank <= width:
        raise ConfigError(f"rank must be in 1..{width}, the width of the {size} base; got {rank}.")
    if steps < 1:
        raise ConfigError(f"steps must be at least 1; got {steps}. 60 is the default.")


def _trained_base(text: Tensor, shape: Mapping[str, Any], seed: int, progress: Progress | None) -> LlamaForCausalLM:
    """A small Llama over bytes, trained on all of the text but the held-out end."""
    config = LlamaConfig(
        vocab_size=BYTES,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **shape,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE)
    for done, batch in enumerate(_batches(text, BASE_STEPS, seed), start=1):
        for group in optimizer.param_groups:
            group["lr"] = BASE_RATE * 0.5 * (1 + math.cos(math.pi * (done - 1) / BASE_STEPS))
        loss: Any = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if progress is not None:
            progress("Training the base", done, BASE_STEPS)
    return model.eval()


def _batches(text: Tensor, count: int, seed: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    last = len(text) - (HELD_OUT + 1) * WINDOW
    for _ in range(count):
        starts = torch.randint(last, (BATCH,), generator=generator)
        rows = torch.stack([text[start : start + WINDOW] for start in starts.tolist()])
        yield {"input_ids": rows, "labels": rows}


def _converted(base: LlamaForCausalLM, form: str, rank: int, text: Tensor) -> DynamicCausalLM:
    windows = torch.cat([batch["input_ids"] for batch in _batches(text, CALIBRATION_BATCHES, seed=2)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = convert(copy.deepcopy(base), NptConfig.preset(form, rank=rank), calibration=windows)
    return model.freeze_base()


def _student(model: DynamicCausalLM) -> Student:
    return Student(wrapped=model, model=model, adapted=None, teacher=None, config=TrainingConfig())


def _train(model: DynamicCausalLM, batches: Sequence[Mapping[str, Tensor]]) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    student = _student(model.train())
    for batch in batches:
        (OBJECTIVES["end_to_end"](student, batch)["loss"] / batch["labels"].numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


def _stepper(model: DynamicCausalLM, batch: Mapping[str, Tensor]) -> Step:
    """A step of tuning on text, which every form can take; the first one is taken here."""
    step = stepper("causal_lm", _student(model.train()), batch)
    step()
    return step
