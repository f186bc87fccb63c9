"""A job from start to end: looks at the hosts, starts an attempt, restarts, takes hosts back.

Not here: one attempt (``vlm.nodes.launcher.supervise``), when to restart
(``vlm.nodes.launcher.restart``), what is written down (``vlm.nodes.launcher.record``).
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlm.errors import EXIT_FAULTS, EXIT_PREEMPTED
from vlm.nodes.agent.leftovers import MARK
from vlm.nodes.hosts import ssh
from vlm.nodes.hosts.hostfile import Host
from vlm.nodes.hosts.verdict import Verdict, line
from vlm.nodes.launcher import restart
from vlm.nodes.launcher.connection import Job, Place
from vlm.nodes.launcher.outcome import Outcome
from vlm.nodes.launcher.record import Record
from vlm.nodes.launcher.restart import Restarts
from vlm.nodes.launcher.supervise import TICK_S, Attempt

#: between looks at hosts that are not in use
RETURN_S = 60.0
SWEEP_S = 60.0

#: what preflight says of hosts, in their order
Look = Callable[[Sequence[Host]], list[Verdict]]


@dataclass(frozen=True)
class Plan:
    """What is to run, and where.

    Attributes:
        first_look: of all hosts, before anything starts: all of them have to pass.
        look: again, before a restart.
        glance: at hosts that are not in use, while the others are.
        micro_batches: of a global step, which ranks have to share evenly; None: no matter.
        return_s: between looks at hosts that are not in use.
    """

    job: Job
    hosts: Sequence[Host]
    port: int
    micro_batches: int | None
    first_look: Look
    look: Look
    glance: Look
    return_s: float = RETURN_S


class Launcher:
    """``Launcher(plan, restarts, record).run()`` gives the job's exit code."""

    def __init__(self, plan: Plan, restarts: Restarts, record: Record) -> None:
        self._plan, self._restarts, self._record = plan, restarts, record
        self._attempt: Attempt | None = None
        #: set by a signal handler, so no lock
        self._asked = False
        self._num_attempts = 0
        #: hosts that were to be taken back; those that then did not pass beside the others
        self._back: set[str] = set()
        self._refused: set[str] = set()

    def stop(self) -> None:
        """Ends the job with a checkpoint. From any thread or signal handler."""
        self._asked = True
        if self._attempt is not None:
            self._attempt.stop()

    def run(self) -> int:
        found = self._plan.first_look(self._plan.hosts)
        for verdict in found:
            self._record.say(line(verdict))
        if not all(verdict.ok for verdict in found):
            self._record.say("not started: a host does not pass; mend it or leave it out")
            return EXIT_FAULTS
        code = EXIT_PREEMPTED  # told to stop before anything began: nothing is lost
        while not self._asked:
            chosen = restart.places(found, self._plan.micro_batches)
            if chosen:
                outcome, lasted_s = self._run_once(chosen)
                code = outcome.code
                asked = self._asked
                decision = self._restarts.after(outcome, lasted_s, asked=asked)
            else:
                outcome, decision = Outcome(code, None, frozenset()), self._restarts.after_failure()
                self._record.say("no host is left that could run it")
            self._count(decision, code)
            unswept = self._sweep(outcome)
            if decision.wait_s is None:
                break
            # a host that cannot be reached ends its ranks by itself, by then
            fence_s = self._plan.job.silence_s + self._plan.job.grace_s if unswept else 0.0
            self._wait(max(decision.wait_s, fence_s))
            if self._asked:
                break
            found = self._look_again()
        return code

    def _look_again(self) -> list[Verdict]:
        found = self._plan.look(self._plan.hosts)
        for verdict in found:
            if not verdict.ok:
                self._record.say(line(verdict))
        # or it would be taken back for ever: alone it passes
        self._refused |= {v.host.name for v in found if not v.ok and v.host.name in self._back}
        self._back.clear()
        return found

    def _wait(self, seconds: float) -> None:
        stop = time.monotonic() + seconds
        while not self._asked and time.monotonic() < stop:
            time.sleep(TICK_S)

    def _count(self, decision: restart.Decision, code: int) -> None:
        self._record.state |= {
            "num_failures": self._restarts.num_failures,
            "num_preemptions": self._restarts.num_preemptions,
            "phase": "ending" if decision.wait_s is None else "waiting",
        }
        wait = "" if not decision.wait_s else f"; waiting {decision.wait_s:.0f} s"
        self._record.say(f"code {code}: {decision.why}{wait}")

    def _run_once(self, chosen: Sequence[Place]) -> tuple[Outcome, float]:
        self._num_attempts += 1
        used = {place.host.name for place in chosen}
        unused = [host for host in self._plan.hosts if host.name not in used]
        spare = [host for host in unused if host.name not in self._refused]
        self._record.begin(self._num_attempts, chosen, [host.name for host in unused])
        ranks = sum(place.num_ranks for place in chosen)
        text = f"attempt {self._num_attempts}: {ranks} ranks on {', '.join(sorted(used))}"
        if idle := sum(place.host.slots for place in chosen) - ranks:
            text += f"; {idle} slots idle, as {self._plan.micro_batches} micro-batches are shared"
        self._record.say(text)
        begun = time.monotonic()
        self._attempt = attempt = Attempt(
            self._plan.job, chosen, self._plan.port, secrets.token_hex(8), self._hear
        )
        if self._asked:  # while it was made
            attempt.stop()
        over = threading.Event()
        watcher = threading.Thread(
            target=self._take_back, args=(spare, chosen, attempt, over), daemon=True
        )
        if spare:
            watcher.start()
        try:
            outcome = attempt.wait()
        finally:
            over.set()
        self._record.end(outcome, attempt.stacks)
        return outcome, time.monotonic() - begun

    def _hear(self, index: int, event: dict) -> None:
        if self._attempt is not None:
            self._record.state["median_step_s"] = self._attempt.median_step_s
        self._record.event(index, event)

    def _take_back(
        self,
        spare: Sequence[Host],
        chosen: Sequence[Place],
        attempt: Attempt,
        over: threading.Event,
    ) -> None:
        """Stops the attempt, with a checkpoint, when more ranks could run."""
        slots = sum(place.host.slots for place in chosen)
        ranks = sum(place.num_ranks for place in chosen)
        while not over.wait(self._plan.return_s):
            good = [verdict for verdict in self._plan.glance(spare) if verdict.ok]
            more = slots + sum(verdict.host.slots for verdict in good)
            if restart.world_size(more, self._plan.micro_batches) > ranks and not over.is_set():
                self._back = {verdict.host.name for verdict in good}
                names = ", ".join(sorted(self._back))
                self._record.say(f"{names} is back: saving, to go on with more ranks")
                attempt.stop()
                return

    def _sweep(self, outcome: Outcome) -> bool:
        """Ends what is left on hosts whose connection was lost; whether one did not answer."""
        lost = [host for host in self._plan.hosts if host.name in outcome.lost]
        if not lost:
            return False
        job = self._plan.job

        def sweep(host: Host) -> bool:
            mark = {MARK: f"{job.mark}/{host.name}"}
            text = ssh.script([job.python, "-m", "vlm.nodes.agent.leftovers"], job.folder, mark)
            answer = ssh.run(host, text, timeout_s=SWEEP_S, known_hosts=job.known_hosts)
            return answer.code == 0

        swept = ssh.on_all(lost, sweep)
        for host, clean in zip(lost, swept, strict=True):
            state = "nothing is left there" if clean else "cannot be looked at"
            self._record.say(f"{host.name}: {state}")
        return not all(swept)


def run(launcher: Launcher, record: Record) -> int:
    """To the end, whatever happens; the record says how."""
    code = EXIT_FAULTS
    try:
        code = launcher.run()
    finally:
        with contextlib.suppress(OSError):
            record.finish(code)
    return code
