"""Results on disk: what a stop leaves, and what may not be mixed."""

from pathlib import Path

import pytest

from pliant.errors import ConfigError, DataError
from pliant.evaluation.records import Records, check_settings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "records.jsonl"


def test_records_are_read_again_in_order(path: Path):
    records = Records(path)
    assert len(records) == 0
    for name, value in (("b", 1.5), ("a", "ü")):
        records.append({"id": name, "value": value})
    assert path.read_bytes().count(b"\n") == 2
    again = Records(path)
    assert again.all() == records.all() == [{"id": "b", "value": 1.5}, {"id": "a", "value": "ü"}]
    assert "a" in again
    assert "c" not in again
    assert again["b"]["value"] == 1.5


@pytest.mark.parametrize("torn", [b'{"id": "b", "va', b'{"id": "b"}', b'{"value": 1}\n', b'{"id"\n', b"\x00\xff"])
def test_a_torn_last_line_is_dropped(path: Path, torn: bytes):
    Records(path).append({"id": "a"})
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    records = Records(path)
    assert records.all() == [{"id": "a"}]
    assert path.read_bytes() == whole
    records.append({"id": "b"})
    assert [record["id"] for record in Records(path).all()] == ["a", "b"]


def test_damage_before_the_last_line_is_refused(path: Path):
    records = Records(path)
    for name in "abc":
        records.append({"id": name})
    path.write_bytes(path.read_bytes().replace(b'{"id": "b"}', b'{"id": "b'))
    with pytest.raises(DataError, match="line 2 must be a record"):
        Records(path)


def test_what_cannot_be_kept_is_refused(path: Path):
    records = Records(path)
    records.append({"id": "a"})
    for record in ({"id": "a"}, {"value": 1}, {"id": 3}):
        with pytest.raises(DataError, match="id must be a text that is new"):
            records.append(record)
    with pytest.raises(DataError, match="record b must hold finite JSON values"):
        records.append({"id": "b", "value": float("nan")})
    assert Records(path).all() == [{"id": "a"}]


def test_settings_may_not_change(tmp_path: Path):
    file = tmp_path / "run" / "settings.json"
    check_settings(file, {"layers": (1, 2), "writer": "outer"})
    check_settings(file, {"layers": [1, 2], "writer": "outer"})
    for other in ({"layers": [1, 2], "writer": "ridge"}, {"layers": [1, 2]}, {}):
        with pytest.raises(ConfigError, match=r"output must be a new folder .* Choose another folder"):
            check_settings(file, other)
    assert [path.name for path in file.parent.iterdir()] == ["settings.json"]


def test_what_differs_is_named_however_deep(tmp_path: Path):
    file = tmp_path / "settings.json"
    check_settings(file, {"recipe": {"training.lr": 0.1, "data": {"size": 2, "kind": None}}})
    check_settings(file, {"recipe": {"training.lr": 0.1, "data": {"size": 2}, "new": None}})
    for recipe, told in (
        ({"training.lr": 0.2, "data": {"size": 2}}, r"; recipe\.training\.lr was 0\.1 in .* and is now 0\.2\. Choose"),
        ({"training.lr": 0.1, "data": {"size": 3}}, r"; recipe\.data\.size was 2 in .* and is now 3\. Choose"),
        ({"training.lr": 0.1}, r"; recipe\.data was \{'size': 2, 'kind': None\} in .* and is now None\. Choose"),
    ):
        with pytest.raises(ConfigError, match=told):
            check_settings(file, {"recipe": recipe})


@pytest.mark.parametrize(("text", "told"), [("{", "it is damaged"), ("[1]", "must hold settings by name; .* a list")])
def test_damaged_settings_are_told(tmp_path: Path, text: str, told: str):
    file = tmp_path / "settings.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"{told}.* Choose another output folder"):
        check_settings(file, {})
    assert file.read_text() == text
