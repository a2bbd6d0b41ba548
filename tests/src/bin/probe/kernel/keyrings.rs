//! Keyrings: neither mount nor pid namespaces hide them, and `exec` inherits the session's.

use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::case::Reporter;
use crate::kernel::raw::{self, address, address_mut, call};

const GET_KEYRING_ID: i64 = 0;
const JOIN_SESSION_KEYRING: i64 = 1;
const LINK: i64 = 8;
const SEARCH: i64 = 10;
const READ: i64 = 11;
const SET_TIMEOUT: i64 = 15;
const SESSION: i64 = -3;
const USER: i64 = -4;
const USER_SESSION: i64 = -5;

/// KS-03-plant `TOKEN COMMAND...`: puts `TOKEN` under the name `broker-test` into a fresh session keyring, and into
/// the user's, then becomes the command, with the keys' numbers for `{session}` and `{user}`.
pub fn plant(reporter: &Reporter, arguments: &[String]) {
    let (token, command) = arguments.split_first().expect("a token");
    let joined = call(libc::SYS_keyctl, &[JOIN_SESSION_KEYRING, 0]);
    // Linked, so that the session possesses the user's keys, as a login does it.
    call(libc::SYS_keyctl, &[LINK, USER, SESSION]);
    let mut serials = Vec::new();
    for (ring, name) in [(SESSION, c"broker-test"), (USER, c"broker-test-user")] {
        let payload = address(token.as_bytes());
        let key = [address(c"user"), name.as_ptr() as i64, payload, token.len() as i64, ring];
        let serial = call(libc::SYS_add_key, &key);
        // Gone soon, whatever becomes of us.
        call(libc::SYS_keyctl, &[SET_TIMEOUT, serial, 60]);
        serials.push(serial);
    }
    if joined < 0 || serials.iter().any(|serial| *serial < 0) {
        return reporter.not_applicable("plant", raw::errno(), "this host has no keyrings for us");
    }
    let filled = command.iter().map(|word| match word.as_str() {
        "{session}" => serials[0].to_string(),
        "{user}" => serials[1].to_string(),
        _ => word.clone(),
    });
    let filled: Vec<String> = filled.collect();
    let error = Command::new(&filled[0]).args(&filled[1..]).exec();
    reporter.not_applicable("plant", error.raw_os_error().unwrap_or(0), "the command does not start");
}

/// KS-03 `SESSION-KEY USER-KEY`: every way to the host's keys.
pub fn read(reporter: &Reporter, arguments: &[String]) {
    for (case, ring) in
        [("id of session", SESSION), ("id of user", USER), ("id of user session", USER_SESSION)]
    {
        reporter.syscall(case, call(libc::SYS_keyctl, &[GET_KEYRING_ID, ring, 0]));
    }
    let user = address(c"user");
    for (case, ring, name) in [("session", SESSION, c"broker-test"), ("user", USER, c"broker-test-user")] {
        let name = name.as_ptr() as i64;
        let found = call(libc::SYS_keyctl, &[SEARCH, ring, user, name, 0]);
        reporter.syscall(&format!("search {case}"), found);
        reporter.syscall(&format!("request {case}"), call(libc::SYS_request_key, &[user, name, 0, 0]));
    }
    for (case, serial) in [("read session key", &arguments[0]), ("read user key", &arguments[1])] {
        let mut payload = [0_u8; 256];
        let serial: i64 = serial.parse().expect("a key's number");
        let length = call(libc::SYS_keyctl, &[READ, serial, address_mut(&mut payload), 256]);
        match usize::try_from(length) {
            Ok(length) => reporter.open(case, &String::from_utf8_lossy(&payload[..length.min(256)])),
            Err(_) => reporter.syscall(case, length),
        }
    }
    let own = [user, address(c"broker-test-own"), address(b"x"), 1, -1];
    reporter.syscall("add_key", call(libc::SYS_add_key, &own));
    let listed = std::fs::read_to_string("/proc/keys").unwrap_or_default();
    raw::found(reporter, "/proc/keys", listed.contains("broker-test").then_some(listed));
}
