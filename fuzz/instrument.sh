#!/bin/sh
# cargo's RUSTC_WORKSPACE_WRAPPER while fuzzing: compiles our own crates so that libFuzzer sees which of their branches
# an input takes. These flags are on stable Rust, unlike the sanitizers; what we depend on is compiled as ever.
case " $* " in
    *" --crate-name build_script_build "*) exec "$@" ;;
esac
exec "$@" -Cpasses=sancov-module -Ccodegen-units=1 \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares
