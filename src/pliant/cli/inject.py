"""``pliant inject``: a session in which a model is taught facts, asked about them, and made to forget them."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import options as o
from pliant.cli.console import notes, results, say_error, say_step
from pliant.cli.consolidate import CalibrationOption, CalibrationTokensOption, neutral_text
from pliant.cli.learning import Facts, Learner, own_folder, save_ledger, save_new, show
from pliant.errors import EditError, PliantError

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer

    from pliant.models import Edit

HELP = """\
inject TEXT                   learn a text for good, asked about as the model sees fit
inject TEXT | QUERY | ANSWER | SUBJECT
                              the same, with the question and, if you like, the rest given
ask QUESTION                  ask, with no text in view
ask-base QUESTION             ask the base: without edits, and unconverted
list                          what was learned, oldest first
undo [ID]                     take an edit back, by default the newest; undo all takes back every one
strength [X]                  α of what is learned next; 1 writes all that is missing
layers [SPEC]                 where to write, such as 3,28,29; auto goes by depth
save [DIR]                    save the model in a new folder; without DIR, in the folder it has
history                       what was typed so far
help                          show this
quit                          end (so does the end of the input)"""

GIVEN = ("QUERY", "ANSWER", "SUBJECT")
"""What may follow a text, in this order; what is left out is made."""

ALIASES = {"test": "ask", "recall": "ask", "layer": "layers", "reset": "undo", "exit": "quit", "?": "help"}
"""What the commands of the original's sessions were called."""


def inject(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, hub id, or smollm2-135m.")],
    calibration: CalibrationOption = None,
    calibration_tokens: CalibrationTokensOption = 65_536,
    dtype: o.DtypeOption = o.Dtype.AUTO,
    device_map: o.DeviceMapOption = None,
    quantization: o.QuantizationOption = o.Quantization.NONE,
    attn_implementation: o.AttentionOption = None,
) -> None:
    """Teach a model facts in a session, ask about them, and take them back.

    Needs a model, and neutral text whose statistics it reads once for each base. Leaves nothing behind
    unless you type save. Commands may be piped, one a line; then the exit code is 1 if any failed.

    \b
    pliant inject smollm2-135m
    printf 'inject The robot is called Ada.\\nsave outputs/edited\\n' | pliant inject smollm2-135m
    """
    given = locals()  # every option by its name
    text = None if calibration is None else neutral_text(calibration)
    say_step(f"Loading {model}")
    learner = Learner(o.load_model(model, given), text, calibration_tokens)
    session = Session(learner, Path(model) if own_folder(model) else None)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        notes.print("Type help for the commands.", style="dim")
    for line in session.typed() if is_terminal else map(str.strip, sys.stdin):
        if not session.handle(line):
            break
    session.end()
    if session.failures and not is_terminal:
        raise typer.Exit(1)


class Session:
    """A learner, what it is set to, and where it is kept.

    Attributes:
        settings: Of what is learned next.
        home: Folder that ``save`` writes the ledger of; ``None`` before the first.
        history: The lines that were typed.
        failures: How many of them went wrong.
    """

    def __init__(self, learner: Learner, home: Path | None) -> None:
        from pliant.consolidation import Consolidation

        self.learner, self.model = learner, learner.model
        self.home = home
        self.settings: Consolidation = Consolidation()
        self.history: list[str] = []
        self.failures = 0
        self.saved = self._ids()
        self.commands: dict[str, Callable[[str], None]] = {
            "inject": self._inject,
            "ask": self._ask,
            "ask-base": self._ask_base,
            "list": self._list,
            "undo": self._undo,
            "strength": self._strength,
            "layers": self._layers,
            "save": self._save,
            "history": lambda _: notes.print("\n".join(self.history), markup=False, soft_wrap=True),
            "help": lambda _: notes.print(HELP, markup=False, soft_wrap=True),
        }

    @property
    def prompt(self) -> str:
        """What a line is asked for with: strength and layers."""
        return f"α {self.settings.alpha:g}, layers {self.settings.layers or 'auto'}> "

    def handle(self, line: str) -> bool:
        """Carries out a line; an error is shown, and leaves the model as it was. Returns whether to go on."""
        name, _, argument = line.strip().partition(" ")
        name = ALIASES.get(name, name)
        if name == "quit":
            return False
        if not name:
            return True
        self.history.append(line.strip())
        try:
            if name not in self.commands:
                raise EditError(f"a line must begin with {', '.join(self.commands)} or quit; got {name!r}. Type help.")
            self._undivided(self.commands[name], argument.strip())
        except KeyboardInterrupt:
            self.failures += 1
            notes.print("interrupted; the model is as it was")
        except (PliantError, OSError, RuntimeError) as error:
            self.failures += 1
            say_error(str(error))
        return True

    def end(self) -> None:
        """Says what was not saved."""
        if self._ids() != self.saved:
            notes.print("What changed since the last save is gone.", style="yellow")

    def typed(self) -> Iterator[str]:
        """Yields what the user types at a terminal, with completion and a history."""
        from prompt_toolkit.shortcuts import CompleteStyle, PromptSession

        prompt: PromptSession[str] = PromptSession(
            completer=self._completer(), complete_style=CompleteStyle.READLINE_LIKE, complete_while_typing=False
        )
        while True:
            try:
                yield prompt.prompt(self.prompt)
            except KeyboardInterrupt:
                continue
            except EOFError:
                return

    def _completer(self) -> "Completer":
        from prompt_toolkit.completion import DynamicCompleter, NestedCompleter, PathCompleter

        def words() -> NestedCompleter:
            follow: dict[str, Any] = dict.fromkeys([*self.commands, "quit"])
            follow["undo"] = {"all": None, **dict.fromkeys(self._ids())}
            follow["layers"] = {"auto": None}
            follow["save"] = PathCompleter(only_directories=True, expanduser=True)
            return NestedCompleter.from_nested_dict(follow)

        return DynamicCompleter(words)

    def _ids(self) -> list[str]:
        return [edit.id for edit in self.model.edits]

    def _undivided(self, command: Callable[[str], None], argument: str) -> None:
        """Carries out a command; where it fails, its changes of the ledger and of the settings are taken back."""
        before, settings = list(self.model.edits), self.settings
        try:
            command(argument)
        except BaseException:
            self.settings = settings
            if self._ids() != [edit.id for edit in before]:
                self.model.edits.clear()
                for edit in before:
                    self.model.edits.add(edit)
            raise

    def _inject(self, argument: str) -> None:
        text, *given = (part.strip() for part in argument.split("|"))
        if not text or len(given) > len(GIVEN):
            raise EditError(f"inject must be given TEXT, or TEXT | {' | '.join(GIVEN)}; got {argument!r}. Type help.")
        query, answer, subject = (*given, "", "", "")[: len(GIVEN)]
        facts = Facts(context=text, queries=[query] if query else None, answer=answer or None, subject=subject or None)
        edit = self.learner.learn(facts, self.settings)
        show(edit, self.learner.compare(edit, facts))

    def _ask(self, question: str) -> None:
        if not question:
            raise EditError("ask must be given a question, or a beginning to complete; got nothing.")
        results.print(self.learner.ask(question), markup=False, soft_wrap=True)

    def _ask_base(self, question: str) -> None:
        with self.model.base_mode():
            self._ask(question)

    def _list(self, _: str) -> None:
        for edit in self.model.edits:
            results.print(_line(edit), markup=False, soft_wrap=True)
        results.print(f"{len(self.model.edits)} learned", markup=False)

    def _undo(self, argument: str) -> None:
        ids = self._ids()
        if not ids:
            raise EditError("undo must have an edit to take back; the ledger has none.")
        for edit_id in reversed(ids) if argument == "all" else [argument or ids[-1]]:
            results.print(f"took back {_line(self.model.edits.revert(edit_id))}", markup=False, soft_wrap=True)

    def _strength(self, argument: str) -> None:
        if argument:
            try:
                alpha = float(argument)
            except ValueError:
                raise EditError(f"strength must be a number; got {argument!r}. 1 writes what is missing.") from None
            self.settings = replace(self.settings, alpha=alpha)
        results.print(f"strength {self.settings.alpha:g}", markup=False)

    def _layers(self, argument: str) -> None:
        if argument:
            self.settings = replace(self.settings, layers=None if argument == "auto" else argument)
        subjects, answers = self.settings.places(self.model)
        results.print(f"layers {', '.join(map(str, [*subjects, *answers]))}", markup=False)

    def _save(self, argument: str) -> None:
        if argument:
            folder = o.fresh_folder(Path(argument).expanduser(), "save")
            save_new(self.model, folder)
            self.home = folder
        elif self.home is not None:
            save_ledger(self.model, self.home)
        else:
            raise EditError("save must be given a folder, as this model has none of its own; got nothing.")
        self.saved = self._ids()
        results.print(f"saved {self.home}, {len(self.saved)} in its ledger", markup=False, soft_wrap=True)


def _line(edit: "Edit") -> str:
    kl = "" if edit.kl is None else f"KL {edit.kl:.4f}  "
    return f"{edit.id}  {kl}{' '.join(edit.context.split())}"
