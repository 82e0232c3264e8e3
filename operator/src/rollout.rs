//! A new runtime image reaches a few tenants at once, so that one that doesn't start stops there.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use k8s_openapi::api::apps::v1::Deployment;

/// Who is getting the new image.
pub struct Rollouts {
    max: usize,
    /// Namespaces that were let in and whose workers were not seen to be done.
    admitted: Mutex<HashSet<String>>,
}

impl Rollouts {
    /// At most `max` at once.
    pub fn new(max: usize) -> Self {
        Self { max, admitted: Mutex::default() }
    }

    /// Whether this namespace may get `image` now. `all` are all tenants' workers, by their namespaces.
    pub fn admits(&self, namespace: &str, image: &str, all: &[(String, Progress)]) -> bool {
        let mut admitted = self.admitted.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rolling = HashSet::new();
        let mut settled = HashSet::new();
        for (namespace, progress) in all.iter().filter(|(_, progress)| progress.image.as_deref() == Some(image)) {
            let names = if progress.is_complete { &mut settled } else { &mut rolling };
            names.insert(namespace.clone());
        }
        // One that is gone is done as well.
        let exists = |namespace: &String| all.iter().any(|(other, _)| other == namespace);
        admitted.retain(|namespace| !settled.contains(namespace) && exists(namespace));
        rolling.extend(admitted.iter().cloned());
        if !rolling.contains(namespace) && rolling.len() >= self.max {
            return false;
        }
        admitted.insert(namespace.to_owned());
        true
    }
}

/// How far a tenant's workers are with an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The image that they are to have.
    pub image: Option<String>,
    /// Whether all have it, and are ready.
    pub is_complete: bool,
}

impl Progress {
    /// As a Deployment tells it.
    pub fn of(deployment: &Deployment) -> Self {
        Self { image: image(deployment).map(str::to_owned), is_complete: is_complete(deployment) }
    }
}

/// The image of a tenant's workers.
pub fn image(deployment: &Deployment) -> Option<&str> {
    deployment.spec.as_ref()?.template.spec.as_ref()?.containers.first()?.image.as_deref()
}

/// Whether every worker is of the latest template, and ready.
pub fn is_complete(deployment: &Deployment) -> bool {
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    deployment.status.as_ref().is_some_and(|status| {
        status.observed_generation >= deployment.metadata.generation
            && status.updated_replicas.unwrap_or(0) == wanted
            && status.replicas.unwrap_or(0) == wanted
            && status.ready_replicas.unwrap_or(0) == wanted
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn deployment(namespace: &str, image: &str, ready: i32) -> (String, Progress) {
        let container = json!({"name": "runtime", "image": image});
        let value = json!({
            "metadata": {"name": "cloister-runtime", "namespace": namespace, "generation": 2},
            "spec": {
                "replicas": 1,
                "selector": {},
                "template": {"spec": {"containers": [container]}},
            },
            "status": {"observedGeneration": 2, "replicas": 1, "updatedReplicas": 1, "readyReplicas": ready},
        });
        (namespace.to_owned(), Progress::of(&serde_json::from_value(value).unwrap()))
    }

    #[test]
    fn a_few_at_once() {
        let rollouts = Rollouts::new(2);
        let mut all = ["a", "b", "c", "d"].map(|namespace| deployment(namespace, "old", 1));
        assert!(rollouts.admits("a", "new", &all) && rollouts.admits("b", "new", &all));
        assert!(!rollouts.admits("c", "new", &all));
        assert!(rollouts.admits("a", "new", &all), "it is in already");
        all[0] = deployment("a", "new", 0);
        assert!(!rollouts.admits("c", "new", &all), "a has the image, and is not ready");
        all[0] = deployment("a", "new", 1);
        assert!(rollouts.admits("c", "new", &all));
        assert!(!rollouts.admits("d", "new", &all));
    }

    #[test]
    fn those_that_roll_since_before_the_start_count() {
        let rollouts = Rollouts::new(1);
        let all = [deployment("a", "new", 0), deployment("b", "old", 1)];
        assert!(!rollouts.admits("b", "new", &all));
    }
}
