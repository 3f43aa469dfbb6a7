"""Supervised fine-tuning of a Qwen2 on one CPU, one GPU, or many (FSDP): one loop, from safetensors
to safetensors.

    torchrun --nproc_per_node=2 train.py        # no download: the built-in model, on a CPU
    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-32B-Instruct \\
        --data NovaSky-AI/Sky-T1_data_17k --out out/sky
    torchrun --nproc_per_node=8 train.py ... --out out/sky --resume     # after a crash or a kill

What each rank holds: its slice of fp32 weights, gradients and both AdamW moments (16 bytes a
parameter over the ranks), one or two whole blocks in bf16 while they compute, and the activations
of one packed row. A step takes `--batch_size` examples however many ranks there are: it sums their
token losses and divides once, by the batch's target tokens.

Sources: the recipe of Sky-T1 (novasky-ai.github.io/posts/sky-t1); the cosine schedule of
transformers (get_cosine_schedule_with_warmup); AdamW (arXiv 1711.05101); FSDP (2304.11277). Limits:
data parallel only.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

# read when torch first meets the GPU
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy,
                                    OffloadPolicy, fully_shard)
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import data
from model import (BUILTIN, LOSS_CHUNK, MLP_TILE, Qwen2, Qwen2Config, init_weights, load_weights,
                   sync_folder, write_durably)

BUILTIN_DEFAULTS = dict(data=["builtin:worked:40000"], num_train_epochs=1, max_steps=400,
                        learning_rate=2e-3, dtype="float32", system="none", save_steps=100)
# Dense bf16 TFLOP/s of NVIDIA's data sheets, by what the device's name contains.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "H20": 148, "GH200": 989, "B200": 2250,
               "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "A10G": 70, "A10": 125,
               "4090": 165, "3090": 71, "5090": 210}
# In the order of preference: none of them holds T x T scores. Flash needs no plan for each document
# length, as cuDNN does.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
# What of memory a choice of recompute and offload is allowed to fill; the rest is the allocator's
# and the libraries'.
MEMORY_SHARE = {"cuda": 0.88, "cpu": 0.5}


# ------------------------------------------------------------------------------------- command line

def parse_arguments():
    """The flags, with the recipe's defaults or the built-in model's. ValueError for a bad value."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes a Qwen2. The defaults are the recipe of Sky-T1-32B-Preview; "
                    "builtin:tiny has its own: "
        + ", ".join(f"{k} {v}" for k, v in BUILTIN_DEFAULTS.items()))

    def add(name, help, **options):
        shown = "" if options.get("default") is None else f" (default: {options['default']})"
        parser.add_argument(name, help=help + shown, **options)

    add("--model", default="builtin:tiny",
        help="folder in Hugging Face layout, hub name, or builtin:tiny")
    add("--data", nargs="+", default=["NovaSky-AI/Sky-T1_data_17k"],
        help="files, hub data sets, builtin:worked, builtin:bare")
    add("--eval_data", nargs="+", help="held-out rows: their loss is measured at each save")
    add("--out", help="output folder, then itself a --model (default: a fresh one under out/)")
    add("--resume", action="store_true",
        help="continue the run in --out from its newest checkpoint")
    add("--num_train_epochs", type=int, default=3, help="passes over the data")
    add("--max_steps", type=int, default=0,
        help="length of the run in steps, instead of epochs; 0: epochs")
    add("--batch_size", type=int, default=96,
        help="examples of one step, whatever the number of GPUs")
    add("--learning_rate", type=float, default=1e-5, help="its peak")
    add("--warmup_ratio", type=float, default=0.1,
        help="share of the steps in which it rises; then a cosine to 0")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    add("--max_seq_len", type=int,
        help=f"tokens of a packed row; longer examples are dropped and counted (default: "
        f"{data.MAX_SEQ_LEN}, or the model's positions if fewer)")
    add("--as_published", action="store_true",
        help="the original's data: duplicates kept, long rows truncated, <|endoftext|>")
    add("--end_token", help="end of an assistant's turn (default: the chat template's)")
    add("--system", default="skyt1",
        help="system prompt of kept samples: skyt1, qwq, none, or a text")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
        help="of matrix products and of the exported weights")
    add("--seed", type=int, default=42,
        help="of the order of the data (and of builtin:tiny's weights)")
    add("--deterministic", action="store_true",
        help="the same bits on each run on a GPU too, slower")
    add("--recompute", choices=["auto", "none", "block", "tiled"], default="auto",
        help="activations computed again in the backward pass: none; block: all but a block's "
             f"input; tiled: and the MLP {MLP_TILE} tokens at a time; auto: the first that fits")
    add("--offload", choices=["auto", "none", "activations", "parameters"], default="auto",
        help="to host memory: recomputation's inputs, or parameters and optimizer too; auto: what "
             "must")
    add("--shard_size", type=int, default=0,
        help="GPUs that share one copy of the model, such as those of a node; 0: all")
    add("--compile", action="store_true", help="torch.compile each block (for GPUs)")
    add("--save_steps", type=int, default=100, help="steps from checkpoint to checkpoint")
    add("--keep_checkpoints", type=int, default=2, help="newest checkpoints kept")
    add("--cache", help="folder of the tokenised rows (default: ~/.cache/sky-t1)")
    add("--dollars_per_gpu_hour", type=float, default=2.96,
        help="what the progress bar and run.json count with")
    if parser.parse_known_args()[0].model in BUILTIN:
        parser.set_defaults(**BUILTIN_DEFAULTS)
    args = parser.parse_args()
    for name in ("num_train_epochs", "batch_size", "max_seq_len", "save_steps", "keep_checkpoints",
                 "learning_rate", "max_grad_norm"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name} {getattr(args, name)}: must be above 0")
    if not 0 <= args.warmup_ratio <= 1 or args.max_steps < 0 or args.shard_size < 0:
        raise ValueError(f"--warmup_ratio {args.warmup_ratio} must be 0 to 1, --max_steps "
                         f"{args.max_steps} and --shard_size "
                         f"{args.shard_size} at least 0")
    if args.resume and not args.out:
        raise ValueError("--resume continues the run of a folder: name it with --out")
    if args.offload == "activations" and args.recompute == "none":
        raise ValueError("--offload activations moves what recomputation saves: use --recompute "
                         "block or tiled with it")
    if args.as_published and not args.end_token:
        args.end_token = "<|endoftext|>"
    return args


# ---------------------------------------------------------------------------------------- processes

def start_processes(deterministic):
    """Joins the process group that torchrun describes, or one of this process alone. Returns rank,
    world_size, device."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    on_gpu = torch.cuda.is_available()
    local_rank, local_world_size = (int(os.environ.get(name, n))
                                    for name, n in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    if on_gpu and local_world_size > torch.cuda.device_count():
        raise ValueError(f"{local_world_size} processes, but {torch.cuda.device_count()} GPUs "
                         f"here: lower --nproc_per_node, or "
                         "set CUDA_VISIBLE_DEVICES= to use the CPU")
    if on_gpu:
        torch.cuda.set_device(local_rank)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    # objects and checkpoints' plans travel over gloo; hours, as one rank may fetch 65 GB of weights
    # while others wait
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(hours=4),
                            **alone)
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return dist.get_rank(), dist.get_world_size(), device


def agreed(function, *args):
    """function(*args) on every rank; an error that a user can mend is raised on all ranks if it is
    raised on one."""
    result = error = None
    try:
        result = function(*args)
    except (ValueError, OSError) as caught:
        error = caught
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            raise error
    return result


def node_by_node(function, *args):
    """function(*args) on the first rank of each node, which fetches and caches, and then on the
    others."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = agreed(function, *args) if first else agreed(lambda: None)
    return agreed(lambda: None if first else function(*args)) or result


def from_rank_0(function, *args):
    """The result, or the error, of function(*args) on rank 0."""
    result = [agreed(function, *args) if dist.get_rank() == 0 else agreed(lambda: None)]
    dist.broadcast_object_list(result)
    return result[0]


# ------------------------------------------------------------------------- model, memory, optimizer

def memory_estimate(config, max_seq_len, num_ranks, recompute, offload, width=2):
    """Bytes a rank needs at its peak, by what they are for: a packed row of max_seq_len tokens,
    gradients accumulated. `width` is the bytes of a number in matrix products.

    Per token a block saves about 5 I + 8 C numbers for its backward pass, which needs two fifths
    more while it works. Blocks and loss are never at work together: the larger one counts.
    """
    C, I, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    T, embedding = max_seq_len, config.vocab_size * C
    block = (config.matmul_parameters - embedding) // L
    parameters = L * block + embedding * (1 if config.tie_word_embeddings else 2)
    mlp, attention = width * (5 * I + 3 * C), width * 5 * C  # bytes a token
    kept = L * T * {"none": mlp + attention, "block": width * C, "tiled": 2 * width * C}[recompute]
    work = {"none": 0.4 * T * (mlp + attention), "block": 1.4 * T * (mlp + attention),
            "tiled": 1.4 * max(min(T, MLP_TILE) * mlp, T * attention)}[recompute]
    # this block, the next, the one before; and a gradient in fp32
    gathered = (3 * width + 4) * block
    # logits; the weight, its gradient in fp32 and as it is handed on; hidden states
    loss = (4 + width) * LOSS_CHUNK["cuda"] + (4 + 2 * width) * embedding + 3 * width * T * C
    return {
        "weights, gradients, moments": 0 if offload == "parameters"
        else 16 * parameters / num_ranks,
        "saved activations": 0 if recompute != "none" and offload != "none" else kept,
        "work of a block or of the loss": max(gathered + work, loss),
    }


def choose_memory(config, args, num_ranks, available, device_type="cuda"):
    """The first --recompute and --offload that fit, dearest in memory and cheapest in time first;
    else the last."""
    choices = [("none", "none"), ("block", "none"), ("tiled", "none")]
    if device_type == "cuda":  # a CPU has no other memory to move to
        choices += [("block", "activations"), ("tiled", "activations"), ("block", "parameters"),
                    ("tiled", "parameters")]
    choices = [(r, o) for r, o in choices if args.recompute in ("auto", r)
               and args.offload in ("auto", o)]
    # a pair that only a user asks for
    choices = choices or [(args.recompute.replace("auto", "tiled"), args.offload)]
    for recompute, offload in choices:
        width = 2 if args.dtype == "bfloat16" else 4
        if sum(memory_estimate(config, args.max_seq_len, num_ranks, recompute, offload,
                               width).values()) < available:
            break
    return recompute, offload


def available_memory(device):
    """Bytes that one rank may plan with: the GPU's, or its share of the host's."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        total /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return MEMORY_SHARE[device.type] * total


def shard(model, mesh, dtype, reshard, offload_parameters):
    """FSDP: each block, the embedding, and norm with head are gathered, used and let go one by one.
    Weights stay fp32 in their slices, are gathered in `dtype`, and their gradients summed in fp32.
    reshard=False keeps gathered weights."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    place = OffloadPolicy()
    if offload_parameters:
        place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    options = dict(mesh=mesh, mp_policy=policy, offload_policy=place)
    layers = model.model.layers
    for block in layers:
        fully_shard(block, reshard_after_forward=reshard, **options)
    # tied: both ends need the embedding, which then stays with the root
    if not model.config.tie_word_embeddings:
        fully_shard(model.model.embed_tokens, reshard_after_forward=reshard, **options)
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **options)
    fully_shard(model, **options)
    for block, following in zip(layers, layers[1:]):
        block.set_modules_to_forward_prefetch([following])


def build_model(args, config, mesh, device, memory):
    """The sharded model, still empty, on the device; and whether it may stay gathered through a
    batch."""
    with torch.device("meta"):
        model = Qwen2(config)
    num_parameters = sum(p.numel() for p in model.parameters())
    # whole in bf16 with whole fp32 gradients: a batch then costs one gathering and one reduction,
    # however many micro-steps
    keep_gathered = mesh.size() > 1 and args.offload == "none" and 6 * num_parameters < 0.1 * memory
    model.recompute = args.recompute
    model.offload = args.offload != "none" and args.recompute != "none"
    if args.compile:
        for block in model.model.layers:  # its halves, as "tiled" recomputes them one by one
            block.attend, block.transform = (torch.compile(half, dynamic=True)
                                             for half in (block.attend, block.transform))
    shard(model, mesh, getattr(torch, args.dtype), not keep_gathered, args.offload == "parameters")
    model.to_empty(device="cpu" if args.offload == "parameters" else device)
    return model, keep_gathered


def learning_rate_factor(step, warmup_steps, num_steps):
    """Linear warm-up, then half a cosine to 0: transformers' get_cosine_schedule_with_warmup at
    step, counted from 0."""
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


# -------------------------------------------------------------------------------------- checkpoints

def training_state(model, optimizer):
    """Every tensor a run consists of, by name: the sharded weights and AdamW's two moments, made if
    not there yet. (The order of the data is a function of seed and step, and nothing else is
    random.)"""
    state = {}
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments["exp_avg"] = torch.zeros_like(parameter)
            moments["exp_avg_sq"] = torch.zeros_like(parameter)
        state |= {name: parameter.detach(), f"exp_avg.{name}": moments["exp_avg"],
                  f"exp_avg_sq.{name}": moments["exp_avg_sq"]}
    return state


def save_checkpoint(folder, model, optimizer, step, settings, keep):
    """Writes step-N aside, makes it durable, renames it, and only then removes older ones.
    Collective.

    Raises OSError on every rank if one cannot write; what was there before stays."""
    path, aside = folder / f"step-{step:06d}", folder / f"step-{step:06d}.tmp"
    from_rank_0(clear_unfinished, folder)
    try:
        dcp.save(training_state(model, optimizer), checkpoint_id=aside)
    except dcp.api.CheckpointException as error:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        reason = next(iter(error.failures.values()))[0]
        raise OSError(f"cannot write the checkpoint {path} ({reason}): free some disk, then "
                      f"--resume") from None

    def publish():
        write_durably(aside / "state.json",
                      [json.dumps({"step": step, "settings": settings}, indent=2).encode()])
        os.rename(aside, path)
        sync_folder(folder)
        for old in checkpoints(folder)[:-keep]:
            # killed half-way through, it must not look whole
            os.rename(old, old.with_suffix(".tmp"))
        clear_unfinished(folder)
    from_rank_0(publish)


def clear_unfinished(folder):
    """Removes what a kill left of saves and removals; a save into such a folder would mix old files
    with new."""
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path)


def checkpoints(folder):
    """The complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name))


def load_checkpoint(path, model, optimizer, settings):
    """Fills weights and moments, on any number of ranks. Returns the step; ValueError for a broken
    or foreign one."""
    tensors = training_state(model, optimizer)
    try:
        state = json.loads((path / "state.json").read_text())
        if state["settings"] != settings:
            raise ValueError("its settings are another run's")
        dcp.load(tensors, checkpoint_id=path)
    except (OSError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError,
            dcp.api.CheckpointException) as error:
        reason = error
        if isinstance(error, dcp.api.CheckpointException):
            reason = next(iter(error.failures.values()))[0]
        raise ValueError(f"{path} is broken or of another model ({type(reason).__name__}: "
                         f"{str(reason)[:200]}): remove it to continue from an older one") from None
    for parameter in model.parameters():
        optimizer.state[parameter]["step"].fill_(state["step"])
    return state["step"]


# ------------------------------------------------------------------------------------ output folder

IDENTITY = ("model", "data", "batch_size", "learning_rate", "num_train_epochs", "max_steps",
            "warmup_ratio", "max_grad_norm", "max_seq_len", "seed", "dtype", "as_published",
            "end_token", "system")


def run_settings(args, model_dir, rows):
    """What makes a run this run. Paths do not: model and data count by content."""
    settings = {name: getattr(args, name) for name in IDENTITY}
    return {**settings, "model": fingerprint(model_dir), "data": rows.digest}


def fingerprint(model_dir):
    """Hash of a model folder's configuration and of its weight files' headers and sizes; a built-in
    model's name."""
    if model_dir in BUILTIN:
        return str(model_dir)
    digest = hashlib.sha256()
    digest.update((Path(model_dir) / "config.json").read_bytes())
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(file.read(min(size, int.from_bytes(file.read(8), "little"))))
        digest.update(f"{path.name} {size}".encode())
    return digest.hexdigest()[:32]


def check_folder(args, settings):
    """The name of the output folder. Another run's is refused, and so are settings that a resumed
    run did not begin with."""
    if args.out is None:
        stem, number = Path(args.model.split(":")[-1]).name, 1
        while (Path("out") / f"{stem}-{number}").exists():
            number += 1
        return f"out/{stem}-{number}"
    out, file = Path(args.out), Path(args.out) / "settings.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file")
    # the latter: killed as it began
    if not out.exists() or all(p.name == "settings.json.tmp" for p in out.iterdir()):
        return args.out
    if not file.exists():
        raise ValueError(f"--out {out} is not empty and holds no run of train.py: choose another "
                         f"folder")
    if not args.resume:
        raise ValueError(f"--out {out} holds another run: choose another folder, or continue it "
                         f"with --resume")
    try:
        before = json.loads(file.read_text())
        changed = [f"{k} (was {before.get(k)}, is {v})"
                   for k, v in settings.items() if before.get(k) != v]
    except (ValueError, AttributeError):
        raise ValueError(f"{file} is broken: this run cannot be resumed") from None
    if changed:
        raise ValueError(f"--resume continues {out} with the settings it was started with; "
                         f"changed: {', '.join(changed)}")
    return args.out


def make_folder(out, settings):
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "settings.json").exists():
        write_durably(out / "settings.json", [json.dumps(settings, indent=2).encode()])
    (out / "checkpoints").mkdir(exist_ok=True)


def same_everywhere(settings):
    """ValueError where processes, on several nodes perhaps, see another model or other data."""
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, settings)
    for rank, other in enumerate(seen):
        if other != seen[0]:
            keys = [k for k in settings if other[k] != seen[0][k]]
            raise ValueError(f"rank {rank} sees another {', '.join(keys)} than rank 0: give every "
                             f"node the same files")


class Log:
    """Rank 0's record of a run: metrics.jsonl, with every step once, the progress bar, and
    tensorboard if installed."""

    def __init__(self, out, args, step, num_steps, world_size, device):
        self.path, self.args = out / "metrics.jsonl", args
        self.world_size, self.device = world_size, device
        self.lines = []
        for text in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError):  # the torn last line of a killed run
                self.lines.append(json.loads(text))
        self.lines = [line for line in self.lines if line["step"] < step]
        if [line["step"] for line in self.lines] != list(range(step)):
            raise ValueError(f"{self.path} lacks steps before {step}, where the checkpoint "
                             f"continues: restore it")
        write_durably(self.path, [json.dumps(line).encode() + b"\n" for line in self.lines])
        self.file = open(self.path, "a")
        self.bar = tqdm(total=num_steps, initial=step, desc="training", unit="step")
        self.peak = peak_flops(device)
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(out / "tensorboard", purge_step=step)
        except ImportError:
            self.board = None

    @property
    def gpu_hours(self):
        return sum(line["seconds"] * line["world_size"] for line in self.lines) / 3600

    def write(self, line, flops):
        """Adds one step. Returns whether it could be written."""
        seconds, on_gpu = line["seconds"], self.device.type == "cuda"
        line |= dict(tokens_per_second=line["num_target_tokens"] / seconds,
                     raw_tokens_per_second=line["num_tokens"] / seconds,
                     mfu=flops / (seconds * self.world_size * self.peak) if self.peak else None,
                     world_size=self.world_size,
                     memory_gib=peak_memory(self.device) / 2 ** 30)
        self.lines.append(line)
        shown = dict(loss=f"{line['loss']:.4f}", lr=f"{line['learning_rate']:.2e}",
                     tok_s=f"{line['tokens_per_second']:,.0f}")
        if on_gpu:
            shown |= dict(mfu=f"{line['mfu']:.1%}" if self.peak else "?",
                          mem=f"{line['memory_gib']:.1f}G",
                          cost=f"${self.gpu_hours * self.args.dollars_per_gpu_hour:.2f}")
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            self.bar.write(f"warning: {self.path}: {error.strerror}: stopping after the next step")
            return False
        if self.board is not None:
            for name in ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second",
                         "mfu"):
                if line.get(name) is not None:
                    self.board.add_scalar(name, line[name], line["step"])
        return True

    def close(self):
        self.bar.close()
        self.file.close()
        if self.board is not None:
            self.board.close()


def peak_memory(device):
    """Bytes this process has held at most: on the GPU, or (Linux counts in KiB) in host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device):
    """Floating-point operations a second that this GPU's data sheet names for bf16; None if it is
    not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def check_disk(out, num_parameters, keep, dtype):
    """Warns if the checkpoints to come (one more than kept, while it is written) and the export
    will not fit."""
    checkpoint, export = 12 * num_parameters, dtype.itemsize * num_parameters
    held = sum(f.stat().st_size for f in (out / "checkpoints").rglob("*") if f.is_file())
    needed, free = (keep + 1) * checkpoint + export - held, shutil.disk_usage(out).free
    if needed > free:
        print(f"warning: {out} will need {needed / 1e9:.1f} GB ({keep + 1} checkpoints of "
              f"{checkpoint / 1e9:.1f} GB, export "
              f"{export / 1e9:.1f} GB), the disk has {free / 1e9:.1f} GB free: lower "
              f"--keep_checkpoints", file=sys.stderr)


def generation_config(model_dir, end_token_id, pad_token_id):
    """The model's generation_config.json (if it has one), changed to stop on the end token."""
    path = Path(model_dir) / "generation_config.json"
    try:
        generation = json.loads(path.read_text()) if path.is_file() else {}
        before = generation.get("eos_token_id") or []
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is broken ({error}): download it again, or remove it") from None
    before = before if isinstance(before, list) else [before]
    generation["eos_token_id"] = [end_token_id] + [i for i in before if i != end_token_id]
    return generation if pad_token_id is None else {**generation, "pad_token_id": pad_token_id}


def export(out, model, tokenizer, generation, dtype):
    """Writes the Hugging Face folder: weights, configuration, tokenizer, generation_config.
    Collective."""
    model.config = dataclasses.replace(model.config, eos_token_id=generation["eos_token_id"][0])
    model.save_pretrained(out, dtype=dtype)

    def small_files():
        tokenizer.save(out)
        write_durably(out / "generation_config.json",
                      [json.dumps(generation, indent=2).encode() + b"\n"])
    from_rank_0(small_files)


def write_run(out, args, settings, rows, config, log):
    """run.json, the last file of a run: what it was, what it ran on, what it came to."""
    try:
        git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"],
                             capture_output=True, text=True).stdout
    except OSError:  # no git here
        git = ""
    on_gpu = log.device.type == "cuda"
    run = {"arguments": vars(args), "settings": settings, "config": dataclasses.asdict(config),
           "rows": rows.counts, "num_steps": len(log.lines), "final_loss": log.lines[-1]["loss"],
           "world_size": log.world_size,
           "device": torch.cuda.get_device_name(log.device) if on_gpu else "cpu",
           "gpu_hours": log.gpu_hours if on_gpu else 0.0,
           "dollars": log.gpu_hours * args.dollars_per_gpu_hour if on_gpu else 0.0,
           "process_hours": log.gpu_hours,
           "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                        "numpy": np.__version__},
           "git_commit": git.strip() or None, "weights": fingerprint(out)}
    write_durably(out / "run.json", [json.dumps(run, indent=2).encode() + b"\n"])


def draw_loss(path, losses, width=720, height=360, margin=64):
    """The loss curve as an SVG: each step grey, their running mean blue."""
    low, high = min(losses), max(losses)
    high = high if high > low else low + 1

    def points(values):
        return " ".join(f"{margin + i * (width - 2 * margin) / max(1, len(values) - 1):.1f},"
                        f"{margin + (high - v) * (height - 2 * margin) / (high - low):.1f}"
                        for i, v in enumerate(values))
    smooth = [sum(losses[max(0, i - 9):i + 1]) / len(losses[max(0, i - 9):i + 1])
              for i in range(len(losses))]
    labels = [(4, margin + 4, f"{high:.3g}"), (4, height - margin + 4, f"{low:.3g}"),
              (margin, height - 16, "step 0"),
              (width - margin - 40, height - 16, str(len(losses) - 1)),
              (margin, 24, f"loss (last {losses[-1]:.4f})")]
    write_durably(path, [(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        f'<path d="M{margin} {margin}V{height - margin}H{width - margin}" fill="none" '
        'stroke="black"/>'
        f'<polyline points="{points(losses)}" fill="none" stroke="#bbb"/>'
        f'<polyline points="{points(smooth)}" fill="none" stroke="#1f5fbf" stroke-width="2"/>'
        + "".join(f'<text x="{x}" y="{y}">{text}</text>'
                  for x, y, text in labels) + "</svg>\n").encode()])


# ----------------------------------------------------------------------------------- the inner loop

def forward_backward(model, rows, packed, scale, device, keep_gathered=False):
    """One batch: this rank's packed rows, one a micro-step, through the model; gradients of scale *
    loss are added up (unless gradients are off). Returns the loss of each row, summed over its
    targets, fp32 (micro-steps,)."""
    losses = []
    with sdpa_kernel(ATTENTION, set_priority=True):
        for micro_step, documents in enumerate(packed):
            if keep_gathered:
                model.set_requires_gradient_sync(micro_step == len(packed) - 1)
                model.set_reshard_after_backward(micro_step == len(packed) - 1)
            input_ids, targets, lengths = data.assemble(rows, documents)
            input_ids, targets = (torch.from_numpy(t).to(device, non_blocking=True)
                                  for t in (input_ids, targets))
            loss = model(input_ids, targets, lengths)
            if torch.is_grad_enabled():
                (loss * scale).backward()
            losses.append(loss.detach())
            if device.type == "cpu" and MALLOC_TRIM is not None:
                # gives back what glibc keeps of freed tensors: half a GiB for a model of 135M
                MALLOC_TRIM(0)
    return torch.stack(losses)


def plan_batch(rows, indices, max_seq_len, config):
    """Packs a batch: [micro_step][rank] -> row numbers; also its target tokens, tokens and
    floating-point operations."""
    lengths = rows.lengths[indices]
    costs = [config.train_flops(int(n)) for n in lengths]
    packed = data.pack(lengths, costs, max_seq_len, dist.get_world_size())
    packed = [[[int(indices[i]) for i in documents] for documents in ranks] for ranks in packed]
    return packed, int(rows.num_targets[indices].sum()), int(lengths.sum()), sum(costs)


@torch.no_grad()
def held_out_loss(model, rows, args, device):
    """Mean loss over all targets of the rows. Collective."""
    loss = torch.zeros((), device=device)
    for start in range(0, len(rows), args.batch_size):
        batch = np.arange(start, min(start + args.batch_size, len(rows)))
        packed, *_ = plan_batch(rows, batch, args.max_seq_len, model.config)
        loss += forward_backward(model, rows, [ranks[dist.get_rank()] for ranks in packed], 1.0,
                                 device).sum()
    dist.all_reduce(loss)
    # without a backward pass nothing else gives the gathered weights back
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return loss.item() / int(rows.num_targets.sum())


def refuse_step(step, rows, mine, losses, grad_norm):
    """Ends a run whose loss or gradient is not finite, before it spoils the weights; names the
    rows. Collective."""
    names = [rows.where(i)
             for documents, loss in zip(mine, losses.tolist()) if not math.isfinite(loss)
             for i in documents]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, names)
    names = [name for several in gathered for name in several]
    where = f"(gradient norm {grad_norm})"
    if names:
        where = f"on rows {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
    raise ValueError(f"the loss is not finite at step {step} {where}: the step is not taken; mend "
                     f"these rows or lower "
                     "--learning_rate, and begin a run with another --out")


def load_data(args, config, tokenizer):
    """The rows to train on and the held-out ones (or None), checked against the model."""
    loaded = []
    for names in (args.data, args.eval_data):
        rows = names and data.load_rows(names, tokenizer, args.max_seq_len, args.end_token,
                                        args.system, args.as_published,
                                        args.cache, quiet=int(os.environ.get("RANK", 0)) != 0)
        if rows and rows.tokens.max() >= config.vocab_size:
            raise ValueError(f"{', '.join(names)}: token id {rows.tokens.max()} is beyond the "
                             f"model's vocabulary of "
                             f"{config.vocab_size}: is the tokenizer in {args.model} this model's?")
        loaded.append(rows)
    return loaded


class Interrupt:
    """Turns SIGINT and SIGTERM into a wish to stop after the step in hand."""

    def __init__(self):
        self.wanted = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.wanted = True


@torch.no_grad()
def greedy(model, prompts, max_new_tokens, stop_id):
    """The most likely continuation of each prompt (lists of token ids). Rows are padded on the
    right, where causal attention does not look, and the whole prefix is computed for each token:
    fine for a small model only."""
    length = [len(p) for p in prompts]
    ids = torch.zeros(len(prompts), max(length) + max_new_tokens, dtype=torch.long)
    for row, prompt in zip(ids, prompts):
        row[:len(prompt)] = torch.tensor(prompt)
    open_rows, answers = set(range(len(prompts))), [[] for _ in prompts]
    for _ in range(max_new_tokens):
        logits = model(ids[:, :max(length)])
        for i in sorted(open_rows):
            token = int(logits[i, length[i] - 1].argmax())
            if token == stop_id:
                open_rows.discard(i)
                continue
            answers[i].append(token)
            ids[i, length[i]] = token
            length[i] += 1
        if not open_rows:
            break
    return answers


def show_held_out(out, tokenizer, count=64, shown=4):
    """Prints how the exported built-in model answers problems it has not seen."""
    model = Qwen2.from_pretrained(out)
    problems = list(data.builtin_problems("heldout", count))
    messages = [[{"role": "user", "content": p["prompt"]}] for p in problems]
    prompts = [tokenizer.encode(tokenizer.render(m, add_generation_prompt=True)) for m in messages]
    answers = [tokenizer.decode(ids)
               for ids in greedy(model, prompts, 80, tokenizer.token_id(tokenizer.end_token))]
    right = [answer.endswith(f"\\boxed{{{p['answer']}}}") for p, answer in zip(problems, answers)]
    for problem, answer, is_right in list(zip(problems, answers, right))[:shown]:
        print(f"\n{problem['prompt']}\n{answer}   "
              f"[{'right' if is_right else 'wrong, it is ' + problem['answer']}]")
    print(f"\nheld-out problems solved: {sum(right)} of {count} ({sum(right) / count:.0%})")


def main():
    """One run: processes, input, model, output folder, the loop, the finished folder."""
    args = parse_arguments()

    # 1. processes
    rank, world_size, device = start_processes(args.deterministic)
    shard_size = args.shard_size or world_size
    if world_size % shard_size:
        raise ValueError(f"--shard_size {shard_size} does not divide the {world_size} processes")
    mesh = init_device_mesh(device.type, (world_size // shard_size, shard_size),
                            mesh_dim_names=("replicate", "shard"))
    mesh = mesh if shard_size < world_size else mesh["shard"]
    say = print if rank == 0 else lambda *_: None

    # 2. input: what a user can get wrong is refused here, before anything is created
    model_dir = node_by_node(data.find_model, args.model)
    config = agreed(Qwen2Config.from_pretrained, model_dir)
    tokenizer = agreed(data.load_tokenizer, model_dir)
    agreed(data.check_against_model, args, config, tokenizer)
    rows, eval_rows = node_by_node(load_data, args, config, tokenizer)
    settings = agreed(run_settings, args, model_dir, rows)
    same_everywhere(settings)
    args.out = from_rank_0(check_folder, args, settings)
    out = Path(args.out)
    newest, is_finished = from_rank_0(lambda: (checkpoints(out / "checkpoints")[-1:],
                                               (out / "run.json").exists()))
    if is_finished:
        say(f"{out} is finished: nothing to do")
        return
    generation = agreed(generation_config, model_dir,
                        tokenizer.token_id(args.end_token or tokenizer.end_token),
                        tokenizer.pad_token_id)
    num_steps = args.max_steps or args.num_train_epochs * -(-len(rows) // args.batch_size)
    warmup_steps = math.ceil(args.warmup_ratio * num_steps)

    # 3. model and optimizer
    memory = available_memory(device)
    args.recompute, args.offload = choose_memory(config, args, shard_size, memory, device.type)
    model, keep_gathered = build_model(args, config, mesh, device, memory)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=0.0, fused=True)
    if model_dir in BUILTIN:
        init_weights(model, args.seed)
    elif not newest:
        agreed(load_weights, model, model_dir)

    # 4. output folder, resume
    from_rank_0(make_folder, out, settings)
    step = agreed(load_checkpoint, newest[0], model, optimizer, settings) if newest else 0
    if args.resume:
        say(f"resuming {out} at step {step}" if newest
            else f"{out} has no checkpoint yet: starting from the beginning")
    num_parameters = sum(p.numel() for p in model.parameters())
    say(json.dumps({**vars(args), "num_parameters": num_parameters, "world_size": world_size,
                    "num_steps": num_steps, "warmup_steps": warmup_steps, "rows": rows.counts,
                    "tokens": int(rows.lengths.sum())}, indent=2))
    if rank == 0:
        check_disk(out, num_parameters, args.keep_checkpoints, getattr(torch, args.dtype))
    log = agreed(lambda: Log(out, args, step, num_steps, world_size, device) if rank == 0 else None)

    # 5. the loop
    interrupt, stop = Interrupt(), False
    while step < num_steps and not stop:
        start = time.perf_counter()
        batch = data.batch_indices(len(rows), args.batch_size, args.seed, step)
        packed, num_targets, num_tokens, flops = plan_batch(rows, batch, args.max_seq_len, config)
        mine = [ranks[rank] for ranks in packed]
        learning_rate = args.learning_rate * learning_rate_factor(step, warmup_steps, num_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        # FSDP averages gradients over ranks; the loss divides by the target tokens of all of them
        losses = forward_backward(model, rows, mine, world_size / num_targets, device,
                                  keep_gathered)
        total = torch.stack([losses.sum(), losses.new_tensor(interrupt.wanted)])
        dist.all_reduce(total)
        loss, stop = total[0].item() / num_targets, total[1].item() > 0
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(),
                                             args.max_grad_norm).full_tensor().item()
        if not math.isfinite(loss + grad_norm):
            refuse_step(step, rows, mine, losses, grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        step += 1
        line = dict(step=step - 1, loss=loss, learning_rate=learning_rate, grad_norm=grad_norm,
                    num_target_tokens=num_targets, num_tokens=num_tokens, micro_steps=len(packed),
                    seconds=time.perf_counter() - start)
        saving = step % args.save_steps == 0 or step == num_steps or stop
        # an interrupted run may have little time left
        if saving and eval_rows is not None and not stop:
            line["eval_loss"] = held_out_loss(model, eval_rows, args, device)
        if log is not None:
            interrupt.wanted |= not log.write(line, flops)
        if saving:
            save_checkpoint(out / "checkpoints", model, optimizer, step, settings,
                            args.keep_checkpoints)

    # 6. the finished folder
    if log is not None:
        log.close()
    if step < num_steps:
        say(f"interrupted: step {step} of {num_steps} is saved; continue with --out {out} --resume")
        return
    export(out, model, tokenizer, generation, getattr(torch, args.dtype))
    if rank == 0:
        draw_loss(out / "loss.svg", [line["loss"] for line in log.lines])
        write_run(out, args, settings, rows, config, log)
        print(f"finished: {out} is a Hugging Face folder; its loss curve is {out}/loss.svg")
        if model_dir in BUILTIN:
            show_held_out(out, tokenizer)
            print(f"\nnext: python data.py builtin:worked:40000 --model {out}    (its rows)\n"
                  "      python train.py --model DIR --data rows.jsonl    (a model of your own)")


if __name__ == "__main__":
    data.run(main)
