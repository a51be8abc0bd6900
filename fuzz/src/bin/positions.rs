//! Positions: what is read is printed again as it was, but for space around it and capitals in the uid.

#![no_main]

use hallpass::model::Position;

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(position) = text.parse::<Position>() {
        let printed = position.to_string();
        assert_eq!(printed.parse(), Ok(position));
        assert_eq!(printed, text.trim().to_ascii_lowercase());
    }
});
