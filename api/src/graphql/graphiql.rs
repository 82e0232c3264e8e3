//! GraphiQL, for trying the API in a browser. Its assets come from its usual CDN.

use async_graphql::http::GraphiQLSource;
use axum::response::Html;

use super::post::ENDPOINT;

/// `GET /graphiql`. The page is public and holds no data: a key goes into its header editor, as
/// `{"X-API-Key": "clo_…"}`, and is sent with queries and in `connection_init` for subscriptions.
pub async fn page() -> Html<String> {
    let source = GraphiQLSource::build().title("Cloister GraphiQL").endpoint(ENDPOINT).subscription_endpoint(ENDPOINT);
    Html(source.finish())
}
