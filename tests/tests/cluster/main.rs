//! The tests on a real Kubernetes cluster, which the first of them starts; a module an area.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod charts;
mod doors;
mod installed;
mod operator;
mod smoke;
mod support;
