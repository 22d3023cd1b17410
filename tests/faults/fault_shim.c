/* Make one durable system call fail, for tests; loaded with LD_PRELOAD.
 *
 * fault_arm(root, nth, mode) counts the calls that change files under `root` (open to create, write, sync, rename,
 * unlink, truncate, mkdir, fallocate) and makes the nth of them, from 1, fail:
 *   1  it returns ENOSPC once          2  ENOSPC for it and every later call that needs space
 *   3  it returns EIO                  4  the process is killed before it
 *   5  the process is killed after it  6  half of a write is done, then the process is killed
 *   7  power cut: all writes that were not synced are undone, then the process is killed
 * Mode 0 only counts. Directory entries are taken as durable at once; memory maps are not followed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_FD 4096
#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

struct undo { struct undo *next; int fd; dev_t dev; ino_t ino; off_t offset, size; size_t old; char bytes[]; };

static char root[4096];
static size_t root_length;
static long count, nth;
static int mode = -1, busy;
static char tracked[MAX_FD];
static struct undo *undos;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

void fault_arm(const char *folder, long number, int how) {
    strncpy(root, folder, sizeof root - 1);
    root_length = strlen(root);
    count = 0, nth = number, mode = how;
}

long fault_count(void) { return count; }

static void undo_unsynced(void) {
    for (struct undo *u = undos; u; u = u->next) {
        if (u->old) (void)!pwrite(u->fd, u->bytes, u->old, u->offset);
        (void)!ftruncate(u->fd, u->size);
    }
}

static void die(void) {
    busy = 1;
    if (mode == 7) undo_unsynced();
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Count a call; return 1 if it must fail with errno set. `needs_space`: a full disk stops it. */
static int step(int needs_space) {
    if (mode < 0 || busy) return 0;
    long now = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (mode == 2 && now >= nth && needs_space) return errno = ENOSPC, 1;
    if (now != nth) return 0;
    switch (mode) {
    case 1: return errno = ENOSPC, 1;
    case 3: return errno = EIO, 1;
    case 4: case 7: die();
    }
    return 0;
}

static void after(void) {
    if (mode == 5 && !busy && count == nth) die();
}

static int inside(const char *path) { return mode >= 0 && !busy && root_length && !strncmp(path, root, root_length); }
static int is_tracked(int fd) { return mode >= 0 && !busy && fd >= 0 && fd < MAX_FD && tracked[fd]; }

static int opened(int fd, int track) {
    if (fd >= 0 && fd < MAX_FD) tracked[fd] = track;
    return fd;
}

static void remember(int fd, size_t size, off_t offset) {
    struct stat status;
    if (mode != 7 || fstat(fd, &status) || !S_ISREG(status.st_mode)) return;
    struct undo *u = malloc(sizeof *u + size);
    int readable = open("/dev/null", O_RDONLY);
    char name[64] = "/proc/self/fd/";
    char digits[16]; int n = 0, value = fd;
    do digits[n++] = '0' + value % 10; while (value /= 10);
    size_t length = strlen(name);
    while (n) name[length++] = digits[--n];
    name[length] = 0;
    busy = 1;
    int copy = open(name, O_RDWR);
    busy = 0;
    close(readable);
    if (copy < 0) { free(u); return; }
    opened(copy, 0);
    ssize_t old = pread(copy, u->bytes, size, offset);
    *u = (struct undo){undos, copy, status.st_dev, status.st_ino, offset, status.st_size, old > 0 ? (size_t)old : 0};
    undos = u;
}

static void forget(int fd) {
    struct stat status;
    if (mode != 7 || fstat(fd, &status)) return;
    for (struct undo **link = &undos; *link;) {
        struct undo *u = *link;
        if (u->dev == status.st_dev && u->ino == status.st_ino) { *link = u->next; close(u->fd); free(u); }
        else link = &u->next;
    }
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list list; va_start(list, flags); mode_t bits = va_arg(list, mode_t); va_end(list); \
        int track = inside(path); \
        if (track && flags & O_CREAT && step(1)) return -1; \
        int fd = opened(real(path, flags, bits), track); \
        if (track && flags & O_CREAT) after(); \
        return fd; \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(int, #name, int, const char *, int, ...); \
        va_list list; va_start(list, flags); mode_t bits = va_arg(list, mode_t); va_end(list); \
        int track = inside(path); \
        if (track && flags & O_CREAT && step(1)) return -1; \
        int fd = opened(real(folder, path, flags, bits), track); \
        if (track && flags & O_CREAT) after(); \
        return fd; \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
    REAL(int, "close", int);
    if (fd >= 0 && fd < MAX_FD) tracked[fd] = 0;
    return real(fd);
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (!is_tracked(fd)) return real(fd, data, size);
    if (step(1)) return -1;
    int flags = fcntl(fd, F_GETFL);
    struct stat status;
    fstat(fd, &status);
    remember(fd, size, flags & O_APPEND ? status.st_size : lseek(fd, 0, SEEK_CUR));
    if (mode == 6 && count == nth) { (void)!real(fd, data, size / 2); die(); }
    ssize_t written = real(fd, data, size);
    after();
    return written;
}

#define PWRITE(name) \
    ssize_t name(int fd, const void *data, size_t size, off_t offset) { \
        REAL(ssize_t, #name, int, const void *, size_t, off_t); \
        if (!is_tracked(fd)) return real(fd, data, size, offset); \
        if (step(1)) return -1; \
        remember(fd, size, offset); \
        if (mode == 6 && count == nth) { (void)!real(fd, data, size / 2, offset); die(); } \
        ssize_t written = real(fd, data, size, offset); \
        after(); \
        return written; \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define SYNC(name) \
    int name(int fd) { \
        REAL(int, #name, int); \
        if (!is_tracked(fd)) return real(fd); \
        if (step(0)) return -1; \
        int result = real(fd); \
        pthread_mutex_lock(&mutex); forget(fd); pthread_mutex_unlock(&mutex); \
        after(); \
        return result; \
    }
SYNC(fsync)
SYNC(fdatasync)

#define TRUNCATE(name) \
    int name(int fd, off_t size) { \
        REAL(int, #name, int, off_t); \
        if (!is_tracked(fd)) return real(fd, size); \
        if (step(0)) return -1; \
        int result = real(fd, size); \
        after(); \
        return result; \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

#define ALLOCATE(name) \
    int name(int fd, off_t offset, off_t size) { \
        REAL(int, #name, int, off_t, off_t); \
        if (!is_tracked(fd)) return real(fd, offset, size); \
        if (step(1)) return errno; \
        int result = real(fd, offset, size); \
        after(); \
        return result; \
    }
ALLOCATE(posix_fallocate)
ALLOCATE(posix_fallocate64)

#define NAMED(name, declaration, types, arguments, path, space) \
    int name declaration { \
        REAL(int, #name, types); \
        if (!inside(path)) return real arguments; \
        if (step(space)) return -1; \
        int result = real arguments; \
        after(); \
        return result; \
    }
#define LIST(...) __VA_ARGS__
NAMED(rename, (const char *from, const char *to), LIST(const char *, const char *), (from, to), to, 0)
NAMED(unlink, (const char *path), LIST(const char *), (path), path, 0)
NAMED(mkdir, (const char *path, mode_t bits), LIST(const char *, mode_t), (path, bits), path, 1)
