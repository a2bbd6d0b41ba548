#!/bin/sh
# For a throw-away machine only: root, systemd as PID 1, cgroup v2. Beside it stand the program and the units
# (target/*/release/broker, scripts/systemd/*). Prints a line a check, and ends with the number of those that failed.
set -u
fail=0
check() { if eval "$2" >/tmp/out 2>&1; then echo "ok   $1"; else echo "FAIL $1"; sed 's/^/     /' /tmp/out | tail -5; fail=$((fail+1)); fi; }
echo START $(uname -r) $(systemctl --version | head -1)
echo 'ada:x:1500:1500::/:/bin/sh' >> /etc/passwd; echo 'ada:x:1500:' >> /etc/group
install -m 755 broker /usr/bin/broker
cp broker.socket broker.service /usr/lib/systemd/system/
mkdir -p /etc/broker /etc/systemd/system/broker.service.d
printf '[[access]]\nuser = "ada"\npolicies = ["default"]\n' > /etc/broker/config.toml
printf '[Service]\nWatchdogSec=6\nTimeoutStartSec=60\n' > /etc/systemd/system/broker.service.d/test.conf
systemctl daemon-reload
as() { timeout 20 setpriv --reuid 1500 --regid 1500 --clear-groups "$@"; }
core() { pgrep -f 'role core'; }
check "socket unit starts" "systemctl enable --now broker.socket"
check "nothing runs yet" "! systemctl -q is-active broker.service"
check "a user's run activates the service" "[ \$(cd /; as broker exec --connect /run/broker/broker.sock -- id -u) = 1000 ]"
check "it is active" "systemctl -q is-active broker.service"
check "the core is nobody's" "grep -q 'Uid:.1912602624' /proc/\$(core)/status"
check "embedded is refused to the user" "! as broker exec --embedded -- true"
mkdir /srv/work; chown 1500:1500 /srv/work
check "the user's workspace" "(cd /srv/work && as broker exec --workspace /srv/work -- sh -c 'echo x > made') && [ \$(stat -c %u /srv/work/made) = 1500 ]"
check "default policy only" "! as broker exec --policy build -- true"
main=$(systemctl show -p MainPID --value broker.service)
old=$(core); kill -9 $old; sleep 2
check "the core is started again, not the service" "[ \$(core) != $old ] && [ \$(systemctl show -p MainPID --value broker.service) = $main ] && as broker exec -- true"
kill -STOP $(core)
for i in $(seq 60); do sleep 1; [ "$(systemctl show -p MainPID --value broker.service)" != $main ] && [ "$(systemctl show -p MainPID --value broker.service)" != 0 ] && break; done
echo "     watchdog after $i s"
check "a core that hangs is seen by the watchdog" "[ \$(systemctl show -p MainPID --value broker.service) != $main ] && as broker exec -- true"
main=$(systemctl show -p MainPID --value broker.service); kill -9 $main; sleep 3
check "killed, it comes back" "as broker exec -- true && systemctl -q is-active broker.service"
check "systemctl restart" "systemctl restart broker.service && as broker exec -- true"
(as broker exec -- sleep 100 & echo $! > /tmp/pid); sleep 2
check "a sandbox lives" "pgrep -x sleep"
check "the record is whole" "broker audit verify"
check "systemctl stop" "systemctl stop broker.socket broker.service"
sleep 1
check "no process is left" "! pgrep -x sleep && ! pgrep -f 'broker serve' && ! pgrep -f 'role core'"
check "no group is left" "[ ! -e /sys/fs/cgroup/broker ]"
check "no socket is left" "[ ! -e /run/broker/broker.sock ]"
# io on v2
printf 'extends = "default"\n[limits]\nio = "2MiB"\n' > /tmp/io.toml
(cd /srv/work; broker exec --embedded --policy /tmp/io.toml --workspace /srv/work -- dd if=/dev/zero of=big bs=64k count=96 oflag=direct 2>/tmp/dd; echo $? > /tmp/rc) & sleep 1.5
check "io.max is set" "grep -q 'rbps=2097152 wbps=2097152' /sys/fs/cgroup/broker/*/io.max"
wait
cat /tmp/dd | tail -1; check "and the writing goes on to its end" "[ \$(cat /tmp/rc) = 0 ]"
check "disabled" "systemctl disable broker.socket"
journalctl -u broker.service --no-pager -q 2>/dev/null | tail -20
echo FAILURES $fail
exit $fail
