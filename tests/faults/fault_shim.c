/* Make one durable system call fail, for tests; loaded with LD_PRELOAD.
 *
 * fault_arm(root, nth, mode) counts the calls that change files under `root` (open for writing, write, sync, rename,
 * link, unlink, truncate, mkdir, rmdir, fallocate) and makes the nth of them, from 1, fail:
 *   1  it returns ENOSPC once          2  ENOSPC for it and every later call that needs space
 *   3  it returns EIO                  4  the process is killed before it
 *   5  the process is killed after it  6  half of a write is done, then the process is killed
 *   7  power cut: all writes and truncations that were not synced are undone, then the process is killed
 * Mode 0 only counts. fault_calls() then holds one line for each call, "letter name path": the letter is w for a write,
 * c for another call that needs space, s for a sync, n for any other, and a capital where writes before it were not
 * synced; the path is the one that the call was given or that its descriptor was opened with, relative to `root`.
 *
 * Directory entries are taken as durable at once. Memory maps, SQLite's shared memory (-shm), which nothing reads after
 * a crash, and libraries that call the kernel without the C library are not followed.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_FD 4096
#define MAX_CALLS (1 << 20) /* bytes */
#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

struct undo { struct undo *next; int fd; dev_t dev; ino_t ino; off_t offset, size; size_t old; char bytes[]; };

static char root[4096];
static size_t root_length;
static long count, nth;
static int mode = -1;
static __thread int busy;
static char calls[MAX_CALLS];
static size_t calls_length;
static char tracked[MAX_FD];
static struct undo *undos;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

void fault_arm(const char *folder, long number, int how) {
    strncpy(root, folder, sizeof root - 1);
    root_length = strlen(root);
    count = 0, nth = number, mode = how;
    calls_length = 0, calls[0] = 0;
}

void fault_disarm(void) { mode = -1; }

const char *fault_calls(void) { return calls; }

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

static void record(char kind, const char *name, const char *path) {
    size_t skipped = strncmp(path, root, root_length) ? 0 : root_length;
    while (skipped && path[skipped] == '/') skipped++;
    pthread_mutex_lock(&mutex);
    int length = snprintf(calls + calls_length, sizeof calls - calls_length, "%c %s %s\n",
                          undos ? toupper(kind) : kind, name, path + skipped);
    if (calls_length + length < sizeof calls) calls_length += length;
    else calls[calls_length] = 0;
    pthread_mutex_unlock(&mutex);
}

/* Count a call of a kind; return 1 if it must fail with errno set. */
static int step(char kind, const char *name, const char *path) {
    if (mode < 0 || busy) return 0;
    long now = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (!mode) record(kind, name, path);
    if (mode == 2 && now >= nth && (kind == 'w' || kind == 'c')) return errno = ENOSPC, 1;
    if (now != nth) return 0;
    switch (mode) {
    case 1: return errno = ENOSPC, 1;
    case 3: return errno = EIO, 1;
    case 4: case 7: die();
    }
    return 0;
}

static int step_open(char kind, const char *name, int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = mode ? 0 : readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    return step(kind, name, path);
}

static void after(void) {
    if (mode == 5 && !busy && count == nth) die();
}

/* Say whether a path, relative to the folder of a descriptor, is under the root. */
static int inside_at(int folder, const char *path) {
    if (mode < 0 || busy || !root_length) return 0;
    char full[8192];
    int length = 0;
    if (path[0] != '/') {
        char link[64];
        snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
        length = readlink(link, full, sizeof full / 2);
        if (length < 0) return 0;
        full[length++] = '/';
    }
    snprintf(full + length, sizeof full - length, "%s", path);
    size_t end = strlen(full);
    return !strncmp(full, root, root_length) && !(end > 4 && !strcmp(full + end - 4, "-shm"));
}

static int inside(const char *path) { return inside_at(AT_FDCWD, path); }
static int is_tracked(int fd) { return mode >= 0 && !busy && fd >= 0 && fd < MAX_FD && tracked[fd]; }

static int opened(int fd, int track) {
    if (fd >= 0 && fd < MAX_FD) tracked[fd] = track;
    return fd;
}

/* Keep what a write of `size` bytes at `offset` replaces, until the file is synced. */
static void remember(int fd, size_t size, off_t offset) {
    struct stat status;
    if ((mode != 0 && mode != 7) || fstat(fd, &status) || !S_ISREG(status.st_mode)) return;
    struct undo *u = malloc(sizeof *u + size);
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    busy = 1;
    int copy = open(name, O_RDWR | O_CLOEXEC);
    ssize_t old = copy < 0 ? 0 : pread(copy, u->bytes, size, offset);
    busy = 0;
    if (copy < 0) { free(u); return; }
    pthread_mutex_lock(&mutex);
    *u = (struct undo){undos, copy, status.st_dev, status.st_ino, offset, status.st_size, old > 0 ? (size_t)old : 0};
    undos = u;
    pthread_mutex_unlock(&mutex);
}

static void forget(int fd) {
    struct stat status;
    if ((mode != 0 && mode != 7) || fstat(fd, &status)) return;
    pthread_mutex_lock(&mutex);
    for (struct undo **link = &undos; *link;) {
        struct undo *u = *link;
        if (u->dev == status.st_dev && u->ino == status.st_ino) { *link = u->next; close(u->fd); free(u); }
        else link = &u->next;
    }
    pthread_mutex_unlock(&mutex);
}

static int for_writing(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT; }

#define OPEN(name, declaration, types, arguments, folder) \
    int name declaration { \
        REAL(int, #name, types); \
        va_list list; va_start(list, flags); mode_t bits = va_arg(list, mode_t); va_end(list); \
        int track = inside_at(folder, path), counted = track && for_writing(flags); \
        if (counted && step('c', #name, path)) return -1; \
        int fd = opened(real arguments, track); \
        if (counted) after(); \
        return fd; \
    }
#define LIST(...) __VA_ARGS__
OPEN(open, (const char *path, int flags, ...), LIST(const char *, int, ...), (path, flags, bits), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), LIST(const char *, int, ...), (path, flags, bits), AT_FDCWD)
OPEN(openat, (int at, const char *path, int flags, ...), LIST(int, const char *, int, ...), (at, path, flags, bits), at)
OPEN(openat64, (int at, const char *path, int flags, ...), LIST(int, const char *, int, ...), (at, path, flags, bits), at)

#define FOPEN(name) \
    FILE *name(const char *path, const char *how) { \
        REAL(FILE *, #name, const char *, const char *); \
        int track = inside(path), counted = track && (how[0] != 'r' || strchr(how, '+')); \
        if (counted && step('c', #name, path)) return NULL; \
        FILE *file = real(path, how); \
        if (file) opened(fileno(file), track); \
        if (counted) after(); \
        return file; \
    }
FOPEN(fopen)
FOPEN(fopen64)

int fclose(FILE *file) {
    REAL(int, "fclose", FILE *);
    opened(fileno(file), 0);
    return real(file);
}

int close(int fd) {
    REAL(int, "close", int);
    opened(fd, 0);
    return real(fd);
}

static off_t write_offset(int fd) {
    struct stat status;
    return fcntl(fd, F_GETFL) & O_APPEND && !fstat(fd, &status) ? status.st_size : lseek(fd, 0, SEEK_CUR);
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (!is_tracked(fd)) return real(fd, data, size);
    if (step_open('w', "write", fd)) return -1;
    remember(fd, size, write_offset(fd));
    if (mode == 6 && count == nth) { (void)!real(fd, data, size / 2); die(); }
    ssize_t written = real(fd, data, size);
    after();
    return written;
}

ssize_t writev(int fd, const struct iovec *pieces, int number) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (!is_tracked(fd)) return real(fd, pieces, number);
    if (step_open('w', "writev", fd)) return -1;
    size_t size = 0;
    for (int i = 0; i < number; i++) size += pieces[i].iov_len;
    remember(fd, size, write_offset(fd));
    if (mode == 6 && count == nth) {
        busy = 1;
        size_t left = size / 2;
        for (int i = 0; i < number && left; i++) {
            size_t part = pieces[i].iov_len < left ? pieces[i].iov_len : left;
            (void)!write(fd, pieces[i].iov_base, part);
            left -= part;
        }
        die();
    }
    ssize_t written = real(fd, pieces, number);
    after();
    return written;
}

#define PWRITE(name) \
    ssize_t name(int fd, const void *data, size_t size, off_t offset) { \
        REAL(ssize_t, #name, int, const void *, size_t, off_t); \
        if (!is_tracked(fd)) return real(fd, data, size, offset); \
        if (step_open('w', #name, fd)) return -1; \
        remember(fd, size, offset); \
        if (mode == 6 && count == nth) { (void)!real(fd, data, size / 2, offset); die(); } \
        ssize_t written = real(fd, data, size, offset); \
        after(); \
        return written; \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

/* Copies from one file to another, which Python's shutil uses. */
#define COPY(name, declaration, types, arguments, halved) \
    ssize_t name declaration { \
        REAL(ssize_t, #name, types); \
        if (!is_tracked(out)) return real arguments; \
        if (step_open('w', #name, out)) return -1; \
        remember(out, size, write_offset(out)); \
        if (mode == 6 && count == nth) { (void)!real halved; die(); } \
        ssize_t written = real arguments; \
        after(); \
        return written; \
    }
COPY(sendfile, (int out, int in, off_t *offset, size_t size), LIST(int, int, off_t *, size_t),
     (out, in, offset, size), (out, in, offset, size / 2))
COPY(sendfile64, (int out, int in, off_t *offset, size_t size), LIST(int, int, off_t *, size_t),
     (out, in, offset, size), (out, in, offset, size / 2))
COPY(copy_file_range, (int in, off_t *from, int out, off_t *to, size_t size, unsigned flags),
     LIST(int, off_t *, int, off_t *, size_t, unsigned), (in, from, out, to, size, flags),
     (in, from, out, to, size / 2, flags))

#define SYNC(name) \
    int name(int fd) { \
        REAL(int, #name, int); \
        if (!is_tracked(fd)) return real(fd); \
        if (step_open('s', #name, fd)) return -1; \
        int result = real(fd); \
        forget(fd); \
        after(); \
        return result; \
    }
SYNC(fsync)
SYNC(fdatasync)

static void remember_tail(int fd, off_t size) {
    struct stat status;
    if (!fstat(fd, &status) && status.st_size > size) remember(fd, status.st_size - size, size);
}

#define TRUNCATE(name) \
    int name(int fd, off_t size) { \
        REAL(int, #name, int, off_t); \
        if (!is_tracked(fd)) return real(fd, size); \
        if (step_open('n', #name, fd)) return -1; \
        remember_tail(fd, size); \
        int result = real(fd, size); \
        after(); \
        return result; \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

#define TRUNCATE_PATH(name) \
    int name(const char *path, off_t size) { \
        REAL(int, #name, const char *, off_t); \
        if (!inside(path)) return real(path, size); \
        if (step('n', #name, path)) return -1; \
        busy = 1; \
        int fd = open(path, O_RDWR | O_CLOEXEC); \
        busy = 0; \
        if (fd >= 0) { remember_tail(fd, size); close(fd); } \
        int result = real(path, size); \
        after(); \
        return result; \
    }
TRUNCATE_PATH(truncate)
TRUNCATE_PATH(truncate64)

#define ALLOCATE(name) \
    int name(int fd, off_t offset, off_t size) { \
        REAL(int, #name, int, off_t, off_t); \
        if (!is_tracked(fd)) return real(fd, offset, size); \
        if (step_open('c', #name, fd)) return errno; \
        int result = real(fd, offset, size); \
        after(); \
        return result; \
    }
ALLOCATE(posix_fallocate)
ALLOCATE(posix_fallocate64)

#define NAMED(name, declaration, types, arguments, path_of, is_inside, kind) \
    int name declaration { \
        REAL(int, #name, types); \
        if (!(is_inside)) return real arguments; \
        if (step(kind, #name, path_of)) return -1; \
        int result = real arguments; \
        after(); \
        return result; \
    }
NAMED(rename, (const char *from, const char *to), LIST(const char *, const char *), (from, to), to, inside(to), 'n')
NAMED(renameat, (int at, const char *from, int at_to, const char *to), LIST(int, const char *, int, const char *),
      (at, from, at_to, to), to, inside_at(at_to, to), 'n')
NAMED(unlink, (const char *path), LIST(const char *), (path), path, inside(path), 'n')
NAMED(unlinkat, (int at, const char *path, int flags), LIST(int, const char *, int), (at, path, flags),
      path, inside_at(at, path), 'n')
NAMED(rmdir, (const char *path), LIST(const char *), (path), path, inside(path), 'n')
NAMED(link, (const char *from, const char *to), LIST(const char *, const char *), (from, to), to, inside(to), 'c')
NAMED(linkat, (int at, const char *from, int at_to, const char *to, int flags),
      LIST(int, const char *, int, const char *, int), (at, from, at_to, to, flags), to,
      inside_at(at_to, to), 'c')
/* Of a folder that is there, mkdir fails in any case, and programs try it often. */
NAMED(mkdir, (const char *path, mode_t bits), LIST(const char *, mode_t), (path, bits),
      path, inside(path) && access(path, F_OK), 'c')
