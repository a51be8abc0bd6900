//! Answers packed with gzip for who takes them so.
//!
//! Invariant: an answer is packed whole, before the limits weigh it: no encoder waits for a reader, and what is weighed is
//! what is kept until it is taken. For a stranger nothing is packed anew.

use std::{
    io::{self, Write},
    sync::Arc,
};

use axum::{
    body::{Body, to_bytes},
    extract::Request,
    http::{
        HeaderMap, HeaderValue,
        header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, VARY},
    },
    middleware::Next,
    response::{IntoResponse, Response},
};
use flate2::{Compression, write::GzEncoder};
use http_body::Body as _;
use tonic::Status;

use super::failure::Failure;
use crate::auth::Caller;

/// Shorter answers fit into one packet as they are.
const PACKED_FROM_BYTES: u64 = 1 << 10;

/// Packs what is whole and long, and is not packed yet.
pub(super) async fn answers(request: Request, next: Next) -> Response {
    let takes_packed = takes_packed(request.headers());
    let is_stranger = request.extensions().get::<Arc<Caller>>().is_none();
    let mut response = next.run(request).await;
    let bytes = response.body().size_hint().exact();
    let is_long = bytes.is_some_and(|bytes| bytes >= PACKED_FROM_BYTES);
    if is_stranger || !is_long || response.headers().contains_key(CONTENT_ENCODING) {
        return response;
    }
    response
        .headers_mut()
        .insert(VARY, HeaderValue::from_static("accept-encoding"));
    if !takes_packed {
        return response;
    }
    let (mut head, body) = response.into_parts();
    let packed = match to_bytes(body, usize::MAX).await {
        Ok(plain) => pack(&plain, Compression::fast()).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    match packed {
        Ok(packed) => {
            head.headers.remove(CONTENT_LENGTH);
            head.headers
                .insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            Response::from_parts(head, Body::from(packed))
        }
        Err(error) => Failure::from(Status::internal(error)).into_response(),
    }
}

pub(super) fn pack(plain: &[u8], level: Compression) -> io::Result<Vec<u8>> {
    let mut packer = GzEncoder::new(Vec::new(), level);
    packer.write_all(plain)?;
    packer.finish()
}

/// Whether gzip is named, and not with a weight of nothing.
pub(super) fn takes_packed(headers: &HeaderMap) -> bool {
    let named = headers.get_all(ACCEPT_ENCODING).iter();
    let mut codings = named.flat_map(|codings| codings.as_bytes().split(|byte| *byte == b','));
    codings.any(|coding| {
        let mut parts = coding.split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
        let is_gzip = parts
            .next()
            .is_some_and(|name| name.eq_ignore_ascii_case(b"gzip"));
        let weight = parts.find_map(|part| part.strip_prefix(b"q="));
        is_gzip
            && weight.is_none_or(|weight| weight.iter().any(|digit| (b'1'..=b'9').contains(digit)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gzip_is_taken_where_it_is_named() {
        let cases = [
            ("gzip", true),
            ("deflate, gzip;q=0.5, br", true),
            ("GZIP; q=1.0", true),
            ("gzip;q=0", false),
            ("gzip;q=0.000", false),
            ("deflate, br", false),
            ("*", false),
            ("", false),
        ];
        for (codings, expected) in cases {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static(codings));
            assert_eq!(takes_packed(&headers), expected, "{codings}");
        }
        assert!(!takes_packed(&HeaderMap::new()));
    }
}
