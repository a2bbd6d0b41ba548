"""A confined `true` through the daemon, and in a sandbox that lives, beside what they would replace."""
import array
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from __main__ import broker, find, interleave
from start import BWRAP

TITLE, UNIT, RATIOS = "a confined true, asked of the daemon", "ms", ["bubblewrap", "fork + exec"]
APT, CARGO = ["bubblewrap"], []


def kill_all(pids):
    """End children of this process, whether they still live or not."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


class Peer:
    """A caller of the interface, on one connection."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.effects = 0

    def call(self, method, parameters, descriptors=()):
        message = json.dumps({"method": f"io.broker.Control.{method}", "parameters": parameters}).encode() + b"\0"
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.socket.sendmsg([message], rights)
        reply, control, _, _ = self.socket.recvmsg(65536, 64)
        given = array.array("i")
        for _, _, data in control:
            given.frombytes(data)
        return json.loads(reply.rstrip(b"\0")), list(given)

    def run(self):
        parameters = {"policy": "default", "command": ["true"], "environment": [], "path": "/bin", "streams": {}}
        reply, _ = self.call("Run", parameters)
        outcome = reply["parameters"].get("report", {}).get("outcome")
        assert outcome == {"kind": "exited", "code": 0}, reply

    def provision(self):
        reply, given = self.call("Provision", {"policy": "default", "environment": [], "path": "/bin"})
        assert "error" not in reply, reply
        self.handle = given[0]
        return self

    def execute(self):
        self.effects += 1
        parameters = {"handle": 0, "effect": str(self.effects), "command": ["/bin/true"], "environment": [],
                      "path": "/bin", "streams": {}}
        reply, _ = self.call("Execute", parameters, [self.handle])
        return 0 if reply["parameters"].get("outcome") == {"kind": "exited", "code": 0} else reply


class Daemon:
    """One of our own, with its socket and record in a directory of its own."""

    def __init__(self, more=""):
        self.scratch = Path(tempfile.mkdtemp(prefix="broker-bench-"))
        self.scratch.chmod(0o755)  # the core is nobody's, and has to come through
        self.socket = f"{self.scratch}/broker.sock"
        config = self.scratch / "config.toml"
        config.write_text(f'[server]\nsocket = "{self.socket}"\nstate = "{self.scratch}/state"\n{more}')
        self.process = subprocess.Popen([broker(), "serve", "--config", config], stderr=subprocess.DEVNULL)
        while subprocess.run([broker(), "ps", "--connect", self.socket], capture_output=True).returncode:
            time.sleep(0.05)

    def exec(self, *command):
        return [broker(), "exec", "--connect", self.socket, "--", *command]

    def end(self):
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.scratch)


def run():
    """Plain, with network namespaces ready, and with sandboxes ready."""
    daemons = plain, networks, warm = [Daemon(), Daemon("[pool]\nnetworks = 4\n"), Daemon("[pool]\nnetworks = 4\nwarm = { default = 2 }\n")]
    try:
        rows = [
            ("fork + exec", ["/bin/true"], "NOTHING at all: no sandbox"),
            ("bubblewrap", [find("bwrap"), *BWRAP.split()], "NOTHING: no seccomp, no Landlock, no limits"),
            ("broker exec, embedded", [broker(), "exec", "--embedded", "--", "true"], "as `start`"),
            ("broker exec, daemon", plain.exec("true"), "as `start`, recorded durably"),
            ("broker exec, network ready", networks.exec("true"), "as `start`, recorded durably"),
            ("broker exec, sandbox ready", warm.exec("true"), "as `start`, recorded durably"),
        ]
        rows = [{"name": name, "ours": "broker" in name, "version": "", "command": list(map(str, command)), "also_enforces": also}
                for name, command, also in rows]
        live = Peer(plain.socket).provision()
        rows.append({"name": "execute in a live one", "ours": True, "version": "", "command": ["Execute", "/bin/true"],
                     "also_enforces": "as `start`, recorded durably before", "call": live.execute})
        env = {"PATH": "/usr/bin:/bin", "HOME": str(plain.scratch)}
        return interleave(rows, env, "/")
    finally:
        os.chdir("/")
        for daemon in daemons:
            daemon.end()
