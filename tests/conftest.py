"""What every test shares: one thread, seeded generators, no network, results in a folder of its own."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads; inherited by the tests' child processes
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub fails at once, here as in CI

import pytest
import torch
from hypothesis import settings

from repro.train import seed_everything

# Examples follow from the test alone, so a failure in CI is the same failure at a desk; no example is timed.
settings.register_profile("repro", deadline=None, derandomize=True, database=None)
settings.load_profile("repro")


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Seeded generators, one torch thread, and runs under the test's own folder, never in the checkout."""
    monkeypatch.setenv("REPRO_RUNS", str(tmp_path / "runs"))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with it ignored
    seed_everything(0)
    torch.set_num_threads(1)
