# Sourced by the checks: a line a check, which scripts/hosts counts. For throw-away machines and roots only.
set -u
failed=0
out=$(mktemp)
check() {
    if eval "$2" >"$out" 2>&1; then
        echo "ok   $1"
    else
        echo "FAIL $1"
        tail -5 "$out" | sed 's/^/     /'
        failed=$((failed + 1))
    fi
}
# What a machine cannot show is said, and counted apart: `cannot CHECK REASON`.
cannot() { echo "n/a  $1: $2"; }
# within SECONDS COMMAND: until it is true; emulated machines are slow.
within() {
    tries=$(($1 * 5))
    until eval "$2"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || return 1
        sleep 0.2
    done
}
booted() { [ -d /run/systemd/system ]; }
