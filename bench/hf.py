"""HF Trainer with DeepSpeed on the same model and samples, padded as it does. See bench/step.py."""

import tempfile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from bench.clock import Clock
from vlm.batch import IGNORE_INDEX, Batch, build_batch
from vlm.config import Recipe
from vlm.data.load.collate import Collator

#: any id that is no placeholder
PAD = 0


class Sample(NamedTuple):
    """(F, 3, H, W) uint8, and the ids and labels of one sample."""

    frames: Tensor
    input_ids: list[int]
    labels: list[int]


def samples_of(batch: Batch) -> list[Sample]:
    frames, seqlens = batch.cu_frames.tolist(), batch.cu_seqlens.tolist()
    return [
        Sample(
            batch.frames[frames[i] : frames[i + 1]],
            batch.input_ids[seqlens[i] : seqlens[i + 1]].tolist(),
            batch.labels[seqlens[i] : seqlens[i + 1]].tolist(),
        )
        for i in range(batch.num_samples)
    ]


def pad(samples: list[Sample], image_token_id: int, tokens_per_frame: int) -> Batch:
    """Every sample with the most frames and the longest text among them; text alone without."""
    most = max(len(sample.frames) for sample in samples)
    longest = max(len(s.input_ids) - tokens_per_frame * len(s.frames) for s in samples)
    frames, ids, labels = [], [], []
    for sample in samples:
        missing = most - len(sample.frames)
        frames += [sample.frames, sample.frames.new_zeros(missing, *sample.frames.shape[1:])]
        before = [image_token_id] * (missing * tokens_per_frame)
        after = [PAD] * (most * tokens_per_frame + longest - len(before) - len(sample.input_ids))
        ids.append([*before, *sample.input_ids, *after])
        # nothing stands before a sample's first token to predict it, and no pad shall
        learned = [IGNORE_INDEX, *sample.labels[1:]]
        labels.append([IGNORE_INDEX] * len(before) + learned + [IGNORE_INDEX] * len(after))
    blank = samples[0].frames.new_zeros(1, *samples[0].frames.shape[1:])
    return build_batch(
        frames=torch.cat(frames) if most else blank,
        frame_counts=[most] * len(samples),
        input_ids=ids,
        labels=labels,
        image_token_id=image_token_id,
        tokens_per_frame=tokens_per_frame,
        keys=[str(i) for i in range(len(samples))],
        kind="video" if most else "text",
    )


class _Loss(nn.Module):
    """A model as Trainer wants it: a mean loss of a dictionary of inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        batch = batch.to(next(self.model.parameters()).device)
        return {"loss": self.model(batch).loss_sum / max(1, batch.num_loss_tokens)}


class _Clock(TrainerCallback):
    """From the end of the first step, which sets things up, to the end of the last."""

    def __init__(self) -> None:
        self.ends: list[Clock] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(Clock.now())


def train_hf(
    model: nn.Module,
    samples: list[Sample],
    recipe: Recipe,
    settings: dict[str, Any],
    collator: Collator,
) -> tuple[float, float, int, int]:
    """One pass over ``samples`` less its first step: how long, real tokens and global steps.

    Wall seconds, and CPU seconds of this thread.

    Args:
        settings: the resolved DeepSpeed file.
    """
    accumulate, tokens = recipe.data.micro_batches, []
    per_micro_batch = max(1, round(len(samples) / accumulate / _num_steps(samples, recipe)))

    def collate_counted(chosen: list[Sample]) -> dict[str, Batch]:
        tokens.append(sum(len(sample.input_ids) for sample in chosen))
        return {"batch": pad(chosen, collator.image_token_id, collator.tokens_per_frame)}

    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=per_micro_batch,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=1,
            max_grad_norm=settings["gradient_clipping"],
            optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
            learning_rate=1e-4,
            bf16=settings["bf16"]["enabled"],
            deepspeed={
                **settings,
                "train_batch_size": per_micro_batch * accumulate,
                "train_micro_batch_size_per_gpu": per_micro_batch,
                "zero_force_ds_cpu_optimizer": False,
            },
            dataloader_drop_last=True,
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=_Loss(model),
            args=arguments,
            train_dataset=samples,
            data_collator=collate_counted,
            callbacks=[clock],
        )
        trainer.train()
    steps = len(clock.ends) - 1
    if steps < 1:
        raise SystemExit("too few samples for HF Trainer: raise --steps")
    real = sum(tokens[accumulate : accumulate * (steps + 1)])
    first, last = clock.ends[0], clock.ends[-1]
    return last.wall - first.wall, last.cpu - first.cpu, real, steps


def _num_steps(samples: list[Sample], recipe: Recipe) -> float:
    """Global steps that the toolkit makes of the samples: those that fill its budget."""
    cost = sum(len(s.input_ids) + recipe.data.frame_cost * len(s.frames) for s in samples)
    return max(1.0, cost / (recipe.data.budget * recipe.data.micro_batches))
