"""Every command of docs/data.md, in its order, on a handful of clips and images."""

import csv
import itertools
import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.data import helpers
from tests.data.clips import write_clip
from tests.tools.run_tool import run_tool
from vlm.data.text.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "data.md"
NUM_CLIPS, NUM_IMAGES = 14, 12


class Block(NamedTuple):
    language: str
    #: name of the file that it shows, or how its command ends
    label: str
    text: str


def blocks() -> list[Block]:
    found = re.findall(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", PAGE.read_text(), re.MULTILINE)
    return [Block(*one) for one in found]


def shown(name: str) -> str:
    (text,) = [block.text for block in blocks() if block.label == name]
    return text


def write_jsonl(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def more(line: dict[str, Any], number: int) -> dict[str, Any]:
    """A line like one of the page, of other media and words."""
    line = json.loads(re.sub("(?i)square", rf"\g<0>-{number}", json.dumps(line)))
    if "video" in line:
        line["video"] = f"clip{number:02d}.mp4"
    if "images" in line:
        line["images"] = [f"{number}-{image}" for image in line["images"]]
    return line


def make_media(folder: Path) -> None:
    """What the page says is there, and more of the same."""
    rows = list(csv.DictReader(shown("captions.csv").splitlines()))
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(more(rows[i % len(rows)], i) for i in range(0, NUM_CLIPS, 2))
    lines = [json.loads(line) for line in shown("clips.jsonl").splitlines()]
    own = [more(line, number) for number in range(1, NUM_CLIPS, 2) for line in lines]
    write_jsonl(folder / "clips.jsonl", own)
    for name in ("clips", "images", "foreign", "damaged"):
        (folder / name).mkdir()
    for i in range(NUM_CLIPS):
        write_clip(folder / "clips" / f"clip{i:02d}.mp4", 8 * (1 + i % 5))
    pictures = [json.loads(line) for line in shown("images.jsonl").splitlines()]
    lines = [more(pictures[i % len(pictures)], i) for i in range(NUM_IMAGES)]
    write_jsonl(folder / "images.jsonl", lines)
    rng = np.random.default_rng(0)
    for name in {name for line in lines for name in line["images"]}:
        noise = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / name)
    jpegs = {path.stem: path.read_bytes() for path in (folder / "images").glob("*.jpg")}
    assert jpegs
    members = [(f"{k}.{s}", b) for k, v in jpegs.items() for s, b in (("jpg", v), ("txt", b"web"))]
    helpers.write_tar(folder / "foreign" / "00000.tar", members)
    (path,) = helpers.write_shards(folder / "damaged", [2, 1, 3])
    helpers.write_tar(
        path, [(n, b"?" if ".001." in n else b) for n, b in helpers.tar_members(path)]
    )


def make_mixture(folder: Path) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    recipe["data"] |= yaml.safe_load(shown("mixture.yaml"))["data"]
    recipe["data"]["micro_batches"] = 1
    (folder / "mixture.yaml").write_text(yaml.safe_dump(recipe))


def test_every_command_does_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_media(tmp_path)
    make_mixture(tmp_path)
    train_tokenizer([PAGE.read_text()], tmp_path / "tokenizer", 300, "<|image|>")
    for name in ("recipes", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    said = {}
    for block in blocks():
        if block.language != "bash" or block.label == "network":
            continue
        assert block.label in ("", "fails")
        for command in block.text.splitlines():
            python, script, *arguments = shlex.split(command)
            assert python == "python" and (ROOT / script).is_file(), command
            if script.startswith("tools/") and not script.startswith(("tools/show", "tools/exp")):
                arguments += ["--workers", "1"]
            result = run_tool(f"../{script.removesuffix('.py')}", *arguments)
            expected = 1 if block.label == "fails" else 0
            assert result.returncode == expected, f"{command}\n{result.stdout}{result.stderr}"
            said[command] = result.stdout
    assert all(Path(name).stat().st_size for name in ("shards.html", "samples.html"))
    (mixed,) = (json.loads(out) for command, out in said.items() if "--json" in command)
    assert len(mixed["steps"]) == 5


def test_what_needs_a_network_is_at_least_spelled_right() -> None:
    parser = runpy.run_path(str(ROOT / "tools" / "precompute.py"))["_parser"]()
    commands = [block.text.splitlines() for block in blocks() if block.label == "network"]
    for command in itertools.chain(*commands):
        _, script, *arguments = shlex.split(command)
        assert script == "tools/precompute.py"
        assert parser.parse_args(arguments).root
