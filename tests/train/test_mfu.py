"""FLOPs of a global step against torch's own counter of the same passes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed import ranks
from tests.engine import engines
from vlm import gpus
from vlm.models.flops.counters import COUNTERS
from vlm.models.flops.shapes import shapes_of
from vlm.models.foveated import FoveatedModel
from vlm.train import mfu


def counted() -> tuple[float | None, float]:
    """Ours of a global step of two ranks, and torch's of both ranks' micro-batches."""
    recipe = engines.recipe()
    engine = engines.make_engine(3, recipe, engines.make_model())
    run: Any = SimpleNamespace(engine=engine, recipe=recipe)
    batches = engines.micro_batches(0)
    found = mfu.step_flops(run, 0, engines.mine(batches))
    model = engines.make_model()
    with FlopCounterMode(display=False) as counter:
        for batch in batches:
            model(batch).loss_sum.backward()
    return found, counter.get_total_flops()


def test_a_step_of_all_ranks() -> None:
    """Under ZeRO-3, where modules are empty. Torch's are those executed, with padding and blank
    frames: never fewer, and not many more."""
    (found, executed), (other, _) = ranks(2).run(counted)
    assert found == other
    assert 0.5 * executed < found <= executed
    counter = COUNTERS[FoveatedModel](engines.make_model())
    shapes = [shapes_of(batch) for batch in engines.micro_batches(0)]
    assert found == sum(counter.micro_batch(one, "coarse_fine").model for one in shapes)


def test_layers_that_nobody_can_count_end_no_run(caplog: pytest.LogCaptureFixture) -> None:
    model = engines.make_model()
    model.language.lm.model.layers[1].mlp = torch.nn.Identity()
    run: Any = SimpleNamespace(engine=SimpleNamespace(module=model), recipe=engines.recipe())
    assert [mfu.step_flops(run, step, []) for step in (0, 1)] == [None, None]
    assert caplog.text.count("no MFU: LlamaDecoderLayer: found linear maps in self_attn") == 1


def test_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mfu.utilisation(6e14, gpus.GPUS["a100-80gb"].peak_flops, 4) == {
        "tflops_per_s": 600.0,
        "mfu_frac": pytest.approx(600 / 1248),
    }
    assert mfu.utilisation(6e14, None, 4)["mfu_frac"] is None
    assert mfu.utilisation(None, 1e12, 4) == {"tflops_per_s": None, "mfu_frac": None}


def test_the_peak_is_that_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert mfu.peak_flops() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    memory = SimpleNamespace(total_memory=int(79.2 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: memory)
    assert mfu.peak_flops() == 312e12
