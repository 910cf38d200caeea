//! TCP: the port takes connections. `tcp://host:port` or `host:port`.

use super::dial::{Place, place};
use super::{Found, Prober, Target};

pub(super) async fn probe(prober: &Prober, target: &Target) -> Found {
    match read(&target.endpoint.url) {
        Ok(place) => match prober.connect(&place, target.trust).await {
            Ok(_) => Found::Good,
            Err(found) => found,
        },
        Err(found) => found,
    }
}

pub(super) fn read(url: &str) -> Result<Place, Found> {
    let url = if url.contains("://") { url.to_owned() } else { format!("tcp://{url}") };
    place(&url, &[("tcp", 0, false)]).map(|(_, place)| place)
}
