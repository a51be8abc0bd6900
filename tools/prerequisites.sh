#!/usr/bin/env bash
# Sees to it that each thing named in the arguments is on this machine: installs it where we are root and have
# apt-get, and says in one line what to do anywhere else.
set -euo pipefail
cd "$(dirname "$0")/.."

# The versions of PostgreSQL that hallpass takes; src/embedded/programs.rs looks in the same places.
POSTGRESQL_MIN=14
POSTGRESQL_MAX=18

die() {
    echo "$*" >&2
    exit 1
}

# install WHAT HOW_ON_MACOS DEBIAN_PACKAGE...
install() {
    local what=$1 on_macos=$2 log
    shift 2
    if [ "$(uname)" = Darwin ]; then
        die "$what is missing: run \`$on_macos\`"
    elif [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        die "$what is missing: run \`sudo apt-get install $*\` (Debian, Ubuntu), or install it as your system does"
    fi
    echo "installing $what ($*)" >&2
    log=$(mktemp)
    if ! { apt_get update && apt_get install --no-install-recommends "$@"; } >"$log" 2>&1 </dev/null; then
        die "apt-get cannot install $what, see $log: $(grep '^E:' "$log" | tail -n 1)"
    fi
    rm -f "$log"
}

apt_get() {
    DEBIAN_FRONTEND=noninteractive apt-get --yes --quiet -o DPkg::Lock::Timeout=300 "$@"
}

rust() {
    local wanted found
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    command -v cargo >/dev/null || die "Rust is missing: install $wanted or later with rustup (https://rustup.rs)"
    found=$(cargo --version 2>/dev/null | cut -d ' ' -f 2) ||
        die "cargo is there but has no toolchain under HOME=$HOME: set RUSTUP_HOME, or run \`rustup default stable\`"
    at_least "$wanted" "$found" || die "Rust $found is too old: hallpass needs $wanted; run \`rustup update stable\`"
}

# at_least WANTED FOUND: compares versions by their first two numbers.
at_least() {
    awk -v wanted="$1" -v found="$2" 'BEGIN {
        split(wanted, w, "."); split(found, f, ".")
        exit !(f[1] > w[1] || f[1] == w[1] && f[2] + 0 >= w[2] + 0)
    }'
}

rust_lints() {
    { cargo fmt --version && cargo clippy --version; } >/dev/null 2>&1 ||
        die "rustfmt or clippy is missing: run \`rustup component add rustfmt clippy\`"
}

c_compiler() {
    command -v cc >/dev/null || install 'a C compiler' 'xcode-select --install' gcc libc6-dev
}

cxx_compiler() {
    command -v c++ >/dev/null || install 'a C++ compiler' 'xcode-select --install' g++
}

postgresql() {
    [ -n "$(postgresql_directory)" ] && return
    # Debian's package would otherwise make a cluster and start it on port 5432, which nobody here asked for.
    local settings=/etc/postgresql-common/createcluster.d
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        mkdir -p $settings
        echo 'create_main_cluster = false' >$settings/hallpass.conf
    fi
    install PostgreSQL 'brew install postgresql@17' postgresql
    rm -f $settings/hallpass.conf
    [ -n "$(postgresql_directory)" ] ||
        die "PostgreSQL $POSTGRESQL_MIN to $POSTGRESQL_MAX is missing: what is installed is another version"
}

# Prints the first directory with the server's programs in a version that we take.
postgresql_directory() {
    local directory major directories=()
    IFS=: read -r -a directories <<<"$PATH"
    for directory in "${directories[@]}" "$(pg_config --bindir 2>/dev/null || true)" \
        /usr/lib/postgresql/*/bin /opt/homebrew/opt/postgresql@*/bin /usr/local/opt/postgresql@*/bin; do
        if [ ! -x "$directory/initdb" ] || [ ! -x "$directory/postgres" ]; then
            continue
        fi
        major=$("$directory/postgres" --version | sed -E 's/.*\(PostgreSQL\) ([0-9]+).*/\1/')
        if [ "$major" -ge $POSTGRESQL_MIN ] && [ "$major" -le $POSTGRESQL_MAX ]; then
            echo "$directory"
            return
        fi
    done
}

# One command of the demo needs it; the rest works without.
psql_client() {
    local directory
    command -v psql >/dev/null && return
    directory=$(postgresql_directory)
    if [ -n "$directory" ] && [ -x "$directory/psql" ]; then
        echo "psql is in $directory: add it to PATH for the demo's last command" >&2
        return
    fi
    install psql 'brew install libpq' postgresql-client
}

npm_client() {
    command -v npm >/dev/null || install npm 'brew install node' npm
}

# A Python that can make environments with pip in them, which Debian's cannot by itself.
python_venv() {
    python3 -c 'import ensurepip, venv' 2>/dev/null || install 'Python with venv' 'brew install python' python3 python3-venv
}

shellcheck_program() {
    command -v shellcheck >/dev/null || install shellcheck 'brew install shellcheck' shellcheck
}

# Debian's package brings the server too, and would start it.
promtool_program() {
    local may_start=/usr/sbin/policy-rc.d forbidden=
    command -v promtool >/dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ ! -e $may_start ]; then
        printf '#!/bin/sh\nexit 101\n' >$may_start
        chmod +x $may_start
        forbidden=1
    fi
    install promtool 'brew install prometheus' prometheus
    [ -z "$forbidden" ] || rm -f $may_start
}

systemd_analyze() {
    [ "$(uname)" = Linux ] || die 'systemd-analyze is for Linux alone'
    command -v systemd-analyze >/dev/null || install systemd-analyze '' systemd
}

# Its own kustomize shows what an overlay comes to.
kubectl_program() {
    command -v kubectl >/dev/null || install kubectl 'brew install kubernetes-cli' kubernetes-client
}

valgrind_program() {
    [ "$(uname)" = Linux ] || die 'valgrind is for Linux alone here'
    command -v valgrind >/dev/null || install valgrind '' valgrind
}

for thing; do
    case $thing in
        rust) rust ;;
        rust-lints) rust_lints ;;
        cc) c_compiler ;;
        c++) cxx_compiler ;;
        postgresql) postgresql ;;
        psql) psql_client ;;
        npm) npm_client ;;
        python) python_venv ;;
        shellcheck) shellcheck_program ;;
        promtool) promtool_program ;;
        systemd-analyze) systemd_analyze ;;
        kubectl) kubectl_program ;;
        valgrind) valgrind_program ;;
        *) die "$0 knows no \`$thing\`" ;;
    esac
done
