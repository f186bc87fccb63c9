"""The resampler against torch's own attention with the same weights, and at its published size."""

import pytest
import torch
from torch import Tensor, nn

from tests.models.tiny import CLIP, LANGUAGE, PERCEIVER, SIGLIP, make_projected
from vlm.config_model import ModelConfig
from vlm.engine import optim
from vlm.errors import ConfigError
from vlm.models import registry
from vlm.models.perceiver import Attention, Projector, Resampler, ResamplerBlock

SIZES = {"vision_dim": 24, "language_dim": 32, "num_heads": 4, "mlp_ratio": 2}


def make(**changes: int) -> Resampler:
    torch.manual_seed(0)
    keys = SIZES | {"num_latents": 3, "num_layers": 2} | changes
    found = Resampler(**keys).double()
    for parameter in found.parameters():  # biases and norms that would not show
        nn.init.normal_(parameter, std=0.3)
    return found


def tokens(count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, count, 24, generator=generator, dtype=torch.float64)


def torch_attention(own: Attention, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    """By ``nn.MultiheadAttention``."""
    theirs = nn.MultiheadAttention(32, own.num_heads, batch_first=True).double()
    maps = (own.query, own.key, own.value)
    theirs.in_proj_weight = nn.Parameter(torch.cat([m.weight for m in maps]))
    theirs.in_proj_bias = nn.Parameter(torch.cat([m.bias for m in maps]))
    theirs.out_proj.weight, theirs.out_proj.bias = own.output.weight, own.output.bias
    hidden = None if mask is None else ~mask
    return theirs(x, context, context, key_padding_mask=hidden, need_weights=False)[0]


def reference(block: ResamplerBlock, z: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    z = z + torch_attention(
        block.cross_attention, block.latent_norm(z), block.context_norm(x), mask
    )
    normed = block.self_norm(z)
    z = z + torch_attention(block.self_attention, normed, normed, None)
    norm, up, gelu, down = block.mlp
    return z + down(nn.functional.gelu(up(norm(z))))


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_what_the_formula_says(masked: bool) -> None:
    model, x = make(), tokens()
    mask = torch.tensor([[True, True, False, True, False], [True] * 5]) if masked else None
    z = model.latents.expand(2, -1, -1)
    for block in model.blocks:
        z = reference(block, z, model.input_proj(x), mask)
    torch.testing.assert_close(model(x, mask), model.norm(z))


def test_masked_tokens_have_no_effect() -> None:
    model, x = make(), tokens(7)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 5:] = False
    expected = model(x[:, :5])
    torch.testing.assert_close(model(x, mask), expected)
    x[:, 5:] = 1e3
    torch.testing.assert_close(model(x, mask), expected)


def test_at_full_size_it_has_the_published_number_of_parameters() -> None:
    """64 latents, 6 blocks, width 4096 of LLaMA-3-8B over CLIP ViT-L/14."""
    with torch.device("meta"):
        model = Resampler(
            vision_dim=1024,
            language_dim=4096,
            num_latents=64,
            num_layers=6,
            num_heads=16,
            mlp_ratio=4,
        )
        assert sum(p.numel() for p in model.parameters()) == 1_615_597_568
        assert sum(p.numel() for p in model.blocks[0].parameters()) == 268_521_472
        assert model(torch.empty(2, 257, 1024)).shape == (2, 64, 4096)


def projector(pool: str, num_tokens: int = 2, num_layers: int = 1) -> Projector:
    torch.manual_seed(0)
    found = Projector(
        vision_dim=24, language_dim=32, num_tokens=num_tokens, num_layers=num_layers, pool=pool
    )
    return found.double()


def test_the_linear_baseline() -> None:
    x = tokens(5)
    plain = projector("none", 5)
    expected = plain.maps[1](nn.functional.layer_norm(x, (24,)))
    torch.testing.assert_close(plain(x), expected)
    # 5 tokens to 2: pairs of the last four, the CLS in front gives way
    averaged = projector("avg")(x)
    torch.testing.assert_close(averaged[:, 0], expected[:, 1:3].mean(1))
    torch.testing.assert_close(averaged[:, 1], expected[:, 3:5].mean(1))
    learned = projector("learned")
    keys = learned.key_norm(learned.maps(x))
    queries = learned.queries.expand(2, -1, -1)
    torch.testing.assert_close(learned(x), torch_attention(learned.attention, queries, keys, None))
    assert learned.attention.num_heads == 8
    deep = projector("none", 5, num_layers=2)
    assert [type(m).__name__ for m in deep.maps] == ["LayerNorm", "Linear", "GELU", "Linear"]


def recipe(**changes) -> ModelConfig:
    connector = PERCEIVER | changes.pop("connector", {})
    values = {
        "family": "perceiver",
        "vision": {"config": changes.pop("vision", CLIP)},
        "language": {"config": LANGUAGE},
        "connector": connector,
        "tokenizer": "unused",
    }
    return ModelConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    ("connector", "said"),
    [
        ({"num_heads": 5}, "num_heads: found 5 heads, expected a divisor"),
        ({"kind": "linear", "num_layers": 1}, "found 3.*gives 5 tokens.*expected all of those"),
        ({"kind": "linear", "pool": "avg", "tokens_per_frame": 6}, "found 6.*expected at most"),
        ({"kind": "linear", "num_layers": 3}, "the linear projector has 1 or 2"),
        ({"pool": "avg"}, "set `kind: linear`"),
    ],
)
def test_connectors_that_do_not_fit_are_refused(connector, said: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=said):
        registry.build(recipe(connector=connector), 50, 0)


def test_learned_pooling_needs_a_width_of_eight_heads() -> None:
    with pytest.raises(ConfigError, match="connector.pool: found 8 heads.* width 36"):
        Projector(vision_dim=24, language_dim=36, num_tokens=2, num_layers=1, pool="learned")


@pytest.mark.parametrize(
    ("vision", "connector"),
    [
        (CLIP, {}),
        (SIGLIP, {"reads": "patches"}),
        (CLIP, {"kind": "linear", "pool": "avg", "tokens_per_frame": 2}),
        (CLIP, {"reads": "cls"}),
    ],
)
def test_a_recipe_chooses_tower_and_connector(vision, connector) -> None:
    model = registry.build(recipe(vision=vision, connector=connector), 50, 0)
    assert model.vision.tower.config.model_type == vision["model_type"]
    assert isinstance(model.connector, Projector if "kind" in connector else Resampler)


def test_stage_1_trains_the_connector_alone() -> None:
    config = recipe(freeze=["vision", "language"])
    model = registry.build(config, 50, 0)
    optim.freeze(model, config)
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"connector"}
    assert all(p.requires_grad for p in model.connector.parameters())


def test_positions_are_as_far_apart_as_the_recipe_says() -> None:
    config = recipe()
    part = config.vision.model_copy(update={"position_std": 3.0})
    model = registry.build(config.model_copy(update={"vision": part}), 50, 0)
    std = float(model.vision.tower.embeddings.position_embedding.weight.detach().std())
    assert 2.4 < std < 3.6


def test_a_sample_may_have_several_images() -> None:
    """Each run of placeholders is filled by its own image, wherever it stands."""
    from tests.models.tiny import IMAGE
    from vlm.batch import build_batch

    model = make_projected("perceiver")
    pixels = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    ids = [[5, *[IMAGE] * 3, 6, *[IMAGE] * 3, 7, 8], [9, *[IMAGE] * 3, 4]]
    batch = build_batch(
        frames=pixels.to(torch.uint8),
        frame_counts=[2, 1],
        input_ids=ids,
        labels=[[-100 if i == IMAGE else i for i in row] for row in ids],
        image_token_id=IMAGE,
        tokens_per_frame=3,
        keys=["a", "b"],
        kind="image",
    )
    visual = model.connector(model.vision(batch.frames))
    found = model.embed(batch)
    for image, start in enumerate((1, 5, 11)):
        torch.testing.assert_close(found[start : start + 3], visual[image])
    text = [i for i, token in enumerate(sum(ids, [])) if token != IMAGE]
    torch.testing.assert_close(found[text], model.language.embed(batch.input_ids[text]))
