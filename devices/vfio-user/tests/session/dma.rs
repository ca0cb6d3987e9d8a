//! `DMA_READ` and `DMA_WRITE`, of the server.

use std::time::{Duration, Instant};

use bluff_vfio_user::{DmaDone, Errno, Limits, MAX_BYTES, MAX_OPS, framing};

use crate::support::*;

/// With memory: page 0 for all, 1 for reading, 2 for writing, 4 with a file.
fn client(text: &str) -> Client {
    let mut client = Client::fresh();
    assert_eq!(client.version(text).errno, 0);
    for (page, flags) in [(0, 3), (1, 1), (2, 2)] {
        assert_eq!(
            client
                .ask(command::DMA_MAP, &map(page * PAGE, PAGE, flags))
                .errno,
            0
        );
    }
    assert_eq!(client.map(4 * PAGE, PAGE), 0);
    client
}

fn address(at: u64, count: u64) -> Vec<u8> {
    [at.as_bytes(), count.as_bytes()].concat()
}

fn answer(client: &mut Client, asked: &Reply, flags: u32, error: u32, body: &[u8]) {
    let bytes = framing::message(asked.id, asked.command, flag::REPLY | flags, error, &[body]);
    client.session.receive(&bytes, vec![], false).unwrap();
}

fn read(client: &mut Client, at: u64, len: usize) -> Result<(), Errno> {
    client.session.dma_read(1, at, len, Instant::now())
}

fn over(client: &mut Client) -> Option<Result<Vec<u8>, Errno>> {
    client.session.poll_dma().map(|done| done.result)
}

#[test]
fn a_read_is_asked_for_and_answered() {
    let mut client = client(QEMU);
    client
        .session
        .dma_read(77, 4090, 8, Instant::now())
        .unwrap();
    let asked = client.next().unwrap();
    assert_eq!(
        (asked.command, asked.flags),
        (command::DMA_READ, flag::COMMAND)
    );
    assert_eq!(asked.body, address(4090, 8));
    assert!(client.session.poll_dma().is_none() && client.next().is_none());
    answer(
        &mut client,
        &asked,
        0,
        0,
        &[&address(4090, 8)[..], b"abcdefgh"].concat(),
    );
    let result = Ok(b"abcdefgh".to_vec());
    assert_eq!(client.session.poll_dma(), Some(DmaDone { tag: 77, result }));
    assert!(client.session.poll_timeout().is_none());
}

#[test]
fn a_write_is_answered_in_each_of_the_ways_that_clients_do() {
    let mut client = client(QEMU);
    let full = address(2 * PAGE, 3);
    for body in [&full[..], &full[..12], &[]] {
        client
            .session
            .dma_write(5, 2 * PAGE, b"abc".to_vec(), Instant::now())
            .unwrap();
        let asked = client.next().unwrap();
        assert_eq!(
            (asked.command, &asked.body),
            (command::DMA_WRITE, &[&full[..], b"abc"].concat())
        );
        answer(&mut client, &asked, 0, 0, body);
        assert_eq!(over(&mut client), Some(Ok(vec![])));
    }
}

#[test]
fn large_ones_are_split_and_put_together() {
    let mut client = client(r#"{"capabilities":{"max_data_xfer_size":1000}}"#);
    read(&mut client, 0, 4096).unwrap();
    let asked: Vec<_> = std::iter::from_fn(|| client.next()).collect();
    let want = [
        (0, 1000),
        (1000, 1000),
        (2000, 1000),
        (3000, 1000),
        (4000, 96),
    ];
    assert_eq!(asked.len(), want.len());
    // In any order.
    for i in [3, 0, 4, 2, 1] {
        let (at, len) = want[i];
        assert_eq!(asked[i].body, address(at, len));
        assert!(over(&mut client).is_none());
        let data = vec![i as u8; len as usize];
        answer(
            &mut client,
            &asked[i],
            0,
            0,
            &[address(at, len), data].concat(),
        );
    }
    let got = over(&mut client).unwrap().unwrap();
    let want: Vec<u8> = (0..4096).map(|i| (i / 1000) as u8).collect();
    assert_eq!(got, want);
}

#[test]
fn only_so_many_are_under_way() {
    let mut client = client(r#"{"capabilities":{"max_data_xfer_size":16}}"#);
    read(&mut client, 0, 4096).unwrap();
    let asked: Vec<_> = std::iter::from_fn(|| client.next()).collect();
    assert_eq!(asked.len(), 16);
    answer(
        &mut client,
        &asked[3],
        0,
        0,
        &[address(48, 16), vec![0; 16]].concat(),
    );
    assert_eq!(client.next().unwrap().body, address(256, 16));
    assert!(client.next().is_none());
}

#[test]
fn what_is_not_mapped_so_is_not_asked_for() {
    let mut client = client(QEMU);
    for (at, len) in [
        (3 * PAGE, 1),
        (2 * PAGE, 1),
        (PAGE, 4097),
        (u64::MAX, 1),
        (u64::MAX, 2),
        (0, usize::MAX),
    ] {
        assert_eq!(read(&mut client, at, len), Err(Errno::FAULT), "{at:#x}");
    }
    let write = |client: &mut Client, at, len| {
        client
            .session
            .dma_write(1, at, vec![0; len], Instant::now())
    };
    assert_eq!(write(&mut client, PAGE, 1), Err(Errno::FAULT));
    assert_eq!(write(&mut client, 0, 4097), Err(Errno::FAULT));
    assert_eq!(read(&mut client, 0, 0), Err(Errno::INVAL));
    // Over two that adjoin, and where there is a file too.
    assert_eq!(read(&mut client, 0, 8192), Ok(()));
    assert_eq!(read(&mut client, 4 * PAGE, 4096), Ok(()));
}

#[test]
fn a_client_that_takes_no_data_is_not_asked() {
    let mut client = client(r#"{"capabilities":{"max_data_xfer_size":0}}"#);
    assert_eq!(read(&mut client, 0, 1), Err(Errno::NOTSUP));
    let _ = client.session.end();
    assert_eq!(read(&mut client, 0, 1), Err(Errno::NOTCONN));
}

#[test]
fn errors_and_replies_of_a_wrong_size_fail_the_operation_alone() {
    let mut client = client(QEMU);
    let good = [&address(0, 4)[..], b"abcd"].concat();
    let cases: &[(u32, u32, Vec<u8>, Errno)] = &[
        (flag::ERROR, 19, vec![], Errno::new(19)),
        (flag::ERROR, 0, vec![], Errno::IO),
        (flag::ERROR, u32::MAX, vec![], Errno::IO),
        (flag::ERROR, 5, good.clone(), Errno::IO),
        (0, 0, vec![], Errno::IO),
        (0, 0, good[..15].to_vec(), Errno::IO),
        (0, 0, good[..19].to_vec(), Errno::IO),
        (0, 0, [&good[..], &[0]].concat(), Errno::IO),
        (0, 0, [&address(1, 4)[..], b"abcd"].concat(), Errno::IO),
        (0, 0, [&address(0, 3)[..], b"abcd"].concat(), Errno::IO),
        (
            0,
            0,
            [&address(0, 4 | 1 << 32)[..], b"abcd"].concat(),
            Errno::IO,
        ),
    ];
    for (flags, error, body, want) in cases {
        read(&mut client, 0, 4).unwrap();
        let asked = client.next().unwrap();
        answer(&mut client, &asked, *flags, *error, body);
        assert_eq!(over(&mut client), Some(Err(*want)), "{body:?}");
    }
    for body in [
        &address(0, 4)[..],
        &address(1, 3)[..],
        &address(0, 3)[..11],
        &[0; 17],
    ] {
        client
            .session
            .dma_write(1, 0, b"abc".to_vec(), Instant::now())
            .unwrap();
        let asked = client.next().unwrap();
        answer(&mut client, &asked, 0, 0, body);
        assert_eq!(over(&mut client), Some(Err(Errno::IO)));
    }
    assert_eq!(client.map(100 * PAGE, PAGE), 0);
}

#[test]
fn replies_to_nothing_end_the_session() {
    for (id, command, sent) in [
        (0, command::DMA_READ, false),
        (1, command::DMA_READ, true),
        (0, command::DMA_WRITE, true),
        (0, command::DMA_MAP, true),
    ] {
        let mut client = client(QEMU);
        if sent {
            read(&mut client, 0, 4).unwrap();
            assert_eq!(client.next().unwrap().id, 0);
        }
        let bytes = framing::message(id, command, flag::REPLY, 0, &[]);
        assert!(client.session.receive(&bytes, vec![], false).is_err());
        let _ = client.session.end();
        assert_eq!(over(&mut client), sent.then_some(Err(Errno::NOTCONN)));
        client.still_serves();
    }
}

#[test]
fn what_is_late_has_failed_and_its_reply_is_dropped() {
    let mut client = client(QEMU);
    let start = Instant::now();
    client.session.dma_read(1, 0, 4, start).unwrap();
    client
        .session
        .dma_read(2, 0, 4, start + Duration::from_secs(1))
        .unwrap();
    let late = client.next().unwrap();
    let other = client.next().unwrap();
    let due = client.session.poll_timeout().unwrap();
    assert_eq!(due, start + Limits::default().dma_timeout);
    client.session.handle_timeout(due - Duration::from_nanos(1));
    assert!(client.session.poll_dma().is_none());
    client.session.handle_timeout(due);
    let result = Err(Errno::TIMEDOUT);
    assert_eq!(client.session.poll_dma(), Some(DmaDone { tag: 1, result }));
    assert_eq!(
        client.session.poll_timeout(),
        Some(due + Duration::from_secs(1))
    );
    // Its ID is not used for another one as long as the reply can come.
    let body = [&address(0, 4)[..], b"abcd"].concat();
    answer(&mut client, &late, 0, 0, &body);
    assert!(client.session.poll_dma().is_none());
    answer(&mut client, &other, 0, 0, &body);
    assert_eq!(over(&mut client), Some(Ok(b"abcd".to_vec())));
    // But once only.
    let again = framing::message(late.id, late.command, flag::REPLY, 0, &[&body]);
    assert!(client.session.receive(&again, vec![], false).is_err());
}

#[test]
fn d1_an_unmap_ends_what_was_asked_for_in_its_range() {
    let mut client = client(QEMU);
    for (tag, at, len) in [(0, 0, 4096), (1, PAGE, 1), (2, 0, 8192), (4, 4 * PAGE, 1)] {
        client
            .session
            .dma_read(tag, at, len, Instant::now())
            .unwrap();
    }
    let asked = client.next().unwrap();
    client.function().hold = true;
    client.send(command::DMA_UNMAP, 0, &unmap(PAGE, PAGE, 0), vec![]);
    // Before the function says that it is out of use, so that it can.
    for tag in [1, 2] {
        let result = Err(Errno::FAULT);
        assert_eq!(client.session.poll_dma(), Some(DmaDone { tag, result }));
    }
    assert!(client.session.poll_dma().is_none());
    // Replies are taken in while the unmap waits.
    answer(
        &mut client,
        &asked,
        0,
        0,
        &[address(0, 4096), vec![1; 4096]].concat(),
    );
    assert_eq!(over(&mut client), Some(Ok(vec![1; 4096])));
    assert!(client.session.is_busy());
    client.release();
    let next = client.next().unwrap();
    assert_eq!(
        (next.command, next.flags),
        (command::DMA_UNMAP, flag::REPLY)
    );
    // What was not sent yet is not sent any more.
    assert_eq!(client.next().unwrap().body, address(4 * PAGE, 1));
    assert!(client.next().is_none());
}

#[test]
fn a_reset_and_the_end_end_everything() {
    let mut client = client(QEMU);
    read(&mut client, 0, 4).unwrap();
    assert_eq!(
        client.ask_later(command::DEVICE_RESET),
        Some(Err(Errno::CANCELED))
    );
    read(&mut client, 0, 4).unwrap();
    let _ = client.session.end();
    assert_eq!(over(&mut client), Some(Err(Errno::NOTCONN)));
    assert!(client.session.poll_timeout().is_none());
}

impl Client {
    fn ask_later(&mut self, command: u16) -> Option<Result<Vec<u8>, Errno>> {
        self.send(command, 0, &[], vec![]);
        over(self)
    }
}

#[test]
fn what_is_queued_has_a_bound() {
    let mut client = client(QEMU);
    let free = map(1 << 40, 1 << 40, 3);
    assert_eq!(client.ask(command::DMA_MAP, &free).errno, 0);
    assert_eq!(read(&mut client, 1 << 40, MAX_BYTES + 1), Err(Errno::BUSY));
    assert_eq!(read(&mut client, 1 << 40, 1 << 39), Err(Errno::BUSY));
    read(&mut client, 1 << 40, MAX_BYTES).unwrap();
    assert_eq!(read(&mut client, 0, 1), Err(Errno::BUSY));
    client.ask_later(command::DEVICE_RESET);
    for _ in 0..MAX_OPS {
        read(&mut client, 0, 1).unwrap();
    }
    assert_eq!(read(&mut client, 0, 1), Err(Errno::BUSY));
}

#[test]
fn a_client_that_never_answers_is_not_asked_for_ever() {
    let mut client = client(QEMU);
    let mut now = Instant::now();
    for _ in 0..100_000 {
        if client.session.dma_read(1, 0, 4, now) == Err(Errno::BUSY) {
            return;
        }
        while client.next().is_some() {}
        now += Duration::from_secs(60);
        client.session.handle_timeout(now);
        while client.session.poll_dma().is_some() {}
    }
    panic!("no bound");
}

#[test]
fn an_id_whose_reply_can_still_come_is_not_used_again() {
    let mut client = client(QEMU);
    let now = Instant::now();
    client.session.dma_read(0, 0, 4, now).unwrap();
    let late = client.next().unwrap();
    let due = client.session.poll_timeout().unwrap();
    client.session.handle_timeout(due);
    assert_eq!(over(&mut client), Some(Err(Errno::TIMEDOUT)));
    for _ in 0..=u16::MAX {
        read(&mut client, 0, 4).unwrap();
        let asked = client.next().unwrap();
        assert_ne!(asked.id, late.id);
        answer(
            &mut client,
            &asked,
            0,
            0,
            &[&address(0, 4)[..], b"abcd"].concat(),
        );
        assert_eq!(over(&mut client), Some(Ok(b"abcd".to_vec())));
    }
}
