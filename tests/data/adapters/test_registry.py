import dataclasses
import inspect
import typing

import pytest

from vlm.data.adapters.registry import ADAPTERS

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
