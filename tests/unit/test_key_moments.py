"""Second moments of MLP keys: what they are, and what the cache on disk does with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import pliant
from pliant import key_moments as module
from pliant.errors import ConfigError, ConversionError, DataError
from pliant.key_moments import KeyMoments, cached_key_moments, key_moments
from pliant.models.checkpoint import digest, fingerprint

TEXT = " ".join(str(2 + 7 * i % 95) for i in range(400))
LENGTH = 64
"""Window of the tiny bases in the cache, as long as they read."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, with a state on disk after every second window."""
    monkeypatch.setenv("PLIANT_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "CHUNK_TOKENS", 2 * LENGTH)
    return tmp_path


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def keys_of(model: Any, tokens: Tensor, layer: int) -> Tensor:
    """The inputs of ``down_proj``, window by window."""
    rows: list[Tensor] = []
    projection = model.model.layers[layer].mlp.down_proj
    hook = projection.register_forward_pre_hook(lambda _, args: rows.append(args[0][0].detach()))
    for window in tokens:
        model.model(window.unsqueeze(0))
    hook.remove()
    return torch.cat(rows)


def test_the_moment_is_that_of_the_inputs_of_down_proj(
    make_base: Callable[..., Any], family: str, calibration: Tensor, largest_difference: Callable[..., float]
):
    model = make_base(family)
    moments = key_moments(model, calibration, [0, 2])
    assert list(moments) == [0, 2]
    for layer, moment in moments.items():
        keys = keys_of(model, calibration, layer)
        assert moment.tokens == len(keys) == calibration.numel()
        assert largest_difference(moment.moment, keys.T @ keys / len(keys)) < 1e-5


def test_batches_make_no_difference(
    make_base: Callable[..., Any],
    calibration: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    largest_difference: Callable[..., float],
):
    together = key_moments(make_base(), calibration, 1)[1].moment
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    assert largest_difference(key_moments(make_base(), calibration, 1)[1].moment, together) < 1e-5


def test_a_converted_model_gives_the_moments_of_its_base(
    make_base: Callable[..., Any], make_converted: Callable[..., Any], form: str, calibration: Tensor
):
    expected = key_moments(make_base(), calibration, "all")
    model = make_converted(form).train()
    for layer, moment in key_moments(model, calibration, "all").items():
        torch.testing.assert_close(moment.moment, expected[layer].moment)
    assert model.training
    assert all(not layer.mlp.down_proj._forward_pre_hooks for layer in model.model.layers)


def test_bfloat16_gives_the_same_up_to_its_rounding(
    make_base: Callable[..., Any], calibration: Tensor, largest_difference: Callable[..., float]
):
    expected = key_moments(make_base(), calibration, "all")
    for layer, moment in key_moments(make_base().bfloat16(), calibration, "all").items():
        assert moment.moment.dtype == torch.float32
        assert largest_difference(moment.moment, expected[layer].moment) < 0.03


def test_solve_is_the_ridge_regression_and_keeps_its_factor(make_base: Callable[..., Any], calibration: Tensor):
    moments = key_moments(make_base(), calibration, 1)[1]
    moment, matrix = moments.moment, torch.randn(len(moments.moment), 3)
    for ridge in (0.1, 1.0):
        full = moment + ridge * moment.diagonal().mean() * torch.eye(len(moment))
        torch.testing.assert_close(full @ moments.solve(matrix, ridge), matrix, atol=1e-3, rtol=1e-3)
    assert set(moments._factors) == {0.1, 1.0}
    factor = moments._factors[0.1]
    moments.solve(matrix, 0.1)
    assert moments._factors[0.1] is factor
    assert moments.to("cpu").moment.equal(moment)


@pytest.mark.parametrize(
    ("ridge", "message"), [(-1.0, "finite number"), (float("nan"), "finite number"), (0.0, "positive definite")]
)
def test_a_ridge_that_cannot_be_is_refused(ridge: float, message: str):
    singular = KeyMoments(moment=torch.ones(4, 4), tokens=1)
    with pytest.raises(ConfigError, match=message):
        singular.solve(torch.ones(4, 1), ridge)


def test_the_cache_returns_what_was_computed(
    make_base: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, cache: Path
):
    model, seen = make_base(), []
    options: dict[str, Any] = {"num_tokens": 300, "text": TEXT, "progress": lambda *step: seen.append(step)}
    first = cached_key_moments(model, tokenizer, [0, 2], **options)
    assert seen[-1] == ("Reading key statistics", 5, 5)
    assert [file.name for file in files(cache)] == ["layer-00.safetensors", "layer-02.safetensors"]
    seen.clear()
    again = cached_key_moments(model, tokenizer, [0, 2], **options)
    assert not seen
    for layer in (0, 2):
        assert again[layer].moment.equal(first[layer].moment)
        assert again[layer].tokens == 5 * LENGTH
    tokens = pliant.data.calibration_tokens(tokenizer, TEXT, num_tokens=300, window=LENGTH)
    torch.testing.assert_close(first[2].moment, key_moments(model, tokens, 2)[2].moment)


def test_text_may_be_a_file_or_several_texts(
    make_base: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, cache: Path, tmp_path: Path
):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    for text in (path, [TEXT], TEXT):
        cached_key_moments(make_base(), tokenizer, 1, num_tokens=128, text=text)
    assert len(files(cache)) == 2  # the text itself and one layer


def test_only_missing_layers_are_computed(
    make_base: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make_base()
    cached_key_moments(model, tokenizer, 0, num_tokens=300, text=TEXT)
    computed: list[list[int]] = []
    original = module._grams
    monkeypatch.setattr(module, "_grams", lambda m, s, layers: computed.append(list(layers)) or original(m, s, layers))
    cached_key_moments(model, tokenizer, "all", num_tokens=300, text=TEXT)
    assert computed == [[1, 2]] * 3
    assert len(files(cache)) == 3


def test_another_base_text_or_number_of_tokens_is_computed_anew(
    make_base: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, cache: Path
):
    for seed, text, num_tokens in ((0, TEXT, 300), (1, TEXT, 300), (0, TEXT[1:], 300), (0, TEXT, 100)):
        cached_key_moments(make_base(seed=seed), tokenizer, 0, num_tokens=num_tokens, text=text)
    assert len(files(cache)) == 4
    cached_key_moments(make_base().bfloat16(), tokenizer, 0, num_tokens=300, text=TEXT)
    assert len(files(cache)) == 4


def packed(model: Any, seed: int, dtype: torch.dtype) -> Any:
    """A weight of whole numbers, as quantised ones are."""
    values = torch.randint(0, 100, (32, 48), generator=torch.Generator().manual_seed(seed), dtype=dtype)
    model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(values, requires_grad=False)
    return model


def test_packed_and_offloaded_weights_are_told_apart(make_base: Callable[..., Any], calibration: Tensor):
    def folder(model: Any) -> str:
        return module._folder(model, calibration).parent.name

    plain = folder(make_base())
    assert plain == digest(fingerprint(make_base()))
    kinds = [(0, torch.uint8), (1, torch.uint8), (0, torch.int8)]
    found = [folder(packed(make_base(), seed, dtype)) for seed, dtype in kinds]
    assert found == [folder(packed(make_base(), seed, dtype)) for seed, dtype in kinds]
    offloaded = [folder(cpu_offload(make_base(seed=seed), torch.device("cpu"))) for seed in (0, 5, 0)]
    assert offloaded[0] == offloaded[2]
    assert len({plain, *found, *offloaded}) == 6


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_an_interrupted_run_goes_on_where_it_stopped(
    make_base: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, cache: Path, after: int
):
    model = make_base()
    whole = cached_key_moments(model, tokenizer, [0, 1], num_tokens=300, text=TEXT)
    for file in files(cache):
        file.unlink()
    module_batches: list[int] = []

    def stop(_label: str, done: int, _total: int) -> None:
        module_batches.append(done)
        if len(module_batches) == after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH_TOKENS", LENGTH)
        with pytest.raises(KeyboardInterrupt):
            cached_key_moments(model, tokenizer, [1], num_tokens=300, text=TEXT, progress=stop)
        later: list[int] = []
        resumed = cached_key_moments(
            model, tokenizer, [1], num_tokens=300, text=TEXT, progress=lambda _, done, total: later.append(done)
        )
    assert later[0] == (after - 1) // 2 * 2 + 1
    torch.testing.assert_close(resumed[1].moment, whole[1].moment)
    both = cached_key_moments(model, tokenizer, [0, 1], num_tokens=300, text=TEXT)
    torch.testing.assert_close(both[0].moment, whole[0].moment)


@pytest.mark.parametrize("damage", ["torn", "other", "infinite", "offset"])
def test_a_damaged_file_is_computed_again(
    make_base: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    cache: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
):
    model = make_base()
    whole = cached_key_moments(model, tokenizer, 0, num_tokens=300, text=TEXT)[0].moment
    (file,) = files(cache)
    total = load_file(file)["sum"]
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "other":
        save_file({"sum": total[:4]}, file, {"format": "1", "windows": "5"})
    elif damage == "infinite":
        save_file({"sum": total / 0}, file, {"format": "1", "windows": "5"})
    else:
        save_file({"sum": total}, file, {"format": "1", "windows": "3"})
    assert cached_key_moments(model, tokenizer, 0, num_tokens=300, text=TEXT)[0].moment.equal(whole)
    assert "computing them again" in caplog.text
    caplog.clear()
    cached_key_moments(model, tokenizer, 0, num_tokens=300, text=TEXT)
    assert not caplog.text


def test_what_is_not_finite_is_refused_and_not_kept(
    make_base: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, cache: Path, calibration: Tensor
):
    model = make_base()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(DataError, match="keys of layer 1 must be finite"):
        key_moments(model, calibration, [0, 1])
    with pytest.raises(DataError, match="keys of layer 1 must be finite"):
        cached_key_moments(model, tokenizer, 1, num_tokens=300, text=TEXT)
    assert not files(cache)


def test_bad_arguments(make_base: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, calibration: Tensor):
    model = make_base()
    for num_tokens in (0, 150_001):
        with pytest.raises(ConfigError, match=r"num_tokens must be in 1\.\.150000"):
            cached_key_moments(model, tokenizer, 0, num_tokens=num_tokens, text=TEXT)
    with pytest.raises(ConversionError, match=r"layers must be in 0\.\.2"):
        key_moments(model, calibration, [3])
    with pytest.raises(DataError, match="at least one token"):
        key_moments(model, calibration[:0], [1])
    with pytest.raises(DataError, match="the texts hold"):
        cached_key_moments(model, tokenizer, 0, num_tokens=1_000, text=TEXT)
