import functools
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from tests.data import helpers
from tests.data.clips import indices, write_clip
from vlm.data.format import schema
from vlm.data.make import precompute
from vlm.data.make.adapters.registry import ADAPTERS
from vlm.data.make.precompute import Settings
from vlm.data.make.spool import Source
from vlm.data.pool import ordered_map
from vlm.errors import ConfigError, DataError

ROOT = Path(__file__).parents[3]
SETTINGS = Settings(size=32, samples_per_shard=3)


def source(path: Path) -> Source:
    """A file of annotations, with videos below its folder."""
    options = ADAPTERS["video"].options(annotations=path, source="video")
    return Source("video", ADAPTERS["video"], path.parent, options)


def run(
    path: Path, output: Path, settings: Settings = SETTINGS, workers: int = 1
) -> precompute.Report:
    engine = functools.partial(ordered_map, workers=workers)
    return precompute.run(source(path), output, settings, engine, lambda *_: None)


def annotation(index: int, video: str | None) -> dict[str, object]:
    line: dict[str, object] = {"id": f"id-{index}", "source": "test", "caption": f"clip {index}"}
    return line | ({"video": video} if video else {})


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """Lines 0 to 9: videos of 1 to 5 s, two texts, one missing, one that is no video, one bad."""
    for seconds in range(1, 6):
        write_clip(tmp_path / "clips" / f"{seconds}.mp4", 8 * seconds)
    (tmp_path / "clips" / "text.mp4").write_text("not a video")
    names = ["1.mp4", "2.mp4", None, "none.mp4", "3.mp4", "text.mp4", "4.mp4", None, "5.mp4"]
    lines = [json.dumps(annotation(i, name and f"clips/{name}")) for i, name in enumerate(names)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*lines, '{"id": "bad"}']))
    return path


def contents(output: Path) -> dict[str, bytes]:
    files = [path for path in output.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def test_annotations_become_samples(annotations: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = run(annotations, output)
    assert sorted(contents(output)) == [
        "annotations.jsonl",
        "failed.jsonl",
        "failed/adapter.jsonl",
        "failed/video-00000.jsonl",
        "failed/video-00001.jsonl",
        "precompute.json",
        "text-00000.tar",
        "video-00000.tar",
        "video-00001.tar",
        "video-00002.tar",
    ]
    members = [m for path in sorted(output.glob("*.tar")) for m in helpers.tar_members(path)]
    samples = {
        name.removesuffix(".json"): schema.parse_sample(body, name)
        for name, body in members
        if name.endswith(".json")
    }
    # keys are line numbers, frames are seconds
    assert {key: sample.frame_count for key, sample in samples.items()} == {
        "00000002": 0,
        "00000007": 0,
        "00000000": 1,
        "00000001": 2,
        "00000004": 3,
        "00000006": 4,
        "00000008": 5,
    }
    frames = [simplejpeg.decode_jpeg(b) for n, b in members if n.startswith("00000008.0")]
    assert indices(frames) == [0, 8, 16, 24, 32]
    assert samples["00000006"].caption == "clip 6"
    assert samples["00000006"].meta == {"id": "id-6"}
    assert report.num_written == 7
    assert report.num_frames == 15
    assert report.num_bytes == sum(
        (tmp_path / f"clips/{s}.mp4").stat().st_size for s in range(1, 6)
    )
    assert report.failed == {"missing video": 1, "undecodable video": 1, "bad record": 1}


def test_failures_name_line_id_and_reason(annotations: Path, tmp_path: Path) -> None:
    run(annotations, tmp_path / "out")
    lines = (tmp_path / "out" / "failed.jsonl").read_text().splitlines()
    failures = [json.loads(line) for line in lines]
    assert [(f["line"], f["id"], f["reason"]) for f in failures] == [
        (None, None, "bad record"),
        (4, "id-3", "missing video"),
        (6, "id-5", "undecodable video"),
    ]
    assert failures[0]["error"].startswith("a.jsonl, line 10: ")
    assert "clips/none.mp4" in failures[1]["error"]
    assert "cannot be decoded" in failures[2]["error"]


def test_output_does_not_depend_on_workers(annotations: Path, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    run(annotations, tmp_path / "one")
    engine = functools.partial(ordered_map, workers=2)
    precompute.run(
        source(annotations),
        tmp_path / "two",
        SETTINGS,
        engine,
        progress=lambda *counts: done.append(counts),
    )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert done == [(0, 9), (3, 9), (6, 9), (7, 9), (9, 9)]


def test_a_second_run_writes_what_is_missing(annotations: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = run(annotations, output)
    before = contents(output)
    (output / "video-00002.tar").unlink()
    (output / "failed.jsonl").unlink()
    untouched = (output / "video-00000.tar").stat().st_mtime_ns
    report = run(annotations, output)
    assert contents(output) == before
    assert (output / "video-00000.tar").stat().st_mtime_ns == untouched
    assert (report.num_written, report.num_present) == (1, 6)
    assert report.failed == first.failed


def test_a_crash_leaves_no_half_shard_and_no_failure_is_lost(
    annotations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    expected = tmp_path / "expected"
    run(annotations, expected)
    real = precompute.extract_frames
    calls = 0

    def dies(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(precompute, "extract_frames", dies)
    with pytest.raises(KeyboardInterrupt):
        run(annotations, output)
    assert [p.name for p in output.glob("*.tar")] == ["video-00000.tar"]
    monkeypatch.setattr(precompute, "extract_frames", real)
    run(annotations, output)
    assert contents(output) == contents(expected)


@pytest.mark.parametrize("change", ["size", "options"])
def test_shards_made_otherwise_do_not_mix(annotations: Path, tmp_path: Path, change: str) -> None:
    output = tmp_path / "out"
    run(annotations, output)
    settings = Settings(size=64, samples_per_shard=3) if change == "size" else SETTINGS
    if change == "options":
        annotations.write_text(annotations.read_text() + "\n" + json.dumps(annotation(1, None)))
    with pytest.raises(DataError, match=f"other {change}"):
        run(annotations, output, settings)


#: what the tool does, killed at the n-th call of a function of _OpenShard
KILLED = """
import itertools, os, runpy, signal, sys
from vlm.data.format.shards import _OpenShard

name, number = sys.argv.pop(1), int(sys.argv.pop(1))
calls, real = itertools.count(1), getattr(_OpenShard, name)

def deadly(*args):
    if next(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

setattr(_OpenShard, name, deadly)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("function", "number", "num_published"), [("add", 1, 0), ("publish", 2, 1), ("add", 4, 1)]
)
def test_killed_in_the_middle_and_finished_by_a_second_run(
    annotations: Path, tmp_path: Path, function: str, number: int, num_published: int
) -> None:
    output, expected = tmp_path / "out", tmp_path / "expected"
    run(annotations, expected)
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "killed.py", function, str(number)]
    command += ["tools/precompute.py", "video", "--annotations", annotations, "--output", output]
    command += ["--size", "32", "--samples-per-shard", "3", "--workers", "1"]
    child = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    before = {shard.name: shard.read_bytes() for shard in output.glob("*.tar")}
    assert len(before) == num_published
    assert before.items() <= contents(expected).items()
    assert list(output.glob(".*.tar.*.tmp")), "nothing was under way"
    report = run(annotations, output)
    assert contents(output) == contents(expected)
    assert report.num_written + report.num_present == 7
    assert (report.num_written < 7) == bool(before)


def test_only_one_run_at_a_time(annotations: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def meanwhile(function: object, tasks: list[precompute.ShardTask]) -> list[object]:
        with pytest.raises(DataError, match="another run is writing there"):
            run(annotations, output)
        return [precompute.write_shard(task) for task in tasks]

    precompute.run(source(annotations), output, SETTINGS, meanwhile, lambda *_: None)  # type: ignore[arg-type]


def test_images_become_samples_with_the_geometry_of_video(tmp_path: Path) -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 40:] = 255
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file, file.open("in/b.png", "w") as member:
        Image.fromarray(pixels).save(member, "PNG")
    Image.fromarray(pixels[:, ::-1].copy()).save(tmp_path / "c.bmp")
    turns = [{"role": "user", "content": "<image> or <image>?"}]
    turns.append({"role": "assistant", "content": "both"})
    fields = {"id": 1, "source": "s", "turns": turns}
    path = tmp_path / "a.jsonl"
    lines = [
        fields | {"images": ["a.zip!in/b.png", "c.bmp"]},
        fields | {"images": ["a.zip!in/b.png", "no.png"]},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    report = run(path, tmp_path / "out")
    assert (report.num_written, report.num_frames) == (1, 2)
    assert report.failed == {"missing image": 1}
    members = dict(helpers.tar_members(tmp_path / "out" / "image-00000.tar"))
    assert list(members) == ["00000000.json", "00000000.000.jpg", "00000000.001.jpg"]
    sample = schema.parse_sample(members["00000000.json"], "x")
    assert (sample.kind, sample.frame_count) == ("image", 2)
    first, second = (simplejpeg.decode_jpeg(members[f"00000000.00{i}.jpg"]) for i in (0, 1))
    assert first.shape == (32, 32, 3)
    assert first[:, :15].max() < 20 and first[:, 17:].min() > 235
    assert np.abs(first.astype(int) - second[:, ::-1]).max() < 10


def test_a_shard_of_failures_is_no_shard(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(annotation(0, "none.mp4")))
    report = run(path, tmp_path / "out")
    assert (report.num_written, report.num_present) == (0, 0)
    assert report.failed == {"missing video": 1}
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize(
    "bad", [{"size": 0}, {"fps": 0.0}, {"max_frames": 65}, {"samples_per_shard": 0}]
)
def test_settings_out_of_range(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Settings(**bad)  # type: ignore[arg-type]
