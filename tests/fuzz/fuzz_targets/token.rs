//! A join token's text: what is read is written back the same, so one token has one spelling.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_userspace::ca::Token;

fuzz_target!(|text: &str| {
    if let Ok(token) = text.parse::<Token>() {
        assert_eq!(token.reveal().as_str(), text);
    }
});
