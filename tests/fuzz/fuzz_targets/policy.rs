//! Policy documents and patterns of identities: what is broken is reported, and what is accepted is what was written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_userspace::control::{has_errors, parse_documents};
use mesh_userspace::model::SpiffePattern;

fuzz_target!(|bytes: &[u8]| {
    let contents = parse_documents("fuzz.yaml", bytes);
    for diagnostic in contents.diagnostics() {
        assert!(!diagnostic.render().is_empty());
    }
    assert_eq!(contents.has_broken(), has_errors(contents.diagnostics()));
    for text in String::from_utf8_lossy(bytes).split('\'') {
        if let Ok(pattern) = SpiffePattern::parse(text) {
            assert_eq!(pattern.to_string(), text);
        }
    }
});
