"""Claim: what v1 learns, forgets and makes of a context beside LoRA, DoRA and IA3 at two sizes, all tuned alike.

Instruction tuning of the embedded base in fp32, adapters included: the same rows, order and steps for every method, two
learning rates tried by each at the first seed (IA3's three times as high), then three seeds at the better one. The
metric was fixed beforehand: mean -log p of the validation tokens. Forgetting is measured on embedded text, in-context
tasks on the first seed of v1 and LoRA at the larger size. Differences are to LoRA of the same budget, IA3's to the
smaller one, with intervals over validation rows, windows or questions. Whatever is done in --work is not done again.

Usage: python benchmarks/comparison.py --data alpaca_en_demo.json
"""

import argparse
from pathlib import Path
from typing import Any

from record import environment, save

import pliant

METHODS = ("v1", "lora", "dora", "ia3")
BUDGETS = (500_000, 1_013_760)
RATES, RATES_OF = (1e-3, 3e-3), {"ia3": (3e-3, 1e-2)}
HELD_OUT_TOKENS = 2_048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="json with instruction, input and output")
    parser.add_argument("--steps", type=int, default=30, help="of two rows")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--validation", type=int, default=32, help="rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=25, help="of each in-context task; 0 for none")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmarks/comparison"))
    arguments = parser.parse_args()
    result: dict[str, Any] = {"environment": environment(), "settings": settings(arguments)}
    found = compare(arguments, methods=METHODS, budgets=BUDGETS, seeds=arguments.seeds)
    stopped(found)
    rows = {name: {**found["contenders"][name], **row} for name, row in found["summary"].items()}
    result |= {"rows": rows, "tokens": sum(found["tokens"])}
    save("comparison", result)
    if arguments.questions:
        only = {"methods": METHODS[:2], "budgets": BUDGETS[1:], "seeds": 1, "questions": arguments.questions}
        found = compare(arguments, **only)
        stopped(found)
        result["in_context"] = {name: row["in_context"] for name, row in found["summary"].items()}
        save("comparison", result)


def compare(arguments: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """``pliant compare`` in one folder, which goes on where it was."""
    return pliant.compare(
        "compare_sft",
        [
            f"data.dataset_name={arguments.data}",
            f"data.max_length={arguments.max_length}",
            f"data.max_validation_windows={arguments.validation}",
            f"training.max_steps={arguments.steps}",
            "training.mixed_precision=no",
        ],
        output=arguments.work,
        learning_rates=RATES,
        rates_of={name: rates for name, rates in RATES_OF.items() if name in options["methods"]},
        held_out_tokens=HELD_OUT_TOKENS,
        measure_cost=False,
        **options,
    )


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    names = ("steps", "max_length", "validation", "questions")
    return {**{name: getattr(arguments, name) for name in names}, "data": arguments.data.name}


def stopped(found: dict[str, Any]) -> None:
    """Ends where a signal ended a run."""
    if found["stopped_by"] is not None:
        raise SystemExit(f"stopped by {found['stopped_by']}; run the same command again to go on")


if __name__ == "__main__":
    main()
