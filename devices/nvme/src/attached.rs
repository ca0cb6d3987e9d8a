//! Namespaces as one controller has them: what the admin side knows of each.
//!
//! What a worker needs on its path is the [`Namespace`] in it: one object for all controllers and for as long as the format stays, so that its size, and whether
//! it is being formatted, are known to every worker at once. A worker looks it up by NSID in the [`Namespaces`] that [`Table::for_workers`] makes: an immutable snapshot, so no lock and no
//! reference count belongs to a command. When anything changes (a namespace is attached, resized, formatted, its ANA state moves) the subsystem makes a new table and
//! gives it to the controller ([`crate::SubsystemEvent::Table`]), which passes it on to its workers by message.

use std::fmt;
use std::sync::Arc;

use bluff_block::Geometry;

use crate::namespace::{Namespace, NamespaceTable, Namespaces};
use crate::spec::{ALL_NAMESPACES, Status};

/// By what a host knows a namespace wherever and whenever it sees it (Base 2.1 §4.5.4 to §4.5.6). Each value is the namespace's own: two subsystems with the same volume
/// must not give two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Namespace Globally Unique Identifier, big endian.
    pub nguid: [u8; 16],
    /// IEEE Extended Unique Identifier, big endian; all zero: none.
    pub eui64: [u8; 8],
    /// Universally Unique Identifier.
    pub uuid: [u8; 16],
}

impl Identity {
    /// From a text that is unique and stays (the volume's name in the configuration, with the card's identity). The UUID is of version 8, whose bits mean what the
    /// vendor likes (RFC 9562 §5.8); NGUID and EUI64 have a locally administered OUI, since the project owns none.
    pub fn hashed(text: &str) -> Self {
        let nguid = local(hash(b"nguid", text), 8);
        let eui64 = *local(hash(b"eui64", text), 0)
            .first_chunk()
            .expect("16 bytes");
        Self::new(nguid, eui64, hash(b"uuid", text))
    }

    /// From a UUID that was configured; the rest is derived from it.
    pub fn from_uuid(uuid: [u8; 16]) -> Self {
        let text = uuid.map(|byte| format!("{byte:02x}")).concat();
        let derived = Self::hashed(&text);
        Self { uuid, ..derived }
    }

    fn new(nguid: [u8; 16], eui64: [u8; 8], mut uuid: [u8; 16]) -> Self {
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        Self { nguid, eui64, uuid }
    }
}

/// With the OUI at `at` individual and locally administered.
fn local(mut bytes: [u8; 16], at: usize) -> [u8; 16] {
    bytes[at] = bytes[at] & 0xfc | 0x02;
    bytes
}

/// FNV-1a of 128 bits, and a last mix, as its upper bits hardly depend on the last bytes. Nobody who could choose texts would gain by a collision.
fn hash(kind: &[u8], text: &str) -> [u8; 16] {
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let mut state: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    for byte in kind.iter().chain(b"\0").chain(text.as_bytes()) {
        state = (state ^ u128::from(*byte)).wrapping_mul(PRIME);
    }
    for _ in 0..2 {
        state ^= state >> 64;
        state = state.wrapping_mul(PRIME << 1 | 1);
    }
    state.to_be_bytes()
}

/// Asymmetric Namespace Access State (Base 2.1 §8.1.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AnaState {
    /// The best way to the namespace.
    #[default]
    Optimized,
    /// A way that costs more.
    NonOptimized,
    /// Not now, by this controller.
    Inaccessible,
    /// Never again, by this controller.
    PersistentLoss,
    /// About to be something else.
    Change,
}

impl AnaState {
    /// As it stands in the log and in ANACAP.
    pub fn value(self) -> u8 {
        match self {
            Self::Optimized => 0x1,
            Self::NonOptimized => 0x2,
            Self::Inaccessible => 0x3,
            Self::PersistentLoss => 0x4,
            Self::Change => 0xf,
        }
    }

    /// What a command that needs the namespace gets (Base 2.1 §8.1.1.4 to §8.1.1.8).
    ///
    /// # Errors
    /// The path related status.
    pub fn check(self) -> Result<(), Status> {
        match self {
            Self::Optimized | Self::NonOptimized => Ok(()),
            Self::Inaccessible => Err(Status::ANA_INACCESSIBLE),
            Self::PersistentLoss => Err(Status::ANA_PERSISTENT_LOSS),
            Self::Change => Err(Status::ANA_TRANSITION),
        }
    }
}

/// A namespace that is attached to a controller, or could be. Nothing of it changes but what is atomic in [`Namespace`].
#[derive(Clone)]
pub struct Attached {
    /// What workers have of it.
    pub namespace: Arc<Namespace>,
    /// The volume's shape when this was made.
    pub geometry: Geometry,
    /// The index of its LBA format, in Identify's list.
    pub format: u8,
    /// Counts the changes of this namespace: another one means that everything about it may differ.
    pub generation: u64,
    /// Identifiers.
    pub identity: Identity,
    /// Its ANA group.
    pub group: u32,
    /// That group's state, for this controller.
    pub ana: AnaState,
    /// Whether it can be attached to several controllers.
    pub shared: bool,
}

impl Attached {
    /// Its identifier.
    pub fn nsid(&self) -> u32 {
        self.namespace.nsid()
    }

    /// log2 of the bytes of a logical block.
    pub fn shift(&self) -> u8 {
        self.namespace.lba_shift()
    }

    /// How many logical blocks it has. What is left of the volume behind the last whole one is not used.
    pub fn blocks(&self) -> u64 {
        self.geometry.size >> self.shift()
    }

    /// Whether a command may use it now.
    ///
    /// # Errors
    /// That it is being formatted, or that this is no way to it.
    pub fn check(&self) -> Result<(), Status> {
        if self.namespace.is_blocked() {
            return Err(Status::FORMAT_IN_PROGRESS);
        }
        self.ana.check()
    }
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attached")
            .field("namespace", &self.namespace)
            .field("generation", &self.generation)
            .field("ana", &self.ana)
            .finish_non_exhaustive()
    }
}

/// The namespaces that are attached to one controller, by NSID.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// At NSID - 1. NSIDs are small.
    slots: Vec<Option<Arc<Attached>>>,
}

impl Table {
    pub(crate) fn new(namespaces: impl IntoIterator<Item = Attached>) -> Self {
        let mut slots = Vec::new();
        for namespace in namespaces {
            let at = namespace.nsid() as usize - 1;
            if slots.len() <= at {
                slots.resize(at + 1, None);
            }
            slots[at] = Some(Arc::new(namespace));
        }
        Self { slots }
    }

    /// The namespace of a command.
    ///
    /// # Errors
    /// [`Status::INVALID_NAMESPACE`] where there is none with this NSID, 0 and [`ALL_NAMESPACES`] among them. The specification has
    /// [`Status::INVALID_FIELD`] for an NSID that is valid but inactive (Base 2.1 §3.2.1.5): `limit` is the largest valid one (NN).
    pub fn get(&self, nsid: u32, limit: u32) -> Result<&Arc<Attached>, Status> {
        match self.slots.get((nsid as usize).wrapping_sub(1)) {
            Some(Some(namespace)) => Ok(namespace),
            _ if nsid == 0 || nsid == ALL_NAMESPACES || nsid > limit => {
                Err(Status::INVALID_NAMESPACE)
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    /// The same for workers; `highest`: the largest valid NSID (NN).
    pub fn for_workers(&self, highest: u32) -> NamespaceTable {
        let all = self.iter().map(|n| (n.namespace.clone(), n.ana));
        Namespaces::with_states(highest, all.collect())
    }

    /// All of them, by NSID.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Attached>> {
        self.slots.iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use bluff_block::Volume;
    use bluff_block::null::Null;

    use super::*;

    fn namespace(nsid: u32, block_size: u32, shift: u8) -> Attached {
        let volume = Arc::new(Null::new(block_size, (1 << 20) + 4096 + 512 * 3));
        Attached {
            geometry: volume.geometry(),
            namespace: Namespace::new(nsid, volume, shift),
            format: 0,
            generation: 0,
            identity: Identity::hashed("x"),
            group: 1,
            ana: AnaState::Optimized,
            shared: false,
        }
    }

    #[test]
    fn an_identity_stays_and_is_its_own() {
        let one = Identity::hashed("card7/disk0");
        assert_eq!(one, Identity::hashed("card7/disk0"));
        // Written down, since a change of it would be another disk to every host.
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(hex(&one.uuid), "93399a405dd385b19ff515f26bc7e550");
        let mut seen = std::collections::HashSet::new();
        for n in 0..20_000 {
            let id = Identity::hashed(&format!("disk{n}"));
            assert!(seen.insert(id.eui64), "EUI64 of {n}");
            assert_eq!(
                (id.uuid[6] >> 4, id.uuid[8] >> 6),
                (8, 2),
                "version, variant"
            );
            assert_eq!((id.eui64[0] & 3, id.nguid[8] & 3), (2, 2), "a local OUI");
        }
        let configured = Identity::from_uuid([7; 16]);
        assert_eq!(configured.uuid, [7; 16]);
        assert_ne!(configured.nguid, one.nguid);
    }

    #[test]
    fn the_last_block_is_a_whole_one() {
        let n = namespace(1, 512, 12);
        assert_eq!(
            n.blocks(),
            257,
            "three blocks of the volume are too few for one more"
        );
        assert_eq!(n.namespace.blocks(), 257);
    }

    #[test]
    fn a_table_knows_valid_from_active() {
        let table = Table::new([namespace(2, 512, 9), namespace(7, 4096, 12)]);
        assert_eq!(table.get(7, 32).map(|n| n.shift()), Ok(12));
        let nsids: Vec<_> = table.iter().map(|n| n.nsid()).collect();
        assert_eq!(nsids, [2, 7]);
        let workers = table.for_workers(32);
        let nsids: Vec<_> = workers.attached().iter().map(|n| n.nsid()).collect();
        assert_eq!((nsids, workers.highest()), (vec![2, 7], 32));
        for (nsid, status) in [
            (0, Status::INVALID_NAMESPACE),
            (1, Status::INVALID_FIELD),
            (8, Status::INVALID_FIELD),
            (32, Status::INVALID_FIELD),
            (33, Status::INVALID_NAMESPACE),
            (0xffff_fffe, Status::INVALID_NAMESPACE),
            (ALL_NAMESPACES, Status::INVALID_NAMESPACE),
        ] {
            assert_eq!(table.get(nsid, 32).err(), Some(status), "{nsid:#x}");
        }
    }

    #[test]
    fn what_a_worker_asks_for_each_command() {
        let mut n = namespace(1, 512, 9);
        assert_eq!(n.check(), Ok(()));
        let same = n.clone();
        n.namespace.block(true);
        assert_eq!(
            same.check(),
            Err(Status::FORMAT_IN_PROGRESS),
            "all snapshots"
        );
        n.namespace.block(false);
        for (ana, value, outcome) in [
            (AnaState::Optimized, 1, Ok(())),
            (AnaState::NonOptimized, 2, Ok(())),
            (AnaState::Inaccessible, 3, Err(Status::ANA_INACCESSIBLE)),
            (
                AnaState::PersistentLoss,
                4,
                Err(Status::ANA_PERSISTENT_LOSS),
            ),
            (AnaState::Change, 15, Err(Status::ANA_TRANSITION)),
        ] {
            n.ana = ana;
            assert_eq!((n.check(), ana.value()), (outcome, value));
        }
    }
}
