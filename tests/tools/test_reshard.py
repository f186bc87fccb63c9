import json
from pathlib import Path

from tests.data import helpers
from tests.tools.run_tool import error_line, run_tool


def test_a_folder_is_sorted_split_and_gone_on_with(tmp_path: Path) -> None:
    helpers.write_shards(tmp_path / "in", [3, 0, 2, 1])
    output = tmp_path / "out"
    arguments = (tmp_path / "in", "--output", output, "--order", "frames", "--workers", 1)
    arguments = (*arguments, "--samples-per-shard", 3, "--source", "test")
    result = run_tool("reshard", *arguments)
    assert result.returncode == 0, result.stderr
    assert f"{output}: 4 samples in 2 shards (0 were there), 0 left out" in result.stdout
    jsons = [
        json.loads(body)["frame_count"]
        for number in range(2)
        for name, body in helpers.tar_members(output / f"shard-{number:05d}.tar")
        if name.endswith(".json")
    ]
    assert jsons == [0, 1, 2, 3]
    assert "(2 were there)" in run_tool("reshard", *arguments).stdout
    other = run_tool("reshard", *arguments, "--seed", 1)
    assert "with other options" in error_line(other)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path / "in", [1])
    out = ("--output", tmp_path / "out", "--workers", 1)
    assert "source x" in error_line(run_tool("reshard", path, *out, "--source", "x"))
    assert run_tool("reshard", path, *out, "--mb-per-shard", 0).returncode == 2
    assert "none: no such file" in error_line(run_tool("reshard", tmp_path / "none", *out))
    path.write_bytes(path.read_bytes()[:1024])
    assert "truncated" in error_line(run_tool("reshard", path, *out))
