//! The catalog parser: no bytes may make it panic, and every document is either read or reported.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_userspace::control::{has_errors, parse_documents};

fuzz_target!(|bytes: &[u8]| {
    let contents = parse_documents("fuzz.yaml", bytes);
    for diagnostic in contents.diagnostics() {
        assert!(!diagnostic.render().is_empty());
    }
    assert!(!contents.is_empty() || contents.diagnostics().is_empty() || has_errors(contents.diagnostics()));
});
