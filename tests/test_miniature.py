"""README's recipe in miniature: its commands as they stand there, with smaller numbers."""
import json
import re

import pytest
from conftest import ROOT, code_blocks, run_commands

SMALLER = [(r"--max_steps \d+", "--max_steps 60"), (r"builtin:train:\d+", "builtin:train:120"),
           (r"builtin:\$split:\d+", "builtin:$split:12"),
           (r"builtin:(bare|worked)", r"builtin:\1:3000"),
           (r"--num_train_epochs \d+", "--num_train_epochs 1")]


@pytest.mark.slow
def test_the_miniature_runs_from_base_to_table(tmp_path):
    script = code_blocks((ROOT / "README.md").read_text(), "The whole recipe in miniature")[0]
    for large, small in SMALLER:
        script, count = re.subn(large, small, script)
        assert count, f"README's miniature has no {large}"
    printed = run_commands(script, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").open()]
    assert rows and all(row["response"].startswith("<|begin_of_thought|>") for row in rows)
    assert {row["kind"] for row in rows} <= {"math", "choice", "code"}
    for split in ("heldout", "harder"):
        verdicts = [json.loads(line) for line in
                    (tmp_path / "out" / f"{split}.verified.jsonl").open()]
        assert {(row["model"], row["sample"]) for row in verdicts} == {
            (f"out/{model}", n) for model in ("base", "teacher", "student") for n in range(4)}
        assert len(verdicts) == 3 * 12 * 4
    tables = re.findall(r"^out/(\w+) +all .* to ", printed, re.M)
    assert tables == ["base", "student", "teacher"] * 2
