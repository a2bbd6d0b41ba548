//! Any bytes on a connection of kind `http`: hyper parses them as the gateway has it do, and each request that is let through is one that
//! the rules name, whole, to this host, however its path is read.

#![no_main]

#[path = "../../../broker/src/grant/mod.rs"]
#[allow(dead_code)]
mod grant;
#[path = "../../../broker/src/serve/gateway/judge.rs"]
#[allow(dead_code)]
mod judge;

use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;

use grant::Grant;
use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, HOST, TRANSFER_ENCODING};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use libfuzzer_sys::fuzz_target;
use tokio::io::AsyncWriteExt;

/// What the operator allowed.
fn grant() -> Grant {
    let text = "kind = \"http\"\nhost = \"api.test\"\nallow = [{ methods = [\"GET\", \"POST\"], path = \"/a/**\" }]\n";
    toml::from_str(text).expect("a grant")
}

/// Where any of the servers may end that decode a path once more, take a backslash for a slash, cut at a semicolon, or go up.
fn readings(path: &str) -> Vec<String> {
    let mut all = vec![path.to_owned()];
    for _ in 0..3 {
        let last = all.last().expect("one").clone();
        all.push(decoded(&last));
    }
    let cut = |path: &String| path.split('/').map(|part| part.split(';').next().unwrap_or("")).collect::<Vec<_>>().join("/");
    let slashes = |path: &String| path.replace('\\', "/");
    let more: Vec<String> = all.iter().flat_map(|path| [cut(path), slashes(path), cut(&slashes(path))]).collect();
    all.extend(more);
    all.iter().map(|path| climbed(path)).collect()
}

fn decoded(path: &str) -> String {
    let bytes = path.as_bytes();
    let (mut out, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let hex = bytes.get(at + 1..at + 3).and_then(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok());
        match hex.filter(|_| bytes[at] == b'%') {
            Some(byte) => (out.push(byte), at += 3).0,
            None => (out.push(bytes[at]), at += 1).0,
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn climbed(path: &str) -> String {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "." => {}
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// The bodies of what was let through, and the paths.
type Let = Rc<RefCell<Vec<(String, usize)>>>;

async fn answer(request: Request<Incoming>, through: Let) -> Result<Response<Empty<Bytes>>, Infallible> {
    let grant = grant();
    if judge::judge(&grant, &request).is_ok() {
        let (mut head, body) = request.into_parts();
        judge::readdress(&grant, &mut head.headers).expect("a host");
        assert_eq!(head.headers.get_all(HOST).iter().collect::<Vec<_>>(), ["api.test"]);
        assert!(!head.headers.contains_key(CONNECTION) && !head.headers.contains_key(TRANSFER_ENCODING));
        assert!(head.method == "GET" || head.method == "POST");
        let length = body.collect().await.map_or(0, |body| body.to_bytes().len());
        through.borrow_mut().push((head.uri.path().to_owned(), length));
    }
    Ok(Response::new(Empty::new()))
}

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let through = Let::default();
    runtime.block_on(async {
        let (mut workload, gateway) = tokio::io::duplex(1 << 20);
        workload.write_all(data).await.expect("there is room");
        workload.shutdown().await.expect("it is open");
        let service = hyper::service::service_fn(|request| answer(request, Rc::clone(&through)));
        let mut server = hyper::server::conn::http1::Builder::new();
        let _ = server.half_close(true).max_buf_size(64 << 10).serve_connection(TokioIo::new(gateway), service).await;
    });
    let through = through.borrow();
    // Each has a line of its own in what was sent, and nothing was made up.
    let lines = data.windows(8).filter(|window| window == b"HTTP/1.1").count();
    let bodies: usize = through.iter().map(|(_, length)| length).sum();
    assert!(through.len() <= lines && bodies <= data.len());
    for (path, _) in through.iter() {
        for reading in readings(path) {
            assert!(reading.starts_with("/a"), "{path:?} can be read as {reading:?}");
        }
    }
});
