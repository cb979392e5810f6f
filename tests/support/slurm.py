# SPDX-License-Identifier: Apache-2.0
"""A Slurm cluster of two nodes on this machine, and jobs on it, for tests of launch scripts.

    with cluster() as slurm, slurm.job("launch/model.sbatch", "generate", ..., MODEL=folder) as job:
        assert job.wait() == ("COMPLETED", "0:0"), job.output()

Both nodes are this machine, so files, ports and the loopback are shared: that nodes are apart is not tested by it.
"""

import getpass
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv")

# What decides where ranks go: a user's shell, or a launcher that runs the tests, may have set it.
PLACE = re.compile(r"(MODEL|TP|NPROC_PER_NODE|NNODES|NODE_RANK|(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|(MASTER|SLURM)_.*)$")

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
FirstJobId={first_job}
KillWait=5
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=10:00 State=UP
"""


def launch_environment(**more) -> dict[str, str]:
    """For launch scripts: this process's, with this interpreter, ranks over the loopback, and `more`."""
    kept = {key: value for key, value in os.environ.items() if not PLACE.match(key)}
    own = {"SETUP": "0", "PYTHON": sys.executable, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    return kept | own | {key: str(value) for key, value in more.items()}


def missing() -> list[str]:
    """What a cluster needs and this machine does not have."""
    return [name for name in TOOLS if not _find(name)]


@contextmanager
def cluster():
    """A running Cluster. At the end its jobs are cancelled, and its daemons ended."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path has to be short
    made = Cluster(folder)
    try:
        made._start()
        yield made
    finally:
        made._stop()
        shutil.rmtree(folder)


class Cluster:
    """Its daemons are children of this process, with keys and ports of their own: clusters can stand side by side."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, []
        self.env = {"SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command, timeout=150, **env) -> subprocess.CompletedProcess:
        """One of Slurm's commands on this cluster."""
        env = launch_environment(**env) | self.env
        command = [str(word) for word in command]
        return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout)

    @contextmanager
    def job(self, *command, **env):
        """What sbatch makes of `command`, in the repository's root. What it leaves is killed at the end."""
        job = Job(self, command, env)
        try:
            yield job
        finally:
            self.call("scancel", job.id)
            for pid in job.processes():
                os.kill(pid, 9)

    def logs(self) -> str:
        return "\n".join(f"{log.name}:\n{log.read_text()[-1000:]}" for log in sorted(self.folder.glob("*.log")))

    def _start(self) -> None:
        (self.folder / "state").mkdir()
        config = CONFIG.format(
            folder=self.folder,
            host=socket.gethostname(),
            user=getpass.getuser(),
            ports=unused_ports(3),
            first_job=random.randrange(1, 9000),  # the port of a job's ranks follows from its number
        )
        (self.folder / "slurm.conf").write_text(config)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{suffix}" for option, suffix in files.items()]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *files)
        wait_for(lambda: (self.folder / "munge.socket").exists(), 10, self.logs)
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            (self.folder / f"spool.{node}").mkdir()
            self._daemon("slurmd", "-D", "-N", node)
        wait_for(lambda: self.call("sinfo", "-h", "-N", "-o", "%T").stdout.split() == ["idle"] * 2, 20, self.logs)

    def _daemon(self, name: str, *arguments: str) -> None:
        with open(self.folder / f"{name}.{len(self.daemons)}.log", "w") as log:
            # They end also when this process is killed.
            command = ["setpriv", "--pdeathsig", "TERM", _find(name), *arguments]
            self.daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | self.env))

    def _stop(self) -> None:
        if (self.folder / "slurm.conf").exists():
            self.call("scancel", "--user", getpass.getuser())
            deadline = time.monotonic() + 20
            while self.call("squeue", "-h").stdout and time.monotonic() < deadline:
                time.sleep(0.1)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


class Job:
    """A submitted job. Its processes are known by a word in their environment that nothing else has."""

    def __init__(self, cluster: Cluster, command, env) -> None:
        self.cluster, mark = cluster, uuid.uuid4().hex
        self.mark, self.out = f"TEST_JOB={mark}".encode(), cluster.folder / f"{mark}.out"
        sbatch = ("sbatch", "--parsable", "--time=5", f"--output={self.out}", *command)
        submitted = cluster.call(*sbatch, **env, TEST_JOB=mark)
        self.id = submitted.stdout.strip()
        assert self.id.isdigit(), submitted.stderr

    def state(self) -> tuple[str, str]:
        """Slurm's word for it, and the job's exit status as `status:signal`."""
        shown = self.cluster.call("scontrol", "show", "job", self.id).stdout
        return re.search(r"JobState=(\w+)", shown)[1], re.search(r"ExitCode=(\S+)", shown)[1]

    def wait(self, seconds=150) -> tuple[str, str]:
        """The state in which it ends."""
        wait_for(lambda: self.state()[0] not in ("PENDING", "RUNNING", "COMPLETING"), seconds, self.output)
        return self.state()

    def output(self) -> str:
        return self.out.read_text() if self.out.exists() else ""

    def processes(self) -> dict[int, dict[str, str]]:
        """Environment of each of its processes, by pid."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ = (folder / "environ").read_bytes()
            except OSError:  # it has ended, or is another user's
                continue
            if self.mark in environ:
                words = environ.decode(errors="replace").split("\0")
                found[int(folder.name)] = dict(word.split("=", 1) for word in words if "=" in word)
        return found


def wait_for(condition, seconds, explain=str):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def unused_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
