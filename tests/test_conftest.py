"""The manual of conftest.py's loop: tests in several processes are reported as in one."""
import re
import subprocess
import sys

import pytest

from conftest import ROOT

TESTS = """
import os, warnings
import pytest

def test_fails():
    print("was here")
    assert 1 == 2

def test_warns():
    warnings.warn("look out")

@pytest.mark.skip(reason="not today")
def test_skipped():
    pass

@pytest.fixture
def broken():
    yield
    raise ValueError("at the end")

@pytest.mark.parametrize("n", range(5))
def test_passes(n, broken):
    pass
"""


def outcome(folder, text, *flags):
    (folder / "test_some.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", *flags,
         folder / "test_some.py"], capture_output=True, text=True, cwd=ROOT / "tests", timeout=240)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_failures_errors_skips_and_warnings_are_told(tmp_path, processes):
    status, printed = outcome(tmp_path, TESTS, "--processes", str(processes))
    last = printed.splitlines()[-1]
    assert status == 1 and "1 failed, 6 passed, 1 skipped, 1 warning, 5 errors" in last
    for said in ("assert 1 == 2", "was here", "ValueError: at the end", "UserWarning: look out"):
        assert said in printed


def test_a_process_that_dies_is_no_success(tmp_path):
    status, printed = outcome(tmp_path, TESTS + "\ndef test_dies():\n    os._exit(0)\n",
                              "--processes", "2")
    assert status == 3 and re.search("a process of the tests died in .*test_dies", printed)


def test_a_shared_fixture_that_fails_at_its_end_is_no_success(tmp_path):
    """Also in a process whose last test is not the last of all."""
    shared = """
import time
from pathlib import Path
import pytest

BEGUN = Path(__file__).with_name("begun")

@pytest.fixture(scope="module")
def shared():
    yield
    raise ValueError("at the very end")

def test_first(shared):
    while not BEGUN.exists():
        time.sleep(0.01)

def test_last():
    BEGUN.touch()
"""
    status, printed = outcome(tmp_path, shared, "--processes", "2")
    assert status == 3 and "a process of the tests died in" in printed
    assert "ValueError: at the very end" in printed


def test_the_first_failure_ends_the_run_if_asked(tmp_path):
    many = TESTS + "\n@pytest.mark.parametrize('n', range(500))\ndef test_more(n):\n    pass\n"
    status, printed = outcome(tmp_path, many, "--processes", "2", "-x")
    assert status == 1 and int(re.search(r"(\d+) passed", printed)[1]) < 400
