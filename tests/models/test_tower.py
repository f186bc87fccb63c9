"""Towers against transformers' own, and their pixels against arithmetic by hand."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests.models.tiny import CLIP, SIGLIP, VISION
from vlm.errors import DataError
from vlm.models.tower import TOWERS, Tower

VIT = {k: v for k, v in CLIP.items() if k != "initializer_factor"} | {"model_type": "vit"}
DINOV3 = {
    "model_type": "dinov3_vit",
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_register_tokens": 3,
}
REGISTERS = VISION | {"model_type": "dinov2_with_registers", "num_register_tokens": 2}
#: tower -> tokens before the 4 patches
EACH = [(CLIP, 1), (SIGLIP, 0), (VIT, 1), (VISION, 1), (REGISTERS, 3), (DINOV3, 4)]
each = pytest.mark.parametrize(
    ("values", "prefix"), EACH, ids=[str(values["model_type"]) for values, _ in EACH]
)


def make(values, reads="all") -> Tower:
    torch.manual_seed(0)
    values = dict(values)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return Tower(AutoModel.from_config(config), reads).eval()


def frames(size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )


def test_every_tower_is_tried() -> None:
    assert {values["model_type"] for values, _ in EACH} == set(TOWERS)


@each
def test_tokens_are_those_of_transformers_after_the_final_norm(values, prefix: int) -> None:
    whole = make(values)
    expected = whole.tower(pixel_values=whole.normalise(frames())).last_hidden_state
    if values is CLIP:  # transformers norms its pooled token alone
        expected = whole.tower.post_layernorm(expected)
    found = whole(frames())
    torch.testing.assert_close(found, expected)
    # after a norm with weight 1 and bias 0 every token has mean 0 and std 1
    torch.testing.assert_close(found.mean(-1), torch.zeros(2, prefix + 4), rtol=0, atol=1e-5)
    for reads, part in (("all", found), ("cls", found[:, :1]), ("patches", found[:, prefix:])):
        tower = make(values, reads)
        torch.testing.assert_close(tower(frames()), part)
        assert tower.num_tokens == part.shape[1]
    assert len(whole.layers) == 2


@pytest.mark.parametrize(
    ("values", "mean", "std"),
    [
        (CLIP, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        (SIGLIP, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        (VISION, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
    ids=["clip", "siglip", "imagenet"],
)
def test_pixels_are_normalised_as_the_tower_was_trained(values, mean, std) -> None:
    expected = (frames().numpy().transpose(0, 2, 3, 1) / 255 - np.array(mean)) / np.array(std)
    found = make(values).normalise(frames()).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@each
def test_every_parameter_of_a_trained_tower_gets_a_gradient(values, prefix: int) -> None:
    tower = make(values).train()
    tower.gradient_checkpointing = True
    assert tower.gradient_checkpointing
    (tower(frames()) * torch.randn(24, generator=torch.Generator().manual_seed(1))).sum().backward()
    missing = [name for name, p in tower.named_parameters() if p.grad is None]
    assert [name for name in missing if "mask_token" not in name] == []


def test_a_frozen_tower_stays_as_at_inference() -> None:
    tower = make(CLIP | {"attention_dropout": 0.5})
    assert tower.train().tower.training
    tower.requires_grad_(False)
    assert not tower.train().tower.training
    assert torch.equal(tower(frames()), tower(frames()))
    assert not tower(frames()).requires_grad


def test_frames_of_another_size_are_refused_where_there_are_no_positions_for_them() -> None:
    with pytest.raises(DataError, match="frames of 24 x 24.*takes 16 x 16.*--size 16"):
        make(CLIP)(frames(24))
    assert make(VISION)(frames(24)).shape == (2, 10, 24)


def test_the_published_towers_give_the_published_numbers_of_tokens() -> None:
    large = {"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16}
    sizes = [
        (CLIP | large | {"image_size": 224, "patch_size": 14}, 257),
        (CLIP | large | {"image_size": 336, "patch_size": 14}, 577),
        (SIGLIP | {"image_size": 224, "patch_size": 16}, 196),
        (SIGLIP | {"image_size": 384, "patch_size": 14}, 729),
    ]
    # CLIP ViT-H, g and bigG, at 224 px in patches of 14
    for width, heads in ((1280, 16), (1408, 16), (1664, 16)):
        wide = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": heads}
        sizes.append((CLIP | wide | {"image_size": 224, "patch_size": 14}, 257))
    with torch.device("meta"):
        assert [make(values).num_tokens for values, _ in sizes] == [n for _, n in sizes]
