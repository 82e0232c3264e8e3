//! Tenants, keys, agents, runs with their journal, the ledger and the quotas.
//!
//! Written as SQL: the partitions, generated columns and partial indexes that it needs read best so,
//! and the two databases differ only in the names of types.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::ConnectionTrait;

use crate::{for_backend, partitions};

#[derive(DeriveMigrationName)]
pub struct Migration;

/// In PostgreSQL's words; see [`for_backend`].
const TABLES: &[&str] = &[
    "CREATE TABLE tenants (
        id uuid NOT NULL PRIMARY KEY,
        name text NOT NULL,
        email text NOT NULL,
        plan text NOT NULL,
        monthly_token_limit bigint,
        status text NOT NULL,
        isolation text NOT NULL,
        is_active boolean NOT NULL GENERATED ALWAYS AS (status = 'active') STORED,
        webhook_secret text NOT NULL,
        previous_webhook_secret text,
        previous_webhook_secret_until timestamptz,
        created_at timestamptz NOT NULL,
        updated_at timestamptz NOT NULL
    )",
    "CREATE TABLE api_keys (
        id uuid NOT NULL PRIMARY KEY,
        tenant_id uuid NOT NULL REFERENCES tenants (id),
        name text NOT NULL,
        prefix text NOT NULL,
        key_hash text NOT NULL UNIQUE,
        previous_key_hash text UNIQUE,
        previous_key_until timestamptz,
        scopes text NOT NULL,
        is_active boolean NOT NULL,
        expires_at timestamptz,
        revoked_at timestamptz,
        last_used_at timestamptz,
        monthly_token_limit bigint,
        created_at timestamptz NOT NULL
    )",
    "CREATE INDEX api_keys_tenant ON api_keys (tenant_id, id)",
    "CREATE TABLE admin_keys (
        id uuid NOT NULL PRIMARY KEY,
        key_hash text NOT NULL UNIQUE,
        created_at timestamptz NOT NULL
    )",
    "CREATE TABLE agents (
        id uuid NOT NULL PRIMARY KEY,
        tenant_id uuid NOT NULL REFERENCES tenants (id),
        name text NOT NULL,
        description text,
        definition json NOT NULL,
        published_version_id uuid,
        created_at timestamptz NOT NULL,
        updated_at timestamptz NOT NULL,
        deleted_at timestamptz
    )",
    "CREATE INDEX agents_tenant ON agents (tenant_id, id)",
    "CREATE TABLE agent_versions (
        id uuid NOT NULL PRIMARY KEY,
        tenant_id uuid NOT NULL REFERENCES tenants (id),
        agent_id uuid NOT NULL REFERENCES agents (id),
        version integer NOT NULL,
        name text NOT NULL,
        definition json NOT NULL,
        closure json NOT NULL,
        published_at timestamptz NOT NULL,
        UNIQUE (agent_id, version)
    )",
    "CREATE TABLE conversations (
        id uuid NOT NULL PRIMARY KEY,
        tenant_id uuid NOT NULL REFERENCES tenants (id),
        created_at timestamptz NOT NULL,
        updated_at timestamptz NOT NULL,
        deleted_at timestamptz
    )",
    "CREATE INDEX conversations_tenant ON conversations (tenant_id, id)",
    "CREATE TABLE runs (
        id uuid NOT NULL PRIMARY KEY,
        tenant_id uuid NOT NULL REFERENCES tenants (id),
        api_key_id uuid REFERENCES api_keys (id),
        agent_id uuid NOT NULL REFERENCES agents (id),
        agent_version_id uuid REFERENCES agent_versions (id),
        current_agent_id uuid NOT NULL,
        conversation_id uuid REFERENCES conversations (id),
        status text NOT NULL,
        input text NOT NULL,
        output text,
        error_code text,
        error_message text,
        turns integer NOT NULL,
        max_tokens bigint,
        timeout_seconds integer NOT NULL,
        spec json NOT NULL,
        idempotency_key text,
        idempotency_hash text,
        pool text NOT NULL,
        vtime double precision,
        fence bigint NOT NULL,
        lease_until timestamptz,
        claimed_at timestamptz,
        held_ms bigint NOT NULL,
        next_sequence bigint NOT NULL,
        created_at timestamptz NOT NULL,
        started_at timestamptz,
        finished_at timestamptz
    )",
    "CREATE INDEX runs_tenant ON runs (tenant_id, id)",
    "CREATE INDEX runs_tenant_agent ON runs (tenant_id, agent_id, id)",
    "CREATE INDEX runs_conversation ON runs (conversation_id, id) WHERE conversation_id IS NOT NULL",
    "CREATE UNIQUE INDEX runs_idempotency ON runs (tenant_id, idempotency_key) WHERE idempotency_key IS NOT NULL",
    // Not partial: a status that comes as a parameter proves no predicate.
    "CREATE INDEX runs_queue ON runs (tenant_id, pool, status, vtime)",
    "CREATE INDEX runs_leased ON runs (status, lease_until)",
    "CREATE TABLE run_items (
        run_id uuid NOT NULL,
        sequence bigint NOT NULL,
        run_created_at timestamptz NOT NULL,
        tenant_id uuid NOT NULL,
        kind text NOT NULL,
        agent_name text NOT NULL,
        turn integer,
        body json NOT NULL,
        created_at timestamptz NOT NULL,
        PRIMARY KEY (run_id, sequence, run_created_at)
    ) PARTITION BY RANGE (run_created_at)",
    "CREATE TABLE tenant_queues (
        tenant_id uuid NOT NULL REFERENCES tenants (id),
        pool text NOT NULL,
        running integer NOT NULL,
        max_running integer NOT NULL,
        last_vtime double precision NOT NULL,
        next_vtime double precision,
        claimed_vtime double precision NOT NULL,
        PRIMARY KEY (tenant_id, pool)
    )",
    "CREATE INDEX tenant_queues_next ON tenant_queues (pool, next_vtime) WHERE next_vtime IS NOT NULL",
    "CREATE INDEX tenant_queues_claimed ON tenant_queues (pool, claimed_vtime)",
    "CREATE TABLE models (
        name text NOT NULL PRIMARY KEY,
        provider text NOT NULL,
        upstream text NOT NULL,
        context_window integer NOT NULL,
        max_output_tokens integer NOT NULL,
        is_active boolean NOT NULL
    )",
    "CREATE TABLE prices (
        id uuid NOT NULL PRIMARY KEY,
        model text NOT NULL REFERENCES models (name),
        input bigint NOT NULL,
        cache_read bigint NOT NULL,
        cache_write bigint NOT NULL,
        output bigint NOT NULL,
        valid_from timestamptz NOT NULL
    )",
    "CREATE INDEX prices_model ON prices (model, valid_from)",
    "CREATE TABLE plans (
        id uuid NOT NULL PRIMARY KEY,
        name text NOT NULL,
        version integer NOT NULL,
        base_price bigint NOT NULL,
        included_tokens bigint NOT NULL,
        overage_per_million bigint,
        monthly_token_limit bigint NOT NULL,
        max_concurrent_runs integer NOT NULL,
        requests_per_minute integer NOT NULL,
        weight integer NOT NULL,
        isolation text NOT NULL,
        valid_from timestamptz NOT NULL,
        UNIQUE (name, version)
    )",
    "CREATE TABLE usage_records (
        call_id uuid NOT NULL,
        created_at timestamptz NOT NULL,
        tenant_id uuid NOT NULL,
        run_id uuid,
        turn integer,
        attempt integer NOT NULL,
        agent_id uuid,
        agent_version integer,
        agent_path text,
        key_id uuid,
        model text NOT NULL,
        price_id uuid NOT NULL,
        input_tokens bigint NOT NULL,
        cache_read_tokens bigint NOT NULL,
        cache_write_tokens bigint NOT NULL,
        output_tokens bigint NOT NULL,
        reasoning_tokens bigint NOT NULL,
        total_tokens bigint NOT NULL GENERATED ALWAYS AS
            (input_tokens + cache_read_tokens + cache_write_tokens + output_tokens) STORED,
        cost bigint NOT NULL,
        cost_usd numeric NOT NULL GENERATED ALWAYS AS (cost / 1000000000.0) STORED,
        estimated boolean NOT NULL,
        PRIMARY KEY (call_id, created_at)
    ) PARTITION BY RANGE (created_at)",
    "CREATE INDEX usage_records_run ON usage_records (run_id) WHERE run_id IS NOT NULL",
    "CREATE INDEX usage_records_tenant ON usage_records (tenant_id, created_at)",
    "CREATE TABLE usage_totals (
        tenant_id uuid NOT NULL,
        day text NOT NULL,
        agent_id uuid NOT NULL,
        agent_version integer NOT NULL,
        model text NOT NULL,
        key_id uuid NOT NULL,
        requests bigint NOT NULL,
        estimated_requests bigint NOT NULL,
        input_tokens bigint NOT NULL,
        cache_read_tokens bigint NOT NULL,
        cache_write_tokens bigint NOT NULL,
        output_tokens bigint NOT NULL,
        reasoning_tokens bigint NOT NULL,
        cost bigint NOT NULL,
        PRIMARY KEY (tenant_id, day, agent_id, agent_version, model, key_id)
    )",
    "CREATE TABLE quota_counters (
        tenant_id uuid NOT NULL,
        scope text NOT NULL,
        scope_id uuid NOT NULL,
        period text NOT NULL,
        used bigint NOT NULL,
        reserved bigint NOT NULL,
        PRIMARY KEY (tenant_id, scope, scope_id, period)
    )",
    "CREATE TABLE quota_reservations (
        call_id uuid NOT NULL PRIMARY KEY,
        tenant_id uuid NOT NULL,
        run_id uuid,
        run_limited boolean NOT NULL,
        turn integer,
        attempt integer NOT NULL,
        agent_id uuid,
        agent_version integer,
        agent_path text,
        key_id uuid,
        model text NOT NULL,
        price_id uuid NOT NULL,
        period text NOT NULL,
        tokens bigint NOT NULL,
        input_tokens bigint NOT NULL,
        output_tokens bigint NOT NULL,
        sent boolean NOT NULL,
        created_at timestamptz NOT NULL,
        expires_at timestamptz NOT NULL
    )",
    "CREATE INDEX quota_reservations_expires ON quota_reservations (expires_at)",
];

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        for statement in TABLES {
            db.execute_unprepared(&for_backend(statement, db.get_database_backend())).await?;
        }
        partitions::ensure(db, 2).await
    }
}
