"""What a tenant's namespace holds: the same objects as `operator/src/build/` makes, as plain dictionaries."""

import base64
import hashlib
import ipaddress
import re
from collections.abc import Mapping
from typing import Any

NAME = "cloister-runtime"
FIELD_MANAGER = "cloister-operator"
TENANT_LABEL = "cloister.dev/tenant"
TENANT_UID = "cloister.dev/tenant-uid"
TOKEN_ID = "cloister.dev/token-id"
TOKEN_SHA256 = "cloister.dev/token-sha256"
EXPIRES_AT = "cloister.dev/expires-at"
ROTATION = "cloister.dev/rotation"

Object = dict[str, Any]

DEFAULT_REQUESTS = {"cpu": "250m", "memory": "128Mi"}
DEFAULT_LIMITS = {"cpu": "1", "memory": "256Mi"}

NOT_PUBLIC = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4",
    "::/64", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16", "fc00::/7", "fe80::/10", "ff00::/8",
]


def namespace_of(tenant: str) -> str:
    return f"tenant-{tenant}"


def labels(tenant: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": NAME,
        "app.kubernetes.io/instance": tenant,
        "app.kubernetes.io/component": "runtime",
        "app.kubernetes.io/part-of": "cloister",
        "app.kubernetes.io/managed-by": FIELD_MANAGER,
        TENANT_LABEL: tenant,
    }


def selector(tenant: str) -> Object:
    return {"matchLabels": {"app.kubernetes.io/name": NAME, TENANT_LABEL: tenant}}


def child(api_version: str, kind: str, tenant: str, **fields: Any) -> Object:
    metadata = {"name": NAME, "namespace": namespace_of(tenant), "labels": labels(tenant)}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **fields}


def namespace(tenant: str, uid: str) -> Object:
    security = {}
    for mode in ("enforce", "audit", "warn"):
        security[f"pod-security.kubernetes.io/{mode}"] = "restricted"
        security[f"pod-security.kubernetes.io/{mode}-version"] = "latest"
    metadata = {
        "name": namespace_of(tenant),
        "labels": labels(tenant) | security,
        "annotations": {TENANT_UID: uid},
    }
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}


def times(quantity: str, count: int) -> str:
    """A quantity so many times, in the API server's own way of writing it."""
    number, unit = re.fullmatch(r"(\d+)(\D*)", quantity).groups()
    product = int(number) * count
    if unit == "m" and product % 1000 == 0:
        return str(product // 1000)
    if unit == "Mi" and product % 1024 == 0:
        return f"{product // 1024}Gi"
    return f"{product}{unit}"


def amounts(spec: Object) -> tuple[Object, Object]:
    resources = spec.get("runtime", {}).get("resources", {})
    return DEFAULT_REQUESTS | resources.get("requests", {}), DEFAULT_LIMITS | resources.get("limits", {})


def resource_quota(tenant: str, spec: Object) -> Object:
    requests, limits = amounts(spec)
    pods = replicas(spec) + 1
    hard = {
        "secrets": "5", "configmaps": "5", "services": "0", "services.nodeports": "0", "services.loadbalancers": "0",
        "persistentvolumeclaims": "0", "replicationcontrollers": "0", "count/statefulsets.apps": "0",
        "count/jobs.batch": "0",
        "requests.cpu": times(requests["cpu"], pods), "requests.memory": times(requests["memory"], pods),
        "limits.cpu": times(limits["cpu"], pods), "limits.memory": times(limits["memory"], pods), "pods": str(pods),
    }
    return child("v1", "ResourceQuota", tenant, spec={"hard": hard | spec.get("quota", {})})


def limit_range(tenant: str, spec: Object) -> Object:
    requests, limits = amounts(spec)
    item = {"type": "Container", "default": limits, "defaultRequest": requests}
    return child("v1", "LimitRange", tenant, spec={"limits": [item]})


def network_policy(tenant: str, spec: Object, api: tuple[list[str], int], api_server: list[str]) -> Object:
    cidrs, port = api
    dns = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
        "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
    }
    egress = [
        {"to": [dns], "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]},
        {"to": [block(cidr) for cidr in cidrs], "ports": [{"protocol": "TCP", "port": port}]},
    ]
    for everything in ("0.0.0.0/0", "::/0"):
        denied = [net for net in NOT_PUBLIC + api_server if (":" in net) == (":" in everything)]
        # An address within a range that is denied already is not named again.
        nets = ipaddress.collapse_addresses(ipaddress.ip_network(net) for net in denied)
        public = block(everything, [str(net) for net in nets])
        egress.append({"to": [public], "ports": [{"protocol": "TCP", "port": 443}]})
    for opening in spec.get("network", {}).get("allowedEgress", []):
        ports = [{"protocol": "TCP", "port": port} for port in opening["ports"]]
        egress.append({"to": [block(opening["cidr"])], "ports": ports})
    policy = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"], "egress": egress}
    return child("networking.k8s.io/v1", "NetworkPolicy", tenant, spec=policy)


def block(cidr: str, exceptions: list[str] | None = None) -> Object:
    return {"ipBlock": {"cidr": cidr} | ({"except": exceptions} if exceptions else {})}


def service_account(tenant: str) -> Object:
    return child("v1", "ServiceAccount", tenant, automountServiceAccountToken=False)


def secret(tenant: str, token: Object, rotation: int) -> Object:
    value = token["token"].encode()
    made = child("v1", "Secret", tenant, type="Opaque", data={"token": base64.b64encode(value).decode()})
    made["metadata"]["annotations"] = {
        TOKEN_ID: token["id"],
        TOKEN_SHA256: hashlib.sha256(value).hexdigest(),
        EXPIRES_AT: token["expiresAt"],
        ROTATION: str(rotation),
    }
    return made


def replicas(spec: Object) -> int:
    return spec.get("runtime", {}).get("replicas", 1)


def deployment(tenant: str, spec: Object, image: str, api_url: str, count: int) -> Object:
    requests, limits = amounts(spec)
    runtime = spec.get("runtime", {})
    environment = {
        "API_URL": api_url,
        "TOKEN_FILE": "/var/run/cloister/token",
        "CONCURRENCY": str(runtime.get("concurrency", 50)),
        "LISTEN": "0.0.0.0:8082",
        "SHUTDOWN_SECONDS": "120",
        "LOG_FORMAT": "json",
    }
    container = {
        "name": "runtime",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": f"CLOISTER_RUNTIME__{name}", "value": value} for name, value in environment.items()],
        "ports": [{"name": "health", "containerPort": 8082, "protocol": "TCP"}],
        "resources": {"requests": requests, "limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False, "privileged": False, "readOnlyRootFilesystem": True,
            "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]},
        },
        "livenessProbe": probe("/healthz", 10, 6),
        "readinessProbe": probe("/readyz", 5, 3),
        "volumeMounts": [{"name": "token", "mountPath": "/var/run/cloister", "readOnly": True}],
    }
    pod = {
        "containers": [container],
        "serviceAccountName": NAME,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 130,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": key, "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": selector(tenant)}
            for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone")
        ],
        "volumes": [{"name": "token", "secret": {"secretName": NAME, "defaultMode": 0o444}}],
    }
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    return child("apps/v1", "Deployment", tenant, spec={
        "replicas": count,
        "selector": selector(tenant),
        "strategy": strategy,
        "progressDeadlineSeconds": 600,
        "revisionHistoryLimit": 2,
        "template": {"metadata": {"labels": labels(tenant)}, "spec": pod},
    })


def probe(path: str, period: int, failures: int) -> Object:
    return {
        "httpGet": {"path": path, "port": "health", "scheme": "HTTP"},
        "periodSeconds": period, "timeoutSeconds": 3, "failureThreshold": failures,
    }


def pod_disruption_budget(tenant: str) -> Object:
    spec = {"maxUnavailable": 1, "selector": selector(tenant), "unhealthyPodEvictionPolicy": "AlwaysAllow"}
    return child("policy/v1", "PodDisruptionBudget", tenant, spec=spec)


def holds(live: Any, wanted: Any) -> bool:
    """Whether a live object has all that is wanted; what the API server filled in beside it is fine."""
    match wanted:
        case dict():
            has = isinstance(live, Mapping) and all(key in live for key in wanted)
            return has and all(holds(live[key], value) for key, value in wanted.items())
        case list():
            return len(live) == len(wanted) and all(map(holds, live, wanted))
        case _:
            return live == wanted
