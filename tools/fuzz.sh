#!/usr/bin/env bash
# Gives each target of fuzz/ made-up input for so many seconds, guided by the branches that it takes. What has led to
# new ones is kept in target/fuzz/NAME for the next run. An input that breaks something is left there too, and named.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=$1
build=${CARGO_TARGET_DIR:-target}
export RUSTC_WORKSPACE_WRAPPER=$PWD/fuzz/instrument.sh

# A request of four megabytes is refused by its size; these limits find what takes memory or time beyond its size.
memory_mb_max=1024
input_seconds_max=5

cargo build --locked --quiet --package hallpass-fuzz --bins
for target in fuzz/src/bin/*.rs; do
    name=$(basename "$target" .rs)
    found=$build/fuzz/$name
    mkdir -p "$found"
    if ! "$build/debug/$name" -max_total_time="$seconds" -timeout=$input_seconds_max -rss_limit_mb=$memory_mb_max \
        -artifact_prefix="$found/" "$found" "fuzz/corpus/$name" >"$found.log" 2>&1; then
        tail -n 40 "$found.log"
        echo "fuzz target $name: run it again with \`$build/debug/$name FILE\`" >&2
        exit 1
    fi
    echo "fuzz target $name: $(sed -n 's/^Done \([0-9]*\) runs in \([0-9]*\) .*/\1 inputs in \2 s/p' "$found.log")," \
        "$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$found.log" | tail -n 1) branches"
done
