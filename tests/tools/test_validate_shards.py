import json
from pathlib import Path

from tests.data import helpers
from tests.tools.run_tool import error_line, run_tool


def test_clean_shards_end_with_0_and_json_stands_alone(tmp_path: Path) -> None:
    helpers.write_shards(tmp_path, [2, 0, 3], per_shard=2)
    result = run_tool("validate_shards", tmp_path, "--json", "--sample", 1, "--workers", 1)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["clean"] is True
    assert (report["num_shards"], report["num_samples"], report["num_frames"]) == (2, 3, 5)
    assert report["faults"] == []


def test_faults_end_with_1_and_are_printable(tmp_path: Path) -> None:
    path = helpers.write_tar(tmp_path / "a.tar", [("a\x1b[2J.json", b"{}"), ("b.json", b"{}")])
    shown = run_tool("validate_shards", tmp_path, "--workers", 1)
    assert shown.returncode == 1
    assert f"{path}: b: b.json: not our schema" in shown.stdout
    assert "\x1b" not in shown.stdout
    listed = run_tool("validate_shards", path, "--json", "--workers", 1)
    assert listed.returncode == 1
    faults = json.loads(listed.stdout)["faults"]
    assert [fault["member"] for fault in faults] == ["a\x1b[2J.json", "b.json"]
    assert set(faults[0]) == {"shard", "key", "member", "fault"}


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    assert "none: no such file" in error_line(run_tool("validate_shards", tmp_path / "none"))
    (path,) = helpers.write_shards(tmp_path, [1])
    result = run_tool("validate_shards", path, "--manifest", path)
    assert "build_manifest" in error_line(result)
    assert run_tool("validate_shards", path, "--sample", 0).returncode == 2
