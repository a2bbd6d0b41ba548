//! Any bytes on a connection of kind `http`: hyper parses them as the gateway has it do, and each request that is let through is one that
//! the rules name, whole, to this host, however its path is read.

#![no_main]

#[path = "../../../broker/client/src/grant/mod.rs"]
#[allow(dead_code, unused_imports)]
mod grant;
#[path = "../../../broker/src/serve/gateway/judge.rs"]
#[allow(dead_code)]
mod judge;
mod readings;

use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;

use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, HOST, TRANSFER_ENCODING};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use libfuzzer_sys::fuzz_target;
use readings::{grant, readings};
use tokio::io::AsyncWriteExt;

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
        // The end of what was sent is not the end of who waits for answers.
        let mut server = hyper::server::conn::http1::Builder::new();
        let _ = server
            .half_close(true)
            .max_buf_size(64 << 10)
            .serve_connection(TokioIo::new(gateway), service)
            .await;
    });
    let through = through.borrow();
    // Each has a line of its own in what was sent, and nothing was made up.
    let lines = data.windows(8).filter(|window| window == b"HTTP/1.1").count();
    let bodies: usize = through.iter().map(|(_, length)| length).sum();
    assert!(through.len() <= lines && bodies <= data.len());
    for (path, _) in through.iter() {
        for reading in readings(path) {
            assert!((reading.clone() + "/").starts_with("/a/"), "{path:?} can be read as {reading:?}");
        }
    }
});
