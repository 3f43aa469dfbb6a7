"""README's recipe in miniature: its commands as they stand there, with smaller numbers."""
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
SMALLER = [(r"--max_steps \d+", "--max_steps 60"), (r"builtin:train:\d+", "builtin:train:120"),
           (r"builtin:\$split:\d+", "builtin:$split:12"),
           (r"builtin:(bare|worked)", r"builtin:\1:3000"),
           (r"--num_train_epochs \d+", "--num_train_epochs 1")]


def commands():
    section = README.partition("## The whole recipe in miniature")[2].partition("\n## ")[0]
    return section.split("```")[1].strip()


@pytest.mark.slow
def test_the_miniature_runs_from_base_to_table(tmp_path):
    for name in ("model.py", "data.py", "train.py", "sample.py", "verify.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, module in (("python", ""), ("torchrun", "-m torch.distributed.run --standalone ")):
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module}"$@"\n')
        (tools / name).chmod(0o755)
    script = commands()
    for large, small in SMALLER:
        script, count = re.subn(large, small, script)
        assert count, f"README's miniature has no {large}"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
                   "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").open()]
    assert rows and all(row["response"].startswith("<|begin_of_thought|>") for row in rows)
    assert {row["kind"] for row in rows} <= {"math", "choice", "code"}
    for split in ("heldout", "harder"):
        verdicts = [json.loads(line) for line in
                    (tmp_path / "out" / f"verified.{split}.jsonl").open()]
        assert {(row["model"], row["sample"]) for row in verdicts} == {
            (f"out/{model}", n) for model in ("base", "teacher", "student") for n in range(4)}
        assert len(verdicts) == 3 * 12 * 4
    tables = re.findall(r"^out/(\w+) +all .* ± ", done.stdout, re.M)
    assert tables == ["base", "student", "teacher"] * 2
