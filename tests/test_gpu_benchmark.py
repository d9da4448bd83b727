"""The benchmark of a card runs on a bare machine: small, on the processor, every job within its budget."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="benchmarks are not part of what is installed")


def ran(*options):
    pytest.importorskip("threadpoolctl")
    command = [sys.executable, str(SCRIPT), "--quick", "--device", "cpu", "--threads", "1", *options]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": paths})
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_every_job_is_measured():
    """Each tells its seconds and what the device can do, and none of its checks fails."""
    code, text = ran()
    assert code == 0, text
    for job in ("gmm", "lda", "vae", "hmc", "stream"):
        assert re.search(rf"^{job}$", text, re.M) and f"... {job}: copy, GB/s read and written" in text
    assert "share of a square product's speed" in text and "streamed rate as a share of the resident" in text
    assert "FAILED" not in text and "failed" not in text


def test_some_jobs_and_a_budget():
    """A budget that is used up leaves jobs out instead of running on; an unknown job is told with those there are."""
    code, text = ran("--only", "vae,hmc", "--budget", "0.001")
    assert "vae: the budget of 0.001 s is used up" in text and "hmc: the budget" in text and "gmm" not in text, text
    code, text = ran("--only", "vea")
    assert code == 2 and "vea is no job; there are gmm, lda, vae, hmc, stream" in text


def test_documents_are_replicated(monkeypatch):
    """As many words as were asked for, each copy with the words of the first."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("_gpu", SCRIPT.parent / "_gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "_gpu", module)
    spec.loader.exec_module(module)
    starts, words, counts, V = module.ap_like(None, True)
    assert words.max() < V and len(starts) == 151 and counts.min() >= 1
    documents = module.replicated((starts, words, counts, V), 4 * counts.sum())
    assert len(documents) == 600 and documents.num_tokens == 4 * counts.sum()
    last = documents.cut(450, 600)
    np.testing.assert_array_equal(last.starts, starts)
    np.testing.assert_array_equal(last.words, words)
