//! Interrupts ("VFIO_USER_DEVICE_SET_IRQS").

use std::os::fd::BorrowedFd;

use zerocopy::IntoBytes;

use crate::spec::{self, QEMU_FDS, command, irq};
use crate::{Client, Error};

/// What is done to interrupts, or what a descriptor is signalled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// The device raises it.
    Trigger,
    /// It is masked.
    Mask,
    /// It is unmasked.
    Unmask,
}

/// What goes with the action.
#[derive(Clone, Copy, Debug)]
pub enum IrqData<'a> {
    /// All `count` of them.
    None {
        /// How many.
        count: u32,
    },
    /// Those that are true.
    Bools(&'a [bool]),
    /// One descriptor for each.
    Events(&'a [BorrowedFd<'a>]),
    /// The descriptors of so many are dropped.
    Drop {
        /// How many.
        count: u32,
    },
}

impl Client {
    /// Sends one message, in which the descriptors must have room.
    ///
    /// # Errors
    /// As any command.
    pub fn set_irqs(
        &self,
        index: u32,
        start: u32,
        action: IrqAction,
        data: IrqData<'_>,
    ) -> Result<(), Error> {
        let bytes: Vec<u8>;
        let (mut body, mut files): (&[u8], &[BorrowedFd<'_>]) = (&[], &[]);
        let (kind, count) = match data {
            IrqData::None { count } => (irq::DATA_NONE, count),
            IrqData::Drop { count } => (irq::DATA_EVENTFD, count),
            IrqData::Bools(bools) => {
                bytes = bools.iter().map(|b| u8::from(*b)).collect();
                body = &bytes;
                (irq::DATA_BOOL, bools.len() as u32)
            }
            IrqData::Events(events) => {
                files = events;
                (irq::DATA_EVENTFD, events.len() as u32)
            }
        };
        let what = match action {
            IrqAction::Trigger => irq::TRIGGER,
            IrqAction::Mask => irq::MASK,
            IrqAction::Unmask => irq::UNMASK,
        };
        let raw = spec::SetIrqs {
            argsz: ((size_of::<spec::SetIrqs>() + body.len()) as u32).into(),
            flags: (kind | what).into(),
            index: index.into(),
            start: start.into(),
            count: count.into(),
        };
        let reply = self.ask(command::DEVICE_SET_IRQS, &[raw.as_bytes(), body], files)?;
        reply.empty()
    }

    /// Has interrupts signalled by these descriptors from now on, in as many messages as it takes.
    ///
    /// # Errors
    /// As any command.
    pub fn set_events(
        &self,
        index: u32,
        start: u32,
        events: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        let most = (self.agreed().max_fds as usize).clamp(1, QEMU_FDS);
        for (i, chunk) in events.chunks(most).enumerate() {
            let start = start + (i * most) as u32;
            self.set_irqs(index, start, IrqAction::Trigger, IrqData::Events(chunk))?;
        }
        Ok(())
    }

    /// Drops all descriptors of a type.
    ///
    /// # Errors
    /// As any command.
    pub fn disable_irqs(&self, index: u32) -> Result<(), Error> {
        self.set_irqs(index, 0, IrqAction::Trigger, IrqData::None { count: 0 })
    }
}
