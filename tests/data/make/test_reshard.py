import hashlib
import json
import os
import shutil
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest
import webdataset

from tests.data import helpers
from vlm.data.format import shards
from vlm.data.make import reshard
from vlm.data.make.reshard import Options
from vlm.errors import ConfigError, DataError

COUNTS = [5, 0, 2, 64, 1, 9, 2, 0]


def contents(paths: list[Path]) -> dict[str, list[tuple[str, str]]]:
    """(suffix, sha256) of the members of each key, in order, as `tarfile` reads them."""
    found = defaultdict(list)
    for path in paths:
        for name, body in helpers.tar_members(path):
            key, _, suffix = name.partition(".")
            found[key].append((suffix, hashlib.sha256(body).hexdigest()))
    return found


def keys(path: Path) -> list[str]:
    return [found.key for found in shards.scan(path)]


def frame_counts(paths: list[Path]) -> list[int]:
    jsons = [b for p in paths for n, b in helpers.tar_members(p) if n.endswith(".json")]
    return [json.loads(body)["frame_count"] for body in jsons]


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    return helpers.write_shards(tmp_path / "in", COUNTS, per_shard=3)


def run(paths: list[Path], output: Path, **options: object) -> list[Path]:
    reshard.reshard(paths, output, Options(**options))  # type: ignore[arg-type]
    return sorted(output.glob("*.tar"))


def test_a_merge_holds_the_same_bytes_in_the_same_order(inputs: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "new" / "all.tar"
    summary = reshard.merge(inputs, output)
    assert contents([output]) == contents(inputs)
    assert keys(output) == [f"{i:08d}" for i in range(len(COUNTS))]
    assert (summary.num_samples, summary.num_bytes) == (len(COUNTS), output.stat().st_size)
    # another reader agrees
    stream = webdataset.WebDataset(str(output), shardshuffle=False, empty_check=False)
    assert [len(sample) - 4 for sample in stream] == COUNTS
    with pytest.raises(DataError, match="is there already"):
        reshard.merge(inputs, output)


def test_a_split_by_samples_and_back_is_the_same_file(inputs: list[Path], tmp_path: Path) -> None:
    whole = tmp_path / "all.tar"
    reshard.merge(inputs, whole)
    parts = run([whole], tmp_path / "parts", samples_per_shard=3)
    assert [len(keys(path)) for path in parts] == [3, 3, 2]
    assert [path.name for path in parts] == [f"shard-{i:05d}.tar" for i in range(3)]
    reshard.merge(parts, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == whole.read_bytes()


def test_a_split_by_bytes_keeps_to_its_limit(inputs: list[Path], tmp_path: Path) -> None:
    limit = 20_000
    parts = run(inputs, tmp_path / "out", bytes_per_shard=limit)
    assert contents(parts) == contents(inputs)
    lengths = [found.length for path in inputs for found in shards.scan(path)]
    # the loop that a person would write
    expected, room = [0], limit - 1024
    for length in lengths:
        if expected[-1] and room < length:
            expected.append(0)
            room = limit - 1024
        expected[-1] += 1
        room -= length
    assert [len(keys(path)) for path in parts] == expected
    for path in parts:
        assert path.stat().st_size <= limit or len(keys(path)) == 1


def test_sorting_by_frames_is_stable(inputs: list[Path], tmp_path: Path) -> None:
    parts = run(inputs, tmp_path / "out", order="frames", samples_per_shard=4)
    assert frame_counts(parts) == sorted(COUNTS)
    order = [int(key) for path in parts for key in keys(path)]
    assert order == sorted(range(len(COUNTS)), key=COUNTS.__getitem__)
    assert contents(parts) == contents(inputs)


def test_a_shuffle_depends_on_the_seed_alone(inputs: list[Path], tmp_path: Path) -> None:
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (path,) = run(inputs, tmp_path / name, order="shuffled", seed=seed)
        assert contents([path]) == contents(inputs)
        orders.append(keys(path))
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_a_filter_keeps_its_sources(tmp_path: Path) -> None:
    members = []
    for i, source in enumerate(["a", "b", "a", "c"]):
        sample = helpers.make_sample(i, 0).model_copy(update={"source": source})
        members.append((f"{i}.json", sample.to_json()))
    path = helpers.write_tar(tmp_path / "in.tar", members)
    summary = reshard.reshard([path], tmp_path / "out", Options(sources=("a", "c")))
    assert (summary.num_samples, summary.num_left_out) == (3, 1)
    assert keys(tmp_path / "out" / "shard-00000.tar") == ["0", "2", "3"]
    with pytest.raises(DataError, match="source d: no sample is of it; there is a, b, c"):
        run([path], tmp_path / "x", sources=("d",))


def test_clashing_keys_are_refused_or_renamed(tmp_path: Path) -> None:
    a, b = (helpers.write_shards(tmp_path / n, [1, 2], prefix=n)[0] for n in "ab")
    with pytest.raises(DataError, match="2 keys are there twice: 00000000 in .*--rename"):
        reshard.merge([a, b], tmp_path / "x.tar")
    assert not (tmp_path / "x.tar").exists()
    reshard.merge([a, b], tmp_path / "y.tar", rename=True)
    assert keys(tmp_path / "y.tar") == ["00000000", "00000001", "00000002", "00000003"]
    before = [hashes for path in (a, b) for hashes in contents([path]).values()]
    assert list(contents([tmp_path / "y.tar"]).values()) == before
    with tarfile.open(tmp_path / "y.tar") as archive:
        assert {(m.mtime, m.uid, m.uname) for m in archive} == {(0, 0, "")}


def test_foreign_shards_keep_their_layout(tmp_path: Path) -> None:
    jpeg = shards.encode_jpeg(helpers.make_frames(0, 1)[0])
    members = [
        ("cat.jpg", jpeg),
        ("cat.txt", b"a cat"),
        ("clip_000.jpg", jpeg),
        ("clip_001.jpg", jpeg),
        ("clip.json", b'{"caption": "x", "source": "s"}'),
    ]
    path = helpers.write_tar(tmp_path / "in.tar", members, tarfile.PAX_FORMAT)
    (kept,) = run([path], tmp_path / "kept", order="frames")
    assert helpers.tar_members(kept) == members
    (renamed,) = run([path], tmp_path / "renamed", rename=True)
    assert [name for name, _ in helpers.tar_members(renamed)] == [
        *("00000000.jpg", "00000000.txt"),
        *("00000001.000.jpg", "00000001.001.jpg", "00000001.json"),
    ]


def test_a_second_run_makes_only_what_is_missing(inputs: list[Path], tmp_path: Path) -> None:
    options = Options(samples_per_shard=2)
    first = reshard.reshard(inputs, tmp_path / "out", options)
    paths = sorted((tmp_path / "out").glob("*.tar"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    paths[1].unlink()
    second = reshard.reshard(inputs, tmp_path / "out", options)
    assert (first.num_shards, first.num_present) == (4, 0)
    assert (second.num_shards, second.num_present) == (4, 3)
    for path, (data, time_ns) in before.items():
        assert path.read_bytes() == data
        assert path == paths[1] or path.stat().st_mtime_ns == time_ns


def test_another_run_into_the_same_folder_is_refused(inputs: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(inputs, output, samples_per_shard=2)
    with pytest.raises(DataError, match="made of other samples or with other options"):
        run(inputs, output, samples_per_shard=3)
    os.utime(inputs[0], ns=(1, 1))
    with pytest.raises(DataError, match="made of other samples"):
        run(inputs, output, samples_per_shard=2)
    with pytest.raises(DataError, match="holds shards and no reshard.json"):
        run(inputs, inputs[0].parent)
    other = tmp_path / "other"
    run(inputs[1:], other, samples_per_shard=2)
    shutil.copy(sorted(output.glob("*.tar"))[0], sorted(other.glob("*.tar"))[0])
    with pytest.raises(DataError, match="it has changed since it was written"):
        run(inputs[1:], other, samples_per_shard=2)


def test_a_failed_run_leaves_no_half_shard(inputs: list[Path], tmp_path: Path) -> None:
    data = inputs[1].read_bytes()
    inputs[1].write_bytes(data[: len(data) // 2 // 512 * 512])
    with pytest.raises(DataError, match="truncated"):
        run(inputs, tmp_path / "out")
    with pytest.raises(DataError, match="truncated"):
        reshard.merge(inputs, tmp_path / "x" / "all.tar")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "x").exists()


def test_processes_write_the_same_bytes(inputs: list[Path], tmp_path: Path) -> None:
    options = Options(samples_per_shard=3, order="frames", rename=True)
    done: list[tuple[int, int]] = []
    reshard.reshard(inputs, tmp_path / "one", options)
    reshard.reshard(inputs, tmp_path / "two", options, 2, lambda *counts: done.append(counts))
    one, two = (sorted((tmp_path / name).glob("*.tar")) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert done == [(1, 3), (2, 3), (3, 3)] * 2


def test_options_are_checked(tmp_path: Path) -> None:
    for wrong in ({"samples_per_shard": 0}, {"bytes_per_shard": -1}, {"seed": -1}):
        with pytest.raises(ConfigError, match="expected"):
            Options(**wrong)  # type: ignore[arg-type]
    empty = helpers.write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(DataError, match="without a sample"):
        reshard.merge([empty], tmp_path / "x.tar")
