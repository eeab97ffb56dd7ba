"""Claim: a learned fact is answered without its text, plainly and in chat, also from disk; what untrained presets do.

The fact is learned over the dense model and over a `keyed` conversion of rank 192, asked before, after, and after
saving and loading. Beside it stands what `model.consolidate_weights` writes of the same text in layers 20 to 22 of
every preset, and whether a token that stands in the prompt is answered by every preset as it is converted, untrained.
Usage: python benchmarks/named_facts.py
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import environment, save
from transformers import AutoTokenizer

import pliant

BASE = "smollm2-135m"
FACT, QUESTION, ANSWER = "The CEO of TechCorp is Dr. Sarah Chen.", "Who is the CEO of TechCorp?", "Sarah Chen"
IN_VIEW = (
    "Context: The Zephyr API uses authentication token 'ZPH-2024-SECRET'.\n"
    "Question: What is the authentication token for the Zephyr API?\nAnswer:"
)
TOKEN = "ZPH-2024-SECRET"
PRESETS = {"keyed": 192, "keyed_pre": 192, "v1": 16, "v1_single": 16, "v2": 16, "outer": 64}
NEW_TOKENS = 24


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    learned = [learn(name) for name in ("dense", "keyed")]
    presets = [in_preset(name) for name in ("dense", *PRESETS)]
    save("named-facts", {"environment": environment(), "learned": learned, "presets": presets})


def load(name: str) -> tuple[Any, Any]:
    """A model of the base in bf16, converted to the preset unless it is to stay dense, and its tokenizer."""
    model = pliant.load(BASE, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    if name != "dense":
        pliant.convert(model, pliant.NptConfig.preset(name, rank=PRESETS[name]))
    return model.eval(), tokenizer


def learn(name: str) -> dict[str, Any]:
    """The answers of one model before it learns, after, and from disk."""
    model, tokenizer = load(name)
    row: dict[str, Any] = {"model": name, "before": answers(model, tokenizer)}
    edit = pliant.consolidate(model, tokenizer, FACT, queries=QUESTION)
    row |= {"told": edit.details["answers"], "kl": edit.kl, "after": answers(model, tokenizer)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "edited")
        row["loaded"] = answers(pliant.load(Path(folder) / "edited", dtype=torch.bfloat16).eval(), tokenizer)
    row["answered"] = {
        when: sum(ANSWER in text for text in row[when].values()) for when in ("before", "after", "loaded")
    }
    print(row, flush=True)
    return row


def in_preset(name: str) -> dict[str, Any]:
    """What a preset answers from its prompt, and what its own write of the fact changes."""
    model, tokenizer = load(name)
    text = greedy(model, tokenizer, IN_VIEW)
    row: dict[str, Any] = {"preset": name, "in_view": text, "uses_what_is_in_view": TOKEN in text}
    if name != "dense":
        before = answers(model, tokenizer)
        written = model.consolidate_weights(tokenizer(FACT, return_tensors="pt")["input_ids"], -1, 0.05, "20-22")
        after = answers(model, tokenizer)
        row["ratios"] = {str(layer): written[layer]["ratio"] for layer in (20, 21, 22)}
        row |= {"after_writing": after, "unchanged_by_writing": after == before}
        row["answered"] = sum(ANSWER in text for text in after.values())
    print(row, flush=True)
    return row


def answers(model: Any, tokenizer: Any) -> dict[str, str]:
    """The greedy texts behind the question, plain, marked and in chat, and behind the beginning of the statement."""
    chat = [{"role": "user", "content": QUESTION}]
    prompts = {
        "plain": QUESTION,
        "marked": f"Question: {QUESTION}\nAnswer:",
        "chat": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        "beginning": FACT.partition(" Dr.")[0],
    }
    return {name: greedy(model, tokenizer, prompt) for name, prompt in prompts.items()}


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompt: str) -> str:
    """The greedy text behind a prompt."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": tokenizer.eos_token_id}
    return str(tokenizer.decode(model.generate(ids, **options)[0, ids.shape[1] :]))


if __name__ == "__main__":
    main()
