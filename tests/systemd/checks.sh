#!/bin/sh
# The daemon under systemd: how it comes, serves, falls, comes again and goes. For a throw-away machine only: root, systemd
# as PID 1, cgroup v2. Beside it stand the package (scripts/package) and io.broker.Control.varlink; scripts/hosts makes the
# machines.
. ./check.sh
socket=/run/broker/broker.sock
# Where the controllers are bound to cgroup v1 the default policy cannot be enforced, and one that names the gap serves.
if grep -qw memory /sys/fs/cgroup/cgroup.controllers; then policy=default; else policy=unlimited; fi
as() { timeout 60 setpriv --reuid 1500 --regid 1500 --clear-groups "$@"; }
stranger() { timeout 60 setpriv --reuid 1501 --regid 1501 --clear-groups "$@"; }
run() { (cd / && as broker exec --connect $socket --policy $policy -- "$@"); }
core() { pgrep -f 'role core'; }
main() { systemctl show -p MainPID --value broker.service; }

printf 'ada:x:1500:1500::/:/bin/sh\neve:x:1501:1501::/:/bin/sh\nharness:x:1502:1502::/:/bin/sh\n' >> /etc/passwd
printf 'ada:x:1500:\neve:x:1501:\nharness:x:1502:\n' >> /etc/group
mkdir -p /etc/broker/policies /etc/systemd/system/broker.service.d
cat > /etc/broker/config.toml <<'CONFIG'
[[access]]
user = "ada"
policies = ["default", "unlimited"]
grants = ["echo"]
[[access]]
user = "harness"
policies = ["default"]
grants = ["model"]
[grant.model]
kind = "http"
host = "model.test"
allow = [ { methods = ["POST"], path = "/v1/messages" } ]
upstream = "127.0.0.1:9"
upstream_tls = "off"
[grant.echo]
kind = "tcp"
host = "echo.test"
port = 7
upstream = "127.0.0.1:7007"
CONFIG
printf '[Socket]\nListenStream=127.0.0.1:7007\nAccept=yes\n' > /etc/systemd/system/echo.socket
printf '[Service]\nExecStart=cat\nStandardInput=socket\n' > /etc/systemd/system/echo@.service
systemctl daemon-reload && systemctl start echo.socket
printf 'extends = "default"\nallow_gaps = ["no-cgroup"]\n' > /etc/broker/policies/unlimited.toml
# It is killed here more often than systemd puts up with, and a hang is to be seen sooner than after half a minute.
printf '[Unit]\nStartLimitIntervalSec=0\n[Service]\nWatchdogSec=6\nTimeoutStartSec=60\n' > /etc/systemd/system/broker.service.d/test.conf
# Workspaces are idmapped, which an overlay is not fit for.
mkdir -p /srv/work && mount -t tmpfs -o mode=755 none /srv/work && chown 1500:1500 /srv/work

check "the package installs" "dpkg -i broker_*.deb"
check "systemd finds nothing wrong with the units" "systemd-analyze verify --man=no /usr/lib/systemd/system/broker.socket /usr/lib/systemd/system/broker.service /usr/lib/systemd/system/harness.service 2>&1 | tee /tmp/verify && ! grep 'broker\|harness' /tmp/verify"
check "nothing runs yet" "! systemctl -q is-active broker.service"
check "a user's run activates the service" "[ \$(run id -u) = 1000 ]"
check "it is active" "systemctl -q is-active broker.service"
check "the core is nobody's" "grep -q 'Uid:.1912602624' /proc/\$(core)/status"
check "the core has no capability" "grep -q 'CapEff:.0000000000000000' /proc/\$(core)/status && grep -q 'CapBnd:.0000000000000000' /proc/\$(core)/status"
check "embedded is refused to the user" "! as broker exec --embedded -- true"
check "the user's workspace" "(cd /srv/work && as broker exec --policy $policy --workspace /srv/work -- sh -c 'echo x > made') && [ \$(stat -c %u /srv/work/made) = 1500 ]"
check "the roles are there, each its own user" "grep -q 'Uid:.1912602625' /proc/\$(pgrep -f 'role vault')/status && grep -q 'Uid:.1912602626' /proc/\$(pgrep -f 'role resolver')/status"
if [ "$(stat -f -c %T /var/lib)" = overlayfs ]; then
    cannot "a workspace of mode cow" "/var/lib is on an overlay here, which cannot be the upper layer of another"
else
    (cd /srv/work && as broker exec --policy $policy --workspace /srv/work:cow -- sh -c 'echo changed > made; echo y > new') > /tmp/cow 2>&1
    id=$(sed -nE 's/.*broker diff ([0-9a-f-]+).*/\1/p' /tmp/cow)
    check "a workspace of mode cow stays as it was" "cat /tmp/cow; [ -n '$id' ] && [ \$(cat /srv/work/made) = x ] && [ ! -e /srv/work/new ]"
    check "what was changed in it can be seen, and by its owner alone" "as broker diff $id | grep -qx 'M \"made\"' && ! stranger broker diff $id"
    check "and committed" "as broker commit $id && [ \$(cat /srv/work/made) = changed ] && [ \$(stat -c %u /srv/work/new) = 1500 ]"
fi
check "a grant leads to the server, under the unit's rights" "(cd / && as broker exec --policy $policy --grant echo -- bash -c 'exec 3<>/dev/tcp/echo.test/7; echo hello >&3; read -t 20 answer <&3; echo \$answer') | grep -qx hello"
check "without it there is no such name" "! run bash -c 'exec 3<>/dev/tcp/echo.test/7' 2>/dev/null"
check "the vault keeps a credential, and its name is all that comes out" "echo a-secret-of-mine | broker credential add mine && [ \$(broker credential list) = mine ] && ! grep -rq a-secret-of-mine /var/lib/broker"
# Nobody listens where the model should be: what is seen is that a driver came, under the unit's rights and confined by itself, and asked.
sessions="setpriv --reuid 1502 --regid 1502 --clear-groups env HARNESS_STORE=sqlite:/var/lib/harness/sessions.sqlite harness"
check "the harness's service starts" "systemctl start harness.service && systemctl -q is-active harness.service"
check "it drives a session that is due, as far as the model's host" "(cd / && \$sessions run --detach --session one --model m --task t --attempts 1) && within 60 '\$sessions events one --type session.error | grep -q credential_host_unreachable_error' || { \$sessions events one; journalctl --no-pager -u harness.service | tail; false; }"
check "and stops" "systemctl stop harness.service && ! pgrep -x harness"
check "a policy that is not granted is refused" "! as broker exec --policy build -- true"
check "a user who is not named is refused" "(cd / && ! stranger broker exec --policy $policy -- true)"
if [ $policy = default ]; then
    check "a run out of memory ends alone" "(cd / && as broker exec --memory 32MiB --report - -- dd if=/dev/zero of=/dev/null bs=200M count=1) | grep -A2 '\"outcome\"' | grep -q oom && systemctl -q is-active broker.service"
    (cd / && as broker exec --memory 64MiB --pids 50 --cpus 0.5 -- sleep 30 2>/dev/null) &
    # Of the group's processes one is init.
    limits="grep -qx 67108864 /sys/fs/cgroup/broker/*/memory.max && grep -qx 51 /sys/fs/cgroup/broker/*/pids.max && grep -qx '50000 100000' /sys/fs/cgroup/broker/*/cpu.max"
    check "memory.max, pids.max and cpu.max are set" "within 20 \"$limits\""
    # The group stands beside systemd's own, which must let it be.
    check "and are after systemd read its units again" "systemctl daemon-reload && systemctl restart systemd-journald && sleep 1 && $limits"
    check "processes beyond the limit are refused" "(cd / && as broker exec --pids 8 -- sh -c 'for i in 1 2 3 4 5 6 7 8 9; do sleep 2 & done; wait') 2>&1 | grep -qi 'cannot fork\|resource'"
else
    check "limits that cannot be enforced are refused" "(cd / && as broker exec --policy default -- true); [ \$? = 125 ]"
    reason="cgroup v2 has only '$(cat /sys/fs/cgroup/cgroup.controllers)' here, the other controllers are bound to v1"
    cannot "memory.max, pids.max and cpu.max are set, and stay" "$reason"
    cannot "a run out of memory ends alone" "$reason"
    cannot "processes beyond the limit are refused" "$reason"
fi

old=$(core)
before=$(main)
kill -9 "$old"
check "a core that is killed is started again, not the service" "within 20 '[ -n \"\$(core)\" ] && [ \"\$(core)\" != $old ]' && run true && [ \$(main) = $before ]"
kill -STOP "$(core)"
check "a core that hangs is seen by the watchdog" "within 60 '[ \$(main) != $before ] && [ \$(main) != 0 ]' && run true"
before=$(main)
kill -9 "$before"
check "a killed service comes back" "within 20 '[ \$(main) != $before ] && systemctl -q is-active broker.service' && run true"
before=$(main)
check "systemctl restart" "systemctl restart broker.service && [ \$(main) != $before ] && run true"
run sleep 100 2>/dev/null &
check "a sandbox lives" "within 20 'pgrep -x sleep'"
check "the record is whole" "broker audit verify"
check "and in the journal, with fields" "journalctl --no-pager -q -o cat BROKER_KIND=start BROKER_UID=1500 | grep -q '\"kind\":\"start\"'"
echo "     systemd-analyze security broker.service, without what it praises:"
LC_ALL=C.UTF-8 systemd-analyze security --no-pager broker.service | grep -v '^✓' | sed 's/^/     /'

if command -v varlinkctl >/dev/null; then
    control=io.broker.Control
    check "varlinkctl info" "varlinkctl info $socket | tee /dev/stderr | grep -q $control"
    check "varlinkctl list-interfaces" "[ \"\$(varlinkctl list-interfaces $socket | sort | xargs)\" = '$control org.varlink.service' ]"
    names() { sed -nE 's/^(method|error|type) ([A-Za-z]+).*/\1 \2/p'; }
    names < $control.varlink > /tmp/names
    check "varlinkctl introspect names what the source names" "varlinkctl introspect $socket $control | names | diff /tmp/names - && [ -s /tmp/names ]"
    check "varlinkctl validate-idl" "varlinkctl validate-idl $control.varlink"
    check "varlinkctl call List" "varlinkctl call --json=short $socket $control.List '{}' | tee /dev/stderr | grep -q '\"command\":\\[\"sleep\",\"100\"\\]'"
    check "a stranger's List shows nothing of others" "stranger varlinkctl call --json=short $socket $control.List '{}' | tee /dev/stderr | grep -q '\"sandboxes\":\\[\\]'"
    check "an unknown method is an error" "! varlinkctl call $socket $control.Nothing '{}' 2>/tmp/error; grep -q MethodNotFound /tmp/error || { cat /tmp/error; false; }"
    check "a parameter that is none ends the connection, not the service" "before=\$(core); ! varlinkctl call $socket $control.Kill '{\"sandbox\":\"none\",\"x\":1}' && [ \$(core) = \$before ] && varlinkctl info $socket"
    question="{\"policy\":\"$policy\",\"command\":[\"true\"],\"environment\":[],\"path\":\"/usr/bin\",\"streams\":{}}"
    check "varlinkctl call Run" "as varlinkctl call --json=short $socket $control.Run '$question' | tee /dev/stderr | grep -q '\"exited\"'"
    check "a stranger's Run is denied" "! stranger varlinkctl call --json=short $socket $control.Run '$question' >/tmp/error 2>&1; grep -q Denied /tmp/error && grep -q policy-not-granted /tmp/error || { cat /tmp/error; false; }"
    sandbox=$(broker ps | awk '/sleep/ {print $1}')
    check "a stranger cannot end it" "! stranger varlinkctl call $socket $control.Kill '{\"sandbox\":\"$sandbox\"}' 2>/tmp/error; grep -q NoSuchSandbox /tmp/error || { cat /tmp/error; false; }"
else
    cannot "varlinkctl, an independent client" "it came with systemd 256; this is $(systemctl --version | awk '{print $2; exit}')"
fi

check "systemctl stop" "systemctl stop broker.socket broker.service"
check "no process is left" "within 5 '! pgrep -x sleep && ! pgrep -f \"broker serve\" && ! pgrep -f \"role core\"'"
check "no group is left" "[ ! -e /sys/fs/cgroup/broker ]"
check "no socket is left" "[ ! -e $socket ]"
if [ $policy = default ]; then
    mkdir -p /srv/disk && chown 1500:1500 /srv/disk
    printf 'extends = "default"\n[limits]\nio = "2MiB"\n' > /tmp/io.toml
    (cd /srv/disk && exec broker exec --embedded --policy /tmp/io.toml --workspace /srv/disk -- dd if=/dev/zero of=big bs=64k count=96 oflag=direct) 2>/dev/null &
    check "io.max is set" "within 20 \"grep -q 'rbps=2097152 wbps=2097152' /sys/fs/cgroup/broker/*/io.max\""
    check "and the writing goes on to its end" "wait $!"
else
    cannot "io.max is set, and the writing goes on to its end" "$reason"
fi
check "the package is purged" "dpkg -P broker && [ ! -e /usr/bin/broker ] && [ ! -e /var/lib/broker ]"
exit $((failed > 0))
