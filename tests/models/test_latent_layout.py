"""Layouts against lists."""

import pytest
import torch

from tests.models.tiny import make_batch
from vlm.models.latent_layout import lay_out

SAMPLES = [(3, 4), (0, 5), (1, 6), (2, 0)]
MODE, END, NONE, FRAME = -1, -2, -3, -4


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("order", ["text first", "no text", "frames first"])
def test_tokens_stand_where_a_list_puts_them(order: str, before: int) -> None:
    batch = make_batch(SAMPLES, before=before)
    layout = lay_out(batch, order)
    found = layout.batch.input_ids.clone()
    for index, mark in (
        (layout.mode_index, MODE),
        (layout.end_index, END),
        (layout.no_text_index, NONE),
        (layout.batch.frame_index, FRAME),
    ):
        assert (found[index] == 0).all()
        found[index] = mark
    expected, lengths, text_frames = [], [], []
    for (num_frames, _), a, b in zip(
        SAMPLES, batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True
    ):
        frames_at = set(batch.frame_index.tolist())
        text = [int(batch.input_ids[i]) for i in range(a, b) if i not in frames_at]
        seen = [MODE] + [FRAME] * num_frames
        rows = {
            "text first": text + seen,
            "no text": [NONE, *seen],
            "frames first": [*seen, END, *text],
        }
        expected += rows[order]
        lengths.append(len(rows[order]))
        text_frames += list(range(num_frames))
    assert found.tolist() == expected
    assert layout.batch.cu_seqlens.diff().tolist() == lengths
    positions = torch.cat([torch.arange(n) for n in lengths])
    assert torch.equal(layout.batch.position_ids, positions)
    assert layout.batch.max_seqlen >= max(lengths)
    if order == "frames first":
        assert torch.equal(layout.batch.input_ids[layout.batch.target_index + 1], batch.targets)
    else:
        assert len(layout.batch.targets) == 0


@pytest.mark.parametrize("order", ["text first", "no text", "frames first"])
def test_no_number_is_read_from_the_device(order: str) -> None:
    """On the meta device there is none to read, so whoever waited for one would fail."""
    batch = make_batch(SAMPLES)
    found, real = lay_out(batch.to(torch.device("meta")), order), lay_out(batch, order)
    assert found.batch.input_ids.shape == real.batch.input_ids.shape
    assert found.batch.frame_index.shape == real.batch.frame_index.shape
    assert found.mode_index.is_meta
