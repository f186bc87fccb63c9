"""A recipe over manifests made here, and the tools that show what it will train on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.data import helpers
from tests.tools.run_tool import Result, run_tool
from vlm.data.manifest import manifest
from vlm.data.text.tokenizer import train_tokenizer

IMAGE_TOKEN = "<|image|>"


def make_tokenizer(folder: Path) -> None:
    texts = ["What colour is the circle?", "The circle is green."] * 20
    train_tokenizer(texts, folder / "tokenizer", vocab_size=300, image_token=IMAGE_TOKEN)


def make_manifest(folder: Path, name: str, frame_counts: Sequence[int]) -> str:
    """Builds ``NAME.parquet`` over shards whose samples have these numbers of frames."""
    path = folder / f"{name}.parquet"
    shards = helpers.write_shards(folder / name, frame_counts, per_shard=10, prefix=name)
    manifest.build(shards, str(folder / "tokenizer"), IMAGE_TOKEN, path)
    return str(path)


def write_recipe(folder: Path, train: Any, **data: Any) -> None:
    """Writes ``r.yaml``, which plans 4 micro-batches a step out of ``train``."""
    part = {"config": {"model_type": "any"}}
    recipe = {
        "name": "test",
        "output_dir": str(folder / "runs"),
        "model": {
            "family": "foveated",
            "vision": part,
            "language": part,
            "tokenizer": str(folder / "tokenizer"),
        },
        "data": {
            "train": train,
            "eval": "none.parquet",
            "micro_batches": 4,
            "budget": 300,
            "text_frac": 0.2,
            **data,
        },
        "train": {"steps": 1},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def run(tool: str, folder: Path, *arguments: str) -> Result:
    return run_tool(tool, "--recipe", folder / "r.yaml", *arguments)


def run_json(tool: str, folder: Path, *arguments: str) -> dict[str, Any]:
    found = run(tool, folder, "--json", *arguments)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)
