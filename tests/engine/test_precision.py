"""Numbers of the step: in which precision, and that the host waits for none of them."""

import traceback
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import ranks
from tests.engine import engines
from tests.engine.test_step import STEPS, reference
from vlm.config import Recipe
from vlm.engine.step import StepResult, read, train_step

KINDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train_in(precision: str, stage: int, recipe: Recipe) -> list[StepResult]:
    """Losses with gradients that add up in float32."""
    from deepspeed.accelerator import get_accelerator

    changes: dict = {"bf16": {"enabled": precision == "bf16"}}
    if precision == "fp16":
        changes["fp16"] = {"enabled": True, "initial_scale_power": 8}
    # this CPU's half precision is slow, which is why DeepSpeed refuses it, but as exact as any
    with mock.patch.object(get_accelerator(), "is_fp16_supported", return_value=True):
        engine = engines.make_engine(stage, recipe, engines.make_model(), **changes)
    assert {p.dtype for p in engine.module.parameters()} == {KINDS[precision]}
    zero = engine.optimizer
    sharded = stage == 3
    masters = zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups
    assert zero.gradient_accumulation_dtype == torch.float32
    assert {master.dtype for master in masters} == {torch.float32}
    return [
        read(train_step(engine, engines.mine(engines.micro_batches(step)))) for step in range(STEPS)
    ]


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    ("precision", "loss", "norm"), [("fp32", 1e-5, 1e-4), ("fp16", 1e-3, 0.3), ("bf16", 5e-3, 0.3)]
)
def test_precisions_differ_by_their_rounding_alone(
    precision: str, loss: float, norm: float, stage: int
) -> None:
    # so slow that weights do not drift apart, which would tell more of the weights than of rounding
    recipe = engines.recipe("optim.lr={vision: 1e-6, connector: 1e-6, language: 1e-6}")
    expected = reference(recipe).results
    for found in ranks(2).run(train_in, precision, stage, recipe):
        for one, other in zip(found, expected, strict=True):
            assert one.applied
            assert one.losses["loss"] == pytest.approx(other.losses["loss"], rel=loss)
            # cancelling sums make the norm of this small model far less exact than its loss
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=norm)


#: what makes the host wait for a device; `nonzero` must know how much it finds
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")


class Waits(TorchDispatchMode):
    """Notes each operation for which a host would wait, with the file that asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in WAITS):
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        files = [frame.filename for frame in traceback.extract_stack()]
        self.found += [name for name in files if "/vlm/" in name or "/deepspeed/" in name][-1:]


def waits(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Who waits in a step, and who waits when it is read."""
    engine = engines.make_engine(2, recipe, engines.make_model())
    batches = engines.micro_batches(0)
    read(train_step(engine, batches))
    noted, plain = Waits(), torch.Tensor.tolist
    with noted, mock.patch.object(torch.Tensor, "tolist", lambda t: noted.note() or plain(t)):
        pending = train_step(engine, batches)
        during, noted.found = noted.found, []
        read(pending)
    return during, noted.found


def test_a_step_waits_for_nothing_but_what_deepspeed_waits_for() -> None:
    ((during, reading),) = ranks(1).run(waits, engines.recipe())
    assert [name for name in during if "/vlm/" in name] == []
    # once a step, behind its last backward pass: DeepSpeed asks of each of 6 groups whether its
    # norm is finite, and Adam on a CPU for each one's count of steps
    assert len(during) <= 1 + 2 * 6
    assert [name.rpartition("/")[2] for name in reading] == ["step.py"]
