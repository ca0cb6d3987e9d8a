//! A command as what it asks for. What no controller of ours could do is refused here.

use super::{QueueCommand, Transfer};
use crate::spec::admin::{
    self, RawAbort, RawCreateCq, RawCreateSq, RawFeature, RawFormat, RawGetLogPage, RawIdentify,
};
use crate::spec::feature::{HostBehavior, Select, Timestamp, id};
use crate::spec::{Command, Psdt, Status, identify};

/// An admin command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Identify(RawIdentify),
    GetLogPage(RawGetLogPage),
    GetFeatures(RawFeature, Select),
    SetFeatures(RawFeature),
    Event,
    Abort(RawAbort),
    Queue(QueueCommand),
    Format(RawFormat),
}

impl Request {
    pub fn parse(command: &Command, shadow_doorbells: bool, page: u64) -> Result<Self, Status> {
        let request = match command.opcode {
            admin::DELETE_SQ => Self::Queue(QueueCommand::DeleteSq(command.cdw10.get() as u16)),
            admin::CREATE_SQ => Self::Queue(QueueCommand::CreateSq(RawCreateSq::from(command))),
            admin::GET_LOG_PAGE => Self::GetLogPage(log_page(command)?),
            admin::DELETE_CQ => Self::Queue(QueueCommand::DeleteCq(command.cdw10.get() as u16)),
            admin::CREATE_CQ => Self::Queue(QueueCommand::CreateCq(RawCreateCq::from(command))),
            admin::IDENTIFY => Self::Identify(command.into()),
            admin::ABORT => Self::Abort(command.into()),
            admin::SET_FEATURES => Self::SetFeatures(set_features(command)?),
            admin::GET_FEATURES => {
                let raw = RawFeature::from(command);
                let select = Select::parse(raw.select).ok_or(Status::INVALID_FIELD)?;
                Self::GetFeatures(raw, select)
            }
            admin::ASYNC_EVENT => Self::Event,
            admin::DOORBELL_BUFFER if shadow_doorbells => {
                Self::Queue(doorbell_buffer(command, page)?)
            }
            admin::FORMAT_NVM => Self::Format(command.into()),
            // Firmware, namespace management and attachment, security, directives, self-test, sanitize, virtualization, NVMe-MI, keep
            // alive (not for PCIe), and what is reserved or a vendor's.
            _ => return Err(Status::INVALID_OPCODE),
        };
        // No admin command can be fused, and over PCIe none has an SGL (§4.1.1).
        if command.fused() != 0 || command.psdt() != Some(Psdt::Prp) {
            return Err(Status::INVALID_FIELD);
        }
        Ok(request)
    }

    pub fn transfer(&self) -> Transfer {
        match self {
            Self::Identify(_) => Transfer::ToHost(identify::LEN),
            // More than memory has is more than MDTS, too.
            Self::GetLogPage(log) => {
                Transfer::ToHost(usize::try_from(log.bytes()).unwrap_or(usize::MAX))
            }
            // What it can do is no data.
            Self::GetFeatures(_, Select::Capabilities) => Transfer::None,
            Self::GetFeatures(raw, _) => match feature_len(raw) {
                0 => Transfer::None,
                len => Transfer::ToHost(len),
            },
            Self::SetFeatures(raw) => match feature_len(raw) {
                0 => Transfer::None,
                len => Transfer::FromHost(len),
            },
            Self::Event | Self::Abort(_) | Self::Queue(_) | Self::Format(_) => Transfer::None,
        }
    }
}

/// How many bytes a feature has beside its dword.
pub(super) fn feature_len(raw: &RawFeature) -> usize {
    match raw.fid {
        id::TIMESTAMP => size_of::<Timestamp>(),
        id::HOST_BEHAVIOR => size_of::<HostBehavior>(),
        // EXHID says which size it has (§5.1.25, Host Identifier).
        id::HOST_ID if raw.cdw11 & 1 == 0 => 8,
        id::HOST_ID => 16,
        _ => 0,
    }
}

fn set_features(command: &Command) -> Result<RawFeature, Status> {
    let raw = RawFeature::from(command);
    // No feature outlives power.
    match raw.save {
        true => Err(Status::NOT_SAVEABLE),
        false => Ok(raw),
    }
}

fn log_page(command: &Command) -> Result<RawGetLogPage, Status> {
    let raw = RawGetLogPage::from(command);
    // An offset is a multiple of 4 (LPOL bits 1:0), and no page has an index (§5.1.12).
    match raw.index || !raw.offset.is_multiple_of(4) {
        true => Err(Status::INVALID_FIELD),
        false => Ok(raw),
    }
}

fn doorbell_buffer(command: &Command, page: u64) -> Result<QueueCommand, Status> {
    let [shadow, event] = command.dptr.map(|entry| entry.get());
    // Two pages, no list (§5.2.5).
    match shadow.is_multiple_of(page) && event.is_multiple_of(page) {
        true => Ok(QueueCommand::DoorbellBuffer { shadow, event }),
        false => Err(Status::INVALID_FIELD),
    }
}
