//! A stream header: what is accepted survives the wire.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_userspace::tunnel::StreamHeader;

fuzz_target!(|input: &[u8]| {
    let Ok(header) = StreamHeader::decode(input) else { return };
    if let Ok(bytes) = header.encode() {
        assert_eq!(StreamHeader::decode(&bytes).as_ref(), Ok(&header));
    }
});
