"""The manual of verify.py's sandbox: verify.run_program against the programs of attacks.py, with a
look from outside at what it must prevent: files, connections, processes, limits, memory and time;
and after every attack a good program still passes and a wrong one still fails.

Some attacks kill what they can. So harmless ones go first, and where one of them gets through, the
others are not run.
"""
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from functools import cache
from pathlib import Path

import pytest

import verify
from conftest import ROOT
from attacks import ATTACKS, HONEST, MEMORY, SUM, THREADS, WRONG, fill, stdin

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")

TIMEOUT, MEMORY_LIMIT = 1.0, 1 << 30
WALL_LIMIT = 3 * TIMEOUT + verify.SLACK + 30  # a test's cap and what a busy machine may add to it
GOOD, BAD = "print(sum(map(int, input().split())))", "def add(a, b):\n    return a + b + 1"
HARMLESS = ("a signal that only asks whether one may", "a fork", "a new file", "a TCP connection",
            "memory of the parent read", "a confinement that is not there")
# layers of confinement, and how a zygote is made that lacks one; without limits the clock alone
# ends what computes for ever
LAYERS = {"limits": "verify.limit_resources = lambda request: None; verify.SLACK = -1.5",
          "uid": "verify.private_user = lambda: 0"}
# what no other layer can hold: as root, nothing but the uid makes the limit on threads count
ALONE = {"limits": (MEMORY, THREADS), "uid": (THREADS,)}
CHECKED_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run", "/run/lock", "/", ".",
                   *sys.path)


# ----------------------------------------------------------------------------- a look from outside

class World:
    """What attacks aim at, and how it is seen that they missed."""

    def __init__(self, top):
        top.chmod(0o755)
        self.home, self.work, self.canary = top / "home", top / "work", top / "canary"
        for folder in (self.home, self.work, self.canary):
            folder.mkdir()
            folder.chmod(0o777)  # so that permissions alone protect nothing
        self.environ = f"environ-{uuid.uuid4().hex}"
        self.victim = subprocess.Popen(["sleep", "9999"], env={"VERIFY_SECRET": self.environ})
        self.listeners = {
            "PORT": self.listen(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            "PORT6": self.listen(socket.AF_INET6, socket.SOCK_STREAM, ("::1", 0)),
            "UDP": self.listen(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            "SOCKET": self.listen(socket.AF_UNIX, socket.SOCK_STREAM, str(top / "socket")),
            "ABSTRACT": self.listen(socket.AF_UNIX, socket.SOCK_STREAM, f"\0{top.name}")}
        (top / "socket").chmod(0o777)
        self.passes_gate = cache(self.passes_gate)

    @staticmethod
    def listen(family, kind, address):
        """A listening socket, or None where the machine has no such family."""
        try:
            listener = socket.socket(family, kind)
            listener.bind(address)
        except OSError:
            return None
        if kind == socket.SOCK_STREAM:
            listener.listen()
        listener.setblocking(False)
        return listener

    def fresh(self):
        """New secrets and canaries; the values of all tokens."""
        shutil.rmtree(self.canary)
        self.canary.mkdir()
        self.canary.chmod(0o777)
        (self.canary / "old").write_text("old\n")
        (self.canary / "old").chmod(0o666)
        planted = f"planted-{uuid.uuid4().hex}"
        for folder in (self.home, self.work):
            for path in folder.iterdir():
                path.unlink()
        (self.home / "token").write_text(planted + "\n")
        (self.home / planted).touch()
        (self.work / "planted.py").write_text(f"SECRET = '{planted}'\n")
        ports = {name: address_of(listener) for name, listener in self.listeners.items()}
        return {**ports, "CANARY": self.canary, "HOME": self.home, "PLANTED": planted,
                "PLANTED_FILE": self.home / "token", "ENVIRON": self.environ,
                "SECRET": f"secret-{uuid.uuid4().hex}", "PID": os.getpid(),
                "VICTIM": self.victim.pid, "MARK": f"mark{uuid.uuid4().hex[:10]}"}

    def state(self):
        """All that no program may change, by name."""
        files = {str(path): (path.lstat()[:8], path.lstat().st_mtime_ns, path.lstat().st_ctime_ns,
                             path.read_bytes() if path.is_file() else None)
                 for folder in (self.canary, self.home, self.work)
                 for path in [folder, *folder.rglob("*")]}
        for name, (stat, *others) in files.items():
            files[name] = (*stat[:7], *others)  # the last is the time of access
        processes = {
            f"{kind} of {who}": read(pid) for who, pid in (("the verifier", os.getpid()),
                                                           ("the bystander", self.victim.pid))
            for kind, read in PROPERTIES.items()}
        queues = {path.name: len(path.read_text().splitlines())
                  for path in Path("/proc/sysvipc").glob("*")}
        return {**files, **processes, **queues, "connections": self.connections(),
                "bystander": self.victim.poll(), "stopped": stopped(self.victim.pid)}

    def connections(self):
        """The kinds of connections and datagrams that have come in since the last look."""
        found = []
        for name, listener in self.listeners.items():
            try:
                if listener is not None and name == "UDP":
                    found.append((name, listener.recv(99)))
                elif listener is not None:
                    listener.accept()[0].close()
                    found.append(name)
            except BlockingIOError:
                pass
        return found

    def passes_gate(self, change):
        """Whether the harmless attacks are contained, so that the others may be tried."""
        return [attack.name for attack in ATTACKS if attack.name in HARMLESS
                and run(attack, self.fresh(), change).passed] == []

    def close(self):
        self.victim.kill()
        self.victim.wait()
        for listener in self.listeners.values():
            if listener is not None:
                listener.close()


def address_of(listener):
    """What a program must know to connect: a port, a path or an abstract name."""
    name = listener.getsockname() if listener is not None else (None, 9)  # a port without listener
    if isinstance(name, tuple):
        return name[1]
    return name.decode().lstrip("\0") if isinstance(name, bytes) else name


def status_line(pid, key):
    return re.search(rf"^{key}:\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.M)[1]


def stopped(pid):
    return status_line(pid, "State")[0] in "TtZX"


PROPERTIES = {
    "limits": lambda pid: [resource.prlimit(pid, getattr(resource, name))
                           for name in dir(resource) if name.startswith("RLIMIT_")],
    "priority": lambda pid: os.getpriority(os.PRIO_PROCESS, pid),
    "affinity": os.sched_getaffinity, "scheduler": os.sched_getscheduler,
    "group": os.getpgid, "session": os.getsid,
    "tracer": lambda pid: status_line(pid, "TracerPid"),
    "score": lambda pid: Path(f"/proc/{pid}/oom_score_adj").read_text(),
}


def processes_with(mark):
    """The processes whose name or command line has the mark in it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "comm").read_bytes() + (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:
            pass
    return found


def files_with(mark):
    found = []
    for folder in {*CHECKED_FOLDERS, os.path.dirname(os.__file__), tempfile.gettempdir(),
                   os.path.expanduser("~")}:
        try:
            found += [os.path.join(folder, name) for name in os.listdir(folder) if mark in name]
        except OSError:
            pass
    return found


def kilobytes(key):
    return int(status_line("self", key).split()[0])


class MemoryWatch:
    """By how many bytes the resident memory of this process and of all below it grows at most."""

    def __enter__(self):
        self.peak, self.over, self.before = 0, threading.Event(), self.sum_of_processes()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew: man proc
        self.before_here = kilobytes("VmRSS")
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self):
        while not self.over.wait(0.03):
            self.peak = max(self.peak, self.sum_of_processes() - self.before)

    @staticmethod
    def sum_of_processes():
        parents, sizes = {}, {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parents[path.name] = (path / "stat").read_text().rpartition(")")[2].split()[1]
                pages = (path / "statm").read_text().split()
                sizes[path.name] = int(pages[1]) * resource.getpagesize()
            except OSError:
                pass

        def below(pid):
            children = [child for child, parent in parents.items() if parent == pid]
            return sizes.get(pid, 0) + sum(map(below, children))

        return below(str(os.getpid()))

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()
        # the thread does not run while this process itself is busy in C
        self.peak = max(self.peak, kilobytes("VmHWM") - self.before_here << 10)


@pytest.fixture(scope="module")
def world():
    """The world of the attacks, with its working folder and its environment."""
    top, folder = Path(tempfile.mkdtemp()), os.getcwd()
    world = World(top)
    os.environ["VERIFY_SECRET"] = world.environ  # before the first process of the verifier starts
    os.chdir(world.work)
    try:
        yield world
    finally:
        os.chdir(folder)
        del os.environ["VERIFY_SECRET"]
        world.close()
        shutil.rmtree(top, ignore_errors=True)


@cache
def sandbox(*changes):
    """A sandbox of which some functions are replaced."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport verify\n")
        file.write("\n".join([*changes, "verify.zygote(int(sys.argv[2]))"]))
        file.flush()
        return verify.Sandbox(file.name)


def judge(code, tests, change=None, **options):
    """verify.run_program, and without a layer what it does in its worker."""
    if change is None:
        return verify.run_program(code, tests, **options)
    verify.SANDBOX, digits = sandbox(change), sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return verify.program_verdict(code, tests, **options)
    finally:
        sys.set_int_max_str_digits(digits)
        signal.setitimer(signal.ITIMER_REAL, 0)


def run(program, values, change=None):
    return judge(fill(program.code, values), fill(program.tests, values), change,
                 timeout=TIMEOUT, memory=MEMORY_LIMIT)


def check_contained(world, attack, change=None):
    """Asserts that an attack does nothing that is seen from outside, and no harm to the next."""
    if not world.passes_gate(change):
        pytest.fail("even harmless attacks get through: the others are not run")
    values = world.fresh()
    before, started, memory = world.state(), time.monotonic(), MemoryWatch()
    if attack.before:
        judge(fill(attack.before, values), stdin(("", "")), change, timeout=TIMEOUT,
              memory=MEMORY_LIMIT)
    if attack.breach == MEMORY:
        with memory:
            verdict = run(attack, values, change)
        assert memory.peak < MEMORY_LIMIT + (1 << 29)
    else:
        verdict = run(attack, values, change)
    assert not verdict.passed, f"{attack.breach}: {verdict.reason}"
    assert len(verdict.reason) < 200
    assert time.monotonic() - started < WALL_LIMIT * (len(attack.tests) + bool(attack.before))
    after = world.state()
    assert {name for name in before | after if before.get(name) != after.get(name)} == set()
    assert processes_with(values["MARK"]) == [] and files_with(values["MARK"]) == []
    options = dict(change=change, timeout=TIMEOUT, memory=MEMORY_LIMIT)
    assert judge(GOOD, SUM["stdin"], **options).reason == "correct"
    assert judge(BAD, SUM["call"], **options).reason == "wrong answer on test 1"


# --------------------------------------------------------------------------------------- all layers

def parameters(programs):
    """One a test; those that only the cap on wall time ends are slow, all but the first."""
    first = next((program for program in programs if getattr(program, "waits", False)), None)
    return [pytest.param(program, id=program.name, marks=[pytest.mark.slow] if getattr(
        program, "waits", False) and program is not first else []) for program in programs]


def test_the_harmless_attacks_exist_and_names_differ():
    assert set(HARMLESS) <= {attack.name for attack in ATTACKS}
    for programs in (ATTACKS, HONEST, WRONG):
        names = [program.name for program in programs]
        assert sorted(set(names)) == sorted(names)


def test_every_token_is_filled_in(world):
    values = world.fresh()
    for attack in ATTACKS:
        text = repr([fill(thing, values) for thing in (attack.code, attack.tests, attack.before)])
        assert not re.search(r"@[A-Z0-9_]+@", text), attack.name


@pytest.mark.parametrize("attack", parameters(ATTACKS))
def test_an_attack_is_contained(world, attack):
    check_contained(world, attack)


@pytest.mark.parametrize("program", parameters(HONEST))
def test_an_honest_program_passes(world, program):
    if program.needs:
        pytest.importorskip(program.needs)
    verdict = verify.run_program(program.code, program.tests)
    if program.optional and not verdict.passed:
        pytest.xfail(f"a sandbox may refuse it: {verdict.reason}")
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("program", parameters(WRONG))
def test_a_wrong_program_fails_for_its_reason(world, program):
    verdict = run(program, {})
    assert not verdict.passed and re.search(program.reason, verdict.reason), verdict.reason


# ---------------------------------------------------------------------------------- one layer fewer

@pytest.mark.slow
@pytest.mark.parametrize("breach", sorted({attack.breach for attack in ATTACKS}))
@pytest.mark.parametrize("layer", LAYERS)
def test_one_layer_fewer_still_contains(world, layer, breach):
    if breach in ALONE.get(layer, ()):
        pytest.skip(f"held by {layer} alone")
    failed = {}
    for attack in ATTACKS:
        if attack.breach == breach and not attack.waits:
            try:
                check_contained(world, attack, LAYERS[layer])
            except AssertionError as error:
                failed[attack.name] = str(error).splitlines()[0]
    assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_one_layer_fewer_still_passes_honest_programs(world, layer):
    verdicts = {program.name: judge(program.code, program.tests, LAYERS[layer])
                for program in HONEST if not program.optional}
    failed = {name: verdict for name, verdict in verdicts.items() if not verdict.passed}
    assert not failed, "\n".join(f"{name}: {failed[name].reason}" for name in failed)


def test_the_self_test_tells_what_a_program_could_do_without_a_filter():
    assert verify.Sandbox().holes == []
    holes = sandbox("verify.install_filter = lambda program: None").holes
    assert {"fork", "exec", "socket", "read"} <= set(holes)
    assert not list(Path("/tmp").glob("sky-t1-probe"))


def test_a_sandbox_that_does_not_hold_is_refused_unless_asked_for():
    for change in ("verify.install_filter = lambda program: None", "verify.MACHINES = {}"):
        verify.SANDBOX = sandbox(change)
        with pytest.raises(verify.BadInput, match="cannot be confined here: one could fork"):
            verify.the_sandbox()
        assert verify.the_sandbox(allow_unsafe=True)
        assert judge(GOOD, SUM["stdin"], change, allow_unsafe=True).passed
