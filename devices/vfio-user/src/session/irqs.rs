//! `DEVICE_SET_IRQS`.

use super::{Reply, Session};
use crate::Error;
use crate::request::IrqData;
use crate::spec::irq;
use crate::target::{IrqAction, IrqChange, Irqs, Target};

impl<T: Target> Session<T> {
    /// The type of interrupts, if there is one.
    pub(super) fn irqs(&self, index: u32) -> Result<Irqs, Error> {
        if index >= self.target.irq_types() {
            return Err(Error::Value {
                field: "type of interrupts",
                value: index.into(),
            });
        }
        Ok(self.target.irqs(index))
    }

    pub(super) fn set_irqs(
        &mut self,
        index: u32,
        start: u32,
        count: u32,
        action: IrqAction,
        data: IrqData,
    ) -> Result<Reply, Error> {
        let irqs = self.irqs(index)?;
        let change = match (count, start, action, data) {
            (0, 0, IrqAction::Trigger, IrqData::None) => IrqChange::Disable,
            (0, ..) => {
                return Err(Error::Value {
                    field: "number of interrupts",
                    value: 0,
                });
            }
            (_, _, action, data) => {
                let end = start.checked_add(count).filter(|end| *end <= irqs.count);
                let end = end.ok_or(Error::Value {
                    field: "interrupts past",
                    value: u64::from(start) + u64::from(count),
                })?;
                let needed = match (action, &data) {
                    (_, IrqData::Files(_)) => irq::EVENTFD,
                    (IrqAction::Mask | IrqAction::Unmask, _) => irq::MASKABLE,
                    (IrqAction::Trigger, _) => 0,
                };
                if irqs.flags & needed != needed {
                    return Err(Error::Value {
                        field: "action on interrupts of type",
                        value: index.into(),
                    });
                }
                match data {
                    IrqData::None => IrqChange::Now {
                        action,
                        vectors: (start..end).collect(),
                    },
                    IrqData::Which(which) => IrqChange::Now {
                        action,
                        vectors: (start..end)
                            .zip(which)
                            .filter(|(_, is)| *is)
                            .map(|(i, _)| i)
                            .collect(),
                    },
                    IrqData::Files(files) if files.is_empty() => IrqChange::Assign {
                        action,
                        start,
                        files: (0..count).map(|_| None).collect(),
                    },
                    IrqData::Files(files) => IrqChange::Assign {
                        action,
                        start,
                        files: files.into_iter().map(Some).collect(),
                    },
                }
            }
        };
        self.target.set_irqs(index, change).map_err(Error::Target)?;
        Ok(Reply::default())
    }
}
