"""What ``import pliant`` offers: every name is there, the late ones too, and the functions for edits."""

import subprocess
import sys

import pytest

import pliant
from pliant.errors import EditError
from pliant.models import Delta, Edit


@pytest.mark.parametrize("name", pliant.__all__)
def test_every_name_is_there(name):
    assert getattr(pliant, name).__doc__


def test_what_is_not_needed_to_run_a_model_is_imported_late():
    program = (
        "import sys, pliant\n"
        "assert 'pliant.training' not in sys.modules and 'pliant.consolidation' not in sys.modules\n"
        "assert callable(pliant.consolidate) and callable(pliant.train)\n"
        "from pliant import consolidate, train\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'forget'"):
        _ = pliant.forget


@pytest.fixture
def model(make_converted):
    """A converted model with one edit."""
    model = make_converted("v1")
    weight = model.model.layers[1].mlp.down_proj.weight
    delta = Delta(left=weight.new_ones(weight.shape[0], 1), right=weight.new_ones(weight.shape[1], 1))
    model.edits.add(Edit(context="a fact", deltas={"layers.1.mlp.down_proj": delta}, id="00aabbcc"))
    return model


def test_edits_are_listed_and_reverted(model):
    (edit,) = pliant.edits(model)
    assert edit.context == "a fact"
    assert pliant.revert(model, "00aa") is edit
    assert pliant.edits(model) == []


def test_an_unknown_edit_and_another_model_are_named(model, make_base):
    with pytest.raises(EditError, match="got 'ff'"):
        pliant.revert(model, "ff")
    assert len(pliant.edits(model)) == 1
    for call in (pliant.edits, lambda other: pliant.revert(other, "00aabbcc")):
        with pytest.raises(EditError, match=r"model must be a pliant model; got LlamaForCausalLM\. Load it with"):
            call(make_base())
