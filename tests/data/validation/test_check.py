import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from tests.data import clips, helpers
from tests.data.validation.edits import brief, edited
from vlm.data.format import shards
from vlm.data.format.schema import Preference, Sample, Tokens, Turn
from vlm.data.validation.check import Checks
from vlm.data.validation.report import Report
from vlm.data.validation.validate import validate

JPEG = shards.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
NOISE = shards.encode_jpeg(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def faults(report: Report) -> list[tuple[str, str, str]]:
    """(key, member, fault) each."""
    return [(key, member, text) for _, key, member, _, text in brief(report)]


def check(path: Path, expected: list[tuple[str, str, str]], checks: Checks | None = None) -> None:
    """The faults are these, each with a part of its text."""
    found = faults(validate([path], checks))
    assert [f[:2] for f in found] == [e[:2] for e in expected], found
    for (_, _, text), (_, _, part) in zip(found, expected, strict=True):
        assert part in text


def test_every_fault_of_a_shard_is_named(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [2, 2, 3, 1, 2, 1, 0, 4])
    edited(
        path,
        {
            "00000000.json": b"{",
            "00000001.000.jpg": None,
            "00000002.001.jpg": b"\x89PNG",
            "00000002.002.jpg": shards.encode_jpeg(np.zeros((8, 8, 3), np.uint8)),
            "00000003.json": None,
            "00000004.001.jpg": NOISE[:-400],
            "00000007.json": b'{"version": 1, "kind": "video", "frame_count": "four"}',
            "00000007.000.jpg": None,
            "00000007.002.jpg": b"?",
        },
    )
    extra = [("00000005.pyd", b"x"), ("00000005.001.jpg", JPEG), ("00000000.txt", b"late")]
    helpers.write_tar(path, [*helpers.tar_members(path), *extra])
    check(
        path,
        [
            ("00000005", "00000005.pyd", "is not KEY.EXTENSION"),
            ("00000000", "00000000.json", "not JSON"),
            ("00000001", "00000001.000.jpg", "missing; frame_count is 2"),
            ("00000002", "00000002.001.jpg", "not a JPEG"),
            ("00000002", "", "16x16 (00000002.000.jpg), 8x8 (00000002.002.jpg)"),
            ("00000003", "00000003.json", "missing, and there is no .txt"),
            ("00000004", "00000004.001.jpg", "damaged"),
            (
                "00000007",
                "00000007.json",
                "source: Field required; frame_count: Input should be a valid integer",
            ),
            ("00000007", "00000007.000.jpg", "missing; others follow"),
            ("00000007", "00000007.002.jpg", "not a JPEG"),
            ("00000005", "00000005.001.jpg", "not adjacent"),
            ("00000005", "00000005.json", "missing"),
            ("00000005", "00000005.000.jpg", "missing; others follow"),
            ("00000000", "00000000.txt", "not adjacent"),
            ("00000000", "00000000.txt", "a caption without an image"),
        ],
    )


def test_one_flipped_bit_in_a_frame_is_found(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [1])
    jpeg = bytearray(NOISE)
    jpeg[len(jpeg) // 2] = 0xFF
    edited(path, {"00000000.000.jpg": bytes(jpeg)})
    check(path, [("00000000", "00000000.000.jpg", "damaged")])


def test_a_share_of_the_samples_is_decoded_evenly(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [1] * 10)
    edited(path, {f"{i:08d}.000.jpg": NOISE[: -400 - i] for i in range(10)})
    bad = {frac: faults(validate([path], Checks(decode_frac=frac))) for frac in (0, 0.2, 0.3, 1)}
    assert [len(found) for found in bad.values()] == [0, 2, 3, 10]
    assert [key for key, _, _ in bad[0.2]] == ["00000004", "00000009"]
    assert validate([path], Checks(decode_frac=0.3)).num_decoded == 3
    edited(path, {"00000000.000.jpg": b"no image"})
    assert len(faults(validate([path], Checks(decode_frac=0)))) == 1, "headers are always read"


def test_foreign_layouts_and_every_form_are_read(tokenizer_path: Path, tmp_path: Path) -> None:
    clip = clips.write_clip(tmp_path / "c.mp4", num_frames=30, fps=10).read_bytes()
    png = io.BytesIO()
    Image.new("RGB", (16, 16)).save(png, "PNG")
    prompt = (Turn(role="user", content="What colour is the circle?"),)
    text = {"version": 1, "kind": "text", "source": "s", "frame_count": 0}
    tokens = Tokens(token_ids=(1, 2, 3), loss_mask=(0, 1, 1))
    pair = Preference(prompt=prompt, chosen="red", rejected="The circle is green.")
    members = [
        ("img.png", png.getvalue()),
        ("img.txt", b"red"),
        ("old_000.jpg", JPEG),
        ("old_001.jpg", JPEG),
        ("old.json", b'{"user": "Describe this.", "assistant": "red"}'),
        ("clip.mp4", clip),
        ("clip.txt", b"The circle is green."),
        ("tokens.json", Sample(**text, tokens=tokens).to_json()),
        ("pair.json", Sample(**text, preference=pair).to_json()),
    ]
    path = helpers.write_tar(tmp_path / "a.tar", members)
    report = validate([path], Checks(tokenizer=str(tokenizer_path)))
    assert report.faults == []
    total = report.total.as_json()
    assert total["forms"] == {"caption": 2, "preference": 1, "tokens": 1, "turns": 1}
    assert total["num_frames"] == 1 + 2 + 3
    assert total["frames"] == {"0": 2, "1-4": 3, "5-8": 0, "9-16": 0, "17-32": 0, "33-64": 0}
    assert 0 < total["supervised_frac"] < 1


def test_a_damaged_video_is_named(tmp_path: Path) -> None:
    clip = clips.write_clip(tmp_path / "c.mp4", num_frames=30, fps=10).read_bytes()
    members = [("a.mp4", clip[: len(clip) // 2]), ("a.txt", b"x"), ("b.txt", b"y"), ("b.mp4", b"?")]
    path = helpers.write_tar(tmp_path / "a.tar", members)
    check(path, [("a", "a.mp4", ""), ("b", "b.mp4", "")])


def test_text_that_cannot_be_trained_on(tokenizer_path: Path, tmp_path: Path) -> None:
    def sample(answer: str) -> bytes:
        turns = (Turn(role="user", content="What?"), Turn(role="assistant", content=answer))
        text = {"version": 1, "kind": "text", "source": "s", "frame_count": 0}
        return Sample(**text, turns=turns).to_json()

    members = [
        ("good.json", sample("red")),
        ("long.json", sample("red " * 50)),
        ("special.json", sample("red <|end|>")),
        ("blank.json", sample("red").replace(b'"red"', b'"  "')),
        (
            "mask.json",
            b'{"token_ids": [1, 2], "loss_mask": [0]}',
        ),
        ("zero.json", b'{"token_ids": [1, 2], "loss_mask": [0, 0]}'),
        ("large.json", b'{"token_ids": [1, 99999], "loss_mask": [0, 1]}'),
    ]
    path = helpers.write_tar(tmp_path / "a.tar", members)
    check(
        path,
        [
            ("long", "", " tokens, at most 30"),
            ("special", "", "special token '<|end|>'"),
            ("blank", "blank.json", "the content is empty"),
            ("mask", "mask.json", "2 token_ids but a loss_mask of 1"),
            ("zero", "zero.json", "marks no token to learn"),
            ("large", "", "token 99999"),
        ],
        Checks(tokenizer=str(tokenizer_path), max_tokens=30),
    )


def odd_member(name: str, kind: bytes, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


def test_hostile_members_are_named_and_nothing_is_read_of_them(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [1, 0])
    hostile = b"".join(
        [
            odd_member("../../etc/x.json", tarfile.REGTYPE),
            odd_member("/etc/y.json", tarfile.REGTYPE),
            odd_member("link.json", tarfile.SYMTYPE, "/etc/passwd"),
            odd_member("hard.json", tarfile.LNKTYPE, "00000000.json"),
            odd_member("disk.jpg", tarfile.BLKTYPE),
            odd_member("tty.jpg", tarfile.CHRTYPE),
            odd_member("folder", tarfile.DIRTYPE),
            odd_member("pipe.json", tarfile.FIFOTYPE),
            odd_member("run.pth", tarfile.REGTYPE),
            odd_member(".hidden.json", tarfile.REGTYPE),
            odd_member("\x1b[2J.json", tarfile.REGTYPE),
        ]
    )
    path.write_bytes(hostile + path.read_bytes())
    found = faults(validate([path]))
    assert len(found) == 11
    assert {member for _, member, _ in found} >= {"../../etc/x.json", "link.json", "run.pth"}
    assert validate([path]).num_samples == 2


def test_a_name_ends_at_its_zero_byte(tmp_path: Path) -> None:
    path = helpers.write_tar(tmp_path / "a.tar", [("ab.json", b"{}")])
    data = bytearray(path.read_bytes())
    data[1] = 0
    total = sum(data[:148]) + 8 * 32 + sum(data[156:512])
    data[148:156] = f"{total:06o}\0 ".encode()
    path.write_bytes(data)
    check(path, [("a", "a", "is not KEY.EXTENSION")])


def test_a_gigabyte_of_json_is_not_read(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [0])
    info = tarfile.TarInfo("big.json")
    info.size = 1 << 30
    with path.open("r+b") as file:
        good = file.read()
        file.seek(0)
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.seek(info.size, os.SEEK_CUR)  # a hole
        file.write(good)
    check(path, [("big", "", "1073741824 bytes, at most")])
    assert validate([path]).num_samples == 2


def test_a_bomb_is_named_by_its_header(tmp_path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    png += struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"
    members = [("a.png", png), ("a.txt", b"a bomb")]
    path = helpers.write_tar(tmp_path / "a.tar", members)
    check(path, [("a", "a.png", "pixels")])


@pytest.mark.parametrize(("kind", "mode"), [("png", "RGB"), ("webp", "RGB"), ("jpg", "CMYK")])
def test_what_must_be_scaled_is_sound_where_a_size_is_given(
    tmp_path: Path, kind: str, mode: str
) -> None:
    body = io.BytesIO()
    Image.new(mode, (40, 20)).save(body, "JPEG" if kind == "jpg" else kind)
    path = helpers.write_tar(tmp_path / "a.tar", [(f"a.{kind}", body.getvalue()), ("a.txt", b"a")])
    check(path, [], Checks(size=16))
    check(path, [("a", f"a.{kind}", "no RGB or gray JPEG where 20 x 40 are wanted")])
    cut = body.getvalue()[:-40]
    path = helpers.write_tar(tmp_path / "a.tar", [(f"a.{kind}", cut), ("a.txt", b"a")])
    check(path, [("a", f"a.{kind}", "")], Checks(size=16))


def test_latents_fit_their_frames(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [2, 1, 0, 2])
    latents = safetensors.numpy.save({"latents": np.zeros((2, 4, 2, 2), np.float16)})
    bodies = {"00000000": latents, "00000001": latents, "00000002": b"?", "00000003": b"?"}
    extra = [(f"{key}.latents.safetensors", body) for key, body in bodies.items()]
    members = sorted([*helpers.tar_members(path), *extra], key=lambda member: member[0][:8])
    helpers.write_tar(path, members)
    check(
        path,
        [
            ("00000001", "00000001.latents.safetensors", "expected float16 (T, C, h, w) with T"),
            ("00000002", "00000002.latents.safetensors", "not safetensors"),
            ("00000003", "00000003.latents.safetensors", "not safetensors"),
        ],
    )


def test_thousands_of_frames_are_one_sample_with_faults(tmp_path: Path) -> None:
    members = [("a.json", helpers.make_sample(0, 1).to_json())]
    members += [(f"a.{i:05d}.jpg", b"") for i in range(3000)]
    path = helpers.write_tar(tmp_path / "a.tar", members)
    report = validate([path], Checks(decode_frac=0))
    assert report.num_samples == 1
    assert sum("more than 1024 members" in f.fault for f in report.faults) == 3001 - 1024


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400", '"1"', "-1", "1.5", "null"])
def test_odd_numbers_are_refused(tmp_path: Path, number: str) -> None:
    raw = (
        helpers.make_sample(0, 1)
        .to_json()
        .replace(b'"frame_count":1', b'"frame_count":%s' % number.encode())
    )
    path = helpers.write_tar(tmp_path / "a.tar", [("a.json", raw), ("a.000.jpg", JPEG)])
    ((key, _, _),) = faults(validate([path]))
    assert key == "a"
