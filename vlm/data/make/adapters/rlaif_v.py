"""RLAIF-V: pairs of a better and a worse answer about an image, as `openbmb/RLAIF-V-Dataset`.

    RLAIF-V-Dataset_000.parquet
        image                       {bytes, path}
        question, chosen, rejected  text
        origin_dataset              where the question comes from

A pair becomes one sample with the question as its prompt, for direct preference optimisation.
"""

from collections.abc import Iterator
from pathlib import Path

from vlm.data.format.schema import Preference, Turn
from vlm.data.make.adapters import pictures
from vlm.data.make.adapters.base import NoOptions, each
from vlm.data.make.adapters.pictures import Picture, Row
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Annotation, Failure


class _Columns(Row):
    image: Picture
    question: str
    chosen: str
    rejected: str
    origin_dataset: str | None


def annotations(root: Path, options: NoOptions) -> Iterator[Annotation | Failure]:
    def make(record: Record) -> Iterator[Annotation]:
        row = _Columns.model_validate(record.fields)
        yield Annotation(
            id=record.where,
            source="rlaif-v",
            split_key=row.image.key,
            images=(row.image.ref,),
            preference=Preference(
                prompt=(Turn(role="user", content=row.question),),
                chosen=row.chosen,
                rejected=row.rejected,
            ),
            meta={"origin": row.origin_dataset} if row.origin_dataset else {},
        )

    patterns = ("RLAIF-V-Dataset_*.parquet", "data/train-*.parquet")
    return each(pictures.table(root, patterns, tuple(_Columns.model_fields)), make)
