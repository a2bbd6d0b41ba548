"""A granted TCP connection beside haproxy's TCP mode and none at all: bulk to the sandbox, and small requests one after the other."""
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from __main__ import alternate, broker, find
from daemon import Daemon

TITLE, UNIT, RATIOS = "256 MiB to the client, then 5,000 requests of 64 bytes", "ms", ["bulk, haproxy", "requests, haproxy"]
APT, CARGO = ["haproxy"], []

ROUNDS = 7
SERVER = """
import os, socket
def serve(stream):
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    piece = bytes(1 << 20)
    if stream.recv(1) == b"b":
        for number in range(256):
            stream.sendall(piece)
    else:
        while data := stream.recv(64):
            stream.sendall(data)
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
while True:
    stream, _ = listener.accept()
    if os.fork() == 0:
        serve(stream)
        os._exit(0)
    stream.close()
    try:
        while os.waitpid(-1, os.WNOHANG)[0]: pass
    except ChildProcessError: pass
"""
# Each prints milliseconds; a first byte says what is wanted.
BULK = """
import socket, sys, time
stream = socket.create_connection((sys.argv[1], int(sys.argv[2])))
room, left = bytearray(1 << 20), 256 << 20
start = time.monotonic()
stream.sendall(b"b")
while left:
    left -= stream.recv_into(room) or sys.exit("cut off")
print((time.monotonic() - start) * 1e3)
"""
REQUESTS = """
import socket, sys, time
stream = socket.create_connection((sys.argv[1], int(sys.argv[2])))
stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
stream.sendall(b"r")
start = time.monotonic()
for number in range(5000):
    stream.sendall(bytes(64))
    left = 64
    while left:
        left -= len(stream.recv(left)) or sys.exit("cut off")
print((time.monotonic() - start) * 1e3)
"""


def sample(words):
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [float(done.stdout)]


def serve_haproxy(scratch, port):
    """haproxy in front of `port`, with one thread and splice, and where it listens; nothing where there is none."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        proxied = free.getsockname()[1]
    (scratch / "haproxy.cfg").write_text(
        "global\n  nbthread 1\ndefaults\n  mode tcp\n  option splice-auto\n  timeout client 60s\n  timeout server 60s\n  timeout connect 5s\n"
        f"frontend f\n  bind 127.0.0.1:{proxied}\n  default_backend b\nbackend b\n  server s 127.0.0.1:{port}\n")
    if not os.access(find("haproxy"), os.X_OK):
        return None, proxied
    proxy = subprocess.Popen([find("haproxy"), "-f", scratch / "haproxy.cfg"], stderr=subprocess.DEVNULL)
    for attempt in range(50):
        try:
            socket.create_connection(("127.0.0.1", proxied)).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    return proxy, proxied


@contextlib.contextmanager
def served():
    """A server on the host: how a command reaches it from inside over a grant, and where it is for others, haproxy first."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    port = int(server.stdout.readline())
    scratch = tempfile.TemporaryDirectory(prefix="broker-bench-")
    proxy, proxied = serve_haproxy(Path(scratch.name), port)
    daemon = Daemon(f'[grant.server]\nkind = "tcp"\nhost = "server.test"\nport = 7\nupstream = "127.0.0.1:{port}"\n')
    try:
        yield [broker(), "exec", "--connect", daemon.socket, "--grant", "server", "--"], str(proxied), str(port)
    finally:
        daemon.end()
        for process in filter(None, [server, proxy]):
            process.kill()
            process.wait()
        scratch.cleanup()


def row(name, words, also, sample):
    return {"name": name, "ours": words[0] == broker(), "version": "", "command": [str(words[0])], "also_enforces": also,
            "call": lambda: sample(words)}


def run():
    with served() as (inside, proxied, port):
        rows = []
        for kind, script in [("bulk", BULK), ("requests", REQUESTS)]:
            on_host = [sys.executable, "-c", script, "127.0.0.1"]
            rows += [
                row(f"{kind}, grant", [*inside, "python3", "-c", script, "server.test", "7"], "cut on revocation, counted by the kernel", sample),
                row(f"{kind}, haproxy", [*on_host, proxied], "NOTHING: a port for everybody", sample),
                row(f"{kind}, direct", [*on_host, port], "NOTHING", sample),
            ]
        return alternate(rows, ROUNDS)
