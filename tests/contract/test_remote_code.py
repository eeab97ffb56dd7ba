"""Exported with its code, every model loads and runs the same where pliant cannot be imported."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_imports

import pliant
from pliant.architectures import ARCHITECTURES, Architecture
from pliant.errors import CheckpointError
from pliant.models import Delta, Edit, down_proj, export_merged
from pliant.models.remote_code import ALLOWED, REMOTE_CODE_NAME, remote_code

PROGRAM = """
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
try:
    import pliant
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("pliant can be imported, and nothing would be shown")
root = Path(sys.argv[1])
inputs, found = load_file(root / "inputs.safetensors"), {}
rows, mask = inputs["rows"], inputs["mask"]
with torch.no_grad():
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        found[f"{folder.name}/logits"] = model(rows).logits
        found[f"{folder.name}/tokens"] = model.generate(rows, attention_mask=mask, max_new_tokens=9, do_sample=False)
    inner = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert torch.equal(inner(rows).last_hidden_state, model.model(rows).last_hidden_state)
assert not [name for name in sys.modules if name.partition(".")[0] in ("pliant", "jaxtyping")]
save_file(found, root / "found.safetensors")
"""
SNIPPET = """
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch

# Load model and tokenizer
model_path = {path!r}
model = AutoModelForCausalLM.from_pretrained(
    model_path,
    device_map="auto",
    torch_dtype=torch.float16{further}
)
tokenizer = AutoTokenizer.from_pretrained(model_path)

# Generate text
prompt = "5 6 7 8"
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
torch.manual_seed(0)

with torch.no_grad():
    outputs = model.generate(
        **inputs,
        max_new_tokens=20,
        temperature=0.7,
        do_sample=True,
        top_p=0.9
    )

response = tokenizer.decode(outputs[0], skip_special_tokens=True)
print(response)
"""
"""How the NPT documents load and ask a model."""
ROUTED_BASES = {"mod": "mistral", "mod gated": "smollm3", "dtf": "qwen2", "dtf gaussian": "qwen3", "stt": "smollm3"}
NPT_BASES = {"v1": "smollm3", "v1_single": "mistral", "v2": "qwen2", "outer": "qwen3", "keyed_pre": "llama_mlp_bias"}


def edited(model: Any) -> Any:
    """Returns ``model`` with an edit that changes what it says."""
    weight = model.model.layers[1].mlp.down_proj.weight
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randn(size, 1, generator=generator) for size in weight.shape)
    model.edits.add(Edit(context="one is two", deltas={down_proj(1): Delta(left=left, right=right)}))
    return model


def kinds(make_converted: Callable[..., Any], make_routed: Callable[..., Any], folder: Path) -> dict[str, Any]:
    """Returns a model of every form and every routed kind, over all families, by name."""
    models = {form: make_converted(form, NPT_BASES.get(form, "llama")) for form in NPT_BASES | {"keyed": ""}}
    models["keyed tied edited"] = edited(make_converted("keyed", tied=True))
    make_converted("v2").save_pretrained(folder)
    models["v2 bf16"] = pliant.load(folder, dtype=torch.bfloat16)
    routed = ("mod", "mod gated", "mod attention", "mod mlp", "dtf", "dtf gaussian", "dtf forecast", "stt")
    return models | {kind: make_routed(kind, ROUTED_BASES.get(kind, "llama")) for kind in routed}


@pytest.fixture(scope="module")
def outputs(
    tmp_path_factory: pytest.TempPathFactory,
    make_converted: Callable[..., Any],
    make_routed: Callable[..., Any],
    without_pliant: dict[str, str],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What all models say in this process, and in one without pliant."""
    root = tmp_path_factory.mktemp("exported")
    rows = torch.randint(2, 97, (2, 11), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(rows)
    mask[1, :4] = 0  # padding on the left
    save_file({"rows": rows, "mask": mask}, root / "inputs.safetensors")
    here = {}
    for name, model in kinds(make_converted, make_routed, tmp_path_factory.mktemp("kept")).items():
        model.eval()
        export_merged(model, root / name, remote_code=True)
        with torch.no_grad():
            here[f"{name}/logits"] = model(rows).logits
            here[f"{name}/tokens"] = model.generate(rows, attention_mask=mask, max_new_tokens=9, do_sample=False)
    program = root / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    finished = subprocess.run(
        [sys.executable, program, root], env=without_pliant, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return here, load_file(root / "found.safetensors")


def test_every_model_says_the_same_without_pliant(outputs: tuple[dict[str, Tensor], dict[str, Tensor]]):
    here, there = outputs
    assert here.keys() == there.keys()
    assert len(here) == 32
    for name, expected in here.items():
        if name.startswith("keyed tied edited/logits"):  # the edit is merged, and its sums are taken in another order
            torch.testing.assert_close(there[name], expected, rtol=1e-4, atol=1e-4)
        elif name == "mod gated/logits":  # a product with one vector: some processors add by where it lies in memory
            torch.testing.assert_close(there[name], expected, rtol=0, atol=1e-5)
        else:
            assert torch.equal(there[name], expected), name


def test_the_file_imports_what_transformers_needs_itself(tmp_path: Path):
    file = tmp_path / REMOTE_CODE_NAME
    file.write_text(remote_code(), encoding="utf-8")
    assert set(get_imports(file)) <= {*ALLOWED, *sys.stdlib_module_names}
    top = [node for node in ast.parse(remote_code()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    everywhere = [node for node in ast.walk(ast.parse(remote_code())) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(top) == len(everywhere)
    assert remote_code().startswith('"""Models of pliant ')


@pytest.fixture
def exported(tmp_path: Path, make_base: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> Path:
    """A keyed model over a base on disk, exported with its code and its tokenizer."""
    make_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = pliant.convert(pliant.load(tmp_path / "base"), pliant.NptConfig.preset("v2", rank=4))
    export_merged(model, tmp_path / "exported", remote_code=True, card="# A card")
    return tmp_path / "exported"


def test_the_folder_is_whole_and_names_no_path_of_this_machine(exported: Path):
    names = {file.name for file in exported.iterdir()}
    assert {"config.json", "model.safetensors", REMOTE_CODE_NAME, "README.md", "tokenizer.json"} <= names
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["AutoModelForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_pliant.PliantLlamaForCausalLM"
    assert config["pliant"]["base"] == {}
    assert (exported / "README.md").read_text(encoding="utf-8") == "# A card"
    texts = [file.read_text(encoding="utf-8") for file in exported.iterdir() if file.suffix in (".json", ".py", ".md")]
    assert not any(str(exported.parent) in text for text in texts)


def test_with_pliant_it_loads_as_any_model_and_is_saved_without_code(exported: Path, prompt: Tensor):
    model = pliant.load(exported).eval()
    assert type(model).__module__ == "pliant.models.families"
    automatic = AutoModelForCausalLM.from_pretrained(exported).eval()
    assert type(automatic) is type(model)
    with torch.no_grad():
        assert torch.equal(automatic(prompt).logits, model(prompt).logits)
    model.save_pretrained(exported.parent / "again")
    assert "auto_map" not in json.loads((exported.parent / "again" / "config.json").read_text(encoding="utf-8"))
    export_merged(pliant.load(exported), exported.parent / "third", remote_code=True)
    first, third = (load_file(folder / "model.safetensors") for folder in (exported, exported.parent / "third"))
    assert first.keys() == third.keys()
    assert all(torch.equal(first[name], third[name]) for name in first)


def test_the_documents_snippet_runs_with_pliant_and_by_remote_code(
    exported: Path, without_pliant: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    exec(SNIPPET.format(path=str(exported), further=""), {})
    here = capsys.readouterr().out.strip()
    program = SNIPPET.format(path=str(exported), further=",\n    trust_remote_code=True,")
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env=without_pliant,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert len(here.split()) > 4
    assert finished.stdout.strip().endswith(here)


def test_a_dense_model_needs_no_code(tmp_path: Path, make_base: Callable[..., Any]):
    make_base().save_pretrained(tmp_path / "base")
    export_merged(edited(pliant.load(tmp_path / "base")), tmp_path / "merged", remote_code=True)
    assert not (tmp_path / "merged" / REMOTE_CODE_NAME).exists()
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config


def test_an_architecture_from_outside_is_refused(
    tmp_path: Path, make_converted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    model = make_converted("v2")
    own = type("OwnConfig", (pliant.NptConfig,), {"__module__": "elsewhere"})
    row = Architecture(name="npt", summary="own", config=own, layer=ARCHITECTURES["npt"].layer)
    monkeypatch.setitem(ARCHITECTURES, "npt", row)
    with pytest.raises(CheckpointError, match=r"remote_code takes the architectures .* 'npt', which elsewhere"):
        export_merged(model, tmp_path / "exported", remote_code=True)
    assert not list(tmp_path.iterdir())
