//! HTTP and JSON as a client speaks them.

use std::{convert::Infallible, net::SocketAddr};

use futures_util::stream;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use prost::bytes::Bytes;
use serde_json::Value;

use crate::server::Server;

/// Of a body whose length is not said.
const PIECE_BYTES: usize = 64 << 10;

/// An answer over HTTP.
#[derive(Debug)]
pub(crate) struct WebAnswer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    /// Null where there is no JSON.
    pub(crate) body: Value,
    /// As they came.
    pub(crate) bytes: Bytes,
}

impl WebAnswer {
    /// `401 CREDENTIAL_MISSING` of one that failed.
    pub(crate) fn failed(&self) -> String {
        let code = self.body["code"].as_str().unwrap_or("");
        format!("{} {code}", self.status.as_u16())
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }
}

/// A client of HTTP/1.1.
#[derive(Clone)]
pub(crate) struct Web {
    client: Client<HttpConnector, BoxBody<Bytes, Infallible>>,
    address: SocketAddr,
    headers: Vec<(&'static str, String)>,
}

impl Web {
    pub(crate) fn of(server: &Server) -> Self {
        Self::at(server.http)
    }

    pub(crate) fn at(address: SocketAddr) -> Self {
        Self {
            client: Client::builder(TokioExecutor::new()).build_http(),
            address,
            headers: Vec::new(),
        }
    }

    /// Sends this header, too.
    pub(crate) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(crate) async fn get(&self, path: &str) -> WebAnswer {
        self.send(Method::GET, path, None).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> WebAnswer {
        self.send(Method::POST, path, Some(body.to_string())).await
    }

    /// A body is sent as JSON, unless a header of the client's says otherwise.
    pub(crate) async fn send(&self, method: Method, path: &str, body: Option<String>) -> WebAnswer {
        let has_body = body.is_some();
        let body = Full::from(body.unwrap_or_default()).boxed();
        read(self.open_body(method, path, has_body, body).await).await
    }

    /// As [`Web::send`]; the answer's body may never end.
    pub(crate) async fn open(
        &self,
        method: Method,
        path: &str,
        body: Option<String>,
    ) -> Response<Incoming> {
        let has_body = body.is_some();
        let body = Full::from(body.unwrap_or_default()).boxed();
        self.open_body(method, path, has_body, body).await
    }

    /// As [`Web::post`], without saying how long it is.
    pub(crate) async fn send_chunked(&self, path: &str, body: String) -> WebAnswer {
        let bytes = Bytes::from(body);
        let pieces: Vec<_> = (0..bytes.len())
            .step_by(PIECE_BYTES)
            .map(|at| bytes.slice(at..bytes.len().min(at + PIECE_BYTES)))
            .map(|piece| Ok(Frame::data(piece)))
            .collect();
        let body = StreamBody::new(stream::iter(pieces));
        let body = BodyExt::boxed(body);
        read(self.open_body(Method::POST, path, true, body).await).await
    }

    async fn open_body(
        &self,
        method: Method,
        path: &str,
        has_body: bool,
        body: BoxBody<Bytes, Infallible>,
    ) -> Response<Incoming> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address));
        let says = |name: &str| self.headers.iter().any(|(known, _)| *known == name);
        if has_body && !says("content-type") {
            request = request.header("content-type", "application/json");
        }
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        let request = request.body(body).unwrap();
        self.client.request(request).await.unwrap()
    }
}

/// The whole of an answer; of a stream of events, which does not end, the beginning.
async fn read(answer: Response<Incoming>) -> WebAnswer {
    let (head, body) = answer.into_parts();
    let is_stream = head
        .headers
        .get("content-type")
        .is_some_and(|of| of == "text/event-stream");
    let body = match is_stream {
        true => Bytes::new(),
        false => body.collect().await.unwrap().to_bytes(),
    };
    WebAnswer {
        status: head.status,
        headers: head.headers,
        body: serde_json::from_slice(&body).unwrap_or(Value::Null),
        bytes: body,
    }
}
