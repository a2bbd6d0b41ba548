"""A granted TCP connection beside haproxy's TCP mode and none at all: bulk to the sandbox, and small requests one after the other."""
import os
import shutil
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
    proxied = port + 1 if port < 65535 else port - 1
    (scratch / "haproxy.cfg").write_text(
        "global\n  nbthread 1\ndefaults\n  mode tcp\n  option splice-auto\n  timeout client 60s\n  timeout server 60s\n  timeout connect 5s\n"
        f"frontend f\n  bind 127.0.0.1:{proxied}\n  default_backend b\nbackend b\n  server s 127.0.0.1:{port}\n")
    if not os.access(find("haproxy"), os.X_OK):
        return None, proxied
    return subprocess.Popen([find("haproxy"), "-f", scratch / "haproxy.cfg"], stderr=subprocess.DEVNULL), proxied


def run():
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    port = int(server.stdout.readline())
    scratch = Path(tempfile.mkdtemp(prefix="broker-bench-"))
    proxy, proxied = serve_haproxy(scratch, port)
    daemon = Daemon(f'[grant.server]\nkind = "tcp"\nhost = "server.test"\nport = 7\nupstream = "127.0.0.1:{port}"\n')
    time.sleep(0.5)
    rows = []
    for kind, script in [("bulk", BULK), ("requests", REQUESTS)]:
        inside = [broker(), "exec", "--connect", daemon.socket, "--grant", "server", "--", "python3", "-c", script, "server.test", "7"]
        on_host = [sys.executable, "-c", script, "127.0.0.1"]
        for name, words, ours, also in [
            (f"{kind}, grant", inside, True, "cut on revocation, counted by the kernel"),
            (f"{kind}, haproxy", [*on_host, str(proxied)], False, "NOTHING: a port for everybody"),
            (f"{kind}, direct", [*on_host, str(port)], False, "NOTHING"),
        ]:
            rows.append({"name": name, "ours": ours, "version": "", "command": [str(word) for word in words[:1]], "also_enforces": also,
                         "call": lambda words=words: sample(words)})
    try:
        return alternate(rows, ROUNDS)
    finally:
        daemon.end()
        for process in filter(None, [server, proxy]):
            process.kill()
            process.wait()
        shutil.rmtree(scratch)
