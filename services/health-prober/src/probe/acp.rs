//! ACP: `GET <url>/ping` answers 2xx.

use super::exchange::{Ask, Want};
use super::{Found, Prober, Target, Warm};

pub(super) async fn probe(prober: &Prober, target: &Target, warm: &mut Warm) -> Found {
    let asked = async {
        let mut url = prober.web(target)?;
        let path = format!("{}/ping", url.path().trim_end_matches('/'));
        url.set_path(&path);
        prober.exchange(target, warm, Ask::get(url, Want::Status)).await
    };
    match asked.await {
        Ok(answer) => answer.judge(),
        Err(found) => found,
    }
}
