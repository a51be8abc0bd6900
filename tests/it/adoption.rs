//! x
use crate::pto::Pto;
#[tokio::test]
async fn fixtures() {
    for pto in Pto::ALL {
        let _d = pto.found().await;
        let _d = pto.found().await;
    }
}
