"""The five writers against their formulas, formed as dense matrices in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.consolidation.writers import SMALLEST_SHARE, WRITERS, WriteSettings, compressed, write
from pliant.errors import ConfigError, EditError
from pliant.key_moments import KeyMoments
from pliant.models.edits import Delta

D_FFN, D_MODEL = 24, 10


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(delta: Delta) -> Tensor:
    assert delta.scale is None
    return (delta.left.double() @ delta.right.double().T).double()


def difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture
def moments(moments_of: Callable[[Tensor], KeyMoments]) -> KeyMoments:
    """Of keys with directions of very different size."""
    return moments_of(draw(200, D_FFN, seed=9) * torch.logspace(0, -3, D_FFN))


def expected_covariance(
    keys: Tensor, residuals: Tensor, contrast: Tensor | None, settings: WriteSettings, moment: Tensor, facts: int
) -> Tensor:
    keys, residuals, moment = keys.double(), residuals.double(), moment.double()
    ridged = moment + settings.ridge * moment.diagonal().mean() * torch.eye(D_FFN).double()
    n = len(keys) / facts
    total = keys.T @ keys + n * settings.neutral * ridged
    if contrast is not None:
        total += n / len(contrast) * settings.contrast * contrast.double().T @ contrast.double()
    return residuals.T @ keys @ torch.linalg.inv(total)


@pytest.mark.parametrize("count", [1, 5, 60])
@pytest.mark.parametrize("others", [None, 1, 40])
@pytest.mark.parametrize("facts", [1, 5])
def test_covariance_is_its_formula(count: int, others: int | None, facts: int, moments: KeyMoments):
    settings = WriteSettings(neutral=0.3, ridge=0.02, contrast=2.5)
    keys, residuals = draw(count, D_FFN, seed=1), draw(count, D_MODEL, seed=2)
    contrast = None if others is None else draw(others, D_FFN, seed=3)
    delta = write(settings, keys, residuals, contrast, moments, facts=facts)
    expected = expected_covariance(keys, residuals, contrast, settings, moments.moment, facts)
    assert difference(product(delta), expected) < 3 * SMALLEST_SHARE


def test_contrast_of_no_weight_is_as_none(moments: KeyMoments):
    keys, residuals, contrast = draw(3, D_FFN, seed=1), draw(3, D_MODEL, seed=2), draw(7, D_FFN, seed=3)
    settings = WriteSettings(contrast=0.0)
    expected = product(write(settings, keys, residuals, None, moments))
    assert torch.equal(product(write(settings, keys, residuals, contrast, moments)), expected)


@pytest.mark.parametrize("writer", ["covariance", "null_space"])
def test_the_heavier_the_contrast_the_stiller_its_keys(writer: Any, moments: KeyMoments):
    keys, residuals, contrast = draw(2, D_FFN, seed=1), draw(2, D_MODEL, seed=2), draw(3, D_FFN, seed=3)
    moved = []
    for weight in (0.0, 1.0, 100.0):
        settings = WriteSettings(writer=writer, contrast=weight, energy=0.5)
        moved.append(float((contrast.double() @ product(write(settings, keys, residuals, contrast, moments)).T).norm()))
    assert moved[0] > moved[1] > 5 * moved[2]


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_covariance_moves_neutral_text_less_than_ridge_does(strength: float, moments: KeyMoments):
    keys, residuals = draw(2, D_FFN, seed=1), draw(2, D_MODEL, seed=2)

    def energy(delta: Delta) -> float:
        return float((product(delta) @ moments.moment.double() @ product(delta).T).trace())

    kept = write(WriteSettings(neutral=strength), keys, residuals, None, moments)
    plain = write(WriteSettings(writer="ridge", ridge=1e-4), keys, residuals, None, moments)
    assert energy(kept) < 0.2 * energy(plain)


def test_null_space_leaves_the_kept_space_alone(moments_of: Callable[[Tensor], KeyMoments]):
    basis = torch.linalg.qr(draw(D_FFN, D_FFN, seed=4))[0]
    neutral = draw(300, 8, seed=5) @ basis[:, :8].T
    keys, residuals, contrast = draw(3, D_FFN, seed=1), draw(3, D_MODEL, seed=2), draw(2, D_FFN, seed=3)
    settings = WriteSettings(writer="null_space", neutral=0.05, energy=0.9999)
    for others in (None, contrast):
        change = product(write(settings, keys, residuals, others, moments_of(neutral)))
        assert (neutral.double() @ change.T).norm() < 1e-3 * neutral.norm() * change.norm()
        assert (keys.double() @ change.T).norm() > 0.1 * residuals.norm()


@pytest.mark.parametrize("facts", [1, 3])
def test_null_space_is_its_formula(facts: int, moments: KeyMoments):
    settings = WriteSettings(writer="null_space", neutral=0.2, contrast=1.5, energy=0.9)
    keys, residuals, contrast = draw(3, D_FFN, seed=1), draw(3, D_MODEL, seed=2), draw(4, D_FFN, seed=3)
    moment, n = moments.moment.double(), 3 / facts
    values, vectors = torch.linalg.eigh(moment)
    shares = values.cumsum(0) / values.sum()
    free = vectors[:, shares <= 0.1]
    assert 0 < free.shape[1] < D_FFN
    project = free @ free.T
    seen, others = keys.double() @ project, contrast.double() @ project
    total = seen.T @ seen + n * 0.2 * moment.diagonal().mean() * torch.eye(D_FFN) + n / 4 * 1.5 * others.T @ others
    expected = residuals.double().T @ seen @ torch.linalg.inv(total)
    assert difference(product(write(settings, keys, residuals, contrast, moments, facts=facts)), expected) < 3e-3


def test_normalised_is_exact_for_one_key(moments: KeyMoments):
    key, residual = draw(1, D_FFN, seed=1), draw(1, D_MODEL, seed=2)
    delta = write(WriteSettings(writer="normalised"), key, residual, None, moments)
    torch.testing.assert_close(key.double() @ product(delta).T, residual.double(), rtol=1e-4, atol=1e-4)
    assert delta.left.shape[1] == 1


def test_normalised_and_outer_are_their_formulas(moments: KeyMoments):
    keys, residuals = draw(4, D_FFN, seed=1), draw(4, D_MODEL, seed=2)
    norms = keys.double().square().sum(1)
    outer = residuals.double().T @ keys.double()
    normalised = residuals.double().T @ (keys.double() / norms[:, None])
    for facts in (1, 2):
        n = 4 / facts
        delta = write(WriteSettings(writer="normalised"), keys, residuals, None, moments, facts=facts)
        assert difference(product(delta), normalised / n) < 3e-3
        delta = write(WriteSettings(writer="outer"), keys, residuals, None, moments, facts=facts)
        assert difference(product(delta), outer / norms.mean() / n) < 3e-3


def test_a_key_of_zeros_is_not_written(moments: KeyMoments):
    keys, residuals = draw(2, D_FFN, seed=1), draw(2, D_MODEL, seed=2)
    with_zeros, more = torch.cat((keys, torch.zeros(1, D_FFN))), torch.cat((residuals, torch.ones(1, D_MODEL)))
    for writer in WRITERS:
        delta = write(WriteSettings(writer=writer, energy=0.5), with_zeros, more, None, moments, facts=3)
        assert delta.left.isfinite().all()
        assert delta.right.isfinite().all()
        assert delta.left.shape[1] == 2


@pytest.mark.parametrize("count", [1, 4, 40])
def test_ridge_is_regularised_least_squares(count: int, moments: KeyMoments):
    keys, residuals = draw(count, D_FFN, seed=1).double(), draw(count, D_MODEL, seed=2).double()
    settings = WriteSettings(writer="ridge", ridge=0.05)
    delta = write(settings, keys.float(), residuals.float(), None, moments)
    weight = count * 0.05 * keys.square().sum(1).mean()
    expected = residuals.T @ keys @ torch.linalg.inv(keys.T @ keys + weight * torch.eye(D_FFN))
    assert difference(product(delta), expected) < 3e-3
    exact = write(WriteSettings(writer="ridge", ridge=1e-9), keys[:4].float(), residuals[:4].float(), None, moments)
    assert difference(keys[:4] @ product(exact).T, residuals[:4]) < 3e-3


@pytest.mark.parametrize("writer", WRITERS)
def test_repeating_a_facts_keys_changes_nothing(writer: Any, moments: KeyMoments):
    settings = WriteSettings(writer=writer, energy=0.9)
    keys, residuals, contrast = draw(3, D_FFN, seed=1), draw(3, D_MODEL, seed=2), draw(4, D_FFN, seed=3)
    once = write(settings, keys, residuals, contrast, moments, facts=3)
    often = write(settings, keys.repeat(5, 1), residuals.repeat(5, 1), contrast.repeat(3, 1), moments, facts=3)
    assert difference(product(often), product(once)) < 3e-3
    single = [write(settings, keys[:1].repeat(n, 1), residuals[:1].repeat(n, 1), contrast, moments) for n in (1, 2, 7)]
    for other in single[1:]:
        assert difference(product(other), product(single[0])) < 1e-4
        assert other.left.shape[1] == 1


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_written_grows_with_the_residual(writer: Any, moments: KeyMoments):
    settings = WriteSettings(writer=writer, energy=0.9)
    keys, residuals = draw(3, D_FFN, seed=1), draw(3, D_MODEL, seed=2)
    once, thrice = (product(write(settings, keys, scale * residuals, None, moments)) for scale in (1.0, 3.0))
    assert difference(thrice, 3 * once) < 1e-4


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_compressed_holds_the_product_with_the_fewest_ranks(rank: int):
    left = draw(D_MODEL, rank, seed=1) @ draw(rank, 30, seed=2)
    right = draw(D_FFN, 30, seed=3)
    delta = compressed(left, right)
    assert delta.left.shape == (D_MODEL, rank)
    assert delta.right.shape == (D_FFN, rank)
    assert delta.left.dtype == delta.right.dtype == torch.float32
    assert difference(product(delta), left.double() @ right.double().T) < 1e-5


def test_compressed_drops_what_is_too_small_to_matter():
    left, right = torch.linalg.qr(draw(D_MODEL, 3, seed=1))[0], torch.linalg.qr(draw(D_FFN, 3, seed=2))[0]
    sizes = torch.tensor([1.0, 2 * SMALLEST_SHARE, 0.5 * SMALLEST_SHARE])
    delta = compressed(left * sizes, right)
    assert delta.left.shape[1] == 2
    assert difference(product(delta), (left * sizes).double() @ right.double().T) < SMALLEST_SHARE


def test_nothing_to_write_is_an_edit_of_nothing():
    delta = compressed(torch.zeros(D_MODEL, 2), draw(D_FFN, 2))
    assert delta.left.shape[1] == 1
    assert not product(delta).any()


@pytest.mark.parametrize("place", ["keys", "residuals", "contrast"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("writer", WRITERS)
def test_values_that_are_not_finite_are_refused(place: str, value: float, writer: Any, moments: KeyMoments):
    given = {"keys": draw(2, D_FFN), "residuals": draw(2, D_MODEL), "contrast": draw(2, D_FFN)}
    given[place][1, 3] = value
    with pytest.raises(EditError, match=rf"the {place}.* of an edit must be finite; they are not\. Load"):
        write(WriteSettings(writer=writer), given["keys"], given["residuals"], given["contrast"], moments)


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no neutral": ({"neutral": 0.0}, r"neutral must be above 0; got 0\.0\. Leave it out"),
    "negative neutral": ({"neutral": -0.1}, r"neutral must be above 0; got -0\.1"),
    "neutral nan": ({"neutral": float("nan")}, r"neutral must be above 0; got nan"),
    "no ridge": ({"ridge": 0.0}, r"ridge must be above 0; got 0\.0"),
    "contrast": ({"contrast": -1.0}, r"contrast must be at least 0; got -1\.0\. 0 writes without"),
    "contrast nan": ({"contrast": float("nan")}, r"contrast must be at least 0; got nan"),
    "all energy": ({"energy": 1.0}, r"energy must be between 0 and 1; got 1\.0\. The default is 0\.98"),
    "no energy": ({"energy": 0.0}, r"energy must be between 0 and 1; got 0"),
    "energy nan": ({"energy": float("nan")}, r"energy must be between 0 and 1; got nan"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_bad_setting_is_named(case: str):
    wrong, message = BAD_SETTINGS[case]
    with pytest.raises(ConfigError, match=message):
        WriteSettings(**wrong)
