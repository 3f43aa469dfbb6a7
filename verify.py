"""Answers: what a response says, and whether it is right.

    python verify.py samples.jsonl --out verified.jsonl --keep kept.jsonl

Three kinds of problem: maths (equal answers, not equal strings), multiple choice (the letter),
programs (every test run in a sandbox, its output compared outside of the program's reach). A
wrong accept enters the training set, a wrong reject costs one sample: in doubt an answer is wrong.
Nothing that a model wrote is ever evaluated as Python outside of the sandbox.

In order: maths (extraction, spelling, parsing, values, equality), worker processes, multiple
choice, programs (the sandbox, the tests), the command. Needs neither torch nor the other files;
mpmath, for answers with roots, logarithms and angles, comes with torch's sympy. Programs need
Linux on x86_64 or aarch64.
"""
import argparse
import atexit
import builtins
import collections
import concurrent.futures
import ctypes
import errno
import fcntl
import gc
import hashlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

MATH_TIMEOUT = 5     # seconds; a worker that takes longer is killed
MAX_LENGTH = 4000    # characters of an answer that is parsed; a longer one is compared as text
MAX_DEPTH = 50       # of brackets
MAX_ELEMENTS = 200   # of a list or set
HUNDRED = ("num", Fraction(100), None)
CONSTANTS = {"e", "i", "pi", "π"}


class NotMath(Exception):
    """The text has no reading as a formula, or the formula no value: it is compared as text."""


class TooBig(Exception):
    """Beyond what is worked out in this process, or at all."""


@dataclass(frozen=True)
class Verdict:
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

TEST_FORMS = ({"input": str, "output": str}, {"assert": str},
              {"fn_name": str, "args": list, "expected": object})
LAYERS = ("seccomp", "landlock", "namespaces", "limits", "uid")
DEFAULT_MEMORY = 1 << 31
SIMPLE = ("None", "bool", "int", "float", "str", "bytes")  # kinds of values without parts
MAX_RESULT = 16 << 20  # bytes of a returned value's form
MAX_OUTPUT = 64 << 20  # bytes that a program may print
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
TESTED = {}            # containment by layers left out
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x8000000, 0x10000000, 0x40000000
libc = ctypes.CDLL(None, use_errno=True)
FENCE = re.compile(r"^[ \t]*(```+|~~~+)[^\n`]*\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)
DECIMAL = re.compile(rb"[+-]?(?=[0-9.])[0-9]*(?:\.[0-9]*(?:[eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+)")
SIGNED = re.compile(rb"[+-]?(?=\.?[0-9])[0-9]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?")
# What a program finds imported before its process loses the right to open files.
PRELOADED = [*sorted(sys.stdlib_module_names - set(
    "__main__ antigravity idlelib lib2to3 this tkinter turtle turtledemo".split())),
    *"""collections.abc concurrent.futures.thread encodings.ascii encodings.cp1252 encodings.idna
    encodings.latin_1 encodings.utf_8 encodings.utf_8_sig encodings.utf_16 encodings.utf_32
    importlib.util json.tool logging.handlers os.path unittest.mock urllib.parse urllib.request
    xml.etree.ElementTree numpy numpy.random numpy.linalg numpy.fft numpy.polynomial
    numpy.ma""".split()]
USUAL_NAMES = """
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from functools import cache, cmp_to_key, lru_cache, reduce
from heapq import heapify, heappop, heappush, nlargest, nsmallest
from itertools import accumulate, chain, combinations, count, groupby, permutations, product
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, log2, sqrt
from typing import Any, Callable, Deque, Dict, Iterable, List, Optional, Set, Tuple, Union
"""


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


def bounded(value, limit):
    if value.numerator.bit_length() + value.denominator.bit_length() > limit:
        raise TooBig
    return value


def fold(tree, values, limit):
    """The tree with its variables put in and everything that is rational worked out exactly: a
    Fraction, or a tree over Fractions. TooBig beyond `limit` bits."""
    match tree:
        case Fraction():
            return tree
        case ("num", value, _):
            return bounded(value, limit)
        case ("sym", name):
            return values.get(name, tree)
        case ("+" | "*" as kind, items):
            total, rest = Fraction(kind == "*"), []
            for item in (fold(item, values, limit) for item in items):
                if isinstance(item, Fraction):
                    total = bounded(total + item if kind == "+" else total * item, limit)
                else:
                    rest.append(item)
            return (kind, [total, *rest]) if rest else total
        case ("/", a, b) | ("call", "frac", [a, b]):
            a, b = fold(a, values, limit), fold(b, values, limit)
            if b == 0:
                raise NotMath
            both = isinstance(a, Fraction) and isinstance(b, Fraction)
            return bounded(a / b, limit) if both else ("/", a, b)
        case ("^", a, b):
            return power(fold(a, values, limit), fold(b, values, limit), limit)
        case ("call", "root", [a, n]):
            return fold(("^", a, ("/", Fraction(1), n)), values, limit)
        case ("call", name, arguments):
            arguments = [fold(item, values, limit) for item in arguments]
            if all(isinstance(item, Fraction) for item in arguments) and name in RATIONAL:
                return bounded(RATIONAL[name](limit, *arguments), limit)
            return ("call", name, arguments)
    raise NotMath


def power(a, b, limit):
    """a^b of folded trees: a Fraction where both are and the result is, else the tree."""
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        return ("^", a, b)
    if a == 0 and b <= 0:
        raise NotMath
    if a < 0 and b.denominator % 2 and b.denominator > 1:  # the real root
        root = power(-a, b, limit)
        return root if b.numerator % 2 == 0 else fold(("*", [Fraction(-1), root]), {}, limit)
    if b.denominator != 1:
        root = exact_root(a, b.denominator)
        if root is None:
            return ("^", a, b)
        a, b = root, Fraction(b.numerator)
    if a in (0, 1, -1):
        return a ** (int(b) % 2 or 2)
    if (a.numerator.bit_length() + a.denominator.bit_length()) * abs(b) > limit:
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
    "abs": lambda limit, x: abs(x),
    "floor": lambda limit, x: Fraction(math.floor(x)),
    "ceil": lambda limit, x: Fraction(math.ceil(x)),
    "factorial": lambda limit, n: Fraction(math.factorial(whole(n, limit // 8))),
    "factorial2": lambda limit, n: Fraction(math.prod(range(whole(n, limit // 8), 0, -2))),
    "binom": lambda limit, n, k: Fraction(math.comb(whole(n, limit), whole(k, limit // 8))),
    "gcd": lambda limit, *items: Fraction(math.gcd(*(whole(abs(x), 1 << limit) for x in items))),
    "lcm": lambda limit, *items: Fraction(math.lcm(*(whole(abs(x), 1 << limit) for x in items))),
    "max": lambda limit, *items: max(items),
    "min": lambda limit, *items: min(items),
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


def same(a, b, effort):
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
            return same_relation(a, b, effort)
        case _, ("rel", *_):
            return same_relation(b, a, effort)
        case ("unit", x, _), ("unit", y, _):  # percent signs: no other unit is left
            return same(x, y, effort)
        case ("unit", x, _), _:
            return same(x, b, effort) or same(("/", x, HUNDRED), b, effort)
        case _, ("unit", y, _):
            return same(a, y, effort) or same(a, ("/", y, HUNDRED), effort)
        case ("seq", "{", "}", x) | ("union", x), ("seq", "{", "}", y) | ("union", y):
            return same_elements(x, y, effort)
        case (("seq", "{", "}", [x]), y) | (y, ("seq", "{", "}", [x])):
            return same(x, y, effort)
        case ("seq", "{", "}", x), ("seq", "(", ")", _) if point(x):
            return same(point(x), b, effort)
        case ("seq", "(", ")", _), ("seq", "{", "}", y) if point(y):
            return same(a, point(y), effort)
        case ("seq", *brackets, x), ("seq", *others, y):
            return brackets == others and len(x) == len(y) and all(
                same(p, q, effort) for p, q in zip(x, y, strict=True))
        case ("matrix", x), ("matrix", y):
            return list(map(len, x)) == list(map(len, y)) and all(
                same(p, q, effort) for row, other in zip(x, y, strict=True)
                for p, q in zip(row, other, strict=True))
    if a[0] in STRUCTURES or b[0] in STRUCTURES:
        return False
    return same_value(a, b, effort)


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


def same_elements(a, b, effort):
    """Equal as unordered lists: each element has its partner, and none is left."""
    if len(a) != len(b) or len(a) > MAX_ELEMENTS:
        return False
    left = list(b)
    for x in a:
        partner = next((i for i, y in enumerate(left) if same(x, y, effort)), None)
        if partner is None:
            return False
        del left[partner]
    return True


def same_relation(a, b, effort):
    """a is a relation: an equation, an inequality or a chain of them."""
    a, b = simplified(a, effort), simplified(b, effort)
    if a[0] != "rel":
        return same(a, b, effort)
    span, other = interval(a), interval(b)
    if b[0] != "rel":
        for name, value in ((a[2][0], a[2][-1]), (a[2][-1], a[2][0])):
            if a[1] == ["="] and is_name(name) and (
                    name[0] == "*" or not symbols(value) & symbols(name)):
                return same(value, b, effort)
        return span is not None and same(span[1], b, effort)
    if span and other:
        return span[0] == other[0] and same(span[1], other[1], effort)
    if a[1] != b[1]:
        return False
    if len(a[1]) > 1 or any(side[0] in STRUCTURES for side in a[2] + b[2]):
        return all(same(p, q, effort) for p, q in zip(a[2], b[2], strict=True))
    (p, q), (r, s) = a[2], b[2]
    return proportional(("+", [p, negated(q)]), ("+", [r, negated(s)]), a[1][0] in "<≤", effort)


def simplified(tree, effort):
    """x = 6/2 = 3 is x = 3, 2 + 5 = 7 is 7, 1/3 ≈ 0.33 is 1/3; 3 > x is x < 3."""
    match tree:
        case ("rel", operators, sides) if set(operators) <= {"=", "≈"}:
            if operators == ["≈"] and not symbols(tree):
                return sides[0] if same(*sides, effort) else ("rel", ["contradiction"], sides)
            if operators[-1] == "≈" and len(sides) > 2:
                sides = sides[:-1]
            named = is_name(sides[0]) and len(sides) > 1
            values = sides[named:]
            if named and not symbols(values[-1]):  # A = pi r^2 = 9 pi
                values = [value for value in values if is_name(value) or not symbols(value)]
            if len(values) > 1 and (named or not symbols(tree)) and not all(
                    same(value, values[-1], effort) for value in values[:-1]):
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


def same_value(a, b, effort):
    """Equal numbers, or expressions that agree at random points.

    Whatever is rational is compared exactly. Otherwise both sides are worked out to a precision
    that grows with the digits in them, until they differ or agree to all of it. Two different
    expressions of an answer's size do not agree at random points (Schwartz-Zippel), nor to some
    hundred digits by chance."""
    names = sorted(symbols(a) | symbols(b))
    if not names:
        x, y = fold(a, {}, effort.bits), fold(b, {}, effort.bits)
        if agree(x, y, effort):
            return True
        places = decimal_places(b)
        if places is None or has_decimals(a) or isinstance(x, Fraction) and x.denominator == 1:
            return False
        # does an exact prediction round to the gold's digits?
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            return abs(x - y) <= Fraction(10) ** -places / 2
        mp = effort.mpmath(60)
        return abs(numeric(x, mp, 0) - numeric(y, mp, 0)) * 2 * mp.mpf(10) ** places <= 1
    if symbols(a) != symbols(b) and not (a[0] in "+*/^" or b[0] in "+*/^"):
        return False
    return on_points(names, lambda values: agree(fold(a, values, effort.bits),
                                                 fold(b, values, effort.bits), effort))


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


def agree(x, y, effort):
    """Whether two folded trees have the same value. A plain log has base e or base 10."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    digits = 60 + 2 * (size(x) + size(y))
    return any(agree_numeric(x, y, digits, effort, log) for log in ((0, 10) if "log" in
               str((x, y)) else (0,)))


def agree_numeric(x, y, digits, effort, log):
    for precision in (digits, 4 * digits):
        mp = effort.mpmath(precision)
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


def proportional(a, b, positive, effort):
    """Whether a = k b with a constant k: two equations are one where their differences are. For
    an inequality k is positive."""
    if not symbols(a) or symbols(a) != symbols(b):
        return False
    ratio = None

    def agrees(values):
        nonlocal ratio
        x, y = fold(a, values, effort.bits), fold(b, values, effort.bits)
        this = x / y if isinstance(x, Fraction) and isinstance(y, Fraction) else ("/", x, y)
        ratio = this if ratio is None else ratio
        sign = this if isinstance(this, Fraction) else numeric(this, effort.mpmath(60), 0)
        if positive and (getattr(sign, "imag", 0) != 0 or sign < 0):
            return False
        return agree(this, ratio, effort)
    return on_points(sorted(symbols(a)), agrees)


class Effort:
    """How much a comparison may cost: little in this process, more in one that can be killed."""

    def __init__(self, bits, numeric):
        self.bits, self.numeric = bits, numeric

    def mpmath(self, precision):
        if not self.numeric:
            raise TooBig
        if precision > 20000:
            raise NotMath
        import mpmath
        mpmath.mp.dps = precision
        return mpmath.mp


HERE, ELSEWHERE = Effort(4096, numeric=False), Effort(1 << 20, numeric=True)


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


def compare(predicted, gold, effort):
    """Whether two answers are equal, by rules of rising cost; raises TooBig."""
    if predicted.strip() == gold.strip():
        return True
    if letter := sole_letter(gold):
        return choice_letter(predicted) == letter
    try:
        a, b = parse(predicted), parse(gold)
        return same(a, b, effort)
    except NotMath:
        try:
            a, b = respell(predicted), respell(gold)
        except NotMath:
            return False
        a, b = (re.sub(r"[⟪⟫]|(?<!\d) | (?!\d)", "", " ".join(text.split())) for text in (a, b))
        return a == b and a != ""
    except RecursionError:
        raise TooBig from None


# ---------------------------------------------------------------------------------------------
# Maths: worker processes, which can be killed


class MathWorker:
    """This file as a process that compares answers, one JSON line each way. A time limit by
    signal would work in the main thread only, and not within a C function."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, __file__, "--math-worker"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self.reply(60) != b"ready":
            self.process.kill()
            raise RuntimeError("the process that compares answers does not start")

    def ask(self, predicted, gold, timeout):
        """True, False, or None when it had to be killed."""
        line = json.dumps([predicted, gold]).encode() + b"\n"
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError:
            return None
        return {b"1": True, b"0": False}.get(self.reply(timeout))

    def reply(self, timeout):
        poll, deadline, line = select.poll(), time.monotonic() + timeout, b""
        poll.register(self.process.stdout, select.POLLIN)
        while not line.endswith(b"\n"):
            if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
                return None
            part = os.read(self.process.stdout.fileno(), 100)
            if not part:
                return None
            line += part
        return line.strip()

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Pool:
    """Idle helper processes, shared by the threads of this process and by it alone: after a fork
    the child starts its own."""

    def __init__(self):
        self.idle, self.lock = {}, threading.Lock()
        os.register_at_fork(after_in_child=self.forget)
        atexit.register(self.close)

    def forget(self):
        self.idle, self.lock = {}, threading.Lock()

    def take(self, key, make):
        with self.lock:
            if self.idle.get(key):
                return self.idle[key].pop()
        return make()

    def give_back(self, key, helper):
        with self.lock:
            self.idle.setdefault(key, []).append(helper)

    def close(self):
        with self.lock:
            helpers, self.idle = [h for group in self.idle.values() for h in group], {}
        for helper in helpers:
            helper.close()


POOL = Pool()


def math_worker():
    """The process behind MathWorker."""
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    sys.setrecursionlimit(5000)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import mpmath  # noqa: F401
    except ImportError:
        print("verify.py: mpmath is not installed (it comes with sympy): answers with roots, "
              "logarithms and angles are compared as text", file=sys.stderr)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(2 * MATH_TIMEOUT)  # the kernel's: whoever asked and would kill it may be gone
        try:
            equal = compare(*json.loads(line), ELSEWHERE)
        except Exception:  # whatever a hostile formula provokes in the arithmetic: not equal
            equal = False
        signal.alarm(0)
        print(int(equal), flush=True)


def math_verdict(predicted, gold):
    """True, False, or None: not decided within MATH_TIMEOUT seconds."""
    try:
        return compare(predicted, gold, HERE)
    except TooBig:
        pass
    except (ArithmeticError, ValueError):
        return False
    worker = POOL.take("maths", MathWorker)
    verdict = worker.ask(predicted, gold, MATH_TIMEOUT)
    if verdict is None:
        worker.close()
    else:
        POOL.give_back("maths", worker)
    return verdict


def math_equal(predicted, gold):
    """Whether two answers are the same: bare LaTeX or text, or with a box around it. False where
    that cannot be decided within MATH_TIMEOUT seconds."""
    return math_verdict(predicted, gold) is True


def verify_math(response, gold):
    """The verdict on a response's answer. A mere last number answers only a question whose gold
    answer is a number."""
    letter = sole_letter(gold)
    extracted, how = find_answer(response)
    if letter and how != "box" and (found := find_letter(response)):
        extracted, how = found, "phrase"
    if extracted is None or how == "number" and not is_number(gold):
        return Verdict(False, "no answer", None)
    verdict = math_verdict(extracted, gold)
    reason = {True: "correct", False: "wrong answer", None: "timeout"}[verdict]
    return Verdict(verdict is True, reason, extracted)


def is_number(gold):
    try:
        tree = parse(gold)
        if tree[0] == "unit":
            tree = tree[1]
        return isinstance(fold(tree, {}, HERE.bits), Fraction)
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


def verify_choice(response, gold):
    """The verdict on the letter that a response chooses."""
    letter = find_letter(response)
    if letter is None:
        box = last_box(response) or None
        return Verdict(False, "wrong answer" if box else "no answer", box)
    passed = letter == choice_letter(gold)
    return Verdict(passed, "correct" if passed else "wrong answer", letter)


# ---------------------------------------------------------------------------------------------
# Programs: what comes out of the sandbox


def to_bytes(text):
    return text.encode("utf-8", "surrogatepass")


FORMS = {bool: bool, int: hex, float: float.hex, bytes: bytes.hex,
         str: lambda text: to_bytes(text).hex()}


def encode(value, depth=0):
    """A Python value as JSON with the type of every part; numpy's become plain ones. What has no
    such form is ["object", its type's name]."""
    if depth > 200:
        raise RecursionError("a value nested too deeply")
    if type(value).__module__.split(".")[0] == "numpy":
        value = value.tolist() if hasattr(value, "tolist") else value
    for kind, form in FORMS.items():
        if isinstance(value, kind):
            return [kind.__name__, form(value)]
    if value is None:
        return ["None"]
    if isinstance(value, complex):
        return ["complex", value.real.hex(), value.imag.hex()]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [encode(item, depth + 1) for item in kind.__iter__(value)]]
    if isinstance(value, dict):
        return ["dict", [[encode(k, depth + 1), encode(v, depth + 1)]
                         for k, v in dict.items(value)]]
    return ["object", type(value).__name__]


class Foreign:
    """A value that has no form as data: a test that compares it, or asks for its truth, fails."""

    def __init__(self, name):
        self.name = name

    def __eq__(self, other):
        raise TypeError(f"a value of type {self.name} does not leave its process")

    def __bool__(self):
        return self == True  # noqa: E712


def decode(form):
    """encode's inverse: exact built-in types only, whatever the sender was. Raises ValueError."""
    try:
        kind, *rest = form
        if kind in ("list", "tuple", "set", "frozenset"):
            return getattr(builtins, kind)([decode(item) for item in rest[0]])
        if kind == "dict":
            return {decode(key): decode(value) for key, value in rest[0]}
        return {"None": lambda: None, "bool": lambda b: bool(b), "int": lambda h: int(h, 16),
                "float": float.fromhex, "bytes": bytes.fromhex,
                "str": lambda h: bytes.fromhex(h).decode("utf-8", "surrogatepass"),
                "complex": lambda a, b: complex(float.fromhex(a), float.fromhex(b)),
                "object": Foreign}[kind](*rest)
    except (TypeError, KeyError, AttributeError, RecursionError, IndexError) as error:
        raise ValueError("a damaged message") from error


def same_result(expected, form):
    """Whether an encoded value is the expected one: types count, but a tuple is a list, and a whole
    number will do for a float. The form is read along what is expected and nothing is built from
    it, as it may be made to cost: numbers of one hash, a million parts. Raises ValueError for what
    encode cannot have written."""
    try:
        kind, *rest = form
        if expected is None:
            return kind == "None"
        if isinstance(expected, float):
            return kind in ("int", "float") and close(expected, decode(form))
        if isinstance(expected, (list, tuple)):
            return kind in ("list", "tuple") and len(rest[0]) == len(expected) and all(
                map(same_result, expected, rest[0]))
        if isinstance(expected, dict):
            return kind == "dict" and same_members(expected, [key for key, _ in rest[0]]) and all(
                same_result(expected[decode(key)], value) for key, value in rest[0])
        if isinstance(expected, (set, frozenset)):
            return kind == type(expected).__name__ and same_members(expected, rest[0])
        return kind == type(expected).__name__ and decode(form) == expected
    except (TypeError, IndexError, RecursionError) as error:
        raise ValueError("a damaged message") from error


def same_members(expected, forms):
    """Whether simple values, as forms, are the members of a set or the keys of a dict."""
    if len(forms) != len(expected) or any(form[0] not in SIMPLE for form in forms):
        return False
    found = {value for value in map(decode, forms) if value in expected}
    return len(found) == len(expected) and {type(value) for value in found} == {
        type(value) for value in expected}


def close(expected, got):
    try:
        return expected == got or (math.isfinite(expected) and abs(expected - got)
                                   <= 1e-9 * max(abs(expected), abs(got)))
    except OverflowError:
        return False


def same_output(expected, got):
    """Whether printed text is the expected one: line by line and word by word; a decimal may
    differ in the ninth digit, a whole number in none. Both are bytes."""
    expected, got = expected.strip(), got.strip()
    return expected.count(b"\n") == got.count(b"\n") and all(
        map(same_line, expected.split(b"\n"), got.split(b"\n")))


def same_line(expected, got):
    expected = expected.split()
    got = got.split(None, len(expected) + 1)  # no more words than it takes to see that there are
    return len(expected) == len(got) and all(
        a == b or DECIMAL.fullmatch(a) is not None and SIGNED.fullmatch(b) is not None
        and close(float(a), float(b)) for a, b in zip(expected, got, strict=True))


# ---------------------------------------------------------------------------------------------
# Programs: the sandbox, from the outside


class Sandbox:
    """A zygote: one clean process with the usual modules imported, which forks a confined child
    for every test. What is expected of a program never gets there."""

    def __init__(self, without=()):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # the limit of the stack takes effect at an exec: one process sets it, and becomes the other
        start = ("import os, resource, sys\n"
                 "most = resource.getrlimit(resource.RLIMIT_STACK)[1]\n"
                 "stack = 1 << 29 if most < 0 else min(1 << 29, most)\n"
                 "resource.setrlimit(resource.RLIMIT_STACK, (stack, most))\n"
                 "os.execv(sys.executable, [sys.executable, '-I', *sys.argv[1:]])\n")
        environment = {"LC_ALL": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
                       "MKL_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
        if "LD_LIBRARY_PATH" in os.environ:  # some builds of Python do not start without
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", start, __file__, "--zygote", str(theirs.fileno()),
             *without], env=environment, cwd="/", stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()
        self.socket = ours
        ours.settimeout(120)
        try:
            self.layers = json.loads(ours.recv(10000))
        except (OSError, ValueError) as error:
            self.close()
            raise RuntimeError("the process that runs programs does not start") from error

    def run(self, mode, source, data, timeout, memory, judge=None):
        """One confined process; (status, CPU seconds, output, result) as the kernel tells them:
        status "exit CODE", "signal NUMBER", "timeout" or "wall", and what it wrote. mode is "main",
        "call" or "serve"; with a judge's source, a second process runs that, and the first one
        answers its calls: the status and the result are then the judge's."""
        files = [memory_file("source", source), memory_file("input", data),
                 memory_file("output"), memory_file("result")]
        if judge is not None:
            files.append(memory_file("judge", judge))
        try:
            request = json.dumps({"mode": mode, "timeout": timeout, "memory": memory})
            socket.send_fds(self.socket, [request.encode()], files)
            self.socket.settimeout(3 * timeout + 30)
            reply = self.socket.recv(10000)
            if not reply:
                raise OSError("it ended")
            status, seconds = json.loads(reply)
            return status, seconds, read_all(files[2]), read_all(files[3])
        except (OSError, ValueError) as error:
            self.close()
            raise SandboxFailure(str(error)) from error
        finally:
            for file in files:
                os.close(file)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.socket.close()


class SandboxFailure(Exception):
    """The zygote is gone: the test is judged as failed, and the next one gets another."""


def write_all(file, content):
    view = memoryview(content)
    while view:
        view = view[os.write(file, view):]


def memory_file(name, content=None):
    """A file without a name; one with content is sealed against change."""
    file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if content is not None:
        write_all(file, content)
        os.lseek(file, 0, os.SEEK_SET)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW
                    | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return file


def read_all(file):
    return os.pread(file, min(os.fstat(file).st_size, MAX_OUTPUT), 0)


def containment(without=()):
    """What holds a program on this machine, tried out: {"active" and "missing": layers, "allowed":
    what a test program could do all the same}. Raises RuntimeError where not even that runs."""
    sandbox = POOL.take(("sandbox", without), lambda: Sandbox(without))
    try:
        status, _, output, _ = sandbox.run("main", json.dumps(["", PROBE]).encode(),
                                           str(os.getpid()).encode(), 10, DEFAULT_MEMORY)
    except SandboxFailure as error:
        raise RuntimeError(f"the sandbox fails its own test: {error}") from error
    POOL.give_back(("sandbox", without), sandbox)
    if status != "exit 0":
        raise RuntimeError(f"the sandbox fails its own test: {status}")
    return {**sandbox.layers, "allowed": output.decode().split()}


def tested_sandbox(without, allow_unsafe):
    """An idle sandbox, or a new one. The first of its kind is tried out; one without a system-call
    filter is refused, unless that was asked for."""
    if sys.platform != "linux":
        raise RuntimeError("programs are judged on Linux only")
    key = ("sandbox", without)
    report = TESTED[key] = TESTED.get(key) or containment(without)
    if not (allow_unsafe or "seccomp" in without) and (
            "seccomp" not in report["active"] or report["allowed"]):
        why = (f"a test program could {', '.join(report['allowed'])}" if report["allowed"]
               else "the kernel has no system-call filter (seccomp)")
        raise RuntimeError(f"programs cannot be confined here: {why}; run where it has one, or "
                           "accept the danger with --allow_unsafe")
    return POOL.take(key, lambda: Sandbox(without))


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
attempt("trace", lambda: libc.ptrace(16, parent, 0, 0) == 0)
attempt("limit", lambda: libc.prlimit(os.getppid(), 7, 0, 0) == 0)
attempt("memory", lambda: bytearray(1 << 36))
attempt("exec", lambda: os.execv("/bin/sh", ["sh", "-c", "echo exec"]))
"""


def is_test(test):
    return (isinstance(test, dict) and isinstance(test.get("setup", ""), str)
            and any(all(name in test and isinstance(test[name], kind)
                        for name, kind in form.items()) for form in TEST_FORMS))


def run_program(code, tests, timeout=10.0, memory=DEFAULT_MEMORY, without=(), allow_unsafe=False):
    """Run a Python program on its tests, each in a confined process of its own.

    tests: {"input", "output"} from stdin to stdout, {"fn_name", "args", "expected"} a call, or
    {"assert"} source that calls what the program defines; a test may have "setup", source that
    runs before the program. timeout: CPU seconds a test; memory: bytes of address space; without:
    layers of LAYERS that are left out. A pass needs at least one test and every one of them
    passed. Raises ValueError for a test of no known form, RuntimeError where programs cannot be
    confined and allow_unsafe is not set."""
    for number, test in enumerate(tests or (), 1):
        if not is_test(test):
            raise ValueError(f"test {number} has neither input and output, nor fn_name, args and "
                             "expected, nor assert (setup is text)")
    if unknown := set(without) - set(LAYERS):
        raise ValueError(f"{', '.join(sorted(unknown))}: no layer; they are {', '.join(LAYERS)}")
    if not tests:
        return Verdict(False, "no tests", code)
    key = tuple(sorted(without))
    for number, test in enumerate(tests, 1):
        sandbox = tested_sandbox(key, allow_unsafe)
        try:
            reason = run_test(sandbox, code, test, timeout, memory)
        except SandboxFailure:
            reason = "timeout"
        except BaseException:  # a test that has no JSON form, an interrupt: it may be half sent
            sandbox.close()
            raise
        else:
            POOL.give_back(("sandbox", key), sandbox)
        if reason == "wrong answer":
            reason += f" on test {number}"
        if reason != "correct":
            return Verdict(False, reason, code)
    return Verdict(True, "correct", code)


def run_test(sandbox, code, test, timeout, memory):
    """`correct`, or in what way a program fails one test."""
    setup, judge = test.get("setup") or "", None
    if "assert" in test:
        mode, data = "serve", b""
        judge = json.dumps([setup, test["assert"]]).encode()
    elif "fn_name" in test:
        mode, data = "call", json.dumps([test["fn_name"], test["args"]]).encode()
    else:
        mode, data = "main", to_bytes(test["input"])
    source = json.dumps([setup, code]).encode()
    status, seconds, output, result = sandbox.run(mode, source, data, timeout, memory, judge)
    if status in ("timeout", "wall") or seconds > timeout:
        return "timeout"
    kind, _, detail = result.partition(b" ")
    if kind == b"error" or status != "exit 0":
        return failure(status, kind, detail, output)
    if mode == "main":
        return "correct" if same_output(to_bytes(test["output"]), output) else "wrong answer"
    if mode == "serve":
        return {b"passed": "correct", b"wrong": "wrong answer"}.get(result, "no verdict")
    try:
        if kind != b"value" or len(detail) > MAX_RESULT:
            raise ValueError
        same = same_result(test["expected"], json.loads(detail))
    except (ValueError, RecursionError):
        return "runtime error: no result"
    return "correct" if same else "wrong answer"


def failure(status, kind, detail, output):
    """A short reason. What the program says of itself only names a failure, never makes a pass."""
    name = detail[:60].decode("ascii", "replace")
    if kind == b"error" and name == "MemoryError":
        return "memory"
    if kind == b"error" and name == "syntax error":
        return name
    if kind == b"error" and re.fullmatch(r"\w+", name):
        return f"runtime error: {name}"
    if len(output) >= MAX_OUTPUT:
        return "runtime error: too much output"
    if status.startswith("signal "):
        return f"runtime error: {signal.Signals(int(status[7:])).name}"
    return f"runtime error: {status}"


def find_program(response):
    """The last fenced code block of the solution section, or else of the response, or None."""
    head, mark, tail = response.rpartition("<|begin_of_solution|>")
    for text in (tail, response) if mark else (response,):
        blocks = FENCE.findall(text)
        if blocks:
            return textwrap.dedent(blocks[-1][1])
    return None


def verify_code(response, tests, timeout=10.0, memory=DEFAULT_MEMORY, **options):
    """The verdict on the last fenced code block of a response; options go to run_program."""
    code = find_program(response)
    if code is None:
        return Verdict(False, "no answer", None)
    return run_program(code, tests, timeout, memory, **options)


# ---------------------------------------------------------------------------------------------
# Programs: the sandbox, from the inside. From here on, nothing runs in the verifier's process.


def zygote(descriptor, without):
    """The process that a Sandbox talks to: confine what is confined once, then fork on request."""
    channel = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except Exception:  # a module that this build or machine lacks
            pass
    threading.stack_size(16 << 20)  # a thread's default is the raised limit of the stack
    null, tasks = os.open("/dev/null", os.O_RDWR), tasks_of(os.getuid())
    active = ["limits"] * ("limits" not in without)
    if "namespaces" not in without and enter_namespaces():
        active.append("namespaces")
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    readable = "landlock" not in without and restrict_reading()
    active += ["landlock"] * readable
    uid = None
    if os.getuid() == 0 and "uid" not in without:
        # a user that no one else is, so that its limits count this sandbox's processes alone
        uid = 200_000_000 + os.getpid() % 100_000_000
        active.append("uid")
    if os.uname().machine in MACHINES and "seccomp" not in without:
        active.append("seccomp")
    child = Confinement(active, uid, readable, null, tasks)
    gc.collect()
    gc.freeze()
    channel.send(json.dumps({"active": active, "missing": [
        layer for layer in LAYERS if layer not in active]}).encode())
    while True:
        message, files, _, _ = socket.recv_fds(channel, 10000, 8)
        if not message:
            return
        request = json.loads(message)
        try:
            reply = serve_request(child, request, files, channel)
        finally:
            for file in files:
                os.close(file)
        channel.send(json.dumps(reply).encode())


def serve_request(child, request, files, channel):
    """Fork what the request asks for, wait for it, and tell how it ended and its CPU seconds."""
    source, data, output, result = files[:4]
    if len(files) == 4:
        pid = start(child, request, [data, output, result, source], run_child)
        return wait_for({pid}, pid, request["timeout"], channel)
    pipes = [*os.pipe(), *os.pipe()]
    ask_read, ask_write, answer_read, answer_write = pipes
    candidate = start(child, request, [data, output, answer_write, source, ask_read], run_child)
    # the judge waits while the candidate works: its own CPU time is the tests' alone
    judge = start(child, request, [child.null, child.null, result, files[4], ask_write,
                                   answer_read], run_judge)
    for pipe in pipes:
        os.close(pipe)
    return wait_for({candidate, judge}, judge, request["timeout"], channel)


def start(child, request, files, work):
    """A confined process in which files are the descriptors 0, 1, 3, 4, ...; it runs work."""
    pid = os.fork()
    if pid:
        return pid
    try:
        # aside first, lest one be overwritten before it is copied
        aside = [fcntl.fcntl(file, fcntl.F_DUPFD, 50) for file in files]
        for target, file in zip([0, 1, *range(3, len(files) + 1)], aside, strict=True):
            os.dup2(file, target)
        os.dup2(child.null, 2)
        os.closerange(len(files) + 1, 4096)
        child.confine(request)
        work(request["mode"])
    finally:
        os._exit(70)


def wait_for(alive, chosen, timeout, channel):
    """How the chosen process ended and the CPU seconds of the busiest. When one takes more than
    timeout all are killed; when the chosen one ends, the rest is. They end with this process, and
    that with whoever is at the other end of the channel."""
    deadline, ended = time.monotonic() + 3 * timeout + 5, {}
    status, most = None, 0.0
    handles = {os.pidfd_open(pid): pid for pid in alive}
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
    poll.register(channel, 0)  # tells that it is closed, not what it holds
    while alive:
        used = max(cpu_seconds(pid) for pid in alive)
        if status is None and (used > timeout or time.monotonic() > deadline):
            status = "timeout" if used > timeout else "wall"
        if status is not None or chosen not in alive:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        wait = min(max(timeout - used, 0.01) / CORES, deadline - time.monotonic() + 0.01)
        for handle, _ in poll.poll(max(1, wait * 1000)):
            if handle == channel.fileno():
                os._exit(1)
            pid = handles[handle]
            _, code, usage = os.wait4(pid, 0)
            ended[pid] = os.waitstatus_to_exitcode(code)
            most = max(most, usage.ru_utime + usage.ru_stime)
            poll.unregister(handle)
            os.close(handle)
            alive.remove(pid)
    if status is None:
        code = ended[chosen]
        status = f"exit {code}" if code >= 0 else f"signal {-code}"
        if -signal.SIGXCPU in ended.values():
            status = "timeout"
    return status, most


def cpu_seconds(pid):
    try:
        return time.clock_gettime((~pid << 3) | 2)  # the clock of another process: man clock_getres
    except OSError:
        return 0.0


class Confinement:
    """What a child does to itself before a byte of the program is parsed."""

    def __init__(self, active, uid, readable, null, tasks):
        self.active, self.uid, self.readable, self.null = active, uid, readable, null
        self.threads = 64 + (tasks if uid is None else 0)

    def confine(self, request):
        """Limits, user, capabilities, and last the filter, which forbids what came before it."""
        parent = os.getppid()
        if "limits" in self.active:
            cpu = math.ceil(request["timeout"])
            for limit, soft, hard in (
                    (resource.RLIMIT_CPU, cpu + 1, cpu + 2),
                    (resource.RLIMIT_AS, request["memory"], request["memory"]),
                    (resource.RLIMIT_FSIZE, MAX_OUTPUT, MAX_OUTPUT),
                    (resource.RLIMIT_NOFILE, 64, 64), (resource.RLIMIT_CORE, 0, 0),
                    (resource.RLIMIT_NPROC, self.threads, self.threads)):
                most = resource.getrlimit(limit)[1]
                if most != resource.RLIM_INFINITY:
                    soft, hard = min(soft, most), min(hard, most)
                resource.setrlimit(limit, (soft, hard))
        if self.uid is not None:
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)
        # no capabilities: version 3, this process (linux/capability.h)
        libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
        libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self and /dev/stdin are root's
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(71)
        if "seccomp" in self.active:
            install_filter(system_call_filter(os.uname().machine, os.getpid(),
                                              deny_open=not self.readable))


def run_child(mode):
    """The program's process: descriptors 0 input, 1 output, 3 result, 4 source (5 calls)."""
    with open(4, "rb") as source:
        setup, code = json.load(source)
    call = json.load(open(0, "rb", closefd=False)) if mode == "call" else None
    builtins.open = io.open = open_by_number
    sys.stdin = open(0, "r", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    module = type(sys)("__main__" if mode == "main" else "solution")
    sys.modules["__main__"] = sys.modules[module.__name__] = module
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["program.py"]
    if mode != "main":
        exec(USUAL_NAMES, module.__dict__)
    status = 1
    try:
        try:
            setup = compile(setup, "setup.py", "exec")
            code = compile(code, "program.py", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError, UnicodeError):
            report(b"error syntax error")
            os._exit(1)
        exec(setup, module.__dict__)
        exec(code, module.__dict__)
        if mode == "call":
            function = find_function(module.__dict__, call[0])
            report(b"value " + json.dumps(encode(function(*call[1]))).encode())
        if mode == "serve":
            answer_calls(module.__dict__)
        status = 0
    except SystemExit as error:
        status = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
        status &= 255
        if status:
            report(b"error SystemExit")
    except BaseException as error:
        report(b"error " + type(error).__name__.encode("utf-8", "replace"))
    try:
        threading._shutdown()  # as at an interpreter's end: threads, exit functions, buffers
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.__stdout__.flush()
        module.__dict__.clear()  # files that the program left open are closed with their names
        gc.collect()
    except BaseException:
        status = status or 120
    os._exit(status)


def open_by_number(file, *arguments, real=io.open, **keywords):
    """open(), which finds standard input and output also where nothing may be opened."""
    if file in ("/dev/stdin", "/dev/stdout", "/proc/self/fd/0", "/proc/self/fd/1"):
        file, keywords["closefd"] = int("out" in file or file[-1] == "1"), False
    return real(file, *arguments, **keywords)


def report(message):
    write_all(3, message)


def find_function(namespace, name):
    if "Solution" in namespace and hasattr(namespace["Solution"], name):
        return getattr(namespace["Solution"](), name)
    return namespace[name]


def answer_calls(namespace):
    """The candidate's side of an assert test: what is defined, then calls until the judge ends."""
    names = {name: ["module", value.__name__] if isinstance(value, type(sys)) else
             ["call" if callable(value) else "value"]
             for name, value in namespace.items() if not name.startswith("__")}
    calls, answers = open(5, "rb"), open(3, "wb", closefd=False)
    answers.write(json.dumps(names).encode() + b"\n")
    answers.flush()
    for line in calls:
        name, arguments, keywords = json.loads(line)
        try:
            if arguments is None:
                value = namespace[name]
            else:
                arguments, keywords = decode(arguments), decode(keywords)
                value = find_function(namespace, name)(*arguments, **keywords)
            answer = json.dumps(["value", encode(value), encode(arguments)])
        except BaseException as error:
            known = next(kind.__name__ for kind in type(error).__mro__
                         if getattr(builtins, kind.__name__, None) is kind)
            answer = json.dumps(["raise", known, str(error)[:1000]])
        answers.write(answer.encode() + b"\n")
        answers.flush()


def run_judge(mode):
    """The process that holds the asserts: descriptors 3 result, 4 source, 5 calls, 6 answers. It
    calls the candidate by messages, and what comes back is built from exact types."""
    with open(4, "rb") as source:
        setup, test = json.load(source)
    sys.stdout = sys.stderr = open(1, "w", closefd=False)
    calls, answers = open(5, "wb"), open(6, "rb")
    offered = read_offer(answers)

    def ask(form, arguments):
        calls.write(json.dumps(form).encode() + b"\n")
        calls.flush()
        line = answers.readline(MAX_OUTPUT)
        if not line:
            raise CandidateGone
        answer = json.loads(line)
        if answer[0] == "raise":
            kind = getattr(builtins, str(answer[1]), None)
            good = isinstance(kind, type) and issubclass(kind, Exception)
            raise (kind if good else RuntimeError)(str(answer[2]))
        for ours, theirs in zip(arguments, decode(answer[2]) or (), strict=True):
            if type(ours) is type(theirs) and type(ours) in (list, set, dict):
                ours.clear()  # changed in place
                (ours.extend if type(ours) is list else ours.update)(theirs)
        return decode(answer[1])

    def proxy(name):
        def call(*arguments, **keywords):
            return ask([name, encode(list(arguments)), encode(keywords)], arguments)
        call.__name__ = name
        return call
    try:
        namespace = {"__name__": "judge"}
        exec(USUAL_NAMES, namespace)
        before = dict(namespace)
        exec(compile(setup, "setup.py", "exec"), namespace)
        wanted = wanted_names(offered, test)
        for name, (kind, *rest) in offered.items():
            if name not in wanted or namespace.get(name) is not before.get(name):
                continue  # not asked for, or the setup's own
            if kind == "call":
                namespace[name] = proxy(name)
            elif kind == "value":
                namespace[name] = ask([name, None, None], ())
            elif kind == "module" and rest[0] in sys.modules:
                namespace[name] = sys.modules[rest[0]]
        exec(compile(test, "test.py", "exec"), namespace)
    except AssertionError:
        report(b"wrong")
    except CandidateGone:
        report(b"error ended early")
    except BaseException as error:
        report(b"error " + type(error).__name__.encode("utf-8", "replace"))
    else:
        report(b"passed")
    os._exit(0)


def read_offer(answers):
    """The program's first message: its names. Without one the judge ends: the program did, and may
    have said why."""
    line = answers.readline(MAX_OUTPUT)
    try:
        offered = json.loads(line)
        if isinstance(offered, dict):
            return offered
    except ValueError:
        pass
    report(line[:100].strip() if line.split(b" ", 1)[0] == b"error" else b"error no answer")
    os._exit(1)


def wanted_names(offered, test):
    """The names of a program that a test means. A built-in one is meant only if it is the function
    under test, check(max) or the sole name: a false len or abs must not make a test hold."""
    wanted = offered.keys() & set(re.findall(r"\w+", test))
    known = {name for name in wanted if hasattr(builtins, name)}
    if len(wanted) == len(known) == 1:
        return wanted
    return wanted - known | {name for name in known if re.search(rf"\bcheck\({name}\)", test)}


class CandidateGone(BaseException):
    """The program's process ended before its answer."""


def tasks_of(uid):
    """Threads of a user, who may run other things: the limit on them counts all."""
    total = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}").st_uid == uid:
                total += len(os.listdir(f"/proc/{pid}/task"))
        except OSError:
            continue
    return total


def enter_namespaces():
    """No network, no shared memory, mounts of our own. An ordinary user needs a user namespace
    for that, which some systems do not grant."""
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWNS | (CLONE_NEWUSER if uid else 0)
    if libc.unshare(flags) != 0:
        return False
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                           ("gid_map", f"{gid} {gid} 1")):
            try:
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
            except OSError:
                return False
    return True


def restrict_reading():
    """Landlock (linux/landlock.h): nothing may be opened but the standard library, numpy, shared
    libraries and some devices; nothing may be written. False where the kernel has none."""
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return False
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    attributes = struct.pack("QQQ", rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    ruleset = libc.syscall(444, attributes, 24 if version >= 6 else 16 if version >= 4 else 8, 0)
    if ruleset < 0:
        return False
    read_file, read_dir = 1 << 2, 1 << 3
    for path in readable_paths():
        try:
            file = os.open(path, os.O_PATH)
        except OSError:
            continue
        allowed = read_file | (read_dir if os.path.isdir(path) else 0)
        libc.syscall(445, ruleset, 1, struct.pack("=Qi", allowed, file), 0)
        os.close(file)
    restricted = libc.syscall(446, ruleset, 0) == 0
    os.close(ruleset)
    return restricted


def readable_paths():
    numpy = sys.modules.get("numpy")
    package = [os.path.dirname(numpy.__file__)] if numpy else []
    return ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/dev/null",
            "/dev/zero", "/dev/random", "/dev/urandom", sysconfig.get_path("stdlib"),
            sysconfig.get_path("platstdlib"), *package, *(path + ".libs" for path in package)]


# System calls that a program may make: numbers on x86_64 and on aarch64 (-1: has none).
# linux/arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h
ALLOWED = """
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
faccessat2 439 439
"""
# Those that depend on an argument, and those that answer "no such call", so that libc asks for
# the old one.
CHECKED = {"open": (2, -1), "openat": (257, 56), "clone": (56, 220), "kill": (62, 129),
           "tgkill": (234, 131), "prlimit64": (302, 261), "fcntl": (72, 25)}
ABSENT = (435, 437)  # clone3, openat2
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, architecture


def system_call_filter(machine, pid, deny_open):
    """The BPF program (linux/filter.h) of an allow-list: all else fails with EPERM."""
    column, architecture = MACHINES[machine]
    allow, kill = 0x7FFF0000, 0x80000000
    refuse, absent = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06

    def step(code, k, yes=0, no=0):
        return struct.pack("HBBI", code, yes, no, k)

    def argument(number):  # its lower 32 bits
        return step(LOAD, 16 + 8 * number)

    def when(number, *steps):
        """steps, which end in a return, for this call; loads the number again behind them."""
        return [step(EQUAL, number, 0, len(steps)), *steps] if number >= 0 else []

    done, no = step(RETURN, allow), step(RETURN, refuse)
    program = [step(LOAD, 4), step(EQUAL, architecture, 1, 0), step(RETURN, kill), step(LOAD, 0)]
    if machine == "x86_64":
        program += [step(AT_LEAST, 0x40000000, 0, 1), no]  # the x32 calls
    for entry in ALLOWED.split(","):
        program += when(int(entry.split()[1 + column]), done)
    for number in ABSENT:
        program += when(number, step(RETURN, absent))
    checked = {name: numbers[column] for name, numbers in CHECKED.items()}
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0o20000000
    for name, flags in (("open", 1), ("openat", 2)):
        program += when(checked[name], no) if deny_open else when(
            checked[name], argument(flags), step(ANY_BIT, writing, 0, 1), no, done)
    program += when(checked["clone"], argument(0), step(ANY_BIT, 0x00010000, 0, 1), done, no)
    for name in ("kill", "tgkill"):
        program += when(checked[name], argument(0), step(EQUAL, pid, 0, 1), done, no)
    program += when(checked["prlimit64"], argument(0), step(EQUAL, 0, 1, 0),
                    step(EQUAL, pid, 0, 1), done, no)
    program += when(checked["fcntl"], argument(1), step(EQUAL, fcntl.F_SETOWN, 3, 0),
                    step(EQUAL, 10, 2, 0), step(EQUAL, 15, 1, 0), done, no)  # F_SETSIG, _OWN_EX
    return b"".join(program + [no])


def install_filter(program):
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    if libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0) != 0:
        os._exit(72)  # never run a program unconfined


# ---------------------------------------------------------------------------------------------
# Samples: one verdict each


TAGS = ("<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>",
        "<|end_of_solution|>")  # plain text to Qwen's tokenizer


def verify_sample(sample, **options):
    """The verdict on a sample (DESIGN: a problem's fields, response, finish_reason). Raises
    ValueError where a field is missing or wrong; options go to verify_code."""
    kind, response = sample.get("kind"), sample.get("response")
    if not isinstance(response, str):
        raise ValueError("field response is missing or no text")
    if kind not in ("math", "choice", "code"):
        raise ValueError(f"field kind is {kind!r}: math, choice or code")
    field = "tests" if kind == "code" else "answer"
    if not isinstance(sample.get(field), list if kind == "code" else str):
        raise ValueError(f"field {field} is missing or no {'list' if kind == 'code' else 'text'}")
    if sample.get("finish_reason") == "length":
        return Verdict(False, "truncated")
    if "original" in sample:
        if not isinstance(sample["original"], str):
            raise ValueError("field original is no text")
        if not keeps_structure(sample):
            return Verdict(False, "structure")
    if kind == "math":
        return verify_math(response, sample["answer"])
    if kind == "choice":
        return verify_choice(response, sample["answer"])
    return verify_code(response, sample["tests"], **options)


def keeps_structure(sample):
    """Whether a rewritten response has its four tags once and in order, most of the original's
    thought, and the original's answer."""
    response, original, kind = sample["response"], sample["original"], sample["kind"]
    places = [response.find(tag) for tag in TAGS]
    if any(response.count(tag) != 1 for tag in TAGS) or places != sorted(places):
        return False
    if response[:places[0]].strip() or response[places[3] + len(TAGS[3]):].strip():
        return False
    thought = response[places[0] + len(TAGS[0]):places[1]].strip()
    before = original.partition(TAGS[0])[2].partition(TAGS[1])[0].strip() or original.strip()
    if len(thought) < 0.8 * len(before):
        return False
    solution = response[places[2]:places[3]]
    find = {"math": extract_answer, "choice": find_letter, "code": find_program}[kind]
    ours, theirs = find(solution), find(original)
    if ours is None or theirs is None:
        return False
    return math_equal(ours, theirs) if kind == "math" else ours.split() == theirs.split()


def verify_lines(lines, options):
    """What a worker process does: (place, JSON line) in; (verified line, brief of it for the
    summary, containment of its program) out."""
    done = []
    for place, line in lines:
        try:
            sample = json.loads(line)
            if not isinstance(sample, dict):
                raise ValueError("the row is no object")
            verdict = verify_sample(sample, **options)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{place}: {error}") from None
        sample.update(passed=verdict.passed, extracted=verdict.extracted, reason=verdict.reason)
        confined = next(iter(TESTED.values()), None) if sample["kind"] == "code" else None
        done.append((json.dumps(sample, ensure_ascii=False), brief(sample), confined))
    return done


def brief(row):
    """What the summary needs of a verified row: (model, source, problem, passed, vote, tokens,
    reason). The votes for one answer are equal: all correct ones, and wrong ones of one spelling;
    no answer is "", and a program has no vote."""
    vote = None if row["kind"] == "code" else ""
    if vote is not None and row["extracted"] is not None:
        vote = "correct" if row["passed"] else "wrong: " + squash(row["extracted"])
    tokens = row.get("num_tokens")
    reason = re.sub(r" on test \d+$", "", row["reason"])
    return (str(row.get("model") or ""), str(row.get("source", "")), problem_key(row),
            row["passed"], vote, tokens if isinstance(tokens, int) and tokens < 2 ** 63 else None,
            reason)


def problem_key(row):
    """A problem's id, or where it has none its prompt, in eight bytes."""
    name = json.dumps([row.get("source"), row["id"] if "id" in row else row.get("prompt")])
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()


class BadInput(ValueError):
    """One line for the user: exit status 2."""


# ---------------------------------------------------------------------------------------------
# Samples: the summary


class Summary:
    """Counts by model, source and problem, but no text: memory grows with the problems alone."""

    def __init__(self):
        self.groups = {}  # by (model, source): by problem [samples, passed, votes]; tokens; reasons

    def add(self, model, source, problem, passed, vote, tokens, reason):
        problems, total, reasons = self.groups.setdefault((model, source),
                                                          ({}, [0, 0], collections.Counter()))
        counts = problems.setdefault(problem, [0, 0, {}])
        counts[0] += 1
        counts[1] += passed
        if vote is not None:
            counts[2][vote] = counts[2].get(vote, 0) + 1
        if tokens is not None:
            total[0] += tokens
            total[1] += 1
        reasons[reason] += 1

    def rows(self):
        """One dict for each source of each model, and one for all of a model's several."""
        rows, models = [], sorted({model for model, _ in self.groups}) or [""]
        for model in models:
            groups = {source: group for (name, source), group in sorted(self.groups.items())
                      if name == model}
            if len(groups) != 1:
                groups["all"] = merged(groups.values())
            rows += [{"model": model} | score(source, list(problems.values()), tokens, reasons)
                     for source, (problems, tokens, reasons) in groups.items()]
        return rows


def merged(groups):
    """The counts of several groups of problems as those of one."""
    problems, total, reasons = {}, [0, 0], collections.Counter()
    for number, (counts, tokens, by_reason) in enumerate(groups):
        problems |= {(number, problem): count for problem, count in counts.items()}
        total = [a + b for a, b in zip(total, tokens, strict=True)]
        reasons.update(by_reason)
    return problems, total, reasons


def score(source, problems, tokens, reasons):
    """The figures of some problems, each [samples, passed, votes]. The standard error is that of
    the mean over problems of their means."""
    means = [passed / n for n, passed, _ in problems]
    accuracy = sum(means) / len(means) if means else None
    error = None
    if len(means) > 1:
        variance = sum((mean - accuracy) ** 2 for mean in means) / (len(means) - 1)
        error = math.sqrt(variance / len(means))
    most = max((n for n, _, _ in problems), default=0)
    chances, k = {}, 1
    while k <= most:
        enough = [(n, passed) for n, passed, _ in problems if n >= k]
        chances[k] = sum(pass_at_k(n, passed, k) for n, passed in enough) / len(enough)
        k = most if k < most < 2 * k else 2 * k
    voted = [votes for _, _, votes in problems if votes]
    consensus = sum(map(majority, voted)) / len(voted) if voted else None
    return {"source": source, "problems": len(problems), "samples": sum(n for n, _, _ in problems),
            "accuracy": accuracy, "standard_error": error, "pass_at_k": chances,
            "majority": consensus, "n": most,
            "mean_tokens": tokens[0] / tokens[1] if tokens[1] else None,
            "reasons": dict(reasons.most_common())}


def pass_at_k(n, passed, k):
    """The chance that one of k of the n samples passes: the unbiased estimate, arXiv 2107.03374."""
    return 1 - math.comb(n - passed, k) / math.comb(n, k)


def majority(votes):
    """1 where the answer given most often is correct; ties share it."""
    given = {vote: count for vote, count in votes.items() if vote} or votes
    most = max(given.values())
    leaders = [vote for vote, count in given.items() if count == most]
    return ("correct" in leaders) / len(leaders)


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
    lines = []
    for row in rows:
        if row["source"] in PUBLISHED:
            beside = [f"{name} {score} ± {math.sqrt(score * (100 - score) / row['problems']):.1f}"
                      for name, score in zip(MODELS, PUBLISHED[row["source"]], strict=True)]
            lines.append(f"{row['source']} as published: {', '.join(beside)}")
    return lines


def table(rows):
    """The rows as text, the models' names where there are several, and the reasons of all."""
    def percent(value):
        return "-" if value is None else f"{100 * value:.1f}"
    lines = [["model", "source", "problems", "samples", "accuracy", "pass@k", "majority", "tokens"]]
    reasons = collections.Counter()
    for row in rows:
        error = "" if row["standard_error"] is None else f" ± {percent(row['standard_error'])}"
        chances = ", ".join(f"{k}: {percent(p)}" for k, p in row["pass_at_k"].items())
        tokens = "-" if row["mean_tokens"] is None else f"{row['mean_tokens']:.0f}"
        lines.append([row["model"] or "-", row["source"] or "-", str(row["problems"]),
                      str(row["samples"]), percent(row["accuracy"]) + error, chances,
                      f"{percent(row['majority'])} @{row['n']}", tokens])
        if row["source"] != "all" or len(rows) == 1:
            reasons.update(row["reasons"])
    first = 0 if len({row["model"] for row in rows}) > 1 else 1
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in
                      list(zip(line, widths, strict=True))[first:]).rstrip() for line in lines]
    return "\n".join([*text, *dict.fromkeys(published(rows)), "", "; ".join(
        f"{reason} {count}" for reason, count in reasons.most_common())])


# ---------------------------------------------------------------------------------------------
# Every script's start: what it says, what it ends with, its flags


def end_with_parent():
    """From now on the kernel kills this process when the thread that started it ends, however that
    comes about. If it has ended already, a process that is no Python is the parent now."""
    if sys.platform != "linux":
        return
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with open(f"/proc/{os.getppid()}/cmdline", "rb") as file:
        if b"python" not in file.read():
            print("error: what started this process is gone", file=sys.stderr, flush=True)
            os._exit(1)


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
        encoding=getattr(before, "encoding", None), errors="backslashreplace")
        for number, before in ((1, sys.stdout), (2, sys.stderr)))
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


def input_lines(names):
    """(place, line) of every row of the files; blank lines count for the place only."""
    for name in names:
        number = 0
        with open(name, encoding="utf-8") as file:
            try:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{name}:{number}", line
            except UnicodeDecodeError as error:
                raise BadInput(f"{name}: not UTF-8 after line {number} ({error.reason})") from None


def resume(out, lines, summary):
    """Skip the rows of `lines` that `out` holds already: a line that a kill has torn is cut off,
    and each row must be the one that was verified. Returns how many there are."""
    count = end = 0
    advice = "name another --out, or delete the file"
    with open(out, "rb+") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if row is None:
                if line.endswith(b"\n") or not line.startswith(b"{"):
                    raise BadInput(f"{out}: row {count + 1} is broken; {advice}")
                break
            if not isinstance(row, dict) or {"kind", "passed", "extracted", "reason"} - row.keys():
                raise BadInput(f"{out}: row {count + 1} is no verdict; {advice}")
            place, given = next(lines, (None, "{}"))
            try:
                given = json.loads(given)
                same_row = all(given.get(key) == row[key] for key in (
                    "source", "id", "sample", "response") if key in row)
            except (ValueError, AttributeError):
                same_row = False
            if not same_row:
                raise BadInput(f"{out}: row {count + 1} is not the verdict on "
                               f"{place or 'any row of the input'}; {advice}")
            summary.add(*brief(row))
            count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def verified_lines(lines, workers, options):
    """Results in the order of lines, from worker processes, with a bounded number under way."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, begin_worker) as executor:
        pending = collections.deque()
        try:
            for batch in iter(lambda: list(itertools.islice(lines, 8)), []):
                pending.append(executor.submit(verify_lines, batch, options))
                if len(pending) > 4 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def begin_worker():
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def keep(verified, path, per_problem):
    """Write the passing rows, at most per_problem of each problem, the shortest first: long
    answers to easy questions are not rewarded. Exact duplicates are dropped. The file appears
    when it is complete. Returns the counts (kept, duplicates, beyond per_problem)."""
    passing, seen, duplicates, offset = {}, set(), 0, 0
    with open(verified, "rb") as file:
        for line in file:
            row = json.loads(line)
            if row["passed"]:
                digest = hashlib.blake2b(problem_key(row) + row["response"].encode(
                    "utf-8", "surrogatepass"), digest_size=16).digest()
                length = len(row["response"])
                if digest in seen:
                    duplicates += 1
                else:
                    seen.add(digest)
                    passing.setdefault(problem_key(row), []).append((length, offset))
            offset += len(line)
        chosen = sorted(offset for samples in passing.values()
                        for _, offset in sorted(samples)[:per_problem])
        aside = f"{path}.part"
        with open(aside, "wb") as out:
            for offset in chosen:
                file.seek(offset)
                out.write(file.readline())
            out.flush()
            os.fsync(out.fileno())
    os.replace(aside, path)
    return len(chosen), duplicates, sum(map(len, passing.values())) - len(chosen)


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
    args = parse_arguments()
    for name in args.samples:
        if not os.path.isfile(name):
            raise BadInput(f"{name}: no such file")
    paths = [*args.samples, args.out] + [args.keep] * bool(args.keep)
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise BadInput("samples, --out and --keep must be different files")
    for path in paths:
        if os.path.isdir(path):
            raise BadInput(f"{path} is a folder: name a file")
    summary, lines = Summary(), input_lines(args.samples)
    done = resume(args.out, lines, summary) if os.path.exists(args.out) else 0
    if done:
        print(f"{args.out}: {done} rows are verified already", file=sys.stderr)
    options = {"timeout": args.timeout, "memory": args.memory, "allow_unsafe": args.allow_unsafe}
    results = verified_lines(lines, args.workers, options)
    head, told = list(itertools.islice(results, 1)), False  # rows that are refused create nothing
    if not head and not done:
        raise BadInput(f"{', '.join(args.samples)}: no samples")
    for path in paths:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(args.out, "a", encoding="utf-8", errors="surrogatepass") as out, tqdm(
            initial=done, unit=" samples", disable=None) as progress:
        passed = 0
        for line, facts, confined in itertools.chain(head, results):
            if confined and not told:
                told = True
                print("programs are confined by " + ", ".join(confined["active"]) + (
                    "; missing here: " + ", ".join(confined["missing"])
                    if confined["missing"] else ""), file=sys.stderr)
            out.write(line + "\n")
            out.flush()
            summary.add(*facts)
            passed += facts[3]
            progress.update()
            progress.set_postfix(passed=passed, refresh=False)
    rows = summary.rows()
    kept = keep(args.out, args.keep, args.per_problem) if args.keep else None
    if args.json:
        print(json.dumps({"rows": rows, "kept": kept[0] if kept else None}))
        return
    print(table(rows))
    if kept:
        print(f"kept {kept[0]}, dropped {kept[1]} duplicates and {kept[2]} beyond --per_problem")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--math-worker"]:
        math_worker()
    elif sys.argv[1:2] == ["--zygote"]:
        zygote(int(sys.argv[2]), sys.argv[3:])
    else:
        begin_script()
        try:
            from tqdm import tqdm  # the command alone needs it
            main()
        except (BadInput, OSError, RuntimeError) as error:
            if getattr(error, "filename", None):
                error = f"{error.filename}: {error.strerror}"
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)
