//! Where a caller says which trace its call belongs to: <https://www.w3.org/TR/trace-context/>.
//!
//! Invariant: what is malformed counts as not said.

use http::{HeaderMap, HeaderValue};
use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

const TRACE_PARENT: &str = "traceparent";
const TRACE_STATE: &str = "tracestate";

/// `00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01`; later versions may say more behind that.
const TRACE_PARENT_BYTES: usize = 55;

/// The caller's span.
#[derive(Clone, Debug)]
pub struct Parent {
    pub trace_id: TraceId,
    span_id: SpanId,
    pub is_sampled: bool,
    /// Of a sampled one: other vendors' words, passed on as they are.
    state: Option<HeaderValue>,
}

impl Parent {
    /// What the headers, or gRPC's metadata, say.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let said = headers.get(TRACE_PARENT)?.to_str().ok()?;
        let mut parent = Self::parse(said)?;
        if parent.is_sampled {
            parent.state = headers.get(TRACE_STATE).cloned();
        }
        Some(parent)
    }

    fn parse(said: &str) -> Option<Self> {
        let is_hex = |part: &str| {
            let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
            part.bytes().all(is_digit)
        };
        let mut parts = said.split('-');
        let [version, trace_id, span_id, flags] = std::array::from_fn(|_| parts.next());
        let (version, trace_id, span_id, flags) = (version?, trace_id?, span_id?, flags?);
        let is_well_formed = [(version, 2), (trace_id, 32), (span_id, 16), (flags, 2)]
            .iter()
            .all(|(part, length)| part.len() == *length && is_hex(part));
        let is_whole = version != "00" || said.len() == TRACE_PARENT_BYTES;
        if !is_well_formed || !is_whole || version == "ff" {
            return None;
        }
        let trace_id = TraceId::from_hex(trace_id).ok()?;
        let span_id = SpanId::from_hex(span_id).ok()?;
        if trace_id == TraceId::INVALID || span_id == SpanId::INVALID {
            return None;
        }
        let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?);
        Some(Self {
            trace_id,
            span_id,
            is_sampled: flags.is_sampled(),
            state: None,
        })
    }

    pub(super) fn context(&self) -> SpanContext {
        let state = self.state.as_ref().and_then(|state| state.to_str().ok());
        let state: Option<TraceState> = state.and_then(|state| state.parse().ok());
        SpanContext::new(
            self.trace_id,
            self.span_id,
            TraceFlags::SAMPLED,
            true,
            state.unwrap_or_default(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_well_formed_is_a_parent() {
        const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
        // Expected: `-` for none, else the sampled flag.
        let cases = "
            1 00-TRACE-00f067aa0ba902b7-01
            0 00-TRACE-00f067aa0ba902b7-00
            1 00-TRACE-00f067aa0ba902b7-03
            1 cc-TRACE-00f067aa0ba902b7-01-what-the-future-says
            - 00-TRACE-00f067aa0ba902b7-01-what-the-future-says
            - 00-TRACE-00f067aa0ba902b7-01-
            - ff-TRACE-00f067aa0ba902b7-01
            - 00-00000000000000000000000000000000-00f067aa0ba902b7-01
            - 00-TRACE-0000000000000000-01
            - 00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01
            - 00-TRACE0-00f067aa0ba902b-01
            - 00-TRACE-00f067aa0ba902b7
            - 00-TRACE-00f067aa0ba902b7-1
            - 00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01
            - TRACE
            - -";
        for case in cases.trim().lines() {
            let (expected, said) = case.trim().split_once(' ').unwrap();
            let parent = Parent::parse(&said.replace("TRACE", TRACE));
            let found = parent.as_ref().map(|parent| u8::from(parent.is_sampled));
            let expected: Option<u8> = expected.parse().ok();
            assert_eq!(found, expected, "{said}");
            assert!(parent.is_none_or(|parent| parent.trace_id.to_string() == TRACE));
        }
    }
}
