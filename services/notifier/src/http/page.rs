//! `GET /`: the dashboard, one page with everything in it.

use std::sync::LazyLock;

use axum::{
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use sha2::{Digest, Sha256};

const HTML: &str = include_str!("../../assets/dashboard.html");
const STYLE: &str = include_str!("../../assets/dashboard.css");
const SCRIPT: &str = include_str!("../../assets/dashboard.js");

struct Page {
    body: Bytes,
    policy: String,
}

/// Put together once. The policy names the very bytes of style and script: nothing else runs, whatever a label or a
/// message of an agent may hold.
static PAGE: LazyLock<Page> = LazyLock::new(|| {
    let body = HTML.replace("/*STYLE*/", STYLE).replace("/*SCRIPT*/", SCRIPT);
    let hash = |text: &str| format!("'sha256-{}'", STANDARD.encode(Sha256::digest(text.as_bytes())));
    let policy = format!(
        "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
        hash(SCRIPT),
        hash(STYLE)
    );
    Page { body: Bytes::from(body), policy }
});

/// `GET /`
#[utoipa::path(
    get, path = "/", tag = "dashboard", summary = "The dashboard",
    responses((status = 200, description = "A page that follows the fleet", content_type = "text/html", body = String))
)]
pub(super) async fn dashboard() -> Response {
    let mut response = PAGE.body.clone().into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    if let Ok(policy) = HeaderValue::from_str(&PAGE.policy) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn style_and_script_stand_in_the_page_as_they_were_hashed() {
        let page = std::str::from_utf8(&PAGE.body).unwrap();
        assert!(page.contains(&format!("<style>{STYLE}</style>")));
        assert!(page.contains(&format!("<script>{SCRIPT}</script>")));
        assert_eq!(page.matches("<script").count(), 1);
        for end in ["</script", "</style", "<!--"] {
            assert!(!SCRIPT.contains(end) && !STYLE.contains(end), "{end} would end the element early");
        }
    }

    /// A browser hands named events only to those who listen for the name.
    #[test]
    fn the_page_listens_for_every_event_it_asks_for() {
        use rollcall_core::event::{AgentEvent, SystemEventKind};
        let listened = SCRIPT.split_once("const NAMES = ").unwrap().1.split_once(';').unwrap().0;
        for name in AgentEvent::NAMES.iter().chain(SystemEventKind::NAMES) {
            assert!(listened.contains(&format!("\"{name}\"")), "{name}");
        }
    }

    #[test]
    fn nothing_comes_from_elsewhere_and_nothing_is_written_as_markup() {
        let page = std::str::from_utf8(&PAGE.body).unwrap();
        for forbidden in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            " style=",
            " onclick=",
        ] {
            assert!(!page.contains(forbidden), "{forbidden}");
        }
        for address in ["http://", "https://", "//cdn"] {
            assert!(!page.contains(address), "{address}");
        }
    }
}
