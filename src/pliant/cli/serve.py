"""``pliant serve``: the server of transformers, with a model of pliant in it."""

import socket
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pliant.cli import options as o
from pliant.cli.console import hush_transformers, notes, results, say_step
from pliant.errors import CheckpointError, ConfigError


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, hub id, or smollm2-135m.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda:0, …: auto is a GPU where there is one.", rich_help_panel=o.LOADING)
    ] = "auto",
    dtype: o.DtypeOption = o.Dtype.AUTO,
    attn_implementation: o.AttentionOption = None,
) -> None:
    """Serve a model to the clients of OpenAI, by the server of transformers.

    Needs a model directory with its tokenizer, one with a chat template for chats, and the packages of the
    extra 'serving'. Edits and deltas are served as they are. Leaves nothing behind; Ctrl-C ends it.

    \b
    pliant serve outputs/keyed --port 8000
    curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "outputs/keyed", "messages": [{"role": "user", "content": "Hello"}]}'
    """
    path = _checked_path(model)
    _check_address(host, port)
    say_step(f"Loading {model}")
    hush_transformers()
    server = _server(path)
    _check_tokenizer(path)
    results.print(f'model "{path}" at http://{host}:{port}/v1; Ctrl-C ends it', markup=False, soft_wrap=True)
    server(
        force_model=path,
        host=host,
        port=port,
        device=device,
        dtype=dtype.value,
        attn_implementation=attn_implementation,
        log_level="error",
    )


def _checked_path(model: str) -> str:
    """Returns what the server is to load, and what clients call it."""
    from pliant.models import resolve_base

    path = resolve_base(model)
    if "@" in path:
        raise ConfigError(f"MODEL must have no '@' in its path, which the server takes for a revision; got {path!r}.")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise CheckpointError(
            f"MODEL must be the folder of a saved model; {path!r} has no config.json. Name the folder that "
            "save_pretrained or pliant convert has written; merge adapters first."
        )
    return path


def _check_address(host: str, port: int) -> None:
    """Refuses an address that is taken, before a model is loaded for it."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port} must be free to listen on: {error}. Take another.") from error


def _server(path: str) -> Any:
    """Returns the server of transformers, which finds the classes of pliant where it looks for its own.

    Raises:
        ConfigError: Packages that it needs are not installed.
    """
    import transformers
    from transformers.utils.import_utils import is_serve_available

    from pliant.models import FAMILIES

    if not is_serve_available():
        raise ConfigError(
            "serving needs fastapi, uvicorn, pydantic and openai, which are not all installed: "
            'pip install "pliant[serving]"'
        )
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import ModelManager

    for family in FAMILIES.values():  # it looks the first name in config.architectures up in transformers itself
        setattr(transformers, family.causal_lm.__name__, family.causal_lm)
    # What it lists by itself is the cache of the hub, where the model that it serves need not be.
    entry = {"id": path, "object": "model", "created": int(time.time()), "owned_by": "pliant"}
    setattr(ModelManager, "get_gen_models", staticmethod(lambda cache_dir=None: [entry]))  # noqa: B010 (typed as cached)
    return Serve


def _check_tokenizer(path: str) -> None:
    """Refuses a model without a tokenizer, and says where there can be no chat."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"MODEL must have its tokenizer beside it to be served; {path!r} has none that can be read: {error} Save "
            "one there: tokenizer.save_pretrained(folder)."
        ) from error
    if tokenizer.chat_template is None:
        notes.print("its tokenizer has no chat template: /v1/completions works, chats do not", markup=False)
