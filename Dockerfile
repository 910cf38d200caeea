# One image with all programs and nothing else: no shell, no package manager, no root.
#
#   docker build -t rollcall .                   the fleet (health-prober, dispatcher, watchdog, notifier, rollcall)
#   docker build -t rollcall-demo --target demo . the demo's agents, which need a shell to misbehave with

FROM rust:1.95-slim-bookworm AS build
# Builders without a cache of their own leave this stage behind as an image without a name: this says what it is.
LABEL stage=rollcall-build
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY shared shared
COPY services services
COPY clients clients
COPY tests tests
# Symbols stay, so that a backtrace has names; line tables would make the image several times as large.
ENV CARGO_PROFILE_RELEASE_STRIP=debuginfo
RUN cargo build --release --locked
# The root of the image: the programs, the C library they were linked with, whom to trust, who we are.
RUN mkdir -p /image/usr/local/bin /image/etc/ssl/certs /image/tmp \
    && chmod 1777 /image/tmp \
    && for program in health-prober dispatcher watchdog notifier rollcall; do \
         install -m 755 "target/release/$program" /image/usr/local/bin/ || exit 1; \
       done \
    && ldd /image/usr/local/bin/* | grep -o '/lib[^ ]*' | sort -u | xargs cp --dereference --parents --target-directory /image \
    && cp --dereference /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ \
    && echo 'hosts: files dns' > /image/etc/nsswitch.conf \
    && echo 'rollcall:x:10001:10001:rollcall:/:/nonexistent' > /image/etc/passwd \
    && echo 'rollcall:x:10001:' > /image/etc/group

FROM debian:bookworm-slim AS demo
COPY --from=build /image/usr/local/bin/rollcall /usr/local/bin/
COPY scripts/demo /usr/local/lib/rollcall-demo
USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["/usr/local/lib/rollcall-demo/container"]

FROM scratch AS fleet
COPY --from=build /image /
ENV PATH=/usr/local/bin SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
USER 10001:10001
WORKDIR /tmp
CMD ["rollcall", "--help"]
