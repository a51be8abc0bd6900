//! What a check comes through from its request to its answer, all layers on, without a network: the connection's own work is
//! left out, and so is the database, which is never asked.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, SystemTime},
};

use hallpass::{
    auth::{
        Authenticator, Peer,
        access::ACCESS,
        api_key::{ApiKey, Pepper},
        keys::{ApiKeys, Timing},
    },
    cache::Cache,
    check::Checker,
    counters::Calls,
    feed::{Lease, Progress},
    grpc::{
        direct::Direct,
        gate::GateLayer,
        limit::{CallerLayer, DeadlineLayer, DoorLayer},
        observe::{GRPC_OUTCOMES, ObserveLayer},
        permission_service::PermissionService,
        v1,
    },
    limits::{Bounds, Limits},
    loader::Loader,
    model::{
        BootTime, Catalog, DecidedPermission, Membership, OrganizationId, PermissionTemplate,
        Position, Reason, Subject, SubjectPermissions, UserId,
    },
    selfcheck::{SAMPLE_EVERY, sampler},
    store::{
        Store,
        api_keys::{Edition, KeysState, StoredKey},
    },
    traces::{Settings, Traces},
};
use http::{Request, Response};
use http_body::Body as _;
use http_body_util::Full;
use prost::{Message, bytes::Bytes};
use tonic::body::Body;
use tower::{Service, ServiceBuilder, ServiceExt, service_fn, util::BoxCloneService};
use uuid::Uuid;

pub(crate) const CHECK: &str = "/hallpass.v1.PermissionService/CheckPermission";

/// Members whose decisions are cached.
const MEMBERS: u64 = 10_000;

const PERMISSIONS: usize = 30;

/// For as long as anything measures.
const EVER: Duration = Duration::from_secs(3_600);

type Served = BoxCloneService<Request<Full<Bytes>>, Response<Counted>, Infallible>;
type Counted = hallpass::grpc::observe::Counted<Body>;

/// The parts of a service that knows [`MEMBERS`] users and one API key.
pub(crate) struct Stack {
    pub(crate) checker: Arc<Checker>,
    pub(crate) limits: Arc<Limits>,
    pub(crate) keys: ApiKeys,
    /// As it is sent.
    pub(crate) key: String,
    pub(crate) calls: Served,
}

impl Stack {
    pub(crate) fn new() -> Self {
        let checker = Arc::new(checker());
        let limits = Arc::new(Limits::new(Bounds {
            requests_in_flight_max: 5_000,
            caller_in_flight_max: 250,
            address_rate_max: u32::MAX,
            credential_rate_max: 1_000,
            caller_rate_max: u32::MAX,
            caller_list_rate_max: u32::MAX,
            trusted_proxies: Vec::new(),
            request_deadline_max: Some(Duration::from_secs(10)),
            stream_age_max: None,
        }));
        let (keys, key) = keys();
        let authenticator = Arc::new(Authenticator::default().with_keys(keys.clone()));
        let counted = Arc::new(Calls::new(ACCESS.len() + 1, GRPC_OUTCOMES.count));
        let traces = Traces::new(&Settings {
            otlp_endpoint: None,
            sample_ratio: 0.0,
            slow_request: Some(Duration::from_millis(500)),
        });
        let traces = Arc::new(traces.expect("nothing is exported"));
        let permissions = PermissionService::new(Arc::clone(&checker), EVER, Arc::clone(&limits));
        let tonic = service_fn(|_| async { panic!("a check was left to tonic") });
        let calls = ServiceBuilder::new()
            .layer(ObserveLayer::new(counted, &GRPC_OUTCOMES, traces))
            .layer(DoorLayer(Arc::clone(&limits)))
            .layer(DeadlineLayer(Arc::clone(&limits)))
            .layer(GateLayer(authenticator, Arc::clone(&limits)))
            .layer(CallerLayer(Arc::clone(&limits)))
            .service(Direct::new(Arc::new(permissions), tonic));
        Self {
            checker,
            limits,
            keys,
            key,
            calls: calls.boxed_clone(),
        }
    }

    /// A request as hyper hands it over.
    pub(crate) fn request(&self, member: u64) -> Request<Full<Bytes>> {
        let message = message(member % MEMBERS);
        let length = u32::try_from(message.len()).unwrap_or(0).to_be_bytes();
        let body = [&[0], length.as_slice(), &message].concat();
        let mut request = Request::post(CHECK)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("user-agent", "bench")
            .header("authorization", format!("Bearer {}", self.key))
            .body(Full::new(body.into()))
            .expect("a request");
        request.extensions_mut().insert(Peer {
            address: Some(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))),
            ..Peer::default()
        });
        request
    }

    /// Answers it, to the last byte; returns how many.
    pub(crate) fn answer(&mut self, request: Request<Full<Bytes>>) -> usize {
        let mut nobody = Context::from_waker(Waker::noop());
        let mut call = std::pin::pin!(self.calls.call(request));
        let Poll::Ready(Ok(response)) = call.as_mut().poll(&mut nobody) else {
            panic!("a cached check waits");
        };
        let mut body = std::pin::pin!(response.into_body());
        let mut bytes = 0;
        while let Poll::Ready(Some(Ok(frame))) = body.as_mut().poll_frame(&mut nobody) {
            bytes += frame.data_ref().map_or(0, Bytes::len);
        }
        bytes
    }
}

pub(crate) fn subject(member: u64) -> Subject {
    Subject {
        organization: OrganizationId(Uuid::from_u64_pair(member / 200, 1)),
        user: UserId(Uuid::from_u64_pair(member, 2)),
    }
}

pub(crate) fn permission(index: usize) -> String {
    format!("can_do_thing_{index:02}")
}

/// A check's, encoded.
pub(crate) fn message(member: u64) -> Vec<u8> {
    let Subject { organization, user } = subject(member);
    v1::CheckPermissionRequest {
        organization_id: organization.0.to_string(),
        user_id: user.0.to_string(),
        permission: permission(7),
        ..Default::default()
    }
    .encode_to_vec()
}

/// One that knows its members and never asks the database.
fn checker() -> Checker {
    let url = "postgresql://nobody@127.0.0.1:1/none"
        .parse()
        .expect("a URL");
    let store = Arc::new(Store::new(&url).expect("no connection is opened"));
    let cache = Arc::new(Cache::new(1_000_000));
    let progress = Arc::new(Progress::default());
    let head = Position {
        seq: 812,
        uid: 0x5f0c_9ae1,
    };
    let epoch = cache.begin_epoch(head);
    let templates = (0..PERMISSIONS).map(|index| PermissionTemplate {
        key: permission(index).into(),
        name: "a thing".into(),
        module: "things".into(),
    });
    let catalog = Arc::new(Catalog::new(templates.collect()));
    let membership = Arc::new(Membership {
        role: "board_member".into(),
        decided: vec![
            DecidedPermission {
                reason: Reason::GrantedByRole,
                enabled: true,
                min_role: 0,
            };
            PERMISSIONS
        ]
        .into(),
        min_roles: Box::new(["volunteer".into()]),
    });
    for member in 0..MEMBERS {
        let permissions = SubjectPermissions {
            catalog: Arc::clone(&catalog),
            membership: Some(Arc::clone(&membership)),
        };
        cache.insert(subject(member), permissions, head, epoch);
    }
    progress.renew(Lease {
        applied: head,
        sent_at: BootTime::now(),
        epoch,
    });
    let (loader, _) = Loader::new(
        Arc::clone(&store),
        Arc::clone(&cache),
        Arc::clone(&progress),
    );
    let (sampler, _) = sampler(SAMPLE_EVERY);
    Checker::new(cache, progress, loader, store, EVER, sampler)
}

fn keys() -> (ApiKeys, String) {
    let key = ApiKey::generate().expect("random bits");
    let keys = ApiKeys::new(
        Timing {
            staleness_bound: EVER,
            staleness_ceiling: EVER,
            record_interval: EVER,
        },
        Pepper::default(),
    );
    let stored = StoredKey {
        id: key.id.as_str().to_owned(),
        hash: key.hash(&Pepper::default()).to_vec(),
        scopes: vec!["check".to_owned()],
        organizations: None,
        expires_at: None,
        is_revoked: false,
    };
    let state = KeysState {
        edition: Edition::default(),
        clock: SystemTime::UNIX_EPOCH,
    };
    keys.take(vec![stored], state, BootTime::now());
    let sent = key.reveal();
    (keys, sent)
}
