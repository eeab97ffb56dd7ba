"""Held-out text through a sliding window."""

import math

import numpy as np
import pytest
import torch

import pliant
from pliant.evaluation.intervals import ratio_of_sums
from pliant.evaluation.records import Records
from pliant.evaluation.tasks.behaviour import layer_figures
from pliant.evaluation.tasks.perplexity import measure_windows, perplexity_figures, strided
from pliant.metrics import compare_to_base


@pytest.mark.parametrize(("length", "window", "stride"), [(40, 8, 8), (40, 8, 3), (41, 8, 8), (8, 8, 1), (30, 8, 5)])
def test_every_token_with_something_before_it_is_scored_once(length, window, stride):
    scored: list[int] = []
    for first, end, count in strided(length, window, stride):
        assert end - first <= window
        assert count < end - first or stride == window
        scored += range(end - count, end)
    firsts = set(range(0, length, window)) if stride == window else {0}
    assert scored == [i for i in range(length) if i not in firsts]


def test_windows_of_their_own_give_what_compare_to_base_gives(make_converted, calibration, tmp_path):
    model = make_converted("v1")
    expected = compare_to_base(model, calibration)
    records = measure_windows(model, calibration.flatten(), Records(tmp_path / "r.jsonl"), window=calibration.shape[1])
    found = perplexity_figures(records)
    for name in ("perplexity", "base_perplexity", "kl", "agreement", "ratio"):
        assert found[name]["value"] == pytest.approx(getattr(expected, name), rel=1e-5)
    assert found["tokens"] == calibration.numel() - len(calibration)
    assert found["ratio"]["low"] < found["ratio"]["value"] < found["ratio"]["high"]


def test_a_window_that_slides_scores_each_token_with_all_that_fits(make_base, tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    model = pliant.load(tmp_path / "base").eval()
    tokens = torch.randint(2, 97, (30,), generator=torch.Generator().manual_seed(0))
    records = measure_windows(model, tokens, Records(tmp_path / "r.jsonl"), window=8, stride=1, with_base=False)
    total = 0.0
    with torch.no_grad():
        for t in range(1, len(tokens)):
            seen = tokens[max(0, t - 7) : t] if t >= 8 else tokens[:t]
            total -= model(seen[None]).logits[0, -1].log_softmax(-1)[tokens[t]].item()
    assert sum(record["nll"] for record in records) == pytest.approx(total, rel=1e-5)
    assert set(perplexity_figures(records)) == {"tokens", "windows", "perplexity"}


def test_windows_that_were_read_are_not_read_again(make_converted, calibration, tmp_path):
    model, file = make_converted("v1"), tmp_path / "r.jsonl"
    whole = measure_windows(model, calibration.flatten(), Records(file), window=12)
    file.write_text("\n".join(file.read_text().splitlines()[:4]) + "\n")
    seen: list[int] = []
    model.model.register_forward_hook(lambda *_: seen.append(1))
    assert measure_windows(model, calibration.flatten(), Records(file), window=12) == whole
    assert len(seen) == 2 * (len(whole) - 4)


def test_a_ratio_of_sums_weighs_records_by_their_size():
    records = [{"id": "a", "nll": 2.0, "tokens": 1}, {"id": "b", "nll": 6.0, "tokens": 3}]
    found = ratio_of_sums(records, "nll", "tokens", transform=np.exp)
    assert found.value == pytest.approx(math.exp(2.0))
    assert found.low == pytest.approx(found.high)


def test_layers_tell_norms_beside_their_weights(make_converted, calibration):
    model = make_converted("keyed")
    figures = layer_figures(model, calibration[0])
    with torch.no_grad(), model.report() as report:
        model.model(calibration[:1])
    for index, layer in figures["modulation"].items():
        assert layer["norm"] == pytest.approx(report.norms()[int(index)].mean().item(), rel=1e-4)
        weight = model.model.layers[int(index)].mlp.down_proj.weight
        assert layer["weight_norm"] == pytest.approx(weight.norm().item(), rel=1e-4)
        assert layer["ratio"] == pytest.approx(layer["norm"] / layer["weight_norm"])
    assert figures["routing"] == {}
