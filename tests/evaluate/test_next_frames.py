"""Pictures of what a run with stored latents expects, from training to the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.distributed import ranks
from tests.models import tiny
from tests.tools.run_tool import error_line, run_tool
from tests.train import helpers, runs
from vlm.data.format.latents import LatentEncoder
from vlm.data.format.schema import Sample, Turn
from vlm.data.format.shards import ShardWriter
from vlm.data.manifest import manifest
from vlm.evaluate import judge, next_frames
from vlm.train.metrics import COLUMNS, read_rows

diffusers = pytest.importorskip("diffusers", reason="pip install saccade[latents]")
SIDE = tiny.SIZE // 2


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(decoder: Path) -> Path:
    """Trained for three steps on latents that lie beside the frames."""
    folder, encoder = runs.new_folder(), LatentEncoder(str(decoder))
    turns = (
        Turn(role="user", content="What is it?"),
        Turn(role="assistant", content="red", task="colour"),
    )
    with ShardWriter(folder / "shards", "video", 20) as writer:
        for index in range(20):
            count = 2 + index % 3
            sample = Sample(version=1, kind="video", source="a", frame_count=count, turns=turns)
            size = (count, tiny.SIZE, tiny.SIZE, 3)
            frames = list(np.random.default_rng(index).integers(0, 256, size, np.uint8))
            writer.write(index, sample, frames, encoder.encode(frames))
    shards = sorted((folder / "shards").glob("*.tar"))
    tokenizer = str(helpers.world() / "tokenizer")
    manifest.build(shards, tokenizer, helpers.IMAGE_TOKEN, folder / "m.parquet")
    keys = {"query_dim": 20, "latent_channels": 4, "latent_size": SIDE}
    recipe = helpers.recipe(
        folder / "run",
        "model.family=foveated_latent",
        f"model.connector={json.dumps(keys)}",
        f"data.train={folder}/m.parquet",
        f"data.eval={folder}/m.parquet",
        "data.text_frac=0",
        "data.augment={}",
        "train.steps=3",
    )
    ranks(1).run(runs.fit, recipe, 2)
    return recipe.output_dir


def test_strips_show_frames_what_is_kept_and_what_was_expected(run: Path, decoder: Path) -> None:
    (run / "next_frames").mkdir()
    (run / "next_frames/999.png").touch()
    options = ("--max-samples", 2, "--decoder", decoder, "--mode", "caption")
    result = run_tool("../launch/predict_frames", "--run", run, *options)
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (run / "next_frames").iterdir())
    assert names == ["000.png", "001.png"], "pictures of an earlier call are gone"
    assert "2 samples; mean error" in result.stdout and "of copying the frame" in result.stdout
    found = json.loads((run / "next_frames.json").read_text())["samples"]
    recipe, _, model = judge.open_run(run)
    held = judge.held_out(recipe, 2)
    kept = diffusers.AutoencoderKL.from_pretrained(decoder)
    for index, sample in enumerate(held.samples):
        picture = np.asarray(Image.open(run / "next_frames" / found[index]["file"])).astype(int)
        count, cell = len(sample.frames), tiny.SIZE + 2 * next_frames.GAP
        assert picture.shape == (3 * cell, count * cell, 3)
        with torch.no_grad():
            latents = torch.from_numpy(sample.latents).float()
            scaled = kept.decode(latents / kept.config.scaling_factor).sample
        for frame in range(count):
            left = frame * cell + next_frames.GAP
            rows = [
                picture[top : top + tiny.SIZE, left : left + tiny.SIZE]
                for top in range(next_frames.GAP, 3 * cell, cell)
            ]
            assert (rows[0] == sample.frames[frame]).all()
            plain = ((scaled[frame] + 1) * 127.5).clamp(0, 255).permute(1, 2, 0).numpy()
            assert np.abs(rows[1] - plain).max() <= 1
            assert not (rows[2] == rows[1]).all()
        copied = [float(((latents[i] - latents[i - 1]) ** 2).mean()) for i in range(1, count)]
        assert found[index]["error_of_copying"] == pytest.approx(copied, rel=1e-4)
        encoded = [held.collator.encode(sample)]
        one = held.collator.batch(
            [sample.frames], encoded, ["k"], "video", (16, 16), [sample.latents]
        )
        expected = ((model.predictions(one, "caption") - latents) ** 2).mean((1, 2, 3))
        assert found[index]["error"] == pytest.approx(expected.tolist(), rel=1e-4)


def test_its_looks_are_measured_and_drawn_while_it_trains(run: Path) -> None:
    row = next(row for row in read_rows(run / "metrics.jsonl") if row["event"] == "train")
    looks = COLUMNS[COLUMNS.index("attention_entropy") : COLUMNS.index("visual_ratio") + 1]
    assert all(row[name] is not None for name in looks)
    drawn = sorted(path.name for path in (run / "attention" / "step_00000003").iterdir())
    assert drawn == [f"clip_{n:02d}.{kind}" for n in range(4) for kind in ("gif", "png")]


def test_such_a_run_is_judged_without_its_autoencoder(run: Path) -> None:
    judge.judge(run, 4)
    losses = json.loads((run / "eval.json").read_text())["loss"]
    assert set(losses) == {"coarse_only", "coarse_fine", "autoregressive", "caption"}
    drawn = sorted(path.name for path in (run / "attention").glob("clip_*.png"))
    assert drawn == [f"clip_{n:02d}.png" for n in range(4)]


def test_what_is_missing_is_named(run: Path) -> None:
    line = error_line(run_tool("../launch/predict_frames", "--run", run))
    assert "name the one that made them with --decoder" in line
    other = runs.whole(2, 1).recipe.output_dir
    line = error_line(run_tool("../launch/predict_frames", "--run", other))
    assert "family foveated predicts no frames" in line
