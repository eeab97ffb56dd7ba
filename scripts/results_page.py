"""Write docs/results.md: the claims of benchmarks/, the figures that are stored, and the commands that measure them."""

import ast
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from results_pictures import draw_ablation

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
PAGE = ROOT / "docs" / "results.md"
PICTURES = ROOT / "docs" / "images"
WIDTH = 110
HEAD = """\
# Results

Every figure below was measured by a script in `benchmarks/` and lies in `benchmarks/results/`, with the command, the
hardware and the versions that it was measured with; `python scripts/results_page.py` writes this page from those files.
Commands of figures that are older than their recording are put together from the settings stored with them. "Base" is
the embedded SmolLM2-135M. Intervals are 95 % bootstrap intervals.

Some commands read files that are not part of pliant: `wikitext-2/*.txt` is WikiText-2 split into words, as in
`word_language_model` of [pytorch/examples](https://github.com/pytorch/examples); `counterfact-2000.json` and
`zsre-1000.json` are the first records of CounterFact and zsRE in EasyEdit's form; `alpaca_en_demo.json` comes with
[LLaMA-Factory](https://github.com/hiyouga/LLaMA-Factory). Perplexity on text split into words is to be read as a ratio.
"""

Results = Mapping[str, Any]
"""File name without its suffix → what the file holds."""
Table = tuple[tuple[str, ...], list[tuple[Any, ...]]]
"""Headings, and rows; without rows, the headings are a remark."""


def main() -> int:
    """Writes the page; with --check says whether it is what it should be."""
    text = page()
    if "--check" in sys.argv[1:]:
        is_current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print("docs/results.md is current" if is_current else "docs/results.md is old: python scripts/results_page.py")
        return not is_current
    PAGE.write_text(text, encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")
    return 0


def page() -> str:
    """The whole page, from the result files that are there."""
    parts, known = [HEAD], set()
    claims = {script.name: text for script in sorted(BENCHMARKS.glob("*.py")) if (text := docstring(script))}
    for script, (pattern, tables) in SECTIONS.items():
        results = {file.stem: json.loads(file.read_text()) for file in sorted((BENCHMARKS / "results").glob(pattern))}
        if not results:
            continue
        known |= set(results)
        claim, _ = described(script, claims.pop(script))
        parts.append(f"## {claim.rstrip('.')}\n")
        parts.extend(f"{as_markdown(table)}\n" for table in tables(results))
        commands = dict.fromkeys(command for result in results.values() for command in result["commands"])
        shown = "\n".join(folded(command) for command in commands)
        parts.append(f"{origin(results)}\n\n```sh\n{shown}\n```\n")
    if unknown := {file.stem for file in (BENCHMARKS / "results").glob("*.json")} - known:
        raise SystemExit(f"benchmarks/results: no section of the page is of {', '.join(sorted(unknown))}; add one")
    if claims:
        parts.append("## Not measured yet\n\nWhat these scripts are to find out; none of it is known.\n")
        parts.extend(
            "To be tested: {}\n\n```sh\n{}\n```\n".format(*described(script, text)) for script, text in claims.items()
        )
    return "\n".join(parts)


def docstring(script: Path) -> str | None:
    """That of a script that makes a claim."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return text if text.startswith("Claim") else None


def described(script: str, text: str) -> tuple[str, str]:
    """The claim and the command in the docstring of a script."""
    claim = " ".join(re.sub(r"^Claims?: ", "", text.partition("\n\n")[0]).split())
    command = textwrap.dedent(text.rpartition("Usage:")[2].removeprefix("\n")).strip().rstrip(".")
    if not command.startswith("python benchmarks/"):
        raise SystemExit(f"benchmarks/{script}: its docstring must end with 'Usage: python benchmarks/{script} …'")
    return claim[0].upper() + claim[1:], command


def folded(command: str) -> str:
    """A command in lines that fit the page, each from an option on."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) > WIDTH:
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n".join(lines)


def origin(results: Results) -> str:
    """Where the figures of a section come from."""
    files = ", ".join(f"`{name}.json`" for name in results)
    environments = [part for result in results.values() for part in _environments(result)]
    seen = dict.fromkeys(
        f"{e['device']}, {e['threads']} thread{'s' if e['threads'] > 1 else ''}, torch {e['torch']}, "
        f"transformers {e['transformers']}, {e['date']}"
        for e in environments
    )
    return f"{files}: {'; '.join(seen)}."


def _environments(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every record of an environment in a result, however deep."""
    if isinstance(value, Mapping):
        if "environment" in value:
            yield value["environment"]
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from _environments(inner)


def as_markdown(table: Table) -> str:
    """A table, its first column to the left."""
    headings, rows = table
    if not rows:
        return " ".join(headings)
    marks = ["---", *["---:"] * (len(headings) - 1)]
    lines = [headings, tuple(marks), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def cell(value: Any) -> str:
    """A value as the page shows it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2g}"
    return str(value).replace("|", "\\|")


def spread(figure: Mapping[str, Any] | None, key: str = "value") -> str | None:
    """A figure with its interval."""
    if figure is None or figure[key] is None:
        return None
    return f"{cell(float(figure[key]))} [{cell(float(figure['low']))}, {cell(float(figure['high']))}]"


def mebibytes(count: int) -> str:
    """Bytes in MiB."""
    return f"{count / 2**20:,.0f} MiB"


def _perplexity(results: Results) -> Iterator[Table]:
    forms = list(dict.fromkeys((row["form"], row["added_parameters"]) for r in results.values() for row in r["rows"]))
    found = {(name, row["form"]): row["ratio"] for name, r in results.items() for row in r["rows"]}
    headings = tuple(f"{r['evaluation']}; calibrated on {r['calibration']}" for r in results.values())
    rows = [(form, added, *(found.get((name, form)) for name in results)) for form, added in forms]
    yield ("conversion", "parameters added", *headings), rows


def _equivalence(results: Results) -> Iterator[Table]:
    rows = results["equivalence"]["rows"]
    yield (
        ("form at full rank", "relative error of the logits", "equal greedy texts"),
        [(r["form"], r["relative_logit_error"], f"{r['equal_texts']} of {r['prompts']}") for r in rows],
    )


def _equivalence_training(results: Results) -> Iterator[Table]:
    def row(name: str, result: Mapping[str, Any]) -> tuple[Any, ...]:
        after, start = result["after"], result["curve"][0]["ratio"]
        lambada = f"{after['lambada']:.3f} / {after['base_lambada']:.3f}"
        entropy = f"{after['ngram_entropy']:.2f} / {after['base_ngram_entropy']:.2f}"
        prefix = f"{after['common_greedy_prefix']:.1f}"
        label, count = name.removeprefix("equivalence-training-"), result["arguments"]["lambada"]
        figures = (start, after["ratio"], lambada, count, prefix, entropy)
        return label, result["trained_parameters"], result["tokens"], result["core_minutes"], *figures

    rows = sorted((row(name, result) for name, result in results.items()), key=lambda r: (r[2], r[0]))
    yield (
        (
            "run",
            "parameters trained",
            "tokens",
            "core-minutes",
            "validation perplexity over the base's, at the start",
            "WikiText-2 test perplexity over the base's, after",
            "LAMBADA / base",
            "passages",
            "common greedy prefix, tokens",
            "n-gram entropy / base",
        ),
        rows,
    )
    remark = (
        "The first ratio is of validation rows of the training texts, the second of another text: they are not one",
        "figure before and after.",
    )
    yield remark, []


def _distillation(results: Results) -> Iterator[Table]:
    result = results["distillation-cost"]
    yield (
        ("form", "layer-wise step over end-to-end step, time", "memory"),
        [(name, stage["time_ratio"], stage["memory_ratio"]) for name, stage in result["stages"].items()],
    )
    one = result["one_copy"]
    yield (
        ("one copy beside two", ""),
        [
            ("peak memory saved, over the base's bytes", one["saved_share_of_base"]),
            ("step time, over that with two copies", one["time_ratio"]),
        ],
    )


def _finetuning(results: Results) -> Iterator[Table]:
    result = results["finetuning"]
    headings = ("method", "trainable parameters", "learning rate", "seeds", "validation loss", "sd over seeds")
    yield (
        headings,
        [
            (m, s["trainable_parameters"], s["lr"], s["seeds"], f"{s['validation_loss']:.4f}", f"{s['deviation']:.4f}")
            for m, s in result.get("summary", {}).items()
        ],
    )
    if cost := result.get("cost"):
        rows = cost["methods"].items()
        yield (
            ("method", "step seconds", "v1's step time over it", "v1's memory over it"),
            [(name, row["seconds"], row["v1_time_ratio"], row["v1_memory_ratio"]) for name, row in rows],
        )


def _comparison(results: Results) -> Iterator[Table]:
    result = results["comparison"]
    columns = ("trainable parameters", "learning rate", "seeds", "validation loss", "difference to LoRA", "forgetting")

    def row(name: str, found: Mapping[str, Any]) -> tuple[Any, ...]:
        loss, deviation = f"{found['validation_loss']:.4f}", found["validation_loss_deviation"]
        forgetting = found.get("forgetting")
        return (
            name,
            found["parameters"],
            found.get("learning_rate"),
            found["seeds"],
            loss if deviation is None else f"{loss} ± {deviation:.4f}",
            spread(found["difference"]) if "compared_with" in found else None,
            forgetting and f"{forgetting['perplexity_ratio']:.4f}, KL {forgetting['kl']:.4f}",
        )

    yield ("method and rank", *columns), [row(*item) for item in result["rows"].items()]
    settings = result["settings"]
    remark = (
        f"{settings['steps']} steps of two rows, each cut at {settings['max_length']} tokens; {settings['validation']}",
        f"validation rows with {result['tokens']:,} tokens. Forgetting is the perplexity of embedded text over the",
        "base's, and KL(base ‖ model) in nats a token.",
    )
    yield remark, []
    if asked := result.get("in_context"):
        tasks = next(iter(asked.values()))
        headings = ("task", "figure", *asked, "v1 less LoRA")
        first = next(name for name in asked if name.startswith("v1"))
        yield (
            headings,
            [
                (
                    task,
                    figure.replace("_", " "),
                    *(spread(found[task][figure]["value"]) for found in asked.values()),
                    spread(asked[first][task][figure]["difference"]),
                )
                for task, figures in tasks.items()
                for figure in figures
            ],
        )


def _evaluation_table(results: Results) -> Iterator[Table]:
    rows = results["evaluation-table"]["rows"]
    tasks = list(rows[0]["tasks"])
    yield (
        ("model", *tasks, "perplexity"),
        [(r["model"], *(spread(r["tasks"][task]) for task in tasks), spread(r["perplexity"])) for r in rows],
    )
    yield (
        ("less the base", *tasks),
        [(r["model"], *(spread(r["differences"][task]) for task in tasks)) for r in rows if "differences" in r],
    )


def _from_scratch(results: Results) -> Iterator[Table]:
    def rows(r: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        return [
            ("parameters", r["parameters"]),
            ("tokens", r["tokens"]),
            ("core-minutes", r["core_minutes"]),
            ("unigram entropy of the validation tokens, nats", r["unigram_entropy"]),
            ("validation loss, nats", r["validation_loss"]),
            ("below unigram entropy, nats", r["below_unigram"]),
        ]

    for name, result in results.items():
        yield (name, ""), rows(result)


def _nf4(results: Results) -> Iterator[Table]:
    reloaded = results["nf4-training"]["reloaded"].items()
    yield (
        ("delta reloaded", "perplexity", "base", "ratio", "KL, nats"),
        [(where, r["perplexity"], r["base_perplexity"], r["ratio"], r["kl"]) for where, r in reloaded],
    )


def _resume(results: Results) -> Iterator[Table]:
    result = results["resume"]
    rows = [
        ("kills", result["kills"]),
        ("of them in the middle of a save", result["kills_in_the_middle_of_a_save"]),
        ("partial checkpoints found", result["partial_checkpoints"]),
        ("log equal to the unbroken run's", result["log_equal"]),
        ("weights bitwise equal", all(result["weights_bitwise_equal"].values())),
    ]
    yield ("", ""), rows


def _speed(results: Results) -> Iterator[Table]:
    rows = results["speed"]["rows"]
    found = {(row["form"], row["phase"]): spread(row, "ratio") for row in rows}
    added = {row["form"]: row["added_parameters"] for row in rows}
    yield (
        ("conversion", "parameters added", "prefill, time over the base's", "decode"),
        [(form, count, found[form, "prefill"], found[form, "decode"]) for form, count in added.items()],
    )


def _memory(results: Results) -> Iterator[Table]:
    result = results["memory"]
    rows = [
        ("base", mebibytes(result["base_bytes"])),
        ("added", mebibytes(result["added_bytes"])),
        ("peak above what was resident", mebibytes(result["peak"] - result["resident_before"])),
    ]
    yield ("", ""), rows


EDITED = {
    "score": "S",
    "efficacy": "efficacy",
    "paraphrase": "paraphrase",
    "neighbourhood": "neighbourhood",
    "exact": "exact",
    "exact_paraphrase": "exact, rephrased",
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "f1": "F1",
    "perplexity_ratio": "perplexity ratio",
}
"""Measure of an edit → its heading."""


def _editing(results: Results) -> Iterator[Table]:
    for file, result in results.items():
        yield (f"**{' '.join(file.split('-')[1:])}**: {result['notes']}",), []
        for run, measured in result["runs"].items():
            parts = measured.get("counts", [measured])
            edited = [(name, own, part.get("count")) for part in parts for name, own in part["editors"].items()]
            shown = [key for key in EDITED if any(key in own for _, own, _ in edited)]
            if "score" in shown or "exact_match" in shown:
                shown = [key for key in shown if key != "accuracy"]
            names = [name if count is None else f"{name}, {count} edits" for name, _, count in edited]
            rows = [
                (name, own["records"], *(spread(own.get(key)) for key in shown))
                for name, (_, own, _) in zip(names, edited, strict=True)
            ]
            yield (run, "cases", *(EDITED[key] for key in shown)), rows


def _ablation(results: Results) -> Iterator[Table]:
    rows = results["editing-ablation"]["rows"]
    shown = ("score", "efficacy", "paraphrase", "neighbourhood", "exact", "exact_paraphrase", "kl")
    yield (
        ("choice", *(EDITED.get(key, "KL, nats") for key in shown), "S over its reference", "seconds"),
        [
            (
                f"{row['factor']}: {row['value']}",
                spread(row["score"]),
                *(row[key]["value"] for key in shown[1:]),
                spread(row.get("difference")),
                row["seconds"]["value"],
            )
            for row in rows
        ],
    )
    file = PICTURES / "editing-ablation.svg"
    if "--check" not in sys.argv[1:]:
        draw_ablation(rows, file)
    yield (f"![S of every variant, with its interval and its parts]({file.relative_to(PAGE.parent)})",), []


def _edited_models(results: Results) -> Iterator[Table]:
    result = results["edited-models"]
    rows = [
        (
            row["model"],
            f"{row['answered']} of 3",
            way,
            found["class"],
            f"{found['equal_texts']} of {len(row['answers'])}",
            found["largest_logit_difference"],
            row["reverted_equals_before"],
        )
        for row in result["saved"]
        for way, found in row.items()
        if isinstance(found, dict)
    ]
    headings = ("read again", "class", "equal texts", "largest logit difference", "texts as before once reverted")
    yield ("model", "answers the facts", *headings), rows
    decode = result["decode"]
    yield (
        ("edits", "layers", "their factors in fp32", "time of decoding over that without"),
        [(decode["edits"], str(decode["layers"]), mebibytes(decode["ledger_bytes"]), spread(decode, "ratio"))],
    )


def _editing_time(results: Results) -> Iterator[Table]:
    result = results["editing-time"]
    yield (
        (f"facts, {result['batch']} in one solve where batched", "seconds a fact", "times as fast as ROME"),
        [(row["way"], row["seconds"], spread(row["times_as_fast_as_rome"])) for row in result["rows"]],
    )
    yield (
        ("statistics for", "layers", "tokens", "seconds, once for a base"),
        [(row["target"], str(row["layers"]), row["tokens"], row["seconds"]) for row in result["statistics"]],
    )


def _named_facts(results: Results) -> Iterator[Table]:
    result = results["named-facts"]
    times = ("before", "after", "loaded")
    answered = [(row, [f"{row['answered'][when]} of 4" for when in times]) for row in result["learned"]]
    yield (
        ("model", "answered before", "after", "from disk", "in chat, after"),
        [(row["model"], *shares, row["after"]["chat"]) for row, shares in answered],
    )
    yield (
        (
            "preset, as converted",
            "answers from what is in view",
            "answers after its own write, α 0.05",
            "texts changed",
        ),
        [
            (
                row["preset"],
                row["uses_what_is_in_view"],
                f"{row['answered']} of 4" if "answered" in row else None,
                not row["unchanged_by_writing"] if "answered" in row else None,
            )
            for row in result["presets"]
        ],
    )


def _baselines(results: Results) -> Iterator[Table]:
    methods = results["editing-baselines-search"]["methods"].items()
    rows = []
    for name, method in methods:
        chosen = method["chosen"]
        settings = ", ".join(f"{k} {v}" for k, v in chosen["settings"].items())
        scores = chosen["scores"]
        measured = (None, None, None) if scores is None else (scores["records"], 100 * scores["s"], scores["efficacy"])
        rows.append((name, method["trials"], settings, *measured))
    yield ("method", "trials", "chosen", "records", "S", "efficacy"), rows
    remark = (
        "Trials are of 12 records, of LoRA's 8. Ties in S were broken by soft counts. What was chosen was then scored",
        "on the first of the same records: the last columns say whether a method works, not how well on other records.",
    )
    yield remark, []


def _peers(results: Results) -> Iterator[Table]:
    result = results["peers"]
    rows = [(row["peer"], row["phase"], spread(row, "ratio")) for row in result["rows"]]
    yield (f"peer, {result['dtype']}", "phase", "v1's time over it"), rows


def _routed_speed(results: Results) -> Iterator[Table]:
    known = ("phase", "architecture", "capacity", "tokens", "batch", "measured_capacity")
    for result in results.values():
        rows = [
            (
                *(row[key] for key in known),
                row["environment"]["threads"],
                row["work_ratio"],
                spread(row, "ratio"),
                row["realised"],
            )
            for row in result["rows"]
        ]
        names = (*(key.replace("_", " ") for key in known), "threads")
        headings = (*names, "work over dense", "time over dense", "saving realised")
        yield headings, rows


def _routed_capacity(results: Results) -> Iterator[Table]:
    rows = results["routed-capacity"]["rows"]
    exact = [(r["architecture"], r["relative_logit_error"]) for r in rows if "relative_logit_error" in r]
    yield ("γ = 1", "relative error of the logits"), exact
    shares = [
        (r["architecture"], r["text"], *(100 * r[key] for key in ("capacity", "mean", "worst")))
        for r in rows
        if "text" in r
    ]
    yield (
        ("architecture", "text", "γ, %", "ran, mean over layers, %", "ran, layer furthest off, %"),
        [(*names, *(f"{value:.1f}" for value in values)) for *names, a, b, c in shares for values in [(a, b, c)]],
    )


def _routed_layers(results: Results) -> Iterator[Table]:
    result = results["routed-layers"]
    parts = list(result["costs"])
    layers = range(len(result["costs"][parts[0]]))
    yield (
        ("layer", *(f"nats a token without its {part}" for part in parts)),
        [(index, *(f"{result['costs'][part][index]:.3f}" for part in parts)) for index in layers],
    )
    yield (
        ("routed part", "chosen by", "γ", "WikiText-2 perplexity over the base's", "layers"),
        [(r["part"], r["choice"], r["capacity"], r["ratio"], ", ".join(map(str, r["layers"]))) for r in result["rows"]],
    )


def _routed_transfer(results: Results) -> Iterator[Table]:
    rows = []
    for result in results.values():
        work, base = result["linear_flops"], result["untouched"]
        routed = ", ".join(map(str, result.get("layers", ()))) or "alternate"
        if not rows:
            rows.append(("untouched base", None, 1.0, None, None, 1.0, base["lambada"], base["hellaswag"]))
        for method, run in result["chosen"].items():
            flops = {"dense": 1.0, **work}.get(method, work["routed"])
            figures = (run["ratio"], run["lambada"], run["hellaswag"])
            layers = None if method in ("dense", "shallower") else routed
            rows.append((method, layers, flops, run["lr"], run.get("capacity"), *figures))
    yield (
        (
            "method",
            "routed layers",
            "linear FLOPs over dense",
            "learning rate",
            "share that runs on the test text",
            "WikiText-2 perplexity over the base's",
            "LAMBADA (500)",
            "HellaSwag (200)",
        ),
        rows,
    )


def _routed_from_scratch(results: Results) -> Iterator[Table]:
    result = results["routed-from-scratch"]
    headings = (
        "method",
        "FLOPs of a step over dense",
        "steps",
        "learning rate",
        "loss, mean of the seeds",
        "deviation",
        "least, most",
        "share that runs, by threshold",
    )
    rows = []
    for method, chosen in result.get("chosen", {}).items():
        runs = [r for r in result["runs"] if (r["method"], r["lr"]) == (method, chosen["lr"])]
        losses = [r["validation_loss"] for r in runs]
        shares = [r["capacity"] for r in runs if r["capacity"] is not None]
        spread = (f"{chosen['validation_loss']:.3f}", chosen["deviation"], f"{min(losses):.3f}, {max(losses):.3f}")
        share = sum(shares) / len(shares) if shares else None
        rows.append((method, runs[0]["work_ratio"], runs[0]["steps"], chosen["lr"], *spread, share))
    yield headings, rows


def _routed_generation(results: Results) -> Iterator[Table]:
    rows = results["routed-generation"]["rows"]
    dense = {row["way"]: row["ngram_entropy"] for row in rows if row["model"] == "dense"}
    yield (
        ("model", "decoding", "tokens", "n-gram entropy", "dense", "logits finite"),
        [
            (r["model"], r["way"], r["tokens"], f"{r['ngram_entropy']:.2f}", f"{dense[r['way']]:.2f}", r["finite"])
            for r in rows
        ],
    )


def _evaluation_batching(results: Results) -> Iterator[Table]:
    rows = results["evaluation-batching"]["rows"]
    yield (
        ("model", "batch size", "requests", "mean log-likelihood", "largest difference to batch size 1"),
        [
            (r["model"], r["batch_size"], r["requests"], r["mean_log_likelihood"], f"{r['largest_difference']:.1e}")
            for r in rows
        ],
    )


def _evaluation_parity(results: Results) -> Iterator[Table]:
    result = results["evaluation-parity"]

    def accuracies(side: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in side.items())

    yield (
        ("task", "documents", "pliant", "lm-eval", "documents that differ", "log-likelihoods differ by at most"),
        [
            (
                r["task"],
                r["documents"],
                accuracies(r["pliant"]),
                accuracies(r["lm_eval"]),
                r["differ"],
                f"{r['largest_difference']:.1e}",
            )
            for r in result["rows"]
        ],
    )
    yield (
        ("pliant's time over lm-eval's", ""),
        [("wall", result["time_ratio"]), ("processor", result["processor_time_ratio"])],
    )


Section = tuple[str, Callable[[Results], Iterator[Table]]]
SECTIONS: dict[str, Section] = {
    "equivalence.py": ("equivalence.json", _equivalence),
    "perplexity.py": ("perplexity-*.json", _perplexity),
    "speed.py": ("speed.json", _speed),
    "peers.py": ("peers.json", _peers),
    "memory.py": ("memory.json", _memory),
    "equivalence_training.py": ("equivalence-training-*.json", _equivalence_training),
    "distillation_cost.py": ("distillation-cost.json", _distillation),
    "finetuning.py": ("finetuning.json", _finetuning),
    "comparison.py": ("comparison.json", _comparison),
    "from_scratch.py": ("from-scratch-*.json", _from_scratch),
    "nf4_training.py": ("nf4-training.json", _nf4),
    "resume.py": ("resume.json", _resume),
    "editing.py": ("editing-[csz]*.json", _editing),
    "editing_ablation.py": ("editing-ablation.json", _ablation),
    "edited_models.py": ("edited-models.json", _edited_models),
    "named_facts.py": ("named-facts.json", _named_facts),
    "editing_time.py": ("editing-time.json", _editing_time),
    "editing_baselines.py": ("editing-baselines-search.json", _baselines),
    "routed_capacity.py": ("routed-capacity.json", _routed_capacity),
    "routed_layers.py": ("routed-layers.json", _routed_layers),
    "routed_speed.py": ("routed-speed-*.json", _routed_speed),
    "routed_transfer.py": ("routed-transfer*.json", _routed_transfer),
    "routed_from_scratch.py": ("routed-from-scratch.json", _routed_from_scratch),
    "routed_generation.py": ("routed-generation.json", _routed_generation),
    "evaluation_table.py": ("evaluation-table.json", _evaluation_table),
    "evaluation_parity.py": ("evaluation-parity.json", _evaluation_parity),
    "evaluation_batching.py": ("evaluation-batching.json", _evaluation_batching),
}
"""Script → its result files, and their tables."""


if __name__ == "__main__":
    sys.exit(main())
