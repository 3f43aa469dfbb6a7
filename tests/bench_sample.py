"""sample.py beside transformers' generate, one after the other in one run.

    pip install transformers
    python tests/bench_sample.py --model DIR                                  # the decode step
    python tests/bench_sample.py --model DIR --problems gsm8k_test.jsonl      # answers to problems

Greedy. On a CPU without bf16 arithmetic sample.py computes in float32 where --dtype is bfloat16;
--their_dtype float32 is then what transformers is fastest in. Without problems: random prompts of
mixed lengths and the same number of new tokens for each (stop tokens off), all rows at once. With
problems: --limit of them, --rows at a time, each answer until it stops or has --new_tokens;
transformers takes the problems in whole batches, sample.py refills the slots of finished rows.
After one warm-up each they take turns, --repeats times; rates are of the best, the range of the
ratio is that of the turns. Then where the time of a decode step goes: products, attention, other
operators, and the rest, which is Python (by PyTorch's profiler, over the time without it); and how
long a plain copy takes, in the same run, of the bytes that a step must read: weights and cache.
"""
import argparse
import itertools
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import sample  # noqa: E402
from model import Qwen2, Qwen2Config  # noqa: E402


def timed(work, *args):
    start = time.perf_counter()
    result = work(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def generate(theirs, prompts, rows, new_tokens, stop_ids):
    """sample.generate's result by transformers: batches of `rows` prompts, padded on the left."""
    answers = []
    for start in range(0, len(prompts), rows):
        batch = prompts[start:start + rows]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=theirs.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch],
                            device=theirs.device)
        tokens = theirs.generate(ids, attention_mask=mask, max_new_tokens=new_tokens,
                                 do_sample=False, repetition_penalty=1.0, pad_token_id=0,
                                 eos_token_id=stop_ids or None)
        for answer in tokens[:, width:].tolist():
            ends = [i for i, token in enumerate(answer) if token in stop_ids]
            answers.append(answer[:ends[0]] if ends else answer)
    return answers


def seconds_of(work, times=5):
    """The shortest of several runs."""
    return min(timed(work)[0] for _ in range(times))


def print_where_time_goes(model, prompts, rows, device):
    """Of the decode steps of `rows` requests, whose prompts are cut to 100 tokens."""
    from torch.profiler import profile
    engine, steps = sample.Engine(model, rows, 200, sample.Sampling()), 10
    requests = [sample.Request((prompt * 100)[:100], i, 100) for i, prompt in
                enumerate(itertools.islice(itertools.cycle(prompts), rows))]
    with torch.inference_mode():
        for request in requests:
            engine.append(len(engine.requests) - 1, engine.prefill(request))

        def decode():
            for _ in range(steps):
                engine.decode(True)
        step = seconds_of(decode) / steps
        with profile() as profiler:
            decode()
    time = {"products": 0, "attention": 0, "other operators": 0}
    for event in profiler.key_averages():
        kind = ("products" if any(name in event.key for name in ("linear", "addmm", "aten::mm"))
                else "attention" if "attention" in event.key else "other operators")
        time[kind] += (event.self_device_time_total if device == "cuda"
                       else event.self_cpu_time_total) / steps / 1e6
    time["Python"] = step - sum(time.values())
    itemsize, c = next(model.parameters()).element_size(), model.config
    read = itemsize * (c.matmul_parameters + 2 * 128 * rows * c.num_hidden_layers
                       * c.num_key_value_heads * c.head_dim)
    source = torch.ones(2 ** 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source)) * read / len(source)
    print(f"  a step of {rows} rows, {step * 1e3:.1f} ms: "
          + ", ".join(f"{name} {t / step:.0%}" for name, t in time.items())
          + f"; a copy of the {read / 1e6:.0f} MB that it reads: {copy * 1e3:.1f} ms", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--problems", nargs="+")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--their_dtype", choices=("float32", "bfloat16"),
                        help="transformers' (as --dtype)")
    parser.add_argument("--compile", action="store_true", help="sample.py's flag")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.their_dtype = args.their_dtype or args.dtype
    folder = data.find_model(args.model)
    config, tokenizer = Qwen2Config.from_pretrained(folder), data.load_tokenizer(folder)
    stop_ids = {*data.read_generation_config(folder)[1], tokenizer.token_id(tokenizer.end_token)}
    theirs = AutoModelForCausalLM.from_pretrained(folder,
                                                  dtype=getattr(torch, args.their_dtype))
    theirs.to(device).eval().generation_config.eos_token_id = None
    torch.manual_seed(0)
    for rows in args.rows:
        dtype = sample.computed_in(args.dtype, config, device, rows)
        ours = Qwen2.from_pretrained(folder, dtype=getattr(torch, dtype), device=device).eval()
        ours = sample.fuse(ours, rows, args.compile)
        if args.problems:
            prompts = [sample.prompt_of(tokenizer, sample.messages_of(problem, None))
                       for problem in list(data.read_problems(args.problems))[:args.limit]]
            stops = sorted(stop_ids)
        else:
            prompts = [torch.randint(5, 1000, (40 + 20 * (i % 8),)).tolist() for i in range(rows)]
            stops = []
        turns = []
        for _ in range(args.repeats + 1):
            fast, answers = timed(lambda: sample.generate(ours, prompts, args.new_tokens,
                                                          stop_ids=stops, num_slots=rows))
            slow, reference = timed(generate, theirs, prompts, rows, args.new_tokens, stops)
            turns.append((sum(map(len, answers)) / fast, sum(map(len, reference)) / slow))
        ratios = sorted(fast / slow for fast, slow in turns[1:])
        fast, slow = map(max, zip(*turns[1:], strict=True))
        same = sum(a == b for a, b in zip(answers, reference, strict=True))
        print(f"{len(prompts)} prompts, {rows} rows, {device}, {torch.get_num_threads()} threads: "
              f"sample.py {fast:.1f} tokens/s in {dtype}, transformers {slow:.1f} in "
              f"{args.their_dtype}, x {fast / slow:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
              f"{same} of {len(prompts)} answers equal", flush=True)
        print_where_time_goes(ours, prompts, rows, device)


if __name__ == "__main__":
    main()
