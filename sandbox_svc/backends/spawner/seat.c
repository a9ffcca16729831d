/* From a freshly cloned process to the confined first process of a sandbox.
 *
 * - It settles first (control group, directories, private mounts, network, /proc beside the place of the root) and
 *   waits until it is needed, so that a service can keep a few seats warm; then it gets its file system and loses its privileges.
 * - It starts in the empty root of `root.c`, as its working directory, with the host's tree as its root.
 * - Order: overlay root, read-only host programs, caller's mounts, /proc and /dev, the root entered and the host's detached,
 *   identity, capabilities, no_new_privs, seccomp; then `serve`.
 * - The mounts belong to a user namespace in which the sandbox has no capability: as root the initial one, otherwise an outer
 *   one that only the spawner and this set-up code are ever in.
 * - Inside there is one user (1000), mapped to one unprivileged host id; the host's root is unmapped.
 * - Host sources are opened before any target is touched, and targets are resolved without links.
 * - Every failure is reported over the socket with the name of the step; nothing is half-confined.
 */
#include "spawner.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef OPEN_TREE_CLONE
#define OPEN_TREE_CLONE 1
#endif
#ifndef CLONE_NEWCGROUP
#define CLONE_NEWCGROUP 0x02000000
#endif
enum { INSIDE_ID = 1000, LAST_KNOWN_CAPABILITY = 37, OPTION_BYTES = 4096 };
enum { FROM_TREE = 0x4, ONTO_OBJECT = 0x40 }; /* flags of move_mount */
enum { PICK_CLOSED_ON_EXEC = 1, PICK_ITSELF = 8, SET_STRING = 1, RECONFIGURE = 7 };

static const char *const PROC_READ_ONLY[] = {"sys", "irq", "bus", "fs", "sysrq-trigger", NULL};
static const char *const PROC_MASKED[] = {
#ifndef WITHOUT_MASKS /* taken away by a test, to see an attack succeed */
    "kcore", "keys", "timer_list", "sched_debug", "kallsyms", "kmsg",
#endif
    NULL};

static int channel, network_of_this, shm = -1, programs_apart[MOST_PROGRAMS];
static int segments = -1; /* a file of /proc that sets how many pages all segments may have */
static char at[320] = "start", breaks_at[320];

static void fail(const char *why, int number) __attribute__((noreturn));

static void fail(const char *why, int number) {
  char step[700];
  snprintf(step, sizeof step, "%s", quoted(at));
  answer(channel, NULL, 0, "{\"ready\": false, \"step\": %s, \"error\": %s, \"errno\": %d}", step, quoted(why), number);
  _exit(1);
}

static void need(bool done) {
  if (!done) fail(strerror(errno), errno);
}

static void step(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void step(const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(at, sizeof at, format, values);
  va_end(values);
  if (*breaks_at && strcmp(breaks_at, at) == 0) fail("injected", EIO);
}

/* A file may name the step to fail at: how a test injects a fault. */
static void learn_fault(void) {
#ifdef BREAKS_AT
  int fault = open(BREAKS_AT, O_RDONLY | O_CLOEXEC);
  if (fault >= 0 && read(fault, breaks_at, sizeof breaks_at - 1) >= 0) close(fault);
#endif
}

/* Values for files of a control group, of which those that are not needed may be refused. */
static void put_all(Request *request) {
  for (long left = number(request); left > 0; left--) {
    const char *path = text(request), *value = text(request);
    bool needed = number(request);
    need(put(path, value) || !needed);
  }
}

static void raise_loopback(void) {
  struct ifreq lo = {.ifr_name = "lo"};
  int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  need(sock >= 0 && ioctl(sock, SIOCGIFFLAGS, &lo) == 0);
  bool up = lo.ifr_flags & IFF_UP;
  lo.ifr_flags |= IFF_UP;
  need(up || ioctl(sock, SIOCSIFFLAGS, &lo) == 0);
  close(sock);
}

/* The number after a text in a file; -1 where there is none. */
static long number_in(const char *path, const char *before) {
  char content[4096];
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t size = fd < 0 ? -1 : read(fd, content, sizeof content - 1);
  if (fd >= 0) close(fd);
  content[size > 0 ? size : 0] = '\0';
  const char *found = strstr(content, before);
  return found != NULL ? strtol(found + strlen(before), NULL, 10) : -1;
}

/* Whether a table of which the first line is a header has no other, or is not there. */
static bool has_no_entry(const char *path) {
  char content[4096];
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno == ENOENT;
  ssize_t size = read(fd, content, sizeof content - 1);
  close(fd);
  content[size > 0 ? size : 0] = '\0';
  const char *end = strchr(content, '\n');
  return size >= 0 && (end == NULL || end[1] == '\0');
}

/* Whether every number of a table is 0, but for the settings with which the lines for IP and TCP begin. */
static bool counts_nothing(const char *path) {
  char content[1 << 14], *line, *rest = content;
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno == ENOENT;
  size_t size = 0;
  ssize_t got;
  while ((got = read(fd, content + size, sizeof content - 1 - size)) > 0) size += (size_t)got;
  close(fd);
  content[size] = '\0';
  if (got < 0 || size == sizeof content - 1) return false;
  while ((line = strsep(&rest, "\n")) != NULL) {
    int settings = strncmp(line, "Ip: ", 4) == 0 ? 2 : strncmp(line, "Tcp: ", 5) == 0 ? 4 : 0;
    for (char *word; (word = strsep(&line, " \t")) != NULL;) {
      char *end;
      long value = strtol(word, &end, 10);
      if (end != word && *end == '\0' && settings-- <= 0 && value != 0) return false;
    }
  }
  return true;
}

/* No socket is left in this network, none has ever sent a byte or tried to, and no flow label lingers, which needs neither:
 * there is no other device, and nobody in a sandbox may set an address, a route or a rule. */
static bool network_as_new(void) {
#ifdef WITHOUT_A_LOOK /* so compiled by a test, to see what a sandbox has left */
  return true;
#endif
  return number_in("/proc/self/net/sockstat", "sockets: used ") == 0 && number_in("/proc/self/net/dev", "lo:") == 0 &&
         has_no_entry("/proc/self/net/ip6_flowlabel") && counts_nothing("/proc/self/net/snmp") &&
         counts_nothing("/proc/self/net/snmp6") && counts_nothing("/proc/self/net/netstat");
}

void enter_network(int sock, const Settings *settings, int network) {
  struct stat info;
  channel = sock;
  learn_fault();
  step("earlier network");
  need(fstat(network, &info) == 0 && setns(network, CLONE_NEWNET) == 0);
  bool ours = info.st_dev == settings->network.st_dev && info.st_ino == settings->network.st_ino;
  if (ours || !network_as_new()) need(unshare(CLONE_NEWNET) == 0);
}

void tell_ready(int sock) {
  answer(sock, &network_of_this, 1, "{\"ready\": true}");
  close(network_of_this);
}

/* Attach a detached tree over an entry of a directory that only this set-up code can change. */
static void cover(int tree, int directory, const char *name, bool read_only) {
  need(tree >= 0);
  need(!read_only || set_attributes(tree, ATTRIBUTE_READ_ONLY, true) == 0);
  need(syscall(SYS_move_mount, tree, "", directory, name, FROM_TREE) == 0);
  close(tree);
}

static int directory_of(const char *name) {
  int fd = open(name, O_PATH | O_DIRECTORY | O_CLOEXEC);
  need(fd >= 0);
  return fd;
}

/* What processes leave in the sandbox's own IPC namespace when they end is bounded; that the bounds hold, a probe shows.
 * Not in the host's /proc: a name there is found among those of all namespaces. */
static void bound_leavings(void) {
  put("proc/sys/kernel/msgmni", "512");
  put("proc/sys/kernel/sem", "250 32000 32 128");
  segments = open("proc/sys/kernel/shmall", O_WRONLY | O_CLOEXEC);
}

static void bound_segments(long bytes) {
  if (segments < 0) return;
  dprintf(segments, "%ld", bytes / sysconf(_SC_PAGESIZE));
  close(segments);
}

/* Devices of its own, and beside them in the same file system its shared memory, which gets its size later. */
static void stage_devices(const Settings *settings) {
  step("devices");
  if (!settings->devices) return; /* those that the spawner has bound, which all share */
  const char *failed = make_devices(true);
  if (failed != NULL) fail(failed, errno);
  shm = syscall(SYS_open_tree, AT_FDCWD, "dev/shm", OPEN_TREE_CLONE | O_CLOEXEC);
  need(shm >= 0 && set_attributes(shm, ATTRIBUTE_NOSUID | ATTRIBUTE_NODEV, false) == 0);
  need(seal("dev"));
}

static void stage_proc(void) {
  step("mount /proc beside");
  need(mount("proc", "proc", "proc", SAFE | MS_NOEXEC, NULL) == 0);
  bound_leavings();
  int top = directory_of("proc");
  for (const char *const *name = PROC_READ_ONLY; *name; name++) {
    step("protect /proc/%s", *name);
    int tree = tree_of(top, *name);
    if (tree >= 0 || errno != ENOENT) cover(tree, top, *name, true);
  }
  for (const char *const *name = PROC_MASKED; *name; name++) {
    step("mask /proc/%s", *name);
    if (faccessat(top, *name, F_OK, 0) == 0) cover(tree_of(AT_FDCWD, "dev/null"), top, *name, true);
    else need(errno == ENOENT);
  }
  close(top);
}

/* Terminals of a number that all share; where there can be none, a command that wants one is refused. */
static void stage_terminals(void) {
  mount("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,max=64");
}

static void stage_programs(const Settings *settings) {
  step("host programs");
  for (int i = 0; HOST_PROGRAMS[i]; i++) {
    const char *path = HOST_PROGRAMS[i];
    struct stat info;
    bool there = lstat(path, &info) == 0 && S_ISDIR(info.st_mode);
    programs_apart[i] = !there ? -1 : apart(settings, path);
    need(!there || programs_apart[i] >= 0);
  }
}

void settle(int sock, const Settings *settings, Request *seat) {
  char path[OPTION_BYTES];
  channel = sock;
  learn_fault();
  text(seat), text(seat);
  const char *place = text(seat);
  bool kept = number(seat); /* its directories, and its groups with their limits, are there: see clear.c */
  step("cgroup");
  for (long left = number(seat); left > 0; left--) need(mkdir(text(seat), 0777) == 0);
  put_all(seat);
  step("directories");
  for (const char *const *part = (const char *const[]){"", "/u", "/w", NULL}; *part && !kept; part++) {
    snprintf(path, sizeof path, "%s/run/%s%s", settings->home, place, *part);
    need(mkdir(path, 0755) == 0);
    if (settings->root && strcmp(*part, "/u") == 0) need(chown(path, settings->uid, settings->gid) == 0);
  }
  step("private mounts");
  need(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0);
  step("network");
  need(sethostname("regreen", strlen("regreen")) == 0);
#ifndef IN_THE_NETWORK_OF_THE_HOST /* so compiled by a test, to see an attack succeed */
  raise_loopback();
#endif
  network_of_this = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
  need(network_of_this >= 0);
  umask(022);
  stage_devices(settings);
  stage_proc();
  stage_terminals();
  stage_programs(settings);
}

typedef struct { int tree; const char *target; bool read_only; } Source;

static Source *open_sources(bool programs, Request *spec, long *count) {
  step("open mounts");
  long asked = number(spec);
  Source *found = calloc(asked + MOST_PROGRAMS, sizeof *found);
  need(found != NULL);
  *count = 0;
  for (int i = 0; HOST_PROGRAMS[i]; i++) {
    if (programs_apart[i] < 0) continue;
    if (programs) found[(*count)++] = (Source){programs_apart[i], HOST_PROGRAMS[i], true};
    else close(programs_apart[i]);
  }
  for (; asked > 0; asked--) {
    const char *source = text(spec), *target = text(spec);
    step("open mount %s", source);
    found[(*count)++] = (Source){tree_of(AT_FDCWD, source), target, number(spec)};
    need(found[*count - 1].tree >= 0);
  }
  return found;
}

static void mount_overlay(const Settings *settings, const char *place, const char *lower, bool is_volatile) {
  char options[OPTION_BYTES], target[64];
  step("overlay");
  int top = directory_of(".");
  snprintf(target, sizeof target, "/proc/self/fd/%d/root", top);
  need(chdir(settings->home) == 0); /* short names of layers */
  int size = snprintf(options, sizeof options, "lowerdir=%s,upperdir=run/%s/u,workdir=run/%s/w,userxattr%s", lower, place,
                      place, is_volatile ? ",volatile" : "");
  if (size >= (int)sizeof options) fail("more layers than one mount can name", E2BIG); /* the kernel would cut them off */
  need(mount("overlay", target, "overlay", SAFE, options) == 0);
  need(fchdir(top) == 0 && chdir("root") == 0);
  close(top);
}

static void attach(const Source *sources, long count) {
  for (const Source *source = sources; source < sources + count; source++) {
    struct stat info;
    step("mount %s", source->target);
    int attributes = ATTRIBUTE_NOSUID | ATTRIBUTE_NODEV | (source->read_only ? ATTRIBUTE_READ_ONLY : 0);
    need(set_attributes(source->tree, attributes, true) == 0 && fstat(source->tree, &info) == 0);
    int place = make_place(source->target, S_ISDIR(info.st_mode));
    need(place >= 0);
    need(syscall(SYS_move_mount, source->tree, "", place, "", FROM_TREE | ONTO_OBJECT) == 0);
    close(place);
    close(source->tree);
  }
}

/* Move a staged mount to its place in the new root. */
static void move(const char *staged, const char *target) {
  step("mount %s", target);
  int place = make_place(target, true);
  need(place >= 0 && syscall(SYS_move_mount, AT_FDCWD, staged, place, "", ONTO_OBJECT) == 0);
  close(place);
}

/* Give the shared memory its size, and its place. */
static void place_shared_memory(long size) {
  char bytes[32];
  step("mount /dev/shm");
  snprintf(bytes, sizeof bytes, "%ld", size);
  int made = syscall(SYS_fspick, shm, "", PICK_CLOSED_ON_EXEC | PICK_ITSELF);
  need(made >= 0 && syscall(SYS_fsconfig, made, SET_STRING, "size", bytes, 0) == 0);
  need(syscall(SYS_fsconfig, made, SET_STRING, "nr_inodes", "20k", 0) == 0);
  need(syscall(SYS_fsconfig, made, RECONFIGURE, NULL, NULL, 0) == 0);
  int place = open_beneath(AT_FDCWD, "dev/shm", O_PATH);
  need(place >= 0 && syscall(SYS_move_mount, shm, "", place, "", FROM_TREE | ONTO_OBJECT) == 0);
  close(place);
  close(made);
  close(shm);
}

/* A fresh file system in memory. */
static void mount_memory(const char *target, long size, const char *inodes) {
  char path[64], options[96];
  step("mount %s", target);
  int place = make_place(target, true);
  need(place >= 0);
  snprintf(path, sizeof path, "/proc/self/fd/%d", place);
  snprintf(options, sizeof options, "mode=1777,size=%ld,nr_inodes=%s", size, inodes);
  need(mount("tmpfs", path, "tmpfs", SAFE, options) == 0);
  close(place);
}

static void drop_capabilities(void) {
  struct { unsigned version; int pid; } head = {0x20080522, 0};
  struct { unsigned effective, permitted, inheritable; } none[2] = {{0, 0, 0}, {0, 0, 0}};
  int capability = 0;
  while (prctl(PR_CAPBSET_DROP, (unsigned long)capability, 0UL, 0UL, 0UL) == 0) capability++;
  need(errno == EINVAL && capability >= LAST_KNOWN_CAPABILITY); /* the first that the kernel does not know */
  need(prctl(PR_CAP_AMBIENT, (unsigned long)PR_CAP_AMBIENT_CLEAR_ALL, 0UL, 0UL, 0UL) == 0);
  need(syscall(SYS_capset, &head, none) == 0);
}

static void limit(int which, rlim_t value) {
  struct rlimit now;
  need(getrlimit(which, &now) == 0);
  if (now.rlim_max != RLIM_INFINITY && value > now.rlim_max) value = now.rlim_max;
  now = (struct rlimit){value, value};
  need(setrlimit(which, &now) == 0);
}

static void confine(const Settings *settings, Request *spec) {
  step("identity");
  if (settings->root) {
    need(setgroups(0, NULL) == 0);
    need(setresgid(settings->gid, settings->gid, settings->gid) == 0);
    need(setresuid(settings->uid, settings->uid, settings->uid) == 0);
    need(prctl(PR_SET_DUMPABLE, 1UL, 0UL, 0UL, 0UL) == 0);
  }
  need(unshare(CLONE_NEWUSER) == 0);
  need(map_ids(INSIDE_ID, settings->root ? settings->uid : 0, settings->root ? settings->gid : 0));
  step("limits");
  for (long left = number(spec); left > 0; left--) {
    int which = number(spec);
    limit(which, number(spec));
  }
  step("capabilities");
  drop_capabilities();
  step("no_new_privs");
  need(prctl(PR_SET_NO_NEW_PRIVS, 1UL, 0UL, 0UL, 0UL) == 0);
  step("seccomp");
#ifndef WITHOUT_FILTER /* taken away by a test, to see an attack succeed */
  need(prctl(PR_SET_SECCOMP, 2UL, &settings->filter, 0UL, 0UL) == 0);
#endif
  need(prctl(PR_SET_PDEATHSIG, (unsigned long)SIGKILL, 0UL, 0UL, 0UL) == 0);
#ifndef DUMPABLE /* taken away by a test, to see an attack succeed */
  need(prctl(PR_SET_DUMPABLE, 0UL, 0UL, 0UL, 0UL) == 0);
#endif
}

long finish(const Settings *settings, Request *spec) {
  long count;
  text(spec), text(spec);
  step("group limits");
  put_all(spec);
  /* Not before: nobody may set the limits of the group that is its namespace's root. */
  need(unshare(CLONE_NEWCGROUP) == 0);
  const char *place = text(spec), *lower = text(spec);
  bool is_volatile = number(spec), programs = number(spec);
  long memory = number(spec), shared = number(spec), descriptors = number(spec);
  const char *inodes = text(spec);
  bound_segments(shared);
  Source *sources = open_sources(programs, spec, &count);
  mount_overlay(settings, place, lower, is_volatile);
  attach(sources, count);
  move("../proc", "/proc");
  move("../dev", "/dev");
  if (shm >= 0) place_shared_memory(shared);
  else mount_memory("/dev/shm", shared, "20k");
  mount_memory("/tmp", memory, inodes);
  step("root");
  need(enter_root());
  confine(settings, spec);
  return descriptors;
}
