"""From the members of one key to a sample and its encoded frames, whoever wrote the shard.

    ours            KEY.json (`version`, `kind`)   KEY.000.jpg KEY.001.jpg ... | KEY.jpg | KEY.mp4 |
    foveated-vlm    KEY.json                       the same, or KEY_000.jpg KEY_001.jpg ...
    img2dataset     KEY.txt KEY.json               KEY.jpg
    video2dataset   KEY.txt KEY.json               KEY.mp4

Images may be jpg, jpeg, png or webp, videos mp4, webm, mkv, avi or mov; beside frames may stand
their KEY.latents.safetensors, which only those read who want it. Not here: finding members
in a tar (`vlm.data.format.shards`), decoding (`vlm.data.format.decode`).
"""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import pydantic_core

from vlm.data.format.foreign import parse_foreign
from vlm.data.format.schema import MAX_FRAMES, Kind, Sample, check_json_size, parse_sample
from vlm.errors import SampleError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "avi", "mov")
WORD_EXTENSIONS = ("json", "txt")
#: beside frames, see `vlm.data.format.latents`
LATENTS = "latents.safetensors"
EXTENSIONS = (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS, *WORD_EXTENSIONS, LATENTS)

_IMAGE = "|".join(IMAGE_EXTENSIONS)
_UNDERSCORED = re.compile(rf"(.+)_(\d{{3}}\.(?:{_IMAGE}))")
_NUMBERS = [f"{i:03d}." for i in range(MAX_FRAMES)]


class Content(NamedTuple):
    """A sample, and what its frames are decoded from."""

    sample: Sample
    #: encoded images by member name, in the order of the frames; empty for text and a video file
    images: dict[str, memoryview]
    #: a video file by its member name; empty for all others
    video: dict[str, memoryview]
    #: of the frames, see `vlm.data.format.latents`
    latents: memoryview | None = None


def split_names(names: Collection[str]) -> dict[str, tuple[str, str]]:
    """(key, suffix) of each member name: ("00000012", "000.jpg").

    A key ends at the first dot, as everywhere in WebDataset, but for ``KEY_000.jpg``: it is a frame
    of KEY if there is a KEY.json or KEY.txt among ``names``, and no such member of its own.
    """
    split = {name: (key, suffix) for name in names for key, _, suffix in [name.partition(".")]}
    if "_" not in "".join(names):
        return split
    worded = {key for key, suffix in split.values() if suffix in WORD_EXTENSIONS}
    for name in names:
        found = _UNDERSCORED.fullmatch(name) if "_" in name else None
        if found and found[1] in worded and split[name][0] not in worded:
            split[name] = (found[1], found[2])
    return split


def read_content(members: Mapping[str, memoryview], where: str) -> Content:
    """The sample that the members of one key make.

    Raises:
        SampleError: JSON that is no sample, nothing to learn from, images that are not those of its
            ``frame_count``, images and a video at once.
    """
    split = split_names(members)
    key = next(iter(split.values()))[0]
    names = {suffix: name for name, (_, suffix) in split.items()}
    if len(names) != len(members):
        raise SampleError(
            f"{where}: frames as KEY.000.jpg and as KEY_000.jpg; expected one of both"
        )
    images = {names[suffix]: members[names[suffix]] for suffix in image_order(names, where)}
    video = {name: members[name] for suffix, name in names.items() if suffix in VIDEO_EXTENSIONS}
    if len(video) > 1 or (video and images):
        raise SampleError(
            f"{where}: {', '.join([*images, *video][:4])} together; expected images, or one video"
        )
    num_images = None if video else len(images)
    is_single = len(images) == 1 and any(suffix in IMAGE_EXTENSIONS for suffix in names)
    kind: Kind = "image" if is_single else "video" if images or video else "text"
    words = {suffix: members[names[suffix]] for suffix in WORD_EXTENSIONS if suffix in names}
    sample = read_words(words, f"{where}, member {key}.json", kind, num_images)
    if sample.frame_count != num_images:
        found = f"there are {num_images} images" if images or not video else "there is a video file"
        raise SampleError(
            f"{where}: frame_count is {sample.frame_count} but {found}; expected {key}.000.jpg and "
            "on, one for each frame, and no frame_count beside a video file"
        )
    latents = members[names[LATENTS]] if LATENTS in names else None
    return Content(sample, images, video, latents)


def image_order(suffixes: Collection[str], where: str) -> list[str]:
    """Suffixes of the images: 000, 001 and on without a gap, or one that has no number.

    Raises:
        SampleError: they are neither.
    """
    images = sorted(suffix for suffix in suffixes if suffix.endswith(IMAGE_EXTENSIONS))
    if len(images) > MAX_FRAMES:
        raise SampleError(f"{where}: {len(images)} images, at most {MAX_FRAMES} are read")
    if len(images) == 1 and images[0] in IMAGE_EXTENSIONS:
        return images
    for index, (suffix, number) in enumerate(zip(images, _NUMBERS, strict=False)):
        if suffix[:4] != number or suffix[4:] not in IMAGE_EXTENSIONS:
            raise SampleError(
                f"{where}: found image {suffix!r} where number {index:03d} was expected; frames "
                "are KEY.000.jpg, KEY.001.jpg and on without a gap, or one KEY.jpg"
            )
    return images


def read_words(
    words: Mapping[str, memoryview],
    where: str,
    kind: Kind,
    num_images: int | None,
) -> Sample:
    """The sample that JSON and text say, by our schema or as the foreign one it is.

    Args:
        words: Bodies of the members by suffix, out of `WORD_EXTENSIONS`.
        num_images: None for a video file.

    Raises:
        SampleError: they are no sample.
    """
    raw, text = words.get("json"), words.get("txt")
    for body in words.values():
        check_json_size(body, where)
    tree: object = {}
    if raw is not None:
        try:
            tree = pydantic_core.from_json(bytes(raw))
        except ValueError as error:
            raise SampleError(f"{where}: not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise SampleError(f"{where}: found a JSON {type(tree).__name__}, expected an object")
    if raw is not None and ("version" in tree or "kind" in tree):
        return parse_sample(raw, where)
    try:
        caption = None if text is None else bytes(text).decode()
    except UnicodeDecodeError:
        raise SampleError(f"{where}: its .txt is not UTF-8") from None
    return parse_foreign(tree, caption, kind, num_images, where)
