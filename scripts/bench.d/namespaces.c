// The floor under any sandbox's start: all seven namespaces and an exec, with no mounts, identity or rules.
// With vfork's flags no page table is copied, which is the cheapest way there is.
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static int child(void *words)
{
    execv(((char **)words)[0], words);
    _exit(127);
}

int main(int count, char **words)
{
    static char stack[65536] __attribute__((aligned(16)));
    int flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
        | CLONE_NEWCGROUP | CLONE_VM | CLONE_VFORK | SIGCHLD;
    int status, pid = count > 1 ? clone(child, stack + sizeof stack, flags, words + 1) : -1;
    return pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status) ? WEXITSTATUS(status) : 125;
}
