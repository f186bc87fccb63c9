"""Saving: a checkpoint is complete or it does not exist.

1. All ranks write into ``step_N.tmp``: their share of the engine's state, their random states;
   rank 0 adds the model for ``transformers`` and ``trainer.json``. Every file is hashed as it is
   written, and lies on the disk before anything else happens.
2. Where a fast local folder was named, training goes on here, and a thread of each rank copies
   its files to the run's folder and compares the hashes.
3. Rank 0 writes sizes and hashes into ``manifest.json``, then ``COMPLETE``, renames the folder to
   ``step_N``, points ``latest`` at it, and only then removes old ones.

What fails on one rank fails on all, and costs nothing but the checkpoint that was being written.
Not here: what the engine's state is (``vlm.ckpt.engine_state``), which ones stay
(``vlm.ckpt.keep``). DeepSpeed's own checkpoints are not used: they are pickles, load on as many
ranks as saved them only, and name the newest before it is whole.
"""

import dataclasses
import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vlm import dist
from vlm.ckpt.agree import together
from vlm.ckpt.engine_state import counters, write_pieces
from vlm.ckpt.files import (
    TEMPORARY,
    FileInfo,
    copy,
    describe,
    remove,
    replace_text,
    sync,
    sync_tree,
    write_json,
)
from vlm.ckpt.keep import COMPLETE, Keep, folder_name, prune
from vlm.ckpt.pieces import pieces
from vlm.ckpt.state import TrainState, rng_state
from vlm.errors import CheckpointError, one_line
from vlm.models import export
from vlm.models.registry import quiet_transformers

log = logging.getLogger(__name__)

T = TypeVar("T")

LATEST = "latest"
BEST = "best"
MANIFEST = "manifest.json"
TRAINER = "trainer.json"
MODEL = "model"
#: saves that may fail one after another before the run stops
MAX_FAILURES = 3
#: seconds between looks for the other ranks' copies
LOOK_S = 0.1
#: seconds for which a run that failed waits for the other ranks' copies
PATIENCE_S = 60.0


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.json"


class Saved(NamedTuple):
    path: Path
    #: seconds for which training stood still
    stall_s: float
    #: of all files
    num_bytes: int


class _Copying(NamedTuple):
    """What threads do with a checkpoint that was written to the local folder."""

    target: Path
    copied: Future[None]
    #: on rank 0
    published: Future[None] | None


class Saver:
    """Writes the checkpoints of one run. All ranks call every method together.

    Args:
        folder: the run's ``checkpoints``; all ranks see the same.
        local: a fast folder of each host to write to first; None writes to ``folder`` directly.

    Raises:
        CheckpointError: the engine keeps states where they cannot be saved.
    """

    def __init__(self, engine: Any, tokenizer: Any, folder: Path, local: Path | None, keep: Keep):
        pieces(engine)
        self._engine, self._tokenizer = engine, tokenizer
        self._folder, self._local, self._keep = folder, local, keep
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._copying: _Copying | None = None
        self._give_up = threading.Event()
        self._num_failures = 0
        self._last_bytes = 0

    def save(self, state: TrainState, about: dict[str, Any], *, must: bool = False) -> Saved | None:
        """Writes ``folder/step_N`` on all ranks; None where it could not.

        Args:
            about: goes to ``trainer.json`` beside the state: ``identity`` and what people may ask.
            must: the run ends with it, so it is also copied, and to fail is an error.

        Raises:
            CheckpointError: on all ranks, where it must not fail, or failed too often.
        """
        started = time.perf_counter()
        self.finish()  # of the one before: its loss is not this one's

        def save_now() -> Saved:
            num_bytes = self._save(state, about)
            if must:
                self._finish()
            path = self._folder / folder_name(state.step)
            return Saved(path, time.perf_counter() - started, num_bytes)

        return self._attempt(save_now, must)

    def _attempt(self, action: Callable[[], T], must: bool) -> T | None:
        """Failures that training survives: not too many without a published one between them."""
        try:
            return action()
        except CheckpointError as error:
            self._num_failures += 1
            if must or self._num_failures >= MAX_FAILURES:
                raise
            log.error("%s; training goes on, the next one is tried when it is due", error)
            return None

    @property
    def copying(self) -> bool:
        """Whether the next save waits for the copy of the last one."""
        return self._copying is not None

    def finish(self) -> bool:
        """Waits until the last checkpoint is published; whether it is.

        Raises:
            CheckpointError: on all ranks, where saving failed too often.
        """
        return self._attempt(self._finish, must=False) is not None

    def _finish(self) -> bool:
        if self._copying is None:
            return True
        copying, self._copying = self._copying, None
        published = copying.published
        try:
            _together("copying", copying.target, copying.copied.result)
            _together("publishing", copying.target, published.result if published else _nothing)
        except CheckpointError:
            self._give_up.set()
            self._clear(copying.target)
            raise
        self._num_failures = 0
        return True

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # what other ranks copy is worth waiting for, but after an error one may never finish
        patience = threading.Timer(PATIENCE_S, self._give_up.set)
        if error is not None:
            patience.start()
        self._threads.shutdown()
        patience.cancel()

    def _save(self, state: TrainState, about: dict[str, Any]) -> int:
        name = folder_name(state.step)
        target = self._folder / f"{name}{TEMPORARY}"
        written = target if self._local is None else self._local / target.name
        _together("clearing", target, lambda: self._prepare(target))
        weights = consolidated(self._engine)
        trainer = {
            "state": dataclasses.asdict(state),
            "world_size": dist.world_size(),
            "engine": dataclasses.asdict(counters(self._engine)),
            **about,
        }
        try:
            found = _together("writing", written, lambda: self._write(written, weights, trainer))
            files = {name: info for part in found for name, info in part.items()}
            publish: Callable[[], None] = _nothing
            if dist.is_main():
                publish = partial(self._publish, target, files, dataclasses.replace(state))
            if self._local is None:
                _together("publishing", target, publish)
                self._num_failures = 0
            else:
                self._start_copy(written, target, found[dist.rank()], publish)
        except CheckpointError:
            self._clear(written)
            raise
        self._last_bytes = sum(int(info["bytes"]) for info in files.values())
        return self._last_bytes

    def _prepare(self, target: Path) -> None:
        """Removes what kills and earlier saves left."""
        if self._local is not None and dist.is_local_main():
            shutil.rmtree(self._local, ignore_errors=True)
        if dist.is_main():
            self._folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            free = shutil.disk_usage(self._folder).free
            if free < self._last_bytes:  # found before the disk is full for all others, too
                raise OSError(
                    errno.ENOSPC,
                    f"{os.strerror(errno.ENOSPC)}: {free:,} bytes free, the last checkpoint took "
                    f"{self._last_bytes:,}",
                )

    def _clear(self, folder: Path) -> None:
        if dist.is_main() or (self._local is not None and dist.is_local_main()):
            shutil.rmtree(folder, ignore_errors=True)

    def _write(self, folder: Path, weights: Any, trainer: dict[str, Any]) -> dict[str, FileInfo]:
        """This rank's files, by their names in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        name, info = write_pieces(self._engine, folder)
        files = {name: info}
        random = rank_file(dist.rank())
        files[random] = write_json(folder / random, rng_state())
        if dist.is_main():
            files[TRAINER] = write_json(folder / TRAINER, trainer)
            self._export_model(weights, folder / MODEL)
            for path in (folder / MODEL).rglob("*"):
                if path.is_file():
                    files[path.relative_to(folder).as_posix()] = describe(path)
        sync(folder)
        return files

    def _export_model(self, weights: Any, folder: Path) -> None:
        """Config, safetensors and tokenizer that ``transformers`` loads without DeepSpeed."""
        with quiet_transformers():
            export.save(self._engine.module, weights, folder)
            self._tokenizer.save_pretrained(folder)
        sync_tree(folder)

    def _start_copy(
        self,
        source: Path,
        target: Path,
        files: dict[str, FileInfo],
        publish: Callable[[], None],
    ) -> None:
        marks = [target / f"rank_{rank:05d}.copied" for rank in range(dist.world_size())]
        self._give_up = give_up = threading.Event()

        def copy_files() -> None:
            started = time.perf_counter()
            for name, info in files.items():
                if copy(source / name, target / name) != info:
                    raise OSError(errno.EIO, "changed before it was copied", str(source / name))
            sync(target)
            marks[dist.rank()].touch()  # from here on rank 0 may rename the folder
            log.info("copied %s in %.1f s", target.stem, time.perf_counter() - started)

        def wait_and_publish() -> None:
            while missing := [mark for mark in marks if not mark.exists()]:
                if give_up.wait(LOOK_S):
                    raise OSError(errno.ECANCELED, "given up", str(missing[0]))
            for mark in marks:
                mark.unlink()
            publish()

        self._copying = _Copying(
            target,
            self._threads.submit(copy_files),
            self._threads.submit(wait_and_publish) if dist.is_main() else None,
        )

    def _publish(self, target: Path, files: dict[str, FileInfo], state: TrainState) -> None:
        write_json(target / MANIFEST, files)
        (target / COMPLETE).touch()
        sync_tree(target)
        final = target.with_suffix("")
        if final.exists():  # one that was damaged when the run resumed before it
            remove(final, COMPLETE)
        os.replace(target, final)
        replace_text(self._folder / LATEST, final.name)
        if self._keep.best and state.best_step is not None:
            best = folder_name(state.best_step)
            if (self._folder / best).is_dir():  # else its save has failed
                replace_text(self._folder / BEST, best)
        prune(self._folder, state.step, state.best_step, self._keep)
        log.info("checkpoint %s", final)


def consolidated(engine: Any) -> Any:
    """The whole model's weights by name, on rank 0 at least. Collective."""
    if engine.zero_optimization_stage() == 3:
        return engine._zero3_consolidated_16bit_state_dict()
    return engine.module.state_dict()


def _nothing() -> None: ...


def _together(what: str, path: Path, action: Callable[[], T]) -> list[T]:
    """``together``, for what may fail in any way: a disk, a network, somebody's library."""

    def attempt() -> T:
        try:
            return action()
        except Exception as error:
            # Any error, since the other ranks wait. One that no disk raises keeps its trace.
            where = f"{what} failed on rank {dist.rank()}"
            log.error("checkpoint: %s", where, exc_info=not isinstance(error, OSError))
            raise CheckpointError(
                f"checkpoint {path}: {where}: {one_line(error) or type(error).__name__}; those "
                "before it are untouched; make room or let it be written, and start again"
            ) from None

    return together(attempt)
