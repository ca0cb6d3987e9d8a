//! Data in all forms: what the model finds is what the buffer holds.

use bluff_nvme_host::{Buffer, Command, Pointer};

use crate::bring_up::memory;
use crate::pieces::pieces;

/// The bytes that a pointer leads to.
fn found(buffer: &Buffer, pointer: Pointer, memory: &bluff_nvme_host::HostMemory) -> Vec<u8> {
    let command = Command::new(1, 1).data(pointer).0;
    let pieces = pieces(memory, &command, buffer.len()).expect("a pointer that keeps the rules");
    let mut bytes = Vec::new();
    for (at, len) in pieces {
        let begin = bytes.len();
        bytes.resize(begin + len as usize, 0);
        memory.memory().read(at, &mut bytes[begin..]).unwrap();
    }
    bytes
}

#[test]
fn prps_and_sgls_lead_to_all_of_the_data() {
    let memory = memory();
    let free = memory.free();
    // One page, two, three; a list that is full; one that goes on in another page, by one entry or by two.
    for pages in [1, 2, 3, 4, 512, 513, 514, 515, 1030] {
        for (offset, short) in [(0, 0), (0, 1), (512, 0), (4, 600)] {
            let len = pages * 4096 - offset - short;
            let mut buffer = Buffer::scattered(&memory, offset, len).unwrap();
            assert_eq!(buffer.pages().len() as u64, pages);
            let content: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            buffer.write(&content);
            assert_eq!(buffer.read(), content);
            for list in [0, 8, 4080, 4088] {
                let pointer = buffer.prp_with_list_at(list).unwrap();
                assert_eq!(
                    found(&buffer, pointer, &memory),
                    content,
                    "{pages} {offset} {list}"
                );
            }
            for (piece, segment) in [(4096, 256), (4096, 2), (3000, 7)] {
                let pointer = buffer.sgl(piece, segment).unwrap();
                assert_eq!(found(&buffer, pointer, &memory), content, "{pages} {piece}");
                buffer.drop_lists();
            }
        }
    }
    assert_eq!(memory.free(), free);
}

#[test]
fn one_block_of_data_is_in_the_command() {
    let memory = memory();
    let mut buffer = Buffer::new(&memory, 512).unwrap();
    let at = buffer.pages()[0];
    let pointer = buffer.sgl(4096, 2).unwrap();
    assert_eq!(
        pointer,
        Pointer {
            psdt: 1,
            words: [at, 512]
        }
    );
    let prp = buffer.prp().unwrap();
    assert_eq!(
        prp,
        Pointer {
            psdt: 0,
            words: [at, 0]
        }
    );
}
