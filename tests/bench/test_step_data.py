"""The set has the lengths that bench/plan.py draws, and loads as any other."""

from pathlib import Path

from bench import step_data
from bench.plan import synthetic_rows
from vlm.data.manifest import manifest


def test_lengths_are_those_of_the_plans(tmp_path: Path) -> None:
    assert step_data.main(["--output", str(tmp_path), "--samples", "40"]) == 0
    built, drawn = manifest.load(tmp_path / "train.parquet"), synthetic_rows(40, seed=0)
    assert built.num_frames.tolist() == drawn.num_frames.tolist()
    # a word is a token; two more say who speaks, and two where each ends
    assert built.num_tokens.tolist() == [count + 4 for count in drawn.num_tokens.tolist()]
    assert 0 in drawn.num_frames
