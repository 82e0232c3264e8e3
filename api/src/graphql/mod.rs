//! GraphQL: the roots merged, the limits, the loaders, and the doors it comes in by.

mod accept;
mod graphiql;
pub mod limits;
pub mod loaders;
mod node;
mod operation;
pub mod page;
pub mod post;
pub mod scalars;
mod sse;
mod tokens;
mod ws;

use async_graphql::{Context, MergedObject, MergedSubscription, Result};

use self::limits::Limits;
use self::node::NodeQuery;
use crate::agents::definition_graphql::AgentDefinition;
use crate::agents::graphql::{AgentMutation, AgentQuery};
use crate::app::App;
use crate::billing::graphql::BillingQuery;
use crate::cluster::graphql::ClusterSubscription;
use crate::config::GraphqlConfig;
use crate::conversations::graphql::{ConversationMutation, ConversationQuery};
use crate::keys::graphql::{KeyMutation, KeyQuery};
use crate::models::graphql::ModelQuery;
use crate::runs::graphql::{RunMutation, RunQuery, RunSubscription};
use crate::runtime::graphql::RuntimeMutation;
use crate::tenants::graphql::{TenantMutation, TenantQuery};
use crate::usage::graphql::{UsageQuery, UsageSubscription};
use crate::viewer::Viewer;

/// The schema.
pub type Schema = async_graphql::Schema<Query, Mutation, Subscription>;

/// Everything that is read.
#[derive(MergedObject, Default)]
pub struct Query(
    NodeQuery,
    KeyQuery,
    TenantQuery,
    AgentQuery,
    RunQuery,
    ConversationQuery,
    UsageQuery,
    BillingQuery,
    ModelQuery,
);

/// Everything that is changed.
#[derive(MergedObject, Default)]
pub struct Mutation(TenantMutation, KeyMutation, AgentMutation, RunMutation, ConversationMutation, RuntimeMutation);

/// Everything that is told.
#[derive(MergedSubscription, Default)]
pub struct Subscription(RunSubscription, UsageSubscription, ClusterSubscription);

/// The schema, with its limits.
pub fn schema(config: &GraphqlConfig) -> Schema {
    Schema::build(Query::default(), Mutation::default(), Subscription::default())
        .register_output_type::<AgentDefinition>()
        .extension(Limits::from(config))
        .disable_suggestions()
        .finish()
}

/// The application, in a resolver.
pub fn app<'a>(ctx: &Context<'a>) -> Result<&'a App> {
    ctx.data::<App>()
}

/// The caller, in a resolver.
pub fn viewer<'a>(ctx: &Context<'a>) -> Result<&'a Viewer> {
    ctx.data::<Viewer>()
}
