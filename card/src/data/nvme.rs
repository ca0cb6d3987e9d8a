//! NVMe functions.

use anyhow::{Result, bail};

use super::Data;
use crate::spec::{FunctionSpec, Id, NamespaceSpec, SubsystemSpec};

impl Data {
    pub(super) fn attach_nvme(
        &mut self,
        _id: &Id,
        _spec: FunctionSpec,
        _subsystem: Option<SubsystemSpec>,
        _order: Vec<usize>,
        _descriptors: u32,
    ) -> Result<()> {
        bail!("draft")
    }

    pub(super) fn add_namespace(
        &mut self,
        _function: &Id,
        _namespace: &NamespaceSpec,
    ) -> Result<()> {
        bail!("draft")
    }

    pub(super) fn remove_namespace(
        &mut self,
        _number: u64,
        _function: Id,
        _nsid: u32,
    ) -> Result<()> {
        bail!("draft")
    }
}
