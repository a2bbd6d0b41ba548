"""From `Revoke` to the last end of file inside, of a thousand live connections; beside a process that held as many and is killed."""
import os
import signal
import subprocess
import sys
import time

from __main__ import alternate, broker
from daemon import Daemon, Peer

TITLE, UNIT, RATIOS = "a thousand connections, until the last has ended", "ms", ["kill -9"]
APT, CARGO = [], []
RATIO_OF = "p99"

ROUNDS, COUNT = 20, 1000
# Connects to an echo, says so, and then when the last connection has ended, by the clock of the whole host. Without a place to connect
# to it asks at its door, for half of them at one that is derived twice.
CLIENT = """
import json, select, socket, sys, time
waits, streams = select.epoll(), {}
def asked(door, method):
    door.send(json.dumps({"method": "io.broker.Grant." + method}).encode())
    return socket.socket(fileno=socket.recv_fds(door, 4096, 1)[1][0])
if len(sys.argv) == 1:
    door = socket.socket(fileno=3)
    doors = [door, asked(asked(door, "Derive"), "Derive")]
for number in range(%d):
    stream = asked(doors[number %% 2], "Open") if len(sys.argv) == 1 else socket.create_connection(sys.argv[1:])
    stream.sendall(b"x")
    assert stream.recv(1) == b"x"
    streams[stream.fileno()] = stream
    waits.register(stream, select.EPOLLRDHUP | select.EPOLLONESHOT)
print("up", flush=True)
ended = 0
while ended < len(streams):
    ended += len(waits.poll(maxevents=len(streams)))
now = time.monotonic_ns()
if len(sys.argv) == 1:
    for door in doors:
        try: door.send(b"{}"); assert False, "it can still be asked"
        except BrokenPipeError: pass
for stream in streams.values():
    try:
        assert stream.recv(1) == b""
    except ConnectionResetError:
        pass
print(now, flush=True)
""" % COUNT
SERVER = """
import selectors, socket
wait, listener = selectors.DefaultSelector(), socket.create_server(("127.0.0.1", 0), backlog=1024)
print(listener.getsockname()[1], flush=True)
wait.register(listener, selectors.EVENT_READ)
while True:
    for key, _ in wait.select():
        if key.fileobj is listener:
            wait.register(listener.accept()[0], selectors.EVENT_READ)
            continue
        try:
            data = key.fileobj.recv(4096)
        except OSError:
            data = b""
        if data:
            key.fileobj.sendall(data)
        else:
            wait.unregister(key.fileobj)
            key.fileobj.close()
"""


def server():
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def timed(client, cut):
    """Milliseconds from `cut` to the last end."""
    assert client.stdout.readline() == "up\n", "it does not come up"
    time.sleep(0.2)
    start = time.monotonic_ns()
    cut()
    last = int(client.stdout.readline())
    client.wait()
    return [(last - start) / 1e6]


def revoked(daemon, *place):
    words = [broker(), "exec", "--connect", daemon.socket, "--grant", "echo", "--", "python3", "-c", CLIENT, *place]
    client = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    peer = Peer(daemon.socket)

    def cut():
        reply, _ = peer.call("Revoke", {"grant": "echo"})
        assert reply["parameters"]["connections"] == COUNT, reply

    return timed(client, cut)


def killed():
    process, port = server()
    client = subprocess.Popen([sys.executable, "-c", CLIENT, "127.0.0.1", str(port)], stdout=subprocess.PIPE, text=True)
    taken = timed(client, lambda: os.kill(process.pid, signal.SIGKILL))
    process.wait()
    return taken


def run():
    process, port = server()
    daemon = Daemon(f'[grant.echo]\nkind = "tcp"\nhost = "echo.test"\nport = 7\nupstream = "127.0.0.1:{port}"\n')
    try:
        return alternate([
            {"name": "revoke, addresses", "ours": True, "version": "", "command": ["Revoke"],
             "also_enforces": "workloads' ends first; recorded after", "call": lambda: revoked(daemon, "echo.test", "7")},
            {"name": "revoke, descriptors", "ours": True, "version": "", "command": ["Revoke"],
             "also_enforces": "the same; half of them derived twice", "call": lambda: revoked(daemon)},
            {"name": "kill -9", "ours": False, "version": "", "command": ["kill", "-9"],
             "also_enforces": "NOTHING: the kernel closes the server's ends", "call": killed},
        ], ROUNDS)
    finally:
        daemon.end()
        process.kill()
        process.wait()
