//! The catalogue: which models there are, who provides them, and what they cost.
//!
//! The configuration is its source; the database keeps a mirror for the ledger to refer to, with
//! prices versioned: a changed price is a new row, and what was charged keeps its own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use cloister_runtime::item::TokenUsage;
use entity::{Shared, models, prices};
use rust_decimal::Decimal;
use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::OnConflict;
use sea_orm::{ActiveModelTrait, ColumnTrait, ConnectionTrait, EntityTrait, IntoActiveModel, QueryFilter, QueryOrder};
use url::Url;
use uuid::Uuid;

use super::demo::DemoProvider;
use super::provider::{HttpProvider, HttpProviderConfig, Provider};
use crate::config::{Config, ModelConfig, PriceConfig, ProviderApi, ProviderConfig};
use crate::error::Error;
use crate::money;

const OPENAI: &str = "https://api.openai.com/v1";

/// A model that agents may use.
pub struct CatalogModel {
    /// Its row.
    pub model: models::Model,
    /// What it costs now.
    pub price: prices::Model,
    /// Who answers; none when the provider is not configured.
    pub provider: Option<Arc<Provider>>,
    /// How it is spoken to.
    pub api: ProviderApi,
    /// How often one call is tried.
    pub attempts: u32,
}

impl CatalogModel {
    /// Whether its provider runs tools of its own, such as `web_search`. Whether it knows a certain one, only it can tell.
    pub fn has_hosted_tools(&self) -> bool {
        self.api == ProviderApi::Responses && !matches!(self.provider.as_deref(), Some(Provider::Demo(_)))
    }
}

/// The models, by name.
pub struct Catalog {
    models: BTreeMap<String, Arc<CatalogModel>>,
}

impl Catalog {
    /// The model of this name.
    pub fn get(&self, name: &str) -> Option<Arc<CatalogModel>> {
        self.models.get(name).cloned()
    }

    /// All of them, by name.
    pub fn all(&self) -> impl Iterator<Item = &Arc<CatalogModel>> {
        self.models.values()
    }

    /// Their names, for people.
    pub fn names(&self) -> String {
        self.models.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
    }
}

/// Nano-USD for `usage` at `price`: the buckets' exact sum, rounded half to even once.
pub fn cost(price: &prices::Model, usage: &TokenUsage) -> i64 {
    let part = |tokens: i64, per_million: i64| Decimal::from(tokens) * Decimal::from(per_million);
    let sum = part(usage.input_tokens, price.input)
        + part(usage.cache_read_tokens, price.cache_read)
        + part(usage.cache_write_tokens, price.cache_write)
        + part(usage.output_tokens, price.output);
    i64::try_from((sum / Decimal::from(1_000_000)).round()).unwrap_or(i64::MAX)
}

/// Mirrors the configured models and prices in the database, and connects them to their providers.
pub async fn sync(db: &impl ConnectionTrait, config: &Config, now: DateTime<Utc>) -> Result<Catalog, Error> {
    let mut wanted: BTreeMap<String, ModelConfig> =
        built_in().into_iter().map(|model| (model.name.clone(), model)).collect();
    wanted.extend(config.models.iter().map(|model| (model.name.clone(), model.clone())));

    let providers = providers(config)?;
    let mut models = BTreeMap::new();
    for (name, wanted) in &wanted {
        let model = models::Model {
            name: name.clone(),
            provider: wanted.provider.clone(),
            upstream: wanted.upstream.clone().unwrap_or_else(|| name.clone()),
            context_window: wanted.context_window,
            max_output_tokens: wanted.max_output_tokens,
            is_active: true,
        };
        let columns = [
            models::Column::Provider,
            models::Column::Upstream,
            models::Column::ContextWindow,
            models::Column::MaxOutputTokens,
            models::Column::IsActive,
        ];
        models::Entity::insert(model.clone().into_active_model().reset_all())
            .on_conflict(OnConflict::column(models::Column::Name).update_columns(columns).to_owned())
            .exec_without_returning(db)
            .await?;
        let price = sync_price(db, name, &wanted.price, now).await?;
        let configured = config.providers.get(&wanted.provider).cloned().unwrap_or_default();
        let model = CatalogModel {
            model,
            price,
            provider: providers.get(&wanted.provider).cloned(),
            api: wanted.api.unwrap_or(configured.api),
            attempts: configured.attempts,
        };
        models.insert(name.clone(), Arc::new(model));
    }
    models::Entity::update_many()
        .set(models::ActiveModel { is_active: Set(false), ..Default::default() })
        .filter(models::Column::Name.is_not_in(wanted.keys()))
        .exec(db)
        .await?;
    Ok(Catalog { models })
}

async fn sync_price(
    db: &impl ConnectionTrait,
    model: &str,
    price: &PriceConfig,
    now: DateTime<Utc>,
) -> Result<prices::Model, Error> {
    let nano = |amount: Decimal| {
        money::nano(amount).ok_or_else(|| Error::internal(format!("the price of the model {model} is too large")))
    };
    let wanted = prices::Model {
        id: Uuid::now_v7(),
        model: model.to_owned(),
        input: nano(price.input)?,
        cache_read: nano(price.cache_read.unwrap_or(price.input))?,
        cache_write: nano(price.cache_write.unwrap_or(price.input))?,
        output: nano(price.output)?,
        valid_from: now,
    };
    let newest = prices::Entity::all()
        .filter(prices::Column::Model.eq(model))
        .order_by_desc(prices::Column::ValidFrom)
        .order_by_desc(prices::Column::Id)
        .one(db)
        .await?;
    match newest {
        Some(newest)
            if newest == (prices::Model { id: newest.id, valid_from: newest.valid_from, ..wanted.clone() }) =>
        {
            Ok(newest)
        }
        _ => Ok(wanted.into_active_model().reset_all().insert(db).await?),
    }
}

fn providers(config: &Config) -> Result<BTreeMap<String, Arc<Provider>>, Error> {
    let mut providers = BTreeMap::new();
    providers.insert(
        "demo".to_owned(),
        Arc::new(Provider::Demo(DemoProvider::new(Duration::from_millis(config.demo.word_ms)))),
    );
    for (name, provider) in &config.providers {
        let http = HttpProvider::new(http_config(name, provider)?).map_err(Error::internal)?;
        providers.insert(name.clone(), Arc::new(Provider::Http(http)));
    }
    Ok(providers)
}

fn http_config(name: &str, provider: &ProviderConfig) -> Result<HttpProviderConfig, Error> {
    let base_url = match &provider.base_url {
        Some(url) => url.clone(),
        None => Url::parse(OPENAI).map_err(Error::internal)?,
    };
    Ok(HttpProviderConfig {
        name: name.to_owned(),
        base_url,
        api_key: provider.api_key.clone(),
        connect_timeout: Duration::from_millis(provider.connect_timeout_ms),
        first_byte_timeout: Duration::from_millis(provider.first_byte_timeout_ms),
        idle_timeout: Duration::from_millis(provider.idle_timeout_ms),
        max_response_bytes: provider.max_response_bytes,
        replay_reasoning: provider.replay_reasoning,
    })
}

/// OpenAI's models at OpenAI's prices, and the demo model.
fn built_in() -> Vec<ModelConfig> {
    // Name, context, most output; input, cache read and output in thousandths of a dollar for a million tokens.
    let openai: [(&str, i32, i32, i64, i64, i64); 6] = [
        ("gpt-4o", 128_000, 16_384, 2_500, 1_250, 10_000),
        ("gpt-4o-mini", 128_000, 16_384, 150, 75, 600),
        ("o3-mini", 200_000, 100_000, 1_100, 550, 4_400),
        ("gpt-4.1", 1_047_576, 32_768, 2_000, 500, 8_000),
        ("gpt-4.1-mini", 1_047_576, 32_768, 400, 100, 1_600),
        ("gpt-4.1-nano", 1_047_576, 32_768, 100, 25, 400),
    ];
    let milli = |amount: i64| Decimal::new(amount, 3);
    let model = |provider: &str, (name, context_window, max_output_tokens, input, cache_read, output)| ModelConfig {
        name: String::from(name),
        provider: provider.to_owned(),
        upstream: None,
        api: None,
        context_window,
        max_output_tokens,
        price: PriceConfig {
            input: milli(input),
            output: milli(output),
            cache_read: Some(milli(cache_read)),
            cache_write: None,
        },
    };
    let mut models: Vec<ModelConfig> = openai.into_iter().map(|row| model("openai", row)).collect();
    models.push(model("demo", ("demo", 128_000, 16_384, 150, 75, 600)));
    models
}
