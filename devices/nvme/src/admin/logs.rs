//! Get Log Page (Base 2.1 §5.1.12).
//!
//! A page is made whole, then what was asked for is cut out. What is asked for behind its end is zero: the host's memory never shows anything but the page.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::Admin;
use super::features::FEATURES;
use crate::spec::admin::{self, RawGetLogPage};
use crate::spec::feature::capability;
use crate::spec::identify::{CSI_NVM, zeroed};
use crate::spec::log::{
    ANA_GROUPS_ONLY, AnaGroup, AnaHeader, FirmwareSlots, Health, effect, id, supported,
};
use crate::spec::{ALL_NAMESPACES, Status, io};

/// Namespaces that the Changed Attached Namespace List has room for.
const CHANGED: usize = 1024;

/// What has changed since the host has looked.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct ChangedNamespaces(BTreeSet<u32>);

impl ChangedNamespaces {
    pub fn add(&mut self, nsid: u32) {
        // One more than there is room for is enough to know that they are too many.
        if self.0.len() <= CHANGED {
            self.0.insert(nsid);
        }
    }

    fn page(&self) -> Vec<u8> {
        let mut page: Vec<u8> = match self.0.len() > CHANGED {
            // Too many to name (§5.1.12.1.5).
            true => ALL_NAMESPACES.to_le_bytes().to_vec(),
            false => self.0.iter().flat_map(|nsid| nsid.to_le_bytes()).collect(),
        };
        page.resize(CHANGED * 4, 0);
        page
    }
}

/// The pages that there are.
const PAGES: [u8; 8] = [
    id::SUPPORTED,
    id::ERRORS,
    id::HEALTH,
    id::FIRMWARE,
    id::CHANGED,
    id::COMMANDS,
    id::FEATURES,
    id::MANAGEMENT,
];

impl Admin {
    /// Just as many bytes as were asked for.
    pub(super) fn log_page(
        &mut self,
        raw: &RawGetLogPage,
        now: Instant,
    ) -> Result<Vec<u8>, Status> {
        // No page is about a namespace (LPA bit 0 is clear for the health page).
        let page = self.whole_page(raw, now)?;
        if !matches!(raw.nsid, 0 | ALL_NAMESPACES) {
            return Err(Status::INVALID_FIELD);
        }
        let len = usize::try_from(raw.bytes()).map_err(|_| Status::INVALID_FIELD)?;
        let from = usize::try_from(raw.offset).map_err(|_| Status::INVALID_FIELD)?;
        // An offset past the end is an error; just at the end there is nothing (§5.1.12, LPOL).
        let rest = page.get(from..).ok_or(Status::INVALID_FIELD)?;
        let mut data = rest[..rest.len().min(len)].to_vec();
        data.resize(len, 0);
        if !raw.retain {
            self.events.log_read(raw.lid);
            if raw.lid == id::CHANGED {
                self.changed = ChangedNamespaces::default();
            }
        }
        Ok(data)
    }

    fn whole_page(&self, raw: &RawGetLogPage, now: Instant) -> Result<Vec<u8>, Status> {
        Ok(match raw.lid {
            id::SUPPORTED => self.supported_pages(),
            id::ERRORS => self.errors.page(),
            id::HEALTH => self.health(now).as_bytes().to_vec(),
            id::FIRMWARE => self.firmware().as_bytes().to_vec(),
            id::CHANGED => self.changed.page(),
            id::COMMANDS => self.commands(raw.csi),
            id::ANA if self.has_ana() => self.ana(raw.lsp & ANA_GROUPS_ONLY != 0),
            id::FEATURES => self.features_page(),
            // Of NVMe-MI commands there is none.
            id::MANAGEMENT => vec![0; 4096],
            _ => return Err(Status::LOG_PAGE),
        })
    }

    fn has_ana(&self) -> bool {
        self.subsystem.options().shared
    }

    fn supported_pages(&self) -> Vec<u8> {
        let ana = self.has_ana().then_some(id::ANA);
        let all = PAGES.into_iter().chain(ana);
        dwords(256, all.map(|lid| (lid, supported::LSUPP)))
    }

    fn health(&self, now: Instant) -> Health {
        let counters = &self.counters;
        let load = |cell: &std::sync::atomic::AtomicU64| wide(cell.load(Ordering::Relaxed));
        let totals = counters.totals();
        // Thousands of units of 512 bytes, rounded up: 0 means that nothing was moved at all.
        let units = |bytes: u64| wide(bytes.div_ceil(512).div_ceil(1000));
        let mut h: Health = zeroed();
        h.warning = self.warning();
        h.temperature = counters.kelvins.load(Ordering::Relaxed).to_le_bytes();
        h.spare = counters.spare.load(Ordering::Relaxed).min(100);
        h.spare_threshold = counters.spare_threshold.load(Ordering::Relaxed).min(100);
        h.data_units_read = units(totals.bytes_read);
        h.data_units_written = units(totals.bytes_written);
        h.reads = wide(totals.reads);
        h.writes = wide(totals.writes);
        h.busy_minutes = wide(counters.busy_us.load(Ordering::Relaxed) / 60_000_000);
        h.power_cycles = load(&counters.power_cycles);
        h.power_on_hours = wide(counters.hours(now));
        h.unsafe_shutdowns = load(&counters.unsafe_shutdowns);
        h.media_errors = wide(totals.media_errors);
        h.error_entries = load(&counters.error_entries);
        h
    }

    fn firmware(&self) -> FirmwareSlots {
        let mut f: FirmwareSlots = zeroed();
        f.active = 1;
        f.revisions[0] = super::identify::text(&self.options.firmware);
        f
    }

    /// Of an I/O command set that is not here, the I/O commands that are supported are none. An error would be as right, but nvme-cli asks every controller that
    /// has command sets for those of zoned namespaces as well.
    fn commands(&self, csi: u8) -> Vec<u8> {
        use effect::{
            ALONE, CONTENT, CONTROLLER, NAMESPACE, SCOPE_CONTROLLER, SCOPE_NAMESPACE, SUPPORTED,
        };
        let controller = SUPPORTED | SCOPE_CONTROLLER;
        let mut commands: Vec<(u8, u32)> = [
            admin::DELETE_SQ,
            admin::CREATE_SQ,
            admin::GET_LOG_PAGE,
            admin::DELETE_CQ,
            admin::CREATE_CQ,
            admin::IDENTIFY,
            admin::ABORT,
            admin::GET_FEATURES,
            admin::ASYNC_EVENT,
        ]
        .map(|opcode| (opcode, controller))
        .to_vec();
        commands.push((admin::SET_FEATURES, controller | CONTROLLER));
        commands.push((
            admin::FORMAT_NVM,
            SUPPORTED | SCOPE_NAMESPACE | CONTENT | NAMESPACE | ALONE,
        ));
        if self.options.shadow_doorbells {
            commands.push((admin::DOORBELL_BUFFER, controller));
        }
        let namespace = SUPPORTED | SCOPE_NAMESPACE;
        let io = [io::FLUSH, io::READ, io::COMPARE, io::VERIFY].map(|o| (o, namespace));
        let changing = [
            io::WRITE,
            io::WRITE_ZEROES,
            io::DATASET_MANAGEMENT,
            io::COPY,
        ]
        .map(|opcode| (opcode, namespace | CONTENT));
        let mut page = dwords(256, commands);
        if csi == CSI_NVM {
            page.extend(dwords(256, io.into_iter().chain(changing)));
        }
        page.resize(4096, 0);
        page
    }

    fn features_page(&self) -> Vec<u8> {
        use effect::{SCOPE_CONTROLLER, SCOPE_NAMESPACE, SUPPORTED};
        let missing = (!self.has_cache).then_some(crate::spec::feature::id::WRITE_CACHE);
        let all = FEATURES
            .into_iter()
            .filter(|(fid, _)| Some(*fid) != missing);
        let scoped = all.map(|(fid, able)| match able & capability::NAMESPACE {
            0 => (fid, SUPPORTED | SCOPE_CONTROLLER),
            _ => (fid, SUPPORTED | SCOPE_NAMESPACE),
        });
        dwords(256, scoped)
    }

    fn ana(&self, groups_only: bool) -> Vec<u8> {
        let mut groups: BTreeMap<u32, (u8, Vec<u32>)> = BTreeMap::new();
        for n in self.table.iter() {
            let group = groups.entry(n.group);
            let group = group.or_insert_with(|| (n.ana.value(), Vec::new()));
            group.1.push(n.nsid());
        }
        let header = AnaHeader {
            changes: U64::new(self.ana_changes),
            groups: U16::new(groups.len() as u16),
            reserved: [0; 6],
        };
        let mut page = header.as_bytes().to_vec();
        for (group, (state, mut nsids)) in groups {
            if groups_only {
                nsids.clear();
            }
            let descriptor = AnaGroup {
                group: U32::new(group),
                namespaces: U32::new(nsids.len() as u32),
                changes: U64::new(self.subsystem.ana_changes(self.id, group)),
                state,
                reserved: [0; 15],
            };
            page.extend_from_slice(descriptor.as_bytes());
            page.extend(nsids.iter().flat_map(|nsid| nsid.to_le_bytes()));
        }
        page
    }
}

/// A page of dwords, at their numbers.
fn dwords(count: usize, values: impl IntoIterator<Item = (u8, u32)>) -> Vec<u8> {
    let mut page = vec![0; count * 4];
    for (at, value) in values {
        page[usize::from(at) * 4..][..4].copy_from_slice(&value.to_le_bytes());
    }
    page
}

/// A counter of 16 bytes.
fn wide(value: u64) -> [u8; 16] {
    u128::from(value).to_le_bytes()
}
