//! The webhook: a signed POST of the result's JSON document. For receivers: `docs/webhook.md`.
//!
//! Signature: `X-Darnet-Signature: t=<unix seconds>,v1=<hex of HMAC-SHA256(secret, "<t>.<body>")>`, made anew for each
//! attempt, so that an old copy of a message is seen to be old. Redirects are not followed; proxies of the environment
//! are not used. Nothing of a response but its status and Retry-After is looked at.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};

use super::policy::{Decision, SinkKind};
use super::sink::{Delivery, Sink, SinkError};
use crate::telemetry::Redacted;

/// Name of the sink.
pub const WEBHOOK_SINK: &str = "webhook";

/// Header with the signature.
pub const SIGNATURE_HEADER: &str = "X-Darnet-Signature";

/// Header with the [`Delivery::idempotency_key`].
pub const IDEMPOTENCY_HEADER: &str = "Idempotency-Key";

/// Shortest secret, bytes: 128 bits if they are random.
pub const MIN_SECRET_BYTES: usize = 16;

/// Largest secret or certificate file, bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Longest attempt: a fifth of a lease of the store.
const MAX_TIMEOUT_MS: u64 = 120_000;

/// Longest wait a receiver may ask for by Retry-After: an hour.
const MAX_RETRY_AFTER_S: u64 = 3600;

/// What is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WebhookEvents {
    /// Every outcome.
    #[default]
    All,
    /// Alerts, and every outcome that replaces one that alerted.
    Alerts,
}

/// The `[webhook]` table of the configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WebhookConfig {
    /// Where to. Empty: no webhook.
    pub url: String,
    /// What is sent.
    pub events: WebhookEvents,
    /// File whose trimmed content is the secret.
    pub secret_file: Option<PathBuf>,
    /// Environment variable that holds the secret.
    pub secret_env: Option<String>,
    /// The secret itself; needs `allow_plaintext_secret`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret: Option<Redacted<String>>,
    /// Take `secret` from the configuration file.
    pub allow_plaintext_secret: bool,
    /// Send without TLS to another machine.
    pub allow_http: bool,
    /// PEM file with the certificates to trust instead of the built-in public ones.
    pub ca_file: Option<PathBuf>,
    /// Longest wait for a connection, ms.
    pub connect_timeout_ms: u64,
    /// Longest attempt, ms.
    pub timeout_ms: u64,
    /// Most bytes read of a response's body before the connection is dropped.
    pub max_response_bytes: u64,
}

impl Default for WebhookConfig {
    fn default() -> Self {
        Self {
            url: String::new(),
            events: WebhookEvents::All,
            secret_file: None,
            secret_env: None,
            secret: None,
            allow_plaintext_secret: false,
            allow_http: false,
            ca_file: None,
            connect_timeout_ms: 5_000,
            timeout_ms: 20_000,
            max_response_bytes: 65_536,
        }
    }
}

impl WebhookConfig {
    /// Whether a webhook is configured.
    pub fn is_enabled(&self) -> bool {
        !self.url.is_empty()
    }

    /// Every fault of the values. Reads no file and no variable.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if !self.is_enabled() {
            return faults;
        }
        match self.url.parse::<ureq::http::Uri>() {
            Ok(uri) => {
                let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
                let loopback = host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
                if uri.authority().is_some_and(|a| a.as_str().contains('@')) {
                    faults.push("url: no user and password in it, the signature says who sends".into());
                }
                match uri.scheme_str() {
                    Some("https") => {}
                    Some("http") if loopback || self.allow_http => {}
                    Some("http") => faults.push("url: http to another machine, use https or set allow_http".into()),
                    _ => faults.push("url: expected https://HOST/PATH".into()),
                }
            }
            Err(_) => faults.push("url: expected https://HOST/PATH".into()),
        }
        let sources = [self.secret_file.is_some(), self.secret_env.is_some(), self.secret.is_some()];
        if sources.iter().filter(|s| **s).count() != 1 {
            faults.push("secret_file, secret_env, secret: expected exactly one of them".into());
        }
        if self.secret.is_some() && !self.allow_plaintext_secret {
            faults.push("secret: use secret_file or secret_env, or set allow_plaintext_secret".into());
        }
        if !(1..=MAX_TIMEOUT_MS).contains(&self.timeout_ms) {
            faults.push(format!("timeout_ms: expected 1 to {MAX_TIMEOUT_MS}, got {}", self.timeout_ms));
        }
        if !(1..=self.timeout_ms.max(1)).contains(&self.connect_timeout_ms) {
            faults.push(format!("connect_timeout_ms: expected 1 to timeout_ms, got {}", self.connect_timeout_ms));
        }
        if self.max_response_bytes > MAX_FILE_BYTES {
            faults.push(format!("max_response_bytes: expected at most {MAX_FILE_BYTES}"));
        }
        faults
    }

    /// Whether an outcome is to be sent. `supersedes_alert`: it replaces a result that alerted.
    pub fn wants(&self, decision: &Decision, supersedes_alert: bool) -> bool {
        self.is_enabled() && (self.events == WebhookEvents::All || decision.alert || supersedes_alert)
    }
}

/// Why the webhook cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// The configuration; every fault.
    #[error("set up the webhook: {}", .0.join("; "))]
    Config(Vec<String>),
    /// The secret cannot be had.
    #[error("set up the webhook: {0}")]
    Secret(&'static str),
    /// A file cannot be read.
    #[error("set up the webhook: read {what}: {source}")]
    File {
        /// Which key names it.
        what: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
    /// The certificate file.
    #[error("set up the webhook: ca_file: expected certificates in PEM form")]
    Certificates,
}

/// The webhook.
pub struct Webhook {
    url: String,
    agent: ureq::Agent,
    mac: Hmac<Sha256>,
    max_response_bytes: u64,
}

impl std::fmt::Debug for Webhook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Webhook")
    }
}

fn read_bounded(path: &Path, what: &'static str) -> Result<Vec<u8>, WebhookError> {
    let fault = |source| WebhookError::File { what, source };
    let mut out = Vec::new();
    std::fs::File::open(path).map_err(fault)?.take(MAX_FILE_BYTES).read_to_end(&mut out).map_err(fault)?;
    Ok(out)
}

fn hmac_of(secret: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(secret).unwrap_or_else(|_| unreachable!("HMAC takes keys of any length"))
}

impl Webhook {
    /// Reads the secret and the certificates.
    pub fn new(config: &WebhookConfig) -> Result<Self, WebhookError> {
        let mut faults = config.validate();
        if !config.is_enabled() {
            faults.push("url: empty".into());
        }
        if !faults.is_empty() {
            return Err(WebhookError::Config(faults));
        }
        let secret = if let Some(path) = &config.secret_file {
            read_bounded(path, "secret_file")?.trim_ascii().to_vec()
        } else if let Some(name) = &config.secret_env {
            let value = std::env::var(name).map_err(|_| WebhookError::Secret("secret_env: the variable is not set"))?;
            value.trim().as_bytes().to_vec()
        } else {
            config.secret.as_ref().map(|s| s.expose().trim().as_bytes().to_vec()).unwrap_or_default()
        };
        if secret.len() < MIN_SECRET_BYTES {
            return Err(WebhookError::Secret("the secret is shorter than 16 bytes"));
        }
        let mut tls = TlsConfig::builder();
        if let Some(path) = &config.ca_file {
            let pem = read_bounded(path, "ca_file")?;
            let mut certificates = Vec::new();
            for item in parse_pem(&pem) {
                if let PemItem::Certificate(c) = item.map_err(|_| WebhookError::Certificates)? {
                    certificates.push(c);
                }
            }
            if certificates.is_empty() {
                return Err(WebhookError::Certificates);
            }
            tls = tls.root_certs(RootCerts::new_with_certs(&certificates));
        }
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .user_agent(concat!("darnet/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_millis(config.connect_timeout_ms)))
            .timeout_global(Some(Duration::from_millis(config.timeout_ms)))
            // Messages are minutes apart: a kept connection would mostly be one the receiver has closed.
            .max_idle_connections(0)
            .tls_config(tls.build())
            .build()
            .new_agent();
        Ok(Self {
            url: config.url.clone(),
            agent,
            mac: hmac_of(&secret),
            max_response_bytes: config.max_response_bytes,
        })
    }

    /// The value of [`SIGNATURE_HEADER`] for a body at a time.
    fn signature(&self, unix_s: i64, body: &[u8]) -> String {
        let mut mac = self.mac.clone();
        mac.update(format!("{unix_s}.").as_bytes());
        mac.update(body);
        let mut out = format!("t={unix_s},v1=");
        for byte in mac.finalize().into_bytes() {
            use std::fmt::Write as _;
            let _ = write!(out, "{byte:02x}");
        }
        out
    }
}

/// What a receiver does: whether a signature header is right for a body, and not older or newer than `tolerance_s`.
/// The comparison takes the same time wherever it differs.
pub fn verify_signature(secret: &[u8], header: &str, body: &[u8], now_unix_s: i64, tolerance_s: u64) -> bool {
    let Some((time, signature)) = header.strip_prefix("t=").and_then(|h| h.split_once(",v1=")) else { return false };
    let Ok(unix_s) = time.parse::<i64>() else { return false };
    if now_unix_s.abs_diff(unix_s) > tolerance_s || signature.len() != 64 || !signature.is_ascii() {
        return false;
    }
    let bytes: Option<Vec<u8>> = signature
        .as_bytes()
        .chunks_exact(2)
        .map(|pair| std::str::from_utf8(pair).ok().and_then(|p| u8::from_str_radix(p, 16).ok()))
        .collect();
    let mut mac = hmac_of(secret);
    mac.update(format!("{time}.").as_bytes());
    mac.update(body);
    bytes.is_some_and(|b| mac.verify_slice(&b).is_ok())
}

impl Sink for Webhook {
    fn name(&self) -> &str {
        WEBHOOK_SINK
    }

    fn kind(&self) -> SinkKind {
        SinkKind::Webhook
    }

    fn deliver(&self, delivery: &Delivery<'_>) -> Result<(), SinkError> {
        let sent = self
            .agent
            .post(&self.url)
            .header("Content-Type", "application/json")
            .header(IDEMPOTENCY_HEADER, delivery.idempotency_key())
            .header(SIGNATURE_HEADER, self.signature(delivery.now_ms.div_euclid(1000), delivery.payload))
            .send(delivery.payload);
        let mut response = sent.map_err(|e| SinkError::retry(describe(&e)))?;
        let status = response.status().as_u16();
        let retry_after_ms = response
            .headers()
            .get("retry-after")
            .and_then(|v| v.to_str().ok()?.trim().parse::<u64>().ok())
            .map(|s| s.min(MAX_RETRY_AFTER_S) * 1000);
        // Read politely, so that the receiver does not see a reset; the status alone decides.
        let mut body = response.body_mut().as_reader().take(self.max_response_bytes);
        let _ = std::io::copy(&mut body, &mut std::io::sink());
        let detail = format!("expected status 2xx, got {status}");
        match status {
            200..=299 => Ok(()),
            408 | 425 | 429 => Err(SinkError { retryable: true, detail, retry_after_ms }),
            400..=499 => Err(SinkError { retryable: false, detail, retry_after_ms: None }),
            _ => Err(SinkError { retryable: true, detail, retry_after_ms }),
        }
    }
}

/// A transport fault in constant words: messages of the library may name the address.
fn describe(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Timeout(_) => "timed out".into(),
        ureq::Error::HostNotFound => "the host's name does not resolve".into(),
        ureq::Error::ConnectionFailed => "connection failed".into(),
        ureq::Error::Tls(_) | ureq::Error::Rustls(_) => "TLS failed; is the receiver's certificate trusted?".into(),
        ureq::Error::Io(e) => format!("connection failed: {}", e.kind()),
        ureq::Error::LargeResponseHeader(..) => "the response's header is too large".into(),
        ureq::Error::Protocol(_) => "the response is not HTTP/1.1".into(),
        _ => "the request failed".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> WebhookConfig {
        WebhookConfig {
            url: "http://127.0.0.1:1/hook".into(),
            secret: Some(Redacted::new("0123456789abcdef".into())),
            allow_plaintext_secret: true,
            ..WebhookConfig::default()
        }
    }

    #[test]
    fn signature_is_the_documented_one() {
        let hook = Webhook::new(&config()).unwrap();
        let header = hook.signature(1_700_000_000, b"{}");
        // printf '1700000000.{}' | openssl dgst -sha256 -hmac 0123456789abcdef
        assert_eq!(header, "t=1700000000,v1=e4f8e2ecae2295b2ddb2f0b5584c8275e226c0ebe9b3b819e70156bb67122e3e");
        let ok = |secret: &[u8], header: &str, body: &[u8], now| verify_signature(secret, header, body, now, 300);
        let secret = b"0123456789abcdef";
        assert!(ok(secret, &header, b"{}", 1_700_000_000));
        assert!(ok(secret, &header, b"{}", 1_700_000_300));
        assert!(!ok(secret, &header, b"{}", 1_700_000_301), "old");
        assert!(!ok(secret, &header, b"{} ", 1_700_000_000), "another body");
        assert!(!ok(b"another secret..", &header, b"{}", 1_700_000_000));
        assert!(!ok(secret, &header.replace("t=1700000000", "t=1700000001"), b"{}", 1_700_000_000), "another time");
        for bad in ["", "t=,v1=", "v1=00,t=1", "t=1700000000,v1=zz", &"é".repeat(40), "t=1700000000,v1=+1"] {
            assert!(!ok(secret, bad, b"{}", 1_700_000_000), "{bad}");
        }
    }

    #[test]
    fn faults_of_the_configuration_are_named() {
        assert!(WebhookConfig::default().validate().is_empty() && !WebhookConfig::default().is_enabled());
        assert!(config().validate().is_empty());
        let cases: [(&str, &str); 8] = [
            ("url = \"https://h/x\"", "exactly one"),
            ("url = \"https://h/x\"\nsecret_env = \"A\"\nsecret_file = \"b\"", "exactly one"),
            ("url = \"https://h/x\"\nsecret = \"0123456789abcdef\"", "allow_plaintext_secret"),
            ("url = \"http://h/x\"\nsecret_env = \"A\"", "allow_http"),
            ("url = \"https://u:p@h/x\"\nsecret_env = \"A\"", "user and password"),
            ("url = \"ftp://h\"\nsecret_env = \"A\"", "expected https"),
            ("url = \"https://h\"\nsecret_env = \"A\"\ntimeout_ms = 0", "timeout_ms"),
            ("url = \"not a url\"\nsecret_env = \"A\"", "expected https"),
        ];
        for (text, expected) in cases {
            let faults = toml::from_str::<WebhookConfig>(text).unwrap().validate();
            assert!(faults.iter().any(|f| f.contains(expected)), "{text}: {faults:?}");
        }
        assert!(toml::from_str::<WebhookConfig>("uri = \"x\"").is_err());
    }

    #[test]
    fn secrets_are_read_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        let from_file = WebhookConfig { secret: None, secret_file: Some(file.clone()), ..config() };
        assert!(matches!(Webhook::new(&from_file), Err(WebhookError::File { what: "secret_file", .. })));
        std::fs::write(&file, "short\n").unwrap();
        assert!(matches!(Webhook::new(&from_file), Err(WebhookError::Secret(_))));
        std::fs::write(&file, "0123456789abcdef\n").unwrap();
        let (a, b) = (Webhook::new(&from_file).unwrap(), Webhook::new(&config()).unwrap());
        assert_eq!(a.signature(1, b"x"), b.signature(1, b"x"));
        let unset = WebhookConfig { secret: None, secret_env: Some("DARNET_TEST_UNSET".into()), ..config() };
        assert!(matches!(Webhook::new(&unset), Err(WebhookError::Secret(_))));
        let shown = format!("{:?} {b:?} {}", config(), toml::to_string(&config()).unwrap());
        assert!(!shown.contains("0123456789abcdef"), "{shown}");
    }

    #[test]
    fn bad_certificates_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ca.pem");
        for content in ["", "no certificate", "-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n"] {
            std::fs::write(&file, content).unwrap();
            let c = WebhookConfig { ca_file: Some(file.clone()), ..config() };
            assert!(matches!(Webhook::new(&c), Err(WebhookError::Certificates)), "{content}");
        }
    }

    #[test]
    fn nobody_listening_is_worth_a_retry_and_names_no_address() {
        let hook = Webhook::new(&config()).unwrap();
        let e = hook
            .deliver(&Delivery { result_uid: "2.25.1", edition: 1, payload: b"{}", attempt: 1, now_ms: 0 })
            .unwrap_err();
        assert!(e.retryable && !e.detail.contains("127.0.0.1"), "{e:?}");
    }

    #[test]
    fn alerts_only_still_sends_corrections_of_alerts() {
        let decision = |alert| Decision {
            alert,
            level: Default::default(),
            class: None,
            probability: None,
            threshold: None,
            why: String::new(),
        };
        let all = config();
        let alerts = WebhookConfig { events: WebhookEvents::Alerts, ..config() };
        assert!(all.wants(&decision(false), false));
        assert!(alerts.wants(&decision(true), false) && alerts.wants(&decision(false), true));
        assert!(!alerts.wants(&decision(false), false));
        assert!(!WebhookConfig::default().wants(&decision(true), true));
    }
}
