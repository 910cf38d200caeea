//! TCP: the port takes connections. `tcp://host:port` or `host:port`.

use super::dial::place;
use super::{Found, Prober, Target};

pub(super) async fn probe(prober: &Prober, target: &Target) -> Found {
    let url = &target.endpoint.url;
    let url = if url.contains("://") { url.clone() } else { format!("tcp://{url}") };
    match place(&url, &[("tcp", 0, false)]) {
        Ok((_, place)) => match prober.connect(&place, target.trust).await {
            Ok(_) => Found::Good,
            Err(found) => found,
        },
        Err(found) => found,
    }
}
