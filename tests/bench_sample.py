"""sample.py beside transformers' generate, one after the other in one run.

    pip install transformers
    python tests/bench_sample.py --model DIR [--rows 16 1] [--new_tokens 128] [--dtype bfloat16]

Greedy, prompts of mixed lengths, the same number of new tokens for every row (stop tokens off).
After one warm-up each they take turns, --repeats times; rates are of the best, the range of the
ratio is that of the turns. On CUDA also the fraction of the memory's bandwidth that
the decode step reaches: bytes of weights and cache read, over time, over --bandwidth.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import sample  # noqa: E402
from model import Qwen2  # noqa: E402


def timed(work, cuda):
    start = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes a second (H100)")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM
    cuda = torch.cuda.is_available()
    device, dtype = "cuda" if cuda else "cpu", getattr(torch, args.dtype)
    ours = sample.fuse(Qwen2.from_pretrained(args.model, dtype=dtype, device=device).eval())
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    theirs.generation_config.eos_token_id = None
    torch.manual_seed(0)
    for rows in args.rows:
        prompts = [torch.randint(5, 1000, (40 + 20 * (i % 8),)).tolist() for i in range(rows)]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts],
                            device=device)
        turns = []
        with torch.inference_mode():
            for _ in range(args.repeats + 1):
                fast, answers = timed(lambda: sample.generate(ours, prompts, args.new_tokens), cuda)
                slow, reference = timed(lambda: theirs.generate(
                    ids, attention_mask=mask, max_new_tokens=args.new_tokens, do_sample=False,
                    repetition_penalty=1.0, pad_token_id=0), cuda)
                turns.append((fast, slow))
        ratios = sorted(slow / fast for fast, slow in turns[1:])
        fast, slow = map(min, zip(*turns[1:], strict=True))
        same = sum(a == b for a, b in zip(answers, reference[:, width:].tolist(), strict=True))
        total = rows * args.new_tokens
        print(f"{rows} rows, {args.dtype}, {device}: sample.py {total / fast:.1f} tokens/s, "
              f"transformers {total / slow:.1f}, x {slow / fast:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
              f"{same} of {rows} rows equal")
        if cuda:
            size = sum(p.numel() * p.element_size() for p in ours.parameters())
            print(f"  {size * args.new_tokens / fast / args.bandwidth:.0%} of the bandwidth "
                  "(weights alone, prefill's time included)")


if __name__ == "__main__":
    main()
