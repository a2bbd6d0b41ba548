"""What one small request costs on a granted TCP connection, beside haproxy's TCP mode and none at all; the first connection of a fresh
sandbox; and what a gateway keeps in memory."""
import subprocess
import sys
import time
from pathlib import Path

from __main__ import alternate
from tcp import row, served

TITLE, UNIT, RATIOS = "64 bytes there and back; the first of a sandbox, name and connection with it", "us", ["haproxy", "direct"]
APT, CARGO = ["haproxy"], []

ROUNDS, COUNT = 9, 4000
ROUND_TRIPS = """
import socket, sys, time
stream = socket.create_connection((sys.argv[1], int(sys.argv[2])))
stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
stream.sendall(b"r")
for number in range(%d):
    start = time.monotonic_ns()
    stream.sendall(bytes(64))
    left = 64
    while left:
        left -= len(stream.recv(left)) or sys.exit("cut off")
    print((time.monotonic_ns() - start) / 1e3)
""" % COUNT
FIRST = """
import socket, sys, time
start = time.monotonic_ns()
stream = socket.create_connection((sys.argv[1], int(sys.argv[2])))
stream.sendall(b"rx")
assert stream.recv(1) == b"x"
print((time.monotonic_ns() - start) / 1e3)
"""


def sample(words):
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def gateway_memory(inside):
    """What belongs to one gateway alone while its sandbox sleeps, and its share of the rest, in KiB (proc_pid_smaps(5))."""
    sandbox = subprocess.Popen([*inside, "sleep", "5"])
    time.sleep(1)
    found = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if b"\0gateway\0" in path.read_bytes()]
    rollup = Path(f"/proc/{found[0]}/smaps_rollup").read_text()
    values = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
    sandbox.kill()
    sandbox.wait()
    return f"a gateway: {values['Private_Dirty'] + values['Private_Clean']} KiB of its own, {values['Pss']} KiB with its share"


def run():
    with served() as (inside, proxied, port):
        memory, rows = gateway_memory(inside), []
        for kind, script in [("", ROUND_TRIPS), ("first, ", FIRST)]:
            on_host = [sys.executable, "-c", script, "127.0.0.1"]
            rows += [
                row(f"{kind}grant", [*inside, "python3", "-c", script, "server.test", "7"], memory, sample),
                row(f"{kind}haproxy", [*on_host, proxied], "NOTHING: a port for everybody", sample),
                row(f"{kind}direct", [*on_host, port], "NOTHING", sample),
            ]
        return alternate(rows, ROUNDS)
