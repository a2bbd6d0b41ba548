//! The command line. Help, man pages and completions come from here.

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use harness::event::Position;

/// Sessions of agents that outlive every process: an append-only log, and drivers that wake from it. A driver holds no key, has no
/// network, and runs tools in sandboxes of the broker's.
#[derive(Debug, Parser)]
#[command(name = "harness", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes a session and drives it until it is idle
    Run(Box<Run>),
    /// Goes on with a session: after a crash, after an answer, on any host that reaches the store
    Wake {
        session: String,
        #[command(flatten)]
        drive: Drive,
    },
    /// Wakes whatever is due, until it is ended: for systemd
    Drive {
        /// The most sessions at once
        #[arg(long, default_value_t = 8)]
        sessions: usize,
        #[command(flatten)]
        drive: Drive,
    },
    /// Lists sessions
    List {
        #[command(flatten)]
        store: Store,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Shows how a session is, and what was said
    Show {
        session: String,
        #[command(flatten)]
        store: Store,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Prints events of a session as JSON lines, each checked against the one before it
    Events {
        session: String,
        /// The first
        #[arg(long, default_value_t = 0)]
        from: Position,
        /// The one after the last
        #[arg(long)]
        to: Option<Position>,
        /// Only events of this type; repeatable
        #[arg(long = "type")]
        kinds: Vec<String>,
        /// Newest first
        #[arg(long, conflicts_with = "follow")]
        reverse: bool,
        /// Go on with what is appended
        #[arg(long, conflicts_with = "to")]
        follow: bool,
        #[command(flatten)]
        store: Store,
    },
    /// Says something to a session
    Send {
        session: String,
        /// What, or `-` for standard input
        text: String,
        #[command(flatten)]
        store: Store,
    },
    /// Stops what a session does
    Interrupt {
        session: String,
        #[command(flatten)]
        store: Store,
    },
    /// Lets a call run that waits for it
    Approve {
        session: String,
        /// The call: the position of its `agent.tool_use`
        event: Position,
        #[command(flatten)]
        store: Store,
    },
    /// Does not let a call run that waits for it
    Deny {
        session: String,
        /// The call: the position of its `agent.tool_use`
        event: Position,
        /// Why, for the model
        #[arg(long)]
        reason: Option<String>,
        #[command(flatten)]
        store: Store,
    },
    /// Answers a call of a custom tool
    Answer {
        session: String,
        /// The call: the position of its `agent.custom_tool_use`
        event: Position,
        /// What came of it, or `-` for standard input
        text: String,
        /// It failed
        #[arg(long)]
        error: bool,
        #[command(flatten)]
        store: Store,
    },
    /// Begins no more calls, for somebody who works in the workspace
    Pause {
        session: String,
        #[command(flatten)]
        store: Store,
    },
    /// Goes on after a pause
    Resume {
        session: String,
        #[command(flatten)]
        store: Store,
    },
    /// Passes a sandbox to another session: what runs in it is ended, its files stay
    Hand {
        session: String,
        /// What the session calls it
        sandbox: String,
        /// The session that gets it
        #[arg(long)]
        to: String,
        /// What that one calls it
        #[arg(long = "as", default_value = "main")]
        name: String,
        #[command(flatten)]
        connect: Connect,
        #[command(flatten)]
        store: Store,
    },
    /// Writes a session's whole log as JSON lines
    Export {
        session: String,
        #[command(flatten)]
        store: Store,
    },
    /// Makes a session of a log that was exported, under the same name
    Import {
        file: PathBuf,
        #[command(flatten)]
        store: Store,
    },
    /// Prints completions for a shell
    Completions { shell: clap_complete::Shell },
    /// Writes man pages into a directory
    Man { directory: PathBuf },
}

/// Where sessions are.
#[derive(Debug, Args)]
pub struct Store {
    /// `sqlite:PATH`, or `grant:NAME?user=USER&database=NAME` for PostgreSQL over a grant of the broker's
    #[arg(long, env = "HARNESS_STORE")]
    pub store: Option<String>,
    /// The broker's socket, where the store is behind a grant
    #[arg(long = "store-connect", env = "BROKER_SOCKET", default_value = SOCKET, hide = true)]
    pub store_connect: PathBuf,
}

/// Where the broker listens.
pub const SOCKET: &str = "/run/broker/broker.sock";

#[derive(Debug, Args)]
pub struct Connect {
    /// The broker's socket
    #[arg(long, env = "BROKER_SOCKET", default_value = SOCKET)]
    pub connect: PathBuf,
}

/// How a session is driven.
#[derive(Debug, Args)]
pub struct Drive {
    #[command(flatten)]
    pub connect: Connect,
    #[command(flatten)]
    pub store: Store,
    /// How long nobody else drives a session whose driver was killed: seconds
    #[arg(long, default_value_t = 15.0)]
    pub lease: f64,
    /// What is printed
    #[arg(long, value_enum, default_value = "text")]
    pub output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// As a person reads it
    Text,
    /// Events as JSON lines
    Json,
    /// Nothing
    None,
}

/// A new session.
#[derive(Debug, Args)]
pub struct Run {
    /// The model's name
    #[arg(long)]
    pub model: String,
    /// What is to be done: the words, or a file that holds them
    #[arg(long)]
    pub task: String,
    /// The session's name; a new one where it is left out
    #[arg(long)]
    pub session: Option<String>,
    /// What the model is told before anything else: the words, or a file that holds them
    #[arg(long)]
    pub system: Option<String>,
    /// The grant that the model is reached over
    #[arg(long, default_value = "model")]
    pub model_grant: String,
    /// The policy of its sandboxes
    #[arg(long, default_value = "default")]
    pub policy: String,
    /// A grant of its sandboxes; repeatable
    #[arg(long = "grant")]
    pub grants: Vec<String>,
    /// Mounted at /workspace of its sandboxes
    #[arg(long, value_name = "DIR[:ro|:rw]")]
    pub workspace: Option<String>,
    /// Ask a person before this tool runs, `*` for each; repeatable
    #[arg(long, value_name = "TOOL")]
    pub ask: Vec<String>,
    /// Never ask before this tool runs; repeatable
    #[arg(long, value_name = "TOOL")]
    pub allow: Vec<String>,
    /// A file with tools that you answer yourself: a JSON list, as the Messages API takes it
    #[arg(long, value_name = "FILE")]
    pub custom_tools: Option<PathBuf>,
    /// The most tokens of one answer
    #[arg(long, default_value_t = 8192)]
    pub max_tokens: u64,
    /// How many tokens are sent before what was said is summed up
    #[arg(long, default_value_t = 150_000)]
    pub context_tokens: u64,
    /// The most tokens of the session
    #[arg(long)]
    pub budget_tokens: Option<u64>,
    /// The most calls of tools
    #[arg(long)]
    pub budget_calls: Option<u64>,
    /// The most seconds since it was made
    #[arg(long)]
    pub budget_seconds: Option<u64>,
    /// How often the model is asked before that is given up
    #[arg(long, default_value_t = 8)]
    pub attempts: u32,
    /// How long a sandbox is kept that nobody uses
    #[arg(long, default_value = "30m")]
    pub keep: String,
    /// Where `harness-tools` stands, inside; beside this program where it is left out
    #[arg(long)]
    pub tools: Option<PathBuf>,
    /// Make it, and leave it to others to drive it
    #[arg(long)]
    pub detach: bool,
    #[command(flatten)]
    pub drive: Drive,
}

/// Parses; help, version and mistakes end here.
pub fn parse() -> Command {
    match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) => {
            let _ = error.print();
            std::process::exit(if error.use_stderr() { 125 } else { 0 });
        }
    }
}

/// Completions, on standard output.
pub fn completions(shell: clap_complete::Shell) {
    clap_complete::generate(shell, &mut Cli::command(), "harness", &mut std::io::stdout());
}

/// Man pages of every command.
pub fn man_pages(directory: &std::path::Path) -> std::io::Result<()> {
    clap_mangen::generate_to(Cli::command(), directory)
}
