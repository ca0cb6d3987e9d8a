//! Traffic between guests whose content is known to both sides, and checked: the same program under another name (`traffic`).
//!
//! ```text
//!   traffic serve PORT                          answers the others, by TCP and UDP, until it is killed
//!   traffic tcp ADDRESS PORT [KEY=N...]         bytes= in each direction, rounds=, streams=, until= a file is there
//!   traffic udp ADDRESS PORT [KEY=N...]         count= datagrams that are sent back, of up to bytes=
//!   traffic beat ADDRESS PORT FILE              a datagram every 5 ms; when FILE is there and answers still come: the longest silence
//! ```
//!
//! What was found is one line of `key=value` on standard output. Content that is not what it should be is an error. A datagram that is
//! lost is sent again, and counted.

mod content;
mod datagram;
mod stream;

use std::io::{self, Error};
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

/// The name by which the program is this one.
pub const NAME: &str = "traffic";

/// Does what the arguments say.
pub fn run(arguments: &[String]) -> io::Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["serve", port] => serve(number(port)?),
        ["tcp", address, port, ref keys @ ..] => {
            let load = stream::Load {
                bytes: value(keys, "bytes", 1 << 20)?,
                rounds: value(keys, "rounds", 1)?,
                streams: value(keys, "streams", 1)?,
                until: text(keys, "until").map(str::to_owned),
            };
            stream::send(place(address, port)?, &load)
        }
        ["udp", address, port, ref keys @ ..] => {
            let (count, bytes) = (value(keys, "count", 100)?, value(keys, "bytes", 1400)?);
            datagram::send(place(address, port)?, count, bytes)
        }
        ["beat", address, port, file] => datagram::beat(place(address, port)?, file),
        _ => Err(Error::other(format!("{words:?} makes no sense"))),
    }
}

fn number<T: FromStr>(text: &str) -> io::Result<T> {
    let wrong = |_| Error::other(format!("{text} makes no sense there"));
    text.parse().map_err(wrong)
}

/// What `name=…` says.
fn text<'a>(keys: &[&'a str], name: &str) -> Option<&'a str> {
    let value = |key: &&'a str| {
        let (key, value) = key.split_once('=')?;
        (key == name).then_some(value)
    };
    keys.iter().find_map(value)
}

/// What `name=N` says, or what it is where that is left out.
fn value<T: FromStr>(keys: &[&str], name: &str, or: T) -> io::Result<T> {
    text(keys, name).map_or(Ok(or), number)
}

fn place(address: &str, port: &str) -> io::Result<SocketAddr> {
    let address: IpAddr = number(address)?;
    Ok(SocketAddr::new(address, number(port)?))
}

/// Every address of the machine. One without IPv6 has only the others.
fn serve(port: u16) -> io::Result<()> {
    let all = [
        SocketAddr::from(([0u16; 8], port)),
        SocketAddr::from(([0u8; 4], port)),
    ];
    let datagrams = std::net::UdpSocket::bind(&all[..])?;
    std::thread::spawn(move || datagram::serve(&datagrams));
    stream::serve(&std::net::TcpListener::bind(&all[..])?)
}
