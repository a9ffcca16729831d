/* The host's programs on inodes of the spawner's own.
 *
 * - A lock (flock, fcntl), a lease or a watch (inotify) is on an inode: one on a file that is shown by a bind mount is everybody's
 *   who has that file, the host included. An overlay of nothing over a directory has inodes of its own, and the same pages.
 * - The spawner mounts one for all its sandboxes, read-only, on a directory of the stage (root.c); a sandbox binds that. One for
 *   each would be a file system more for each, of which the kernel grows slower the more there are.
 * - After a while it mounts them anew, for sandboxes that start from then on: what the kernel remembers of names that were not
 *   there would hide what an upgrade of the host brings.
 * - They name their layers by descriptors, so that the sandbox's /proc does not tell where they lie on the host.
 * - What is mounted below a directory is not in an overlay of it: there, and where the kernel has no such overlay (too many
 *   stacked already, for example), the host's own are bound.
 */
#include "spawner.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

const char *const HOST_PROGRAMS[] = {"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", NULL};

enum { ANEW_S = 60, FROM_TREE = 0x4 };
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

static time_t now(void) {
  struct timespec time;
  return clock_gettime(CLOCK_MONOTONIC, &time) ? 0 : time.tv_sec;
}

static bool is_directory(const char *path) {
  struct stat info;
  return lstat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

static void place_of(char *place, size_t room, const char *path) { snprintf(place, room, "programs%s", path); }

static bool show(const char *path) {
  char place[64];
  place_of(place, sizeof place, path);
  int directory = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC), nothing = open("empty", O_PATH | O_DIRECTORY | O_CLOEXEC);
  int mounted = directory < 0 || nothing < 0 ? -1 : overlay_of(directory, nothing);
  if (mounted >= 0) umount2(place, MNT_DETACH);
  bool done = mounted >= 0 && syscall(SYS_move_mount, mounted, "", AT_FDCWD, place, FROM_TREE) == 0;
  if (directory >= 0) close(directory);
  if (nothing >= 0) close(nothing);
  if (mounted >= 0) close(mounted);
  return done;
}

bool make_places(void) {
  char place[64];
  for (int i = 0; HOST_PROGRAMS[i]; i++) {
    place_of(place, sizeof place, HOST_PROGRAMS[i]);
    if (is_directory(HOST_PROGRAMS[i]) && mkdir(place, 0755)) return false;
  }
  return true;
}

static bool mounts_below(void) {
  FILE *mounts = fopen("/proc/self/mountinfo", "re");
  char *line = NULL, point[4096];
  size_t room = 0;
  bool any = mounts == NULL;
  while (mounts != NULL && getline(&line, &room, mounts) > 0) {
    if (sscanf(line, "%*s %*s %*s %*s /%4095s", point) != 1 || strchr(point, '/') == NULL) continue;
    *strchr(point, '/') = '\0';
    for (int i = 0; HOST_PROGRAMS[i]; i++) any = any || strcmp(point, HOST_PROGRAMS[i] + 1) == 0;
  }
  free(line);
  if (mounts != NULL) fclose(mounts);
  return any;
}

void show_programs(Settings *settings) {
#ifndef SHARED_WITH_THE_HOST /* so compiled by a test, to see an attack succeed */
  if (settings->shown_s != 0 && now() - settings->shown_s < ANEW_S) return;
  settings->shown_s = now();
  settings->programs = !mounts_below();
  for (int i = 0; settings->programs && HOST_PROGRAMS[i]; i++)
    settings->programs = !is_directory(HOST_PROGRAMS[i]) || show(HOST_PROGRAMS[i]);
#endif
}

int apart(const Settings *settings, const char *path) {
  char place[64];
  place_of(place, sizeof place, path);
  int tree = tree_of(AT_FDCWD, settings->programs ? place : path);
  if (settings->programs) umount2(place, MNT_DETACH); /* in this clone alone: nothing of the host stays beneath its root */
  return tree;
}
