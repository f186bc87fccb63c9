import functools
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from tests.tools import planned
from vlm.data.plan.plan import step_hash


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over two manifests: 48 clips and 12 texts, and 24 clips and 8 texts."""
    folder = tmp_path_factory.mktemp("explain_step")
    planned.make_tokenizer(folder)
    sources = [
        {"manifest": planned.make_manifest(folder, "a", [3, 0, 8, 1, 5] * 12), "weight": 1},
        {"manifest": planned.make_manifest(folder, "b", [2, 4, 6, 0] * 8), "weight": 3},
    ]
    planned.write_recipe(folder, sources, weights_at={9: {"a": 0}})
    return folder


run = functools.partial(planned.run, "explain_step")
explained = functools.partial(planned.run_json, "explain_step")


def test_ranks_together_are_the_step_that_show_plan_shows(folder: Path) -> None:
    shown = planned.run("show_plan", folder, "--steps", "12", "--json")
    steps = json.loads(shown.stdout)["steps"]
    for step in (0, 11):
        ranks = [
            explained(folder, "--step", str(step), "--rank", rank, "--world-size", "2")
            for rank in "01"
        ]
        batches = sorted((b for r in ranks for b in r["micro_batches"]), key=lambda b: b["index"])
        assert [batch["index"] for batch in batches] == [0, 1, 2, 3]
        keys = [one["key"] for batch in batches for one in batch["samples"]]
        assert step_hash(keys) == steps[step]["hash"]
    assert {one["source"] for b in batches for one in b["samples"] if one["num_frames"]} == {"b"}


def test_a_sample_lies_where_it_says(folder: Path) -> None:
    for batch in explained(folder, "--step", "5")["micro_batches"]:
        for one in batch["samples"]:
            with tarfile.open(one["shard"]) as archive:
                members = [m for m in archive if m.name.split(".")[0] == one["key"]]
            assert members[0].offset == one["offset"]
            assert len(members) == one["num_frames"] + 1
            assert one["kind"] == ("video" if one["num_frames"] else "text")


def test_sources_are_counted(folder: Path) -> None:
    shown = planned.run("show_plan", folder, "--steps", "4", "--json")
    found = json.loads(shown.stdout)["sources"]
    expected = {name: Counter[str]() for name in ("a", "b")}
    for step in range(4):
        for batch in explained(folder, "--step", str(step))["micro_batches"]:
            for one in batch["samples"]:
                counts = {"num_samples": 1, **{k: one[k] for k in ("num_frames", "num_tokens")}}
                expected[one["source"]].update(counts)
    assert found == [{"name": name, **counts} for name, counts in expected.items()]
    text = planned.run("show_plan", folder, "--steps", "4").stdout
    share = expected["b"]["num_frames"] / sum(own["num_frames"] for own in expected.values())
    assert re.search(rf"source b: .* {share:.1%} of the frames", text)


def test_text_names_every_sample(folder: Path) -> None:
    data = explained(folder, "--step", "3", "--rank", "1", "--world-size", "4")
    found = run(folder, "--step", "3", "--rank", "1", "--world-size", "4")
    assert found.returncode == 0
    for batch in data["micro_batches"]:
        for one in batch["samples"]:
            assert f"{one['source']}  {one['key']}  {one['shard']}:{one['offset']}" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step", "-1"], "--step"),
        (["--step", "0", "--rank", "2", "--world-size", "2"], "expected 0 to 1"),
        (["--step", "0", "--world-size", "3"], "start 1, 2, 4 ranks"),
        (["--step", "0", "data.train=gone.parquet", "data.weights_at={}"], "gone.parquet"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(folder: Path, arguments: list[str], said: str) -> None:
    found = run(folder, *arguments)
    assert found.returncode == 2
    assert said in found.stderr
    assert "Traceback" not in found.stderr
