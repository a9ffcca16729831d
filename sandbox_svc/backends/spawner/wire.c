/* Requests in, answers out. A body too large for one message comes in a memfd, as the first descriptor. */
#include "spawner.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { INLINE_BYTES = 1 << 16, BODY_BYTES = 32 << 20, ANSWER_BYTES = 2048 };

static char inline_bytes[INLINE_BYTES];

static void take_fds(struct msghdr *message, Request *request) {
  for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part != NULL; part = CMSG_NXTHDR(message, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    int count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (int i = 0; i < count && request->count < MOST_FDS; i++)
      memcpy(&request->fds[request->count++], CMSG_DATA(part) + i * sizeof(int), sizeof(int));
  }
}

static bool map_body(Request *request) {
  struct stat info;
  if (request->count == 0 || fstat(request->fds[0], &info) || info.st_size <= 0 || info.st_size > BODY_BYTES) return false;
  void *body = mmap(NULL, info.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, request->fds[0], 0);
  if (body == MAP_FAILED) return false;
  close(request->fds[0]);
  memmove(request->fds, request->fds + 1, --request->count * sizeof(int));
  request->mapped = request->bytes = body;
  request->size = info.st_size;
  return true;
}

bool receive(int sock, Request *request) {
  union { struct cmsghdr head; char room[CMSG_SPACE(MOST_FDS * sizeof(int))]; } control;
  struct iovec body = {inline_bytes, sizeof inline_bytes};
  struct msghdr message = {.msg_iov = &body, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
  ssize_t size;
  memset(request, 0, sizeof *request);
  do size = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
  while (size < 0 && errno == EINTR);
  if (size <= 0) return false;
  take_fds(&message, request);
  request->cut = message.msg_flags & MSG_CTRUNC;
  request->bytes = inline_bytes;
  request->size = size;
  bool whole = inline_bytes[size - 1] == '\0';
  if (whole && strcmp(inline_bytes, "memfd") == 0) whole = map_body(request) && request->bytes[request->size - 1] == '\0';
  if (!whole) release(request);
  return whole;
}

void release(Request *request) {
  for (int i = 0; i < request->count; i++) close(request->fds[i]);
  if (request->mapped != NULL) munmap(request->mapped, request->size);
  request->count = 0;
  request->mapped = NULL;
}

char *text(Request *request) {
  if (request->at >= request->size) _exit(3);
  char *field = request->bytes + request->at;
  request->at += strlen(field) + 1;
  return field;
}

long number(Request *request) { return strtol(text(request), NULL, 10); }

char **texts(Request *request) {
  long count = number(request);
  if (count < 0 || (size_t)count > request->size) _exit(3);
  char **found = calloc(count + 1, sizeof *found);
  if (found == NULL) _exit(3);
  for (long i = 0; i < count; i++) found[i] = text(request);
  return found;
}

const char *quoted(const char *text) {
  static char room[1024];
  size_t at = 0;
  room[at++] = '"';
  for (; *text && at < sizeof room - 3; text++) {
    unsigned char byte = *text;
    if (byte == '"' || byte == '\\') room[at++] = '\\';
    room[at++] = byte < 0x20 || byte == 0x7f ? '?' : byte; /* what is no UTF-8, the service replaces */
  }
  room[at++] = '"';
  room[at] = '\0';
  return room;
}

bool answer(int sock, const int *fds, int count, const char *format, ...) {
  char bytes[ANSWER_BYTES];
  va_list values;
  va_start(values, format);
  int size = vsnprintf(bytes, sizeof bytes, format, values);
  va_end(values);
  if (size >= (int)sizeof bytes) size = sizeof bytes - 1;
  union { struct cmsghdr head; char room[CMSG_SPACE(MOST_FDS * sizeof(int))]; } control = {0};
  struct iovec body = {bytes, size};
  struct msghdr message = {.msg_iov = &body, .msg_iovlen = 1};
  if (count > 0) {
    message.msg_control = &control;
    message.msg_controllen = CMSG_SPACE(count * sizeof(int));
    control.head.cmsg_level = SOL_SOCKET;
    control.head.cmsg_type = SCM_RIGHTS;
    control.head.cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(&control.head), fds, count * sizeof(int));
  }
  ssize_t sent;
  do sent = sendmsg(sock, &message, MSG_NOSIGNAL);
  while (sent < 0 && errno == EINTR);
  if (sent < 0 && count == 0) _exit(5);
  return sent >= 0;
}
