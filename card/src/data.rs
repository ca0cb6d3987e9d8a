//! The data half: reactors, queues and channels.

use std::os::fd::OwnedFd;

use anyhow::Result;

use crate::data_half::Options;
use crate::message::{FromData, Link, LinkError, Numbered, Subject, ToData};

/// Serves the socket until it is drained, or the other end closes.
///
/// # Errors
/// Where the socket fails.
pub fn run(socket: OwnedFd, _options: &Options) -> Result<()> {
    let mut link: Link<Numbered<FromData>, Numbered<ToData>> = Link::new(socket);
    loop {
        let (Numbered { number, message }, _descriptors) = match link.receive() {
            Ok(Some(message)) => message,
            Ok(None) => continue,
            Err(LinkError::Closed) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let is_last = matches!(message, ToData::Drain { .. });
        let answer = match message {
            ToData::Start { .. } => FromData::Started { reactors: 1 },
            ToData::Drain { .. } => FromData::Drained,
            ToData::Statistics { .. } => FromData::Statistics {
                statistics: Default::default(),
                more: false,
            },
            ToData::Connection { .. } | ToData::Restore { .. } => continue,
            ToData::OpenVolume { volume, .. }
            | ToData::CloseVolume { volume }
            | ToData::ResizeVolume { volume, .. } => FromData::Failed {
                about: Subject::Volume(volume),
                error: NO_REACTORS.to_owned(),
            },
            ToData::AttachFunction { function, .. } | ToData::DetachFunction { function } => {
                FromData::Failed {
                    about: Subject::Function(function),
                    error: NO_REACTORS.to_owned(),
                }
            }
        };
        link.send(
            &Numbered {
                number,
                message: answer,
            },
            &[],
        )?;
        if is_last {
            return Ok(());
        }
    }
}

/// Why a data half without reactors refuses.
const NO_REACTORS: &str = "this data half has no reactors";
