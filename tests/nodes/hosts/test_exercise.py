import os

import torch

from tests.distributed import ranks
from vlm.nodes.hosts import exercise


def measured(host_of: list[int]) -> dict[str, object]:
    os.environ["GROUP_RANK"] = str(host_of[torch.distributed.get_rank()])
    return exercise.measure(torch.device("cpu"))


def test_every_link_and_every_rank_has_a_figure() -> None:
    for found in ranks(2).run(measured, [0, 1]):
        assert len(found["gbit"]) == 2 and all(speed > 0 for speed in found["gbit"])
        assert [len(speeds) for speeds in found["tflops"]] == [1, 1]
        assert found["all_reduce_gbit"] > 0


def test_one_host_has_no_link() -> None:
    for found in ranks(2).run(measured, [0, 0]):
        assert found["gbit"] == [None]
        assert [len(speeds) for speeds in found["tflops"]] == [2]
