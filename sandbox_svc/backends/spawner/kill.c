/* Kills what a command started, and nothing that belongs to another running command.
 *
 * A process that detached itself is attributed by time: everything that appeared since the command began and descends from no
 * other running command. Who forks faster than he is found is ended with everything else.
 */
#include "spawner.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS = 25, MOST_NS = 1000000000, PAUSE_NS = 2000000 };

typedef struct {
  pid_t pid, parent;
  unsigned long long started; /* clock ticks since boot */
  bool dead;                  /* it only waits to be reaped; its first thread may end before the others */
} Process;

typedef struct { Process *all; int count, room; } Table;

static bool look_at(pid_t pid, Process *process) {
  char path[64], line[1024];
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t size = fd < 0 ? -1 : read(fd, line, sizeof line - 1);
  if (fd >= 0) close(fd);
  if (size <= 0) return false;
  line[size] = '\0';
  char *fields = strrchr(line, ')'), state;
  long threads;
  int parent;
  unsigned long long started;
  /* man proc_pid_stat: state, ppid, fifteen others, num_threads, itrealvalue, starttime */
  if (fields == NULL || sscanf(fields + 1,
                               " %c %d %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %ld %*s %llu", &state,
                               &parent, &threads, &started) != 4)
    return false;
  *process = (Process){pid, parent, started, (state == 'Z' || state == 'X') && threads <= 1};
  return true;
}

static bool look_at_all(Table *table) {
  DIR *proc = opendir("/proc");
  struct dirent *entry;
  table->count = 0;
  while (proc != NULL && (entry = readdir(proc)) != NULL) {
    pid_t pid = isdigit((unsigned char)entry->d_name[0]) ? atoi(entry->d_name) : 0;
    if (pid <= 1) continue;
    if (table->count == table->room) {
      Process *grown = realloc(table->all, (table->room + 256) * sizeof *grown);
      if (grown == NULL) break;
      table->all = grown;
      table->room += 256;
    }
    if (look_at(pid, &table->all[table->count])) table->count++;
  }
  bool whole = proc != NULL && entry == NULL;
  if (proc != NULL) closedir(proc);
  return whole;
}

static int by_pid(const void *a, const void *b) {
  return ((const Process *)a)->pid - ((const Process *)b)->pid;
}

static const Process *found(const Table *table, pid_t pid) {
  Process key = {.pid = pid};
  return table->count ? bsearch(&key, table->all, table->count, sizeof key, by_pid) : NULL;
}

static bool of_another(const Table *table, pid_t pid, const pid_t *others, int count) {
  for (int seen = 0; pid > 1 && seen <= table->count; seen++) {
    for (int i = 0; i < count; i++)
      if (others[i] == pid) return true;
    const Process *process = found(table, pid);
    pid = process ? process->parent : 0;
  }
  return false;
}

static long long now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

void kill_all(void) { kill(-1, SIGKILL); } /* but this process; a fork in progress fails by its signal */

/* Whether the signal was sent before; remembers it. */
static bool seen_before(Table *seen, const Process *process) {
  for (int i = 0; i < seen->count; i++)
    if (seen->all[i].pid == process->pid && seen->all[i].started == process->started) return true;
  if (seen->count == seen->room) {
    Process *grown = realloc(seen->all, (seen->room + 256) * sizeof *grown);
    if (grown == NULL) return false;
    seen->all = grown;
    seen->room += 256;
  }
  seen->all[seen->count++] = *process;
  return false;
}

int kill_descendants(pid_t first, const pid_t *others, int count) {
  Table table = {0}, seen = {0};
  Process began = {0};
  int rounds = 0, killed = -1;
  long long until_ns = now_ns() + MOST_NS;
  look_at(first, &began);
  while (rounds < ROUNDS && now_ns() < until_ns && look_at_all(&table)) {
    int doomed = 0, fresh = 0;
    qsort(table.all, table.count, sizeof *table.all, by_pid);
    for (int i = 0; i < table.count; i++) {
      const Process *process = &table.all[i];
      bool since = process->started > began.started || (process->started == began.started && process->pid >= first);
      if (process->dead || !since || of_another(&table, process->pid, others, count)) continue;
      doomed++;
      if (seen_before(&seen, process)) continue;
      fresh++;
      kill(process->pid, SIGKILL);
    }
    if (doomed == 0) {
      killed = seen.count;
      break;
    }
    if (fresh) rounds++;
    else nanosleep(&(struct timespec){0, PAUSE_NS}, NULL); /* they have the signal and wait for a processor */
  }
  if (killed < 0) kill_all();
  free(table.all);
  free(seen.all);
  return killed;
}
