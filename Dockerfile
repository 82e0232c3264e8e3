# Three images over one base: `--target api`, `operator` and `runtime`. One each, so that a tenant's pod holds its worker
# and no program that knows a database, and so that a new worker is rolled out without touching the api.
#
#     docker build --target api -t cloister-api .
#
# Programs that are built already take the place of the stage `programs` (the tests do so): a folder with `cloister`,
# `cloister-operator`, `cloister-runtime` and `ca-certificates.crt`, built for the base's C library or an older one.
#
#     buildah build --build-context programs=FOLDER --target api -t cloister-api .

ARG RUST=rust:1.94-slim-bookworm
ARG BASE=debian:bookworm-slim

FROM ${RUST} AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --locked --release --package cloister-api --package cloister-operator --package cloister-runtime --bins \
    && mkdir /programs \
    && cp target/release/cloister target/release/cloister-operator target/release/cloister-runtime \
        /etc/ssl/certs/ca-certificates.crt /programs/

FROM scratch AS programs
COPY --from=build /programs/ /

# Nothing is run in the base, so nothing is fetched. The programs write nowhere but where the chart mounts a volume.
FROM ${BASE} AS base
COPY --from=programs --chmod=0644 /ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
# A number, so that the kubelet sees that it isn't root.
USER 65532:65532
WORKDIR /
LABEL org.opencontainers.image.licenses="Apache-2.0"

# checkov:skip=CKV_DOCKER_7: both names have a tag, in the arguments above.
# checkov:skip=CKV_DOCKER_2: Kubernetes asks /healthz and /readyz; a HEALTHCHECK would need a client in the images.

FROM base AS api
LABEL org.opencontainers.image.title="Cloister: the api"
COPY --from=programs --chmod=0755 /cloister /usr/local/bin/cloister
EXPOSE 8080 8081
ENTRYPOINT ["/usr/local/bin/cloister"]
CMD ["serve"]

FROM base AS operator
LABEL org.opencontainers.image.title="Cloister: the operator"
COPY --from=programs --chmod=0755 /cloister-operator /usr/local/bin/cloister-operator
EXPOSE 8083
ENTRYPOINT ["/usr/local/bin/cloister-operator"]
CMD ["run"]

FROM base AS runtime
LABEL org.opencontainers.image.title="Cloister: a tenant's worker"
COPY --from=programs --chmod=0755 /cloister-runtime /usr/local/bin/cloister-runtime
EXPOSE 8082
ENTRYPOINT ["/usr/local/bin/cloister-runtime"]
