"""The real SLURM on this machine: controller and three nodes in one private directory, on the loopback, with no trace elsewhere.

`localhost` is a machine of its own (partition ci, the default); `n1` and `n2` are two that share it (partition pair). Their names do not
resolve, so that a job on them has to export MASTER_ADDR.
"""

import contextlib
import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("localhost", "n1", "n2")
# Accounting, which a private scheduler has not, is where submitit asks about its jobs: the queue answers for it.
SACCT = """#!/bin/sh
while [ $# -gt 1 ]; do
  [ "$1" = -j ] && ids="$ids${ids:+,}$2"
  shift
done
echo 'JobID|State|NodeList'
squeue -h -r -t all -j "$ids" -o '%i|%T|%N'
"""
CONF = """ClusterName=citest
SlurmctldHost=localhost
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={base}/run/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={ports[0]}
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd-%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=20
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}] CPUs=4 RealMemory=2000 State=UNKNOWN
NodeName=localhost NodeAddr=127.0.0.1 Port={ports[3]} CPUs=4 RealMemory=2000 State=UNKNOWN
PartitionName=ci Nodes=localhost Default=YES MaxTime=INFINITE DefaultTime=00:10:00 State=UP
PartitionName=pair Nodes=n1,n2 MaxTime=INFINITE DefaultTime=00:10:00 State=UP
"""


def missing():
    """Why there can be no scheduler here; None where there can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    absent = [
        name
        for name in (*DAEMONS, "srun", "sbatch", "scontrol")
        if shutil.which(name, path=path) is None
    ]
    return (
        f"not installed: {', '.join(absent)} (`make test-slurm` installs them)" if absent else None
    )


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return sorted(probe.getsockname()[1] for probe in probes)


class Scheduler:
    """Runs between `start` and `stop`.

    Args:
        base: a folder that the users of jobs can read.
        path: folders of further commands for the jobs, first of all.
    """

    def __init__(self, base, *path):
        self.base = Path(base).resolve()
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "HYDRA", "SUBMITIT", "MASTER_"))
        }
        self.env["SLURM_CONF"] = str(self.base / "slurm.conf")
        self.env["PATH"] = ":".join([
            *map(str, path),
            str(self.base / "bin"),
            self.env.get("PATH", ""),
            "/usr/sbin",
        ])

    def start(self):
        """Write key and configuration, start the daemons, wait until the nodes are idle."""
        for folder in ("state", "log", "run", "bin", *(f"spool/{node}" for node in NODES)):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        host = socket.gethostname().partition(".")[0]
        (self.base / "slurm.conf").write_text(
            CONF.format(user=getpass.getuser(), base=self.base, host=host, ports=_free_ports(4))
        )
        key = self.base / "run" / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        sacct = self.base / "bin" / "sacct"
        sacct.write_text(SACCT)
        sacct.chmod(0o755)
        names = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "seed-file": "munge.seed",
        }
        self.call(
            "munged",
            f"--log-file={self.base}/log/munged.log",
            *(f"--{k}={self.base}/run/{v}" for k, v in names.items()),
        )
        self.call("slurmctld")
        for node in NODES:
            self.call("slurmd", "-N", node)
        self.until(
            lambda: self.call("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(NODES),
            "the nodes are idle",
            20,
        )

    def stop(self):
        """End jobs and daemons; give the logs of the daemons back."""
        self.call("scancel", "--full", "--signal=KILL", "--user", getpass.getuser(), check=False)
        for pid_file in sorted((self.base / "run").glob("*.pid"), reverse=True):
            self.call("kill", pid_file.read_text().strip(), check=False)
        self.until(lambda: not list((self.base / "run").glob("*.pid")), "the daemons are gone", 20)

    def logs(self, lines=8):
        """The ends of the daemons' logs, for a report of what went wrong."""
        return "\n".join(
            f"== {p.name}\n" + "\n".join(p.read_text().splitlines()[-lines:])
            for p in sorted((self.base / "log").iterdir())
        )

    def call(self, *command, check=True, timeout=60, **options):
        """Standard output of a command of SLURM; of what it says on an error too."""
        done = subprocess.run(
            command,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **options,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(command)}: rc {done.returncode}\n{done.stdout}{done.stderr}\n{self.logs()}"
            )
        return done.stdout

    def job(self, number):
        """What `scontrol show job` says, as a dictionary."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", str(number))))

    def end(self, number):
        """How a job has ended, None while it has not."""
        state = self.job(number)["JobState"]
        return state if state not in {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"} else None

    def until(self, condition, what, seconds=60, output=None):
        """Wait until a condition is true, and return its value."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > deadline:
                said = output.read_text()[-3000:] if output is not None and output.exists() else ""
                raise TimeoutError(
                    f"not after {seconds} s: {what}\n{said}\n{self.call('squeue', check=False)}\n{self.logs()}"
                )
            time.sleep(0.1)
        return found

    def wait(self, number, state="COMPLETED", seconds=60, output=None):
        """Wait until a job has ended, and then in this state; a requeued job is let go on two seconds later."""

        def ended():
            job = self.job(number)
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                # A node refuses what was allowed in the second in which it ended the job ("Job credential revoked").
                time.sleep(2)
                self.call("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)
            return self.end(number)

        found = self.until(ended, f"job {number} has ended", seconds, output)
        if found != state:
            said = output.read_text()[-3000:] if output is not None and output.exists() else ""
            raise RuntimeError(f"job {number} is {found}, not {state}\n{said}\n{self.logs()}")
