"""The manual of sample.py: the cache and the engine against the plain forward pass, sampling
against plain definitions, runs that are killed, resumed and shared out, servers, the chat."""
import http.server
import io
import itertools
import json
import math
import os
import select
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import sample
import torch
import verify
from conftest import (ROOT, descendants, run_script, run_unread, say_tied, small_model,
                      start_script)
from sample import Engine, Request, Sampling, choose, generate


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


def tokens_of(model, prompts, **options):
    return generate(model, prompts, 12, **options)


def read_logits(model, ids):
    """Logits (V,) of the last of some tokens, through a cache."""
    dtype = next(model.parameters()).dtype
    return sample.KVCache(model.config, 1, 64, dtype, "cpu").prefill(model, ids, 0).detach()


@pytest.mark.parametrize("order", ["packed", "transposed", "plain"])
@pytest.mark.parametrize("shape", [dict(), dict(num_key_value_heads=1, tie_word_embeddings=True)])
def test_faster_layers_change_nothing(order, shape, monkeypatch):
    if order == "packed" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    model, prompts = small_model(**shape), prompts_of(5, 30, 1)
    expected, ids = tokens_of(model, prompts), torch.tensor(prompts_of(20)[0])
    logits = model(ids[None])[0, -1].detach()
    monkeypatch.setattr(sample, "fastest_order", lambda *_: order)
    sample.fuse(model)
    assert type(model.model.layers[0]) is sample.FusedBlock
    torch.testing.assert_close(read_logits(model, ids), logits, rtol=1e-4, atol=1e-4)
    assert tokens_of(model, prompts) == tokens_of(model, prompts, num_slots=1) == expected


def test_the_order_of_weights_is_that_of_the_device_and_the_rows():
    weight = torch.zeros(2, 2)
    has_onednn = torch.backends.mkldnn.is_available()
    packed = "packed" if has_onednn else "plain"
    assert sample.fastest_order(weight, 1, False) == "transposed"
    assert sample.fastest_order(weight, 2, False) == packed
    assert sample.fastest_order(weight, 2, True) == "plain"
    assert sample.fastest_order(weight.to("meta"), 2, False) == "plain"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_blocks_change_nothing():
    prompts = prompts_of(5, 30, 1)
    assert tokens_of(sample.fuse(small_model(), compiles=True), prompts) == tokens_of(
        small_model(), prompts)


@pytest.mark.parametrize("shape", [dict(), dict(tie_word_embeddings=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layers_are_as_near_to_the_exact_ones_as_plain_ones(shape, dtype):
    ids = torch.tensor(prompts_of(50)[0])
    expected = read_logits(small_model(**shape).double(), ids)
    plain = small_model(**shape).to(dtype)
    error = (read_logits(plain, ids) - expected).norm()
    for num_slots in (1, 16):
        fused = sample.fuse(small_model(**shape).to(dtype), num_slots)
        assert (read_logits(fused, ids) - expected).norm() < 1.1 * error + 1e-6


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


def test_an_engine_begins_anew_after_a_run_that_was_broken_off():
    model, prompts = small_model(), prompts_of(9, 4, 30)
    expected = generate(model, prompts, 10)
    engine = Engine(model, 2, 60, Sampling())
    for _ in zip(engine.run([Request(prompt, i, 10) for i, prompt in enumerate(prompts)],
                            every_step=True), range(3)):
        pass  # and the rest is never asked for
    requests = [Request(prompt, i, 10) for i, prompt in enumerate(prompts)]
    assert {reason for _, reason in engine.run(requests)} == {"length"}
    assert [request.tokens for request in requests] == expected


def test_stop_tokens_end_an_answer_and_are_not_in_it():
    model, prompts = small_model(), prompts_of(6, 11, 8)
    whole = generate(model, prompts, 10)
    stop = whole[0][4]
    answers = generate(model, prompts, 10, stop_ids=[stop], num_slots=2)
    for answer, long in zip(answers, whole, strict=True):
        assert answer == (long[:long.index(stop)] if stop in long else long)


def test_steps_beyond_the_end_of_an_answer_as_on_cuda_change_nothing(monkeypatch):
    model, prompts = small_model(), prompts_of(6, 11, 8, 60, 1, 130, 2)
    options = dict(temperature=1.0, num_slots=3, stop_ids=range(0, 263, 20))
    expected = generate(model, prompts, 50, **options)
    assert len({len(answer) for answer in expected}) > 3  # they end at different steps
    monkeypatch.setitem(sample.INTERVAL, "cpu", 16)
    monkeypatch.setitem(sample.LENGTH_STEP, "cpu", 512)
    assert generate(model, prompts, 50, **options) == expected


def uniform(rows, seed=0):
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [dict(), dict(top_p=0.95), dict(top_k=20)])
def test_a_row_is_chosen_alike_beside_any_neighbour(options):
    """Logits of few values, as bf16 has them: equal ones must not be ordered by chance."""
    torch.manual_seed(0)
    peaked = (3 * torch.randn(300, 5000)).round() / 2
    flat = torch.zeros(1, 5000)
    sampling, u = Sampling(temperature=1.0, **options), uniform(301)
    beside = choose(torch.cat([peaked, flat]), sampling, u)
    assert torch.equal(choose(peaked.clone(), sampling, u[:300]), beside[:300])
    assert all(choose(peaked[i:i + 1].clone(), sampling, u[i:i + 1]) == beside[i] for i in range(9))


def exact_probabilities(logits, sampling):
    """The distribution by its definition, in float64, of logits without equal ones."""
    p = (logits.double() / sampling.temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])[:sampling.top_k or len(p)]
    total, mass, kept = sum(p[i] for i in order), 0.0, []
    for i in order:  # the shortest prefix whose mass reaches top_p
        if mass / total >= sampling.top_p:
            break
        kept.append(i)
        mass += p[i]
    exact = torch.zeros(len(p), dtype=torch.double)
    exact[kept] = torch.tensor([p[i] / mass for i in kept], dtype=torch.double)
    return exact


@pytest.mark.parametrize("options", [dict(), dict(top_k=5), dict(top_p=0.7), dict(top_p=0.999),
                                     dict(top_k=8, top_p=0.6), dict(temperature=0.5, top_p=0.9)])
@pytest.mark.parametrize("size", [40, 128, 6000])
def test_tokens_are_chosen_with_their_exact_probabilities(options, size):
    """An even comb of numbers in [0, 1) falls on each token as often as its probability says."""
    sampling = Sampling(**{"temperature": 1.0, **options})
    torch.manual_seed(0)
    logits = 3 * torch.randn(size)
    exact, n = exact_probabilities(logits, sampling), 2000
    comb = (torch.arange(10 * n, dtype=torch.float64) + 0.5) / (10 * n)
    chosen = torch.cat([choose(logits.expand(n, -1), sampling, u) for u in comb.split(n)])
    counts = torch.bincount(chosen, minlength=size).double() / (10 * n)
    assert (counts[exact == 0] == 0).all()
    # a block of tokens and a token in it each begin and end between two of the numbers
    assert ((counts - exact).abs() < 3 / (10 * n)).all()


def test_the_ends_of_the_interval_are_the_first_and_the_last_likely_token():
    logits = torch.full((2, 300), -torch.inf)
    logits[:, 7] = logits[:, 299] = 0.0
    ends = torch.tensor([0.0, math.nextafter(1, 0)], dtype=torch.float64)
    assert choose(logits, Sampling(temperature=1.0), ends).tolist() == [7, 299]
    for temperature in (0.0, 1e-9, 1e-5):
        assert choose(torch.tensor([[1.0, 2.0, 1.5]]), Sampling(temperature), uniform(1)) == 1


def test_the_random_numbers_of_a_stream_are_uniform_and_its_own():
    streams = [[rng.random() for _ in range(500)] for rng in map(Sampling().random_numbers,
                                                                 range(40))]
    u = torch.tensor(streams)
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003
    assert torch.corrcoef(u).fill_diagonal_(0).abs().max() < 0.2
    assert Sampling(seed=1).random_numbers(3).random() != streams[3][0]
    assert Sampling().random_numbers(("a", "1", 0)).random() == Sampling().random_numbers(
        ("a", "1", 0)).random()


def test_ids_that_the_tokenizer_lacks_are_never_chosen_and_seen_ones_less():
    logits, u = torch.tensor([[1.0, 2.0, 9.0]]), uniform(1)
    assert choose(logits.clone(), Sampling(num_ids=2), u) == 1
    seen = torch.tensor([[False, False, True]])
    assert choose(logits.clone(), Sampling(repetition_penalty=9.0), u, seen) == 1


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


def small_flags(model_dir, problems, out):
    return ["--model", model_dir, "--problems", problems, "--out", out, "--n", "3",
            "--max_new_tokens", "24", "--max_slots", "4", "--system", "none"]


def arguments(model_dir, problems, out):
    return [ROOT / "sample.py", *small_flags(model_dir, problems, out)]


def test_samples_hold_the_problem_and_what_was_answered(in_process, model_dir, problems, tmp_path):
    out = tmp_path / "samples.jsonl"
    assert in_process(sample, *small_flags(model_dir, problems, out))[0] == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["sample"]) for row in rows] == [
        (str(i), n) for i in range(12) for n in range(3)]
    for row in rows:
        assert row["source"] == "toy" and row["kind"] == "math" and row["answer"] == row["id"]
        assert row["finish_reason"] in ("stop", "length") and row["model"] == str(model_dir)
        assert (row["num_tokens"] == 24) == (row["finish_reason"] == "length")
    assert len({row["response"] for row in rows}) > 30


def test_a_run_ends_with_what_was_read_how_it_was_asked_and_what_the_file_holds(
        model_dir, problems, tmp_path, monkeypatch, capsys):
    flags = ["--model", model_dir, "--problems", problems, "--max_new_tokens", 6, "--out",
             tmp_path / "out.jsonl"]
    call(monkeypatch, *flags, "--limit", 5, "--n", 2)
    read, asked, answered, holds = capsys.readouterr().out.splitlines()
    assert read == f"{problems}: 5 of 12 problems"
    assert asked == (f"{model_dir}: no system prompt but the chat template's; temperature 0.7, "
                     "float32")
    assert re.fullmatch(r"10 answers in \d+ s, [\d,]+ tokens/s, \d+.\d% cut off", answered)
    assert holds == f"{tmp_path / 'out.jsonl'}: 10 rows"
    call(monkeypatch, *flags, "--limit", 1)  # nothing is left to answer
    assert capsys.readouterr().out.splitlines()[2:] == [holds]


def test_a_model_is_asked_with_no_other_system_prompt_than_its_template_has(
        model_dir, problems, tmp_path, monkeypatch):
    """As it was trained: train.py writes the system prompt of its rows into the template."""
    import data
    settings = json.loads((model_dir / "tokenizer_config.json").read_text())
    settings["chat_template"] = data.with_default_system(data.CHATML, "Be brief.")
    (model_dir / "tokenizer_config.json").write_text(json.dumps(settings))
    read = []
    encode = data.Tokenizer.encode
    monkeypatch.setattr(data.Tokenizer, "encode",
                        lambda self, text: (read.append(text), encode(self, text))[1])
    for flags in ([], ["--system", "none"], ["--system", "qwq"]):
        call(monkeypatch, "--model", model_dir, "--problems", problems, "--limit", 1,
             "--max_new_tokens", 2, "--out", tmp_path / f"{len(read)}.jsonl", *flags)
    assert [text.split("<|im_start|>")[1] for text in read] == [
        "system\nBe brief.<|im_end|>\n"] * 2 + [
        f"system\n{data.SYSTEM_PROMPTS['qwq']}<|im_end|>\n"]


def test_what_failed_in_a_file_of_verdicts_is_asked_again_once_a_problem(
        model_dir, tmp_path, monkeypatch, capsys):
    rows = [{"id": str(i), "source": "toy", "kind": "math", "prompt": f"{i}+0=?", "answer": str(i),
             "sample": n, "response": "0", "passed": i in right, "reason": "r"}
            for n, right in enumerate([(0, 1), (0, 2), (0,)]) for i in range(4)]
    (tmp_path / "verified.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(monkeypatch, "--model", model_dir, "--problems", tmp_path / "verified.jsonl", "--where",
         "passed=false", "--n", 2, "--max_new_tokens", 2, "--out", tmp_path / "again.jsonl")
    assert "verified.jsonl: 3 of 3 problems" in capsys.readouterr().out
    again = rows_of(tmp_path / "again.jsonl")
    assert [(row["id"], row["sample"]) for row in again] == [
        (name, n) for name in "231" for n in range(2)]
    assert all("passed" not in row and row["response"] != "0" for row in again)
    rows[-1]["prompt"] = "another question"
    (tmp_path / "verified.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="`id` '3' of source 'toy' is that of two questions"):
        call(monkeypatch, "--model", model_dir, "--problems", tmp_path / "verified.jsonl")


@pytest.mark.parametrize("flags, n, temperature", [
    (["builtin:heldout"], 1, 0.0), (["builtin:harder:9", "--n", "4"], 4, 0.7),
    (["builtin:train"], 1, 0.7), (["aime24"], 8, 0.7), (["math500", "--temperature", "1"], 1, 1.0)])
def test_problems_that_evaluate_bring_their_number_of_samples_and_temperature(
        flags, n, temperature, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", "m", "--problems", *flags])
    args = sample.parse_arguments()
    assert (args.n, args.temperature) == (n, temperature)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--problems", "gsm8k", "gpqa_diamond"])
    with pytest.raises(ValueError, match="are sampled differently"):
        sample.parse_arguments()


def test_held_out_problems_are_asked_as_train_py_asks_them(model_dir, tmp_path, monkeypatch):
    import data
    from model import Qwen2
    tokenizer, out = data.load_tokenizer(model_dir), tmp_path / "out.jsonl"
    stop_ids = [tokenizer.token_id(tokenizer.end_token)]
    answers = sample.answer_heldout(Qwen2.from_pretrained(model_dir), tokenizer, stop_ids, 5)
    call(monkeypatch, "--model", model_dir, "--problems", "builtin:heldout:5", "--max_new_tokens",
         160, "--out", out)
    assert [row["response"] for row in rows_of(out)] == [answer.text for answer in answers]


def test_a_full_disk_names_the_file_and_says_what_is_kept():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    out = SimpleNamespace(own="/dev/full")
    with pytest.raises(ValueError, match="/dev/full: No space left.*kept, the same command"):
        sample.SampleFile.add(out, row(1))


def test_what_a_server_broke_off_is_asked_again(tmp_path):
    path = tmp_path / "out.jsonl"
    with closing(sample_file(path)) as first:
        for i, reason in enumerate(("stop", "length", "refused", "content_filter")):
            first.add(row(i) | {"finish_reason": reason})
    with closing(sample_file(path)) as second:
        left = second.left([sample.Job([], row(i), None) for i in range(4)])
        assert [job.row["id"] for job in left] == ["2", "3"]
        second.add(row(2) | {"finish_reason": "stop"})
        rows = second.merge([("s", str(i), 0) for i in range(4)])
    assert [row["finish_reason"] for row in rows.values()] == ["stop", "length", "stop",
                                                               "content_filter"]


def test_a_killed_run_resumes_to_the_same_file_and_other_settings_are_refused(
        in_process, model_dir, problems, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert in_process(sample, *small_flags(model_dir, problems, whole))[0] == 0
    command = [sys.executable, *map(str, arguments(model_dir, problems, out))]
    for _ in range(2):
        before = out.stat().st_size if out.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while not (out.exists() and out.stat().st_size > before) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.wait()
    with open(out, "a") as file:
        file.write('{"torn')
    same = small_flags(model_dir, problems, out)
    for more in ([], ["--limit", "2"]):  # fewer problems lose no sample
        assert in_process(sample, *same, *more)[0] == 0
        assert out.read_bytes() == whole.read_bytes()
    status, _, errors = in_process(sample, *same, "--seed", "1")
    assert status == 2 and "seed" in errors and errors.count("\n") == 1
    assert out.read_bytes() == whole.read_bytes()


def test_two_processes_give_the_samples_of_one(in_process, model_dir, problems, tmp_path):
    one, two, split = (tmp_path / f"{name}.jsonl" for name in ("one", "two", "split"))
    assert in_process(sample, *small_flags(model_dir, problems, one))[0] == 0
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
    errors = process.communicate(timeout=240)[1]
    assert re.findall("^error: .*", errors, re.M) == [
        "error: another process died, or torchrun was stopped: the same command goes on"], errors
    assert "sample.py\", line" not in errors


ONE_PROMPT = ["--prompt", "1+1", "--temperature", "0", "--max_new_tokens", "8"]


def test_one_prompt_is_answered_on_standard_output(in_process, model_dir):
    answer = in_process(sample, "--model", model_dir, *ONE_PROMPT)[1]
    assert answer.endswith("\n") and len(answer) > 1


@pytest.mark.slow
def test_two_processes_answer_one_prompt_as_one_does_and_hold_no_chat(in_process, model_dir):
    chat = ["--model", model_dir]
    answer = in_process(sample, *chat, *ONE_PROMPT)[1]
    split = run_script(ROOT / "sample.py", *chat, *ONE_PROMPT, "--tensor_parallel", 2, processes=2)
    assert split.stdout == answer
    refused = run_script(ROOT / "sample.py", *chat, processes=2, check=False)
    assert "error: a chat is one process" in refused.stderr


@pytest.mark.parametrize("flags, word", [(["--n", "0"], "--n: 0 must be above 0"),
                                         (["--top_p", "2"], "--top_p"),
                                         (["--max_new_tokens", "600"], "512"),
                                         (["--max_batch_tokens", "9"], "--max_batch_tokens"),
                                         (["--tensor_parallel", "2"], "torchrun"),
                                         (["--temp", "1"], "unrecognized arguments: --temp 1"),
                                         (["--system", ""], "argument --system: an empty text"),
                                         (["--out=~nobody_x/o"], "no such home folder")])
def test_bad_input_is_one_line(in_process, model_dir, problems, tmp_path, flags, word):
    asks = small_flags(model_dir, problems, tmp_path / "out.jsonl")
    status, _, errors = in_process(sample, *asks, *flags)
    assert status == 2 and word in errors
    assert errors.startswith("error: ") and errors.count("\n") == 1


def sample_file(path, seed=0):
    return sample.SampleFile(path, {"seed": seed}, 0, lambda: None)


def row(i, prompt="p"):
    return {"source": "s", "id": str(i), "sample": 0, "prompt": prompt}


def test_parts_are_those_of_this_very_file_and_of_its_settings(tmp_path):
    path = tmp_path / "run[1].jsonl"
    (tmp_path / "run[1].jsonl.partial").write_text("mine\n")
    with closing(sample_file(path)) as first:
        first.add(row(0))
    (tmp_path / "run[1].jsonl.part1").write_text(json.dumps(row(1)) + "\n")
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        sample_file(path, seed=1)
    assert list(sample_file(path).done) == [("s", "0", 0), ("s", "1", 0)]
    assert (tmp_path / "run[1].jsonl.partial").read_text() == "mine\n"
    assert not (tmp_path / "run[1].jsonl.part1").exists()


def test_two_runs_never_write_one_file_and_no_question_takes_anothers_answer(tmp_path):
    path = tmp_path / "out.jsonl"
    first = sample_file(path)
    first.add(row(1))
    with pytest.raises(ValueError, match="being written by another run"):
        sample_file(path)
    first.close()
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
    with pytest.raises(ValueError, match="0.0 free: --dtype bfloat16, --tensor_parallel 2 or"):
        sample.check_weights_fit(config, torch.float32, "cpu", 1)
    sample.check_weights_fit(config, torch.bfloat16, "cpu", 1)
    monkeypatch.setattr(sample, "free_memory", lambda device: 40 * gib)
    big = replace(config, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
                  vocab_size=152064, num_attention_heads=40, num_key_value_heads=8)
    with pytest.raises(ValueError, match="61.0 GiB.* 40.0 free: --tensor_parallel 2 or"):
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
            (["--problems", problems, "--endpoint", "x", "--endpoint_model", "m"],
             "--endpoint x: write http:// or https://"),
            ([*asks, "--extra", "x"], "--extra: invalid 'JSON object' value")):
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


class Server(http.server.BaseHTTPRequestHandler):
    """Answers a request as the test's function of (handler, its JSON) does."""
    protocol_version = "HTTP/1.1"  # so that replies may come in chunks

    def do_POST(self):
        self.close_connection = True
        self.server.asked.append(self)
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.answer(self, self.body)

    def reply(self, status, content="", **headers):
        content = content if isinstance(content, bytes) else content.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def say(self, content, reason="stop", **message):
        self.reply(200, json.dumps({
            "choices": [{"message": {"content": content, **message}, "finish_reason": reason}],
            "usage": {"completion_tokens": 5}}))

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Starts servers; each has an .url, and in .asked its requests."""
    monkeypatch.setattr(sample, "RETRY_SECONDS", (0.01,) * 6)
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "request_queue_size", 64)
    servers = []

    def start(answer):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
        server.answer, server.asked = answer, []
        server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        servers.append(server)
        return server
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def endpoint(url, **flags):
    return sample.Endpoint(SimpleNamespace(**{
        "endpoint": url, "endpoint_model": "m", "temperature": 0.7, "top_p": 1.0, "top_k": 0,
        "repetition_penalty": 1.0, "max_new_tokens": 9, "seed": 0, "stop": [], "timeout": 5,
        "concurrency": 4, "extra": {}, **flags}))


def wait_for_four(server):
    """Until as many requests are under way as a client has at a time."""
    while len(server.asked) < 4:
        time.sleep(0.01)


def jobs(count):
    return [sample.Job([{"role": "user", "content": str(i)}], {"id": i}, i) for i in range(count)]


def outcomes(url, count=1, **flags):
    """(id, text, finish reason) of each job, by id."""
    return sorted((job.row["id"], text, reason)
                  for job, text, reason, _ in endpoint(url, **flags).answers(jobs(count)))


def number(body):
    return int(body["messages"][-1]["content"])


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
    sample.main()


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def faults():
    """An answer that is dropped, delayed, refused or cut in turn; every third is right."""
    turns, lock, served = itertools.count(1), threading.Lock(), []

    def answer(handler, body):
        with lock:
            turn = next(turns) % 6
        text = body["messages"][-1]["content"]
        if turn == 1:
            handler.reply(429, "slow down")
        elif turn == 2:
            handler.reply(500, "oh")
        elif turn == 4:
            handler.connection.close()
        elif turn == 5:
            handler.reply(200, '{"choices": [')
        else:
            served.append(text)
            handler.say(f"7 of {len(text)}", "length" if "1+1+1" in text else "stop")
    return answer, served


def test_a_faulty_server_loses_nothing_and_answers_nothing_twice(serve, problems, tmp_path,
                                                                 monkeypatch):
    monkeypatch.setattr(sample, "RETRY_SECONDS", (0.01,) * 30)
    (answer, served), out = faults(), tmp_path / "out.jsonl"
    flags = ["--endpoint", serve(answer).url, "--endpoint_model", "m", "--problems", problems,
             "--n", 2, "--out", out, "--concurrency", 5]
    call(monkeypatch, *flags)
    rows = rows_of(out)
    assert [(row["id"], row["sample"]) for row in rows] == [
        (str(i), n) for i in range(12) for n in range(2)]
    assert all(row["response"].startswith("7 of ") and row["num_tokens"] == 5 for row in rows)
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    before = out.read_bytes()
    call(monkeypatch, *flags)
    assert len(served) == 24 and out.read_bytes() == before


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_thought_that_the_server_splits_off_gets_the_recipes_tags(field, serve):
    thinks = serve(lambda handler, body: handler.say(
        "So 7." if number(body) else None, "stop" if number(body) else "length", **{field: "Hm."}))
    begin, end, solution, close = sample.TAGS
    assert outcomes(thinks.url, 2) == [
        (0, f"{begin}\n\nHm.", "length"),
        (1, f"{begin}\n\nHm.\n\n{end}\n\n{solution}\n\nSo 7.\n\n{close}", "stop")]


def test_a_lone_half_of_a_character_is_replaced(serve):
    assert outcomes(serve(lambda handler, body: handler.say("a\ud83d")).url) == [(0, "a?", "stop")]


def test_extra_fields_are_sent_and_go_before_our_own(serve, problems, tmp_path, monkeypatch):
    server, out = serve(lambda handler, body: handler.say("7")), tmp_path / "out.jsonl"
    flags = ["--endpoint", server.url, "--endpoint_model", "m", "--problems", problems, "--limit",
             1, "--out", out, "--extra"]
    call(monkeypatch, *flags, '{"reasoning_effort": "low", "temperature": null}')
    body = server.asked[0].body
    assert body["reasoning_effort"] == "low" and body["temperature"] is None
    with pytest.raises(ValueError, match=r"other settings \(extra\)"):
        call(monkeypatch, *flags, "{}")
    for wrong in ("[]", "3", "low"):
        with pytest.raises(ValueError, match="--extra: invalid 'JSON object' value"):
            call(monkeypatch, *flags[:-2], tmp_path / "new.jsonl", "--extra", wrong)
    assert not (tmp_path / "new.jsonl").exists()


@pytest.mark.parametrize("text, reason", [("7", "length"), ("", "content_filter"),
                                          (None, "tool_calls")])
def test_a_finish_reason_is_kept_as_the_server_gave_it(text, reason, serve):
    server = serve(lambda handler, body: handler.say(text, reason))
    assert outcomes(server.url) == [(0, text or "", reason)] and len(server.asked) == 1


@pytest.mark.parametrize("text, reason, kept", [
    ("7", None, "incomplete"), ("", "stop", "incomplete"), (None, "stop", "incomplete"),
    ("7", "abort", "abort")])
def test_an_answer_that_is_not_whole_is_asked_for_again_and_kept_at_last(text, reason, kept, serve):
    server = serve(lambda handler, body: handler.say(text, reason))
    assert outcomes(server.url) == [(0, text or "", kept)] and len(server.asked) == 7
    server = serve(lambda handler, body: handler.say(
        *((text, reason) if len(server.asked) < 3 else ("8", "stop"))))
    assert outcomes(server.url) == [(0, "8", "stop")]


@pytest.mark.parametrize("reason, verdict", [
    ("stop", "correct"), (None, "correct"), ("length", "truncated"), ("refused", "refused"),
    ("incomplete", "incomplete"), ({"odd": 1}, "{'odd': 1}")])
def test_only_an_answer_that_ended_by_itself_can_pass(reason, verdict):
    row = {"kind": "math", "response": r"\boxed{4}", "answer": "4", "finish_reason": reason}
    assert verify.sample_verdict(row).reason == verdict
    assert verify.sample_verdict(row).passed == (verdict == "correct")


FAULTS = {
    "408": lambda handler: handler.reply(408, "slow"),
    "503": lambda handler: handler.reply(503, "busy"),
    "an error in a 200": lambda handler: handler.reply(200, '{"error": {"message": "busy"}}'),
    "no choice": lambda handler: handler.reply(200, '{"choices": []}'),
    "another form": lambda handler: handler.reply(200, '{"choices": [{"message": 7}]}'),
    "a thought of another kind": lambda handler: handler.say("7", reasoning=["a"]),
    "broken JSON": lambda handler: handler.reply(200, '{"choices": [{"message": {"content'),
    "deep JSON": lambda handler: handler.reply(200, '{"message": ' + "[" * 100_000),
    "nothing": lambda handler: handler.reply(200, ""),
    "a dropped connection": lambda handler: handler.connection.close(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_pass_is_asked_again_and_names_the_problem_at_last(fault, serve):
    def answer(handler, body):
        FAULTS[fault](handler) if len(server.asked) < 3 else handler.say("7")
    server = serve(answer)
    assert outcomes(server.url) == [(0, "7", "stop")]
    server = serve(lambda handler, body: FAULTS[fault](handler))
    with pytest.raises(ValueError, match="asked 7 times, what was finished is kept, the same") as e:
        outcomes(server.url)
    assert str(e.value).startswith(server.url) and "\n" not in str(e.value)
    assert ("busy" in str(e.value)) == (fault in ("503", "an error in a 200"))


def test_the_server_says_when_to_ask_again(serve, monkeypatch):
    def answer(handler, body):
        after = ["1", "9999", "soon", "Wed, 21 Oct 2015 07:28:00 GMT"]
        if len(server.asked) <= 4:
            return handler.reply(429, "slow", Retry_After=after[len(server.asked) - 1])
        handler.say("7")
    server, waits = serve(answer), []
    one = endpoint(server.url)
    monkeypatch.setattr(one.ended, "wait", lambda seconds: waits.append(seconds))
    assert len(list(one.answers(jobs(1)))) == 1
    assert waits[:3] == [0, 1, 120] and max(waits[3:]) < 0.02


@pytest.mark.parametrize("status", [302, 401, 403, 404])
def test_an_error_that_is_no_rows_fault_ends_the_run_and_loses_no_answer(status, serve):
    def answer(handler, body):
        if number(body) == 2:
            wait_for_four(server)
            return handler.reply(status, "no\nway", Location="http://localhost:9/elsewhere")
        client.ended.wait(4)
        handler.say("7")
    server, ids = serve(answer), []
    client = endpoint(server.url)
    with pytest.raises(ValueError, match=f"status {status} http://localhost:9/elsewhere: no way: "
                                         "are --endpoint and OPENAI_API_KEY right"):
        for job, *_ in client.answers(jobs(50)):
            ids.append(job.row["id"])
    assert sorted(ids) == [0, 1, 3] and len(server.asked) == 4


def test_after_an_error_nobody_waits_to_ask_again(serve, monkeypatch):
    monkeypatch.setattr(sample, "RETRY_SECONDS", (60,))
    server = serve(lambda handler, body: handler.reply(503 if number(body) else 404))
    with pytest.raises(ValueError, match="status 404"):
        outcomes(server.url, 3)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_its_rows_outcome(status, serve, capsys):
    def answer(handler, body):
        if number(body) < 3:
            return handler.reply(status, f"too long: {number(body)}")
        time.sleep(0.05)
        handler.say("7")
    assert outcomes(serve(answer).url, 6) == [(i, "", "refused") if i < 3 else (i, "7", "stop")
                                              for i in range(6)]
    assert capsys.readouterr().err.count("too long") == 1


@pytest.mark.parametrize("count", [3, 50])
def test_where_all_is_refused_no_row_is_written(count, serve):
    server = serve(lambda handler, body: handler.reply(400, "no such thing"))
    answers = endpoint(server.url).answers(jobs(count))
    with pytest.raises(ValueError, match="status 400 Bad Request: no such thing$"):
        next(answers)
    assert len(server.asked) < 12  # most were not even tried


def test_ctrl_c_waits_for_what_is_under_way_and_a_second_one_ends_at_once(serve, capfd,
                                                                          monkeypatch):
    def answer(handler, body):
        if number(body) == 3:
            wait_for_four(server)
            os.kill(os.getpid(), signal.SIGINT)
            if presses == 2 and client.ended.wait(4):
                os.kill(os.getpid(), signal.SIGINT)
                exited.wait(4)
        client.ended.wait(4)
        handler.say("7")
    exits, exited, before = [], threading.Event(), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(os, "_exit", lambda status: (exits.append(status), exited.set()))
    for presses in (1, 2):
        server, rows = serve(answer), []
        client = endpoint(server.url)
        with pytest.raises(KeyboardInterrupt):
            for row in client.answers(jobs(50)):
                rows.append(row)
        assert len(rows) == len(server.asked) == 4
        assert "waiting for 4 answers; Ctrl-C again" in capfd.readouterr().err
        assert exits == [130] * (presses - 1)
    assert signal.getsignal(signal.SIGINT) is before


WHOLE = json.dumps({"choices": [{"message": {"content": "7"}, "finish_reason": "stop"}]}, indent=1)


@pytest.mark.parametrize("begun", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Long: ",
                                   b"HTT"])
def test_a_server_that_drips_is_cut_off_wherever_it_is(begun, serve):
    def answer(handler, body):
        if len(server.asked) == 3:
            return handler.say("7")
        handler.wfile.write(begun)
        while len(server.asked) < 3:
            handler.wfile.write(b" ")
            time.sleep(0.02)
    server = serve(answer)
    assert outcomes(server.url, timeout=0.5) == [(0, "7", "stop")] and len(server.asked) == 3


def test_a_proxy_of_the_environment_is_used(serve, monkeypatch):
    monkeypatch.setenv("http_proxy", serve(lambda handler, body: handler.say(handler.path)).url)
    assert outcomes("http://elsewhere.invalid/v1") == [
        (0, "http://elsewhere.invalid/v1/chat/completions", "stop")]


@pytest.mark.parametrize("url", ["localhost:8000/v1", "x", "ftp://x/v1", "http://", "https:///v1",
                                 "http://caf\u00e9/v1", "http://x y"])
def test_what_is_no_address_is_refused_at_once(url):
    with pytest.raises(ValueError, match=f"--endpoint {url}: write http:// or https://"):
        endpoint(url)


def test_the_key_is_neither_shown_nor_sent_on(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\u20ac")
    with pytest.raises(ValueError, match="characters that no key has") as error:
        endpoint("http://x/v1")
    assert "sk-" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\r\n")  # an environment file of Windows
    other = serve(lambda handler, body: handler.say("7"))
    server = serve(lambda handler, body: handler.reply(
        (401, 302, 400, 503)[number(body)], handler.headers["Authorization"] * 30,
        Location=f"{other.url}/sk-secret"))
    for job in jobs(4):
        one = endpoint(server.url)
        with pytest.raises(ValueError, match="Bearer .key.") as error:
            list(one.answers([job]))
        with pytest.raises(ValueError, match="Bearer .key.") as streamed:
            list(one.stream(job.messages))
        assert "sk-" not in str(error.value) + str(streamed.value)
    assert server.asked[0].headers["Authorization"] == "Bearer sk-secret" and not other.asked
    monkeypatch.delenv("OPENAI_API_KEY")
    assert outcomes(serve(lambda handler, body: handler.say(
        str(handler.headers["Authorization"]))).url) == [(0, "None", "stop")]


def test_no_server_is_one_line_at_once_and_leaves_no_file(problems, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "RETRY_SECONDS", (100,))
    with pytest.raises(ValueError, match="127.0.0.1:9/v1.*Connection refused.*--endpoint"):
        call(monkeypatch, "--endpoint", "http://127.0.0.1:9/v1", "--endpoint_model", "m",
             "--problems", problems, "--out", tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["toy.jsonl"]


def stream_of(*deltas, reason="stop"):
    """The server-sent events of an answer, beside those that mean nothing."""
    parts = [{"choices": []}, *({"choices": [{"delta": delta}]} for delta in deltas)]
    if reason:
        parts.append({"choices": [{"delta": {}, "finish_reason": reason}]})
    lines = [": wait", *(f"data: {json.dumps(part)}" for part in parts), "data: [DONE]"]
    return "".join(f"{line}\r\n\r\n" for line in lines)


def test_one_answer_comes_in_pieces_as_they_are_said(serve):
    def answer(handler, body):
        assert body["stream"] is True
        text = stream_of({"role": "assistant", "content": ""}, {"reasoning_content": "H"},
                         {"reasoning": "m."}, {"content": "So "}, {"content": "\ud83d"})
        said, mark, rest = text.partition('data: {"choices": [{"delta": {}')
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(said.encode())
        assert heard.wait(60)
        handler.wfile.write((mark + rest).encode())
    heard, pieces = threading.Event(), []
    for piece in endpoint(serve(answer).url).stream(jobs(1)[0].messages):
        pieces += [piece] if piece else []
        if piece == "?":
            heard.set()
    begin, end, solution, close = sample.TAGS
    assert pieces == [f"{begin}\n\nH", "m.", f"\n\n{end}\n\n{solution}\n\nSo ", "?",
                      f"\n\n{close}"]


def test_a_server_that_does_not_stream_is_heard_too(serve):
    server = serve(lambda handler, body: handler.reply(200, WHOLE))
    assert "".join(endpoint(server.url).stream(jobs(1)[0].messages)) == "7"


@pytest.mark.parametrize("status, text, said", [
    (200, stream_of({"content": "a"}, reason=None), "status 200 OK: no end"),
    (200, stream_of({"content": "a"})[:60] + '\n\ndata: {"error": "busy"}\n\n', "busy"),
    (503, "busy", "status 503 Service Unavailable: busy"), (404, "", "status 404 Not Found")])
def test_a_stream_that_fails_is_one_line_and_is_not_asked_for_again(status, text, said, serve):
    server = serve(lambda handler, body: handler.reply(status, text))
    with pytest.raises(ValueError, match=said) as error:
        list(endpoint(server.url).stream(jobs(1)[0].messages))
    assert "\n" not in str(error.value) and len(server.asked) == 1


def test_difficulty_is_labelled_and_problems_are_chosen_by_it(serve, problems, tmp_path,
                                                              monkeypatch):
    server = serve(lambda handler, body: handler.say("7 of 10"))
    out, answers = tmp_path / "graded.jsonl", tmp_path / "answers.jsonl"
    endpoint = ["--endpoint", server.url, "--endpoint_model", "m"]
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
    ("7", 7), ("10", 10), ("7/10", 7), ("10/10", 10), ("1/10", 1), ("7 out of 10", 7),
    ("7 (out of 10)", 7), ("3 of 10", 3), ("**7**/10", 7), ("a difficulty of 10", 10),
    ("Difficulty: 6 (scale 1-10)", 6), ("7 on a scale from 1 to 10", 7), ("8.5", 8), ("8.5/10", 8),
    ("4 on a 10-point scale", 4), ("5 (1 = easy, 10 = hardest)", 5), ("**Difficulty: 7**", 7),
    ("On a scale of 1 to 10, I would give it a 6.", 6), ("between 6 and 7", 7),
    ("I say 3, no, 4.", 4), ("hard", None), ("110", None),
    ("<|begin_of_thought|>\n\n9<|end_of_thought|>\n\n<|begin_of_solution|>\n\nhard", None)])
def test_a_grade_is_the_last_number_that_is_not_the_scales(text, grade):
    job = sample.Job([], {"id": "1"}, None)
    assert sample.labelled(job, text, "stop", 1, "m")["difficulty"] == grade
    assert sample.labelled(job, text, "length", 1, "m")["difficulty"] is None


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
    with pytest.raises(ValueError, match="other settings"):
        call(monkeypatch, "--rewrite", source, "--rewriter", "rule", "--out", source)
    assert rows_of(source) == [row]
    other = tmp_path / "samples.jsonl"
    other.write_text(json.dumps(row | {"response": "another one"}) + "\n")
    with pytest.raises(ValueError, match="another question"):
        call(monkeypatch, "--rewrite", other, "--rewriter", "rule", "--out", out)
    (new,) = rows_of(out)
    assert new["original"] == response
    verdict = verify.verify_sample(new)
    assert verdict.passed, verdict.reason


def test_the_rule_asks_no_model_also_where_one_is_named(model_dir, tmp_path, monkeypatch):
    source, out = tmp_path / "samples.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(row(1) | {"response": "So the answer is 4."}) + "\n")
    monkeypatch.setattr(sample, "Local", None)
    call(monkeypatch, "--rewrite", source, "--rewriter", "rule", "--model", model_dir, "--out", out)
    (new,) = rows_of(out)
    assert new["rewriter"] == "rule" and new["response"].startswith(sample.TAGS[0])


def test_a_short_thought_goes_on_and_a_long_one_is_ended(model_dir, problems, tmp_path):
    import data
    from model import Qwen2
    tokenizer, model = data.load_tokenizer(model_dir), Qwen2.from_pretrained(model_dir)
    stop = int(generate(model, [[1, 2, 3]], 1)[0][0])

    engine = Engine(model, 1, 200, Sampling(), [stop])
    wait = sample.BudgetForcing(tokenizer, [stop], least=10, most=math.inf)
    request = Request([1, 2, 3], 0, 60, replace=wait)
    list(engine.run([request]))
    assert tokenizer.decode(request.tokens).startswith("Wait") and len(request.tokens) >= 10
    end = sample.BudgetForcing(tokenizer, [], least=0, most=5)
    request = Request([1, 2, 3], 0, 120, replace=end)
    list(Engine(model, 1, 200, Sampling()).run([request]))
    assert "<|end_of_thought|>" in tokenizer.decode(request.tokens[5:])


# ---- the chat


def chat_in_a_terminal(args, *typed):
    """What a terminal shows of sample.py when a user types these bytes, each after a prompt."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        os.execv(sys.executable, [sys.executable, *map(str, [ROOT / "sample.py", *args])])
    shown = b""

    def wait(prompts):
        nonlocal shown
        deadline = time.monotonic() + 240
        while shown.count(b"> ") < prompts:
            assert time.monotonic() < deadline, shown[-2000:]
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 2 ** 16)
    for count, text in enumerate(typed, 1):
        wait(count)
        os.write(terminal, text)
    wait(len(typed) + 1)
    os.write(terminal, b"/quit\r")
    os.close(terminal)
    os.waitpid(pid, 0)
    return shown.decode(errors="replace")


def test_what_is_pasted_into_a_chat_arrives_whole_and_as_one_message(serve):
    server = serve(lambda handler, body: handler.say("Yes."))
    long, pasted = "x" * 5000 + "?", "first line\nsecond line\nthe end"
    chat_in_a_terminal(["--endpoint", server.url, "--endpoint_model", "m"], long.encode() + b"\r",
                       pasted.encode() + b"\r", b"\x1b[200~" + pasted.encode() + b"\x1b[201~\r")
    asked = [handler.body["messages"][-1]["content"] for handler in server.asked]
    assert asked[0] == long and asked[1:] == [pasted] * 2


def chat_through_a_pipe(lines, monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    call(monkeypatch, *flags)
    return capsys.readouterr().out


def test_a_chat_remembers_what_was_said_until_it_begins_anew(serve, monkeypatch, capsys):
    server = serve(lambda handler, body: handler.say(f"answer {len(server.asked)}"))
    shown = chat_through_a_pipe(
        ["one", "", "two", "/reset", "three", "/system Be brief.", "four", "/system", "/reset",
         "five", "/system none", "six"], monkeypatch, capsys,
        "--endpoint", server.url, "--endpoint_model", "m")
    said = [[(turn["role"][0], turn["content"]) for turn in handler.body["messages"]]
            for handler in server.asked]
    assert said == [
        [("u", "one")], [("u", "one"), ("a", "answer 1"), ("u", "two")], [("u", "three")],
        [("s", "Be brief."), ("u", "four")], [("s", "Be brief."), ("u", "five")], [("u", "six")]]
    assert "> answer 1\n> > answer 2\n" in shown
    assert shown.count("system prompt: Be brief.") == 3 and "no system prompt but" in shown


@pytest.mark.parametrize("command", ["/help", "/foo", "/exit now", "/"])
def test_a_command_that_is_none_answers_with_those_there_are(command, serve, monkeypatch, capsys):
    server = serve(lambda handler, body: handler.say("Yes."))
    shown = chat_through_a_pipe([command, "/quit", "never read"], monkeypatch, capsys,
                                "--endpoint", server.url, "--endpoint_model", "m")
    assert shown.count("/reset") == shown.count("/system TEXT") == 2 and not server.asked


def test_an_error_in_a_chat_is_one_line_and_the_chat_goes_on(serve, monkeypatch, capsys):
    server = serve(lambda handler, body: handler.say("Yes.") if len(server.asked) > 1
                   else handler.reply(500, "oh"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    call(monkeypatch, "--endpoint", server.url, "--endpoint_model", "m")
    out, errors = capsys.readouterr()
    assert "status 500" in errors and errors.count("\n") == 1 and "Yes." in out
    assert [turn["content"] for turn in server.asked[1].body["messages"]] == ["two"]


def test_a_server_answers_one_prompt(serve, monkeypatch, capsys):
    server = serve(lambda handler, body: handler.say("Four."))
    call(monkeypatch, "--endpoint", server.url, "--endpoint_model", "m", "--prompt", "2+2?",
         "--system", "qwq")
    assert capsys.readouterr().out == "Four.\n"
    assert [turn["role"] for turn in server.asked[0].body["messages"]] == ["system", "user"]


def test_nothing_is_shown_that_a_stop_may_take_back():
    stops = ["=6", "END"]
    for text, shown in (("12+34=", "12+34"), ("12+34=4", "12+34=4"), ("the E", "the "),
                        ("the EN", "the "), ("a\ufffd\ufffd", "a"), ("", "")):
        assert sample.settled(text, stops) == shown
    assert sample.cut("12+34=6 END", stops) == "12+34" and sample.cut("ab", []) == "ab"


def test_a_streamed_answer_ends_before_its_stop(model_dir, monkeypatch, capsys):
    asks = ["--model", model_dir, "--prompt", "1+1", "--temperature", 0, "--max_new_tokens", 20]
    call(monkeypatch, *asks)
    whole = capsys.readouterr().out[:-1]
    stop = whole[5:9]  # the tokenizer's tokens are bytes
    call(monkeypatch, *asks, "--stop", "never", stop)
    assert capsys.readouterr().out == whole[:whole.index(stop)] + "\n"


def test_the_pieces_of_an_answer_come_as_it_grows(model_dir, monkeypatch):
    printed = []
    monkeypatch.setattr("builtins.print", lambda *text, **_: printed.append("".join(text)))
    call(monkeypatch, "--model", model_dir, "--prompt", "1+1", "--max_new_tokens", 20)
    assert len(list(filter(None, printed))) > 5
