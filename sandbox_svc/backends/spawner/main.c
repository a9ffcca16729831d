/* The spawner: a process with one thread that clones sandboxes for a service that has many.
 *
 * - Started beside the service, it never shares memory or threads with it.
 * - It ends when its control socket ends, and every sandbox ends with it.
 * - A sandbox's process has its own socket and nothing else of it.
 * - Requests are answered in order; setting a sandbox up happens in the clone, not here.
 * - How the last few first processes ended is remembered: one that was killed was killed from outside, since nobody in a sandbox
 *   can, and any other end is that of the process itself.
 *
 *   spawner FD     what it works with is asked for over the socket, because sandboxes can read its arguments
 */
#include "spawner.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x00001000
#endif
enum { REMEMBERED = 256 };
static const int SPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID;

static struct { pid_t pid; bool killed; } ended[REMEMBERED];
static unsigned seen;

/* The kernel leaves nothing to reap: waitpid(-1) looks at every child, and there may be a thousand. Of two that end at once only
 * one may be told. */
static void remember(int number, siginfo_t *info, void *context) {
  (void)number, (void)context;
  ended[seen % REMEMBERED].pid = info->si_pid;
  ended[seen++ % REMEMBERED].killed = info->si_code == CLD_KILLED && info->si_status == SIGKILL;
}

/* Whether a first process was killed, where that is known. */
static void tell_end(int control, Request *request) {
  long id = number(request);
  const char *told = "";
  text(request);
  pid_t pid = number(request);
  for (unsigned i = 0; i < REMEMBERED; i++) /* the latest of this number counts */
    if (ended[(seen + i) % REMEMBERED].pid == pid)
      told = ended[(seen + i) % REMEMBERED].killed ? ", \"killed\": true" : ", \"killed\": false";
  answer(control, NULL, 0, "{\"id\": %ld%s}", id, told);
}

static bool read_settings(int control, Settings *settings) {
  Request request;
  struct stat info;
  if (!receive(control, &request)) return false;
  settings->home = strdup(text(&request));
  long id = number(&request);
  settings->root = id >= 0;
  settings->uid = settings->root ? (uid_t)id : geteuid();
  settings->gid = settings->root ? (gid_t)id : getegid();
  if (request.count != 1 || fstat(request.fds[0], &info)) return false;
  struct sock_filter *program = malloc(info.st_size);
  if (program == NULL || pread(request.fds[0], program, info.st_size, 0) != info.st_size) return false;
  settings->filter = (struct sock_fprog){info.st_size / sizeof *program, program};
  settings->failed = stat("/proc/self/ns/net", &settings->network) ? strdup("no /proc of this host") : NULL;
  release(&request);
  const char *step = make_root(settings);
  settings->programs = false;
  settings->shown_s = 0;
  if (step != NULL && asprintf(&settings->failed, "%s: %s", step, strerror(errno)) < 0) return false;
  return true;
}

/* Leave this process nothing but its socket. */
static void keep_only(int sock) {
  int null = open("/dev/null", O_RDWR);
  for (int number = 0; number < 3; number++) dup2(null, number);
  if (sock > 3) syscall(SYS_close_range, 3, sock - 1, 0);
  syscall(SYS_close_range, sock + 1, ~0U, 0);
}

static void become_first_process(int sock, const Settings *settings, Request *seat) {
  Request spec;
  prctl(PR_SET_PDEATHSIG, (unsigned long)SIGKILL, 0UL, 0UL, 0UL);
#ifndef IN_THE_NETWORK_OF_THE_HOST
  if (seat->count > 0) enter_network(sock, settings, seat->fds[0]);
#endif
  keep_only(sock);
  setsid();
  settle(sock, settings, seat);
  if (!receive(sock, &spec)) _exit(0);
  long descriptors = finish(settings, &spec);
  release(&spec);
  tell_ready(sock);
  serve(sock, descriptors);
  _exit(0);
}

static void create(int control, Settings *settings, Request *seat) {
  long id = number(seat);
  int ends[2], flags = SPACES;
  text(seat);
#ifndef IN_THE_NETWORK_OF_THE_HOST /* so compiled by a test, to see an attack succeed */
  if (seat->count == 0) flags |= CLONE_NEWNET;
#endif
  if (settings->failed != NULL) { /* told to who asked; the service then starts another */
    answer(control, NULL, 0, "{\"id\": %ld, \"error\": %s}", id, quoted(settings->failed));
    exit(1);
  }
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends)) {
    answer(control, NULL, 0, "{\"id\": %ld, \"error\": %s}", id, quoted(strerror(errno)));
    return;
  }
  seat->at = 0;
  show_programs(settings);
  int held = -1;
  pid_t pid = syscall(SYS_clone, flags | CLONE_PIDFD | SIGCHLD, NULL, &held, NULL, NULL);
  if (pid == 0) become_first_process(ends[1], settings, seat);
  if (pid < 0) {
    answer(control, NULL, 0, "{\"id\": %ld, \"error\": %s}", id, quoted(strerror(errno)));
  } else {
    const int fds[] = {ends[0], held};
    if (!answer(control, fds, 2, "{\"id\": %ld, \"pid\": %d}", id, pid))
      answer(control, NULL, 0, "{\"id\": %ld, \"pid\": %d, \"error\": %s}", id, pid, quoted(strerror(errno)));
    close(held);
  }
  close(ends[0]);
  close(ends[1]);
}

/* Whether a request is of a kind; it is to be read from its start. */
static bool asks(Request *request, const char *what) {
  number(request);
  bool so = strcmp(text(request), what) == 0;
  request->at = 0;
  return so;
}

static void kill_children(void) {
  char path[64];
  pid_t pid;
  snprintf(path, sizeof path, "/proc/self/task/%d/children", getpid());
  FILE *children = fopen(path, "re");
  while (children != NULL && fscanf(children, "%d", &pid) == 1) kill(pid, SIGKILL);
}

int main(int argc, char **argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: spawner FD (it is started by the sandbox service)\n");
    return 2;
  }
  int control = atoi(argv[1]);
  Settings settings;
  fcntl(control, F_SETFD, FD_CLOEXEC);
  signal(SIGINT, SIG_IGN);
  sigaction(SIGCHLD, &(struct sigaction){.sa_sigaction = remember, .sa_flags = SA_SIGINFO | SA_NOCLDWAIT | SA_RESTART}, NULL);
  if (!read_settings(control, &settings)) return 1;
  Request request;
  while (receive(control, &request)) {
    if (asks(&request, "clear")) clear(control, &settings, &request);
    else if (asks(&request, "end")) tell_end(control, &request);
    else create(control, &settings, &request);
    release(&request);
  }
  kill_children();
  return 0;
}
