//! NATS: the instance answers its `ping`, or a service answers `$SRV.PING.<name>`. The question is asked in the services'
//! account: a service of agents that live in an account of their own (deploy/nats.conf) is not found there.
//!
//! What "no responders" is worth is decided where more is known than here (`state::probed`).

use bytes::Bytes;
use rollcall_core::ids::is_valid_id;
use rollcall_core::subject::AgentVerb;
use rollcall_core::wire::{PingReply, shown_url};
use rollcall_nats::RequestError;

use super::{Found, LATE_MAX, Prober, Target};
use crate::detector::Cause;

pub(super) async fn probe(prober: &Prober, target: &Target) -> Found {
    let Some((bus, subjects)) = &prober.bus else {
        return Found::Skipped("there is no bus to probe over".to_owned());
    };
    // The agent names a service and never a subject: it must not make us publish where it pleases.
    let name = target.endpoint.url.trim();
    let name = name.strip_prefix("nats://").unwrap_or(name).trim_end_matches('/');
    let subject = if name.is_empty() {
        subjects.agent_request(&target.agent_id, &target.instance_id, AgentVerb::Ping)
    } else if is_valid_id(name) {
        format!("$SRV.PING.{name}")
    } else {
        let shown = shown_url(name, 80);
        return Found::Skipped(format!("{shown:?} is no name of a service"));
    };
    // The probe's own timeout is due before: if this one is noticed first, both are late.
    match bus.request(subject, Bytes::from_static(b"{}"), prober.timeout + LATE_MAX).await {
        Ok(answer) if name.is_empty() => match serde_json::from_slice::<PingReply>(&answer.payload) {
            Ok(reply) if reply.instance_id == target.instance_id => Found::Good,
            Ok(_) => Found::bad(Cause::Identity, "another instance answered"),
            Err(_) => Found::bad(Cause::Protocol, "its answer is no answer to a ping"),
        },
        Ok(answer) => match serde_json::from_slice::<serde_json::Value>(&answer.payload) {
            Ok(reply) if reply["name"] == name => Found::Good,
            Ok(_) => Found::bad(Cause::Identity, "another service answered"),
            Err(_) => Found::bad(Cause::Protocol, "its answer is no answer of a service"),
        },
        Err(RequestError::NoResponders) => Found::bad(Cause::NoResponders, "nobody listens there"),
        Err(error) => Found::Void(error.to_string()),
    }
}
