"""``pliant chat``: a conversation through the chat template, with the base at a keystroke."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import options as o
from pliant.cli.console import notes, say_error, say_step
from pliant.errors import DataError

if TYPE_CHECKING:
    from pliant.cli.generation import Sampling

HELP = """\
/base        answer as the unconverted base; again, as the model
/reset       forget the conversation
/save FILE   write the conversation as JSON
/help        show this
/exit        end (so does the end of the input)"""


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, hub id, or smollm2-135m.")],
    system: Annotated[str | None, typer.Option(help="System message, kept over /reset.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of an answer at most.", rich_help_panel=o.SAMPLING)
    ] = 256,
    temperature: o.TemperatureOption = 0.7,
    top_p: o.TopPOption = None,
    seed: o.SeedOption = None,
    dtype: o.DtypeOption = o.Dtype.AUTO,
    device_map: o.DeviceMapOption = None,
    quantization: o.QuantizationOption = o.Quantization.NONE,
    attn_implementation: o.AttentionOption = None,
) -> None:
    """Talk to a model; /base switches to its unconverted base and back.

    Needs a model whose tokenizer has a chat template. Leaves nothing behind unless you type /save
    FILE. Input may be piped, one turn a line.

    \b
    pliant chat outputs/keyed
    echo "Why is the sky blue?" | pliant chat outputs/keyed --temperature 0
    """
    given = locals()  # every option by its name
    o.check_sampling(temperature, top_p)
    say_step(f"Loading {model}")
    loaded = o.load_model(model, given)
    import torch

    from pliant.cli.generation import Sampling

    if seed is not None:
        torch.manual_seed(seed)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    conversation = Conversation(loaded, sampling, system)
    if sys.stdin.isatty():
        notes.print("Type /help for the commands.", style="dim")
    for line in _lines():
        if not conversation.handle(line):
            break


def _lines() -> Iterator[str]:
    """Yields what the user types, or the lines of a pipe; empty ones are left out."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 (arrow keys and history for input())
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        if line:
            yield line


class Conversation:
    """The messages so far, and who answers next: the model or its base."""

    def __init__(self, model: Any, sampling: "Sampling", system: str | None) -> None:
        from pliant.cli.generation import encode_chat, tokenizer_of

        self.model = model
        self.tokenizer = tokenizer_of(model)
        self.sampling = sampling
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)
        self.as_base = False
        # A tokenizer without a template is found out before the first turn is typed.
        encode_chat(self.tokenizer, [*self.opening, {"role": "user", "content": "?"}])
        self.commands: dict[str, Callable[[str], None]] = {
            "/base": self._base,
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: notes.print(HELP, markup=False),
        }

    def handle(self, line: str) -> bool:
        """Answers a line or carries out a command; returns whether the conversation goes on."""
        if not line.startswith("/"):
            self._answer(line)
            return True
        name, _, argument = line.partition(" ")
        if name == "/exit":
            return False
        if name in self.commands:
            self.commands[name](argument.strip())
        else:
            say_error(f"no command {name}; type /help for the list")
        return True

    def _answer(self, line: str) -> None:
        from pliant.cli.generate import show_piece
        from pliant.cli.generation import complete, encode_chat

        asked = [*self.messages, {"role": "user", "content": line}]
        ids = encode_chat(self.tokenizer, asked)
        try:
            with self.model.base_mode() if self.as_base else nullcontext():
                answer = complete(self.model, self.tokenizer, ids, self.sampling, on_text=show_piece)
        except DataError as error:
            say_error(f"{error} Type /reset to begin anew.")
            return
        show_piece("\n")
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]

    def _base(self, _: str) -> None:
        if not self.model.spec.layers:
            notes.print("This model is not converted: it is its own base.")
            return
        self.as_base = not self.as_base
        notes.print("The base answers now." if self.as_base else "The converted model answers now.")

    def _reset(self, _: str) -> None:
        self.messages = list(self.opening)
        notes.print("Forgotten.")

    def _save(self, name: str) -> None:
        if not name:
            say_error("/save needs a file name, such as /save talk.json")
            return
        path = Path(name).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(self.messages, file, indent=2, ensure_ascii=False)
        except FileExistsError:
            say_error(f"{path} exists already; choose another name")
        except OSError as error:
            say_error(f"{path} cannot be written: {error}")
        else:
            notes.print(f"Saved to {path}.", markup=False)
