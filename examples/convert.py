"""Convert a model in place, see what that cost, and save only what was added.

Usage: python examples/convert.py [BASE] [--rank 192] [--output outputs/example-keyed]
"""

import argparse

from transformers import AutoTokenizer

import pliant
from pliant.data import documents, token_windows
from pliant.metrics import compare_to_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default="smollm2-135m")
    parser.add_argument("--rank", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=2_048)
    parser.add_argument("--output", default="outputs/example-keyed")
    arguments = parser.parse_args()

    model = pliant.load(arguments.base)
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    pliant.convert(model, pliant.NptConfig.preset("keyed", rank=arguments.rank), layers="all")

    text = token_windows(documents("validation"), tokenizer, num_tokens=arguments.tokens)
    found = compare_to_base(model, text)
    print(f"perplexity {found.perplexity:.2f}, of the base {found.base_perplexity:.2f}: ratio {found.ratio:.3f}")

    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with model.report() as report:
        model(ids)
    strongest = {layer: norms.max().item() for layer, norms in report.norms().items()}
    print("strongest rewrite of a layer:", {layer: round(norm, 2) for layer, norm in strongest.items()})

    model.save_pretrained(arguments.output, delta=True)  # a few MB, bound to this very base
    reloaded = pliant.load(arguments.output)
    assert (reloaded(ids).logits == model(ids).logits).all()
    print(f"saved, and loaded with the same logits: {arguments.output}")


if __name__ == "__main__":
    main()
