"""Generation: chat, teacher samples, evaluation runs; a static cache and continuous batching.

    python sample.py --model DIR                                          # chat in the terminal
    python sample.py --model DIR --prompt "What is 2+2?"                  # one answer
    python sample.py --model DIR --problems gsm8k.jsonl --n 4 --out samples.jsonl
    torchrun --nproc_per_node=8 sample.py --model DIR --problems ...      # the problems shared out

Each sample has a random stream of its own, named by seed, problem and number: it does not depend on
the batch, the order, the number of processes, or on what a killed run had finished. In fp32 logits
of another batch may differ in their last bits, which hardly ever changes a drawn token (see
choose); in bf16 this holds for one number of slots.
"""
import hashlib
import http.client
import json
import math
import os
import random
import re
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from array import array
from collections import deque
from concurrent import futures
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
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
FIRST = (128, 1024)                 # tokens tried before all others (few_first)
# Not cuDNN's, which PyTorch may prefer: it makes a plan for each length of a prompt.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
RETRY_SECONDS = (1, 2, 4, 8, 16, 32)
VERDICT_FIELDS = ("passed", "extracted", "reason")
RESULT_FIELDS = ("sample", "response", "finish_reason", "num_tokens", "model", "original",
                 "rewriter", *VERDICT_FIELDS)


# ----------------------------------------------------------------------------------------- sampling

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


def stream_key(seed, stream):
    """The 64-bit name of a random stream."""
    digest = hashlib.blake2b(f"{seed}\0{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mixed(z):
    """SplitMix64's output function (Steele et al., OOPSLA 2014) of int64: alike on every device."""
    def shifted(z, bits):  # logical: int64 shifts copy the sign
        return (z >> bits) & ((1 << (64 - bits)) - 1)
    z = (z ^ shifted(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ shifted(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ shifted(z, 31)


def uniform(keys, counts, ids):
    """Numbers in [0, 1) of streams: keys, counts (B,) int64, ids (B, K) -> (B, K) float64; each
    depends on its key, count and id alone."""
    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    z = mixed(mixed(keys + (counts + 1) * golden)[:, None] + (ids + 1) * golden)
    return ((z >> 11) & ((1 << 53) - 1)).double() * 2.0 ** -53


def choose(logits, sampling, keys, counts, seen=None):
    """A token for each row: logits (B, V), keys and counts (B,) of the rows' streams, seen (B, V)
    bool for a repetition penalty -> (B,). Each row depends on itself alone.

    A draw is a race: the largest log p + Gumbel noise (arXiv 1411.0030), where each id has noise of
    its own. So logits that differ in their last bits, as those of another batch may, hardly ever
    change a token; a walk along the cumulated p would meet them at any of its steps.
    """
    logits = logits.float()
    B, V = logits.shape
    if sampling.num_ids is not None and sampling.num_ids < V:
        logits[:, sampling.num_ids:] = -torch.inf
    if (penalty := sampling.repetition_penalty) != 1.0:  # arXiv 1909.05858, as transformers has it
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature < 1e-6:  # 0, or so near that logits might overflow
        return logits.max(-1).indices  # on a CPU faster than argmax
    logits = logits / sampling.temperature
    first_tried = not sampling.top_k and sampling.top_p >= 1 and few_first(logits)
    if sampling.top_k:
        score, ids = logits.topk(min(sampling.top_k, V))
    elif first_tried:
        score, ids = logits.topk(FIRST[0])
    else:
        score, ids = logits, torch.arange(V, device=logits.device).expand(B, V)
    if sampling.top_p < 1:
        score, order = descending(score.log_softmax(-1), sampling.top_p)
        ids, p = ids.gather(-1, order), score.double().exp()
        score = score.masked_fill(p.cumsum(-1) - p >= sampling.top_p, -torch.inf)
    score = score.double() - (-uniform(keys, counts, ids).log()).log()  # Gumbel: -log(-log u)
    best, place = score.max(-1, keepdim=True)
    chosen = ids.gather(-1, place)[:, 0]
    if first_tried:
        beyond_first(chosen, best[:, 0], logits, ids, keys, counts)
    return chosen


def few_first(logits):
    """On a CPU the most likely tokens are tried before the whole vocabulary; on CUDA the question
    whether they are enough would cost a wait."""
    return logits.device.type == "cpu" and logits.shape[-1] > FIRST[-1]


def beyond_first(chosen, best, logits, first, keys, counts):
    """All tokens but the first enter the race as one; where it wins, it is drawn which. Changes
    chosen (B,) in place; best (B,) is what the first (B, K) ids ran."""
    rest = logits.scatter(-1, first, -torch.inf)
    B, V = logits.shape
    u = uniform(keys, counts, torch.arange(V, V + 2).expand(B, 2))  # of ids that no token has
    rows = (rest.logsumexp(-1).double() - (-u[:, 0].log()).log() > best).nonzero()[:, 0]
    if len(rows):
        total = rest[rows].double().softmax(-1).cumsum(-1)
        chosen[rows] = torch.searchsorted(total, u[rows, 1:] * total[:, -1:], right=True)[:, 0]


def descending(log_p, mass):
    """(log p, ids) from the most likely on, equal ones by id; enough for `mass`, or all."""
    for first in FIRST if few_first(log_p) else ():
        top, index = log_p.topk(first)
        index, order = index.sort(-1)
        top, order = top.gather(-1, order).sort(descending=True, stable=True)
        # what equals the last may go on beyond the first
        if ((top.double().exp() * (top > top[:, -1:])).sum(-1) >= mass).all():
            return top, index.gather(-1, order)
    return log_p.sort(descending=True, stable=True)


# ------------------------------------------------------------------------------------------- engine

@dataclass
class Request:
    """A prompt (token ids) and the name of its random stream. `forced`, a function of the tokens so
    far, may return tokens to take instead of the next one."""
    prompt: list
    stream: object
    max_new_tokens: int
    tag: object = None
    forced: object = None
    tokens: list = field(default_factory=list)
    queue: deque = field(default_factory=deque)


class Engine:
    """Continuous batching over a static cache: prompts are read one at a time into free slots, all
    occupied slots step together, a finished one is refilled at once.

    In fp32 on a CPU finished rows are dropped from the batch; otherwise its shape is constant,
    as bf16 products of another shape may round otherwise (and CUDA graphs want it so).
    """

    def __init__(self, model, num_slots, length, sampling, stop_ids=(), finished=None):
        parameter = next(model.parameters())
        self.model, self.sampling, self.stop_ids = model, sampling, frozenset(stop_ids)
        self.finished = finished or (lambda request: False)
        self.device, self.length = parameter.device, length
        self.interval = INTERVAL[self.device.type]
        self.compact = self.device.type == "cpu" and parameter.dtype == torch.float32
        cells = cells_of(length, self.device.type)
        self.cache = KVCache(model.config, num_slots, cells, parameter.dtype, self.device,
                             getattr(model, "num_key_value_heads", None))
        self.rows = [None] * num_slots       # the requests
        self.prompts = [None] * num_slots    # what a slot's cache begins with, and its logits
        self.input_ids, self.positions, self.keys, self.counts, self.live = (
            torch.zeros(num_slots, dtype=torch.long, device=self.device) for _ in range(5))
        self.positions += cells - 1
        self.seen = torch.zeros(num_slots, model.config.vocab_size, dtype=torch.bool,
                                device=self.device) if sampling.repetition_penalty != 1 else None
        self.graphs = {}
        if self.device.type == "cuda":  # one of each for all graphs: none outlives its step
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
        self.num_steps = self.num_tokens = 0

    @torch.inference_mode()
    def run(self, requests):
        """Yields (request, "stop" or "length") as they finish; the stop token is not in .tokens."""
        requests = iter(requests)
        while True:
            for slot in range(len(self.rows)):
                while self.rows[slot] is None and (request := next(requests, None)) is not None:
                    yield from self.admit(request, slot)
            active = [slot for slot, row in enumerate(self.rows) if row is not None]
            if not active:
                return
            for tokens in self.steps(active):
                for slot, token in zip(active, tokens, strict=True):
                    if self.rows[slot] is not None:
                        yield from self.take(slot, token)
            if self.compact:
                self.close_gaps()

    def admit(self, request, slot):
        """Reads a prompt into a slot, or copies it from another, and chooses its first token."""
        prompt, T = tuple(request.prompt), len(request.prompt)
        ids = torch.tensor(request.prompt, device=self.device)
        source = next((i for i, old in enumerate(self.prompts) if old and old[0] == prompt), None)
        if source is None:
            with sdpa_kernel(ATTENTION):
                logits = self.cache.prefill(self.model, ids, slot)
        else:
            logits = self.prompts[source][1]
            if source != slot:
                self.cache.copy(source, slot, T)
        self.prompts[slot], self.rows[slot] = (prompt, logits), request
        self.keys[slot] = stream_key(self.sampling.seed, request.stream)
        self.counts[slot], self.positions[slot], self.live[slot] = 0, T, 1
        if self.seen is not None:
            self.seen[slot] = False
            self.seen[slot, ids] = True
        self.draw(logits[None].clone(), slice(slot, slot + 1))
        yield from self.take(slot, int(self.input_ids[slot]))

    def draw(self, logits, rows):
        """Chooses the next tokens of a slice of the slots."""
        keys, counts = self.keys[rows], self.counts[rows]
        seen = None if self.seen is None else self.seen[rows]
        self.input_ids[rows] = choose(logits, self.sampling, keys, counts, seen)
        if hasattr(self.model, "num_key_value_heads"):  # split: all ranks go on with one token
            dist.broadcast(self.input_ids[rows], 0)
        self.counts[rows] += 1

    def take(self, slot, token):
        """Gives a row its next token; yields the row if that was its last."""
        request = self.rows[slot]
        if request.forced and not request.queue:
            request.queue.extend(request.forced(request.tokens, token, self.stop_ids) or ())
        if request.queue:
            token = request.queue.popleft()
            self.input_ids[slot] = token
        reason = "stop" if token in self.stop_ids else None
        if reason is None:
            request.tokens.append(token)
            self.num_tokens += 1
            if self.seen is not None:
                self.seen[slot, token] = True
            if self.finished(request):
                reason = "stop"
            elif len(request.tokens) >= request.max_new_tokens:
                reason = "length"
        if reason:
            self.rows[slot] = None
            if not self.compact:  # the row steps on in the cache's last cell, which no row reads
                self.live[slot], self.positions[slot] = 0, self.cache.length - 1
            yield request, reason

    def steps(self, active):
        """The tokens that the active rows chose in each of the next steps. Looks are rare on CUDA,
        where each one waits for the device; forced tokens and penalties need one every time."""
        often = self.seen is not None or any(self.rows[slot].forced for slot in active)
        n = 1 if often else self.interval
        B = max(active) + 1 if self.compact else len(self.rows)
        longest = max(len(self.rows[slot].prompt) + len(self.rows[slot].tokens) for slot in active)
        multiple = LENGTH_STEP[self.device.type]
        length = min(-(-(longest + n) // multiple) * multiple, self.cache.length)
        step = (self.captured(B, length) if self.device.type == "cuda"
                else lambda: self.step(B, length))
        history = []
        for _ in range(n):
            step()
            history.append(self.input_ids[:B].clone())
        self.num_steps += n
        return torch.stack(history)[:, active].tolist()

    def step(self, B, length):
        """One token for each of the first B slots, from and into the engine's tensors."""
        with sdpa_kernel(ATTENTION):
            logits = self.cache.decode(self.model, self.input_ids[:B], self.positions[:B], length)
        self.draw(logits, slice(B))
        self.positions[:B] += self.live[:B]

    def captured(self, B, length):
        """The step as a CUDA graph: one launch a token, for these shapes."""
        if (B, length) not in self.graphs:
            changed = self.input_ids, self.positions, self.counts
            before = [tensor.clone() for tensor in changed]
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(2):  # warm-up: kernels are chosen, workspaces allocated
                    self.step(B, length)
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                self.step(B, length)
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
            self.graphs[B, length] = graph
        return self.graphs[B, length].replay

    def close_gaps(self):
        """Moves the last rows into the slots of finished ones: a batch is the first rows."""
        occupied = [slot for slot, row in enumerate(self.rows) if row is not None]
        for target in range(len(occupied)):
            if self.rows[target] is None:
                source = occupied.pop()
                self.cache.copy(source, target, int(self.positions[source]))
                for tensor in (self.input_ids, self.positions, self.keys, self.counts, self.live):
                    tensor[target] = tensor[source]
                if self.seen is not None:
                    self.seen[target] = self.seen[source]
                self.rows[target], self.rows[source] = self.rows[source], None
                self.prompts[target] = self.prompts[source]


def cells_of(length, device_type):
    """Cells of the cache for a row of `length` tokens, those that it steps beyond its end among
    them: in whole steps of 64, as attention over a remainder rounds otherwise in bf16."""
    return -(-(length + INTERVAL[device_type]) // 64) * 64


def free_memory(device):
    """Bytes that this process may still take: of the GPU, or of its host's or control group's."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps of freed tensors is free to us
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    free, group = [], Path("/sys/fs/cgroup")
    if found := re.search(r"MemAvailable: +(\d+) kB", read_if_there("/proc/meminfo")):
        free.append(int(found[1]) * 1024)
    if (limit := read_if_there(group / "memory.max").strip()).isdigit():
        used = re.search(r"^anon (\d+)", read_if_there(group / "memory.stat"), re.M)
        free.append(int(limit) - int(used[1] if used else 0))
    free = min(free, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return 0.8 * free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def read_if_there(path):
    return Path(path).read_text() if os.path.exists(path) else ""


def weight_bytes(config, dtype, device, ranks=1):
    """Of one rank's weights; on a CPU a tied head may be a copy of its own (see fuse)."""
    embeddings = config.vocab_size * config.hidden_size
    one = config.tie_word_embeddings and torch.device(device).type == "cuda"
    blocks = config.matmul_parameters - embeddings
    return (blocks / ranks + (1 if one else 2) * embeddings) * dtype.itemsize


def check_weights_fit(config, dtype, device, ranks):
    """ValueError if a rank's weights are more than its device has free."""
    free, gib = free_memory(device), 2 ** 30
    wanted = weight_bytes(config, dtype, device, ranks)
    if wanted <= free:
        return
    remedies = ["--dtype bfloat16"] * (dtype == torch.float32 and wanted / 2 < free)
    if torch.device(device).type == "cuda":
        enough = [n for n in (2, 4, 8, 16) if n > ranks and config.num_key_value_heads % n == 0
                  and weight_bytes(config, dtype, device, n) < free]
        remedies += [f"--tensor_parallel {n}" for n in enough[:1]]
    remedy = (" or ".join(remedies) + " would fit" if remedies
              else "take a smaller model or an --endpoint")
    raise ValueError(f"the weights take {wanted / gib:.1f} GiB, {device} has {free / gib:.1f} "
                     f"free: {(wanted - free) / gib:.1f} are missing; {remedy}")


def plan_slots(model, length, max_batch_tokens=None, most=None):
    """How many rows of `length` tokens the cache may have, from the memory that the device has
    free. Raises ValueError that says how much is missing."""
    config, parameter = model.config, next(model.parameters())
    heads = getattr(model, "num_key_value_heads", config.num_key_value_heads)
    token_bytes = 2 * config.num_hidden_layers * heads * config.head_dim * parameter.dtype.itemsize
    most = most or SLOTS[parameter.device.type]
    if max_batch_tokens is None:
        # a row's logits, probabilities, their order and sums, mostly in float64 (on CUDA both in
        # warm-up and graph); a prompt's MLP
        work = ((64 if parameter.device.type == "cpu" else 160) * most * config.vocab_size
                + 16 * length * config.intermediate_size)
        max_batch_tokens = int((free_memory(parameter.device) - work) // token_bytes)
    if heads < config.num_key_value_heads:  # all ranks of a split model step together
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


def generate(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, top_k=0, seed=0,
             stop_ids=(), streams=None, num_slots=None):
    """The new tokens of each prompt (lists of ids), in order, without the stop token. `streams`
    names each prompt's random stream (its index by default): equal names, prompts and seeds give
    equal samples, whatever else is in the batch."""
    streams = range(len(prompts)) if streams is None else streams
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} has no token")
        if len(prompt) + max_new_tokens > model.config.max_position_embeddings:
            raise ValueError(
                f"prompt {i} has {len(prompt):,} tokens: with {max_new_tokens:,} new ones that is "
                f"more than the model's {model.config.max_position_embeddings:,} positions")
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    length = max(map(len, prompts)) + max_new_tokens
    num_slots = num_slots or min(plan_slots(model, length), len(prompts))
    sampling = Sampling(temperature, top_p, top_k, seed=seed)
    engine = Engine(model, num_slots, length, sampling, stop_ids)
    answers = [None] * len(prompts)
    requests = (Request(list(prompt), stream, max_new_tokens, tag=i)
                for i, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)))
    for request, _ in engine.run(requests):
        answers[request.tag] = request.tokens
    return answers


@dataclass
class HeldOutAnswer:
    """What a model said to a problem of the built-in tasks, and how a right answer ends."""
    asked: str
    text: str
    expected: str

    @property
    def is_right(self):
        return self.text.endswith(self.expected)


def answer_heldout(model, tokenizer, stop_ids, count):
    """Greedy answers to problems of the built-in tasks that no training row has."""
    problems = list(data.builtin_problems("heldout", count))
    chats = [messages_of(problem, "none") for problem in problems]
    prompts = [tokenizer.encode(tokenizer.render(chat, add_generation_prompt=True))
               for chat in chats]
    answers = generate(model, prompts, 160, stop_ids=stop_ids)
    return [HeldOutAnswer(chat[-1]["content"], tokenizer.decode(ids), problem["bare"])
            for chat, ids, problem in zip(chats, answers, problems)]


# -------------------------------------------------------------------- changing the model's products

def computed_in(dtype, config, device, slots):
    """The dtype in place of the one asked for: float32 for bfloat16 on a CPU that multiplies bf16
    slowly (one row waits for memory anyway), for models of less than a quarter of its memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    slow = dtype == "bfloat16" and device == "cpu" and slots > 1 and not data.cpu_multiplies_bf16()
    fits = slow and 4 * weight_bytes(config, torch.float32, device) < memory
    return "float32" if fits else dtype


class Packed(torch.nn.Module):
    """A linear layer on a CPU, its weight kept in the order in which oneDNN multiplies: F.linear
    has it rearranged in each call, or leaves the product to MKL (1.4 to 1.6 times the time for 16
    rows). The operators are those that torch.compile puts in F.linear's place."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), SLOTS["cpu"])
        self.bias = bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


@torch.no_grad()
def fuse(model, compiles=False):
    """One product for q, k and v, and one for gate and up, and one rotation: fewer, larger calls.
    The parameters become views of the joined weights, so that nothing is stored twice. On a CPU
    weights are `Packed` and the parameters let go; a tied head is then stored twice. `compiles`:
    torch.compile what a block computes beside its attention, which writes into the cache."""
    parameter = next(model.parameters())
    packs = (parameter.device.type == "cpu" and torch.backends.mkldnn.is_available()
             and (parameter.dtype == torch.float32 or data.cpu_multiplies_bf16()) and not compiles)

    def join(*layers):
        sizes, joined = [len(layer.weight) for layer in layers], {}
        for name in ("weight", "bias"):
            if getattr(layers[0], name) is not None:
                joined[name] = torch.cat([getattr(layer, name) for layer in layers])
                for layer, view in zip(layers, joined[name].split(sizes), strict=True):
                    getattr(layer, name).data = view
        if not packs:
            return lambda x: F.linear(x, **joined)
        for layer in layers:
            layer.weight = layer.bias = None
        return Packed(**joined)

    def heads_of(attention):
        D, Hkv = attention.head_dim, len(attention.k_proj.weight) // attention.head_dim
        product = join(attention.q_proj, attention.k_proj, attention.v_proj)

        def heads(x, cos, sin):
            qkv = product(x).unflatten(-1, (-1, D)).transpose(1, 2)  # (B, H + 2 Hkv, T, D)
            qk = rotate(qkv[:, :-Hkv], cos, sin)
            return qk[:, :-Hkv], qk[:, -Hkv:], qkv[:, -Hkv:]
        return heads

    def swiglu_of(mlp):
        product = join(mlp.gate_proj, mlp.up_proj)

        def swiglu(x):
            gate, up = product(x).chunk(2, dim=-1)
            return mlp.down_proj(F.silu(gate) * up)
        return swiglu
    for block in model.model.layers:
        block.self_attn.heads, block.mlp.forward = heads_of(block.self_attn), swiglu_of(block.mlp)
        for module, name in ((block.self_attn, "o_proj"), (block.mlp, "down_proj")):
            if packs and type(getattr(module, name)) is torch.nn.Linear:
                setattr(module, name, Packed(getattr(module, name).weight))
        if compiles:
            block.self_attn.heads, block.feed_forward = (
                torch.compile(part) for part in (block.self_attn.heads, block.feed_forward))
    if packs:
        head = model.lm_head.weight
        head = Packed(model.model.embed_tokens.weight if head is None else head)
        model.lm_head.weight = None
        model.lm_head.forward = lambda x, targets, tied_weight: head(x)
    return model


class Reduced(torch.nn.Module):
    """A row-parallel linear layer: this rank's share of the inputs, summed over the ranks."""

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, x):
        y = F.linear(x, self.weight)
        dist.all_reduce(y)
        return y


def load_split(model_dir, dtype, device, rank, world_size):
    """The model of which each rank holds 1 / world_size of every head and MLP (arXiv 1909.08053):
    it reads only its slices. Embedding and head are whole on each."""
    config = Qwen2Config.from_pretrained(model_dir)
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % world_size:
            raise ValueError(f"--tensor_parallel {world_size} does not divide {name} "
                             f"{getattr(config, name)}")
    with torch.device("meta"):
        model = Qwen2(config).to(dtype)
    stored = check_weights(model, model_dir)
    for name, parameter in list(model.named_parameters()):
        axis = (1 if name.endswith(("o_proj.weight", "down_proj.weight"))
                else 0 if re.search(r"(q|k|v|gate|up)_proj\.", name) else None)
        index = [slice(None)] * parameter.ndim
        if axis is not None:
            part = parameter.shape[axis] // world_size
            index[axis] = slice(rank * part, (rank + 1) * part)
        value = stored[name][tuple(index)].to(device, dtype)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, torch.nn.Parameter(value, requires_grad=False))
    for block in model.model.layers:
        block.self_attn.o_proj = Reduced(block.self_attn.o_proj)
        block.mlp.down_proj = Reduced(block.mlp.down_proj)
    model.num_key_value_heads = config.num_key_value_heads // world_size
    return model.eval()


# ---------------------------------------------------------------------------------- the sample file

class SampleFile:
    """Samples by (source, id, sample), written as they finish and sorted when all are there.

    The settings lie beside it: a file of other settings is refused. A line that a kill has torn is
    cut off. Other processes write parts, which the next start or the end merges.
    """

    def __init__(self, path, settings, rank, barrier):
        self.path, self.rank, self.barrier = Path(path), rank, barrier
        if rank == 0:
            self.check(settings)
            self.merge()
        barrier()
        # of each sample that is there, what was asked
        self.done = {sample_key(row): row.get("prompt") for row in self.read(self.path)}
        own = self.path if rank == 0 else Path(f"{self.path}.part{rank}")
        barrier()
        self.file = open(own, "a", encoding="utf-8")

    def parts(self):
        name = re.escape(self.path.name) + r"\.part\d+"
        return sorted(path for path in self.path.parent.iterdir() if re.fullmatch(name, path.name))

    def check(self, settings):
        """Takes the lock, and refuses a file that another run writes or of other settings."""
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path} is no file: name another --out")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = open(f"{self.path}.settings.json", "a+", encoding="utf-8")
        data.lock(self.lock, self.path)
        self.lock.seek(0)
        try:
            before = dict(json.loads(self.lock.read() or "{}"))
        except (ValueError, TypeError):  # no settings: as if there were none
            before = {}
        if before != settings and any(path.stat().st_size for path in (self.path, *self.parts())
                                      if path.is_file()):
            changed = [name for name in settings if before.get(name) != settings[name]]
            if not os.path.getsize(self.lock.name):
                os.unlink(self.lock.name)
            raise ValueError(f"{self.path} holds samples of other settings ({', '.join(changed)}): "
                             "name another --out, or delete it")
        self.path.touch()
        if before != settings:  # in place, as the lock is on this very file
            self.lock.truncate(0)
            self.lock.write(json.dumps(settings, indent=1) + "\n")
            self.lock.flush()

    @staticmethod
    def read(path):
        """The whole rows of a file; a torn last line is cut off."""
        end = 0
        with open(path, "rb+") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                try:
                    row = json.loads(line)
                    sample_key(row)
                    yield row
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}: a broken row ({error}): mend or delete it") from None
            file.truncate(end)

    def merge(self, order=None):
        """Adds the other processes' parts; with the order of all samples, sorts by it."""
        parts = self.parts()
        if not parts and order is None:
            return
        rows = {sample_key(row): row for path in (self.path, *parts) for row in self.read(path)}
        keys = dict.fromkeys(key for key in (*(order or ()), *rows) if key in rows)
        atomic_write(self.path, (line_of(rows[key]).encode() for key in keys))
        for part in parts:
            part.unlink()

    def left(self, jobs):
        """The jobs not done yet; ValueError for two of one name, or another question's answer."""
        names = set()
        for job in jobs:
            name = sample_key(job.row)
            if name in names:
                raise ValueError(f"two samples are number {name[2]} of problem {name[1]!r} of "
                                 f"{name[0]!r}: rewrite the files one by one")
            names.add(name)
            if name in self.done and self.done[name] != job.row.get("prompt"):
                raise ValueError(f"{self.path} holds an answer to another question of the name "
                                 f"{name[1]!r} of {name[0]!r}: name another --out, or delete it")
        return [job for job in jobs if sample_key(job.row) not in self.done]

    def add(self, row):
        try:
            self.file.write(line_of(row))
            self.file.flush()
        except OSError as error:
            raise ValueError(f"{self.file.name}: {error.strerror}: what is there is kept, the same "
                             "command goes on") from None

    def forget(self):
        """Removes what this process made, if nothing was written: a refused run leaves nothing."""
        self.file.close()
        if os.path.getsize(self.file.name) or self.rank == 0 and self.parts():
            return  # rows are there, or may be in the other processes' parts
        os.unlink(self.file.name)
        if self.rank == 0:
            os.unlink(self.lock.name)

    def close(self, order):
        self.file.close()
        self.barrier()
        if self.rank == 0:
            self.merge(order)
            self.lock.close()


def sample_key(row):
    return row["source"], row["id"], row.get("sample", 0)


def line_of(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


# ------------------------------------------------------------------------------------- who answers

@dataclass
class Job:
    """A conversation to be answered, the row that it is for, and the name of its random stream."""
    messages: list
    row: dict
    stream: object


class Local:
    """Answers by a model of this process (or, with --tensor_parallel, of all)."""

    def __init__(self, args, model, tokenizer, stop_ids, store):
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.stop_ids, self.store, self.prompts = stop_ids, store, {}

    def answers(self, jobs, told):
        """Yields (job, text, finish reason, tokens) as they finish; told(tokens a second)."""
        args, tokenizer = self.args, self.tokenizer
        length = max(len(self.prompt(job)) for job in jobs) + args.max_new_tokens  # reads all once
        engine = engine_of(args, self.model, tokenizer, self.stop_ids, length, args.max_slots)
        forced = think_limits(args, tokenizer)
        requests = (Request(self.prompt(job), job.stream, args.max_new_tokens, job, forced())
                    for job in share(jobs, self.store))
        start = time.monotonic()
        for request, reason in engine.run(requests):
            text = cut(tokenizer.decode(request.tokens), args.stop)
            told(engine.num_tokens / (time.monotonic() - start))
            yield request.tag, text, reason, len(request.tokens)

    def prompt(self, job):
        """The token ids of a job's prompt; ValueError if they leave no room for the answer."""
        text = self.tokenizer.render(job.messages, add_generation_prompt=True)
        if text not in self.prompts:
            ids, new = self.tokenizer.encode(text), self.args.max_new_tokens
            most = self.model.config.max_position_embeddings
            if len(ids) + new > most:
                raise ValueError(
                    f"problem {job.row['id']} has {len(ids):,} tokens: with --max_new_tokens "
                    f"{new:,} that is more than the model's {most:,} positions")
            self.prompts[text] = array("i", ids)
        return self.prompts[text].tolist()


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key is for one host."""

    def redirect_request(self, request, file, code, message, headers, url):
        raise ValueError(f"{request.full_url} leads on to {url}: name that as --endpoint")


class Refused(ValueError):
    """A server that works, but not on this request: a prompt too long for it, for one."""


class Endpoint:
    """Answers by a server that speaks OpenAI's chat completions: vLLM, SGLang, llama.cpp, OpenAI.
    The key comes from OPENAI_API_KEY and is shown nowhere."""

    def __init__(self, args):
        self.args, self.url = args, args.endpoint.rstrip("/") + "/chat/completions"
        self.headers = {"Content-Type": "application/json"}
        # OpenAI's reasoning models refuse the old name, older servers do not know the new one
        self.limit = "max_completion_tokens" if "api.openai.com" in self.url else "max_tokens"
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            if not (key.isascii() and key.isprintable()):
                raise ValueError("OPENAI_API_KEY holds characters that no key has")
            self.headers["Authorization"] = f"Bearer {key}"
        self.opener, self.reached = urllib.request.build_opener(NoRedirect), False

    def answers(self, jobs, told):
        """As Local.answers, --concurrency requests at a time. An error ends all, after what others
        have answered; refused requests do so if none was answered, else are told at the end."""
        start, tokens, answered, refused = time.monotonic(), 0, 0, []
        jobs, pending, error = iter(jobs), set(), None
        with futures.ThreadPoolExecutor(self.args.concurrency) as threads:
            while True:
                room = 0 if error else self.args.concurrency - len(pending)
                pending |= {threads.submit(self.answer, job) for job in islice(jobs, room)}
                if not pending:
                    break
                try:
                    finished, pending = futures.wait(pending, return_when=futures.FIRST_COMPLETED)
                except KeyboardInterrupt as interrupt:
                    if error:
                        os._exit(130)
                    error = interrupt
                    print(f"waiting for {len(pending)} answers; Ctrl-C again drops them",
                          file=sys.stderr)
                    continue
                for future in finished:
                    problem = future.exception()
                    if isinstance(problem, Refused):
                        refused.append(problem)
                        if answered or len(refused) <= self.args.concurrency:
                            continue
                    if problem:
                        error = error or problem
                        continue
                    answered += 1
                    tokens += future.result()[3] or 0
                    told(tokens / (time.monotonic() - start))
                    yield future.result()
        if error:
            raise error
        if refused:
            raise ValueError(f"{refused[0]}: so {len(refused)} of {answered + len(refused)} "
                             "requests were refused; the answers of the others are kept")

    def answer(self, job):
        """One job's result as `answers` yields it; ValueError for a reply in another form."""
        args = self.args
        body = {"model": args.endpoint_model, "messages": job.messages, "top_p": args.top_p,
                "temperature": args.temperature, self.limit: args.max_new_tokens,
                "seed": stream_key(args.seed, job.stream) & 0x7FFFFFFF}
        # not OpenAI's own, so sent only where they say something
        body |= {name: value for name, value, default in (
            ("stop", args.stop, []), ("top_k", args.top_k, 0),
            ("repetition_penalty", args.repetition_penalty, 1.0)) if value != default}
        reply = self.post(body)
        try:
            choice = reply["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            # a server may split the thought off; what was cut inside it has no content
            text = "\n\n".join(filter(None, (message.get("reasoning_content"), message["content"])))
            text = text.encode("utf-8", "replace").decode()  # a lone half of a character
            tokens = (reply.get("usage") or {}).get("completion_tokens")
            tokens = tokens if isinstance(tokens, int) else None
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError(f"{self.url} answers in no form of chat completions: "
                             f"{self.without_key(json.dumps(reply))[:200]}") from None
        return job, cut(text, args.stop), "length" if reason == "length" else "stop", tokens

    def without_key(self, text):
        """What a server said, which may repeat what it was sent."""
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return text.replace(key, "(key)") if key else text

    def post(self, body):
        """The server's JSON; a busy, failing or silent one is asked again at growing intervals."""
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self.headers)
        for wait in (*RETRY_SECONDS, None):
            asked = 0
            try:
                with self.opener.open(request, timeout=self.args.timeout) as reply:
                    self.reached = True
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                self.reached = True
                problem = f"status {error.code} {self.without_key(said(error))[:300]}"
                if error.code != 429 and error.code < 500:
                    hint = ": is OPENAI_API_KEY right?" if error.code in (401, 403) else ""
                    kind = Refused if error.code in (400, 413, 422) else ValueError
                    raise kind(f"{self.url}: {problem}{hint}") from None
                after = error.headers.get("Retry-After") or ""
                asked = min(int(after), 120) if after.isdecimal() else 0
            except (OSError, http.client.HTTPException, json.JSONDecodeError, UnicodeDecodeError,
                    RecursionError) as error:
                reason = getattr(error, "reason", error)
                problem = str(reason) or type(error).__name__
                nobody = isinstance(reason, ConnectionRefusedError | socket.gaierror)
                if nobody and not self.reached:
                    raise ValueError(f"{self.url} cannot be reached ({problem}): is the server "
                                     "running?") from None
            if wait is None:
                raise ValueError(f"{self.url} failed {len(RETRY_SECONDS) + 1} times: {problem}; "
                                 "what was finished is kept, the same command goes on")
            time.sleep(max(asked, wait * random.uniform(0.5, 1.5)))


def said(error):
    """The start of what a server says beside an error's status."""
    try:
        return error.read(2 ** 16).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""


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


def system_turns(system):
    """A conversation's start: the system prompt of a name, or that text; nothing for none."""
    text = None if system == "none" else data.SYSTEM_PROMPTS.get(system, system)
    return [{"role": "system", "content": text}] if text else []


def messages_of(problem, system):
    """The conversation that asks a problem with the recipe's prompts."""
    return [*system_turns(system), {"role": "user", "content": data.recipe_prompt(problem)}]


def share(items, store):
    """This process's items: whoever is free takes the next, so that none waits for long answers.
    Without a store all of them: there is one process, or all work on each answer together."""
    if store is None:
        yield from items
        return
    while (i := store.add("next", 1) - 1) < len(items):
        yield items[i]


def sampling_jobs(problems, args):
    """Those of one problem follow each other, so that its prompt is read once."""
    for problem in problems:
        bare = {key: value for key, value in problem.items() if key not in RESULT_FIELDS}
        for number in range(args.n):
            yield Job(messages_of(problem, args.system), bare | {"sample": number},
                      (problem["source"], problem["id"], number))


def rewriting_jobs(samples):
    for row in samples:
        yield Job([{"role": "user", "content": STRUCTURE_PROMPT + row["response"]}], row,
                  sample_key(row))


def difficulty_jobs(problems):
    for problem in problems:
        yield Job([{"role": "user", "content": DIFFICULTY_PROMPT + problem["prompt"]}],
                  problem | {"sample": 0}, (problem["source"], problem["id"]))


def sampled(job, text, reason, tokens, name):
    return job.row | {"response": text, "finish_reason": reason, "num_tokens": tokens,
                      "model": name}


def rewritten(job, text, reason, tokens, name):
    cut_before = job.row.get("finish_reason") == "length"
    return job.row | {"response": text.strip(), "original": job.row["response"],
                      "finish_reason": "length" if cut_before else reason,
                      "num_tokens": tokens, "rewriter": name}


def labelled(job, text, reason, tokens, name):
    text = re.sub(r"\b1\s*(-|–|to)\s*10\b|(/|out of)\s*10\b", "", text)  # the scale
    grades = re.findall(r"(?<![\d.])(10|[1-9])(?:\.\d+)?(?!\d)", text)
    return job.row | {"difficulty": int(grades[-1]) if grades else None}


def by_rule(row):
    """The four tags without a model: the whole response is the thought, its closing part with the
    last code block or the final answer the solution."""
    response = row["response"].strip()
    for tag in TAGS:
        response = response.replace(tag, "").strip()
    blocks = list(re.finditer(r"^```.*?^```[ \t]*$", response, re.M | re.S))
    if row.get("kind") == "code" and blocks:
        solution = blocks[-1][0]
    else:
        paragraphs = [part for part in re.split(r"\n\s*\n", response) if part.strip()] or [""]
        mark = r"\\boxed|####|answer\s*(?:is|:)"
        last = max((i for i, part in enumerate(paragraphs) if re.search(mark, part, re.I)),
                   default=len(paragraphs) - 1)
        solution = "\n\n".join(paragraphs[last:])
    return "\n\n".join([TAGS[0], response, TAGS[1], TAGS[2], solution, TAGS[3]])


def run_jobs(args, answerer, jobs, finish, settings, rank, barrier, store):
    """Answers what is not answered yet, and writes each row as it is there. answerer() is only
    called, and so a model only loaded, if something is left. What is refused leaves no file."""
    jobs = list(jobs)
    out = SampleFile(args.out, settings, rank, barrier)
    try:
        answer_jobs(args, answerer, jobs, finish, out, rank, store)
    except BaseException:
        out.forget()
        raise
    out.close([sample_key(job.row) for job in jobs])
    if rank == 0:
        print(f"{args.out}: {len(jobs):,} rows")


def answer_jobs(args, answerer, jobs, finish, out, rank, store):
    """Answers the jobs that `out`, a SampleFile, does not hold, and shows how far it is."""
    left = out.left(jobs)
    if rank == 0 and len(left) < len(jobs):
        print(f"{args.out}: {len(jobs) - len(left):,} of {len(jobs):,} are there already",
              file=sys.stderr)
    truncated = 0
    with tqdm(total=len(left), unit=" answers", disable=rank > 0 or None) as progress:
        def told(rate):
            progress.set_postfix_str(f"{rate:.0f} tokens/s here, {truncated} truncated",
                                     refresh=False)
        for job, text, reason, tokens in answerer().answers(left, told) if left else ():
            truncated += reason == "length"
            if rank == 0 or args.tensor_parallel == 1:
                out.add(finish(job, text, reason, tokens, args.endpoint_model or args.model))
            finished = store.add("finished", 1) if store else progress.n + 1  # of all processes
            progress.update(finished - progress.n)


def engine_of(args, model, tokenizer, stop_ids, length, most):
    """The engine that the flags ask for, for rows of `length` tokens and at most `most` slots."""
    slots = plan_slots(model, length, args.max_batch_tokens, most)
    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty,
                        args.seed, tokenizer.vocab_size)
    return Engine(model, slots, length, sampling, stop_ids, stops_on(tokenizer, args.stop))


def stops_on(tokenizer, texts):
    """Whether a request's newest tokens hold one of the texts."""
    if not texts:
        return None
    width = 2 + max(len(text.encode()) for text in texts)  # a token is a byte at least

    def finished(request):
        tail = tokenizer.decode(request.tokens[-width:])
        return any(text in tail for text in texts)
    return finished


def cut(text, stops):
    """The text before the first of the stops."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[:min(ends)] if ends else text


def think_limits(args, tokenizer):
    """Budget forcing (s1, arXiv 2501.19393): makes a Request.forced for each request. A thought of
    fewer than --min_think tokens goes on with "Wait", one of --max_think tokens is ended."""
    if args.min_think is None and args.max_think is None:
        return lambda: None
    least, most = args.min_think or 0, args.max_think or math.inf
    wait = tokenizer.encode("Wait")
    end = tokenizer.encode("\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n")

    def limits():
        """The state of one request: whether its thought has ended."""
        ended = False

        def forced(tokens, token, stop_ids):
            nonlocal ended
            if ended:
                return None
            text = tokenizer.decode([token])
            # inside a thought a tag can only be the one that ends it
            tag = TAGS[0] in tokenizer.decode(tokens[:30]) and ("<|" in text or (
                text.startswith("|") and tokenizer.decode(tokens[-1:]).endswith("<")))
            if len(tokens) < least:
                return wait if tag or token in stop_ids else None
            ended = tag or TAGS[1] in tokenizer.decode([*tokens[-30:], token])
            if not ended and len(tokens) >= most:
                ended = True
                return end
            return None
        return forced
    return limits


def answer(engine, tokenizer, messages, args):
    """Prints one answer as it grows and returns it; Ctrl-C ends it."""
    prompt = tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))
    room = engine.model.config.max_position_embeddings - len(prompt)
    if room < 1:
        raise ValueError(f"the conversation has {len(prompt):,} tokens, more than the model's "
                         f"{engine.model.config.max_position_embeddings:,} positions")
    request = Request(prompt, len(messages), min(args.max_new_tokens, room))
    shown, stopped, written = "", False, engine.finished

    def interrupt(number, frame):
        nonlocal stopped
        stopped = True

    def grown(request):
        nonlocal shown
        text = cut(tokenizer.decode(request.tokens), args.stop)
        if not text.endswith("\ufffd"):  # half a character
            print(text[len(shown):], end="", flush=True)
            shown = text
        return stopped or written(request)
    alone = not dist.is_initialized()  # several ranks would not stop after the same token
    before = signal.signal(signal.SIGINT, interrupt) if alone else None
    try:
        engine.finished = grown
        list(engine.run([request]))
    finally:
        engine.finished = written
        if alone:
            signal.signal(signal.SIGINT, before)
    print()
    return shown


def chat(args, model, tokenizer, stop_ids):
    """A conversation in the terminal: /reset, /system TEXT, /quit; Ctrl-C stops an answer."""
    start, length = system_turns(args.system), model.config.max_position_embeddings
    messages = start
    if args.prompt is not None:
        messages = [*start, {"role": "user", "content": args.prompt}]
        prompt = tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))
        length = min(length, len(prompt) + args.max_new_tokens)
    engine = engine_of(args, model, tokenizer, stop_ids, length, 1)
    if args.prompt is not None:
        answer(engine, tokenizer, messages, args)
        return
    print("/reset starts again, /system TEXT sets the system prompt, /quit ends; Ctrl-C stops an "
          "answer")
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt, RuntimeError):  # the last: there is no stdin
            print()
            return
        if text == "/quit":
            return
        command, _, system = text.partition(" ")
        if command in ("/reset", "/system"):
            if command == "/system":
                start = system_turns(system.strip() or "none")
            messages = start
        elif text:
            asked = [*messages, {"role": "user", "content": text}]
            try:
                reply = answer(engine, tokenizer, asked, args)
                messages = [*asked, {"role": "assistant", "content": reply}]
            except ValueError as error:
                print(f"{error}; /reset starts again", file=sys.stderr)


def load(args, rank, device):
    """Model, tokenizer, and the ids that end an answer: end of turn, generation_config.json's."""
    folder = data.find_model(args.model)
    tokenizer = data.load_tokenizer(folder)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    check_weights_fit(Qwen2Config.from_pretrained(folder), dtype, device, args.tensor_parallel)
    if args.tensor_parallel > 1:
        model = load_split(folder, dtype, device, rank, args.tensor_parallel)
    else:
        model = Qwen2.from_pretrained(folder, dtype=dtype, device=device).eval()
    fuse(model, args.compile)
    _, ends = data.read_generation_config(folder)
    stop_ids = {*ends, tokenizer.token_id(tokenizer.end_token)}
    return model, tokenizer, stop_ids


def parse_arguments():
    """The flags; ValueError for a value out of range."""
    parser = data.ArgumentParser(description=__doc__)
    add = parser.add
    add("--model", "folder, or name on the hub", type="path")
    add("--endpoint", "instead of --model: URL of a server of OpenAI's kind, such as "
                      "http://localhost:8000/v1; key in OPENAI_API_KEY")
    add("--endpoint_model", "the model's name there")
    add("--concurrency", "requests at a time", type="count", default=32)
    add("--timeout", "seconds for one of them", type="positive", default=600)
    add("--rewrite", "samples to split into thought and solution", type="path")
    add("--rewriter", "rule: without a model", default="model", choices=("model", "rule"))
    add("--label_difficulty", "only grade the --problems, from 1 to 10", action="store_true")
    add("--min_difficulty", "only problems of this grade or above", type=int)
    add("--max_difficulty", "only problems of this grade or below", type=int)
    add("--problems", "sample answers to files, data sets, builtin:heldout, or a benchmark: "
                      + ", ".join(data.EVALUATIONS), nargs="+", type="path")
    data.add_selection(add)
    add("--out", "the samples, a JSON object a line; goes on where it stopped",
        default="samples.jsonl", type="path")
    add("--n", "samples of each problem (1, or the benchmark's own number)", type="count")
    add("--limit", "only so many problems, the first", type="count")
    add("--prompt", "answer this once, and end")
    add("--system", "skyt1, qwq, none, or a text (skyt1 for problems, none for a chat)")
    add("--temperature", "0: the most likely token (0.7, or the benchmark's own)", type=float)
    add("--top_p", "only the most likely tokens of this mass", type=float, default=1.0)
    add("--top_k", "only so many of the most likely tokens; 0: all", type=int, default=0)
    add("--repetition_penalty", "makes earlier tokens less likely", type=float, default=1.0)
    add("--seed", "of the random streams", type=int, default=0)
    add("--max_new_tokens", "longest answer (16384, or 3/4 of the model's positions)", type="count")
    add("--stop", "texts that end an answer", nargs="*", default=[])
    add("--min_think", "a thought of fewer tokens goes on with Wait", type="count")
    add("--max_think", "a thought of so many tokens is ended", type="count")
    add("--max_batch_tokens", "tokens of the key/value cache (what memory allows)", type="count")
    add("--max_slots", "answers at a time (16 on a CPU, 64 on CUDA)", type="count")
    add("--dtype", "(bfloat16 on CUDA, float32 on a CPU, and there for a bfloat16 that is slow)",
        choices=("float32", "bfloat16"))
    add("--compile", "torch.compile the blocks (for GPUs)", action="store_true")
    add("--tensor_parallel", "ranks that share one model", type="count", default=1)
    args = parser.parse_args()
    check_combination(args)
    benchmark_defaults(args)
    Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty)  # checks them
    return args


def check_combination(args):
    """ValueError for flags that say nothing together."""
    by_rule_alone = args.rewrite and args.rewriter == "rule"
    if not by_rule_alone and bool(args.model) == bool(args.endpoint):
        raise ValueError("name either --model or --endpoint")
    if args.endpoint and not args.endpoint_model:
        raise ValueError("--endpoint wants --endpoint_model, the model's name there")
    if args.endpoint and not (args.problems or args.rewrite):
        raise ValueError("--endpoint wants --problems or --rewrite")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if args.endpoint:
            raise ValueError("one process can ask a server as much as several: raise --concurrency")
        if not (args.problems or args.rewrite or args.prompt and args.tensor_parallel > 1):
            raise ValueError("a chat is one process: leave out torchrun (several answer one "
                             "--prompt with --tensor_parallel)")
    if args.endpoint and (args.min_think is not None or args.max_think is not None):
        raise ValueError("--min_think and --max_think want a --model: a server's answers cannot be "
                         "forced")
    if (args.min_think or 0) > (args.max_think or math.inf):
        raise ValueError("--min_think is above --max_think")
    if sum(map(bool, (args.problems, args.rewrite, args.prompt))) > 1:
        raise ValueError("--problems, --rewrite and --prompt are runs of their own: name one")
    if args.label_difficulty and not args.problems:
        raise ValueError("--label_difficulty wants --problems")
    if args.compile and (args.endpoint or args.tensor_parallel > 1):
        raise ValueError("--compile wants a --model that is whole in each process")


def benchmark_defaults(args):
    """--n and --temperature where not given: those of the benchmarks named, which must agree."""
    wanted = {(e.n, e.temperature) for name in args.problems or ()
              if (e := data.find_evaluation(name))} or {(1, 0.7)}
    if len(wanted) > 1 and None in (args.n, args.temperature):
        raise ValueError(f"{', '.join(args.problems)} are sampled differently: run them one by "
                         "one, or give --n and --temperature")
    n, temperature = wanted.pop()
    args.n = n if args.n is None else args.n
    args.temperature = temperature if args.temperature is None else args.temperature


def read_samples(path):
    """The rows to rewrite, without verdicts; ValueError that names file and line of others."""
    for row, line in data.read_rows(Path(path)):
        kinds = {"source": str | int, "id": str | int, "response": str, "sample": int}
        for name, kind in kinds.items():
            if not isinstance(row.get(name, 0 if name == "sample" else None), kind):
                raise ValueError(f"{path}:{line}: a sample needs `{name}`")
        yield {key: value for key, value in row.items() if key not in VERDICT_FIELDS}


def chosen_problems(args, rank):
    """--problems within --limit and the difficulties asked for."""
    problems = list(data.read_problems(args.problems, split=args.split, where=args.where))
    if args.min_difficulty is not None or args.max_difficulty is not None:
        low, high = args.min_difficulty or 0, args.max_difficulty or 10
        for problem in problems:
            if not isinstance(problem.get("difficulty", ""), int | None):
                raise ValueError(f"problem {problem['id']} has no `difficulty` from 1 to 10: run "
                                 "--label_difficulty first")
        graded = [problem for problem in problems if problem["difficulty"] is not None]
        chosen = [problem for problem in graded if low <= problem["difficulty"] <= high]
        if rank == 0:
            print(f"{len(chosen):,} of {len(problems):,} problems are of the difficulty asked for, "
                  f"{len(problems) - len(graded):,} have no grade", file=sys.stderr)
        problems = chosen
    return problems[:args.limit]


def start_processes(args):
    """(rank, device, store) of this process under torchrun; alone the store is None."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.tensor_parallel not in (1, world_size):
        raise ValueError(f"--tensor_parallel {args.tensor_parallel} wants as many processes: "
                         f"torchrun --nproc_per_node={args.tensor_parallel}")
    device = data.own_device()
    if world_size == 1:
        return rank, str(device), None
    store, _, _ = next(dist.rendezvous("env://"))
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.PrefixStore("group", store),
                            rank=rank, world_size=world_size, timeout=timedelta(hours=4),
                            device_id=device if on_gpu else None)

    def stop(*_):
        raise dist.DistError("another process died, or torchrun was stopped: the same command "
                             "goes on")
    if args.tensor_parallel == 1:  # else this one may wait for the dead, where no signal is heard
        signal.signal(signal.SIGTERM, stop)
    return rank, str(device), store


def rewrite_by_rule(args):
    """--rewriter rule: the whole file at once."""
    rows = [row | {"response": by_rule(row), "original": row["response"], "rewriter": "rule"}
            for row in read_samples(args.rewrite)]
    text, out = "".join(map(line_of, rows)), Path(args.out)
    if out.exists() and out.read_text(encoding="utf-8") != text:
        raise ValueError(f"{args.out} holds something else: name another --out, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, [text.encode()])
    print(f"{args.out}: {len(rows):,} rows")


def main():
    """Who answers, what is asked, and then the run; without problems a chat."""
    args = parse_arguments()
    rank, device, store = start_processes(args)
    if args.rewrite and args.rewriter == "rule":
        return rewrite_by_rule(args) if rank == 0 else None
    barrier = dist.barrier if store else lambda: None
    args.system = args.system or ("skyt1" if args.problems else "none")
    longest, chats = 16384, not args.problems and not args.rewrite
    if args.model:
        config = Qwen2Config.from_pretrained(data.find_model(args.model, weights=False))
        longest = min(longest, config.max_position_embeddings * 3 // 4)
        asked = args.dtype or ("bfloat16" if device != "cpu" else "float32")
        args.dtype = computed_in(asked, config, device,
                                 1 if chats else args.max_slots or SLOTS["cpu"])
        if rank == 0 and args.dtype != asked:
            print("this CPU has no bf16 arithmetic: float32 instead", file=sys.stderr)
    args.max_new_tokens = args.max_new_tokens or longest
    if chats:
        if rank > 0:
            sys.stdout = open(os.devnull, "w")
        return chat(args, *load(args, rank, device))
    if args.rewrite:
        jobs, finish = rewriting_jobs(read_samples(args.rewrite)), rewritten
    elif args.label_difficulty:
        jobs, finish = difficulty_jobs(chosen_problems(args, rank)), labelled
    else:
        jobs, finish = sampling_jobs(chosen_problems(args, rank), args), sampled
    settings = {name: getattr(args, name) for name in (
        "model", "endpoint_model", "temperature", "top_p", "top_k", "repetition_penalty", "seed",
        "max_new_tokens", "system", "stop", "dtype", "min_think", "max_think", "rewrite",
        "label_difficulty")}
    store = store if args.tensor_parallel == 1 else None  # else all work on each answer

    def answerer():
        return Endpoint(args) if args.endpoint else Local(args, *load(args, rank, device), store)
    run_jobs(args, answerer, jobs, finish, settings, rank, barrier, store)


if __name__ == "__main__":
    data.run(main, "lower --max_batch_tokens or --max_slots, or raise --tensor_parallel",
             "the same command goes on")
