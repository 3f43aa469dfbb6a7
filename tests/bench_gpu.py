"""Everything that needs a GPU, in one command of at most eight minutes. Not collected by pytest.

    python tests/bench_gpu.py                               # all, on one GPU
    python tests/bench_gpu.py --only training sampling      # the parts whose names begin so
    python tests/bench_gpu.py --device cpu                  # all of it in small, in three minutes

Each part runs in a process of its own with a time limit of its own: one that fails or hangs is a
row of the table, never the end. Prints a table in Markdown and writes it, with every number behind
it, to gpu.json in --out. Parts whose time is not measured run several at once.

1. correctness: the GPU beside the CPU, `--deterministic`, `--recompute`, `--offload`, `--compile`,
   captured graphs, transformers' greedy generation.
2. training: train.py on as many blocks of Qwen2.5-32B's shape as fit, rows of four documents of
   4,096 tokens, beside transformers on the same number of documents.
3. sampling: random weights of the 1.5B's and the 7B's shape, beside transformers.
4. builtin: the command without arguments; its model's samples, verified.
"""
import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from concurrent import futures
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as train.py

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from model import Qwen2, Qwen2Config, local_shard  # noqa: E402

SHAPES = {
    "32B": Qwen2Config(vocab_size=152064, hidden_size=5120, intermediate_size=27648,
                       num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8),
    "7B": Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944,
                      num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4),
    "1.5B": Qwen2Config(vocab_size=151936, hidden_size=1536, intermediate_size=8960,
                        num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                        tie_word_embeddings=True),
    # heads of 128 as in the large ones, all else small: what correctness is told by
    "small": Qwen2Config(vocab_size=1000, hidden_size=512, intermediate_size=1024,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         initializer_range=0.05),
}
KERNELS = {  # kinds of kernels by what their names contain, the first that fits
    "attention": r"flash|fmha|scaled_dot|cudnn",
    "products": r"gemm|gemv|nvjet|cutlass|splitk|aten::(add)?mm|mkldnn",
    "optimizer and norm of gradients": r"adam|multi_tensor|lpnorm|_foreach",
    "FSDP's copies": r"split_with_sizes|chunk_cat|nccl|gather_copy|memcpy",
    "the rest": "",
}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


# -------------------------------------------------------------------------------- parts, as a whole

def all_parts(device):
    """(name, seconds it may take, whether others may run beside it, function, its arguments). A
    name is "part: what"."""
    on_gpu = device == "cuda"
    parts = [("correctness: logits, loss, gradients", 60, True, beside_the_cpu, ()),
             ("correctness: train.py", 150, True, runs_of_train, ()),
             ("correctness: memory", 120, True, ways_to_save_memory, ()),
             ("correctness: generation", 90, True, generation, ()),
             ("correctness: compile", 150, True, compiled, ()),
             ("builtin: train, sample, verify", 240, True, builtin, ())]
    variants = [("block", "none", "flash"), ("none", "none", "flash"), ("tiled", "none", "flash"),
                ("block", "none", "cudnn"), ("tiled", "activations", "flash"),
                ("block+compile", "none", "flash")]
    variants = variants if on_gpu else [("block", "none", "math"), ("tiled", "none", "math")]
    parts += [(f"training: {', '.join(variant)}", 90, False, training, variant)
              for variant in variants]
    parts += [("training: profile", 90, False, profiled_training, ("block",)),
              ("training: transformers", 90, False, transformers_training, ()),
              ("sampling: 1.5B", 90, False, sampling, ("1.5B",)),
              ("sampling: 7B", 90, False, sampling, ("7B",)),
              ("sampling: 1.5B, compiled", 90, False, sampling, ("1.5B", True)),
              ("training: profile, compiled", 90, False, profiled_training, ("block+compile",))]
    return parts


def row(what, figure, goal="", reached=None, **numbers):
    """Prints one row of the table, as the process of a part does."""
    print("ROW " + json.dumps(dict(what=what, figure=figure, goal=goal, reached=reached,
                                   numbers=numbers)), flush=True)


def run_part(name, seconds, device, folder):
    """The rows of a part, and one more if it fails."""
    start = time.perf_counter()
    env = dict(os.environ, HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1", OMP_NUM_THREADS="4")
    if device == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, __file__, "--part", name, "--device", device,
                                "--out", folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, env=env, start_new_session=True)
    try:
        printed = process.communicate(timeout=seconds)[0]
        problem = f"exit status {process.returncode}" if process.returncode else None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed = process.communicate()[0]
        problem = f"not ready after {seconds:.1f} s"
    lines = printed.splitlines()
    rows = [json.loads(line[4:]) for line in lines if line.startswith("ROW ")]
    if problem:
        said = [line.strip() for line in lines if line.strip() and not line.startswith("ROW ")]
        error = r"(\[rank0\]: )?[\w.]*(Error|Exception)\b"
        errors = [line for line in said if re.match(error, line)]
        last = (errors or said or ["nothing said"])[-1]
        rows.append(dict(what=name.partition(": ")[2], figure=f"failed, {problem}: {last[:160]}",
                         goal="", reached=False, numbers={}))
        (Path(folder) / f"failed {name.replace('/', ' ')}.log").write_text(printed)
    took = time.perf_counter() - start
    print(f"{name}: {took:.0f} s" + (f", {problem}" if problem else ""), file=sys.stderr)
    return [dict(part=name.partition(":")[0], **r, seconds=took) for r in rows]


def run_all(device, folder, only, minutes):
    """Rows of all parts in their order: those that may run side by side first."""
    parts = [p for p in all_parts(device) if not only or p[0].startswith(tuple(only))]
    end = time.perf_counter() + 60 * minutes
    rows = {}

    def run(part):
        name, seconds, *_ = part
        left = max(1, end - time.perf_counter())
        rows[name] = run_part(name, min(seconds, left), device, folder)
    side_by_side = [part for part in parts if part[2]]
    with futures.ThreadPoolExecutor(6 if device == "cuda" else 2) as threads:
        list(threads.map(run, side_by_side))
    for part in parts:
        if not part[2]:
            run(part)
    return [r for name, *_ in parts for r in rows[name]]


def beside_transformers(rows, device):
    """One row more: the best of train.py with blocks recomputed, over transformers."""
    rates = {r["what"]: r["numbers"].get("rate") for r in rows if r["part"] == "training"}
    ours = {what: rate for what, rate in rates.items() if rate and what.startswith("block, ")}
    if not ours or not rates.get("transformers"):
        return []
    best = max(ours, key=ours.get)
    ratio = ours[best] / rates["transformers"]
    goal = {} if device == "cpu" else dict(goal="1.5", reached=ratio >= 1.5)
    return [dict(part="training", what=f"{best}, over transformers", figure=f"x {ratio:.2f}",
                 **{"goal": "", "reached": None} | goal, numbers=dict(ratio=ratio), seconds=0)]


def markdown(rows, device):
    """The table, with what it was measured on above it."""
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU, in small"
    yield (f"{card}, torch {torch.__version__}, Python {sys.version.split()[0]}, {date.today()}: "
           f"`python {' '.join(sys.argv)}`\n")
    yield "| part | what | figure | goal | |"
    yield "|---|---|---|---|---|"
    verdict = {True: "reached", False: "**missed**", None: ""}
    for r in rows:
        yield (f"| {r['part']} | {r['what']} | {r['figure'].replace('|', '/')} | {r['goal']} | "
               f"{verdict[r['reached']]} |")
    for r in rows:
        if kernels := r["numbers"].get("kernels"):
            yield f"\n{r['what']}; the longest kernels:\n"
            yield from (f"    {share:6.1%} {count:6} x {name[:100]}"
                        for share, count, name in kernels)


# ----------------------------------------------------------------------------------- 1. correctness

def random_model(config, device, dtype=torch.float32, seed=0):
    """A model of random weights, made where it stays."""
    with torch.device("meta"):
        model = Qwen2(config).to(dtype)
    model.to_empty(device=device)
    random_weights(model, None, seed)
    return model


@torch.no_grad()
def random_weights(model, model_dir, seed=0):
    """In place of load_weights and init_weights, whose generator on the CPU takes a minute for
    billions of weights."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        local, _ = local_shard(parameter)
        if "norm" in name:
            local.fill_(1.0)
        else:
            local.normal_(0.0, model.config.initializer_range)


def relative(a, b):
    """|a - b| / |b| over all numbers, in float64."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm()).item()


def beside_the_cpu(device, folder):
    """Logits of a plain row, loss and gradients of a packed one, against fp32 on the CPU."""
    import train
    lengths = [700, 1, 300, 499]
    torch.manual_seed(0)
    ids = torch.randint(1000, (1, sum(lengths)))
    targets = torch.randint(1000, ids.shape).masked_fill(torch.rand(ids.shape) < 0.3, -100)
    for dtype, goals in ((torch.float32, (1e-4, 1e-4, 1e-4)), (torch.bfloat16, (3e-2, 2e-3, 5e-2))):
        reference = random_model(SHAPES["small"], "cpu").to(dtype).float()
        model = Qwen2(SHAPES["small"]).to(dtype)
        model.load_state_dict(reference.state_dict())
        model.to(device)
        loss = reference(ids, targets, lengths)
        loss.backward()
        with sdpa_kernel(train.ATTENTION + [SDPBackend.MATH] * (device == "cpu"),
                         set_priority=True):
            logits = model(ids.to(device))
            ours = model(ids.to(device), targets.to(device), lengths)
            ours.backward()
        gradients = [torch.cat([p.grad.double().cpu().flatten() for p in m.parameters()])
                     for m in (model, reference)]
        errors = (relative(logits, reference(ids)), relative(ours, loss), relative(*gradients))
        name = str(dtype).removeprefix("torch.")
        for what, error, goal in zip(("logits", "loss", "gradients"), errors, goals):
            row(f"{what}, {name}, beside the CPU's in fp32", f"{error:.1e} relative", f"{goal:g}",
                error < goal, error=error)


def script(name, *args, device, wait=True, **options):
    """Runs one of the scripts as a user does; its process, or what it printed."""
    env = dict(os.environ, **({} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}))
    process = subprocess.Popen([sys.executable, ROOT / name, *map(str, args)], text=True, env=env,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if not wait:
        return process
    printed = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"{name} {' '.join(map(str, args))}: {printed.strip()[-400:]}")
    return printed


def losses_of(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def killed(out, *args, device, at):
    """Runs train.py and kills it when it has logged `at` steps."""
    process = script("train.py", *args, "--out", out, device=device, wait=False)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists()
                                      or metrics.read_text().count("\n") < at):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def runs_of_train(device, folder):
    """The loss curve on the device and on the CPU; the same bits twice, and after a kill."""
    import data
    steps, model_dir = 20 if device == "cuda" else 8, folder / "model"
    Qwen2.from_pretrained("builtin:tiny").save_pretrained(model_dir)
    data.builtin_tokenizer().save(model_dir)
    common = ["--model", model_dir, "--data", "builtin:worked:5000", "--system", "none",
              "--dtype", "float32", "--learning_rate", "2e-3", "--batch_size", 16,
              "--max_steps", steps, "--save_steps", steps // 4, "--deterministic"]
    script("data.py", "builtin:worked:5000", "--model", model_dir, device="cpu")  # the token cache
    outs = {name: folder / name for name in ("first", "again", "resumed", "cpu")}
    with futures.ThreadPoolExecutor(4 if device == "cuda" else 1) as threads:
        runs = [threads.submit(script, "train.py", *common, "--out", outs[name], device=where)
                for name, where in (("first", device), ("again", device), ("cpu", "cpu"))]
        kill = threads.submit(killed, outs["resumed"], *common, device=device, at=steps // 2)
        for run in runs:
            run.result()
        was_killed = kill.result()
    script("train.py", *common, "--out", outs["resumed"], "--resume", device=device)
    curves = {name: torch.tensor(losses_of(out)) for name, out in outs.items()}
    error = ((curves["first"] - curves["cpu"]) / curves["cpu"]).abs().max().item()
    row(f"loss curve of {steps} steps, beside the CPU's", f"{error:.1e} relative at most", "1e-3",
        error < 1e-3, error=error)
    weights = {name: (out / "model.safetensors").read_bytes() for name, out in outs.items()}
    for name, what in (("again", "--deterministic, twice"),
                       ("resumed", "--deterministic, killed and resumed")):
        same = weights[name] == weights["first"] and bool((curves[name] == curves["first"]).all())
        same = same and (name == "again" or was_killed)
        row(what, "the same bits" if same else "other bits", "the same bits", same)


def losses_by_mode(device, config, modes, dtype, lengths, steps=3):
    """{mode: losses of some optimizer steps} of train.py's own parts, in this process. A mode is
    (recompute, offload, compile)."""
    import train
    rank, world_size, device = train.start_processes(False)
    mesh = train.init_device_mesh(device.type, (1,), mesh_dim_names=("shard",))
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randint(1000, (n,), generator=generator).numpy(),
             torch.ones(n, dtype=torch.uint8).numpy()) for n in lengths]
    losses = {}
    for mode in modes:
        model = train.build_model(config, mesh, getattr(torch, dtype), *mode[:2], reshard=True,
                                  compiles=mode[2])
        model.to_empty(device="cpu" if mode[1] == "parameters" else device)
        train.init_weights(model, 0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
        losses[mode] = []
        for _ in range(steps):
            loss = train.forward_backward(model, rows, [range(len(rows))], 1 / sum(lengths), device)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
            optimizer.step()
            optimizer.zero_grad()
            losses[mode].append(loss.sum().item() / sum(lengths))
            assert torch.isfinite(norm), norm
    torch.distributed.destroy_process_group()
    return losses


def ways_to_save_memory(device, folder):
    """Every --recompute and --offload gives the loss of none; rows longer than a tile of the
    MLP."""
    import model
    modes = [("none", "none"), ("block", "none"), ("tiled", "none"), ("none", "parameters")]
    if device == "cuda":
        modes += [("block", "activations"), ("tiled", "activations"), ("block", "parameters"),
                  ("tiled", "parameters")]
    modes = [(*mode, False) for mode in modes]
    config, lengths = replace(SHAPES["small"], hidden_size=256, num_attention_heads=2), [3000, 2900]
    if device == "cpu":
        model.MLP_TILE, lengths = 256, [300, 290]
    assert sum(lengths) > model.MLP_TILE
    for dtype, goal in (("float32", 1e-5), ("bfloat16", 2e-3)):
        losses = losses_by_mode(device, config, modes, dtype, lengths)
        reference = torch.tensor(losses[modes[0]])
        for mode in modes[1:]:
            error = ((torch.tensor(losses[mode]) - reference) / reference).abs().max().item()
            row(f"--recompute {mode[0]} --offload {mode[1]}, {dtype}, 3 steps",
                f"{error:.1e} relative at most", f"{goal:g}", error < goal, error=error)


def compiled(device, folder):
    """train.py's and sample.py's --compile beside the same without."""
    import sample
    config = replace(SHAPES["small"], hidden_size=256, num_attention_heads=2)
    modes = [("block", "none", False), ("block", "none", True)]
    plain, fast = losses_by_mode(device, config, modes, "bfloat16", [900, 700, 448]).values()
    error = max(abs(a - b) / b for a, b in zip(fast, plain))
    row("train.py --compile, bfloat16, 3 steps", f"{error:.1e} relative at most", "0.002",
        error < 2e-3, error=error)
    answers = []
    for compiles in (False, True):
        model = sample.fuse(random_model(SHAPES["small"], device).eval(), compiles=compiles)
        answers.append(sample.generate(model, prompts_of(8), 24, num_slots=4))
    same = sum(a == b for a, b in zip(*answers))
    row("sample.py --compile, float32, greedy", f"{same} of 8 answers equal", "8", same == 8)


def prompts_of(count, length=None, seed=0, vocab_size=1000):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length or 5 + 17 * i % 120,), generator=generator).tolist()
            for i in range(count)]


def generation(device, folder):
    """sample.generate with captured graphs, the same without, and transformers' generate."""
    import sample
    captured, prompts = sample.Engine.captured, prompts_of(20)

    def generate(model, **options):
        return sample.generate(model, prompts, 80, num_slots=6, **options)
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(SHAPES["small"], device, dtype).eval()
        if dtype == torch.float32:
            beside_generate(model, prompts, generate(model), folder)
        if device == "cpu":
            return  # which captures none
        for options in ({}, dict(temperature=1.0), dict(temperature=1.0, top_p=0.9)):
            sample.Engine.captured = captured
            graphs = generate(model, **options)
            sample.Engine.captured = sample.Engine.step
            same = sum(a == b for a, b in zip(graphs, generate(model, **options)))
            name = ", ".join(f"{k} {v}" for k, v in options.items()) or "greedy"
            row(f"captured graphs, {str(dtype).removeprefix('torch.')}, {name}",
                f"{same} of 20 answers as without", "20", same == 20)
        sample.Engine.captured = captured


def beside_generate(model, prompts, answers, folder):
    """One row: how many of the greedy answers in fp32 are transformers' generate's."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return row("greedy, float32, beside transformers", "transformers is not installed")
    model.save_pretrained(folder / "model")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    theirs.to(next(model.parameters()).device).eval()
    same = 0
    for prompt, answer in zip(prompts, answers):
        ids = torch.tensor([prompt], device=theirs.device)
        tokens = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                 max_new_tokens=80, pad_token_id=0, eos_token_id=None)
        same += tokens[0, len(prompt):].tolist() == answer
    row("greedy, float32, beside transformers", f"{same} of {len(prompts)} answers equal",
        str(len(prompts)), same == len(prompts))


# -------------------------------------------------------------------------------------- 2. training

def training_size(device):
    """Configuration, tokens of a document, documents of a packed row, rows of a step. As many of
    32B's blocks as fit with all activations saved."""
    import train
    if device == "cpu":
        return replace(SHAPES["small"], max_position_embeddings=2048), 256, 4, 2
    total = 0.85 * torch.cuda.get_device_properties(0).total_memory
    for layers in range(16, 0, -1):
        config = replace(SHAPES["32B"], num_hidden_layers=layers)
        if sum(train.memory_estimate(config, 16384, 1, "none", "none").values()) < total:
            break
    return config, 4096, 4, 2


def write_rows(path, count, tokens, tokenizer):
    """Training rows of exactly so many tokens: letters, of which each is a token."""
    import data
    generator = torch.Generator().manual_seed(0)
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]
    room = tokens - len(data.encode_conversation(tokenizer, messages)[0])
    with open(path, "w") as file:
        for _ in range(count):
            letters = torch.randint(97, 123, (room,), generator=generator)
            answer = {"role": "assistant", "content": "".join(map(chr, letters.tolist()))}
            file.write(json.dumps({"messages": [messages[0], answer]}) + "\n")


def run_train(device, folder, recompute, offload, attention, steps=5):
    """train.py itself on random weights, without its checkpoint and export; the lines of its
    metrics.jsonl."""
    import data
    import train
    config, length, documents, rows_a_step = training_size(device)
    model_dir, rows, out = folder / "model", folder / "rows.jsonl", folder / "out"
    model_dir.mkdir()
    config.save(model_dir, torch.bfloat16)
    data.builtin_tokenizer().save(model_dir)
    write_rows(rows, documents * rows_a_step * steps, length, data.builtin_tokenizer())

    train.load_weights = random_weights
    train.ATTENTION = [BACKENDS[attention]]
    for name in ("check_weights", "save_checkpoint", "export"):  # as of 12 bytes a parameter
        setattr(train, name, lambda *args: None)
    train.Log.close = lambda *args: None
    sys.argv = ["train.py", "--model", str(model_dir), "--data", str(rows), "--out", str(out),
                "--cache", str(folder / "cache"), "--max_seq_len", str(length * documents),
                "--batch_size", str(documents * rows_a_step), "--max_steps", str(steps),
                "--recompute", recompute.removesuffix("+compile"), "--offload", offload,
                *["--compile"] * recompute.endswith("+compile")]
    train.main()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def training(device, folder, recompute, offload, attention):
    """Tokens a second, MFU and peak memory as train.py counts them, after two steps of warm-up."""
    import train
    config, length, documents, _ = training_size(device)
    lines = run_train(device, folder, recompute, offload, attention)[2:]
    compiles = recompute.endswith("+compile")
    recompute = recompute.removesuffix("+compile")
    what = f"{recompute}{', activations offloaded' * (offload != 'none')}, {attention}"
    what += ", compiled" * compiles
    on_gpu = device == "cuda"
    rate = statistics.median(line["raw_tokens_per_second"] for line in lines)
    mfu = statistics.median(line["mfu"] or 0 for line in lines)
    row(what, f"MFU {mfu:.1%}, {rate:,.0f} tokens/s, {config.num_hidden_layers} layers",
        "40 %" if on_gpu else "", mfu >= 0.4 if on_gpu else None, rate=rate, mfu=mfu,
        layers=config.num_hidden_layers, seconds=[line["seconds"] for line in lines])
    if not on_gpu:
        return  # there memory is the whole process's, not that of its tensors
    gib = lines[-1]["memory_gib"]
    estimate = train.memory_estimate(config, length * documents, 1, recompute, offload,
                                     device_type=device)
    planned = sum(estimate.values()) / 2 ** 30
    row(f"{what}: peak memory", f"{gib:.1f} GiB, estimate {planned:.1f} ({gib / planned - 1:+.1%})",
        "within 10 %", abs(gib / planned - 1) < 0.1, gib=gib, estimate=estimate)


def profiled_training(device, folder, recompute):
    """Where the time of one step goes."""
    import train
    profiler, write, seconds = profiler_of(device), train.Log.write, []

    def profiling_write(log, line):  # once a step, when its work is done
        if line["step"] == 2:
            profiler.start()
        elif line["step"] == 3:
            profiler.stop()
            seconds.append(line["seconds"])
        return write(log, line)
    train.Log.write = profiling_write
    attention = "flash" if device == "cuda" else "math"
    run_train(device, folder, recompute, "none", attention)
    where_time_goes(f"one step of {recompute}, {attention}", profiler, device, *seconds)


def profiler_of(device):
    kinds = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[kinds.CUDA if device == "cuda" else kinds.CPU])


def where_time_goes(what, profiler, device, seconds):
    """A row with the share of each kind of kernel in so many seconds, and with the longest ones."""
    annotation = ("FSDP::", "nccl:", "Optimizer.", "ProfilerStep")
    kinds, kernels = dict.fromkeys(KERNELS, 0.0), []
    for event in profiler.key_averages():
        on_device = str(event.device_type).endswith("CUDA") == (device == "cuda")
        if on_device and not event.key.startswith(annotation):
            spent = (event.self_device_time_total if device == "cuda"
                     else event.self_cpu_time_total) / 1e6
            kind = next(kind for kind, names in KERNELS.items()
                        if re.search(names, event.key, re.I))
            kinds[kind] += spent / seconds
            kernels.append((spent / seconds, event.count, event.key))
    figure = ", ".join(f"{kind} {share:.1%}" for kind, share in kinds.items())
    row(f"{what}: where the time goes", f"of {seconds * 1e3:.1f} ms: {figure}", shares=kinds,
        kernels=sorted(kernels, reverse=True)[:16])


def transformers_training(device, folder, steps=4):
    """A loop as transformers' Trainer runs it in bf16: fp32 weights under autocast, flash attention
    or SDPA, gradient checkpointing, the largest micro-batch that fits of the same documents."""
    try:
        import transformers
    except ImportError:
        return row("transformers", "is not installed")
    config, length, documents, rows_a_step = training_size(device)
    flash = transformers.utils.is_flash_attn_2_available()
    theirs = transformers.Qwen2Config(**asdict(config))
    theirs._attn_implementation = "flash_attention_2" if flash else "sdpa"
    with torch.device(device):
        model = transformers.Qwen2ForCausalLM(theirs)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    ids = torch.randint(256, (documents * rows_a_step, length), device=device)

    def step(micro):
        for part in ids.split(micro):
            with torch.autocast(device, torch.bfloat16):
                loss = model(input_ids=part, labels=part, num_items_in_batch=ids.numel()).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    for micro in (4, 2, 1):
        try:
            step(micro)
            break
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
        torch.cuda.empty_cache()
    times = []
    for _ in range(steps - 1):
        start = time.perf_counter()
        step(micro)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    rate = ids.numel() / seconds
    flops = len(ids) * config.train_flops(length)
    mfu = flops / seconds / (peak_flops() or 1e30)
    gib = torch.cuda.max_memory_allocated() / 2 ** 30 if device == "cuda" else 0
    row("transformers", f"MFU {mfu:.1%}, {rate:,.0f} tokens/s, {gib:.1f} GiB, {micro} documents at "
        f"a time, {theirs._attn_implementation}", rate=rate, mfu=mfu, gib=gib, seconds=times)


def peak_flops():
    import train
    if torch.cuda.is_available():
        return train.peak_flops(torch.cuda.get_device_name())


# -------------------------------------------------------------------------------------- 3. sampling

def timed(work, *args):
    """(seconds, result), with what the GPU was given done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def copy_bandwidth(device):
    """Bytes a second that a plain copy reads and writes."""
    x = torch.empty(2 ** 31 if device == "cuda" else 2 ** 27, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    x.fill_(1)
    times = [timed(y.copy_, x)[0] for _ in range(8)]
    return 2 * x.numel() / min(times[2:])


def sampling(device, folder, shape, compiles=False):
    """Tokens a second of sample.py's engine and of transformers' generate, greedy, no stop token;
    the share of the bandwidth is of the decode steps alone: weights and the cache that each reads,
    over the difference of a long and a short run. Compiled, one row alone."""
    import sample
    config = SHAPES[shape]
    on_gpu = device == "cuda"
    new, few = (160, 32) if on_gpu else (24, 8)
    if not on_gpu:
        config = replace(SHAPES["small"], num_hidden_layers=2,
                         tie_word_embeddings=config.tie_word_embeddings)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = sample.fuse(random_model(config, device, dtype).eval(), compiles=compiles)
    theirs = None if compiles else transformers_model(config, device, dtype)
    bandwidth = copy_bandwidth(device)
    weights = config.matmul_parameters * dtype.itemsize
    token_bytes = (2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
                   * dtype.itemsize)
    multiple = sample.LENGTH_STEP[device]

    def run(engine, length, count, seed):
        prompts = prompts_of(engine.num_slots, length, seed, config.vocab_size)
        return list(engine.run(sample.Request(prompt, i, count)
                               for i, prompt in enumerate(prompts)))
    sizes = [(1, 128)]  # prompts, their tokens
    if not compiles:
        sizes += [(16, 128), (64, 128), (1, 8000)] if on_gpu else [(4, 128)]
    for rows, length in sizes:
        engine = sample.Engine(model, rows, length + new, sample.Sampling())
        run(engine, length, new, 0)  # graphs are captured
        short = min(timed(run, engine, length, few, seed)[0] for seed in (1, 2))
        long = min(timed(run, engine, length, new, seed)[0] for seed in (3, 4))
        step = (long - short) / (new - few)
        cells = min(-(-(length + new) // multiple) * multiple, engine.cells)  # that a step reads
        read = weights + rows * token_bytes * cells
        share, rate = read / step / bandwidth, rows * new / long
        goal = on_gpu and (rows, length) == (1, 128)
        what = f"{shape}, {rows} x {length:,} tokens{', compiled' * compiles}"
        row(f"{what}: decode step", f"{step * 1e3:.2f} ms, {share:.0%} of a copy's "
            f"{bandwidth / 1e12:.2f} TB/s", "60 %" if goal else "", share >= 0.6 if goal else None,
            step=step, share=share, bandwidth=bandwidth, bytes=read)
        if theirs is None or rows > 16 or length > 128:  # there transformers takes too long
            row(what, f"{rate:,.0f} tokens/s", rate=rate)
            continue
        prompts = torch.tensor(prompts_of(rows, length, 5, config.vocab_size), device=device)

        def generate(count):
            theirs.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                            max_new_tokens=count, pad_token_id=0, eos_token_id=None)
        generate(4)
        slow = rows * new / timed(generate, new)[0]
        goal = on_gpu and rows == 16
        row(what, f"{rate:,.0f} tokens/s, transformers {slow:,.0f}: x {rate / slow:.2f}",
            "3" if goal else "", rate >= 3 * slow if goal else None, rate=rate, transformers=slow)

    # last, as a profiler that does not work here then costs no other row
    engine = sample.Engine(model, 1, 128 + new, sample.Sampling())
    run(engine, 128, few, 0)
    short = timed(run, engine, 128, few, 1)[0]
    with profiler_of(device) as profiler:
        run(engine, 128, few, 2)
    where_time_goes(f"{shape}, 1 row, {few} tokens{', compiled' * compiles}", profiler, device,
                    short)


def transformers_model(config, device, dtype):
    """transformers' model of this shape with random weights, or None."""
    try:
        import transformers
    except ImportError:
        return None
    with torch.device(device):
        return transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**asdict(config))).to(dtype).eval()


# --------------------------------------------------------------------------------------- 4. builtin

def builtin(device, folder):
    """torchrun train.py without arguments, then its model asked and its answers verified."""
    small = [] if device == "cuda" else ["--max_steps", "10", "--batch_size", "8"]
    env = dict(os.environ, XDG_CACHE_HOME=str(folder / "cache"))
    start = time.perf_counter()
    trained = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                              "--nproc_per_node=1", "--", str(ROOT / "train.py"), *small],
                             cwd=folder, env=env, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - start
    solved = re.search(r"held-out problems solved: (\d+) of (\d+)", trained.stdout)
    if trained.returncode or not solved:
        raise RuntimeError(f"train.py: {trained.stdout.strip()[-400:]}")
    share, goal = int(solved[1]) / int(solved[2]), device == "cuda"
    row("train.py", f"{solved[1]} of {solved[2]} held-out problems solved, {seconds:.0f} s",
        "80 %" if goal else "", share >= 0.8 if goal else None, share=share, seconds=seconds)
    samples, model_dir = folder / "samples.jsonl", folder / "out" / "tiny-1"
    count = 150 if device == "cuda" else 10
    start = time.perf_counter()
    script("sample.py", "--model", model_dir, "--problems", f"builtin:heldout:{count}", "--n", 4,
           "--system", "none", "--max_new_tokens", 200, "--out", samples, device=device)
    seconds = time.perf_counter() - start
    printed = script("verify.py", samples, "--out", folder / "verified.jsonl", "--json",
                     device=device)
    scores = json.loads(printed.splitlines()[-1])["rows"]
    verified = [json.loads(line) for line in (folder / "verified.jsonl").read_text().splitlines()]
    share = sum(line["passed"] for line in verified) / len(verified)
    row("sample.py and verify.py", f"{share:.1%} of {len(verified)} samples pass; sampled in "
        f"{seconds:.0f} s", "75 %" if goal else "", share >= 0.75 if goal else None, share=share,
        scores=scores)


# ------------------------------------------------------------------------------------------ command

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of gpu.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", help="parts whose names begin so")
    parser.add_argument("--minutes", type=float, default=8, help="what is not begun by then fails")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no GPU here: try --device cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        import tempfile
        function, arguments = next(p[3:] for p in all_parts(args.device) if p[0] == args.part)
        with tempfile.TemporaryDirectory() as folder:
            function(args.device, Path(folder), *arguments)
            sys.stdout.flush()
        return
    for log in args.out.glob("failed *.log"):  # of an earlier run
        log.unlink()
    rows = run_all(args.device, args.out, args.only, args.minutes)
    rows += beside_transformers(rows, args.device)
    table = list(markdown(rows, args.device))
    print("\n".join(table))
    whole = dict(title=table[0].strip(), rows=rows)
    (args.out / "gpu.json").write_text(json.dumps(whole, indent=1))


if __name__ == "__main__":
    main()
