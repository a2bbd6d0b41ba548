//! The interface as an independent client sees it: zlink, whose codec and types are nobody's here.

use std::os::fd::{AsRawFd, OwnedFd};

use serde::{Deserialize, Serialize};
use zlink::varlink_service::Proxy;

use super::*;

#[derive(Debug, Clone, PartialEq, zlink::ReplyError)]
#[zlink(interface = "io.broker.Control")]
enum ControlError {
    Denied { code: String, message: String },
    NoSuchSandbox { sandbox: String },
    NoSuchHandle { handle: u32 },
}

#[derive(Debug, Serialize, Deserialize)]
struct Provisioned {
    sandbox: String,
    handle: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct Executed {
    sandbox: String,
    state: String,
    outcome: Option<Value>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Sandboxes {
    sandboxes: Vec<Value>,
}

#[zlink::proxy("io.broker.Control")]
trait Control {
    async fn list(&mut self) -> zlink::Result<Result<Sandboxes, ControlError>>;
    async fn kill(&mut self, sandbox: &str) -> zlink::Result<Result<(), ControlError>>;
    #[zlink(return_fds)]
    async fn provision(
        &mut self,
        policy: &str,
        environment: Vec<Value>,
        path: &str,
    ) -> zlink::Result<(Result<Provisioned, ControlError>, Vec<OwnedFd>)>;
    #[zlink(return_fds)]
    #[allow(clippy::too_many_arguments, reason = "the interface has as many")]
    async fn execute(
        &mut self,
        handle: u32,
        effect: &str,
        command: Vec<String>,
        environment: Vec<Value>,
        path: &str,
        streams: Value,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<(Result<Executed, ControlError>, Vec<OwnedFd>)>;
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(future)
}

#[test]
fn an_independent_client_provisions_executes_and_reads_errors() {
    let daemon = Daemon::start();
    wait(async {
        let mut client = zlink::tokio::unix::connect(daemon.socket()).await.expect("it listens");
        let listed = client.list().await.expect("a reply").expect("a list");
        assert!(listed.sandboxes.is_empty());
        let no = client.kill("nobody").await.expect("a reply").expect_err("there is none");
        assert_eq!(no, ControlError::NoSuchSandbox { sandbox: "nobody".to_owned() });
        let (made, mut given) = client.provision("default", Vec::new(), "/bin").await.expect("a reply");
        let made = made.expect("a sandbox");
        assert_eq!((made.handle, given.len()), (0, 1));
        let handle = given.remove(0);
        for turn in 0..50 {
            let (mut out, into) = std::io::pipe().expect("a pipe");
            let words = ["echo", &turn.to_string()].map(str::to_owned).to_vec();
            let copy = handle.try_clone().expect("a copy");
            let (ran, _) = client
                .execute(
                    0,
                    &format!("turn {turn}"),
                    words,
                    Vec::new(),
                    "/bin",
                    serde_json::json!({ "output": 1 }),
                    vec![copy, into.into()],
                )
                .await
                .expect("a reply");
            let ran = ran.expect("it ran");
            assert_eq!((ran.sandbox.as_str(), ran.state.as_str()), (made.sandbox.as_str(), "finished"));
            let mut said = String::new();
            std::io::Read::read_to_string(&mut out, &mut said).expect("its output");
            assert_eq!(said, format!("{turn}\n"));
        }
        let stranger = UnixStream::pair().expect("a pair").0;
        assert!(stranger.as_raw_fd() > 2);
        let (no, _) = client
            .execute(
                0,
                "x",
                vec!["true".into()],
                Vec::new(),
                "/bin",
                serde_json::json!({}),
                vec![stranger.into()],
            )
            .await
            .expect("a reply");
        assert_eq!(no.expect_err("it is no handle"), ControlError::NoSuchHandle { handle: 0 });
    });
}

/// What introspection says parses as an interface, and names what can be called.
#[test]
fn the_service_describes_itself() {
    let daemon = Daemon::start();
    wait(async {
        let mut client = zlink::tokio::unix::connect(daemon.socket()).await.expect("it listens");
        let info = client.get_info().await.expect("a reply").expect("it tells");
        assert_eq!(info.interfaces, ["org.varlink.service", "io.broker.Control"]);
        for name in ["io.broker.Control", "org.varlink.service"] {
            let described = client
                .get_interface_description(name.try_into().expect("a name"))
                .await
                .expect("a reply")
                .expect("it tells");
            let interface = described.parse().expect("it is Varlink");
            let methods: Vec<String> = interface.methods().map(|method| method.name().to_string()).collect();
            let wanted: &[&str] = match name {
                "io.broker.Control" => &[
                    "Run",
                    "Provision",
                    "Handle",
                    "Execute",
                    "HandOver",
                    "Narrow",
                    "List",
                    "Inspect",
                    "Signal",
                    "Kill",
                    "ListChanges",
                    "Changes",
                    "Discard",
                    "Metrics",
                    "Derive",
                    "ListGrants",
                    "Revoke",
                    "AddCredential",
                    "RemoveCredential",
                    "ListCredentials",
                    "Records",
                ],
                _ => &["GetInfo", "GetInterfaceDescription"],
            };
            assert_eq!(methods, wanted);
        }
    });
}
