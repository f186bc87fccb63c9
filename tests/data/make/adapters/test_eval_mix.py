import hashlib
import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from tests.data.conftest import IMAGE_TOKEN
from tests.tools.run_tool import error_line, run_tool
from vlm.data.format.schema import Sample, Turn
from vlm.data.format.shards import ShardWriter
from vlm.data.make.adapters import eval_mix
from vlm.data.manifest import manifest
from vlm.errors import ConfigError, DataError

NAMES = ("cauldron", "openvid", "llava-youtube", "smoltalk", "webvid")
SIZE = 20


Made = tuple[Sample, list[np.ndarray]]


def sample(source: str, number: int, words: str, num_frames: int) -> Made:
    """Another picture for each number; text where there are no frames."""
    rng = np.random.default_rng([number, *source.encode()])
    frames = [np.full((16, 16, 3), rng.integers(0, 256, 3), np.uint8) for _ in range(num_frames)]
    turns = (Turn(role="user", content=words), Turn(role="assistant", content="red"))
    kind: Any = "video" if num_frames > 1 else "image" if num_frames else "text"
    made = Sample(
        version=1,
        kind=kind,
        source=source,
        frame_count=num_frames,
        turns=turns,
        meta={"id": f"{source}-{number}"},
    )
    return made, frames


def build(folder: Path, tokenizer: Path, made: Iterable[Made], start: int = 0) -> Path:
    with ShardWriter(folder, "s", 9) as writer:
        for i, (one, frames) in enumerate(made, start):
            writer.write(i, one, frames)
    output = folder / "m.parquet"
    manifest.build(sorted(folder.glob("*.tar")), str(tokenizer), IMAGE_TOKEN, output)
    return output


def of(name: str, numbers: Iterable[int], asked: str = "What {}?") -> Any:
    frames = {"smoltalk": 0, "cauldron": 1}.get(name, 3)
    return [sample(name, i, asked.format(i), frames) for i in numbers]


@pytest.fixture
def candidates(tmp_path: Path, tokenizer_path: Path) -> dict[str, list[Path]]:
    """30 of each source, Cauldron's in two manifests."""
    found = {n: [build(tmp_path / n, tokenizer_path, of(n, range(30)))] for n in NAMES[1:]}
    halves = [
        build(tmp_path / f"c{i}", tokenizer_path, of("cauldron", range(15 * i, 15 * i + 15)))
        for i in range(2)
    ]
    return {"cauldron": halves} | found


@pytest.fixture
def training(tmp_path: Path, tokenizer_path: Path) -> Path:
    """Shares pictures with 25 candidates of Cauldron, under other questions, and texts with 5."""
    made = [
        *of("cauldron", range(5, 30), "Another question about {}?"),
        *of("smoltalk", range(5)),
        *of("openvid", range(100, 120)),
    ]
    return build(tmp_path / "train", tokenizer_path, made)


def opened(output: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(output.glob("*.tar")):
        for one in webdataset.WebDataset(str(path), shardshuffle=False):
            frames = b"".join(one[name] for name in sorted(one) if name.endswith("jpg"))
            found.append(json.loads(one["json"]) | {"key": one["__key__"], "frames": frames})
    return found


def test_the_mix_holds_its_shares_and_nothing_that_is_trained_on(
    candidates: dict[str, list[Path]], training: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    options: Any = {"num_samples": SIZE, "samples_per_shard": 7}
    with pytest.raises(DataError, match="25 are also trained on .* leave 5; expected 6"):
        eval_mix.publish(candidates, [training], output, **options)
    assert not output.exists()
    options["num_samples"] = 16
    report = eval_mix.publish(candidates, [training], output, **options)
    found = opened(output)
    assert Counter(one["source"] for one in found) == {
        "cauldron": 5,
        "openvid": 3,
        "llava-youtube": 3,
        "smoltalk": 3,
        "webvid": 2,
    }
    assert {p.name: (p.num_samples, p.num_leaks) for p in report.parts} == {
        "cauldron": (5, 25),
        "openvid": (3, 0),
        "llava-youtube": (3, 0),
        "smoltalk": (3, 5),
        "webvid": (2, 0),
    }
    trained = {one["frames"] or one["turns"][0]["content"] for one in opened(training.parent)}
    own = [one["frames"] or one["turns"][0]["content"] for one in found]
    assert not trained & set(own) and len(set(own)) == 16
    assert [one["key"] for one in found] == [f"{i:08d}" for i in range(16)]
    # mixed, not one source after the other
    assert len({one["source"] for one in found[:6]}) > 2
    assert [len(list(tarfile.open(p))) > 0 for p in sorted(output.glob("*.tar"))] == [True] * 3


def test_samples_are_copied_as_they_were(
    candidates: dict[str, list[Path]], training: Path, tmp_path: Path
) -> None:
    eval_mix.publish(candidates, [training], tmp_path / "out", num_samples=10)
    folders = [path.parent for paths in candidates.values() for path in paths]
    originals = {one["meta"]["id"]: one for folder in folders for one in opened(folder)}
    found = list(opened(tmp_path / "out"))
    assert len(found) == 10
    for one in found:
        assert originals[one["meta"]["id"]] | {"key": one["key"]} == one


def test_the_seed_decides(
    candidates: dict[str, list[Path]], training: Path, tmp_path: Path
) -> None:
    def drawn(name: str, seed: int) -> list[str]:
        output = tmp_path / name
        eval_mix.publish(candidates, [training], output, num_samples=10, seed=seed)
        return [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(output.glob("*"))]

    assert drawn("a", 0) == drawn("b", 0) != drawn("c", 1)


def test_a_frozen_mix_is_checked_against_new_training_shards(
    candidates: dict[str, list[Path]], training: Path, tmp_path: Path, tokenizer_path: Path
) -> None:
    output = tmp_path / "out"
    first = eval_mix.publish(candidates, [training], output, num_samples=10)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    again = eval_mix.publish(candidates, [training], output, num_samples=10)
    assert (again.parts, first.is_new, again.is_new) == (first.parts, True, False)
    more = build(tmp_path / "more", tokenizer_path, of("webvid", range(30), "Else {}?"))
    with pytest.raises(DataError, match="1 of its samples are also trained on: 0000"):
        eval_mix.publish(candidates, [training, more], output, num_samples=10)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    with pytest.raises(DataError, match="a mix of another seed"):
        eval_mix.publish(candidates, [training], output, num_samples=10, seed=3)
    shutil.copy(tmp_path / "webvid" / "s-00000.tar", output / "eval-00001.tar")
    with pytest.raises(DataError, match="have changed since it was drawn"):
        eval_mix.publish(candidates, [training], output, num_samples=10)
    (output / "eval.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds no eval\.json of ours"):
        eval_mix.publish(candidates, [training], output, num_samples=10)


def test_doubles_among_the_candidates_count_once(
    candidates: dict[str, list[Path]],
    training: Path,
    tmp_path: Path,
    tokenizer_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twice = [*of("webvid", range(2)), *of("webvid", range(2), "The same {}?")]
    candidates["webvid"] = [build(tmp_path / "twice", tokenizer_path, twice)]
    with pytest.raises(DataError, match="2 are there twice, leave 2; expected 4"):
        counts = {"cauldron": 5, "openvid": 3, "llava-youtube": 3, "smoltalk": 3, "webvid": 4}
        monkeypatch.setattr(eval_mix, "COUNTS", counts)
        monkeypatch.setattr(eval_mix, "NUM_SAMPLES", 18)
        eval_mix.publish(candidates, [training], tmp_path / "out", num_samples=18)


def test_a_leak_that_slips_in_is_not_published(
    candidates: dict[str, list[Path]],
    training: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def blind(rows: np.ndarray, among: np.ndarray) -> np.ndarray:
        return np.zeros(len(rows), bool)

    whole = eval_mix.contained
    calls = iter([*[blind] * 5, *[whole] * 10])
    monkeypatch.setattr(eval_mix, "contained", lambda a, b: next(calls)(a, b))
    with pytest.raises(DataError, match="are also trained on"):
        eval_mix.publish(candidates, [training], tmp_path / "out", num_samples=SIZE)
    assert not (tmp_path / "out").exists()


def test_the_tool(candidates: dict[str, list[Path]], training: Path, tmp_path: Path) -> None:
    given = [f"{name}={path}" for name, paths in candidates.items() for path in paths]
    command: list[object] = ["eval", "--candidates", *given, "--training", training]
    command += ["--output", tmp_path / "out", "--num-samples", 10, "--workers", 1]
    first, again = run_tool("precompute", *command), run_tool("precompute", *command)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr
    assert "drawn" in first.stdout and "checked, as it was drawn" in again.stdout
    assert re.search(r"cauldron\W+3\W+25\W+0", first.stdout)
    assert "none of them among 50 samples that are trained on" in first.stdout
    assert len(opened(tmp_path / "out")) == 10
    other = run_tool("precompute", *command, "--seed", 5)
    assert "a mix of another seed" in error_line(other)


def test_shares() -> None:
    assert eval_mix.shares(10_000) == eval_mix.COUNTS
    assert eval_mix.shares(10) == dict(zip(NAMES, (3, 2, 2, 2, 1), strict=True))
    for size in range(1, 300):
        found = eval_mix.shares(size)
        assert sum(found.values()) == size
        for name, count in found.items():
            assert abs(count - eval_mix.COUNTS[name] * size / 10_000) < 1
    with pytest.raises(ConfigError, match="expected 1 to 10000"):
        eval_mix.shares(0)


def test_a_source_too_few_or_too_many_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="candidates for nothing: expected manifests for each"):
        eval_mix.publish({}, [], tmp_path / "out")
    with pytest.raises(ConfigError, match="no manifest of training shards"):
        eval_mix.publish({name: [tmp_path] for name in NAMES}, [], tmp_path / "out")
