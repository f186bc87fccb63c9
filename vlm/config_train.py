"""The sections of a recipe that say how a run goes on: for how long, how watched, where logged.

Not here: what is trained, and on what (``vlm.config``, which joins all sections).
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """A section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


EvalMetric = Literal["eval_loss", "eval_loss_fine", "eval_loss_coarse", "eval_loss_autoregressive"]


class EarlyStopConfig(Strict):
    """When more training is not worth its money."""

    #: evaluations in a row that may pass without a better one
    patience: int = Field(gt=0)
    #: a smaller gain than this is none
    min_delta: float = Field(0.0, ge=0)


class TrainConfig(Strict):
    #: global steps
    steps: int = Field(gt=0)
    log_every: int = Field(10, gt=0)
    eval_every: int = Field(0, ge=0, description="0: only at the end")
    eval_steps: int = Field(20, gt=0, description="global steps of each evaluation")
    #: also evaluate as at inference, frame after frame; a second pass, not under ZeRO-3
    eval_autoregressive: bool = False
    #: held-out samples whose answers each evaluation writes to predictions.jsonl; not under ZeRO-3
    eval_predictions: int = Field(0, ge=0)
    #: held-out samples in which each evaluation draws where a foveated model looks; 0: none
    eval_pictures: int = Field(4, ge=0)
    #: what the best checkpoint, and early stopping, go by; lower is better
    best_metric: EvalMetric = "eval_loss"
    early_stop: EarlyStopConfig | None = None
    checkpoint_every: int = Field(0, ge=0, description="0: only at the end")
    #: newest checkpoints that stay
    keep_last: int = Field(2, gt=0)
    #: those of every so many steps stay, too; 0: none
    keep_every: int = Field(0, ge=0)
    #: so does the one that is best by `best_metric`
    keep_best: bool = True
    #: fast folder of each host: checkpoints are written there, and copied while training goes on
    local_dir: Path | None = None
    #: hours after which the run saves and stops with exit code 75
    max_hours: float | None = Field(None, gt=0)
    #: mean hours between failures or preemptions; checkpoint_every is compared with their best
    mtbf_hours: float | None = Field(None, gt=0)
    #: forward mode -> share of the global steps that run in it; empty: the model's own. Where it
    #: names one, evaluations run in it, too
    modes: dict[str, Annotated[float, Field(gt=0)]] = {}
    #: global steps between checks that all ranks call the same modules; 1 to find a fault, 0: never
    agree_every: int = Field(100, ge=0)
    #: intra-op threads of each rank on a CPU; 0 leaves it to torch
    cpu_threads: int = Field(0, ge=0)


class HealthConfig(Strict):
    """What counts as unhealthy, and what is done about it. Steps are global steps."""

    #: gradients that are not finite are never applied; then: go on, or back to the last
    #: checkpoint and past that step, or end the run
    on_nonfinite: Literal["skip", "rollback", "stop"] = "skip"
    #: a loss above `spike_factor` times its moving average: only say so, leave the step out, go
    #: back to the last checkpoint and past it, or end the run
    on_spike: Literal["warn", "skip", "rollback", "stop"] = "warn"
    #: steps in a row that may be left out, and rollbacks of a run; one more ends it
    max_skips: int = Field(10, gt=0)
    max_rollbacks: int = Field(3, gt=0)
    #: weight of the newest value in the moving averages
    ema_weight: float = Field(0.05, gt=0, le=1)
    #: steps whose values make the averages before anything is compared with them
    warmup_steps: int = Field(20, gt=0)
    #: steps in which a kind of alert is raised once
    cooldown_steps: int = Field(100, ge=0)
    #: how far the first loss may be from ln(vocabulary), as a share of it
    first_loss_frac: float = Field(0.2, gt=0)
    spike_factor: float = Field(2.0, gt=1)
    grad_spike_factor: float = Field(5.0, gt=1)
    #: the averaged loss rose by this share, and over all of so many steps
    divergence_frac: float = Field(0.05, gt=0)
    divergence_steps: int = Field(50, ge=5)
    #: the averaged loss fell by less than this over so many steps
    plateau_delta: float = Field(0.01, gt=0)
    plateau_steps: int = Field(200, gt=0)
    #: gradient norms below this, so many in a row
    vanishing_norm: float = Field(0.01, gt=0)
    vanishing_steps: int = Field(10, gt=0)
    #: share of the steps (as a moving average) whose gradients were clipped
    clip_frac: float = Field(0.9, gt=0, le=1)
    #: share of the time in which the model waits for data
    data_wait_frac: float = Field(0.2, gt=0, le=1)
    #: of foveated models: entropy of attention to a frame, as a share of the highest
    uniform_attention_frac: float = Field(0.97, gt=0, le=1)
    #: cosine of the queries of frames in a row
    same_queries: float = Field(0.995, gt=0, le=1)
    #: how far fine tokens are from coarse ones, in standard deviations
    same_looks: float = Field(0.1, ge=0)
    #: q_static's std, and visual over text std, are 1 within these factors
    query_scale_factor: float = Field(2.0, gt=1)
    visual_scale_factor: float = Field(5.0, gt=1)
    #: evaluations in a row in which the held-out loss, or its gap to the training loss, grew
    eval_rises: int = Field(3, gt=0)


class LogConfig(Strict):
    wandb: Literal["disabled", "offline", "online"] = "offline"
    wandb_project: str = "saccade"
    tensorboard: bool = False
    #: what one GPU costs for an hour, in any currency; the money spent and left is then logged
    gpu_price_per_hour: float | None = Field(None, gt=0)
