//! What is counted, in Prometheus' text format
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>). Numbers of acts, never whose they were.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::protocol::Code;

/// Upper bounds of the histograms' buckets, in milliseconds.
const BUCKETS_MS: [f64; 10] = [0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 100.0, 1_000.0, 10_000.0];

/// What was begun.
#[derive(Debug, Clone, Copy)]
pub enum Begun {
    /// A run of one command.
    Run,
    /// A sandbox that lives.
    Provision,
    /// A command in one.
    Execute,
}

/// The counters of one core.
#[derive(Debug, Default)]
pub struct Metrics(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    begun: BTreeMap<&'static str, u64>,
    ended: BTreeMap<String, u64>,
    denials: BTreeMap<String, u64>,
    breaches: u64,
    start: Histogram,
    record: Histogram,
}

#[derive(Debug, Default)]
struct Histogram {
    buckets: [u64; BUCKETS_MS.len()],
    count: u64,
    seconds: f64,
}

impl Histogram {
    fn add(&mut self, took: Duration) {
        let ms = took.as_secs_f64() * 1e3;
        for (bucket, bound) in self.buckets.iter_mut().zip(BUCKETS_MS) {
            *bucket += u64::from(ms <= bound);
        }
        self.count += 1;
        self.seconds += took.as_secs_f64();
    }

    fn write(&self, text: &mut String, name: &str, help: &str) {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram");
        for (bucket, bound) in self.buckets.iter().zip(BUCKETS_MS) {
            let _ = writeln!(text, "{name}_bucket{{le=\"{}\"}} {bucket}", bound / 1e3);
        }
        let _ = writeln!(text, "{name}_bucket{{le=\"+Inf\"}} {}", self.count);
        let _ = writeln!(text, "{name}_sum {}\n{name}_count {}", self.seconds, self.count);
    }
}

/// What is there now.
#[derive(Debug, Default)]
pub struct Gauges {
    /// Connections that are served.
    pub connections: usize,
    /// Sandboxes in the table.
    pub sandboxes: usize,
    /// Descriptors of the core.
    pub descriptors: usize,
    /// Processes of each role that answer.
    pub roles: BTreeMap<&'static str, usize>,
    /// Sandboxes made in advance, by policy.
    pub pool: BTreeMap<String, usize>,
}

impl Metrics {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something was begun.
    pub fn begun(&self, what: Begun) {
        let name = match what {
            Begun::Run => "run",
            Begun::Provision => "provision",
            Begun::Execute => "execute",
        };
        *self.counts().begun.entry(name).or_default() += 1;
    }

    /// A sandbox ended; why, in one of the words of its report.
    pub fn ended(&self, reason: &str) {
        *self.counts().ended.entry(reason.to_owned()).or_default() += 1;
    }

    /// A request was denied.
    pub fn denied(&self, code: Code) {
        let code = serde_json::to_value(code).unwrap_or_default();
        *self.counts().denials.entry(code.as_str().unwrap_or_default().to_owned()).or_default() += 1;
    }

    /// A peer was dropped.
    pub fn breach(&self) {
        self.counts().breaches += 1;
    }

    /// A sandbox waits for its first command.
    pub fn started_in(&self, took: Duration) {
        self.counts().start.add(took);
    }

    /// A record is durable.
    pub fn recorded_in(&self, took: Duration) {
        self.counts().record.add(took);
    }

    /// Everything, as text.
    pub fn text(&self, gauges: &Gauges) -> String {
        let counts = self.counts();
        let mut text = String::new();
        let family = |text: &mut String, name: &str, kind: &str, help: &str| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        };
        family(&mut text, "broker_begun_total", "counter", "Runs, sandboxes and commands that were begun.");
        for (what, count) in &counts.begun {
            let _ = writeln!(text, "broker_begun_total{{what=\"{what}\"}} {count}");
        }
        family(&mut text, "broker_ended_total", "counter", "Sandboxes that ended, by why.");
        for (reason, count) in &counts.ended {
            let _ = writeln!(text, "broker_ended_total{{reason=\"{reason}\"}} {count}");
        }
        family(&mut text, "broker_denials_total", "counter", "Requests that were denied.");
        for (code, count) in &counts.denials {
            let _ = writeln!(text, "broker_denials_total{{code=\"{code}\"}} {count}");
        }
        family(
            &mut text,
            "broker_breaches_total",
            "counter",
            "Peers dropped because they broke the protocol.",
        );
        let _ = writeln!(text, "broker_breaches_total {}", counts.breaches);
        for (name, help, value) in [
            ("broker_connections", "Connections that are served.", gauges.connections),
            ("broker_sandboxes", "Sandboxes that live.", gauges.sandboxes),
            ("broker_descriptors", "Open descriptors of the core.", gauges.descriptors),
        ] {
            family(&mut text, name, "gauge", help);
            let _ = writeln!(text, "{name} {value}");
        }
        family(&mut text, "broker_role_up", "gauge", "Whether a role answers.");
        for (role, count) in &gauges.roles {
            let _ = writeln!(text, "broker_role_up{{role=\"{role}\"}} {count}");
        }
        family(&mut text, "broker_pool", "gauge", "Sandboxes made in advance.");
        for (policy, count) in &gauges.pool {
            let _ = writeln!(text, "broker_pool{{policy=\"{policy}\"}} {count}");
        }
        counts.start.write(
            &mut text,
            "broker_start_seconds",
            "From a request for a sandbox that lives until it waits for commands.",
        );
        counts.record.write(&mut text, "broker_record_seconds", "From an event to its durable record.");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_the_last_holds_all() {
        let metrics = Metrics::default();
        for ms in [1, 3, 20_000] {
            metrics.started_in(Duration::from_millis(ms));
        }
        metrics.denied(Code::TooMany);
        let text = metrics.text(&Gauges { sandboxes: 2, ..Gauges::default() });
        for line in [
            "broker_start_seconds_bucket{le=\"0.001\"} 1",
            "broker_start_seconds_bucket{le=\"0.005\"} 2",
            "broker_start_seconds_bucket{le=\"10\"} 2",
            "broker_start_seconds_bucket{le=\"+Inf\"} 3",
            "broker_denials_total{code=\"too-many\"} 1",
            "broker_sandboxes 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
