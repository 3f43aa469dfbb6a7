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
ratio is that of the turns. On CUDA also the fraction of the memory's bandwidth that the decode step
reaches: bytes of the weights, over time, over --bandwidth.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import sample  # noqa: E402
from model import Qwen2Config  # noqa: E402


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
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes a second (H100)")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.tensor_parallel, args.their_dtype = 1, args.their_dtype or args.dtype
    args.model = str(data.find_model(args.model))
    asked, config, ours = args.dtype, Qwen2Config.from_pretrained(args.model), None
    theirs = AutoModelForCausalLM.from_pretrained(args.model,
                                                  dtype=getattr(torch, args.their_dtype))
    theirs.to(device).eval().generation_config.eos_token_id = None
    torch.manual_seed(0)
    for rows in args.rows:
        args.dtype, ours = sample.computed_in(asked, config, device, rows), None
        ours, tokenizer, stop_ids = sample.load(args, 0, device)
        if args.problems:
            prompts = [tokenizer.encode(tokenizer.render(sample.messages_of(problem, "none"),
                                                         add_generation_prompt=True))
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
              f"sample.py {fast:.1f} tokens/s in {args.dtype}, transformers {slow:.1f} in "
              f"{args.their_dtype}, x {fast / slow:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
              f"{same} of {len(prompts)} answers equal", flush=True)
        if device == "cuda":
            size = sum(p.numel() * p.element_size() for p in ours.parameters())
            print(f"  {size * fast / rows / args.bandwidth:.0%} of the bandwidth (weights alone, "
                  "prefill's time included)")


if __name__ == "__main__":
    main()
