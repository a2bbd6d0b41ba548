"""From nothing to a confined `true` and back: the whole process, beside other sandboxes."""
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from __main__ import OUT, ROOT, broker, find, interleave

TITLE, UNIT, RATIOS = "start and end of a whole process", "ms", ["bubblewrap", "clone + exec"]
APT = ["bubblewrap", "crun", "runc", "gcc", "libc6-dev", "pkg-config", "libdbus-1-dev", "libseccomp-dev"]
CARGO = [["--locked", "sandlock-cli@0.9.0"], ["nono-cli@0.81.0"]]  # nono's lock asks for what mirrors lack

BWRAP = """--unshare-user --unshare-pid --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup
    --die-with-parent --new-session --cap-drop ALL --ro-bind /usr /usr --symlink usr/bin /bin
    --symlink usr/sbin /sbin --symlink usr/lib /lib --symlink usr/lib64 /lib64 --proc /proc --dev /dev
    --tmpfs /tmp -- /bin/true"""
OCI = "run --bundle {scratch}/bundle @ID@"
SANDLOCK = "run -r /usr -r /bin -r /lib -r /lib64"
NONO = "--allow-cwd --block-net --read /usr --read /lib --read /lib64 --read /bin"
NO_RULES = "NOTHING: no seccomp, no Landlock, no limits"
NO_SPACES = "seccomp, Landlock; NO namespaces, no limits, keeps root's capabilities"
CASES = [  # name, program, arguments, what it enforces beside namespaces and a root of its own (ours: asked)
    ("true", "/bin/true", "", "NOTHING at all: no sandbox"),
    ("clone + exec", f"{OUT}/namespaces", "/bin/true", "NOTHING: seven namespaces and no mounts"),
    ("broker, default", "broker", "exec -- true", None),
    ("broker, without limits", "broker", f"exec --policy {OUT}/default-without-limits.toml -- true", None),
    ("bubblewrap", "bwrap", BWRAP, NO_RULES),
    ("crun, no cgroup", "crun", f"--cgroup-manager=disabled {OCI}", NO_RULES),
    ("crun", "crun", OCI, f"{NO_RULES} in its cgroup"),
    ("runc", "runc", OCI, f"{NO_RULES} in its cgroup"),
    ("sandlock", "sandlock", f"{SANDLOCK} -- /bin/true", NO_SPACES),
    ("sandlock, unsupervised", "sandlock", f"{SANDLOCK} --no-supervisor -- /bin/true", NO_SPACES),
    ("nono wrap", "nono", f"-s wrap {NONO} -- /bin/true", NO_SPACES),
    ("nono run", "nono", f"-s run {NONO} --no-rollback --no-audit --no-diagnostics -- /bin/true",
     f"{NO_SPACES}; copies its own binary at each start"),
]


def prepare(scratch):
    """The policy without limits, the clone, and the container of crun and runc: bubblewrap's root, own user."""
    text, found = re.subn(r"(?ms)^\[limits\]$.*?(?=^\[|\Z)", "", (ROOT / "policies/default.toml").read_text())
    assert found == 1, "policies/default.toml: expected one [limits] section"
    (OUT / "default-without-limits.toml").write_text(text)
    (OUT / "namespaces").unlink(missing_ok=True)
    if shutil.which("cc"):
        source = Path(__file__).with_name("namespaces.c")
        subprocess.run(["cc", "-O2", "-static", "-o", OUT / "namespaces", source])
    root = scratch / "bundle/rootfs"
    for name in ("../../home", "../../empty", "../../tmp", "usr", "proc", "dev", "tmp"):
        os.makedirs(os.path.normpath(root / name))
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    scratch.chmod(0o755)
    identity = [{"containerID": 0, "hostID": 0x70000000, "size": 65536}]
    mounts = """/proc proc proc nosuid,noexec,nodev
        /dev tmpfs tmpfs nosuid,strictatime,mode=755,size=65536k
        /dev/pts devpts devpts nosuid,noexec,newinstance,ptmxmode=0666,mode=0620
        /dev/shm tmpfs shm nosuid,noexec,nodev,mode=1777,size=65536k
        /tmp tmpfs tmpfs nosuid,nodev,mode=1777
        /usr none /usr bind,ro,nosuid,nodev"""
    spaces = [{"type": name} for name in ("user", "mount", "pid", "network", "ipc", "uts", "cgroup")]
    empty = {name: [] for name in ("bounding", "effective", "inheritable", "permitted", "ambient")}
    (scratch / "bundle/config.json").write_text(json.dumps({
        "ociVersion": "1.0.2", "hostname": "bench", "root": {"path": "rootfs", "readonly": True},
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["/bin/true"], "env": ["PATH=/usr/bin:/bin"],
                    "cwd": "/", "capabilities": empty, "noNewPrivileges": True},
        "mounts": [{"destination": to, "type": kind, "source": source, "options": options.split(",")}
                   for to, kind, source, options in map(str.split, mounts.splitlines())],
        "linux": {"cgroupsPath": "/broker-bench/c1", "uidMappings": identity, "gidMappings": identity,
                  "namespaces": spaces},
    }))


def reported(command, env):
    """What a command of ours says it enforced, gaps included."""
    run = subprocess.run([*command[:2], "--report", "-", *command[2:]], env=env, capture_output=True, text=True)
    if run.returncode:
        return f"UNKNOWN: {run.stderr.strip()}"
    report = json.loads(run.stdout)
    layers, gaps = report["enforcement"], f"; GAPS: {report['gaps']}" if report["gaps"] else ""
    limits = "memory, pid and cpu limits" if layers["cgroup"] else "no limits"
    return f"seccomp, Landlock ABI {layers['landlock_abi']}, {limits}, a user of its own{gaps}"


def run():
    scratch = Path(tempfile.mkdtemp(prefix="broker-bench-"))
    env = {"PATH": "/usr/bin:/bin", "HOME": f"{scratch}/home", "TMPDIR": f"{scratch}/tmp",
           "NONO_NO_UPDATE_CHECK": "1"}  # without it nono calls home
    try:
        prepare(scratch)
        rows = []
        for name, program, arguments, enforces in CASES:
            path = broker() if program == "broker" else find(program)
            command = [path, *arguments.format(scratch=scratch).split()]
            said = "missing"
            if os.access(path, os.X_OK):
                said = subprocess.run([path, "--version"], env=env, capture_output=True, text=True).stdout
            rows.append({"name": name, "ours": not enforces, "version": said.partition("\n")[0], "command": command,
                         "also_enforces": enforces or reported(command, env)})
        return interleave(rows, env, scratch / "empty")
    finally:
        os.chdir("/")
        shutil.rmtree(scratch)
        ours = "-depth -path */broker-bench* -not -path */unified/* -type d -exec rmdir {} ;"
        subprocess.run(["find", "/sys/fs/cgroup", *ours.split()])
        os.chown("/dev/null", 0, 0)  # runc gives its standard streams to the container's user
