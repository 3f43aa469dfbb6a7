"""train.py --plan: what it promises against what runs need, and what it refuses."""
import json
import sys
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from conftest import ROOT, run_script, small_config  # first: it makes the scripts importable
import data
import model
import train
from model import Qwen2Config, init_weights

# ------------------------------------------------------------ the estimate against what is measured

SHAPES = {"wide": dict(vocab_size=1000, hidden_size=768, intermediate_size=3072,
                       num_hidden_layers=3, num_attention_heads=6),
          "deep": dict(vocab_size=1000, hidden_size=256, intermediate_size=768,
                       num_hidden_layers=16, num_attention_heads=4, num_key_value_heads=4),
          "tied": dict(vocab_size=32000, hidden_size=256, intermediate_size=1024,
                       num_hidden_layers=4, num_attention_heads=4, tie_word_embeddings=True)}


def allocations(events):
    """The profiler's memory events (start, bytes, address), bytes below 0 where memory is freed."""
    for event in events:
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr
        yield from allocations(event.children)


def peak_of(events):
    """The most bytes that PyTorch's allocator had given out at a time."""
    live, total, peak = {}, 0, 0
    for _, size, address in sorted(allocations(events)):
        total -= abs(live.pop(address, 0))  # freed, or freed unseen by a thread of gloo
        if size > 0:
            live[address], total = size, total + size
        peak = max(peak, total)
    return peak


def training_peak(config, T, dtype, recompute, stays_gathered=False, steps=2, micro_steps=2):
    """Bytes of tensors at the peak of some steps as train.main takes them, a row of two documents a
    micro-step, from the empty model on."""
    args = types.SimpleNamespace(recompute=recompute, offload="none", compile=False,
                                 products=dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    document = np.arange(T // 2) % config.vocab_size, np.ones(T // 2, np.uint8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        network, kept = train.build_model(args, config, mesh, torch.device("cpu"),
                                          1e15 if stays_gathered else 0)
        assert kept == bool(stays_gathered)
        init_weights(network, 0)
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        for _ in range(steps):
            train.forward_backward(network, [document], [[0, 0]] * micro_steps, 1 / T,
                                   torch.device("cpu"), kept)
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return peak_of(profiler.profiler.kineto_results.experimental_event_tree())


def measured_and_estimated(name, dtype, recompute, stays_gathered=False, T=1024):
    if dtype == "bfloat16" and not model.cpu_multiplies_bf16():
        pytest.skip("no run on this CPU computes in bf16, which takes minutes here")
    config = small_config(**SHAPES[name])
    lines = train.memory_estimate(config, T, dist.get_world_size(), recompute, "none",
                                  getattr(torch, dtype).itemsize, "cpu", stays_gathered)
    return training_peak(config, T, dtype, recompute, stays_gathered), sum(lines.values())


@pytest.fixture
def alone():
    train.start_processes(False)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name, dtype, recompute, T", [
    ("wide", "bfloat16", "block", 256), ("deep", "bfloat16", "none", 256),
    ("tied", "float32", "tiled", 256),
    *(pytest.param(*case, 1024, marks=pytest.mark.slow) for case in (
        ("wide", "bfloat16", "tiled"), ("wide", "float32", "none"), ("deep", "bfloat16", "block"),
        ("deep", "float32", "tiled"), ("tied", "bfloat16", "none"), ("tied", "float32", "block")))])
def test_the_estimate_is_near_the_measured_peak(alone, name, dtype, recompute, T):
    measured, estimated = measured_and_estimated(name, dtype, recompute, T=T)
    assert abs(estimated / measured - 1) < 0.1


@pytest.mark.slow
def test_tiles_of_the_mlp_and_long_rows_are_estimated_too(alone, monkeypatch):
    for module in (train, model):
        monkeypatch.setattr(module, "MLP_TILE", 512)
    measured, estimated = measured_and_estimated("deep", "bfloat16", "tiled", T=4096)
    assert abs(estimated / measured - 1) < 0.1


@pytest.mark.slow
def test_the_estimate_is_near_the_measured_peak_of_each_of_two_ranks():
    """Sharded through a batch, and whole through it. What gloo's threads free goes unseen, so that
    a repetition may measure too much, never too little."""
    cases = [("wide", "bfloat16", "none", 0), ("deep", "bfloat16", "block", 0),
             ("tied", "float32", "none", 0), ("deep", "float32", "none", 1),
             ("tied", "bfloat16", "block", 1)]
    cases = [case for case in cases if case[1] == "float32" or model.cpu_multiplies_bf16()]
    done = run_script(__file__, json.dumps(cases), processes=2)
    results = [json.loads(line) for line in done.stdout.splitlines() if line[0] == "["]
    assert len(results) == len(cases)
    for measured, estimated in results:
        assert abs(estimated / measured - 1) < 0.1


# ---------------------------------------------------------------------------------------- the plan

QWEN_32B = Qwen2Config(vocab_size=152064, hidden_size=5120, intermediate_size=27648,
                       num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8)


@pytest.fixture
def plan(tmp_path, capsys, monkeypatch):
    """train.py --plan in this process: plan(*args) -> (exit status, stdout, stderr)."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["train.py", "--plan", *map(str, args),
                                          "--cache", str(tmp_path / "cache")])
        status = 0
        try:
            data.one_line_errors(train.main)
        except SystemExit as end:
            status = end.code
        assert not dist.is_initialized()
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def qwen_32b(tmp_path):
    """--model and --data: the configuration of Qwen2.5-32B, and rows of 4,500 tokens."""
    QWEN_32B.save(tmp_path, torch.bfloat16)
    data.builtin_tokenizer().save(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": str(i)}, {"role": "assistant", "content": "a" * 4450}]}) + "\n"
        for i in range(192)))
    return ["--model", tmp_path, "--data", tmp_path / "rows.jsonl"]


def chosen(printed):
    """The --recompute and --offload of the column that the plan marks; None without one."""
    rows = {key: line.split()[-7:] for line in printed.splitlines()
            for key in ("--recompute", "--offload", "fits into") if key in line}
    columns = [i for i, cell in enumerate(rows["fits into"]) if cell == "chosen"]
    return (rows["--recompute"][columns[0]], rows["--offload"][columns[0]]) if columns else None


@pytest.mark.parametrize("gpus, expected", [
    ("8xH100-80GB", ("tiled", "activat.")), ("8xH200", ("block", "none")),
    ("8x4090", ("block", "param.")), ("2x8xA100-80GB", ("block", "none")),
    ("2x8xB200 --shard_size 8".split(), ("block", "none"))])
def test_the_plan_of_32b_marks_what_a_run_would_choose(plan, qwen_32b, gpus, expected):
    gpus = [gpus] if isinstance(gpus, str) else gpus
    status, printed, _ = plan(*gpus, *qwen_32b)
    assert status == 0 and chosen(printed) == expected
    nodes, number, *_, gib = train.parse_gpus(gpus[0])
    args = types.SimpleNamespace(recompute="auto", offload="auto", max_seq_len=16384,
                                 products="bfloat16")
    choice = train.choose_memory(QWEN_32B, args, 8 if len(gpus) > 1 else nodes * number,
                                 train.MEMORY_SHARE["cuda"] * gib * 2 ** 30)
    assert (choice[0], choice[1].replace("activations", "activat.").replace(
        "parameters", "param.")) == expected
    assert all(len(line) <= 100 for line in printed.splitlines() if str(qwen_32b[1]) not in line)
    assert "19 h, 152 GPU-hours, 450 dollars" in printed


def test_the_parts_of_a_plan_are_those_of_its_gpus():
    assert train.parse_gpus("8xH100-80GB") == (1, 8, "H100 80 GB", 989, 450, 79.2)
    assert train.parse_gpus("H200")[:3] == (1, 1, "H200 141 GB")
    assert train.parse_gpus("2x8xa100-40gb")[:3] == (2, 8, "A100 40 GB")
    assert train.parse_gpus("4x4090")[:3] == (1, 4, "4090 24 GB")
    assert train.parse_gpus("8xH100-PCIe")[2:5] == ("H100 PCIe 80 GB", 756, 64)


@pytest.mark.parametrize("gpus, said", [
    ("8x", "write it as 8xH100"), ("", "argument --plan: an empty text"),
    ("x8xH100", "is not in the table"), ("8xH300", "H100 PCIe, H100, H200"), ("0xH100", "numbers above 0"),
    ("8xH100-40GB", "comes with 80 GB")])
def test_unknown_gpus_are_refused_in_one_line(plan, model_dir, rows_file, gpus, said):
    status, _, error = plan(gpus, "--model", model_dir, "--data", rows_file)
    assert status == 2 and said in error and len(error.splitlines()) == 1


def test_a_plan_that_does_not_fit_says_what_is_missing(plan, qwen_32b):
    status, printed, error = plan("8x4090", *qwen_32b, "--offload", "none")
    assert status == 2 and "does not fit" in error.splitlines()[-1] and "GiB a GPU" in error
    assert "chosen" not in printed and "450 dollars" in printed
    assert plan("8xH100", *qwen_32b, "--shard_size", 3)[0] == 2


def test_the_flops_of_a_plan_are_those_of_its_rows(qwen_32b, rows_file, tmp_path):
    rows = data.load_rows([rows_file], data.builtin_tokenizer(), 512, cache=tmp_path, quiet=True)
    args = types.SimpleNamespace(batch_size=16, num_train_epochs=2, max_steps=0, seed=0,
                                 max_seq_len=512)
    num_steps = train.run_length(args, len(rows))
    plan = train.plan_data(rows, args, QWEN_32B, num_steps, 2)
    assert plan["flops"] == 2 * sum(QWEN_32B.train_flops(int(n)) for n in rows.lengths)
    assert plan["tokens"] == 2 * rows.lengths.sum() and plan["packed_steps"] == num_steps
    # a document alone: two thirds more forward pass of blocks is a third more of theirs
    flops, head = QWEN_32B.train_flops(100), 6 * QWEN_32B.vocab_size * QWEN_32B.hidden_size * 100
    assert train.executed_flops(QWEN_32B, flops, 100, "block") == pytest.approx(
        flops + (flops - head) / 3)
    assert train.executed_flops(QWEN_32B, flops, 100, "none") == flops


def test_traffic_is_that_of_rings_and_of_the_links_they_cross():
    size = train.parameter_count(QWEN_32B)
    traffic = train.step_traffic(QWEN_32B, 16, 8, 8, 450, 3, 2)
    assert [t[1] / size for t in traffic] == pytest.approx([3 * 4 * 7 / 8, 3 * 4 * 7 / 8, 3 / 2])
    assert [t[2] for t in traffic] == [450, 450, train.NETWORK]
    assert [t[2] for t in train.step_traffic(QWEN_32B, 16, 16, 8, 450, 3, 2)] == [50, 50]
    assert [t[1] for t in train.step_traffic(QWEN_32B, 1, 1, 1, 450, 3, 2)] == [0, 0]


@pytest.mark.slow
def test_the_packed_rows_of_a_plan_are_those_of_the_run(plan, model_dir, rows_file, tmp_path):
    flags = ["--model", model_dir, "--data", rows_file, "--max_seq_len", 256, "--batch_size", 8,
             "--num_train_epochs", 1]
    status, printed, _ = plan("2xH100", *flags)
    run_script(ROOT / "train.py", *flags, "--out", tmp_path / "out", "--cache", tmp_path / "cache",
               processes=2)
    steps = [json.loads(line)["micro_steps"]
             for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert status == 0 and f"; {np.mean(steps):.2f} packed rows a GPU and step" in printed


if __name__ == "__main__":  # a rank of the test above
    train.start_processes(False)
    for case in json.loads(sys.argv[1]):
        repeats = [measured_and_estimated(*case) for _ in range(2)]
        if dist.get_rank() == 0:
            print(json.dumps(min(repeats)), flush=True)
