//! Reads the filter that the kernel really holds for a task and runs it here, for numbers that this kernel does not
//! have: their natural answer and a refusal look the same from inside.

use crate::case::Reporter;
use crate::kernel::raw::{self, address_mut, call};

const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
const X32: u32 = 0x4000_0000;
const GET_FILTER: i64 = 0x420c;

/// `struct sock_filter`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Instruction {
    code: u16,
    on_true: u8,
    on_false: u8,
    value: u32,
}

/// KS-08-filter `PID`: run on the host, for a task of a sandbox.
pub fn dump(reporter: &Reporter, arguments: &[String]) {
    let pid: i64 = arguments[0].parse().expect("a task's number");
    let filters = filters(pid);
    if filters.is_empty() {
        return reporter.open("filters", "none");
    }
    reporter.denied("filters", 0, &format!("{} of them", filters.len()));
    for number in 0..600 {
        tell(reporter, &format!("x32 {number}"), verdict(&filters, X86_64, number | X32));
    }
    for number in 463..600 {
        tell(reporter, &format!("unknown {number}"), verdict(&filters, X86_64, number));
    }
    for number in [u32::MAX, X32 - 1, 0x8000_0000] {
        tell(reporter, &format!("far {number:#x}"), verdict(&filters, X86_64, number));
    }
    for number in 0..600 {
        tell(reporter, &format!("i386 {number}"), verdict(&filters, I386, number));
    }
    tell(reporter, "other architecture", verdict(&filters, 0x4000_0028, 1));
}

fn tell(reporter: &Reporter, case: &str, verdict: u32) {
    match verdict & 0xffff_0000 {
        0x0005_0000 => reporter.denied(case, i32::try_from(verdict & 0xffff).unwrap_or(0), ""),
        0x0003_0000 => reporter.killed(case, libc::SIGSYS), // trap
        0x8000_0000 | 0 => reporter.killed(case, libc::SIGSYS),
        _ => reporter.open(case, &format!("verdict {verdict:#x}")),
    }
}

fn filters(pid: i64) -> Vec<Vec<Instruction>> {
    let mut found = Vec::new();
    if call(libc::SYS_ptrace, &[i64::from(libc::PTRACE_ATTACH), pid, 0, 0]) < 0 {
        return found;
    }
    call(libc::SYS_wait4, &[pid, 0, i64::from(libc::__WALL), 0]);
    loop {
        let mut program = [Instruction::default(); 4096];
        let length =
            call(libc::SYS_ptrace, &[GET_FILTER, pid, found.len() as i64, address_mut(&mut program)]);
        match usize::try_from(length) {
            Ok(length) => found.push(program[..length].to_vec()),
            Err(_) => break,
        }
    }
    let last = raw::errno();
    call(libc::SYS_ptrace, &[i64::from(libc::PTRACE_DETACH), pid, 0, 0]);
    // ENOENT: there are no more. Anything else means that we have not seen them all.
    if last == libc::ENOENT { found } else { Vec::new() }
}

/// The strictest answer of all filters: the kernel compares the action as a signed number.
fn verdict(filters: &[Vec<Instruction>], architecture: u32, number: u32) -> u32 {
    let mut data = [0_u8; 64];
    data[..4].copy_from_slice(&number.to_le_bytes());
    data[4..8].copy_from_slice(&architecture.to_le_bytes());
    let answers = filters.iter().map(|program| run(program, &data));
    answers.min_by_key(|answer| (answer & 0xffff_0000).cast_signed()).expect("at least one filter")
}

/// Classic BPF, as far as seccomp allows it and filters use it.
fn run(program: &[Instruction], data: &[u8; 64]) -> u32 {
    let (mut accumulator, mut index, mut scratch) = (0_u32, 0_u32, [0_u32; 16]);
    let mut at = 0;
    loop {
        let Instruction { code, on_true, on_false, value } = program[at];
        at += 1;
        let jump = |taken: bool| usize::from(if taken { on_true } else { on_false });
        let operand = if code & 0x08 == 0 { value } else { index };
        match code {
            0x20 => {
                let bytes = &data[value as usize..value as usize + 4];
                accumulator = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
            }
            0x00 => accumulator = value,
            0x01 => index = value,
            0x60 => accumulator = scratch[value as usize],
            0x61 => index = scratch[value as usize],
            0x02 => scratch[value as usize] = accumulator,
            0x03 => scratch[value as usize] = index,
            0x07 => index = accumulator,
            0x87 => accumulator = index,
            0x05 => at += value as usize,
            0x15 | 0x1d => at += jump(accumulator == operand),
            0x25 | 0x2d => at += jump(accumulator > operand),
            0x35 | 0x3d => at += jump(accumulator >= operand),
            0x45 | 0x4d => at += jump(accumulator & operand != 0),
            0x54 | 0x5c => accumulator &= operand,
            0x44 | 0x4c => accumulator |= operand,
            0x04 | 0x0c => accumulator = accumulator.wrapping_add(operand),
            0x14 | 0x1c => accumulator = accumulator.wrapping_sub(operand),
            0x74 | 0x7c => accumulator = accumulator.checked_shr(operand).unwrap_or(0),
            0x64 | 0x6c => accumulator = accumulator.checked_shl(operand).unwrap_or(0),
            0x06 => return value,
            0x16 => return accumulator,
            other => panic!("instruction {other:#x} is not known here"),
        }
    }
}
