"""The manual of data.py, in its order: the exact strings and masks, what is read and refused, what
packing must not leak."""
import base64
import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import verify
from conftest import ROOT, run_script, run_unread, shared_file, small_config
from data import (IGNORE, assemble, batch_indices, builtin_problems, builtin_tokenizer,
                  encode_conversation, epoch_order,
                  imbalance, load_rows, load_tokenizer, pack, read_problems, read_rows, render_chat,
                  to_messages)
from model import Qwen2Config

USER, ASSISTANT = {"role": "user", "content": "Hi  there\n"}, {"role": "assistant",
                                                               "content": "Hello!\n\n7 × 8 = 56"}
CONVERSATIONS = {
    "one turn": [USER, ASSISTANT],
    "system": [{"role": "system", "content": "Be brief."}, USER, ASSISTANT],
    "two turns": [USER, ASSISTANT, USER, {"role": "assistant", "content": ""}],
    "late system": [USER, ASSISTANT, {"role": "system", "content": "Now in French."}, USER,
                    ASSISTANT],
    "open": [USER, ASSISTANT, USER],
}


@pytest.fixture(scope="session")
def qwen_folder():
    return shared_file("qwen2.5-tokenizer/tokenizer.json").parent


@pytest.fixture(scope="session")
def qwen(qwen_folder):
    return load_tokenizer(qwen_folder)


# ---------------------------------------------------------------------- tokenizer and chat template

@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("generate", [False, True])
def test_render_chat_equals_the_published_template(qwen, name, generate):
    messages = CONVERSATIONS[name]
    assert render_chat(messages, generate) == render_chat(messages, generate,
                                                          template=qwen.template)


def test_render_chat_adds_qwens_default_system_turn():
    assert render_chat([USER], add_generation_prompt=True) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
        "assistant.<|im_end|>\n"
        "<|im_start|>user\nHi  there\n<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_cannot_reach_python():
    with pytest.raises(Exception, match="unsafe|not safe|security|undefined"):
        render_chat([USER], template="{{ messages.__class__.__mro__[1].__subclasses__() }}")


@pytest.mark.parametrize("name", ["one turn", "system", "two turns", "late system"])
def test_targets_are_the_answers_and_their_end_tokens(qwen, name):
    messages = CONVERSATIONS[name]
    ids, mask = encode_conversation(qwen, messages)
    assert ids == qwen.encode(render_chat(messages)) and len(ids) == len(mask) and set(mask) <= {0,
                                                                                                 1}
    answers = "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
    assert qwen.decode([i for i, m in zip(ids, mask) if m]) == answers
    assert mask[-1] == 0 and qwen.decode(ids[-1:]) == "\n"  # the newline after the last end token


def test_the_mask_goes_by_position_not_by_token(qwen):
    """The user's text holds the end token; it must not become a target, nor hide the one that
    is."""
    ids, mask = encode_conversation(qwen,
                                    [{"role": "user", "content": "<|im_end|><|endoftext|>"},
                                     ASSISTANT])
    end = qwen.token_id("<|im_end|>")
    assert [m for i, m in zip(ids, mask) if i == end] == [0, 0, 0, 1]


def test_an_answer_that_starts_with_newlines_is_cut_where_generation_starts(qwen):
    messages = [USER, {"role": "assistant", "content": "\n\nyes"}]
    ids, mask = encode_conversation(qwen, messages)
    prompt = qwen.encode(render_chat([USER], add_generation_prompt=True))
    assert ids[:len(prompt)] == prompt and not any(mask[:len(prompt)]) and mask[len(prompt)] == 1
    assert qwen.decode(ids) == render_chat(messages)


def test_another_end_token_closes_the_text_as_the_original_did(qwen):
    ids, mask = encode_conversation(qwen, [USER, ASSISTANT], end_token="<|endoftext|>")
    assert qwen.decode(ids).endswith("= 56<|endoftext|>") and mask[-1] == 1


def test_a_folder_with_another_template_is_rendered_from_it(tmp_path):
    tokenizer = builtin_tokenizer()
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}{% if "
        "add_generation_prompt %}[assistant] {% endif %}")
    tokenizer = load_tokenizer(tmp_path)
    ids, mask = encode_conversation(tokenizer, [USER, ASSISTANT])
    assert tokenizer.end_token == "<|endoftext|>"
    assert tokenizer.decode(ids) == (f"[user] {USER['content']}<|endoftext|>"
                                     f"[assistant] {ASSISTANT['content']}<|endoftext|>")
    assert tokenizer.decode([i
                             for i, m in zip(ids, mask)
                             if m]) == ASSISTANT["content"] + "<|endoftext|>"


def test_a_templates_begin_and_end_tokens_are_the_folders_own(tmp_path):
    """As DeepSeek-R1-Distill's: it begins with bos, ends answers with eos, and opens the thought
    itself."""
    builtin_tokenizer().save(tmp_path)
    config = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}{% else "
        "%}A:{{ m.content }}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}A:<think>\n{% endif %}")
    tokenizer = load_tokenizer(tmp_path)
    ids, mask = encode_conversation(tokenizer,
                                    [USER,
                                     {"role": "assistant", "content": "<think>\nhm</think>yes"}])
    assert tokenizer.decode(ids) == (f"<|im_start|>U:{USER['content']}"
                                     "A:<think>\nhm</think>yes<|endoftext|>")
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == "hm</think>yes<|endoftext|>"


@pytest.mark.parametrize("template, says",
                         [("{% for m in %}", "the chat template fails"),
                          ("{{ nothing.x }}", "the chat template fails"),
                          ("{{ messages[0].content + 1 }}", "the chat template fails"),
                          ("{% for m in messages %}{{ m.content }}{% endfor %}",
                           "add_generation_prompt")])
def test_a_template_that_cannot_work_is_refused(template, says):
    tokenizer = builtin_tokenizer()
    tokenizer.template = template
    with pytest.raises(ValueError, match=says):
        encode_conversation(tokenizer, [USER, ASSISTANT])


@pytest.mark.parametrize("config", [{"pad_token": 3}, {"chat_template": [{"name": "default"}]}])
def test_a_broken_tokenizer_config_is_named(tmp_path, config):
    builtin_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"tokenizer_config.json is broken \("):
        load_tokenizer(tmp_path)


def test_a_template_that_rewrites_earlier_turns_takes_single_answers_only(tmp_path):
    """As that of DeepSeek-R1-Distill, which drops the thoughts of earlier turns."""
    tokenizer = builtin_tokenizer()
    tokenizer.template = ("{% for m in messages %}{% set c = m.content %}{% if '</think>' in c "
                          "%}{% set c = c.split('</think>')[-1] %}"
                          "{% endif %}<{{ m.role }}>{{ c }}{% if m.role == 'assistant' "
                          "%}<|im_end|>{% endif %}{% endfor %}"
                          "{% if add_generation_prompt %}<assistant>{% endif %}")
    thought = {"role": "assistant", "content": "hm</think>yes"}
    ids, mask = encode_conversation(tokenizer, [USER, thought])
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == "hm</think>yes<|im_end|>"
    with pytest.raises(ValueError, match="changes earlier turns"):
        encode_conversation(tokenizer, [USER, thought, USER, thought])


def without_loss(message):
    return message | {"loss": False}


@pytest.mark.parametrize("off", [0, 1, 2])
def test_an_answer_without_loss_is_context(qwen, off):
    answers = [{"role": "assistant", "content": text} for text in ("one", "two", "three")]
    messages = [m for answer in answers for m in (USER, answer)]
    messages[2 * off + 1] = without_loss(answers[off])
    ids, mask = encode_conversation(qwen, messages)
    assert ids == encode_conversation(qwen, [m for a in answers for m in (USER, a)])[0]
    assert qwen.decode([i for i, m in zip(ids, mask) if m]) == "".join(
        f"{a['content']}<|im_end|>" for a in answers if a is not answers[off])


def test_an_answer_without_loss_is_encoded_as_a_chat_would_show_it(qwen):
    first = {"role": "assistant", "content": "\n\none"}  # cut where it is a target
    messages = [USER, without_loss(first), USER, ASSISTANT]
    ids, mask = encode_conversation(qwen, messages, end_token="<|endoftext|>")
    prompt = qwen.encode(render_chat([USER, first, USER], add_generation_prompt=True))
    assert ids == prompt + qwen.encode(ASSISTANT["content"] + "<|endoftext|>")
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    ids, mask = encode_conversation(qwen, [USER, without_loss(first)], end_token="<|endoftext|>")
    assert ids == qwen.encode(render_chat([USER, first])) and not any(mask)


def test_load_tokenizer_needs_only_tokenizer_json(qwen, qwen_folder, tmp_path):
    os.symlink(qwen_folder / "tokenizer.json", tmp_path / "tokenizer.json")
    bare = load_tokenizer(tmp_path)
    assert bare.end_token == "<|im_end|>" and bare.encode("Hello world") == [9707, 1879]
    assert encode_conversation(bare, [USER, ASSISTANT]) == encode_conversation(qwen,
                                                                               [USER, ASSISTANT])


def test_tokenizer_equals_transformers(qwen, qwen_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(qwen_folder)
    for messages in CONVERSATIONS.values():
        assert render_chat(messages) == theirs.apply_chat_template(messages, tokenize=False)
    for text in ("e\u0301 Ünïcode 中文 🙂", "x = 3.14159\n\n\n  y", "<|im_start|>system"):
        assert qwen.encode(text) == theirs.encode(text)
        assert qwen.decode(qwen.encode(text)) == theirs.decode(theirs.encode(text))


def test_the_builtin_tokenizer_is_bytes_and_survives_saving(tmp_path):
    tokenizer = builtin_tokenizer()
    text = "3 + 4 = 7 🙂\n<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer.encode("🙂")) == 4
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(text) == tokenizer.encode(text) and again.template == tokenizer.template
    assert (again.token_id(again.end_token), again.pad_token_id) == (258, 256)


# Prompts that a template's language, its file format or its blanks might spoil.
SYSTEMS = {
    "skyt1": data.SYSTEM_PROMPTS["skyt1"],
    "quotes": """Say "yes", 'no' or \\"both\\".""",
    "jinja": "{{ messages }} {% if x %} {# no #} %} }} {%- endraw -%}",
    "backslashes": r"\\boxed{} \n \u0041 C:\new \\",
    "blanks": "  \n\n\ttwo lines\r\nand a third \n\n ",
    "no ASCII": "é 中文 🙂\u2028\x7f\x01 \\ud83d",
    "empty": "",
}
TEMPLATES = {
    "the built-in one": data.CHATML,
    "a default in a condition": (  # SmolLM2's
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are small<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"),
    "blanks before the first block": (
        "\n\n  {% for m in messages %}\n  [{{ m.role }}] {{ m.content }}<|im_end|>\n  {%- endfor %}"
        "\n{% if add_generation_prompt %}\n[assistant] {% endif %}\n"),
    "the system turn apart": (  # as R1's and Llama's
        "{%- set ns = namespace(system='none') -%}{%- for m in messages if m.role == 'system' -%}"
        "{%- set ns.system = m.content -%}{%- endfor -%}{{ bos_token }}<{{ ns.system }}>"
        "{%- for m in messages if m.role != 'system' -%}\n{{ m.role }}: {{ m.content }}<|im_end|>"
        "{%- endfor -%}{%- if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"),
}


def folder_with(template, folder, place):
    """A model's tokenizer whose chat template is a string, or "default" of a list, in
    tokenizer_config.json, or a file beside it, which counts if there are both."""
    folder.mkdir()
    builtin_tokenizer().save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = {"list": [{"name": "tool_use", "template": "tools"},
                                        {"name": "default", "template": template}],
                               "string": template, "file": "another"}[place]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if place == "file":
        (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


def check_default_system(tokenizer, folder, system):
    """The folder saved with a system prompt renders, here and in transformers, what the tokenizer
    renders with the prompt as a turn."""
    folder.mkdir()
    tokenizer.save(folder, system)
    saved, theirs = load_tokenizer(folder), None
    with contextlib.suppress(ImportError):
        from transformers import AutoTokenizer
        theirs = AutoTokenizer.from_pretrained(folder)
    own = {"role": "system", "content": "Mine."}
    for messages in ([USER], [USER, ASSISTANT], [USER, ASSISTANT, USER], [own, USER],
                     [{"role": "system", "content": ""}, USER]):
        explicit = messages
        if messages[0]["role"] != "system":
            explicit = [{"role": "system", "content": system}, *messages]
        for generate in (False, True):
            expected = tokenizer.render(explicit, generate)
            assert saved.render(messages, generate) == expected
            assert theirs is None or theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate) == expected
    assert saved.end_token == tokenizer.end_token
    return saved


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("template", ["qwen", *TEMPLATES])
def test_a_folder_saved_with_a_system_prompt_has_it_as_its_default(request, tmp_path, template,
                                                                   system):
    if template == "qwen":
        template = request.getfixturevalue("qwen").template
    tokenizer = folder_with(TEMPLATES.get(template, template), tmp_path / "base", "string")
    check_default_system(tokenizer, tmp_path / "out", SYSTEMS[system])


@pytest.mark.parametrize("place", ["list", "string", "file"])
def test_the_default_is_written_wherever_the_template_was(tmp_path, place):
    template = TEMPLATES["a default in a condition"]
    tokenizer = folder_with(template, tmp_path / "base", place)
    check_default_system(tokenizer, tmp_path / "out", "Be brief.")
    tokenizer.save(tmp_path)  # without a prompt the folder's files are copied as they are
    for path in (tmp_path / "base").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_folder_without_a_template_gets_qwens_with_the_prompt(qwen_folder, tmp_path):
    (tmp_path / "base").mkdir()
    os.symlink(qwen_folder / "tokenizer.json", tmp_path / "base" / "tokenizer.json")
    check_default_system(load_tokenizer(tmp_path / "base"), tmp_path / "out", "Be brief.")


def test_the_builtin_tokenizer_and_a_folder_trained_on_further_take_a_prompt(tmp_path):
    first = check_default_system(builtin_tokenizer(), tmp_path / "first", "one\n{% endif %}")
    second = check_default_system(first, tmp_path / "second", "two")
    assert "one" not in second.template
    again = check_default_system(first, tmp_path / "again", "one\n{% endif %}")
    assert again.template == first.template


def test_a_published_model_takes_a_prompt(tmp_path):
    """REAL_MODEL_DIR names a chat model in Hugging Face layout."""
    folder = os.environ.get("REAL_MODEL_DIR") or pytest.skip("needs REAL_MODEL_DIR")
    for name, system in SYSTEMS.items():
        check_default_system(load_tokenizer(folder), tmp_path / name, system)


# ------------------------------------------------------------------------------------- reading rows

SHAREGPT = {"system": "s",
            "conversations": [{"from": "user", "value": "u"}, {"from": "assistant", "value": "a"}]}
EXPECTED = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("row", [
    SHAREGPT,
    {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "u"},
                       {"from": "gpt", "value": "a"}]},
    {"messages": EXPECTED, "id": 3}, {"system": "s", "messages": EXPECTED[1:]},
    {"kind": None, "prompt": "u", "response": "a"}])
def test_all_row_layouts_give_the_same_messages(row):
    assert to_messages(row, system="s") == EXPECTED


@pytest.mark.parametrize("mark", [{"loss": False}, {"loss": None}, {"weight": 0}, {"weight": 0.0},
                                  {"loss": False, "weight": 0}, {"train": False}])
def test_turns_say_that_no_loss_is_taken_on_them(mark):
    turns = [{"from": "human", "value": "u", **mark}, {"from": "gpt", "value": "a", **mark}]
    assert to_messages({"conversations": turns})[1] == without_loss(EXPECTED[2])
    assert to_messages({"messages": [EXPECTED[1], EXPECTED[2] | mark]})[1] == without_loss(
        EXPECTED[2])


@pytest.mark.parametrize("mark", [{"loss": True}, {"weight": 1}, {"weight": 1.0}, {"train": True},
                                  {"weight": None, "train": None}])
def test_a_turn_that_asks_for_its_loss_is_like_any_other(mark):
    assert to_messages({"messages": [EXPECTED[1], EXPECTED[2] | mark]}) == EXPECTED[1:]


def test_text_parts_are_their_text_and_empty_extras_say_nothing():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "\nb"}]
    extras = {"tool_calls": None, "reasoning_content": ""}
    row = {"messages": [EXPECTED[1], {"role": "assistant", "content": parts, **extras}]}
    for tools in (None, [], "[]", ""):
        assert to_messages({**row, "tools": tools})[1] == {"role": "assistant", "content": "a\nb"}
    asked = {"messages": [{"role": "user", "content": parts}, EXPECTED[2]]}
    assert data.question_of(asked) == "a\nb"


def test_a_kept_sample_gets_the_recipes_prompts():
    def user(**fields):
        system, turn, _ = to_messages({"prompt": "P", "response": "R", **fields})
        assert system["content"].startswith("Your role as an assistant involves thoroughly "
                                            "exploring")
        return turn["content"]
    assert user(kind="math") == "Return your final response within \\boxed{}. P"
    assert user(kind="choice").endswith("as your final response. P")
    assert "should take stdin as input" in user(kind="code", tests=[{"input": "1", "output": "2"}])
    assert "without invoking it" in user(kind="code",
                                         tests=[{"fn_name": "f", "args": [], "expected": 1}])
    assert to_messages({"prompt": "P", "response": "R"}, system="none")[0]["role"] == "user"


def lines(*rows):
    return "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows).encode()


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", lines(SHAREGPT, "", SHAREGPT)),
    ("a.json", json.dumps([SHAREGPT, SHAREGPT], indent=1).encode()),
    ("a.json", b"\xef\xbb\xbf" + lines(SHAREGPT, SHAREGPT)),
    ("a.json", b"[" + lines(SHAREGPT) + b",\n" + lines(SHAREGPT) + b" ]"),
    ("a.jsonl.gz", gzip.compress(lines(SHAREGPT, SHAREGPT)))])
def test_json_and_jsonl_are_told_apart_by_content(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [row for row, _ in read_rows(tmp_path / name)] == [SHAREGPT, SHAREGPT]


BROKEN = {
    "empty": (b"", "holds no rows"),
    "empty array": (b" [ ]", "holds no rows"),
    "not UTF-8": (lines(SHAREGPT) + b"\n\"\xff\xfe\"", "a.jsonl:2: not UTF-8"),
    "broken": (lines(SHAREGPT, SHAREGPT, '{"conversations": ['), "a.jsonl:3: broken JSON"),
    "truncated array": (json.dumps([SHAREGPT, SHAREGPT], indent=1).encode()[:-5],
                        "a.jsonl:\\d+: broken JSON"),
    "cut after a row": (b"[" + lines(SHAREGPT), "a.jsonl:1: broken JSON"),
    "two arrays": (b"[" + lines(SHAREGPT) + b"]\n[" + lines(SHAREGPT) + b"]",
                   "a.jsonl:2: broken JSON"),
    "trailing comma": (b"[" + lines(SHAREGPT) + b",\n]", "a.jsonl:2: broken JSON"),
    "no comma": (b"[" + lines(SHAREGPT, SHAREGPT) + b"]", "a.jsonl:2: broken JSON"),
    "array not UTF-8": (b"[" + lines(SHAREGPT) + b",\n\"\xff\"]", "a.jsonl:2: not UTF-8"),
    "long number": (b'{"a": ' + b"1" * 5000 + b"}", "a.jsonl:1: broken JSON"),
    "half a character": (lines({"messages": [{"role": "user", "content": "\ud83d"}]}),
                         "a.jsonl:1: .*half a character"),
    "role list": (lines({"messages": [{"role": ["user"], "content": "x"}]}),
                  r"a.jsonl:1: unknown role \['user'\]"),
    "system": (lines({**SHAREGPT, "system": 5}),
               "a.jsonl:1: `content` of a system turn is not a string"),
    "assistant first": (lines({"messages": EXPECTED[2:] + EXPECTED[1:]}),
                        "a.jsonl:1: no user turn before the first assistant"),
    "kind": (lines({"kind": [], "prompt": "p", "response": "r"}), r"a.jsonl:1: unknown kind \[\]"),
    "tests": (lines({"kind": "code", "tests": [1], "prompt": "p", "response": "r"}),
              "a.jsonl:1: `tests` must be"),
    "not passed": (lines({"prompt": "p", "response": "r", "passed": False}),
                   "a.jsonl:1: a sample that did not pass"),
    "half a character of a response": (br'{"prompt": "p", "response": "\ud800"}',
                                       "a.jsonl:1: `response`"),
    "nested": (b"[" * 100_000, "a.jsonl:1: broken JSON"),
    "endless number": (b"[1" + b"0" * 5000 + b"]", "a.jsonl:1: broken JSON"),
    "no object": (lines(SHAREGPT, [1]), "a.jsonl:2: a row must be an object"),
    "no assistant": (lines(SHAREGPT, {"messages": EXPECTED[:2]}), "a.jsonl:2: no assistant turn"),
    "role": (lines({"messages": [{"role": "robot", "content": "x"}]}),
             "a.jsonl:1: unknown role 'robot'"),
    "content": (lines({"messages": [{"role": "user", "content": None}]}),
                "a.jsonl:1: `content` of a user turn is not a string"),
    "no role": (lines({"conversations": [{"value": "x"}]}), "a.jsonl:1: a turn has no `from`"),
    **{f"{mark} of a {role}": (
        lines({"messages": [EXPECTED[1] | (mark if role == "user" else {}),
                            EXPECTED[2] | (mark if role != "user" else {})]}),
        re.escape(f"a.jsonl:1: `{name}` of a turn of the {role} is {value!r}"))
       for role, marks in (("assistant", [{"loss": "no"}, {"loss": []}, {"weight": 0.5},
                                          {"weight": 2}]),
                           ("user", [{"loss": True}, {"weight": 1}, {"weight": -1}]))
       for mark in marks for name, value in mark.items()},
    **{f"row's {name}": (lines(SHAREGPT, {**SHAREGPT, name: value}),
                         f"a.jsonl:2: `{name}` is not supported")
       for name, value in (("tools", [{"name": "f"}]), ("tools", '[{"name": "f"}]'),
                           ("images", ["a.png"]), ("image", "a.png"), ("audio", "a.wav"))},
    **{f"turn's {name}": (lines({"messages": [EXPECTED[1], {**EXPECTED[2], "content": content,
                                                            name: value}]}),
                          f"a.jsonl:1: `{name}` is not supported")
       for name, value, content in (("tool_calls", [{"id": 1}], None),
                                    ("function_call", {"name": "f"}, None),
                                    ("reasoning_content", "hm", "a"), ("thinking", "hm", "a"))},
    **{f"{role} turn": (lines({"messages": [*EXPECTED, {"role": role, "content": "x"}]}),
                        f"a.jsonl:1: unknown role '{role}'") for role in ("tool", "function_call",
                                                                         "observation")},
    "image": (lines({"messages": [{"role": "user", "content": [
        {"type": "text", "text": "u"}, {"type": "image_url", "image_url": {"url": "x"}}]},
        EXPECTED[2]]}), "a.jsonl:1: `content` of a user turn has a part .*image_url"),
    "part": (lines({"messages": [{"role": "user", "content": ["u"]}, EXPECTED[2]]}),
             "a.jsonl:1: `content` of a user turn has a part that is not text: u"),
    "part's text": (lines({"messages": [{"role": "user", "content": [{"type": "text"}]},
                                        EXPECTED[2]]}),
                    "a.jsonl:1: `content` of a user turn is not a string"),
    "another layout": (lines({"question": "x", "answer": "y"}),
                       r"a.jsonl:1: not a training row \(fields: question, answer\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_named_by_file_and_line(tmp_path, name):
    content, says = BROKEN[name]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load_rows([tmp_path / "a.jsonl"], builtin_tokenizer(), 100, cache=tmp_path / "cache",
                  quiet=True)
    assert not any((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


@pytest.mark.parametrize("name",
                         ["missing.jsonl", "./missing", "a/b/c", "builtin:other", "owner/name"])
def test_names_that_are_nowhere_are_refused_in_one_line(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as error:
        data.find_data(name)
    assert name in str(error.value) and "\n" not in str(error.value)
    # only a hub name asks the hub
    assert ("fetched from the hub" in str(error.value)) == (name == "owner/name")


def test_a_hub_data_set_in_the_offline_cache_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "datasets--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c0ffee")
    (folder / "snapshots" / "c0ffee").mkdir(parents=True)
    for split in ("train", "test"):
        (folder / "snapshots" / "c0ffee" / f"{split}.jsonl").write_bytes(lines(SHAREGPT))
    snapshot = data.find_data("owner/name")
    assert [path.name for path in snapshot] == ["train.jsonl"]


def test_array_rows_do_not_depend_on_where_blocks_end(tmp_path):
    rows = [{"n": i, "text": "ä🙂\\\"]," * (i % 5)} for i in range(50)]
    text = json.dumps(rows, indent=1, ensure_ascii=False)
    for block in (1, 2, 3, 7, 50, 10 ** 6):
        numbered = list(data.array_rows("a", io.StringIO(text), block))
        assert [row for row, _ in numbered] == rows
        assert all(text.splitlines()[line - 1].strip() == "{" for _, line in numbered)


def test_csv_rows_and_their_errors(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,response\n"two\nlines",x\n')
    assert list(read_rows(path)) == [({"prompt": "two\nlines", "response": "x"}, 3)]
    path.write_text("prompt,response\na,b,c\n")
    with pytest.raises(ValueError, match="a.csv:2: 2 columns in the header"):
        list(read_rows(path))
    path.write_bytes(b"prompt,response\n\xff,b\n")
    with pytest.raises(ValueError, match="a.csv:.*not UTF-8"):
        list(read_rows(path))


def test_a_folder_is_read_by_its_train_split_if_it_has_one(tmp_path):
    for name in ("math.jsonl", "constraints.jsonl"):
        (tmp_path / name).write_text("{}")
    assert [p.name for p in data.find_data(tmp_path)] == ["constraints.jsonl", "math.jsonl"]
    for name in ("train-00.jsonl", "test-00.jsonl"):
        (tmp_path / name).write_text("{}")
    assert [p.name for p in data.find_data(tmp_path)] == ["train-00.jsonl"]


# ---- finding files

def names_of(folder, **options):
    return [str(path.relative_to(folder)) for path in data.find_data(folder, **options)]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_a_folders_files_hidden_ones_linked_ones_and_capital_suffixes(tmp_path, capsys):
    touch(tmp_path / "there", "c.jsonl")
    folder = tmp_path / "set"
    touch(folder, ".ipynb_checkpoints/a-checkpoint.jsonl", ".b.jsonl", "a.JSONL", "b/x.Json",
          "dataset_infos.json", "notes.txt")
    (folder / "linked").symlink_to(tmp_path / "there")
    (folder / "b" / "back").symlink_to(folder)
    (folder / "b" / "self").symlink_to(folder / "b")
    assert names_of(folder) == ["a.JSONL", "b/x.Json", "linked/c.jsonl"]
    assert "a.JSONL, b/x.Json, linked/c.jsonl" in capsys.readouterr().err


SPLITS = {
    ("train.jsonl", "test.jsonl", "train_extra.jsonl"): {
        None: ["train.jsonl"], "test": ["test.jsonl"], "train,test": ["train.jsonl", "test.jsonl"],
        "Test": ["test.jsonl"], "train_extra": ["train_extra.jsonl"],
        "dev": "has no split dev: its files are test.jsonl, train.jsonl"},
    ("main/train-00000-of-00001.json", "main/test-00000-of-00001.json",
     "socratic/train-00000-of-00001.json", "socratic/test-00000-of-00001.json"): {
        None: "holds several sets, such as main/train and socratic/train: .* --split main/train",
        "test": "several sets", "main/test": ["main/test-00000-of-00001.json"],
        "socratic/train": ["socratic/train-00000-of-00001.json"]},
    ("data/train-00000-of-00002.json", "data/train-00001-of-00002.json", "data/test.json"): {
        None: ["data/train-00000-of-00002.json", "data/train-00001-of-00002.json"]},
    ("train-00000-of-00002.json", "train-00000-of-00003.json", "train-00001-of-00002.json"): {
        None: "several sets"},
    ("test.jsonl", "test2.jsonl", "test3.jsonl"): {
        None: ["test.jsonl", "test2.jsonl", "test3.jsonl"], "test": ["test.jsonl"],
        "test2": ["test2.jsonl"], "test,test2": ["test.jsonl", "test2.jsonl"]},
    ("train/part1.csv", "train/part2.csv", "test/part1.csv"): {
        None: ["train/part1.csv", "train/part2.csv"]},
    ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "constraints.jsonl"): {
        None: ["gsm8k_train.jsonl"], "test": ["gsm8k_test.jsonl"]},
    ("data/train-00000-of-00002-8ea4cd0fa0ec7c75.json",
     "data/train-00001-of-00002-62ca8a5ff9fa6ea3.json", "data/test-00000-of-00001-a09b74b3.json"): {
        None: ["data/train-00000-of-00002-8ea4cd0fa0ec7c75.json",
               "data/train-00001-of-00002-62ca8a5ff9fa6ea3.json"],
        "data/test": ["data/test-00000-of-00001-a09b74b3.json"]},
    ("maths.jsonl", "code.jsonl"): {None: ["code.jsonl", "maths.jsonl"], "code": ["code.jsonl"]},
}


@pytest.mark.parametrize("names", SPLITS)
def test_a_split_is_taken_by_name_and_sets_are_not_mixed(tmp_path, names):
    touch(tmp_path, *names)
    for split, expected in SPLITS[names].items():
        if isinstance(expected, list):
            assert names_of(tmp_path, split=split) == expected
        else:
            with pytest.raises(ValueError, match=expected):
                data.find_data(tmp_path, split)


class Hub:
    """What huggingface_hub would answer about a data set; nothing is asked for."""

    def __init__(self, monkeypatch, folder, *names):
        self.folder, self.names, self.fetched = folder, names, []
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", self.info)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)

    def info(self, name, **options):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def download(self, name, repo_type, allow_patterns):
        self.fetched += allow_patterns
        touch(self.folder, *allow_patterns)
        return str(self.folder)


def test_of_a_hub_data_set_only_the_split_is_fetched(tmp_path, monkeypatch):
    hub = Hub(monkeypatch, tmp_path, "README.md", "main/train.jsonl", "main/test.jsonl",
              "socratic/test.jsonl")
    path, = data.find_data("openai/gsm8k", "main/test")
    assert hub.fetched == ["main/test.jsonl"] and path == tmp_path / "main/test.jsonl"
    assert data.find_data("gsm8k") == [path]
    with pytest.raises(ValueError, match="openai/gsm8k holds several sets"):
        data.find_data("openai/gsm8k", "test")
    with pytest.raises(ValueError, match="has no split validation: its files are main/test.jsonl"):
        data.find_data("openai/gsm8k", "validation")
    hub.names = ["gpqa_diamond.csv", "gpqa_main.csv"]  # no split: still two sets
    with pytest.raises(ValueError, match="several sets"):
        data.find_data("Idavidrein/gpqa")


def test_without_pyarrow_parquet_is_refused_before_anything_is_fetched(tmp_path, monkeypatch):
    hub = Hub(monkeypatch, tmp_path, "data/train-00000-of-00001.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="owner/name: .*pip install pyarrow"):
        data.find_data("owner/name")
    assert not hub.fetched
    touch(tmp_path, "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: .*pip install pyarrow"):
        list(read_rows(tmp_path / "a.parquet"))


# Names under which the hub had them, as far as other projects' loaders tell, and what lies beside.
PUBLISHED = {
    "math500": (["test.jsonl"], []),
    "aime24": (["data/train-00000-of-00001.parquet"], []),
    "olympiadbench": (["OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet"],
                      ["OlympiadBench/TP_TO_maths_en_COMP/TP_TO_maths_en_COMP.parquet"]),
    "gsm8k": (["main/test-00000-of-00001.parquet"],
              ["main/train-00000-of-00001.parquet", "socratic/test-00000-of-00001.parquet"]),
    "gpqa_diamond": (["gpqa_diamond.csv"], ["gpqa_main.csv", "gpqa_extended.csv"]),
    "mmlu_pro": (["data/test-00000-of-00001.parquet"], ["data/validation-00000-of-00001.parquet"]),
    "arc_challenge": (["ARC-Challenge/test-00000-of-00001.parquet"],
                      ["ARC-Easy/test-00000-of-00001.parquet"]),
    "livecodebench": (["test.jsonl", "test2.jsonl"], ["test3.jsonl"]),
    "mbpp": (["full/test-00000-of-00001.parquet"], ["sanitized/test-00000-of-00001.parquet"]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_of_a_benchmark_its_own_split_is_fetched(tmp_path, monkeypatch, name):
    files, others = PUBLISHED[name]
    hub = Hub(monkeypatch, tmp_path / "hub", *files, *others)
    monkeypatch.setattr(data, "import_parquet", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert [str(path.relative_to(tmp_path / "hub")) for path in data.find_data(name)] == files
    assert hub.fetched == files


def test_a_benchmarks_missing_split_is_never_another_one(tmp_path, monkeypatch):
    touch(tmp_path / "gsm8k", "train.jsonl", "test.jsonl")
    with pytest.raises(ValueError, match="has no split main/test: its files are test.jsonl, train"):
        data.find_data(tmp_path / "gsm8k")
    assert names_of(tmp_path / "gsm8k", split="test") == ["test.jsonl"]
    hub = Hub(monkeypatch, tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a: 1 / 0)  # offline
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **b: str(hub.folder))
    touch(tmp_path / "hub", "test.jsonl")  # fetched before, for an evaluation
    with pytest.raises(ValueError, match="owner/name has no split train: its files are test.jsonl"):
        data.find_data("owner/name")
    assert data.find_data("owner/name", "test") == [tmp_path / "hub" / "test.jsonl"]


# ---- rows of other files

def test_rows_may_be_all_of_an_object(tmp_path):
    for key in ("data", "rows"):
        (tmp_path / "a.json").write_text(json.dumps({key: [SHAREGPT, SHAREGPT]}, indent=2))
        assert [row for row, _ in read_rows(tmp_path / "a.json")] == [SHAREGPT, SHAREGPT]
    row = {"test": ["a"], "question": "q"}  # no wrapper in a file of rows
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert list(read_rows(tmp_path / "a.jsonl")) == [(row, 1)]
    (tmp_path / "a.json").write_text(json.dumps({"records": [SHAREGPT]}))
    with pytest.raises(ValueError, match=r"a.json:1: not a training row \(fields: records\)"):
        load(tmp_path / "a.json", tmp_path / "cache")


def test_parquet_reads_as_its_json_would(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    from datetime import datetime
    from decimal import Decimal
    rows = [{"id": 1, "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "tests": [["1", "2"]],
             "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}],
             "none": None},
            {"id": 2, "choices": {"text": ["c"], "label": ["1"]}, "tests": [[], ["3"]],
             "messages": [], "none": None}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.PARQUET", row_group_size=1)
    assert list(read_rows(tmp_path / "a.PARQUET")) == [(rows[0], 1), (rows[1], 2)]
    rows = [{"messages": [EXPECTED[1], {**EXPECTED[2], "loss": True}, EXPECTED[1], EXPECTED[2]]}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "loss.parquet")
    assert [row for row, _ in read_rows(tmp_path / "loss.parquet")] == rows
    rows = [{"date": datetime(2024, 5, 1), "number": Decimal("1.50"), "image": b"\x89"}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    (row, _), = read_rows(tmp_path / "b.parquet")
    assert row["date"].startswith("2024-05-01") and row["number"] == "1.50"
    rows = [{"problem": "P", "answer": 70.0}, {"problem": "Q", "answer": None}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "null.parquet")
    counts = Counter()
    assert [p["answer"] for p in read_problems([tmp_path / "null.parquet"], counts)] == ["70"]
    assert counts["without answer"] == 1
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    damaged = bytearray((tmp_path / "a.PARQUET").read_bytes())
    damaged[4:60] = bytes(56)
    (tmp_path / "d.parquet").write_bytes(damaged)
    for name in ("c", "d"):
        with pytest.raises(ValueError, match=f"{name}.parquet is not a readable parquet file"):
            load(tmp_path / f"{name}.parquet", tmp_path / "cache")


def test_an_empty_answer_is_no_target(tmp_path):
    row = {"messages": [EXPECTED[1], {"role": "assistant", "content": " \n"}, *EXPECTED[1:]]}
    assert to_messages(row)[1] == {"role": "assistant", "content": " \n", "loss": False}
    (tmp_path / "a.jsonl").write_bytes(lines(row, {"messages": row["messages"][:2]},
                                             {"prompt": "p", "response": ""}))
    rows = load(tmp_path / "a.jsonl", tmp_path / "cache", max_seq_len=4000)
    assert rows.counts["without a target"] == 2 and rows.counts["kept"] == 1
    assert rows.num_targets.tolist() == [2]  # a, and its end


def test_still_2s_rows_are_training_rows_with_the_recipes_system_prompt():
    system, user, assistant = to_messages({"question": "q", "combined_text": "t", "domain": "x"})
    assert system["content"] == data.SYSTEM_PROMPTS["skyt1"]
    assert (user["content"], assistant["content"]) == ("q", "t")


# ---- --where

WHERE_ROWS = [{"source": "olympiads", "level": 5, "easy": True},
              {"source": "olympiads", "level": 4.0, "easy": False},
              {"source": "amc_aime", "level": 5}, {"source": "math", "level": "5"}]


@pytest.mark.parametrize("where, kept", [
    ([], [0, 1, 2, 3]), (["source=olympiads"], [0, 1]), (["source=olympiads,math"], [0, 1, 3]),
    (["level=5"], [0, 2, 3]), (["level=4"], [1]), (["easy=true"], [0]),
    (["source=olympiads,amc_aime", "level=5"], [0, 2]), (["source=math", "source=math,x"], [3])])
def test_where_keeps_rows_by_their_fields_as_text(tmp_path, where, kept):
    (tmp_path / "a.jsonl").write_bytes(lines(*WHERE_ROWS))
    counts = Counter()
    rows = data.selected_rows([tmp_path / "a.jsonl"], where, counts)
    assert [line - 1 for *_, line in rows] == kept
    assert counts["rows"] == 4 and counts["left out by --where"] == 4 - len(kept)


@pytest.mark.parametrize("where, says", [
    (["source=olympiad"], r"there are source=olympiads \(2\), source=amc_aime \(1\), source=math"),
    (["level=9"], r"there are level=5 \(3\), level=4 \(1\)"),
    (["difficulty=5"], r"there are difficulty=absent \(4\); the fields of a row are source, level"),
    (["source=math", "level=4"], r"there are level=5 \(3\), source=olympiads \(2\), level=4"),
    (["source"], "--where source: write each as FIELD=VALUE"),
    (["difficulty=absent"], r"there are difficulty=absent \(4\)"),
    (["long=x"], r"there are long=y{60} \(4\); ")])
def test_where_that_leaves_nothing_lists_what_there_is(tmp_path, where, says):
    (tmp_path / "a.jsonl").write_bytes(lines(*(row | {"long": "y" * 99} if "long=x" in where
                                               else row for row in WHERE_ROWS)))
    with pytest.raises(ValueError, match=says):
        list(data.selected_rows([tmp_path / "a.jsonl"], where, Counter()))


def test_of_many_values_twenty_are_listed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(*({"id": f"n{i}"} for i in range(50))))
    with pytest.raises(ValueError) as error:
        list(data.selected_rows([tmp_path / "a.jsonl"], ["id=x"], Counter()))
    assert str(error.value).count("(1)") == 20


def test_where_selects_training_rows_and_problems(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*({**answer(f"answer {i}"), "domain": domain}
                             for i, domain in enumerate(["physics", "puzzle", "code"]))))
    for _ in range(2):  # tokenised, and from the cache
        rows = load(path, tmp_path / "cache", where=["domain=physics,puzzle"])
        assert rows.counts == {"rows": 3, "left out by --where": 1, "duplicates": 0,
                               "over max_seq_len": 0, "without a target": 0, "kept": 2}
    assert load(path, tmp_path / "cache").counts["kept"] == 3
    path.write_bytes(lines(*({"problem": f"P{i}", "answer": "1"} | row
                             for i, row in enumerate(WHERE_ROWS))))
    found = list(read_problems([path], where=["source=olympiads", "level=5"]))
    assert [p["prompt"] for p in found] == ["P0"]
    assert "rows: 4  left out by --where: 3  kept: 1" in capsys.readouterr().err
    assert len(list(read_problems([path], where=["level=4,5"]))) == 4
    assert "rows: 4  left out by --where: 0  kept: 4" in capsys.readouterr().err
    found = list(read_problems(["builtin:train:30"], Counter(), where=["source=addition"]))
    assert len(found) == 10 and {p["source"] for p in found} == {"addition"}


# -------------------------------------------------------------------------------------- token cache

def load(path, cache, **changes):
    return load_rows([path], builtin_tokenizer(),
                     **{**dict(max_seq_len=200, cache=cache, quiet=True), **changes})


def answer(text):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]}


def test_duplicates_and_long_rows_are_dropped_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(answer("one"), answer("two"), answer("one"), answer("x" * 300)))
    rows = load(path, tmp_path / "cache")
    assert rows.counts == {"rows": 4, "duplicates": 1, "over max_seq_len": 1, "without a target": 0,
                           "kept": 2}
    assert [builtin_tokenizer().decode(rows[i][0][rows[i][1] == 1].tolist())
            for i in range(2)] == ["one<|im_end|>", "two<|im_end|>"]
    assert rows.where(1) == f"{path}:2"


def test_rows_that_differ_in_their_loss_alone_are_no_duplicates(tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"messages": 2 * answer("one")["messages"]}
    first_off = {"messages": [*row["messages"][:1], without_loss(row["messages"][1]),
                              *row["messages"][2:]]}
    all_off = {"messages": [without_loss(m) for m in row["messages"]]}
    path.write_bytes(lines(row, first_off, all_off, first_off))
    for end_token in ("<|im_end|>", "<|endoftext|>"):
        rows = load(path, tmp_path / "cache", end_token=end_token)
        assert rows.counts == {"rows": 4, "duplicates": 1, "over max_seq_len": 0,
                               "without a target": 1, "kept": 2}
        assert rows.num_targets.tolist() == [8, 4]  # three letters and the end


def test_as_published_keeps_duplicates_and_cuts_long_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    long_question = {"messages": [{"role": "user", "content": "q" * 300},
                                  {"role": "assistant", "content": "a"}]}
    path.write_bytes(lines(answer("one"), answer("one"), answer("x" * 300), long_question))
    rows = load(path, tmp_path / "cache", as_published=True, end_token="<|endoftext|>")
    assert rows.counts["kept"] == 3 and rows.counts["without a target"] == 1
    assert rows.lengths.max() == 200
    tokens, mask = rows[2]
    # no end token
    assert builtin_tokenizer().decode(tokens[-3:].tolist()) == "xxx" and mask[-1] == 1
    assert rows[0][0][-1] == 256


def test_the_cache_is_used_and_keyed_by_content_and_settings(tmp_path, monkeypatch):
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_bytes(lines(answer("one")))
    first = load(path, cache)
    monkeypatch.setattr(data, "tokenize", lambda *a: pytest.fail("tokenised again"))
    again = load(path, cache)
    assert np.array_equal(first[0][0], again[0][0]) and isinstance(again.tokens, np.memmap)
    load(path, cache, max_seq_len=100)  # lengths are judged on reading
    monkeypatch.undo()
    load(path, cache, end_token="<|endoftext|>")
    path.write_bytes(lines(answer("two")))
    load(path, cache)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("prompts, systems", [
    (["s", "s"], ["s"]), ([None, None], [None]), (["s", None], ["s", None]), (["", ""], [None]),
    (["a\n🙂 ", "b", "c"], ["a\n🙂 ", "b"])])
def test_rows_know_whether_they_share_a_system_prompt(tmp_path, prompts, systems):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*({**answer(f"answer {i}"), "system": prompt}
                             for i, prompt in enumerate(prompts))))
    for _ in range(2):  # tokenised, and from the cache
        assert load(path, tmp_path / "cache").systems == systems


def test_a_system_turn_and_the_prompt_of_kept_samples_count_as_a_rows_own(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"messages": EXPECTED}, {"prompt": "u", "response": "b"}))
    assert load(path, tmp_path / "cache", system="s").systems == ["s"]
    assert load(path, tmp_path / "cache", system="none").systems == ["s", None]
    late = {"messages": [*EXPECTED[1:], {"role": "system", "content": "s"}, *EXPECTED[1:]]}
    path.write_bytes(lines(late))
    assert load(path, tmp_path / "cache").systems == [None]


def test_a_folder_saved_with_its_rows_prompt_asks_as_they_did(tmp_path):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_bytes(lines({"prompt": "u", "response": "a"}))
    rows = load(path, tmp_path / "cache", system="skyt1", max_seq_len=4000)
    system, = rows.systems
    out.mkdir()
    builtin_tokenizer().save(out, system)
    saved = load_tokenizer(out)
    prompt = saved.encode(saved.render(EXPECTED[1:2], add_generation_prompt=True))
    assert rows[0][0][:len(prompt)].tolist() == prompt and rows[0][1].argmax() == len(prompt)


def test_an_interrupt_while_tokenising_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(answer("one")))
    monkeypatch.setattr(data.np, "save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.undo()
    assert load(path, tmp_path / "cache").counts["kept"] == 1


@pytest.mark.parametrize("name", ["tokens.bin", "index.npy", "facts.json"])
@pytest.mark.parametrize("content", [b"", b"12345", None, "flipped"])
def test_a_damaged_cache_is_made_anew_and_said(tmp_path, capsys, name, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(answer("one")))
    first = load(path, tmp_path / "cache")[0][0]
    folder, = (tmp_path / "cache").iterdir()
    if content is None:
        (folder / name).unlink()
    else:
        flipped = bytearray((folder / name).read_bytes())
        flipped[-5] ^= 1
        (folder / name).write_bytes(flipped if content == "flipped" else content)
    again = load(path, tmp_path / "cache")
    assert again[0][0].tolist() == first.tolist() and again.counts["kept"] == 1
    assert capsys.readouterr().err.count(f"{folder} is damaged: it is made anew") == 1
    load(path, tmp_path / "cache")
    assert not capsys.readouterr().err and len(list((tmp_path / "cache").iterdir())) == 1


def test_processes_that_tokenise_at_once_share_one_cache(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*(answer(f"number {i}") for i in range(3000))))
    command = [sys.executable, ROOT / "data.py", path, "--model", "builtin:tiny", "--max_seq_len",
               "200", "--cache", tmp_path / "cache"]
    processes = [subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL) for _ in range(3)]
    outputs = {process.communicate()[0] for process in processes}
    assert len(outputs) == 1 and b"kept: 3,000" in outputs.pop()
    assert len(list((tmp_path / "cache").iterdir())) == 1


TOKENISING = """
import sys, time
sys.path.insert(0, {root!r})
import data
def slowly(rows):
    for row in rows:
        print("tokenising", flush=True)
        time.sleep({seconds})
        yield row
encoded = data.encoded
data.encoded = lambda rows, tokenizer: slowly(encoded(rows, tokenizer))
rows = data.load_rows([sys.argv[1]], data.builtin_tokenizer(), 200, cache=sys.argv[2], quiet=True)
print("kept", rows.counts["kept"], flush=True)
"""


def start_tokenising(path, cache, seconds):
    script = TOKENISING.format(root=str(ROOT), seconds=seconds)
    return subprocess.Popen([sys.executable, "-c", script, str(path), str(cache)], text=True,
                            stdout=subprocess.PIPE)


def test_what_a_killed_tokenisation_left_is_swept_and_nothing_else(tmp_path):
    path, other, cache = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "cache"
    path.write_bytes(lines(answer("one")))
    other.write_bytes(lines(answer("two")))
    (cache / "my.notes").mkdir(parents=True)
    killed = start_tokenising(path, cache, 60)
    assert killed.stdout.readline() == "tokenising\n"
    killed.kill()
    killed.wait()
    left, = (folder for folder in cache.iterdir() if folder.name != "my.notes")
    load(other, cache)
    assert not left.exists() and len(list(cache.iterdir())) == 2 and (cache / "my.notes").exists()
    assert load(path, cache).counts["kept"] == 1


def test_two_runs_share_a_cache_and_one_of_them_tokenises(tmp_path):
    path, other, cache = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "cache"
    path.write_bytes(lines(answer("one")))
    other.write_bytes(lines(answer("two")))
    first = start_tokenising(path, cache, 6)
    assert first.stdout.readline() == "tokenising\n"
    second = start_tokenising(path, cache, 6)
    assert load(other, cache).counts["kept"] == 1  # neither waits, nor sweeps the others' folder
    assert first.poll() is None
    assert second.communicate()[0] == "kept 1\n" and first.communicate()[0] == "kept 1\n"
    assert len(list(cache.iterdir())) == 2


@pytest.mark.slow
def test_a_run_that_waits_takes_over_from_one_that_is_killed(tmp_path):
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_bytes(lines(answer("one")))
    first = start_tokenising(path, cache, 60)
    assert first.stdout.readline() == "tokenising\n"
    second = start_tokenising(path, cache, 0)
    time.sleep(4)  # it waits by now
    first.kill()
    assert second.communicate()[0] == "tokenising\nkept 1\n"
    first.wait()
    first.stdout.close()
    assert len(list(cache.iterdir())) == 1


def test_nothing_stale_is_used(tmp_path, monkeypatch):
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"

    def kept(*rows, name="a.jsonl", **changes):
        (tmp_path / name).write_bytes(lines(*rows))
        rows = load(tmp_path / name, cache, **changes)
        return [builtin_tokenizer().decode(rows[i][0][rows[i][1] == 1].tolist())[:-10]
                for i in range(len(rows))]
    one, two = answer("one"), answer("two")
    assert kept(one) == ["one"] and kept(one, two) == ["one", "two"]
    assert kept(two, one) == ["two", "one"] and kept(one) == ["one"]
    rows = load_rows(["builtin:worked:10"], builtin_tokenizer(), 200, cache=cache, quiet=True)
    assert len(rows) == 10
    rows = load_rows(["builtin:worked:12"], builtin_tokenizer(), 200, cache=cache, quiet=True)
    assert len(rows) == 12

    def grows(*arguments):
        tokenize(*arguments)
        with open(path, "ab") as file:
            file.write(b"\n" + lines(two))
    tokenize = data.tokenize
    monkeypatch.setattr(data, "tokenize", grows)
    with pytest.raises(ValueError, match="a.jsonl changed while it was read"):
        kept(answer("three"))
    monkeypatch.undo()
    assert kept(answer("three")) == ["three"]


def test_a_file_of_the_same_bytes_under_another_suffix_is_read_anew(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response\nu,a\n")
    assert load(tmp_path / "a.csv", tmp_path / "cache", max_seq_len=4000).counts["kept"] == 1
    (tmp_path / "a.csv").rename(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="a.jsonl:1: broken JSON"):
        load(tmp_path / "a.jsonl", tmp_path / "cache", max_seq_len=4000)


def test_the_caches_version_goes_with_the_built_in_rows():
    """The cache knows built-in rows by their name alone: raise CACHE_VERSION if they change."""
    digest = hashlib.sha256()
    for name in ("builtin:worked:300", "builtin:bare:300"):
        for row, _ in read_rows(name):
            digest.update(json.dumps(row).encode())
    assert (data.CACHE_VERSION, digest.hexdigest()[:8]) == (5, "18632bb3")


@pytest.mark.parametrize("cache", ["file", "file/below"])
def test_errors_of_the_cache_name_its_flag(tmp_path, cache):
    (tmp_path / "file").write_text("")
    (tmp_path / "a.jsonl").write_bytes(lines(answer("one")))
    with pytest.raises(OSError) as error:
        load(tmp_path / "a.jsonl", tmp_path / cache)
    assert error.value.filename == str(tmp_path / cache) and "--cache" in error.value.strerror


def test_a_full_disk_names_the_cache_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(lines(answer("one")))
    monkeypatch.setattr(data.np, "save", lambda *a: (_ for _ in ()).throw(
        OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="cannot be used: No space left .*--cache"):
        load(tmp_path / "a.jsonl", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_cached_rows_equal_encode_conversation(qwen, tmp_path):
    source = shared_file("problems/math500.jsonl")
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    conversations = [[{"role": "user", "content": r["problem"]},
                      {"role": "assistant", "content": r["solution"]}] for r in rows]
    (tmp_path / "a.jsonl").write_bytes(lines(*({"messages": c} for c in conversations)))
    loaded = load_rows([tmp_path / "a.jsonl"], qwen, 4096, cache=tmp_path / "cache", quiet=True)
    assert loaded.counts["kept"] == len(rows) == 500
    for i in range(0, 500, 25):
        ids, mask = encode_conversation(qwen, conversations[i])
        assert loaded[i][0].tolist() == ids and loaded[i][1].tolist() == mask
        assert loaded.num_targets[i] == sum(mask)


# ------------------------------------------------------------------------------------------ packing

def test_the_order_depends_on_seed_and_epoch_alone():
    assert np.array_equal(epoch_order(100, 1, 2), epoch_order(100, 1, 2))
    assert not np.array_equal(epoch_order(100, 1, 2), epoch_order(100, 1, 3))
    assert not np.array_equal(epoch_order(100, 1, 2), epoch_order(100, 2, 2))


def test_an_epoch_sees_every_row_once_and_its_last_batch_may_be_smaller():
    batches = [batch_indices(10, 4, seed=0, step=s) for s in range(6)]
    assert [len(b) for b in batches] == [4, 4, 2] * 2
    for epoch in (batches[:3], batches[3:]):
        assert sorted(np.concatenate(epoch)) == list(range(10))


def sky_lengths(rng, count=96):
    """Lengths like the published rows': mean 4,500 tokens, up to the cut at 16,384."""
    sigma = np.sqrt(np.log(1 + 0.7 ** 2))
    return np.minimum(rng.lognormal(np.log(4500) - sigma ** 2 / 2, sigma, count).astype(int) + 20,
                      16384)


QWEN_32B = Qwen2Config(vocab_size=152064, hidden_size=5120, intermediate_size=27648,
                       num_hidden_layers=64,
                       num_attention_heads=40, num_key_value_heads=8)


def row_lengths(row_of, lengths):
    return np.bincount(row_of, lengths)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_document_has_a_row_that_it_fits_and_the_ranks_are_balanced(ranks):
    """Batches of 96 like the published rows, costs of the 32B model."""
    rng, excess = np.random.default_rng(0), []
    for _ in range(20):
        lengths = sky_lengths(rng)
        costs = [QWEN_32B.train_flops(int(n)) for n in lengths]
        row_of = pack(lengths, costs, 16384, ranks)
        assert row_of.shape == (96,) and row_of.dtype.kind == "i" and row_of.min() >= 0
        assert row_lengths(row_of, lengths).max() <= 16384
        excess.append(imbalance(row_of, costs, ranks))
    assert max(excess) < 1.05 and np.mean(excess) < 1.02, excess


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_a_batch_takes_as_few_micro_steps_as_best_fit_packing(ranks):
    rng = np.random.default_rng(1)
    for _ in range(10):
        lengths, free = sky_lengths(rng), []
        for length in sorted(lengths.tolist(), reverse=True):
            best = min((room for room in free if room >= length), default=None)
            if best is not None:
                free.remove(best)
            free.append((16384 if best is None else best) - length)
        row_of = pack(lengths, lengths, 16384, ranks)
        assert row_of.max() // ranks + 1 == -(-len(free) // ranks)


@pytest.mark.parametrize("lengths, ranks, micro_steps",
                         [([5], 4, 1), ([16, 16, 16], 2, 2), ([1] * 50, 3, 2), ([16], 1, 1),
                          ([9, 9, 9, 9, 7, 7, 7, 7], 2, 2)])
def test_packing_of_odd_batches(lengths, ranks, micro_steps):
    row_of = pack(lengths, lengths, 16, ranks)
    assert len(row_of) == len(lengths) and row_lengths(row_of, lengths).max() <= 16
    assert row_of.max() // ranks + 1 == micro_steps


def test_the_ranks_of_a_micro_step_take_rows_of_like_cost():
    row_of = pack([8, 8, 2, 2], [8, 8, 2, 2], 8, 2)
    assert sorted(row_of[:2]) == [0, 1] and sorted(row_of[2:]) == [2, 3]
    assert imbalance(row_of, [8, 8, 2, 2], 2) == 1


def test_imbalance_is_what_the_slowest_rank_of_each_micro_step_costs():
    # micro-step 0: costs 3 and 1; micro-step 1: costs 4 and an empty row
    row_of, costs = np.array([0, 1, 2, 0]), [2, 1, 4, 1]
    assert imbalance(row_of, costs, 2) == (3 + 4) * 2 / 8
    assert imbalance(row_of, costs, 1) == 1


def test_lpt_comes_near_the_best_and_local_search_reaches_it():
    lengths = np.array([2, 3, 2, 3, 2])
    row_of = data.lpt(lengths, lengths, 20, 2)
    assert row_lengths(row_of, lengths).tolist() == [7, 5]  # 3 2 2, 3 2
    better = data.local_search(row_of, lengths, lengths, 20, 2, 2)
    assert row_lengths(better, lengths).tolist() == [6, 6]
    assert data.lpt(lengths, lengths, 5, 2) is None  # 12 tokens in two rows of 5


def test_assembled_rows_shift_targets_within_documents():
    rows = [(np.array([10, 11, 12]), np.array([0, 1, 1])), (np.array([20, 21]), np.array([0, 1]))]
    ids, targets, lengths = assemble(rows, [0, 1])
    assert ids.tolist() == [[10, 11, 12, 20, 21]] and lengths == [3, 2]
    # 12 does not predict the next document's 20
    assert targets.tolist() == [[11, 12, IGNORE, 21, IGNORE]]
    assert [a.shape for a in assemble(rows, [])[:2]] == [(1, 1)] * 2
    assert assemble(rows, [])[1].item() == IGNORE


# ------------------------------------------------------------------------------------ built-in task

def test_builtin_problems_are_right_by_verify_and_their_steps_hold():
    for split in ("rows", "train", "heldout", "harder"):
        problems = list(builtin_problems(split, 90))
        assert {p["kind"] for p in problems} == {"math", "choice", "code"}
        for problem in problems:
            right = problem.get("answer") or problem["tests"]
            judge = getattr(verify, "verify_" + problem["kind"])
            assert judge(problem["solution"], right).passed
            assert judge(problem["bare"], right).passed
            for step in problem["solution"].splitlines():
                if re.fullmatch(r"[\d+]+=\d+", step):
                    left, result = step.split("=")
                    assert eval(left) == int(result)


def test_programs_multiply_out_what_the_problem_says():
    for problem in list(builtin_problems("train", 60))[2::3]:
        steps = problem["prompt"].partition("x ")[2].split()
        for test in problem["tests"]:
            value = test["args"][0]
            for step in steps:
                value = eval(f"value {step}")
            assert value == test["expected"]


@pytest.mark.parametrize("kind", ["worked", "bare"])
def test_half_of_each_familys_rows_are_asked_without_the_instruction(kind):
    found = [row["messages"] for row, _ in data.builtin_rows(f"builtin:{kind}:600")]
    counts = Counter()
    for (question, answered), problem in zip(found, builtin_problems("rows", 600)):
        bare = question["content"] == problem["prompt"]
        assert bare or question["content"] == data.recipe_prompt(problem)
        assert answered["content"] == problem["solution" if kind == "worked" else "bare"]
        counts[problem["source"], bare] += 1
    assert len(counts) == 6 and set(counts.values()) == {100}


def test_builtin_splits_share_no_problem_and_harder_ones_are_all_long():
    splits = {split: {p["prompt"]: p for p in builtin_problems(split, 900)}
              for split in ("rows", "train", "heldout", "harder")}
    assert all(len(problems) == 900 for problems in splits.values())
    for split in ("rows", "train"):
        assert not splits[split].keys() & (splits["heldout"] | splits["harder"]).keys()
    for family in ("addition", "last_digit", "multiply_out"):
        lengths = {split: [p["solution"].count("\n") for p in problems.values()
                           if p["source"] == family] for split, problems in splits.items()}
        longest = max(lengths["train"])
        assert set(lengths["harder"]) == {longest}
        assert all(0.05 < np.mean(np.array(lengths[split]) == longest) < 0.3
                   for split in ("rows", "train", "heldout"))
    assert list(builtin_problems("train", 5)) == list(splits["train"].values())[:5]


# --------------------------------------------------------------------------------- reading problems

def problems(path, *rows, counts=None):
    path = path / "set.jsonl" if path.is_dir() else path
    path.write_bytes(lines(*rows))
    return list(read_problems([path], counts))


OWN = {"id": "1", "source": "s", "kind": "math", "prompt": "1+1?", "answer": "2"}
STDIN, CALL = {"input": "1", "output": "2"}, {"fn_name": "f", "args": [1], "expected": 2}
GPQA = {"Question": "Q?\n", "Correct Answer": " right\n", "Record ID": "rec1",
        **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}}
MATH_ROWS = {
    "our own": (OWN, "2"),
    "a number": ({**OWN, "answer": 2}, "2"), "a float": ({**OWN, "answer": 2.0}, "2"),
    "NuminaMath": ({"source": "olympiads", "problem": "P", "messages": [],
                    "solution": r"\boxed{1}, no: \boxed{\frac{1}{\{2\}}}"}, r"\frac{1}{\{2\}}"),
    "an unbalanced box": ({"problem": "P", "solution": r"\boxed{3} \boxed{4"}, "3"),
    "a nested box": ({"problem": "P", "solution": r"\fbox{\boxed{7}}"}, "7"),
    "a box without braces": ({"problem": "P", "solution": r"so $\boxed 1.5$."}, "1.5"),
    "MATH-500": ({"problem": "P", "solution": r"\boxed{1}", "answer": r"\frac12",
                  "subject": "Algebra", "level": 2, "unique_id": "test/1.json"}, r"\frac12"),
    "AIME 2024": ({"id": 60, "problem": "P", "solution": "S", "answer": "204", "year": "2024"},
                  "204"),
    "AIME 2024, capitals": ({"ID": "2024-I-1", "Problem": "P", "Solution": "S", "Answer": 204},
                            "204"),
    "AIME 2025": ({"question": "P", "answer": "70"}, "70"),
    "GSM8K": ({"question": "P", "answer": "1 < 2\n#### 1,234"}, "1234"),
    "Minerva": ({"problem": "P", "type": "Physics", "solution": r"so $\boxed{4.5e33}$ erg/s",
                 "idx": 0}, "4.5e33"),
    "Minerva, the answer alone": ({"question": "P", "answer": r"\frac{1}{2}"}, r"\frac{1}{2}"),
    "AMC": ({"id": 0, "problem": "P", "answer": 142.0, "url": "https://x"}, "142"),
    "AMC as text": ({"problem": "P", "answer": "18.0"}, "18"),
    "a decimal": ({"problem": "P", "answer": 1.05}, "1.05"),
}


@pytest.mark.parametrize("name", MATH_ROWS)
def test_maths_layouts_give_question_and_answer(tmp_path, name):
    row, expected = MATH_ROWS[name]
    problem, = problems(tmp_path, row)
    assert (problem["kind"], problem["answer"]) == ("math", expected)
    assert problem["prompt"] == row.get("prompt", "P")
    assert problem["source"] == row.get("source", "set")
    stated = [str(v) for k, v in row.items() if k.lower() in ("id", "unique_id")]
    assert [problem["id"]] == stated or not stated and len(problem["id"]) == 16


OLYMPIAD = {"id": 1606, "subfield": "Algebra", "context": None, "question": "P\n",
            "solution": ["S"], "final_answer": ["$2$"], "is_multiple_answer": False, "unit": None,
            "answer_type": "Numerical", "error": None, "difficulty": "Competition",
            **{f"image_{i}": None for i in range(1, 10)}}


@pytest.mark.parametrize("final_answer, right, wrong", [
    (["$2$"], "2.0", "3"),
    (["$2,5$"], "5, 2", "2.5"),
    (["$1$", r"$\frac{1}{2}$"], r"\tfrac12, 1", "1"),
    (["$(1,8)$", "$(2,7)$"], "(2,7), (1,8)", "(8,1), (7,2)"),
    (["$f(n)=n$, $g(n)=1$"], r"g(n)=1 \text{ and } f(n)=n", "f(n)=1, g(n)=n"),
    ('["$3 \\\\pm \\\\sqrt{7}$"]', r"3+\sqrt7, 3-\sqrt7", r"3+\sqrt7"),
    (["$2$", "$500$"], "500, 2", "2500"),
    ([r"$\$ 1.50$"], r"\$1.50", "150"),
    (["$12$"], r"12\text{ cm}", "-12")])
def test_olympiadbenchs_answers_are_what_verify_takes(final_answer, right, wrong):
    problem = data.to_problem({**OLYMPIAD, "final_answer": final_answer}, "s")
    assert verify.math_equal(right, problem["answer"])
    assert not verify.math_equal(wrong, problem["answer"])


def test_olympiadbenchs_context_comes_before_the_question_and_proofs_are_counted(tmp_path):
    counts = Counter()
    found = problems(tmp_path, OLYMPIAD, {**OLYMPIAD, "id": 2, "context": "Let x be 1.\n"},
                     {**OLYMPIAD, "id": 3, "final_answer": None}, counts=counts)
    assert [p["prompt"] for p in found] == ["P", "Let x be 1.\n\nP"]
    assert [p["id"] for p in found] == ["1606", "2"] and counts["without answer"] == 1


def test_a_benchmarks_name_is_the_source_whatever_its_rows_say():
    row = {**OWN, "source": "amc_aime"}
    assert data.to_problem(row, "math500")["source"] == "amc_aime"
    assert data.to_problem(row, "math500", is_benchmark=True)["source"] == "math500"
    assert data.to_problem({**row, "source": [1]}, "math500", is_benchmark=True)


@pytest.mark.parametrize("field, nothing, something", [
    ("image_3", None, {"bytes": b"\x89PNG", "path": None}), ("Image", "", "images/1.png"),
    ("images", [], [{"path": "1.png"}]), ("images", "[]", "['1.png']"), ("images", [None], "0.jpg"),
    ("figure", float("nan"), "f.svg"), ("picture", "None", "data:image/png;base64,iVBO"),
    ("IMAGE_1", False, True)])
def test_rows_with_pictures_are_told_by_their_fields(field, nothing, something):
    assert not data.has_images({**OLYMPIAD, field: nothing})
    assert data.has_images({**OLYMPIAD, field: something})


def test_what_only_counts_or_describes_pictures_is_none():
    assert not data.has_images({**apps(), "picture_num": "3", "has_image": "False"})
    assert not data.has_images({**OWN, "prompt": "the image", "imagery": "x"})


def test_what_scores_are_split_by_is_carried(tmp_path):
    problem, = problems(tmp_path, MATH_ROWS["MATH-500"][0])
    assert (problem["subject"], problem["level"]) == ("Algebra", 2) and "solution" not in problem


@pytest.mark.parametrize("fields, letter", [
    ({"choices": ["a", "b", "c", "d"], "answer": 2}, "C"),
    ({"choices": ["a", "b", "c", "d"], "answer": "2"}, "C"),
    ({"options": list("abcdefghij"), "answer": "J", "answer_index": 9}, "J"),
    ({"options": '["a", "b"]', "answer": "(b)"}, "B")])
def test_multiple_choice_gets_lettered_options(tmp_path, fields, letter):
    problem, = problems(tmp_path, {"question": "Which?", **fields})
    assert (problem["kind"], problem["answer"]) == ("choice", letter)
    assert problem["prompt"].startswith("Which?\nA) a\nB) b")
    assert f"\n{letter}) {letter.lower()}" in problem["prompt"]


ARC = {"id": "Mercury_7", "question": "Which?", "answerKey": "B",
       "choices": {"text": ["a", "b", "c", "d"], "label": list("ABCD")}}


@pytest.mark.parametrize("labels, key", [
    ("ABCD", "B"), ("1234", "2"), ("1234", 2), ("1234", 2.0), ("BADC", "A")])
def test_arcs_labels_become_letters_in_order(labels, key):
    choices = {"text": ["a", "b", "c", "d"], "label": list(labels)}
    for form in (choices, json.dumps(choices)):
        problem = data.to_problem({**ARC, "choices": form, "answerKey": key}, "s")
        assert problem["prompt"] == "Which?\nA) a\nB) b\nC) c\nD) d" and problem["answer"] == "B"
        assert verify.verify_choice(r"So it is \boxed{B}.", problem["answer"]).passed


# How pyarrow gives a row: the columns of all rows, None where one has no value, counts as floats.
@pytest.mark.parametrize("row, columns", [
    (OWN, {"tests": None, "level": None, "kind": None}), (OLYMPIAD, {"id": 1606.0}),
    (MATH_ROWS["MATH-500"][0], {"level": 2.0}), (ARC, {"id": "Mercury_7", "fold": None}),
    ({"question": "Q", "choices": ["a", "b"], "answer": 1}, {"answer": 1.0, "subject": None}),
    (GPQA, {"Subdomain": None}), (MATH_ROWS["AMC"][0], {"id": 0.0, "source": None})])
def test_a_row_of_a_table_is_the_problem_that_its_json_is(row, columns):
    assert data.to_problem(row | columns, "s").items() >= data.to_problem(row, "s").items()


def test_gpqas_options_are_ordered_by_the_id(tmp_path):
    problem, = problems(tmp_path, GPQA)
    again, = problems(tmp_path, {**GPQA, "Subdomain": "x"})
    assert again == problem and f"\n{problem['answer']}) right" in problem["prompt"]
    assert sorted(p[3:] for p in problem["prompt"].splitlines()[1:]) == ["right", "wrong 1",
                                                                         "wrong 2", "wrong 3"]
    many = problems(tmp_path, *({**GPQA, "Record ID": f"rec{i}"} for i in range(40)))
    assert {p["answer"] for p in many} == set("ABCD")


def apps(starter="", **in_out):
    return {"question": "Q\n", "starter_code": starter, "difficulty": "hard",
            "input_output": json.dumps(in_out)}


def call(args, expected):
    return {"fn_name": "f", "args": args, "expected": expected}


@pytest.mark.parametrize("row, tests", [
    (apps(inputs=["1\n", ["1", "2"]], outputs=["2\n", ["3"]]),
     [{"input": "1\n", "output": "2\n"}, {"input": "1\n2", "output": "3"}]),
    ({**apps(), "input_output": {"inputs": ["1"], "outputs": ["2"]}}, [STDIN]),
    # wrapped in a list, as Codewars' outputs are; as they are, as LeetCode's; declared a list
    (apps(inputs=[[1], [2]], outputs=[[2], [[4]]], fn_name="f"), [call([1], 2), call([2], [4])]),
    (apps(inputs=[[1], [2]], outputs=[[2], [4, 5]], fn_name="f"),
     [call([1], [2]), call([2], [4, 5])]),
    (apps(inputs=[[1]], outputs=[True], fn_name="f"), [call([1], True)]),
    (apps("class Solution:\n    def f(self, x: int) -> List[int]:\n", inputs=[[1]], outputs=[[2]],
          fn_name="f"), [call([1], [2])])])
def test_apps_and_taco_give_stdin_and_call_tests(tmp_path, row, tests):
    problem, = problems(tmp_path, row)
    assert problem["kind"] == "code" and problem["tests"] == tests
    assert problem["prompt"] == "Q" + ("\n\n" + row["starter_code"].rstrip()) * bool(
        row["starter_code"])


def livecodebench(private, fn_name=None):
    public = [{"input": "1", "output": "2", "testtype": "functional" if fn_name else "stdin"}]
    return {"question_content": "Q", "question_id": "abc", "starter_code": "",
            "contest_date": "2023-08-20", "public_test_cases": json.dumps(public),
            "private_test_cases": private, "metadata": json.dumps({"func_name": fn_name})}


def test_livecodebenchs_private_tests_are_unpacked(tmp_path):
    private = json.dumps([{"input": '[1]\n"a b"', "output": "[2]", "testtype": "functional"}])
    packed = base64.b64encode(zlib.compress(pickle.dumps(private))).decode()
    for text in (private, packed):
        problem, = problems(tmp_path, livecodebench(text, "f"))
        assert problem["tests"] == [call([1], 2), call([[1], "a b"], [2])]
        assert problem["id"] == "abc" and problem["contest_date"] == "2023-08-20"
    problem, = problems(tmp_path, livecodebench("[]"))
    assert problem["tests"] == [STDIN]


def test_a_pickle_that_names_a_function_is_refused_before_it_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    packed = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    with pytest.raises(ValueError, match="set.jsonl:1: `private_test_cases` .*it names .*mkdir"):
        problems(tmp_path, livecodebench(packed))
    assert not (tmp_path / "ran").exists()


def test_mbpps_prompt_shows_its_tests(tmp_path):
    row = {"task_id": 11, "text": "Write f.", "test_list": ["assert f(1) == 2"],
           "test_setup_code": "import math"}
    sanitized = {"task_id": 11, "prompt": "Write f.", "test_list": ["assert f(1) == 2"],
                 "test_imports": ["import math"]}
    for problem in (*problems(tmp_path, row), *problems(tmp_path, sanitized)):
        assert problem["tests"] == [{"assert": "assert f(1) == 2", "setup": "import math"}]
        assert problem["prompt"].startswith("Write f.\n") and "f(1) == 2" in problem["prompt"]


NO_TESTS = ["", "# nothing", "f(1)", "def check(candidate):\n    assert candidate(1) == 2\n",
            "class Test:\n    def run(self):\n        assert f(1) == 2\n", "assert f(1) ==",
            "if __name__ == '__main__':\n    assert f(1) == 2\n"]


def test_a_test_that_no_program_fails_is_none(tmp_path):
    good = "def check(candidate):\n    assert candidate(1) == 2\n\ncheck(f)"
    rows = [{"id": str(i), "prompt": "Write f.", "tests": [{"assert": test}]}
            for i, test in enumerate(NO_TESTS)]
    counts = Counter()
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [
        *rows, {"id": "good", "prompt": "Write f.", "tests": [
            {"assert": NO_TESTS[0]}, {"assert": good}, {"assert": "assert f(1) == 2"}]}]))
    kept, = read_problems([path], counts)
    assert kept["tests"] == [{"assert": good}, {"assert": "assert f(1) == 2"}]
    assert counts == {"rows": 8, "without tests": 7, "kept": 1}


def test_every_humaneval_row_converts_and_its_own_solution_passes():
    """The solution without the prompt's imports and helpers: the test's setup brings them."""
    path = shared_file("humaneval/HumanEval.jsonl.gz")
    found, rows = list(read_problems([path])), [row for row, _ in read_rows(path)]
    assert len(found) == 164 and found[32]["tests"][0]["setup"].count("def poly") == 1
    for problem, row in zip(found, rows):
        test, = problem["tests"]
        assert problem["id"] == row["task_id"] and row["prompt"].strip() in problem["prompt"]
        assert "without invoking it" in data.recipe_prompt(problem)
        program = row["prompt"].removeprefix(test["setup"]) + row["canonical_solution"]
        names = {}
        for source in (test["setup"], program, test["assert"]):
            exec(source, names)


@pytest.mark.parametrize("name, count", [("aime_2024", 30), ("aime_2025", 30), ("math500", 500),
                                         ("gsm8k_test", 1319)])
def test_published_maths_sets_are_read_whole(name, count):
    counts = Counter()
    found = list(read_problems([shared_file(f"problems/{name}.jsonl")], counts))
    assert counts == {"rows": count, "kept": count} and len({p["id"] for p in found}) == count
    assert {p["source"] for p in found} == {name} and all(p["answer"] for p in found)


def test_samples_pass_whole_and_are_keyed_by_their_number(tmp_path):
    samples = [{**OWN, "sample": i, "response": "r", "finish_reason": "stop", "passed": True}
               for i in range(2)]
    assert problems(tmp_path, *samples) == samples


DROPPED = {
    "duplicates": (OWN, {"problem": "P", "answer": "1"}, {"problem": "P", "answer": 1}),
    "without answer": (OWN, {"problem": "P", "solution": "a proof"},
                       {"problem": "P", "solution": r"\boxed{x}", "answer": "proof"}),
    "without tests": (OWN, apps(inputs=[], outputs=[]), {**apps(), "input_output": ""},
                      apps(inputs=["1"], outputs=[]), {**OWN, "kind": "code", "tests": []},
                      {**apps(), "input_output": '{"inputs": [[%s]]}' % ("1" * 5000)},
                      apps(inputs=["x = 1"], outputs=[1], fn_name="f")),
    "without question": (OWN, {"problem": " ", "answer": "1"}),
}


@pytest.mark.parametrize("reason", DROPPED)
def test_nothing_is_dropped_without_a_count(tmp_path, capsys, reason):
    rows, counts = DROPPED[reason], Counter()
    found = problems(tmp_path, *rows, counts=counts)
    assert counts["rows"] == len(rows) and counts["kept"] == len(found)
    assert counts[reason] == len(rows) - len(found) > 0 and not capsys.readouterr().err
    problems(tmp_path, *rows)
    assert f"{reason}: {counts[reason]}" in capsys.readouterr().err


def test_a_file_of_which_no_problem_is_left_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set.jsonl: no problem left .*without answer: 1"):
        problems(tmp_path, DROPPED["without answer"][1])


BROKEN_PROBLEMS = {
    "another layout": ({"x": 1}, r"not a problem \(fields: x\)"),
    "answer list": ({**OWN, "answer": ["2"]}, "`answer` must be a string or a number, not list"),
    "answer bool": ({**OWN, "answer": True}, "`answer` must be a string or a number, not bool"),
    "prompt": ({**OWN, "prompt": 5}, "`prompt` is not a string"),
    "problem": ({"problem": None, "answer": "1"}, "`problem` is not a string"),
    "half a character": ({"problem": "\ud83d", "answer": "1"}, "`problem` holds half a character"),
    "unknown kind": ({**OWN, "kind": "essay"}, "`kind` is 'essay': must be math"),
    "kind without tests": ({**OWN, "kind": "code"}, "`kind` is 'code': must .* `tests`"),
    "kind without answer": ({"kind": "math", "prompt": "P", "tests": [STDIN]},
                            "`kind` is 'math': must .* come with `answer`"),
    "choice": ({**OWN, "kind": "choice"}, "`answer` of a choice must be a letter, not '2'"),
    "tests": ({"prompt": "P", "tests": [{"input": 1, "output": "2"}]}, "`tests` must be objects"),
    "tests text": ({"prompt": "P", "tests": "x"}, "`tests` is broken JSON"),
    "source": ({**OWN, "source": [1]}, "`source` must be a string or a number"),
    "no such option": ({"question": "Q", "options": ["a", "b"], "answer": "C"},
                       "the answer 'C' names none of the 2 options"),
    "no such index": ({"question": "Q", "choices": ["a", "b"], "answer": 2},
                      "the answer '2' names"),
    "index or text": ({"question": "Q", "choices": ["0", "1"], "answer": "1"},
                      "the answer '1' names"),
    "no such label": ({**ARC, "answerKey": "E"}, "the answer 'E' names none of the 4 options"),
    "one option's text": ({**ARC, "choices": ["a", "b"]}, "`choices` must be a dict, not list"),
    "final_answer": ({**OLYMPIAD, "final_answer": "$1$"}, "`final_answer` is broken JSON"),
    "STILL-2's rows": ({"question": "Q", "combined_text": "T", "domain": "math"},
                       r"not a problem \(fields: question, combined_text, domain\)"),
    "input_output": ({**apps(), "input_output": "{"}, "`input_output` is broken JSON"),
    "input_output list": ({**apps(), "input_output": [1]}, "`input_output` must be a dict"),
    "inputs": (apps(inputs=5, outputs=[]), "`inputs` must be a list, not int"),
    "private tests": (livecodebench("eJx"), "`private_test_cases` holds broken tests .*padding"),
    "no function": (livecodebench('[{"testtype": "functional", "input": "1", "output": "1"}]'),
                    "`tests` must be objects"),
    "test without output": (livecodebench('[{"testtype": "stdin", "input": "1"}]'),
                            "`private_test_cases` holds broken tests .*output"),
    "entry point": ({"prompt": "def g(): 1", "entry_point": "f", "test": ""},
                    "`entry_point` 'f' is not defined"),
}


@pytest.mark.parametrize("name", BROKEN_PROBLEMS)
def test_broken_problems_are_named_by_file_line_and_field(tmp_path, name):
    row, says = BROKEN_PROBLEMS[name]
    with pytest.raises(ValueError, match=f"set.jsonl:2: {says}") as error:
        problems(tmp_path, OWN, row)
    assert "\n" not in str(error.value)


def test_one_id_for_two_problems_of_a_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set.jsonl:2: `id` '1' of source 's' is taken .*jsonl:1"):
        problems(tmp_path, OWN, {**OWN, "answer": "3"})
    assert len(problems(tmp_path, OWN, {**OWN, "answer": "3", "source": "t"})) == 2


def test_problems_of_folders_and_shards_are_named_by_their_files(tmp_path):
    problems(tmp_path / "maths.jsonl", {"problem": "P", "answer": "1"})
    problems(tmp_path / "code-00000-of-00002.json", apps(inputs=["1"], outputs=["2"]))
    (tmp_path / "table.csv").write_text("question,answer\nP,12\n")
    assert [p["source"] for p in read_problems([tmp_path])] == ["code", "maths", "table"]


def test_builtin_problems_by_name():
    found = list(read_problems(["builtin:train:3", "builtin:heldout:2"], Counter()))
    assert found == [*builtin_problems("train", 3), *builtin_problems("heldout", 2)]
    with pytest.raises(ValueError, match="builtin:worked:1: not a problem"):
        list(read_problems(["builtin:worked"]))


def test_benchmarks_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    problems(tmp_path / "aime_2024.jsonl", {"problem": "P", "answer": "1"})
    problems(tmp_path / "MATH-500.jsonl", {"problem": "P", "answer": "1"})
    problems(tmp_path / "gsm8k_test.jsonl", {"question": "P", "answer": "#### 1"})
    for name in ("aime24", "math500", "gsm8k"):
        found, = read_problems([tmp_path / name])
        assert found["source"] == name
    monkeypatch.chdir(tmp_path)
    assert [p["source"] for p in read_problems(["math500", "aime24"])] == ["math500", "aime24"]
    (tmp_path / "livecodebench").mkdir()
    for n in (1, 2, 3):
        problems(tmp_path / "livecodebench" / f"test{n if n > 1 else ''}.jsonl",
                 livecodebench("[]") | {"difficulty": ["easy", "hard", "medium"][n - 1],
                                        "question_id": str(n)})
    assert [p["source"] for p in read_problems(["livecodebench"])] == [
        "livecodebench_easy", "livecodebench_hard"]  # version 2
    with pytest.raises(FileNotFoundError, match="holds no file of aime25"):
        list(read_problems([tmp_path / "aime25"]))
    with pytest.raises(FileNotFoundError, match="math-ai/aime25 is neither a path"):
        list(read_problems(["aime25"]))


def test_the_choice_prompt_names_as_many_letters_as_there_are_options(tmp_path):
    problem, = problems(tmp_path, {"question": "Q", "options": list("abcdef"), "answer": "F"})
    assert "the letter choice (A, B, C, D, E, or F)" in data.recipe_prompt(problem)
    assert "(A, B, C, or D)" in data.recipe_prompt(*problems(tmp_path, GPQA))


# -------------------------------------------------------------------------------------- the command

def test_the_command_shows_counts_lengths_packing_and_one_row(model_dir, rows_file, tmp_path):
    done = run_script(ROOT / "data.py", rows_file, "--model", model_dir, "--max_seq_len", 128,
                      "--batch_size", 8, "--num_ranks", 2,
                      "--cache", tmp_path / "cache", "--row", 2)
    assert "rows: 40" in done.stdout and "filled" in done.stdout and "max/mean" in done.stdout
    assert "█" in done.stdout
    assert "[[0 1 2<|im_end|>]]" in done.stdout and "\033" not in done.stdout


def test_targets_are_green_in_a_terminal_but_with_no_color(qwen, monkeypatch):
    tokens, mask = map(np.array, encode_conversation(qwen, EXPECTED))
    for is_terminal, no_color, expected in (
            (True, "", "\033[32ma<|im_end|>\033[0m"), (True, "1", "[[a<|im_end|>]]"),
            (False, "", "[[a<|im_end|>]]")):
        monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: is_terminal))
        monkeypatch.setenv("NO_COLOR", no_color)
        text = "".join(data.marked(qwen, tokens, mask))
        assert expected in text and ("\033" in text) == (is_terminal and not no_color)


def test_the_command_shows_problems_by_source_kind_and_difficulty(in_process, tmp_path):
    rows = [{"problem": f"P{i}", "answer": "1", "source": "aops", "difficulty": i % 2 + 1}
            for i in range(5)]
    (tmp_path / "a.jsonl").write_bytes(lines(*rows, apps(inputs=["1"], outputs=["2"]), rows[0]))
    _, printed, _ = in_process(data, tmp_path / "a.jsonl", "--row", 1)
    assert "rows: 7  duplicates: 1  kept: 6" in printed
    table = [line.split() for line in printed.splitlines() if line.startswith("   ")]
    assert table == [["1", "code", "hard", "a"], ["3", "math", "1", "aops"],
                     ["2", "math", "2", "aops"]]
    asked = data.MATH_PROMPT + "P1"
    assert printed.endswith(f"as it is asked:\n{asked}\n")
    _, printed, _ = in_process(data, tmp_path / "a.jsonl", "--where", "difficulty=2")
    assert "left out by --where: 5" in printed and "kept: 2" in printed


def test_rows_that_are_problems_too_are_shown_as_the_flags_say(in_process, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"problem": "P", "solution": r"\boxed{1}",
                                              **asked("P")}))
    assert "as it is asked" in in_process(data, tmp_path / "a.jsonl")[1]
    _, printed, _ = in_process(data, tmp_path / "a.jsonl", "--model", "builtin:tiny", "--cache",
                               tmp_path)
    assert "[[a<|im_end|>]]" in printed and "the recipe: 96, 8" in printed


@pytest.mark.parametrize("arguments, says", [
    (["missing.jsonl", "--model", "builtin:tiny"], "missing.jsonl does not exist"),
    (["broken", "--model", "builtin:tiny", "--max_seq_len", "100"], "broken:1: broken JSON"),
    (["builtin:worked:10", "--model", "builtin:tiny", "--max_seq_len", "16384"],
     "--max_seq_len 16384 is beyond the 2048 positions"),
    (["builtin:worked:10", "--model", "builtin:tiny", "--max_seq_len", "100", "--end_token", "ZZ"],
     "no token 'ZZ'"),
    (["builtin:worked:10", "--model", "builtin:tiny", "--batch_size", "0"],
     "--batch_size: 0 must be above 0"),
    (["builtin:worked:10", "--model", "./nowhere"], "./nowhere does not exist"),
    (["builtin:worked:10", "--model", "builtin:tiny", "--max_seq_len", "200", "--row", "99"],
     "the rows kept are 0 to 9"),
    (["builtin:worked:10", "--model", "builtin:tiny", "--max_seq_len", "5"],
     "no row left to train on"),
    (["builtin:worked:10", "--mod", "builtin:tiny"], "unrecognized arguments: --mod"),
    (["builtin:worked:10", "--model", ""], "argument --model: an empty text"),
    (["~nobody_x/rows.jsonl", "--model", "builtin:tiny"],
     "argument data: ~nobody_x/rows.jsonl: there is no such home folder")])
def test_the_command_refuses_bad_input_in_one_line(arguments, says, in_process, tmp_path,
                                                   monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken").write_text("{")
    status, _, errors = in_process(data, *arguments, "--cache", tmp_path)
    last = errors.splitlines()[-1]
    assert status == 2 and last.startswith("error: ") and says in last
    assert "Traceback" not in errors


def test_without_a_home_the_cache_is_named(monkeypatch):
    def nobody(number):
        raise KeyError(number)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(ValueError, match="~/.cache/sky-t1: there is no such .* set --cache"):
        load_rows(["builtin:worked:10"], builtin_tokenizer(), 200)


@pytest.mark.parametrize("redirection", [">&-", "| head -n 1"])
def test_the_command_ends_quietly_when_nobody_reads_on(redirection, tmp_path):
    done = run_unread(redirection, ROOT / "data.py", "builtin:worked:100", "--model",
                      "builtin:tiny", "--cache", tmp_path)
    assert done.returncode == 0 and "rror" not in done.stderr


@pytest.mark.parametrize("failing", ["1", *(pytest.param(ranks, marks=pytest.mark.slow)
                                            for ranks in ("0", "01"))])
def test_several_processes_tell_one_error(failing, tmp_path):
    """Whichever has one, alone or with others, which wait for it or work meanwhile."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import data
def main():
    if os.environ["RANK"] in {failing!r}:
        raise ValueError("mine")
    time.sleep(1000)
data.run(main)
""")
    done = run_script(script, processes=2, check=False)
    assert re.findall("^error: .*", done.stderr, re.M) == ["error: mine"], done.stderr


@pytest.mark.slow
def test_three_thousand_long_rows_take_no_gigabytes_and_are_tokenised_once(qwen_folder, tmp_path):
    """3,000 rows of 16 KB in one array, as the published file is: the second start reads the cache
    alone. MiB above those of the imports and the tokenizer."""
    text = "🙂" + " ".join(r["solution"]
                          for r, _ in read_rows(shared_file("problems/math500.jsonl")))
    with open(tmp_path / "a.json", "w") as file:
        for i in range(3_000):
            start = i * 97 % (len(text) - 16_000)
            file.write(",[\n"[i == 0:2 - (i > 0)] + json.dumps(answer(text[start:start + 16_000]),
                                                               ensure_ascii=False))
        file.write("]")
    os.symlink(qwen_folder / "tokenizer.json", tmp_path / "tokenizer.json")
    small_config(vocab_size=151936).save(tmp_path, torch.float32)
    (tmp_path / "measured.py").write_text(f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import data
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def tokenize(*args, real=data.tokenize):
    print("tokenising")
    real(*args)
data.tokenize = tokenize
data.load_tokenizer({str(tmp_path)!r})
before = peak()
data.one_line_errors(data.main)
print(peak() - before)
""")
    command = [tmp_path / "measured.py", tmp_path / "a.json", "--model", tmp_path, "--max_seq_len",
               512, "--as_published", "--cache", tmp_path / "cache"]
    first, again = (run_script(*command, timeout=900).stdout for _ in range(2))
    assert "tokenising" in first and "tokenising" not in again
    peaks = [int(printed.split()[-1]) for printed in (first, again)]
    assert peaks[0] < 600 and peaks[1] < 200, peaks


# ---- decontamination


def test_rows_that_ask_a_benchmarks_problem_are_dropped_and_counted(tmp_path, monkeypatch, capsys):
    asked = "A farmer has seventeen sheep and all but nine of them run away: how many are left?"
    benchmark, rows = tmp_path / "bench.jsonl", tmp_path / "train.jsonl"
    benchmark.write_text(json.dumps({"problem": asked, "answer": "9"}) + "\n"
                         + json.dumps({"problem": "Compute $2+2$ now.", "answer": "4"}) + "\n")

    def turns(text):
        return {"messages": [{"role": "user", "content": text},
                             {"role": "assistant", "content": asked}]}
    texts = ["Say hello.", f"Solve: {asked.upper()}", "A farmer has seventeen cows.",
             "compute \\(2 + 2\\) NOW!", "the sheep and all but nine of them run away: why?"]
    rows.write_text("".join(json.dumps(turns(text)) + "\n" for text in texts))
    monkeypatch.setattr(sys, "argv", ["data.py", "--decontaminate", str(rows), "--against",
                                      str(benchmark), "--out", str(tmp_path / "clean.jsonl")])
    data.main()
    kept = [json.loads(line) for line in open(tmp_path / "clean.jsonl")]
    assert kept == [turns(texts[0]), turns(texts[2])]
    printed = capsys.readouterr().out
    assert "rows: 5" in printed and "kept: 2" in printed and "like bench: 3" in printed
    assert printed.splitlines()[1].startswith("100.0%")


def decontaminated(folder, capsys, rows, problems, **options):
    """The rows kept, and what is printed."""
    for name, given in (("rows.jsonl", rows), ("bench.jsonl", problems)):
        (folder / name).write_bytes(lines(*given))
    data.decontaminate([folder / "rows.jsonl"], [folder / "bench.jsonl"], folder / "out.jsonl", 8,
                       **options)
    return [json.loads(line) for line in open(folder / "out.jsonl")], capsys.readouterr().out


def asked(text):
    return {"messages": [{"role": "user", "content": text}, EXPECTED[2]]}


@pytest.mark.parametrize("problem, row, like", [
    ("已知函数的最小正周期是多少", "请问已知函数的最小正周期是多少？", True),
    ("已知函数的最小正周期是多少", "已知数列的前几项之和是多少", False),
    ("日本語の問題をここに書きます", "次の日本語の問題をここに書きました", True),
    ("จงหาค่าของจำนวนเต็มบวก", "โจทย์: จงหาค่าของจำนวนเต็มบวกที่", True),
    ("1+1?", "1+1=", True), ("1+1?", "What is 1+1+1?", False), ("1+1?", "x 1+1", False),
    ("1+1?", data.MATH_PROMPT + "1 + 1", True),
    ("Find all primes p.", "Now find all primes p, please.", True),
    ("Find all primes p.", "Find all primes q.", False)])
def test_texts_without_spaces_and_short_questions_are_found(tmp_path, capsys, problem, row, like):
    kept, printed = decontaminated(tmp_path, capsys, [asked(row)], [{"problem": problem,
                                                                     "answer": "1"}])
    assert len(kept) == 1 - like and f"kept: {1 - like}" in printed
    assert "compared with 1 questions; 0 could not be" in printed


def test_problems_without_an_answer_are_compared_and_those_without_words_counted(tmp_path, capsys):
    problems = [{"problem": "What has roots as nobody sees?"}, {"problem": "?!", "answer": "1"},
                {"problem": "", "answer": "1"}]
    kept, printed = decontaminated(tmp_path, capsys, [asked("What has roots as nobody sees?"),
                                                      asked("...")],
                                   [{"solution": "", **problem} for problem in problems])
    assert kept == [asked("...")] and "like bench: 1" in printed
    assert "compared with 1 questions; 2 could not be compared: they have no words" in printed


def test_every_form_of_row_is_decontaminated(tmp_path, capsys):
    question = "Which walk on four legs in the morning?"
    rows = [asked(question), {"conversations": [{"from": "human", "value": question},
                                                {"from": "gpt", "value": "man"}]},
            {"prompt": "", **asked(question)}, {"prompt": question, "response": "man"},
            {"prompt": question, "response": "man", "kind": "math", "passed": False},
            {"question": question, "combined_text": "man", "domain": "puzzle"},
            {"problem": question, "answer": "man"}]
    kept, printed = decontaminated(tmp_path, capsys, rows, rows[-1:])
    assert kept == [] and "rows: 7" in printed and "kept: 0" in printed
    kept, printed = decontaminated(tmp_path, capsys, rows, [{"problem": "Else?", "answer": "1"}])
    assert kept == rows and "kept: 7" in printed
    kept, printed = decontaminated(tmp_path, capsys, rows, rows[-1:], where=["domain=puzzle"])
    assert kept == [] and "rows: 7  left out by --where: 6  like bench: 1  kept: 0" in printed


def test_a_row_that_cannot_be_encoded_is_named(tmp_path, capsys):
    row = {"messages": [EXPECTED[1], {"role": "assistant", "content": "half \ud83d"}]}
    for field in (row, {"prompt": "p", "response": "\ud83d"}, {**asked("x"), "note": "\ud83d"}):
        with pytest.raises(ValueError, match="rows.jsonl:2: .*half a character"):
            decontaminated(tmp_path, capsys, [asked("x"), field], [OWN])
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "out.jsonl.tmp").exists()


def test_a_refused_decontamination_leaves_everything_as_it_was(tmp_path):
    rows, broken = tmp_path / "rows.jsonl", tmp_path / "broken.jsonl"
    temporary = tmp_path / "out.jsonl.tmp"  # as the file is called while it is written
    for path in (rows, temporary, tmp_path / "gsm8k_test.jsonl"):
        path.write_text(json.dumps({"problem": "one two three four", "answer": "5"}) + "\n")
    broken.write_text(rows.read_text() + "{\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for names, out in (([broken], "out"), ([tmp_path / "none.jsonl"], "out"),
                       ([rows], "rows.jsonl"), ([rows], "."), ([tmp_path], "rows.jsonl"),
                       ([rows], "gsm8k_test.jsonl"), ([temporary], "out.jsonl")):
        with pytest.raises((ValueError, OSError)):
            data.decontaminate(list(map(str, names)), [tmp_path / "gsm8k"], tmp_path / out, 8)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shared_grams_are_those_that_brute_force_finds():
    import random
    rng = random.Random(0)
    texts = [" ".join(rng.choice("abcd") for _ in range(rng.randint(8, 30))) for _ in range(40)]
    for a, b in zip(texts, texts[1:]):
        words, others = a.split(), b.split()
        slow = {" ".join(words[i:i + 5]) for i in range(len(words)) if len(words[i:i + 5]) == 5
                and any(words[i:i + 5] == others[j:j + 5] for j in range(len(others)))}
        assert data.word_grams(words, 5) & data.word_grams(others, 5) == slow


@pytest.mark.parametrize("messages", [[], [{"role": "tool", "content": "x"}]])
def test_qwens_own_template_refuses_what_is_no_chat(messages):
    with pytest.raises(ValueError, match="messages of system, user and assistant"):
        data.render_chat(messages)


# --------------------------------------------------------------------------------------- the device

@pytest.mark.parametrize("emulates, instructions, expected", [
    (True, [], False), (True, ["avx512_bf16"], True), (True, ["amx_tile"], True),
    (False, [], True)])  # the last: arm64, where oneDNN alone is asked
def test_bf16_that_a_cpu_merely_emulates_is_no_arithmetic(monkeypatch, emulates, instructions,
                                                          expected):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: emulates)
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported",
                            lambda name=name: name in instructions)
    assert data.cpu_multiplies_bf16() == expected
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not data.cpu_multiplies_bf16()
