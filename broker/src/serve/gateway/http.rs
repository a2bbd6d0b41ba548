//! Kind `http`: every request is looked at, and only what the grant allows goes on, with the credential in it.

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::SendRequest;
use hyper::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, HeaderMap, HeaderName, HeaderValue, RANGE, TRANSFER_ENCODING,
};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use zeroize::Zeroizing;

use super::judge::{judge, readdress, strip_hop_by_hop};
use super::line::{Failure, Line, Open};
use super::mask::Mask;
use crate::grant::{Grant, GrantId, UpstreamTls};

/// What one request's head may take.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// How long a workload may take to send one.
pub const HEAD_TIME_MAX: Duration = Duration::from_secs(30);

type Body = BoxBody<Bytes, hyper::Error>;

/// A grant of this kind.
pub struct Http {
    pub id: GrantId,
    pub grant: Grant,
    /// Of it and all that was derived from it.
    pub keys: Rc<RefCell<Rc<Keys>>>,
}

/// What it takes to use it, until that is renewed.
pub struct Keys {
    /// The header's value, where there is a credential.
    pub secret: Option<(HeaderName, Zeroizing<Vec<u8>>)>,
    /// Takes the secret out of what comes back.
    pub mask: Mask,
    /// Nothing where the upstream is spoken to in the clear.
    pub client: Option<Arc<rustls::ClientConfig>>,
}

/// The upstream of one connection of the workload's; never another's.
struct Upstream {
    send: RefCell<Option<SendRequest<Incoming>>>,
    line: Rc<Line>,
    http: Rc<Http>,
    /// The workload's end, which the core can cut.
    workload: Rc<std::os::fd::OwnedFd>,
}

/// Serves one connection to its end.
pub async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    workload: Rc<std::os::fd::OwnedFd>,
    http: Rc<Http>,
    line: Rc<Line>,
) -> Result<(), hyper::Error> {
    let upstream = Rc::new(Upstream { send: RefCell::default(), line, http, workload });
    let service = service_fn(|request| {
        let upstream = Rc::clone(&upstream);
        async move { Ok::<_, std::convert::Infallible>(upstream.answer(request).await) }
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

impl Upstream {
    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let (method, path) = (request.method().to_string(), request.uri().path().to_owned());
        let response = match judge(&self.http.grant, &request) {
            Ok(()) => match self.pass_on(request).await {
                Ok(response) => response,
                Err(error) => {
                    super::complain_of(&self.http.grant.host, &*error);
                    // What the upstream, or TLS, said of itself is not the workload's to read.
                    said(
                        StatusCode::BAD_GATEWAY,
                        "the upstream cannot be reached, is not who it should be, or speaks no HTTP; the service's log says which",
                    )
                }
            },
            Err((status, why)) => said(status, why),
        };
        self.line.asked(&self.http.id, &method, &path, response.status().as_u16()).await;
        response
    }

    async fn pass_on(&self, mut request: Request<Incoming>) -> Result<Response<Body>, Failure> {
        let grant = &self.http.grant;
        let keys = Rc::clone(&self.http.keys.borrow());
        let headers = request.headers_mut();
        readdress(grant, headers)?;
        if !keys.mask.is_idle() {
            // A reply that is compressed could not be searched; one that is compressed all the same is not passed on.
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
            // Nor could one that is asked for in parts, a piece of the secret in each.
            headers.remove(RANGE);
        }
        if let Some((name, value)) = &keys.secret {
            let mut value = HeaderValue::from_bytes(value)?;
            value.set_sensitive(true);
            // Whatever the workload says there is its own.
            headers.insert(name, value);
        }
        let mut kept = self.send.take();
        let is_open = match &mut kept {
            Some(send) => send.ready().await.is_ok(),
            None => false,
        };
        let (mut send, is_new) = match kept.filter(|_| is_open) {
            Some(send) => (send, false),
            None => (self.open().await?, true),
        };
        let sent = match send.try_send_request(request).await {
            Ok(sent) => sent,
            // The upstream closed what was kept at this very moment, and has seen nothing of it.
            Err(mut failed) => match failed.take_message().filter(|_| !is_new) {
                Some(request) => {
                    send = self.open().await?;
                    send.send_request(request).await?
                }
                None => return Err(failed.into_error().into()),
            },
        };
        self.send.replace(Some(send));
        let (mut head, body) = sent.into_parts();
        // The upstream's own words for its status, among others.
        head.extensions.clear();
        let is_plain = |value: &HeaderValue| value == "chunked";
        if !head.headers.get_all(TRANSFER_ENCODING).iter().all(is_plain) {
            return Err("the upstream encodes what it was asked not to".into());
        }
        strip_hop_by_hop(&mut head.headers);
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            return Err("the upstream switches protocols".into());
        }
        if keys.mask.is_idle() {
            return Ok(Response::from_parts(head, body.boxed()));
        }
        if head.headers.get_all(CONTENT_ENCODING).iter().any(|encoding| encoding != "identity") {
            return Err("the upstream compresses what it was asked not to".into());
        }
        if head.headers.keys().any(|name| keys.mask.is_in_name(name.as_str())) {
            return Err("the upstream calls a header by what is to be masked".into());
        }
        for value in head.headers.values_mut() {
            *value = masked(&keys.mask, value.as_bytes(), HeaderValue::from_bytes)?;
        }
        let body = Masked { body, mask: keys.mask.clone(), trailers: None };
        Ok(Response::from_parts(head, body.boxed()))
    }

    /// A connection to the upstream, made by the core, and TLS on it to whom the grant names.
    async fn open(&self) -> Result<SendRequest<Incoming>, Failure> {
        let opened = self.line.open(&self.http.id, &self.workload).await?;
        let stream = TcpStream::from_std(std::net::TcpStream::from(opened.stream))?;
        let client = self.http.keys.borrow().client.clone();
        let Some(config) = client else {
            debug_assert_eq!(self.http.grant.upstream_tls, UpstreamTls::Off);
            return connected(stream, opened.guard).await;
        };
        let name = ServerName::try_from(self.http.grant.host.to_string())?;
        let stream = TlsConnector::from(config).connect(name, stream).await?;
        connected(stream, opened.guard).await
    }
}

fn masked<T, E>(mask: &Mask, bytes: &[u8], made: impl Fn(&[u8]) -> Result<T, E>) -> Result<T, E> {
    let mut mask = mask.clone();
    let text = [mask.piece(bytes), mask.end()].concat();
    made(&text)
}

/// A body with the secret taken out.
struct Masked {
    body: Incoming,
    mask: Mask,
    /// They come after what is held.
    trailers: Option<HeaderMap>,
}

impl hyper::body::Body for Masked {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Masked { body, mask, trailers } = self.get_mut();
        loop {
            if let Some(trailers) = trailers.take() {
                return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
            }
            let frame = match std::task::ready!(Pin::new(&mut *body).poll_frame(context)) {
                Some(frame) => frame?,
                None => {
                    let rest = mask.end();
                    let rest = (!rest.is_empty()).then(|| Ok(Frame::data(rest.into())));
                    return Poll::Ready(rest);
                }
            };
            match frame.into_data() {
                Ok(data) => {
                    let piece = mask.piece(&data);
                    if !piece.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::data(piece.into()))));
                    }
                }
                Err(frame) => {
                    let mut last = frame.into_trailers().unwrap_or_default();
                    if last.keys().any(|name| mask.is_in_name(name.as_str())) {
                        last.clear();
                    }
                    for value in last.values_mut() {
                        let clean = masked(mask, value.as_bytes(), HeaderValue::from_bytes);
                        *value = clean.unwrap_or(HeaderValue::from_static("*"));
                    }
                    let rest = mask.end();
                    *trailers = Some(last);
                    if !rest.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::data(rest.into()))));
                    }
                }
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

async fn connected(
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    guard: Open,
) -> Result<SendRequest<Incoming>, Failure> {
    let (send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::task::spawn_local(async move {
        let _ = connection.await;
        drop(guard);
    });
    Ok(send)
}

fn said(status: StatusCode, why: &'static str) -> Response<Body> {
    let text = format!("broker: {why}\n");
    let mut response = Response::new(Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed());
    *response.status_mut() = status;
    response
}
