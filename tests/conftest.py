"""What several test files need: a small random model, a folder of it, scripts run as a user runs
them."""
import json
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from model import Qwen2, Qwen2Config, init_weights  # noqa: E402


# ------------------------------------------------------------------------------ tests on all cores

def pytest_addoption(parser):
    parser.addoption("--processes", type=int, default=os.cpu_count() + 1,
                     help="tests at a time (default: one more than cores, as many of them wait)")


def pytest_configure(config):
    config.addinivalue_line("markers",
                            "slow: takes more than some seconds (left out by -m 'not slow')")


def pytest_runtestloop(session):
    """In place of pytest's loop: --processes forks of this process take the next test each, and
    tell it what to report."""
    config, option = session.config, session.config.option
    count = min(option.processes, len(session.items))
    if count < 2 or option.collectonly or option.usepdb or session.testsfailed:
        return None  # pytest's own
    taken, running = multiprocessing.Value("i", 0), {}
    for _ in range(count):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        if os.fork() == 0:
            run_tests(session, taken, theirs)
        theirs.close()
        running[ours] = "no test"
    while running:
        for connection in multiprocessing.connection.wait(running):
            try:
                hook, fields = connection.recv()
            except EOFError:
                where = running.pop(connection)
                if where != "the end":
                    raise RuntimeError(f"a process of the tests died in {where}") from None
                continue
            running[connection] = fields.get("nodeid", "the end")
            if hook == "pytest_runtest_logreport":
                fields = {"report": config.hook.pytest_report_from_serializable(
                    config=config, data=fields)}
            if hook == "pytest_warning_recorded":
                config.hook.pytest_warning_recorded.call_historic(kwargs=fields)
            elif hook:
                getattr(config.hook, hook)(**fields)
        if session.shouldfail:  # -x: those under way are the last
            taken.value = len(session.items)
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    return True


class Reports:
    """What a fork tells the process that it comes from, in place of printing it."""

    def __init__(self, config, connection):
        self.config = config
        self.tell = connection.send

    def pytest_runtest_logstart(self, nodeid, location):
        self.tell(("pytest_runtest_logstart", {"nodeid": nodeid, "location": location}))

    def pytest_runtest_logreport(self, report):
        report = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.tell(("pytest_runtest_logreport", report))

    def pytest_runtest_logfinish(self, nodeid, location):
        self.tell(("pytest_runtest_logfinish", {"nodeid": nodeid, "location": location}))

    def pytest_warning_recorded(self, warning_message, when, nodeid, location):
        message = warnings.WarningMessage(str(warning_message.message), warning_message.category,
                                          warning_message.filename, warning_message.lineno)
        self.tell(("pytest_warning_recorded", {"warning_message": message, "when": when,
                                               "nodeid": nodeid, "location": location}))


def run_tests(session, taken, connection):
    """A fork's whole life. What tests of a module share is torn down before one of another; the end
    is told only when all of it is, so that a fault there is no success."""
    try:
        try:
            take_tests(session, taken, connection)
        finally:
            session._setupstate.teardown_exact(None)
        connection.send((None, {}))
    except BaseException:
        connection.send((None, {"nodeid": traceback.format_exc()}))  # where it died
    finally:
        os._exit(0)


def take_tests(session, taken, connection):
    manager, tests = session.config.pluginmanager, session.items
    capture = manager.getplugin("capturemanager")
    capture.stop_global_capturing()  # into files that all forks would write to
    capture.start_global_capturing()
    manager.unregister(name="terminalreporter")
    manager.register(Reports(session.config, connection))
    torch.set_num_threads(1)
    while True:
        with taken.get_lock():
            i = taken.value
            taken.value += 1
        if i >= len(tests):
            return
        session._setupstate.teardown_exact(tests[i])
        following = tests[i + 1] if i + 1 < len(tests) else None
        session.config.hook.pytest_runtest_protocol(item=tests[i], nextitem=following)


SHAPES = {  # what the published sizes differ in, in small
    "tied": dict(tie_word_embeddings=True),
    "untied": dict(tie_word_embeddings=False),
    "one_kv_head": dict(num_key_value_heads=1),
    "no_grouping": dict(num_key_value_heads=4, rope_theta=1e6),
}


def small_config(**changes):
    return Qwen2Config(**{**dict(vocab_size=270, hidden_size=64, intermediate_size=96,
                                 num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2,
                                 max_position_embeddings=512), **changes})


def small_model(seed=0, **changes):
    """Random weights; biases and norms too, which a fresh model has at 0 and 1, where a fault could
    hide."""
    model = Qwen2(small_config(initializer_range=0.1, **changes))
    init_weights(model, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def say_tied(model, folder, max_shard_bytes=10 ** 9):
    """A folder of an untied model whose config.json says that it is tied."""
    model.save_pretrained(folder, max_shard_bytes=max_shard_bytes)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


@pytest.fixture
def model_dir(tmp_path):
    """A folder of a small model with the built-in tokenizer."""
    from data import builtin_tokenizer
    small_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    builtin_tokenizer().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def rows_file(tmp_path):
    """Forty training rows of different lengths, in the recipe's layout."""
    path = tmp_path / "rows.jsonl"
    rows = [{"system": "s", "conversations": [{"from": "user", "value": f"count to {n}"},
                                              {"from": "assistant",
                                               "value": " ".join(map(str, range(n)))}]}
            for n in range(1, 41)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def in_process(capsys, monkeypatch):
    """A script in this process: in_process(module, *args) -> (exit status, stdout, stderr)."""
    import torch.distributed as dist
    from data import one_line_errors
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]

    def call(module, *args):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        status = 0
        try:
            one_line_errors(module.main)
        except SystemExit as end:
            status = end.code
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for number, handler in handlers:
                signal.signal(number, handler)
        return status, *capsys.readouterr()
    return call


def start_script(*args, processes=0, env=None):
    """Starts `python args`, or torchrun with so many processes. One thread each, no network."""
    command = [sys.executable, *map(str, args)] if not processes else [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc_per_node={processes}", "--", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
           **(env or {})}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=env)


def run_script(*args, timeout=240, check=True, **options):
    """Runs what start_script starts."""
    process = start_script(*args, **options)
    try:
        printed, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert not check or process.returncode == 0, errors[-3000:]
    return subprocess.CompletedProcess(args, process.returncode, printed, errors)


def run_unread(redirection, *args):
    """Runs `python args` in a shell with its output redirected, as to a reader who is gone."""
    command = ["bash", "-o", "pipefail", "-c", f'"$@" {redirection}', "-", sys.executable,
               *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)


def descendants(pid):
    """The processes that a process has started, and those that these have."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True,
                              text=True).stdout.split()
    return [d for child in children for d in (int(child), *descendants(child))]


def end_within(seconds, pids):
    """Whether none of the processes is there any more after so many seconds."""
    deadline = time.monotonic() + seconds
    while (there := any(os.path.exists(f"/proc/{pid}") for pid in pids)) \
            and time.monotonic() < deadline:
        time.sleep(0.05)
    return not there


def run_commands(script, folder):
    """Runs a shell script, as README has it, in a folder where the five scripts seem to lie. One
    thread each, no network, a cache of its own."""
    for path in ROOT.glob("*.py"):
        (folder / path.name).symlink_to(path)
    tools = folder / "tools"
    tools.mkdir()
    for name, module in (("python", ""), ("torchrun", "-m torch.distributed.run --standalone ")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module}"$@"\n')
        (tools / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
           "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
           "XDG_CACHE_HOME": str(folder / "cache")}
    process = subprocess.Popen(["bash", "-e", "-c", script], cwd=folder, env=env, text=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)
    try:
        printed, errors = process.communicate(timeout=900)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-3000:]
    return printed


def code_blocks(readme, section):
    """What stands between fences in a section of README."""
    return readme.partition(f"## {section}")[2].partition("\n## ")[0].split("```")[1::2]


def shared_file(name):
    """A file of real data beside the repository; the test is skipped where there is none."""
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"needs {name}, which is not part of the repository")
    return path
