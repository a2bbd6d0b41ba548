//! The system-call filter: a table of what is allowed, compiled to one BPF program.
//!
//! Numbers are tested by a search tree over ranges, which is what makes the filter cheap: the kernel runs it once for
//! every number to find those that it need not ask about (`seccomp_cache_prepare`), and what an instruction costs at
//! installation is most of what the filter costs. The few calls whose arguments matter go on to a block of their own.
//! What is known and not allowed is `EPERM`, a number that nobody here knows is `ENOSYS`, another architecture's call ends
//! the process.

mod arguments;
mod assemble;
mod numbers;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::plan::SeccompPlan;
use assemble::Assembly;
use numbers::Verdict;

// linux/filter.h and linux/seccomp.h.
const RETURN_ALLOW: u32 = 0x7fff_0000;
const RETURN_ERRNO: u32 = 0x0005_0000;
const RETURN_KILL_PROCESS: u32 = 0x8000_0000;
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCHITECTURE: u32 = 4;

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// A jump that is too long for its instruction. A test excludes it for every plan there is.
#[derive(Debug)]
pub struct FilterError;

impl fmt::Display for FilterError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("the system-call filter does not compile: a jump is too long")
    }
}

impl std::error::Error for FilterError {}

/// A call, and the values that some of its arguments have to have, by their positions.
pub type WithArguments = (libc::c_long, &'static [(u8, u64)]);

/// A program that allows `calls` and `some`, and ends whoever makes another: for processes of our own, which know what they call.
///
/// # Errors
/// When it does not compile.
pub fn nothing_but(calls: &[libc::c_long], some: &[WithArguments]) -> io::Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = calls.iter().map(|call| (*call, Vec::new())).collect();
    for (call, arguments) in some {
        let condition = |(argument, value): &(u8, u64)| {
            SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)
        };
        let conditions =
            arguments.iter().map(condition).collect::<Result<_, _>>().map_err(io::Error::other)?;
        let rule = SeccompRule::new(conditions).map_err(io::Error::other)?;
        rules.entry(*call).or_default().push(rule);
    }
    // The C library's poll(3).
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_poll, Vec::new());
    let arch = if cfg!(target_arch = "aarch64") { TargetArch::aarch64 } else { TargetArch::x86_64 };
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, arch);
    filter.and_then(TryInto::try_into).map_err(io::Error::other)
}

/// The program for `plan`.
///
/// # Errors
/// When a jump is too long.
pub fn compile(plan: SeccompPlan) -> Result<BpfProgram, FilterError> {
    let rules = arguments::rules(plan);
    let mut program = Assembly::default();
    let known = program.label();
    program.load(OFFSET_ARCHITECTURE);
    program.when_equal(ARCHITECTURE, known);
    program.finish(RETURN_KILL_PROCESS);
    program.place(known);
    program.load(OFFSET_NUMBER);

    let (allow, refuse, unknown) = (program.label(), program.label(), program.label());
    // Calls with the same rule share its block.
    let mut blocks: Vec<(&arguments::Rule, assemble::Label)> = Vec::new();
    for (_, rule) in &rules {
        if !blocks.iter().any(|(other, _)| *other == rule) {
            blocks.push((rule, program.label()));
        }
    }
    let ranges = numbers::ranges(|call| {
        let rule = rules.iter().find(|(number, _)| *number == call).map(|(_, rule)| rule)?;
        blocks.iter().position(|(other, _)| *other == rule)
    });
    tree(&mut program, &ranges, &|verdict| match verdict {
        Verdict::Allow => allow,
        Verdict::Refuse => refuse,
        Verdict::Unknown => unknown,
        Verdict::Arguments(block) => blocks[block].1,
    });
    for (label, action) in [
        (allow, RETURN_ALLOW),
        (refuse, RETURN_ERRNO | libc::EPERM as u32),
        (unknown, RETURN_ERRNO | libc::ENOSYS as u32),
    ] {
        program.place(label);
        program.finish(action);
    }
    // A conditional jump reaches 255 instructions, a plain one any distance.
    let far: Vec<_> = blocks.iter().map(|(rule, near)| (rule, *near, program.label())).collect();
    for (_, near, block) in &far {
        program.place(*near);
        program.jump(*block);
    }
    for (rule, _, block) in &far {
        program.place(*block);
        arguments::emit(rule, &mut program);
    }
    program.finished().ok_or(FilterError)
}

/// A balanced tree of comparisons; the accumulator holds the number.
fn tree(program: &mut Assembly, ranges: &[(u32, Verdict)], to: &dyn Fn(Verdict) -> assemble::Label) {
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let (below, above) = (side(program, low, to), side(program, high, to));
    program.when_at_least(high[0].0, above, below);
    for (half, label) in [(low, below), (high, above)] {
        if half.len() > 1 {
            program.place(label);
            tree(program, half, to);
        }
    }
}

/// Where one half of a tree begins: at its verdict if it has only one.
fn side(
    program: &mut Assembly,
    half: &[(u32, Verdict)],
    to: &dyn Fn(Verdict) -> assemble::Label,
) -> assemble::Label {
    match half {
        [(_, verdict)] => to(*verdict),
        _ => program.label(),
    }
}
