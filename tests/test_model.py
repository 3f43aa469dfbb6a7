"""The manual of model.py, in its order: each layer against an independent float64 computation, the
whole against transformers where it is installed."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
import reference
from conftest import ROOT, SHAPES, run_script, say_tied, small_config, small_model
from model import (IGNORE, LOSS_CHUNK, FusedLinearCrossEntropy, Qwen2, Qwen2Config, check_weights,
                   packed_attention, rotary_embedding, rotate)

RAW = dict(model_type="qwen2", vocab_size=99, hidden_size=64, intermediate_size=96,
           num_hidden_layers=2, num_attention_heads=4,
           num_key_value_heads=2)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def doubles(model):
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------ configuration

def write_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**RAW, **changes}))
    return folder


def test_config_reads_transformers_4_and_5_layouts(tmp_path):
    four = Qwen2Config.from_pretrained(write_config(tmp_path, rope_theta=5e5,
                                                    use_sliding_window=False, sliding_window=4096))
    five = Qwen2Config.from_pretrained(write_config(tmp_path,
                                                    rope_parameters={"rope_type": "default",
                                                                     "rope_theta": 5e5},
                                                    layer_types=["full_attention"] * 2))
    assert four == five and four.rope_theta == 5e5 and four.head_dim == 16


@pytest.mark.parametrize("field, value", [
    ("model_type", "llama"), ("hidden_act", "gelu"), ("use_sliding_window", True),
    ("layer_types", ["sliding_attention"]),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("rope_scaling", {"type": "yarn", "factor": 4.0}),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}),
    ("quantization_config", {"bits": 4}), ("head_dim", 8)])
def test_config_refuses_what_is_not_built_by_field_and_value(tmp_path, field, value):
    with pytest.raises(ValueError) as error:
        Qwen2Config.from_pretrained(write_config(tmp_path, **{field: value}))
    assert field in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize("text, says", [("{", "is truncated or damaged"),
                                        ("[1]", "is truncated or damaged"),
                                        (json.dumps({k: v
                                                     for k, v in RAW.items()
                                                     if k != "hidden_size"}), "hidden_size"),
                                        (json.dumps({**RAW, "hidden_size": 66}),
                                         "hidden_size is 66, must be 64"),
                                        (json.dumps({**RAW, "num_key_value_heads": 3}),
                                         "num_attention_heads is 4, must be 3"),
                                        (json.dumps({**RAW, "layer_types": 5}), "layer_types is 5"),
                                        (json.dumps({**RAW, "rope_scaling": "x"}),
                                         "rope_scaling is 'x'"),
                                        (json.dumps({**RAW, "vocab_size": "many"}),
                                         "vocab_size is 'many'")])
def test_a_broken_config_is_named(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        Qwen2Config.from_pretrained(tmp_path)


def test_published_sizes_have_the_published_parameter_counts():
    sizes = {  # as the model cards round them: 0.49B, 7.61B, 32.5B
        494_032_768: dict(vocab_size=151936, hidden_size=896, intermediate_size=4864,
                          num_hidden_layers=24,
                          num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
        7_615_616_512: dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944,
                            num_hidden_layers=28,
                            num_attention_heads=28, num_key_value_heads=4),
        32_763_876_352: dict(vocab_size=152064, hidden_size=5120, intermediate_size=27648,
                             num_hidden_layers=64,
                             num_attention_heads=40, num_key_value_heads=8)}
    for count, fields in sizes.items():
        config = Qwen2Config(**fields)
        with torch.device("meta"):
            parameters = list(Qwen2(config).parameters())
        assert sum(p.numel() for p in parameters) == count
        assert sum(p.numel() for p in parameters if p.ndim == 2) == config.num_parameters


def test_train_flops_count_every_product():
    config = small_config()
    weights = [p for n, p in Qwen2(config).named_parameters() if p.ndim == 2 and "embed" not in n]
    forward = 2 * 10 * sum(p.numel() for p in weights)
    # two products, half of them masked
    attention = config.num_hidden_layers * 2 * (2 * config.hidden_size * 10 * 10) // 2
    assert config.train_flops(10) == 3 * (forward + attention)


# ------------------------------------------------------------------------------------------- layers

def test_rms_norm_takes_its_statistic_in_fp32():
    norm, x = torch.nn.RMSNorm(64, 1e-6), torch.randn(3, 64) * 300
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    expected = reference.rms_norm(x.double(), norm.weight.double(), 1e-6)
    assert relative(norm(x).double(), expected) < 1e-6
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert relative(norm(x.bfloat16()).double(), expected) < 1e-2


def test_rotary_embedding_turns_pairs_as_complex_numbers():
    x, positions = torch.randn(1, 1, 50, 16), torch.arange(50)
    cos, sin = rotary_embedding(positions[None], 16, 1e4, torch.float32)
    assert relative(rotate(x, cos, sin)[0, 0].double(),
                    reference.rotate(x[0, 0].double(), positions, 1e4)) < 1e-5


def test_scores_depend_only_on_relative_position():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 32)
    def score(i, j):
        return (rotate(q, *rotary_embedding(torch.tensor([[i]]), 32, 1e6, torch.float32))
                * rotate(k, *rotary_embedding(torch.tensor([[j]]), 32, 1e6, torch.float32))).sum()
    assert torch.allclose(score(7, 3), score(1007, 1003), atol=1e-4)
    assert not torch.allclose(score(7, 3), score(7, 5), atol=1e-2)


def test_positions_stay_exact_at_long_context():
    cos, _ = rotary_embedding(torch.tensor([[32766, 32767]]), 128, 1e6, torch.bfloat16)
    expected = [math.cos(32766), math.cos(32767)]
    assert torch.allclose(cos[0, 0, :, 0].double(), torch.tensor(expected, dtype=torch.float64),
                          atol=5e-3)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_packed_attention_equals_the_masked_softmax(kv_heads):
    lengths, size = [5, 1, 17, 9], 8
    q, (k, v) = torch.randn(1, 4, 32, size), torch.randn(2, 1, kv_heads, 32, size)
    every_k = k.double().repeat_interleave(4 // kv_heads, 1)
    scores = q.double() @ every_k.transpose(2, 3) / math.sqrt(size)
    weights = scores.masked_fill(~reference.visible(lengths), -math.inf).softmax(-1)
    expected = weights @ v.double().repeat_interleave(4 // kv_heads, 1)
    assert relative(packed_attention(q, k, v, torch.tensor(lengths)).double(), expected) < 1e-6


def test_attention_never_builds_a_square_mask():
    q = torch.randn(1, 4, 256, 16, requires_grad=True)
    with LargestTensor() as largest:
        packed_attention(q, q[:, :2], q[:, 2:], torch.tensor([100, 156])).sum().backward()
    assert largest.numel < 256 * 256


# --------------------------------------------------------------------------------------------- loss

class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("chunk", [1, 7, 100, 10 ** 9])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_chunked_loss_and_gradients_equal_float64(monkeypatch, chunk, dtype, tolerance):
    monkeypatch.setitem(LOSS_CHUNK, "cpu", chunk * 50)
    x, weight = torch.randn(23, 16).to(dtype), torch.randn(50, 16).to(dtype)
    targets = torch.randint(50, (23,))
    wide = [t.double().requires_grad_() for t in (x, weight)]
    expected = F.cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum")
    (expected * 0.25).backward()
    narrow = [t.clone().requires_grad_() for t in (x, weight)]
    loss = FusedLinearCrossEntropy.apply(*narrow, targets, True)
    (loss * 0.25).backward()
    assert loss.dtype == torch.float32 and relative(loss.double(), expected) < tolerance
    for ours, theirs in zip(narrow, wide):
        assert ours.grad.dtype == dtype and relative(ours.grad.double(), theirs.grad) < tolerance


def test_the_weight_gradient_is_summed_in_fp32(monkeypatch):
    """300 chunks that add the same small number: in bf16 the sum would stop growing."""
    monkeypatch.setitem(LOSS_CHUNK, "cpu", 2)
    x = torch.ones(300, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    FusedLinearCrossEntropy.apply(x, weight, torch.zeros(300, dtype=torch.long), True).backward()
    assert weight.grad.tolist() == [[-150.0], [150.0]]


@pytest.mark.parametrize("tied", [True, False])
def test_no_tensor_of_tokens_times_vocabulary_is_ever_made(monkeypatch, tied):
    model = small_model(vocab_size=4096, tie_word_embeddings=tied)
    monkeypatch.setitem(LOSS_CHUNK, "cpu", 4096 * 16)
    ids = torch.randint(4096, (1, 256))
    with LargestTensor() as largest:
        model(ids, ids).backward()
    # the weight itself and its gradient; the logits would be four times that
    assert largest.numel == 4096 * 64


def test_rows_without_a_target_have_zero_loss_and_zero_gradients():
    model = small_model()
    loss = model(torch.tensor([[1, 2]]), torch.full((1, 2), IGNORE))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None and not p.grad.any()
                                    for p in model.parameters())


def test_the_gradients_are_given_out_once():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    loss = FusedLinearCrossEntropy.apply(x, weight, torch.tensor([0, 1, 2]), True)
    loss.backward(retain_graph=True)
    with pytest.raises(TypeError):
        loss.backward()


# -------------------------------------------------------------------------------------- whole model

@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_float64(shape):
    torch.manual_seed(1)
    model, lengths = small_model(**SHAPES[shape]), [20, 3, 14]
    ids, targets = torch.randint(263, (2, 37))
    targets[::3] = IGNORE
    wide = doubles(model)
    assert relative(model(ids[None], document_lengths=lengths)[0].double(),
                    reference.logits(wide, model.config, ids, lengths)) < 1e-5
    expected = reference.loss(wide, model.config, ids, targets, lengths)
    expected.backward()
    loss = model(ids[None], targets[None], lengths)
    loss.backward()
    assert relative(loss.double(), expected) < 1e-6
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad.double(),
                        wide[name].grad) < 1e-4 or wide[name].grad.norm() < 1e-9, name


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_transformers(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small_model(**SHAPES[shape])
    model.save_pretrained(tmp_path, max_shard_bytes=40_000)  # many shards
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32,
                                                               attn_implementation="eager")
    ids = torch.randint(263, (2, 33))
    assert relative(model(ids), theirs(ids).logits) < 1e-5
    F.cross_entropy(theirs(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten(),
                    reduction="sum").backward()
    model(ids[:, :-1], ids[:, 1:]).backward()
    for name, parameter in theirs.named_parameters():
        ours = model.get_parameter(name).grad
        # k_proj.bias has none
        assert relative(ours, parameter.grad) < 1e-4 or parameter.grad.norm() < 1e-5, name


@pytest.mark.parametrize("layout", [4, 5])
def test_folders_that_transformers_wrote_are_read(layout, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{k: v
                                                                       for k, v in RAW.items()
                                                                       if k != "model_type"}))
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    config = json.loads((tmp_path / "config.json").read_text())
    if layout == 4:
        config["rope_theta"] = config.pop("rope_parameters", config)["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = torch.randint(99, (1, 20))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert relative(Qwen2.from_pretrained(tmp_path)(ids), theirs(ids).logits) < 1e-5


def test_packed_equals_separate():
    model, documents = small_model(), [torch.randint(263, (n,)) for n in (12, 1, 30)]
    packed = model(torch.cat(documents)[None], document_lengths=[12, 1, 30])
    separate = torch.cat([model(d[None]) for d in documents], dim=1)
    assert relative(packed, separate) < 1e-6


def test_batched_rows_equal_single_rows():
    model, ids = small_model(), torch.randint(263, (3, 20))
    assert relative(model(ids), torch.cat([model(row[None]) for row in ids])) < 1e-6


@pytest.mark.parametrize("recompute, offload",
                         [("block", False), ("block", True), ("tiled", False), ("tiled", True)])
def test_recomputation_changes_no_gradient(monkeypatch, recompute, offload):
    monkeypatch.setattr(model_module, "MLP_TILE", 8)
    ids, targets = torch.randint(263, (2, 1, 30))
    gradients = []
    for model in (small_model(), small_model()):
        if gradients:
            model.recompute, model.offload = recompute, offload
        model(ids, targets, [10, 20]).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(relative(b, a) < 1e-6 or a.norm() < 1e-9 for a, b in zip(*gradients))


def saved_bytes(recompute, T=256):
    model, saved = small_model(hidden_size=32, intermediate_size=256), {}
    model.recompute = recompute
    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    ids = torch.randint(263, (1, T))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = model(ids, ids)  # held: what it saved stays distinct
    assert loss.requires_grad
    return sum(size for pointer, size in saved.items() if pointer not in weights)


def test_recomputation_saves_what_it_says():
    none, block, tiled = map(saved_bytes, ("none", "block", "tiled"))
    boundary = 256 * 32 * 4
    assert none > 2 * 4 * 256 * 256 * 4  # both layers keep at least four tensors of (T, I)
    assert block < 8 * boundary and tiled < 10 * boundary


# ------------------------------------------------------------------------------ weights on the disk

@pytest.mark.parametrize("tied", [True, False])
def test_state_dict_has_the_checkpoints_keys(tied):
    keys = set(small_model(tie_word_embeddings=tied).state_dict())
    layer = {f"model.layers.0.{n}" for n in (
        "self_attn.q_proj.weight", "self_attn.q_proj.bias", "self_attn.k_proj.weight",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.weight", "self_attn.v_proj.bias", "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight",
        "post_attention_layernorm.weight")}
    assert {k for k in keys if ".layers.0." in k} == layer
    assert {k for k in keys if ".layers." not in k} == {"model.embed_tokens.weight",
                                                        "model.norm.weight",
                                                        *([] if tied else ["lm_head.weight"])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [30_000, 10 ** 9])
def test_saved_files_hold_every_tensor_once_and_load_again(tmp_path, dtype, max_shard_bytes):
    model = small_model(tie_word_embeddings=False).to(dtype)
    model.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    read = [load_file(file) for file in files]  # by the safetensors library
    assert sum(map(len, read)) == len(model.state_dict()) and not list(tmp_path.glob("*.tmp"))
    for name, tensor in model.state_dict().items():
        found, = (part[name] for part in read if name in part)
        assert found.dtype == dtype and torch.equal(found, tensor)
    if max_shard_bytes == 30_000:
        assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
        assert all(len(part) == 1 or sum(t.nbytes for t in part.values()) <= 30_000
                   for part in read)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for part in read
                                                      for t in part.values())
    again = Qwen2.from_pretrained(tmp_path, dtype=dtype)
    assert again.config == model.config
    assert all(torch.equal(a, b)
               for a, b in zip(again.state_dict().values(), model.state_dict().values()))


def test_saving_again_leaves_no_stale_shard(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path, max_shard_bytes=30_000)
    (tmp_path / "model.safetensors.bak").touch()  # a user's own
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors",
                                                    "model.safetensors.bak"}


@pytest.mark.parametrize("max_shard_bytes", [30_000, 10 ** 9])
def test_a_head_of_its_own_unties_a_folder_that_says_it_is_tied(tmp_path, max_shard_bytes):
    model, folder = small_model(tie_word_embeddings=False), tmp_path / "claims"
    say_tied(model, folder, max_shard_bytes)
    read, ids = Qwen2.from_pretrained(folder), torch.randint(263, (20,))
    assert not read.config.tie_word_embeddings
    assert relative(read(ids[None])[0].double(),
                    reference.logits(doubles(model), model.config, ids)) < 1e-5
    read.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(tmp_path / "again/model.safetensors")["lm_head.weight"],
                       model.lm_head.weight)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert relative(read(ids[None]), theirs(ids[None]).logits) < 1e-5


def test_a_head_that_repeats_the_embedding_stays_tied(tmp_path):
    model = small_model(tie_word_embeddings=False, vocab_size=2500)  # of several pieces
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    say_tied(model, tmp_path)
    assert "lm_head.weight" not in Qwen2.from_pretrained(tmp_path).state_dict()
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1
    say_tied(model, tmp_path)
    assert torch.equal(Qwen2.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_a_tied_folder_without_weights_is_as_its_config_says(tmp_path):
    say_tied(small_model(tie_word_embeddings=False), tmp_path, 30_000)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()  # the index stays
    assert Qwen2Config.from_pretrained(tmp_path).tie_word_embeddings
    assert Qwen2Config.from_pretrained(write_config(tmp_path)).tie_word_embeddings is False


def test_a_head_whose_file_is_missing_is_not_passed_over(tmp_path):
    say_tied(small_model(tie_word_embeddings=False), tmp_path, 30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    (tmp_path / index["lm_head.weight"]).unlink()
    with pytest.raises(FileNotFoundError, match=index["lm_head.weight"]):
        Qwen2.from_pretrained(tmp_path)


@pytest.mark.parametrize("name, remedy", [
    ("adapter_model.safetensors", "merge the adapter"), ("adapter_model.bin", "merge the adapter"),
    ("pytorch_model.bin", "convert it"), ("pytorch_model.bin.index.json", "convert it")])
@pytest.mark.parametrize("has_config", [True, False])
def test_other_weights_are_named_with_their_remedy(tmp_path, name, remedy, has_config):
    if has_config:
        write_config(tmp_path, tie_word_embeddings=True)
    (tmp_path / name).write_text("x")
    with pytest.raises(FileNotFoundError, match=f"{name} does: {remedy}") as error:
        Qwen2.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def breakages(folder):
    """Name, damage, and what the message must say."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    def rewrite(**changes):
        save_file({k: v for k, v in {**tensors, **changes}.items() if v is not None}, weights)
    key = "model.layers.1.mlp.up_proj.weight"
    return {
        "truncated": (lambda: weights.write_bytes(weights.read_bytes()[:-100]),
                      ["model.safetensors", "truncated"]),
        "empty": (lambda: weights.write_bytes(b""), ["model.safetensors", "truncated"]),
        "absent": (weights.unlink, ["model.safetensors", "does not exist"]),
        "missing": (lambda: rewrite(**{key: None}), [key, "is absent"]),
        "unexpected": (lambda: rewrite(more=torch.ones(1)), ["more is [1]", "absent"]),
        "shape": (lambda: rewrite(**{key: torch.ones(3, 3)}), [key, "[3, 3]", "[96, 64]"]),
        "type": (lambda: rewrite(**{key: torch.ones(96, 64, dtype=torch.int8)}), [key, "I8"]),
        "index": (lambda: (folder / "model.safetensors.index.json").write_text("{}"),
                  ["index.json", "download it again"]),
    }


@pytest.mark.parametrize("name",
                         ["truncated", "empty", "absent", "missing", "unexpected", "shape", "type",
                          "index"])
def test_damaged_weights_are_refused_by_name(model_dir, name):
    damage, says = breakages(model_dir)[name]
    with torch.device("meta"):
        empty = Qwen2(Qwen2Config.from_pretrained(model_dir))
    check_weights(empty, model_dir)
    damage()
    for read in (Qwen2.from_pretrained, lambda folder: check_weights(empty, folder)):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            read(model_dir)
        assert all(part in str(error.value) for part in says), error.value
        assert "\n" not in str(error.value)


def test_a_shard_that_the_index_names_but_is_missing_is_named(tmp_path):
    small_model().save_pretrained(tmp_path, max_shard_bytes=30_000)
    (tmp_path / "model-00002-of-00009.safetensors").unlink(missing_ok=True)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        Qwen2.from_pretrained(tmp_path)


def test_a_full_disk_leaves_the_old_weights(tmp_path, monkeypatch):
    model = small_model()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(model_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        small_model(seed=1).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


# -------------------------------------------------------------------------------- several processes

SHARDED = """
import os, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import model as model_module
from conftest import small_model
from model import Qwen2, barrier, check_weights, load_weights
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path({folder!r})

def sharded(whole):
    with torch.device("meta"):
        model = Qwen2(whole.config)
    check_weights(model, folder / "whole")
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device="cpu")
    load_weights(model, folder / "whole")
    return model
"""


def run_sharded(folder, text):
    """Runs `text` on two ranks after SHARDED."""
    small_model(vocab_size=271).save_pretrained(folder / "whole", max_shard_bytes=30_000)
    (folder / "run.py").write_text(SHARDED.format(root=str(ROOT), folder=str(folder)) + text)
    return run_script(folder / "run.py", processes=2, check=False)


def test_a_sharded_model_computes_and_saves_as_the_whole_one(tmp_path):
    done = run_sharded(tmp_path, """
whole, ids = small_model(vocab_size=271), torch.tensor([[5, 1, 4, 2, 3]])
model = sharded(whole)
for recompute in ("none", "block", "tiled"):
    model.recompute = recompute
    torch.testing.assert_close(model(ids, ids), whole(ids, ids))
    model(ids, ids).backward()
model.save_pretrained(folder / "again", max_shard_bytes=60_000)
again = Qwen2.from_pretrained(folder / "again")
assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters()))
print("done")
""")
    assert done.returncode == 0 and done.stdout.count("done") == 2, done.stderr


@pytest.mark.slow
def test_a_rank_that_cannot_write_is_missed_at_the_barrier(tmp_path):
    done = run_sharded(tmp_path, """
model = sharded(small_model(vocab_size=271))
def full(descriptor):
    raise OSError(28, "No space left on device")
model_module.os.fsync = full
try:
    model.save_pretrained(folder / "again")
except (OSError, RuntimeError) as error:
    print(rank, type(error).__name__, error, flush=True)
    os._exit(0 if rank else 2)
""")
    assert "0 OSError" in done.stdout and "cannot write: No space left" in done.stdout
    assert "1 RuntimeError" in done.stdout or "exitcode  : -15" in done.stderr
