//! Prints the definition of `tenants.cloister.dev`: what `crds/tenants.yaml` holds.

use std::process::ExitCode;

fn main() -> ExitCode {
    match crds::definition::definition_yaml() {
        Ok(yaml) => {
            print!("{yaml}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("tenants-yaml: {error}");
            ExitCode::FAILURE
        }
    }
}
