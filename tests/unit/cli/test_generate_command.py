"""``pliant generate``: streaming, JSON, the base beside it, sampling and chat."""

import json

import pytest
import torch

import pliant
from pliant.cli.generation import tokenizer_of

PROMPT = "A small robot"


def generate(run, model, *arguments):
    """Returns the ``outputs`` of ``--json``."""
    arguments = arguments if "--prompt-file" in arguments else ("--prompt", PROMPT, *arguments)
    return json.loads(run("generate", model, "--json", *arguments).stdout)["outputs"]


@pytest.fixture
def plastic(converted):
    """The converted model with modulation that is not zero any more."""
    model = pliant.load(converted)
    with torch.no_grad():
        for _, parameter in model.dynamic_parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    model.save_pretrained(converted)
    return converted


def test_text_is_that_of_the_model_itself(run, plastic):
    model = pliant.load(plastic)
    ids = torch.tensor([tokenizer_of(model)(PROMPT)["input_ids"]])
    expected = model.generate(ids, do_sample=False, max_new_tokens=9)[0, ids.shape[1] :].tolist()
    (output,) = generate(run, plastic, "--max-new-tokens", 9)
    assert output["token_ids"] == expected
    assert output["prompt"] == PROMPT


def test_text_streams_after_its_prompt(run, tiny):
    (output,) = generate(run, tiny, "--max-new-tokens", 8)
    result = run("generate", tiny, "--prompt", PROMPT, "--max-new-tokens", 8)
    assert result.stdout.startswith(PROMPT)
    assert result.stdout.removeprefix(PROMPT).strip() == output["text"].strip()


def test_base_is_shown_beside_the_model(run, plastic, tiny):
    (output,) = generate(run, plastic, "--base", "--max-new-tokens", 8)
    (alone,) = generate(run, tiny, "--max-new-tokens", 8)
    assert output["base_token_ids"] == alone["token_ids"]
    assert output["base_token_ids"] != output["token_ids"]
    table = run("generate", plastic, "--prompt", PROMPT, "--base", "--max-new-tokens", 8).stdout
    assert "converted" in table
    assert PROMPT in table


def test_prompts_come_from_options_and_a_file(run, tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    arguments = ("--prompt", "zero", "--prompt-file", tmp_path / "prompts.txt")
    outputs = generate(run, tiny, *arguments, "--max-new-tokens", 2)
    assert [output["prompt"] for output in outputs] == ["zero", "one", "two"]


def test_sampling_is_repeatable_with_a_seed(run, tiny):
    hot = ("--temperature", 2.0, "--max-new-tokens", 12)
    texts = [generate(run, tiny, *hot, "--seed", seed)[0]["token_ids"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_a_tiny_nucleus_is_greedy(run, tiny):
    greedy = generate(run, tiny)[0]["token_ids"]
    nucleus = generate(run, tiny, "--temperature", 1, "--top-p", 1e-6, "--seed", 5)[0]["token_ids"]
    assert nucleus == greedy
    assert generate(run, tiny, "--temperature", 1, "--seed", 5)[0]["token_ids"] != greedy


def test_chat_applies_the_template(run, tiny):
    plain, chat = generate(run, tiny)[0], generate(run, tiny, "--chat")[0]
    literal = json.loads(run("generate", tiny, "--json", "--prompt", f"<user>{PROMPT}\n<assistant>").stdout)
    assert chat["token_ids"] == literal["outputs"][0]["token_ids"]
    assert chat["token_ids"] != plain["token_ids"]


def test_dtype_is_that_asked_for(run, tiny, monkeypatch):
    seen = []
    load = pliant.load

    def spy(name, **options):
        model = load(name, **options)
        seen.append(model.dtype)
        return model

    monkeypatch.setattr("pliant.models.load", spy)
    generate(run, tiny, "--dtype", "bfloat16", "--max-new-tokens", 1)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "--prompt"),
        (("--prompt", "x", "--top-p", 0.9), 2, "--top-p"),
        (("--prompt", "x", "--temperature", -1), 2, "--temperature"),
        (("--prompt", ""), 1, "at least one token"),
        (("--prompt", "robot " * 600), 1, "shorter than the model's 512 positions"),
        (("--prompt-file", "none.txt"), 1, "'none.txt' does not exist"),
    ],
)
def test_what_is_wrong_is_named(run, tiny, options, code, message):
    assert message in run("generate", tiny, *options, exit_code=code).stderr


def test_chat_without_a_template_is_an_error(run, without_template):
    result = run("generate", without_template, "--prompt", "x", "--chat", exit_code=1)
    assert "has no chat template" in result.stderr


def test_a_model_without_a_tokenizer_is_an_error(run, tiny, tmp_path):
    pliant.load(tiny).save_pretrained(tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    result = run("generate", tmp_path / "bare", "--prompt", "x", exit_code=1)
    assert "must hold a tokenizer" in result.stderr
