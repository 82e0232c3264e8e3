//! The platform as it is installed: its images, its charts by Helm, its tenants by kubectl, on a real cluster with real
//! pods. Nothing runs on this machine but the model server, PostgreSQL and Redis.

mod confinement;
mod life;
mod network;
mod platform;
mod restore;
mod rotation;
mod uninstall;
mod upgrade;
