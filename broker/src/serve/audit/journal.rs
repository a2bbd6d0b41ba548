//! The same record for systemd's journal, with fields (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>). What the journal does not
//! take at once is not sent again: the files are the record.

use std::os::unix::net::UnixDatagram;

use super::chain::Line;

const SOCKET: &str = "/run/systemd/journal/socket";

/// A line to the journal.
pub(super) struct Journal(UnixDatagram);

impl Journal {
    /// Nothing where there is no journal.
    pub fn connect() -> Option<Journal> {
        let socket = UnixDatagram::unbound().ok()?;
        socket.connect(SOCKET).ok()?;
        socket.set_nonblocking(true).ok()?;
        Some(Journal(socket))
    }

    pub fn tell(&self, line: &Line) {
        let _ = self.0.send(text(line).as_bytes());
    }
}

/// A field a line. JSON has no newline of its own in it, so no value can become another field.
fn text(line: &Line) -> String {
    let event = &line.event;
    let is_refusal = event["kind"] == "deny" || event["kind"] == "breach";
    let mut text = format!(
        "MESSAGE={event}\nPRIORITY={}\nSYSLOG_IDENTIFIER=broker\nBROKER_SEQUENCE={}\n",
        if is_refusal { 4 } else { 6 },
        line.sequence
    );
    for (key, field) in [("kind", "KIND"), ("sandbox", "SANDBOX"), ("session", "SESSION"), ("uid", "UID")] {
        if let Some(value) = event.get(key) {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            text.push_str(&format!("BROKER_{field}={}\n", value.replace(|c: char| c.is_control(), " ")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::Verified;
    use super::*;

    #[test]
    fn no_value_becomes_a_field() {
        let verified = Verified { records: 7, last: String::new() };
        let event =
            json!({ "kind": "deny", "uid": 5, "message": "a\nPRIORITY=0", "sandbox": "x\nPRIORITY=0" });
        let text = text(&Line::after(&verified, 0, event));
        assert!(text.contains("\nBROKER_SEQUENCE=7\n") && text.contains("\nBROKER_UID=5\n"), "{text}");
        assert_eq!(
            text.lines().filter(|line| line.starts_with("PRIORITY")).collect::<Vec<_>>(),
            ["PRIORITY=4"]
        );
    }
}
