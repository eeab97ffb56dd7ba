"""An architecture that is added to the table converts, saves and loads as those that come with pliant do."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.architectures import ARCHITECTURES, AddedModule, Architecture


@dataclass(frozen=True, kw_only=True)
class ScaledConfig:
    """The attention output is scaled per channel, by ``start`` at first."""

    start: float = 1.0

    def starts_at_layerwise_optimum(self) -> bool:
        return self.start == 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ScaledConfig":
        return cls(**fields)


class Scale(AddedModule):
    def __init__(self, d_model: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.scale = nn.Parameter(torch.empty(d_model))

    def reset_parameters(self, init: Any = nn.init) -> None:
        init.constant_(self.scale, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)


class ScaledLayer(nn.Module):
    def __init__(self, config: Any, layer_idx: int, layer_config: ScaledConfig) -> None:
        super().__init__(config, layer_idx)
        self.layer_config = layer_config
        self.plastic = Scale(config.hidden_size, layer_config.start)
        self.active, self.recording, self.layer_report = True, None, None

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not self.active:
            return super().forward(hidden_states, **kwargs)
        attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        residual = hidden_states + self.plastic(attention)
        return residual + self.mlp(self.post_attention_layernorm(residual))


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row in the table."""
    own = Architecture(name="scaled", summary="attention scaled", config=ScaledConfig, layer=ScaledLayer)
    monkeypatch.setitem(ARCHITECTURES, "scaled", own)


@pytest.mark.parametrize("delta", [False, True])
def test_it_converts_saves_and_loads(make_base: Callable[..., Any], prompt: Tensor, tmp_path: Path, delta: bool):
    make_base().save_pretrained(tmp_path / "base")
    model = pliant.load(tmp_path / "base").eval()
    with torch.no_grad():
        plain = model(prompt).logits
        pliant.convert(model, ScaledConfig(start=1.0), layers=[0])
        assert torch.equal(model(prompt).logits, plain)
        pliant.convert(model, ScaledConfig(start=0.5), layers=[2])
        found = model(prompt).logits
        assert not torch.equal(found, plain)
        with model.base_mode():
            assert torch.equal(model(prompt).logits, plain)
        model.save_pretrained(tmp_path / "own", delta=delta)
        assert torch.equal(pliant.load(tmp_path / "own").eval()(prompt).logits, found)
