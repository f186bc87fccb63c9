"""What draws the metrics live: TensorBoard and W&B, both optional.

Not here: the record of the numbers, and what happens when one of these breaks
(``vlm.train.metrics``).
"""

import uuid
from functools import partial
from pathlib import Path
from typing import Any

from vlm.ckpt.files import replace_text
from vlm.config_train import LogConfig
from vlm.train.health import Alert


class TensorBoard:
    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        # Here, because tensorboard is optional and slow to import.
        from torch.utils.tensorboard import SummaryWriter

        self._open = partial(SummaryWriter, str(run_dir / "tensorboard"))
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = self._open(purge_step=purge_step)

    def alert(self, alert: Alert) -> None:
        text = f"{alert.severity}: {alert.check}: {alert.message}"
        self._writer.add_text("alerts", text, alert.step)

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(purge_step=step + 1)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """One W&B run for the whole run folder: its id is kept there and taken up on resume."""

    def __init__(
        self, run_dir: Path, config: LogConfig, recipe: dict[str, Any], resume_step: int | None
    ) -> None:
        # Here, because wandb is optional, slow to import, and unwanted when it is disabled.
        import wandb

        id_path = run_dir / "wandb_run_id"
        if resume_step is None or not id_path.exists():
            replace_text(id_path, uuid.uuid4().hex)
        # Nothing may wait for a person or a dead network while GPUs are rented: silent means no
        # prompt for a key, and what is not uploaded in time `wandb sync` makes up. W&B asks for
        # the key before it reads what init is given, hence setup.
        settings = wandb.Settings(
            silent=True, console="off", login_timeout=10, init_timeout=60, finish_timeout=120
        )
        wandb.setup(settings)
        self._run = wandb.init(
            project=config.wandb_project,
            name=run_dir.name,
            id=id_path.read_text(encoding="utf-8").strip(),
            resume="allow",
            mode=config.wandb,
            dir=run_dir,
            config=recipe,
            settings=settings,
        )
        # W&B's own counter only grows; a run that goes back draws its steps again
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def alert(self, alert: Alert) -> None:
        levels = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}
        self._run.alert(
            title=f"{alert.check} at step {alert.step}",
            text=alert.message,
            level=levels[alert.severity],
        )

    def rewind(self, step: int) -> None:
        """Its rows stay; those of the same steps that come are drawn over them."""

    def close(self) -> None:
        self._run.finish()
