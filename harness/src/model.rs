//! Asks the model: one HTTP/1.1 request on a connection that a grant gave. No key, no TLS and no name is known here: the broker's
//! gateway has them.

use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST, HeaderMap};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Map, Value};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::event::{ErrorKind, Failure};
use crate::hands::HandError;
use crate::message::{Answer, Progress, Stream, broken, failure};
use crate::sse::Parser;

/// The version of the API that is spoken.
const API_VERSION: &str = "2023-06-01";
/// How long nothing may come: the API pings.
const SILENCE: Duration = Duration::from_secs(120);
/// The longest text of an error that is read.
const ERROR_BYTES_MAX: usize = 64 << 10;

/// One answer, of the server that is called `host`; `words` hears the model's as they come. Dropping the future gives the request up, and the gateway hears of it.
///
/// # Errors
/// What went wrong, and whether asking again may help.
pub async fn ask(
    connection: UnixStream,
    host: &str,
    body: &Value,
    words: impl Fn(&str),
) -> Result<Answer, Failure> {
    let unreachable = |error: hyper::Error| cut(&error.to_string());
    let (mut sender, driver) =
        hyper::client::conn::http1::handshake(TokioIo::new(connection)).await.map_err(unreachable)?;
    let driver = tokio::spawn(driver);
    let request = Request::post("/v1/messages")
        .header(HOST, host)
        .header(CONTENT_TYPE, "application/json")
        .header(ACCEPT, "text/event-stream")
        .header("anthropic-version", API_VERSION)
        .body(Full::new(Bytes::from(body.to_string())))
        .map_err(|error| broken(&error.to_string()))?;
    let answered = async {
        let response = timeout(SILENCE, sender.send_request(request))
            .await
            .map_err(|_| silent())?
            .map_err(unreachable)?;
        if response.status().is_success() {
            stream(response, words).await
        } else {
            Err(refused(response).await)
        }
    };
    let answered = answered.await;
    driver.abort();
    answered
}

async fn stream(response: Response<Incoming>, words: impl Fn(&str)) -> Result<Answer, Failure> {
    let (mut body, mut parser, mut stream) = (response.into_body(), Parser::default(), Stream::default());
    while let Some(frame) = timeout(SILENCE, body.frame()).await.map_err(|_| silent())? {
        let frame = frame.map_err(|error| cut(&error.to_string()))?;
        let Some(piece) = frame.data_ref() else { continue };
        for sent in parser.take(piece).map_err(|why| broken(&format!("{why:?}")))? {
            match stream.take(&sent)? {
                Progress::More => {}
                Progress::Words(text) => words(&text),
                Progress::Whole => return Ok(stream.into_answer()),
            }
        }
    }
    Err(cut("it ended in the middle"))
}

async fn refused(response: Response<Incoming>) -> Failure {
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let body = http_body_util::Limited::new(response.into_body(), ERROR_BYTES_MAX).collect();
    let bytes = timeout(SILENCE, body).await.ok().and_then(Result::ok).map(|body| body.to_bytes());
    let said: Value = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
    let said = said["error"].as_object().cloned().unwrap_or_else(Map::new);
    let number = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()?.parse::<f64>().ok());
    let wished = number("retry-after-ms").or(number("retry-after").map(|seconds| seconds * 1000.0));
    let mut failed = failure(Some(status), &said);
    // As the API's own client: the server's word on trying again is taken.
    if let Some(word) = should_retry(&headers) {
        failed.retry = word;
    }
    if status == 502 || status == 504 {
        failed.kind = ErrorKind::CredentialHostUnreachable;
    }
    let in_range = |wished: &f64| wished.is_finite() && *wished > 0.0;
    failed.retry_after_ms = wished.filter(in_range).map(|wished| wished.min(4e9) as u64);
    failed
}

fn should_retry(headers: &HeaderMap) -> Option<bool> {
    match headers.get("x-should-retry")?.as_bytes() {
        b"true" => Some(true),
        b"false" => Some(false),
        _ => None,
    }
}

fn cut(why: &str) -> Failure {
    broken(&format!("the connection was cut: {why}"))
}

fn silent() -> Failure {
    broken(&format!("nothing came for {} s", SILENCE.as_secs()))
}

/// There is no connection to be had: the grant is revoked or used up.
pub fn no_connection(why: &HandError) -> Failure {
    let kind = ErrorKind::CredentialHostUnreachable;
    Failure {
        kind,
        message: format!("no connection to the model: {why}"),
        retry: false,
        retry_after_ms: None,
    }
}
