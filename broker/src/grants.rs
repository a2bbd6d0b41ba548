//! `broker grant` and `broker credential`.

use std::convert::Infallible;
use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::ExitCode;

use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::{Value, json};

use crate::cli::{CredentialCommand, GrantCommand};
use crate::grant::{GrantId, Name, Narrowing};
use crate::operate::{call, connect, exit};
use crate::protocol::{
    AddCredential, AllGrants, Credentials, Derive, Derived, RemoveCredential, Revoke, Revoked,
};
use crate::say;

/// `broker grant`
pub fn grant(command: GrantCommand) -> ExitCode {
    exit(match command {
        GrantCommand::List { connect, json } => list(&connect.socket(), json),
        GrantCommand::Derive { name, allow, uses, bytes, expires, connect, command } => {
            let by = Narrowing { allow, uses, bytes, expires };
            return match derive(&connect.socket(), name, by, &command) {
                Ok(never) => match never {},
                Err(error) => exit(Err(error)),
            };
        }
        GrantCommand::Revoke { name, sandbox, connect } => revoke(&connect.socket(), name, sandbox),
    })
}

fn list(socket: &Path, json: bool) -> Result<String, String> {
    let AllGrants { grants } = call(socket, "ListGrants", &json!({}))?;
    if json {
        return serde_json::to_string_pretty(&grants)
            .map(|text| text + "\n")
            .map_err(|error| error.to_string());
    }
    let mut text =
        format!("{:<18} {:<16} {:<24} {:>6} {:>6} STATE\n", "SANDBOX", "GRANT", "HOST", "USES", "OPEN");
    for has in grants {
        let state = if has.revoked { "revoked" } else { "valid" };
        let (sandbox, grant, host) = (has.sandbox, has.grant.to_string(), has.host);
        text += &format!("{sandbox:<18} {grant:<16} {host:<24} {:>6} {:>6} {state}\n", has.uses, has.open);
    }
    Ok(text)
}

/// The door becomes descriptor 3 of what this process becomes.
fn derive(socket: &Path, grant: Name, by: Narrowing, command: &[OsString]) -> Result<Infallible, String> {
    let (Derived { grant, .. }, door) = connect(socket)?
        .call_for_descriptor::<Derived>("Derive", &Derive { grant, by: Some(by) })
        .map_err(|error| error.to_string())?;
    sandbox::pass_descriptor(door).map_err(|error| format!("descriptor 3: {error}"))?;
    let mut program = std::process::Command::new(&command[0]);
    let failed = program.args(&command[1..]).env("GRANT_FDS", format!("3:{grant}")).exec();
    Err(format!("{}: {failed}", command[0].display()))
}

fn revoke(socket: &Path, grant: GrantId, sandbox: Option<String>) -> Result<String, String> {
    let wish = Revoke { grant, sandbox };
    let Revoked { sandboxes, connections } = call(socket, "Revoke", &wish)?;
    if sandboxes == 0 {
        return Err(format!(
            "no sandbox of yours has grant {}; `broker grant list` shows which do",
            wish.grant
        ));
    }
    Ok(format!("revoked in {sandboxes} sandboxes; {connections} connections cut\n"))
}

/// `broker credential`
pub fn credential(command: CredentialCommand) -> ExitCode {
    exit(match command {
        CredentialCommand::Add { name, connect } => add(&connect.socket(), name),
        CredentialCommand::Rotate { name, connect } => rotate(&connect.socket(), name),
        CredentialCommand::List { connect, json } => credentials(&connect.socket(), json),
        CredentialCommand::Remove { name, connect } => {
            call::<Value>(&connect.socket(), "RemoveCredential", &RemoveCredential { name })
                .map(|_| String::new())
        }
    })
}

/// The secret does not pass through this process where standard input is a pipe already: the pipe itself goes over.
fn add(socket: &Path, name: Name) -> Result<String, String> {
    let text = |error: std::io::Error| error.to_string();
    let input = std::io::stdin();
    if input.is_terminal() {
        return Err("the secret comes on standard input: `broker credential add NAME < FILE`".to_owned());
    }
    let given = if crate::rights::is_pipe(&input) {
        input.as_fd().try_clone_to_owned().map_err(text)?
    } else {
        piped()?
    };
    let mut client = connect(socket)?;
    client
        .send("AddCredential", &AddCredential { name, secret: 0 }, false, &[given.as_fd()])
        .map_err(text)?;
    drop(given);
    client.reply::<Value>().map_err(|error| error.to_string())?;
    Ok(String::new())
}

/// One that is not there is a mistake in its name.
fn rotate(socket: &Path, name: Name) -> Result<String, String> {
    let Credentials { names } = call(socket, "ListCredentials", &json!({}))?;
    if names.contains(&name) {
        return add(socket, name);
    }
    Err(format!("the store has no credential {name}; `broker credential add` makes a new one"))
}

/// A pipe that what stands at standard input goes through.
fn piped() -> Result<OwnedFd, String> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| error.to_string())?;
    std::thread::spawn(move || {
        let mut write = std::fs::File::from(write);
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut write);
    });
    Ok(read)
}

fn credentials(socket: &Path, json: bool) -> Result<String, String> {
    let Credentials { names } = call(socket, "ListCredentials", &json!({}))?;
    if json {
        return serde_json::to_string(&names)
            .map(|text| say::tame(&text) + "\n")
            .map_err(|error| error.to_string());
    }
    Ok(names.iter().map(|name| format!("{name}\n")).collect())
}
