"""Answers: what a response says, and whether it is right.

    python verify.py samples.jsonl --out verified.jsonl --keep kept.jsonl --report report.html

Three kinds of problem: maths (equal answers, not equal strings), multiple choice (the letter),
programs (every test run in a sandbox, its output compared outside of the program's reach). A
wrong accept enters the training set, a wrong reject costs one sample: in doubt an answer is wrong.
Nothing that a model wrote is ever evaluated as Python outside of the sandbox.

In order: maths (extraction, spelling, parsing, units, what a tree says, values, equality), multiple
choice, programs (extraction, tests, the sandbox from outside to inside), a sample's verdict, the
worker processes that make all verdicts, the summary, the report, the command. Needs neither torch
nor the other files; mpmath, which works out values, comes with torch's sympy. Programs need Linux
on x86_64 or aarch64.
"""
import argparse
import ast
import atexit
import builtins
import collections
import concurrent.futures
import ctypes
import datetime
import decimal
import errno
import fcntl
import functools
import gc
import glob
import html
import importlib.abc
import importlib.machinery
import importlib.util
import io
import itertools
import json
import marshal
import math
import mmap
import multiprocessing.connection
import operator
import os
import pkgutil
import random
import re
import resource
import select
import signal
import socket
import statistics
import string
import struct
import subprocess
import sys
import textwrap
import threading
import unicodedata
import warnings
import zoneinfo
from fractions import Fraction
from typing import NamedTuple

MATH_TIMEOUT = 5     # seconds; a worker that takes longer is killed


class NotMath(Exception):
    """The text has no reading as a formula, or the formula no value: it is compared as text."""


class BadInput(ValueError):
    """One line for the user: exit status 2."""


class Verdict(NamedTuple):
    """passed; reason, `correct` or what went wrong; extracted, the answer or program judged."""
    passed: bool
    reason: str
    extracted: str | None = None


MAX_LENGTH = 4000     # characters of an answer; a longer one is equal to itself alone
MAX_ELEMENTS = 100    # of a list or set
MAX_BITS = 1 << 16    # of a number before its point
MAX_DIGITS = 10_000   # with which numbers are worked out
MAX_EXPONENT = 10**6
MAX_WHOLE = 4096      # of a factorial, and the last term of a sum
MAX_WORK = 80_000     # numbers worked out for a pair, under a second; see `spent`
TAGS = ("<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>",
        "<|end_of_solution|>")  # plain text to Qwen's tokenizer
END_OF_THOUGHT = r"</think>|<\|end_of_thought\|>"
PYTHON = re.compile(r"py(?:thon)?[\d.]*+")  # labels of a program
FENCE = re.compile(r"(?<![`~])(`{3,}+|~{3,}+)[ \t]*+([\w+#.{}-]*+)([^`~]*+)$")
DECIMAL = re.compile(
    rb"[+-]?(?:[0-9]++\.[0-9]*+|\.[0-9]++|[0-9]++(?=[eE]))(?:[eE][+-]?[0-9]++)?")
SIGNED = re.compile(rb"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?")
GRADER_ERROR = "grader error"
SLACK = 5  # seconds on the clock that a test has beyond three times its CPU time
GONE = 73  # exit code of a judge whose program has ended before it
WORKER_MEMORY = 2 << 30
DEFAULT_MEMORY = 1 << 31
MAX_RESULT = 16 << 20  # bytes of a returned value's form
MAX_OUTPUT = 64 << 20  # bytes that a program may print
MAX_YIELDED = 100_000  # values of an iterator
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
SANDBOX = None         # of this process
libc = ctypes.CDLL(None, use_errno=True)
PRELOADED = """array calendar cmath collections.abc concurrent.futures.thread dataclasses decimal
    enum fractions graphlib hashlib inspect numbers numpy numpy.random numpy.linalg numpy.fft
    numpy.polynomial numpy.ma numpy.char numpy.rec numpy.strings numpy.testing numpy.typing
    numpy.ctypeslib pprint queue secrets string textwrap threading time timeit traceback types
    typing unittest urllib.parse uuid""".split()
# What a test under `assert` finds without an import, and what a call test does, as in
# LiveCodeBench's runner (lcb_runner/evaluation/testing_util.py): all names of these modules.
USUAL_MODULES = "bisect collections functools heapq itertools math typing".split()
CONTEST_MODULES = ("string re datetime collections heapq bisect copy math random statistics "
                   "itertools functools operator io sys json typing").split()


# ---------------------------------------------------------------------------------------------
# Maths. How an answer travels from the response to its verdict, where the gold answer is 150 cm:
#
#   response     ... so the height is \boxed{h = 1\tfrac{1}{2}\text{ metres}}.
#   find_answer  h = 1\tfrac{1}{2}\text{ metres}                       which text it is
#   respell      h = 1\frac {1}{2}⟪ metres⟫                            one spelling for many
#   parse        ("relation", [("sym", "h"), ("quantity", [("num", 3/2)], "metres")], ["="], ...)
#   canonical    ("named", [("quantity", [("num", 3/2)], "metres")], "h")  what it says, not how
#   same         a name does not matter; metres and cm are lengths: 100 * 3/2 against 150
#   value        150 and 150, to 60 digits: `correct`
#
# What the grammar does not know, a person's name or dy/dx, is a text and compared as one.


# Repetitions are possessive, *+ and ++: what sees a whole response takes time linear in its length.
BOX_SIGN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[\\{}]|[{}]")
GAP = r"[ \t$]|\n(?!\s*\n)|\\q?quad"
LISTED = re.compile(rf"(?:{GAP}|[,;/]|\\[)\]])*+(?:and|or|\\text\{{ *(?:and|or) *\}})?"
                    rf"(?:{GAP}|\\[(\[])*+([a-z] *= *)?")  # between boxes of one list
PHRASE = re.compile(r"\banswer\s*+(?:\*\*\s*+)?(?:(?:is|are|was)(?![a-z])|[:=])", re.IGNORECASE)
FORMULA = (r"(?:\$\$?[^$]{1,999}\$\$?|\\\((?:(?!\\\)).){1,999}\\\)|"
           r"\\\[(?:(?!\\\])[\s\S]){1,999}\\\])")
# "$5$ and $7$" goes on, as does "$5$ cm"; "$5$, because" does not
STATED = re.compile(rf"{FORMULA}(?:(?: *+,| +and| +or)++ *+{FORMULA})*+"
                    r"(?: *+(?:\\?%|[A-Za-z]++)(?= *+\.?$))?"
                    r"|.*?(?=[.!?]\s+[A-Z*]|[,;]\s+(?:as|since|because|so|which|we)\b|[.!]?$)",
                    re.MULTILINE)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z*])|\n")
CLAUSE_END = re.compile(r"[.!?,;:]\s+|\n")
DENIED = re.compile(r"(?i)n't\b|\b(?:not|cannot|never|wrong|incorrect|false|suppose|assum\w+|doubt|"
                    r"if|unless|whether|nobody|no one|tempting|least likely)\b")
DOUBT = re.compile(rf"{DENIED.pattern}|\?|\b(?:when|whenever|provided|wait|actually|impossible)\b")
TAKEN_BACK = re.compile(r"(?i)\W*(?:(?:but )?wait|no|hmm|actually|on second thought|wrong)\b")
NUMBER = re.compile(r"(?<![\w)])-?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?%?"
                    r"|\d+(?:\.\d+)?")


def boxes(text):
    """(start, end, content) of each outermost `\\boxed{...}` or `\\fbox{...}` whose braces balance,
    the content without the signs of boxes in it. `\\{` and `\\}` are printed and do not count."""
    if "box" not in text:
        return []
    opened, spans = [], []
    for sign in BOX_SIGN.finditer(text):
        if sign[0] == "}" and opened:
            if (box := opened.pop())[0] != "{":
                spans.append((*box.span(), sign.start()))
        elif sign[0][-1] == "{" and sign[0] != "\\{":
            opened.append(sign)
    outermost, characters = [], list(text)
    for start, inner, last in sorted(spans):
        if not outermost or start > outermost[-1][2]:
            outermost.append((start, inner, last))
        else:
            characters[start:inner] = [""] * (inner - start)
            characters[last] = ""
    return [(start, last + 1, "".join(characters[inner:last]).strip())
            for start, inner, last in outermost]


def last_box(text):
    """What the last outermost box holds; None if there is none."""
    found = boxes(text)
    return found[-1][2] if found else None


def find_answer(response):
    """The answer and how it was found: "box", "mark", "phrase" or "number"; or (None, None)."""
    if found := boxes(response):
        start, _, answer = found.pop()
        last = answer
        while found and answer and len(answer) < MAX_LENGTH and (
                listed := LISTED.fullmatch(response, found[-1][1], start)):
            start, _, before = found.pop()
            if not math_equal(before, last):  # else it is said twice
                answer = f"{before}, {listed[1] or ''}{answer}"
        # it is no 5 that -\boxed{5} says
        signed = re.search(r"(?:\S *[-−+]|\bnot) *\$? *$", response[:start])
        return (answer, "box") if answer and not signed else (None, None)
    head, mark, tail = response.rpartition("####")
    if mark and tail.strip() and not PHRASE.search(tail):
        return tail.strip().split("\n")[0].strip(), "mark"
    *_, phrase = [None, *PHRASE.finditer(response)]
    if phrase and (tail := response[phrase.end():].lstrip(" \t\n*_:=")):
        denied = DENIED.search(CLAUSE_END.split(response[:phrase.start()])[-1])
        answer = None if denied else stated(tail[:MAX_LENGTH])
        return (answer, "phrase") if answer else (None, None)
    for sentence in reversed(SENTENCE_END.split(response)):
        if numbers := list(NUMBER.finditer(sentence)):
            number = numbers[-1]
            # of a formula, 2^{10}, or of a larger number, 1 000
            part = re.search(r"[\w^{}.,:(−]$|[-−\d] $", sentence[:number.start()]) or re.match(
                r"[\^!\\{(π²³]|[A-Za-z](?![A-Za-z])|\.\d", sentence[number.end():])
            if part or DOUBT.search(sentence) or TAKEN_BACK.match(sentence):
                return None, None
            return number[0], "number"
    return None, None


def stated(tail):
    """The answer at the head of what follows "answer is", without emphasis; None where its
    sentence makes it a condition's, or that or the next one takes it back."""
    tail = re.sub(r"^(?:therefore|thus|exactly|simply|equal to|given by) |</?answer>|\*\*", "",
                  tail)
    answer = STATED.match(tail)[0]
    sentence, *others = SENTENCE_END.split(re.sub(FORMULA, "", tail))
    is_answer = re.fullmatch(r"(?i)\W*(?:false|incorrect|wrong|impossible)\W*", sentence)
    if DOUBT.search(sentence) and not is_answer or others and TAKEN_BACK.match(others[0]):
        return None
    return re.sub(r"\\?\$|\\[()\[\]]", "", answer).strip(" *_'\"“”\n") or None


def extract_answer(response):
    """The text that a response gives as its answer, or None: the last balanced box, with those
    that the same sentence lists, else what follows `####`, else what follows "answer is", else the
    last number. A box that is empty is no answer, and an earlier one never stands in for it."""
    return find_answer(response)[0]


# ---------------------------------------------------------------------------------------------
# Maths: one spelling. Words are written ⟪words⟫.


GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda "
            "mu nu xi pi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda "
            "Xi Pi Sigma Phi Psi Omega hbar ell".split())
TRIGONOMETRIC = set("sin cos tan cot sec csc sinh cosh tanh".split())
MPMATH = {  # functions of one number, by mpmath's names
    **{name: name for name in [*TRIGONOMETRIC, "exp"]}, "ln": "log", "lg": "log10", "cis": "expj",
    **{f"arc{name}": f"a{name}" for name in TRIGONOMETRIC}, "tg": "tan", "ctg": "cot",
    "arctg": "atan"}
NAMED_FUNCTIONS = {*MPMATH, "log"}
FUNCTIONS = NAMED_FUNCTIONS | set("sqrt frac binom max min gcd lcm sum prod det".split())
# The sign at the head of a line stands for all behind it. `_` is a blank; a sign that is a command
# gets a blank behind it.
SIGNS = {name.replace("_", " "): sign.replace("_", " ") + " " * sign[1:].isalpha()
         for sign, *names in map(str.split, r"""
    ≤ \leqslant \leq \le <=
    ≥ \geqslant \geq \ge >=
    ≠ \neq \ne !=
    ≈ \approx \simeq
    < \lt
    > \gt
    ∈ \in
    ∪ \cup
    ∩ \cap
    ∖ \setminus \backslash
    ∅ \emptyset \varnothing
    ∞ \infty
    ± \pm
    ∓ \mp
    - − – — ‐
    * \times \cdot \ast × · ⋅ ∙
    / \div ÷ ⁄
    ^ **
    : \colon ∶ {:}
    | \lvert \rvert \vert \mid \|
    ⟨ \langle
    ⟩ \rangle
    ' \prime ′ ’
    , {,} 、 ，
    ° \degree \circ º
    % \%
    £ \pounds
    ℝ \R \Reals
    \pi π
    \theta θ \vartheta
    \alpha α
    \beta β
    \gamma γ
    \lambda λ
    \phi φ \varphi
    \omega ω
    \mu µ μ
    \Omega Ω
    \triangle △
    \epsilon ε \varepsilon ϵ
    \delta δ
    \zeta ζ
    \eta η
    \kappa κ
    \nu ν
    \xi ξ
    \rho ρ
    \sigma σ
    \tau τ
    \chi χ
    \psi ψ
    \Gamma Γ
    \Theta Θ
    \Lambda Λ
    \Pi Π
    \Sigma Σ
    \Phi Φ
    \Psi Ψ
    \lfloor ⌊
    \rfloor ⌋
    \lceil ⌈
    \rceil ⌉
    \equiv ≡
    \subset ⊂
    \parallel ∥
    \perp ⊥
    \Rightarrow ⇒ \implies
    \Delta Δ
    \bar \overline
    \land \wedge
    \lor \vee
    \to \rightarrow \longrightarrow →
    \angle ∠
    \neg ¬ \lnot
    \sqrt[3] ∛
    \frac{1}{2} ½
    \frac{1}{3} ⅓
    \frac{2}{3} ⅔
    \frac{1}{4} ¼
    \frac{3}{4} ¾
    \frac{1}{5} ⅕
    \frac{1}{6} ⅙
    \frac{1}{8} ⅛
    \sqrt √
    _ ⟪ ⟫
    \frac \dfrac \tfrac \cfrac \over
    \binom \dbinom \tbinom \choose
    \dots \ldots \cdots \dotsc \dotsb ... …
    _ \, \; \: \> \_ ~ \quad \qquad \displaystyle \textstyle \limits
""".strip().splitlines()) for name in names}
ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBER_WORDS = {name: str(n) for n, name in enumerate(ONES)} | {
    name: str(10 * n) for n, name in enumerate(TENS, 2)} | {
    f"{ten}-{one}": str(10 * n + i) for n, ten in enumerate(TENS, 2)
    for i, one in enumerate(ONES[1:10], 1)} | dict(map(str.split, """
    half 1/2, one-half 1/2, one-third 1/3, two-thirds 2/3, one-quarter 1/4, one-fourth 1/4,
    three-quarters 3/4, three-fourths 3/4, one-fifth 1/5, dozen *12, hundred *100,
    thousand *1000, million *10^6, billion *10^9, trillion *10^12""".split(",")))
# an element of words, cat or HTH; ab and xy are products
WORDS = re.compile(r"[A-Za-z][A-Za-z '.]*")
WORD = re.compile(r"(?i)(?<![A-Za-z])(?:(?![abcxyz]+\b)(?=[a-z]*[aeiou])[a-z]{2}|[a-z]{4}|"
                  r"(?-i:[A-Z]{2,}$))")


def superscript(match):
    sign = "_" if match[0][0] in "₀₁₂₃₄₅₆₇₈₉" else "^"
    return sign + "{" + unicodedata.normalize("NFKC", match[0]).replace("−", "-") + "}"


def sign(match):
    return SIGNS.get(match[0]) or unicodedata.normalize("NFKC", match[0])


def bare_word(match):
    """Letters that are no product of variables: a function's name, a long word."""
    word = match[1] or ""
    if word in FUNCTIONS or word in GREEK:
        return f"\\{word} "
    is_word = len(word) > 3 or word in ("per", "day") or known_unit(word) and not word.isascii()
    return f"⟪{word}⟫" if is_word else match[0]


def words_only(match):
    """An element of plain words: cat and HTH, while xy and abc are products."""
    text = match[0].strip()
    is_word = WORDS.fullmatch(text) and WORD.search(text) and text not in GREEK | FUNCTIONS
    return f"⟪{text}⟫" if is_word else match[0]


def integer_parameter(match):
    """2n pi with n any integer is 2k pi."""
    if re.search(rf"_\{{?{match[2]}", match[1]):  # a_n = 2n
        return match[1]
    if "N" in match[0][len(match[1]):]:  # not all whole numbers
        return match[0]
    return re.sub(rf"(?<![A-Za-z\\]){match[2]}(?![A-Za-z])", "k", match[1])


def repeating(match):
    """0.1\\overline{6} is 0.1 + 6/90."""
    whole, fixed, period = match[1], match[2], match[3]
    return rf"({whole}.{fixed}+\frac{{{period}}}{{{'9' * len(period)}{'0' * len(fixed)}}})"


NUMBER_NAME = "|".join(sorted(NUMBER_WORDS, key=len, reverse=True)).replace("-", "[ -]")
SAID = (r"[A-Za-z ]*\b(?:answer|value|result|total|sum|probability|area|volume|length)\b[A-Za-z ]*"
        r"\b(?:is|are|equals)")
D = r"(?:d|\\mathrm ?\{d\})"  # of a derivative
# Four passes. Each has a pattern that the texts in need of it have (for speed alone), and its rules
# in the order in which they are applied: what is looked for, what it becomes, and an example, which
# the tests run, of what goes in and what comes out.
SPELLING = [(name, re.compile(needed), [(re.compile(pattern), *rule) for pattern, *rule in rules])
            for name, needed, rules in [
    ("unicode", r"[^\x00-\x7f]", [
        ("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+|[₀₁₂₃₄₅₆₇₈₉]+", superscript, "x²", "x^{2}"),
        (r"([①-⑳])(?=[①-⑳])", r"\1,", "①③", "①,③"),
        (r"[^\x00-\x7f]", sign, "5π½５", r"5\pi \frac{1}{2}5"),
    ]),
    ("commands", r"[^\w\s+/^()-]|[^\x00-\x7f]", [
        (r"\\\$", "USD ", r"\$12", "USD 12"),
        (r"\$|`|^ ?\*\*|\*\* ?$|(?<!\\)\\[()\[\]]", " ", "$5$", " 5 "),
        (r"(\\(?:nabla|vec|math(?:bf|rm)|bm|boldsymbol|overrightarrow)(?![A-Za-z])[^=+\d]*)\\times",
         r"\1\\cross ", r"\nabla\times F", r"\nabla\cross  F"),
        (r"\\\\ ?\[ ?[\d.]+ ?(?:pt|[cme]m|ex) ?\]", r"\\\\", r"1\\[2pt]2", r"1\\2"),
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z]) ?\.?|(?<!\\)\\! ?", "",
         r"\left(1\right)", "(1)"),
        (r"\\(?:(?:text)?color *(?:\[[a-zA-Z]+\])?|phantom|hspace\*?) *\{[^{}]*\}", "",
         r"\color{red}{5}", "{5}"),
        (r"\{([^{}]*)\\(over|choose)(?![A-Za-z])([^{}]*+)\}", r"\\\2{\1}{\3}", r"{3\over4}",
         r"\over{3}{4}"),
        (r"\\begin *\{(\w+)\}(?: *\{[lcr| ]*\})?", r"\\begin\1 ", r"\begin{array}{cc}",
         r"\beginarray "),
        (r"\\end *\{\w+\}", r"\\end ", r"\end{cases}", r"\end "),
        (r"\\\\|\\[A-Za-z]+|\\[,;:> %|]|\*\*|[<>!]=|\.\.\.|~|\{[,:]\}", sign, r"x\leq 3", "x≤ 3"),
        (r"\^ *(?:\{ *)?(°|'+) *\}?", r"\1", "90^{°}", "90°"),
        (r"\^ *\{ *\((\w+)\) *\}", r"\\order \1", "f^{(2)}", r"f\order 2"),
        (r"\\mathbb *(?:\{R\}|R)", "ℝ", r"\mathbb{R}", "ℝ"),
        (r"ℝ ?\^\{?\+\}?", "(0,∞)", "ℝ^+", "(0,∞)"),
        (r"ℝ ?- ?(?=\\\{)", "ℝ∖", r"ℝ-\{3\}", r"ℝ∖\{3\}"),
        (r"\\\{ *\\\}", "∅", r"\{\}", "∅"),
        (r"(?<!\^)(?<!\^\{)\\(?:math(?:bf|it|sf|bb)|boldsymbol|bm|underline)(?![A-Za-z])|"
         r"\bnp\.", "",
         r"\mathbf{v}", "{v}"),
        (r"\\(?:bar|overrightarrow) *\{([A-Z](?: ?[A-Z])+)\}", r"⟪\1⟫", r"\bar{AB}", "⟪AB⟫"),
        (r"\\Delta(?= *\{?[A-Z] ?[A-Z] ?[A-Z])", r"\\triangle", r"\Delta ABC", r"\triangle ABC"),
        (r"\\(angle|triangle) *(?:\{([A-Z ]+)\}|([A-Z](?: ?[A-Z])*))", r"⟪\1 \2\3⟫",
         r"\angle ABC", "⟪angle ABC⟫"),
        (rf"\\frac *\{{ *{D}[\w ^]*\}} *\{{ *{D} *[\w^]+ *\}}|\bd[a-z]/d[a-z]\b", r"⟪\g<0>⟫",
         r"\frac{dy}{dx}", r"⟪\frac{dy}{dx}⟫"),
        (r"(?:(?<=[,;])|^) *(?:\\(?:max|min|lim|det)(?![A-Za-z])[^=∈]*|[A-Z]\([^()]*\)|"
         r"\w_\{(?:[^{}]|\{[^{}]*\}){2,}\}|\w\(\w\)_\{?\\?\w+ *\}?|[a-z](?::[a-z])+|"
         r"(?:⟪\w+⟫|\w+) *[*∪∩] *(?:⟪\w+⟫|\w+)) *(?==)",
         lambda match: f"⟪{re.sub('[⟪⟫,;]', '', match[0])}⟫", r"\max =6", r"⟪\max ⟫=6"),
        (r"^ ?\(1\)(?=[^,;]*\(2\))", r"\\part ", "(1) 5 (2) 7", r"\part  5 (2) 7"),
        (r"^[ :=≈]+|[ .,:]+$", "", "= 5.", "5"),
    ]),
    ("text", r"(?<![A-Za-z\\])[A-Za-z]{2}|\\(?:[thoOp{]|m(?:a|b|od))|:\d\d|[^\x00-\x7f]", [
        (rf"(?i)(?<![A-Za-z\\-])(?:{NUMBER_NAME})(?![A-Za-z-])", lambda match: NUMBER_WORDS.get(
            match[0].lower().replace(" ", "-"), match[0]), "twenty-five", "25"),
        (r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|tt)|mbox|hbox|operatorname\*?) *"
         r"\{((?:[^{}]|\{[^{}]*\})*+)\}", r"⟪\1⟫", r"5\text{ cm}", "5⟪ cm⟫"),
        (r"⟪ *([eid]|C(?=⟫ ?[_(])|[\W\d_]*?) *⟫", r" \1 ", "⟪17⟫", " 17 "),
        (rf"⟪ *({'|'.join(FUNCTIONS - {'min', 'sec'})}) *⟫", r"\\\1 ", "⟪sin⟫x", r"\sin x"),
        (r"(?i)\b(?:positive )?infinity\b|\boo\b", "∞", "infinity", "∞"),
        (r"(?i)\b(?:negative|minus) (?=\d|∞)", "-", "minus ∞", "-∞"),
        (r"⟪ *(-?∞) *⟫", r"\1", "⟪-∞⟫", "-∞"),
        (r" *(\band\b|\bor\b|[,;]) *(?=[^⟪⟫]*⟫)", r"⟫ \1 ⟪", "⟪2 h and 5 s⟫",
         "⟪2 h⟫ and ⟪5 s⟫"),
        (r"⟪ *(-?\d[\d.,:/*^ ]*|\*\d[\d^]*)", r"\1⟪", "⟪2 h⟫", "2 ⟪h⟫"),
        (r"⟪?(USD|EUR|Rs\.?|[€£¥₹])[ ⟫]*(-? ?(?:\d[\d,.]*)?\d(?: ?\*10+(?:\^\d+)?)?)",
         r"\2⟪\1⟫", "USD 12", "12⟪USD⟫"),
        (r"USD (?=\\)", "", r"USD \frac{3}{4}", r"\frac{3}{4}"),
        (r"[€£¥₹¢](?!⟫)", r"⟪\g<0>⟫", "5€", "5⟪€⟫"),
        (r"⟪ *(?:if|when)? *⟫", "", "⟪if⟫ x>0", " x>0"),
        (r"(?i)(:\d\d) ?⟪? ?([ap])\.? ?m\b\.?⟫?", lambda match: match[1] + f"⟪{match[2].lower()}m⟫",
         "6:40 P.M.", "6:40⟪pm⟫"),
        (r"° ?([CF])(?![A-Za-z])", r"⟪°\1⟫", "20° C", "20⟪°C⟫"),
        (r"^(.*[^, (])[ ,(]*(?:⟪(?:for|where|with|for all)⟫)? *\b([a-z]) *"
         r"(?:∈ *\{?[ZN]\}?(?:\^ ?\{?[*+]\}?|_\+)?|⟪is an integer⟫) *\)?$", integer_parameter,
         r"2n\pi , n ∈ {Z}", r"2k\pi"),
        (r"\(? *(?:\\[pb]?mod|⟪?\bmod\b *⟫?)(?![A-Za-z]) *\{?(\w+)\}? *\)?", r"\\mod \1",
         r"3\pmod{7}", r"3\mod 7"),
        (r"\\\{ *[a-z] *(?:∈ *ℝ *)?[|:](?=.*\\\})(.*?)\\\}", r"\1", r"\{x | x>2\}", " x>2"),
        (rf"^(?:⟪(?:about|approximately|both|either|{SAID})[ :]*⟫(?=.)|"
         rf"(?:if|when|about|approximately|both|either) |{SAID} (?=[-\d\\(]))", "",
         "the answer is 5", "5"),
        (r"⟪? *\band\b *⟫?", "∧", "x>1 and x<2", "x>1∧x<2"),
        (r"⟪? *\bor\b *⟫?", "∨", "x=1 or x=2", "x=1∨x=2"),
        (r", ?(?=[,∧∨&])", "", "1, 2, ∧ 3", "1, 2∧ 3"),
        (r"[^,;∧∨⟪⟫]+|⟪[^⟪⟫]*⟫", words_only, "Alice∧Bob", "⟪Alice⟫∧⟪Bob⟫"),
        (r"⟪[^⟪⟫]*⟫|\\[A-Za-z]+|([^\W\d_]+)", bare_word, "5 miles", "5 ⟪miles⟫"),
        (r"(?:(?<=\d)|⟪ ?([kMm]?)⟫) *\\Omega", r"⟪\1Ω⟫", r"5⟪k⟫\Omega", "5⟪kΩ⟫"),
        (r"\\mu *⟪", "⟪μ", r"5\mu ⟪m⟫", "5⟪μm⟫"),
        (r"(?<![A-Za-z\\])([A-Za-z]{2,}) ?(/?) ?⟪", r"⟪\1 \2", "9 red⟪balls⟫", "9 ⟪red balls⟫"),
        (r"⟫ ?(\^ ?\{? ?-?\d ?\}?|/ ?[A-Za-z](?![A-Za-z⟪]))", r"\1⟫", "5⟪cm⟫^2", "5⟪cm^2⟫"),
        (r"⟫ ?([/*]?) ?⟪", r" \1", "5⟪m⟫/⟪s^2⟫", "5⟪m /s^2⟫"),
        (r"(?<=\d) ?⟪ *([^⟪⟫]*?) *⟫ ?(?=\d)",
         lambda match: match[0] + "∧" if known_unit(match[1]) else match[0],
         "5⟪ft⟫6⟪in⟫", "5⟪ft⟫∧6⟪in⟫"),
    ]),
    ("numbers", r"\d\D*[\d.]|\.\d|C|\dth|\dst|\dnd|\drd", [
        (r"(?<![\d.])([1-9]\d{0,2})((?: \d{3})+)(?!\d)",
         lambda match: match[0].replace(" ", ""), "2 000 000", "2000000"),
        # (100,200) is a pair, unless the commas between the elements are set off by blanks
        (r"(?<![\d.,])(?:(?<![(\[{])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d|[)\]}])|(?:(?<=, )|(?=[\d,]+, ))"
         r"[1-9]\d{0,2}(?:,\d{3})+(?!,?\d))", lambda match: match[0].replace(",", ""), "1,000",
         "1000"),
        (r"(?<=\d) ?\^?\{? ?⟪? ?(?:st|nd|rd|th)(?: ?⟫)?\}?(?![A-Za-z])", "", "36^{⟪th⟫}", "36"),
        (r"(?<!\d\d)(\d*)\.(\d*)\\(?:bar|dot) *\{?(\d+)\}?", repeating, r"0.\bar{7}",
         r"(0.+\frac{7}{9})"),
        (r"(?<![\d.])(\d{1,9})\.(\d{0,99}?)(\d)\3\3+ ?\\dots", repeating, r"0.333\dots",
         r"(0.+\frac{3}{9})"),
        (r"(\d)[eE]([+-]?\d{1,9})(?![A-Za-z\d])", r"\1*10^{\2}", "1.6e-19", "1.6*10^{-19}"),
        (r"(?<![\d.}/)^_])(\d+) (\d+) ?/ ?(\d+)(?![\d.])", r"(\1+\2/\3)", "2 1/3", "(2+1/3)"),
        (r"(?:\{\} ?|^|(?<=[-+*/=( ]))[_^] ?\{?(\w{1,9})\}? ?C ?_ ?\{?(\w{1,9})\}?",
         r"\\binom{\1}{\2}", "{}_5C_2", r"\binom{5}{2}"),
        (r"\bC ?_ ?(?:\{(\w{2,9})\}|\{?([2-9a-z])\}?) ?\^ ?(?:\{(\w+)\}|(\w))",
         r"\\binom{\1\2}{\3\4}", "C_5^2", r"\binom{5}{2}"),
        (r"\bC ?\((\w+), ?(\w+)\)", r"\\binom{\1}{\2}", "C(5,2)", r"\binom{5}{2}"),
        (r"\]([^][(),]+,[^][(),]+[\[\]])", r"(\1", "]0,1[", "(0,1["),
        (r"([(\[][^][(),]+,[^][(),]+)\[", r"\1)", "(0,1[", "(0,1)"),
    ]),
]]


def respell(text):
    """One spelling for what is written in many."""
    text = " ".join((last_box(text) or text).split())
    if len(text) > MAX_LENGTH:
        raise NotMath
    for _, needed, rules in SPELLING:
        if needed.search(text):
            for pattern, replacement, _, _ in rules:
                text = pattern.sub(replacement, text)
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------------
# Maths: from text to a tree
#
# A leaf: ("num", number)  ("decimal", number, digits after the point)  ("sym", name)
#   ("inf", sign)  ("text", words)  ("based", value, base)
# A node has its kind and then a list of its parts. What has a value: "+", "*", "^" and functions by
# their names; ("quantity", [tree], unit). Structures: "list", "or", "and"; "set", "union", "meet",
# "minus"; tuples and intervals, by their brackets; "matrix" and "row"; ":", a ratio;
# ("relation", sides, signs, names), the names being the sides as they are written;
# ("member", [set], name). Of `canonical` alone: ("named", [tree], name) is a solved equation,
# ("equation", [tree]) one that is not: where it holds, the tree is zero.

ONE, MINUS_ONE = ("num", 1), ("num", -1)
BARE_UNITS = {  # what 25% and 60° are times, where they are no 25 and 60
    "%": [("num", Fraction(1, 100))], "°": [("sym", "pi"), ("num", Fraction(1, 180))],
    "rad": [ONE]}
CONSTANTS = {"e": "e", "i": "j", "pi": "pi"}  # by mpmath's names
APPLIED = set("f phi varphi Gamma psi zeta delta".split())  # f(x) is no product
ACCENTS = set("bar dot ddot hat tilde overline vec".split())
REGIONS = ("relation", "member", "union", "meet", "minus")
STRUCTURES = {*REGIONS, "list", "set", "()", "[)", "(]", "[]", ":", "matrix", "row", "equation",
              "named", "quantity", "text", "inf", "based"}
SETS = {"∅": ("set", []), "∞": ("inf", 1), "ℝ": ("()", [("inf", -1), ("inf", 1)])}
HOLDS = {"<": operator.lt, "≤": operator.le, ">": operator.gt, "≥": operator.ge,
         "=": operator.eq, "≈": operator.eq, "≠": operator.ne}
ROUNDING = {"|": "abs", "\\lfloor": "floor", "\\lceil": "ceil"}
CLOSING = {"(": ")]", "[": "])", "{": "}", "\\{": ["\\}"], "⟨": "⟩", "\\lfloor": ["\\rfloor"],
           "\\lceil": ["\\rceil"], "|": "|"}
TOKEN = re.compile(r"⟪[^⟫]*⟫|\d+\.?\d*|\.\d+|\\[A-Za-z]+|\\.|\S", re.DOTALL)
BASED = re.compile(  # 101_2, (1A)_{16}
    r"\(? ?([0-9A-F]+) ?\)? ?_ ?\{? ?(\d{1,2}) ?\}?")
# What binds least comes first. What binds more than these is a function of Parser each, in this
# order: quantity (a unit at the end), sum, product, factor (^ ! % °), base.
LEVELS = [("list", ",;"), ("or", "∨"), ("and", "∧"), ("relation", "=<>≤≥≠≈∈"), ("minus", "∖"),
          ("union", "∪"), ("meet", "∩"), (":", ":")]
BINDS = {sign: level for level, (_, signs) in enumerate(LEVELS) for sign in signs}
SUM_SIGNS = set("+-±∓")
ENDS = {"", "&", "\\\\", "\\end", *")]}⟩", "\\}", "\\rfloor", "\\rceil", *SUM_SIGNS, *BINDS}


def parse(text):
    """The tree of an answer in one spelling; raises NotMath where it has none."""
    if (match := BASED.fullmatch(text)) and len(match[1]) > match[1].isalpha() and all(
            int(digit, 16) < int(match[2]) for digit in match[1]):
        return ("based", int(match[1], int(match[2])), match[2])
    parser = Parser(TOKEN.findall(text))
    tree = parser.level()
    parser.expect("")
    return tree


class Parser:
    """Recursive descent; self.i is the next token."""

    def __init__(self, tokens):
        self.tokens, self.i, self.bars = tokens, 0, 0

    def peek(self):
        return self.tokens[self.i] if self.i < len(self.tokens) else ""

    def take(self, *wanted):
        """The next token, if it is one of those wanted; else an empty text."""
        token = self.peek()
        if wanted and token not in wanted:
            return ""
        self.i += 1
        return token

    def expect(self, *wanted):
        if self.peek() not in wanted:
            raise NotMath
        return self.take()

    def source(self, start):
        """The text since a token, without braces: the name of a symbol or a side."""
        return re.sub(r"[{}\s]", "", "".join(self.tokens[start:self.i]))

    def level(self, least=0):
        """What the signs of LEVELS join, those that bind at least so tightly: by precedence
        climbing, an operand of a sign is what the tighter ones join."""
        start, tree = self.i, self.quantity()
        while (level := BINDS.get(self.peek(), -1)) >= least:
            kind, joining = LEVELS[level]
            items, signs, names = [tree], [], [self.source(start)]
            while sign := self.take(*joining):
                signs.append(sign)
                begin = self.i
                items.append(self.level(level + 1))
                names.append(self.source(begin))
            tree = (kind, items)
            if kind == "relation":
                tree = (kind, items, signs, names)
                if "∈" in signs:
                    _, region = items  # ValueError, it has no reading, of more than two sides
                    tree = ("member", [region], names[0])
        return tree

    def quantity(self):
        """Words, or an expression with its unit if it has one."""
        if self.peek()[:1] == "⟪":
            return text_tree(self.take())
        tree = self.sum()
        if self.peek()[:1] != "⟪":
            return tree
        words = self.take()[1:-1]
        if tree[0] == "quantity":  # 20% loss
            tree, words = tree[1][0], f"{tree[2]} {words}"
        if CHANGING.search(words) or tree[0] == "sym" and unit(words)[2]:  # 12 squared; n is odd
            raise NotMath
        return ("quantity", [tree], words)

    def sum(self):
        items = [self.signed(self.product)]
        while self.peek() in SUM_SIGNS:
            items.append(self.signed(self.product))
        return items[0] if len(items) == 1 else ("+", items)

    def signed(self, unsigned):
        """Plus-minus is a variable, whose values are 1 and -1: each sign its own, unless a
        minus-plus sign ties them together."""
        sign = self.take(*SUM_SIGNS)
        if not sign:
            return unsigned()
        tree = self.signed(unsigned)
        if sign in "±∓":
            tree = times(("sym", "±" if "∓" in self.tokens else f"±{self.i}"), tree)
        return negated(tree) if sign in "-∓" else tree

    def product(self):
        """The sign of multiplication may be left out, except between two numbers."""
        tree = self.factor()
        while (token := self.peek()) not in ENDS and token[0] != "⟪" and not (
                token == "|" and self.bars):
            if self.take("/"):
                tree = over(tree, self.signed(self.factor))
            elif self.take("*"):
                tree = times(tree, self.signed(self.factor))
            elif token[0].isdigit() and self.tokens[self.i - 1][0].isdigit():
                raise NotMath
            else:
                tree = times(tree, self.factor())
        return tree

    def factor(self):
        """A base with what is written behind it: power, factorial, percent, degrees."""
        tree = self.base()
        while sign := self.take("^", "!", "°", "%"):
            if sign == "^":
                tree = ("^", [tree, self.argument(whole_number=True)])
            elif sign == "!":
                tree = ("factorial2" if self.take("!") else "factorial", [tree])
            else:
                tree = ("quantity", [tree], sign)
        return tree

    def base(self):
        """What a power or a product is made of: a number, group, symbol or function."""
        token = self.take()
        name = token.removeprefix("\\")
        if re.match(r"\.?\d", token):
            return self.number(token)
        if token in CLOSING:
            return self.group(token)
        if token in SETS:
            return SETS[token]
        if token.startswith("\\begin"):
            return self.matrix(token.removeprefix("\\begin"))
        if token.isalpha() or name in GREEK | ACCENTS:
            start = self.i - 1
            if name in ACCENTS:
                self.base()
            if self.take("_"):
                self.argument(whole_number=True)
            while self.take("'"):
                pass
            applied = self.tokens[self.i:self.i + 3]  # f(0)
            if applied[::2] == ["(", ")"] and applied[1].isdigit() or applied[:1] == ["("] and (
                    name in APPLIED):
                self.base()
            # c_1 and C_1 are one constant of integration
            return ("sym", self.source(start).removeprefix("\\").replace("c_", "C_"))
        if name in FUNCTIONS:
            return self.function(name)
        raise NotMath

    def number(self, token):
        """A decimal, or a whole number, perhaps mixed: 2\\frac{1}{3} is 2 + 1/3."""
        if "." in token:
            return ("decimal", Fraction(token.rstrip(".")), len(token.partition(".")[2]))
        if self.peek() == "\\frac":
            start = self.i
            match self.base():
                case ("*", [("num", a), ("^", [("num", b), _])]) if a < b:
                    return ("num", int(token) + Fraction(a, b))
            self.i = start
        return ("num", int(token))

    def group(self, opening):
        """What a bracket holds: a plain group, |x|, a tuple or interval, a set."""
        self.bars += opening == "|"
        tree = self.level()
        closing = self.expect(*CLOSING[opening])
        self.bars -= opening == "|"
        if opening == "{":
            return tree
        if opening == "\\{":
            return ("set", tree[1] if tree[0] == "list" else [tree])
        if opening in ROUNDING:
            return (ROUNDING[opening], [tree])
        if tree[0] == "list":
            return ((opening + closing).replace("⟨", "(").replace("⟩", ")"), tree[1])
        if tree[0] in ("text", "relation") or opening + closing not in ("()", "[]"):
            raise NotMath
        return tree

    def matrix(self, name):
        """\\begin{pmatrix} a & b \\\\ c & d \\end{pmatrix}; a determinant is worked out."""
        rows, sign = [], ""
        while sign != "\\end":
            if sign != "&":
                rows.append([])
            if self.peek() != "\\end":  # behind the last line's end
                rows[-1].append(self.level())
            sign = self.expect("&", "\\\\", "\\end")
        rows = [("row", row) for row in rows if row]
        if name == "cases" and all(len(row) == 1 for _, row in rows):  # a system of equations
            return ("list", [row[0] for _, row in rows])
        return determinant(("matrix", rows)) if name == "vmatrix" else ("matrix", rows)

    def argument(self, whole_number=False):
        """What a command takes: a group, or one digit, letter or command. A power in plain text
        takes the whole number: 2^10."""
        token = self.peek()
        if token == "-":
            return self.signed(self.factor)
        if token.isdigit() and len(token) > 1 and not whole_number:
            self.tokens[self.i:self.i + 1] = [token[0], token[1:]]
        return self.base()

    def function(self, name):
        """\\frac, \\sqrt[n] and \\log_2, \\sin^2 x, \\sin^{-1}, ... after their name."""
        if name == "frac":
            return over(self.argument(), self.argument())
        if name == "det":
            return determinant(self.base())
        if name == "binom":
            return (name, [self.argument(), self.argument()])
        if name == "sqrt":
            degree = ("num", 2)
            if self.take("["):
                degree = self.sum()
                self.expect("]")
            return ("^", [self.argument(whole_number=True), over(ONE, degree)])
        behind = {}
        while sign := self.take("_", "^"):
            behind[sign] = self.argument(whole_number=True)
        base, power = behind.get("_"), behind.get("^")
        if name in ("sum", "prod"):
            match base:
                case ("relation", [("sym", index), first], ["="], _) if power:
                    return (name, [self.product(), ("sym", index), first, power])
            raise NotMath
        if power == MINUS_ONE and name in TRIGONOMETRIC:
            name, power = "arc" + name, None
        arguments = self.arguments()
        if base:
            if name != "log":
                raise NotMath
            arguments.append(base)
        return ("^", [(name, arguments), power]) if power else (name, arguments)

    def arguments(self):
        """\\sin(x), \\sin 2x, \\sin\\frac{x}{2}, \\gcd(a, b)"""
        if self.peek() in CLOSING:
            tree = self.base()
            if tree[0] in ("()", "set"):
                return tree[1]
            if self.peek() == "^":  # \\ln (x)^2 is read as it is printed
                raise NotMath
            return [tree]
        tree = self.factor()
        while (token := self.peek()) not in ENDS and token not in ("*", "|", "/", "(") and (
                token[1:] not in NAMED_FUNCTIONS and token[0] != "⟪"):
            tree = times(tree, self.factor())
        if not symbols(tree) and self.take("/"):
            tree = over(tree, self.factor())
        return [tree]


def times(a, b):
    """The product of two trees: a matrix by its elements, a quantity's unit kept outside."""
    if b[0] in ("matrix", "row"):
        return (b[0], [times(a, item) for item in b[1]])
    if b[0] == "quantity":
        return ("quantity", [times(a, b[1][0])], b[2])
    return ("*", [*(a[1] if a[0] == "*" else [a]), b])


def over(a, b):
    return times(a, ("^", [b, MINUS_ONE]))


def negated(tree):
    if tree[0] in ("num", "decimal", "inf"):
        return (tree[0], -tree[1], *tree[2:])
    return times(MINUS_ONE, tree)


def difference(a, b):
    return ("+", [a, negated(b)])


def determinant(tree):
    match tree:
        case ("matrix", [(_, [a, b]), (_, [c, d])]):
            return difference(times(a, d), times(b, c))
    raise NotMath


def parts(tree):
    return tree[1] if isinstance(tree[1], list) else []


def rebuilt(tree, change):
    """A node with changed parts; a leaf as it is."""
    return (tree[0], [change(part) for part in parts(tree)], *tree[2:]) if parts(tree) else tree


def substituted(tree, values):
    if tree[0] == "sym":
        return values.get(tree[1], tree)
    return rebuilt(tree, lambda part: substituted(part, values))


def leaves(tree):
    """The kinds of nodes and leaves in a tree, and the names of its symbols."""
    own = {tree[0], tree[1]} if tree[0] == "sym" else {tree[0]}
    return own.union(*map(leaves, parts(tree)))


def symbols(*trees):
    """Names of the variables in trees; e, i and pi are none, nor what a sum counts with."""
    names = set()
    for tree in trees:
        names |= {tree[1]} if tree[0] == "sym" else symbols(*parts(tree))
        if tree[0] in ("sum", "prod"):
            names.discard(tree[1][1][1])
    return names - CONSTANTS.keys()


def text_tree(token):
    text = squash(token)
    if re.fullmatch("(?:there(?:is|are))?no(?:real|integer)?solutions?(?:exists?)?|emptyset", text):
        return SETS["∅"]
    if re.fullmatch("all(?:the)?real(?:number)?s?|realnumbers", text):
        return SETS["ℝ"]
    return ("text", re.sub("^(?:the)?(?:limit)?do(?:es)?n[o']texist$", "dne", text))


def squash(text):
    """Words without case, blanks, punctuation and a leading article."""
    text = re.sub(r"^\W*(?:an?|the)\s+(?=\w\w)", "", text.lower())
    return re.sub(r"(?<=[a-z])-(?=[a-z])|[\s⟪⟫,;:!?()\"_]|\.(?!\d)", "", text)


# ---------------------------------------------------------------------------------------------
# Maths: units


UNITS = {}  # name -> factor, powers of base units; filled from this table:
# `names- = factor` is a prefix, `names` a base unit and `names = factor unit` another one
UNIT_TABLE = """
    - = 1
    k- kilo- = 1e3
    M- mega- = 1e6
    G- giga- = 1e9
    T- = 1e12
    d- deci- = 1e-1
    c- centi- = 1e-2
    m- milli- = 1e-3
    μ- micro- = 1e-6
    n- nano- = 1e-9
    p- pico- = 1e-12
    m meter metre 米 м
    g gram gramme 克 г
    s sec second 秒 с
    A amp ampere
    K kelvin
    mol mole
    $ usd dollar 美元
    € eur euro
    元 yuan rmb 块
    ₹ Rs rupee
    celsius
    fahrenheit
    % percent
    ° degree deg
    B byte
    bit
    month
    rad radian
    unit
    个 = 1
    N newton = 1000 g m/s^2
    J joule = 1 N m
    W watt = 1 J/s
    Wh = 3600 J
    Pa pascal = 1 N/m^2
    Hz hertz = 1 /s
    C coulomb = 1 A s
    V volt = 1 J/C
    Ω ohm = 1 V/A
    F farad = 1 C/V
    T tesla = 1 N/m A
    Wb weber = 1 V s
    H henry = 1 V s/A
    eV electronvolt = 1.602176634e-19 J
    cal calorie = 4.184 J
    L l liter litre 升 л = 0.001 m^3
    t ton tonne 吨 т = 1000000 g
    min minute mins 分钟 мин = 60 s
    h hr hour hrs 小时 ч = 3600 s
    day 天 日 = 24 h
    week = 7 day
    year yr 年 = 12 month
    厘米 см = 0.01 m
    毫米 мм = 0.001 m
    千米 公里 км = 1000 m
    千克 公斤 кг = 1000 g
    in inch inches = 0.0254 m
    ft foot feet = 12 in
    yd yard = 3 ft
    mi mile = 5280 ft
    lb lbs pound = 453.59237 g
    oz ounce = 0.0625 lb
    mph = 1 mi/h
    kph kmh kmph = 1000 m/h
    cent ¢ = 0.01 $
    cc = 0.000001 m^3
    ha hectare = 10000 m^2
"""
POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3}
UNIT_WORD = re.compile(r"([^\W\d_]+|[°%$¢€£¥₹/])\s*\^?\s*\{?\s*(-?\d)?")
# words that change a number or take it back: no unit
CHANGING = re.compile(
    r"(?i)(?<![\^{\w-])\d|\d\d|^ *(?:squared|cubed|factorial|doubled|tripled|halved|(?:hal|quarter|"
    r"third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)\w*)|\b(?:not|no|nor|"
    r"rejected|wrong|incorrect|impossible|undefined|exists?|invalid|extraneous|base|mod|plus|minus|"
    r"times(?! as\b)|divided|choose|out|least|most|but|"
    r"(?:hundred|thousand|million|billion|lakh|crore)s?)\b")
TEMPERATURE = re.compile(r"(?i)(?:°|\bdegrees?)\s*(?:(c)(?:elsius)?|f(?:ahrenheit)?)\b")
UNIT_CAPITALS = ("N⟫", "J⟫", "W⟫", "V⟫", "A⟫", "K⟫")
# units as variables are written: 5m, 9 m/s^2, 3 km
UNIT_LETTERS = re.compile(
    r"(?<=[\d)}]) ?((?:[msgLhNJWVAK]|[ckm]m|[km]g|m[lL]|ft|in|lbs?|oz|hrs?|min|sec|eV|Pa|Hz|mol|"
    r"mph|km?ph|[kmMn](?:Hz|Pa|V|W|J|N|A|F|C)|kWh)"
    r"(?:\^\{?\d\}?)?(?: ?/ ?[a-z]{1,3}(?:\^\{?\d\}?)?)?)$")


def known_unit(name):
    """A unit's factor and the powers of base units in it, of km 1000 and {"m": 1}; or None."""
    for i in range(len(name)):
        prefix, rest = f"{name[:i]}-", name[i:]
        names = [rest] if len(rest) < 3 else [rest, rest.lower(), rest.lower().removesuffix("s")]
        for spelled in names:
            if prefix in UNITS and spelled in UNITS:
                return UNITS[prefix][0] * UNITS[spelled][0], UNITS[spelled][1]
    return None


def unit(text):
    """km/h, square feet, red apples: the factor to base units, their powers, the other words."""
    factor, powers, words, side, exponent = Fraction(1), collections.Counter(), [], 1, 1
    text = text.replace("squared", "^2").replace("cubed", "^3")
    text = TEMPERATURE.sub(lambda match: "celsius" if match[1] else "fahrenheit", text)
    for name, written in UNIT_WORD.findall(text):
        if name in ("/", "per"):
            side = -1
        elif name.lower() in POWER_WORDS:  # square feet
            exponent = POWER_WORDS[name.lower()]
        elif known := known_unit(name):
            n, exponent = side * int(written or exponent), 1
            factor *= known[0] ** n
            for base in known[1]:
                powers[base] += n * known[1][base]
        else:
            words.append(name.lower().removesuffix("s"))
    return factor, {base: n for base, n in powers.items() if n}, words


for line in UNIT_TABLE.strip().splitlines():
    names, _, meaning = line.partition("=")
    factor, _, meaning = meaning.strip().partition(" ")
    more, powers, _ = unit(meaning)
    UNITS |= {name: (Fraction(factor or 1) * more, powers if factor else {names.split()[0]: 1})
              for name in names.split()}


def measured(tree):
    """The number of a quantity, and what `unit` says of its unit."""
    return (tree[1][0], *unit(tree[2])) if tree[0] == "quantity" else (tree, 1, {}, [])


def same_quantity(a, b):
    """One of the two has a unit, 5 cm or 25%. If both have, the units must be of one kind and the
    words the same: 5 km west is not 5 km east. A missing unit is any. 25% and 60° without their
    sign are 25 or 1/4, 60 or pi/3."""
    (x, factor, powers, words), (y, other, others, those) = measured(a), measured(b)
    if (powers or words) and (others or those):
        if {*powers, *others} == {"°", "rad"} and not words + those:
            return same_value(a, b)
        agree = powers == others and (not words or not those or words == those)
        return agree and same(x if factor == other else times(("num", factor / other), x), y)
    return same(x, y) or "".join(powers or others) in ("%", "°") and same_value(a, b)


def added(items):
    """5 hours and 30 minutes are one quantity; None where it is several."""
    numbers, factors, powers, words = zip(*map(measured, items), strict=True)
    if len(set(factors)) < len(items) or not powers[0] or any(words) or any(
            other != powers[0] for other in powers):
        return None
    total = [times(("num", factor / factors[0]), number)
             for number, factor in zip(numbers, factors, strict=True)]
    return ("quantity", [("+", total)], items[0][2])


# ---------------------------------------------------------------------------------------------
# Maths: what a tree says


# what an equation may name: x, x_1, f(2), AB, \cos A, (x,y), and words
NAME = re.compile(rf"""(?x) ⟪.* | [|\[]? [A-Z]{{2,}} [|\]]? | \(\\?[A-Za-z]+(?:,\\?[A-Za-z]+)+\)
    | (?:\\(?:sin|cos|tan|Delta)\d?)? (?:[A-Za-z]|\\(?:{"|".join(GREEK - {"pi"})})) '* (?:_\w+)? '*
      (?:\^-1)? (?:\(.*\))?""")


def canonical(tree):
    """A tree without what does not matter to the answer: plus-minus signs and equations with a
    solution are read, lists flat."""
    match tree:
        case ("list" | "or" | "and" as kind, items):
            return joined(kind, elements(items))
        case ("set", items):
            return ("set", elements(items))
        case ("relation", sides, signs, names) if set(signs) <= {"=", "≈"}:
            return equation([canonical(side) for side in sides], signs, names)
        case ("relation", sides, signs, names):
            sides = [("sym", name) if NAME.fullmatch(name) else side
                     for name, side in zip(names, sides, strict=True)]
            if set(signs) <= {">", "≥"}:
                sides, signs = sides[::-1], ["<" if sign == ">" else "≤" for sign in signs[::-1]]
            return ("relation", sides, signs)
    return rebuilt(tree, canonical) if tree[0] in STRUCTURES else tree


def elements(items):
    """The elements of a list, each with every reading of its plus-minus signs."""
    found = []
    for item in items:
        if item[0] in ("list", "or", "and") and not has_conditions(item):
            found += elements(item[1])
            continue
        free = sorted(name for name in symbols(item) if name[0] == "±" and item[0] != "set")
        if len(free) > 5:  # 32 readings
            raise NotMath
        for signs in itertools.product((ONE, MINUS_ONE), repeat=len(free)):
            found.append(canonical(substituted(item, dict(zip(free, signs, strict=True)))))
    return found


def has_conditions(tree):
    """Whether there are inequalities or sets of numbers in it."""
    is_equation = tree[0] == "relation" and set(tree[2]) <= {"=", "≈"}
    return tree[0] in REGIONS and not is_equation or any(map(has_conditions, parts(tree)))


def joined(kind, items):
    """A list: of conditions, of parts of one quantity, of solutions by name, or as it is."""
    if len(items) == 1:
        return items[0]
    if any(item[0] in REGIONS for item in items):
        if len(set().union(*map(variables, items))) > 1:
            return ("list", items)
        # x>1, x≠2 are conditions at once, unless nothing meets both, as x<1, x>2
        if kind == "or" or kind == "list" and same_region(("meet", items), SETS["∅"]):
            return ("union", items)
        return ("meet", items)
    if kind == "and" and (quantity := added(items)):
        return quantity
    names = {item[2] for item in items if item[0] == "named"}
    if items and all(item[0] == "named" for item in items) and (kind != "or" or len(names) == 1):
        return solutions(items)
    return ("list", items)


def solutions(items):
    """x=1 or x=2 are a set; x=1, y=2 a point, by the order of the names; and several of these."""
    items = [("named", values, re.sub(r"^x_\d$", "x", name)) for _, values, name in items]
    points = []  # roots x_1 and x_2 have no order
    for item in items:
        if not points or item[2] in points[-1]:
            points.append({})
        points[-1][item[2]] = item
    if len(points[0]) == 1:
        return ("set", items)
    return joined("list", [("()", [point[name] for name in sorted(point)]) for point in points])


def equation(sides, signs, names):
    """x = 5 and 5 = x are 5 by the name of x. Of several sides, S = 2 * 3 = 6, the last counts, if
    all that have a value agree with it; of x = 1/3 ≈ 0.33 the exact one. x + y = 3, which is not
    solved, is the difference of its sides."""
    if NAME.fullmatch(names[-1]) and not NAME.fullmatch(names[0]):
        sides, signs, names = sides[::-1], signs[::-1], names[::-1]
    named = NAME.fullmatch(names[0])
    *before, last = sides[1:] if named else sides
    if not named and len(before) == 1 and symbols(*sides):
        return ("equation", [difference(*sides)])
    if any(side[0] != "text" and (symbols(last) or not symbols(side)) and not same(side, last)
           for side in before):
        raise NotMath
    if before and signs[-1] == "≈":  # 1/3 ≈ 0.333
        last = before[-1]
    if named and names[0][0] == "(" and last[0] == "()":  # (x,y) = (1,2)
        return ("()", [("named", [item], name) for name, item in zip(
            names[0][1:-1].split(","), last[1], strict=True)])
    return ("named", [last], names[0]) if named else last


# ---------------------------------------------------------------------------------------------
# Maths: the value of a tree


GROWING = ("exp", "sinh", "cosh", "tanh")  # like a power
# Of this thread: mp, mpmath with its own precision; left, what may still be worked out, numbers of
# more digits counted more; needed, the bits of the numbers met; real, whether one that is not real
# counts as undefined; log, the base of a log without one.
WORK = threading.local()


def begin_work():
    if not hasattr(WORK, "mp"):
        import mpmath
        WORK.mp = mpmath.MPContext()
    WORK.left, WORK.needed, WORK.real, WORK.log = MAX_WORK, 0, False, WORK.mp.e


def spent(number):
    """A number, after it was paid for. NotMath where it is too large or the work too long."""
    WORK.left -= (1 + WORK.mp.dps // 64) ** 2
    bits = abs(WORK.mp.mag(number or 1))
    WORK.needed = max(WORK.needed, bits)
    if not bits <= MAX_BITS or WORK.left < 0 or WORK.real and number.imag != 0:
        raise NotMath
    return number


def value(tree, known):
    """A tree's value, where `known` has those of its variables."""
    mp = WORK.mp
    match tree:
        case ("num" | "decimal", number, *_):
            WORK.needed = max(WORK.needed, number.denominator.bit_length())
            return spent(mp.convert(number))
        case ("sym", name) if name in known:
            return known[name]
        case ("sym", name) if name in CONSTANTS:
            return spent(+getattr(mp, CONSTANTS[name]))
        case ("inf", sign):
            return sign * mp.inf
        case ("quantity", [tree], words) if bare := BARE_UNITS.get("".join(unit(words)[1])):
            return value(("*", [tree, *bare]), known)
        case ("sum" | "prod" as kind, [body, ("sym", index), *ends]):
            first, last = (whole(value(end, known)) for end in ends)
            terms = (value(body, {**known, index: mp.mpf(n)}) for n in range(first, last + 1))
            return spent(OPERATIONS["+" if kind == "sum" else "*"](*terms))
        case (name, [*items]) if name in OPERATIONS:
            WORK.left -= len(items)
            return spent(OPERATIONS[name](*(value(item, known) for item in items)))
        case (name, [item]) if name in MPMATH:
            x = value(item, known)
            return spent(getattr(mp, MPMATH[name])(bounded(x) if name in GROWING else x))
    raise NotMath


def bounded(number):
    """A number that may be an exponent."""
    if abs(number) > MAX_EXPONENT:
        raise NotMath
    return number


def power(base, exponent):
    """A power; of a negative number and an odd root the real one."""
    if base.imag == 0 and base.real < 0 and exponent != WORK.mp.nint(exponent):
        for n in (3, 5, 7, 9):
            odd = WORK.mp.nint(n * exponent)
            if same_number(n * exponent, odd):
                return (-1) ** odd * (-base) ** exponent
    return base ** bounded(exponent)


def rounded(x, to):
    """Up or down to a whole number, which 2.999... is already."""
    near = WORK.mp.nint(x)
    return near if same_number(x, near) else to(x)


def whole(x):
    """A number as a small int from 0 on."""
    n = int(bounded(WORK.mp.nint(x.real)))
    if not same_number(x, n) or not 0 <= n <= MAX_WHOLE:
        raise NotMath
    return n


OPERATIONS = {
    "+": lambda *terms: sum(terms), "*": lambda *factors: math.prod(factors), "^": power,
    "abs": abs, "max": max, "min": min,
    "log": lambda x, *base: WORK.mp.log(x, *(base or [WORK.log])),
    "floor": lambda x: rounded(x, WORK.mp.floor), "ceil": lambda x: rounded(x, WORK.mp.ceil),
    "binom": lambda n, k: WORK.mp.mpf(math.comb(whole(n), whole(k))),
    "factorial": lambda n: WORK.mp.factorial(whole(n)),
    "factorial2": lambda n: WORK.mp.fac2(whole(n)),
    "gcd": lambda *numbers: WORK.mp.mpf(math.gcd(*map(whole, numbers))),
    "lcm": lambda *numbers: WORK.mp.mpf(math.lcm(*map(whole, numbers))),
}


def same_number(x, y):
    """Equal to half of the digits."""
    scale = max(1, abs(x), abs(y))
    return x == y or scale < WORK.mp.inf and (
        abs(x - y) <= scale * WORK.mp.mpf(10) ** (-WORK.mp.dps // 2))


def apart(a, b, known):
    """The difference of two values, 0 where they are the same. There are the more digits the more
    those met on the way have, before or behind the point."""
    WORK.mp.dps, WORK.needed, WORK.left = 60, 0, WORK.left - 10
    WORK.real = known and not {"i", "cis"} & (leaves(a) | leaves(b))
    x, y = values(a, b, known)
    if WORK.needed > 64:
        WORK.mp.dps = 60 + 2 * WORK.needed // 3
        if WORK.mp.dps > MAX_DIGITS:
            raise NotMath
        x, y = values(a, b, known)
    return 0 if same_number(x, y) else x - y


def values(a, b, known):
    known = {name: WORK.mp.convert(number) for name, number in known.items()}
    return value(a, known), value(b, known)


@functools.lru_cache
def points(names):
    """Values for variables, the same on every call: positive, then of both signs; then whole
    numbers, for what is defined on those alone."""
    rng = random.Random(1)  # 1013 is prime: no root or half of a period among the points
    reals = [(1, 9, Fraction(1, 5))] * 5 + [(1, 999, -1, -9, Fraction(-1, 7))] * 5
    return [{name: Fraction(rng.randint(1009, 4999), 1013) * rng.choice(scales) for name in names}
            for scales in reals] + [{name: rng.randint(2, 30) for name in names} for _ in range(8)]


def everywhere(a, b):
    """Whether two trees agree wherever both are defined, and at three points at least. Two
    different expressions of an answer's size do not agree at random points (Schwartz-Zippel)."""
    agreed = 0
    for known in points(tuple(sorted(symbols(a, b)))):
        try:
            if apart(a, b, known) != 0:
                return False
        except (NotMath, ArithmeticError, ValueError):
            continue
        agreed += 1
    return agreed >= 3


# ---------------------------------------------------------------------------------------------
# Maths: equality


def same(a, b):
    """Whether two canonical trees, predicted and gold, are one answer. Raises NotMath where they
    cannot be compared."""
    if a == b:
        return True
    match a, b:  # equations and inequalities: by their names, else by the difference of the sides
        case ("named", [x], name), ("named", [y], other) if (
                name in (other, other.partition("(")[0]) or other == name.partition("(")[0]):
            return same(x, y)  # y(x) = 2x and y = 2x
        case ("named" | "equation", *_), ("named" | "equation", *_):
            return proportional(unsolved(a), unsolved(b))  # x = 2y and y = x/2
        case ("relation", x, [sign]), ("relation", y, [other]) if sign == other and proportional(
                difference(*x), difference(*y), positive=sign in "<≤"):
            return True  # x < y and 2x < 2y
        case ("relation", x, signs), ("relation", y, others) if (
                len(signs) > 1 and len(symbols(a)) > 1):  # a < b < c
            return signs == others and all(map(same, x, y))
    a = plain(a, b)
    b = plain(b, a)
    if a == b:
        return True
    if a[0] == "based" and b[0] != "based":  # 101_2 for 5, but not 5 for 101_2
        a = ("num", a[1])
    if a[0] in REGIONS or b[0] in REGIONS:
        return same_region(a, b)
    match a, b:
        case ("list" | "set", x), ("list" | "set", y):
            return same_elements(x, y, "set" in (a[0], b[0]))
        case (("quantity", *_), _) | (_, ("quantity", *_)):
            return same_quantity(a, b)
        case (("text", x), ("sym", y)) | (("sym", y), ("text", x)):
            return x == y.lower()
        case (kind, [*x]), (other, [*y]) if kind == other and kind in STRUCTURES:
            return len(x) == len(y) and all(map(same, x, y))
    return not {a[0], b[0]} & STRUCTURES and same_value(a, b)


def plain(tree, other):
    """A tree as what the other one is: without its name; {5} for 5, and 1:2 for 1/2."""
    match tree:
        case ("named", [x], _):
            return x
        case ("set", [x]) if other[0] not in ("list", "set", *REGIONS):
            return x
        case (":", [x, y]) if other[0] != ":":
            return over(x, y)
    return tree


def same_elements(a, b, as_sets):
    """Equal without order. In a set a repeated element counts once."""
    if len(a) > MAX_ELEMENTS or len(b) > MAX_ELEMENTS:
        return False
    if as_sets:
        return all(any(same(x, y) for y in b) for x in a) and all(
            any(same(x, y) for x in a) for y in b)
    left = list(b)
    for x in a:
        partner = next((i for i, y in enumerate(left) if same(x, y)), None)
        if partner is None:
            return False
        del left[partner]
    return not left


def same_value(a, b):
    """Equal numbers or expressions. A constant of integration has any name, and may be added to a
    gold without one; a plain log has base e or base 10; an exact number may be rounded to the
    digits of a gold decimal."""
    if b[0] == "num" and a[0] in ("num", "decimal"):
        return a[1] == b[1]
    a = with_constant_of(a, b)
    names, kinds = symbols(a, b), leaves(a) | leaves(b)
    places = None if names or "decimal" in leaves(a) else decimal_places(b)
    for WORK.log in (WORK.mp.e, 10) if "log" in kinds else (WORK.mp.e,):
        if everywhere(a, b) if names else apart(a, b, {}) == 0:
            return True
        if places is not None:
            exact, its = values(a, b, {})
            beyond = (abs(exact) - abs(its)) * WORK.mp.mpf(10) ** places  # a half is rounded up
            if exact != WORK.mp.nint(exact) and exact * its > 0 and -0.500001 < beyond < 0.499999:
                return True
    return False


INTEGRATION = re.compile("[CcKk]|C_[0-9]")


def with_constant_of(a, b):
    """A tree with its constant of integration named as in the other one; without, if that has
    none."""
    names, others = symbols(a), symbols(b)
    own, its = ([name for name in extra if INTEGRATION.fullmatch(name)]
                for extra in (names - others, others - names))
    if len(own) == len(its) == 1 and "C" in f"{own}{its}".upper() and (
            is_constant(a, own[0]) and is_constant(b, its[0])):
        return substituted(a, {own[0]: ("sym", its[0])})
    if own and not its and own[0][0] == "C" and a[0] == "+" and is_constant(a, own[0]):
        return ("+", [item for item in a[1] if item != ("sym", own[0])])
    return a


def is_constant(tree, name):
    """Whether it is added to a function of x or the like, or is the factor of an e^x."""
    term = ("sym", name)
    return "e" in leaves(tree) or tree[0] == "+" and bool(symbols(tree) & set("xtyzus")) and (
        term in tree[1] or negated(term) in tree[1])


def decimal_places(tree):
    """Digits after the point of a decimal, scientific notation included; None if it is none."""
    match tree:
        case ("decimal", _, places):
            return places
        case ("*", [*_, ("decimal", _, places), ("^", [("num", 10), ("num", exponent)])]):
            return places - exponent
    return None


def proportional(a, b, positive=False):
    """Whether a = k b with a constant k: two equations are one where their differences are. For
    an inequality k is positive."""
    a = with_constant_of(a, b)
    names = symbols(a)
    if not names or names != symbols(b):
        return False
    anchor = {name: ("num", at) for name, at in points(tuple(sorted(names)))[0].items()}
    x, y = substituted(a, anchor), substituted(b, anchor)
    if positive and apart(times(x, y), ("num", 0), {}) <= 0:
        return False
    return everywhere(times(a, y), times(b, x))


def unsolved(tree):
    """What is zero where an equation holds."""
    if tree[0] == "named":
        return difference(("sym", tree[2].removeprefix("\\")), tree[1][0])
    return tree[1][0]


def same_region(a, b):
    """Whether two sets of real numbers, intervals or conditions on a variable, have the same
    elements: at the points where one may end, between them and beyond. Other variables get
    values."""
    names = variables(a) | variables(b)
    if len(names) > 1:
        return False
    name = max(names, default="x")
    others = tuple(sorted(symbols(a, b) - names))
    for known in points(others)[:10 if others else 1]:
        WORK.mp.dps, WORK.real = 60, False
        known = {name: WORK.mp.convert(number) for name, number in known.items()}
        marks = sorted(ends(a, name, known) + ends(b, name, known)) or [0]
        between = [(x + y) / 2 for x, y in itertools.pairwise(marks)]
        for x in [marks[0] - 1, *marks, *between, marks[-1] + 1]:
            if inside(a, name, {**known, name: x}) != inside(b, name, {**known, name: x}):
                return False
    return True


def variables(tree):
    """What the conditions in a set are about: of x > a and of a < x < b it is x."""
    if tree[0] in ("named", "member"):
        return {tree[2]}
    if tree[0] == "relation":
        names = {side[1] for side in tree[1] if side[0] == "sym"} - CONSTANTS.keys()
        return {max(names)} if names else symbols(tree)
    return set().union(*map(variables, parts(tree)))


def ends(tree, name, known):
    """Where a set may end: an interval's ends, a finite set's elements, and where the sides of a
    condition are equal."""
    if tree[0] == "inf":
        return []
    if tree[0] == "relation":
        return [x for p, q in itertools.pairwise(tree[1]) for sign in (ONE, MINUS_ONE)
                for x in zeros(without_abs(difference(p, q), sign), name, known)]
    if tree[0] not in STRUCTURES:
        return [value(tree, known)]
    return [end for part in parts(tree) for end in ends(part, name, known)]


def without_abs(tree, sign):
    """A tree in which |x| is x or -x."""
    if tree[0] == "abs":
        return times(sign, tree[1][0])
    return rebuilt(tree, lambda part: without_abs(part, sign))


def zeros(tree, name, known):
    """Where a polynomial of at most second degree is zero, by its values at four points."""
    if tree[1][0][0] == "inf" or tree[1][1][0] == "inf":
        return []
    mp = WORK.mp
    before, c, after, far = (value(tree, {**known, name: mp.mpf(x)}) for x in (-1, 0, 1, 3))
    a, b = (after + before) / 2 - c, (after - before) / 2
    if not same_number(9 * a + 3 * b + c, far):
        raise NotMath
    if same_number(a, 0):
        return [] if same_number(b, 0) else [-c / b]
    root = mp.sqrt(b * b - 4 * a * c)
    return [(-b - root) / (2 * a), (-b + root) / (2 * a)] if root.imag == 0 else []


def inside(tree, name, known):
    """Whether the variable's value is in a set."""
    match tree:
        case ("relation", sides, signs):
            return all(HOLDS[sign](apart(p, q, known), 0)
                       for sign, (p, q) in zip(signs, itertools.pairwise(sides), strict=True))
        case ("()" | "[)" | "(]" | "[]" as brackets, [low, high]):
            signs = ["≤" if bracket in "[]" else "<" for bracket in brackets]
            return inside(("relation", [low, ("sym", name), high], signs), name, known)
        case ("meet", items):
            return all(inside(item, name, known) for item in items)
        case ("minus", [first, *rest]):
            return inside(first, name, known) and not inside(("union", rest), name, known)
        case ("union" | "member", items, *_):
            return any(inside(item, name, known) for item in items)
        case ("set" | "list" | "named", items, *_):
            return any(inside(item, name, known) if item[0] == "named" else
                       apart(("sym", name), item, known) == 0 for item in items)
    raise NotMath


def read(text):
    """What an answer says: its canonical tree."""
    tree = parse(text)
    return canonical(tree if tree[0] in ("list", "or", "and") else ("list", [tree]))


def with_units(text):
    """A text in one spelling with the letters behind a number as units, if they are some."""
    letters = UNIT_LETTERS.search(text)
    if not letters or unit(letters[1])[2]:
        return text
    return f"{text[:letters.start()]}⟪{letters[1]}⟫"


def bare_text(text):
    """A text without what does not matter: braces around a letter, blanks not between digits."""
    text = re.sub(r"\{\s*([\w+-]|\\[a-z]+)\s*\}", r"\1", text)
    return re.sub(r"[⟪⟫]|(?<!\d) | (?!\d)", "", text)


def same_answer(predicted, gold):
    """Whether two answers without an option's letter are equal: as formulas, else as texts."""
    predicted, gold = respell(predicted), respell(gold)
    try:
        a, b = read(predicted), read(gold)
        if same(a, b):
            return True
        # letters are units where the other side has units; m too where it knows no variables
        ours, its = with_units(predicted), with_units(gold)
        x, y = (a if ours == predicted else read(ours)), (b if its == gold else read(its))
        ours_too = "quantity" in leaves(y) or not symbols(y) and ours[-2:] not in UNIT_CAPITALS
        return (x != a and ours_too or y != b and "quantity" in leaves(x)) and same(x, y)
    except (NotMath, ValueError, RecursionError):
        return bare_text(predicted) == bare_text(gold) != ""


def compare(predicted, gold):
    """Whether two answers are equal, by rules of rising cost."""
    if predicted.strip() == gold.strip():
        return True
    begin_work()
    letter, meaning = option(gold)
    chosen, rest = option(predicted)
    if letter and letter.isupper():  # the letter alone, its value alone or both
        if not chosen:
            return meaning != "" and same_answer(predicted, meaning)
        return chosen.upper() == letter and (not rest or not meaning or same_answer(rest, meaning))
    if chosen and chosen.isupper() and re.match(r"\S+[ ~]", option_text(predicted)):
        return same_answer(predicted, gold) or same_answer(rest, gold)
    return same_answer(predicted, gold)


def math_equal(predicted, gold):
    """Whether two answers are the same: bare LaTeX or text, or with a box around it. What a
    hostile formula provokes in the arithmetic is no equality."""
    try:
        return compare(predicted, gold)
    except (ArithmeticError, ValueError, TypeError, NotMath):
        return False


def math_verdict(response, gold):
    """The verdict on a response's answer, see `verify_math`."""
    extracted, how = find_answer(response)
    if how != "box" and option(gold)[0] and (found := find_letter(response)):
        extracted, how = found, "phrase"
    if extracted is None or how == "number" and not is_number(gold):
        return verdict(None, False)
    return verdict(extracted, math_equal(extracted, gold))


def verdict(extracted, passed):
    return Verdict(passed, "correct" if passed else "wrong answer" if extracted else "no answer",
                   extracted)


def is_number(gold):
    begin_work()
    try:
        tree = read(respell(gold))
    except (NotMath, ValueError, RecursionError):
        return False
    return tree[0] not in STRUCTURES - {"quantity"} and not symbols(tree)


# ---------------------------------------------------------------------------------------------
# Multiple choice


OPTION = re.compile(r"(?:(?:option|choice|answer)\b\s*+(?::\s*+)?)?(?:[(\[]\s*([A-J])\s*[)\]]"
                    r"|([A-J])\s*[.):,]|([A-J])\s*$)", re.IGNORECASE)
SECOND_OPTION = re.compile(
    r"[ \t]*+(?:(?:[,;/&|+∪>-]|\b(?:and|or|plus|as well as|also|maybe|then)\b)[ \t]*+)*+[(\[]?"
    r"[A-HJ][)\].]?(?![A-Za-z0-9']| (?:is|are|was) )|[)\].,;: ]*+(?:\?|(?i:\(?or\b|only if|if|when|"
    r"unless|assuming|no\b|wait|(?:which )?is (?:wrong|incorrect|false)|wrong|incorrect|false|"
    r"true))")
DECORATION = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:bf|rm|it))\s*\{|\\[()\[\]]|</?\w+>|"
                        r"[*_`\"“”${}]|(?<![a-z])'|'(?![a-z])")
LETTER = r"""(?: [(\[]\s*([A-Ja-j])\s*[)\]] | (?![AI]\s++(?!only)[a-z])([A-J])(?![A-Za-z0-9'^_+*-]
    |\.[A-Z]|\s*+[=^+*<>/\\]|\s\w\^) | ([a-j])(?=\W*+$) )"""
# What says which option it is, the surest first: "the answer is" before a letter; "is correct"
# behind one; and, where the line ends with it, "choose" or a mere "so" before it.
CHOICES = [re.compile(rf"(?xm){pattern}") for pattern in (
    rf"""\b(?i:ans(?:wer)?|option|choice|(?:correct|right|best)\s++(?:one|letter|statement|option))
    (?i:\s++(?:choice|option|letter|to\s+th(?:is|e)\s+question))?\s*+
    (?:(?i:is|(?:must|would|should|will)\s+be)(?![a-z])|[:=-]|(?<=answer)\s(?=\([A-J]\)))[\s:]*+
    (?i:(?:not\s++\(?[A-J]\)?,?\s++but|definitely|clearly|indeed|obviously|therefore|probably
    |option|choice|letter)\s++)*+{LETTER}""",
    r"""(?:^|[.!?:,]\s|\b(?i:option|choice|answer|so|thus|hence|therefore),?\s)\W?(?![AI]\s++(?!is))
    \(?([A-J])\)?\s++is\s++(?:the\s++)?(?i:correct|right|best|answer)\b""",
    r"""\b(?i:choose|select|pick|thus|therefore|hence|so|definitely|it['i\s]*s|which\s+is
    |(?:must|has\s+to)\s+be|go(?:ing)?\s+with|not\s++\(?[A-J]\)?,?\s++but)\b[\s,:]*+
    (?i:option\s++|choice\s++)?(?:\(([A-J])\)|([A-HJ]))(?=\W*+$)""")]


def choice_letter(text):
    letter, _ = option(text)
    return letter and letter.upper()


def option(text):
    """The letter of an option and what is behind it, of `\\textbf{(C)}\\ 12` C and 12; None of what
    begins with no letter or lists two."""
    text = option_text(text)
    match = OPTION.match(text)
    if not match or SECOND_OPTION.match(text, match.end()) or re.search(
            r"[,;] ?\(?[A-J][:)]", text):
        return None, text
    return match[match.lastindex], re.sub(r"^[\s~:.,;$]+", "", text[match.end():])


def option_text(text):
    text = re.sub(r"\\(?:text(?:bf|it|rm|sf)?|math(?:rm|bf|it|sf))\s*\{([^{}]*)\}", r"\1",
                  last_box(text) or text)
    return re.sub(r"\\[ ,;:]", " ", text).strip(" $*`\n")


def find_letter(response):
    """The letter, A to J, that a response chooses, or None: the boxed one, else the one that "the
    answer is", "is correct" and their like name last, else a lone one, or one alone in bold."""
    answer, how = find_answer(response)
    if how == "box" and (letter := choice_letter(answer)):
        return letter
    solution = re.split(END_OF_THOUGHT, response)[-1]
    text = DECORATION.sub("", solution)
    for pattern in CHOICES:
        if matches := list(pattern.finditer(text)):
            match = matches[-1]
            after = text[match.end():]
            other = re.search(r"\bor\b\W*[A-J]\b", SENTENCE_END.split(after)[0])
            if other or SECOND_OPTION.match(after) or TAKEN_BACK.match(after) or (
                    DENIED.search(CLAUSE_END.split(text[:match.start()])[-1])):
                return None
            return match[match.lastindex].upper()
    if how == "box":
        return None
    bold = set(re.findall(r"\*\*\s*\(?([A-J])\)?[.):]?\s*\*\*", solution))
    if len(bold) == 1:
        return bold.pop()
    letter, rest = option(text.replace("####", ""))
    alone = "\n" not in text.strip() and not rest[:1].islower() and not re.search(
        r"\b[A-J][).:]", rest)
    return letter.upper() if letter and alone else None


def choice_verdict(response, gold):
    """The verdict on the letter that a response chooses."""
    letter = find_letter(response)
    return verdict(letter or last_box(response) or None,
                   letter is not None and letter == choice_letter(gold))


# ---------------------------------------------------------------------------------------------
# Programs: which text of a response is the program


def find_program(response):
    """The program of the solution section, if that has blocks, or else of the response; or None:
    the last block labelled Python, else the last without a label that is Python and no mere
    output, else the last of all. One line or a doctest does not replace what is longer."""
    solution = response.rpartition(TAGS[2])[2].partition(TAGS[3])[0]
    blocks = fenced_blocks(solution) or fenced_blocks(response)
    return max(reversed(blocks), key=rank)[1] if blocks else None  # of equals the last


def rank(block):
    """By what blocks are compared, the most important first."""
    label, text = block
    longer = "\n" in text.strip() and not text.lstrip().startswith(">>>")
    labelled = PYTHON.fullmatch(label) is not None
    program = labelled or label == "" and does_something(text)
    return program and longer, labelled, program


def fenced_blocks(text):
    """(label, content) of the fenced blocks, as models write them: a fence may open behind words,
    close with a tag or a full stop behind it, or never close. In time linear in the text."""
    blocks, fence = [], None
    for line in text.replace("\r\n", "\n").split("\n"):
        opening = FENCE.search(line)
        label = opening[2].strip("{}.").lower() if opening else ""
        if fence and line.strip().startswith(fence):
            fence = None
            if not PYTHON.fullmatch(label):
                continue
        if fence:
            blocks[-1][1].append(line)
        elif opening and not (opening[3].strip() and line[:opening.start()].strip()):
            fence = opening[1]
            blocks.append((label, []))
    return [(label, textwrap.dedent("\n".join(lines))) for label, lines in blocks]


def does_something(text):
    """Whether it is Python with more in it than values, which may be output."""
    return any(not isinstance(statement, ast.Expr) or isinstance(statement.value, ast.Call)
               for statement in syntax_tree(text).body)


def syntax_tree(source):
    """A Python text as a module's syntax tree, without a statement if it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.parse("")


# ---------------------------------------------------------------------------------------------
# Programs: tests, and whether a result is the expected one


def is_test(test):
    match test:
        case ({"input": str(), "output": str()}
              | {"assert": str()}
              | {"fn_name": str(), "args": list(), "expected": _}):
            return isinstance(test.get("setup", ""), str)
    return False


def can_fail(test):
    """Whether a test says anything: in one under `assert` an assert must be run, its own or the
    setup's. What is not are functions and classes that nothing names, and what is there for a
    script's start."""
    if "assert" not in test:
        return True
    tree = syntax_tree(test.get("setup", "") + "\n" + test["assert"])
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for statement in tree.body:
        at_start = isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test)
        if not at_start and getattr(statement, "name", None) in {None, *named}:
            for node in ast.walk(statement):
                name = getattr(node, "id", getattr(node, "attr", ""))
                if isinstance(node, (ast.Assert, ast.Raise)) or name.startswith("assert"):
                    return True
    return False


def same_output(expected, got):
    """Whether printed bytes are the expected ones: line by line and word by word, and where a
    decimal is expected a number close to it."""
    expected, got = expected.strip(), got.strip()
    return expected.count(b"\n") == got.count(b"\n") and all(
        map(same_line, expected.split(b"\n"), got.split(b"\n")))


def same_line(expected, got):
    expected = expected.split()
    got = got.split(None, len(expected) + 1)  # no more words than it takes to see that there are
    return len(expected) == len(got) and all(
        a == b or DECIMAL.fullmatch(a) and SIGNED.fullmatch(b) and math.isfinite(float(a))
        and close(float(a), float(b)) for a, b in zip(expected, got, strict=True))


def same_result(expected, got):
    """Whether a returned value is the expected one, both as JSON has them: a tuple is a list, keys
    are texts, 2.0 is 2 but True is not 1, and floats are close."""
    kinds = {type(expected), type(got)}
    if kinds == {dict}:
        return expected.keys() == got.keys() and all(
            same_result(value, got[key]) for key, value in expected.items())
    if kinds == {list}:
        return len(expected) == len(got) and all(map(same_result, expected, got))
    if isinstance(expected, float) and kinds <= {int, float}:
        return close(expected, got)
    return (expected == got and bool not in kinds) or expected is got


def close(expected, got):
    """Whether a number is the expected decimal, as contests have it."""
    try:
        return math.isclose(expected, got, rel_tol=1e-6, abs_tol=1e-6)
    except OverflowError:  # an int beyond all floats
        return False


# ---------------------------------------------------------------------------------------------
# Programs: the sandbox
#
#     command --> worker, one a core --> zygote --fork, once a test--> program
#                 (this and above)       (below)             and where a test asserts, the judge


class Sandbox:
    """A zygote: one clean process with the standard library imported, which forks a confined child
    for every test. What is expected of a program never gets there."""

    def __init__(self, file=__file__):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {
            "LC_ALL": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",
            # some builds of Python do not start without
            "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
        set_limit(resource.RLIMIT_STACK, 1 << 29)  # for deep recursion: it takes effect at an exec
        self.process = subprocess.Popen(
            [sys.executable, "-I", file, "--zygote", str(theirs.fileno())],
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()])
        theirs.close()
        codes, output, _ = self.run("main", ["", PROBE], str(os.getpid()).encode())
        if codes != [0]:  # for want of time or memory
            raise RuntimeError(f"the sandbox's own test ended with {codes}")
        self.holes = output.decode().split()

    def run(self, mode, source, given, timeout=10, memory=DEFAULT_MEMORY):
        """Run a program by its source, [setup, code]. mode "main": given is its input; "call": the
        function and arguments follow in the source; "assert": given is the judge's source, which
        runs beside it. Returns the exit codes (None: too late), of the judge last; what was
        printed; and the result: an error's name, a call's value or the judge's verdict. With a
        judge, the program's own result is in the place of what was printed."""
        request = {"mode": mode, "timeout": timeout, "memory": memory}
        files = [memory_file(content) for content in (
            json.dumps(source).encode(), given, b"", b"")]
        try:
            socket.send_fds(self.socket, [json.dumps(request).encode()], files)
            codes = json.loads(self.socket.recv(10000))
            return codes, *(os.pread(file, MAX_OUTPUT, 0) for file in files[2:])
        finally:
            for file in files:
                os.close(file)


def memory_file(content):
    """A file without a name, to be read from its start."""
    file = os.memfd_create("sky-t1")
    os.pwrite(file, content, 0)
    return file


def set_limit(kind, soft, hard=None):
    """Sets a resource limit, the soft one alone or both, as far as the machine's own allows."""
    most = resource.getrlimit(kind)[1]
    wanted = soft, most if hard is None else hard
    resource.setrlimit(kind, wanted if most < 0 else [min(value, most) for value in wanted])


# Tries what must not be possible, and prints what was.
PROBE = """
import ctypes, os, socket, sys
parent = int(input())
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, action):
    try:
        if action():
            print(name, flush=True)
    except BaseException:
        pass
attempt("fork", lambda: os.fork() or os._exit(0))
attempt("socket", lambda: socket.socket())
attempt("socket", lambda: socket.socket(socket.AF_UNIX))
attempt("write", lambda: os.remove(open("/tmp/sky-t1-probe", "w").name) is None)
attempt("write", lambda: os.remove(open("/dev/shm/sky-t1-probe", "w").name) is None)
attempt("read", lambda: os.open("/etc/passwd", os.O_RDONLY) + 1)
attempt("read", lambda: os.open("/proc/%d/mem" % parent, os.O_RDONLY) + 1)
attempt("signal", lambda: os.kill(parent, 0) is None)
attempt("trace", lambda: libc.ptrace(0x4206, parent, 0, 0) == 0)  # PTRACE_SEIZE stops nothing
attempt("limit", lambda: libc.prlimit(os.getppid(), 7, 0, 0) == 0)
attempt("memory", lambda: bytearray(1 << 36))
attempt("exec", lambda: os.execv("/bin/sh", ["sh", "-c", "echo exec"]))
"""


def the_sandbox(allow_unsafe=False):
    """This process's sandbox. One that does not hold is refused, unless that was asked for."""
    global SANDBOX
    if sys.platform != "linux":
        raise BadInput("programs are judged on Linux only")
    SANDBOX = SANDBOX or Sandbox()
    if SANDBOX.holes and not allow_unsafe:
        raise BadInput(f"programs cannot be confined here: one could {', '.join(SANDBOX.holes)}; "
                       "run where the kernel has a system-call filter (seccomp), or accept the "
                       "danger with --allow_unsafe")
    return SANDBOX


def containment_verdict(allow_unsafe):
    """Whether programs are confined here, as the reason of a verdict."""
    holes = ", ".join(the_sandbox(allow_unsafe).holes)
    return Verdict(True, f"programs are not confined: one could {holes}" if holes else
                   "programs are confined: limits, a system-call filter")


def program_verdict(code, tests, timeout=10.0, memory=DEFAULT_MEMORY, allow_unsafe=False):
    """The verdict on a program: a pass needs at least one test and every one of them passed."""
    signal.setitimer(signal.ITIMER_REAL, 20 * timeout + 30)
    for number, test in enumerate(tests, 1):
        if not is_test(test):
            raise BadInput(f"test {number} has neither input and output, nor fn_name, args and "
                           "expected, nor assert (setup is text)")
    for number, test in enumerate(tests, 1):
        reason = run_test(the_sandbox(allow_unsafe), code, test, timeout, memory)
        if reason == "wrong answer":
            reason += f" on test {number}"
        if reason != "correct":
            return Verdict(False, reason, code)
    return Verdict(True, "correct", code) if tests else Verdict(False, "no tests", code)


def run_test(sandbox, code, test, timeout, memory):
    """`correct`, or in what way a program fails one test."""
    if not can_fail(test):
        return "no test: it asserts nothing"
    setup = test.get("setup", "")
    mode, source, given = "main", [setup, code], b""
    if "assert" in test:
        mode, given = "assert", json.dumps([setup, test["assert"]]).encode()
    elif "fn_name" in test:
        mode, source = "call", [setup, code, test["fn_name"], test["args"]]
    else:
        given = test["input"].encode()
    codes, output, result = sandbox.run(mode, source, given, timeout, memory)
    if None in codes:
        return "timeout"
    if codes[1:] == [GONE]:
        return failure(codes[0], output)
    if codes[-1] != 0:
        return failure(codes[-1], result)
    if mode == "assert":
        return result.decode()
    if mode == "main":
        same = same_output(test["output"].encode(), output)
    else:
        try:
            same = same_result(json.loads(json.dumps(test["expected"])),
                               json.loads(result[:MAX_RESULT]))
        except (ValueError, RecursionError):
            return "runtime error: no result"
    return "correct" if same else "wrong answer"


def failure(code, result):
    """A short reason. What the program says of itself only names a failure, never makes a pass."""
    name = result[:60].decode("ascii", "replace")
    if name in ("memory", "syntax error"):
        return name
    if not re.fullmatch(r"[\w ]+", name):
        name = f"exit {code}" if code >= 0 else f"signal {-code}"
    return f"runtime error: {name}"


def code_verdict(response, tests, *limits, **options):
    """The verdict on the program of a response."""
    code = find_program(response)
    if code is None:
        return Verdict(False, "no answer")
    return program_verdict(code, tests, *limits, **options)


# ---------------------------------------------------------------------------------------------
# Programs: the zygote. From here to the samples, nothing runs in a worker's process.


def zygote(descriptor):
    """The process that a Sandbox talks to. It imports what programs may want, for they can open no
    file, then forks on request. It never reads what it hands on. It ends with the process that
    started it, however that comes about, and its children with it."""
    channel = socket.socket(fileno=descriptor)
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    sys.set_int_max_str_digits(0)
    threading.stack_size(16 << 20)  # a thread's default is the raised limit of the stack
    for name in PRELOADED:
        try_import(name)
    sys.meta_path.insert(0, Shelf())
    gc.collect()
    gc.freeze()
    uid = private_user()
    filtered = os.uname().machine in MACHINES and libc.prctl(21) >= 0  # PR_GET_SECCOMP
    own = {
        "parent": os.getpid(),
        "uid": uid,
        "tasks": tasks_of(uid or os.getuid()) + 500,
        "filter": system_call_filter() if filtered else b""}
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    while True:
        message, files, _, _ = socket.recv_fds(channel, 10000, 4)
        if not message:
            return
        codes = serve(json.loads(message) | own, files)
        for file in files:
            os.close(file)
        channel.send(json.dumps(codes).encode())


class Shelf(importlib.abc.Loader):
    """The standard library as code in memory that a fork need not copy. As a finder of modules it
    needs no file, which a program could not open; only what is written in C is imported at once."""

    def __init__(self):
        self.places, self.code = {}, bytearray()  # a module's start in the code, whether a package
        folder = os.path.dirname(os.__file__)
        self.take([folder, os.path.join(folder, "lib-dynload")])
        # private and not to be written: no program changes what the next one imports
        self.code = mmap.mmap(memory_file(self.code), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
        # weakly held by zoneinfo itself
        self.zones = [zoneinfo.ZoneInfo(name) for name in zoneinfo.available_timezones()]

    def take(self, folders, prefix=""):
        for module in pkgutil.iter_modules(folders, prefix):
            spec = module.module_finder.find_spec(module.name)
            if isinstance(spec.loader, importlib.machinery.ExtensionFileLoader):
                try_import(module.name)
            elif module.name != "test":
                start = len(self.code)
                self.code += marshal.dumps(spec.loader.get_code(module.name))
                self.places[module.name] = start, module.ispkg
                self.take(spec.submodule_search_locations or (), module.name + ".")

    def find_spec(self, name, path, target=None):
        if name in self.places:
            return importlib.util.spec_from_loader(name, self, is_package=self.places[name][1])

    def exec_module(self, module):
        code = marshal.loads(memoryview(self.code)[self.places[module.__name__][0]:])
        exec(code, module.__dict__)


def try_import(name):
    try:
        importlib.import_module(name)
    except Exception:  # this build or machine lacks it
        pass


def serve(request, files):
    """Fork what a request asks for and wait for it; the exit codes as `wait_for` gives them."""
    source, given, output, result = files
    null = 0  # as a Sandbox has started this process
    if request["mode"] != "assert":
        pids = [start(request, run_solution, given, output, null, result, source)]
    else:
        calls, call, answers, answer = pipes = [*os.pipe(), *os.pipe()]
        # the judge waits while the program works: its own CPU time is the tests' alone
        pids = [start(request, run_solution, null, null, null, output, source, calls, answer),
                start(request, run_judge, null, null, null, result, given, answers, call)]
        for file in pipes:
            os.close(file)
    return wait_for(pids, request["timeout"])


def start(request, work, *files):
    """A confined process in which files are the descriptors 0, 1, 2, ... and no others are open: 3
    is for what it says, 4 its source. It runs work, which never returns."""
    pid = os.fork()
    if pid:
        return pid
    try:
        # aside first, lest one be overwritten before it is copied
        aside = [fcntl.fcntl(file, fcntl.F_DUPFD, 50) for file in files]
        for number, file in enumerate(aside):
            os.dup2(file, number)
        os.closerange(len(files), 4096)
        confine(request)
        with open(4, "rb") as source:
            work(request["mode"], *json.load(source))
    except BaseException as error:
        os.write(3, error_name(error))
    finally:
        os._exit(1)


def wait_for(pids, timeout):
    """The exit codes of processes (a signal is a negative one), None for one that took too long:
    the kernel ends what has used up its CPU time, this function what sleeps. With the last of them,
    which is the judge if there is one, all end."""
    handle = os.pidfd_open(pids[-1])
    ended, _, _ = select.select([handle], [], [], 3 * timeout + SLACK)
    os.close(handle)
    codes = []
    for pid in pids:
        os.kill(pid, signal.SIGKILL)  # no matter to what has ended
        _, status, usage = os.wait4(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        late = not ended or code == -signal.SIGXCPU or usage.ru_utime + usage.ru_stime > timeout
        codes.append(None if late else code)
    return codes


# ---------------------------------------------------------------------------------------------
# Programs: what a process does to itself, before it sees a program


def confine(request):
    """What a child does to itself before a byte of the program is parsed: limits, user, and last
    the filter, which forbids what came before it."""
    limit_resources(request)
    if uid := request["uid"]:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != request["parent"]:
        os._exit(71)
    if request["filter"]:
        install_filter(request["filter"].replace(struct.pack("I", OWN_PID),
                                                 struct.pack("I", os.getpid())))


def limit_resources(request):
    seconds = math.ceil(request["timeout"])
    set_limit(resource.RLIMIT_CPU, seconds, seconds + 1)
    for kind, most in (
            (resource.RLIMIT_AS, request["memory"]),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_FSIZE, MAX_OUTPUT),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_NPROC, request["tasks"])):
        set_limit(kind, most, most)


def private_user():
    """Root becomes a user that no one else is, so that its limits count this sandbox's tasks alone;
    0 where that is not possible."""
    with open("/proc/self/uid_map") as file:  # a container has fewer
        users = max(int(first) + int(count) for first, _, count in map(str.split, file))
    return 0 if os.getuid() or users < 10_000 else users - 2 - os.getpid() % (users // 2)


def tasks_of(uid):
    """Threads of a user, who may run other things: the limit on them counts all."""
    total = 0
    for task in glob.iglob("/proc/[0-9]*/task/*"):
        try:
            total += os.stat(task).st_uid == uid
        except OSError:  # it has ended meanwhile
            pass
    return total


# System calls that a program may make: numbers on x86_64 and on aarch64 (-1: has none), and where
# a rule follows, what it says.
# linux/arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h
SYSTEM_CALLS = """
read 0 63, write 1 64, close 3 57, stat 4 -1, fstat 5 80, lstat 6 -1, poll 7 -1, lseek 8 62,
mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135,
rt_sigreturn 15 139, pread64 17 67, readv 19 65, writev 20 66, access 21 -1, pipe 22 -1,
select 23 -1, sched_yield 24 124, mremap 25 216, madvise 28 233, dup 32 23, dup2 33 -1,
pause 34 -1, nanosleep 35 101, getitimer 36 102, alarm 37 -1, setitimer 38 103, getpid 39 172,
exit 60 93, uname 63 160, fsync 74 82, getcwd 79 17, readlink 89 -1, umask 95 166,
gettimeofday 96 169, getrlimit 97 163, getrusage 98 165, sysinfo 99 179, times 100 153,
getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173, getpgrp 111 -1,
rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132,
arch_prctl 158 -1, gettid 186 178, time 201 -1, futex 202 98, sched_getaffinity 204 123,
epoll_create 213 -1, getdents64 217 61, set_tid_address 218 96, restart_syscall 219 128,
fadvise64 221 223, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115,
exit_group 231 94, epoll_wait 232 -1, epoll_ctl 233 21, newfstatat 262 79, readlinkat 267 78,
faccessat 269 48, pselect6 270 72, ppoll 271 73, set_robust_list 273 99, get_robust_list 274 100,
epoll_pwait 281 22, eventfd2 290 19, epoll_create1 291 20, dup3 292 24, pipe2 293 59,
getrandom 318 278, membarrier 324 283, statx 332 291, rseq 334 293, close_range 436 436,
faccessat2 439 439, open 2 -1 no_file, openat 257 56 no_file, clone3 435 435 no_call,
openat2 437 437 no_call, clone 56 220 clone, kill 62 129 kill, tgkill 234 131 kill,
prlimit64 302 261 prlimit64, fcntl 72 25 fcntl
"""
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
OWN_PID = 0x7E57AB1E  # stands for the process's own number, no other is as large
MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # column, architecture


def system_call_filter():
    """The program (linux/filter.h) of an allow-list: threads but no processes, signals and limits
    of its own alone, no file as if there were none, and EPERM for all else."""
    column, architecture = MACHINES[os.uname().machine]
    allow = instruction(RETURN, 0x7FFF0000)
    kill = instruction(RETURN, 0x80000000)
    refuse, no_file, no_call = (instruction(RETURN, 0x50000 | number)
                                for number in (errno.EPERM, errno.ENOENT, errno.ENOSYS))
    first = instruction(LOAD, 16)  # the lower 32 bits of an argument
    second = instruction(LOAD, 24)
    own = when(EQUAL, OWN_PID, allow)
    rules = {
        "no_file": no_file,
        "no_call": no_call,
        "kill": first + own + refuse,
        "clone": first + when(ANY_BIT, 0x10000, allow) + refuse,  # CLONE_THREAD
        "prlimit64": first + when(EQUAL, 0, allow) + own + refuse,
        "fcntl": second + b"".join(when(EQUAL, command, refuse) for command in (
            fcntl.F_SETOWN, 10, 15)) + allow}  # F_SETSIG, F_SETOWN_EX
    program = instruction(LOAD, 4) + instruction(EQUAL, architecture, 1) + kill
    program += instruction(LOAD, 0) + when(AT_LEAST, 0x40000000, refuse)  # calls of x32
    for entry in SYSTEM_CALLS.split(","):
        fields = entry.split()
        if fields[column] != "-1":
            program += when(EQUAL, int(fields[column]), rules.get(fields[-1], allow))
    return program + refuse


def when(code, number, then):
    """Instructions that are run if a comparison holds; else it skips them."""
    return instruction(code, number, 0, len(then) // 8) + then


def instruction(code, number, skip_if_true=0, skip_if_false=0):
    return struct.pack("HBBI", code, skip_if_true, skip_if_false, number)


def install_filter(program):
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    if libc.prctl(22, 2, header) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        os._exit(72)  # never run a program unconfined


# ---------------------------------------------------------------------------------------------
# Programs: the process of a program


def names_of(modules):
    """All names of these modules, and the modules that contests know."""
    names = {}
    exec("\n".join(f"from {name} import *" for name in modules), names)
    exec(f"import {', '.join(CONTEST_MODULES)}", names)
    return names


USUAL_NAMES, CONTEST_NAMES = names_of(USUAL_MODULES), names_of(CONTEST_MODULES)


def run_solution(mode, setup, code, *call):
    """The program's process, in one of the modes of `Sandbox.run`. It may compute, read descriptor
    0 and write to 1 and 3, the result; 5 and 6 are calls and answers where a judge asks."""
    builtins.open = io.open = open_by_number
    sys.stdin.reconfigure(errors="surrogateescape")
    module = type(sys)("__main__" if mode == "main" else "solution")
    sys.modules["__main__"] = sys.modules[module.__name__] = module
    sys.argv[:] = ["program.py"]
    namespace = vars(module)
    namespace.update(__file__="program.py", __builtins__=builtins)
    if mode != "main":
        sys.setrecursionlimit(50_000)
        vars(builtins).update(CONTEST_NAMES | vars(builtins))
    status = 0
    try:
        for text, name in (setup, "setup.py"), (code, "program.py"):
            exec(compile(text, name, "exec"), namespace)
        if mode == "call":
            name, arguments = call
            holder = namespace.get("Solution")
            function = getattr(holder(), name) if hasattr(holder, name) else namespace[name]
            os.write(3, json.dumps(function(*arguments), default=as_json).encode())
        elif mode == "assert":
            answer_calls(namespace)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else error.code is not None
    # as at an interpreter's end; files that the program left open are closed with their names
    flush = [lambda: sys.stdout.flush(), sys.__stdout__.flush]
    for finish in (
            threading._shutdown,
            atexit._run_exitfuncs,
            *flush,
            namespace.clear,
            gc.collect,
            *flush):
        try:
            finish()
        except BaseException:  # it has closed or replaced them: what it printed tells
            pass
    os._exit(status & 255)


STANDARD_FILES = {
    "/dev/stdin": 0,
    "/dev/fd/0": 0,
    "/proc/self/fd/0": 0,
    "/dev/stdout": 1,
    "/dev/stderr": 2,
    os.devnull: 2}


def open_by_number(file, *arguments, real=io.open, **keywords):
    """open(), which finds standard input and output also where nothing may be opened."""
    number = STANDARD_FILES.get(str(file))
    return real(file if number is None else os.dup(number), *arguments, **keywords)


def as_json(value):
    """For json.dumps: what is a number or a list in all but its type."""
    if isinstance(value, (Fraction, decimal.Decimal)):
        return float(value)
    return unwrapped(value)


def unwrapped(value):
    """A value of numpy's as a plain one. NotPlain for what is none."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise NotPlain(f"a {type(value).__name__} does not leave its process")


class NotPlain(Exception):
    """A value is no plain data, and so stays in its process."""


def error_name(error):
    """What a process says of an exception."""
    if isinstance(error, MemoryError):
        return b"memory"
    if isinstance(error, SyntaxError):
        return b"syntax error"
    name = error if isinstance(error, NotPlain) else type(error).__name__
    return f"{name}".encode()


# ---------------------------------------------------------------------------------------------
# Programs: the judge, who runs a test's asserts and has the program answer its calls


class Channel:
    """One end of the talk of a judge with a program, a line of JSON a message:

        judge                                         program
          <----------------- ["add", "helper"] ----     its functions, once
          ---- ["add", arguments, keywords] ------->     a call
          <-------- ["value", value, arguments] ----     what it gave, and the arguments after it,
          <------- ["error", kind, arguments] ------     or its exception

    What they hold goes through `encode` and `decode`, so that nothing of the program's making, but
    plain data, is ever in the judge's process."""

    def __init__(self, incoming, outgoing):
        self.incoming, self.outgoing = open(incoming, "rb"), open(outgoing, "wb")

    def send(self, *message):
        try:
            self.outgoing.write(json.dumps(message, default=repr).encode() + b"\n")
            self.outgoing.flush()
        except BrokenPipeError:
            os._exit(GONE)

    def receive(self):
        line = self.incoming.readline(MAX_OUTPUT)
        if not line.endswith(b"\n"):
            os._exit(GONE)
        return json.loads(line)


def answer_calls(namespace):
    """The program's side of an assert test."""
    channel = Channel(5, 6)
    channel.send(*[name for name, value in namespace.items() if callable(value)])
    while True:
        name, arguments, keywords = channel.receive()
        try:
            arguments = decode(arguments)
            value = namespace[name](*arguments, **decode(keywords))
            channel.send("value", encode(value), encode(arguments))
        except BaseException as error:
            known = [kind for kind in type(error).__mro__ if kind in ERRORS.values()]
            channel.send("error", known[0].__name__ if known else "RuntimeError", error.args)


def run_judge(mode, setup, test):
    """The judge's process: descriptors 3 verdict, 5 answers, 6 calls. It runs the test, in which
    the program's functions are calls of the other process."""
    channel, calls = Channel(5, 6), []
    sys.setrecursionlimit(50_000)

    def stand_in(name):
        def call(*arguments, **keywords):
            calls.append(name)
            channel.send(name, encode(list(arguments)), encode(keywords))
            kind, value, after = channel.receive()
            if kind == "error":
                raise ERRORS[value](*after)
            for ours, theirs in zip(arguments, decode(after), strict=True):
                if type(ours) is type(theirs) and hasattr(ours, "clear"):  # changed in place
                    ours.clear()
                    (ours.extend if hasattr(ours, "extend") else ours.update)(theirs)
            return decode(value)
        return call
    vars(builtins).update(USUAL_NAMES | vars(builtins))
    namespace = {"__name__": "judge"}
    try:
        functions = channel.receive()
        exec(compile(setup, "setup.py", "exec"), namespace)
        for name in tested_names(functions, test, namespace):
            namespace[name] = stand_in(name)
        exec(compile(test, "test.py", "exec"), namespace)
        verdict = b"correct" if calls else b"no test: it does not call the program"
    except AssertionError:
        verdict = b"wrong answer"
    os.write(3, verdict)
    os._exit(0)


def tested_names(functions, test, namespace):
    """The functions of a program that a test means: not what the setup defines, and a usual or
    built-in name only if it is the function under test, check(max), or all that the test calls: a
    false len or Counter must not make a test hold."""
    named = set(re.findall(r"\w+", test)).intersection(functions) - namespace.keys()
    usual = vars(builtins).keys()
    known = named & usual
    if len(named) == 1 and known == usual & set(re.findall(r"(?<![\w.])(\w+)\s*\(", test)):
        return named
    return named - known | {name for name in known if re.search(rf"\bcheck\({name}\)", test)}


# A program's exceptions that become the judge's: none that would end a loop or the process, nor
# those whose arguments are more than JSON.
ERRORS = {"NotPlain": NotPlain} | {
    name: kind for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(
        kind, (StopIteration, StopAsyncIteration, UnicodeError, ExceptionGroup))}


def encode(value):
    """A value as JSON: of plain data and of the standard library's types in PARTS. An iterator is
    the list of what it yields. NotPlain for all else."""
    if value is None or isinstance(value, (int, float, str)):
        return value
    for kind in type(value).__mro__:
        if kind is tuple and hasattr(value, "_fields"):
            return ["namedtuple", *map(encode, (type(value).__name__, value._fields, *value))]
        if kind in PARTS:
            return [kind.__name__, *map(encode, PARTS[kind](value))]
    if isinstance(value, (collections.abc.Iterator, collections.abc.MappingView)):
        return encode(list(itertools.islice(value, MAX_YIELDED)))
    return encode(unwrapped(value))


def decode(form):
    """encode's inverse: the judge's own types only, whatever the sender was."""
    if not isinstance(form, list):
        return form
    name, *parts = form
    kind, parts = KINDS[name], map(decode, parts)
    return kind(parts) if PARTS.get(kind) in (iter, dict.items) else kind(*parts)


# What crosses, and how it comes apart: by `iter` and `items` what it is made of, else arguments.
PARTS = {
    **dict.fromkeys((list, tuple, set, frozenset, bytes, collections.deque), iter),
    **dict.fromkeys((dict, collections.OrderedDict), dict.items),
    **{kind: lambda value, kind=kind: kind.__reduce__(value)[1] for kind in (  # as for pickle
        Fraction, decimal.Decimal, range, datetime.datetime, datetime.date, datetime.time,
        datetime.timedelta, datetime.timezone, collections.Counter)},
    complex: complex.__getnewargs__,
    collections.defaultdict: lambda value: (None, dict(value))}
KINDS = {kind.__name__: kind for kind in PARTS} | {
    "namedtuple": lambda name, fields, *items: collections.namedtuple(name, fields)(*items)}


# ---------------------------------------------------------------------------------------------
# Samples: one verdict each


def sample_verdict(sample, **options):
    """The verdict on a sample (a problem's fields, response, finish_reason). BadInput where a field
    is missing or wrong; options go to program_verdict."""
    if not isinstance(sample, dict):
        raise BadInput(f"the row is no object: {str(sample)[:100]}")
    kind = sample.get("kind")
    if kind not in ("math", "choice", "code"):
        raise BadInput(f"field kind is {kind!r}: math, choice or code")
    gold = "tests" if kind == "code" else "answer"
    for name in ("response", gold, *{"original"} & sample.keys()):
        if not isinstance(sample.get(name), list if name == "tests" else str):
            raise BadInput(f"field {name} is missing or no {'list' if name == 'tests' else 'text'}")
    if (reason := sample.get("finish_reason")) not in (None, "stop"):
        return Verdict(False, "truncated" if reason == "length" else str(reason)[:40])
    if "original" in sample and not keeps_structure(sample):
        return Verdict(False, "structure")
    if kind == "code":
        return code_verdict(sample["response"], sample["tests"], **options)
    verdict = math_verdict if kind == "math" else choice_verdict
    return verdict(sample["response"], sample["answer"])


def keeps_structure(sample):
    """Whether a rewritten response has its four tags once and in order, most of the original's
    thought, and the original's answer."""
    kind, original = sample["kind"], sample["original"]
    pieces = re.split(f"({'|'.join(map(re.escape, TAGS))})", sample["response"])
    if pieces[1::2] != list(TAGS):
        return False
    head, thought, _, solution, tail = pieces[::2]
    before = original.partition(TAGS[0])[2].partition(TAGS[1])[0].strip()
    if (head + tail).strip() or len(thought.strip()) < 0.8 * len(before or original.strip()):
        return False
    find = {"math": extract_answer, "choice": find_letter, "code": find_program}[kind]
    ours, theirs = find(solution), find(original)
    if ours is None or theirs is None:
        return False
    return math_equal(ours, theirs) if kind == "math" else ours.split() == theirs.split()


# ---------------------------------------------------------------------------------------------
# Workers: every verdict is made in a process that can be killed


class Worker:
    """This file as a process that makes one verdict after another. It is no sandbox: it holds what
    models wrote and what is expected of it, and runs none of it."""

    def __init__(self):
        self.connection, theirs = multiprocessing.Pipe()
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True)
        theirs.close()


IDLE = []
os.register_at_fork(after_in_child=IDLE.clear)  # they are the parent's


def ask(name, *arguments, **options):
    """What a function of this file, by its name, says in a worker: a Verdict. BadInput where the
    input cannot be judged."""
    call = name, arguments, options
    try:
        worker = IDLE.pop()
        worker.connection.send(call)
    except (IndexError, OSError):  # there is none, or it has ended meanwhile
        worker = Worker()
        worker.connection.send(call)
    try:
        outcome = worker.connection.recv()
        IDLE.append(worker)
    except (EOFError, OSError):
        late = worker.process.wait() == -signal.SIGALRM
        outcome = False, "timeout" if late else f"{GRADER_ERROR}: its process ended"
    if isinstance(outcome, str):
        raise BadInput(outcome)
    return Verdict(*outcome)


def work(descriptor):
    """A worker's process. The kernel's alarm ends it when a verdict takes too long; an exception is
    the verdict on the sample that caused it."""
    global SANDBOX
    connection = multiprocessing.connection.Connection(descriptor)
    threading.Thread(target=end_with, args=[connection], daemon=True).start()
    for number in (signal.SIGALRM, signal.SIGCHLD):  # whatever the caller does with them
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    set_limit(resource.RLIMIT_AS, WORKER_MEMORY)
    sys.setrecursionlimit(5000)
    sys.set_int_max_str_digits(1_000_000)  # to read more takes a second
    while True:
        try:
            name, arguments, options = connection.recv()
        except (EOFError, OSError):  # reset, where the last reply was not read
            return
        signal.setitimer(signal.ITIMER_REAL, MATH_TIMEOUT)  # program_verdict sets it anew
        try:
            outcome = tuple(globals()[name](*arguments, **options))
        except BadInput as error:
            outcome = str(error)
        except Exception as error:
            SANDBOX = None  # it may wait for something
            text = f"{GRADER_ERROR}: {type(error).__name__}: {error}"
            outcome = False, " ".join(text[:200].split())
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(outcome)


def end_with(connection):
    """Ends this process when the other end of a connection is closed, whatever it is doing."""
    hangup = select.poll()
    hangup.register(connection, 0)
    hangup.poll()
    os._exit(1)


def verify_math(response, gold):
    """The verdict on a response's answer. A mere last number answers only a question whose gold
    answer is a number."""
    return ask("math_verdict", response, gold)


def verify_choice(response, gold):
    """The verdict on the letter that a response chooses."""
    return ask("choice_verdict", response, gold)


def run_program(code, tests, *limits, **options):
    """Run a Python program on its tests, each in a confined process of its own; further arguments
    are those of `program_verdict`.

    tests: {"input", "output"} from stdin to stdout, {"fn_name", "args", "expected"} a call, or
    {"assert"} source that calls what the program defines; a test may have "setup", source that
    runs before the program. timeout: CPU seconds a test (all together: twenty times that and half
    a minute, on the clock); memory: bytes of address space. A pass needs at least one test and
    every one of them passed. Raises BadInput, a ValueError, for a test of no known form, and where
    programs cannot be confined and allow_unsafe is not set."""
    return ask("program_verdict", code, tests, *limits, **options)


def verify_code(response, tests, *limits, **options):
    """The verdict on the program in a response (see `find_program`), as run_program gives it."""
    return ask("code_verdict", response, tests, *limits, **options)


def verify_sample(sample, **options):
    """The verdict on a sample (a problem's fields, response, finish_reason); options go to
    run_program."""
    return ask("sample_verdict", sample, **options)


# ---------------------------------------------------------------------------------------------
# Samples: the summary


def problem_key(row):
    """What tells problems apart: the id, or the prompt where there is none."""
    return json.dumps([row.get("source"), row.get("id", row.get("prompt"))])


def groups(rows):
    """(model, source, rows) for each source of each model, and after a model's several sources for
    "all" of them."""
    models = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        models[str(row.get("model") or "")][str(row.get("source") or "")].append(row)
    for model, sources in sorted(models.items()):
        for source, members in sorted(sources.items()):
            yield model, source, members
        if len(sources) > 1:
            yield model, "all", list(itertools.chain(*sources.values()))


def scores(rows):
    """The figures of verified rows: a dict for each of their groups."""
    return [score(*group) for group in groups(rows)]


def score(model, source, rows):
    """The standard error is that of the mean over problems of their means. The interval counts a
    problem once, however many answers it has: more of them are no more problems."""
    problems = collections.defaultdict(list)
    for row in rows:
        problems[problem_key(row)].append(row)
    counts = [(len(samples), sum(row["passed"] for row in samples))
              for samples in problems.values()]
    means = [passed / n for n, passed in counts]
    accuracy = statistics.fmean(means)
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    fewest, _ = min(counts)
    ks = sorted({fewest, *(2 ** i for i in range(fewest.bit_length()))})
    chances = {k: statistics.fmean(pass_at_k(n, passed, k) for n, passed in counts) for k in ks}
    voted = [majority(samples) for samples in problems.values() if samples[0]["kind"] != "code"]
    tokens = list(filter(None, map(num_tokens, rows)))
    reasons = collections.Counter(
        re.sub(rf" on test \d+$|(?<={GRADER_ERROR}): .*", "", row["reason"]) for row in rows)
    return {
        "model": model,
        "source": source,
        "problems": len(problems),
        "samples": len(rows),
        "accuracy": accuracy,
        "standard_error": error,
        "interval": interval(accuracy, len(means)),
        "pass_at_k": chances,
        "majority": statistics.fmean(voted) if voted else None,
        "n": fewest,
        "mean_tokens": statistics.fmean(tokens) if tokens else None,
        "reasons": dict(reasons.most_common())}


def interval(share, n):
    """Where the true share lies, with 95 % confidence, if n answers had this one (Wilson's
    interval): 0 of 20 says 0 to 16 %."""
    z_squared = 1.96 ** 2
    scale = n + z_squared
    middle = (share * n + z_squared / 2) / scale
    half = math.sqrt(z_squared * (share * (1 - share) * n + z_squared / 4)) / scale
    return middle - half, min(1, middle + half)


def num_tokens(row):
    """The length of its response, or None where no sensible number is given."""
    number = row.get("num_tokens")
    return number if isinstance(number, int) and 0 < number < 1e15 else None


def pass_at_k(n, passed, k):
    """The chance that one of k of the n samples passes: the unbiased estimate, arXiv 2107.03374."""
    return 1 - math.comb(n - passed, k) / math.comb(n, k)


def majority(samples):
    """1 where the answer given most often is correct; ties share it. All correct ones are equal,
    and wrong ones of one spelling; no answer is no vote."""
    votes = [row["passed"] or squash(row["extracted"] or "") for row in samples]
    leaders = statistics.multimode(filter(None, votes)) or [""]
    return (True in leaders) / len(leaders)


# Accuracies as published (novasky-ai.github.io/posts/sky-t1; MATH500 after the prompt's repair, and
# OlympiadBench's English maths: README of github.com/NovaSky-AI/SkyThought). By the names of
# data.EVALUATIONS: the number of problems, and the accuracy of each of MODELS.
MODELS = ("Sky-T1-32B-Preview", "Qwen2.5-32B-Instruct", "QwQ-32B-Preview", "o1-preview")
PUBLISHED = {
    "math500": (500, 0.864, 0.814, 0.922, 0.814),
    "aime24": (30, 0.433, 0.167, 0.5, 0.4),
    "livecodebench_easy": (182, 0.863, 0.846, 0.907, 0.929),
    "livecodebench_medium": (206, 0.568, 0.408, 0.563, 0.549),
    "livecodebench_hard": (123, 0.179, 0.098, 0.171, 0.163),
    "gpqa_diamond": (198, 0.568, 0.455, 0.525, 0.752),
    "olympiadbench": (674, 0.5979, 0.4674, 0.6217, 0.592),
}


def with_published(scores):
    """The scores, and then those published for their sources, of which less is known."""
    yield from scores
    for source in sorted(PUBLISHED.keys() & {figures["source"] for figures in scores}):
        problems, *accuracies = PUBLISHED[source]
        for model, accuracy in zip(MODELS, accuracies):
            yield {
                "model": f"{model}, published",
                "source": source,
                "problems": problems,
                "accuracy": accuracy,
                "interval": interval(accuracy, problems)}


def table(scores):
    """The scores and those published for their sources as text, the models' names where there are
    several, and remarks."""
    def percent(share):
        return "-" if share is None else f"{100 * share:.1f}"
    heads = "model,source,problems,samples,accuracy ± stderr,95 % interval,pass@k,majority,tokens"
    lines = [heads.split(",")]
    for figures in with_published(scores):
        error, tokens = figures.get("standard_error"), figures.get("mean_tokens")
        chances = figures.get("pass_at_k", {})
        lines.append([
            f"{figures['model'] or '-'}",
            f"{figures['source'] or '-'}",
            f"{figures['problems']}",
            f"{figures.get('samples', '-')}",
            percent(figures["accuracy"]) + (f" ± {percent(error)}" if error else ""),
            " to ".join(map(percent, figures["interval"])),
            ", ".join(f"{k}: {percent(chance)}" for k, chance in chances.items()) or "-",
            percent(figures.get("majority")),
            f"{tokens:.0f}" if tokens else "-"])
    if len({model for model, *_ in lines}) == 2:  # the head and one name
        lines = [line[1:] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([*text, "", *remarks(scores)])


def remarks(scores):
    """The reasons of the verdicts, and what limits a score."""
    for figures in scores:
        name = f"{figures['model'] or '-'} {figures['source'] or '-'}"
        reasons = figures["reasons"]
        yield f"{name}: {', '.join(f'{reason} {n}' for reason, n in reasons.items())}"
        whole, *_ = PUBLISHED.get(figures["source"], [0])
        if figures["problems"] < whole:
            yield f"{name}: you ran {figures['problems']} of {whole} problems"
        cut = reasons.get("truncated", 0) / figures["samples"]
        if cut > 0.1:
            yield (f"{name}: {cut:.0%} of the answers were cut, which counts as wrong: the score "
                   "means little, sample with more --max_new_tokens")


# ---------------------------------------------------------------------------------------------
# Samples: the report, a page to look at

MAX_SHOWN = 2000                # samples
MAX_TEXT = 30_000               # characters shown of a text's start, and of its end
VERDICTS = "wrong", "right"     # by `passed`
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<style>
:root { color-scheme: light dark; --right: #2a9d8f; --wrong: #d1495b; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: auto; padding: 0 1rem 4rem; }
h1, h2, .score, summary, details pre { overflow-wrap: anywhere; }
h2 { margin-top: 3rem; }
h3 { font-size: 0.875rem; margin: 0.75rem 0 0; }
pre { font-size: 0.8125rem; overflow-x: auto; margin: 0; padding: 0.5rem; background: #8882; }
svg { display: block; width: 100%; height: 1rem; background: #8883; }
line { stroke: CanvasText; stroke-width: 2px; vector-effect: non-scaling-stroke; }
.score[title$=", published"] .right { fill: #888; }
.lengths { height: 6rem; margin: 7rem 0 1rem; overflow: visible;
           background: repeating-linear-gradient(90deg, #8888 0 1px, #0000 1px 25%); }
.lengths .right { transform: scaleY(-1); }
.right { fill: var(--right); border-color: var(--right); }
.wrong { fill: var(--wrong); border-color: var(--wrong); }
label { margin-right: 1rem; }
summary { cursor: pointer; }
summary * { margin-right: 0.75rem; }
details { border-left: 4px solid; margin: 0.5rem 0; padding-left: 0.75rem; }
details.wrong { border-left-style: dotted; }
details.right b::before { content: "✓ "; }
details.wrong b::before { content: "✗ "; }
details pre { white-space: pre-wrap; }
pre:empty::before { content: "(empty)"; }
.thought:has(+ pre:empty), .thought + pre:empty { display: none; }
.thought:has(+ pre:empty) + pre + h3::after { content: " (the whole response)"; }
body:has(#only-right:checked) details.wrong { display: none; }
body:has(#only-wrong:checked) details.right { display: none; }
</style>
"""
SUMMARY = """<title>{name}</title>
<h1>{name}</h1>
<pre>{table}</pre>
<h2>Accuracy and its 95 % interval</h2>
"""
SCORE = """<p class="score" title="{model}"><bdi>{source} {model}</bdi> <b>{accuracy:.1%}</b>
({interval[0]:.1%} to {interval[1]:.1%})
<svg viewBox="0 0 1 1" preserveAspectRatio="none">
<rect class="right" width="{accuracy}" height="1"/>
<line x1="{interval[0]}" x2="{interval[1]}" y1=".5" y2=".5"/></svg></p>
"""
HISTOGRAM = """<h2>Lengths: {} {}</h2>
<p>Right responses above the line, wrong ones below it, by their tokens (characters where these are
not known), from 0 to {end:,} with a mark at each quarter. The longest bar is {most:,} of them.</p>
<svg class="lengths" viewBox="0 0 40 {most}" preserveAspectRatio="none"><line x2="40"/>
"""
BAR = """<rect class="{verdict}" x="{place}" width=".9" height="{count}">
<title>{count:,} {verdict}, from {start:,}</title></rect>
"""
SAMPLES = """<h2>Samples</h2>
<p>{:,} of {:,} (a random choice where that is not all):
<input type="radio" name="show" id="all" checked> <label for="all">all</label>
<input type="radio" name="show" id="only-right"> <label for="only-right">right ones</label>
<input type="radio" name="show" id="only-wrong"> <label for="only-wrong">wrong ones</label></p>
"""
SAMPLE = """<details class="{verdict}">
<summary><b>{verdict}</b> <bdi>{source}</bdi> <bdi>{id}</bdi> <bdi>{model}</bdi>
<bdi>{reason}</bdi></summary>
<h3>question</h3><pre>{prompt}</pre>
<h3 class="thought">thought</h3><pre>{thought}</pre>
<h3>solution</h3><pre>{solution}</pre>
<h3>extracted</h3><pre>{extracted}</pre>
<h3>gold</h3><pre>{gold}</pre>
</details>
"""


class Escaping(string.Formatter):
    """Fills a template in: every text is escaped, and loses its middle where it is very long."""

    def format_field(self, value, how):
        text = format(value, how)
        if (more := len(text) - 2 * MAX_TEXT) > 0:
            text = f"{text[:MAX_TEXT]}\n[{more:,} characters left out]\n{text[-MAX_TEXT:]}"
        return html.escape(text)


fill = Escaping().format


def report(verified, rows, scores):
    """The page in pieces: the summary, a bar for each score, how long responses are, and samples,
    of very many a random choice. `rows` are those of read_back(verified)."""
    yield PAGE
    yield fill(SUMMARY, name=verified, table=table(scores))
    for figures in sorted(with_published(scores), key=operator.itemgetter("source")):
        yield fill(SCORE, **figures)
    for group in groups(rows):
        yield from histogram(*group)
    shown = random.Random(0).sample(rows, min(MAX_SHOWN, len(rows)))
    yield fill(SAMPLES, len(shown), len(rows))
    for line in lines_at(verified, (row["start"] for row in shown)):
        yield sample_html(json.loads(line))


def histogram(model, source, rows):
    """The numbers of right and of wrong responses by their lengths."""
    lengths = [num_tokens(row) or row["length"] for row in rows]
    step = max(lengths) // 40 + 1
    counts = collections.Counter(
        (length // step, row["passed"]) for length, row in zip(lengths, rows))
    yield fill(HISTOGRAM, source, model, end=40 * step, most=max(counts.values()))
    for (place, passed), count in counts.items():
        yield fill(BAR, verdict=VERDICTS[passed], place=place, start=place * step, count=count)
    yield "</svg>"


def sample_html(row):
    """A sample: its verdict, and all texts under it."""
    *thoughts, solution = re.split(END_OF_THOUGHT, row["response"])
    return fill(SAMPLE, **dict.fromkeys(["model", "source", "id", "prompt"], "") | row | {
        "verdict": VERDICTS[row["passed"]],
        "thought": "\n".join(thoughts),
        "solution": solution,
        "extracted": row["extracted"] or "nothing",
        "gold": row["tests" if row["kind"] == "code" else "answer"]})


# ---------------------------------------------------------------------------------------------
# Every script's start: what it says, what it ends with, its flags


def end_with_parent():
    """From now on the kernel kills this process when the thread that started it ends, however that
    comes about. If it has ended already, a process that is no Python is the parent now."""
    if sys.platform != "linux":
        return
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    with open(f"/proc/{os.getppid()}/cmdline", "rb") as file:
        if b"python" not in file.read():
            sys.exit("error: what started this process is gone")


class Unread(io.FileIO):
    """Standard output or error that nobody may read to the end: when it cannot be written any more
    (a closed pipe, a terminal that is gone, a full disk), what is said goes to `null`."""

    def write(self, content):
        try:
            return super().write(content)
        except OSError:
            os.dup2(self.null, self.fileno())
            return len(content)


def begin_script():
    """The first thing in a script: it outlives whoever reads what it says, but not the torchrun
    that started it (each process of that leads a session, so nothing else would end it)."""
    while (null := os.open(os.devnull, os.O_RDWR)) < 3:  # else the next file would be number 0 to 2
        os.set_inheritable(null, True)
    Unread.null = null
    sys.stdout, sys.stderr = (io.TextIOWrapper(
        io.BufferedWriter(Unread(number, "w", closefd=False)), line_buffering=True,
        errors="backslashreplace") for number in (1, 2))
    if "TORCHELASTIC_RUN_ID" in os.environ and os.getsid(0) == os.getpid():
        end_with_parent()


class ArgumentParser(argparse.ArgumentParser):
    """The flags of every script: whole names alone, no empty texts, lists that go on where a flag
    is given again, the types "path" and those of NUMBERS. Its own errors are BadInput, and so one
    line, as all others."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.register("action", None, Given)
        self.register("type", "path", expanded)
        for name, row in NUMBERS.items():
            self.register("type", name, functools.partial(number, *row))

    def add(self, name, help, **options):
        default = options.get("default")
        shown = "" if default in (None, []) else f" (default: {default})"
        self.add_argument(name, help=help + shown, **options)

    def error(self, message):
        raise BadInput(f"{message} (-h explains the flags)")


class Given(argparse.Action):
    """Stores a value; a list takes the default's place, and goes on where it is given again."""

    def __call__(self, parser, namespace, value, option=None):
        several, before = isinstance(value, list), getattr(namespace, self.dest)
        if "" in (value if several else [value]):
            raise argparse.ArgumentError(self, "an empty text: is a variable not set?")
        again = several and before is not self.default
        setattr(namespace, self.dest, before + value if again else value)


def expanded(path):
    """The path without ~, which a shell leaves in --out=~/run."""
    if (whole := os.path.expanduser(path)).startswith("~"):
        raise argparse.ArgumentTypeError(f"{path}: there is no such home folder (is HOME set?)")
    return whole


NUMBERS = {"count": (int, lambda n: n > 0, "above 0"),
           "whole": (int, lambda n: n >= 0, "0 or more"),
           "seed": (int, lambda n: 0 <= n < 2 ** 32, f"0 to {2 ** 32 - 1}"),
           "positive": (float, lambda x: 0 < x < math.inf, "above 0"),
           "share": (float, lambda x: 0 <= x <= 1, "0 to 1")}


def number(kind, is_allowed, words, text):
    """The number that a flag is given, if it is one of NUMBERS' kind."""
    if not is_allowed(value := kind(text)):
        raise argparse.ArgumentTypeError(f"{text} must be {words}")
    return value


# ---------------------------------------------------------------------------------------------
# The command


def input_rows(names):
    """(place, row) of every row of the files; blank lines count for the place only. What is no JSON
    is there as a text that says why."""
    for name in names:
        with open(name, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        row = str(error)
                    yield f"{name}:{number}", row


def resume(out, rows):
    """Skip the rows that `out` holds already: a line that a kill has torn is cut off, and each must
    be the verdict on its row. Returns how many there are."""
    count = end = 0
    with open(out, "rb+") as file:
        for line in file:
            if line.startswith(b"{") and not line.endswith(b"\n"):
                break
            place, given = next(rows, ("any row of the input", None))
            try:
                row = json.loads(line)
                same = row == given | {name: row[name] for name in Verdict._fields}
            except (ValueError, LookupError, TypeError):
                same = False
            if not same:
                raise BadInput(f"{out}: row {count + 1} is not the verdict on {place}: "
                               "name another --out")
            count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def verified_rows(rows, workers, options):
    """The rows with their verdicts, in their order. So many are judged at once, each by a thread
    that waits for its worker; a bounded number is read ahead."""
    ahead, threads = collections.deque(), concurrent.futures.ThreadPoolExecutor(workers)
    while True:
        for place, row in itertools.islice(rows, 16 * workers - len(ahead)):
            ahead.append(threads.submit(verified, place, row, options))
        if not ahead:
            return
        yield ahead.popleft().result()


def verified(place, row, options):
    try:
        return row | ask("sample_verdict", row, **options)._asdict()
    except (BadInput, RecursionError) as error:
        raise BadInput(f"{place}: {error}") from None


def read_back(verified):
    """The verified rows, in place of their long texts the length and the hash of the response, and
    where in the file the row starts."""
    fields = "model source kind passed extracted reason num_tokens".split()
    rows, start = [], 0
    with open(verified, "rb") as file:
        for line in file:
            row = json.loads(line)
            text = row["response"]
            rows.append({name: row.get(name) for name in fields} | {
                "id": row.get("id", row.get("prompt")),
                "length": len(text),
                "hash": hash(text),
                "start": start})
            start += len(line)
    return rows


def keep(verified, rows, path, per_problem):
    """Write the passing rows, at most per_problem of each problem, the shortest first: long
    answers to easy questions are not rewarded. Exact duplicates are dropped. Returns the counts
    (kept, duplicates, beyond per_problem)."""
    problems = collections.defaultdict(dict)
    passing = [row for row in rows if row["passed"]]
    for row in passing:
        problems[problem_key(row)].setdefault(row["hash"], (row["length"], row["start"]))
    chosen = [start for samples in problems.values()
              for _, start in sorted(samples.values())[:per_problem]]
    write_whole(path, lines_at(verified, chosen))
    different = sum(map(len, problems.values()))
    return len(chosen), len(passing) - different, different - len(chosen)


def lines_at(name, starts):
    """The lines of a file that start there, in its order."""
    with open(name, "rb") as file:
        for start in sorted(starts):
            file.seek(start)
            yield file.readline()


def write_whole(path, pieces):
    """Write a file that appears, in place of an older one, when it is complete."""
    with open(f"{path}.part", "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def parse_arguments():
    """The flags, checked."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add
    add("samples", "files of samples, a JSON object a line", nargs="+", type="path")
    add("--out", "the samples with passed, extracted and reason, in their order; what the file "
        "holds already is not verified again", required=True, type="path")
    add("--keep", "the samples that passed, for train.py", type="path")
    add("--report", "a page to look at: scores, lengths, samples to unfold", type="path")
    add("--per_problem", "keep at most so many of each problem, the shortest (all)", type="count")
    add("--timeout", "CPU seconds of a program's test", type="positive", default=10.0)
    add("--memory", "bytes of address space of a program", type="count", default=DEFAULT_MEMORY)
    add("--workers", "processes, one a core", type="count", default=CORES)
    add("--allow_unsafe", "run programs even where they cannot be confined", action="store_true")
    add("--json", "print the summary as JSON", action="store_true")
    return parser.parse_args()


def main():
    """Verify what is not verified yet, write each verdict as it is there, then keep and print."""
    # 1. what can be refused is refused before anything is read
    args = parse_arguments()
    sys.set_int_max_str_digits(0)
    for name in args.samples:
        os.stat(name)
    paths = [*args.samples, *filter(None, [args.out, args.keep, args.report])]
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise BadInput("samples, --out, --keep and --report must be different files")
    for path in paths:
        if os.path.isdir(path):
            raise BadInput(f"{path} is a folder: name a file")

    # 2. what an earlier run has done; a first row that is refused creates nothing
    rows = input_rows(args.samples)
    done = resume(args.out, rows) if os.path.exists(args.out) else 0
    if done:
        print(f"{args.out}: {done} rows are verified already", file=sys.stderr)
    rows = verified_rows(rows, args.workers, {
        "timeout": args.timeout,
        "memory": args.memory,
        "allow_unsafe": args.allow_unsafe})
    head = list(itertools.islice(rows, 1))
    if not head and not done:
        raise BadInput(f"{', '.join(args.samples)}: no samples")
    for path in paths:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)

    # 3. verify
    told = False
    with open(args.out, "a", encoding="utf-8", errors="surrogatepass") as out:
        for row in tqdm(itertools.chain(head, rows), initial=done, unit=" samples", disable=None):
            if row["kind"] == "code" and not told:
                told = True
                print(ask("containment_verdict", args.allow_unsafe).reason, file=sys.stderr)
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()

    # 4. keep, print, show
    rows = read_back(args.out)
    figures = scores(rows)
    counts = keep(args.out, rows, args.keep, args.per_problem) if args.keep else [None]
    errors = [f"{row['source']} {row['id']}: {row['reason']}" for row in rows
              if row["reason"].startswith(GRADER_ERROR)]
    if args.json:
        print(json.dumps({
            "rows": figures,
            "kept": counts[0],
            "grader_errors": errors}))
    else:
        print(table(figures))
        if errors:
            print(f"{len(errors)} samples have no verdict, the grader failed:", *errors[:20],
                  sep="\n  ")
        if args.keep:
            print("kept {}, dropped {} duplicates and {} beyond --per_problem".format(*counts))
    if args.report:
        write_whole(args.report, (piece.encode("utf-8", "xmlcharrefreplace")
                                  for piece in report(args.out, rows, figures)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(int(sys.argv[2]))
    elif sys.argv[1:2] == ["--zygote"]:
        zygote(int(sys.argv[2]))
    else:
        begin_script()
        try:
            from tqdm import tqdm  # the command alone needs it
            main()
        except (BadInput, OSError, RuntimeError) as error:
            if getattr(error, "filename", None):
                error = f"{error.filename}: {error.strerror}"
            print(f"error: {error}", file=sys.stderr)
            os._exit(2)  # without waiting for the workers: they end with this process
        except KeyboardInterrupt:
            os._exit(130)
