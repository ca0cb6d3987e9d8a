//! A boot sector that asks the BIOS for its disk, and says on COM1 what it gets.
//!
//! It stands as bytes, so that nothing has to assemble it. Each line of [`CODE`] has the address, the bytes, and what they mean; a line without bytes
//! is a label. It is loaded at 7C00h in real mode, with the drive's number in DL.
//!
//! What it says, each line with a letter and two numbers of eight digits:
//!
//! | letter | | |
//! |---|---|---|
//! | D | bytes of a block | blocks of the disk, the lower 32 bits |
//! | R | blocks that were read | the [`sum`] of them |
//! | W | blocks that were written | the sum of them |
//! | S | 0: what was written is what was read again | 0 |
//! | X | 32-bit words that are left behind the first that differs | 0 |
//! | E | the BIOS's error | 0 |
//!
//! INT 13h with its extensions: Enhanced Disk Drive Specification 3.0, functions 41h, 42h, 43h and 48h.

use std::fmt::Write;

use anyhow::{Context, Result, ensure};

/// Bytes of a block. SeaBIOS has others as well, and gives INT 13h the namespace's; but this program counts with these, as boot loaders do.
pub(super) const BLOCK: usize = 512;

/// Where it is loaded.
const BASE: usize = 0x7c00;
/// Where the packets are: behind the code, which uses these addresses.
const PACKETS_AT: usize = 0x7d20;

/// A transfer, as functions 42h and 43h take it.
#[derive(Clone, Copy)]
pub(super) struct Packet {
    pub(super) blocks: u16,
    /// Where in memory: a page begins at offset 0.
    offset: u16,
    segment: u16,
    pub(super) block: u32,
}

/// The last block of the disk.
pub(super) const LAST: u32 = (1 << 15) - 1;
/// The block that is written.
pub(super) const WRITTEN: u32 = 1000;

/// What is read at first: in all the ways that SeaBIOS 1.17's driver has for a transfer.
pub(super) const READS: [Packet; 6] = [
    packet(3, 0x1000, 0, 1),
    // Within one page, and not from its start: an offset in PRP1.
    packet(5, 0x1000, 512, 4),
    // Two pages: PRP1 and PRP2.
    packet(16, 0x1000, 0, 9),
    // Over pages, and not from the start of one: by way of a page of the BIOS's own.
    packet(20, 0x1000, 512, 25),
    // As much as it takes at once: a list of 15 PRPs.
    packet(128, 0x2000, 0, 45),
    packet(1, 0x1000, 0, LAST),
];
/// What is written: the last that was read, with all bits inverted.
const WRITE: Packet = packet(1, 0x1000, 0, WRITTEN);
/// It is read again to another place.
const AGAIN: Packet = packet(1, 0x1000, 2048, WRITTEN);

const fn packet(blocks: u16, segment: u16, offset: u16, block: u32) -> Packet {
    Packet {
        blocks,
        offset,
        segment,
        block,
    }
}

impl Packet {
    fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0] = 16;
        bytes[2..4].copy_from_slice(&self.blocks.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.offset.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.segment.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.block.to_le_bytes());
        bytes
    }
}

const CODE: &str = "
7c00  fa                    cli
7c01  31 c0                 xor ax, ax
7c03  8e d8                 mov ds, ax
7c05  8e c0                 mov es, ax
7c07  8e d0                 mov ss, ax
7c09  bc 00 7c              mov sp, 7c00h
7c0c  fb                    sti
7c0d  fc                    cld
7c0e  88 16 1e 7d           mov [drive], dl
                          ; are there extensions?
7c12  b4 41                 mov ah, 41h
7c14  bb aa 55              mov bx, 55aah
7c17  cd 13                 int 13h
7c19  72 7a                 jc error
                          ; the disk's parameters, 30 bytes at 600h
7c1b  b4 48                 mov ah, 48h
7c1d  8a 16 1e 7d           mov dl, [drive]
7c21  be 00 06              mov si, 600h
7c24  c7 04 1e 00           mov word [si], 30
7c28  cd 13                 int 13h
7c2a  72 69                 jc error
7c2c  66 0f b7 7c 18        movzx edi, word [si + 24]
7c31  66 8b 5c 10           mov ebx, [si + 16]
7c35  b0 44                 mov al, 'D'
7c37  e8 9f 00              call line
                          ; each of READS
7c3a  be 20 7d              mov si, packets
                          next:
7c3d  e8 65 00              call read
7c40  b0 52                 mov al, 'R'
7c42  e8 6d 00              call report
7c45  83 c6 10              add si, 16
7c48  81 fe 80 7d           cmp si, packets + 6 * 16
7c4c  75 ef                 jne next
                          ; WRITE
7c4e  c4 7c 04              les di, [si + 4]
7c51  b9 80 00              mov cx, 128
                          invert:
7c54  26 66 f7 15           not dword [es:di]
7c58  83 c7 04              add di, 4
7c5b  e2 f7                 loop invert
7c5d  b4 43                 mov ah, 43h
7c5f  e8 45 00              call transfer
7c62  b0 57                 mov al, 'W'
7c64  e8 4b 00              call report
                          ; AGAIN
7c67  83 c6 10              add si, 16
7c6a  e8 38 00              call read
7c6d  b0 52                 mov al, 'R'
7c6f  e8 40 00              call report
                          ; is it the same?
7c72  c4 7c 04              les di, [si + 4]
7c75  c5 74 f4              lds si, [si - 12]
7c78  b9 80 00              mov cx, 128
7c7b  66 f3 a7              repe cmpsd
7c7e  16                    push ss
7c7f  1f                    pop ds
7c80  b0 53                 mov al, 'S'
7c82  74 02                 je told
7c84  b0 58                 mov al, 'X'
                          told:
7c86  66 31 ff              xor edi, edi
7c89  66 0f b7 f9           movzx edi, cx
7c8d  66 31 db              xor ebx, ebx
7c90  e8 46 00              call line
7c93  eb 0c                 jmp halt
                          error:
7c95  66 0f b6 fc           movzx edi, ah
7c99  66 31 db              xor ebx, ebx
7c9c  b0 45                 mov al, 'E'
7c9e  e8 38 00              call line
                          halt:
7ca1  fa                    cli
7ca2  f4                    hlt
7ca3  eb fc                 jmp halt
                          ; SI: packet
                          read:
7ca5  b4 42                 mov ah, 42h
                          transfer:
7ca7  b0 00                 mov al, 0
7ca9  8a 16 1e 7d           mov dl, [drive]
7cad  cd 13                 int 13h
7caf  72 e4                 jc error
7cb1  c3                    ret
                          ; SI: packet, AL: letter
                          report:
7cb2  50                    push ax
7cb3  1e                    push ds
7cb4  56                    push si
7cb5  66 0f b7 7c 02        movzx edi, word [si + 2]
7cba  89 f9                 mov cx, di
7cbc  c1 e1 07              shl cx, 7
7cbf  c5 74 04              lds si, [si + 4]
7cc2  66 bb c5 9d 1c 81     mov ebx, 811c9dc5h
                          sum:
7cc8  66 ad                 lodsd
7cca  66 31 c3              xor ebx, eax
7ccd  66 69 db 93 01 00 01  imul ebx, ebx, 1000193h
7cd4  e2 f2                 loop sum
7cd6  5e                    pop si
7cd7  1f                    pop ds
7cd8  58                    pop ax
                          ; AL: letter, EDI and EBX: numbers
                          line:
7cd9  e8 13 00              call put
7cdc  66 89 f8              mov eax, edi
7cdf  e8 1b 00              call hex
7ce2  66 89 d8              mov eax, ebx
7ce5  e8 15 00              call hex
7ce8  b0 0d                 mov al, 13
7cea  e8 02 00              call put
7ced  b0 0a                 mov al, 10
                          ; AL: character. To COM1, when that has room
                          put:
7cef  50                    push ax
7cf0  ba fd 03              mov dx, 3fdh
                          room:
7cf3  ec                    in al, dx
7cf4  a8 20                 test al, 20h
7cf6  74 fb                 jz room
7cf8  58                    pop ax
7cf9  b2 f8                 mov dl, 0f8h
7cfb  ee                    out dx, al
7cfc  c3                    ret
                          ; EAX: number
                          hex:
7cfd  66 50                 push eax
7cff  b0 20                 mov al, ' '
7d01  e8 eb ff              call put
7d04  66 58                 pop eax
7d06  b9 08 00              mov cx, 8
                          digit:
7d09  66 c1 c0 04           rol eax, 4
7d0d  66 50                 push eax
7d0f  24 0f                 and al, 15
                          ; 0 to 15 becomes '0' to '9', 'A' to 'F'
7d11  3c 0a                 cmp al, 10
7d13  1c 69                 sbb al, 69h
7d15  2f                    das
7d16  e8 d6 ff              call put
7d19  66 58                 pop eax
7d1b  e2 ec                 loop digit
7d1d  c3                    ret
7d1e  00                    drive: 0
";

/// The sector.
pub(super) fn sector() -> Result<[u8; BLOCK]> {
    let mut code = Vec::new();
    for line in CODE.lines() {
        let (Some(address), Some(bytes)) = (line.get(..4), line.get(6..26)) else {
            continue;
        };
        let Ok(address) = usize::from_str_radix(address, 16) else {
            continue;
        };
        ensure!(
            address == BASE + code.len(),
            "{:x} bytes before {line:?}",
            code.len()
        );
        for byte in bytes.split_whitespace() {
            code.push(u8::from_str_radix(byte, 16).with_context(|| format!("in {line:?}"))?);
        }
    }
    let packets_at = PACKETS_AT - BASE;
    ensure!(code.len() <= packets_at, "code over the packets");
    let mut sector = [0; BLOCK];
    sector[..code.len()].copy_from_slice(&code);
    let packets = READS.iter().chain([&WRITE, &AGAIN]);
    for (to, packet) in sector[packets_at..].chunks_mut(16).zip(packets) {
        to.copy_from_slice(&packet.bytes());
    }
    sector[BLOCK - 2..].copy_from_slice(&[0x55, 0xaa]);
    Ok(sector)
}

/// FNV-1a by 32-bit words, as the code does it: pages in another order have another sum.
fn sum(data: &[u8]) -> u32 {
    let words = data.chunks_exact(4);
    let words = words.map(|word| u32::from_le_bytes(word.try_into().expect("4 bytes")));
    words.fold(0x811c_9dc5, |sum, word| {
        (sum ^ word).wrapping_mul(0x0100_0193)
    })
}

/// What it says of this disk.
pub(super) fn says(disk: &[u8]) -> String {
    let mut text = String::new();
    let mut line = |letter: char, first: usize, second: u32| {
        write!(text, "{letter} {first:08X} {second:08X}\r\n").expect("into memory");
    };
    line('D', BLOCK, (disk.len() / BLOCK) as u32);
    for read in READS {
        line('R', read.blocks.into(), sum(blocks(disk, read)));
    }
    let written = sum(&inverted(blocks(disk, READS[READS.len() - 1])));
    line('W', 1, written);
    line('R', 1, written);
    line('S', 0, 0);
    text
}

/// Whether it has said its last line this often.
pub(super) fn ended(said: &str, times: usize) -> bool {
    let lines = said.split_inclusive('\n');
    let last = |line: &&str| line.starts_with(['S', 'X', 'E']) && line.ends_with('\n');
    lines.filter(last).count() >= times
}

/// Does to this disk what it does.
pub(super) fn write(disk: &mut [u8]) {
    let data = inverted(blocks(disk, READS[READS.len() - 1]));
    let at = WRITTEN as usize * BLOCK;
    disk[at..at + BLOCK].copy_from_slice(&data);
}

fn blocks(disk: &[u8], packet: Packet) -> &[u8] {
    let at = packet.block as usize * BLOCK;
    &disk[at..at + usize::from(packet.blocks) * BLOCK]
}

fn inverted(data: &[u8]) -> Vec<u8> {
    data.iter().map(|byte| !byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sector_has_its_packets_where_the_code_looks() {
        let sector = sector().expect("bytes");
        assert_eq!(sector[..3], [0xfa, 0x31, 0xc0]);
        // mov si, packets; cmp si, packets + 6 * 16.
        assert_eq!(sector[0x3a..0x3d], [0xbe, 0x20, 0x7d]);
        let end = PACKETS_AT + READS.len() * 16;
        assert_eq!(sector[0x4a..0x4c], (end as u16).to_le_bytes());
        assert_eq!(sector[end - BASE..][..4], [16, 0, 1, 0]);
        assert_eq!(sector[end - BASE + 8..][..4], WRITTEN.to_le_bytes());
        assert_eq!(sector[510..], [0x55, 0xaa]);
    }

    #[test]
    fn sums_depend_on_the_order_of_pages() {
        let page = |byte| vec![byte; 4096];
        assert_ne!(
            sum(&[page(1), page(2)].concat()),
            sum(&[page(2), page(1)].concat())
        );
    }

    #[test]
    fn it_has_ended_with_the_last_line_of_each_boot() {
        assert!(!ended("D 1 2\r\nS 0", 1));
        assert!(ended("D 1 2\r\nS 0 0\r\n", 1));
        assert!(!ended("S 0 0\r\nR 1 1\r\n", 2));
        assert!(ended("S 0 0\r\nE 1 0\r\n", 2));
    }
}
