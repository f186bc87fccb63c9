"""Whether training goes well: what each step and evaluation is compared with, and what follows.

Pure Python on numbers that all ranks share, so all of them come to the same verdict without asking
each other. A value is compared with the averages of those before it, then enters them, no further
than the limit it broke. The state goes into the checkpoint. Not here: who is told
(``vlm.train.alerts``), and how a step is left out or taken back (``vlm.train.incidents``).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from vlm.config_train import HealthConfig

Severity = Literal["info", "warning", "critical"]
#: from the mildest on
Action = Literal["none", "warn", "skip", "rollback", "stop"]
#: parts in which a loss must have risen to be called a divergence
FIFTHS = 5


class Alert(NamedTuple):
    step: int
    check: str
    severity: Severity
    #: what was found, what was expected, what to look at
    message: str


class Verdict(NamedTuple):
    """What is to be done after a step, on all ranks alike."""

    alerts: list[Alert]
    action: Action
    #: what the action is for; empty if there is none
    reason: str


class Found(NamedTuple):
    """What a global step came to."""

    loss: float
    #: of predicting a token, where the loss holds one
    cross_entropy: float | None
    #: before clipping; None where it is not measured
    grad_norm: float | None
    #: False if its gradients were thrown away
    applied: bool


@dataclass
class HealthState:
    """All that is remembered; plain values for JSON."""

    #: steps whose losses are in the averages
    num_steps: int = 0
    loss_ema: float | None = None
    grad_norm_ema: float | None = None
    #: moving average of "was clipped"
    clip_frac: float | None = None
    #: averaged losses of the last steps, oldest first
    history: list[float] = field(default_factory=list)
    best_ema: float | None = None
    best_step: int = 0
    #: in a row
    num_vanishing: int = 0
    num_skips: int = 0
    #: newest last, no more than are compared
    eval_losses: list[float] = field(default_factory=list)
    eval_gaps: list[float] = field(default_factory=list)
    #: check -> step of its last alert
    raised: dict[str, int] = field(default_factory=dict)


class Health:
    """Judges a run.

    Args:
        clip: norm to which gradients are clipped; 0 for none.
        first_loss: (lowest, highest) that the cross entropy of the very first step should have.
        scaled: gradients are scaled to fit fp16, which throws away single steps by design.
        state: of a checkpoint.
    """

    def __init__(
        self,
        config: HealthConfig,
        *,
        clip: float,
        first_loss: tuple[float, float] | None = None,
        scaled: bool = False,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._config, self._clip, self._scaled = config, clip, scaled
        self._first_loss = first_loss
        self.state = HealthState(**(state or {}))
        self._alerts: list[Alert] = []

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.state)

    @property
    def loss_limit(self) -> float:
        """A loss above it is a spike."""
        return self._limit(self.state.loss_ema, self._config.spike_factor)

    def values(self, step: int) -> dict[str, float | None]:
        """Columns of the metrics."""
        state = self.state
        return {
            "loss_ema": state.loss_ema,
            "grad_norm_ema": state.grad_norm_ema,
            "clip_frac": state.clip_frac,
            "steps_since_best": None if state.best_ema is None else step - state.best_step,
        }

    def after_step(self, step: int, found: Found) -> Verdict:
        """Judges one step; call it for every one, in order."""
        state, reason = self.state, ""
        action: Action = "none"
        if state.num_steps == 0:
            self._check_first(step, found.cross_entropy)
        spiked = math.isfinite(found.loss) and found.loss > self.loss_limit
        if spiked:
            action = self._config.on_spike
            reason = (
                f"the loss is {found.loss:.4g}, more than {self._config.spike_factor:g} times its "
                f"average of {state.loss_ema:.4g}"
            )
            self._raise(step, "loss_spike", "warning", reason)
        elif not math.isfinite(found.loss) or not found.applied:
            action, reason = self._judge_nonfinite(step, found)
        state.num_skips = 0 if found.applied else state.num_skips + 1
        if state.num_skips > self._config.max_skips:
            action = "stop"
            reason = f"{state.num_skips} steps in a row were left out, the last because {reason}"
        if found.applied and found.grad_norm is not None:
            self._check_gradient(step, found.grad_norm)
        if math.isfinite(found.loss):
            self._follow(step, min(found.loss, self.loss_limit))
        return Verdict(self._take(), action, reason)

    def after_eval(self, step: int, eval_loss: float) -> list[Alert]:
        """Judges a held-out loss, also against the averaged training loss."""
        state, rises = self.state, self._config.eval_rises
        state.eval_losses = [*state.eval_losses, eval_loss][-rises - 1 :]
        if _rose(state.eval_losses, rises):
            first, last = state.eval_losses[0], state.eval_losses[-1]
            self._raise(
                step,
                "eval_rises",
                "warning",
                f"the held-out loss rose {rises} times in a row, from {first:.4g} to {last:.4g}",
            )
        if state.loss_ema is not None:
            state.eval_gaps = [*state.eval_gaps, eval_loss - state.loss_ema][-rises - 1 :]
        if _rose(state.eval_gaps, rises):
            first, last = state.eval_gaps[0], state.eval_gaps[-1]
            self._raise(
                step,
                "overfitting",
                "warning",
                f"held-out minus training loss grew {rises} times in a row, from {first:.4g} to "
                f"{last:.4g}",
            )
        return self._take()

    def after_waiting(self, step: int, data_wait_frac: float) -> list[Alert]:
        """Judges the share of the time in which the model waited for data."""
        if data_wait_frac > self._config.data_wait_frac:
            self._raise(
                step,
                "data_wait",
                "warning",
                f"the model waits for data {data_wait_frac:.0%} of the time, more than "
                f"{self._config.data_wait_frac:.0%}",
            )
        return self._take()

    def after_looks(self, step: int, looks: Mapping[str, float]) -> list[Alert]:
        """Judges how a foveated model looks, by the names of ``vlm.models.looks``."""
        if self.state.num_steps >= self._config.warmup_steps:
            for check, message in _bad_looks(self._config, looks):
                self._raise(step, check, "warning", message)
        return self._take()

    def _limit(self, average: float | None, factor: float) -> float:
        if average is None or self.state.num_steps < self._config.warmup_steps:
            return math.inf
        return factor * average

    def _check_first(self, step: int, cross_entropy: float | None) -> None:
        if step != 1 or cross_entropy is None or self._first_loss is None:
            return
        low, high = self._first_loss
        if not low <= cross_entropy <= high:
            self._raise(
                step,
                "first_loss",
                "warning",
                f"the first cross entropy is {cross_entropy:.4g}, expected {low:.4g} to "
                f"{high:.4g}: look at loss masks, special tokens and what weights were loaded",
            )

    def _judge_nonfinite(self, step: int, found: Found) -> tuple[Action, str]:
        """What follows from a loss or gradients that are not finite."""
        if self._scaled and math.isfinite(found.loss):
            self._raise(
                step, "loss_scale", "info", "gradients left the range of fp16: scale lowered"
            )
            return "none", "gradients left the range of fp16"
        what = "gradients are not finite"
        if not math.isfinite(found.loss):
            what = f"the loss is {found.loss}"
        self._raise(step, "nonfinite", "critical", f"{what}; the step was not applied")
        return self._config.on_nonfinite, what

    def _check_gradient(self, step: int, norm: float) -> None:
        state, config = self.state, self._config
        limit = self._limit(state.grad_norm_ema, config.grad_spike_factor)
        if norm > limit:
            self._raise(
                step,
                "gradient_spike",
                "warning",
                f"the gradient norm is {norm:.4g}, more than {config.grad_spike_factor:g} times "
                f"its average of {state.grad_norm_ema:.4g}",
            )
        state.num_vanishing = state.num_vanishing + 1 if norm < config.vanishing_norm else 0
        if state.num_vanishing >= config.vanishing_steps:
            self._raise(
                step,
                "gradient_vanishing",
                "warning",
                f"the gradient norm was below {config.vanishing_norm:g} for "
                f"{state.num_vanishing} steps, now {norm:.3g}",
            )
        state.grad_norm_ema = self._average(state.grad_norm_ema, min(norm, limit))
        if self._clip:
            state.clip_frac = self._average(state.clip_frac, float(norm > self._clip))
            if state.num_steps >= config.warmup_steps and state.clip_frac > config.clip_frac:
                self._raise(
                    step,
                    "clipping",
                    "info",
                    f"{state.clip_frac:.0%} of the steps are clipped to a norm of {self._clip:g}",
                )

    def _follow(self, step: int, loss: float) -> None:
        """Puts a loss into the averages and looks at where they go."""
        state, config = self.state, self._config
        average = state.loss_ema = self._average(state.loss_ema, loss)
        state.num_steps += 1
        kept = max(config.plateau_steps, config.divergence_steps) + 1
        state.history = [*state.history, average][-kept:]
        if state.best_ema is None or average < state.best_ema:
            state.best_ema, state.best_step = average, step
        if state.num_steps < config.warmup_steps:
            return
        recent = state.history[-config.divergence_steps - 1 :]
        span = config.divergence_steps // FIFTHS
        rise = average / recent[0] - 1 if recent[0] > 0 else 0.0
        steady = all(a < b for a, b in zip(recent[::span], recent[span::span], strict=False))
        if len(recent) > config.divergence_steps and steady and rise > config.divergence_frac:
            self._raise(
                step,
                "divergence",
                "critical",
                f"the averaged loss rose by {rise:.0%} over {config.divergence_steps} steps, to "
                f"{average:.4g}",
            )
        if len(state.history) > config.plateau_steps:
            fall = state.history[-config.plateau_steps - 1] - average
            if abs(fall) < config.plateau_delta:
                self._raise(
                    step,
                    "plateau",
                    "info",
                    f"the averaged loss moved by {fall:.2g} in {config.plateau_steps} steps, it is "
                    f"{average:.4g}",
                )

    def _average(self, average: float | None, value: float) -> float:
        weight = self._config.ema_weight
        return value if average is None else average + weight * (value - average)

    def _raise(self, step: int, check: str, severity: Severity, message: str) -> None:
        last = self.state.raised.get(check)
        if last is None or step - last > self._config.cooldown_steps:
            self.state.raised[check] = step
            self._alerts.append(Alert(step, check, severity, message))

    def _take(self) -> list[Alert]:
        found, self._alerts = self._alerts, []
        return found


def expected_first_loss(
    vocab_size: int, random_start: bool, tolerance_frac: float
) -> tuple[float, float]:
    """Where the first cross entropy should lie.

    A language model that starts at random knows nothing: ln(vocabulary). One that was trained knows
    something: less, however little.
    """
    uniform = math.log(vocab_size)
    return (1 - tolerance_frac) * uniform if random_start else 0.0, (1 + tolerance_frac) * uniform


def _bad_looks(config: HealthConfig, looks: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """(check, message) of all that keeps a model from choosing where to look.

    What compares fine with coarse looks is not there where there is no fine pass, nor what compares
    frames in a row where every clip has one.
    """
    for name, whose in (
        ("attention_entropy", "the frames' own queries"),
        ("attention_entropy_static", "q_static"),
    ):
        share = looks.get(name, 0.0) / looks["attention_entropy_max"]
        if share > config.uniform_attention_frac:
            yield (
                "uniform_attention",
                f"the entropy of attention to frames by {whose} is {share:.1%} of that of no "
                f"choice at all, more than {config.uniform_attention_frac:.1%}",
            )
    if (cosine := looks.get("query_similarity", 0.0)) > config.same_queries:
        yield (
            "same_queries",
            f"queries of frames in a row have a cosine of {cosine:.4f}, above "
            f"{config.same_queries:g}: the language model asks every frame the same",
        )
    if (change := looks.get("look_change", math.inf)) < config.same_looks:
        yield (
            "same_looks",
            f"fine tokens are {change:.3g} standard deviations from coarse ones, "
            f"less than {config.same_looks:g}: what is asked does not change what is seen",
        )
    for check, name, what, factor in (
        ("query_scale", "q_static_std", "the std of q_static", config.query_scale_factor),
        ("visual_scale", "visual_ratio", "visual over text std", config.visual_scale_factor),
    ):
        if not 1 / factor <= looks[name] <= factor:
            low, high = f"{1 / factor:.3g}", f"{factor:.3g}"
            yield check, f"{what} is {looks[name]:.3g}, expected {low} to {high}"


def _rose(values: list[float], times: int) -> bool:
    return len(values) > times and all(a < b for a, b in zip(values, values[1:], strict=False))
