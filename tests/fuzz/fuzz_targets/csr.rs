//! A signing request: no bytes may make the authority panic, and what it accepts is no longer than it may be.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_userspace::ca::csr::{MAX_CSR, check};

fuzz_target!(|request: &[u8]| {
    if check(request, "spiffe://example.org/ns/shop/sa/cart").is_ok() {
        assert!(request.len() <= MAX_CSR);
    }
});
