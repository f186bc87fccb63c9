import pytest

from tests.distributed import ranks
from vlm import dist
from vlm.ckpt.agree import together
from vlm.errors import CheckpointError


def failing_on(rank: int) -> str:
    def action() -> int:
        if dist.rank() == rank:
            raise CheckpointError(f"no room on {rank}")
        return dist.rank()

    try:
        return str(together(action))
    except CheckpointError as error:
        return str(error)


def test_where_one_rank_fails_all_do() -> None:
    assert ranks(2).run(failing_on, 1) == ["no room on 1"] * 2
    assert ranks(2).run(failing_on, 5) == ["[0, 1]"] * 2


def test_alone() -> None:
    assert together(lambda: "here") == ["here"]
    with pytest.raises(CheckpointError, match="no room on 0"):
        raise CheckpointError(failing_on(0))
