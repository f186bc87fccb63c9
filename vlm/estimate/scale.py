"""What more nodes give, on paper: communication, step, checkpoints, failures and price.

On top of ``vlm.estimate.estimate``, which counts memory and operations of a rank. Each rank runs
the same number of micro-batches, so that more nodes make a global step larger and the same samples
take fewer steps. Formulas and where constants are from are in docs/scale.md. Not here: anything
measured; ``launch/preflight.py`` and a run's own ``mfu_frac`` replace what is assumed.

P trains, F does not, N ranks, A micro-batches of a rank in a step.
"""

import math
from dataclasses import dataclass

from vlm.ckpt.interval import best_interval_s
from vlm.errors import ConfigError

#: bytes of a weight or gradient that is sent
SENT = 2
#: of a checkpoint, for each parameter that trains: fp32 weight and two moments
STATE_BYTES = 12
#: of the exported model in it, for each parameter
EXPORT_BYTES = 2
#: seconds for one collective to pass one node
HOP_S = 20e-6
#: until the hosts of a failed job train again: it is noticed, the launcher looks, ranks load
RESTART_S = 240.0
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Machines:
    """Rented nodes.

    Attributes:
        gpus_per_node: G.
        node_gbit: all links of a node to the others, Gbit/s.
        gpu_gbit: of a GPU to the others of its node, Gbit/s each way.
        link_frac: share of either that an all-reduce reaches.
        volume_mb_s: of the volume that checkpoints go to.
        gpu_mtbf_hours: between failures of one GPU and its share of the node.
        price: of a GPU for an hour; None: not known.
    """

    gpus_per_node: int
    node_gbit: float
    gpu_gbit: float
    link_frac: float
    volume_mb_s: float
    gpu_mtbf_hours: float
    price: float | None


@dataclass(frozen=True)
class Work:
    """One rank's, which does not change with the number of nodes.

    Attributes:
        compute_s: of a step, by ``vlm.estimate.estimate``.
        micro_batches: A.
        bucket: elements that are sent at a time.
        all_micro_batches: of the whole run, over all ranks.
    """

    num_trainable: int
    num_parameters: int
    compute_s: float
    micro_batches: int
    bucket: int
    all_micro_batches: int


@dataclass(frozen=True)
class Scaled:
    """On some number of nodes."""

    nodes: int
    num_gpus: int
    #: each rank sends so much in a step
    sent_bytes: float
    sending_s: float
    step_s: float
    #: share of a step that is computing
    busy_frac: float
    checkpoint_bytes: float
    checkpoint_s: float
    mtbf_hours: float
    #: between checkpoints: loses least
    interval_s: float
    #: of all time: saving, and what failures throw away and make wait
    lost_frac: float
    #: until all micro-batches are done, losses included
    num_steps: int
    hours: float
    price: float | None


def sent_bytes(stage: int, work: Work, num_gpus: int) -> float:
    """What each rank sends in one step, over rings.

    An all-reduce sends 2 (N-1)/N of its bytes from each rank, a reduce-scatter or an all-gather
    half of that. Stages 0 and 1 send gradients once a step, stages 2 and 3 after every micro-batch;
    stage 3 gathers all weights before each forward and each backward pass.

    Raises:
        ConfigError: there is no such stage.
    """
    ring = (num_gpus - 1) / num_gpus
    trained, every = SENT * work.num_trainable, SENT * work.num_parameters
    passes = work.micro_batches
    volumes = {
        0: 2 * trained,
        1: trained + trained,
        2: passes * trained + trained,
        3: passes * (2 * every + trained),
    }
    if stage not in volumes:
        raise ConfigError(f"ZeRO stage: found {stage}, expected 0, 1, 2 or 3")
    return ring * volumes[stage]


def scale(stage: int, work: Work, machines: Machines, nodes: int) -> Scaled:
    """Nothing that is sent hides behind computing, as with ``overlap_comm: false``.

    Args:
        stage: of ZeRO.
    """
    num_gpus = nodes * machines.gpus_per_node
    sent = sent_bytes(stage, work, num_gpus)
    gbit = machines.node_gbit if nodes > 1 else machines.gpu_gbit
    messages = math.ceil(sent / (SENT * work.bucket))
    sending_s = sent / (gbit * machines.link_frac * 1e9 / 8) + messages * (nodes - 1) * HOP_S
    if num_gpus == 1:
        sending_s = 0.0
    step_s = work.compute_s + sending_s
    checkpoint = STATE_BYTES * work.num_trainable + EXPORT_BYTES * work.num_parameters
    checkpoint_s = checkpoint / (machines.volume_mb_s * 1e6)
    mtbf_hours = machines.gpu_mtbf_hours / num_gpus
    lost, interval_s = _lost(checkpoint_s, SECONDS_PER_HOUR * mtbf_hours)
    num_steps = math.ceil(work.all_micro_batches / (num_gpus * work.micro_batches))
    hours = num_steps * step_s / SECONDS_PER_HOUR / (1 - lost)
    return Scaled(
        nodes=nodes,
        num_gpus=num_gpus,
        sent_bytes=sent,
        sending_s=sending_s,
        step_s=step_s,
        busy_frac=work.compute_s / step_s,
        checkpoint_bytes=checkpoint,
        checkpoint_s=checkpoint_s,
        mtbf_hours=mtbf_hours,
        interval_s=interval_s,
        lost_frac=lost,
        num_steps=num_steps,
        hours=hours,
        price=None if machines.price is None else hours * num_gpus * machines.price,
    )


def _lost(save_s: float, mtbf_s: float) -> tuple[float, float]:
    """Share of time that is lost at the best interval, and the interval."""
    interval_s = best_interval_s(save_s, mtbf_s)
    saving = save_s / (interval_s + save_s)
    failing = (interval_s / 2 + RESTART_S) / mtbf_s
    return min(0.99, saving + failing), interval_s
