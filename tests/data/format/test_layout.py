"""Layouts, each as its own tool writes it; what they mean is spelled out here, not computed."""

import json
from typing import Any

import pytest

from tests.data import helpers
from vlm.data.format.layout import Content, read_content, split_names
from vlm.errors import SampleError

TURNS = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]


def content(members: dict[str, Any]) -> Content:
    """``dict`` bodies are written as JSON, ``str`` as text, None as a body that says its name."""
    bodies = {}
    for name, body in members.items():
        if isinstance(body, dict):
            body = json.dumps(body)
        bodies[name] = memoryview((name if body is None else body).encode())
    return read_content(bodies, "here")


def ours(kind: str, frame_count: int | None, **other: Any) -> dict[str, Any]:
    tree = {"version": 1, "kind": kind, "source": "s", "turns": TURNS, **other}
    return tree if frame_count is None else tree | {"frame_count": frame_count}


@pytest.mark.parametrize(
    ("members", "images", "video"),
    [
        ({"a.json": ours("text", 0)}, [], []),
        ({"a.json": ours("image", 1), "a.jpg": None}, ["a.jpg"], []),
        ({"a.json": ours("image", 1), "a.000.jpg": None}, ["a.000.jpg"], []),
        ({"a.json": ours("image", 1), "a.webp": None}, ["a.webp"], []),
        (
            {"a.001.jpg": None, "a.000.jpg": None, "a.json": ours("video", 2), "a.txt": "unused"},
            ["a.000.jpg", "a.001.jpg"],
            [],
        ),
        (
            {"a.json": ours("image", 2), "a.000.png": None, "a.001.jpeg": None},
            ["a.000.png", "a.001.jpeg"],
            [],
        ),
        (
            {"a.json": ours("video", 2), "a_000.jpg": None, "a_001.jpg": None},
            ["a_000.jpg", "a_001.jpg"],
            [],
        ),
        ({"a.json": ours("video", None), "a.mp4": None}, [], ["a.mp4"]),
        ({"a.json": ours("video", None), "a.mkv": None}, [], ["a.mkv"]),
    ],
)
def test_our_own(members: dict[str, Any], images: list[str], video: list[str]) -> None:
    found = content(members)
    assert found.sample.source == "s"
    assert {name: bytes(body).decode() for name, body in found.images.items()} == {
        name: name for name in images
    }
    assert list(found.images) == images
    assert list(found.video) == video


def test_img2dataset() -> None:
    meta = {
        "caption": "a cat", "url": "https://x/y.jpg", "key": "000010005", "status": "success",
        "error_message": None, "width": 256, "height": 256, "original_width": 640,
        "original_height": 480, "exif": "{}", "sha256": "ab", "license": "CC-BY-4.0",
    }  # fmt: skip
    found = content({"000010005.jpg": None, "000010005.txt": " a cat \n", "000010005.json": meta})
    assert (found.sample.kind, found.sample.frame_count) == ("image", 1)
    assert found.sample.caption == "a cat"
    assert found.sample.meta == {
        "key": "000010005", "url": "https://x/y.jpg", "license": "CC-BY-4.0",
    }  # fmt: skip
    assert list(found.images) == ["000010005.jpg"]


def test_video2dataset() -> None:
    meta = {"videoid": "x", "caption": "from the JSON", "status": "success", "clips": [[0, 8.2]]}
    found = content({"00000_1.mp4": None, "00000_1.txt": "a dog runs", "00000_1.json": meta})
    assert (found.sample.kind, found.sample.frame_count) == ("video", None)
    assert found.sample.caption == "a dog runs"
    assert list(found.video) == ["00000_1.mp4"]
    assert content({"a.mp4": None, "a.json": meta}).sample.caption == "from the JSON"
    assert content({"a.webm": None, "a.txt": "no JSON at all"}).sample.kind == "video"


@pytest.mark.parametrize("form", ["{}.{:03d}.jpg", "{}_{:03d}.jpg"])
def test_frames_of_foveated_vlm(form: str) -> None:
    tree = {"token_ids": [5, 6, 7], "loss_mask": [0, 1, 1.0], "source": "o", "frame_count": 3}
    names = [form.format("00000007", i) for i in range(3)]
    found = content({"00000007.json": tree, **dict.fromkeys(names)})
    assert list(found.images) == names
    assert (found.sample.kind, found.sample.frame_count) == ("video", 3)
    assert found.sample.tokens is not None
    assert found.sample.tokens.token_ids == (5, 6, 7)
    assert found.sample.tokens.loss_mask == (0, 1, 1)
    text_only = content({"0.json": tree | {"frame_count": 0, "is_text_only": True}})
    assert text_only.sample.kind == "text"


def test_keys() -> None:
    names = ["a.json", "a.000.jpg", "b.json", "b_000.jpg", "c_123.jpg", "c_123.txt", "d_123.jpg"]
    found = split_names(names)
    assert [found[name] for name in names] == [
        ("a", "json"),
        ("a", "000.jpg"),
        ("b", "json"),
        ("b", "000.jpg"),
        ("c_123", "jpg"),
        ("c_123", "txt"),
        ("d_123", "jpg"),
    ]
    # a photo whose name ends like a frame number, beside a sample of the shorter name
    assert split_names(["p_001.jpg", "p_001.json", "p.json"])["p_001.jpg"] == ("p_001", "jpg")


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["a.000.jpg"], "frame_count is 2 but there are 1 images"),
        (["a.000.jpg", "a.002.jpg"], "'002.jpg' where number 001"),
        (["a.000.jpg", "a.001.jpg", "a.002.jpg"], "frame_count is 2 but there are 3 images"),
        (["a.000.jpg", "a.001.jpg", "a.jpg"], "'jpg' where number 002"),
        (["a.000.jpg", "a.000.png"], "'000.png' where number 001"),
        (["a.0.jpg", "a.1.jpg"], "'0.jpg' where number 000"),
        (["a.000.jpg", "a_001.jpg", "a_000.jpg"], "KEY_000.jpg; expected one of both"),
        (["a.jpg", "a.png"], "'jpg' where number 000"),
        (["a.mp4"], "there is a video file"),
        (["a.mp4", "a.avi"], "a.mp4, a.avi together"),
        (["a.jpg", "a.mp4"], "a.jpg, a.mp4 together"),
        ([f"a.{i:03d}.jpg" for i in range(65)], "65 images, at most 64"),
        ([], "frame_count is 2 but there are 0 images"),
    ],
)
def test_images_that_do_not_fit(names: list[str], fault: str) -> None:
    with pytest.raises(SampleError, match=fault) as caught:
        content({"a.json": ours("video", 2), **dict.fromkeys(names)})
    assert str(caught.value).startswith("here")


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ({"a.json": "{"}, "not JSON"),
        ({"a.json": "[" * 100_000}, "not JSON"),
        ({"a.json": "[1]"}, "a JSON list"),
        ({"a.json": '{"version": 1}'}, "kind"),
        ({"a.json": '{"kind": "text"}'}, "version"),
        ({"a.json": " " * (4 << 20) + "1"}, "bytes of JSON"),
        ({"a.jpg": None, "a.txt": "x" * ((4 << 20) + 1)}, "bytes"),
        ({"a.jpg": None}, "nothing to learn"),
        ({"a.jpg": None, "a.json": {"url": "x"}}, "nothing to learn"),
        ({"a.jpg": None, "a.txt": " \n"}, "caption is empty"),
        ({"a.txt": "a caption of nothing"}, "a caption without an image"),
        ({"a.json": ours("text", None), "a.mp4": None}, "kind text needs 0 frames"),
        ({"a.json": ours("image", None), "a.mp4": None}, "only a video file has none"),
    ],
)
def test_words_that_do_not_fit(members: dict[str, Any], fault: str) -> None:
    with pytest.raises(SampleError, match=fault) as caught:
        content(members)
    assert str(caught.value).startswith("here")


def test_text_that_is_no_utf8() -> None:
    members = {"a.jpg": memoryview(b"x"), "a.txt": memoryview(b"\xff\xfe")}
    with pytest.raises(SampleError, match="not UTF-8"):
        read_content(members, "here")


def test_what_our_writer_made() -> None:
    sample = helpers.make_sample(3, 2)
    members = {"7.json": memoryview(sample.to_json())}
    members |= {f"7.{i:03d}.jpg": memoryview(b"x") for i in range(2)}
    assert read_content(members, "here").sample == sample
