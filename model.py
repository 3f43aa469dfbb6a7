"""Qwen2, from 0.5B to 72B: layers, loss, cache, configuration, reading and writing of safetensors.

Also the architecture of Qwen2.5, QwQ-32B-Preview, Sky-T1-32B-Preview and DeepSeek-R1-Distill-Qwen.
Modules and configuration fields carry the names of the published checkpoints, so that loading and
saving need no table of names:

    model = Qwen2.from_pretrained("path/to/Qwen2.5-0.5B-Instruct")
    logits = model(input_ids)                                          # (B, T, V)
    loss = model(input_ids, targets, document_lengths=[900, 1148])     # summed, fp32

Sources: Qwen2.5 (arXiv 2412.15115); RMSNorm (1910.07467), rotary embedding (2104.09864),
grouped-query attention (2305.13245), SwiGLU (2002.05202); the reference the tests compare with is
transformers' models/qwen2/modeling_qwen2.py. Limits: no sliding-window attention, no rope scaling,
no quantised weights: such a config.json is refused by field.

Shapes: B batch, T query tokens, S key tokens, C hidden_size, H query heads, Hkv key/value heads, D
head_dim, I intermediate_size, L num_hidden_layers, V vocab_size, N tokens that have a target, n of
them in a chunk.
"""
import json
import os
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100              # a target that is none: cross_entropy's own default for ignore_index
MLP_TILE = 4096            # tokens of one tile of the MLP under recompute="tiled"
LOSS_CHUNK = {"cuda": 2 ** 27, "cpu": 2 ** 25}  # logits held at once: 512 and 128 MiB in fp32
READ_BYTES = 2 ** 26       # weights are read in pieces of at most this size
SHARD_BYTES = 2 * 10 ** 9  # of one .safetensors file: rank 0 holds three times that as it writes
INDEX = "model.safetensors.index.json"  # which file holds which tensor, where there are several
# What a folder may hold in place of its weights, and what helps.
OTHER_WEIGHTS = {
    "adapter_model.*": "merge the adapter into its model first (merge_and_unload of peft)",
    "pytorch_model*.bin*": "convert it to safetensors first (save_pretrained of transformers)"}


# ------------------------------------------------------------------------------------------- layers

def rotary_embedding(position_ids, head_dim, theta, dtype):
    """position_ids (B, T) -> cos, sin (B, 1, T, D), which rotate each pair (i, i + D/2) of a head
    by position * theta^(-2i/D). Angles are fp32: in bf16 position 257 would already be 256. Made in
    each forward pass, as a stored table would be garbage after a meta-device start."""
    even = torch.arange(0, head_dim, 2, device=position_ids.device)  # 2i of each pair
    inverse_frequency = theta ** -(even / head_dim)  # (D/2,) fp32
    angle = position_ids[:, None, :, None].float() * inverse_frequency  # (B, 1, T, D/2) fp32
    angle = torch.cat([angle, angle], dim=-1)  # (B, 1, T, D)
    cos = angle.cos().to(dtype)
    sin = angle.sin().to(dtype)
    return cos, sin


def rotate(x, cos, sin):
    """Applies the rotary embedding to x (B, H, T, D), paired by halves as in the checkpoints."""
    left, right = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    turned = torch.cat([-right, left], dim=-1)
    return x * cos + turned * sin


# lengths differ in each row: compiled, each new one would cost a compilation
@torch.compiler.disable
def packed_attention(q, k, v, document_lengths):
    """Causal attention within each document of a packed row: one SDPA call a document, never a
    T x T mask. q (B, H, T, D), k and v (B, Hkv, T, D), lengths that sum to T (an int tensor on the
    CPU) -> (B, H, T, D)."""
    # the one CUDA kernel for fp32 without a T x T matrix wants as many k as q
    if q.is_cuda and q.dtype == torch.float32:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    grouped = k.shape[1] < q.shape[1]
    lengths = document_lengths.tolist()
    documents = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), v.split(lengths, dim=2))
    y = [F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=grouped)
         for qkv in documents]
    return y[0] if len(y) == 1 else torch.cat(y, dim=2)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share Hkv key/value heads, so that a cache is H / Hkv
    times smaller. Biases: only q, k and v."""

    def __init__(self, config, layer):
        super().__init__()
        C = config.hidden_size
        D = config.head_dim
        self.layer = layer
        self.head_dim = D
        self.q_proj = nn.Linear(C, config.num_attention_heads * D)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def forward(self, x, cos, sin, document_lengths, cache=None):
        """x (B, T, C), cos and sin (B, 1, T, D) -> (B, T, C)."""
        q, k, v = self.heads(x, cos, sin)
        if cache is None:
            y = packed_attention(q, k, v, document_lengths)  # (B, H, T, D)
        else:  # it may hold tokens read before, which are seen too
            y = cache.attend(self.layer, q, k, v, document_lengths)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, H D) -> (B, T, C)

    def heads(self, x, cos, sin):  # sample.fuse puts one product and one rotation in its place
        def split(y):  # (B, T, H D) -> (B, H, T, D)
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q = rotate(split(self.q_proj(x)), cos, sin)  # (B, H, T, D)
        k = rotate(split(self.k_proj(x)), cos, sin)  # (B, Hkv, T, D)
        v = split(self.v_proj(x))  # (B, Hkv, T, D)
        return q, k, v


class MLP(nn.Module):
    """SwiGLU, C -> I -> C: what `up` computes passes as far as `gate` lets it."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One transformer layer: x + attention(norm(x)), then x + mlp(norm(x)); all (B, T, C). The norm
    is x / sqrt(mean(x²) + eps) * weight, in x's dtype, its mean taken in fp32."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def attend(self, x, *context):
        return x + self.self_attn(self.input_layernorm(x), *context)

    def feed_forward(self, x):
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, *context, recompute="none"):
        """context: what Attention.forward takes beside x. recompute (activation checkpointing):
        "none" saves every activation for the backward pass; "block" only x, and computes the rest
        again; "tiled" does so for each half, the MLP in tiles of MLP_TILE tokens: its activations
        (5 I + 3 C a token) then exist for one tile at a time, and a second (B, T, C) is saved."""
        if recompute == "none":
            return self.feed_forward(self.attend(x, *context))
        if recompute == "block":  # cos and sin stay in the closure: kept once, not for each layer
            return recomputed(lambda x: self.feed_forward(self.attend(x, *context)), x)
        x = recomputed(self.attend, x, *context)
        tiles = [recomputed(self.feed_forward, tile) for tile in x.split(MLP_TILE, dim=1)]
        return torch.cat(tiles, dim=1)


def recomputed(function, *args):
    """function(*args), of which only args (and what its closure holds) is saved for the backward
    pass; FSDP has gathered the block's weights again when that begins. Without dropout there is no
    RNG state to keep."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


# --------------------------------------------------------------------------------------------- loss

class FusedLinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer, summed, without the (N, V) logits: a chunk's logits live
    until its gradients are taken, so memory is that of one chunk and of the weight's gradient. Both
    gradients are ready after the forward pass."""

    @staticmethod
    def forward(ctx, x, weight, targets, with_gradients):
        """x (N, C), weight (V, C), targets (N,) -> sum of -log softmax(x weightᵀ)[target]. In here
        torch.is_grad_enabled() is always false: with_gradients says whether a backward follows."""
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x)
        if with_gradients:  # (V, C) fp32: sums over chunks would lose bits in bf16
            dweight = torch.zeros_like(weight, dtype=torch.float32)
        n = max(1, LOSS_CHUNK[x.device.type] // len(weight))
        chunks = zip(x.split(n), dx.split(n), targets[:, None].split(n))  # (n, C) twice, (n, 1)
        for x_n, dx_n, target in chunks:
            logits = (x_n @ weight.T).float()  # (n, V) fp32: the one large buffer
            logits -= logits.amax(-1, keepdim=True)  # softmax is the same, exp cannot overflow
            loss -= logits.gather(1, target).sum()
            exp = logits.exp_()  # in the logits' place
            sum_exp = exp.sum(-1, keepdim=True)  # (n, 1)
            loss += sum_exp.log().sum()
            if with_gradients:  # d loss / d logits = softmax - onehot(target)
                gradient = exp.div_(sum_exp)
                gradient.scatter_add_(1, target, torch.full_like(sum_exp, -1))
                gradient = gradient.to(x.dtype)
                torch.mm(gradient, weight, out=dx_n)
                if weight.dtype == torch.float32:
                    dweight.addmm_(gradient.T, x_n)  # without a second (V, C)
                else:
                    dweight += gradient.T @ x_n
                del gradient
            del logits, exp  # before the next chunk's are made
        ctx.gradients = (dx, dweight.to(weight.dtype)) if with_gradients else None
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        # scaled in place, so never given out twice
        (dx, dweight), ctx.gradients = ctx.gradients, None
        return dx.mul_(grad_loss), dweight.mul_(grad_loss), None, None


class LMHead(nn.Linear):
    """lm_head. It computes the loss itself, as under FSDP its weight is whole only inside its own
    forward. A tied head is handed the embedding's weight and owns none, as in the checkpoints."""

    def __init__(self, config):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.weight = None

    def forward(self, x, targets=None, tied_weight=None):
        """x (B, T, C) -> logits (B, T, V); with targets (B, T) their summed loss, fp32."""
        weight = self.weight if tied_weight is None else tied_weight
        if targets is None:
            return F.linear(x, weight)
        kept = targets != IGNORE  # prompts never meet the V columns
        return FusedLinearCrossEntropy.apply(x[kept], weight, targets[kept],
                                             torch.is_grad_enabled())


# ---------------------------------------------------------------------------------------- the model

class Qwen2(nn.Module):
    """The whole model. `state_dict()` has the keys of the published checkpoints.

    Attributes that trade time for memory: `recompute` (see Block); `offload`: what recomputation
    saves waits in host memory for the backward pass."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = "none"
        self.offload = False
        layers = [Block(config, layer) for layer in range(config.num_hidden_layers)]
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(layers),
            "norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        self.lm_head = LMHead(config)

    def forward(self, input_ids, targets=None, document_lengths=None, position_ids=None,
                cache=None):
        """input_ids (B, T) -> logits (B, T, V) in the parameters' dtype. With targets (B, T) that
        are shifted already, -100 where there is none: their summed cross-entropy, fp32 scalar. With
        document_lengths a row (B = 1) is several documents that do not see each other and whose
        positions restart. With a cache (see KVCache): logits (B, 1, V) of the last token alone."""
        # a tensor, as torch.compile would guard a list's length
        lengths = torch.tensor(document_lengths or [input_ids.shape[1]], device="cpu")
        if position_ids is None:
            position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
        x = self.model.embed_tokens(input_ids)  # (B, T, C)
        cos, sin = rotary_embedding(  # (B, 1, T, D) each
            position_ids.to(x.device),
            self.config.head_dim,
            self.config.rope_theta,
            x.dtype,
        )
        saved_on_cpu = torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda)
        with saved_on_cpu if self.offload else nullcontext():
            for block in self.model.layers:
                x = block(x, cos, sin, lengths, cache, recompute=self.recompute)
        x = self.model.norm(x if cache is None else x[:, -1:])
        tied_weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else None
        return self.lm_head(x, targets, tied_weight)

    @classmethod
    def from_pretrained(cls, model_dir, dtype=torch.float32, device="cpu"):
        """Reads a folder in Hugging Face layout; errors as of load_weights."""
        config = Qwen2Config.from_pretrained(model_dir)
        with torch.device("meta"):  # no weights yet
            model = cls(config).to(dtype)
        model.to_empty(device=device)
        if model_dir in BUILTIN:
            init_weights(model, seed=0)
        else:
            load_weights(model, model_dir)
        return model

    @torch.no_grad()
    def save_pretrained(self, model_dir, dtype=None, max_shard_bytes=SHARD_BYTES):
        """Writes config.json, and safetensors of at most max_shard_bytes or one tensor, in the
        parameters' dtype unless one is given. Under FSDP all ranks gather what a file holds; rank 0
        writes it before the next is gathered. The index of several files comes last. OSError, on
        rank 0, where it cannot write."""
        dtype = dtype or next(self.parameters()).dtype
        model_dir, state = Path(model_dir), self.state_dict()
        if is_rank_0():
            model_dir.mkdir(parents=True, exist_ok=True)
            self.config.save(model_dir, dtype)
        barrier()
        shards, size = [[]], 0
        for name, tensor in state.items():
            num_bytes = tensor.numel() * dtype.itemsize
            if shards[-1] and size + num_bytes > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += num_bytes
        file_of = {}
        for i, names in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) == 1:
                file = "model.safetensors"
            tensors = {}
            for name in names:
                tensor = state[name].to(dtype)  # before gathering: half the traffic
                if isinstance(tensor, DTensor):
                    tensor = tensor.full_tensor()
                if is_rank_0():
                    tensors[name] = tensor.cpu()
                file_of[name] = file
            if is_rank_0():
                atomic_write(model_dir / file, [save(tensors, {"format": "pt"})])
            barrier()
        if is_rank_0():
            for path in model_dir.glob("model*.safetensors"):  # of a save in other shards
                if path.name not in file_of.values():
                    path.unlink()
            index = model_dir / INDEX
            if len(shards) > 1:
                num_bytes = sum(tensor.numel() for tensor in state.values()) * dtype.itemsize
                write_json(index, {"metadata": {"total_size": num_bytes}, "weight_map": file_of})
            else:
                index.unlink(missing_ok=True)
        barrier()


class KVCache:
    """Keys and values of what has been read, for `num_slots` rows of up to `length` tokens, made
    once. A prompt is read alone, so that what is computed for it depends on nothing else; after
    that each step adds a token to the first rows."""

    def __init__(self, config, num_slots, length, dtype, device):
        self.Hkv = config.num_key_value_heads
        self.length = length
        shape = (
            config.num_hidden_layers,
            num_slots,
            2 * self.Hkv,  # the heads' keys, then their values
            length,
            config.head_dim,
        )
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.slots = torch.arange(num_slots, device=device)
        self.shape = None  # of the decode step that the views are for

    def prefill(self, model, input_ids, slot):
        """Reads a prompt (T,) into a slot; -> logits (V,) of its last token."""
        self.slot = slot
        self.mask = None  # a prompt sees only itself
        position_ids = torch.arange(len(input_ids), device=input_ids.device)[None]  # (1, T)
        return model(input_ids[None], position_ids=position_ids, cache=self)[0, 0]

    def decode(self, model, input_ids, positions, length):
        """Adds a token to each of the first B rows: input_ids and positions (B,) -> logits (B, V).
        The cells below `length` are read: positions beyond it are of rows that nobody asks for.
        Shapes depend on B and length alone."""
        B = len(input_ids)
        if self.shape != (B, length):
            self.shape = B, length
            self.rows = self.slots[:B]  # not made anew: a CUDA graph would outlive it
            self.views = [  # (B, all cells, 2 Hkv, D), keys and values (B, Hkv, length, D)
                (kv.transpose(1, 2), kv[:, :self.Hkv, :length], kv[:, self.Hkv:, :length])
                for kv in self.kv[:, :B]
            ]
        self.positions = positions
        keys = torch.arange(length, device=positions.device)
        unseen = keys > positions[:, None, None, None]  # (B, 1, 1, S)
        # added to the scores; made once, where SDPA would make it of a bool mask in each layer
        self.mask = torch.zeros_like(unseen, dtype=self.kv.dtype).masked_fill_(unseen, -torch.inf)
        return model(input_ids[:, None], position_ids=positions[:, None], cache=self)[:, 0]

    def attend(self, layer, q, k, v, document_lengths):
        """Stores the new tokens' k and v (B, Hkv, T, D), attends to all: q -> y (B, H, T, D). T is
        a prompt's length, or 1."""
        kv = torch.cat([k, v], dim=1)  # (B, 2 Hkv, T, D)
        if self.mask is None:
            self.kv[layer, self.slot, :, :kv.shape[2]] = kv[0]
            return packed_attention(q, k, v, document_lengths)
        cells, keys, values = self.views[layer]
        cells.index_put_((self.rows, self.positions), kv[:, :, 0])
        # the heads that share a key become the queries of one head: (B, Hkv, H / Hkv, D)
        grouped = q.reshape(len(q), self.Hkv, -1, q.shape[-1])
        y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask)
        return y.reshape(q.shape)

    def copy(self, source, target, length):
        """A row's first tokens to another slot."""
        self.kv[:, target, :, :length] = self.kv[:, source, :, :length]


# ------------------------------------------------------------------------------------ configuration

@dataclass(frozen=True)
class Qwen2Config:
    """The fields of config.json that change what is computed, with transformers' defaults."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def matmul_parameters(self):
        """Weights that a token is multiplied with: all matrices but the embedding, a look-up."""
        C = self.hidden_size
        q_and_o = 2 * C * C
        k_and_v = 2 * C * self.head_dim * self.num_key_value_heads
        mlp = 3 * C * self.intermediate_size
        return self.num_hidden_layers * (q_and_o + k_and_v + mlp) + self.vocab_size * C

    @property
    def num_parameters(self):
        """Weights of all matrices; biases and norms are a ten thousandth more."""
        embedding = self.vocab_size * self.hidden_size
        return self.matmul_parameters + (0 if self.tie_word_embeddings else embedding)

    def train_flops(self, length):
        """Floating-point operations to train on one document of `length` tokens: three times the
        forward pass, whose products cost 2 a weight and token and whose causal attention 2 H D a
        layer and pair of tokens."""
        attention = self.num_hidden_layers * 2 * self.hidden_size * length ** 2
        return 3 * (2 * self.matmul_parameters * length + attention)

    @classmethod
    def from_pretrained(cls, model_dir):
        """Reads config.json of transformers 4 (`rope_theta`) or 5 (`rope_parameters`), or a name
        of BUILTIN; see own_head for weights that contradict it. FileNotFoundError without the file;
        ValueError, which names file, field and value, where it is broken, lacks a field or asks for
        something that is not built here."""
        if model_dir in BUILTIN:
            return BUILTIN[model_dir]
        path = Path(model_dir) / "config.json"
        with reading(path):
            raw = dict(json.loads(path.read_text()))
        raw.setdefault("model_type", "missing")
        raw.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
        with suppress(KeyError, TypeError):  # of transformers 5, if there is one
            raw["rope_theta"] = raw["rope_parameters"]["rope_theta"]
        config = cls(**{f.name: raw.get(f.name, getattr(cls, f.name, None)) for f in fields(cls)})
        config.check(path, raw)
        tied = config.tie_word_embeddings and not own_head(config, model_dir)
        return replace(config, tie_word_embeddings=tied)

    def check(self, path, raw):
        """ValueError for a size that is none, and for what asks for more than is computed here."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type in (int, float) and not (isinstance(value, int | f.type) and value > 0):
                raise ValueError(f"{path}: {f.name} is {value!r}, must be a positive "
                                 f"{f.type.__name__}")
        rope = {"rope_type": "default", "type": "default", "rope_theta": self.rope_theta}
        H, Hkv = self.num_attention_heads, self.num_key_value_heads
        plain = {
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": H * self.head_dim,
            "num_attention_heads": H // Hkv * Hkv,
            "head_dim": self.head_dim,
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "rope_scaling": rope,
            "rope_parameters": rope,
            "use_sliding_window": False,
            "use_mrope": False,
            "attention_dropout": 0,
            "quantization_config": None,
        }
        for field, value in plain.items():
            found = raw.get(field)
            if value is rope and isinstance(found, dict):
                found = rope | found
            if found not in (value, None):  # absent or null: the default, which is plain
                raise ValueError(f"{path}: {field} is {raw[field]!r}, must be {value!r}: built "
                                 "here is the plain Qwen2, with heads of one size")

    def save(self, model_dir, dtype):
        """Writes config.json in the layout that transformers 4 and 5 and vLLM read."""
        write_json(Path(model_dir) / "config.json", {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            **asdict(self),
            "torch_dtype": str(dtype).removeprefix("torch."),
        })


# A model to learn with: random weights, a byte-level tokenizer (data.py), a million parameters.
BUILTIN = {
    "builtin:tiny": Qwen2Config(
        vocab_size=266,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.06,
        eos_token_id=258,
    ),
}


# ------------------------------------------------------------------------------ weights on the disk

def local_shard(parameter):
    """This process's rows of a parameter, and the number of the first. FSDP cuts along the mesh's
    last axis, as torch.chunk does."""
    if not isinstance(parameter, DTensor):
        return parameter.data, 0
    assert parameter.placements[-1].is_shard(0), parameter.placements
    mesh, axis = parameter.device_mesh, parameter.device_mesh.ndim - 1
    rows = -(-len(parameter) // mesh.size(axis))  # of every part but the last ones
    start = min(rows * mesh.get_local_rank(axis), len(parameter))
    return parameter.to_local(), start


@torch.no_grad()
def init_weights(model, seed):
    """Matrices normal, norms one, biases zero; the same weights however the model is sharded."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        local, start = local_shard(parameter)
        if parameter.ndim == 1:
            local.fill_(1.0 if "norm" in name else 0.0)
        else:
            generator = torch.Generator().manual_seed(seed * 100_003 + number)
            whole = torch.randn(parameter.shape, generator=generator)
            part = whole[start:start + len(local)]
            local.copy_(model.config.initializer_range * part)


@contextmanager
def reading(path):
    """What may go wrong while a file of a model folder is opened, in one line with its remedy."""
    try:
        yield
    except FileNotFoundError:
        for pattern, remedy in OTHER_WEIGHTS.items():
            for other in path.parent.glob(pattern):
                raise FileNotFoundError(f"{path} does not exist, but {other.name} does: {remedy}"
                                        ) from None
        raise FileNotFoundError(f"{path} does not exist: --model wants a folder with safetensors"
                                ) from None
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error!r}): download it again") from None


def stored_tensors(model_dir):
    """Every tensor on the disk by name, unread: slices of it can be. FileNotFoundError, ValueError
    for a file that is missing, truncated, or no safetensors."""
    index = Path(model_dir) / INDEX
    names = {"model.safetensors"}
    if index.is_file():
        with reading(index):
            names = set(dict(json.loads(index.read_text())["weight_map"]).values())
    tensors = {}
    for path in sorted(index.with_name(name) for name in names):
        with reading(path):
            file = safe_open(path, "pt")
        for name in file.keys():
            tensors[name] = file.get_slice(name)
    return tensors


def own_head(config, model_dir):
    """Whether the weights hold an lm_head that is not the embedding: some trainers write one and
    yet `tie_word_embeddings`, and transformers too unties such a model. False where there are no
    weights: train.py --plan needs none."""
    try:
        stored = stored_tensors(model_dir)
        embedding, head = stored["model.embed_tokens.weight"], stored["lm_head.weight"]
    except (FileNotFoundError, KeyError):
        return False
    return not all(torch.equal(embedding[row:row + 4096], head[row:row + 4096])
                   for row in range(0, config.vocab_size, 4096))


def check_weights(model, model_dir):
    """stored_tensors, which must be exactly the model's (it may be on the meta device) in name,
    shape and type of number; ValueError that names the first that is not."""
    stored = stored_tensors(model_dir)
    if model.config.tie_word_embeddings:  # some checkpoints repeat the embedding under this name
        stored.pop("lm_head.weight", None)
    wanted = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    found = {}
    for name, tensor in stored.items():
        is_float = tensor.get_dtype() in ("F32", "F16", "BF16")
        found[name] = tensor.get_shape() if is_float else tensor.get_dtype()
    for name in wanted | found:
        on_disk, by_config = found.get(name, "absent"), wanted.get(name, "absent")
        if on_disk != by_config:
            raise ValueError(f"{model_dir}: {name} is {on_disk}, by its config.json {by_config}: "
                             "are configuration and weights of one model?")
    return stored


@torch.no_grad()
def load_weights(model, model_dir):
    """Fills the parameters, strictly: errors of check_weights. Each process reads only its own
    rows, a piece at a time, so that host memory never holds more than its shard and READ_BYTES."""
    stored = check_weights(model, model_dir)
    for name, parameter in model.named_parameters():
        local, start = local_shard(parameter)
        row_bytes = 4 * parameter.shape[1:].numel()
        for piece in local.split(max(1, READ_BYTES // row_bytes)):
            piece.copy_(stored[name][start:start + len(piece)])
            start += len(piece)


def atomic_write(path, pieces):
    """Writes buffers to a file beside `path`, makes them durable, renames: no name ever holds half
    a file. OSError if that fails; what was there before stays, also where `pieces` raises."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as file:
            file.writelines(pieces)
        sync(tmp)
        os.replace(tmp, path)
        sync(path.parent)
    except OSError as error:
        if error.filename not in (None, str(tmp)):  # what pieces read
            raise
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from None
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path, value):
    atomic_write(path, [json.dumps(value, indent=2).encode() + b"\n"])


def sync(path):
    """Makes a file's bytes, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_rank_0():
    return not dist.is_initialized() or dist.get_rank() == 0


def gathered(value):
    """Each rank's value, on every rank. A rank that fails before it comes here says why and ends;
    the others hear of it at once (objects go over gloo; NCCL would wait), and leave the word to it.
    """
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier():
    """Waits for all ranks; an error where one has died."""
    gathered(None)
