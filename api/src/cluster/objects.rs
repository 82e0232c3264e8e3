//! The objects `Tenant` of the api's own cluster, as the api writes them: by server-side apply without force, so that
//! what somebody else holds stays theirs.
//!
//! Source: <https://kubernetes.io/docs/reference/using-api/server-side-apply/>.

use std::collections::BTreeSet;
use std::time::Duration;

use crds::Tenant;
use crds::protocol::Registration;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, Preconditions};
use kube::core::{ApiResource, Status};
use kube::{Api, Client};
use serde_json::{Map, Value, json};
use tokio::time::timeout;

use super::Cluster;

/// The api's name as a field manager.
pub const FIELD_MANAGER: &str = "cloister-api";
/// How long the cluster may take for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why an object was not written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// The cluster can't be asked now, or can't do it now.
    Away(String),
    /// Others hold these fields.
    Held(Vec<HeldField>),
    /// The cluster takes no such object.
    Refused(String),
}

/// A field of an object's spec that somebody else holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldField {
    /// As `displayName`; empty: the object as a whole.
    pub field: String,
    /// The field manager.
    pub manager: String,
}

/// What is to change of an object's spec.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecChange {
    /// The tenant that it is to have; only of a new object.
    pub tenant_id: Option<String>,
    /// Only of a new object.
    pub email: Option<String>,
    /// For people.
    pub display_name: Option<String>,
    /// The plan's name.
    pub plan: Option<String>,
    /// `Some(None)`: the plan's limit again.
    pub monthly_token_limit: Option<Option<i64>>,
    /// Whether it is not to be served.
    pub suspended: Option<bool>,
}

impl SpecChange {
    /// What it says of a tenant in all: a new object.
    pub fn all(said: Registration) -> Self {
        Self {
            tenant_id: said.tenant_id,
            email: Some(said.email),
            display_name: Some(said.display_name),
            plan: Some(said.plan),
            monthly_token_limit: Some(said.monthly_token_limit),
            suspended: Some(said.suspended),
        }
    }

    /// Whether nothing is to change.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The fields, as the spec names them; none: it is to go.
    pub fn fields(&self) -> Vec<(&'static str, Option<Value>)> {
        let text = |text: &Option<String>| text.clone().map(|text| Some(Value::String(text)));
        let all = [
            ("tenantId", text(&self.tenant_id)),
            ("email", text(&self.email)),
            ("displayName", text(&self.display_name)),
            ("plan", text(&self.plan)),
            ("monthlyTokenLimit", self.monthly_token_limit.map(|limit| limit.map(Value::from))),
            ("suspended", self.suspended.map(|suspended| Some(Value::Bool(suspended)))),
        ];
        all.into_iter().filter_map(|(field, value)| value.map(|value| (field, value))).collect()
    }

    /// Changes what an object is known to say.
    pub fn note(&self, said: &mut Registration) {
        if let Some(name) = &self.display_name {
            said.display_name.clone_from(name);
        }
        if let Some(plan) = &self.plan {
            said.plan.clone_from(plan);
        }
        if let Some(limit) = self.monthly_token_limit {
            said.monthly_token_limit = limit;
        }
        if let Some(suspended) = self.suspended {
            said.suspended = suspended;
        }
    }
}

/// The incarnation and the generation of an object after a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its UID.
    pub uid: String,
    /// Its generation.
    pub generation: i64,
}

impl Written {
    /// Of an object as it is now.
    pub fn of(object: &DynamicObject) -> Self {
        let meta = &object.metadata;
        Self { uid: meta.uid.clone().unwrap_or_default(), generation: meta.generation.unwrap_or(0) }
    }
}

impl Cluster {
    /// The UID of the cluster's namespace `kube-system`, which names it.
    pub async fn id(&self) -> Result<&str, Problem> {
        let ask = || async {
            let client = self.client.clone().ok_or_else(|| Problem::Away("there is no way to a cluster".to_owned()))?;
            let namespaces: Api<Namespace> = Api::all(client);
            let found = answer(namespaces.get("kube-system")).await.map_err(Failure::problem)?;
            found.metadata.uid.ok_or_else(|| Problem::Away("the namespace kube-system has no UID".to_owned()))
        };
        self.id.get_or_try_init(ask).await.map(String::as_str)
    }

    /// The way to the cluster, for objects.
    fn client(&self) -> Result<Client, Problem> {
        let none = || Problem::Away("cluster.enabled is off".to_owned());
        self.client.clone().filter(|_| self.writes).ok_or_else(none)
    }

    fn objects(&self) -> Result<Api<DynamicObject>, Problem> {
        Ok(Api::all_with(self.client()?, &tenant_resource()))
    }

    /// An object, if it is there.
    pub async fn find(&self, name: &str) -> Result<Option<DynamicObject>, Problem> {
        answer(self.objects()?.get_opt(name)).await.map_err(Failure::problem)
    }

    /// Changes an object, or makes it if `makes`. None: it isn't there. What the api holds of it besides, it goes on
    /// holding.
    pub async fn write(&self, name: &str, change: &SpecChange, makes: bool) -> Result<Option<Written>, Problem> {
        /// Each attempt but the last finds that the object was changed by somebody else meanwhile.
        const ATTEMPTS: usize = 5;
        let api = self.objects()?;
        let parameters = PatchParams::apply(FIELD_MANAGER);
        for _ in 0..ATTEMPTS {
            let live = self.find(name).await?;
            if live.as_ref().is_some_and(|live| live.metadata.deletion_timestamp.is_some()) {
                return Err(Problem::Away(format!("the Tenant {name} is being deleted")));
            }
            let Some(body) = applied(name, live.as_ref(), change, makes)? else {
                return Ok(live.as_ref().map(Written::of));
            };
            match answer(api.patch(name, &parameters, &Patch::Apply(&body))).await {
                Ok(object) => return Ok(Some(Written::of(&object))),
                Err(Failure::Changed) => {}
                Err(failure) => return Err(failure.problem()),
            }
        }
        Err(Problem::Away(format!("the Tenant {name} is changed by others all the time")))
    }

    /// Deletes an object of this tenant's that nobody but the api holds anything of. Its end takes its time.
    pub async fn remove(&self, name: &str, tenant_id: &str) -> Result<(), Problem> {
        let Some(live) = self.find(name).await? else { return Ok(()) };
        if live.metadata.deletion_timestamp.is_some() || stated_tenant(&live).is_some_and(|id| id != tenant_id) {
            return Ok(());
        }
        let others: BTreeSet<&str> =
            spec_managers(&live).map(|(manager, _)| manager).filter(|manager| *manager != FIELD_MANAGER).collect();
        if !others.is_empty() {
            let held =
                others.into_iter().map(|manager| HeldField { field: String::new(), manager: manager.to_owned() });
            return Err(Problem::Held(held.collect()));
        }
        let preconditions = Preconditions { uid: live.metadata.uid.clone(), resource_version: None };
        let parameters = DeleteParams { preconditions: Some(preconditions), ..Default::default() };
        match answer(self.objects()?.delete(name, &parameters)).await {
            // Gone already, or another incarnation by now: that one is not the tenant's.
            Ok(_) | Err(Failure::Missing | Failure::Changed) => Ok(()),
            Err(failure) => Err(failure.problem()),
        }
    }
}

fn tenant_resource() -> ApiResource {
    ApiResource::erase::<Tenant>(&())
}

/// The tenant that an object names.
pub fn stated_tenant(object: &DynamicObject) -> Option<&str> {
    object.data["spec"]["tenantId"].as_str()
}

/// Whether an object says that its tenant is not to be served.
pub fn states_suspension(object: &DynamicObject) -> bool {
    object.data["spec"]["suspended"].as_bool().unwrap_or(false)
}

/// Who manages which fields of an object's spec, as `displayName`.
fn spec_managers(object: &DynamicObject) -> impl Iterator<Item = (&str, &Map<String, Value>)> {
    let entries = object.metadata.managed_fields.iter().flatten();
    entries.filter(|entry| entry.subresource.as_deref().unwrap_or_default().is_empty()).filter_map(spec_fields)
}

fn spec_fields(entry: &ManagedFieldsEntry) -> Option<(&str, &Map<String, Value>)> {
    let fields = entry.fields_v1.as_ref()?.0.get("f:spec")?.as_object()?;
    Some((entry.manager.as_deref().unwrap_or("somebody"), fields))
}

/// What is applied: all that the api holds already, since what an apply leaves out it gives up, with the change over
/// it. None: nothing is to be written.
fn applied(
    name: &str,
    live: Option<&DynamicObject>,
    change: &SpecChange,
    makes: bool,
) -> Result<Option<Value>, Problem> {
    let mut spec = Map::new();
    let mut metadata = json!({ "name": name });
    match live {
        Some(live) => {
            metadata["uid"] = json!(live.metadata.uid);
            metadata["resourceVersion"] = json!(live.metadata.resource_version);
            let own = spec_managers(live).filter(|(manager, _)| *manager == FIELD_MANAGER);
            for field in own.flat_map(|(_, fields)| fields.keys()).filter_map(|field| field.strip_prefix("f:")) {
                if let Some(value) = live.data["spec"].get(field) {
                    spec.insert(field.to_owned(), value.clone());
                }
            }
        }
        None if makes => {}
        None => return Ok(None),
    }
    for (field, value) in change.fields() {
        match value {
            Some(value) => drop(spec.insert(field.to_owned(), value)),
            None => {
                spec.remove(field);
                still_stated(live, field)?;
            }
        }
    }
    let resource = tenant_resource();
    let body = json!({
        "apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata, "spec": spec,
    });
    Ok(Some(body))
}

/// A field that the api leaves out goes only if nobody else holds it.
fn still_stated(live: Option<&DynamicObject>, field: &str) -> Result<(), Problem> {
    let Some(live) = live else { return Ok(()) };
    let key = format!("f:{field}");
    let others = spec_managers(live).filter(|(manager, fields)| *manager != FIELD_MANAGER && fields.contains_key(&key));
    let held: Vec<HeldField> =
        others.map(|(manager, _)| HeldField { field: field.to_owned(), manager: manager.to_owned() }).collect();
    if held.is_empty() { Ok(()) } else { Err(Problem::Held(held)) }
}

/// What a request came to.
#[derive(Debug)]
enum Failure {
    Problem(Problem),
    /// It was changed meanwhile.
    Changed,
    /// There is no such thing.
    Missing,
}

impl Failure {
    fn problem(self) -> Problem {
        match self {
            Failure::Problem(problem) => problem,
            Failure::Changed => Problem::Away("it was changed at the same time".to_owned()),
            Failure::Missing => Problem::Away("the cluster does not know the resource Tenant".to_owned()),
        }
    }
}

async fn answer<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, Failure> {
    let late = || Failure::Problem(Problem::Away(format!("no answer within {} s", PATIENCE.as_secs())));
    match timeout(PATIENCE, request).await.map_err(|_| late())? {
        Ok(answer) => Ok(answer),
        Err(kube::Error::Api(status)) => Err(refused(&status)),
        Err(error) => Err(Failure::Problem(Problem::Away(error.to_string()))),
    }
}

fn refused(status: &Status) -> Failure {
    match status.code {
        404 => Failure::Missing,
        409 => {
            let held = held_fields(status);
            if held.is_empty() { Failure::Changed } else { Failure::Problem(Problem::Held(held)) }
        }
        400 | 422 => Failure::Problem(Problem::Refused(status.message.clone())),
        // 401 and 403 too: the api's rights can be mended.
        code => Failure::Problem(Problem::Away(format!("the cluster answers {code}: {}", status.message))),
    }
}

/// The fields of a conflict: each cause names one, as `.spec.displayName`, and in its message who holds it.
fn held_fields(status: &Status) -> Vec<HeldField> {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    let conflicts = causes.filter(|cause| cause.reason == "FieldManagerConflict");
    let held = conflicts.map(|cause| HeldField {
        field: cause.field.strip_prefix(".spec.").unwrap_or(&cause.field).to_owned(),
        manager: cause.message.split('"').nth(1).unwrap_or("somebody else").to_owned(),
    });
    held.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(managers: Value) -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "cloister.dev/v1alpha1", "kind": "Tenant",
            "metadata": {"name": "acme", "uid": "u-1", "resourceVersion": "7", "managedFields": managers},
            "spec": {"displayName": "Acme", "plan": "pro", "suspended": true, "monthlyTokenLimit": 5},
        }))
        .unwrap()
    }

    fn manager(name: &str, fields: Value) -> Value {
        json!({"manager": name, "operation": "Apply", "apiVersion": "cloister.dev/v1alpha1", "fieldsType": "FieldsV1",
               "fieldsV1": {"f:spec": fields}})
    }

    #[test]
    fn an_apply_keeps_what_the_api_holds() {
        let live = live(json!([
            manager(FIELD_MANAGER, json!({"f:suspended": {}})),
            manager("kubectl", json!({"f:displayName": {}, "f:plan": {}})),
        ]));
        let change = SpecChange { display_name: Some("New".to_owned()), ..Default::default() };
        let body = applied("acme", Some(&live), &change, false).unwrap().unwrap();
        assert_eq!(body["spec"], json!({"suspended": true, "displayName": "New"}));
        assert_eq!(body["metadata"], json!({"name": "acme", "uid": "u-1", "resourceVersion": "7"}));
    }

    #[test]
    fn a_field_that_somebody_else_holds_can_not_be_left_out() {
        let clears = SpecChange { monthly_token_limit: Some(None), ..Default::default() };
        let own = live(json!([manager(FIELD_MANAGER, json!({"f:monthlyTokenLimit": {}}))]));
        let body = applied("acme", Some(&own), &clears, false).unwrap().unwrap();
        assert_eq!(body["spec"], json!({}));
        let others = live(json!([manager("flux", json!({"f:monthlyTokenLimit": {}}))]));
        let held = HeldField { field: "monthlyTokenLimit".to_owned(), manager: "flux".to_owned() };
        assert_eq!(applied("acme", Some(&others), &clears, false), Err(Problem::Held(vec![held])));
    }

    #[test]
    fn an_object_that_is_not_there_is_made_only_if_it_may_be() {
        let change = SpecChange { plan: Some("enterprise".to_owned()), ..Default::default() };
        assert_eq!(applied("acme", None, &change, false), Ok(None));
        let body = applied("acme", None, &change, true).unwrap().unwrap();
        assert_eq!((&body["metadata"], &body["spec"]), (&json!({"name": "acme"}), &json!({"plan": "enterprise"})));
    }

    #[test]
    fn a_conflict_names_fields_and_managers() {
        let status: Status = serde_json::from_value(json!({
            "status": "Failure", "code": 409, "reason": "Conflict", "message": "Apply failed with 1 conflict",
            "details": {"causes": [{
                "reason": "FieldManagerConflict", "field": ".spec.plan",
                "message": "conflict with \"flux\" using cloister.dev/v1alpha1",
            }]},
        }))
        .unwrap();
        let held = HeldField { field: "plan".to_owned(), manager: "flux".to_owned() };
        assert_eq!(held_fields(&status), [held]);
        let changed = Status { details: None, ..status };
        assert!(matches!(refused(&changed), Failure::Changed));
    }
}
