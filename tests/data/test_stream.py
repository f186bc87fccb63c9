import numpy as np
import pytest

from vlm.data.stream import ROWS, SHARDS, Stream, permutation, philox


def random_stream(seed: int, block_size: int = 50) -> tuple[Stream, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    num_rows = int(rng.integers(1, 800))
    shard = np.sort(rng.integers(0, rng.integers(1, 40), num_rows)).astype(np.uint32)
    chosen = rng.random(num_rows) < rng.uniform(0.1, 1)
    chosen[rng.integers(num_rows)] = True
    return Stream(shard, chosen, seed=seed, is_text=False, block_size=block_size), shard, chosen


@pytest.mark.parametrize("seed", range(30))
def test_an_epoch_holds_every_chosen_row_once(seed: int) -> None:
    stream, shard, chosen = random_stream(seed)
    for epoch in (0, 3):
        blocks = [stream.block(epoch, b) for b in range(stream.num_blocks)]
        assert sorted(np.concatenate(blocks)) == np.flatnonzero(chosen).tolist()
        before = 0
        for b, block in enumerate(blocks):
            assert stream.rows_before(epoch, b) == before
            assert len(block) >= min(50, chosen.sum())
            before += len(block)
        # shards lie whole in one block
        homes = [set(shard[block]) for block in blocks]
        assert sum(map(len, homes)) == len(set().union(*homes))


@pytest.mark.parametrize("seed", range(20))
def test_take_reads_the_endless_sequence(seed: int) -> None:
    stream, _, _ = random_stream(seed)
    blocks = [stream.block(e, b) for e in range(4) for b in range(stream.num_blocks)]
    endless = np.concatenate(blocks)
    rng = np.random.default_rng(seed)
    for _ in range(10):
        start, stop = sorted(rng.integers(0, len(endless) + 1, 2))
        assert stream.take(int(start), int(stop)).tolist() == endless[start:stop].tolist()


def test_blocks_are_not_much_larger_than_asked() -> None:
    shard = np.repeat(np.arange(300), 10)
    stream = Stream(shard, np.ones(3000, bool), seed=0, is_text=False, block_size=100)
    sizes = [len(stream.block(0, b)) for b in range(stream.num_blocks)]
    assert sum(sizes) == 3000
    assert max(sizes) <= 130


def test_epochs_seeds_and_streams_are_shuffled_apart() -> None:
    shard = np.repeat(np.arange(50), 10)
    chosen = np.ones(500, bool)
    orders = [
        Stream(shard, chosen, seed=seed, is_text=is_text, block_size=500).block(epoch, 0).tolist()
        for seed in (0, 1)
        for is_text in (False, True)
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 8
    assert all(sorted(order) == list(range(500)) for order in orders)


def test_rows_move_far() -> None:
    shard = np.repeat(np.arange(50), 10)
    stream = Stream(shard, np.ones(500, bool), seed=0, is_text=False, block_size=500)
    moved = np.abs(stream.block(0, 0) - np.arange(500)).mean()
    assert 130 < moved < 200  # 500 / 3 in a uniform permutation


def test_every_order_of_three_is_as_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for index in range(6000):
        order = tuple(permutation(philox(0, ROWS, 0, index), 3).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(850 < count < 1150 for count in counts.values())  # 1000 +- 5 sigma


def test_random_numbers_stay_what_they_are() -> None:
    """Philox' raw output is fixed for ever; these numbers came from numpy 2.4."""
    assert philox(7, SHARDS, 1, 2).random_raw(2).tolist() == [
        14273679059298474200,
        12575043138102661088,
    ]
