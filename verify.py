"""Answers: what a response says, and whether it is right.

    python verify.py samples.jsonl --out verified.jsonl --keep kept.jsonl

Three kinds of problem: maths (equal answers, not equal strings), multiple choice (the letter),
programs (every test run in a sandbox, its output compared outside of the program's reach). A
wrong accept enters the training set, a wrong reject costs one sample: in doubt an answer is wrong.
Nothing that a model wrote is ever evaluated as Python outside of the sandbox.

In order: maths (extraction, spelling, parsing, values, equality), multiple choice, programs
(extraction, tests, the sandbox from outside to inside), a sample's verdict, the worker processes
that make all verdicts, the summary, the command. Needs neither torch nor the other files;
mpmath, for answers with roots, logarithms and angles, comes with torch's sympy. Programs need
Linux on x86_64 or aarch64.
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
import gc
import glob
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
import os
import pkgutil
import random
import re
import resource
import select
import signal
import socket
import statistics
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
MAX_LENGTH = 4000    # characters of an answer that is parsed; a longer one is compared as text
MAX_DEPTH = 50       # of brackets
MAX_ELEMENTS = 200   # of a list or set
MAX_BITS = 4096      # of a number worked out in this process
WORKER_BITS = 1 << 20  # in one that can be killed, which works out roots and logarithms too
HUNDRED = ("num", Fraction(100), None)
CONSTANTS = {"e", "i", "pi", "π"}


class NotMath(Exception):
    """The text has no reading as a formula, or the formula no value: it is compared as text."""


class TooBig(Exception):
    """Beyond what is worked out in this process, or at all."""


class BadInput(ValueError):
    """One line for the user: exit status 2."""


class Verdict(NamedTuple):
    """passed; reason, `correct` or what went wrong; extracted, the answer or program judged."""
    passed: bool
    reason: str
    extracted: str | None = None


GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda "
            "mu nu xi pi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda "
            "Xi Pi Sigma Phi Psi Omega".split())
TRIGONOMETRIC = set("sin cos tan cot sec csc".split())
ANGLE_FUNCTIONS = TRIGONOMETRIC | set(
    "arcsin arccos arctan sinh cosh tanh ln log lg exp cis".split())
FUNCTIONS = ANGLE_FUNCTIONS | set("sqrt frac binom max min gcd lcm".split())
RELATIONS = ("=", "<", ">", "≤", "≥", "≠", "≈", "∈")
STRUCTURES = ("seq", "union", "matrix", "rel", "text", "unit", "inf", "based", "ratio")
CLOSING = {"(": ")]", "[": "])", "{": "}", "\\{": ("\\}",), "⟨": "⟩", "\\lfloor": ("\\rfloor",),
           "\\lceil": ("\\rceil",), "\\begin": ("\\end",)}
CLOSERS = {")", "]", "}", "\\}", "⟩", "\\rfloor", "\\rceil", "\\end"}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9,
          "trillion": 10**12, "dozen": 12}
UNITS = {name: unit for unit, names in {
    "m": "m meter meters metre metres", "cm": "cm centimeter centimeters centimetre centimetres",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "km": "km kilometer kilometers kilometre kilometres", "in": "in inch inches",
    "ft": "ft foot feet", "yd": "yd yard yards", "mi": "mi mile miles", "g": "g gram grams",
    "kg": "kg kilogram kilograms", "mg": "mg milligram milligrams", "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces", "t": "ton tons tonne tonnes", "s": "s sec secs second seconds",
    "min": "min mins minute minutes", "h": "h hr hrs hour hours", "day": "day days",
    "week": "week weeks", "month": "month months", "year": "year years", "$": "dollar dollars usd",
    "c": "cent cents ¢", "°": "degree degrees deg °", "C": "c celsius", "F": "f fahrenheit",
    "/": "/ per", "%": "percent %", "rad": "radian radians rad", "mi/h": "mph", "km/h": "kph kmh",
    "L": "l liter liters litre litres", "mL": "ml milliliter milliliters", "Hz": "hz",
    "N": "newton newtons", "J": "joule joules", "unit": "unit units",
}.items() for name in names.split()}
BASE_NAMES = {name: str(base) for base, name in enumerate(
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen".split(), 2)}
UNICODE = str.maketrans({
    "−": "-", "–": "-", "—": "-", "‐": "-", "π": r"\pi ", "∞": r"\infty ", "±": r"\pm ",
    "∓": r"\mp ", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "′": "'", "’": "'", "€": "",
    "£": "", "¥": "", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ",
    "λ": r"\lambda ", "φ": r"\phi ", "ω": r"\omega ", "ℝ": r"\mathbb{R}", "∛": r"\sqrt[3]",
    "≡": r"\equiv ", "⟪": " ", "⟫": " "})
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"\\[\\{}]|[{}]")
PHRASE = re.compile(r"\banswer\s*+(?:\*\*\s*+)?(?:(?:is|are|was)(?![a-z])|[:=])", re.IGNORECASE)
NUMBER = re.compile(r"(?<![\w)])-?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?%?"
                    r"|\d+(?:\.\d+)?")
BASED = re.compile(r"\s*\(?\s*(\d\w*)\s*\)?\s*_\s*\{?\s*⟪?(\w++)⟫?\s*\}?\s*")
OPTION = re.compile(r"(?:(?:option|choice|answer)\b\s*+(?::\s*+)?)?(?:[(\[]\s*([A-J])\s*[)\]]"
                    r"|([A-J])\s*[.):,]|([A-J])\s*$)", re.IGNORECASE)
SECOND_OPTION = re.compile(r"\s*+(?:(?:,|/|&|and\b|or\b)\s*+)?[(\[]?[A-J][)\].]?"
                           r"(?:\s*$|\s*[,(/&])")
CHOICE_PHRASE = re.compile(
    r"\b(?:answer|option|choice|solution)(?:\s++(?:choice|option|letter))?\s*+(?:\*\*\s*+)?"
    r"(?:(?:is|must\s+be|would\s+be|should\s+be)(?![a-z])|[:=])|\b(?:correct|right|best)\s+"
    r"(?:one\s+)?is\b|\banswer\s+(?=\([A-J]\))|\b(?:choose|select|pick)\b", re.IGNORECASE)
# a letter in brackets, or a capital that no lower-case word follows, as it does an article
CHOSEN = re.compile(r"[(\[]\s*([A-Ja-j])\s*[)\]]|([A-J])(?![A-Za-z0-9'])(?!\s+[a-z])")
TOKEN = re.compile(r"\s+|⟪[^⟫]*⟫|\d+(?:\.\d+)?[eE][+-]?\d+(?![A-Za-z])|\d+(?:\.\d*)?|\.\d+"
                   r"|\\[A-Za-z]+|\\.|[A-Za-z]+|.", re.DOTALL)

TAGS = ("<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>",
        "<|end_of_solution|>")  # plain text to Qwen's tokenizer
PYTHON = re.compile(r"py(?:thon)?[\d.]*+")  # labels of a program
FENCE = re.compile(r"(?<![`~])(`{3,}+|~{3,}+)[ \t]*+([\w+#.{}-]*+)([^`~]*+)$")
DECIMAL = re.compile(
    rb"[+-]?(?:[0-9]++\.[0-9]*+|\.[0-9]++|[0-9]++(?=[eE]))(?:[eE][+-]?[0-9]++)?")
SIGNED = re.compile(rb"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?")
GRADER_ERROR = "grader error"
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
# Maths: which text is the answer


def last_box(text):
    """What the last outermost `\\boxed{...}` or `\\fbox{...}` whose braces balance holds, without
    the boxes in it; None if there is none. `\\{` and `\\}` are printed braces and do not count."""
    closing, opened = {}, []
    for brace in BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif brace[0] == "}" and opened:
            closing[opened.pop()] = brace.start()
    outer, nested = None, []
    for box in BOX.finditer(text):
        if box.end() in closing:
            if outer is None or box.start() > closing[outer]:
                outer, nested = box.end(), []
            else:
                nested += [*box.span(), closing[box.end()], closing[box.end()] + 1]
    if outer is None:
        return None
    edges = [outer, *sorted(nested), closing[outer]]  # of what is not a nested box's own sign
    pieces = [text[left:right] for left, right in zip(edges[::2], edges[1::2], strict=True)]
    return "".join(pieces).strip()


def find_answer(response):
    """The answer and how it was found: "box", "mark", "phrase" or "number"; or (None, None)."""
    box = last_box(response)
    if box is not None:
        return (box, "box") if box else (None, None)
    head, mark, tail = response.rpartition("####")
    if mark and tail.strip():
        return tail.strip().split("\n")[0].strip(), "mark"
    if answer := after_phrase(response):
        return answer, "phrase"
    numbers = NUMBER.findall(response)
    return (numbers[-1], "number") if numbers else (None, None)


def after_phrase(response):
    """What follows the last "answer is" or "answer:", without emphasis, within its sentence."""
    _, *tails = PHRASE.split(response)
    if not tails:
        return None
    tail = tails[-1].lstrip(" \t\n*_:=").split("\n")[0]
    if formula := re.match(r"\$\$?(.+?)\$\$?|\\[(\[](.+?)\\[)\]]", tail):
        rest = tail[formula.end():]
        # "$5$ and $7$" goes on; "$5$, because" does not
        if not re.match(r"\s*+(?:,|and\b|or\b)\s*+(?:(?:and|or)\b\s*+)?\$", rest):
            unit = re.match(r"\s*+(?:\\?%|[A-Za-z]++)\s*+(?:\.\s*+)?$", rest)
            return (formula[1] or formula[2]).strip() + (unit[0].rstrip(" .") if unit else "")
    tail = re.split(r"[.!?]\s+(?=[A-Z*])|[.!]?$", tail.replace("**", "").rstrip())[0]
    return tail.strip(" *_") or None


def extract_answer(response):
    """The text that a response gives as its answer, or None: the last balanced box, else what
    follows `####`, else what follows "answer is", else the last number. A box that is empty is
    no answer, and an earlier one never stands in for it."""
    return find_answer(response)[0]


# ---------------------------------------------------------------------------------------------
# Maths: one spelling


def superscript(match):
    sign = "_" if match[0][0] in "₀₁₂₃₄₅₆₇₈₉" else "^"
    return sign + "{" + unicodedata.normalize("NFKC", match[0]).replace("−", "-") + "}"


def vulgar_fraction(match):
    value = Fraction(unicodedata.numeric(match[0])).limit_denominator(10)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def repeating(match):
    """0.1\\overline{6}: the digits once, less those that do not repeat, over 99...900...0."""
    whole, fixed, period = match[1] or "0", match[2], match[3] or match[4]
    if len(fixed + period) > 1000:
        raise NotMath
    nines = 10 ** len(fixed) * (10 ** len(period) - 1)
    value = Fraction(int(whole + fixed + period) - int(whole + fixed), nines)
    return rf"\frac{{{value.numerator}.}}{{{value.denominator}}}"  # the point: still a decimal


def text_group(match):
    inside = match[1].strip()
    if inside in ("e", "i") or not re.search("[A-Za-z]", inside):
        return f" {inside} "
    if quantity := re.fullmatch(r"(-?[\d.,]+)\s+([a-z][a-z\s.]*)", inside):
        return f"{quantity[1]}⟪{quantity[2]}⟫"
    return f" \\{inside} " if inside in FUNCTIONS else f"⟪{inside}⟫"


def join_thousands(text):
    """1,234,567 is one number. Within brackets (100,200) is a pair, unless the commas between the
    elements are set off by blanks."""
    depth = 0

    def join(match):
        nonlocal depth
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(match[0], 0)
        if not match[0][0].isdigit() or depth > 0 and not re.search(r",\s", text):
            return match[0]
        return match[0].replace(",", "")
    return re.sub(r"[(\[{)\]}]|(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)", join, text)


# Applied in this order. Each has an example, which the tests run: what goes in, what comes out.
SPELLING = [(re.compile(pattern), replacement, before, after)
            for pattern, replacement, before, after in [
    ("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+|[₀₁₂₃₄₅₆₇₈₉]+", superscript, "x²", "x^{2}"),
    ("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]", vulgar_fraction, "2½", r"2\frac{1}{2}"),
    (r"√\s*(\d+(?:\.\d+)?|[A-Za-z]|(?=\())", r"\\sqrt{\1}", "√12", r"\sqrt{12}"),
    (r"\\sqrt\{\}(?=\()", r"\\sqrt", r"\sqrt{}(x+1)", r"\sqrt(x+1)"),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?", "", r"\left(1\right)", "(1)"),
    (r"\\\\\s*\[\s*[\d.]+\s*(?:pt|[cme]m|ex)\s*\]", r"\\\\", r"1\\[2pt]2", r"1\\2"),
    (r"\\(?:displaystyle|textstyle|limits|phantom\{[^{}]*\})", "", r"\displaystyle 2", " 2"),
    (r"\\[dtc](frac|binom)", r"\\\1", r"\dfrac12", r"\frac12"),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*+)\}", r"\\frac{\1}{\2}", r"{3\over4}", r"\frac{3}{4}"),
    (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*+)\}", r"\\binom{\1}{\2}", r"{5\choose2}",
     r"\binom{5}{2}"),
    (r"\\(?:text)?color\s*(?:\[[a-zA-Z]+\])?\{[^{}]*\}", "", r"\color{red}{5}", "{5}"),
    (r"\\mathbb\s*(?:\{R\}|R)\s*\^\{?\+\}?", r"(0,\\infty)", r"\mathbb{R}^+", r"(0,\infty)"),
    (r"\\mathbb\s*(?:\{R\}|R)", "⟪all real numbers⟫", r"\mathbb{R}", "⟪all real numbers⟫"),
    (r"⟪all real numbers⟫\s*(?:\\setminus|\\backslash|-)\s*\\\{([^{},]*)\\\}", r"x\\ne \1",
     r"⟪all real numbers⟫\setminus\{2\}", r"x\ne 2"),
    (r"\\angle\s*\{?([A-Z]+)\}?", r"⟪angle \1⟫", r"\angle ABC", "⟪angle ABC⟫"),
    (r"\\(?:mathbf|mathbb|boldsymbol|bm|underline|mathit|mathsf|vec|overrightarrow)"
     r"(?![A-Za-z])", "", r"\mathbf{v}", "{v}"),
    (r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|tt)|mbox|hbox|operatorname\*?)\s*"
     r"\{([^{}]*)\}", text_group, r"5\text{ cm}", "5⟪cm⟫"),
    (r"\\\$|\$|`|^\s*\*\*|\*\*\s*$|\\pounds|(?:⟪|\b)(?:USD|EUR|Rs\.?)(?=[\s\d⟫])[\s⟫]*(?=\d)", " ",
     r"\$12", " 12"),
    (r"(?<!\\)\\[()\[\]]", "", r"\(5\)", "5"),
    (r"(?<![\d.])([1-9]\d{0,2})((?:(?:\\[,;:! ]|~|\{,\}|,\\!|\s)+\d{3})+)(?!\d)",
     lambda match: match[1] + re.sub(r"\D", "", match[2]), r"2\,000\,000", "2000000"),
    (r"(?<!\\)\\[,;:!> ]|~|\\q?quad(?![a-z])|\\hspace\{[^{}]*\}", " ", r"x\,y", "x y"),
    (r"\s+", " ", "x  y", "x y"),
    (r"(?<=\d)\s*\^?\{?\s*(?:⟪\s*)?(?:st|nd|rd|th)(?:\s*⟫)?\}?(?![A-Za-z])", "",
     "36^{⟪th⟫}", "36"),
    (r"(?<!\d\d)(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))", repeating,
     r"0.\overline{7}", r"\frac{7.}{9}"),
    (r"(?<![\d.}/)^_])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"(\1+\2/\3)", "2 1/3", "(2+1/3)"),
    (r"\\(?:leqslant|leq|le)(?![a-z])|<=", "≤", r"x\le 3", "x≤ 3"),
    (r"\\(?:geqslant|geq|ge)(?![a-z])|>=", "≥", r"x\ge 3", "x≥ 3"),
    (r"\\(?:neq|ne)(?![a-z])|\\not\s*=|!=", "≠", r"x\ne 3", "x≠ 3"),
    (r"\\(?:approx|simeq|sim)(?![a-z])", "≈", r"\approx 3", "≈ 3"),
    (r"\\lt(?![a-z])", "<", r"x\lt 3", "x< 3"),
    (r"\\gt(?![a-z])", ">", r"x\gt 3", "x> 3"),
    (r"\\in(?![a-z])", "∈", r"x\in S", "x∈ S"),
    (r"\\cup(?![a-z])", "∪", r"A\cup B", "A∪ B"),
    (r"\\(?:lvert|rvert|vert|mid)(?![a-z])|\\\|", "|", r"\lvert x\rvert", "| x|"),
    (r"\\langle(?![a-z])", "⟨", r"\langle 1", "⟨ 1"),
    (r"\\rangle(?![a-z])", "⟩", r"1\rangle", "1⟩"),
    (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree|\\circ", "°", r"90^\circ", "90°"),
    (r"(?<=°)\s*([CF])(?![A-Za-z])", r"⟪\1⟫", "20° C", "20°⟪C⟫"),
    (r"\\%", "%", r"25\%", "25%"),
    (r"\\infty(?![a-z])|\b[Ii]nfinity\b|\boo\b", "∞", r"-\infty", "-∞"),
    (r"\\(?:emptyset|varnothing)(?![a-z])|\\\{\s*\\\}", "∅", r"\emptyset", "∅"),
    (r"\*\*", "^", "x**2", "x^2"),
    (r"\\(?:times|cdot|ast)(?![a-z])|[×·⋅∙]", "*", r"2\times3", "2*3"),
    (r"\\div(?![a-z])|÷", "/", r"6\div2", "6/2"),
    # both of two inequalities is not either of them
    (r"⟪\s*(?:and|or)\s*⟫|\b(?:and|or)\b|\\(?:lor|vee)(?![a-z])|;", lambda match: match[0]
     if "and" in match[0] and any(sign in match.string for sign in "<>≤≥") else ",",
     "x=1 or x=2", "x=1 , x=2"),
    (r",(?:\s*,)+", ",", "1,, 2", "1, 2"),
    (r"\\\{\s*[a-z]\s*(?:∈\s*⟪all real numbers⟫\s*)?[|:](?=.*\\\})(.*?)\\\}", r"\1",
     r"\{x | x>2\}", " x>2"),
    (r"([\[\]])([^][(),]+,[^][(),]+)([\[\]])", lambda match: "[("[match[1] == "]"] + match[2]
     + "])"[match[3] == "["], "]0,1[", "(0,1)"),
    (r"^(.*[^,\s(])[\s,(]*(?:⟪(?:for|where|with|for all)⟫)?\s*\b([a-z])\s*"
     r"(?:∈\s*\{?Z\}?|⟪is an integer⟫)\s*\)?$",
     lambda match: re.sub(rf"(?<![A-Za-z\\]){match[2]}(?![A-Za-z])", "k", match[1]),
     r"2n\pi , n ∈ {Z}", r"2k\pi"),
    (r"\(?\s*(?:\\[pb]?mod|⟪?\bmod\b\s*⟫?)(?![A-Za-z])\s*\{?(\w+)\}?\s*\)?", r"\\mod \1",
     r"3\pmod{7}", r"3\mod 7"),
    (r"⟪\s*(?:if|when)\s*⟫", "", "⟪if⟫ x>0", " x>0"),
    (r"(?<![^⟪⟫])[^⟪⟫]++⟫", lambda match: match[0].replace(",", "⟫,⟪"), "⟪red, blue⟫",
     "⟪red⟫,⟪ blue⟫"),
    (r"⟪\s*⟫", "", "5⟪⟫,⟪cm⟫", "5,⟪cm⟫"),
    (r"\\[lc]?dots[a-z]?(?![A-Za-z])|\.\.\.", r"\\dots ", "1,...,n", r"1,\dots ,n"),
    (r"^(?:[\s:=≈]|⟪?\b(?:about|approximately)\b\s*⟫?)+(?:[\s.,:]+$)?|(?<![\s.,:])[\s.,:]+$", "",
     "= 5.", "5"),
]]


def respell(text):
    """One spelling for what is written in many."""
    if len(text) > MAX_LENGTH:
        raise NotMath
    text = " ".join((last_box(text) or text).translate(UNICODE).split())
    for pattern, replacement, _, _ in SPELLING[:4]:
        text = pattern.sub(replacement, text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, replacement, _, _ in SPELLING[4:]:
        text = pattern.sub(replacement, text)
    return join_thousands(text)


# ---------------------------------------------------------------------------------------------
# Maths: from text to a tree
#
# A tree is nested tuples, the first item its kind:
#   ("num", Fraction, places)   places: digits after the point, None for an integer as written
#   ("sym", name)  ("inf", sign)  ("text", words)
#   ("+", items)  ("*", items)  ("/", a, b)  ("^", a, b)  ("call", function, arguments)
#   ("seq", opening, closing, items)   tuples and intervals; sets and bare lists have opening "{"
#   ("union", items)  ("matrix", rows)  ("rel", operators, sides)  ("unit", tree, unit)
#   ("based", digits, base)  ("ratio", text)


def tokenize(text):
    """Text in one spelling to tokens; "⟪words" is a run of plain words. Letters stand alone
    unless they are the name of a function, a unit or a word that no product of letters is."""
    tokens = []
    for token in TOKEN.findall(text):
        if token.isspace():
            continue
        if token[0] == "⟪":
            token = "⟪" + token[1:-1].strip()
        elif token.isalpha() and token.isascii() and len(token) > 1:
            if token in FUNCTIONS or token in GREEK:
                token = "\\" + token
            elif token.lower() in UNITS or token.lower() in SCALES or len(token) > 3:
                token = "⟪" + token
            else:
                tokens.extend(token)
                continue
        if token[0] == "⟪" and tokens and tokens[-1][0] == "⟪":
            tokens[-1] += " " + token[1:]
        else:
            tokens.append(token)
    return tokens


def is_word(text):
    """Plain words rather than a product of variables: xy and abc are products, cat is not."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z\s'.⟪⟫-]*", text):
        return False
    words = re.findall("[A-Za-z]+", text)
    if re.fullmatch(r"[A-Z]{2,}\s*", text):  # HTH, SAS, XIV
        return True
    return any(len(word) > 1 and word not in FUNCTIONS and word not in GREEK
               and not set(word) <= set("abcxyz") and set(word.lower()) & set("aeiou")
               or len(word) > 3 for word in words)


def parse(text):
    """The tree of an answer; raises NotMath where it has none."""
    text = respell(text)
    if len(text) > MAX_LENGTH:
        raise NotMath
    if re.fullmatch(r"(?i)\s*\d+(?:\s*:\s*\d+)+\s*(?:[ap]\.?\s?m\.?|⟪[ap]\.?\s?m\.?⟫)?\s*", text):
        return ("ratio", re.sub(r"[\s.⟪⟫]", "", text).lower())
    if is_word(text):
        return text_tree(text)
    if match := BASED.fullmatch(text):
        return ("based", match[1].lower(), BASE_NAMES.get(match[2], match[2]))
    return Parser(tokenize(text)).sequence()


class Parser:
    """Recursive descent over tokens[i:end]. A bracket's partner is known beforehand, so what is
    inside one is parsed as a window of its own."""

    def __init__(self, tokens):
        self.tokens, self.i, self.end = tokens, 0, len(tokens)
        self.partner, stack = {}, []
        for i, token in enumerate(tokens):
            if token in CLOSING:
                stack.append(i)
                if len(stack) > MAX_DEPTH:
                    raise NotMath
            elif token in CLOSERS:
                if not stack or token not in CLOSING[tokens[stack[-1]]]:
                    raise NotMath
                self.partner[stack.pop()] = i
        if stack:
            raise NotMath

    def peek(self):
        return self.tokens[self.i] if self.i < self.end else ""

    def take(self, *wanted):
        token = self.peek()
        if token and (not wanted or token in wanted):
            self.i += 1
            return token
        return None

    def window(self, start, end, method):
        """method's tree of tokens[start:end], all of it."""
        outer, (self.i, self.end) = (self.i, self.end), (start, end)
        tree = method()
        if self.i != self.end:
            raise NotMath
        self.i, self.end = outer
        return tree

    def split(self, *separators):
        """The windows between separators outside of brackets, and the separators."""
        windows, found, start, i = [], [], self.i, self.i
        while i < self.end:
            if self.tokens[i] in separators:
                windows.append((start, i))
                found.append(self.tokens[i])
                start = i + 1
            i = self.partner.get(i, i) + 1
        self.i = self.end
        return windows + [(start, self.end)], found

    def sequence(self):
        """a, b, c: a bare list, whose order does not matter; or the one element."""
        windows, _ = self.split(",")
        items = [tree for window in windows for tree in self.alternatives(*window)]
        return items[0] if len(items) == 1 else ("seq", "{", "}", items)

    def alternatives(self, start, end):
        """Every reading of an element with plus-minus signs in it: each has its own sign, unless
        a minus-plus sign ties them together."""
        signs, i = [], start
        while i < end:  # those in the braces of a set are its elements' own
            if self.tokens[i] in ("\\pm", "\\mp"):
                signs.append(i)
            i = self.partner[i] + 1 if self.tokens[i] == "\\{" else i + 1
        if not signs:
            return [self.window(start, end, self.relation)]
        trees, written = [], [self.tokens[i] for i in signs]
        if "\\mp" in written:
            readings = [["+" if sign == plus else "-" for sign in written]
                        for plus in ("\\pm", "\\mp")]
        else:
            readings = itertools.product("+-", repeat=min(len(signs), 5))
        tokens = self.tokens
        for reading in readings:
            self.tokens = tokens[:]
            for i, sign in zip(signs, reading, strict=True):  # too many signs: ValueError
                self.tokens[i] = sign
            trees.append(self.window(start, end, self.relation))
        self.tokens = tokens
        return trees

    def relation(self):
        """x = 5, 1 < x ≤ 2, x ∈ S; a union of sets; or a quantity."""
        windows, operators = self.split(*RELATIONS)
        sides = [self.window(*window, self.side) for window in windows]
        if operators == ["∈"]:
            return sides[1]
        return ("rel", operators, sides) if operators else sides[0]

    def side(self):
        windows, operators = self.split("∪", ":")
        items = [self.window(*window, self.quantity) for window in windows]
        if not operators:
            return items[0]
        if set(operators) == {":"}:
            return ("seq", ":", ":", items)
        if set(operators) == {"∪"}:
            return ("union", items)
        raise NotMath

    def quantity(self):
        """An expression with its unit or scale word, if it has one."""
        start, end = self.i, self.end
        if start == end:
            raise NotMath
        first = next((i for i in range(start, end) if self.tokens[i][0] == "⟪"
                      or self.tokens[i] in "%°¢"), end)
        if first == start and all(token[0] == "⟪" for token in self.tokens[start:end]):
            self.i = end
            return text_tree(self.tokens[start])
        rest = self.tokens[first:end]
        angle = any(token[1:] in ANGLE_FUNCTIONS for token in self.tokens[start:first])
        if first in (start, end) or angle or not all(
                token[0] == "⟪" or token in "^{}/()*%°¢.-$23" for token in rest):
            return self.expression()
        tree = self.window(start, first, self.expression)
        self.i = end
        words = "".join(rest).replace("⟪", " ").split()
        while words and words[0].lower() in SCALES:
            tree = ("*", [tree, ("num", Fraction(SCALES[words.pop(0).lower()]), None)])
        return ("unit", tree, canonical_unit(" ".join(words))) if words else tree

    def expression(self):
        """A sum of products."""
        items = []
        while self.i < self.end and (not items or self.peek() in "+-"):
            negative = False
            while self.peek() in ("+", "-"):
                negative ^= self.take() == "-"
            term = self.term()
            items.append(negated(term) if negative else term)
        if not items:
            raise NotMath
        return items[0] if len(items) == 1 else ("+", items)

    def term(self):
        """A product; the sign of multiplication may be left out, except between two numbers."""
        tree = self.factor()
        while self.i < self.end and self.peek() not in "+-":
            if self.take("/"):
                tree = ("/", tree, self.signed_factor())
            elif self.take("*"):
                tree = product(tree, self.signed_factor())
            else:
                if self.peek()[0].isdigit() and self.tokens[self.i - 1][0].isdigit():
                    raise NotMath
                tree = product(tree, self.factor())
        return tree

    def signed_factor(self):
        return negated(self.signed_factor()) if self.take("-") else self.factor()

    def factor(self):
        """A base with what is written behind it: power, factorial, percent, degrees."""
        tree = self.base()
        while True:
            if self.take("^"):
                tree = ("^", tree, self.argument(whole_number=True))
            elif self.take("!"):
                tree = ("call", "factorial2" if self.take("!") else "factorial", [tree])
            elif self.take("°"):
                tree = ("call", "degrees", [tree])
            elif self.take("%"):
                tree = ("/", tree, HUNDRED)
            else:
                return tree

    def base(self):
        """What a power or a product is made of: a number, group, |x|, symbol or function."""
        token = self.take()
        if token is None:
            raise NotMath
        if token[0].isdigit() or token[0] == "." and len(token) > 1:
            return self.mixed_number(number(token))
        if token in CLOSING:
            return self.group(token)
        if token == "|":
            end = next((i for i in range(self.i, self.end) if self.tokens[i] == "|"), None)
            if end is None:
                raise NotMath
            tree = self.window(self.i, end, self.expression)
            self.i = end + 1
            return ("call", "abs", [tree])
        if token == "∞":
            return ("inf", 1)
        if token == "∅":
            return ("seq", "{", "}", [])
        if token.isalpha() or token[0] == "\\" and token[1:] in GREEK:
            name = token.removeprefix("\\") + self.subscript()
            while self.take("'"):
                name += "'"
            return ("sym", name)
        if token[0] == "\\" and token[1:] in FUNCTIONS:
            return self.function(token[1:])
        raise NotMath

    def mixed_number(self, tree):
        """2\\frac{1}{3} is 2 + 1/3."""
        if tree[2] is None and self.peek() == "\\frac":
            start, tokens = self.i, self.tokens
            match self.base():
                case ("call", "frac", [("num", a, None), ("num", b, None)]) if a < b:
                    return ("num", tree[1] + a / b, None)
            self.i, self.tokens = start, tokens
        return tree

    def subscript(self):
        if not self.take("_"):
            return ""
        if self.peek() == "{":
            end = self.partner[self.i]
            name = "".join(self.tokens[self.i + 1:end])
            self.i = end + 1
            return "_" + name.replace("⟪", "")
        return "_" + (self.take() or "")

    def group(self, opening):
        """What a bracket holds: a plain group, a tuple or interval, a set, a matrix."""
        start, end = self.i, self.partner[self.i - 1]
        closing, self.i = self.tokens[end], end + 1
        if opening == "\\begin":
            return self.matrix(start, end)
        if opening in ("\\lfloor", "\\lceil"):
            return ("call", opening.removeprefix("\\l"), [self.window(start, end, self.expression)])
        tree = self.window(start, end, self.sequence)
        if opening == "\\{":
            return tree if tree[:2] == ("seq", "{") else ("seq", "{", "}", [tree])
        if tree[:2] == ("seq", "{"):
            if opening == "{":
                return tree
            opening, closing = opening.replace("⟨", "("), closing.replace("⟩", ")")
            return ("seq", opening, closing, tree[3])
        if tree[0] in ("text", "rel", "union") or opening + closing not in ("()", "[]", "{}"):
            raise NotMath
        return tree

    def matrix(self, start, end):
        """\\begin{pmatrix} a & b \\\\ c & d \\end{pmatrix}"""
        name_end = self.partner.get(start)
        if name_end is None or self.partner.get(end + 1) is None:
            raise NotMath
        name = "".join(self.tokens[start + 1:name_end]).strip("⟪")
        self.i = self.partner[end + 1] + 1
        start = name_end + 1
        if name == "array" and start in self.partner:  # its column format
            start = self.partner[start] + 1
        elif name not in ("matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "cases"):
            raise NotMath
        rows = self.window(start, end, self.rows)
        if name == "cases" and all(len(row) == 1 for row in rows):  # a system of equations
            return ("seq", "{", "}", [row[0] for row in rows])
        return ("matrix", rows)

    def rows(self):
        rows, _ = self.split("\\\\")
        return [self.window(start, end, self.cells) for start, end in rows if start != end]

    def cells(self):
        windows, _ = self.split("&")
        return [self.window(*window, self.relation) for window in windows]

    def argument(self, whole_number=False):
        """What a command takes: a group, or one digit, letter or command. A power in plain text
        takes the whole number: 2^10."""
        token = self.peek()
        if token == "-":
            return self.signed_factor()
        if token.isdigit() and len(token) > 1 and not whole_number:
            self.tokens = self.tokens[:]
            self.tokens[self.i] = token[1:]
            return ("num", Fraction(token[0]), None)
        return self.base()

    def function(self, name):
        """\\frac, \\sqrt[n] and \\log_2, \\sin^2 x, \\sin^{-1}, ... after their name."""
        if name in ("frac", "binom"):
            return ("call", name, [self.argument(), self.argument()])
        if name == "sqrt":
            root = ("num", Fraction(2), None)
            if self.peek() == "[":
                end = self.partner[self.i]
                root = self.window(self.i + 1, end, self.expression)
                self.i = end + 1
            return ("call", "root", [self.argument(whole_number=True), root])
        base = power = None
        while self.peek() in ("_", "^"):
            if self.take() == "_":
                base = self.argument(whole_number=True)
            else:
                power = self.argument(whole_number=True)
        if power == ("num", Fraction(-1), None) and name in TRIGONOMETRIC:
            name, power = "arc" + name, None
        arguments = self.arguments()
        if base is not None:
            arguments, name = arguments + [base], {"log": "log_b"}.get(name, "")
        tree = ("call", name, arguments)
        return ("^", tree, power) if power is not None else tree

    def arguments(self):
        """\\sin(x), \\sin 2x, \\sin\\frac{x}{2}, \\gcd(a, b)"""
        if self.peek() in ("(", "{", "[", "\\{"):
            tree = self.base()
            if tree[0] == "seq":
                return tree[3]
            if self.peek() == "^":  # \\ln (x)^2 is read as it is printed
                raise NotMath
            return [tree]
        tree = self.factor()
        while (self.i < self.end and self.peek() not in ("+", "-", "*", "|", "/")
               and self.peek()[1:] not in ANGLE_FUNCTIONS and self.peek()[0] != "("):
            tree = product(tree, self.factor())
        if not symbols(tree) and self.take("/"):
            tree = ("/", tree, self.factor())
        return [tree]


def number(token):
    mantissa, _, exponent = token.lower().partition("e")
    if len(token) > 1000 and exponent or len(exponent) > 4:
        raise NotMath
    places = len(mantissa.partition(".")[2]) if "." in mantissa else None
    value = Fraction(mantissa.rstrip("."))
    if exponent:
        value *= Fraction(10) ** int(exponent)
        places = (places or 0) - int(exponent)
    return ("num", value, places)


def negated(tree):
    match tree:
        case ("num", value, places):
            return ("num", -value, places)
        case ("inf", sign):
            return ("inf", -sign)
    return product(("num", Fraction(-1), None), tree)


def product(a, b):
    if b[0] == "matrix":
        return ("matrix", [[product(a, cell) for cell in row] for row in b[1]])
    return ("*", [*(a[1] if a[0] == "*" else [a]), b])


def canonical_unit(words):
    """cm^2, square centimetres, sq. cm: one name; "?" for a word that is no unit known here."""
    words = words.lower().replace("squared", "^2").replace("cubed", "^3")
    if time_of_day := re.search(r"\b[ap]\.?\s?m\b|noon|midnight", words):
        return squash(time_of_day[0])
    power = {"square": "2", "sq": "2", "cubic": "3"}
    names, suffix = [], ""
    for word in re.findall(r"[a-z]+|[°%¢]|\d|/", words):
        if word in power:
            suffix = power[word]
        elif word.isdigit():
            suffix = word
        else:
            names.append(UNITS.get(word, "?"))
    return "?" if "?" in names else "".join(names) + suffix


def symbols(tree):
    """Names of the variables in a tree; e, i and pi are none."""
    if isinstance(tree, tuple) and tree[0] == "sym":
        return {tree[1]} - CONSTANTS
    return set().union(*map(symbols, tree)) if isinstance(tree, (tuple, list)) else set()


def has_decimals(tree):
    if isinstance(tree, tuple) and tree[0] == "num":
        return tree[2] is not None
    return isinstance(tree, (tuple, list)) and any(map(has_decimals, tree))


def decimal_places(tree):
    """Digits after the point of a decimal, scientific notation included; None if it is none."""
    match tree:
        case ("num", _, places):
            return places
        case ("*", [("num", _, places), ("^", ("num", Fraction(numerator=10), None),
                                         ("num", exponent, None))]) if exponent.denominator == 1:
            return (places or 0) - int(exponent)
        case ("*", [("num", value, None), ("num", _, int(places))]) if value == -1:
            return places
    return None


def text_tree(text):
    text = squash(text)
    if re.fullmatch("(?:there(?:is|are))?no(?:real|integer)?solutions?", text):
        return ("seq", "{", "}", [])
    if re.fullmatch("all(?:the)?real(?:number)?s?|realnumbers|allrealnumbers", text):
        return ("seq", "(", ")", [("inf", -1), ("inf", 1)])
    return ("text", text)


def squash(text):
    """Words without case, blanks, punctuation and a leading article."""
    return re.sub(r"^\W*(?:an?|the)\s|[\W_]", "", text.lower())


# ---------------------------------------------------------------------------------------------
# Maths: the value of a tree


def bounded(value):
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise TooBig
    return value


def fold(tree, values):
    """The tree with its variables put in and everything that is rational worked out exactly: a
    Fraction, or a tree over Fractions. TooBig beyond MAX_BITS."""
    match tree:
        case Fraction():
            return tree
        case ("num", value, _):
            return bounded(value)
        case ("sym", name):
            return values.get(name, tree)
        case ("+" | "*" as kind, items):
            total, rest = Fraction(kind == "*"), []
            for item in (fold(item, values) for item in items):
                if isinstance(item, Fraction):
                    total = bounded(total + item if kind == "+" else total * item)
                else:
                    rest.append(item)
            return (kind, [total, *rest]) if rest else total
        case ("/", a, b) | ("call", "frac", [a, b]):
            a, b = fold(a, values), fold(b, values)
            if b == 0:
                raise NotMath
            both = isinstance(a, Fraction) and isinstance(b, Fraction)
            return bounded(a / b) if both else ("/", a, b)
        case ("^", a, b):
            return power(fold(a, values), fold(b, values))
        case ("call", "root", [a, n]):
            return fold(("^", a, ("/", Fraction(1), n)), values)
        case ("call", name, arguments):
            arguments = [fold(item, values) for item in arguments]
            if all(isinstance(item, Fraction) for item in arguments) and name in RATIONAL:
                return bounded(RATIONAL[name](*arguments))
            return ("call", name, arguments)
    raise NotMath


def power(a, b):
    """a^b of folded trees: a Fraction where both are and the result is, else the tree."""
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        return ("^", a, b)
    if a == 0 and b <= 0:
        raise NotMath
    if a < 0 and b.denominator % 2 and b.denominator > 1:  # the real root
        root = power(-a, b)
        return root if b.numerator % 2 == 0 else fold(("*", [Fraction(-1), root]), {})
    if b.denominator != 1:
        root = exact_root(a, b.denominator)
        if root is None:
            return ("^", a, b)
        a, b = root, Fraction(b.numerator)
    if a in (0, 1, -1):
        return a ** (int(b) % 2 or 2)
    if (a.numerator.bit_length() + a.denominator.bit_length()) * abs(b) > MAX_BITS:
        raise TooBig
    return a ** int(b)


def exact_root(value, n):
    """The rational n-th root of a fraction that is not negative, or None."""
    if value < 0 or n > 64:
        return None
    root = Fraction(integer_root(value.numerator, n), integer_root(value.denominator, n))
    return root if root ** n == value else None


def integer_root(value, n):
    """The largest r with r^n <= value: bisection on whole numbers."""
    if n == 2:
        return math.isqrt(value)
    low, high = 0, 1 << (value.bit_length() // n + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle ** n <= value else (low, middle - 1)
    return low


def whole(value, most):
    if value.denominator != 1 or value < 0:
        raise NotMath
    if value > most:
        raise TooBig
    return int(value)


RATIONAL = {  # functions whose value is rational where their arguments are
    "abs": lambda x: abs(x),
    "floor": lambda x: Fraction(math.floor(x)),
    "ceil": lambda x: Fraction(math.ceil(x)),
    "factorial": lambda n: Fraction(math.factorial(whole(n, MAX_BITS // 8))),
    "factorial2": lambda n: Fraction(math.prod(range(whole(n, MAX_BITS // 8), 0, -2))),
    "binom": lambda n, k: Fraction(math.comb(whole(n, MAX_BITS), whole(k, MAX_BITS // 8))),
    "gcd": lambda *items: Fraction(math.gcd(*(whole(abs(x), 1 << MAX_BITS) for x in items))),
    "lcm": lambda *items: Fraction(math.lcm(*(whole(abs(x), 1 << MAX_BITS) for x in items))),
    "max": lambda *items: max(items),
    "min": lambda *items: min(items),
}


MPMATH = {  # the names that mpmath has for functions of one number
    **{name: name for name in "sin cos tan cot sec csc sinh cosh tanh exp floor ceil".split()},
    "ln": "log", "lg": "log10", "arcsin": "asin", "arccos": "acos", "arctan": "atan", "cis": "expj"}


def numeric(tree, mp, log):
    """The value of a folded tree in mpmath's numbers of the working precision."""
    match tree:
        case Fraction():
            return mp.mpf(tree.numerator) / tree.denominator
        case ("sym", name):
            return {"e": mp.e, "i": mp.j, "pi": mp.pi, "π": mp.pi}[name] * 1
        case ("+", items):
            return sum((numeric(item, mp, log) for item in items), mp.mpf(0))
        case ("*", items):
            return math.prod((numeric(item, mp, log) for item in items), start=mp.mpf(1))
        case ("/", a, b):
            return numeric(a, mp, log) / numeric(b, mp, log)
        case ("^", a, b):
            a, b = numeric(a, mp, log), numeric(b, mp, log)
            if abs(b) > 10000:
                raise NotMath
            odd_root = isinstance(tree[2], Fraction) and tree[2].denominator % 2
            if odd_root and mp.im(a) == 0 and mp.re(a) < 0:  # the real one
                return (-1) ** tree[2].numerator * (-a) ** b
            return a ** b
        case ("call", name, arguments):
            values = [numeric(item, mp, log) for item in arguments]
            if name in ("exp", "sinh", "cosh", "tanh") and abs(values[0]) > 10000:
                raise NotMath
            return transcendental(name, values, mp, log)
    raise NotMath


def transcendental(name, values, mp, log):
    """A function's value by mpmath (mp); `log` is the base of a bare log."""
    x = values[0]
    match name:
        case "log":
            return mp.log(x) / (mp.log(10) if log == 10 else 1)
        case "log_b":
            return mp.log(x) / mp.log(values[1])
        case "degrees":
            return x * mp.pi / 180
        case "abs" | "max" | "min":
            return getattr(builtins, name)(*values)
    if name not in MPMATH:
        raise NotMath
    return getattr(mp, MPMATH[name])(x)


# ---------------------------------------------------------------------------------------------
# Maths: equality


def same(a, b):
    """Whether two trees, predicted and gold, are one answer. Raises NotMath where they cannot be
    compared, TooBig where it takes more than this effort allows."""
    if a == b:
        return True
    match a, b:  # 3m for 3: metres, as the gold answer knows no variable m
        case (("*", [("num", *_) as x, ("sym", "m" | "s" | "g" | "L" | "h")])
              | ("*", [("num", *_) as x, ("^", ("sym", "m"), _)])
              | ("/", ("*", [("num", *_) as x, ("sym", "m")]), ("sym", "s"))), ("num", *_):
            a = x
    if "rel" not in (a[0], b[0]):  # whose sides may have units
        a, b = without_unit(a, b), without_unit(b, a)
    if a is None or b is None:
        return False
    match a, b:
        case (("text", x), ("sym", y)) | (("sym", y), ("text", x)):
            return x == y.lower()
        case ("rel", *_), _:
            return same_relation(a, b)
        case _, ("rel", *_):
            return same_relation(b, a)
        case ("unit", x, _), ("unit", y, _):  # percent signs: no other unit is left
            return same(x, y)
        case ("unit", x, _), _:
            return same(x, b) or same(("/", x, HUNDRED), b)
        case _, ("unit", y, _):
            return same(a, y) or same(a, ("/", y, HUNDRED))
        case ("seq", "{", "}", x) | ("union", x), ("seq", "{", "}", y) | ("union", y):
            return same_elements(x, y)
        case (("seq", "{", "}", [x]), y) | (y, ("seq", "{", "}", [x])):
            return same(x, y)
        case ("seq", "{", "}", x), ("seq", "(", ")", _) if point(x):
            return same(point(x), b)
        case ("seq", "(", ")", _), ("seq", "{", "}", y) if point(y):
            return same(a, point(y))
        case ("seq", *brackets, x), ("seq", *others, y):
            return brackets == others and len(x) == len(y) and all(
                same(p, q) for p, q in zip(x, y, strict=True))
        case ("matrix", x), ("matrix", y):
            return list(map(len, x)) == list(map(len, y)) and all(
                same(p, q) for row, other in zip(x, y, strict=True)
                for p, q in zip(row, other, strict=True))
    if a[0] in STRUCTURES or b[0] in STRUCTURES:
        return False
    return same_value(a, b)


def without_unit(tree, other):
    """A tree less its unit; None where the other side has another unit. A percent sign stays."""
    match tree, other:
        case ("unit", _, "%"), _:
            return tree
        case ("unit", x, unit), ("unit", _, its):
            return x if "?" in (unit, its) or unit == its else None
        case ("unit", x, _), _:
            return x
    return tree


def same_elements(a, b):
    """Equal as unordered lists: each element has its partner, and none is left."""
    if len(a) != len(b) or len(a) > MAX_ELEMENTS:
        return False
    left = list(b)
    for x in a:
        partner = next((i for i, y in enumerate(left) if same(x, y)), None)
        if partner is None:
            return False
        del left[partner]
    return True


def same_relation(a, b):
    """a is a relation: an equation, an inequality or a chain of them."""
    a, b = simplified(a), simplified(b)
    if a[0] != "rel":
        return same(a, b)
    span, other = interval(a), interval(b)
    if b[0] != "rel":
        for name, value in ((a[2][0], a[2][-1]), (a[2][-1], a[2][0])):
            if a[1] == ["="] and is_name(name) and (
                    name[0] == "*" or not symbols(value) & symbols(name)):
                return same(value, b)
        return span is not None and same(span[1], b)
    if span and other:
        return span[0] == other[0] and same(span[1], other[1])
    if a[1] != b[1]:
        return False
    if len(a[1]) > 1 or any(side[0] in STRUCTURES for side in a[2] + b[2]):
        return all(same(p, q) for p, q in zip(a[2], b[2], strict=True))
    (p, q), (r, s) = a[2], b[2]
    return proportional(("+", [p, negated(q)]), ("+", [r, negated(s)]), a[1][0] in "<≤")


def simplified(tree):
    """x = 6/2 = 3 is x = 3, 2 + 5 = 7 is 7, 1/3 ≈ 0.33 is 1/3; 3 > x is x < 3."""
    match tree:
        case ("rel", operators, sides) if set(operators) <= {"=", "≈"}:
            if operators == ["≈"] and not symbols(tree):
                return sides[0] if same(*sides) else ("rel", ["contradiction"], sides)
            if operators[-1] == "≈" and len(sides) > 2:
                sides = sides[:-1]
            named = is_name(sides[0]) and len(sides) > 1
            values = sides[named:]
            if named and not symbols(values[-1]):  # A = pi r^2 = 9 pi
                values = [value for value in values if is_name(value) or not symbols(value)]
            if len(values) > 1 and (named or not symbols(tree)) and not all(
                    same(value, values[-1]) for value in values[:-1]):
                return ("rel", ["contradiction"], sides)
            if named:
                return ("rel", ["="], [sides[0], values[-1]])
            return ("rel", ["="] * (len(sides) - 1), sides) if symbols(tree) else values[-1]
        case ("rel", operators, sides) if set(operators) <= {">", "≥"}:
            return ("rel", ["<" if op == ">" else "≤" for op in operators[::-1]], sides[::-1])
    return tree


def point(equations):
    """x = 1, y = 2 is the point (1, 2); None for what is none."""
    values = {item[2][0]: item[2][1] for item in equations
              if item[:2] == ("rel", ["="]) and item[2][0][0] == "sym"}
    if 1 < len(values) == len(equations):
        return ("seq", "(", ")", [values[name] for name in sorted(values)])
    return None


def is_name(tree):
    """x, x_1, f(x), (x, y), Area: what an equation may name."""
    match tree:
        case ("sym", name):
            return name not in CONSTANTS
        case ("text", _):
            return True
        case ("*", [("sym", _) | ("^", ("sym", _), ("num", -1, _)), ("num", *_)]):
            return True  # f(2)
        case ("*", [("^", ("sym", _), ("num", -1, _)), ("sym", _)]):
            return True  # the inverse of f
        case ("*", [("sym", first), *rest]) if all(item[0] == "sym" for item in rest):
            return (first + rest[0][1]).isupper() or len(rest) == 1 and (  # AB, f(x), P(A)
                first[0].isupper() or first[0] in "fghpq" and rest[0][1] in "xyztnk")
        case ("call", "abs", [("*", _) as x]) | ("call", "sin" | "cos" | "tan", [x]):
            return is_name(x)
        case ("seq", "(", ")", items):
            return all(item[0] == "sym" for item in items)
    return False


def interval(tree):
    """(variable, interval) of a < x ≤ b and x < b, two intervals of x ≠ a; else None."""
    def of(low, left, name, right, high):
        return name, ("seq", "(" if left == "<" else "[", ")" if right == "<" else "]", [low, high])
    match tree:
        case ("rel", ["≠"], [name, value]) if is_name(name) and not symbols(value):
            return name, ("union", [("seq", "(", ")", [("inf", -1), value]),
                                    ("seq", "(", ")", [value, ("inf", 1)])])
        case ("rel", ["<" | "≤" as op], [("call", "abs", [("sym", _) as name]), high]):
            return of(negated(high), op, name, op, high)
        case ("rel", ["<" | "≤" as op], [name, high]) if is_name(name) and not symbols(high):
            return of(("inf", -1), "<", name, op, high)
        case ("rel", ["<" | "≤" as op], [low, name]) if is_name(name) and not symbols(low):
            return of(low, op, name, "<", ("inf", 1))
        case ("rel", ["<" | "≤" as left, "<" | "≤" as right], [low, name, high]) if is_name(name):
            return of(low, left, name, right, high)
    return None


def same_value(a, b):
    """Equal numbers, or expressions that agree at random points.

    Whatever is rational is compared exactly. Otherwise both sides are worked out to a precision
    that grows with the digits in them, until they differ or agree to all of it. Two different
    expressions of an answer's size do not agree at random points (Schwartz-Zippel), nor to some
    hundred digits by chance."""
    names = sorted(symbols(a) | symbols(b))
    if not names:
        x, y = fold(a, {}), fold(b, {})
        if agree(x, y):
            return True
        places = decimal_places(b)
        if places is None or has_decimals(a) or isinstance(x, Fraction) and x.denominator == 1:
            return False
        # does an exact prediction round to the gold's digits?
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            return abs(x - y) <= Fraction(10) ** -places / 2
        mp = mpmath_with(60)
        return abs(numeric(x, mp, 0) - numeric(y, mp, 0)) * 2 * mp.mpf(10) ** places <= 1
    if symbols(a) != symbols(b) and not (a[0] in "+*/^" or b[0] in "+*/^"):
        return False
    return on_points(names, lambda values: agree(fold(a, values),
                                                 fold(b, values)))


def points(names):
    """Rational points: above one, below one, of mixed signs. The same on every call."""
    rng = random.Random(1)
    for signs in (1, 1, 1, -1, -1, 1):
        for small in (False, True):
            yield {name: Fraction(rng.randint(1009, 4999), 1013) * (rng.choice((1, signs)))
                   / (5 if small else 1) for name in names}


def whole_points(names):
    """For what is defined on whole numbers alone, as n! is."""
    rng = random.Random(1)
    for _ in range(12):
        yield {name: Fraction(rng.randint(2, 12)) for name in names}


def on_points(names, agrees):
    """Whether the two sides agree wherever both are defined, and at three points at least."""
    agreed = 0
    for family in (points(names), whole_points(names)):
        for values in family:
            try:
                if not agrees(values):
                    return False
            except (NotMath, ZeroDivisionError, ValueError, KeyError):
                continue
            agreed += 1
        if agreed:
            break
    return agreed >= 3


def agree(x, y):
    """Whether two folded trees have the same value. A plain log has base e or base 10."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    digits = 60 + 2 * (size(x) + size(y))
    return any(agree_numeric(x, y, digits, log) for log in ((0, 10) if "log" in
               str((x, y)) else (0,)))


def agree_numeric(x, y, digits, log):
    for precision in (digits, 4 * digits):
        mp = mpmath_with(precision)
        a, b = numeric(x, mp, log), numeric(y, mp, log)
        scale, difference = max(abs(a), abs(b)), abs(a - b)
        if not mp.isfinite(scale):
            raise NotMath
        if difference > mp.mpf(10) ** (-precision // 2) * max(1, scale):
            return False
        if difference <= mp.mpf(10) ** (-precision * 2 // 3) * scale:
            break
    return True


def size(tree):
    """Decimal digits in the numbers of a folded tree."""
    if isinstance(tree, Fraction):
        return (tree.numerator.bit_length() + tree.denominator.bit_length()) // 3
    if isinstance(tree, (tuple, list)):
        return sum(map(size, tree))
    return 0


def proportional(a, b, positive):
    """Whether a = k b with a constant k: two equations are one where their differences are. For
    an inequality k is positive."""
    if not symbols(a) or symbols(a) != symbols(b):
        return False
    ratio = None

    def agrees(values):
        nonlocal ratio
        x, y = fold(a, values), fold(b, values)
        this = x / y if isinstance(x, Fraction) and isinstance(y, Fraction) else ("/", x, y)
        ratio = this if ratio is None else ratio
        sign = this if isinstance(this, Fraction) else numeric(this, mpmath_with(60), 0)
        if positive and (getattr(sign, "imag", 0) != 0 or sign < 0):
            return False
        return agree(this, ratio)
    return on_points(sorted(symbols(a)), agrees)


def mpmath_with(digits):
    if MAX_BITS < WORKER_BITS:
        raise TooBig
    if digits > 20000:
        raise NotMath
    import mpmath
    mpmath.mp.dps = digits
    return mpmath.mp


def plain(text):
    return re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|boxed)\s*(?=\{)|[{}$*`]|\\[ ,;]", "",
                  text).strip()


def sole_letter(gold):
    """The letter of a gold answer that is one, (C) or C; else None."""
    match = re.fullmatch(r"\(?([A-J])\)?\.?", plain(gold))
    return match[1] if match else None


def choice_letter(text):
    """The letter of a text that is one option: C, (C), \\text{C.}, C) 14 cm; None for two."""
    match = OPTION.match(plain(text))
    if not match or SECOND_OPTION.match(plain(text)[match.end():]):
        return None
    return (match[1] or match[2] or match[3]).upper()


def compare(predicted, gold):
    """Whether two answers are equal, by rules of rising cost; raises TooBig."""
    if predicted.strip() == gold.strip():
        return True
    if letter := sole_letter(gold):
        return choice_letter(predicted) == letter
    try:
        a, b = parse(predicted), parse(gold)
        return same(a, b)
    except NotMath:
        try:
            a, b = respell(predicted), respell(gold)
        except NotMath:
            return False
        a, b = (re.sub(r"[⟪⟫]|(?<!\d) | (?!\d)", "", " ".join(text.split())) for text in (a, b))
        return a == b and a != ""
    except RecursionError:
        raise TooBig from None


def equal(predicted, gold):
    """`compare` in a process that may be killed. What a hostile formula provokes in the arithmetic
    is no equality."""
    try:
        return compare(predicted, gold)
    except (ArithmeticError, ValueError, TooBig):
        return False


def equality_verdict(predicted, gold):
    return Verdict(equal(predicted, gold), "compared")


def math_verdict(response, gold):
    """The verdict on a response's answer, see `verify_math`."""
    letter = sole_letter(gold)
    extracted, how = find_answer(response)
    if letter and how != "box" and (found := find_letter(response)):
        extracted, how = found, "phrase"
    if extracted is None or how == "number" and not is_number(gold):
        return Verdict(False, "no answer", None)
    passed = equal(extracted, gold)
    return Verdict(passed, "correct" if passed else "wrong answer", extracted)


def is_number(gold):
    try:
        tree = parse(gold)
        if tree[0] == "unit":
            tree = tree[1]
        return isinstance(fold(tree, {}), Fraction)
    except (NotMath, TooBig, ArithmeticError, ValueError, RecursionError):
        return False


# ---------------------------------------------------------------------------------------------
# Multiple choice


def find_letter(response):
    """The letter, A to J, that a response chooses, or None: the boxed one, else the one after
    "answer is", "the correct option is" and their like, else a lone bold one. The articles a and
    I are none."""
    box = last_box(response)
    if box and (letter := choice_letter(box)):
        return letter
    for match in reversed(list(CHOICE_PHRASE.finditer(response))):
        tail = response[match.end():match.end() + 200].lstrip(" \t\n*_:=$")
        tail = re.sub(r"^(?:option|choice|letter)\s+", "", tail, flags=re.IGNORECASE).lstrip("*_")
        tail = re.sub(r"^\\\(|^\\text(?:bf)?\{|^\{", "", tail)
        if letter := CHOSEN.match(tail):
            return (letter[1] or letter[2]).upper()
    head, mark, tail = response.rpartition("####")
    if mark and (letter := choice_letter(tail.strip().split("\n")[0])):
        return letter
    if box is None:
        bold = re.findall(r"\*\*\s*\(?([A-J])\)?[.):]?\s*\*\*", response)
        if bold and len(set(bold)) == 1:
            return bold[0]
        if match := re.fullmatch(r"\s*\(?([A-J])\)?[.]?\s*", response):
            return match[1]
    return None


def choice_verdict(response, gold):
    """The verdict on the letter that a response chooses."""
    letter = find_letter(response)
    if letter is None:
        box = last_box(response) or None
        return Verdict(False, "wrong answer" if box else "no answer", box)
    passed = letter == choice_letter(gold)
    return Verdict(passed, "correct" if passed else "wrong answer", letter)


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
    ended, _, _ = select.select([handle], [], [], 3 * timeout + 5)
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
            raise BadInput(f"field {name} is missing or not of its type")
    if sample.get("finish_reason") == "length":
        return Verdict(False, "truncated")
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
    return equal(ours, theirs) if kind == "math" else ours.split() == theirs.split()


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
    global SANDBOX, MAX_BITS
    MAX_BITS = WORKER_BITS
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
        except EOFError:
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


def math_equal(predicted, gold):
    """Whether two answers are the same: bare LaTeX or text, or with a box around it. False where
    that cannot be decided within MATH_TIMEOUT seconds."""
    try:
        return compare(predicted, gold)
    except TooBig:
        return ask("equality_verdict", predicted, gold).passed
    except (ArithmeticError, ValueError):
        return False


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


def scores(rows):
    """The figures of verified rows: one dict for each source of each model, and one for all of a
    model's several."""
    models = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        models[str(row.get("model") or "")][str(row.get("source") or "")].append(row)
    scores = []
    for model, sources in sorted(models.items()):
        scores += [score(model, source, rows) for source, rows in sorted(sources.items())]
        if len(sources) > 1:
            scores.append(score(model, "all", list(itertools.chain(*sources.values()))))
    return scores


def score(model, source, rows):
    """The standard error is that of the mean over problems of their means."""
    problems = collections.defaultdict(list)
    for row in rows:
        problems[problem_key(row)].append(row)
    results = [(len(samples), sum(row["passed"] for row in samples))
               for samples in problems.values()]
    means = [passed / n for n, passed in results]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    most, _ = max(results)
    ks = sorted({most, *(2 ** i for i in range(most.bit_length()))})
    chances = {k: statistics.fmean(pass_at_k(n, passed, k) for n, passed in results if n >= k)
               for k in ks}
    voted = [majority(samples) for samples in problems.values() if samples[0]["kind"] != "code"]
    tokens = [row["num_tokens"] for row in rows
              if isinstance(row.get("num_tokens"), int) and row["num_tokens"] < 1 << 53]
    reasons = collections.Counter(
        re.sub(rf" on test \d+$|(?<={GRADER_ERROR}): .*", "", row["reason"]) for row in rows)
    return {
        "model": model,
        "source": source,
        "problems": len(problems),
        "samples": len(rows),
        "accuracy": statistics.fmean(means),
        "standard_error": error,
        "pass_at_k": chances,
        "majority": statistics.fmean(voted) if voted else None,
        "n": most,
        "mean_tokens": statistics.fmean(tokens) if tokens else None,
        "reasons": dict(reasons.most_common())}


def pass_at_k(n, passed, k):
    """The chance that one of k of the n samples passes: the unbiased estimate, arXiv 2107.03374."""
    return 1 - math.comb(n - passed, k) / math.comb(n, k)


def majority(samples):
    """1 where the answer given most often is correct; ties share it. All correct ones are equal,
    and wrong ones of one spelling; no answer is no vote."""
    votes = [row["passed"] or squash(row["extracted"] or "") for row in samples]
    leaders = statistics.multimode(filter(None, votes)) or [""]
    return (True in leaders) / len(leaders)


# Accuracies as published (novasky-ai.github.io/posts/sky-t1; MATH500 after the prompt's repair), by
# the names of data.EVALUATIONS.
MODELS = ("Sky-T1-32B-Preview", "Qwen2.5-32B-Instruct", "QwQ-32B-Preview", "o1-preview")
PUBLISHED = {
    "math500": (86.4, 81.4, 92.2, 81.4),
    "aime24": (43.3, 16.7, 50.0, 40.0),
    "livecodebench_easy": (86.3, 84.6, 90.7, 92.9),
    "livecodebench_medium": (56.8, 40.8, 56.3, 54.9),
    "livecodebench_hard": (17.9, 9.8, 17.1, 16.3),
    "gpqa_diamond": (56.8, 45.5, 52.5, 75.2),
}


def published(rows):
    """The published accuracies of the rows' sources, a line each. Their standard error is that of
    one answer to each of as many problems as a row has: 9 points for AIME's 30."""
    problems = {row["source"]: row["problems"] for row in rows}
    for source in sorted(PUBLISHED.keys() & problems.keys()):
        beside = [f"{name} {score} ± {math.sqrt(score * (100 - score) / problems[source]):.1f}"
                  for name, score in zip(MODELS, PUBLISHED[source], strict=True)]
        yield f"{source} as published: {', '.join(beside)}"


def table(rows):
    """The rows as text, the models' names where there are several, and the reasons of all."""
    def percent(value, before=""):
        return "" if value is None else f"{before}{100 * value:.1f}"
    lines = [["model", "source", "problems", "samples", "accuracy", "pass@k", "majority", "tokens"]]
    reasons = sum((collections.Counter(row["reasons"]) for row in rows if row["source"] != "all"),
                  collections.Counter())
    for row in rows:
        tokens = "-" if row["mean_tokens"] is None else f"{row['mean_tokens']:.0f}"
        lines.append([
            row["model"] or "-",
            row["source"] or "-",
            f"{row['problems']}",
            f"{row['samples']}",
            percent(row["accuracy"]) + percent(row["standard_error"], " ± "),
            ", ".join(percent(p, f"{k}: ") for k, p in row["pass_at_k"].items()),
            f"{percent(row['majority']) or '-'} @{row['n']}",
            tokens])
    if len({row["model"] for row in rows}) == 1:
        lines = [line[1:] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    counts = "; ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    return "\n".join([*text, *published(rows), "", counts])


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
    is given again, a type "path". Its own errors are BadInput, and so one line, as all others."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.register("action", None, Given)
        self.register("type", "path", expanded)

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


def check_above_0(args, *names):
    """Refuses flags, where they are given, that are not."""
    for name in names:
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise BadInput(f"--{name} {value}: must be above 0")


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
    """The verified rows, of their long texts only what `keep` takes of the response: its length,
    its hash and where in the file its row starts."""
    rows, start = [], 0
    with open(verified, "rb") as file:
        for line in file:
            row = json.loads(line)
            text = row["response"]
            short = {"id": row.get("id", row.get("prompt")),
                     "response": (len(text), hash(text), start)}
            rows.append(short | {name: row.get(name) for name in (
                "model", "source", "kind", "passed", "extracted", "reason", "num_tokens")})
            start += len(line)
    return rows


def keep(verified, rows, path, per_problem):
    """Write the passing rows, at most per_problem of each problem, the shortest first: long
    answers to easy questions are not rewarded. Exact duplicates are dropped. The file appears
    when it is complete. Returns the counts (kept, duplicates, beyond per_problem)."""
    problems = collections.defaultdict(dict)
    passing = [row for row in rows if row["passed"]]
    for row in passing:
        length, text, start = row["response"]
        problems[problem_key(row)].setdefault(text, (length, start))
    chosen = [start for samples in problems.values()
              for _, start in sorted(samples.values())[:per_problem]]
    with open(verified, "rb") as file, open(f"{path}.part", "wb") as out:
        for start in sorted(chosen):
            file.seek(start)
            out.write(file.readline())
    os.replace(out.name, path)
    different = sum(map(len, problems.values()))
    return len(chosen), len(passing) - different, different - len(chosen)


def parse_arguments():
    """The flags, checked."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add
    add("samples", "files of samples, a JSON object a line", nargs="+", type="path")
    add("--out", "the samples with passed, extracted and reason, in their order; what the file "
        "holds already is not verified again", required=True, type="path")
    add("--keep", "the samples that passed, for train.py", type="path")
    add("--per_problem", "keep at most so many of each problem, the shortest (all)", type=int)
    add("--timeout", "CPU seconds of a program's test", type=float, default=10.0)
    add("--memory", "bytes of address space of a program", type=int, default=DEFAULT_MEMORY)
    add("--workers", "processes, one a core", type=int, default=CORES)
    add("--allow_unsafe", "run programs even where they cannot be confined", action="store_true")
    add("--json", "print the summary as JSON", action="store_true")
    args = parser.parse_args()
    check_above_0(args, "per_problem", "timeout", "memory", "workers")
    return args


def main():
    """Verify what is not verified yet, write each verdict as it is there, then keep and print."""
    # 1. what can be refused is refused before anything is read
    args = parse_arguments()
    sys.set_int_max_str_digits(0)
    for name in args.samples:
        if not os.path.isfile(name):
            raise BadInput(f"{name}: no such file")
    paths = [*args.samples, args.out] + [args.keep] * bool(args.keep)
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise BadInput("samples, --out and --keep must be different files")
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

    # 4. keep and print
    rows = read_back(args.out)
    counts = keep(args.out, rows, args.keep, args.per_problem) if args.keep else [None]
    errors = [f"{row['source']} {row['id']}: {row['reason']}" for row in rows
              if row["reason"].startswith(GRADER_ERROR)]
    if args.json:
        print(json.dumps({
            "rows": scores(rows),
            "kept": counts[0],
            "grader_errors": errors}))
        return
    print(table(scores(rows)))
    if errors:
        print(f"{len(errors)} samples have no verdict, the grader failed:", *errors[:20],
              sep="\n  ")
    if args.keep:
        print("kept {}, dropped {} duplicates and {} beyond --per_problem".format(*counts))


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
            print(f"error: {error}", file=sys.stderr)
            os._exit(2)  # without waiting for the workers: they end with this process
        except KeyboardInterrupt:
            os._exit(130)
