"""Responses as models write them, and whether the program in them is the right one.

`RESPONSES`: list of (name, response, tests, passes) for `verify_code(response, tests)`. The program
is, within the last solution section if it has blocks, else within the whole response: the last
block labelled python, py or python3, where one of a single line or of a doctest does not replace a
longer program; else the last unlabelled one that parses as Python and is no mere output.
"""
from textwrap import indent

DOUBLE = [{"input": "7\n", "output": "14\n"}, {"input": "-1\n", "output": "-2"}]
CALL = [{"fn_name": "double", "args": [7], "expected": 14}]
ASSERT = [{"assert": "assert double(7) == 14\nassert double(0) == 0"}]
YES = [{"input": "2\n", "output": "YES\n"}, {"input": "3\n", "output": "NO\n"}]
RIGHT, WRONG = "n = int(input())\nprint(2 * n)\n", "n = int(input())\nprint(n + 1)\n"
FUNCTION, OFF = "def double(n):\n    return 2 * n\n", "def double(n):\n    return n + 2\n"
EVEN = 'n = int(input())\nprint("NO" if n % 2 else "YES")\n'
BEGIN, END = "<|begin_of_solution|>", "<|end_of_solution|>"
RESPONSES = []


def block(code, label="python", fence="```"):
    return f"{fence}{label}\n{code.rstrip()}\n{fence}\n"


def response(name, text, passes=True, tests=DOUBLE):
    RESPONSES.append((name, text, tests, passes))


# ---- labels and fences

for label in ("python", "py", "python3", "Python", "Python3", "PYTHON", "Py", "python ", " python"):
    response(f"a fence labelled {label!r}",
             f"We double the number.\n\n{block(RIGHT, label)}\nThis takes constant time.\n")
response("a fence of tildes", block(RIGHT, "python", "~~~"))
response("a fence of tildes without a label", f"Code:\n{block(RIGHT, '', '~~~')}")
response("a fence of four backticks", f"Here it is:\n\n{block(RIGHT, 'python', '````')}")
response("a fence of four backticks around three", block(
    'TEXT = """\n```\nprint(0)\n```\n"""\n' + RIGHT, "python", "````"))
response("a fence of tildes around backticks", block(
    'TEXT = """\n```\nprint(0)\n```\n"""\n' + RIGHT, "python", "~~~"))
response("an indented fence in a list", "1. Read the number.\n2. Double it:\n\n" + indent(
    block(RIGHT), "   ") + "\n3. Done.\n")
response("an indented fence in a nested list", "- Solution:\n    - Code:\n\n" + indent(
    block(FUNCTION), "      ") + "\n- Tests pass.\n", tests=CALL)
response("an indented fence below a wrong block", block(WRONG) + "\n* Fixed:\n\n" + indent(
    block(RIGHT), "  "))
response("a fence indented by a tab", "* Code:\n\n" + indent(block(RIGHT), "\t"))
response("ends of lines of Windows", f"Solution:\n\n{block(RIGHT)}\nDone.\n".replace("\n", "\r\n"))
response("ends of lines of Windows in two blocks",
         f"First:\n\n{block(WRONG)}\nBetter:\n\n{block(FUNCTION)}".replace("\n", "\r\n"),
         tests=CALL)
response("ends of lines of Windows and no label",
         f"Solution:\n\n{block(RIGHT, '')}\nDone.\n".replace("\n", "\r\n"))
for name, after in (("the end of the solution", END), ("a full stop", "."), ("a blank", " "),
                    ("a blank and text", " This prints twice the number."), ("a tab", "\t")):
    response(f"a closing fence followed by {name}", f"The code:\n\n```python\n{RIGHT}```{after}\n")
response("a closing fence followed by the end of the solution, without a line's end",
         f"{BEGIN}\nDouble it.\n\n```python\n{RIGHT}```{END}")
response("closing fences followed by full stops, twice",
         f"First ```python\n{WRONG}```.\nThen\n```python\n{RIGHT}```.\nDone.")
response("a last fence never closed", f"Here is the code.\n\n```python\n{RIGHT}")
response("a last fence never closed, without a line's end", f"```python\n{RIGHT}".rstrip())
response("a last fence never closed, below a wrong block",
         f"{block(WRONG)}\nNo, double it:\n\n```python\n{RIGHT}")
response("a last wrong fence never closed, below a right block",
         f"{block(RIGHT)}\nNo, add one:\n\n```python\n{WRONG}", False)
response("a fence that opens after text", f"Here is the code: ```python\n{RIGHT}```\n")
response("a fence that opens after text, twice",
         f"Try this: ```python\n{WRONG}```\nOr rather: ```python\n{RIGHT}```\n")
response("a fence that opens after bold text", f"**Solution:** ```python\n{RIGHT}```\nDone.\n")
response("a title between two fences", f"### Idea\n{block(WRONG)}### Code\n{block(RIGHT)}")
response("no blank lines around the fence", f"Code:\n{block(RIGHT)}Done.")
response("inline code around the block", f"Use `input()`, then `print`:\n\n{block(RIGHT)}\n"
         "where `n` is a number and ``2 * n`` its double.\n")

# ---- solution sections

THOUGHT = "<|begin_of_thought|>\nLet me think.\n\n{}\n<|end_of_thought|>\n\n"
response("a wrong block in the thought, the right one in the solution",
         THOUGHT.format(block(WRONG)) + f"{BEGIN}\nThe code:\n\n{block(RIGHT)}\n{END}")
response("the right block in the thought, a wrong one in the solution",
         THOUGHT.format(block(RIGHT)) + f"{BEGIN}\nThe code:\n\n{block(WRONG)}\n{END}", False)
response("a labelled block in the thought, an unlabelled one in the solution",
         THOUGHT.format(block(WRONG)) + f"{BEGIN}\n{block(RIGHT, '')}\n{END}")
response("a solution without blocks below a thought with one",
         THOUGHT.format(block(RIGHT)) + f"{BEGIN}\nAs above: double the number.\n{END}")
response("two solution sections",
         f"{BEGIN}\n{block(WRONG)}\n{END}\nWait.\n{BEGIN}\n{block(RIGHT)}\n{END}")
response("two solution sections, the last one wrong",
         f"{BEGIN}\n{block(RIGHT)}\n{END}\nWait.\n{BEGIN}\n{block(WRONG)}\n{END}", False)
response("a solution with two blocks, the last one right",
         f"{BEGIN}\n{block(OFF)}\nThat adds two. Fixed:\n\n{block(FUNCTION)}\n{END}", tests=ASSERT)
response("a thought without end tags", "Thinking.\n" + block(WRONG) + f"\n{BEGIN}\n{block(RIGHT)}")

# ---- what comes after the program

for name, after in (
        ("its output, unlabelled", block("14", "")),
        ("its output, labelled output", block("14\n-2", "output")),
        ("its output, labelled text", block("Enter: 7\nResult: 14", "text")),
        ("its output, labelled plaintext", block("14", "plaintext")),
        ("a list as output, unlabelled", block("[14, -2]", "")),
        ("a bash block", block("echo 7 | python main.py", "bash")),
        ("a shell block", block("$ python3 main.py\n7\n14", "sh")),
        ("a console block", block("$ python3 main.py < input.txt", "console")),
        ("an input example", "For example:\n\n" + block("5 3\n1 2", "")),
        ("input and output, unlabelled",
         "Input:\n" + block("7", "") + "Output:\n" + block("14", "")),
        ("a JSON block", block('{"input": 7, "output": 14}', "json")),
        ("a formula", "$$\n2n\n$$\n\nIt runs in `O(1)`.\n"),
        ("a C++ version", "In C++:\n\n" + block(
            "#include <iostream>\nint main() { int n; std::cin >> n; std::cout << n; }\n", "cpp")),
        ("an unlabelled sketch", block("n = 7\nresult = n + 1", "")),
        ("an unlabelled command", block("python main.py < input.txt", ""))):
    response(f"a program, then {name}", f"The code:\n\n{block(RIGHT)}\n{after}")
for name, after in (
        ("a doctest", ">>> double(2)\n4\n>>> double(0)\n0\n"),
        ("a short doctest", ">>> double(2)\n4\n"),
        ("a doctest with a loop", ">>> for n in (1, 2):\n...     print(double(n))\n2\n4\n"),
        ("a line of usage", "print(double(2))\n"), ("a call", "double(7)\n"),
        ("an import", "from solution import double\n")):
    response(f"a function, then {name}", f"{block(FUNCTION)}\nUsage:\n\n{block(after)}", tests=CALL)
response("a function, then usage and output",
         f"{block(FUNCTION)}\nUsage:\n\n{block('print(double(7))')}\nprints\n\n"
         f"{block('14', 'output')}", tests=ASSERT)
response("a wrong function, then a right line",
         block(OFF) + "\n" + block("double = lambda n: 2 * n"), False, CALL)

# ---- several blocks

response("several blocks, the last one right",
         f"A start:\n{block(WRONG)}\nBetter:\n{block(OFF)}\nAt last:\n{block(RIGHT)}")
response("several blocks, the last one wrong", f"{block(RIGHT)}\nSimpler:\n\n{block(WRONG)}", False)
response("a right block in another spelling below a wrong one",
         f"{block(WRONG, 'python')}\nFixed:\n\n{block(RIGHT, 'Python3')}")
response("a wrong block in another spelling below a right one",
         f"{block(RIGHT, 'python')}\nFixed:\n\n{block(WRONG, 'py')}", False)
response("an unlabelled right block above a labelled wrong one",
         f"{block(RIGHT, '')}\nIn full:\n\n{block(WRONG)}", False)
response("an unlabelled wrong block below a labelled right one",
         f"{block(RIGHT)}\nNot like this:\n\n{block(WRONG, '')}")
response("a helper's block, then the whole program",
         f"The helper:\n\n{block(FUNCTION)}\nIn full:\n\n"
         f"{block(FUNCTION + 'print(double(int(input())))')}")
response("a single line alone", "Simply:\n\n" + block("print(2 * int(input()))"))
response("two single lines, the last one right",
         block("print(1 + int(input()))") + "\n" + block("print(2 * int(input()))"))

# ---- no labels

response("one block without a label", f"The code:\n\n{block(RIGHT, '')}")
response("two blocks without a label, the last one right",
         block(WRONG, "") + "\n" + block(RIGHT, ""))
response("two blocks without a label, the last one wrong",
         block(RIGHT, "") + "\n" + block(WRONG, ""), False)
for name, after in (("a number", "14\n"), ("numbers", "14\n-2\n"), ("a list", "[14, -2]\n"),
                    ("what does not parse", "5 3\n1 2\n"), ("a sentence", "The answer is 14.\n")):
    response(f"a block without a label, then {name}",
             f"{block(RIGHT, '')}\nOutput:\n\n{block(after, '')}")
response("a block without a label, then words that parse",
         f"{block(EVEN, '')}\nFor 2 and 3:\n\n" + block("YES\nNO", ""), tests=YES)
response("input, program and output without labels",
         f"Given\n{block('7', '')}we run\n{block(RIGHT, '')}and see\n{block('14', '')}")
response("a block without a label, then bash",
         f"{block(FUNCTION, '')}\nRun:\n\n{block('python -m pytest', 'bash')}", tests=CALL)

# ---- no program

response("C++ only", "The code:\n\n" + block(
    "#include <iostream>\nint main() { int n; std::cin >> n; std::cout << 2 * n; }", "cpp"), False)
response("C++ without a label", "The code:\n\n" + block(
    "#include <cstdio>\nint main() { int n; scanf(\"%d\", &n); printf(\"%d\", 2 * n); }\n", ""),
    False)
response("JavaScript only", block(
    "const n = require('fs').readFileSync(0);\nconsole.log(2 * n);\n", "javascript"), False)
response("no block", "Read n and print 2 * n.", False)
response("a program in no block", f"The code:\n\n{RIGHT}", False)
response("inline code only", "Just `print(2 * int(input()))`.", False)
response("output only", f"It prints\n\n{block('14', 'output')}", False)
response("nothing", "", False)
response("an unlabelled block of prose", block("Read a number.\nPrint its double.", ""), False)
response("a block that is no Python", block("read n; print 2n"), False)
