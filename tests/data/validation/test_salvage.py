import io
import random
import struct
import tarfile
from pathlib import Path

import pytest

from tests.data import helpers
from vlm.data.format import tar
from vlm.data.validation.salvage import Damage, salvage

NAMES = [f"{i:02d}.{suffix}" for i in range(6) for suffix in ("json", "jpg")]


def walk(data: bytes) -> tuple[list[tuple[str, bytes]], list[str]]:
    """(members, texts of the damage)."""
    members, texts = [], []
    for event in salvage(lambda at, size: data[at : at + size], len(data), "it"):
        if isinstance(event, Damage):
            texts.append(event.text)
        else:
            members.append((event.name, data[event.offset : event.offset + event.size]))
    return members, texts


def body(name: str) -> bytes:
    return name.encode() * 100


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    return helpers.write_tar(tmp_path / "a.tar", [(n, body(n)) for n in NAMES]).read_bytes()


STRIDE = tar.BLOCK + tar.padded(len(body(NAMES[0])))


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    padding = bytes(-len(content) % tar.BLOCK)
    return info.tobuf(tarfile.GNU_FORMAT) + content + padding


def test_a_whole_tar_is_what_tarfile_reads(data: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert [name for name, _ in walk(data)[0]] == archive.getnames()
    assert walk(data)[1] == []


def test_a_damaged_header_costs_its_own_member_only(data: bytes) -> None:
    for index in range(len(NAMES)):
        bad = bytearray(data)
        bad[index * STRIDE + 3] ^= 1
        members, texts = walk(bytes(bad))
        kept = [n for n in NAMES if n != NAMES[index]]
        is_last = index == len(NAMES) - 1
        after = (
            "nothing can be read after it" if is_last else f"read on at byte {(index + 1) * STRIDE}"
        )
        assert members == [(n, body(n)) for n in kept]
        assert texts == [
            f"it at byte {index * STRIDE}: no valid tar header; the file is damaged or no plain "
            f"tar; {after}"
        ]


def test_two_damages_are_both_named(data: bytes) -> None:
    bad = bytearray(data)
    bad[2 * STRIDE + 3] ^= 1
    bad[7 * STRIDE + 3] ^= 1
    members, texts = walk(bytes(bad))
    assert len(members) == len(NAMES) - 2
    assert [text.split(":")[0] for text in texts] == [
        f"it at byte {2 * STRIDE}",
        f"it at byte {7 * STRIDE}",
    ]


def test_a_truncated_tar_gives_what_is_whole(data: bytes) -> None:
    members, texts = walk(data[: 5 * STRIDE + 700])
    assert [name for name, _ in members] == NAMES[:5]
    assert len(texts) == 1 and "truncated" in texts[0]
    members, texts = walk(data[: 5 * STRIDE])
    assert [name for name, _ in members] == NAMES[:5]
    assert len(texts) == 1 and "without its end marker" in texts[0]


def test_joined_tars_are_read_on(data: bytes) -> None:
    members, texts = walk(data + data)
    assert [name for name, _ in members] == NAMES * 2
    assert len(texts) == 1 and "joined together" in texts[0]


def test_a_size_beyond_the_end_does_not_hide_the_rest(data: bytes) -> None:
    info = tarfile.TarInfo("huge.json")
    info.size = 7 << 30
    members, texts = walk(info.tobuf(tarfile.USTAR_FORMAT) + data)
    assert [name for name, _ in members] == NAMES
    assert len(texts) == 1 and "'huge.json' needs 7516192768 bytes" in texts[0]


@pytest.mark.parametrize("kind", [b"S", b"7", b"V"])
def test_a_refused_member_hides_nothing_and_shows_nothing_of_its_body(
    data: bytes, kind: bytes
) -> None:
    inner = member("inside.json", b"{}") + bytes(1024)
    members, texts = walk(member("odd.bin", inner, kind) + data)
    assert [name for name, _ in members] == NAMES
    assert len(texts) == 1 and "expected regular files" in texts[0]


@pytest.mark.parametrize(
    "header",
    [
        member("././@LongLink", b"k" * 150 + b".json\0", b"L"),
        member("x", b"25 GNU.sparse.realsize=9\n", b"x"),
        member("x", b"12 size=123\n", b"x"),
        member("x", b"9" * 70_000, b"x"),
        member("x", b"12 path=abc\n", b"g"),
    ],
)
def test_what_an_extended_header_renames_is_left_out_with_it(data: bytes, header: bytes) -> None:
    members, texts = walk(data[:STRIDE] + header + member("k.json", b"{}") + data[STRIDE:])
    assert [name for name, _ in members] == NAMES
    assert len(texts) == 1


def test_random_damage_ends_and_never_invents_a_member(data: bytes) -> None:
    rng = random.Random(0)
    good = dict.fromkeys(NAMES)
    for _ in range(300):
        bad = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(len(bad))
            bad[at : at + rng.randint(1, 600)] = rng.randbytes(rng.randint(1, 600))
        members, texts = walk(bytes(bad))
        assert {name for name, _ in members} <= good.keys()
        assert texts or members


def test_noise_and_zeros_are_no_tar() -> None:
    noise = random.Random(1).randbytes(3 << 20)
    members, texts = walk(noise)
    assert members == [] and len(texts) == 1
    assert "nothing can be read after it" in texts[0]
    members, texts = walk(bytes(5 << 20))
    assert members == [] and len(texts) == 1
    # a header's sum over random bytes is no octal number
    assert tar.probe(struct.pack("512s", noise)) is None
