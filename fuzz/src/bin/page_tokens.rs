//! Page tokens: one that is none, or another query's, is refused and named; nothing is asked of the database for it.

#![no_main]

use hallpass::grpc::v1::ListPermissionHoldersRequest;
use hallpass_fuzz::call;
use libfuzzer_sys::Corpus;
use prost::Message;
use tonic::Code;

/// As they are printed: a version, the query's digest and an id, both in hexadecimal.
fn is_token(text: &str) -> bool {
    let digits = text.strip_prefix('1').unwrap_or_default();
    digits.len() == 64
        && digits
            .bytes()
            .all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
}

libfuzzer_sys::fuzz_target!(|token: &str| -> Corpus {
    if token.is_empty() {
        return Corpus::Reject;
    }
    let request = ListPermissionHoldersRequest {
        organization_id: "11111111-1111-4111-8111-111111111111".to_owned(),
        permission: "can_approve_expenses".to_owned(),
        page_token: token.to_owned(),
        ..ListPermissionHoldersRequest::default()
    };
    let status = call("ListPermissionHolders", &request.encode_to_vec());
    if status.code() == Code::InvalidArgument {
        assert!(status.message().starts_with("page_token"), "{status:?}");
    } else {
        assert!(is_token(token), "{status:?}");
    }
    Corpus::Keep
});
