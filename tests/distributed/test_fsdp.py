"""FSDP2 on two gloo processes: sharded for real, the numbers of DDP, and checkpoints that load in one process."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from worker import TOKENS, configuration
from workplace import BROKEN, CASES, Workplace

import pliant
from pliant.errors import CheckpointError, ConfigError
from pliant.training import train
from pliant.training.plan import make_plan

RESUMED: dict[str, dict[str, Any]] = {"delta": {}, "full": {"objective": "causal_lm", "trainable": "all"}}
STATES = {"delta": "SHARDED_STATE_DICT", "full": "FULL_STATE_DICT"}


@pytest.fixture(scope="module")
def by_fsdp(workplace: Workplace, pairs: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """All cases sharded; runs that break off and are resumed; and one that would go on from DDP's checkpoint."""
    runs = [workplace.run(f"fsdp-{name}", **options) for name, options in CASES.items()]
    for name, options in RESUMED.items():
        state = {"state_dict": STATES[name]}
        runs += [
            workplace.run(f"whole-{name}", worker=state, **BROKEN, **options),
            workplace.run(f"broken-{name}", worker={**state, "break_at": 6}, **BROKEN, **options),
            workplace.run(f"resumed-{name}", out=f"broken-{name}", resume=True, worker=state, **BROKEN, **options),
        ]
    runs.append(workplace.run("from-ddp", out="keyed-2", resume=True, max_steps=9))
    return workplace.launch(runs, fsdp=True)


NOT_ON_SHARDS = ("modulation_norm/", "routing_capacity/")
"""What is measured in evaluations of a whole model alone."""


@pytest.mark.parametrize("name", CASES)
def test_decoder_layers_are_sharded(by_fsdp: dict[str, Any], name: str) -> None:
    for found in by_fsdp[f"fsdp-{name}"]:
        sharded = {re.search(r"layers\.\d+\.", n)[0] for n in found["shards"] if "layers." in n}
        assert sharded == {"layers.0.", "layers.1.", "layers.2."}
        for parameter, (local, total) in found["shards"].items():
            assert local < total or total == 1, parameter
        assert any(added in parameter for parameter in found["shards"] for added in ("plastic", "router"))


@pytest.mark.parametrize("name", CASES)
def test_sharding_changes_no_number(
    workplace: Workplace, pairs: dict[str, Any], by_fsdp: dict[str, Any], name: str
) -> None:
    expected, found = (workplace.metrics(run) for run in (f"{name}-2", f"fsdp-{name}"))
    is_bf16 = "bf16" in name  # then weights, or sums of gradients, are rounded at other places
    for line, reference in zip(found, expected, strict=True):
        norms = {key for key in reference if key.startswith(NOT_ON_SHARDS)}
        reference = {key: value for key, value in reference.items() if key not in norms}
        assert line.keys() == reference.keys()
        if is_bf16:
            first = line["step"] == 0
            key = "eval_loss" if "eval_loss" in line else "loss"
            assert line[key] == pytest.approx(reference[key], rel=1e-3 if first else 5e-2)
        else:
            assert line == pytest.approx(reference, rel=1e-5, abs=1e-6)
    if not is_bf16:
        values = workplace.parameters(f"fsdp-{name}")
        for key, value in workplace.parameters(f"{name}-2").items():
            torch.testing.assert_close(values[key], value, rtol=1e-3, atol=2e-4)  # Adam: see test_ddp
    assert by_fsdp[f"fsdp-{name}"][0]["steps"] == pairs[f"{name}-2"][0]["steps"]


@pytest.mark.parametrize("name", ["keyed", "all", "two_stages", "teacher", "bf16_all"])
@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_a_checkpoint_loads_in_one_process(
    workplace: Workplace, by_fsdp: dict[str, Any], name: str, checkpoint: str
) -> None:
    folder = workplace.root / "runs" / f"fsdp-{name}"
    last = Path(by_fsdp[f"fsdp-{name}"][0]["checkpoint"])
    evaluated = last.name if checkpoint == "last" else "checkpoint-best"  # the last step's was the only evaluation
    model = pliant.load(folder / evaluated).eval()
    kind = "model.safetensors" if name in ("all", "teacher", "bf16_all") else "pliant_delta.safetensors"
    assert (folder / evaluated / kind).exists()
    for key, value in workplace.parameters(f"fsdp-{name}").items():
        assert torch.equal(model.get_parameter(key), value), key
    if name == "bf16_all":  # the sharded one computes in bf16, and is saved in fp32
        assert model.dtype == torch.float32
        return
    with torch.no_grad():
        logits = model(TOKENS, use_cache=False).logits
    gathered = torch.tensor(by_fsdp[f"fsdp-{name}"][0]["logits"])
    torch.testing.assert_close(logits, gathered, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_a_broken_run_resumes(workplace: Workplace, by_fsdp: dict[str, Any], name: str) -> None:
    assert by_fsdp[f"broken-{name}"] == [{"error": "Killed: "}] * 2
    assert [found["steps"] for found in by_fsdp[f"resumed-{name}"]] == [8, 8]
    records = zip(workplace.metrics(f"broken-{name}"), workplace.metrics(f"whole-{name}"), strict=True)
    for found, expected in records:  # bit for bit, but for a rounding: see test_ddp
        assert found == pytest.approx(expected, rel=1e-6)
    whole = workplace.parameters(f"whole-{name}")
    for key, value in workplace.parameters(f"resumed-{name}").items():
        torch.testing.assert_close(value, whole[key], rtol=1e-5, atol=1e-6)


def test_a_run_goes_on_as_it_began(workplace: Workplace, by_fsdp: dict[str, Any]) -> None:
    for found in by_fsdp["from-ddp"]:
        assert "CheckpointError" in found["error"]
        assert "was saved without FSDP" in found["error"]
    run = workplace.run("from-fsdp", out="fsdp-keyed", resume=True, max_steps=9)
    with pytest.raises(CheckpointError, match=r"was saved with FSDP.*model\.checkpoint_path"):
        train(configuration(run))


@pytest.mark.parametrize(
    ("name", "value"),
    [("FSDP_VERSION", "1"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true"), ("FSDP_ACTIVATION_CHECKPOINTING", "true")],
)
def test_settings_that_would_not_train_are_refused(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    for known, usual in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", name: value}.items():
        monkeypatch.setenv(known, usual)
    with pytest.raises(ConfigError, match=f"{name.lower()} must be .*; got {value}"):
        make_plan(configuration(json.loads(json.dumps(workplace.run("refused")))))
