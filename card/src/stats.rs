//! What is counted on the data path, as it is told to others.
//!
//! The counters themselves are plain integers owned by a queue or reactor; these are copies of them, taken when somebody
//! asks. All only grow, but for [`QueueStatistics::in_flight`]; a rate is the difference of two samples.

use std::collections::BTreeMap;
use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

use crate::spec::Id;

/// All counters at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// When they were read: nanoseconds of the monotonic clock.
    pub at_ns: u64,
    /// Each function.
    pub functions: Vec<FunctionStatistics>,
    /// Each network that has a tunnel, where all functions were asked for.
    #[serde(default)]
    pub networks: Vec<NetworkStatistics>,
    /// Each reactor.
    pub reactors: Vec<ReactorStatistics>,
}

/// What a network dropped of what other cards are sent and send, by the names of causes; those without any are left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkStatistics {
    /// The network.
    pub network: Id,
    /// Of what came out of its tunnel.
    #[serde(default)]
    pub arrived_drops: BTreeMap<String, u64>,
    /// Of what its underlay was to send. An underlay is shared by all networks of its VTEP, and so are these.
    #[serde(default)]
    pub underlay_sent_drops: BTreeMap<String, u64>,
    /// Of what its underlay received.
    #[serde(default)]
    pub underlay_received_drops: BTreeMap<String, u64>,
}

/// The counters of a function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionStatistics {
    /// The function.
    pub function: Id,
    /// How many messages there were on its socket, both ways, where they are counted: of vfio-user functions.
    #[serde(default)]
    pub messages: Option<u64>,
    /// Each of its queues; of an NVMe function those that its host has made. None of a network function.
    pub queues: Vec<QueueStatistics>,
    /// Of a network function.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<NetStatistics>,
}

/// The counters of a network function.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetStatistics {
    /// Each of its pairs of queues.
    pub pairs: Vec<PairStatistics>,
    /// What it sent and was dropped, by the name of the cause; causes without any are left out.
    pub sent_drops: BTreeMap<String, u64>,
    /// What was for it and was dropped.
    pub received_drops: BTreeMap<String, u64>,
}

/// The counters of a pair of queues. "Sent" is what the host sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PairStatistics {
    /// Which.
    pub pair: u16,
    /// The reactor that serves it.
    pub reactor: u16,
    /// Frames that were sent. One that stands for several is one.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames that were received.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Notifications from the host.
    pub kicks: u64,
    /// Notifications to the host.
    pub interrupts: u64,
    /// Call and error descriptors of the front end that were given up, because they blocked.
    pub hung: u64,
}

impl AddAssign for PairStatistics {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.sent_bytes += other.sent_bytes;
        self.received += other.received;
        self.received_bytes += other.received_bytes;
        self.kicks += other.kicks;
        self.interrupts += other.interrupts;
        self.hung += other.hung;
    }
}

impl NetStatistics {
    /// All pairs together.
    pub fn total(&self) -> PairStatistics {
        let mut total = PairStatistics::default();
        for pair in &self.pairs {
            total += *pair;
        }
        total
    }

    /// Frames that were dropped, both ways, for any cause.
    pub fn drops(&self) -> u64 {
        self.sent_drops
            .values()
            .chain(self.received_drops.values())
            .sum()
    }
}

impl FunctionStatistics {
    /// How much of a message it takes, in queues.
    pub(crate) fn weight(&self) -> usize {
        let pairs = self.net.as_ref().map_or(0, |net| 2 * net.pairs.len() + 8);
        (self.queues.len() + pairs).max(1)
    }

    /// All queues together.
    pub fn total(&self) -> QueueStatistics {
        let mut total = QueueStatistics::default();
        for queue in &self.queues {
            total += *queue;
        }
        total
    }
}

/// The counters of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct QueueStatistics {
    /// Its index in the device.
    pub queue: u16,
    /// The reactor that serves it.
    pub reactor: u16,
    /// Reads that were completed.
    pub reads: u64,
    /// Writes that were completed.
    pub writes: u64,
    /// Flushes that were completed.
    pub flushes: u64,
    /// Discards and writes of zeroes that were completed.
    pub discards: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
    /// Bytes that were written.
    pub written_bytes: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Requests that are under way.
    pub in_flight: u32,
    /// Notifications from the host.
    pub kicks: u64,
    /// Notifications to the host.
    pub interrupts: u64,
    /// Call and error descriptors of the front end that were given up, because they blocked.
    pub hung: u64,
}

impl QueueStatistics {
    /// Requests that were completed, of every kind.
    pub fn requests(&self) -> u64 {
        self.reads + self.writes + self.flushes + self.discards
    }

    /// Bytes in both directions.
    pub fn bytes(&self) -> u64 {
        self.read_bytes + self.written_bytes
    }
}

impl AddAssign for QueueStatistics {
    fn add_assign(&mut self, other: Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.flushes += other.flushes;
        self.discards += other.discards;
        self.read_bytes += other.read_bytes;
        self.written_bytes += other.written_bytes;
        self.errors += other.errors;
        self.in_flight += other.in_flight;
        self.kicks += other.kicks;
        self.interrupts += other.interrupts;
        self.hung += other.hung;
    }
}

/// The counters of a reactor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReactorStatistics {
    /// Which one.
    pub reactor: u16,
    /// The CPU that it is pinned to.
    pub cpu: Option<u32>,
    /// Turns of its loop.
    pub turns: u64,
    /// Turns that ended asleep.
    pub sleeps: u64,
    /// Time that it did not sleep, in nanoseconds.
    pub busy_ns: u64,
}

/// What went through between two samples, per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Rates {
    /// Requests that were completed.
    pub requests: f64,
    /// Bytes that were read.
    pub read_bytes: f64,
    /// Bytes that were written.
    pub written_bytes: f64,
    /// Requests that were answered with an error.
    pub errors: f64,
    /// Notifications from the host.
    pub kicks: f64,
    /// Notifications to the host.
    pub interrupts: f64,
}

impl Rates {
    /// The rates between two samples that are `seconds` apart.
    ///
    /// A counter that went back belongs to a function that was created anew: then the count since is taken.
    pub fn between(before: &QueueStatistics, after: &QueueStatistics, seconds: f64) -> Self {
        let rate = |before, after| per_second(before, after, seconds);
        Self {
            requests: rate(before.requests(), after.requests()),
            read_bytes: rate(before.read_bytes, after.read_bytes),
            written_bytes: rate(before.written_bytes, after.written_bytes),
            errors: rate(before.errors, after.errors),
            kicks: rate(before.kicks, after.kicks),
            interrupts: rate(before.interrupts, after.interrupts),
        }
    }
}

/// What went through a pair of queues between two samples, per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PairRates {
    /// Frames that the host sent.
    pub sent: f64,
    /// Their bytes.
    pub sent_bytes: f64,
    /// Frames that the host received.
    pub received: f64,
    /// Their bytes.
    pub received_bytes: f64,
    /// Notifications from the host.
    pub kicks: f64,
    /// Notifications to the host.
    pub interrupts: f64,
}

impl PairRates {
    /// As [`Rates::between`].
    pub fn between(before: &PairStatistics, after: &PairStatistics, seconds: f64) -> Self {
        let rate = |before, after| per_second(before, after, seconds);
        Self {
            sent: rate(before.sent, after.sent),
            sent_bytes: rate(before.sent_bytes, after.sent_bytes),
            received: rate(before.received, after.received),
            received_bytes: rate(before.received_bytes, after.received_bytes),
            kicks: rate(before.kicks, after.kicks),
            interrupts: rate(before.interrupts, after.interrupts),
        }
    }
}

/// How fast a counter went; one that was begun anew counts from 0.
fn per_second(before: u64, after: u64, seconds: f64) -> f64 {
    after.checked_sub(before).unwrap_or(after) as f64 / seconds.max(1e-9)
}

/// What a reactor did between two samples, per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ReactorRates {
    /// Turns of its loop.
    pub turns: f64,
    /// Turns that ended asleep.
    pub sleeps: f64,
    /// The share of time that it did not sleep, from 0 to 1.
    pub busy: f64,
}

impl ReactorRates {
    /// The rates between two samples that are `seconds` apart.
    pub fn between(before: &ReactorStatistics, after: &ReactorStatistics, seconds: f64) -> Self {
        let rate = |before, after| per_second(before, after, seconds);
        Self {
            turns: rate(before.turns, after.turns),
            sleeps: rate(before.sleeps, after.sleeps),
            busy: (rate(before.busy_ns, after.busy_ns) / 1e9).min(1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_differences_over_time() {
        let before = QueueStatistics {
            reads: 100,
            read_bytes: 4096,
            ..Default::default()
        };
        let after = QueueStatistics {
            reads: 300,
            writes: 50,
            read_bytes: 8192,
            ..Default::default()
        };
        let rates = Rates::between(&before, &after, 2.0);
        assert_eq!((rates.requests, rates.read_bytes), (125.0, 2048.0));
    }

    #[test]
    fn a_function_created_anew_has_no_huge_rate() {
        let before = QueueStatistics {
            reads: 1000,
            ..Default::default()
        };
        let after = QueueStatistics {
            reads: 10,
            ..Default::default()
        };
        assert_eq!(Rates::between(&before, &after, 1.0).requests, 10.0);
    }

    #[test]
    fn a_total_sums_its_queues() {
        let queue = QueueStatistics {
            writes: 2,
            flushes: 1,
            in_flight: 3,
            ..Default::default()
        };
        let function = FunctionStatistics {
            function: "blk0".parse().unwrap(),
            messages: None,
            queues: vec![queue, queue],
            net: None,
        };
        assert_eq!(
            (function.total().requests(), function.total().in_flight),
            (6, 6)
        );
    }

    #[test]
    fn a_busy_reactor_is_busy_to_one() {
        let after = ReactorStatistics {
            turns: 10,
            busy_ns: 2_000_000_000,
            ..Default::default()
        };
        assert_eq!(
            ReactorRates::between(&ReactorStatistics::default(), &after, 1.0).busy,
            1.0
        );
    }
}
