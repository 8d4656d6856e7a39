/* Work cut into shares which pthreads take, for sources whose shares need memory of their own.

Threads live for one call: nothing survives a fork. A thread that cannot be had is done without. */

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

enum { MAX_SHARES = 64 };

typedef void Work(void *task, int64_t share, int64_t begin, int64_t end);

typedef struct {
    Work *work;
    void *task;
    int64_t share, begin, end;
} Share;

static void *run_share(void *argument) {
    Share *share = argument;
    share->work(share->task, share->share, share->begin, share->end);
    return NULL;
}

/* `work` on units [0, units) in `count` <= MAX_SHARES shares; the calling thread takes the first. */
static void in_shares(Work *work, void *task, int64_t units, int64_t count) {
    Share shares[MAX_SHARES];
    pthread_t running[MAX_SHARES];
    int started[MAX_SHARES] = {0};
    pthread_attr_t roomy;
    pthread_attr_init(&roomy);
    pthread_attr_setstacksize(&roomy, 1 << 20); /* some systems give 128 KiB */
    for (int64_t i = count - 1; i >= 0; i--) {
        shares[i] = (Share){work, task, i, units * i / count, units * (i + 1) / count};
        if (i > 0) started[i] = pthread_create(&running[i], &roomy, run_share, &shares[i]) == 0;
        if (!started[i]) run_share(&shares[i]);
    }
    for (int64_t i = 1; i < count; i++)
        if (started[i]) pthread_join(running[i], NULL);
    pthread_attr_destroy(&roomy);
}
