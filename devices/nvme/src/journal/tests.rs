use super::*;

fn command(cid: u16) -> Command {
    Command {
        opcode: 2,
        cid: cid.into(),
        ..Command::default()
    }
}

#[test]
fn another_process_finds_what_was_written() {
    let journal = Journal::new(3).unwrap();
    assert_eq!((journal.registers(), journal.admin()), (None, None));
    for n in 1..5 {
        journal.set_registers([n; REGISTERS]);
        assert!(journal.set_admin(&vec![n as u8; 1000 * n as usize + 3]));
    }
    let queue = journal.queue(2);
    queue.begin();
    queue.begin_sq(1);
    queue.take(7, 100, 1, 0, &command(5));
    queue.take(3, 101, 1, 1, &command(6));
    queue.take(0, 102, 3, 9, &command(7));
    queue.strike(7);
    let completion = Completion {
        cid: 6.into(),
        ..Completion::default()
    };
    queue.complete(3, 4, &completion);
    queue.set_head(2);
    queue.set_posted(4);

    let journal = Journal::open(journal.file().unwrap(), 3).unwrap();
    assert_eq!(journal.registers(), Some([4; REGISTERS]));
    assert_eq!(journal.admin(), Some(vec![4; 4003]));
    let queue = journal.queue(2);
    assert_eq!(queue.position(), (4, 2));
    assert_eq!(
        (
            queue.count_taken(1),
            queue.count_taken(3),
            queue.count_taken(2)
        ),
        (2, 10, 0)
    );
    let found = |index, number, sq, taken, cid, stage| InFlight {
        index,
        number,
        sq,
        taken,
        command: command(cid),
        stage,
    };
    let posting = Stage::Posting(4, completion);
    assert_eq!(
        queue.commands(),
        [
            found(3, 101, 1, 1, 6, posting),
            found(0, 102, 3, 9, 7, Stage::Begun)
        ]
    );
    queue.unpost(3);
    assert_eq!(queue.commands()[0].stage, Stage::Completed(completion));
    assert_eq!(journal.queue(1).commands(), [], "another queue's");
    queue.begin();
    assert_eq!((queue.commands(), queue.position()), (Vec::new(), (0, 0)));
}

#[test]
fn a_command_that_was_written_and_not_counted_was_taken() {
    let journal = Journal::new(1).unwrap();
    let queue = journal.queue(1);
    for stores in 0.. {
        queue.begin();
        queue.begin_sq(1);
        death::after(Some(stores));
        let taken = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            queue.take(0, 0, 1, 0, &command(1));
        }));
        death::after(None);
        let (count, found) = (queue.count_taken(1), queue.commands());
        assert_eq!(count as usize, found.len(), "killed before store {stores}");
        if taken.is_ok() {
            assert_eq!(count, 1);
            break;
        }
    }
}

#[test]
fn what_is_no_journal_is_refused() {
    let file = || Journal::new(2).unwrap().file().unwrap();
    assert!(Journal::open(file(), 2).is_ok());
    assert!(Journal::open(file(), 3).is_err(), "another size");
    let other = Journal::new(2).unwrap();
    other.mark(1, VERSION + 1);
    assert!(Journal::open(other.file().unwrap(), 2).is_err());
    let (reader, _writer) = io::pipe().unwrap();
    assert!(Journal::open(reader.into(), 2).is_err(), "no memory");
}

#[test]
fn there_is_room_for_what_is_bounded() {
    let journal = Journal::new(1).unwrap();
    assert!(journal.set_admin(&vec![1; journal.layout.admin_len]));
    assert!(!journal.set_admin(&vec![1; journal.layout.admin_len + 1]));
}
