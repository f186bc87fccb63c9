"""VQAv2: questions about COCO images with ten answers each, as the official archives hold them.

    v2_OpenEnded_mscoco_val2014_questions.json    {questions: [{question_id, image_id, question}]}
    v2_mscoco_val2014_annotations.json            {annotations: [{question_id, answer_type,
                                                   multiple_choice_answer, answers: [{answer}]}]}
    val2014/COCO_val2014_000000000042.jpg         or val2014.zip with the same

All questions of an image make one conversation, so that its frames are stored once; evaluation
asks each alone. The answer of a turn is the most frequent one, its task the type of answer; all ten
are in ``meta``, where soft accuracy finds them.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vlm.data.make.adapters import coco_captions, pictures, records
from vlm.data.make.adapters.base import each, failure, option
from vlm.data.make.adapters.pictures import Row
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Annotation, Failure


@dataclass(frozen=True, kw_only=True)
class Options:
    part: str = option("of VQAv2", "train", coco_captions.PARTS)


class _Question(Row):
    question_id: int
    image_id: int
    question: str


class _Answer(Row):
    answer: str


class _Answers(Row):
    question_id: int
    answer_type: str
    multiple_choice_answer: str
    answers: list[_Answer]


class _Known(NamedTuple):
    """What is kept of a question's answers; there are hundreds of thousands."""

    best: str
    kind: str
    answers: tuple[str, ...]


def annotations(root: Path, options: Options) -> Iterator[Annotation | Failure]:
    name = f"{options.part}2014"
    folder = coco_captions.image_folder(root, name)
    known: dict[int, _Known] = {}
    asked: dict[int, list[tuple[int, str]]] = defaultdict(list)
    yield from _read_answers(root, name, known)
    yield from _read_questions(root, name, known, asked)

    def make(record: Record) -> Iterator[Annotation]:
        file_name = f"COCO_{name}_{record.row:012d}.jpg"
        own = [(text, known[number]) for number, text in asked[record.row]]
        turns = [pictures.question(text, answer.best, answer.kind) for text, answer in own]
        yield Annotation(
            id=record.row,
            source="vqav2",
            split_key=coco_captions.image_key(file_name),
            images=(folder + file_name,),
            turns=tuple(turn for exchange in turns for turn in exchange),
            meta={
                "question_ids": [number for number, _ in asked[record.row]],
                "answers": [list(answer.answers) for _, answer in own],
            },
        )

    yield from each((Record(f"image {image}", image, {}) for image in asked), make)


def urls(root: Path) -> Iterator[tuple[str, str]]:
    """What to download: the images that question files ask about, each once."""
    for path in records.find(root, "v2_OpenEnded_mscoco_*2014_questions.json"):
        part = path.name.split("_")[3]
        seen: set[int] = set()
        for found in pictures.typed(records.read(path, key="questions"), _Question):
            if not isinstance(found, Failure) and found[1].image_id not in seen:
                seen.add(found[1].image_id)
                yield coco_captions.address(part, f"COCO_{part}_{found[1].image_id:012d}.jpg")


def _read_answers(root: Path, name: str, known: dict[int, _Known]) -> Iterator[Failure]:
    path = records.find(root, f"v2_mscoco_{name}_annotations.json")[0]
    for found in pictures.typed(records.read(path, key="annotations"), _Answers):
        if isinstance(found, Failure):
            yield found
            continue
        row = found[1]
        # most of the answers are the same few words
        answers = tuple(sys.intern(given.answer) for given in row.answers)
        known[row.question_id] = _Known(row.multiple_choice_answer, row.answer_type, answers)


def _read_questions(
    root: Path, name: str, known: dict[int, _Known], asked: dict[int, list[tuple[int, str]]]
) -> Iterator[Failure]:
    path = records.find(root, f"v2_OpenEnded_mscoco_{name}_questions.json")[0]
    for found in pictures.typed(records.read(path, key="questions"), _Question):
        if isinstance(found, Failure):
            yield found
            continue
        record, row = found
        if row.question_id in known:
            asked[row.image_id].append((row.question_id, row.question))
        else:
            yield failure(record, f"no answers to question {row.question_id}")
