//! What may not go in: the caller's own terminal, files and sockets. `--tty` gives a fresh terminal, anything else is
//! relayed; pipes and `/dev/null` pass.
//!
//! Method: a real pseudo-terminal stands for the caller's; a session of its own has it as its controlling terminal,
//! as under a terminal emulator. Oracles: what that terminal shows, its size, its modes and its input queue;
//! of the other streams, what `stat` says on both sides, and the bytes.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use broker_tests::{eventually, program, within};
use rustix::fd::{AsFd, OwnedFd};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{InputModes, LocalModes, OutputModes, Termios, Winsize, tcgetattr, tcsetwinsize};

/// Long enough for a machine that is busy; a test that fails is all that takes so long.
const LIMIT_MS: u64 = 30_000;
const CONTROL_C: &str = "\x03";
const CONTROL_Z: &str = "\x1a";

/// The caller's terminal: what a terminal emulator holds, and the side that programs use.
struct Outer {
    emulator: OwnedFd,
    terminal: OwnedFd,
    shown: Arc<Mutex<Vec<u8>>>,
}

/// A program that runs on an [`Outer`], ended with it.
struct OnTerminal(Child);

impl Outer {
    fn new(rows: u16, columns: u16) -> Outer {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let emulator = openpt(flags).expect("a pseudo-terminal");
        grantpt(&emulator).expect("it is ours");
        unlockpt(&emulator).expect("it can be used");
        let terminal = ioctl_tiocgptpeer(&emulator, flags).expect("its other side");
        let shown = Arc::new(Mutex::new(Vec::new()));
        let mut reader = File::from(emulator.try_clone().expect("a descriptor"));
        let sink = Arc::clone(&shown);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                sink.lock().expect("no panic").extend_from_slice(&bytes[..count]);
            }
        });
        let outer = Outer { emulator, terminal, shown };
        outer.resize(rows, columns);
        outer
    }

    fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.emulator, size).expect("a size");
    }

    fn stream(&self) -> Stdio {
        Stdio::from(self.terminal.try_clone().expect("a descriptor"))
    }

    /// Runs `command` in a session of its own with this as its controlling terminal.
    fn start(&self, command: &Command) -> OnTerminal {
        let mut session = Command::new("setsid");
        session.arg("--ctty").arg(command.get_program()).args(command.get_args());
        session.env("TERM", "dumb").stdin(self.stream()).stdout(self.stream()).stderr(self.stream());
        OnTerminal(session.spawn().expect("setsid (Debian: util-linux) runs"))
    }

    fn type_in(&self, keys: &str) {
        let mut emulator = File::from(self.emulator.try_clone().expect("a descriptor"));
        emulator.write_all(keys.as_bytes()).expect("it takes keys");
    }

    fn screen(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().expect("no panic")).into_owned()
    }

    /// Waits until `text` is shown, and forgets everything up to its end.
    fn expect(&self, text: &str) {
        let seen = || {
            let mut shown = self.shown.lock().expect("no panic");
            let at = shown.windows(text.len()).position(|window| window == text.as_bytes());
            at.map(|at| shown.drain(..at + text.len())).is_some()
        };
        assert!(
            within(Duration::from_millis(LIMIT_MS), seen),
            "no {text:?} on the terminal: {}",
            self.screen()
        );
    }

    fn modes(&self) -> Termios {
        tcgetattr(&self.terminal).expect("its modes")
    }

    /// Bytes that wait to be read by whatever has this terminal.
    fn waiting(&self) -> u64 {
        rustix::io::ioctl_fionread(&self.terminal).expect("its queue")
    }
}

impl OnTerminal {
    fn ended(mut self) -> ExitStatus {
        let ended =
            within(Duration::from_millis(LIMIT_MS), || self.0.try_wait().is_ok_and(|it| it.is_some()));
        assert!(ended, "it does not end");
        self.0.wait().expect("its status")
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        nix::sys::signal::kill(pid, signal).expect("it is alive");
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn on_tty(options: &[&str], command: &[&str]) -> Command {
    let mut broker = Command::new(program("broker"));
    broker.args(["exec", "--embedded", "--tty"]).args(options).arg("--").args(command);
    broker
}

/// A shell line on a fresh terminal.
fn line(script: &str) -> Command {
    on_tty(&[], &["sh", "-c", script])
}

fn comparable(modes: &Termios) -> (InputModes, OutputModes, LocalModes, Vec<u8>) {
    use rustix::termios::SpecialCodeIndex as Key;
    let keys = [Key::VINTR, Key::VQUIT, Key::VERASE, Key::VEOF, Key::VMIN, Key::VTIME, Key::VSUSP];
    let codes = keys.iter().map(|key| modes.special_codes[*key]).collect();
    (modes.input_modes, modes.output_modes, modes.local_modes, codes)
}

#[test]
fn the_terminal_inside_is_a_fresh_one_with_a_name_and_not_the_callers() {
    let outer = Outer::new(24, 80);
    let running = outer.start(&line(
        "tty; for n in 0 1 2; do stat -Lc fd=%t-%d-%i /proc/self/fd/$n; done; exec 9</dev/tty && echo 'it controls'; echo END",
    ));
    assert_eq!(running.ended().code(), Some(0), "{}", outer.screen());
    assert!(eventually(LIMIT_MS, || outer.screen().contains("END")), "{}", outer.screen());
    let screen = outer.screen();
    let name = screen.lines().next().expect("a name").trim();
    let number = name.strip_prefix("/dev/pts/").unwrap_or_else(|| panic!("no name in /dev/pts: {screen}"));
    number.parse::<u32>().unwrap_or_else(|_| panic!("not a number: {name}"));
    assert!(screen.contains("it controls"), "{screen}");
    let callers = rustix::fs::fstat(&outer.terminal).expect("the caller's terminal");
    // 88 (136): pseudo-terminals; another device number is another instance of devpts.
    for stream in screen.lines().filter_map(|line| Some(line.trim().split_once('=')?.1.to_owned())) {
        let parts: Vec<&str> = stream.split('-').collect();
        assert_eq!(parts[0], "88", "not a terminal: {screen}");
        assert_ne!(parts[1], callers.st_dev.to_string(), "the caller's own devpts: {screen}");
    }
    assert_eq!(screen.matches("fd").count(), 3, "{screen}");
}

#[test]
fn an_interactive_shell_stops_continues_and_interrupts_jobs() {
    let outer = Outer::new(24, 80);
    let shell = ["bash", "--norc", "--noprofile", "-i"];
    let running = outer.start(&on_tty(&["--policy", "shell"], &shell));
    // The answers are computed, so that the echo of what is typed is never taken for one.
    outer.expect("$ ");
    outer.type_in("PS1=; sh -c 'echo READY-$((40+2)); exec sleep 1000'\r");
    outer.expect("READY-42");
    outer.type_in(CONTROL_Z);
    outer.expect("Stopped");
    outer.type_in("bg; echo BG-$((1+1))\r");
    outer.expect("BG-2");
    outer.type_in("jobs\r");
    outer.expect("Running");
    outer.type_in("echo FG-$((2+2)); fg\r");
    outer.expect("FG-4");
    outer.expect("exec sleep 1000");
    outer.type_in(CONTROL_C);
    outer.type_in("echo STATUS-$?\r");
    outer.expect("STATUS-130");
    outer.type_in("[[ $- == *m* ]] && exit 7\r");
    assert_eq!(running.ended().code(), Some(7), "{}", outer.screen());
}

#[test]
fn the_size_is_the_callers_at_the_start_and_after_every_change() {
    let outer = Outer::new(33, 77);
    let running = outer.start(&line(
        "stty size; trap 'stty size' WINCH; trap 'exit 5' INT; echo READY; while :; do sleep 0.05; done",
    ));
    outer.expect("33 77");
    outer.expect("READY");
    for (rows, columns) in [(44, 99), (10, 20)] {
        outer.resize(rows, columns);
        outer.expect(&format!("{rows} {columns}"));
    }
    outer.type_in(CONTROL_C);
    assert_eq!(running.ended().code(), Some(5), "{}", outer.screen());
}

/// The ways in which a run can end, each on a terminal of its own.
#[test]
fn the_callers_terminal_is_raw_during_the_run_and_as_before_after_it_however_it_ends() {
    use nix::sys::signal::Signal::SIGTERM;
    let hold = "echo READY; exec sleep 1000";
    let ways: [(&str, Command, &[&str], i32); 7] = [
        ("by itself", line("echo READY; read x; exit 3"), &["\r"], 3),
        ("at the time limit", on_tty(&["--timeout", "3s"], &["sh", "-c", hold]), &[], 124),
        ("by a signal to the broker", line(hold), &[], 128 + libc::SIGTERM),
        ("by a signal to the command", line("echo READY; read x; kill -9 $$"), &["\r"], 128 + libc::SIGKILL),
        ("after the inside broke its own terminal", line("stty -echo raw; echo READY; head -c1"), &["x"], 0),
        ("before its start", on_tty(&[], &["/no/such/program"]), &[], 127),
        ("at its start", on_tty(&[], &["/tmp"]), &[], 126),
    ];
    for (way, command, keys, code) in ways {
        let outer = Outer::new(24, 80);
        let before = comparable(&outer.modes());
        let usual = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        assert!(before.2.contains(usual), "a usual terminal");
        let running = outer.start(&command);
        if ![126, 127].contains(&code) {
            outer.expect("READY");
            assert!(!outer.modes().local_modes.intersects(usual), "{way}: not raw");
        }
        if way == "by a signal to the broker" {
            running.signal(SIGTERM);
        }
        keys.iter().for_each(|key| outer.type_in(key));
        assert_eq!(running.ended().code(), Some(code), "{way}: {}", outer.screen());
        assert_eq!(comparable(&outer.modes()), before, "{way}: the caller's terminal is not as it was");
    }
}

/// termios(3): `VEOF` ends the input only at the start of a line, so a last line without its end needs two.
#[test]
fn piped_input_reaches_a_command_on_a_fresh_terminal_and_its_end_too() {
    for input in ["one\ntwo\n", "one\ntwo", "one\n"] {
        let script = "tty && read first && echo \"got:$first\" && cat >/dev/null && echo ENDED";
        let mut command = on_tty(&["--timeout", "10s"], &["sh", "-c", script]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("it starts");
        child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("it takes input");
        let output = child.wait_with_output().expect("its output");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(0), "{input:?}: {text}");
        assert!(text.contains("/dev/pts/") && text.contains("got:one") && text.contains("ENDED"), "{text}");
    }
}

/// tty_ioctl(2): `TIOCSTI` puts a byte into the input queue of a terminal, for whoever reads it next.
const PUSH: &str = "import fcntl, os, termios\n\
    said = []\n\
    for target in (0, 1, 2, '/dev/tty'):\n\
    \x20   try:\n\
    \x20       fd = os.open(target, os.O_RDWR) if isinstance(target, str) else target\n\
    \x20       for key in b'touch pwned\\n': fcntl.ioctl(fd, termios.TIOCSTI, bytes([key]))\n\
    \x20       said.append('open')\n\
    \x20   except OSError as error: said.append(error.strerror)\n\
    print('PUSHED', said, flush=True)\n";

/// Oracle: the input queue of the caller's terminal, which FIONREAD counts, and its screen, where it would be echoed.
/// Where `dev.tty.legacy_tiocsti` is 0 the control is open for root only.
#[test]
fn nothing_is_typed_into_the_callers_terminal_from_inside() {
    let control = Outer::new(24, 80);
    let mut push = Command::new("python3");
    push.args(["-c", PUSH]);
    assert_eq!(control.start(&push).ended().code(), Some(0), "python3 (Debian: python3) runs");
    assert!(eventually(LIMIT_MS, || control.waiting() > 0), "the control is not open: {}", control.screen());
    let outer = Outer::new(24, 80);
    let running = outer.start(&on_tty(&[], &["/usr/bin/python3", "-c", PUSH]));
    assert_eq!(running.ended().code(), Some(0), "{}", outer.screen());
    outer.expect("PUSHED");
    assert_eq!(outer.waiting(), 0, "typed into the caller's terminal");
    assert!(!outer.screen().contains("touch pwned"), "{}", outer.screen());
}

/// What `stat` says inside of the standard streams of a command that `change` has given them: kind, inode, device.
fn streams_inside(change: impl FnOnce(&mut Command)) -> Vec<String> {
    let workspace = tempfile::tempdir().expect("a temporary directory");
    // The shell's own are copied first: standard output is the file while stat runs.
    let script = "exec 3<&0 4>&1 5>&2; \
                  for n in 3 4 5; do stat -Lc '%F %i %d %t:%T' /proc/$$/fd/$n; done >/workspace/streams 2>&1";
    let mut command = Command::new(program("broker"));
    command
        .args(["exec", "--embedded", "--workspace"])
        .arg(workspace.path())
        .args(["--", "sh", "-c", script]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    change(&mut command);
    assert_eq!(command.status().expect("it runs").code(), Some(0));
    let seen = fs::read_to_string(workspace.path().join("streams")).expect("what stat said");
    assert_eq!(seen.lines().count(), 3, "{seen}");
    seen.lines().map(str::to_owned).collect()
}

/// The same of a stream on the host.
fn on_host(kind: &str, stream: impl AsFd) -> String {
    let found = rustix::fs::fstat(stream).expect("fstat");
    let device = (rustix::fs::major(found.st_rdev), rustix::fs::minor(found.st_rdev));
    format!("{kind} {} {} {:x}:{:x}", found.st_ino, found.st_dev, device.0, device.1)
}

#[test]
fn pipes_pass_as_they_are() {
    let [(input, _w), (_r, output), (_q, errors)] = [(); 3].map(|()| std::io::pipe().expect("a pipe"));
    let wanted = [on_host("fifo", &input), on_host("fifo", &output), on_host("fifo", &errors)];
    let seen = streams_inside(|command| {
        command.stdin(input).stdout(output).stderr(errors);
    });
    assert_eq!(seen, wanted);
}

#[test]
fn a_null_device_of_the_sandbox_s_own_takes_the_place_of_the_host_s_and_of_what_is_closed() {
    let null = on_host("character special file", File::open("/dev/null").expect("/dev/null"));
    let inside = streams_inside(|_| {});
    assert!(inside.iter().all(|stream| stream.ends_with(" 1:3") && *stream != null), "{inside:?}");
    for closing in ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"] {
        let seen = streams_inside(|command| {
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("exec \"$@\" {closing}"), "sh"]).arg(command.get_program());
            shell.args(command.get_args()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            *command = shell;
        });
        assert!(seen.iter().all(|stream| stream.ends_with(" 1:3")), "{closing}: {seen:?}");
    }
}

#[test]
fn files_sockets_named_pipes_and_terminals_are_relayed_and_a_nameless_pipe_is_what_is_inside() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let path = folder.path().join("file");
    let open = || OpenOptions::new().read(true).append(true).create(true).open(&path).expect("a file");
    let named = folder.path().join("named");
    nix::unistd::mkfifo(&named, nix::sys::stat::Mode::S_IRWXU).expect("a named pipe");
    let (socket, _peer) = UnixStream::pair().expect("a pair");
    let outer = Outer::new(24, 80);
    let fifo = OpenOptions::new().read(true).write(true).open(&named).expect("the named pipe");
    let streams: [OwnedFd; 4] =
        [open().into(), socket.into(), fifo.into(), outer.terminal.try_clone().expect("it")];
    for stream in streams {
        let callers = rustix::fs::fstat(&stream).expect("fstat");
        for number in 0..3 {
            let given = Stdio::from(stream.try_clone().expect("a descriptor"));
            let seen = streams_inside(|command| match number {
                // Input that never ends must not hold the run either.
                0 => drop(command.stdin(given)),
                1 => drop(command.stdout(given)),
                _ => drop(command.stderr(given)),
            });
            assert!(seen[number].starts_with("fifo "), "stream {number}: {seen:?}");
            let same = format!("fifo {} {} 0:0", callers.st_ino, callers.st_dev);
            assert_ne!(seen[number], same, "stream {number} is the caller's own");
        }
    }
}

/// Ten megabytes that no compression, newline or buffer of anybody's fits.
#[test]
fn ten_megabytes_go_in_and_come_out_unchanged_through_pipes_and_through_the_relay() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    let mut data = Vec::new();
    File::open("/dev/urandom").expect("randomness").take(10_000_019).read_to_end(&mut data).expect("bytes");
    fs::write(&from, &data).expect("a file");
    let cat = || {
        let mut broker = Command::new(program("broker"));
        broker.args(["exec", "--embedded", "--", "cat"]);
        broker
    };
    let mut relayed = cat();
    relayed.stdin(File::open(&from).expect("it")).stdout(File::create(&to).expect("it"));
    assert_eq!(relayed.status().expect("broker runs").code(), Some(0));
    assert!(fs::read(&to).expect("the copy") == data, "the relay changed them");
    let mut child = cat().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("broker starts");
    let mut input = child.stdin.take().expect("a pipe");
    let writer = std::thread::spawn({
        let data = data.clone();
        move || input.write_all(&data)
    });
    let output = child.wait_with_output().expect("its output");
    writer.join().expect("no panic").expect("all was taken");
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stdout == data, "the pipes changed them");
}
