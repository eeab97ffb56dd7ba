"""Claim: a run killed at any moment resumes to the same bits, and never leaves half a checkpoint.

Trains a tiny model from fresh weights in a process of its own, kills that with SIGKILL at seeded random moments (while
it starts, in steps, while it saves) and resumes it, until 20 kills are done and the run is too. After each kill
every checkpoint there is must load. At the end the log, clocks aside, and the files of both last checkpoints
must equal those of an unbroken run. Usage: python benchmarks/resume.py
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import environment, save
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, PreTrainedTokenizerFast

import pliant
from pliant.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from pliant.training import train
from pliant.training.checkpoints import STAGING

KILLS = 20
STEPS = 40
WORDS = 500
CLOCKS = ("time", "tokens_per_second", "eval_seconds", "total_flos")


def prepare(work: Path) -> None:
    """Writes the shape and tokenizer of a tiny base, and a text to train on."""
    LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(work / "base")
    backend = Tokenizer(WordLevel({f"w{index}": index for index in range(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w1").save_pretrained(work / "base")
    generator = random.Random(0)
    texts = (" ".join(f"w{(i + j * j) % 200 + generator.randrange(3)}" for j in range(90)) for i in range(500))
    (work / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))


def configuration(work: Path, name: str) -> RunConfig:
    """A v2 model from fresh weights, saved every second step and evaluated every fifth."""
    return RunConfig(
        model=ModelConfig(base_model_name=str(work / "base"), init="scratch", preset="v2", adapter_rank=8),
        data=DataConfig(dataset_name=str(work / "texts.jsonl"), max_length=64, max_validation_windows=16),
        training=TrainingConfig(
            output_dir=str(work / name),
            objective="causal_lm",
            trainable="all",
            use_regularization=True,
            max_steps=STEPS,
            batch_size=8,
            gradient_accumulation_steps=2,
            lr=3e-3,
            warmup_steps=5,
            log_steps=1,
            eval_steps=5,
            save_steps=2,
            save_total_limit=2,
            resume=(work / name).exists(),
        ),
    )


def start(work: Path, name: str) -> subprocess.Popen[bytes]:
    """Starts or resumes a run in a process of its own."""
    command = [sys.executable, __file__, "--work", str(work), "--child", name]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(work / f"{name}.err").open("ab"))


def wait_to_kill(process: subprocess.Popen[bytes], folder: Path, kind: str, chance: random.Random) -> bool:
    """Waits for a random moment of ``kind``; returns whether the process still runs."""
    if kind == "starting":
        time.sleep(chance.uniform(0.5, 5.0))
        return process.poll() is None
    log, staging = folder / "metrics.jsonl", folder / STAGING

    def stands_still(seen: int) -> bool:
        time.sleep(0.0005)
        return process.poll() is None and (log.stat().st_mtime_ns if log.exists() else 0) == seen

    for _ in range(1 + chance.randint(1, 4 if kind == "stepping" else 2)):  # first the log is taken up, then lines come
        seen = log.stat().st_mtime_ns if log.exists() else 0
        while stands_still(seen):
            pass
    while kind == "saving" and process.poll() is None and not staging.exists():
        pass  # a save takes some milliseconds
    time.sleep(chance.uniform(0.0, 0.02 if kind == "saving" else 0.2))
    return process.poll() is None


def check_checkpoints(folder: Path) -> int:
    """Loads every checkpoint, optimizer included, and returns how many there are."""
    found = sorted(folder.glob("checkpoint-*"))
    for checkpoint in found:
        pliant.load(checkpoint)
        if checkpoint.name != "checkpoint-best":
            json.loads((checkpoint / "trainer_state.json").read_text())
            for name in ("optimizer.pt", "scheduler.pt"):
                torch.load(checkpoint / name, weights_only=True)
            assert (checkpoint / "rng_state.pth").exists()
    return len(found)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock decides, and without its summary."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in CLOCKS} for r in records if "train_runtime" not in r]


def same_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same bits."""
    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        train(configuration(arguments.work, arguments.child))
        return
    with tempfile.TemporaryDirectory() as scratch:
        measure(arguments.work or Path(scratch), arguments.seed)


def measure(work: Path, seed: int) -> None:
    prepare(work)
    started = time.monotonic()
    assert start(work, "whole").wait() == 0, (work / "whole.err").read_text()[-2000:]
    whole_seconds = time.monotonic() - started
    chance, folder = random.Random(seed), work / "broken"
    kinds = ["starting"] * 2 + ["saving"] * 9 + ["stepping"] * (KILLS - 11)
    chance.shuffle(kinds)
    kills = []
    for kind in kinds:
        process = start(work, "broken")
        if not wait_to_kill(process, folder, kind, chance):
            assert process.returncode == 0, (work / "broken.err").read_text()[-2000:]
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-[0-9]*")]
        kill = {
            "kind": kind,
            "in_the_middle_of_a_save": (folder / STAGING).exists(),
            "last_checkpoint": max(steps, default=None),
            "checkpoints_that_load": check_checkpoints(folder),
        }
        print(kill, flush=True)
        kills.append(kill)
    assert start(work, "broken").wait() == 0, (work / "broken.err").read_text()[-2000:]
    whole = work / "whole"
    names = (f"checkpoint-{STEPS}", f"checkpoint-{STEPS - 2}", "checkpoint-best")
    result = {
        "environment": environment(),
        "steps": STEPS,
        "kills": len(kills),
        "kills_in_the_middle_of_a_save": sum(kill["in_the_middle_of_a_save"] for kill in kills),
        "checkpoints_loaded_after_kills": sum(kill["checkpoints_that_load"] for kill in kills),
        "partial_checkpoints": 0,  # check_checkpoints would have raised
        "log_lines": len(log_of(whole)),
        "log_equal": log_of(folder) == log_of(whole),
        "weights_bitwise_equal": {name: same_weights(folder / name, whole / name) for name in names},
        "files_equal": sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.iterdir()),
        "seconds_unbroken": round(whole_seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
        "seed": seed,
        "each_kill": kills,
    }
    print(json.dumps({k: v for k, v in result.items() if k not in ("environment", "each_kill")}, indent=1))
    assert result["log_equal"], "the log differs"
    assert all(result["weights_bitwise_equal"].values()), "weights differ"
    assert len(kills) == KILLS, "the run ended before all kills"
    save("resume", result)


if __name__ == "__main__":
    main()
