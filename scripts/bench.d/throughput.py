"""How many sandboxes a second go through the daemon, beside a bare loop of system calls that makes and ends as many."""
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from __main__ import OUT, alternate
from daemon import Daemon, Peer

TITLE, UNIT = "confined runs of true; p99 is the best second", "runs a second"
WORKERS = [1, 2, 4]
RATIOS = [f"bare loop, {count}" for count in WORKERS]
APT, CARGO = ["gcc", "libc6-dev"], []

ROUNDS, WINDOW_S = 10, 1.0


def loop(count, root):
    """The bare loop says how many there were in the window."""
    said = subprocess.run([OUT / "loop", str(count), str(int(1e3 * WINDOW_S)), root], check=True, capture_output=True)
    return [int(said.stdout) / WINDOW_S]


def asked(peers):
    """One run after the other on each connection, the last begun within the window."""
    start = time.perf_counter()

    def ask(peer):
        done = 0
        while time.perf_counter() - start < WINDOW_S:
            peer.run()
            done += 1
        return done

    with ThreadPoolExecutor(len(peers)) as threads:
        done = sum(threads.map(ask, peers))
    return [done / (time.perf_counter() - start)]


def run():
    source = Path(__file__).with_name("loop.c")
    subprocess.run(["cc", "-O2", "-static", "-o", OUT / "loop", source], check=True)
    plain, networks = daemons = [Daemon(), Daemon("[pool]\nnetworks = 4\n")]
    try:
        with tempfile.TemporaryDirectory(prefix="broker-bench-") as root:
            rows = []
            for count in WORKERS:
                peers = {daemon: [Peer(daemon.socket) for _ in range(count)] for daemon in daemons}
                rows += [
                    (f"bare loop, {count}", f"NOTHING but namespaces and mounts; {count} at a time",
                     lambda count=count: loop(count, root)),
                    (f"daemon, {count}", f"as `start`, recorded durably; {count} connections",
                     lambda peers=peers[plain]: asked(peers)),
                    (f"daemon, networks ready, {count}", f"as `start`, recorded durably; {count} connections",
                     lambda peers=peers[networks]: asked(peers)),
                ]
            rows = [{"name": name, "ours": "daemon" in name, "version": "", "command": ["Run", "true"] if "daemon" in name
                     else ["loop"], "also_enforces": also, "call": call} for name, also, call in rows]
            return alternate(rows, ROUNDS)
    finally:
        for daemon in daemons:
            daemon.end()
