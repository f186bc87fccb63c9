"""The section of a recipe that says how fast what learns: rates, schedule, decay.

Not here: what trains at all (``vlm.config_model``), what is made of it (``vlm.engine.optim``).
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from vlm.config_model import COMPONENTS, Component
from vlm.config_train import Strict


class ScheduleConfig(Strict):
    """Learning rate over steps; each component's own is its peak."""

    name: Literal["cosine", "constant", "converging"] = "cosine"
    warmup_frac: float = Field(0.05, ge=0, le=1)
    #: where cosine ends, as a share of the peak
    floor_frac: float = Field(0.1, ge=0, le=1)
    #: the rate at which all components end, of `converging`
    target: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _has_its_target(self) -> "ScheduleConfig":
        if (self.target is not None) != (self.name == "converging"):
            raise ValueError("set `target` with `name: converging`, and with no other")
        return self


class LearningRates(Strict):
    vision: float = Field(1e-5, ge=0)
    connector: float = Field(1e-4, ge=0)
    language: float = Field(1e-5, ge=0)


class WeightDecays(Strict):
    vision: float = Field(0.01, ge=0)
    connector: float = Field(0.01, ge=0)
    language: float = Field(0.01, ge=0)


def _same_for_all(found: Any) -> Any:
    """One number is that of every component."""
    return dict.fromkeys(COMPONENTS, found) if isinstance(found, int | float) else found


class OptimConfig(Strict):
    lr: LearningRates = LearningRates()
    #: global step -> component -> its rate from there on; others keep theirs
    lr_at: dict[Annotated[int, Field(gt=0)], dict[Component, Annotated[float, Field(ge=0)]]] = {}
    #: one number, or one for each component; not applied to biases, norms and other vectors
    weight_decay: Annotated[WeightDecays, BeforeValidator(_same_for_all)] = WeightDecays()
    betas: tuple[float, float] = (0.9, 0.999)
    #: of `data.loss_on: preference`: how much a gain over the model before training counts
    dpo_beta: float = Field(0.1, gt=0)
    eps: float = Field(1e-8, gt=0)
    schedule: ScheduleConfig = ScheduleConfig()
