//! Who calls, and what they may do.

use std::sync::Arc;

use async_graphql::Enum;
use chrono::{DateTime, Utc};
use entity::{api_keys, plans, tenants};
use http::HeaderMap;
use uuid::Uuid;

use crate::app::App;
use crate::error::Error;
use crate::rate::Admission;

/// A right of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Enum)]
pub enum Scope {
    /// See agents, runs and usage.
    Read,
    /// Start runs, read runs and conversations.
    Run,
    /// Change agents and keys.
    Manage,
    /// See invoices.
    Billing,
}

impl Scope {
    /// All of them, in their order.
    pub const ALL: [Scope; 4] = [Scope::Read, Scope::Run, Scope::Manage, Scope::Billing];
    /// What a new key has unless said otherwise.
    pub const DEFAULT: [Scope; 2] = [Scope::Read, Scope::Run];

    fn name(self) -> &'static str {
        match self {
            Scope::Read => "read",
            Scope::Run => "run",
            Scope::Manage => "manage",
            Scope::Billing => "billing",
        }
    }

    /// As stored with a key.
    pub fn join(scopes: &[Scope]) -> String {
        Scope::ALL.into_iter().filter(|scope| scopes.contains(scope)).map(Scope::name).collect::<Vec<_>>().join(" ")
    }

    /// From what is stored with a key.
    pub fn split(stored: &str) -> Vec<Scope> {
        Scope::ALL.into_iter().filter(|scope| stored.split(' ').any(|name| name == scope.name())).collect()
    }
}

/// A caller that was let in.
#[derive(Clone, Debug)]
pub enum Viewer {
    /// By a tenant's key.
    Tenant(Arc<TenantViewer>),
    /// By the platform admin's key.
    PlatformAdmin,
}

/// A tenant's key, and what it opens.
#[derive(Clone, Debug)]
pub struct TenantViewer {
    /// The tenant as it was when the key was checked.
    pub tenant: tenants::Model,
    /// Its plan.
    pub plan: Arc<plans::Model>,
    /// The key.
    pub key: api_keys::Model,
    /// The key's rights.
    pub scopes: Vec<Scope>,
    /// When the secret that was used stops working.
    pub expires_at: Option<DateTime<Utc>>,
}

impl TenantViewer {
    /// The tenant's id.
    pub fn tenant_id(&self) -> Uuid {
        self.tenant.id
    }

    /// Whether the key has the right. RUN includes reading runs and conversations; whoever may only
    /// run need not see more.
    pub fn has(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope)
    }
}

impl Viewer {
    /// The caller's tenant, if its key has the right.
    pub fn require(&self, scope: Scope) -> Result<&TenantViewer, Error> {
        self.require_any(&[scope])
    }

    /// The caller's tenant, if its key has one of the rights.
    pub fn require_any(&self, scopes: &[Scope]) -> Result<&TenantViewer, Error> {
        let viewer = self.require_tenant()?;
        if scopes.iter().any(|scope| viewer.has(*scope)) {
            return Ok(viewer);
        }
        let names: Vec<String> = scopes.iter().map(|scope| scope.name().to_uppercase()).collect();
        Err(Error::Forbidden(format!("This key lacks the scope {}.", names.join(" or "))))
    }

    /// The caller's tenant.
    pub fn require_tenant(&self) -> Result<&TenantViewer, Error> {
        match self {
            Viewer::Tenant(viewer) => Ok(viewer),
            Viewer::PlatformAdmin => {
                Err(Error::Forbidden("The platform admin has no tenant: use one of the tenant's keys.".to_owned()))
            }
        }
    }

    /// Refuses everyone but the platform admin.
    pub fn require_admin(&self) -> Result<(), Error> {
        match self {
            Viewer::PlatformAdmin => Ok(()),
            Viewer::Tenant(_) => Err(Error::Forbidden("Only the platform admin may do this.".to_owned())),
        }
    }

    /// Whether the caller may see this of a tenant: its own key with the right, or the platform admin.
    pub fn may_see(&self, tenant_id: Uuid, scope: Scope) -> Result<(), Error> {
        match self {
            Viewer::PlatformAdmin => Ok(()),
            Viewer::Tenant(viewer) if viewer.tenant_id() == tenant_id => self.require(scope).map(|_| ()),
            Viewer::Tenant(_) => Err(Error::Forbidden("This is another tenant's.".to_owned())),
        }
    }

    /// When the caller's key stops working, if it does by itself.
    pub fn expires_at(&self) -> Option<DateTime<Utc>> {
        match self {
            Viewer::Tenant(viewer) => viewer.expires_at,
            Viewer::PlatformAdmin => None,
        }
    }
}

/// The key in a request's headers: `X-API-Key`, or `Authorization: Bearer`.
pub fn credential(headers: &HeaderMap) -> Option<&str> {
    if let Some(key) = headers.get("x-api-key") {
        return key.to_str().ok().map(str::trim);
    }
    let (scheme, token) = headers.get(http::header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

impl App {
    /// Lets a caller in, or says why not: 401 without a valid key, 403 for a suspended tenant.
    pub async fn authenticate(&self, credential: Option<&str>) -> Result<Viewer, Error> {
        let Some(key) = credential else {
            return Err(Error::Unauthenticated("Send a key as `X-API-Key` or `Authorization: Bearer`."));
        };
        if self.keys.is_admin(key) {
            return Ok(Viewer::PlatformAdmin);
        }
        Ok(Viewer::Tenant(crate::keys::verify(self, key).await?))
    }

    /// Takes one request of the caller's allowance. The platform admin has no limit.
    pub async fn admit(&self, viewer: &Viewer) -> Admission {
        match viewer {
            Viewer::Tenant(viewer) => {
                let per_minute = u32::try_from(viewer.plan.requests_per_minute).unwrap_or(1);
                self.rates.admit(&self.bus, viewer.tenant_id(), per_minute).await
            }
            Viewer::PlatformAdmin => Admission::UNLIMITED,
        }
    }

    /// Names a tenant whenever it, or a key of it, may have lost a right: whoever holds a connection open for it
    /// asks again then.
    pub fn authority_changes(&self) -> tokio::sync::broadcast::Receiver<Uuid> {
        self.keys.changes()
    }
}
