//! A network: who is in it, and where they are.

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption, Guard};
use bluff_net::capture::Tap;
use bluff_net::{Attributes, Drops, Lane, NetError, Offloads, Port, Receivers};
use bluff_packet::Vni;
use bluff_packet::flow::FlowHasher;
use bluff_reactor::Context;

use crate::bucket::{Bucket, Rate};
use crate::capture::Outer;
use crate::fdb::{Fdb, FdbLimits, Key, Place};
use crate::rules::Rules;
use crate::switch::Switch;
use crate::underlay::Underlay;

/// Frames a second that a port may have flooded to others, of all kinds together, unless it is configured.
const FLOOD: Rate = Rate {
    per_second: 20_000,
    burst: 2_000,
};

/// What a network is made with.
#[derive(Clone, Debug)]
pub struct NetworkOptions {
    /// Its name, for people.
    pub name: Arc<str>,
    /// Bytes of the longest IP packet.
    pub mtu: u16,
    /// How many addresses are learnt.
    pub fdb: FdbLimits,
    /// Addresses that were not seen for so long are forgotten.
    pub age: Duration,
    /// Frames a second that each port may have flooded; `None`: 20,000.
    pub flood: Option<Rate>,
}

/// A tenant's Ethernet segment, as this card has it.
pub struct Network {
    name: Arc<str>,
    pub(crate) fdb: Fdb,
    table: ArcSwap<Table>,
    /// Taken by whoever changes the table.
    editing: Mutex<()>,
    pub(crate) hasher: FlowHasher,
    start: Instant,
    age: Duration,
    pub(crate) flood: Rate,
    /// What came from other cards and was dropped.
    pub(crate) arrived: Drops,
    /// Who looks at what goes to other cards and comes from them.
    pub(crate) tap: Arc<Tap>,
    /// What such a one sees it behind.
    pub(crate) outer: ArcSwapOption<Outer>,
}

/// Who is in a network. It is replaced as a whole.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    pub(crate) mtu: u16,
    /// By number.
    pub(crate) members: Vec<Option<Arc<Member>>>,
    /// The way to other cards.
    pub(crate) tunnel: Option<Arc<Tunnel>>,
}

/// A network's place among those of other cards.
#[derive(Debug)]
pub(crate) struct Tunnel {
    pub(crate) vni: Vni,
    /// By number; `None`: it has gone.
    pub(crate) vteps: Vec<Option<IpAddr>>,
    pub(crate) underlay: Arc<dyn Underlay>,
}

impl Tunnel {
    #[inline]
    pub(crate) fn vtep(&self, number: u16) -> Option<IpAddr> {
        *self.vteps.get(usize::from(number))?
    }

    #[inline]
    pub(crate) fn number(&self, vtep: IpAddr) -> Option<u16> {
        let at = self.vteps.iter().position(|v| *v == Some(vtep))?;
        Some(at as u16)
    }
}

/// How much a port may send or receive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortRates {
    /// Bits in a second, of frames without preamble and checksum.
    pub bits: Option<Rate>,
    /// Frames in a second. One that stands for several counts as so many.
    pub frames: Option<Rate>,
}

/// What a port is made with.
#[derive(Clone, Debug, Default)]
pub struct PortOptions {
    /// What it may send.
    pub rules: Rules,
    /// How much it may send.
    pub transmit: PortRates,
    /// How much it may receive.
    pub receive: PortRates,
}

/// The buckets of one direction of a port.
#[derive(Debug, Default)]
pub(crate) struct Meter(Option<Mutex<Buckets>>);

#[derive(Debug)]
struct Buckets {
    bits: Option<Bucket>,
    frames: Option<Bucket>,
}

impl Meter {
    fn new(rates: PortRates, now: Instant) -> Self {
        if rates == PortRates::default() {
            return Self(None);
        }
        Self(Some(Mutex::new(Buckets {
            bits: rates.bits.map(|rate| Bucket::new(rate, now)),
            frames: rates.frames.map(|rate| Bucket::new(rate, now)),
        })))
    }

    /// Whether there is anything to be paid.
    #[inline]
    pub(crate) fn is_limited(&self) -> bool {
        self.0.is_some()
    }

    fn with<T>(&self, what: impl FnOnce(&mut Buckets) -> T) -> Option<T> {
        let buckets = self.0.as_ref()?;
        Some(what(&mut buckets.lock().expect("nothing panics with it")))
    }

    /// When something may pass.
    #[inline]
    pub(crate) fn ready(&self, now: Instant) -> Result<(), Instant> {
        let both = |buckets: &mut Buckets| {
            let ready = |b: &mut Option<Bucket>| b.as_mut().map_or(Ok(()), |b| b.ready(now));
            match (ready(&mut buckets.bits), ready(&mut buckets.frames)) {
                (Ok(()), Ok(())) => Ok(()),
                (Err(at), Ok(())) | (Ok(()), Err(at)) => Err(at),
                (Err(a), Err(b)) => Err(a.max(b)),
            }
        };
        self.with(both).unwrap_or(Ok(()))
    }

    /// Pays for what has passed.
    #[inline]
    pub(crate) fn take(&self, frames: u64, bytes: u64) {
        self.with(|buckets| {
            for (bucket, n) in [
                (&mut buckets.bits, 8 * bytes),
                (&mut buckets.frames, frames),
            ] {
                if let Some(bucket) = bucket {
                    bucket.take(n);
                }
            }
        });
    }
}

/// A port, as the others see it.
pub(crate) struct Member {
    pub(crate) number: u16,
    pub(crate) rules: Rules,
    pub(crate) transmit: Meter,
    pub(crate) receive: Meter,
    pub(crate) receivers: ArcSwap<Receivers>,
    pub(crate) link: AtomicBool,
    /// What it sent and the switch dropped.
    pub(crate) sent: Drops,
    /// What was for it and the switch dropped.
    pub(crate) received: Drops,
    /// Who looks at what it sends and receives.
    pub(crate) tap: Arc<Tap>,
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Member({})", self.number)
    }
}

impl Member {
    /// Whether it is plugged in.
    #[inline]
    pub(crate) fn is_up(&self) -> bool {
        self.link.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Network({})", self.name)
    }
}

impl Network {
    /// An empty one. `hasher` and `seed` are the card's secrets: who knew them could aim flows and addresses.
    pub fn new(options: NetworkOptions, hasher: FlowHasher, seed: u64) -> Arc<Self> {
        Arc::new(Self {
            name: options.name,
            fdb: Fdb::new(seed, options.fdb),
            table: ArcSwap::from_pointee(Table {
                mtu: options.mtu,
                members: Vec::new(),
                tunnel: None,
            }),
            arrived: Drops::default(),
            tap: Arc::default(),
            outer: ArcSwapOption::empty(),
            editing: Mutex::default(),
            hasher,
            start: Instant::now(),
            age: options.age,
            flood: options.flood.unwrap_or(FLOOD),
        })
    }

    /// Its name.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Where addresses are.
    pub fn fdb(&self) -> &Fdb {
        &self.fdb
    }

    /// Seconds since it was made: the ticks of its database.
    pub(crate) fn tick(&self, now: Instant) -> u32 {
        now.saturating_duration_since(self.start).as_secs() as u32
    }

    /// Forgets addresses that were not seen for too long; says how many. To be called every few seconds.
    pub fn forget_old(&self, now: Instant) -> usize {
        // Not too early: a part of a second counts as one.
        let age = self.age.as_secs() + u64::from(self.age.subsec_nanos() > 0);
        let age = u32::try_from(age).unwrap_or(u32::MAX);
        self.fdb.age(self.tick(now), age)
    }

    pub(crate) fn table(&self) -> Guard<Arc<Table>> {
        self.table.load()
    }

    fn edit(&self) -> MutexGuard<'_, ()> {
        self.editing.lock().expect("nothing panics with it")
    }

    /// Adds a port.
    ///
    /// # Errors
    /// [`NetError::Gone`] where there are 65,535 already.
    pub fn join(self: &Arc<Self>, options: PortOptions) -> Result<NetworkPort, NetError> {
        let _editing = self.edit();
        let mut table = Table::clone(&self.table());
        let free = table.members.iter().position(Option::is_none);
        let number =
            u16::try_from(free.unwrap_or(table.members.len())).map_err(|_| NetError::Gone)?;
        let now = Instant::now();
        let member = Arc::new(Member {
            number,
            transmit: Meter::new(options.transmit, now),
            receive: Meter::new(options.receive, now),
            receivers: ArcSwap::from_pointee(Receivers::none()),
            link: AtomicBool::new(true),
            sent: Drops::default(),
            received: Drops::default(),
            tap: Arc::default(),
            rules: options.rules,
        });
        match free {
            Some(at) => table.members[at] = Some(member.clone()),
            None => table.members.push(Some(member.clone())),
        }
        self.table.store(Arc::new(table));
        if let Some(mac) = member.rules.mac {
            let key = Key::new(mac.0, member.rules.vlan.unwrap_or(0));
            self.fdb.fix(key, Place::Port(number));
        }
        Ok(NetworkPort {
            network: self.clone(),
            member,
        })
    }

    /// Joins the network to those of other cards: `vni` and `vteps` are theirs, and `underlay` leads to them. Replaces what there was. A VTEP keeps its number
    /// for as long as the network lives, so what was learnt behind one that stays is not forgotten.
    ///
    /// # Errors
    /// [`NetError::Gone`] where there were 65,535 VTEPs already.
    pub fn set_tunnel(
        &self,
        vni: Vni,
        vteps: &[IpAddr],
        underlay: Arc<dyn Underlay>,
    ) -> Result<(), NetError> {
        let _editing = self.edit();
        let mut table = Table::clone(&self.table());
        let before = table.tunnel.as_ref().map_or(&[][..], |t| &t.vteps[..]);
        let stays = |vtep: &Option<IpAddr>| vtep.filter(|v| vteps.contains(v));
        let mut numbered: Vec<_> = before.iter().map(stays).collect();
        for vtep in vteps {
            if !numbered.contains(&Some(*vtep)) {
                numbered.push(Some(*vtep));
            }
        }
        if numbered.len() > usize::from(u16::MAX) {
            return Err(NetError::Gone);
        }
        let tunnel = Tunnel {
            vni,
            vteps: numbered,
            underlay,
        };
        let gone = |place| matches!(place, Place::Vtep(n) if tunnel.vtep(n).is_none());
        self.fdb.forget(|_, entry| gone(entry.place));
        table.tunnel = Some(Arc::new(tunnel));
        self.table.store(Arc::new(table));
        Ok(())
    }

    /// Sets where an address is for good: behind a VTEP.
    ///
    /// # Errors
    /// [`NetError::Gone`] where it is none of the network's.
    pub fn fix(&self, key: Key, vtep: IpAddr) -> Result<(), NetError> {
        let table = self.table();
        let tunnel = table.tunnel.as_ref().ok_or(NetError::Gone)?;
        let number = tunnel.number(vtep).ok_or(NetError::Gone)?;
        self.fdb.fix(key, Place::Vtep(number));
        Ok(())
    }

    /// A VTEP by its number, as [`Place::Vtep`] has it; `None`: it has gone.
    pub fn vtep(&self, number: u16) -> Option<IpAddr> {
        self.table().tunnel.as_ref()?.vtep(number)
    }

    /// What carries its tunnel, where it has one.
    pub fn underlay(&self) -> Option<Arc<dyn Underlay>> {
        let table = self.table();
        table.tunnel.as_ref().map(|tunnel| tunnel.underlay.clone())
    }

    /// What came from other cards and was dropped.
    pub fn arrived(&self) -> &Drops {
        &self.arrived
    }

    fn leave(&self, member: &Member) {
        let _editing = self.edit();
        let mut table = Table::clone(&self.table());
        table.members[usize::from(member.number)] = None;
        self.table.store(Arc::new(table));
        let place = Place::Port(member.number);
        self.fdb.forget(|_, entry| entry.place == place);
    }
}

/// A port of a network. Dropped, it is not in the network any more.
pub struct NetworkPort {
    network: Arc<Network>,
    pub(crate) member: Arc<Member>,
}

impl NetworkPort {
    /// Its number in the network.
    pub fn number(&self) -> u16 {
        self.member.number
    }

    /// Plugs it in, or pulls it out.
    pub fn set_link(&self, up: bool) {
        self.member.link.store(up, Ordering::Relaxed);
    }

    /// What it sent and the network dropped.
    pub fn sent(&self) -> &Drops {
        &self.member.sent
    }

    /// What was for it and the network dropped.
    pub fn received(&self) -> &Drops {
        &self.member.received
    }
}

impl fmt::Debug for NetworkPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "NetworkPort({}.{})",
            self.network.name, self.member.number
        )
    }
}

impl Port for NetworkPort {
    fn attributes(&self) -> Attributes {
        Attributes {
            mtu: self.network.table().mtu,
            takes: Offloads::all(),
            link: self.member.is_up(),
        }
    }

    fn open(&self, cx: &mut Context<'_>, _: u16) -> Result<Box<dyn Lane>, NetError> {
        let switch = Switch::new(cx, self.network.clone(), self.member.clone())?;
        Ok(Box::new(switch))
    }

    fn set_receivers(&self, receivers: Arc<Receivers>) {
        self.member.receivers.store(receivers);
    }
}

impl Drop for NetworkPort {
    fn drop(&mut self) {
        self.network.leave(&self.member);
    }
}
