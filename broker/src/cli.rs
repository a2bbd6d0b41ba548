//! The command line, as INTERFACES fixes it. Help, man pages and completions come from these definitions.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use sandbox::{ByteSize, Count, Cpus, EnvName, Span, WorkspaceMode, WorkspaceWish};

use crate::grant::{GrantId, Name, Rule};
use crate::say::{self, complain};

/// Runs tools confined: a sandbox for each run, and no credential inside.
#[derive(Debug, Parser)]
#[command(
    name = "broker",
    version,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run one confined command
    #[command(after_help = EXEC_HELP)]
    Exec(Box<ExecArguments>),
    /// Run the daemon (as root)
    Serve {
        /// Instead of /etc/broker/config.toml
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// A part of the daemon, started by it
    #[command(hide = true)]
    Role {
        /// Which
        role: Role,
        /// Which of them, of gateways
        #[arg(default_value_t = 0)]
        number: u32,
    },
    /// List the daemon's sandboxes that live
    Ps {
        #[command(flatten)]
        connect: Connect,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what is known of one sandbox, as JSON
    Inspect {
        /// Its name, as `broker ps` lists it
        #[arg(value_name = "ID")]
        sandbox: String,
        #[command(flatten)]
        connect: Connect,
    },
    /// End a sandbox at once
    Kill {
        /// Its name, as `broker ps` lists it
        #[arg(value_name = "ID")]
        sandbox: String,
        #[command(flatten)]
        connect: Connect,
    },
    /// Show what a sandbox changed in a workspace of mode `cow`; without a name, of which sandboxes changes are held
    Diff {
        /// The sandbox's name
        #[arg(value_name = "ID")]
        sandbox: Option<String>,
        /// Where the workspace is, if it was moved
        #[arg(long, value_name = "DIR")]
        workspace: Option<PathBuf>,
        #[command(flatten)]
        connect: Connect,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Make the changes that are held in the workspace itself
    Commit {
        /// The sandbox's name
        #[arg(value_name = "ID")]
        sandbox: String,
        /// Where the workspace is, if it was moved
        #[arg(long, value_name = "DIR")]
        workspace: Option<PathBuf>,
        /// Overwrite what was changed in the workspace since, too
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        connect: Connect,
    },
    /// Throw the changes away that are held
    Discard {
        /// The sandbox's name
        #[arg(value_name = "ID")]
        sandbox: String,
        #[command(flatten)]
        connect: Connect,
    },
    /// List, derive and revoke grants
    #[command(subcommand)]
    Grant(GrantCommand),
    /// Add, rotate, list and remove credentials of the vault's store
    #[command(subcommand)]
    Credential(CredentialCommand),
    /// Show or verify the daemon's record
    #[command(subcommand)]
    Audit(AuditCommand),
    /// List, show, check and explain policies
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Say what this host can enforce, and what to do about the rest
    Doctor {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Print completions for a shell
    Completions {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a directory
    Man {
        /// An existing directory
        directory: PathBuf,
    },
}

/// A part of the daemon.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Role {
    /// Speaks with peers and decides.
    Core,
    /// Holds secrets.
    Vault,
    /// Turns names into addresses.
    Resolver,
    /// Speaks with a workload.
    Gateway,
}

/// Where the daemon listens.
#[derive(Debug, Args)]
pub struct Connect {
    /// The daemon's socket
    #[arg(long, value_name = "SOCKET")]
    connect: Option<PathBuf>,
}

impl Connect {
    /// As given, or where it listens by default.
    pub fn socket(&self) -> PathBuf {
        self.connect.clone().unwrap_or_else(|| crate::serve::SOCKET.into())
    }
}

/// `broker grant`
#[derive(Debug, Subcommand)]
pub enum GrantCommand {
    /// Show which sandboxes have which grants
    List {
        #[command(flatten)]
        connect: Connect,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a narrower grant, and run a command outside of any sandbox that has it as its descriptor 3
    Derive {
        /// A grant of the configuration that is yours to use
        name: Name,
        /// Of what may be asked for, only this: `GET,HEAD /repos/acme/**`; repeatable
        #[arg(long, value_name = "METHODS PATH")]
        allow: Vec<Rule>,
        /// How many connections may be made
        #[arg(long, value_name = "N")]
        uses: Option<u64>,
        /// How much may go through before it is cut, as `10MiB`
        #[arg(long, value_name = "SIZE")]
        bytes: Option<ByteSize>,
        /// How long from now, as `5m`
        #[arg(long, value_name = "DURATION")]
        expires: Option<Span>,
        #[command(flatten)]
        connect: Connect,
        /// What has it: a program that speaks `io.broker.Grant`
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// End a grant: its connections are cut, those of grants derived from it too, and none can be made after
    Revoke {
        /// The grant, as the configuration calls it, or one that was derived, as `github/1`
        name: GrantId,
        /// Of one sandbox alone; without it, of all that have it
        #[arg(long, value_name = "ID")]
        sandbox: Option<String>,
        #[command(flatten)]
        connect: Connect,
    },
}

/// `broker credential`
#[derive(Debug, Subcommand)]
pub enum CredentialCommand {
    /// Keep a secret from standard input (one line) under a name; one that is there is replaced
    Add {
        /// The name after `store:` in the configuration
        name: Name,
        #[command(flatten)]
        connect: Connect,
    },
    /// Replace a secret that is there by one from standard input; what runs uses it from its next request on
    Rotate {
        /// Its name
        name: Name,
        #[command(flatten)]
        connect: Connect,
    },
    /// List names; what they stand for never comes out
    List {
        #[command(flatten)]
        connect: Connect,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Forget a secret
    Remove {
        /// Its name
        name: Name,
        #[command(flatten)]
        connect: Connect,
    },
}

/// `broker audit`
#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Print every record, one line each
    Show {
        /// The daemon's state directory
        #[arg(long, value_name = "DIR", default_value = crate::serve::STATE)]
        state: PathBuf,
    },
    /// Check that no record was edited, removed, reordered or cut off
    Verify {
        /// The daemon's state directory
        #[arg(long, value_name = "DIR", default_value = crate::serve::STATE)]
        state: PathBuf,
    },
}

const EXEC_HELP: &str = "\
Exit status: the command's own; 128+N when signal N ended it; 124 at the timeout; 125 when the sandbox could not be set
up; 126 when the command cannot be executed; 127 when it was not found; 137 also when memory ran out.

Examples:
  broker exec -- id
  broker exec --policy python --workspace . -- python3 script.py
  broker exec --workspace src:ro --timeout 30s --memory 256MiB --report report.json -- grep -rn TODO .
  broker exec --grant api -- curl -sS https://api.test/repos/site
  broker exec --policy shell --tty -- bash";

/// `broker exec`
#[derive(Debug, Args)]
pub struct ExecArguments {
    /// A policy's name, or a file (with a `/`, or ending in `.toml`)
    #[arg(long, value_name = "NAME|FILE", default_value = "default")]
    pub policy: String,
    /// Mount a directory at /workspace and work there; `rw` where no mode is given, `cow` keeps changes apart
    #[arg(long, value_name = "DIR[:ro|:rw|:cow]", value_parser = parse_workspace)]
    pub workspace: Option<WorkspaceArgument>,
    /// Set a variable, or pass the caller's on; nothing else is inherited (repeatable)
    #[arg(long, value_name = "NAME[=VALUE]", value_parser = parse_env)]
    pub env: Vec<EnvArgument>,
    /// SIGTERM after this time (30s, 5m), then a grace period, then SIGKILL for the whole tree
    #[arg(long, value_name = "DURATION")]
    pub timeout: Option<Span>,
    /// Less memory than the policy gives (64MiB, 1GiB)
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<ByteSize>,
    /// Fewer processes and threads than the policy gives
    #[arg(long, value_name = "N")]
    pub pids: Option<Count>,
    /// Less processor time than the policy gives (0.5)
    #[arg(long, value_name = "X")]
    pub cpus: Option<Cpus>,
    /// Let it reach what a grant of the daemon's configuration names (repeatable)
    #[arg(long, value_name = "NAME")]
    pub grant: Vec<Name>,
    /// Write the report as JSON; `-` for standard output
    #[arg(long, value_name = "FILE|-")]
    pub report: Option<PathBuf>,
    /// Run in a fresh pseudo-terminal
    #[arg(long)]
    pub tty: bool,
    /// Run in this process's own tree, even where a daemon answers
    #[arg(long, conflicts_with = "connect")]
    pub embedded: bool,
    /// Run through the daemon that listens there, and not at all where none does
    #[arg(long, value_name = "SOCKET")]
    pub connect: Option<PathBuf>,
    /// Run in a sandbox of one's own that lives in the daemon, beside what runs there
    #[arg(long = "in", value_name = "ID", conflicts_with_all = ["policy", "workspace", "timeout", "memory", "pids", "cpus", "grant", "tty", "embedded"])]
    pub sandbox: Option<String>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// `--workspace`
pub type WorkspaceArgument = WorkspaceWish;

/// `--env`
#[derive(Debug, Clone)]
pub struct EnvArgument {
    /// The variable.
    pub name: EnvName,
    /// Its value; the caller's where there is none.
    pub value: Option<OsString>,
}

/// `broker policy`
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// List the policies that can be named
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a policy with everything it extends, as JSON
    Show {
        /// A policy's name, or a file
        #[arg(value_name = "NAME|FILE", default_value = "default")]
        policy: String,
    },
    /// Check policy files; silent when they are good
    Check {
        /// Policies' names, or files
        #[arg(value_name = "NAME|FILE", required = true)]
        policies: Vec<String>,
    },
    /// Say what a policy comes to on this host
    Explain {
        /// A policy's name, or a file
        #[arg(long, value_name = "NAME|FILE", default_value = "default")]
        policy: String,
        /// The directory that would be mounted at /workspace
        #[arg(long, value_name = "DIR[:ro|:rw|:cow]", value_parser = parse_workspace)]
        workspace: Option<WorkspaceArgument>,
        /// The plan itself, as JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the policy language's JSON schema
    Schema,
}

/// Parses this process's arguments; prints help or an error and ends where there is nothing to do.
pub fn parse() -> Command {
    let mut arguments = std::env::args_os();
    let parsed = if arguments.nth(1).is_some_and(|command| command == "exec") {
        // The other commands' definitions cost a tenth of a millisecond, and nobody asked for them.
        let exec = ExecArguments::augment_args(clap::Command::new("broker exec").after_help(EXEC_HELP));
        let matches = exec.no_binary_name(true).try_get_matches_from(arguments);
        matches
            .and_then(|matches| ExecArguments::from_arg_matches(&matches))
            .map(|exec| Command::Exec(Box::new(exec)))
    } else {
        Cli::try_parse().map(|cli| cli.command)
    };
    // A wrong command line is ours to refuse, and 125 is how `exec` says so; elsewhere too, for one rule.
    match parsed {
        Ok(command) => command,
        Err(error)
            if error.use_stderr() && error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand =>
        {
            complain!("{}", in_one_line(&error));
            std::process::exit(125)
        }
        Err(help) => {
            let status = if help.use_stderr() { 125 } else { 0 };
            let _ = help.print();
            std::process::exit(status)
        }
    }
}

/// What is wrong and how to mend it, without the usage.
fn in_one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let said = text
        .split("\nUsage:")
        .next()
        .unwrap_or(&text)
        .split("\nFor more information")
        .next()
        .unwrap_or(&text);
    // A second tip is how to pass it to the command all the same, which nobody means.
    let mut parts = said.split("tip: ");
    let words = |part: &str| part.split_whitespace().collect::<Vec<_>>().join(" ");
    let what = words(parts.next().unwrap_or_default());
    let what = what.strip_prefix("error: ").unwrap_or(&what).to_owned();
    let tip = parts.next().map(words).filter(|tip| !tip.starts_with("to pass"));
    let mut arguments = std::env::args_os().skip(1);
    let is_exec = arguments.next().is_some_and(|command| command == "exec");
    let stray =
        error.kind() == ErrorKind::UnknownArgument && is_exec && !arguments.any(|argument| argument == "--");
    let stray = stray.then(|| "the command comes after `--`".to_owned());
    let help = "`--help` shows what there is".to_owned();
    [Some(what), tip, stray, Some(help)].into_iter().flatten().collect::<Vec<_>>().join("; ")
}

/// Prints completions for `shell`.
pub fn completions(shell: clap_complete::Shell) -> Result<(), String> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "broker", &mut text);
    say::print(&String::from_utf8_lossy(&text))
}

/// Writes a page for each command into `directory`.
pub fn man_pages(directory: &std::path::Path) -> std::io::Result<()> {
    clap_mangen::generate_to(Cli::command(), directory)
}

fn parse_workspace(text: &str) -> Result<WorkspaceArgument, String> {
    let (directory, mode) = match text.rsplit_once(':') {
        Some((directory, "ro")) => (directory, WorkspaceMode::ReadOnly),
        Some((directory, "rw")) => (directory, WorkspaceMode::ReadWrite),
        Some((directory, "cow")) => (directory, WorkspaceMode::CopyOnWrite),
        _ => (text, WorkspaceMode::ReadWrite),
    };
    if directory.is_empty() {
        return Err("the directory is empty; give `.` for the current one".to_owned());
    }
    Ok(WorkspaceWish { directory: directory.into(), mode })
}

fn parse_env(text: &str) -> Result<EnvArgument, String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.into())),
        None => (text, None),
    };
    let name = name.parse().map_err(|error: sandbox::WordError| error.to_string())?;
    Ok(EnvArgument { name, value })
}
