#!/bin/sh
# The package comes, is upgraded, goes, and leaves nothing. For a throw-away root only: a chroot, or a machine with systemd
# as PID 1. Beside it stands the package (scripts/package).
. ./check.sh
deb=$(echo "$PWD"/broker_*.deb)
# An overlay of a machine's root changes with that machine; there, only where packages write is looked at.
if [ "$(systemd-detect-virt -c 2>/dev/null)" = systemd-nspawn ]; then places="/etc /usr /var"; else places=/; fi
# Every name on the root's own filesystem with its kind, mode, owner and target; the times and sizes of what is not ours
# may change. dpkg's log and its copies of its own lists of yesterday come with any package.
list() {
    find $places -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp -o -path "$PWD" \) -prune -o \
        \( -path '/var/lib/dpkg/*-old' -o -path '/var/log/*' \) -prune -o -printf '%y %m %U:%G %p %l\n' | sort
}
wanted() { [ -L /etc/systemd/system/sockets.target.wants/broker.socket ]; }
main() { systemctl show -p MainPID --value broker.service; }

mkdir -p /etc/broker
echo '# an administrator wrote this' > /etc/broker/config.toml
list > /tmp/before
check "the package installs" "dpkg -i $deb"
check "its files are root's, and nobody else can write them" \
    "[ -z \"\$(dpkg -L broker | xargs -I{} find {} -maxdepth 0 \( ! -user root -o ! -group root -o -perm /022 ! -type l \))\" ]"
check "dpkg finds its files as they were packed" "dpkg --verify broker && [ -z \"\$(dpkg --verify broker)\" ]"
check "the program runs" "broker --version && broker policy check default"
check "man page and completion are there" "[ -s /usr/share/man/man1/broker-exec.1 ] && bash -n /usr/share/bash-completion/completions/broker"
check "the socket is enabled" wanted
if booted; then
    check "the socket listens" "systemctl -q is-active broker.socket && [ -S /run/broker/broker.sock ]"
    check "the service waits to be asked" "! systemctl -q is-active broker.service"
    check "it answers" "broker ps --connect /run/broker/broker.sock && systemctl -q is-active broker.service"
    old=$(main)
    # systemctl waits for the socket, and not for the service that is restarted with it.
    check "an upgrade restarts what runs" "dpkg -i $deb && within 20 '[ \$(main) != $old ] && systemctl -q is-active broker.service'"
    check "and it answers again" "broker ps --connect /run/broker/broker.sock"
    systemctl -q disable broker.socket
    check "who disabled it finds it disabled after an upgrade" "dpkg -i $deb && ! wanted"
    check "and reinstalled after a removal, it is what it was" "systemctl -q enable broker.socket && dpkg -r broker && dpkg -i $deb && wanted && systemctl -q is-active broker.socket"
    check "it keeps a record" "broker ps --connect /run/broker/broker.sock && [ -n \"\$(ls /var/lib/broker)\" ]"
else
    cannot "starting, restarting and stopping the units" "no systemd runs in a chroot"
    check "an upgrade" "dpkg -i $deb && wanted"
    mkdir -p /var/lib/broker && touch /var/lib/broker/audit
fi
# A run that outlived the program holds the lock of its uid.
mkdir -p /run/broker/slots
touch /run/broker/slots/7 /run/broker/slots/8
exec 7> /run/broker/slots/7
flock 7
check "it can be removed" "dpkg -r broker"
check "the program is gone, the record is left" "[ ! -e /usr/bin/broker ] && [ -d /var/lib/broker ]"
booted && check "nothing of it runs" "! pgrep -f 'broker serve' && ! pgrep -f 'role core' && ! systemctl -q is-active broker.socket && [ ! -e /run/broker/broker.sock ]"
check "it can be purged" "dpkg -P broker"
check "a lock that is held is left, and nothing else in /run" "[ \"\$(find /run/broker -type f)\" = /run/broker/slots/7 ]"
exec 7>&-
rm -rf /run/broker
list > /tmp/after
check "no file of ours is left, and no other was touched" "diff /tmp/before /tmp/after"
check "nor one that dpkg or systemd keeps for us" \
    "! ls -d /var/lib/dpkg/info/broker.* /var/lib/broker /var/lib/systemd/deb-systemd-helper-*/broker* 2>/dev/null"
check "the administrator's configuration is" "[ -s /etc/broker/config.toml ]"
booted && check "systemd knows no unit of ours" "[ \$(systemctl show -p LoadState --value broker.socket) = not-found ] && [ \$(systemctl show -p LoadState --value broker.service) = not-found ]"
exit $((failed > 0))
