//! Where probes don't go.

use super::*;

fn assert_refused(found: &Found, what: &str) {
    assert!(matches!(found, Found::Skipped(why) if why.starts_with("refused: ")), "{what}: {found:?}");
}

#[tokio::test]
async fn literal_addresses_are_checked_in_every_spelling() {
    let server = Server::answering(|_| server::plain("200 OK", "")).await;
    let port = server.port();
    let strict = prober_allowing(&[]);
    for host in [
        "127.0.0.1",
        "0x7f.1",
        "2130706433",
        "0177.0.0.1",
        "127.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "[64:ff9b::a9fe:a9fe]",
        "[2002:7f00:1::]",
        "169.254.169.254",
        "[fe80::1]",
        "[fd00:ec2::254]",
        "0.0.0.0",
    ] {
        assert_refused(&probe(&strict, "http", &format!("http://{host}:{port}/")).await, host);
    }
    // Other schemes don't read addresses: what the resolver makes of such a name is checked instead.
    for host in ["127.0.0.1", "0x7f.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "localhost"] {
        for (kind, url) in
            [("tcp", format!("tcp://{host}:{port}")), ("grpc", format!("grpc://{host}:{port}"))]
        {
            let found = probe(&strict, kind, &url).await;
            assert!(
                matches!(found, Found::Skipped(_)) || cause(&found) == Some(Cause::Dns),
                "{url}: {found:?}"
            );
        }
    }
    assert_eq!(server.connections(), 0, "nobody was connected to");
    for url in
        ["http://127.0.0.1%00/", "http://[fe80::1%25lo]/", "http://user@127.0.0.1/", "tcp://x:y@127.0.0.1:80"]
    {
        let kind = url.split(':').next().unwrap();
        let found = probe(&prober(), kind, url).await;
        assert!(matches!(found, Found::Skipped(_)), "{url}: {found:?}");
    }
    // Allowed ranges are for plain addresses of theirs only.
    assert_eq!(probe(&prober(), "http", &format!("http://127.0.0.1:{port}/")).await, Found::Good);
    assert_refused(&probe(&prober(), "http", &format!("http://[::ffff:127.0.0.1]:{port}/")).await, "mapped");
}

#[tokio::test]
async fn names_are_checked_by_what_they_resolve_to() {
    let server = Server::answering(|_| server::plain("200 OK", "")).await;
    let at = |address: &str| SocketAddr::new(address.parse().unwrap(), server.port());
    for address in ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"]
    {
        let prober = resolving(prober_allowing(&[]), &[&[at(address)]]);
        assert_refused(&probe(&prober, "http", "http://inside.test/").await, address);
    }
    assert_eq!(server.connections(), 0);
    // One good address among bad ones: only the good one is connected to.
    let mixed = [at("169.254.169.254"), at("::ffff:127.0.0.1"), at("127.0.0.1")];
    let prober = resolving(prober(), &[&mixed]);
    assert_eq!(probe(&prober, "http", "http://mixed.test/").await, Found::Good);
}

#[tokio::test]
async fn a_name_that_is_rebound_is_checked_again_at_every_connect() {
    let inside = Server::answering(|_| server::plain("200 OK", "")).await;
    let outside = Server::answering(|_| server::closing_after("200 OK")).await;
    // 127.0.0.1 plays the public address here, ::1 the private one.
    let script: [&[SocketAddr]; 2] = [
        &[SocketAddr::new("127.0.0.1".parse().unwrap(), outside.port())],
        &[SocketAddr::new("127.0.0.2".parse().unwrap(), inside.port())],
    ];
    let prober = resolving(prober_allowing(&["127.0.0.1/32"]), &script);
    let mut warm = Warm::default();
    let target = target("http", "http://rebinding.test/");
    assert_eq!(prober.probe(&target, &mut warm).await.0, Found::Good);
    assert_refused(&prober.probe(&target, &mut warm).await.0, "rebound");
    assert_eq!(inside.connections(), 0);
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let inside = Server::answering(|_| server::plain("200 OK", "")).await;
    let location = inside.url("/secret");
    let outside = Server::answering(move |_| {
        format!("HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n").into_bytes()
    })
    .await;
    for kind in ["http", "acp", "a2a", "mcp"] {
        let found = probe(&prober(), kind, &outside.url("/")).await;
        assert_eq!(cause(&found), Some(Cause::Status), "{kind}: {found:?}");
    }
    assert_eq!(inside.connections(), 0);
}

#[tokio::test]
async fn operators_may_mean_private_addresses() {
    let server = Server::answering(|_| server::plain("200 OK", "")).await;
    let strict = prober_allowing(&[]);
    let mut target = target("http", &server.url("/"));
    target.trust = Trust::Operator;
    assert_eq!(strict.probe(&target, &mut Warm::default()).await.0, Found::Good);
    // The cloud's metadata service is nobody's, in whatever spelling. Some are read by the resolver.
    let everywhere = prober_allowing(&["10.0.0.0/8", "fc00::/7"]);
    for (kind, schemes) in [("http", ["http", "https"]), ("tcp", ["tcp"; 2]), ("grpc", ["grpc", "grpcs"])] {
        for host in [
            "169.254.169.254",
            "0xa9fea9fe",
            "2852039166",
            "0251.0376.0251.0376",
            "169.254.43518",
            "[::ffff:169.254.169.254]",
            "[::a9fe:a9fe]",
            "[64:ff9b::169.254.169.254]",
            "[fd00:ec2::254]",
            "[fd00:ec2::23]",
            "[fd20:ce::254]",
            "[fd00:c1::a9fe:a9fe]",
        ] {
            for scheme in schemes {
                target.endpoint =
                    Endpoint { kind: kind.to_owned(), url: format!("{scheme}://{host}:8080/latest") };
                assert_refused(&probe_target(&everywhere, &target).await, &target.endpoint.url);
            }
        }
    }
}
