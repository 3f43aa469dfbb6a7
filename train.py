"""Supervised fine-tuning of a Qwen2 on one CPU, one GPU or many (FSDP), in one loop.

    torchrun --nproc_per_node=2 train.py        # no download: the built-in model, on a CPU
    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-32B-Instruct \\
        --data NovaSky-AI/Sky-T1_data_17k --out out/sky
    torchrun --nproc_per_node=8 train.py ... --out out/sky --resume     # after a crash or a kill
    python train.py --plan 8xH100 --model ... --data ...    # memory, hours, dollars; needs no GPU

What each rank holds: its slice of fp32 weights, gradients and both AdamW moments (16 bytes a
parameter over the ranks), one or two whole blocks in bf16 while they compute, and the activations
of one packed row. A step takes `--batch_size` examples however many ranks there are: it sums their
token losses and divides once, by the batch's target tokens.

Sources: the recipe of Sky-T1 (novasky-ai.github.io/posts/sky-t1); transformers' cosine schedule;
AdamW (arXiv 1711.05101); FSDP (2304.11277). Limits: data parallel only.
"""
import contextlib
import ctypes
import dataclasses
import hashlib
import itertools
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

from verify import begin_script

if __name__ == "__main__":  # before torch is imported, which takes seconds
    begin_script()
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
from model import (BUILTIN, LOSS_CHUNK, MLP_TILE, Qwen2, Qwen2Config, cpu_multiplies_bf16,
                   init_weights, load_weights, sync_folder, write_durably)

BUILTIN_DEFAULTS = dict(data=["builtin:worked"], num_train_epochs=1, max_steps=500, batch_size=32,
                        learning_rate=2e-3, dtype="float32", system="none", save_steps=100)
# By what the device's name contains: dense bf16 TFLOP/s and GB/s one way to its neighbours (NVLink,
# else PCIe) of NVIDIA's data sheets; {GB in its name: GiB that PyTorch's out-of-memory errors say}.
GPUS = {"H100 PCIe": (756, 64, {80: 79.1}), "H100": (989, 450, {80: 79.2}),
        "H200": (989, 450, {141: 139.8}), "H20": (148, 450, {96: 95.1}),
        "GH200": (989, 450, {96: 94.5}), "B200": (2250, 900, {180: 178.4}),
        "A100": (312, 300, {80: 79.2, 40: 39.4}), "A800": (312, 200, {80: 79.2}),
        "L40S": (362, 32, {48: 44.5}), "L40": (181, 32, {48: 44.4}), "A10G": (70, 32, {24: 22.1}),
        "A10": (125, 32, {24: 22.1}), "4090": (165, 32, {24: 23.6}), "3090": (71, 32, {24: 23.6}),
        "5090": (210, 64, {32: 31.4})}
NETWORK = 50  # GB/s a GPU between nodes: 400 Gb/s for each, as in a DGX H100
# By preference; none holds T x T scores. Flash needs no plan for each length, as cuDNN does.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
# Sky-T1's post; the work of 17,000 rows of 4,500 tokens in 32B, three times
PUBLISHED = {"gpu_hours": 152, "flops": 4.6e19}
# What a choice of recompute and offload may fill; the rest is the allocator's and the libraries'.
MEMORY_SHARE = {"cuda": 0.88, "cpu": 0.5}


# ------------------------------------------------------------------------------------- command line

def parse_arguments():
    """The flags, with the recipe's defaults or the built-in model's."""
    its_own = "\n    ".join(f"{k} {v}" for k, v in BUILTIN_DEFAULTS.items())
    parser = data.ArgumentParser(
        description="Fine-tunes a Qwen2. The defaults are the recipe of Sky-T1-32B-Preview;\n"
                    f"builtin:tiny has its own:\n    {its_own}")
    add = parser.add
    add("--model", "folder in Hugging Face layout, hub name, or builtin:tiny",
        default="builtin:tiny", type="path")
    add("--data", "files, hub data sets, builtin:worked, builtin:bare", nargs="+", type="path",
        default=["NovaSky-AI/Sky-T1_data_17k"])
    add("--eval_data", "held-out rows: their loss is measured at each save", nargs="+",
        type="path")
    add("--out", "output folder, then itself a --model (default: a fresh one under out/)",
        type="path")
    add("--resume", "continue the run in --out from its newest checkpoint", action="store_true")
    add("--num_train_epochs", "passes over the data", type=int, default=3)
    add("--max_steps", "length of the run in steps, instead of epochs; 0: epochs", type=int,
        default=0)
    add("--batch_size", "examples of one step, whatever the number of GPUs", type=int, default=96)
    add("--learning_rate", "its peak", type=float, default=1e-5)
    add("--warmup_ratio", "share of the steps in which it rises; then a cosine to 0", type=float,
        default=0.1)
    add("--max_grad_norm", "gradients are clipped to this norm", type=float, default=1.0)
    add("--max_seq_len", "tokens of a packed row; longer examples are dropped and counted "
        f"(default: {data.MAX_SEQ_LEN}, or the model's positions if fewer)", type=int)
    add("--as_published", "the original's data: duplicates kept, long rows truncated, "
        "<|endoftext|>", action="store_true")
    add("--end_token", "end of an assistant's turn (default: the chat template's)")
    add("--system", "system prompt of kept samples: skyt1, qwq, none, or a text", default="skyt1")
    add("--dtype", "of exported weights and of matrix products (float32 where a CPU lacks bf16)",
        choices=["bfloat16", "float32"], default="bfloat16")
    add("--seed", "of the order of the data (and of builtin:tiny's weights)", type=int, default=42)
    add("--deterministic", "the same bits on each run on a GPU too, slower", action="store_true")
    add("--recompute", "activations computed again in the backward pass: none; block: all but a "
        f"block's input; tiled: and the MLP {MLP_TILE} tokens at a time; auto: the first that fits",
        choices=["auto", "none", "block", "tiled"], default="auto")
    add("--offload", "to host memory: recomputation's inputs, or parameters and optimizer too; "
        "auto: what must", choices=["auto", "none", "activations", "parameters"], default="auto")
    add("--shard_size", "GPUs that share one copy of the model, such as those of a node; 0: all",
        type=int, default=0)
    add("--compile", "torch.compile each block (for GPUs)", action="store_true")
    add("--save_steps", "steps from checkpoint to checkpoint", type=int, default=100)
    add("--keep_checkpoints", "newest checkpoints kept", type=int, default=2)
    add("--cache", "folder of the tokenised rows (default: ~/.cache/sky-t1)", type="path")
    add("--dollars_per_gpu_hour", "what the progress bar, run.json and --plan count with",
        type=float, default=2.96)
    add("--plan", "only print what the run would need on 8xH100, 2x8xH200 or A100-40GB: memory, "
        "hours, dollars", metavar="GPUS")
    add("--mfu", "share of the GPUs' peak that --plan counts with", type=float, default=0.35)
    if parser.parse_known_args()[0].model in BUILTIN:
        parser.set_defaults(**BUILTIN_DEFAULTS)
        if any(flag.startswith("--num_train_epochs") for flag in sys.argv):
            parser.set_defaults(max_steps=0)  # else they would cut the epochs short
    args = parser.parse_args()
    check_arguments(args)
    args.end_token = args.end_token or ("<|endoftext|>" if args.as_published else None)
    args.products = args.dtype
    return args


def check_arguments(args):
    """ValueError for a value out of range and for flags that contradict each other."""
    data.check_above_0(args, "num_train_epochs", "batch_size", "max_seq_len", "save_steps",
                       "keep_checkpoints", "learning_rate", "max_grad_norm", "mfu")
    if not 0 <= args.warmup_ratio <= 1 or args.max_steps < 0 or args.shard_size < 0:
        raise ValueError(f"--warmup_ratio {args.warmup_ratio} must be 0 to 1, --max_steps "
                         f"{args.max_steps} and --shard_size {args.shard_size} at least 0")
    if not 0 <= args.seed < 2 ** 32:
        raise ValueError(f"--seed {args.seed}: must be 0 to {2 ** 32 - 1}")
    if args.resume and not args.out:
        raise ValueError("--resume continues the run of a folder: name it with --out")
    if args.offload == "activations" and args.recompute == "none":
        raise ValueError("--offload activations moves what recomputation saves: use --recompute "
                         "block or tiled with it")


# ---------------------------------------------------------------------------------------- processes

def start_processes(deterministic):
    """Joins torchrun's process group, or one of this process alone: rank, world_size, device."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device = data.own_device()
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    # objects and checkpoints' plans travel over gloo; hours, as one rank may fetch 65 GB meanwhile
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(hours=4), **alone)
    return dist.get_rank(), dist.get_world_size(), device


def from_all_ranks(value):
    """Each rank's value, on every rank. A rank that fails before it comes here says why and ends;
    the others hear that it died, and leave the word to it (data.give_up)."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)  # over gloo: NCCL would wait for the dead
    return values


def node_by_node(function, *args):
    """function(*args) on the first rank of each node, which fetches and caches, then on others."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = function(*args) if first else None
    from_all_ranks(None)
    return result if first else function(*args)


def from_rank_0(function, *args):
    """The result of function(*args) on rank 0."""
    return from_all_ranks(function(*args) if dist.get_rank() == 0 else None)[0]


# ------------------------------------------------------------------------- model, memory, optimizer

def memory_estimate(config, max_seq_len, num_ranks, recompute, offload, width=2, device_type="cuda",
                    stays_gathered=False):
    """Bytes a rank needs at its peak, by what they are for: a packed row of max_seq_len tokens, the
    gradients of earlier micro-steps there. `width` is the bytes of a number in matrix products. The
    peak is in the backward pass of the last block, or before it in the loss, whose needs beyond a
    block's are the last line. Each term is what is held then; tests/test_plan.py measures them."""
    C, I = config.hidden_size, config.intermediate_size
    L, T = config.num_hidden_layers, max_seq_len
    kv, embedding = config.head_dim * config.num_key_value_heads, config.vocab_size * C
    block = (config.matmul_parameters - embedding) // L
    parameters = parameter_count(config)

    # saved for the backward pass, bytes a token: a norm's x and result, q, k, v, attention's result
    # by document and joined; gate, up, silu(gate), their product
    norm = 2 * width * C
    if device_type == "cpu":  # no fused kernel: also x / rms, and in bf16 x itself, in fp32
        norm += 4 * C if width == 4 else (4 + 4 - width) * C
    attention, mlp = norm + width * (3 * C + 2 * kv), norm + 4 * width * I
    saved = L * T * {"none": attention + mlp, "block": width * C, "tiled": 2 * width * C}[recompute]
    if recompute != "none" and offload != "none":
        saved = 0

    # this block and the next; and the fp32 gradient on its way: the head's beside the last block,
    # or that block's, whose activations are then gone
    gathered = width * block * (2 if num_ranks > 1 else 1)
    sent = max(0 if config.tie_word_embeddings else 4 * embedding, 4 * block - saved / L)
    if config.tie_word_embeddings:  # whole throughout, and so is its gradient as the head's weight
        gathered += 2 * width * embedding
    if stays_gathered:  # all weights in `width`, all gradients in fp32
        gathered = (4 + width) * parameters + width * embedding * config.tie_word_embeddings
    gathered += sent

    # a block at work, in its MLP (gradients of three (T, I), and of down_proj) or in its attention
    tile = min(T, MLP_TILE) if recompute == "tiled" else T
    in_mlp = tile * 2 * width * I + T * 2 * width * C + width * C * I
    in_attention = T * width * (5 * C + 2 * kv) + width * 3 * C * I
    if recompute != "none":  # and what it saves, computed again
        in_mlp += tile * mlp + (T * attention if recompute == "block" else 0)
        in_attention += T * attention
    work = max(in_mlp, in_attention)

    # logits and their gradient; the weight, its gradient in fp32, and a copy; hidden states
    copy = 0 if width == 4 else width
    loss = (4 + copy) * min(LOSS_CHUNK[device_type], T * config.vocab_size)
    loss += (4 + width + copy) * embedding + T * (norm + 2 * width * C)
    if device_type == "cpu" and width < 4:  # an addition of bf16 to fp32 makes a copy there
        loss += 4 * embedding
    if stays_gathered:
        loss += (4 + width) * parameters - width * embedding

    state = 0 if offload == "parameters" else 4 * parameters / num_ranks
    return {"parameters, fp32": state, "gradients, fp32": 0 if stays_gathered else state,
            "AdamW's moments": 2 * state, "gathered blocks": gathered, "saved activations": saved,
            "a block at work": work, "the loss, beyond it": max(0, loss - gathered - work)}


def parameter_count(config):
    """Weights of all matrices; biases and norms are a ten thousandth more."""
    return config.matmul_parameters + (0 if config.tie_word_embeddings
                                       else config.vocab_size * config.hidden_size)


def stays_gathered(config, world_size, offload, memory):
    """Whether a rank keeps the model whole through a batch, in bf16 with fp32 gradients: one
    gathering and one reduction then serve all its micro-steps."""
    return world_size > 1 and offload == "none" and 6 * parameter_count(config) < 0.1 * memory


def memory_choices(config, args, num_ranks, world_size, available, device_type="cuda"):
    """Every (--recompute, --offload) that the flags allow and memory_estimate of it, dearest in
    memory and cheapest in time first."""
    choices = [("none", "none"), ("block", "none"), ("tiled", "none")]
    if device_type == "cuda":  # a CPU has no other memory to move to
        choices += [("block", "activations"), ("tiled", "activations"), ("block", "parameters"),
                    ("tiled", "parameters")]
    choices = [(r, o) for r, o in choices if args.recompute in ("auto", r)
               and args.offload in ("auto", o)]
    # a pair that only a user asks for
    choices = choices or [(args.recompute.replace("auto", "tiled"), args.offload)]
    width = getattr(torch, args.products).itemsize
    return {(recompute, offload): memory_estimate(
        config, args.max_seq_len, num_ranks, recompute, offload, width, device_type,
        stays_gathered(config, world_size, offload, available)) for recompute, offload in choices}


def choose_memory(config, args, num_ranks, available, device_type="cuda", world_size=None):
    """The first of memory_choices that fits; else the last."""
    choices = memory_choices(config, args, num_ranks, world_size or num_ranks, available,
                             device_type)
    return next((choice for choice, lines in choices.items() if sum(lines.values()) < available),
                list(choices)[-1])


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
    pin = mesh.device_type == "cuda"
    options = dict(
        mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy(pin_memory=pin) if offload_parameters else OffloadPolicy())
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
    """The sharded model, still empty, on the device; and whether it stays gathered in a batch."""
    with torch.device("meta"):
        model = Qwen2(config)
    keep_gathered = stays_gathered(config, mesh.size(), args.offload, memory)
    model.recompute = args.recompute
    model.offload = args.offload != "none" and args.recompute != "none"
    if args.compile:
        for block in model.model.layers:  # its halves, as "tiled" recomputes them one by one
            block.attend, block.transform = (torch.compile(half, dynamic=True)
                                             for half in (block.attend, block.transform))
    shard(model, mesh, getattr(torch, args.products), not keep_gathered,
          args.offload == "parameters")
    model.to_empty(device="cpu" if args.offload == "parameters" else device)
    return model, keep_gathered


def learning_rate_factor(step, warmup_steps, num_steps):
    """Linear warm-up, then half a cosine to 0: transformers' get_cosine_schedule_with_warmup."""
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


# -------------------------------------------------------------------------------------- checkpoints

def training_state(model, optimizer):
    """Every tensor a run consists of, by name: the sharded weights and AdamW's two moments, made if
    not there yet. (The data's order is a function of seed and step; nothing else is random.)"""
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
    """Writes step-N aside, makes it durable, renames it, and only then removes older ones. OSError
    if a rank cannot write; what was there before stays. Collective."""
    path, aside = folder / f"step-{step:06d}", folder / f"step-{step:06d}.tmp"
    from_rank_0(clear_unfinished, folder)
    try:
        dcp.save(training_state(model, optimizer), checkpoint_id=aside)
    except dcp.api.CheckpointException as error:
        from_rank_0(clear_unfinished, folder)
        reason = next(iter(error.failures.values()))[0]
        raise OSError(f"cannot write the checkpoint {path} ({reason}): free some disk, then "
                      "--resume") from None

    def publish():
        write_durably(aside / "state.json",
                      [json.dumps({"step": step, "settings": settings}, indent=2).encode()])
        os.rename(aside, path)
        sync_folder(folder)
        for old in checkpoints(folder)[:-keep]:
            os.rename(old, old.with_suffix(".tmp"))  # killed half-way, it must not look whole
        clear_unfinished(folder)
    from_rank_0(publish)


def clear_unfinished(folder):
    """Removes what a kill left of saves and removals: a save there would mix old files with new."""
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path)


def checkpoints(folder):
    """The complete checkpoints, oldest first."""
    return sorted((p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)),
                  key=lambda p: int(p.name.removeprefix("step-")))


def load_checkpoint(path, model, optimizer, settings):
    """Fills weights and moments, on any number of ranks. Returns the step; ValueError if broken."""
    tensors = training_state(model, optimizer)
    try:
        state = json.loads((path / "state.json").read_text())
        if state["settings"] != settings:
            raise ValueError("its settings are another run's")
        step = int(state["step"])
        dcp.load(tensors, checkpoint_id=path)
    except (OSError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError,
            dcp.api.CheckpointException) as error:
        reason = error
        if isinstance(error, dcp.api.CheckpointException):
            reason = next(iter(error.failures.values()))[0]
        raise ValueError(f"{path} is broken or of another model ({type(reason).__name__}: "
                         f"{str(reason)[:200]}): remove it to continue from an older one") from None
    for parameter in model.parameters():
        optimizer.state[parameter]["step"].fill_(step)
    return step


# ------------------------------------------------------------------------------------ output folder

IDENTITY = ("model", "data", "batch_size", "learning_rate", "num_train_epochs", "max_steps",
            "warmup_ratio", "max_grad_norm", "max_seq_len", "seed", "dtype", "as_published",
            "end_token", "system")


def run_settings(args, model_dir, rows):
    """What makes a run this run. Paths do not: model and data count by content."""
    settings = {name: getattr(args, name) for name in IDENTITY}
    return {**settings, "model": fingerprint(model_dir), "data": rows.digest}


def fingerprint(model_dir):
    """Hash of a model folder's configuration and of its weight files' headers and sizes."""
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


@contextlib.contextmanager
def locked(out, is_fresh=False):
    """Makes the folder (FileExistsError if it is there and must be fresh) and holds its lock, which
    ends with the process at the latest. Then the lock is gone, and so is a folder made for nothing:
    a run refused before its settings are written."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=not is_fresh)
    with open(out / "train.lock", "a") as file:
        data.lock(file, f"--out {out}")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # what holds a run is not empty
                os.unlink(file.name)
                for path in made:
                    path.rmdir()


def claim_folder(args, settings, held):
    """The output folder's name. Before its content is looked at, the folder is locked, for as long
    as `held`, an ExitStack, is open: of two runs at once one is refused, or takes the next default.
    ValueError for a folder in use, for another run's, and for settings changed since."""
    if args.out is None:
        for number in itertools.count(1):
            out = Path(f"out/{Path(args.model.split(':')[-1]).name}-{number}")
            try:
                held.enter_context(locked(out, is_fresh=True))
                return str(out)
            except FileExistsError:
                if not out.exists():  # then it is out/ that is there and no folder
                    raise
    out, file = Path(args.out), Path(args.out) / "settings.json"
    held.enter_context(locked(out))
    if not file.exists():
        # its own, and what a run leaves that was killed as it began
        if {path.name for path in out.iterdir()} - {"train.lock", "settings.json.tmp"}:
            raise ValueError(f"--out {out} is not empty and holds no run of train.py: "
                             "choose another folder")
        return args.out
    if not args.resume:
        raise ValueError(f"--out {out} holds another run: "
                         "choose another folder, or continue it with --resume")
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


def is_finished(out, newest):
    """Whether the exported weights are there, none missing or cut. ValueError if they are not and
    no checkpoint is left that they could be written from."""
    if not (out / "run.json").exists():
        return False
    with contextlib.suppress(OSError, ValueError):
        files = json.loads((out / "run.json").read_text()).get("files", {})
        if all((out / name).stat().st_size == size for name, size in files.items()):
            return True
    if not newest:
        raise ValueError(f"{out} was finished, its weights are missing or cut, and no checkpoint "
                         "is left: restore them, or begin another --out")
    return False


def same_everywhere(settings):
    """ValueError where processes, on several nodes perhaps, see another model or other data."""
    seen = from_all_ranks(settings)
    for rank, other in enumerate(seen):
        if other != seen[0]:
            keys = [k for k in settings if other[k] != seen[0][k]]
            raise ValueError(f"rank {rank} sees another {', '.join(keys)} than rank 0: give "
                             "every node the same files")


class Log:
    """Rank 0's record: metrics.jsonl, every step once; progress bar; tensorboard if installed."""

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
                             "continues: restore it")
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
        seconds = line["seconds"]
        line |= dict(tokens_per_second=line["num_target_tokens"] / seconds,
                     raw_tokens_per_second=line["num_tokens"] / seconds,
                     mfu=flops / (seconds * self.world_size * self.peak) if self.peak else None,
                     world_size=self.world_size, memory_gib=peak_memory(self.device) / 2 ** 30)
        self.lines.append(line)
        shown = dict(loss=f"{line['loss']:.4f}", lr=f"{line['learning_rate']:.2e}",
                     tok_s=f"{line['tokens_per_second']:,.0f}")
        if self.device.type == "cuda":
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
    """FLOP/s in bf16 that this GPU's data sheet names; None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, (tflops, *_) in GPUS.items() if part in name), None)


def check_disk(out, num_parameters, keep, dtype):
    """Warns if the checkpoints to come (one more while it is written) and the export do not fit."""
    checkpoint, export = 12 * num_parameters, dtype.itemsize * num_parameters
    held = sum(f.stat().st_size for f in (out / "checkpoints").rglob("*") if f.is_file())
    needed, free = (keep + 1) * checkpoint + export - held, shutil.disk_usage(out).free
    if needed > free:
        print(f"warning: {out} will need {needed / 1e9:.1f} GB ({keep + 1} checkpoints of "
              f"{checkpoint / 1e9:.1f} GB, export {export / 1e9:.1f} GB), the disk has "
              f"{free / 1e9:.1f} GB free: lower --keep_checkpoints", file=sys.stderr)


def generation_config(model_dir, end_token_id, pad_token_id):
    """The model's generation_config.json (if it has one), changed to stop on the end token."""
    generation, before = data.read_generation_config(model_dir)
    generation["eos_token_id"] = [end_token_id] + [i for i in before if i != end_token_id]
    return generation if pad_token_id is None else {**generation, "pad_token_id": pad_token_id}


def export(out, model, tokenizer, generation, dtype):
    """Writes the Hugging Face folder: weights, configurations, tokenizer. Collective."""
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
    dollars = log.gpu_hours * args.dollars_per_gpu_hour
    run = {"arguments": vars(args), "settings": settings, "config": dataclasses.asdict(config),
           "rows": rows.counts, "num_steps": len(log.lines), "final_loss": log.lines[-1]["loss"],
           "world_size": log.world_size,
           "device": torch.cuda.get_device_name(log.device) if on_gpu else "cpu",
           "gpu_hours": log.gpu_hours if on_gpu else 0.0, "dollars": dollars if on_gpu else 0.0,
           "process_hours": log.gpu_hours,
           "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                        "numpy": np.__version__},
           "git_commit": git.strip() or None, "weights": fingerprint(out),
           "files": {p.name: p.stat().st_size for p in out.glob("model*.safetensors*")}}
    write_durably(out / "run.json", [json.dumps(run, indent=2).encode() + b"\n"])


def draw_loss(path, losses, width=720, height=360, margin=64):
    """The loss curve as an SVG: each step grey, their running mean blue."""
    low, high = min(losses), max(losses)
    high = high if high > low else low + 1

    def points(values):
        return " ".join(f"{margin + i * (width - 2 * margin) / max(1, len(values) - 1):.1f},"
                        f"{margin + (high - v) * (height - 2 * margin) / (high - low):.1f}"
                        for i, v in enumerate(values))
    windows = [losses[max(0, i - 9):i + 1] for i in range(len(losses))]
    smooth = [sum(window) / len(window) for window in windows]
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
        + "".join(f'<text x="{x}" y="{y}">{text}</text>' for x, y, text in labels)
        + "</svg>\n").encode()])


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


def plan_batch(rows, indices, max_seq_len, config, world_size):
    """Packs a batch: [micro_step][rank] -> row numbers; also its target tokens, tokens and
    floating-point operations."""
    lengths = rows.lengths[indices]
    costs = [config.train_flops(int(n)) for n in lengths]
    packed = data.pack(lengths, costs, max_seq_len, world_size)
    packed = [[[int(indices[i]) for i in documents] for documents in ranks] for ranks in packed]
    return packed, int(rows.num_targets[indices].sum()), int(lengths.sum()), sum(costs)


@torch.no_grad()
def held_out_loss(model, rows, args, device):
    """Mean loss over all targets of the rows. Collective."""
    loss = torch.zeros((), device=device)
    for start in range(0, len(rows), args.batch_size):
        batch = np.arange(start, min(start + args.batch_size, len(rows)))
        packed, *_ = plan_batch(rows, batch, args.max_seq_len, model.config, dist.get_world_size())
        loss += forward_backward(model, rows, [ranks[dist.get_rank()] for ranks in packed], 1.0,
                                 device).sum()
    dist.all_reduce(loss)
    # without a backward pass nothing else gives the gathered weights back
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return loss.item() / int(rows.num_targets.sum())


def refuse_step(step, rows, mine, losses, grad_norm):
    """ValueError for a loss or gradient that is not finite, with the rows' names. Collective."""
    names = [rows.where(i) for documents, loss in zip(mine, losses.tolist())
             if not math.isfinite(loss) for i in documents]
    names = [name for several in from_all_ranks(names) for name in several]
    where = f"(gradient norm {grad_norm})"
    if names:
        where = f"on rows {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
    raise ValueError(f"the loss is not finite at step {step} {where}: the step is not taken; mend "
                     "these rows or lower --learning_rate, and begin a run with another --out")


def load_data(args, config, tokenizer):
    """The rows to train on and the held-out ones (or None), checked against the model."""
    loaded = []
    for names in (args.data, args.eval_data):
        rows = names and data.load_rows(names, tokenizer, args.max_seq_len, args.end_token,
                                        args.system, args.as_published, args.cache,
                                        quiet=int(os.environ.get("RANK", 0)) != 0)
        if rows and rows.tokens.max() >= config.vocab_size:
            raise ValueError(f"{', '.join(names)}: token id {rows.tokens.max()} is beyond the "
                             f"model's vocabulary of {config.vocab_size}: is the tokenizer in "
                             f"{args.model} this model's?")
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


def show_held_out(out, tokenizer, count=60, shown=3):
    """Prints how the exported built-in model answers problems it has not seen."""
    from sample import generate  # no training needs it
    model = Qwen2.from_pretrained(out)
    problems = list(data.builtin_problems("heldout", count))
    messages = [[{"role": "user", "content": data.recipe_prompt(p)}] for p in problems]
    prompts = [tokenizer.encode(tokenizer.render(m, add_generation_prompt=True)) for m in messages]
    answers = [tokenizer.decode(ids)
               for ids in generate(model, prompts, 160,
                                   stop_ids=[tokenizer.token_id(tokenizer.end_token)])]
    right = [answer.endswith(p["bare"]) for p, answer in zip(problems, answers)]
    for problem, answer, is_right in list(zip(problems, answers, right))[:shown]:
        print(f"\n{problem['prompt']}\n{answer}   "
              f"[{'right' if is_right else 'wrong, it is ' + problem['bare']}]")
    print(f"\nheld-out problems solved: {sum(right)} of {count} ({sum(right) / count:.0%})")


def shard_size_of(args, world_size):
    """Ranks that share one copy of the model."""
    shard_size = args.shard_size or world_size
    if world_size % shard_size:
        raise ValueError(f"--shard_size {shard_size} does not divide the {world_size} processes")
    return shard_size


def run_length(args, num_rows):
    """Steps of a run."""
    return args.max_steps or args.num_train_epochs * -(-num_rows // args.batch_size)


# ----------------------------------------------------------------------------------------- the plan

def parse_gpus(text):
    """"2x8xH100-80GB" -> nodes 2, GPUs a node 8, "H100", TFLOP/s, GB/s, GiB. Nodes, number and
    memory may be left out. ValueError for what is not in GPUS."""
    parts = re.fullmatch(r"(?:(\d+)x)?(?:(\d+)x)?(.+?)(?:-(\d+)GB)?", text.strip(), re.I)
    if not parts or re.fullmatch(r"[\dx]*", parts[3], re.I) and parts[3] not in GPUS:
        raise ValueError(f"--plan {text}: write it as 8xH100, 2x8xH200 (nodes first) or A100-40GB")
    numbers = [int(n) for n in parts.groups()[:2] if n]
    name = next((n for n in GPUS if n.lower() == parts[3].replace("-", " ").lower()), None)
    if name is None:
        raise ValueError(f"--plan {text}: {parts[3]} is not in the table of GPUs: "
                         f"{', '.join(GPUS)}")
    tflops, link, sizes = GPUS[name]
    size = int(parts[4]) if parts[4] else next(iter(sizes))
    if size not in sizes or 0 in numbers:
        raise ValueError(f"--plan {text}: there is no such {name}; it comes with "
                         f"{' or '.join(f'{n} GB' for n in sizes)}, in numbers above 0")
    nodes, gpus = ([1, 1] + numbers)[-2:]
    return nodes, gpus, f"{name} {size} GB", tflops, link, sizes[size]


def plan_data(rows, args, config, num_steps, world_size, most=40):
    """The batches of a run, all counted and `most` of them, evenly spread, really packed: a dict of
    the run's flops and tokens, and of means over the packed steps."""
    costs = [config.train_flops(n) for n in rows.lengths.tolist()]  # integers: exact sums
    flops, tokens, micro_steps, filled, imbalance = 0, 0, [], [], []
    packed_steps = {i * num_steps // min(most, num_steps) for i in range(most)}
    for step in range(num_steps):
        batch = data.batch_indices(len(rows), args.batch_size, args.seed, step)
        flops += sum(costs[i] for i in batch)
        tokens += int(rows.lengths[batch].sum())
        if step in packed_steps:
            packed, *_ = plan_batch(rows, batch, args.max_seq_len, config, world_size)
            micro_steps.append(len(packed))
            filled.append(rows.lengths[batch].sum() / len(packed) / world_size / args.max_seq_len)
            imbalance.append(data.imbalance(packed, costs))
    return dict(flops=flops, tokens=tokens, micro_steps=np.mean(micro_steps),
                filled=np.mean(filled), imbalance=np.mean(imbalance), packed_steps=len(micro_steps))


def executed_flops(config, flops, tokens, recompute):
    """With the blocks' second forward pass, a third of theirs; the loss is not computed again."""
    if recompute == "none":
        return flops
    return flops * 4 / 3 - 2 * config.vocab_size * config.hidden_size * tokens


def step_traffic(config, world_size, shard_size, gpus, link, exchanges, width):
    """[(what, bytes a GPU sends in a step, GB/s, over what)]. `exchanges` is how often a step
    gathers and reduces: once a micro-step, or once. A ring of n passes on (n - 1) / n of what it
    gathers or reduces, twice that where it does both."""
    def over(size):
        return (link, "inside a node") if size <= gpus else (NETWORK, "between nodes")
    n, replicas, parameters = shard_size, world_size // shard_size, parameter_count(config)
    traffic = [("2 all-gathers of weights", 2 * width * parameters * (n - 1) / n, *over(n)),
               ("reduce-scatter of gradients, fp32", 4 * parameters * (n - 1) / n, *over(n))]
    if replicas > 1:
        traffic.append(("all-reduce over copies, fp32", 2 * (replicas - 1) / replicas * 4
                        * parameters / n, *over(world_size)))
    return [(what, exchanges * size, *rest) for what, size, *rest in traffic]


def host_memory(config, args, gpus, num_ranks, recompute, offload):
    """[(what, bytes)] that a run puts into the memory of a node."""
    def pinned(size):  # PyTorch rounds pinned memory up to powers of two
        return 2 ** math.ceil(math.log2(size))
    width, T, C = getattr(torch, args.dtype).itemsize, args.max_seq_len, config.hidden_size
    held = []
    if offload != "none" and recompute != "none":
        block = pinned(T * C * width) + 2 * pinned(T * config.head_dim * width)  # x, cos, sin
        if recompute == "tiled":
            block += -(-T // MLP_TILE) * pinned(min(T, MLP_TILE) * C * width)
        held.append(("inputs of recomputation, pinned", gpus * config.num_hidden_layers * block))
    if offload == "parameters":
        held.append(("parameters, gradients and moments",
                     gpus * 16 * parameter_count(config) / num_ranks))
    return held + [("the export's largest tensor", width * config.vocab_size * C)]


def print_memory(choices, chosen, total):
    """Choices as columns, what memory is for as rows. `total` is the device's bytes."""
    def row(name, cells):
        cells = [c if isinstance(c, str) else f"{c / 2 ** 30:.1f}" for c in cells]
        print((f"{name:27}" + "".join(f"{cell:>10}" for cell in cells)).rstrip())
    reserve = (1 - MEMORY_SHARE["cuda"]) * total  # CUDA, NCCL, what the allocator cannot use
    sums = [sum(lines.values()) + reserve for lines in choices.values()]
    row("GiB a GPU, at its peak", [])
    row("  --recompute", [recompute for recompute, _ in choices])
    row("  --offload", [{"activations": "activat.", "parameters": "param."}.get(offload, offload)
                        for _, offload in choices])
    for name in next(iter(choices.values())):
        row("  " + name, [lines[name] for lines in choices.values()])
    row(f"  reserve, {1 - MEMORY_SHARE['cuda']:.0%} of the GPU", [reserve] * len(sums))
    row("  sum", sums)
    row(f"  fits into {total / 2 ** 30:.1f}",
        ["no" if size >= total else "chosen" if choice == chosen else "yes"
         for choice, size in zip(choices, sums)])


def print_input(args, rows, config, num_steps, plan):
    """Model, rows, steps, and how the packing of plan_data came out."""
    print(f"{args.model}: {parameter_count(config) / 1e9:.2f} B parameters, {args.dtype} products\n"
          f"{len(rows):,} rows, {rows.lengths.sum():,} tokens, {rows.num_targets.sum():,} of them "
          f"targets; mean {rows.lengths.mean():,.0f} tokens, longest {rows.lengths.max():,}\n"
          f"{num_steps:,} steps of up to {args.batch_size} rows; {plan['micro_steps']:.2f} packed "
          f"rows a GPU and step (micro-steps), {plan['filled']:.0%} of\n  {args.max_seq_len:,} "
          f"tokens full, the dearest GPU {plan['imbalance']:.3f} of the mean "
          f"({plan['packed_steps']} steps packed)\n")


def print_cost(args, config, plan, num_steps, recompute, traffic, world_size, tflops):
    """Time and money at --mfu, beside what a step sends and what the published run took."""
    executed = executed_flops(config, plan["flops"], plan["tokens"], recompute)
    hours = plan["flops"] / (world_size * tflops * 1e12 * args.mfu) / 3600
    dollars = hours * world_size * args.dollars_per_gpu_hour
    print(f"\na step: {plan['flops'] / num_steps:.2e} FLOP, {executed / num_steps:.2e} with what "
          f"is computed again: {hours * 3600 / num_steps:.1f} s at an MFU\n  of {args.mfu:.0%}; a "
          "GPU sends meanwhile, at the full speed of its links")
    for what, size, speed, where in traffic:
        print(f"    {what:34}{size / 1e9:9.2f} GB{size / 1e9 / speed:8.2f} s at {speed} GB/s "
              f"{where}")
    print(f"the run: {plan['flops']:.2e} FLOP, {hours:.2f} hours, {hours * world_size:.1f} "
          f"GPU-hours, {dollars:,.2f} dollars at {args.dollars_per_gpu_hour} an hour\n"
          f"  An MFU of {args.mfu:.0%} is assumed (--mfu), not measured here; torchtitan reports "
          "33 to 39 %\n  for FSDP of an 8B on H100. Loading, saving and export are not counted.")
    same_count = plan["flops"] / (PUBLISHED["gpu_hours"] * 3600 * GPUS["H100"][0] * 1e12)
    print("Sky-T1-32B-Preview: 19 h, 152 GPU-hours, 450 dollars as published"
          + (f", {same_count:.1%} MFU by this count"
             if 0.8 < plan["flops"] / PUBLISHED["flops"] < 1.25 else ""))


def print_plan(args):
    """Prints what the run of these flags would need on the GPUs of --plan, from config.json and the
    data's lengths alone. ValueError, after the table, if it does not fit."""
    nodes, gpus, name, tflops, link, gib = parse_gpus(args.plan)
    world_size, total = nodes * gpus, gib * 2 ** 30
    shard_size = shard_size_of(args, world_size)
    model_dir = data.find_model(args.model, weights=False)
    config, tokenizer = Qwen2Config.from_pretrained(model_dir), data.load_tokenizer(model_dir)
    data.check_against_model(args, config, tokenizer)
    rows, _ = load_data(args, config, tokenizer)
    num_steps = run_length(args, len(rows))
    plan = plan_data(rows, args, config, num_steps, world_size)
    memory = MEMORY_SHARE["cuda"] * total
    choices = memory_choices(config, args, shard_size, world_size, memory)
    recompute, offload = choose_memory(config, args, shard_size, memory, world_size=world_size)

    print(f"\n{world_size} x {name}" + (f" in {nodes} nodes of {gpus}" if nodes > 1 else "")
          + f" ({gib} GiB, {tflops} TFLOP/s dense bf16 each)"
          + (f", {shard_size} share a copy" if shard_size < world_size else ""))
    print_input(args, rows, config, num_steps, plan)
    print_memory(choices, (recompute, offload), total)
    for what, size in host_memory(config, args, gpus, shard_size, recompute, offload):
        print(f"host memory of a node, {what}: {size / 2 ** 30:.1f} GiB")
    once = stays_gathered(config, world_size, offload, memory)
    traffic = step_traffic(config, world_size, shard_size, gpus, link,
                           1 if once else plan["micro_steps"], getattr(torch, args.dtype).itemsize)
    print_cost(args, config, plan, num_steps, recompute, traffic, world_size, tflops)
    missing = min(sum(lines.values()) for lines in choices.values()) - memory
    if missing >= 0:
        raise ValueError(f"{args.plan} does not fit: the leanest of these choices lacks "
                         f"{missing / 2 ** 30:.1f} GiB a GPU; take more GPUs, a lower "
                         "--max_seq_len, or --recompute auto --offload auto")


def train(args, held):
    """One run: processes, input, model, output folder, the loop, the finished folder. `held` is an
    ExitStack, which lets the folder go."""
    # 1. processes
    rank, world_size, device = start_processes(args.deterministic)
    shard_size = shard_size_of(args, world_size)
    mesh = init_device_mesh(device.type, (world_size // shard_size, shard_size),
                            mesh_dim_names=("replicate", "shard"))
    mesh = mesh if shard_size < world_size else mesh["shard"]
    say = print if rank == 0 else lambda *_: None
    if device.type == "cpu" and args.dtype == "bfloat16" and not cpu_multiplies_bf16():
        args.products = "float32"
        say("this CPU has no bf16 arithmetic: products in float32, the export in bfloat16")

    # 2. input: what a user can get wrong is refused here, before anything is created
    model_dir = node_by_node(data.find_model, args.model)
    config = Qwen2Config.from_pretrained(model_dir)
    tokenizer = data.load_tokenizer(model_dir)
    data.check_against_model(args, config, tokenizer)
    rows, eval_rows = node_by_node(load_data, args, config, tokenizer)
    settings = run_settings(args, model_dir, rows)
    same_everywhere({**settings, "products": args.products})
    args.out = from_rank_0(claim_folder, args, settings, held)
    out = Path(args.out)
    newest = from_rank_0(checkpoints, out / "checkpoints")[-1:]
    if from_rank_0(is_finished, out, newest):
        say(f"{out} is finished: nothing to do")
        return
    end_token_id = tokenizer.token_id(args.end_token or tokenizer.end_token)
    generation = generation_config(model_dir, end_token_id, tokenizer.pad_token_id)
    num_steps = run_length(args, len(rows))
    warmup_steps = math.ceil(args.warmup_ratio * num_steps)

    # 3. model and optimizer
    memory = torch.tensor(available_memory(device), dtype=torch.float64, device=device)
    dist.all_reduce(memory, dist.ReduceOp.MIN)  # all ranks must choose alike
    memory = memory.item()
    args.recompute, args.offload = choose_memory(config, args, shard_size, memory, device.type,
                                                 world_size)
    model, keep_gathered = build_model(args, config, mesh, device, memory)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=0.0, fused=True)
    if model_dir in BUILTIN:
        init_weights(model, args.seed)
    elif not newest:
        load_weights(model, model_dir)

    # 4. output folder, resume
    from_all_ranks(None)  # all have loaded theirs
    from_rank_0(write_durably, out / "settings.json", [json.dumps(settings, indent=2).encode()])
    step = load_checkpoint(newest[0], model, optimizer, settings) if newest else 0
    if args.resume:
        say(f"resuming {out} at step {step}" if newest
            else f"{out} has no checkpoint yet: starting from the beginning")
    num_parameters = sum(p.numel() for p in model.parameters())
    say(json.dumps({**vars(args), "num_parameters": num_parameters, "world_size": world_size,
                    "num_steps": num_steps, "warmup_steps": warmup_steps, "rows": rows.counts,
                    "tokens": int(rows.lengths.sum())}, indent=2))
    log = Log(out, args, step, num_steps, world_size, device) if rank == 0 else None
    from_rank_0(check_disk, out, num_parameters, args.keep_checkpoints, getattr(torch, args.dtype))

    # 5. the loop
    interrupt, stop = Interrupt(), False
    while step < num_steps and not stop:
        start = time.perf_counter()
        batch = data.batch_indices(len(rows), args.batch_size, args.seed, step)
        packed, num_targets, num_tokens, flops = plan_batch(rows, batch, args.max_seq_len, config,
                                                            world_size)
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
        if saving and eval_rows is not None and not stop:  # stopped: little time may be left
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
            print(f"\nnext: python data.py builtin:worked --model {out}    (its rows)\n"
                  "      python train.py --model DIR --data rows.jsonl    (a model of your own)")


def main():
    """What a run would need, or the run."""
    args = parse_arguments()
    if args.plan is not None:
        return print_plan(args)
    with contextlib.ExitStack() as held:
        train(args, held)


if __name__ == "__main__":
    data.run(main, "try --recompute tiled --offload activations, --offload parameters, more GPUs, "
                   "or a lower --max_seq_len", "continue with --resume")
