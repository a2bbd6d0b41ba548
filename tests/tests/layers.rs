//! Each layer is switched off in turn, from outside: the calls that make it seem to work and are never made. A row of the
//! catalogue has to turn red then, or the product has to refuse to start; else the layer, or its test, is for nothing.
#![cfg(target_arch = "x86_64")]

use std::process::Command;

use broker_tests::inject::{self, Call, Verdict};
use broker_tests::program;

/// What a layer's absence leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// The row's check, run inside, finds the hole.
    Red,
    /// Nothing starts.
    Refused,
}

struct Layer {
    name: &'static str,
    row: &'static str,
    /// What becomes of each call with the layer off.
    off: fn(&Call) -> Verdict,
    /// A shell line that succeeds only where the layer holds.
    check: &'static str,
    then: Then,
}

fn skip(when: bool) -> Verdict {
    if when { Verdict::Return(0) } else { Verdict::Pass }
}

/// Without these bits of the flags.
fn without(call: &Call, number: i64, bits: i32) -> Verdict {
    if call.number == number && call.arguments[0] & bits as u64 != 0 {
        Verdict::Argument(0, call.arguments[0] & !(bits as u64))
    } else {
        Verdict::Pass
    }
}

/// clone3(2) without `bits`.
fn cloned_without(call: &Call, bits: i32) -> Verdict {
    match call.clone_flags {
        Some(flags) if flags & bits as u64 != 0 => Verdict::CloneFlags(flags & !(bits as u64)),
        _ => Verdict::Pass,
    }
}

// Never the mount and the uts namespace: without them the set-up would work on the host itself.
const LAYERS: [Layer; 18] = [
    Layer {
        name: "network namespace",
        row: "NW-01",
        off: |call| cloned_without(call, libc::CLONE_NEWNET),
        check: "[ $(grep -c : /proc/net/dev) = 1 ]",
        then: Then::Red,
    },
    Layer {
        name: "process namespace",
        row: "PR-01",
        off: |call| cloned_without(call, libc::CLONE_NEWPID),
        check: "[ $PPID = 1 ]",
        then: Then::Red,
    },
    Layer {
        name: "ipc namespace",
        row: "FS-23",
        off: |call| cloned_without(call, libc::CLONE_NEWIPC),
        check: "[ $(wc -l < /proc/sysvipc/shm) = 1 ]",
        then: Then::Red,
    },
    Layer {
        name: "system-call filter",
        row: "KS-04",
        off: |call| skip(call.number == libc::SYS_seccomp),
        check: "grep -q 'Seccomp:.2' /proc/self/status && ! unshare -U true 2>/dev/null",
        then: Then::Red,
    },
    Layer {
        name: "Landlock",
        row: "FS-03",
        off: |call| skip(call.number == libc::SYS_landlock_restrict_self),
        // A second fence: all that it denies, mounts, modes or the filter deny too. That it stands is seen by how many more
        // the kernel lets a process put up, of 16 (landlock(7)).
        check: "[ $(python3 -c \"
import ctypes
call = ctypes.CDLL(None).syscall
access = ctypes.c_uint64(1)
ruleset = call(444, ctypes.byref(access), 8, 0)
print(sum(call(446, ruleset, 0) == 0 for _ in range(20)))
\") = 15 ]",
        then: Then::Red,
    },
    Layer {
        name: "no_new_privs",
        row: "PR-08",
        off: |call| {
            skip(call.number == libc::SYS_prctl && call.arguments[0] == libc::PR_SET_NO_NEW_PRIVS as u64)
        },
        check: "grep -q 'NoNewPrivs:.1' /proc/self/status",
        then: Then::Refused,
    },
    Layer {
        name: "capability sets",
        row: "PR-08",
        off: |call| skip(call.number == libc::SYS_capset),
        check: "grep -q 'CapPrm:.0*$' /proc/self/status && grep -q 'CapEff:.0*$' /proc/1/status",
        then: Then::Red,
    },
    Layer {
        name: "bounding set",
        row: "PR-08",
        off: |call| {
            let drops = call.number == libc::SYS_prctl && call.arguments[0] == libc::PR_CAPBSET_DROP as u64;
            // The first number that the kernel does not know still ends the list.
            skip(drops && call.arguments[1] < 41)
        },
        check: "grep -q 'CapBnd:.0*$' /proc/self/status",
        then: Then::Red,
    },
    Layer {
        name: "uid of its own",
        row: "PR-09",
        off: |call| skip(call.number == libc::SYS_setresuid),
        check: "[ $(id -u) = 1000 ]",
        then: Then::Refused,
    },
    Layer {
        name: "user namespace",
        row: "PR-09",
        off: |call| skip(call.number == libc::SYS_unshare && call.arguments[0] == libc::CLONE_NEWUSER as u64),
        check: "[ $(id -u) = 1000 ]",
        then: Then::Refused,
    },
    Layer {
        name: "control-group namespace",
        row: "KS-16",
        off: |call| without(call, libc::SYS_unshare, libc::CLONE_NEWCGROUP),
        check: "! grep -q broker /proc/self/cgroup",
        then: Then::Red,
    },
    Layer {
        name: "host name",
        row: "FS-07",
        off: |call| skip(call.number == libc::SYS_sethostname),
        check: "[ $(uname -n) = sandbox ]",
        then: Then::Red,
    },
    Layer {
        name: "process limit",
        row: "RS-01",
        // The move into the group: what is written is one byte.
        off: |call| {
            skip_with(call.number == libc::SYS_write && call.arguments[2] == 1 && call.process == 1, 1)
        },
        check: "! (for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 1 & done) 2>/dev/null",
        then: Then::Red,
    },
    Layer {
        name: "core limit",
        row: "RS-11",
        off: |call| {
            skip(call.number == libc::SYS_prlimit64 && call.arguments[1] == 4 && call.arguments[2] != 0)
        },
        check: "grep -q 'Max core file size *1 *1 ' /proc/self/limits",
        then: Then::Red,
    },
    Layer {
        name: "closing of descriptors",
        row: "FS-18",
        off: |call| skip(call.number == libc::SYS_close_range),
        check: "[ ! -e /proc/self/fd/9 ]",
        then: Then::Red,
    },
    Layer {
        name: "read-only trees",
        row: "FS-10",
        off: |call| skip(call.number == libc::SYS_mount_setattr),
        check: "! grep -E ' /usr [^ ]*rw' /proc/self/mountinfo",
        then: Then::Red,
    },
    Layer {
        name: "covers of /proc",
        row: "FS-06",
        off: |call| skip(call.number == libc::SYS_mount && call.arguments[3] == libc::MS_BIND),
        check: "[ -z \"$(head -c1 /proc/kallsyms)\" ]",
        then: Then::Red,
    },
    Layer {
        name: "undumpable init",
        row: "PR-02",
        off: |call| {
            let set = call.number == libc::SYS_prctl && call.arguments[0] == libc::PR_SET_DUMPABLE as u64;
            skip(set && call.arguments[1] == 0)
        },
        check: "! cat /proc/1/environ >/dev/null 2>&1",
        then: Then::Red,
    },
];

fn skip_with(when: bool, result: i64) -> Verdict {
    if when { Verdict::Return(result) } else { Verdict::Pass }
}

/// With a descriptor that the caller has left open for everybody it starts.
fn broker(check: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\" 9</dev/null"]).arg(program("broker"));
    command.args(["exec", "--embedded", "--pids", "8", "--", "sh", "-c", check]);
    command
}

/// Method: every layer's check runs once with all layers on (it must hold), and once with that layer's calls pretended.
/// Oracle: the kernel's own answers inside, and the exit status.
#[test]
fn every_layer_that_is_switched_off_turns_a_row_red_or_refuses_to_start() {
    let segment = Command::new("ipcmk").args(["-M", "4096"]).output().expect("ipcmk of util-linux runs");
    let words = String::from_utf8(segment.stdout).expect("text");
    let segment = words.split_whitespace().last().expect("the segment's number").to_owned();
    println!("{:<26} {:<6} result with the layer off", "layer", "row");
    for layer in &LAYERS {
        let on = inject::run(&mut broker(layer.check), |_| Verdict::Pass);
        assert_eq!(on.code(), Some(0), "{}: the check fails with the layer on", layer.name);
        let off = inject::run(&mut broker(layer.check), layer.off);
        let then = match off.code() {
            Some(125) => Then::Refused,
            Some(0) => panic!("{} is off and nobody notices: {}", layer.name, layer.check),
            _ => Then::Red,
        };
        println!("{:<26} {:<6} {then:?}", layer.name, layer.row);
        assert_eq!(then, layer.then, "{}", layer.name);
    }
    assert!(Command::new("ipcrm").args(["-m", &segment]).status().expect("ipcrm runs").success());
}
