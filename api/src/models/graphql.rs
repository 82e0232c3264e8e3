//! `Model` and `Price`.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use async_graphql::{Context, Object, Result};
use chrono::{DateTime, Utc};
use entity::{models, prices};
use rust_decimal::Decimal;

use crate::error::Error;
use crate::graphql::app;
use crate::graphql::loaders::{FormerModel, load};
use crate::money::dollars;

/// A model that agents may use.
#[derive(Clone)]
pub struct Model {
    model: models::Model,
    price: prices::Model,
}

impl Model {
    /// The model of this name, also when it is no longer configured.
    pub async fn named(ctx: &Context<'_>, name: &str) -> Result<Self> {
        if let Some(known) = app(ctx)?.catalog.get(name) {
            return Ok(Self { model: known.model.clone(), price: known.price.clone() });
        }
        let former = load(ctx, FormerModel(name.to_owned())).await?;
        let (model, price) = former.ok_or_else(|| Error::internal(format!("no model is named {name:?}")))?;
        Ok(Self { model, price })
    }
}

#[Object]
impl Model {
    async fn name(&self) -> &str {
        &self.model.name
    }

    async fn provider(&self) -> &str {
        &self.model.provider
    }

    /// Tokens of input and output together.
    async fn context_window(&self) -> i32 {
        self.model.context_window
    }

    /// Tokens of a response.
    async fn max_output_tokens(&self) -> i32 {
        self.model.max_output_tokens
    }

    async fn price(&self) -> Price<'_> {
        Price(&self.price)
    }
}

/// US dollars for a million tokens.
pub struct Price<'a>(&'a prices::Model);

#[Object]
impl Price<'_> {
    async fn input(&self) -> Decimal {
        dollars(self.0.input)
    }

    async fn output(&self) -> Decimal {
        dollars(self.0.output)
    }

    async fn cache_read(&self) -> Decimal {
        dollars(self.0.cache_read)
    }

    async fn cache_write(&self) -> Decimal {
        dollars(self.0.cache_write)
    }

    async fn valid_from(&self) -> DateTime<Utc> {
        self.0.valid_from
    }
}

#[derive(Default)]
pub struct ModelQuery;

#[Object]
impl ModelQuery {
    /// The models that agents may use.
    async fn models(&self, ctx: &Context<'_>) -> Result<Vec<Model>> {
        let models = app(ctx)?.catalog.all();
        Ok(models.map(|known| Model { model: known.model.clone(), price: known.price.clone() }).collect())
    }
}
