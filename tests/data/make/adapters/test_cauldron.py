import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.data.make.adapters.published import (
    IMAGE,
    cell,
    picture,
    sort_out,
    texts,
    write_parquet,
)
from vlm.data.make.adapters import cauldron
from vlm.data.make.adapters.cauldron import SUBSETS, Options
from vlm.data.make.media import MediaReader
from vlm.errors import ConfigError, DataError


def row(images: list[int | None], *exchanges: tuple[Any, Any]) -> dict[str, Any]:
    return {
        "images": [cell(number) for number in images],
        "texts": [{"user": u, "assistant": a, "source": "x"} for u, a in exchanges],
    }


def write(root: Path, subset: str, rows: list[dict[str, Any]]) -> Path:
    path = root / subset / "train-00000-of-00001-0123456789abcdef.parquet"
    return write_parquet(path, rows, images=pa.list_(IMAGE))


def test_every_turn_and_every_image(tmp_path: Path) -> None:
    write(tmp_path, "ai2d", [row([1], ("Q1?", "A1"), ("Q2?", "A2")), row([2], ("Q3?", "A3"))])
    write(tmp_path, "nlvr2", [row([3, 4], ("Same?", "No."))])
    found, failures = sort_out(cauldron.annotations(tmp_path, Options()))
    assert not failures
    assert [a.source for a in found] == ["cauldron/ai2d", "cauldron/ai2d", "cauldron/nlvr2"]
    assert texts(found[0]) == [
        ("user", "Q1?"),
        ("assistant", "A1"),
        ("user", "Q2?"),
        ("assistant", "A2"),
    ]
    with MediaReader(tmp_path) as media:
        bodies = [[media.open(ref).read() for ref in a.images] for a in found]
    assert bodies == [[picture(1)], [picture(2)], [picture(3), picture(4)]]
    assert len({a.id for a in found}) == 3
    assert found[2].split_key == hashlib.blake2b(picture(3), digest_size=16).hexdigest()


def test_an_image_in_two_subsets_has_one_identity(tmp_path: Path) -> None:
    write(tmp_path, "vqav2", [row([1], ("Q?", "A")), row([2], ("Q?", "A"))])
    write(tmp_path, "cocoqa", [row([2], ("Q?", "A"))])
    found, _ = sort_out(cauldron.annotations(tmp_path, Options()))
    other, first, second = (a.split_identity for a in found)
    assert other == second != first


def test_only_the_subsets_asked_for(tmp_path: Path) -> None:
    for subset in ("ai2d", "vsr", "not_a_subset"):
        write(tmp_path, subset, [row([1], ("Q?", "A"))])
    found, _ = sort_out(cauldron.annotations(tmp_path, Options(subsets=("vsr",))))
    assert [a.source for a in found] == ["cauldron/vsr"]
    assert len(sort_out(cauldron.annotations(tmp_path, Options()))[0]) == 2


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    rows = [
        row([None], ("Q?", "A")),
        row([1], ("Q?", "")),
        row([1], (None, "A")),
        row([1]),
        row([1], ("<image> and <image>?", "A")),
        {"images": None, "texts": [{"user": "Q?", "assistant": "A", "source": "x"}]},
        row([], ("What is HTML?", "A language")),
        row([1], ("<image>?", "A")),
    ]
    write(tmp_path, "iconqa", rows)
    found, failures = sort_out(cauldron.annotations(tmp_path, Options()))
    assert [texts(a)[0][1] for a in found] == ["What is HTML?", "<image>?"]
    assert [a.images for a in found] == [(), (f"{found[1].id}/images/0",)]
    errors = [failure.error for failure in failures]
    for i, (error, part) in enumerate(
        zip(
            errors,
            ("image is empty", "content is empty", "user", "turns", "2 <image>", "images"),
            strict=True,
        )
    ):
        assert error.startswith("iconqa/train-0") and f"!{i}:" in error and part in error
    assert {failure.reason for failure in failures} == {"bad record"}


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds none of the 50 subsets"):
        list(cauldron.annotations(tmp_path, Options()))
    with pytest.raises(ConfigError, match="subsets nope: expected some of ai2d"):
        list(cauldron.annotations(tmp_path, Options(subsets=("nope",))))
    with pytest.raises(DataError, match=r"holds no vsr/train-\*\.parquet"):
        list(cauldron.annotations(tmp_path, Options(subsets=("vsr",))))
    write_parquet(tmp_path / "vsr" / "train-0.parquet", [{"images": [cell(1)]}])
    with pytest.raises(DataError, match="no column texts"):
        list(cauldron.annotations(tmp_path, Options()))
    (tmp_path / "vsr" / "train-0.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="cannot be read"):
        list(cauldron.annotations(tmp_path, Options()))


def test_there_are_fifty_subsets() -> None:
    assert len(set(SUBSETS)) == 50
    assert list(SUBSETS) == sorted(SUBSETS)
