"""bench/step.py at toy size: it runs, all contestants meet the same samples, figures add up."""

from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from bench import step
from bench.hf import pad, samples_of
from bench.step import Block
from tests.distributed import ranks
from tests.models import tiny
from tests.train import helpers

ROUNDS, STEPS = 1, 2


def measured(geometry: str | None) -> dict[str, Any]:
    """On a rank, which is a process of its own."""
    recipe = helpers.recipe(Path("unused"))
    args = Namespace(geometry=geometry, rounds=ROUNDS, steps=STEPS)
    small = {"VOCAB": 64, "IMAGE": tiny.IMAGE, "SIZE": 28, "SHAPE": (2, 2, 6)}
    with mock.patch.multiple(step, **small, LANGUAGE={"tiny": (32, 1, 2, 2, 48)}):
        return step.measure(args, recipe, helpers.resolved(2, 1))


def test_contestants_run_and_are_compared() -> None:
    (figures,) = ranks(1).run(measured, None)
    assert list(figures["contestants"]) == ["toolkit", "bare", "hf"]
    assert set(figures["toolkit_over"]) == {"bare", "hf"}
    assert all(found["tokens_per_s"] > 0 for found in figures["contestants"].values())
    assert step.table(figures).startswith("| contestant | real tokens/s (median) |")


@pytest.mark.slow
def test_a_geometry_has_a_utilisation_and_no_hugging_face() -> None:
    (figures,) = ranks(1).run(measured, "tiny", timeout_s=300)
    assert list(figures["contestants"]) == ["toolkit", "bare"]
    assert figures["mfu"]["toolkit"]["flops_per_s"] > 0
    assert figures["mfu"]["toolkit"]["mfu_frac"] is None  # nobody publishes a CPU's peak


def test_ratios_and_overhead_are_medians_over_rounds() -> None:
    blocks = {
        "toolkit": [Block(2.0, 1.0, 100, 4), Block(4.0, 1.2, 100, 4), Block(8.0, 1.3, 100, 4)],
        "bare": [Block(1.0, 0.9, 100, 4), Block(3.0, 0.8, 100, 4), Block(1.0, 0.9, 100, 4)],
    }
    found = step.summary(blocks)
    assert found["toolkit_over"]["bare"] == pytest.approx(1 / 2)  # of 1/2, 3/4, 1/8
    assert found["toolkit_over_by_cpu"]["bare"] == pytest.approx(0.9 / 1.3)  # of 0.9, 0.67, 0.69
    assert found["overhead_s"] == pytest.approx(1 / 4)  # of 1/4, 1/4, 7/4
    assert found["contestants"]["toolkit"]["tokens_per_s"] == pytest.approx(25)
    assert found["contestants"]["toolkit"]["step_cpu_s"] == pytest.approx(0.3)


def test_padding_as_a_dense_collator_does_it() -> None:
    batch = tiny.make_batch([(3, 4), (0, 7), (1, 2)])
    samples = samples_of(batch)
    assert [(len(s.frames), len(s.input_ids)) for s in samples] == [(3, 7), (0, 7), (1, 3)]
    padded = pad(samples, tiny.IMAGE, 1)
    assert padded.cu_frames.tolist() == [0, 3, 6, 9]
    assert padded.cu_seqlens.tolist() == [0, 10, 20, 30]  # 3 frames, 7 text tokens
    assert padded.num_loss_tokens == batch.num_loss_tokens
    text = pad([s for s in samples if not len(s.frames)], tiny.IMAGE, 1)
    assert text.cu_frames.tolist() == [0, 0] and len(text.frames) == 1
