"""ShareGPT4Video, as `ShareGPT4Video/ShareGPT4Video`: 40K videos described by GPT-4V.

    sharegpt4video_40k.jsonl               {video_id, video_path, captions: [{idx, content}]}
    zip_folder/panda/panda_videos_1.zip    the videos of panda, pexels, pixabay, mixkit, ego4d,
    zip_folder/...                         bdd100k; unpacked they may lie anywhere

The caption with the index -1 is about the whole video, the others about parts of it: only that one
is taken.
"""

from collections.abc import Iterator
from pathlib import Path

from vlm.data.make.adapters import records
from vlm.data.make.adapters.base import NoOptions, each, want
from vlm.data.make.adapters.clips import Clips
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Annotation, Failure
from vlm.errors import SampleError

WHOLE = "-1"


def annotations(root: Path, options: NoOptions) -> Iterator[Annotation | Failure]:
    paths = records.find(root, "sharegpt4video_40k.jsonl")
    clips = Clips(root)

    def make(record: Record) -> Iterator[Annotation | Failure]:
        name = want(record.fields, "video_id", str)
        path = want(record.fields, "video_path", str)
        caption = _whole(want(record.fields, "captions", list))
        yield clips.annotate(
            record, path, id=name, source="sharegpt4video", split_key=name, caption=caption
        )

    for path in paths:
        yield from each(records.read(path), make)


def _whole(captions: list[object]) -> str:
    for caption in captions:
        if isinstance(caption, dict) and str(caption.get("idx")) == WHOLE:
            return want(caption, "content", str)
    raise SampleError(f"no caption with `idx` {WHOLE}, which would be that of the whole video")
