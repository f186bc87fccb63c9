"""SmolTalk: conversations without images, as `HuggingFaceTB/smoltalk`, for one of three stages.

    data/all/train-00000-of-00009.parquet
        messages  list of {role, content}
        source    the subset a conversation comes from

Training on images and video forgets text, so each stage mixes some in: 280,000, 140,000 and 70,000
conversations, drawn once so that no stage repeats what another has seen. Of a smaller copy the
stages take the same shares. Every turn is kept. What is learned is what the stage learns of its
other samples, which its recipe says (`loss_on`); ``meta`` notes the rule the draw was made for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm.data.format.schema import Turn
from vlm.data.make.adapters import pictures, records
from vlm.data.make.adapters.base import each, option
from vlm.data.make.adapters.pictures import Row
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Annotation, Failure
from vlm.errors import DataError

PATTERNS = ("data/all/train-*.parquet", "all/train-*.parquet", "train-*.parquet")
STAGES = (1, 2, 3)
TARGETS = (280_000, 140_000, 70_000)
LOSS_ON = ("all", "answers", "answers")
_SEED = 42


@dataclass(frozen=True, kw_only=True)
class Options:
    stage: int = option("of training: 280,000, 140,000 or 70,000 conversations", choices=STAGES)


class _Message(Row):
    role: str
    content: str


class _Columns(Row):
    messages: list[_Message]
    source: str


def annotations(root: Path, options: Options) -> Iterator[Annotation | Failure]:
    stage = options.stage - 1

    def make(record: Record) -> Iterator[Annotation]:
        row = _Columns.model_validate(record.fields)
        yield Annotation(
            id=record.where,
            source="smoltalk",
            turns=tuple(
                Turn.model_validate({"role": message.role, "content": message.content})
                for message in row.messages
            ),
            meta={"subset": row.source, "stage": options.stage, "loss_on": LOSS_ON[stage]},
        )

    num_rows = sum(_num_rows(path) for path in records.find(root, *PATTERNS))
    drawn = draw(num_rows)[stage]
    rows = pictures.table(root, PATTERNS, tuple(_Columns.model_fields))
    # a row that cannot be read is still a row: every one yields exactly one record or failure
    return each((row for row, taken in zip(rows, drawn, strict=True) if taken), make)


def draw(num_rows: int) -> list[np.ndarray]:
    """For each stage, which rows are its own: (num_rows,) bool. No row belongs to two."""
    order = np.random.default_rng(_SEED).permutation(num_rows)
    whole = sum(TARGETS)
    ends = np.cumsum([0, *(target * min(num_rows, whole) // whole for target in TARGETS)])
    masks = []
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        mask = np.zeros(num_rows, bool)
        mask[order[start:end]] = True
        masks.append(mask)
    return masks


def _num_rows(path: Path) -> int:
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}; download it again") from None
