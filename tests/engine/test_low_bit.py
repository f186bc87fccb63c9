import pytest
import torch
from torch import nn

from vlm.engine import optim
from vlm.engine.low_bit import check_packed, is_packed, num_weights
from vlm.errors import ConfigError

bitsandbytes = pytest.importorskip("bitsandbytes")

NUM_WEIGHTS = 64 * 32


def packed_model(storage: torch.dtype) -> nn.Module:
    """A language part whose one matrix bitsandbytes has packed."""
    torch.manual_seed(0)
    model = nn.Module()
    model.language = nn.Linear(64, 32, bias=False)
    plain = model.language.weight.detach()
    weight = bitsandbytes.nn.Params4bit(
        plain, requires_grad=False, quant_type="nf4", quant_storage=storage
    ).to("cpu")
    model.language.weight = weight
    return model


def settings(stage: int, **zero: dict) -> dict:
    return {"zero_optimization": {"stage": stage, **zero}}


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_weights_are_counted_however_they_are_stored(storage: torch.dtype) -> None:
    weight = packed_model(storage).language.weight
    assert is_packed(weight)
    assert weight.numel() < NUM_WEIGHTS
    assert num_weights(weight) == NUM_WEIGHTS
    assert not is_packed(nn.Parameter(torch.zeros(3)))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_stages_that_leave_them_alone(stage: int) -> None:
    check_packed(packed_model(torch.uint8), settings(stage))
    check_packed(packed_model(torch.uint8), settings(stage, offload_optimizer={"device": "none"}))
    check_packed(nn.Linear(2, 2), settings(3))


@pytest.mark.parametrize(
    ("storage", "config", "expected"),
    [
        (torch.uint8, {"stage": 3}, "which ZeRO-3 cannot share out"),
        (torch.bfloat16, {"stage": 3}, "which ZeRO-3 cannot share out"),
        (torch.uint8, {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer"),
        (torch.float32, {"stage": 2}, "stored as float32, which DeepSpeed would cast"),
        (torch.bfloat16, {"stage": 1}, "stored as bfloat16, which DeepSpeed would cast"),
    ],
)
def test_what_cannot_work_is_refused_with_what_does(
    storage: torch.dtype, config: dict, expected: str
) -> None:
    with pytest.raises(ConfigError, match=f"language.weight has 4-bit weights.*{expected}") as info:
        check_packed(packed_model(storage), settings(**config))
    assert "use ZeRO stage 1 or 2 without offload" in str(info.value) or "uint8" in str(info.value)


def test_a_cast_would_corrupt_them() -> None:
    """Why it is refused: the bits change as soon as they are taken for numbers."""
    weight = packed_model(torch.float32).language.weight
    before = weight.data.view(torch.uint8).clone()
    there_and_back = weight.data.to(torch.bfloat16).to(torch.float32)
    assert not torch.equal(before, there_and_back.view(torch.uint8))


def test_packed_weights_do_not_train_by_themselves() -> None:
    from tests.engine import engines

    model = packed_model(torch.uint8)
    with pytest.raises(ConfigError, match=r"model\.language has 4-bit weights, which cannot train"):
        optim.freeze(model, engines.recipe().model)
