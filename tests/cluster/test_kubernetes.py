"""A batch through Snakemake's Kubernetes executor, against a stand-in for the cluster's API.

The stand-in runs each job's container command as a process of this machine, in a working folder of its own, with the
volume at its real path. It shows that the profile, the sources and the results find their way; no real cluster does.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from repro import runs
from repro.batch.execute import PROFILES, execute
from repro.batch.plan import plan
from tests import small_notebooks
from tests.small_notebooks import TINY

pytest.importorskip("snakemake_executor_plugin_kubernetes", reason="the extra `batch` is not installed")


@pytest.fixture
def api(tmp_path, monkeypatch):
    """Jobs by name: what was asked, and its process."""
    jobs: dict[str, dict] = {}
    tools = tmp_path / "image"
    tools.mkdir()
    (tools / "pip").write_text("#!/bin/sh\n")  # what Snakemake installs at the start of a job is in the image
    (tools / "pip").chmod(0o755)

    class Api(BaseHTTPRequestHandler):
        def answer(self, value: dict, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if "/jobs" in self.path:
                name, (container,) = asked["metadata"]["name"], asked["spec"]["template"]["spec"]["containers"]
                folder = tmp_path / "pods" / name
                folder.mkdir(parents=True)
                path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"  # the image's python is ours
                environment = os.environ | {"PATH": path, "HOME": str(folder)}
                with (folder / "pod.log").open("w") as log:
                    process = subprocess.Popen([*container["command"], *container["args"]], cwd=folder,
                                               env=environment, stdout=log, stderr=log)  # fmt: skip
                jobs[name] = {"asked": asked, "process": process}
            self.answer(asked, 201)

        def do_GET(self):
            if "/pods" in self.path:
                return self.answer({"kind": "PodList", "items": []})
            name = self.path.split("/jobs/")[1].split("/")[0]
            code = jobs[name]["process"].poll()
            status = {} if code is None else {"failed" if code else "succeeded": 1}
            return self.answer({"kind": "Job", "metadata": {"name": name}, "status": status})

        def do_DELETE(self):
            self.answer({"kind": "Status", "status": "Success"})

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    access = {"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "contexts": [context],
              "current-context": "c", "users": [{"name": "u", "user": {}}]}  # fmt: skip
    (tmp_path / "kubeconfig").write_text(json.dumps(access))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    yield jobs
    server.shutdown()
    for job in jobs.values():
        job["process"].kill()
        job["process"].wait()


@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
def test_runs_go_to_kubernetes_and_leave_their_results_on_the_volume(api, tmp_path):
    root, profile = tmp_path / "runs", tmp_path / "profile"
    root.mkdir()
    profile.mkdir()
    text = (PROFILES / "kubernetes" / "config.yaml").read_text()
    (profile / "config.yaml").write_text(text.replace("/runs", str(root)))
    notebook = small_notebooks.training(tmp_path / "notebooks")
    diverging = TINY.with_(lr=1e30, steps=30)
    planned = plan(dict.fromkeys((TINY, diverging), ("test",)), root)
    summary = execute(planned, root, profile=str(profile), device="cpu", notebook=notebook, retries=0)
    log = (root / ".batch" / "snakemake.log").read_text()
    assert summary.finished == [TINY], log
    assert [(experiment, kind) for experiment, kind, _ in summary.failed] == [(diverging, "bad input")]
    folder = runs.folder_of(TINY, root)
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "experiment.json", "history.jsonl", "metrics.json", "notebook.ipynb", "outputs.safetensors",
        "weights.safetensors"}  # fmt: skip
    assert runs.load_metrics(folder)["run"] == folder.name and (folder / "notebook.ipynb").stat().st_size
    assert not (runs.folder_of(diverging, root) / "notebook.ipynb").exists()
    (container,) = next(iter(api.values()))["asked"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example/repro:latest" and len(api) == 2
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/workdir", str(root)}
    again = execute(plan({TINY: ("test",)}, root), root, profile=str(profile), device="cpu", notebook=notebook)
    assert again.skipped == [TINY] and len(api) == 2
