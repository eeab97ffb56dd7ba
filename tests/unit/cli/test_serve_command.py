"""``pliant serve``: clients of OpenAI get from it, and from transformers' own server, what the model says here."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import pliant
from pliant.models import Delta, Edit, down_proj, export_merged

WORDS = 12
PATIENCE_SECONDS = 180
MESSAGES = [{"role": "user", "content": "A small robot walks over the green hill"}]


@pytest.fixture
def routed(tiny: Path, tmp_path: Path) -> Path:
    """A model that some tokens skip layers of, with an edit beside its weights."""
    model: Any = pliant.load(tiny)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pliant.convert(model, pliant.ModConfig(), calibration=torch.randint(2, 200, (8, 16)))
    weight = model.model.layers[2].mlp.down_proj.weight
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, 1, generator=generator) for size in weight.shape)
    model.edits.add(Edit(context="hills are green", deltas={down_proj(2): Delta(left=left, right=right)}))
    # Bytes that are no character by themselves are held back while an answer is streamed.
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    parts = [index for index in range(len(tokenizer)) if not tokenizer.decode([index]).isascii()]
    model.generation_config.suppress_tokens = parts
    model.save_pretrained(tmp_path / "routed")
    return tmp_path / "routed"


def said_here(folder: Path) -> str:
    """Returns what the model answers in this process, greedily."""
    model, tokenizer = pliant.load(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids: Any = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**ids, max_new_tokens=WORDS, do_sample=False)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(*command: Any, log: Path, env: dict[str, str] | None = None) -> Iterator[str]:
    """Runs a server, and gives its address once it answers; ends it whatever happens."""
    port = free_port()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen([*map(str, command), "--port", str(port)], stdout=file, stderr=file, env=env)
    try:
        give_up = time.monotonic() + PATIENCE_SECONDS
        while not answers(f"http://localhost:{port}/health"):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < give_up, log.read_text(encoding="utf-8")
            time.sleep(0.2)
        yield f"http://localhost:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def check_chat(address: str, name: str, expected: str) -> None:
    """Asks through a client of OpenAI, whole and streamed."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        ask: dict[str, Any] = {"model": name, "messages": MESSAGES, "max_tokens": WORDS, "temperature": 0}
        assert client.chat.completions.create(**ask).choices[0].message.content == expected
        with client.chat.completions.create(**ask, stream=True) as stream:
            pieces = [piece.choices[0].delta.content or "" for piece in stream if piece.choices]
        assert "".join(pieces) == expected
        assert len(pieces) > 2


@pytest.mark.slow
def test_an_openai_client_chats_with_an_edited_routed_model(routed: Path, tmp_path: Path):
    openai = pytest.importorskip("openai")
    command = (sys.executable, "-m", "pliant.cli", "serve", routed, "--device", "cpu")
    with serving(*command, log=tmp_path / "log") as address:
        check_chat(address, str(routed), said_here(routed))
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == [str(routed)]


@pytest.mark.slow
def test_transformers_serves_it_exported_without_pliant(routed: Path, tmp_path: Path, without_pliant: dict[str, str]):
    exported = tmp_path / "exported"
    export_merged(pliant.load(routed), exported, remote_code=True)
    program = "from transformers.cli.transformers import app; app()"
    command = (sys.executable, "-c", program, "serve", exported, "--trust-remote-code", "--device", "cpu")
    with serving(*command, log=tmp_path / "log", env=without_pliant) as address:
        check_chat(address, str(exported), said_here(routed))


def test_a_port_that_is_taken_is_refused_before_anything_loads(run, tiny: Path):
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        error = run("serve", tiny, "--port", port, exit_code=1).stderr
    assert f"--host localhost --port {port} must be free" in error
    assert "Loading" not in error


def test_missing_packages_are_named_with_the_extra(run, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    error = run("serve", tiny, "--port", free_port(), exit_code=1).stderr
    assert 'pip install "pliant[serving]"' in error


def test_a_model_without_tokenizer_is_refused(run, tmp_path: Path, tiny: Path):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pliant.load(tiny).config.save_pretrained(tmp_path / "bare")
    error = run("serve", tmp_path / "bare", "--port", free_port(), exit_code=1).stderr
    assert "MODEL must have its tokenizer beside it" in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./missing", "does not exist"),
        ("empty", "has no config.json"),
        ("a@b", "must have no '@' in its path"),
    ],
)
def test_models_that_cannot_be_served(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "a@b"):
        (tmp_path / folder).mkdir()
    assert message in run("serve", name, exit_code=1).stderr
