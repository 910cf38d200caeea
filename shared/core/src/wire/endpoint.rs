//! Where an agent can be probed or driven.

use serde::{Deserialize, Serialize};

/// Where an agent can be probed or driven.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Endpoint {
    /// `http`, `tcp`, `nats`, `acp`, `a2a`, `mcp`, `grpc`.
    pub kind: String,
    /// Where.
    #[serde(default, deserialize_with = "super::null_is_default")]
    pub url: String,
}

/// The only kind of control endpoint that anybody is driven at.
pub const CONTROL_KIND: &str = "http";
/// What is shown in the place of a user and password.
const HIDDEN: &str = "***";

impl Endpoint {
    /// Whether an agent is driven there, if it is its control endpoint.
    #[must_use]
    pub fn is_driven(&self) -> bool {
        self.kind == CONTROL_KIND
    }

    /// Whether it may be named as a probe: what describes an agent is in events and views for everybody to read.
    ///
    /// # Errors
    /// Why not, without the URL.
    pub fn check(&self) -> Result<(), &'static str> {
        match userinfo(&self.url) {
            Some(_) => Err("its url carries a user or password, and everybody could read it"),
            None => Ok(()),
        }
    }

    /// Whether it may be named as a control endpoint, to which paths are added.
    ///
    /// # Errors
    /// Why not, without the URL.
    pub fn check_control(&self) -> Result<(), &'static str> {
        self.check()?;
        if self.is_driven() && self.url.contains(['?', '#']) {
            return Err("its url has a query or a fragment, and paths are added to it");
        }
        Ok(())
    }

    /// Its URL for people: at most `chars` of it, and no user or password.
    #[must_use]
    pub fn shown_url(&self, chars: usize) -> String {
        shown_url(&self.url, chars)
    }

    /// Takes out user and password; that there were some can still be told.
    pub fn hide_userinfo(&mut self) {
        if userinfo(&self.url).is_some() {
            self.url = self.shown_url(usize::MAX);
        }
    }
}

/// A URL for people: at most `chars` of it, and no user or password.
#[must_use]
pub fn shown_url(url: &str, chars: usize) -> String {
    let shown = match userinfo(url) {
        Some(secret) => [&url[..secret.start], HIDDEN, &url[secret.end..]].concat(),
        None => url.to_owned(),
    };
    shown.chars().take(chars).collect()
}

/// Where in a URL user and password are, as whoever reads URLs leniently finds them: also without slashes, with too many,
/// or with the wrong ones. It need not be a URL that can be read.
fn userinfo(url: &str) -> Option<std::ops::Range<usize>> {
    let is_blank = |c: char| c <= ' ';
    let trimmed = url.len() - url.trim_start_matches(is_blank).len();
    let named = url[trimmed..].split_once(':').filter(|(scheme, _)| {
        scheme.chars().all(|c| c.is_ascii_alphanumeric() || is_blank(c) || matches!(c, '+' | '-' | '.'))
    });
    let start = match named {
        Some((scheme, _)) if scheme.eq_ignore_ascii_case("stdio") => return None,
        Some((scheme, rest))
            if is_web(scheme) || rest.trim_start_matches(is_blank).starts_with(['/', '\\']) =>
        {
            trimmed + scheme.len() + 1
        }
        // `user:password@host:port` is no scheme and a path.
        _ => trimmed,
    };
    let is_slash = |c: char| is_blank(c) || matches!(c, '/' | '\\');
    let start = url.len() - url[start..].trim_start_matches(is_slash).len();
    let rest = &url[start..];
    let authority = rest.find(['/', '\\', '?', '#']).map_or(rest, |end| &rest[..end]);
    authority.rfind('@').map(|at| start..start + at)
}

/// A scheme that has a host after it also without slashes.
fn is_web(scheme: &str) -> bool {
    let scheme: String = scheme.chars().filter(char::is_ascii_alphanumeric).collect();
    ["http", "https"].iter().any(|web| scheme.eq_ignore_ascii_case(web))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(url: &str) -> Endpoint {
        Endpoint { kind: CONTROL_KIND.to_owned(), url: url.to_owned() }
    }

    #[test]
    fn a_user_or_password_is_refused_and_never_shown_however_it_is_written() {
        for url in [
            "http://user:hunter2@10.0.0.7:8080/x",
            "https://hunter2@h",
            "http:user:hunter2@h/",
            "http:/user:hunter2@h/",
            "http:///user:hunter2@h/",
            "http:\\\\user:hunter2@h/",
            " http://user:hunter2@h/",
            "ht\ntp://user:hunter2@h/",
            "http:/\t/user:hunter2@h/",
            "tcp://user:hunter2@h:1",
            "tcp:\t//user:hunter2@h:1",
            "user:hunter2@h:1",
            "hunter2@h:1",
            "http://a@b:hunter2@h/",
            "http://user:hunter2@",
            "http://user:hunter2@not a host/@x",
            "//user:hunter2@h/",
        ] {
            let mut endpoint = at(url);
            for refused in [endpoint.check(), endpoint.check_control()] {
                let why = refused.expect_err(url);
                assert!(why.contains("user or password") && !why.contains("hunter2"), "{why}");
            }
            let shown = endpoint.shown_url(200);
            assert!(!shown.contains("hunter2") && shown.contains("***@"), "{url}: {shown}");
            endpoint.hide_userinfo();
            assert_eq!(endpoint.url, shown);
            assert!(endpoint.check().is_err(), "it is still told that there was one: {shown}");
        }
        assert_eq!(at("http://u:p@h:1/x?y").shown_url(200), "http://***@h:1/x?y");
    }

    #[test]
    fn what_only_looks_like_a_user_is_left_alone() {
        for url in [
            "http://h/@scope/x",
            "http://h/a@b",
            "10.0.0.8:22",
            "host:22",
            "stdio:npx@latest",
            "acp://",
            "",
            "[::1]:5",
        ] {
            let mut endpoint = at(url);
            assert_eq!(endpoint.check_control(), Ok(()), "{url}");
            endpoint.hide_userinfo();
            assert_eq!(endpoint.url, url);
        }
        assert_eq!(at("http://h/?x=a@b").check(), Ok(()));
        assert_eq!(at("http://höst/").shown_url(9), "http://hö");
    }

    #[test]
    fn a_control_url_has_no_query_and_no_fragment() {
        for url in ["http://h/?key=1", "http://h#x", "http://h/x?"] {
            assert!(at(url).check_control().expect_err(url).contains("query or a fragment"), "{url}");
            assert_eq!(at(url).check(), Ok(()), "a probe may have them: {url}");
            // Nobody is driven there.
            assert_eq!(Endpoint { kind: "other".to_owned(), ..at(url) }.check_control(), Ok(()), "{url}");
        }
    }
}
