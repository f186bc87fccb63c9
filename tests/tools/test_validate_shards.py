import json
from pathlib import Path

import pytest

from tests.data import helpers
from tests.tools.run_tool import error_line, run_tool
from vlm.data.text.tokenizer import train_tokenizer


def test_clean_shards_end_with_0_and_json_stands_alone(tmp_path: Path) -> None:
    helpers.write_shards(tmp_path, [2, 0, 3], per_shard=2)
    result = run_tool("validate_shards", tmp_path, "--json", "--decode", "none", "--workers", 1)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["clean"] is True
    assert (report["num_shards"], report["num_samples"], report["num_decoded"]) == (2, 3, 0)
    assert report["total"]["num_frames"] == 5
    assert report["total"]["sizes"] == {"16x16": 2}
    assert report["faults"] == []


def test_tables_show_histograms_and_sources(tmp_path: Path) -> None:
    tokenizer_path = tmp_path / "tokenizer"
    train_tokenizer(["red"], tokenizer_path, 300, "<|image|>")
    helpers.write_shards(tmp_path, [2, 0, 3, 64])
    result = run_tool("validate_shards", tmp_path, "--tokenizer", tokenizer_path, "--workers", 1)
    assert result.returncode == 0, result.stdout
    lines = [line.replace("\u2502", "|") for line in result.stdout.splitlines()]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert ["1-4", "2", "#" * 40] in cells
    assert ["33-64", "1", "#" * 20] in cells
    assert ["16x16", "3", "#" * 40] in cells
    (source,) = [row for row in cells if row[:1] == ["test"]]
    assert source[1:3] == ["4", "69"] and source[5].endswith("%")


def test_faults_end_with_1_and_are_printable(tmp_path: Path) -> None:
    path = helpers.write_tar(tmp_path / "a.tar", [("a\x1b[2J.json", b"{}"), ("b.json", b"{}")])
    shown = run_tool("validate_shards", tmp_path, "--workers", 1)
    assert shown.returncode == 1
    assert f"{path}: b: b.json: nothing to learn" in shown.stdout
    assert "\x1b" not in shown.stdout
    listed = run_tool("validate_shards", path, "--json", "--workers", 1)
    assert listed.returncode == 1
    report = json.loads(listed.stdout)
    assert [fault["member"] for fault in report["faults"]] == ["a\x1b[2J.json", "b.json"]
    assert set(report["faults"][0]) == {"shard", "key", "member", "check", "fault"}
    assert report["faults_by_check"] == {"member": 1, "schema": 1}


def test_a_page_and_clean_copies(tmp_path: Path) -> None:
    helpers.write_shards(tmp_path / "in", [1, 2])
    helpers.write_tar(tmp_path / "in" / "bad.tar", [("x.json", b"{}")])
    out = ("--html", tmp_path / "report.html", "--quarantine", tmp_path / "clean")
    result = run_tool("validate_shards", tmp_path / "in", *out, "--workers", 1)
    assert result.returncode == 1
    assert f"{tmp_path / 'clean'}: 2 samples in 1 shards, 1 left out" in result.stderr
    assert "nothing to learn" in (tmp_path / "report.html").read_text()
    assert run_tool("validate_shards", tmp_path / "clean", "--workers", 1).returncode == 0


def test_doubles_may_be_allowed(tmp_path: Path) -> None:
    for name in "ab":
        helpers.write_shards(tmp_path / name, [1])
    arguments = (tmp_path / "a", tmp_path / "b", "--workers", 1)
    assert run_tool("validate_shards", *arguments).returncode == 1
    result = run_tool("validate_shards", *arguments, "--allow", "content")
    assert result.returncode == 0
    assert "content, allowed" in result.stdout
    assert run_tool("validate_shards", *arguments, "--allow", "tar").returncode == 2


def test_a_leak_is_a_fault(tmp_path: Path) -> None:
    for name in ("train", "eval"):
        helpers.write_shards(tmp_path / name, [1])
    arguments = (tmp_path / "train", "--against", tmp_path / "eval", "--workers", 1)
    assert "key 00000000 of" in run_tool("validate_shards", *arguments).stdout


@pytest.mark.parametrize(
    "arguments",
    [("--decode", "some"), ("--decode", "1.5"), ("--decode", "nan"), ("--workers", "0")],
)
def test_arguments_are_checked(tmp_path: Path, arguments: tuple[str, str]) -> None:
    (path,) = helpers.write_shards(tmp_path, [1])
    assert run_tool("validate_shards", path, *arguments).returncode == 2


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    assert "none: no such file" in error_line(run_tool("validate_shards", tmp_path / "none"))
    (path,) = helpers.write_shards(tmp_path, [1])
    result = run_tool("validate_shards", path, "--manifest", path)
    assert "build_manifest" in error_line(result)
    result = run_tool("validate_shards", path, "--max-tokens", 3)
    assert "nothing counts the tokens" in error_line(result)
