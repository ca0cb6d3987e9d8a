use std::io::{Read, Write};

use super::*;
use bluff_vfio_user::keeper::BOUNDS as VFIO_USER;
use bluff_vhost_user::keeper::BOUNDS as VHOST_USER;

fn id() -> Id {
    "blk0".parse().unwrap()
}

struct Rig {
    dir: tempfile::TempDir,
    fronts: Fronts,
}

impl Rig {
    fn new() -> Self {
        Self::with(VHOST_USER)
    }

    fn with(bounds: Bounds) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut fronts = Fronts::new().unwrap();
        let listener = BoundSocket::bind(&dir.path().join("s"), 0o600).unwrap();
        fronts.open(id(), Some(listener), bounds).unwrap();
        Self { dir, fronts }
    }

    fn connect(&self) -> UnixStream {
        let front = UnixStream::connect(self.dir.path().join("s")).unwrap();
        front.set_nonblocking(true).unwrap();
        front
    }

    fn turn(&mut self) -> Vec<Happening> {
        self.fronts.turn(Instant::now())
    }

    /// A front end that the data half has.
    fn handed(&mut self) -> (UnixStream, HandOver) {
        let front = self.connect();
        assert_eq!(self.turn(), [Happening::Came(id())]);
        let handed = self.fronts.hand_over(&id()).unwrap().unwrap();
        (front, handed)
    }

    fn commit(&mut self, commit: Commit) -> io::Result<Option<u64>> {
        let (bytes, files) = commit.encode();
        let mut descriptors = vec![record::write(&bytes).unwrap()];
        let files = files.into_iter().map(|f| f.try_clone_to_owned().unwrap());
        descriptors.extend(files);
        self.fronts.commit(&id(), descriptors)
    }
}

fn commit(seq: u64, consume: usize, reply: &[u8]) -> Commit {
    Commit {
        seq,
        state: vec![seq as u8],
        files: vec![(seq, record::write(b"").unwrap())],
        consume,
        reply: reply.to_vec(),
        ..Commit::default()
    }
}

type Lie = dyn Fn(&mut Rig) -> io::Result<Option<u64>>;

fn has_ended(front: &mut UnixStream) -> bool {
    matches!(front.read(&mut [0; 64]), Ok(0))
}

#[test]
fn a_second_front_end_is_turned_away_and_one_that_comes_back_waits() {
    let mut rig = Rig::new();
    let (first, _) = rig.handed();
    let mut second = rig.connect();
    assert_eq!(rig.turn(), []);
    assert!(has_ended(&mut second));
    drop(first);
    let mut third = rig.connect();
    assert_eq!(rig.turn(), []);
    assert!(rig.fronts.hand_over(&id()).unwrap().is_none());
    rig.fronts.gone(&id());
    assert!(rig.fronts.hand_over(&id()).unwrap().is_some());
    assert!(!has_ended(&mut third));
    // What is said of one that is not there concerns nobody.
    rig.fronts.data_half_lost();
    rig.fronts.gone(&id());
    assert!(rig.fronts.hand_over(&id()).unwrap().is_some());
    rig.fronts.close(&id());
    assert!(has_ended(&mut third));
    assert!(!rig.dir.path().join("s").exists());
}

#[test]
fn who_cannot_be_served_is_turned_away_at_once() {
    let mut rig = Rig::new();
    let (mut first, _) = rig.handed();
    rig.fronts.bar(&id(), true);
    let mut second = rig.connect();
    assert_eq!(rig.turn(), []);
    assert!(has_ended(&mut first) && has_ended(&mut second));
    rig.fronts.bar(&id(), false);
    let (mut third, _) = rig.handed();
    assert!(!has_ended(&mut third));
}

#[test]
fn who_has_gone_while_there_was_no_data_half_is_not_handed_over() {
    let mut rig = Rig::new();
    let (mut front, _) = rig.handed();
    front.write_all(b"one").unwrap();
    rig.commit(commit(1, 3, b"")).unwrap();
    rig.fronts.data_half_lost();
    drop(front);
    assert!(rig.fronts.hand_over(&id()).unwrap().is_none());
    assert!(!rig.fronts.is_taken(&id()));
    // The one that came in its place is.
    let (front, _) = rig.handed();
    rig.commit(commit(1, 0, b"")).unwrap();
    rig.fronts.data_half_lost();
    drop(front);
    let _next = rig.connect();
    assert_eq!(rig.turn(), []);
    let next = rig.fronts.hand_over(&id()).unwrap().unwrap();
    assert!(next.recorded.is_none(), "a session of its own");
}

#[test]
fn what_is_recorded_goes_to_the_next_data_half() {
    let mut rig = Rig::new();
    let (mut front, first) = rig.handed();
    assert!(first.recorded.is_none());
    front.write_all(b"onetwo").unwrap();
    assert_eq!(rig.commit(commit(1, 3, b"ONE")).unwrap(), Some(1));
    assert_eq!(
        rig.commit(commit(1, 3, b"ONE")).unwrap(),
        Some(1),
        "sent twice"
    );
    rig.fronts.data_half_lost();
    assert!(rig.commit(commit(2, 3, b"TWO")).is_err(), "whose?");
    let next = rig.fronts.hand_over(&id()).unwrap().unwrap();
    let (state, files) = next.recorded.unwrap();
    assert_eq!(record::read(state.as_fd(), 1).unwrap(), [1]);
    assert_eq!(files.iter().map(|(key, _)| *key).collect::<Vec<_>>(), [1]);
    let mut waiting = [0; 8];
    let there = UnixStream::from(next.connection)
        .read(&mut waiting)
        .unwrap();
    assert_eq!(&waiting[..there], b"two");
    let mut said = [0; 64];
    let n = front.read(&mut said).unwrap();
    assert_eq!(&said[..n], b"ONE");
}

#[test]
fn a_front_end_that_does_not_read_holds_up_itself() {
    let mut rig = Rig::new();
    let (mut front, handed) = rig.handed();
    let mut back = UnixStream::from(handed.connection);
    back.set_nonblocking(true).unwrap();
    while back.write(&[0; 4096]).is_ok() {}
    front.write_all(b"onetwo").unwrap();
    assert_eq!(rig.commit(commit(1, 3, b"ONE")).unwrap(), None);
    assert_eq!(rig.turn(), []);
    rig.fronts.data_half_lost();
    assert!(
        rig.fronts.hand_over(&id()).unwrap().is_none(),
        "a step is under way"
    );
    let mut sink = vec![0; 1 << 20];
    while front.read(&mut sink).is_ok() {}
    assert_eq!(rig.turn(), [Happening::Came(id())]);
    assert!(rig.fronts.hand_over(&id()).unwrap().is_some());

    // The same, and the data half lives.
    while back.write(&[0; 4096]).is_ok() {}
    assert_eq!(rig.commit(commit(2, 3, b"TWO")).unwrap(), None);
    while front.read(&mut sink).is_ok() {}
    assert_eq!(rig.turn(), [Happening::Done(id(), 2)]);
    assert_eq!(rig.turn(), []);
}

#[test]
fn a_front_end_that_leaves_without_reading_is_let_go() {
    let mut rig = Rig::new();
    let (front, handed) = rig.handed();
    let mut back = UnixStream::from(handed.connection);
    back.set_nonblocking(true).unwrap();
    while back.write(&[0; 4096]).is_ok() {}
    (&front).write_all(b"one").unwrap();
    assert_eq!(rig.commit(commit(1, 3, b"ONE")).unwrap(), None);
    rig.fronts.data_half_lost();
    drop(front);
    // Nothing of it is for the next data half.
    assert_eq!(rig.turn(), [Happening::Came(id())]);
    assert!(rig.fronts.hand_over(&id()).unwrap().is_none());
    assert!(!rig.fronts.is_taken(&id()));
}

#[test]
fn a_data_half_that_lies_costs_its_own_front_end() {
    let lies: [&Lie; 6] = [
        &|rig| {
            rig.fronts
                .commit(&id(), vec![tempfile::tempfile().unwrap().into()])
        },
        &|rig| {
            rig.fronts
                .commit(&id(), vec![record::write(&[7; 100]).unwrap()])
        },
        // Takes what the front end has not sent.
        &|rig| rig.commit(commit(1, 100, b"")),
        &|rig| rig.commit(commit(1, usize::MAX, b"")),
        &|rig| rig.commit(commit(1, 0, &vec![0; 1 << 16])),
        &|rig| {
            // More descriptors than any session stands on.
            for seq in 1.. {
                let mut step = commit(seq, 0, b"");
                let first = seq * 100;
                let file = |n| (first + n, record::write(b"").unwrap());
                step.files = (0..50).map(file).collect();
                rig.commit(step)?;
                assert!(seq * 50 <= VHOST_USER.kept as u64);
            }
            unreachable!()
        },
    ];
    for (n, lie) in lies.iter().enumerate() {
        let mut rig = Rig::new();
        let (mut front, _) = rig.handed();
        front.write_all(b"x").unwrap();
        assert!(lie(&mut rig).is_err(), "{n}");
        assert!(has_ended(&mut front), "{n}");
    }
    let mut rig = Rig::new();
    assert!(rig.commit(commit(1, 0, b"")).is_err(), "nobody is there");
    // Descriptors that were lost: the step cannot be recorded.
    let (mut front, _) = rig.handed();
    assert!(rig.fronts.commit(&id(), Vec::new()).is_err());
    assert!(has_ended(&mut front));
}

/// A step whose state and descriptors are more than any session over vhost-user has.
fn large(seq: u64, files: u64) -> Commit {
    let file = |n| (seq * 1000 + n, record::write(b"").unwrap());
    Commit {
        state: vec![seq as u8; 2 << 20],
        files: (0..files).map(file).collect(),
        ..commit(seq, 3, b"ONE")
    }
}

#[test]
fn each_attachment_has_its_bounds() {
    let mut rig = Rig::with(VFIO_USER);
    let (mut front, _) = rig.handed();
    front.write_all(b"onetwo").unwrap();
    assert_eq!(rig.commit(large(1, 40)).unwrap(), Some(1));
    let mut next = large(2, 40);
    next.dropped = (1000..1010).collect();
    assert_eq!(rig.commit(next).unwrap(), Some(2));
    rig.fronts.data_half_lost();
    let next = rig.fronts.hand_over(&id()).unwrap().unwrap();
    let (state, files) = next.recorded.unwrap();
    let state = record::read(state.as_fd(), VFIO_USER.record).unwrap();
    assert_eq!(state, vec![2; 2 << 20]);
    let keys: Vec<_> = files.iter().map(|(key, _)| *key).collect();
    let expected: Vec<_> = (1010..1040).chain(2000..2040).collect();
    assert_eq!(keys, expected);

    let mut rig = Rig::new();
    let (mut front, _) = rig.handed();
    front.write_all(b"one").unwrap();
    assert!(rig.commit(large(1, 0)).is_err(), "its state is too long");
    assert!(has_ended(&mut front));

    let fewer = Bounds {
        kept: 39,
        ..VFIO_USER
    };
    let mut rig = Rig::with(fewer);
    let (mut front, _) = rig.handed();
    front.write_all(b"one").unwrap();
    assert!(rig.commit(large(1, 40)).is_err(), "a share of descriptors");
    assert!(has_ended(&mut front));
}

#[test]
fn what_was_recorded_of_one_that_left_goes_to_nobody() {
    let mut rig = Rig::with(VFIO_USER);
    let (mut front, _) = rig.handed();
    front.write_all(b"one").unwrap();
    rig.commit(large(1, 40)).unwrap();
    rig.fronts.keep(&id(), vec![file()]).unwrap();
    rig.fronts.data_half_lost();
    drop(front);
    let _next = rig.connect();
    assert_eq!(rig.turn(), []);
    // The function stays what it was; its session is another.
    assert_eq!(rig.fronts.files(&id()).unwrap().len(), 1);
    let next = rig.fronts.hand_over(&id()).unwrap().unwrap();
    assert!(next.recorded.is_none());
}

fn file() -> OwnedFd {
    tempfile::tempfile().unwrap().into()
}

fn number(file: &OwnedFd) -> u64 {
    rustix::fs::fstat(file).unwrap().st_ino
}

#[test]
fn a_function_keeps_files_until_a_data_half_has_others() {
    let mut rig = Rig::with(VFIO_USER);
    let of = |rig: &Rig| -> Vec<u64> {
        let files = rig.fronts.files(&id()).unwrap();
        files.iter().map(number).collect()
    };
    assert!(of(&rig).is_empty());
    let first = [file(), file()];
    let numbers = first.each_ref().map(number);
    rig.fronts.keep(&id(), first.into()).unwrap();
    for _ in 0..2 {
        rig.fronts.data_half_lost();
        assert_eq!(of(&rig), numbers);
        // The next one goes on with them.
        rig.fronts.keep(&id(), Vec::new()).unwrap();
        assert_eq!(of(&rig), numbers);
    }
    // It could not, and has made others.
    let others = vec![file()];
    let number = number(&others[0]);
    rig.fronts.keep(&id(), others).unwrap();
    assert_eq!(of(&rig), [number]);
    rig.fronts.close(&id());
    assert!(of(&rig).is_empty());
    // Of a function that is not there any more.
    rig.fronts.keep(&id(), vec![file()]).unwrap();
    assert!(of(&rig).is_empty());

    let mut rig = Rig::with(VFIO_USER);
    let many = (0..=FILES_MAX).map(|_| file()).collect();
    assert!(rig.fronts.keep(&id(), many).is_err());
    assert!(of(&rig).is_empty());
}
