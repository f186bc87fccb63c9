import pytest
import torch

from tests.engine import engines
from vlm.data.load.loader import LoadedStep
from vlm.data.plan.plan import Position
from vlm.models.foveated import FoveatedModel
from vlm.train.metrics import COLUMNS
from vlm.train.validate import validate


class Engine:
    """One rank without DeepSpeed."""

    device = torch.device("cpu")

    def __init__(self, model: FoveatedModel) -> None:
        self.model = model

    def __call__(self, *args: object, **kwargs: object) -> object:
        assert not self.model.training and not torch.is_grad_enabled()
        return self.model(*args, **kwargs)

    def eval(self) -> None:
        self.model.eval()

    def train(self) -> None:
        self.model.train()


def loaded(seed: int) -> LoadedStep:
    return LoadedStep(Position(), 0, engines.micro_batches(seed), (), ())


@pytest.mark.parametrize("coarse_weight", [0.0, 0.5])
def test_losses_are_per_token_over_all_steps(coarse_weight: float) -> None:
    model = engines.make_model(coarse_weight).double()
    found = validate(Engine(model), [loaded(0), loaded(1)])
    assert model.training
    batches = [engines.flat_batch(seed) for seed in (0, 1)]
    with torch.no_grad():
        parts = [model.eval()(batch, measure_all=True).parts for batch in batches]
    tokens = sum(batch.num_loss_tokens for batch in batches)
    fine, coarse = (sum(float(p[name]) for p in parts) / tokens for name in ("fine", "coarse"))
    assert found == pytest.approx(
        {
            "eval_loss": fine + coarse_weight * coarse,  # what training minimises
            "eval_loss_fine": fine,
            "eval_loss_coarse": coarse,
            "eval_loss_ratio": coarse / fine,
        }
    )
    assert found.keys() <= set(COLUMNS)


def test_a_run_in_one_mode_is_judged_in_it() -> None:
    """By the loss that it minimises, and not by queries that nothing trained."""
    model = engines.make_model(0.5).double()
    found = validate(Engine(model), [loaded(0)], mode="coarse_only")
    batch = engines.flat_batch(0)
    with torch.no_grad():
        coarse = float(model.eval()(batch, mode="coarse_only").loss_sum) / batch.num_loss_tokens
    assert found == pytest.approx({"eval_loss": coarse, "eval_loss_coarse": coarse})
