"""Every routed layer against its slow reference: who runs, outputs, losses, and gradients of inputs and weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.architectures import ARCHITECTURES, DtfConfig
from pliant.architectures.dtf import reference as dtf
from pliant.architectures.mod import reference as mod
from pliant.architectures.routing.reference import Reference
from pliant.architectures.stt import reference as stt
from pliant.models import FAMILIES, PliantSpec
from pliant.models.graft import install

TOLERANCE = 5e-5
"""Largest difference over largest value: both take the same sums in another order."""
GRADIENT_TOLERANCE = 5e-4
"""The gradient of a single number is a sum whose terms cancel."""
LAYER, LENGTH = 1, 12
SEED = 7
"""Of inputs for which no choice hangs on a tie; by STT's ``ce`` the first tokens of all documents score alike."""

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *(
        ("mod", {"granularity": part, "gate": gate, "gate_share": share})
        for part in ("block", "attention", "mlp")
        for gate, share in (("sigmoid", 0.0), ("raw", 1.0))
    ),
    ("mod", {"sampler": "predictor", "gate_share": 0.5}),
    *(
        ("dtf", {"surprise": surprise, "criteria": criteria})
        for surprise in ("mse", "gaussian")
        for criteria in ("ce", "cu", "or")
    ),
    ("dtf", {"gate_share": 1.0}),
    ("dtf", {"forecast": True, "gate_share": 1.0}),
    ("dtf", {"forecast": True, "surprise": "gaussian"}),
    ("dtf", {"granularity": "attention"}),
    ("dtf", {"granularity": "attention", "forecast": True, "gate_share": 1.0}),
    *(("stt", {"criteria": criteria}) for criteria in ("ce", "cu", "or")),
    ("stt", {"granularity": "attention"}),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in OPTIONS]
every_option = pytest.mark.parametrize(("architecture", "options"), OPTIONS, ids=IDS)

DOCUMENTS = {
    "plain": [[0] * LENGTH, [0] * LENGTH],
    "packed": [[0] * 5 + [1] * 7, [0] * 2 + [1] * 9 + [2]],
    "padded": [[-1] * 3 + [0] * 9, [0] * LENGTH],
    "filled": [[0] * 7 + [-1] * 5, [-1] * 11 + [0]],
}
every_layout = pytest.mark.parametrize("layout", DOCUMENTS)


class Trial:
    """One routed layer, its inputs, and what the fast and the slow version make of them."""

    def __init__(self, model: Any, architecture: str, layout: str) -> None:
        self.layer, self.architecture = model.model.layers[LAYER], architecture
        self.documents = torch.tensor(DOCUMENTS[layout])
        self.has_documents = layout != "plain"
        generator = torch.Generator().manual_seed(SEED)
        self.h, self.entry = torch.randn((2, 2, LENGTH, model.config.hidden_size), generator=generator)
        positions = torch.tensor([[row[:t].count(row[t]) for t in range(LENGTH)] for row in DOCUMENTS[layout]])
        self.rope = model.model.rotary_emb(self.h, positions)

    def mask(self) -> Tensor:
        """What the family's attention may look at when every token runs."""
        order = torch.arange(LENGTH)
        allowed = (order[:, None] >= order) & (self.documents[:, :, None] == self.documents[:, None, :])
        attention = self.layer.self_attn
        window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        if window is not None:
            allowed = allowed & (order[:, None] - order < window)
        return allowed[:, None]

    def fast(self, h: Tensor, entry: Tensor) -> Reference:
        """The layer as it is."""
        options = {"entry": entry} if self.architecture == "dtf" else {}
        self.layer.recording = "norms"
        output = self.layer(
            h,
            token_documents=self.documents if self.has_documents else None,
            attention_mask=self.mask(),
            position_embeddings=self.rope,
            past_key_values=None,
            **options,
        )
        report = self.layer.layer_report
        return Reference(output=output, runs=report.routing.runs, penalty=report.regulariser)

    def slow(self, h: Tensor, entry: Tensor) -> Reference:
        """Its reference."""
        if self.architecture == "dtf":
            return dtf.reference_output(self.layer, h, entry, self.documents, self.rope)
        module = {"mod": mod, "stt": stt}[self.architecture]
        return module.reference_output(self.layer, h, self.documents, self.rope)

    def gradients(self, compute: Callable[[Tensor, Tensor], Reference]) -> tuple[Reference, dict[str, Tensor | None]]:
        """Returns what came out, and every gradient of a fixed weighted sum of outputs and losses."""
        self.layer.zero_grad()
        h, entry = (t.clone().requires_grad_(True) for t in (self.h, self.entry))
        found = compute(h, entry)
        counted = self.documents >= 0
        weights = torch.linspace(-1.0, 2.0, found.output.numel()).view_as(found.output)
        total = (found.output * weights)[counted].sum() + 100 * found.penalty[counted].sum()
        total.backward()
        parts = {"h": h, "entry": entry, **dict(self.layer.named_parameters())}
        return found, {name: None if part.grad is None else part.grad.clone() for name, part in parts.items()}


@pytest.fixture
def make_trial(make_base: Callable, randomise: Callable) -> Callable[..., Trial]:
    """A function that makes a routed layer with random added parameters."""

    def make(
        architecture: str, base: str = "llama", *, layout: str = "plain", capacity: float = 0.5, **options: Any
    ) -> Trial:
        config_class: Any = ARCHITECTURES[architecture].config
        layers = {LAYER: config_class(capacity_gamma=capacity, **options)}
        if architecture == "dtf":
            layers[LAYER - 1] = DtfConfig(role="decision")
        model = make_base(base)
        family = FAMILIES[model.config.model_type]
        install(model, family.causal_lm, PliantSpec(architecture=architecture, layers=layers))
        return Trial(randomise(model), architecture, layout)

    return make


def check(trial: Trial, largest_difference: Callable) -> None:
    found, gradients = trial.gradients(trial.fast)
    expected, expected_gradients = trial.gradients(trial.slow)
    counted = trial.documents >= 0
    assert expected.runs.equal(found.runs)
    assert expected.runs.any()
    assert not expected.runs[~counted].any()
    assert largest_difference(found.output[counted], expected.output[counted]) < TOLERANCE
    if expected.penalty.any():
        assert largest_difference(found.penalty[counted], expected.penalty[counted]) < TOLERANCE
    assert expected_gradients["self_attn.q_proj.weight"] is not None
    for name, gradient in gradients.items():
        wanted = expected_gradients[name]
        if wanted is None or not wanted.any():
            assert gradient is None or not gradient.any(), name
            continue
        assert gradient is not None, name
        assert largest_difference(gradient, wanted) < GRADIENT_TOLERANCE, name


@every_option
@every_layout
def test_training_equals_the_reference(
    architecture: str, options: dict[str, Any], layout: str, make_trial: Callable, largest_difference: Callable
) -> None:
    trial = make_trial(architecture, layout=layout, **options)
    trial.layer.train()
    check(trial, largest_difference)


@every_option
@every_layout
def test_threshold_routing_equals_the_reference(
    architecture: str, options: dict[str, Any], layout: str, make_trial: Callable, largest_difference: Callable
) -> None:
    trial = make_trial(architecture, layout=layout, **options)
    trial.layer.eval()
    trial.layer.calibrating = True
    trial.fast(trial.h, trial.entry)
    trial.layer.calibrating = False
    check(trial, largest_difference)


@pytest.mark.parametrize("base", ["mistral", "qwen2", "qwen3", "smollm3", "llama_mlp_bias"])
@pytest.mark.parametrize("architecture", ["mod", "dtf", "stt"])
def test_every_family_equals_the_reference(
    architecture: str, base: str, make_trial: Callable, largest_difference: Callable
) -> None:
    trial = make_trial(architecture, base, layout="packed")
    trial.layer.train()
    check(trial, largest_difference)


@pytest.mark.parametrize("capacity", [0.1, 0.75, 1.0])
@pytest.mark.parametrize(("architecture", "share"), [("mod", 1.0), ("dtf", 1.0), ("stt", 0.0)])
def test_every_capacity_equals_the_reference(
    architecture: str, share: float, capacity: float, make_trial: Callable, largest_difference: Callable
) -> None:
    trial = make_trial(architecture, capacity=capacity, gate_share=share)
    trial.layer.train()
    check(trial, largest_difference)
