import dataclasses
import inspect
import re
import typing
from pathlib import Path

import pytest

from vlm.data.make.adapters.registry import ADAPTERS

#: every data set that issues and documents name
NAMES = (
    *("video", "webvid", "openvid", "vript", "sharegpt4video", "llava-video", "vista", "pexels"),
    *("cauldron", "smoltalk", "llava-instruct", "llava-pretrain", "coco-captions", "laion"),
    *("flickr30k", "docornot", "alt-text-validation", "textcaps", "vqav2", "rlaif-v"),
)


def test_every_data_set_is_there() -> None:
    assert set(NAMES) <= set(ADAPTERS)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_line_says_it_all(name: str) -> None:
    adapter = ADAPTERS[name]
    assert adapter.help and "\n" not in adapter.help and len(adapter.help) < 100
    assert len(adapter.licence) <= 100
    assert bool(adapter.licence) == (name != "video"), "only one's own files bring their licence"
    assert list(inspect.signature(adapter.annotations).parameters) == ["root", "options"]


def test_the_page_of_licences_is_true() -> None:
    text = (Path(__file__).parents[4] / "docs" / "data-licences.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\S+)` \| (.+) \|$", text, re.MULTILINE))
    assert list(rows) == [*ADAPTERS, "eval"]
    for name, adapter in ADAPTERS.items():
        where, _, licence = rows[name].partition(" | ")
        assert licence == (adapter.licence or "as you name it"), name
        address = f"(https://huggingface.co/datasets/{adapter.hub_id})"
        assert (address in where) == bool(adapter.hub_id), name


@pytest.mark.parametrize("name", ADAPTERS)
def test_options_are_flags(name: str) -> None:
    options = ADAPTERS[name].options
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        assert field.metadata["help"], field.name
        assert field.kw_only
        kinds = set(typing.get_args(hints[field.name])) or {hints[field.name]}
        kinds -= {type(None), Ellipsis}
        assert len(kinds) == 1 and kinds.pop().__name__ in (
            "str",
            "int",
            "float",
            "Path",
            "PosixPath",
        )
