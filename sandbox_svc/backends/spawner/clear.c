/* Removes what sandboxes had that wrote nothing: empty directories and control groups, whose names the service made.
 *
 * - Here and not in the service: a dozen short calls by one of its threads make its event loop wait a dozen times.
 * - Nothing is followed and nothing with content goes; what is left is told, and the service sees to it.
 */
#include "spawner.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ANSWER_BYTES = 1024, PATH_BYTES = 4096 };
/* What overlayfs leaves below a work directory, innermost first, then the rest. */
static const char *const PARTS[] = {"/w/work/incompat/volatile", "/w/work/incompat", "/w/work", "/w", "", NULL};

static bool gone(bool removed) { return removed || errno == ENOENT; }

static bool clear_directories(const char *home, const char *name) {
  char path[PATH_BYTES];
  snprintf(path, sizeof path, "%s/run/%s/u", home, name);
  if (rmdir(path)) return false;
  snprintf(path, sizeof path, "%s/run/%s/w/work/incompat/volatile/dirty", home, name);
  if (!gone(unlink(path) == 0)) return false;
  for (const char *const *part = PARTS; *part; part++) {
    snprintf(path, sizeof path, "%s/run/%s%s", home, name, *part);
    if (!gone(rmdir(path) == 0)) return false;
  }
  return true;
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

void clear(int control, const Settings *settings, Request *request) {
  char left[ANSWER_BYTES] = "";
  size_t size = 0;
  long id = number(request);
  text(request);
  char **places = texts(request);
  long count = number(request);
  for (long i = 0; i < count; i++) {
    const char *entry = text(request); /* 'd' or 'g', and a name */
    if (*entry == 'd' ? clear_directories(settings->home, entry + 1) : clear_groups(places, entry + 1)) continue;
    if (size < sizeof left) size += snprintf(left + size, sizeof left - size, "%s%ld", size ? ", " : "", i);
  }
  free(places);
  answer(control, NULL, 0, "{\"id\": %ld, \"left\": [%s]}", id, left);
}
