import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.data import helpers
from tests.data.clips import write_clip
from tests.data.conftest import IMAGE_TOKEN
from vlm.data.format import shards
from vlm.data.format.decode import Sampling
from vlm.data.format.layout import read_content
from vlm.data.manifest import manifest
from vlm.data.text import chat
from vlm.errors import ConfigError, DataError

ROOT = Path(__file__).parents[3]
COUNTS = [3, 8, 0, 1, 64, 0, 5, 2, 4, 7]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("data")
    paths = helpers.write_shards(folder / "shards", COUNTS, per_shard=4)
    output = folder / "m.parquet"
    manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, output)
    return output


def test_rows_say_what_the_shards_hold(
    built: Path, tokenizer: PreTrainedTokenizerFast, tokenizer_path: Path
) -> None:
    loaded = manifest.load(built)
    assert loaded.num_frames.tolist() == COUNTS
    assert loaded.kind.tolist() == [2 if count else 0 for count in COUNTS]
    assert loaded.shard.tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert loaded.height.tolist() == loaded.width.tolist() == [16 if c else 0 for c in COUNTS]
    assert loaded.keys([9, 0]) == ["00000009", "00000000"]
    assert loaded.key(3) == "00000003"
    assert loaded.tokenizer_sha256 == chat.tokenizer_fingerprint(tokenizer_path)
    for row in range(len(COUNTS)):
        answer = helpers.ANSWERS[row % len(helpers.ANSWERS)]
        text = f"<|user|>What colour is the circle?<|end|><|assistant|>{answer}<|end|>"
        assert loaded.num_tokens[row] == len(tokenizer.tokenize(text))
        assert loaded.num_answer_tokens[row] == len(tokenizer.tokenize(answer)) + 1
    for name in manifest.PLANNING_COLUMNS:
        assert loaded.__dict__[name].dtype == np.uint32


def test_one_read_gets_a_sample(built: Path) -> None:
    loaded = manifest.load(built)
    table = pq.read_table(built)
    for row, count in enumerate(COUNTS):
        shard = loaded.shards[loaded.shard[row]]
        with shard.path.open("rb") as file:
            buffer = os.pread(file.fileno(), int(loaded.length[row]), int(loaded.offset[row]))
        content = read_content(shards.read_members(buffer, "here"), "here")
        assert (content.sample.frame_count, len(content.images)) == (count, count)
        assert content.sample.meta["id"] == f"clip-{row}"
        bodies = [b for name, b in helpers.tar_members(shard.path) if f"{row:08d}." in name]
        expected = xxhash.xxh3_128_digest(b"".join(bodies))
        assert table["content_hash"][row].as_py() == expected
        assert loaded.content_hash(row) == expected
    assert loaded.offset.dtype == loaded.length.dtype == np.uint64


def test_shard_table(built: Path) -> None:
    infos = manifest.load(built).shards
    assert [info.num_samples for info in infos] == [4, 4, 2]
    for info in infos:
        assert info.path.is_absolute()
        assert info.bytes == info.path.stat().st_size
        assert info.sha256 == hashlib.sha256(info.path.read_bytes()).hexdigest()
    header = json.loads(pq.read_schema(built).metadata[b"saccade"])
    assert header["shards"][0]["path"] == "shards/video-00000.tar"
    assert header["vision"] == {"size": None, "fps": 1.0, "max_frames": 64}
    assert header["sources"] == [{"name": "test", "num_samples": 10, "licences": []}]
    assert header["forms"] == {"turns": 10}


def test_the_file_does_not_depend_on_workers_or_place(
    built: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(built.parent / "shards", tmp_path / "shards")
    output = tmp_path / "m.parquet"
    done: list[tuple[int, int]] = []
    summary = manifest.build(
        shards.find_shards([tmp_path / "shards"]),
        str(tokenizer_path),
        IMAGE_TOKEN,
        output,
        workers=2,
        progress=lambda *counts: done.append(counts),
    )
    assert output.read_bytes() == built.read_bytes()
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert summary.num_samples == len(COUNTS)
    assert summary.num_frames == sum(COUNTS)
    assert summary.rejected == []
    names = ["m.parquet", "m.parquet.parts", "shards"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_the_fingerprint_follows_content_and_order(tokenizer_path: Path, tmp_path: Path) -> None:
    first = helpers.write_shards(tmp_path / "a", [2, 3], per_shard=1)
    other = helpers.write_shards(tmp_path / "b", [2, 4], per_shard=1)
    prints = [
        manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, tmp_path / "m").fingerprint
        for paths in (first, other, first[::-1], first)
    ]
    assert prints[0] == prints[3]
    assert len(set(prints)) == 3


def test_missing_and_changed_shards_are_found(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built.parent, tmp_path / "copy")
    loaded = manifest.load(tmp_path / "copy" / "m.parquet")
    loaded.check_shards()
    with loaded.shards[0].path.open("ab") as file:
        file.write(b"x")
    loaded.shards[2].path.unlink()
    with pytest.raises(DataError, match=r"2 of 3 shards.*video-00000.tar has .*00002.tar is miss"):
        loaded.check_shards()


def test_few_bad_samples_are_left_out_and_named(tokenizer_path: Path, tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [0] * 150, per_shard=150)
    members = helpers.tar_members(path)
    name, body = members[7]
    members[7] = (name, body.replace(b"a green square", b"a <|end|>square"))
    helpers.write_tar(path, members)
    output = tmp_path / "m.parquet"
    summary = manifest.build([path], str(tokenizer_path), IMAGE_TOKEN, output)
    assert summary.num_samples == 149
    (message,) = summary.rejected
    assert "key 00000007" in message and "special token" in message
    assert "00000007" not in manifest.load(output).keys(range(149))


def test_many_bad_samples_stop_the_build(tokenizer_path: Path, tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [1] * 20)
    members = [m for m in helpers.tar_members(path) if m[0] != "00000003.000.jpg"]
    helpers.write_tar(path, members)
    output = tmp_path / "m.parquet"
    with pytest.raises(DataError, match=r"1 of 20 samples.*key 00000003.*frame_count is 1"):
        manifest.build([path], str(tokenizer_path), IMAGE_TOKEN, output)
    assert not output.exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ([], "it is empty"),
        ([("0.jpg", b"x"), ("0.txt", b"a cat"), ("0.json", b'{"uid": 1}')], "not a JPEG"),
        ([("0.jpg", b"x")], "nothing to learn"),
        ([("0.json", b"{}"), ("0.pyd", b"x")], "0.pyd"),
    ],
)
def test_foreign_shards_are_one_error(
    tokenizer_path: Path, tmp_path: Path, members: list[tuple[str, bytes]], fault: str
) -> None:
    path = helpers.write_tar(tmp_path / "foreign.tar", members)
    with pytest.raises(DataError, match=fault) as caught:
        manifest.build([path], str(tokenizer_path), IMAGE_TOKEN, tmp_path / "m.parquet")
    assert "foreign.tar" in str(caught.value)


def test_frames_that_are_no_jpeg_or_differ_in_size(tokenizer_path: Path, tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [2])
    members = helpers.tar_members(path)
    png = b"\x89PNG\r\n\x1a\n"
    large = shards.encode_jpeg(np.zeros((16, 18, 3), np.uint8))
    for body, fault in ((png, "not a JPEG"), (large, "several sizes")):
        helpers.write_tar(path, [*members[:-1], (members[-1][0], body)])
        with pytest.raises(DataError, match=fault):
            manifest.build([path], str(tokenizer_path), IMAGE_TOKEN, tmp_path / "m")


def test_what_is_not_a_manifest_is_refused(built: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        manifest.load(tmp_path / "none.parquet")
    text = tmp_path / "text.parquet"
    text.write_text("not parquet")
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"key": ["a"]}), other)
    for path in (text, other):
        with pytest.raises(DataError, match="build_manifest"):
            manifest.load(path)
    damaged = bytearray(built.read_bytes())
    damaged[40] ^= 255
    text.write_bytes(damaged)
    with pytest.raises(DataError):
        loaded = manifest.load(text)
        loaded.offset, loaded.length, loaded.key(0)  # noqa: B018


def test_the_tokenizer_is_checked_first(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [2])
    with pytest.raises(ConfigError, match="tokenizer"):
        manifest.build([path], str(tmp_path / "none"), IMAGE_TOKEN, tmp_path / "m.parquet")


def test_a_killed_build_goes_on(tokenizer_path: Path, tmp_path: Path) -> None:
    paths = helpers.write_shards(tmp_path / "shards", [1, 2, 0, 3, 1, 0, 2], per_shard=1)
    output = tmp_path / "m.parquet"
    script = f"""
import os, signal
from pathlib import Path
from vlm.data.manifest import manifest, parts
from vlm.data.format import shards
make = parts.make
def die_at_the_fourth(task):
    if task.shard.endswith("00003.tar"):
        os.kill(os.getpid(), signal.SIGKILL)
    return make(task)
parts.make = die_at_the_fourth
paths = shards.find_shards([Path({str(tmp_path / "shards")!r})])
manifest.build(paths, {str(tokenizer_path)!r}, {IMAGE_TOKEN!r}, Path({str(output)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    summary = manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, output)
    assert (summary.num_shards, summary.num_read) == (7, 4)
    again = tmp_path / "again.parquet"
    assert manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, again).num_read == 7
    assert again.read_bytes() == output.read_bytes()
    names = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert all("m.parquet" in name for name in names), "only what the killed one left"


def test_only_shards_that_changed_are_read(tokenizer_path: Path, tmp_path: Path) -> None:
    paths = helpers.write_shards(tmp_path / "shards", [1, 2, 0, 3], per_shard=1)
    output = tmp_path / "m.parquet"

    def build(*chosen: Path, **options: Any) -> manifest.Summary:
        return manifest.build(chosen, str(tokenizer_path), IMAGE_TOKEN, output, **options)

    first = build(*paths)
    assert first.num_read == 4
    again = build(*paths)
    assert again.num_read == 0
    assert (again.fingerprint, again.num_tokens) == (first.fingerprint, first.num_tokens)
    assert build(*paths[::-1]).num_read == 0
    helpers.write_tar(paths[1], helpers.tar_members(paths[3]))
    assert build(*paths).num_read == 1
    assert manifest.load(output).num_frames.tolist() == [1, 3, 0, 3]
    helpers.write_shards(tmp_path / "shards", [5], prefix="more")
    assert build(*paths, tmp_path / "shards" / "more-00000.tar").num_read == 1
    assert build(*paths[:2]).num_read == 0
    assert len(list((tmp_path / "m.parquet.parts").iterdir())) == 2
    assert build(*paths[:2], size=8).num_read == 2


def test_what_was_left_out_stays_known(tokenizer_path: Path, tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [1] * 4)
    helpers.write_tar(path, helpers.tar_members(path)[:-1])
    output = tmp_path / "m.parquet"
    summaries = [
        manifest.build([path], str(tokenizer_path), IMAGE_TOKEN, output, max_rejected_frac=0.5)
        for _ in range(2)
    ]
    assert [summary.num_read for summary in summaries] == [1, 0]
    assert summaries[0].rejected == summaries[1].rejected
    with pytest.raises(DataError, match="1 of 4 samples cannot be used, at most 1%"):
        manifest.build([path], str(tokenizer_path), IMAGE_TOKEN, output)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"size": 0}, "size 0"),
        ({"size": 100_000}, "size 100000"),
        ({"sampling": Sampling(0.0, 64)}, "fps 0.0"),
        ({"sampling": Sampling(float("nan"), 64)}, "fps nan"),
        ({"sampling": Sampling(1.0, 65)}, "max_frames 65"),
    ],
)
def test_options_out_of_range(
    tokenizer_path: Path, tmp_path: Path, options: dict[str, Any], fault: str
) -> None:
    (path,) = helpers.write_shards(tmp_path, [2])
    with pytest.raises(ConfigError, match=fault):
        manifest.build([path], str(tokenizer_path), IMAGE_TOKEN, tmp_path / "m.parquet", **options)
    assert list(tmp_path.iterdir()) == [path]


def test_samples_of_every_form_and_layout(tokenizer_path: Path, tmp_path: Path) -> None:
    """A whole folder of shards that nobody of us wrote, to one manifest and back."""
    picture = shards.encode_jpeg(np.full((20, 30, 3), 99, np.uint8))
    clip = write_clip(tmp_path / "c.mp4", 40).read_bytes()
    tokens = {"token_ids": [20, 21, 22], "loss_mask": [0, 1, 1], "source": "o", "frame_count": 2}
    pair = {"user": "Why?", "chosen_assistant": "red", "rejected_assistant": "green"}
    members = {
        "img.tar": [("7.jpg", picture), ("7.json", b'{"license": "MIT"}'), ("7.txt", b"a cat")],
        "pair.tar": [("8.jpg", picture), ("8.json", json.dumps(pair).encode())],
        "tokens.tar": [
            ("9.json", json.dumps(tokens).encode()),
            ("9_000.jpg", picture),
            ("9_001.jpg", picture),
        ],
        "video.tar": [("6.mp4", clip), ("6.txt", b"a dog"), ("6.json", b"{}")],
    }
    paths = [helpers.write_tar(tmp_path / name, own) for name, own in members.items()]
    output = tmp_path / "m.parquet"
    summary = manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, output, size=16)
    assert summary.forms == {"caption": 2, "preference": 1, "tokens": 1}
    assert [(s.name, s.num_samples, s.licences) for s in summary.sources] == [
        ("foreign", 3, ["MIT"]),
        ("o", 1, []),
    ]
    loaded = manifest.load(output)
    assert loaded.num_frames.tolist() == [1, 1, 2, 5]
    assert loaded.kind.tolist() == [1, 1, 2, 2]
    assert set(loaded.height) == set(loaded.width) == {16}
    assert loaded.num_tokens[2] == 3
    assert loaded.num_answer_tokens[2] == 2
    both = [chat_length(tokenizer_path, "Why?", answer) for answer in ("red", "green")]
    assert loaded.num_tokens[1] == sum(both), "a pair counts both of its branches"


def chat_length(tokenizer_path: Path, question: str, answer: str) -> int:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    text = f"<|user|>{question}<|end|><|assistant|>{answer}<|end|>"
    return len(tokenizer.tokenize(text))
