"""From published rows to packed batches: tokenizer, chat template, rows and problems, token cache,
packing, decontamination, built-in tasks.

    python data.py FILE --model DIR     # counts, lengths, packing, one row with its mask in colour
    python data.py --decontaminate FILE --against BENCHMARK --out CLEAN     # drops what it asks

A training row is ShareGPT (`system`, `conversations` of from/value), `messages` of role/content, or
a kept sample (a problem's fields and `response`). Rows come from .json, .jsonl (also .gz), .csv and
.parquet files, from data sets on the Hugging Face hub, and from `builtin:...`. So do problems,
whose published layouts are told apart by their fields. Loss is taken on what the assistant says and
on its end token, found by position: several tokenizers pad with their end token, and a mask made by
token id would teach a model never to stop. A turn with `loss` false or null, `weight` 0 or `train`
false is context and no target.

Sources: the formats and prompts of NovaSky's Sky-T1 (github.com/NovaSky-AI/SkyThought); the chat
template of Qwen2.5-Instruct. Limits: text turns only (tools, reasoning apart from the answer and
images are refused by name); .parquet needs pyarrow.
"""
import base64
import contextlib
import csv
import errno
import fcntl
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tempfile
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from verify import TAGS, ArgumentParser, begin_script, can_fail, is_test, last_box

if __name__ == "__main__":  # before torch is imported, which takes seconds
    begin_script()

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import AddedToken, Tokenizer as Backend, decoders, models, pre_tokenizers
from tqdm import tqdm

from model import IGNORE, Qwen2Config

# The system prompts of the trained model and of its teacher, by name, in the original's spelling.
SYSTEM_PROMPTS = {
    "skyt1": (
        "Your role as an assistant involves thoroughly exploring questions through a systematic "
        "long thinking process before providing the final precise and accurate solutions. This "
        "requires engaging in a comprehensive cycle of analysis, summarizing, exploration, "
        "reassessment, reflection, backtracing, and iteration to develop well-considered thinking "
        "process. Please structure your response into two main sections: Thought and Solution. In "
        "the Thought section, detail your reasoning process using the specified format: "
        "<|begin_of_thought|> {thought with steps separated with '\n\n'} <|end_of_thought|> Each "
        "step should include detailed considerations such as analisying questions, summarizing "
        "relevant findings, brainstorming new ideas, verifying the accuracy of the current steps, "
        "refining any errors, and revisiting previous steps. In the Solution section, based on "
        "various attempts, explorations, and reflections from the Thought section, systematically "
        "present the final solution that you deem correct. The solution should remain a logical, "
        "accurate, concise expression style and detail necessary step needed to reach the "
        "conclusion, formatted as follows: <|begin_of_solution|> {final formatted, precise, and "
        "clear solution} <|end_of_solution|> Now, try to solve the following question through the "
        "above guidelines:"),
    "qwq": ("You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You "
            "should think step-by-step."),
}
QWEN_DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# Turns as Qwen2.5 writes them; chat templates are jinja2.
CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n"
          "{{ message.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

# What the recipe puts before a bare problem.
MATH_PROMPT = "Return your final response within \\boxed{}. "
CHOICE_PROMPT = ("Return your final response within \\boxed{} and only include the letter choice "
                 "(A, B, C, or D) as your final response. ")
STDIN_PROMPT = ("Generate an executable Python function generated from the given prompt. The "
                "function should take stdin as input and print the output. Simply call the "
                "function after the definition. ")
CALL_PROMPT = ("Generate an executable Python function generated from the given prompt. Return "
               "the function body without invoking it at the final solution. ")

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant"}
# Of a row or a turn: they change what it says, and nothing here renders them.
UNSUPPORTED = ("tools", "tool_calls", "functions", "function_call", "reasoning_content",
               "reasoning", "thinking", "image", "images", "video", "videos", "audio", "audios")
# Of a turn; the first is the default. A table fills absent fields with None: only a loss says that.
LOSS = {"loss": (True, False, None), "weight": (1, 0), "train": (True, False)}
DATA_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".parquet")
DATA_PATTERNS = [f"*{suffix}" for suffix in DATA_SUFFIXES]
MAX_SEQ_LEN = 16384  # the recipe's
CACHE_VERSION = 4  # part of the cache's key: raise it when what the cached files mean changes


# ---------------------------------------------------------------------- tokenizer and chat template

class Tokenizer:
    """tokenizer.json, and its folder's end token, pad token and chat template (None: Qwen2.5's)."""

    def __init__(self, backend, bos_token=None, eos_token=None, pad_token=None, template=None,
                 folder=None):
        self.backend, self.template, self.folder = backend, template, folder
        self.bos_token, self.eos_token = bos_token or "", eos_token or ""
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.eos_token_id = backend.token_to_id(eos_token) if eos_token else None
        self.pad_token_id = backend.token_to_id(pad_token) if pad_token else None

    def render(self, messages, add_generation_prompt=False):
        """The text of a conversation by this folder's chat template."""
        return render_chat(messages, add_generation_prompt, self.template, self.bos_token,
                           self.eos_token)

    def encode(self, text):
        """Token ids of a text; special tokens written in it are recognised, none is added."""
        return self.backend.encode(check_text(text, "the text"), add_special_tokens=False).ids

    def encode_batch(self, texts):
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids):
        return self.backend.decode(ids, skip_special_tokens=False)

    def token_id(self, token):
        """The id of one token of the vocabulary; ValueError where there is none."""
        index = self.backend.token_to_id(token)
        if index is None:
            raise ValueError(f"the tokenizer has no token {token!r}: choose another --end_token")
        return index

    @functools.cached_property
    def end_token(self):
        """What the chat template puts behind an answer: the token that generation stops on."""
        question = {"role": "user", "content": "?"}
        if self.render([question], add_generation_prompt=True) == self.render([question]):
            raise ValueError(f"{self.folder}: the chat template does not know add_generation_prompt"
                             ", so where an answer starts cannot be told: mend it")
        text = self.render([question, {"role": "assistant", "content": "ANSWER"}])
        end = text.rpartition("ANSWER")[2].strip() or self.eos_token
        if not end:
            raise ValueError(f"{self.folder}: neither chat template nor tokenizer_config.json "
                             "name an end token")
        return end

    def save(self, folder, system=None):
        """Writes copies of the own folder's files, or those of the built-in tokenizer. A `system`
        prompt becomes the default system turn of the chat template (Qwen2.5's if it has none)."""
        folder, template = Path(folder), self.template
        if system is not None:
            template = with_default_system(CHATML if template is None else template, system)
        config_path = folder / "tokenizer_config.json"
        if self.folder is None:
            self.backend.save(str(folder / "tokenizer.json"))
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end_token,
                      "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False}
        else:
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                         "special_tokens_map.json", "vocab.json", "merges.txt",
                         "added_tokens.json"):
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, folder / name)
            if system is None:
                return
            config = json.loads(config_path.read_text()) if config_path.is_file() else {}
            # programs differ in which of two templates they take: leave one
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        config["chat_template"] = template
        config_path.write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(model_dir):
    """Reads tokenizer.json, and tokenizer_config.json and chat_template.jinja where they exist.
    `builtin:tiny` is bytes. Raises FileNotFoundError or ValueError that name the file."""
    if model_dir == "builtin:tiny":
        return builtin_tokenizer()
    folder = Path(model_dir)
    path, config_path, jinja_path = (folder / name for name in (
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: copy the tokenizer of the model that the "
                                "weights come from")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is not a tokenizer ({error}): download it again") from None
    backend.no_truncation()
    backend.no_padding()
    try:
        config = json.loads(config_path.read_text()) if config_path.is_file() else {}
        tokens = {key: value["content"] if isinstance(value := config.get(key), dict) else value
                  for key in ("bos_token", "eos_token", "pad_token")}
        template = jinja_path.read_text() if jinja_path.is_file() else config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        for key, value in (*tokens.items(), ("chat_template", template)):
            if not isinstance(value, str | None):
                raise ValueError(f"`{key}` is {value!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{config_path} is broken ({error}): download it again") from None
    return Tokenizer(backend, **tokens, template=template, folder=folder)


def builtin_tokenizer():
    """256 bytes and three of Qwen's special tokens; the recipe's tags and prompts are a token each,
    so that a tiny model reads problems. Its chat template adds no system turn of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False)
                                for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    choice = recipe_prompt({"kind": "choice", "prompt": "".join(f"{c}) \n" for c in CHOICES)})
    backend.add_tokens([AddedToken(t, normalized=False) for t in
                        (*TAGS, MATH_PROMPT, CALL_PROMPT, choice.partition("A) ")[0])])
    return Tokenizer(backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", template=CHATML)


def with_default_system(template, system):
    """The template with a first line that begins a conversation without a system turn with this
    one, so that a default further down is never used; an earlier such line is replaced."""
    before = ("{% if not messages or messages[0]['role'] != 'system' %}"
              "{% set messages = [{'role': 'system', 'content': ")
    if template.startswith(before):
        template = template.partition("\n")[2]
    # jinja reads JSON's strings, but for characters written as a pair of escapes
    text = json.dumps(system, ensure_ascii=False)
    return before + text + "}] + messages %}{% endif %}\n" + template


@functools.lru_cache(maxsize=8)
def compiled_template(template):
    # a template comes with a model, and is as little trusted
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise ValueError(f"the chat template refuses these messages: {message}")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def render_chat(messages, add_generation_prompt=False, template=None, bos_token="", eos_token=""):
    """The text of a conversation by a template (jinja2 source), by default Qwen2.5-Instruct's with
    its default system turn. ValueError for messages or a template that cannot be rendered."""
    if template is None:
        template = with_default_system(CHATML, QWEN_DEFAULT_SYSTEM)
        if not messages or {m["role"] for m in messages} - {"system", "user", "assistant"}:
            raise ValueError("a conversation is of messages of system, user and assistant")
    try:
        return compiled_template(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt,
            bos_token=bos_token, eos_token=eos_token)
    except Exception as error:  # a template is a program: whatever it raises
        raise ValueError(f"the chat template fails on these messages: {error}") from None


def conversation_segments(tokenizer, messages, end_token=None):
    """A conversation as (text, is_target) pieces that are tokenised one by one. A cut lies exactly
    where generation will start, so that the tokens learnt are those that a prompt is continued
    with, even if an answer begins with a newline. `end_token` replaces the template's behind each
    answer; if it is another one, the text ends there. Answers without loss are as rendered."""
    segments, done, end = [], "", tokenizer.end_token
    for k, message in enumerate(messages):
        if message["role"] != "assistant" or not takes_loss(message, "assistant"):
            continue
        prompt = tokenizer.render(messages[:k], add_generation_prompt=True)
        answer = message["content"]
        if not prompt.startswith(done):
            raise ValueError("the chat template changes earlier turns: only rows with one answer "
                             "can be trained on")
        # R1's template opens the thought itself
        if answer.startswith("<think>\n") and prompt.endswith("<think>\n"):
            answer = answer.removeprefix("<think>\n")
        segments += [(prompt[len(done):], False), (answer, True), (end_token or end, True)]
        done = prompt + answer + end
    text = tokenizer.render(messages)
    # Qwen's newline after the end of the turn, and all that comes after the last target
    if not segments or text.startswith(done) and (
            end_token or end) == end and messages[-1]["role"] == "assistant":
        segments.append((text[len(done):], False))
    return [s for s in segments if s[0]]


def encode_conversation(tokenizer, messages, end_token=None):
    """messages (dicts of role and content) -> (token ids, mask): mask[i] is 1 exactly when token i
    is a target (unshifted): the text of every assistant turn and its end token, but for turns that
    say `loss` false."""
    ids, mask = [], []
    for text, is_target in conversation_segments(tokenizer, messages, end_token):
        tokens = tokenizer.encode(text)
        ids += tokens
        mask += [int(is_target)] * len(tokens)
    return ids, mask


# ------------------------------------------------------------------------------------- reading rows

def find(name, repo_type, patterns):
    """The local path of a file or folder, or of a hub repository (fetched once; HF_HUB_OFFLINE uses
    the cache alone). A name that looks like a path never asks the hub. Raises FileNotFoundError."""
    path = Path(name)
    if path.exists():
        return path
    is_path = name.startswith((".", "/", "builtin:")) or name.endswith(DATA_SUFFIXES)
    if is_path or name.count("/") != 1:
        raise FileNotFoundError(f"{name} does not exist here, and is not the name of a "
                                f"{repo_type} on the hub (owner/name)")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, repo_type=repo_type, allow_patterns=patterns))
    # network, missing repository, licence, offline: the library has a class for each
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{name} is neither a path here nor could it be fetched from the "
                                f"hub: {reason}") from None


def find_model(name, weights=True):
    """The folder of a model; without weights only its configuration and tokenizer are fetched."""
    patterns = ["*.json", "*.jinja", "*.txt"] + ["*.safetensors"] * weights
    return name if name == "builtin:tiny" else find(name, "model", patterns)


def read_generation_config(model_dir):
    """A folder's generation_config.json, {} where there is none, and the end tokens it names."""
    path = Path(model_dir) / "generation_config.json"
    try:
        generation = json.loads(path.read_text()) if path.is_file() else {}
        ends = generation.get("eos_token_id") or []
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is broken ({error}): download it again, or remove it") from None
    return generation, ends if isinstance(ends, list) else [ends]


def find_data(name):
    """The data files of one --data argument: a file, or those of a folder or hub data set, its
    train split if it has one."""
    path = find(name, "dataset", DATA_PATTERNS)
    if path.is_file():
        return [path]
    for pattern in (r"(^|[^a-z])train([^a-z]|$)", ""):
        if files := [p for p in files_below(path, pattern) if p.name != "dataset_infos.json"]:
            return files
    raise FileNotFoundError(f"{name} holds no data file ({', '.join(DATA_SUFFIXES)})")


def files_below(folder, pattern=""):
    """The data files of a folder and its folders whose path in it has the pattern."""
    return sorted(p for p in folder.rglob("*") if p.name.endswith(DATA_SUFFIXES)
                  and re.search(pattern, str(p.relative_to(folder))))


def read_rows(path):
    """Yields (row, line number) of a .json, .jsonl, .csv or .parquet file; rows of the last are
    counted from 1. Raises ValueError naming file and line for what is not UTF-8, not JSON, or not
    an object; and for an empty file."""
    reader, line = {".csv": csv_rows, ".parquet": parquet_rows}.get(path.suffix, json_rows), None
    for row, line in reader(path):
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{line}: a row must be an object, this one is a "
                             f"{type(row).__name__}")
        yield row, line
    if line is None:
        raise ValueError(f"{path} holds no rows")


def json_rows(path):
    """One object a line, or one array of objects: neither is ever whole in memory."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        try:
            start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            file.seek(0)
            if start == b"[":
                yield from array_rows(path, io.TextIOWrapper(file, encoding="utf-8-sig"))
                return
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig")
                    if text.strip():
                        yield json.loads(text), number
                except (ValueError, RecursionError) as error:
                    raise broken(path, number, error) from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a complete gzip file ({error})") from None


def broken(path, line, error, form="JSON"):
    """The ValueError for a file that cannot be read at a line; `error` may be the bare reason."""
    if isinstance(error, UnicodeDecodeError):
        line += error.object[:error.start].count(b"\n")
        return ValueError(f"{path}:{line}: not UTF-8 (byte {error.object[error.start]:#x}): save "
                          "the file as UTF-8")
    reason = getattr(error, "msg", error)
    reason = "nested too deep" if isinstance(error, RecursionError) else reason
    return ValueError(f"{path}:{line}: broken {form} ({reason})")


def array_rows(path, file, block=2 ** 17):
    """Rows of a JSON array, from a window of the text that grows until it holds the next one."""
    marks = {"start": "[", "[": "]", ",": "", "row": ",]", "]": ""}  # what may come after what
    window, line, last, piece = "", 1, "start", True
    while piece:
        try:
            piece = file.read(block)
        except UnicodeDecodeError as error:
            raise broken(path, line + window.count("\n"), error) from None
        window += piece
        while True:
            blank = len(window) - len(window.lstrip())
            line, window = line + window[:blank].count("\n"), window[blank:]
            if not window:
                break
            if window[0] in marks[last]:
                last, window = window[0], window[1:]
            elif last in ("[", ","):
                try:
                    row, end = json.JSONDecoder().raw_decode(window)
                except (ValueError, RecursionError) as error:
                    if piece and isinstance(error, json.JSONDecodeError):
                        break  # perhaps the row goes on in the next block
                    raise broken(path, line, error) from None
                yield row, line
                line, last, window = line + window[:end].count("\n"), "row", window[end:]
            else:
                place = "after the array" if last == "]" else "after a row"
                raise broken(path, line, f"{window[:20]!r} {place}")
    if last != "]":
        raise broken(path, line, "the array does not end: is the file truncated?")


def csv_rows(path):
    csv.field_size_limit(2 ** 31 - 1)
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{path}:{reader.line_num}: {len(reader.fieldnames)} columns "
                                     "in the header, not in this row")
                yield row, reader.line_num
        except (UnicodeDecodeError, csv.Error) as error:
            raise broken(path, reader.line_num, error, "CSV") from None


def parquet_rows(path):
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow (pip install pyarrow), or convert "
                         "it once with: python -c \"import pandas; pandas.read_parquet("
                         f"'{path.name}').to_json('rows.jsonl', orient='records', lines=True)\""
                         ) from None
    rows = (row for batch in parquet.ParquetFile(path).iter_batches() for row in batch.to_pylist())
    yield from ((row, number) for number, row in enumerate(rows, 1))


def recipe_prompt(problem):
    """The recipe's user turn of a problem, by its kind; ValueError for another or broken tests."""
    kind, question, tests = problem.get("kind"), problem["prompt"], problem.get("tests") or [{}]
    if kind is None:
        return question
    if kind == "math":
        return MATH_PROMPT + question
    if kind == "choice":  # the recipe's prompt names four letters; MMLU-Pro has up to ten
        letters = sorted(set(re.findall(r"^([A-Z])\) ", question, re.M)))
        *letters, last = letters if len(letters) > 1 else "ABCD"
        named = f"{', '.join(letters)}, or {last}"
        return CHOICE_PROMPT.replace("A, B, C, or D", named) + question
    if kind != "code":
        raise ValueError(f"unknown kind {kind!r}: must be math, choice or code")
    if not (isinstance(tests, list) and isinstance(tests[0], dict)):
        raise ValueError("`tests` must be a list of objects")
    return (STDIN_PROMPT if "input" in tests[0] else CALL_PROMPT) + question


def to_messages(row, system="skyt1"):
    """A training row as messages. `system` (a name of SYSTEM_PROMPTS, "none", or a text) goes
    before kept samples, which carry none. Turns without loss say `loss` false. Raises ValueError
    that names the field."""
    refuse_unsupported(row)
    if isinstance(row.get("conversations"), list):
        turns = [turn_of(turn, "from", "value") for turn in row["conversations"]]
    elif isinstance(row.get("messages"), list):
        turns = [turn_of(turn, "role", "content") for turn in row["messages"]]
    elif isinstance(row.get("response"), str) and isinstance(row.get("prompt"), str):
        if row.get("passed") is False:
            raise ValueError("a sample that did not pass: train on the file of `verify.py --keep`")
        turns = [{"role": "user", "content": check_text(recipe_prompt(row), "`prompt`")},
                 {"role": "assistant", "content": check_text(row["response"], "`response`")}]
        row = {"system": None if system == "none" else SYSTEM_PROMPTS.get(system, system)}
    else:
        raise ValueError(f"not a training row (fields: {', '.join(map(str, row)) or 'none'}): it "
                         "needs `conversations`, `messages`, or `prompt` and `response`")
    if row.get("system"):
        turns.insert(0, turn_of({"role": "system", "content": row["system"]}, "role", "content"))
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise ValueError("no assistant turn, so nothing to learn from")
    if "user" not in roles[:roles.index("assistant")]:
        raise ValueError("no user turn before the first assistant turn")
    return turns


def turn_of(turn, role_field, text_field):
    """One message from a turn's fields; ValueError that names the field."""
    if not isinstance(turn, dict) or role_field not in turn:
        raise ValueError(f"a turn has no `{role_field}`")
    refuse_unsupported(turn)
    role, text = turn[role_field], turn.get(text_field)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"unknown role {role!r}: must be one of {', '.join(ROLES)}")
    what = f"`{text_field}` of a {role} turn"
    if isinstance(text, list):
        text = "".join(part_text(part, what) for part in text)
    message = {"role": ROLES[role], "content": check_text(text, what)}
    return message if takes_loss(turn, message["role"]) else message | {"loss": False}


def refuse_unsupported(fields):
    for name in UNSUPPORTED:
        if fields.get(name) and fields[name] != "[]":
            raise ValueError(f"`{name}` is not supported: rows are turns of plain text")


def part_text(part, what):
    """The text of one of a turn's parts, [{"type": "text", "text": ...}]."""
    if not isinstance(part, dict) or part.get("type") != "text":
        raise ValueError(f"{what} has a part that is not text: {str(part)[:60]}")
    return check_text(part.get("text"), what)


def takes_loss(turn, role):
    """Whether a turn's `loss` and `weight` leave it a target, if its role makes it one."""
    said = {name: turn[name] for name in LOSS
            if turn.get(name) is not None or name == "loss" and name in turn}
    for name, value in said.items():
        if value not in LOSS[name] or value and role != "assistant":
            raise ValueError(f"`{name}` of a turn of the {role} is {value!r}: must be one of "
                             f"{LOSS[name]}, and of the assistant alone a loss can be asked")
    return all(said.values())


def check_text(text, what):
    """The text, if a tokenizer can take it; else ValueError."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is not a string")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{what} holds half a character (a lone surrogate)")
    return text


# ------------------------------------------------------------------------------- the built-in tasks

# Three families whose answer is hard to say at once and easy to work out, and how long their
# problems are: all that are `harder` have the last size, and one in eight of the others (more in
# large splits, where the short ones of a family run out).
SIZES = {"addition": (2, 3, 4), "last_digit": (3, 4, 5), "multiply_out": (3, 4, 5)}
CHOICES = "ABCDEFGHIJ"


def addition(generator, size):
    """The sum of two numbers of `size` digits, digit by digit with the carry."""
    numbers = [generator.randrange(10 ** (size - 1), 10 ** size) for _ in range(2)]
    steps, carry = [], 0
    for place in range(size):
        digits = [n // 10 ** place % 10 for n in numbers]
        total = sum(digits) + carry
        steps.append("+".join(map(str, digits)) + f"+{carry}={total}")
        carry = total // 10
    return {"kind": "math", "prompt": "+".join(map(str, numbers)) + "=?",
            "answer": str(sum(numbers))}, steps


def last_digit(generator, size):
    """The last digit of a sum of `size` digits, by its letter."""
    digits = [generator.randrange(1, 10) for _ in range(size)]
    steps, last = [], digits[0]
    for digit in digits[1:]:
        steps.append(f"{last}+{digit}={last + digit}")
        last = (last + digit) % 10
    options = "".join(f"\n{letter}) {n}" for n, letter in enumerate(CHOICES))
    question = "Last digit of " + "+".join(map(str, digits)) + "?" + options
    return {"kind": "choice", "prompt": question, "answer": CHOICES[last]}, steps


def multiply_out(generator, size):
    """A function of x as one product and one sum, from `size` operations on x."""
    a, b, steps = 1, 0, []
    while len(steps) < size:
        sign, n = generator.choice("++*"), generator.randrange(1, 10)
        if sign == "*":
            a, b, n = 2 * a, 2 * b, 2
        else:
            b += n
        steps.append(f"{sign}{n}: {a}*x+{b}")
        if b >= 40:  # small tables to learn: begin again
            a, b, steps = 1, 0, []
    question = "f(x), from left to right: x " + " ".join(step.split(":")[0] for step in steps)
    return {"kind": "code", "prompt": question,
            "tests": [{"fn_name": "f", "args": [x], "expected": a * x + b} for x in (0, 1, 7)],
            "answer": f"```python\ndef f(x):\n    return {a}*x+{b}\n```"}, steps


def builtin_problems(split, count, seed=0):
    """Different problems of the three families in turn, with a worked `solution` and the `bare`
    one. The splits heldout and harder share no prompt with others."""
    generator, seen = random.Random(f"{split} {seed}"), set()
    for i in range(count):
        family = (addition, last_digit, multiply_out)[i % 3]
        sizes = SIZES[family.__name__]
        while True:
            longest = split == "harder" or generator.random() < 1 / 8
            size = sizes[-1] if longest else generator.choice(sizes[:-1])
            problem, steps = family(generator, size)
            held_out = zlib.crc32(problem["prompt"].encode()) % 16 == 0
            if held_out == (split in ("heldout", "harder")) and problem["prompt"] not in seen:
                break
        seen.add(problem["prompt"])
        bare = problem.pop("answer") if "tests" in problem else f"\\boxed{{{problem['answer']}}}"
        yield {"id": problem["prompt"], "source": family.__name__, **problem, "bare": bare,
               "solution": "\n".join(steps) + "\n\n" + bare}


def builtin_rows(name):
    """(row, number) of `builtin:worked` (step by step) or `builtin:bare` (the answers alone). Half
    of each family are asked with the recipe's instruction, half without, as one types in a chat."""
    kind, count = builtin_name(name, "worked", "bare", count=30_000)
    for number, problem in enumerate(builtin_problems("rows", count), 1):
        response = problem["solution" if kind == "worked" else "bare"]
        question = recipe_prompt(problem) if number % 2 else problem["prompt"]
        yield {"messages": [{"role": "user", "content": question},
                            {"role": "assistant", "content": response}]}, number


def builtin_name(name, *kinds, count):
    """What follows `builtin:` in a name: one of the kinds, and the number of rows."""
    _, kind, count = (name + f":{count}").split(":")[:3]
    if kind not in kinds or not count.isdecimal():
        known = " and ".join(", ".join(f"builtin:{kind}" for kind in kinds).rsplit(", ", 1))
        raise ValueError(f"{name}: the built-in data are {known}, each with :COUNT after it if "
                         "wanted")
    return kind, int(count)


# --------------------------------------------------------------------------------- reading problems

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ID_FIELDS = ("id", "unique_id", "question_id", "record id", "task_id", "problem_id", "uuid")
CONTENT = ("kind", "prompt", "answer", "tests")
CARRIED = ("subject", "level", "difficulty", "contest_date")  # to score by; kept where a row has it


@dataclass(frozen=True)
class Evaluation:
    """A benchmark's hub data set, a pattern of its files' names, and how it is sampled: at the
    recipe's temperature, small sets several times, as one answer to each of 30 is noise."""
    hub: str
    files: str
    n: int = 1
    temperature: float = 0.0


EVALUATIONS = {
    "math500": Evaluation("HuggingFaceH4/MATH-500", "test"),
    "aime24": Evaluation("HuggingFaceH4/aime_2024", "train", 8, 0.7),
    "aime25": Evaluation("math-ai/aime25", "test", 8, 0.7),
    "gsm8k": Evaluation("openai/gsm8k", "main.test"),
    "gpqa_diamond": Evaluation("Idavidrein/gpqa", "gpqa_diamond", 4, 0.7),
    # the problems up to May 2024, version 2
    "livecodebench": Evaluation("livecodebench/code_generation_lite", r"^test2?\.jsonl"),
    "humaneval": Evaluation("openai/openai_humaneval", "test"),
}


def find_evaluation(name):
    """The files of an EVALUATIONS name: those beside it whose name says so (`aime24`: aime_2024,
    `math500`: MATH-500, `dir/gsm8k`: dir/gsm8k_test), a folder of that name, or the hub's."""
    path, evaluation = Path(name), EVALUATIONS[Path(name).name]
    wanted = re.sub("[^a-z0-9]", "", path.name)
    wanted = re.sub("(2[0-9])$", r"(20)?\1", wanted) + "(test)?"
    beside = [p for p in sorted(path.parent.glob("*")) if p.name.endswith(DATA_SUFFIXES)
              and re.fullmatch(wanted, re.sub("[^a-z0-9]", "", p.name.partition(".")[0].lower()))]
    if beside:
        return beside
    if path.parent != Path() and not path.is_dir():
        raise FileNotFoundError(f"{path.parent} holds no file of {path.name} (such as "
                                f"{path.name}.jsonl)")
    root = path if path.is_dir() else find(evaluation.hub, "dataset", DATA_PATTERNS)
    files = files_below(root, evaluation.files)
    if not files:
        raise FileNotFoundError(f"{root} holds no data file whose name has {evaluation.files}")
    return files


def read_problems(names, counts=None):
    """Yields the problems of files, folders, hub data sets, EVALUATIONS, and `builtin:train`,
    `builtin:heldout` and `builtin:harder` (:COUNT) as dicts of `id`, `source`, `kind`, `prompt`,
    and `answer` or `tests`; samples keep their further fields. Duplicates and problems without
    question, answer or tests are dropped and counted, in the Counter `counts` or else on stderr.
    Raises ValueError that names file, line and field, also for two problems of one source and id.
    """
    silent, counts, seen = counts is not None, Counter() if counts is None else counts, {}
    for row, where, source in problem_rows(names):
        counts["rows"] += 1
        try:
            problem = to_problem(row, source)
            reason = unusable(problem)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        key = content_hash(problem, "source", "id", "sample")
        content = content_hash(problem, *CONTENT, "response")
        if reason is None and key in seen:
            first, first_where = seen[key]
            if first != content:
                raise ValueError(f"{where}: `id` {problem['id']!r} of source {problem['source']!r} "
                                 f"is taken by another problem ({first_where}): rename one of them")
            reason = "duplicates"
        counts[reason or "kept"] += 1
        if reason is None:
            seen[key] = content, where
            yield problem
    summary = "  ".join(f"{name}: {count:,}" for name, count in counts.items())
    if not seen:
        raise ValueError(f"{', '.join(map(str, names))}: no problem left ({summary})")
    if not silent and counts["rows"] > counts["kept"]:
        print(summary, file=sys.stderr)


def problem_rows(names):
    """Yields (row, its place, the source if the row names none: the benchmark, the hub data set, or
    the file's stem)."""
    for name in map(str, names):
        if name.startswith("builtin:"):
            split, count = builtin_name(name, "train", "heldout", "harder", count=500)
            for line, row in enumerate(builtin_problems(split, count), 1):
                yield row, f"{name}:{line}", "builtin"
            continue
        benchmark = Path(name).name if Path(name).name in EVALUATIONS else None
        from_hub = not Path(name).exists()
        for path in find_evaluation(name) if benchmark else find_data(name):
            stem = re.sub(r"(-\d+-of-\d+)?\.(jsonl?|csv|parquet)(\.gz)?$", "", path.name)
            source = benchmark or (name if from_hub else stem)
            for row, line in read_rows(path):
                level = row.get("difficulty") if benchmark == "livecodebench" else None
                yield row, f"{path}:{line}", f"{source}_{level}" if level else source


def to_problem(row, source):
    """A published row as a problem, its layout told by its fields. What is missing is empty, see
    `unusable`; what is broken is a ValueError that names the field."""
    fields = {str(name).lower(): value for name, value in row.items()}
    convert = next((function for needed, function in LAYOUTS if needed <= fields.keys()), None)
    if convert is None:
        raise ValueError(f"not a problem (fields: {', '.join(map(str, row)) or 'none'}): it needs "
                         f"`prompt` with `answer` or `tests`, or a data set's (LAYOUTS in data.py)")
    problem = convert(fields)
    if "tests" in problem:  # one that no program fails is none
        problem["tests"] = [test for test in problem["tests"]
                            if not is_test(test) or can_fail(test)]
    carried = {name: fields[name] for name in CARRIED if fields.get(name) is not None}
    own = {"id": row_id(fields) or content_hash(problem, *CONTENT),
           "source": scalar(fields, "source") or source,
           "kind": scalar(fields, "kind") or problem["kind"]}
    return own | carried | problem | own


def unusable(problem):
    """Why a problem cannot be asked or judged, or None. ValueError where kind, answer and tests do
    not fit together, or a test has none of the three forms."""
    kind, needs = problem["kind"], "tests" if problem["kind"] == "code" else "answer"
    if kind not in ("math", "choice", "code"):
        raise ValueError(f"unknown kind {kind!r}: must be math, choice or code")
    if needs not in problem:
        raise ValueError(f"`kind` is {kind}, but there is no `{needs}`")
    if kind == "choice" and not re.fullmatch("[A-Z]?", problem["answer"]):
        raise ValueError(f"`answer` of a choice must be a letter, not {problem['answer']!r}")
    if kind == "code" and not all(map(is_test, problem["tests"])):
        raise ValueError("`tests` must be objects with `input` and `output`, `fn_name`, `args` and "
                         "`expected`, or `assert`")
    if not problem["prompt"].strip():
        return "without question"
    return None if problem[needs] else f"without {needs}"


def content_hash(problem, *names):
    text = json.dumps([problem.get(name) for name in names], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_id(row):
    return next(filter(None, (scalar(row, name) for name in ID_FIELDS)), "")


def scalar(row, name):
    """A field that is a string or a number, as stripped text; "" where it is missing or NaN."""
    value = row.get(name)
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"`{name}` must be a string or a number, not {type(value).__name__}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column with gaps makes 70 a 70.0
    return check_text(str(value), f"`{name}`").strip()


def parsed(row, name, kind):
    """A list or dict that may be written as JSON; an empty one where it is missing."""
    value = row.get(name)
    try:
        value = json.loads(value or "null") if isinstance(value, str) else value
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"`{name}` is broken JSON ({getattr(error, 'msg', error)})") from None
    except ValueError:  # an integer of more digits than Python reads: nothing to test with
        value = None
    if not isinstance(value, kind | None):
        raise ValueError(f"`{name}` must be a {kind.__name__}, not {type(value).__name__}")
    return value or kind()


def text_of(row, *names):
    """The first of these fields that the row has: a string."""
    name = next(name for name in names if name in row)
    return check_text(row[name], f"`{name}`")


def with_starter(row, name):
    question, starter = text_of(row, name), row.get("starter_code") or ""
    starter = check_text(starter, "`starter_code`").rstrip()
    return question.strip() + ("\n\n" + starter if starter else "")


def lettered(row, options):
    lines = (f"\n{letter}) {option}" for letter, option in zip(LETTERS, options))
    return text_of(row, "question").strip() + "".join(lines)


def own_problem(row):
    """Our own problems, samples and verified samples."""
    problem = {**row, "prompt": text_of(row, "prompt")}
    if "tests" in row:
        problem["tests"] = parsed(row, "tests", list)
    if "answer" in row:
        problem["answer"] = scalar(row, "answer")
    return problem | {"kind": "code" if problem.get("tests") or "answer" not in row else "math"}


def math_problem(row):
    """NuminaMath (huggingface.co/AI-MO; 1.5 writes `proof` or `notfound` where there is no answer),
    MATH (arXiv 2103.03874) and MATH-500, AIME 2024 and 2025, GSM8K (arXiv 2110.14168)."""
    answer = scalar(row, "answer")
    if "####" in answer:  # GSM8K's: the working, then #### 1,234
        answer = answer.rpartition("####")[2].strip().replace(",", "")
    solution = scalar(row, "solution")
    bare = re.findall(r"\\(?:boxed|fbox)\s*(-?\d(?:[\d.,]*\d)?)", solution)  # \boxed 5
    answer = answer or last_box(solution) or "".join(bare[-1:])
    return {"kind": "math", "prompt": text_of(row, "problem", "question").strip(),
            "answer": "" if answer in ("proof", "notfound") else answer}


def choice_problem(row):
    """MMLU (arXiv 2009.03300; answers are indices from 0), MMLU-Pro (arXiv 2406.01574; letters)."""
    name = "options" if "options" in row else "choices"
    options = [scalar({name: option}, name) for option in parsed(row, name, list)]
    answer, valid = scalar(row, "answer").strip("(). ").upper(), LETTERS[:len(options)]
    # an index; as text (.csv) only where it is no option's text too
    if answer.isdecimal() and not (isinstance(row["answer"], str) and answer in options):
        answer = valid[int(answer):int(answer) + 1] or answer
    if answer and (len(answer) > 1 or answer not in valid):
        raise ValueError(f"`answer` {row['answer']!r} names none of the {len(options)} options")
    return {"kind": "choice", "prompt": lettered(row, options), "answer": answer}


def gpqa_problem(row):
    """GPQA (arXiv 2311.12022) publishes the right answer first: here the id draws the order."""
    names = ["correct answer", *(f"incorrect answer {i}" for i in (1, 2, 3))]
    options = [scalar(row, name) for name in names]
    order = random.Random(row_id(row) or text_of(row, "question")).sample(range(4), 4)
    return {"kind": "choice", "answer": LETTERS[order.index(0)] if options[0] else "",
            "prompt": lettered(row, [options[i] for i in order])}


def apps_problem(row):
    """APPS (arXiv 2105.09938) and TACO (arXiv 2312.14852): tests by stdin, or by call where they
    name a function. Their evaluators (testing_util.py) take as right what equals a call's output or
    its first element, since Codewars' outputs are wrapped in a list and LeetCode's are not. Here
    they count as wrapped if all are lists of one, unless the function is declared to return a list.
    Tests that do not pair up, or whose arguments are no list, are none."""
    in_out = parsed(row, "input_output", dict)
    inputs, outputs = parsed(in_out, "inputs", list), parsed(in_out, "outputs", list)
    fn_name, prompt = in_out.get("fn_name"), with_starter(row, "question")
    if len(inputs) != len(outputs) or fn_name and not all(isinstance(i, list) for i in inputs):
        tests = []
    elif not fn_name:
        tests = [{"input": joined(i), "output": joined(o)} for i, o in zip(inputs, outputs)]
    else:
        returns_list = re.search(r"->\s*['\"]?(typing\.)?(Optional\[)?list\b", prompt, re.I)
        if not returns_list and all(isinstance(o, list) and len(o) == 1 for o in outputs):
            outputs = [o[0] for o in outputs]
        tests = [{"fn_name": fn_name, "args": i, "expected": o} for i, o in zip(inputs, outputs)]
    return {"kind": "code", "tests": tests, "prompt": prompt}


def joined(lines):
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(lines)


def livecodebench_problem(row):
    """LiveCodeBench (arXiv 2403.07974; lcb_runner/benchmarks/code_generation.py): public and
    private tests; the arguments of a call are JSON values, one a line."""
    fn_name, tests = parsed(row, "metadata", dict).get("func_name"), []
    for name in ("public_test_cases", "private_test_cases"):
        for test in parsed({name: unpacked(row[name], name)}, name, list):
            try:
                if test["testtype"] == "stdin":
                    tests.append({"input": test["input"], "output": test["output"]})
                else:
                    args = [json.loads(s) for s in test["input"].split("\n") if s.strip()]
                    tests.append({"fn_name": fn_name, "args": args,
                                  "expected": json.loads(test["output"])})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(f"`{name}` holds a broken test ({reason})") from None
    return {"kind": "code", "tests": tests, "prompt": with_starter(row, "question_content")}


class PlainUnpickler(pickle.Unpickler):
    """Strings, numbers, lists and dicts; a pickle that names a class or function could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def unpacked(value, name):
    """LiveCodeBench's private tests: JSON, pickled, deflated and in base64; JSON stays as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] in ("", "["):
        return value
    try:
        return PlainUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(value)))).load()
    except Exception as error:  # broken pickles raise nearly everything
        raise ValueError(f"`{name}` is neither JSON nor a packed text ({error})") from None


def humaneval_problem(row):
    """HumanEval (arXiv 2107.03374): a function to complete. Imports and helpers before it are the
    setup of the test, since an answer may leave them out."""
    prompt, name = text_of(row, "prompt"), text_of(row, "entry_point")
    start = re.search(rf"^def {re.escape(name)}\b", prompt, re.M)
    if not start:
        raise ValueError(f"`entry_point` {name!r} is not defined in `prompt`")
    test = {"assert": f"{text_of(row, 'test').rstrip()}\n\ncheck({name})\n",
            "setup": prompt[:start.start()]}
    return {"kind": "code", "tests": [test],
            "prompt": f"Complete the function `{name}` and return the whole of it:\n\n"
                      f"{prompt.strip()}\n"}


def mbpp_problem(row):
    """MBPP (arXiv 2108.07732), sanitized or not; its prompt shows the tests: only they name f."""
    asserts = [check_text(test, "`test_list`") for test in parsed(row, "test_list", list)]
    setup = "\n".join([*map(str, parsed(row, "test_imports", list)),
                       scalar(row, "test_setup_code")]).strip()
    question = text_of(row, "text", "prompt").strip()
    return {"kind": "code", "tests": [{"assert": test, "setup": setup} for test in asserts],
            "prompt": "\n".join([question, "Your code should pass these tests:", "", *asserts])}


LAYOUTS = (  # the fields, in small letters, by which a layout is told; the first that fits
    ({"prompt", "answer"}, own_problem), ({"prompt", "tests"}, own_problem),
    ({"prompt", "entry_point", "test"}, humaneval_problem),
    ({"text", "test_list"}, mbpp_problem), ({"prompt", "test_list"}, mbpp_problem),
    ({"question_content", "public_test_cases", "private_test_cases"}, livecodebench_problem),
    ({"question", *(f"incorrect answer {i}" for i in (1, 2, 3)), "correct answer"}, gpqa_problem),
    ({"question", "input_output"}, apps_problem),
    ({"question", "choices", "answer"}, choice_problem),
    ({"question", "options", "answer"}, choice_problem),
    ({"problem", "answer"}, math_problem), ({"problem", "solution"}, math_problem),
    ({"question", "answer"}, math_problem))


# ------------------------------------------------------------------- tokenised rows in a memory map

ROW = np.dtype([("start", "<i8"), ("file", "<i4"), ("line", "<i8"), ("digest", "<u8")])


@dataclass
class TokenizedRows:
    """Rows as token ids in a memory map; `counts` says where those went that are not in `kept`."""
    tokens: np.ndarray   # (all tokens,) uint32
    mask: np.ndarray     # (all tokens,) uint8: 1 where the token is a target
    rows: np.ndarray     # (rows,) ROW
    ends: np.ndarray     # (rows,) exclusive end of each, truncation included
    kept: np.ndarray     # indices of the rows trained on
    counts: dict
    files: list
    systems: list        # the system prompts (None: none) of all rows read; of several, two
    digest: str          # of content and settings

    def __len__(self):
        return len(self.kept)

    @functools.cached_property
    def lengths(self):
        """Tokens of each kept row."""
        return (self.ends - self.rows["start"])[self.kept]

    def __getitem__(self, i):
        """Kept row i: token ids and mask, both (T,)."""
        index = self.kept[i]
        span = slice(self.rows["start"][index], self.ends[index])
        return self.tokens[span].astype(np.int64), self.mask[span]

    @functools.cached_property
    def num_targets(self):
        """Targets of each kept row: its first token, nobody's target, is none by the mask."""
        starts = self.rows["start"]
        return np.array([int(self.mask[starts[i]:self.ends[i]].sum()) for i in self.kept])

    def where(self, i):
        row = self.rows[self.kept[i]]
        return f"{self.files[row['file']]}:{row['line']}"


def load_rows(names, tokenizer, max_seq_len, end_token=None, system="skyt1", as_published=False,
              cache=None, quiet=False):
    """Reads, tokenises and caches the rows of several --data names. Returns TokenizedRows.
    Duplicates and rows over max_seq_len are dropped, with as_published kept and truncated. Raises
    ValueError and FileNotFoundError that name file and line."""
    sources = [source for name in map(str, names)
               for source in ([name] if name.startswith("builtin:") else find_data(name))]
    settings = [CACHE_VERSION, end_token or tokenizer.end_token, system, tokenizer.template,
                tokenizer.bos_token, tokenizer.eos_token, tokenizer.backend.to_str()]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for source in sources:
        digest.update(content_digest(source))
    digest = digest.hexdigest()[:32]
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sky-t1"
    try:
        folder = Path(cache).expanduser() / digest
    except RuntimeError:
        raise ValueError(f"{cache}: there is no such home folder: set --cache") from None
    if not folder.exists():
        tokenize(sources, tokenizer, end_token, system, folder, quiet)
    try:
        rows = np.load(folder / "rows.npy")
        tokens = np.memmap(folder / "tokens.bin", np.uint32, "r")
        mask = np.memmap(folder / "mask.bin", np.uint8, "r")
        systems = json.loads((folder / "systems.json").read_text())
        if not len(tokens) == len(mask) == rows[-1]["start"]:
            raise ValueError("its files do not fit together")
    except (OSError, ValueError, EOFError, IndexError) as error:
        raise ValueError(f"the token cache {folder} is damaged ({error}): "
                         "remove that folder") from None
    rows = rows[:-1]  # the last entry is the end of all
    files = [str(s) for s in sources]
    return select(tokens, mask, rows, files, systems, digest, max_seq_len, as_published)


def select(tokens, mask, rows, files, systems, digest, max_seq_len, as_published):
    """Which rows are trained on, and what became of each of the others."""
    starts, ends = rows["start"], np.append(rows["start"][1:], len(tokens))
    duplicate = np.ones(len(rows), bool)
    duplicate[np.unique(rows["digest"], return_index=True)[1]] = False
    too_long = ends - starts > max_seq_len
    if as_published:
        ends = np.minimum(ends, starts + max_seq_len)
    no_target = np.array([not mask[a:b].any() for a, b in zip(starts, ends)])
    kept = ~no_target if as_published else ~(no_target | duplicate | too_long)
    if as_published:
        found = {"duplicates (kept)": duplicate, "truncated": too_long,
                 "without a target": no_target, "kept": kept}
    else:  # each dropped row is counted once
        found = {"duplicates": duplicate, "over max_seq_len": too_long & ~duplicate,
                 "without a target": no_target & ~too_long & ~duplicate, "kept": kept}
    counts = {"rows": len(rows)} | {name: int(which.sum()) for name, which in found.items()}
    if not counts["kept"]:
        raise ValueError(f"no row left to train on: {counts}. Raise --max_seq_len ({max_seq_len})?")
    return TokenizedRows(tokens, mask, rows, ends, np.flatnonzero(kept), counts, files, systems,
                         digest)


def load_input(args, weights=True):
    """What --model and --data name: the model's folder, configuration and tokenizer, the tokens of
    a packed row, the rows. Without weights only what describes the model is fetched."""
    model_dir = find_model(args.model, weights)
    config = Qwen2Config.from_pretrained(model_dir)
    tokenizer = load_tokenizer(model_dir)
    tokenizer.token_id(args.end_token or tokenizer.end_token)  # an error before all is tokenised
    max_seq_len = resolve_max_seq_len(args.max_seq_len, config, args.model)
    rows = rows_for_model(args.data, args, config, tokenizer, max_seq_len)
    return model_dir, config, tokenizer, max_seq_len, rows


def rows_for_model(names, args, config, tokenizer, max_seq_len):
    """load_rows by the flags; ValueError for token ids that the model does not have."""
    rows = load_rows(names, tokenizer, max_seq_len, args.end_token, args.system, args.as_published,
                     args.cache, quiet=int(os.environ.get("RANK", 0)) != 0)
    if rows.tokens.max() >= config.vocab_size:
        raise ValueError(f"{', '.join(names)}: token id {rows.tokens.max()} is beyond the model's "
                         f"vocabulary of {config.vocab_size}: is the tokenizer in {args.model} "
                         "this model's?")
    return rows


def resolve_max_seq_len(max_seq_len, config, model_name):
    """Tokens of a packed row: what was asked for, or the recipe's or the model's positions if
    fewer. ValueError if it is beyond the model's positions."""
    positions = config.max_position_embeddings
    if max_seq_len is None:
        return min(MAX_SEQ_LEN, positions)
    if max_seq_len > positions:
        raise ValueError(f"--max_seq_len {max_seq_len} is beyond the {positions} positions of "
                         f"{model_name}: lower it")
    return max_seq_len


def content_digest(source):
    if isinstance(source, Path):
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    digest = hashlib.sha256()
    for row, _ in builtin_rows(source):
        digest.update(json.dumps(row).encode())
    return digest.digest()


def tokenize(sources, tokenizer, end_token, system, folder, quiet):
    """Writes the files that load_rows reads of all sources, in a folder beside that is then
    renamed: a cache is whole or absent. Rows are handled some hundred at a time, so memory does not
    grow with the data; tokenizers uses all cores."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + "."))
    try:
        with (open(aside / "tokens.bin", "wb") as tokens, open(aside / "mask.bin", "wb") as masks,
              open(aside / "rows.npy", "wb") as index, open(aside / "systems.json", "w") as shared,
              tqdm(desc="tokenising", unit=" rows", disable=quiet or None) as bar):
            rows, systems, total = [], [], 0
            segmented = segmented_rows(sources, tokenizer, end_token, system)
            while batch := list(itertools.islice(segmented, 256)):
                encoded = iter(tokenizer.encode_batch([text for *_, segments in batch
                                                       for text, _ in segments]))
                for file, line, row_system, segments in batch:
                    if len(systems) < 2 and row_system not in systems:
                        systems.append(row_system)
                    pieces = [next(encoded) for _ in segments]
                    ids = np.concatenate([np.array(p, np.uint32) for p in pieces])
                    mask = np.repeat(np.array([is_target for _, is_target in segments], np.uint8),
                                     [len(p) for p in pieces])
                    tokens.write(ids)
                    masks.write(mask)
                    digest = hashlib.sha256(ids.tobytes() + mask.tobytes()).digest()[:8]
                    rows.append((total, file, line, int.from_bytes(digest, "little")))
                    total += len(ids)
                bar.update(len(batch))
            np.save(index, np.array(rows + [(total, -1, -1, 0)], ROW))
            json.dump(systems, shared)
            for file in (tokens, masks, index, shared):
                file.flush()
                os.fsync(file.fileno())
        os.rename(aside, folder)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:  # another process was first
            return
        if error.filename is not None:  # a source that cannot be opened
            raise
        reason = f"cannot write the token cache: {error.strerror}: free some disk, or set --cache"
        raise OSError(error.errno, reason, str(folder.parent)) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def segmented_rows(sources, tokenizer, end_token, system):
    """Yields (file number, line, system prompt or None, segments) of each row."""
    for file, source in enumerate(sources):
        read = read_rows if isinstance(source, Path) else builtin_rows
        for row, line in read(source):
            try:
                messages = to_messages(row, system)
                segments = conversation_segments(tokenizer, messages, end_token)
            except ValueError as error:
                raise ValueError(f"{source}:{line}: {error}") from None
            first = messages[0]
            yield file, line, first["content"] if first["role"] == "system" else None, segments


# ------------------------------------------------------------------------------------------ packing

def epoch_order(count, seed, epoch):
    """The order in which the rows of an epoch are seen: by seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_indices(count, batch_size, seed, step):
    """The examples of one optimizer step; the last batch of an epoch may be smaller."""
    epoch, position = divmod(step, -(-count // batch_size))
    return epoch_order(count, seed, epoch)[position * batch_size:(position + 1) * batch_size]


def pack(lengths, costs, max_seq_len, num_ranks):
    """The row of each document of a batch, (documents,): row r is for rank r % num_ranks in
    micro-step r // num_ranks; rows may stay empty. All ranks meet at every micro-step, so a batch
    takes as long as the sum of each micro-step's slowest row. There are as few micro-steps as
    best-fit packing allows; the longest documents are placed first; rows of like cost share a
    micro-step; then documents move or change places while that makes a slowest row faster."""
    lengths, costs = np.asarray(lengths), np.asarray(costs, float)
    assert lengths.max() <= max_seq_len, f"{lengths.max()} tokens in rows of {max_seq_len}"
    # where length is a gain, the cheapest row is the fullest: best fit
    tight = longest_first(lengths, -lengths, max_seq_len, len(lengths))
    num_rows = -(-(tight.max() + 1) // num_ranks) * num_ranks
    row_of = longest_first(lengths, costs, max_seq_len, num_rows)
    row_of = tight if row_of is None else row_of  # no slack: the tight packing is the start
    by_cost = np.argsort(-np.bincount(row_of, costs, num_rows), kind="stable")
    row_of = np.argsort(by_cost)[row_of]
    return local_search(row_of, lengths, costs, max_seq_len, num_rows, num_ranks)


def longest_first(lengths, costs, capacity, num_rows):
    """The row of each document if each in turn, the longest first, goes to the cheapest row with
    room; None where one finds none. That is the rule "longest processing time first" (R. L. Graham,
    1969): what comes late is short, and evens out what the long ones left uneven."""
    row_of = np.zeros(len(lengths), int)
    cost, room = np.zeros(num_rows), np.full(num_rows, capacity)
    for i in np.argsort(-lengths, kind="stable"):
        row = np.where(room >= lengths[i], cost, np.inf).argmin()
        if room[row] < lengths[i]:
            return None
        row_of[i] = row
        room[row] -= lengths[i]
        cost[row] += costs[i]
    return row_of


def local_search(row_of, lengths, costs, capacity, num_rows, num_ranks, tolerance=1.005,
                 rounds=200):
    """A better row_of: swaps a document of a micro-step's slowest row for one (or none) of another
    row, the best such swap each time, until all micro-steps are even or nothing helps."""
    num_documents, step_of = len(row_of), np.arange(num_rows) // num_ranks
    # what may come back: every document, and for every row "none", of no length and no cost
    lengths, costs = np.append(lengths, [0] * num_rows), np.append(costs, [0.0] * num_rows)
    row_of = np.append(row_of, np.arange(num_rows))
    for _ in range(rounds):
        improved = False
        for step in range(num_rows // num_ranks):
            row_cost = np.bincount(row_of, costs, num_rows)
            room = capacity - np.bincount(row_of, lengths, num_rows)
            by_step = row_cost.reshape(-1, num_ranks)  # (micro-steps, ranks)
            slowest = by_step.max(1)
            row = step * num_ranks + by_step[step].argmax()
            if slowest[step] <= tolerance * by_step[step].mean():
                continue
            mine = np.flatnonzero(row_of[:num_documents] == row)[:, None]  # (row's documents, 1)
            gain, growth = costs[mine] - costs, lengths[mine] - lengths  # (row's, candidates)
            after, other_after = slowest[step] - gain, row_cost[row_of] + gain
            here = step_of[row_of] == step
            worst = np.where(here, np.maximum(after, other_after), after)
            allowed = (row_of != row) & (growth <= room[row_of]) & (-growth <= room[row])
            allowed &= here | (other_after <= slowest[step_of[row_of]])
            worst = np.where(allowed, worst, np.inf)
            i, j = np.unravel_index(worst.argmin(), worst.shape)
            if worst[i, j] < slowest[step] * (1 - 1e-4):
                row_of[mine[i]] = row_of[j]
                if j < num_documents:
                    row_of[j] = row
                improved = True
        if not improved:
            break
    return row_of[:num_documents]


def imbalance(row_of, costs, num_ranks):
    """Time a packed batch takes over the time it would take evenly spread: 1 is perfect."""
    steps = row_of.max() // num_ranks + 1
    by_step = np.bincount(row_of, costs, steps * num_ranks).reshape(steps, num_ranks)
    return by_step.max(1).sum() * num_ranks / by_step.sum()


def packing(lengths, costs, batches, max_seq_len, num_ranks):
    """How batches (arrays of row numbers) are packed: mean number of micro-steps and imbalance, and
    what share of the packed rows they fill."""
    micro_steps, imbalances, tokens = [], [], 0
    for batch in batches:
        row_of = pack(lengths[batch], costs[batch], max_seq_len, num_ranks)
        micro_steps.append(row_of.max() // num_ranks + 1)
        imbalances.append(imbalance(row_of, costs[batch], num_ranks))
        tokens += lengths[batch].sum()
    room = sum(micro_steps) * num_ranks * max_seq_len
    return {"micro_steps": np.mean(micro_steps), "imbalance": np.mean(imbalances),
            "filled": tokens / room}


def assemble(rows, documents):
    """Documents (row numbers) of one packed row -> input_ids, targets (1, T) int64 arrays and the
    document lengths. Targets are shifted within each document. A row without documents is one token
    without a target: every rank must take part in every micro-step."""
    pieces = [rows[i] for i in documents] or [(np.zeros(1, np.int64), np.zeros(1))]
    ids = [tokens for tokens, _ in pieces]
    targets = [np.append(np.where(mask[1:] == 1, tokens[1:], IGNORE), IGNORE)
               for tokens, mask in pieces]
    return np.concatenate(ids)[None], np.concatenate(targets)[None], [len(i) for i in ids]


# ---------------------------------------------------------------------------------- decontamination

def normal_words(text):
    """A text's words without case, marks and LaTeX's backslashes."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())


def word_grams(words, size):
    return {" ".join(words[i:i + size]) for i in range(len(words) - size + 1)}


class Benchmark:
    """The word n-grams of the problems of an evaluation. A problem of fewer words is one gram of
    its own length; one of fewer than four is left out, as everything would hold it."""

    def __init__(self, names, size):
        self.problems_of, self.num_grams = {}, {}
        for problem in read_problems(names):
            words = normal_words(problem["prompt"])
            if len(words) < 4:
                continue
            name = f"{problem['source']} {problem['id']}"
            grams = word_grams(words, min(size, len(words)))
            self.num_grams[name] = len(grams)
            for gram in grams:
                self.problems_of.setdefault(gram, []).append(name)
        self.sizes = {gram.count(" ") + 1 for gram in self.problems_of}

    def overlap(self, text):
        """(largest share of a problem's grams that the text holds, that problem), or (0, None)."""
        words, found = normal_words(text), Counter()
        for size in self.sizes:
            for gram in word_grams(words, size) & self.problems_of.keys():
                found.update(self.problems_of[gram])
        return max(((count / self.num_grams[name], name) for name, count in found.items()),
                   default=(0, None))


def decontaminate(names, against, out, size, shown=5):
    """Copies training rows, or problems, whose questions share no n-gram with the benchmark's, and
    prints what was dropped, the worst first (the method of open-r1)."""
    if Path(out).is_dir() or Path(out).resolve() in [Path(n).resolve() for n in (*names, *against)]:
        raise ValueError(f"--out {out} is a folder or an input: name another file")
    benchmark, counts, worst = Benchmark(against, size), Counter(), []
    aside = Path(f"{out}.new")
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(aside, "w", encoding="utf-8") as file:
            for row, where, share, problem in compared(names, benchmark):
                counts["rows"] += 1
                if problem is None:
                    counts["kept"] += 1
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    continue
                counts[f"like {problem.split(' ')[0]}"] += 1
                worst = sorted([*worst, (share, where, problem)], reverse=True)[:shown]
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    print("  ".join(f"{name}: {count:,}" for name, count in counts.items()))
    for share, where, problem in worst:
        print(f"{share:6.1%} of the {size}-grams of {problem} are in {where}")


def compared(names, benchmark):
    """Yields each row, its place, and what Benchmark.overlap says of its question."""
    for path in itertools.chain.from_iterable(map(find_data, names)):
        for row, line in read_rows(path):
            try:
                share, problem = benchmark.overlap(question_of(row))
            except ValueError as error:
                raise ValueError(f"{path}:{line}: {error}") from None
            yield row, f"{path}:{line}", share, problem


def question_of(row):
    """The text that a row asks: the users' turns of a training row, a problem's prompt."""
    if isinstance(row.get("conversations"), list) or isinstance(row.get("messages"), list):
        return "\n".join(turn["content"] for turn in to_messages(row) if turn["role"] == "user")
    return to_problem(row, "")["prompt"]


# -------------------------------------------------------------------------------------- the command

def histogram(lengths, width=50, bins=12):
    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, bins + 1).astype(int))
    counts = np.histogram(lengths, edges)[0]
    for low, high, count in zip(edges, edges[1:], counts):
        yield f"{low:>7,} - {high - 1:>7,} {count:>7,} {'█' * -(-count * width // counts.max())}"


def coloured(tokenizer, tokens, mask, limit=400):
    """One row as text, targets in green, the rest grey; the middle of a long row is left out."""
    for span in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(mask)) + 1):
        text = tokenizer.decode(tokens[span].tolist())
        if len(text) > limit:
            hidden = f" ... {len(text) - limit:,} characters ... "
            text = text[:limit // 2] + hidden + text[-limit // 2:]
        yield f"\033[{32 if mask[span[0]] else 90}m{text}\033[0m"


def print_packing(rows, config, args, max_seq_len):
    """How the first batches of an epoch would be packed."""
    costs = config.train_flops(rows.lengths.astype(float))
    batches = [batch_indices(len(rows), args.batch_size, args.seed, step)
               for step in range(min(20, -(-len(rows) // args.batch_size)))]
    packed = packing(rows.lengths, costs, batches, max_seq_len, args.num_ranks)
    print(f"packing on {args.num_ranks} ranks ({len(batches)} batches of {args.batch_size}): "
          f"{packed['micro_steps']:.1f} micro-steps a batch, rows of {max_seq_len:,} filled "
          f"{packed['filled']:.1%} (no padding is computed), cost max/mean "
          f"{packed['imbalance']:.3f}")


def lock(file, name):
    """Holds the lock of an open file for as long as it is open, at most as this process lives.
    ValueError if another run has it (or had, and is just removing the file); a warning where the
    file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(file.fileno()).st_nlink:
            raise BlockingIOError
    except BlockingIOError:
        raise ValueError(f"{name} is being written by another run") from None
    except OSError as error:
        print(f"warning: {name} cannot be locked ({error.strerror}): let no other run write there",
              file=sys.stderr)


def cpu_multiplies_bf16():
    """Whether this CPU has instructions for products of bf16. oneDNN says so from AVX-512 on, where
    it merely converts without AVX512_BF16 or AMX; where it has no kernels, PyTorch converts number
    by number, which takes 4 to 16 times as long as float32."""
    if not torch.backends.mkldnn.is_available():
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
        torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported()
        or not torch.cpu._is_avx512_supported())


def own_device():
    """The GPU of this process, or the CPU where there is none. ValueError for too few GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if wanted > there:
        raise ValueError(f"{wanted} processes, but {there} GPUs here: lower --nproc_per_node, or "
                         "set CUDA_VISIBLE_DEVICES= to use the CPU")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def give_up(text):
    """Ends this process with status 2 and one line for all processes of its torchrun: most errors
    are either everyone's, or come of the end of another. The first to have one tells it."""
    for bar in list(tqdm._instances):
        bar.close()  # the error has a line of its own
    line, first = "error: " + " ".join(text.split()), True
    if dist.is_torchelastic_launched():
        # sent to all others as soon as one has ended, which may be before this one has spoken
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(RuntimeError):  # the store is gone with its torchrun
            store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=10)))
            first = store.add("errors", 1) == 1
        line = "\n" + line  # after another's bar
    if first:
        print(line, file=sys.stderr, flush=True)
    sys.exit(2)


def one_line_errors(main, when_out_of_memory="", how_to_go_on=""):
    """Runs a script's main and, if it goes well, waits for the other ranks. What a user can get
    wrong, a full GPU and the end of another rank are one line on stderr and exit status 2."""
    try:
        main()
        if dist.is_initialized():
            dist.barrier()
    except KeyboardInterrupt:
        sys.exit(130)
    except torch.OutOfMemoryError:
        give_up(f"out of GPU memory: {when_out_of_memory}")
    except (ValueError, OSError) as error:
        of_file = getattr(error, "filename", None)
        give_up(f"{of_file}: {error.strerror}" if of_file else str(error))
    except dist.DistError as error:
        give_up(str(error))
    except RuntimeError as error:  # gloo's, as long as the other ranks were there before
        if not re.search("by peer|Broken pipe|Socket closed", str(error)):
            raise
        give_up(f"another process died: {how_to_go_on}")


def run(main, *advice):
    """one_line_errors as a whole script. A process of a group ends at once: a normal exit ends the
    interpreter while the group's threads may still want it, which now and then aborts a run that
    succeeded."""
    status = 0
    try:
        one_line_errors(main, *advice)
    except SystemExit as ended:
        status = ended.code or 0
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def main():
    """Prints counts, lengths, packing and one row of the data that the flags name."""
    parser = ArgumentParser(description="Shows what train.py will see of some data, or with\n"
                                        "--decontaminate drops what evaluations ask.")
    add = parser.add
    add("data", "files, hub data sets or builtin:...", nargs="*", type="path")
    add("--decontaminate", "rows to copy to --out, but those that share words with a problem of "
        "--against", nargs="+", type="path")
    add("--against", "problems that must not be trained on", nargs="+", type="path")
    add("--ngram", "words in a row that are shared", type="count", default=8)
    add("--out", "the file of --decontaminate", type="path")
    add("--model", "folder, hub name or builtin:tiny: tokenizer and context length", type="path")
    add("--max_seq_len", f"tokens of a packed row ({MAX_SEQ_LEN}, or the model's positions if "
        "fewer)", type="count")
    add("--batch_size", "examples of one optimizer step", type="count", default=96)
    add("--num_ranks", "GPUs to plan the packing for", type="count", default=8)
    add("--seed", "of the order", type="seed", default=42)
    add("--end_token", "end of an assistant's turn, instead of the template's")
    add("--system", "system prompt of kept samples: skyt1, qwq, none, or a text", default="skyt1")
    add("--as_published", "keep duplicates, truncate long rows", action="store_true")
    add("--cache", "folder of the token cache (default: ~/.cache/sky-t1)", type="path")
    add("--row", "the kept row to show", type=int, default=0)
    args = parser.parse_args()
    if args.decontaminate:
        if not args.against or not args.out:
            raise ValueError("--decontaminate wants --against and --out")
        decontaminate(args.decontaminate, args.against, args.out, args.ngram)
        return
    if not args.data or not args.model:
        raise ValueError("name the data, and the --model whose tokenizer reads it")
    _, config, tokenizer, max_seq_len, rows = load_input(args, weights=False)
    if not 0 <= args.row < len(rows):
        raise ValueError(f"--row {args.row}: the rows kept are 0 to {len(rows) - 1}")
    print("  ".join(f"{name}: {count:,}" for name, count in rows.counts.items()))
    lengths = rows.lengths
    print(f"tokens: {lengths.sum():,}, targets {rows.num_targets.sum() / lengths.sum():.1%}; "
          f"mean {lengths.mean():,.0f}, median {np.median(lengths):,.0f}, "
          f"longest {lengths.max():,}")
    print("\n".join(histogram(lengths)))
    print_packing(rows, config, args, max_seq_len)
    print(f"\nrow {args.row} ({rows.where(args.row)}), targets in green:")
    print("".join(coloured(tokenizer, *rows[args.row])))


if __name__ == "__main__":
    one_line_errors(main)
