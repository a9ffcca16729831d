/* Objects of a file tree that may be hostile: paths never leave it, links are followed only where it says so. */
#include "spawner.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef AT_RECURSIVE
#define AT_RECURSIVE 0x8000
#endif
#ifndef OPEN_TREE_CLONE
#define OPEN_TREE_CLONE 1
#endif

static int resolved(int directory, const char *path, int flags, mode_t mode, unsigned long resolve) {
  struct open_how how = {.flags = flags | O_CLOEXEC, .mode = mode, .resolve = resolve};
  return syscall(SYS_openat2, directory, path, &how, sizeof how);
}

int open_beneath(int directory, const char *path, int flags) {
  return resolved(directory, path, flags, 0, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS);
}

static int from_root(const char *path, int flags, mode_t mode, unsigned long resolve) {
  int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (root < 0) return -1;
  int fd = resolved(root, path, flags, mode, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | resolve);
  int kept = errno;
  close(root);
  errno = kept;
  return fd;
}

int open_inside(const char *path, int flags, mode_t mode) {
  return from_root(path, flags | O_NONBLOCK | O_NOCTTY, mode, 0);
}

int open_itself(const char *path, int flags) {
  return from_root(path, flags | O_NONBLOCK | O_NOCTTY, 0, RESOLVE_NO_SYMLINKS);
}

int link_itself(const char *path) { return from_root(path, O_PATH | O_NOFOLLOW, 0, RESOLVE_NO_SYMLINKS); }

/* Goes down a path from `here`, which it closes; `enter` opens one component, and makes it where it is missing. */
typedef int Enter(int here, const char *part, bool last, const void *how);
static int walked(int here, const char *path, Enter *enter, const void *how) {
  char rest[4096], *part, *saved = NULL;
  if (here >= 0 && snprintf(rest, sizeof rest, "%s", path) >= (int)sizeof rest) {
    close(here);
    errno = ENAMETOOLONG;
    return -1;
  }
  for (part = here < 0 ? NULL : strtok_r(rest, "/", &saved); part != NULL && here >= 0;) {
    char *following = strtok_r(NULL, "/", &saved);
    int next = enter(here, part, following == NULL, how);
    int kept = errno;
    close(here);
    errno = kept;
    here = next;
    part = following;
  }
  return here;
}

typedef struct { int flags; mode_t mode; } Wanted;

static int file_itself(int here, const char *part, bool last, const void *how) {
  if (!last) {
    if (mkdirat(here, part, 0777) && errno != EEXIST) return -1;
    return openat(here, part, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  }
  const Wanted *wanted = how;
  int flags = wanted->flags | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC;
  int fd = openat(here, part, flags, wanted->mode);
  if (fd < 0 && errno == ELOOP && unlinkat(here, part, 0) == 0) fd = openat(here, part, flags, wanted->mode);
  return fd;
}

int make_itself(const char *path, int flags, mode_t mode) {
  const Wanted wanted = {flags, mode};
  return walked(open("/", O_PATH | O_DIRECTORY | O_CLOEXEC), path, file_itself, &wanted);
}

static int place(int here, const char *part, bool last, const void *directory) {
  if (!last || *(const bool *)directory) {
    if (mkdirat(here, part, 0755) && errno != EEXIST) return -1;
  } else {
    int fd = openat(here, part, O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd < 0) return -1;
    close(fd);
  }
  return open_beneath(here, part, O_PATH);
}

int make_place(const char *path, bool directory) {
  while (*path == '/') path++;
  int here = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (here < 0) return -1;
  int found = open_beneath(here, path, O_PATH);
  if (found >= 0 || errno != ENOENT) {
    close(here);
    return found;
  }
  return walked(here, path, place, &directory);
}

int make_parents(const char *path) {
  struct stat info;
  char *copy = strdup(path);
  if (copy == NULL) return -1;
  char *last = strrchr(copy, '/');
  if (last == NULL || last == copy) {
    free(copy);
    return 0;
  }
  *last = '\0';
  int failed = stat(copy, &info);
  for (char *at = copy + 1; failed; at++) {
    if (*at != '/' && *at != '\0') continue;
    char kept = *at;
    *at = '\0';
    bool refused = mkdir(copy, 0777) && errno != EEXIST;
    *at = kept;
    if (refused || kept == '\0') {
      failed = refused || stat(copy, &info);
      break;
    }
  }
  int why = errno;
  free(copy);
  errno = why;
  if (!failed && !S_ISDIR(info.st_mode)) {
    errno = EEXIST;
    return -1;
  }
  return failed ? -1 : 0;
}

int tree_of(int directory, const char *path) {
  return syscall(SYS_open_tree, directory, path, OPEN_TREE_CLONE | O_CLOEXEC | AT_RECURSIVE);
}

int set_attributes(int tree, unsigned long attributes, bool recursive) {
  struct mount_attr wanted = {.attr_set = attributes};
  int flags = AT_EMPTY_PATH | (recursive ? AT_RECURSIVE : 0);
  return syscall(SYS_mount_setattr, tree, "", flags, &wanted, sizeof wanted);
}
