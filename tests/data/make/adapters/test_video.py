import json
from pathlib import Path

import pytest

from tests.data.make.adapters.clip_sets import collect, write, write_json_lines
from vlm.data.make.adapters import video
from vlm.data.make.adapters.video import Options
from vlm.errors import DataError

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def test_csv(tmp_path: Path) -> None:
    text = 'video,caption,question,answer,source\na.mp4,"A, b",,,mine\nb.mp4,,What?,This.,\n'
    path = write(tmp_path / "a.csv", "\ufeff" + text)
    (first, second), failures = collect(video.annotations, tmp_path, Options(annotations=path))
    assert (first.id, first.source, first.video, first.caption) == (0, "mine", "a.mp4", "A, b")
    assert (second.id, second.source) == (1, "video")
    assert second.turns is not None
    assert [(t.role, t.content) for t in second.turns] == [
        ("user", "What?"),
        ("assistant", "This."),
    ]
    assert not failures


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json(tmp_path: Path, suffix: str) -> None:
    lines = [
        {"id": "x", "source": "s", "video": "a.mp4", "turns": TURNS, "meta": {"k": [1]}},
        {"images": ["a.jpg", "b.jpg"], "caption": "Two."},
        {"caption": "Text."},
    ]
    path = tmp_path / f"a.{suffix}"
    if suffix == "json":
        write(path, json.dumps(lines))
    else:
        write_json_lines(path, *lines)
    options = Options(annotations=path, source="own")
    found, failures = collect(video.annotations, tmp_path, options)
    assert [(a.id, a.source, a.kind) for a in found] == [
        ("x", "s", "video"),
        (1, "own", "image"),
        (2, "own", "text"),
    ]
    assert found[0].meta == {"k": [1]}
    assert not failures


def test_faulty_lines(tmp_path: Path) -> None:
    lines = ["{", "[]", "NaN", '{"video": "../a.mp4", "caption": "x"}', '{"video": "a.mp4"}']
    lines += ['{"question": "x"}', '{"caption": "\\ud800"}', '{"caption": "ok"}', "\udcff"]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    found, failures = collect(video.annotations, tmp_path, Options(annotations=path))
    assert [a.caption for a in found] == ["ok"]
    assert [f.error.partition(":")[0] for f in failures] == [
        f"a.jsonl, line {i}" for i in (1, 2, 3, 4, 5, 6, 7, 9)
    ]


def test_files_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected .jsonl"):
        collect(video.annotations, tmp_path, Options(annotations=write(tmp_path / "a.txt", "")))
