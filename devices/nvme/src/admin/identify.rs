//! Identify (Base 2.1 §5.1.13; NVM Command Set 1.1 §4.1.5).

use std::sync::Arc;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::Admin;
use super::errors::ENTRIES;
use super::features::WARNING_KELVINS;
use crate::attached::{AnaState, Attached, Table};
use crate::spec::admin::RawIdentify;
use crate::spec::identify::{
    CSI_NVM, DescriptorHeader, IdentifyController, IdentifyNamespace, IndependentNamespace, LEN,
    LbaFormat, NvmController, NvmNamespace, cns, descriptor, zeroed,
};
use crate::spec::registers::VERSION;
use crate::spec::{ALL_NAMESPACES, Status};
use crate::subsystem::ANA_GROUPS;

/// CCTEMP: 80 °C.
const CRITICAL_KELVINS: u16 = 353;
/// An ANA transition takes so many seconds at most.
const ANA_SECONDS: u8 = 10;

/// What a host gets of a namespace.
enum Found {
    Namespace(Arc<Attached>),
    /// Its identifier is valid, but it is not there: all zero.
    Inactive,
}

impl Admin {
    pub(super) fn identify(&self, raw: &RawIdentify) -> Result<Vec<u8>, Status> {
        let nvm = || match raw.csi {
            CSI_NVM => Ok(()),
            _ => Err(Status::COMMAND_SET_UNSUPPORTED),
        };
        match raw.cns {
            cns::NAMESPACE => self.of(&self.table, raw.nsid, |n| page(self.namespace(n))),
            cns::CONTROLLER => Ok(page(self.controller())),
            cns::ACTIVE => list_after(&self.table, raw.nsid),
            cns::DESCRIPTORS => self.descriptors(raw.nsid),
            cns::SET_NAMESPACE => {
                nvm()?;
                self.of(&self.table, raw.nsid, |_| page(nvm_namespace()))
            }
            cns::SET_CONTROLLER => {
                nvm()?;
                Ok(page(self.nvm_controller()))
            }
            cns::SET_ACTIVE => {
                nvm()?;
                list_after(&self.table, raw.nsid)
            }
            cns::INDEPENDENT => self.of(&self.table, raw.nsid, |n| page(self.independent(n))),
            cns::ALLOCATED => list_after(&self.allocated(), raw.nsid),
            cns::ALLOCATED_NAMESPACE => {
                self.of(&self.allocated(), raw.nsid, |n| page(self.namespace(n)))
            }
            cns::ATTACHED_CONTROLLERS => {
                self.of(&self.allocated(), raw.nsid, |_| Vec::new())?;
                let all = self.subsystem.attached_controllers(raw.nsid);
                Ok(controllers_from(&all.unwrap_or_default(), raw.cntid))
            }
            cns::CONTROLLERS => Ok(controllers_from(&self.subsystem.controllers(), raw.cntid)),
            cns::SET_ALLOCATED => {
                nvm()?;
                list_after(&self.allocated(), raw.nsid)
            }
            cns::SET_ALLOCATED_NAMESPACE => {
                nvm()?;
                self.of(&self.allocated(), raw.nsid, |_| page(nvm_namespace()))
            }
            cns::COMMAND_SETS => self.command_sets(raw.cntid),
            cns::INDEPENDENT_ALLOCATED => {
                self.of(&self.allocated(), raw.nsid, |n| page(self.independent(n)))
            }
            // NVM sets, virtualization, granularity, UUIDs, domains, endurance groups, user data formats, ports: none of them is there.
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn allocated(&self) -> Table {
        self.subsystem.allocated(self.id)
    }

    fn find(&self, table: &Table, nsid: u32) -> Result<Found, Status> {
        match table.get(nsid, self.subsystem.options().max_namespaces) {
            Ok(namespace) => Ok(Found::Namespace(namespace.clone())),
            // Namespace management is not offered, so FFFFFFFFh is no "what they have in common" (§5.1.13.2).
            Err(Status::INVALID_NAMESPACE) => Err(Status::INVALID_NAMESPACE),
            Err(_) => Ok(Found::Inactive),
        }
    }

    fn of(
        &self,
        table: &Table,
        nsid: u32,
        describe: impl FnOnce(&Attached) -> Vec<u8>,
    ) -> Result<Vec<u8>, Status> {
        Ok(match self.find(table, nsid)? {
            Found::Namespace(namespace) => describe(&namespace),
            Found::Inactive => vec![0; LEN],
        })
    }

    fn controller(&self) -> IdentifyController {
        let (options, subsystem) = (&self.options, self.subsystem.options());
        let mut c: IdentifyController = zeroed();
        c.vid = U16::new(options.vendor);
        c.ssvid = U16::new(options.subsystem_vendor);
        c.sn = text(&options.serial);
        c.mn = text(&options.model);
        c.fr = text(&options.firmware);
        c.rab = 4;
        c.mdts = exponent(options.max_transfer as u64);
        c.cntlid = U16::new(self.id);
        c.ver = U32::new(VERSION);
        c.oaes = U32::new(self.optional_events());
        // Host identifiers of 128 bits.
        c.ctratt = U32::new(1);
        // An I/O controller.
        c.cntrltype = 1;
        // Format NVM; Doorbell Buffer Config.
        c.oacs = U16::new(1 << 1 | u16::from(options.shadow_doorbells) << 8);
        c.acl = options.aborts_z;
        c.aerl = options.event_requests_z;
        // One slot, which is read-only.
        c.frmw = 1 << 1 | 1;
        // Commands Supported and Effects; offsets and lengths of 32 bits; the pages 00h, 05h with scopes, 12h, 13h.
        c.lpa = 1 << 1 | 1 << 2 | 1 << 5;
        c.elpe = ENTRIES as u8 - 1;
        c.wctemp = U16::new(WARNING_KELVINS);
        c.cctemp = U16::new(CRITICAL_KELVINS);
        c.sqes = 0x66;
        c.cqes = 0x44;
        c.nn = U32::new(subsystem.max_namespaces);
        // Compare, Dataset Management, Write Zeroes, Save and Select, Timestamp, Verify, Copy.
        c.oncs = U16::new(1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 8);
        // FNA is 0: each namespace is formatted for itself, FFFFFFFFh is taken, there is no cryptographic erase. Flush with FFFFFFFFh: bits 2:1, 11b does it, 10b refuses it.
        c.vwc = u8::from(self.has_cache) | (2 | u8::from(options.limits.flush_all)) << 1;
        // Copy: format 0.
        c.ocfs = U16::new(1);
        c.sgls = U32::new(options.limits.sgls);
        c.mnan = U32::new(subsystem.max_namespaces);
        let nqn = subsystem.nqn.as_bytes();
        c.subnqn[..nqn.len()].copy_from_slice(nqn);
        if subsystem.shared {
            // Several ports, several controllers, ANA.
            c.cmic = 1 | 1 << 1 | 1 << 3;
            c.anatt = ANA_SECONDS;
            // All five states; a namespace's group does not change while it is attached.
            c.anacap = 0x1f | 1 << 6;
            c.anagrpmax = U32::new(ANA_GROUPS);
            c.nanagrpid = U32::new(ANA_GROUPS);
        }
        c
    }

    fn namespace(&self, n: &Attached) -> IdentifyNamespace {
        let geometry = &n.geometry;
        let limits = &self.options.limits;
        let blocks = U64::new(n.blocks());
        let short = |blocks: u64| U16::new(u16::try_from(blocks).unwrap_or(u16::MAX));
        // Zero's based, at least one block.
        let granularity = |bytes: u32| short((u64::from(bytes) >> n.shift()).max(1) - 1);
        let mut i: IdentifyNamespace = zeroed();
        (i.nsze, i.ncap, i.nuse) = (blocks, blocks, blocks);
        // Preferred granularities and alignments are given (OPTPERF).
        i.nsfeat = 1 << 4;
        i.npwg_z = granularity(geometry.physical_block_size);
        i.npwa_z = i.npwg_z;
        let discard = geometry.discard.map_or(0, |d| d.granularity);
        i.npdg_z = granularity(discard);
        i.npda_z = i.npdg_z;
        i.nows_z = granularity(geometry.optimal_io.max(geometry.physical_block_size));
        let formats = self.subsystem.options().formats(geometry);
        for (at, shift) in formats.enumerate() {
            i.lbaf[at] = LbaFormat {
                ms: U16::ZERO,
                lbads: shift,
                // Smaller than what the storage writes: worse.
                rp: u8::from(1u32 << shift < geometry.physical_block_size),
            };
            i.nlbaf = at as u8;
        }
        i.flbas = n.format;
        i.nmic = u8::from(n.shared);
        // What a deallocated block reads as is not said; Write Zeroes with deallocate, where zeroes can give storage back.
        let unmaps = geometry.write_zeroes.is_some_and(|z| z.unmap);
        i.dlfeat = u8::from(unmaps && !geometry.read_only) << 3;
        i.nvmcap = (u128::from(n.blocks()) << n.shift()).to_le_bytes();
        i.mssrl = U16::new(limits.copy_range_blocks);
        i.mcl = U32::new(limits.copy_blocks);
        i.msrc_z = u8::try_from(limits.copy_ranges.saturating_sub(1)).unwrap_or(u8::MAX);
        i.anagrpid = self.group(n);
        i.nsattr = u8::from(geometry.read_only);
        i.nguid = n.identity.nguid;
        i.eui64 = n.identity.eui64;
        i
    }

    /// Without ANA there are no groups.
    fn group(&self, n: &Attached) -> U32 {
        U32::new(if n.shared { n.group } else { 0 })
    }

    fn independent(&self, n: &Attached) -> IndependentNamespace {
        let mut i: IndependentNamespace = zeroed();
        i.nmic = u8::from(n.shared);
        i.anagrpid = self.group(n);
        i.nsattr = u8::from(n.geometry.read_only);
        let ready = matches!(n.ana, AnaState::Optimized | AnaState::NonOptimized);
        i.nstat = u8::from(ready && !n.namespace.is_blocked());
        i
    }

    fn nvm_controller(&self) -> NvmController {
        let limits = &self.options.limits;
        let mut c: NvmController = zeroed();
        c.vsl = limits.verify.map_or(0, exponent);
        c.wzsl = limits.zeroes.map_or(0, exponent);
        c.dmrl = limits.ranges;
        c.dmrsl = U32::new(limits.range_blocks);
        c.dmsl = U64::new(limits.total_blocks);
        // NVM Command Set 1.1.
        c.ver = U32::new(0x0001_0100);
        c
    }

    fn descriptors(&self, nsid: u32) -> Result<Vec<u8>, Status> {
        // One that is valid but not active is refused, other than above (§5.1.13.2.3, §3.2.1.5).
        let n = self
            .table
            .get(nsid, self.subsystem.options().max_namespaces)?;
        let identity = &n.identity;
        let mut page = Vec::with_capacity(LEN);
        let mut add = |kind: u8, value: &[u8]| {
            let header = DescriptorHeader {
                kind,
                len: value.len() as u8,
                reserved: U16::ZERO,
            };
            page.extend_from_slice(header.as_bytes());
            page.extend_from_slice(value);
        };
        if identity.eui64 != [0; 8] {
            add(descriptor::EUI64, &identity.eui64);
        }
        add(descriptor::NGUID, &identity.nguid);
        add(descriptor::UUID, &identity.uuid);
        add(descriptor::CSI, &[CSI_NVM]);
        page.resize(LEN, 0);
        Ok(page)
    }

    fn command_sets(&self, cntid: u16) -> Result<Vec<u8>, Status> {
        // FFFFh is the controller that is asked; another one's can be asked for where it is there.
        if cntid != 0xffff && !self.subsystem.controllers().contains(&cntid) {
            return Err(Status::INVALID_FIELD);
        }
        let mut page = vec![0; LEN];
        // The first combination: NVM alone.
        page[0] = 1 << CSI_NVM;
        Ok(page)
    }
}

fn nvm_namespace() -> NvmNamespace {
    // No protection information: no storage tags, no guards. Formats are as in Identify Namespace.
    zeroed()
}

fn page<T: IntoBytes + Immutable>(structure: T) -> Vec<u8> {
    structure.as_bytes().to_vec()
}

/// A power of two, 8 KiB at least, in units of the smallest page, as MDTS has it; 0 would mean "no limit".
fn exponent(bytes: u64) -> u8 {
    bytes.ilog2() as u8 - 12
}

/// ASCII, padded with blanks (§4.1, strings).
pub(super) fn text<const N: usize>(from: &str) -> [u8; N] {
    let mut to = [b' '; N];
    for (to, from) in to.iter_mut().zip(from.bytes()) {
        if from.is_ascii_graphic() {
            *to = from;
        }
    }
    to
}

/// NSIDs greater than the one given, ascending.
fn list_after(table: &Table, nsid: u32) -> Result<Vec<u8>, Status> {
    // There is nothing behind these two (§5.1.13.2.2).
    if nsid >= ALL_NAMESPACES - 1 {
        return Err(Status::INVALID_NAMESPACE);
    }
    let after = table.iter().filter(|n| n.nsid() > nsid).take(LEN / 4);
    let mut page: Vec<u8> = after.flat_map(|n| n.nsid().to_le_bytes()).collect();
    page.resize(LEN, 0);
    Ok(page)
}

/// A Controller List (§4.6.1): their number, then those from `first` on.
fn controllers_from(all: &[u16], first: u16) -> Vec<u8> {
    let from = all.iter().filter(|id| **id >= first).take(LEN / 2 - 1);
    let ids: Vec<u16> = from.copied().collect();
    let mut page = (ids.len() as u16).to_le_bytes().to_vec();
    page.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
    page.resize(LEN, 0);
    page
}
