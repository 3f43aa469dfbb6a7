"""Generation: chat, teacher samples, evaluation runs; a static cache and continuous batching.

    python sample.py --model DIR                                          # chat in the terminal
    python sample.py --model DIR --prompt "What is 2+2?"                  # one answer
    python sample.py --model DIR --problems gsm8k.jsonl --n 4 --out samples.jsonl
    torchrun --nproc_per_node=8 sample.py --model DIR --problems ...      # the problems shared out

A model is asked as it was trained: its chat template puts the system prompt in, unless --system
gives another. Each sample has random numbers of its own, named by seed, problem and number: it does
not depend on the batch, the order, the number of processes, or on what a killed run had finished.
In fp32 logits of another batch may differ in their last bits, which hardly ever changes a token; in
bf16 this holds for one number of slots.

In order: choosing a token, the engine, memory, faster layers, the sample file, who answers (a model
here or a server), what is asked, the chat, the command.
"""
import http.client
import json
import math
import os
import random
import re
import select
import signal
import socket
import sys
import threading
import time
import urllib.request
from array import array
from collections import namedtuple
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path

from verify import begin_script

if __name__ == "__main__":  # before torch is imported, which takes seconds
    begin_script()

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import data
from data import TAGS
from model import KVCache, Qwen2, Qwen2Config, atomic_write, check_weights, rotate

SLOTS = {"cpu": 16, "cuda": 64}     # rows of a batch, where memory has room for so many
INTERVAL = {"cpu": 1, "cuda": 16}   # steps between looks at the tokens: on CUDA each look waits
LENGTH_STEP = {"cpu": 64, "cuda": 512}  # the cache is read up to a multiple of this
# Not cuDNN's, which PyTorch may prefer: it makes a plan for each length of a prompt.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
RETRY_SECONDS = (1, 2, 4, 8, 16, 32)


# --------------------------------------------------------------------------------- choosing a token

@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its distribution. temperature 0 is the most likely one;
    top_k 0 and top_p 1 leave nothing out; num_ids: ids from there on are not the tokenizer's."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    num_ids: int | None = None

    def __post_init__(self):
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1 and self.top_k >= 0
                and 0 < self.repetition_penalty < math.inf):
            raise ValueError("--temperature must be 0 or more, --top_p above 0 and at most 1, "
                             "--top_k 0 or more, --repetition_penalty above 0")

    def random_numbers(self, stream):
        """The generator of a stream, which any object that prints alike names."""
        return random.Random(f"{self.seed}\0{stream}")


def choose(logits, sampling, u, seen=None):
    """A token for each row: logits (B, V), u (B,) float64 in [0, 1), seen (B, V) bool for a
    repetition penalty -> (B,). Each row depends on itself alone."""
    logits = logits.float()
    if sampling.num_ids is not None:
        logits[:, sampling.num_ids:] = -torch.inf
    if (penalty := sampling.repetition_penalty) != 1.0:  # arXiv 1909.05858, as transformers has it
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    most, ids = logits.max(-1, keepdim=True)  # on a CPU faster than argmax
    if sampling.temperature < 1e-6:  # 0, or so near that it is 0 in fp32
        return ids[:, 0]
    p = ((logits - most) / sampling.temperature).exp_()  # not divided by its sum
    if sampling.top_k:
        least = p.topk(min(sampling.top_k, p.shape[-1])).values[:, -1:]
        p.masked_fill_(p < least, 0)
    if sampling.top_p < 1:
        p.masked_fill_(p < least_of_top_p(p, sampling.top_p), 0)
    # the id at which the cumulated p reaches u: in which block, then where in it (a sum over all
    # of V would be exact in float64 alone, and take five times as long)
    blocks = F.pad(p, (0, -p.shape[-1] % 128)).unflatten(-1, (-1, 128))  # (B, V / 128, 128)
    block, u = interval_of(u[:, None], blocks.sum(-1))
    place, _ = interval_of(u, blocks.gather(1, block[:, :, None].expand(-1, 1, 128))[:, 0])
    return (128 * block + place)[:, 0]


def least_of_top_p(p, top_p):
    """The p (B, 1) of the least likely token that is kept: what is more likely than a kept one has
    less than top_p of the mass of p (B, V)."""
    V = p.shape[-1]
    wanted = top_p * p.sum(-1, keepdim=True, dtype=torch.float64)
    # on a CPU the first few are sorted much faster; on CUDA the question would cost a wait
    for count in (128, 4096, V) if p.device.type == "cpu" else (V,):
        top = p.topk(count).values if count < V else p.sort(descending=True).values
        is_kept = top.cumsum(-1, dtype=torch.float64) - top < wanted
        if count >= V or not is_kept[:, -1].any():
            return top.where(is_kept, torch.inf).amin(-1, keepdim=True)


def interval_of(u, sizes):
    """Intervals of these sizes (B, N) lie side by side, together as long as [0, 1): in which one u
    (B, 1) lies, and how far into it, from 0 to 1."""
    ends = sizes.cumsum(-1, dtype=torch.float64)
    place = u.clamp(0, 1 - 2 ** -40) * ends[:, -1:]  # before the last end, whatever was rounded
    index = torch.searchsorted(ends, place, right=True)
    return index, 1 - (ends.gather(-1, index) - place) / sizes.gather(-1, index)


# ------------------------------------------------------------------------------------------- engine

@dataclass
class Request:
    """A prompt (token ids) and the name of its random numbers; `tag` is the caller's own.
    `replace`(tokens so far, next one) says which token is taken instead; `ended`(tokens so far)
    whether that was the last."""
    prompt: list
    stream: object
    max_new_tokens: int
    tag: object = None
    replace: object = None
    ended: object = None
    tokens: list = field(default_factory=list)

    def append(self, token, stop_ids):
        """Adds a token; returns why the answer ends there, "stop" or "length", or None."""
        if token in stop_ids:
            return "stop"
        self.tokens.append(token)
        if self.ended and self.ended(self.tokens):
            return "stop"
        return "length" if len(self.tokens) >= self.max_new_tokens else None


class Engine:
    """Continuous batching over a static cache. Row i of the cache and of all tensors belongs to
    requests[i]. Prompts are read one at a time, all rows step together, a finished one's place is
    taken by the last, and new ones come in at once.

    In fp32 on a CPU the batch has as many rows as there are requests; otherwise its shape is
    constant, as bf16 products of another shape may round otherwise (and CUDA graphs want it so).
    """

    def __init__(self, model, num_slots, length, sampling, stop_ids=()):
        parameter = next(model.parameters())
        self.model = model
        self.sampling = sampling
        self.stop_ids = frozenset(stop_ids)
        self.device = parameter.device
        self.num_slots = num_slots
        self.cells = cells_of(length, self.device.type)
        self.is_constant = self.device.type == "cuda" or parameter.dtype != torch.float32
        self.cache = KVCache(model.config, num_slots, self.cells, parameter.dtype, self.device)
        self.requests = []
        self.last_read = None, None, None  # a prompt, its keys and values, its logits
        # a row's last token, and the cell that its keys and values will be stored in
        self.input_ids = torch.zeros(num_slots, dtype=torch.long, device=self.device)
        self.positions = torch.full_like(self.input_ids, self.cells - 1)
        # the random number by which the token of each cell is chosen
        self.u = torch.zeros(num_slots, self.cells, dtype=torch.float64, device=self.device)
        self.seen = None  # which tokens a row has had, for a repetition penalty
        if sampling.repetition_penalty != 1:
            shape = num_slots, model.config.vocab_size
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self.graphs = {}
        if self.device.type == "cuda":  # one of each for all graphs: none outlives its step
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream(self.device)

    @torch.inference_mode()
    def run(self, requests, every_step=False):
        """Yields (request, "stop" or "length") as they finish, the stop token not in its tokens;
        with every_step also (request, None) of all others after each step."""
        waiting = iter(requests)
        while self.requests:  # of a run that was broken off
            self.remove(len(self.requests) - 1)
        while True:
            while len(self.requests) < self.num_slots and (request := next(waiting, None)):
                token = self.prefill(request)
                if reason := self.append(len(self.requests) - 1, token):
                    yield request, reason
                    self.remove(len(self.requests) - 1)
            if not self.requests:
                return
            finished = {}
            for tokens in self.decode(every_step):
                for row, token in enumerate(tokens):
                    if row not in finished and (reason := self.append(row, token)):
                        finished[row] = reason
            for row, request in enumerate(self.requests):
                if row in finished or every_step:
                    yield request, finished.get(row)
            for row in sorted(finished, reverse=True):
                self.remove(row)

    def prefill(self, request):
        """Reads a prompt into the next row, and returns the answer's first token. The samples of
        one problem follow each other: then what was read is copied."""
        row, T = len(self.requests), len(request.prompt)
        ids = torch.tensor(request.prompt, device=self.device)
        prompt, kv, logits = self.last_read
        if prompt == request.prompt:
            self.cache.kv[:, row, :, :T] = kv
        else:
            with sdpa_kernel(ATTENTION):
                logits = self.cache.prefill(self.model, ids, row)
            self.last_read = request.prompt, self.cache.kv[:, row, :, :T].clone(), logits
        self.requests.append(request)
        self.positions[row] = T
        rng = self.sampling.random_numbers(request.stream)
        u = [rng.random() for _ in range(request.max_new_tokens)]
        self.u[row, T:T + len(u)] = torch.tensor(u, dtype=torch.float64)
        if self.seen is not None:
            self.seen[row] = False
            self.seen[row, ids] = True
        self.draw(logits[None].clone(), slice(row, row + 1))
        return int(self.input_ids[row])

    def draw(self, logits, rows):
        """Chooses the tokens of a slice of the rows for the cells at self.positions."""
        u = self.u[rows].gather(1, self.positions[rows, None])[:, 0]
        seen = None if self.seen is None else self.seen[rows]
        self.input_ids[rows] = choose(logits, self.sampling, u, seen)
        if is_split(self.model):  # all ranks go on with one token
            dist.broadcast(self.input_ids[rows], 0)

    def append(self, row, token):
        """Gives a request its next token, or another in its place; returns as Request.append."""
        request = self.requests[row]
        if request.replace:
            token = request.replace(request.tokens, token)
            self.input_ids[row] = token
        if self.seen is not None:
            self.seen[row, token] = True
        return request.append(token, self.stop_ids)

    def remove(self, row):
        """Takes a request out; the last one moves into its row. Rows without a request step in the
        last cell, which no request has."""
        last = len(self.requests) - 1
        if row != last:
            self.cache.copy(last, row, int(self.positions[last]))
            for tensor in (self.input_ids, self.positions, self.u, self.seen):
                if tensor is not None:
                    tensor[row] = tensor[last]
            self.requests[row] = self.requests[last]
        self.requests.pop()
        self.positions[last] = self.cells - 1

    def decode(self, one):
        """Lists of the tokens that the requests chose in each of the next steps, or in one. Looks
        are rare on CUDA, where each waits for the device; replaced tokens and penalties need one
        every time."""
        one = one or self.seen is not None or any(request.replace for request in self.requests)
        n = 1 if one else INTERVAL[self.device.type]
        B = self.num_slots if self.is_constant else len(self.requests)
        longest = max(len(request.prompt) + len(request.tokens) for request in self.requests)
        multiple = LENGTH_STEP[self.device.type]
        length = min(-(-(longest + n) // multiple) * multiple, self.cells)
        step = self.captured if self.device.type == "cuda" else self.step
        history = []
        for _ in range(n):
            step(B, length)
            history.append(self.input_ids[:len(self.requests)].clone())
        return torch.stack(history).tolist()

    def step(self, B, length):
        """One token for each of the first B rows, from and into the engine's tensors."""
        with sdpa_kernel(ATTENTION):
            logits = self.cache.decode(self.model, self.input_ids[:B], self.positions[:B], length)
        self.positions[:B].add_(1).clamp_(max=self.cells - 1)
        self.draw(logits, slice(B))

    def captured(self, B, length):
        """The step as a CUDA graph: one launch a token, for these shapes."""
        if (B, length) not in self.graphs:
            before = self.input_ids.clone(), self.positions.clone()
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(2):  # warm-up: kernels are chosen, workspaces allocated
                    self.step(B, length)
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                self.step(B, length)
            self.input_ids[:], self.positions[:] = before
            self.graphs[B, length] = graph
        self.graphs[B, length].replay()


def generate(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, top_k=0, seed=0,
             stop_ids=(), streams=None, num_slots=None):
    """The new tokens of each prompt (lists of ids), in order, without the stop token. `streams`
    names each prompt's random numbers (its index by default): equal names, prompts and seeds give
    equal samples, whatever else is in the batch."""
    streams = range(len(prompts)) if streams is None else streams
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} has no token")
        check_room(f"prompt {i}", len(prompt), max_new_tokens, model.config)
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    length = max(map(len, prompts)) + max_new_tokens
    num_slots = num_slots or min(plan_slots(model, length), len(prompts))
    sampling = Sampling(temperature, top_p, top_k, seed=seed)
    engine = Engine(model, num_slots, length, sampling, stop_ids)
    requests = [Request(list(prompt), stream, max_new_tokens)
                for prompt, stream in zip(prompts, streams, strict=True)]
    for _ in engine.run(requests):
        pass
    return [request.tokens for request in requests]


# ------------------------------------------------------------------------------------------- memory

def cells_of(length, device_type):
    """Cells of the cache for a row of `length` tokens, those that it steps beyond its end among
    them: in whole steps of 64, as attention over a remainder rounds otherwise in bf16."""
    return -(-(length + INTERVAL[device_type]) // 64) * 64


def check_room(name, num_tokens, max_new_tokens, config):
    """ValueError if an answer would go beyond the positions that the model knows."""
    most = config.max_position_embeddings
    if num_tokens + max_new_tokens > most:
        raise ValueError(f"{name} has {num_tokens:,} tokens: with --max_new_tokens "
                         f"{max_new_tokens:,} that is more than the model's {most:,} positions")


def free_memory(device):
    """Bytes that this process may still take: of the GPU, or of its host's or control group's."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps of freed tensors is free to us
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    kilobytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1024
    host = 1024 * number_in("/proc/meminfo", r"MemAvailable: +(\d+)", kilobytes)
    group = (number_in("/sys/fs/cgroup/memory.max", r"(\d+)", host)
             - number_in("/sys/fs/cgroup/memory.stat", r"anon (\d+)", 0))
    return 0.8 * min(host, group) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def number_in(path, pattern, default):
    found = re.search(pattern, Path(path).read_text()) if os.path.exists(path) else None
    return int(found[1]) if found else default


def weight_bytes(config, dtype, device, ranks=1):
    """Of one rank's weights; on a CPU a tied head may be a copy of its own (see fuse)."""
    embeddings = config.vocab_size * config.hidden_size
    one = config.tie_word_embeddings and torch.device(device).type == "cuda"
    blocks = config.matmul_parameters - embeddings
    return (blocks / ranks + (1 if one else 2) * embeddings) * dtype.itemsize


def check_weights_fit(config, dtype, device, ranks):
    """ValueError if a rank's weights are more than its device has free."""
    free, wanted = free_memory(device), weight_bytes(config, dtype, device, ranks)
    if wanted > free:
        half = "--dtype bfloat16, " if dtype == torch.float32 else ""
        raise ValueError(f"the weights take {wanted / 2 ** 30:.1f} GiB, {device} has "
                         f"{free / 2 ** 30:.1f} free: {half}--tensor_parallel {2 * ranks} or more "
                         "(on GPUs), a smaller model or an --endpoint")


def plan_slots(model, length, max_batch_tokens=None, most=None):
    """How many rows of `length` tokens the cache may have, from the memory that the device has
    free. Raises ValueError that says how much is missing."""
    config, parameter = model.config, next(model.parameters())
    token_bytes = (2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
                   * parameter.dtype.itemsize)
    most = most or SLOTS[parameter.device.type]
    if max_batch_tokens is None:
        # a row's logits, probabilities and their order (on CUDA both in warm-up and graph); a
        # prompt's MLP
        work = ((64 if parameter.device.type == "cpu" else 160) * most * config.vocab_size
                + 16 * length * config.intermediate_size)
        max_batch_tokens = int((free_memory(parameter.device) - work) // token_bytes)
    if is_split(model):  # all ranks step together
        least = torch.tensor(max_batch_tokens, device=parameter.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        max_batch_tokens = int(least)
    if max_batch_tokens < length:
        raise ValueError(
            f"one answer of {length:,} tokens wants {length * token_bytes / 2**30:.1f} GiB of key/"
            f"value cache, there is room for {max(0, max_batch_tokens):,} tokens: lower "
            "--max_new_tokens, raise --max_batch_tokens, or spread the model with "
            "--tensor_parallel")
    return min(most, max(1, max_batch_tokens // cells_of(length, parameter.device.type)))


def computed_in(dtype, config, device, num_slots):
    """The dtype in place of the one asked for: float32 for bfloat16 on a CPU that multiplies bf16
    slowly, where that takes a quarter of the memory at most (one row waits for memory anyway)."""
    is_slow = (dtype == "bfloat16" and torch.device(device).type == "cpu" and num_slots > 1
               and not data.cpu_multiplies_bf16())
    fits = is_slow and weight_bytes(config, torch.float32, device) < free_memory(device) / 4
    return "float32" if fits else dtype


# ------------------------------------------------------------------------------------ faster layers

def fastest_order(parameter, num_slots, compiles):
    """In which order a weight should lie. On a CPU F.linear would rearrange a plain one in each
    call: "packed" is oneDNN's own order, "transposed" the best for one row in fp32."""
    if parameter.device.type != "cpu" or compiles:
        return "plain"
    in_fp32 = parameter.dtype == torch.float32
    if in_fp32 and num_slots == 1:
        return "transposed"
    packs = torch.backends.mkldnn.is_available() and (in_fp32 or data.cpu_multiplies_bf16())
    return "packed" if packs else "plain"


class FusedLinear(torch.nn.Module):
    """Linear layers of one input as one layer, its weight in an order of fastest_order."""

    def __init__(self, layers, order):
        super().__init__()
        weight = torch.cat([layer.weight for layer in layers]).detach()
        biases = [getattr(layer, "bias", None) for layer in layers]
        self.bias = None if biases[0] is None else torch.cat(biases).detach()
        self.order = order
        if order == "packed":
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, SLOTS["cpu"])
        elif order == "transposed":
            weight = weight.t().contiguous()
        self.weight = weight

    def forward(self, x):
        if self.order == "packed":  # what torch.compile puts in F.linear's place
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        if self.order == "transposed":
            y = x @ self.weight
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.weight, self.bias)


class FusedBlock(torch.nn.Module):
    """A Block in fewer operators and larger products: one product for q, k and v, one rotation, one
    product for gate and up. Works on (B T, C): two axes less to fold in each product."""

    def __init__(self, block, order, is_split):
        super().__init__()
        attention = block.self_attn
        mlp = block.mlp
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        self.is_split = is_split
        self.layer = attention.layer
        self.Hkv = len(attention.k_proj.weight) // attention.head_dim
        norms = block.input_layernorm, block.post_attention_layernorm
        self.input_layernorm, self.post_attention_layernorm = (
            norms if order == "plain" else map(CPUNorm, norms))
        self.qkv_proj = FusedLinear(projections, order)
        self.o_proj = FusedLinear([attention.o_proj], order)
        self.gate_up_proj = FusedLinear([mlp.gate_proj, mlp.up_proj], order)
        self.down_proj = FusedLinear([mlp.down_proj], order)

    def forward(self, x, cos, sin, document_lengths, cache, recompute):
        B, T, C = x.shape
        x = x.reshape(B * T, C)
        q, k, v = self.heads(x, cos, sin)
        y = cache.attend(self.layer, q, k, v, document_lengths)
        x = x + self.summed(self.o_proj(y.transpose(1, 2).reshape(B * T, -1)))
        return self.feed_forward(x).view(B, T, C)

    def summed(self, y):
        """Where each rank has a share of the heads and of the MLP: the sum of what they add."""
        if self.is_split:
            dist.all_reduce(y)
        return y

    def heads(self, x, cos, sin):
        """x (B T, C), cos and sin (B, 1, T, D) -> q (B, H, T, D), k and v (B, Hkv, T, D)."""
        B, _, T, D = cos.shape
        qkv = self.qkv_proj(self.input_layernorm(x)).view(B, T, -1, D).transpose(1, 2)
        qk, v = qkv.tensor_split([-self.Hkv], dim=1)
        q, k = rotate(qk, cos, sin).tensor_split([-self.Hkv], dim=1)
        return q, k, v

    def feed_forward(self, x):
        gate, up = self.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, dim=-1)
        return x + self.summed(self.down_proj(F.silu(gate).mul_(up)))


class CPUNorm(torch.nn.Module):
    """RMSNorm in six operators, where F.rms_norm calls twenty on a CPU."""

    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight.detach()
        self.eps = torch.tensor(norm.eps)

    def forward(self, x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self.eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).to(x.dtype) * self.weight


class FusedHead(FusedLinear):
    """A head for logits alone; a tied one then has a weight of its own."""

    def forward(self, x, targets, tied_weight):
        return super().forward(x)


@torch.no_grad()
def fuse(model, num_slots=SLOTS["cpu"], compiles=False):
    """Puts layers in the blocks' places that compute the same with fewer and larger products, the
    fastest for so many rows; the model can then only sample. `compiles`: torch.compile what a block
    computes beside its attention, which writes into the cache."""
    order = fastest_order(next(model.parameters()), num_slots, compiles)
    for i, block in enumerate(model.model.layers):
        block = FusedBlock(block, order, is_split(model))
        model.model.layers[i] = block
        if compiles:
            block.heads, block.feed_forward = map(torch.compile, (block.heads, block.feed_forward))
    if order != "plain":
        tied = model.config.tie_word_embeddings
        model.lm_head = FusedHead([model.model.embed_tokens if tied else model.lm_head], order)
    return model


def load_split(model_dir, dtype, device, rank, world_size):
    """A model of which each rank holds 1 / world_size of the heads and of each MLP (arXiv
    1909.08053), to be fused. Embedding and head are whole on each."""
    config = Qwen2Config.from_pretrained(model_dir)
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % world_size:
            raise ValueError(f"--tensor_parallel {world_size} does not divide {name} "
                             f"{getattr(config, name)}")
    with torch.device("meta"):
        model = Qwen2(config).to(dtype)
    stored = check_weights(model, model_dir)
    for name, _ in list(model.named_parameters()):
        value = stored[name][:]
        if re.search(r"(q|k|v|gate|up)_proj\.", name):
            value = value.chunk(world_size)[rank]
        elif re.search(r"(o|down)_proj\.", name):
            value = value.chunk(world_size, dim=1)[rank]
        module, _, leaf = name.rpartition(".")
        value = torch.nn.Parameter(value.to(device, dtype), requires_grad=False)
        setattr(model.get_submodule(module), leaf, value)
    heads = config.num_key_value_heads // world_size  # of the cache
    model.config = replace(model.config, num_key_value_heads=heads)
    model.is_split = True
    return model.eval()


def is_split(model):
    """Whether load_split made it."""
    return getattr(model, "is_split", False)


# ---------------------------------------------------------------------------------- the sample file

class SampleFile:
    """Samples by (source, id, sample), written as they finish and sorted when all are there.

    Rank 0 writes the file itself, the others a part beside it each; what a killed run left in parts
    is merged at the next start. The settings lie beside it, in a file that is locked meanwhile: a
    second run, or one of other settings, is refused. A run that wrote nothing leaves nothing."""

    def __init__(self, path, settings, rank, barrier):
        self.path = Path(path)
        self.rank = rank
        self.own = self.path if rank == 0 else Path(f"{path}.part{rank}")
        if rank == 0:
            if self.path.exists() and not self.path.is_file():
                raise ValueError(f"{path} is no file: name another --out")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.settings = open(f"{path}.settings.json", "a+", encoding="utf-8")
            data.lock(self.settings, path)
            if self.parts():
                self.merge()
            self.keep_settings(settings)
        barrier()
        # of each sample that is there, what was asked; what a server broke off is asked again
        self.done = {sample_key(row): (row.get("prompt"), row.get("original"))
                     for row in self.read(self.path)
                     if row.get("finish_reason", "stop") in ("stop", "length")}
        barrier()  # nobody writes while another still reads, and cuts off what seems torn

    def keep_settings(self, settings):
        """ValueError if there are samples of other settings."""
        self.settings.seek(0)
        try:
            before = dict(json.loads(self.settings.read() or "{}"))
        except (ValueError, TypeError):  # no settings: as if there were none
            before = {}
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed and self.path.exists():
            if not before:
                os.unlink(self.settings.name)
            raise ValueError(f"{self.path} holds samples of other settings ({', '.join(changed)}): "
                             "name another --out, or delete it")
        self.settings.truncate(0)  # in place, as the lock is on this very file
        self.settings.write(json.dumps(settings, indent=1) + "\n")
        self.settings.flush()

    def parts(self):
        name = re.escape(self.path.name) + r"\.part\d+"
        return sorted(path for path in self.path.parent.iterdir() if re.fullmatch(name, path.name))

    @staticmethod
    def read(path):
        """The whole rows of a file, where there is one; a torn last line is cut off."""
        if not path.exists():
            return
        with open(path, "rb+") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    file.truncate(file.tell() - len(line))
                    return
                try:
                    row = json.loads(line)
                    sample_key(row)
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}: a broken row ({error}): mend or delete it") from None
                yield row

    def merge(self, order=()):
        """Adds the parts and sorts by the order of the samples; returns the rows by name."""
        parts = self.parts()
        rows = {sample_key(row): row for path in (self.path, *parts) for row in self.read(path)}
        rows = {key: rows[key] for key in (*order, *rows) if key in rows}
        atomic_write(self.path, map(line_of, rows.values()))
        for part in parts:
            part.unlink()
        return rows

    def left(self, jobs):
        """The jobs not done yet; ValueError for two of one name, or another question's answer."""
        names = set()
        for job in jobs:
            name = sample_key(job.row)
            if name in names:
                raise ValueError(f"two samples are number {name[2]} of problem {name[1]!r} of "
                                 f"{name[0]!r}: rewrite the files one by one")
            names.add(name)
            asked = job.row.get("prompt"), job.row.get("response")
            if self.done.get(name, asked) != asked:
                raise ValueError(f"{self.path} holds an answer to another question of the name "
                                 f"{name[1]!r} of {name[0]!r}: name another --out, or delete it")
        return [job for job in jobs if sample_key(job.row) not in self.done]

    def add(self, row):
        try:
            with open(self.own, "ab") as file:
                file.write(line_of(row))
        except OSError as error:
            raise ValueError(f"{self.own}: {error.strerror}: the samples before are kept, the same "
                             "command goes on") from None

    def close(self):
        if self.rank == 0:
            if not self.path.exists() and not self.parts():
                os.unlink(self.settings.name)
            self.settings.close()


def sample_key(row):
    return row["source"], row["id"], row.get("sample", 0)


def line_of(row):
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


# ------------------------------------------------------------------------ who answers: a model here

@dataclass
class Job:
    """A conversation to be answered, the row that it is for, and the name of its random numbers."""
    messages: list
    row: dict
    stream: object


class Local:
    """Answers by a model of this process (or, with --tensor_parallel, of all)."""

    def __init__(self, args, rank, device, store):
        folder = data.find_model(args.model)
        self.args = args
        self.store = store
        self.prompts = {}
        self.tokenizer = data.load_tokenizer(folder)
        self.config = Qwen2Config.from_pretrained(folder)
        dtype = getattr(torch, args.dtype)
        check_weights_fit(self.config, dtype, device, args.tensor_parallel)
        if args.tensor_parallel > 1:
            model = load_split(folder, dtype, device, rank, args.tensor_parallel)
        else:
            model = Qwen2.from_pretrained(folder, dtype=dtype, device=device).eval()
        self.model = fuse(model, args.max_slots, args.compile)
        _, ends = data.read_generation_config(folder)
        self.stop_ids = {*ends, self.tokenizer.token_id(self.tokenizer.end_token)}

    def engine(self, length):
        """For rows of so many tokens."""
        args = self.args
        slots = plan_slots(self.model, length, args.max_batch_tokens, args.max_slots)
        sampling = Sampling(
            args.temperature,
            args.top_p,
            args.top_k,
            args.repetition_penalty,
            args.seed,
            num_ids=self.tokenizer.vocab_size,
        )
        return Engine(self.model, slots, length, sampling, self.stop_ids)

    def request(self, prompt, stream, max_new_tokens, tag=None):
        request = Request(prompt, stream, max_new_tokens, tag)
        least, most = self.args.min_think, self.args.max_think
        if least or most:
            request.replace = BudgetForcing(self.tokenizer, self.stop_ids, least or 0,
                                            most or math.inf)
        if self.args.stop:
            request.ended = stops_on(self.tokenizer, self.args.stop)
        return request

    def answers(self, jobs):
        """Yields (job, text, finish reason, number of tokens) as they finish."""
        new, prompts = self.args.max_new_tokens, [self.prompt(job) for job in jobs]
        for job, prompt in zip(jobs, prompts, strict=True):
            check_room(f"problem {job.row['id']}", len(prompt), new, self.config)
        engine = self.engine(max(map(len, prompts)) + new)
        requests = (self.request(prompts[i], jobs[i].stream, new, jobs[i])
                    for i in shared_out(len(jobs), self.store))
        for request, reason in engine.run(requests):
            text = cut(self.tokenizer.decode(request.tokens), self.args.stop)
            yield request.tag, text, reason, len(request.tokens)

    def prompt(self, job):
        """A job's prompt, of which the samples of one problem have the same object."""
        text = self.tokenizer.render(job.messages, add_generation_prompt=True)
        if text not in self.prompts:
            self.prompts[text] = array("i", self.tokenizer.encode(text))
        return self.prompts[text]

    def stream(self, messages):
        """Yields the pieces of one answer, up to the first of --stop."""
        prompt = prompt_of(self.tokenizer, messages)
        room = self.config.max_position_embeddings - len(prompt)
        if room < 1:
            raise ValueError(f"the conversation has {len(prompt):,} tokens, as many as the model's "
                             "positions: /reset begins a new one")
        shown, new = "", min(self.args.max_new_tokens, room)
        request = self.request(prompt, len(messages), new)
        for _, reason in self.engine(len(prompt) + new).run([request], every_step=True):
            text = cut(self.tokenizer.decode(request.tokens), self.args.stop)
            text = text if reason else settled(text, self.args.stop)
            yield text[len(shown):]
            shown = text


def prompt_of(tokenizer, messages):
    return tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))


def shared_out(count, store):
    """The numbers of this process's jobs: whoever is free takes the next, so that none waits for
    long answers. Without a store all: there is one process, or all work on each answer together."""
    i = -1
    while (i := store.add("next", 1) - 1 if store else i + 1) < count:
        yield i


def stops_on(tokenizer, stops):
    """Whether the newest of some tokens hold one of the texts."""
    width = 2 + max(len(stop.encode()) for stop in stops)  # a token is a byte at least

    def ended(tokens):
        tail = tokenizer.decode(tokens[-width:])
        return any(stop in tail for stop in stops)
    return ended


def cut(text, stops):
    """The text before the first of the stops."""
    return min((text.partition(stop)[0] for stop in stops), key=len, default=text)


def settled(text, stops):
    """The text without what the next tokens may still change: half a character at its end, or the
    beginning of one of the stops."""
    text = text.rstrip("\ufffd")
    beginnings = (stop[:n] for stop in stops for n in range(1, len(stop)))
    undecided = max((len(end) for end in beginnings if text.endswith(end)), default=0)
    return text[:len(text) - undecided]


class BudgetForcing:
    """s1 (arXiv 2501.19393): a thought of fewer than `least` tokens goes on with "Wait", one of
    `most` is ended. The state of one request; called before each token, returns the one to take."""

    def __init__(self, tokenizer, stop_ids, least, most):
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.least = least
        self.most = most
        self.queue = []
        self.has_ended = False

    def __call__(self, tokens, token):
        if not self.queue and not self.has_ended:
            self.queue = self.tokenizer.encode(self.forced(tokens, token))
        return self.queue.pop(0) if self.queue else token

    def forced(self, tokens, token):
        """The text to take instead of a token, or none."""
        decode = self.tokenizer.decode
        text, last = decode([token]), decode(tokens[-1:])
        # inside a thought a tag can only be the one that ends it; it is several tokens to some
        # tokenizers, of which the first may be "<"
        begins_tag = TAGS[0] in decode(tokens[:30]) and (
            "<|" in text or last.endswith("<") and text.startswith("|"))
        if len(tokens) < self.least:
            return "Wait" if begins_tag or token in self.stop_ids else ""
        self.has_ended = begins_tag or TAGS[1] in decode([*tokens[-30:], token])
        if not self.has_ended and len(tokens) >= self.most:
            self.has_ended = True
            return f"\n\n{TAGS[1]}\n\n{TAGS[2]}\n\n"
        return ""


# ---------------------------------------------------------------------- who answers: a server

class AsItIs(urllib.request.HTTPErrorProcessor):
    """No reply is an error, and no redirect is followed: the key is for one host."""

    def http_response(self, request, reply):
        return reply
    https_response = http_response


class Endpoint:
    """Answers by a server that speaks OpenAI's chat completions: vLLM, SGLang, llama.cpp, OpenAI.
    The key comes from OPENAI_API_KEY and is shown nowhere."""
    answered = refusal = error = None  # so far

    def __init__(self, args):
        self.args = args
        self.url = args.endpoint.rstrip("/") + "/chat/completions"
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch(r"https?://[a-zA-Z0-9\[][!-~]*", args.endpoint):
            raise ValueError(f"--endpoint {args.endpoint}: write http:// or https:// and a host, "
                             "as in http://localhost:8000/v1")
        if not re.fullmatch("[ -~]*", self.key):
            raise ValueError("OPENAI_API_KEY holds characters that no key has")
        self.headers = {"Content-Type": "application/json"}
        if self.key:
            self.headers["Authorization"] = f"Bearer {self.key}"
        self.opener = urllib.request.build_opener(AsItIs)
        self.ended = threading.Event()

    def answers(self, jobs):
        """As Local.answers, --concurrency requests at a time. After an error or Ctrl-C none is
        started; what is under way is waited for, and then the error raised. Refused rows are held
        back until something was answered: a wrong flag would have everything refused."""
        def interrupted(*_):
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
            self.end(KeyboardInterrupt())
            # print must not be called where a print may be under way
            os.write(2, f"\nwaiting for {min(most, len(jobs) - done)} answers; Ctrl-C again drops "
                        "them\n".encode())
        most = min(self.args.concurrency, len(jobs))
        done = 0
        held = []
        before = signal.signal(signal.SIGINT, interrupted)
        try:
            with ThreadPool(most) as pool:
                for rows in pool.imap_unordered(self.answer, jobs):
                    done += 1
                    held += rows
                    if self.answered:
                        yield from held
                        held = []
                    elif len(held) == most:
                        self.end(self.refusal)
        finally:
            signal.signal(signal.SIGINT, before)
        if self.error:
            raise self.error

    def end(self, error):
        """The run ends with its first error. Returns no rows."""
        self.error = self.error or error
        self.ended.set()
        return []

    def answer(self, job):
        """The job's one row, or none when the run has ended. What may pass is asked again, later
        and later or when the server says; an answer that is never whole is kept as it is."""
        after = ""
        for wait in (0, *RETRY_SECONDS):
            asked = min(float(after), 120) if after.isdecimal() else 0
            if self.ended.wait(max(asked, wait * random.uniform(0.5, 1.5))):
                return []
            rows, after = [], ""
            try:
                text, reason, tokens = within(
                    self.args.timeout, lambda: next(self.pieces(job.messages, job.stream)))
                self.answered = True
                if reason == "stop" and not text:
                    reason = None
                rows = [(job, cut(text, self.args.stop), reason or "incomplete", tokens)]
                if reason and reason != "abort":
                    return rows
            except TimeoutError as error:
                failure = f"{self.url}: {error}"
            except ValueError as error:
                failure, status, after = error, error.status, error.after
                if status in (400, 413, 422):
                    if not self.refusal:
                        self.refusal = failure
                        tqdm.write(f"refused: {failure}", sys.stderr)
                    return [(job, "", "refused", None)]
                if status < 500 and status not in (0, 200, 408, 409, 429):
                    return self.end(ValueError(f"{failure}: are --endpoint and OPENAI_API_KEY "
                                               "right?"))
        return rows or self.end(ValueError(
            f"{failure}; asked {len(RETRY_SECONDS) + 1} times, what was finished is kept, the same "
            "command goes on"))

    def stream(self, messages):
        """Yields the pieces of one answer as they come; ValueError where that fails."""
        for text, *_ in self.pieces(messages, len(messages), stream=True):
            yield text

    def pieces(self, messages, name, **more):
        """What `completion` yields of the reply. A ValueError says why there is none; its `status`
        is the reply's (0: none came), its `after` the header Retry-After."""
        status, after, told = 0, "", self.url
        try:
            with self.post(messages, name, **more) as reply:
                status, after = reply.status, reply.headers.get("Retry-After", "")
                told += f": status {status} {reply.headers.get('Location', reply.reason)}"
                yield from completion(events(reply))
        except (OSError, ValueError, http.client.HTTPException) as error:
            text = f"{told}: {str(error) or type(error).__name__}"
            if self.key:
                text = text.replace(self.key, "(key)")
            failure = ValueError(" ".join(text.split())[:400])
            reason = getattr(error, "reason", None)
            if isinstance(reason, ConnectionRefusedError | socket.gaierror) and not self.answered:
                status = 404  # nobody is there, and was not before
            failure.status, failure.after = status, after
            raise failure from None

    def post(self, messages, name, **more):
        """Asks for an answer; `name` is that of its random stream."""
        args = self.args
        # OpenAI's reasoning models refuse the old name, older servers do not know the new one
        limit = "max_completion_tokens" if "api.openai.com" in self.url else "max_tokens"
        body = {
            "model": args.endpoint_model,
            "messages": messages,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "seed": Sampling(seed=args.seed).random_numbers(name).getrandbits(31),
            limit: args.max_new_tokens,
        }
        # OpenAI has no stop that is empty, and the others not at all
        if args.stop:
            body["stop"] = args.stop
        if args.top_k:
            body["top_k"] = args.top_k
        if args.repetition_penalty != 1:
            body["repetition_penalty"] = args.repetition_penalty
        request = urllib.request.Request(
            self.url, json.dumps(body | more | args.extra).encode(), self.headers)
        return self.opener.open(request, timeout=args.timeout)


def within(seconds, work):
    """What work() returns or raises; TimeoutError if it is not done after so many seconds, whatever
    it waits for: a thread of its own then goes on alone."""
    outcome = Future()

    def run():
        try:
            outcome.set_result(work())
        except Exception as error:
            outcome.set_exception(error)
    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no end after {seconds:g} seconds") from None


def events(reply):
    """The parts of a body between empty lines: a stream's server-sent events, or all of it."""
    rest = b""
    while chunk := reply.read1():
        *whole, rest = re.split(rb"\r?\n\r?\n", rest + chunk)
        yield from whole
    yield rest


def completion(events):
    """(text, finish reason, tokens or None) of each event, until there is a reason: a whole reply
    is the only one. What the server tells apart as thought comes in the recipe's form. OSError with
    the server's own words for all else: an error, broken JSON, a stream without an end."""
    head = tail = ""  # the tags around the solution, where there is a thought
    for event in events:
        if not re.search(rb'"(delta|message|error)"\s*:', event):
            continue  # a comment, [DONE]
        try:
            reply = json.loads(event[event.find(b"{"):])
            choice = reply["choices"][0]
            part = choice.get("message", choice.get("delta"))
            reason, usage = choice.get("finish_reason"), reply.get("usage") or {}
            thought = part.get("reasoning_content") or part.get("reasoning") or ""
            content = part.get("content") or ""
            if thought and not tail:
                thought = TAGS[0] + "\n\n" + thought
                head, tail = f"\n\n{TAGS[1]}\n\n{TAGS[2]}\n\n", f"\n\n{TAGS[3]}"
            if content:
                content, head = head + content, ""
            text = thought + content + (tail if reason and not head else "")
            tokens = usage.get("completion_tokens")
            yield (text.encode("utf-8", "replace").decode(), reason,
                   tokens if isinstance(tokens, int) else None)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            break
        if reason:
            return
    raise OSError(event.decode("utf-8", "replace") or "no end")


# ----------------------------------------------------------------------------------- what is asked

STRUCTURE_PROMPT = f"""Below is someone's answer to a problem, in which thinking and solution are \
mixed. Write it out again in two marked parts.

First the thought: everything the answer tries, computes, doubts and checks, in its own words and \
in its order, with steps separated by blank lines. Leave nothing out and correct nothing. Then the \
solution: the steps that lead to the answer's result, brief and clean, and the result as the \
answer gives it (in \\boxed{{}}, or as one Python code block).

Use exactly this form and write nothing outside of it:

{TAGS[0]}

(thought)

{TAGS[1]}

{TAGS[2]}

(solution)

{TAGS[3]}

The answer:

"""
DIFFICULTY_PROMPT = """Grade how hard the following problem is for a good student of mathematics \
or programming, from 1 (one obvious step) to 10 (the last problem of an olympiad). Do \
not solve it. Reply with the number alone.

The problem:

"""
VERDICT_FIELDS = ("passed", "extracted", "reason")
RESULT_FIELDS = ("sample", "response", "finish_reason", "num_tokens", "model", "original",
                 "rewriter", *VERDICT_FIELDS)


def system_turns(system):
    """A conversation's start: the system prompt of a name, or that text; nothing for none."""
    text = "" if system in (None, "none") else data.SYSTEM_PROMPTS.get(system, system)
    return [{"role": "system", "content": text}] if text else []


def messages_of(problem, system):
    """The conversation that asks a problem with the recipe's prompts."""
    return [*system_turns(system), {"role": "user", "content": data.recipe_prompt(problem)}]


HeldOutAnswer = namedtuple("HeldOutAnswer", "asked text expected is_right")


def answer_heldout(model, tokenizer, stop_ids, count):
    """Greedy answers to problems of the built-in tasks that no training row has."""
    problems = list(data.builtin_problems("heldout", count))
    chats = [messages_of(problem, None) for problem in problems]
    prompts = [prompt_of(tokenizer, chat) for chat in chats]
    texts = map(tokenizer.decode, generate(model, prompts, 160, stop_ids=stop_ids))
    return [HeldOutAnswer(chat[-1]["content"], text, bare, text.endswith(bare))
            for chat, text, bare in zip(chats, texts, (problem["bare"] for problem in problems))]


def bare(row):
    """A problem without what was answered to it."""
    return {key: value for key, value in row.items() if key not in RESULT_FIELDS}


def sampling_jobs(problems, args):
    """Those of one problem follow each other, so that its prompt is read once."""
    for problem in problems:
        for number in range(args.n):
            yield Job(messages_of(problem, args.system), bare(problem) | {"sample": number},
                      (problem["source"], problem["id"], number))


def rewriting_jobs(samples):
    for row in samples:
        yield Job([{"role": "user", "content": STRUCTURE_PROMPT + row["response"]}], row,
                  sample_key(row))


def difficulty_jobs(problems):
    for problem in problems:
        yield Job([{"role": "user", "content": DIFFICULTY_PROMPT + problem["prompt"]}],
                  bare(problem) | {"sample": 0}, (problem["source"], problem["id"]))


def sampled(job, text, reason, tokens, name):
    return job.row | {"response": text, "finish_reason": reason, "num_tokens": tokens,
                      "model": name}


def rewritten(job, text, reason, tokens, name):
    before = job.row.get("finish_reason") or "stop"
    return job.row | {"response": text.strip(), "original": job.row["response"],
                      "finish_reason": reason if before == "stop" else before,
                      "num_tokens": tokens, "rewriter": name}


def labelled(job, text, reason, tokens, name):
    """The grade is the last number after the thought that is no part of a scale."""
    text = text.rpartition(TAGS[1])[2].rpartition(TAGS[2])[2]
    text = re.sub(r"(?<=\d)[\s(*]*(?:/|(?:out )?of)\s*10\b", "", text)  # 7/10
    text = re.sub(r"\b1\b[^\d.]{1,40}\b10\b|\b10[- ]point|\bout of 10\b", "", text)
    grades = re.findall(r"(?<![\d.])(10|[1-9])(?:\.\d+)?(?!\d)", text)
    return job.row | {"difficulty": int(grades[-1]) if grades and reason == "stop" else None}


class Rule:
    """Rewrites without a model."""

    def __init__(self, store):
        self.store = store

    def answers(self, jobs):
        for i in shared_out(len(jobs), self.store):
            job = jobs[i]
            yield job, by_rule(job.row), "stop", job.row.get("num_tokens")


def by_rule(row):
    """The four tags without a model: the whole response is the thought, its closing part with the
    last code block or the final answer the solution."""
    response = row["response"].strip()
    for tag in TAGS:
        response = response.replace(tag, "").strip()
    blocks = re.findall(r"^```.*?^```[ \t]*$", response, re.M | re.S)
    if row.get("kind") == "code" and blocks:
        solution = blocks[-1]
    else:
        paragraphs = [part for part in re.split(r"\n\s*\n", response) if part.strip()] or [""]
        mark = r"\\boxed|####|answer\s*(?:is|:)"
        last = max((i for i, part in enumerate(paragraphs) if re.search(mark, part, re.I)),
                   default=len(paragraphs) - 1)
        solution = "\n\n".join(paragraphs[last:])
    return "\n\n".join([TAGS[0], response, TAGS[1], TAGS[2], solution, TAGS[3]])


def read_samples(path):
    """The rows to rewrite, without verdicts; ValueError that names file and line of others."""
    for row, line in data.read_rows(Path(path)):
        match {"sample": 0} | row:
            case {"source": str() | int(), "id": str() | int(), "sample": int(), "response": str()}:
                yield {key: value for key, value in row.items() if key not in VERDICT_FIELDS}
            case _:
                raise ValueError(f"{path}:{line}: a sample needs `source`, `id` and `response`")


def chosen_problems(args):
    """--problems within --limit and the difficulties asked for, and a line that says which. Of
    several samples of a problem, as in a file of verify.py, the first counts."""
    problem_of = {}
    for row in data.read_problems(args.problems, split=args.split, where=args.where):
        first = problem_of.setdefault((row["source"], row["id"]), row)
        if row["prompt"] != first["prompt"]:
            raise ValueError(f"{', '.join(args.problems)}: `id` {row['id']!r} of source "
                             f"{row['source']!r} is that of two questions: rename one of them")
    problems = list(problem_of.values())
    chosen, total = problems, f"{len(problems):,} problems"
    if args.min_difficulty is not None or args.max_difficulty is not None:
        low, high = args.min_difficulty or 0, args.max_difficulty or 10
        grades = [problem.get("difficulty", "none") for problem in problems]
        if not all(isinstance(grade, int | None) for grade in grades):
            raise ValueError("--min_difficulty and --max_difficulty want problems whose "
                             "`difficulty` is from 1 to 10: run --label_difficulty first")
        chosen = [problem for problem, grade in zip(problems, grades, strict=True)
                  if grade is not None and low <= grade <= high]
        total += f" ({grades.count(None):,} without a grade, {len(chosen):,} of that difficulty)"
    chosen = chosen[:args.limit]
    return chosen, f"{', '.join(args.problems)}: {len(chosen):,} of {total}"


SETTINGS = (  # what changes the samples
    "model",
    "endpoint_model",
    "rewriter",
    "extra",
    "system",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "seed",
    "max_new_tokens",
    "stop",
    "dtype",
    "min_think",
    "max_think",
    "rewrite",
    "label_difficulty",
)


def run_jobs(args, answerer, jobs, finish, settings, read, rank, store):
    """Answers what is not answered yet, and writes each row as it is there. answerer() is only
    called, and so a model only loaded, if something is left."""
    barrier = dist.barrier if dist.is_initialized() else lambda: None
    jobs, start = list(jobs), time.monotonic()
    name = "rule" if args.rewriter == "rule" else args.endpoint_model or args.model
    with closing(SampleFile(args.out, settings, rank, barrier)) as out:
        left = out.left(jobs)
        if len(left) < len(jobs):
            data.print0(f"{args.out}: {len(jobs) - len(left):,} of {len(jobs):,} are there already")
        if left:
            speaker, start = answerer(), time.monotonic()
            for job, text, reason, num_tokens in with_bar(speaker.answers(left), left, rank, store):
                if rank == 0 or args.tensor_parallel == 1:
                    out.add(finish(job, text, reason, num_tokens, name))
        barrier()
        if rank == 0:
            rows = out.merge([sample_key(job.row) for job in jobs])
            print(read)
            if args.rewriter != "rule":
                system = f"system prompt: {args.system[:60]}" if args.system else NO_SYSTEM
                print(f"{name}: {system}; temperature {args.temperature:g}"
                      + (f", {args.dtype}" if args.dtype else ""))
            new = [rows[sample_key(job.row)] for job in left]
            print_end(args.out, rows, new, time.monotonic() - start)


def with_bar(answers, left, rank, store):
    """The answers, while a bar shows how far all processes are."""
    start, tokens, cut_off = time.monotonic(), 0, 0
    with tqdm(total=len(left), unit=" answers", disable=rank > 0 or None) as progress:
        for answer in answers:
            yield answer
            _, _, reason, num_tokens = answer
            tokens += num_tokens or 0
            cut_off += reason != "stop"
            rate = tokens / (time.monotonic() - start)
            progress.set_postfix_str(f"{rate:.0f} tokens/s here, {cut_off} cut off", refresh=False)
            progress.update((store.add("finished", 1) if store else progress.n + 1) - progress.n)


def print_end(path, rows, new, seconds):
    """What was answered in this run, and what the file holds."""
    if new:
        tokens = sum(row.get("num_tokens") or 0 for row in new)
        cut_off = sum(row.get("finish_reason", "stop") != "stop" for row in new)
        print(f"{len(new):,} answers in {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s, "
              f"{cut_off / len(new):.1%} cut off")
    print(f"{path}: {len(rows):,} rows")


# ----------------------------------------------------------------------------------------- the chat

NO_SYSTEM = "no system prompt but the chat template's"
HELP = ("/reset begins again, /system TEXT sets the system prompt (none: the chat template's), "
        "/help, /quit; Ctrl-C stops an answer")


def say(speaker, messages):
    """Prints an answer as it comes, and returns it; Ctrl-C ends it."""
    said = ""
    with suppress(KeyboardInterrupt), closing(speaker.stream(messages)) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
            said += piece
    print()
    return said


def read_message():
    """A line; of a terminal with what was pasted behind it. Raises EOFError."""
    lines = [input("> ")]
    while sys.stdin.isatty() and select.select([sys.stdin], [], [], 0.05)[0]:
        lines.append(input())
    return "\n".join(lines).strip()


def chat(args, speaker):
    """One answer to --prompt, or a conversation in the terminal."""
    start = system_turns(args.system)
    if args.prompt is not None:
        say(speaker, [*start, {"role": "user", "content": args.prompt}])
        return
    with suppress(ImportError):
        import readline  # noqa: F401 (lines may then have more than 4,095 characters)
    print(HELP)
    messages = start
    while True:
        try:
            text = read_message()
        except (EOFError, KeyboardInterrupt, RuntimeError):  # the last: there is no stdin
            print()
            return
        command, _, system = text.partition(" ")
        if command == "/quit":
            return
        if command in ("/reset", "/system"):
            if system:
                start = system_turns(system.strip())
            messages = start
            system = f"system prompt: {start[0]['content']}" if start else NO_SYSTEM
            print(f"a new conversation; {system}")
        elif text.startswith("/"):
            print(HELP)
        elif text:
            asked = [*messages, {"role": "user", "content": text}]
            try:
                messages = [*asked, {"role": "assistant", "content": say(speaker, asked)}]
            except ValueError as error:
                print(error, file=sys.stderr)


# -------------------------------------------------------------------------------------- the command

def parse_arguments():
    """The flags; ValueError for a value out of range."""
    parser = data.ArgumentParser(description=__doc__)
    parser.register("type", "JSON object", lambda text: {**json.loads(text)})
    add = parser.add
    add("--model",
        "folder, or name on the hub", type="path")
    add("--endpoint",
        "instead of --model: URL of a server of OpenAI's kind, such as "
        "http://localhost:8000/v1; key in OPENAI_API_KEY")
    add("--endpoint_model",
        "the model's name there")
    add("--concurrency",
        "requests at a time", type="count", default=32)
    add("--timeout",
        "seconds for one of them, all its bytes", type="positive", default=600)
    add("--extra",
        'JSON object of more fields for each of them: {"reasoning_effort": "low"}',
        type="JSON object", default={})
    add("--rewrite",
        "samples to split into thought and solution", type="path")
    add("--rewriter",
        "rule: without a model", default="model", choices=("model", "rule"))
    add("--label_difficulty",
        "only grade the --problems, from 1 to 10", action="store_true")
    add("--min_difficulty",
        "only problems of this grade or above", type=int)
    add("--max_difficulty",
        "only problems of this grade or below", type=int)
    add("--problems",
        "sample answers to files, data sets, builtin:heldout, or a benchmark: "
        + ", ".join(data.EVALUATIONS), nargs="+", type="path")
    data.add_selection(add)
    add("--out",
        "the samples, a JSON object a line; goes on where it stopped",
        default="samples.jsonl", type="path")
    add("--n",
        "samples of each problem (1, or the benchmark's own number)", type="count")
    add("--limit",
        "only so many problems, the first", type="count")
    add("--prompt",
        "answer this once, and end")
    add("--system",
        "skyt1, qwq, or a text (none: the model's chat template has its own)")
    add("--temperature",
        "0: the most likely token (0.7, or the benchmark's own of one sample)", type=float)
    add("--top_p",
        "only the most likely tokens of this mass", type=float, default=1.0)
    add("--top_k",
        "only so many of the most likely tokens; 0: all", type=int, default=0)
    add("--repetition_penalty",
        "makes earlier tokens less likely", type=float, default=1.0)
    add("--seed",
        "of the random numbers", type=int, default=0)
    add("--max_new_tokens",
        "longest answer (16384, or 3/4 of the model's positions)", type="count")
    add("--stop",
        "texts that end an answer", nargs="*", default=[])
    add("--min_think",
        "a thought of fewer tokens goes on with Wait", type="count")
    add("--max_think",
        "a thought of so many tokens is ended", type="count")
    add("--max_batch_tokens",
        "tokens of the key/value cache (what memory allows)", type="count")
    add("--max_slots",
        "answers at a time (16 on a CPU, 64 on CUDA)", type="count")
    add("--dtype",
        "(bfloat16 on CUDA, float32 on a CPU, and there for a bfloat16 that is slow)",
        choices=("float32", "bfloat16"))
    add("--compile",
        "torch.compile the blocks (for GPUs)", action="store_true")
    add("--tensor_parallel",
        "ranks that share one model", type="count", default=1)
    args = parser.parse_args()
    args.rewriter = args.rewriter if args.rewrite else None
    for says_nothing, why in wrong_combinations(args):
        if says_nothing:
            raise ValueError(why)
    args.n, args.temperature = number_and_temperature(args)
    args.system = None if args.system == "none" else args.system
    Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty)  # checks them
    return args


def number_and_temperature(args):
    """--n and --temperature as given, else those of the benchmarks named, which must agree; one
    answer to the built-in problems that are held out is the likeliest, several are drawn."""
    own = {(e.n, e.temperature) for name in args.problems or ()
           if (e := data.find_evaluation(name))}
    if any(re.match("builtin:(heldout|harder)", name) for name in args.problems or ()):
        own.add((1, 0.0))
    if len(own) > 1 and None in (args.n, args.temperature):
        raise ValueError(f"{', '.join(args.problems)} are sampled differently: run them one by "
                         "one, or give --n and --temperature")
    n, temperature = own.pop() if own else (1, 0.7)
    n = args.n or n
    if args.temperature is not None:
        return n, args.temperature
    return n, 0.7 if n > 1 else temperature


def wrong_combinations(args):
    """(whether it is so, what to do) of flags that say nothing together."""
    several, split = int(os.environ.get("WORLD_SIZE", 1)), args.tensor_parallel
    thinks = args.min_think is not None or args.max_think is not None
    chats = not (args.problems or args.rewrite)
    return [
        (args.rewriter != "rule" and bool(args.model) == bool(args.endpoint),
         "name either --model or --endpoint"),
        (args.endpoint and not args.endpoint_model,
         "--endpoint wants --endpoint_model, the model's name there"),
        (args.endpoint and several > 1,
         "one process can ask a server as much as several: raise --concurrency"),
        (several > 1 and chats and not (args.prompt and split > 1),
         "a chat is one process: leave out torchrun (several answer one --prompt with "
         "--tensor_parallel)"),
        (args.endpoint and thinks,
         "--min_think and --max_think want a --model: a server's answers cannot be forced"),
        ((args.min_think or 0) > (args.max_think or math.inf), "--min_think is above --max_think"),
        (sum(map(bool, (args.problems, args.rewrite, args.prompt))) > 1,
         "--problems, --rewrite and --prompt are runs of their own: name one"),
        (args.label_difficulty and not args.problems, "--label_difficulty wants --problems"),
        (args.compile and (args.endpoint or split > 1),
         "--compile wants a --model that is whole in each process"),
        (split not in (1, several), f"--tensor_parallel {split} wants as many processes: torchrun "
         f"--nproc_per_node={split}"),
    ]


def start_processes(args):
    """(rank, device, store) of this process under torchrun; alone the store is None."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = data.own_device()
    if world_size == 1:
        return rank, device, None
    store, _, _ = next(dist.rendezvous("env://"))
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.PrefixStore("group", store),
                            rank=rank, world_size=world_size, timeout=timedelta(hours=4),
                            device_id=device if on_gpu else None)
    if args.tensor_parallel > 1:  # all work on each answer; one may wait for the dead, and not hear
        return rank, device, None

    def stop(*_):
        raise dist.DistError("another process died, or torchrun was stopped: the same command "
                             "goes on")
    signal.signal(signal.SIGTERM, stop)
    return rank, device, store


def main():
    """Who answers, what is asked, and then the run; without problems a chat."""
    args = parse_arguments()
    rank, device, store = start_processes(args)
    chats, longest = not (args.problems or args.rewrite), 16384
    if args.model:
        config = Qwen2Config.from_pretrained(data.find_model(args.model, weights=False))
        longest = min(longest, config.max_position_embeddings * 3 // 4)
        args.max_slots = 1 if chats else args.max_slots or SLOTS[device.type]
        asked = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
        args.dtype = computed_in(asked, config, device, args.max_slots)
        if args.dtype != asked:
            data.print0("this CPU has no bf16 arithmetic: float32 instead")
    args.max_new_tokens = args.max_new_tokens or longest
    endpoint = Endpoint(args) if args.endpoint else None  # refuses a wrong address or key at once

    def answerer():
        if args.rewriter == "rule":
            return Rule(store)
        return endpoint or Local(args, rank, device, store)
    if chats:
        if rank > 0:
            sys.stdout = open(os.devnull, "w")
        return chat(args, answerer())
    if args.rewrite:
        samples = list(read_samples(args.rewrite))
        jobs, finish = rewriting_jobs(samples), rewritten
        read = f"{args.rewrite}: {len(samples):,} samples"
    else:
        problems, read = chosen_problems(args)
        jobs, finish = ((difficulty_jobs(problems), labelled) if args.label_difficulty
                        else (sampling_jobs(problems, args), sampled))
    settings = {name: getattr(args, name) for name in SETTINGS}
    run_jobs(args, answerer, jobs, finish, settings, read, rank, store)


if __name__ == "__main__":
    data.run(main, "lower --max_batch_tokens or --max_slots, or raise --tensor_parallel",
             "the same command goes on")
