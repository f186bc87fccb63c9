import os
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from vlm.engine.cpu import on_cpu, safe_loading


class Doctored:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def safe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Set first, so that it is taken back after the test.
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    before = torch.serialization.get_safe_globals()
    safe_loading()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


def test_a_doctored_pickle_runs_nothing(tmp_path: Path, safe: None) -> None:
    path, trace = tmp_path / "states.pt", tmp_path / "trace"
    torch.save({"module": Doctored(trace)}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=False)
    assert not trace.exists()


def test_the_doctored_pickle_would_have_worked(tmp_path: Path) -> None:
    path, trace = tmp_path / "states.pt", tmp_path / "trace"
    torch.save({"module": Doctored(trace)}, path)
    torch.load(path, weights_only=False)
    assert trace.is_dir()


def test_what_deepspeed_saves_still_loads(tmp_path: Path, safe: None) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    state = {
        "loss_scaler": LossScaler(scale=2.0),
        "dynamic": DynamicLossScaler(8.0, 2.0, 10, 1.0, 1, dtype=torch.float16),
        "fragments": {"w": fragment_address(start=3, numel=4)},
        "w": torch.arange(4.0),
    }
    if sys.version_info >= (3, 11, 4):  # before, an enum is pickled as a call, which is refused
        state["stage"] = ZeroStageEnum.gradients
    path = tmp_path / "states.pt"
    torch.save(state, path)
    loaded = torch.load(path, weights_only=False)
    assert loaded["fragments"]["w"].numel == 4
    assert loaded.get("stage", ZeroStageEnum.gradients) is ZeroStageEnum.gradients
    assert torch.equal(loaded["w"], state["w"])


@pytest.mark.parametrize(
    ("asked", "has_gpu", "expected"),
    [("", False, True), ("", True, False), ("cuda", True, False), ("cpu", True, True)],
)
def test_a_cpu_is_used_for_want_of_a_gpu_or_when_asked_for(
    asked: str, has_gpu: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert on_cpu() is expected


def start_deepspeed(folder: Path) -> None:
    """Sets up DeepSpeed's process group. Runs in a process of its own."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "built")
    del os.environ["DS_ACCELERATOR"]
    from vlm.engine.cpu import prepare_cpu

    prepare_cpu()
    import deepspeed

    assert deepspeed.accelerator.get_accelerator().device_name() == "cpu"
    url = f"file://{folder}/rendezvous"
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=url, rank=0, world_size=1, verbose=False
    )


def test_deepspeed_starts_without_compiling(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(start_deepspeed, tmp_path).result(timeout=300)
    assert not (tmp_path / "built").exists()
