# Sourced by the other scripts: where things are, and how what is missing gets installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*"; }

die() {
    printf 'scripts: %s\n' "$*" >&2
    exit 1
}

# packages PROGRAM=PACKAGE...: installs the Debian packages whose programs are missing.
packages() {
    local missing=() pair
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null 2>&1 || missing+=("${pair#*=}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]}"
    command -v apt-get >/dev/null || die "install these yourself: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q >/dev/null
    apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null
}

root() { [ "$(id -u)" = 0 ] || die "run as root: sandboxes need it until another way is there"; }

# The newest build of a program of the workspace.
built() { { ls -t "${CARGO_TARGET_DIR:-$PWD/target}"/*/release/"$1" "${CARGO_TARGET_DIR:-$PWD/target}"/release/"$1" 2>/dev/null || true; } | head -1; }

# A Messages server that is not ours, in target/fakellm, and other packages of PyPI's beside it.
messages_server() {
    [ -x target/fakellm/bin/pip ] || python3 -m venv target/fakellm
    target/fakellm/bin/pip install --quiet --disable-pip-version-check fakellm==0.3.5 "$@"
}
