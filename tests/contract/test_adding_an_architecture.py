"""docs/adding-an-architecture.md: both examples, as the page shows them, make layers that convert, run and save."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import pliant
from pliant.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "adding-an-architecture.md"
PLASTIC, ROUTED = PAGE.read_text(encoding="utf-8").split("## A routed layer")


@pytest.fixture
def run():
    """A function that runs the Python of a part of the page; its rows leave the table afterwards."""
    rows = dict(pliant.ARCHITECTURES)

    def execute(text: str) -> dict[str, Any]:
        shown = "\n\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
        names: dict[str, Any] = {"__name__": "page"}
        exec(compile(shown, str(PAGE), "exec"), names)
        return names

    yield execute
    pliant.ARCHITECTURES.clear()
    pliant.ARCHITECTURES.update(rows)


def test_the_plastic_example_starts_as_its_base_and_does_what_it_says(run, make_base, prompt, tmp_path):
    config_class = run(PLASTIC)["ScaledConfig"]
    with torch.no_grad():
        base_logits = make_base()(prompt).logits
        assert torch.equal(pliant.convert(make_base(), config_class())(prompt).logits, base_logits)
        model = pliant.convert(make_base(), config_class(start=0.5), layers="0-1")
        logits = model(prompt).logits
        assert not torch.allclose(logits, base_logits)
        with model.base_mode():
            assert torch.equal(model(prompt).logits, base_logits)
        model.save_pretrained(tmp_path / "scaled")
        assert torch.equal(pliant.load(tmp_path / "scaled").eval()(prompt).logits, logits)
    with model.report() as report:
        model(prompt)
        report.regulariser().backward()
    assert model.dynamic_layers[0].plastic.scale.grad.abs().sum() > 0
    with pytest.raises(ConfigError, match="start must be above 0; got 0"):
        config_class(start=0)


def test_the_routed_example_lets_its_share_of_the_tokens_in(run, make_base, calibration, monkeypatch, tmp_path):
    monkeypatch.setattr(pliant, "load", lambda name: make_base(num_hidden_layers=4))
    for name in ("convert", "calibrate"):
        monkeypatch.setattr(pliant, name, partial(getattr(pliant, name), calibration=calibration))
    model = run(ROUTED)["model"]
    assert list(model.routed_layers) == [1, 3]
    with torch.no_grad(), model.report() as report:
        logits = model(calibration).logits
    shares = [report.layers[index].routing.runs.float().mean().item() for index in model.routed_layers]
    assert shares == pytest.approx([0.25, 0.25], abs=0.1)
    model.save_pretrained(tmp_path / "random")
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(pliant.load(tmp_path / "random").eval()(calibration).logits, logits)
