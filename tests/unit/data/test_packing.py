"""Rows of several documents: every token once, and none sees another document."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.data.collator import Collator
from pliant.data.packing import IGNORED, encode_texts, packed_rows, single_rows

PAD = 0


def encoded(*lengths: int) -> list[dict[str, list[int]]]:
    """Make documents of the given lengths whose tokens all differ."""
    ids, start = [], 1
    for length in lengths:
        ids.append(list(range(start, start + length)))
        start += length
    return [{"input_ids": document, "labels": document} for document in ids]


def segments(row: dict) -> list[list[int]]:
    """Cut a row where positions start from 0."""
    starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
    return [row["input_ids"][a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]


def test_documents_fill_rows_in_their_order():
    rows = list(packed_rows(encoded(3, 4, 5), max_length=5, split=True, pad_id=PAD, keep_partial=True))
    assert [row["input_ids"] for row in rows] == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, PAD, PAD, PAD]]
    assert [row["position_ids"] for row in rows] == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2], [0, 1, 0, 1, 2]]
    no = IGNORED
    assert [row["labels"] for row in rows] == [[no, 2, 3, no, 5], [no, 7, no, 9, 10], [no, 12, no, no, no]]
    assert [row["row"] for row in rows] == [0, 1, 2]


@pytest.mark.parametrize(("lengths", "rows"), [((7,), 1), ((3,), 1), ((10,), 2), ((), 0)])
def test_last_partial_row_is_left_out_unless_it_is_alone(lengths, rows):
    packed = packed_rows(encoded(*lengths), max_length=5, split=True, pad_id=PAD, keep_partial=False)
    assert len(list(packed)) == rows


@given(
    st.lists(st.integers(1, 23), max_size=12),
    st.integers(2, 9),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_every_token_is_in_one_row(lengths, max_length, split):
    documents = encoded(*(length if split else min(length, max_length) for length in lengths))
    rows = list(packed_rows(documents, max_length=max_length, split=split, pad_id=PAD, keep_partial=True))
    everything = [token for document in documents for token in document["input_ids"]]
    assert [token for row in rows for token in row["input_ids"] if token != PAD] == everything
    ends = {document["input_ids"][-1] for document in documents}
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) == max_length
        for segment in segments(row):
            assert segment == ([PAD] * len(segment) if segment[0] == PAD else [*range(segment[0], segment[-1] + 1)])
            assert not ends & set(segment[:-1])
        for token, label, position in zip(row["input_ids"], row["labels"], row["position_ids"], strict=True):
            assert label == (IGNORED if position == 0 or token == PAD else token)


def test_conversations_stay_whole():
    rows = list(packed_rows(encoded(3, 4, 2), max_length=6, split=False, pad_id=PAD, keep_partial=False))
    assert [row["input_ids"] for row in rows] == [[1, 2, 3, PAD, PAD, PAD], [4, 5, 6, 7, 8, 9]]


def test_single_rows_are_cut_and_need_something_to_predict():
    rows = list(single_rows(encoded(3, 1, 9), max_length=4))
    assert [row["input_ids"] for row in rows] == [[1, 2, 3], [5, 6, 7, 8]]
    assert [row["labels"][0] for row in rows] == [IGNORED, IGNORED]
    assert "position_ids" not in rows[0]


def test_texts_end_with_one_end_token(byte_tokenizer):
    end = byte_tokenizer.eos_token_id
    batch = encode_texts({"text": ["ab", " \n", None, "c<|im_end|>"]}, byte_tokenizer)
    assert [byte_tokenizer.decode(ids) for ids in batch["input_ids"]] == ["ab<|im_end|>", "c<|im_end|>"]
    assert all(ids.count(end) == 1 for ids in batch["input_ids"])


def test_collator_pads_on_the_right():
    batch = Collator(PAD)([*single_rows(encoded(2, 4), max_length=9)])
    assert batch["input_ids"].tolist() == [[1, 2, PAD, PAD], [3, 4, 5, 6]]
    assert batch["labels"].tolist() == [[IGNORED, 2, IGNORED, IGNORED], [IGNORED, 4, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["row"].tolist() == [0, 1]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert "position_ids" not in batch


def test_collator_keeps_positions_and_makes_no_mask():
    rows = [*packed_rows(encoded(3, 3), max_length=4, split=True, pad_id=PAD, keep_partial=True)]
    rows[1] = {name: value[:3] if name != "row" else value for name, value in rows[1].items()}
    batch = Collator(PAD)(rows)
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("base", ["llama", "mistral", "qwen3"])
def test_packed_documents_get_the_logits_they_get_alone(make_base, base, attention):
    model = make_base(base)
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 97, (length,), generator=generator).tolist() for length in (7, 5, 11, 1, 6)]
    documents = [{"input_ids": document, "labels": document} for document in ids]
    rows = list(packed_rows(documents, max_length=16, split=True, pad_id=PAD, keep_partial=True))
    assert len(rows) == 2
    batch = Collator(PAD)(rows)
    with torch.no_grad():
        packed = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for row, logits in zip(rows, packed, strict=True):
            start = 0
            for segment in segments(row):
                alone = model(torch.tensor([segment]), use_cache=False).logits[0]
                torch.testing.assert_close(logits[start : start + len(segment)], alone, rtol=0, atol=1e-5)
                start += len(segment)


def test_flattened_batch_is_one_row_of_the_same_documents(make_base):
    model = make_base()
    rows = [*packed_rows(encoded(7, 6, 11), max_length=8, split=True, pad_id=PAD, keep_partial=True)]
    with torch.no_grad():
        batch, flat = Collator(PAD)(rows), Collator(PAD, flatten=True)(rows)
        expected = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        actual = model(flat["input_ids"], position_ids=flat["position_ids"], use_cache=False).logits
    assert flat["input_ids"].shape == flat["labels"].shape == (1, 24)
    assert flat["row"].tolist() == [0, 1, 2]
    torch.testing.assert_close(actual[0], expected.flatten(0, 1), rtol=0, atol=1e-5)


def test_loss_of_packed_rows_is_the_mean_over_documents_alone(make_base):
    model = make_base()
    documents = encoded(7, 6, 3)
    batch = Collator(PAD)([*packed_rows(documents, max_length=8, split=False, pad_id=PAD, keep_partial=True)])
    batch.pop("row")
    with torch.no_grad():
        together = model(**batch, use_cache=False).loss
        losses = [model(ids := torch.tensor([d["input_ids"]]), labels=ids).loss for d in documents]
    weights = torch.tensor([6.0, 5.0, 2.0])
    torch.testing.assert_close(together, (torch.stack(losses) * weights).sum() / weights.sum())
