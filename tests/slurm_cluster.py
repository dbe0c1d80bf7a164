"""A SLURM cluster of this one machine, for tests: munged, slurmctld and slurmd in a folder of their own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue")


def why_not() -> str:
    """Why no cluster can be started here; "" where it can."""
    missing = [p for p in PROGRAMS if not shutil.which(p)]
    if missing:
        return f"no {', '.join(missing)} here: `make env-slurm` installs SLURM on Debian"
    return "" if os.geteuid() == 0 else "SLURM's daemons need root"


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nothing listens on: several clusters may run at a time."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            first = one.getsockname()[1]
        try:
            for port in range(first, first + count):
                socket.create_server(("", port)).close()
        except (OSError, OverflowError):
            continue
        return first


def _configuration(folder: Path, host: str, cpus: int, nodes: list[str]) -> str:
    port = free_ports(1 + len(nodes))
    ports = f"[{port + 1}-{port + len(nodes)}]" if len(nodes) > 1 else str(port + 1)
    return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
JobRequeue=1
KillWait=5
OverTimeLimit=0
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName={",".join(nodes)} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} \\
  CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes={",".join(nodes)} Default=YES MaxTime=INFINITE State=UP
"""


def _ask(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=30).stdout


class NotUp(Exception):
    """The daemons do not run on this machine, in a container without what they need for instance."""


@contextmanager
def cluster(nodes: int = 1) -> Iterator[Path]:
    """Start one, and stop it afterwards. Programs of SLURM find it by the environment while it is there.

    Args:
        nodes: how many; each is a slurmd of this machine with a name of its own.

    Yields:
        Its folder, with its logs. It is none of pytest's: the path of a socket in it may have 107 letters.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm_"))
    host = socket.gethostname().split(".")[0]
    names = [f"node{i}" for i in range(1, nodes + 1)]
    for name in ("state", "munge", *(f"spool/{node}" for node in names)):
        (folder / name).mkdir(parents=True)
    file = folder / "slurm.conf"
    file.write_text(
        _configuration(folder, host, max(1, (os.cpu_count() or 1) // nodes), names), encoding="utf-8"
    )
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    folder.chmod(0o755)
    munge = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key"]
    munge += [f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge/pid"]
    munge += [f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed"]
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(file)
    daemons = []
    try:
        for command in (munge, ["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", name] for name in names)):
            log = open(folder / f"{command[0]}-{command[-1].strip('-')[:8]}.out", "wb")  # noqa: SIM115 (closed with the daemon)
            daemons.append((subprocess.Popen(command, stdout=log, stderr=log), log))
            time.sleep(1)
        deadline = time.monotonic() + 60
        while _ask("sinfo", "-h", "-N", "-o", "%t").split() != ["idle"] * nodes:
            if time.monotonic() > deadline:
                logs = "".join(p.read_text(errors="replace")[-800:] for p in folder.glob("*.out"))
                raise NotUp(f"SLURM did not come up: {_ask('sinfo')}{logs}")
            time.sleep(0.5)
        yield folder
    finally:
        _ask("scancel", "--full", "--user", "root")
        time.sleep(1)
        for daemon, log in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
            log.close()
        if before is None:
            os.environ.pop("SLURM_CONF")
        else:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)
