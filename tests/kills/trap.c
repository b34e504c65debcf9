/* Loaded before libc (LD_PRELOAD): counts what changes files below one folder, and at one of these calls kills the
 * process, or from there on lets the disk be full. Python arms it through ctypes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char watched[PATH_MAX];
static long trigger = -1;
static int failure = 0; /* 0: kill; else the errno of a full disk */
static atomic_long count = 0;

void trap_arm(const char *folder, long at, int error) {
    strncpy(watched, folder, sizeof watched - 1);
    trigger = at;
    failure = error;
    atomic_store(&count, 0);
}

long trap_count(void) { return atomic_load(&count); }

/* Whether the call fails; a rename or an unlink needs no room on the disk. */
static int strikes(int needs_room) {
    long now = atomic_fetch_add(&count, 1);
    if (trigger < 0 || now < trigger) return 0;
    if (!failure) kill(getpid(), SIGKILL);
    if (!needs_room) return 0;
    errno = failure;
    return 1;
}

static int is_path(const char *path) {
    return watched[0] && path && strncmp(path, watched, strlen(watched)) == 0;
}

static int is_file(int fd) {
    char link[64], target[PATH_MAX];
    if (!watched[0] || fd < 3) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length < 0) return 0;
    target[length] = 0;
    return is_path(target);
}

/* an unlinkat or mkdirat by shutil.rmtree names its folder by a descriptor */
static int is_at(int fd, const char *path) { return path && path[0] == '/' ? is_path(path) : is_file(fd); }

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(type, name, parameters, arguments, touches, room)         \
    type name parameters {                                            \
        static __typeof__(&name) real;                                \
        if (!real) real = NEXT(name);                                 \
        if ((touches) && strikes(room)) return -1;                    \
        return real arguments;                                        \
    }

WRAP(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size), is_file(fd), 1)
WRAP(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), is_file(fd), 1)
WRAP(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at), is_file(fd), 1)
WRAP(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at), is_file(fd), 1)
WRAP(ssize_t, copy_file_range, (int in, off64_t *i, int out, off64_t *o, size_t n, unsigned f), (in, i, out, o, n, f),
     is_file(out), 1)
WRAP(int, fsync, (int fd), (fd), is_file(fd), 1)
WRAP(int, fdatasync, (int fd), (fd), is_file(fd), 1)
WRAP(int, ftruncate, (int fd, off_t size), (fd, size), is_file(fd), 1)
WRAP(int, ftruncate64, (int fd, off64_t size), (fd, size), is_file(fd), 1)
WRAP(int, rename, (const char *from, const char *to), (from, to), is_path(to), 0)
WRAP(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), is_at(b, to), 0)
WRAP(int, renameat2, (int a, const char *from, int b, const char *to, unsigned f), (a, from, b, to, f), is_at(b, to), 0)
WRAP(int, unlink, (const char *path), (path), is_path(path), 0)
WRAP(int, unlinkat, (int fd, const char *path, int f), (fd, path, f), is_at(fd, path), 0)
WRAP(int, rmdir, (const char *path), (path), is_path(path), 0)
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode), is_path(path), 1)
WRAP(int, mkdirat, (int fd, const char *path, mode_t mode), (fd, path, mode), is_at(fd, path), 1)
