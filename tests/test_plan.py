"""The manual of train.py --plan: what it promises against what runs need, and what it refuses."""
import json
import re
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

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
        total -= live.pop(address, 0)  # 0 if new, or left by an earlier test
        if size > 0:
            live[address], total = size, total + size
        peak = max(peak, total)
    return peak


def training_peak(config, T, dtype, recompute, reshard=True, steps=2, micro_steps=2):
    """Bytes of tensors at the peak of some steps as train.main takes them, a row of two documents a
    micro-step, from the empty model on."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    document = np.arange(T // 2) % config.vocab_size, np.ones(T // 2, np.uint8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        network = train.build_model(config, mesh, getattr(torch, dtype), recompute, "none", reshard)
        network.to_empty(device="cpu")
        init_weights(network, 0)
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        for _ in range(steps):
            train.forward_backward(network, [document], [[0, 0]] * micro_steps, 1 / T,
                                   torch.device("cpu"), reshard)
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return peak_of(profiler.profiler.kineto_results.experimental_event_tree())


def measured_and_estimated(name, dtype, recompute, reshard=True, T=1024):
    if dtype == "bfloat16" and not data.cpu_multiplies_bf16():
        pytest.skip("no run on this CPU computes in bf16, which takes minutes here")
    config = small_config(**SHAPES[name])
    lines = train.memory_estimate(config, T, dist.get_world_size(), recompute, "none",
                                  getattr(torch, dtype), "cpu", reshard)
    return training_peak(config, T, dtype, recompute, reshard), sum(lines.values())


@pytest.fixture
def alone():
    train.start_processes(False)
    yield
    dist.destroy_process_group()


@pytest.fixture
def one_of():
    """one_of(n) makes this process rank 0 of n that are not there: PyTorch's fake backend has every
    buffer of a collective and sends nothing. (Under gloo, threads free tensors that the profiler
    does not see freed, so that a peak measured among real ranks is too high by chance.)"""
    yield lambda n: dist.init_process_group("fake", rank=0, world_size=n, store=FakeStore())
    dist.destroy_process_group()


@pytest.mark.parametrize("name, dtype, recompute, T", [
    ("wide", "bfloat16", "block", 256), ("deep", "bfloat16", "none", 256),
    ("tied", "float32", "tiled", 256),
    *(pytest.param(*case, 512, marks=pytest.mark.slow) for case in (
        ("wide", "bfloat16", "tiled"), ("wide", "float32", "none"), ("deep", "bfloat16", "block"),
        ("deep", "float32", "tiled"), ("tied", "bfloat16", "none"), ("tied", "float32", "block")))])
def test_the_estimate_is_near_the_measured_peak(alone, name, dtype, recompute, T):
    measured, estimated = measured_and_estimated(name, dtype, recompute, T=T)
    assert abs(estimated / measured - 1) < 0.1


@pytest.mark.slow
def test_tiles_of_the_mlp_and_long_rows_are_estimated_too(alone, monkeypatch):
    for module in (train, model):
        monkeypatch.setattr(module, "MLP_TILE", 256)
    measured, estimated = measured_and_estimated("deep", "bfloat16", "tiled", T=2048)
    assert abs(estimated / measured - 1) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("name, dtype, recompute, reshard", [
    ("wide", "bfloat16", "none", True), ("deep", "bfloat16", "block", True),
    ("tied", "float32", "none", True), ("deep", "float32", "none", False),
    ("tied", "bfloat16", "block", False)])
def test_the_estimate_is_near_the_measured_peak_of_one_of_several_ranks(
        one_of, ranks, name, dtype, recompute, reshard):
    """Sharded through a batch, and whole through it."""
    one_of(ranks)
    measured, estimated = measured_and_estimated(name, dtype, recompute, reshard, T=256)
    assert abs(estimated / measured - 1) < 0.05


# ---------------------------------------------------------------------------------------- the plan

QWEN_32B = Qwen2Config(vocab_size=152064, hidden_size=5120, intermediate_size=27648,
                       num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8)


@pytest.fixture
def plan(in_process, tmp_path):
    """train.py --plan in this process: plan(*args) -> (exit status, stdout, stderr)."""
    def call(*args):
        outcome = in_process(train, "--plan", *args, "--cache", tmp_path / "cache")
        assert not dist.is_initialized()
        return outcome
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
    nodes, number, name = train.parse_gpus(gpus[0])
    args = types.SimpleNamespace(recompute="auto", offload="auto",
                                 shard_size=8 if len(gpus) > 1 else 0)
    memory = train.MEMORY_SHARE["cuda"] * train.GPUS[name][-1] * 2 ** 30
    recompute, offload = train.choose_memory(train.memory_choices(
        args, QWEN_32B, 16384, torch.bfloat16, "cuda", nodes * number), memory)
    assert (recompute, offload.replace("activations", "activat.").replace(
        "parameters", "param.")) == expected
    assert all(len(line) <= 100 for line in printed.splitlines() if str(qwen_32b[1]) not in line)
    assert "19 h, 152 GPU-hours, 450 dollars" in printed


def test_the_parts_of_a_plan_are_those_of_its_gpus():
    assert train.parse_gpus("8xH100-80GB") == train.parse_gpus("8xh100") == (1, 8, "H100-80GB")
    assert train.parse_gpus("H200") == (1, 1, "H200-141GB")
    assert train.parse_gpus("2x8xa100-40gb") == (2, 8, "A100-40GB")
    assert train.parse_gpus("A100") == (1, 1, "A100-80GB")
    assert train.parse_gpus("4x4090") == (1, 4, "4090-24GB")
    assert train.parse_gpus("8xH100-PCIe") == (1, 8, "H100-PCIe-80GB")


@pytest.mark.parametrize("device, expected", [
    ("NVIDIA H100 80GB HBM3", "H100-80GB"), ("NVIDIA H100 PCIe", "H100-PCIe-80GB"),
    ("NVIDIA H200", "H200-141GB"), ("NVIDIA H20", "H20-96GB"), ("NVIDIA L40S", "L40S-48GB"),
    ("NVIDIA GH200 480GB", "GH200-96GB"), ("NVIDIA A10", "A10-24GB"), ("NVIDIA A10G", "A10G-24GB"),
    ("NVIDIA GeForce RTX 4090", "4090-24GB"), ("Tesla T4", None), ("cpu", None)])
def test_a_device_is_found_by_its_name(device, expected):
    assert train.find_gpu(device) == expected
    assert train.find_gpu("NVIDIA A100-SXM4-80GB").startswith("A100")


def test_the_price_is_the_flag_s_or_the_recipe_s_for_its_own_gpu():
    def price(dollars, name):
        return train.price_of(types.SimpleNamespace(dollars_per_gpu_hour=dollars), name)
    assert price(None, "NVIDIA H100 80GB HBM3") == price(None, "H100-80GB") == 2.96
    assert all(price(None, name) is None for name in ("NVIDIA H200", "NVIDIA H100 PCIe", "cpu"))
    assert price(1.5, "NVIDIA H100 80GB HBM3") == price(1.5, "Tesla T4") == 1.5
    assert price(0.0, "H100-80GB") == 0


@pytest.mark.parametrize("gpus, said", [
    ("8x", "write it as 8xH100"), ("", "argument --plan: an empty text"),
    ("x8xH100", "write it as 8xH100"), ("8xH300", "known are H100-80GB, H100-PCIe-80GB"),
    ("0xH100", "write it as 8xH100"), ("2x2x8xH100", "write it as 8xH100"),
    ("8xH100-40GB", "A100-80GB, A100-40GB")])
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
                                 max_seq_len=None)
    num_steps = train.run_length(args, len(rows))
    plan = train.plan_data(rows, args, QWEN_32B, 512, num_steps, 2)
    flops = 2 * sum(QWEN_32B.train_flops(int(n)) for n in rows.lengths)
    assert plan["flops"] == pytest.approx(flops, rel=1e-12)
    assert plan["imbalance"] >= 1 and 0 < plan["filled"] <= 1


def test_traffic_is_that_of_rings_and_of_the_links_they_cross():
    def traffic(world_size, shard_size, reshard=True):
        """Bytes a parameter and GPUs spanned of each line."""
        return [(sent / QWEN_32B.num_parameters, span) for _, sent, span in
                train.step_traffic(QWEN_32B, world_size, shard_size, 3, reshard, 2)]
    assert np.allclose(traffic(16, 8), [(3 * 4 * 7 / 8, 8), (3 * 4 * 7 / 8, 8), (3 / 2, 16)])
    assert [span for _, span in traffic(16, 16)] == [16, 16]
    assert np.allclose(traffic(8, 8, reshard=False), [(2 * 7 / 8, 8), (4 * 7 / 8, 8)])
    assert np.allclose(traffic(2, 1), [(3 * 8 / 2, 2)])
    assert traffic(1, 1) == []


def test_the_plan_of_several_nodes_counts_with_their_network(plan, qwen_32b):
    printed = plan("2x8xH100", *qwen_32b, "--shard_size", 8)[1]
    lines = [line for line in printed.splitlines() if line.startswith("a GPU's")]
    assert [line[-12:] for line in lines] == ["inside a node"[-12:]] * 2 + ["etween nodes"]
    assert "at 450 GB/s" in lines[0] and "at 50 GB/s" in lines[2]


def test_the_plan_of_one_gpu_speaks_of_no_other(plan, qwen_32b):
    printed = plan("H200", *qwen_32b, "--offload", "parameters", "--recompute", "tiled")[1]
    assert "chosen" in printed
    for word in ("gather", "reduce", "GB/s"):
        assert word not in printed and word in plan("8xH200", *qwen_32b)[1]


def test_a_plan_has_dollars_where_a_price_is_known_or_given(plan, qwen_32b):
    assert "dollars at 2.96 an hour" in plan("8xH100", *qwen_32b)[1]
    assert "for dollars give --dollars_per_gpu_hour" in plan("8xH200", *qwen_32b)[1]
    for gpus in ("8xH100", "8xH200"):
        printed = plan(gpus, *qwen_32b, "--dollars_per_gpu_hour", 1.5)[1]
        assert "dollars at 1.5 an hour" in printed and "for dollars give" not in printed


def test_a_plan_counts_with_the_mfu_of_the_flag_else_a_measured_else_an_assumed_one(plan, qwen_32b):
    def mfu_and_source(gpus, *flags):
        printed = plan(gpus, *qwen_32b, *flags)[1]
        run = re.search(r"the run: ([\d.e+]+) FLOP, .* ([\d,.]+) GPU-hours", printed)
        flop, hours = (float(number.replace(",", "")) for number in run.groups())
        counted = flop / (hours * 3600 * 989e12)
        said, source = re.search(r"An MFU of (\d+)% (is assumed|was measured|is what)",
                                 printed).groups()
        assert counted == pytest.approx(int(said) / 100, rel=0.1)  # hours have few digits
        return int(said), source
    assert mfu_and_source("8xH200") == (40, "was measured")
    assert mfu_and_source("8xH100") == (35, "is assumed")
    assert mfu_and_source("8xH200", "--mfu", 0.5) == (50, "is what")
    _, _, newest = (ROOT / "tests" / "gpu_results.md").read_text().partition("NVIDIA H200, torch")
    measured = re.search(r"\| training \| block, flash \| MFU ([\d.]+)%", newest)[1]
    assert train.MEASURED_MFU["H200-141GB"] == pytest.approx(float(measured) / 100, abs=0.005)


def test_times_come_in_units_that_suit_them():
    assert [train.duration(s) for s in (0.00123, 0.5, 1, 59, 90, 5400, 360000)] == [
        "1.23 ms", "500.00 ms", "1.00 s", "59.00 s", "1.50 minutes", "1.50 hours", "100.00 hours"]


def test_a_plan_of_a_small_model_warns_that_its_mfu_is_a_large_one_s(plan, qwen_32b, tmp_path):
    warning = "warning: such an MFU takes"
    assert warning not in plan("8xH100", *qwen_32b)[1]
    assert warning in plan("8xH100", *qwen_32b, "--dtype", "float32")[1]
    printed = plan("H100", "--max_steps", 4)[1]  # builtin:tiny
    assert warning in printed and "less than 0.1 GPU-hours" in printed
    assert warning not in plan("H100", "--max_steps", 4, "--mfu", 0.001)[1]


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
