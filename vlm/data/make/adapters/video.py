"""Files of videos and text: JSON lines, a JSON array or CSV of one's own.

Each record holds fields of an annotation (`vlm.data.make.annotations.Annotation`): ``video`` or
``images``, ``turns`` or ``caption``, and what else it knows; without media it is a text sample.
Instead of ``turns`` it may hold ``question`` and ``answer``, which fit in the cells of a CSV;
``id`` and ``source`` may be left out.

    video,caption
    clips/a.mp4,A cat jumps.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm.data.make.adapters import records
from vlm.data.make.adapters.base import each, option, want
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Annotation, Failure


@dataclass(frozen=True, kw_only=True)
class Options:
    annotations: Path = option("JSON lines, a JSON array or CSV")
    source: str = option("of records that name none", "video")


def annotations(root: Path, options: Options) -> Iterator[Annotation | Failure]:
    def make(record: Record) -> Iterator[Annotation]:
        # an empty cell of a CSV is a field that is not there
        given = {name: value for name, value in record.fields.items() if value != ""}
        given = {"id": record.row, "source": options.source} | given
        if "question" in given:
            given["turns"] = [
                {"role": "user", "content": want(given, "question", str)},
                {"role": "assistant", "content": want(given, "answer", str)},
            ]
            del given["question"], given["answer"]
        # as JSON, because only there is a list as good as a tuple
        yield Annotation.model_validate_json(json.dumps(given))

    return each(records.read(options.annotations), make)
