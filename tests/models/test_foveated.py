"""The three modes against plain forwards, loops and each other; in float64 but for the last."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.reference import plain_hidden, plain_queries, sample, single
from tests.models.tiny import make_batch, make_config, make_model
from vlm.batch import Batch
from vlm.models.foveated import MODES, FoveatedModel, Mode, first_frames

SAMPLES = [(3, 7), (1, 12), (6, 4)]


def plain_loss(model: FoveatedModel, batch: Batch, mode: Mode, passes: int = 0) -> Tensor:
    """Sum over the samples of the losses of the mode's last pass, or the given fine one."""
    total = torch.zeros((), dtype=torch.float64)
    for index in range(batch.num_samples):
        frames, ids, labels = sample(batch, index)
        queries = plain_queries(model, frames, ids, mode, passes)
        logits = model.language.logits(plain_hidden(model, frames, ids, queries))
        total += F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
    return total.detach()


def close(found: Tensor, expected: Tensor) -> None:
    # losses are summed in float32 whatever the model is in
    torch.testing.assert_close(found.detach().double(), expected.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("before", [0, 2], ids=["visual first", "text before"])
def test_coarse_and_fine_equal_plain_forwards_sample_by_sample(before: int) -> None:
    model, batch = make_model(), make_batch(SAMPLES, before=before)
    fine, coarse = (plain_loss(model, batch, mode) for mode in ("coarse_fine", "coarse_only"))
    out = model(batch)
    close(out.parts["fine"], fine)
    close(out.parts["coarse"], coarse)
    close(out.loss_sum, fine + 0.5 * coarse)
    only = model(batch, mode="coarse_only")
    assert set(only.parts) == {"coarse"}
    close(only.loss_sum, coarse)


@pytest.mark.parametrize("before", [0, 2])
def test_coarse_pass_without_its_text_gives_the_same_fine_loss(before: int) -> None:
    batch = make_batch(SAMPLES, before=before)
    whole = make_model()(batch).parts["fine"]
    prefix = make_model(coarse_weight=0.0)(batch)
    assert set(prefix.parts) == {"fine"}
    close(prefix.loss_sum, whole)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("samples", [SAMPLES, [(0, 9), (0, 4)]], ids=["video", "text only"])
def test_a_loss_without_a_weight_is_measured_and_costs_no_gradient(
    samples: list[tuple[int, int]], grad: bool
) -> None:
    model, batch = make_model(coarse_weight=0.0, fine_passes=2), make_batch(samples)
    with torch.set_grad_enabled(grad):
        plain, measured = model(batch), model(batch, measure_all=True)
    assert set(plain.parts) == {"fine"}
    assert set(measured.parts) == {"fine", "fine_first", "coarse"}
    close(measured.parts["coarse"], plain_loss(model, batch, "coarse_only"))
    close(measured.parts["fine_first"], plain_loss(model, batch, "coarse_fine", passes=1))
    if not grad:
        return
    assert not measured.parts["coarse"].requires_grad
    gradients = [torch.autograd.grad(out.loss_sum, trained(model)) for out in (plain, measured)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def trained(model: FoveatedModel) -> list[Tensor]:
    return [p for n, p in model.named_parameters() if "mask_token" not in n]


def test_measuring_draws_no_random_numbers_of_training() -> None:
    config = make_config(language={"attention_dropout": 0.3}, coarse_weight=0.0)
    model, batch = FoveatedModel(config).train(), make_batch(SAMPLES)
    found = []
    for measure_all in (False, True):
        torch.manual_seed(1)
        found.append((model(batch, measure_all=measure_all).loss_sum, torch.rand(3)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("fine_loss", "weights"),
    [("final", [0, 0, 1]), ("mean", [1 / 3, 1 / 3, 1 / 3]), ("progressive", [1 / 6, 2 / 6, 3 / 6])],
)
def test_several_fine_passes_each_ask_from_the_one_before(
    fine_loss: str, weights: list[float]
) -> None:
    model, batch = make_model(fine_passes=3, fine_loss=fine_loss), make_batch(SAMPLES)
    out = model(batch)
    passes = [plain_loss(model, batch, "coarse_fine", passes=i) for i in (1, 2, 3)]
    coarse = plain_loss(model, batch, "coarse_only")
    assert len({round(float(p), 3) for p in passes}) == 3
    close(out.parts["fine"], passes[2])
    assert ("fine_first" in out.parts) == (weights[0] > 0)
    close(out.loss_sum, sum(w * p for w, p in zip(weights, passes, strict=True)) + 0.5 * coarse)
    out.loss_sum.backward()
    assert all(p.grad is not None for p in trained(model))


@pytest.mark.parametrize("before", [0, 2])
def test_autoregressive_equals_a_loop_that_starts_over_for_every_frame(before: int) -> None:
    model, batch = make_model(), make_batch(SAMPLES, before=before)
    found = model(batch, mode="autoregressive")
    close(found.parts["fine"], plain_loss(model, batch, "autoregressive"))


def test_modes_agree_where_there_is_one_frame_and_differ_elsewhere() -> None:
    model = make_model()
    single, several = make_batch([(1, 6), (1, 9)]), make_batch(SAMPLES)
    for batch, same in ((single, True), (several, False)):
        fine = model(batch).parts["fine"]
        autoregressive = model(batch, mode="autoregressive").parts["fine"]
        assert torch.allclose(fine, autoregressive, rtol=1e-6) == same


@pytest.mark.parametrize("mode", MODES)
def test_a_sample_does_not_feel_its_neighbours(mode: Mode) -> None:
    model, batch = make_model(), make_batch(SAMPLES)
    alone = [model(single(batch, i), mode=mode).loss_sum.double() for i in range(len(SAMPLES))]
    close(model(batch, mode=mode).loss_sum, torch.stack(alone).sum())


@pytest.mark.parametrize("mode", FoveatedModel.train_modes)
@pytest.mark.parametrize("coarse_weight", [0.0, 0.5])
@pytest.mark.parametrize("samples", [[(0, 9), (0, 4)], [(1, 5)], SAMPLES])
def test_every_parameter_gets_a_gradient_whatever_the_batch_holds(
    samples: list[tuple[int, int]], coarse_weight: float, mode: Mode
) -> None:
    """Else ZeRO reduces gradients of different parameters together, silently."""
    model = make_model(coarse_weight=coarse_weight)
    model(make_batch(samples), mode=mode).loss_sum.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None and "mask_token" not in n]
    assert missing == []


@pytest.mark.parametrize("coarse_weight", [0.0, 0.5])
def test_a_blank_frame_changes_nothing_in_a_text_only_batch(coarse_weight: float) -> None:
    model, batch = make_model(coarse_weight=coarse_weight), make_batch([(0, 9), (0, 4)])
    found = model(batch)
    close(found.parts["fine"], plain_loss(model, batch, "coarse_fine"))
    found.loss_sum.backward()
    moved = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert moved and all(name.startswith("language.") for name in moved)


@pytest.mark.parametrize("coarse_weight", [0.0, 0.5])
def test_every_rank_looks_at_its_frames_equally_often(
    coarse_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blank frame takes the same calls, with as many queries as frames and no empty tensor."""
    model = make_model(coarse_weight=coarse_weight)
    looks: list[tuple[int, int]] = []
    look = model.vision.look
    monkeypatch.setattr(
        model.vision, "look", lambda q, kv: looks.append((len(q), len(kv[0].key))) or look(q, kv)
    )
    model(make_batch([(0, 9), (0, 4)]))
    assert looks == [(1, 1)] * 2
    looks.clear()
    model(make_batch(SAMPLES))
    assert looks == [(10, 10)] * 2


def test_the_last_frame_predicts_the_first_text_token() -> None:
    batch = make_batch([(3, 4)])
    assert batch.labels[3] != -100, "the first text token is learned in this batch"
    assert batch.target_index[0] == batch.frame_index[-1]


def test_first_frames_of_empty_and_full_samples() -> None:
    batch = make_batch([(2, 3), (0, 3), (3, 3)])
    assert first_frames(batch).tolist() == [True, False, True, False, False]
    assert first_frames(make_batch([(0, 3)])).tolist() == [True]


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_gives_nearly_the_same_loss(mode: Mode) -> None:
    batch = make_batch([*SAMPLES, (0, 5)])
    with torch.no_grad():
        expected = make_model()(batch, mode=mode).loss_sum
        found = make_model().bfloat16()(batch, mode=mode).loss_sum
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_bfloat16_trains() -> None:
    model = make_model().bfloat16()
    model(make_batch(SAMPLES)).loss_sum.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
