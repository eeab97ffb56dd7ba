r"""Claim: how well facts are learned; ROME, MEMIT, AlphaEdit, fine-tuning and LoRA run on the same cases.

Goes on where it stopped; calls for other editors add to the same result, which compares all of them case by case. The
settings of the others are those that `editing_baselines.py` chose.

Usage:
    python benchmarks/editing.py counterfact --data counterfact-2000.json --records 100 \
        --editors untouched in_context unembedding rome --dtype bfloat16 --work outputs/editing
    python benchmarks/editing.py zsre --data zsre-1000.json --editors untouched in_context auto --work outputs/editing
    python benchmarks/editing.py squad --editors untouched in_context context --work outputs/editing
    python benchmarks/editing.py counterfact --data counterfact-2000.json --mode batched --counts 1 10 100 \
        --editors auto memit --work outputs/editing
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, environment, save
from transformers import AutoTokenizer

import pliant
from pliant.cli.console import progress_display
from pliant.cli.evaluate.command import show
from pliant.consolidation.forward import trial
from pliant.data import read_text, token_windows
from pliant.evaluation.editing.editors import EDITORS, editor_named
from pliant.evaluation.editing.figures import ENDS, MODES, report, run_name
from pliant.evaluation.records import read_settings
from pliant.evaluation.suites import cases_of, evaluate

SUITES = {"counterfact": "counterfact", "zsre": "zsre", "squad": "squad_closed_book"}
WORST_TOKENS = 12_288
NOTES = {
    "counterfact": "CounterFact in EasyEdit's form: one paraphrase and one neighbour a record, where the original has "
    "two and ten. S is not to be read beside published ones. Pliant's editors hold the same prompt about other "
    "subjects as it is; in two records (case_id 173 and 193) one of these is the neighbour itself.",
    "zsre": "zsRE in EasyEdit's form: the made-up paragraph is learned, its question asked without it. `recovered_of_"
    "in_context` is the share of the gap between closed book and the paragraph in view.",
    "squad": "Passages of SQuAD are learned from their questions, with the model's own answers. `recovered_of_"
    "in_context` is the share of the gap between closed book and the passage in view.",
}
MEASURES = {
    "score": "S, harmonic mean of efficacy, paraphrase and neighbourhood, times 100",
    "efficacy, paraphrase": "share of cases where the new answer is likelier than the old one",
    "neighbourhood": "share where a neighbour's true answer is likelier than the new one",
    "exact, exact_paraphrase": "greedy decoding writes the new answer, every token of it",
    "neighbourhood_unchanged": "the five tokens after a neighbour are those of the untouched model",
    "neighbourhood_drop": "neighbourhood of the untouched model less that of the edited one",
    "perplexity_ratio, kl": "to the untouched model, on 512 tokens of held-out text",
    "recovered_of_in_context": "share of the gap between the untouched model and the context in view",
    "recovered_of_auto": "of `made`, whose queries the model makes: share of the gain of `auto`, which is given them",
    "worst_on_text": "the edits with the largest perplexity ratios, made again and measured on 12,288 tokens of a text",
    "needed_gradients": "share of edits in which a search by gradient took part; the baselines' always need them",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--data", type=Path, help="the cases, for counterfact and zsre")
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--start", type=int, default=0, help="the first case, counted from 0")
    parser.add_argument("--editors", nargs="*", default=[], choices=EDITORS, help="none: only write the result anew")
    parser.add_argument("--mode", choices=MODES, default="single")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 10, 100, 1_000], help="edits, but for single")
    parser.add_argument("--entropy", action="store_true", help="measure the generation entropy too; slow")
    parser.add_argument("--worst", type=Path, help="a text to measure the worst single edits of --editors on again")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, required=True, help="folder for the records")
    arguments = parser.parse_args()
    suite = SUITES[arguments.suite]
    folder = arguments.work / arguments.suite / Path(arguments.model).name / arguments.dtype
    worst: dict[str, Any] = {}
    shared: dict[str, Any] = {"mode": arguments.mode, "counts": arguments.counts}
    if arguments.editors:
        model = pliant.load(arguments.model, dtype=getattr(torch, arguments.dtype), device_map=arguments.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
        chosen = {name: getattr(arguments, name) for name in ("data", "records", "start", "entropy")}
        with progress_display() as progress:
            evaluate(model, tokenizer, suite, arguments.editors, output=folder, progress=progress, **chosen, **shared)
        if arguments.worst:
            worst = worst_edits(model, tokenizer, arguments, folder)
    write(arguments, folder, worst)


def worst_edits(model: Any, tokenizer: Any, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Perplexity on a text, over the unedited model's, of each editor's worst edits; by editor and case."""
    tokens = token_windows([read_text(arguments.worst)], tokenizer, num_tokens=WORST_TOKENS)
    before = pliant.perplexity(model, tokens)
    cases = cases_of(SUITES[arguments.suite], arguments.data, start=arguments.start, records=arguments.records)
    by_id, found = {case.id: case for case in cases}, report(folder, cases)["editors"]
    ratios: dict[str, Any] = {}
    for name in arguments.editors:
        editor, ids = editor_named(name), [part["id"] for part in found[name].get("worst_perplexity", [])]
        ratios[name] = {}
        for case in ids:
            with trial(model, editor(model, tokenizer, by_id[case]).deltas):
                ratios[name][case] = pliant.perplexity(model, tokens) / before
        print(name, ratios[name], flush=True)
    return ratios


def write(arguments: argparse.Namespace, folder: Path, worst: dict[str, Any]) -> None:
    """Shows the figures of all records in ``folder``, and merges them into the result of this suite and mode.

    Runs of other machines and dtypes stay there, as do editors whose records lie elsewhere.
    """
    name = f"editing-{arguments.suite}{'' if arguments.mode == 'single' else '-' + arguments.mode}"
    path = RESULTS / f"{name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {"runs": {}, "commands": []}
    runs = stored["runs"]
    key = f"{arguments.model}, {arguments.device.partition(':')[0]}, {arguments.dtype}"
    if arguments.start:
        key += f", from case {arguments.start}"
    old = runs.get(key, {})
    # Of every case from the first on, so that editors with other numbers of records keep theirs.
    cases = cases_of(SUITES[arguments.suite], arguments.data, start=arguments.start, records=None)
    counts = {*arguments.counts, *(part["count"] for part in old.get("counts", []))}
    found = report(folder, cases, mode=arguments.mode, counts=sorted(counts))
    show(found)
    now = environment(arguments.device)
    used = {editor for part in found.get("counts", [found]) for editor in part["editors"]}
    known = environments(old)
    ran = {editor: now if editor in arguments.editors else known.get(editor, now) for editor in used}
    run = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "first_case": arguments.start,
        "settings": {**old.get("settings", {}), **settings_in(folder, used, arguments.mode)},
        "environments": {editor: {"environment": own} for editor, own in {**known, **ran}.items()},
        **merged(old, found),
    }
    if worst := {**old.get("worst_on_text", {}), **worst}:
        run["worst_on_text"] = worst
    found = {"notes": NOTES[arguments.suite], "measures": MEASURES, "runs": {**runs, key: run}}
    save(name, {**found, "commands": stored["commands"]})


def settings_in(folder: Path, editors: Iterable[str], mode: str) -> dict[str, Any]:
    """The settings that editors ran with, as they lie beside their records; none of an editor without a run."""
    files = {name: folder / f"{name if name in ENDS else run_name(name, mode)}.settings.json" for name in editors}
    return {name: read_settings(file)["settings"] or None for name, file in files.items() if file.is_file()}


def environments(run: dict[str, Any]) -> dict[str, Any]:
    """Where each editor of a stored run ran; older results hold one environment for all of a run."""
    parts = run.get("counts", [run] if run else [])
    shared = {name: run["environment"] for part in parts for name in part["editors"] if "environment" in run}
    return shared | {name: own["environment"] for name, own in run.get("environments", {}).items()}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The figures of both; of an editor, or of two that are compared, the new ones where there are any."""
    if "counts" in new:
        parts = {part["count"]: part for part in old.get("counts", [])}
        parts |= {part["count"]: merged(parts.get(part["count"], {}), part) for part in new["counts"]}
        return {"counts": [parts[count] for count in sorted(parts)]}
    before, after = old.get("differences", {}), new["differences"]
    differences = {own: {**before.get(own, {}), **after.get(own, {})} for own in {**before, **after}}
    return {**new, "editors": {**old.get("editors", {}), **new["editors"]}, "differences": differences}


if __name__ == "__main__":
    main()
