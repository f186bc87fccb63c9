"""Runs a job on all hosts of a hostfile and watches over it: looks, starts, restarts, ends.

    python launch/run.py --hostfile hostfile -- \\
        launch/train.py --ds_config ds_configs/zero2.json --recipe recipes/R.yaml optim.lr=1e-4

Start it in the checkout; the same path has to hold it on every host. A hostfile with the one line
`localhost slots=N` runs on this machine, without ssh; DS_ACCELERATOR=cpu runs without GPUs.
docs/multi-node.md says what happens when something fails.

Exit codes: 0 all ranks ended well, 2 a mistake to mend, 75 stopped with all saved, else the code of
the rank that failed first (128 + n: killed by signal n), or 1 where a host was lost.
"""

import argparse
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from vlm import config, log
from vlm.arguments import amount, count
from vlm.config import Recipe
from vlm.errors import ConfigError, command
from vlm.nodes.agent import environment
from vlm.nodes.hosts import hostfile
from vlm.nodes.hosts.hostfile import Host
from vlm.nodes.hosts.verdict import Verdict
from vlm.nodes.launcher import commands, folder, launcher
from vlm.nodes.launcher.connection import Job
from vlm.nodes.launcher.launcher import Launcher, Plan
from vlm.nodes.launcher.record import LOGS, Record
from vlm.nodes.launcher.restart import Restarts
from vlm.train import arguments, hosts

TRAIN = "launch/train.py"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
#: of an agent and a launcher that do not hear each other
SILENCE_S = 60.0


def main(argv: Sequence[str]) -> int:
    args, script = _parse(argv)
    log.setup()
    listed = hostfile.read(args.hostfile)
    recipe = _recipe(script)
    job_folder = _job_folder(args, recipe)
    env = environment.collect(os.environ, args.env_file, args.env)
    if args.print:
        _print(_job(args, script, job_folder, env), listed, args.master_port)
        return 0
    if args.detach:
        own = [argument for argument in argv[: argv.index("--")] if argument != "--detach"]
        pid = folder.detach([sys.executable, __file__, *own, "--", *script], job_folder)
        sys.stdout.write(f"started as process {pid}; python launch/status.py {job_folder}\n")
        return 0
    with folder.held(job_folder):
        record = Record(job_folder, str(job_folder), environment.secrets(env))
        plan = _plan(args, listed, script, recipe, job_folder, env, record)
        max_hours = None if recipe is None else recipe.train.max_hours
        restarts = Restarts(args.max_restarts, None if max_hours is None else 3600 * max_hours)
        made = Launcher(plan, restarts, record)

        def stop(number: int, frame: FrameType | None) -> None:
            """The first one asks; the next one ends the launcher, and with it the agents."""
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            made.stop()

        for number in SIGNALS:
            signal.signal(number, stop)
        return launcher.run(made, record)


def _plan(
    args: argparse.Namespace,
    listed: Sequence[Host],
    script: Sequence[str],
    recipe: Recipe | None,
    job_folder: Path,
    env: dict[str, str],
    record: Record,
) -> Plan:
    looker = hosts.looker(args, recipe)

    def first_look(listed: Sequence[Host]) -> list[Verdict]:
        record.say(f"looking at {len(listed)} hosts; this job is in {job_folder}")
        found = looker.look(listed)
        if not args.quick and all(verdict.ok for verdict in found):
            looker.exercise(found)
        return found

    job = _job(args, script, job_folder, env)
    micro_batches = None if recipe is None else recipe.data.micro_batches
    looks = (first_look, looker.look, looker.glance)
    return Plan(job, listed, args.master_port, micro_batches, *looks)


def _job(
    args: argparse.Namespace, script: Sequence[str], job_folder: Path, env: dict[str, str]
) -> Job:
    return Job(
        mark=secrets.token_hex(8),
        argv=tuple(script),
        python=args.python,
        folder=Path.cwd(),
        logs=job_folder / LOGS,
        env=env,
        grace_s=args.grace_s,
        silence_s=SILENCE_S,
        hang_s=args.hang_s,
        known_hosts=args.known_hosts,
    )


def _print(job: Job, listed: Sequence[Host], port: int) -> None:
    """The same job by other launchers."""
    for title, made in (
        ("torchrun", commands.torchrun),
        ("deepspeed --no_ssh", commands.deepspeed),
        ("sbatch: save as job.sh, then `sbatch job.sh`", commands.sbatch),
    ):
        sys.stdout.write(f"### {title}\n{made(job, listed, port)}\n")


def _recipe(script: Sequence[str]) -> Recipe | None:
    """Of what is to run: its folders, data, micro-batches; None: it is not ours to know."""
    if not Path(script[0]).is_file():
        raise ConfigError(f"found no script {script[0]}; expected one such as {TRAIN} behind `--`")
    if Path(script[0]).resolve() != Path(TRAIN).resolve():
        return None
    found = arguments.parse(script[1:], "what launch/train.py takes")
    return config.load(found.recipe, found.overrides)


def _job_folder(args: argparse.Namespace, recipe: Recipe | None) -> Path:
    if args.job is not None:
        return args.job.absolute()
    if recipe is None:
        raise ConfigError("--job FOLDER is needed for another script than launch/train.py")
    return (recipe.output_dir / "launch").absolute()


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --detach must be found again by its name
    )
    hosts.add_arguments(parser)
    parser.add_argument("--job", type=Path, help="folder of logs and state (OUTPUT_DIR/launch)")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="for the ranks; NAME alone takes its value from here, which no `ps` shows",
    )
    parser.add_argument("--env-file", type=Path, help="lines NAME=VALUE, for the ranks")
    parser.add_argument("--grace-s", type=amount, default=120.0, help="to save in (default: 120)")
    parser.add_argument("--hang-s", type=amount, default=300.0, help="for a step (default: 300)")
    parser.add_argument("--max-restarts", type=count, default=5, help="after failures (default: 5)")
    parser.add_argument("--print", action="store_true", help="other launchers' commands, no start")
    parser.add_argument("--detach", action="store_true", help="leave it running in the background")
    if "--" not in argv:
        if {"-h", "--help"} & set(argv):
            parser.print_help()
            sys.exit(0)
        raise ConfigError(f"found no `--`; expected it before the script: ... -- {TRAIN} ...")
    cut = list(argv).index("--")
    script = list(argv[cut + 1 :])
    if not script:
        raise ConfigError(f"found nothing behind `--`; expected a script such as {TRAIN}")
    return parser.parse_args(argv[:cut]), script


if __name__ == "__main__":
    command(main)()
