//! The system-call filter: a table of what is allowed, compiled to one BPF program.
//!
//! Numbers are tested by a search tree over ranges, which is what makes the filter cheap to install: the kernel runs it
//! once for every number to find those that it need not ask about (`seccomp_cache_prepare`). The few calls whose arguments
//! matter fall through to rules that seccompiler compiles. What is known and not allowed is `EPERM`, a number that
//! nobody here knows is `ENOSYS`, another architecture's call ends the process.

mod arguments;
mod numbers;

use std::fmt;

use seccompiler::{BpfProgram, sock_filter};

use crate::plan::SeccompPlan;
use numbers::Verdict;

// linux/filter.h and linux/seccomp.h.
const LOAD_WORD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_GREATER_EQUAL: u16 = 0x35;
const JUMP_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCHITECTURE: u32 = 4;
const RETURN_ALLOW: u32 = 0x7fff_0000;
const RETURN_ERRNO: u32 = 0x0005_0000;
const RETURN_KILL_PROCESS: u32 = 0x8000_0000;

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// Why there is no filter.
#[derive(Debug)]
pub struct FilterError(String);

impl fmt::Display for FilterError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "the system-call filter does not compile: {}", self.0)
    }
}

impl std::error::Error for FilterError {}

/// The program for `plan`.
///
/// # Errors
/// When a rule does not compile, which a test excludes for every plan there is.
pub fn compile(plan: SeccompPlan) -> Result<BpfProgram, FilterError> {
    let rules = arguments::rules(plan).map_err(|error| FilterError(error.to_string()))?;
    let mut program = vec![
        statement(LOAD_WORD, OFFSET_ARCHITECTURE),
        branch(JUMP_EQUAL, ARCHITECTURE, 1, 0),
        statement(RETURN, RETURN_KILL_PROCESS),
        statement(LOAD_WORD, OFFSET_NUMBER),
    ];
    let mut tree = Vec::new();
    emit(&numbers::ranges(), &mut tree);
    // `Arguments` leaves are jumps to the end of the tree, where the rules begin.
    let end = tree.len();
    for (at, instruction) in tree.iter_mut().enumerate() {
        if instruction.code == JUMP {
            instruction.k = u32::try_from(end - at - 1).map_err(|error| FilterError(error.to_string()))?;
        }
    }
    program.extend(tree);
    program.extend(rules);
    Ok(program)
}

/// A balanced tree of comparisons; the accumulator holds the number.
fn emit(ranges: &[(u32, Verdict)], out: &mut Vec<sock_filter>) {
    if let [(_, verdict)] = ranges {
        out.push(leaf(*verdict));
        return;
    }
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let at = out.len();
    out.push(branch(JUMP_GREATER_EQUAL, high[0].0, 0, 0));
    emit(low, out);
    // Conditional jumps reach 255 instructions; beyond that a plain jump would be needed, which a test excludes.
    out[at].jt = u8::try_from(out.len() - at - 1).unwrap_or(u8::MAX);
    emit(high, out);
}

fn leaf(verdict: Verdict) -> sock_filter {
    match verdict {
        Verdict::Allow => statement(RETURN, RETURN_ALLOW),
        Verdict::Refuse => statement(RETURN, RETURN_ERRNO | libc::EPERM as u32),
        Verdict::Unknown => statement(RETURN, RETURN_ERRNO | libc::ENOSYS as u32),
        Verdict::Arguments => statement(JUMP, 0),
    }
}

fn statement(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

fn branch(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}
