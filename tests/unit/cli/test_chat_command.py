"""``pliant chat``: turns from a pipe, the template, and every command."""

import json

import pytest
import torch

import pliant

GREEDY = ("--temperature", 0, "--max-new-tokens", 6)


@pytest.fixture
def talk(run, tmp_path):
    """A function that pipes lines into a chat; returns the run and the messages at its end."""

    def call(model, *lines, options=()):
        file = tmp_path / f"talk{len(list(tmp_path.glob('talk*')))}.json"
        result = run("chat", model, *GREEDY, *options, stdin="\n".join([*lines, f"/save {file}"]) + "\n")
        return result, json.loads(file.read_text(encoding="utf-8"))

    return call


@pytest.fixture
def plastic(converted):
    """The converted model with modulation that is not zero any more."""
    model = pliant.load(converted)
    with torch.no_grad():
        for _, parameter in model.dynamic_parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    model.save_pretrained(converted)
    return converted


def answers(messages):
    return [message["content"] for message in messages if message["role"] == "assistant"]


def test_one_line_is_one_turn_and_the_end_of_input_ends_it(tiny, talk):
    result, messages = talk(tiny, "hello", "and then?")
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]
    assert all(answer.strip() in result.stdout for answer in answers(messages))


def test_history_goes_through_the_template(run, tiny, talk):
    _, messages = talk(tiny, "hello", "and then?")
    first = answers(messages)[0]
    prompt = f"<user>hello\n<assistant>{first}\n<user>and then?\n<assistant>"
    told = run("generate", tiny, "--json", "--prompt", prompt, "--max-new-tokens", 6).stdout
    assert answers(messages)[1] == json.loads(told)["outputs"][0]["text"]


def test_base_answers_as_the_base_and_back(tiny, plastic, talk):
    script = ("hello", "/reset", "/base", "hello", "/reset", "/base", "hello")
    result, _ = talk(plastic, *script)
    assert "The base answers now." in result.stderr
    assert "The converted model answers now." in result.stderr
    own = answers(talk(plastic, "hello")[1])[0]
    base = answers(talk(plastic, "/base", "hello")[1])[0]
    assert base == answers(talk(tiny, "hello")[1])[0]
    assert own != base
    assert answers(talk(plastic, "/base", "/base", "hello")[1])[0] == own


def test_a_dense_model_has_no_other_base(tiny, talk):
    assert "not converted" in talk(tiny, "/base")[0].stderr


def test_reset_forgets_all_but_the_system_message(tiny, talk):
    _, messages = talk(tiny, "hello", "/reset", options=("--system", "Be brief."))
    assert messages == [{"role": "system", "content": "Be brief."}]


def test_system_message_changes_the_answer(tiny, talk):
    with_system = talk(tiny, "hello", options=("--system", "Be brief."))[1]
    assert answers(with_system) != answers(talk(tiny, "hello")[1])


def test_seed_makes_sampling_repeatable(tiny, talk):
    hot = ("--temperature", 2.0, "--seed", 3)
    assert talk(tiny, "hello", options=hot)[1] == talk(tiny, "hello", options=hot)[1]


def test_exit_ends_before_the_rest_is_read(run, tiny):
    result = run("chat", tiny, *GREEDY, stdin="/help\n/exit\n/unknown\n")
    assert "/save FILE" in result.stderr
    assert "no command" not in result.stderr


def test_mistakes_do_not_end_the_conversation(run, tiny, tmp_path):
    there = tmp_path / "there.json"
    there.write_text("mine")
    lines = (
        "/sing",
        "/save",
        f"/save {there}",
        f"/save {tmp_path}/no/x.json",
        "long " * 600,
        "/help",
    )
    result = run("chat", tiny, *GREEDY, stdin="\n".join(lines) + "\n")
    for message in ("no command /sing", "needs a file name", "exists already", "cannot be written"):
        assert message in result.stderr
    assert "Type /reset to begin anew" in result.stderr
    assert "/save FILE" in result.stderr
    assert there.read_text() == "mine"


def test_a_tokenizer_without_a_template_is_an_error_at_once(run, without_template):
    result = run("chat", without_template, stdin="hello\n", exit_code=1)
    assert "has no chat template" in result.stderr


def test_top_p_needs_a_temperature(run, tiny):
    run("chat", tiny, "--temperature", 0, "--top-p", 0.5, stdin="", exit_code=2)
