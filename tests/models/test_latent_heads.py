"""Heads: sizes as published, and FiLM by hand."""

import pytest
import torch
import torch.nn.functional as F

from vlm.models.latent_heads import HEADS


@pytest.mark.parametrize(
    ("name", "count", "rel"),
    [("film", 1_300_612, 0), ("mlp", 22.17e6, 3e-4), ("cross_attention", 1.33e6, 0.1)],
)
def test_sizes(name: str, count: float, rel: float) -> None:
    with torch.device("meta"):
        head = HEADS[name](576, 4, 32)
    assert sum(p.numel() for p in head.parameters()) == pytest.approx(count, rel=rel)


@pytest.mark.parametrize("name", HEADS)
def test_each_frame_for_itself_from_both_inputs(name: str) -> None:
    torch.manual_seed(0)
    head = HEADS[name](12, 3, 4).double()
    hidden, previous = torch.randn(5, 12).double(), torch.randn(5, 3, 4, 4).double()
    found = head(hidden, previous)
    assert found.shape == previous.shape
    alone = torch.cat([head(hidden[i : i + 1], previous[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-12)
    assert (found - head(hidden.flip(0), previous)).abs().max() > 1e-6
    assert (found - head(hidden, previous.flip(0))).abs().max() > 1e-6


def test_film_by_hand() -> None:
    torch.manual_seed(0)
    head = HEADS["film"](12, 3, 4).double()
    hidden, previous = torch.randn(2, 12).double(), torch.randn(2, 3, 4, 4).double()
    weights = head.state_dict()

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    first = hidden @ weights["modulation.0.weight"].T + weights["modulation.0.bias"]
    both = F.gelu(first) @ weights["modulation.2.weight"].T + weights["modulation.2.bias"]
    gamma, beta = both[:, :256, None, None], both[:, 256:, None, None]
    seen = previous
    for layer in (0, 2, 4):
        seen = conv(F.gelu(seen) if layer else seen, f"encode.{layer}")
    out = gamma * seen + beta
    for layer in (0, 2, 4):
        out = conv(F.gelu(out) if layer else out, f"decode.{layer}")
    torch.testing.assert_close(head(hidden, previous), out, rtol=0, atol=1e-12)
