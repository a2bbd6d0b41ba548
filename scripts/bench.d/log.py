"""Durable appends of 300 bytes, seen by all writers together: beside the disk's own fdatasync, and SQLite with one commit for each."""
import json
import os
import sqlite3
import subprocess
import tempfile
import time
from pathlib import Path

from __main__ import ROOT, alternate

TITLE, UNIT, RATIOS = "one durable append", "us", ["fdatasync", "SQLite, a commit each"]
APT, CARGO = [], []
ROUNDS, COUNT = 7, 4096
# On a disk: where the project is, not in a tmpfs.
PLACE = ROOT / "target/bench"


def measure():
    """The program of harness/benches/measure.rs, built."""
    words = ["cargo", "bench", "--locked", "-p", "harness", "--bench", "measure", "--no-run", "--message-format", "json"]
    built = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [line.get("executable") for line in map(json.loads, built.splitlines()) if line.get("reason") == "compiler-artifact"]
    return next(path for path in paths if path and Path(path).name.startswith("measure"))


def fdatasync():
    with tempfile.NamedTemporaryFile(dir=PLACE) as file:
        start = time.monotonic_ns()
        for _ in range(COUNT // 8):
            os.write(file.fileno(), b"x" * 300)
            os.fdatasync(file.fileno())
        return [(time.monotonic_ns() - start) / 1e3 / (COUNT // 8)]


def plain():
    with tempfile.TemporaryDirectory(dir=PLACE) as folder:
        log = sqlite3.connect(f"{folder}/log", isolation_level=None)
        log.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; CREATE TABLE events (position INTEGER PRIMARY KEY, body TEXT)")
        start = time.monotonic_ns()
        for _ in range(COUNT // 8):
            log.execute("INSERT INTO events (body) VALUES (?)", ["x" * 300])
        return [(time.monotonic_ns() - start) / 1e3 / (COUNT // 8)]


def run():
    program = measure()

    def ours(writers):
        with tempfile.TemporaryDirectory(dir=PLACE) as folder:
            words = [program, "append", folder, str(writers), str(COUNT if writers > 1 else COUNT // 8)]
            return [float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)]

    def row(name, call, own=False):
        return {"name": name, "ours": own, "version": "", "command": [name], "also_enforces": "", "call": call}

    rows = [row("fdatasync", fdatasync), row("SQLite, a commit each", plain)]
    rows += [row(f"log, {writers} writers", lambda writers=writers: ours(writers), True) for writers in (1, 8, 64)]
    return alternate(rows, ROUNDS)

