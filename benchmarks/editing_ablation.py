"""Claim: what each choice of an edit is worth, one changed at a time: target, writer, positions, layers, α, contrast.

On CounterFact records that no other evaluation looks at. The reference is what `pliant.consolidate` does by default;
positions are a choice of the target `context` alone, so they are compared with that. The control gives every edit of
the reference a random direction of the same norm. Goes on where it stopped.

Usage: python benchmarks/editing_ablation.py counterfact-2000.json --work outputs/ablation [--records 20]
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from record import environment, save
from transformers import AutoTokenizer

import pliant
from pliant.cli.console import progress_display
from pliant.consolidation import Consolidation
from pliant.consolidation.writers import WRITERS
from pliant.evaluation.baselines import RandomDirection
from pliant.evaluation.editing.cases import counterfact
from pliant.evaluation.editing.editors import Learn, editor_settings
from pliant.evaluation.editing.figures import MEASURES, as_json
from pliant.evaluation.editing.runs import evaluate_edits
from pliant.evaluation.intervals import SCORE, paired_difference, summary
from pliant.evaluation.records import Record

BASE = "smollm2-135m"
START = 1_000
"""The first record: those before are what editors are compared on."""
DEFAULT = Consolidation()
CONTEXT = Consolidation(target="context")


@dataclass(frozen=True)
class Variant:
    """One choice, and the run that it is compared with."""

    factor: str
    value: str
    editor: Any
    reference: str = "target auto"

    @property
    def name(self) -> str:
        return f"{self.factor} {self.value}"


def variants() -> Iterator[Variant]:
    """Every variant, the references before what is compared with them."""
    for target in ("auto", "optimised", "unembedding", "context"):
        yield Variant("target", target, Learn(settings=Consolidation(target=target)))
    for writer in WRITERS:
        if writer != DEFAULT.write.writer:
            both = {name: replace(getattr(DEFAULT, name), writer=writer) for name in ("write", "subject_write")}
            yield Variant("writer", writer, Learn(settings=replace(DEFAULT, **both)))
    for positions in ("span", "subject"):
        settings = replace(CONTEXT, positions=positions)
        yield Variant("context positions", positions, Learn(settings=settings), "target context")
    yield Variant(
        "context positions", "span, 6–27", Learn(settings=replace(CONTEXT, positions="span", layers="6-27")),
        "target context",
    )  # fmt: skip
    for layers in ("3-7", "29", "5,29", "3-7,28,29", "8-12,29"):
        yield Variant("layers", layers, Learn(settings=replace(DEFAULT, layers=layers)))
    for alpha in (0.25, 0.5, 2.0):
        yield Variant("α", f"{alpha:g}", Learn(settings=replace(DEFAULT, alpha=alpha)))
    for count in (0, 8):
        yield Variant("contrast", str(count), Learn(settings=replace(DEFAULT, contrast=count)))
    yield Variant("control", "random", RandomDirection(editor=Learn(settings=DEFAULT)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="CounterFact in EasyEdit's form")
    parser.add_argument("--records", type=int, default=20)
    parser.add_argument("--work", type=Path, required=True, help="folder for the records")
    arguments = parser.parse_args()
    model = pliant.load(BASE, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    cases = counterfact(arguments.data)[START : START + arguments.records]
    runs: dict[str, list[Record]] = {}
    with progress_display() as progress:
        for index, variant in enumerate(variants()):
            runs[variant.name] = evaluate_edits(
                model,
                tokenizer,
                cases,
                variant.editor,
                output=arguments.work,
                name=f"{index:02d}-{variant.factor}",
                settings=editor_settings(variant.editor, model, tokenizer),
                progress=progress,
            )
    save(
        "editing-ablation",
        {
            "environment": environment(),
            "model": BASE,
            "dtype": "bfloat16",
            "cases": [START, START + len(cases)],
            "rows": [row(variant, runs) for variant in variants()],
        },
    )


def row(variant: Variant, runs: dict[str, list[Record]]) -> dict[str, Any]:
    """The figures of one variant, and what it has over its reference, case by case."""
    own, means = runs[variant.name], summary(runs[variant.name])
    found: dict[str, Any] = {"factor": variant.factor, "value": variant.value, "reference": variant.reference}
    found |= {measure: as_json(means[measure]) for measure in (*MEASURES, "seconds") if measure in means}
    if variant.name != variant.reference:
        found["difference"] = as_json(paired_difference(own, runs[variant.reference], SCORE))
    return found


if __name__ == "__main__":
    main()
