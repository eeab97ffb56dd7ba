"""Several modules become one that defines the same, and what cannot is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pliant.models.flatten import SourceError, flatten

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function that writes the modules of a package."""

    def make(**modules: str) -> Path:
        for name, text in modules.items():
            file = tmp_path / f"{name.replace('__', '/')}.py"
            if name.endswith("_init"):
                file = tmp_path / name.removesuffix("_init") / "__init__.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return tmp_path

    return make


def flat(folder: Path, root: str = "main.answer", **options: Any) -> str:
    module, _, name = f"package.{root}".rpartition(".")
    return flatten(folder, "package", [(module, name)], **options)


def run(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "flat"}
    exec(compile(text, "flat.py", "exec"), names)
    return names


def test_modules_come_in_the_order_of_their_imports(write: Write):
    folder = write(
        main="from package.parts import Part, table\n\ndef answer():\n    return Part().value + table['x'] + late()\n\n"
        "def late():\n    return LATE\n\nLATE = 1\nUNUSED = missing\n",
        parts_init="from package.parts.first import Part\nfrom package.parts.second import ten\n"
        "\ntable = {'x': ten()}\n",
        parts__first="class Part:\n    value = 100\n\nclass Unused:\n    pass\n",
        parts__second="def ten():\n    return 10\n",
    )
    text = flat(folder)
    assert run(text)["answer"]() == 111
    assert "nused" not in text.lower()
    assert "package" not in text


def test_comments_texts_and_decorators_stay_and_shapes_go(write: Write):
    folder = write(
        main="from dataclasses import dataclass\nfrom jaxtyping import Float\nfrom typing import Any\n\nTensor = list\n"
        'Rows = Float[Tensor, "batch é"] | None\n"""A table."""\n\n'
        "# Why it is so.\n@dataclass(frozen=True)\nclass answer:\n    rows: Rows\n"
        '    more: Float[Tensor, "é b"] | Any = None  # why not\n',
    )
    text = flat(folder)
    assert "Rows = Tensor | None\n" in text
    assert '"""A table."""' in text
    assert "# Why it is so.\n@dataclass(frozen=True)\nclass answer:" in text
    assert "    more: Tensor | Any = None  # why not" in text
    assert "jaxtyping" not in text
    assert run(text)["answer"]([1]).rows == [1]


def test_methods_that_are_not_kept_are_left_out_with_what_they_need(write: Write):
    folder = write(
        main="from package.heavy import helper\n\nclass answer:\n    '''A class.'''\n\n    size: int = 2\n\n"
        "    @property\n    def half(self):\n        return self.size / 2\n\n"
        "    @property\n    def other(self):\n        import numpy\n        return helper(numpy)\n",
        heavy="import pandas\n\ndef helper(x):\n    return pandas.x\n",
    )
    text = flat(folder, kept={"answer": ("half",)})
    assert run(text)["answer"]().half == 1
    assert "other" not in text
    assert "pandas" not in text
    assert "numpy" not in text


def test_one_definition_in_two_modules_is_taken_once(write: Write):
    folder = write(
        main="from package.other import twice\n\nSIZE = 2  # here\n\ndef answer():\n    return SIZE + twice()\n",
        other="SIZE = 2\n\ndef twice():\n    return 2 * SIZE\n",
    )
    text = flat(folder)
    assert text.count("SIZE = 2") == 1
    assert run(text)["answer"]() == 6


REFUSED = {
    "two meanings": (
        {
            "main": "from package.other import twice\nSIZE = 3\ndef answer():\n    return SIZE + twice()\n",
            "other": "SIZE = 2\ndef twice():\n    return 2 * SIZE\n",
        },
        r"SIZE is defined by package\.other and, differently, by package\.main",
    ),
    "an import of the same name": (
        {
            "main": "from package.other import field\ndef answer():\n    return field\n",
            "other": "from package.third import fields\ndef field():\n    return fields\n",
            "third": "from dataclasses import field\ndef fields():\n    return field\n",
        },
        r"package\.other\.field: field is imported elsewhere",
    ),
    "two imports of one name": (
        {
            "main": "from copy import copy\nfrom package.other import it\ndef answer():\n    return it, copy\n",
            "other": "from shutil import copy\ndef it():\n    return copy\n",
        },
        "copy means 'from .* import copy' in one module",
    ),
    "a builtin": ({"main": "def answer():\n    return filter\nfilter = 3\n"}, "a builtin"),
    "another name": (
        {
            "main": "from package.other import one as two\ndef answer():\n    return two\n",
            "other": "one = 1\n",
        },
        "imports one as two",
    ),
    "a whole module": (
        {"main": "from package import other\ndef answer():\n    return other.one\n", "_init": "", "other": "one = 1\n"},
        "defines no other",
    ),
    "an effect": ({"main": "answer = []\nanswer.append(1)\n"}, "line 2: a statement that binds no name"),
    "an assignment to a part": ({"main": "answer = [0]\nanswer[0] = 1\n"}, "line 2: a statement that binds no name"),
    "a foreign package": ({"main": "import numpy\ndef answer():\n    return numpy\n"}, "'import numpy' brings"),
    "a foreign package, late": ({"main": "def answer():\n    import numpy\n"}, "imports numpy, which may not be"),
    "a late import of its own": (
        {"main": "def answer():\n    from package.other import one\n", "other": "one = 1\n"},
        "import it at the top",
    ),
    "a relative import": ({"main": "from . import other\ndef answer():\n    pass\n"}, "imports must be absolute"),
    "an import without names": ({"main": "import package.other\ndef answer():\n    pass\n"}, "must name what"),
    "a missing name": ({"main": "one = 1\n"}, "package.main defines no answer"),
    "a shape used as a value": (
        {"main": "from jaxtyping import Float\ndef answer(x):\n    return isinstance(x, Float)\n"},
        "uses Float for more than a shape",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_its_meaning_is_refused(write: Write, case: str):
    modules, message = REFUSED[case]
    with pytest.raises(SourceError, match=message):
        flat(write(**modules))
