"""Following a log of 100,000 events of 512 bytes, each checked and each decision made again, beside sqlite3 that only reads it."""
import sqlite3
import subprocess
import tempfile
import time

from __main__ import alternate
from log import PLACE, measure

TITLE, UNIT, RATIOS = "waking from 100,000 events of 512 bytes", "ms", ["sqlite3 reads"]
APT, CARGO = [], []
ROUNDS, COUNT = 7, 100_000


def run():
    program = measure()

    def ours(*words):
        return [float(line) for line in subprocess.run([program, *words], check=True, capture_output=True, text=True).stdout.split()]

    with tempfile.TemporaryDirectory(dir=PLACE) as folder:
        file = f"{folder}/log.sqlite"
        ours("fill", file, "long", str(COUNT))

        def reads():
            start = time.monotonic_ns()
            log = sqlite3.connect(file)
            assert sum(1 for _ in log.execute("SELECT position, kind, body, hash FROM events ORDER BY position")) > COUNT
            return [(time.monotonic_ns() - start) / 1e6]

        rows = [
            {"name": "wake", "ours": True, "version": "", "command": ["wake"], "also_enforces": "", "call": lambda: ours("wake", file, "long")},
            {"name": "sqlite3 reads", "ours": False, "version": "", "command": ["sqlite3"], "also_enforces": "", "call": reads},
        ]
        rows = alternate(rows, ROUNDS)
        memory = ours("drive", f"{folder}/many.sqlite", "1000")[0]
        print(f"one of 1,000 sessions that are followed at once: {memory / 1024:.1f} KiB", flush=True)
        return rows
