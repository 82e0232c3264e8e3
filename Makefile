# What a person types. Everything else is cargo.

.PHONY: run run-distributed demo-kubernetes test differential test-cluster bench bench-operator cluster cluster-down setup build

# Try it: SQLite, a demo tenant with a published agent, and two commands to copy.
run:
	@scripts/setup build
	cargo run --package cloister-api --bin cloister -- dev

# Try many: PostgreSQL, Redis, two replicas and two workers on this machine, and three commands to copy.
run-distributed:
	@scripts/run-distributed

# A real Kubernetes cluster of one node on this machine, for root; the last line it prints is the one to copy.
cluster:
	@scripts/setup cluster
	@scripts/cluster up

cluster-down:
	@scripts/cluster down

# Try Kubernetes: a real cluster on this machine, the charts, an enterprise tenant and its run, each command shown.
# Needs root. `make cluster-down` removes all of it.
demo-kubernetes:
	@scripts/demo-kubernetes

# Everything that must hold: format, lints, every test; those on a cluster where this machine can have one.
test: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --workspace --test cluster -- -D warnings
	cargo build --workspace
	cargo test --workspace
	@if scripts/cluster able; then $(MAKE) test-cluster; fi

# Cloister beside the OpenAI Agents SDK with random agents: FIRST=1000 SEEDS=200 are the seeds from 1000 to 1199.
differential: setup
	cargo build --workspace
	FIRST=$(FIRST) SEEDS=$(SEEDS) cargo test --workspace --test differential -- seeds::

# What needs a Kubernetes cluster, for root; the first time builds its programs, in about fifteen minutes. Each line has
# clusters of its own, which go before the next line's come.
test-cluster:
	@scripts/setup build test cluster
	cargo build --workspace
	scripts/cluster build
	cargo test --workspace --test cluster -- smoke:: charts::
	cargo test --workspace --test cluster -- doors:: operator::
	cargo test --workspace --test cluster -- installed::

# How fast it is, beside its peers: half an hour on a quiet machine, into docs/benchmarks.md. QUICK=1 takes minutes.
bench:
	@scripts/bench all $(if $(QUICK),--quick)

# The operator beside one written with kopf, on a simulated cluster of a thousand tenants; for root. QUICK=1: a hundred.
bench-operator:
	@scripts/bench operator $(if $(QUICK),--quick)

# What the tests need: PostgreSQL's server (or CLOISTER_TEST_POSTGRES_URL), Node.js and the npm clients, Python.
setup:
	@scripts/setup build test

build:
	cargo build --workspace
