"""Maps against the tower's attention under queries of whole forwards, and the order of patches."""

import numpy as np
import pytest
import torch

from tests.models.reference import plain_queries, sample
from tests.models.tiny import IMAGE, make_batch, make_config, make_model
from vlm.batch import Batch, build_batch
from vlm.evaluate.attention import attention
from vlm.models.foveated import FoveatedModel, Mode

REGISTERS = {"model_type": "dinov2_with_registers", "num_register_tokens": 2}


def with_registers() -> FoveatedModel:
    torch.manual_seed(0)
    return FoveatedModel(make_config(REGISTERS)).double().eval()


def wide_batch() -> Batch:
    """Two clips of 16 x 24 pixels, which are 2 x 3 patches."""
    generator = torch.Generator().manual_seed(3)
    return build_batch(
        frames=torch.randint(0, 256, (3, 3, 16, 24), generator=generator).to(torch.uint8),
        frame_counts=[2, 1],
        input_ids=[[IMAGE, IMAGE, 5, 6], [IMAGE, 7]],
        labels=[[-100, -100, 5, 6], [-100, 7]],
        image_token_id=IMAGE,
        tokens_per_frame=1,
        keys=["a", "b"],
        kind="video",
    )


@pytest.mark.parametrize("build", [make_model, with_registers])
@pytest.mark.parametrize("batch", [make_batch([(3, 5), (1, 4)]), wide_batch()])
def test_it_is_the_mean_over_layers_and_heads_of_each_frame_s_own_query(
    build: type[FoveatedModel], batch: Batch
) -> None:
    model = build()
    seen = attention(model, batch)
    height, width = batch.frames.shape[2] // 8, batch.frames.shape[3] // 8
    modes: tuple[Mode, ...] = ("coarse_only", "coarse_fine")
    for mode, maps in zip(modes, seen, strict=True):
        found = np.stack(maps)
        assert found.shape == (len(batch.frames), height, width)
        assert found.dtype == np.float32
        expected = []
        for index in range(batch.num_samples):
            frames, ids, _ = sample(batch, index)
            queries = plain_queries(model, frames, ids, mode)
            _, cache = model.vision(frames)
            plain = model.vision.attention(model.connector.query_input_proj(queries), cache)
            expected += plain.mean(2).mean(1)[:, -height * width :].tolist()
        assert np.allclose(found.reshape(len(found), -1), expected, atol=1e-6)
        assert (found.sum((1, 2)) < 1).all(), "CLS and registers take their share"
        assert np.abs(found[0] - found[-1]).max() > 1e-4


@pytest.mark.parametrize("build", [make_model, with_registers])
def test_a_patch_s_place_in_the_map_is_its_place_in_the_picture(build: type[FoveatedModel]) -> None:
    """Which token changes with a patch's pixels is asked of the tower, not assumed."""
    model, batch = build(), wide_batch()
    embed = model.vision.tower.embeddings
    plain = embed(model.vision.normalise(batch.frames[:1]))
    num_tokens = plain.shape[1]
    for row, column in np.ndindex(2, 3):
        frame = batch.frames[:1].clone()
        frame[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] ^= 255
        changed = (embed(model.vision.normalise(frame)) != plain).any(-1)[0].nonzero().flatten()
        (token,) = changed.tolist()
        at_token = torch.zeros(3, 2, 2, num_tokens)
        at_token[..., token] = 1
        original = model.vision.attention
        model.vision.attention = lambda query, cache, maps=at_token: maps  # type: ignore[method-assign]
        found = attention(model, batch).fine
        model.vision.attention = original  # type: ignore[method-assign]
        assert found[0][row, column] == 1 and found[0].sum() == 1


def test_without_frames_there_is_nothing_to_map() -> None:
    with pytest.raises(AssertionError):
        attention(make_model(), make_batch([(0, 5)]))
