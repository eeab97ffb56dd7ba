"""``--help`` teaches, and answers without torch."""

import subprocess
import sys

import pytest

VERBS = (
    *("demo", "convert", "calibrate", "train", "compare", "info", "generate", "chat", "routes"),
    *("inspect", "report"),
    *("consolidate", "inject", "evaluate", "export", "serve"),
)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [("--help",), ("convert", "--help"), ("--version",)])
def test_help_imports_no_torch(arguments):
    finished = run_python("-X", "importtime", "-m", "pliant.cli", *arguments)
    assert finished.returncode == 0, finished.stderr
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert "pliant.cli" in imported
    assert not imported & {"torch", "transformers", "matplotlib", "numpy"}


def test_console_script_imports_no_torch():
    program = (
        "import sys; sys.argv = ['bin/pliant', '--help']\n"
        "from pliant.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    finished = run_python("-c", program)
    assert finished.returncode == 0, finished.stderr


def test_import_pliant_registers_outside_the_command():
    program = (
        "import pliant\nfrom transformers import AutoConfig\n"
        "AutoConfig.for_model('pliant_llama'); pliant.load; pliant.convert"
    )
    finished = run_python("-c", program)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_and_says_what_it_leaves(run, verb):
    text = " ".join(run(verb, "--help").stdout.split())
    assert f"pliant {verb}" in text.partition("Usage:")[2].partition("Options")[0][len(verb) :]
    assert "Needs" in text
    assert "eaves" in text


def test_no_arguments_show_the_commands(run):
    result = run(exit_code=2)
    assert all(verb in result.output for verb in VERBS)


def test_unknown_command_is_a_usage_error(run):
    assert "convert" in run("converts", exit_code=2).stderr
