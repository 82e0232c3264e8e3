"""The operator written with kopf, as a fair peer.

It makes of each enterprise `Tenant` the objects that `cloister-operator` makes (`objects.py`), by server-side apply,
registers the tenant with the same api, fetches its workers' token, writes the same status, puts drift right, follows the
api's changes, rotates tokens, and lets a tenant go. It spares itself what the other has beyond that: autoscaling, plans
that drain, rollouts in steps, foreign fields and namespaces, leader election, metrics, the admission of openings.

Handlers are asynchronous; kopf and they share one aiohttp session. Nothing is limited but the connections.
Configured by the same variables: `KUBECONFIG`, `CLOISTER_OPERATOR__API_URL` and so on.
"""

import asyncio
import base64
import contextlib
import dataclasses
import os
import ssl
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import kopf
import objects
import yaml
from objects import NAME, TENANT_LABEL, Object

TENANTS = ("cloister.dev", "v1alpha1", "tenants")
NAMESPACES = ("v1", "namespaces")
CHILDREN = {
    "NetworkPolicy": ("networking.k8s.io", "v1", "networkpolicies"),
    "ResourceQuota": ("v1", "resourcequotas"),
    "LimitRange": ("v1", "limitranges"),
    "ServiceAccount": ("v1", "serviceaccounts"),
    "Secret": ("v1", "secrets"),
    "Deployment": ("apps", "v1", "deployments"),
    "PodDisruptionBudget": ("policy", "v1", "poddisruptionbudgets"),
}
CONNECTIONS = 100
TOKEN_LIFE, TOKEN_USE = timedelta(days=7), timedelta(hours=24)

API_URL = os.environ["CLOISTER_OPERATOR__API_URL"]
API_TOKEN_FILE = Path(os.environ["CLOISTER_OPERATOR__API_TOKEN_FILE"])
API_CIDRS = os.environ["CLOISTER_OPERATOR__API_CIDRS"].split(",")
API_PORT = int(os.environ["CLOISTER_OPERATOR__API_PORT"])
IMAGE = os.environ["CLOISTER_OPERATOR__RUNTIME_IMAGE"]


# The Kubernetes API.


class Kubernetes:
    """The API server, by the kubeconfig; its session is kopf's too."""

    def __init__(self) -> None:
        config = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self.server = cluster["server"]
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS, ssl=ssl.create_default_context(cadata=authority)),
            headers={"Authorization": f"Bearer {user['token']}"},
        )
        self.api_server: list[str] = []
        self.cluster = ""

    async def learn(self) -> None:
        """What is the same for all tenants: which cluster this is, and where its API server listens."""
        self.cluster = (await self.get("/api/v1/namespaces/kube-system"))["metadata"]["uid"]
        slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes"
        endpoints = (await self.get(slices))["endpoints"]
        self.api_server = [f"{address}/32" for endpoint in endpoints for address in endpoint["addresses"]]

    async def get(self, path: str) -> Object:
        async with self.session.get(self.server + path, raise_for_status=True) as answer:
            return await answer.json()

    async def create_namespace(self, namespace: Object) -> str:
        """Answers its UID. One that is there already is the tenant's: this peer knows no foreign ones."""
        async with self.session.post(f"{self.server}/api/v1/namespaces", json=namespace) as answer:
            if answer.status != 409:
                answer.raise_for_status()
                return (await answer.json())["metadata"]["uid"]
        return (await self.get(f"/api/v1/namespaces/{namespace['metadata']['name']}"))["metadata"]["uid"]

    async def delete_namespace(self, name: str) -> bool:
        """Whether there was one left."""
        async with self.session.delete(f"{self.server}/api/v1/namespaces/{name}") as answer:
            if answer.status not in (404, 409):
                answer.raise_for_status()
            return answer.status != 404

    async def apply(self, wanted: Object) -> None:
        await self.patch(path_of(wanted), wanted, "application/apply-patch+yaml", force="true")

    async def patch_status(self, tenant: str, status: Object) -> None:
        path = f"/apis/cloister.dev/v1alpha1/tenants/{tenant}/status"
        await self.patch(path, {"status": status}, "application/merge-patch+json")

    async def patch(self, path: str, body: Object, content_type: str, **parameters: str) -> None:
        parameters["fieldManager"] = objects.FIELD_MANAGER
        headers = {"Content-Type": content_type}
        request = self.session.patch(self.server + path, json=body, params=parameters, headers=headers)
        async with request as answer:
            answer.raise_for_status()


def path_of(wanted: Object) -> str:
    version, metadata = wanted["apiVersion"], wanted["metadata"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    if wanted["kind"] == "Namespace":
        return f"{root}/namespaces/{metadata['name']}"
    plural = CHILDREN[wanted["kind"]][-1]
    return f"{root}/namespaces/{metadata['namespace']}/{plural}/{metadata['name']}"


# The platform's api.


class Api:
    """`/operator/v1`."""

    def __init__(self) -> None:
        headers = {"Authorization": f"Bearer {API_TOKEN_FILE.read_text().strip()}", "cloister-operator-protocol": "1"}
        self.session = aiohttp.ClientSession(headers=headers, raise_for_status=True)
        self.base = f"{API_URL.rstrip('/')}/operator/v1"

    async def call(self, method: str, path: str, body: Object | None = None) -> Any:
        async with self.session.request(method, f"{self.base}/{path}", json=body) as answer:
            return await answer.json()


# What is known of each tenant.


@dataclasses.dataclass(slots=True)
class Tenant:
    name: str
    uid: str = ""
    generation: int = 0
    spec: Object = dataclasses.field(default_factory=dict)
    status: Object = dataclasses.field(default_factory=dict)
    state: Object | None = None
    namespace_uid: str = ""
    ready: int = 0
    is_applied: bool = False
    token_due: datetime | None = None
    rotation: int = 0
    writing: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)

    @property
    def path(self) -> str:
        return f"tenants/{kubernetes.cluster}/{self.name}"

    @property
    def replicas(self) -> int:
        # What the api said before a restart, the status tells.
        told = self.state.get("suspended") if self.state else self.status.get("phase") == "Suspended"
        return 0 if self.spec.get("suspended") or told else objects.replicas(self.spec)

    def wanted(self) -> list[Object]:
        """Everything but the Secret, which the api has the content of; in an order in which nothing runs unconfined."""
        name, spec = self.name, self.spec
        return [
            objects.network_policy(name, spec, (API_CIDRS, API_PORT), kubernetes.api_server),
            objects.resource_quota(name, spec),
            objects.limit_range(name, spec),
            objects.service_account(name),
            objects.deployment(name, spec, IMAGE, API_URL, self.replicas),
            objects.pod_disruption_budget(name),
        ]

    def build_status(self) -> Object:
        state, namespace = self.state or {}, objects.namespace_of(self.name)
        is_ready = self.ready > 0 and self.replicas > 0
        workers = f"{self.ready} of {self.replicas} workers are ready."
        starting = ("True", "Available", workers) if is_ready else ("False", "Starting", workers)
        plan = self.spec["plan"]
        verdicts = {
            "Ready": ("True", "Ready", "The tenant is served.") if is_ready else starting,
            "Registered": ("True", "Registered", f"Registered as {state['tenantId']}."),
            "Suspended": ("False", "Active", "The tenant is served."),
            "BillingInSync": ("True", "InSync", f"The plan is {plan}."),
            "NamespaceReady": ("True", "Applied", f"Namespace {namespace} is the tenant's."),
            "QuotaApplied": ("True", "Applied", "Quota and limits are as wanted."),
            "NetworkPoliciesApplied": ("True", "Applied", "Network policies are as wanted."),
            "RuntimeAvailable": starting,
        }
        if self.replicas == 0:
            verdicts["Suspended"] = ("True", state.get("suspended") or "Requested", "The tenant is not served.")
            verdicts["Ready"] = ("False", "Suspended", "The tenant is not served.")
        before = {condition["type"]: condition for condition in self.status.get("conditions", [])}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        conditions = []
        for kind, (status, reason, message) in verdicts.items():
            was = before.get(kind, {})
            since = was["lastTransitionTime"] if was.get("status") == status else now
            conditions.append({
                "type": kind, "status": status, "reason": reason, "message": message,
                "lastTransitionTime": since, "observedGeneration": self.generation,
            })
        usage = state["usage"]
        left = usage["limit"] - usage["tokens"]
        nearness = "Exhausted" if left <= 0 else "NearLimit" if left <= usage["limit"] // 5 else "Ok"
        return {
            "observedGeneration": self.generation,
            "phase": "Suspended" if self.replicas == 0 else "Ready" if is_ready else "Provisioning",
            "isolation": "Namespace",
            "tenantId": state["tenantId"],
            "namespace": {"name": namespace, "uid": self.namespace_uid},
            "runtime": {
                "replicas": self.replicas, "readyReplicas": self.ready, "version": IMAGE.rpartition(":")[2],
            },
            "usage": usage | {"remaining": max(left, 0), "state": nearness},
            "conditions": conditions,
        }

    async def report(self) -> None:
        """Tells the api what the object says and how far the cluster has come; takes in what holds."""
        spec, status = self.spec, self.status
        tenant = {"displayName": spec["displayName"], "email": spec["email"], "plan": spec["plan"]}
        tenant["suspended"] = spec.get("suspended", False)
        for field in ("tenantId", "monthlyTokenLimit"):
            if field in spec:
                tenant[field] = spec[field]
        runtime = status.get("runtime", {})
        provisioning = {
            "phase": status.get("phase", "Pending"),
            "replicas": runtime.get("replicas", 0),
            "readyReplicas": runtime.get("readyReplicas", 0),
            "conditions": status.get("conditions", []),
        }
        if "namespace" in status:
            provisioning["namespace"] = status["namespace"]["name"]
        body = {"uid": self.uid, "generation": self.generation, "tenant": tenant, "provisioning": provisioning}
        self.state = await api.call("PUT", self.path, body)

    async def rotate(self) -> None:
        rotation = max(self.rotation + 1, int(time.time()))
        token = await api.call("POST", f"{self.path}/tokens", {"rotation": rotation})
        await kubernetes.apply(objects.secret(self.name, token, rotation))
        self.learn_token(str(rotation), token["expiresAt"])

    def learn_token(self, rotation: str, expires_at: str) -> None:
        self.rotation = int(rotation)
        self.token_due = datetime.fromisoformat(expires_at) - TOKEN_LIFE + TOKEN_USE

    async def publish(self) -> None:
        """Writes the status, if it is another one, and tells the api and whoever looks at events."""
        if not self.is_applied or self.state is None:
            return
        async with self.writing:
            status = self.build_status()
            if status == self.status:
                return
            await kubernetes.patch_status(self.name, status)
            was_ready, self.status = self.status.get("phase") == "Ready", status
            if status["phase"] == "Ready" and not was_ready:
                reference = {"apiVersion": "cloister.dev/v1alpha1", "kind": "Tenant"}
                reference["metadata"] = {"name": self.name, "uid": self.uid}
                kopf.event(reference, type="Normal", reason="Ready", message="Ready=True: The tenant is served.")
            await self.report()


kubernetes: Kubernetes
api: Api
tenants: dict[str, Tenant] = {}
background: list[asyncio.Task[None]] = []


@kopf.on.startup()
async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
    global kubernetes, api
    kubernetes, api = Kubernetes(), Api()
    await kubernetes.learn()
    settings.persistence.finalizer = "cloister.dev/tenant"
    settings.queueing.worker_limit = None
    settings.scanning.disabled = True
    for child in CHILDREN.values():
        settings.watching.field_selectors[child] = f"metadata.name={NAME}"
    background.extend(asyncio.create_task(task) for task in (follow(), rotate_tokens()))


@kopf.on.login()
async def login(**_: Any) -> kopf.AiohttpSession:
    return kopf.AiohttpSession(aiohttp_session=kubernetes.session, server=kubernetes.server)


@kopf.on.cleanup()
async def stop(**_: Any) -> None:
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
    await api.session.close()


# Indices, filled before the first handler runs: what is there after a restart.


@kopf.index(*TENANTS)
async def index_tenant(name: str, uid: str, meta: kopf.Meta, spec: kopf.Spec, status: kopf.Status, **_: Any) -> None:
    if name not in tenants or tenants[name].uid != uid:
        tenants[name] = Tenant(name, uid, meta["generation"], dict(spec), dict(status))
        tenants[name].is_applied = status.get("observedGeneration") == meta["generation"]


@kopf.index(*NAMESPACES, labels={TENANT_LABEL: kopf.PRESENT})
async def namespaces(name: str, uid: str, **_: Any) -> dict[str, str]:
    return {name: uid}


async def index_child(body: kopf.Body, namespace: str, **_: Any) -> dict[tuple[str, str], Any]:
    kept: Any = True
    match body["kind"]:
        case "Deployment":
            kept = body.get("status", {}).get("readyReplicas", 0)
        case "Secret":
            annotations = body.metadata.annotations
            kept = (annotations.get(objects.ROTATION, "0"), annotations.get(objects.EXPIRES_AT))
    return {(namespace, body["kind"]): kept}


for _child in CHILDREN.values():
    kopf.index(*_child, id="children", labels={TENANT_LABEL: kopf.PRESENT})(index_child)


# Tenants.


@kopf.on.resume(*TENANTS)
@kopf.on.create(*TENANTS)
@kopf.on.update(*TENANTS, field="spec")
async def reconcile(
    name: str, uid: str, meta: kopf.Meta, spec: kopf.Spec, reason: str, namespaces: kopf.Index, children: kopf.Index,
    **_: Any,
) -> None:
    tenant = tenants[name]
    tenant.generation, tenant.spec = meta["generation"], dict(spec)
    await tenant.report()
    if tenant.spec["plan"] != "enterprise":
        return
    namespace = objects.namespace_of(name)
    if namespace not in namespaces:
        tenant.namespace_uid = await kubernetes.create_namespace(objects.namespace(name, uid))
    else:
        tenant.namespace_uid = only(namespaces[namespace])
    for wanted in tenant.wanted():
        if wanted["kind"] == "Deployment":
            if (namespace, "Secret") in children:
                tenant.learn_token(*only(children[namespace, "Secret"]))
            else:
                await tenant.rotate()
        # After a restart, what is there is compared as it is listed.
        if reason != "resume" or (namespace, wanted["kind"]) not in children:
            await kubernetes.apply(wanted)
    if (namespace, "Deployment") in children:
        tenant.ready = only(children[namespace, "Deployment"])
    tenant.is_applied = True
    await tenant.publish()


def only(values: Iterable[Any]) -> Any:
    return next(iter(values))


@kopf.on.delete(*TENANTS)
async def depart(name: str, uid: str, spec: kopf.Spec, **_: Any) -> None:
    tenants.pop(name, None)
    retain = spec.get("deletionPolicy", "Retain") == "Retain"
    farewell = {"uid": uid, "retain": retain, "cancel": False, "deregister": False}
    path = f"tenants/{kubernetes.cluster}/{name}"
    departure = await api.call("DELETE", path, farewell)
    if departure["running"] > 0:
        raise kopf.TemporaryError("runs are still going", delay=1)
    if await kubernetes.delete_namespace(objects.namespace_of(name)):
        raise kopf.TemporaryError("the namespace is being deleted", delay=1)
    departure = await api.call("DELETE", path, farewell | {"deregister": True})
    if not departure["isGone"]:
        raise kopf.TemporaryError("the api has not let go yet", delay=1)


# What belongs to them: drift is put right, and workers that become ready show in the status.


@kopf.on.event(*NAMESPACES, labels={TENANT_LABEL: kopf.PRESENT})
async def keep_namespace(body: kopf.Body, labels: kopf.Labels, **_: Any) -> None:
    tenant = tenants.get(labels[TENANT_LABEL])
    if tenant is None or not tenant.is_applied or "deletionTimestamp" in body["metadata"]:
        return
    wanted = objects.namespace(tenant.name, tenant.uid)
    if not objects.holds(body["metadata"], wanted["metadata"]):
        await kubernetes.apply(wanted)


async def keep_child(event: kopf.RawEvent, body: kopf.Body, labels: kopf.Labels, **_: Any) -> None:
    tenant = tenants.get(labels[TENANT_LABEL])
    if tenant is None or not tenant.is_applied:
        return
    is_gone, kind = event["type"] == "DELETED", body["kind"]
    if kind == "Secret":
        if is_gone:
            await tenant.rotate()
        return
    wanted = next(wanted for wanted in tenant.wanted() if wanted["kind"] == kind)
    if is_gone or not objects.holds(body, wanted):
        await kubernetes.apply(wanted)
    if kind == "Deployment":
        tenant.ready = body.get("status", {}).get("readyReplicas", 0)
        await tenant.publish()


for _child in CHILDREN.values():
    kopf.on.event(*_child, id="keep_child", labels={TENANT_LABEL: kopf.PRESENT})(keep_child)


# In the background: what the api tells of its own accord, and tokens that grow old.


async def follow() -> None:
    cursor = None
    while True:
        try:
            after = f"?after={cursor}" if cursor else ""
            changes = await api.call("GET", f"changes/{kubernetes.cluster}{after}")
        except aiohttp.ClientError:
            await asyncio.sleep(1)
            continue
        cursor = changes["cursor"]
        for changed in changes["tenants"]:
            tenant = tenants.get(changed["name"])
            if tenant is not None and tenant.state != changed["state"]:
                tenant.state = changed["state"]
                await tenant.publish()


async def rotate_tokens() -> None:
    while True:
        await asyncio.sleep(60)
        for tenant in list(tenants.values()):
            if tenant.token_due is not None and tenant.token_due <= datetime.now(UTC):
                with contextlib.suppress(aiohttp.ClientError):
                    await tenant.rotate()
