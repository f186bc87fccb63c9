"""Conversations about videos in LLaVA's format: LLaVA-Video-178K and VISTA-400K.

`lmms-lab/LLaVA-Video-178K`, a folder for each of its configurations:

    0_30_s_academic_v0_1/0_30_s_academic_v0_1_cap_processed.json        captions
    0_30_s_academic_v0_1/0_30_s_academic_oe_v0_1_qa_processed.json      open-ended questions
    0_30_s_academic_v0_1/0_30_s_academic_mc_v0_1_qa_processed.json      multiple choice
        [{id, video, conversations: [{from: human or gpt, value}]}]
    0_30_s_academic_v0_1/*_videos_1.tar.gz      to be unpacked, beside it or anywhere else

`TIGER-Lab/VISTA-400K`, a folder for each way of making longer or larger videos:

    two_needle_niah_qa/*.json or *.jsonl        the same fields
    two_needle_niah_qa/*.tar                    the videos, also unpacked

Every turn is kept. The `<image>` of these sets is the place of the video, here `<video>`.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm.data.format.schema import Turn
from vlm.data.make.adapters import llava, records
from vlm.data.make.adapters.base import each, option
from vlm.data.make.adapters.clips import Clips
from vlm.data.make.adapters.pictures import Row
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Annotation, Failure
from vlm.errors import ConfigError, SampleError

#: what a file's name says of its questions
_TASKS = {"_cap_": "caption", "_oe_": "open_ended", "_mc_": "multi_choice"}
_MARKS = ("<image>", "<video>")


@dataclass(frozen=True, kw_only=True)
class Options:
    configs: tuple[str, ...] = option("folders of the data set; default: all that are there", ())


class _Columns(Row):
    id: str | int | None = None
    video: str
    conversations: list[llava.Message]


def llava_video(root: Path, options: Options) -> Iterator[Annotation | Failure]:
    """The adapter `llava-video`."""
    return _annotations(root, options, "llava-video")


def vista(root: Path, options: Options) -> Iterator[Annotation | Failure]:
    """The adapter `vista`."""
    return _annotations(root, options, "vista")


def _annotations(root: Path, options: Options, source: str) -> Iterator[Annotation | Failure]:
    if missing := [name for name in options.configs if not (root / name).is_dir()]:
        raise ConfigError(f"configs {', '.join(missing)}: no such folder in {root}")
    folders = options.configs or ("*",)
    paths = records.find(root, *[f"{f}/*.{kind}" for f in folders for kind in ("json", "jsonl")])
    clips = Clips(root)
    for path in paths:
        task = next((task for part, task in _TASKS.items() if part in path.name), None)
        make = functools.partial(_conversation, clips, source, path.parent.name, task)
        yield from each(records.read(path), make)


def _conversation(
    clips: Clips, source: str, folder: str, task: str | None, record: Record
) -> Iterator[Annotation | Failure]:
    row = _Columns.model_validate(record.fields)
    yield clips.annotate(
        record,
        f"{folder}/{row.video}",
        id=row.video if row.id is None else row.id,
        source=f"{source}/{folder}",
        split_key=Path(row.video).stem,
        turns=_turns(row.conversations, task),
    )


def _turns(messages: list[llava.Message], task: str | None) -> tuple[Turn, ...]:
    """With one place for the video: where the first question has it, else before everything."""
    turns = []
    is_placed = False
    for message in messages:
        turn = llava.turn(message)
        if turn.role == "assistant":
            turn = turn.model_copy(update={"task": task})
        elif turn.role == "user":
            text = turn.content
            for mark in _MARKS:
                text = text.replace(mark, "\0")
            before, found, after = text.partition("\0")
            place = "<video>" if found and not is_placed else ""
            is_placed = is_placed or bool(found)
            content = (before + place + after.replace("\0", "")).strip()
            if not content.replace("<video>", "").strip():
                raise SampleError("a question without words")
            turn = Turn(role="user", content=content)
        turns.append(turn)
    return tuple(turns)
