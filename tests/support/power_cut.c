/* Records what a process writes below a folder, in order: LD_PRELOAD, POWER_CUT_FOLDER, POWER_CUT_RECORD.
 *
 * A record is "op offset length names-length\n", the path below the folder (for a rename two, with a newline between
 * them), and for a write its data. Its readers are in support/power_cut.py. One process records into one file.
 *
 * The file POWER_CUT_FAULT, if it is there, has "op pattern errno": writes (W) or syncs (S) of the files below the folder
 * that match fail so, and "struck" is appended to it. A write with errno 0 writes half. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int record_file = -1;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* The part of a path below the folder, or NULL. */
static const char *below(const char *path) {
    const char *folder = getenv("POWER_CUT_FOLDER");
    size_t length = folder ? strlen(folder) : 0;
    if (!length || strncmp(path, folder, length) || (path[length] && path[length] != '/')) return NULL;
    return path[length] ? path + length + 1 : ".";
}

static const char *name_of(int file, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, 4095);
    if (length < 0) return NULL;
    path[length] = 0;
    return below(path);
}

static void put(const void *data, size_t length) {
    while (length) {
        ssize_t done = REAL(write)(record_file, data, length);
        if (done < 0) abort();
        data = (const char *)data + done;
        length -= done;
    }
}

static void record(char op, const char *name, off_t offset, const void *data, size_t length) {
    char head[64];
    int size = snprintf(head, sizeof head, "%c %lld %zu %zu\n", op, (long long)offset, length, strlen(name));
    pthread_mutex_lock(&lock);
    if (record_file < 0) record_file = open(getenv("POWER_CUT_RECORD"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    put(head, size);
    put(name, strlen(name));
    if (data) put(data, length);
    pthread_mutex_unlock(&lock);
}

static void record_of(int file, char op, off_t offset, const void *data, size_t length) {
    char path[4096];
    const char *name = file == record_file ? NULL : name_of(file, path);
    if (name) record(op, name, offset, data, length);
}

/* Whether this call is to fail; then `error` has its errno. */
static int fails(int file, char op, int *error) {
    char text[512], pattern[256], path[4096], which = 0;
    const char *fault = getenv("POWER_CUT_FAULT");
    int before = errno, told = fault ? open(fault, O_RDONLY | O_CLOEXEC) : -1;
    ssize_t length = told < 0 ? -1 : read(told, text, sizeof text - 1);
    if (told >= 0) close(told);
    errno = before;
    if (length <= 0 || file == record_file) return 0;
    text[length] = 0;
    if (sscanf(text, "%c %255s %d", &which, pattern, error) != 3 || which != op) return 0;
    const char *name = name_of(file, path);
    if (!name || fnmatch(pattern, name, 0)) return 0;
    if ((told = open(fault, O_WRONLY | O_APPEND | O_CLOEXEC)) >= 0) { /* it says that it has struck */
        if (REAL(write)(told, "\nstruck", 7) != 7) abort();
        close(told);
    }
    errno = before;
    return 1;
}

/* What a failing write does to its length: -1 with errno, or 0 with half of it. */
static int cut(int file, size_t *length) {
    int error;
    if (!fails(file, 'W', &error)) return 0;
    if (!error) *length = (*length + 1) / 2;
    errno = error ? error : errno;
    return error ? -1 : 0;
}

ssize_t write(int file, const void *data, size_t length) {
    if (file > 2 && cut(file, &length)) return -1;
    ssize_t done = REAL(write)(file, data, length);
    if (done > 0 && file > 2) {
        off_t end = lseek(file, 0, SEEK_CUR);
        if (end >= 0) record_of(file, 'W', end - done, data, done);
    }
    return done;
}

ssize_t pwrite64(int file, const void *data, size_t length, off64_t offset) {
    if (cut(file, &length)) return -1;
    ssize_t done = REAL(pwrite64)(file, data, length, offset);
    if (done > 0) record_of(file, 'W', offset, data, done);
    return done;
}

ssize_t pwrite(int file, const void *data, size_t length, off_t offset) { return pwrite64(file, data, length, offset); }

int ftruncate64(int file, off64_t length) {
    int result = REAL(ftruncate64)(file, length);
    if (!result) record_of(file, 'T', length, NULL, 0);
    return result;
}

int ftruncate(int file, off_t length) { return ftruncate64(file, length); }

/* A sync that fails is recorded as such: Linux then takes for written what it could not write. */
static int synced(int file, int (*sync)(int)) {
    int error, failed = fails(file, 'S', &error), result = failed ? -1 : sync(file);
    if (failed || !result) record_of(file, failed ? 'F' : 'S', 0, NULL, 0);
    if (failed) errno = error;
    return result;
}

int fsync(int file) { return synced(file, REAL(fsync)); }

int fdatasync(int file) { return synced(file, REAL(fdatasync)); }

int unlink(const char *path) {
    int result = REAL(unlink)(path);
    const char *name = below(path);
    if (!result && name) record('U', name, 0, NULL, 0);
    return result;
}

int mkdir(const char *path, mode_t mode) {
    int result = REAL(mkdir)(path, mode);
    const char *name = below(path);
    if (!result && name) record('M', name, 0, NULL, 0);
    return result;
}

int rename(const char *from, const char *to) {
    int result = REAL(rename)(from, to);
    const char *first = below(from), *second = below(to);
    if (!result && first && second) {
        char names[8192];
        snprintf(names, sizeof names, "%s\n%s", first, second);
        record('R', names, 0, NULL, 0);
    }
    return result;
}
