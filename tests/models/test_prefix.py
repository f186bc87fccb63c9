"""The projection of each token, and the published number of trained parameters."""

import pytest
import torch
from torch import nn

from tests.models.tiny import LANGUAGE, PREFIX, SIGLIP, make_batch, make_projected
from vlm.config_model import ModelConfig
from vlm.errors import ConfigError
from vlm.models import registry


def recipe(**connector) -> ModelConfig:
    values = {
        "family": "prefix",
        "vision": {"config": SIGLIP},
        "language": {"config": LANGUAGE},
        "connector": PREFIX | connector,
        "tokenizer": "unused",
    }
    return ModelConfig.model_validate(values)


def test_each_token_is_projected_by_itself() -> None:
    model, batch = make_projected("prefix"), make_batch([(1, 5), (2, 3)], per_frame=4)
    tokens = model.vision(batch.frames).flatten(0, 1)
    expected = tokens @ model.connector.weight.T + model.connector.bias
    torch.testing.assert_close(model.embed(batch)[batch.frame_index], expected)


def test_the_mlp_is_the_published_one() -> None:
    model = registry.build(recipe(kind="mlp", dropout=0.1), 50, 0)
    up, gelu, dropout, down = model.connector
    assert (up.in_features, up.out_features) == (24, 40) and isinstance(gelu, nn.GELU)
    assert dropout.p == 0.1 and (down.in_features, down.out_features) == (40, 32)


def test_placeholders_must_be_as_many_as_the_tower_has_tokens() -> None:
    with pytest.raises(ConfigError, match="tokens_per_frame: found 5.*gives 4 tokens"):
        registry.build(recipe(tokens_per_frame=5), 50, 0)
