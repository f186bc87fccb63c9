"""Bad samples and a resume: what was found bad stays replaced, on whichever rank it comes up."""

import json
import shutil
from pathlib import Path

from tests.distributed import ranks
from tests.train import helpers, runs
from vlm.config import Recipe

STEPS, SAVED = 10, 5


def flip_first_image(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[content.index(b"\xff\xd8") + 400] ^= 255
    shard.write_bytes(content)


def bad_world(folder: Path) -> Path:
    shutil.copytree(helpers.world() / "shards", folder / "shards")
    shutil.copy(helpers.world() / "train.parquet", folder)
    for shard in (folder / "shards").glob("train-*.tar"):
        flip_first_image(shard)
    return folder / "train.parquet"


def recipe(train: Path) -> Recipe:
    return helpers.recipe(
        runs.new_folder(),
        f"data.train={train}",
        f"train.steps={STEPS}",
        f"train.checkpoint_every={SAVED}",
        "train.eval_steps=1",
    )


def quarantine(run: Recipe, step: int) -> list[int]:
    text = (runs.checkpoint(run, step) / "trainer.json").read_text()
    return json.loads(text)["state"]["quarantine"]


def test_a_resumed_run_with_bad_samples_is_identical(tmp_path: Path) -> None:
    """Also when the shards were mended meanwhile, and when other ranks read what is bad."""
    train = bad_world(tmp_path)
    whole = recipe(train)
    expected = ranks(2).run(runs.fit, whole, 2)
    lines = (whole.output_dir / "bad_samples.jsonl").read_text().splitlines()
    by_rank: dict[str, set[int]] = {"rank 0": set(), "rank 1": set()}
    for line in map(json.loads, lines):
        by_rank[line["where"].partition(",")[0]].add(line["row"])
    bad = sorted(by_rank["rank 0"] | by_rank["rank 1"])
    assert len(bad) == 4 and all(by_rank.values())
    assert quarantine(whole, SAVED) == quarantine(whole, STEPS) == bad
    for mended in (False, True):
        resumed = recipe(train)
        shutil.copytree(whole.output_dir, resumed.output_dir, dirs_exist_ok=True)
        shutil.rmtree(runs.checkpoint(resumed, STEPS))
        if mended:
            shutil.copytree(helpers.world() / "shards", tmp_path / "shards", dirs_exist_ok=True)
        found = ranks(2).run(runs.fit, resumed, 2)
        assert found == [steps[SAVED:] for steps in expected]
        assert quarantine(resumed, STEPS) == bad
