from pathlib import Path

from tests.data import helpers
from tests.tools.run_tool import error_line, run_tool
from vlm.data import manifest
from vlm.data.tokenizer import train_tokenizer


def test_it_writes_a_manifest(tmp_path: Path) -> None:
    tokenizer_path = tmp_path / "tokenizer"
    train_tokenizer(["red"], tokenizer_path, 300, "<|image|>")
    helpers.write_shards(tmp_path / "s", [2, 0, 3], per_shard=2)
    output = tmp_path / "out" / "m.parquet"
    command = [tmp_path / "s", "--tokenizer", tokenizer_path, "--workers", 1]
    result = run_tool("build_manifest", *command, "--output", output)
    assert result.returncode == 0, result.stderr
    loaded = manifest.load(output)
    assert loaded.num_frames.tolist() == [2, 0, 3]
    loaded.check_shards()
    assert loaded.fingerprint[:16] in result.stdout


def test_a_mistake_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path / "s", [1])
    output = tmp_path / "m.parquet"
    for args, fault in (
        ([tmp_path / "none", "--tokenizer", "t"], "none: no such file"),
        ([path, "--tokenizer", tmp_path / "t"], "t: no such folder"),
    ):
        result = run_tool("build_manifest", *args, "--output", output)
        assert fault in error_line(result)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]
