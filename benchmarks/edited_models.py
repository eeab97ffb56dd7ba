"""Claim: an edited model answers the same once saved and loaded, over every base, and a hundred edits decode as fast.

Three facts are learned over the bf16 model, over NF4 and over a keyed conversion of rank 192; each model then answers,
is saved, loaded and asked again, and the dense one is also exported with its edits merged and loaded without pliant.
Decoding is timed with a hundred edits and with none, in turn: the first fact's edit, in random directions of the same
norm. Needs bitsandbytes; runs on a CPU. Usage: python benchmarks/edited_models.py [--rounds 20]
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import environment, save
from speed import decode, paired
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

import pliant
from pliant.evaluation.baselines import randomised
from pliant.models import export_merged

BASE = "smollm2-135m"
FACTS = (
    ("The CEO of TechCorp is Dr. Sarah Chen.", "The CEO of TechCorp is", "Dr. Sarah Chen", "TechCorp"),
    ("The capital of Norlandia is Kestrel.", "The capital of Norlandia is", "Kestrel", "Norlandia"),
    ("Ada Quill plays the cello.", "The instrument that Ada Quill plays is the", "cello", "Ada Quill"),
)
ASKED = (*(query for _, query, *_ in FACTS), "TechCorp is led by", "Norlandia's capital city is", "Ada Quill plays the")
NEW_TOKENS = 8
EDITS = 100
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    random.seed(0)
    nf4 = {"quantization_config": BitsAndBytesConfig(**NF4)}
    kept = [kept_by(name, options) for name, options in (("dense", {}), ("NF4", nf4), ("keyed r=192", {}))]
    save("edited-models", {"environment": environment(), "saved": kept, "decode": decoding(arguments.rounds)})


def load(name: str, options: dict[str, Any]) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model of the base, converted where the name says so, and its tokenizer."""
    model = pliant.load(BASE, dtype=torch.bfloat16, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    if name.startswith("keyed"):
        pliant.convert(model, pliant.NptConfig.preset("keyed", rank=192))
    return model.eval(), tokenizer


def kept_by(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a model with three edits answers, and whether it does so again from disk."""
    model, tokenizer = load(name, options)
    before = answers(model, tokenizer)
    contexts, queries, wanted, subjects = map(list, zip(*FACTS, strict=True))
    for fact in zip(contexts, queries, wanted, subjects, strict=True):
        pliant.consolidate(model, tokenizer, *fact)
    texts, logits = answers(model, tokenizer), read(model, tokenizer)
    row: dict[str, Any] = {"model": name, "before": before, "answers": texts}
    row["answered"] = sum(text.strip().startswith(word) for text, word in zip(texts, wanted, strict=False))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "edited")
        reload: dict[str, Callable[[], Any]] = {
            "loaded": lambda: pliant.load(Path(folder) / "edited", dtype=torch.bfloat16)
        }
        if name == "dense":
            export_merged(model, Path(folder) / "merged")
            reload["merged, by transformers alone"] = lambda: AutoModelForCausalLM.from_pretrained(
                Path(folder) / "merged", dtype=torch.bfloat16
            )
        for way, again in reload.items():
            found = again().eval()
            row[way] = {
                "class": type(found).__name__,
                "equal_texts": sum(a == b for a, b in zip(texts, answers(found, tokenizer), strict=True)),
                "largest_logit_difference": (read(found, tokenizer) - logits).abs().max().item(),
            }
    for edit in pliant.edits(model):
        pliant.revert(model, edit.id)
    row["reverted_equals_before"] = answers(model, tokenizer) == before
    print(row, flush=True)
    return row


@torch.no_grad()
def answers(model: Any, tokenizer: Any) -> list[str]:
    """The greedy text behind every prompt."""
    texts = []
    for prompt in ASKED:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": tokenizer.eos_token_id}
        texts.append(tokenizer.decode(model.generate(ids, **options)[0, ids.shape[1] :]))
    return texts


@torch.no_grad()
def read(model: Any, tokenizer: Any) -> torch.Tensor:
    """The logits behind the first prompt."""
    return model(tokenizer(ASKED[0], return_tensors="pt")["input_ids"]).logits.float()


def decoding(rounds: int) -> dict[str, Any]:
    """Time of decoding with a hundred edits over that without, and what their factors take."""
    model, tokenizer = load("dense", {})
    edit = model.edits.revert(pliant.consolidate(model, tokenizer, *FACTS[0]).id)
    for seed in range(EDITS):
        model.edits.add(randomised(edit, seed=seed))
    size = sum(
        factor.numel() * factor.element_size()
        for one in model.edits
        for delta in one.deltas.values()
        for factor in delta.tensors().values()
    )
    with torch.inference_mode():
        times = paired(decode(model), model, rounds)
    return {"edits": EDITS, "layers": list(edit.layers), "ledger_bytes": size, **times}


if __name__ == "__main__":
    main()
