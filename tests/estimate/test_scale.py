import dataclasses

import pytest

from vlm.errors import ConfigError
from vlm.estimate.scale import RESTART_S, SENT, Machines, Work, scale, sent_bytes

WORK = Work(
    num_trainable=800,
    num_parameters=1600,
    compute_s=2.0,
    micro_batches=3,
    bucket=10**9,
    all_micro_batches=4800,
)
MACHINES = Machines(
    gpus_per_node=8,
    node_gbit=1600.0,
    gpu_gbit=2400.0,
    link_frac=0.5,
    volume_mb_s=300.0,
    gpu_mtbf_hours=50_000.0,
    price=2.0,
)


def gather(elements: int, ranks: int) -> float:
    """Bytes that a rank passes on when all have a part and all want everything, over a ring."""
    return sum(SENT * elements / ranks for _ in range(ranks - 1))


@pytest.mark.parametrize("ranks", [1, 2, 8, 16])
def test_what_is_sent_by_stage(ranks: int) -> None:
    trained, every = WORK.num_trainable, WORK.num_parameters
    reduce = gather(trained, ranks)  # a reduce-scatter is a gather backwards
    by_hand = {
        0: reduce + gather(trained, ranks),
        1: reduce + gather(trained, ranks),
        2: 3 * reduce + gather(trained, ranks),
        3: sum(gather(every, ranks) + gather(every, ranks) + reduce for _ in range(3)),
    }
    for stage, expected in by_hand.items():
        assert sent_bytes(stage, WORK, ranks) == pytest.approx(expected)
    with pytest.raises(ConfigError, match="ZeRO stage: found 4"):
        sent_bytes(4, WORK, ranks)


def test_time_and_price_by_hand() -> None:
    work = dataclasses.replace(WORK, num_trainable=10**9, num_parameters=10**9)
    found = scale(1, work, MACHINES, 2)
    # 2 x 2 GB x 15/16 over half of 200 GB/s, in two messages over one link
    assert found.sent_bytes == pytest.approx(3.75e9)
    assert found.sending_s == pytest.approx(0.0375 + 2 * 20e-6)
    assert found.step_s == pytest.approx(2.0375, abs=1e-4)
    assert found.checkpoint_bytes == 14e9 and found.checkpoint_s == pytest.approx(46.67, abs=0.01)
    assert found.num_steps == 100 and found.mtbf_hours == 3125
    paid = 100 * found.step_s / 3600 / (1 - found.lost_frac) * 16 * 2.0
    assert found.price == pytest.approx(paid)


def test_one_gpu_sends_nothing() -> None:
    alone = dataclasses.replace(MACHINES, gpus_per_node=1)
    assert scale(3, WORK, alone, 1).sending_s == 0
    assert scale(3, WORK, alone, 1).busy_frac == 1


def test_no_other_interval_loses_less() -> None:
    work = dataclasses.replace(WORK, num_trainable=10**9, num_parameters=10**9)
    for nodes in (1, 8, 64):
        found = scale(2, work, MACHINES, nodes)
        save_s, mtbf_s = found.checkpoint_s, 3600 * found.mtbf_hours

        def lost(interval_s: float, save_s: float = save_s, mtbf_s: float = mtbf_s) -> float:
            return save_s / (interval_s + save_s) + (interval_s / 2 + RESTART_S) / mtbf_s

        assert found.lost_frac == pytest.approx(lost(found.interval_s))
        best = min(lost(found.interval_s * factor / 100) for factor in range(20, 500))
        assert found.lost_frac <= best * 1.01
