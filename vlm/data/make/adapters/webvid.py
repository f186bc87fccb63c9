"""WebVid, whose table of stock footage was published and whose videos mostly went offline.

    data/train/partitions/0000.csv   of `TempoFunk/webvid-10M`: videoid, contentUrl, duration,
    results_2M_train.csv             page_dir, name; or the original release
    videos/PAGE_DIR/VIDEOID.mp4      where --download puts them; others may lie anywhere

The caption is the title that the footage was sold under. Tars that video2dataset made of WebVid
need no adapter: training reads them as they are.
"""

from collections.abc import Iterator
from pathlib import Path

from vlm.data.make.adapters import records
from vlm.data.make.adapters.base import NoOptions, each, want
from vlm.data.make.adapters.clips import Clips
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Annotation, Failure

_TABLES = ("data/train/partitions/*.csv", "data/train/*.csv", "results_*_train.csv", "*.csv")


def tables(root: Path) -> list[Path]:
    """The metadata, of the first layout that is there."""
    for pattern in _TABLES:
        if any(root.glob(pattern)):
            return records.find(root, pattern)
    return records.find(root, *_TABLES)


def annotations(root: Path, options: NoOptions) -> Iterator[Annotation | Failure]:
    paths = tables(root)
    clips = Clips(root)

    def make(record: Record) -> Iterator[Annotation | Failure]:
        number = want(record.fields, "videoid", str)
        yield clips.annotate(
            record,
            f"{record.fields.get('page_dir', '')}/{number}.mp4",
            id=number,
            source="webvid",
            split_key=number,
            caption=want(record.fields, "name", str),
        )

    for path in paths:
        yield from each(records.read(path), make)


def urls(root: Path) -> Iterator[tuple[str, str]]:
    """What to download: address, and path below the root."""
    for path in tables(root):
        for record in records.read(path):
            if isinstance(record, Record) and record.fields.get("contentUrl"):
                fields = record.fields
                place = f"videos/{fields.get('page_dir') or '_'}/{fields.get('videoid')}.mp4"
                yield fields["contentUrl"], place
