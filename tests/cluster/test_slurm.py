"""A batch on a real Slurm: one node on loopback, started here, without accounting; jobs are submitted by Snakemake.

Needs root and Debian's slurm-wlm and munge (`.ci/run` installs them). `make test-cluster` runs it.
"""

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import nbformat
import pytest

from repro import runs
from repro.batch import once
from repro.batch.execute import execute
from repro.batch.plan import plan
from tests import small_notebooks
from tests.small_notebooks import TINY

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
CONFIGURATION = Path("/etc/slurm/slurm.conf")  # where jobs look for it
SLURM = """\
# Written by tests/cluster/test_slurm.py and removed by it.
ClusterName=repro
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A running cluster of this machine alone."""
    missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing or os.geteuid():
        pytest.skip(f"needs root and the packages slurm-wlm and munge; missing: {', '.join(missing) or 'root'}")
    if CONFIGURATION.exists() and "tests/cluster" not in CONFIGURATION.read_text():
        pytest.skip(f"{CONFIGURATION} belongs to a Slurm of this machine")
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    CONFIGURATION.parent.mkdir(exist_ok=True)
    CONFIGURATION.write_text(SLURM.format(host=host, folder=folder, cpus=os.cpu_count(), memory=memory))
    environment = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin"}
    daemons = []

    def start(*command: str) -> None:
        with (folder / f"{Path(command[0]).name}.log").open("w") as log:
            daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))

    def works(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not works("munge", "-n"):
            for place in ("/run/munge", "/var/log/munge", "/var/lib/munge"):
                Path(place).mkdir(exist_ok=True)
                shutil.chown(place, "munge", "munge")
            start("runuser", "-u", "munge", "--", "munged", "--foreground")
            wait_until(lambda: works("munge", "-n"), "munged")
        start("slurmctld", "-D")
        start("slurmd", "-D")
        wait_until(lambda: works("sinfo", "--noheader", "--format=%T") == "idle", f"Slurm, see {folder}")
        yield folder
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=30)
        CONFIGURATION.unlink()


def wait_until(condition, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not start"
        time.sleep(0.2)


CANCELLED_ONCE = """
import os, pathlib, subprocess, time
print("slurm job", os.environ["SLURM_JOB_ID"])
marker = pathlib.Path(runs_root) / "cancelled"
if seed == 1 and not marker.exists():
    marker.touch()
    subprocess.run(["scancel", os.environ["SLURM_JOB_ID"]], check=True)
    time.sleep(120)
"""


@pytest.mark.timeout(1200)
def test_runs_go_to_slurm_and_come_back_with_their_failure_classes(slurm, tmp_path, capfd):
    """Of three runs one is finished, one cancelled by the cluster and run again, and one diverges."""
    notebook = small_notebooks.training(tmp_path / "notebooks", before=(CANCELLED_ONCE,))
    good, cancelled, diverging = TINY, TINY.with_(seed=1), TINY.with_(lr=1e30, steps=30)
    root = tmp_path / "runs"
    planned = plan(dict.fromkeys((good, cancelled, diverging), ("test",)), root)
    summary = execute(planned, root, profile="slurm", workers=2, device="cpu", retries=1, notebook=notebook)
    log = (root / ".batch" / "snakemake.log").read_text()
    assert set(summary.finished) == {good, cancelled}, log
    assert [(experiment, kind) for experiment, kind, _ in summary.failed] == [(diverging, "bad input")]
    assert summary.exit_status == 1 and "bad input" in capfd.readouterr().out
    jobs = [job_of(runs.folder_of(experiment, root) / "notebook.ipynb") for experiment in (good, cancelled)]
    assert len(set(jobs)) == 2 and all(job.isdigit() for job in jobs)
    assert "CANCELLED" in log
    failure = json.loads((runs.folder_of(diverging, root) / once.FAILURE).read_text())
    assert failure["class"] == "bad input" and "lower lr" in failure["message"]
    assert not (runs.folder_of(diverging, root) / "notebook.ipynb").exists()

    before = {path: path.stat().st_mtime_ns for path in root.glob("*/metrics.json")}
    again = execute(plan(dict.fromkeys((good, cancelled), ("test",)), root), root, profile="slurm", notebook=notebook)
    assert set(again.skipped) == {good, cancelled} and again.exit_status == 0
    assert {path: path.stat().st_mtime_ns for path in root.glob("*/metrics.json")} == before


def job_of(notebook: Path) -> str:
    book = nbformat.read(notebook, as_version=4)
    printed = "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", ()))
    return printed.split("slurm job ")[1].split()[0]
