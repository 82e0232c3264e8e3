//! What the doors of workers (`/runtime/v1`) and of operators (`/operator/v1`) have in common.

use http::HeaderMap;

/// A protocol as this api speaks it.
pub struct Protocol {
    /// Its name, for people.
    pub name: &'static str,
    /// Who speaks it with the api.
    pub peer: &'static str,
    /// The header that each request names the version in.
    pub header: &'static str,
    /// The only version that is taken.
    pub version: &'static str,
}

impl Protocol {
    /// Checks that a request is of our version.
    ///
    /// # Errors
    /// It is not; the message says what to do.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), String> {
        let Self { name, peer, header, version } = self;
        match headers.get(*header).map(|value| value.to_str().unwrap_or("?")) {
            Some(spoken) if spoken == *version => Ok(()),
            Some(spoken) => {
                let article = if peer.starts_with('o') { "an" } else { "a" };
                Err(format!(
                    "This api speaks version {version} of the {name} protocol, the {peer} version {spoken}. Run {article} \
                     {peer} of the api's release."
                ))
            }
            None => {
                Err(format!("Send `{header}: {version}`: this api speaks version {version} of the {name} protocol."))
            }
        }
    }
}
