"""Runs of a batch as jobs of a SLURM cluster. The one place that knows submitit (the extra `slurm`)."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smae_utils.batch.runs import Batch, execute
from smae_utils.errors import UserError

# Of what waits, reasons that pass by themselves.
PATIENT = ("None", "Priority", "Resources", "BeginTime", "JobArrayTaskLimit", "Cleaning")
# So often a job may reach its time limit and go on; submitit's own limit is three.
MOST_TIMEOUTS = 1000
# Seconds between two questions to the cluster.
ASK_EVERY = 5.0


class Executed:
    """What a job does. On a time limit or a preemption submitit calls `checkpoint` and requeues the job."""

    def __call__(self, out: str, name: str) -> str:
        return execute(out, name)

    def checkpoint(self, out: str, name: str) -> Any:
        """The same again: what is trained by then is found by the notebook."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, out, name)


class SlurmJobs:
    """Starts what is ready as one job array; the cluster decides how many run at a time.

    A job that could not be launched on its node is held by SLURM until somebody releases it. It is
    taken back here, so that the batch can submit it again. Any other hold is somebody's will: it
    is told, and waited for.

    Args:
        report: is told of held jobs.
        parameters: as submitit names them: `timeout_min`, `slurm_partition`, `cpus_per_task`,
            `gpus_per_node`, `mem_gb`, `slurm_array_parallelism` ...
    """

    def __init__(self, batch: Batch, parameters: dict[str, Any], report: Callable[[str], None] = print):
        try:
            import submitit
        except ImportError:
            raise UserError("--backend slurm needs submitit: pip install 'smae-utils[slurm]'") from None
        self.batch, self.report = batch, report
        try:
            self.executor = submitit.AutoExecutor(
                batch.out / "slurm", cluster="slurm", slurm_max_num_timeout=MOST_TIMEOUTS
            )
            self.executor.update_parameters(name="smae", **parameters)
        except (RuntimeError, NameError, TypeError) as error:
            text = " ".join(str(error).split())[:300]
            raise UserError(
                f"SLURM cannot be used so: {text}. Is sbatch there, and are the names submitit's?"
            ) from None
        self.jobs: dict[str, Any] = {}
        self.told: set[tuple[str, str]] = set()
        self.asked = -math.inf
        # Those that are over by now are found out as soon as the cluster answers.
        for name, number in batch.slurm_jobs().items():
            if name in {run.name for run in batch.runs}:
                self.jobs[name] = submitit.SlurmJob(folder=batch.out / "slurm", job_id=number)

    def taken_over(self) -> list[str]:
        """Runs whose jobs an earlier runner, which was killed, left to the cluster."""
        return list(self.jobs)

    def start(self, names: Sequence[str]) -> list[str]:
        """Submit all of these as one array."""
        if names:
            from submitit.core.utils import FailedJobError

            try:
                jobs = self.executor.map_array(Executed(), [str(self.batch.out)] * len(names), names)
            except FailedJobError as error:
                text = " ".join(str(error).split())[:300]
                raise UserError(f"SLURM takes no job: {text}. Look at what --slurm says") from None
            self.jobs.update(zip(names, jobs))
            self.batch.save_slurm_jobs({name: job.job_id for name, job in self.jobs.items()})
        return list(names)

    def ended(self) -> list[str]:
        """Runs whose job the cluster knows no more, however it ended."""
        if not self.jobs or time.monotonic() - self.asked < ASK_EVERY:
            return []
        self.asked = time.monotonic()
        known = self._known()
        if known is None:
            return []
        names = [name for name, job in self.jobs.items() if not self._goes_on(name, job, known)]
        for name in names:
            self.jobs.pop(name)
        return names

    def _known(self) -> dict[str, tuple[str, str]] | None:
        """State and reason of each job of this user; None while the controller is busy or restarts."""
        # submitit would ask the accounting of the cluster, which many have not.
        words = ["squeue", "--me", "--noheader", "--array", "--format=%i %T %r"]
        try:
            answer = subprocess.run(words, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            return None
        if answer.returncode:
            return None
        lines = (line.strip().split(" ", 2) for line in answer.stdout.splitlines() if line.strip())
        return {number: (state, why) for number, state, why in lines}

    def _goes_on(self, name: str, job: Any, known: Mapping[str, tuple[str, str]]) -> bool:
        """Whether the cluster will do something with a job; `known` says why a job waits."""
        if job.job_id not in known:
            return False
        state, why = known[job.job_id]
        if state != "PENDING":
            return True
        if "launch failed" in why.lower():
            self.report(f"{name}: taken back, job {job.job_id} could not be launched on its node ({why})")
            job.cancel(check=False)
            return False
        if why not in PATIENT and (name, why) not in self.told:
            self.told.add((name, why))
            free = f"; 'scontrol release {job.job_id}' lets it go" if "held" in why.lower() else ""
            self.report(f"{name}: job {job.job_id} waits, {why}{free}")
        return True

    def stop(self) -> None:
        """Take back what was submitted and is not over. (A killed runner leaves its jobs to the cluster.)"""
        for job in self.jobs.values():
            job.cancel(check=False)
        self.jobs.clear()
