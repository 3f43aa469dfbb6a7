"""The manual of the recipe: README's commands in miniature as they stand there, with smaller
numbers."""
import json
import re

import pytest

from conftest import ROOT, code_blocks, run_commands, run_script
from data import builtin_problems

README = (ROOT / "README.md").read_text()
BY_HEART = "--max_steps 120 --batch_size 8"
SMALLER = [(r"torchrun --nproc_per_node=2 (-- )?", "python "),  # it starts faster
           (r"builtin:bare --max_steps 30", "all.jsonl --max_steps 2"),
           (r"builtin:bare --max_steps 100", f"all.jsonl {BY_HEART}"),
           (r"\$recipe --max_steps \d+", "$recipe --max_steps 2"),
           (r"builtin:train:\d+", "builtin:train:24"),
           (r"builtin:(heldout|harder|\$split):\d+", r"builtin:\1:12"),
           (r"--num_train_epochs \d+", "--num_train_epochs 1"),
           (r"student2; do  # and unfiltered", "student2 unfiltered; do")]
MODELS = ["base", "student", "student2", "tiny-1", "unfiltered"]


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_miniature_runs_from_base_to_table(tmp_path):
    """With a base that has learnt all problems by heart, a teacher two thirds of them."""
    problems = [problem | {"response": problem["solution"]}
                for problem in builtin_problems("train", 24)]
    known = {problem["id"] for problem in problems[:16]}
    for name, lesson in (("all", problems), ("most", problems[:16])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lesson))
    run_script(ROOT / "train.py", "--data", tmp_path / "most.jsonl", *BY_HEART.split(),
               "--cache", tmp_path / "cache", "--out", tmp_path / "out" / "tiny-1")
    quick, _, full, unfiltered, scores = code_blocks(README, "The whole recipe in miniature")
    script = quick + full + unfiltered + scores
    for large, small in SMALLER:
        script, count = re.subn(large, small, script)
        assert count, f"README's miniature has no {large}"
    printed = run_commands(script, tmp_path)
    out = tmp_path / "out"
    verified = rows_in(out / "verified.jsonl")
    kept = {row["id"] for row in verified if row["passed"]}
    failed = {row["id"] for row in verified if not row["passed"]}
    assert kept <= known and len(kept) > 8 and len(failed) >= 8
    assert {row["id"] for row in rows_in(out / "samples2.jsonl")} == failed
    for name, asked in (("quick/rows", kept), ("rows", kept), ("unfiltered", kept | failed)):
        rows = rows_in(out / f"{name}.jsonl")
        assert all(row["response"].startswith("<|begin_of_thought|>") for row in rows)
        assert {row["id"] for row in rows} == asked
    for split in ("heldout", "harder"):
        verdicts = rows_in(out / f"{split}.verified.jsonl")
        assert {(row["model"], row["sample"]) for row in verdicts} == {
            (f"out/{model}", n) for model in MODELS for n in range(4)}
        assert len(verdicts) == len(MODELS) * 12 * 4
    scored = re.findall(r"^out/(\S+) +all .* to ", printed, re.M)
    assert scored == ["quick/base", "quick/student", "tiny-1", *MODELS, *MODELS]
