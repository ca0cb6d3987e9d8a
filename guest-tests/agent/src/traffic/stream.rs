//! By TCP: a round is a number of bytes there, their checksum back, as many bytes back. The writes are large, so that the kernel has
//! large segments to give away.

use std::io::{self, Error, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use super::content::{Checksum, Content};

/// Above this nothing comes any more.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of a write.
const PIECE: usize = 256 << 10;

/// What is sent.
#[derive(Clone)]
pub struct Load {
    /// In each direction, in a round of a stream.
    pub bytes: u64,
    /// At least so many.
    pub rounds: u64,
    /// Connections at a time.
    pub streams: u64,
    /// And until this file is there.
    pub until: Option<String>,
}

/// Answers every connection.
pub fn serve(listener: &TcpListener) -> io::Result<()> {
    loop {
        let (stream, from) = listener.accept()?;
        std::thread::spawn(move || {
            if let Err(error) = answer(stream) {
                eprintln!("traffic with {from}: {error}");
            }
        });
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    let mut head = [0; 16];
    loop {
        match stream.read_exact(&mut head) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        }
        let [bytes, number] = [0, 8].map(|at| {
            let word: [u8; 8] = head[at..at + 8].try_into().expect("eight bytes");
            u64::from_le_bytes(word)
        });
        let sum = receive(&mut stream, bytes)?;
        stream.write_all(&sum.0.to_le_bytes())?;
        give(&mut stream, bytes, number + 1)?;
    }
}

/// Writes content, and answers its checksum.
fn give(stream: &mut TcpStream, bytes: u64, number: u64) -> io::Result<Checksum> {
    let (mut content, mut sum, mut left) = (Content::new(number), Checksum::EMPTY, bytes);
    let mut piece = vec![0; PIECE];
    while left > 0 {
        let length = left.min(PIECE as u64) as usize;
        content.fill(&mut piece[..length]);
        sum.add(&piece[..length]);
        stream.write_all(&piece[..length])?;
        left -= length as u64;
    }
    Ok(sum)
}

fn receive(stream: &mut TcpStream, bytes: u64) -> io::Result<Checksum> {
    let (mut sum, mut left) = (Checksum::EMPTY, bytes);
    let mut piece = vec![0; PIECE];
    while left > 0 {
        let length = left.min(PIECE as u64) as usize;
        let length = stream.read(&mut piece[..length])?;
        if length == 0 {
            return Err(Error::other(format!("{left} bytes are missing")));
        }
        sum.add(&piece[..length]);
        left -= length as u64;
    }
    Ok(sum)
}

/// Sends, and says what came of it.
pub fn send(to: SocketAddr, load: &Load) -> io::Result<()> {
    let began = Instant::now();
    let streams: Vec<_> = (0..load.streams)
        .map(|stream| {
            let load = load.clone();
            std::thread::spawn(move || rounds(to, stream << 32, &load))
        })
        .collect();
    let mut done = 0;
    for stream in streams {
        done += stream.join().expect("a stream does not panic")?;
    }
    let (total, took) = (done * load.bytes, began.elapsed().as_millis());
    println!("rounds={done} bytes_each_way={total} ms={took}");
    Ok(())
}

fn rounds(to: SocketAddr, first: u64, load: &Load) -> io::Result<u64> {
    let enough = || {
        load.until
            .as_ref()
            .is_none_or(|file| Path::new(file).exists())
    };
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut done = 0;
    while done < load.rounds || !enough() {
        round(&mut stream, load.bytes, first + 2 * done)?;
        done += 1;
    }
    Ok(done)
}

fn round(stream: &mut TcpStream, bytes: u64, number: u64) -> io::Result<()> {
    let head = [bytes.to_le_bytes(), number.to_le_bytes()].concat();
    stream.write_all(&head)?;
    let sent = give(stream, bytes, number)?;
    let mut there = [0; 8];
    stream.read_exact(&mut there)?;
    let there = Checksum(u64::from_le_bytes(there));
    let back = receive(stream, bytes)?;
    let should = should_be(bytes, number + 1);
    if there == sent && back == should {
        return Ok(());
    }
    Err(Error::other(format!(
        "of {bytes} bytes: sent {sent:x?}, there {there:x?}; back {back:x?}, should be {should:x?}"
    )))
}

/// The checksum of content.
fn should_be(bytes: u64, number: u64) -> Checksum {
    let (mut content, mut sum) = (Content::new(number), Checksum::EMPTY);
    let mut piece = vec![0; PIECE];
    let mut left = bytes;
    while left > 0 {
        let length = left.min(PIECE as u64) as usize;
        content.fill(&mut piece[..length]);
        sum.add(&piece[..length]);
        left -= length as u64;
    }
    sum
}
