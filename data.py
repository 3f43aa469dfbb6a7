"""From published rows to packed batches: tokenizer, chat template, rows and problems, token cache,
packing, decontamination, built-in tasks.

    python data.py FILE --model DIR     # rows: counts, lengths, packing, one with its targets
    python data.py FILE                 # problems: how many of each sort, one as it is asked
    python data.py --decontaminate FILE --against BENCHMARK --out CLEAN     # drops what it asks

A training row is ShareGPT (`system`, `conversations` of from/value), `messages` of role/content, or
a kept sample (a problem's fields and `response`). Rows come from .json, .jsonl (also .gz), .csv and
.parquet files, from data sets on the Hugging Face hub, and from `builtin:...`; --split and --where
choose among them. So do problems, whose published layouts are told apart by their fields. Loss is
taken on what the assistant says and on its end token, found by position: several tokenizers pad
with their end token, and a mask made by token id would teach a model never to stop. A turn with
`loss` false or null, `weight` 0 or `train` false, and an empty one, is context and no target.

Sources: the formats and prompts of NovaSky's Sky-T1 (github.com/NovaSky-AI/SkyThought); the chat
template of Qwen2.5-Instruct. Limits: text turns only (tools, reasoning apart from the answer and
images are refused by name); .parquet needs pyarrow.
"""
import base64
import contextlib
import csv
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
from tokenizers import ByteLevelBPETokenizer, Tokenizer as Backend, pre_tokenizers
from tqdm import tqdm

from model import IGNORE, Qwen2Config, atomic_write, sync

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
# Of a turn; the first is the default. None, elsewhere an absent field, says of a loss that none is
# taken.
LOSS = {"loss": (True, False, None), "weight": (1, 0), "train": (True, False)}
MAX_SEQ_LEN = 16384  # the recipe's
# Part of the cache's key: raise it when what the cached files mean or a built-in row changes.
CACHE_VERSION = 5


# ---------------------------------------------------------------------- tokenizer and chat template

# A folder's files that belong to its tokenizer; the first is the only one needed.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                   "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json")


class Tokenizer:
    """tokenizer.json, and its folder's end token, pad token and chat template (None: Qwen2.5's).
    `files` are the TOKENIZER_FILES that there are, by name, as bytes."""

    def __init__(self, files):
        self.files = files
        self.config = json.loads(files.get("tokenizer_config.json", b"{}"))
        self.backend = Backend.from_buffer(files["tokenizer.json"])
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = self.backend.get_vocab_size()
        self.bos_token, self.eos_token = self.special("bos_token"), self.special("eos_token")
        self.pad_token_id = self.backend.token_to_id(self.special("pad_token"))
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {t["name"]: t["template"] for t in template}.get("default")
        if "chat_template.jinja" in files:
            template = files["chat_template.jinja"].decode()
        self.template = template

    def special(self, name):
        """A token of the configuration, "" where it has none."""
        token = self.config.get(name) or ""
        return token["content"] if isinstance(token, dict) else token

    def render(self, messages, add_generation_prompt=False):
        """The text of a conversation by this folder's chat template."""
        return render_chat(messages, add_generation_prompt, self.template,
                           bos_token=self.bos_token, eos_token=self.eos_token)

    def encode(self, text):
        """Token ids of a text; special tokens written in it are recognised, none is added."""
        return self.backend.encode(check_text(text, "the text"), add_special_tokens=False).ids

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
            raise ValueError("the model's chat template does not know add_generation_prompt, so "
                             "where an answer starts cannot be told: mend it")
        text = self.render([question, {"role": "assistant", "content": "ANSWER"}])
        return text.rpartition("ANSWER")[2].strip() or self.eos_token

    def save(self, folder, system=None):
        """Writes the files as they were read. A `system` prompt becomes the default system turn of
        the chat template (Qwen2.5's if it has none)."""
        files = dict(self.files)
        if system is not None:
            template = with_default_system(self.template or CHATML, system)
            config = self.config | {"chat_template": template}
            files["tokenizer_config.json"] = json.dumps(config, indent=2).encode()
            # programs differ in which of two templates they take: leave one
            files.pop("chat_template.jinja", None)
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)


def load_tokenizer(model_dir):
    """The tokenizer of a folder; `builtin:tiny` is bytes. Raises FileNotFoundError or ValueError
    that name the file."""
    if model_dir == "builtin:tiny":
        return builtin_tokenizer()
    paths = [Path(model_dir) / name for name in TOKENIZER_FILES]
    if not paths[0].is_file():
        raise FileNotFoundError(f"{paths[0]} does not exist: copy the tokenizer of the model that "
                                "the weights come from")
    files = {path.name: path.read_bytes() for path in paths if path.is_file()}
    try:
        return Tokenizer(files)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{paths[0]} or tokenizer_config.json is broken ({error}): download both "
                         "again") from None


def builtin_tokenizer():
    """256 bytes and three of Qwen's special tokens; the recipe's tags and prompts are a token each,
    so that a tiny model reads problems. Its chat template adds no system turn of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable letter for each byte
    backend = ByteLevelBPETokenizer(dict(zip(alphabet, range(256))), merges=[])
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    problem, *_ = last_digit(random.Random(), 2)
    choice_prompt = recipe_prompt(problem).removesuffix(problem["prompt"])
    backend.add_tokens([*TAGS, MATH_PROMPT, CALL_PROMPT, choice_prompt])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
              "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False,
              "chat_template": CHATML}
    return Tokenizer({"tokenizer.json": backend.to_str(pretty=True).encode(),
                      "tokenizer_config.json": json.dumps(config, indent=2).encode()})


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


@functools.cache
def compiled_template(template):
    # a template comes with a model, and is as little trusted
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise ValueError(message)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def render_chat(messages, add_generation_prompt=False, template=None, **tokens):
    """The text of a conversation by a template (jinja2 source, in which `tokens` such as bos_token
    are known), by default Qwen2.5-Instruct's with its default system turn. ValueError for messages
    or a template that cannot be rendered."""
    if template is None:
        template = with_default_system(CHATML, QWEN_DEFAULT_SYSTEM)
        if not messages or {m["role"] for m in messages} - {"system", "user", "assistant"}:
            raise ValueError("a conversation is of messages of system, user and assistant")
    try:
        return compiled_template(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **tokens)
    except Exception as error:  # a template is a program: whatever it raises
        raise ValueError(f"the chat template fails on these messages: {error}") from None


def conversation_segments(tokenizer, messages, end_token=None):
    """A conversation as (text, is_target) pieces that are tokenised one by one. A cut lies exactly
    where generation will start, so that the tokens learnt are those that a prompt is continued
    with, even if an answer begins with a newline. `end_token` replaces the template's behind each
    answer; if it is another one, the text ends there. Answers without loss are as rendered."""
    rendered_end = tokenizer.end_token
    end_token = end_token or rendered_end
    segments, done = [], ""
    for k, message in enumerate(messages):
        if message["role"] != "assistant" or not message.get("loss", True):
            continue
        prompt = tokenizer.render(messages[:k], add_generation_prompt=True)
        answer = message["content"]
        if not prompt.startswith(done):
            raise ValueError("the chat template changes earlier turns: only rows with one answer "
                             "can be trained on")
        if prompt.endswith("<think>\n"):  # R1's template opens the thought itself
            answer = answer.removeprefix("<think>\n")
        segments += [(prompt[len(done):], False), (answer, True), (end_token, True)]
        done = prompt + answer + rendered_end
    text = tokenizer.render(messages)
    # what follows the last target: Qwen's newline, and answers without loss; an open question is
    # left out, and after another end token nothing comes
    ends_alike = text.startswith(done) and end_token == rendered_end
    if not segments or ends_alike and messages[-1]["role"] == "assistant":
        segments.append((text[len(done):], False))
    return segments


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


# ------------------------------------------------------------------------------ finding data files

DATA_SUFFIX = re.compile(r"\.(jsonl?(\.gz)?|csv|parquet)$", re.I)
# What the library `datasets` lays beside the rows of a data set.
NO_ROWS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Evaluation:
    """A benchmark's hub data set, the split of it that is asked, and how it is sampled: at the
    recipe's temperature, small sets several times, as one answer to each of 30 is noise."""
    hub: str
    split: str
    n: int = 1
    temperature: float = 0.0


EVALUATIONS = {
    "math500": Evaluation("HuggingFaceH4/MATH-500", "test"),
    "aime24": Evaluation("HuggingFaceH4/aime_2024", "train", 8, 0.7),
    "aime25": Evaluation("math-ai/aime25", "test", 8, 0.7),
    "amc23": Evaluation("AI-MO/aimo-validation-amc", "train", 4, 0.7),  # those of 2022 too
    "olympiadbench": Evaluation("Hothan/OlympiadBench", "OE_TO_maths_en_COMP"),
    "minerva": Evaluation("svc-huggingface/minerva-math", "test"),
    "gsm8k": Evaluation("openai/gsm8k", "main/test"),
    "gpqa_diamond": Evaluation("Idavidrein/gpqa", "gpqa_diamond", 4, 0.7),
    "mmlu_pro": Evaluation("TIGER-Lab/MMLU-Pro", "test"),
    "arc_challenge": Evaluation("allenai/ai2_arc", "ARC-Challenge/test"),
    # the problems up to May 2024, version 2
    "livecodebench": Evaluation("livecodebench/code_generation_lite", "test,test2"),
    "humaneval": Evaluation("openai/openai_humaneval", "test"),
    "mbpp": Evaluation("google-research-datasets/mbpp", "full/test"),
}


def find_evaluation(name):
    """The Evaluation that a name (`aime24`, `dir/gsm8k`) means, or None; openai/gsm8k is a hub data
    set unless there is a folder openai."""
    return EVALUATIONS.get(Path(name).name) if Path(name).parent.is_dir() else None


def print0(text):
    """A line on stderr, of several processes from the first alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


@functools.cache
def print_once(text):
    print0(text)


def is_hub_name(name):
    """Whether it has the form owner/name, and does not look like a path."""
    is_path = name.startswith((".", "/", "builtin:")) or DATA_SUFFIX.search(name)
    return not is_path and name.count("/") == 1


def fetch(name, repo_type, patterns):
    """The folder of a hub repository, its files of these patterns fetched once (HF_HUB_OFFLINE uses
    the cache alone). Raises FileNotFoundError; a name that looks like a path never asks the hub."""
    if not is_hub_name(name):
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
    if name == "builtin:tiny" or Path(name).exists():
        return name
    return fetch(name, "model", ["*.json", "*.jinja", "*.txt"] + ["*.safetensors"] * weights)


def read_generation_config(model_dir):
    """A folder's generation_config.json, {} where there is none, and the end tokens it names."""
    path = Path(model_dir) / "generation_config.json"
    try:
        generation = json.loads(path.read_text()) if path.is_file() else {}
        ends = generation.get("eos_token_id") or []
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is broken ({error}): download it again, or remove it") from None
    return generation, ends if isinstance(ends, list) else [ends]


def find_data(name, split=None):
    """The data files of one --data or --problems argument: a file; those of a folder's or hub data
    set's split (all, where the default, train, is none); a benchmark of EVALUATIONS (`aime24`,
    `dir/gsm8k`): the file beside that is named so, or its split. Says which files it takes. Raises
    FileNotFoundError, or ValueError for a split that is not there."""
    name, path = str(name), Path(name)
    if path.is_file():
        return [path]
    if evaluation := find_evaluation(name):
        if beside := named_like(path):
            return beside
        split = split or evaluation.split
        if path.parent != Path() and not path.exists():
            raise FileNotFoundError(f"{path.parent} holds no file of {path.name} (such as "
                                    f"{path.name}.jsonl)")
        name = name if path.exists() else evaluation.hub
    folder = Path(name)
    is_on_hub = not folder.exists()
    files = hub_files(name) if is_on_hub else files_below(folder)
    if files is None:  # the hub cannot be asked: what was fetched before may not be all
        files = files_below(fetch(name, "dataset", ["*.json*", "*.csv", "*.parquet"]))
        split = split or "train"
    files = of_split(files, name, split, is_on_hub)
    if not files:
        raise FileNotFoundError(f"{name} holds no data file (.json, .jsonl, .csv, .parquet)")
    if is_on_hub:
        folder = fetch(name, "dataset", files)
    more = f" and {len(files) - 8} more" if len(files) > 8 else ""
    print_once(f"{name}: {', '.join(files[:8])}{more}")
    return [folder / file for file in files]


def named_like(path):
    """The file beside the path whose name means this benchmark, as MATH-500.jsonl or
    aime_2024_test.jsonl do, or []. ValueError for several."""
    wanted = re.sub("(2[0-9])$", r"(20)?\1", path.name.replace("_", "")) + "(math)?(test)?"
    found = [file for file in sorted(path.parent.glob("*")) if is_data(file) and re.fullmatch(
        wanted, re.sub("[^a-z0-9]", "", DATA_SUFFIX.sub("", file.name).lower()))]
    if len(found) > 1:
        raise ValueError(f"{path} may be {' or '.join(map(str, found))}: name the file")
    return found


def is_data(path):
    """Whether a file of this name holds rows."""
    return DATA_SUFFIX.search(path.name) and path.name not in NO_ROWS


def files_below(folder):
    """The data files of a folder and the folders in it, as paths in it; hidden ones are left out,
    links followed."""
    return sorted(path.relative_to(folder).as_posix() for path in walk(folder, ()))


def walk(folder, above):
    """Yields the data files; `above` are the folders that a link may lead back into."""
    above = {*above, folder.resolve()}
    for path in folder.glob("[!.]*"):
        if path.is_dir() and path.resolve() not in above:
            yield from walk(path, above)
        elif path.is_file() and is_data(path):
            yield path


def hub_files(name):
    """The data files of a hub data set; None where the hub cannot be asked: fetch tells why."""
    from huggingface_hub import HfApi
    try:
        files = HfApi().dataset_info(name).siblings if is_hub_name(name) else None
    except Exception:
        files = None
    return files and sorted(f.rfilename for f in files if is_data(Path(f.rfilename)))


def of_split(files, data_set, split, is_on_hub):
    """Those of a data set's files that are of a split, several of them ("test,test2") or of a part
    of the set ("main/test"); by default of train or, if there is no such split, all. Files are of a
    split by their path or, where none is, by a word in it. ValueError for a split that is not
    there, and for files of several sets: gsm8k has main/test and socratic/test."""
    found = []
    for name in (split or "train").lower().split(","):
        exact = [file for file in files if f"/{name}/" in f"/{set_name(file)}/".lower()]
        word = rf"(?<![a-z]){re.escape(name)}(?![a-z])"
        of_name = exact or [file for file in files if re.search(word, file.lower())]
        if split and files and not of_name:
            raise ValueError(f"{data_set} has no split {name}: its files are "
                             f"{', '.join(files[:20])}")
        found += one_set(of_name, data_set)
    found = found or (one_set(files, data_set) if is_on_hub else files)
    for file in found:
        if file.lower().endswith(".parquet"):
            import_parquet(data_set)  # an error before anything is fetched
    return found


PART = r"\d+(-of-\d+)?(-[0-9a-f]{8,})?$"  # the end of train-00000-of-00002-8ea4cd0fa0ec7c75


def set_name(file):
    """A data file's path without suffix and number of its part."""
    stem = DATA_SUFFIX.sub("", file)
    return re.sub(r"[-_.]?" + PART, "", stem) if "-of-" in stem else stem


def one_set(files, data_set):
    """The files, if only the numbers of their parts tell them apart; ValueError otherwise, also
    where the parts are of 2 and of 3: these are two exports."""
    sets = {re.sub(PART, r"\1", DATA_SUFFIX.sub("", file)): file for file in files}
    if len(sets) > 1:
        first, *_, last = map(set_name, sets.values())
        raise ValueError(f"{data_set} holds several sets, such as {first} and {last}: choose one "
                         f"with --split {first}, or name the files")
    return files


def import_parquet(name):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{name}: reading parquet needs pyarrow (pip install pyarrow), or convert "
                         "it once with: python -c \"import pandas; pandas.read_parquet('FILE')"
                         ".to_json('rows.jsonl', orient='records', lines=True)\"") from None
    return pyarrow.parquet


# ------------------------------------------------------------------------------------- reading rows

def read_rows(source):
    """Yields (row, line number) of a .json, .jsonl, .csv or .parquet file, or of a built-in data
    set; rows of .parquet and built-in ones are counted from 1. ValueError that names file and line
    for what is not UTF-8, not JSON, or not an object; and for an empty file."""
    suffix, line = Path(source).suffix.lower(), None
    reader = {".csv": csv_rows, ".parquet": parquet_rows}.get(suffix, json_rows)
    if str(source).startswith("builtin:"):
        reader = builtin_rows
    for row, line in reader(source):
        if not isinstance(row, dict):
            raise ValueError(f"{source}:{line}: a row must be an object, this one is a "
                             f"{type(row).__name__}")
        yield row, line
    if line is None:
        raise ValueError(f"{source} holds no rows")


# Before the first row of an array, which may be all of an object ({"data": [...]}); between two
# rows; and behind the last.
ARRAY = r'\s*(\{\s*"(data|rows|examples|train|test|problems)"\s*:\s*)?\['
NEXT, END = r"\s*,", r"\s*\]\s*\}?\s*"


def json_rows(path):
    """One object a line, or an array of objects: neither is ever whole in memory."""
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
        try:
            start = file.peek(256).decode("utf-8-sig", "ignore")
            may_wrap = ".jsonl" not in path.name.lower()
            if start.lstrip()[:1] == "[" or may_wrap and re.match(ARRAY, start):
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


def array_rows(path, file, block=2 ** 17):
    """Rows of an array in a text file, from a window of it that grows until it holds the next."""
    window, at, line, before = "", 0, 1, ARRAY
    more = True
    while more:
        try:
            more = file.read(block)
        except UnicodeDecodeError as error:
            raise broken(path, line + window.count("\n", at), error) from None
        window, at = window[at:] + more, 0
        while match := re.compile(before + r"\s*(?=[^\s\]])").match(window, at):
            start = line + window.count("\n", at, match.end())
            try:
                row, end = json.JSONDecoder().raw_decode(window, match.end())
            except (ValueError, RecursionError) as error:
                if more and isinstance(error, json.JSONDecodeError):
                    break  # perhaps the row goes on in the next block
                raise broken(path, start, error) from None
            yield row, start
            line = start + window.count("\n", match.end(), end)
            at, before = end, NEXT
    rest = window[at:]
    if not re.fullmatch(END if before == NEXT else ARRAY + END, rest):
        line += re.match(r"[\s,\]]*", rest)[0].count("\n")
        raise broken(path, line, "neither a next row nor the end of the array: is it cut off?")


def broken(path, line, error, form="JSON"):
    """The ValueError for a file that cannot be read at a line; `error` may be the bare reason."""
    if isinstance(error, UnicodeDecodeError):
        line += error.object[:error.start].count(b"\n")
        return ValueError(f"{path}:{line}: not UTF-8 (byte {error.object[error.start]:#x}): save "
                          "the file as UTF-8")
    reason = getattr(error, "msg", error)
    reason = "nested too deep" if isinstance(error, RecursionError) else reason
    return ValueError(f"{path}:{line}: broken {form} ({reason})")


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
    """Rows as a .json file would have them: dates and bytes are text, and the None with which a
    table fills turns and tests, so that all have all fields, is not there."""
    parquet, number = import_parquet(path), 0

    def without_none(fields):
        return {name: value for name, value in fields.items() if value is not None}
    try:
        for batch in parquet.ParquetFile(path).iter_batches(256):
            for number, row in enumerate(batch.to_pylist(), number + 1):
                nested = json.loads(json.dumps(row, default=str), object_hook=without_none)
                yield dict.fromkeys(row) | nested, number
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({error})") from None


def find_sources(names, split=None):
    """What --data or --problems name: paths of files, and names of built-in data."""
    return [source for name in map(str, names)
            for source in ([name] if name.startswith("builtin:") else find_data(name, split))]


def selected_rows(sources, where, counts):
    """Yields (row, source, line) of the rows whose fields have, as text, one of the values of each
    "FIELD=VALUE[,VALUE]" of --where. Counts the rows, and those left out. ValueError, after the
    last, if none is left: it lists the values that there are."""
    wanted = [text.partition("=")[::2] for text in where]
    if not all("=" in text for text in where):
        raise ValueError(f"--where {' '.join(where)}: write each as FIELD=VALUE[,VALUE]")
    counts.update({"rows": 0, "left out by --where": 0} if where else {"rows": 0})
    found = Counter()  # of (field, its value)
    for source in sources:
        for row, line in read_rows(source):
            counts["rows"] += 1
            found.update((field, as_text(row.get(field))[:60]) for field, _ in wanted)
            if all(row.get(field) is not None and as_text(row[field]) in values.split(",")
                   for field, values in wanted):
                yield row, source, line
            else:
                counts["left out by --where"] += 1
    if counts["rows"] == counts["left out by --where"]:
        there = ", ".join(f"{field}={text} ({count:,})"
                          for (field, text), count in found.most_common(20))
        raise ValueError(f"--where {' '.join(where)} leaves no row: there are {there}; the fields "
                         f"of a row are {', '.join(map(str, row))}")


def as_text(value):
    """A field as text: 70.0, which a column with gaps makes of 70, is 70, and what is no string is
    as JSON writes it."""
    if value is None:
        return "absent"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def recipe_prompt(problem):
    """The recipe's user turn of a problem, by its kind; ValueError for another or broken tests."""
    question = problem["prompt"]
    match problem.get("kind"), problem.get("tests"):
        case None, _:
            return question
        case "math", _:
            return MATH_PROMPT + question
        case "choice", _:  # the recipe's prompt names four letters; MMLU-Pro has up to ten
            letters = sorted(set(re.findall(r"^([A-Z])\) ", question, re.M)))
            *letters, last = letters if len(letters) > 1 else "ABCD"
            named = f"{', '.join(letters)}, or {last}"
            return CHOICE_PROMPT.replace("A, B, C, or D", named) + question
        case "code", [{"input": _}, *_]:
            return STDIN_PROMPT + question
        case "code", [{}, *_] | [] | None:
            return CALL_PROMPT + question
        case "code", _:
            raise ValueError("`tests` must be a list of objects")
        case kind, _:
            raise ValueError(f"unknown kind {kind!r}: must be math, choice or code")


def is_training_row(row):
    """Whether a row has an answer to learn: a conversation, a kept sample, or one of STILL-2."""
    match row:
        case ({"conversations": list()} | {"messages": list()} | {"combined_text": str()}
              | {"prompt": str(), "response": str()}):
            return True
    return False


def to_messages(row, system="skyt1"):
    """A training row as messages. `system` (a name of SYSTEM_PROMPTS, "none", or a text) goes
    before kept samples, which carry none. Turns without loss say `loss` false. Raises ValueError
    that names the field."""
    refuse_unsupported(row)
    prompt = row.get("system")
    match row:
        case {"conversations": list(turns)}:
            turns = [turn_of(turn, "from", "value") for turn in turns]
        case {"messages": list(turns)}:
            turns = [turn_of(turn, "role", "content") for turn in turns]
        case {"prompt": str(), "response": str(), "passed": False}:
            raise ValueError("a sample that did not pass: train on the file of `verify.py --keep`")
        case ({"prompt": str(question), "response": str(answer)}
              | {"question": str(question), "combined_text": str(answer)}):  # arXiv 2412.09413
            asked = recipe_prompt(row | {"prompt": question})
            turns = [{"role": "user", "content": check_text(asked, "`prompt`")},
                     {"role": "assistant", "content": check_text(answer, "`response`")}]
            prompt = None if system == "none" else SYSTEM_PROMPTS.get(system, system)
        case _:
            raise ValueError(f"not a training row (fields: {', '.join(map(str, row)) or 'none'}): "
                             "it needs `conversations`, `messages`, or `prompt` and `response`")
    if prompt:
        turns.insert(0, turn_of({"role": "system", "content": prompt}, "role", "content"))
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise ValueError("no assistant turn, so nothing to learn from")
    if "user" not in roles[:roles.index("assistant")]:
        raise ValueError("no user turn before the first assistant turn")
    for turn in turns:
        if turn["role"] == "assistant" and not turn["content"].strip():
            turn["loss"] = False  # it would teach to end the turn at once
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
    """Whether none of the fields LOSS that a turn has says that it is no target. ValueError for
    another value, or where a loss is asked of another role than the assistant."""
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

# Three families whose answer is hard to say at once and easy to work out, as functions that return
# a problem, its bare answer and the steps to it.
CHOICES = "ABCDEFGHIJ"


def addition(rng, size):
    """The sum of two numbers of `size` digits, digit by digit with the carry."""
    a, b = (rng.randrange(10 ** (size - 1), 10 ** size) for _ in range(2))
    steps, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b))):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    problem = {"kind": "math", "prompt": f"{a}+{b}=?", "answer": str(a + b)}
    return problem, f"\\boxed{{{a + b}}}", steps


def last_digit(rng, size):
    """The last digit of a sum of `size` + 1 digits, by its letter."""
    digits = [rng.randrange(1, 10) for _ in range(size + 1)]
    steps, last = [], digits[0]
    for digit in digits[1:]:
        steps.append(f"{last}+{digit}={last + digit}")
        last = (last + digit) % 10
    options = "".join(f"\n{letter}) {n}" for n, letter in enumerate(CHOICES))
    question = f"Last digit of {'+'.join(map(str, digits))}?{options}"
    problem = {"kind": "choice", "prompt": question, "answer": CHOICES[last]}
    return problem, f"\\boxed{{{CHOICES[last]}}}", steps


def multiply_out(rng, size):
    """A function of x as one product and one sum, from `size` + 1 operations on x."""
    a, b, operations, steps = 1, 0, "", []
    while len(steps) <= size:
        sign, n = rng.choice("++*"), rng.randrange(1, 10)
        if sign == "*":
            a, b, n = 2 * a, 2 * b, 2
        else:
            b += n
        if b >= 40:  # small tables to learn: begin again
            return multiply_out(rng, size)
        operations += f" {sign}{n}"
        steps.append(f"{sign}{n}: {a}*x+{b}")
    tests = [{"fn_name": "f", "args": [x], "expected": a * x + b} for x in (0, 1, 7)]
    problem = {"kind": "code", "prompt": f"f(x), from left to right: x{operations}", "tests": tests}
    return problem, f"```python\ndef f(x):\n    return {a}*x+{b}\n```", steps


FAMILIES = (addition, last_digit, multiply_out)


def builtin_problems(split, count):
    """Different problems of the three families in turn, with a worked `solution` and the `bare`
    one. The splits heldout and harder share no prompt with others. The longest problems are all of
    `harder`, and one in eight of the others (more in large splits, where short ones run out)."""
    rng = random.Random(f"{split} 0")  # README's figures are of these problems
    seen = set()
    while len(seen) < count:
        family = FAMILIES[len(seen) % 3]
        longest = split == "harder" or rng.random() < 1 / 8
        problem, bare, steps = family(rng, 4 if longest else rng.choice((2, 3)))
        prompt = problem["prompt"]
        held_out = zlib.crc32(prompt.encode()) % 16 == 0
        if prompt in seen or held_out != (split in ("heldout", "harder")):
            continue
        seen.add(prompt)
        yield {"id": prompt, "source": family.__name__, **problem, "bare": bare,
               "solution": "\n".join([*steps, "", bare])}


BUILTIN_COUNTS = {"worked": 30_000, "bare": 30_000, "train": 500, "heldout": 500, "harder": 500}


def builtin_rows(name):
    """(row, number) of builtin:KIND[:COUNT]. `worked` and `bare` are training rows, with all steps
    or the answer alone, half of each family asked with the recipe's instruction, half without, as
    one types in a chat; `train`, `heldout` and `harder` are problems."""
    _, kind, count, *_ = f"{name}::".split(":")
    if kind not in BUILTIN_COUNTS or not (count or "0").isdecimal():
        raise ValueError(f"{name}: the built-in data are builtin:KIND or builtin:KIND:COUNT, "
                         f"KIND one of {', '.join(BUILTIN_COUNTS)}")
    split = "rows" if kind in ("worked", "bare") else kind
    problems = builtin_problems(split, int(count or BUILTIN_COUNTS[kind]))
    for number, problem in enumerate(problems, 1):
        if split == kind:
            yield problem, number
            continue
        question = recipe_prompt(problem) if number % 2 else problem["prompt"]
        answer = problem["solution" if kind == "worked" else "bare"]
        yield {"messages": [{"role": "user", "content": question},
                            {"role": "assistant", "content": answer}]}, number


# --------------------------------------------------------------------------------- reading problems

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ID_FIELDS = ("id", "unique_id", "question_id", "record id", "task_id", "problem_id", "uuid")
CONTENT = ("kind", "prompt", "answer", "tests")
CARRIED = ("subject", "level", "difficulty", "contest_date")  # to score by; kept where a row has it


def read_problems(names, counts=None, split=None, where=()):
    """Yields the problems of files, folders, hub data sets, EVALUATIONS, and `builtin:train`,
    `builtin:heldout` and `builtin:harder` (:COUNT), see find_data and selected_rows, as dicts of
    `id`, `source`, `kind`, `prompt`, and `answer` or `tests`; samples keep their further fields.
    Duplicates and problems without question, answer or tests are dropped and counted, in the
    Counter `counts` or else on stderr. Raises ValueError that names file, line and field, also for
    two problems of one source and id."""
    silent, counts, seen = counts is not None, Counter() if counts is None else counts, {}
    for problem, place, reason in converted_problems(names, counts, split, where):
        key = content_hash(problem, "source", "id", "sample")
        content = content_hash(problem, *CONTENT, "response")
        if reason is None and key in seen:
            first, first_place = seen[key]
            if first != content:
                raise ValueError(f"{place}: `id` {problem['id']!r} of source {problem['source']!r} "
                                 f"is taken by another problem ({first_place}): rename one of them")
            reason = "duplicates"
        counts[reason or "kept"] += 1
        if reason is None:
            seen[key] = content, place
            yield problem
    summary = summary_of(counts)
    if not seen:
        raise ValueError(f"{', '.join(map(str, names))}: no problem left ({summary})")
    if not silent and (where or counts["rows"] > counts["kept"]):
        print0(summary)


def summary_of(counts):
    kept_last = sorted(counts.items(), key=lambda item: item[0] == "kept")
    return "  ".join(f"{name}: {count:,}" for name, count in kept_last)


def converted_problems(names, counts, split=None, where=()):
    """Yields (problem, its place, why it cannot be asked or judged or None). A row that names no
    source has the benchmark, the hub data set, or its file's name."""
    source_of = {}
    for name in map(str, names):
        benchmark = Path(name).name if find_evaluation(name) else None
        for file in find_sources([name], split):
            stem = set_name(Path(file).name)
            source_of[file] = benchmark or (stem if Path(name).exists() else name)
    for row, file, line in selected_rows(source_of, where, counts):
        source = source_of[file]
        if source == "livecodebench" and row.get("difficulty"):
            source += f"_{row['difficulty']}"
        try:
            problem = to_problem(row, source, source_of[file] in EVALUATIONS)
            reason = "with images" if has_images(row) else unusable(problem)
        except ValueError as error:
            raise ValueError(f"{file}:{line}: {error}") from None
        yield problem, f"{file}:{line}", reason


def to_problem(row, source, is_benchmark=False):
    """A published row as a problem, its layout told by its fields. `source` is that of a row that
    names none, and of every row of a benchmark. What is missing is empty, see `unusable`; what is
    broken is a ValueError that names the field."""
    fields = {str(name).lower(): value for name, value in row.items()}
    needed = next((names for names in LAYOUTS if fields.keys() >= set(names.split(", "))), None)
    if needed is None:
        raise ValueError(f"not a problem (fields: {', '.join(map(str, row)) or 'none'}): it needs "
                         "`prompt` with `answer` or `tests`, or a data set's (LAYOUTS in data.py); "
                         "training rows are shown with --model")
    fields["id"] = next(filter(None, (scalar(fields, name) for name in ID_FIELDS)), "")
    question = needed.partition(", ")[0]
    check_text(fields[question], f"`{question}`")
    problem = LAYOUTS[needed](fields)
    if "answer" in problem:
        problem["answer"] = scalar(problem, "answer")
    tests = parsed(problem, "tests")
    default = "code" if tests or "answer" not in problem else "math"
    problem["kind"] = scalar(fields | problem, "kind") or default
    if "tests" in problem:  # one that no program fails is none
        problem["tests"] = [test for test in tests if not is_test(test) or can_fail(test)]
    own = {
        "id": fields["id"] or content_hash(problem, *CONTENT),
        "source": source if is_benchmark else scalar(fields, "source") or source,
        "kind": problem["kind"],
    }
    carried = {name: fields[name] for name in CARRIED if fields.get(name) is not None}
    return own | carried | problem | own  # first for the order, last for the values


def has_images(row):
    """Whether a row comes with pictures: a field `image`, `images`, `image_1`, `figure` or the like
    holds something. TACO's `picture_num` is a count, and no such field."""
    # nothing is None, NaN, "", [], [None], False and 0, and each of them as text
    return any(re.fullmatch(r"(image|img|picture|figure)s?(_?\d+)?", str(name), re.I)
               and not re.fullmatch(r"(\W|none|null|nan|false|0)*", str(value), re.I)
               for name, value in row.items())


def unusable(problem):
    """Why a problem cannot be asked or judged, or None. ValueError where kind, answer and tests do
    not fit together, or a test has none of the three forms."""
    kind = problem["kind"]
    needs = {"math": "answer", "choice": "answer", "code": "tests"}.get(kind)
    if needs not in problem:
        raise ValueError(f"`kind` is {kind!r}: must be math or choice and come with `answer`, or "
                         "code and come with `tests`")
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


def scalar(row, name):
    """A field that is a string or a number, as stripped text; "" where it is missing or NaN."""
    value = row.get(name)
    if value is None or value != value:
        return ""
    if type(value) not in (str, int, float):
        raise ValueError(f"`{name}` must be a string or a number, not {type(value).__name__}")
    return check_text(as_text(value), f"`{name}`").strip()


def parsed(row, name, kind=list):
    """A list or dict that may be written as JSON; an empty one where it is missing."""
    value = row.get(name)
    try:
        if isinstance(value, str):
            value = json.loads(value or "null")
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"`{name}` is broken JSON ({error})") from None
    except ValueError:  # TACO has integers of more digits than Python reads: such tests are none
        value = None
    if not isinstance(value, kind | None):
        raise ValueError(f"`{name}` must be a {kind.__name__}, not {type(value).__name__}")
    return value or kind()


def scalars(row, name):
    return [scalar({name: value}, name) for value in parsed(row, name)]


def math_problem(row):
    """NuminaMath (huggingface.co/AI-MO; 1.5 writes `proof` or `notfound` where there is no answer),
    MATH (arXiv 2103.03874) and MATH-500, Minerva's problems (arXiv 2206.14858), AIME 2024 and 2025,
    AMC (AI-MO/aimo-validation-amc; 142.0), GSM8K (arXiv 2110.14168)."""
    answer = scalar(row, "answer").removesuffix(".0")
    if "####" in answer:  # GSM8K's: the working, then #### 1,234
        answer = answer.rpartition("####")[2].strip().replace(",", "")
    if not answer:
        bare = r"\\(?:boxed|fbox)\s*(-?\d(?:[\d.,]*\d)?)"  # MATH has \boxed 5 too
        answer = last_box(re.sub(bare, r"\\boxed{\1}", scalar(row, "solution")))
    if answer in ("proof", "notfound", None):
        answer = ""
    return {"prompt": scalar(row, "problem") or scalar(row, "question"), "answer": answer}


def olympiad_problem(row):
    """OlympiadBench (arXiv 2402.14008): a list of answers in dollars, without their `unit`; none
    for a proof. Problems that share a text have it in `context`."""
    answer = re.sub(r"(?<!\\)\$", "", ", ".join(scalars(row, "final_answer")))
    prompt = f"{scalar(row, 'context')}\n\n{scalar(row, 'question')}".strip()
    return {"prompt": prompt, "answer": answer}


def lettered(row, options, labels, answer):
    """A choice of options, here A, B, ..., that the row calls by labels of its own; `answer` is the
    label of the right one."""
    prompt, letters = scalar(row, "question"), {}
    for option, label, letter in zip(options, labels, LETTERS):
        prompt += f"\n{letter}) {option}"
        letters[label] = letter
    letters[""] = ""  # no answer
    if answer not in letters:
        raise ValueError(f"the answer {answer!r} names none of the {len(options)} options")
    return {"kind": "choice", "prompt": prompt, "answer": letters[answer]}


def choice_problem(row):
    """MMLU (arXiv 2009.03300; answers are indices from 0), MMLU-Pro (arXiv 2406.01574; letters)."""
    options = scalars(row, "options" if "options" in row else "choices")
    answer = scalar(row, "answer").strip("(). ").upper()
    # an index; as text (.csv) only where it is no option's text too
    is_index = answer.isdecimal() and not (isinstance(row["answer"], str) and answer in options)
    labels = map(str, range(26)) if is_index else LETTERS
    return lettered(row, options, labels, answer)


def arc_problem(row):
    """ARC (arXiv 1803.05457); its labels are A, B, ... or 1, 2, ..."""
    choices = parsed(row, "choices", dict)
    options, labels = scalars(choices, "text"), scalars(choices, "label")
    return lettered(row, options, labels, scalar(row, "answerkey"))


def gpqa_problem(row):
    """GPQA (arXiv 2311.12022) publishes the right answer first: here the id draws the order."""
    options = [scalar(row, name) for name in GPQA.split(", ")]
    drawn = random.Random(row["id"] or row["question"]).sample(options, 4)
    return lettered(row, drawn, drawn, options[0])


def apps_problem(row):
    """APPS (arXiv 2105.09938) and TACO (arXiv 2312.14852): tests by stdin, or by call where they
    name a function. Their evaluators (testing_util.py) take as right what equals a call's output or
    its first element, since Codewars' outputs are wrapped in a list and LeetCode's are not. Here
    they count as wrapped if all are lists of one, unless the function is declared to return a list.
    Tests that do not pair up, or whose arguments are no list, are none."""
    prompt = f"{scalar(row, 'question')}\n\n{scalar(row, 'starter_code')}".strip()
    in_out = parsed(row, "input_output", dict)
    inputs = parsed(in_out, "inputs")
    outputs = parsed(in_out, "outputs")
    if len(inputs) != len(outputs):
        inputs = []
    if fn_name := in_out.get("fn_name"):
        returns_list = re.search(r"->\s*['\"]?(typing\.)?(Optional\[)?list\b", prompt, re.I)
        if not returns_list and all(isinstance(o, list) and len(o) == 1 for o in outputs):
            outputs = [o[0] for o in outputs]
        tests = [{"fn_name": fn_name, "args": i, "expected": o}
                 for i, o in zip(inputs, outputs) if isinstance(i, list)]
    else:
        tests = [{"input": joined(i), "output": joined(o)} for i, o in zip(inputs, outputs)]
    return {"prompt": prompt, "tests": tests}


def joined(lines):
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(lines)


class PlainUnpickler(pickle.Unpickler):
    """Strings, numbers, lists and dicts; a pickle that names a class or function could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def livecodebench_problem(row):
    """LiveCodeBench (arXiv 2403.07974; lcb_runner/benchmarks/code_generation.py): public and
    private tests, JSON or that pickled, deflated and in base64; the arguments of a call are JSON
    values, one a line."""
    prompt = f"{scalar(row, 'question_content')}\n\n{scalar(row, 'starter_code')}".strip()
    fn_name = parsed(row, "metadata", dict).get("func_name")
    tests = []
    for name in ("public_test_cases", "private_test_cases"):
        try:
            if str(row[name]).startswith("e"):  # zlib's first byte in base64; JSON starts with [
                deflated = base64.b64decode(row[name])
                row[name] = PlainUnpickler(io.BytesIO(zlib.decompress(deflated))).load()
            for test in parsed(row, name):
                if test["testtype"] == "stdin":
                    tests.append({"input": test["input"], "output": test["output"]})
                else:
                    lines = filter(str.strip, test["input"].split("\n"))
                    tests.append({
                        "fn_name": fn_name,
                        "args": list(map(json.loads, lines)),
                        "expected": json.loads(test["output"])})
        except Exception as error:  # broken pickles raise nearly everything
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"`{name}` holds broken tests ({reason})") from None
    return {"prompt": prompt, "tests": tests}


def humaneval_problem(row):
    """HumanEval (arXiv 2107.03374): a function to complete. Imports and helpers before it are the
    setup of the test, since an answer may leave them out."""
    name = scalar(row, "entry_point")
    setup, defined, _ = row["prompt"].partition(f"def {name}(")
    if not defined:
        raise ValueError(f"`entry_point` {name!r} is not defined in `prompt`")
    test = check_text(row["test"], "`test`").rstrip()
    return {"prompt": f"Complete the function `{name}` and return the whole of it:\n\n"
                      f"{row['prompt'].strip()}\n",
            "tests": [{"assert": f"{test}\n\ncheck({name})\n", "setup": setup}]}


def mbpp_problem(row):
    """MBPP (arXiv 2108.07732), sanitized or not; its prompt shows the tests: only they name f."""
    asserts = scalars(row, "test_list")
    setup = "\n".join(scalars(row, "test_imports")) or scalar(row, "test_setup_code")
    question = scalar(row, "text") or scalar(row, "prompt")
    shown = "\n".join(asserts)
    return {"prompt": f"{question}\nYour code should pass these tests:\n\n{shown}",
            "tests": [{"assert": test, "setup": setup} for test in asserts]}


GPQA = "correct answer, incorrect answer 1, incorrect answer 2, incorrect answer 3"
# By the fields, in small letters, that tell a layout, the question first; the first that fits.
LAYOUTS = {
    "prompt, answer": dict,  # our own problems, samples and verified samples, whole
    "prompt, tests": dict,
    "prompt, entry_point, test": humaneval_problem,
    "text, test_list": mbpp_problem,
    "prompt, test_list": mbpp_problem,
    "question_content, public_test_cases, private_test_cases": livecodebench_problem,
    f"question, {GPQA}": gpqa_problem,
    "question, input_output": apps_problem,
    "question, choices, answerkey": arc_problem,
    "question, choices, answer": choice_problem,
    "question, options, answer": choice_problem,
    "problem, answer": math_problem,
    "problem, solution": math_problem,
    "question, answer": math_problem,
    "question, final_answer": olympiad_problem,
}


# ------------------------------------------------------------------- tokenised rows in a memory map

ROW = np.dtype([("start", "<i8"), ("end", "<i8"), ("file", "<i4"), ("line", "<i8"),
                ("digest", "<u8")])


@dataclass
class TokenizedRows:
    """Rows of tokens in a memory map; `counts` says what became of the others."""
    tokens: np.ndarray       # (all tokens,) uint32: twice the id, plus 1 for a target
    index: np.ndarray        # (rows,) ROW: of those trained on
    num_targets: np.ndarray  # (rows,); the first token never is one: nothing predicts it
    counts: dict
    files: list              # sources, by the number in `index`
    systems: list            # the system prompts (None: none) of all rows read; of several, two
    digest: str              # of content and settings

    def __len__(self):
        return len(self.index)

    @property
    def lengths(self):
        """Tokens of each row."""
        return self.index["end"] - self.index["start"]

    def __getitem__(self, i):
        """Row i: token ids and mask, both (T,)."""
        row = self.tokens[self.index["start"][i]:self.index["end"][i]].astype(np.int64)
        return row >> 1, row & 1

    def where(self, i):
        return f"{self.files[self.index['file'][i]]}:{self.index['line'][i]}"


def load_rows(names, tokenizer, max_seq_len, end_token=None, system="skyt1", as_published=False,
              cache=None, quiet=False, split=None, where=()):
    """Reads, tokenises and caches the rows of several --data names, see find_data and
    selected_rows. Returns TokenizedRows. Duplicates and rows over max_seq_len are dropped, with
    as_published kept and truncated. Raises ValueError and FileNotFoundError that name file and
    line."""
    sources = find_sources(names, split)
    settings = [CACHE_VERSION, end_token, system, list(where), tokenizer.files]
    digest = digest_of(settings, sources)

    def write(folder):
        tokenize(sources, where, tokenizer, end_token, system, folder, quiet)
        if digest_of(settings, sources) != digest:
            raise ValueError(f"{', '.join(map(str, names))} changed while it was read: try again")
    cache = Path(cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sky-t1")
    try:
        folder = cache.expanduser() / digest
    except RuntimeError:
        raise ValueError(f"{cache}: there is no such home folder: set --cache") from None
    try:
        index, tokens, counts, systems = in_cache(folder, write)
    except OSError as error:
        if error.filename in map(str, sources):
            raise
        reason = error.strerror or error
        reason = f"the token cache cannot be used: {reason}: free some disk, or set --cache"
        raise OSError(error.errno, reason, str(cache)) from None
    index, num_targets, selected = select(index, tokens, max_seq_len, as_published)
    return TokenizedRows(tokens, index, num_targets, counts | selected, sources, systems, digest)


def digest_of(settings, sources):
    """A name for settings and the bytes of files: others have another."""
    digest = hashlib.sha256(repr(settings).encode())
    for source in sources:
        if isinstance(source, Path):
            digest.update(source.suffix.lower().encode())  # how the bytes are read
            with open(source, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        else:
            digest.update(source.encode())
    return digest.hexdigest()[:32]


def in_cache(folder, write):
    """What `write` puts into a folder of the cache. One process does it, in a folder beside that is
    renamed in the end and holds a lock, which ends with the process; others wait, and take what is
    there then. A damaged folder is made anew, and what killed runs have left is removed."""
    aside = folder.with_name(folder.name + ".new")
    while (cached := opened(folder)) is None:
        aside.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(aside / "lock", "w")
        except FileNotFoundError:  # another process has just renamed, or removed it
            continue
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.fstat(lock.fileno()).st_nlink:  # its process has given up and removed it
                continue
            try:
                if opened(folder) is None:
                    if folder.exists():
                        print(f"the token cache {folder} is damaged: it is made anew",
                              file=sys.stderr)
                        shutil.rmtree(folder)
                    remove_left(folder.parent)
                    write(aside)
                    os.rename(aside, folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return cached


def opened(folder):
    """Index, tokens, counts and systems of a cache folder; None where it is damaged, or absent."""
    index, tokens = folder / "index.npy", folder / "tokens.bin"
    try:
        checksum, *facts = json.loads((folder / "facts.json").read_text())
        is_whole = checksum == digest_of(facts, [tokens, index])
    except (OSError, ValueError, TypeError):  # the last two: not such JSON
        return None
    return (np.load(index), np.memmap(tokens, np.uint32, "r"), *facts) if is_whole else None


def remove_left(cache):
    """Removes the unfinished folders whose lock nobody holds."""
    for folder in cache.glob("*"):
        if re.fullmatch(r"[0-9a-f]{32}\..+", folder.name):
            with contextlib.suppress(OSError), open(folder / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


def select(index, tokens, max_seq_len, as_published):
    """The rows to train on, the targets of each, and how many are dropped (with as_published:
    truncated, in `index` itself) and why."""
    duplicate = np.ones(len(index), bool)
    duplicate[np.unique(index["digest"], return_index=True)[1]] = False
    too_long = index["end"] - index["start"] > max_seq_len
    counts, unwanted = {}, {"duplicates": duplicate, "over max_seq_len": too_long}
    if as_published:
        counts = {"duplicates (kept)": int(duplicate.sum()), "truncated": int(too_long.sum())}
        unwanted = {}
        index["end"] = np.minimum(index["end"], index["start"] + max_seq_len)
    num_targets = np.array([int((tokens[start:end] & 1).sum())
                            for start, end in zip(index["start"], index["end"])])
    unwanted["without a target"] = num_targets == 0
    kept = np.ones(len(index), bool)
    for reason, rows in unwanted.items():
        counts[reason] = int((kept & rows).sum())
        kept &= ~rows
    counts["kept"] = int(kept.sum())
    if not counts["kept"]:
        raise ValueError(f"no row left to train on: {counts}. Raise --max_seq_len ({max_seq_len})?")
    return index[kept], num_targets[kept], counts


def load_input(args, weights=True):
    """What --model and --data name: the model's folder, configuration and tokenizer, the tokens of
    a packed row, the rows. Without weights only what describes the model is fetched."""
    model_dir = find_model(args.model, weights)
    config = Qwen2Config.from_pretrained(model_dir)
    tokenizer = load_tokenizer(model_dir)
    tokenizer.token_id(args.end_token or tokenizer.end_token)  # an error before all is tokenised
    positions = config.max_position_embeddings
    max_seq_len = args.max_seq_len or min(MAX_SEQ_LEN, positions)
    if max_seq_len > positions:
        raise ValueError(f"--max_seq_len {max_seq_len} is beyond the {positions} positions of "
                         f"{args.model}: lower it")
    rows = rows_for_model(args.data, args, config, tokenizer, max_seq_len, args.split, args.where)
    return model_dir, config, tokenizer, max_seq_len, rows


def rows_for_model(names, args, config, tokenizer, max_seq_len, split=None, where=()):
    """load_rows by the flags; ValueError for token ids that the model does not have."""
    rows = load_rows(names, tokenizer, max_seq_len, args.end_token, args.system, args.as_published,
                     args.cache, split=split, where=where)
    largest = rows.tokens.max() >> 1
    if largest >= config.vocab_size:
        raise ValueError(f"{', '.join(map(str, names))}: token id {largest} is beyond the model's "
                         f"vocabulary of {config.vocab_size}: is the tokenizer in {args.model} "
                         "this model's?")
    return rows


def tokenize(sources, where, tokenizer, end_token, system, folder, quiet):
    """Writes the files that `opened` reads, row by row: only the index is kept in memory."""
    counts, index, systems, end = Counter(), [], [], 0
    rows = segmented_rows(sources, where, counts, tokenizer, end_token, system)
    with (open(folder / "tokens.bin", "wb") as file,
          tqdm(desc="tokenising", unit=" rows", disable=quiet or None) as bar):
        for source, line, row_system, tokens in encoded(rows, tokenizer):
            file.write(tokens)
            start, end = end, end + len(tokens)
            digest = hashlib.sha256(tokens).digest()[:8]
            index.append((start, end, sources.index(source), line,
                          int.from_bytes(digest, "little")))
            if len(systems) < 2 and row_system not in systems:
                systems.append(row_system)
            bar.update()
    np.save(folder / "index.npy", np.array(index, ROW))
    facts = [dict(counts), systems]
    checksum = digest_of(facts, [folder / "tokens.bin", folder / "index.npy"])
    (folder / "facts.json").write_text(json.dumps([checksum, *facts]))
    for path in folder.iterdir():
        sync(path)


def segmented_rows(sources, where, counts, tokenizer, end_token, system):
    """Yields (source, line, system prompt or None, segments) of each row."""
    for row, source, line in selected_rows(sources, where, counts):
        try:
            messages = to_messages(row, system)
            segments = conversation_segments(tokenizer, messages, end_token)
        except ValueError as error:
            raise ValueError(f"{source}:{line}: {error}") from None
        first = messages[0]
        yield source, line, first["content"] if first["role"] == "system" else None, segments


def encoded(rows, tokenizer):
    """segmented_rows with tokens, as TokenizedRows has them, in place of the segments; some hundred
    rows at a time, as tokenizers uses all cores."""
    while batch := list(itertools.islice(rows, 256)):
        texts = [text for *_, segments in batch for text, _ in segments]
        pieces = iter(tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False))
        for *place, segments in batch:
            yield *place, np.concatenate([2 * np.array(next(pieces).ids, np.uint32) + is_target
                                          for _, is_target in segments])


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
    best-fit packing allows; LPT spreads the documents over their rows, local search evens out each
    micro-step, and in the end rows of like cost share one."""
    lengths, costs = np.asarray(lengths), np.asarray(costs, float)
    assert lengths.max() <= max_seq_len, f"{lengths.max()} tokens in rows of {max_seq_len}"
    # where length is a gain, the cheapest row is the fullest: best fit
    best_fit = lpt(lengths, -lengths, max_seq_len, len(lengths))
    num_rows = -(-(best_fit.max() + 1) // num_ranks) * num_ranks
    row_of = lpt(lengths, costs, max_seq_len, num_rows)
    if row_of is None:  # no slack
        row_of = best_fit
    row_of = local_search(row_of, lengths, costs, max_seq_len, num_rows, num_ranks)
    by_cost = np.argsort(-np.bincount(row_of, costs, num_rows), kind="stable")
    return np.argsort(by_cost)[row_of]


def lpt(lengths, costs, capacity, num_rows):
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


def local_search(row_of, lengths, costs, capacity, num_rows, num_ranks):
    """A better row_of: in one micro-step after the other, a document of the slowest row changes
    places with one (or none) of another row, as long as that row gets faster and the other not as
    slow as its own micro-step's slowest. The best swap leaves both the furthest below these."""
    num_documents = len(row_of)
    # what may come back: every document, and for every row "none", of no length and no cost
    lengths, costs = np.append(lengths, [0] * num_rows), np.append(costs, [0.0] * num_rows)
    row_of = np.append(row_of, np.arange(num_rows))
    step = 0
    while step < num_rows // num_ranks:
        room = capacity - np.bincount(row_of, lengths)
        by_step = np.bincount(row_of, costs).reshape(-1, num_ranks)  # (micro-steps, ranks)
        slack = (by_step.max(1, keepdims=True) - by_step).ravel()  # below the step's slowest
        row = step * num_ranks + by_step[step].argmax()
        mine = np.flatnonzero(row_of == row)[:, None]  # (row's documents, 1)
        gain, growth = costs[mine] - costs, lengths[mine] - lengths  # (row's, candidates)
        fits = (growth <= room[row_of]) & (-growth <= room[row])
        below = np.where(fits, np.minimum(gain, slack[row_of] - gain), 0)
        i, j = np.unravel_index(below.argmax(), below.shape)
        if below[i, j] > 1e-4 * by_step.mean():
            row_of[mine[i]], row_of[j] = row_of[j], row
            row_of[num_documents:] = np.arange(num_rows)  # a "none" stays in its row
        else:
            step += 1
    return row_of[:num_documents]


def imbalance(row_of, costs, num_ranks):
    """Time a packed batch takes over the time it would take evenly spread: 1 is perfect."""
    num_steps = row_of.max() // num_ranks + 1
    by_step = np.bincount(row_of, costs, num_steps * num_ranks).reshape(-1, num_ranks)
    return by_step.max(1).mean() / by_step.mean()


def packing(lengths, costs, batches, max_seq_len, num_ranks):
    """How batches (arrays of row numbers) are packed: mean number of micro-steps and imbalance, and
    what share of the packed rows they fill."""
    packed = []
    for batch in batches:
        row_of = pack(lengths[batch], costs[batch], max_seq_len, num_ranks)
        packed.append((row_of.max() // num_ranks + 1, imbalance(row_of, costs[batch], num_ranks),
                       lengths[batch].sum()))
    micro_steps, uneven, tokens = np.mean(packed, axis=0)
    return {"micro_steps": micro_steps, "imbalance": uneven,
            "filled": tokens / (micro_steps * num_ranks * max_seq_len)}


def assemble(rows, documents):
    """Documents (row numbers) of one packed row -> input_ids, targets (1, T) int64 arrays and the
    document lengths. A row without documents is one token without a target: every rank must take
    part in every micro-step."""
    pieces = [rows[i] for i in documents] or [np.zeros((2, 1), int)]
    ids, mask = map(np.concatenate, zip(*pieces))
    # no document's first token is a target, so the last one before it gets none
    targets = np.roll(np.where(mask, ids, IGNORE), -1)
    return ids[None], targets[None], [len(mask) for _, mask in pieces]


# ---------------------------------------------------------------------------------- decontamination

# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese. A character of
# theirs counts as a word.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
WORD = re.compile(rf"(?=\w)[{UNSPACED}]|[^\W_{UNSPACED}]+")


def normal_words(text):
    """A question's words without case, marks, LaTeX's backslashes and the recipe's prompts."""
    for prompt in (MATH_PROMPT, CHOICE_PROMPT, STDIN_PROMPT, CALL_PROMPT):
        text = text.removeprefix(prompt)
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


def word_grams(words, size):
    return {" ".join(words[i:i + size]) for i in range(len(words) - size + 1)}


class Benchmark:
    """The word n-grams of all questions of evaluations. One of fewer words is a single gram; fewer
    than four, which many a text holds, must be all that is asked: ^ and $ stand for its ends."""

    def __init__(self, names, size):
        self.problems_of, self.num_grams, self.num_wordless = {}, {}, 0
        for problem, *_ in converted_problems(names, Counter()):
            words = normal_words(problem["prompt"])
            if not words:
                self.num_wordless += 1
                continue
            name = problem["source"], problem["id"]
            grams = word_grams(words, min(size, len(words)))
            if len(words) < 4:
                grams = {" ".join(["^", *words, "$"])}
            self.num_grams[name] = len(grams)
            for gram in grams:
                self.problems_of.setdefault(gram, []).append(name)
        self.sizes = {gram.count(" ") + 1 for gram in self.problems_of}

    def overlap(self, text):
        """(largest share of a problem's grams that the text holds, the problem's source and id), or
        (0, None)."""
        words, found = ["^", *normal_words(text), "$"], Counter()
        for size in self.sizes:
            for gram in word_grams(words, size) & self.problems_of.keys():
                found.update(self.problems_of[gram])
        return max(((count / self.num_grams[name], name) for name, count in found.items()),
                   default=(0, None))


def decontaminate(names, against, out, size, split=None, where=()):
    """Copies training rows, or problems, whose questions share no n-gram with the benchmarks', and
    prints what was dropped, the worst first (the method of open-r1)."""
    sources = find_sources(names, split)
    inputs = {Path(source).resolve() for source in (*sources, *find_sources(against))}
    out = Path(out)
    if out.is_dir() or {out.resolve(), Path(f"{out}.tmp").resolve()} & inputs:
        raise ValueError(f"--out {out} is a folder or an input: name another file")
    benchmark = Benchmark(against, size)
    counts, worst = Counter(rows=0, kept=0), []

    def kept_lines():
        for row, source, line in selected_rows(sources, where, counts):
            try:
                share, problem = benchmark.overlap(question_of(row))
                text = check_text(json.dumps(row, ensure_ascii=False) + "\n", "the row")
            except ValueError as error:
                raise ValueError(f"{source}:{line}: {error}") from None
            if problem is None:
                counts["kept"] += 1
                yield text.encode()
            else:
                counts[f"like {problem[0]}"] += 1
                worst.append((share, f"{source}:{line}", problem))
                worst.sort(reverse=True)
                del worst[5:]
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, kept_lines())
    print(summary_of(counts))
    for share, place, problem in worst:
        print(f"{share:6.1%} of the {size}-grams of {' '.join(problem)} are in {place}")
    print(f"compared with {len(benchmark.num_grams):,} questions; {benchmark.num_wordless:,} could "
          "not be compared: they have no words")


def question_of(row):
    """The text that a row asks: the users' turns of a training row, a problem's question."""
    match row:
        case {"conversations": list()} | {"messages": list()} | {"combined_text": str()}:
            return "\n".join(turn["content"] for turn in to_messages(row)
                             if turn["role"] == "user")
        case {"prompt": str(prompt)}:
            return check_text(prompt, "`prompt`")
    return to_problem(row, "")["prompt"]


# ---------------------------------------------------------------------------------------- processes

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
    return (torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            and (torch.cpu._is_avx512_bf16_supported()
                 or torch.cpu._is_amx_tile_supported()
                 or not torch.cpu._is_avx512_supported()))


def own_device():
    """The GPU of this process (torchrun sets LOCAL_RANK and LOCAL_WORLD_SIZE), or the CPU where
    there is none. ValueError for too few GPUs."""
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
    except (ValueError, OSError, dist.DistError) as error:
        of_file = getattr(error, "filename", None)
        give_up(f"{of_file}: {error.strerror}" if of_file else str(error))
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


# -------------------------------------------------------------------------------------- the command

def histogram(lengths, width=50, bins=12):
    """Lines of a bar chart of row lengths, whose bins widen by the same ratio."""
    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, bins + 1).astype(int))
    counts = np.histogram(lengths, edges)[0]
    yield f"{'tokens of a row':>17} {'rows':>7}"
    for low, high, count in zip(edges, edges[1:], counts):
        yield f"{low:>7,} - {high - 1:>7,} {count:>7,} {'█' * -(-count * width // counts.max())}"


def marked(tokenizer, tokens, mask):
    """One row as text, its targets green in a terminal (but see no-color.org), else [[in
    brackets]]; the middle of a long piece is left out."""
    in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    context, target = ("\033[90m{}\033[0m", "\033[32m{}\033[0m") if in_colour else ("{}", "[[{}]]")
    for span in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(mask)) + 1):
        text = tokenizer.decode(tokens[span].tolist())
        if len(text) > 400:
            text = f"{text[:200]} ... {len(text) - 400:,} characters ... {text[-200:]}"
        yield (target if mask[span[0]] else context).format(text)


def print_rows(args):
    """Counts, lengths, packing and one of the rows that train.py would see with these flags."""
    _, config, tokenizer, max_seq_len, rows = load_input(args, weights=False)
    if not 0 <= args.row < len(rows):
        raise ValueError(f"--row {args.row}: the rows kept are 0 to {len(rows) - 1}")
    print(summary_of(rows.counts))
    lengths = rows.lengths
    print(f"tokens: {lengths.sum():,}, targets {rows.num_targets.sum() / lengths.sum():.1%}; "
          f"mean {lengths.mean():,.0f}, median {np.median(lengths):,.0f}, "
          f"longest {lengths.max():,}\n")
    print("\n".join(histogram(lengths)))
    print_packing(rows, config, args, max_seq_len)
    print(f"\nrow {args.row} ({rows.where(args.row)}), its targets green, or in [[ ]]:")
    print("".join(marked(tokenizer, *rows[args.row])))


def print_packing(rows, config, args, max_seq_len):
    """How the first batches of an epoch would be packed."""
    costs = config.train_flops(rows.lengths.astype(float))
    batches = [batch_indices(len(rows), args.batch_size, 42, step)  # train.py's default seed
               for step in range(min(20, -(-len(rows) // args.batch_size)))]
    packed = packing(rows.lengths, costs, batches, max_seq_len, args.num_ranks)
    print(f"\npacking of {len(batches)} batches of {args.batch_size} on {args.num_ranks} GPUs (the "
          f"recipe: 96, 8): {packed['micro_steps']:.1f} micro-steps a batch, rows of "
          f"{max_seq_len:,} filled {packed['filled']:.1%}, cost max/mean {packed['imbalance']:.3f}")
    print("Filled is the share of such rows that holds tokens (the rest is not computed); cost "
          "max/mean is\nthe work of a micro-step's slowest GPU over the mean of all, which wait "
          "for it.")


def print_problems(args):
    """How many problems there are of each sort, and one of them as sample.py asks it."""
    sorts, counts, shown = Counter(), Counter(), None
    for number, problem in enumerate(read_problems(args.data, counts, args.split, args.where)):
        difficulty = problem.get("difficulty", problem.get("level", "-"))
        sorts[problem["source"], problem["kind"], as_text(difficulty)] += 1
        if number == args.row:
            shown = problem
    if shown is None:
        raise ValueError(f"--row {args.row}: the problems kept are 0 to {counts['kept'] - 1}")
    print(summary_of(counts))
    print("\nproblems  kind    difficulty  source")
    for (source, kind, difficulty), count in sorted(sorts.items()):
        print(f"{count:>8,}  {kind:<6}  {difficulty:<10}  {source}")
    print(f"\nproblem {args.row} (source {shown['source']}, id {shown['id']}), as it is asked:\n"
          f"{recipe_prompt(shown)}")


def add_selection(add):
    """The flags of all scripts that say which rows of --data or --problems are read."""
    add("--split", "of folders and hub data sets, such as test, train,test or main/test (default: "
        "train if there is one, else all; a benchmark's own)")
    add("--where", "of --data or --problems read only rows with one of these values in a field, "
        "and so for each: FIELD=VALUE[,VALUE] ...", nargs="+", default=[])


def main():
    """Shows the rows or problems that the flags name, or drops those that evaluations ask."""
    parser = ArgumentParser(description="Shows what train.py or sample.py will see of some data,\n"
                                        "or with --decontaminate drops what evaluations ask.")
    add = parser.add
    add("data", "rows (with --model) or problems: files, hub data sets, builtin:..., benchmarks",
        nargs="*", type="path")
    add_selection(add)
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
    add("--end_token", "end of an assistant's turn, instead of the template's")
    add("--system", "system prompt of kept samples: skyt1, qwq, none, or a text", default="skyt1")
    add("--as_published", "keep duplicates, truncate long rows", action="store_true")
    add("--cache", "folder of the token cache (default: ~/.cache/sky-t1)", type="path")
    add("--row", "the kept row to show", type=int, default=0)
    args = parser.parse_args()
    if args.decontaminate:
        if not args.against or not args.out:
            raise ValueError("--decontaminate wants --against and --out")
        decontaminate(args.decontaminate, args.against, args.out, args.ngram, args.split,
                      args.where)
        return
    if not args.data:
        raise ValueError("name the data")
    first, _ = next(read_rows(find_sources(args.data, args.split)[0]))
    if args.model and is_training_row(first):
        print_rows(args)
    else:
        print_problems(args)


if __name__ == "__main__":
    one_line_errors(main)
