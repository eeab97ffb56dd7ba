"""Which layers a selection names."""

from typing import Any

import pytest

from pliant.errors import ConversionError
from pliant.models import select_layers


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        ("all", 4, [0, 1, 2, 3]),
        ("upper_half", 4, [2, 3]),
        ("lower_half", 4, [0, 1]),
        ("upper_half", 5, [2, 3, 4]),
        ("lower_half", 5, [0, 1]),
        ("upper_half", 1, [0]),
        ("1-3", 5, [1, 2, 3]),
        ("8-15", 16, [8, 9, 10, 11, 12, 13, 14, 15]),
        ("2-2", 5, [2]),
        ("12", 16, [12]),
        (12, 16, [12]),
        (0, 1, [0]),
        ([3, 0, 2], 4, [0, 2, 3]),
        ((1,), 2, [1]),
        (range(1, 3), 4, [1, 2]),
        ({2, 1}, 4, [1, 2]),
        ("0,2-3", 4, [0, 2, 3]),
        (" 3 , 0 ", 4, [0, 3]),
    ],
)
def test_selection_names_sorted_indices(layers: Any, num_layers: int, expected: list[int]):
    assert select_layers(layers, num_layers) == expected


def test_generator_is_read_once():
    assert select_layers((i for i in (2, 0)), 3) == [0, 2]


def test_halves_share_no_layer_and_cover_all():
    for num_layers in range(2, 9):
        halves = select_layers("lower_half", num_layers) + select_layers("upper_half", num_layers)
        assert halves == list(range(num_layers))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([4], r"layers must be in 0\.\.3 \(the model has 4\); got 4 in \[4\]"),
        ([-1], r"must be in 0\.\.3 .*got -1"),
        (4, r"got 4 in 4"),
        ("2-4", r"got 4 in '2-4'"),
        ([True], r"got True"),
        ([], r"at least one layer; got \[\].*'all'"),
        ([1, 1], r"each layer once; got \[1, 1\]"),
        ("1,0-2", r"each layer once; got '1,0-2'"),
        ("3-1", r"must run upwards; got '3-1'\. Write '1-3'"),
        ("uper_half", r"got 'uper_half'\. Did you mean 'upper_half'\?"),
        ("", r"one of all, upper_half, lower_half, a range such as '8-15'.*got ''"),
        ("1-", r"got '1-'"),
        ("-1", r"got '-1'"),
        ("1-2-3", r"got '1-2-3'"),
        ("a-b", r"got 'a-b'"),
        ("1,,2", r"got ''"),
    ],
)
def test_selection_that_names_no_layers_of_the_model_is_refused(layers: Any, message: str):
    with pytest.raises(ConversionError, match=message):
        select_layers(layers, 4)


def test_lower_half_of_a_single_layer_is_refused():
    with pytest.raises(ConversionError, match="at least one layer; got 'lower_half'"):
        select_layers("lower_half", 1)
