"""data.py: the exact strings and masks, what is read and refused, what packing must not leak."""
import base64
import contextlib
import gzip
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
def qwen():
    return load_tokenizer(shared_file("qwen2.5-tokenizer/tokenizer.json").parent)


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


@pytest.mark.parametrize("config", [{"eos_token": 3}, {"chat_template": [{"name": "default"}]}])
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


def test_load_tokenizer_needs_only_tokenizer_json(qwen, tmp_path):
    os.symlink(qwen.folder / "tokenizer.json", tmp_path / "tokenizer.json")
    bare = load_tokenizer(tmp_path)
    assert bare.end_token == "<|im_end|>" and bare.encode("Hello world") == [9707, 1879]
    assert encode_conversation(bare, [USER, ASSISTANT]) == encode_conversation(qwen,
                                                                               [USER, ASSISTANT])


def test_tokenizer_equals_transformers(qwen):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(qwen.folder)
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
    assert (again.eos_token_id, again.pad_token_id) == (258, 256)


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


def test_a_folder_without_a_template_gets_qwens_with_the_prompt(qwen, tmp_path):
    (tmp_path / "base").mkdir()
    os.symlink(qwen.folder / "tokenizer.json", tmp_path / "base" / "tokenizer.json")
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
                   "a.jsonl:2: broken JSON .* after the array"),
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


@pytest.mark.parametrize("name, content",
                         [("tokens.bin", b""), ("tokens.bin", b"12345"), ("mask.bin", b"\1"),
                          ("rows.npy", b""), ("systems.json", b"")])
def test_a_damaged_cache_is_refused_by_name(tmp_path, name, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(answer("one")))
    load(path, tmp_path / "cache")
    folder, = (tmp_path / "cache").iterdir()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{folder.name} is damaged .*: remove that folder"):
        load(path, tmp_path / "cache")


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


def test_longest_first_comes_near_the_best_and_local_search_reaches_it():
    lengths = np.array([2, 3, 2, 3, 2])
    row_of = data.longest_first(lengths, lengths, 20, 2)
    assert row_lengths(row_of, lengths).tolist() == [7, 5]  # 3 2 2, 3 2
    better = data.local_search(row_of, lengths, lengths, 20, 2, 2)
    assert row_lengths(better, lengths).tolist() == [6, 6]
    assert data.longest_first(lengths, lengths, 5, 2) is None  # 12 tokens in two rows of 5


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
    for family in data.SIZES:
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
    "unknown kind": ({**OWN, "kind": "essay"}, "unknown kind 'essay'"),
    "kind without tests": ({**OWN, "kind": "code"}, "`kind` is code, but there is no `tests`"),
    "kind without answer": ({"kind": "math", "prompt": "P", "tests": [STDIN]},
                            "`kind` is math, but there is no `answer`"),
    "choice": ({**OWN, "kind": "choice"}, "`answer` of a choice must be a letter, not '2'"),
    "tests": ({"prompt": "P", "tests": [{"input": 1, "output": "2"}]}, "`tests` must be objects"),
    "tests text": ({"prompt": "P", "tests": "x"}, "`tests` is broken JSON"),
    "source": ({**OWN, "source": [1]}, "`source` must be a string or a number"),
    "no such option": ({"question": "Q", "options": ["a", "b"], "answer": "C"},
                       "`answer` 'C' names none of the 2 options"),
    "no such index": ({"question": "Q", "choices": ["a", "b"], "answer": 2}, "`answer` 2 names"),
    "index or text": ({"question": "Q", "choices": ["0", "1"], "answer": "1"}, "`answer` '1'"),
    "input_output": ({**apps(), "input_output": "{"}, "`input_output` is broken JSON"),
    "input_output list": ({**apps(), "input_output": [1]}, "`input_output` must be a dict"),
    "inputs": (apps(inputs=5, outputs=[]), "`inputs` must be a list, not int"),
    "private tests": (livecodebench("eJx"), "`private_test_cases` is neither JSON nor a packed"),
    "no function": (livecodebench('[{"testtype": "functional", "input": "1", "output": "1"}]'),
                    "`tests` must be objects"),
    "test without output": (livecodebench('[{"testtype": "stdin", "input": "1"}]'),
                            "`private_test_cases` holds a broken test .*output"),
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
    with pytest.raises(ValueError, match="builtin:train, builtin:heldout and builtin:harder, each"):
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
    assert "\033[32m0 1 2<|im_end|>\033[0m" in done.stdout


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
def test_the_command_refuses_bad_input_in_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken").write_text("{")
    done = run_script(ROOT / "data.py", *arguments, "--cache", tmp_path, check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and says in last
    assert "Traceback" not in done.stderr


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


@pytest.mark.parametrize("failing", ["01", "0", "1"])
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
    time.sleep(60)
data.run(main)
""")
    done = run_script(script, processes=2, check=False, timeout=50)
    assert re.findall("^error: .*", done.stderr, re.M) == ["error: mine"], done.stderr


@pytest.mark.slow
def test_seventeen_thousand_rows_take_neither_minutes_nor_gigabytes_twice(qwen, tmp_path):
    """17,000 rows of 16 KB in one array, as the published file is: the second start reads the cache
    alone."""
    text = "🙂" + " ".join(r["solution"]
                          for r, _ in read_rows(shared_file("problems/math500.jsonl")))
    with open(tmp_path / "a.json", "w") as file:
        for i in range(17_000):
            start = i * 97 % (len(text) - 16_000)
            file.write(",[\n"[i == 0:2 - (i > 0)] + json.dumps(answer(text[start:start + 16_000]),
                                                               ensure_ascii=False))
        file.write("]")
    os.symlink(qwen.folder / "tokenizer.json", tmp_path / "tokenizer.json")
    small_config(vocab_size=151936).save(tmp_path, torch.float32)
    command = ["-c",
               f"import sys, resource; sys.path.insert(0, {str(ROOT)!r}); import data; "
               f"data.one_line_errors(data.main); "
               "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)",
               tmp_path / "a.json", "--model",
               tmp_path, "--max_seq_len", 512, "--as_published", "--cache", tmp_path / "cache"]
    peaks, seconds = [], []
    for _ in range(2):
        start = time.perf_counter()
        done = run_script(*command, timeout=900)
        seconds.append(time.perf_counter() - start)
        peaks.append(int(done.stdout.split()[-1]))
    print(f"first {seconds[0]:.0f} s, {peaks[0]} MiB; again {seconds[1]:.0f} s, {peaks[1]} MiB")
    assert max(peaks) < 2000 and peaks[1] < 1000 and seconds[1] < seconds[0] / 4


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


def test_a_refused_decontamination_leaves_everything_as_it_was(tmp_path):
    rows, broken = tmp_path / "rows.jsonl", tmp_path / "broken.jsonl"
    rows.write_text(json.dumps({"problem": "one two three four", "answer": "5"}) + "\n")
    broken.write_text(rows.read_text() + "{\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for names, out in (([broken], "out"), ([tmp_path / "none.jsonl"], "out"),
                       ([rows], "rows.jsonl"), ([rows], ".")):
        with pytest.raises((ValueError, OSError)):
            data.decontaminate(list(map(str, names)), [str(rows)], tmp_path / out, 8)
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
