"""LAION and whatever else pairs images of the web with texts, in five layouts.

    dir      metadata.json, an array of {image, caption}, beside the images it names
    jsonl    *.jsonl, the same a line
    txt      a.jpg with its text in a.txt, in any folder: img2dataset's `files`
    parquet  *.parquet with the images in a column, or named by one: img2dataset's `parquet`
    tar      *.tar of WebDataset with jpg, png, jpeg or webp and txt, caption, text or json:
             img2dataset's `webdataset`

Names of fields: an image is `image`, `image_path`, `file_name`, `jpg`, `png` or `webp`, a text
`caption`, `text` or `TEXT`, and an image's identity `sha256`, `md5` or `url` where img2dataset left
one. Of tables that only name addresses, `laion/relaion2B-en-research-safe` among them, --download
fetches the images to images/HASH.jpg below the root.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from webdataset.shardlists import expand_urls

from vlm.data.format.layout import IMAGE_EXTENSIONS
from vlm.data.format.schema import MAX_JSON_BYTES
from vlm.data.make.adapters import pictures, records
from vlm.data.make.adapters.base import each, option
from vlm.data.make.adapters.pictures import Picture
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Annotation, Failure
from vlm.data.make.archives import open_archive
from vlm.errors import DataError, SampleError

#: layout -> the files it is read from
PATTERNS = {
    "dir": ("metadata.json",),
    "txt": ("**/*.txt",),
    "parquet": ("**/*.parquet",),
    "jsonl": ("*.jsonl",),
    "tar": ("**/*.tar",),
}
IMAGES = ("image", "image_path", "file_name", "jpg", "png", "webp")
TEXTS = ("caption", "text", "TEXT", "txt")
URLS = ("url", "URL")
IDENTITIES = ("sha256", "md5", *URLS)


@dataclass(frozen=True, kw_only=True)
class Options:
    layout: str = option("of the data set", choices=tuple(PATTERNS))
    files: tuple[str, ...] = option("globs or braces below the root; default: all", ())
    prompt: str = option("before each caption; empty for captions alone", "A photo of")


def annotations(root: Path, options: Options) -> Iterator[Annotation | Failure]:
    patterns = [name for given in options.files for name in expand_urls(given)]
    paths = records.find(root, *(patterns or PATTERNS[options.layout]))

    def make(record: Record) -> Iterator[Annotation]:
        caption = _first(record.fields, TEXTS)
        if not isinstance(caption, str) or not caption.strip():
            raise SampleError(f"no text; expected {', '.join(TEXTS)}")
        ref, key = _image(record.fields)
        turns = pictures.question(options.prompt, caption) if options.prompt else None
        yield Annotation(
            id=record.where,
            source="laion",
            split_key=key,
            images=(ref,),
            turns=turns,
            caption=None if turns else caption,
        )

    found = chain.from_iterable(_records(root, options.layout, path) for path in paths)
    return each(found, make)


def _first(fields: dict[str, Any], names: Iterable[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _image(fields: dict[str, Any]) -> tuple[str, str]:
    """(ref, identity) of a record's image."""
    image, identity = _first(fields, IMAGES), _first(fields, IDENTITIES)
    if isinstance(image, dict):
        found = Picture.model_validate(image)
        return found.ref, found.key
    if image is None and isinstance(url := _first(fields, URLS), str):
        image = _fetched(url)
    if not isinstance(image, str):
        raise SampleError(f"no image; expected {', '.join((*IMAGES, *URLS))}")
    return image, identity if isinstance(identity, str) and identity else image


def urls(root: Path) -> Iterator[tuple[str, str]]:
    """What to download: address, and path below the root."""
    tables = (name for layout in ("dir", "jsonl", "parquet") for name in PATTERNS[layout])
    for path in records.find(root, *tables):
        for record in records.read(path, URLS):
            if isinstance(record, Record) and isinstance(url := _first(record.fields, URLS), str):
                yield url, _fetched(url)


def _fetched(url: str) -> str:
    """Where the image of an address is when it has been fetched."""
    return f"images/{hashlib.blake2b(url.encode(), digest_size=16).hexdigest()}.jpg"


def _records(root: Path, layout: str, path: Path) -> Iterator[Record | Failure]:
    """Records whose image is a picture, or a ref from the root."""
    name = path.relative_to(root)
    match layout:
        case "txt":
            yield from _text_file(path, name)
        case "tar":
            yield from _tar_samples(path, name.as_posix())
        case "parquet":
            for record in pictures.table(root, (name.as_posix(),), None):
                yield _from_root(record, name)
        case _:
            for record in records.read(path):
                yield _from_root(record, name)


def _from_root(record: Record | Failure, name: Path) -> Record | Failure:
    """The record, with an image's path from the root instead of from the file's folder."""
    if isinstance(record, Failure):
        return record
    paths = {
        field: (name.parent / record.fields[field]).as_posix()
        for field in IMAGES
        if isinstance(record.fields.get(field), str)
    }
    return Record(f"{name.as_posix()}!{record.row}", record.row, record.fields | paths)


def _text_file(path: Path, name: Path) -> Iterator[Record | Failure]:
    suffixes = [suffix for suffix in IMAGE_EXTENSIONS if path.with_suffix(f".{suffix}").is_file()]
    if not suffixes:
        yield Failure(reason="text without image", error=name.as_posix())
        return
    with path.open("rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    ref = name.with_suffix(f".{suffixes[0]}").as_posix()
    yield _parsed(ref, {"image": ref}, {"txt": raw})


def _tar_samples(path: Path, name: str) -> Iterator[Record | Failure]:
    try:
        archive = open_archive(path)
    except (OSError, SampleError) as error:
        raise DataError(f"{path}: {error}; download it again") from None
    with closing(archive):
        samples: dict[str, dict[str, str]] = defaultdict(dict)
        for member in archive.names():
            folder, slash, file_name = member.rpartition("/")
            key, _, suffix = file_name.partition(".")
            samples[folder + slash + key][suffix.lower()] = member
        for key, members in samples.items():
            images = {s: f"{name}!{m}" for s, m in members.items() if s in IMAGE_EXTENSIONS}
            image = {"image": next(iter(images.values()))} if images else {}
            try:
                raw = {s: archive.read(m) for s, m in members.items() if s in (*TEXTS, "json")}
            except SampleError as error:
                yield Failure(reason=records.BAD_ROW, error=f"{name}!{key}: {error}")
            else:
                yield _parsed(f"{name}!{key}", image, raw)


def _parsed(where: str, image: dict[str, str], raw: dict[str, bytes]) -> Record | Failure:
    """A record of an image and the files beside it: JSON, and texts, which come before it."""
    try:
        if any(len(body) > MAX_JSON_BYTES for body in raw.values()):
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes of text")
        fields = json.loads(raw.get("json", b"{}"))
        if not isinstance(fields, dict):
            raise ValueError(f"JSON of {type(fields).__name__}; expected an object")
        own = {s: body.decode().strip() for s, body in raw.items() if s != "json"}
        texts = {"caption": text} if (text := _first(own, TEXTS)) else {}
        json.dumps(fields | texts, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return Failure(reason=records.BAD_ROW, error=f"{where}: {error}")
    # a name inside the JSON is where the image was on another machine
    inside = {name: value for name, value in fields.items() if name not in IMAGES}
    return Record(where, 0, inside | texts | image)
