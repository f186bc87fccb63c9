import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import webdataset

from tests.data.clips import write_clip
from tests.data.make.test_precompute import contents, source
from vlm.data.format import latents, shards
from vlm.data.format.latents import LatentEncoder, read_latents
from vlm.data.format.layout import read_content
from vlm.data.make import precompute
from vlm.data.pool import ordered_map
from vlm.errors import ConfigError, SampleError

diffusers = pytest.importorskip(
    "diffusers", reason="diffusers is not installed: pip install saccade[latents]"
)
SIZE = 32


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random one, which halves a side twice."""
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        scaling_factor=0.7,
        shift_factor=0.2,
    )
    folder = tmp_path_factory.mktemp("models") / "autoencoder"
    model.save_pretrained(folder)
    return folder


def make_frames(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8))


def test_the_scaled_mean_of_each_frame(autoencoder: Path) -> None:
    frames = make_frames(11)
    found = read_latents(LatentEncoder(str(autoencoder)).encode(frames), 11, "x")
    assert found.shape == (11, 4, 8, 8) and found.dtype == np.float16
    model = diffusers.AutoencoderKL.from_pretrained(autoencoder)
    for frame, latent in zip(frames, found, strict=True):
        pixels = torch.tensor(frame / 255.0 * 2 - 1, dtype=torch.float32).permute(2, 0, 1)
        with torch.no_grad():
            moments = model.quant_conv(model.encoder(pixels[None]))[0]
        expected = (moments[:4] - 0.2) * 0.7
        assert np.allclose(latent, expected, atol=2e-3, rtol=2e-3)


def test_an_autoencoder_inside_a_pipeline(autoencoder: Path, tmp_path: Path) -> None:
    (tmp_path / "vae").symlink_to(autoencoder)
    frames = make_frames(1)
    inside, alone = (LatentEncoder(str(path)) for path in (tmp_path, autoencoder))
    assert inside.encode(frames) == alone.encode(frames)


def test_sizes_that_do_not_fit(autoencoder: Path) -> None:
    LatentEncoder(str(autoencoder)).check_size(32)
    with pytest.raises(ConfigError, match="size 30: expected a multiple of the latents' 4"):
        LatentEncoder(str(autoencoder)).check_size(30)


def test_no_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no AutoencoderKL"):
        LatentEncoder(str(tmp_path))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install saccade\[latents\]"):
        LatentEncoder(str(tmp_path))


def test_members_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    good = np.zeros((2, 4, 8, 8), np.float16)
    save = safetensors.numpy.save
    bad = good.copy()
    bad[0, 0, 0, 0] = np.nan
    for body, fault in (
        (b"", "not safetensors"),
        (b"\xff" * 100, "not safetensors"),
        (save({"latents": good})[:-5], "not safetensors"),
        (save({"latents": good, "x": good}), "found tensors"),
        (save({"latents": good.astype(np.float32)}), "found float32"),
        (save({"latents": good[:1]}), "T = 2 frames"),
        (save({"latents": good[0]}), "expected float16"),
        (save({"latents": bad}), "not finite"),
    ):
        with pytest.raises(SampleError, match=f"^here: .*{fault}"):
            read_latents(body, 2, "here")
    assert np.array_equal(read_latents(memoryview(save({"latents": good})), 2, "here"), good)
    monkeypatch.setattr(latents, "MAX_LATENTS_BYTES", 10)
    with pytest.raises(SampleError, match="at most 10 are read"):
        read_latents(save({"latents": good}), 2, "here")


def test_shards_with_latents(autoencoder: Path, tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", 24)
    lines = [{"video": "a.mp4", "caption": "x"}, {"caption": "text"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = precompute.Settings(size=SIZE, latents=str(autoencoder))
    engine = functools.partial(ordered_map, workers=1)
    for name in ("one", "two"):
        report = precompute.run(source(path), tmp_path / name, settings, engine, lambda *_: None)
        assert report.num_written == 2
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    shard = tmp_path / "one" / "video-00000.tar"
    (sample,) = webdataset.WebDataset(str(shard), shardshuffle=False)
    assert read_latents(sample["latents.safetensors"], 3, "x").shape == (3, 4, 8, 8)
    (one,) = shards.scan(shard)
    body = shard.read_bytes()[one.offset : one.offset + one.length]
    members = shards.read_members(body, "x")
    assert len(read_content(members, "x").images) == 3
    (text,) = webdataset.WebDataset(str(tmp_path / "one" / "text-00000.tar"), shardshuffle=False)
    assert "latents.safetensors" not in text
