"""Learning facts for good on tiny bases: what is written, what stays, and what is refused."""

import dataclasses
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import pliant
from pliant.consolidation import Consolidation, WriteSettings, consolidate, solve
from pliant.consolidation import settings as settings_module
from pliant.errors import EditError
from pliant.models import select_layers

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
}
WORDS = "the river of a town is far from sea and hills where people sing old songs about rain while bread was made"
FACTS = (
    ("Zorblax was born in Lisbon.", "Zorblax was born in", "Lisbon", "Zorblax"),
    ("The river Quorn flows into the sea of Mira.", "The river Quorn flows into", "the sea of Mira", "Quorn"),
    ("Ada Vell plays the violin.", "Ada Vell plays the", "violin", "Ada Vell"),
    ("Tervia is a town of bread.", "Tervia is a town of", "bread", "Tervia"),
    ("Old songs of Hul are about rain.", "Old songs of Hul are about", "rain", "Hul"),
)
CONTEXT, QUERY, ANSWER, SUBJECT = FACTS[0]
ROUTED = {"mod": pliant.ModConfig, "dtf": pliant.DtfConfig, "stt": pliant.SttConfig}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own."""
    monkeypatch.setenv("PLIANT_CACHE", str(tmp_path / "cache"))


def neutral_text() -> str:
    """Words in random order, some 2,000 tokens of them."""
    generator = random.Random(0)
    return " ".join(generator.choice(WORDS.split()) for _ in range(2_000))


NEUTRAL = neutral_text()


def make_speaker() -> PreTrainedTokenizerFast:
    """A tokenizer that reads any text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    backend.train_from_iterator([NEUTRAL, *(fact[0] for fact in FACTS)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture(scope="module")
def speaker() -> PreTrainedTokenizerFast:
    """A tokenizer that reads any text."""
    return make_speaker()


@pytest.fixture
def make_model(
    make_base: Callable[..., Any], convert_randomly: Callable[..., Any], speaker: Any, tmp_path: Path
) -> Callable[..., Any]:
    """A function that makes a dense, a keyed or an NF4 model of a tiny base that knows the speaker's tokens."""

    def make(kind: str = "dense", base: str = "llama", **overrides: Any) -> Any:
        path = tmp_path / f"base-{base}"
        if not path.exists():
            make_base(base, **{"vocab_size": len(speaker), **SIZES, **overrides}).save_pretrained(path)
        if kind == "nf4":
            quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            return pliant.load(path, quantization_config=quantised, dtype=torch.float32).eval()
        model = pliant.load(path).eval()
        return model if kind == "dense" else convert_randomly(model, kind, layers=[0, 2])

    return make


@pytest.fixture
def learn(speaker: Any) -> Callable[..., Any]:
    """A function that has a model learn one fact, with little text and no bound on its effect."""

    def run(
        model: Any,
        context: Any = CONTEXT,
        queries: Any = QUERY,
        answer: Any = ANSWER,
        subject: Any = SUBJECT,
        *,
        text: Any = NEUTRAL,
        num_tokens: int = 1_024,
        **fields: Any,
    ) -> Any:
        fields = {"target": "unembedding", "margin": 2.0, "kl_budget": None, "num_prefixes": 2, "contrast": 2, **fields}
        fields.setdefault("write", WriteSettings(neutral=0.1))  # in so small a model keys lie close to neutral text's
        settings = Consolidation(**fields)
        return consolidate(
            model, speaker, context, queries, answer, subject, settings=settings, text=text, num_tokens=num_tokens
        )

    return run


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def log_p(model: Any, speaker: Any, query: str, answer: str) -> float:
    """Mean log-probability a token of an answer after a query, by the plain forward of the model."""
    asked, full = speaker(query)["input_ids"], speaker(f"{query} {answer}")["input_ids"]
    assert full[: len(asked)] == asked
    with torch.no_grad():
        scores = model(torch.tensor([full])).logits[0].float().log_softmax(-1)
    places = range(len(asked) - 1, len(full) - 1)
    return sum(float(scores[place, full[place + 1]]) for place in places) / len(places)


def greedy(model: Any, speaker: Any, query: str, answer: str) -> str:
    """What the model says after a query, as long as the answer is."""
    ids = speaker(query, return_tensors="pt")["input_ids"]
    for _ in speaker(" " + answer)["input_ids"]:
        ids = torch.cat((ids, logits_of(model, ids)[:, -1:].argmax(-1)), dim=1)
    return speaker.decode(ids[0]).removeprefix(query).strip()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def traces(model: nn.Module) -> list[Any]:
    """Everything beside the weights that a call could leave behind."""
    modules = [
        (
            name,
            module.training,
            vars(module).get("forward"),
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    ]
    return [modules, [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]]


# What is written


LEARNED = [(kind, target) for kind in ("dense", "keyed") for target in ("unembedding", "optimised", "auto")]
LEARNED_NF4 = [pytest.param("nf4", target, marks=needs_bitsandbytes) for target in ("unembedding", "optimised")]


@pytest.mark.parametrize(("kind", "target"), [*LEARNED, *LEARNED_NF4])
def test_a_fact_is_learned_and_taken_back(
    kind: str, target: str, make_model: Callable[..., Any], learn: Callable[..., Any], speaker: Any, prompt: Tensor
):
    model = make_model(kind)
    before, weights, left, old = (
        logits_of(model, prompt),
        state(model),
        traces(model),
        log_p(model, speaker, QUERY, ANSWER),
    )
    edit = learn(model, target=target)
    assert list(model.edits) == [edit]
    assert same(state(model), weights)
    assert greedy(model, speaker, QUERY, ANSWER) == ANSWER
    new = log_p(model, speaker, QUERY, ANSWER)
    assert new > old + 2
    assert new > -2.5
    assert edit.context == CONTEXT
    assert edit.kl is not None
    assert edit.details["target"] == target
    assert edit.details["answers"] == [ANSWER]
    assert edit.details["subjects"] == [SUBJECT]
    assert set(edit.deltas) == {f"layers.{index}.mlp.down_proj" for index in (0, 3)}
    model.edits.revert(edit.id)
    assert torch.equal(logits_of(model, prompt), before)
    assert traces(model) == left


def test_every_family_learns(family: str, make_model: Callable[..., Any], learn: Callable[..., Any], speaker: Any):
    model = make_model("dense", family)
    learn(model)
    assert greedy(model, speaker, QUERY, ANSWER) == ANSWER


@pytest.mark.parametrize("writer", ["normalised", "ridge", "covariance", "null_space"])
def test_every_writer_raises_the_answer(
    writer: Any, make_model: Callable[..., Any], learn: Callable[..., Any], speaker: Any
):
    model = make_model()
    old = log_p(model, speaker, QUERY, ANSWER)
    edit = learn(model, write=WriteSettings(writer=writer, energy=0.5), num_prefixes=1)
    assert edit.details["writer"] == writer
    assert log_p(model, speaker, QUERY, ANSWER) > old + 2


def test_a_batch_is_one_edit(make_model: Callable[..., Any], learn: Callable[..., Any], speaker: Any):
    model = make_model()
    contexts, queries, answers, subjects = (list(some) for some in zip(*FACTS, strict=True))
    old = [log_p(model, speaker, query, answer) for _, query, answer, _ in FACTS]
    edit = learn(model, contexts, queries, answers, subjects)
    assert len(model.edits) == 1
    assert edit.details["facts"] == 5
    assert edit.details["subjects"] == subjects
    assert edit.context.split("\n") == contexts
    new = [log_p(model, speaker, query, answer) for _, query, answer, _ in FACTS]
    assert all(late > early + 2 for late, early in zip(new, old, strict=True)), (old, new)
    said = [greedy(model, speaker, query, answer) == answer for _, query, answer, _ in FACTS]
    assert sum(said) >= 4, said


def test_a_second_fact_leaves_the_first(make_model: Callable[..., Any], learn: Callable[..., Any], speaker: Any):
    model = make_model()
    first = learn(model)
    second = learn(model, *FACTS[2])
    assert [edit.id for edit in model.edits] == [first.id, second.id]
    for _, query, answer, _ in (FACTS[0], FACTS[2]):
        assert greedy(model, speaker, query, answer) == answer
    model.edits.revert(first.id)
    assert greedy(model, speaker, QUERY, ANSWER) != ANSWER
    alone = log_p(model, speaker, FACTS[2][1], FACTS[2][2])
    model.edits.revert(second.id)
    assert alone > log_p(model, speaker, FACTS[2][1], FACTS[2][2]) + 1


def test_the_same_call_gives_the_same_edit(make_model: Callable[..., Any], learn: Callable[..., Any]):
    one, other, third = (learn(make_model(), target="auto", seed=seed) for seed in (0, 0, 1))
    torch.rand(5)
    for name, delta in one.deltas.items():
        for side, value in delta.tensors().items():
            assert torch.equal(value, other.deltas[name].tensors()[side])
    assert any(
        delta.left.shape != third.deltas[name].left.shape or not torch.equal(delta.left, third.deltas[name].left)
        for name, delta in one.deltas.items()
    )
    assert one.kl == other.kl


def test_what_is_not_given_is_made(make_model: Callable[..., Any], learn: Callable[..., Any], speaker: Any):
    model = make_model()
    edit = learn(model, queries=None, answer=None, subject=None)
    queries, answer = edit.details["queries"][0], edit.details["answers"][0]
    assert queries
    assert all(CONTEXT.startswith(query) for query in queries)
    assert f"{queries[0]} {answer}." == CONTEXT
    assert edit.details["subjects"][0] in CONTEXT
    assert greedy(model, speaker, queries[0], answer) == answer


def test_a_given_answer_cuts_the_context(make_model: Callable[..., Any], learn: Callable[..., Any]):
    edit = learn(make_model(), queries=None)
    assert edit.details["queries"] == [[QUERY]]
    assert edit.details["answers"] == [ANSWER]


def test_the_models_own_answer_in_context_is_learned(
    make_model: Callable[..., Any], learn: Callable[..., Any], speaker: Any
):
    model = make_model()
    ids = speaker(f"{CONTEXT} {QUERY}", return_tensors="pt")["input_ids"]
    said = speaker.decode(
        model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :], skip_special_tokens=True
    )
    edit = learn(model, answer=None)
    assert said.strip().startswith(edit.details["answers"][0])
    assert edit.details["answers"][0]


def test_a_question_is_asked_in_several_ways(make_model: Callable[..., Any], learn: Callable[..., Any], speaker: Any):
    model = make_model()
    question = "Where was Zorblax born?"
    edit = learn(model, queries=[question, QUERY])
    assert edit.details["queries"] == [[question, f"Question: {question}\nAnswer:", QUERY]]
    for query in edit.details["queries"][0]:
        assert greedy(model, speaker, query, ANSWER) == ANSWER


def test_a_subject_may_be_rewritten_in_several_layers(
    make_model: Callable[..., Any], learn: Callable[..., Any], speaker: Any
):
    model = make_model()
    norms = []
    for layers in ([1, 3], [0, 1, 3]):
        edit = learn(model, layers=layers)
        assert edit.layers == tuple(layers)
        assert greedy(model, speaker, QUERY, ANSWER) == ANSWER
        norms.append(float(edit.deltas["layers.1.mlp.down_proj"].norm_squared))
        model.edits.revert(edit.id)
    assert norms[1] < norms[0]


def test_without_a_subject_only_the_answer_is_written(
    make_model: Callable[..., Any], learn: Callable[..., Any], speaker: Any
):
    model = make_model()
    edit = learn(model, subject="")
    assert edit.details["subjects"] == [""]
    assert edit.layers == (3,)
    assert greedy(model, speaker, QUERY, ANSWER) == ANSWER


def test_other_subjects_move_less_with_contrast(
    make_model: Callable[..., Any], learn: Callable[..., Any], speaker: Any
):
    query = QUERY.replace(SUBJECT, "Marie Curie")
    moved = []
    for contrast in (0, 32):
        model = make_model()
        before = log_p(model, speaker, query, ANSWER)
        learn(model, contrast=contrast)
        assert greedy(model, speaker, QUERY, ANSWER) == ANSWER
        moved.append(log_p(model, speaker, query, ANSWER) - before)
    assert moved[1] < 0.7 * moved[0], moved


# The context as the target


def in_context(model: Any, speaker: Any) -> float:
    return log_p(model, speaker, f"{CONTEXT} {QUERY}", ANSWER)


def distance(model: Any, speaker: Any, reference: Tensor) -> float:
    """Of the logits where the answer is predicted from those behind the context."""
    return float((answer_logits(model, speaker, QUERY) - reference).norm())


def answer_logits(model: Any, speaker: Any, query: str) -> Tensor:
    count = len(speaker(" " + ANSWER)["input_ids"])
    return logits_of(model, speaker(f"{query} {ANSWER}", return_tensors="pt")["input_ids"])[0, -count - 1 : -1]


@pytest.mark.parametrize("positions", ["answer", "span", "subject"])
@pytest.mark.parametrize("kind", ["dense", "keyed"])
def test_the_context_is_learned_where_it_is_read(
    positions: str, kind: str, make_model: Callable[..., Any], learn: Callable[..., Any], speaker: Any, prompt: Tensor
):
    model = make_model(kind)
    reference = answer_logits(model, speaker, f"{CONTEXT} {QUERY}")
    before, logits, weights = distance(model, speaker, reference), logits_of(model, prompt), state(model)
    layers = [1, 2] if positions == "subject" else [2, 3]
    edit = learn(model, target="context", positions=positions, layers=layers, num_prefixes=1, contrast=0)
    assert edit.layers == tuple(layers)
    share = {"answer": 0.3, "span": 0.5, "subject": 1.5}[positions]
    assert distance(model, speaker, reference) < share * before
    assert distance(model, speaker, reference) != before
    assert same(state(model), weights)
    model.edits.revert(edit.id)
    assert torch.equal(logits_of(model, prompt), logits)


def test_half_the_strength_goes_half_the_way_to_the_context(
    make_model: Callable[..., Any], learn: Callable[..., Any], speaker: Any
):
    left = []
    for alpha in (0.5, 1.0):
        model = make_model()
        reference = answer_logits(model, speaker, f"{CONTEXT} {QUERY}")
        before = distance(model, speaker, reference)
        learn(model, target="context", layers=[3], num_prefixes=1, contrast=0, alpha=alpha)
        left.append(distance(model, speaker, reference) / before)
    assert left[1] < 0.3 < left[0] < 0.8, left


# Strength, layers, budget


def test_alpha_scales_what_is_written(make_model: Callable[..., Any], learn: Callable[..., Any]):
    one, half, double = (learn(make_model(), alpha=alpha) for alpha in (1.0, 0.5, 2.0))
    for name, delta in one.deltas.items():
        change = delta.left @ delta.right.T
        for other, scale in ((half, 0.5), (double, 2.0)):
            written = other.deltas[name].left @ other.deltas[name].right.T
            torch.testing.assert_close(written, scale * change, rtol=1e-4, atol=1e-6)
    assert half.kl < one.kl < double.kl
    assert half.details["alpha"] == 0.5


@pytest.mark.parametrize("layers", [[1, 3], "3", "2-3", 2, [0], "upper_half"])
def test_only_the_given_layers_are_written(layers: Any, make_model: Callable[..., Any], learn: Callable[..., Any]):
    edit = learn(make_model(), layers=layers)
    assert edit.layers == tuple(select_layers(layers, 4))


def kl_on(model: Any, ids: Tensor, before: Tensor) -> float:
    now = logits_of(model, ids).log_softmax(-1)
    return float((before.exp() * (before - now)).sum(-1).mean())


@pytest.mark.parametrize("budget", [0.02, 1e-4])
@pytest.mark.parametrize("kind", ["dense", "keyed"])
def test_the_budget_is_kept(
    budget: float, kind: str, make_model: Callable[..., Any], learn: Callable[..., Any], speaker: Any
):
    model = make_model(kind)
    ids = pliant.data.calibration_tokens(speaker, NEUTRAL, num_tokens=512, window=256)
    before = logits_of(model, ids).log_softmax(-1)
    free = learn(model)
    assert free.kl == pytest.approx(kl_on(model, ids, before), rel=1e-2)
    assert free.details["share"] == 1
    assert free.kl > 0.02
    model.edits.revert(free.id)
    edit = learn(model, kl_budget=budget)
    measured = kl_on(model, ids, before)
    assert measured <= 1.02 * budget
    assert measured > 0.3 * budget  # and it is used
    assert edit.kl == pytest.approx(measured, rel=0.02)
    assert 0 < edit.details["share"] < 1


def test_the_budget_grows_with_the_root_of_the_facts(make_model: Callable[..., Any], learn: Callable[..., Any]):
    model, budget, many = make_model(), 1e-3, [list(part) for part in zip(*FACTS, strict=True)]
    free = learn(model, *many)
    model.edits.revert(free.id)
    assert free.kl > len(FACTS) * budget
    kl = learn(model, *many, kl_budget=budget).kl
    assert budget < kl <= len(FACTS) ** 0.5 * budget


def test_a_subject_within_its_share_is_not_solved_for_again(
    make_model: Callable[..., Any], learn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    model, solved, asked = make_model(), [], []
    original, write_layers = solve.shrunk, solve.write_layers
    subject = 1.01 * learn(model, layers=[0]).kl
    model.edits.clear()
    free = learn(model, layers=[0, 3], margin=8.0)
    model.edits.clear()
    budget = subject / solve.SUBJECT_BUDGET
    assert free.kl > budget
    monkeypatch.setattr(solve, "write_layers", lambda *args: solved.append(args) or write_layers(*args))
    monkeypatch.setattr(solve, "shrunk", lambda *args, **known: asked.append(known) or original(*args, **known))
    edit = learn(model, layers=[0, 3], margin=8.0, kl_budget=budget)
    assert len(solved) == 2
    assert asked == [{}, {"whole": pytest.approx(free.kl)}]
    assert edit.kl <= budget
    kept = edit.deltas["layers.0.mlp.down_proj"].left
    torch.testing.assert_close(kept, edit.details["share"] * free.deltas["layers.0.mlp.down_proj"].left)


def test_a_budget_that_is_wide_enough_changes_nothing(make_model: Callable[..., Any], learn: Callable[..., Any]):
    free, wide = learn(make_model()), learn(make_model(), kl_budget=100.0)
    assert wide.details["share"] == 1
    assert all(torch.equal(delta.left, wide.deltas[name].left) for name, delta in free.deltas.items())


# What stays


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_flags_come_back(fails: bool, make_model: Callable[..., Any], learn: Callable[..., Any]):
    model = make_model("keyed")
    model.train()
    model.model.layers[1].eval()
    model.model.layers[3].mlp.down_proj.weight.requires_grad_(False)
    left, weights = traces(model), state(model)
    if fails:
        with pytest.raises(EditError, match="kl_budget must leave some"):
            learn(model, target="optimised", kl_budget=1e-14)
        assert not len(model.edits)
    else:
        edit = learn(model, target="optimised")
        model.edits.revert(edit.id)
    assert traces(model) == left
    assert same(state(model), weights)


def test_a_failure_on_the_way_leaves_everything(
    make_model: Callable[..., Any], learn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    model = make_model()
    kept = learn(model, *FACTS[2])
    left, weights = traces(model), state(model)

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    for place in (
        "stages.write",
        "stages.margin_residual",
        "solve.divergence",
        "solve.write_layers",
        "stages.PartialPass.run",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"pliant.consolidation.{place}", full)
            with pytest.raises(RuntimeError, match="out of memory"):
                learn(model)
        assert traces(model) == left
        assert same(state(model), weights)
        assert list(model.edits) == [kept]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(
    context: Any, make_model: Callable[..., Any], learn: Callable[..., Any], speaker: Any
):
    model = make_model()
    with context():
        learn(model, target="optimised")
    assert greedy(model, speaker, QUERY, ANSWER) == ANSWER


def test_a_model_of_inference_tensors_is_refused(make_model: Callable[..., Any], learn: Callable[..., Any]):
    with torch.inference_mode():
        model = make_model()
    with pytest.raises(EditError, match=r"loaded and converted outside of torch.inference_mode"):
        learn(model)
    assert not list(model.edits)


def test_random_numbers_of_the_caller_stay(make_model: Callable[..., Any], learn: Callable[..., Any]):
    model = make_model()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    learn(model, target="optimised")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_settings_name_the_default_layers(make_base: Callable[..., Any], tmp_path: Path):
    def dense(count: int) -> Any:
        make_base("llama", num_hidden_layers=count).save_pretrained(tmp_path / str(count))
        return pliant.load(tmp_path / str(count))

    model = dense(30)
    assert Consolidation().places(model) == ([3, 4, 5, 6, 7], [29])
    assert Consolidation(target="context").places(model) == ([], [20, 22, 24, 26, 28])
    assert Consolidation(layers=[2, 20, 25]).places(model) == ([2], [20, 25])
    assert Consolidation(layers=[2, 5, 20], target="context").places(model) == ([], [2, 5, 20])
    for count in range(1, 9):
        model = dense(count)
        for target in settings_module.TARGETS:
            lower, upper = Consolidation(target=target).places(model)
            assert lower or upper
            assert sorted({*lower, *upper}) == [*lower, *upper]
            assert {*lower, *upper} <= set(range(count))


# Routed models


@pytest.mark.parametrize("target", ["context", "unembedding", "auto"])
@pytest.mark.parametrize("granularity", ["block", "attention"])
@pytest.mark.parametrize("architecture", ["mod", "dtf", "stt"])
def test_a_routed_model_learns_where_every_token_passes(
    architecture: str,
    granularity: str,
    target: str,
    make_model: Callable[..., Any],
    learn: Callable[..., Any],
    speaker: Any,
):
    model = make_model()
    config = ROUTED[architecture](capacity_gamma=0.5, granularity=granularity)
    pliant.convert(
        model, config, calibration=pliant.data.calibration_tokens(speaker, NEUTRAL, num_tokens=320, window=32)
    )
    closed = {1, 3} if granularity == "block" else set()
    old = log_p(model, speaker, QUERY, ANSWER)
    edit = learn(model, target=target)
    assert edit.details["layers"]
    assert closed.isdisjoint(edit.details["layers"])
    if target != "context":
        assert log_p(model, speaker, QUERY, ANSWER) > old + 2
    model.edits.revert(edit.id)
    assert log_p(model, speaker, QUERY, ANSWER) == old
    if closed:
        with pytest.raises(
            EditError, match=r"layers must be ones whose MLP every token enters; got 3, .* Choose other"
        ):
            learn(model, target=target, layers=[0, 3])
        assert not len(model.edits)


def test_a_model_without_a_layer_that_every_token_passes_learns_nothing(
    make_model: Callable[..., Any], learn: Callable[..., Any], speaker: Any
):
    model, tokens = make_model(), pliant.data.calibration_tokens(speaker, NEUTRAL, num_tokens=320, window=32)
    pliant.convert(model, pliant.ModConfig(capacity_gamma=0.5), layers="all", calibration=tokens)
    with pytest.raises(EditError, match="must have a layer whose MLP every token enters"):
        learn(model)


# What is refused


def refusals() -> None:
    """Prints, for each bad call, the error, its message, and whether the model and its ledger are as they were."""
    torch.set_num_threads(1)
    speaker, cases = make_speaker(), bad_calls()
    config = LlamaConfig(
        vocab_size=len(speaker), num_attention_heads=4, num_key_value_heads=2, **{**SIZES, "initializer_range": 0.2}
    )
    folder = Path(os.environ["PLIANT_CACHE"]) / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    model = pliant.load(folder).train()
    first = consolidate(model, speaker, CONTEXT, QUERY, ANSWER, SUBJECT, text=NEUTRAL, num_tokens=1_024)
    weights, left, outcome = state(model), traces(model), {}
    for name, (call, _, _) in cases.items():
        settings = {key: call.pop(key) for key in list(call) if key in SETTINGS}
        broken = call.pop("broken", None)
        if broken is not None:
            model.get_parameter(broken).data[..., 3].fill_(float("nan"))
        given = {"context": CONTEXT, "queries": QUERY, "answer": ANSWER, "subject": SUBJECT, "text": NEUTRAL} | call
        kind, message = "nothing", ""
        try:
            if settings:
                writer = {key: settings.pop(key) for key in ("writer", "neutral") if key in settings}
                given["settings"] = Consolidation(**settings, **({"write": WriteSettings(**writer)} if writer else {}))
            consolidate(model, speaker, num_tokens=given.pop("num_tokens", 1_024), **given)
        except Exception as error:
            kind, message = type(error).__name__, str(error)
        if broken is not None:
            model.get_parameter(broken).data.copy_(weights[broken])
        unchanged = same(state(model), weights) and traces(model) == left and list(model.edits) == [first]
        outcome[name] = [kind, message, unchanged]
        for edit in list(model.edits)[1:]:
            model.edits.revert(edit.id)
    print(json.dumps(outcome))


SETTINGS = {field.name for field in dataclasses.fields(Consolidation)} | {"writer", "neutral"}


def bad_calls() -> dict[str, tuple[dict[str, Any], str, list[str]]]:
    """Name → what is given, the error, and words of its message: the field, the value, the rule."""
    nan, inf = float("nan"), float("inf")
    two = {"context": [CONTEXT, FACTS[1][0]], "queries": None, "answer": None, "subject": None}
    return {
        "empty context": ({"context": ""}, "EditError", ["context", "not empty", "''"]),
        "blank context": ({"context": " \n\t"}, "EditError", ["context", "not empty", r"' \n\t'"]),
        "no contexts": ({"context": []}, "EditError", ["context", "at least one", "empty list"]),
        "one blank of two": ({**two, "context": [CONTEXT, ""]}, "EditError", ["context", "''", "place 1"]),
        "number for context": ({"context": 5}, "EditError", ["context", "text", "5"]),
        "number among contexts": ({**two, "context": [CONTEXT, 5]}, "EditError", ["context", "5", "place 1"]),
        "no context": ({"context": None}, "EditError", ["context", "text", "None"]),
        "too many answers": ({"answer": [ANSWER, "rain"]}, "EditError", ["answer", "1 contexts", "got 2"]),
        "too few answers": ({**two, "answer": [ANSWER]}, "EditError", ["answer", "2 contexts", "got 1"]),
        "one answer for two": ({**two, "answer": ANSWER}, "EditError", ["answer", "2 contexts", "got 1"]),
        "one query for two": ({**two, "queries": QUERY}, "EditError", ["queries", "2 contexts", "one text"]),
        "too many queries": ({**two, "queries": [QUERY] * 3}, "EditError", ["queries", "2 contexts", "got 3"]),
        "too many subjects": ({"subject": [SUBJECT] * 2}, "EditError", ["subject", "1 contexts", "got 2"]),
        "empty query": ({"queries": ""}, "EditError", ["queries", "not empty", "''"]),
        "blank query of two": ({"queries": [QUERY, " "]}, "EditError", ["queries", "not empty", "' '"]),
        "no queries": ({"queries": []}, "EditError", ["queries", "not empty", "[]"]),
        "number for query": ({"queries": 7}, "EditError", ["queries", "7"]),
        "number among queries": ({"queries": [QUERY, 7]}, "EditError", ["queries", "7"]),
        "blank answer": ({"answer": "  "}, "EditError", ["answer", "not empty", "'  '"]),
        "number for answer": ({"answer": [7]}, "EditError", ["answer", "text", "7"]),
        "answer not in context": (
            {"queries": None, "answer": "Paris", "subject": None}, "EditError", ["queries", "cannot ask", CONTEXT]
        ),
        "one word": ({"context": "Rain", "queries": None, "answer": None, "subject": None}, "EditError", ["queries"]),
        "subject not in query": ({"subject": "Quorn"}, "EditError", ["subject", "'Quorn'", "as written", QUERY]),
        "subject in another case": ({"subject": "zorblax"}, "EditError", ["subject", "'zorblax'", "as written"]),
        "number for subject": ({"subject": [7]}, "EditError", ["subject", "text", "7"]),
        "writer": ({"writer": "hebb"}, "ConfigError", ["writer", "'hebb'", "covariance"]),
        "neutral": ({"neutral": 0}, "ConfigError", ["neutral", "above 0", "0"]),
        "target": ({"target": "memory"}, "ConfigError", ["target", "'memory'", "unembedding"]),
        "positions": ({"target": "context", "positions": "all"}, "ConfigError", ["positions", "'all'", "span"]),
        "positions of another target": ({"positions": "span"}, "ConfigError", ["positions", "'span'", "target"]),
        "alpha 0": ({"alpha": 0}, "ConfigError", ["alpha", "above 0", "0"]),
        "alpha -1": ({"alpha": -1.0}, "ConfigError", ["alpha", "above 0", "-1"]),
        "alpha nan": ({"alpha": nan}, "ConfigError", ["alpha", "nan"]),
        "alpha inf": ({"alpha": inf}, "ConfigError", ["alpha", "at most 10", "inf"]),
        "alpha 11": ({"alpha": 11}, "ConfigError", ["alpha", "at most 10", "11"]),
        "layer 4": ({"layers": [4]}, "ConversionError", ["layers", "0..3", "4"]),
        "layer -1": ({"layers": -1}, "ConversionError", ["layers", "0..3", "-1"]),
        "no layers": ({"layers": []}, "ConversionError", ["layers", "at least one"]),
        "layers twice": ({"layers": [3, 3]}, "ConversionError", ["layers", "once"]),
        "layers in words": ({"layers": "top"}, "ConversionError", ["layers", "top"]),
        "layers that do not exist, among others": ({"layers": [0, 1, 4]}, "ConversionError", ["layers", "0..3", "4"]),
        "only a subject's layer, no subject": (
            {"layers": [0], "subject": ""}, "EditError", ["layers", "no query names one"]
        ),
        "budget 0": ({"kl_budget": 0.0}, "ConfigError", ["kl_budget", "above 0", "0.0"]),
        "budget -1": ({"kl_budget": -1.0}, "ConfigError", ["kl_budget", "above 0", "-1.0"]),
        "budget nan": ({"kl_budget": nan}, "ConfigError", ["kl_budget", "nan"]),
        "budget out of reach": ({"kl_budget": 1e-14}, "EditError", ["kl_budget", "Raise"]),
        "no prefixes": ({"num_prefixes": 0}, "ConfigError", ["num_prefixes", "at least 1", "0"]),
        "num_tokens 0": ({"num_tokens": 0}, "ConfigError", ["num_tokens", "0"]),
        "little text": ({"text": "the river"}, "DataError", ["tokens", "text"]),
        "missing file": ({"text": Path("missing.txt")}, "DataError", ["missing.txt", "does not exist"]),
        "nan in the embedding": ({"broken": "model.embed_tokens.weight"}, "*", ["finite"]),
        "nan in a layer": ({"broken": "model.layers.1.mlp.up_proj.weight"}, "*", ["finite"]),
        "nan in the head": ({"broken": "lm_head.weight"}, "EditError", ["finite"]),
        "nan in the norm": ({"broken": "model.norm.weight"}, "EditError", ["finite"]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without the type checks of the tests, which would come first, says to every bad call."""
    cache = str(tmp_path_factory.mktemp("cache"))
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "PLIANT_CACHE": cache}
    command = [sys.executable, "-c", "import test_consolidation as own; own.refusals()"]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", bad_calls())
def test_a_bad_call_is_refused_by_name_and_changes_nothing(case: str, refused: dict[str, Any]):
    _, error, words = bad_calls()[case]
    kind, message, unchanged = refused[case]
    assert kind == error or (error == "*" and kind in ("EditError", "DataError")), (kind, message)
    assert not [word for word in words if word not in message], message
    assert unchanged
