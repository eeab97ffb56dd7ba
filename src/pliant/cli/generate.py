"""``pliant generate``: continue prompts, with the base beside it if asked."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from pliant.cli import options as o
from pliant.cli.console import results, say_step

if TYPE_CHECKING:
    from pliant.cli.generation import Completion, Listener, Sampling

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, hub id, or smollm2-135m.")]
PromptOption = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", help="Text to continue; may be given several times."),
]
PromptFileOption = Annotated[Path | None, typer.Option("--prompt-file", help="UTF-8 text file with one prompt a line.")]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Tokens to write at most.", rich_help_panel=o.SAMPLING)]
ChatOption = Annotated[
    bool,
    typer.Option(
        "--chat/--no-chat",
        help="Ask through the chat template, in place of continuing the text.",
    ),
]
BaseOption = Annotated[bool, typer.Option("--base", help="Show the text of the unconverted base beside it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print texts and tokens as JSON, without streaming.")]


def generate(
    model: ModelArgument,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    max_new_tokens: MaxNewTokensOption = 64,
    temperature: o.TemperatureOption = 0.0,
    top_p: o.TopPOption = None,
    seed: o.SeedOption = None,
    chat: ChatOption = False,
    base: BaseOption = False,
    as_json: JsonOption = False,
    dtype: o.DtypeOption = o.Dtype.AUTO,
    device_map: o.DeviceMapOption = None,
    quantization: o.QuantizationOption = o.Quantization.NONE,
    attn_implementation: o.AttentionOption = None,
) -> None:
    """Let a model continue prompts.

    Needs a model directory with its tokenizer, and at least one prompt. Leaves nothing behind: text
    streams to the terminal, token by token.

    \b
    pliant generate outputs/keyed --prompt "The capital of France is" --base
    pliant generate outputs/keyed -p "Why is the sky blue?" --chat --temperature 0.7 --seed 1
    """
    given = locals()  # every option by its name
    prompts = _prompts(prompt, prompt_file)
    o.check_sampling(temperature, top_p)
    if not as_json:
        say_step(f"Loading {model}")
    loaded = o.load_model(model, given)
    from pliant.cli.generation import Sampling

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    writer = Writer(loaded, sampling, chat=chat, seed=seed)
    if as_json:
        outputs = [writer.describe(text, with_base=base) for text in prompts]
        typer.echo(json.dumps({"model": model, "outputs": outputs}, indent=2, ensure_ascii=False))
    elif base:
        results.print(side_by_side([writer.describe(text, with_base=True) for text in prompts]))
    else:
        for text in prompts:
            writer.stream(text)


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    from pliant.data import read_text

    prompts = list(given or ())
    if file is not None:
        prompts += [line for line in read_text(file).splitlines() if line.strip()]
    if not prompts:
        raise typer.BadParameter("give at least one, or a --prompt-file.", param_hint="--prompt")
    return prompts


class Writer:
    """A loaded model and how it is to continue prompts."""

    def __init__(self, model: Any, sampling: "Sampling", *, chat: bool = False, seed: int | None = None) -> None:
        from pliant.cli.generation import tokenizer_of

        self.model = model
        self.tokenizer = tokenizer_of(model)
        self.sampling = sampling
        self.chat = chat
        self.seed = seed

    def write(self, prompt: str, *, on_text: "Listener | None" = None) -> "Completion":
        """Continues one prompt; each starts from the seed, whatever came before it."""
        import torch

        from pliant.cli.generation import complete, encode, encode_chat

        ids = (
            encode_chat(self.tokenizer, [{"role": "user", "content": prompt}])
            if self.chat
            else encode(self.tokenizer, prompt)
        )
        if self.seed is not None:
            torch.manual_seed(self.seed)
        return complete(self.model, self.tokenizer, ids, self.sampling, on_text=on_text)

    def stream(self, prompt: str) -> None:
        """Shows a prompt and, as it comes, what the model writes after it."""
        shown, end = (f"> {prompt}", "\n") if self.chat else (prompt, "")
        results.print(shown, style="dim", markup=False, soft_wrap=True, end=end)
        self.write(prompt, on_text=show_piece)
        results.print()

    def describe(self, prompt: str, *, with_base: bool) -> dict[str, Any]:
        """Returns prompt, text and tokens of the model and, if asked for, of its base."""
        written = self.write(prompt)
        output: dict[str, Any] = {
            "prompt": prompt,
            "text": written.text,
            "token_ids": written.token_ids,
        }
        if with_base:
            with self.model.base_mode():
                base = self.write(prompt)
            output |= {"base_text": base.text, "base_token_ids": base.token_ids}
        return output


def show_piece(text: str) -> None:
    """Writes a piece of streamed text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def side_by_side(outputs: list[dict[str, Any]]) -> Table:
    """Returns the texts of base and model in two columns."""
    table = Table(show_lines=True, expand=False)
    for column in ("prompt", "base", "converted"):
        table.add_column(column, overflow="fold", ratio=1 if column == "prompt" else 2)
    for output in outputs:
        table.add_row(*(Text(output[key].strip()) for key in ("prompt", "base_text", "text")))
    return table
