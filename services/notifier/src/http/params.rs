//! Query parameters. An empty value is none; a name that is not known is ignored.

use std::str::FromStr;

use axum::{
    extract::{FromRequestParts, Query},
    http::request::Parts,
};
use rollcall_core::{
    InvalidId,
    execution::State,
    wire::{ApiError, LIST_LIMIT_DEFAULT, LIST_LIMIT_MAX},
};

use super::error::Failure;
use crate::filter::Filter;

/// The pairs of a query string.
#[derive(Debug, Default)]
pub(super) struct Params(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        match Query::try_from_uri(&parts.uri) {
            Ok(Query(pairs)) => Ok(Self(pairs)),
            Err(rejection) => Err(ApiError::bad_request(rejection.body_text()).into()),
        }
    }
}

impl Params {
    fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .iter()
            .filter(move |(key, value)| key == name && !value.is_empty())
            .map(|(_, value)| value.as_str())
    }

    fn one<'a>(&'a self, name: &'a str) -> Result<Option<&'a str>, ApiError> {
        let mut values = self.all(name);
        let first = values.next();
        match values.next() {
            None => Ok(first),
            Some(_) => Err(ApiError::bad_request(format!("{name} is given more than once"))),
        }
    }

    /// An identifier.
    pub(super) fn id<T: FromStr<Err = InvalidId>>(&self, name: &str) -> Result<Option<T>, ApiError> {
        Ok(self.one(name)?.map(str::parse).transpose()?)
    }

    /// `after`: a sequence.
    pub(super) fn after(&self) -> Result<Option<u64>, ApiError> {
        self.one("after")?.map(|text| sequence("after", text)).transpose()
    }

    /// `limit`: 1..=1000, 100 when it is missing.
    pub(super) fn limit(&self) -> Result<usize, ApiError> {
        let Some(text) = self.one("limit")? else { return Ok(LIST_LIMIT_DEFAULT) };
        text.parse().ok().filter(|limit| (1..=LIST_LIMIT_MAX).contains(limit)).ok_or_else(|| {
            ApiError::bad_request(format!("limit is {:?}, not within 1..{LIST_LIMIT_MAX}", shorten(text)))
        })
    }

    /// `state`: states of executions, separated by commas; empty: all.
    pub(super) fn states(&self) -> Result<Vec<State>, ApiError> {
        let names = self.all("state").flat_map(|list| list.split(','));
        names
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .map(|name| {
                State::ALL.into_iter().find(|state| state.as_str() == name).ok_or_else(|| {
                    let known = State::ALL.map(State::as_str).join(", ");
                    ApiError::bad_request(format!("state: {:?} is none of {known}", shorten(name)))
                })
            })
            .collect()
    }

    /// `type`, `agent`, `pool`, `execution`.
    pub(super) fn filter(&self) -> Result<Filter, ApiError> {
        let mut filter = Filter::about(self.id("agent")?, self.id("pool")?, self.id("execution")?);
        for list in self.all("type") {
            filter.add_types(list)?;
        }
        Ok(filter)
    }
}

/// A sequence of the log.
pub(super) fn sequence(name: &str, text: &str) -> Result<u64, ApiError> {
    text.parse().map_err(|_| {
        ApiError::bad_request(format!("{name} is {:?}, not a sequence of the log", shorten(text)))
    })
}

fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rollcall_core::{AgentId, wire::ErrorCode};

    fn params(query: &str) -> Params {
        let uri = format!("http://h/?{query}").parse().unwrap();
        let Query(pairs) = Query::try_from_uri(&uri).unwrap();
        Params(pairs)
    }

    #[test]
    fn what_is_empty_or_unknown_is_not_there() {
        let given = params("type=&agent=&pool=&execution=&after=&limit=&colour=red");
        assert_eq!(given.filter().unwrap(), Filter::default());
        assert_eq!((given.after().unwrap(), given.limit().unwrap()), (None, LIST_LIMIT_DEFAULT));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (query, named) in [
            ("after=-1", "after"),
            ("after=x", "after"),
            ("after=1&after=2", "after"),
            ("limit=0", "limit"),
            ("limit=1001", "limit"),
            ("state=lost", "state"),
            ("type=nope", "type"),
        ] {
            let given = params(query);
            let errors =
                [given.after().err(), given.limit().err(), given.states().err(), given.filter().err()];
            let error = errors.into_iter().flatten().next().expect(query);
            assert_eq!(error.code, ErrorCode::BadRequest);
            assert!(error.message.contains(named), "{error}");
        }
        let error = params("agent=a.b").id::<AgentId>("agent").unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidId);
    }

    #[test]
    fn lists_are_read() {
        assert_eq!(params("state=running,queued").states().unwrap(), [State::Running, State::Queued]);
        assert!(params("type=agent.*&type=execution.recovered").filter().is_ok());
    }
}
