//! NW-serve: listeners that log who came, around a command. Run on the host, in a network namespace of the test's.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use crate::case::Reporter;

/// What arrived, one line each.
static LOG: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn note(what: &str) {
    LOG.lock().expect("no listener panics").push(what.to_owned());
}

/// `LOG-FILE http/ADDRESS... dns/ADDRESS... mdns unix/PATH... -- COMMAND...`: listens, runs the command, and writes
/// to the file what arrived meanwhile.
pub fn serve(reporter: &Reporter, arguments: &[String]) {
    let split = arguments.iter().position(|argument| argument == "--").expect("-- before the command");
    let (log, listeners) = arguments[..split].split_first().expect("a log file");
    for listener in listeners {
        match listener.split_once('/').unwrap_or((listener, "")) {
            ("http", address) => http(listener.clone(), TcpListener::bind(address).expect("http")),
            ("dns", address) => {
                dns_datagrams(listener.clone(), UdpSocket::bind(address).expect("dns"));
                dns_streams(listener.clone(), TcpListener::bind(address).expect("dns over tcp"));
            }
            ("mdns", _) => multicast(UdpSocket::bind("0.0.0.0:5353").expect("mdns")),
            ("unix", path) => local(path),
            _ => panic!("{listener}?"),
        }
    }
    let command = &arguments[split + 1..];
    let status = Command::new(&command[0]).args(&command[1..]).status();
    // What was sent last may still be on its way to a listener.
    std::thread::sleep(std::time::Duration::from_millis(50));
    let lines = LOG.lock().expect("no listener panics").join("\n");
    std::fs::write(log, format!("{lines}\n")).expect("the log is written");
    if !status.is_ok_and(|status| status.success()) {
        reporter.not_applicable("serve", 0, "the command failed");
    }
}

fn http(name: String, listener: TcpListener) {
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            note(&name);
            let mut request = [0_u8; 512];
            let Ok(_) = stream.read(&mut request) else {
                continue;
            };
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").ok();
        }
    });
}

/// The question itself as the answer, with one address for an A record and none for others.
fn answer(question: &[u8]) -> Vec<u8> {
    // The header, then labels up to the empty one, then type and class; what follows (EDNS) is left out.
    let end = question[12..].iter().position(|byte| *byte == 0).map_or(question.len(), |at| 12 + at + 5);
    let mut answer = question[..end.min(question.len())].to_vec();
    let is_a = answer[answer.len() - 3] == 1;
    answer[2] = 0x81;
    answer[3] = 0x80;
    answer[7] = u8::from(is_a);
    answer[10] = 0;
    answer[11] = 0;
    if is_a {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 198, 51, 100, 7]);
    }
    answer
}

fn dns_datagrams(name: String, socket: UdpSocket) {
    std::thread::spawn(move || {
        let mut question = [0_u8; 512];
        while let Ok((length, from)) = socket.recv_from(&mut question) {
            note(&format!("{name} udp"));
            if length > 16 {
                socket.send_to(&answer(&question[..length]), from).ok();
            }
        }
    });
}

fn dns_streams(name: String, listener: TcpListener) {
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            note(&format!("{name} tcp"));
            let mut question = [0_u8; 514];
            let length = stream.read(&mut question).unwrap_or(0);
            stream.write_all(&question[..length]).ok();
        }
    });
}

fn multicast(socket: UdpSocket) {
    socket
        .join_multicast_v4(&Ipv4Addr::new(224, 0, 0, 251), &Ipv4Addr::LOCALHOST)
        .expect("multicast on loopback");
    std::thread::spawn(move || {
        while socket.recv(&mut [0; 512]).is_ok() {
            note("mdns");
        }
    });
}

fn local(path: &str) {
    let folder = Path::new(path).parent().expect("a path with a folder");
    std::fs::create_dir_all(folder).expect("a folder for the socket");
    let listener = UnixListener::bind(path).expect("a socket");
    let name = format!("unix/{path}");
    std::thread::spawn(move || {
        for _ in listener.incoming().flatten() {
            note(&name);
        }
    });
}
