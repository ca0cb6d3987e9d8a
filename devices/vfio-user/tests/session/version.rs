//! `VERSION`, and what comes before it.

use crate::support::*;

#[test]
fn the_version_is_the_lower_minor_and_what_was_proposed() {
    let mut client = Client::fresh();
    let body = [&[0, 0, 9, 0], QEMU.as_bytes(), &[0]].concat();
    let reply = client.ask(command::VERSION, &body);
    let (raw, json) = reply.read::<spec::RawVersion>();
    assert_eq!((raw.major.get(), raw.minor.get()), (0, 0));
    assert!(json.ends_with(b"}}\0") && reply.body.len() <= body.len());
    assert_eq!(client.session.agreed().unwrap().client_fds, 16);
}

#[test]
fn a_client_without_capabilities_gets_none() {
    let mut client = Client::fresh();
    assert_eq!(client.ask(command::VERSION, &[0; 4]).body, [0; 4]);
    assert_eq!(client.session.agreed().unwrap().client_fds, 1);
}

#[test]
fn a_second_version_is_refused_and_the_session_goes_on() {
    let mut client = Client::new();
    assert_eq!(client.version(QEMU).errno, EINVAL);
    assert_eq!(client.map(0, 4096), 0);
}

#[test]
fn d4_a_version_that_cannot_be_agreed_on_ends_the_session() {
    let bad: &[&[u8]] = &[
        b"",
        b"\0\0\0",
        b"\x01\0\0\0{}\0",
        b"\0\0\0\0{}",
        b"\0\0\0\0{\0",
        b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":-1}}\0",
        b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":\"x\"}}\0",
    ];
    for body in bad {
        let mut client = Client::fresh();
        assert_eq!(client.ask(command::VERSION, body).errno, EINVAL, "{body:?}");
        assert!(!client.session.wants_input());
        // Nothing more is looked at.
        client.send(command::VERSION, 0, &[0; 4], vec![]);
        assert!(client.next().is_none());
        client.still_serves();
    }
}

#[test]
fn another_command_first_ends_the_session() {
    for command in [
        command::DEVICE_GET_INFO,
        command::DMA_MAP,
        command::DEVICE_RESET,
        99,
    ] {
        let mut client = Client::fresh();
        let file = client.file();
        let reply = client.ask_with(command, &map(0, 4096, 3), vec![file]);
        assert_eq!(reply.errno, EINVAL);
        assert!(client.function().log.is_empty() && client.open_files() == 0);
        client.still_serves();
    }
}

#[test]
fn a_version_that_wants_no_reply_ends_the_session() {
    let mut client = Client::fresh();
    client.send(command::VERSION, flag::NO_REPLY, &[0; 4], vec![]);
    assert!(client.next().is_none() && !client.session.wants_input());
    client.still_serves();
}

#[test]
fn max_fds_of_the_client_bound_what_is_sent() {
    let mut client = Client::fresh();
    assert_eq!(
        client
            .version(r#"{"capabilities":{"max_msg_fds":0}}"#)
            .errno,
        0
    );
    let body = words(&[32, 0, 1, 0, 0, 0, 0, 0]);
    let reply = client.ask(command::DEVICE_GET_REGION_INFO, &body);
    let (raw, _) = reply.read::<spec::RawRegionInfo>();
    assert_eq!((reply.files.len(), raw.flags.get() & region::MMAP), (0, 0));
}
