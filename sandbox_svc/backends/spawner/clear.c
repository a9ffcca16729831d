/* Removes what sandboxes had that wrote nothing: empty directories and control groups, whose names the service made.
 *
 * - Here and not in the service: a dozen short calls by one of its threads make its event loop wait a dozen times.
 * - What is as new is kept for the next seat where the service says so: making and removing a memory group takes the kernel
 *   longer the more file systems are mounted on the host, and each sandbox has five of its own.
 * - As new: nothing in the directory, which has the owner, mode, flags and attributes that it was made with (its times are set
 *   anew); in the group no process, no event that is counted and next to no memory. What cannot be looked at is not as new.
 * - Nothing is followed and nothing with content goes; what is left is told, and the service sees to it.
 */
#include "spawner.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { ANSWER_BYTES = 1024, PATH_BYTES = 4096, ONE_BLOCK = 4096, MOST_SIGNS = 16 };
enum { GET_FLAGS = 0x80086601 };
/* What overlayfs leaves below a work directory, innermost first; then the rest. */
static const char *const MOUNTED[] = {"/w/work/incompat/volatile", "/w/work/incompat", "/w/work", NULL};
static const char MARK[] = "user.overlay.uuid"; /* that overlayfs gives each upper */
static const char *const REST[] = {"/w", "", NULL};

typedef struct { const char *place, *file, *key; long most; } Sign;

static bool gone(bool removed) { return removed || errno == ENOENT; }

static bool remove_each(const char *home, const char *name, const char *const *parts) {
  char path[PATH_BYTES];
  for (const char *const *part = parts; *part; part++) {
    snprintf(path, sizeof path, "%s/run/%s%s", home, name, *part);
    if (!gone(rmdir(path) == 0)) return false;
  }
  return true;
}

/* What is there because an overlay was mounted, and would keep the next from it. */
static bool clear_mounted(const char *home, const char *name) {
  char path[PATH_BYTES];
  snprintf(path, sizeof path, "%s/run/%s/w/work/incompat/volatile/dirty", home, name);
  return gone(unlink(path) == 0) && remove_each(home, name, MOUNTED);
}

static bool clear_directories(const char *home, const char *name) {
  char path[PATH_BYTES];
  snprintf(path, sizeof path, "%s/run/%s/u", home, name);
  return gone(rmdir(path) == 0) && clear_mounted(home, name) && remove_each(home, name, REST);
}

static bool clear_groups(char **places, const char *name) {
  char path[PATH_BYTES];
  bool all = true;
  for (char **place = places; *place; place++) {
    snprintf(path, sizeof path, "%s/%s", *place, name);
    all = gone(rmdir(path) == 0) && all;
  }
  return all;
}

static int directory_of(const char *home, const char *name, const char *part, struct stat *info) {
  char path[PATH_BYTES];
  snprintf(path, sizeof path, "%s/run/%s/%s", home, name, part);
  int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0 || fstat(fd, info) == 0) return fd;
  close(fd);
  return -1;
}

static long flags_of(int fd) {
  long flags = 0;
  return ioctl(fd, GET_FLAGS, &flags) ? -1 : flags;
}

static bool holds_nothing(int fd) {
  DIR *directory = fdopendir(dup(fd));
  const struct dirent *entry;
  errno = 0;
  while (directory != NULL && (entry = readdir(directory)) != NULL)
    if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..")) break;
  bool nothing = directory != NULL && entry == NULL && errno == 0;
  if (directory != NULL) closedir(directory);
  return nothing;
}

/* The upper, which was a sandbox's, beside the work directory, which was made with it and never was. */
static bool directories_as_new(const Settings *settings, const char *name) {
#ifdef WITHOUT_A_LOOK /* so compiled by a test, to see what a sandbox has left */
  return true;
#endif
  struct stat info = {0}, other = {0};
  int upper = directory_of(settings->home, name, "u", &info), work = directory_of(settings->home, name, "w", &other);
  if (upper >= 0) fremovexattr(upper, MARK);
  uid_t uid = settings->root ? settings->uid : other.st_uid; /* without root both are the service's own */
  gid_t gid = settings->root ? settings->gid : other.st_gid;
  bool so = upper >= 0 && work >= 0 && info.st_uid == uid && info.st_gid == gid && info.st_mode == other.st_mode &&
            info.st_size <= ONE_BLOCK && flags_of(upper) == flags_of(work) &&
            flistxattr(upper, NULL, 0) == flistxattr(work, NULL, 0) && holds_nothing(upper) && futimens(upper, NULL) == 0;
  if (upper >= 0) close(upper);
  if (work >= 0) close(work);
  return so;
}

/* Whether a number of a file is small enough: after `key` and a blank at the start of a line, or the first of all. */
static bool as_new(const Sign *sign, const char *name) {
  char path[PATH_BYTES], key[128], content[PATH_BYTES] = "\n";
  snprintf(path, sizeof path, "%s/%s/%s", sign->place, name, sign->file);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t size = fd < 0 ? -1 : read(fd, content + 1, sizeof content - 2);
  if (fd >= 0) close(fd);
  if (size < 0) return false;
  snprintf(key, sizeof key, "\n%s%s", sign->key, *sign->key ? " " : "");
  const char *found = strstr(content, key);
  return found != NULL && strtol(found + strlen(key), NULL, 10) <= sign->most;
}

static bool groups_as_new(const Sign *signs, long count, const char *name) {
  for (long i = 0; i < count; i++)
    if (!as_new(&signs[i], name)) return false;
  return true;
}

static void add(char *list, long number) {
  size_t size = strlen(list);
  snprintf(list + size, ANSWER_BYTES / 2 - size, "%s%ld", size ? ", " : "", number);
}

void clear(int control, const Settings *settings, Request *request) {
  char left[ANSWER_BYTES / 2] = "", kept[ANSWER_BYTES / 2] = "";
  long id = number(request);
  text(request);
  char **places = texts(request);
  long known = number(request);
  Sign signs[MOST_SIGNS];
  if (known > MOST_SIGNS) _exit(3);
  for (Sign *sign = signs; sign < signs + known; sign++) {
    sign->place = text(request);
    sign->file = text(request);
    sign->key = text(request);
    sign->most = number(request);
  }
  long count = number(request);
  for (long i = 0; i < count; i++) {
    const char *entry = text(request), *name = entry + 1; /* 'd' directories, 'g' groups, 'b' both, 'k' both or kept */
    bool keep = *entry == 'k' && directories_as_new(settings, name) && groups_as_new(signs, known, name);
    if (keep && clear_mounted(settings->home, name)) {
      add(kept, i);
      continue;
    }
    bool done = *entry == 'g' || clear_directories(settings->home, name);
    if (*entry != 'd') done = clear_groups(places, name) && done;
    if (!done) add(left, i);
  }
  free(places);
  answer(control, NULL, 0, "{\"id\": %ld, \"left\": [%s], \"kept\": [%s]}", id, left, kept);
}
