"""What a run needs of its hosts, and a look at whether they have it.

Shared by ``launch/preflight.py`` and ``launch/run.py``. Not here: the look itself
(``vlm.nodes.hosts.preflight``).
"""

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm.arguments import amount, positive
from vlm.ckpt.files import sha256
from vlm.config import Recipe
from vlm.data.manifest import manifest
from vlm.data.storage import remote
from vlm.nodes.hosts import preflight, ssh
from vlm.nodes.hosts.hostfile import Host
from vlm.nodes.hosts.verdict import Verdict, Wanted

#: of the shards, so many are looked at on every host
MAX_SHARDS = 1000
#: folders that programs fill unseen
CACHES = ("HF_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of every program that looks at hosts."""
    parser.add_argument("--hostfile", type=Path, required=True)
    parser.add_argument("--master-port", type=positive, default=29500, help="(default: 29500)")
    parser.add_argument(
        "--min-free-gb", type=amount, default=20.0, help="on each disk (default: 20)"
    )
    parser.add_argument("--python", default=sys.executable, help="on each host (default: this one)")
    parser.add_argument("--known-hosts", type=Path, metavar="FILE", help="in place of ssh's own")
    parser.add_argument("--quick", action="store_true", help="no all-reduce, no matrix product")


@dataclass(frozen=True)
class Looker:
    """Looks at hosts for one run.

    Attributes:
        wanted: of each host.
        files: bytes of shards that have to be there.
    """

    wanted: Wanted
    files: dict[str, int]
    python: str
    port: int
    known_hosts: Path | None

    def look(self, hosts: Sequence[Host]) -> list[Verdict]:
        return self._look(hosts, self.port)

    def glance(self, hosts: Sequence[Host]) -> list[Verdict]:
        """Each by itself, while a job runs on others."""
        return self._look(hosts, None)

    def _look(self, hosts: Sequence[Host], port: int | None) -> list[Verdict]:
        return preflight.look(
            hosts,
            self._run,
            python=self.python,
            folder=Path.cwd(),
            wanted=self.wanted,
            files=self.files,
            port=port,
        )

    def exercise(self, found: Sequence[Verdict]) -> float | None:
        """Bus bandwidth in Gbit/s; what is slow stands in the verdicts."""
        return preflight.exercise(
            found,
            self._run,
            python=self.python,
            folder=Path.cwd(),
            port=self.port,
            cpu=not self.wanted.gpus,
        )

    @property
    def _run(self) -> preflight.Run:
        return functools.partial(
            ssh.run, timeout_s=preflight.TIMEOUT_S, known_hosts=self.known_hosts
        )


def looker(args: argparse.Namespace, recipe: Recipe | None) -> Looker:
    """
    Args:
        args: parsed by what ``add_arguments`` was given to.
        recipe: of the run: its folders, manifests and shards; None: it has none.
    """
    output, manifests = Path.cwd(), {}
    files: dict[str, int] = {}
    if recipe is not None:
        output = recipe.output_dir / "checkpoints"
        for path in (source.manifest for source in (*recipe.data.train, recipe.data.eval)):
            shards = manifest.load(path).shards
            manifests[str(path.absolute())] = sha256(path)
            local = [s for s in shards if not remote.is_remote(s.location)]
            every = -(-len(local) // MAX_SHARDS) or 1
            files |= {shard.location: shard.bytes for shard in local[::every]}
    caches = [Path(os.environ[name]) for name in CACHES if os.environ.get(name)]
    paths = [output, *caches, Path(tempfile.gettempdir())]
    unique = tuple(dict.fromkeys(str(path.absolute()) for path in paths))
    gpus = os.environ.get("DS_ACCELERATOR") != "cpu"
    wanted = Wanted(unique, manifests, int(args.min_free_gb * 1e9), gpus)
    return Looker(wanted, files, args.python, args.master_port, args.known_hosts)
