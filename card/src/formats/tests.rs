//! The file of formats.

use super::*;

fn key(nqn: &str, volume: &str) -> Key {
    Key {
        nqn: format!("nqn.2026-11.example:{nqn}"),
        volume: volume.parse().unwrap(),
    }
}

fn names(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

#[test]
fn what_was_recorded_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    assert!(Formats::take_up(&dir.join("nowhere")).is_err());
    for read in [Formats::read, Formats::take_up] {
        assert_eq!(read(dir).unwrap(), Formats::default());
    }
    let (a, b) = (key("s0", "disk0"), key("s0", "disk1"));
    Formats::record(dir, &[(a.clone(), 4096), (b.clone(), 512)]).unwrap();
    let other = key("s1", "disk0");
    let all = Formats::record(dir, &[(other.clone(), 4096), (a.clone(), 512)]).unwrap();
    let read = Formats::read(dir).unwrap();
    assert_eq!([&read, &Formats::take_up(dir).unwrap()], [&all; 2]);
    // Of others nothing changes, and who was never formatted has no entry.
    let found = [&a, &b, &other, &key("s1", "disk1")].map(|key| read.get(key));
    assert_eq!(found, [Some(512), Some(512), Some(4096), None]);
    assert_eq!(names(dir), [FILE], "no draft is left");
}

#[test]
fn what_another_daemon_has_recorded_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let all: Vec<Key> = (0..32).map(|n| key("s", &format!("disk{n}"))).collect();
    std::thread::scope(|scope| {
        for key in &all {
            scope.spawn(|| Formats::record(dir, &[(key.clone(), 4096)]).unwrap());
        }
    });
    let read = Formats::read(dir).unwrap();
    assert!(all.iter().all(|key| read.get(key) == Some(4096)));
}

#[test]
fn what_is_the_same_is_not_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    Formats::record(dir, &[(key("s0", "disk0"), 4096)]).unwrap();
    // It could not be written.
    std::fs::create_dir(dir.join(DRAFT)).unwrap();
    Formats::record(dir, &[(key("s0", "disk0"), 4096)]).unwrap();
    assert!(Formats::record(dir, &[(key("s0", "disk0"), 512)]).is_err());
}

#[test]
fn a_failure_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (a, b) = (key("s0", "disk0"), key("s0", "disk1"));
    Formats::record(dir, &[(a.clone(), 4096)]).unwrap();
    std::fs::create_dir(dir.join(DRAFT)).unwrap();
    let failed = Formats::record(dir, &[(a.clone(), 512), (b.clone(), 512)]);
    assert!(matches!(failed, Err(RecordError::Unchanged(_))));
    let read = Formats::read(dir).unwrap();
    assert_eq!([read.get(&a), read.get(&b)], [Some(4096), None]);
    let nowhere = Formats::record(&dir.join("nowhere"), &[(a, 512)]);
    assert!(matches!(nowhere, Err(RecordError::Unchanged(_))));
}

/// A daemon that died in mid-write leaves a draft, whole or not.
#[test]
fn a_draft_is_never_read() {
    for draft in [
        "",
        "{\"version\":1,",
        "nonsense that is longer than what comes after it",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        std::fs::write(dir.join(DRAFT), draft.repeat(100)).unwrap();
        assert_eq!(Formats::read(dir).unwrap(), Formats::default());
        let key = key("s0", "disk0");
        Formats::record(dir, &[(key.clone(), 4096)]).unwrap();
        assert_eq!(Formats::read(dir).unwrap().get(&key), Some(4096));
    }
}

#[test]
fn what_cannot_be_understood_is_an_error_and_stays() {
    let entry = |nqn: &str, volume: &str, size: &str| {
        format!(r#"{{"nqn":"{nqn}","volume":"{volume}","block_size":{size}}}"#)
    };
    let file = |entries: &str| format!(r#"{{"version":1,"namespaces":[{entries}]}}"#);
    let fine = entry("nqn.2026-11.example:s0", "disk0", "4096");
    Formats::parse(&file(&fine)).unwrap();
    let with = |field: &str| fine.replace('}', &format!(",{field}}}"));
    for (text, says) in [
        (String::new(), "EOF"),
        ("nonsense".into(), "expected"),
        ("{}".into(), "version"),
        (r#"{"version":1}"#.into(), "namespaces"),
        (r#"{"version":2,"formats":{}}"#.into(), "of version 2"),
        (r#"{"version":0,"namespaces":[]}"#.into(), "of version 0"),
        (
            r#"{"version":1,"namespaces":[],"more":1}"#.into(),
            "unknown field",
        ),
        (file(&with(r#""metadata":8"#)), "unknown field"),
        (file(&fine) + "{", "trailing"),
        (file(&[&*fine, &*fine].join(",")), "twice"),
        (file(&entry("s0", "disk0", "4096")), "an NQN is"),
        (
            file(&entry("nqn.2026-11.example:s0", "../disk0", "512")),
            "an ID is",
        ),
        (
            file(&entry("nqn.2026-11.example:s0", "disk0", "1024")),
            "1024",
        ),
        (
            file(&entry("nqn.2026-11.example:s0", "disk0", "0")),
            "blocks of 0",
        ),
        (file(&entry("nqn.2026-11.example:s0", "disk0", "-1")), "-1"),
        (
            file(&entry("nqn.2026-11.example:s0", "disk0", "null")),
            "null",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        std::fs::write(&path, &text).unwrap();
        let error = format!("{:#}", Formats::read(dir.path()).unwrap_err());
        assert!(error.contains(says), "{text}: {error}");
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        // Nor is it replaced by what could be.
        let recorded = Formats::record(dir.path(), &[(key("s0", "disk1"), 512)]);
        assert!(matches!(recorded, Err(RecordError::Unchanged(_))));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }
}

#[test]
fn blocks_are_multiples_of_the_volumes() {
    for (block, of, possible) in [
        (512, 512, true),
        (4096, 512, true),
        (4096, 4096, true),
        (512, 4096, false),
        (1024, 512, false),
        (8192, 4096, false),
        (0, 512, false),
        (512, 0, false),
    ] {
        assert_eq!(is_possible(block, of), possible, "{block} {of}");
    }
}
