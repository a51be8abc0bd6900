#!/usr/bin/env bash
# Proves that the tests miss no safety check: takes out one after the other (tests/mutants/*.patch) in a copy of the
# tree, and expects the tests that the patch names to fail.
#
# A patch opens with two lines: `# removes:` what it takes out, `# killed-by:` the test binary (`lib`, `it`) and what
# the names of the tests begin with. Killed means: it builds, and one of those tests fails on what it asserts. A patch
# that does not apply, does not build, whose migration does not run, or whose tests do not exist or fail without it,
# is an error. Arguments: parts of the names of the patches to try; none: all.
#
# With --torture first: the patches that also have `# tortured-by:`, each under a run of the torture that is long enough
# to find it, of a fixed seed.
set -euo pipefail
cd "$(dirname "$0")/.."

tests=killed-by
options=()
if [ "${1:-}" = --torture ]; then
    shift
    tests=tortured-by
    options=(--ignored --nocapture)
    export CHECKS=${CHECKS:-200000} TIMES=${TIMES:-2} SEED=${SEED:-7}
fi

root=$PWD
work=${CARGO_TARGET_DIR:-$root/target}/mutants
tree=$work/tree
log=$work/log
export CARGO_TARGET_DIR=$work/target
# Nobody debugs a mutant, and without the information it is linked sooner.
export CARGO_TERM_COLOR=never CARGO_PROFILE_DEV_DEBUG=false RUST_BACKTRACE=0
# Not the repository around it.
export GIT_CEILING_DIRECTORIES=$work

header() { # NAME PATCH
    sed -n "s/^# $1: //p" "$2"
}

# Builds the test binary that a patch names, and runs the tests that it names: 0, they pass; 1, one fails on what it
# asserts; 2, anything else.
run_tests() { # KILLED_BY
    local names binary
    read -r -a names <<<"$1"
    case ${names[0]} in
        lib) binary=(--lib) ;;
        *) binary=(--test "${names[0]}") ;;
    esac
    cd "$tree"
    cargo test --locked --quiet "${binary[@]}" --no-run >"$log" 2>&1 || return 2
    cargo test --locked --quiet "${binary[@]}" -- "${options[@]}" "${names[@]:1}" >"$log" 2>&1 </dev/null && return 0
    grep -q '^test result: FAILED' "$log" || return 2
    # A migration that does not run fails every test of a database, and says nothing about the check.
    if grep -q "an .Err. value: Failed { name: " "$log"; then
        return 2
    fi
    return 1
}

tests_run() {
    grep -q '^test result: .* [1-9][0-9]* passed' "$log"
}

report() { # VERDICT PATCH WHAT
    printf '%-9s %-46s %s\n' "$1" "$(basename "$2" .patch)" "$3"
}

patches=()
for patch in "$root"/tests/mutants/*.patch; do
    for part in "${@:-}"; do
        if [[ $(basename "$patch") == *"$part"* ]] && [ -n "$(header $tests "$patch")" ]; then
            patches+=("$patch")
            break
        fi
    done
done
[ ${#patches[@]} -gt 0 ] || { echo "no patch is named like: $*" >&2; exit 1; }

# What is committed or changed since. Files get the present time, so that cargo builds what they say now.
rm -rf "$tree"
mkdir -p "$tree"
snapshot=$(git stash create)
git archive "${snapshot:-HEAD}" | tar -xmf - -C "$tree"
# What `make examples` has installed is no part of it.
for installed in examples/*/node_modules target/python; do
    mkdir -p "$tree/$(dirname "$installed")"
    ln -s "$root/$installed" "$tree/$installed"
done

bad=0
known_good=''
for patch in "${patches[@]}"; do
    killed_by=$(header $tests "$patch")
    if [[ $known_good != *"|$killed_by|"* ]]; then
        if ! (run_tests "$killed_by"); then
            report ERROR "$patch" "its tests fail without it: $killed_by"
            tail -n 20 "$log"
            bad=1
            continue
        elif ! tests_run; then
            report ERROR "$patch" "no such test: $killed_by"
            bad=1
            continue
        fi
        known_good="$known_good|$killed_by|"
    fi
    if ! (cd "$tree" && git apply "$patch"); then
        report ERROR "$patch" 'does not apply'
        bad=1
        continue
    fi
    started=$SECONDS
    verdict=0
    (run_tests "$killed_by") || verdict=$?
    case $verdict in
        0)
            report SURVIVED "$patch" "$(header removes "$patch")"
            bad=1
            ;;
        1) report killed "$patch" "in $((SECONDS - started)) s by $(sed -n 's/^    \([a-z_0-9:]*\)$/\1/p' "$log" | sort -u | head -n 1)" ;;
        *)
            report ERROR "$patch" 'does not build, or its migration does not run'
            tail -n 20 "$log"
            bad=1
            ;;
    esac
    (cd "$tree" && git apply --reverse "$patch")
done
exit $bad
