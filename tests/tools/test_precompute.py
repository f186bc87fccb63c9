import json
import os
import subprocess
import sys
from pathlib import Path

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
        timeout=120,
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
