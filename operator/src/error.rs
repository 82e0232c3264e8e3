//! Why a look at a tenant came to nothing: it is taken again, later each time.

use crate::api::ApiError;
use crate::quantity::NotAQuantity;

/// Why a look at a tenant came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The Kubernetes API did not take a write.
    #[error("{verb} {kind} {name}: {}", told(.source))]
    Write {
        /// `create`, `apply`, `replace`, `patch` or `delete`.
        verb: &'static str,
        /// The object's kind.
        kind: &'static str,
        /// The object's name, with its namespace.
        name: String,
        /// What the Kubernetes API says.
        source: Box<kube::Error>,
    },
    /// Something in the cluster changes what is written as it is written.
    #[error(
        "{kind} {name}: a mutating policy or webhook of the cluster makes it another one than was written ({difference}). \
         Exempt tenants' namespaces from it."
    )]
    Contested {
        /// The object's kind.
        kind: &'static str,
        /// The object's name, with its namespace.
        name: String,
        /// What was made of it.
        difference: &'static str,
    },
    /// The api did not do what it has to do first.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The spec holds what the schema refuses.
    #[error(transparent)]
    Spec(#[from] NotAQuantity),
    /// The look itself broke off, which is a fault of the operator's.
    #[error("a look at the tenant broke off: {0}")]
    Broken(String),
}

impl Error {
    /// In one CamelCase word, for conditions and metrics.
    pub fn reason(&self) -> String {
        match self {
            Error::Write { source, .. } => match source.as_ref() {
                kube::Error::Api(status) if !status.reason.is_empty() => status.reason.clone(),
                kube::Error::Api(_) => "KubernetesApiError".to_owned(),
                _ => "KubernetesApiUnreachable".to_owned(),
            },
            Error::Contested { .. } => "Contested".to_owned(),
            Error::Api(error) => error.reason().to_owned(),
            Error::Spec(_) => "InvalidSpec".to_owned(),
            Error::Broken(_) => "InternalError".to_owned(),
        }
    }

    /// Whether what was written is not as it was when it was read: another look sees it as it is.
    pub fn is_conflict(&self) -> bool {
        let Error::Write { source, .. } = self else { return false };
        matches!(source.as_ref(), kube::Error::Api(status) if status.code == 409)
    }

    /// Whether what was to be written or deleted is not there.
    pub fn is_not_found(&self) -> bool {
        let Error::Write { source, .. } = self else { return false };
        matches!(source.as_ref(), kube::Error::Api(status) if status.code == 404)
    }
}

/// The Kubernetes API's own sentence where there is one.
fn told(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        error => error.to_string(),
    }
}
