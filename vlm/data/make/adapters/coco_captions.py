"""COCO: five captions for each image, and where sources about its images find them.

    annotations/captions_train2017.json    {images: [{id, file_name}],
                                            annotations: [{image_id, caption}]}
    train2017/000000000009.jpg             or train2017.zip with the same

Several sources are about these images, so splits go by the image's number: with one seed, no image
is in the training part of one source and the validation part of another.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm.data.make.adapters import pictures, records
from vlm.data.make.adapters.base import each, option
from vlm.data.make.adapters.pictures import CAPTIONS, Row
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Annotation, Failure

PARTS = ("train", "val")
_NUMBER = re.compile(r"(?:COCO_(?:train|val|test)201\d_)?(\d{12})\.jpg")


def image_key(file_name: str) -> str | None:
    """The identity of an image by its file's name; None if that is not one of COCO."""
    match = _NUMBER.fullmatch(file_name.rpartition("/")[2])
    return f"coco/{match[1]}" if match else None


def image_folder(root: Path, name: str) -> str:
    """The prefix of refs to the images of e.g. ``train2017``."""
    places = (name, f"{name}.zip!{name}")
    return pictures.find_folder(root, (*places, *(f"images/{place}" for place in places)))


def address(part: str, file_name: str) -> tuple[str, str]:
    """Where to download an image of e.g. ``train2017``, and its path below the root."""
    return f"http://images.cocodataset.org/{part}/{file_name}", f"{part}/{file_name}"


@dataclass(frozen=True, kw_only=True)
class Options:
    year: int = option("of COCO", 2017, (2014, 2017))
    part: str = option("of COCO", "train", PARTS)
    captions: str = option("which of an image's five captions become samples", "first", CAPTIONS)


class _Image(Row):
    id: int
    file_name: str


class _Caption(Row):
    image_id: int
    caption: str


def annotations(root: Path, options: Options) -> Iterator[Annotation | Failure]:
    name = f"{options.part}{options.year}"
    path = records.find(root, f"annotations/captions_{name}.json", f"captions_{name}.json")[0]
    folder = image_folder(root, name)
    texts: dict[int, list[str]] = defaultdict(list)
    for found in pictures.typed(records.read(path, key="annotations"), _Caption):
        if isinstance(found, Failure):
            yield found
        else:
            texts[found[1].image_id].append(found[1].caption)

    def make(record: Record) -> Iterator[Annotation]:
        image = _Image.model_validate(record.fields)
        key = image_key(image.file_name) or image.file_name
        ref = folder + image.file_name
        yield from pictures.captioned(
            "coco-captions", str(image.id), ref, key, texts[image.id], options.captions
        )

    yield from each(records.read(path, key="images"), make)


def urls(root: Path) -> Iterator[tuple[str, str]]:
    """What to download: the images that caption files name."""
    for path in records.find(root, "annotations/captions_*.json", "captions_*.json"):
        part = path.stem.removeprefix("captions_")
        for found in pictures.typed(records.read(path, key="images"), _Image):
            if not isinstance(found, Failure):
                yield address(part, found[1].file_name)
