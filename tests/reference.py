"""Qwen2 once more, from the equations, in float64 and with none of the project's code: every pair
of positions is scored under an explicit mask, heads are looped over, complex numbers rotate. Slow
and plain; the layers are tested against it."""
import math

import torch


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x, positions, theta):
    """x (T, D): element i and element i + D/2 are one complex number, turned by position *
    theta^(-2i/D)."""
    half = x.shape[-1] // 2
    speed = torch.tensor([theta ** (-2 * i / x.shape[-1]) for i in range(half)],
                         dtype=torch.float64)
    turned = torch.complex(x[:, :half],
                           x[:, half:]) * torch.exp(1j * positions[:, None].double() * speed)
    return torch.cat([turned.real, turned.imag], dim=-1)


def visible(lengths):
    """(T, T): key j is seen by query i if it is of the same document and not later."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (document[:, None] == document[None]) & torch.ones(len(document),
                                                              len(document)).tril().bool()


def attention(x, w, prefix, config, positions, seen):
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = (x @ w[f"{prefix}.{n}_proj.weight"].T + w[f"{prefix}.{n}_proj.bias"] for n in "qkv")
    outputs = []
    for head in range(heads):
        kv = head // (heads // kv_heads)
        qh = rotate(q[:, head * size:(head + 1) * size], positions, config.rope_theta)
        kh = rotate(k[:, kv * size:(kv + 1) * size], positions, config.rope_theta)
        scores = (qh @ kh.T / math.sqrt(size)).masked_fill(~seen, -math.inf)
        outputs.append(torch.softmax(scores, -1) @ v[:, kv * size:(kv + 1) * size])
    return torch.cat(outputs, -1) @ w[f"{prefix}.o_proj.weight"].T


def logits(w, config, ids, lengths=None):
    """Weights by checkpoint name (float64), token ids (T,) -> logits (T, V)."""
    lengths = lengths or [len(ids)]
    positions, seen = torch.cat([torch.arange(n) for n in lengths]), visible(lengths)
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        x = x + attention(rms_norm(x, w[f"{name}.input_layernorm.weight"], config.rms_norm_eps), w,
                          f"{name}.self_attn", config,
                          positions, seen)
        y = rms_norm(x, w[f"{name}.post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = y @ w[f"{name}.mlp.gate_proj.weight"].T, y @ w[f"{name}.mlp.up_proj.weight"].T
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w[f"{name}.mlp.down_proj.weight"].T
    x = rms_norm(x, w["model.norm.weight"], config.rms_norm_eps)
    return x @ w["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"].T


def loss(w, config, ids, targets, lengths=None):
    """Summed cross-entropy of the targets that are not -100."""
    logp = torch.log_softmax(logits(w, config, ids, lengths), -1)
    return -sum(logp[i, t] for i, t in enumerate(targets.tolist()) if t != -100)
