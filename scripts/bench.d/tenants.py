"""What one tenant waits for a run, alone, beside processes that only compute, and beside as many that attack the daemon.

Those who talk have nothing to do with the daemon: on some kernels a new process waits seconds beside many that wake each
other, so what a flood of calls costs has to be compared with that.
"""
import os
import random
import select
import signal
import socket
import time

from __main__ import RUNS, alternate
from daemon import Daemon, Peer, kill_all

TITLE, UNIT = "a confined true, asked of the daemon by one tenant", "ms"
RATIOS, RATIO_OF, APT, CARGO = ["beside who computes", "beside who talks"], "p99", [], []

ROUNDS, COPIES = 10, 2  # of each way to be hostile
TENANT, HOSTILE = 54_321, 54_400  # each hostile process has a uid, and so a share of connections, of its own
ALARM_S = 120  # so that none outlives a benchmark that was killed
CALL = '{"method":"io.broker.Control.%s","parameters":%s}\0'
RUN = '{"policy":"%s","command":["true"],"environment":[],"path":"/bin","streams":{}}'
DESCRIBE = b'{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"io.broker.Control"}}\0'


def connected(path):
    one = socket.socket(socket.AF_UNIX)
    one.settimeout(2)
    one.connect(path)
    return one


def converse(path, *calls):
    """One call after the other, as fast as they are answered."""
    with connected(path) as one:
        while True:
            for call in calls:
                one.sendall(call.encode())
                if not one.recv(1 << 20):
                    return


def computes(path):
    while True:
        pass


def echoes(path):
    """A server that is not ours."""
    with socket.socket(socket.AF_UNIX) as server, select.epoll() as ready:
        server.bind(f"\0{path}")
        server.listen(64)
        ready.register(server, select.EPOLLIN)
        ones = {}
        while True:
            for number, _ in ready.poll():
                if number == server.fileno():
                    one, _ = server.accept()
                    ones[one.fileno()] = one
                    ready.register(one, select.EPOLLIN)
                else:
                    ones[number].send(20 * ones[number].recv(8192))


def talks(path):
    converse(f"\0{path}", DESCRIBE.decode())


def garbage(path):
    """Messages that are none."""
    with connected(path) as one:
        while True:
            one.sendall(random.randbytes(300) + b"\0")


def calls(path):
    """Calls that are answered."""
    converse(path, CALL % ("List", "{}"), CALL % ("Kill", '{"sandbox":"1-1"}'), DESCRIBE.decode())


def denied(path):
    """Calls that are denied, and recorded."""
    converse(path, CALL % ("Run", RUN % "build"))


def connects(path):
    """Comes and goes."""
    for _ in range(1000):
        connected(path).close()


def descriptors(path):
    """As many as the kernel takes on a message, thousands of times."""
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        with connected(path) as one:
            while True:
                socket.send_fds(one, [b" "], [null] * 253)
    finally:
        os.close(null)


def held(path, begin):
    """Nearly as many connections as a user may have, and all may have together; one byte on each from time to time."""
    ones = [connected(path) for _ in range(60)]
    try:
        for one in ones:
            begin(one)
        for _ in range(100):
            time.sleep(0.05)
            for one in ones:
                try:
                    one.send(b" ")
                except OSError:
                    pass
    finally:
        for one in ones:
            one.close()


def slow(path):
    """Messages that take for ever."""
    held(path, lambda one: one.send(b"{"))


def half(path):
    """Half a message, and no more to come."""
    held(path, lambda one: (one.send(b"{"), one.shutdown(socket.SHUT_WR)))


def deaf(path):
    """Asks for much, and reads nothing."""
    def begin(one):
        one.setblocking(False)
        try:
            while True:
                one.send(DESCRIBE)
        except BlockingIOError:
            pass
    held(path, begin)


def runs(path):
    """What the tenant does, by who may do it too."""
    converse(path, CALL % ("Run", RUN % "default"))


WAYS = [garbage, calls, denied, connects, descriptors, slow, half, deaf]
COUNT = COPIES * len(WAYS)
CASES = [
    ("alone", [], "nothing else asks"),
    ("beside who computes", [computes] * COUNT, f"{COUNT} processes compute and leave the daemon alone"),
    ("beside who talks", [echoes] + [talks] * (COUNT - 1), f"{COUNT} processes talk to each other over Unix sockets"),
    ("beside who attacks", WAYS * COPIES, f"{COUNT} processes: {', '.join(way.__name__ for way in WAYS)}"),
    *((f"beside {way.__name__} alone", [way] * COUNT, f"{COUNT} processes: {way.__doc__}") for way in WAYS),
    ("beside who runs as much", [runs] * COUNT, f"{COUNT} other tenants run the same, one after the other"),
]


def started(way, uid, path):
    """A process of `uid` that does it again and again, whatever the daemon does to it."""
    if pid := os.fork():
        return pid
    try:
        signal.alarm(ALARM_S)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        while True:
            try:
                way(path)
            except OSError:
                time.sleep(0.001)
    finally:
        os._exit(1)


def beside(daemon, ways):
    """Milliseconds of each run of the tenant's while others do as `ways` say."""
    others = [started(way, HOSTILE + number, daemon.socket) for number, way in enumerate(ways)]
    try:
        time.sleep(0.3)
        os.seteuid(TENANT)
        tenant = Peer(daemon.socket)
        os.seteuid(0)
        tenant.run()
        samples = []
        for _ in range(RUNS // ROUNDS):
            start = time.perf_counter()
            tenant.run()
            samples.append(1e3 * (time.perf_counter() - start))
        tenant.socket.close()
        if gone := [pid for pid in others if os.waitpid(pid, os.WNOHANG) != (0, 0)]:
            raise RuntimeError(f"{len(gone)} of the others ended before they were told to")
        return samples
    finally:
        os.seteuid(0)
        kill_all(others)


def run():
    tenants = [TENANT, *range(HOSTILE, HOSTILE + COUNT)]
    access = "".join(f'[[access]]\nuser = "{uid}"\npolicies = ["default"]\n' for uid in tenants)
    daemon = Daemon(access)
    try:
        rows = [{"name": name, "ours": True, "version": "", "command": ["Run", "true"], "also_enforces": also,
                 "call": lambda ways=ways: beside(daemon, ways)} for name, ways, also in CASES]
        return alternate(rows, ROUNDS)
    finally:
        daemon.end()
