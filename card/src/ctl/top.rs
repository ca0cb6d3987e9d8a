//! `bluffctl top`: what goes on, from two samples of the counters.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::Table;
use crate::spec::Id;
use crate::stats::{
    FunctionStatistics, NetStatistics, NetworkStatistics, PairRates, PairStatistics,
    QueueStatistics, Rates, ReactorRates, ReactorStatistics, Statistics,
};
use crate::units::show_size;

/// What went on between two samples.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Round {
    /// The time between them, in seconds.
    pub seconds: f64,
    /// Each queue of each function that has a volume.
    pub queues: Vec<QueueRound>,
    /// Each pair of queues of each network function.
    pub pairs: Vec<PairRound>,
    /// What network functions and networks have dropped, by cause.
    pub drops: Vec<DropRound>,
    /// Each reactor.
    pub reactors: Vec<ReactorRound>,
}

/// Frames that were dropped at one place for one cause; causes that never were one are left out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DropRound {
    /// A function, or network:ID for what came out of a network's tunnel, or underlay:ID for what carries it.
    pub place: String,
    /// The cause.
    pub cause: String,
    /// Of what was sent, per second.
    pub sent: f64,
    /// Of what was received, per second.
    pub received: f64,
    /// Both, since the function or network was made.
    pub total: u64,
}

/// What went on in a queue, or in a function.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QueueRound {
    /// The function.
    pub function: Id,
    /// The queue; all of the function's where `None`.
    pub queue: Option<u16>,
    /// What went through.
    pub rates: Rates,
    /// Requests under way at the second sample.
    pub in_flight: u32,
    /// Errors since the queue was started.
    pub errors_total: u64,
}

/// What went on in a pair of queues, or in a network function.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PairRound {
    /// The function.
    pub function: Id,
    /// The pair; all of the function's where `None`.
    pub pair: Option<u16>,
    /// What went through.
    pub rates: PairRates,
    /// Frames that were dropped since the function was made; of a function as a whole.
    pub drops_total: Option<u64>,
}

/// What a reactor did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReactorRound {
    /// Which.
    pub reactor: u16,
    /// Its CPU.
    pub cpu: Option<u32>,
    /// What it did.
    pub rates: ReactorRates,
}

impl Round {
    /// Compares two samples.
    pub fn between(before: &Statistics, after: &Statistics) -> Self {
        let seconds = after.at_ns.saturating_sub(before.at_ns) as f64 / 1e9;
        let (mut queues, mut pairs) = (Vec::new(), Vec::new());
        for function in &after.functions {
            let earlier = before
                .functions
                .iter()
                .find(|earlier| earlier.function == function.function);
            if let Some(net) = &function.net {
                let earlier = earlier.and_then(|earlier| earlier.net.as_ref());
                pairs.extend(pair_rounds(&function.function, earlier, net, seconds));
                continue;
            }
            let round = |queue, before: &QueueStatistics, after: &QueueStatistics| QueueRound {
                function: function.function.clone(),
                queue,
                rates: Rates::between(before, after, seconds),
                in_flight: after.in_flight,
                errors_total: after.errors,
            };
            let total = earlier.map(|earlier| earlier.total()).unwrap_or_default();
            queues.push(round(None, &total, &function.total()));
            for queue in &function.queues {
                let same = |other: &&QueueStatistics| other.queue == queue.queue;
                let earlier = earlier
                    .and_then(|earlier| earlier.queues.iter().find(same))
                    .copied();
                queues.push(round(
                    Some(queue.queue),
                    &earlier.unwrap_or_default(),
                    queue,
                ));
            }
        }
        let mut drops = Vec::new();
        let empty = BTreeMap::new();
        for function in &after.functions {
            let same = |other: &&FunctionStatistics| other.function == function.function;
            let earlier = before.functions.iter().find(same);
            let earlier = earlier.and_then(|earlier| earlier.net.as_ref());
            if let Some(net) = &function.net {
                let earlier = earlier.map_or([&empty; 2], |e| [&e.sent_drops, &e.received_drops]);
                let now = [&net.sent_drops, &net.received_drops];
                drops.extend(drop_rounds(
                    function.function.as_str(),
                    earlier,
                    now,
                    seconds,
                ));
            }
        }
        for network in &after.networks {
            let same = |other: &&NetworkStatistics| other.network == network.network;
            let earlier = before.networks.iter().find(same);
            let sides = |n: &NetworkStatistics| {
                [
                    n.arrived_drops.clone(),
                    n.underlay_sent_drops.clone(),
                    n.underlay_received_drops.clone(),
                ]
            };
            let [arrived, sent, received] = earlier.map(sides).unwrap_or_default();
            let id = &network.network;
            let now = [&empty, &network.arrived_drops];
            drops.extend(drop_rounds(
                &format!("network:{id}"),
                [&empty, &arrived],
                now,
                seconds,
            ));
            let now = [
                &network.underlay_sent_drops,
                &network.underlay_received_drops,
            ];
            drops.extend(drop_rounds(
                &format!("underlay:{id}"),
                [&sent, &received],
                now,
                seconds,
            ));
        }
        let reactors = after.reactors.iter().map(|reactor| {
            let same = |other: &&ReactorStatistics| other.reactor == reactor.reactor;
            let earlier = before
                .reactors
                .iter()
                .find(same)
                .copied()
                .unwrap_or_default();
            let rates = ReactorRates::between(&earlier, reactor, seconds);
            ReactorRound {
                reactor: reactor.reactor,
                cpu: reactor.cpu,
                rates,
            }
        });
        Self {
            seconds,
            queues,
            pairs,
            drops,
            reactors: reactors.collect(),
        }
    }

    /// As a person reads it.
    pub fn table(&self) -> String {
        let mut table = Table::new([
            "FUNCTION", "QUEUE", "IOPS", "READ/s", "WRITE/s", "DEPTH", "ERRORS", "KICKS/s",
            "IRQS/s",
        ]);
        for QueueRound {
            function,
            queue,
            rates,
            in_flight,
            errors_total,
        } in &self.queues
        {
            let queue = queue.map_or_else(|| "all".to_owned(), |queue| queue.to_string());
            let bytes = |rate: f64| show_size(rate as u64);
            let count = |rate: f64| format!("{rate:.0}");
            table.row([
                function.to_string(),
                queue,
                count(rates.requests),
                bytes(rates.read_bytes),
                bytes(rates.written_bytes),
                in_flight.to_string(),
                errors_total.to_string(),
                count(rates.kicks),
                count(rates.interrupts),
            ]);
        }
        let mut nets = Table::new([
            "FUNCTION",
            "PAIR",
            "SENT/s",
            "BYTES/s",
            "RECEIVED/s",
            "BYTES/s",
            "DROPS",
            "KICKS/s",
            "IRQS/s",
        ]);
        for PairRound {
            function,
            pair,
            rates,
            drops_total,
        } in &self.pairs
        {
            let count = |rate: f64| format!("{rate:.0}");
            nets.row([
                function.to_string(),
                pair.map_or_else(|| "all".to_owned(), |pair| pair.to_string()),
                count(rates.sent),
                show_size(rates.sent_bytes as u64),
                count(rates.received),
                show_size(rates.received_bytes as u64),
                drops_total.map_or_else(|| "-".to_owned(), |drops| drops.to_string()),
                count(rates.kicks),
                count(rates.interrupts),
            ]);
        }
        let mut reactors = Table::new(["REACTOR", "CPU", "BUSY", "POLLS/s", "SLEEPS/s"]);
        for ReactorRound {
            reactor,
            cpu,
            rates,
        } in &self.reactors
        {
            let cpu = cpu.map_or_else(|| "any".to_owned(), |cpu| cpu.to_string());
            let busy = format!("{:.1} %", rates.busy * 100.0);
            let (turns, sleeps) = (
                format!("{:.0}", rates.turns),
                format!("{:.0}", rates.sleeps),
            );
            reactors.row([reactor.to_string(), cpu, busy, turns, sleeps]);
        }
        // Without any function there is a head, which says that none is there.
        let mut text = String::new();
        if !self.queues.is_empty() || self.pairs.is_empty() {
            text += &format!("{table}\n");
        }
        if !self.pairs.is_empty() {
            text += &format!("{nets}\n");
        }
        if !self.drops.is_empty() {
            let mut table = Table::new(["DROPPED AT", "CAUSE", "SENT/s", "RECEIVED/s", "TOTAL"]);
            for drops in &self.drops {
                table.row([
                    drops.place.clone(),
                    drops.cause.clone(),
                    format!("{:.0}", drops.sent),
                    format!("{:.0}", drops.received),
                    drops.total.to_string(),
                ]);
            }
            text += &format!("{table}\n");
        }
        text + &reactors.to_string()
    }
}

/// What was dropped at one place, by cause: of what was sent, and of what was received.
fn drop_rounds(
    place: &str,
    before: [&BTreeMap<String, u64>; 2],
    after: [&BTreeMap<String, u64>; 2],
    seconds: f64,
) -> Vec<DropRound> {
    let causes: BTreeSet<&String> = after.iter().flat_map(|drops| drops.keys()).collect();
    let round = |cause: &String| {
        let count = |drops: &BTreeMap<String, u64>| drops.get(cause).copied().unwrap_or(0);
        let rate = |i: usize| {
            let (before, after) = (count(before[i]), count(after[i]));
            // As other rates: what went back was made anew.
            after.checked_sub(before).unwrap_or(after) as f64 / seconds.max(1e-9)
        };
        DropRound {
            place: place.to_owned(),
            cause: cause.clone(),
            sent: rate(0),
            received: rate(1),
            total: after.iter().map(|drops| count(drops)).sum(),
        }
    };
    causes.into_iter().map(round).collect()
}

/// A network function as a whole, and each of its pairs.
fn pair_rounds(
    function: &Id,
    before: Option<&NetStatistics>,
    after: &NetStatistics,
    seconds: f64,
) -> Vec<PairRound> {
    let none = NetStatistics::default();
    let before = before.unwrap_or(&none);
    let round = |pair, before: &PairStatistics, after: &PairStatistics| PairRound {
        function: function.clone(),
        pair,
        rates: PairRates::between(before, after, seconds),
        drops_total: None,
    };
    let whole = PairRound {
        drops_total: Some(after.drops()),
        ..round(None, &before.total(), &after.total())
    };
    let each = after.pairs.iter().map(|pair| {
        let same = |other: &&PairStatistics| other.pair == pair.pair;
        let earlier = before.pairs.iter().find(same).copied();
        round(Some(pair.pair), &earlier.unwrap_or_default(), pair)
    });
    std::iter::once(whole).chain(each).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at_s: u64, reads: u64) -> Statistics {
        let queue = |queue| QueueStatistics {
            queue,
            reads,
            read_bytes: reads * 4096,
            ..Default::default()
        };
        let function = FunctionStatistics {
            function: "blk0".parse().unwrap(),
            messages: None,
            queues: vec![queue(0), queue(1)],
            net: None,
        };
        let reactor = ReactorStatistics {
            turns: reads,
            busy_ns: at_s * 500_000_000,
            ..Default::default()
        };
        Statistics {
            at_ns: at_s * 1_000_000_000,
            functions: vec![function],
            networks: Vec::new(),
            reactors: vec![reactor],
        }
    }

    #[test]
    fn a_round_has_functions_queues_and_reactors() {
        let round = Round::between(&sample(1, 1000), &sample(3, 3000));
        assert_eq!(round.seconds, 2.0);
        let iops: Vec<f64> = round
            .queues
            .iter()
            .map(|queue| queue.rates.requests)
            .collect();
        assert_eq!(iops, [2000.0, 1000.0, 1000.0]);
        assert_eq!(round.reactors[0].rates.busy, 0.5);
        let table = round.table();
        let line = table.lines().nth(1).unwrap();
        let cells: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(cells[..6], ["blk0", "all", "2000", "7.8", "MiB", "0"]);
        assert!(table.contains("50.0 %"));
    }

    #[test]
    fn drops_have_rates_by_cause() {
        let drops = |of: &[(&str, u64)]| {
            let of = of.iter().map(|(cause, n)| ((*cause).to_owned(), *n));
            of.collect::<BTreeMap<_, _>>()
        };
        let sample = |at_ns, spoofed, strangers| Statistics {
            at_ns,
            functions: vec![FunctionStatistics {
                function: "net0".parse().unwrap(),
                messages: None,
                queues: Vec::new(),
                net: Some(NetStatistics {
                    sent_drops: drops(&[("spoofed", spoofed)]),
                    received_drops: drops(&[("no-buffers", 7)]),
                    ..NetStatistics::default()
                }),
            }],
            networks: vec![NetworkStatistics {
                network: "blue".parse().unwrap(),
                arrived_drops: drops(&[("stranger", strangers)]),
                underlay_sent_drops: drops(&[("congested", 5)]),
                underlay_received_drops: drops(&[]),
            }],
            reactors: Vec::new(),
        };
        let round = Round::between(&sample(0, 10, 0), &sample(2_000_000_000, 40, 8));
        let found: Vec<_> = round
            .drops
            .iter()
            .map(|d| {
                (
                    d.place.as_str(),
                    d.cause.as_str(),
                    d.sent,
                    d.received,
                    d.total,
                )
            })
            .collect();
        assert_eq!(
            found,
            [
                ("net0", "no-buffers", 0.0, 0.0, 7),
                ("net0", "spoofed", 15.0, 0.0, 40),
                ("network:blue", "stranger", 0.0, 4.0, 8),
                ("underlay:blue", "congested", 0.0, 0.0, 5),
            ]
        );
        assert!(
            round
                .table()
                .contains("DROPPED AT     CAUSE       SENT/s  RECEIVED/s  TOTAL\n")
        );
    }

    #[test]
    fn a_function_that_is_new_counts_from_nothing() {
        let before = Statistics {
            functions: Vec::new(),
            reactors: Vec::new(),
            ..sample(1, 0)
        };
        assert_eq!(
            Round::between(&before, &sample(2, 10)).queues[1]
                .rates
                .requests,
            10.0
        );
    }
}
