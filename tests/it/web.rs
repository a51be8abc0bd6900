//! HTTP and JSON as a client speaks them.

use std::net::SocketAddr;

use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use prost::bytes::Bytes;
use serde_json::Value;

use crate::server::Server;

/// An answer over HTTP.
#[derive(Debug)]
pub(crate) struct WebAnswer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    /// Null where there is no JSON.
    pub(crate) body: Value,
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
    client: Client<HttpConnector, Full<Bytes>>,
    address: SocketAddr,
    headers: Vec<(&'static str, String)>,
}

impl Web {
    pub(crate) fn of(server: &Server) -> Self {
        Self {
            client: Client::builder(TokioExecutor::new()).build_http(),
            address: server.http,
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
        let (head, body) = self.open(method, path, body).await.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        WebAnswer {
            status: head.status,
            headers: head.headers,
            body: serde_json::from_slice(&body).unwrap_or(Value::Null),
        }
    }

    /// As [`Web::send`]; the answer's body may never end.
    pub(crate) async fn open(
        &self,
        method: Method,
        path: &str,
        body: Option<String>,
    ) -> Response<Incoming> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address));
        let says = |name: &str| self.headers.iter().any(|(known, _)| *known == name);
        if body.is_some() && !says("content-type") {
            request = request.header("content-type", "application/json");
        }
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        let request = request.body(Full::from(body.unwrap_or_default())).unwrap();
        self.client.request(request).await.unwrap()
    }
}
