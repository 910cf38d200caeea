//! A2A: the agent card is there and is one. Costs no tokens and starts no task.

use hyper::StatusCode;
use serde::Deserialize;
use url::Url;

use super::exchange::{Answer, Ask, Want};
use super::{Found, Prober, Target, Warm};
use crate::detector::Cause;

/// A2A 0.3 and 1.0, then before.
const CARDS: [&str; 2] = ["/.well-known/agent-card.json", "/.well-known/agent.json"];

/// What every version of the card has.
#[derive(Deserialize)]
struct Card {
    #[serde(rename = "name")]
    _name: String,
}

pub(super) async fn probe(prober: &Prober, target: &Target, warm: &mut Warm) -> Found {
    match card(prober, target, warm).await {
        Ok(answer) => match answer.judge() {
            Found::Good if serde_json::from_slice::<Card>(&answer.body).is_err() => {
                Found::bad(Cause::Protocol, "what it serves is no agent card")
            }
            found => found,
        },
        Err(found) => found,
    }
}

async fn card(prober: &Prober, target: &Target, warm: &mut Warm) -> Result<Answer, Found> {
    let url = prober.web(target)?;
    if url.path().ends_with(".json") {
        return prober.exchange(target, warm, Ask::get(url, Want::Body)).await;
    }
    let first = usize::from(warm.dialect).min(CARDS.len() - 1);
    let answer = prober.exchange(target, warm, Ask::get(at(&url, CARDS[first]), Want::Body)).await?;
    if answer.status != StatusCode::NOT_FOUND {
        return Ok(answer);
    }
    let second = 1 - first;
    let answer = prober.exchange(target, warm, Ask::get(at(&url, CARDS[second]), Want::Body)).await?;
    if answer.status.is_success() {
        warm.dialect = u8::try_from(second).unwrap_or_default();
    }
    Ok(answer)
}

fn at(url: &Url, path: &str) -> Url {
    let mut url = url.clone();
    url.set_path(path);
    url.set_query(None);
    url
}
