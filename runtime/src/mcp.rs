//! Placeholder.
#![allow(missing_docs)]
use crate::model::ToolDefinition;
use crate::spec::McpServer;
use std::time::Duration;
#[derive(Clone, Debug, Default)]
pub struct McpClient;
pub struct McpOutput {
    pub text: String,
    pub is_error: bool,
}
#[derive(Debug, thiserror::Error)]
pub enum McpError {
    #[error("timed out")]
    TimedOut {},
    #[error("unreachable")]
    Unreachable,
}
impl McpClient {
    pub fn new(_policy: crate::webhook::AddressPolicy) -> Result<Self, reqwest::Error> {
        Ok(Self)
    }
    pub async fn list(&self, _server: &McpServer) -> Result<Vec<ToolDefinition>, McpError> {
        Err(McpError::Unreachable)
    }
    pub async fn call(
        &self,
        _server: &McpServer,
        _tool: &str,
        _arguments: serde_json::Value,
        _timeout: Duration,
    ) -> Result<McpOutput, McpError> {
        Err(McpError::TimedOut {})
    }
}
