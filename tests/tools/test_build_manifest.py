import io
import json
from pathlib import Path

from PIL import Image

from tests.data import helpers
from tests.data.clips import write_clip
from tests.tools.run_tool import error_line, run_tool
from vlm.data.manifest import manifest
from vlm.data.text.tokenizer import train_tokenizer


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
    assert "2 (2 read)" in result.stdout
    result = run_tool("build_manifest", *command, "--output", output)
    assert "2 (0 read)" in result.stdout


def test_shards_of_other_tools(tmp_path: Path) -> None:
    tokenizer_path = tmp_path / "tokenizer"
    train_tokenizer(["a cat"], tokenizer_path, 300, "<|image|>")
    clip = write_clip(tmp_path / "a.mp4", 40).read_bytes()
    picture = io.BytesIO()
    Image.new("RGB", (50, 30)).save(picture, "WEBP")
    meta = json.dumps({"license": "CC-BY [red]4.0\x1b[2J"}).encode()
    members = [("0.mp4", clip), ("0.txt", b"a dog"), ("1.webp", picture.getvalue())]
    members += [("1.json", meta), ("1.txt", b"a cat"), ("2.jpg", b"x"), ("2.txt", b"no image")]
    path = helpers.write_tar(tmp_path / "foreign.tar", members)
    command = [path, "--tokenizer", tokenizer_path, "--workers", 1, "--output", tmp_path / "m"]
    options = ["--fps", 2, "--max-frames", 4, "--source", "web", "--max-rejected-frac", 0.4]
    assert "--size" in error_line(run_tool("build_manifest", *command, *options))
    result = run_tool("build_manifest", *command, *options, "--size", 24)
    assert result.returncode == 0, result.stderr
    loaded = manifest.load(tmp_path / "m")
    assert loaded.num_frames.tolist() == [4, 1]
    assert loaded.height.tolist() == loaded.width.tolist() == [24, 24]
    assert [(s.name, s.num_samples) for s in loaded.sources] == [("web", 2)]
    assert "2: CC-BY [red]4.0" in result.stdout and "\x1b" not in result.stdout
    assert "left out: " in result.stderr and "2.jpg" in result.stderr


def test_shards_that_are_uploaded_afterwards(tmp_path: Path) -> None:
    tokenizer_path = tmp_path / "tokenizer"
    train_tokenizer(["red"], tokenizer_path, 300, "<|image|>")
    helpers.write_shards(tmp_path / "s", [2, 1], per_shard=1)
    helpers.write_shards(tmp_path / "t", [1], per_shard=1)
    command = [tmp_path / "s", "--tokenizer", tokenizer_path, "--workers", 1, "--output"]
    here, there = tmp_path / "here", tmp_path / "there"
    assert run_tool("build_manifest", *command, here).returncode == 0
    result = run_tool("build_manifest", *command, there, "--location", "s3://bucket/x/")
    assert result.returncode == 0, result.stderr
    local, remote = manifest.load(here), manifest.load(there)
    assert [shard.location for shard in remote.shards] == [
        f"s3://bucket/x/{Path(shard.location).name}" for shard in local.shards
    ]
    assert remote.fingerprint == local.fingerprint, "a plan does not ask where shards lie"
    result = run_tool("build_manifest", *command, there, "--location", "ftp://bucket")
    assert "expected a local path or one of s3://" in error_line(result)
    double = run_tool("build_manifest", tmp_path / "t", *command, there, "--location", "s3://b")
    assert "two shards named" in error_line(double)


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
