"""Small copies of data sets in the layouts they are published in."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlm.data.make.annotations import Annotation, Failure

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(number: int, format: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    """An image file; another one for each number."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(out, format)
    return out.getvalue()


def cell(number: int | None) -> dict[str, Any] | None:
    """An image as the `datasets` package stores it."""
    return None if number is None else {"bytes": picture(number), "path": f"{number}.jpg"}


def write_parquet(path: Path, rows: list[dict[str, Any]], **types: pa.DataType) -> Path:
    """``types`` are those of columns that cannot be told from the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row.get(name) for row in rows] for name in rows[0]}
    arrays = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path, row_group_size=2)
    return path


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_picture(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number, {".png": "PNG", ".webp": "WEBP"}.get(path.suffix, "JPEG")))
    return path


def sort_out(found: Iterable[Annotation | Failure]) -> tuple[list[Annotation], list[Failure]]:
    items = list(found)
    annotations = [item for item in items if isinstance(item, Annotation)]
    for annotation in annotations:
        # what the tool writes must read back to the same
        line = annotation.model_dump_json(exclude_defaults=True)
        assert Annotation.model_validate_json(line) == annotation
    return annotations, [item for item in items if isinstance(item, Failure)]


def texts(annotation: Annotation) -> list[tuple[str, str]]:
    assert annotation.turns is not None
    return [(turn.role, turn.content) for turn in annotation.turns]
