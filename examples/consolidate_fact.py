"""Write a fact into the weights, ask without the text that said it, and take it back to the last bit.

Usage: python examples/consolidate_fact.py [BASE] [--target auto]
"""

import argparse

import torch
from transformers import AutoTokenizer

import pliant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default="smollm2-135m")
    parser.add_argument("--target", default="auto", help="context, unembedding, optimised, or the cheapest that works")
    arguments = parser.parse_args()

    model = pliant.load(arguments.base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    ids = tokenizer("The CEO of TechCorp is", return_tensors="pt").input_ids
    before = model(ids).logits

    def answer() -> str:
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        return tokenizer.decode(written[0, ids.shape[1] :])

    print("before:", answer())
    edit = pliant.consolidate(
        model,
        tokenizer,
        "The CEO of TechCorp is Dr. Sarah Chen.",
        queries="The CEO of TechCorp is",
        answer="Dr. Sarah Chen",
        subject="TechCorp",
        target=arguments.target,
    )
    print("after: ", answer())
    print(f"edit {edit.id}: layers {list(edit.layers)}, KL on neutral text {edit.kl:.4f} nats a token")

    pliant.revert(model, edit.id)
    assert torch.equal(model(ids).logits, before)
    print("taken back: the same logits as before")


if __name__ == "__main__":
    main()
