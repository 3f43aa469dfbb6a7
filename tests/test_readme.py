"""The manual of README: it says what is there, and its commands do what it says."""
import http.server
import inspect
import json
import re
import shutil
import threading

import pytest

from conftest import ROOT, code_blocks, run_commands, run_script
import data
import model
import sample
import train
import verify

README = (ROOT / "README.md").read_text()


def test_the_tour_names_every_file_with_its_length_and_what_is_in_it():
    tour = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+ \|.*)", README, re.M))
    files = {path.name: path.read_text() for path in ROOT.glob("*.py")}
    assert tour.keys() == files.keys()
    for name, text in files.items():
        lines, *columns = tour[name].split("|")
        assert abs(int(lines) / text.count("\n") - 1) < 0.02, name
        read_first = re.findall(r"`(\w+)", "".join(columns))
        assert len(read_first) >= 6
        assert {there for there in read_first
                if not re.search(rf"^(class|def) {there}\b", text, re.M)} == set(), name


def test_what_the_exercises_change_is_in_the_code():
    opposite = {"True": "False", "False": "True"}
    changes = re.findall(r": `([^`]*)(True|False)([^`]*)` in `(\w+)`", README)
    assert len(changes) == 2
    for before, value, after, function in changes:
        code = inspect.getsource(getattr(data, function, None) or getattr(model, function))
        assert before + opposite[value] + after in code, function


def test_every_flag_that_readme_names_exists(in_process):
    known = "".join(in_process(module, "-h")[1] for module in (data, train, sample, verify))
    others = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint",  # torchrun's
              "--extra-index-url"}  # pip's
    named = set(re.findall(r"--[a-z_-]*[a-z]", README)) - others
    assert named and {flag for flag in named if not re.search(rf"{flag}\b", known)} == set()


def test_every_file_and_benchmark_that_readme_names_exists():
    for name in re.findall(r"`(?:python )?(tests/\w+\.\w+|bench_\w+\.py)", README):
        assert (ROOT / "tests" / name.removeprefix("tests/")).is_file(), name
    for name, part in re.findall(r"`(bench_\w+\.py) (\w+)", README):
        assert f'"{part}"' in (ROOT / "tests" / name).read_text()
    table = README.partition("| `--problems` |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(data.EVALUATIONS)


def test_the_picture_shows_the_figures_of_the_table():
    bars = [float(bar) for bar in re.search(r"^    bar \[(.*)\]", README, re.M)[1].split(",")]
    labels = re.findall(r'"([^"]+)"', re.search(r"^    x-axis \[(.*)\]", README, re.M)[1])
    table = README.partition("## The whole recipe")[2]
    for label, bar in zip(labels, bars, strict=True):
        assert f"\n| {label} | {bar:.1f} |" in table


def test_readme_has_lines_that_fit_a_page_and_nothing_left_to_fill_in():
    for line in README.splitlines():
        assert len(line) <= (160 if line.startswith("|") else 100), line
    assert not re.search(r"@\w*@|\?\?|TODO", README)


class Rewriter(http.server.BaseHTTPRequestHandler):
    """A server that marks an answer's two parts, and grades problems, as GPT-4o-mini should."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = asked["messages"][0]["content"].partition("The answer:\n\n")[2]
        text = (f"<|begin_of_thought|>\n\n{answer}\n\n<|end_of_thought|>\n\n"
                f"<|begin_of_solution|>\n\n{answer}\n\n<|end_of_solution|>") if answer else "9"
        reply = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def rewriter():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Rewriter)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()


def write_rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sum_of(n, **fields):
    return {"id": str(n), "kind": "math", "prompt": f"{n}+{n}=?", "answer": str(2 * n), **fields}


def program(n, **fields):
    tests = {"inputs": [""], "outputs": [str(n)]}
    return {"question": f"Print {n}.", "input_output": json.dumps(tests), "starter_code": "",
            **fields}


def write_published_sets(folder):
    """Small data sets in folders of the names that README uses, in their own layouts: a name that
    exists as a path asks no hub."""
    sums = [{"source": source, "problem": f"{n}+{n}=?", "solution": f"\\boxed{{{2 * n}}}"}
            for source, numbers in (("math", (10, 11, 12)), ("amc_aime", (13, 14)),
                                    ("olympiads", (15, 16, 17)), ("cn_k12", (18, 19)))
            for n in numbers]
    write_rows(folder / "AI-MO/NuminaMath-CoT/data/train-00000-of-00001.jsonl", *sums)
    write_rows(folder / "codeparrot/apps/train.jsonl", program(30, problem_id=0))
    write_rows(folder / "codeparrot/apps/test.jsonl", program(31, problem_id=1))
    write_rows(folder / "BAAI/TACO/ALL/train-00000-of-00001.jsonl",
               program(32, difficulty="EASY"), program(33, difficulty="MEDIUM"))
    write_rows(folder / "BAAI/TACO/ALL/test-00000-of-00001.jsonl", program(34, difficulty="MEDIUM"))
    write_rows(folder / "RUC-AIBOX/long_form_thought_data_5k/public.jsonl",
               *({"question": "Who?", "combined_text": f"The {domain}.", "domain": domain}
                 for domain in ("math", "physics", "puzzle")))
    for name, numbers in (("math500", (12,)), ("aime_2024", (17,)), ("gsm8k", (13, 14))):
        write_rows(folder / f"{name}.jsonl", *map(sum_of, numbers))


@pytest.mark.slow
def test_the_commands_at_full_size_and_for_a_model_of_your_own_run_in_small(rewriter, tmp_path):
    """With a tiny model that has learnt the few problems by heart."""
    write_published_sets(tmp_path)
    sums = [sum_of(n, response=f"{n}+{n}={2 * n}\n\n\\boxed{{{2 * n}}}") for n in range(10, 20)]
    programs = [{"kind": "code", "prompt": f"Print {n}.",
                 "tests": [{"input": "", "output": str(n)}],
                 "response": f"```python\nprint({n})\n```"} for n in (31, 33)]
    write_rows(tmp_path / "lesson.jsonl", *sums, *programs)
    run_script(ROOT / "train.py", "--data", tmp_path / "lesson.jsonl", "--system", "qwq",
               "--max_steps", 80, "--cache", tmp_path / "cache", "--out", tmp_path / "teacher")
    for name in ("Qwen/QwQ-32B-Preview", "Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct",
                 "out/tiny-1"):
        shutil.copytree(tmp_path / "teacher", tmp_path / name)
    script = (code_blocks(README, "At full size")[0]
              + "".join(code_blocks(README, "Your own model and rows")[1:]))
    for large, small in (("https://api.openai.com/v1", rewriter), ("_node=8", "_node=2"),
                         ("_parallel 8", "_parallel 2"), ("_tokens 1024", "_tokens 256")):
        assert large in script
        script = script.replace(large, small)
    assert script.count("python ") == 13 and script.count("torchrun ") == 3
    printed = run_commands(script, tmp_path)
    def rows_in(name):
        return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    asked = {f"samples/{name}": [row["prompt"] for row in rows_in(f"samples/{name}")]
             for name in ("apps", "taco", "math", "amc_aime", "olympiads")}
    assert asked == {
        "samples/apps": ["Print 31."], "samples/taco": ["Print 33."],
        "samples/math": ["10+10=?", "11+11=?", "12+12=?"],
        "samples/amc_aime": ["13+13=?", "14+14=?"],
        "samples/olympiads": ["15+15=?", "16+16=?", "17+17=?"]}
    kept = {row["prompt"] for row in rows_in("kept")}
    assert len(rows_in("rewritten")) == 10 and "Print 33." in kept
    assert {row["prompt"] for row in rows_in("rows")} == kept - {"12+12=?", "17+17=?"} != set()
    assert [row["domain"] for row in rows_in("still2")] == ["physics", "puzzle"]
    for part in ("GiB a GPU, at its peak", "its targets green"):
        assert part in printed
    assert re.search(r"^gsm8k +2 +2 ", printed, re.M)  # the table of scores
    for folder in ("probe", "sky", "ten", "mine"):
        assert (tmp_path / "out" / folder / "model.safetensors").exists()
