"""README says what is there, and its commands do what it says."""
import http.server
import json
import re
import shutil
import threading

import pytest
from conftest import ROOT, code_blocks, run_commands, run_script

README = (ROOT / "README.md").read_text()


def test_the_file_table_names_every_file_with_its_length():
    table = {name: int(lines)
             for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)}
    files = {path.name: path.read_text().count("\n") for path in ROOT.glob("*.py")}
    assert table.keys() == files.keys()
    assert all(abs(table[name] / files[name] - 1) < 0.02 for name in files), files


def test_every_flag_that_readme_names_exists():
    scripts = ("data.py", "train.py", "sample.py", "verify.py")
    known = "".join(run_script(ROOT / name, "-h").stdout for name in scripts)
    torchrun = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}
    named = set(re.findall(r"--[a-z_]+", README)) - torchrun
    assert named and {flag for flag in named if not re.search(rf"{flag}\b", known)} == set()


def test_readme_is_short_and_filled_in():
    assert README.count("\n") < 200 and not re.search(r"@\w+@", README)


class Rewriter(http.server.BaseHTTPRequestHandler):
    """A server that marks an answer's two parts as GPT-4o-mini should."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = asked["messages"][0]["content"].partition("The answer:\n\n")[2]
        text = (f"<|begin_of_thought|>\n\n{answer}\n\n<|end_of_thought|>\n\n"
                f"<|begin_of_solution|>\n\n{answer}\n\n<|end_of_solution|>")
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


def write_problems(path, numbers, **fields):
    rows = [{"id": str(n), "source": path.stem, "kind": "math", "prompt": f"{n}+{n}=?",
             "answer": str(2 * n), **{name: value.format(n, 2 * n)
                                      for name, value in fields.items()}} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_the_commands_at_full_size_and_for_a_model_of_your_own_run_in_small(rewriter, tmp_path):
    """A tiny model that has learnt its few problems by heart lies in folders of the names that
    README uses: a name that exists as a path asks no hub."""
    write_problems(tmp_path / "lesson.jsonl", range(10, 22),
                   response="{0}+{0}={1}\n\n\\boxed{{{1}}}")
    for name, numbers in (("problems", range(10, 22)), ("math500", (12,)), ("aime_2024", (17,)),
                          ("gsm8k", (13, 14))):
        write_problems(tmp_path / f"{name}.jsonl", numbers)
    run_script(ROOT / "train.py", "--data", tmp_path / "lesson.jsonl", "--system", "qwq",
               "--max_steps", 60, "--cache", tmp_path / "cache", "--out", tmp_path / "teacher")
    for name in ("QwQ-32B-Preview", "Qwen2.5-32B-Instruct", "Qwen2.5-0.5B-Instruct"):
        shutil.copytree(tmp_path / "teacher", tmp_path / "Qwen" / name)
    script = (code_blocks(README, "At full size")[0]
              + code_blocks(README, "A model and rows of your own")[1])
    for large, small in (("https://api.openai.com/v1", rewriter), ("_node=8", "_node=2"),
                         ("_parallel 8", "_parallel 2"), ("_tokens 1024", "_tokens 256")):
        assert large in script
        script = script.replace(large, small)
    assert script.count("python ") == 9 and script.count("torchrun ") == 2
    printed = run_commands(script, tmp_path)
    lines = {name: len((tmp_path / f"{name}.jsonl").read_text().splitlines())
             for name in ("samples", "rewritten", "kept", "rows")}
    assert lines["samples"] == lines["rewritten"] == 12 and 0 < lines["rows"] <= lines["kept"]
    for part in ("GiB a GPU, at its peak", "targets in green"):
        assert part in printed
    assert re.search(r"^gsm8k +2 +2 ", printed, re.M)  # the table of scores
    for folder in ("sky", "mine"):
        assert (tmp_path / "out" / folder / "model.safetensors").exists()
