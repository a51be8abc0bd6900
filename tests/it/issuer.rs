//! An issuer of tokens: keys that sign whatever a test wants signed, and a server of their public halves that can be
//! away, hang, or say what it should not.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use ::aws_lc_rs::{
    hmac,
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
        RSA_PKCS1_SHA256, RSA_PKCS1_SHA512, RsaEncoding, RsaKeyPair,
    },
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::get_current_timestamp;
use rcgen::{CertifiedKey, KeyPair};
use rustls::{ServerConfig, crypto::aws_lc_rs, pki_types::PrivateKeyDer};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    sync::watch,
};
use tokio_rustls::TlsAcceptor;

pub(crate) const ISSUER: &str = "https://issuer.example/auth/v1";
pub(crate) const AUDIENCE: &str = "authenticated";

/// A key of the issuer.
pub(crate) struct SigningKey {
    pub(crate) id: String,
    pair: Pair,
}

enum Pair {
    Ed25519(Ed25519KeyPair),
    P256(EcdsaKeyPair),
    Rsa(RsaKeyPair),
}

impl SigningKey {
    pub(crate) fn ed25519(id: &str) -> Self {
        Self::new(id, Pair::Ed25519(Ed25519KeyPair::generate().unwrap()))
    }

    pub(crate) fn p256(id: &str) -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        Self::new(id, Pair::P256(pair))
    }

    pub(crate) fn rsa(id: &str) -> Self {
        Self::new(
            id,
            Pair::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).unwrap()),
        )
    }

    fn new(id: &str, pair: Pair) -> Self {
        let id = id.to_owned();
        Self { id, pair }
    }

    pub(crate) fn algorithm(&self) -> &'static str {
        match self.pair {
            Pair::Ed25519(_) => "EdDSA",
            Pair::P256(_) => "ES256",
            Pair::Rsa(_) => "RS256",
        }
    }

    /// The public half, as a JSON Web Key.
    pub(crate) fn public(&self) -> Value {
        let mut key = match &self.pair {
            Pair::Ed25519(pair) => {
                json!({"kty": "OKP", "crv": "Ed25519", "x": base64(pair.public_key())})
            }
            Pair::P256(pair) => {
                let point = pair.public_key().as_ref();
                json!({"kty": "EC", "crv": "P-256", "x": base64(&point[1..33]), "y": base64(&point[33..])})
            }
            Pair::Rsa(pair) => {
                let modulus = pair.public_key().modulus();
                let exponent = pair.public_key().exponent();
                json!({
                    "kty": "RSA",
                    "n": base64(modulus.big_endian_without_leading_zero()),
                    "e": base64(exponent.big_endian_without_leading_zero()),
                })
            }
        };
        key["kid"] = self.id.clone().into();
        key["alg"] = self.algorithm().into();
        key["use"] = "sig".into();
        key
    }

    /// A token as an issuer would sign it.
    pub(crate) fn token(&self, claims: &Value) -> String {
        let header = json!({"alg": self.algorithm(), "kid": self.id, "typ": "JWT"});
        self.sign(&header.to_string(), &claims.to_string())
    }

    /// Any header and any payload under this key's own signature.
    pub(crate) fn sign(&self, header: &str, payload: &str) -> String {
        let message = message(header, payload);
        let signature = match &self.pair {
            Pair::Ed25519(pair) => pair.sign(message.as_bytes()).as_ref().to_vec(),
            Pair::P256(pair) => {
                let signature = pair.sign(&SystemRandom::new(), message.as_bytes());
                signature.unwrap().as_ref().to_vec()
            }
            Pair::Rsa(pair) => sign_rsa(pair, &RSA_PKCS1_SHA256, &message),
        };
        format!("{message}.{}", base64(signature))
    }

    /// As [`SigningKey::sign`], by an RSA key that is for RS256.
    pub(crate) fn sign_rs512(&self, header: &str, payload: &str) -> String {
        let Pair::Rsa(pair) = &self.pair else {
            panic!("{} is no RSA key", self.id);
        };
        let message = message(header, payload);
        let signature = sign_rsa(pair, &RSA_PKCS1_SHA512, &message);
        format!("{message}.{}", base64(signature))
    }
}

fn sign_rsa(pair: &RsaKeyPair, padding: &'static dyn RsaEncoding, message: &str) -> Vec<u8> {
    let mut signature = vec![0; pair.public_modulus_len()];
    let message = message.as_bytes();
    let signed = pair.sign(padding, &SystemRandom::new(), message, &mut signature);
    signed.unwrap();
    signature
}

/// What an attacker signs who takes a public key for the secret of HS256.
pub(crate) fn sign_with_secret(header: &str, payload: &str, secret: &[u8]) -> String {
    let message = message(header, payload);
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    let signature = hmac::sign(&key, message.as_bytes());
    format!("{message}.{}", base64(signature))
}

pub(crate) fn message(header: &str, payload: &str) -> String {
    format!("{}.{}", base64(header), base64(payload))
}

pub(crate) fn base64(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Seconds since 1970.
pub(crate) fn now() -> i64 {
    get_current_timestamp().try_into().unwrap()
}

pub(crate) fn key_set<'a>(keys: impl IntoIterator<Item = &'a SigningKey>) -> String {
    let keys: Vec<Value> = keys.into_iter().map(SigningKey::public).collect();
    json!({ "keys": keys }).to_string()
}

/// What the server of the keys does.
#[derive(Clone, Debug)]
pub(crate) enum Says {
    Document(String),
    Redirect(String),
    Nothing,
    /// The connection ends in the middle of the answer.
    Half,
    /// A body without an end.
    Endless,
    Status(&'static str),
}

/// A server of public keys on this machine; ends with its runtime.
pub(crate) struct KeyServer {
    pub(crate) url: String,
    says: watch::Sender<Says>,
    asked: Arc<AtomicUsize>,
}

impl KeyServer {
    pub(crate) async fn start(says: Says) -> Self {
        Self::listen(says, None).await
    }

    /// One that proves by a certificate who it is.
    pub(crate) async fn start_tls(says: Says, certificate: &CertifiedKey<KeyPair>) -> Self {
        let key = PrivateKeyDer::try_from(certificate.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.cert.der().clone()], key)
            .unwrap();
        Self::listen(says, Some(TlsAcceptor::from(Arc::new(config)))).await
    }

    async fn listen(says: Says, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let address = listener.local_addr().unwrap();
        let url = format!("{scheme}://{address}/jwks.json");
        let (says, said) = watch::channel(says);
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::Relaxed);
                let (tls, said) = (tls.clone(), said.clone());
                tokio::spawn(async move {
                    match tls {
                        None => answer(stream, said).await,
                        Some(tls) => answer(tls.accept(stream).await?, said).await,
                    }
                });
            }
        });
        Self { url, says, asked }
    }

    pub(crate) fn set(&self, says: Says) {
        self.says.send_replace(says);
    }

    /// How often it was asked.
    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

/// One request and its answer. Whoever asks may go away at any time.
async fn answer(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    says: watch::Receiver<Says>,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let says = says.borrow().clone();
    let (status, header, body) = match says {
        Says::Document(document) => ("200 OK", "content-type: application/json".into(), document),
        Says::Redirect(to) => ("302 Found", format!("location: {to}"), String::new()),
        Says::Status(status) => (status, "retry-after: 1".to_owned(), "{}".to_owned()),
        Says::Half => {
            let half = "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{\"keys\":";
            return stream.write_all(half.as_bytes()).await;
        }
        Says::Nothing => return std::future::pending().await,
        Says::Endless => {
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n{").await?;
            loop {
                stream.write_all(&[b' '; 4096]).await?;
            }
        }
    };
    let length = body.len();
    let answer = format!("HTTP/1.1 {status}\r\n{header}\r\ncontent-length: {length}\r\n\r\n{body}");
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}
