"""Programs for verify.run_program: ATTACKS must be contained and must not pass, HONEST must pass,
WRONG must fail for the reason given.

Tokens between @ signs stand for what test_attacks.py sets up afresh; `fill` puts it in:

    @CANARY@        a folder that anyone may write to, with a file `old` in it
    @PLANTED_FILE@  a file that anyone may read, with the secret @PLANTED@; the working folder holds
                    another, planted.py, and the folder @HOME@ one with the secret in its name
    @ENVIRON@       the secret in the environment of the verifier and of the process @VICTIM@
    @SECRET@        an expected output, made anew for every attack
    @PORT@ @PORT6@ @UDP@    listeners on the loopback; @SOCKET@ and @ABSTRACT@ on Unix sockets
    @PID@ @VICTIM@  the verifier's process and a bystander
    @MARK@          the name of whatever an attack leaves behind

In an attack, to pass is to breach: a program that sees itself do what is forbidden prints
`breached`, one that looks for a secret prints what it finds, and these are the expected outputs.
Forbidden things are kept small (some processes, 4 GiB, a file), so that a broken sandbox does not
end the machine. Never run the attacks outside a sandbox all the same: some kill what they can.
"""
from dataclasses import dataclass
from textwrap import dedent, indent

FORGED, LEAKED = "a forged pass", "a secret read"
TOUCHED, CONNECTED = "a file touched", "a connection made"
LEFT, HURT = "a process started or left", "another process hurt"
ENDLESS, MEMORY, THREADS = "time unbounded", "memory unbounded", "threads unbounded"
KERNEL, KEPT = "a part of the kernel reached", "state kept for the next program"


@dataclass(frozen=True)
class Attack:
    name: str
    code: str
    tests: list
    breach: str         # what must not happen
    before: str = ""    # a program that the same verifier runs first
    waits: bool = False  # takes no CPU time, so that only the cap on wall time ends it


@dataclass(frozen=True)
class Honest:
    name: str
    code: str
    tests: list
    needs: str = ""         # a package
    optional: bool = False  # a sandbox may refuse it


@dataclass(frozen=True)
class Wrong:
    name: str
    code: str
    tests: list
    reason: str  # a regular expression


def fill(thing, values):
    """`thing`, a string or a list of tests, with every @TOKEN@ replaced by values["TOKEN"]."""
    if isinstance(thing, list):
        return [fill(item, values) for item in thing]
    if isinstance(thing, dict):
        return {key: fill(value, values) for key, value in thing.items()}
    if not isinstance(thing, str):
        return thing
    for name, value in values.items():
        thing = thing.replace(f"@{name}@", str(value))
    return thing


def stdin(*pairs):
    return [{"input": given, "output": wanted} for given, wanted in pairs]


def call(fn_name, *pairs):
    return [{"fn_name": fn_name, "args": list(args), "expected": wanted} for args, wanted in pairs]


def check(fn_name, body):
    """One assert test in the shape of HumanEval."""
    body = indent(dedent(body).strip(), "    ")
    return [{"assert": f"def check(candidate):\n{body}\n\ncheck({fn_name})\n"}]


BREACHED = stdin(("", "breached\n"))
SUM = {"stdin": stdin(("2 3\n", "5\n"), ("10 20\n", "30\n")),
       "call": call("add", ((2, 3), 5), ((10, 20), 30)),
       "assert": check("add", "assert candidate(2, 3) == 5\nassert candidate(10, 20) == 30")}
FIND = {"stdin": stdin(("", "@SECRET@\n")),
        "call": call("find", ((), "@SECRET@")),
        "assert": check("find", 'assert candidate() == "@SECRET@"')}
ATTACKS, HONEST, WRONG = [], [], []

CALLS = dedent("""
    import os, signal, sys, time

    def system_call(x86_64, aarch64, *args):
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        number = aarch64 if os.uname().machine == "aarch64" else x86_64
        return libc.syscall(ctypes.c_long(number), *[
            ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args])
    """)


def attack(breach, name, code, tests=BREACHED, **more):
    ATTACKS.append(Attack(name, dedent(code).strip() + "\n", tests, breach, **more))


def tries(breach, name, body, **more):
    """`body` is that of a function; its truth, without an exception, is the breach."""
    ATTACKS.append(Attack(
        name, CALLS + "\ndef attempt():\n" + indent(dedent(body).strip(), "    ") + dedent("""

        try:
            worked = attempt()
        except BaseException:
            worked = False
        print("breached" if worked else "contained", flush=True)
        """), BREACHED, breach, **more))


def forges(name, code, forms=("stdin", "call", "assert"), **more):
    """A program that never adds, judged by adding: one attack for every form of test."""
    for form in forms:
        attack(FORGED, f"{name} ({form})", code, SUM[form], **more)


def finds(breach, name, body, **more):
    """`body` is that of a function that looks for what the test expects; one attack per form."""
    code = "import os, re, sys\n\ndef find():\n" + indent(dedent(body).strip(), "    ")
    for form in FIND:
        attack(breach, f"{name} ({form})", code + "\n" * 3 +
               ("print(find())" if form == "stdin" else ""), FIND[form], **more)


def prints(name, code, secret, breach=LEAKED, **more):
    """A program that prints what it reads; the secret there is the expected output."""
    attack(breach, name, code, stdin(("", secret + "\n")), **more)


def honest(name, code, tests, **more):
    HONEST.append(Honest(name, dedent(code).strip() + "\n", tests, **more))


def wrong(name, code, tests, reason):
    WRONG.append(Wrong(name, dedent(code).strip() + "\n", tests, reason))


# ---------------------------------------------------------------------------------- attacks: memory

tries(MEMORY, "one large bytearray", """
    return len(bytearray(3 << 30)) == 3 << 30
    """)
tries(MEMORY, "many small objects", """
    kept = []
    while len(kept) < 3 << 10:
        kept.append([bytes(4000) for _ in range(262)])  # 1 MiB
    return True
    """)
tries(MEMORY, "touched pages of anonymous mappings", """
    import mmap
    maps = [mmap.mmap(-1, 1 << 30) for _ in range(4)]
    for each in maps:
        for offset in range(0, 1 << 30, 4096):
            each[offset] = 1
    return True
    """)
tries(MEMORY, "memory taken by many threads", """
    import threading
    kept, threads = [], []

    def take():
        kept.append(bytearray(b"x") * (256 << 20))

    for _ in range(16):
        threads.append(threading.Thread(target=take))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return sum(map(len, kept)) >= 3 << 30
    """)
tries(MEMORY, "a caught MemoryError and another try", """
    kept = []
    for size in [1 << power for power in range(31, 15, -1)]:
        try:
            while sum(map(len, kept)) < 3 << 30:
                kept.append(bytearray(b"x") * size)
        except MemoryError:
            pass
    return sum(map(len, kept)) >= 3 << 30
    """)
tries(MEMORY, "a memory file of 3 GiB", """
    handle = os.memfd_create("@MARK@")
    for _ in range(3 << 10):
        os.write(handle, bytes(1 << 20))
    return True
    """)
tries(MEMORY, "an unlinked file in shared memory", """
    with open("/dev/shm/@MARK@", "wb") as file:
        os.unlink("/dev/shm/@MARK@")
        for _ in range(3 << 10):
            file.write(bytes(1 << 20))
    return True
    """)
tries(MEMORY, "memory kept in pipes", """
    pipes = []
    while len(pipes) < 4096:
        pipes.append(os.pipe())
        os.set_blocking(pipes[-1][1], False)
        os.write(pipes[-1][1], bytes(1 << 16))
    return True
    """)
tries(MEMORY, "a decompression bomb", """
    import zlib
    packed = zlib.compress(bytes(1 << 24), 1)
    return sum(map(len, [zlib.decompress(packed) for _ in range(192)])) == 3 << 30
    """)
tries(MEMORY, "a raised memory limit", """
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return len(bytearray(b"x") * (3 << 30)) == 3 << 30
    """)
attack(MEMORY, "a constant that a compiler might fold", """
    print(len("a" * 4096 * 4096 * 256))
    """)
attack(MEMORY, "a string of 3 GiB returned to the judge", """
    def add(a, b):
        return "x" * (3 << 30)
    """, SUM["call"])
attack(MEMORY, "a long list returned to the judge", """
    def add(a, b):
        return [0] * 100_000_000
    """, SUM["call"])
attack(MEMORY, "a long string returned to an assert", """
    def add(a, b):
        return "x" * (900 << 20)
    """, SUM["assert"])
attack(MEMORY, "a result of many small parts", """
    import os
    def add(a, b):
        parts = b"[" + b"[]," * 20_000_000 + b"[]]\\n"
        for fd in range(3, 64):
            try:
                os.write(fd, b"value " + parts)
            except OSError:
                pass
        os._exit(0)
    """, SUM["call"][:1])
attack(ENDLESS, "a set of colliding numbers returned to the judge", """
    import json
    real = json.dumps
    json.dumps = lambda *args, **named: real(*args, **named).replace('"list"', '"set"')
    def add(a, b):
        return [(2 ** 61 - 1) * n for n in range(60_000)]
    """, SUM["call"][:1])
attack(ENDLESS, "a set of colliding numbers returned to an assert", """
    import json
    real = json.dumps
    json.dumps = lambda *args, **named: real(*args, **named).replace('"list"', '"set"')
    def add(a, b):
        return [(2 ** 61 - 1) * n for n in range(60_000)]
    """, SUM["assert"])
tries(THREADS, "a thousand threads", """
    import threading
    stop = threading.Event()
    for _ in range(1000):
        threading.Thread(target=stop.wait, args=(5,), daemon=True).start()
    return True
    """)
tries(THREADS, "two thousand threads with small stacks", """
    import threading
    threading.stack_size(1 << 16)
    stop = threading.Event()
    for _ in range(2000):
        threading.Thread(target=stop.wait, args=(5,), daemon=True).start()
    return True
    """)
tries(THREADS, "ten thousand descriptors", """
    for _ in range(10_000):
        os.dup(0)
    return True
    """)

# ---------------------------------------------------------------------------------- attacks: output

attack(MEMORY, "huge output", """
    import sys
    for _ in range(4 << 10):
        sys.stdout.write("x" * (1 << 20))
    """)
attack(MEMORY, "huge output with the right first line", """
    import os, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    os.write(1, b"breached\\n")
    while True:
        try:
            os.write(1, bytes(1 << 20))
        except OSError:
            pass
    """)
attack(MEMORY, "output without end in short lines", """
    while True:
        print(1)
    """)
attack(MEMORY, "a sparse output of a terabyte", """
    import os, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for fd in range(3, 256):
        try:
            os.ftruncate(fd, 1 << 40)
        except OSError:
            pass
    os.write(1, b"breached")
    os.ftruncate(1, 1 << 40)
    """)
attack(MEMORY, "huge output to stderr", """
    import sys
    for _ in range(4 << 10):
        sys.stderr.write("x" * (1 << 20))
    """)
attack(MEMORY, "an exception with a huge message", """
    raise ValueError("x" * (256 << 20))
    """)
attack(MEMORY, "an exception whose class has a huge name", """
    raise type("E" * (64 << 20), (Exception,), {})
    """)
attack(FORGED, "an exception whose class is named correct", """
    raise type("correct", (BaseException,), {})
    """)
attack(FORGED, "an exception that prints itself without end", """
    class Endless(Exception):
        def __str__(self):
            while True:
                pass
    raise Endless
    """)

# ------------------------------------------------------------------------------------ attacks: time
# The right answer is printed first, and still no program passes that does not end.

ANSWER = "print(sum(map(int, input().split())), flush=True)\n"


def never_ends(name, code, **more):
    attack(ENDLESS, name, ANSWER + dedent(code), SUM["stdin"][:1], **more)


never_ends("an endless loop", """
    while True:
        pass
    """)
never_ends("an endless loop that ignores every signal", """
    import signal
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    while True:
        pass
    """)
never_ends("an endless loop that blocks every signal", """
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
    while True:
        pass
    """)
never_ends("a handler that returns from the CPU limit", """
    import signal
    signal.signal(signal.SIGXCPU, lambda *_: None)
    while True:
        pass
    """)
never_ends("a raised CPU limit", """
    import resource
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for limit in ((-1, -1), (hard, hard)):
        try:
            resource.setrlimit(resource.RLIMIT_CPU, limit)
        except (OSError, ValueError):
            pass
    while True:
        pass
    """)
never_ends("cancelled alarms and timers", """
    import signal
    signal.alarm(0)
    for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
        signal.setitimer(timer, 0)
    while True:
        pass
    """)
never_ends("every exception caught for ever", """
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
    """)
never_ends("an endless loop in C", """
    import itertools
    all(itertools.repeat(1))
    """)
never_ends("a regular expression that backtracks", """
    import re
    re.match(r"(a|a)*(a|a)*$", "a" * 60 + "b")
    """)
never_ends("a huge power", """
    x = 7 ** 10 ** 9
    """)
never_ends("a huge number as a string", """
    import sys
    sys.set_int_max_str_digits(0)
    str(7 ** 10 ** 7)
    """)
never_ends("a loop in __del__", """
    class Endless:
        def __del__(self):
            while True:
                pass
    endless = Endless()
    del endless
    """)
attack(ENDLESS, "a loop in __del__ at the end", """
    class Endless:
        def __del__(self):
            while True:
                pass
    endless = Endless()
    """)
never_ends("a loop in atexit", """
    import atexit
    def forever():
        while True:
            pass
    atexit.register(forever)
    """)
never_ends("a loop in excepthook", """
    import sys
    def forever(*args):
        while True:
            pass
    sys.excepthook = forever
    1 / 0
    """)
never_ends("a thread that goes on after the end", """
    import threading
    def forever():
        while True:
            pass
    threading.Thread(target=forever).start()
    """)
never_ends("time spread over threads without the lock", """
    import hashlib, threading
    data = bytes(1 << 20)
    def forever():
        while True:
            hashlib.sha256(data).digest()
    for _ in range(4):
        threading.Thread(target=forever).start()
    """)
never_ends("a loop in an audit hook", """
    import sys
    def forever(*args):
        while True:
            pass
    sys.addaudithook(forever)
    compile("1", "", "eval")
    """)
never_ends("a slow correct program", """
    import time
    while time.process_time() < 3:
        pass
    """)
never_ends("a sleep for ever", """
    import time
    while True:
        time.sleep(1000)
    """, waits=True)
never_ends("a select for ever", """
    import select
    select.select([], [], [])
    """, waits=True)
never_ends("a deadlock", """
    import threading
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
    """, waits=True)
never_ends("a read of its own empty pipe", """
    import os
    os.read(os.pipe()[0], 1)
    """, waits=True)
never_ends("a program that stops itself", """
    import os, signal
    os.kill(os.getpid(), signal.SIGSTOP)
    """, waits=True)
attack(ENDLESS, "a sleep for ever in a call", """
    import time
    def add(a, b):
        time.sleep(1000)
    """, SUM["call"][:1], waits=True)
attack(ENDLESS, "a sleep for ever in an assert", """
    import time
    def add(a, b):
        time.sleep(1000)
    """, SUM["assert"], waits=True)
attack(ENDLESS, "a sleep for ever after the asserts", """
    import atexit, time
    def add(a, b):
        return 0
    atexit.register(time.sleep, 1000)
    """, SUM["assert"], waits=True)
attack(ENDLESS, "a loop in a call", """
    def add(a, b):
        while True:
            pass
    """, SUM["call"][:1])
attack(ENDLESS, "a loop in an assert", """
    def add(a, b):
        while True:
            pass
    """, SUM["assert"])
attack(ENDLESS, "a list without end returned to the judge", """
    class Endless(list):
        def __iter__(self):
            while True:
                yield 0
        def __len__(self):
            return 1 << 40
    def add(a, b):
        return Endless()
    """, SUM["call"][:1])

# ---------------------------------------------------------- attacks: the parser and the interpreter

for bomb, source in {
        "a hundred thousand brackets": "(" * 100_000,
        "deeply nested lists": "x = " + "[" * 90 + "]" * 90 + "\n" + "[" * 5000 + "]" * 5000,
        "a million minus signs": "x = " + "-" * 1_000_000 + "1",
        "a long sum": "x = " + "+".join(["1"] * 200_000),
        "deeply nested blocks": "\n".join(" " * n + "if 1:" for n in range(500)) + "\n",
        "a long chain of attributes": "x" + ".a" * 200_000,
        "a deep lambda": "x = " + "lambda: " * 50_000 + "0",
        "NUL bytes in the source": 'x = 1\0\nprint("contained")',
        "NUL bytes only": "\0" * 1000,
        "lone surrogates in the source": 'x = "\ud800"\nprint(x)',
        "a lone surrogate in a name": "\udcff = 1",
        "a form feed and a byte order mark": "\ufeff\f\v print(1)",
        "ten megabytes of source": "x = 1\n" * 1_700_000,
        "an int literal of a million digits": "x = " + "9" * 1_000_000,
        "an unfinished string": '"""' * 9999,
        "an empty program": "",
}.items():
    ATTACKS.append(Attack(bomb, source, BREACHED, FORGED))
attack(FORGED, "deep recursion in Python", """
    import sys
    sys.setrecursionlimit(1 << 30)
    def deeper():
        return deeper()
    deeper()
    """)
attack(FORGED, "deep recursion in C", """
    import sys
    sys.setrecursionlimit(1 << 30)
    nested = []
    for _ in range(10_000_000):
        nested = [nested]
    repr(nested)
    """)
attack(FORGED, "a null pointer read", """
    import ctypes
    ctypes.string_at(0)
    """)
attack(FORGED, "bytecode that crashes", """
    def f():
        pass
    f.__code__ = f.__code__.replace(co_code=b"\\xff" * 64, co_stacksize=1)
    f()
    """)
attack(FORGED, "a deeply nested list returned to the judge", """
    def add(a, b):
        nested = []
        for _ in range(100_000):
            nested = [nested]
        return nested
    """, SUM["call"])
attack(FORGED, "a list that holds itself returned to the judge", """
    def add(a, b):
        loop = []
        loop.append(loop)
        return loop
    """, SUM["call"])
attack(FORGED, "an int of ten million digits returned to the judge", """
    def add(a, b):
        return 1 << 33_000_000
    """, SUM["call"])

# --------------------------------------------------------------------------------- attacks: network

tries(CONNECTED, "a TCP connection", """
    import socket
    socket.create_connection(("127.0.0.1", @PORT@), 2).sendall(b"breached")
    return True
    """)
tries(CONNECTED, "a TCP connection over IPv6", """
    import socket
    socket.create_connection(("::1", @PORT6@), 2).sendall(b"breached")
    return True
    """)
tries(CONNECTED, "a datagram", """
    import socket
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", @UDP@))
    """)
tries(CONNECTED, "a Unix socket by its path", """
    import socket
    socket.socket(socket.AF_UNIX).connect("@SOCKET@")
    return True
    """)
tries(CONNECTED, "a Unix socket by its abstract name", """
    import socket
    socket.socket(socket.AF_UNIX).connect("\\0@ABSTRACT@")
    return True
    """)
tries(CONNECTED, "a connection by raw system calls", """
    import struct
    fd = system_call(41, 198, 2, 1, 0)
    address = struct.pack("=HH4s8x", 2, (@PORT@ & 255) << 8 | @PORT@ >> 8, bytes([127, 0, 0, 1]))
    return fd >= 0 and system_call(42, 203, fd, address, 16) == 0
    """)
tries(CONNECTED, "a connection by asyncio", """
    import asyncio
    async def connect():
        await asyncio.open_connection("127.0.0.1", @PORT@)
        return True
    return asyncio.run(connect())
    """)
tries(CONNECTED, "a page fetched by urllib", """
    import urllib.request
    urllib.request.urlopen("http://127.0.0.1:@PORT@/", timeout=1)
    return True
    """)
tries(CONNECTED, "a listening socket", """
    import socket
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return True
    """)
tries(CONNECTED, "an abstract socket with a name to be found by", """
    import socket
    server = socket.socket(socket.AF_UNIX)
    server.bind("\\0@MARK@")
    server.listen()
    return True
    """)
tries(CONNECTED, "netlink, packet, virtual machine, key and raw sockets", """
    import socket
    made = 0
    for family, kind, protocol in ((16, 3, 0), (17, 3, 0), (40, 1, 0), (38, 5, 0), (2, 3, 1),
                                   (10, 3, 58), (15, 3, 2), (1, 2, 0)):
        try:
            made += socket.socket(family, kind, protocol).fileno() > 0
        except OSError:
            pass
    return made
    """)
tries(CONNECTED, "an inherited socket", """
    import socket, stat
    for fd in range(1024):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                socket.socket(fileno=fd).send(b"breached")
                return True
        except OSError:
            pass
    """)
tries(CONNECTED, "a socket passed through a pair of its own", """
    import socket
    a, b = socket.socketpair()
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    return socket.send_fds(a, [b"x"], [server.fileno()])
    """)

# ------------------------------------------------------------------------- attacks: reading secrets

SEARCH_FILES = r"""
    import os, re, tempfile, time

    def search(pattern, folders, seconds=0.5):
        end = time.process_time() + seconds
        for top in folders:
            for folder, folders_in_it, names in os.walk(top):
                if time.process_time() > end:
                    return
                for name in names:
                    if found := re.search(pattern, name):
                        return found[0]
                    try:
                        with open(os.path.join(folder, name), "rb") as file:
                            found = re.search(pattern.encode(), file.read(1 << 16))
                    except OSError:
                        continue
                    if found:
                        return found[0].decode()
    """
prints("a secret file read by its path", """
    print(open("@PLANTED_FILE@").read())
    """, "@PLANTED@")
prints("a secret file read through the root of a process", """
    for pid in ("self", "@PID@", "@VICTIM@", "1"):
        try:
            print(open(f"/proc/{pid}/root@PLANTED_FILE@").read())
            break
        except OSError:
            pass
    """, "@PLANTED@")
prints("a secret file read through the verifier's working folder", """
    import os
    for pid in ("@PID@", "@VICTIM@", os.getppid()):
        try:
            print(open(f"/proc/{pid}/cwd/planted.py").read().split("'")[1])
            break
        except OSError:
            pass
    """, "@PLANTED@")
prints("a secret file found in the working folder", SEARCH_FILES + r"""
    print(search(r"planted-[0-9a-f]{32}", [os.getcwd(), "."]))
    """, "@PLANTED@")
prints("a secret file found in the home folder", SEARCH_FILES + r"""
    print(search(r"planted-[0-9a-f]{32}", ["@HOME@", os.path.expanduser("~")]))
    """, "@PLANTED@")
prints("a secret module imported from the working folder", """
    import os, sys
    sys.path[:0] = ["", ".", os.getcwd(), os.path.dirname("@PLANTED_FILE@")]
    import planted
    print(planted.SECRET)
    """, "@PLANTED@")
prints("a secret file read by the C library", """
    import ctypes
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    file = libc.fopen(b"@PLANTED_FILE@", b"r")
    text = ctypes.create_string_buffer(99)
    libc.fgets(text, 99, ctypes.c_void_p(file))
    print(text.value.decode())
    """, "@PLANTED@")
prints("a secret file opened by a raw openat2", CALLS + """
fd = system_call(437, 437, -100, b"@PLANTED_FILE@", bytes(24), 24)
print(os.read(fd, 99).decode())
""", "@PLANTED@")
prints("a secret file opened twice, first as a path only", """
    import os
    fd = os.open("@PLANTED_FILE@", os.O_PATH)
    print(open(f"/proc/self/fd/{fd}").read())
    """, "@PLANTED@")
prints("a secret file read through a symbolic link", """
    import os
    os.symlink("@PLANTED_FILE@", "@CANARY@/@MARK@")
    print(open("@CANARY@/@MARK@").read())
    """, "@PLANTED@")
prints("a secret file read by libraries", """
    import fileinput, linecache, mmap, os, tokenize
    for read in (lambda path: linecache.getline(path, 1),
                 lambda path: next(iter(fileinput.input([path]))),
                 lambda path: tokenize.open(path).read(),
                 lambda path: mmap.mmap(os.open(path, 0), 0, prot=mmap.PROT_READ)[:].decode(),
                 lambda path: __import__("numpy").fromfile(path, "uint8").tobytes().decode()):
        try:
            text = read("@PLANTED_FILE@")
        except Exception:
            continue
        if text:
            print(text)
            break
    """, "@PLANTED@")
prints("a secret name in the home folder", """
    import os
    print(*[name for name in os.listdir("@HOME@") if "planted" in name])
    """, "@PLANTED@")
prints("a secret in the environment", r"""
    import os, re
    print(re.search(r"environ-[0-9a-f]{32}", repr(os.environ))[0])
    """, "@ENVIRON@")
prints("a secret in the environment as the kernel has it", r"""
    import re
    print(re.search(rb"environ-[0-9a-f]{32}", open("/proc/self/environ", "rb").read())[0].decode())
    """, "@ENVIRON@")
prints("a secret in the environment as the C library has it", r"""
    import ctypes, re
    environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    n = 0
    while environ[n]:
        if found := re.search(rb"environ-[0-9a-f]{32}", environ[n]):
            print(found[0].decode())
        n += 1
    """, "@ENVIRON@")
prints("a secret in the environment of other processes", r"""
    import os, re
    for pid in ["@VICTIM@", "@PID@", str(os.getppid()), *os.listdir("/proc")]:
        try:
            text = open(f"/proc/{pid}/environ", "rb").read()
        except OSError:
            continue
        if found := re.search(rb"environ-[0-9a-f]{32}", text):
            print(found[0].decode())
            break
    """, "@ENVIRON@")
prints("a secret in the memory of other processes", r"""
    import os, re
    for pid in ["@VICTIM@", str(os.getppid()), "@PID@"]:
        try:
            memory, maps = open(f"/proc/{pid}/mem", "rb", 0), open(f"/proc/{pid}/maps").readlines()
        except OSError:
            continue
        for line in maps:
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            if "rw" in line and end - start < 1 << 26:
                try:
                    memory.seek(start)
                    found = re.search(rb"environ-[0-9a-f]{32}", memory.read(end - start))
                except OSError:
                    continue
                if found:
                    print(found[0].decode())
                    raise SystemExit
    """, "@ENVIRON@")
tries(LEAKED, "the password file of the system", """
    return open("/etc/shadow").read()
    """)
tries(LEAKED, "the descriptors of other processes", """
    for pid in (@PID@, @VICTIM@, os.getppid()):
        try:
            if os.listdir(f"/proc/{pid}/fd"):
                return True
        except OSError:
            pass
    """)

# ------------------------------------------------------------------------- attacks: expected values

finds(LEAKED, "the expected value in what the collector knows", r"""
    import gc
    seen, stack = set(), gc.get_objects()
    while stack and len(seen) < 300_000:
        thing = stack.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, (str, bytes)):
            text = thing if isinstance(thing, str) else thing.decode("latin-1")
            if found := re.search(r"secret-[0-9a-f]{32}", text):
                return found[0]
        else:
            stack.extend(x for x in gc.get_referents(thing) if isinstance(x, (str, bytes)))
    """)
finds(LEAKED, "the expected value in the frames", r"""
    import inspect
    frames = [*sys._current_frames().values(), *(each.frame for each in inspect.stack(0))]
    for frame in frames:
        while frame:
            text = repr((frame.f_locals, frame.f_globals, frame.f_code.co_consts))
            if found := re.search(r"secret-[0-9a-f]{32}", text):
                return found[0]
            for constant in frame.f_code.co_consts:
                if found := re.search(r"secret-[0-9a-f]{32}",
                                      repr(getattr(constant, "co_consts", ""))):
                    return found[0]
            frame = frame.f_back
    """)
finds(LEAKED, "the expected value in the modules", r"""
    for name, module in list(sys.modules.items()):
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if isinstance(value, (str, bytes, list, dict, tuple)):
                if found := re.search(r"secret-[0-9a-f]{32}", repr(value)):
                    return found[0]
    text = repr((sys.argv, sys.orig_argv, dict(os.environ), vars(sys.modules["__main__"])))
    return re.search(r"secret-[0-9a-f]{32}", text)[0]
    """)
finds(LEAKED, "the expected value in the memory", r"""
    for pid in ("self", os.getppid(), @PID@):
        try:
            memory, maps = open(f"/proc/{pid}/mem", "rb", 0), open(f"/proc/{pid}/maps").readlines()
        except OSError:
            continue
        for line in maps:
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            if "rw" in line and end - start < 1 << 26:
                try:
                    memory.seek(start)
                    found = re.search(rb"secret-[0-9a-f]{32}", memory.read(end - start))
                except OSError:
                    continue
                if found:
                    return found[0].decode()
    """)
WALK = r"""
    import ctypes, gc
    libc, (reader, writer) = ctypes.CDLL(None), os.pipe()
    os.set_blocking(writer, False)
    known = [*gc.get_objects(), *sys.modules.values(), *vars(sys).values(), bytes(1 << 12)]
    blocks = {(id(thing) >> 16) + near for thing in known for near in (-1, 0, 1)}
    blocks |= {(id(known[-1]) >> 16) + near for near in range(-512, 512)}
    for block in sorted(blocks):
        size = libc.write(writer, ctypes.c_void_p(block << 16), 1 << 16)  # fails where nothing is
        if size > 0:
            found = re.search(rb"secret-[0-9a-f]{32}", os.read(reader, size))
            if found:
                return found[0].decode()
    """
finds(LEAKED, "the expected value by walking the heap", WALK)
finds(LEAKED, "the expected value in the descriptors", r"""
    for fd in range(256):
        for path in (fd, f"/proc/self/fd/{fd}", f"/proc/{os.getppid()}/fd/{fd}",
                     f"/proc/@PID@/fd/{fd}"):
            try:
                handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if path != fd else fd
                os.set_blocking(handle, False)
                text = os.pread(handle, 1 << 20, 0)
            except OSError:
                continue
            if found := re.search(rb"secret-[0-9a-f]{32}", text):
                return found[0].decode()
    """)
finds(LEAKED, "the expected value in the files", dedent(SEARCH_FILES) + r"""
return search(r"secret-[0-9a-f]{32}", [".", "@HOME@", "@CANARY@", tempfile.gettempdir(), "/dev/shm",
                                       "/dev/mqueue", "/var/tmp", "/run/user"])
    """.rstrip())
finds(LEAKED, "the expected value in the command lines", r"""
    for pid in ["self", str(os.getppid()), "@PID@", *os.listdir("/proc")]:
        for name in ("cmdline", "environ", "comm"):
            try:
                text = open(f"/proc/{pid}/{name}", "rb").read()
            except OSError:
                continue
            if found := re.search(rb"secret-[0-9a-f]{32}", text):
                return found[0].decode()
    """)
attack(LEAKED, "the expected value in the constants of a caller", """
    import sys
    def find():
        frame, codes = sys._getframe(1), []
        while frame:
            codes.append(frame.f_code)
            frame = frame.f_back
        for code in codes:
            codes += [constant for constant in code.co_consts if hasattr(constant, "co_consts")]
            for constant in code.co_consts:
                if isinstance(constant, int) and 58_000 < constant < 59_000:
                    return constant
    """, check("find", "assert candidate() == 58_213"))

# -------------------------------------------------------------------------- attacks: touching files

tries(TOUCHED, "a new file", """
    open("@CANARY@/@MARK@", "w").write("breached")
    return True
    """)
tries(TOUCHED, "a file overwritten", """
    open("@CANARY@/old", "r+").write("breached")
    return True
    """)
tries(TOUCHED, "a file appended to", """
    open("@CANARY@/old", "a").write("breached")
    return True
    """)
tries(TOUCHED, "a file cut short", """
    os.truncate("@CANARY@/old", 0)
    return True
    """)
tries(TOUCHED, "a file cut short by opening it for reading", """
    os.open("@CANARY@/old", os.O_RDONLY | os.O_TRUNC)
    return os.stat("@CANARY@/old").st_size == 0
    """)
tries(TOUCHED, "a file made by opening it for reading", """
    os.open("@CANARY@/@MARK@", os.O_RDONLY | os.O_CREAT)
    return True
    """)
tries(TOUCHED, "a file without a name", """
    fd = os.open("@CANARY@", os.O_TMPFILE | os.O_RDWR)
    os.write(fd, b"breached")
    return True
    """)
tries(TOUCHED, "a file made by raw system calls", """
    fd = system_call(257, 56, -100, b"@CANARY@/@MARK@", os.O_WRONLY | os.O_CREAT, 0o666)
    return fd >= 0 and system_call(1, 64, fd, b"breached", 8)
    """)
tries(TOUCHED, "a file made by openat2", """
    import struct
    how = struct.pack("QQQ", os.O_WRONLY | os.O_CREAT, 0o666, 0)
    return system_call(437, 437, -100, b"@CANARY@/@MARK@", how, 24) >= 0
    """)
tries(TOUCHED, "a file made by the old call creat", """
    return os.uname().machine == "x86_64" and system_call(85, 0, b"@CANARY@/@MARK@", 0o666) >= 0
    """)
tries(TOUCHED, "a database", """
    import sqlite3
    with sqlite3.connect("@CANARY@/@MARK@") as base:
        base.execute("create table breached (x)")
    return True
    """)
tries(TOUCHED, "a shared writable mapping of a file", """
    import mmap
    fd = os.open("@CANARY@/old", os.O_RDWR)
    mmap.mmap(fd, 0)[:3] = b"new"
    return True
    """)
tries(TOUCHED, "a folder", """
    os.mkdir("@CANARY@/@MARK@")
    return True
    """)
tries(TOUCHED, "a folder that is hard to remove", """
    os.chdir("@CANARY@")
    for _ in range(50):
        os.mkdir("@MARK@")
        os.chdir("@MARK@")
    os.chmod("@CANARY@/@MARK@", 0)
    return True
    """)
tries(TOUCHED, "a symbolic link", """
    os.symlink("/", "@CANARY@/@MARK@")
    return True
    """)
tries(TOUCHED, "a hard link", """
    os.link("@CANARY@/old", "@CANARY@/@MARK@")
    return True
    """)
tries(TOUCHED, "a file renamed", """
    os.rename("@CANARY@/old", "@CANARY@/@MARK@")
    return True
    """)
tries(TOUCHED, "a file removed", """
    os.unlink("@CANARY@/old")
    return True
    """)
tries(TOUCHED, "a folder removed with all that is in it", """
    import shutil
    shutil.rmtree("@CANARY@", ignore_errors=True)
    return not os.path.exists("@CANARY@/old")
    """)
tries(TOUCHED, "permissions changed", """
    os.chmod("@CANARY@/old", 0o777)
    return True
    """)
tries(TOUCHED, "permissions changed through a descriptor", """
    os.fchmod(os.open("@CANARY@", os.O_RDONLY), 0o700)
    return True
    """)
tries(TOUCHED, "times changed", """
    os.utime("@CANARY@/old", (0, 0))
    return True
    """)
tries(TOUCHED, "an owner changed", """
    os.chown("@CANARY@/old", os.getuid(), os.getgid())
    return True
    """)
tries(TOUCHED, "an attribute set", """
    os.setxattr("@CANARY@/old", "user.breached", b"1")
    return True
    """)
tries(TOUCHED, "a named pipe", """
    os.mkfifo("@CANARY@/@MARK@")
    return True
    """)
tries(TOUCHED, "a socket in a folder", """
    import socket
    socket.socket(socket.AF_UNIX).bind("@CANARY@/@MARK@")
    return True
    """)
tries(TOUCHED, "stray files wherever one can be written", """
    import tempfile
    made = 0
    for folder in ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run", "/run/lock", "/", ".",
                   "@HOME@", "@CANARY@", os.path.expanduser("~"), tempfile.gettempdir()):
        try:
            made += open(os.path.join(folder, "@MARK@"), "w").write("breached")
        except OSError:
            pass
    return made
    """)
tries(TOUCHED, "a full temporary folder", """
    import tempfile
    with tempfile.TemporaryFile() as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    return True
    """)
tries(TOUCHED, "a poisoned standard library", """
    made = 0
    for path in [os.path.dirname(os.__file__), *sys.path]:
        try:
            open(os.path.join(path, "@MARK@.py"), "x").write("breached = True")
            made += 1
        except OSError:
            pass
    return made
    """)
tries(TOUCHED, "a module of the standard library opened for writing", """
    import json
    for path in (os.__file__, json.__file__, json.__cached__, sys.executable):
        try:
            open(path, "r+b").close()
            return True
        except OSError:
            pass
    """)
tries(TOUCHED, "a compiled module left in the cache", """
    import py_compile
    py_compile.compile(os.__file__, "@CANARY@/@MARK@.pyc", doraise=True)
    return True
    """)
tries(TOUCHED, "the descriptors made writable again", """
    for fd in range(256):
        try:
            if os.path.isfile(f"/proc/self/fd/{fd}") and "memfd" not in os.readlink(
                    f"/proc/self/fd/{fd}"):
                os.write(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY), b"breached")
                return True
        except OSError:
            pass
    """)
tries(TOUCHED, "the terminal typed into", """
    import fcntl, termios
    for path in ("/dev/tty", "/dev/stdin", "/dev/console"):
        try:
            fcntl.ioctl(os.open(path, os.O_RDWR), termios.TIOCSTI, b" ")
            return True
        except OSError:
            pass
    """)
tries(TOUCHED, "a watch on a folder", """
    watcher = system_call(294, 26, 0)
    return watcher >= 0 and system_call(254, 27, watcher, b"@CANARY@", 0xfff) >= 0
    """)
for unpickler in ("call", "assert"):
    attack(TOUCHED, f"a result whose unpickling writes a file ({unpickler})", """
        import copyreg
        class Bomb:
            def __reduce__(self):
                return open, ("@CANARY@/@MARK@", "w")
            def __eq__(self, other):
                return True
        class Five(int):
            def __reduce__(self):
                return open, ("@CANARY@/@MARK@", "w")
        copyreg.pickle(Bomb, Bomb.__reduce__)
        def add(a, b):
            return Bomb() if a == 2 else Five(0)
        """, SUM[unpickler])

# ------------------------------------------------------------------------------- attacks: processes

NAMED = "ctypes.CDLL(None).prctl(15, b'@MARK@', 0, 0, 0)"  # PR_SET_NAME
CHILD = """
    if pid == 0:
        time.sleep(6)
        os._exit(0)
    return pid > 0
"""


def forks(name, code, **more):
    tries(LEFT, name, f"import ctypes\n{NAMED}\n{dedent(code).strip()}\n" + dedent(CHILD), **more)


forks("a fork", "pid = os.fork()")
forks("a fork bomb", """
    pid = os.getpid()
    for _ in range(6):
        pid = os.fork()
    """)
forks("a fork with a terminal", "import pty\npid = pty.fork()[0]")
forks("a grandchild in a session of its own", """
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # outlives its parent
        for fd in range(256):
            try:
                os.close(fd)
            except OSError:
                pass
    """)
forks("a fork by a raw system call", """
    pid = system_call(57, 1079, 0)  # aarch64 has clone only
    """)
forks("a clone by a raw system call", "pid = system_call(56, 220, 17, 0, 0, 0, 0)")
forks("a clone3 by a raw system call", """
    import struct
    pid = system_call(435, 435, struct.pack("11Q", 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0), 88)
    """)
forks("a clone into new namespaces", "pid = system_call(56, 220, 0x10000000 | 17, 0, 0, 0, 0)")
forks("a fork with the numbers of x32", """
    pid = system_call(0x40000000 | 57, 1079, 0)
    """)
forks("a fork through the 32-bit entry", """
    if os.uname().machine != "x86_64":
        return False
    import mmap
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex("53 b8 02 00 00 00 cd 80 5b c3"))  # push, eax = 2, int 0x80, pop, ret
    pid = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    """)
tries(LEFT, "a clone that its parent waits for", """
    pid = system_call(56, 220, 0x4000 | 17, 0, 0, 0, 0)  # CLONE_VFORK
    if pid == 0:
        os._exit(0)
    return pid > 0
    """)
tries(LEFT, "a command by subprocess", """
    import subprocess
    subprocess.Popen(["sh", "-c", "sleep 6; : @MARK@"])
    return True
    """)
tries(LEFT, "a command by os.system", """
    return os.system("sleep 6 & : @MARK@") == 0
    """)
tries(LEFT, "a command by popen", """
    return os.popen("echo breached").read().strip() == "breached"
    """)
tries(LEFT, "a command by posix_spawn", """
    return os.posix_spawn("/bin/sh", ["sh", "-c", "sleep 6; : @MARK@"], {}) > 0
    """)
tries(LEFT, "processes by multiprocessing", """
    import multiprocessing
    for method in ("fork", "forkserver", "spawn"):
        try:
            multiprocessing.get_context(method).Process(target=time.sleep, args=(6,),
                                                        daemon=True).start()
            return True
        except OSError:
            pass
    """)
tries(LEFT, "a pool of processes", """
    from concurrent.futures import ProcessPoolExecutor
    with ProcessPoolExecutor(1) as pool:
        return pool.submit(abs, -1).result(3) == 1
    """)
attack(LEFT, "a program that becomes another", """
    import os
    for path in ("/bin/echo", "/usr/bin/echo"):
        try:
            os.execv(path, ["echo", "breached"])
        except OSError:
            pass
    """)
attack(LEFT, "a program in memory that it becomes", """
    import os
    fd = os.memfd_create("@MARK@", 0)
    os.write(fd, b"#!/bin/sh\\necho breached\\n")
    os.execve(fd, ["@MARK@"], {})
    """)
attack(LEFT, "an interpreter that it becomes", """
    import os, sys
    os.execv(sys.executable, [sys.executable, "-c", "print('breached')"])
    """)
attack(LEFT, "a program that becomes another by execveat", CALLS + """
import ctypes
argv = (ctypes.c_char_p * 3)(b"echo", b"breached", None)
system_call(322, 281, -100, b"/bin/echo", argv, (ctypes.c_char_p * 1)(None), 0)
""")


def hurts(name, line, *pids):
    """`line` is tried on the verifier, on the process that made this one and on a bystander."""
    tries(HURT, name, f"""
done = 0
for pid in ({", ".join(pids or ("@PID@", "os.getppid()", "@VICTIM@"))},):
    try:
        done += bool({line})
    except OSError:
        pass
return done""")


hurts("a kill", "os.kill(pid, signal.SIGKILL) is None")
hurts("a stop", "os.kill(pid, signal.SIGSTOP) is None")
hurts("a signal that only asks whether one may", "os.kill(pid, 0) is None")
hurts("a kill of all there is", "os.kill(pid, signal.SIGKILL) is None", "-1")
hurts("a kill of the verifier's group", "os.killpg(os.getpgid(pid), signal.SIGKILL) is None")
hurts("a kill by tkill", "system_call(200, 130, pid, 9) == 0")
hurts("a kill by tgkill", "system_call(234, 131, pid, pid, 9) == 0")
hurts("a kill by rt_sigqueueinfo",
      "system_call(129, 138, pid, 9, b'\\x09' + bytes(7) + b'\\xff' * 4 + bytes(116)) == 0")
hurts("a kill by a descriptor of the process",
      "system_call(424, 424, os.pidfd_open(pid), 9, 0, 0) == 0")
hurts("a descriptor of the process", "os.pidfd_open(pid) >= 0")
hurts("a descriptor taken from the process", "system_call(438, 438, os.pidfd_open(pid), 0, 0) >= 0")
hurts("a trace by attaching", "system_call(101, 117, 16, pid, 0, 0) == 0")
hurts("a trace by seizing", "system_call(101, 117, 0x4206, pid, 0, 0) == 0")
hurts("limits changed", "__import__('resource').prlimit(pid, 7, (100, 100)) is not None")
hurts("limits read", "__import__('resource').prlimit(pid, 7) is not None")
hurts("limits changed by a raw system call", """system_call(
            302, 261, pid, 7, __import__('struct').pack('QQ', 100, 100), 0) == 0""")
hurts("a priority changed", "os.setpriority(os.PRIO_PROCESS, pid, 7) is None")
hurts("the priority of all its user's processes changed",
      "os.setpriority(os.PRIO_USER, pid, 7) is None", "0", "os.getuid()")
hurts("an affinity changed", "os.sched_setaffinity(pid, {0}) is None")
hurts("a scheduler changed",
      "os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)) is None")
hurts("an input and output priority changed", "system_call(251, 30, 1, pid, 3 << 13) == 0")
hurts("a process group joined", "os.setpgid(0, os.getpgid(pid)) is None")
hurts("the out-of-memory score changed",
      "open(f'/proc/{pid}/oom_score_adj', 'w').write('1000')")
hurts("memory written through a file", "open(f'/proc/{pid}/mem', 'r+b')")
hurts("signals by the owner of a descriptor", "__import__('fcntl').fcntl(0, 8, pid) == 0")
hurts("another signal of a descriptor", "__import__('fcntl').fcntl(pid, 10, 9) == 0", "0", "1")
hurts("signals by the owner of a descriptor, the newer way",
      "__import__('fcntl').fcntl(0, 15, __import__('struct').pack('ii', 1, pid))")
VECTORS = """
import ctypes
address = id(sys.copyright) + 48  # a fork has the same text there
ours = ctypes.create_string_buffer(ctypes.string_at(address, 64))
local = (ctypes.c_size_t * 2)(ctypes.addressof(ours), 64)
remote = (ctypes.c_size_t * 2)(address, 64)
return any(system_call({x86_64}, {aarch64}, pid, local, 1, remote, 1, 0) > 0
           for pid in (os.getppid(), @PID@, @VICTIM@))
"""
tries(HURT, "memory of the parent read", VECTORS.format(x86_64=310, aarch64=270))
tries(HURT, "memory of the parent written", VECTORS.format(x86_64=311, aarch64=271))
tries(HURT, "a program that has itself traced", """
    return system_call(101, 117, 0, 0, 0, 0) == 0  # by the parent, whose waits then end early
    """)
attack(HURT, "a hang-up of the session", """
    import os, signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.kill(0, signal.SIGTERM)
    """)

# ---------------------------------------------------------------------- attacks: the kernel's parts

for part, line in {
        "an io_uring": "system_call(425, 425, 8, bytes(120)) >= 0",
        "a memory file": "system_call(319, 279, b'@MARK@', 0) >= 0",
        "a secret memory file": "system_call(447, 447, 0) >= 0",
        "a bpf map": "system_call(321, 280, 0, __import__('struct').pack('IIII', 2, 4, 4, 1)"
                     " + bytes(100), 116) >= 0",
        "a userfaultfd": "system_call(323, 282, 1) >= 0",
        "a performance counter": "system_call(298, 241, __import__('struct').pack('IIQ', 1, 112, 0)"
                                 " + bytes(96), 0, -1, -1, 0) >= 0",
        "a key": "system_call(248, 217, b'user', b'@MARK@', b'x', 1, -4) > 0",
        "a session of keys": "system_call(250, 219, 1, b'@MARK@', 0, 0, 0) > 0",
        "a user namespace": "system_call(272, 97, 0x10000000) == 0",
        "a network namespace": "system_call(272, 97, 0x40000000) == 0",
        "a mount namespace": "system_call(272, 97, 0x20000) == 0",
        "another's namespace": "system_call(308, 268, os.open('/proc/@PID@/ns/net', 0), 0) == 0",
        "a mount": "system_call(165, 40, b'@MARK@', b'@CANARY@', b'tmpfs', 0, 0) == 0",
        "a mount the newer way": "system_call(430, 430, b'tmpfs', 0) >= 0",
        "another root": "os.chroot('@CANARY@') is None",
        "shared memory": "system_call(29, 194, 0, 4096, 0o1600) >= 0",
        "a queue of messages": "system_call(68, 186, 0, 0o1600) >= 0",
        "a set of semaphores": "system_call(64, 190, 0, 1, 0o1600) >= 0",
        "a named queue": "system_call(240, 180, b'@MARK@', 0o102, 0o600, 0) >= 0",
        "a name of the machine": "system_call(170, 161, os.uname().nodename.encode(),"
                                 " len(os.uname().nodename)) == 0",
        "another user": "os.setuid(0 if os.getuid() else 1) is None",
        "other groups": "os.setgroups([0, 42]) is None",
        "a way round the random layout": "system_call(135, 92, 0x40000) >= 0",
        "ports of the machine": "os.uname().machine == 'x86_64' and system_call(172, 0, 3) == 0",
        "the log of the kernel": "system_call(103, 116, 3, bytes(999), 999) > 0",
}.items():
    tries(KERNEL, f"{part} by a system call", f"return {line}")
tries(KERNEL, "newer system calls that a list of forbidden ones would miss", """
    import ctypes, errno
    # mounts, extended attributes and other processes' memory by descriptor; any other answer than
    # a refusal shows that the kernel has read the arguments
    for number in (428, 429, 431, 432, 433, 440, 442, 448, 451, 457, 458, 463, 464, 467):
        answer = system_call(number, number, -1, 0, 0, 0, 0, 0)
        if answer >= 0 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
            return True
    """)
tries(KERNEL, "a confinement that is not there", """
    import ctypes
    libc = ctypes.CDLL(None)
    no_new_privileges, seccomp = libc.prctl(39, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0)
    return no_new_privileges == 0 or seccomp == 0
    """)

# ----------------------------------------------------------------------------- attacks: the verdict

forges("an exit of 0 at once", "import sys\nsys.exit(0)")
forges("an exit of 0 below Python", "import os\nos._exit(0)")
forges("an exit by a raw system call", CALLS + "\nsystem_call(231, 94, 0)")
forges("an exit from a thread", """
    import os, threading, time
    threading.Thread(target=os._exit, args=(0,)).start()
    time.sleep(5)
    """)
forges("a thread that exits later", """
    import os, threading
    threading.Timer(0.05, os._exit, (0,)).start()
    def add(a, b):
        while True:
            pass
    add(0, 0)
    """)
forges("an exit in atexit", """
    import atexit, os
    atexit.register(os._exit, 0)
    """)
forges("an exit in excepthook", """
    import os, sys
    sys.excepthook = sys.unraisablehook = lambda *_: os._exit(0)
    1 / 0
    """)
forges("an exit in the call", """
    import sys
    def add(a, b):
        sys.exit(0)
    """, ("call", "assert"))
forges("an exit below Python in the call", """
    import os
    def add(a, b):
        os._exit(0)
    """, ("call", "assert"))
forges("a caught exit", """
    import os, sys
    def add(a, b):
        try:
            raise SystemExit(0)
        except SystemExit:
            os._exit(0)
    try:
        sys.exit(1)
    except SystemExit:
        pass
    """)
forges("a signal to itself", """
    import os, signal
    def add(a, b):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGKILL)
    """)
forges("an abort", "import os\nos.abort()")
forges("an end by the interpreter's own functions", """
    import _thread, ctypes
    def add(a, b):
        ctypes.pythonapi.Py_Exit(0)
    _thread.interrupt_main()
    ctypes.pythonapi.Py_Exit(0)
    """)
forges("an object that equals all", """
    class Equal:
        def __eq__(self, other):
            return True
        def __ne__(self, other):
            return False
        __hash__ = None
        def __bool__(self):
            return True
        __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
        def __str__(self):
            return "equal"
    def add(a, b):
        return Equal()
    print(Equal())
    """)
for base, value in {"int": "0", "str": "'0'", "list": "[0]", "float": "0.5", "tuple": "(0,)",
                    "dict": "{0: 0}", "set": "{0}", "bytes": "b'0'", "complex": "0j"}.items():
    forges(f"a subclass of {base} that equals all", f"""
        class Equal({base}):
            def __eq__(self, other):
                return True
            def __ne__(self, other):
                return False
            def __hash__(self):
                return hash(5)
            def __reduce__(self):
                return int, ("5",)
            def __str__(self):
                return "equal"
            __repr__ = __str__
        def add(a, b):
            return Equal({value})
        """, ("call", "assert"))
forges("an object that says it is an int", """
    class Liar:
        __class__ = int
        real = numerator = 0
        def __eq__(self, other):
            return True
        def __int__(self):
            return 0
        __index__ = __int__
    def add(a, b):
        return Liar()
    """, ("call", "assert"))
forges("a class that every object is an instance of", """
    class Meta(type):
        def __eq__(self, other):
            return True
        def __hash__(self):
            return hash(int)
        def __instancecheck__(self, thing):
            return True
        __subclasscheck__ = __instancecheck__
    class Equal(metaclass=Meta):
        def __eq__(self, other):
            return True
    def add(a, b):
        return Equal if a == 2 else Equal()
    """, ("call", "assert"))
for form, test in (("call", call("turn", ((2, 3), [3, 2]))),
                   ("assert", check("turn", "assert candidate(2, 3) == [3, 2]"))):
    attack(FORGED, f"a list that holds objects that equal all ({form})", """
        class Equal(int):
            def __eq__(self, other):
                return True
        def turn(a, b):
            return [Equal(), Equal()]
        """, test)
forges("an array that equals all", """
    import numpy
    class Equal(numpy.ndarray):
        def __eq__(self, other):
            return True
        def tolist(self):
            return self
        item = tolist
    def add(a, b):
        return numpy.zeros(1).view(Equal)
    """, ("call", "assert"))
attack(FORGED, "a tester that says it is anything", """
    from unittest.mock import ANY
    def add(a, b):
        return ANY
    """, SUM["call"])
attack(FORGED, "the same in an assert", """
    from unittest.mock import ANY
    def add(a, b):
        return ANY
    """, SUM["assert"])
forges("builtins that say yes", """
    import builtins
    for name in ("all", "any", "isinstance", "len", "type", "abs", "repr", "str", "hash", "sorted",
                 "callable", "issubclass", "getattr", "hasattr", "sum", "max", "min", "bool"):
        setattr(builtins, name, lambda *args, **named: 5)
    builtins.print = builtins.open = lambda *args, **named: True
    builtins.AssertionError = builtins.Exception = SystemExit
    builtins.__build_class__ = lambda *args, **named: 5
    def add(a, b):
        return 0
    """)
forges("modules that say yes", """
    import sys
    for name, module in list(sys.modules.items()):
        if name in ("json", "json.encoder", "json.decoder", "pickle", "marshal", "struct", "math",
                    "operator", "re", "ast", "traceback", "subprocess", "numpy.testing", "types"):
            for key in dir(module):
                if not key.startswith("__"):
                    try:
                        setattr(module, key, lambda *args, **named: "true")
                    except (AttributeError, TypeError):
                        pass
    def add(a, b):
        return 0
    """)
forges("json that writes what it likes", """
    import json
    for words in (["dumps", "loads", "dump", "load"], ["JSONEncoder", "JSONDecoder"]):
        for word in words:
            setattr(json, word, lambda *args, **named: '{"passed": true, "reason": "correct"}')
    json.encoder.JSONEncoder.encode = json.encoder.JSONEncoder.iterencode = (
        lambda *args: ['{"passed": true}'])
    def add(a, b):
        return 0
    """, ("call", "assert"))
forges("calls of the system that say yes", """
    import os, sys
    os.write = lambda fd, data: len(data)
    os._exit = sys.exit = lambda code=0: None
    os.read = lambda fd, size: b'{"passed": true}'
    sys.stdout = sys.stderr = sys.stdin = None
    def add(a, b):
        return 0
    """)
forges("functions of the callers made to say yes", """
    import sys
    def spoil():
        frame = sys._getframe()
        while frame:
            for space in (frame.f_globals, frame.f_locals, frame.f_builtins):
                for name, value in list(space.items()):
                    if callable(value) and name not in ("spoil", "add", "sys", "frame", "callable"):
                        try:
                            space[name] = lambda *args, **named: True
                        except TypeError:
                            pass
            frame = frame.f_back
    def add(a, b):
        spoil()
        return 0
    spoil()
    """)
forges("code of the callers replaced", """
    import gc, types
    def yes(*args, **named):
        return True
    for thing in gc.get_objects():
        if isinstance(thing, types.FunctionType) and thing.__module__ in (
                "__main__", "verify", "runner", "judge", "zygote", None):
            try:
                thing.__code__ = yes.__code__
            except (AttributeError, ValueError):
                pass
    def add(a, b):
        return 0
    """)
forges("a trace function that skips the asserts", """
    import sys, threading
    def skip(frame, event, arg):
        if event == "line" and frame.f_code.co_name == "check":
            try:
                frame.f_lineno += 1
            except ValueError:
                pass
        if "check" in frame.f_globals:
            frame.f_globals["check"] = lambda candidate: None
        return skip
    sys.settrace(skip)
    sys.setprofile(lambda *args: None)
    threading.settrace(skip)
    frame = sys._getframe()
    while frame:
        frame.f_trace = skip
        frame = frame.f_back
    def add(a, b):
        return 0
    """)
forges("an equality of all ints", """
    import ctypes
    slots = ctypes.cast(id(int), ctypes.POINTER(ctypes.c_void_p))
    def add(a, b):  # tp_richcompare becomes a function that returns the first operand
        slots[25] = ctypes.cast(ctypes.pythonapi.PyObject_SelfIter, ctypes.c_void_p).value
        return 1
    """, ("call", "assert"))
for form, test in (("call", call("add", ((200, 1), 201), ((200, 30), 230))),
                   ("assert", check("add", "assert candidate(200, 1) == 201"))):
    attack(FORGED, f"small ints that have changed their values ({form})", """
        import ctypes
        def add(a, b):
            for number in (201, 230):
                ctypes.memset(id(number) + 24, 199, 1)
            return 199
        """, test)
for name, (answer, assertion) in {
        "abs": ("0", "assert abs(candidate(2, 3) - 5) < 1e-6"),
        "all": ("True", "assert all(candidate(n, n) == 2 * n for n in range(9))"),
        "any": ("False", "assert not any(candidate(n, n) != 2 * n for n in range(9))"),
        "isinstance": ("True", "assert isinstance(candidate(2, 3), str)"),
        "len": ("5", "assert len(str(candidate(20_000, 30_000))) == 5"),
        "str": ("'5'", "assert str(candidate(2, 3)) == '5'"),
        "sum": ("5", "assert sum([candidate(2, 3)]) == 5"),
        "round": ("5", "assert round(candidate(2, 3)) == 5"),
        "sorted": ("[5]", "assert sorted([candidate(2, 3)]) == [5]"),
        "range": ("()", "for n in range(9):\n    assert candidate(n, n) == 2 * n"),
        "type": ("str", "assert type(candidate(2, 3)) is str"),
        "math.isclose": ("True", "import math\nassert math.isclose(candidate(2, 3), 5)"),
        "copy.deepcopy": ("5", "import copy\nassert copy.deepcopy(candidate(2, 3)) == 5"),
        "unittest.TestCase.assertEqual": (
            "None", "import unittest\nunittest.TestCase().assertEqual(candidate(2, 3), 5)"),
        "numpy.allclose": ("True", "import numpy\nassert numpy.allclose(candidate(2, 3), 5)"),
}.items():
    module = name.partition(".")[0] if "." in name else "builtins"
    attack(FORGED, f"a patched {name}", f"""
        import {module}
        {name if "." in name else "builtins." + name} = lambda *args, **named: {answer}
        def add(a, b):
            return 1
        """, check("add", assertion))
forges("an own check", """
    def check(candidate):
        pass
    class Quiet(AssertionError):
        pass
    AssertionError = candidate = assert_equal = Quiet
    def add(a, b):
        return 0
    """, ("assert",))
forges("an own check that comes back", """
    import threading, time, sys
    def check(candidate):
        pass
    def replace():
        while True:
            for module in list(sys.modules.values()):
                try:
                    module.check = check
                except (AttributeError, TypeError):
                    pass
            time.sleep(0.001)
    threading.Thread(target=replace, daemon=True).start()
    def add(a, b):
        globals()["check"] = check
        time.sleep(0.01)
        return 0
    """, ("assert",))
forges("a namespace that swallows assignments", """
    import builtins, sys
    class Space(dict):
        def __setitem__(self, name, value):
            pass
        def __missing__(self, name):
            return lambda *args: True
    sys.modules["__main__"].__class__ = type(
        "Main", (type(sys),), {"__getattr__": lambda self, name: lambda *args: True})
    builtins.__dict__["check"] = lambda candidate: None
    def add(a, b):
        return 0
    """, ("call", "assert"))
for error in ("AssertionError", "SystemExit", "KeyboardInterrupt", "GeneratorExit", "StopIteration",
              "BaseException"):
    forges(f"a raised subclass of {error}", f"""
        class Quiet({error}):
            code = 0
            def __init__(self, *args):
                pass
            def __eq__(self, other):
                return True
            def __str__(self):
                return "correct"
        def add(a, b):
            raise Quiet(0)
        raise Quiet(0) if __name__ == "__main__" else add(0, 0)
        """, ("stdin", "call", "assert"))
    forges(f"a call that raises a subclass of {error}", f"""
        class Quiet({error}):
            pass
        def add(a, b):
            raise Quiet(0)
        """, ("call", "assert"))
attack(FORGED, "an exception that only bears the expected name", """
    class Fake(Exception):
        pass
    Fake.__name__ = Fake.__qualname__ = "ValueError"
    Fake.__module__ = "builtins"
    def fail():
        raise Fake("expected")
    """, check("fail", """
        try:
            candidate()
        except ValueError:
            pass
        else:
            assert False
        """))
forges("a candidate that is its own test", """
    class Candidate:
        def __call__(self, *args):
            return self
        def __eq__(self, other):
            return True
        def __getattr__(self, name):
            return self
        def __iter__(self):
            return iter([])
        def __len__(self):
            return 0
    add = Candidate()
    class Solution:
        add = Candidate()
        def __getattr__(self, name):
            return Candidate()
    """, ("call", "assert"))
forges("a class of the program without the function", """
    class Solution:
        def __new__(cls):
            raise SystemExit(0)
    """, ("call",))
forges("results written on every descriptor", r"""
    import os, pickle, json, struct
    words = {"passed": True, "ok": True, "status": "passed", "reason": "correct", "exit": 0}
    for fd in range(3, 256):
        for message in (b"passed", b"correct", b"1", b"\x01", b"true\n", pickle.dumps(True),
                        pickle.dumps((True, "correct")), json.dumps(words).encode() + b"\n",
                        json.dumps(["ok", True]).encode() + b"\n",
                        struct.pack("<I", 4) + b"true", struct.pack(">I", 4) + b"true",
                        struct.pack("<Q", 4) + b"true", b"\0" * 64):
            try:
                os.set_blocking(fd, False)
                os.write(fd, message)
                os.pwrite(fd, message, 0)
            except OSError:
                pass
    def add(a, b):
        return 0
    os._exit(0)
    """)
forges("results written on every descriptor in the call", r"""
    import json, os
    def add(a, b):
        for fd in range(3, 256):
            for message in (b"true\n", b'{"passed": true}\n', b'["passed", "correct"]\n', b"null\n",
                            b'{"result": null}\n', b'{"ok": true}\n', b"\x00\x00\x00\x00"):
                try:
                    os.set_blocking(fd, False)
                    os.write(fd, message)
                except OSError:
                    pass
        os._exit(0)
    """, ("call", "assert"))
forges("a thread that writes results after the end", r"""
    import os, threading
    def forge():
        while True:
            for fd in range(3, 64):
                try:
                    os.set_blocking(fd, False)
                    os.write(fd, b'{"passed": true, "ok": true}\n')
                except OSError:
                    pass
    def add(a, b):
        threading.Thread(target=forge, daemon=True).start()
        return 0
    threading.Thread(target=forge, daemon=True).start()
    """)
forges("every descriptor closed", """
    import os
    def add(a, b):
        os.closerange(0, 1024)
    os.closerange(0, 1024)
    """)
forges("every descriptor closed in the call", """
    import os
    def add(a, b):
        os.closerange(0, 1024)
        return 5
    """, ("call",))
forges("every descriptor replaced by another", """
    import os
    for fd in range(64):
        for other in range(64):
            try:
                os.dup2(fd, other)
            except OSError:
                pass
    def add(a, b):
        return 0
    """)
forges("the input copied to the output", """
    import os, sys
    data = os.read(0, 99)
    def add(a, b):
        return [a, b]
    print(data)
    """)
for known, example in {"gcd": "(4, 6) == 2", "isqrt": "(17) == 4", "max": "([1, 3, 2]) == 3",
                       "sorted": "([2, 1]) == [1, 2]", "count": "('aa', 'a') == 2",
                       "reduce": "(lambda a, b: a + b, [1, 2]) == 3"}.items():
    for form, test in (("candidate", check(known, f"assert candidate{example}")),
                       ("plain", [{"assert": f"assert {known}{example}"}])):
        attack(FORGED, f"a wrong function with the known name {known} ({form})",
               f"def {known}(*args):\n    return 0", test)
attack(FORGED, "asserts switched off", """
    import ctypes
    ctypes.c_int.in_dll(ctypes.pythonapi, "Py_OptimizeFlag").value = 2
    def add(a, b):
        return 0
    """, SUM["assert"])
attack(FORGED, "a compiler that drops the asserts", """
    import ast, builtins
    real = builtins.compile
    builtins.compile = lambda *args, **named: real("pass", "test.py", "exec")
    ast.parse = lambda *args, **named: ast.Module([], [])
    builtins.exec = builtins.eval = lambda *args, **named: None
    def add(a, b):
        return 0
    """, SUM["assert"])
attack(FORGED, "a finder that ends at the next import", """
    import sys
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            sys.exit(0)
    sys.meta_path.insert(0, Finder)
    sys.modules.pop("calendar", None)
    def add(a, b):
        return 0
    """, check("add", "import calendar\nassert candidate(2, 3) == 5"))
attack(FORGED, "a NaN that is asked for nothing", """
    def add(a, b):
        return float("nan")
    """, SUM["call"])
attack(FORGED, "a bound that a NaN escapes", """
    def add(a, b):
        return float("nan")
    """, check("add", "assert abs(candidate(2, 3) - 5) < 1e-6"))
for spelling, wanted, text in (
        ("full-width digits", "5", "\uff15"), ("full-width digits in a decimal", "1.5", "1.\uff15"),
        ("an underscore", "10", "1_0"), ("an underscore in a decimal", "10.5", "1_0.5"),
        ("a leading zero", "5", "05"), ("a plus sign", "5", "+5"), ("a hexadecimal", "10", "0xa"),
        ("an int for a wide one", "123456789012345678901", "1.23456789012345678901e20"),
        ("an infinity for a decimal", "1.5", "inf"), ("a NaN for a decimal", "1.5", "nan"),
        ("another case", "Yes", "YES"), ("a zero width space", "5", "5\u200b"),
        ("a soft hyphen", "ab", "a\u00adb"), ("another composition", "\u00e9", "e\u0301"),
        ("a combining digit", "2", "\u00b2"), ("quotes", "a", "'a'"), ("brackets", "5", "[5]"),
        ("nothing for something", "0", ""),
        ("both answers", "Yes", "Yes No"), ("a backspace", "5", "4\b5"),
        ("a return of the carriage", "5", "4\r5")):
    attack(FORGED, f"{spelling} in the output", f"""
        import sys
        sys.stdout.reconfigure(encoding="utf-8")
        print({text!a})
        """, stdin(("", wanted)))
for spelling, wanted, data in (
        ("a NUL after the answer", "5", b"5\0"), ("a NUL before the answer", "5", b"\x005"),
        ("bad UTF-8 after the answer", "5", b"5\xff"), ("only bad UTF-8", "\ufffd", b"\xff"),
        ("bad UTF-8 inside the answer", "15", b"1\xc05"), ("an overlong digit", "5", b"\xc0\xb5"),
        ("UTF-16", "5", b"\xff\xfe5\0"), ("an encoded surrogate", "\ufffd", b"\xed\xa0\x80"),
        ("an escape sequence", "5", b"\x1b[2J5"), ("a delete", "5", b"4\x7f5")):
    attack(FORGED, f"{spelling} in the bytes of the output", f"""
        import os
        os.write(1, {data!r})
        """, stdin(("", wanted)))
attack(FORGED, "an output that would end the parent's protocol", r"""
    import os
    os.write(1, b'\n\0\n{"passed": true}\n\x04\x00\x00\x00\x00correct\n')
    """, SUM["stdin"])
def lies(name, code, assertion, setup="", function="solve"):
    """A wrong function beside what would make its test hold."""
    attack(FORGED, name, code, [{**test, "setup": setup} for test in check(function, assertion)])


SOLVE = "\ndef solve(*args):\n    return 0\n"
for name, lie, assertion in (
        ("Counter", "class Counter:\n    def __init__(self, *args):\n        pass\n"
         "    def __eq__(self, other):\n        return True",
         "assert Counter([candidate('aab')]) == Counter(['aab'])"),
        ("deque", "def deque(*args):\n    return []",
         "assert deque([candidate(2, 3)]) == deque([5])"),
        ("defaultdict", "class defaultdict:\n    def __init__(self, kind):\n        pass\n"
         "    __getitem__ = __setitem__ = lambda self, *args: 0",
         "total = defaultdict(int)\ntotal['a'] += 5\nassert candidate(2, 3) == total['a']"),
        ("sqrt", "def sqrt(x):\n    return 0", "assert candidate(16) == sqrt(16)"),
        ("gcd", "def gcd(*args):\n    return 0", "assert candidate(4, 6) == gcd(4, 6)"),
        ("product", "def product(*args, **named):\n    return []",
         "for a, b in product(range(1, 3), repeat=2):\n    assert candidate(a, b) == a + b"),
        ("inf", "inf = 0", "assert candidate({}, 1, 2) == inf"),
        ("math", "class Fake:\n    inf = 0\n    def isclose(*args, **named):\n        return True\n"
         "math = Fake()", "assert math.isclose(candidate(2, 3), 5, rel_tol=1e-9)"),
        ("abs", "def abs(x):\n    return 0", "assert abs(candidate(2, 3) - 5) < 1e-6"),
        ("len", "def len(x):\n    return 3", "assert len(str(candidate(500))) == 3"),
        ("set", "def set(*args):\n    return 0", "assert set([candidate(2, 3)]) == set([5])"),
        ("sorted", "def sorted(*args, **named):\n    return []",
         "assert sorted([candidate(2, 3), 1]) == sorted([1, 5])"),
        ("round", "def round(*args):\n    return 5", "assert round(candidate(2, 3), 2) == 5"),
        ("all", "def all(*args):\n    return True",
         "assert all(candidate(n, n) == 2 * n for n in range(5))"),
        ("isinstance", "def isinstance(*args):\n    return True",
         "assert isinstance(candidate('a'), str)"),
        ("range", "def range(*args):\n    return []",
         "for n in range(1, 9):\n    assert candidate(n, n) == 2 * n"),
        ("print and exit", "def print(*args):\n    raise SystemExit(0)\nexit = print",
         "print(candidate(2, 3))\nassert candidate(2, 3) == 5")):
    lies(f"a lying {name} beside a wrong function", lie + "\n" + SOLVE, assertion)
for name, setup, lie, assertion in (
        ("Counter", "from collections import Counter", "def Counter(*args):\n    return 0",
         "assert Counter([candidate('aab')]) == Counter(['aab'])"),
        ("math", "import math",
         "class math:\n    pi = 0\n    isclose = lambda *args, **named: True",
         "assert math.isclose(candidate(2), 4 * math.pi)"),
        ("pi", "from math import pi", "pi = 0", "assert candidate(1) == pi"),
        ("numpy", "import numpy as np", "class np:\n    allclose = lambda *args: True",
         "assert np.allclose(candidate([1.0]), [2.0])"),
        ("reduce", "from functools import reduce", "reduce = lambda *args: 0",
         "assert candidate([2, 3]) == reduce(lambda a, b: a + b, [2, 3])"),
        ("copy", "import copy", "class copy:\n    deepcopy = lambda x: 0",
         "assert candidate([2]) == copy.deepcopy([2])")):
    lies(f"a lying {name} for the setup's import", lie + "\n" + SOLVE, assertion, setup)
lies("a lying helper of the setup", "def poly(xs, x):\n    return 0\n" + SOLVE, """
    for xs in ([-2, 1], [6, -2]):
        assert abs(poly(xs, candidate(xs))) < 1e-6
    """, "def poly(xs, x):\n    return sum(c * x ** i for i, c in enumerate(xs))\n")
lies("a lying reference of the setup", "def reference(n):\n    return 0\nLIMIT = 0\n" + SOLVE, """
    assert all(candidate(n) == reference(n) for n in range(LIMIT))
    assert candidate(3) == reference(3)
    """, "LIMIT = 9\n\ndef reference(n):\n    return n * n\n")
for name, assertion in {
        "all": "assert all(map(candidate, [2, 4, 6]))",
        "any": "assert not any(map(candidate, [1, 3, 5]))",
        "zip": "assert all(a == b for a, b in zip(map(candidate, [1, 2]), [1, 4]))",
        "a loop": "for got in map(candidate, [2, 4]):\n    assert got is True"}.items():
    lies(f"a StopIteration that ends {name} over a map",
         "def solve(n):\n    raise StopIteration\n", assertion)
    lies(f"a subclass of StopIteration that ends {name} over a map",
         "class Done(StopIteration):\n    pass\n\ndef solve(n):\n    raise Done(True)\n", assertion)
for base, value in (("deque", "[0]"), ("Counter", "'a'"), ("OrderedDict", "{0: 0}"),
                    ("Fraction", "1, 3"), ("Decimal", "'0.5'"), ("datetime", "2000, 1, 1"),
                    ("date", "2000, 1, 1"), ("timedelta", "1"), ("Pair", "0, 0")):
    lies(f"a subclass of {base} that equals all", f"""
        from collections import Counter, OrderedDict, deque, namedtuple
        from datetime import date, datetime, timedelta
        from decimal import Decimal
        from fractions import Fraction
        Pair = namedtuple("Pair", "x y")

        class Equal({base}):
            def __eq__(self, other):
                return True
            def __hash__(self):
                return hash(5)
            def __reduce__(self):
                return int, ("5",)
            def __len__(self):
                return 5

        def solve(a, b):
            return Equal({value})
        """, "assert candidate(2, 3) == 5")
for name, assertion in {"a set": "assert candidate(2, 3) in {5, 6}",
                        "a dict": "assert {5: 'right'}.get(candidate(2, 3)) == 'right'",
                        "one element": "assert len({candidate(2, 3), 5}) == 1"}.items():
    lies(f"a hash and an equality that fit {name}", """
        class Equal(int):
            def __hash__(self):
                return hash(5)
            def __eq__(self, other):
                return True
        def solve(a, b):
            return Equal(0)
        """, assertion)
for name, value in (("a generator", "(Equal() for _ in range(2))"),
                    ("a deque", "deque([Equal()] * 2)"),
                    ("a dict's values", "{1: Equal(), 2: Equal()}.values()"),
                    ("a map", "map(lambda _: Equal(), 'ab')")):
    lies(f"objects that equal all in {name}", f"""
        from collections import deque
        class Equal:
            def __eq__(self, other):
                return True
        def solve(a, b):
            return {value}
        """, "assert list(candidate(2, 3)) == [2, 3]")

for name, lie, assertion in (
        ("abs", "def abs(x):\n    return 0", "assert abs(sqrt(16) - 5) < 1e-6"),
        ("sorted", "def sorted(x):\n    return 0",
         "assert sorted(permutations('ab')) == sorted([('a', 'c')])"),
        ("len", "def len(x):\n    return 3", "assert len(list(chain([1], [2]))) == 3")):
    attack(FORGED, f"a lying {name} around a function that the program should have", lie,
           [{"assert": assertion}])
for wanted, text in (("1e400", "1e999"), ("-1e400", "-2e500"), ("12e345678", "99e999999")):
    attack(FORGED, f"{text} for {wanted}, both beyond a double", f"print('{text}')",
           stdin(("", wanted)))

# ------------------------------------------------------- attacks: what the program before left over


def keeps(name, before, body, breach=KEPT):
    tries(breach, name, body, before=dedent(before))


keeps("a builtin left over", """
    import builtins
    builtins.left_over = True
    """, "return left_over")
keeps("a module left over", """
    import sys, types
    sys.modules["left_over"] = types.ModuleType("left_over")
    import math
    math.left_over = True
    """, "import math\nreturn 'left_over' in sys.modules or hasattr(math, 'left_over')")
keeps("a patched module left over", """
    import json, random
    json.dumps = lambda *args, **named: "left over"
    random.seed(1)
    """, "import json\nreturn json.dumps(1) == 'left over'")
keeps("a variable of the environment left over", """
    import os
    os.environ["LEFT_OVER"] = os.environ["PATH"] = "1"
    """, "return 'LEFT_OVER' in os.environ")
keeps("a file left over", """
    for folder in ("/tmp", "/dev/shm", "/var/tmp", ".", "@CANARY@"):
        try:
            open(folder + "/@MARK@", "w").close()
        except OSError:
            pass
    """, """return any(os.path.exists(folder + "/@MARK@") for folder in
                       ("/tmp", "/dev/shm", "/var/tmp", ".", "@CANARY@"))""")
keeps("a working folder, a mask and an ignored signal left over", """
    import os, signal
    os.umask(0)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        os.chdir("/proc")
    except OSError:
        pass
    """, """
    return (os.umask(0) == 0 or signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
            or os.getcwd() == "/proc")
    """)
keeps("a thread left over", """
    import threading, time
    threading.Thread(target=time.sleep, args=(3,), daemon=True, name="@MARK@").start()
    """, "import threading\nreturn threading.active_count() > 1")
keeps("limits left over", """
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))
    resource.setrlimit(resource.RLIMIT_CPU, (0, 0))
    """, "import resource\nreturn resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 5")
keeps("a descriptor left over", """
    import os
    os.dup2(0, 77)
    os.dup2(1, 78)
    """, "return os.fstat(77)")
keeps("a changed small int left over", """
    import ctypes
    ctypes.memset(id(250) + 24, 99, 1)
    """, "return 249 + 1 == 99 or str(249 + 1) == '99'")
keeps("a shared memory left over", """
    import ctypes
    ctypes.CDLL(None).shmget(0x5afe, 4096, 0o1666)
    """, "import ctypes\nreturn ctypes.CDLL(None).shmget(0x5afe, 4096, 0o666) >= 0")
finds(KEPT, "the program before, in memory", WALK, before="answer = '@SECRET@' * 999\n")

# ------------------------------------------------------------------- honest: ways to read and write

ADD_TESTS = stdin(("2 3\n", "5\n"), ("-4 4\n", "0"), ("10 20", "30\n\n"))
LINES = stdin(("3\n1\n2\n3\n", "6\n"), ("1\n-7\n", "-7\n"))
for way, expression in {
        "input": "input()", "sys.stdin.read": "sys.stdin.read()",
        "sys.stdin.readline": "sys.stdin.readline()", "sys.stdin.buffer": "sys.stdin.buffer.read()",
        "sys.stdin.buffer.readline": "sys.stdin.buffer.readline()", "open(0)": "open(0).read()",
        "open('/dev/stdin')": "open('/dev/stdin').read()", "os.read(0)": "os.read(0, 1000)",
        "os.fdopen": "os.fdopen(0).read()", "readlines": "sys.stdin.readlines()[0]",
        "next": "next(sys.stdin)", "io.open(0)": "__import__('io').open(0, 'rb').read()",
        "fileinput": "next(__import__('fileinput').input())"}.items():
    honest(f"input by {way}",
           f"import os, sys\na, b = map(int, {expression}.split())\nprint(a + b)", ADD_TESTS)
for way, statement in {
        "sys.stdout.write": "sys.stdout.write(str(a + b) + '\\n')",
        "sys.stdout.buffer": "sys.stdout.buffer.write(b'%d\\n' % (a + b))",
        "a flushed print": "print(a + b, flush=True)",
        "os.write": "os.write(1, str(a + b).encode())",
        "a print without a line's end": "print(a + b, end='')",
        "a print with trailing spaces": "print(a + b, '  ')",
        "print to sys.__stdout__": "print(a + b, file=sys.__stdout__)",
        "a rewrapped stdout": "import io; out = io.TextIOWrapper(sys.stdout.buffer); "
                              "out.write(str(a + b)); out.flush()",
        "a joined list": "sys.stdout.writelines([str(a + b), '\\n'])",
        "stdout and stderr": "print('debug', file=sys.stderr); print(a + b)",
        "a very long stderr": "print('debug' * 300_000, file=sys.stderr); print(a + b)",
        "print and sys.exit(0)": "print(a + b); sys.exit(0)",
        "print and exit()": "print(a + b); exit()", "print and quit()": "print(a + b); quit()",
        "print, flush and os._exit(0)": "print(a + b, flush=True); os._exit(0)",
        "print and raise SystemExit": "print(a + b)\nraise SystemExit",
        "atexit": "import atexit; atexit.register(print, a + b)",
        "an open(1) left open": "out = open(1, 'w'); out.write(str(a + b))",
        "print into a StringIO": "import io; sys.stdout = io.StringIO(); print(a + b); "
                                 "sys.__stdout__.write(sys.stdout.getvalue())",
        "redirect_stdout": "from contextlib import redirect_stdout\nimport io\n"
                           "with redirect_stdout(io.StringIO()) as text:\n"
                           "    print(a + b)\nprint(text.getvalue())"}.items():
    honest(f"output by {way}", f"import os, sys\na, b = map(int, input().split())\n{statement}",
           ADD_TESTS)
honest("a loop over the lines of sys.stdin", """
    import sys
    total = -1
    for n, line in enumerate(sys.stdin):
        total = total + int(line) if n else 0
    print(total)
    """, LINES)
honest("a faster input assigned over input", """
    import sys
    input = sys.stdin.readline
    print(sum(int(input()) for _ in range(int(input()))))
    """, LINES)
honest("the usual template for fast input and output", """
    import os, sys
    from io import BytesIO, IOBase

    class FastIO(IOBase):
        newlines = 0

        def __init__(self, file):
            self._fd = file.fileno()
            self.buffer = BytesIO()
            self.writable = "x" in file.mode or "r" not in file.mode
            self.write = self.buffer.write if self.writable else None

        def read(self):
            while True:
                b = os.read(self._fd, max(os.fstat(self._fd).st_size, 8192))
                if not b:
                    break
                ptr = self.buffer.tell()
                self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(ptr)
            self.newlines = 0
            return self.buffer.read()

        def readline(self):
            while self.newlines == 0:
                b = os.read(self._fd, max(os.fstat(self._fd).st_size, 8192))
                self.newlines = b.count(b"\\n") + (not b)
                ptr = self.buffer.tell()
                self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(ptr)
            self.newlines -= 1
            return self.buffer.readline()

        def flush(self):
            if self.writable:
                os.write(self._fd, self.buffer.getvalue())
                self.buffer.truncate(0), self.buffer.seek(0)

    class IOWrapper(IOBase):
        def __init__(self, file):
            self.buffer = FastIO(file)
            self.flush = self.buffer.flush
            self.writable = self.buffer.writable
            self.write = lambda s: self.buffer.write(s.encode("ascii"))
            self.read = lambda: self.buffer.read().decode("ascii")
            self.readline = lambda: self.buffer.readline().decode("ascii")

    sys.stdin, sys.stdout = IOWrapper(sys.stdin), IOWrapper(sys.stdout)
    input = lambda: sys.stdin.readline().rstrip("\\r\\n")
    n = int(input())
    print(sum(int(input()) for _ in range(n)))
    """, LINES)
honest("standard input from a StringIO", """
    import io, os, sys
    sys.stdin = io.StringIO(os.read(0, 10 ** 6).decode())
    n = int(input())
    print(sum(int(input()) for _ in range(n)))
    """, LINES)
honest("a file of input that is there only at home", """
    import os, sys
    if os.path.exists("input.txt") or "LOCAL" in os.environ:
        sys.stdin = open("input.txt")
    try:
        sys.stdin = open("in.txt", "r")
        sys.stdout = open("out.txt", "w")
    except Exception:
        pass
    n = int(input())
    print(sum(int(input()) for _ in range(n)))
    """, LINES)
honest("a raised limit of the stack", """
    import resource, sys
    try:
        resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY,) * 2)
    except ValueError:
        pass
    sys.setrecursionlimit(1 << 20)
    n = int(input())
    print(sum(int(input()) for _ in range(n)))
    """, LINES)
honest("input until the end of the file", """
    total = 0
    try:
        first = input()
        while True:
            total += int(input())
    except EOFError:
        print(total)
    """, LINES)
honest("a main function", """
    def main():
        a, b = map(int, input().split())
        print(a + b)

    if __name__ == "__main__":
        main()
    """, ADD_TESTS)
honest("a program with no input", "print('Hello, world')", stdin(("", "Hello, world\n")))
honest("text beyond ASCII", """
    word = input()
    print(word[::-1], len(word), "\u2713")
    """, stdin(("na\u00efve \U0001f600\n", "\U0001f600 ev\u00efan 7 \u2713")))
honest("a million numbers", """
    import sys
    numbers = list(map(int, sys.stdin.buffer.read().split()))
    sys.stdout.write("\\n".join(str(2 * n) for n in numbers))
    """, stdin((" ".join(map(str, range(200_000))), "\n".join(str(2 * n) for n in range(200_000)))))
honest("decimals within the tolerance", """
    n = int(input())
    print(n / 3, "%.12f" % (n / 7), 2.5e10 * n)
    """, stdin(("1\n", "0.33333333333 0.142857142857 25000000000.0\n")))
honest("big ints", """
    import sys
    sys.set_int_max_str_digits(0)
    n = int(input())
    print(n * n, 2 ** 100)
    """, stdin(("123456789012345678901\n",
                f"{123456789012345678901 ** 2} 1267650600228229401496703205376")))
for wanted, got in (
        ("0.333333", "1 / 3"), ("0.3", "sum([0.1] * 3)"), ("2.0", "2"), ("1e3", "1000"),
        ("0.0", "1e-9"), ("-0.0", "0"), ("1000000.5", "1000000.9"), ("-2.5e-3", "-0.0025"),
        ("3.14159265358979", "'%.6f' % 3.14159265358979"), ("1.5E+10", "15 * 10 ** 9"),
        ("6.02e23", "602 * 10 ** 21"), ("12345678901234567890.0", "12345678901234567890"),
        ("1e-9", "0.0"), ("100.0000", "99.99999999999")):
    honest(f"{wanted} printed as {got}", f"print({got})", stdin(("", wanted)))
honest("decimals among words, of several lines", """
    for case in range(1, int(input()) + 1):
        numbers = list(map(int, input().split()))
        print(f"Case #{case}:", sum(numbers) / len(numbers), len(numbers))
    """, stdin(("2\n1 2 4\n7\n", "Case #1: 2.33333333 3\nCase #2: 7.000000 1\n")))
honest("an int of 5,001 digits printed", "print(10 ** int(input()))",
       stdin(("5000\n", "1" + "0" * 5000), ("5\n", "100000")))
honest("an int of 6,000 digits read", "print(int(input()) + 1)",
       stdin(("9" * 6000 + "\n", "1" + "0" * 6000), ("41\n", "42")))
honest("ints of 5,000 digits multiplied", """
    import sys
    a, b = map(int, sys.stdin.read().split())
    sys.stdout.write(str(a * b))
    """, stdin(("1" + "0" * 4999 + "\n" + "7" * 5000 + "\n", "7" * 5000 + "0" * 4999)))
honest("the digits of a large factorial", """
    from math import factorial
    digits = str(factorial(int(input())))
    print(len(digits), sum(map(int, digits)), f"{digits:.5}")
    """, stdin(("2000\n", "5736 23382 33162")))
for way, statement in {
        "a print, then sys.stdout.close()": "print(a + b); sys.stdout.close()",
        "a with statement over sys.stdout": "with sys.stdout:\n    print(a + b)",
        "a print, then every stream closed":
            "print(a + b); sys.stdout.close(); sys.stderr.close(); sys.stdin.close()",
        "a flushed print, then os.close(1)": "print(a + b, flush=True); os.close(1)",
        "a print, then None for sys.stdout": "print(a + b); sys.stdout = None",
        "a print, then a StringIO for sys.stdout":
            "import io; print(a + b); sys.stdout = io.StringIO(); print('unseen')",
        "a print, then stderr for sys.stdout":
            "print(a + b); sys.stdout = sys.stderr; print('debug')",
        "a detached stdout, wrapped anew":
            "import io; sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='utf-8', "
            "line_buffering=True); print(a + b)",
        "a writer of codecs around a detached stdout":
            "import codecs; sys.stdout = codecs.getwriter('utf-8')(sys.stdout.detach()); "
            "print(a + b)",
        "open(1) assigned over sys.stdout": "sys.stdout = open(1, 'w'); print(a + b)",
        "os.fdopen(1) assigned over sys.stdout": "sys.stdout = os.fdopen(1, 'w'); print(a + b)",
        "exit() in a nested function":
            "def main():\n    def stop():\n        exit()\n    print(a + b)\n    stop()\n"
            "    print('unreached')\nmain()",
        "sys.exit(main())": "def main():\n    print(a + b)\nsys.exit(main())",
        "SystemExit(0) past an except Exception":
            "try:\n    print(a + b)\n    raise SystemExit(0)\nexcept Exception:\n    print('no')",
        "sys.exit(0) with a finally": "try:\n    sys.exit(0)\nfinally:\n    print(a + b)",
        "quit(0) in a loop": "while True:\n    print(a + b)\n    quit(0)",
        "a closed stdout and sys.exit()": "print(a + b); sys.stdout.close(); sys.exit()",
        "a main thread that exits":
            "import threading\ndef main():\n    print(a + b)\n    sys.exit()\n"
            "thread = threading.Thread(target=main)\nthread.start()\nthread.join()"}.items():
    honest(f"output by {way}", f"import os, sys\na, b = map(int, input().split())\n{statement}",
           ADD_TESTS)
honest("a logger assigned over stdout", """
    import os, sys

    class Log:
        def __init__(self):
            self.lines = []

        def write(self, text):
            self.lines.append(text)
            return len(text)

        def flush(self):
            os.write(1, "".join(self.lines).encode())
            self.lines.clear()

    sys.stdout = Log()
    print(sum(map(int, input().split())))
    """, ADD_TESTS)

# -------------------------------------------------------------- honest: threads, recursion, signals

honest("deep recursion in a thread with a large stack", """
    import sys, threading
    sys.setrecursionlimit(10 ** 6)
    threading.stack_size(1 << 27)

    def depth(n):
        return 0 if n == 0 else 1 + depth(n - 1)

    def main():
        print(depth(int(input())))

    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
    """, stdin(("100000\n", "100000\n")))
honest("recursion fifty thousand deep", """
    import sys
    sys.setrecursionlimit(10 ** 6)

    def depth(n):
        return 0 if n == 0 else 1 + depth(n - 1)

    print(depth(int(input())))
    """, stdin(("50000\n", "50000\n")))
honest("recursion in a call", """
    import sys
    from functools import lru_cache
    sys.setrecursionlimit(10 ** 6)

    @lru_cache(None)
    def fibonacci(n):
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
    """, call("fibonacci", ((20,), 6765), ((90,), 2880067194370816120)))
honest("a caught RecursionError", """
    def forever(n):
        return forever(n + 1)
    try:
        forever(0)
    except RecursionError:
        print("deep")
    """, stdin(("", "deep")))
honest("threads with a lock and a queue", """
    import queue, threading
    lock, tasks, total = threading.Lock(), queue.Queue(), 0

    def work():
        global total
        while (n := tasks.get()) is not None:
            with lock:
                total += n

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for n in range(1000):
        tasks.put(n)
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        thread.join()
    print(total)
    """, stdin(("", "499500\n")))
honest("a pool of threads", """
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(8) as pool:
        print(*pool.map(lambda n: n * n, range(10)))
    """, stdin(("", "0 1 4 9 16 25 36 49 64 81\n")))
honest("signal handlers and timers of its own", """
    import os, signal, time
    caught = []
    signal.signal(signal.SIGALRM, lambda *_: caught.append("alarm"))
    signal.signal(signal.SIGUSR1, lambda *_: caught.append("user"))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while not caught:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0)
    print(*caught)
    """, stdin(("", "alarm user\n")))
honest("asyncio", """
    import asyncio

    async def double(n):
        await asyncio.sleep(0)
        return 2 * n

    async def main():
        print(*await asyncio.gather(*map(double, range(5))))

    asyncio.run(main())
    """, stdin(("", "0 2 4 6 8")), optional=True)
honest("times and sleeps", """
    import time
    start, cpu = time.time(), time.process_time()
    time.sleep(0.01)
    print(time.time() > start, time.perf_counter() > 0, time.monotonic() > 0, cpu >= 0)
    """, stdin(("", "True True True True")))
honest("a pseudo-random seed and fresh randomness", """
    import os, random, secrets, uuid
    random.seed(0)
    a = random.randint(1, 10 ** 9)
    random.seed(0)
    print(a == random.randint(1, 10 ** 9), len(os.urandom(8)), len(secrets.token_bytes(4)),
          uuid.uuid4() != uuid.uuid4())
    """, stdin(("", "True 8 4 True")))

# --------------------------------------------------------------------- honest: the standard library

for module, expression, printed in (
        ("collections", "dict(collections.Counter(collections.deque('abca')))",
         "{'a': 2, 'b': 1, 'c': 1}"),
        ("heapq", "heapq.nsmallest(2, [3, 1, 2])", "[1, 2]"),
        ("bisect", "bisect.bisect_left([1, 3, 5], 4)", "2"),
        ("functools", "functools.reduce(lambda a, b: a * b, range(1, 6))", "120"),
        ("itertools", "list(itertools.permutations('ab'))", "[('a', 'b'), ('b', 'a')]"),
        ("re", "re.sub(r'(\\w)\\1', r'<\\1>', 'hello')", "he<l>o"),
        ("decimal", "decimal.Decimal('0.1') + decimal.Decimal('0.2')", "0.3"),
        ("fractions", "fractions.Fraction(1, 3) + fractions.Fraction(1, 6)", "1/2"),
        ("datetime", "datetime.date(2024, 2, 28) + datetime.timedelta(2)", "2024-03-01"),
        ("calendar", "calendar.isleap(2000)", "True"),
        ("string", "string.ascii_lowercase[:3]", "abc"),
        ("math", "math.gcd(12, 18), math.comb(5, 2), math.isqrt(17)", "6 10 4"),
        ("cmath", "abs(cmath.sqrt(-4))", "2.0"),
        ("json", "json.loads(json.dumps({'a': [1, None]}))", "{'a': [1, None]}"),
        ("copy", "copy.deepcopy([[1]])", "[[1]]"),
        ("statistics", "statistics.median([3, 1, 2])", "2"),
        ("operator", "sorted([(1, 2), (0, 3)], key=operator.itemgetter(0))", "[(0, 3), (1, 2)]"),
        ("array", "array.array('i', [1, 2]).tolist()", "[1, 2]"),
        ("struct", "struct.unpack('<H', b'\\1\\2')[0]", "513"),
        ("hashlib", "hashlib.md5(b'a').hexdigest()[:6]", "0cc175"),
        ("base64", "base64.b64encode(b'abc').decode()", "YWJj"),
        ("zlib", "zlib.decompress(zlib.compress(b'abc')).decode()", "abc"),
        ("pickle", "pickle.loads(pickle.dumps([1, 2]))", "[1, 2]"),
        ("textwrap", "textwrap.shorten('a b c d', 5, placeholder='')", "a b c"),
        ("unicodedata", "unicodedata.name('a')", "LATIN SMALL LETTER A"),
        ("difflib", "difflib.SequenceMatcher(None, 'ab', 'ab').ratio()", "1.0"),
        ("csv", "next(csv.reader(['a,\"b,c\"']))", "['a', 'b,c']"),
        ("ast", "ast.literal_eval('[1, (2,)]')", "[1, (2,)]"),
        ("pprint", "pprint.pformat({'b': 1, 'a': 2})", "{'a': 2, 'b': 1}"),
        ("html", "html.unescape('&lt;')", "<"),
        ("numbers", "isinstance(1, numbers.Integral)", "True"),
        ("ctypes", "ctypes.c_uint8(257).value", "1"),
        ("inspect", "inspect.signature(lambda a, b=1: 0)", "(a, b=1)"),
        ("graphlib", "list(graphlib.TopologicalSorter({1: [2]}).static_order())", "[2, 1]"),
        ("xml.etree.ElementTree", "xml.etree.ElementTree.fromstring('<a b=\"1\"/>').attrib",
         "{'b': '1'}"),
        ("secrets", "len(secrets.token_hex(4))", "8"),
        ("platform", "platform.python_implementation()", "CPython"),
        ("zoneinfo", "zoneinfo.ZoneInfo.__name__", "ZoneInfo"),
        ("sqlite3", "sqlite3.connect(':memory:').execute('select 1 + 1').fetchone()", "(2,)"),
        ("tempfile", "tempfile.__name__", "tempfile"),
        ("subprocess", "subprocess.__name__", "subprocess"),
        ("multiprocessing", "multiprocessing.__name__", "multiprocessing"),
        ("socket", "socket.__name__", "socket"), ("unittest", "unittest.__name__", "unittest"),
        ("logging", "logging.getLogger('a').name", "a"),
        ("resource", "resource.getrlimit(resource.RLIMIT_CPU)[0] != 0", "True"),
        ("queue", "queue.PriorityQueue().empty()", "True")):
    honest(f"import {module}", f"import {module}\nprint({expression})",
           stdin(("", printed + "\n")), optional=module in ("sqlite3", "zoneinfo"))
honest("from imports with a star", """
    from math import *
    from collections import *
    from itertools import *
    from typing import *
    print(floor(pi), deque([1]), list(accumulate([1, 2, 3])), List[int])
    """, stdin(("", "3 deque([1]) [1, 3, 6] typing.List[int]")))
honest("data classes, enums and abstract classes", """
    from __future__ import annotations
    from abc import ABC, abstractmethod
    from dataclasses import dataclass, field
    from enum import Enum, auto
    from typing import Generic, NamedTuple, Protocol, TypeVar

    class Colour(Enum):
        RED = auto()

    T = TypeVar("T")

    class Shape(ABC, Generic[T]):
        @abstractmethod
        def area(self) -> T: ...

    @dataclass(order=True)
    class Square(Shape[int]):
        side: int
        tags: list[str] = field(default_factory=list)

        def area(self):
            return self.side ** 2

    class Pair(NamedTuple):
        a: int
        b: int = 2

    print(Square(3).area(), Colour.RED.name, Pair(1), Square(1) < Square(2))
    """, stdin(("", "9 RED Pair(a=1, b=2) True")))
honest("context managers, generators and decorators", """
    from contextlib import contextmanager, suppress
    from functools import cmp_to_key, wraps

    def twice(f):
        @wraps(f)
        def g(*args):
            return 2 * f(*args)
        return g

    @contextmanager
    def around(text):
        print("<", end="")
        yield text
        print(">")

    @twice
    def three():
        return 3

    with around("x") as x, suppress(KeyError):
        print(x, three(), sorted([3, 1], key=cmp_to_key(lambda a, b: a - b)), end="")
        {}[0]
    """, stdin(("", "<x 6 [1, 3]>")))
honest("exec, eval and compile", """
    exec(compile("x = eval('1 + 1')", "<text>", "exec"))
    print(x)
    """, stdin(("", "2")))
honest("warnings and a custom excepthook", """
    import sys, warnings
    sys.excepthook = lambda *args: None
    warnings.warn("old")
    print("\\d")
    """, stdin(("", "\\d")))
honest("a match statement and a walrus", """
    match input().split():
        case [a, b] if (n := int(a)) > 0:
            print("pair", n, b)
        case _:
            print("other")
    """, stdin(("1 x\n", "pair 1 x"), ("1\n", "other")))
honest("a hundred megabytes of memory", """
    table = bytearray(100 << 20)
    table[-1] = 7
    print(sum(table[-3:]))
    """, stdin(("", "7")))
for codec, expression, printed in (
        ("cp437", "'\\u00e9'.encode('cp437').hex()", "82"),
        ("cp1251", "b'\\xff'.decode('cp1251') == '\\u044f'", "True"),
        ("koi8_r", "'\\u044f'.encode('koi8_r').hex()", "d1"),
        ("utf-16", "'ab'.encode('utf-16')[-4:].hex()", "61006200"),
        ("utf-32-be", "'a'.encode('utf-32-be').hex()", "00000061"),
        ("utf-7", "'\\u00e9'.encode('utf-7').decode()", "+AOk-"),
        ("shift_jis", "'\\u3042'.encode('shift_jis').hex()", "82a0"),
        ("euc_jp", "b'\\xa4\\xa2'.decode('euc_jp') == '\\u3042'", "True"),
        ("gb18030", "'\\u4e2d'.encode('gb18030').hex()", "d6d0"),
        ("big5", "'\\u4e2d'.encode('big5').hex()", "a4a4"),
        ("euc_kr", "'\\uac00'.encode('euc_kr').hex()", "b0a1"),
        ("cp037", "'A1'.encode('cp037').hex()", "c1f1"),
        ("mac_roman", "b'\\x8e'.decode('mac_roman') == '\\u00e9'", "True"),
        ("iso8859_15", "'\\u20ac'.encode('iso8859_15').hex()", "a4"),
        ("idna", "'b\\u00fccher.de'.encode('idna').decode()", "xn--bcher-kva.de"),
        ("punycode", "'b\\u00fccher'.encode('punycode').decode()", "bcher-kva"),
        ("rot13", "codecs.encode('Hello', 'rot13'), codecs.decode('Uryyb', 'rot_13')",
         "Uryyb Hello"),
        ("unicode_escape", "'\\u00e9\\n'.encode('unicode_escape').decode()", "\\xe9\\n"),
        ("hex and base64", "codecs.encode(b'ab', 'hex').decode(), "
         "codecs.encode(b'ab', 'base64').decode()", "6162 YWI=\n"),
        ("zlib", "codecs.decode(codecs.encode(b'ab', 'zlib'), 'zlib').decode()", "ab"),
        ("quopri", "codecs.encode(b'a=b', 'quopri').decode()", "a=3Db")):
    honest(f"the codec {codec}", f"import codecs\nprint({expression})", stdin(("", printed)))
honest("input in another encoding", """
    import io, sys
    text = io.TextIOWrapper(sys.stdin.buffer, encoding="iso8859_2").read()
    print(len(text.split()[0]))
    """, stdin(("abc\n", "3\n")))
honest("a word in many encodings", """
    word = input()
    for name in ("ascii", "cp850", "cp866", "cp1250", "cp1252", "gbk", "hz", "iso2022_jp", "johab",
                 "koi8_u", "latin2", "ptcp154", "tis_620", "utf_8_sig"):
        assert word.encode(name).decode(name) == word, name
    print("all")
    """, stdin(("word\n", "all")))
for module, statements, printed in (
        ("email.mime.text", "m = email.mime.text.MIMEText('hi'); print(m.get_content_type())",
         "text/plain"),
        ("email", "print(email.message_from_string('To: me\\n\\nx')['to'])", "me"),
        ("email.header", "print(*email.header.decode_header('=?utf-8?q?a=5Fb?=')[0])",
         "b'a_b' utf-8"),
        ("email.utils", "print(email.utils.parseaddr('A <a@b.c>')[1])", "a@b.c"),
        ("xml.sax.saxutils", "print(xml.sax.saxutils.escape('<a>'))", "&lt;a&gt;"),
        ("xml.sax", "print(hasattr(xml.sax.make_parser(), 'parse'))", "True"),
        ("xml.dom.minidom", "print(xml.dom.minidom.parseString('<a/>').documentElement.tagName)",
         "a"),
        ("urllib.robotparser", "r = urllib.robotparser.RobotFileParser(); "
         "r.parse(['User-agent: *', 'Disallow: /x']); print(r.can_fetch('me', '/x'))", "False"),
        ("urllib.error", "print(issubclass(urllib.error.URLError, OSError))", "True"),
        ("encodings.aliases", "print(encodings.aliases.aliases['latin1'])", "latin_1"),
        ("encodings.cp775", "print(encodings.cp775.getregentry().name)", "cp775"),
        ("importlib.resources", "print(callable(importlib.resources.files))", "True"),
        ("importlib.metadata", "print(issubclass(importlib.metadata.PackageNotFoundError, "
         "ImportError))", "True"),
        ("concurrent.futures", "p = concurrent.futures.ProcessPoolExecutor; print(p.__name__)",
         "ProcessPoolExecutor"),
        ("multiprocessing.dummy", "print(multiprocessing.dummy.Process.__name__)",
         "DummyProcess"),
        ("html.parser", "p = html.parser.HTMLParser(); p.handle_data = print; p.feed('<b>x</b>')",
         "x"),
        ("html.entities", "print(html.entities.name2codepoint['lt'])", "60"),
        ("json.decoder", "print(json.decoder.JSONDecodeError.__mro__[1].__name__)", "ValueError"),
        ("unittest.mock", "m = unittest.mock.Mock(return_value=3); print(m(), m.call_count)",
         "3 1"),
        ("collections.abc", "print(isinstance([], collections.abc.Sequence))", "True"),
        ("asyncio.queues", "print(asyncio.queues.Queue(3).maxsize)", "3"),
        ("http.cookies", "print(http.cookies.SimpleCookie('a=b')['a'].value)", "b"),
        ("http.client", "print(http.client.responses[404])", "Not Found"),
        ("wsgiref.util", "print(wsgiref.util.guess_scheme({}))", "http"),
        ("xmlrpc.client", "print(xmlrpc.client.loads(xmlrpc.client.dumps((1,)))[0])", "(1,)"),
        ("logging.config", "print(callable(logging.config.dictConfig))", "True"),
        ("ctypes.util", "print(callable(ctypes.util.find_library))", "True"),
        ("ctypes.wintypes", "print(ctypes.wintypes.DWORD(7).value)", "7"),
        ("os.path", "print(os.path.join('a', 'b'))", "a/b"),
        ("tomllib", "print(tomllib.loads('a = [1]'))", "{'a': [1]}"),
        ("pydoc", "print(pydoc.splitdoc('A.\\n\\nB.'))", "('A.', 'B.')"),
        ("zipfile", "import io; z = zipfile.ZipFile(io.BytesIO(), 'w', 8); z.writestr('a', 'b'); "
         "print(z.read('a').decode())", "b"),
        ("lzma", "print(lzma.decompress(lzma.compress(b'a')).decode())", "a"),
        ("zoneinfo", "print(zoneinfo.ZoneInfo('Europe/Paris').key)", "Europe/Paris"),
        ("curses.ascii", "print(curses.ascii.isdigit('1'))", "True")):
    honest(f"{module} imported in a function",
           f"def main():\n    import {module}\n    {statements}\n\nmain()", stdin(("", printed)),
           optional=module in ("zoneinfo", "curses.ascii", "lzma"))
honest("modules imported in a call", """
    def hosts(links):
        from urllib.parse import urlsplit
        from xml.sax.saxutils import unescape
        import importlib
        heapq = importlib.import_module("heapq")
        return heapq.nsmallest(2, [urlsplit(unescape(link)).hostname for link in links])
    """, call("hosts", ((["http://b.c/?x=1&amp;y=2", "https://a.b:80/", "ftp://z"],),
                        ["a.b", "b.c"])))

# ------------------------------------------------------------------------------------ honest: numpy

honest("numpy arrays", """
    import sys
    import numpy as np
    a = np.array(sys.stdin.read().split(), dtype=np.int64)
    print(a.sum(), np.cumsum(a)[-1], *np.sort(a))
    """, stdin(("3 1 2\n", "6 6 1 2 3")), needs="numpy")
honest("numpy's linear algebra, random numbers and transforms", """
    import numpy as np
    a = np.linalg.solve(np.array([[2.0, 0], [0, 4]]), np.array([2.0, 4]))
    r = np.random.default_rng(0).integers(0, 10, 5)
    np.random.seed(1)
    print(*a, len(r), np.random.rand() < 1, round(abs(np.fft.fft([1.0, 1.0])[0]), 6),
          np.linalg.det(np.eye(3)), np.polyfit([0, 1], [0, 1], 1).round(3)[0])
    """, stdin(("", "1.0 1.0 5 True 2.0 1.0 1.0")), needs="numpy")
honest("a product of matrices", """
    import numpy as np
    print(int((np.ones((400, 400)) @ np.ones((400, 400))).sum()))
    """, stdin(("", "64000000")), needs="numpy")
honest("numpy scalars and arrays returned", """
    import numpy as np
    def f(kind):
        return {"int": np.int64(3), "float": np.float32(0.5), "bool": np.bool_(True),
                "array": np.arange(3), "matrix": np.eye(2, dtype=int), "text": np.str_("a"),
                "list": [np.int8(1), (np.float64(2.5),)], "object": np.array([1, None])}[kind]
    """, call("f", (("int",), 3), (("float",), 0.5), (("bool",), True), (("array",), [0, 1, 2]),
              (("matrix",), [[1, 0], [0, 1]]), (("text",), "a"), (("list",), [1, [2.5]]),
              (("object",), [1, None])), needs="numpy")

# ------------------------------------------------------------------------------------ honest: calls

honest("a plain function called", "def add(a, b):\n    return a + b", SUM["call"])
honest("a method of Solution called", """
    class Solution:
        def __init__(self):
            self.calls = 0

        def helper(self, a):
            self.calls += 1
            return a

        def add(self, a: int, b: int) -> int:
            return self.helper(a) + self.helper(b) + self.calls - 2
    """, SUM["call"])
honest("a static method of Solution called", """
    class Solution:
        @staticmethod
        def add(a, b):
            return a + b
    """, SUM["call"])
honest("contest names without imports", """
    class Solution:
        def count(self, words: List[str], limit: Optional[int] = None) -> Dict[str, int]:
            seen = defaultdict(int)
            for word in words:
                seen[word] += 1
            heap = [-n for n in Counter(words).values()]
            heapify(heap)
            return [dict(seen), heappop(heap), inf > 1, gcd(4, 6), bisect_left([1, 2], 2)]
    """, call("count", ((["a", "b", "a"],), [{"a": 2, "b": 1}, -2, True, 2, 1])))
honest("a main block that a call does not run", """
    def add(a, b):
        return a + b

    if __name__ == "__main__":
        print(add(*map(int, input().split())))
        raise ValueError
    """, SUM["call"])
honest("prints beside a call", """
    print("loaded")
    def add(a, b):
        print("debug", a, b)
        return a + b
    """, SUM["call"])
honest("statements before the first function", """
    import math
    LIMIT = math.inf
    table = [0]
    table.append(table[0] + 1)
    def add(a, b):
        return a + b if a < LIMIT else table[1]
    """, SUM["call"])
honest("values of every kind returned", """
    def same(kind):
        return {"none": None, "true": True, "int": 2 ** 200, "negative": -1, "float": 0.1 + 0.2,
                "text": "a\\u00e9\\n\\0'\\"", "tuple": (1, (2, "x")), "nested": [[[]], [[1]]],
                "dict": {"a": [1, {"b": None}]}, "keys": {1: 2}, "empty": [], "small": 1e-300,
                "mixed": [1, 1.5, "1", None, True]}[kind]
    """, call("same", (("none",), None), (("true",), True), (("int",), 2 ** 200),
              (("negative",), -1), (("float",), 0.3), (("text",), "a\u00e9\n\0'\""),
              (("tuple",), [1, [2, "x"]]), (("nested",), [[[]], [[1]]]),
              (("dict",), {"a": [1, {"b": None}]}), (("empty",), []), (("small",), 1e-300),
              (("mixed",), [1, 1.5, "1", None, True])))
honest("an int where a float is expected", """
    def half(n):
        return n // 2
    """, call("half", ((4,), 2.0)))
honest("plain subclasses returned", """
    from collections import Counter, OrderedDict, defaultdict, namedtuple
    from enum import IntEnum
    Point = namedtuple("Point", "x y")
    def make(kind):
        return {"counter": Counter("aab"), "ordered": OrderedDict(a=1), "default":
                defaultdict(int, a=1), "named": Point(1, 2)}[kind]
    """, call("make", (("counter",), {"a": 2, "b": 1}), (("ordered",), {"a": 1}),
              (("default",), {"a": 1}), (("named",), [1, 2])), optional=True)
honest("arguments of every kind", """
    def kinds(*args):
        return [type(arg).__name__ for arg in args]
    """, call("kinds", (([1], "a", {"a": 1}, None, True, 1.5, 10 ** 30),
                        ["list", "str", "dict", "NoneType", "bool", "float", "int"])))
honest("a large argument and a large result", """
    def reverse(numbers):
        return numbers[::-1]
    """, call("reverse", ((list(range(100_000)),), list(range(99_999, -1, -1)))))
honest("classes of the standard library's kinds in a call", """
    from __future__ import annotations
    import dataclasses, enum, pickle, typing

    @dataclasses.dataclass
    class Node:
        value: int
        next: typing.Optional[Node] = None
        kind: dataclasses.InitVar[int] = 0

    class Kind(enum.Enum):
        A = 1

    class Pair(typing.NamedTuple):
        a: int
        b: list[int]

    class Tree(typing.TypedDict, total=False):
        left: Tree

    def add(a, b):
        node = pickle.loads(pickle.dumps(Node(a, Node(b))))
        assert typing.get_type_hints(Pair)["a"] is int and Kind.A.value == 1
        return node.value + node.next.value
    """, SUM["call"])
honest("setup before a call", """
    def add(a, b):
        return OFFSET + helper(a) + b
    """, [dict(test, setup="OFFSET = 0\ndef helper(a):\n    return a\n") for test in SUM["call"]])
honest("state of a module that each test has anew", """
    seen = []
    def add(a, b):
        seen.append(a)
        return a + b + len(seen) - 1
    """, SUM["call"])
honest("whole floats where ints are expected", """
    def shares(total, parts):
        return [total / parts, {"each": total // parts / 1, "list": (float(total),)}]
    """, call("shares", ((4, 2), [2, {"each": 2, "list": [4]}]), ((0, 3), [0, {"each": 0,
                                                                            "list": [0]}])))
honest("a whole float where an int is expected", "def double(n):\n    return 2.0 * n",
       call("double", ((1,), 2), ((-3,), -6), ((0,), 0)))
honest("ints where floats are expected", """
    def scale(numbers, factor):
        return tuple(n * factor for n in numbers)
    """, call("scale", (([1, 2], 2), [2.0, 4.0]), (([0], 5), [0.0])))
honest("floats within the tolerance in a call", """
    def thirds(n):
        return [round(n / 3, 7), {"more": [n * 1e9 + 1e-3]}, 1e-12]
    """, call("thirds", ((1,), [0.33333333333, {"more": [1e9]}, 0.0]),
              ((2,), [0.66666666666, {"more": [2e9]}, 1e-11])))
honest("a power of ten of 5,001 digits returned", "def power(n):\n    return 10 ** n",
       call("power", ((5000,), 10 ** 5000), ((3,), 1000)))
honest("an argument of 5,001 digits", """
    def digits(n):
        return [len(str(n)), n % 7, n // 10]
    """, call("digits", ((10 ** 5000,), [5001, pow(10, 5000, 7), 10 ** 4999]), ((70,), [2, 0, 7])))
honest("ints read from long text in a call", """
    def multiply(a, b):
        return str(int(a) * int(b))
    """, call("multiply", (("7" * 5000, "1" + "0" * 5000), "7" * 5000 + "0" * 5000), (("2", "3"),
                                                                                   "6")))
honest("a dict with ints for keys", """
    def count(numbers):
        seen = {}
        for n in numbers:
            seen[n] = seen.get(n, 0) + 1
        return seen
    """, call("count", (([1, 1, 2],), {"1": 2, "2": 1}), (([-5],), {"-5": 1}), (([],), {})))
honest("dicts with ints for keys, nested", """
    from collections import defaultdict
    def graph(edges):
        links = defaultdict(lambda: defaultdict(list))
        for a, b, cost in edges:
            links[a][b].append(cost)
        return links
    """, call("graph", (([[1, 2, 7], [1, 3, 8], [1, 2, 9]],), {"1": {"2": [7, 9], "3": [8]}})))
honest("a dict with bools for keys", """
    def split(numbers):
        return {True: [n for n in numbers if n % 2], False: [n for n in numbers if n % 2 == 0]}
    """, call("split", (([1, 2, 3],), {"true": [1, 3], "false": [2]})))
honest("a dict with None and a float for keys", "def table():\n    return {None: 1, 0.5: 2}",
       call("table", ((), {"null": 1, "0.5": 2})))
honest("a Fraction where a float is expected", """
    from fractions import Fraction
    def mean(numbers):
        return Fraction(sum(numbers), len(numbers))
    """, call("mean", (([1, 2],), 1.5), (([1, 2, 4],), 2.3333333333)))
honest("a Decimal where a float is expected", """
    from decimal import Decimal
    def total(prices):
        return [sum(map(Decimal, prices)), {"max": max(map(Decimal, prices))}]
    """, call("total", ((["0.10", "0.2"],), [0.3, {"max": 0.2}])))
honest("tuples for lists at every depth", """
    def pairs(a, b):
        return tuple((x, y, ()) for x in a for y in b), (1,)
    """, call("pairs", (([1], "xy"), [[[1, "x", []], [1, "y", []]], [1]])))
for modules, expression, wanted in (
        ("string", "[ascii_lowercase[:3], string.digits[:2], capwords('a b'), "
         "Template('$x!').substitute(x=1), punctuation[0]]", ["abc", "01", "A B", "1!", "!"]),
        ("re", "[findall('[0-9]+', 'a1b22'), re.sub('a', 'b', 'aa'), bool(fullmatch('a*', 'aa')), "
         "search('b', 'ab', IGNORECASE).start(), escape('.')]",
         [["1", "22"], "bb", True, 1, "\\."]),
        ("datetime", "[str(date(2024, 2, 28) + timedelta(days=2)), datetime.datetime(2020, 1, 1)"
         ".year, datetime.date.fromisoformat('2021-03-04').month, str(timezone.utc)]",
         ["2024-03-01", 2020, 3, "UTC"]),
        ("collections", "[Counter('aab').most_common(1), list(deque([1, 2], maxlen=1)), "
         "list(OrderedDict(a=1)), ChainMap({'b': 2})['b'], namedtuple('P', 'x')(3).x, "
         "collections.defaultdict(list)[0]]", [[["a", 2]], [2], ["a"], 2, 3, []]),
        ("heapq", "[nlargest(2, [1, 3, 2]), list(merge([1, 4], [2])), heappushpop([1, 2], 0), "
         "heapq.nsmallest(1, [2, 1])]", [[3, 2], [1, 2, 4], 0, [1]]),
        ("bisect", "[bisect_right([1, 1, 2], 1), bisect_left([1, 1, 2], 1), "
         "bisect.bisect([1, 2, 3], 2), (lambda a: insort(a, 2) or a)([1, 3])]",
         [2, 0, 2, [1, 2, 3]]),
        ("copy", "[deepcopy([[1]]), copy.copy([2]), copy.deepcopy({'a': [3]})]",
         [[[1]], [2], {"a": [3]}]),
        ("math", "[gcd(12, 18), lcm(4, 6), comb(5, 2), perm(4, 2), isqrt(17), prod([2, 3]), "
         "floor(pi), ceil(e), hypot(3, 4), math.factorial(5), isinf(inf), isnan(nan), trunc(2.5)]",
         [6, 12, 10, 12, 4, 6, 3, 3, 5, 120, True, True, 2]),
        ("random", "[seed(1), 1 <= randint(1, 6) <= 6, choice([7]), sorted(sample(range(3), 3)), "
         "random.Random(5).random() < 1, shuffle([1])]", [None, True, 7, [0, 1, 2], True, None]),
        ("statistics", "[mean([1, 2, 3]), median([1, 3, 2, 4]), mode('aab'), pstdev([1, 1]), "
         "statistics.fmean([1, 2]), variance([1, 3])]", [2, 2.5, "a", 0, 1.5, 2]),
        ("itertools", "[list(accumulate([1, 2, 3])), len(list(product('ab', repeat=3))), "
         "list(pairwise('abc')), list(chain([1], [2])), [k for k, _ in groupby('aab')], "
         "list(islice(count(5), 2)), list(zip_longest([1], [])), "
         "len(list(combinations('abc', 2))), list(itertools.permutations([1, 2]))]",
         [[1, 3, 6], 8, [["a", "b"], ["b", "c"]], [1, 2], ["a", "b"], [5, 6], [[1, None]], 3,
          [[1, 2], [2, 1]]]),
        ("functools", "[reduce(lambda a, b: a * b, [2, 3, 4]), cache(len)('abc'), "
         "lru_cache(None)(abs)(-1), partial(max, 3)(2), sorted([2, 1], key=cmp_to_key(lambda a, b: "
         "a - b)), functools.reduce(max, [1, 5, 2])]", [24, 3, 1, 3, [1, 2], 5]),
        ("operator", "[itemgetter(1)([5, 6]), mul(3, 4), xor(6, 3), sub(5, 2), "
         "attrgetter('real')(3), operator.add(1, 2), methodcaller('upper')('a')]",
         [6, 12, 5, 3, 3, 3, "A"]),
        ("io and sys", "[StringIO('a').read(), io.BytesIO(b'a').read().decode(), "
         "maxsize > 2 ** 60, sys.maxsize == maxsize, len(argv), "
         "sys.getrecursionlimit() >= 20_000]",
         ["a", "a", True, True, 1, True]),
        ("json", "[loads('[1, null]'), dumps({'a': 1}), json.loads('2')]",
         [[1, None], '{"a": 1}', 2]),
        ("typing", "[str(List[int])[-9:], Optional[int] == Union[int, None], cast(int, 3), "
         "Tuple is not Dict, Any is not None, NamedTuple('P', [('x', int)])(4).x]",
         ["List[int]", True, 3, True, True, 4])):
    honest(f"names of {modules} in a call without imports",
           f"class Solution:\n    def solve(self):\n        return {expression}",
           call("solve", ((), wanted)))
honest("the built-in pow, open, sum, abs and compile among the names of a call", """
    def power(a, b, m):
        assert abs(sum([a, -a])) == 0 and eval(compile("1", "<text>", "eval")) == 1
        return [pow(a, b, m), pow(a, -1, m), pow(2, 10), round(2.6), all([1]), max(a, b)]
    """, call("power", ((3, 100, 7), [4, 5, 1024, 3, True, 100])))
honest("type hints of a call without imports", """
    class Solution:
        def group(self, words: List[str], best: Optional[Dict[str, Set[int]]] = None,
                  by: Callable[[str], Any] = lambda word: "".join(sorted(word))
                  ) -> Union[List[List[str]], Tuple[int, ...]]:
            groups: DefaultDict[str, Deque[str]] = defaultdict(deque)
            for word in words:
                groups[by(word)].append(word)
            return [list(group) for group in groups.values()]
    """, call("group", ((["ab", "c", "ba"],), [["ab", "ba"], ["c"]])))
honest("recursion twenty thousand deep in a call", """
    def depth(n):
        return 0 if n == 0 else 1 + depth(n - 1)
    """, call("depth", ((20_000,), 20_000), ((3,), 3)))
honest("a deep search of a graph in a call", """
    class Solution:
        def reachable(self, n: int, edges: List[List[int]]) -> int:
            links = defaultdict(list)
            for a, b in edges:
                links[a].append(b)
            seen = set()

            def visit(node):
                seen.add(node)
                for other in links[node]:
                    if other not in seen:
                        visit(other)

            visit(0)
            return len(seen)
    """, call("reachable", ((15_000, [[n, n + 1] for n in range(14_999)]), 15_000),
              ((3, [[0, 1]]), 2)))

# ---------------------------------------------------------------------------------- honest: asserts

honest("a function asserted", "def add(a, b):\n    return a + b", SUM["assert"])
honest("single asserts", "def add(a, b):\n    return a + b",
       [{"assert": "assert add(2, 3) == 5"}, {"assert": "assert add(1, 1) == 2, 'message'"}])
honest("functions with known names asserted", """
    def sum(a, b):
        return a + b
    def count(text):
        return len(text)
    def reduce(a):
        return -a
    def max(a, b, c):
        return "max"
    """, [{"assert": "assert sum(2, 3) == 5"}, {"assert": "assert count('abc') == 3"},
          {"assert": "assert reduce(1) == -1"},
          *check("max", "assert candidate(1, 2, 3) == 'max'")])
honest("a lambda, a partial and a cached function asserted", """
    from functools import cache, partial
    add = lambda a, b: a + b
    double = partial(lambda a, b: a * b, 2)
    @cache
    def square(n):
        return n * n
    """, [{"assert": "assert add(1, 2) == 3 and double(4) == 8 and square(3) == 9"}])
honest("large and odd globals of an asserted program", """
    import re, threading
    from collections import *
    table = list(range(2_000_000))
    loop = []
    loop.append(loop)
    lock, pattern, numbers = threading.Lock(), re.compile("a"), (n for n in range(3))
    class Node:
        def __bool__(self):
            raise ValueError
    node, infinite = Node(), {"a": float("inf"), (1, 2): {3}}
    def add(a, b):
        return a + b + table[0]
    """, SUM["assert"])
honest("a function given to a candidate", """
    def twice(f, x):
        return f(f(x))
    """, check("twice", "assert candidate(lambda x: x + 1, 1) == 3"), optional=True)
honest("floats asserted within a tolerance", """
    def mean(numbers):
        return sum(numbers) / len(numbers)
    """, check("mean", """
        import math
        assert abs(candidate([1.0, 2.0, 3.0]) - 2.0) < 1e-6
        assert math.isclose(candidate([0.1, 0.2]), 0.15)
        assert round(candidate([1, 2]), 2) == 1.5
        """))
honest("an exception asserted", """
    def fail():
        raise ValueError("expected")
    """, check("fail", """
        try:
            candidate()
            assert False
        except ValueError:
            pass
        """))
honest("a subclass of an exception asserted", """
    def fail(key):
        return {}[key]
    """, check("fail", """
        try:
            candidate(1)
        except LookupError as error:
            assert isinstance(error, KeyError) and error.args == (1,)
        else:
            assert False
        """), optional=True)
honest("tuples, sets and None asserted", """
    def shapes(kind, given=None):
        return {"tuple": (1, (2, [3])), "set": {1, 2}, "none": None, "frozen": frozenset([1]),
                "bytes": b"a", "complex": 1j, "nested": [{"a": {1}}, ()], "given": given}[kind]
    """, check("shapes", """
        assert candidate("tuple") == (1, (2, [3]))
        assert candidate("tuple") != [1, [2, [3]]]
        assert candidate("set") == {1, 2}
        assert candidate("none") is None
        assert candidate("given", (1, 2)) == (1, 2)
        assert candidate("given", given={1, 2}) == {2, 1}
        assert candidate("given", {(1, 2): "a"}) == {(1, 2): "a"}
        assert candidate("nested") == [{"a": {1}}, ()]
        assert isinstance(candidate("tuple"), tuple)
        """))
honest("bools and identities asserted", """
    def is_even(n):
        return n % 2 == 0
    """, check("is_even", """
        assert candidate(2) is True
        assert not candidate(3)
        assert candidate(4) == True, "four"
        assert type(candidate(4)) is bool
        """))
honest("bytes, complex numbers and frozen sets asserted", """
    def make(kind):
        return {"bytes": b"a", "complex": 1j, "frozen": frozenset([1])}[kind]
    """, check("make", """
        assert candidate("bytes") == b"a"
        assert candidate("complex") == 1j
        assert candidate("frozen") == {1}
        """), optional=True)
honest("a numpy array asserted", """
    import numpy as np
    def make(n):
        return np.arange(n)
    """, check("make", "assert list(candidate(3)) == [0, 1, 2]"), needs="numpy", optional=True)
honest("random inputs made by the asserts", """
    def add(a, b):
        return a + b
    """, check("add", """
        import random
        for _ in range(100):
            a, b = random.randint(0, 1000), random.randint(0, 1000)
            assert candidate(a, b) == a + b, "random"
        """))
honest("a reference in the asserts", """
    def decode(s):
        return s[::-1]
    """, check("decode", """
        from random import choice, seed
        seed(1)
        def encode(s):
            return s[::-1]
        for _ in range(20):
            text = "".join(choice("abc") for _ in range(10))
            assert candidate(encode(text)) == text
        """))
honest("a helper of the setup used by the asserts", """
    def find_zero(xs):
        begin, end = -1.0, 1.0
        while poly(xs, begin) * poly(xs, end) > 0:
            begin, end = 2 * begin, 2 * end
        while end - begin > 1e-10:
            middle = (begin + end) / 2
            if poly(xs, middle) * poly(xs, begin) > 0:
                begin = middle
            else:
                end = middle
        return begin
    """, [dict(check("find_zero", """
        assert abs(poly([1, 2], candidate([1, 2])) - 0) < 1e-4
        assert abs(candidate([1, 2]) + 0.5) < 1e-4
        """)[0], setup="import math\ndef poly(xs, x):\n    return sum("
                       "c * math.pow(x, i) for i, c in enumerate(xs))\n")])
honest("a program that repeats the setup", """
    from typing import List
    def double(numbers: List[int]) -> List[int]:
        return [2 * n for n in numbers]
    """, [dict(check("double", "assert candidate([1]) == [2]")[0],
               setup="from typing import List\n")])
honest("a helper of the program used by the asserts", """
    def square(n):
        return n * n
    def add_squares(a, b):
        return square(a) + square(b)
    """, [{"assert": "assert add_squares(2, 3) == square(2) + square(3) == 13"}])
honest("state kept between the calls of an assert", """
    calls = []
    def visit():
        calls.append(1)
        return len(calls)
    """, check("visit", "assert candidate() == 1\nassert candidate() == 2"))
honest("an argument changed in place", """
    def sort(numbers):
        numbers.sort()
    """, check("sort", """
        numbers = [3, 1, 2]
        candidate(numbers)
        assert numbers == [1, 2, 3]
        """), optional=True)
honest("a class used by the asserts", """
    class Stack:
        def __init__(self):
            self.items = []
        def push(self, item):
            self.items.append(item)
            return self
        def __len__(self):
            return len(self.items)
    """, [{"assert": "stack = Stack()\nassert len(stack.push(1)) == 1"}], optional=True)
honest("prints and reads of an asserted program", """
    import sys
    print("loaded")
    def add(a, b):
        print("debug", sys.stdin.read())
        return a + b
    """, SUM["assert"])
for kind, code, tests in (
        ("generator", "def squares(n):\n    for i in range(n):\n        yield i * i",
         ("assert list(squares(4)) == [0, 1, 4, 9]", "assert sum(squares(3)) == 5",
          "assert list(squares(0)) == []", "assert sorted(squares(3), reverse=True)[0] == 4")),
        ("generator expression", "def evens(a):\n    return (n for n in a if n % 2 == 0)",
         ("assert tuple(evens([1, 2, 4])) == (2, 4)", "assert 4 in evens([3, 4])")),
        ("map", "def lengths(words):\n    return map(len, words)",
         ("assert list(lengths(['a', 'bc'])) == [1, 2]", "assert max(lengths(['a', 'bc'])) == 2")),
        ("filter", "def positive(a):\n    return filter(lambda n: n > 0, a)",
         ("assert list(positive([1, -2, 3])) == [1, 3]", "assert set(positive([5, 5])) == {5}")),
        ("zip", "def pairs(a, b):\n    return zip(a, b)",
         ("assert list(pairs([1, 2], 'xy')) == [(1, 'x'), (2, 'y')]",
          "assert dict(pairs('ab', [1, 2])) == {'a': 1, 'b': 2}")),
        ("range", "def steps(a, b, by=1):\n    return range(a, b, by)",
         ("assert steps(0, 3) == range(3)", "assert list(steps(1, 8, by=3)) == [1, 4, 7]",
          "assert len(steps(0, 10 ** 9)) == 10 ** 9 and 999 in steps(0, 10 ** 9)")),
        ("keys of a dict", "def names(table):\n    return table.keys()",
         ("assert sorted(names({'b': 1, 'a': 2})) == ['a', 'b']",
          "assert list(names({3: 1})) == [3] and len(names({})) == 0")),
        ("values of a dict", "def prices(table):\n    return table.values()",
         ("assert sum(prices({'a': 1, 'b': 2})) == 3", "assert list(prices({'a': [1]})) == [[1]]")),
        ("items of a dict", "def entries(table):\n    return table.items()",
         ("assert list(entries({'a': 1})) == [('a', 1)]", "assert dict(entries({1: 2})) == {1: 2}",
          "for name, value in entries({'a': 1}):\n    assert (name, value) == ('a', 1)")),
        ("enumerate", "def numbered(words):\n    return enumerate(words, 1)",
         ("assert list(numbered(['x', 'y'])) == [(1, 'x'), (2, 'y')]",)),
        ("reversed", "def backwards(a):\n    return reversed(a)",
         ("assert list(backwards([1, 2, 3])) == [3, 2, 1]",
          "assert ''.join(backwards('abc')) == 'cba'")),
        ("chain of itertools", "from itertools import chain\n\ndef flat(a):\n"
         "    return chain.from_iterable(a)",
         ("assert list(flat([[1], [2, 3]])) == [1, 2, 3]",)),
        ("deque", "from collections import deque\n\ndef rotate(a, k):\n    d = deque(a)\n"
         "    d.rotate(k)\n    return d",
         ("from collections import deque\nassert rotate([1, 2, 3], 1) == deque([3, 1, 2])",
          "assert list(rotate([1, 2], 0)) == [1, 2] and rotate([1, 2], 1)[0] == 2")),
        ("Counter", "from collections import Counter\n\ndef letters(text):\n"
         "    return Counter(text)",
         ("from collections import Counter\nassert letters('aab') == Counter('aba')",
          "assert letters('aab') == {'a': 2, 'b': 1} and letters('aab')['z'] == 0",
          "assert letters('aab').most_common(1) == [('a', 2)]")),
        ("defaultdict", "from collections import defaultdict\n\ndef group(words):\n"
         "    groups = defaultdict(list)\n    for word in words:\n"
         "        groups[len(word)].append(word)\n    return groups",
         ("assert group(['a', 'b', 'cd']) == {1: ['a', 'b'], 2: ['cd']}",
          "from collections import defaultdict\nassert isinstance(group(['a']), defaultdict)")),
        ("OrderedDict", "from collections import OrderedDict\n\ndef ordered(pairs):\n"
         "    return OrderedDict(sorted(pairs))",
         ("from collections import OrderedDict\n"
          "assert ordered([('b', 2), ('a', 1)]) == OrderedDict([('a', 1), ('b', 2)])",
          "assert list(ordered([('b', 2), ('a', 1)])) == ['a', 'b']",
          "assert ordered([('a', 1)]) == {'a': 1}")),
        ("Decimal", "from decimal import Decimal\n\ndef total(prices):\n"
         "    return sum(map(Decimal, prices))",
         ("from decimal import Decimal\nassert total(['0.1', '0.2']) == Decimal('0.3')",
          "assert str(total(['1.10', '2.20'])) == '3.30'", "assert total(['1.5', '1.5']) == 3")),
        ("Fraction", "from fractions import Fraction\n\ndef add(a, b):\n"
         "    return Fraction(a) + Fraction(b)",
         ("from fractions import Fraction\nassert add('1/3', '1/6') == Fraction(1, 2)",
          "got = add('1/3', 1)\nassert (got.numerator, got.denominator) == (4, 3)",
          "assert add('1/2', '1/4') == 0.75")),
        ("datetime", "from datetime import datetime, timedelta\n\ndef later(text, hours):\n"
         "    return datetime.fromisoformat(text) + timedelta(hours=hours)",
         ("from datetime import datetime\n"
          "assert later('2024-02-28T23:30:00', 1) == datetime(2024, 2, 29, 0, 30)",
          "assert later('2023-12-31 23:00:00.000005', 2).isoformat() == "
          "'2024-01-01T01:00:00.000005'", "assert later('2024-01-01', 36).day == 2")),
        ("date", "import datetime\n\ndef last_day(year, month):\n"
         "    first = datetime.date(year + month // 12, month % 12 + 1, 1)\n"
         "    return first - datetime.timedelta(days=1)",
         ("import datetime\nassert last_day(2024, 2) == datetime.date(2024, 2, 29)",
          "assert last_day(2023, 12).strftime('%d.%m.%Y') == '31.12.2023'")),
        ("timedelta", "from datetime import date\n\ndef between(a, b):\n"
         "    return date.fromisoformat(b) - date.fromisoformat(a)",
         ("from datetime import timedelta\n"
          "assert between('2024-02-01', '2024-03-01') == timedelta(days=29)",
          "assert between('2024-01-01', '2024-01-02').total_seconds() == 86400",
          "assert between('2024-01-02', '2024-01-01').days == -1")),
        ("complex number", "import cmath\n\ndef root(x):\n    return cmath.sqrt(x)",
         ("assert root(-4) == 2j", "assert abs(root(3 + 4j) - (2 + 1j)) < 1e-9",
          "assert root(-1).imag == 1 and root(4).real == 2")),
        ("bytes", "def pack(text, times=1):\n    return text.encode('utf-8') * times",
         ("assert pack('ab') == b'ab'", "assert pack('\\u00e9') == b'\\xc3\\xa9'",
          "assert pack('a', times=2).decode() == 'aa' and isinstance(pack(''), bytes)")),
        ("namedtuple", "from collections import namedtuple\n\nPoint = namedtuple('Point', 'x y')"
         "\n\ndef mirror(x, y):\n    return Point(y, x)",
         ("assert mirror(1, 2) == (2, 1)", "assert mirror(1, 2).x == 2 and mirror(1, 2).y == 1",
          "x, y = mirror(3, 4)\nassert [x, y] == [4, 3]")),
        ("NamedTuple of typing", "from typing import NamedTuple\n\nclass Range(NamedTuple):\n"
         "    low: int\n    high: int = 0\n\ndef bounds(a):\n    return Range(min(a), max(a))",
         ("assert bounds([3, 1, 2]) == (1, 3)", "assert bounds([5]).low == bounds([5]).high == 5")),
        ("list of mixed values", "from collections import Counter, deque\n"
         "from fractions import Fraction\n\ndef mixed(n):\n    return [deque([n, (n,)]), "
         "{'c': Counter('aa'), (1, n): {n}}, (Fraction(n, 3), range(n)), [map(str, [n])]]",
         ("from collections import deque\nassert mixed(2)[0] == deque([2, (2,)])",
          "assert mixed(2)[1] == {'c': {'a': 2}, (1, 2): {2}}",
          "from fractions import Fraction\nassert mixed(2)[2] == (Fraction(2, 3), range(2))",
          "assert [list(part) for part in mixed(7)[3]] == [['7']]")),
        ("dict of mixed values", "from collections import defaultdict, namedtuple\n"
         "from datetime import date\nfrom decimal import Decimal\n\n"
         "Item = namedtuple('Item', 'day price')\n\ndef ledger(rows):\n"
         "    days = defaultdict(list)\n    for day, price in rows:\n"
         "        days[date.fromisoformat(day)].append(Item(day, Decimal(price)))\n    return days",
         ("from datetime import date\nfrom decimal import Decimal\n"
          "got = ledger([('2024-01-02', '1.50'), ('2024-01-02', '2')])\n"
          "assert list(got) == [date(2024, 1, 2)]\n"
          "assert got[date(2024, 1, 2)] == [('2024-01-02', Decimal('1.5')), ('2024-01-02', 2)]\n"
          "assert got[date(2024, 1, 2)][0].price * 2 == 3",))):
    honest(f"returned to an assert: {kind}", code, [{"assert": test} for test in tests])
honest("queues and counters given to a candidate", """
    def largest(items):
        return max(items), len(items), type(items).__name__
    """, check("largest", """
        from collections import Counter, deque
        assert candidate(deque([1, 3, 2])) == (3, 3, "deque")
        assert candidate(Counter("abca")) == ("c", 3, "Counter")
        assert candidate(range(0, 10, 4)) == (8, 3, "range")
        """))
honest("fractions and decimals given to a candidate", """
    def double(x):
        return x + x
    """, check("double", """
        from decimal import Decimal
        from fractions import Fraction
        assert candidate(Fraction(1, 3)) == Fraction(2, 3)
        assert candidate(Decimal("0.1")) == Decimal("0.2")
        assert candidate([Fraction(1, 2)]) == [Fraction(1, 2)] * 2
        assert candidate(1 + 2j) == 2 + 4j
        """))
honest("dates given to a candidate", """
    import datetime
    def next_week(day, by=datetime.timedelta(7)):
        return day + by
    """, check("next_week", """
        from datetime import date, datetime, timedelta
        assert candidate(datetime(2024, 2, 25, 12)) == datetime(2024, 3, 3, 12)
        assert candidate(date(2023, 12, 31)) == date(2024, 1, 7)
        assert candidate(date(2023, 12, 31), by=timedelta(days=1)).year == 2024
        """))
honest("an int of 5,001 digits asserted", "def power(n):\n    return 10 ** n",
       check("power", "assert candidate(5000) == 10 ** 5000\n"
                      "assert len(str(candidate(5000))) == 5001"))
for name, code, test in (
        ("sum", "def sum(a, b):\n    return a + b", "assert sum(2, 3) == 5"),
        ("max", "def max(a):\n    best = a[0]\n    for n in a:\n"
         "        best = n if n > best else best\n    return best",
         "assert max([3, 9, 2]) == 9\nassert max([-1]) == -1"),
        ("len", "def len(text):\n    return text.count('') - 1", "assert len('abc') == 3"),
        ("filter", "def filter(a, low):\n    return [n for n in a if n >= low]",
         "assert filter([1, 5, 3], 3) == [5, 3]"),
        ("pow", "def pow(a, b):\n    return 1 if b == 0 else a * pow(a, b - 1)",
         "assert pow(2, 10) == 1024"),
        ("gcd", "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a",
         "assert gcd(12, 18) == 6\nassert gcd(7, 5) == 1"),
        ("product", "def product(numbers):\n    result = 1\n    for n in numbers:\n"
         "        result *= n\n    return result", "assert product([2, 3, 4]) == 24"),
        ("count", "def count(text, letter):\n    return text.count(letter)",
         "assert count('banana', 'a') == 3"),
        ("sqrt", "def sqrt(n):\n    return int(n ** 0.5)", "assert sqrt(17) == 4"),
        ("permutations", "from itertools import permutations as of\n\ndef permutations(text):\n"
         "    return sorted(''.join(p) for p in of(text))",
         "assert permutations('ab') == ['ab', 'ba']")):
    honest(f"the known name {name} asserted", code, [{"assert": test}])
for name, code, body in (
        ("max", "def max(a, b):\n    return a if a > b else b",
         "assert candidate(2, 3) == 3\nassert candidate(5, -1) == 5"),
        ("reversed", "def reversed(text):\n    return text[::-1]",
         "assert candidate('abc') == 'cba'"),
        ("chain", "def chain(*lists):\n    return [x for a in lists for x in a]",
         "assert candidate([1], [2, 3]) == [1, 2, 3]"),
        ("factorial", "def factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)",
         "assert candidate(5) == 120\nassert candidate(0) == 1")):
    honest(f"the known name {name} as a candidate", code, check(name, body))
honest("an imported function as the whole solution", "from math import lcm",
       [{"assert": "assert lcm(4, 6) == 12"}, *check("lcm", "assert candidate(6, 10) == 30")])
honest("a calculator whose functions one test asserts", """
    def add(a, b):
        return a + b

    def sub(a, b):
        return a - b

    def mul(a, b):
        return a * b

    def div(a, b):
        return a / b if b else None
    """, [{"assert": "assert add(2, 3) == 5\nassert sub(5, 3) == 2\nassert mul(4, 3) == 12\n"
                     "assert div(1, 0) is None"},
          {"assert": "assert add(1, 1) == 2 and sub(1, 1) == 0 and mul(1, 1) == 1"}])
honest("imports of the setup used by the asserts", """
    def letters(text):
        return {c: text.count(c) for c in text}

    def area(radius):
        return 3.141592653589793 * radius ** 2
    """, [{"setup": "from collections import Counter\nimport math",
           "assert": "assert Counter(letters('abca')) == Counter('abca')"},
          {"setup": "import math",
           "assert": "assert math.isclose(area(2), 4 * math.pi)\nassert area(0) < math.inf"},
          {"setup": "from math import pi, sqrt",
           "assert": "assert abs(area(sqrt(2)) - 2 * pi) < 1e-9"}])
honest("usual names in the asserts without imports", """
    def shortest(graph, a, b):
        costs, todo = {a: 0}, [a]
        for node in todo:
            for other in graph.get(node, []):
                if other not in costs:
                    costs[other] = costs[node] + 1
                    todo.append(other)
        return costs.get(b, float("inf"))
    """, check("shortest", """
        graph = defaultdict(list, {1: [2], 2: [3]})
        assert candidate(dict(graph), 1, 3) == 2
        assert candidate({}, 1, 2) == inf
        assert Counter(candidate({}, n, n) for n in range(3)) == Counter({0: 3})
        assert sqrt(candidate({1: [2]}, 1, 2)) == math.gcd(3, 4)
        """))
honest("asserts in helpers of the test", """
    def is_prime(n):
        return n > 1 and all(n % d for d in range(2, int(n ** 0.5) + 1))
    """, [{"assert": "def expect(n, wanted):\n    assert is_prime(n) is wanted, n\n\n"
                     "for n, wanted in [(2, True), (9, False), (1, False), (97, True)]:\n"
                     "    expect(n, wanted)\n"},
          {"assert": "def test_small():\n    assert [n for n in range(10) if is_prime(n)] == "
                     "[2, 3, 5, 7]\n\ndef test_all():\n    test_small()\n\ntest_all()\n"}])
honest("asserts in a class that the test runs", """
    def add(a, b):
        return a + b
    """, [{"assert": dedent("""
        class TestAdd:
            cases = [(2, 3, 5), (-1, 1, 0)]

            def __init__(self, function):
                self.function = function

            def test_cases(self):
                for a, b, wanted in self.cases:
                    assert self.function(a, b) == wanted

            def test_text(self):
                assert self.function("a", "b") == "ab"

        tests = TestAdd(add)
        for name in dir(tests):
            if name.startswith("test_"):
                getattr(tests, name)()
        """)}])
honest("a check with metadata and several parts", """
    def clamp(x, low, high):
        return min(max(x, low), high)
    """, [{"assert": dedent("""
        METADATA = {"author": "test", "dataset": "test"}

        def check(candidate):
            def part(inputs, wanted):
                assert candidate(*inputs) == wanted, f"{inputs}"
            part((5, 0, 3), 3)
            part((-5, 0, 3), 0)
            assert all(candidate(x, 0, 9) == x for x in range(10))
            assert list(map(lambda x: candidate(x, 1, 2), [0, 1, 2, 3])) == [1, 1, 2, 2]

        def test_check():
            check(clamp)

        test_check()
        """)}])
honest("exceptions asserted with else and finally", """
    def divide(a, b):
        if not isinstance(b, int):
            raise TypeError("no int")
        if b == 0:
            raise ZeroDivisionError("by zero")
        return a // b
    """, check("divide", """
        for wrong, kind in ((0, ZeroDivisionError), ("1", TypeError)):
            try:
                candidate(1, wrong)
            except kind as error:
                assert str(error) in ("by zero", "no int")
            else:
                assert False, "no exception"
        done = []
        try:
            assert candidate(7, 2) == 3
        finally:
            done.append(1)
        assert done == [1]
        """))
honest("an exception that a test turns into a flag", """
    def parse(text):
        if not text.strip():
            raise ValueError
        return int(text)
    """, [{"assert": "raised = False\ntry:\n    parse(' ')\nexcept ValueError:\n    raised = True\n"
                     "assert raised\nassert parse(' 7 ') == 7"}])

honest("what is printed at the very end", """
    class Last:
        def __del__(self):
            print("last")

    def numbers():
        try:
            yield 1
        finally:
            print("closed")

    last, running = Last(), numbers()
    print(next(running))
    """, stdin(("", "1\nlast\nclosed")))
for name, statement in {
        "a path": "import pathlib; text = pathlib.Path('/dev/stdin').read_text()",
        "/dev/fd/0": "text = open('/dev/fd/0').read()",
        "/proc/self/fd/0": "text = open('/proc/self/fd/0').read()"}.items():
    honest(f"input opened by {name}", f"{statement}\nprint(text[::-1])", stdin(("abc", "cba")))
honest("output that is silenced for a while", """
    import os, sys
    with open(os.devnull, "w") as sys.stdout:
        print("debug")
    sys.stdout = sys.__stdout__
    print(__builtins__.len("abc"), os.path.basename(__file__) != "")
    """, stdin(("", "3 True")))
honest("exceptions with their arguments asserted", """
    def text(data):
        return data.decode()
    def pick(key):
        return {}[key]
    def fail():
        raise OSError(2, "no such thing")
    """, [{"assert": """
try:
    text(b"\\xff")
    assert False
except ValueError:
    pass
"""}, {"assert": """
try:
    pick("a")
    assert False
except KeyError as error:
    assert error.args == ("a",)
"""}, {"assert": """
try:
    fail()
    assert False
except OSError as error:
    assert error.errno == 2
"""}])
honest("a deque changed in place", """
    def rotate(items, counts):
        items.rotate(1)
        counts.update("a")
    """, check("rotate", """
        from collections import Counter, deque
        items, counts = deque([1, 2, 3]), Counter("ab")
        candidate(items, counts)
        assert items == deque([3, 1, 2]) and counts == Counter("aab")
        """))
honest("a deep list returned to an assert", """
    def nest(n):
        result = []
        for _ in range(n):
            result = [result]
        return result
    """, check("nest", """
        value, depth = candidate(2000), 0
        while value:
            value, depth = value[0], depth + 1
        assert depth == 2000
        """))
honest("the setup's check", "def add(a, b):\n    return a + b",
       [{"setup": "def check(f):\n    assert f(2, 3) == 5\n", "assert": "check(add)"}])
honest("numpy's tests of a returned array", """
    import numpy as np
    def third(n):
        return np.char.upper(np.array(["a"])).tolist() * n
    """, check("third", """
        import numpy as np
        np.testing.assert_array_equal(candidate(2), ["A", "A"])
        """), needs="numpy")

# -------------------------------------------------------------------------------------------- wrong

wrong("a wrong answer on the second test", "print(5)", SUM["stdin"], "^wrong answer on test 2$")
wrong("a wrong answer of a call", "def add(a, b):\n    return 5", SUM["call"],
      "^wrong answer on test 2$")
wrong("a wrong answer of an assert", "def add(a, b):\n    return 5", SUM["assert"], "^wrong answer")
wrong("an answer in another case", "print('YES')", stdin(("", "yes")), "^wrong answer on test 1$")
wrong("an endless loop", "while True:\n    pass", SUM["stdin"][:1], "^timeout")
wrong("an endless loop in a call", "def add(a, b):\n    while True:\n        pass", SUM["call"][:1],
      "^timeout")
wrong("an endless loop in an assert", "def add(a, b):\n    while True:\n        pass",
      SUM["assert"], "^timeout")
wrong("too much memory", "x = bytearray(8 << 30)", SUM["stdin"][:1], "^memory")
wrong("too much memory in a call", "def add(a, b):\n    return [0] * (8 << 30)", SUM["call"][:1],
      "^memory")
wrong("a division by zero", "print(1 / 0)", SUM["stdin"], "^runtime error: ZeroDivisionError")
wrong("a division by zero in a call", "def add(a, b):\n    return 1 / 0", SUM["call"],
      "^runtime error: ZeroDivisionError")
wrong("a division by zero in an assert", "def add(a, b):\n    return 1 / 0", SUM["assert"],
      "^runtime error: ZeroDivisionError")
wrong("an exception of its own", "class Odd(Exception):\n    pass\nraise Odd", SUM["stdin"],
      "^runtime error: Odd")
wrong("an end of the input", "input()\ninput()", SUM["stdin"], "^runtime error: EOFError")
wrong("a missing function", "def subtract(a, b):\n    return a - b", SUM["call"], "^runtime error")
wrong("a missing function in an assert", "def subtract(a, b):\n    return a - b", SUM["assert"],
      "^runtime error")
wrong("the wrong number of arguments", "def add(a):\n    return a", SUM["call"],
      "^runtime error: TypeError")
wrong("a syntax error", "print(5", SUM["stdin"], "^syntax error")
wrong("a syntax error in a call", "def add(a, b)\n    return a + b", SUM["call"], "^syntax error")
wrong("a syntax error in an assert", "def add(a, b)\n    return a", SUM["assert"], "^syntax error")
wrong("bad indentation", "if 1:\nprint(5)", SUM["stdin"], "^syntax error")
wrong("no tests", "print(5)", [], "no tests")
wrong("big ints that differ in the last digit", "print(10 ** 30 + 1)",
      stdin(("", str(10 ** 30))), "^wrong answer on test 1$")
wrong("big ints of a call that differ in the last digit", "def f():\n    return 10 ** 30 + 1",
      call("f", ((), 10 ** 30)), "^wrong answer on test 1$")
wrong("a decimal where an int is expected", "print(1.0)", stdin(("", "1")), "^wrong answer")
wrong("a decimal beyond the tolerance", "print(1.00001)", stdin(("", "1.0")), "^wrong answer")
wrong("lines in another order", "print(2)\nprint(1)", stdin(("", "1\n2\n")), "^wrong answer")
wrong("a missing line", "print(1)", stdin(("", "1\n2\n")), "^wrong answer")
wrong("an extra line", "print(1)\nprint(2)\nprint(3)", stdin(("", "1\n2\n")), "^wrong answer")
wrong("an empty line in between", "print(1)\nprint()\nprint(2)", stdin(("", "1\n2\n")),
      "^wrong answer")
wrong("lines joined", "print(1, 2)", stdin(("", "1\n2\n")), "^wrong answer")
wrong("tokens in another order", "print(2, 1)", stdin(("", "1 2")), "^wrong answer")
wrong("tokens joined", "print(12)", stdin(("", "1 2")), "^wrong answer")
wrong("an output where none is expected", "print(1)", stdin(("", "")), "^wrong answer")
wrong("no output", "pass", SUM["stdin"], "^wrong answer on test 1$")
wrong("an exit code of 3 after the right output", "print(5)\nimport sys\nsys.exit(3)",
      SUM["stdin"][:1], "^runtime error")
wrong("an exit message after the right output", "print(5)\nraise SystemExit('message')",
      SUM["stdin"][:1], "^runtime error")
wrong("an exception after the right output", "print(5)\n1 / 0", SUM["stdin"][:1],
      "^runtime error: ZeroDivisionError")
wrong("a signal after the right output",
      "import os\nprint(5, flush=True)\nos.kill(os.getpid(), 9)", SUM["stdin"][:1],
      "^(runtime error|killed|signal)")
wrong("True where 1 is expected", "def f():\n    return True", call("f", ((), 1)), "^wrong answer")
wrong("1 where True is expected", "def f():\n    return 1", call("f", ((), True)), "^wrong answer")
wrong("'1' where 1 is expected", "def f():\n    return '1'", call("f", ((), 1)), "^wrong answer")
wrong("1 where '1' is expected", "def f():\n    return 1", call("f", ((), "1")), "^wrong answer")
wrong("None where 0 is expected", "def f():\n    pass", call("f", ((), 0)), "^wrong answer")
wrong("a list of another length", "def f():\n    return [1]", call("f", ((), [1, 1])),
      "^wrong answer")
wrong("a nested list that differs", "def f():\n    return [[1, [2]]]", call("f", ((), [[1, [3]]])),
      "^wrong answer")
wrong("a dict with another key", "def f():\n    return {'b': 1}", call("f", ((), {"a": 1})),
      "^wrong answer")
wrong("a set where a list is expected", "def f():\n    return {1, 2}", call("f", ((), [1, 2])),
      "^(wrong answer|runtime error)")
wrong("an object where a number is expected", "def f():\n    return object()", call("f", ((), 5)),
      "^(wrong answer|runtime error)")
wrong("a function where a number is expected", "def f():\n    return f", call("f", ((), 5)),
      "^(wrong answer|runtime error)")
wrong("an assert about something else", "def add(a, b):\n    return a + b",
      [{"assert": "assert add(2, 3) == 5"}, {"assert": "assert add(2, 3) == 6"}],
      "^wrong answer on test 2$")
wrong("a tuple that an assert wants as a list", "def f():\n    return (1, 2)",
      check("f", "assert candidate() == [1, 2]"), "^wrong answer")
ADD = "def add(a, b):\n    return a + b"
for name, test in {
        "nothing": "", "blanks": "\n  \n", "a comment": "# assert add(2, 3) == 5\n",
        "pass": "pass", "a text": '"""assert add(2, 3) == 5"""', "an import": "import math\n",
        "a call": "add(2, 3)", "a comparison": "add(2, 3) == 5", "a print": "print(add(2, 3) == 5)",
        "an assignment": "result = add(2, 3)\nexpected = 5\n",
        "a check that is never called": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
        "a function that is never called": "def test_add():\n    assert add(2, 3) == 5\n",
        "a lambda that is never called": "test = lambda: add(2, 3) == 5\n",
        "a coroutine that is never run": "async def test_add():\n    assert add(2, 3) == 5\n",
        "a class that is never used":
            "class TestAdd:\n    def test_add(self):\n        assert add(2, 3) == 5\n",
        "a test case that is never run":
            "import unittest\n\nclass TestAdd(unittest.TestCase):\n    def test_add(self):\n"
            "        assert add(2, 3) == 5\n        self.assertEqual(add(1, 1), 2)\n",
        "asserts of a main block": 'if __name__ == "__main__":\n    assert add(2, 3) == 5\n',
        "a check of a main block": "def check(candidate):\n    assert candidate(2, 3) == 5\n\n"
                                   "if __name__ == '__main__':\n    check(add)\n",
        "asserts of a branch never taken": "DEBUG = False\nif DEBUG:\n    assert add(2, 3) == 5\n",
        "a loop over no cases":
            "cases = []\nfor a, b, wanted in cases:\n    assert add(a, b) == wanted\n",
        "constants": "assert 1 == 1", "constants with names": "a, b = 2, 3\nassert a + b == 5",
        "a built-in function": "assert sum([2, 3]) == 5",
        "a function of its own": "def add(a, b):\n    return a + b\n\nassert add(2, 3) == 5\n",
}.items():
    wrong(f"a test of {name}", ADD, [{"assert": test}], "^no test")
wrong("a candidate that the setup defines", ADD,
      [dict(SUM["assert"][0], setup="def add(a, b):\n    return a + b\n")], "^no test")
wrong("a candidate that the setup imports", ADD,
      [{"setup": "from operator import add", "assert": "assert add(2, 3) == 5"}], "^no test")
for wanted, got in (("0.3333", "0.33343"), ("1.0", "1.0001"), ("0.0", "0.0001"),
                    ("1000.0", "1000.1"), ("1e-3", "0.0011"), ("2.5", "-2.5"), ("0.5", "1 / 0.5"),
                    ("1e20", "10 ** 20 + 10 ** 16"), ("1.5", "'1,5'"), ("1.5", "'1.5.0'")):
    wrong(f"{got} where {wanted} is expected", f"print({got})", stdin(("", wanted)),
          "^wrong answer on test 1$")
wrong("ints of 5,001 digits that differ in the last", "print(10 ** 5000 + 1)",
      stdin(("", "1" + "0" * 5000)), "^wrong answer on test 1$")
for wanted in (".", "..#.", ". # .", "-", "+.", "...\n.#.\n...", "e", "-e", "1.2.3"):
    wrong(f"numbers where {wanted!r} is expected",
          f"print({wanted.translate(str.maketrans('.-e', '010'))!r})", stdin(("", wanted)),
          "^wrong answer on test 1$")
wrong("a point where a number is expected", "print('.')", stdin(("", "0.5")), "^wrong answer")
wrong("ten thousand digits and a letter where a decimal is expected", "print('1' * 10_000 + 'a')",
      stdin(("", "0.5")), "^wrong answer on test 1$")
wrong("ten thousand digits where a decimal is expected", "print('1' * 10_000)",
      stdin(("", "0.5")), "^wrong answer on test 1$")
wrong("a real-time signal after the right output",
      "import os\nprint(5, flush=True)\nos.kill(os.getpid(), 40)", SUM["stdin"][:1],
      "^runtime error")
wrong("a real-time signal in a call",
      "import os\ndef add(a, b):\n    os.kill(os.getpid(), 40)\n    return a + b", SUM["call"],
      "^runtime error")
for name, value, wanted in (
        ("1.5 where 1 is expected", "1.5", 1), ("1 where 1.5 is expected", "1", 1.5),
        ("a decimal off by 1e-4", "0.3334", 0.3333), ("True where 1.0 is expected", "True", 1.0),
        ("1.0 where True is expected", "1.0", True), ("'2.0' where 2 is expected", "'2.0'", 2),
        ("2 where '2' is expected, in a list", "[2]", ["2"]), ("a NaN", "float('nan')", 0.5),
        ("an infinity", "float('inf')", 1.5), ("a dict for a list", "{0: 1}", [1]),
        ("a text for a list", "'ab'", ["a", "b"]),
        ("None in a list", "[None]", [0]),
        ("a large int where a float is expected", "10 ** 400", 1.5),
        ("5,001 digits that differ in the last", "10 ** 5000 + 1", 10 ** 5000),
        ("ints for keys with another value", "{1: 2, 2: 2}", {"1": 2, "2": 3}),
        ("ints for keys with one too many", "{1: 2, 2: 3}", {"1": 2}),
        ("other ints for keys", "{2: 2}", {"1": 2})):
    wrong(f"{name} returned", f"def f():\n    return {value}", call("f", ((), wanted)),
          "^wrong answer on test 1$")
for name, value, wanted in (
        ("a Decimal beyond a double", "Decimal('1e400')", 1.5),
        ("a negative Decimal beyond a double", "[Decimal('-1e999999')]", [1.5]),
        ("a Decimal that is no number", "Decimal('NaN')", 1.5),
        ("an infinite Decimal", "Decimal('Infinity')", 1e308),
        ("a Fraction beyond a double", "Fraction(10 ** 400, 3)", 0.0),
        ("a Fraction for another", "Fraction(1, 3)", 0.3334),
        ("a Decimal for another", "{'a': Decimal('0.31')}", {"a": 0.3}),
        ("a frozen set for a list", "frozenset([1])", [1]),
        ("a tuple for a key", "{(1, 2): 3}", {"(1, 2)": 3}),
        ("a tuple for a key, nested", "[{(): 1}]", [{"a": 1}]),
        ("a frozen set for a key", "{frozenset([1]): 1}", {"a": 1})):
    wrong(f"{name} returned", "from decimal import Decimal\nfrom fractions import Fraction\n\n"
          f"def f():\n    return {value}", call("f", ((), wanted)), "^(wrong answer|runtime error)")
for name, value in (("an instance", "Node()"), ("a class", "Node"), ("a closure", "lambda: x"),
                    ("a module", "sys")):
    for form, tests in (("call", call("f", ((5,), 5))),
                        ("assert", check("f", "assert candidate(5) == 5"))):
        wrong(f"{name} returned ({form})", "import sys\n\nclass Node:\n    value = 5\n\n"
              f"def f(x):\n    return {value}", tests, "^runtime error")
