/* The spawner of the embedded runtime, and the first process of each of its sandboxes.
 *
 * - One program, one thread; nothing here is linked but the C library.
 * - The service asks in fields, each ended by a NUL, over a SEQPACKET socket; answers are JSON objects (see `wire.py`).
 * - The service is trusted, what runs in a sandbox is not: no byte of a sandbox's files is ever interpreted here.
 */
#ifndef REGREEN_SPAWNER_H
#define REGREEN_SPAWNER_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <linux/filter.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>

enum { MOST_FDS = 8, CHANNELS = 4 };
#ifndef SYS_fsopen
#define SYS_fsopen 430
#define SYS_fsconfig 431
#define SYS_fsmount 432
#define SYS_fspick 433
#endif
enum { SAFE = MS_NOSUID | MS_NODEV };
enum { ATTRIBUTE_READ_ONLY = 1, ATTRIBUTE_NOSUID = 2, ATTRIBUTE_NODEV = 4 };

/* One request and the descriptors that came with it, which are closed when it is done with. */
typedef struct {
  char *bytes;
  size_t size, at;
  void *mapped;
  int fds[MOST_FDS], count;
  bool cut; /* descriptors are missing, because this process may have no more */
} Request;

/* What does not change from one sandbox to the next. */
typedef struct {
  char *home;             /* the runtime's directory */
  bool root;              /* sandboxes get the ids below; else they have this process's own */
  uid_t uid;
  gid_t gid;
  struct sock_fprog filter;
  struct stat network;    /* the spawner's own, in which no sandbox may ever be */
  bool programs;          /* sandboxes get the host's programs on inodes that are not the host's */
  time_t shown_s;         /* when these were mounted; 0: never */
  bool devices;           /* each sandbox gets device nodes of its own; else they are the host's */
  char *failed;           /* why there can be no sandboxes; NULL: nothing */
} Settings;

/* wire.c */
bool receive(int sock, Request *request); /* false at the end of the stream */
void release(Request *request);
char *text(Request *request); /* the next field; ends this process where there is none, which is never so */
long number(Request *request);
char **texts(Request *request); /* a count, then so many fields; to be freed */
/* False, with errno, where the descriptors cannot be sent; who cannot answer at all ends, which the service sees. */
bool answer(int sock, const int *fds, int count, const char *format, ...) __attribute__((format(printf, 4, 5)));
const char *quoted(const char *text); /* for one use at a time within an answer */

/* root.c: where a sandbox's mounts hang */
const char *make_root(Settings *settings);       /* the step that failed, with errno, or NULL; once, in the spawner */
const char *make_devices(bool own);              /* in "dev": of its own, or bound; the step that failed, with errno, or NULL */
bool seal(const char *place);                    /* a mount of which nothing may be changed from now on */
bool enter_root(void);                           /* from a clone's new root as its working directory */
bool put(const char *path, const char *value);
bool map_ids(unsigned inside, uid_t uid, gid_t gid);

/* seat.c: from a cloned process to a confined one; a failure is told with its step and ends this process */
void enter_network(int sock, const Settings *settings, int network); /* that of an earlier sandbox, or a new one */
void settle(int sock, const Settings *settings, Request *seat);
long finish(const Settings *settings, Request *spec); /* how many descriptors a command may have */
void tell_ready(int sock);                            /* with a descriptor of its network */

/* place.c: objects of a file tree that may be hostile */
int open_beneath(int directory, const char *path, int flags);
int open_inside(const char *path, int flags, mode_t mode);
/* The same where no part of the path is a link, or ELOOP; `link_itself` also where its last part is one. */
int open_itself(const char *path, int flags);
int link_itself(const char *path);
/* A file to write: a link there is replaced, a link on the way is ENOTDIR, directories are made. */
int make_itself(const char *path, int flags, mode_t mode);
int make_place(const char *path, bool directory); /* an O_PATH descriptor below ".", made where it is missing */
int make_parents(const char *path);
int tree_of(int directory, const char *path); /* a detached clone of the mounts there */
int set_attributes(int tree, unsigned long attributes, bool recursive);

/* apart.c: the host's directories of programs, and how sandboxes see them */
enum { MOST_PROGRAMS = 8 };
extern const char *const HOST_PROGRAMS[];
bool make_places(void);                                /* once, on the stage */
void show_programs(Settings *settings);                /* mounts overlays of them where there are none, or old ones */
int apart(const Settings *settings, const char *path); /* in a clone, once: one of these, or the host's own directory */

/* pid1.c */
void serve(int sock, long descriptors); /* descriptors: how many a command may have */

/* clear.c */
void clear(int control, const Settings *settings, Request *request);

/* kill.c */
int kill_descendants(pid_t first, const pid_t *others, int count); /* how many; -1: everything was killed */
void kill_all(void);

/* files.c: each returns a descriptor, or -1 with errno */
int open_to_read(const char *path, struct stat *info, bool follow);
int open_to_write(const char *path, mode_t mode, bool follow);
int listen_on(int port);
typedef struct { long resident_bytes, processes, unlinked_bytes; } Usage;
Usage usage(void);
#endif
