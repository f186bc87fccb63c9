import numpy as np
import pytest

from vlm.data.plan.stream import ROWS, SHARDS, Stream, num_parts, permutation, philox

FIRST_ROW = 1000


def make_stream(
    shard: np.ndarray, chosen: np.ndarray | None = None, block_rows: int = 50, **changes: int
) -> Stream:
    values = {"first_row": 0, "source": 0, "seed": 0, "is_text": False, **changes}
    chosen = np.ones(len(shard), bool) if chosen is None else chosen
    return Stream(shard, chosen, block_rows=block_rows, **values)  # type: ignore[arg-type]


def random_stream(seed: int) -> tuple[Stream, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    num_rows = int(rng.integers(1, 800))
    shard = np.sort(rng.integers(0, rng.integers(1, 40), num_rows)).astype(np.uint32)
    chosen = rng.random(num_rows) < rng.uniform(0.1, 1)
    chosen[rng.integers(num_rows)] = True
    return make_stream(shard, chosen, seed=seed, first_row=FIRST_ROW), shard, chosen


@pytest.mark.parametrize("seed", range(30))
def test_each_pass_holds_every_chosen_row_once(seed: int) -> None:
    stream, _, chosen = random_stream(seed)
    expected = (np.flatnonzero(chosen) + FIRST_ROW).tolist()
    assert stream.num_rows == len(expected)
    for epoch in (0, 3):
        rows, passes = stream.take(epoch * stream.num_rows, (epoch + 1) * stream.num_rows)
        assert sorted(rows) == expected
        assert set(passes) == {epoch}


@pytest.mark.parametrize("seed", range(20))
def test_any_part_follows_from_its_position(seed: int) -> None:
    stream, _, _ = random_stream(seed)
    endless, passes = stream.take(0, 4 * stream.num_rows)
    rng = np.random.default_rng(seed)
    for _ in range(10):
        start, stop = sorted(rng.integers(0, len(endless) + 1, 2).tolist())
        rows, own = random_stream(seed)[0].take(start, stop)
        assert rows.tolist() == endless[start:stop].tolist()
        assert own.tolist() == passes[start:stop].tolist()


@pytest.mark.parametrize("block_rows", [30, 100, 1000])
def test_a_block_stays_near_few_shards(block_rows: int) -> None:
    shard = np.repeat(np.arange(100), 10)
    stream = make_stream(shard, block_rows=block_rows)
    homes = [
        set(shard[stream.take(start, start + block_rows)[0]]) for start in range(0, 900, block_rows)
    ]
    assert all(len(home) <= block_rows // 10 + 1 for home in homes)


def test_parts_are_even_and_the_last_takes_the_rest() -> None:
    for total in range(1, 400):
        for size in (1, 7, 100):
            count = num_parts(total, size)
            last = total - (count - 1) * size
            assert count >= 1
            assert last <= 1.5 * size
            assert count == 1 or last >= 0.5 * size


def test_passes_seeds_sources_and_halves_are_shuffled_apart() -> None:
    shard = np.repeat(np.arange(50), 10)
    orders = [
        make_stream(shard, seed=seed, is_text=is_text, source=source, block_rows=500)
        .take(epoch * 500, (epoch + 1) * 500)[0]
        .tolist()
        for seed in (0, 1)
        for is_text in (False, True)
        for source in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 16
    assert all(sorted(order) == list(range(500)) for order in orders)


def test_rows_move_far() -> None:
    stream = make_stream(np.repeat(np.arange(50), 10), block_rows=500)
    moved = np.abs(stream.take(0, 500)[0] - np.arange(500)).mean()
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
