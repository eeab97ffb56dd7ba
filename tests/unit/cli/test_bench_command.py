"""``pliant bench``: runs the scripts of a suite, and tells which ratio has become worse."""

import json
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
rows = [{"form": "a", "phase": "decode", "ratio": float(sys.argv[1]), "low": float(sys.argv[1]) - 0.01,
         "high": float(sys.argv[1]) + 0.01}]
with open(os.path.join(os.environ["PLIANT_BENCHMARK_RESULTS"], "quick.json"), "w") as file:
    json.dump({"environment": {"device": "x"}, "rows": rows, "stages": {"v1": {"time_ratio": 0.5}}}, file)
"""


@pytest.fixture
def folder(tmp_path: Path):
    """A folder of benchmarks with one script, whose stored ratio is 1.10."""

    def make(now: float, script: str = SCRIPT) -> Path:
        (tmp_path / "results").mkdir()
        (tmp_path / "suite.toml").write_text(f'[quick]\narguments = ["{now}"]\nresult = "quick.json"\n')
        (tmp_path / "quick.py").write_text(script)
        rows = [{"form": "a", "phase": "decode", "ratio": 1.1, "low": 1.08, "high": 1.12}]
        stored = {"environment": {"device": "y"}, "rows": rows, "stages": {"v1": {"time_ratio": 0.51}}}
        (tmp_path / "results" / "quick.json").write_text(json.dumps(stored))
        return tmp_path

    return make


@pytest.mark.parametrize(("now", "verdict"), [(1.3, "slower"), (1.11, "same"), (1.0, "faster")])
def test_a_ratio_is_slower_where_the_intervals_do_not_meet(folder, run, now, verdict):
    place = folder(now)
    found = run("bench", "--folder", place, "--json", exit_code=int(verdict == "slower"))
    ratio, stage = json.loads(found.stdout)
    assert (ratio["what"], ratio["stored"], ratio["now"], ratio["verdict"]) == ("a, decode", 1.1, now, verdict)
    assert (stage["what"], stage["verdict"]) == ("stages, v1, time ratio", "same")
    assert json.loads((place / "results" / "quick.json").read_text())["rows"][0]["ratio"] == 1.1


def test_the_new_results_are_kept_on_request(folder, run):
    place = folder(1.0)
    assert "faster" in run("bench", "quick", "--folder", place, "--keep").stdout
    assert json.loads((place / "results" / "quick.json").read_text())["rows"][0]["ratio"] == 1.0
    assert [file.name for file in (place / "results").iterdir()] == ["quick.json"]


def test_the_suite_is_listed_without_running_it(folder, run):
    assert "quick.py 1.0" in run("bench", "--list", "--folder", folder(1.0, script="raise SystemExit(7)")).stdout


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda place: (place / "suite.toml").unlink(), "--folder must hold"),
        (lambda place: (place / "suite.toml").write_text("[quick\n"), "suite.toml must give arguments and result"),
        (lambda place: (place / "suite.toml").write_text("[quick]\narguments = []\n"), "KeyError"),
        (lambda place: (place / "quick.py").write_text("raise SystemExit(3)"), "it ended with 3 and none"),
        (lambda place: (place / "results" / "quick.json").write_text("{"), "quick.json must be JSON"),
    ],
)
def test_what_is_wrong_is_named(folder, run, spoil, message):
    place = folder(1.0)
    spoil(place)
    assert message in " ".join(run("bench", "--folder", place, exit_code=1).stderr.split())


def test_an_unknown_name_is_answered_with_the_nearest(folder, run):
    assert "Did you mean 'quick'?" in run("bench", "quik", "--folder", folder(1.0), exit_code=1).stderr


def test_the_suite_of_the_project_names_scripts_that_are_there(run):
    root = Path(__file__).resolve().parents[3] / "benchmarks"
    listed = run("bench", "--list", "--folder", root).stdout.splitlines()
    assert len(listed) >= 4
    assert all(Path(line.split()[1]).is_file() for line in listed)
