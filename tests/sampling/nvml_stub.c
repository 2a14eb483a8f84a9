/* Answers the calls of NVML that ddplog makes, for GPUs that do not exist: the tests run the real pynvml against it.
 *
 * What it answers stands in the file that $NVML_STUB names, read anew at every call, one word of these a line:
 *
 *     gpus N                        how many there are
 *     mig GPU                       this one is split: two instances, of GPU instances 1 and 2
 *     gpm                           the devices count GPM metrics
 *     fail FUNCTION CODE [GPU]      the call returns CODE
 *     hang FUNCTION [GPU]           the call never returns
 *     process GPU PID MIB           the process computes there
 *     xid GPU CODE                  an event, told once to each process that asks
 *
 * Every value tells its GPU: see the functions. An instance of GPU g counts as device 100 + 10 g + its GPU instance.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef unsigned int uint;
typedef unsigned long long ull;
typedef struct Device { int number; int gpu; int instance; } Device;

enum { MAX_GPUS = 16, OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, SMALL = 7, TIMED_OUT = 10, NO_LIBRARY = 9 };
static Device gpus[MAX_GPUS], parts[MAX_GPUS][3];
static int num_xids;

static int each(const char *word, int (*take)(char *rest, void *data), void *data)
{
    const char *path = getenv("NVML_STUB");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[256];
    size_t size = strlen(word);
    int found = 0;
    while (file && !found && fgets(line, sizeof line, file))
        if (!strncmp(line, word, size) && (line[size] == ' ' || line[size] == '\n'))
            found = take(line + size, data);
    if (file)
        fclose(file);
    return found;
}

struct call { const char *name; int gpu; };

static int fails(char *rest, void *data)
{
    struct call *call = data;
    char name[64];
    int code = 0, gpu = -1, count = sscanf(rest, "%63s %d %d", name, &code, &gpu);
    return count >= 2 && !strcmp(name, call->name) && (count < 3 || gpu == call->gpu) ? code : 0;
}

static int hangs(char *rest, void *data)
{
    struct call *call = data;
    char name[64];
    int gpu = -1, count = sscanf(rest, "%63s %d", name, &gpu);
    return count >= 1 && !strcmp(name, call->name) && (count < 2 || gpu == call->gpu);
}

static int enter(const char *name, Device *device)
{
    struct call call = {name, device ? device->gpu : -1};
    while (each("hang", hangs, &call))
        for (;;)
            pause();
    return each("fail", fails, &call);
}

#define ENTER(device) do { int refused = enter(__func__, device); if (refused) return refused; } while (0)
#define WHOLE(device) do { if ((device)->instance) return NOT_SUPPORTED; } while (0)

static int a_number(char *rest, void *data) { return sscanf(rest, "%d", (int *)data) == 1; }
static int is_number(char *rest, void *data) { return atoi(rest) == *(int *)data; }
static int yes(char *rest, void *data) { (void)rest; (void)data; return 1; }

static int is_split(int gpu) { return each("mig", is_number, &gpu); }

static ull micros(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000ull + now.tv_nsec / 1000;
}

int nvmlInitWithFlags(uint flags)
{
    (void)flags;
    ENTER(NULL);
    if (!getenv("NVML_STUB"))
        return NO_LIBRARY;
    for (int gpu = 0; gpu < MAX_GPUS; gpu++) {
        gpus[gpu] = (Device){gpu, gpu, 0};
        for (int part = 1; part < 3; part++)
            parts[gpu][part] = (Device){100 + 10 * gpu + part, gpu, part};
    }
    return OK;
}

int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { (void)code; return "an error of the stub"; }

int nvmlDeviceGetCount_v2(uint *count)
{
    int found = 0;
    ENTER(NULL);
    each("gpus", a_number, &found);
    *count = found;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(uint index, Device **device) { ENTER(&gpus[index]); *device = &gpus[index]; return OK; }

int nvmlDeviceGetUUID(Device *device, char *uuid, uint size)
{
    ENTER(device);
    snprintf(uuid, size, "%s-%08x-0000-1111-2222-333333333333", device->instance ? "MIG" : "GPU",
             (uint)(0xa0000000u + 0x01010101u * device->number));
    return OK;
}

int nvmlDeviceGetMigMode(Device *device, uint *current, uint *pending)
{
    ENTER(device);
    *current = *pending = is_split(device->gpu);
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, uint *count) { ENTER(device); *count = 7; return OK; }

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, uint index, Device **part)
{
    ENTER(device);
    if (index > 1)
        return NOT_FOUND;
    *part = &parts[device->gpu][index + 1];
    return OK;
}

int nvmlDeviceGetGpuInstanceId(Device *device, uint *id) { ENTER(device); *id = device->instance; return OK; }
int nvmlDeviceGetComputeInstanceId(Device *device, uint *id) { ENTER(device); *id = 0; return OK; }

int nvmlDeviceGetUtilizationRates(Device *device, uint *rates)
{
    ENTER(device);
    WHOLE(device);
    rates[0] = 10 + device->number;
    rates[1] = 50 + device->number;
    return OK;
}

int nvmlDeviceGetMemoryInfo_v2(Device *device, void *data)
{
    struct { uint version; ull total, reserved, free, used; } *memory = data;
    ENTER(device);
    memory->total = 80ull << 30;
    memory->used = (ull)(device->number + 1) << 30;
    return OK;
}

int nvmlDeviceGetMemoryInfo(Device *device, ull *memory)
{
    ENTER(device);
    memory[0] = 80ull << 30;
    memory[2] = (ull)(device->number + 1) << 30;
    return OK;
}

int nvmlDeviceGetPowerUsage(Device *device, uint *milliwatts)
{
    ENTER(device);
    WHOLE(device);
    *milliwatts = 100500 + 1000 * device->number;
    return OK;
}

int nvmlDeviceGetEnforcedPowerLimit(Device *device, uint *milliwatts)
{
    ENTER(device);
    WHOLE(device);
    *milliwatts = 700000;
    return OK;
}

int nvmlDeviceGetTemperature(Device *device, int sensor, uint *degrees)
{
    ENTER(device);
    WHOLE(device);
    *degrees = sensor ? 0 : 40 + device->number;
    return OK;
}

int nvmlDeviceGetClockInfo(Device *device, int kind, uint *mhz)
{
    ENTER(device);
    WHOLE(device);
    *mhz = 1000 * kind + device->number; /* 1: SM, 2: memory */
    return OK;
}

int nvmlDeviceGetPcieThroughput(Device *device, int counter, uint *kib)
{
    ENTER(device);
    WHOLE(device);
    usleep(20000); /* as the driver does */
    *kib = 1000 * (device->number + 1) + counter; /* 0: sent, 1: received */
    return OK;
}

struct field { uint id, scope; long long time, latency; int type, ret; ull value; };

int nvmlDeviceGetFieldValues(Device *device, int count, struct field *fields)
{
    ENTER(device);
    WHOLE(device);
    for (int i = 0; i < count; i++) {
        ull rate = device->number + 1 + (fields[i].id == 139 ? 100 : 0); /* MiB/s */
        fields[i].ret = fields[i].scope == 0xFFFFFFFFu ? OK : INVALID;
        fields[i].time = micros();
        fields[i].value = (ull)fields[i].time * rate * 1024 / 1000000;
    }
    return OK;
}

int nvmlDeviceGetCurrentClocksEventReasons(Device *device, ull *bits)
{
    ENTER(device);
    WHOLE(device);
    *bits = device->number % 2 ? 0x4 | 0x40 : 0x1;
    return OK;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(Device *device, ull *bits)
{
    ENTER(device);
    WHOLE(device);
    *bits = 0x8;
    return OK;
}

int nvmlDeviceGetTotalEccErrors(Device *device, int kind, int counter, ull *count)
{
    ENTER(device);
    WHOLE(device);
    *count = 1000 * kind + 100 * counter + device->number; /* 0: corrected, 1: not; 0: since the driver's start */
    return OK;
}

struct process { uint pid; ull memory; uint gpu_instance, compute_instance; };
struct processes { int device; uint room, count; struct process *found; };

static int a_process(char *rest, void *data)
{
    struct processes *all = data;
    int device = 0, pid = 0, mib = 0;
    if (sscanf(rest, "%d %d %d", &device, &pid, &mib) == 3 && device == all->device) {
        if (all->count < all->room)
            all->found[all->count] = (struct process){pid, (ull)mib << 20, 0, 0};
        all->count++;
    }
    return 0;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, uint *count, struct process *found)
{
    struct processes all = {device->number, found ? *count : 0, 0, found};
    ENTER(device);
    each("process", a_process, &all);
    *count = all.count;
    return all.count > all.room ? SMALL : OK;
}

struct sample { uint pid; ull time; uint sm, memory, encoder, decoder; };

int nvmlDeviceGetProcessUtilization(Device *device, struct sample *samples, uint *count, ull since)
{
    struct process found[64];
    struct processes all = {device->number, 64, 0, found};
    (void)since;
    ENTER(device);
    WHOLE(device);
    each("process", a_process, &all);
    if (!all.count)
        return NOT_FOUND;
    if (!samples || *count < all.count) {
        *count = all.count;
        return SMALL;
    }
    *count = all.count;
    for (uint i = 0; i < all.count; i++)
        samples[i] = (struct sample){found[i].pid, micros(), 5 + device->number, 0, 0, 0};
    return OK;
}

int nvmlEventSetCreate(void **events) { ENTER(NULL); *events = &num_xids; return OK; }

int nvmlDeviceRegisterEvents(Device *device, ull kinds, void *events)
{
    (void)events;
    ENTER(device);
    return kinds == 8 ? OK : INVALID;
}

struct event { Device *device; ull kind, data; uint gpu_instance, compute_instance; };
struct events { int skip; struct event *event; };

static int an_event(char *rest, void *data)
{
    struct events *all = data;
    int gpu = 0, code = 0, instance = -1;
    if (sscanf(rest, "%d %d %d", &gpu, &code, &instance) < 2 || all->skip-- > 0)
        return 0;
    *all->event = (struct event){&gpus[gpu], 8, code, instance, -1};
    return 1;
}

int nvmlEventSetWait_v2(void *set, struct event *event, uint milliseconds)
{
    struct events all = {num_xids, event};
    (void)set;
    (void)milliseconds;
    ENTER(NULL);
    if (!each("xid", an_event, &all))
        return TIMED_OUT;
    num_xids++;
    return OK;
}

int nvmlGpmQueryDeviceSupport(Device *device, uint *support) { ENTER(device); support[1] = each("gpm", yes, NULL); return OK; }
int nvmlGpmSampleAlloc(Device ***sample) { ENTER(NULL); *sample = calloc(1, sizeof **sample); return OK; }
int nvmlGpmSampleFree(Device **sample) { free(sample); return OK; }

int nvmlGpmSampleGet(Device *device, Device **sample)
{
    ENTER(device);
    WHOLE(device);
    *sample = device;
    return OK;
}

int nvmlGpmMigSampleGet(Device *device, uint instance, Device **sample)
{
    ENTER(device);
    *sample = &parts[device->gpu][instance];
    return OK;
}

struct metric { uint id; int ret; double value; const char *names[3]; };
struct gpm { uint version, count; Device **before, **now; struct metric metrics[]; };

int nvmlGpmMetricsGet(struct gpm *wanted)
{
    Device *device = *wanted->now;
    ENTER(device);
    if (wanted->version != 1 || !*wanted->before)
        return INVALID;
    for (uint i = 0; i < wanted->count; i++) {
        wanted->metrics[i].value = wanted->metrics[i].id + 0.25 + device->number;
        wanted->metrics[i].ret = wanted->metrics[i].id == 11 ? NOT_SUPPORTED : OK; /* FP64 */
    }
    return OK;
}
