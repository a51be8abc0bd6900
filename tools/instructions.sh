#!/usr/bin/env bash
# Counts the instructions of a cached check with callgrind, and fails when there are more than a release promises.
set -euo pipefail
cd "$(dirname "$0")/.."

# Instructions of one check, and by how much it may be exceeded: another compiler makes other code.
PROMISED=16850
MARGIN_PERCENT=5
CHECKS=10000

program=$(cargo bench --locked --no-run --bench parts --message-format=json 2>/dev/null |
    sed -n 's/.*"name":"parts".*"executable":"\([^"]*\)".*/\1/p')
[ -n "$program" ] || {
    echo "the bench does not build: cargo bench --no-run --bench parts" >&2
    exit 1
}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
valgrind --tool=callgrind --callgrind-out-file=/dev/null --collect-atstart=no \
    --toggle-collect='parts::counted*' "$program" --instructions >/dev/null 2>"$log" || {
    cat "$log" >&2
    exit 1
}
collected=$(sed -n 's/.*Collected : \([0-9]*\).*/\1/p' "$log")
found=$((collected / CHECKS))
most=$((PROMISED * (100 + MARGIN_PERCENT) / 100))
echo "a cached check takes $found instructions (promised: $PROMISED, at most $most)"
if [ "$found" -eq 0 ] || [ "$found" -gt "$most" ]; then
    echo "that is not what is promised: mend it, or promise another number in tools/instructions.sh and say why" >&2
    exit 1
fi
