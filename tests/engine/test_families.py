"""Every family and mode on two ranks in every ZeRO stage, recomputing activations in all parts.

In each step one rank has text only and the other one video, so a rank that called other modules
than its neighbour would hang (``agree`` would say so) or reduce other gradients. What comes out is
held to one process of plain torch without checkpointing. Some cases
are quick, all of them are slow tests: thousands of small collectives.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed import ranks
from tests.engine import engines
from tests.models import tiny
from tests.models.cases import CASES
from tests.models.test_latent import with_latents
from vlm.batch import Batch
from vlm.engine import ladder, optim
from vlm.engine.step import eval_step, read, train_step

STEPS = 2
#: the foveated family has tests of its own in tests/engine/test_step.py
QUICK = ["joint", "pooled", "blind", "cross attention", "perceiver", "prefix"]


def micro_batches(step: int, per_frame: int) -> list[Batch]:
    """Text and video; which rank has which changes from step to step."""
    shapes = ([(0, 5), (0, 9)], [(3, 6), (1, 4)])
    made = [
        with_latents(tiny.make_batch(samples, seed=10 * step + i, per_frame=per_frame))
        for i, samples in enumerate(shapes)
    ]
    return made[:: 1 if step % 2 else -1]


def train(stage: int, names: list[str]) -> dict[str, list[float]]:
    """On each rank: losses of the steps of every case, gradient norms, and a loss at the end."""
    found, recipe = {}, engines.recipe()
    for name in names:
        make, per_frame, mode = CASES[name]
        model = make().float().train()
        ladder.go_down(_Engine(model), len(ladder.RUNGS))
        engine = engines.make_engine(stage, recipe, model, micro_batches=2)
        numbers = []
        for step in range(STEPS):
            mine = engines.mine(micro_batches(step, per_frame))
            result = read(
                train_step(engine, mine, mode=mode, measure_all=step == 1, agree=step == 0)
            )
            numbers += [result.losses["loss"], result.grad_norm]
        sums, count = eval_step(engine, [micro_batches(0, per_frame)[1]], mode=mode)
        found[name] = [*numbers, sums["loss"] / count]
        engine.destroy()
    return found


class _Engine:
    """What the ladder wants of one."""

    def __init__(self, module: Any) -> None:
        self.module = module


def plain(make: Callable[[], Any], per_frame: int, mode: str) -> list[float]:
    """The same by one process of torch."""
    model, recipe = make().float().train(), engines.recipe()
    adam, rates = optim.optimizer(model, recipe, fused=False)
    numbers = []
    for step in range(STEPS):
        batches = micro_batches(step, per_frame)
        count = sum(batch.num_losses for batch in batches)
        loss = sum(model(batch, mode=mode).loss_sum for batch in batches) / count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        rates.step()
        adam.zero_grad()
        numbers += [float(loss.detach()), float(norm)]
    batch = micro_batches(0, per_frame)[1]
    with torch.no_grad():
        last = model.eval()(batch, mode=mode).loss_sum / batch.num_losses
    return [*numbers, float(last)]


SLOW = [pytest.param(stage, list(CASES), marks=pytest.mark.slow) for stage in (1, 2, 3)]


@pytest.mark.parametrize(("stage", "names"), [(2, QUICK), *SLOW])
def test_every_family_and_mode_on_two_ranks_with_text_beside_video(
    stage: int, names: list[str]
) -> None:
    one, other = ranks(2).run(train, stage, names, timeout_s=600)
    assert one == other
    for name in names:
        assert one[name] == pytest.approx(plain(*CASES[name]), rel=1e-3, abs=1e-5), name
