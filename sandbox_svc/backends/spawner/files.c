/* What the service gets of a sandbox's files and ports, and what it is told of its use of memory.
 *
 * Paths are resolved by the kernel inside the sandbox's root; only regular files are handed out, and none of /proc.
 */
#include "spawner.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BACKLOG = 64 };

typedef struct { ino_t inode; long bytes; } Unlinked;
typedef struct { Unlinked *all; size_t count, room; } Found;

/* The descriptor, or -1 after it was closed because it is of nothing that may be handed out. */
static int refuse_odd(int fd, struct stat *info) {
  struct stat proc;
  int why = 0;
  if (fd < 0) return -1;
  if (fstat(fd, info) || stat("/proc", &proc)) why = errno;
  else if (!S_ISREG(info->st_mode)) why = S_ISDIR(info->st_mode) ? EISDIR : EINVAL;
  else if (info->st_dev == proc.st_dev) why = EACCES;
  if (!why) return fd;
  close(fd);
  errno = why;
  return -1;
}

int open_to_read(const char *path, struct stat *info, bool follow) {
  return refuse_odd(follow ? open_inside(path, O_RDONLY, 0) : open_itself(path, O_RDONLY), info);
}

int open_to_write(const char *path, mode_t mode, bool follow) {
  struct stat info;
  if (follow && make_parents(path)) return -1;
  int opened = follow ? open_inside(path, O_WRONLY | O_CREAT, mode) : make_itself(path, O_WRONLY, mode);
  int fd = refuse_odd(opened, &info);
  if (fd >= 0 && fchmod(fd, mode)) { /* the service empties it: it may have no descriptor left to receive this one with */
    int why = errno;
    close(fd);
    errno = why;
    return -1;
  }
  return fd;
}

int listen_on(int port) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  int sock = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (sock >= 0 && (bind(sock, (struct sockaddr *)&address, sizeof address) || listen(sock, BACKLOG))) {
    int why = errno;
    close(sock);
    errno = why;
    return -1;
  }
  return sock;
}

static int by_inode(const void *a, const void *b) {
  ino_t one = ((const Unlinked *)a)->inode, other = ((const Unlinked *)b)->inode;
  return (one > other) - (one < other);
}

/* Keep one of each: processes may share a file in any number of descriptors. */
static void squeeze(Found *found) {
  size_t kept = 0;
  if (found->count) qsort(found->all, found->count, sizeof *found->all, by_inode);
  for (size_t i = 0; i < found->count; i++)
    if (kept == 0 || found->all[kept - 1].inode != found->all[i].inode) found->all[kept++] = found->all[i];
  found->count = kept;
}

static void add_unlinked(Found *found, ino_t inode, long bytes) {
  bool full = found->count == found->room;
  if (full) squeeze(found);
  if (full && found->count >= found->room / 2) {
    size_t room = found->room ? found->room * 2 : 1024;
    Unlinked *grown = realloc(found->all, room * sizeof *grown);
    if (grown == NULL && found->count == found->room) return;
    if (grown != NULL) {
      found->all = grown;
      found->room = room;
    }
  }
  found->all[found->count++] = (Unlinked){inode, bytes};
}

static void look_at_descriptors(const char *pid, dev_t device, Found *found) {
  char path[300];
  struct dirent *entry;
  struct stat info;
  snprintf(path, sizeof path, "/proc/%.20s/fd", pid);
  DIR *fds = opendir(path);
  while (fds != NULL && (entry = readdir(fds)) != NULL)
    if (fstatat(dirfd(fds), entry->d_name, &info, 0) == 0 && info.st_nlink == 0 && info.st_dev == device)
      add_unlinked(found, info.st_ino, info.st_blocks * 512L);
  if (fds != NULL) closedir(fds);
}

/* Resident memory, processes, and bytes of files that are open but unlinked, each counted once. */
Usage usage(void) {
  Usage now = {0};
  Found found = {0};
  struct stat root;
  struct dirent *entry;
  long pages, page = sysconf(_SC_PAGESIZE);
  DIR *proc = stat("/", &root) ? NULL : opendir("/proc");
  while (proc != NULL && (entry = readdir(proc)) != NULL) {
    char path[300];
    if (!isdigit((unsigned char)entry->d_name[0]) || strcmp(entry->d_name, "1") == 0) continue;
    snprintf(path, sizeof path, "/proc/%.20s/statm", entry->d_name);
    FILE *source = fopen(path, "re");
    if (source == NULL) continue;
    if (fscanf(source, "%*d %ld", &pages) == 1) {
      now.resident_bytes += pages * page;
      now.processes++;
    }
    fclose(source);
    look_at_descriptors(entry->d_name, root.st_dev, &found);
  }
  if (proc != NULL) closedir(proc);
  squeeze(&found);
  for (size_t i = 0; i < found.count; i++) now.unlinked_bytes += found.all[i].bytes;
  free(found.all);
  return now;
}
