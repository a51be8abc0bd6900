//! What counting a check costs: the layer, the decision and the lookup, beside nothing, in alternating rounds; with an eye
//! on slow calls, and a collector of traces that samples hardly any.
//!
//! It is held against what the server spends on a check, of which it may take [`SHARE_MAX`].

use std::{
    convert::Infallible,
    error::Error,
    future::{Ready, ready},
    hint::black_box,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use hallpass::{
    auth::access::ACCESS,
    check::{Counts, Source},
    counters::Calls,
    grpc::observe::{GRPC_OUTCOMES, ObserveLayer},
    model::Reason,
    traces::{Settings, Traces},
};
use http::{Request, Response};
use tonic::body::Body;
use tower::{Layer, Service, service_fn};

const CALLS: u32 = 200_000;
const ROUNDS: usize = 21;

/// What a cached check costs the service, in nanoseconds, as `hallpass bench` has it.
const CHECK_NANOS: f64 = 10_000.0;

const SHARE_MAX: f64 = 0.03;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let calls = Arc::new(Calls::new(ACCESS.len() + 1, GRPC_OUTCOMES.count));
    // What exports is in need of one, from the first sampled call on.
    let runtime = tokio::runtime::Runtime::new()?;
    let _entered = runtime.enter();
    let traces = Traces::new(&Settings {
        otlp_endpoint: Some("http://127.0.0.1:1".to_owned()),
        sample_ratio: 1e-9,
        slow_request: Some(Duration::from_millis(500)),
    });
    let traces = Arc::new(traces?);
    let layer = ObserveLayer::new(calls, &GRPC_OUTCOMES, traces);
    let counts = Counts::default();
    let mut costs: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let bare = nanos(service_fn(answer), || ());
            let counted = nanos(layer.layer(service_fn(answer)), || {
                counts.decided(Reason::GrantedByRole, Source::Cache);
            });
            counted - bare
        })
        .collect();
    costs.sort_by(f64::total_cmp);
    let cost = costs[ROUNDS / 2];
    let share = cost / CHECK_NANOS;
    println!(
        "counting a check costs {cost:.0} ns, {:.1} % of the check",
        share * 100.0
    );
    if share > SHARE_MAX {
        println!("FAILS: more than {:.0} %", SHARE_MAX * 100.0);
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn answer(_: Request<()>) -> Ready<Result<Response<Body>, Infallible>> {
    ready(Ok(Response::new(Body::empty())))
}

/// Of one call.
fn nanos<S: Service<Request<()>, Error = Infallible>>(mut service: S, told: impl Fn()) -> f64 {
    let started = Instant::now();
    for _ in 0..CALLS {
        let mut request = Request::new(());
        *request.uri_mut() =
            http::Uri::from_static("/hallpass.v1.PermissionService/CheckPermission");
        let answered = service.call(black_box(request)).now_or_never();
        told();
        drop(black_box(answered));
    }
    started.elapsed().as_secs_f64() * 1e9 / f64::from(CALLS)
}
