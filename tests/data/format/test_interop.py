"""What we write opens in other readers, and what they would write opens here.

Megatron-Energon is not needed to use the project: `pip install -e .[bench]` brings it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import webdataset

from tests.data import helpers
from vlm.data.format import shards
from vlm.data.format.layout import read_content

COUNTS = [2, 0, 7, 1, 3]


def write(folder: Path) -> dict[str, dict[str, bytes]]:
    """Shards, and what ``tarfile`` finds in them: the members of each key by suffix."""
    paths = helpers.write_shards(folder, COUNTS, per_shard=3)
    found: dict[str, dict[str, bytes]] = {}
    for path in paths:
        for name, body in helpers.tar_members(path):
            key, _, suffix = name.partition(".")
            found.setdefault(key, {})[suffix] = body
    assert len(found) == len(COUNTS)
    return found


def members_of(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: body for name, body in sample.items() if not name.startswith("__")}


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    expected = write(tmp_path)
    urls = sorted(map(str, tmp_path.glob("*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert {s["__key__"]: members_of(s) for s in samples} == expected
    decoded = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8")
    for index, sample in enumerate(decoded):
        assert sample["json"]["frame_count"] == COUNTS[index]
        for i in range(COUNTS[index]):
            ours = simplejpeg.decode_jpeg(expected[sample["__key__"]][f"{i:03d}.jpg"])
            assert np.array_equal(sample[f"{i:03d}.jpg"], ours)


def test_energon_reads_what_we_write(tmp_path: Path) -> None:
    energon = pytest.importorskip(
        "megatron.energon", reason="megatron-energon is not installed: pip install -e .[bench]"
    )
    prepare = pytest.importorskip("megatron.energon.flavors.webdataset").BaseWebdatasetFactory
    expected = write(tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.tar"))
    prepare.prepare_dataset(
        tmp_path, names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
    )
    meta = tmp_path / ".nv-meta" / "dataset.yaml"
    meta.write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")

    class Encoder(energon.DefaultTaskEncoder):
        cookers = [energon.Cooker(energon.stateless(lambda sample: sample))]
        decoder = None

    dataset = energon.get_val_dataset(
        tmp_path,
        split_part="train",
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        task_encoder=Encoder(),
    )
    found = {
        sample["__key__"].rpartition("/")[2]: members_of(sample)
        for sample in energon.get_loader(dataset)
    }
    assert found == expected


@pytest.mark.parametrize("given", ["img2dataset", "video2dataset"])
def test_we_read_what_webdataset_writes(tmp_path: Path, given: str) -> None:
    """With the writer, and the calls, that both tools use; it leaves times and owners."""
    media = {"img2dataset": "jpg", "video2dataset": "mp4"}[given]
    path = tmp_path / "00000.tar"
    written = []
    with path.open("wb") as file:
        writer = webdataset.TarWriter(file)
        for index in range(4):
            meta = {"key": f"{index:09d}", "status": "success", "caption": f"caption {index}"}
            body = hashlib.sha256(str(index).encode()).digest()
            sample = {"__key__": f"{index:09d}", media: body, "txt": f"caption {index}"}
            writer.write(sample | {"json": json.dumps(meta)})
            written.append((f"{index:09d}", f"caption {index}", body))
        writer.close()
    found = []
    for one in shards.scan(path):
        raw = path.read_bytes()[one.offset : one.offset + one.length]
        content = read_content(shards.read_members(raw, "here"), "here")
        (body,) = [*content.images.values(), *content.video.values()]
        found.append((one.key, content.sample.caption, bytes(body)))
    assert found == written
