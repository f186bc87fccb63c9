import json
from pathlib import Path

import pytest
import simplejpeg

from tests.data import helpers
from tests.data.clips import indices, write_clip
from vlm.data import precompute, schema
from vlm.data.precompute import Settings
from vlm.errors import ConfigError, DataError

SETTINGS = Settings(size=32, samples_per_shard=3)


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
    files = [path for path in output.rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def test_annotations_become_samples(annotations: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = precompute.run(annotations, tmp_path, output, SETTINGS)
    assert sorted(contents(output)) == [
        "failed.jsonl",
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
    assert report.failed == {"missing video": 1, "undecodable video": 1, "bad annotation": 1}


def test_failures_name_line_id_and_reason(annotations: Path, tmp_path: Path) -> None:
    precompute.run(annotations, tmp_path, tmp_path / "out", SETTINGS)
    lines = (tmp_path / "out" / "failed.jsonl").read_text().splitlines()
    failures = [json.loads(line) for line in lines]
    assert [(f["line"], f["id"], f["reason"]) for f in failures] == [
        (4, "id-3", "missing video"),
        (6, "id-5", "undecodable video"),
        (10, None, "bad annotation"),
    ]
    assert "clips/none.mp4" in failures[0]["error"]
    assert "cannot be decoded" in failures[1]["error"]


def test_output_does_not_depend_on_workers(annotations: Path, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    precompute.run(annotations, tmp_path, tmp_path / "one", SETTINGS)
    precompute.run(
        annotations,
        tmp_path,
        tmp_path / "two",
        SETTINGS,
        workers=2,
        progress=lambda *counts: done.append(counts),
    )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert done == [(0, 9), (3, 9), (6, 9), (7, 9), (9, 9)]


def test_a_second_run_writes_what_is_missing(annotations: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = precompute.run(annotations, tmp_path, output, SETTINGS)
    before = contents(output)
    (output / "video-00002.tar").unlink()
    (output / "failed.jsonl").unlink()
    untouched = (output / "video-00000.tar").stat().st_mtime_ns
    report = precompute.run(annotations, tmp_path, output, SETTINGS)
    assert contents(output) == before
    assert (output / "video-00000.tar").stat().st_mtime_ns == untouched
    assert (report.num_written, report.num_present) == (1, 6)
    assert report.failed == first.failed


def test_a_crash_leaves_no_half_shard_and_no_failure_is_lost(
    annotations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    expected = tmp_path / "expected"
    precompute.run(annotations, tmp_path, expected, SETTINGS)
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
        precompute.run(annotations, tmp_path, output, SETTINGS)
    assert [p.name for p in output.glob("*.tar")] == ["video-00000.tar"]
    monkeypatch.setattr(precompute, "extract_frames", real)
    precompute.run(annotations, tmp_path, output, SETTINGS)
    assert contents(output) == contents(expected)


@pytest.mark.parametrize("change", ["size", "annotations"])
def test_shards_made_otherwise_do_not_mix(annotations: Path, tmp_path: Path, change: str) -> None:
    output = tmp_path / "out"
    precompute.run(annotations, tmp_path, output, SETTINGS)
    settings = Settings(size=64, samples_per_shard=3) if change == "size" else SETTINGS
    if change == "annotations":
        annotations.write_text(annotations.read_text() + "\n" + json.dumps(annotation(1, None)))
    with pytest.raises(DataError, match=f"other {change}"):
        precompute.run(annotations, tmp_path, output, settings)


def test_a_shard_of_failures_is_no_shard(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(annotation(0, "none.mp4")))
    report = precompute.run(path, tmp_path, tmp_path / "out", SETTINGS)
    assert (report.num_written, report.num_present) == (0, 0)
    assert report.failed == {"missing video": 1}
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize(
    "bad", [{"size": 0}, {"fps": 0.0}, {"max_frames": 65}, {"samples_per_shard": 0}]
)
def test_settings_out_of_range(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Settings(**bad)  # type: ignore[arg-type]
