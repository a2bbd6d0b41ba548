//! `broker ps`, `inspect`, `kill`: what lives in the daemon.

use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value, json};

use crate::protocol::{Named, Sandbox, Sandboxes};
use crate::say::{self, complain};
use crate::{Client, ClientError};

/// To the daemon that listens there.
pub fn connect(socket: &Path) -> Result<Client, String> {
    Client::connect(socket)
        .map_err(|error| format!("no daemon answers at {}: {error}; start `broker serve`", socket.display()))
}

/// One call to it.
pub fn call<T: serde::de::DeserializeOwned>(
    socket: &Path,
    method: &str,
    parameters: &impl serde::Serialize,
) -> Result<T, String> {
    connect(socket)?.call(method, parameters).map_err(|error: ClientError| error.to_string())
}

/// Prints what came of a command, or says why nothing did.
pub fn exit(done: Result<String, String>) -> ExitCode {
    match done.and_then(|text| say::print(&text)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn all(socket: &Path) -> Result<Vec<Sandbox>, String> {
    call::<Sandboxes>(socket, "List", &json!({})).map(|list| list.sandboxes)
}

/// `broker ps`
pub fn list(socket: &Path, json: bool) -> ExitCode {
    exit(all(socket).and_then(|sandboxes| {
        if json {
            let text = serde_json::to_string_pretty(&sandboxes).map_err(|error| error.to_string())?;
            return Ok(say::tame(&text) + "\n");
        }
        let line = |sandbox: &Sandbox| {
            // A command may hold anything; a terminal is told of it in JSON's escapes.
            let command = serde_json::to_string(&sandbox.command.join(" ")).unwrap_or_default();
            let command = say::tame(&command);
            let session = sandbox.session.as_deref().unwrap_or("-");
            format!("{:<18} {:<10} {:<10} {session:<10} {command}\n", sandbox.id, sandbox.uid, sandbox.policy)
        };
        let head =
            format!("{:<18} {:<10} {:<10} {:<10} {}\n", "SANDBOX", "UID", "POLICY", "SESSION", "COMMAND");
        Ok(head + &sandboxes.iter().map(line).collect::<String>())
    }))
}

/// `broker inspect`
pub fn inspect(socket: &Path, id: &str) -> ExitCode {
    exit(call::<Value>(socket, "Inspect", &Named { sandbox: id.to_owned() }).and_then(|found| {
        serde_json::to_string_pretty(&found)
            .map(|text| say::tame(&text) + "\n")
            .map_err(|error| error.to_string())
    }))
}

/// `broker kill`
pub fn kill(socket: &Path, id: &str) -> ExitCode {
    exit(call::<Value>(socket, "Kill", &Named { sandbox: id.to_owned() }).map(|_| String::new()))
}
