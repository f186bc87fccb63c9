import dataclasses
import itertools
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.data.random_rows import make_policy, make_rows
from vlm.data.plan.plan import Plan, Planned, Position
from vlm.data.plan.policy import Policy, SourcePolicy
from vlm.errors import CheckpointError, ConfigError, DataError

FIRST_ROWS = np.array([0, 2000, 5000, 6000])
ROWS = dataclasses.replace(
    make_rows(6000, seed=5), first_rows=FIRST_ROWS, shard=np.arange(6000) // 50
)


def make(*changes: dict[str, Any], **policy: Any) -> Policy:
    sources = (SourcePolicy(name=f"s{i}", **one) for i, one in enumerate(changes or [{}] * 3))
    return make_policy(sources=tuple(sources), **policy)


def make_plan(*changes: dict[str, Any], **policy: Any) -> Plan:
    return Plan(ROWS, make(*changes, **policy), ["a", "b", "c"])


def source_of(rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(FIRST_ROWS, rows, "right") - 1


def epoch(plan: Plan, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of an epoch and how often each was shown before."""
    windows = range(number * plan.num_windows, (number + 1) * plan.num_windows)
    batches = [b for w in windows for step in plan.window(w) for b in step]
    rows, shown = ([vars_of(b)[i] for b in batches] for i in (0, 1))
    return np.concatenate(rows), np.concatenate(shown)


def vars_of(batch: Any) -> tuple[np.ndarray, np.ndarray]:
    return batch.rows, batch.epochs


def counts(rows: np.ndarray, is_text: bool = False) -> list[int]:
    own = rows[(ROWS.kind[rows] == 0) == is_text]
    return np.bincount(source_of(own), minlength=3).tolist()


MIXTURES: list[tuple[dict[str, Any], ...]] = [
    ({}, {}, {}),
    ({"weight": 0.2}, {"weight": 0.3}, {"weight": 0.5}),
    ({"repeat": 0.5}, {"cap": 700}, {"repeat": 3}),
]


@pytest.mark.parametrize("batching", ["bucketed", "packed"])
@pytest.mark.parametrize("sources", MIXTURES)
def test_shares_of_sources_and_text_are_exact_over_an_epoch(
    sources: tuple[dict[str, Any], ...], batching: str
) -> None:
    plan = make_plan(*sources, batching=batching, text_frac=0.14)
    for number in (0, 1, 4):
        rows, _ = epoch(plan, number)
        num_main = sum(counts(rows))
        num_text = sum(counts(rows, is_text=True))
        assert abs(num_text / len(rows) - 0.14) < 0.001
        if "weight" in sources[0]:
            for source, found in zip(sources, counts(rows), strict=True):
                assert abs(found / num_main - source["weight"]) < 0.001
        else:
            for k, (source, found) in enumerate(zip(sources, counts(rows), strict=True)):
                own = ROWS.kind[FIRST_ROWS[k] : FIRST_ROWS[k + 1]]
                expected = min(
                    np.count_nonzero(own) * source.get("repeat", 1), source.get("cap", 10**9)
                )
                assert abs(found - expected) <= 1


def test_tokens_are_shared_out_as_weights_say() -> None:
    plan = make_plan(
        {"weight": 0.5}, {"weight": 0.3}, {"weight": 0.2}, weight_by="tokens", text_frac=0.0
    )
    rows = np.concatenate([epoch(plan, number)[0] for number in range(6)])
    lengths, _ = ROWS.sizes(rows, 1)
    spent = np.bincount(source_of(rows), lengths)
    assert spent / spent.sum() == pytest.approx([0.5, 0.3, 0.2], abs=0.01)


@pytest.mark.parametrize("sources", MIXTURES)
def test_no_row_comes_again_before_all_others_of_its_source(
    sources: tuple[dict[str, Any], ...],
) -> None:
    plan = make_plan(*sources)
    shown: Counter[int] = Counter()
    for number in range(4):
        rows, _ = epoch(plan, number)
        shown.update(rows.tolist())
    for k, is_text in itertools.product(range(3), (False, True)):
        own = np.arange(FIRST_ROWS[k], FIRST_ROWS[k + 1])
        own = own[(ROWS.kind[own] == 0) == is_text]
        found = [shown[row] for row in own.tolist()]
        assert max(found) - min(found) <= 1


def test_how_often_a_row_was_shown_counts_up() -> None:
    plan = make_plan({"repeat": 3}, {}, {}, text_frac=0.0)
    seen: dict[int, list[int]] = {}
    for number in range(2):
        for row, before in zip(*(part.tolist() for part in epoch(plan, number)), strict=True):
            seen.setdefault(row, []).append(before)
    assert all(sorted(one) == list(range(len(one))) for one in seen.values())
    assert {len(one) for row, one in seen.items() if row < 2000} == {6}


def test_filters_leave_rows_out() -> None:
    plan = make_plan({"min_frames": 8}, {"max_frames": 4}, {})
    rows, _ = epoch(plan, 0)
    frames, source = ROWS.num_frames[rows], source_of(rows)
    assert frames[(source == 0) & (frames > 0)].min() == 8
    assert frames[source == 1].max() == 4
    assert set(rows) & set(np.flatnonzero(ROWS.num_frames == 2)[:1]) == set()


# ---- weights that change ----

CHANGING = ({"weight": 1.0}, {"weight": 0.0}, {"weight": 1.0})
CHANGES = ((30, (0.0, 1.0, 1.0)), (45, (1.0, 0.0, 0.0)))


def changing(batching: str = "bucketed", **policy: Any) -> Plan:
    return make_plan(*CHANGING, weights_at=CHANGES, batching=batching, **policy)


def take(plan: Plan, count: int, position: Position | None = None) -> list[Planned]:
    return list(itertools.islice(plan.steps(position), count))


@pytest.mark.parametrize("batching", ["bucketed", "packed"])
def test_weights_change_at_the_very_step(batching: str) -> None:
    taken = take(changing(batching), 80)
    assert [planned.at.global_step for planned in taken] == list(range(80))
    for planned in taken:
        rows = np.concatenate([batch.rows for batch in planned.step])
        main = {k for k, count in enumerate(counts(rows)) if count}
        step = planned.at.global_step
        assert main <= ({0, 2} if step < 30 else {1, 2} if step < 45 else {0})
    rows = np.concatenate([batch.rows for planned in taken[:30] for batch in planned.step])
    found = counts(rows)
    assert found[0] / (found[0] + found[2]) == pytest.approx(0.5, abs=0.05)


def test_a_source_goes_on_about_where_it_was() -> None:
    """A window that is left half way leaves some doubt; all others were not shown twice."""
    taken = take(changing(window=100), 60)
    first, later = (
        {row for p in part for b in p.step for row in b.rows.tolist() if row < 2000}
        - set(np.flatnonzero(ROWS.kind == 0).tolist())
        for part in (taken[:30], taken[45:48])
    )
    assert len(first) > 0.3 * 2000
    assert len(first & later) < 0.5 * len(later) * len(first) / 2000


def test_resuming_and_seeking_across_a_change() -> None:
    taken = take(changing(), 80)
    for stopped in (0, 28, 29, 30, 44, 45, 70):
        resumed = take(changing(), 5, taken[stopped].next)
        for one, other in zip(resumed, taken[stopped + 1 :], strict=False):
            assert one[:3] == other[:3]
            assert [b.rows.tolist() for b in one.step] == [b.rows.tolist() for b in other.step]
    plan = changing()
    for planned in taken:
        assert plan.seek(planned.at.global_step) == planned.at


def test_epochs_never_go_back() -> None:
    epochs = [planned.epoch for planned in take(changing(), 120)]
    assert epochs == sorted(epochs)
    assert epochs[-1] > 0


def test_a_position_in_another_phase_is_refused() -> None:
    with pytest.raises(CheckpointError, match="belongs to another plan"):
        take(changing(), 1, Position(30, 0, 12))


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(ConfigError, match="are all 0"):
        make_plan(*CHANGING, weights_at=((10, (0.0, 0.0, 0.0)),))
    with pytest.raises(DataError, match="no samples"):
        Plan(dataclasses.replace(make_rows(0), first_rows=np.array([0, 0])), make({}), ["a"])


# ---- windows ----


@pytest.mark.parametrize("batching", ["bucketed", "packed"])
def test_windows_end_where_steps_do(batching: str) -> None:
    """Where a window holds few steps, none of them is left half empty."""
    rows = make_rows(300_000, text_frac=0.1, image_frac=0.0, shards=300)
    changes = {"batching": batching, "micro_batches": 64, "budget": 16_384, "text_frac": 0.1}
    plan = Plan(rows, make_policy(window=18_000, **changes), ["a"])
    fills = []
    for index in range(6):
        steps = plan.window(index)
        assert len(steps) == 6
        cost = sum(b.num_tokens + 16.0 * b.num_frames for step in steps for b in step)
        fills.append(cost / (len(steps) * 64 * 16_384))
    assert min(fills) > 0.93


def test_text_share_is_a_fraction_of_the_recipes_decimal() -> None:
    plan = make_plan(text_frac=0.3)
    phase = plan.mixture.phases[0]
    assert phase.shares.text_per_main == Fraction(3, 7)
    assert sum(phase.shares.main) == sum(phase.shares.text) == 1
