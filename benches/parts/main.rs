//! What the parts of a cached check cost, each by itself, and all of them together: `cargo bench --bench parts`.
//!
//! With `-- --instructions` it answers checks for `tools/instructions.sh`, which counts their instructions with callgrind: their number is
//! the same on a busy machine.

#![allow(
    clippy::expect_used,
    reason = "a bench that cannot begin has nothing to say"
)]

mod stack;

use std::{hint::black_box, time::Duration};

use criterion::{BatchSize, Criterion};
use hallpass::{
    auth::{Authentication, Caller, Identity, Scope, access::Need},
    limits::Class,
    model::BootTime,
};
use prost::{Message, bytes::Bytes};

use self::stack::{Stack, message, permission, subject};

fn parts(criterion: &mut Criterion) {
    let mut stack = Stack::new();
    let mut member = 0;
    let mut next = move || {
        // Of no order that a processor could guess.
        member = (member * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407_u64) >> 1;
        member
    };
    let checker = stack.checker.clone();
    criterion.bench_function("cache: look a user up", |bench| {
        bench.iter(|| black_box(checker.cache.get(&subject(next() % 10_000)).is_some()));
    });
    criterion.bench_function("check: look up under the lease, and decide", |bench| {
        let permission = permission(7);
        bench.iter(|| {
            let arrived = BootTime::now();
            let known = checker.recall(&subject(next() % 10_000), arrived);
            known.map(|known| checker.decide(&known, &permission))
        });
    });
    criterion.bench_function("auth: an API key", |bench| {
        bench.iter(|| {
            matches!(
                stack
                    .keys
                    .authenticate(&stack.key, Need::Scope(Scope::Check)),
                Authentication::Known(Ok(_))
            )
        });
    });
    let caller = Caller::without_scope(Identity::Key("bench".into()));
    criterion.bench_function("limits: a place, a share and a rate", |bench| {
        bench.iter(|| {
            let place = stack.limits.enter(Class::Check);
            let rate = stack.limits.caller(&caller, Class::Check);
            let share = stack.limits.share(&caller, None);
            black_box((place.is_ok(), rate.is_ok(), share.is_ok()))
        });
    });
    criterion.bench_function("wire: prost reads a check", |bench| {
        let message = message(7);
        bench.iter(|| hallpass::grpc::v1::CheckPermissionRequest::decode(black_box(&message[..])));
    });
    criterion.bench_function(
        "all: from the request to the last byte of its answer",
        |bench| {
            bench.iter_batched(
                || next() % 10_000,
                |member| {
                    let request = stack.request(member);
                    stack.answer(request)
                },
                BatchSize::SmallInput,
            );
        },
    );
}

/// So many that what only some calls do, as moka's housekeeping, has its share.
const COUNTED_CHECKS: u64 = 10_000;

/// The script counts what happens in here.
#[inline(never)]
fn counted(stack: &mut Stack, request: http::Request<http_body_util::Full<Bytes>>) -> usize {
    black_box(stack.answer(black_box(request)))
}

fn main() {
    if std::env::args().any(|argument| argument == "--instructions") {
        let mut stack = Stack::new();
        for member in 0..COUNTED_CHECKS {
            let request = stack.request(member);
            counted(&mut stack, request);
        }
        return;
    }
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    parts(&mut criterion);
    criterion.final_summary();
}
