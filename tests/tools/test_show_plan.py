import functools
from pathlib import Path

import pytest

from tests.tools import planned


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and a manifest of 60 videos and 15 texts."""
    folder = tmp_path_factory.mktemp("show_plan")
    planned.make_tokenizer(folder)
    planned.write_recipe(folder, planned.make_manifest(folder, "m", [3, 0, 8, 1, 5] * 15))
    return folder


run = functools.partial(planned.run, "show_plan")
shown = functools.partial(planned.run_json, "show_plan")


def test_json_is_one_object_with_the_same_hashes_for_every_world_size(folder: Path) -> None:
    one = shown(folder, "--steps", "3", "--world-size", "1")
    four = shown(folder, "--steps", "3", "--world-size", "4")
    assert [step["hash"] for step in one["steps"]] == [step["hash"] for step in four["steps"]]
    assert set(one) == {"plan_id", "steps", "fill_frac", "balance", "text_frac", "sources"}
    for step in four["steps"]:
        assert sorted(batch["rank"] for batch in step["micro_batches"]) == [0, 1, 2, 3]
        assert set(step["micro_batches"][0]) == {
            "rank",
            "kind",
            "num_samples",
            "num_frames",
            "num_tokens",
            "cost",
        }


def test_overrides_and_the_manifest_are_taken(folder: Path) -> None:
    plain = shown(folder, "--steps", "2")
    moved = shown(
        folder, "--steps", "2", "--manifest", str(folder / "m.parquet"), "data.train=gone.parquet"
    )
    assert moved == plain
    other = shown(folder, "data.batching=packed", "--steps", "2", "seed=3")
    assert other["plan_id"] != plain["plan_id"]


def test_text_shows_every_micro_batch(folder: Path) -> None:
    found = run(folder, "--steps", "2", "--world-size", "2")
    data = shown(folder, "--steps", "2", "--world-size", "2")
    assert found.returncode == 0
    lines = found.stdout.splitlines()
    for step in data["steps"]:
        start = next(i for i, line in enumerate(lines) if step["hash"] in line)
        for line, batch in zip(lines[start + 2 :], step["micro_batches"], strict=False):
            assert line.split() == [
                str(batch["rank"]),
                batch["kind"],
                str(batch["num_samples"]),
                str(batch["num_frames"]),
                str(batch["num_tokens"]),
                f"{batch['cost']:.1f}",
            ]
    assert f"{data['fill_frac']:.1%}" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--world-size", "3"], "start 1, 2, 4 ranks"),
        (["--world-size", "0"], "expected a whole number above 0"),
        (["data.budget=1"], "samples cost more than data.budget=1"),
        (["data.bugdet=100"], "unknown key"),
        (["--manifest", "none.parquet"], "none.parquet"),
        (["model.family=other"], "model.family: Input should be"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(folder: Path, arguments: list[str], said: str) -> None:
    found = run(folder, *arguments)
    assert found.returncode == 2
    assert said in found.stderr
    assert "Traceback" not in found.stderr
    assert not found.stdout
