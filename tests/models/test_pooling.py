"""Grids of tokens, patch by patch."""

import pytest
import torch

from vlm.errors import ConfigError
from vlm.models.pooling import Pooling

F, D, H, SCALE = 3, 5, 7, 0.14


def make(**changes: object) -> Pooling:
    torch.manual_seed(0)
    values = {"tokens_per_frame": 4, "reduction": "pool", "shuffle": 4, "visual_scale": SCALE}
    return Pooling(vision_dim=D, language_dim=H, **(values | changes)).double()


def patches(height: int, width: int) -> torch.Tensor:
    return torch.randn(F, D, height, width, dtype=torch.float64)


@pytest.mark.parametrize(("tokens", "side"), [(16, 16), (49, 16), (16, 18), (4, 2)])
def test_a_pooled_token_is_the_mean_of_its_patches(tokens: int, side: int) -> None:
    """Of 16 patches to 7 tokens, token i covers floor(16 i / 7) to ceil(16 (i + 1) / 7)."""
    connector, given = make(tokens_per_frame=tokens), patches(side, side)
    found = connector(given).view(F, connector.side, connector.side, H)
    weight, bias = connector.to_language.weight, connector.to_language.bias
    edges = [
        (side * i // connector.side, -(-side * (i + 1) // connector.side))
        for i in range(connector.side)
    ]
    for row, (top, bottom) in enumerate(edges):
        for column, (left, right) in enumerate(edges):
            mean = given[:, :, top:bottom, left:right].mean(dim=(2, 3))
            expected = SCALE * (mean @ weight.T + bias)
            torch.testing.assert_close(found[:, row, column], expected, rtol=0, atol=1e-12)


def test_pixel_shuffle_lays_neighbours_side_by_side() -> None:
    connector = make(reduction="pixel_shuffle", shuffle=3)
    given = patches(6, 6)
    found = connector(given).view(F, 2, 2, H)
    for row in range(2):
        for column in range(2):
            block = given[:, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            expected = SCALE * connector.to_language(block.flatten(1))
            torch.testing.assert_close(found[:, row, column], expected, rtol=0, atol=1e-12)


def test_pixel_shuffle_has_the_published_widths() -> None:
    connector = Pooling(
        vision_dim=384,
        language_dim=576,
        tokens_per_frame=16,
        reduction="pixel_shuffle",
        shuffle=4,
        visual_scale=SCALE,
    )
    shapes = [tuple(p.shape) for p in connector.parameters() if p.ndim == 2]
    assert shapes == [(2304, 6144), (576, 2304)]


def test_frames_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match="3 x 8 patches cannot be pooled to 4 x 4"):
        make(tokens_per_frame=16)(patches(3, 8))
    with pytest.raises(ConfigError, match="8 x 8 patches, 3 x 3 of them .* do not make 2 x 2"):
        make(reduction="pixel_shuffle", shuffle=3)(patches(8, 8))
