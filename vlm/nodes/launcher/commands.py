"""The same job by other launchers: torchrun and ``deepspeed --no_ssh`` on each host, and sbatch.

Text to copy; nothing is started. Values of secrets are left out. Not here: what launch/run.py does
beyond these (watching, restarting, ending).
"""

import shlex
from collections.abc import Mapping, Sequence

from vlm.nodes.agent.environment import is_secret
from vlm.nodes.hosts.hostfile import Host
from vlm.nodes.hosts.preflight import communication_env
from vlm.nodes.launcher.connection import Job


def torchrun(job: Job, hosts: Sequence[Host], port: int) -> str:
    """A command for each host, to be run there."""
    parts = []
    for rank, host in enumerate(hosts):
        argv = [job.python, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}"]
        argv += [f"--node_rank={rank}", f"--nproc_per_node={host.slots}"]
        argv += [f"--master_addr={_master(hosts)}", f"--master_port={port}", *job.argv]
        parts.append(_on(host, job, argv))
    return "\n".join(parts)


def deepspeed(job: Job, hosts: Sequence[Host], port: int) -> str:
    """A command for each host; each reads the same hostfile, with DeepSpeed's fields alone."""
    lines = [f"{host.name} slots={host.slots}" for host in hosts]
    made = f"printf '%s\\n' {shlex.join(lines)} > hostfile.plain\n"
    parts = []
    for rank, host in enumerate(hosts):
        argv = ["deepspeed", "--hostfile", "hostfile.plain", "--no_ssh", "--node_rank", str(rank)]
        argv += ["--master_addr", _master(hosts), "--master_port", str(port), *job.argv]
        parts.append(_on(host, job, argv, made))
    return "\n".join(parts)


def sbatch(job: Job, hosts: Sequence[Host], port: int) -> str:
    """One script; all hosts have as many slots as the first, or SLURM could not say it."""
    slots = hosts[0].slots
    argv = [job.python, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}"]
    argv += [f"--nproc_per_node={slots}"]
    meet = f"--node_rank=$SLURM_NODEID --master_addr=$MASTER_ADDR --master_port={port}"
    own = f"exec {shlex.join(argv)} {meet} {shlex.join(job.argv)}"
    lines = [
        "#!/bin/bash",
        f"#SBATCH --nodes={len(hosts)}",
        "#SBATCH --ntasks-per-node=1",
        *([] if job.env.get("DS_ACCELERATOR") == "cpu" else [f"#SBATCH --gpus-per-node={slots}"]),
        "#SBATCH --signal=TERM@120",
        *_exports({**communication_env(hosts[0].iface), **job.env}),
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_ADDR",
        f"cd -- {shlex.quote(str(job.folder))} || exit 1",
        f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(own)}",
    ]
    return "".join(f"{line}\n" for line in lines)


def _master(hosts: Sequence[Host]) -> str:
    return hosts[0].addr or hosts[0].name


def _on(host: Host, job: Job, argv: Sequence[str], before: str = "") -> str:
    exports = "".join(
        f"{line}\n" for line in _exports({**communication_env(host.iface), **job.env})
    )
    cd = f"cd -- {shlex.quote(str(job.folder))}"
    return f"# on {host.name}\n{exports}{cd}\n{before}{shlex.join(argv)}\n"


def _exports(env: Mapping[str, str]) -> list[str]:
    return [
        f"# export {name}=...  (not shown; set it yourself)"
        if is_secret(name)
        else f"export {name}={shlex.quote(value)}"
        for name, value in env.items()
    ]
