"""Images with captions or alt texts, in tables or beside text files.

flickr30k             data/*.parquet of `Mozilla/flickr30k-transformed-captions-gpt4o`:
                      {image, alt_text}; or results_20130124.token and flickr30k-images/
textcaps              data/train-*.parquet of `lmms-lab/TextCaps`: {image, caption_str}; or
                      TextCaps_0.1_train.json and train_images/, in train_val_images.zip or not
alt-text-validation   data/train-*.parquet of `Mozilla/alt-text-validation`:
                      {image, gpt_alt_text}
pexels                data/train-*.parquet of `Mozilla/pexels-gpt4o`: {image, alt_text}
docornot              data/train-*.parquet of `Mozilla/docornot`: {image, is_document}; what is
                      a document gets one fixed text, what is none is left out
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from vlm.data.make.adapters import pictures, records
from vlm.data.make.adapters.base import NoOptions, each, option, want
from vlm.data.make.adapters.coco_captions import PARTS
from vlm.data.make.adapters.pictures import CAPTIONS, Picture, Row
from vlm.data.make.adapters.records import BAD_ROW, Record
from vlm.data.make.annotations import Annotation, Failure
from vlm.errors import DataError, SampleError

DOCUMENT = "Text document."
_TOKENS = "results_20130124.token"
_TOKEN_LINE = re.compile(rb"([^#]+)#\d+\t(.*)\n?")


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    captions: str = option("which of an image's captions become samples", "first", CAPTIONS)


@dataclass(frozen=True, kw_only=True)
class TextCapsOptions(CaptionOptions):
    part: str = option("of TextCaps", "train", PARTS)


@dataclass(frozen=True, kw_only=True)
class DocOrNotOptions:
    # one text for all of them: a few teach it, many would drown the others
    rows: int = option("of the table that are looked at", 2000)


def flickr30k(root: Path, options: CaptionOptions) -> Iterator[Annotation | Failure]:
    tokens = root / _TOKENS
    if not tokens.exists():
        patterns = ("data/*.parquet", "*.parquet")
        return _table(root, patterns, "flickr30k", "alt_text", options.captions)
    folder = pictures.find_folder(root, ("flickr30k-images", "flickr30k-images.zip!"))
    return _grouped(_token_lines(tokens), "flickr30k", folder, options.captions)


def textcaps(root: Path, options: TextCapsOptions) -> Iterator[Annotation | Failure]:
    path = root / f"TextCaps_0.1_{options.part}.json"
    if not path.exists():
        patterns = (f"data/{options.part}-*.parquet", f"{options.part}-*.parquet")
        return _table(root, patterns, "textcaps", "caption_str", options.captions)
    # the images of both parts lie in one folder
    places = ("train_images", "train_val_images.zip!train_images", "train_val_images/train_images")
    folder = pictures.find_folder(root, places)
    return _grouped(_textcaps_items(path), "textcaps", folder, options.captions)


def alt_text_validation(root: Path, options: NoOptions) -> Iterator[Annotation | Failure]:
    patterns = ("data/train-*.parquet", "train-*.parquet")
    return _table(root, patterns, "alt-text-validation", "gpt_alt_text", "first")


def pexels(root: Path, options: CaptionOptions) -> Iterator[Annotation | Failure]:
    patterns = ("data/train-*.parquet", "train-*.parquet")
    return _table(root, patterns, "pexels", "alt_text", options.captions)


def docornot(root: Path, options: DocOrNotOptions) -> Iterator[Annotation | Failure]:
    def make(record: Record) -> Iterator[Annotation]:
        if want(record.fields, "is_document", int) == 1:
            image = Picture.model_validate(record.fields["image"])
            yield from pictures.captioned(
                "docornot", record.where, image.ref, image.key, [DOCUMENT], "first"
            )

    patterns = ("data/train-*.parquet", "train-*.parquet")
    rows = pictures.table(root, patterns, ("image", "is_document"))
    return each(islice(rows, options.rows), make)


def _table(
    root: Path, patterns: tuple[str, ...], source: str, column: str, how: str
) -> Iterator[Annotation | Failure]:
    """A table of images whose ``column`` holds a caption or a list of them."""

    def make(record: Record) -> Iterator[Annotation]:
        image = Picture.model_validate(record.fields["image"])
        found = record.fields[column]
        captions = found if isinstance(found, list) else [] if found is None else [found]
        if not all(isinstance(caption, str) for caption in captions):
            raise SampleError(f"`{column}` is not text")
        yield from pictures.captioned(source, record.where, image.ref, image.key, captions, how)

    return each(pictures.table(root, patterns, ("image", column)), make)


def _grouped(
    found: Iterator[tuple[str, str] | Failure], source: str, folder: str, how: str
) -> Iterator[Annotation | Failure]:
    """Pairs of an image's file name and a caption, by image."""
    captions: dict[str, list[str]] = defaultdict(list)
    for pair in found:
        if isinstance(pair, Failure):
            yield pair
        else:
            captions[pair[0]].append(pair[1])

    def make(record: Record) -> Iterator[Annotation]:
        name = record.where
        yield from pictures.captioned(source, name, folder + name, name, captions[name], how)

    yield from each((Record(name, row, {}) for row, name in enumerate(captions)), make)


def _token_lines(path: Path) -> Iterator[tuple[str, str] | Failure]:
    """``NAME.jpg#2<tab>CAPTION`` a line."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(1 << 20), b""), 1):
                where = f"{path.name}, line {number}"
                match = _TOKEN_LINE.fullmatch(raw)
                if match is None:
                    error = f"{where}: expected NAME#N and a caption"
                    yield Failure(reason=BAD_ROW, error=error)
                    continue
                try:
                    yield match[1].decode(), match[2].decode().strip()
                except UnicodeDecodeError:
                    yield Failure(reason=BAD_ROW, error=f"{where}: not UTF-8")
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; expected lines of NAME#N and a caption"
        ) from None


class _Item(Row):
    image_id: str
    caption_str: str


def _textcaps_items(path: Path) -> Iterator[tuple[str, str] | Failure]:
    for found in pictures.typed(records.read(path, key="data"), _Item):
        if isinstance(found, Failure):
            yield found
        else:
            yield f"{found[1].image_id}.jpg", found[1].caption_str
