"""Every command that the README and the documents show is one that pliant takes; those of the README are run."""

import json
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
import typer
from typer.main import get_command
from typer.testing import CliRunner

from pliant.cli import main
from pliant.cli.inject import HELP
from pliant.consolidation import Consolidation, WriteSettings

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(?:console|bash|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TRAINING = re.compile(r"^(?:OMP_NUM_THREADS=\d+ )?(?:torchrun|accelerate) .*?(?:-m pliant\.cli\.train) ")
"""What several processes are started by; the rest of the line is for `pliant train`."""

NOT_RUN = ("train", "evaluate", "compare", "report", "serve")
"""Commands that train, ask a hub for tasks, read what those leave, or never end."""

CHECKPOINT = re.compile(r"^model\.checkpoint_path=.*")
FOR_A_GPU = re.compile(r"needs (an NVIDIA|a) GPU; this machine has none")


def shown(document: Path) -> list[str]:
    """The commands of a document, their lines joined."""
    blocks = FENCE.findall(document.read_text(encoding="utf-8"))
    lines = [line.removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [TRAINING.sub("pliant train ", line) for line in lines]


COMMANDS = [
    pytest.param(shlex.split(line, comments=True)[1:], id=f"{document.stem}: {line[:70]}")
    for document in DOCUMENTS
    for line in shown(document)
    if line.startswith("pliant ")
]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the files that the documents speak of."""
    monkeypatch.chdir(tmp_path)
    turn = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]}
    Path("chats.jsonl").write_text("".join(json.dumps(turn) + "\n" for _ in range(40)))
    for name in ("a.txt", "b.txt", "essay.txt"):
        Path(name).write_text("\n\n".join(f"{i}: A small robot walks over the green hill. " * 8 for i in range(60)))
    Path("config").mkdir()
    Path("config/my_training.yaml").write_text("training:\n  max_steps: 3\n")
    return tmp_path


def test_the_documents_show_commands():
    assert len(COMMANDS) > 60
    verbs = {command.values[0][0] for command in COMMANDS}
    assert {"convert", "train", "consolidate", "evaluate", "routes", "calibrate", "edits"} <= verbs


@pytest.mark.parametrize("arguments", [c for c in COMMANDS if c.values[0][0] != "train"])
def test_a_command_of_the_documents_is_taken(arguments):
    command, name = get_command(main), "pliant"
    while hasattr(command, "commands"):
        name, *arguments = arguments
        assert name in command.commands, f"pliant has no command {name}"
        command = command.commands[name]
    with (
        suppress(typer.Exit),
        command.make_context(name, list(arguments)),
    ):  # an option such as --list-tasks ends it at once
        pass


@pytest.mark.real_model
@pytest.mark.parametrize("arguments", [c for c in COMMANDS if c.values[0][0] == "train"])
def test_a_training_command_of_the_documents_is_planned(arguments, workplace, converted):
    """A checkpoint that an earlier command would leave is a tiny one; some commands are for a GPU, and say so."""
    arguments = [CHECKPOINT.sub(f"model.checkpoint_path={converted}", argument) for argument in arguments]
    if not {"--cfg", "--dry-run"} & set(arguments):
        arguments.append("--dry-run")
    result = CliRunner().invoke(main, arguments)
    if result.exit_code and not torch.cuda.is_available():
        assert FOR_A_GPU.search(result.stderr), result.stderr
    else:
        assert result.exit_code == 0, result.stderr
        assert ("base_model_name:" if "--cfg" in arguments else "Nothing was trained.") in result.stdout


@pytest.mark.real_model
def test_the_commands_of_the_readme_run(workplace, tiny, text_file, run):
    """On a tiny base in place of the embedded one."""
    smaller = {"smollm2-135m": str(tiny), "192": "8"}
    done = []
    for command in shown(ROOT / "README.md"):
        name, *arguments = shlex.split(command, comments=True)
        if name != "pliant" or arguments[0] in NOT_RUN:
            continue
        arguments = [smaller.get(argument, argument) for argument in arguments]
        if arguments[0] == "convert":
            arguments += ["--calibration", str(text_file), "--calibration-tokens", "2560"]
        run(*arguments, stdin={"chat": "/exit\n", "inject": "quit\n"}.get(arguments[0]))
        done.append(arguments[0])
    assert {"info", "convert", "generate", "chat", "consolidate", "inject", "calibrate", "routes"} <= set(done)
    assert Path("outputs/shared/modeling_pliant.py").is_file()


def test_the_guide_shows_the_commands_of_a_session():
    assert f"```text\n{HELP}\n```" in (ROOT / "docs" / "guides" / "consolidation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("settings", [Consolidation(), WriteSettings()], ids=lambda settings: type(settings).__name__)
def test_the_guide_has_every_setting_with_its_default(settings):
    guide = (ROOT / "docs" / "guides" / "consolidation.md").read_text(encoding="utf-8")
    _, _, table = guide.partition(f"| `{type(settings).__name__}` | default | |\n")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", table.partition("\n\n")[0], re.MULTILINE)
    defaults = {field.name: getattr(settings, field.name) for field in fields(settings)}
    assert [name for name, _ in rows] == list(defaults)
    for name, told in rows:
        if not is_dataclass(defaults[name]):
            assert told.strip("`").replace("−", "-") == str(defaults[name])
        else:
            assert eval(told.strip("`"), {"WriteSettings": WriteSettings}) == defaults[name]


def test_the_page_of_results_says_what_the_files_say():
    command = [sys.executable, str(ROOT / "scripts" / "results_page.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
