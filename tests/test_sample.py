"""sample.py: the cache and the engine against the plain forward pass, sampling against plain
definitions, and runs that are killed, resumed and shared out."""
import http.server
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import sample
import torch
import verify
from conftest import (ROOT, descendants, run_script, run_unread, say_tied, small_model,
                      start_script)
from sample import Engine, Request, Sampling, choose, generate, stream_key, uniform


def prompts_of(*lengths, vocab_size=263):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def greedy_by_forward(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt):]


@pytest.mark.parametrize("shape", [dict(), dict(num_key_value_heads=1),
                                   dict(num_key_value_heads=4, tie_word_embeddings=True)])
def test_greedy_tokens_equal_the_full_forward_pass_in_a_mixed_batch(shape):
    model, prompts = small_model(**shape), prompts_of(3, 40, 1, 17, 300)
    answers = generate(model, prompts, 12, num_slots=2)
    assert answers == [greedy_by_forward(model, prompt, 12) for prompt in prompts]


def test_cached_logits_equal_full_logits():
    model, (prompt,) = small_model(), prompts_of(20)
    cache = sample.KVCache(model.config, 3, 64, torch.float32, "cpu")
    full = model(torch.tensor([prompt]))[0]
    with torch.inference_mode():
        logits = [cache.prefill(model, torch.tensor(prompt[:5]), 1)]
        cache.copy(1, 0, 5)
        for i, token in enumerate(prompt[5:], 5):
            ids = torch.tensor([token, token])
            logits.append(cache.decode(model, ids, torch.tensor([i, i]), 32)[0])
    torch.testing.assert_close(torch.stack(logits), full[4:].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_depends_on_its_stream_alone(dtype):
    model, prompts = sample.fuse(small_model().to(dtype)), prompts_of(9, 2, 30, 2, 14, 7)
    options = dict(temperature=1.0, top_p=0.9, top_k=50, seed=5, num_slots=3)
    answers = generate(model, prompts, 20, **options)
    order = [4, 2, 0, 5, 1, 3]
    shuffled = generate(model, [prompts[i] for i in order], 20, streams=order, **options)
    assert [shuffled[order.index(i)] for i in range(6)] == answers
    # whatever the longest row: it sets the cache's length
    assert [generate(model, [prompt], 20, streams=[i], **options)[0]
            for i, prompt in enumerate(prompts)] == answers
    assert generate(model, prompts, 20, **{**options, "seed": 6}) != answers
    if dtype == torch.float32:
        for slots in (1, 6):
            assert generate(model, prompts, 20, **{**options, "num_slots": slots}) == answers


MKLDNN = torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("packs", [pytest.param(True, marks=pytest.mark.skipif(
    not MKLDNN, reason="this torch has no oneDNN")), False])
def test_fused_products_change_nothing_and_store_nothing_twice(packs, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: packs)
    model, prompts = small_model(), prompts_of(5, 30)
    before, weights = generate(model, prompts, 12), model.state_dict()
    mlp = sample.fuse(model).model.layers[0].mlp
    assert generate(model, prompts, 12) == before
    if packs:  # the parameters are let go
        assert mlp.gate_proj.weight is None and type(mlp.down_proj) is sample.Packed
    else:
        assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
        assert (mlp.gate_proj.weight.untyped_storage().data_ptr()
                == mlp.up_proj.weight.untyped_storage().data_ptr())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_blocks_change_nothing():
    prompts = prompts_of(5, 30, 1)
    assert generate(sample.fuse(small_model(), compiles=True), prompts, 12) == generate(
        small_model(), prompts, 12)


@pytest.mark.parametrize("shape", [dict(), dict(tie_word_embeddings=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_as_near_to_the_exact_ones_as_plain_ones(shape, dtype):
    exact, plain = small_model(**shape).double(), small_model(**shape).to(dtype)
    ids = torch.tensor(prompts_of(50))
    expected, before = exact(ids), plain(ids)
    fused = sample.fuse(plain)
    packs = MKLDNN if dtype == torch.float32 else sample.data.cpu_multiplies_bf16()
    assert (fused.model.layers[0].mlp.down_proj.weight.layout == torch._mkldnn) == packs
    assert (fused(ids) - expected).norm() < 1.1 * (before - expected).norm() + 1e-6


def test_float32_replaces_bfloat16_only_where_it_is_faster_and_fits(monkeypatch):
    config = small_model().config
    monkeypatch.setattr(sample.data, "cpu_multiplies_bf16", lambda: False)
    assert sample.computed_in("bfloat16", config, "cpu", 16) == "float32"
    for other in (("bfloat16", config, "cpu", 1), ("bfloat16", config, "cuda:0", 16)):
        assert sample.computed_in(*other) == "bfloat16"
    big = replace(config, vocab_size=10 ** 6, hidden_size=10 ** 6)
    assert sample.computed_in("bfloat16", big, "cpu", 16) == "bfloat16"
    monkeypatch.setattr(sample.data, "cpu_multiplies_bf16", lambda: True)
    assert sample.computed_in("bfloat16", config, "cpu", 16) == "bfloat16"


def test_equal_prompts_are_read_once_and_differ_by_their_stream():
    model, (prompt,) = small_model(), prompts_of(25)
    alone = [generate(model, [prompt], 15, temperature=1.0, streams=[i])[0] for i in range(5)]
    assert generate(model, [prompt] * 5, 15, temperature=1.0, num_slots=2) == alone
    assert len(set(map(tuple, alone))) == 5
    reads = []
    engine = Engine(model, 2, 40, Sampling(temperature=1.0))
    prefill, engine.cache.prefill = engine.cache.prefill, lambda *args: (
        reads.append(args), prefill(*args))[1]
    list(engine.run(Request(prompt, i, 15) for i in range(5)))
    assert len(reads) == 1


def test_stop_tokens_end_an_answer_and_are_not_in_it():
    model, prompts = small_model(), prompts_of(6, 11, 8)
    whole = generate(model, prompts, 10)
    stop = whole[0][4]
    answers = generate(model, prompts, 10, stop_ids=[stop], num_slots=2)
    for answer, long in zip(answers, whole, strict=True):
        assert answer == (long[:long.index(stop)] if stop in long else long)


def test_uniform_numbers_are_uniform_and_independent_of_the_batch():
    keys, ids = torch.tensor([stream_key(0, i) for i in range(60)]), torch.arange(50).expand(60, 50)
    u = torch.stack([uniform(keys, torch.full_like(keys, n), ids) for n in range(60)])
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    for axis in range(3):
        first, second = u.narrow(axis, 0, 49), u.narrow(axis, 1, 49)
        assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.02
    assert torch.equal(uniform(keys[7:8], torch.tensor([5]), ids[:1, 3:9]), u[5, 7:8, 3:9])


def test_noise_in_the_last_bits_of_logits_hardly_ever_changes_a_sample():
    torch.manual_seed(0)
    logits, rows = (3 * torch.randn(5000)).expand(2000, -1), torch.arange(2000)
    for options in (dict(), dict(top_p=0.95)):
        one, two = (choose(logits + 1e-5 * torch.randn(2000, 5000) * noisy,
                           Sampling(temperature=1.0, **options), rows, rows) for noisy in (0, 1))
        assert (one != two).sum() <= 1


@pytest.mark.parametrize("options", [dict(), dict(top_p=0.95), dict(top_k=20)])
def test_a_row_is_chosen_alike_beside_any_neighbour(options):
    """Logits of few values, as bf16 has them: equal ones must not be ordered by chance."""
    torch.manual_seed(0)
    peaked = (3 * torch.randn(300, 5000)).round() / 2
    flat = torch.zeros(1, 5000)
    keys = torch.arange(300)
    sampling = Sampling(temperature=1.0, **options)
    alone = choose(peaked.clone(), sampling, keys, keys)
    beside = choose(torch.cat([peaked, flat]), sampling, torch.arange(301),
                    torch.cat([keys, keys[:1]]))
    assert torch.equal(alone, beside[:300])


@pytest.mark.parametrize("options", [dict(), dict(top_k=5), dict(top_p=0.7),
                                     dict(top_k=8, top_p=0.6), dict(temperature=0.5, top_p=0.9)])
@pytest.mark.parametrize("size", [40, 3000])
def test_sampled_frequencies_are_those_of_a_plain_reference(options, size):
    sampling = Sampling(**{"temperature": 1.0, **options})
    torch.manual_seed(0)
    logits = 3 * torch.randn(size)
    p = (logits.double() / sampling.temperature).softmax(-1).tolist()
    order = sorted(range(size), key=lambda i: -p[i])[:sampling.top_k or size]
    total, mass, kept = sum(p[i] for i in order), 0.0, []
    for i in order:  # the shortest prefix whose mass reaches top_p
        if mass / total >= sampling.top_p:
            break
        kept.append(i)
        mass += p[i]
    expected = torch.zeros(size, dtype=torch.double)
    expected[kept] = torch.tensor([p[i] / mass for i in kept], dtype=torch.double)
    n = 20_000
    rows = 2000
    keys = torch.tensor([stream_key(1, i) for i in range(rows)])
    drawn = torch.cat([choose(logits.expand(rows, -1), sampling, keys, torch.full_like(keys, i))
                       for i in range(n // rows)])
    counts = torch.bincount(drawn, minlength=size).double() / n
    assert (counts[expected == 0] == 0).all()
    assert ((counts - expected).abs() < 5 * (expected / n).sqrt() + 1e-3).all()


def test_ids_that_the_tokenizer_lacks_are_never_chosen_and_seen_ones_less():
    logits = torch.tensor([[1.0, 2.0, 9.0]])
    key = torch.tensor([3])
    assert choose(logits.clone(), Sampling(num_ids=2), key, key) == 1
    seen = torch.tensor([[False, False, True]])
    assert choose(logits.clone(), Sampling(repetition_penalty=9.0), key, key, seen) == 1


def test_a_prompt_beyond_the_window_and_an_empty_one_are_refused():
    model = small_model()
    with pytest.raises(ValueError, match="512 positions"):
        generate(model, prompts_of(4, 505), 10)
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        generate(model, [[1], []], 10)
    with pytest.raises(ValueError, match="max_batch_tokens"):
        sample.plan_slots(model, 400, max_batch_tokens=300)


# ---- the script


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "toy.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "kind": "math", "prompt": "1+" * (i % 7 + 1),
                                        "answer": str(i)}) + "\n" for i in range(12)))
    return path


def arguments(model_dir, problems, out):
    return [ROOT / "sample.py", "--model", model_dir, "--problems", problems, "--out", out,
            "--n", "3", "--max_new_tokens", "24", "--max_slots", "4", "--system", "none"]


def test_samples_hold_the_problem_and_what_was_answered(model_dir, problems, tmp_path):
    out = tmp_path / "samples.jsonl"
    run_script(*arguments(model_dir, problems, out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["sample"]) for row in rows] == [
        (str(i), n) for i in range(12) for n in range(3)]
    for row in rows:
        assert row["source"] == "toy" and row["kind"] == "math" and row["answer"] == row["id"]
        assert row["finish_reason"] in ("stop", "length") and row["model"] == str(model_dir)
        assert (row["num_tokens"] == 24) == (row["finish_reason"] == "length")
    assert len({row["response"] for row in rows}) > 30


def test_a_killed_run_resumes_to_the_same_file_and_other_settings_are_refused(
        model_dir, problems, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run_script(*arguments(model_dir, problems, whole))
    command = [sys.executable, *map(str, arguments(model_dir, problems, out))]
    for _ in range(2):
        before = out.stat().st_size if out.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (out.exists() and out.stat().st_size > before) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.wait()
    with open(out, "a") as file:
        file.write('{"torn')
    run_script(*arguments(model_dir, problems, out))
    assert out.read_bytes() == whole.read_bytes()
    run_script(*arguments(model_dir, problems, out), "--limit", "2")
    assert out.read_bytes() == whole.read_bytes()  # fewer problems lose no sample
    done = run_script(*arguments(model_dir, problems, out), "--seed", "1", check=False)
    assert done.returncode == 2 and "seed" in done.stderr and done.stderr.count("\n") == 1
    assert out.read_bytes() == whole.read_bytes()


def test_two_processes_give_the_samples_of_one(model_dir, problems, tmp_path):
    one, two, split = (tmp_path / f"{name}.jsonl" for name in ("one", "two", "split"))
    run_script(*arguments(model_dir, problems, one))
    run_script(*arguments(model_dir, problems, two), processes=2)
    assert two.read_bytes() == one.read_bytes()
    run_script(*arguments(model_dir, problems, split), "--tensor_parallel", "2", processes=2)
    assert split.read_bytes() == one.read_bytes()
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize("redirection", [">&- 2>&-", "2>&1 | true"])
def test_nobody_has_to_read_what_a_run_says(redirection, model_dir, problems, tmp_path):
    done = run_unread(redirection, *arguments(model_dir, problems, tmp_path / "out.jsonl"))
    assert done.returncode == 0 and len(rows_of(tmp_path / "out.jsonl")) == 36


def test_the_others_of_a_killed_process_end_with_one_line(model_dir, problems, tmp_path):
    out = tmp_path / "out.jsonl"
    process = start_script(*arguments(model_dir, problems, out), "--n", 1000, processes=2)
    while not (out.exists() and out.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(descendants(process.pid)[-1], signal.SIGKILL)
    errors = process.communicate(timeout=30)[1]
    assert re.findall("^error: .*", errors, re.M) == [
        "error: another process died, or torchrun was stopped: the same command goes on"], errors
    assert "sample.py\", line" not in errors


def test_one_prompt_is_answered_on_standard_output(model_dir):
    asks = [ROOT / "sample.py", "--model", model_dir, "--prompt", "1+1", "--temperature", "0",
            "--max_new_tokens", "8"]
    answer = run_script(*asks).stdout
    assert answer.endswith("\n") and len(answer) > 1
    assert run_script(*asks, "--tensor_parallel", 2, processes=2).stdout == answer
    refused = run_script(ROOT / "sample.py", "--model", model_dir, processes=2, check=False)
    assert "error: a chat is one process" in refused.stderr


@pytest.mark.parametrize("flags, word", [(["--n", "0"], "--n: 0 must be above 0"),
                                         (["--top_p", "2"], "--top_p"),
                                         (["--max_new_tokens", "600"], "512"),
                                         (["--max_batch_tokens", "9"], "--max_batch_tokens"),
                                         (["--tensor_parallel", "2"], "torchrun"),
                                         (["--temp", "1"], "unrecognized arguments: --temp 1"),
                                         (["--system", ""], "argument --system: an empty text"),
                                         (["--out=~nobody_x/o"], "no such home folder")])
def test_bad_input_is_one_line(model_dir, problems, tmp_path, flags, word):
    done = run_script(*arguments(model_dir, problems, tmp_path / "out.jsonl"), *flags, check=False)
    assert done.returncode == 2 and word in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def sample_file(path, seed=0):
    return sample.SampleFile(path, {"seed": seed}, 0, lambda: None)


def row(i, prompt="p"):
    return {"source": "s", "id": str(i), "sample": 0, "prompt": prompt}


def test_parts_are_those_of_this_very_file_and_of_its_settings(tmp_path):
    path = tmp_path / "run[1].jsonl"
    (tmp_path / "run[1].jsonl.partial").write_text("mine\n")
    sample_file(path).close([])
    (tmp_path / "run[1].jsonl.part1").write_text(json.dumps(row(1)) + "\n")
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        sample_file(path, seed=1)
    assert list(sample_file(path).done) == [("s", "1", 0)]
    assert (tmp_path / "run[1].jsonl.partial").read_text() == "mine\n"
    assert not (tmp_path / "run[1].jsonl.part1").exists()


def test_two_runs_never_write_one_file_and_no_question_takes_anothers_answer(tmp_path):
    path = tmp_path / "out.jsonl"
    first = sample_file(path)
    first.add(row(1))
    with pytest.raises(ValueError, match="being written by another run"):
        sample_file(path)
    first.close([])
    second, job = sample_file(path), sample.Job([], row(1), None)
    assert second.left([job, sample.Job([], row(2), None)])[0].row["id"] == "2"
    with pytest.raises(ValueError, match="another question"):
        second.left([sample.Job([], row(1, "q"), None)])
    with pytest.raises(ValueError, match="two samples are number 0 of problem '1'"):
        second.left([job, job])


def test_each_rank_of_a_split_model_has_the_head_that_is_stored(tmp_path):
    model = small_model(tie_word_embeddings=False)
    say_tied(model, tmp_path)
    for rank in range(2):
        split = sample.load_split(tmp_path, torch.float32, "cpu", rank, 2)
        assert not split.config.tie_word_embeddings
        assert torch.equal(split.lm_head.weight, model.lm_head.weight)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(monkeypatch):
    config, gib = small_model().config, 2 ** 30
    monkeypatch.setattr(sample, "free_memory", lambda device: 200_000)
    with pytest.raises(ValueError, match="are missing; --dtype bfloat16 would fit"):
        sample.check_weights_fit(config, torch.float32, "cpu", 1)
    sample.check_weights_fit(config, torch.bfloat16, "cpu", 1)
    monkeypatch.setattr(sample, "free_memory", lambda device: 40 * gib)
    big = replace(config, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
                  vocab_size=152064, num_attention_heads=40, num_key_value_heads=8)
    with pytest.raises(ValueError, match="61.0 GiB.* 40.0 free: 21.0 are missing; "
                                         "--tensor_parallel 2 would fit"):
        sample.check_weights_fit(big, torch.bfloat16, "cuda:0", 1)


def test_a_refused_run_leaves_nothing(model_dir, problems, tmp_path, monkeypatch):
    broken, odd = tmp_path / "broken", tmp_path / "odd.jsonl"
    shutil.copytree(model_dir, broken)
    (broken / "generation_config.json").write_text("[]")
    odd.write_text('{"source": ["a"], "id": 1, "response": "x"}\n')
    asks = ["--model", model_dir, "--problems", problems, "--system", "none"]
    before = sorted(tmp_path.rglob("*"))
    for flags, said in (
            (["--model", tmp_path / "none", "--problems", problems, "--max_new_tokens", 5], "none"),
            (["--model", broken, "--problems", problems], "generation_config.json is broken"),
            ([*asks, "--max_new_tokens", 100_000], "positions"),
            ([*asks, "--max_batch_tokens", 3], "max_batch_tokens"),
            ([*asks, "--prompt", "x"], "name one"), ([*asks, "--top_p", 2], "--top_p above 0"),
            ([*asks, "--n", "x"], "--n: invalid 'count' value: 'x'"),
            ([*asks, "--system", "\udcff"], "half a char"),
            (["--model", model_dir, "--rewrite", odd], "odd.jsonl:1: a sample needs `source`"),
            (["--problems", problems, "--endpoint", "x", "--endpoint_model", "m"], "unknown url")):
        with pytest.raises((ValueError, OSError), match=said):
            call(monkeypatch, *flags, "--out", tmp_path / "out.jsonl")
        assert sorted(tmp_path.rglob("*")) == before, said
    call(monkeypatch, *asks, "--max_new_tokens", 2, "--limit", 1, "--out", tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl.settings.json").unlink()
    with pytest.raises(ValueError, match="other settings"):
        call(monkeypatch, *asks, "--max_new_tokens", 2, "--out", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl.settings.json").exists()


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": math.nan}, {"top_p": 2},
                                   {"top_k": -1}])
def test_what_no_distribution_has_is_refused(wrong):
    with pytest.raises(ValueError, match="must be 0 or more"):
        sample.generate(small_model(), [[1, 2]], 2, **wrong)


# ---- a server instead of a model, rewriting, difficulty


class FaultyServer(http.server.BaseHTTPRequestHandler):
    """Chat completions that are dropped, delayed, refused or cut in turn; every third is right."""
    served, asked, lock = [], 0, threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            type(self).asked += 1
            turn = self.asked % 6
        if body["model"] == "locked":  # and says what it was sent
            self.reply(401, str(self.headers["Authorization"]).encode() * 30)
        elif body["model"] == "narrow" and 7 * "1+" in body["messages"][-1]["content"]:
            self.reply(400, b"too long")
        elif body["model"] == "wrong":
            self.reply(400, b"no such thing")
        elif turn == 1:
            self.reply(429, b"slow down")
        elif turn == 2:
            self.reply(500, b"oh")
        elif turn == 4:
            self.connection.close()
        elif turn == 5:
            self.reply(200, b'{"choices": [')
        else:
            text = body["messages"][-1]["content"]
            self.served.append(text)
            message = {"content": f"7 of {len(text)}"}
            if body["model"] == "thinker":  # a thought of its own field, and one that was cut
                message = {"reasoning_content": "Hm.", "content": "So 7." if turn else None}
            self.reply(200, json.dumps({
                "choices": [{"message": message,
                             "finish_reason": "length" if "1+1+1" in text else "stop"}],
                "usage": {"completion_tokens": 5}}).encode())

    def reply(self, status, content):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(sample, "RETRY_SECONDS", (0.01,) * 30)
    FaultyServer.served, FaultyServer.asked = [], 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FaultyServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
    sample.main()


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_faulty_server_loses_nothing_and_answers_nothing_twice(server, problems, tmp_path,
                                                                 monkeypatch):
    out = tmp_path / "out.jsonl"
    flags = ["--endpoint", server, "--endpoint_model", "m", "--problems", problems, "--n", 2,
             "--out", out, "--concurrency", 5]
    call(monkeypatch, *flags)
    rows = rows_of(out)
    assert [(row["id"], row["sample"]) for row in rows] == [
        (str(i), n) for i in range(12) for n in range(2)]
    assert all(row["response"].startswith("7 of ") and row["num_tokens"] == 5 for row in rows)
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    assert len(FaultyServer.served) == 24
    before = out.read_bytes()
    call(monkeypatch, *flags)
    assert len(FaultyServer.served) == 24 and out.read_bytes() == before


def test_a_thought_that_the_server_splits_off_comes_first(server, problems, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    call(monkeypatch, "--endpoint", server, "--endpoint_model", "thinker", "--problems", problems,
         "--out", out)
    assert {row["response"] for row in rows_of(out)} == {"Hm.", "Hm.\n\nSo 7."}


def test_an_error_of_one_request_keeps_the_answers_of_the_others(problems, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--endpoint", "http://x/v1", "--endpoint_model",
                                      "m", "--problems", str(problems), "--concurrency", "4",
                                      "--out", str(tmp_path / "out.jsonl")])

    def answer(self, job):
        if job.row["id"] == "2":
            raise ValueError("refused")
        time.sleep(0.3)
        return job, "7", "stop", 1
    monkeypatch.setattr(sample.Endpoint, "answer", answer)
    with pytest.raises(ValueError, match="refused"):
        sample.main()
    assert {"0", "1", "3"} <= {row["id"] for row in rows_of(tmp_path / "out.jsonl")}


def test_a_request_that_is_refused_does_not_keep_the_others_from_being_answered(
        server, problems, tmp_path, monkeypatch):
    flags = ["--endpoint", server, "--problems", problems, "--n", 2, "--concurrency", 3,
             "--endpoint_model"]
    with pytest.raises(ValueError, match="status 400 too long: so 2 of 24 requests were refused"):
        call(monkeypatch, *flags, "narrow", "--out", tmp_path / "out.jsonl")
    assert len(rows_of(tmp_path / "out.jsonl")) == 22
    FaultyServer.asked = 0
    with pytest.raises(ValueError, match="status 400 no such thing$"):
        call(monkeypatch, *flags, "wrong", "--out", tmp_path / "none.jsonl")
    assert FaultyServer.asked < 12  # most were not even tried


def test_the_key_is_neither_shown_nor_sent_on(problems, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\u20ac")
    flags = ["--endpoint", "http://127.0.0.1:9/v1", "--endpoint_model", "m", "--problems", problems,
             "--out", tmp_path / "out.jsonl"]
    with pytest.raises(ValueError, match="characters that no key has") as error:
        call(monkeypatch, *flags)
    assert "sk-secret" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\r\n")  # an environment file of Windows

    class Redirect(FaultyServer):
        def do_POST(self):
            self.send_response(302)
            self.send_header("Location", "http://localhost:9/elsewhere")
            self.end_headers()
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirect)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    with pytest.raises(ValueError, match="leads on to http://localhost:9") as error:
        call(monkeypatch, *flags, "--endpoint", f"http://127.0.0.1:{other.server_address[1]}/v1")
    other.shutdown()
    assert "sk-secret" not in str(error.value)


def test_a_wrong_key_and_no_server_are_one_line(server, problems, tmp_path, monkeypatch):
    flags = ["--problems", problems, "--out", tmp_path / "out.jsonl", "--endpoint_model"]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with pytest.raises(ValueError, match="status 401 Bearer .key.*OPENAI_API_KEY") as error:
        call(monkeypatch, *flags, "locked", "--endpoint", server)
    assert "sk-" not in str(error.value)
    with pytest.raises(ValueError, match="cannot be reached .*is the server running"):
        call(monkeypatch, *flags, "m", "--endpoint", "http://127.0.0.1:9/v1", "--out",
             tmp_path / "other.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["toy.jsonl"]


def test_difficulty_is_labelled_and_problems_are_chosen_by_it(server, problems, tmp_path,
                                                              monkeypatch):
    out, answers = tmp_path / "graded.jsonl", tmp_path / "answers.jsonl"
    endpoint = ["--endpoint", server, "--endpoint_model", "m"]
    call(monkeypatch, *endpoint, "--problems", problems, "--label_difficulty", "--out", out)
    assert [row["difficulty"] for row in rows_of(out)] == [7] * 12
    call(monkeypatch, *endpoint, "--problems", out, "--min_difficulty", 7, "--out", answers)
    assert len(rows_of(answers)) == 12
    call(monkeypatch, *endpoint, "--problems", out, "--max_difficulty", 6, "--out",
         tmp_path / "none.jsonl")
    assert rows_of(tmp_path / "none.jsonl") == []
    with pytest.raises(ValueError, match="label_difficulty"):
        call(monkeypatch, *endpoint, "--problems", problems, "--min_difficulty", 3)
    out.write_text("".join(json.dumps(row | {"difficulty": None if row["id"] == "3" else 7}) + "\n"
                           for row in rows_of(out)))  # one whose grader gave no number
    call(monkeypatch, *endpoint, "--problems", out, "--min_difficulty", 7, "--out",
         tmp_path / "graded_alone.jsonl")
    assert len(rows_of(tmp_path / "graded_alone.jsonl")) == 11


@pytest.mark.parametrize("text, grade", [
    ("7", 7), ("10", 10), ("7/10", 7), ("7 out of 10", 7), ("Difficulty: 6 (scale 1-10)", 6),
    ("8.5", 8), ("I say 3, no, 4.", 4), ("hard", None), ("110", None)])
def test_a_grade_is_the_last_number_that_is_not_the_scales(text, grade):
    job = sample.Job([], {"id": "1"}, None)
    assert sample.labelled(job, text, "stop", 1, "m")["difficulty"] == grade


@pytest.mark.parametrize("kind, response, answer", [
    ("math", "We try 3.\n\nNo, 4.\n\nSo the answer is \\boxed{4}.", {"answer": "4"}),
    ("choice", "A is too small.\n\nThe answer is (B).", {"answer": "B"}),
    ("code", "Let me see.\n\n```python\nprint(1)\n```\n\nNo:\n\n```python\nprint(2)\n```\nDone.",
     {"tests": [{"input": "", "output": "2"}]})])
def test_rewriting_by_rule_keeps_the_thought_and_the_answer(kind, response, answer, tmp_path,
                                                            monkeypatch):
    source, out = tmp_path / "samples.jsonl", tmp_path / "rewritten.jsonl"
    row = {"id": "1", "source": "toy", "sample": 0, "kind": kind, "prompt": "?",
           "response": response, "finish_reason": "stop", **answer}
    source.write_text(json.dumps(row) + "\n")
    call(monkeypatch, "--rewrite", source, "--rewriter", "rule", "--out", out)
    with pytest.raises(ValueError, match="something else"):
        call(monkeypatch, "--rewrite", source, "--rewriter", "rule", "--out", source)
    assert rows_of(source) == [row]
    (new,) = rows_of(out)
    assert new["original"] == response
    verdict = verify.verify_sample(new)
    assert verdict.passed, verdict.reason


def test_a_short_thought_goes_on_and_a_long_one_is_ended(model_dir, problems, tmp_path):
    import data
    from model import Qwen2
    tokenizer, model = data.load_tokenizer(model_dir), Qwen2.from_pretrained(model_dir)
    stop = int(generate(model, [[1, 2, 3]], 1)[0][0])

    class Limits:
        min_think, max_think = 10, None
    engine = Engine(model, 1, 200, Sampling(), [stop])
    request = Request([1, 2, 3], 0, 60, forced=sample.think_limits(Limits, tokenizer)())
    list(engine.run([request]))
    assert tokenizer.decode(request.tokens).startswith("Wait") and len(request.tokens) >= 10
    Limits.min_think, Limits.max_think = None, 5
    request = Request([1, 2, 3], 0, 120, forced=sample.think_limits(Limits, tokenizer)())
    list(Engine(model, 1, 200, Sampling()).run([request]))
    assert "<|end_of_thought|>" in tokenizer.decode(request.tokens[5:])
