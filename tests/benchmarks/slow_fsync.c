/* Preload it to count flushes to the disk, and to add FSYNC_DELAY_US to each flush. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

static atomic_long flushes;

long count_flushes(void) { return flushes; }

static int flush(const char *name, int file)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    const char *delay = getenv("FSYNC_DELAY_US");
    long us = delay ? atol(delay) : 0;
    struct timespec pause = {us / 1000000, us % 1000000 * 1000};

    flushes++;
    if (us)
        nanosleep(&pause, 0);
    return real(file);
}

int fsync(int file) { return flush("fsync", file); }
int fdatasync(int file) { return flush("fdatasync", file); }
