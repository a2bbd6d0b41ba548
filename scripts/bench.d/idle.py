"""What a sandbox costs that waits for commands: the memory that is not available any more, beside other things that wait."""
import os
import re
import resource
import shlex
import subprocess
import time

from __main__ import alternate, find
from daemon import Daemon, Peer, kill_all
from start import BWRAP

TITLE, UNIT, RATIOS = "memory of one that waits, of a thousand", "KiB each", ["unshare"]
APT, CARGO = ["bubblewrap", "util-linux"], []

ROUNDS, COUNT = 5, 1000
OWNERS = range(54_400, 54_405)  # a user may have 256 sandboxes
SLEEP = "sleep 600"
UNSHARE = f"unshare --user --mount --pid --fork --kill-child --net --ipc --uts --cgroup {SLEEP}"
FIELDS = ["MemAvailable", "Slab", "KernelStack", "PageTables", "Percpu"]


def memory():
    """KiB by field, once the kernel has done what it had put off."""
    before = None
    for _ in range(40):
        with open("/proc/meminfo") as text:
            now = {name: int(count) for name, count in re.findall(r"(\w+): +(\d+)", text.read())}
        if before and abs(now["MemAvailable"] - before["MemAvailable"]) < 512:
            return now
        before = now
        time.sleep(0.5)
    raise RuntimeError("the memory of this host does not come to rest")


def provisioned():
    """Those of a daemon of their own, which is up before; the handles are what keeps them."""
    daemon = Daemon("".join(f'[[access]]\nuser = "{uid}"\npolicies = ["default"]\n' for uid in OWNERS))
    peers = []

    def begin():
        for uid in OWNERS:
            os.seteuid(uid)
            peers.append(Peer(daemon.socket))
            os.seteuid(0)
            peers[-1].handles = [peers[-1].provision().handle for _ in range(COUNT // len(OWNERS))]

    def end():
        os.seteuid(0)
        for peer in peers:
            peer.socket.close()
            for handle in getattr(peer, "handles", []):
                os.close(handle)
        while daemon.process.poll() is None and listed(daemon):
            time.sleep(0.1)
        daemon.end()

    return begin, end


def listed(daemon):
    reply, _ = Peer(daemon.socket).call("Metrics", {})
    return "broker_sandboxes 0\n" not in reply["parameters"]["text"]


def spawned(command):
    """Processes that sleep; each is killed, and what it started goes with it."""
    pids, words = [], shlex.split(command)
    path = find(words[0])

    def begin():
        null = os.open("/dev/null", os.O_RDWR)
        streams = [(os.POSIX_SPAWN_DUP2, null, stream) for stream in (0, 1, 2)]
        pids.extend(os.posix_spawn(path, words, os.environ, file_actions=streams) for _ in range(COUNT))
        os.close(null)
        time.sleep(2)  # until each has come to its sleep
        if gone := [pid for pid in pids if os.waitpid(pid, os.WNOHANG) != (0, 0)]:
            raise RuntimeError(f"{len(gone)} of {COUNT} do not sleep")

    def end():
        kill_all(pids)

    return begin, end


def measured(prepare, parts):
    """One sample: what all of them take, by one of them. `parts` gets what the kernel counts apart."""
    begin, end = prepare()
    try:
        before = memory()
        begin()
        after = memory()
    finally:
        end()
    each = {name: (after[name] - before[name]) / COUNT for name in FIELDS}
    parts.append(each)
    return [-each["MemAvailable"]]


def run():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    cases = [
        ("sandbox", provisioned, "Provision", True),
        ("sleep", lambda: spawned(SLEEP), SLEEP, False),
        ("unshare", lambda: spawned(UNSHARE), UNSHARE, False),
        ("bubblewrap", lambda: spawned(bubblewrap), bubblewrap, False),
    ]
    rows = []
    for name, prepare, command, ours in cases:
        parts = []
        rows.append({"name": name, "ours": ours, "version": "", "command": shlex.split(command), "parts": parts,
                     "call": lambda prepare=prepare, parts=parts: measured(prepare, parts)})
    rows = alternate(rows, ROUNDS)
    for row in rows:
        parts = row["parts"]
        row["also_enforces"] = "of it, on average: " + ", ".join(
            f"{name} {sum(each[name] for each in parts) / max(1, len(parts)):.0f}" for name in FIELDS[1:])
    return rows


bubblewrap = "bwrap " + " ".join(BWRAP.split()).replace("/bin/true", f"/bin/{SLEEP}")
