/* The namespace that every sandbox starts from, with a root of its own that is made once.
 *
 * - pivot_root(2) walks every process of the host: it is called here once, and in no sandbox.
 * - The namespace's root is empty and read-only. The host's tree is mounted on "host" in it and is the root of this process,
 *   whose working directory is the empty root; a clone has both, and mounts what it needs on "proc", "dev" and "root".
 * - `enter_root` ends that in a clone: the host's tree is detached, and the sandbox's covers the empty root for good, so
 *   that who leaves a chroot in there, or enters the namespace, comes out in the sandbox's tree all the same.
 * - "dev" is for the few devices that a sandbox has, in a tmpfs of which nothing can be changed. Root makes nodes of each
 *   sandbox's own there; where there can be none they are the host's, bound once for all clones.
 * - What the host mounts later is seen by later clones; what is mounted here, the host never sees.
 * - Without root the namespace belongs to a user namespace that only the spawner and set-up code are ever in.
 */
#include "spawner.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/sysmacros.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { FROM_TREE = 0x4, ONTO_OBJECT = 0x40 }; /* flags of move_mount */
static const char *const PLACES[] = {"host", "root", "proc", "dev", "empty", "programs", NULL};
typedef struct { const char *name; unsigned major, minor; } Device;
static const Device DEVICES[] = {{"null", 1, 3},   {"zero", 1, 5},    {"full", 1, 7}, {"random", 1, 8},
                                 {"urandom", 1, 9}, {"tty", 5, 0}, {NULL, 0, 0}};
static const char *const DEVICE_LINKS[][2] = {
    {"fd", "/proc/self/fd"}, {"stdin", "/proc/self/fd/0"}, {"stdout", "/proc/self/fd/1"},
    {"stderr", "/proc/self/fd/2"}, {"ptmx", "pts/ptmx"}, {NULL, NULL}};

bool put(const char *path, const char *value) {
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return false;
  ssize_t size = strlen(value), done = write(fd, value, size);
  int kept = errno;
  close(fd);
  errno = kept;
  return done == size;
}

bool map_ids(unsigned inside, uid_t uid, gid_t gid) {
  char users[64], groups[64];
  snprintf(users, sizeof users, "%u %u 1", inside, uid);
  snprintf(groups, sizeof groups, "%u %u 1", inside, gid);
  return put("/proc/self/setgroups", "deny") && put("/proc/self/gid_map", groups) && put("/proc/self/uid_map", users);
}

bool seal(const char *place) {
  int top = open(place, O_PATH | O_DIRECTORY | O_CLOEXEC);
  bool sealed = top >= 0 && set_attributes(top, ATTRIBUTE_READ_ONLY, false) == 0;
  if (top >= 0) close(top);
  return sealed;
}

static bool make_node(int top, const Device *device) {
  return mknodat(top, device->name, S_IFCHR | 0666, makedev(device->major, device->minor)) == 0 &&
         fchmodat(top, device->name, 0666, 0) == 0;
}

static bool bind_node(int top, const Device *device) {
  char source[32];
  snprintf(source, sizeof source, "/dev/%s", device->name);
  int place = openat(top, device->name, O_CREAT | O_EXCL | O_CLOEXEC, 0644), tree = tree_of(AT_FDCWD, source);
  /* a device can be written to all the same, but its times and mode, which are the host's, cannot */
  bool done = place >= 0 && tree >= 0 && set_attributes(tree, ATTRIBUTE_READ_ONLY, false) == 0 &&
              syscall(SYS_move_mount, tree, "", top, device->name, FROM_TREE) == 0;
  if (place >= 0) close(place);
  if (tree >= 0) close(tree);
  return done;
}

const char *make_devices(bool own) {
  if (mount("tmpfs", "dev", "tmpfs", MS_NOSUID, "mode=755,size=64k,nr_inodes=64")) return "mount /dev";
  int top = open("dev", O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (top < 0) return "mount /dev";
  for (const Device *device = DEVICES; device->name; device++)
    if (!(own ? make_node : bind_node)(top, device)) return "devices";
  for (int i = 0; DEVICE_LINKS[i][0]; i++)
    if (symlinkat(DEVICE_LINKS[i][1], top, DEVICE_LINKS[i][0])) return "links of /dev";
  if (mkdirat(top, "shm", 0755) || fchmodat(top, "shm", 01777, 0) || mkdirat(top, "pts", 0755)) return "places in /dev";
  close(top);
  return NULL;
}

/* Whether nodes can be made here that work: not in a user namespace, nor where a container may have no others. */
static bool can_make_devices(void) {
#ifdef SHARED_WITH_THE_HOST
  return false;
#endif
  bool can = make_devices(true) == NULL;
  for (const Device *device = DEVICES; can && device->name; device++) {
    char path[32];
    snprintf(path, sizeof path, "dev/%s", device->name);
    int fd = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
    can = fd >= 0 || errno == ENXIO; /* no terminal, and it was asked for */
    if (fd >= 0) close(fd);
  }
  umount2("dev", MNT_DETACH);
  return can;
}

const char *make_root(Settings *settings) {
  char path[4096];
  if (unshare(CLONE_NEWNS | (settings->root ? 0 : CLONE_NEWUSER))) return "namespaces of the spawner";
  if (!settings->root && !map_ids(0, settings->uid, settings->gid)) return "outer identity";
  if (mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL)) return "mounts of the spawner";
  snprintf(path, sizeof path, "%s/stage", settings->home);
  if (chdir(path) || mount("tmpfs", ".", "tmpfs", SAFE, "mode=755,size=16k,nr_inodes=16") || chdir(path)) return "stage";
  for (const char *const *name = PLACES; *name; name++)
    if (mkdir(*name, 0755)) return "stage";
  if (syscall(SYS_pivot_root, ".", "host") || chroot("host")) return "pivot_root";
  if (!make_places()) return "stage";
  int top = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
  settings->devices = settings->root && can_make_devices();
  const char *failed = settings->devices ? NULL : make_devices(false);
  if (failed != NULL) return failed;
  if (!settings->devices && !seal("dev")) return "seal /dev";
  if (top < 0 || set_attributes(top, ATTRIBUTE_READ_ONLY, false)) return "seal the stage";
  close(top);
  if (mount(path, path, NULL, MS_BIND, NULL)) return "mark"; /* whoever looks for leftovers sees whose they are */
  return NULL;
}

bool enter_root(void) {
  int top = open("..", O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (top < 0 || umount2("../host", MNT_DETACH)) return false;
  if (syscall(SYS_move_mount, AT_FDCWD, ".", top, "", ONTO_OBJECT)) return false;
  close(top);
  return chroot(".") == 0 && chdir("/") == 0;
}
