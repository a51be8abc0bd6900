//! What calls are counted as that had no answer: those that panicked, and those whose callers left at their deadline.

use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::future::join_all;
use hallpass::{
    auth::access::ACCESS,
    counters::Calls,
    grpc::observe::{GRPC_OUTCOMES, HTTP_OUTCOMES, HTTP_STATUSES, ObserveLayer, Outcomes},
    traces::Traces,
};
use hallpass_client::tonic::{Code, IntoRequest};
use http::{Request, Response};
use http_body::{Body, Frame};
use prost::bytes::Bytes;
use tokio::time::timeout;
use tower::{Layer, Service, service_fn};

use crate::{
    database::{Database, eventually},
    deadlines::TableLock,
    ops::Scrape,
    server::{APPROVE, Server, config, fill, now, question},
};

/// Much longer than a burst of calls is on its way on a busy machine.
const DEADLINE: Duration = Duration::from_secs(2);

/// Of all methods one whose messages are part of the call.
const STREAM: &str = "/hallpass.v1.AuditService/StreamAuditEntries";

/// Where a call panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Defect {
    AtTheCall,
    AtOnce,
    AfterAWait,
    InItsMessages,
}

struct Broken;

impl Body for Broken {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        panic!("a defect")
    }
}

/// Makes a call that panics. A task drops it as the panic unwinds; a batch of calls, when it has.
async fn panic_in(defect: Defect, is_task: bool, calls: &Arc<Calls>, outcomes: &'static Outcomes) {
    let traces = Traces::new(&config("postgresql://u@h/d").traces).unwrap();
    let layer = ObserveLayer::new(Arc::clone(calls), outcomes, Arc::new(traces));
    let mut service = layer.layer(service_fn(move |_: Request<()>| {
        assert!(defect != Defect::AtTheCall);
        async move {
            if defect == Defect::AfterAWait {
                tokio::task::yield_now().await;
            }
            assert!(defect == Defect::InItsMessages);
            Ok::<_, Infallible>(Response::new(Broken))
        }
    }));
    let request = Request::post(STREAM).body(()).unwrap();
    if is_task {
        let call = tokio::spawn(async move {
            let answer = service.call(request).await.unwrap();
            let mut messages = pin!(answer.into_body());
            poll_fn(|context| messages.as_mut().poll_frame(context)).await
        });
        assert!(call.await.unwrap_err().is_panic());
        return;
    }
    let mut context = Context::from_waker(Waker::noop());
    let Ok(mut answer) = unwound(|| Box::pin(service.call(request))) else {
        return;
    };
    let answer = loop {
        match unwound(|| answer.as_mut().poll(&mut context)) {
            Ok(Poll::Pending) => {}
            Ok(Poll::Ready(answer)) => break answer.unwrap(),
            Err(_) => return,
        }
    };
    let mut messages = pin!(answer.into_body());
    assert!(unwound(|| messages.as_mut().poll_frame(&mut context)).is_err());
}

fn unwound<T>(work: impl FnOnce() -> T) -> std::thread::Result<T> {
    catch_unwind(AssertUnwindSafe(work))
}

#[tokio::test]
async fn a_call_that_panics_is_counted_as_a_defect() {
    let internal = HTTP_STATUSES.iter().position(|status| *status == "500");
    let method = ACCESS
        .iter()
        .position(|(name, ..)| *name == STREAM)
        .unwrap();
    for (outcomes, expected) in [
        (&GRPC_OUTCOMES, Code::Internal as usize),
        (&HTTP_OUTCOMES, internal.unwrap()),
    ] {
        for defect in [
            Defect::AtTheCall,
            Defect::AtOnce,
            Defect::AfterAWait,
            Defect::InItsMessages,
        ] {
            for is_task in [false, true] {
                let calls = Arc::new(Calls::new(ACCESS.len() + 1, outcomes.count));
                panic_in(defect, is_task, &calls, outcomes).await;
                let ended: Vec<u64> = (0..outcomes.count)
                    .map(|outcome| calls.count_ended(method, outcome))
                    .collect();
                let case = format!("{defect:?}, in a task: {is_task}: {ended:?}");
                assert_eq!((ended[expected], ended.iter().sum()), (1, 1_u64), "{case}");
            }
        }
    }
}

/// The caller's clock and ours end a call at about the same time, and it is chance whose is first.
#[tokio::test]
async fn a_call_that_its_caller_gives_up_at_its_deadline_is_counted_as_too_late() {
    const CALLS: u32 = 100;
    let database = Database::create().await;
    fill(&database.client().await).await;
    let server = Server::start(config(&database.url)).await;
    let lock = TableLock::take(&database, "public.profiles").await;
    let handled = async |code: &str| {
        let method =
            r#"grpc_service="hallpass.v1.PermissionService",grpc_method="CheckPermission""#;
        let sample = format!(r#"grpc_server_handled_total{{{method},grpc_code="{code}"}}"#);
        Scrape::of(&server).await.value(&sample)
    };
    let calls = (0..CALLS).map(async |_| {
        let mut request = now(question("lincoln", "stranger", APPROVE)).into_request();
        request.set_timeout(DEADLINE);
        server.try_check(request).await.unwrap_err()
    });
    join_all(calls).await;
    // Who leaves long before has given up.
    let mut patient = now(question("lincoln", "stranger", APPROVE)).into_request();
    patient.set_timeout(Duration::from_secs(3_600));
    drop(timeout(DEADLINE, server.try_check(patient)).await);
    eventually("all calls have ended", async || {
        handled("DeadlineExceeded").await + handled("Canceled").await >= f64::from(CALLS + 1)
    })
    .await;
    let cancelled = handled("Canceled").await;
    assert!((cancelled - 1.0).abs() < 1e-9, "{cancelled}");
    lock.release();
    server.stop().await;
}
