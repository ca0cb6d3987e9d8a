use super::*;
use crate::spec::{NamespaceSpec, SubsystemUse};

const SOUND: &str = r#"
[card]
reactors = [1]
poll = "adaptive"
poll_us = 50
data = "threads"

[volume.disk0]
uri = "file:/srv/disk0.raw"
layers = [{ kind = "delay", read = "2ms" }]

[function.blk0]
kind = "virtio-blk"
attach = "vhost-user"
volume = "disk0"
queues = 2
poll = "always"
"#;

pub(super) fn parse(text: &str) -> Result<Config, Mistakes> {
    let surroundings = Surroundings {
        cpus: BTreeSet::from([0, 1]),
        runtime_dir: "/run/bluff".into(),
    };
    Config::parse(text, "card.toml", &surroundings)
}

pub(super) fn mistakes(text: &str) -> Vec<String> {
    parse(text)
        .unwrap_err()
        .to_string()
        .lines()
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_file_of_the_user_guide() {
    let config = parse(SOUND).unwrap();
    assert_eq!(config.card.reactors, [1]);
    let volume = &config.volumes[&"disk0".parse().unwrap()];
    assert_eq!(
        volume.layers[0].parameters["read"],
        Parameter::Text("2ms".to_owned())
    );
    let function = &config.functions[&"blk0".parse().unwrap()];
    assert_eq!((function.queues, function.poll), (2, Some(Poll::Always)));
    assert_eq!(function.stop_timeout_ms, 1000, "unless told");
    let slow = parse(&format!("{SOUND}stop_timeout_ms = 5000\n")).unwrap();
    assert_eq!(
        slow.functions[&"blk0".parse().unwrap()].stop_timeout_ms,
        5000
    );
    assert_eq!(
        (function.mode, &function.socket),
        (SocketMode::Server, &None)
    );
}

#[test]
fn memory_that_dies_with_a_data_half_is_no_disk() {
    let text = "[volume.disk0]\nuri = \"ram:?size=1GiB\"\n";
    assert!(parse(text).is_ok());
    let found = mistakes(&format!("[card]\ndata = \"process\"\n{text}"));
    assert_eq!(found.len(), 1);
    assert!(
        found[0].starts_with("card.toml:4:7: volume.disk0.uri: `ram` loses"),
        "{found:?}"
    );
}

#[test]
fn an_empty_file_is_an_empty_card() {
    assert_eq!(parse("").unwrap(), Config::default());
}

#[test]
fn each_mistake_has_its_place_and_says_what_is_allowed() {
    for (from, to, expected) in [
        (
            "poll_us = 50",
            "poll_ms = 50",
            "card.toml:5:1: card.poll_ms: unknown key; allowed: `poll`, `poll_us`",
        ),
        (
            "poll_us = 50",
            "poll_us = \"50\"",
            "5:11: card.poll_us: a whole number from 0 to 1000000 is wanted, not string",
        ),
        (
            "poll_us = 50",
            "poll_us = 2000000",
            "5:11: card.poll_us: a whole number from 0 to 1000000 is wanted",
        ),
        (
            "\"adaptive\"",
            "\"often\"",
            "4:8: card.poll: unknown word `often`; allowed: `adaptive`, `always` and `never`",
        ),
        (
            "[1]",
            "[7]",
            "3:13: card.reactors: there is no CPU 7 to use; there are 0, 1",
        ),
        (
            "[1]",
            "[1, 1]",
            "3:16: card.reactors: CPU 1 stands there twice",
        ),
        (
            "[1]",
            "1",
            "3:12: card.reactors: an array is wanted, not integer",
        ),
        (
            "\"threads\"",
            "true",
            "6:8: card.data: text is wanted, not boolean",
        ),
        (
            "file:/srv",
            "nfs:/srv",
            "9:7: volume.disk0.uri: unknown scheme `nfs`; schemes are",
        ),
        (
            "uri = ",
            "url = ",
            "volume.disk0.uri: missing; allowed: the place of its data",
        ),
        (
            "\"2ms\"",
            "\"2 ms\"",
            "volume.disk0.layers.read: \"2 ms\" is not a time such as 200us, 2ms or 1s",
        ),
        (
            "\"2ms\"",
            "2.5",
            "volume.disk0.layers.read: text, a whole number",
        ),
        (
            "\"delay\"",
            "\"dealy\"",
            "volume.disk0.layers.kind: layers are `delay` and `fault`",
        ),
        (
            "[volume.disk0]",
            "[volume.Disk0]",
            "8:9: volume.Disk0: an ID is 1 to 63 of",
        ),
        (
            "volume = \"disk0\"",
            "volume = \"disk1\"",
            "15:10: function.blk0.volume: no volume `disk1`; there are `disk0`",
        ),
        (
            "queues = 2",
            "config_wce = 1",
            "16:14: function.blk0.config_wce: `true` or `false` is wanted, not integer",
        ),
        (
            "queues = 2",
            "queues = 0",
            "16:10: function.blk0.queues: a whole number from 1 to 256 is wanted",
        ),
        (
            "queues = 2",
            "stop_timeout_ms = 0",
            "16:19: function.blk0.stop_timeout_ms: a whole number from 10 to 60000 is wanted",
        ),
        (
            "queues = 2",
            "mode = \"client\"",
            "function.blk0.socket: with mode = \"client\", the path",
        ),
        (
            "queues = 2",
            "socket = \"x.sock\"",
            "function.blk0.socket: a socket is an absolute path",
        ),
        (
            "queues = 2",
            "socket = \"/run/bluff/control.sock\"",
            "function.blk0.socket: this is the control socket",
        ),
        (
            "kind = \"virtio-blk\"",
            "kind = \"nvmf\"",
            "function.blk0.kind: unknown word `nvmf`; allowed: `virtio-blk`, `virtio-net`, `uplink` and `nvme`",
        ),
        (
            "kind = \"virtio-blk\"\n",
            "",
            "function.blk0.kind: missing; allowed: `virtio-blk`",
        ),
        (
            "[card]",
            "[crad]",
            "crad: unknown key; allowed: `card`, `volume`, `subsystem`, `network` and `function`",
        ),
        ("queues = 2", "queues = ", "card.toml:16:"),
    ] {
        let text = SOUND.replacen(from, to, 1);
        assert_ne!(text, SOUND, "{from}");
        let found = mistakes(&text);
        assert!(
            found.iter().any(|line| line.contains(expected)),
            "{expected}\n  not in {found:#?}"
        );
    }
}

/// What the kinds of volumes and layers read themselves: each mistake with its place, its key and what is allowed.
#[test]
fn mistakes_in_volumes_and_layers_are_found_before_anything_is_opened() {
    let volume = |uri: &str, layers: &str| {
        format!("[volume.disk0]\nuri = \"{uri}\"\nlayers = [\n  {layers}\n]\n")
    };
    let delay = "{ kind = \"delay\", read = \"2ms\" }";
    for (uri, layers, expected) in [
        (
            "null:?size=1XiB",
            delay,
            "card.toml:2:7: volume.disk0.uri: option \"size\": \"1XiB\" is no size: a whole number, alone or with KiB, MiB, GiB, TiB or PiB",
        ),
        (
            "ram:?size=1GiB&block_size=1024",
            delay,
            "card.toml:2:7: volume.disk0.uri: option \"block_size\": 1024 is not 512 or 4096",
        ),
        (
            "ram:?size=1000",
            delay,
            "card.toml:2:7: volume.disk0.uri: option \"size\": 1000 is not a multiple of 512 over 0",
        ),
        (
            "file:/x",
            "{ kind = \"fault\", kinds = \"read\" }",
            "card.toml:4:3: volume.disk0.layers.action: missing; allowed: error, stall, torn or reorder",
        ),
        (
            "file:/x",
            "{ kind = \"fault\", action = \"torn\", kinds = \"reads\" }",
            "card.toml:4:38: volume.disk0.layers.kinds: \"reads\" is not all, or some of read,write,flush,discard,write_zeroes",
        ),
        (
            "file:/x",
            "{ kind = \"delay\", rate = \"1.5\" }",
            "card.toml:4:21: volume.disk0.layers.rate: \"1.5\" is not a number from 0 to 1",
        ),
        (
            "file:/x",
            "{ kind = \"delay\", range = \"2MiB-1MiB\" }",
            "card.toml:4:21: volume.disk0.layers.range: \"2MiB-1MiB\" is not two sizes such as 0-1MiB, the first below the second",
        ),
        (
            "file:/x",
            "{ kind = \"delay\", raed = \"2ms\" }",
            "card.toml:4:21: volume.disk0.layers.raed: unknown key; allowed: read, write",
        ),
    ] {
        assert!(parse(&volume("file:/x", delay)).is_ok());
        let found = mistakes(&volume(uri, layers));
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(
            found[0].starts_with(expected),
            "{expected}\n  is not {found:#?}"
        );
    }
    // One of the wrong type is not missing as well.
    let found = mistakes(&volume("file:/x", "{ kind = \"fault\", action = 1.5 }"));
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(parse(&volume("null:?size=1PiB", delay)).is_ok());
}

#[test]
fn every_mistake_is_told_in_the_order_of_lines() {
    let text = SOUND
        .replace("poll_us = 50", "poll_us = -1")
        .replace("queues = 2", "queues = 1000\nqueue = 1");
    let found = mistakes(&text.replace("\"adaptive\"", "1"));
    let keys = [
        "card.poll:",
        "card.poll_us:",
        "function.blk0.queues:",
        "function.blk0.queue:",
    ];
    assert_eq!(found.len(), keys.len(), "{found:#?}");
    for (line, key) in found.iter().zip(keys) {
        assert!(line.contains(key), "{line}");
    }
}

const SECOND: &str =
    "\n[function.blk1]\nkind = \"virtio-blk\"\nattach = \"vhost-user\"\nvolume = \"disk0\"\n";

#[test]
fn a_writable_volume_has_one_user() {
    let found = mistakes(&format!("{SOUND}{SECOND}"));
    assert!(
        found[0].contains("function.blk1.volume: something else uses this volume"),
        "{found:?}"
    );
    let text = format!("{SOUND}{SECOND}").replace("disk0.raw", "disk0.raw?read_only=on");
    assert!(parse(&text).is_ok());
}

#[test]
fn a_file_belongs_to_one_volume() {
    let found = mistakes(&format!(
        "{SOUND}\n[volume.disk1]\nuri = \"file:/srv/disk0.raw\"\n"
    ));
    assert!(
        found[0].contains("volume.disk1.uri: volume `disk0` has the same file"),
        "{found:?}"
    );
}

#[test]
fn a_socket_belongs_to_one_function() {
    let text = format!("{SOUND}{SECOND}socket = \"/run/bluff/blk0.sock\"\n")
        .replace("file:/srv/disk0.raw", "null:?size=1GiB");
    let found = mistakes(&text);
    assert!(
        found[0].contains("function.blk1.socket: function `blk0` has the same socket"),
        "{found:?}"
    );
}

#[test]
fn columns_count_characters() {
    let found = mistakes("[card]\n\"p\u{f6}ll\" = 1\n  poll = 1");
    assert!(found[0].starts_with("card.toml:2:1:"), "{found:?}");
    assert!(found[1].starts_with("card.toml:3:10:"), "{found:?}");
}

const NVME: &str = r#"
[volume.disk0]
uri = "file:/srv/disk0.raw"
[volume.disk1]
uri = "file:/srv/disk1.raw"
[volume.disk2]
uri = "file:/srv/disk2.raw"
[subsystem.s0]
nqn = "nqn.2026-11.example:s0"
namespaces = ["disk0", { volume = "disk1", nsid = 5 }]
[function.nvme0]
kind = "nvme"
attach = "vfio-user"
subsystem = "s0"
serial = "DB0001"
queues = 8
[function.nvme1]
kind = "nvme"
attach = "vfio-user"
subsystem = "s0"
[function.nvme2]
kind = "nvme"
attach = "vfio-user"
namespaces = ["disk2"]
"#;

#[test]
fn nvme_functions_share_a_subsystem_or_have_their_own() {
    let config = parse(NVME).unwrap();
    let id = |text: &str| text.parse::<Id>().unwrap();
    let namespace = |volume: &str, nsid| NamespaceSpec::new(id(volume), nsid);
    let shared = SubsystemSpec {
        nqn: Some("nqn.2026-11.example:s0".to_owned()),
        namespaces: vec![namespace("disk0", 1), namespace("disk1", 5)],
    };
    assert_eq!(config.subsystems[&id("s0")], shared);
    let first = &config.functions[&id("nvme0")];
    let expected = DeviceSpec::Nvme {
        subsystem: SubsystemUse::Shared {
            subsystem: id("s0"),
        },
        serial: Some("DB0001".to_owned()),
    };
    assert_eq!((&first.device, first.queues), (&expected, 8));
    let own = SubsystemSpec {
        nqn: None,
        namespaces: vec![namespace("disk2", 1)],
    };
    let expected = DeviceSpec::Nvme {
        subsystem: SubsystemUse::Own(own),
        serial: None,
    };
    assert_eq!(config.functions[&id("nvme2")].device, expected);
}

#[test]
fn mistakes_about_nvme_functions() {
    for (from, to, expected) in [
        (
            "nqn.2026-11.example:s0",
            "s0",
            "9:7: subsystem.s0.nqn: an NQN is nqn.YYYY-MM",
        ),
        (
            "\"disk0\", {",
            "\"disk9\", {",
            "10:15: subsystem.s0.namespaces: no volume `disk9`",
        ),
        (
            "nsid = 5",
            "nsid = 1",
            "10:24: subsystem.s0.namespaces: there is a namespace 1 already",
        ),
        (
            "nsid = 5",
            "nsid = 0",
            "10:51: subsystem.s0.namespaces.nsid: a whole number from 1 to 65536",
        ),
        (
            "{ volume = \"disk1\"",
            "{ volume = \"disk0\"",
            "10:24: subsystem.s0.namespaces: volume disk0 is namespace 1 already",
        ),
        (
            "[\"disk2\"]",
            "[\"disk1\"]",
            "function.nvme2.namespaces: something else uses this volume",
        ),
        (
            "[\"disk2\"]",
            "[2]",
            "function.nvme2.namespaces: a namespace is the ID of a volume",
        ),
        (
            "namespaces = [\"disk2\"]",
            "namespaces = [\"disk2\"]\nsubsystem = \"s0\"",
            "function.nvme2.namespaces: the namespaces of a subsystem stand in its own table",
        ),
        (
            "subsystem = \"s0\"\nserial",
            "subsystem = \"s1\"\nserial",
            "14:13: function.nvme0.subsystem: no subsystem `s1`; there are `s0`",
        ),
        (
            "DB0001",
            "more than twenty bytes",
            "15:10: function.nvme0.serial: a serial number has 1 to 20 characters",
        ),
        (
            "attach = \"vfio-user\"\nsubsystem = \"s0\"\nserial",
            "attach = \"vhost-user\"\nsubsystem = \"s0\"\nserial",
            "13:10: function.nvme0.attach: a function of kind nvme attaches by vfio-user",
        ),
        (
            "queues = 8",
            "mode = \"client\"\nsocket = \"/tmp/x\"",
            "16:8: function.nvme0.mode: a VMM connects",
        ),
        (
            "queues = 8",
            "volume = \"disk2\"",
            "16:1: function.nvme0.volume: unknown key",
        ),
    ] {
        assert!(NVME.contains(from), "{from}");
        let found = mistakes(&NVME.replacen(from, to, 1));
        let found: Vec<_> = found
            .iter()
            .filter(|line| line.contains(expected))
            .collect();
        assert!(
            !found.is_empty(),
            "{to}: {:?}",
            mistakes(&NVME.replacen(from, to, 1))
        );
    }
}

#[test]
fn a_wrong_kind_is_one_mistake() {
    let found = mistakes(&SOUND.replace("\"virtio-blk\"", "\"virtio-block\""));
    assert_eq!(found.len(), 1, "{found:?}");
}
