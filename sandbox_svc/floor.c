/* The floor of a sandbox: what the kernel alone takes for one disposable, isolated process.
 *
 * Per turn: three directories, clone into fresh namespaces, an overlay over LOWER, the host's programs read-only, /proc,
 * /tmp, pivot_root, execve /bin/true, wait, remove the directories. No seccomp, no limits, no service, no protocol.
 *
 *   floor LOWER RUN TURNS CONCURRENCY   prints the wall time of each turn in nanoseconds, one a line
 *   floor TURNS CONCURRENCY             the same of fork, execve /bin/true, wait, and nothing else
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *const PROGRAMS[] = {"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"};
static const char *const WORK[] = {"work/incompat/volatile/dirty", "work/incompat/volatile", "work/incompat", "work", NULL};
static const int SPACES = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWCGROUP | CLONE_NEWNET;

static void need(int failed, const char *what) {
  if (failed) {
    fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
    _exit(1);
  }
}

static long now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void put(const char *path, const char *text) {
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  need(fd < 0 || write(fd, text, strlen(text)) < 0, path);
  close(fd);
}

static void map_ids(unsigned uid, unsigned gid) {
  char line[64];
  put("/proc/self/setgroups", "deny");
  snprintf(line, sizeof line, "0 %u 1", gid);
  put("/proc/self/gid_map", line);
  snprintf(line, sizeof line, "0 %u 1", uid);
  put("/proc/self/uid_map", line);
}

static void run_true(void) {
  char *const argv[] = {"/bin/true", NULL}, *const env[] = {NULL};
  execve(argv[0], argv, env);
  need(1, "execve");
}

static void plain_turn(void) {
  int status;
  pid_t pid = fork();
  need(pid < 0, "fork");
  if (pid == 0) run_true();
  need(waitpid(pid, &status, 0) < 0 || status, "turn");
}

static void inside(const char *lower, const char *box, unsigned uid, unsigned gid) {
  char options[16384], target[4200], source[64];
  if (uid != 0) map_ids(uid, gid);
  need(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), "private mounts");
  snprintf(options, sizeof options, "lowerdir=%s,upperdir=%s/u,workdir=%s/w,userxattr,volatile", lower, box, box);
  snprintf(target, sizeof target, "%s/m", box);
  need(mount("overlay", target, "overlay", MS_NOSUID | MS_NODEV, options), "overlay");
  need(chdir(target), "chdir");
  for (unsigned i = 0; i < sizeof PROGRAMS / sizeof *PROGRAMS; i++) {
    struct stat info;
    snprintf(source, sizeof source, "/%s", PROGRAMS[i]);
    if (lstat(source, &info) || !S_ISDIR(info.st_mode)) continue;
    need(mount(source, PROGRAMS[i], NULL, MS_BIND | MS_REC, NULL), source);
  }
  need(mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL), "proc");
  need(mount("tmpfs", "tmp", "tmpfs", MS_NOSUID | MS_NODEV, NULL), "tmp");
  need(syscall(SYS_pivot_root, ".", "."), "pivot_root");
  need(umount2(".", MNT_DETACH), "umount");
  run_true();
}

static void turn(const char *lower, const char *box) {
  char path[4200];
  unsigned uid = geteuid(), gid = getegid();
  int status, flags = SPACES | (uid ? CLONE_NEWUSER : 0);
  need(mkdir(box, 0700), box);
  for (const char *name = "uwm"; *name; name++) {
    snprintf(path, sizeof path, "%s/%c", box, *name);
    need(mkdir(path, 0755), path);
  }
  pid_t pid = syscall(SYS_clone, flags | SIGCHLD, NULL, NULL, NULL, NULL);
  need(pid < 0, "clone");
  if (pid == 0) inside(lower, box, uid, gid);
  need(waitpid(pid, &status, 0) < 0 || status, "turn");
  for (const char *const *name = WORK; *name; name++) {
    snprintf(path, sizeof path, "%s/w/%s", box, *name);
    remove(path);
  }
  for (const char *name = "uwm"; *name; name++) {
    snprintf(path, sizeof path, "%s/%c", box, *name);
    rmdir(path);
  }
  rmdir(box);
}

int main(int argc, char **argv) {
  if (argc != 5 && argc != 3) {
    fprintf(stderr, "usage: floor [LOWER RUN] TURNS CONCURRENCY\n");
    return 2;
  }
  bool plain = argc == 3;
  int turns = atoi(argv[argc - 2]), lanes = atoi(argv[argc - 1]), status, failed = 0;
  for (int lane = 0; lane < lanes; lane++) {
    pid_t pid = fork();
    need(pid < 0, "fork");
    if (pid) continue;
    char box[4096], line[32];
    for (int i = lane; i < turns; i += lanes) {
      if (!plain) snprintf(box, sizeof box, "%s/f%d.%d", argv[2], lane, i);
      long began_ns = now_ns();
      if (plain) plain_turn();
      else turn(argv[1], box);
      int size = snprintf(line, sizeof line, "%ld\n", now_ns() - began_ns);
      need(write(1, line, size) != size, "write");
    }
    _exit(0);
  }
  while (wait(&status) > 0) failed |= status;
  return failed != 0;
}
