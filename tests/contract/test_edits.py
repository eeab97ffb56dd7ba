"""Edits on models of every kind: what they add, take back, save and merge."""

import copy
import importlib.util
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

import pliant
from pliant.architectures.npt import FORMS
from pliant.errors import CheckpointError, EditError
from pliant.models import EDITS_NAME, Delta, Edit, export_merged, read_edits, write_edits
from pliant.models.checkpoint import digest, fingerprint

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
QUANTISATIONS = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}
WIDE = {"hidden_size": 64, "intermediate_size": 128}
KINDS = ("dense", "keyed")
NAMES = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj")
MERGED_TOLERANCE = 1e-5
BF16_TOLERANCE = 0.05


def random_edit(model: Any, seed: int = 0, *, rank: int = 2, scaled: bool = True, strength: float = 0.3) -> Edit:
    """An edit of a projection in every layer, and of a second one in the first."""
    generator = torch.Generator().manual_seed(seed)
    num_layers = model.config.num_hidden_layers
    names = [NAMES[(seed + i) % len(NAMES)] for i in range(num_layers)]
    paths = [f"layers.{i}.{name}" for i, name in enumerate(names)]
    paths.append(f"layers.0.{NAMES[(seed + 1) % len(NAMES)]}")
    deltas = {}
    for path in paths:
        module = model.edits.projection(path)
        left = torch.randn(module.out_features, rank, generator=generator)
        right = torch.randn(module.in_features, rank, generator=generator) * strength / module.in_features**0.5
        scale = strength * torch.randn(module.out_features, generator=generator) if scaled and seed % 2 else None
        deltas[path] = Delta(left=left, right=right, scale=scale)
    return Edit(context=f"fact {seed}", deltas=deltas, id=f"{seed:08x}", kl=0.001 * seed, details={"seed": seed})


def logits_of(model: Any, prompt: Tensor) -> Tensor:
    with torch.no_grad():
        return model(prompt).logits


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.fixture
def folder(make_base: Callable, tokenizer: Any, tmp_path: Path) -> Path:
    """A tiny base on disk, tokenizer included."""
    make_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def make_model(make_base: Callable, convert_randomly: Callable, tmp_path: Path) -> Callable[..., Any]:
    """A function that makes a dense or a converted pliant model of a base."""

    def make(kind: str, base: str = "llama", **overrides: Any) -> Any:
        path = tmp_path / f"base-{base}"
        if not path.exists():
            make_base(base, **overrides).save_pretrained(path)
        model = pliant.load(path).eval()
        return model if kind == "dense" else convert_randomly(model, kind, layers=[0, 2])

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_edits_act_and_go_without_a_trace(
    kind: str, family: str, make_model: Callable, prompt: Tensor, state_of: Callable
) -> None:
    model = make_model(kind, family)
    before, state, hooks = logits_of(model, prompt), state_of(model), hooks_of(model)
    edits = [model.edits.add(random_edit(model, seed)) for seed in range(3)]
    assert state_of(model) == state
    assert not torch.allclose(logits_of(model, prompt), before, atol=0.01)
    for edit in edits:
        model.edits.revert(edit.id)
    assert torch.equal(logits_of(model, prompt), before)
    assert hooks_of(model) == hooks
    assert state_of(model) == state


@pytest.mark.parametrize("kind", KINDS)
def test_edits_are_the_changed_weights(
    kind: str, family: str, make_model: Callable, prompt: Tensor, largest_difference: Callable
) -> None:
    model, merged = make_model(kind, family), make_model(kind, family)
    for seed in range(3):
        model.edits.add(random_edit(model, seed))
    with torch.no_grad():
        for path in model.edits.paths:
            merged.model.get_submodule(path).weight.copy_(model.edits.merged(path))
    assert largest_difference(logits_of(model, prompt), logits_of(merged, prompt)) < MERGED_TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_base_mode_suspends_edits(
    kind: str, family: str, make_model: Callable, make_base: Callable, prompt: Tensor
) -> None:
    model = make_model(kind, family)
    model.edits.add(random_edit(model))
    edited, base = logits_of(model, prompt), logits_of(make_base(family), prompt)
    with model.base_mode():
        assert torch.equal(logits_of(model, prompt), base)
        with model.base_mode(), model.edits.suspended():
            assert torch.equal(logits_of(model, prompt), base)
        assert torch.equal(logits_of(model, prompt), base)
    assert torch.equal(logits_of(model, prompt), edited)


def test_edits_survive_conversion(form: str, make_model: Callable, prompt: Tensor, convert_randomly: Callable) -> None:
    model = make_model("dense")
    edit = model.edits.add(random_edit(model))
    with model.edits.suspended():
        convert_randomly(model, form, layers=[0, 2])
        plain = logits_of(model, prompt)
    assert model.edits[edit.id] is edit
    edited = logits_of(model, prompt)
    assert not torch.allclose(edited, plain, atol=1e-3)
    assert {path for path in model.edits.paths if model.edits.projection(path)._forward_hooks} == set(edit.deltas)
    model.edits.revert(edit.id)
    assert torch.equal(logits_of(model, prompt), plain)


def test_a_hundred_edits_reverted_in_any_order_leave_those_that_stay_bitwise(
    make_model: Callable, prompt: Tensor, tmp_path: Path
) -> None:
    model = make_model("keyed")
    before = logits_of(model, prompt)
    for seed in range(100):
        model.edits.add(random_edit(model, seed, rank=1, strength=0.05))
    order = list(range(100))
    random.Random(0).shuffle(order)
    for number, seed in enumerate(order):
        model.edits.revert(f"{seed:08x}")
        if number in (0, 49, 96):
            fresh = make_model("keyed")
            for kept in sorted(order[number + 1 :]):
                fresh.edits.add(random_edit(fresh, kept, rank=1, strength=0.05))
            assert torch.equal(logits_of(model, prompt), logits_of(fresh, prompt))
            assert all(torch.equal(model.edits.merged(p), fresh.edits.merged(p)) for p in fresh.edits.paths)
            model.save_pretrained(tmp_path / str(number))
            assert torch.equal(logits_of(pliant.load(tmp_path / str(number)), prompt), logits_of(model, prompt))
    assert torch.equal(logits_of(model, prompt), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_model_has_edits_of_its_own(
    kind: str, duplicate: Callable, make_model: Callable, prompt: Tensor
) -> None:
    model = make_model(kind)
    before = logits_of(model, prompt)
    edit = model.edits.add(random_edit(model))
    edited = logits_of(model, prompt)
    other = duplicate(model)
    assert torch.equal(logits_of(other, prompt), edited)
    other.edits.revert(edit.id)
    assert torch.equal(logits_of(other, prompt), before)
    assert torch.equal(logits_of(model, prompt), edited)
    model.edits.revert(edit.id)
    assert torch.equal(logits_of(model, prompt), before)


def test_generation_with_a_cache_is_that_without(make_model: Callable, prompt: Tensor) -> None:
    model = make_model("keyed")
    model.edits.add(random_edit(model, 1))
    produced = model.generate(prompt, max_new_tokens=4, do_sample=False)
    uncached = model(produced[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(produced[:, prompt.shape[1] :], uncached[:, prompt.shape[1] - 1 :])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_edits(
    kind: str, make_model: Callable, prompt: Tensor, checkpoint_activations: Callable
) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = make_model(kind).train()
        model.edits.add(random_edit(model, 1))
        if checkpointed:
            checkpoint_activations(model)
        model(prompt, labels=prompt, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


# Quantised, offloaded, adapted


@needs_bitsandbytes
@pytest.mark.parametrize("quantisation", QUANTISATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_edits_act_on_a_quantised_base(
    kind: str, quantisation: str, make_base: Callable, convert_randomly: Callable, prompt: Tensor, tmp_path: Path
) -> None:
    make_base("qwen2", **WIDE).save_pretrained(tmp_path / "base")
    options = {"quantization_config": BitsAndBytesConfig(**QUANTISATIONS[quantisation])}
    model = pliant.load(tmp_path / "base", dtype=torch.float32, **options).eval()
    model = convert_randomly(model, kind) if kind != "dense" else model
    logits_of(model, prompt)  # the first such forward repacks 4-bit weights on some CPUs
    before = logits_of(model, prompt)
    edit = model.edits.add(random_edit(model, 1))
    edited = logits_of(model, prompt)
    assert not torch.allclose(edited, before, atol=0.01)
    with pytest.raises(EditError, match=r"quantised.*without quantization_config"):
        export_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    if kind != "dense":
        model.save_pretrained(tmp_path / "delta", delta=True)
        loaded = pliant.load(tmp_path / "delta", **options)
        logits_of(loaded, prompt)
        assert torch.equal(logits_of(loaded, prompt), edited)
        plain = pliant.load(tmp_path / "delta")  # the same edits over the base as it was
        assert [e.id for e in plain.edits] == [edit.id]
    model.edits.revert(edit.id)
    assert torch.equal(logits_of(model, prompt), before)


def test_edits_act_on_offloaded_layers(
    make_base: Callable, prompt: Tensor, tmp_path: Path, largest_difference: Callable
) -> None:
    make_base("llama_mlp_bias").save_pretrained(tmp_path / "base")
    places = {f"model.layers.{i}": "cpu" if i == 0 else "disk" for i in range(3)}
    places |= {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "cpu"}
    model = pliant.load(tmp_path / "base", device_map=places, offload_folder=tmp_path / "weights").eval()
    assert model.model.layers[2].mlp.up_proj.weight.is_meta
    in_memory = pliant.load(tmp_path / "base")
    before = logits_of(model, prompt)
    for seed in range(3):
        model.edits.add(random_edit(model, seed))
        in_memory.edits.add(random_edit(in_memory, seed))
    assert largest_difference(logits_of(model, prompt), logits_of(in_memory, prompt)) < MERGED_TOLERANCE
    assert torch.equal(model.edits.merged("layers.2.mlp.up_proj"), in_memory.edits.merged("layers.2.mlp.up_proj"))
    assert model.model.layers[2].mlp.up_proj.weight.is_meta
    with pytest.raises(EditError, match="offloaded"):
        export_merged(model, tmp_path / "merged")
    model.edits.clear()
    assert torch.equal(logits_of(model, prompt), before)


@pytest.mark.parametrize("edited_first", [True, False])
def test_edits_and_adapters_stand_side_by_side(
    edited_first: bool, make_model: Callable, prompt: Tensor, tmp_path: Path, largest_difference: Callable
) -> None:
    peft = pytest.importorskip("peft")
    model = make_model("keyed")
    before = logits_of(model, prompt)
    if edited_first:
        edit = model.edits.add(random_edit(model, 1))
    config = peft.LoraConfig(r=2, target_modules=["down_proj", "gate_proj", "o_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    if not edited_first:
        edit = model.edits.add(random_edit(model, 1))
    adapted = logits_of(wrapped, prompt)
    with wrapped.disable_adapter():
        edited = logits_of(wrapped, prompt)
    assert not torch.allclose(adapted, edited, atol=0.01)
    other = make_model("keyed")
    other.edits.add(random_edit(other, 1))
    assert torch.equal(edited, logits_of(other, prompt))
    with pytest.raises(EditError, match="adapters"):
        export_merged(model, tmp_path / "merged")
    model.edits.revert(edit.id)
    with wrapped.disable_adapter():
        assert torch.equal(logits_of(wrapped, prompt), before)


def test_edits_are_not_saved_beside_adapters_alone(make_model: Callable, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = make_model("dense")
    model.edits.add(random_edit(model))
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["down_proj"]))
    with pytest.raises(EditError, match=r"adapters of peft.*Save the edited model first"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# Files

CHILD = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
if sys.argv[4] == "with":
    import pliant
torch.set_num_threads(1)
tokens = load_file(sys.argv[1])["tokens"]
model = AutoModelForCausalLM.from_pretrained(sys.argv[3])
with torch.no_grad():
    save_file({"logits": model(tokens).logits}, sys.argv[2])
assert ("pliant" in sys.modules) == (sys.argv[4] == "with")
print(type(model).__name__)
"""


def elsewhere(model_folder: Path, prompt: Tensor, tmp_path: Path, *, with_pliant: bool) -> tuple[str, Tensor]:
    """Returns the class and the logits that a new process gets."""
    tokens, logits = tmp_path / "tokens.safetensors", tmp_path / "logits.safetensors"
    save_file({"tokens": prompt}, tokens)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHILD, str(tokens), str(logits), str(model_folder)]
    command.append("with" if with_pliant else "without")
    done = subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True, text=True)
    return done.stdout.strip(), load_file(logits)["logits"]


@pytest.mark.parametrize(("kind", "delta"), [("dense", False), ("keyed", False), ("keyed", True)])
def test_edits_travel_with_the_model(
    kind: str, delta: bool, make_model: Callable, prompt: Tensor, tmp_path: Path
) -> None:
    model = make_model(kind)
    for seed in (5, 1, 3):
        model.edits.add(random_edit(model, seed))
    model.save_pretrained(tmp_path / "model", delta=delta)
    name, logits = elsewhere(tmp_path / "model", prompt, tmp_path, with_pliant=True)
    assert name == "PliantLlamaForCausalLM"
    assert torch.equal(logits, logits_of(model, prompt))
    loaded = pliant.load(tmp_path / "model")
    assert [edit.id for edit in loaded.edits] == ["00000005", "00000001", "00000003"]
    for edit, expected in zip(loaded.edits, model.edits, strict=True):
        assert (edit.context, edit.kl, edit.details) == (expected.context, expected.kl, expected.details)
    base = pliant.load(tmp_path / "model", edits=False)
    assert not len(base.edits)
    with model.edits.suspended():
        assert torch.equal(logits_of(base, prompt), logits_of(model, prompt))
    loaded.edits.clear()
    loaded.save_pretrained(tmp_path / "model", delta=delta)
    assert not (tmp_path / "model" / EDITS_NAME).exists()
    assert not len(pliant.load(tmp_path / "model").edits)


def test_a_delta_over_an_edited_base_folder_has_only_its_own_edits(
    make_model: Callable, convert_randomly: Callable, prompt: Tensor, tmp_path: Path
) -> None:
    dense = make_model("dense")
    dense.edits.add(random_edit(dense, 1))
    dense.save_pretrained(tmp_path / "edited")
    model = convert_randomly(pliant.load(tmp_path / "edited").eval(), "v2")
    model.edits.add(random_edit(model, 2))
    model.save_pretrained(tmp_path / "delta", delta=True)
    loaded = pliant.load(tmp_path / "delta")
    assert [edit.id for edit in loaded.edits] == ["00000001", "00000002"]
    assert torch.equal(logits_of(loaded, prompt), logits_of(model, prompt))
    model.edits.clear()
    model.save_pretrained(tmp_path / "delta", delta=True)
    loaded = pliant.load(tmp_path / "delta")
    assert not len(loaded.edits)
    assert torch.equal(logits_of(loaded, prompt), logits_of(model, prompt))


def test_edits_of_another_base_are_refused_by_both_digests(
    make_model: Callable, make_base: Callable, tmp_path: Path
) -> None:
    model = make_model("dense")
    model.edits.add(random_edit(model))
    model.save_pretrained(tmp_path / "model")
    make_base(seed=1).save_pretrained(tmp_path / "other")
    other = pliant.load(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "model" / EDITS_NAME).rename(tmp_path / "other" / EDITS_NAME)
    wanted, got = digest(fingerprint(other)), digest(fingerprint(model))
    with pytest.raises(EditError, match=rf"fingerprint {wanted}.*got .*fingerprint {got}.*anew"):
        pliant.load(tmp_path / "other")
    assert not len(pliant.load(tmp_path / "other", edits=False).edits)


def test_a_damaged_ledger_stops_loading(make_model: Callable, tmp_path: Path) -> None:
    model = make_model("keyed")
    model.edits.add(random_edit(model))
    for delta in (False, True):
        path = tmp_path / f"model-{delta}"
        model.save_pretrained(path, delta=delta)
        whole = (path / EDITS_NAME).read_bytes()
        (path / EDITS_NAME).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(EditError, match="whole safetensors file"):
            pliant.load(path)


def test_edits_load_in_another_dtype(
    make_model: Callable, prompt: Tensor, tmp_path: Path, largest_difference: Callable
) -> None:
    model = make_model("keyed")
    model.edits.add(random_edit(model, 1))
    model.save_pretrained(tmp_path / "model")
    half = pliant.load(tmp_path / "model", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert next(iter(half.edits)).deltas["layers.0.mlp.gate_proj"].left.dtype == torch.float32
    assert largest_difference(logits_of(half, prompt), logits_of(model, prompt)) < BF16_TOLERANCE


def test_files_written_without_a_model_are_those_of_the_model(make_model: Callable, tmp_path: Path) -> None:
    model = make_model("dense")
    for seed in range(3):
        model.edits.add(random_edit(model, seed))
    model.save_pretrained(tmp_path / "model")
    saved = read_edits(tmp_path / "model")
    assert saved.base == model.spec.base["name"]
    write_edits(tmp_path / "model", saved.with_edits([edit for edit in saved if edit.id != "00000001"]))
    model.edits.revert("00000001")
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "model" / EDITS_NAME).keys() == load_file(tmp_path / "again" / EDITS_NAME).keys()
    assert [edit.id for edit in pliant.load(tmp_path / "model").edits] == ["00000000", "00000002"]


# Merging


@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_model_is_exported_as_its_stock_class(
    tied: bool,
    family: str,
    make_base: Callable,
    tokenizer: Any,
    prompt: Tensor,
    tmp_path: Path,
    state_of: Callable,
    largest_difference: Callable,
) -> None:
    make_base(family, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = pliant.load(tmp_path / "base").eval()
    for seed in range(3):
        model.edits.add(random_edit(model, seed))
    edited, state = logits_of(model, prompt), state_of(model)
    export_merged(model, tmp_path / "merged")
    assert state_of(model) == state
    assert torch.equal(logits_of(model, prompt), edited)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    stock = type(make_base(family)).__name__
    assert (config["model_type"], config["architectures"]) == (family, [stock])
    assert "pliant" not in json.dumps(config).lower()
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "generation_config.json", "tokenizer_config.json"} <= files
    assert EDITS_NAME not in files
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("base", "merged")]
    assert sizes[0] == pytest.approx(sizes[1], abs=256)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("5 6")["input_ids"] == [5, 6]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged).__name__ == stock
    assert largest_difference(logits_of(merged, prompt), edited) < MERGED_TOLERANCE
    assert list(tmp_path.glob(".merged*")) == []
    if family == "llama":
        name, logits = elsewhere(tmp_path / "merged", prompt, tmp_path, with_pliant=False)
        assert name == stock
        assert largest_difference(logits, edited) < MERGED_TOLERANCE


def test_a_converted_model_is_exported_with_edits_in_its_weights(
    form: str, make_model: Callable, prompt: Tensor, tmp_path: Path, largest_difference: Callable
) -> None:
    model = make_model(form)
    model.edits.add(random_edit(model, 1))
    export_merged(model, tmp_path / "merged")
    merged = pliant.load(tmp_path / "merged")
    assert type(merged) is type(model)
    assert merged.spec.layers == model.spec.layers
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "merged").glob("*.json"))
    assert not len(merged.edits)
    assert largest_difference(logits_of(merged, prompt), logits_of(model, prompt)) < MERGED_TOLERANCE


def test_merging_rounds_once(folder: Path, prompt: Tensor, tmp_path: Path, largest_difference: Callable) -> None:
    model = pliant.load(folder, dtype=torch.bfloat16).eval()
    model.edits.add(random_edit(model, 1))
    export_merged(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    for path in model.edits.paths:
        assert torch.equal(merged.model.get_submodule(path).weight, model.edits.merged(path).bfloat16())
    assert largest_difference(logits_of(merged, prompt), logits_of(model, prompt)) < BF16_TOLERANCE


def test_export_touches_no_folder_with_something_in_it(
    make_model: Callable, tmp_path: Path, files_of: Callable
) -> None:
    model = make_model("dense")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = files_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"new or empty.*holds notes\.txt"):
        export_merged(model, tmp_path / "full")
    with pytest.raises(CheckpointError, match="is a file"):
        export_merged(model, tmp_path / "full" / "notes.txt")
    assert files_of(tmp_path) == before
    export_merged(model, tmp_path / "empty")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "empty").config.model_type == "llama"


def test_a_failed_export_leaves_nothing(make_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("dense")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pliant.models.export.save_tokenizer", full_disk)
    with pytest.raises(EditError, match=r"No space left.*nothing is left"):
        export_merged(model, tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []


# Being killed

KILLER = """
import os, signal, sys, time
from pathlib import Path
import torch
from pliant.cli import main
from pliant.models import read_edits, write_edits
torch.set_num_threads(1)
target, source = sys.argv[1:]

def killed(work, seconds):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return [edit.id for edit in read_edits(target)]

def rewrite():
    one, two = read_edits(target), read_edits(source)
    while True:
        write_edits(target, one.with_edits([*one, *two]))
        write_edits(target, one)

one = read_edits(target)
before, after = [edit.id for edit in one], [edit.id for edit in (*one, *read_edits(source))]
whole = set()
for attempt in range(12):
    found = killed(rewrite, 0.02 + 0.013 * attempt)
    assert found in (before, after), found
    whole.add(len(found))
    write_edits(target, one)
apply = lambda: main(["edits", "apply", target, source])
for attempt in range(8):
    found = killed(apply, 0.02 * 1.8**attempt)
    assert found in (before, after), found
    whole.add(len(found))
    write_edits(target, one)
assert whole == {len(before), len(after)}, whole
"""


def test_a_killed_writer_leaves_all_edits_or_none(make_model: Callable, tmp_path: Path, prompt: Tensor) -> None:
    model = make_model("dense")
    for path, seeds in (("target", (1,)), ("source", (2, 3))):
        model.edits.clear()
        for seed in seeds:
            model.edits.add(random_edit(model, seed, rank=64))
        model.save_pretrained(tmp_path / path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", KILLER, str(tmp_path / "target"), str(tmp_path / "source")]
    done = subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [edit.id for edit in pliant.load(tmp_path / "target").edits] == ["00000001"]


# consolidate_weights


def naive_update(model: Any, index: int, ids: Tensor, positions: list[int], alpha: float) -> dict[str, Tensor]:
    """The guide's update, formed as matrices from what the layer computes."""
    layer = model.model.layers[index]
    seen: dict[str, Any] = {}
    handles = [
        layer.plastic.register_forward_hook(lambda _m, a, o: seen.update(changes=_cloned(o))),
        *[
            getattr(layer.mlp, name).register_forward_hook(
                lambda _m, a, o, name=name: seen.update({name: a[0].clone()})
            )
            for name in ("gate_proj", "up_proj", "down_proj")
        ],
    ]
    with torch.no_grad():
        model.model(ids)
    for handle in handles:
        handle.remove()
    form, changes = layer.layer_config.form, seen["changes"]
    total: dict[str, Tensor] = {}

    def add(name: str, change: Tensor) -> None:
        total[name] = total.get(name, 0) + alpha / len(positions) * change

    for t in positions:
        z, m = seen["gate_proj"][0, t], seen["down_proj"][0, t]
        if form in ("v1", "v1_single", "v2"):
            add("gate_proj", torch.outer(changes["add"][0, t], z / z.dot(z)))
            if "half" in changes:
                add("gate_proj", torch.diag(2 * changes["half"][0, t] - 1) @ layer.mlp.gate_proj.weight.detach())
        elif form == "outer":
            for name, (value, key) in changes.items():
                add(name, value[0, t].T @ key[0, t])
        elif form == "keyed":
            add("down_proj", torch.outer(changes["carry"][0, t], m / m.dot(m)))
    return total


def _cloned(changes: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(t.clone() for t in v) if isinstance(v, tuple) else v.clone() for k, v in changes.items()}


@pytest.mark.parametrize("form", [form for form in FORMS if form != "keyed_pre"])
@pytest.mark.parametrize(("token_idx", "positions"), [(-1, [10]), ([2, -3], [2, 8]), ("all", list(range(11)))])
def test_consolidating_writes_the_forms_own_update(
    form: str, token_idx: Any, positions: list[int], make_converted: Callable, prompt: Tensor
) -> None:
    model = make_converted(form)
    ids = prompt[:1]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = {index: naive_update(model, index, ids, positions, 0.2) for index in (0, 2)}
    before = logits_of(model, prompt)
    result = model.consolidate_weights(ids, token_idx=token_idx, alpha=0.2, layers=[0, 2])
    assert list(result) == ["edit", 0, 2]
    edit = model.edits[result["edit"]]
    assert edit.layers == (0, 2)
    for index, changes in expected.items():
        own = 0.0
        for name, change in changes.items():
            path = f"layers.{index}.mlp.{name}"
            weight = weights[f"model.{path}.weight"]
            torch.testing.assert_close(model.edits.merged(path), weight + change, rtol=1e-4, atol=1e-5)
            own += float(weight.norm() ** 2)
        norm = sum(float(change.norm() ** 2) for change in changes.values()) ** 0.5
        assert result[index]["norm"] == pytest.approx(norm, rel=1e-3)
        assert result[index]["ratio"] == pytest.approx(norm / own**0.5, rel=1e-3)
    assert not torch.allclose(logits_of(model, prompt), before, atol=1e-4)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    model.edits.revert(result["edit"])
    assert torch.equal(logits_of(model, prompt), before)


def test_keyed_pre_writes_all_three_projections(make_converted: Callable, prompt: Tensor) -> None:
    model = make_converted("keyed_pre")
    with model.report(writes=True) as report, torch.no_grad():
        model(prompt[:1])
    result = model.consolidate_weights(prompt[0], alpha=1.0)
    deltas = model.edits[result["edit"]].deltas
    assert {path.rpartition(".")[2] for path in deltas} == {"gate_proj", "up_proj", "down_proj"}
    for path, delta in deltas.items():
        write = report.layers[int(path.split(".")[1])].writes[path.rpartition(".")[2]]
        torch.testing.assert_close(delta.left @ delta.right.T, torch.outer(write.value[0, -1, 0], write.key[0, -1, 0]))
    for index, norms in report.norms().items():
        assert result[index]["norm"] == pytest.approx(float(norms[0, -1]), rel=1e-4)


@pytest.mark.parametrize("modulation", ["additive", "multiplicative"])
def test_half_a_gate_writes_its_half(modulation: str, make_converted: Callable, prompt: Tensor) -> None:
    model = make_converted("v2", modulation=modulation)
    delta = model.edits[model.consolidate_weights(prompt[0])["edit"]].deltas["layers.1.mlp.gate_proj"]
    assert (delta.scale is None) == (modulation == "additive")
    assert delta.left.shape[1] == (modulation == "additive")


@needs_bitsandbytes
def test_consolidating_into_a_quantised_base(
    make_base: Callable, convert_randomly: Callable, prompt: Tensor, tmp_path: Path
) -> None:
    make_base("qwen2", **WIDE).save_pretrained(tmp_path / "base")
    options = {"quantization_config": BitsAndBytesConfig(**QUANTISATIONS["nf4"])}
    plain = convert_randomly(pliant.load(tmp_path / "base"), "v2")
    model = convert_randomly(pliant.load(tmp_path / "base", dtype=torch.float32, **options).eval(), "v2")
    results = [m.consolidate_weights(prompt[:1]) for m in (model, plain)]
    for index in model.dynamic_layers:
        assert results[0][index]["ratio"] == pytest.approx(results[1][index]["ratio"], rel=0.2)


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "float tokens": ({"context_tokens": torch.ones(3)}, "tensor of token ids"),
    "two texts": ({"context_tokens": torch.ones(2, 3).long()}, r"ids of one text.*\(2, 3\)"),
    "no tokens": ({"context_tokens": torch.ones(0).long()}, "ids of one text"),
    "unknown id": ({"context_tokens": torch.tensor([3, 97])}, r"0\.\.96; got 97"),
    "negative id": ({"context_tokens": torch.tensor([3, -1])}, r"0\.\.96; got -1"),
    "position": ({"token_idx": 3}, r"index in -3\.\.2.*got 3"),
    "no position": ({"token_idx": []}, r"token_idx must be an index.*got \[\]"),
    "word": ({"token_idx": "last"}, "got 'last'"),
    "twice": ({"token_idx": [2, -1]}, "each token once"),
    "boolean": ({"token_idx": [True]}, "token_idx must be an index"),
    "alpha": ({"alpha": float("nan")}, "alpha must be a finite number"),
    "zero": ({"alpha": 0.0}, "alpha must be a finite number other than 0"),
    "layer": ({"layers": [1]}, r"converted ones \(\[0, 2\]\); got \[1\]"),
    "no layer": ({"layers": [7]}, r"0\.\.2"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_of_consolidate_weights_changes_nothing(
    case: str, make_converted: Callable, prompt: Tensor, state_of: Callable
) -> None:
    model = make_converted("v1", layers=[0, 2])
    before = (state_of(model), hooks_of(model))
    wrong, message = BAD_CALLS[case]
    with pytest.raises(EditError, match=message):
        model.consolidate_weights(**{"context_tokens": torch.tensor([3, 4, 5]), **wrong})
    assert (state_of(model), hooks_of(model)) == before
    assert not len(model.edits)


def test_a_dense_model_or_a_layer_that_is_off_has_nothing_to_write(
    make_model: Callable, make_converted: Callable
) -> None:
    with pytest.raises(EditError, match=r"converted layers.*dense one\. Convert"):
        make_model("dense").consolidate_weights(torch.tensor([3]))
    model = make_converted("v1")
    model.set_active(False, [1])
    with pytest.raises(EditError, match=r"active.*\[1\]"):
        model.consolidate_weights(torch.tensor([3]))


def test_an_update_that_is_not_finite_is_refused(make_converted: Callable) -> None:
    model: PreTrainedModel = make_converted("v1")
    model.model.layers[1].plastic.add_up.data.fill_(float("inf"))
    with pytest.raises(EditError, match="must be finite"):
        model.consolidate_weights(torch.tensor([3, 4]))
    assert not len(model.edits)
    assert hooks_of(model) == 0
