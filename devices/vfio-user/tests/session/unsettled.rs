//! Writes that end DMA: answered when that is over, and with no DMA message left that the client would have to answer before.

use std::time::Instant;

use bluff_vfio_user::{DmaDone, Errno};

use crate::support::*;

fn command_write(value: u16) -> Vec<u8> {
    write(COMMAND.0, COMMAND.1, &value.to_le_bytes())
}

#[test]
fn a_write_that_ends_dma_is_answered_when_it_has_ended() {
    let mut client = Client::new();
    client.function().hold = true;
    let first = client.send(command::REGION_WRITE, 0, &command_write(0), vec![]);
    let read = client.send(command::REGION_READ, 0, &access(7, 0, 1), vec![]);
    assert!(client.next().is_none() && client.session.is_busy());
    client.release();
    let reply = client.next().unwrap();
    assert_eq!((reply.id, reply.errno), (first, 0));
    assert_eq!(reply.body, access(7, 4, 2));
    assert_eq!(client.next().unwrap().id, read);
}

#[test]
fn a_posted_write_that_ends_dma_holds_up_what_comes_after_it() {
    let mut client = Client::new();
    client.function().hold = true;
    client.send(
        command::REGION_WRITE,
        flag::NO_REPLY,
        &command_write(0),
        vec![],
    );
    let read = client.send(command::REGION_READ, 0, &access(7, 0, 1), vec![]);
    assert!(client.next().is_none());
    client.release();
    assert_eq!(client.next().unwrap().id, read);
    assert!(client.next().is_none());
}

#[test]
fn of_many_writes_the_rest_goes_on_after_it() {
    let mut client = Client::new();
    client.function().hold = true;
    let writes = [
        small(0, 0, 1, 1),
        small(COMMAND.0, COMMAND.1, 2, 2),
        small(0, 8, 1, 3),
        small(COMMAND.0, COMMAND.1, 2, 4),
        small(0, 16, 1, 5),
    ];
    let want = [
        "write 0 0x0 [1]",
        "write 7 0x4 [2, 0]",
        "write 0 0x8 [3]",
        "write 7 0x4 [4, 0]",
        "write 0 0x10 [5]",
    ];
    client.send(command::REGION_WRITE_MULTI, 0, &multi(&writes), vec![]);
    assert_eq!(client.function().log, want[..2]);
    client.release();
    assert_eq!(client.function().log, want[..4]);
    assert!(client.next().is_none() && client.session.is_busy());
    // What the function refuses now is not the first.
    client.function().refuse = Some(Errno::IO);
    client.release();
    assert_eq!(client.next().unwrap().body, 4u64.as_bytes());
    // Over at once.
    client.function().refuse = None;
    client.function().hold = false;
    let reply = client.ask(command::REGION_WRITE_MULTI, &multi(&writes));
    assert_eq!(reply.body, 5u64.as_bytes());
}

#[test]
fn a_client_that_goes_within_many_writes_leaves_the_rest_undone() {
    let mut client = Client::new();
    client.function().hold = true;
    let writes = [small(COMMAND.0, COMMAND.1, 2, 0), small(0, 8, 1, 3)];
    client.send(command::REGION_WRITE_MULTI, 0, &multi(&writes), vec![]);
    let old = client.function().held.clone();
    let _ = client.session.end();
    for ticket in old {
        client.session.finished(ticket);
    }
    assert!(!client.session.is_idle());
    assert_eq!(
        client.function().log,
        ["write 7 0x4 [0, 0]", "disconnected"]
    );
    client.function().hold = false;
    client.still_serves();
}

/// QEMU holds its big lock while it waits for the reply.
#[test]
fn messages_for_dma_have_failed_by_then() {
    for late in [false, true] {
        let mut client = Client::new();
        assert_eq!(client.ask(command::DMA_MAP, &map(0, PAGE, 3)).errno, 0);
        let now = Instant::now();
        for tag in 0..20 {
            client.session.dma_read(tag, 0, 8, now).unwrap();
        }
        assert_eq!(client.next().unwrap().command, command::DMA_READ);
        client.function().hold = late;
        client.send(command::REGION_WRITE, 0, &command_write(0), vec![]);
        for tag in 0..20 {
            let result = Err(Errno::CANCELED);
            assert_eq!(client.session.poll_dma(), Some(DmaDone { tag, result }));
        }
        client.release();
        // Nothing is asked for any more.
        assert_eq!(client.next().unwrap().command, command::REGION_WRITE);
        assert!(client.next().is_none());
    }
}
