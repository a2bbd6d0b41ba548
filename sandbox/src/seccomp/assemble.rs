//! Classic BPF with labels instead of distances.

use seccompiler::{BpfProgram, sock_filter};

// linux/bpf_common.h: BPF_LD|BPF_W|BPF_ABS, BPF_ALU|BPF_AND|BPF_K, BPF_JMP with JA, JEQ, JGT and JGE, BPF_RET|BPF_K.
const LOAD_WORD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;

/// A place in the program, known or still to come. Jumps go forward only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Label(usize);

/// Where a jump goes: on to the next instruction, or to a label.
type Target = Option<Label>;

/// A program in the making.
#[derive(Debug, Default)]
pub(super) struct Assembly {
    code: Vec<(u16, u32, [Target; 2])>,
    places: Vec<Option<usize>>,
}

impl Assembly {
    /// A label to be placed later.
    pub(super) fn label(&mut self) -> Label {
        self.places.push(None);
        Label(self.places.len() - 1)
    }

    /// The next instruction is where `label` is.
    pub(super) fn place(&mut self, label: Label) {
        self.places[label.0] = Some(self.code.len());
    }

    /// The word of `struct seccomp_data` at `offset` into the accumulator.
    pub(super) fn load(&mut self, offset: u32) {
        self.code.push((LOAD_WORD, offset, [None; 2]));
    }

    /// Leaves only these bits of it.
    pub(super) fn mask(&mut self, bits: u32) {
        self.code.push((AND, bits, [None; 2]));
    }

    /// To `then` or on.
    pub(super) fn when_equal(&mut self, value: u32, then: Label) {
        self.code.push((JUMP_EQUAL, value, [Some(then), None]));
    }

    /// One of two places.
    pub(super) fn when_at_least(&mut self, value: u32, then: Label, otherwise: Label) {
        self.code.push((JUMP_GREATER_EQUAL, value, [Some(then), Some(otherwise)]));
    }

    /// To `then` (on, if there is none) where the accumulator lies between the two, both included; else to `otherwise`.
    pub(super) fn when_within(&mut self, first: u32, last: u32, then: Target, otherwise: Label) {
        let otherwise = Some(otherwise);
        if first == last {
            self.code.push((JUMP_EQUAL, first, [then, otherwise]));
            return;
        }
        if first > 0 {
            let passed = if last == u32::MAX { then } else { None };
            self.code.push((JUMP_GREATER_EQUAL, first, [passed, otherwise]));
        }
        if last < u32::MAX {
            self.code.push((JUMP_GREATER, last, [otherwise, then]));
        }
    }

    /// Unconditionally, as far as need be.
    pub(super) fn jump(&mut self, to: Label) {
        self.code.push((JUMP, 0, [Some(to), None]));
    }

    /// Ends with `action`.
    pub(super) fn finish(&mut self, action: u32) {
        self.code.push((RETURN, action, [None; 2]));
    }

    /// The program, if every jump reaches its label.
    pub(super) fn finished(&self) -> Option<BpfProgram> {
        let distance = |at: usize, target: Target| match target {
            None => Some(0),
            Some(label) => self.places[label.0]?.checked_sub(at + 1),
        };
        let instruction = |(at, (code, k, [then, otherwise])): (usize, &(u16, u32, [Target; 2]))| {
            let (then, otherwise) = (distance(at, *then)?, distance(at, *otherwise)?);
            Some(if *code == JUMP {
                sock_filter { code: *code, jt: 0, jf: 0, k: u32::try_from(then).ok()? }
            } else {
                sock_filter {
                    code: *code,
                    jt: u8::try_from(then).ok()?,
                    jf: u8::try_from(otherwise).ok()?,
                    k: *k,
                }
            })
        };
        self.code.iter().enumerate().map(instruction).collect()
    }
}
