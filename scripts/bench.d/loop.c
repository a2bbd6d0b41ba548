// loop WORKERS MS ROOT: makes and ends sandboxes for so long, and says how many. A sandbox here is seven namespaces with
// mapped ids, a root of bound directories with /proc and /tmp of its own, and /bin/true: no rules, no limits, no record.
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void need(int done, const char *what)
{
    if (!done) {
        perror(what);
        _exit(125);
    }
}

static void map_ids(pid_t pid, const char *file)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, file);
    int map = open(path, O_WRONLY | O_CLOEXEC);
    need(map >= 0 && write(map, "0 1879048192 65536", 18) == 18 && close(map) == 0, file);
}

static void build(const char *root)
{
    static const char *trees[] = {"usr", "etc", "bin", "lib", "lib64"};
    struct mount_attr locked = {.attr_set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV};
    need(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0, "private");
    need(mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=16m") == 0, "root");
    need(chdir(root) == 0, "chdir");
    for (unsigned at = 0; at < sizeof trees / sizeof *trees; at++) {
        char path[16];
        snprintf(path, sizeof path, "/%s", trees[at]);
        if (access(path, F_OK))
            continue;
        need(mkdir(trees[at], 0755) == 0 && mount(path, trees[at], NULL, MS_BIND | MS_REC, NULL) == 0, path);
        need(syscall(SYS_mount_setattr, AT_FDCWD, trees[at], AT_RECURSIVE, &locked, sizeof locked) == 0, path);
    }
    need(!mkdir("proc", 0755) && !mkdir("tmp", 01777) && !mkdir("dev", 0755), "directories");
    need(mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) == 0, "/proc");
    need(mount("tmpfs", "tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=16m") == 0, "/tmp");
    need(syscall(SYS_pivot_root, ".", ".") == 0 && umount2(".", MNT_DETACH) == 0 && chdir("/") == 0, "pivot_root");
}

static int inside(int mapped, const char *root)
{
    char byte;
    int status;
    need(read(mapped, &byte, 1) == 1 && setresgid(0, 0, 0) == 0 && setresuid(0, 0, 0) == 0, "ids");
    build(root);
    pid_t pid = fork();
    if (pid == 0) {
        execl("/bin/true", "true", NULL);
        _exit(127);
    }
    return waitpid(pid, &status, 0) == pid && WIFEXITED(status) ? WEXITSTATUS(status) : 125;
}

static void sandbox(const char *root)
{
    unsigned long flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
        | CLONE_NEWCGROUP | SIGCHLD;
    int mapped[2], status;
    need(pipe2(mapped, O_CLOEXEC) == 0, "pipe");
    pid_t pid = syscall(SYS_clone, flags, NULL, NULL, NULL, 0);
    if (pid == 0)
        _exit(inside(mapped[0], root));
    need(pid > 0, "clone");
    map_ids(pid, "uid_map");
    map_ids(pid, "gid_map");
    need(write(mapped[1], "x", 1) == 1, "pipe");
    need(waitpid(pid, &status, 0) == pid && status == 0, "sandbox");
    close(mapped[0]);
    close(mapped[1]);
}

static double now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e3 * now.tv_sec + now.tv_nsec / 1e6;
}

int main(int count, char **words)
{
    int counts[2], total = 0, done, status;
    need(count == 4 && pipe(counts) == 0, "loop WORKERS MS ROOT");
    double end = now_ms() + atof(words[2]);
    for (int worker = 0; worker < atoi(words[1]); worker++)
        if (fork() == 0) {
            for (done = 0; now_ms() < end; done++)
                sandbox(words[3]);
            _exit(write(counts[1], &done, sizeof done) != sizeof done);
        }
    close(counts[1]);
    while (read(counts[0], &done, sizeof done) == sizeof done)
        total += done;
    while (wait(&status) > 0)
        need(status == 0, "worker");
    printf("%d\n", total);
}
