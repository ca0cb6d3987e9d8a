//! By UDP: each datagram comes back as it was.

use std::collections::BTreeMap;
use std::io::{self, Error};
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use super::content::Content;

/// Of a datagram: its number.
const HEAD: usize = 8;
/// How many are on their way at a time: as much as a socket holds, at their largest.
const WINDOW: usize = 16;
/// What has not come back after this is sent again.
const LATE: Duration = Duration::from_millis(300);
/// How often one is sent.
const ATTEMPTS: u32 = 20;
/// Between beats.
const PERIOD: Duration = Duration::from_millis(5);
/// Answers that show that a path is there.
const STEADY: u32 = 20;

/// Sends everything back.
pub fn serve(socket: &UdpSocket) {
    let mut bytes = vec![0; 1 << 16];
    loop {
        // An error tells of a datagram sent before.
        if let Ok((length, from)) = socket.recv_from(&mut bytes) {
            let _ = socket.send_to(&bytes[..length], from);
        }
    }
}

fn connected(to: SocketAddr, patience: Duration) -> io::Result<UdpSocket> {
    let any = match to {
        SocketAddr::V4(_) => SocketAddr::from(([0u8; 4], 0)),
        SocketAddr::V6(_) => SocketAddr::from(([0u16; 8], 0)),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(patience))?;
    Ok(socket)
}

/// A datagram of a length that follows from its number, all of them up to `most`.
fn datagram(number: u64, most: usize) -> Vec<u8> {
    let mut bytes = number.to_le_bytes().to_vec();
    let length = number.wrapping_mul(7919) as usize % (most.max(HEAD) - HEAD + 1);
    bytes.resize(HEAD + length, 0);
    Content::new(number).fill(&mut bytes[HEAD..]);
    bytes
}

fn number(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.first_chunk()?))
}

/// Sends, and says what came of it.
pub fn send(to: SocketAddr, count: u64, most: usize) -> io::Result<()> {
    let socket = connected(to, LATE)?;
    let (mut next, mut total, mut again) = (0, 0, 0);
    let mut waiting: BTreeMap<u64, u32> = BTreeMap::new();
    let mut bytes = vec![0; 1 << 16];
    while next < count || !waiting.is_empty() {
        while next < count && waiting.len() < WINDOW {
            // One that cannot be sent counts as lost.
            let _ = socket.send(&datagram(next, most));
            waiting.insert(next, 1);
            next += 1;
        }
        let Ok(length) = socket.recv(&mut bytes) else {
            for (number, attempts) in &mut waiting {
                if *attempts == ATTEMPTS {
                    return Err(Error::other(format!(
                        "datagram {number} does not come back"
                    )));
                }
                let _ = socket.send(&datagram(*number, most));
                (*attempts, again) = (*attempts + 1, again + 1);
            }
            continue;
        };
        // One that was sent again may come twice.
        let Some(number) = number(&bytes[..length]).filter(|number| *number < next) else {
            return Err(Error::other("nobody has sent such a datagram"));
        };
        if bytes[..length] != datagram(number, most) {
            return Err(Error::other(format!("datagram {number} came back changed")));
        }
        if waiting.remove(&number).is_some() {
            total += length;
        }
    }
    println!("datagrams={count} bytes={total} again={again}");
    Ok(())
}

/// Sends until a file is there, and then until it has been answered for a while.
pub fn beat(to: SocketAddr, file: &str) -> io::Result<()> {
    let socket = connected(to, PERIOD)?;
    let sender = socket.try_clone()?;
    std::thread::spawn(move || {
        for number in 0u64.. {
            // Without a carrier or a neighbour it cannot be sent.
            let _ = sender.send(&number.to_le_bytes());
            std::thread::sleep(PERIOD);
        }
    });
    let (mut last, mut silence) = (Instant::now(), Duration::ZERO);
    let (mut answers, mut since): (u32, u32) = (0, 0);
    let mut bytes = [0; HEAD];
    while since < STEADY {
        if socket.recv(&mut bytes).is_err() {
            continue;
        }
        let now = Instant::now();
        answers += 1;
        // What was before it is another's matter: neighbours had to be found.
        if answers > STEADY {
            silence = silence.max(now - last);
            since = if Path::new(file).exists() {
                since + 1
            } else {
                0
            };
        } else if answers == STEADY {
            println!("steady");
        }
        last = now;
    }
    println!("answers={answers} silence_ms={}", silence.as_millis());
    Ok(())
}
