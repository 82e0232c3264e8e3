# What a person types. Everything else is cargo.

.PHONY: run run-distributed test bench setup build

# Try it: SQLite, a demo tenant with a published agent, and two commands to copy.
run:
	@scripts/setup build
	cargo run --package cloister-api --bin cloister -- dev

# Try many: PostgreSQL, Redis, two replicas and two workers on this machine, and three commands to copy.
run-distributed:
	@scripts/run-distributed

# Everything that must hold: format, lints, every test.
test: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo build --workspace
	cargo test --workspace

# How fast it is, beside its peers: half an hour on a quiet machine, into docs/benchmarks.md. QUICK=1 takes minutes.
bench:
	@scripts/bench all $(if $(QUICK),--quick)

# What the tests need: PostgreSQL's server (or CLOISTER_TEST_POSTGRES_URL), Node.js and the npm clients.
setup:
	@scripts/setup build test

build:
	cargo build --workspace
