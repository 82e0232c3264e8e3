//! What a tenant's pods reach: nothing that this policy doesn't name, in either direction.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::build_metadata;
use crate::settings::Settings;
use crate::wanted::{Addresses, Wanted};

/// IPv4 that no tenant reaches as "public" (IANA's special-purpose registry, RFC 6890 and its updates). Documentation
/// ranges are left out: they are nobody's, and tests stand in them for the public internet.
const NOT_PUBLIC_V4: [Ipv4Net; 12] = [
    // "This network": the host itself.
    v4([0, 0, 0, 0], 8),
    v4([10, 0, 0, 0], 8),
    // Shared by carriers for NAT; some clouds put their metadata here.
    v4([100, 64, 0, 0], 10),
    v4([127, 0, 0, 0], 8),
    // Azure's platform channel answers on this otherwise public address.
    v4([168, 63, 129, 16], 32),
    // Link-local, with the metadata of most clouds.
    v4([169, 254, 0, 0], 16),
    v4([172, 16, 0, 0], 12),
    // Protocol assignments; Oracle's metadata.
    v4([192, 0, 0, 0], 24),
    v4([192, 168, 0, 0], 16),
    // Benchmarking.
    v4([198, 18, 0, 0], 15),
    // Multicast.
    v4([224, 0, 0, 0], 4),
    // Reserved, and broadcast.
    v4([240, 0, 0, 0], 4),
];

/// The same of IPv6: what is local, and what carries an IPv4 address inside.
const NOT_PUBLIC_V6: [Ipv6Net; 8] = [
    v6([0, 0, 0, 0], 64),
    // NAT64, well-known and local.
    v6([0x64, 0xff9b, 0, 0], 96),
    v6([0x64, 0xff9b, 1, 0], 48),
    // Teredo and 6to4.
    v6([0x2001, 0, 0, 0], 32),
    v6([0x2002, 0, 0, 0], 16),
    // Unique local, with the metadata of some clouds; link-local; multicast.
    v6([0xfc00, 0, 0, 0], 7),
    v6([0xfe80, 0, 0, 0], 10),
    v6([0xff00, 0, 0, 0], 8),
];

/// Addresses on which clouds answer with a node's credentials: no opening reaches them.
const METADATA: [&str; 8] = [
    "169.254.0.0/16",
    "168.63.129.16/32",
    "100.100.100.200/32",
    "192.0.0.192/32",
    "fd00:ec2::254/128",
    "fd20:ce::254/128",
    "fe80::/10",
    "64:ff9b::/96",
];

const fn v4(octets: [u8; 4], prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]), prefix)
}

const fn v6(head: [u16; 4], prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(head[0], head[1], head[2], head[3], 0, 0, 0, 0), prefix)
}

/// Addresses and TCP ports that are reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    /// The addresses.
    pub cidr: IpNet,
    /// Those among them that are not.
    pub except: Vec<IpNet>,
    /// The ports.
    pub ports: Vec<u16>,
}

/// An opening without what the platform denies; none if nothing is left.
pub fn open(cidr: IpNet, ports: &[i32], settings: &Settings, addresses: &Addresses) -> Option<Opening> {
    let metadata = METADATA.iter().filter_map(|net| net.parse().ok());
    let except = except(cidr, metadata.chain(denied(settings, addresses)))?;
    let mut ports: Vec<u16> = ports.iter().filter_map(|port| u16::try_from(*port).ok()).collect();
    ports.sort_unstable();
    ports.dedup();
    Some(Opening { cidr, except, ports })
}

fn denied<'a>(settings: &'a Settings, addresses: &'a Addresses) -> impl Iterator<Item = IpNet> + use<'a> {
    settings.denied_cidrs.iter().chain(&addresses.api_server).copied()
}

/// Those of `nets` that lie within `cidr`, none within another, in order; none if one of them holds all of `cidr`.
fn except(cidr: IpNet, nets: impl Iterator<Item = IpNet>) -> Option<Vec<IpNet>> {
    // Neighbours are one net, which may hold what none of them does.
    let nets = IpNet::aggregate(&nets.map(|net| net.trunc()).collect());
    if nets.iter().any(|net| net.contains(&cidr)) {
        return None;
    }
    Some(nets.into_iter().filter(|net| cidr.contains(net)).collect())
}

/// The one policy of a tenant's namespace.
pub fn build_network_policy(wanted: &Wanted, settings: &Settings, addresses: &Addresses) -> NetworkPolicy {
    let mut egress = vec![build_dns(settings), build_api(settings)];
    egress.extend(build_public(settings, addresses));
    egress.extend(wanted.openings.iter().map(build_opening));
    NetworkPolicy {
        metadata: build_metadata(wanted),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(LabelSelector::default()),
            policy_types: Some(vec!["Ingress".to_owned(), "Egress".to_owned()]),
            ingress: None,
            egress: Some(egress),
        }),
    }
}

fn build_dns(settings: &Settings) -> NetworkPolicyEgressRule {
    let pods = NetworkPolicyPeer {
        namespace_selector: Some(build_match([("kubernetes.io/metadata.name".to_owned(), "kube-system".to_owned())])),
        pod_selector: Some(build_match([("k8s-app".to_owned(), "kube-dns".to_owned())])),
        ip_block: None,
    };
    let more = settings.dns_cidrs.iter().map(|cidr| build_block(cidr.trunc(), &[]));
    NetworkPolicyEgressRule {
        to: Some([pods].into_iter().chain(more).collect()),
        ports: Some(vec![build_port("UDP", 53), build_port("TCP", 53)]),
    }
}

/// The api's runtime port and no other.
fn build_api(settings: &Settings) -> NetworkPolicyEgressRule {
    let to = match &settings.api_namespace {
        Some(namespace) => vec![NetworkPolicyPeer {
            namespace_selector: Some(build_match([("kubernetes.io/metadata.name".to_owned(), namespace.clone())])),
            pod_selector: Some(build_match(settings.api_pods())),
            ip_block: None,
        }],
        None => settings.api_cidrs.iter().map(|cidr| build_block(cidr.trunc(), &[])).collect(),
    };
    NetworkPolicyEgressRule { to: Some(to), ports: Some(vec![build_port("TCP", settings.api_port)]) }
}

/// The public internet's HTTPS, a rule each for IPv4 and IPv6.
fn build_public(settings: &Settings, addresses: &Addresses) -> Vec<NetworkPolicyEgressRule> {
    let all = [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())];
    let not_public = NOT_PUBLIC_V4.map(IpNet::V4).into_iter().chain(NOT_PUBLIC_V6.map(IpNet::V6));
    let nets: Vec<IpNet> = not_public.chain(denied(settings, addresses)).collect();
    let openings = all.into_iter().filter_map(|cidr| {
        let except = except(cidr, nets.iter().copied())?;
        Some(Opening { cidr, except, ports: vec![443] })
    });
    openings.map(|opening| build_opening(&opening)).collect()
}

fn build_opening(opening: &Opening) -> NetworkPolicyEgressRule {
    NetworkPolicyEgressRule {
        to: Some(vec![build_block(opening.cidr, &opening.except)]),
        ports: Some(opening.ports.iter().map(|port| build_port("TCP", *port)).collect()),
    }
}

fn build_block(cidr: IpNet, except: &[IpNet]) -> NetworkPolicyPeer {
    let except = (!except.is_empty()).then(|| except.iter().map(ToString::to_string).collect());
    NetworkPolicyPeer { ip_block: Some(IPBlock { cidr: cidr.to_string(), except }), ..NetworkPolicyPeer::default() }
}

fn build_port(protocol: &str, port: u16) -> NetworkPolicyPort {
    NetworkPolicyPort { protocol: Some(protocol.to_owned()), port: Some(IntOrString::Int(port.into())), end_port: None }
}

fn build_match(labels: impl IntoIterator<Item = (String, String)>) -> LabelSelector {
    LabelSelector { match_labels: Some(labels.into_iter().collect()), match_expressions: None }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use serde_json::json;

    use super::*;
    use crate::wanted::samples::wanted;

    /// Whether the policy lets pods reach this address and TCP port by its blocks.
    fn reaches(policy: &NetworkPolicy, ip: &str, port: u16) -> bool {
        let ip: IpAddr = ip.parse().unwrap();
        let rules = policy.spec.as_ref().unwrap().egress.as_ref().unwrap();
        rules.iter().any(|rule| {
            let is_port = |entry: &NetworkPolicyPort| {
                entry.protocol.as_deref() == Some("TCP") && entry.port == Some(IntOrString::Int(port.into()))
            };
            let is_block = |peer: &NetworkPolicyPeer| {
                peer.ip_block.as_ref().is_some_and(|block| {
                    let holds = |net: &str| net.parse::<IpNet>().unwrap().contains(&ip);
                    holds(&block.cidr) && !block.except.iter().flatten().any(|net| holds(net))
                })
            };
            rule.ports.as_ref().unwrap().iter().any(is_port) && rule.to.as_ref().unwrap().iter().any(is_block)
        })
    }

    fn policy(spec: serde_json::Value, settings: &Settings) -> NetworkPolicy {
        let addresses = Addresses { api_server: vec!["198.51.100.7/32".parse().unwrap()] };
        let tenant = crate::wanted::samples::tenant(spec);
        let wanted = crate::wanted::validate(&tenant, None, settings, &addresses).unwrap();
        build_network_policy(&wanted, settings, &addresses)
    }

    #[test]
    fn public_https_is_reached_and_nothing_inside() {
        let policy = policy(json!({}), &Settings::sample());
        for ip in ["203.0.113.9", "8.8.8.8", "198.51.100.8", "2606:4700::1111"] {
            assert!(reaches(&policy, ip, 443), "{ip}");
            assert!(!reaches(&policy, ip, 80), "{ip}");
        }
        for ip in [
            "10.0.0.1",
            "172.16.0.1",
            "192.168.0.1",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "168.63.129.16",
            "224.0.0.1",
            "255.255.255.255",
            // The Kubernetes API on an address that looks public.
            "198.51.100.7",
            "::1",
            "::ffff:10.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "2002:a00:1::",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "ff02::1",
        ] {
            assert!(!reaches(&policy, ip, 443), "{ip}");
        }
    }

    #[test]
    fn openings_open_what_they_say() {
        let settings = Settings { denied_cidrs: vec!["198.51.100.128/25".parse().unwrap()], ..Settings::sample() };
        let egress = json!([{"cidr": "198.51.100.99/24", "ports": [8443, 5432, 8443]}]);
        let policy = policy(json!({"network": {"allowedEgress": egress}}), &settings);
        assert!(reaches(&policy, "198.51.100.20", 8443) && reaches(&policy, "198.51.100.20", 5432));
        assert!(!reaches(&policy, "198.51.100.7", 8443), "the Kubernetes API");
        assert!(!reaches(&policy, "198.51.100.200", 8443) && !reaches(&policy, "198.51.100.200", 443), "denied");
    }

    #[test]
    fn neighbours_that_are_denied_are_denied_together() {
        let net = |net: &str| net.parse::<IpNet>().unwrap();
        let api_server = ["198.51.100.4/32", "198.51.100.5/32", "198.51.100.6/32", "198.51.100.7/32"].map(net).to_vec();
        let addresses = Addresses { api_server };
        let denies_all = Settings { denied_cidrs: vec![net("0.0.0.0/1"), net("128.0.0.0/1")], ..Settings::sample() };
        for (cidr, settings, is_open) in [
            ("198.51.100.6/31", Settings::sample(), false),
            ("198.51.100.4/30", Settings::sample(), false),
            ("198.51.100.0/29", Settings::sample(), true),
            ("203.0.113.0/24", denies_all.clone(), false),
        ] {
            let opening = open(net(cidr), &[443], &settings, &addresses);
            assert_eq!(opening.is_some(), is_open, "{cidr}");
            assert!(opening.is_none_or(|opening| opening.except == [net("198.51.100.4/30")]), "{cidr}");
        }
        assert!(!reaches(&policy(json!({}), &denies_all), "203.0.113.9", 443));
    }

    #[test]
    fn an_api_outside_is_reached_on_its_port() {
        let settings = Settings {
            api_namespace: None,
            api_cidrs: vec!["192.0.2.7/32".parse().unwrap()],
            api_port: 9443,
            ..Settings::sample()
        };
        let policy = policy(json!({}), &settings);
        assert!(reaches(&policy, "192.0.2.7", 9443));
        assert!(!reaches(&policy, "192.0.2.7", 8081));
    }

    #[test]
    fn nothing_comes_in() {
        let spec = build_network_policy(&wanted(json!({})), &Settings::sample(), &Addresses::default()).spec.unwrap();
        assert!(spec.ingress.is_none());
        assert_eq!(spec.policy_types.unwrap(), ["Ingress", "Egress"]);
        assert_eq!(spec.pod_selector, Some(LabelSelector::default()));
    }

    /// The API server refuses an exception that is not within its block, and keeps their order.
    #[test]
    fn exceptions_lie_strictly_within() {
        let policy = policy(json!({}), &Settings::sample());
        let rules = policy.spec.unwrap().egress.unwrap();
        for block in rules.iter().flat_map(|rule| rule.to.iter().flatten()).filter_map(|peer| peer.ip_block.as_ref()) {
            let cidr: IpNet = block.cidr.parse().unwrap();
            for net in block.except.iter().flatten() {
                let net: IpNet = net.parse().unwrap();
                assert!(cidr.contains(&net) && cidr != net, "{net} in {cidr}");
            }
        }
    }
}
