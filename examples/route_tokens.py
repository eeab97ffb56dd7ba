"""Route tokens past every other layer, choose another capacity, and count what the cache keeps.

Usage: python examples/route_tokens.py [BASE] [--capacity 0.75]
"""

import argparse

from transformers import AutoTokenizer, DynamicCache

import pliant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default="smollm2-135m")
    parser.add_argument("--capacity", type=float, default=0.75, help="share of the tokens that enter a routed layer")
    arguments = parser.parse_args()

    model = pliant.load(arguments.base).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    ids = tokenizer("The river bends twice before it meets the sea.", return_tensors="pt").input_ids

    pliant.convert(model, pliant.ModConfig(capacity_gamma=arguments.capacity), layers="alternate")
    for capacity in (arguments.capacity, 0.5):
        if capacity != arguments.capacity:
            pliant.calibrate(model, capacity)  # other thresholds; no weight changes
        cache = DynamicCache(config=model.config)
        with model.report() as report:
            model(ids, past_key_values=cache)
        for layer, found in list(report.layers.items())[:3]:
            ran = found.routing.runs.float().mean().item()
            print(f"capacity {capacity}: layer {layer} ran {ran:.0%} of {ids.shape[1]} tokens")
    with model.base_mode():
        print("in base mode every token runs in every layer:", tuple(model(ids).logits.shape))


if __name__ == "__main__":
    main()
