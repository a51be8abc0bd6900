//! The messages of a check and of a batch, read where they lie and written whole.
//!
//! Invariant: what is read, prost reads the same; what is written, prost writes the same, byte for byte. What asks for more
//! than whether, or is malformed, is not read at all.

use std::str::from_utf8;

use prost::{
    bytes::{BufMut, Bytes, BytesMut},
    encoding::{
        WireType, decode_key, decode_varint, encode_key, encode_varint, encoded_len_varint,
    },
};

use super::HEAD_BYTES;
use crate::{
    check::Evidence,
    grpc::v1,
    model::{Position, Reason},
};

/// More than an answer takes beside its results: a position is of 29 characters at most.
const EVIDENCE_BYTES_MAX: usize = 96;

/// More than the result of an item takes.
const RESULT_BYTES_MAX: usize = 8;

/// Who may do what? Of a `CheckPermissionRequest` or an item of a batch.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Asked<'a> {
    pub(super) organization: &'a str,
    pub(super) user: &'a str,
    pub(super) permission: &'a str,
}

/// A `CheckPermissionRequest` that says neither how fresh the answer has to be, nor asks why.
pub(super) fn read_check(mut message: &[u8]) -> Option<Asked<'_>> {
    let mut asked = Asked::default();
    while !message.is_empty() {
        let (field, value) = read_field(&mut message)?;
        let value = from_utf8(value).ok()?;
        match field {
            1 => asked.organization = value,
            2 => asked.user = value,
            3 => asked.permission = value,
            _ => return None,
        }
    }
    Some(asked)
}

/// A `BatchCheckPermissionsRequest` that does not say how fresh the answers have to be.
pub(super) fn read_batch(mut message: &[u8]) -> Option<Vec<Asked<'_>>> {
    const ITEM_BYTES: usize = 100;
    let mut items = Vec::with_capacity(message.len() / ITEM_BYTES + 1);
    while !message.is_empty() {
        match read_field(&mut message)? {
            (1, item) => items.push(read_check(item)?),
            _ => return None,
        }
    }
    Some(items)
}

/// The next field, if it has a length.
fn read_field<'a>(message: &mut &'a [u8]) -> Option<(u32, &'a [u8])> {
    let (field, wire_type) = decode_key(message).ok()?;
    if wire_type != WireType::LengthDelimited {
        return None;
    }
    let length = usize::try_from(decode_varint(message).ok()?).ok()?;
    let (value, rest) = message.split_at_checked(length)?;
    *message = rest;
    Some((field, value))
}

/// A `CheckPermissionResponse` without an explanation, with gRPC's head.
pub(super) fn write_check(reason: Reason, evidence: &Evidence) -> Bytes {
    let mut answer = begin(EVIDENCE_BYTES_MAX);
    put_decision(&mut answer, reason);
    put_evidence(&mut answer, 3, evidence);
    finish(answer)
}

/// A `BatchCheckPermissionsResponse` whose items are all decided, with gRPC's head.
pub(super) fn write_batch(reasons: &[Reason], evidence: &Evidence) -> Bytes {
    let mut answer = begin(EVIDENCE_BYTES_MAX + reasons.len() * RESULT_BYTES_MAX);
    for reason in reasons {
        let length = decision_len(*reason);
        put_head(&mut answer, 1, 2 + length);
        put_head(&mut answer, 1, length);
        put_decision(&mut answer, *reason);
    }
    put_evidence(&mut answer, 2, evidence);
    finish(answer)
}

fn begin(capacity: usize) -> BytesMut {
    let mut answer = BytesMut::with_capacity(capacity);
    answer.put_bytes(0, HEAD_BYTES);
    answer
}

/// Says how long the message is.
fn finish(mut answer: BytesMut) -> Bytes {
    let length = u32::try_from(answer.len() - HEAD_BYTES).unwrap_or(0);
    answer[1..HEAD_BYTES].copy_from_slice(&length.to_be_bytes());
    answer.freeze()
}

fn put_decision(out: &mut BytesMut, reason: Reason) {
    put_number(out, 1, reason.allows().into());
    put_number(out, 2, of_enum(v1::Reason::from(reason).into()));
}

fn decision_len(reason: Reason) -> usize {
    number_len(reason.allows().into()) + number_len(of_enum(v1::Reason::from(reason).into()))
}

fn put_evidence(out: &mut BytesMut, field: u32, evidence: &Evidence) {
    let mut room = [0; Position::BYTES_MAX];
    let position = evidence.position.write(&mut room);
    let source = of_enum(v1::Source::from(evidence.source).into());
    let staleness = evidence.staleness;
    let (seconds, nanos) = (staleness.as_secs(), staleness.subsec_nanos().into());
    let staleness_len = number_len(seconds) + number_len(nanos);
    put_head(
        out,
        field,
        2 + position.len() + number_len(source) + 2 + staleness_len,
    );
    put_head(out, 1, position.len());
    out.put_slice(position.as_bytes());
    put_number(out, 2, source);
    put_head(out, 3, staleness_len);
    put_number(out, 1, seconds);
    put_number(out, 2, nanos);
}

fn put_head(out: &mut BytesMut, field: u32, length: usize) {
    encode_key(field, WireType::LengthDelimited, out);
    encode_varint(length as u64, out);
}

fn put_number(out: &mut BytesMut, field: u32, value: u64) {
    if value > 0 {
        encode_key(field, WireType::Varint, out);
        encode_varint(value, out);
    }
}

fn number_len(value: u64) -> usize {
    if value > 0 {
        1 + encoded_len_varint(value)
    } else {
        0
    }
}

fn of_enum(value: i32) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use prost::Message;

    use super::*;
    use crate::check::Source;

    fn item() -> impl Strategy<Value = v1::BatchCheckPermissionsItem> {
        let item = (".{0,40}", ".{0,40}", ".{0,300}");
        item.prop_map(
            |(organization_id, user_id, permission)| v1::BatchCheckPermissionsItem {
                organization_id,
                user_id,
                permission,
            },
        )
    }

    fn asked(item: &v1::BatchCheckPermissionsItem) -> Asked<'_> {
        Asked {
            organization: &item.organization_id,
            user: &item.user_id,
            permission: &item.permission,
        }
    }

    /// Cuts a message's end off, and puts another there.
    fn spoil(mut message: Vec<u8>, cut: usize, noise: Vec<u8>) -> Vec<u8> {
        message.truncate(message.len().saturating_sub(cut));
        message.extend(noise);
        message
    }

    proptest! {
        #[test]
        fn checks_are_read_as_prost_reads_them(
            item in item(), explain: bool, is_stale: bool, cut in 0_usize..60,
            noise in prop::collection::vec(any::<u8>(), 0..3),
        ) {
            let request = v1::CheckPermissionRequest {
                organization_id: item.organization_id.clone(),
                user_id: item.user_id.clone(),
                permission: item.permission.clone(),
                consistency: is_stale.then(v1::Consistency::default),
                explain,
            };
            let message = request.encode_to_vec();
            prop_assert_eq!(read_check(&message), (!explain && !is_stale).then(|| asked(&item)));
            let message = spoil(message, cut, noise);
            if let Some(read) = read_check(&message) {
                let request = v1::CheckPermissionRequest::decode(message.as_slice());
                prop_assert!(request.is_ok());
                let request = request.unwrap_or_default();
                prop_assert_eq!(read.organization, request.organization_id);
                prop_assert_eq!(read.user, request.user_id);
                prop_assert_eq!(read.permission, request.permission);
                prop_assert!(!request.explain && request.consistency.is_none());
            }
        }

        #[test]
        fn batches_are_read_as_prost_reads_them(
            items in prop::collection::vec(item(), 0..4), is_stale: bool, cut in 0_usize..60,
            noise in prop::collection::vec(any::<u8>(), 0..3),
        ) {
            let request = v1::BatchCheckPermissionsRequest {
                items,
                consistency: is_stale.then(v1::Consistency::default),
            };
            let message = request.encode_to_vec();
            let items = || request.items.iter().map(asked).collect::<Vec<_>>();
            prop_assert_eq!(read_batch(&message), (!is_stale).then(items));
            let message = spoil(message, cut, noise);
            if let Some(read) = read_batch(&message) {
                let request = v1::BatchCheckPermissionsRequest::decode(message.as_slice());
                prop_assert!(request.is_ok());
                let request = request.unwrap_or_default();
                prop_assert_eq!(read, request.items.iter().map(asked).collect::<Vec<_>>());
                prop_assert!(request.consistency.is_none());
            }
        }

        #[test]
        fn answers_are_written_as_prost_writes_them(
            reasons in prop::collection::vec(prop::sample::select(Reason::ALL.to_vec()), 1..200),
            seq in 0..i64::MAX, uid: u32, seconds in 0_u64..400, nanos in 0_u32..1_000_000_000,
            is_cached: bool,
        ) {
            for staleness in [Duration::new(seconds, nanos), Duration::from_secs(seconds), Duration::ZERO] {
                let evidence = Evidence {
                    position: Position { seq, uid },
                    source: if is_cached { Source::Cache } else { Source::Database },
                    staleness,
                };
                let check = v1::CheckPermissionResponse {
                    allowed: reasons[0].allows(),
                    reason: v1::Reason::from(reasons[0]).into(),
                    evidence: Some(evidence.into()),
                    explanation: None,
                };
                let results = reasons.iter().map(|reason| {
                    use v1::batch_check_permissions_result::Result as Outcome;
                    let answer = v1::BatchCheckPermissionsAnswer {
                        allowed: reason.allows(),
                        reason: v1::Reason::from(*reason).into(),
                    };
                    v1::BatchCheckPermissionsResult { result: Some(Outcome::Answer(answer)) }
                });
                let batch = v1::BatchCheckPermissionsResponse {
                    results: results.collect(),
                    evidence: Some(evidence.into()),
                };
                for (written, expected) in [
                    (write_check(reasons[0], &evidence), check.encode_to_vec()),
                    (write_batch(&reasons, &evidence), batch.encode_to_vec()),
                ] {
                    let length = u32::try_from(expected.len()).unwrap_or(0).to_be_bytes();
                    prop_assert_eq!(&written[..], [&[0], &length[..], &expected[..]].concat());
                }
            }
        }
    }
}
