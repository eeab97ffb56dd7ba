"""Tiny bases of every family, and their conversion with added parameters that all act."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import pliant
from pliant.architectures.npt import FORMS

VOCABULARY = 97
WINDOW = 5
"""Sliding window of the bases that have one; shorter than the sequences of the tests."""
RANK = 6

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
BASES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"attention_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": WINDOW, "head_dim": 8}),
    "qwen2": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {"attention_bias": True, "head_dim": 8}),
    "smollm3": (SmolLM3Config, {"no_rope_layer_interval": 2}),
    "llama_mlp_bias": (LlamaConfig, {"mlp_bias": True}),
}
BASE_NAMES = tuple(BASES)
FAMILY_NAMES = BASE_NAMES[:5]

MakeBase = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny models run fastest on one thread, and then sums are taken in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """Each of the six forms in turn."""
    return request.param


@pytest.fixture(params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the five families in turn."""
    return request.param


@pytest.fixture(scope="session")
def make_base() -> MakeBase:
    """A function that makes a fresh tiny base, the same one every time."""

    def make(name: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        config_class, options = BASES[name]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                config_class(**{**COMMON, **options, **overrides}), dtype=torch.float32
            )
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if "norm" in parameter_name:
                        parameter.copy_(1.0 + 0.3 * torch.randn_like(parameter))
                    elif parameter_name.endswith("bias"):
                        parameter.normal_(std=0.3)
        model.generation_config.pad_token_id = 0
        return model.eval()

    return make


@pytest.fixture(scope="session")
def randomise() -> Callable[..., PreTrainedModel]:
    """A function that gives every added parameter random values, so that every form acts."""

    def fill(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in model.dynamic_parameters():
                scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        return model

    return fill


@pytest.fixture(scope="session")
def convert_randomly(randomise: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """A function that converts a model in place and gives its added parameters random values."""

    def convert(model: PreTrainedModel, form: str, *, layers: Any = "all", **options: Any) -> PreTrainedModel:
        config = pliant.NptConfig.preset(form, **{"rank": RANK, **options})
        return randomise(pliant.convert(model, config, layers=layers, calibration=windows()))

    return convert


@pytest.fixture(scope="session")
def make_converted(
    make_base: MakeBase, convert_randomly: Callable[..., PreTrainedModel]
) -> Callable[..., PreTrainedModel]:
    """A function that makes a tiny base and converts it, with random added parameters."""

    def make(
        form: str,
        base: str = "llama",
        *,
        overrides: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        return convert_randomly(make_base(base, **(overrides or {})), form, **options)

    return make


ROUTED_KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "mod": (pliant.ModConfig, {}),
    "mod gated": (pliant.ModConfig, {"gate_share": 1.0, "gate": "raw", "sampler": "predictor"}),
    "mod attention": (pliant.ModConfig, {"granularity": "attention"}),
    "mod mlp": (pliant.ModConfig, {"granularity": "mlp"}),
    "mod budget": (pliant.ModConfig, {"budget": 0.5, "budget_window": 4}),
    "dtf": (pliant.DtfConfig, {}),
    "dtf gaussian": (pliant.DtfConfig, {"surprise": "gaussian", "criteria": "cu", "gate_share": 1.0}),
    "dtf forecast": (pliant.DtfConfig, {"forecast": True, "criteria": "ce"}),
    "dtf attention": (pliant.DtfConfig, {"granularity": "attention"}),
    "stt": (pliant.SttConfig, {}),
    "stt attention": (pliant.SttConfig, {"granularity": "attention"}),
}
"""Routed layers in their variants."""


@pytest.fixture(params=ROUTED_KINDS)
def routed_kind(request: pytest.FixtureRequest) -> str:
    """Each routed architecture in turn, in its variants."""
    return request.param


@pytest.fixture(scope="session")
def make_routed(make_base: MakeBase, randomise: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """A function that makes a tiny base of four layers and routes tokens through two, by random routers."""

    def make(
        kind: str,
        base: str = "llama",
        *,
        capacity: float = 0.5,
        overrides: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        config_class, own = ROUTED_KINDS[kind]
        model = make_base(base, **{"num_hidden_layers": 4, **(overrides or {})})
        config = config_class(capacity_gamma=capacity, **own)
        pliant.convert(model, config, calibration=windows(), **options)
        randomise(model)
        if capacity < 1:
            pliant.calibrate(model, calibration=windows())
        return model.eval()

    return make


@pytest.fixture(params=[*FORMS, *ROUTED_KINDS])
def dynamic_kind(request: pytest.FixtureRequest) -> str:
    """Each form of plastic layer and each variant of routed layer in turn."""
    return request.param


@pytest.fixture(scope="session")
def make_dynamic(
    make_converted: Callable[..., PreTrainedModel], make_routed: Callable[..., PreTrainedModel]
) -> Callable[..., PreTrainedModel]:
    """A function that makes a tiny base and gives it dynamic layers of any kind, with random added parameters."""
    return lambda kind, *args, **options: (make_routed if kind in ROUTED_KINDS else make_converted)(
        kind, *args, **options
    )


@pytest.fixture(scope="session")
def checkpoint_activations() -> Callable[..., None]:
    """A function that turns gradient checkpointing on, by the name it has in this version."""

    def enable(model: PreTrainedModel, **options: Any) -> None:
        method = getattr(model, "activation_checkpointing_enable", None)
        (method or model.gradient_checkpointing_enable)(options or None)

    return enable


def windows(count: int = 10, length: int = 12, *, seed: int = 3) -> Tensor:
    """Random token windows, enough to calibrate a tiny base."""
    return torch.randint(2, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calibration() -> Tensor:
    """Token windows for conversions below full rank."""
    return windows()


@pytest.fixture
def prompt() -> Tensor:
    """Two rows of eleven tokens, longer than the sliding window."""
    return windows(2, 11, seed=4)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose word "n" has the id n."""
    vocabulary = {"<pad>": 0, "<bos>": 1} | {str(index): index for index in range(2, VOCABULARY)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>")


@pytest.fixture(scope="session")
def state_of() -> Callable[[nn.Module], tuple[type, str]]:
    """A function that returns a model's class and a hash of its parameters with their flags."""

    def state(model: nn.Module) -> tuple[type, str]:
        digest = hashlib.sha256()
        for name, parameter in sorted(model.named_parameters()):
            digest.update(f"{name} {parameter.dtype} {parameter.requires_grad}".encode())
            digest.update(parameter.detach().cpu().view(torch.uint8).numpy().tobytes())
        digest.update(repr(model.training).encode())
        return type(model), digest.hexdigest()

    return state


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, str]]:
    """A function that returns the hash of every file under a folder."""

    def listing(folder: Path) -> dict[str, str]:
        return {
            str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }

    return listing


@pytest.fixture(scope="session")
def largest_difference() -> Callable[[Tensor, Tensor], float]:
    """A function that returns ``max|actual − expected| / max|expected|``."""

    def difference(actual: Tensor, expected: Tensor) -> float:
        assert actual.shape == expected.shape
        scale = expected.detach().abs().max()
        return float((actual.detach().float() - expected.detach().float()).abs().max() / scale)

    return difference


NO_PLIANT = """
import sys

class NoPliant:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pliant":
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, NoPliant())
"""
"""As ``sitecustomize`` it makes pliant impossible to import, in the commands of other packages too."""


@pytest.fixture(scope="session")
def without_pliant(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that can import no pliant, and keeps its caches to itself."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "sitecustomize.py").write_text(NO_PLIANT, encoding="utf-8")
    own = {name: str(folder / name) for name in ("HF_MODULES_CACHE", "HF_HOME", "HF_DATASETS_CACHE")}
    return {**os.environ, **own, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
