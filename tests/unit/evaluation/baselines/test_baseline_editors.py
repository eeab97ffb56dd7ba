"""What every baseline editor must do, and leave alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.consolidation.forward import trial
from pliant.errors import EditError
from pliant.evaluation.baselines import AlphaEdit, FineTune, Lora, Memit, RandomDirection, Rome, randomised, states
from pliant.evaluation.baselines.prompts import case_rows, sampled_prefixes
from pliant.evaluation.baselines.states import moments_of
from pliant.evaluation.baselines.training import answer_losses
from pliant.key_moments import key_moments
from pliant.models.edits import Delta, Edit

NAMES = ("rome", "memit", "alphaedit", "finetune", "lora")
BATCHED = NAMES[1:]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OPTIONS: dict[str, dict[str, Any]] = {
    "rome": {"depth": 0.34, "steps": 15, "clamp": 8.0},
    "memit": {"depths": (0.0, 0.34), "steps": 20, "clamp": 4.0, "strength": 0.01},
    "alphaedit": {"depths": (0.0, 0.34), "steps": 20, "clamp": 4.0, "threshold": 1.0, "strength": 0.1},
    "finetune": {"depth": 0.34, "epochs": 10, "learning_rate": 0.03, "bound": None},
    "lora": {"epochs": 10, "learning_rate": 0.03, "rank": 3, "depths": (0.34, 0.67), "targets": PROJECTIONS},
}
CLASSES = {"rome": Rome, "memit": Memit, "alphaedit": AlphaEdit, "finetune": FineTune, "lora": Lora}


@pytest.fixture
def editor_of(moments_of: Callable, calibration: Tensor) -> Callable[..., Any]:
    """A function that makes an editor for a tiny model."""

    def make(name: str, model: nn.Module, **options: Any) -> Any:
        if name == "lora":
            pytest.importorskip("peft")
        moments = {"moments": moments_of(model, calibration)} if name in NAMES[:3] else {}
        common = {"num_prefixes": 2, "prefix_length": 3}
        return CLASSES[name](**{**common, **OPTIONS[name], **moments, **options})

    return make


@torch.no_grad()
def loss(model: nn.Module, tokenizer: Any, fact: Any) -> float:
    """−log p of the answer after the bare prompt, a mean over tokens."""
    return answer_losses(model, case_rows(tokenizer, [fact], []))[0].item()


def hooks_of(model: nn.Module) -> int:
    """How many hooks the modules have."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_becomes_likelier_and_the_model_stays(
    name: str, family: str, make_base: Callable, editor_of: Callable, tokenizer: Any, fact: Any, state_of: Callable
) -> None:
    model = make_base(family).train()
    model.lm_head.weight.requires_grad_(False)
    editor = editor_of(name, model)
    before, modules, attributes = state_of(model), dict(model.named_modules()), set(vars(model))
    unedited = loss(model, tokenizer, fact)
    edit = editor(model, tokenizer, fact)
    assert state_of(model) == before
    assert dict(model.named_modules()) == modules
    assert set(vars(model)) == attributes
    assert hooks_of(model) == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert loss(model, tokenizer, fact) == unedited
    with trial(model, edit.deltas):
        assert loss(model, tokenizer, fact) < 0.5 * unedited
    assert edit.context == fact.context
    assert edit.details["cases"] == [fact.id]


@pytest.mark.parametrize("form", ["keyed", "v2"])
@pytest.mark.parametrize("name", NAMES)
def test_converted_models_are_edited_too(
    name: str, form: str, make_converted: Callable, editor_of: Callable, tokenizer: Any, fact: Any, state_of: Callable
) -> None:
    model = make_converted(form)
    before = state_of(model)
    edit = editor_of(name, model)(model, tokenizer, fact)
    assert state_of(model) == before
    unedited = loss(model, tokenizer, fact)
    with trial(model, edit.deltas):
        assert loss(model, tokenizer, fact) < 0.8 * unedited


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("kind", ["mod", "dtf", "mod attention"])
def test_routed_models_are_edited_where_every_token_passes(
    name: str, kind: str, make_routed: Callable, editor_of: Callable, tokenizer: Any, fact: Any
) -> None:
    model = make_routed(kind)
    editor = editor_of(name, model, **({"depth": 0.25} if name == "rome" else {"depths": (0.25, 0.25)}))  # layer 1
    if kind == "mod attention":
        unedited = loss(model, tokenizer, fact)
        with trial(model, editor(model, tokenizer, fact).deltas):
            assert loss(model, tokenizer, fact) < 0.8 * unedited
    else:
        with pytest.raises(EditError, match="in layers whose MLP every token enters; got 1, where tokens are routed"):
            editor(model, tokenizer, fact)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_edit(
    name: str, make_base: Callable, editor_of: Callable, tokenizer: Any, fact: Any
) -> None:
    first, second = make_base(), make_base()
    torch.manual_seed(1)
    one = editor_of(name, first)(first, tokenizer, fact)
    torch.manual_seed(2)
    two = editor_of(name, second)(second, tokenizer, fact)
    assert one.deltas.keys() == two.deltas.keys()
    for path, delta in one.deltas.items():
        assert torch.equal(delta.left, two.deltas[path].left)
        assert torch.equal(delta.right, two.deltas[path].right)


@pytest.mark.parametrize(("name", "rank"), [("rome", 1), ("memit", 1), ("alphaedit", 1), ("finetune", 32), ("lora", 3)])
def test_edits_have_the_rank_that_is_stated(
    name: str, rank: int, make_base: Callable, editor_of: Callable, tokenizer: Any, fact: Any
) -> None:
    model = make_base()
    edit = editor_of(name, model)(model, tokenizer, fact)
    for path, delta in edit.deltas.items():
        weight = model.model.get_submodule(path).weight
        assert (len(delta.left), len(delta.right)) == tuple(weight.shape)
        assert delta.left.shape[1] == delta.right.shape[1] <= rank
        assert delta.left.dtype == delta.right.dtype == torch.float32
    if name == "lora":
        assert {path.rpartition(".")[2] for path in edit.deltas} == set(PROJECTIONS)


@pytest.mark.parametrize("name", BATCHED)
def test_batches_make_every_answer_likelier(
    name: str, make_base: Callable, editor_of: Callable, tokenizer: Any, facts: list, state_of: Callable
) -> None:
    model = make_base()
    before = state_of(model)
    edit = editor_of(name, model).batch(model, tokenizer, facts)
    assert state_of(model) == before
    assert edit.details["cases"] == [fact.id for fact in facts]
    for fact in facts:
        unedited = loss(model, tokenizer, fact)
        with trial(model, edit.deltas):
            assert loss(model, tokenizer, fact) < unedited


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_restored_after_an_error(
    name: str, make_base: Callable, editor_of: Callable, tokenizer: Any, fact: Any, state_of: Callable
) -> None:
    model = make_base().train()
    editor = editor_of(name, model)
    editor(model, tokenizer, fact)  # samples the prefixes, with the head that fails below
    before, modules, attributes = state_of(model), dict(model.named_modules()), set(vars(model))

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = model.lm_head.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        editor(model, tokenizer, fact)
    handle.remove()
    assert state_of(model) == before
    assert dict(model.named_modules()) == modules
    assert set(vars(model)) == attributes
    assert hooks_of(model) == 0


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", NAMES)
def test_editors_work_where_gradients_are_off(
    name: str, off: Callable, make_base: Callable, editor_of: Callable, tokenizer: Any, fact: Any
) -> None:
    model = make_base()
    editor = editor_of(name, model)
    with off():
        edit = editor(model, tokenizer, fact)
    assert all(not delta.left.requires_grad for delta in edit.deltas.values())


@pytest.mark.parametrize("name", BATCHED)
def test_an_empty_batch_is_refused(name: str, make_base: Callable, editor_of: Callable, tokenizer: Any) -> None:
    model = make_base()
    with pytest.raises(EditError, match="cases must hold at least one"):
        editor_of(name, model).batch(model, tokenizer, [])


def test_what_is_not_finite_is_refused(make_base: Callable, editor_of: Callable, tokenizer: Any, fact: Any) -> None:
    model = make_base()
    with pytest.raises(EditError, match="must be finite"):
        editor_of("finetune", model, learning_rate=float("inf"))(model, tokenizer, fact)


def test_a_bound_holds(make_base: Callable, editor_of: Callable, tokenizer: Any, fact: Any) -> None:
    model = make_base("llama_mlp_bias")
    edit = editor_of("finetune", model, bound=0.1)(model, tokenizer, fact)
    ((path, delta),) = edit.deltas.items()
    size = model.model.get_submodule(path).weight.square().mean().sqrt()
    assert (delta.left @ delta.right.T).abs().max() == pytest.approx(0.1 * size.item(), rel=0.15)


def test_lora_refuses_a_model_that_holds_adapters(make_base: Callable, tokenizer: Any, fact: Any) -> None:
    peft = pytest.importorskip("peft")
    model = make_base()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    with pytest.raises(EditError, match="must hold no adapters"):
        Lora(epochs=1)(model, tokenizer, fact)


def test_lora_searches_in_fp32_whatever_the_model_is(
    make_base: Callable, editor_of: Callable, tokenizer: Any, fact: Any
):
    model = make_base().bfloat16()
    unedited = loss(model, tokenizer, fact)
    edit = editor_of("lora", model)(model, tokenizer, fact)
    assert any(not torch.equal(delta.right, delta.right.bfloat16().float()) for delta in edit.deltas.values())
    with trial(model, edit.deltas):
        assert loss(model, tokenizer, fact) < 0.5 * unedited


def test_prefixes_and_statistics_are_of_the_base_as_it_is(
    make_base: Callable, tokenizer: Any, calibration: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = make_base(), {"count": 2, "length": 4, "seed": 0}
    monkeypatch.setattr(
        states, "cached_key_moments", lambda model, _tokenizer, layers, **_: key_moments(model, calibration, layers)
    )
    prefixes, moments = sampled_prefixes(model, tokenizer, **options), moments_of(model, tokenizer, [1], 64)
    assert moments_of(model, tokenizer, [1], 64)[1] is moments[1]
    model.load_state_dict(make_base(seed=7).state_dict())
    assert sampled_prefixes(model, tokenizer, **options) != prefixes
    assert not torch.equal(moments_of(model, tokenizer, [1], 64)[1].moment, moments[1].moment)


def test_the_control_is_as_large_and_seeded() -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = {
        f"layers.{rank}.mlp.down_proj": Delta(
            left=torch.randn(32, rank, generator=generator),
            right=torch.randn(48, rank, generator=generator),
            scale=torch.randn(32, generator=generator) if rank == 4 else None,
        )
        for rank in (1, 4)
    }
    edit = Edit(context="a", deltas=deltas, kl=0.1)
    control, again, other = (randomised(edit, seed=seed) for seed in (3, 3, 4))
    assert control.id != edit.id
    assert control.kl is None
    for path, delta in deltas.items():
        found = control.deltas[path]
        assert (found.left @ found.right.T).norm().item() == pytest.approx((delta.left @ delta.right.T).norm().item())
        assert torch.equal(found.right, delta.right)
        assert torch.equal(found.left, again.deltas[path].left)
        assert not torch.allclose(found.left, other.deltas[path].left)
    first, second = deltas.values()
    assert control.deltas["layers.1.mlp.down_proj"].scale is first.scale is None
    scale = control.deltas["layers.4.mlp.down_proj"].scale
    assert scale is not None
    assert second.scale is not None
    assert scale.norm().item() == pytest.approx(second.scale.norm().item())


def test_the_control_reads_what_the_editor_reads(
    make_base: Callable, editor_of: Callable, tokenizer: Any, fact: Any
) -> None:
    model = make_base()
    editor = editor_of("rome", model)
    edit, control = editor(model, tokenizer, fact), RandomDirection(editor=editor)(model, tokenizer, fact)
    (delta,), (found,) = edit.deltas.values(), control.deltas.values()
    assert torch.equal(delta.right, found.right)
    assert found.left.norm().item() == pytest.approx(delta.left.norm().item())
    assert control.details["of"]["writer"] == "rome"
