"""Fine-tune the modulation of v1, which starts exactly as its base, on conversations of yours; the base stays frozen.

Usage: python examples/finetune.py chats.jsonl [--base smollm2-135m] [--steps 50] [--output outputs/example-v1]
"""

import argparse

import pliant
from pliant.config import DataConfig, ModelConfig, RunConfig, TrainingConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a file of conversations: a row holds messages, or instruction, input and output")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", default="outputs/example-v1")
    arguments = parser.parse_args()

    result = pliant.train(
        RunConfig(
            model=ModelConfig(base_model_name=arguments.base, preset="v1", adapter_rank=16),
            data=DataConfig(dataset_name=arguments.data, max_length=256, validation_fraction=0.1),
            training=TrainingConfig(
                objective="sft", output_dir=arguments.output, max_steps=arguments.steps, lr=1e-3, warmup_steps=5
            ),
        )
    )
    print(f"validation loss {result.before['eval_loss']:.3f} before, {result.after['eval_loss']:.3f} after")
    tuned = pliant.load(result.output_dir / "checkpoint-best")
    print(
        f"{sum(p.numel() for _, p in tuned.dynamic_parameters()):,} parameters were trained, those of the base were not"
    )


if __name__ == "__main__":
    main()
