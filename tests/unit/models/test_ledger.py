"""Edits, their hook and their ledger, on bare linear projections; and the file that holds them."""

import copy
import math
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pliant.errors import EditError
from pliant.models import EDITS_NAME, Delta, Edit, Ledger, SavedEdits, read_edits, write_edits
from pliant.models.ledger import balanced, stacked

OUT, IN = 6, 10
PATH = "layers.0.mlp.up_proj"


class Inner(nn.Module):
    """Two layers with an MLP of one projection each, and something that is none."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList()
        for _ in range(2):
            projection = nn.Linear(IN, OUT, dtype=dtype)
            with torch.no_grad():
                projection.weight.copy_(torch.randn(OUT, IN, generator=generator))
                projection.bias.copy_(torch.randn(OUT, generator=generator))
            layer = nn.Module()
            layer.mlp = nn.ModuleDict({"up_proj": projection, "act_fn": nn.SiLU()})
            self.layers.append(layer)

    def projection(self, index: int = 0) -> nn.Linear:
        return self.layers[index].mlp["up_proj"]


@pytest.fixture
def inner() -> Inner:
    return Inner()


@pytest.fixture
def ledger(inner: Inner) -> Ledger:
    return Ledger(inner)


def random_delta(seed: int = 0, rank: int = 2, *, scaled: bool = False, rows: int = OUT, columns: int = IN) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    return Delta(
        left=torch.randn(rows, rank, generator=generator),
        right=torch.randn(columns, rank, generator=generator),
        scale=torch.randn(rows, generator=generator) if scaled else None,
    )


def random_edit(seed: int = 0, *, paths: tuple[str, ...] = (PATH,), **options: Any) -> Edit:
    deltas = {path: random_delta(seed + i, **options) for i, path in enumerate(paths)}
    return Edit(context=f"fact {seed}", deltas=deltas, id=f"{seed:08x}")


def inputs(rows: int = 4) -> Tensor:
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(9))


def formed(delta: Delta, weight: Tensor) -> Tensor:
    change = delta.left @ delta.right.T
    return change if delta.scale is None else change + torch.diag(delta.scale) @ weight


@pytest.mark.parametrize("rank", [0, 1, 2, 5, 30])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_hook_adds_the_changed_weight(ledger: Ledger, inner: Inner, rank: int, scaled: bool) -> None:
    edit = ledger.add(random_edit(rank=rank, scaled=scaled))
    projection = inner.projection()
    weight = projection.weight + formed(edit.deltas[PATH], projection.weight)
    torch.testing.assert_close(projection(inputs()), nn.functional.linear(inputs(), weight, projection.bias))
    torch.testing.assert_close(ledger.merged(PATH), weight.detach())


def test_several_edits_add_up_and_scale_only_the_base(ledger: Ledger, inner: Inner) -> None:
    weight = inner.projection().weight.detach().clone()
    edits = [ledger.add(random_edit(seed, scaled=seed != 1)) for seed in range(4)]
    expected = weight + sum(formed(edit.deltas[PATH], weight) for edit in edits)
    bias = inner.projection().bias
    torch.testing.assert_close(inner.projection()(inputs()), nn.functional.linear(inputs(), expected, bias))
    torch.testing.assert_close(ledger.merged(PATH), expected)
    assert torch.equal(inner.projection().weight, weight)


def test_many_ranks_become_one_matrix(ledger: Ledger, inner: Inner) -> None:
    ledger.add(random_edit(0, rank=3))
    (hook,) = inner.projection()._forward_hooks.values()
    inner.projection()(inputs())
    assert len(next(iter(hook._copies.values()))) == 4
    ledger.add(random_edit(1, rank=3))
    inner.projection()(inputs())
    assert [tuple(t.shape) for t in next(iter(hook._copies.values()))[2:]] == [(OUT, IN)]


def test_a_ledger_without_edits_leaves_no_hook(ledger: Ledger, inner: Inner) -> None:
    before = inner.projection()(inputs())
    other = inner.projection().register_forward_hook(lambda *_: None)
    for seed in range(3):
        ledger.add(random_edit(seed))
    assert not torch.equal(inner.projection()(inputs()), before)
    for edit in ledger:
        ledger.revert(edit.id)
    assert list(inner.projection()._forward_hooks) == [other.id]
    assert torch.equal(inner.projection()(inputs()), before)
    assert len(ledger) == 0
    assert ledger.paths == ()


def test_reverting_is_never_having_added(ledger: Ledger, inner: Inner) -> None:
    for seed in range(5):
        ledger.add(random_edit(seed, scaled=True))
    for seed in (3, 0):
        ledger.revert(f"{seed:08x}")
    fresh = Inner()
    other = Ledger(fresh)
    for seed in (1, 2, 4):
        other.add(random_edit(seed, scaled=True))
    assert torch.equal(inner.projection()(inputs()), fresh.projection()(inputs()))
    assert torch.equal(ledger.merged(PATH), other.merged(PATH))


def test_ids_may_be_shortened(ledger: Ledger) -> None:
    for edit_id in ("abcd0000", "abce0000", "12345678"):
        ledger.add(Edit(context="x", deltas={PATH: random_delta()}, id=edit_id))
    assert ledger["1"].id == "12345678"
    assert ledger["abce"].id == "abce0000"
    assert [edit.id for edit in ledger] == ["abcd0000", "abce0000", "12345678"]
    assert "abcd0000" in ledger
    with pytest.raises(EditError, match="begins abcd0000, abce0000"):
        ledger["abc"]
    with pytest.raises(EditError, match=r"got 'abcd0001'\. Did you mean 'abcd0000'"):
        ledger.revert("abcd0001")
    with pytest.raises(EditError, match="got ''"):
        ledger[""]


def test_suspension_nests_and_holds_for_edits_that_are_added_within(ledger: Ledger, inner: Inner) -> None:
    before = inner.projection()(inputs())
    ledger.add(random_edit())
    changed = inner.projection()(inputs())
    with ledger.suspended():
        assert torch.equal(inner.projection()(inputs()), before)
        with ledger.suspended():
            ledger.add(random_edit(5, paths=("layers.1.mlp.up_proj",)))
        assert torch.equal(inner.projection()(inputs()), before)
        untouched = inner.projection(1)(inputs())
    assert torch.equal(inner.projection()(inputs()), changed)
    assert not torch.equal(inner.projection(1)(inputs()), untouched)
    with pytest.raises(ZeroDivisionError), ledger.suspended():
        raise ZeroDivisionError
    assert torch.equal(inner.projection()(inputs()), changed)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda ledger: pickle.loads(pickle.dumps(ledger))])
def test_a_copy_is_independent(ledger: Ledger, inner: Inner, duplicate: Callable) -> None:
    ledger.add(random_edit())
    changed = inner.projection()(inputs())
    other = duplicate(ledger)
    assert torch.equal(other.inner.projection()(inputs()), changed)
    other.revert(f"{0:08x}")
    assert not other.inner.projection()._forward_hooks
    assert torch.equal(inner.projection()(inputs()), changed)


def test_the_ledger_shares_no_memory_with_what_it_was_given(ledger: Ledger, inner: Inner) -> None:
    edit = Edit(context="x", deltas={PATH: random_delta()}, details={"positions": [1]})
    ledger.add(edit)
    changed = inner.projection()(inputs())
    edit.deltas[PATH].left.zero_()
    edit.details["positions"].append(2)
    inner.projection().to(torch.float64)(inputs().double())
    assert torch.equal(inner.projection().to(torch.float32)(inputs()), changed)
    assert ledger[edit.id].details == {"positions": [1]}


def test_factors_of_another_place_are_taken_over(ledger: Ledger) -> None:
    with torch.inference_mode():
        left, right = torch.randn(OUT, 1, dtype=torch.float64), torch.randn(IN, 1, dtype=torch.bfloat16)
    entry = ledger.add(Edit(context="x", deltas={PATH: Delta(left=left, right=right)}))
    assert entry.deltas[PATH].left.dtype == entry.deltas[PATH].right.dtype == torch.float32
    assert not entry.deltas[PATH].left.is_inference()


def test_copies_made_in_inference_mode_serve_training(ledger: Ledger, inner: Inner) -> None:
    ledger.add(random_edit(scaled=True))
    with torch.inference_mode():
        inner.projection()(inputs())
    x = inputs().requires_grad_(True)
    inner.projection()(x).sum().backward()
    torch.testing.assert_close(x.grad, ledger.merged(PATH).sum(0).expand_as(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_hold_lopsided_factors(dtype: torch.dtype) -> None:
    inner = Inner(dtype)
    ledger = Ledger(inner)
    delta = random_delta()
    ledger.add(Edit(context="x", deltas={PATH: Delta(left=delta.left * 1e5, right=delta.right * 1e-5)}))
    projection = inner.projection()
    weight = projection.weight.float() + delta.left @ delta.right.T
    expected = nn.functional.linear(inputs().to(dtype).float(), weight, projection.bias.float())
    actual = projection(inputs().to(dtype))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.1)


def test_balancing_keeps_the_product_exactly() -> None:
    delta = random_delta(rank=3)
    left, right = balanced(delta.left * torch.tensor([1e4, 1.0, 0.0]), delta.right)
    expected = (delta.left * torch.tensor([1e4, 1.0, 0.0]))[:, None, :] * delta.right[None]
    assert torch.equal(left[:, None, :] * right[None], expected)
    norms = left.norm(dim=0)[:2] / right.norm(dim=0)[:2]
    assert ((norms > 0.4) & (norms < 2.5)).all()


def test_norm_needs_no_matrix_and_layers_come_from_paths() -> None:
    paths = ("layers.11.mlp.down_proj", "layers.2.mlp.up_proj", "layers.2.mlp.gate_proj")
    edit = random_edit(paths=paths)
    expected = math.sqrt(sum(float((d.left @ d.right.T).norm() ** 2) for d in edit.deltas.values()))
    assert edit.norm == pytest.approx(expected, rel=1e-6)
    assert edit.layers == (2, 11)
    assert edit.rank == 2
    assert random_delta(rank=0, scaled=True).norm_squared == 0.0


def test_stacking_is_in_the_order_of_the_ledger() -> None:
    first, second = random_delta(0), random_delta(1, rank=1)
    left, right = stacked([first, second])
    assert torch.equal(left, torch.cat([first.left, second.left], 1))
    assert torch.equal(right, torch.cat([first.right, second.right], 1))


def with_value(value: float, name: str) -> Callable[[], Edit]:
    def make() -> Edit:
        tensors = {**random_delta(scaled=True).tensors()}
        tensors[name].view(-1)[3] = value
        return Edit(context="x", deltas={"layers.1.mlp.up_proj": random_delta(), PATH: Delta(**tensors)})

    return make


BAD_EDITS: dict[str, tuple[Callable[[], Edit], str]] = {
    "nan": (with_value(math.nan, "left"), r"up_proj: left must be finite; got 1 of 12 .*Lower the strength"),
    "inf": (with_value(math.inf, "right"), "right must be finite; got 1 of 20"),
    "scale": (with_value(-math.inf, "scale"), "scale must be finite; got 1 of 6"),
    "unknown path": (
        lambda: random_edit(paths=("layers.1.mlp.up_proj", "layers.0.mlp.up_prj")),
        r"path must name a linear projection .*got 'layers.0.mlp.up_prj'. Did you mean 'layers.0.mlp.up_proj'",
    ),
    "layer outside": (lambda: random_edit(paths=(PATH, "layers.7.mlp.up_proj")), "got 'layers.7.mlp.up_proj'"),
    "not linear": (
        lambda: random_edit(paths=(PATH, "layers.1.mlp.act_fn")),
        "linear projection.*got 'layers.1.mlp.act",
    ),
    "no path": (lambda: random_edit(paths=(PATH, "")), "got ''"),
    "rows": (lambda: random_edit(rows=OUT + 1), r"left must have 6 rows.*outputs; got 7.*for this model"),
    "columns": (lambda: random_edit(columns=IN - 1), r"right must have 10 rows.*inputs; got 9"),
    "same id": (lambda: random_edit(99), r"id must be new.*got '00000063'.*Revert"),
}


@pytest.mark.parametrize("case", BAD_EDITS)
def test_a_bad_edit_changes_nothing(ledger: Ledger, inner: Inner, case: str) -> None:
    make, message = BAD_EDITS[case]
    ledger.add(random_edit(99))
    before = [inner.projection(i)(inputs()) for i in range(2)]
    hooks = [list(inner.projection(i)._forward_hooks) for i in range(2)]
    with pytest.raises(EditError, match=message):
        ledger.add(make())
    assert [edit.id for edit in ledger] == ["00000063"]
    assert [list(inner.projection(i)._forward_hooks) for i in range(2)] == hooks
    assert all(torch.equal(inner.projection(i)(inputs()), before[i]) for i in range(2))


def test_what_sixteen_bits_cannot_hold_is_refused() -> None:
    inner = Inner(torch.float16)
    ledger = Ledger(inner)
    delta = random_delta()
    with pytest.raises(EditError, match=r"finite in the model's float16.*bfloat16"):
        ledger.add(Edit(context="x", deltas={PATH: Delta(left=delta.left * 1e7, right=delta.right * 1e7)}))
    assert not inner.projection()._forward_hooks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Delta(left=torch.ones(3), right=torch.ones(4, 1)), r"left must be a matrix.*shape \(3,\)"),
        (lambda: Delta(left=torch.ones(3, 2), right=torch.ones(4, 1)), "as many columns as left, 2; got 1"),
        (lambda: Delta(left=torch.ones(3, 1).int(), right=torch.ones(4, 1)), "real numbers.*int32"),
        (lambda: Delta(left=torch.ones(3, 1), right=torch.ones(4, 1), scale=torch.ones(4)), "each of the 3 rows"),
        (lambda: Edit(context="x", deltas={}), "at least one projection"),
        (lambda: Edit(context="x", deltas={PATH: random_delta()}, id="../x"), "eight hexadecimal"),
        (lambda: Edit(context="x", deltas={PATH: random_delta()}, kl=math.nan), "kl must be finite"),
        (lambda: Edit(context="x", deltas={PATH: random_delta()}, details={"a": {1}}), "details must hold JSON"),
        (lambda: Edit(context="x", deltas={PATH: random_delta()}, details={"a": math.inf}), "details must hold JSON"),
    ],
)
def test_what_is_no_edit_is_named(make: Callable, message: str) -> None:
    with pytest.raises(EditError, match=message):
        make()


def saved_edits(count: int = 3) -> SavedEdits:
    return SavedEdits(
        edits=tuple(random_edit(seed, scaled=seed == 1) for seed in range(count)),
        fingerprint=torch.arange(8.0).view(2, 4),
        base="some/base",
        base_dtype="torch.bfloat16",
    )


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    saved = saved_edits()
    write_edits(tmp_path, saved)
    for source in (tmp_path, tmp_path / EDITS_NAME):
        again = read_edits(source)
        assert (again.base, again.base_dtype) == (saved.base, saved.base_dtype)
        assert torch.equal(again.fingerprint, saved.fingerprint)
        for edit, expected in zip(again, saved, strict=True):
            fields = ("id", "context", "created", "kl", "details")
            assert [getattr(edit, name) for name in fields] == [getattr(expected, name) for name in fields]
            assert list(edit.deltas) == list(expected.deltas)
            for path, delta in edit.deltas.items():
                assert delta.tensors().keys() == expected.deltas[path].tensors().keys()
                assert all(torch.equal(v, expected.deltas[path].tensors()[k]) for k, v in delta.tensors().items())
    assert [file.name for file in tmp_path.iterdir()] == [EDITS_NAME]


def test_no_edits_leave_no_file(tmp_path: Path) -> None:
    write_edits(tmp_path, saved_edits())
    write_edits(tmp_path, saved_edits(0))
    write_edits(tmp_path, saved_edits(0))
    assert not list(tmp_path.iterdir())
    with pytest.raises(EditError, match="has no edits"):
        read_edits(tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_of: Callable) -> None:
    write_edits(tmp_path, saved_edits(1))
    before = files_of(tmp_path)

    def full_disk(_tensors: Any, file: str, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pliant.models.ledger_file.save_file", full_disk)
    with pytest.raises(EditError, match=r"No space left.*as they were.*Free some space"):
        write_edits(tmp_path, saved_edits(2))
    assert files_of(tmp_path) == before


def test_leftovers_of_the_dead_are_cleared_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    old, young = tmp_path / ".pliant_edits-old", tmp_path / ".pliant_edits-young"
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    write_edits(tmp_path, saved_edits())
    assert not old.exists()
    assert young.exists()


def rewrite(file: Path, tensors: Callable[[dict], Any] = dict, metadata: Callable[[dict], Any] = dict) -> None:
    with safe_open(file, framework="pt") as reader:
        old = reader.metadata()
    values = load_file(file)
    tensors(values)
    metadata(old)
    save_file(values, file, metadata=old)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:-9]), "must be a whole safetensors file.*Copy or save it again"),
    "empty": (lambda f: f.write_bytes(b""), "must be a whole safetensors file"),
    "text": (lambda f: f.write_text("edits"), "must be a whole safetensors file"),
    "format": (lambda f: rewrite(f, metadata=lambda m: m.update(edits_format="7")), "format 1; got format '7'"),
    "no fingerprint": (lambda f: rewrite(f, lambda t: t.pop("base_fingerprint")), "pliant ledger"),
    "no factor": (lambda f: rewrite(f, lambda t: t.pop(f"00000002.{PATH}.left")), "an entry is damaged.*00000002"),
    "surplus": (lambda f: rewrite(f, lambda t: t.update(other=torch.ones(1))), "tensors of its edits only; other"),
    "no list": (lambda f: rewrite(f, metadata=lambda m: m.update(edits="{")), "an entry is damaged"),
    "rank": (
        lambda f: rewrite(f, lambda t: t.update({f"00000002.{PATH}.left": torch.ones(OUT, 1)})),
        "an entry is damaged.*as many columns",
    ),
    "half": (
        lambda f: rewrite(f, lambda t: t.update({f"00000002.{PATH}.left": torch.ones(OUT, 2).half()})),
        "must be in float32",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    write_edits(tmp_path, saved_edits())
    harm, message = DAMAGES[damage]
    harm(tmp_path / EDITS_NAME)
    with pytest.raises(EditError, match=message):
        read_edits(tmp_path)
