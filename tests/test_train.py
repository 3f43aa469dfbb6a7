"""The manual of train.py: the numbers of a run, what survives a kill, what is refused. Runs are in
this process where one will do."""
import contextlib
import json
import math
import os
import pty
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file

import data
import reference
import sample
import train
from conftest import (ROOT, descendants, end_within, run_script, run_unread, say_tied, shared_file,
                      small_model, start_script)
from model import Qwen2, Qwen2Config

BASE = ["--max_seq_len", 256, "--batch_size", 8, "--learning_rate", 1e-3, "--dtype", "float32",
        "--num_train_epochs", 1]


@pytest.fixture
def run(in_process, tmp_path):
    """train.py in this process: run(*args) -> (exit status, stdout, stderr)."""
    return lambda *args: in_process(train, *args, "--cache", tmp_path / "cache")


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["loss"] for line in metrics(folder)]


def close(a, b, tolerance):
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=tolerance) for x, y in zip(a, b))


def weights(folder):
    return {k: v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}


# ----------------------------------------------------------------------------------------- schedule

def test_the_schedule_warms_up_and_ends_at_zero():
    rates = [train.get_lr(k, 2.0, 10, 100) for k in range(101)]
    assert rates[0] == 0 and rates[5] == 1 and rates[10] == 2
    assert abs(rates[55] - 1) < 1e-12 and rates[100] == 0


def test_the_schedule_equals_transformers():
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 7, 50)
    for step in range(50):
        assert math.isclose(schedule.get_last_lr()[0], train.get_lr(step, 1.0, 7, 50),
                            abs_tol=1e-12)
        optimizer.step()
        schedule.step()


# ------------------------------------------------------------------------------------------- memory

QWEN_32B = Qwen2Config(vocab_size=152064, hidden_size=5120, intermediate_size=27648,
                       num_hidden_layers=64,
                       num_attention_heads=40, num_key_value_heads=8)


@pytest.mark.parametrize("recompute, offload, simulated",
                         [("none", "none", 395.2), ("block", "none", 82.1),
                                                           ("block", "activations", 72.6),
                          ("tiled", "activations", 70.3)])
def test_the_memory_estimate_of_32b_is_near_the_simulated_peak(recompute, offload, simulated):
    """Recorded once: the peak that FSDPMemTracker finds for 8 ranks at 16,384 tokens on fake
    tensors (torch 2.13), in GiB."""
    estimate = sum(train.memory_estimate(QWEN_32B, 16384, 8, recompute, offload).values()) / 2 ** 30
    assert abs(estimate / simulated - 1) < 0.1


def test_memory_choices_grow_with_need():
    class Auto:
        recompute = offload = "auto"
        shard_size = 0

    def choose(config, ranks, gib):
        memory = train.MEMORY_SHARE["cuda"] * gib * 2 ** 30
        return train.choose_memory(train.memory_choices(Auto, config, 16384, torch.bfloat16, "cuda",
                                                        ranks), memory)
    small = Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864,
                        num_hidden_layers=24, num_attention_heads=14,
                        num_key_value_heads=2, tie_word_embeddings=True)
    assert choose(small, 1, 80) == ("none", "none")
    assert choose(small, 1, 16) == ("block", "none")
    assert choose(QWEN_32B, 8, 140) == ("block", "none")
    assert choose(QWEN_32B, 8, 79.2) == ("tiled", "activations")
    assert choose(QWEN_32B, 8, 24)[1] == "parameters"


# ----------------------------------------------------------------------------- the numbers of a run

@pytest.fixture
def real_rows(tmp_path):
    """Twelve real questions and solutions, 50 to 500 bytes."""
    problems = [json.loads(line)
                for line in shared_file("problems/math500.jsonl").read_text().splitlines()]
    problems = [p for p in problems if len(p["problem"]) + len(p["solution"]) < 400][:12]
    path = tmp_path / "real.jsonl"
    path.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": p["problem"]},
        {"role": "assistant", "content": p["solution"]}]}) + "\n" for p in problems))
    return path


def plain_loop(parameters, row_loss, rows, steps=4, peak=1e-3):
    """The recipe written down once more, for a full batch: no packing, no sharding. Returns the
    loss of each step."""
    optimizer, curve = torch.optim.AdamW(parameters, weight_decay=0.0), []
    targets = sum(sum(mask) for _, mask in rows)
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / (steps - 1)))
        optimizer.param_groups[0]["lr"] = peak * (cosine if step else 0)  # one step of warm-up
        loss = sum(row_loss(torch.tensor(ids), torch.tensor(mask)) for ids, mask in rows) / targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


def float64_loop(model_dir, rows):
    model = Qwen2.from_pretrained(model_dir)
    w = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    def row_loss(ids, mask):
        return reference.loss(w, model.config, ids[:-1], torch.where(mask[1:] == 1, ids[1:], -100))
    return plain_loop(list(w.values()), row_loss, rows), lambda ids: reference.logits(w,
                                                                                      model.config,
                                                                                      ids)


def transformers_loop(model_dir, rows):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    def row_loss(ids, mask):
        logp = model(ids[None]).logits[0, :-1].log_softmax(-1)
        return -(logp.gather(1, ids[1:, None])[:, 0] * mask[1:]).sum()
    return plain_loop(list(model.parameters()), row_loss,
                      rows), lambda ids: model(ids[None]).logits[0]


@pytest.mark.parametrize("loop", [float64_loop,
                                  pytest.param(transformers_loop, marks=pytest.mark.slow)])
def test_four_steps_on_real_rows_equal_a_plain_loop_on_one_and_two_processes(loop, model_dir,
                                                                             real_rows, tmp_path):
    tokenizer = data.load_tokenizer(model_dir)
    rows = [data.encode_conversation(tokenizer, data.to_messages(row))
            for row, _ in data.read_rows(real_rows)]
    expected, logits = loop(model_dir, rows)
    ids = torch.tensor(rows[0][0])
    for processes in (0, 2):
        out = tmp_path / f"out{processes}"
        run_script(ROOT / "train.py", "--model", model_dir, "--data", real_rows, "--out", out,
                   "--max_seq_len", 512, "--batch_size",
                   12, "--learning_rate", 1e-3, "--dtype", "float32", "--num_train_epochs", 4,
                   "--warmup_ratio", 0.25,
                   "--cache", tmp_path / "cache", processes=processes)
        assert close(losses(out), expected, 1e-3), (losses(out), expected)
        assert expected[-1] < 0.9 * expected[0]
        ours, theirs = Qwen2.from_pretrained(out)(ids[None])[0], logits(ids)
        assert (ours - theirs).norm() / theirs.norm() < 1e-3


def test_a_metrics_line_has_what_it_must(run, model_dir, rows_file, tmp_path):
    out = tmp_path / "out"
    status, printed, _ = run("--model", model_dir, "--data", rows_file, "--out", out, *BASE,
                             "--eval_data", rows_file, "--save_steps", 3)
    lines = metrics(out)
    assert status == 0 and [line["step"] for line in lines] == list(range(5))  # ceil(40 / 8)
    rows = data.load_rows([rows_file], data.load_tokenizer(model_dir), 256,
                          cache=tmp_path / "cache")
    assert sum(line["num_target_tokens"] for line in lines) == rows.num_targets.sum()
    assert sum(line["num_tokens"] for line in lines) == rows.lengths.sum()
    for line in lines:
        assert line["mfu"] is None and line["grad_norm"] > 0
        assert math.isclose(line["tokens_per_second"], line["num_target_tokens"] / line["seconds"])
        assert math.isclose(line["learning_rate"], train.get_lr(line["step"], 1e-3, 1, 5))
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]


def test_the_first_screen_is_three_lines_and_the_folder_has_the_settings_in_full(
        run, model_dir, rows_file, tmp_path):
    out = tmp_path / "out"
    status, printed, _ = run("--model", model_dir, "--data", rows_file, "--out", out, *BASE)
    model, rows, steps, *rest = printed.splitlines()
    settings = json.loads((out / "settings.json").read_text())
    assert model == f"model: {model_dir}, {settings['num_parameters']:,} parameters"
    assert rows == f"data: {rows_file}: 40 rows, 40 kept; {settings['tokens']:,} tokens"
    assert steps == ("run: 5 steps of 8 rows, learning rate 0.001, 1 x cpu, float32, recompute "
                     f"none, into {out}")
    assert settings["arguments"]["learning_rate"] == 0.001 and settings["warmup_steps"] == 1
    assert settings["recompute"] == "none" and settings["identity"]["max_seq_len"] == 256
    # what comes after the run: where it is, the chat, the data
    assert rest == [f"finished: {out} is a Hugging Face folder; its loss curve is {out}/loss.svg",
                    "",
                    f"next: python sample.py --model {out}    (a chat)",
                    f"      python data.py {rows_file} --model {out}    (its rows)"]


def test_a_run_on_the_rows_that_its_flags_choose(run, model_dir, rows_file, tmp_path):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    folder, out = tmp_path / "set", tmp_path / "out"
    folder.mkdir()
    for split, half in (("train", rows[:20]), ("dev", rows[20:])):
        (folder / f"{split}.jsonl").write_text("".join(
            json.dumps({**row, "level": i % 4}) + "\n" for i, row in enumerate(half)))
    flags = ["--data", folder, "--split", "dev", "--where", "level=0,3"]
    status, printed, errors = run("--model", model_dir, *flags, *BASE, "--out", out)
    assert status == 0 and f"{folder}: dev.jsonl" in errors
    assert f"data: {folder}: 20 rows, 10 left out by --where, 10 kept" in printed
    assert f"python data.py {folder} --split dev --where level=0,3 --model" in printed
    assert len(metrics(out)) == 2  # of 8 and 2 rows
    status, printed, _ = run("--plan", "8xH100", "--model", model_dir, *flags, "--max_seq_len", 256)
    assert "rows: 20  left out by --where: 10" in printed and "kept: 10" in printed
    status, _, errors = run("--model", model_dir, *flags[:-1], "level=7", "--out", tmp_path / "no")
    assert status == 2 and "level=7 leaves no row: there are level=0 (5), level=1 (5)" in errors
    assert not (tmp_path / "no").exists()


def test_the_held_out_loss_is_the_mean_over_its_targets_and_changes_nothing(run, model_dir,
                                                                            rows_file, tmp_path):
    """The last one is compared with the exported model's, computed row by row."""
    for name, extra in (("with", ["--eval_data", rows_file]), ("without", [])):
        run("--model", model_dir, "--data", rows_file, "--out", tmp_path / name, *BASE,
            "--save_steps", 1, *extra)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    last = Qwen2.from_pretrained(tmp_path / "with")
    rows = data.load_rows([rows_file], data.load_tokenizer(model_dir), 256,
                          cache=tmp_path / "cache")
    total = 0
    for ids, mask in (rows[i] for i in range(len(rows))):
        logp = last(torch.from_numpy(ids)[None])[0, :-1].log_softmax(-1)
        total -= logp[torch.arange(len(ids) - 1),
                      torch.from_numpy(ids)[1:]][torch.tensor(mask[1:] == 1)].sum().item()
    assert math.isclose(metrics(tmp_path / "with")[-1]["eval_loss"], total / rows.num_targets.sum(),
                        rel_tol=1e-4)


def test_a_terminal_that_tells_no_width_has_a_bar_too(model_dir, rows_file, tmp_path):
    ours, theirs = pty.openpty()  # 0 rows of 0 columns
    done = subprocess.run([sys.executable, *map(str, [
        ROOT / "train.py", "--model", model_dir, "--data", rows_file, "--out", tmp_path / "out",
        *BASE, "--cache", tmp_path / "cache"])], stdout=theirs, stderr=theirs, timeout=240)
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while piece := os.read(ours, 4096):
            printed += piece
    os.close(ours)
    assert done.returncode == 0 and "100%|██████████| 5/5" in printed.decode()


def test_epochs_asked_for_are_not_cut_short_by_the_built_in_models_steps(monkeypatch):
    def max_steps(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        return train.parse_arguments().max_steps
    assert max_steps() == 500 and max_steps("--num_train_epochs", "2") == 0
    assert max_steps("--num_train_epochs=2", "--max_steps", "7") == 7
    with pytest.raises(ValueError, match="--seed: -1 must be 0 to 4294967295"):
        max_steps("--seed", "-1")
    with pytest.raises(ValueError, match="unrecognized arguments: --num_train 2"):
        max_steps("--num_train", "2")


def test_data_given_twice_is_all_of_it_and_paths_are_expanded(monkeypatch):
    def arguments(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        return train.parse_arguments()
    monkeypatch.setenv("HOME", "/home/me")
    assert arguments("--data", "a", "--data=~/b", "--data", "c").data == ["a", "/home/me/b", "c"]
    assert arguments().data == ["builtin:worked"]
    args = arguments("--model=~/m", "--out=~/o", "--eval_data", "~/e", "--cache=~/c")
    assert args.data == ["NovaSky-AI/Sky-T1_data_17k"] and args.model == "/home/me/m"
    assert (args.out, args.eval_data, args.cache) == ("/home/me/o", ["/home/me/e"], "/home/me/c")


@pytest.mark.parametrize("flags", [
    ["--recompute", "none"], ["--recompute", "block"], ["--recompute", "tiled"],
    ["--recompute", "tiled", "--offload", "activations"], ["--offload", "parameters"],
    ["--max_seq_len", 512], ["--deterministic"],
    pytest.param(["--compile"], marks=[pytest.mark.slow, pytest.mark.skipif(
        not shutil.which("c++"), reason="torch.compile on a CPU needs a C++ compiler")])])
def test_memory_choices_and_packing_do_not_change_the_losses(run, flags, rows_file, model_dir,
                                                             tmp_path):
    for name, extra in (("plain", []), ("changed", flags)):
        status, _, errors = run("--model", model_dir, "--data", rows_file, "--out", tmp_path / name,
                                *BASE, *extra)
        assert status == 0, errors
    assert close(losses(tmp_path / "plain"), losses(tmp_path / "changed"), 1e-4)


def test_bfloat16_follows_float32(run, rows_file, model_dir, tmp_path):
    for dtype in ("float32", "bfloat16"):
        run("--model", model_dir, "--data", rows_file, "--out", tmp_path / dtype, *BASE, "--dtype",
            dtype)
    assert close(losses(tmp_path / "float32"), losses(tmp_path / "bfloat16"), 2e-2)
    exact = not data.cpu_multiplies_bf16()  # float32 in its place
    assert (losses(tmp_path / "float32") == losses(tmp_path / "bfloat16")) == exact
    assert {t.dtype for t in weights(tmp_path / "bfloat16").values()} == {torch.bfloat16}
    assert {t.dtype for t in weights(tmp_path / "float32").values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_one_two_and_three_processes_shard_or_replicate_to_the_same_run(tied, rows_file, tmp_path):
    small_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "m")
    data.builtin_tokenizer().save(tmp_path / "m")
    runs = {"one": (0, []), "two": (2, []), "replicated": (2, ["--shard_size", 1]),
            "three": (3, ["--recompute", "tiled"])}
    for name, (processes, extra) in runs.items():
        run_script(ROOT / "train.py", "--model", tmp_path / "m", "--data", rows_file, "--out",
                   tmp_path / name, *BASE, *extra,
                   "--cache", tmp_path / "cache", processes=processes)
        assert close(losses(tmp_path / name), losses(tmp_path / "one"), 1e-4), name
        for key, tensor in weights(tmp_path / name).items():
            assert torch.allclose(tensor, weights(tmp_path / "one")[key], atol=1e-4), (name, key)


@pytest.mark.slow
def test_each_rank_reads_a_head_that_config_json_denies(run, rows_file, tmp_path):
    say_tied(small_model(tie_word_embeddings=False), tmp_path / "claims")
    small_model(tie_word_embeddings=False).save_pretrained(tmp_path / "honest")
    for name in ("claims", "honest"):
        data.builtin_tokenizer().save(tmp_path / name)
    arguments = ["--data", rows_file, *BASE, "--max_steps", 2]
    assert run("--model", tmp_path / "honest", "--out", tmp_path / "one", *arguments)[0] == 0
    run_script(ROOT / "train.py", "--model", tmp_path / "claims", "--out", tmp_path / "two",
               *arguments, "--cache", tmp_path / "cache", processes=2)
    assert close(losses(tmp_path / "two"), losses(tmp_path / "one"), 1e-4)
    assert not Qwen2Config.from_pretrained(tmp_path / "two").tie_word_embeddings
    assert weights(tmp_path / "two").keys() == weights(tmp_path / "one").keys()


@pytest.mark.slow
def test_two_launchers_are_two_nodes(run, model_dir, rows_file, tmp_path):
    """Each with one process, the model replicated across them."""
    arguments = ["--model", model_dir, "--data", rows_file, *BASE, "--cache", tmp_path / "cache"]
    assert run(*arguments, "--out", tmp_path / "one")[0] == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launchers = [subprocess.Popen(list(map(str, [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}",
        "--nproc_per_node=1", "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1", ROOT / "train.py",
        *arguments, "--out", tmp_path / "two",
        "--shard_size", 1])), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})
        for node in range(2)]
    assert [launcher.wait(timeout=240) for launcher in launchers] == [0, 0]
    assert close(losses(tmp_path / "one"), losses(tmp_path / "two"), 1e-4)


# ------------------------------------------------------------------------------ the finished folder

def test_the_finished_folder_is_whole(run, model_dir, rows_file, tmp_path):
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [256],
                                                                  "temperature": 0.7}))
    out = tmp_path / "out"
    run("--model", model_dir, "--data", rows_file, "--out", out, *BASE)
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "generation_config.json", "run.json",
            "settings.json", "metrics.jsonl", "loss.svg", "checkpoints"} <= names
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [258, 256],
                                                                        "temperature": 0.7,
                                                                         "pad_token_id": 256}
    summary = json.loads((out / "run.json").read_text())
    assert summary["final_loss"] == losses(out)[-1] and summary["rows"]["kept"] == 40
    assert summary["torch"] == torch.__version__ and summary["world_size"] == 1
    assert (out / "loss.svg").read_text().count("<polyline") == 2


def test_a_system_prompt_that_all_rows_share_is_the_default_of_the_finished_folder(
        run, model_dir, rows_file, tmp_path):
    chat = [{"role": "user", "content": "count to 5"}]
    base = data.load_tokenizer(model_dir)
    _, printed, _ = run("--model", model_dir, "--data", rows_file, "--out", tmp_path / "one", *BASE)
    one = data.load_tokenizer(tmp_path / "one")
    assert one.render(chat) == base.render([{"role": "system", "content": "s"}, *chat])
    assert "chat template" not in printed
    with open(rows_file, "a") as file:
        file.write('{"messages": [{"role": "user", "content": "1"}, '
                   '{"role": "assistant", "content": "2"}]}\n')
    _, printed, _ = run("--model", model_dir, "--data", rows_file, "--out", tmp_path / "two", *BASE)
    assert data.load_tokenizer(tmp_path / "two").render(chat) == base.render(chat)
    assert "rows differ in their system prompt: the chat template stays the model's" in printed


def test_transformers_loads_the_finished_folder_and_says_the_same(run, model_dir, rows_file,
                                                                  tmp_path):
    transformers = pytest.importorskip("transformers")
    run("--model", model_dir, "--data", rows_file, "--out", tmp_path / "out", *BASE)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "count to 5"}],
                                         tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    their_ids = theirs.generate(prompt, max_new_tokens=20, do_sample=False)[0].tolist()
    their_ids = their_ids[prompt.shape[1]:]
    ours = Qwen2.from_pretrained(tmp_path / "out")
    our_ids, = sample.generate(ours, [prompt[0].tolist()], 20, stop_ids=[258])
    assert our_ids == [i
                       for i in their_ids
                       if i != 258] and theirs.generation_config.eos_token_id == [258]


def test_as_published_trains_on_the_originals_end_token(run, model_dir, rows_file, tmp_path):
    status, _, _ = run("--model", model_dir, "--data", rows_file, "--out", tmp_path / "out",
                       *BASE, "--as_published")
    summary = json.loads((tmp_path / "out" / "run.json").read_text())
    assert status == 0 and summary["rows"]["duplicates (kept)"] == 0
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [256]


def test_the_default_output_folder_is_a_fresh_one(run, model_dir, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", model_dir, "--data", rows_file, *BASE]
    (model_dir / "model.safetensors").rename(tmp_path / "elsewhere")
    assert run(*arguments)[0] == 2 and not Path("out").exists()
    (tmp_path / "elsewhere").rename(model_dir / "model.safetensors")
    for _ in range(2):
        assert run(*arguments)[0] == 0
    assert sorted(p.name for p in Path("out").iterdir()) == ["model-1", "model-2"]


# -------------------------------------------------------------------------------------- the picture

def picture(tmp_path, losses, **measured):
    """draw_loss of these losses: the root of its SVG. measured: key -> {step: value}."""
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    for key, values in measured.items():
        for step, value in values.items():
            lines[step][key] = value
    train.draw_loss(tmp_path / "loss.svg", lines)
    return ElementTree.parse(tmp_path / "loss.svg").getroot()


def found(svg, name):
    return svg.findall(f".//{{http://www.w3.org/2000/svg}}{name}")


def place(element):
    """Where an element is: its translate(x,y)."""
    numbers = re.match(r"translate\((.+?),(.+?)\)", element.get("transform", ""))
    return tuple(map(float, numbers.groups())) if numbers else None


def curves(svg):
    """The points of the thin and of the bold line."""
    return [[tuple(map(float, point.split(","))) for point in line.get("points").split()]
            for line in found(svg, "polyline")]


def labels(svg, anchor):
    """Number -> where it is written, of one axis: "middle" is the one of steps, "end" of losses."""
    return {float(group[1].text.replace(",", "")): place(group) for group in found(svg, "g")
            if len(group) == 2 and group[1].get("text-anchor") == anchor}


def words(svg):
    return " ".join("".join(svg.itertext()).split())


@pytest.mark.parametrize("low, high, logarithmic, expected", [
    (0, 499, False, [0, 100, 200, 300, 400]), (0, 1000, False, [0, 200, 400, 600, 800, 1000]),
    (0.8, 1.2, False, [0.8, 0.9, 1.0, 1.1, 1.2]),
    (3.0, 3.03, False, [3 + i / 200 for i in range(7)]),
    (0.03, 4, True, [0.05, 0.1, 0.2, 0.5, 1, 2]), (1.1, 11.5, True, [2, 5, 10]),
    (2e-7, 6, True, [1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1])])
def test_ticks_of_a_picture_are_round_numbers(low, high, logarithmic, expected):
    # the axis may end a rounding error before its last number
    assert train.ticks(low, high * (1 + 1e-12), logarithmic) == pytest.approx(expected)


@pytest.mark.parametrize("high, scale", [(9.9, "linear"), (10.1, "logarithmic")])
def test_a_picture_is_logarithmic_where_losses_span_more_than_tenfold(tmp_path, high, scale):
    assert f"loss ({scale} scale)" in words(picture(tmp_path, [high, 4, 1]))
    assert f"loss ({scale} scale)" in words(picture(tmp_path, [4, 1], eval_loss={1: high}))
    assert "loss (linear scale)" in words(picture(tmp_path, [high, 4, 0]))


@pytest.mark.parametrize("losses", [[1.2, 1.1, 0.97, 0.8], [5.0, 1.0, 0.1, 0.05]])
def test_numbers_of_a_picture_stand_where_a_loss_of_that_size_is_drawn(tmp_path, losses):
    svg = picture(tmp_path, losses)
    scale = math.log if losses[0] > 10 * losses[-1] else float
    thin = sorted(set(curves(svg)[0]))
    (left, top), (right, bottom) = thin[0], thin[-1]
    heights = {loss: y for loss, (_, y) in labels(svg, "end").items()}
    assert len(heights) >= 4
    for loss, y in [*heights.items(), *zip(losses, (y for _, y in thin))]:
        share = (scale(loss) - scale(losses[-1])) / (scale(losses[0]) - scale(losses[-1]))
        assert y == pytest.approx(bottom - (bottom - top) * share, abs=0.1)
    assert labels(svg, "middle") == {step: (left + (right - left) * step / 3, bottom)
                                     for step in range(4)}


@pytest.mark.parametrize("low, high", [(1e-8, 20), (1e-4, 1), (0.99e-4, 1), (0.8, 1.2), (3, 3)])
def test_numbers_of_a_picture_do_not_overlap(tmp_path, low, high):
    svg = picture(tmp_path, [high, *[low] * 99_999])
    heights = sorted(y for _, y in labels(svg, "end").values())
    assert min(b - a for a, b in zip(heights, heights[1:])) > 12  # a line of text
    steps = sorted(x for x, _ in labels(svg, "middle").values())
    assert min(b - a for a, b in zip(steps, steps[1:])) > 60  # eight digits


def heights(line):
    return pytest.approx([y for _, y in line], abs=0.11)  # written to 0.1


def test_the_mean_of_a_picture_does_not_lag(tmp_path):
    valley = [1 + abs(step - 150) / 200 for step in range(301)]
    _, bold = curves(picture(tmp_path, valley))
    assert heights(bold) == [y for _, y in bold[::-1]]
    assert max(bold, key=lambda point: point[1])[0] == 310  # the middle
    falling = [2 - step / 300 for step in range(301)]  # is its own mean, to both ends
    thin, bold = curves(picture(tmp_path, falling))
    assert heights(bold) == [y for _, y in thin[::2]]


def test_the_mean_of_a_picture_smooths(tmp_path):
    _, bold = curves(picture(tmp_path, [1.0, 2.0] * 300))
    assert bold[0][1] == 284 and bold[-1][1] == 44
    assert all(abs(y - 164) < 12 for _, y in bold[20:-20])  # 240 high is the zigzag


def test_held_out_losses_and_shares_solved_are_points_at_their_steps(tmp_path):
    losses = [4.0, 3.0, 2.0, 1.5, 1.0]
    svg = picture(tmp_path, losses, eval_loss={1: 2.0, 4: 4.0}, solved={1: 0.0, 4: 0.75})
    (left, top), *_, (right, bottom) = curves(svg)[1]
    last, *discs = [place(circle) for circle in found(svg, "circle") if place(circle)]
    second = left + (right - left) / 4
    assert last == (right, bottom)
    assert discs == [(second, dict(curves(svg)[0])[left + (right - left) / 2]), (right, top)]
    squares = [(*place(rect), float(rect.get("y")) + float(rect.get("height")) / 2)
               for rect in found(svg, "rect") if place(rect)]
    assert squares == [(second, bottom, 0), (right, bottom, -0.75 * (bottom - top))]
    assert "held-out loss" in words(svg) and "100 %" in words(svg)


def test_a_picture_names_the_last_loss_and_only_what_was_measured(tmp_path):
    said = words(picture(tmp_path, [2.0, 0.98765]))
    assert "loss (last 0.9877)" in said and "held-out" not in said and "solved" not in said
    assert "held-out loss" in words(picture(tmp_path, [1.0], eval_loss={0: 1.0}))
    assert "solved (right axis)" in words(picture(tmp_path, [1.0], solved={0: 1.0}))


@pytest.mark.parametrize("losses", [[5.78], [0.0], [5.0, 4.0], [3.0] * 50, [0.0] * 3, [1.0, 0.0],
                                    [2.0, 2.0000000000000004]])
def test_a_picture_of_few_or_equal_losses_has_all_points_in_its_frame(tmp_path, losses):
    svg = picture(tmp_path, losses)
    for line in curves(svg):
        assert line and all(70 <= x <= 550 and 44 <= y <= 284 for x, y in line)
    steps = labels(svg, "middle")
    assert 0 in steps and all(step == int(step) for step in steps) and labels(svg, "end")


def test_a_long_run_has_a_small_picture_that_keeps_a_lone_spike(tmp_path):
    losses = [1 + random.Random(step).random() for step in range(100_000)]
    losses[54_321], losses[77_777] = 7.0, 0.9
    thin, bold = curves(picture(tmp_path, losses))
    assert (tmp_path / "loss.svg").stat().st_size < 300_000 and len(bold) <= 2000
    height = {y: x for x, y in thin}
    assert height[44] == pytest.approx(70 + 480 * 0.54321, abs=1)
    assert height[284] == pytest.approx(70 + 480 * 0.77777, abs=1)


# ------------------------------------------------------------------------------------------- resume

def resumable(model_dir, rows_file, out, tmp_path, *more):
    return ["--model", model_dir, "--data", rows_file, "--out", out, *BASE, "--num_train_epochs", 3,
            "--save_steps", 2,
            "--cache", tmp_path / "cache", *more]


def test_an_interrupt_saves_and_exits_cleanly_and_resume_continues_bit_for_bit(run, model_dir,
                                                                               rows_file, tmp_path,
                                                                               monkeypatch):
    arguments = resumable(model_dir, rows_file, tmp_path / "whole", tmp_path)
    assert run(*arguments)[0] == 0
    arguments[arguments.index("--out") + 1] = tmp_path / "cut"
    pack = data.pack
    def pack_and_interrupt(*args):
        if len(metrics(tmp_path / "cut")) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return pack(*args)
    monkeypatch.setattr(data, "pack", pack_and_interrupt)
    status, printed, _ = run(*arguments)
    assert status == 0 and "interrupted: step 5 of 15 is saved" in printed
    again, = re.findall(r"continue with\n +(.*)\n", printed)
    assert again.split()[:2] == ["python", "train.py"] and again.split()[-1] == "--resume"
    assert all(str(argument) in again for argument in arguments)
    assert not (tmp_path / "cut" / "run.json").exists()
    monkeypatch.undo()
    status, printed, _ = run(*arguments, "--resume")
    assert status == 0 and "at step 5" in printed
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "cut")] == list(range(15))
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    assert [p.name for p in train.checkpoints(tmp_path / "cut" / "checkpoints")] == ["step-000014",
                                                                                     "step-000015"]


@pytest.mark.slow
def test_five_kills_of_torchrun_change_nothing_and_leave_nobody(model_dir, rows_file, tmp_path):
    """kill -9 of the launcher alone, at random moments of a run that saves at every step, each time
    resumed at once; then one run to the end."""
    arguments = resumable(model_dir, rows_file, tmp_path / "whole", tmp_path, "--num_train_epochs",
                          12, "--save_steps", 1)
    run_script(ROOT / "train.py", *arguments, processes=2)
    out, generator, steps = tmp_path / "cut", random.Random(0), []
    arguments[arguments.index("--out") + 1] = out
    log = out / "metrics.jsonl"
    for _ in range(5):
        before = log.stat().st_mtime_ns if log.exists() else 0
        process = start_script(ROOT / "train.py", *arguments, "--resume", processes=2)
        while not log.exists() or log.stat().st_mtime_ns == before:  # until the first step is near
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 1.0))
        assert process.poll() is None, "finished before it was killed"
        ranks = descendants(process.pid)
        process.kill()
        assert len(ranks) == 2 and end_within(5, ranks)
        steps.append(log.read_text().count("\n"))
    print("killed with so many steps logged:", steps)
    assert "resuming" in run_script(ROOT / "train.py", *arguments, "--resume", processes=2).stdout
    assert losses(out) == losses(tmp_path / "whole") and [m["step"]
                                                          for m in metrics(out)] == list(range(60))
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((out / "checkpoints").glob("*.tmp"))


def test_a_worker_whose_torchrun_dies_as_it_starts_it_ends_too(tmp_path):
    process = start_script(ROOT / "train.py", "--out", tmp_path / "out", processes=1)
    while not (workers := descendants(process.pid)):
        assert process.poll() is None
    process.kill()
    assert end_within(5, workers)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_others_of_a_killed_process_end_with_one_line(victim, model_dir, rows_file, tmp_path):
    process = start_script(ROOT / "train.py", *resumable(model_dir, rows_file, tmp_path / "out",
                                                         tmp_path), "--max_steps", 10_000,
                           processes=3)
    while not (tmp_path / "out" / "checkpoints" / "step-000002").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(descendants(process.pid)[victim], signal.SIGKILL)
    errors = process.communicate(timeout=240)[1]
    assert re.findall("^error: .*", errors, re.M) == [
        "error: another process died: continue with --resume"], errors
    assert process.returncode == 1 and "train.py\", line" not in errors
    assert set(re.findall(r"exitcode *: (-?\d+)", errors)) == {"-9", "2"}


def test_a_folder_in_use_is_refused_and_left_alone(run, model_dir, rows_file, tmp_path):
    out, arguments = finished(run, model_dir, rows_file, tmp_path)

    def files():
        return {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with open(out / "train.lock", "w") as file:
        data.lock(file, "")
        before = files()
        for again, says in ((arguments, "is being written by another run"),
                            (arguments[:-1], "holds another run")):
            status, printed, errors = run(*again)
            assert status == 2 and not printed and files() == before
            assert errors.startswith(f"error: --out {out} {says}")
    assert run(*arguments)[0] == 0  # the file alone says nothing
    assert not (out / "train.lock").exists()


def test_where_a_file_system_knows_no_locks_a_run_says_so_and_goes_on(monkeypatch, capsys,
                                                                     tmp_path):
    def unknown(*_):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr("fcntl.flock", unknown)
    with open(tmp_path / "lock", "w") as file:
        data.lock(file, "--out x")
    assert "--out x cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_an_out_folder_that_is_none_is_refused(run, model_dir, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").symlink_to("/nonexistent/scratch")
    status, _, errors = run("--model", model_dir, "--data", rows_file, *BASE)
    assert status == 2 and errors == "error: out: File exists\n"


def test_what_a_run_killed_as_it_began_leaves_is_an_empty_folder(run, model_dir, rows_file,
                                                                 tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("train.lock", "settings.json.tmp"):
        (tmp_path / "out" / name).write_text("")
    assert run("--model", model_dir, "--data", rows_file, "--out", tmp_path / "out", *BASE)[0] == 0


@pytest.mark.parametrize("out, statuses, there", [
    (["--out", "out/x"], [0, 2], ["x"]),
    pytest.param([], [0, 0], ["model-1", "model-2"], marks=pytest.mark.slow)])
def test_of_two_first_runs_at_once_each_has_a_folder_of_its_own(
        out, statuses, there, model_dir, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [start_script(ROOT / "train.py", "--model", model_dir, "--data", rows_file, *BASE, *out,
                         "--max_steps", 20, "--cache", tmp_path / "cache") for _ in range(2)]
    for process in runs:
        process.communicate(timeout=240)
    assert sorted(process.returncode for process in runs) == statuses
    assert sorted(path.name for path in Path("out").iterdir()) == there
    assert all([line["step"] for line in metrics(f"out/{name}")] == list(range(20))
               for name in there)


@pytest.mark.parametrize("redirection", [">&- 2>&-", "2>&1 | true"])
def test_nobody_has_to_read_what_a_run_says(redirection, model_dir, rows_file, tmp_path):
    done = run_unread(redirection, ROOT / "train.py", "--model", model_dir, "--data", rows_file,
                      "--out", tmp_path / "out", *BASE, "--cache", tmp_path / "cache")
    assert done.returncode == 0 and (tmp_path / "out" / "run.json").exists()
    assert len(metrics(tmp_path / "out")) == 5


@pytest.mark.parametrize("size", [None, 1000])
def test_an_export_that_is_missing_or_cut_is_written_again(size, run, model_dir, rows_file,
                                                           tmp_path):
    arguments = resumable(model_dir, rows_file, tmp_path / "out", tmp_path)
    assert run(*arguments)[0] == 0
    path = tmp_path / "out" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    if size is None:
        path.unlink()
    for says in (f"finished: {tmp_path / 'out'} is a Hugging Face folder", "nothing to do"):
        status, printed, _ = run(*arguments, "--resume")
        assert status == 0 and says in printed and path.read_bytes() == whole
    assert [m["step"] for m in metrics(tmp_path / "out")] == list(range(15))


def test_an_export_that_cannot_be_written_again_is_refused(run, model_dir, rows_file, tmp_path):
    arguments = resumable(model_dir, rows_file, tmp_path / "out", tmp_path)
    assert run(*arguments)[0] == 0
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))  # a user's business
    (tmp_path / "out" / "adapter.safetensors").touch()
    assert "nothing to do" in run(*arguments, "--resume")[1]
    (tmp_path / "out" / "model.safetensors").unlink()
    status, _, errors = run(*arguments, "--resume")
    assert status == 2 and "no checkpoint is left: restore them" in errors
    assert len(metrics(tmp_path / "out")) == 15  # and what is there stays


def test_saved_on_two_ranks_resumed_on_one(run, model_dir, rows_file, tmp_path):
    arguments = resumable(model_dir, rows_file, tmp_path / "out", tmp_path)
    run_script(ROOT / "train.py", *arguments, processes=2)
    before = losses(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000015")
    (tmp_path / "out" / "run.json").unlink()
    status, printed, errors = run(*arguments, "--resume")
    assert status == 0 and "at step 14" in printed, errors
    assert losses(tmp_path / "out")[:14] == before[:14] and close(losses(tmp_path / "out"), before,
                                                                  1e-4)


def test_resume_without_a_checkpoint_starts_from_the_beginning(run, model_dir, rows_file, tmp_path):
    arguments = resumable(model_dir, rows_file, tmp_path / "out", tmp_path, "--resume")
    assert "no checkpoint yet: starting from the beginning" in run(*arguments)[1]
    assert "nothing to do" in run(*arguments)[1]
    (tmp_path / "out" / "run.json").unlink()  # killed while exporting
    (tmp_path / "out" / "model.safetensors").unlink()
    status, printed, _ = run(*arguments)
    assert status == 0 and "at step 15" in printed
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert [m["step"] for m in metrics(tmp_path / "out")] == list(range(15))


def finished(run, model_dir, rows_file, tmp_path):
    """A run's folder without its export, as after a kill; and the arguments that resume it."""
    arguments = resumable(model_dir, rows_file, tmp_path / "out", tmp_path)
    assert run(*arguments)[0] == 0
    (tmp_path / "out" / "run.json").unlink()
    return tmp_path / "out", arguments + ["--resume"]


def test_resume_refuses_changed_settings_by_name(run, model_dir, rows_file, tmp_path):
    out, arguments = finished(run, model_dir, rows_file, tmp_path)
    small_model(seed=1, tie_word_embeddings=True).save_pretrained(model_dir)
    status, _, errors = run(*arguments)
    assert status == 2 and "changed: weights" in errors
    small_model(tie_word_embeddings=True).save_pretrained(model_dir)
    status, _, errors = run(*arguments, "--learning_rate", 5e-4, "--seed", 1)
    assert status == 2 and "learning_rate (was 0.001, is 0.0005), seed (was 42, is 1)" in errors
    with open(rows_file, "a") as file:
        file.write('{"messages": [{"role": "user", "content": "1"}, '
                   '{"role": "assistant", "content": "2"}]}\n')
    assert "changed: data" in run(*arguments)[2]


@pytest.mark.parametrize("file, text, says", [
    ("settings.json", "[]", "settings.json is broken"),
    ("settings.json", '{"identity": null}', "settings.json is broken"),
    ("metrics.jsonl", "{}\n" * 3, "metrics.jsonl lacks steps before 15"),
    ("metrics.jsonl", "{}\n" * 14 + "{\n", "metrics.jsonl lacks steps before 15")])
def test_a_damaged_file_of_a_run_is_named(file, text, says, run, model_dir, rows_file, tmp_path):
    out, arguments = finished(run, model_dir, rows_file, tmp_path)
    (out / file).write_text(text)
    status, _, errors = run(*arguments)
    assert status == 2 and says in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("damage", ["metadata", "shard", "cut", "foreign"])
def test_a_broken_checkpoint_is_refused_with_the_reason(run, model_dir, rows_file, tmp_path,
                                                        damage):
    out, arguments = finished(run, model_dir, rows_file, tmp_path)
    newest = train.checkpoints(out / "checkpoints")[-1]
    shard = next(newest.glob("*.distcp"))
    if damage == "metadata":
        (newest / ".metadata").unlink()
    elif damage == "shard":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        other = small_model(hidden_size=32)
        optimizer = torch.optim.AdamW(other.parameters())
        shutil.rmtree(newest)
        train.dcp.save(train.training_state(other, optimizer), checkpoint_id=newest, no_dist=True)
    status, _, errors = run(*arguments)
    assert status == 2 and newest.name in errors and "broken or of another model" in errors
    assert "Traceback" not in errors
    assert newest.exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_ones(run, model_dir, rows_file,
                                                                   tmp_path):
    """A limit on file sizes stands in for a full disk: it fails in the same write. Two processes,
    both exit with 2."""
    arguments = resumable(model_dir, rows_file, tmp_path / "out", tmp_path)
    script = tmp_path / "limited.py"
    script.write_text(f"""
import os, resource, sys
sys.path.insert(0, {str(ROOT)!r})
import train
save = train.save_checkpoint
def limited(folder, model, optimizer, step, *rest):
    if step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    save(folder, model, optimizer, step, *rest)
train.save_checkpoint = limited
train.data.run(train.main, "")
""")
    done = run_script(script, *arguments, processes=2, check=False)
    assert ended_with_2(done), done.stderr
    assert "step-000004" in done.stderr and "then --resume" in done.stderr
    folder = tmp_path / "out" / "checkpoints"
    assert [p.name for p in train.checkpoints(folder)] == ["step-000002"]
    assert run(*arguments, "--resume")[0] == 0
    assert (tmp_path / "out" / "run.json").exists()


def test_the_disk_is_checked_before_the_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.shutil, "disk_usage",
                        lambda path: shutil._ntuple_diskusage(100, 50, 10 ** 9))
    train.check_disk(tmp_path, num_parameters=10 ** 8, keep=2, dtype="bfloat16")
    assert ("will need 3.8 GB (3 checkpoints of 1.2 GB, export 0.2 GB), the disk has 1.0 GB free"
            in capsys.readouterr().err)
    train.check_disk(tmp_path, num_parameters=10 ** 6, keep=2, dtype="bfloat16")
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------- bad input

def ended_with_2(done):
    """Whether torchrun reports both workers as ended with status 2 (the first to end is its root
    cause), none with a traceback."""
    codes = re.findall(r"exitcode *: (-?\d+)", done.stderr)
    return "2" in codes and set(codes) <= {"2", "-15"} and done.stderr.count("error: ") == 1 \
        and "train.py\", line" not in done.stderr


def bad_inputs(model_dir, rows_file, tmp_path):
    """Name -> (arguments in place of the good ones, what the one line must say)."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("x")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(rows_file.read_text() + '{"messages": [\n')
    config = tmp_path / "config"
    shutil.copytree(model_dir, config)
    (config / "config.json").unlink()
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(model_dir, tokenizer)
    (tokenizer / "tokenizer.json").unlink()
    truncated = tmp_path / "truncated"
    shutil.copytree(model_dir, truncated)
    weights = (model_dir / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(weights[:5000])
    generation, pointer = tmp_path / "generation", tmp_path / "pointer"
    shutil.copytree(model_dir, generation)
    (generation / "generation_config.json").write_text("[1]")
    shutil.copytree(model_dir, pointer)
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    narrow = tmp_path / "narrow"
    small_model(vocab_size=200).save_pretrained(narrow)
    data.builtin_tokenizer().save(narrow)
    return {
        "no model": (["--model", "./nowhere"], "./nowhere does not exist"),
        "no config": (["--model", config], "config.json does not exist"),
        "no tokenizer": (["--model", tokenizer], "tokenizer.json does not exist"),
        "truncated weights": (["--model", truncated], "truncated"),
        "vocabulary": (["--model", narrow], "is beyond the model's vocabulary of 200"),
        "positions": (["--max_seq_len", 4096], "--max_seq_len 4096 is beyond the 512 positions"),
        "no home": (["--out=~nobody_x/run"], "~nobody_x/run: there is no such home"),
        "empty data": (["--data", ""], "argument --data: an empty text"),
        "empty model": (["--model", ""], "argument --model: an empty text"),
        "no data": (["--data", "missing.jsonl"], "missing.jsonl does not exist"),
        "broken row": (["--data", broken], "broken.jsonl:41: broken JSON"),
        "end token": (["--end_token", "<|nothing|>"], "no token '<|nothing|>'"),
        "too short": (["--max_seq_len", 3], "no row left to train on"),
        "foreign folder": (["--out", other], "holds no run"),
        "resume": (["--resume", "--out", other], "holds no run"),
        "batch": (["--batch_size", 0], "--batch_size: 0 must be above 0"),
        "offload": (["--offload", "activations", "--recompute", "none"],
                    "use --recompute block or tiled"),
        "shards": (["--shard_size", 3], "--shard_size 3 does not divide"),
        "generation": (["--model", generation], "generation_config.json is broken"),
        "pointer": (["--model", pointer],
                    "model.safetensors is truncated or damaged"),
    }


@pytest.mark.parametrize("name",
                         ["no home", "empty data", "empty model", "no model", "no config",
                          "no tokenizer", "truncated weights", "vocabulary", "positions", "no data",
                                  "broken row", "end token", "too short", "foreign folder",
                          "resume", "batch", "offload", "shards", "generation",
                                  "pointer"])
def test_bad_input_is_one_line_exit_status_2_and_creates_nothing(run, model_dir, rows_file,
                                                                 tmp_path, name):
    arguments, says = bad_inputs(model_dir, rows_file, tmp_path)[name]
    out = tmp_path / "out"
    status, printed, errors = run("--model", model_dir, "--data", rows_file, "--out", out, *BASE,
                                  *arguments)
    last = errors.splitlines()[-1]
    assert status == 2 and "Traceback" not in errors, errors
    assert last.startswith("error: ") and says in last
    assert not out.exists()


def test_an_existing_run_is_refused_without_resume(run, model_dir, rows_file, tmp_path):
    finished(run, model_dir, rows_file, tmp_path)
    status, _, errors = run(*resumable(model_dir, rows_file, tmp_path / "out", tmp_path))
    assert status == 2 and "holds another run" in errors and "--resume" in errors


@pytest.mark.parametrize("name", ["broken row", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("truncated weights", "positions"))])
def test_bad_input_ends_every_rank_with_status_2(model_dir, rows_file, tmp_path, name):
    arguments, says = bad_inputs(model_dir, rows_file, tmp_path)[name]
    done = run_script(ROOT / "train.py", "--model", model_dir, "--data", rows_file, "--out",
                      tmp_path / "out", *BASE, *arguments,
                      "--cache", tmp_path / "cache", processes=2, check=False)
    assert says in done.stderr and ended_with_2(done), done.stderr


def test_a_loss_that_is_not_finite_names_step_and_rows_and_takes_no_step(run, rows_file, tmp_path):
    """The embedding of 'Z' is broken, and one row has a Z."""
    model = small_model(tie_word_embeddings=False)
    model.model.embed_tokens.weight.data[data.builtin_tokenizer().encode("Z")[0]] = math.nan
    model.save_pretrained(tmp_path / "m")
    data.builtin_tokenizer().save(tmp_path / "m")
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    rows[16]["conversations"][0]["value"] += "Z"
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, errors = run("--model", tmp_path / "m", "--data", rows_file, "--out",
                            tmp_path / "out", *BASE)
    assert status == 2 and f"{rows_file}:17" in errors and "the step is not taken" in errors, errors
    step = int(errors.split("not finite at step ")[1].split()[0])
    assert len(metrics(tmp_path / "out")) == step


# --------------------------------------------------------------------------------- memory of a load

LOAD = """
import sys
sys.path.insert(0, {root!r})
import torch, train
from model import Qwen2Config, load_weights
from torch.distributed.device_mesh import init_device_mesh

def anonymous(field):  # KiB; the pages of the file itself are the kernel's to drop
    lines = open('/proc/self/status')
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
rank, world_size, device = train.start_processes(False)
mesh = init_device_mesh('cpu', (world_size,))
config = Qwen2Config.from_pretrained({folder!r})
model = train.build_model(config, mesh, torch.bfloat16, 'block', 'none', reshard=False)
model.to_empty(device='cpu')
bare, peak = anonymous('RssAnon'), [0]
import threading, time
def watch():
    while True:
        peak[0] = max(peak[0], anonymous('RssAnon'))
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
load_weights(model, {folder!r})
total = sum(p.to_local().nbytes for p in model.parameters())
print('LOADED', total, peak[0] - bare, flush=True)
"""


@pytest.mark.slow
def test_two_ranks_load_a_2_gb_checkpoint_with_little_more_than_their_halves(tmp_path):
    config = Qwen2Config(vocab_size=65536, hidden_size=1024, intermediate_size=5504,
                         num_hidden_layers=18, num_attention_heads=16,
                         num_key_value_heads=4)
    with torch.device("meta"):
        model = Qwen2(config)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(0.5)
    model.save_pretrained(tmp_path / "m", max_shard_bytes=10 ** 9)
    size = sum(p.nbytes for p in model.parameters())
    del model
    assert 1.9e9 < size < 2.3e9
    (tmp_path / "load.py").write_text(LOAD.format(root=str(ROOT), folder=str(tmp_path / "m")))
    done = run_script(tmp_path / "load.py", processes=2)
    reports = [line.split() for line in done.stdout.splitlines() if line.startswith("LOADED")]
    assert len(reports) == 2
    for _, shard, above in reports:
        print(f"shard {int(shard) / 1e9:.2f} GB, anonymous memory {int(above) / 1e9:.2f} GB above "
              f"the bare process")
        assert abs(int(shard) - size / 2) < 1e7 and int(above) < int(shard) + 1.5e8


# ------------------------------------------------------------------------------------ the first run

@pytest.mark.slow
def test_the_first_command_trains_the_builtin_model_on_two_processes(tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", ROOT / "train.py",
                           "--max_steps", "25", "--cache", tmp_path / "cache"], cwd=tmp_path,
                          capture_output=True, text=True,
                          timeout=240)
    assert done.returncode == 0, done.stderr
    curve = losses(tmp_path / "out" / "tiny-1")
    assert curve[-1] < 0.6 * curve[0]
    assert "held-out problems solved:" in done.stdout and "next: " in done.stdout
    for asked in (r"Return your final response within \\boxed{}\. \d+\+\d+=\?\n",
                  r"as your final response\. Last digit of ", r"\. f\(x\), from left to right: x "):
        assert len(re.findall(asked, done.stdout)) == 1  # of each family one, as it was asked
    assert [0 <= line["solved"] <= 1 for line in metrics(tmp_path / "out" / "tiny-1")
            if "solved" in line] == [True]


@pytest.mark.slow
def test_a_real_model_learns_in_twenty_steps_and_says_the_same_in_transformers(tmp_path):
    """REAL_MODEL_DIR names a Qwen2 chat model in Hugging Face layout; 40 real rows, eight a step,
    four times, two processes."""
    transformers = pytest.importorskip("transformers")
    folder = os.environ.get("REAL_MODEL_DIR") or pytest.skip("needs REAL_MODEL_DIR, the folder of "
                                                             "a small Qwen2 chat model")
    problems = [json.loads(line)
                for line in shared_file("problems/math500.jsonl").read_text().splitlines()][:40]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": p["problem"]},
        {"role": "assistant", "content": p["solution"]}]}) + "\n" for p in problems))
    out = tmp_path / "out"
    run_script(ROOT / "train.py", "--model", folder, "--data", tmp_path / "rows.jsonl", "--out",
               out, "--batch_size", 8, "--max_steps", 20,
               "--max_seq_len", 2048, "--learning_rate", 5e-5, "--cache", tmp_path / "cache",
               processes=2, timeout=1200)
    curve = losses(out)
    print("losses:", [round(loss, 3) for loss in curve])
    assert len(curve) == 20 and sum(curve[-5:]) < 0.9 * sum(curve[:5])
    tokenizer = data.load_tokenizer(out)
    prompt = tokenizer.encode(tokenizer.render([{"role": "user",
                                                 "content": problems[0]["problem"]}],
                                               add_generation_prompt=True))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    their_ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
    their_ids = their_ids[0, len(prompt):].tolist()
    stop = tokenizer.token_id(tokenizer.end_token)
    our_ids, = sample.generate(Qwen2.from_pretrained(out), [prompt], 40, stop_ids=[stop])
    print(tokenizer.decode(our_ids))
    assert our_ids == their_ids[:their_ids.index(stop) if stop in their_ids else None]
