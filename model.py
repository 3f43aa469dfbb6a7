"""Qwen2, from 0.5B to 72B: configuration, layers, loss, reading and writing of safetensors.

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
head_dim, I intermediate_size, V vocab_size, N tokens that have a target.
"""
import contextlib
import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100              # a target that is none: cross_entropy's own default for ignore_index
MLP_TILE = 4096            # tokens of one tile of the MLP under recompute="tiled"
LOSS_CHUNK = {"cuda": 2 ** 27, "cpu": 2 ** 25}  # logits held at once: 512 and 128 MiB in fp32
READ_BYTES = 2 ** 26       # weights are read in pieces of at most this size
SHARD_BYTES = 5 * 10 ** 9  # size of one .safetensors file, as the published checkpoints have it
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# What a folder may hold in place of its weights, and what helps.
OTHER_WEIGHTS = {
    "adapter_model.*": "merge the adapter into its model first (merge_and_unload of peft)",
    "pytorch_model*.bin*": "convert it to safetensors first (save_pretrained of transformers)"}


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
        C, kv = self.hidden_size, self.head_dim * self.num_key_value_heads
        block = 2 * C * C + 2 * C * kv + 3 * C * self.intermediate_size
        return self.num_hidden_layers * block + self.vocab_size * C

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
        if not path.is_file():
            raise absent(path)
        try:
            raw = json.loads(path.read_text())
            if not isinstance(raw, dict):
                raise ValueError(f"it begins {str(raw)[:20]}")
        except ValueError as error:
            raise ValueError(f"{path} is not a JSON object ({error}): download it again") from None
        kinds = {"rope_parameters": dict, "rope_scaling": dict, "layer_types": list}
        for name, kind in kinds.items():
            if not isinstance(raw.get(name) or kind(), kind):
                raise ValueError(f"{path}: {name} is {raw[name]!r}, must be a {kind.__name__}")
        rope = raw.get("rope_parameters") or {}
        refuse_unsupported(path, raw, rope)
        raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", cls.rope_theta))
        raw.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
        try:
            config = cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})
        except TypeError as error:
            raise ValueError(f"{path} lacks fields of a Qwen2: {error}") from None
        config.check(path)
        if config.tie_word_embeddings and own_head(config, model_dir):
            return replace(config, tie_word_embeddings=False)
        return config

    def check(self, path):
        """ValueError unless sizes are positive integers that divide as the architecture needs."""
        for f in fields(self)[:7]:
            value = getattr(self, f.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{path}: {f.name} is {value!r}, must be a positive integer")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(f"{path}: {name} is {value!r}, must be a positive number")
        for whole, part in (("hidden_size", "num_attention_heads"),
                            ("num_attention_heads", "num_key_value_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{path}: {whole} {getattr(self, whole)} is not divisible by "
                                 f"{part} {getattr(self, part)}")

    def save(self, model_dir, dtype):
        """Writes config.json in the layout that transformers 4 and 5 and vLLM read."""
        raw = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
               "attention_dropout": 0.0, **asdict(self), "use_sliding_window": False,
               "torch_dtype": str(dtype).removeprefix("torch.")}
        write_durably(Path(model_dir) / "config.json", [json.dumps(raw, indent=2).encode() + b"\n"])


def refuse_unsupported(path, raw, rope):
    """ValueError for a field of config.json that asks for something other than is computed here."""
    head_dim, heads = raw.get("head_dim"), raw.get("num_attention_heads")

    def scaled(rope):
        return rope.get("rope_type", rope.get("type", "default")) != "default"
    refused = {
        "model_type": raw.get("model_type") != "qwen2",
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "use_sliding_window": raw.get("use_sliding_window", False),
        "layer_types": any(kind != "full_attention" for kind in raw.get("layer_types") or []),
        "rope_scaling": scaled(raw.get("rope_scaling") or {}),
        "rope_parameters": scaled(rope) or any(isinstance(v, dict) for v in rope.values()),
        "use_mrope": raw.get("use_mrope", False),
        "attention_dropout": raw.get("attention_dropout", 0.0),
        "quantization_config": raw.get("quantization_config"),
        "head_dim": head_dim and heads and head_dim * heads != raw.get("hidden_size"),
    }
    for field, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"{path}: {field} is {raw.get(field)!r}, which is not supported: this "
                             "code is the plain Qwen2 (full attention, default rope, silu, "
                             "unquantised)")


# A model to learn with: random weights, a byte-level tokenizer (data.py), a million parameters.
BUILTIN = {"builtin:tiny": Qwen2Config(
    vocab_size=266, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    tie_word_embeddings=True, initializer_range=0.06, eos_token_id=258)}


def cpu_multiplies_bf16():
    """Whether this CPU has instructions for products of bf16. oneDNN says so from AVX-512 on, where
    it merely converts without AVX512_BF16 or AMX; where it has no kernels, PyTorch converts number
    by number, which takes 4 to 16 times as long as float32."""
    return (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
                 or not torch.cpu._is_avx512_supported()))


# ------------------------------------------------------------------------------------------- layers

class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, in x's dtype; F.rms_norm takes its statistic in fp32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_embedding(position_ids, head_dim, theta, dtype):
    """position_ids (B, T) -> cos, sin (B, 1, T, D), which rotate each pair (i, i + D/2) of a head
    by position * theta^(-2i/D). Angles are fp32: in bf16 position 257 would already be 256. Made in
    each forward pass, as a stored table would be garbage after a meta-device start."""
    even = torch.arange(0, head_dim, 2, device=position_ids.device).float()  # 2i of each pair
    inverse_frequency = theta ** -(even / head_dim)  # (D/2,)
    angle = position_ids[:, None, :, None].float() * inverse_frequency  # (B, 1, T, D/2) fp32
    angle = torch.cat([angle, angle], dim=-1)  # (B, 1, T, D)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Applies the rotary embedding to x (B, H, T, D), paired by halves as in the checkpoints."""
    left, right = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return x * cos + torch.cat([-right, left], dim=-1) * sin


# lengths differ in each row: compiled, each new one would cost a compilation
@torch.compiler.disable
def packed_attention(q, k, v, document_lengths):
    """Causal attention within each document of a packed row: one SDPA call a document, never a
    T x T mask. q (B, H, T, D), k and v (B, Hkv, T, D), lengths that sum to T (an int tensor on the
    CPU) -> (B, H, T, D)."""
    # the one CUDA kernel for fp32 without a T x T matrix wants as many k as q
    if q.is_cuda and q.dtype == torch.float32:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    documents = zip(*(t.split(document_lengths.tolist(), dim=2) for t in (q, k, v)))
    y = [F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])
         for qkv in documents]
    return y[0] if len(y) == 1 else torch.cat(y, dim=2)


class KeyValueCache:
    """Keys and values of what has been read, for `num_slots` rows of up to `length` tokens: each
    (L, slots, Hkv, length, D), allocated once. A prompt is read alone, so that what is computed for
    it depends on nothing else; after that each step adds a token to the first rows."""

    def __init__(self, config, num_slots, length, dtype, device, num_key_value_heads=None):
        shape = (config.num_hidden_layers, num_slots,
                 num_key_value_heads or config.num_key_value_heads, length, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def prefill(self, model, input_ids, slot):
        """Reads a prompt (T,) into a slot; -> logits (V,) of its last token."""
        T = len(input_ids)

        def attends(layer_k, layer_v):
            def attend(q, k, v):  # (1, heads, T, D)
                layer_k[slot, :, :T], layer_v[slot, :, :T] = k[0], v[0]
                return packed_attention(q, k, v, torch.tensor([T]))
            return attend
        position_ids = torch.arange(T, device=input_ids.device)
        return model.forward_cached(input_ids[None], position_ids[None],
                                    list(map(attends, self.k, self.v)))[0]

    def decode(self, model, input_ids, positions, length):
        """Adds a token to each of the first B rows: input_ids and positions (B,), all positions
        below length -> logits (B, V). Shapes depend on B and length alone."""
        B = len(input_ids)
        rows = torch.arange(B, device=input_ids.device)
        hidden = torch.arange(length, device=input_ids.device) > positions[:, None]  # (B, S)
        # added to the scores; made once, where SDPA would make it of a bool mask in each layer
        mask = torch.zeros_like(hidden, dtype=self.k.dtype).masked_fill_(hidden, -torch.inf)
        mask = mask[:, None, None]  # (B, 1, 1, S)

        def attends(layer_k, layer_v):
            def attend(q, k, v):  # (B, heads, 1, D)
                layer_k[rows, :, positions], layer_v[rows, :, positions] = k[:, :, 0], v[:, :, 0]
                # the heads that share a key become the queries of one head
                grouped = q.reshape(B, k.shape[1], -1, q.shape[-1])  # (B, Hkv, H / Hkv, D)
                y = F.scaled_dot_product_attention(grouped, layer_k[:B, :, :length],
                                                   layer_v[:B, :, :length], attn_mask=mask)
                return y.reshape(q.shape)
            return attend
        return model.forward_cached(input_ids[:, None], positions[:, None],
                                    list(map(attends, self.k, self.v)))

    def copy(self, source, target, length):
        """A row's first tokens to another slot."""
        for cache in (self.k, self.v):
            cache[:, target, :, :length] = cache[:, source, :, :length]


class Attention(nn.Module):
    """Grouped-query attention: H query heads share Hkv key/value heads. Biases: only q, k and v."""

    def __init__(self, config):
        super().__init__()
        C, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(C, config.num_attention_heads * self.head_dim)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * self.head_dim)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * self.head_dim)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, C, bias=False)

    def forward(self, x, cos, sin, document_lengths, attend=None):
        """attend(q, k, v) -> y, all (B, heads, T, D): a cache's attention, not within documents."""
        B, T, C = x.shape
        q, k, v = self.heads(x, cos, sin)
        y = attend(q, k, v) if attend else packed_attention(q, k, v, document_lengths)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)

    def heads(self, x, cos, sin):  # sample.fuse puts one product and one rotation in its place
        B, T, C = x.shape
        q, k, v = (project(x).view(B, T, -1, self.head_dim).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v  # (B, H, T, D), twice (B, Hkv, T, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), C -> I -> C."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.project(x)
        return self.down_proj(F.silu(gate) * up)

    def project(self, x):  # sample.fuse puts one product in its place
        return self.gate_proj(x), self.up_proj(x)


class Block(nn.Module):
    """One transformer layer: x + attention(norm(x)), then x + mlp(norm(x)); all (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def attend(self, x, cos, sin, document_lengths, attend=None):
        return x + self.self_attn(self.input_layernorm(x), cos, sin, document_lengths, attend)

    def transform(self, x):
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, cos, sin, document_lengths, tile=None):
        """`tile`: recompute both halves in the backward pass, the MLP in tiles of that many tokens.
        Its saved tensors (5 I + 3 C a token) then exist for one tile at a time; the price is a
        second saved (B, T, C) a layer."""
        if tile is None:
            return self.transform(self.attend(x, cos, sin, document_lengths))
        x = recomputed(self.attend, x, cos, sin, document_lengths)
        return torch.cat([recomputed(self.transform, part) for part in x.split(tile, dim=1)], dim=1)


def recomputed(function, *args):
    """function(*args), of which only args are saved. No dropout means no RNG state to keep."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer, summed, without the (N, V) logits: a chunk's logits live
    until its gradients are taken, so memory is that of one chunk and of the weight's gradient. Both
    gradients are ready after the forward pass."""

    @staticmethod
    def forward(ctx, x, weight, targets, with_gradients):
        """x (N, C), weight (V, C), targets (N,) -> sum of -log softmax(x weightᵀ)[target]."""
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        if with_gradients:
            dx = torch.empty_like(x)
            # (V, C) fp32: sums over chunks would lose bits in bf16
            dweight = torch.zeros_like(weight, dtype=torch.float32)
        chunk = max(1, LOSS_CHUNK[x.device.type] // len(weight))
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            z = (x[rows] @ weight.T).float()  # (n, V) fp32, overwritten by its softmax
            index = targets[rows, None]  # (n, 1)
            z -= z.amax(-1, keepdim=True)
            loss -= z.gather(1, index).sum()
            total = z.exp_().sum(-1, keepdim=True)  # (n, 1)
            loss += total.log().sum()
            if with_gradients:  # d loss / d z = softmax(z) - onehot(target)
                z /= total
                z.scatter_add_(1, index, torch.full_like(z[:, :1], -1))
                dz = z.to(x.dtype)
                torch.mm(dz, weight, out=dx[rows])
                if weight.dtype == torch.float32:
                    dweight.addmm_(dz.T, x[rows])
                else:
                    dweight += dz.T @ x[rows]
                del dz
            del z  # before the next chunk's is made
        ctx.gradients = (dx, dweight.to(weight.dtype)) if with_gradients else None
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        # scaled in place, so never given out twice
        (dx, dweight), ctx.gradients = ctx.gradients, None
        return dx.mul_(grad_loss), dweight.mul_(grad_loss), None, None


class Head(nn.Module):
    """lm_head. It computes the loss itself, as under FSDP its weight is whole only inside its own
    forward. A tied head is handed the embedding's weight and owns none, as in the checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.weight = None
        if not config.tie_word_embeddings:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, x, targets=None, tied_weight=None):
        """x (B, T, C) -> logits (B, T, V); with targets (B, T) their summed loss, fp32."""
        weight = self.weight if tied_weight is None else tied_weight
        if targets is None:
            return F.linear(x, weight)
        kept = targets != IGNORE  # prompts and padding never meet the V columns
        return ChunkedCrossEntropy.apply(x[kept], weight, targets[kept], torch.is_grad_enabled())


class Qwen2(nn.Module):
    """The whole model. `state_dict()` has the keys of the published checkpoints.

    Attributes that trade memory for time: `recompute`, "none" (all activations are saved), "block"
    (only a block's input) or "tiled" (see Block); `offload`: what is saved waits in host memory."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute, self.offload = "none", False
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)]),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps)))
        self.lm_head = Head(config)

    def forward(self, input_ids, targets=None, document_lengths=None, position_ids=None):
        """input_ids (B, T) -> logits (B, T, V) in the parameters' dtype. With targets (B, T) that
        are shifted already, -100 where there is none: their summed cross-entropy, fp32 scalar. With
        document_lengths a row (B = 1) is several documents that do not see each other and whose
        positions restart."""
        B, T = input_ids.shape
        if document_lengths is not None:
            assert B == 1 and sum(document_lengths) == T, f"{document_lengths} do not fill {(B, T)}"
        document_lengths = document_lengths or [T]
        if position_ids is None:
            position_ids = torch.cat([torch.arange(n) for n in document_lengths])[None]
            position_ids = position_ids.to(input_ids.device)
        # a tensor, as torch.compile would guard a list's length
        document_lengths = torch.tensor(document_lengths, device="cpu")
        x = self.model.embed_tokens(input_ids)  # (B, T, C)
        cos, sin = rotary_embedding(position_ids, self.config.head_dim, self.config.rope_theta,
                                    x.dtype)
        with self.boundaries():
            tile = MLP_TILE if self.recompute == "tiled" else None
            for block in self.model.layers:
                if self.recompute == "block":
                    x = recomputed(block, x, cos, sin, document_lengths)
                else:
                    x = block(x, cos, sin, document_lengths, tile)
        tied_weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else None
        return self.lm_head(self.model.norm(x), targets, tied_weight)

    def forward_cached(self, input_ids, position_ids, attends):
        """input_ids and position_ids (B, T) -> logits (B, V) of each row's last token; attends: a
        cache's attention of each layer."""
        x = self.model.embed_tokens(input_ids)  # (B, T, C)
        cos, sin = rotary_embedding(position_ids, self.config.head_dim, self.config.rope_theta,
                                    x.dtype)
        for block, attend in zip(self.model.layers, attends, strict=True):
            x = block.transform(block.attend(x, cos, sin, None, attend))
        x = self.model.norm(x[:, -1:])
        tied_weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else None
        return self.lm_head(x, None, tied_weight)[:, 0]

    def boundaries(self):
        """Where the saved block inputs wait for the backward pass."""
        if not self.offload:
            return contextlib.nullcontext()
        assert self.recompute != "none", "offload moves what recomputation saves: else everything"
        return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())

    @classmethod
    def from_pretrained(cls, model_dir, dtype=torch.float32, device="cpu"):
        """Reads a folder in Hugging Face layout; errors as of load_weights."""
        with torch.device("meta"):
            model = cls(Qwen2Config.from_pretrained(model_dir)).to(dtype)
        model.to_empty(device=device)
        if model_dir in BUILTIN:
            init_weights(model, seed=0)
        else:
            load_weights(model, model_dir)
        return model

    def save_pretrained(self, model_dir, dtype=None, max_shard_bytes=SHARD_BYTES):
        """Writes config.json and safetensors, in the parameters' dtype unless one is given. Under
        FSDP every rank must call it; rank 0 writes."""
        dtype = dtype or next(self.parameters()).dtype
        together(lambda: Path(model_dir).mkdir(parents=True, exist_ok=True))
        save_weights(self, model_dir, dtype, max_shard_bytes)
        together(lambda: self.config.save(model_dir, dtype))


# ------------------------------------------------------------------------------ weights on the disk

def local_part(parameter):
    """This process's part of a parameter and its first row there: FSDP cuts as torch.chunk does."""
    if not isinstance(parameter, DTensor):
        return parameter.data, 0
    (dimension, placement), = [(i, p) for i, p in enumerate(parameter.placements) if p.is_shard()]
    assert placement.dim == 0, f"cut along axis {placement.dim}"
    mesh, length = parameter.device_mesh, parameter.shape[0]
    rows = -(-length // mesh.size(dimension))  # of every part but the last ones
    return parameter.to_local(), min(rows * mesh.get_local_rank(dimension), length)


@torch.no_grad()
def init_weights(model, seed):
    """Matrices normal, norms one, biases zero; the same weights however the model is sharded."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        local, start = local_part(parameter)
        if name.endswith("bias") or "norm" in name:
            local.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            generator = torch.Generator().manual_seed(seed * 100_003 + number)
            whole = torch.randn(parameter.shape, generator=generator)
            local.copy_(model.config.initializer_range * whole[start:start + len(local)])


def weight_files(model_dir):
    """The file of each tensor name: model.safetensors.index.json's, else model.safetensors."""
    model_dir = Path(model_dir)
    index, single = model_dir / "model.safetensors.index.json", model_dir / "model.safetensors"
    if index.is_file():
        try:
            return {name: model_dir / file
                    for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of weights ({error!r}): "
                             "download it again") from None
    with open_safetensors(single) as file:
        return {name: single for name in file.keys()}


def absent(path):
    """The error for a file that a model folder lacks: it names what is there instead."""
    for pattern, remedy in OTHER_WEIGHTS.items():
        for other in path.parent.glob(pattern):
            return FileNotFoundError(f"{path} does not exist, but {other.name} does: {remedy}")
    return FileNotFoundError(f"{path} does not exist: --model wants a folder with safetensors")


def open_safetensors(path):
    if not path.is_file():
        raise absent(path)
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): "
                         "download it again") from None


def stored_tensor(path, name, shape):
    """A tensor of a file, of which pieces can be read; ValueError if it is not as it should be."""
    try:
        source = open_safetensors(path).get_slice(name)
    except SafetensorError:
        raise ValueError(f"{path} lacks {name}, which the index places there: "
                         "download it again") from None
    if source.get_shape() != list(shape):
        raise ValueError(f"{path}: {name} has shape {source.get_shape()}, config.json asks for "
                         f"{list(shape)}")
    if source.get_dtype() not in SAFETENSORS_DTYPES.values():
        raise ValueError(f"{path}: {name} has type {source.get_dtype()}, must be one of "
                         f"{list(SAFETENSORS_DTYPES.values())}")
    return source


def own_head(config, model_dir):
    """Whether the weights hold an lm_head that is not the embedding: some trainers write one and
    yet `tie_word_embeddings`, and transformers too unties such a model. False where there are no
    weights: train.py --plan needs none."""
    shape, step = (config.vocab_size, config.hidden_size), READ_BYTES // (4 * config.hidden_size)
    try:
        files = weight_files(model_dir)
        embedding, head = (stored_tensor(files[name], name, shape)
                           for name in ("model.embed_tokens.weight", "lm_head.weight"))
    except (FileNotFoundError, KeyError):
        return False
    with torch.device("cpu"):  # not the caller's, which may be meta
        return any((embedding[row:row + step] != head[row:row + step]).any()
                   for row in range(0, config.vocab_size, step))


def checked_files(model, model_dir):
    """The file of each tensor by name; ValueError unless the names are exactly the model's,
    FileNotFoundError for a file that the index names and that is not there."""
    files, wanted = weight_files(model_dir), {name for name, _ in model.named_parameters()}
    for path in files.values():
        if not path.is_file():
            raise absent(path)
    # some tied checkpoints repeat the embedding under this name
    if model.config.tie_word_embeddings:
        files.pop("lm_head.weight", None)
    for problem, names in (("lacks", wanted - files.keys()),
                           ("has unexpected", files.keys() - wanted)):
        if names:
            raise ValueError(f"{model_dir} {problem} {len(names)} tensors, such as {min(names)}: "
                             "are config.json and the weights of one model?")
    return files


@torch.no_grad()
def load_weights(model, model_dir):
    """Fills the parameters, strictly. Each process reads only its own rows, a piece at a time, so
    that host memory never holds more than its shard and READ_BYTES. ValueError, FileNotFoundError:
    missing or unexpected names, wrong shapes or types, truncated or missing files."""
    files = checked_files(model, model_dir)
    for name, parameter in model.named_parameters():
        source = stored_tensor(files[name], name, parameter.shape)
        local, start = local_part(parameter)
        step = max(1, READ_BYTES // (4 * max(1, local[:1].numel())))
        for row in range(0, len(local), step):
            piece = local[row:row + step]
            piece.copy_(source[start + row:start + row + len(piece)])


@torch.no_grad()
def save_weights(model, model_dir, dtype, max_shard_bytes):
    """Streams the state dict into files of at most max_shard_bytes, one whole tensor in memory at a
    time; the index comes last. A failed write (a full disk) raises OSError, on every rank."""
    model_dir, state = Path(model_dir), model.state_dict()
    size = {name: t.numel() * dtype.itemsize for name, t in state.items()}
    shards = [[]]
    for name in state:
        if shards[-1] and sum(size[n] for n in shards[-1]) + size[name] > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]

    def pieces(shard):
        offset, header = 0, {"__metadata__": {"format": "pt"}}
        for name in shard:
            header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(state[name].shape),
                            "data_offsets": [offset, offset + size[name]]}
            offset += size[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight bytes
        yield len(text).to_bytes(8, "little") + text
        for name in shard:
            tensor = state[name].to(dtype)  # before gathering: half the traffic
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            yield tensor.contiguous().cpu().view(torch.uint8).numpy()

    def finish():
        stale = {*model_dir.glob("model*.safetensors"),
                 *model_dir.glob("model.safetensors.index.json")}
        if len(shards) > 1:
            path = model_dir / "model.safetensors.index.json"
            index = {"metadata": {"total_size": sum(size.values())},
                     "weight_map": {n: file for file, shard in zip(names, shards) for n in shard}}
            write_durably(path, [json.dumps(index, indent=2).encode()])
            stale.discard(path)
        for path in stale - {model_dir / name for name in names}:  # of a save with other shards
            path.unlink()

    for name, shard in zip(names, shards):
        gathered = pieces(shard)
        together(lambda: write_durably(model_dir / name, gathered), gathered)
    together(finish)


def write_durably(path, pieces):
    """Writes buffers beside `path`, makes them durable, renames: no name ever holds half a file."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from None


def sync_folder(path):
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def together(write, gathered=()):
    """write() on rank 0; its failure is raised on every rank. `gathered`, whose items are tensors
    collected from all ranks and which write() consumes, is run through on the others, and to its
    end where writing failed."""
    error = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            write()
        except OSError as caught:
            error = caught
    for _ in gathered:
        pass
    if dist.is_initialized():
        errors = [error]
        dist.broadcast_object_list(errors)
        error = errors[0]
    if error is not None:
        raise error
