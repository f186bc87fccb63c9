"""LLaVA's conversations about images: the instructions of 150K and 665K, the captions of 558K.

    llava_instruct_150k.json  llava_v1_5_mix665k.json  blip_laion_cc_sbu_558k.json
        [{id, image, conversations: [{from: human or gpt, value}]}]
    train2017/000000033471.jpg   images of the 150K: COCO's, in a folder or train2017.zip
    coco/train2017/*.jpg         images of the 665K, and gqa/, ocr_vqa/, textvqa/, vg/ beside
    images/00453/004539375.jpg   images of the 558K, in a folder or images.zip

Every turn is kept, `<image>` stands where it stood; records without an image are text. As captions
only the first answer is kept, without its question: AnyMAL's first stage trains on that.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from vlm.data.format.schema import Turn
from vlm.data.make.adapters import coco_captions, pictures, records
from vlm.data.make.adapters.base import each, option
from vlm.data.make.adapters.pictures import Row
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Annotation, Failure
from vlm.errors import ConfigError, SampleError

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_COCO = ("train2017", "train2017.zip!train2017", "coco/train2017")


@dataclass(frozen=True, kw_only=True)
class Options:
    annotations: Path | None = option("the JSON file, where the folder holds several", None)
    form: str = option("of the samples", "conversation", ("conversation", "caption"))


class Message(Row):
    speaker: str = Field(alias="from")
    value: str


class _Columns(Row):
    id: str | int
    image: str | None = None
    conversations: list[Message]


def instruct(root: Path, options: Options) -> Iterator[Annotation | Failure]:
    """The adapter `llava-instruct`."""
    path = options.annotations or _only(root, "llava_*.json")
    # only the 150K names images without their folder; the 665K may lack this one
    coco = functools.cache(functools.partial(pictures.find_folder, root, _COCO))

    def place(image: str) -> str:
        return image if "/" in image else coco() + image

    return _annotations(path, options.form, "llava-instruct", place)


def urls(root: Path) -> Iterator[tuple[str, str]]:
    """What to download: the images of COCO that the 150K name without a folder."""
    for path in records.find(root, "llava_*.json"):
        for found in pictures.typed(records.read(path), _Columns):
            image = None if isinstance(found, Failure) else found[1].image
            if image is not None and "/" not in image:
                yield coco_captions.address("train2017", image)


def pretrain(root: Path, options: Options) -> Iterator[Annotation | Failure]:
    """The adapter `llava-pretrain`."""
    path = options.annotations or _only(root, "blip_laion_cc_sbu_558k.json", "chat.json")
    folder = pictures.find_folder(root, ("images", "images.zip!"))
    return _annotations(path, options.form, "llava-pretrain", lambda image: folder + image)


def _only(root: Path, *patterns: str) -> Path:
    found = records.find(root, *patterns)
    if len(found) > 1:
        raise ConfigError(
            f"{root} holds {', '.join(path.name for path in found)}; say which with --annotations"
        )
    return found[0]


def _annotations(
    path: Path, form: str, source: str, place: Callable[[str], str]
) -> Iterator[Annotation | Failure]:
    def make(record: Record) -> Iterator[Annotation]:
        row = _Columns.model_validate(record.fields)
        turns = tuple(turn(message) for message in row.conversations)
        yield Annotation(
            id=row.id,
            source=source,
            split_key=row.image and (coco_captions.image_key(row.image) or row.image),
            images=(place(row.image),) if row.image else (),
            turns=turns if form == "conversation" else None,
            caption=_first_answer(turns) if form == "caption" else None,
        )

    return each(records.read(path), make)


def turn(message: Message) -> Turn:
    if message.speaker not in ROLES:
        raise SampleError(f"a message from {message.speaker[:40]!r}; expected {', '.join(ROLES)}")
    return Turn.model_validate({"role": ROLES[message.speaker], "content": message.value})


def _first_answer(turns: tuple[Turn, ...]) -> str:
    for turn in turns:
        if turn.role == "assistant":
            return turn.content
    raise SampleError("no answer")
