from pathlib import Path

from tests.data import helpers
from tests.tools.run_tool import error_line, run_tool


def test_shards_become_one(tmp_path: Path) -> None:
    paths = helpers.write_shards(tmp_path / "in", [1, 0, 2], per_shard=1)
    output = tmp_path / "all.tar"
    result = run_tool("merge_shards", tmp_path / "in", "--output", output, "--workers", 1)
    assert result.returncode == 0, result.stderr
    assert f"{output}: 3 samples, 0.0 MB" in result.stdout
    members = [member for path in paths for member in helpers.tar_members(path)]
    assert helpers.tar_members(output) == members


def test_doubles_are_one_line_and_may_be_renamed(tmp_path: Path) -> None:
    for name in "ab":
        helpers.write_shards(tmp_path / name, [1, 1])
    arguments = (tmp_path / "a", tmp_path / "b", "--output", tmp_path / "x.tar", "--workers", 1)
    assert "2 keys are there twice" in error_line(run_tool("merge_shards", *arguments))
    assert "4 samples" in run_tool("merge_shards", *arguments, "--rename").stdout
    assert "is there already" in error_line(run_tool("merge_shards", *arguments, "--rename"))
