import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.data.make.adapters.published import (
    IMAGE,
    cell,
    picture,
    sort_out,
    texts,
    write_json,
    write_parquet,
    write_picture,
)
from vlm.data.make.adapters import laion
from vlm.data.make.adapters.laion import Options
from vlm.data.make.annotations import Annotation
from vlm.data.make.media import MediaReader
from vlm.errors import DataError


def bodies(root: Path, found: list[Annotation]) -> list[bytes]:
    with MediaReader(root) as media:
        return [media.open(annotation.images[0]).read() for annotation in found]


def captions(found: list[Annotation]) -> list[str]:
    return [texts(annotation)[1][1] for annotation in found]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))


def test_dir(tmp_path: Path) -> None:
    records: list[Any] = [
        {"image": "a.jpg", "caption": "one", "url": "http://x/1"},
        {"image_path": "sub/b.png", "text": "two"},
        {"image": "c.jpg"},
        {"caption": "no image"},
        {"image": 7, "caption": "number"},
        {"image": {"ref": "a.jpg"}, "caption": "half a picture"},
        {"image": "../x.jpg", "caption": "out"},
        {"url": "http://x/2", "caption": "only a URL"},
    ]
    write_json(tmp_path / "metadata.json", records)
    write_picture(tmp_path / "a.jpg", 1)
    write_picture(tmp_path / "sub" / "b.png", 2)
    found, failures = sort_out(laion.annotations(tmp_path, Options(layout="dir")))
    assert texts(found[0]) == [("user", "A photo of"), ("assistant", "one")]
    assert captions(found) == ["one", "two", "only a URL"]
    assert bodies(tmp_path, found[:2]) == [picture(1), picture(2, "PNG")]
    assert [a.split_identity for a in found] == ["http://x/1", "sub/b.png", "http://x/2"]
    parts = ("no text", "no image", "no image", "key: Field required", "leads out")
    for number, (failure, part) in enumerate(zip(failures, parts, strict=True), 2):
        assert failure.error.startswith(f"metadata.json!{number}: ") and part in failure.error


def test_jsonl_below_the_root_without_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    lines = [json.dumps({"image": "a.jpg", "TEXT": "one"}), "{broken", '{"image": "\\ud800"}']
    (tmp_path / "part" / "a.jsonl").write_text("\n".join(lines))
    options = Options(layout="jsonl", files=("part/*.jsonl",), prompt="")
    (found,), failures = sort_out(laion.annotations(tmp_path, options))
    assert (found.caption, found.turns, found.images) == ("one", None, ("part/a.jpg",))
    assert ["line 2" in failures[0].error, "not UTF-8" in failures[1].error] == [True, True]


def test_txt(tmp_path: Path) -> None:
    for number, suffix in enumerate(("jpg", "png", "webp", "jpeg")):
        write_picture(tmp_path / f"{number:05d}" / f"a.{suffix}", number)
        (tmp_path / f"{number:05d}" / "a.txt").write_text(f"text {number}\n")
    (tmp_path / "readme.txt").write_text("about")
    write_picture(tmp_path / "bad.jpg", 9)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    found, failures = sort_out(laion.annotations(tmp_path, Options(layout="txt")))
    assert captions(found) == [f"text {i}" for i in range(4)]
    assert bodies(tmp_path, found)[0] == picture(0)
    assert {failure.reason for failure in failures} == {"text without image", "unreadable record"}


def test_parquet_with_images_or_their_names(tmp_path: Path) -> None:
    rows = [{"jpg": picture(1), "caption": "bytes", "url": "http://x/1"}]
    write_parquet(tmp_path / "00000.parquet", rows)
    rows = [{"image": cell(2), "text": "struct"}, {"image": cell(None), "text": "none"}]
    write_parquet(tmp_path / "00001.parquet", rows, image=IMAGE)
    write_parquet(tmp_path / "sub" / "00002.parquet", [{"file_name": "c.jpg", "TEXT": "name"}])
    write_picture(tmp_path / "sub" / "c.jpg", 3)
    write_parquet(tmp_path / "relaion.parquet", [{"url": "http://x/3", "caption": "a URL"}])
    found, failures = sort_out(laion.annotations(tmp_path, Options(layout="parquet")))
    assert captions(found) == ["bytes", "struct", "a URL", "name"]
    ((address, place),) = [pair for pair in laion.urls(tmp_path) if pair[0] == "http://x/3"]
    write_picture(tmp_path / place, 4)
    assert bodies(tmp_path, found) == [picture(1), picture(2), picture(4), picture(3)]
    assert ["no image" in failure.error for failure in failures] == [True]


def test_tar(tmp_path: Path) -> None:
    meta = {"caption": "in the JSON", "sha256": "abc", "image_path": "/elsewhere/1.jpg"}
    write_tar(
        tmp_path / "00000.tar",
        {
            "000000001.jpg": picture(1),
            "000000001.json": json.dumps(meta).encode(),
            "000000002.png": picture(2, "PNG"),
            "000000002.txt": b"beside it",
            "000000002.json": json.dumps({"caption": "not this"}).encode(),
            "a/3.jpg": picture(3),
            "b/3.jpg": picture(4),
            "b/3.caption": b"of folder b",
            "5.txt": b"no image",
            "6.jpg": picture(6),
            "6.json": b"[]",
            "7.jpg": picture(7),
            "7.json": b'{"caption": ' * 3,
            "8.jpg": picture(8),
            "8.txt": b"\xff\xfe",
            "9.pkl": b"never read",
        },
    )
    write_tar(tmp_path / "00001.tar", {"x.jpg": picture(9), "x.txt": b"second"})
    write_tar(tmp_path / "00002.tar", {"x.jpg": picture(9), "x.txt": b"third"})
    options = Options(layout="tar", files=("{00000..00001}.tar",))
    found, failures = sort_out(laion.annotations(tmp_path, options))
    assert captions(found) == ["in the JSON", "beside it", "of folder b", "second"]
    assert bodies(tmp_path, found) == [picture(1), picture(2, "PNG"), picture(4), picture(9)]
    assert found[0].split_identity == "abc"
    assert len({annotation.id for annotation in found}) == 4
    errors = {failure.error.split("!")[1].split(":")[0] for failure in failures}
    assert errors == {"a/3", "5", "6", "7", "8", "9"}


def test_a_tar_cut_short_is_a_mistake(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.jpg": picture(9), "x.txt": b"second"})
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"a\.tar.*download it again"):
        list(laion.annotations(tmp_path, Options(layout="tar")))
    with pytest.raises(DataError, match=r"holds no \*\*/\*\.parquet"):
        list(laion.annotations(tmp_path, Options(layout="parquet")))
