//! `GET /v1/usage`, in the seed's shape.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use rust_decimal::prelude::ToPrimitive;
use serde_json::json;

use super::report::{self, Month};
use crate::app::App;
use crate::http::{RestError, admit};
use crate::money::dollars;
use crate::tenants::monthly_limit;
use crate::viewer::Scope;

/// `{monthly_usage: {total_tokens, total_cost, request_count}, monthly_limit, plan}`; the cost in US dollars.
pub async fn usage(State(app): State<App>, headers: HeaderMap) -> Result<Response, RestError> {
    let (viewer, carried) = admit(&app, &headers).await?;
    let tenant = &viewer.require(Scope::Read)?.tenant;
    let month = Month::of(app.clock.now());
    let usage = report::months(&app, &[tenant.id], month).await?.remove(&tenant.id).unwrap_or_default();
    let sum = usage.sum();
    let body = json!({
        "monthly_usage": {
            "total_tokens": usage.used,
            "total_cost": dollars(sum.usage.cost_nano_usd).to_f64(),
            "request_count": sum.requests,
        },
        "monthly_limit": monthly_limit(&app, tenant)?,
        "plan": tenant.plan,
    });
    Ok((carried, Json(body)).into_response())
}
