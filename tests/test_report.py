"""The manual of verify.py --report: the page that people look at, parsed, and fed with text that
means to be more than text."""
import html.parser
import json
import random
import re

import pytest
import verify
from conftest import ROOT, run_script

TAGS = {"html", "meta", "style", "title", "h1", "h2", "h3", "p", "pre", "b", "bdi", "svg", "rect",
        "line", "input", "label", "details", "summary"}
HOSTILE = [
    "</pre></details><script>alert(1)</script>", "</title><img src=x onerror=alert(1)>",
    "<style>*{display:none}</style><link rel=stylesheet href=//x.y/z>", "\" onload=\"alert(1)",
    "' onclick='alert(1)", "<!-- ", "]]><svg onload=alert(1)>", "{0} {row} {x.__class__} {{",
    "<iframe srcdoc='<script>alert(1)</script>'>", "\x00\x1b[31m", "\ud800 \udfff", "\u202eevil",
    "<meta http-equiv=refresh content='0;url=//x.y'>", "javascript:alert(1)", "<base href=//x.y>",
    "&lt;"]


class Page(html.parser.HTMLParser):
    """tags: (name, attributes) of each; samples: of each its class, what its summary says, and the
    texts under it by their headings."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.samples, self.open, self.title = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        self.open.append(name)
        if name == "details":
            self.samples.append([dict(attributes)["class"], "", {}])
        elif name == "h3":
            self.heading = ""
        elif name == "pre" and "details" in self.open:
            self.samples[-1][2][self.heading] = ""

    def handle_endtag(self, name):
        while self.open.pop() != name:
            pass

    def handle_data(self, text):
        if "title" in self.open:
            self.title += text
        elif "summary" in self.open:
            self.samples[-1][1] += text
        elif "h3" in self.open:
            self.heading += text
        elif "pre" in self.open and "details" in self.open:
            self.samples[-1][2][self.heading] += text

    def handle_comment(self, text):
        raise AssertionError(f"a comment: {text}")


def verdict(number, passed, **changes):
    """A verified row."""
    return {"id": str(number), "source": "toy", "model": "m", "kind": "math", "prompt": "2 + 2?",
            "answer": "4", "sample": 0, "num_tokens": 10 + number, "finish_reason": "stop",
            "response": "<think>Let us add.</think>It is \\boxed{4}.", "passed": passed,
            "extracted": "4" if passed else "5", "reason": "correct" if passed else "wrong answer",
            **changes}


def page_of(rows, tmp_path):
    """The page of verified rows: (its text, parsed)."""
    path = tmp_path / "verified.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = verify.read_back(path)
    pieces = verify.report(str(path), short, verify.scores(short))
    text = "".join(pieces).encode("utf-8", "xmlcharrefreplace").decode()
    return text, Page(text)


def is_harmless(page):
    """Whether it has no tag but the report's, and no attribute that runs, fetches or leads away."""
    policy, = (attributes["content"] for name, attributes in page.tags
               if attributes.get("http-equiv") == "Content-Security-Policy")
    names = {name for _, attributes in page.tags for name in attributes}
    leads_away = names & {"src", "href", "style", "srcdoc", "action"}
    runs = [name for name in names if name.startswith("on")]
    forbids = "default-src 'none'" in policy and "script" not in policy
    return {name for name, _ in page.tags} <= TAGS and not leads_away and not runs and forbids


def test_the_command_writes_a_page_with_scores_bars_lengths_and_every_sample(tmp_path):
    rows = [{"id": str(number), "source": source, "kind": "math", "prompt": f"question {number}",
             "answer": "4", "sample": 0, "model": "m", "finish_reason": "stop", "num_tokens": 100,
             "response": f"{verify.TAGS[0]}hm {number}{verify.TAGS[1]}{verify.TAGS[2]}"
                         f"\\boxed{{{4 if number % 3 else 5}}}{verify.TAGS[3]}"}
            for source in ("math500", "toy") for number in range(9)]
    rows.append({"id": "f", "source": "code", "kind": "code", "prompt": "print it", "model": "m",
                 "tests": [{"input": "1", "output": "2"}], "response": "```python\nprint(2)\n```"})
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "new" / "report.html"
    done = run_script(ROOT / "verify.py", tmp_path / "s.jsonl", "--allow_unsafe", "--out",
                      tmp_path / "v.jsonl", "--report", path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert is_harmless(page) and "v.jsonl" in page.title
    for line in done.stdout.splitlines():  # the page says what the command says
        assert html.escape(line) in text
    assert "66.7%" in text and "86.4%" in text and "83.1% to 89.1%" in text
    bars = [attributes for name, attributes in page.tags if attributes.get("class") == "score"]
    assert len(bars) == 4 + 4  # three sources, all, and four published
    assert [name for name, _ in page.tags].count("details") == len(rows)
    kind, summary, texts = page.samples[0]
    assert kind == "wrong" and summary.split() == ["wrong", "math500", "0", "m", "wrong", "answer"]
    assert texts == {"question": "question 0", "thought": f"{verify.TAGS[0]}hm 0", "extracted": "5",
                     "solution": rows[0]["response"].partition(verify.TAGS[1])[2], "gold": "4"}
    assert [kind for kind, *_ in page.samples[:3]] == ["wrong", "right", "right"]
    assert page.samples[1][1].startswith("right")
    assert page.samples[-1][2] == {
        "question": "print it", "thought": "", "solution": rows[-1]["response"],
        "extracted": "print(2)", "gold": "[{'input': '1', 'output': '2'}]"}


@pytest.mark.parametrize("field", ["id", "source", "model", "prompt", "response", "answer",
                                   "reason", "extracted", "num_tokens"])
def test_text_stays_text(field, tmp_path):
    """Whatever a model, a data set or a file name says, the page has the same tags as without."""
    plain = page_of([verdict(number, False) for number, _ in enumerate(HOSTILE)], tmp_path)[1]
    rows = [verdict(number, False, **{field: text}) for number, text in enumerate(HOSTILE)]
    text, page = page_of(rows, tmp_path)
    assert is_harmless(page) and len(page.samples) == len(rows)
    if field not in ("source", "model"):  # of which each has a bar of its own
        bars = "rect", "title"  # as many as there are lengths
        assert [name for name, _ in page.tags if name not in bars] == [
            name for name, _ in plain.tags if name not in bars]
    shown = {"prompt": "question", "response": "solution", "answer": "gold",
             "extracted": "extracted"}
    if field in shown:
        for (*_, texts), hostile in zip(page.samples, HOSTILE, strict=True):
            surrogates = re.sub("[\ud800-\udfff]", "\ufffd", hostile)
            assert texts[shown[field]] in (hostile, surrogates)


def test_a_file_name_stays_text(tmp_path):
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    text, page = page_of([verdict(0, True)], folder)
    assert is_harmless(page) and page.title.startswith(str(folder))


def test_rows_with_nothing_but_what_is_needed_have_a_page(tmp_path):
    """Values of any kind, too, and lengths that are no numbers of tokens."""
    rows = [{"kind": "math", "response": "4", "answer": "4", "passed": True, "reason": "correct",
             "extracted": "4"},
            verdict(1, False, id=[1, {"a": None}], source=7, model=None, prompt=None,
                    num_tokens="9", extracted=None, reason="no answer"),
            verdict(2, False, num_tokens=-5, format_string="x", self="y", template="z"),
            verdict(3, False, num_tokens=10 ** 400), verdict(4, False, response="")]
    text, page = page_of(rows, tmp_path)
    assert is_harmless(page) and len(page.samples) == len(rows)
    assert page.samples[-1][2]["solution"] == ""


def test_right_and_wrong_are_counted_by_length_above_and_below_the_line(tmp_path):
    draw = random.Random(0)
    rows = [verdict(number, draw.random() < 0.5, num_tokens=draw.randrange(1, 4000))
            for number in range(500)]
    text, page = page_of(rows, tmp_path)
    end = int(re.search(r"from 0 to ([\d,]+) with", text)[1].replace(",", ""))
    assert end > max(row["num_tokens"] for row in rows) and end % 40 == 0
    bars = {(bar["class"], int(bar["x"])): int(bar["height"]) for name, bar in page.tags
            if name == "rect" and "x" in bar}
    for word, passed in (("right", True), ("wrong", False)):
        for place in range(40):
            count = sum(row["passed"] is passed and row["num_tokens"] // (end // 40) == place
                        for row in rows)
            assert bars.get((word, place), 0) == count
    assert f"The longest bar is {max(bars.values())} of them" in text


def test_of_very_many_samples_a_fair_choice_is_shown_and_said(tmp_path):
    """Each sample as likely as any other, the same ones each time, in their order."""
    rows = [verdict(number, number % 4 == 0, source=f"s{number // 10_000}")
            for number in range(20_000)]
    text, page = page_of(rows, tmp_path)
    assert "2,000 of 20,000" in text and len(page.samples) == 2000
    shown = [int(re.search(r"\d+", summary.split()[2])[0]) for _, summary, _ in page.samples]
    assert shown == sorted(set(shown))
    for is_one in (lambda n: n % 4 == 0, lambda n: n < 5000, lambda n: n >= 10_000):
        expected = sum(map(is_one, range(20_000))) / 10
        assert abs(sum(map(is_one, shown)) - expected) < 4 * expected ** 0.5
    assert page_of(rows, tmp_path)[0] == text


def test_a_very_long_text_loses_its_middle_and_says_so(tmp_path):
    row = verdict(0, True, response="a" * 100_000 + "</think>" + "b" * 59_999, prompt="c" * 60_001)
    (_, _, texts), = page_of([row], tmp_path)[1].samples
    half = 30_000
    assert texts["thought"] == "a" * half + "\n[40,000 characters left out]\n" + "a" * half
    assert texts["solution"] == "b" * 59_999 and "[1 characters left out]" in texts["question"]


def test_a_report_in_the_way_of_another_file_is_refused(tmp_path):
    (tmp_path / "s.jsonl").write_text(json.dumps(verdict(0, True)) + "\n")
    before = sorted(tmp_path.iterdir())
    for name in ("s.jsonl", "v.jsonl", ".", "s.jsonl/r.html"):
        done = run_script(ROOT / "verify.py", tmp_path / "s.jsonl", "--out", tmp_path / "v.jsonl",
                          "--report", tmp_path / name, check=False)
        assert done.returncode == 2 and done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1 and sorted(tmp_path.iterdir()) == before


def test_a_page_that_cannot_be_finished_leaves_the_older_one(tmp_path):
    path = tmp_path / "report.html"
    verify.write_whole(path, [b"old"])

    def pieces():
        yield b"new"
        raise OSError("no space left")
    with pytest.raises(OSError, match="no space"):
        verify.write_whole(path, pieces())
    assert path.read_bytes() == b"old"
