"""Each check against series that must raise it, and series that must not."""

import json
import math
from collections.abc import Iterable

import numpy as np
import pytest

from vlm.config_train import HealthConfig
from vlm.train.health import Alert, Found, Health, Verdict, expected_first_loss


def make(clip: float = 1.0, **changes: object) -> Health:
    return Health(HealthConfig.model_validate(changes), clip=clip)


def step(
    health: Health, number: int, loss: float, norm: float | None = 0.5, applied: bool = True
) -> Verdict:
    return health.after_step(number, Found(loss, None, norm, applied))


def run(health: Health, losses: Iterable[float], start: int = 1) -> list[Alert]:
    alerts = []
    for number, loss in enumerate(losses, start):
        alerts += step(health, number, loss).alerts
    return alerts


def checks(alerts: Iterable[Alert]) -> set[str]:
    return {alert.check for alert in alerts}


def noisy(mean: np.ndarray, seed: int = 0) -> list[float]:
    return (mean + np.random.default_rng(seed).normal(0, 0.1, len(mean))).tolist()


def test_a_spike_is_compared_with_what_came_before_it() -> None:
    """An average that holds the value already would need 2.11 times as much."""
    health = make()
    assert run(health, [2.0] * 30) == []
    assert health.loss_limit == pytest.approx(4.0)
    assert step(health, 31, 3.99).alerts == []
    quiet = make()
    run(quiet, [2.0] * 30)
    (alert,) = step(quiet, 31, 4.01).alerts
    assert (alert.check, alert.severity, alert.step) == ("loss_spike", "warning", 31)


def test_a_spike_enters_the_average_no_further_than_its_limit() -> None:
    health = make(ema_weight=0.05)
    run(health, [2.0] * 30)
    step(health, 31, 1000.0)
    assert health.state.loss_ema == pytest.approx(2.0 + 0.05 * (4.0 - 2.0))


def test_the_first_steps_are_not_compared() -> None:
    assert run(make(warmup_steps=20), [1.0, *[5.0] * 18]) == []


@pytest.mark.parametrize("action", ["warn", "skip", "rollback", "stop"])
def test_what_a_spike_leads_to_is_the_recipes_choice(action: str) -> None:
    health = make(on_spike=action)
    run(health, [2.0] * 30)
    verdict = step(health, 31, 5.0, applied=action != "skip")
    assert verdict.action == action
    assert "5, more than 2 times" in verdict.reason
    # though its alert is not repeated
    again = step(health, 32, 5.0)
    assert (again.action, again.alerts) == (action, [])


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("action", ["skip", "rollback", "stop"])
def test_a_loss_that_is_not_finite(loss: float, action: str) -> None:
    health = make(on_nonfinite=action)
    run(health, [2.0] * 5)
    verdict = step(health, 6, loss, norm=math.inf, applied=False)
    assert (verdict.action, checks(verdict.alerts)) == (action, {"nonfinite"})
    assert health.state.loss_ema == 2.0


def test_gradients_that_are_not_finite() -> None:
    verdict = step(make(), 1, 2.0, norm=math.inf, applied=False)
    assert verdict.action == "skip"
    assert verdict.alerts[0].severity == "critical"
    assert "gradients are not finite" in verdict.reason


def test_fp16_throws_steps_away_by_design() -> None:
    health = Health(HealthConfig(on_nonfinite="stop"), clip=1.0, scaled=True)
    verdict = step(health, 1, 2.0, norm=math.inf, applied=False)
    assert verdict.action == "none"
    assert verdict.alerts[0].severity == "info"
    assert step(health, 2, math.nan, applied=False).action == "stop"


def test_too_many_skips_in_a_row_end_the_run() -> None:
    health = make(max_skips=3)
    actions = [step(health, n, math.nan, applied=False).action for n in range(1, 4)]
    step(health, 4, 1.0)
    actions += [step(health, n, math.nan, applied=False).action for n in range(5, 9)]
    assert actions == ["skip"] * 6 + ["stop"]


def test_a_noisy_rise_is_a_divergence() -> None:
    """Losses that never rise ten times in a row, which a strict test would never notice."""
    losses = noisy(np.concatenate([np.full(60, 2.0), np.linspace(2.0, 3.0, 80)]))
    assert any(a > b for a, b in zip(losses[60:], losses[61:], strict=False))
    assert "divergence" in checks(run(make(), losses))


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_a_fall_are_none(seed: int) -> None:
    falling = noisy(np.concatenate([np.linspace(6, 2, 100), np.full(400, 2.0)]), seed)
    assert checks(run(make(plateau_delta=1e-9), falling)) == set()


def test_a_plateau() -> None:
    alerts = run(make(), [2.0] * 220)
    assert [(a.check, a.step) for a in alerts] == [("plateau", 201)]
    assert "plateau" not in checks(run(make(), np.linspace(3, 2.8, 400).tolist()))


def test_gradients() -> None:
    health = make()
    for number in range(1, 31):
        assert step(health, number, 2.0, norm=0.5).alerts == []
    assert step(health, 31, 2.0, norm=2.49).alerts == []
    assert checks(step(health, 32, 2.0, norm=10.0).alerts) == {"gradient_spike"}
    vanishing = [step(health, n, 2.0, norm=0.005).alerts for n in range(33, 43)]
    assert [len(alerts) for alerts in vanishing] == [0] * 9 + [1]
    assert vanishing[-1][0].check == "gradient_vanishing"


def test_the_clip_fraction_is_a_moving_average() -> None:
    health, average = make(clip=1.0), 0.0
    rng = np.random.default_rng(0)
    alerts = []
    for number, norm in enumerate(rng.uniform(0.5, 1.5, 50), start=1):
        alerts += step(health, number, 2.0, norm=float(norm)).alerts
        clipped = float(norm > 1.0)
        average = clipped if number == 1 else 0.95 * average + 0.05 * clipped
    assert health.values(50)["clip_frac"] == pytest.approx(average)
    assert alerts == []
    for number in range(51, 151):
        alerts += step(health, number, 2.0, norm=1.2).alerts
    assert checks(alerts) == {"clipping"}


def test_evaluations() -> None:
    health = make()
    run(health, [2.0] * 30)
    found = [health.after_eval(n, loss) for n, loss in enumerate([2.5, 2.4, 2.45, 2.5, 2.55])]
    assert [checks(alerts) for alerts in found] == [set()] * 4 + [{"eval_rises", "overfitting"}]


def test_a_gap_that_grows_while_the_held_out_loss_falls() -> None:
    health, alerts = make(), []
    for number, held_out in enumerate([2.50, 2.49, 2.48, 2.47], start=1):
        run(health, [2.4 - 0.3 * number] * 100, start=100 * number)
        alerts += health.after_eval(100 * number, held_out)
    assert checks(alerts) == {"overfitting"}


def test_waiting_for_data() -> None:
    health = make(data_wait_frac=0.2)
    assert health.after_waiting(1, 0.19) == []
    assert checks(health.after_waiting(2, 0.4)) == {"data_wait"}


def test_an_alert_is_raised_once_in_a_while() -> None:
    health = make(cooldown_steps=100, warmup_steps=1)
    alerts = run(health, [1.0, *[3.0, 0.1] * 150])
    steps = [alert.step for alert in alerts if alert.check == "loss_spike"]
    assert len(steps) >= 2
    assert all(b - a > 100 for a, b in zip(steps, steps[1:], strict=False))


def first(loss: float, random_start: bool, number: int = 1) -> set[str]:
    bounds = expected_first_loss(128_256, random_start, 0.2)
    health = Health(HealthConfig(), clip=1.0, first_loss=bounds)
    return checks(health.after_step(number, Found(99.0, loss, 0.5, True)).alerts)


def test_the_first_loss() -> None:
    assert first(11.76, random_start=True) == set()
    assert first(7.0, random_start=True) == {"first_loss"}
    # a trained model knows more than nothing, and less is a fault
    assert first(2.5, random_start=False) == set()
    assert first(15.0, random_start=False) == {"first_loss"}
    # a run that goes on is not at its start
    assert first(7.0, random_start=True, number=500) == set()


def test_what_went_on_is_what_never_stopped() -> None:
    """Through JSON, at any step."""
    losses = noisy(np.concatenate([np.linspace(6, 2, 150), np.linspace(2, 4, 150)]))
    losses[120] = 9.0
    whole = make()
    expected = run(whole, losses)
    assert {"loss_spike", "divergence"} <= checks(expected)
    for cut in (1, 119, 121, 200):
        before = make()
        alerts = run(before, losses[:cut])
        state = json.loads(json.dumps(before.state_dict()))
        after = Health(HealthConfig(), clip=1.0, state=state)
        alerts += run(after, losses[cut:], start=cut + 1)
        assert alerts == expected
        assert after.state == whole.state


# --- where a foveated model looks ---------------------------------------------------------------

GOOD_LOOKS = {
    "attention_entropy": 3.5,
    "attention_entropy_static": 4.5,
    "attention_entropy_max": math.log(257),
    "query_similarity": 0.97,
    "look_change": 0.4,
    "q_static_std": 1.0,
    "visual_ratio": 1.2,
}


@pytest.mark.parametrize(
    "check,changes",
    [
        ("uniform_attention", {"attention_entropy": 0.98 * math.log(257)}),
        ("uniform_attention", {"attention_entropy_static": 0.98 * math.log(257)}),
        ("same_queries", {"query_similarity": 0.999}),
        ("same_looks", {"look_change": 0.05}),
        ("query_scale", {"q_static_std": 0.02}),
        ("query_scale", {"q_static_std": 3.0}),
        ("visual_scale", {"visual_ratio": 0.1}),
        ("visual_scale", {"visual_ratio": 9.0}),
    ],
)
def test_a_bad_look_raises_its_alert_once_in_a_while(check: str, changes: dict[str, float]) -> None:
    health = make(warmup_steps=5, cooldown_steps=50)
    looks = GOOD_LOOKS | changes
    assert health.after_looks(1, looks) == [], "the first steps are not judged"
    run(health, [2.0] * 10)
    assert health.after_looks(10, GOOD_LOOKS) == []
    (alert,) = health.after_looks(20, looks)
    assert (alert.check, alert.severity, alert.step) == (check, "warning", 20)
    assert health.after_looks(30, looks) == []
    assert checks(health.after_looks(80, looks)) == {check}


def test_clips_of_one_frame_have_no_frames_in_a_row() -> None:
    health = make(warmup_steps=5)
    run(health, [2.0] * 10)
    single = {name: value for name, value in GOOD_LOOKS.items() if name != "query_similarity"}
    assert health.after_looks(10, single) == []


def test_a_coarse_pass_alone_is_judged_by_what_it_has() -> None:
    health = make(warmup_steps=5, cooldown_steps=0)
    run(health, [2.0] * 10)
    fine = ("attention_entropy", "query_similarity", "look_change")
    alone = {name: value for name, value in GOOD_LOOKS.items() if name not in fine}
    assert health.after_looks(10, alone) == []
    uniform = alone | {"attention_entropy_static": math.log(257)}
    (alert,) = health.after_looks(20, uniform)
    assert alert.check == "uniform_attention" and "by q_static is 100.0%" in alert.message
