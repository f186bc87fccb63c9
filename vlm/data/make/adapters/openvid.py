"""OpenVid-1M, as `nkp37/OpenVid-1M`: a million clips with long captions.

    data/train/OpenVid-1M.csv   video, caption, aesthetic score, motion score, ..., seconds
    OpenVid_part0.zip ...       the clips; some zips are published in two halves to be joined by
    OpenVid_part73_partaa ...   cat OpenVid_part73_parta* > OpenVid_part73.zip

Unpacked clips may lie in any folder below the root. Clips of one video fall into one split.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from vlm.data.make.adapters import records
from vlm.data.make.adapters.base import NoOptions, each, want
from vlm.data.make.adapters.clips import Clips
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Annotation, Failure

#: VIDEO_PART_FROMtoTO.mp4, frames of a video
_CUT = re.compile(r"_\d+_\d+to\d+\.\w+$")
_SCORES = ("aesthetic score", "motion score", "temporal consistency score", "camera motion")


def annotations(root: Path, options: NoOptions) -> Iterator[Annotation | Failure]:
    paths = records.find(root, "data/train/OpenVid*.csv", "OpenVid*.csv")
    clips = Clips(root)

    def make(record: Record) -> Iterator[Annotation | Failure]:
        name = want(record.fields, "video", str)
        yield clips.annotate(
            record,
            name,
            id=name,
            source="openvid",
            split_key=_CUT.sub("", name),
            caption=want(record.fields, "caption", str),
            meta={key: record.fields[key] for key in _SCORES if record.fields.get(key)},
        )

    for path in paths[:1]:
        # OpenVidHD.csv repeats rows of OpenVid-1M.csv, which sorts first
        yield from each(records.read(path), make)
