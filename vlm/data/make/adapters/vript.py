"""Vript, as `Mutonix/Vript`: videos of YouTube cut into scenes, each with a script.

    vript_captions/vript_long_videos_captions.jsonl    {meta, clip_id, caption: {content, ...}}
    vript_captions/vript_short_videos_captions.jsonl
    vript_captions/vript_*_captions.zip                or one JSON a video: {meta, data: {clip_id:
                                                       {caption, ...}}}, also unpacked
    vript_long_videos_clips/clips_1_of_1095.zip        VIDEO/VIDEO-Scene-001.mp4, also unpacked
    vript_short_videos_clips/shorts_clips_1_of_42.zip

A scene is a sample, its content the caption; scenes of one video fall into one split.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from vlm.data.make.adapters import records
from vlm.data.make.adapters.base import NoOptions, each, want
from vlm.data.make.adapters.clips import Clips
from vlm.data.make.adapters.records import BAD_ROW, Record
from vlm.data.make.annotations import Annotation, Failure
from vlm.data.make.archives import open_archive
from vlm.errors import DataError, SampleError

_SCRIPT = ("shot_type", "camera_movement", "scene_title")


def annotations(root: Path, options: NoOptions) -> Iterator[Annotation | Failure]:
    paths = records.find(
        root,
        "vript_captions/*_captions.jsonl",
        "vript_captions/*_captions.zip",
        "vript_captions/**/*_caption.json",
    )
    clips = Clips(root)

    def make(record: Record) -> Iterator[Annotation | Failure]:
        clip = want(record.fields, "clip_id", str)
        script = want(record.fields, "caption", dict)
        yield clips.annotate(
            record,
            clip,
            id=clip,
            source="vript",
            split_key=clip.rpartition("-Scene-")[0] or clip,
            caption=want(script, "content", str),
            meta={key: script[key] for key in _SCRIPT if isinstance(script.get(key), str)},
        )

    for path in paths:
        yield from each(_scenes(path), make)


def _scenes(path: Path) -> Iterator[Record | Failure]:
    """The scenes of one file, however it holds them."""
    if path.suffix == ".jsonl":
        yield from records.read(path)
    elif path.suffix == ".json":
        yield from _of_video(path.name, path.read_bytes())
    else:
        try:
            archive = open_archive(path)
        except (SampleError, OSError) as error:
            raise DataError(f"{path}: {error}; download it again") from None
        with closing(archive):
            for name in archive.names():
                if not name.endswith("_caption.json"):
                    continue
                try:
                    body = archive.read(name)
                except SampleError as error:
                    yield Failure(reason=BAD_ROW, error=str(error))
                else:
                    yield from _of_video(f"{path.name}, member {name}", body)


def _of_video(where: str, body: bytes) -> Iterator[Record | Failure]:
    try:
        scenes: Any = json.loads(body)["data"]
        found = list(scenes.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        yield Failure(reason=BAD_ROW, error=f"{where}: expected an object with `data`: {error}")
        return
    for row, (clip, scene) in enumerate(found):
        fields = {"clip_id": clip} | (scene if isinstance(scene, dict) else {})
        yield records.checked(f"{where}, scene {clip[:100]}", row, fields)
