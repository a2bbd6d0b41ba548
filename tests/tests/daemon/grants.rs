//! Grants: what a sandbox reaches of networks, as whom, and how it ends. Real servers on loopback, unmodified clients inside; what the
//! servers saw is the oracle.

#[path = "grants/canary.rs"]
mod canary;
#[path = "grants/doors.rs"]
mod doors;
#[path = "grants/gateway.rs"]
mod gateway;
#[path = "grants/lookups.rs"]
mod lookups;
#[path = "grants/rows.rs"]
mod rows;
#[path = "grants/servers.rs"]
mod servers;
#[path = "grants/tenants.rs"]
mod tenants;
#[path = "grants/upstreams.rs"]
mod upstreams;
#[path = "grants/used.rs"]
mod used;

use super::*;
use servers::{Echo, Nginx, free_port};

/// What nobody but the vault, a gateway and the upstream may ever have.
fn secret() -> String {
    format!(
        "canary-{}-{:x}",
        std::process::id(),
        std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_nanos()
    )
}

/// A daemon with `grants`, all of them Ada's, and `secret` in the store as `api`.
fn daemon(grants: &str, secret: &str) -> Daemon {
    daemon_after("true", grants, secret)
}

/// The same, in a mount namespace where `script` has run.
fn daemon_after(script: &str, grants: &str, secret: &str) -> Daemon {
    let names: Vec<&str> =
        grants.lines().filter_map(|line| line.strip_prefix("[grant.")?.strip_suffix(']')).collect();
    let more = format!(
        "[credential.api]\nsource = \"store:api\"\n{grants}\n[[access]]\nuser = \"{ADA}\"\ngrants = {names:?}\n"
    );
    let daemon = Daemon::start_with(script, &more);
    let mut add = daemon.broker(0, &["credential", "add", "api"]);
    let mut add = add.stdin(Stdio::piped()).spawn().expect("it starts");
    std::io::Write::write_all(&mut add.stdin.take().expect("a pipe"), format!("{secret}\n").as_bytes())
        .expect("it reads");
    assert!(add.wait().expect("it ends").success(), "{}", daemon.log());
    daemon
}

/// A grant of kind `http` for `nginx`.
fn api(nginx: &Nginx, allow: &str) -> String {
    format!(
        "[grant.api]\nkind = \"http\"\nhost = \"api.test\"\ncredential = \"api\"\n\
         inject = {{ header = \"Authorization\", value = \"Bearer {{secret}}\" }}\nallow = [ {allow} ]\n\
         upstream = \"127.0.0.1:{}\"\nupstream_ca = \"file:{}\"\n",
        nginx.port,
        nginx.authority().display()
    )
}

/// A grant of kind `tcp` for `echo`, and what else is said of it.
fn echo_grant(echo: &Echo, more: &str) -> String {
    format!(
        "[grant.echo]\nkind = \"tcp\"\nhost = \"echo.test\"\nport = 7\nupstream = \"127.0.0.1:{}\"\n{more}",
        echo.port
    )
}

const READ_ALL: &str = "{ methods = [\"GET\"], path = \"/**\" }";

/// Runs `script` with a shell, as Ada, with `grants`.
fn run(daemon: &Daemon, grants: &[&str], script: &str) -> Output {
    let options: Vec<&str> = grants.iter().flat_map(|grant| ["--grant", *grant]).collect();
    daemon.exec(ADA, &options, &["sh", "-c", script])
}

fn said(output: &Output) -> (String, String) {
    (text(&output.stdout), text(&output.stderr))
}

/// Records of one kind.
fn of_kind(daemon: &Daemon, kind: &str) -> Vec<Value> {
    let mut events: Vec<Value> =
        daemon.records().into_iter().map(|mut record| record["event"].take()).collect();
    events.retain(|event| event["kind"] == kind);
    events
}
