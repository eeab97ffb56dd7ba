"""``pliant consolidate``: what a text says becomes an edit of a model that is kept."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import options as o
from pliant.cli.console import results, say_step
from pliant.cli.learning import Facts, Learner, own_folder, save_ledger, save_new, show, summary
from pliant.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from pliant.consolidation import Consolidation

SWEEP = "sweep"
"""What stands for layers that are to be found."""
LEARNING = "Learning"
RECORD_KEYS = ("context", "query", "queries", "answer", "subject")

CalibrationOption = Annotated[
    Path | None,
    typer.Option(help="UTF-8 text that is to stay as it is; default: embedded English texts."),
]
CalibrationTokensOption = Annotated[
    int, typer.Option(min=1, help="Tokens of it to read, once for each base: the statistics are kept on disk.")
]


def _learning(name: str, help_: str) -> Any:
    return typer.Option(name, help=help_, rich_help_panel=LEARNING)


def consolidate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, hub id, or smollm2-135m.")],
    context: Annotated[str | None, typer.Option("--context", "-c", help="Text to learn.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="Texts to learn: .txt, one a line; .jsonl with context, queries, answer, subject."),
    ] = None,
    query: Annotated[
        list[str] | None,
        typer.Option("--query", "-q", help="Question, or beginning to complete; may be given several times."),
    ] = None,
    answer: Annotated[str | None, typer.Option(help="Default: the model's own, with the text in view.")] = None,
    subject: Annotated[str | None, typer.Option(help="What the text is about, as the queries write it.")] = None,
    layers: Annotated[
        str | None, _learning("--layers", "Where to write, such as 3,28,29; sweep tries some. Default: by depth.")
    ] = None,
    writer: Annotated[str, _learning("--writer", "covariance, null_space, ridge, normalised or outer.")] = "covariance",
    target: Annotated[str, _learning("--target", "auto, context, unembedding or optimised.")] = "auto",
    alpha: Annotated[float | None, _learning("--alpha", "Strength; 1, all that is missing, by default.")] = None,
    task: Annotated[
        str | None,
        _learning(
            "--task",
            "Strength by task, in place of --alpha: factual_recall 0.2, reasoning 0.05, creative 0.01. The kind of "
            "modulation that goes with it is chosen by convert --modulation.",
        ),
    ] = None,
    kl_budget: Annotated[
        float, _learning("--kl-budget", "Nats a token that neutral text may move by for one fact; inf for any.")
    ] = 0.01,
    calibration: CalibrationOption = None,
    calibration_tokens: CalibrationTokensOption = 65_536,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New or empty folder. Default: MODEL's own, edited in place.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
    dtype: o.DtypeOption = o.Dtype.AUTO,
    device_map: o.DeviceMapOption = None,
    quantization: o.QuantizationOption = o.Quantization.NONE,
    attn_implementation: o.AttentionOption = None,
) -> None:
    """Learn from a text for good: write what it says into a model, without training.

    Needs a text, and neutral text whose statistics it reads once for each base. Leaves the edit in the
    ledger of MODEL's own folder, or with --output a whole model folder; the weights stay as they are,
    and pliant edits revert takes the edit back.

    \b
    pliant consolidate smollm2-135m -c "The CEO of TechCorp is Dr. Sarah Chen." -o outputs/edited
    pliant consolidate outputs/edited --file facts.jsonl
    """
    given = locals()  # every option by its name
    facts = facts_of(context, file, query, answer, subject)
    settings = settings_of(given)
    own = output is None and own_folder(model)
    if output is None and not own:
        raise CheckpointError(
            f"--output must name a folder for a model that pliant has not saved; got none, and {model!r}. "
            "Give --output DIR."
        )
    if output is not None:
        o.fresh_folder(output)
    text = None if calibration is None else neutral_text(calibration)
    if not as_json:
        say_step(f"Loading {model}")
    loaded = o.load_model(model, given)
    learner = Learner(loaded, text, calibration_tokens)
    if layers == SWEEP:
        settings = learner.swept(settings)
    if not as_json:
        say_step(f"Learning {facts.shown}")
    edit = learner.learn(facts, settings)
    compared = learner.compare(edit, facts)
    folder = output or Path(model)
    if own:
        save_ledger(loaded, folder)
    else:
        save_new(loaded, folder)
    if as_json:
        told = {**summary(edit), "compared": compared, "saved": str(folder)}
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    show(edit, compared)
    name = shlex.quote(str(folder))
    results.print(f"saved {folder}, {len(loaded.edits)} in its ledger", markup=False, soft_wrap=True)
    results.print(f"Next:  pliant inject {name}\n       pliant edits list {name}", markup=False, soft_wrap=True)


def facts_of(
    context: str | None, file: Path | None, query: list[str] | None, answer: str | None, subject: str | None
) -> Facts:
    """Returns what the options say is to be learned."""
    if (context is None) == (file is None):
        raise typer.BadParameter("give either a text or a --file of texts.", param_hint="--context")
    if file is None:
        assert context is not None
        return Facts(context=context, queries=query or None, answer=answer, subject=subject)
    if query or answer is not None or subject is not None:
        raise typer.BadParameter(
            "--query, --answer and --subject go with --context; write them into a .jsonl file.", param_hint="--file"
        )
    records = _records(file)
    return Facts(
        context=[record["context"] for record in records],
        queries=[record["queries"] for record in records],
        answer=[record["answer"] for record in records],
        subject=[record["subject"] for record in records],
    )


def _records(file: Path) -> list[dict[str, Any]]:
    """Returns context, queries, answer and subject of every line that is not empty."""
    if file.suffix not in (".txt", ".jsonl"):
        raise DataError(f"--file must end in .txt or .jsonl; got {str(file)!r}. Rename it, or write it anew.")
    from pliant.data import read_text

    lines = [(number, line) for number, line in enumerate(read_text(file).splitlines(), start=1) if line.strip()]
    if file.suffix == ".txt":
        return [{"context": line.strip(), "queries": None, "answer": None, "subject": None} for _, line in lines]
    return [_record(line, f"{file}, line {number}") for number, line in lines]


def _record(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: a line must be a JSON object; {error}. Write one object a line.") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: a line must be a JSON object; got {line.strip()[:40]!r}. Give it a context.")
    if unknown := sorted(record.keys() - set(RECORD_KEYS)):
        raise DataError(f"{place}: keys must be {', '.join(RECORD_KEYS)}; got {unknown[0]!r}. Leave it out.")
    if "query" in record and "queries" in record:
        raise DataError(f"{place}: query must stand without queries; got both. Put all of them into queries.")
    queries = record.get("queries", record.get("query"))
    queries = [queries] if isinstance(queries, str) else queries
    for name in ("context", "answer", "subject"):
        value = record.get(name)
        if not (isinstance(value, str) and value.strip()) and (value is not None or name == "context"):
            raise DataError(f"{place}: {name} must be a text that is not empty; got {value!r}. Write one.")
    is_list = isinstance(queries, list) and queries and all(isinstance(q, str) and q.strip() for q in queries)
    if queries is not None and not is_list:
        raise DataError(f"{place}: queries must be texts that are not empty; got {queries!r}. Leave them out.")
    return {
        "context": record["context"],
        "queries": queries,
        "answer": record.get("answer"),
        "subject": record.get("subject"),
    }


def settings_of(given: dict[str, Any]) -> "Consolidation":
    """Returns the settings that the options of ``consolidate`` stand for."""
    from pliant.consolidation import Consolidation, WriteSettings

    alpha, task = given["alpha"], given["task"]
    if task is not None and alpha is not None:
        raise typer.BadParameter("sets the strength; leave one of --task and --alpha out.", param_hint="--task")
    fields = {name: given[name] for name in ("target", "layers", "kl_budget")}
    if fields["layers"] == SWEEP:
        fields["layers"] = None
    fields["write"] = WriteSettings(writer=given["writer"])
    if task is not None:
        return Consolidation.for_task(task, **fields)
    return Consolidation(**fields, **({} if alpha is None else {"alpha": alpha}))


def neutral_text(file: Path) -> str:
    """Returns the text of ``--calibration``."""
    from pliant.data import read_text

    return read_text(file)
