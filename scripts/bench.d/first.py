"""From the start of `harness run` to the first byte of its request at the model's host: with no sandbox yet, beside one that was made first."""
import os
import socket
import subprocess
import time
from pathlib import Path

from __main__ import alternate, broker
from daemon import Daemon

TITLE, UNIT, RATIOS = "the first request of a new session", "ms", ["sandbox first"]
APT, CARGO = [], []
ROUNDS = 40
GRANT = """
[credential.model]
source = "file:{key}"
[grant.model]
kind = "http"
host = "api.test"
credential = "model"
inject = {{ header = "x-api-key", value = "{{secret}}" }}
allow = [ {{ methods = ["POST"], path = "/**" }} ]
upstream = "127.0.0.1:{port}"
upstream_tls = "off"
"""


def run():
    listener = socket.create_server(("127.0.0.1", 0))
    key = Path(f"/tmp/broker-bench-key-{os.getpid()}")
    key.write_text("secret-of-a-benchmark\n")
    key.chmod(0o600)
    daemon = Daemon(GRANT.format(key=key, port=listener.getsockname()[1]))
    harness = Path(broker()).with_name("harness")

    def first(*before):
        start = time.monotonic_ns()
        if before:
            subprocess.run(before, check=True)
        words = [harness, "run", "--model", "m", "--task", "t", "--output", "none", "--connect", daemon.socket]
        session = subprocess.Popen([*words, "--store", f"sqlite:{daemon.scratch}/log.sqlite"], stderr=subprocess.DEVNULL)
        connection = listener.accept()[0]
        assert connection.recv(1) == b"P"
        took = (time.monotonic_ns() - start) / 1e6
        session.kill()
        session.wait()
        connection.close()
        return [took]

    def row(name, own, call):
        return {"name": name, "ours": own, "version": "", "command": ["harness", "run"], "also_enforces": "", "call": call}

    try:
        rows = [row("sandbox with the first call", True, first), row("sandbox first", False, lambda: first(*daemon.exec("true")))]
        return alternate(rows, ROUNDS)
    finally:
        daemon.end()
        key.unlink()
