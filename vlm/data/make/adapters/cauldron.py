"""The Cauldron: 50 data sets of questions about images, as `HuggingFaceM4/the_cauldron`.

    SUBSET/train-00000-of-00009-*.parquet
        images  list of {bytes, path}
        texts   list of {user, assistant, source}

Every turn and every image is kept; images stand before the first question unless it says where.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm.data.make.adapters import pictures
from vlm.data.make.adapters.base import each, option
from vlm.data.make.adapters.pictures import Picture, Row
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Annotation, Failure
from vlm.errors import ConfigError, DataError

SUBSETS = (
    *("ai2d", "aokvqa", "chart2text", "chartqa", "clevr", "clevr_math", "cocoqa", "datikz"),
    *("diagram_image_to_text", "docvqa", "dvqa", "figureqa", "finqa", "geomverse"),
    *("hateful_memes", "hitab", "iam", "iconqa", "infographic_vqa", "intergps"),
    *("localized_narratives", "mapqa", "mimic_cgd", "multihiertt", "nlvr2", "ocrvqa", "okvqa"),
    *("plotqa", "raven", "rendered_text", "robut_sqa", "robut_wikisql", "robut_wtq", "scienceqa"),
    *("screen2words", "spot_the_diff", "st_vqa", "tabmwp", "tallyqa", "tat_qa", "textcaps"),
    *("textvqa", "tqa", "vistext", "visual7w", "visualmrc", "vqarad", "vqav2", "vsr", "websight"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    subsets: tuple[str, ...] = option("some of the 50; default: all that are there", ())


class _Exchange(Row):
    user: str
    assistant: str


class _Columns(Row):
    images: list[Picture]
    texts: list[_Exchange]


def annotations(root: Path, options: Options) -> Iterator[Annotation | Failure]:
    if unknown := sorted(set(options.subsets) - set(SUBSETS)):
        raise ConfigError(f"subsets {', '.join(unknown)}: expected some of {', '.join(SUBSETS)}")
    subsets = options.subsets or [name for name in SUBSETS if (root / name).is_dir()]
    if not subsets:
        raise DataError(f"{root}: holds none of the 50 subsets; expected SUBSET/train-*.parquet")
    for subset in subsets:
        yield from _subset(root, subset)


def _subset(root: Path, subset: str) -> Iterator[Annotation | Failure]:
    def make(record: Record) -> Iterator[Annotation]:
        row = _Columns.model_validate(record.fields)
        turns = [pictures.question(t.user, t.assistant, subset) for t in row.texts]
        yield Annotation(
            id=record.where,
            source=f"cauldron/{subset}",
            split_key=row.images[0].key if row.images else None,
            images=tuple(image.ref for image in row.images),
            turns=tuple(turn for exchange in turns for turn in exchange),
        )

    # beside the published files some mirrors keep a test split
    patterns = (f"{subset}/train-*.parquet", f"{subset}/train/*.parquet")
    return each(pictures.table(root, patterns, tuple(_Columns.model_fields)), make)
