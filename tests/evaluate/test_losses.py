import pytest
import torch
import torch.nn.functional as F

from tests.models.reference import plain_hidden, plain_queries, sample
from tests.models.tiny import make_batch, make_model
from vlm.evaluate.losses import mode_losses
from vlm.models.foveated import MODES

#: of very different numbers of learned tokens
BATCHES = [[(3, 7), (1, 12), (6, 4)], [(2, 2)], [(0, 9), (4, 3)]]


def test_it_is_the_mean_over_all_tokens_by_whole_forwards() -> None:
    """Not a mean of means: each learned token counts alike."""
    model = make_model()
    batches = [make_batch(samples, seed=i) for i, samples in enumerate(BATCHES)]
    found = mode_losses(model, iter(batches))
    assert set(found) == set(MODES)
    for mode in MODES:
        losses = []
        for batch in batches:
            for index in range(batch.num_samples):
                frames, ids, labels = sample(batch, index)
                queries = plain_queries(model, frames, ids, mode)
                logits = model.language.logits(plain_hidden(model, frames, ids, queries))
                for place in range(len(ids) - 1):
                    if labels[place + 1] != -100:
                        loss = F.cross_entropy(logits[place], labels[place + 1])
                        losses.append(loss.item())
        assert found[mode] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_the_modes_differ_where_there_are_several_frames() -> None:
    model = make_model()
    assert len(set(mode_losses(model, [make_batch(BATCHES[0])]).values())) == 3


def test_it_needs_no_gradient_and_no_coarse_weight() -> None:
    model = make_model(coarse_weight=0.0)
    found = mode_losses(model, [make_batch(BATCHES[1])])
    assert all(value > 0 for value in found.values())
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()
