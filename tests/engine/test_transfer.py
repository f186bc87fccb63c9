import pytest
import torch

from tests.models import tiny
from vlm.engine.transfer import on_device, to_host

CPU = torch.device("cpu")


def test_on_a_cpu_batches_are_where_they_should_be() -> None:
    batches = [tiny.make_batch([(1, 4)], seed=i) for i in range(3)]
    assert all(a is b for a, b in zip(on_device(batches, CPU), batches, strict=True))
    numbers = torch.arange(3.0)
    assert to_host(numbers) == (numbers, None)


@pytest.mark.gpu
def test_on_a_gpu_they_arrive_whole_and_in_order() -> None:
    device = torch.device("cuda", 0)
    batches = [tiny.make_batch([(8, 4)], seed=i) for i in range(20)]
    found = [batch.frames.sum() for batch in on_device(batches, device)]
    assert [int(f) for f in found] == [int(b.frames.sum()) for b in batches]
    host, arrived = to_host(torch.stack(found))
    arrived.synchronize()
    assert host.tolist() == [int(f) for f in found]
