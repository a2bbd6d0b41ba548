//! Any bytes as a question to the name server of a sandbox: one granted name has addresses, no other does, and no answer is longer
//! than what a resolver takes.

#![no_main]

#[path = "../../../broker/src/serve/gateway/names.rs"]
#[allow(dead_code)]
mod names;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let asked = std::cell::RefCell::new(None);
    let answered = names::answer(data, |name| {
        asked.replace(Some(name.to_owned()));
        (name == "api.test").then_some(["198.19.0.1".parse().expect("v4"), "fd62::1".parse().expect("v6")])
    });
    let asked = asked.into_inner();
    let Some(names::Answered { bytes, unknown }) = answered else { return };
    // It goes back to who asked, as the answer to that (RFC 1035, 4.1.1).
    assert!(bytes.len() >= 12 && bytes.len() <= 512 + 28 && bytes[..2] == data[..2] && bytes[2] & 0x80 != 0);
    let answers = u16::from_be_bytes([bytes[6], bytes[7]]);
    let no_such_name = bytes[3] & 0xf == 3;
    assert!(answers <= 1 && !(no_such_name && answers == 1));
    assert!(answers == 0 || asked.as_deref() == Some("api.test"));
    assert!(unknown.is_none() || no_such_name && unknown == asked);
    assert!(unknown.is_none_or(|name| name.len() <= 4 * 512 && name != "api.test"));
});
