"""Losses by group against a loop over samples, each run alone."""

import torch

from tests.engine import engines
from tests.models import tiny
from vlm.batch import Batch
from vlm.engine.tally import by_group
from vlm.models.foveated import FoveatedModel

SHAPES = [(2, 5), (0, 7), (1, 3), (0, 4), (3, 6)]
GROUPS = [0, 2, 0, 1, 2]


def sample(index: int) -> Batch:
    return tiny.make_batch([SHAPES[index]], seed=index)


def alone(model: FoveatedModel, mode: str) -> torch.Tensor:
    sums = torch.zeros(2, 4, dtype=torch.float64)
    for index, group in enumerate(GROUPS):
        output = model(sample(index), mode=mode)
        sums[0, group] += float(output.parts["coarse" if mode == "coarse_only" else "fine"])
        sums[1, group] += sample(index).num_loss_tokens
    return sums


def test_groups_are_the_sums_of_their_samples() -> None:
    model = engines.make_model().double().eval()
    joined = engines.join([sample(index) for index in range(len(SHAPES))])
    batch = joined._map(lambda tensor: tensor)
    object.__setattr__(batch, "groups", torch.tensor(GROUPS))
    for mode in model.modes:
        with torch.no_grad():
            expected = alone(model, mode)
            found = by_group(model(batch, mode=mode), batch, 4)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nothing_is_measured_where_nobody_asks() -> None:
    batch = sample(0)
    output = engines.make_model()(batch)
    assert by_group(output, batch, 0).shape == (2, 0)
    assert by_group(output._replace(token_losses=None), batch, 3).sum() == 0
