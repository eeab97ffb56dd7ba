"""``pliant inject``: a piped session, every command, errors that leave the model as it was, and the terminal."""

import re

import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import pliant
from pliant.cli.inject import Session
from pliant.cli.learning import Learner
from pliant.models import EDITS_NAME, read_edits

FACT = "The green robot looks for water."
TEACH = f"inject {FACT} | The green robot looks for | the memory | robot"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Statistics are kept in a folder of the test's own."""
    monkeypatch.setattr("pliant.key_moments.cache_dir", lambda: tmp_path / "cache")


@pytest.fixture
def session_of(run, text_file):
    """A function that pipes lines into ``pliant inject``."""

    def call(model, *lines, exit_code=0):
        options = ("--calibration", text_file, "--calibration-tokens", 1024)
        return run("inject", model, *options, stdin="".join(f"{line}\n" for line in lines), exit_code=exit_code)

    return call


@pytest.fixture
def session(tiny, text_file):
    """A session in this process, with α so small that the budget never matters."""
    session = Session(Learner(pliant.load(tiny).eval(), text_file.read_text(), 1024), None)
    session.handle("strength 0.01")
    return session


def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 14)[None]).logits


def ids(session):
    return [edit.id for edit in pliant.edits(session.model)]


def test_a_session_teaches_lists_undoes_and_saves(session_of, tiny, tmp_path, files_of):
    before = files_of(tiny)
    new = tmp_path / "new"
    result = session_of(
        tiny, "strength 0.01", TEACH, TEACH, "list", "undo", f"save {new}", TEACH, "save", "history", "quit", "list"
    )
    found = re.findall(r"^([0-9a-f]{8})  KL .*robot", result.stdout, re.MULTILINE)
    assert len(found) == 2
    assert f"took back {found[1]}" in result.stdout
    assert f"saved {new}, 1 in its ledger" in result.stdout
    assert f"saved {new}, 2 in its ledger" in result.stdout
    assert len(read_edits(new)) == 2
    assert read_edits(new).edits[0].id == found[0]
    assert TEACH in result.stderr
    assert result.stdout.count("2 learned") == 1
    assert "since the last save" not in result.stderr
    assert files_of(tiny) == before


def test_a_folder_of_pliants_is_its_own_home(session_of, tiny, tmp_path, files_of):
    home = tmp_path / "home"
    pliant.load(tiny).save_pretrained(home)
    before = files_of(home)
    session_of(home, "strength 0.01", TEACH, "save")
    after = files_of(home)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {EDITS_NAME}
    session_of(home, "undo all", "save")
    assert files_of(home) == before


def test_the_base_answers_without_the_edits(session_of, run, tiny, tmp_path):
    new = tmp_path / "new"
    asked = "The green robot looks for"
    result = session_of(tiny, f"ask {asked}", "strength 10", "inject A hill. | A green | sea sea", f"save {new}")
    (plain,) = [line for line in result.stdout.splitlines() if line][:1]
    again = session_of(new, f"ask-base {asked}", f"ask {asked}").stdout.splitlines()
    assert again[0] == plain


@pytest.mark.parametrize(("alias", "name"), [("test", "ask"), ("layer", "layers"), ("reset", "undo"), ("?", "help")])
def test_the_names_of_the_original_sessions_are_known(session, capsys, alias, name):
    argument = {"ask": "A robot", "layers": "2", "undo": "all", "help": ""}[name]
    told = []
    for word in (alias, name):
        if name == "undo":
            session.handle(TEACH)
        capsys.readouterr()
        session.handle(f"{word} {argument}")
        told.append(re.sub(r"[0-9a-f]{8}", "id", capsys.readouterr().out))
    assert told[0] == told[1]
    assert session.failures == 0
    assert not session.handle("exit")


def test_undo_leaves_the_model_bitwise_as_it_was(session):
    before = logits(session.model)
    session.handle(TEACH)
    session.handle(TEACH)
    first, second = ids(session)
    assert not torch.equal(logits(session.model), before)
    session.handle(f"undo {first[:4]}")
    assert ids(session) == [second]
    session.handle("undo")
    assert torch.equal(logits(session.model), before)


def test_strength_and_layers_are_shown_and_used(session, capsys):
    assert session.prompt == "α 0.01, layers auto> "
    session.handle("layers 2,3")
    session.handle("strength 0.02")
    assert session.prompt == "α 0.02, layers 2,3> "
    session.handle(TEACH)
    (edit,) = pliant.edits(session.model)
    assert edit.layers == (2, 3)
    assert edit.details["alpha"] == 0.02
    capsys.readouterr()
    session.handle("layers auto")
    session.handle("strength")
    assert capsys.readouterr().out.splitlines() == ["layers 0, 3", "strength 0.02"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sing", "a line must begin with inject, ask, ask-base, list"),
        ("inject", "inject must be given TEXT, or TEXT | QUERY | ANSWER | SUBJECT; got ''"),
        ("inject | query", "inject must be given TEXT"),
        ("inject a | b | c | d | e", "inject must be given TEXT"),
        ("inject a | b | c | d", "subject must be in a query as written; got 'd'"),
        ("ask", "ask must be given a question"),
        ("ask-base  ", "ask must be given a question"),
        ("undo 77", "got '77'. The newest is"),
        ("strength much", "strength must be a number; got 'much'"),
        ("strength 0", "alpha must be above 0"),
        ("strength nan", "alpha must be above 0"),
        ("layers 9", "layers must be"),
        ("layers 0,0", "layers must name each layer once"),
        ("layers nowhere", "layers"),
        ("save", "save must be given a folder"),
        ("save {full}", "save must be a new or an empty folder"),
        ("save {full}/model.safetensors", "save must be a folder"),
    ],
)
def test_an_error_is_shown_and_the_session_goes_on(session, tiny, capsys, files_of, line, message):
    session.handle(TEACH)
    before, kept, prompt, files = logits(session.model), ids(session), session.prompt, files_of(tiny)
    assert session.handle(line.format(full=tiny))
    told = capsys.readouterr().err
    assert message in " ".join(told.split())
    assert told.count("error:") == 1
    assert session.failures == 1
    assert (ids(session), session.prompt) == (kept, prompt)
    assert torch.equal(logits(session.model), before)
    assert files_of(tiny) == files


def test_a_failure_makes_the_exit_code_of_a_pipe(session_of, tiny):
    result = session_of(tiny, "sing", "list", exit_code=1)
    assert "0 learned" in result.stdout
    assert result.stderr.count("error:") == 1


@pytest.mark.parametrize("where", ["pliant.key_moments._add_grams", "pliant.cli.learning.Learner.compare"])
@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_what_is_interrupted_leaves_the_model_as_it_was(session, monkeypatch, capsys, where, problem):
    before = logits(session.model)

    def stop(*_, **__):
        raise problem

    with monkeypatch.context() as patch:
        patch.setattr(where, stop)
        assert session.handle(TEACH)
    assert not ids(session)
    assert torch.equal(logits(session.model), before)
    assert ("out of memory" if problem is not KeyboardInterrupt else "interrupted") in capsys.readouterr().err
    session.handle(TEACH)
    assert len(ids(session)) == 1


def test_what_was_not_saved_is_said(session_of, tiny, tmp_path):
    assert "since the last save" in session_of(tiny, "strength 0.01", TEACH).stderr
    assert "since the last save" not in session_of(tiny, "strength 0.01", TEACH, f"save {tmp_path / 'new'}").stderr


def typed(session, keys):
    """What the session reads from a terminal on which ``keys`` are typed."""
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        return list(session.typed())


def test_a_terminal_yields_lines_until_its_end(session):
    control_c, control_d = "\x03", "\x04"
    assert typed(session, f"list\rlost{control_c}help\r{control_d}") == ["list", "help"]


def test_a_terminal_completes_commands_ids_and_folders(session, tmp_path, monkeypatch):
    session.handle(TEACH)
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)

    def completed(text):
        return [c.text for c in session._completer().get_completions(Document(text), None)]

    assert set(completed("s")) == {"strength", "save"}
    assert completed("undo ") == ["all", *ids(session)]
    assert completed("layers a") == ["auto"]
    assert completed("save out") == ["puts"]
