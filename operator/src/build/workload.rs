//! The tenant's workers: one Deployment, as confined as a pod can be, and its disruption budget.

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment};
use k8s_openapi::api::core::v1::{
    Capabilities, Container, ContainerPort, EnvVar, HTTPGetAction, PodSecurityContext, PodSpec, PodTemplateSpec, Probe,
    ResourceRequirements, SeccompProfile, SecretVolumeSource, SecurityContext, Toleration, TopologySpreadConstraint,
    Volume, VolumeMount,
};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::ObjectMeta;

use super::access::TOKEN_KEY;
use super::limits::build_amount;
use super::network::Opening;
use super::{NAME, build_labels, build_metadata, build_selector};
use crate::settings::Settings;
use crate::wanted::Wanted;
use crds::runtime::{TaintEffect, TolerationOperator};

const TOKEN_DIRECTORY: &str = "/var/run/cloister";
const PORT: i32 = 8082;
const PORT_NAME: &str = "health";
/// The user of the images: nobody in particular.
const USER: i64 = 65_532;
/// Seconds between a worker's own end and the kubelet's.
const SHUTDOWN_MARGIN: i64 = 10;

/// The workers.
pub fn build_deployment(wanted: &Wanted, settings: &Settings, replicas: i32) -> Deployment {
    let selector = build_selector(&wanted.tenant);
    Deployment {
        metadata: build_metadata(wanted),
        spec: Some(DeploymentSpec {
            replicas: Some(replicas),
            selector: LabelSelector { match_labels: Some(selector), match_expressions: None },
            // A worker goes once another has taken its place.
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".to_owned()),
                rolling_update: Some(RollingUpdateDeployment {
                    max_unavailable: Some(IntOrString::Int(0)),
                    max_surge: Some(IntOrString::Int(1)),
                }),
            }),
            progress_deadline_seconds: Some(600),
            revision_history_limit: Some(2),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta { labels: Some(build_labels(&wanted.tenant)), ..ObjectMeta::default() }),
                spec: Some(build_pod(wanted, settings)),
            },
            ..DeploymentSpec::default()
        }),
        ..Deployment::default()
    }
}

fn build_pod(wanted: &Wanted, settings: &Settings) -> PodSpec {
    PodSpec {
        containers: vec![build_container(wanted, settings)],
        service_account_name: Some(NAME.to_owned()),
        // The older name of the same, which the API server fills in.
        service_account: Some(NAME.to_owned()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        restart_policy: Some("Always".to_owned()),
        dns_policy: Some("ClusterFirst".to_owned()),
        scheduler_name: Some("default-scheduler".to_owned()),
        termination_grace_period_seconds: Some(i64::from(settings.runtime_shutdown_seconds) + SHUTDOWN_MARGIN),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
            ..PodSecurityContext::default()
        }),
        topology_spread_constraints: Some(
            ["kubernetes.io/hostname", "topology.kubernetes.io/zone"].map(|key| build_spread(wanted, key)).into(),
        ),
        node_selector: (!wanted.node_selector.is_empty()).then(|| wanted.node_selector.clone()),
        tolerations: (!wanted.tolerations.is_empty())
            .then(|| wanted.tolerations.iter().map(build_toleration).collect()),
        runtime_class_name: wanted.runtime_class.clone(),
        priority_class_name: wanted.priority_class.clone(),
        // A directory, without subPath: the kubelet replaces the file in it when the Secret changes.
        volumes: Some(vec![Volume {
            name: TOKEN_KEY.to_owned(),
            secret: Some(SecretVolumeSource {
                secret_name: Some(NAME.to_owned()),
                default_mode: Some(0o444),
                ..SecretVolumeSource::default()
            }),
            ..Volume::default()
        }]),
        ..PodSpec::default()
    }
}

fn build_container(wanted: &Wanted, settings: &Settings) -> Container {
    Container {
        name: "runtime".to_owned(),
        image: Some(settings.runtime_image.clone()),
        image_pull_policy: Some(settings.runtime_image_pull_policy.as_str().to_owned()),
        env: Some(build_environment(wanted, settings)),
        ports: Some(vec![ContainerPort {
            name: Some(PORT_NAME.to_owned()),
            container_port: PORT,
            protocol: Some("TCP".to_owned()),
            ..ContainerPort::default()
        }]),
        resources: Some(ResourceRequirements {
            requests: Some(build_amount(wanted.requests)),
            limits: Some(build_amount(wanted.limits)),
            claims: None,
        }),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            privileged: Some(false),
            read_only_root_filesystem: Some(true),
            run_as_non_root: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
            ..SecurityContext::default()
        }),
        liveness_probe: Some(build_probe("/healthz", 10, 6)),
        readiness_probe: Some(build_probe("/readyz", 5, 3)),
        volume_mounts: Some(vec![VolumeMount {
            name: TOKEN_KEY.to_owned(),
            mount_path: TOKEN_DIRECTORY.to_owned(),
            read_only: Some(true),
            ..VolumeMount::default()
        }]),
        termination_message_path: Some("/dev/termination-log".to_owned()),
        termination_message_policy: Some("File".to_owned()),
        ..Container::default()
    }
}

fn build_environment(wanted: &Wanted, settings: &Settings) -> Vec<EnvVar> {
    let mut variables = vec![
        ("API_URL", settings.api_url.to_string()),
        ("TOKEN_FILE", format!("{TOKEN_DIRECTORY}/{TOKEN_KEY}")),
        ("CONCURRENCY", wanted.concurrency.to_string()),
        ("LISTEN", format!("0.0.0.0:{PORT}")),
        ("SHUTDOWN_SECONDS", settings.runtime_shutdown_seconds.to_string()),
        ("LOG_FORMAT", "json".to_owned()),
    ];
    let nets = allowed_nets(&wanted.openings);
    if !nets.is_empty() {
        variables.push(("ALLOWED_NETS", nets.join(",")));
    }
    variables
        .into_iter()
        .map(|(name, value)| EnvVar { name: format!("CLOISTER_RUNTIME__{name}"), value: Some(value), value_from: None })
        .collect()
}

/// What is opened, as the worker checks webhooks' addresses by it: each network with each of its ports.
fn allowed_nets(openings: &[Opening]) -> Vec<String> {
    let nets = openings.iter().flat_map(|opening| opening.ports.iter().map(|port| format!("{}:{port}", opening.cidr)));
    nets.collect()
}

fn build_probe(path: &str, period_seconds: i32, failure_threshold: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String(PORT_NAME.to_owned()),
            scheme: Some("HTTP".to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period_seconds),
        timeout_seconds: Some(3),
        success_threshold: Some(1),
        failure_threshold: Some(failure_threshold),
        ..Probe::default()
    }
}

fn build_spread(wanted: &Wanted, key: &str) -> TopologySpreadConstraint {
    TopologySpreadConstraint {
        max_skew: 1,
        topology_key: key.to_owned(),
        when_unsatisfiable: "ScheduleAnyway".to_owned(),
        label_selector: Some(LabelSelector {
            match_labels: Some(build_selector(&wanted.tenant)),
            match_expressions: None,
        }),
        ..TopologySpreadConstraint::default()
    }
}

fn build_toleration(toleration: &crds::runtime::Toleration) -> Toleration {
    Toleration {
        key: Some(toleration.key.clone()),
        operator: Some(
            match toleration.operator {
                TolerationOperator::Equal => "Equal",
                TolerationOperator::Exists => "Exists",
            }
            .to_owned(),
        ),
        value: toleration.value.clone().filter(|value| !value.is_empty()),
        effect: toleration.effect.map(|effect| {
            match effect {
                TaintEffect::NoSchedule => "NoSchedule",
                TaintEffect::PreferNoSchedule => "PreferNoSchedule",
                TaintEffect::NoExecute => "NoExecute",
            }
            .to_owned()
        }),
        toleration_seconds: None,
    }
}

/// A drain takes one worker at a time. A minimum instead, with one worker, would block drains for ever.
pub fn build_pod_disruption_budget(wanted: &Wanted) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: build_metadata(wanted),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(LabelSelector {
                match_labels: Some(build_selector(&wanted.tenant)),
                match_expressions: None,
            }),
            // A worker that isn't ready serves nobody and must not keep a node from being drained.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            min_available: None,
        }),
        ..PodDisruptionBudget::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::wanted::samples::wanted;

    fn variable(deployment: &Deployment, name: &str) -> Option<String> {
        let pod = deployment.spec.as_ref()?.template.spec.as_ref()?;
        let env = pod.containers[0].env.as_ref()?;
        env.iter().find(|var| var.name == format!("CLOISTER_RUNTIME__{name}"))?.value.clone()
    }

    #[test]
    fn a_worker_is_restricted() {
        let deployment = build_deployment(&wanted(json!({})), &Settings::sample(), 1);
        let pod = deployment.spec.unwrap().template.spec.unwrap();
        let container = pod.containers[0].security_context.as_ref().unwrap();
        assert_eq!(pod.automount_service_account_token, Some(false));
        assert_eq!(pod.host_network, None);
        assert_eq!(pod.security_context.as_ref().unwrap().run_as_non_root, Some(true));
        assert_eq!(container.capabilities.as_ref().unwrap().drop.as_ref().unwrap(), &["ALL"]);
        assert_eq!(container.read_only_root_filesystem, Some(true));
        assert!(pod.termination_grace_period_seconds.unwrap() > 120);
    }

    #[test]
    fn openings_are_told_to_the_worker() {
        let egress = json!([
            {"cidr": "203.0.113.0/24", "ports": [8443]},
            {"cidr": "10.1.2.3/32", "ports": [8443, 5000]},
            {"cidr": "2001:db8::7/128", "ports": [443]},
        ]);
        let wanted = wanted(json!({"network": {"allowedEgress": egress}}));
        let deployment = build_deployment(&wanted, &Settings::sample(), 1);
        let nets = "203.0.113.0/24:8443,10.1.2.3/32:5000,10.1.2.3/32:8443,2001:db8::7/128:443";
        assert_eq!(variable(&deployment, "ALLOWED_NETS").unwrap(), nets);
    }

    #[test]
    fn the_spec_shows_in_the_pod() {
        let runtime = json!({
            "concurrency": 7,
            "nodeSelector": {"pool": "tenants"},
            "tolerations": [{"key": "tenants", "operator": "Exists", "effect": "NoSchedule"}],
            "resources": {"limits": {"cpu": "2000m"}},
        });
        let deployment = build_deployment(&wanted(json!({"runtime": runtime})), &Settings::sample(), 2);
        assert_eq!(variable(&deployment, "CONCURRENCY").unwrap(), "7");
        assert_eq!(variable(&deployment, "ALLOWED_NETS"), None);
        let spec = deployment.spec.unwrap();
        let pod = spec.template.spec.unwrap();
        assert_eq!(spec.replicas, Some(2));
        assert_eq!(pod.node_selector.unwrap()["pool"], "tenants");
        assert_eq!(pod.tolerations.unwrap()[0].operator.as_deref(), Some("Exists"));
        assert_eq!(pod.containers[0].resources.as_ref().unwrap().limits.as_ref().unwrap()["cpu"].0, "2");
    }
}
