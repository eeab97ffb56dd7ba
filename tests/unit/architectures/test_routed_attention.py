"""What an attention function is given where only some tokens run."""

import pytest
import torch
from torch import Tensor

from pliant.architectures.routing import Selection
from pliant.architectures.routing.attention import attention_arguments
from pliant.errors import ConfigError

LENGTH = 8


def arguments_for(
    places: list[list[int]],
    documents: list[list[int]] | None = None,
    implementation: str = "sdpa",
    window: int | None = None,
) -> dict[str, Tensor | None]:
    selection = Selection(places=torch.tensor(places), valid=None)
    rotary = torch.arange(LENGTH, dtype=torch.float32)[None, :, None].expand(1, LENGTH, 4)
    return attention_arguments(
        selection,
        None if documents is None else torch.tensor(documents),
        None,
        {"position_embeddings": (rotary, -rotary), "position_ids": torch.arange(LENGTH)[None]},
        length=LENGTH,
        implementation=implementation,
        window=window,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_plain_causal_attention_needs_no_mask_and_tokens_keep_their_own_positions(implementation: str) -> None:
    found = arguments_for([[0, 3, 6]], implementation=implementation)
    assert found["attention_mask"] is None
    assert found["position_ids"] is None
    cosine, sine = found["position_embeddings"]
    assert cosine[0, :, 0].tolist() == [0, 3, 6]
    assert sine[0, :, 0].tolist() == [0, -3, -6]


def test_documents_are_kept_apart() -> None:
    found = arguments_for([[0, 2, 5, 7]], [[0, 0, 0, 0, 1, 1, 1, 1]])["attention_mask"]
    assert found[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_a_window_counts_all_tokens_and_not_those_that_run() -> None:
    found = arguments_for([[0, 3, 4, 7]], window=4)["attention_mask"]
    assert found[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_eager_attention_is_given_numbers() -> None:
    found = arguments_for([[0, 3]], implementation="eager")["attention_mask"]
    lowest = torch.finfo(torch.float32).min
    assert found[0, 0].tolist() == [[0.0, lowest], [0.0, 0.0]]


def test_flash_attention_finds_the_documents_of_one_row_by_positions_that_start_anew() -> None:
    found = arguments_for([[0, 2, 5, 6, 7]], [[0, 0, 0, 0, 1, 1, 1, 2]], "flash_attention_2")
    assert found["attention_mask"] is None
    assert found["position_ids"].tolist() == [[0, 1, 0, 1, 0]]


@pytest.mark.parametrize(
    ("documents", "window"), [([[0, 0, 0, 0, 1, 1, 1, 1]] * 2, None), (None, 4)], ids=["rows", "window"]
)
def test_flash_attention_is_refused_where_it_would_need_a_mask(
    documents: list[list[int]] | None, window: int | None
) -> None:
    with pytest.raises(ConfigError, match="attn_implementation must be sdpa or eager"):
        arguments_for([[0, 2, 5, 7]] * 2, documents, "flash_attention_2", window)
