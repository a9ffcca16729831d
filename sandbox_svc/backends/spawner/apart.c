/* Directories of the host on inodes of a sandbox's own.
 *
 * - A lock (flock, fcntl), a lease or a watch (inotify) is on an inode: one on a file that is shown by a bind mount is everybody's
 *   who has that file, the host included. An overlay of nothing over a directory has inodes of its own, and the same pages.
 * - Each sandbox has one of its own, mounted freshly and read-only; nothing is copied.
 * - It names its layers by descriptors, so that the sandbox's /proc does not tell where they lie on the host.
 * - What is mounted below a directory is not in an overlay of it, and a file cannot be one: those are bound, as is everything
 *   where the kernel has no such overlay (too many stacked already, for example).
 */
#include "spawner.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { CLOSED_ON_EXEC = 1, SET_FLAG = 0, SET_STRING = 1, CREATE = 6 };

static int overlay_of(int directory, int nothing) {
  char layers[64];
  snprintf(layers, sizeof layers, "/proc/self/fd/%d:/proc/self/fd/%d", directory, nothing);
  int context = syscall(SYS_fsopen, "overlay", CLOSED_ON_EXEC), mounted = -1;
  if (context < 0) return -1;
  if (syscall(SYS_fsconfig, context, SET_STRING, "source", "overlay", 0) == 0 &&
      syscall(SYS_fsconfig, context, SET_STRING, "lowerdir", layers, 0) == 0 &&
      syscall(SYS_fsconfig, context, SET_FLAG, "userxattr", NULL, 0) == 0 &&
      syscall(SYS_fsconfig, context, CREATE, NULL, NULL, 0) == 0)
    mounted = syscall(SYS_fsmount, context, CLOSED_ON_EXEC, ATTRIBUTE_READ_ONLY | ATTRIBUTE_NOSUID | ATTRIBUTE_NODEV);
  close(context);
  return mounted;
}

int apart(const char *path, const char *empty) {
#ifdef SHARED_WITH_THE_HOST /* so compiled by a test, to see an attack succeed */
  (void)empty;
  return tree_of(AT_FDCWD, path);
#else
  int directory = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC), nothing = open(empty, O_PATH | O_DIRECTORY | O_CLOEXEC);
  int mounted = directory < 0 || nothing < 0 ? -1 : overlay_of(directory, nothing);
  if (directory >= 0) close(directory);
  if (nothing >= 0) close(nothing);
  return mounted >= 0 ? mounted : tree_of(AT_FDCWD, path);
#endif
}
