//! Answers that come later, and the order of all others.

use crate::support::*;

fn ids(client: &mut Client) -> Vec<u16> {
    std::iter::from_fn(|| client.next()).map(|r| r.id).collect()
}

#[test]
fn d1_an_unmap_is_answered_when_the_memory_is_out_of_use() {
    let mut client = Client::new();
    assert_eq!(client.map(0, PAGE), 0);
    client.function().hold = true;
    let unmap = client.send(command::DMA_UNMAP, 0, &unmap(0, PAGE, 0), vec![]);
    assert!(client.next().is_none() && client.session.is_busy());
    // What comes after it waits, and is served in its order.
    let file = client.file();
    let map = client.send(command::DMA_MAP, 0, &map(0, PAGE, 3), vec![file]);
    let write = client.send(
        command::REGION_WRITE,
        flag::NO_REPLY,
        &write(7, 0, &[1]),
        vec![],
    );
    let read = client.send(command::REGION_READ, 0, &access(7, 0, 1), vec![]);
    assert!(client.next().is_none());
    assert!(client.function().maps.is_empty() && client.function().log == ["unmap 1"]);
    client.function().hold = false;
    client.release();
    assert_eq!(write, map + 1);
    assert_eq!(ids(&mut client), [unmap, map, read]);
    assert_eq!(client.function().maps.len(), 1);
    assert_eq!(client.function().log, ["unmap 1", "write 7 0x0 [1]"]);
}

#[test]
fn a_map_is_answered_when_the_device_knows_of_it() {
    let mut client = Client::new();
    client.function().hold = true;
    let file = client.file();
    let mapped = client.send(command::DMA_MAP, 0, &map(0, PAGE, 3), vec![file]);
    let info = client.send(command::DEVICE_GET_INFO, 0, &words(&[16, 0, 0, 0]), vec![]);
    assert!(client.next().is_none() && client.session.is_busy());
    client.function().hold = false;
    client.release();
    assert_eq!(ids(&mut client), [mapped, info]);
}

#[test]
fn a_reset_is_answered_when_it_is_over() {
    let mut client = Client::new();
    client.function().hold = true;
    let reset = client.send(command::DEVICE_RESET, 0, &[], vec![]);
    let info = client.send(command::DEVICE_GET_INFO, 0, &words(&[16, 0, 0, 0]), vec![]);
    assert!(client.next().is_none());
    client.release();
    assert_eq!(ids(&mut client), [reset, info]);
    client.function().hold = false;
    assert!(client.ask(command::DEVICE_RESET, &[]).body.is_empty());
    assert_eq!(client.ask(command::DEVICE_RESET, &[0]).errno, EINVAL);
    let file = client.file();
    assert_eq!(
        client
            .ask_with(command::DEVICE_RESET, &[], vec![file])
            .errno,
        EINVAL
    );
    assert_eq!(client.open_files(), 0);
    assert_eq!(client.function().log, ["reset", "reset"]);
}

#[test]
fn a_late_answer_that_nobody_wants_is_not_sent() {
    let mut client = Client::new();
    client.function().hold = true;
    client.send(command::DEVICE_RESET, flag::NO_REPLY, &[], vec![]);
    assert!(client.session.is_busy());
    client.release();
    assert!(client.next().is_none() && !client.session.is_busy());
}

#[test]
fn a_ticket_counts_once() {
    let mut client = Client::new();
    client.function().hold = true;
    client.send(command::DEVICE_RESET, 0, &[], vec![]);
    let old = client.function().held[0];
    client.release();
    assert!(client.next().is_some());
    client.send(command::DEVICE_RESET, 0, &[], vec![]);
    client.session.finished(old);
    assert!(client.next().is_none() && client.session.is_busy());
    client.release();
    assert!(client.next().is_some());
}

#[test]
fn a_refused_command_without_a_reply_is_silent() {
    let mut client = Client::new();
    let file = client.file();
    client.send(
        command::DMA_MAP,
        flag::NO_REPLY,
        &map(1, PAGE, 3),
        vec![file],
    );
    client.send(99, flag::NO_REPLY, &[], vec![]);
    assert!(client.next().is_none() && client.open_files() == 0);
    let refused: Vec<_> = std::iter::from_fn(|| client.session.poll_refused())
        .map(|r| r.command)
        .collect();
    assert_eq!(refused, [command::DMA_MAP, 99]);
    assert_eq!(client.map(0, PAGE), 0);
}

#[test]
fn message_ids_may_be_the_same() {
    let mut client = Client::new();
    let one = bluff_vfio_user::framing::message(
        7,
        command::DEVICE_GET_INFO,
        0,
        0,
        &[&words(&[16, 0, 0, 0])],
    );
    client
        .session
        .receive(&one.repeat(3), vec![], false)
        .unwrap();
    assert_eq!(ids(&mut client), [7, 7, 7]);
}

#[test]
fn a_client_that_sends_without_waiting_is_read_up_to_a_bound() {
    let mut client = Client::new();
    client.function().hold = true;
    client.send(command::DEVICE_RESET, 0, &[], vec![]);
    let mut sent = 0;
    while client.session.wants_input() {
        let files = client.files(1);
        client.send(command::DMA_MAP, 0, &map(sent * PAGE, PAGE, 3), files);
        sent += 1;
        assert!(sent < 1000, "no bound");
    }
    client.function().hold = false;
    client.release();
    assert!(client.session.wants_input());
    assert_eq!(ids(&mut client).len() as u64, 1 + sent);
    assert_eq!(client.open_files() as u64, sent);
}

#[test]
fn a_client_that_does_not_read_is_not_served_for_ever() {
    let mut client = Client::new();
    // In one read: far more answers than anybody wants to keep.
    let one =
        bluff_vfio_user::framing::message(7, command::REGION_READ, 0, 0, &[&access(0, 0, 0x4000)]);
    client
        .session
        .receive(&one.repeat(1000), vec![], false)
        .unwrap();
    assert!(!client.session.wants_input());
    let mut answers = 0;
    while let Some(reply) = client.next() {
        assert_eq!(reply.body.len(), 16 + 0x4000);
        answers += 1;
    }
    // As it reads, the others are served.
    assert_eq!(answers, 1000);
    assert!(client.session.wants_input());
}
