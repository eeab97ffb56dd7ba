"""Every known data set by its real columns, local files, and what is said of those that cannot be read."""

import datasets
import pytest

from pliant.config import DataConfig
from pliant.data import DATASETS, loading
from pliant.data.loading import open_documents
from pliant.data.mixture import eval_members, train_members
from pliant.data.sources import find_source
from pliant.errors import ConfigError, DataError

C4 = [{"text": "A page.", "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"}]
PAJAMA = [{"text": "A page.", "meta": {"redpajama_set_name": "RedPajamaC4"}}]
LINES = [
    "",
    " = Valkyria = \n",
    "",
    " A game . \n",
    " = = Plot = = \n",
    " = 2 = \n",
    "",
    " = Robert = \n",
    "",
    " He acts . \n",
]
OASST_SHAPE = {
    "user_id": "u",
    "created_date": "2023-02-05T14:23:50",
    "lang": "en",
    "deleted": False,
    "synthetic": False,
}
TREE = [
    ("a", None, "prompter", "Hi", None),
    ("b", "a", "assistant", "Worse", 1),
    ("z", None, "prompter", "Nobody answers", None),
    ("c", "a", "assistant", "Best", 0),
    ("d", "c", "prompter", "More", None),
    ("e", "b", "prompter", "Other branch", None),
    ("f", "d", "assistant", "Sure", 0),
]
OASST = [
    OASST_SHAPE | {"message_id": m, "parent_id": p, "role": role, "text": text, "rank": rank, "message_tree_id": "a"}
    for m, p, role, text, rank in TREE
]
ALPACA = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "Below is an instruction…"},
    {"instruction": "Greet.", "input": "", "output": "Hello", "text": "Below is an instruction…"},
]
DOLLY = [{"instruction": "Who?", "context": "Ann won.", "response": "Ann", "category": "closed_qa"}]
ULTRACHAT = [
    {
        "prompt": "Hi",
        "prompt_id": "f0e37e",
        "messages": [{"content": "Hi", "role": "user"}, {"content": "Hello", "role": "assistant"}],
    }
]


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


KNOWN = {
    "wikitext": (
        [{"text": line} for line in LINES],
        [" \n = Valkyria = \n \n A game . \n = = Plot = = \n = 2 = \n \n", " = Robert = \n \n He acts . \n"],
    ),
    "slimpajama": (PAJAMA, ["A page."]),
    "c4": (C4, ["A page."]),
    "openwebtext": ([{"text": "A page."}], ["A page."]),
    "pile-subset": ([{"text": "A page."}], ["A page."]),
    "c4-subset": (C4, ["A page."]),
    "redpajama-subset": ([PAJAMA[0] | {"__index_level_0__": 0}], ["A page."]),
    "ultrachat_200k": (ULTRACHAT, [chat("Hi", "Hello")]),
    "alpaca": (ALPACA, [chat("Add.\n\n1 and 2", "3"), chat("Greet.", "Hello")]),
    "dolly-15k": (DOLLY, [chat("Who?\n\nAnn won.", "Ann")]),
    "metamathqa": (
        [{"type": "GSM", "query": "1 + 1?", "response": "It is 2.", "original_question": "?"}],
        ["Question: 1 + 1? Think step by step.\nAnswer: It is 2."],
    ),
    "oasst1": (OASST, [chat("Hi", "Best", "More", "Sure")]),
}
HUB_IDS = (
    *("cerebras/SlimPajama-627B", "allenai/c4", "HuggingFaceH4/ultrachat_200k", "tatsu-lab/alpaca"),
    *("databricks/databricks-dolly-15k", "OpenAssistant/oasst1"),
)


@pytest.fixture
def hub(monkeypatch, write):
    """A function that serves records in place of the hub, and the calls that reached it."""
    calls = []

    def serve(records):
        path = write("hub.jsonl", records)

        def load(hub_id, **options):
            calls.append((hub_id, options))
            return datasets.load_dataset("json", data_files=path, split="train", streaming=options["streaming"])

        monkeypatch.setattr(loading, "load_dataset", load)
        return calls

    return serve


def contents(config: DataConfig, kind: str) -> list:
    (member,) = train_members(config)
    column = "text" if kind == "text" else "messages"
    return [document[column] for document in open_documents(member, kind=kind, streaming=config.streaming)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", DATASETS)
def test_records_of_known_data_sets_become_documents(name, streaming, hub):
    records, expected = KNOWN[name]
    calls = hub(records)
    source = DATASETS[name]
    assert contents(DataConfig(dataset_name=name, streaming=streaming), source.kind) == expected
    ((hub_id, options),) = calls
    assert (hub_id, options["name"], options["split"]) == (source.hub_id, source.config, source.split)
    assert options["streaming"] is streaming


def test_every_name_of_the_documents_is_known():
    names = ("wikitext", "c4", "openwebtext", "pile-subset", "c4-subset", "redpajama-subset")
    for name in (*names, *HUB_IDS, "ultrachat_200k", "alpaca", "dolly-15k", "oasst1"):
        assert find_source(name) is not None, name
    assert find_source("allenai/c4") is DATASETS["c4"]


def test_splits_and_configuration_can_be_chosen(hub):
    hub(KNOWN["wikitext"][0])
    config = DataConfig(dataset_name="wikitext", dataset_config="wikitext-2-raw-v1", train_split="test")
    (member,) = train_members(config)
    assert member.place == "hub Salesforce/wikitext wikitext-2-raw-v1 split test"
    (validating,) = eval_members(config)
    assert validating.place == "hub Salesforce/wikitext wikitext-2-raw-v1 split validation"
    (other,) = eval_members(DataConfig(dataset_name="openwebtext", eval_dataset_name="some/other"))
    assert other.place == "hub some/other split validation"
    assert eval_members(DataConfig(dataset_name="openwebtext")) == []


def test_settings_of_a_mixture_leave_known_members_alone():
    config = DataConfig(
        mixed=True,
        dataset_names=["alpaca", "embedded", "some/other"],
        dataset_weights=[0.25, 0.25, 0.5],
        train_split="x",
        text_column="y",
    )
    *known, other = train_members(config)
    assert [(member.split, member.column) for member in known] == [("train", None)] * 2
    assert (other.split, other.column) == ("x", "y")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "arrow", "json.gz"])
def test_local_formats(ending, streaming, tmp_path):
    records = datasets.Dataset.from_list([{"content": "One.", "n": 1}, {"content": "Two.", "n": 2}])
    path = tmp_path / f"data.{ending}"
    if ending == "parquet":
        records.to_parquet(path)
    elif ending == "arrow":
        records.save_to_disk(tmp_path / "saved")
        path = tmp_path / "saved"
    else:
        records.to_json(path, compression="gzip" if ending.endswith("gz") else None)
    config = DataConfig(dataset_name=str(path), text_column="content", streaming=streaming)
    assert contents(config, "text") == ["One.", "Two."]


def test_each_text_file_of_a_folder_is_a_document(write, tmp_path):
    write("texts/b.txt", "Second.\n\nStill second.")
    write("texts/a.txt", "First.")
    write("texts/.hidden.txt", "No.")
    write("texts/readme.md", "No.")
    config = DataConfig(dataset_name=str(tmp_path / "texts"))
    assert contents(config, "text") == ["First.", "Second.\n\nStill second."]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (ULTRACHAT[0], chat("Hi", "Hello")),
        (ALPACA[0], chat("Add.\n\n1 and 2", "3")),
        ({"instruction": "Greet.", "output": "Hello"}, chat("Greet.", "Hello")),
        (DOLLY[0], chat("Who?\n\nAnn won.", "Ann")),
        ({"prompt": "Hi", "completion": "Hello"}, chat("Hi", "Hello")),
        ({"prompt": chat("Hi"), "completion": [{"role": "assistant", "content": "Hello"}]}, chat("Hi", "Hello")),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            chat("Hi", "Hello"),
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_chat_layouts_are_told_by_their_columns(record, expected, streaming, write):
    config = DataConfig(dataset_name=write("chat.jsonl", [record]), streaming=streaming)
    assert contents(config, "chat") == [expected]


def test_column_of_messages_can_be_named(write):
    path = write("chat.jsonl", [{"dialogue": chat("Hi", "Hello")}])
    assert contents(DataConfig(dataset_name=path, text_column="dialogue"), "chat") == [chat("Hi", "Hello")]


def test_naming_the_own_column_changes_nothing(hub):
    records, expected = KNOWN["wikitext"]
    hub(records)
    assert contents(DataConfig(dataset_name="wikitext", text_column="text"), "text") == expected


def test_alpaca_can_be_read_as_text(hub):
    hub(ALPACA)
    assert contents(DataConfig(dataset_name="alpaca", text_column="text"), "text")[0] == "Below is an instruction…"


BAD_FILES = [
    ("missing.jsonl", None, {}, r"missing\.jsonl' does not exist"),
    ("empty.jsonl", b"", {}, r"empty\.jsonl' must hold some records; it is empty"),
    ("blank.txt", b" \n", {}, "must hold some text; it is empty"),
    ("latin.txt", b"Z\xfcrich", {}, "byte 1 is not"),
    ("broken.jsonl", b'{"text": "a"}\n{"text', {}, "cannot be read"),
    ("broken.parquet", b"no parquet file", {}, "cannot be read as parquet: Parquet magic bytes"),
    ("broken.arrow", b"no arrow file at all", {}, "cannot be read as arrow"),
    ("table.csv", b"text\na\n", {}, r"must be a file with one of the endings \.txt, \.jsonl"),
    ("c.jsonl", b'{"txt": "a", "id": 1}\n', {}, r"no column 'text'; it has txt, id\. Did you mean 'txt'\?"),
    ("d.jsonl", b'{"body": "a"}\n', {"text_column": "bdy"}, "no column 'bdy'; it has body. Did you mean 'body'"),
    ("e.jsonl", b'{"text": 3}\n', {}, "must name a column of text; 'text' of .* holds Value"),
    ("f.jsonl", b'{"prompt": "a", "completion": "b"}\n', {}, "holds conversations, but this objective reads texts"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "content", "options", "message"), BAD_FILES, ids=[bad[0] for bad in BAD_FILES])
def test_unusable_files_are_named(name, content, options, message, streaming, write, tmp_path):
    path = str(tmp_path / name) if content is None else write(name, content)
    if streaming and name == "e.jsonl":
        pytest.skip("a stream's types show when it is read")
    config = DataConfig(dataset_name=path, streaming=streaming, **options)
    with pytest.raises(DataError, match=message) as caught:
        contents(config, "text")
    assert name in str(caught.value)


BAD_CHATS = [
    ({"text": "a"}, r"layouts messages; conversations; prompt and completion.*has the columns text"),
    (
        {"messages": [{"role": "assistantt", "content": "a"}]},
        r"role must be one of .* 'assistantt'\. Did you mean 'assistant'",
    ),
    ({"messages": [{"role": "user", "content": None}]}, r"content must be text; got None \(role 'user'\)"),
    ({"messages": "Hi"}, "must be a list of messages; got 'Hi'"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("record", "message"), BAD_CHATS)
def test_unusable_conversations_are_refused(record, message, streaming, write):
    with pytest.raises(DataError, match=message):
        contents(DataConfig(dataset_name=write("chat.jsonl", [record]), streaming=streaming), "chat")


def test_folders_that_cannot_be_one_data_set(write, tmp_path):
    write("mixed/a.txt", "A")
    write("mixed/b.jsonl", [{"text": "B"}])
    with pytest.raises(DataError, match="files of one format; got json, text"):
        contents(DataConfig(dataset_name=str(tmp_path / "mixed")), "text")
    one = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(train=one, test=one).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        contents(DataConfig(dataset_name=str(tmp_path / "splits")), "text")
    assert contents(DataConfig(dataset_name=str(tmp_path / "splits" / "train")), "text") == ["a"]


@pytest.mark.parametrize("key", ["dataset_config", "train_split", "eval_split"])
def test_parts_of_local_files_are_refused(key, write):
    path = write("a.jsonl", [{"text": "a"}])
    config = DataConfig(dataset_name=path, **{key: "x"})
    with pytest.raises(ConfigError, match=rf"data\.{key} chooses a part .* 'x'"):
        train_members(config)


def test_eval_split_is_that_of_the_other_data_set(write):
    path = write("a.jsonl", [{"text": "a"}])
    config = DataConfig(dataset_name=path, eval_dataset_name="c4", eval_split="x")
    assert [member.place for member in train_members(config)] == [f"local {path}"]
    assert [member.place for member in eval_members(config)] == ["hub allenai/c4 en split x"]
    with pytest.raises(ConfigError, match=r"data\.eval_split chooses .* data\.eval_dataset_name="):
        eval_members(DataConfig(dataset_name="c4", eval_dataset_name=path, eval_split="x"))


def test_known_data_set_of_the_other_kind_is_refused(hub):
    hub(C4)
    with pytest.raises(DataError, match=r"'c4' holds texts, but this objective reads conversations.*causal_lm"):
        contents(DataConfig(dataset_name="c4"), "chat")
    hub(ALPACA)
    with pytest.raises(DataError, match=r"'alpaca' holds conversations, but this objective reads texts.*sft"):
        contents(DataConfig(dataset_name="alpaca"), "text")


def raising(error):
    def load(*args, **options):
        raise error

    return load


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "wikitex",
            ConnectionError("offline"),
            r"'wikitex' cannot be reached .*offline\. Did you mean 'wikitext'\?.*embedded",
        ),
        ("c4", ConnectionError("offline"), r"'c4' cannot be reached \(hub allenai/c4 en split train\)"),
        ("alapca", datasets.exceptions.DatasetNotFoundError("no"), r"no data set on the hub.* Did you mean 'alpaca'\?"),
        ("a/b", ValueError("Unknown split \"train\". Should be one of ['x']."), r"hub a/b split train: Unknown split"),
        ("a/b", RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer supported"),
    ],
)
def test_what_the_hub_refuses_is_explained(name, error, message, monkeypatch):
    monkeypatch.setattr(loading, "load_dataset", raising(error))
    with pytest.raises(DataError, match=message):
        contents(DataConfig(dataset_name=name), "text")
