import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vlm.data.make import spool as spools
from vlm.data.make.adapters.base import Adapter
from vlm.data.make.annotations import Annotation, Failure
from vlm.data.make.spool import Source, Split, Spooled, read_failures, spool
from vlm.errors import ConfigError, DataError


@dataclass(frozen=True)
class Options:
    stage: int = 1
    table: Path | None = None


def adapter(count: int, videos: int = 1000) -> Adapter:
    """Sample i is about video ``i % videos``; every tenth record is faulty."""

    def annotations(root: Path, options: Options) -> Iterator[Annotation | Failure]:
        for i in range(count):
            if i % 10 == 9:
                yield Failure(reason="bad record", error=f"row {i}")
                continue
            video = f"{i % videos}.mp4"
            yield Annotation(id=i, source=f"stage {options.stage}", video=video, caption="x")

    return Adapter(annotations=annotations, licence="MIT", help="", options=Options)


def lines(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "annotations.jsonl").open()]


def run(source: Source, output: Path) -> Spooled:
    return spool(source, source.fingerprint(), output, lambda _: None)


def test_the_stream_is_written_with_its_licence(tmp_path: Path) -> None:
    found = run(Source("x", adapter(30), tmp_path, Options(stage=2)), tmp_path / "o")
    assert found.num_annotations == 27
    assert found.failed == {"bad record": 3}
    failures = read_failures(tmp_path / "o" / "failed" / "adapter.jsonl")
    assert [f.error for f in failures] == ["row 9", "row 19", "row 29"]
    first = lines(tmp_path / "o")[0]
    assert first == {
        "id": 0,
        "source": "stage 2",
        "licence": "MIT",
        "video": "0.mp4",
        "caption": "x",
    }
    assert [line["id"] for line in lines(tmp_path / "o")] == [i for i in range(30) if i % 10 != 9]


def test_splits_are_by_video_and_share_all(tmp_path: Path) -> None:
    parts: dict[str, set[object]] = {}
    numbers = {}
    for part in ("train", "val"):
        split = Split(part, val_frac=0.2, seed=3)  # type: ignore[arg-type]
        source = Source("x", adapter(4000, videos=400), tmp_path, Options(), split)
        found = run(source, tmp_path / part)
        parts[part] = {line["video"] for line in lines(tmp_path / part)}
        numbers[part] = {line["id"] for line in lines(tmp_path / part)}
        assert found.num_annotations + found.num_other_split == 3600
    assert not parts["train"] & parts["val"]
    assert len(numbers["train"] | numbers["val"]) == 3600
    assert 0.12 < len(parts["val"]) / 400 < 0.28
    assert {Split("val", 0.2, seed).takes("0.mp4") for seed in range(50)} == {True, False}


def test_a_larger_share_keeps_what_a_smaller_one_took() -> None:
    names = [f"{i}.mp4" for i in range(1000)]
    small, large = (
        {name for name in names if Split("val", share, 1).takes(name)} for share in (0.1, 0.3)
    )
    assert small < large


@pytest.mark.parametrize("split", [("train", 0.0), ("val", 1.0), ("all", 0.1), ("val", -0.1)])
def test_shares_out_of_range(split: tuple[str, float]) -> None:
    with pytest.raises(ConfigError, match="val_frac"):
        Split(*split)  # type: ignore[arg-type]


def test_only_the_first_ones(tmp_path: Path) -> None:
    source = Source("x", adapter(30), tmp_path, Options(), max_samples=12)
    assert run(source, tmp_path / "o").num_annotations == 12
    assert [line["id"] for line in lines(tmp_path / "o")][-1] == 12


def test_a_second_run_does_not_ask_the_adapter(tmp_path: Path) -> None:
    first = run(Source("x", adapter(30), tmp_path, Options()), tmp_path / "o")
    assert run(Source("x", adapter(40), tmp_path, Options()), tmp_path / "o") == first


def test_a_run_that_was_killed_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "o"
    with monkeypatch.context() as patch:
        patch.setattr(spools, "write_text", lambda *_: pytest.fail("killed"))
        with pytest.raises(BaseException, match="killed"):
            run(Source("x", adapter(30), tmp_path, Options()), output)
    assert (output / "annotations.jsonl").exists()
    assert run(Source("x", adapter(20), tmp_path, Options()), output).num_annotations == 18
    assert len(lines(output)) == 18


@pytest.mark.parametrize("name", ["adapter", "options", "split", "max_samples"])
def test_another_request_is_refused(tmp_path: Path, name: str) -> None:
    run(Source("x", adapter(30), tmp_path, Options()), tmp_path / "o")
    changed = {
        "adapter": Source("y", adapter(30), tmp_path, Options()),
        "options": Source("x", adapter(30), tmp_path, Options(stage=3)),
        "split": Source("x", adapter(30), tmp_path, Options(), Split("val", 0.5)),
        "max_samples": Source("x", adapter(30), tmp_path, Options(), max_samples=5),
    }[name]
    with pytest.raises(DataError, match=f"with other {name} "):
        run(changed, tmp_path / "o")


def test_files_among_the_options_count_by_what_they_hold(tmp_path: Path) -> None:
    tables = [tmp_path / name for name in ("a", "b", "c")]
    for table, text in zip(tables, ("same", "same", "other"), strict=True):
        table.write_text(text)
    sources = [Source("x", adapter(30), tmp_path, Options(table=table)) for table in tables]
    run(sources[0], tmp_path / "o")
    run(sources[1], tmp_path / "o")
    with pytest.raises(DataError, match="with other options "):
        run(sources[2], tmp_path / "o")


def test_annotations_that_were_edited(tmp_path: Path) -> None:
    source = Source("x", adapter(30), tmp_path, Options())
    run(source, tmp_path / "o")
    with (tmp_path / "o" / "annotations.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match="has changed since"):
        run(source, tmp_path / "o")
    (tmp_path / "o" / "precompute.json").write_text("[]")
    with pytest.raises(DataError, match="none of ours"):
        run(source, tmp_path / "o")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        run(Source("x", adapter(30), tmp_path / "none", Options()), tmp_path / "o")
    with pytest.raises(DataError, match="found no sample"):
        run(Source("x", adapter(0), tmp_path, Options()), tmp_path / "o")
    assert not (tmp_path / "o" / "annotations.jsonl").exists()


def test_shards_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "00000.tar").touch()
    with pytest.raises(DataError, match="holds shards but no precompute.json"):
        run(Source("x", adapter(30), tmp_path, Options()), tmp_path / "o")


def test_too_long_to_be_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spools, "MAX_JSON_BYTES", 80)
    found = run(Source("x", adapter(5), tmp_path, Options(stage=10**20)), tmp_path / "o")
    assert found.failed == {"too long": 5}
