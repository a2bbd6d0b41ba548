//! Whether a request of the workload's goes on, and as what. Pure: hyper has parsed it, and will send what is left here.

use hyper::header::{
    CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue, InvalidHeaderValue,
    TRANSFER_ENCODING,
};
use hyper::{Request, StatusCode, Version};

use crate::grant::{Grant, Refusal};

/// What concerns one connection alone (RFC 9110, 7.6.1), beside what `Connection` names.
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// What some servers take for another method or path than those that were judged.
const OVERRIDES: [&str; 7] = [
    "x-forwarded-uri",
    "x-http-method",
    "x-http-method-override",
    "x-method-override",
    "x-original-uri",
    "x-original-url",
    "x-rewrite-url",
];

/// Whether it goes on; each is judged for itself.
pub fn judge<B>(grant: &Grant, request: &Request<B>) -> Result<(), (StatusCode, &'static str)> {
    let bad = |why| Err((StatusCode::BAD_REQUEST, why));
    if request.version() != Version::HTTP_11 || request.uri().authority().is_some() {
        return bad("only HTTP/1.1 to this host itself");
    }
    let headers = request.headers();
    if headers.contains_key(TRANSFER_ENCODING) && headers.contains_key(CONTENT_LENGTH)
        || headers.get_all(CONTENT_LENGTH).iter().count() > 1
        || headers.get_all(TRANSFER_ENCODING).iter().any(|value| value != "chunked")
    {
        return bad("its length can be read in two ways");
    }
    let mut hosts = headers.get_all(HOST).iter();
    let named = |value: &HeaderValue| {
        let text = value.to_str().unwrap_or_default().to_ascii_lowercase();
        let (host, port) =
            text.split_once(':').map_or((text.as_str(), None), |(host, port)| (host, Some(port)));
        let port = port.is_none_or(|port| grant.ports().iter().any(|(own, _)| own.to_string() == port));
        host == grant.host.as_str() && port
    };
    if !hosts.next().is_some_and(named) || hosts.next().is_some() {
        return Err((StatusCode::MISDIRECTED_REQUEST, "the grant is for another host"));
    }
    match grant.allows(request.method().as_str(), request.uri().path()) {
        Ok(()) => Ok(()),
        Err(Refusal::NotAllowed) => {
            Err((StatusCode::FORBIDDEN, "the grant does not allow this method on this path"))
        }
        Err(Refusal::Ambiguous) => bad("its path can be read in two ways"),
    }
}

/// Addresses it to the grant's host, without what is for this connection alone or could lead elsewhere.
pub fn readdress(grant: &Grant, headers: &mut HeaderMap) -> Result<(), InvalidHeaderValue> {
    strip_hop_by_hop(headers);
    // Some take an underscore for a hyphen.
    let leads = |name: &&HeaderName| OVERRIDES.contains(&name.as_str().replace('_', "-").as_str());
    let leading: Vec<HeaderName> = headers.keys().filter(leads).cloned().collect();
    for name in leading {
        headers.remove(name);
    }
    let default = grant.ports().first().is_some_and(|(port, _)| *port == 443);
    let host = match grant.port.filter(|_| !default) {
        Some(port) => format!("{}:{port}", grant.host),
        None => grant.host.to_string(),
    };
    headers.insert(HOST, host.parse()?);
    Ok(())
}

/// Takes out what concerns one connection alone.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<String> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().to_owned())
        .collect();
    for name in HOP_BY_HOP.iter().copied().chain(named.iter().map(String::as_str)) {
        headers.remove(name);
    }
}
