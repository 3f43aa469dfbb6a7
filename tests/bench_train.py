"""Benchmarks of training, each against the usual way in the same run. Not collected by pytest.

    python tests/bench_train.py loss                            # chunked loss, plain cross_entropy
    python tests/bench_train.py step --model DIR --data FILE    # train.py, a transformers loop

Every variant runs in a process of its own, so that its peak memory is its own; variants take turns,
so that a noisy machine disturbs them alike; the ratios of medians are what to quote. `step` needs
transformers installed.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def worker(*arguments):
    """Runs one variant in a fresh process; its last line of output is its result."""
    command = [sys.executable, __file__, "worker", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE,
                                     text=True).stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------------- loss

LOSS_SHAPE = dict(T=8192, C=896, V=151936)  # half a row of Qwen2.5-0.5B


def loss_worker(kind, dtype):
    from model import FusedLinearCrossEntropy
    T, C, V = LOSS_SHAPE.values()
    torch.manual_seed(0)
    x, weight, targets = torch.randn(T, C), torch.randn(V, C) / 30, torch.randint(V, (T,))
    x, weight = (t.to(getattr(torch, dtype)).requires_grad_() for t in (x, weight))
    before, start = resident_bytes(), time.perf_counter()
    if kind == "chunked":
        loss = FusedLinearCrossEntropy.apply(x, weight, targets, True)
    else:
        loss = F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")
    loss.backward()
    return dict(seconds=time.perf_counter() - start, bytes=peak_bytes() - before, loss=loss.item(),
                gradient=weight.grad.float().norm().item())


def bench_loss(repeats):
    for dtype in ("bfloat16", "float32"):
        results = {"plain": [], "chunked": []}
        for _ in range(repeats):
            for kind in results:
                results[kind].append(worker("loss", kind, dtype))
        table(f"loss, {LOSS_SHAPE}, {dtype}", results, "plain")


# --------------------------------------------------------------------------------------------- step

def transformers_worker(model_dir, data_files, batch_size, micro_batch, recompute, steps,
                        max_seq_len):
    """A plain loop with transformers' model as its Trainer runs it in bf16: fp32 weights under
    autocast, SDPA, padded micro-batches, examples of a batch sorted by length (group_by_length) so
    that little is padded."""
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM

    import data
    rows = data.load_rows(data_files.split(","), data.load_tokenizer(model_dir), max_seq_len,
                          quiet=True)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32,
                                                 attn_implementation="sdpa")
    model.train()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    seconds, losses, targets = [], [], []
    for step in range(steps):
        start, total = time.perf_counter(), 0.0
        batch = data.batch_indices(len(rows), batch_size, 42, step)
        batch = batch[rows.lengths[batch].argsort(kind="stable")[::-1]]
        targets.append(int(rows.num_targets[batch].sum()))
        for i in range(0, len(batch), micro_batch):
            examples = [rows[j] for j in batch[i:i + micro_batch]]
            ids = pad_sequence([torch.from_numpy(tokens) for tokens, _ in examples],
                               batch_first=True)
            attention = pad_sequence([torch.ones(len(tokens), dtype=torch.long)
                                      for tokens, _ in examples], batch_first=True)
            labels = pad_sequence([torch.where(torch.tensor(mask == 1), torch.from_numpy(tokens),
                                               -100)
                                   for tokens, mask in examples], batch_first=True,
                                  padding_value=-100)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, attention_mask=attention, labels=labels,
                             num_items_in_batch=targets[-1]).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(total)
    return dict(seconds=statistics.median(seconds[1:]), bytes=peak_bytes(),
                rate=sum(targets[1:]) / sum(seconds[1:]), losses=losses)


def train_worker(model_dir, data_files, batch_size, recompute, steps, max_seq_len):
    """train.py itself, in one process; what its metrics.jsonl says."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, ROOT / "train.py", "--model", model_dir, "--data",
                        *data_files.split(","), "--out",
                        f"{folder}/out", "--batch_size", str(batch_size), "--max_steps", str(steps),
                        "--max_seq_len",
                        str(max_seq_len), "--warmup_ratio", "0", "--recompute", recompute,
                        "--save_steps", "1000000"],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = [json.loads(line)
                 for line in Path(f"{folder}/out/metrics.jsonl").read_text().splitlines()]
    later = lines[1:]
    return dict(seconds=statistics.median(line["seconds"] for line in later),
                bytes=lines[-1]["memory_gib"] * 2 ** 30,
                rate=sum(line["num_target_tokens"] for line in later) / sum(line["seconds"]
                                                                            for line in later),
                losses=[line["loss"] for line in lines])


def bench_step(args):
    common = (args.model, ",".join(args.data), args.batch_size)
    variants = {f"transformers, {micro} rows{', checkpointing' if recompute else ''}":
                ("transformers", *common, micro, recompute)
                for micro in args.micro_batches for recompute in args.checkpointing}
    variants |= {f"train.py, recompute {recompute}": ("train", *common, recompute)
                 for recompute in args.recompute}
    results = {name: [] for name in variants}
    for repeat in range(args.repeats):
        for name, arguments in variants.items():
            results[name].append(worker(*arguments, args.steps, args.max_seq_len))
    best = max((name for name in results if name.startswith("transformers")),
               key=lambda name: statistics.median(r["rate"] for r in results[name]))
    table(f"step of {args.batch_size} examples, {args.model}, bf16", results, best)
    for name in results:
        print(f"{name}: losses {[round(x, 4) for x in results[name][0]['losses']]}")


def table(title, results, base):
    median = {name: {key: statistics.median(r[key] for r in runs)
                     for key in ("seconds", "bytes", "rate") if key in runs[0]}
              for name, runs in results.items()}
    print(f"\n{title} (torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{len(results[base])} runs, medians)")
    for name, row in median.items():
        rate = f"{row['rate']:9,.0f} target tokens/s, " if "rate" in row else ""
        speed = (row["rate"] / median[base]["rate"] if rate
                 else median[base]["seconds"] / row["seconds"])
        print(f"  {name:36} {row['seconds']:7.2f} s, {rate}{row['bytes'] / 2 ** 30:6.2f} GiB;  "
              f"speed x {speed:.2f}, "
              f"memory x {row['bytes'] / median[base]['bytes']:.2f}")


def main():
    if sys.argv[1:2] == ["worker"]:
        kind, *rest = sys.argv[2:]
        rest = [int(r) if r.isdigit() else r for r in rest]
        function = {"loss": loss_worker, "transformers": transformers_worker,
                    "train": train_worker}[kind]
        print(json.dumps(function(*rest)))
        return
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loss", "step"])
    parser.add_argument("--model", help="a folder, for step")
    parser.add_argument("--data", nargs="+", help="training rows, for step")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--checkpointing", type=int, nargs="+", default=[0, 1],
                        help="of transformers")
    parser.add_argument("--recompute", nargs="+", default=["none", "block", "tiled"],
                        help="of train.py")
    parser.add_argument("--max_seq_len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    {"loss": lambda: bench_loss(args.repeats), "step": lambda: bench_step(args)}[args.what]()


if __name__ == "__main__":
    main()
