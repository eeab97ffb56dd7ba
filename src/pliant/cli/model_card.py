"""The card of an exported model: its ``README.md``, from what the model and the files of its run say.

A card is made to be given away, so no path of this machine is in it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pliant.architectures import ARCHITECTURES, RoutedConfig, added_parameters
from pliant.cli.console import count_text, shortened
from pliant.cli.convert import describe_layers
from pliant.cli.report.sources import read_lines
from pliant.errors import DataError
from pliant.models import DynamicCausalLM
from pliant.models.bases import EMBEDDED
from pliant.training.checkpoints import BEST, step_of
from pliant.training.plan import CONFIG_FILE, METRICS_FILE

RESULTS_FILE = "results.json"
SETTINGS = {
    "objective": "training.objective",
    "trained": "training.trainable",
    "tokens a window": "data.max_length",
    "windows a batch": "training.batch_size",
    "batches a step": "training.gradient_accumulation_steps",
    "learning rate": "training.lr",
    "schedule": "training.lr_scheduler",
    "precision": "training.mixed_precision",
    "seed": "training.seed",
}
STDERR = "_stderr"
DATA_SUFFIXES = (".arrow", ".json", ".jsonl", ".parquet", ".txt")
"""Of data that is a file, not a data set of the hub."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the files of a training run say of it.

    Attributes:
        settings: Label → value.
        datasets: What it was trained on, without paths.
        steps: How many it had taken.
        first: Validation metrics before the first step.
        last: Those of its last evaluation until then.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    steps: int = 0
    first: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task; ``base`` is that of the unconverted base, where it was measured too."""

    task: str
    metric: str
    value: float
    error: float | None
    base: float | None
    shots: int | None
    samples: int | None


def find_run(model: str) -> Path | None:
    """Returns the folder of the training run that ``model`` is of, or a checkpoint of; ``None`` if it is of none."""
    folder = Path(model)
    places = (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,)
    return next((p for p in places if (p / CONFIG_FILE).is_file() and (p / METRICS_FILE).is_file()), None)


def read_run(folder: Path, checkpoint: str = "") -> Run:
    """Reads the configuration and the metrics of a run.

    Args:
        folder: Of the run.
        checkpoint: Name of the checkpoint in it that the account is to end at; anything else is its end.

    Raises:
        DataError: A file is damaged.
    """
    try:
        config = OmegaConf.load(folder / CONFIG_FILE)
        evaluations = [entry for entry in read_lines(folder / METRICS_FILE)[0] if "eval_perplexity" in entry]
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise DataError(
            f"{folder} must hold {CONFIG_FILE} and {METRICS_FILE} as a run writes them; reading failed: {error}. Move "
            "them away to export without an account of the training."
        ) from error
    values = {label: OmegaConf.select(config, key) for label, key in SETTINGS.items()}
    if OmegaConf.select(config, "data.mixed"):
        names = list(OmegaConf.select(config, "data.dataset_names") or ())
    else:
        names = [OmegaConf.select(config, "data.dataset_name")]
    last, steps = _reached(evaluations, checkpoint)
    return Run(
        settings={label: value for label, value in values.items() if value is not None},
        datasets=tuple(_public_name(str(name)) for name in names if name),
        steps=steps,
        first=next((entry for entry in evaluations if entry.get("step") == 0), {}),
        last=last,
    )


def _reached(evaluations: list[dict[str, Any]], checkpoint: str) -> tuple[Mapping[str, Any], int]:
    """The last evaluation of what a checkpoint holds, and its steps."""
    if checkpoint == BEST:
        of_training = [e for e in evaluations if e.get("step") and e["eval_perplexity"] is not None]
        evaluations = [min(of_training, key=lambda entry: entry["eval_perplexity"])] if of_training else evaluations
    elif (number := step_of(checkpoint)) is not None:
        return next((entry for entry in reversed(evaluations) if entry.get("step", 0) <= number), {}), number
    last = evaluations[-1] if evaluations else {}
    return last, last.get("step", 0)


def read_results(file: Path) -> list[Score]:
    """Reads the results of ``pliant evaluate`` or ``lm_eval``, which have the same form.

    Raises:
        DataError: The file is not there, or has another form.
    """
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        return [score for task, metrics in held["results"].items() for score in _scores(task, metrics, held)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"--results must be a JSON file whose 'results' map tasks to metrics, as lm-eval writes it; {str(file)!r} "
            f"is not: {error!r}. Write one: pliant evaluate MODEL"
        ) from error


def _scores(task: str, metrics: Mapping[str, Any], held: Mapping[str, Any]) -> list[Score]:
    scores = []
    base = held.get("pliant", {}).get("base", {}).get("results", {}).get(task, {})
    for key, value in metrics.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith(STDERR) or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{metric}{STDERR},{kind}")
        samples = held.get("n-samples", {}).get(task, {}).get("effective")
        scores.append(
            Score(
                task=task,
                metric=metric if kind == "none" else f"{metric} ({kind})",
                value=float(value),
                error=error if isinstance(error, float) and math.isfinite(error) else None,
                base=base.get(key),
                shots=held.get("n-shot", {}).get(task),
                samples=samples,
            )
        )
    return scores


def model_card(
    model: DynamicCausalLM,
    name: str,
    *,
    run: Run | None = None,
    scores: list[Score] | None = None,
    remote_code: bool = False,
) -> str:
    """Returns the card of ``model``, front matter included.

    Args:
        model: What is exported.
        name: What it is called: ``owner/name``, or the name of its folder.
        run: How it was trained.
        scores: What it was measured to do.
        remote_code: Whether its code lies beside it.
    """
    base, spec = model.spec.base.get("name") or "", model.spec
    scores = scores or []
    is_converted = bool(spec.layers)
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=score.task,
            dataset_name=score.task,
            metric_type=score.metric,
            metric_value=score.value,
        )
        for score in scores
    ]
    known = EMBEDDED.get(base)
    data = ModelCardData(
        base_model=(known.hub_id if known else base) if known or _is_hub_id(base) else None,
        license=known.licence.lower() if known else None,
        library_name="transformers" if remote_code or not is_converted else "pliant",
        model_name=name.rpartition("/")[2] if results else None,
        pipeline_tag="text-generation",
        datasets=[one for one in run.datasets if _is_hub_id(one)] or None if run else None,
        tags=["pliant", *([spec.architecture] if is_converted else []), *_forms(spec.layers)],
        eval_results=results or None,
    )
    sections = (
        f"# {name}",
        _about(model, known.hub_id if known else base),
        "## How it was made\n\n" + _making(model, run),
        "## Results\n\n" + _table(scores),
        "## Limits\n\n" + _limits(model),
        "## Licence\n\n" + _licence(known, base, with_code=remote_code and is_converted),
        "## How to load it\n\n" + _loading(name, is_converted=is_converted, remote_code=remote_code),
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _about(model: Any, base: str) -> str:
    of = f"`{_public_name(base)}`" if base else "a model with fresh weights"
    size = count_text(sum(parameter.numel() for parameter in model.parameters()))
    if not model.spec.layers:
        return f"{of} with {len(model.edits)} edits in its weights, by pliant. {size} parameters."
    added = count_text(sum(parameter.numel() for _, parameter in added_parameters(model)))
    summary = ARCHITECTURES[model.spec.architecture].summary
    return f"{of}, converted by pliant. {summary}. {size} parameters, of which the conversion added {added}."


def _making(model: Any, run: Run | None) -> str:
    lines = []
    if model.spec.layers:
        lines.append(f"- **Conversion:** layers {describe_layers(model.spec.layers)}.")
    if run is None:
        lines.append("- **Training:** no record of any beside the model.")
    else:
        told = ", ".join(f"{label} {value}" for label, value in run.settings.items())
        lines.append(f"- **Training:** {told}; data {', '.join(run.datasets)}; {run.steps} steps.")
        if run.first and run.last:
            base = run.last.get("eval_base_perplexity")
            beside = f", base {base:.4g}" if base is not None else ""
            before, after = (entry["eval_perplexity"] for entry in (run.first, run.last))
            lines.append(f"- **Validation perplexity:** {_number(before)} before, {_number(after)} after{beside}.")
    for edit in model.edits:
        lines.append(f"- **Edit {edit.id}**, {edit.created}: {shortened(edit.context, 200)}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _table(scores: list[Score]) -> str:
    if not scores:
        return "None were measured, or none were given to the export."
    rows = []
    for score in scores:
        shots, base = ("" if value is None else f"{value:.4g}" for value in (score.shots, score.base))
        value = f"{score.value:.4g}" + ("" if score.error is None else f" ± {score.error:.2g}")
        rows.append(f"| {score.task} | {shots} | {score.samples or ''} | {score.metric} | {value} | {base} |")
    head = (
        "| task | shots | samples | metric | value ± standard error | base |\n| --- | ---: | ---: | --- | ---: | ---: |"
    )
    return "\n".join((head, *rows))


def _limits(model: Any) -> str:
    lines = ["- What the base gets wrong, this model gets wrong too; what is not under Results was not measured."]
    if any(isinstance(layer, RoutedConfig) for layer in model.spec.layers.values()):
        lines.append(
            "- A token that skips a layer leaves no key there: generation needs a `DynamicCache` (the default), not a "
            "static one or continuous batching."
        )
    elif model.spec.layers:
        lines.append("- Its layers are not the base's: below full rank a conversion costs quality, and training may.")
    if len(model.edits):
        lines.append("- Its edits are in the weights and can no longer be listed or taken back.")
    return "\n".join(lines)


def _licence(known: Any, base: str, *, with_code: bool) -> str:
    if known:
        text = f"The weights derive from `{known.hub_id}`, whose licence is {known.licence}."
    elif base:
        text = f"The weights derive from `{_public_name(base)}`; its licence goes for them too. Name it here."
    else:
        text = "Not named. Name it here."
    return f"{text} The code beside the weights is under the MIT licence." if with_code else text


def _loading(name: str, *, is_converted: bool, remote_code: bool) -> str:
    trusting = ", trust_remote_code=True" if remote_code and is_converted else ""
    plain = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{trusting})
model = AutoModelForCausalLM.from_pretrained("{name}"{trusting})
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```"""
    if not is_converted:
        return plain
    own = f"""With pliant, which can also switch the change off, report it, train it and edit it:

```python
import pliant

model = pliant.load("{name}")
```"""
    if trusting:
        return f"Without pliant; the code of the model lies beside it:\n\n{plain}\n\n{own}"
    return own


def _forms(layers: Mapping[int, Any]) -> list[str]:
    return sorted({layer.form for layer in layers.values() if not isinstance(layer, RoutedConfig)})


def _is_hub_id(name: str) -> bool:
    is_file = Path(name).exists() or name[0] == "." or Path(name).suffix in DATA_SUFFIXES
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not is_file


def _public_name(name: str) -> str:
    """Returns a name without the folders that it lies in on this machine."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name
