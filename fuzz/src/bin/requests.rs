//! Every request message: the first byte chooses the method, the rest is what it is sent.

#![no_main]

use hallpass_fuzz::{METHODS, call};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    if let Some((method, message)) = input.split_first() {
        call(METHODS[usize::from(*method) % METHODS.len()], message);
    }
});
