import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import webdataset

from tests.data.clips import write_clip
from tests.tools.run_tool import TOOLS, error_line, run_tool


def test_clips_become_shards(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clips" / "a.mp4", 16)
    lines = [
        {"id": name, "source": "test", "video": f"{name}.mp4", "caption": "blocks"}
        for name in ("a", "gone")
    ]
    annotations = tmp_path / "a.jsonl"
    annotations.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["video", "--annotations", annotations, "--root", clip.parent, "--size", 32]
    first = run_tool("precompute", *command, "--output", tmp_path / "o", "--workers", 1)
    assert first.returncode == 0, first.stderr
    assert "1 samples, 2 frames" in first.stdout
    assert "skipped: missing video" in first.stdout
    assert (tmp_path / "o" / "video-00000.tar").exists()
    assert (tmp_path / "o" / "failed.jsonl").read_text().count("\n") == 1
    other = run_tool("precompute", *command, "--output", tmp_path / "o", "--fps", 2)
    assert "made with other fps" in error_line(other)


def test_processes_start_from_the_script(tmp_path: Path) -> None:
    lines = [f'{{"id": {i}, "source": "test", "caption": "text {i}"}}' for i in range(4)]
    annotations = tmp_path / "a.jsonl"
    annotations.write_text("\n".join(lines))
    command = ["video", "--annotations", annotations, "--output", tmp_path / "o", "--workers", 2]
    path = os.pathsep.join([str(TOOLS.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, TOOLS / "precompute.py", *map(str, command), "--samples-per-shard", "2"],
        check=True,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        timeout=300,
    )
    assert len(list((tmp_path / "o").glob("text-*.tar"))) == 2


def test_not_a_single_sample_ends_with_1(tmp_path: Path) -> None:
    annotations = tmp_path / "a.jsonl"
    annotations.write_text('{"id": "bad"}\n')
    output = tmp_path / "o"
    result = run_tool("precompute", "video", "--annotations", annotations, "--output", output)
    assert result.returncode == 1
    assert "skipped: bad record" in result.stdout


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    output = tmp_path / "o"
    result = run_tool("precompute", "video", "--annotations", "none", "--output", output)
    assert "none: No such file" in error_line(result)
    assert not output.exists()


def test_a_data_set_in_its_published_layout(tmp_path: Path) -> None:
    names = [f"v{i}_1_0to{i}.mp4" for i in range(1, 4)]
    table = "video,caption\n" + "".join(f"{name},Clip {name}.\n" for name in [*names, "no.mp4"])
    (tmp_path / "OpenVid-1M.csv").write_text(table)
    clips = {name: write_clip(tmp_path / "x" / name, 8 * i) for i, name in enumerate(names, 1)}
    with zipfile.ZipFile(tmp_path / "OpenVid_part0.zip", "w") as archive:
        for name, clip in clips.items():
            archive.write(clip, f"OpenVid_part0/{name}")
            clip.unlink()
    output = tmp_path / "o"
    command = ["openvid", "--root", tmp_path, "--output", output, "--size", 32, "--workers", 1]
    result = run_tool("precompute", *command)
    assert result.returncode == 0, result.stderr
    assert "3 samples, 6 frames" in result.stdout
    assert "skipped: no such video" in result.stdout
    samples = list(webdataset.WebDataset(str(output / "video-00000.tar"), shardshuffle=False))
    found = {json.loads(s["json"])["caption"]: sum(".jpg" in f".{k}" for k in s) for s in samples}
    assert found == {f"Clip {name}.": i for i, name in enumerate(names, 1)}
    assert {json.loads(s["json"])["meta"]["licence"] for s in samples} == {"CC-BY-4.0"}


def test_splits_share_all_samples(tmp_path: Path) -> None:
    lines = [{"video": f"{i % 10}.mp4", "caption": f"{i}"} for i in range(40)]
    annotations = tmp_path / "a.jsonl"
    annotations.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {}
    for part in ("train", "val"):
        output = tmp_path / part
        command = ["video", "--annotations", annotations, "--output", output, "--workers", 1]
        result = run_tool("precompute", *command, "--split", part, "--val-frac", 0.5, "--seed", 1)
        assert "of the other split" in result.stdout
        lines = [json.loads(line) for line in (output / "annotations.jsonl").open()]
        found[part] = {line["video"] for line in lines}
    assert found["train"] | found["val"] == {f"{i}.mp4" for i in range(10)}
    assert not found["train"] & found["val"]


def test_a_root_is_needed(tmp_path: Path) -> None:
    result = run_tool("precompute", "vript", "--output", tmp_path / "o")
    assert "vript needs --root" in error_line(result)
