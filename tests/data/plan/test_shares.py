import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.data.random_rows import make_policy, make_rows
from vlm.data.plan import shares
from vlm.data.plan.policy import Policy, Rows, SourcePolicy
from vlm.errors import ConfigError, DataError

ROWS = dataclasses.replace(
    make_rows(900), first_rows=np.array([0, 300, 700, 900]), shard=np.arange(900) // 30
)


def make(*changes: dict[str, Any], **policy: Any) -> Policy:
    sources = (SourcePolicy(name=f"s{i}", **one) for i, one in enumerate(changes or [{}] * 3))
    return make_policy(sources=tuple(sources), **policy)


def amounts(policy: Policy, total: Fraction | None = None, half: int = 0) -> list[Fraction]:
    own = shares.halves(ROWS, policy)[half]
    return shares.amounts(own, [one.weight for one in policy.sources], policy, total)


def sizes(half: int = 0) -> list[int]:
    return [one.num_rows for one in shares.halves(ROWS, make())[half]]


def test_halves_count_what_they_hold() -> None:
    policy = make({}, {"min_frames": 4}, {"min_frames": 3, "max_frames": 9}, tokens_per_frame=5)
    main, text = shares.halves(ROWS, policy)
    for k, (start, stop) in enumerate(((0, 300), (300, 700), (700, 900))):
        source = policy.sources[k]
        for half, wants_text in ((main[k], False), (text[k], True)):
            rows = []
            for row in range(start, stop):
                frames = int(ROWS.num_frames[row])
                most = 10**9 if source.max_frames is None else source.max_frames
                fits = frames == 0 if wants_text else frames and source.min_frames <= frames <= most
                if fits:
                    rows.append(row)
            assert (half.source, half.first_row) == (k, start)
            assert (np.flatnonzero(half.chosen) + start).tolist() == rows
            assert half.num_rows == len(rows)
            assert half.num_frames == sum(int(ROWS.num_frames[row]) for row in rows)
            tokens = sum(int(ROWS.num_tokens[row]) for row in rows)
            assert half.num_tokens == tokens + 5 * half.num_frames


def test_filters_look_at_images_before_they_are_repeated() -> None:
    frames = np.where(ROWS.kind == 1, 8, ROWS.num_frames)
    rows = dataclasses.replace(ROWS, num_frames=frames)
    own = {"image_frames": 8, "max_frames": 1}
    main, _ = shares.halves(rows, make(own, own, own))
    chosen = np.concatenate([half.chosen for half in main])
    one_frame = (ROWS.kind == 2) & (ROWS.num_frames == 1)
    assert chosen.tolist() == ((ROWS.kind == 1) | one_frame).tolist()


def test_without_weights_each_has_its_size_times_repeat_up_to_its_cap() -> None:
    assert amounts(make()) == sizes()
    first, second, third = sizes()
    policy = make({"repeat": 2.5}, {"cap": 7}, {"repeat": 3, "cap": 10**6})
    assert amounts(policy) == [Fraction(5, 2) * first, 7, 3 * third]
    assert second > 7


def test_weights_are_shares_of_samples() -> None:
    found = amounts(make({"weight": 0.1}, {"weight": 0.7}, {"weight": 0.2}))
    assert sum(found) == sum(sizes())
    assert found == [Fraction(n, 10) * sum(sizes()) for n in (1, 7, 2)]


@pytest.mark.parametrize("by", ["tokens", "frames"])
def test_weights_are_shares_of_tokens_or_frames(by: str) -> None:
    policy = make({"weight": 1}, {"weight": 3}, {"weight": 4}, weight_by=by)
    main, _ = shares.halves(ROWS, policy)
    spent = []
    for half, amount in zip(main, amounts(policy), strict=True):
        total = half.num_tokens if by == "tokens" else half.num_frames
        spent.append(amount * total / half.num_rows)
    assert [one / sum(spent) for one in spent] == [Fraction(n, 8) for n in (1, 3, 4)]


def test_text_has_no_frames_to_be_weighed_by() -> None:
    policy = make({"weight": 1}, {"weight": 3}, {"weight": 0}, weight_by="frames")
    assert amounts(policy, Fraction(40), half=1) == [10, 30, 0]


def test_what_a_cap_keeps_goes_to_the_others() -> None:
    policy = make({"weight": 1}, {"weight": 1, "cap": 5}, {"weight": 2})
    found = amounts(policy)
    assert found[1] == 5
    assert found[2] == 2 * found[0]
    assert sum(found) == sizes()[0] + 5 + sizes()[2]


def test_a_weight_of_0_leaves_a_source_out() -> None:
    found = amounts(make({"weight": 1}, {"weight": 0}, {"weight": 1}))
    assert found[1] == 0
    assert sum(found) == sizes()[0] + sizes()[2]


def test_shares_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights of s0, s1, s2 are all 0"):
        amounts(make(*[{"weight": 0}] * 3))
    with pytest.raises(ConfigError, match="asks for 40 text-only samples .* allow 6; raise a cap"):
        amounts(make(*[{"cap": 2}] * 3), Fraction(40), half=1)
    with pytest.raises(ConfigError, match="leave no sample"):
        rows = make_rows(50, text_frac=0.0)
        shares.halves(rows, make({"min_frames": 65}))


def test_each_source_is_in_the_order_of_its_shards() -> None:
    shard = ROWS.shard.copy()
    shard[500:520] = shard[519:499:-1]
    with pytest.raises(DataError, match="source s1: .* not in the order of its shards"):
        shares.halves(dataclasses.replace(ROWS, shard=shard), make())


def test_decimals_are_those_of_the_recipe() -> None:
    assert shares.decimal(0.1) == Fraction(1, 10)
    assert shares.decimal(1e-7) == Fraction(1, 10**7)


def test_text_alone_is_main() -> None:
    rows: Rows = make_rows(50, text_frac=1.0, image_frac=0.0)
    main, text = shares.halves(rows, make({}))
    assert [half.num_rows for half in main] == [50]
    assert not text
