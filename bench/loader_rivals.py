"""The contestants of bench/loader.py: each opens its form of the data and yields what it delivers.

Every rival decodes with simplejpeg into one tensor a sample, shuffles, reads the words, and gets as
many workers as there are cores: none where there is one core, which saves it the way between
processes. ``saccade`` also tokenizes, packs micro-batches and checks every byte.
"""

import itertools
import json
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch

from bench.loader_data import IMAGE_TOKEN, MAX_FRAMES, SIZE, Data, decode, pack, read_tar, unpack
from vlm.config import AugmentConfig, DataConfig
from vlm.data.load.collate import Collator
from vlm.data.load.loader import Loader
from vlm.data.plan import catalog
from vlm.data.plan.plan import Plan, Policy, Position
from vlm.data.plan.planning import rows_from_catalog
from vlm.data.text import chat

SHUFFLE = 100
#: tokens of a micro-batch: about 100 frames
BUDGET, FRAME_COST = 2048, 16


class Taken(NamedTuple):
    num_samples: int
    num_frames: int


class Stream(NamedTuple):
    """What a contestant delivers, without end or for an epoch, and where it stands."""

    items: Iterator[Taken]
    state: Callable[[], Any]


class Contestant(NamedTuple):
    """A loader: what it needs, how its form of the data is made, how it is opened.

    ``load`` imports it; ``open(data, cores, state)`` goes on from ``state`` unless that is None.
    """

    package: str
    load: Callable[[], object]
    prepare: Callable[[Data], None]
    open: Callable[[Data, int, Any], Stream]


def _nothing(data: Data) -> None:
    pass


def _loads(package: str) -> Callable[[], object]:
    return lambda: import_module(package)


def _workers(cores: int) -> int:
    return cores if cores > 1 else 0


def _taken(sample: tuple[bytes, torch.Tensor]) -> Taken:
    return Taken(1, len(sample[1]))


# --- the ceiling ------------------------------------------------------------------------------


def open_ceiling(data: Data, cores: int, state: Any) -> Stream:
    """Threads that decode what lies in memory, into memory of their own, and do nothing else."""
    jpegs = [frames for _, frames in itertools.islice(data.samples(), 128)]

    def work(number: int) -> Taken:
        # small enough to stay in the cache: nobody can be faster
        out = np.empty((MAX_FRAMES, SIZE, SIZE, 3), np.uint8)
        chosen = jpegs[number::cores]
        for frames in chosen:
            for jpeg, place in zip(frames, out, strict=False):
                simplejpeg.decode_jpeg(jpeg, colorspace="RGB", strict=True, buffer=place)
        return Taken(len(chosen), sum(map(len, chosen)))

    def rounds() -> Iterator[Taken]:
        with ThreadPoolExecutor(cores) as pool:
            while True:
                done = list(pool.map(work, range(cores)))
                yield Taken(sum(t.num_samples for t in done), sum(t.num_frames for t in done))

    return Stream(rounds(), lambda: None)


# --- this loader ------------------------------------------------------------------------------


def open_saccade(data: Data, cores: int, state: Any) -> Stream:
    found = catalog.load([("bench", data.manifest, 1)])
    policy = Policy(
        seed=0,
        batching="packed",
        micro_batches=1,
        budget=BUDGET,
        frame_cost=FRAME_COST,
        tokens_per_frame=1,
        text_frac=0.0,
        window=262_144,
        loss_on="answers",
    )
    plan = Plan(rows_from_catalog(found, "answers"), policy, ["bench"])
    collator = Collator(
        tokenizer=chat.load_tokenizer(str(data.tokenizer), IMAGE_TOKEN),
        image_token=IMAGE_TOKEN,
        tokens_per_frame=1,
        loss_on="answers",
        augment=AugmentConfig(),
        seed=0,
    )
    config = DataConfig(
        train="unused", eval="unused", micro_batches=1, budget=BUDGET, decode_threads=cores
    )
    position = [state or Position()]
    loader = Loader(found, plan, collator, config, rank=0, world_size=1, position=position[0])

    def items() -> Iterator[Taken]:
        with closing(iter(loader)) as steps:  # type: ignore[type-var]
            for step in steps:
                position[0] = step.next
                for batch in step.batches:
                    yield Taken(batch.num_samples, len(batch.frames))

    return Stream(items(), lambda: position[0])


# --- webdataset -------------------------------------------------------------------------------


def decode_members(sample: dict[str, Any]) -> tuple[bytes, torch.Tensor]:
    names = sorted(name for name in sample if name.endswith("jpg"))
    return json.loads(sample["json"]), decode([sample[name] for name in names])


def open_webdataset(data: Data, cores: int, state: Any) -> Stream:
    """Its state is a number of samples, which are read again."""
    import webdataset as wds

    stages = wds.WebDataset(
        list(map(str, data.tars)),
        shardshuffle=len(data.tars),
        seed=0,
        workersplitter=wds.split_by_worker,
    ).shuffle(SHUFFLE)
    if state:  # before decoding: nothing is cheaper
        stages = stages.slice(state // max(1, _workers(cores)), sys.maxsize)
    loader = wds.WebLoader(stages.map(decode_members), batch_size=None, num_workers=_workers(cores))
    return _counted(loader)


def _counted(loader: Any) -> Stream:
    count = itertools.count(1)
    number = [0]

    def items() -> Iterator[Taken]:
        for sample in loader:
            number[0] = next(count)
            yield _taken(sample)

    return Stream(items(), lambda: number[0])


# --- Megatron-Energon -------------------------------------------------------------------------


def prepare_energon(data: Data) -> None:
    from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

    folder = data.folder / "tars"
    BaseWebdatasetFactory.prepare_dataset(
        folder,
        [path.name for path in data.tars],
        split_parts_ratio=[("train", 1.0)],
        shuffle_seed=None,
        workers=1,
    )
    meta = folder / ".nv-meta" / "dataset.yaml"
    meta.write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")


def open_energon(data: Data, cores: int, state: Any) -> Stream:
    from megatron import energon

    class Encoder(energon.DefaultTaskEncoder):
        cookers = [energon.Cooker(energon.stateless(lambda sample: sample))]
        decoder = None

        @energon.stateless
        def encode_sample(self, sample: Any) -> Any:
            words, frames = decode_members(sample)
            return energon.basic_sample_keys(sample) | {"words": words, "frames": frames}

    dataset = energon.get_train_dataset(
        data.folder / "tars",
        split_part="train",
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=_workers(cores)),
        batch_size=None,
        shuffle_buffer_size=SHUFFLE,
        max_samples_per_sequence=SHUFFLE,
        task_encoder=Encoder(),
    )
    loader = energon.get_savable_loader(dataset)
    if state is not None:
        loader.restore_state_rank(state)
    items = (Taken(1, len(sample["frames"])) for sample in loader)
    return Stream(items, loader.save_state_rank)


# --- mosaicml-streaming -----------------------------------------------------------------------


def import_streaming() -> Any:
    """It imports torchvision for data sets that are not used here; its wheels need CUDA's torch."""
    if "torchvision" not in sys.modules and find_spec("torchvision") is None:
        names = ("torchvision", "torchvision.datasets", "torchvision.transforms.functional")
        for name in (*names, "torchvision.transforms"):
            sys.modules[name] = types.ModuleType(name)
        for module, name in (
            (names[1], "VisionDataset"),
            (names[1], "CIFAR10"),
            (names[2], "to_tensor"),
        ):
            setattr(sys.modules[module], name, object)
    import streaming

    return streaming


def prepare_mosaicml(data: Data) -> None:
    streaming = import_streaming()
    columns = {"words": "bytes", "frames": "bytes"}
    with streaming.MDSWriter(out=str(data.folder / "mds"), columns=columns) as writer:
        for words, jpegs in data.samples():
            writer.write({"words": words, "frames": pack(jpegs)})


def decode_packed(sample: dict[str, bytes]) -> tuple[bytes, torch.Tensor]:
    return json.loads(sample["words"]), decode(unpack(sample["frames"]))


def open_mosaicml(data: Data, cores: int, state: Any) -> Stream:
    streaming = import_streaming()

    class Decoded(streaming.StreamingDataset):  # type: ignore[misc, name-defined]
        def __getitem__(self, at: Any) -> Any:
            return decode_packed(super().__getitem__(at))

    streaming.base.util.clean_stale_shared_memory()
    dataset = Decoded(local=str(data.folder / "mds"), shuffle=True, batch_size=1)
    # several at a time cannot be joined, as their frames differ in number
    loader = streaming.StreamingDataLoader(
        dataset, batch_size=1, num_workers=_workers(cores), collate_fn=_counted_as_one
    )
    if state is not None:
        loader.load_state_dict(state)
    items = (_taken(batch["samples"][0]) for batch in loader)
    return Stream(items, loader.state_dict)


def _counted_as_one(samples: list[Any]) -> dict[str, list[Any]]:
    """Its state counts what the first value of a batch holds."""
    return {"samples": samples}


def _only(samples: list[Any]) -> Any:
    (sample,) = samples
    return sample


# --- litdata ----------------------------------------------------------------------------------


def prepare_litdata(data: Data) -> None:
    import litdata

    litdata.optimize(
        fn=_packed_of_tar,
        inputs=list(map(str, data.tars)),
        output_dir=str(data.folder / "litdata"),
        chunk_bytes="64MB",
        num_workers=1,
        start_method="fork",
    )


def _packed_of_tar(path: str) -> Iterator[dict[str, bytes]]:
    for words, jpegs in read_tar(Path(path)):
        yield {"words": words, "frames": pack(jpegs)}


def open_litdata(data: Data, cores: int, state: Any) -> Stream:
    import litdata

    class Decoded(litdata.StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return decode_packed(super().__getitem__(at))

    dataset = Decoded(str(data.folder / "litdata"), shuffle=True)
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=1, num_workers=_workers(cores), collate_fn=_only
    )
    if state is not None:
        loader.load_state_dict(state)
    return Stream(map(_taken, loader), loader.state_dict)


CONTESTANTS = {
    "ceiling": Contestant("simplejpeg", _loads("simplejpeg"), _nothing, open_ceiling),
    "saccade": Contestant("vlm", _loads("vlm.data.load.loader"), _nothing, open_saccade),
    "webdataset": Contestant("webdataset", _loads("webdataset"), _nothing, open_webdataset),
    "energon": Contestant(
        "megatron.energon", _loads("megatron.energon"), prepare_energon, open_energon
    ),
    "mosaicml": Contestant("streaming", import_streaming, prepare_mosaicml, open_mosaicml),
    "litdata": Contestant("litdata", _loads("litdata"), prepare_litdata, open_litdata),
}
