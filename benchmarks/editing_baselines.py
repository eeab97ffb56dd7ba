"""Claim: the settings of the baseline editors were searched, on CounterFact records that no evaluation looks at.

Coordinate by coordinate from the first value of each: every other value is tried on the first records of the slice, in
bf16 with batched value searches, and the one with the best S of soft counts is kept. What is chosen is then measured
on the slice in fp32, one edit at a time. It goes on where it stopped: trials lie in `outputs/editing-baselines/`, one
file a method, so that several methods can be searched at once.

Usage: python benchmarks/editing_baselines.py counterfact-2000.json [METHOD ...] [--trials N] [--records N] [--collect]
"""

import argparse
import json
import statistics as stats
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import environment, save
from transformers import AutoTokenizer

import pliant
from pliant.consolidation.forward import trial
from pliant.evaluation.baselines import AlphaEdit, FineTune, Lora, Memit, Rome, randomised
from pliant.evaluation.baselines.values import FoundValues, ValueSearch
from pliant.evaluation.editing.cases import EditCase, counterfact, pair_tokens
from pliant.key_moments import cached_key_moments
from pliant.models.edits import Edit

BASE = "smollm2-135m"
SLICE = slice(1000, 1040)
STATE = Path("outputs/editing-baselines")
UNTOUCHED = STATE / "untouched-base.json"
MEASURES = ("efficacy", "paraphrase", "neighbour", "exact", "exact_paraphrase")

Settings = dict[str, Any]
# Method → how many records a trial has, and the values of each coordinate in the order that they are searched in; a
# coordinate may be several settings. The first value is the start.
SEARCHES: dict[str, tuple[int, list[list[Settings]]]] = {
    "rome": (
        12,
        [
            [{"depth": depth} for depth in (0.17, 0.27, 0.1)],
            [{"clamp": clamp} for clamp in (4.0, 2.0, 8.0)],
            [{"learning_rate": rate, "steps": steps} for rate, steps in ((0.5, 15), (0.2, 25))],
            [{"weight_decay": decay} for decay in (0.05, 0.005, 0.2)],
            [{"ridge": ridge} for ridge in (0.01, 0.3)],
            [{}, {"kl_weight": 0.5}, {"stop_below": 0.01}],
        ],
    ),
    "memit": (
        12,
        [
            [{"depths": depths} for depths in ((0.1, 0.23), (0.07, 0.17), (0.17, 0.3))],
            [{"strength": strength} for strength in (0.1, 0.02, 0.5)],
            [{"clamp": clamp} for clamp in (0.75, 1.5, 3.0)],
            [{"learning_rate": rate, "steps": steps} for rate, steps in ((0.5, 15), (0.2, 25))],
            [{"weight_decay": decay} for decay in (0.05, 0.005, 0.2)],
            [{}, {"kl_weight": 0.5}, {"stop_below": 0.01}],
        ],
    ),
    "alphaedit": (
        12,
        [
            [{"threshold": threshold} for threshold in (1.0, 0.4, 3.0, 0.6)],
            [{"strength": strength} for strength in (1.0, 0.1, 10.0)],
            [{}, {"depths": (0.07, 0.17)}, {"depths": (0.17, 0.3)}],
            [{}, {"stop_below": 0.2}, {"stop_below": 0.01}],
        ],
    ),
    "finetune": (
        12,
        [
            [{"learning_rate": rate, "epochs": epochs} for rate, epochs in ((1e-3, 12), (2e-3, 8))],
            [{"depth": depth} for depth in (0.5, 0.17)],
            [{}, {"learning_rate": 1e-3, "epochs": 25}, {"learning_rate": 5e-4, "epochs": 25}],
            [{}, {"depth": 0.3}, {"depth": 0.7}],
            [{"stop_below": loss} for loss in (0.05, 0.5, 0.01)],
            [{"bound": bound} for bound in (None, 0.03, 0.1)],
        ],
    ),
    "lora": (
        8,
        [
            [{"learning_rate": rate, "epochs": epochs} for rate, epochs in ((1e-3, 12), (2e-3, 8))],
            [{"depths": depths} for depths in ((0.17, 0.5), (0.07, 0.23), (0.0, 1.0))],
            [{"stop_below": loss} for loss in (0.05, 0.5)],
            [{}, {"targets": ("gate_proj", "up_proj", "down_proj")}, {"targets": ("down_proj",)}],
            [{"rank": rank, "alpha": 2 * rank} for rank in (8, 2)],
            [{}, {"learning_rate": 5e-4, "epochs": 25}],
        ],
    ),
}
EDITORS: dict[str, Any] = {"rome": Rome, "memit": Memit, "alphaedit": AlphaEdit, "finetune": FineTune, "lora": Lora}


@torch.inference_mode()
def score(model: Any, tokenizer: Any, case: EditCase) -> dict[str, Any]:
    """Efficacy, paraphrase and neighbour by mean token log-probability, and exact greedy answers."""
    assert case.old_answer is not None
    (paraphrase,), ((neighbour, true),) = case.paraphrases, case.neighbours
    asked = [(case.prompt, case.answer), (case.prompt, case.old_answer)]
    asked += [(paraphrase, case.answer), (paraphrase, case.old_answer), (neighbour, true), (neighbour, case.answer)]
    pairs = [pair_tokens(tokenizer, *pair) for pair in asked]
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.zeros(len(pairs), width, dtype=torch.long)
    for row, (prompt, answer) in zip(ids, pairs, strict=True):
        row[: len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    logits = model(ids.to(model.device), use_cache=False).logits.float()
    means, exact = [], []
    for row, (prompt, answer) in zip(logits, pairs, strict=True):
        span, target = row[len(prompt) - 1 : len(prompt) + len(answer) - 1], torch.tensor(answer).to(row.device)
        means.append(span.log_softmax(-1).gather(1, target[:, None]).mean().item())
        exact.append(bool((span.argmax(-1) == target).all()))  # greedy text begins with the answer
    return {
        "efficacy": float(means[0] > means[1]),
        "paraphrase": float(means[2] > means[3]),
        "neighbour": float(means[4] > means[5]),
        "exact": float(exact[0]),
        "exact_paraphrase": float(exact[2]),
        "margins": [means[0] - means[1], means[2] - means[3], means[4] - means[5]],
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over records, S (the harmonic mean of the first three), and S of soft counts, σ(2 · margin in nats)."""
    means = {name: stats.mean(row[name] for row in rows) for name in MEASURES}
    soft = torch.tensor([row["margins"] for row in rows]).mul(2).sigmoid().mean(0).tolist()
    s = stats.harmonic_mean([means[name] for name in MEASURES[:3]])
    return {"s": s, "soft_s": stats.harmonic_mean(soft), **means, "records": len(rows)}


class Search:
    """The trials of one method and what they left on disk."""

    def __init__(self, method: str, cases: list[EditCase]) -> None:
        self.method, self.cases = method, cases
        self.file = STATE / f"{method}.json"
        self.state = json.loads(self.file.read_text()) if self.file.exists() else {"trials": [], "final": []}
        self.count, self.coordinates = SEARCHES[method]

    def keep(self) -> None:
        STATE.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.state, indent=1))

    def start(self) -> Settings:
        settings = chosen("memit") if self.method == "alphaedit" else {}
        settings = {name: value for name, value in settings.items() if name != "strength"}
        return {**settings, **{k: v for values in self.coordinates for k, v in values[0].items()}}

    def choose(self, screen: Callable[[Settings], dict[str, Any] | None]) -> None:
        """Searches coordinate by coordinate."""
        current = self.start()
        for values in self.coordinates:
            tried = [(scores, {**current, **value}) for value in values if (scores := screen({**current, **value}))]
            if not tried:
                break
            current = max(tried, key=lambda pair: pair[0]["soft_s"])[1]
        written = json.loads(json.dumps(current))
        if self.state.get("chosen") != written:
            self.state |= {"chosen": written, "final": []}
            self.keep()

    def screen(self, model: Any, tokenizer: Any, most: int, settings: Settings) -> dict[str, Any] | None:
        """Scores of settings on the first records; from disk where they are known, None when the trials are used up."""
        written = json.loads(json.dumps(settings))
        for known in self.state["trials"]:
            if known["settings"] == written:
                return known["scores"]
        if len(self.state["trials"]) >= most:
            return None
        begin, cases = time.process_time(), self.cases[: self.count]
        shared = {"found": FOUND} if issubclass(EDITORS[self.method], ValueSearch) else {}
        editor = EDITORS[self.method](**settings, **shared, **moments(self.method))
        rows = []
        for case, edit in zip(cases, self.edits(editor, model, tokenizer, cases), strict=True):
            with trial(model, edit.deltas):
                rows.append(score(model, tokenizer, case))
        scores = summary(rows)
        self.state["trials"].append(
            {"settings": written, "scores": scores, "cpu_seconds": round(time.process_time() - begin, 1)}
        )
        self.keep()
        print(self.method, settings, {name: round(value, 3) for name, value in scores.items()}, flush=True)
        return scores

    def edits(self, editor: Any, model: Any, tokenizer: Any, cases: list[EditCase]):
        """An edit a record; what is slow is searched for all records at once, and once for all writes of it."""
        if not isinstance(editor, Rome | Memit):
            yield from (editor(model, tokenizer, case) for case in cases)
            return
        values = editor.values(model, tokenizer, cases)
        for index, case in enumerate(cases):
            write: Callable[..., Edit] = editor.write
            given = case if isinstance(editor, Rome) else [case]
            yield write(model, tokenizer, given, values[:, index : index + 1])

    def measure(self, model: Any, tokenizer: Any, records: int) -> None:
        """Scores and times of the chosen settings on the slice, one edit at a time."""
        editor = EDITORS[self.method](**chosen(self.method), **moments(self.method))
        left = self.cases[len(self.state["final"]) : records]
        for index, case in enumerate(left):
            if index == 0:
                editor(model, tokenizer, case)  # prefixes, factorisations
            wall, cpu = time.perf_counter(), time.process_time()
            edit = editor(model, tokenizer, case)
            row: dict[str, Any] = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
            with trial(model, edit.deltas):
                row |= score(model, tokenizer, case)
            control = randomised(edit)
            with trial(model, control.deltas):
                row["control"] = score(model, tokenizer, case)
            self.state["final"].append(row)
            self.keep()
        print(self.method, "chosen", self.state["chosen"], self.result()["chosen"]["scores"], flush=True)

    def result(self) -> dict[str, Any]:
        final = self.state["final"]
        return {
            "records_per_trial": self.count,
            "trials": len(self.state["trials"]),
            "chosen": {
                "settings": self.state.get("chosen"),
                "scores": summary(final) if final else None,
                "random_direction": summary([row["control"] for row in final]) if final else None,
                "median_seconds": stats.median(row["seconds"] for row in final) if final else None,
                "median_cpu_seconds": stats.median(row["cpu_seconds"] for row in final) if final else None,
            },
            "tried": self.state["trials"],
        }


def chosen(method: str) -> Settings:
    """What the search of another method chose."""
    settings = json.loads((STATE / f"{method}.json").read_text())["chosen"]
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


_MOMENTS: dict[str, Any] = {}
FOUND = FoundValues()


def moments(method: str) -> dict[str, Any]:
    """The same second moments for every trial."""
    return dict(_MOMENTS) if method in ("rome", "memit", "alphaedit") else {}


def load(dtype: torch.dtype, attention: str) -> Any:
    model = pliant.load(BASE, dtype=dtype).eval()
    model.set_attn_implementation(attention)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="CounterFact in EasyEdit's form")
    parser.add_argument("methods", nargs="*", default=list(SEARCHES))
    parser.add_argument("--trials", type=int, default=30, help="most of a method, with those already made")
    parser.add_argument("--records", type=int, default=SLICE.stop - SLICE.start, help="to measure the chosen ones on")
    parser.add_argument("--collect", action="store_true", help="only write the result of what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = counterfact(arguments.data)[SLICE]
    if not arguments.collect:
        screened, measured = load(torch.bfloat16, "eager"), load(torch.float32, "sdpa")
        tokenizer = AutoTokenizer.from_pretrained(measured.config._name_or_path)
        if {"rome", "memit", "alphaedit"} & set(arguments.methods):
            _MOMENTS["moments"] = cached_key_moments(measured, tokenizer, "2-11")
        if not UNTOUCHED.exists():
            STATE.mkdir(parents=True, exist_ok=True)
            UNTOUCHED.write_text(json.dumps(summary([score(measured, tokenizer, case) for case in cases])))
        searches = [Search(method, cases) for method in arguments.methods]
        for search in searches:
            search.choose(partial(search.screen, screened, tokenizer, arguments.trials))
        for search in searches:
            search.measure(measured, tokenizer, arguments.records)
    results = {method: Search(method, cases).result() for method in SEARCHES if (STATE / f"{method}.json").exists()}
    protocol = "CounterFact, one paraphrase and one neighbour a record; trials in bf16, chosen settings in fp32"
    where: dict[str, Any] = {"base": BASE, "slice": [SLICE.start, SLICE.stop], "protocol": protocol}
    where["untouched"] = json.loads(UNTOUCHED.read_text())
    save("editing-baselines-search", {"environment": environment(), **where, "methods": results})


if __name__ == "__main__":
    main()
