//! `REGION_READ`, `REGION_WRITE`, `REGION_WRITE_MULTI`.

use bluff_vfio_user::{Errno, Limits};

use crate::support::*;

#[test]
fn what_was_written_is_read() {
    let mut client = Client::new();
    let reply = client.ask(command::REGION_WRITE, &write(7, 0x40, &[1, 2, 3, 4]));
    assert_eq!(reply.body, access(7, 0x40, 4));
    let reply = client.ask(command::REGION_READ, &access(7, 0x3f, 6));
    assert_eq!(
        reply.body,
        [&access(7, 0x3f, 6)[..], &[0, 1, 2, 3, 4, 0]].concat()
    );
    // All of a region, and nothing of it.
    assert_eq!(
        client
            .ask(command::REGION_READ, &access(0, 0, 0x4000))
            .body
            .len(),
        16 + 0x4000
    );
    assert_eq!(
        client.ask(command::REGION_READ, &access(0, 0x4000, 0)).body,
        access(0, 0x4000, 0)
    );
    assert_eq!(
        client.ask(command::REGION_WRITE, &write(0, 0, &[])).errno,
        0
    );
    assert_eq!(client.function().log, ["write 7 0x40 [1, 2, 3, 4]"]);
}

#[test]
fn d6_ranges_past_a_region_or_that_wrap_are_refused() {
    let mut client = Client::new();
    for (region, offset, count) in [
        (0, 0x4000, 1),
        (0, 0x3fff, 2),
        (0, u64::MAX, 1),
        (0, u64::MAX, 2),
        (0, u64::MAX - 3, 4),
        (0, 1 << 63, 4),
        (7, 4093, 4),
        (3, 0, 1),
        (9, 0, 1),
        (u32::MAX, 0, 4),
    ] {
        let read = client.ask(command::REGION_READ, &access(region, offset, count));
        assert_eq!(read.errno, EINVAL, "{region} {offset:#x}");
        let data = vec![0; count as usize];
        assert_eq!(
            client
                .ask(command::REGION_WRITE, &write(region, offset, &data))
                .errno,
            EINVAL
        );
        let many = multi(&[small(0, 0, 4, 1), small(region, offset, count, 0)]);
        assert_eq!(client.ask(command::REGION_WRITE_MULTI, &many).errno, EINVAL);
    }
    assert!(
        client.function().log.is_empty(),
        "the write before a bad one"
    );
}

#[test]
fn what_may_not_be_written_is_refused() {
    let mut client = Client::new();
    assert_eq!(client.ask(command::REGION_READ, &access(2, 0, 4)).errno, 0);
    assert_eq!(
        client.ask(command::REGION_WRITE, &write(2, 0, &[1])).errno,
        EPERM
    );
    assert_eq!(
        client
            .ask(command::REGION_WRITE_MULTI, &multi(&[small(2, 0, 4, 1)]))
            .errno,
        EPERM
    );
}

#[test]
fn more_than_was_agreed_on_is_refused() {
    let limits = Limits {
        max_data_xfer_size: 64,
        ..Limits::default()
    };
    let mut client = Client::with(limits);
    client.negotiate();
    assert_eq!(client.ask(command::REGION_READ, &access(0, 0, 64)).errno, 0);
    for count in [65, u32::MAX] {
        assert_eq!(
            client.ask(command::REGION_READ, &access(0, 0, count)).errno,
            E2BIG
        );
    }
    assert_eq!(
        client
            .ask(command::REGION_WRITE, &write(0, 0, &[0; 65]))
            .errno,
        E2BIG
    );
}

#[test]
fn lengths_that_do_not_agree_are_refused() {
    let mut client = Client::new();
    let mut body = write(0, 0, &[0; 4]);
    assert_eq!(client.ask(command::REGION_WRITE, &body[..19]).errno, EINVAL);
    body.push(0);
    assert_eq!(client.ask(command::REGION_WRITE, &body).errno, EINVAL);
    assert_eq!(client.ask(command::REGION_WRITE, &body[..15]).errno, EINVAL);
    assert_eq!(
        client
            .ask(command::REGION_WRITE, &access(0, 0, u32::MAX))
            .errno,
        EINVAL
    );
    assert_eq!(client.ask(command::REGION_READ, &body).errno, EINVAL);
    assert_eq!(client.ask(command::REGION_READ, &body[..15]).errno, EINVAL);
    let file = client.file();
    assert_eq!(
        client
            .ask_with(command::REGION_READ, &access(0, 0, 4), vec![file])
            .errno,
        EINVAL
    );
    assert_eq!(client.open_files(), 0);
}

#[test]
fn what_the_function_refuses_is_told() {
    let mut client = Client::new();
    client.function().refuse = Some(Errno::PERM);
    assert_eq!(
        client.ask(command::REGION_WRITE, &write(0, 0, &[1])).errno,
        EPERM
    );
}

#[test]
fn many_writes_in_one_message() {
    let mut client = Client::new();
    let body = multi(&[
        small(0, 0, 4, 0x0403_0201),
        small(7, 8, 1, 9),
        small(0, 16, 8, u64::MAX),
    ]);
    let reply = client.ask(command::REGION_WRITE_MULTI, &body);
    assert_eq!(reply.body, 3u64.as_bytes());
    let want = [
        "write 0 0x0 [1, 2, 3, 4]",
        "write 7 0x8 [9]",
        "write 0 0x10 [255, 255, 255, 255, 255, 255, 255, 255]",
    ];
    assert_eq!(client.function().log, want);
    // As QEMU sends it: nobody wants to know.
    client.send(command::REGION_WRITE_MULTI, flag::NO_REPLY, &body, vec![]);
    assert!(client.next().is_none());
    assert_eq!(client.function().log.len(), 6);
    assert_eq!(
        client.ask(command::REGION_WRITE_MULTI, &multi(&[])).body,
        0u64.as_bytes()
    );
}

#[test]
fn a_write_of_many_that_fails_ends_them() {
    let mut client = Client::new();
    let body = multi(&[small(0, 0, 4, 1), small(0, 4, 4, 2)]);
    client.function().refuse = Some(Errno::IO);
    assert_eq!(
        client.ask(command::REGION_WRITE_MULTI, &body).errno,
        Errno::IO.get()
    );
    assert!(client.function().log.is_empty());
}

#[test]
fn many_writes_that_make_no_sense_are_refused() {
    let mut client = Client::new();
    let one = small(0, 0, 4, 1);
    let with = |count: u64, bytes: &[u8]| [count.as_bytes(), bytes].concat();
    for (body, errno) in [
        (with(2, &one), EINVAL),
        (with(0, &one), EINVAL),
        (with(1, &one[..23]), EINVAL),
        (with(1, &small(0, 0, 0, 1)), EINVAL),
        (with(1, &small(0, 0, 9, 1)), EINVAL),
        (with(u64::MAX, &one), E2BIG),
        (with(u64::MAX / 24 + 2, &one), E2BIG),
        (with(1025, &one.repeat(1025)), E2BIG),
        (vec![0; 7], EINVAL),
    ] {
        assert_eq!(client.ask(command::REGION_WRITE_MULTI, &body).errno, errno);
    }
    assert!(client.function().log.is_empty());
    // Not without having agreed on it.
    let mut client = Client::fresh();
    assert_eq!(client.version("{}").errno, 0);
    assert_eq!(
        client
            .ask(command::REGION_WRITE_MULTI, &with(1, &one))
            .errno,
        ENOTSUP
    );
}
