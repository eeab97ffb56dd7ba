"""Train a lossy conversion towards its own base: the teacher is the model itself in base mode.

Usage: python examples/train_equivalence.py [BASE] [--steps 20] [--output outputs/example-equivalence]
"""

import argparse

import pliant
from pliant.config import DataConfig, ModelConfig, RunConfig, TrainingConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default="smollm2-135m")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--text", default="embedded", help="embedded, a file, a known name or a hub id")
    parser.add_argument("--output", default="outputs/example-equivalence")
    arguments = parser.parse_args()

    result = pliant.train(
        RunConfig(
            model=ModelConfig(
                base_model_name=arguments.base,
                preset="keyed",
                adapter_rank=arguments.rank,
                calibration=None if arguments.text == "embedded" else arguments.text,
                calibration_tokens=4_096,
            ),
            data=DataConfig(dataset_name=arguments.text, max_length=128, max_validation_windows=8),
            training=TrainingConfig(
                output_dir=arguments.output, max_steps=arguments.steps, batch_size=2, lr=1e-3, warmup_steps=2
            ),
        )
    )
    for when, figures in (("before", result.before), ("after", result.after)):
        print(
            f"{when}: perplexity {figures['eval_ratio']:.3f} times the base's, KL {figures['eval_kl']:.3f} nats a token"
        )
    print(f"the best checkpoint: {result.output_dir / 'checkpoint-best'}")


if __name__ == "__main__":
    main()
