"""Packed = padded = one by one: loss and gradients, every family and mode, in float32.

The tolerance is 1e-5 of the loss and 2e-4 of the largest entry of each gradient, since sums of
float32 come in another order. Gradients that are nothing but such sums' errors, as those of key
biases, are held to 2e-6 of the largest of all.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.cases import CASES
from tests.models.reference import single
from tests.models.test_latent import make_model as make_latent
from tests.models.test_latent import with_latents
from tests.models.tiny import make_batch, make_model
from vlm.batch import Batch
from vlm.models.language import LanguageModel

SAMPLES = [(3, 7), (1, 12), (0, 6), (5, 4)]
#: beside those in which families train
MORE: dict[str, tuple[Callable[[], Any], int, str]] = {
    "no coarse loss": (lambda: make_model(coarse_weight=0.0), 1, "coarse_fine"),
    "autoregressive": (make_model, 1, "autoregressive"),
    "latent, autoregressive": (make_latent, 1, "autoregressive"),
}
ALL = CASES | MORE


def run(model: Any, batches: list[Batch], mode: str) -> tuple[float, dict[str, Tensor]]:
    """The loss over all batches and its gradients."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(batch, mode=mode).loss_sum
        if mode in model.train_modes:
            loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("before", [0, 2], ids=["frames first", "text first"])
@pytest.mark.parametrize("case", ALL)
def test_layouts_agree(case: str, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make, per_frame, mode = ALL[case]
    model = make().float()
    batch = with_latents(make_batch(SAMPLES, before=before, per_frame=per_frame))
    alone = [single(batch, index, per_frame) for index in range(batch.num_samples)]
    loss, gradients = run(model, alone, mode)
    assert bool(gradients) == (mode in model.train_modes)
    for is_flat in (False, True):
        monkeypatch.setattr(LanguageModel, "is_flat", property(lambda self, flat=is_flat: flat))
        found, own = run(model, [batch], mode)
        assert found == pytest.approx(loss, rel=1e-5)
        assert own.keys() == gradients.keys()
        largest = max((float(g.abs().max()) for g in gradients.values()), default=0.0)
        for name, gradient in gradients.items():
            scale = max(float(gradient.abs().max()), 1e-2 * largest)
            torch.testing.assert_close(own[name], gradient, rtol=0, atol=2e-4 * scale)
