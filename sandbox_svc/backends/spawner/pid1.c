/* The first process of a sandbox: runs commands, opens files, reaps orphans.
 *
 * - It is pid 1 of the sandbox's pid namespace: when it ends, every process of the sandbox ends.
 * - It holds no capability, cannot be dumped or traced, and takes no signal but SIGCHLD.
 * - It ends when its socket ends, so no sandbox outlives its service.
 * - Who starts a command and waits for nothing but its end is told of its beginning only if there is none.
 * - One thread, no state on disk; commands start by vfork and execve and inherit its confinement.
 * - It may have more descriptors than they: the kernel bounds what one user has in flight over unix sockets by the limit of
 *   whoever sends, all sandboxes are one user, and so a command that has as many in flight as it may does not silence this.
 * - A terminal comes from the sandbox's own devpts; its other side is handed to the service.
 */
#include "spawner.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct {
  long id;
  pid_t pid;
  int terminal; /* held open while the command runs, so that its output ends with it and not before */
} Job;

typedef struct { int outside, inside; char path[32]; } Terminal;

static Job *jobs;
static int running, room;
static rlim_t most_descriptors;

/* A descriptor that is readable when a child has ended. */
static int child_signals(void) {
  sigset_t set;
  signal(SIGCHLD, SIG_DFL); /* the spawner has a handler of its own */
  sigemptyset(&set);
  sigaddset(&set, SIGCHLD);
  sigprocmask(SIG_BLOCK, &set, NULL);
  return signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
}

static Job *job_of(long id) {
  for (Job *job = jobs; job < jobs + running; job++)
    if (job->id == id) return job;
  return NULL;
}

static bool make_room(void) {
  if (running < room) return true;
  Job *grown = realloc(jobs, (room + 64) * sizeof *jobs);
  if (grown == NULL) return false;
  jobs = grown;
  room += 64;
  return true;
}

static bool is_program(const char *path) {
  struct stat info;
  return stat(path, &info) == 0 && S_ISREG(info.st_mode) && access(path, X_OK) == 0;
}

/* The path of a program, looked for as a shell does; an errno, or 0. */
static int find(const char *program, char *const *env, char *found, size_t size) {
  const char *path = "";
  if (strlen(program) >= size) return ENAMETOOLONG;
  if (strchr(program, '/') != NULL) {
    strcpy(found, program);
    return 0;
  }
  for (; *env; env++)
    if (strncmp(*env, "PATH=", 5) == 0) path = *env + 5;
  for (;;) {
    int length = strcspn(path, ":");
    int needed = snprintf(found, size, "%.*s/%s", length ? length : 1, length ? path : ".", program);
    if (needed > 0 && (size_t)needed < size && is_program(found)) return 0;
    if (path[length] == '\0') return ENOENT;
    path += length + 1;
  }
}

static bool open_terminal(Terminal *terminal, long rows, long columns) {
  int number, unlocked = 0, flags = O_RDWR | O_NOCTTY | O_CLOEXEC;
  struct winsize size = {.ws_row = rows, .ws_col = columns};
  terminal->outside = open("/dev/ptmx", flags);
  if (terminal->outside < 0) return false;
  if (ioctl(terminal->outside, TIOCGPTN, &number) == 0 && ioctl(terminal->outside, TIOCSPTLCK, &unlocked) == 0 &&
      ioctl(terminal->outside, TIOCSWINSZ, &size) == 0) {
    snprintf(terminal->path, sizeof terminal->path, "/dev/pts/%d", number);
    terminal->inside = open(terminal->path, flags);
    if (terminal->inside >= 0) return true;
  }
  int kept = errno;
  close(terminal->outside);
  errno = kept;
  return false;
}

/* In the child of a vfork, which shares this process's memory: system calls alone. An errno, or it does not return. */
static int become(const char *path, char **argv, char **env, const Request *request, const Terminal *terminal) {
  const struct rlimit descriptors = {most_descriptors, most_descriptors};
  sigset_t none;
  sigemptyset(&none);
  if (setsid() < 0 || sigprocmask(SIG_SETMASK, &none, NULL)) return errno;
  if (terminal != NULL) { /* of a session without one, the first that its leader opens becomes the controlling one */
    int fd = open(terminal->path, O_RDWR);
    for (int number = 0; number < 3; number++)
      if (fd < 0 || dup2(fd, number) < 0) return errno;
    if (fd >= 3) close(fd);
  }
  for (int number = 0; terminal == NULL && number < request->count && number < CHANNELS; number++)
    if (dup2(request->fds[number], number) < 0) return errno;
  if (setrlimit(RLIMIT_NOFILE, &descriptors)) return errno;
  execve(path, argv, env);
  return errno;
}

/* Start a program with the descriptors of the request, or a terminal, as its first ones; an errno, or 0. */
static int start(const char *path, char **argv, char **env, const Request *request, const Terminal *terminal, pid_t *pid) {
  static volatile int failed;
  if (request->cut) return EMFILE;
  failed = 0;
  *pid = vfork();
  if (*pid < 0) return errno;
  if (*pid == 0) {
    failed = become(path, argv, env, request, terminal);
    _exit(127);
  }
  if (failed) waitpid(*pid, NULL, 0);
  return failed;
}

static void refuse(int sock, long id, const char *kind, bool told, const char *what, const char *why, int number) {
  char line[600];
  snprintf(line, sizeof line, "%.400s%s%s", what, *what ? ": " : "", why);
  answer(sock, NULL, 0, "{\"id\": %ld, \"errno\": %d, \"error\": %s, \"%s\": true%s}", id, number, quoted(line), kind,
         told ? "" : ", \"refused\": true");
}

static void run(int sock, long id, Request *request) {
  char found[4096];
  Terminal terminal, *wanted = NULL;
  pid_t pid;
  bool told = number(request);
  long rows = number(request), columns = number(request);
  const char *cwd = text(request);
  char **argv = texts(request), **env = texts(request);
  const char *kind = "spawn", *what = argv[0] ? argv[0] : "", *why = NULL;
  int failed = 0;
  if (rows > 0 && !open_terminal(&terminal, rows, columns)) {
    failed = errno, kind = "no_terminal", what = "";
    goto end;
  }
  wanted = rows > 0 ? &terminal : NULL;
  if (chdir(cwd)) {
    failed = errno, kind = "cwd", what = cwd;
  } else if (!make_room()) {
    failed = ENOMEM;
  } else if ((failed = find(what, env, found, sizeof found)) != 0) {
    why = failed == ENOENT ? "command not found" : NULL;
  } else {
    failed = start(found, argv, env, request, wanted, &pid);
  }
  if (chdir("/")) _exit(4);
  if (failed && wanted) {
    close(terminal.outside);
    close(terminal.inside);
  }
  if (!failed) {
    jobs[running++] = (Job){id, pid, wanted ? terminal.inside : -1};
    if (told && !answer(sock, &terminal.outside, wanted ? 1 : 0, "{\"id\": %ld, \"pid\": %d}", id, pid)) {
      failed = errno, kind = "no_terminal", what = "";
      kill(-pid, SIGKILL);
    }
    if (wanted) close(terminal.outside);
  }
end:
  if (failed) refuse(sock, id, kind, told, what, why ? why : strerror(failed), failed);
  free(argv);
  free(env);
}

/* Signal a command's process group; its number is its own until it is reaped. */
static void deliver(int sock, long id, Request *request) {
  Job *job = job_of(number(request));
  bool delivered = job != NULL && kill(-job->pid, number(request)) == 0;
  answer(sock, NULL, 0, "{\"id\": %ld, \"delivered\": %s}", id, delivered ? "true" : "false");
}

static void kill_job(int sock, long id, Request *request) {
  Job *job = job_of(number(request));
  pid_t *others = calloc(running + 1, sizeof *others);
  int count = 0, killed = 0;
  for (Job *other = jobs; others != NULL && other < jobs + running; other++)
    if (other != job) others[count++] = other->pid;
  if (job != NULL && others != NULL) killed = kill_descendants(job->pid, others, count);
  free(others);
  if (killed < 0) answer(sock, NULL, 0, "{\"id\": %ld, \"all\": true}", id);
  else answer(sock, NULL, 0, "{\"id\": %ld, \"killed\": %d}", id, killed);
}

/* Hand a descriptor out, or say why there is none. */
static void hand_out(int sock, long id, int fd, const char *facts) {
  bool done = fd >= 0 && answer(sock, &fd, 1, "{\"id\": %ld%s}", id, facts);
  int why = errno;
  if (fd >= 0) close(fd);
  if (done) return;
  const char *told = why == EINVAL ? "not a regular file" : strerror(why);
  answer(sock, NULL, 0, "{\"id\": %ld, \"errno\": %d, \"error\": %s}", id, why, quoted(told));
}

static void dispatch(int sock, Request *request) {
  char facts[96] = "";
  struct stat info;
  long id = number(request);
  const char *asked = text(request);
  if (strcmp(asked, "run") == 0) {
    run(sock, id, request);
  } else if (strcmp(asked, "signal") == 0) {
    deliver(sock, id, request);
  } else if (strcmp(asked, "kill") == 0) {
    kill_job(sock, id, request);
  } else if (strcmp(asked, "kill_all") == 0) {
    kill_all();
    answer(sock, NULL, 0, "{\"id\": %ld, \"all\": true}", id);
  } else if (strcmp(asked, "open") == 0) {
    const char *path = text(request);
    int fd = open_to_read(path, &info, number(request));
    if (fd >= 0) snprintf(facts, sizeof facts, ", \"size\": %ld, \"mode\": %d", (long)info.st_size, info.st_mode & 07777);
    hand_out(sock, id, fd, facts);
  } else if (strcmp(asked, "create") == 0) {
    const char *path = text(request);
    mode_t mode = number(request) & 0777;
    hand_out(sock, id, open_to_write(path, mode, number(request)), facts);
  } else if (strcmp(asked, "link") == 0) {
    hand_out(sock, id, link_itself(text(request)), facts);
  } else if (strcmp(asked, "listen") == 0) {
    hand_out(sock, id, listen_on(number(request)), facts);
  } else if (strcmp(asked, "usage") == 0) {
    Usage now = usage();
    answer(sock, NULL, 0, "{\"id\": %ld, \"memory\": %ld, \"processes\": %ld, \"unlinked\": %ld}", id, now.resident_bytes,
           now.processes, now.unlinked_bytes);
  } else {
    answer(sock, NULL, 0, "{\"id\": %ld, \"errno\": %d, \"error\": \"unknown request\"}", id, EINVAL);
  }
}

static void reap(int sock) {
  struct rusage used;
  pid_t pid;
  int status;
  while ((pid = wait4(-1, &status, WNOHANG, &used)) > 0) {
    Job *job = jobs;
    while (job < jobs + running && job->pid != pid) job++;
    if (job == jobs + running) continue;
    double cpu_s = used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    if (job->terminal >= 0) close(job->terminal);
    answer(sock, NULL, 0, "{\"id\": %ld, \"status\": %d, \"cpu_s\": %.6f, \"peak_bytes\": %ld, \"wrote_bytes\": %ld}", job->id, status,
           cpu_s, used.ru_maxrss * 1024, used.ru_oublock * 512);
    *job = jobs[--running];
  }
}

void serve(int sock, long descriptors) {
  most_descriptors = descriptors;
  for (int number = 1; number < NSIG; number++)
    if (number != SIGKILL && number != SIGSTOP && number != SIGCHLD) signal(number, SIG_DFL); /* which pid 1 does not get */
  int ended = child_signals();
  struct pollfd watched[] = {{sock, POLLIN, 0}, {ended, POLLIN, 0}};
  while (ended >= 0) {
    if (poll(watched, 2, -1) < 0) continue;
    if (watched[1].revents) {
      char unused[1024];
      while (read(ended, unused, sizeof unused) > 0) continue;
      reap(sock);
    }
    if (watched[0].revents) {
      Request request;
      if (!receive(sock, &request)) return;
      dispatch(sock, &request);
      release(&request);
    }
  }
}
