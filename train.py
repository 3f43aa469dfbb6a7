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

In this file: the flags; main, with the loop; then what main calls, in its order: processes, the
sharded model, the parts of a step, checkpoints, settings, output folder, what a run tells; and last
--plan, which predicts memory and cost. A row is one example of the data; a packed row is several of
them, one after the other, that one rank computes in one micro-step.

Sources: the recipe of Sky-T1 (novasky-ai.github.io/posts/sky-t1); transformers' cosine schedule;
AdamW (arXiv 1711.05101); FSDP (2304.11277). Limits: data parallel only.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import threading
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
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy,
                                    OffloadPolicy, fully_shard)
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import data
from model import (BUILTIN, LOSS_CHUNK, MLP_TILE, Qwen2, atomic_write, barrier, check_weights,
                   gathered, init_weights, load_weights, sync, write_json)
from sample import answer_heldout

RECIPE = dict(data=["NovaSky-AI/Sky-T1_data_17k"], num_train_epochs=3, max_steps=0, batch_size=96,
              learning_rate=1e-5, dtype="bfloat16", system="skyt1")
BUILTIN_RECIPE = dict(data=["builtin:worked"], num_train_epochs=1, max_steps=500, batch_size=32,
                      learning_rate=2e-3, dtype="float32", system="none")
# By preference; none holds T x T scores. Flash needs no plan for each length, as cuDNN does.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only


# ------------------------------------------------------------------------------------- command line

def parse_arguments():
    """The flags; those not given have the recipe's values, or the built-in model's own."""
    its_own = "\n    ".join(f"{name} {value}" for name, value in BUILTIN_RECIPE.items())
    parser = data.ArgumentParser(
        description="Fine-tunes a Qwen2. The defaults are the recipe of Sky-T1-32B-Preview;\n"
                    f"builtin:tiny has its own:\n    {its_own}")

    def add(name, help, **options):
        recipe = RECIPE.get(name.removeprefix("--"))
        parser.add(name, help if recipe is None else f"{help} (default: {recipe})", **options)
    add("--model", "folder in Hugging Face layout, hub name, or builtin:tiny",
        default="builtin:tiny", type="path")
    add("--data", "files, hub data sets, builtin:worked, builtin:bare", nargs="+", type="path")
    data.add_selection(add)
    add("--eval_data", "held-out rows: their loss is measured at each save", nargs="+",
        type="path")
    add("--out", "output folder, then itself a --model (default: a fresh one under out/)",
        type="path")
    add("--resume", "continue the run in --out from its newest checkpoint", action="store_true")
    add("--num_train_epochs", "passes over the data", type="count")
    add("--max_steps", "length of the run in steps, instead of epochs; 0: epochs", type="whole")
    add("--batch_size", "examples of one step, whatever the number of GPUs", type="count")
    add("--learning_rate", "its peak", type="positive")
    add("--warmup_ratio", "share of the steps in which it rises; then a cosine to 0", type="share",
        default=0.1)
    add("--max_grad_norm", "gradients are clipped to this norm", type="positive", default=1.0)
    add("--max_seq_len", "tokens of a packed row; longer examples are dropped and counted "
        f"(default: {data.MAX_SEQ_LEN}, or the model's positions if fewer)", type="count")
    add("--as_published", "the original's data: duplicates kept, long rows truncated, "
        "<|endoftext|>", action="store_true")
    add("--end_token", "end of an assistant's turn (default: the chat template's)")
    add("--system", "system prompt of kept samples: skyt1, qwq, none, or a text")
    add("--dtype", "of exported weights and of matrix products (float32 where a CPU lacks bf16)",
        choices=["bfloat16", "float32"])
    add("--seed", "of the order of the data (and of builtin:tiny's weights)", type="seed",
        default=42)
    add("--deterministic", "the same bits on each run on a GPU too, slower", action="store_true")
    add("--recompute", "activation checkpointing: none; block: all but a block's input is computed "
        f"again; tiled: and the MLP {MLP_TILE} tokens at a time; auto: the first that fits",
        choices=["auto", "none", "block", "tiled"], default="auto")
    add("--offload", "to host memory: recomputation's inputs, or parameters and optimizer too; "
        "auto: what must", choices=["auto", "none", "activations", "parameters"], default="auto")
    add("--shard_size", "GPUs that share one copy of the model, such as those of a node; 0: all",
        type="whole", default=0)
    add("--compile", "torch.compile each block (for GPUs)", action="store_true")
    add("--save_steps", "steps from checkpoint to checkpoint", type="count", default=100)
    add("--keep_checkpoints", "newest checkpoints kept", type="count", default=2)
    add("--cache", "folder of the tokenised rows (default: ~/.cache/sky-t1)", type="path")
    add("--dollars_per_gpu_hour", "what run.json and --plan count with (default: 2.96 on an H100)",
        type="positive")
    add("--plan", "only print what the run would need on 8xH100, 2x8xH200 or A100-40GB: memory, "
        "hours, dollars", metavar="GPUS")
    add("--mfu", "share of the GPUs' peak that --plan counts with (default: 0.40, as measured, on "
        "an H200, else 0.35)", type="positive")
    parsed = vars(parser.parse_args())
    given = {name: value for name, value in parsed.items() if value is not None}
    defaults = dict(BUILTIN_RECIPE if given["model"] in BUILTIN else RECIPE)
    if "num_train_epochs" in given:
        defaults["max_steps"] = 0  # else the built-in model's would cut the epochs short
    if given["as_published"]:
        defaults["end_token"] = "<|endoftext|>"
    args = argparse.Namespace(**parsed | defaults | given)
    if args.resume and not args.out:
        raise ValueError("--resume continues the run of a folder: name it with --out")
    if args.offload == "activations" and args.recompute == "none":
        raise ValueError("--offload activations moves what recomputation saves: use --recompute "
                         "block or tiled with it")
    return args


# ----------------------------------------------------------------------------------- main, the loop

def main():
    """One run, from its flags to the finished folder; or with --plan what it would need."""
    args = parse_arguments()
    if args.plan is not None:
        return print_plan(args)

    # 1. processes
    rank, world_size, device = start_processes(args.deterministic)
    mesh = build_mesh(device, world_size, shard_size_of(args, world_size))
    say = print if rank == 0 else lambda text: None
    slow_bf16 = device.type == "cpu" and not data.cpu_multiplies_bf16()
    compute_dtype = torch.float32 if slow_bf16 else getattr(torch, args.dtype)

    # 2. input: what a user can get wrong is refused here, before anything is created
    if args.out is not None:
        check_folder(Path(args.out), args.resume)
    with local_rank_0_first():  # it fetches and tokenises; the others find that done
        model_dir, config, tokenizer, max_seq_len, rows = data.load_input(args)
        eval_rows = args.eval_data and data.rows_for_model(args.eval_data, args, config, tokenizer,
                                                           max_seq_len)
    generation = generation_config(model_dir, tokenizer, args.end_token)
    num_steps = run_length(args, len(rows))
    warmup_steps = math.ceil(args.warmup_ratio * num_steps)
    stop_ids = generation["eos_token_id"]
    is_lesson = args.model in BUILTIN and all(name.startswith("builtin:") for name in args.data)

    # 3. model, still empty; output folder; optimizer; weights, or the checkpoint to resume from
    memory = min(gathered(available_memory(device)))  # all ranks must choose alike
    choices = memory_choices(args, config, max_seq_len, compute_dtype, device.type, world_size)
    recompute, offload = choose_memory(choices, memory)
    reshard = reshard_after_forward(config, world_size, offload)
    model = build_model(config, mesh, compute_dtype, recompute, offload, reshard, args.compile)
    stored = {} if args.model in BUILTIN else check_weights(model, model_dir)
    identity = run_identity(args, config, stored, rows, max_seq_len)
    here = identity, compute_dtype
    if broadcast(here) != here:
        raise ValueError(f"rank {rank} sees another model, other data, or another kind of CPU than "
                         "rank 0: give every node the same")
    # rank 0 alone looks at the folder, and tells the others
    lock, *claimed = claim_folder(args, identity, model) if rank == 0 else [None]
    out, newest, finished = broadcast(claimed)
    if finished:
        say(f"{out} is finished: nothing to do")
        return release(lock)
    model.to_empty(device="cpu" if offload == "parameters" else device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=0.0, fused=True)
    step = 0
    if newest is not None:
        step = load_checkpoint(newest, model, optimizer)
    elif args.model in BUILTIN:
        init_weights(model, args.seed)
    else:
        load_weights(model, model_dir)

    # 4. settings, log, and the first screen
    settings = dict(
        identity=identity, arguments=vars(args), world_size=world_size, device=device_name(device),
        compute_dtype=str(compute_dtype).removeprefix("torch."), recompute=recompute,
        offload=offload, num_parameters=sum(p.numel() for p in model.parameters()),
        num_steps=num_steps, warmup_steps=warmup_steps, rows=rows.counts,
        tokens=int(rows.lengths.sum()), torch=torch.__version__)
    if rank == 0:
        write_json(out / "settings.json", settings)
        check_disk(out, settings["num_parameters"], args.keep_checkpoints, args.dtype)
        print_start(settings, out, step)
        log = Log(out, step, settings, device)
    barrier()

    # 5. the loop: one optimizer step a turn
    costs = config.train_flops(rows.lengths.astype(float))  # FLOP of each example
    interrupted, stop = threading.Event(), False
    for number in (signal.SIGINT, signal.SIGTERM):  # the step in hand is finished, and saved
        signal.signal(number, lambda *_: interrupted.set())
    while step < num_steps and not stop:
        start = time.perf_counter()
        # the batch, and of its packed rows this rank's, one for each micro-step
        batch = data.batch_indices(len(rows), args.batch_size, args.seed, step)
        micro_batches = pack_for_rank(rows, batch, costs, max_seq_len)
        num_targets = int(rows.num_targets[batch].sum())

        # Losses are summed, and divided once by the targets of the whole batch. (FSDP averages
        # gradients over the ranks: times world_size they are summed too.)
        losses = forward_backward(model, rows, micro_batches, world_size / num_targets, device,
                                  reshard)
        total = torch.stack([losses.sum(), losses.new_tensor(interrupted.is_set())])
        dist.all_reduce(total)
        loss, stop = total[0].item() / num_targets, total[1].item() > 0
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        grad_norm = grad_norm.full_tensor().item()
        if not math.isfinite(loss + grad_norm):
            refuse_step(step, rows, micro_batches, losses, grad_norm)

        learning_rate = get_lr(step, args.learning_rate, warmup_steps, num_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()

        metrics = dict(step=step, loss=loss, learning_rate=learning_rate, grad_norm=grad_norm,
                       num_target_tokens=num_targets, num_tokens=int(rows.lengths[batch].sum()),
                       flops=costs[batch].sum(), micro_steps=len(micro_batches),
                       seconds=time.perf_counter() - start)
        step += 1
        saving = step % args.save_steps == 0 or step == num_steps or stop
        if saving and eval_rows and not stop:  # stopped: little time may be left
            metrics["eval_loss"] = evaluate(model, eval_rows, args.batch_size, max_seq_len, device)
        if saving and is_lesson and not stop:
            metrics["solved"] = share_solved(model, tokenizer, stop_ids, device)
        if rank == 0:
            log.write(metrics)
        if saving:
            save_checkpoint(out / "checkpoints", model, optimizer, step, args.keep_checkpoints)

    # 6. the finished folder
    if rank == 0:
        log.close()
    if step < num_steps:
        say(f"interrupted: step {step} of {num_steps} is saved; continue with\n"
            f"    {resume_command(args, out)}")
        return release(lock)
    export(model, out, tokenizer, rows, generation, getattr(torch, args.dtype))
    if rank == 0:
        write_results(out, settings, log.lines, price_of(args, settings["device"]))
        answers = (answer_heldout(Qwen2.from_pretrained(out), tokenizer, stop_ids, 60)
                   if is_lesson else [])
        print_end(out, args, answers)
    release(lock)


def run_length(args, num_rows):
    """Optimizer steps of a run."""
    return args.max_steps or args.num_train_epochs * -(-num_rows // args.batch_size)


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


def shard_size_of(args, world_size):
    """Ranks that share one copy of the model."""
    shard_size = args.shard_size or world_size
    if world_size % shard_size:
        raise ValueError(f"--shard_size {shard_size} does not divide the {world_size} processes")
    return shard_size


def build_mesh(device, world_size, shard_size):
    """The ranks as (copies of the model, ranks that share a copy), or all of them as one copy."""
    mesh = init_device_mesh(device.type, (world_size // shard_size, shard_size),
                            mesh_dim_names=("replicate", "shard"))
    return mesh if shard_size < world_size else mesh["shard"]


def broadcast(value):
    """The value that rank 0 has, on every rank."""
    return gathered(value)[0]


@contextlib.contextmanager
def local_rank_0_first():
    """The body runs on the first process of each node, then on the others."""
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not is_first:
        barrier()
    yield
    if is_first:
        barrier()


# ------------------------------------------------------------------------------- the sharded model

def build_model(config, mesh, compute_dtype, recompute, offload, reshard, compiles=False):
    """The model on the meta device, where nothing is allocated yet, cut up by FSDP: each block, the
    embedding, and norm with head are gathered, used and let go one by one. Weights stay fp32 in
    their slices, are gathered in compute_dtype, and their gradients are summed in fp32.
    reshard=False keeps gathered weights from one micro-step to the next."""
    with torch.device("meta"):
        model = Qwen2(config)
    model.recompute = recompute
    model.offload = offload != "none" and recompute != "none"
    layers = model.model.layers
    if compiles:
        for block in layers:  # its halves, as "tiled" recomputes them one by one
            block.attend = torch.compile(block.attend, dynamic=True)
            block.feed_forward = torch.compile(block.feed_forward, dynamic=True)
    policy = OffloadPolicy()
    if offload == "parameters":
        policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    shard = functools.partial(
        fully_shard, mesh=mesh, offload_policy=policy,
        mp_policy=MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32))
    for block in layers:
        shard(block, reshard_after_forward=reshard)
    # tied: both ends need the embedding, which then stays with the root
    if not config.tie_word_embeddings:
        shard(model.model.embed_tokens, reshard_after_forward=reshard)
        shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    shard(model)
    return model


# ------------------------------------------------------------------------------ the parts of a step

def pack_for_rank(rows, batch, costs, max_seq_len):
    """Packs a batch (row numbers) into packed rows of at most max_seq_len tokens; every rank gets
    as many of them. Returns this rank's: for each micro-step an array of row numbers, which may be
    empty (data.assemble makes a token without a target of it)."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    row_of = data.pack(rows.lengths[batch], costs[batch], max_seq_len, world_size)
    num_micro_steps = row_of.max() // world_size + 1
    return [batch[row_of == k * world_size + rank] for k in range(num_micro_steps)]


def forward_backward(model, rows, micro_batches, scale, device, reshard=True):
    """Adds up the gradients of scale * loss over this rank's packed rows, one a micro-step (no
    gradients under no_grad). Returns each row's loss, summed over its targets: (micro-steps,) fp32.
    With reshard=False weights are gathered and gradients reduced once for all micro-steps."""
    losses = []
    with sdpa_kernel(ATTENTION, set_priority=True):
        for micro_step, examples in enumerate(micro_batches, 1):
            if not reshard:
                is_last = micro_step == len(micro_batches)
                model.set_requires_gradient_sync(is_last)
                model.set_reshard_after_backward(is_last)
            input_ids, targets, lengths = data.assemble(rows, examples)
            input_ids, targets = (torch.from_numpy(t).to(device, non_blocking=True)
                                  for t in (input_ids, targets))  # (1, T) each
            loss = model(input_ids, targets, lengths)
            if torch.is_grad_enabled():
                (loss * scale).backward()
            losses.append(loss.detach())
            if device.type == "cpu" and MALLOC_TRIM is not None:
                # gives back what glibc keeps of freed tensors: half a GiB for a model of 135M
                MALLOC_TRIM(0)
    return torch.stack(losses)


def refuse_step(step, rows, micro_batches, losses, grad_norm):
    """ValueError for a loss or gradient that is not finite, with the rows' names. Collective."""
    mine = [rows.where(i) for examples, loss in zip(micro_batches, losses.tolist())
            if not math.isfinite(loss) for i in examples]
    names = [name for theirs in gathered(mine) for name in theirs]
    where = f"on rows {', '.join(names[:8])}" if names else f"(gradient norm {grad_norm})"
    raise ValueError(f"the loss is not finite at step {step} {where}: the step is not taken; fix "
                     "these rows or lower --learning_rate, and begin a run with another --out")


def get_lr(step, peak, warmup_steps, num_steps):
    """Linear warm-up, then half a cosine to 0: transformers' get_cosine_schedule_with_warmup."""
    if step < warmup_steps:
        return peak * (step / warmup_steps)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def evaluate(model, rows, batch_size, max_seq_len, device):
    """Mean loss over all targets of the held-out rows. Collective."""
    costs = model.config.train_flops(rows.lengths.astype(float))
    total = torch.zeros((), device=device)
    for start in range(0, len(rows), batch_size):
        batch = np.arange(start, min(start + batch_size, len(rows)))
        micro_batches = pack_for_rank(rows, batch, costs, max_seq_len)
        total += forward_backward(model, rows, micro_batches, 1.0, device).sum()
    dist.all_reduce(total)
    for module in model.modules():  # what a backward pass would give back
        if isinstance(module, FSDPModule):
            module.reshard()
    return total.item() / int(rows.num_targets.sum())


def share_solved(model, tokenizer, stop_ids, device):
    """Share of thirty held-out problems that the built-in model solves, which is small enough to be
    whole on each rank. Collective."""
    whole = Qwen2(model.config).to(device)
    whole.load_state_dict({name: t.full_tensor() for name, t in model.state_dict().items()})
    answers = answer_heldout(whole, tokenizer, stop_ids, 30)
    return sum(answer.is_right for answer in answers) / len(answers)


# -------------------------------------------------------------------------------------- checkpoints

def training_state(model, optimizer):
    """Every tensor a run consists of: the sharded weights and AdamW's moments, made if not there
    yet. (The data's order is a function of seed and step; nothing else is random.)"""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def save_checkpoint(folder, model, optimizer, step, keep):
    """Writes step-N under another name, durably, renames it, and only then removes older ones.
    ValueError if a rank cannot write; what was there before stays. Collective."""
    path = folder / f"step-{step:06d}"
    tmp = path.with_suffix(".tmp")
    with explained(f"cannot write {path}", "free some disk, then --resume"):
        dcp.save(training_state(model, optimizer), checkpoint_id=tmp)
    if dist.get_rank() == 0:
        sync(tmp)
        os.rename(tmp, path)
        sync(folder)
        for old in checkpoints(folder)[:-keep]:
            os.rename(old, old.with_suffix(".tmp"))  # killed half-way, it must not look whole
        clear_unfinished(folder)
    barrier()


@contextlib.contextmanager
def explained(what, remedy):
    """Says in one line why reading or writing a checkpoint failed on some rank."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        (reason, _), *_ = error.failures.values()
        raise ValueError(f"{what} ({reason!r}): {remedy}") from None


def clear_unfinished(folder):
    """Removes what is left of a save or a removal that did not come to its end."""
    for path in folder.glob("*.tmp"):
        shutil.rmtree(path)


def checkpoints(folder):
    """The complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if not path.suffix)


def load_checkpoint(path, model, optimizer):
    """Fills weights and moments, on any number of ranks. Returns the step. ValueError if it is
    broken, or was written by a version before this one."""
    state = training_state(model, optimizer)
    with explained(f"{path} is broken or of another model",
                   "remove it to continue from an older one"):
        dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"])
    return int(path.name.removeprefix("step-"))


# ----------------------------------------------------------------------------------------- settings

def generation_config(model_dir, tokenizer, end_token):
    """The model's generation_config.json (if it has one), changed to stop on the end token."""
    generation, before = data.read_generation_config(model_dir)
    end = tokenizer.token_id(end_token or tokenizer.end_token)
    generation["eos_token_id"] = [end] + [i for i in before if i != end]
    if tokenizer.pad_token_id is not None:
        generation["pad_token_id"] = tokenizer.pad_token_id
    return generation


def run_identity(args, config, stored, rows, max_seq_len):
    """What makes a run this run. Paths do not: model and data count by what they are. Of `stored`
    weights the last norm is taken, which no two trainings have alike."""
    names = ("batch_size", "learning_rate", "num_train_epochs", "max_steps", "warmup_ratio",
             "max_grad_norm", "seed", "dtype", "as_published", "end_token", "system")
    norm = stored["model.norm.weight"][:].tolist() if stored else []
    return {name: getattr(args, name) for name in names} | {
        "max_seq_len": max_seq_len, "data": rows.digest, "model": dataclasses.asdict(config),
        "weights": hashlib.sha256(str(norm).encode()).hexdigest()[:16]}


# ------------------------------------------------------------------------------------ output folder

def claim_folder(args, identity, model):
    """For rank 0: lock (an open file) and name of the output folder, its newest checkpoint or None,
    and whether its run is finished. Of two runs at once one is refused, or takes the next default
    name. ValueError as of check_identity and is_finished, and for a folder in use."""
    if args.out is None:
        name = Path(args.model.split(":")[-1]).name
        Path("out").mkdir(exist_ok=True)
        for number in itertools.count(1):
            out = Path(f"out/{name}-{number}")
            with contextlib.suppress(FileExistsError):
                out.mkdir()
                break
    else:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        check_identity(out / "settings.json", identity)
    lock = open(out / "train.lock", "a")
    data.lock(lock, f"--out {out}")
    clear_unfinished(out / "checkpoints")
    newest = max(checkpoints(out / "checkpoints"), default=None)
    return lock, out, newest, is_finished(out, model, newest)


def release(lock):
    """Lets a claimed folder go. Ranks but the first have nothing to let go."""
    if lock is not None:
        Path(lock.name).unlink(missing_ok=True)
        lock.close()


def check_folder(out, resume):
    """ValueError unless the folder is absent, empty (but for what a run leaves that was killed as
    it began), or that of a run to be resumed."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if "settings.json" in names and not resume:
        raise ValueError(f"--out {out} holds another run: "
                         "choose another folder, or continue it with --resume")
    if "settings.json" not in names and names - {"train.lock", "settings.json.tmp"}:
        raise ValueError(f"--out {out} is not empty and holds no run of train.py: "
                         "choose another folder")


def check_identity(settings, identity):
    """ValueError where a folder's settings.json is that of a run with another identity."""
    if not settings.exists():
        return
    try:
        before = dict(dict(json.loads(settings.read_text()))["identity"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{settings} is broken, or of a version before this one: its run cannot "
                         "be resumed") from None
    changed = [f"{name} (was {before.get(name)}, is {value})"
               for name, value in identity.items() if before.get(name) != value]
    if changed:
        raise ValueError(f"--resume continues {settings.parent} with the settings it was started "
                         f"with; changed: {', '.join(changed)}")


def is_finished(out, model, newest):
    """Whether the exported weights are there, whole. ValueError if a finished run lacks them and no
    checkpoint is left that they could be written from."""
    if not (out / "run.json").exists():
        return False
    try:
        check_weights(model, out)
        return True
    except (FileNotFoundError, ValueError):
        if newest is None:
            raise ValueError(f"{out} was finished, its weights are missing or cut, and no "
                             "checkpoint is left: restore them, or begin another --out") from None
        return False


def check_disk(out, num_parameters, keep, dtype):
    """Warns if the checkpoints to come (one more while it is written) and the export do not fit."""
    checkpoint, export = 12 * num_parameters, getattr(torch, dtype).itemsize * num_parameters
    there = len(checkpoints(out / "checkpoints"))
    needed, free = (keep + 1 - there) * checkpoint + export, shutil.disk_usage(out).free
    if needed > free:
        print(f"warning: {out} will need {needed / 1e9:.1f} GB ({keep + 1} checkpoints of "
              f"{checkpoint / 1e9:.1f} GB, export {export / 1e9:.1f} GB), the disk has "
              f"{free / 1e9:.1f} GB free: lower --keep_checkpoints", file=sys.stderr)


def export(model, out, tokenizer, rows, generation, dtype):
    """Writes the Hugging Face folder: weights, configurations, and the tokenizer, whose chat
    template gets the system prompt that all rows share. Collective."""
    model.config = dataclasses.replace(model.config, eos_token_id=generation["eos_token_id"][0])
    model.save_pretrained(out, dtype=dtype)
    if dist.get_rank() == 0:
        system, *others = rows.systems
        if others:
            print("rows differ in their system prompt: the chat template stays the model's")
        tokenizer.save(out, None if others else system)
        write_json(out / "generation_config.json", generation)


# ------------------------------------------------------------------------------- what a run tells

def print_start(settings, out, step):
    """The first screen; settings.json has the rest."""
    args = settings["arguments"]
    counts = ", ".join(f"{count:,} {name}" for name, count in settings["rows"].items()
                       if count)
    print(f"model: {args['model']}, {settings['num_parameters']:,} parameters\n"
          f"data: {' '.join(args['data'])}: {counts}; {settings['tokens']:,} tokens\n"
          f"run: {settings['num_steps']:,} steps of {args['batch_size']} rows, learning rate "
          f"{args['learning_rate']:g}, {settings['world_size']} x {settings['device']}, "
          f"{settings['compute_dtype']}, recompute {settings['recompute']}, into {out}")
    if args["resume"]:
        print(f"resuming at step {step}" if step
              else "no checkpoint yet: starting from the beginning")


def print_end(out, args, answers):
    """Where things are, some of what a built-in model answers, and what to do next."""
    print(f"finished: {out} is a Hugging Face folder; its loss curve is {out}/loss.svg")
    for answer in answers[:3]:
        verdict = "right" if answer.is_right else f"wrong, it is {answer.expected}"
        print(f"\n{answer.asked}\n{answer.text}   [{verdict}]")
    if answers:
        solved = sum(answer.is_right for answer in answers)
        print(f"\nheld-out problems solved: {solved} of {len(answers)} "
              f"({solved / len(answers):.0%})")
    rows = args.data + ["--split", args.split] * bool(args.split)
    rows += ["--where", *args.where] if args.where else []
    print(f"\nnext: python sample.py --model {out}    (a chat)\n"
          f"      python data.py {shlex.join(rows)} --model {out}    (its rows)")


def resume_command(args, out):
    """This command once more, to go on with."""
    words = list(sys.argv)
    words += ["--out", str(out)] * (args.out is None) + ["--resume"] * (not args.resume)
    launcher = "python"
    if dist.is_torchelastic_launched():
        launcher = (f"torchrun --nnodes={os.environ['GROUP_WORLD_SIZE']} "
                    f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}")
    return f"{launcher} {shlex.join(words)}"


class Log:
    """Rank 0's record: metrics.jsonl, with every step once, and the progress bar."""

    def __init__(self, out, step, settings, device):
        self.world_size, self.device = settings["world_size"], device
        self.peak = peak_flops(settings["device"])
        path = out / "metrics.jsonl"
        path.touch()
        lines = path.read_text().splitlines(keepends=True)[:step]  # none after the checkpoint
        try:
            self.lines = [json.loads(line) for line in lines]
        except ValueError:
            self.lines = []
        if len(self.lines) < step:
            raise ValueError(f"{path} lacks steps before {step}, where the checkpoint continues: "
                             "restore it")
        os.truncate(path, len("".join(lines)))
        self.file = open(path, "a")
        self.bar = tqdm(total=settings["num_steps"], initial=step,
                        # not tqdm's own look, which hides a bar where a terminal tells no size
                        ncols=shutil.get_terminal_size().columns or 80, nrows=20,
                        bar_format="{l_bar}{bar:10}| {n}/{total} [{elapsed}<{remaining}{postfix}]")

    def write(self, line):
        """Adds the line of one step, durably."""
        seconds = line["seconds"]
        line |= dict(tokens_per_second=line["num_target_tokens"] / seconds,
                     raw_tokens_per_second=line["num_tokens"] / seconds,
                     mfu=self.peak and line["flops"] / (seconds * self.world_size * self.peak),
                     world_size=self.world_size, memory_gib=peak_memory(self.device) / 2 ** 30)
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        shown = dict(loss=f"{line['loss']:.4f}", lr=f"{line['learning_rate']:.1e}",
                     tok_s=f"{line['tokens_per_second']:,.0f}")
        if self.peak:  # of a GPU
            shown |= dict(mfu=f"{line['mfu']:.1%}", mem=f"{line['memory_gib']:.1f}G")
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def close(self):
        self.bar.close()
        self.file.close()


def write_results(out, settings, lines, price):
    """loss.svg, and run.json, the last file of a run: what it was and what it came to."""
    draw_loss(out / "loss.svg", lines)
    hours = sum(line["seconds"] * line["world_size"] for line in lines) / 3600
    write_json(out / "run.json", settings | {"final_loss": lines[-1]["loss"],
                                             "process_hours": hours,
                                             "dollars": price and hours * price})


def peak_memory(device):
    """Bytes this process has held at most: on the GPU, or (Linux counts in KiB) in host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def ticks(low, high, logarithmic=False):
    """The round numbers from low to high that label an axis: 1, 2 and 5 times each power of ten, or
    over many decades only the powers; on a linear axis the multiples of one of these numbers."""
    numbers = [digit * 10.0 ** power for power in range(-12, 13) for digit in (1, 2, 5)]
    if not logarithmic:
        spacing = min(number for number in numbers if number >= (high - low) / 7)
        numbers = spacing * np.arange(high / spacing + 1)
    elif high > 1e4 * low:
        numbers = numbers[::3]
    return [number for number in numbers if low <= number <= high]


def draw_loss(path, lines):
    """The lines of metrics.jsonl as a picture: each step's loss, a mean that reaches as far back as
    ahead and so does not lag, held-out losses, and with an axis at the right the share solved. In a
    long run a few steps share a place, where the thin line spans their lowest and highest loss."""
    losses = np.array([line["loss"] for line in lines])
    held_out = [line for line in lines if "eval_loss" in line]
    solved = [line for line in lines if "solved" in line]
    shown = [*losses, *(line["eval_loss"] for line in held_out)]
    low = min(shown)
    high = max(*shown, 1.01 * low, 1e-9)  # above low even where all losses are equal
    logarithmic = high > 10 * low > 0
    last = max(1, len(losses) - 1)

    def at(step, loss):  # x,y in pixels; losses from low to high take 240 of them
        height = math.log(loss / low, high / low) if logarithmic else (loss - low) / (high - low)
        return f"{70 + 480 * step / last:.1f},{284 - 240 * height:.1f}"

    svg = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 336" width="600" height="336"
        font-family="sans-serif" font-size="12"><rect width="600" height="336" fill="white"/>
        <text x="310" y="326" text-anchor="middle">step</text>
        <text transform="translate(13,164) rotate(-90)" text-anchor="middle">
        loss ({"logarithmic" if logarithmic else "linear"} scale)</text>"""
    for step in ticks(0, last):
        if step % 1 == 0:  # of few steps the axis would name fractions
            svg += f"""<g transform="translate({at(step, low)})"><path d="M0 8V-248" stroke="#ddd"/>
                <text y="24" text-anchor="middle">{step:,.0f}</text></g>"""
    for loss in ticks(low, high, logarithmic):
        svg += f"""<g transform="translate({at(0, loss)})"><path d="M0 0H480" stroke="#ddd"/>
            <text x="-6" y="4" text-anchor="end">{loss:g}</text></g>"""

    thin = bold = ""
    stride = last // 2000 + 1
    for step in range(0, len(losses), stride):
        few = losses[step:step + stride]
        thin += f"{at(step, few.min())} {at(step, few.max())} "
        reach = min(step, last - step, last // 60 + 1)
        bold += at(step, losses[step - reach:step + reach + 1].mean()) + " "
    svg += f"""<path d="M70 36V292H550" fill="none" stroke="black"/>
        <polyline points="{thin}" fill="none" stroke="#aaa"/>
        <polyline points="{bold}" fill="none" stroke="#1f5fbf" stroke-width="2"/>
        <circle transform="translate({at(len(losses) - 1, losses[-1])})" r="3" fill="#1f5fbf"/>
        <path d="M70 16h16" stroke="#888"/><text x="90" y="20">loss (last {losses[-1]:.4g})</text>
        <path d="M216 16h16" stroke="#1f5fbf" stroke-width="2"/>
        <text x="236" y="20">centred mean</text>"""
    for line in held_out:
        svg += f"""<circle transform="translate({at(line["step"], line["eval_loss"])})" r="4"
            fill="#d95f02"/>"""
    if held_out:
        svg += """<circle cx="346" cy="16" r="4" fill="#d95f02"/>
            <text x="355" y="20">held-out loss</text>"""
    for line in solved:
        svg += f"""<rect transform="translate({at(line["step"], low)})" x="-4" width="8"
            y="{-240 * line["solved"] - 4:.1f}" height="8" fill="none" stroke="#1b7e57"/>"""
    if solved:
        svg += """<path d="M452 12h8v8h-8zM550 36v256" fill="none" stroke="#1b7e57"/>
            <g fill="#1b7e57"><text x="466" y="20">solved (right axis)</text>
            <text x="556" y="288">0 %</text><text x="556" y="168">50 %</text>
            <text x="556" y="48">100 %</text></g>"""
    atomic_write(path, [f"{svg}</svg>\n".encode()])


# ----------------------------------------------------------------------------------------- the plan

# Dense bf16 TFLOP/s and GB/s one way to a neighbour (NVLink, else PCIe), of NVIDIA's data sheets;
# GiB as PyTorch's out-of-memory errors say them. Where a device's name fits two, the later counts.
GPUS = {
    "H100-80GB": (989, 450, 79.2),
    "H100-PCIe-80GB": (756, 64, 79.1),
    "H20-96GB": (148, 450, 95.1),
    "H200-141GB": (989, 450, 139.8),
    "GH200-96GB": (989, 450, 94.5),
    "B200-180GB": (2250, 900, 178.4),
    "A10-24GB": (125, 32, 22.1),
    "A10G-24GB": (70, 32, 22.1),
    "A100-80GB": (312, 300, 79.2),
    "A100-40GB": (312, 300, 39.4),
    "A800-80GB": (312, 200, 79.2),
    "L40-48GB": (181, 32, 44.4),
    "L40S-48GB": (362, 32, 44.5),
    "3090-24GB": (71, 32, 23.6),
    "4090-24GB": (165, 32, 23.6),
    "5090-32GB": (210, 64, 31.4),
}
# MFU of one card on blocks of the 32B, recomputed (tests/gpu_results.md)
MEASURED_MFU = {"H200-141GB": 0.40}
NETWORK = 50  # GB/s a GPU between nodes: 400 Gb/s for each, as in a DGX H100
# Sky-T1's post: 450 dollars for 152 hours of an H100, which are 5.41e20 FLOP at its peak; and the
# work of 17,000 rows of 4,500 tokens in 32B, three times
PUBLISHED = {"flops": 4.6e19, "flops_at_peak": 5.41e20}
PRICES = {"H100-80GB": 2.96}  # dollars an hour, the post's; those of other cards must be given
GIB = 2 ** 30
# What a choice of recompute and offload may fill; the rest is the allocator's and the libraries'.
MEMORY_SHARE = {"cuda": 0.88, "cpu": 0.5}
# (recompute, offload), the cheapest in time first
MEMORY_CHOICES = [
    ("none", "none"),
    ("block", "none"),
    ("tiled", "none"),
    ("block", "activations"),
    ("tiled", "activations"),
    ("block", "parameters"),
    ("tiled", "parameters"),
]


def block_memory(config, max_seq_len, recompute, width, norm):
    """Bytes that a block saves for its backward pass, and that it takes at work in that.
    `width`: bytes of an activation; `norm`: bytes that a norm saves of each token."""
    C, I, T = config.hidden_size, config.intermediate_size, max_seq_len
    kv = config.head_dim * config.num_key_value_heads
    # a token's: q, k, v, attention's result by document and joined; gate, up, silu(gate), product
    attention = norm + width * (3 * C + 2 * kv)
    mlp = norm + width * 4 * I
    saved = {"none": attention + mlp, "block": width * C, "tiled": width * 2 * C}[recompute]

    # in its MLP: gradients of two (T, I), two (T, C) and down_proj; in its attention: of q, k, v,
    # four (T, C) and the MLP's three weights; and in each what is computed again
    tile = min(T, MLP_TILE) if recompute == "tiled" else T
    in_mlp = width * (tile * 2 * I + T * 2 * C + C * I)
    in_attention = width * (T * (5 * C + 2 * kv) + 3 * C * I)
    if recompute != "none":
        in_mlp += tile * mlp
        in_attention += T * attention
    if recompute == "block":
        in_mlp += T * attention
    return T * saved, max(in_mlp, in_attention)


def memory_estimate(config, max_seq_len, num_ranks, recompute, offload,
                    compute_dtype=torch.bfloat16, device_type="cuda", reshard=True):
    """Bytes of tensors that a rank holds at its peak, by what they are for. The peak is in the
    backward pass of the last block, one packed row of max_seq_len tokens and the gradients of
    earlier micro-steps there, or before it in the loss, whose needs beyond a block's are the last
    line. Each term is what is held then; tests/test_plan.py measures them."""
    C, T, L = config.hidden_size, max_seq_len, config.num_hidden_layers
    width = compute_dtype.itemsize
    embedding = config.vocab_size * C
    head = 0 if config.tie_word_embeddings else embedding
    block = (config.matmul_parameters - embedding) // L
    # fp32 slices; those of gradients are as large
    parameters = 0 if offload == "parameters" else 4 * config.num_parameters / num_ranks

    norm = width * 2 * C  # its input and result
    if device_type == "cpu":  # no fused kernel: also x / rms in fp32, and of bf16 x in fp32
        norm += (8 - width) * C
    saved, work = block_memory(config, T, recompute, width, norm)
    if recompute != "none" and offload != "none":
        saved = 0
    # weights of this block and the next; the fp32 gradient on its way to its slices: the head's
    # beside the last block, or that block's, whose activations are then gone
    gathered = width * block * min(2, num_ranks)
    reduced = max(4 * head, 4 * block - saved)
    # logits in fp32 and, computing in bf16, in bf16; the head's weight, its gradient in fp32 and,
    # again, in bf16; hidden states
    logits = min(LOSS_CHUNK[device_type], T * config.vocab_size)
    loss = (8 - width) * logits + 8 * embedding + T * (norm + width * 2 * C)
    if device_type == "cpu" and width == 2:  # adding bf16 to fp32 makes a copy there
        loss += 4 * embedding

    kept = 0
    if config.tie_word_embeddings:  # stays whole, and so does its gradient as the head's weight
        kept = width * 2 * embedding
        loss -= kept
    gradients = parameters
    if not reshard:  # all weights stay, and all gradients until they are reduced, once a batch
        gradients = 4 * config.num_parameters
        kept += width * (L * block + 2 * head)
        loss -= width * head
        gathered = 0
    return {"parameters, fp32": parameters,
            "gradients, fp32": gradients,
            "AdamW's moments": 2 * parameters,
            "weights that stay whole": kept,
            "gathered blocks" if num_ranks > 1 else "a block's weights": gathered + reduced,
            "saved activations": L * saved,
            "a block at work": work,
            "the loss, beyond it": max(0, loss - gathered - reduced - work)}


def reshard_after_forward(config, world_size, offload):
    """Whether weights are let go after use. A small model's stay gathered through a batch, beside
    fp32 gradients: one gathering and one reduction then serve all micro-steps."""
    return world_size == 1 or offload != "none" or config.num_parameters > 5e8


def memory_choices(args, config, max_seq_len, compute_dtype, device_type, world_size):
    """{(recompute, offload): memory_estimate} for what the flags allow."""
    choices = [(recompute, offload) for recompute, offload in MEMORY_CHOICES
               if args.recompute in ("auto", recompute) and args.offload in ("auto", offload)
               and (offload == "none" or device_type == "cuda")]  # a CPU has nowhere to move to
    if not choices:  # a pair that only a user asks for
        choices = [(args.recompute.replace("auto", "tiled"), args.offload)]
    return {(recompute, offload): memory_estimate(
                config, max_seq_len, args.shard_size or world_size, recompute, offload,
                compute_dtype, device_type, reshard_after_forward(config, world_size, offload))
            for recompute, offload in choices}


def choose_memory(choices, memory):
    """The first (recompute, offload) of memory_choices that fits; else the last."""
    for choice, estimate in choices.items():
        if sum(estimate.values()) < memory:
            break
    return choice


def available_memory(device):
    """Bytes that one rank may plan with: the GPU's, or its share of the host's."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        total /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return MEMORY_SHARE[device.type] * total


def find_gpu(name):
    """The entry of GPUS for a device's name, such as NVIDIA A100-SXM4-80GB; None without one."""
    for gpu in reversed(GPUS):
        if all(part in name for part in gpu.split("-")[:-1]):
            return gpu


def price_of(args, name):
    """Dollars an hour of a device: of the flag, else of PRICES; None where neither knows."""
    if args.dollars_per_gpu_hour is not None:
        return args.dollars_per_gpu_hour
    return PRICES.get(find_gpu(name))


def peak_flops(name):
    """FLOP/s in bf16 of a device, as its data sheet has them; None where GPUS has none."""
    gpu = find_gpu(name)
    return gpu and GPUS[gpu][0] * 1e12


def parse_gpus(text):
    """"2x8xH100-80GB" -> nodes 2, GPUs a node 8, an entry of GPUS. Nodes, number and memory may be
    left out. ValueError for what is not in GPUS."""
    pattern = r"(?:(?:([1-9]\d*)x)?([1-9]\d*)x)?(.+)"
    nodes, gpus, name = re.fullmatch(pattern, text.lower()).groups(default="1")
    for gpu in GPUS:
        if f"{gpu}-".lower().startswith(f"{name}-"):
            return int(nodes), int(gpus), gpu
    raise ValueError(f"--plan {text}: write it as 8xH100, 2x8xH200 (nodes first) or A100-40GB; "
                     f"known are {', '.join(GPUS)}")


def plan_data(rows, args, config, max_seq_len, num_steps, world_size):
    """A run's FLOP, and how at most forty of its steps, evenly spread, are packed."""
    costs = config.train_flops(rows.lengths.astype(float))
    batches = [data.batch_indices(len(rows), args.batch_size, args.seed, step)
               for step in range(num_steps)]
    some = batches[::math.ceil(num_steps / 40)]
    return {"flops": costs[np.concatenate(batches)].sum(),
            **data.packing(rows.lengths, costs, some, max_seq_len, world_size)}


def step_traffic(config, world_size, shard_size, micro_steps, reshard, width):
    """[(what, bytes a GPU sends in a step, GPUs it spans)]. A ring of n passes on (n - 1) / n of
    what it gathers or reduces, twice that where it does both."""
    gathers, reductions = 2 * micro_steps, micro_steps
    if not reshard:
        gathers, reductions = 1, 1
    copies = world_size // shard_size
    rings = [  # bytes a parameter, n, GPUs it spans
        ("all-gathers of weights", gathers * width, shard_size, shard_size),
        ("reduce-scatters of gradients", reductions * 4, shard_size, shard_size),
        ("all-reduces over copies", reductions * 8 / shard_size, copies, world_size)]
    return [(what, size * config.num_parameters * (n - 1) / n, span)
            for what, size, n, span in rings if n > 1]


def host_memory(config, max_seq_len, gpus, num_ranks, recompute, offload, width):
    """{what: bytes} that a run keeps in the memory of a node of so many GPUs."""
    held = {}
    if offload == "parameters":
        held["parameters, gradients and moments"] = 16 * config.num_parameters * gpus / num_ranks
    if offload != "none" and recompute != "none":
        # PyTorch rounds pinned memory up to powers of two
        x = 2 ** math.ceil(math.log2(width * max_seq_len * config.hidden_size))
        cos_sin = 2 * width * max_seq_len * config.head_dim
        inputs = {"block": x, "tiled": 2 * x + cos_sin}[recompute]
        held["inputs of recomputation, pinned"] = gpus * config.num_hidden_layers * inputs
    return held


def print_memory(choices, chosen, total):
    """Choices as columns, what memory is for as rows. `total` is the device's bytes."""
    short = {"activations": "activat.", "parameters": "param."}
    reserve = (1 - MEMORY_SHARE["cuda"]) * total  # CUDA, NCCL, what the allocator cannot use
    columns = [["--recompute", "--offload", *choices[chosen],
                f"reserve, {1 - MEMORY_SHARE['cuda']:.0%} of the GPU", "sum",
                f"fits into {total / GIB:.1f}"]]
    for choice, estimate in choices.items():
        sizes = [*estimate.values(), reserve]
        sizes.append(sum(sizes))
        fits = "chosen" if choice == chosen else "yes"
        if sizes[-1] >= total:
            fits = "no"
        recompute, offload = choice
        columns.append([recompute, short.get(offload, offload),
                        *[f"{size / GIB:.1f}" for size in sizes], fits])
    print("GiB a GPU, at its peak")
    for name, *cells in zip(*columns):
        if set(cells) != {"0.0"}:
            print(f"  {name:25}" + "".join(f"{cell:>10}" for cell in cells))


def duration(seconds):
    """A time in a unit that suits it."""
    for unit, size in (("hours", 3600), ("minutes", 60), ("s", 1)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1000:.2f} ms"


def print_input(args, rows, config, plan, num_steps):
    """Model, rows, steps, and how they pack."""
    print(f"{args.model}: {config.num_parameters:,} parameters, computed in {args.dtype}\n"
          f"{data.summary_of(rows.counts)}\n{rows.lengths.sum():,} tokens, "
          f"{rows.num_targets.sum():,} of them targets; mean {rows.lengths.mean():,.0f} tokens, "
          f"longest {rows.lengths.max():,}\n"
          f"{num_steps:,} steps of up to {args.batch_size} rows; {plan['micro_steps']:.2f} packed "
          f"rows a GPU and step (micro-steps),\n  {plan['filled']:.0%} full, the slowest GPU "
          f"{plan['imbalance']:.3f} of the mean\n")


def print_traffic(traffic, gpus, link):
    """What a GPU sends, at the full speed of its links. `link`: GB/s inside a node of `gpus`."""
    for what, size, span in traffic:
        speed, where = (link, "inside a node") if span <= gpus else (NETWORK, "between nodes")
        print(f"a GPU's {what} in a step: {size / 1e9:.2f} GB, {duration(size / 1e9 / speed)} at "
              f"{speed} GB/s {where}")


def mfu_of(args, name):
    """The MFU that a plan counts with, of the flag or of a GPU, and where it is from."""
    if args.mfu is not None:
        return args.mfu, "is what --mfu says"
    if name in MEASURED_MFU:
        return MEASURED_MFU[name], ("was measured on one such GPU, blocks recomputed; what several "
                                    "lose by\n  waiting for each other is not in it")
    return 0.35, ("is assumed (--mfu), not measured; torchtitan reports 33 to 39 %\n  for FSDP of "
                  "an 8B on H100")


def print_cost(args, config, plan, num_steps, world_size, name):
    """Time and money at the MFU of mfu_of, beside what the published run took."""
    flops = plan["flops"]
    mfu, source = mfu_of(args, name)
    seconds = flops / (world_size * GPUS[name][0] * 1e12 * mfu)
    gpu_hours = seconds * world_size / 3600
    price = price_of(args, name)
    cost = f"{gpu_hours:,.1f} GPU-hours"
    if gpu_hours < 0.1:
        cost = "less than 0.1 GPU-hours"
    elif price is None:
        cost += ", for dollars give --dollars_per_gpu_hour"
    else:
        cost += f", {gpu_hours * price:,.2f} dollars at {price} an hour"
    print(f"\na step: {flops / num_steps:.2e} FLOP, {duration(seconds / num_steps)}\n"
          f"the run: {flops:.2e} FLOP, {duration(seconds)}, {cost}\n"
          f"  An MFU of {mfu:.0%} {source}. Loading, saving and export are not counted.")
    # on one H200 builtin:tiny in fp32 reached about a thousandth of what 32B's blocks do
    if mfu > 0.3 and (config.num_parameters < 1e9 or args.dtype == "float32"):
        print("warning: such an MFU takes bfloat16 and billions of parameters: time a few steps "
              "and give --mfu")
    published = "Sky-T1-32B-Preview: 19 h, 152 GPU-hours, 450 dollars as published"
    if 0.8 < flops / PUBLISHED["flops"] < 1.25:
        published += f", {flops / PUBLISHED['flops_at_peak']:.1%} MFU by this count"
    print(published)


def print_plan(args):
    """Prints what the run of these flags would need on the GPUs of --plan, from config.json and the
    data's lengths alone. ValueError, after the table, if it does not fit."""
    nodes, gpus, name = parse_gpus(args.plan)
    tflops, link, gib = GPUS[name]
    world_size = nodes * gpus
    shard_size = shard_size_of(args, world_size)
    compute_dtype = getattr(torch, args.dtype)
    width = compute_dtype.itemsize
    _, config, _, max_seq_len, rows = data.load_input(args, weights=False)
    num_steps = run_length(args, len(rows))
    print(f"\n{args.plan}: {name} of {gib} GiB and {tflops} TFLOP/s (dense bf16)")
    plan = plan_data(rows, args, config, max_seq_len, num_steps, world_size)
    print_input(args, rows, config, plan, num_steps)

    memory = MEMORY_SHARE["cuda"] * gib * GIB
    choices = memory_choices(args, config, max_seq_len, compute_dtype, "cuda", world_size)
    recompute, offload = choose_memory(choices, memory)
    print_memory(choices, (recompute, offload), gib * GIB)
    host = host_memory(config, max_seq_len, gpus, shard_size, recompute, offload, width)
    for what, size in host.items():
        print(f"host memory of a node, {what}: {size / GIB:.1f} GiB")

    reshard = reshard_after_forward(config, world_size, offload)
    traffic = step_traffic(config, world_size, shard_size, plan["micro_steps"], reshard, width)
    print_traffic(traffic, gpus, link)
    print_cost(args, config, plan, num_steps, world_size, name)
    missing = min(sum(estimate.values()) for estimate in choices.values()) - memory
    if missing >= 0:
        raise ValueError(f"{args.plan} does not fit: the leanest of these choices lacks "
                         f"{missing / GIB:.1f} GiB a GPU; take more GPUs, a lower "
                         "--max_seq_len, or --recompute auto --offload auto")


if __name__ == "__main__":
    data.run(main, "try --recompute tiled --offload activations, --offload parameters, more GPUs, "
                   "or a lower --max_seq_len", "continue with --resume")
