//! What is counted, for Prometheus: HTTP/1.1 on a Unix socket, one answer a connection.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use super::Core;
use super::askers::peer;
use crate::serve::config::Verb;

/// The longest request, in bytes, and how long it may take.
const REQUEST_BYTES_MAX: usize = 8 << 10;
const PATIENCE: Duration = Duration::from_secs(2);

/// Answers one after the other: who is slow holds up other scrapes for a moment, and nothing else.
pub(super) async fn serve(core: Arc<Core>, listener: UnixListener) -> io::Result<()> {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let _ = timeout(PATIENCE, answer(&core, stream)).await;
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn answer(core: &Core, mut stream: UnixStream) -> io::Result<()> {
    let rights = core.config.rights(peer(&stream)?, &core.accounts);
    let mut request = vec![0; REQUEST_BYTES_MAX];
    let mut length = 0;
    while !request[..length].windows(4).any(|end| end == b"\r\n\r\n") {
        let count = stream.read(&mut request[length..]).await?;
        if count == 0 {
            return Ok(());
        }
        length += count;
    }
    let (status, text) = match request.starts_with(b"GET /metrics ") {
        _ if !rights.may(Verb::Metrics) => ("403 Forbidden", "the right `metrics` is not yours\n".to_owned()),
        true => ("200 OK", core.metrics_text()),
        false => ("404 Not Found", "there is only /metrics\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        text.len()
    );
    stream.write_all((head + &text).as_bytes()).await
}
