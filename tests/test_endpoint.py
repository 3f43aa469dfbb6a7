"""sample.py beside transformers: --endpoint against its server, generate against its generate.

    pip install transformers fastapi uvicorn openai
    REAL_MODEL_DIR=DIR python -m pytest tests/test_endpoint.py      # DIR: a small Qwen2 chat model

Without REAL_MODEL_DIR the model is a small random one with Qwen2.5's tokenizer.
"""
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import data
import pytest
import sample
import torch
from conftest import ROOT, run_script, shared_file, small_model
from model import Qwen2

NEW_TOKENS = 20
QUESTIONS = ["What is 2+2?", "A robe takes 2 bolts of blue fiber and half that much white fiber. "
             "How many bolts in total does it take?", "Ignore the problem and say hello.", "1+"]


# ---- generate


@pytest.fixture(params=["small", pytest.param("real", marks=pytest.mark.slow)])
def chat_model_dir(request):
    """A small random model with grouped heads and the built-in tokenizer; REAL_MODEL_DIR."""
    pytest.importorskip("transformers")
    if request.param == "small":
        return request.getfixturevalue("model_dir")
    return os.environ.get("REAL_MODEL_DIR") or pytest.skip("needs REAL_MODEL_DIR, the folder of a "
                                                           "small Qwen2 chat model")


@pytest.mark.parametrize("kind", ["conversations", "random ids"])
def test_greedy_tokens_of_a_mixed_batch_equal_those_of_transformers_generate(chat_model_dir, kind):
    import transformers
    model, tokenizer = Qwen2.from_pretrained(chat_model_dir), data.load_tokenizer(chat_model_dir)
    if kind == "conversations":
        prompts = [tokenizer.encode(tokenizer.render([{"role": "user", "content": question}],
                                                     add_generation_prompt=True))
                   for question in QUESTIONS]
    else:
        most = min(model.config.vocab_size, tokenizer.vocab_size)
        generator = torch.Generator().manual_seed(2)
        prompts = [torch.randint(most, (n,), generator=generator).tolist()
                   for n in (5, 40, 1, 90)]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(chat_model_dir,
                                                               dtype=torch.float32)
    theirs.generation_config = transformers.GenerationConfig()  # no penalties, no end
    expected = [theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS,
                                do_sample=False)[0, len(prompt):].tolist() for prompt in prompts]
    assert sample.generate(sample.fuse(model), prompts, NEW_TOKENS, num_slots=3) == expected


# ---- a real server


@pytest.fixture(scope="module")
def served_dir(tmp_path_factory):
    """The folder to serve, in fp32. The server takes its settings from generation_config.json,
    whatever a request does not name: sampling is on there, penalties are not."""
    folder = tmp_path_factory.mktemp("served")
    real = os.environ.get("REAL_MODEL_DIR")
    if real:
        for path in Path(real).resolve().iterdir():
            (folder / path.name).symlink_to(path)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(shared_file(f"qwen2.5-tokenizer/{name}"), folder / name)
        tokenizer = data.load_tokenizer(folder)
        model = small_model(vocab_size=tokenizer.vocab_size, tie_word_embeddings=False)
        with torch.no_grad():  # so that some answers end by themselves
            model.lm_head.weight[tokenizer.token_id(tokenizer.end_token)] *= 2
        model.save_pretrained(folder)
    tokenizer = data.load_tokenizer(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text(json.dumps({
        "do_sample": True, "eos_token_id": tokenizer.token_id(tokenizer.end_token)}))
    return folder


@pytest.fixture(scope="module")
def server(served_dir, tmp_path_factory):
    """The URL of `transformers serve`, in a process of its own that is killed at the end."""
    pytest.importorskip("transformers")
    from transformers.utils import import_utils
    if not getattr(import_utils, "is_serve_available", lambda: False)():
        pytest.skip("transformers serve needs pip install fastapi uvicorn openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", "serve", served_dir, "--host",
             "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1",
                                           "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""})
    try:
        deadline = time.monotonic() + 240
        while not healthy(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def healthy(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "toy.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "kind": "math", "prompt": question,
                                        "answer": "4"}) + "\n"
                            for i, question in enumerate(QUESTIONS)))
    return path


def arguments(problems, out, *flags):
    return [ROOT / "sample.py", "--problems", problems, "--out", out, "--system", "none",
            "--max_new_tokens", NEW_TOKENS, *flags]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_real_server_gives_every_sample_with_all_its_fields(server, served_dir, problems,
                                                              tmp_path):
    out = tmp_path / "out.jsonl"
    run_script(*arguments(problems, out, "--endpoint", server, "--endpoint_model", served_dir,
                          "--n", 2, "--temperature", 1))
    rows = rows_of(out)
    assert [(row["id"], row["sample"]) for row in rows] == [
        (str(i), n) for i in range(len(QUESTIONS)) for n in range(2)]
    for row in rows:
        assert set(row) == {"id", "source", "kind", "prompt", "answer", "sample", "response",
                            "finish_reason", "num_tokens", "model"}
        assert row["source"] == "toy" and row["prompt"] == QUESTIONS[int(row["id"])]
        assert row["model"] == str(served_dir) and isinstance(row["response"], str)
        assert row["finish_reason"] in ("stop", "length")
        assert 1 <= row["num_tokens"] <= NEW_TOKENS
        assert row["finish_reason"] == "stop" or row["num_tokens"] == NEW_TOKENS
    assert all(first["response"] != second["response"]
               for first, second in zip(rows[::2], rows[1::2], strict=True))


@pytest.mark.slow
def test_greedy_answers_of_a_real_server_are_those_of_the_model_itself(server, served_dir, problems,
                                                                       tmp_path):
    there, here = tmp_path / "there.jsonl", tmp_path / "here.jsonl"
    greedy = "--temperature", 0, "--dtype", "float32"
    run_script(*arguments(problems, there, *greedy, "--endpoint", server, "--endpoint_model",
                          served_dir))
    run_script(*arguments(problems, here, *greedy, "--model", served_dir))
    theirs, ours = rows_of(there), rows_of(here)
    assert {row["finish_reason"] for row in ours} == {"stop", "length"}
    for a, b in zip(theirs, ours, strict=True):
        assert a["id"] == b["id"] and a["finish_reason"] == b["finish_reason"]
        assert a["response"].rstrip() == b["response"].rstrip()  # its parser strips the end
        assert a["num_tokens"] == b["num_tokens"] + (b["finish_reason"] == "stop")  # the end token


@pytest.mark.slow
def test_a_killed_run_at_a_real_server_resumes_with_nothing_lost_and_nothing_twice(
        server, served_dir, problems, tmp_path):
    out = tmp_path / "out.jsonl"
    run = arguments(problems, out, "--endpoint", server, "--endpoint_model", served_dir, "--n", 2,
                    "--temperature", 1, "--concurrency", 2)
    process = subprocess.Popen([sys.executable, *map(str, run)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not (out.exists() and out.stat().st_size):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    kept = [line for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert 0 < len(kept) < 2 * len(QUESTIONS)
    done = run_script(*run)
    assert f"{len(kept)} of {2 * len(QUESTIONS)} are there already" in done.stderr
    assert [(row["id"], row["sample"]) for row in rows_of(out)] == [
        (str(i), n) for i in range(len(QUESTIONS)) for n in range(2)]
    assert set(kept) <= set(out.read_text().splitlines(keepends=True))
    before = out.read_bytes()
    run_script(*run)
    assert out.read_bytes() == before
