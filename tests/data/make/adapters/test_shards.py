"""From published layouts to shards by the real tool, opened with the plain webdataset package."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from PIL import Image

from tests.data.make.adapters.published import IMAGE, cell, picture, write_json, write_parquet
from tests.tools.run_tool import error_line, run_tool
from vlm.data.make.adapters.registry import ADAPTERS


def precompute(name: str, root: Path, output: Path, *options: object) -> str:
    shared = ("--root", root, "--output", output, "--size", 32, "--workers", 1)
    result = run_tool("precompute", name, *shared, *options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def samples(output: Path) -> list[dict[str, Any]]:
    """All samples, their JSON parsed and their images decoded by Pillow."""
    found = []
    for path in sorted(output.glob("*.tar")):
        stream = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
        for sample in stream:
            images = [sample[name] for name in sorted(sample) if name.endswith("jpg")]
            found.append(
                json.loads(sample["json"])
                | {"frames": [np.asarray(Image.open(io.BytesIO(body))) for body in images]}
            )
    return found


def looks_like(frame: np.ndarray, number: int) -> bool:
    """Whether a frame is the centre of that picture."""
    image = Image.open(io.BytesIO(picture(number))).resize((32, 32), box=(5, 0, 35, 30))
    return np.abs(np.asarray(image, float) - frame).mean() < 4


def test_cauldron(tmp_path: Path) -> None:
    rows = [
        {
            "images": [cell(2 * i), cell(2 * i + 1)],
            "texts": [
                {"user": "Same?", "assistant": f"No {i}.", "source": "NLVR2"},
                {"user": "Sure?", "assistant": "Yes.", "source": "NLVR2"},
            ],
        }
        for i in range(6)
    ]
    rows[5]["images"] = [cell(0), {"bytes": b"no image", "path": None}]
    write_parquet(tmp_path / "nlvr2" / "train-0.parquet", rows, images=pa.list_(IMAGE))
    table = precompute("cauldron", tmp_path, tmp_path / "out", "--samples-per-shard", 4)
    assert "5 samples, 10 frames" in table and "1, see failed.jsonl" in table
    found = samples(tmp_path / "out")
    assert [s["turns"][1]["content"] for s in found] == [f"No {i}." for i in range(5)]
    for i, sample in enumerate(found):
        assert (sample["kind"], sample["source"], sample["frame_count"]) == (
            "image",
            "cauldron/nlvr2",
            2,
        )
        assert len(sample["turns"]) == 4
        assert sample["meta"]["licence"] == ADAPTERS["cauldron"].licence
        assert [looks_like(f, 2 * i + j) for j, f in enumerate(sample["frames"])] == [True, True]
        assert not looks_like(sample["frames"][0], 2 * i + 1)


def test_preference_pairs_split_by_image(tmp_path: Path) -> None:
    rows = [
        {
            "image": cell(i % 10),
            "question": f"Question {i}?",
            "chosen": "A dog.",
            "rejected": "A cat.",
            "origin_dataset": None,
        }
        for i in range(40)
    ]
    path = tmp_path / "RLAIF-V-Dataset_000.parquet"
    write_parquet(path, rows, image=IMAGE, origin_dataset=pa.string())
    parts = {}
    for part in ("train", "val"):
        options = ("--split", part, "--val-frac", 0.4, "--seed", 1)
        precompute("rlaif-v", tmp_path, tmp_path / part, *options)
        parts[part] = samples(tmp_path / part)
    assert len(parts["train"]) + len(parts["val"]) == 40
    shown = {part: {s["frames"][0].tobytes() for s in found} for part, found in parts.items()}
    assert shown["train"] and shown["val"] and not shown["train"] & shown["val"]
    pair = parts["train"][0]["preference"]
    assert (pair["chosen"], pair["rejected"]) == ("A dog.", "A cat.")
    assert pair["prompt"][0]["content"].startswith("Question ")


def test_laion_tars(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for i in range(3):
            for suffix, body in (("jpg", picture(i)), ("txt", f"text {i}".encode())):
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
    precompute("laion", tmp_path, tmp_path / "out", "--layout", "tar", "--prompt", "")
    found = samples(tmp_path / "out")
    assert [s["caption"] for s in found] == ["text 0", "text 1", "text 2"]
    assert [looks_like(s["frames"][0], i) for i, s in enumerate(found)] == [True] * 3


def test_coco_out_of_its_zip_with_images_that_are_not_there(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(4)]
    captions = [{"image_id": i, "id": i, "caption": f"caption {i}"} for i in range(4)]
    content = {"images": images, "annotations": captions}
    write_json(tmp_path / "annotations" / "captions_train2017.json", content)
    with zipfile.ZipFile(tmp_path / "train2017.zip", "w") as archive:
        for i in (0, 2):
            archive.writestr(f"train2017/{i:012d}.jpg", picture(i))
    table = precompute("coco-captions", tmp_path, tmp_path / "out")
    assert "2 samples, 2 frames" in table and "skipped: missing image" in table
    found = samples(tmp_path / "out")
    assert [s["caption"] for s in found] == ["caption 0", "caption 2"]
    failed = (tmp_path / "out" / "failed.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in failed] == ["missing image"] * 2


def test_smoltalk_is_text(tmp_path: Path) -> None:
    said = [{"content": "Hi <b>", "role": "user"}, {"content": "Hello", "role": "assistant"}]
    rows = [{"messages": said, "source": "everyday"}] * 7
    write_parquet(tmp_path / "data" / "all" / "train-0.parquet", rows)
    precompute("smoltalk", tmp_path, tmp_path / "out", "--stage", 2)
    found = samples(tmp_path / "out")
    assert [(s["kind"], s["frames"], s["meta"]["loss_on"]) for s in found] == [
        ("text", [], "answers")
    ] * 2


@pytest.mark.parametrize("name", sorted(set(ADAPTERS) - {"video", "eval"}))
def test_a_folder_without_the_data_set_is_a_mistake(tmp_path: Path, name: str) -> None:
    needed = {"smoltalk": ("--stage", 1), "laion": ("--layout", "tar")}
    output = tmp_path / "out"
    result = run_tool(
        "precompute", name, "--root", tmp_path, "--output", output, *needed.get(name, ())
    )
    assert "expected" in error_line(result)
    assert not list(output.glob("*.tar"))
