"""The manual of bench_gpu.py, in small: what it says of a GPU, it says of this CPU."""
import json
import shutil
import subprocess
import sys

import bench_gpu
import pytest

from conftest import ROOT


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_the_part_on_correctness_passes_on_this_cpu_too(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tests" / "bench_gpu.py", "--device", "cpu",
                           "--only", "correctness", "--out", tmp_path],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    said = {row["what"]: row["reached"] for row in rows}
    for what in ("gradients, bfloat16, beside the CPU's in fp32",
                 "loss curve of 8 steps, beside the CPU's", "--deterministic, killed and resumed",
                 "--recompute tiled --offload none, bfloat16, 3 steps",
                 "train.py --compile, bfloat16, 3 steps"):
        assert said[what] is True
        assert f"| correctness | {what} |" in done.stdout
    assert False not in said.values()


def test_a_part_that_takes_too_long_is_a_row(tmp_path):
    row, = bench_gpu.run_part("correctness: memory", 0.1, "cpu", tmp_path)
    assert row["part"] == "correctness" and row["what"] == "memory" and row["reached"] is False
    assert row["figure"].startswith("failed, not ready after")


def test_a_part_that_fails_is_a_row_with_its_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['data'] = None\n")
    row = bench_gpu.run_part("correctness: train.py", 60, "cpu", tmp_path)[-1]
    assert row["reached"] is False and "ModuleNotFoundError" in row["figure"]


def test_transformers_is_compared_with_the_best_attention():
    rows = [dict(part="training", what=what, numbers=dict(rate=rate)) for what, rate in (
        ("block, flash", 3.0), ("block, cudnn", 4.0), ("none, flash", 9.0), ("transformers", 2.0))]
    row, = bench_gpu.beside_transformers(rows, "cuda")
    assert row["what"].startswith("block, cudnn") and row["reached"]
    assert row["numbers"]["ratio"] == 2.0
    assert bench_gpu.beside_transformers(rows[:3], "cuda") == []
