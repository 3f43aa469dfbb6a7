"""The manual of verify.py but for its sandbox: what counts as an answer, when two are the same,
what a program must do to pass, and what the command writes."""
import gzip
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import combinations

import pytest
import verify
from conftest import (ROOT, descendants, end_within, run_script, run_unread,
                      shared_file)
from math_golds import GROUPS
from math_pairs import CHOICES, EXTRACTIONS, PAIRS, RESPONSES as MATH_RESPONSES
from responses import RESPONSES

linux = pytest.mark.skipif(sys.platform != "linux", reason="programs are judged on Linux only")


# ---- maths


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_answers_get_the_verdict_that_a_person_gave_them(name):
    wrong = [(ascii(a)[:80], ascii(b)[:80]) for a, b, equal in PAIRS[name]
             if verify.math_equal(a, b) is not equal]
    assert not wrong


def test_the_table_of_pairs_is_large_and_of_both_verdicts():
    verdicts = [equal for pairs in PAIRS.values() for _, _, equal in pairs]
    assert len(verdicts) >= 300 and 0.3 < sum(verdicts) / len(verdicts) < 0.7


@pytest.mark.parametrize("name", GROUPS)
def test_golds_in_the_forms_of_the_datasets_get_right_and_wrong_predictions_told_apart(name):
    wrong = [(ascii(predicted)[:80], ascii(gold)[:80]) for gold, *both in GROUPS[name]
             for equal, predictions in zip((True, False), both, strict=True)
             for predicted in predictions if verify.math_equal(predicted, gold) is not equal]
    assert not wrong


@pytest.mark.parametrize("name, needed, rules", verify.SPELLING,
                         ids=[name for name, *_ in verify.SPELLING])
def test_each_rule_of_spelling_does_what_its_example_says(name, needed, rules):
    for pattern, replacement, before, after in rules:
        assert pattern.sub(replacement, before) == after
        assert needed.search(before) or name == "commands"  # which the pass before may make needed


def test_responses_get_the_verdict_that_a_person_gave_them():
    wrong = [(response, gold) for response, gold, passed in MATH_RESPONSES
             if verify.math_verdict(response, gold).passed is not passed]
    assert not wrong


def test_a_plain_logarithm_has_base_e_or_base_10_in_all_of_a_pair():
    assert verify.math_equal(r"\log 100", "2") and verify.math_equal(r"\log e^2", "2")
    assert verify.math_equal(r"\log x^2", r"2\log x") and not verify.math_equal(r"\log 2", "2")
    assert not verify.math_equal(r"\log 100+\log e", "3")


def test_extraction_takes_the_last_box_then_the_mark_then_the_phrase_then_the_number():
    def bare(text):
        return text and text.strip().strip("$").strip()
    wrong = [(response, bare(verify.extract_answer(response)), expected)
             for response, expected in EXTRACTIONS
             if bare(verify.extract_answer(response)) != bare(expected)]
    assert not wrong


def hostile_texts(pattern, length):
    """Repetitions of what a pattern names: its words and signs, and of one sign behind a word."""
    names = re.sub(r"\(\?[^:>()]*|\\[bdsw]", " ", pattern.pattern)
    words = set(re.findall("[A-Za-z]{2,}", names))
    signs = set(re.sub(r"[A-Za-z\s]", "", names)) | set(" \n1aA")
    for part in signs | words:
        yield part * (length // len(part)) + "!"
    for head in words | {"answer is 5", "answer is $5$,", "answer is $5$ cm", "(A)", "**A"}:
        for part in (" ", "\n", "1", "a", head + " "):
            yield head + part * (length // len(part)) + "!"


def test_what_sees_a_whole_response_takes_time_linear_in_its_length():
    """A second is generous where time is linear, and far too little where it is quadratic."""
    finds = [verify.extract_answer, verify.find_letter, verify.option, verify.last_box]
    for length in (6_000, 60_000):
        for function, text in {
                (function, text)
                for pattern in (verify.BOX_SIGN, verify.PHRASE, verify.DOUBT, verify.NUMBER,
                                verify.OPTION, verify.DECORATION, *verify.CHOICES)
                for text in hostile_texts(pattern, length)
                for function in (*finds, pattern.findall)}:
            start = time.process_time()
            function(text)
            assert time.process_time() - start < 1, (function, text[:20])


FENCES = ["```\n", "```python\n", "```python\n[\n", "x ```", "~~~ `", "``` ~~~ ", "```<|end|>\n",
          "`", "```\nf(1)\n```\n", "'", " ", "\n", "\r\n", "(", "-", "a.", "[0,", "x=1\n",
          " " * 20 + "\n"]


def test_what_finds_a_program_and_compares_outputs_takes_time_linear_in_its_length():
    """Five seconds are many times what linear time takes, and a tenth of what quadratic takes."""
    texts = [head + part * (200_000 // len(part)) + "!" for part in FENCES
             for head in ("", "```\n", "```python\n", "```\nf(1)\n```\n")]
    texts.append("\n".join("`" * n for n in range(3, 630)))  # each fence longer than the last
    calls = [(verify.find_program, text) for text in texts]
    for expected in (b"0.5", b".", b"1e5", b"1.5 " * 999):
        for part in (b"1", b".", b"1e", b"+", b"1.", b"1 ", b"1\n", b" ", b"\0"):
            text = part * (200_000 // len(part))
            calls += [(verify.same_output, expected, text + b"a"),
                      (verify.same_output, text, expected), (verify.same_output, text, text + b"1")]
            calls += [(pattern.fullmatch, text + b"a") for pattern in (verify.DECIMAL,
                                                                       verify.SIGNED)]
    for function, *arguments in calls:
        start = time.process_time()
        function(*arguments)
        assert time.process_time() - start < 5, (function, arguments[-1][:20])


@linux
@pytest.mark.parametrize("response", [
    "```\n" * 4000, "\n".join("`" * n for n in range(3, 4000)),
    "The answer" + " " * 16_000 + "is 5.", "The answer" + "\n" * 16_000,
    "```python\nprint('9' * 10_000 + 'x')\n```"])
def test_no_response_stalls_a_verdict(response):
    tests = [{"input": "", "output": "0.5"}]
    for verdict in (verify.verify_math(response, "7"), verify.verify_choice(response, "B"),
                    verify.verify_code(response, tests)):
        assert not verdict.passed and verify.GRADER_ERROR not in verdict.reason
        assert verdict.reason != "timeout"


@linux
def test_a_sample_has_a_limit_of_time_on_the_clock_too(tmp_path, monkeypatch):
    """Tests that each sleep a while, all together longer than twenty times their CPU time and half
    a minute: here with the half minute taken away."""
    file = tmp_path / "worker.py"
    file.write_text(f"import signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport verify\n"
                    "real = signal.setitimer\nsignal.setitimer = lambda kind, seconds: "
                    "real(kind, seconds - 30 if seconds > 30 else seconds)\n"
                    "verify.work(int(sys.argv[2]))\n")
    monkeypatch.setattr(verify, "__file__", str(file))
    verify.IDLE.clear()
    verdict = verify.run_program("import time; time.sleep(0.5)", [{"input": "", "output": ""}] * 50,
                                 timeout=0.2)
    assert verdict == (False, "timeout", None)
    verify.IDLE.clear()


def test_equality_does_not_depend_on_which_side_is_which():
    """Between answers without decimals and units, for which the gold side decides."""
    for name in ("fractions", "roots and powers", "symbolic", "sets and lists", "intervals"):
        for a, b, equal in PAIRS[name]:
            if not re.search(r"\d\.\d|\\text|%", a + b):
                assert verify.math_equal(b, a) is equal, (a, b)


def random_tree(rng, depth):
    """(LaTeX, value as a float) of a random expression in x = 1.7 and numbers."""
    if depth == 0:
        number = rng.randint(1, 9)
        return rng.choice([(str(number), number), ("x", 1.7), (rf"\sqrt{{{number}}}",
                                                               math.sqrt(number))])
    (a, p), (b, q) = random_tree(rng, depth - 1), random_tree(rng, depth - 1)
    return rng.choice([(f"({a}+{b})", p + q), (f"({a}-{b})", p - q), (rf"{{{a}}} \cdot {{{b}}}",
                                                                      p * q),
                       (rf"\frac{{{a}}}{{{b}}}", p / q if q else math.nan),
                       (f"({a})^{{2}}", p * p)])


def test_random_expressions_are_read_as_their_value():
    """Against floating point: an expression in x, with the value of x put in by hand."""
    rng, checked = random.Random(3), 0
    for _ in range(150):
        text, value = random_tree(rng, 3)
        if not math.isfinite(value) or abs(value) > 1e9:
            continue
        verify.begin_work()
        got = verify.value(verify.parse(verify.respell(text)), {"x": verify.Fraction(17, 10)})
        assert abs(float(got) - value) <= 1e-6 * max(1, abs(value)), text
        checked += 1
    assert checked > 100


def test_golds_of_math_500_and_gsm8k_equal_their_solutions_and_no_other_problems():
    for name in ("math500", "gsm8k_test"):
        rows = [json.loads(line) for line in open(shared_file(f"problems/{name}.jsonl"))]
        failed = [row["answer"] for row in rows
                  if not verify.verify_math(row["solution"], str(row["answer"])).passed]
        assert not failed
        others = [(a["answer"], b["answer"]) for a, b in zip(rows, rows[1:] + rows[:1], strict=True)
                  if verify.verify_math(b["solution"], str(a["answer"])).passed]
        assert all(verify.math_equal(str(b), str(a)) for a, b in others)
        assert len(others) < 0.05 * len(rows)


def test_different_golds_of_math_500_are_different():
    rows = [json.loads(line) for line in open(shared_file("problems/math500.jsonl"))]
    golds = sorted({row["answer"] for row in rows})
    equal = [(a, b) for a, b in combinations(golds[::3], 2) if verify.math_equal(a, b)]
    for a, b in equal:  # those that are one number, written or named in two ways
        assert verify.math_equal(b, a)
        numbers = [re.sub(r"\\text\{[^{}]*\}|\\[!$%]|[^0-9/.a-z\\-]", "", t) for t in (a, b)]
        assert numbers[0] == numbers[1], (a, b)


HOSTILE = [r"10^{10^{10^{10}}}", "9" * 100_000, "((((" * 20_000, r"\frac{" * 3000, "x^" * 5000,
           "1000000!!!!!!", r"\binom{10^{9}}{10^{8}}", "(" * 40 + "2^{2^{99}}" + ")" * 40,
           r"e^{e^{e^{e^{9}}}}", r"\sqrt[10^9]{2}+" * 100 + "1", r"\boxed{" * 20_000, "$" * 10**6,
           "(x+1)^{999}(x+2)^{999}(y+3)^{999}", r"\sin(" * 45 + "x" + ")" * 45,
           "\\{" + ",".join(rf"\sqrt{{{i}}}" for i in range(400)) + "\\}"]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_answer_gets_a_verdict_in_time(number):
    text = HOSTILE[number]
    assert verify.math_equal(text, "17.5") is False
    assert verify.math_equal(text, text) is True
    for response in (text, rf"\boxed{{{text}}}"):
        verdict = verify.verify_math(response, r"\frac{1}{\sqrt{3}}")
        assert verdict.reason in ("wrong answer", "no answer")


WORKER = """import os, signal, sys, time
sys.path.insert(0, {root!r})
import verify
real = verify.math_verdict
def math_verdict(response, gold):
    if response in ("endless", "sleep"):
        time.sleep(60) if response == "sleep" else (lambda: [None for _ in iter(int, 1)])()
    if response == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "wrong":
        raise MemoryError("no\\nroom")
    return real(response, gold)
verify.math_verdict, verify.MATH_TIMEOUT = math_verdict, 1
"""
HARD = {"sleep": "timeout", "endless": "timeout", "killed": "grader error: its process ended",
        "wrong": "grader error: MemoryError: no room"}


@pytest.fixture
def hard(tmp_path, monkeypatch):
    """Workers in which the responses of HARD are what they say."""
    file = tmp_path / "worker.py"
    file.write_text(WORKER.format(root=str(ROOT)) + "verify.work(int(sys.argv[2]))\n")
    monkeypatch.setattr(verify, "__file__", str(file))
    verify.IDLE.clear()
    yield file
    verify.IDLE.clear()


def test_no_sample_ends_or_stalls_the_others(hard):
    """Of more samples than workers, a verdict for each, in their order."""
    responses = [*HARD, r"\boxed{4}", r"\boxed{5}", *HARD, r"\boxed{4}"]
    rows = ((f"row {n}", sample(n, response)) for n, response in enumerate(responses))
    expected = {**HARD, r"\boxed{4}": "correct", r"\boxed{5}": "wrong answer"}
    reasons = [row["reason"] for row in verify.verified_rows(rows, 3, {})]
    assert reasons == [expected[response] for response in responses]


def test_samples_without_a_verdict_are_told_at_the_end(tmp_path):
    samples = write(tmp_path / "samples.jsonl", [
        sample(1, r"\boxed{4}"), sample(2, "wrong"), sample(3, "killed"), sample(4, "4")])
    file = tmp_path / "command.py"
    file.write_text(WORKER.format(root=str(ROOT)) + """
if sys.argv[1] == "--worker":
    verify.work(int(sys.argv[2]))
verify.__file__ = __file__
import tqdm
verify.tqdm = tqdm.tqdm
verify.main()
""")
    done = run_script(file, samples, "--out", tmp_path / "out")
    assert [row["reason"].split(":")[0] for row in read(tmp_path / "out")] == [
        "correct", "grader error", "grader error", "correct"]
    assert "2 samples have no verdict" in done.stdout and "grader error 2" in done.stdout
    assert "toy 2: grader error: MemoryError" in done.stdout
    assert "toy 3: grader error: its process ended" in done.stdout


def test_verdicts_from_threads_and_from_a_forked_process_are_the_same():
    answers = []

    def work():
        answers.append([verify.math_equal(r"\sqrt{8}", r"2\sqrt{%d}" % n) for n in (2, 3) * 5])
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [[True, False] * 5] * 4
    code = ("import os, verify\nequal = verify.math_equal\n"
            "assert equal('\\\\sqrt8', '2\\\\sqrt2')\n"
            "if os.fork() == 0: os._exit(0 if equal('\\\\sqrt8', '2\\\\sqrt2') else 1)\n"
            "assert equal('\\\\sqrt{12}', '2\\\\sqrt3') and os.wait()[1] == 0")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_no_answer_is_evaluated_as_python(tmp_path):
    canary = tmp_path / "canary"
    for text in (f"__import__('os').system('touch {canary}')", f"open('{canary}','w')"):
        assert not verify.verify_math(rf"\boxed{{{text}}}", "1").passed
        assert not verify.math_equal("1", text)
    assert not canary.exists()


# ---- multiple choice


def test_the_chosen_letter_is_found():
    wrong = [(response, gold, verify.verify_choice(response, gold))
             for response, gold, passed in CHOICES
             if verify.verify_choice(response, gold).passed is not passed]
    assert not wrong


# ---- programs (test_attacks.py holds the hostile ones)


@linux
def test_the_last_code_block_of_the_solution_is_the_program():
    first, second = "```python\nprint(1)\n```", "```python\nprint(2)\n```"
    tests = [{"input": "", "output": "2"}]
    assert verify.verify_code(f"{first}\nNo:\n{second}\nDone.", tests).passed
    thought = f"{verify.TAGS[2]}\n{second}\n{verify.TAGS[3]}"
    assert verify.verify_code(f"{first}\n{thought}", tests).passed
    assert not verify.verify_code(f"{second}\n{first}", tests).passed
    assert verify.verify_code("print(2)", tests).reason == "no answer"
    assert not verify.verify_code("```cpp\nint main() {}\n```", tests).passed


@linux
@pytest.mark.parametrize("text, tests, passes", [
    pytest.param(*rest, id=name) for name, *rest in RESPONSES])
def test_the_program_is_found_as_models_write_it(text, tests, passes):
    verdict = verify.verify_code(text, tests)
    assert verdict.passed is passes, (verdict.reason, verdict.extracted)


def test_the_names_of_the_responses_differ():
    names = [name for name, *_ in RESPONSES]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("expected, got, same", [
    ("1 2\n3", "1 2\n3\n", True), ("1 2\n3", "1  2 \n3\n\n", True), ("1 2", "2 1", False),
    ("1\n2", "1 2", False), ("1 1", "1", False), ("0.5", "0.5000000001", True),
    ("0.5", "0.5000009", True), ("0.5", "0.50001", False), ("1", "1.0", False), ("2.0", "2", True),
    ("1000000.5", "1000000.9", True), ("1e-9", "0", True), (".", "0", False), ("..#.", "1", False),
    ("12345678901234567890", "12345678901234567891", False), ("1.5", "nan", False),
    ("yes", "YES", False), ("1e3", "1000", True), ("1.0", "１.0", False), ("1", "1\0", False),
    pytest.param("0.5", "1" * 10_000 + "a", False, id="digits and a letter"),
    pytest.param("1" + "0" * 5000, "1" + "0" * 4999 + "1", False, id="5,001 digits")])
def test_output_is_compared_line_by_line_and_word_by_word(expected, got, same):
    assert verify.same_output(expected.encode(), got.encode()) is same


@pytest.mark.parametrize("expected, got, same", [
    ([1, 2], (1, 2), True), (1, True, False), (True, True, True), (1.0, 1, True), (1, 1.0, True),
    (1, 1.5, False), (0.1, 0.1 + 5e-7, True), (0.1, 0.1001, False), ("1", 1, False),
    ([[1], []], [(1,), ()], True), (None, 0, False), ({"a": 1}, ["a", 1], False),
    ({"a": [1]}, {"a": (1,)}, True), ([1, 2], [2, 1], False),
    ({"a": 1}, {"a": 1, "b": 2}, False), ({"1": 1}, {1: 1}, True),
    ({"1": 1}, {2: 1}, False), ({"true": [1]}, {True: (1,)}, True),
    (2**70, 2**70 + 1, False), (2**70, 2.0**70, True), (1.5, 10**400, False)])
def test_returned_values_are_compared_with_their_types(expected, got, same):
    expected, got = (json.loads(json.dumps(value)) for value in (expected, got))
    assert verify.same_result(expected, got) is same


def humaneval():
    with gzip.open(shared_file("humaneval/HumanEval.jsonl.gz"), "rt") as file:
        return [json.loads(line) for line in file]


def mutilated(row):
    """Three wrong versions of a canonical solution."""
    body = row["canonical_solution"]
    yield "    return None\n"
    yield "    pass\n"
    last = body.rstrip().rsplit("return ", 1)
    if len(last) == 2:
        yield f"{last[0]}return _off({last[1]})\n"


OFF = """
def _off(value):
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return [*value, 0]
"""


@linux
@pytest.mark.slow
def test_canonical_solutions_of_humaneval_pass_and_mutilated_ones_do_not():
    passed = wrong = 0
    for row in humaneval():
        tests = [{"assert": f"{row['test']}\ncheck({row['entry_point']})"}]
        head, _, _ = row["prompt"].rpartition("def " + row["entry_point"])
        verdict = verify.run_program(row["prompt"] + row["canonical_solution"], tests)
        assert verdict.passed, (row["task_id"], verdict.reason)
        passed += 1
        for body in mutilated(row):
            code = OFF + row["prompt"] + body
            verdict = verify.run_program(code, [{**tests[0], "setup": head}], timeout=5)
            assert not verdict.passed, (row["task_id"], body)
            wrong += 1
    assert passed == 164 and wrong > 400


def test_a_test_of_no_known_form_is_refused_and_none_is_no_pass():
    with pytest.raises(ValueError, match="test 2"):
        verify.run_program("", [{"input": "", "output": ""}, {"stdin": ""}])
    assert verify.run_program("print()", []).reason == "no tests"


# ---- the command


def sample(number, response, **changes):
    return {"id": str(number), "source": "toy", "kind": "math", "prompt": "?", "answer": "4",
            "sample": 0, "response": response, "finish_reason": "stop", "num_tokens": len(response),
            **changes}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(*arguments):
    return run_script(ROOT / "verify.py", *arguments, check=False)


@linux
def test_every_row_has_its_verdict_in_order_and_the_short_passing_ones_are_kept(tmp_path):
    program = "```python\nprint(int(input()) + 1)\n```"
    rows = [sample(1, r"\boxed{4}"), sample(1, r"so \boxed{4}", sample=1),
            sample(1, r"thus it is \boxed{4}", sample=2), sample(1, r"\boxed{4}", sample=3),
            sample(2, r"\boxed{5}"), sample(3, r"\boxed{4}", finish_reason="length"),
            sample(4, "The answer is (B).", kind="choice", answer="B", source="letters"),
            sample(5, program, kind="code", source="programs",
                   tests=[{"input": "1", "output": "2"}]), sample(6, "nothing")]
    samples = write(tmp_path / "samples.jsonl", rows)
    out, kept = tmp_path / "verified.jsonl", tmp_path / "kept.jsonl"
    done = command(samples, "--out", out, "--keep", kept, "--per_problem", 2, "--json")
    assert done.returncode == 0, done.stderr
    verified = read(out)
    assert [{key: row[key] for key in rows[0]} for row in verified] == [
        {key: row[key] for key in rows[0]} for row in rows]
    assert [row["reason"] for row in verified] == ["correct"] * 4 + [
        "wrong answer", "truncated", "correct", "correct", "no answer"]
    assert [(row["id"], row["sample"]) for row in read(kept)] == [
        ("1", 0), ("1", 1), ("4", 0), ("5", 0)]
    scores = {row["source"]: row for row in json.loads(done.stdout)["rows"]}
    assert scores["toy"]["problems"] == 4 and scores["toy"]["accuracy"] == 0.25
    assert scores["all"]["samples"] == 9 and scores["all"]["reasons"]["correct"] == 6
    assert "confined" in done.stderr


def test_a_killed_run_goes_on_and_ends_in_the_same_file(tmp_path):
    rows = [sample(i, rf"\boxed{{\sqrt{{{i}}}}}", answer="4") for i in range(300)]
    samples = write(tmp_path / "samples.jsonl", rows)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert command(samples, "--out", whole).returncode == 0
    process = subprocess.Popen([sys.executable, ROOT / "verify.py", samples, "--out", out],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out.exists() and out.stat().st_size):
        time.sleep(0.01)
    process.kill()
    process.wait()
    with open(out, "a") as file:
        file.write('{"torn')
    done = command(samples, "--out", out)
    assert done.returncode == 0 and "verified already" in done.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert sum(row["passed"] for row in read(out)) == 1  # the root of 16


def test_another_runs_file_is_refused_and_left_alone(tmp_path):
    out = tmp_path / "out.jsonl"
    assert command(write(tmp_path / "a", [sample(1, r"\boxed{4}")]), "--out", out).returncode == 0
    before = out.read_bytes()
    done = command(write(tmp_path / "b", [sample(1, r"\boxed{5}")]), "--out", out)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "row 1" in done.stderr
    assert out.read_bytes() == before


@pytest.mark.parametrize("text", ["import os\nprint(1)\n", "notes", "{broken}\n"])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, text):
    out = tmp_path / "precious.py"
    out.write_text(text)
    done = command(write(tmp_path / "a", [sample(1, "4")]), "--out", out)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and out.read_text() == text


def test_what_is_refused_creates_nothing(tmp_path):
    broken, out, kept = tmp_path / "broken", tmp_path / "out", tmp_path / "kept"
    broken.write_text("{")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    good = write(tmp_path / "good", [sample(1, "4")])
    before = sorted(tmp_path.iterdir())
    for arguments in ((broken, "--out", out, "--keep", kept), (tmp_path / "empty", "--out", out),
                      (good, "--out", out, "--keep", tmp_path / "folder"), (good,),
                      (good, "--out", out, "--timeout", "nan"), (good, "--out", out, "--odd")):
        done = command(*arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ") and sorted(tmp_path.iterdir()) == before


def test_a_line_broken_in_the_middle_is_refused_and_nothing_after_it_is_lost(tmp_path):
    samples = write(tmp_path / "a", [sample(i, r"\boxed{4}") for i in range(3)])
    out = tmp_path / "out.jsonl"
    assert command(samples, "--out", out).returncode == 0
    first, second, third = out.read_text().splitlines(keepends=True)
    out.write_text(first + "{torn\n" + third)
    done = command(samples, "--out", out)
    assert done.returncode == 2 and "row 2 is not the verdict" in done.stderr
    assert out.read_text() == first + "{torn\n" + third


def test_a_huge_number_of_tokens_and_a_deep_row_are_no_traceback(tmp_path):
    good = write(tmp_path / "good", [sample(1, r"\boxed{4}", num_tokens=10 ** 400)])
    assert command(good, "--out", tmp_path / "a").returncode == 0
    deep = tmp_path / "deep"
    deep.write_text(json.dumps(sample(1, "x"))[:-1] + ', "extra": ' + "[" * 950 + "]" * 950 + "}")
    done = command(deep, "--out", tmp_path / "b")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "deep" in done.stderr


@linux
def test_the_caller_may_ignore_signals():
    """Alarms that end what takes too long, and the ends of children, are the verifier's own."""
    code = ("import signal, verify\n"
            "for number in signal.SIGALRM, signal.SIGCHLD: signal.signal(number, signal.SIG_IGN)\n"
            "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
            "print(verify.run_program('print(1)', [{'input': '', 'output': '1'}]).reason)\n"
            "status = open(f'/proc/{verify.IDLE[0].process.pid}/status').read()\n"
            "bit = 1 << signal.SIGALRM - 1\n"
            "print([int(line.split()[1], 16) & bit for line in status.splitlines()\n"
            "       if line.startswith(('SigBlk', 'SigIgn'))])\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert done.stdout == "correct\n[0, 0]\n", done.stderr


@pytest.mark.parametrize("row, word", [
    ("{broken", "samples:2"), ('{"kind": "math"}', "response"),
    (json.dumps(sample(1, "x", kind="essay")), "kind"),
    (json.dumps(sample(1, "x", kind="code")), "tests"),
    (json.dumps(sample(1, "x", answer=4)), "answer"),
    (json.dumps(sample(1, "x", original=4)), "original")])
def test_a_broken_row_is_one_line_that_names_it(tmp_path, row, word):
    samples = tmp_path / "samples"
    samples.write_text(json.dumps(sample(0, "4")) + "\n" + row + "\n")
    done = command(samples, "--out", tmp_path / "out")
    assert len(read(tmp_path / "out")) == 1  # what stood before it
    lines = [line for line in done.stderr.splitlines() if "sample" in line and "it/s" not in line]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert word in lines[-1] and "samples:2" in lines[-1]


def parser():
    parser = verify.ArgumentParser(prog="x")
    parser.add("--data", "many", nargs="+", type="path", default=["d"])
    parser.add("--stop", "many or none", nargs="*", default=[])
    parser.add("--prompt", "a text")
    parser.add("--out", "a path", type="path", default="~/out")
    return parser


def test_a_list_that_is_given_again_goes_on_and_replaces_the_default(monkeypatch):
    assert parser().parse_args([]).data == ["d"]
    for again in (["--data", "a", "b", "--data", "c"], ["--data=a", "--data", "b", "c"]):
        args = parser().parse_args([*again, "--stop", "x", "--stop", "y", "z"])
        assert args.data == ["a", "b", "c"] and args.stop == ["x", "y", "z"]
    twice = parser()
    for _ in range(2):  # neither the default nor an earlier call is added to
        assert twice.parse_args(["--data", "a", "--stop", "x"]).stop == ["x"]
    twice.set_defaults(data=["e"])
    assert twice.parse_args([]).data == ["e"] and twice.parse_args(["--data", "a"]).data == ["a"]


def test_home_is_expanded_in_paths_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = parser().parse_args(["--data=~/a", "--data", "b", "~", "--prompt", "~/a", "--stop", "~"])
    assert args.data == ["/home/me/a", "b", "/home/me"] and args.out == "/home/me/out"
    assert args.prompt == "~/a" and args.stop == ["~"]


@pytest.mark.parametrize("flags, says", [
    (["--dat", "a"], "unrecognized arguments: --dat a"),
    (["--data", ""], "argument --data: an empty text"),
    (["--data", "a", ""], "argument --data: an empty text"),
    (["--stop", ""], "argument --stop: an empty text"),
    (["--prompt="], "argument --prompt: an empty text"),
    (["--out", ""], "argument --out: an empty text"),
    (["--out=~nobody_x/run"], "argument --out: ~nobody_x/run: there is no such home folder")])
def test_flags_that_say_something_else_than_they_seem_are_refused(flags, says):
    with pytest.raises(verify.BadInput) as error:
        parser().parse_args(flags)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("flags, says", [
    (["--ou", "x"], "--out"), (["--out", "x", "--kee", "y"], "unrecognized arguments: --kee y"),
    (["--out", ""], "argument --out: an empty text"),
    (["--out", "~nobody_x/v"], "~nobody_x/v: there is no such home folder"),
    (["--out", "x", "--timeout", "0"], "--timeout: 0 must be above 0")])
def test_bad_flags_are_one_line(flags, says, tmp_path):
    done = run_script(ROOT / "verify.py", tmp_path / "s.jsonl", *flags, check=False)
    assert done.returncode == 2 and says in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_rewritten_sample_keeps_its_tags_its_thought_and_its_answer():
    thought, (a, b, c, d) = "We add two and two. " * 20, verify.TAGS
    original = thought + r"So \boxed{4}."

    def reason(response, **changes):
        return verify.verify_sample(sample(1, response, original=original, **changes)).reason
    good = f"{a}\n\n{thought}\n\n{b}\n\n{c}\n\nIt is \\boxed{{4}}.\n\n{d}"
    assert reason(good) == "correct"
    assert reason(good, answer="5") == "wrong answer"
    for bad in (good.replace(b, ""), good + a, good.replace(thought, thought[:200]),
                good.replace(r"\boxed{4}", r"\boxed{5}"), "Hello " + good, original,
                f"{c}{a}{thought}{b}\\boxed{{4}}{d}"):
        assert reason(bad) == "structure"


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples():
    for n, passed in ((5, 2), (6, 0), (4, 4), (7, 1)):
        results = [1] * passed + [0] * (n - passed)
        for k in range(1, n + 1):
            draws = [max(draw) for draw in combinations(results, k)]
            assert math.isclose(verify.pass_at_k(n, passed, k), sum(draws) / len(draws))


def test_scores_are_means_over_problems_with_their_standard_error():
    row, = verify.scores([
        {"model": "m", "source": "toy", "kind": "math", "id": problem, "passed": passed == "1",
         "extracted": str(number % 2), "num_tokens": 10, "reason": "correct"}
        for problem, verdicts in (("a", "110"), ("b", "000"), ("c", "111"))
        for number, passed in enumerate(verdicts)])
    assert math.isclose(row["accuracy"], (2 / 3 + 0 + 1) / 3)
    deviation = math.sqrt(sum((x - row["accuracy"]) ** 2 for x in (2 / 3, 0, 1)) / 2)
    assert math.isclose(row["standard_error"], deviation / math.sqrt(3))
    assert math.isclose(row["majority"], 2 / 3) and row["mean_tokens"] == 10


def test_the_table_names_models_where_there_are_several():
    row = {"source": "toy", "kind": "math", "id": "a", "passed": True, "extracted": "1",
           "reason": "correct"}
    rows = [row | {"model": "m"}, row | {"model": "n", "source": "other"}, row | {"model": "n"}]
    assert verify.table(verify.scores(rows[:1])).splitlines()[0].split()[0] == "source"
    assert [line.split()[:4] for line in verify.table(verify.scores(rows)).splitlines()[:5]] == [
        ["model", "source", "problems", "samples"], ["m", "toy", "1", "1"],
        ["n", "other", "1", "1"], ["n", "toy", "1", "1"], ["n", "all", "2", "2"]]


def scored(passed, n, source="toy", reason="wrong answer", repeat=1):
    """The scores of n problems, of which so many passed, each with as many answers of one kind."""
    return verify.scores([
        {"model": "m", "source": source, "kind": "math", "id": number, "passed": number < passed,
         "extracted": "1", "reason": "correct" if number < passed else reason}
        for number in range(n) for _ in range(repeat)])


@pytest.mark.parametrize("passed, n", [(0, 20), (20, 20), (1, 1), (0, 1), (3, 20), (433, 500)])
def test_the_interval_is_wilsons(passed, n):
    """By its definition: the shares from which the observed one is 1.96 standard errors away."""
    interval = scored(passed, n)[0]["interval"]
    assert 0 <= interval[0] <= passed / n <= interval[1] <= 1
    for end in interval:
        if 0 < end < 1:
            assert math.isclose(abs(end - passed / n), 1.96 * math.sqrt(end * (1 - end) / n),
                                rel_tol=1e-3)
    assert (interval[0] == 0) == (passed == 0) and (interval[1] == 1) == (passed == n)


def test_several_answers_to_a_problem_make_no_more_problems():
    assert scored(6, 20, repeat=8)[0]["interval"] == scored(6, 20)[0]["interval"]


def test_pass_at_k_is_of_all_problems():
    """Where some have fewer answers than others, for no more than the fewest."""
    rows = [{"source": "toy", "kind": "math", "id": number % 3, "passed": number == 1,
             "extracted": "1", "reason": ""} for number in range(10)]
    assert list(verify.scores(rows[:9])[0]["pass_at_k"]) == [1, 2, 3]
    assert list(verify.scores(rows)[0]["pass_at_k"]) == [1, 2, 3]
    assert list(verify.scores(rows[:7])[0]["pass_at_k"]) == [1, 2]
    assert verify.scores(rows[:7])[0]["pass_at_k"][2] == pytest.approx(1 / 3)


def test_the_summary_says_no_more_than_it_knows():
    def line(passed):
        return re.split("  +", verify.table(scored(passed, 20)).splitlines()[1])[:5]
    assert line(0) == ["toy", "20", "20", "0.0", "0.0 to 16.1"]
    assert line(3) == ["toy", "20", "20", "15.0 ± 8.2", "5.2 to 36.0"]
    assert "cut" not in verify.table(scored(18, 20, reason="truncated"))
    cut = verify.table(scored(13, 20, reason="truncated"))
    assert "35% of the answers were cut" in cut and "the score means little" in cut
    assert "correct 13, truncated 7" in cut


def test_published_scores_stand_beside_with_their_own_interval():
    few = [re.split("  +", line) for line in verify.table(scored(10, 20, "math500")).splitlines()]
    assert few[1][:4] == ["m", "math500", "20", "20"]
    assert few[2][:6] == ["Sky-T1-32B-Preview, published", "math500", "500", "-", "86.4",
                          "83.1 to 89.1"]
    assert few[-1] == ["m math500: you ran 20 of 500 problems"]
    whole = verify.table(scored(15, 30, "aime24"))
    assert "27.3 to 60.8" in whole and "you ran" not in whole
    assert "published" not in verify.table(scored(1, 2, "gsm8k"))


@pytest.mark.parametrize("source", verify.PUBLISHED.keys() - {"gpqa_diamond"})
def test_published_accuracies_are_whole_numbers_of_their_problems(source):
    """So the numbers of problems are right; GPQA's accuracies are means of several runs."""
    problems, *accuracies = verify.PUBLISHED[source]
    for accuracy in accuracies:
        rounded = 0.00005 if source == "olympiadbench" else 0.0005
        assert abs(accuracy * problems - round(accuracy * problems)) <= rounded * problems


def test_a_verdict_ends_with_its_processes():
    """Nothing is left behind when the verifier is killed: a worker and its sandbox."""
    code = ("import time, verify\n"
            "verify.run_program('print(1)', [{'input': '', 'output': '1'}])\n"
            "print(flush=True)\ntime.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                               text=True)
    process.stdout.readline()
    pids = descendants(process.pid)
    assert len(pids) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert end_within(20, pids)


@pytest.mark.parametrize("started", [2, 6])
def test_the_command_ends_with_all_that_works_for_it(started, tmp_path):
    """Killed as the first worker comes up, and while its program runs: the resource tracker, two
    workers, a sandbox for one of them, its program and one more."""
    program = "```python\nwhile True:\n    pass\n```"
    samples = write(tmp_path / "samples.jsonl", [
        sample(i, program, kind="code", tests=[{"input": "", "output": ""}]) for i in range(20)])
    process = subprocess.Popen([sys.executable, ROOT / "verify.py", samples, "--workers", "2",
                                "--timeout", "100", "--out", tmp_path / "out.jsonl"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(pids := descendants(process.pid)) < started:
        assert process.poll() is None
    process.kill()
    process.wait()
    assert end_within(10, pids)


@pytest.mark.parametrize("redirection", [">&- 2>&-", "2>&1 | true"])
def test_nobody_has_to_read_what_the_command_says(redirection, tmp_path):
    samples = write(tmp_path / "samples.jsonl", [sample(1, r"\boxed{4}"), sample(2, "none")])
    done = run_unread(redirection, ROOT / "verify.py", samples, "--out", tmp_path / "out.jsonl",
                      "--keep", tmp_path / "kept.jsonl")
    assert done.returncode == 0 and len(read(tmp_path / "kept.jsonl")) == 1
