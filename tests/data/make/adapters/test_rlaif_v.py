from pathlib import Path
from typing import Any

from tests.data.make.adapters.published import IMAGE, cell, picture, sort_out, write_parquet
from vlm.data.format.schema import Preference, Turn
from vlm.data.make.adapters import rlaif_v
from vlm.data.make.adapters.base import NoOptions
from vlm.data.make.media import MediaReader


def row(number: int | None, **fields: Any) -> dict[str, Any]:
    return {
        "ds_name": "RLAIF-V",
        "image": cell(number),
        "question": "What is shown?",
        "chosen": "A dog.",
        "rejected": "A cat.",
        "origin_dataset": "OK-VQA",
        "origin_split": "{}",
        "idx": "1",
        "image_path": "1.jpg",
    } | fields


def test_pairs(tmp_path: Path) -> None:
    rows = [row(1), row(1, chosen="A brown dog."), row(2)]
    write_parquet(tmp_path / "RLAIF-V-Dataset_000.parquet", rows, image=IMAGE)
    found, failures = sort_out(rlaif_v.annotations(tmp_path, NoOptions()))
    assert not failures
    question = (Turn(role="user", content="What is shown?"),)
    assert found[1].preference == Preference(
        prompt=question, chosen="A brown dog.", rejected="A cat."
    )
    assert found[0].split_identity == found[1].split_identity != found[2].split_identity
    with MediaReader(tmp_path) as media:
        bodies = [media.open(a.images[0]).read() for a in found]
    assert bodies == [picture(1), picture(1), picture(2)]


def test_pairs_that_are_none_become_failures(tmp_path: Path) -> None:
    rows = [row(None), row(1, rejected="A dog."), row(1, chosen=None), row(1, question=" ")]
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows, image=IMAGE)
    found, failures = sort_out(rlaif_v.annotations(tmp_path, NoOptions()))
    assert found == []
    parts = ("the image is empty", "the same answer", "chosen", "content is empty")
    for failure, part in zip(failures, parts, strict=True):
        assert part in failure.error
