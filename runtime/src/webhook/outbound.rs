//! The connections that tenants' URLs are reached over.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect;
use url::Url;

use super::{AddressPolicy, UrlError, check_address, check_url};

/// HTTP clients that keep out of our own network: no redirects, no proxies, and no address that was not checked.
/// Clones share their connections.
#[derive(Clone, Debug)]
pub struct Outbound {
    policy: Arc<AddressPolicy>,
    /// Connects to public addresses only.
    guarded: reqwest::Client,
    /// Connects to public addresses and the networks that are allowed on a port: one for each such port.
    opened: HashMap<u16, reqwest::Client>,
    /// Connects anywhere: for the hosts that the operator allows.
    trusted: reqwest::Client,
}

impl Outbound {
    /// Connections under a policy.
    ///
    /// # Errors
    /// If TLS can't be set up.
    ///
    /// # Panics
    /// Unless the process has installed a default crypto provider for rustls (reqwest's rule).
    pub fn new(policy: AddressPolicy) -> Result<Self, reqwest::Error> {
        let builder = || {
            reqwest::Client::builder()
                .user_agent(concat!("cloister/", env!("CARGO_PKG_VERSION")))
                .redirect(redirect::Policy::none())
                .no_proxy()
                .tcp_nodelay(true)
        };
        let mut by_port: HashMap<u16, Vec<IpNet>> = HashMap::new();
        for allowed in &policy.allowed_nets {
            by_port.entry(allowed.port).or_default().push(allowed.net);
        }
        let open = |(port, nets)| Ok((port, builder().dns_resolver(CheckedResolver { nets }).build()?));
        Ok(Self {
            policy: Arc::new(policy),
            guarded: builder().dns_resolver(CheckedResolver { nets: Vec::new() }).build()?,
            opened: by_port.into_iter().map(open).collect::<Result<_, reqwest::Error>>()?,
            trusted: builder().build()?,
        })
    }

    /// The client that may reach a URL, and the URL as it is to be called.
    ///
    /// # Errors
    /// What keeps it from being called.
    pub fn to(&self, url: &str) -> Result<(&reqwest::Client, Url), UrlError> {
        let url = check_url(url, &self.policy)?;
        let opened = url.port_or_known_default().and_then(|port| self.opened.get(&port));
        let client = if self.policy.allows(&url) { &self.trusted } else { opened.unwrap_or(&self.guarded) };
        Ok((client, url))
    }
}

/// Resolves a name once and hands the connector only what was checked, so that a name that changes its address between
/// check and connect gains nothing.
#[derive(Debug)]
pub(super) struct CheckedResolver {
    /// Networks that a name may lead to beside the public internet.
    pub(super) nets: Vec<IpNet>,
}

impl Resolve for CheckedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let nets = self.nets.clone();
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            // One bad address condemns the name: it has no business mixing public and private ones.
            for address in &found {
                check_address(address.ip(), &nets)?;
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}
