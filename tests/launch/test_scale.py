import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train import helpers

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_table_and_its_numbers() -> None:
    given = ["--recipe", helpers.world() / "recipe.yaml", "--ds_config", helpers.ds_file(2)]
    given += ["--gpu", "a100-80gb", "--nodes", "1,2", "--gpus_per_node", "2", "--price", "2"]
    command = [sys.executable, str(ROOT / "launch/scale.py"), *map(str, given)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert shown.stdout.splitlines()[0].split()[:4] == ["nodes", "GPUs", "ZeRO", "fits"]
    assert len(shown.stdout.splitlines()) == 1 + 2 * 3
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    assert [(row["nodes"], row["stage"]) for row in rows][2:4] == [(1, "zero3"), (2, "zero1")]
    # 6 steps of 4 micro-batches, as 2 x 2 and 4 x 2 at a time
    assert [row["num_steps"] for row in rows] == [6] * 3 + [3] * 3
    assert all(row["fits"] and row["price"] > 0 for row in rows)
